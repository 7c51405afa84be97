"""Improve a language model on a reward: group relative policy optimisation (GRPO) and its variants.

    python train_grpo.py                                 # 10 seconds on two CPU cores, no network
    python train_grpo.py --model DIR --dataset prompts.jsonl --reward my_rewards.py:f --lr 1e-6

With no flags it trains the toy of tests/toy (sums), reward 1 for the correct sum: the fraction of
correct samples on sums that it never saw (pass@1) goes from 43–48 % to 91–95 % (seeds 0 to 2). The
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
A variant is one row of VARIANTS. Rewards have trl's signature, so yours runs here unchanged.
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
#    These defaults are ours: rloo's clip and its KL in the loss (Ahmadian et al. 2024 have neither:
#    --kl reward is theirs); cispo's cap 1 + 4 (the paper does not disclose its own; in trl,
#    epsilon_high = 5 is the cap itself).
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
#    (the last: DeepSeek-V3.2, arXiv 2512.02556, and the default here; on policy its gradient is that
#    of k2, sample by sample). Summed over a completion these take the prefixes as given: what o_1 does to the KL of
#    o_2 is missing. The KL of whole completions is an expected reward like any other, so by (2) it
#    is exact, with more variance, where it is subtracted (and the tokens of all completions weigh
#    alike, as in rloo and dr-grpo):
#
#        A(r) − β ( k − mean of the group ),    k = Σ_t k1                  --kl reward       (10)
#
#    centred, but not divided by the rewards' std as A(r) is: β would cancel where all rewards are
#    alike. test_eq9 and test_eq10 check each by enumeration. β = 0 loads no reference.

# --- imports --------------------------------------------------------------------------------------
import argparse
import copy
import functools
import hashlib
import importlib.util
import inspect
import math
import random
import statistics
import sys
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from tqdm import tqdm

import common
from common import Group, Plan, fail, for_all, log, reward_scores, sum_by, token_logps, within

TOY = Path(__file__).parent / "tests" / "toy"
NAME = Path(__file__).stem.removeprefix("train_")    # a copy of this file writes to runs/ITS NAME
SAVE_SECONDS = 600                                   # a checkpoint at least this often


# --- arguments ------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.Parser(
        description=__doc__.split("\n")[0], allow_abbrev=False,
        usage="%(prog)s [--flag value …]  (--help lists the flags)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # --- shared: flags ---
    count = within("[1, 1e12]", int)
    natural = within("[0, 1e12]", int)
    g = p.add_argument_group("model and data")
    g.add_argument("--model", default=f"{TOY}/model", help="directory or hub id to start from")
    g.add_argument("--dataset", default="", help=".json .jsonl .csv .parquet (also .gz) or hub id")
    g.add_argument("--split", default="train", help="split of a hub dataset")
    g.add_argument("--eval-dataset", help="evaluate on this, not on a part of --dataset")
    g.add_argument("--eval-fraction", type=within("[0, 1)"), default=0.1, help="of the prompts, held out (0 = none)")
    g.add_argument("--eval-limit", type=natural, default=1000, help="held out are at most N prompts, of --eval-dataset too (0 = all)")
    g.add_argument("--columns", nargs="+", default=[], metavar="NEW=OLD", help="rename: prompt=question chosen=best")
    g.add_argument("--prefer", choices=["better", "safer"], default="better", help="PKU-SafeRLHF: which label")
    g.add_argument("--limit", type=natural, default=0, help="only the first N rows (0 = all)")
    g.add_argument("--chat", action="store_true", help="plain-text prompts become user turns of the chat template")
    g.add_argument("--chat-template", metavar="FILE", help="Jinja template instead of the tokeniser's own")
    g.add_argument("--max-length", type=count, default=1024, help="tokens of prompt + completion")
    g.add_argument("--overlong", choices=["drop", "truncate"], default="drop", help="groups over --max-length")
    g = p.add_argument_group("run")
    g.add_argument("--output-dir", default=f"runs/{NAME}", help="model, args.json, metrics.jsonl, checkpoint/")
    g.add_argument("--epochs", type=count, default=1, help="passes over the data")
    g.add_argument("--max-steps", type=natural, default=0, help="optimizer steps; wins over --epochs where > 0")
    g.add_argument("--batch-size", type=count, default=32, help="groups (prompts) per optimizer step: statistics")
    g.add_argument("--micro-batch-tokens", type=count, default=8192, help="tokens per forward: memory, not the result")
    g.add_argument("--learning-rate", "--lr", type=within("[0, inf)"), default=0.0, help="peak; the default suits the toy")
    g.add_argument("--lr-schedule", choices=["constant", "linear", "cosine"], default="cosine", help="after warm-up, to 0")
    g.add_argument("--warmup-steps", type=within("[-1, 1e12]", int), default=-1, help="linear warm-up (< 0: a tenth of the steps)")
    g.add_argument("--weight-decay", type=within("[0, inf)"), default=0.0, help="AdamW's")
    g.add_argument("--max-grad-norm", type=within("[0, inf)"), default=1.0, help="clip the gradient's norm (0 = never)")
    g.add_argument("--eval-every", type=natural, default=0, help="steps between evaluations (0 = start and end only)")
    g.add_argument("--save-every", type=natural, default=0, help="steps between checkpoints, besides one every ten minutes")
    g.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output-dir")
    g.add_argument("--seed", type=within("[0, 2e18]", int), default=0, help="of everything that is random")
    g.add_argument("--lora-rank", type=common.lora_rank, default=0, help="train adapters of this rank on all linear layers, nothing else (0 = all weights)")
    g.add_argument("--lora-alpha", type=within("(0, inf)"), help="an adapter's output is scaled by this over its rank (default: 32)")
    g.add_argument("--gradient-checkpointing", action="store_true", help="keep one activation a layer, compute the rest again in the backward")
    g.add_argument("--compile", action="store_true", help="compile the layers (training; sampling stays as it is)")
    g.add_argument("--device", default="auto", help="auto = cuda where there is one, else cpu")
    g.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="to compute in; weights: float32")
    # --- end shared ---
    g = p.add_argument_group("rewards")
    g.add_argument("--reward", nargs="+", default=[f"{TOY}/reward.py:right"], metavar="SPEC", help="file.py:function or a reward-model directory")
    g.add_argument("--reward-weights", nargs="+", type=within("(-inf, inf)"), default=[], metavar="W", help="one per --reward (none: 1 each)")
    g.add_argument("--reward-aggregate", choices=["sum", "min"], default="sum", help="of the weighted rewards of a completion")
    g.add_argument("--watch", nargs="+", default=[], metavar="SPEC", help="rewards that are logged and not trained on: gold beside proxy")
    g.add_argument("--calibrate-length", action="store_true", help="take the length trend stored in a reward model out of its scores")
    g.add_argument("--overlong-penalty", type=natural, default=0, metavar="C", help="penalty 0 … −1 over the last C of --max-new-tokens (0 = none)")
    g = p.add_argument_group("sampling")
    g.add_argument("--group-size", type=within("[2, 1e6]", int), default=8, help="completions per prompt; their mean is the baseline")
    g.add_argument("--max-new-tokens", type=count, default=128, help="longest completion")
    g.add_argument("--temperature", type=within("(0, inf)"), default=1.0, help="of sampling and of every log-prob that is trained on")
    g.add_argument("--top-p", type=within("(0, 1]"), default=1.0, help="sample from the smallest set of tokens with this probability (< 1 is off policy)")
    g.add_argument("--dynamic-sampling", action="store_true", help="replace zero-variance groups, up to 4 times a step")
    g.add_argument("--eval-samples", type=natural, default=128, help="held-out prompts to sample for at each evaluation")
    g.add_argument("--eval-k", type=count, default=4, help="completions for each of them: pass@1 … pass@k")
    g = p.add_argument_group("GRPO")
    g.add_argument("--loss", choices=VARIANTS, default="grpo", help="; ".join(f"{name}: {row.about}" for name, row in VARIANTS.items()))
    g.add_argument("--advantage", choices=["group-std", "batch-std", "none"], help="scale (5); default: none for dr-grpo and rloo, else group-std")
    g.add_argument("--clip-low", type=within("[0, inf)"), help="ε_low; default by loss: " + ", ".join(f"{name} {row.clip_low:g}" for name, row in VARIANTS.items()))
    g.add_argument("--clip-high", type=within("[0, inf)"), help="ε_high; default by loss: " + ", ".join(f"{name} {row.clip_high:g}" for name, row in VARIANTS.items()))
    g.add_argument("--dual-clip", type=within("[0, inf)"), default=0.0, metavar="C", help="grpo, dapo, dr-grpo: for A < 0 no objective below C·A, C > 1 (0 = off)")
    g.add_argument("--beta", type=within("[0, inf)"), default=0.04, help="weight of the KL to the reference (0: none is loaded)")
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
    if args.kl != p.get_default("kl") and not args.beta:
        p.error(f"--kl {args.kl} without a KL: set --beta above 0")
    if args.ref_model and not args.beta:
        p.error("--ref-model without a KL: set --beta above 0")
    if args.dual_clip and (args.loss not in ("grpo", "dapo", "dr-grpo") or args.dual_clip <= 1):
        p.error("--dual-clip is above 1 and goes with --loss grpo, dapo or dr-grpo")
    if args.loss == "rloo" and args.advantage not in (None, "none"):
        p.error("--loss rloo has its own baseline (3) and no scale: drop --advantage")
    if args.reward_weights and len(args.reward_weights) != len(args.reward):
        p.error(f"--reward-weights needs {len(args.reward)} numbers, one per --reward")
    reward_models = [spec for spec in args.reward + args.watch if Path(spec).is_dir()]
    if args.calibrate_length and not reward_models:
        p.error("--calibrate-length needs a reward-model directory among --reward and --watch")
    names = ("model", "ref_model", "dataset", "eval_dataset", "chat_template", "reward", "watch")
    common.check_run(args, names)
    return args


# --- the algorithm: pure functions ----------------------------------------------------------------
# Shapes: P prompts with G completions each, N = P·G, and M tokens in all of them; a micro-batch has
# T tokens. A column of completions is (N,), viewed as (P, G) where groups matter; a column of
# tokens is (M,), completion after completion.

@dataclass
class Rollout:
    """What was sampled and rewarded, in columns: completion i belongs to prompt i // G."""
    groups: list              # (P,) the prompts
    ids: list                 # (N,) token ids, with the end token where it ended
    texts: list               # (N,) what the policy wrote, without the end token
    ended: torch.Tensor       # (N,) False: truncated at --max-new-tokens
    logps: torch.Tensor       # (N,) log π_old(o|x), float64
    rewards: dict             # name → (N,) float64, NaN for none; also those that are only watched
    reward: torch.Tensor      # (N,) float64, what is trained on, NaN for none
    seconds: Counter          # what went to "sample" and to "reward"

    @property
    def size(self):
        """G"""
        return len(self.ids) // len(self.groups)

    @property
    def prompt(self):
        """Which prompt each completion belongs to: (N,)"""
        return torch.arange(len(self.ids)) // self.size

    @property
    def lengths(self):
        """Tokens of each completion, end included: (N,)"""
        return torch.tensor([len(ids) for ids in self.ids])

    def by_prompt(self, column):
        """(N,) → (P, G)"""
        return column.view(len(self.groups), -1)

    def span(self, p):
        """The part of a column that belongs to prompt p."""
        return slice(p * self.size, (p + 1) * self.size)

    def join(self, other):
        """Both, one after the other."""
        rewards = {name: torch.cat([r, other.rewards[name]]) for name, r in self.rewards.items()}
        return Rollout(
            groups=self.groups + other.groups,
            ids=self.ids + other.ids,
            texts=self.texts + other.texts,
            ended=torch.cat([self.ended, other.ended]),
            logps=torch.cat([self.logps, other.logps]),
            rewards=rewards,
            reward=torch.cat([self.reward, other.reward]),
            seconds=self.seconds + other.seconds)

    def take(self, keep):
        """The prompts that keep (P,) marks, with their completions."""
        mine = keep.repeat_interleave(self.size)                                 # (N,)
        return Rollout(
            groups=list(compress(self.groups, keep)),
            ids=list(compress(self.ids, mine)),
            texts=list(compress(self.texts, mine)),
            ended=self.ended[mine],
            logps=self.logps[mine],
            rewards={name: r[mine] for name, r in self.rewards.items()},
            reward=self.reward[mine],
            seconds=self.seconds)


