"""Improve a language model on a reward: group relative policy optimisation (GRPO) and its variants.

    python train_grpo.py                                 # 10 seconds on two CPU cores, no network
    python train_grpo.py --model DIR --dataset prompts.jsonl --reward my_rewards.py:f --lr 1e-6

With no flags it trains the toy of tests/toy (sums), reward 1 for the correct sum: the fraction of
correct samples on sums that it never saw (pass@1) goes from 47–49 % to 92–94 % (seeds 0 to 2). The
first step's ratio is exactly 1, its KL exactly 0.

"GRPO" means at least five things in public code. Here, by default (Shao et al. 2024, arXiv
2402.03300, eq. 3; "the step" is one batch of samples and, by default, one optimizer step; with
--minibatches the denominators below are those of a minibatch, never those of a micro-batch):
  advantage   (r − mean of the group) / (std of the group + 1e-4), std with G − 1; see (5)
  weight      1/|o| within a completion, then the mean over the completions of the step
  clip        ratio per token, 1 − 0.2 … 1 + 0.2; matters only after a batch's first update
  KL          k3 · ρ to the starting policy, per token, added to the loss with β = 0.04; see (9)
  groups of zero variance (all rewards alike) have advantage 0. With β > 0 they give KL gradient,
              with β = 0 nothing is computed for them. They stay in every denominator, unless
              --dynamic-sampling replaces them
Differs from the paper in: the KL is k3 · ρ, which descends the KL of the objective, where the
paper's k3 (`--kl k3`) descends the opposite one; π_ref stays the starting policy, which algorithm 1
there renews in each iteration, as it does the reward model; and in the + 1e-4. One update per batch
is the paper's.
A variant is one row of VARIANTS. Rewards have trl's signature, without trainer_state.
"""
# --- derivation -----------------------------------------------------------------------------------
#
# Notation: x prompt, o_1 … o_G sampled completions, o_{i,t} their tokens, r_i rewards, π the
# policy, π_old the policy that sampled, π_ref the frozen start. log π(o|x) = Σ_t log π(o_t | x,
# o_<t), end token included, all at --temperature.
#
# 1. The goal is the expected reward; its gradient is an expectation too (log-derivative trick):
#
#        J(π) = E_x E_{o~π} [ r(x, o) ]        ∇J = E_{o~π} [ r(x, o) ∇ log π(o|x) ]           (1)
#
# 2. A baseline costs nothing. For any b that does not depend on o,
#    E_{o~π}[ b ∇ log π(o|x) ] = b ∇ Σ_o π(o|x) = 0, so
#
#        ∇J = E [ (r − b) ∇ log π(o|x) ]                                                       (2)
#
#    A value network estimates b = E_o[ r ]. GRPO samples a group and takes its mean instead:
#    b = mean(r_1 … r_G). Neither is the b of least variance, which weighs each reward by
#    ‖∇ log π(o|x)‖². The group's mean does contain r_i: that shrinks the gradient by (G − 1)/G, no
#    more. Leaving i out makes it exact (RLOO):
#
#        r_i − mean_{j≠i} r_j = G/(G − 1) · (r_i − mean_j r_j)                                 (3)
#
# 3. Old samples may be used again with a weight ρ_t = π(o_t|·)/π_old(o_t|·) on each token, whose
#    gradient at π = π_old is (2):
#
#        ∇ ρ_t A = ρ_t A ∇ log π(o_t|·)       so at the first update  ∇ = A ∇ log π            (4)
#
#    ρ_t is not the importance weight of the completion, which is the product Π_t ρ_t: away from
#    π_old the gradient is an approximation. Far away the weights are wild; PPO's clip removes the
#    gain from moving further than 1 ± ε in A's direction.
#
# 4. Advantage. All are group based; the scale is a choice, and each choice is somebody's "GRPO":
#
#        A_i = (r_i − mean) / (std_group + 1e-4)      group-std (GRPO, DAPO, GSPO)
#              (r_i − mean) / (std_batch + 1e-4)      batch-std: one scale for a batch
#               r_i − mean                            none (Dr. GRPO, arXiv 2503.20783)        (5)
#
#    Dividing by the group's std weighs prompts by their difficulty: those that are almost always
#    or almost never solved vary least and count most (the objection of Dr. GRPO). "none" does not,
#    and is (2) up to the factor in (3).
#
# 5. Surrogates, to be maximised, per token t of completion i:
#
#        ℓ = min( ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A )        grpo, dapo, dr-grpo           (6)
#        the same with s_i = exp( mean_t log ρ_t ) for all t     gspo (arXiv 2507.18071)       (7)
#        sg[ min(ρ, 1 + ε_high) ] A log π                        cispo (arXiv 2506.13585)      (8)
#
#    Their sum is weighted. With n_i tokens in completion i, N completions and M tokens in the step,
#    L = --max-new-tokens:
#
#        grpo, gspo     1/(n_i N)    a token of a short completion weighs more
#        dapo, cispo    1/M          all tokens weigh alike (in DAPO's paper: those of a group)
#        dr-grpo        1/(N L)      no length bias
#        rloo           1/N          on the ratio Π_t ρ_t, and on the sum of the tokens' KL
#
#    These defaults are ours: β = 0.04 for all (the papers of dapo, dr-grpo and cispo have no KL:
#    --beta 0); rloo's clip and KL in the loss (Ahmadian et al. 2024: none, --kl reward); cispo's
#    cap 1 + 4 (the paper does not disclose its own; in trl, epsilon_high = 5 is the cap itself).
#
# 6. Staying near π_ref: subtract β KL(π ‖ π_ref). With d = log π_ref(o_t) − log π(o_t), o_t from π
#    (Schulman 2020, joschu.net/blog/kl-approx.html):
#
#        k1 = −d     k2 = d²/2     k3 = e^d − 1 − d      E[k1] = E[k3] = KL(π ‖ π_ref)         (9)
#
#    But the gradient of an expectation is not the expectation of a gradient, for π is also what we
#    sample from. As a loss term, for one token:
#
#        k1        E[∇ log π] = 0: no force at all
#        k2        E[−d ∇ log π] = ∇ KL(π ‖ π_ref), the one in the objective     --kl k2
#        k3        E[(1 − e^d) ∇ log π] = ∇ KL(π_ref ‖ π), the paper's           --kl k3
#        k3 · ρ    ∇ KL(π ‖ π_ref), unbiased also off policy                     --kl k3-unbiased
#
#    (the last: DeepSeek-V3.2, arXiv 2512.02556, the default here; on policy its gradient is that of
#    k2, sample by sample; with gspo, too, its ρ is the token's, where trl takes the sequence's).
#    Summed over a completion these take the prefixes as given: what o_1 does to the KL of o_2 is
#    missing. The KL of whole completions is an expected reward like any other, so by (2) it is
#    exact, with more variance, where it is subtracted (and the tokens of all completions weigh
#    alike, as in rloo and dr-grpo):
#
#        A(r) − β ( k − mean of the group ),    k = Σ_t k1                  --kl reward       (10)
#
#    centred, but not divided by the rewards' std as A(r) is: β would cancel where all rewards are
#    alike. test_eq9 and test_eq10 check each by enumeration. β = 0 loads no reference.