def zero_variance(r):
    """(P, G) rewards, NaN for none → (P,) True where no two rewards of the group differ."""
    highest = torch.where(r.isnan(), -math.inf, r).amax(1)
    lowest = torch.where(r.isnan(), math.inf, r).amin(1)
    return highest <= lowest


def centre(r):
    """(P, G) rewards, NaN for none → minus the group's mean (P, G), 0 for none; n and std (P, 1).

    std with n − 1, 0 where n < 2. In float32 eight rewards of 0.1 would have a std of 8e-9.
    """
    r = r.double()
    n = (~r.isnan()).sum(1, keepdim=True)
    centred = (r - r.nanmean(1, keepdim=True)).nan_to_num(0)
    std = (centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    return centred, n, std


def advantages(r, scale):
    """(P, G) rewards, NaN for none → (P, G), 0 there and in zero-variance groups. (5)"""
    A, n, std = centre(r)
    if scale == "leave-one-out":
        A = A * n / (n - 1).clamp(min=1)                                         # (3)
    elif scale == "group-std":
        A = A / (std + 1e-4)
    elif scale == "batch-std":
        every = r[~r.isnan()].double()
        A = A / ((every.std() if len(every) > 1 else 0) + 1e-4)
    return torch.where(zero_variance(r)[:, None], 0, A).float()


def advantage_scale(args):
    """--advantage, or the variant's own; rloo's baseline (3) leaves no choice."""
    own = VARIANTS[args.loss].advantage
    return own if own == "leave-one-out" else args.advantage or own


def overlong_penalty(lengths, limit, last):
    """Soft punishment of length (Yu et al. 2025, eq. 13): (N,) tokens → (N,) from 0 to −1.

    0 up to limit − last tokens, from there linear to −1 at the limit; last = 0: none.
    """
    if not last:
        return torch.zeros(len(lengths), dtype=torch.float64)
    return ((limit - last - lengths).double() / last).clamp(-1, 0)


def combine(values, factors, how):
    """(R, N) rewards → (N,) weighted sum or minimum of the non-missing, NaN if all are missing."""
    weighted = values * torch.tensor(factors, dtype=torch.float64)[:, None]
    result = weighted.nansum(0)
    if how == "min":
        result = torch.where(weighted.isnan(), math.inf, weighted).amin(0)
    return torch.where(weighted.isnan().all(0), math.nan, result)


@dataclass
class Tokens:
    """What an update needs of tokens, in columns: all M of a step, or the T of a micro-batch."""
    A: torch.Tensor           # (M,) advantage
    weight: torch.Tensor      # (M,) of its loss; 0 where its completion does not count
    old: torch.Tensor         # (M,) log π_old; NaN with a single update, where it equals log π
    ref: torch.Tensor         # (M,) log π_ref; NaN without a KL
    owner: torch.Tensor       # (M,) which of the N completions it belongs to
    lengths: torch.Tensor     # (N,) tokens of each completion
    logp: torch.Tensor | None = None      # (T,) log π, with its gradient: in a micro-batch

    def of(self, groups, logp):
        """Those of a micro-batch that count. logp: (T,) the log-probs of all its tokens now."""
        index = token_index(groups, self.lengths)                                # (T,)
        counts = self.weight[index] > 0
        index = index[counts]
        # Selected, not multiplied by 0: NaN · 0 is NaN, and what does not count may hold NaN.
        logp = logp[counts.to(logp.device)]

        def select(column):
            return column[index].to(logp.device)

        old = select(self.old)
        return Tokens(
            A=select(self.A),
            weight=select(self.weight),
            old=torch.where(old.isnan(), logp.detach(), old),
            ref=select(self.ref),
            owner=select(self.owner),
            lengths=self.lengths.to(logp.device),
            logp=logp)

    def total(self, values):
        """(T,) → (N,) sums over the tokens of each completion."""
        return sum_by(values, self.owner, len(self.lengths))


def token_index(groups, lengths):
    """Where in a column of tokens, (M,), those of some groups' completions stand: (T,)."""
    spans = torch.arange(int(lengths.sum())).split(lengths.tolist())             # N × (n_i,)
    return torch.cat([spans[i] for g in groups for i in g.index])


# A ratio: Tokens → its logarithm for each token (T,).

def token_ratio(x):
    return x.logp - x.old


def mean_ratio(x):
    return (x.total(x.logp - x.old) / x.lengths)[x.owner]                        # (7)


def sum_ratio(x):
    return x.total(x.logp - x.old)[x.owner]


# A surrogate: Tokens, log-ratio (T,), args → losses (T,), to be weighted, and (T,) True where
# clipping acted.

def bounded_exp(log_ratio):
    return log_ratio.clamp(-20, 20).exp()        # e^20 is large enough; e^100 is infinite


def clip_range(args):
    """Lowest and highest ratio: the flags', or the variant's own."""
    row = VARIANTS[args.loss]
    low = row.clip_low if args.clip_low is None else args.clip_low
    high = row.clip_high if args.clip_high is None else args.clip_high
    return 1 - low, 1 + high


def clipped(x, log_ratio, args):
    """−min( ρ A, clip(ρ) A ); for A < 0 with --dual-clip C no objective below C·A. (6)"""
    low, high = clip_range(args)
    ratio = bounded_exp(log_ratio)
    objective = torch.minimum(ratio * x.A, ratio.clamp(low, high) * x.A)
    zeroed = (x.A > 0) & (ratio > high) | (x.A < 0) & (ratio < low)
    if args.dual_clip:
        bounded = torch.maximum(objective, args.dual_clip * x.A)
        objective = torch.where(x.A < 0, bounded, objective)
        zeroed |= (x.A < 0) & (ratio > args.dual_clip)
    return -objective, zeroed


def clipped_once(x, log_ratio, args):
    """clipped(), but once a completion: each of its n tokens holds 1/n of it."""
    losses, zeroed = clipped(x, log_ratio, args)
    return losses / x.lengths[x.owner], zeroed


def cispo(x, log_ratio, args):
    """−sg[ min(ρ, 1 + ε_high) ] A log π: clips the weight and keeps the gradient. (8)"""
    high = clip_range(args)[1]
    ratio = bounded_exp(log_ratio.detach())
    return -ratio.clamp(max=high) * x.A * x.logp, (ratio > high) & (x.A != 0)


# A weight: lengths (C,) of the completions that count in an optimizer step, args → the weight of
# each of their tokens, a number or (C,).

def per_completion(n, args):
    return 1 / (n * len(n))


def per_token(n, args):
    return 1 / n.sum()


def by_constant(n, args):
    return 1 / (len(n) * args.max_new_tokens)


def per_sequence(n, args):
    return 1 / len(n)


class Variant(NamedTuple):
    """A row of VARIANTS: what `--loss` chooses."""
    about: str                # for --help, with the paper
    ratio: Callable           # Tokens → log-ratio of each token (T,)
    surrogate: Callable       # (Tokens, log-ratio, args) → losses (T,), where clipping acted (T,)
    weight: Callable          # (lengths (C,), args) → weight of a token of each completion
    clip_low: float           # default of --clip-low
    clip_high: float          # default of --clip-high
    advantage: str            # default of --advantage; "leave-one-out" cannot be changed


VARIANTS = {
    "grpo": Variant(
        "ratio per token, mean per completion (Shao et al. 2024, arXiv 2402.03300, eq. 3)",
        token_ratio, clipped, per_completion, 0.2, 0.2, "group-std"),
    "dapo": Variant(
        "as grpo, mean over tokens, higher upper clip (Yu et al. 2025, arXiv 2503.14476, eq. 8)",
        token_ratio, clipped, per_token, 0.2, 0.28, "group-std"),
    "dr-grpo": Variant(
        "as grpo, over --max-new-tokens, no std (Liu et al. 2025, arXiv 2503.20783)",
        token_ratio, clipped, by_constant, 0.2, 0.2, "none"),
    "gspo": Variant(
        "one ratio per completion, a mean of logs (Zheng et al. 2025, arXiv 2507.18071, eq. 5)",
        mean_ratio, clipped, per_completion, 3e-4, 4e-4, "group-std"),
    "cispo": Variant(
        "clips the weight, not the token; token mean (MiniMax 2025, arXiv 2506.13585, eq. 4)",
        token_ratio, cispo, per_token, 1.0, 4.0, "group-std"),
    "rloo": Variant(
        "whole completion's ratio, leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740)",
        sum_ratio, clipped_once, per_sequence, 0.2, 0.2, "leave-one-out"),
}


def weights(lengths, counted, minibatch, args):
    """The weight of each token of a completion: (N,), so that a sum over tokens is the loss.

    lengths (N,) tokens; counted (N,) False: weight 0, and in no denominator; minibatch (N,) the
    number of its minibatch: each has its own denominators.
    """
    result = torch.zeros(len(lengths))
    for number in minibatch.unique():
        mine = counted & (minibatch == number)
        if mine.any():
            result[mine] = VARIANTS[args.loss].weight(lengths[mine].float(), args)
    return result


def kl_term(kind, logp, old, ref):
    """Per-token KL estimate that is added to the loss, with what it descends: (T,). (9)"""
    if kind == "k2":
        return (ref - logp).square() / 2                     # ∇ KL(π ‖ π_ref)
    # Not bounded from below: far above the reference is where it must pull.
    d = (ref - logp).clamp(max=20)
    k3 = d.exp() - 1 - d
    if kind == "k3":
        return k3                                            # ∇ KL(π_ref ‖ π)
    return bounded_exp(logp - old) * k3                      # ∇ KL(π ‖ π_ref)


def micro_loss(x, args):
    """Tokens of a micro-batch → (its part of the loss, Counter of metric sums).

    The weights hold every denominator of the step, so how it is cut into micro-batches does not
    change its gradient.
    """
    variant = VARIANTS[args.loss]
    losses, zeroed = variant.surrogate(x, variant.ratio(x), args)                # (T,), (T,)
    if args.beta and args.kl != "reward":
        losses = losses + args.beta * kl_term(args.kl, x.logp, x.old, x.ref)
    loss = (losses * x.weight).sum()

    sums = Counter(loss=loss.item(), clip_ratio=zeroed.sum().item(), tokens=len(x.logp))
    if args.beta:
        sums["kl"] = kl_term("k3", x.old, x.old, x.ref).sum().item()
    return loss, sums


def means(sums, norms, seconds):
    """Sums over the updates of a step, norms of their gradients, the time they took → metrics."""
    result = {
        "loss": sums["loss"] / len(norms),
        "grad_norm": statistics.mean(norms),
        "seconds/update": seconds,
        "tokens_per_second": sums["computed"] / seconds}
    for name in ("clip_ratio", "kl"):
        if name in sums:
            result[name] = sums[name] / max(1, sums["tokens"])
    return result


def pass_at_k(n, correct, k):
    """Unbiased P(at least one of k is correct), from n completions (Chen et al. 2021, eq. 1)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


# --- rewards --------------------------------------------------------------------------------------
# A reward: (groups, texts, ids, ended), all (N,) → (N,) float64, NaN for none. groups[i] is the
# prompt of completion i, texts what the policy wrote, ended False where it was truncated.

class RewardError(Exception):
    """A reward that cannot be used, in one sentence. The run ends, but loses nothing."""


FLAG = "--reward or --watch"         # whose values load_rewards() reads, for messages


def load_rewards(specs, args, device):
    """Specs (file.py:function, reward-model directory) → name → reward; no two have one name."""
    rewards = {}
    modules = {}
    for spec in specs:
        file, _, name = spec.rpartition(":")
        what = f"{FLAG} {spec}"
        if Path(spec).is_dir():
            name = Path(spec).name
            reward = model_reward(spec, what, args, device)
        elif file.endswith(".py") and Path(file).is_file():
            if file not in modules:
                modules[file] = load_module(file, f"reward_{len(modules)}", what)
            function = getattr(modules[file], name, None)
            if not callable(function):
                fail(f"{what}: {file} has no function '{name}'.")
            reward = function_reward(function, what)
        else:
            fail(f"{what}: neither file.py:function nor a reward-model directory.")
        rewards[f"{name}_{len(rewards)}" if name in rewards else name] = reward
    return rewards


def rewards_fingerprint(args):
    """Hash of the files of all rewards, trained on or watched."""
    hashes = []
    for spec in args.reward + args.watch:
        path = spec if Path(spec).is_dir() else spec.rpartition(":")[0]
        hashes.append(common.file_fingerprint(path))
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def load_module(file, name, what):
    """A file as python runs it: known by name, its folder importable."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.append(str(Path(file).parent))
    with common.failing(f"{what}: cannot be imported"):
        try:
            spec.loader.exec_module(module)
        except SystemExit as error:                          # it would end the run as if done
            raise RuntimeError(f"it calls sys.exit({error.code})") from error
        except SyntaxError as error:
            raise RuntimeError(f"line {error.lineno}: {error.msg}") from error
    return module


def function_reward(function, what):
    """A user's f(prompts, completions, **columns) → list, a number or None per completion.

    In a chat a completion is [{"role": "assistant", "content": …}], as in trl.
    """
    def ask(groups, texts, ids):
        given = reward_arguments(groups, texts, ids)
        try:
            inspect.signature(function).bind(**given)
        except TypeError as error:
            raise RewardError(f"{what}: {error}; it is called with {', '.join(given)}, and "
                              "f(prompts, completions, **columns) takes any.")
        try:
            values = function(**given)
        except (Exception, SystemExit) as error:             # sys.exit(0) would end the run as done
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise RewardError(f"{what}: {common.first_line(error)}, in line {frame.lineno} of "
                              f"{frame.filename}.")
        return checked(values, texts, what)

    def reward(groups, texts, ids, ended):
        # A function may be slow or random: each process asks about its own prompts, once.
        mine = common.my_share([id(g) for g in groups])
        some = [(groups[i], texts[i], ids[i]) for i in mine]
        try:
            outcome = dict(zip(mine, ask(*zip(*some)).tolist())) if mine else {}
        except RewardError as error:
            outcome = error
        values = {}
        for one in common.gather(outcome):
            if isinstance(one, RewardError):
                raise one                # in all processes, whichever had it
            values |= one
        return torch.tensor([values[i] for i in range(len(texts))], dtype=torch.float64)
    return reward


def reward_arguments(groups, texts, ids):
    """What a reward function is called with: copies, for it may change them."""
    said = []
    for g, text in zip(groups, texts):
        chat = not isinstance(g.prompt, str)
        said.append([{"role": "assistant", "content": text}] if chat else text)
    given = {
        "prompts": [copy.deepcopy(g.prompt) for g in groups],
        "completions": said,
        "completion_ids": [list(one) for one in ids]}
    names = dict.fromkeys(name for g in groups for name in g.row)    # a row may lack some
    for name in names:
        if name not in given and name != "prompt":
            given[name] = [copy.deepcopy(g.row.get(name)) for g in groups]
    return given


def checked(values, texts, what):
    """N numbers or None, as a list, an array or a tensor → (N,) float64, NaN for None."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)) or len(values) != len(texts):
        count = len(values) if hasattr(values, "__len__") else repr(values)
        raise RewardError(f"{what}: it returned {count} values for {len(texts)} completions.")
    numbers = []
    for value, text in zip(values, texts):
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError, OverflowError):       # no number, or 10 ** 400
            number = math.inf
        if isinstance(value, str) or value is not None and not math.isfinite(number):
            raise RewardError(f"{what}: its reward is {value!r:.60} for the completion "
                              f"{text[:60]!r}, not a finite number and not None.")
        numbers.append(number)
    return torch.tensor(numbers, dtype=torch.float64)


def model_reward(path, what, args, device):
    """A reward model with its own tokeniser and template, z-scored by its stored statistics.

    As in its training and in score.py a completion has an end token only where it ended.
    """
    encoder = common.load_encoder(path, chat=args.chat, flag=FLAG)
    model = common.load_reward_model(path, encoder, device, FLAG)
    autocast = common.pick_autocast(args.dtype, device)
    mean = getattr(model.config, "reward_mean", 0.0)
    width = "reward_std_calibrated" if args.calibrate_length else "reward_std"
    std = getattr(model.config, width, 1.0) or 1.0
    curve = getattr(model.config, "reward_by_length", None)
    packed = None                                            # not known before the first completion
    if not hasattr(model.config, "reward_mean"):
        print(f"note: {path} stores no statistics of its scores (train_rm.py does), so they are "
              "not z-scored")
    if args.calibrate_length and not (curve and hasattr(model.config, width)):
        fail(f"--calibrate-length: {path} stores no length curve, or no std of its scores without "
             "their length trend; train it with train_rm.py.")

    def reward(groups, texts, ids, ended):
        nonlocal packed
        scored = []
        for g, text, whole in zip(groups, texts, ended):
            one = encoder(replace(g, completions=[text]))
            if not whole and len(one.completion_ids[0]) > 1:
                one.completion_ids[0].pop()
            scored.append(one)
        longest = max(map(Group.tokens, scored))
        if longest > encoder.max_positions:
            raise RewardError(f"{what}: a prompt and its completion are {longest} of its tokens, "
                              f"and it has {encoder.max_positions} positions; lower --max-length "
                              "or --max-new-tokens.")

        if packed is None:
            packed = common.can_pack(model, scored, reward_scores)
        scores = for_all(
            reward_scores, model, scored, args.micro_batch_tokens, packed, autocast, "")
        values = scores.double()                                                 # (N,)
        if args.calibrate_length:
            lengths = [len(g.completion_ids[0]) for g in scored]
            values = common.calibrate(values, lengths, curve, mean)
        return (checked(values, texts, what) - mean) / std

    reward.unit = hasattr(model.config, "reward_mean")
    return reward


# --- rollouts -------------------------------------------------------------------------------------

def draw_seed(*parts):
    """A seed made of run seed, purpose and step: nothing random is carried from step to step, so
    resuming is exact."""
    return int(hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:15], 16)


def sample_and_reward(model, encoder, groups, rewards, args, autocast, n, seed, progress=""):
    """n completions of each prompt → Rollout. rewards: those of --reward, then those of --watch."""
    began = time.perf_counter()
    prompts = [g.prompt_ids for g in groups]
    with autocast:
        samples = common.sample(
            model, prompts, n, args.max_new_tokens, encoder.stops, args.temperature, args.top_p,
            seed=seed, progress=progress)
    sampled = time.perf_counter()

    ids = [s.ids for s in samples]
    ended = [s.ended for s in samples]
    asked = [g for g in groups for _ in range(n)]            # each completion beside its own row
    texts = [encoder.decode(s.ids, g.prompt) for g, s in zip(asked, samples)]
    values = {name: reward(asked, texts, ids, ended) for name, reward in rewards.items()}
    summands = torch.stack(list(values.values())[:len(args.reward)])             # (R, N)
    factors = args.reward_weights or [1.0] * len(args.reward)
    return Rollout(
        groups=groups,
        ids=ids,
        texts=texts,
        ended=torch.tensor(ended),
        logps=torch.tensor([sum(s.logps) for s in samples], dtype=torch.float64),
        rewards=values,
        reward=combine(summands, factors, args.reward_aggregate),
        seconds=Counter(sample=sampled - began, reward=time.perf_counter() - sampled))


def counted_reward(rollout, args):
    """The reward with NaN, as where there is none, for what --mask-truncated leaves out: (N,)"""
    masked = ~rollout.ended & args.mask_truncated
    return torch.where(masked, math.nan, rollout.reward)


def fill(rollout, sample_more, train, asked, args, step):
    """Dynamic sampling: zero-variance groups give way to groups for other prompts of `train`, in at
    most 4 rounds. On the raw reward, before length shaping (as in DAPO).

    sample_more(prompts, seed) → Rollout; asked: numbers of the prompts that the step began with.
    Returns (what to learn from, all that was sampled).
    """
    def varied(some):
        return some.take(~zero_variance(some.by_prompt(counted_reward(some, args))))

    every = rollout
    kept = varied(rollout)
    left = sorted(set(range(len(train))) - set(asked))
    for attempt in range(1, 5):
        needed = min(len(left), len(rollout.groups) - len(kept.groups))
        if not needed:
            break
        chosen = random.Random(f"{args.seed} {step} {attempt}").sample(left, needed)
        left = sorted(set(left) - set(chosen))
        seed = draw_seed(args.seed, "train", step, attempt)
        more = sample_more([train[i] for i in chosen], seed)
        every = every.join(more)
        kept = kept.join(varied(more))
    return kept, every


def as_groups(rollout, wanted, args, packed):
    """Those completions of a rollout that wanted (N,) marks, as groups; g.index says which.

    A group over the budget is split: the loss is a sum over completions, so it may be. Where
    nothing is packed, and so no prompt is shared, every completion stands alone.
    """
    groups = []
    prompt_of = rollout.prompt.tolist()
    for i in wanted.nonzero()[:, 0].tolist():
        ids = rollout.ids[i]
        same = groups and prompt_of[groups[-1].index[-1]] == prompt_of[i]
        if packed and same and groups[-1].tokens() + len(ids) <= args.micro_batch_tokens:
            groups[-1].completion_ids.append(ids)
            groups[-1].index.append(i)
        else:
            prompt = rollout.groups[prompt_of[i]]
            groups.append(replace(prompt, completion_ids=[ids], index=[i]))
    return groups


def log_probs(model, minibatches, lengths, args, packed, autocast):
    """log π of the tokens of the minibatches before the update: (M,), NaN for others or no model.

    Computed in the micro-batches of the update, so that at the first one ρ is exactly 1.
    """
    column = torch.full((int(lengths.sum()),), math.nan)
    measure = functools.partial(token_logps, temperature=args.temperature)
    for groups in minibatches:
        if model is not None and groups:
            column[token_index(groups, lengths)] = for_all(
                measure, model, groups, args.micro_batch_tokens, packed, autocast, "")
    return column


def prepare(rollout, model, reference, args, packed, autocast):
    """What the updates of a step need → (advantages (N,), minibatches, Tokens).

    A minibatch is a list of groups: one optimizer step's completions that need a gradient.
    """
    lengths = rollout.lengths                                                    # (N,)
    penalty = overlong_penalty(lengths, args.max_new_tokens, args.overlong_penalty)
    reward = counted_reward(rollout, args) + penalty                             # (N,)
    scale = advantage_scale(args)
    A = advantages(rollout.by_prompt(reward), scale).flatten()                   # (N,)

    # What counts is in the denominators; without a KL, advantage 0 needs no computation.
    counted = ~reward.isnan()                                                    # (N,)
    needs_gradient = counted & ((A != 0) | (args.beta > 0))                      # (N,)

    minibatch = rollout.prompt % args.minibatches                                # (N,)
    minibatches = []
    for number in minibatch.unique():
        wanted = needs_gradient & (minibatch == number)
        minibatches.append(as_groups(rollout, wanted, args, packed))

    # Log-probs before the first update. A single update needs none: its own log π are those of
    # π_old, and Tokens.of() puts them in place of NaN.
    several = len(minibatches) * args.updates_per_batch > 1
    policy = model if several or args.kl == "reward" else None
    old = log_probs(policy, minibatches, lengths, args, packed, autocast)        # (M,)
    with common.adapter_off(reference):
        ref = log_probs(reference, minibatches, lengths, args, packed, autocast)     # (M,)
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)                # (M,)
    if args.kl == "reward":                                                      # (10)
        k1 = sum_by(old - ref, owner, len(lengths)).double()                     # (N,)
        own = scale if scale == "leave-one-out" else "none"
        A = A - args.beta * advantages(rollout.by_prompt(k1), own).flatten()

    # From completions to tokens, here only: token-level advantages would replace A[owner].
    weight = weights(lengths, counted, minibatch, args)                          # (N,)
    return A, minibatches, Tokens(A[owner], weight[owner], old, ref, owner, lengths)


def reward_means(rollout):
    """The mean of what is trained on and of each reward alone, where any completion has one."""
    columns = {"reward": rollout.reward}
    for name, values in rollout.rewards.items():
        columns[f"rewards/{name}/mean"] = values
    return {name: r.nanmean().item() for name, r in columns.items() if not r.isnan().all()}


def unusual(rollout, rewards):
    """Of each reward model, the fraction of scores more than 3 stored standard deviations from the
    mean of its training completions: unlike anything that it learnt from."""
    result = {}
    for name, reward in rewards.items():
        if getattr(reward, "unit", False):
            far = rollout.rewards[name].abs() > 3
            result[f"rewards/{name}/unusual"] = far.double().mean().item()
    return result


def describe(rollout, rewards, args):
    """Metrics of a step's samples: rewards, lengths, repetition, time."""
    r = rollout.by_prompt(counted_reward(rollout, args))                         # (P, G)
    lengths = rollout.lengths.double()                                           # (N,)
    repeated = []
    for p in range(len(rollout.groups)):
        different = set(map(tuple, rollout.ids[rollout.span(p)]))
        repeated.append(1 - len(different) / rollout.size)
    result = reward_means(rollout) | unusual(rollout, rewards) | {
        "frac_reward_zero_std": zero_variance(r).double().mean().item(),
        "completions/sampled_groups": len(rollout.groups),
        "completions/mean_length": lengths.mean().item(),
        "completions/identical": statistics.mean(repeated),
        "completions/clipped_ratio": 1 - rollout.ended.double().mean().item(),
        "sample_tokens_per_second": lengths.sum().item() / rollout.seconds["sample"]}
    if args.top_p == 1:                  # else samples are not the policy's: no estimate of it
        result["entropy"] = -(rollout.logps.sum() / lengths.sum()).item()
    if "reward" in result:
        result["reward_std"] = centre(r)[2].mean().item()
    for name, values in rollout.rewards.items():
        result[f"rewards/{name}/count"] = int((~values.isnan()).sum())
    for name, seconds in rollout.seconds.items():
        result[f"seconds/{name}"] = seconds
    return result


def completion_rows(rollout, A, step):
    """What completions.jsonl holds of a step: one row a prompt."""
    rows = []
    for p, group in enumerate(rollout.groups):
        mine = rollout.span(p)
        rewards = [None if math.isnan(r) else r for r in rollout.reward[mine].tolist()]
        rows.append({
            "step": step,
            "prompt": group.prompt,
            "completions": rollout.texts[mine],
            "rewards": rewards,
            "advantages": A[mine].tolist()})
    return rows


def sample_line(prompt, texts, values):
    """A prompt and up to four of its completions with a number each, for the terminal."""
    shown = [f"{text[:40]!r} {value:+.2f}" for text, value in list(zip(texts, values))[:4]]
    last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return f"  {last[-70:]!r} ▸ " + ", ".join(shown)


# --- evaluation -----------------------------------------------------------------------------------

def evaluate(model, encoder, groups, rewards, args, autocast, show=0):
    """Samples for held-out prompts: mean reward, pass@1 … pass@k with errors over prompts.

    Every evaluation draws the same random numbers, so what differs between two is the policy.
    A sample passes where the first --reward is 1; where it is not always 0 or 1 (a reward model's
    score) there is no pass@k. A sample without a reward is neither correct nor wrong.
    """
    seed = draw_seed(args.seed, "eval")
    rollout = sample_and_reward(
        model, encoder, groups, rewards, args, autocast, args.eval_k, seed, "evaluate")
    if rollout.reward.isnan().all():
        raise RewardError(f"--reward: not one of {len(rollout.ids)} completions of held-out "
                          "prompts got a reward.")
    result = reward_means(rollout) | {
        "n": len(groups),
        "mean_length": rollout.lengths.double().mean().item(),
        "clipped_ratio": (~rollout.ended).double().mean().item()}

    first = rollout.by_prompt(next(iter(rollout.rewards.values())))              # (P, k)
    judged = (~first.isnan()).sum(1).tolist()                                    # (P,)
    correct = (first == 1).sum(1).tolist()                                       # (P,)
    binary = bool(((first == 0) | (first == 1) | first.isnan()).all())
    prompts = common.number_prompts(groups).tolist()                             # (P,)
    for k in sorted({2 ** i for i in range(args.eval_k.bit_length())} | {args.eval_k}):
        cluster = [p for p, n in zip(prompts, judged) if n >= k]
        estimates = [pass_at_k(n, c, k) for n, c in zip(judged, correct) if n >= k]
        if estimates and binary:
            values = torch.tensor(estimates, dtype=torch.float64)
            solved = common.proportion(values, torch.tensor(cluster))
            result[f"pass@{k}"] = solved.mean
            result[f"pass@{k}_se"] = solved.half

    for p in range(min(show, len(groups))):
        mine = rollout.span(p)
        tqdm.write(sample_line(groups[p].prompt, rollout.texts[mine], rollout.reward[mine]))
    return {f"eval/{name}": value for name, value in result.items()}


def eval_line(step, result, args):
    """One line for the terminal."""
    r = {name.removeprefix("eval/"): value for name, value in result.items()}
    line = f"step {step}: eval reward {r['reward']:.3f}"
    for k in (1, args.eval_k):
        if f"pass@{k}" in r:
            line += f", pass@{k} {100 * r[f'pass@{k}']:.1f} ± {100 * r[f'pass@{k}_se']:.1f} %"
    line += f" of {r['n']} prompts, mean length {r['mean_length']:.1f}"
    each = {name.split("/")[1]: v for name, v in r.items() if name.startswith("rewards/")}
    if len(each) > 1:
        line += ", " + ", ".join(f"{name} {value:.3f}" for name, value in each.items())
    return line


# --- the schedule ---------------------------------------------------------------------------------
# --- shared: schedule ---

def lr_at(step, steps, args):
    """Learning rate of update `step` (from 0): linear warm-up, then the schedule, 0 at `steps`."""
    warmup = args.warmup_steps if args.warmup_steps >= 0 else steps // 10
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)                              # 0 … 1
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return args.learning_rate * decay[args.lr_schedule]