# --- imports --------------------------------------------------------------------------------------
import argparse
import hashlib
import json
import math
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from tqdm import tqdm

import common
from common import Group, between, fail, for_all, sum_by, token_logps
from score import RewardError, load_reward

TOY = Path(__file__).parent / "tests" / "toy"
NAME = Path(__file__).stem.removeprefix("train_")    # a copy of this file writes to runs/ITS NAME
SAVE_SECONDS = 600                                   # a checkpoint at least this often


# --- arguments ------------------------------------------------------------------------------------
# Blocks between `shared` marks are the same text in other trainers.

class Variant(NamedTuple):
    """What `--loss` chooses; its defaults of --clip-low, --clip-high and --advantage."""
    ratio: str                # a "token" has its own, or its completion's "mean" or "sum" of logs
    weight: Callable          # lengths (N,), --max-new-tokens → weight of each one's tokens
    clip_low: float
    clip_high: float
    advantage: str


VARIANTS = {
    "grpo": Variant("token", lambda n, L: 1 / (n * len(n)), 0.2, 0.2, "group-std"),
    "dapo": Variant("token", lambda n, L: 1 / n.sum(), 0.2, 0.28, "group-std"),
    "dr-grpo": Variant("token", lambda n, L: 1 / (len(n) * L), 0.2, 0.2, "none"),
    "gspo": Variant("mean", lambda n, L: 1 / (n * len(n)), 3e-4, 4e-4, "group-std"),
    "cispo": Variant("token", lambda n, L: 1 / n.sum(), 1.0, 4.0, "group-std"),
    "rloo": Variant("sum", lambda n, L: 1 / len(n), 0.2, 0.2, "leave-one-out"),
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False,
        usage="%(prog)s [--flag value …]  (--help lists the flags)",
        formatter_class=common.HelpFormatter)
    # --- shared: flags ---
    count = between(1, 1e12, int)
    natural = between(0, 1e12, int)
    g = p.add_argument_group("model and data")
    g.add_argument("--model", default=f"{TOY}/model", help="directory or hub id to start from")
    g.add_argument("--dataset", default=f"{TOY}/pairs.jsonl", help=".json .jsonl .csv (also .gz), .parquet, a save_to_disk folder or hub id")
    g.add_argument("--dataset-config", help="configuration of a hub dataset")
    g.add_argument("--split", default="train", help="split of a hub dataset")
    g.add_argument("--eval-dataset", help="evaluate on this, not on a part of --dataset")
    g.add_argument("--eval-split", help="evaluate on this split (of --eval-dataset, else of --dataset)")
    g.add_argument("--eval-fraction", type=between(0, 0.99), default=0.1, help="of the prompts, held out (0 = none)")
    g.add_argument("--eval-limit", type=natural, default=1000, help="hold out at most N prompts (0 = all)")
    g.add_argument("--columns", nargs="+", default=[], metavar="NEW=OLD", help="rename: prompt=question chosen=best")
    g.add_argument("--prefer", choices=["better", "safer"], default="better", help="PKU-SafeRLHF: which label")
    g.add_argument("--limit", type=natural, default=0, help="only the first N rows (0 = all)")
    g.add_argument("--chat", action="store_true", help="plain prompts become user turns of the chat template, transcripts their turns")
    g.add_argument("--chat-template", metavar="FILE", help="Jinja template instead of the tokeniser's own")
    g.add_argument("--chat-template-kwargs", type=json.loads, default={}, metavar="JSON", help='for the template: \'{"enable_thinking": false}\'')
    g.add_argument("--max-length", type=count, default=1024, help="tokens of prompt + completion")
    g.add_argument("--overlong", choices=["drop", "truncate"], default="drop", help="groups over --max-length")
    g = p.add_argument_group("run")
    g.add_argument("--output-dir", default=f"runs/{NAME}", help="model, args.json, metrics.jsonl, checkpoint/")
    g.add_argument("--epochs", type=count, default=1, help="passes over the data")
    g.add_argument("--max-steps", type=natural, default=0, help="steps; wins over --epochs where > 0")
    g.add_argument("--batch-size", type=count, default=32, help="groups (prompts) per step: statistics")
    g.add_argument("--micro-batch-tokens", type=count, default=8192, help="tokens per forward: memory, not the result")
    g.add_argument("--learning-rate", "--lr", type=between(0, 1e3), default=1e-3, help="peak; the default suits the toy")
    g.add_argument("--lr-schedule", choices=["constant", "linear", "cosine"], default="cosine", help="after warm-up, to 0")
    g.add_argument("--warmup-steps", type=between(-1, 1e12, int), default=-1, help="linear warm-up (< 0: a tenth of the steps)")
    g.add_argument("--weight-decay", type=between(0, 1e3), default=0.0, help="AdamW's")
    g.add_argument("--max-grad-norm", type=between(1e-9, 1e9), default=1.0, help="clip the gradient's norm")
    g.add_argument("--eval-every", type=natural, default=0, help="steps between evaluations (0 = start and end only)")
    g.add_argument("--save-every", type=natural, default=0, help="steps between checkpoints, besides one every ten minutes")
    g.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output-dir")
    g.add_argument("--seed", type=natural, default=0, help="of everything that is random")
    g.add_argument("--lora-rank", type=natural, default=0, help="train adapters of this rank on all linear layers, nothing else (0 = all weights)")
    g.add_argument("--lora-alpha", type=between(1e-9, 1e9), default=32.0, help="an adapter's output is scaled by this over its rank")
    g.add_argument("--gradient-checkpointing", action="store_true", help="keep one activation a layer, compute the rest again in the backward")
    g.add_argument("--tensorboard", action="store_true", help="curves in --output-dir as well, live (pip install tensorboard)")
    g.add_argument("--device", default="auto", help="auto = cuda where there is one, else cpu")
    g.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="to compute in; weights: float32")
    # --- end shared ---
    g = p.add_argument_group("rewards")
    g.add_argument("--reward", nargs="+", default=[f"{TOY}/reward.py:right"], metavar="SPEC", help="file.py:function or a reward model")
    g.add_argument("--reward-weights", nargs="+", type=between(-1e9, 1e9), default=[], metavar="W", help="one per --reward (none: 1 each)")
    g.add_argument("--watch", nargs="+", default=[], metavar="SPEC", help="rewards that are logged and not trained on: gold beside proxy")
    g.add_argument("--overlong-penalty", type=natural, default=0, metavar="C", help="penalty 0 … −1 over the last C of --max-new-tokens (0 = none)")
    g = p.add_argument_group("sampling")
    g.add_argument("--group-size", type=between(2, 1e6, int), default=8, help="completions per prompt; their mean is the baseline")
    g.add_argument("--max-new-tokens", type=count, default=128, help="longest completion")
    g.add_argument("--temperature", type=between(1e-3, 1e3), default=1.0, help="of sampling and of every log-prob that is trained on")
    g.add_argument("--dynamic-sampling", action="store_true", help="replace zero-variance groups, up to 4 times a step")
    g.add_argument("--eval-samples", type=natural, default=128, help="held-out prompts to sample for at each evaluation")
    g.add_argument("--eval-k", type=count, default=4, help="completions for each of them: pass@1 and pass@k")
    g = p.add_argument_group("GRPO")
    g.add_argument("--loss", choices=VARIANTS, default="grpo", help="the variant, see (5) to (8)")
    g.add_argument("--advantage", choices=["group-std", "batch-std", "none"], help="scale (5); default: none for dr-grpo and rloo, else group-std")
    g.add_argument("--clip-low", type=between(0, 1e9), help="ε_low; default by loss: " + ", ".join(f"{name} {row.clip_low:g}" for name, row in VARIANTS.items()))
    g.add_argument("--clip-high", type=between(0, 1e9), help="ε_high; default by loss: " + ", ".join(f"{name} {row.clip_high:g}" for name, row in VARIANTS.items()))
    g.add_argument("--beta", type=between(0, 1e9), default=0.04, help="weight of the KL to the reference (0: none is loaded)")
    g.add_argument("--kl", choices=["k3-unbiased", "k3", "k2", "reward"], default="k3-unbiased", help="estimator and place of the KL (9) (10); k3: the paper's")
    g.add_argument("--ref-model", help="reference policy; default: --model as it is at the start")
    g.add_argument("--updates-per-batch", type=count, default=1, help="passes over each batch of samples")
    g.add_argument("--minibatches", type=count, default=1, help="optimizer steps per pass, over disjoint parts of the batch")
    g.add_argument("--mask-truncated", action="store_true", help="completions truncated at --max-new-tokens do not count: in no mean or std of their group, in no sum, in no denominator")
    p.set_defaults(dataset=f"{TOY}/prompts.jsonl", learning_rate=5e-4)
    args = p.parse_args(argv)

    # Flags that contradict each other, or that would not be read.
    if args.overlong_penalty > args.max_new_tokens:
        p.error("--overlong-penalty is at most --max-new-tokens: more would punish all completions")
    if args.loss == "cispo" and args.clip_low is not None:
        p.error("--clip-low: --loss cispo clips its weight from above only")
    if not args.beta and (args.kl != p.get_default("kl") or args.ref_model):
        p.error("--kl and --ref-model without a KL: set --beta above 0")
    if args.loss == "rloo" and args.advantage not in (None, "none"):
        p.error("--loss rloo has its own baseline (3) and no scale: drop --advantage")
    if args.reward_weights and len(args.reward_weights) != len(args.reward):
        p.error(f"--reward-weights needs {len(args.reward)} numbers, one per --reward")
    if args.max_new_tokens >= args.max_length:
        p.error("--max-new-tokens leaves no room for a prompt within --max-length")

    # What the loss decides where no flag does.
    row = VARIANTS[args.loss]
    args.clip_low = row.clip_low if args.clip_low is None else args.clip_low
    args.clip_high = row.clip_high if args.clip_high is None else args.clip_high
    if args.advantage is None or args.loss == "rloo":
        args.advantage = row.advantage
    return args


# --- the algorithm: pure functions ----------------------------------------------------------------
# Shapes: P prompts with G completions each, N = P·G; K of these completions, T tokens in all, are a
# micro-batch. Columns of completions are (N,), prompt after prompt, viewed as (P, G) where groups
# matter. A reward is NaN where there is none.

def combine(rewards, args):
    """The rewards of one completion → their weighted sum; NaN where there is none."""
    weights = args.reward_weights or [1.0] * len(rewards)
    known = [w * r for w, r in zip(weights, rewards) if not math.isnan(r)]
    return sum(known) if known else math.nan


def zero_variance(r):
    """(P, G) rewards → (P,) True where no two of a group differ."""
    highest = torch.where(r.isnan(), -math.inf, r).amax(1)
    lowest = torch.where(r.isnan(), math.inf, r).amin(1)
    return highest <= lowest


def advantages(r, scale):
    """(P, G) float64 rewards → (P, G), 0 where there is none and in zero-variance groups. (5)"""
    n = (~r.isnan()).sum(1, keepdim=True)                                        # (P, 1)
    A = (r - r.nanmean(1, keepdim=True)).nan_to_num(0)                           # (P, G)
    if scale == "leave-one-out":
        A = A * n / (n - 1).clamp(min=1)                                         # (3)
    elif scale == "group-std":
        std = (A.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()    # (P, 1)
        A = A / (std + 1e-4)
    elif scale == "batch-std":
        A = A / (r[~r.isnan()].std() + 1e-4)
    return torch.where(zero_variance(r)[:, None], 0, A).float()


def overlong_penalty(n, limit, last):
    """(N,) tokens → 0 up to limit − last of them, from there linear to −1 (Yu et al. 2025, 13)."""
    return ((limit - last - n).double() / last).clamp(-1, 0)


def surrogate(logp, old, A, owner, n, args):
    """Losses of tokens (T,), to be weighted, and (T,) True where clipping acted.

    (T,) log π now, log π_old, advantages, which of the K completions it belongs to; n (K,) lengths.
    """
    ratio_of = VARIANTS[args.loss].ratio
    log_ratio = logp - old                                                       # (T,)
    if ratio_of != "token":
        log_ratio = sum_by(log_ratio, owner, len(n))                             # (K,)
        log_ratio = (log_ratio / n if ratio_of == "mean" else log_ratio)[owner]  # (T,)  (7)
    ratio = log_ratio.clamp(-20, 20).exp()       # e^20 is large enough; e^100 is infinite
    low = 1 - args.clip_low
    high = 1 + args.clip_high

    if args.loss == "cispo":                                                     # (8)
        return -ratio.detach().clamp(max=high) * A * logp, (ratio > high) & (A != 0)

    objective = torch.minimum(ratio * A, ratio.clamp(low, high) * A)             # (6)
    clipped = (A > 0) & (ratio > high) | (A < 0) & (ratio < low)
    if ratio_of == "sum":                        # the completion's: each of its tokens holds 1/n
        objective = objective / n[owner]
    return -objective, clipped


def kl_term(kind, logp, old, ref):
    """Per-token KL estimate that is added to the loss, with what it descends: (T,). (9)"""
    if kind == "k2":
        return (ref - logp).square() / 2                     # ∇ KL(π ‖ π_ref)
    # Not bounded from below: far above the reference is where it must pull.
    d = (ref - logp).clamp(max=20)
    k3 = d.exp() - 1 - d
    if kind == "k3":
        return k3                                            # ∇ KL(π_ref ‖ π)
    return (logp - old).clamp(-20, 20).exp() * k3            # ∇ KL(π ‖ π_ref)


def pass_at_k(n, correct, k):
    """Unbiased P(at least one of k is correct), from n completions (Chen et al. 2021, eq. 1)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


# --- sample and reward ----------------------------------------------------------------------------

@dataclass
class Rollout:
    """One prompt with its G sampled completions. Of P of them all columns are (N,), in order."""
    group: Group              # prompt and row; texts, ids (end token included) and ended of each
    logps: list               # (G,) log π_old of each
    rewards: dict = field(default_factory=dict)      # {name: (G,)}, those of --watch too
    reward: list = field(default_factory=list)       # (G,) what is trained on


def load_rewards(args, device):
    """--reward and --watch → {name: Reward}, in that order; no two have one name."""
    rewards = {}
    for spec in args.reward + args.watch:
        reward = load_reward(spec, args, device)
        name = f"{reward.name}_{len(rewards)}" if reward.name in rewards else reward.name
        rewards[name] = reward
        if reward.model and not hasattr(reward.model.config, "reward_std"):
            print(f"note: {spec} does not store the mean and std of its scores, as models of "
                  "train_rm.py do: they are taken as they are")
    return rewards


def reward_of(reward, groups, args, autocast):
    """[a number for every completion] of some groups; of a reward model the z-score, by the mean
    and std that train_rm.py stored."""
    views = list(reward.read(groups).values())
    if len(views) < len(groups):
        raise RewardError(f"{reward.name}: a completion has more tokens than it can read.")
    scores = sum(reward.measure(views, args, autocast), [])                      # (N,)
    config = getattr(reward.model, "config", None)
    if hasattr(config, "reward_std"):
        scores = [(score - config.reward_mean) / (config.reward_std or 1) for score in scores]
    return scores


def flat(rollouts, name):
    """One value of every completion: (N,) float64. name: a column of Rollout, or a reward."""
    parts = [one.rewards[name] if name in one.rewards else getattr(one, name) for one in rollouts]
    return torch.tensor([value for part in parts for value in part], dtype=torch.float64)


def lengths_of(rollouts):
    """(N,) tokens, end included."""
    return torch.tensor([len(ids) for one in rollouts for ids in one.group.completion_ids])


def reward_column(rollouts, args):
    """(N,) float64: what is trained on; NaN where there is none, or --mask-truncated says so."""
    r = flat(rollouts, "reward")
    if args.mask_truncated:
        cut = [not ended for one in rollouts for ended in one.group.ended]
        r[torch.tensor(cut, dtype=torch.bool)] = math.nan
    return r


def varied(rollouts, args):
    """Those that are not zero-variance, on the raw reward, before length shaping (as in DAPO)."""
    same = zero_variance(reward_column(rollouts, args).view(-1, args.group_size))    # (P,)
    return [one for one, alike in zip(rollouts, same.tolist()) if not alike]


def fill(rollouts, roll_out, train, asked, step, args):
    """Dynamic sampling: zero-variance groups give way to groups for other prompts of `train`, in at
    most 4 rounds. asked: numbers of the prompts so far → (what to learn from, all samples)."""
    sampled = list(rollouts)
    kept = varied(rollouts, args)
    left = sorted(set(range(len(train))) - set(asked))
    for attempt in range(1, 5):
        needed = min(len(left), len(rollouts) - len(kept))
        chosen = random.Random(f"{args.seed} {step} {attempt}").sample(left, needed)
        left = sorted(set(left) - set(chosen))
        if chosen:
            more = roll_out([train[i] for i in chosen], args.group_size, "train", step, attempt)
            sampled += more
            kept += varied(more, args)
    return kept, sampled


# --- what the updates need ------------------------------------------------------------------------

def as_groups(rollouts, places, packed, args):
    """The completions at these places of N as groups → ([group], [its places]).

    A group over the budget is split: the loss is a sum over completions, so it may be. Where
    nothing is packed, and so no prompt is shared, every completion stands alone.
    """
    groups = []
    places_of = []
    for i in places:
        group = rollouts[i // args.group_size].group
        ids = group.completion_ids[i % args.group_size]
        same = places_of and places_of[-1][0] // args.group_size == i // args.group_size
        if packed and same and groups[-1].tokens() + len(ids) <= args.micro_batch_tokens:
            groups[-1].completion_ids.append(ids)
            places_of[-1].append(i)
        else:
            groups.append(replace(group, completion_ids=[ids]))
            places_of.append([i])
    return groups, places_of


def log_probs(model, minibatches, packed, args, autocast):
    """log π of the tokens of each completion before the update: {its place: (n_i,)}. Computed in
    the micro-batches of the update, so that at the first one ρ is exactly 1."""
    def measure(model, batch):
        return token_logps(model, batch, args.temperature)

    result = {}
    for groups, places_of in minibatches:
        parts = for_all(measure, model, groups, args, packed, autocast)
        for group, places, part in zip(groups, places_of, parts):
            sizes = [len(ids) for ids in group.completion_ids]
            result |= zip(places, torch.tensor(part).split(sizes))
    return result


# --- metrics --------------------------------------------------------------------------------------

def statistics_of(rollouts, args):
    """What some rollouts are like → metrics."""
    n = lengths_of(rollouts)
    K = len(n) // len(rollouts)                                                  # completions each
    r = reward_column(rollouts, args).view(-1, K)                                # (P, K)
    centred = advantages(r, "none").double()                                     # (P, K)
    known = (~r.isnan()).sum(1)                                                  # (P,)
    ended = [ended for one in rollouts for ended in one.group.ended]
    variance = centred.square().sum(1) / (known - 1).clamp(min=1)                # (P,)
    result = {
        "reward": flat(rollouts, "reward").nanmean().item(),
        "reward_std": variance.sqrt().mean().item(),
        "frac_reward_zero_std": zero_variance(r).double().mean().item(),
        "entropy": -flat(rollouts, "logps").sum().item() / n.sum().item(),
        "completions/mean_length": n.double().mean().item(),
        "completions/clipped_ratio": 1 - statistics.mean(ended)}
    for name in rollouts[0].rewards:
        values = flat(rollouts, name)
        result[f"rewards/{name}/mean"] = values.nanmean().item()
        result[f"rewards/{name}/count"] = (~values.isnan()).sum().item()
    return {name: value for name, value in result.items() if not math.isnan(value)}


def solved(rollouts, k):
    """pass@1 and pass@k of k completions of each prompt, with their standard errors over prompts.

    A completion passes where the first --reward is 1; where that is not always 0 or 1 (a score)
    there is no pass@k. One without a reward is neither correct nor wrong.
    """
    r = flat(rollouts, next(iter(rollouts[0].rewards))).view(-1, k)              # (P, k)
    if not ((r == 0) | (r == 1) | r.isnan()).all():
        return {}
    judged = (~r.isnan()).sum(1).tolist()                                        # (P,)
    correct = (r == 1).sum(1).tolist()                                           # (P,)
    result = {}
    for size in sorted({1, k}):
        passed = [pass_at_k(n, c, size) for n, c in zip(judged, correct) if n >= size]
        if passed:
            names = (f"pass@{size}", f"pass@{size}_se")
            error = common.mean_and_error(passed, range(len(passed)), proportion=True)
            result |= zip(names, error)
    return result


def show(rollout, numbers, what):
    """A prompt with up to four completions, shortened, each with its reward or advantage."""
    said = [f"{text[:80]!r} {x:+.2f}" for text, x in zip(rollout.group.completions, numbers)]
    prompt = rollout.group.prompt
    prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    tqdm.write(f"  {prompt[-70:]!r} ▸ {what}: " + ", ".join(said[:4]))


def write_completions(out, rollouts, A, step):
    """completions.jsonl: prompts, completions, rewards and advantages of the last step."""
    rows = []
    for one, advantage in zip(rollouts, A):
        rewards = [None if math.isnan(r) else r for r in one.reward]
        row = {"step": step, "prompt": one.group.prompt, "completions": one.group.completions,
               "rewards": rewards, "advantages": advantage}
        rows.append(json.dumps(row) + "\n")
    common.write_file(out / "completions.jsonl", "".join(rows))


# --- shared: schedule ---

def lr_at(step, steps, args):
    """Learning rate of update `step` (from 0): linear warm-up, then the schedule, 0 at `steps`."""
    warmup = args.warmup_steps if args.warmup_steps >= 0 else steps // 10
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)                              # 0 … 1
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": cosine}
    return args.learning_rate * decay[args.lr_schedule]


# --- end shared ---


# --- main -----------------------------------------------------------------------------------------

def main(argv=None):
    args = parse_args(argv)
    # --- setup
    G = args.group_size
    # --- shared: data ---
    common.check_output_dir(args)
    device, autocast = common.set_up_device(args)
    encoder = common.load_encoder(args.model, args, args.chat_template)
    train, held_out, max_length = common.load_data(
        args, encoder, ["prompt"], reserve=args.max_new_tokens)
    plan = common.make_plan(len(train), args)
    # --- end shared ---
    rewards = load_rewards(args, device)
    model = common.load_model(args.model, encoder, device)

    # Is packing sound for this model? Tried with repeated prompts as the longest completions.
    trial = []
    for g in train[:3] + [max(train, key=Group.tokens)]:
        ids = (g.prompt_ids * args.max_new_tokens)[:args.max_new_tokens]
        trial.append(replace(g, completion_ids=[ids, ids[-9:]]))
    packed = common.can_pack(model, trial)

    # --- shared: model and optimizer ---
    mark = common.fingerprint(train + held_out, model)
    state = common.read_checkpoint(args, mark)
    start = state["step"] if state else 0
    extra = state["extra"] if state else {}
    adapter = common.prepare_model(model, args)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.0, betas=(0.9, 0.999), eps=1e-8,
        weight_decay=args.weight_decay, fused=True)
    common.describe(model, train, held_out, plan, args)
    # --- end shared ---
    if state:
        common.restore(state, model, optimizer)
    reference = None                 # it stays beside the policy; with LoRA the policy is both
    if args.beta and (args.ref_model or not adapter):
        reference = common.load_reference(args, encoder, device)
    distinct = {tuple(g.prompt_ids): g for g in held_out}
    held_out = list(distinct.values())[:args.eval_samples]
    done = start                     # updates so far
    seconds = Counter()              # what a step took
    print(f"  rewards: {', '.join(rewards)}; trained on: the first {len(args.reward)}")

    def abort(message):
        """Ends the run in one sentence, and loses no step."""
        if done > start:
            common.save_checkpoint(out, model, optimizer, done, extra)
            message = f"{message} The state after step {done} is saved: --resume goes on from it."
        fail(message)

    def roll_out(prompts, n, *purpose):
        """n completions of each prompt, with their rewards. Seeded by the purpose (and step):
        nothing random is carried on, so resuming is exact."""
        began = time.perf_counter()
        text = " ".join(map(str, (args.seed, *purpose)))
        seed = int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
        with autocast:
            samples = common.sample(
                model, [g.prompt_ids for g in prompts], n, args.max_new_tokens, encoder.stops,
                args.temperature, seed, adapter, what="")
        rollouts = []
        for i, g in enumerate(prompts):
            own = samples[i * n:(i + 1) * n]
            group = replace(
                g, completions=[encoder.decode(s.ids, g.prompt) for s in own],
                completion_ids=[s.ids for s in own], ended=[s.ended for s in own])
            rollouts.append(Rollout(group, [sum(s.logps) for s in own]))
        sampled = time.perf_counter()

        groups = [one.group for one in rollouts]
        for name, reward in rewards.items():
            try:
                numbers = reward_of(reward, groups, args, autocast)
            except RewardError as error:
                abort(error)
            for i, one in enumerate(rollouts):
                one.rewards[name] = numbers[i * n:(i + 1) * n]
        for one in rollouts:
            trained_on = list(one.rewards.values())[:len(args.reward)]
            one.reward = [combine(several, args) for several in zip(*trained_on)]
        seconds.update(sample=sampled - began, reward=time.perf_counter() - sampled)
        return rollouts

    def evaluate_now(step):
        """Evaluates after `step` updates → metrics; each time with the same random numbers: what
        differs between two evaluations is the policy."""
        rollouts = roll_out(held_out, args.eval_k, "eval")
        result = statistics_of(rollouts, args) | solved(rollouts, args.eval_k)
        if "reward" not in result:
            abort("--reward: not one of the held-out completions got a reward.")
        result["n"] = len(rollouts)
        for one in rollouts[:3]:
            show(one, one.reward, "reward")
        line = f"step {step}: eval reward {result['reward']:.3f}"
        for name in result:
            if f"{name}_se" in result:
                line += f", {name} {result[name]:.3f} ± {result[name + '_se']:.3f}"
        for name in list(rewards)[len(args.reward):]:
            line += f", watched {name} {result[f'rewards/{name}/mean']:.3f}"
        line += f", {result['completions/mean_length']:.1f} tokens, of {len(rollouts)} prompts"
        tqdm.write(line)
        return {f"eval/{name}": value for name, value in result.items()}

    # --- shared: before the loop ---
    def due(step):
        """Whether to evaluate after `step` updates."""
        return step in (0, len(plan)) or args.eval_every and step % args.eval_every == 0

    # Once this is over, all that can fail was tried: only now is an earlier run renamed.
    results = [evaluate_now(start)] if held_out and due(start) else []
    out, log = common.open_run(args, mark, state)
    for result in results:
        log(start, result)
    stopped = common.catch_signals()
    saved_at = time.monotonic()
    bar = common.progress_bar(range(start, len(plan)), args.loss)
    # --- end shared ---
    learnt = False                   # whether any step had an advantage

    # --- loop
    for step in bar:
        # Sample and reward.
        began = time.perf_counter()
        seconds.clear()
        rollouts = roll_out([train[i] for i in plan[step]], G, "train", step, 0)
        sampled = rollouts
        if args.dynamic_sampling:
            rollouts, sampled = fill(rollouts, roll_out, train, plan[step], step, args)
        metrics = statistics_of(sampled, args)

        # Advantage. All columns here are (N,).
        n = lengths_of(rollouts)
        r = reward_column(rollouts, args)
        if args.overlong_penalty:
            r = r + overlong_penalty(n, args.max_new_tokens, args.overlong_penalty)
        A = advantages(r.view(-1, G), args.advantage).flatten()
        learnt |= bool(A.any())

        # Minibatches, each with denominators of its own. What has no reward is in none; without a
        # KL, advantage 0 is in them but needs no computation.
        weight = torch.zeros(len(n))
        minibatch = torch.arange(len(n)) // G % args.minibatches
        minibatches = []
        for number in minibatch.unique():
            counted = ~r.isnan() & (minibatch == number)
            if counted.any():
                weight[counted] = VARIANTS[args.loss].weight(
                    n[counted].float(), args.max_new_tokens)
            needed = counted & ((A != 0) | (args.beta > 0))
            minibatches.append(as_groups(rollouts, needed.nonzero()[:, 0].tolist(), packed, args))

        # Log-probs before the first update. A single update needs no old ones: they are its own.
        old = ref = None
        if len(minibatches) * args.updates_per_batch > 1 or args.kl == "reward":
            old = log_probs(model, minibatches, packed, args, autocast)
        if reference:
            ref = log_probs(reference, minibatches, packed, args, autocast)
        elif args.beta:
            with adapter.disable_adapter():
                ref = log_probs(model, minibatches, packed, args, autocast)
        if args.kl == "reward":                                                  # (10)
            k1 = torch.full((len(n),), math.nan, dtype=torch.float64)
            for i in old:
                k1[i] = (old[i] - ref[i]).sum()
            scale = args.advantage if args.loss == "rloo" else "none"
            A = A - args.beta * advantages(k1.view(-1, G), scale).flatten()

        # Update: --updates-per-batch passes over the minibatches.
        updating = time.perf_counter()
        sums = Counter()
        norms = []
        for groups, places_of in minibatches * args.updates_per_batch:
            places = {id(g): some for g, some in zip(groups, places_of)}
            optimizer.zero_grad(set_to_none=True)
            for micro, share in common.my_micro_batches(groups, args.micro_batch_tokens, packed):
                with autocast:
                    batch = common.lay_out(model, micro, packed)
                    logp = token_logps(model, batch, args.temperature)           # (T,)
                mine = [i for g in micro for i in places[id(g)]]                 # (K,) of the N
                owner = batch.owner                                              # (T,) of the K
                old_logp = torch.cat([old[i] for i in mine]).to(device) if old else logp.detach()
                losses, clipped = surrogate(
                    logp, old_logp, A[mine].to(device)[owner], owner, n[mine].to(device), args)
                kl = torch.zeros(())
                if args.beta:
                    ref_logp = torch.cat([ref[i] for i in mine]).to(device)      # (T,)
                    kl = kl_term("k3", old_logp, old_logp, ref_logp).sum()       # logged: of π_old
                if args.beta and args.kl != "reward":
                    losses = losses + args.beta * kl_term(args.kl, logp, old_logp, ref_logp)
                loss = (losses * weight[mine].to(device)[owner]).sum()
                (loss * share).backward()
                if share:                        # 0: another process computes it too
                    sums.update(loss=loss.item(), clipped=clipped.sum().item(), kl=kl.item())
                    sums["tokens"] += len(logp)

            norms.append(common.clip_gradient(model, args.max_grad_norm))
            if not math.isfinite(norms[-1]):     # half a step is not saved: its start is gone
                stop_here = abort if len(norms) == 1 else fail
                stop_here(f"step {step + 1}: the gradient is not finite; try a lower --lr.")
            for g in optimizer.param_groups:
                g["lr"] = lr_at(step, len(plan), args)
            optimizer.step()
        done = step + 1

        # Write down what happened.
        seconds["update"] = time.perf_counter() - updating
        metrics |= {f"seconds/{name}": value for name, value in seconds.items()}
        metrics["tokens_per_second"] = int(n.sum()) / (time.perf_counter() - began)
        if norms:
            sums = common.sum_over_processes(sums)
            metrics["loss"] = sums["loss"] / len(norms)
            metrics["grad_norm"] = statistics.mean(norms)
            metrics["learning_rate"] = lr_at(step, len(plan), args)
            metrics["clip_ratio"] = sums["clipped"] / max(1, sums["tokens"])
            if args.beta:
                metrics["kl"] = sums["kl"] / max(1, sums["tokens"])
        log(done, metrics)
        if common.rank() == 0:
            write_completions(out, rollouts, A.view(-1, G).tolist(), done)
        shown = [name for name in ("reward", "kl", "frac_reward_zero_std") if name in metrics]
        text = ", ".join(f"{name} {metrics[name]:.4g}" for name in shown)
        common.end_step(bar, done, len(plan), text)

        # --- shared: save and evaluate ---
        last = done == len(plan)
        asked = args.save_every and done % args.save_every == 0
        # A signal and the ten minutes reach one process before another: all act on the same step.
        late = time.monotonic() - saved_at > SAVE_SECONDS
        late, stop = map(any, zip(*common.gather((late, bool(stopped)))))
        if last or stop or asked or late:
            common.save_checkpoint(out, model, optimizer, done, extra)
            saved_at = time.monotonic()
        if held_out and due(done):
            results.append(evaluate_now(done))
            log(done, results[-1])
        if stop and not last:
            print(f"stopped after step {done} of {len(plan)}; add --resume to go on")
            raise SystemExit(130)
        # --- end shared ---

    # --- save
    if start < len(plan):
        for one, row in zip(rollouts[:3], A.view(-1, G).tolist()):
            show(one, row, "advantage in the last step")
        if not learnt:
            print("note: no group ever had two different rewards: nothing was learnt from them")
    if results and results[-1]["eval/reward"] < results[0]["eval/reward"]:
        print("note: the held-out reward is lower than at the start: try a lower --lr")
    common.save_model(out, model, encoder.tokenizer, adapter)


if __name__ == "__main__":
    common.run(main)