# --- end shared ---


# --- main -----------------------------------------------------------------------------------------

def trial(train, max_length, args):
    """Groups for can_pack() before anything is sampled: three short ones, and one as long as a
    group can get in training."""
    groups = [replace(g, completion_ids=[g.prompt_ids[-9:], g.prompt_ids[-5:]]) for g in train[:3]]
    longest = max(train, key=Group.tokens)
    room = min(args.group_size * args.max_new_tokens, max_length - longest.tokens(), 2048)
    ids = (longest.prompt_ids * room)[:room]
    return groups + [replace(longest, completion_ids=[ids, ids])]


def main(argv=None):
    args = parse_args(argv)
    # --- setup
    # --- shared: setup ---
    device = common.join_processes(args.device)
    autocast = common.pick_autocast(args.dtype, device)
    encoder = common.load_encoder(args.model, args.chat_template, args.chat)
    max_length = common.fitting_length(args, encoder)
    # --- end shared ---
    if max_length <= args.max_new_tokens:
        fail(f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt within "
             f"--max-length {max_length}.")
    # + 1: load_data() keeps a prompt that leaves room for one token.
    room = max_length - args.max_new_tokens + 1
    train, held_out = common.load_data(args, encoder, ("prompt",), room)
    # --- shared: plan ---
    plan = Plan(len(train), args.batch_size, args.epochs, args.max_steps, args.seed)
    # Hashes of what the run depends on beside its flags: --resume compares them.
    depends = {"data_sha256": common.data_fingerprint(train + held_out)}
    # --- end shared ---

    rewards = load_rewards(args.reward + args.watch, args, device)
    model = common.load_model(args.model, encoder, device)
    packed = common.can_pack(model, trial(train, max_length, args))
    reference = None
    if args.ref_model:
        other = common.load_encoder(args.ref_model, flag="--ref-model")
        common.check_same_tokeniser(encoder, other, f"--ref-model {args.ref_model}")
    if args.beta and args.lora_rank and not args.ref_model:
        reference = model                                    # with its adapter off
    elif args.beta:
        path = args.ref_model or args.model
        reference = common.load_model(path, encoder, device, "--ref-model").requires_grad_(False)
    depends["model_sha256"] = common.model_fingerprint(model)
    depends["reward_sha256"] = rewards_fingerprint(args)
    if args.ref_model:
        depends["reference_sha256"] = common.model_fingerprint(reference)

    # --- shared: open the run ---
    out, start = common.first(common.open_run, args, len(plan), depends)
    adapter = common.add_lora(model, args)
    common.wrap_layers(model, args)
    needed = common.memory_needed(model, [train[i] for i in plan[0]], packed, args)
    common.shard(model, args)
    optimizer = torch.optim.AdamW(
        common.trained(model).values(), lr=0.0, betas=(0.9, 0.999), eps=1e-8,
        weight_decay=args.weight_decay, fused=device.type != "mps")
    extra = common.load_checkpoint(out, model, optimizer) if start else {}
    evaluated = common.first(common.open_logs, out, start, args, depends)
    common.describe_run(model, train, held_out, plan, args, packed, needed)
    # --- end shared ---
    if reference is not None and reference is not model:
        common.shard(reference, args)
        size = sum(p.numel() for p in reference.parameters()) * 4 / common.world()
        print(f"  and {size / 2 ** 30:.2f} GiB for the reference")
    trained = ", ".join(list(rewards)[:len(args.reward)])
    watched = ", ".join(list(rewards)[len(args.reward):]) or "none"
    print(f"  {args.group_size} completions of each prompt; rewards: {trained}; watched: {watched}")
    if args.top_p < 1:
        print("note: with --top-p below 1 samples are not the policy's own; the ratio stays that "
              "of the full softmax")

    @contextmanager
    def saving(step):
        """Where a reward fails, the state after `step` updates is not lost."""
        try:
            yield
        except RewardError as error:
            if not step:
                fail(error)
            common.save_checkpoint(out, model, optimizer, step, extra)
            fail(f"{error} The state after step {step} is saved: --resume goes on from there.")

    def look(step, show=0):
        """Evaluates after `step` updates, for metrics.jsonl and the terminal."""
        asked = held_out[:args.eval_samples]
        if not asked:
            return
        with saving(step):
            result = evaluate(model, encoder, asked, rewards, args, autocast, show)
        log(out, step, result)
        tqdm.write(eval_line(step, result, args))

    def sample_more(groups, seed):
        return sample_and_reward(
            model, encoder, groups, rewards, args, autocast, args.group_size, seed)

    def update(step, groups, tokens):
        """One optimizer step on a minibatch → (norm of its gradient, Counter of metric sums).

        Called once, below; a function so that its shared block is indented as in the others.
        """
        sums = Counter()

        # The gradient of the minibatch, summed over micro-batches (memory, not statistics).
        optimizer.zero_grad(set_to_none=True)
        for micro, weight in common.my_micro_batches(groups, args.micro_batch_tokens, packed):
            with autocast:
                batch = common.lay_out(model, micro, packed)
                logp = token_logps(model, batch, args.temperature)              # (T,)
            loss, part_sums = micro_loss(tokens.of(micro, logp), args)
            (loss * weight).backward()
            sums.update(part_sums if weight else {})

        sums = common.total(sums)
        sums["computed"] = sum(g.tokens() for g in groups)

        # --- shared: update ---
        # A gradient that is not finite would ruin the weights: the state before it is kept instead.
        bound = args.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), bound)
        grad_norm = common.whole(grad_norm)
        if not torch.isfinite(grad_norm):
            common.save_checkpoint(out, model, optimizer, step, extra)
            fail(f"step {step + 1}: the gradient is not finite (rows: {groups[0].where} …). The "
                 "state before it is saved: --resume with a lower --lr goes on from there.")
        for g in optimizer.param_groups:
            g["lr"] = lr_at(step, len(plan), args)
        optimizer.step()
        # --- end shared ---
        return grad_norm.item(), sums

    # --- shared: before the loop ---
    def due(step):
        """Whether to evaluate after `step` updates."""
        return step in (0, len(plan)) or args.eval_every and step % args.eval_every == 0

    if held_out and due(start) and not evaluated:
        look(start, show=3)
    stopped = common.catch_signals()
    saved_at = time.monotonic()
    steps = range(start, len(plan))
    quiet = True if common.rank() else None
    bar = tqdm(steps, args.loss, len(plan), initial=start, unit="step", disable=quiet)
    # --- end shared ---
    alarmed = set()                  # reward models that were said to be out of their depth
    idle = 0                         # steps in which no reward could teach anything
    recent = []                      # rows of completions.jsonl: the last eight steps
    if start and (out / "completions.jsonl").is_file():
        with common.failing(f"--resume: {out / 'completions.jsonl'} cannot be read"):
            rows = common.read_lines(out / "completions.jsonl")
            recent = [row for row in rows if row["step"] <= start]

    # --- loop
    for step in bar:
        # Sample and reward. Every draw is seeded by step and prompt: a resumed run repeats it.
        with saving(step):
            seed = draw_seed(args.seed, "train", step, 0)
            every = sample_more([train[i] for i in plan[step]], seed)
            rollout = every
            if args.dynamic_sampling:
                rollout, every = fill(every, sample_more, train, plan[step], args, step)
        metrics = describe(every, rewards, args)
        for name in set(rewards) - alarmed:
            if metrics.get(f"rewards/{name}/unusual", 0) > 0.05:
                alarmed.add(name)
                tqdm.write(f"step {step + 1}: more than 5 % of the scores of {name} lie 3 standard "
                           "deviations from those of its training: do not trust it here")

        # Learn from it: --updates-per-batch passes over --minibatches disjoint parts.
        if rollout.groups:
            began = time.perf_counter()
            A, minibatches, tokens = prepare(rollout, model, reference, args, packed, autocast)
            if not A.any():
                idle += 1
                if idle == 1:
                    tqdm.write(f"step {step + 1}: no group has two different rewards, so there is "
                               "nothing to learn from it (said once)")
            norms = []
            sums = Counter()
            for _ in range(args.updates_per_batch):
                for groups in minibatches:
                    norm, part_sums = update(step, groups, tokens)
                    norms.append(norm)
                    sums.update(part_sums)
            metrics |= means(sums, norms, time.perf_counter() - began)
            metrics["learning_rate"] = lr_at(step, len(plan), args)

            recent = [row for row in recent if row["step"] > step - 7]
            recent += completion_rows(rollout, A, step + 1)
            common.write_lines(out / "completions.jsonl", recent)
        else:
            idle += 1
            tqdm.write(f"step {step + 1}: {len(every.groups)} groups, all zero-variance; no update")
        shown = {
            "reward": "reward", "kl": "kl", "len": "completions/mean_length",
            "truncated": "completions/clipped_ratio", "same": "completions/identical",
            "zero-variance": "frac_reward_zero_std"}

        # --- shared: log ---
        log(out, step + 1, metrics)
        shown = {name: f"{metrics[key]:.4g}" for name, key in shown.items() if key in metrics}
        bar.set_postfix(shown, refresh=False)
        # --- end shared ---

        # --- shared: save and evaluate ---
        last = step + 1 == len(plan)
        asked = args.save_every and (step + 1) % args.save_every == 0
        # A signal and the ten minutes reach one process before another: all act on the same step.
        signs = common.gather((time.monotonic() - saved_at > SAVE_SECONDS, bool(stopped)))
        late, stop = (any(column) for column in zip(*signs))
        if last or stop or asked or late:
            common.save_checkpoint(out, model, optimizer, step + 1, extra)
            saved_at = time.monotonic()
        if held_out and due(step + 1):
            look(step + 1, show=3 * last)
        if stop and not last:
            bar.close()
            print(f"stopped after step {step + 1} of {len(plan)}; --resume goes on from there")
            raise SystemExit(130)
        # --- end shared ---

    # --- save
    if idle and idle == len(plan) - start:
        print("note: in no step a group had two different rewards: nothing was learnt from them")
    for row in recent[-3:]:
        print(sample_line(row["prompt"], row["completions"], row["advantages"]))
    common.save_model(out, model, encoder.tokenizer, adapter)
    print(f"saved in {out}: model, args.json, metrics.jsonl, completions.jsonl, checkpoint/")


if __name__ == "__main__":
    common.run(main)
