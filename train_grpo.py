"""Improve a language model on a reward by sampling: group relative policy optimisation (GRPO) and its variants.

    python train_grpo.py                                     # 10 seconds on two CPU cores, no network
    python train_grpo.py --model DIR --dataset prompts.jsonl --reward my_rewards.py:f --learning-rate 1e-6

With no flags it trains the toy of tests/toy (sums), reward 1 for the right sum: the share of right samples on sums
that it never saw (pass@1) goes from about 48 % to about 95 %. The first step's ratio is exactly 1, its KL exactly 0.

"GRPO" means at least five things in public code. Here, by default (Shao et al. 2024, arXiv 2402.03300, eq. 3):
  advantage    (r − mean of the group) / (std of the group + 1e-4), std with G − 1; --advantage, see (5)
  normaliser   1/|o| within a completion, then the mean over the completions of the whole step, never of a micro-batch
  clip         ratio per token, 1 − 0.2 … 1 + 0.2; matters only from the second update on a batch on
  KL           k3 to the starting policy, per token, added to the loss with β = 0.04; what it descends is said at (9)
  no variance  a group whose rewards are all alike has advantage 0. With β > 0 it gives KL gradient, with β = 0 nothing
               is computed for it; it stays in every denominator. --dynamic-sampling replaces such groups
Differs from the paper in: one update per batch and no reward model retrained on the way.
Variants are one function each in LOSSES. Rewards have trl's signature, so that yours runs here unchanged.
"""
# --- derivation -------------------------------------------------------------------------------------------------------
#
# Notation: x prompt, o_1 … o_G sampled answers, o_{i,t} their tokens, r_i rewards, π the policy, π_old the policy that
# sampled, π_ref the frozen start. log π(o|x) = Σ_t log π(o_t | x, o_<t), end token included, all at --temperature.
#
# 1. The goal is the expected reward, and its gradient is an expectation too (log-derivative trick):
#
#        J(π) = E_x E_{o~π} [ r(x, o) ]        ∇J = E_{o~π} [ r(x, o) ∇ log π(o|x) ]                                 (1)
#
# 2. A baseline costs nothing. For any b that does not depend on o, E_{o~π}[ b ∇ log π(o|x) ] = b ∇ Σ_o π(o|x) = 0, so
#
#        ∇J = E [ (r − b) ∇ log π(o|x) ]                                                                             (2)
#
#    A value network estimates the best b. GRPO instead samples a group and takes its mean: b = mean(r_1 … r_G). This b
#    does contain r_i: that shrinks the gradient by (G − 1)/G, no more. Leaving i out makes it exact (RLOO):
#
#        r_i − mean_{j≠i} r_j = G/(G − 1) · (r_i − mean_j r_j)                                                       (3)
#
# 3. Old samples may be used again by importance weights, ρ = π/π_old, whose gradient at π = π_old is (2):
#
#        ∇ ρ_t A = ρ_t A ∇ log π(o_t|·)       so at the first update  ∇ = A ∇ log π                                  (4)
#
#    Far from π_old the weights are wild; PPO's clip removes the gain from moving further than 1 ± ε in A's direction.
#
# 4. Advantage. All group based; the scale is a choice, and each choice is somebody's "GRPO":
#
#        A_i = (r_i − mean) / (std_group + 1e-4)   group-std: hard and easy prompts weigh alike (GRPO, DAPO, GSPO)
#              (r_i − mean) / (std_batch + 1e-4)   batch-std: one scale for the step
#               r_i − mean                         none: unbiased up to (3) (Dr. GRPO, arXiv 2503.20783)             (5)
#
# 5. Surrogates, to be maximised, per token t of completion i:
#
#        ℓ = min( ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A )          grpo, dapo, dr-grpo                               (6)
#        the same with s_i = exp( mean_t log ρ_t ) for all t       gspo (Zheng et al. 2025, arXiv 2507.18071)        (7)
#        sg[ min(ρ, 1 + ε_high) ] A log π                          cispo (MiniMax 2025, arXiv 2506.13585)            (8)
#
#    and their sum is weighted. n_i tokens in completion i, N completions, M tokens in the step, L = --max-new-tokens:
#    grpo, gspo 1/(n_i N): short answers weigh more per token · dapo, cispo 1/M · dr-grpo 1/(N L): no length bias ·
#    rloo 1/N on the whole sequence's ratio and on the sum of its tokens' KL. (dapo: Yu et al. 2025, arXiv 2503.14476,
#    there per group.)
#
# 6. Staying near π_ref: subtract β KL(π ‖ π_ref). With d = log π_ref(o_t) − log π(o_t), o_t sampled from π:
#
#        k1 = −d        k2 = d²/2        k3 = e^d − 1 − d           E[k1] = E[k3] = KL(π ‖ π_ref) of that token       (9)
#
#    But the gradient of an expectation is not the expectation of a gradient, for π is also what we sample from. For one
#    token:
#      k1 as a loss term     E[∇k1] = E[∇ log π] = 0: no force at all
#      k2 as a loss term     E[−d ∇ log π] = ∇ KL(π ‖ π_ref), the one in the objective                       --kl k2
#      k3 as a loss term     E[(1 − e^d) ∇ log π] = ∇ KL(π_ref ‖ π), the other direction; the paper's        --kl k3
#      k3 · ρ                ∇ KL(π ‖ π_ref), unbiased also off policy                                       --kl k3-unbiased
#    Summed over an answer these take the prefixes as given: what o_1 does to the KL of o_2 is missing. The KL of whole
#    answers is an expected reward like any other, so by (2) it is exact, with more variance, where it is subtracted (and
#    the tokens of all answers weigh alike, as in rloo and dr-grpo):
#      k1 in the reward      A(r) − β ( k − mean of the group ),  k = Σ_t k1                --kl reward             (10)
#    centred, but not divided by the rewards' std as A(r) is: β would cancel where all rewards are alike.
#    test_eq9 and test_eq10 check each by enumeration. β = 0 loads no reference.

# --- imports ----------------------------------------------------------------------------------------------------------
import argparse
import hashlib
import importlib.util
import inspect
import json
import math
import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsFloat

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from common import (Group, account, calibrate, can_pack, fail, load_encoder, load_model, load_reward_model, lay_out,
                    micro_batches, pick_device, plan_steps, read_groups, reward_scores, sample, split_by_prompt,
                    token_logps, tokenise)

TOY = Path(__file__).parent / "tests" / "toy"


# --- arguments --------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                usage="%(prog)s [--flag value …]  (--help lists the flags)",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # --- shared: flags ---
    g = p.add_argument_group("model and data")
    g.add_argument("--model", default=str(TOY / "model"), help="directory or hub id to start from")
    g.add_argument("--dataset", default="", help=".json .jsonl .csv .parquet (also .gz) or a hub id")
    g.add_argument("--split", default="train", help="split of a hub dataset")
    g.add_argument("--eval-dataset", help="evaluate on this instead of a part of --dataset")
    g.add_argument("--eval-fraction", type=float, default=0.1, help="share of the prompts that is held out (0 = none)")
    g.add_argument("--columns", nargs="+", default=[], metavar="NEW=OLD", help="rename columns: prompt=question chosen=best")
    g.add_argument("--prefer", choices=["better", "safer"], default="better", help="PKU-SafeRLHF: which of its two labels")
    g.add_argument("--limit", type=int, default=0, help="only the first N rows (0 = all)")
    g.add_argument("--chat", action="store_true", help="plain-text prompts become user turns of the chat template")
    g.add_argument("--chat-template", metavar="FILE", help="Jinja template instead of the tokeniser's own")
    g.add_argument("--max-length", type=int, default=1024, help="tokens of prompt + completion")
    g.add_argument("--overlong", choices=["drop", "truncate"], default="drop", help="groups over --max-length: drop, or cut completions")
    g = p.add_argument_group("run")
    g.add_argument("--output-dir", default="", help="model, args.json, metrics.jsonl and checkpoint/ go here")
    g.add_argument("--epochs", type=int, default=1, help="passes over the data")
    g.add_argument("--max-steps", type=int, default=0, help="optimizer steps; wins over --epochs where > 0")
    g.add_argument("--batch-size", type=int, default=32, help="groups (prompts) per optimizer step: statistics")
    g.add_argument("--micro-batch-tokens", type=int, default=8192, help="tokens per forward: memory, no effect on the result")
    g.add_argument("--learning-rate", "--lr", type=float, default=0.0, help="peak; suits the toy; over 100 M parameters 1e-6, a reward model 1e-5")
    g.add_argument("--lr-schedule", choices=["constant", "linear", "cosine"], default="cosine", help="after the warm-up, to 0")
    g.add_argument("--warmup-steps", type=int, default=-1, help="linear warm-up (< 0: a tenth of the steps)")
    g.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's")
    g.add_argument("--max-grad-norm", type=float, default=1.0, help="clip the gradient's norm (0 = no clipping)")
    g.add_argument("--eval-every", type=int, default=0, help="steps between evaluations (0 = start and end only)")
    g.add_argument("--save-every", type=int, default=0, help="steps between checkpoints (0 = at the end only)")
    g.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output-dir")
    g.add_argument("--seed", type=int, default=0, help="of everything that is random")
    g.add_argument("--device", default="auto", help="auto = cuda where there is one, else cpu")
    g.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="to compute in; auto: bfloat16 on cuda; weights: float32")
    # --- end shared ---
    g = p.add_argument_group("rewards")
    g.add_argument("--reward", nargs="+", default=[f"{TOY / 'reward.py'}:right"], metavar="SPEC", help="file.py:function or a reward-model directory")
    g.add_argument("--reward-weights", nargs="+", type=float, default=[], help="one per --reward (none: 1 each)")
    g.add_argument("--reward-aggregate", choices=["sum", "min"], default="sum", help="of the weighted rewards of an answer")
    g.add_argument("--watch", nargs="+", default=[], metavar="SPEC", help="rewards that are logged and not trained on: gold beside proxy")
    g.add_argument("--calibrate-length", action="store_true", help="take the length trend stored in a reward model out of its scores")
    g.add_argument("--overlong-penalty", type=int, default=0, metavar="C", help="penalty 0 … −1 over the last C of --max-new-tokens (0 = none)")
    g = p.add_argument_group("sampling")
    g.add_argument("--group-size", type=int, default=8, help="answers per prompt")
    g.add_argument("--max-new-tokens", type=int, default=128, help="longest answer")
    g.add_argument("--temperature", type=float, default=1.0, help="of sampling and of every log-prob that is trained on")
    g.add_argument("--top-p", type=float, default=1.0, help="sample from the smallest set of tokens with this probability (< 1 is off policy)")
    g.add_argument("--dynamic-sampling", action="store_true", help="replace groups whose rewards are all alike, up to 4 times a step")
    g.add_argument("--eval-samples", type=int, default=128, help="held-out prompts to sample for at each evaluation")
    g.add_argument("--eval-k", type=int, default=4, help="answers for each of them: pass@1 … pass@k")
    g = p.add_argument_group("GRPO")
    g.add_argument("--loss", choices=LOSSES, default="grpo", help="; ".join(f"{k}: {f.__doc__.splitlines()[0]}" for k, f in LOSSES.items()))
    g.add_argument("--advantage", choices=["group-std", "batch-std", "none"], help="scale (5); default: none for dr-grpo and rloo, else group-std")
    g.add_argument("--clip-low", type=float, help=f"ε_low; default by loss: {CLIP}")
    g.add_argument("--clip-high", type=float, help="ε_high; default by loss, as --clip-low")
    g.add_argument("--dual-clip", type=float, default=0.0, metavar="C", help="grpo, dapo, dr-grpo: for A < 0 no objective below C·A, C > 1 (0 = off)")
    g.add_argument("--beta", type=float, default=0.04, help="weight of the KL to the reference (0: none is loaded)")
    g.add_argument("--kl", choices=["k3", "k2", "k3-unbiased", "reward"], default="k3", help="estimator and place of the KL (9)")
    g.add_argument("--ref-model", help="reference policy; default: --model as it is at the start")
    g.add_argument("--updates-per-batch", type=int, default=1, help="passes over each batch of samples")
    g.add_argument("--minibatches", type=int, default=1, help="optimizer steps per pass, over disjoint parts of the batch")
    g.add_argument("--mask-truncated", action="store_true", help="answers cut at --max-new-tokens leave numerator and denominators")
    p.set_defaults(dataset=str(TOY / "prompts.jsonl"), output_dir="runs/grpo", learning_rate=5e-4)
    args = p.parse_args(argv)
    # --- shared: refused flags ---
    for name in ("epochs", "batch_size", "micro_batch_tokens", "max_length"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("limit", "max_steps", "eval_every", "save_every", "learning_rate", "weight_decay", "max_grad_norm"):
        if not 0 <= getattr(args, name) < math.inf:
            p.error(f"--{name.replace('_', '-')} must not be negative")
    if not 0 <= args.eval_fraction < 1:
        p.error("--eval-fraction must be in [0, 1)")
    if not 0 <= args.seed < 2 ** 63:
        p.error("--seed must be in [0, 2^63)")
    given = [Path(m).resolve() for m in (args.model, getattr(args, "ref_model", None)) if m]
    out = Path(args.output_dir).resolve()
    if any(m == out or out / "old" in (m, *m.parents) for m in given):       # old/ is where an earlier run is moved
        p.error("--output-dir is where the starting model or the reference lies, and would replace it: choose another")
    # --- end shared ---
    if args.group_size < 2:
        p.error("--group-size must be at least 2: the baseline is the group's mean")
    for name in ("max_new_tokens", "updates_per_batch", "minibatches", "eval_k"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 < args.temperature < math.inf or not 0 < args.top_p <= 1:
        p.error("--temperature must be above 0 and --top-p in (0, 1]")
    for name in ("beta", "eval_samples", "clip_low", "clip_high", "overlong_penalty"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < math.inf:
            p.error(f"--{name.replace('_', '-')} must not be negative")
    if args.overlong_penalty > args.max_new_tokens:
        p.error("--overlong-penalty is at most --max-new-tokens: more would punish every answer")
    if args.loss == "cispo" and args.clip_low is not None:
        p.error("--clip-low: --loss cispo clips its weight from above only")
    if args.kl == "reward" and not args.beta:
        p.error("--kl reward without a KL: set --beta above 0")
    if args.calibrate_length and not any(Path(spec).is_dir() for spec in args.reward + args.watch):
        p.error("--calibrate-length needs a reward-model directory among --reward and --watch")
    finite = [w for w in args.reward_weights if math.isfinite(w)]
    if args.reward_weights and not len(args.reward_weights) == len(finite) == len(args.reward):
        p.error(f"--reward-weights needs {len(args.reward)} numbers, one per --reward")
    if args.dual_clip and (args.loss not in ("grpo", "dapo", "dr-grpo") or args.dual_clip <= 1):
        p.error("--dual-clip is above 1 and goes with --loss grpo, dapo or dr-grpo")
    if args.loss == "rloo" and args.advantage not in (None, "none"):
        p.error("--loss rloo has its own baseline (3) and no scale: drop --advantage")
    if args.ref_model and not args.beta:
        p.error("--ref-model without a KL: set --beta above 0")
    args.advantage = args.advantage or ("none" if args.loss in ("dr-grpo", "rloo") else "group-std")
    args.clip_low = CLIP[args.loss][0] if args.clip_low is None else args.clip_low
    args.clip_high = CLIP[args.loss][1] if args.clip_high is None else args.clip_high
    args.reward_weights = args.reward_weights or [1.0] * len(args.reward)
    return args


# --- the algorithm: pure functions ------------------------------------------------------------------------------------
# Shapes: P prompts, G answers each; in a micro-batch K answers with T tokens, owner (T,) says whose a token is.
# A loss: logp, old (T,) log-probs now and when sampled, A (K,) advantages → (T,) losses, to be weighted by weights(), and
# (T,) booleans: whose gradient the clip took.

def sum_by_owner(values, owner, count):
    """(T,) → (K,) sum over each answer's tokens."""
    return torch.zeros(count, device=values.device).index_add(0, owner, values)


def clipped(log_ratio, A, args):
    """−min( ρ A, clip(ρ) A ), and for A < 0 with --dual-clip C no less than C·A inside; where it is cut.  (6)"""
    ratio = log_ratio.clamp(-20, 20).exp()                   # e^20 is large enough; e^100 is infinite
    objective = torch.minimum(ratio * A, ratio.clamp(1 - args.clip_low, 1 + args.clip_high) * A)
    cut = (A > 0) & (ratio > 1 + args.clip_high) | (A < 0) & (ratio < 1 - args.clip_low)
    if args.dual_clip:
        objective = torch.where(A < 0, torch.maximum(objective, args.dual_clip * A), objective)
        cut |= (A < 0) & (ratio > args.dual_clip)
    return -objective, cut


def grpo(logp, old, A, owner, args):
    """ratio per token, 1/|o| per answer, mean over answers (Shao et al. 2024, eq. 3)"""
    return clipped(logp - old, A[owner], args)


def dapo(logp, old, A, owner, args):
    """as grpo, but mean over all tokens of the step, higher upper clip (Yu et al. 2025, eq. 8)"""
    return clipped(logp - old, A[owner], args)


def dr_grpo(logp, old, A, owner, args):
    """as grpo, but divided by the constant --max-new-tokens, advantage without std (Liu et al. 2025)"""
    return clipped(logp - old, A[owner], args)


def gspo(logp, old, A, owner, args):
    """one ratio per answer, exp of the mean log-ratio, clipped per answer (Zheng et al. 2025, eq. 5)"""
    n = sum_by_owner(torch.ones_like(logp), owner, len(A)).clamp(min=1)                              # (K,)
    return clipped((sum_by_owner(logp - old, owner, len(A)) / n)[owner], A[owner], args)             # (7)


def cispo(logp, old, A, owner, args):
    """clips the weight, not the token: sg[min(ρ, 1 + ε_high)] A log π, token mean (MiniMax 2025, eq. 4)"""
    ratio = (logp - old).clamp(-20, 20).exp().detach()
    cut = (ratio > 1 + args.clip_high) & (A[owner] != 0)
    return -ratio.clamp(max=1 + args.clip_high) * A[owner] * logp, cut                               # (8)


def rloo(logp, old, A, owner, args):
    """leave-one-out baseline (3), the whole answer's ratio (Ahmadian et al. 2024)"""
    n = sum_by_owner(torch.ones_like(logp), owner, len(A)).clamp(min=1)                              # (K,)
    losses, cut = clipped(sum_by_owner(logp - old, owner, len(A))[owner], A[owner], args)
    return losses / n[owner], cut                            # n tokens hold their answer's loss


LOSSES = {"grpo": grpo, "dapo": dapo, "dr-grpo": dr_grpo, "gspo": gspo, "cispo": cispo, "rloo": rloo}
CLIP = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "dr-grpo": (0.2, 0.2),                              # (ε_low, ε_high)
        "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0), "rloo": (0.2, 0.2)}


def weights(lengths, loss, max_new_tokens):
    """Weight of each token of every answer of a whole step, so that a sum over micro-batches is the loss: (N,) → (N,).

    lengths: tokens of each answer, 0 for those that do not count (masked or without a reward) nor stand in a denominator.
    """
    n = torch.tensor(lengths, dtype=torch.float32)
    answers, tokens = max(1, int((n > 0).sum())), max(1.0, n.sum().item())
    if loss in ("dapo", "cispo"):
        w = torch.full_like(n, 1 / tokens)
    elif loss == "dr-grpo":
        w = torch.full_like(n, 1 / (answers * max_new_tokens))
    elif loss == "rloo":
        w = torch.full_like(n, 1 / answers)
    else:                                                    # gspo gives every token its answer's loss: 1/n sums to one
        w = 1 / (n.clamp(min=1) * answers)
    return torch.where(n > 0, w, 0)


def kl_term(kind, logp, old, ref):
    """Per-token KL estimate that is added to the loss, with what it descends: (T,). See (9)."""
    if kind == "k2":
        return (ref - logp).square() / 2                     # ∇ KL(π ‖ π_ref)
    d = (ref - logp).clamp(max=20)                           # not from below: far above the reference is where it must pull
    k3 = d.exp() - 1 - d                                     # ∇ KL(π_ref ‖ π)
    return k3 if kind == "k3" else (logp - old).clamp(-20, 20).exp() * k3                # · ρ: ∇ KL(π ‖ π_ref)


def advantages(rewards, scale, loss="grpo"):
    """(P, G) rewards, NaN where an answer has none → (P, G) advantages, 0 there.  (3), (5)

    std with G − 1 and + 1e-4; in float64, for eight rewards of 0.1 have a standard deviation of 8e-9 in float32.
    """
    r = rewards.double()
    valid = ~r.isnan()
    n = valid.sum(1, keepdim=True)
    mean = r.nansum(1, keepdim=True) / n.clamp(min=1)
    centred = torch.where(valid, r - mean, 0)
    if loss == "rloo":
        return torch.where(n > 1, centred * n / (n - 1).clamp(min=1), 0).float()                     # (3)
    if scale == "group-std":
        centred = centred / ((centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt() + 1e-4)
    elif scale == "batch-std":
        every = r[valid]
        centred = centred / ((every.std() if len(every) > 1 else torch.tensor(0.0)) + 1e-4)
    return torch.where(n > 1, centred, 0).float()


def overlong_penalty(length, limit, cache):
    """Soft over-long punishment (Yu et al. 2025, eq. 13): 0 up to limit − cache tokens, then linear to −1 at the limit."""
    return max(-1.0, min(0.0, (limit - cache - length) / cache)) if cache else 0.0


@dataclass
class Micro:
    """A micro-batch of a step's answers and the log-probs that were taken before the update."""
    groups: list
    index: list                                              # (K,) which of the step's N answers, in the groups' order
    old: torch.Tensor | None = None                          # (T,) of π_old; None: the only update takes its own
    ref: torch.Tensor | None = None                          # (T,) of π_ref


def micro_loss(logp, owner, micro, A, w, args):
    """(T,) log-probs of a micro-batch → (its part of the loss, Counter of metric sums). A, w (N,): advantages, weights.

    The weights hold every denominator of the step, so how it is cut into micro-batches does not change its gradient.
    """
    A, w = A[micro.index], w[micro.index]                                                            # (K,)
    keep = w[owner] > 0                      # not multiplied by 0: a token that does not count must not bring its NaN along
    old = logp.detach() if micro.old is None else micro.old                                          # on policy ρ is exactly 1
    logp, old, owner = logp[keep], old[keep], owner[keep]                                            # (T,) of those that count
    losses, cut = LOSSES[args.loss](logp, old, A, owner, args)                                       # (T,), (T,)
    if args.beta:
        ref = micro.ref[keep]
    if args.beta and args.kl != "reward":
        losses = losses + args.beta * kl_term(args.kl, logp, old, ref)
    loss = (losses * w[owner]).sum()
    with torch.no_grad():
        sums = {"loss": loss, "clip_ratio": cut.sum()}
        sums |= {"kl": kl_term("k3", old, old, ref).sum()} if args.beta else {}
    return loss, Counter({k: v.item() for k, v in sums.items()} | {"tokens": len(logp)})


def pass_at_k(n, right, k):
    """Unbiased P(at least one of k is right), from n answers of which `right` are (Chen et al. 2021, eq. 1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def combine(by_reward, reward_weights, how):
    """R lists of N numbers or None → N weighted sums (or minima) over those that are there, None where none is."""
    result = []
    for row in zip(*by_reward):
        there = [w * r for w, r in zip(reward_weights, row) if r is not None]
        result.append({"sum": sum, "min": min}[how](there) if there else None)
    return result


# --- rewards ----------------------------------------------------------------------------------------------------------

def load_rewards(specs, args, device, flag="--reward or --watch"):
    """Names → functions f(groups, texts, ids, ended) → numbers or None, one per answer; texts: what the policy wrote."""
    rewards, modules = {}, {}
    for spec in specs:
        file, _, function = spec.rpartition(":")
        if Path(spec).is_dir():
            name, f = Path(spec).name, model_reward(spec, args, device, flag)
        elif file.endswith(".py") and Path(file).is_file():
            if file not in modules:                          # as python runs it: known by name, its folder importable
                module_spec = importlib.util.spec_from_file_location(f"reward_{len(modules)}", file)
                modules[file] = sys.modules[module_spec.name] = importlib.util.module_from_spec(module_spec)
                sys.path.append(str(Path(file).parent))
                module_spec.loader.exec_module(modules[file])
            if not callable(getattr(modules[file], function, None)):
                fail(f"{flag} {spec}: {file} has no function '{function}'.")
            name, f = function, function_reward(getattr(modules[file], function), spec, flag)
        else:
            fail(f"{flag} {spec}: neither file.py:function nor a reward-model directory.")
        rewards[name if name not in rewards else f"{name}_{len(rewards)}"] = f
    return rewards


def function_reward(function, spec, flag):
    """A user's f(prompts, completions, **columns) → list; in a chat a completion is [{"role": "assistant", "content": …}]."""
    def reward(groups, texts, ids, ended=None):
        names = dict.fromkeys(k for g in groups for k in g.row)          # of all rows: some may lack a column
        taken = ("prompt", "prompts", "completions", "completion_ids")
        columns = {k: [g.row.get(k) for g in groups] for k in names if k not in taken}
        said = [t if isinstance(g.prompt, str) else [{"role": "assistant", "content": t}] for g, t in zip(groups, texts)]
        given = {"prompts": [g.prompt for g in groups], "completions": said, "completion_ids": ids, **columns}
        try:
            inspect.signature(function).bind(**given)
        except TypeError as error:
            fail(f"{flag} {spec}: {error}; the data has the columns {', '.join(columns) or 'prompt only'}, "
                 "and f(prompts, completions, **columns) takes any.")
        values = function(**given)
        values = values.tolist() if hasattr(values, "tolist") else values    # a tensor or an array
        if not isinstance(values, (list, tuple)) or len(values) != len(texts):
            count = len(values) if hasattr(values, "__len__") else repr(values)
            fail(f"{flag} {spec}: it returned {count} values for {len(texts)} answers.")
        for value, text in zip(values, texts):
            if value is not None and not (isinstance(value, SupportsFloat) and math.isfinite(value)):
                fail(f"{flag} {spec}: its reward is {value!r} for the answer {text[:60]!r}, no finite number nor None.")
        return [None if v is None else float(v) for v in values]
    return reward


def model_reward(path, args, device, flag):
    """A reward model with its own tokeniser and template, z-scored by its stored statistics. As in its training and in
    score.py an answer has an end token where it ended, and none where it was cut."""
    encoder = load_encoder(path, chat=args.chat, flag=flag)
    model = load_reward_model(path, encoder, device, flag)
    if not hasattr(model.config, "reward_mean"):
        print(f"note: {path} stores no statistics of its scores (train_rm.py does), so they are not z-scored")
    mean, std, packed = getattr(model.config, "reward_mean", 0.0), getattr(model.config, "reward_std", 1.0) or 1.0, []
    curve = getattr(model.config, "reward_by_length", None)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    if args.calibrate_length and not curve:
        fail(f"--calibrate-length: {path} stores no length curve; train it with train_rm.py.")

    @torch.no_grad()
    def reward(groups, texts, ids, ended=None):
        made = [encoder(Group(g.where, g.prompt, [t])) for g, t in zip(groups, texts)]
        for g, whole in zip(made, ended or [True] * len(made)):
            if not whole and len(g.completion_ids[0]) > 1:
                g.completion_ids[0].pop()
        if (longest := max(map(Group.tokens, made))) > encoder.max_positions:
            fail(f"{flag} {path}: a prompt and its answer are {longest} of its tokens, and it has {encoder.max_positions} "
                 "positions; lower --max-length or --max-new-tokens.")
        if not packed:
            packed.append(can_pack(model, made, reward_scores))
        scores = {}
        for micro in micro_batches(made, args.micro_batch_tokens, packed[0]):
            with autocast:
                values = reward_scores(model, lay_out(model, micro, packed[0])).tolist()
            scores |= {id(g): v for g, v in zip(micro, values)}
        values = [scores[id(g)] for g in made]
        if args.calibrate_length:
            values = calibrate(values, [len(g.completion_ids[0]) for g in made], curve, mean).tolist()
        for value, text in zip(values, texts):
            if not math.isfinite(value):
                fail(f"{flag} {path}: its score is not finite ({value}) for the answer {text[:60]!r}.")
        return [(v - mean) / std for v in values]
    return reward


# --- rollout ----------------------------------------------------------------------------------------------------------

def draw_seed(*parts):
    """A seed made of run seed, purpose and step: nothing random is carried from step to step, so resume is exact."""
    return int(hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:15], 16)


def rollout(policy, encoder, prompts, rewards, watch, args, autocast, n, seed, spent, progress=None):
    """Sample n answers for each prompt and reward them → one dict a prompt: group, and lists of n: ids, logps, ended,
    texts, reward, by_reward. spent: Counter of the seconds that went to "sample" and to "reward".
    """
    began = time.perf_counter()
    with autocast:
        answers = sample(policy, [g.prompt_ids for g in prompts], n, args.max_new_tokens, encoder.stops, args.temperature, args.top_p,
                         seed=seed, progress=progress)
    sampled = time.perf_counter()
    groups = [g for g in prompts for _ in range(n)]          # p1 p1 p1 p2 p2 p2: each answer beside its own row's columns
    flat = [a for group in answers for a in group]
    texts = [encoder.decode(a.ids) for a in flat]
    ids, ended = [a.ids for a in flat], [a.ended for a in flat]
    values = {name: f(groups, texts, ids, ended) for name, f in {**rewards, **watch}.items()}
    total = combine([values[name] for name in rewards], args.reward_weights, args.reward_aggregate)
    spent.update({"sample": sampled - began, "reward": time.perf_counter() - sampled})
    cut = lambda xs, i: xs[i * n:(i + 1) * n]  # noqa: E731
    return [{"group": g, "ids": [a.ids for a in answers[i]], "logps": [sum(a.logps) for a in answers[i]],
             "ended": [a.ended for a in answers[i]], "texts": cut(texts, i),
             "reward": cut(total, i), "by_reward": {k: cut(v, i) for k, v in values.items()}}
            for i, g in enumerate(prompts)]


def alike(roll):
    """No two rewards of the group differ: no gradient. On the raw reward, before length shaping (as in DAPO)."""
    return len({r for r in roll["reward"] if r is not None}) < 2


def fill(rolls, sample_more, train, asked, args, step):
    """Dynamic sampling: replace groups of no variance by groups for other prompts of `train`, in at most 4 rounds.

    asked: numbers of the prompts that the step began with. Returns (the groups to learn from, all that were sampled).
    """
    kept, every = [r for r in rolls if not alike(r)], list(rolls)
    left = [i for i in range(len(train)) if i not in set(asked)]
    for round_ in range(1, 5):
        count = min(len(left), len(rolls) - len(kept))
        if not count:
            break
        more = random.Random(f"{args.seed} {step} {round_}").sample(left, count)
        left = [i for i in left if i not in set(more)]
        every += sample_more([train[i] for i in more], draw_seed(args.seed, "train", step, round_))
        kept += [r for r in every[-count:] if not alike(r)]
    return kept, every


def forward(model, groups, packed, args):
    """Log-probs of all completion tokens of a micro-batch at --temperature, and whose they are: (T,), (T,)."""
    batch = lay_out(model, groups, packed)
    logp = token_logps(model, batch, args.temperature)
    return logp, batch.owner.to(logp.device)


def minibatches(rolls, wanted, args, packed):
    """A step's N answers → --minibatches parts, each (numbers of its answers, its Micros). Cut once for every pass.

    wanted (N,): False where an answer gives no gradient: nothing is computed for it, but it is in the denominators.
    A group over the budget is split: the loss is a sum over answers, so it may be. Where nothing is packed, and so no
    prompt is shared, every answer stands alone.
    """
    plan, count = [], min(args.minibatches, len(rolls))
    for first in range(count):
        numbers, pieces = [], []
        for r in range(first, len(rolls), count):
            piece, prompt = None, rolls[r]["group"]
            for i, ids in enumerate(rolls[r]["ids"], r * len(rolls[r]["ids"])):
                numbers.append(i)
                if wanted[i] and (piece is None or not packed or piece.tokens() + len(ids) > args.micro_batch_tokens):
                    piece = Group(prompt.where, prompt.prompt, [], {"index": []}, prompt.prompt_ids)
                    pieces.append(piece)
                if wanted[i]:
                    piece.completion_ids.append(ids)
                    piece.row["index"].append(i)
        micros = micro_batches(pieces, args.micro_batch_tokens, packed)
        plan.append((numbers, [Micro(groups, [i for g in groups for i in g.row["index"]]) for groups in micros]))
    return plan


def describe(rolls, names):
    """What the log says of a step's samples: rewards, lengths, repetition. names: of all rewards, watched ones too."""
    lengths, ended = [len(ids) for r in rolls for ids in r["ids"]], [e for r in rolls for e in r["ended"]]
    repeated = [1 - len(set(map(tuple, r["ids"]))) / len(r["ids"]) for r in rolls]
    result = {"frac_reward_zero_std": statistics.mean(alike(r) for r in rolls), "completions/sampled_groups": len(rolls),
              "entropy": -sum(x for r in rolls for x in r["logps"]) / sum(lengths),
              "completions/mean_length": statistics.mean(lengths), "completions/identical": statistics.mean(repeated),
              "completions/clipped_ratio": 1 - sum(ended) / len(ended)}
    groups = [[x for x in r["reward"] if x is not None] for r in rolls]
    if any(groups):
        result |= {"reward": statistics.mean(x for group in groups for x in group),
                   "reward_std": statistics.mean(statistics.stdev(g) if len(g) > 1 else 0.0 for g in groups)}
    for name in names:
        values = [v for r in rolls for v in r["by_reward"][name] if v is not None]
        result[f"rewards/{name}/count"] = len(values)
        if values:
            result[f"rewards/{name}/mean"] = statistics.mean(values)
    return result


# --- evaluation -------------------------------------------------------------------------------------------------------

def evaluate(policy, encoder, groups, rewards, watch, args, autocast):
    """Fresh samples for held-out prompts: mean reward, pass@1 with its error over prompts, pass@k, mean length.

    A sample passes where the first --reward is above 0.5: exact for rewards of 0 and 1, a threshold for others.
    """
    asked = groups[:args.eval_samples]
    rolls = rollout(policy, encoder, asked, rewards, watch, args, autocast, args.eval_k, draw_seed(args.seed, "eval"),
                    Counter(), "evaluate")
    every = [r for roll in rolls for r in roll["reward"] if r is not None]
    if not every:
        fail(f"--reward: not one of {len(asked) * args.eval_k} answers to held-out prompts got a reward.")
    first = next(iter(rewards))
    # An answer without a reward is neither right nor wrong.
    rewarded = [[r > 0.5 for r in roll["by_reward"][first] if r is not None] for roll in rolls]
    result = {"eval/n": len(asked), "eval/mean_length": statistics.mean(len(ids) for roll in rolls for ids in roll["ids"]),
              "eval/clipped_ratio": statistics.mean(not e for roll in rolls for e in roll["ended"])}
    for k in sorted({2 ** i for i in range(args.eval_k.bit_length())} | {args.eval_k}):      # 1, 2, 4, …, --eval-k
        if estimates := [pass_at_k(len(x), sum(x), k) for x in rewarded if len(x) >= k]:
            result[f"eval/pass@{k}"] = statistics.mean(estimates)
            spread = statistics.stdev(estimates) if len(estimates) > 1 else 0.0
            result[f"eval/pass@{k}_se"] = spread / math.sqrt(len(estimates))
    if every:
        result["eval/reward"] = statistics.mean(every)
    for name in {**rewards, **watch}:
        values = [v for roll in rolls for v in roll["by_reward"][name] if v is not None]
        if values:
            result[f"eval/rewards/{name}/mean"] = statistics.mean(values)
    return result


def eval_line(step, result, args):
    line = f"step {step}: eval reward {result.get('eval/reward', math.nan):.3f}"
    for k in (1, args.eval_k):
        if f"eval/pass@{k}" in result:
            line += f", pass@{k} {100 * result[f'eval/pass@{k}']:.1f} ± {100 * result[f'eval/pass@{k}_se']:.1f} %"
    line += f" of {result['eval/n']} prompts, mean length {result['eval/mean_length']:.1f}"
    extra = {k.split("/")[2]: v for k, v in result.items() if k.startswith("eval/rewards/")}
    return line + (", " + ", ".join(f"{k} {v:.3f}" for k, v in extra.items()) if len(extra) > 1 else "")


# --- the run directory ------------------------------------------------------------------------------------------------
# --- shared: run directory ---

def lr_at(step, steps, args):
    """Learning rate of update `step` (from 0): linear warm-up, then the schedule, which would be 0 at `steps`."""
    warmup = args.warmup_steps if args.warmup_steps >= 0 else steps // 10
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)          # 0 … 1
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return args.learning_rate * decay[args.lr_schedule]


def save_checkpoint(folder, model, optimizer, step):
    """Weights and AdamW state after `step` updates, as safetensors in folder/step-N. Written beside, then renamed: one
    rename is atomic, so a kill at any moment leaves the old checkpoint or the new one whole. No random state is kept,
    since every random draw is a function of the seed and the step."""
    writing = folder / "writing"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, writing / "weights.safetensors")
    moments = {f"{i}.{k}": v.contiguous() for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    save_file(moments, writing / "optimizer.safetensors")
    final = folder / f"step-{step}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(writing, final)
    for old in folder.glob("step-*"):
        if old != final:
            shutil.rmtree(old)


def load_checkpoint(folder, model, optimizer):
    """Restores model and optimizer from the newest checkpoint in folder and returns its number of updates."""
    newest = max(folder.glob("step-*"), key=lambda f: int(f.name[5:]))
    try:
        weights, moments = load_file(newest / "weights.safetensors"), load_file(newest / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        fail(f"--resume: the checkpoint {newest} cannot be read ({error}).")
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(weights[n])
    state = {}
    for key, value in moments.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(newest.name[5:])


def open_run(args, groups, steps):
    """Makes the run directory → (folder, updates already done, whether the model was evaluated at that point).

    --resume: the flags that shape the result and the tokens of all groups must be those of the start. A new run moves
    what an earlier one left to old/ (one generation): nothing of it can pass for the new one's.
    """
    out = Path(args.output_dir)
    free = {"resume", "output_dir", "max_steps", "epochs", "eval_every", "eval_samples", "save_every",
            "micro_batch_tokens", "device"}
    done = max((int(f.name[5:]) for f in out.glob("checkpoint/step-*")), default=None)
    data = hashlib.sha256(json.dumps([(g.prompt_ids, g.completion_ids) for g in groups]).encode()).hexdigest()
    if args.resume:
        if done is None:
            fail(f"--resume: there is no checkpoint in {out / 'checkpoint'}.")
        if done > steps:
            fail(f"--resume: the checkpoint is after step {done}, but --max-steps and --epochs end this run at {steps}.")
        try:
            before = json.loads((out / "args.json").read_text())
            lines = (out / "metrics.jsonl").read_text().split("\n")[:-1]          # the last one may be half written
            # What came after the checkpoint will be done again.
            lines = [line for line in map(json.loads, lines) if line["step"] <= done]
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"--resume: args.json or metrics.jsonl in {out} cannot be read ({error}).")
        for key, value in vars(args).items():
            if key not in free and before.get(key) != value:
                fail(f"--resume: this run began with --{key.replace('_', '-')} {before.get(key)}, not {value}.")
        if before.get("data_sha256") != data:
            fail("--resume: the rows of --dataset or --eval-dataset, or their tokens, are not those of this run's start.")
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return out, done, any(line["step"] == done and "eval/n" in line for line in lines)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "args.json").exists():
            shutil.rmtree(out / "old", ignore_errors=True)
            (out / "old").mkdir()
            # What runs write, by name: a file of somebody else's stays.
            names = ("args.json metrics.jsonl completions.jsonl checkpoint config.json generation_config.json model*.safetensors* "
                     "tokenizer* chat_template* special_tokens_map.json added_tokens.json vocab.* merges.txt").split()
            for file in {f for name in names for f in out.glob(name)}:
                os.replace(file, out / "old" / file.name)
            print(f"{out}: an earlier run was here; it is kept in {out / 'old'}")
        (out / "metrics.jsonl").write_text("")
        (out / "args.json").write_text(json.dumps(vars(args) | {"data_sha256": data}, indent=1) + "\n")
    except OSError as error:
        fail(f"--output-dir {out}: cannot be written ({error}).")
    return out, 0, False


def save_model(out, model, tokenizer):
    """A plain Hugging Face checkpoint in `out`, each file renamed into place whole."""
    writing = out / "writing"
    shutil.rmtree(writing, ignore_errors=True)
    model.save_pretrained(writing)
    tokenizer.save_pretrained(writing)
    for file in sorted(writing.iterdir()):
        os.replace(file, out / file.name)
    writing.rmdir()


def log(out, step, values):
    with open(out / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"step": step, **values}) + "\n")


def catch_signals():
    """Ctrl-C and SIGTERM end the run after the step under way, with a checkpoint; a second Ctrl-C ends it at once."""
    caught = []

    def on_signal(number, frame):
        caught.append(number)
        tqdm.write("stopping after this step, with a checkpoint (again: at once)")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number_ in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number_, on_signal)
    return caught


# --- end shared ---

# --- main -------------------------------------------------------------------------------------------------------------

def load_data(source, args, encoder, what):
    """Rows → tokenised prompts; prints what was kept and dropped, and one example."""
    groups, report = read_groups(source, ("prompt",), args.split, args.columns, args.limit, args.prefer)
    if args.max_length > encoder.max_positions:
        print(f"--max-length {args.max_length} is lowered to {encoder.max_positions}, the positions that the model has")
        args.max_length = encoder.max_positions
    if args.max_length <= args.max_new_tokens:
        fail(f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt within --max-length {args.max_length}.")
    room = args.max_length - args.max_new_tokens + 1         # + 1: tokenise() keeps a prompt that leaves room for one token
    groups = tokenise(groups, report, encoder, room, args.overlong, f"tokenise {what}")
    print(f"{what}: {account(source, report, encoder)}")
    if not groups:
        fail(f"{source}: no rows are left; the line above says why.")
    print(encoder.show(groups[0]))
    if encoder.tokenizer.chat_template and isinstance(groups[0].prompt, str) and not args.chat:
        print("  the tokeniser has a chat template, but these prompts stay plain text (--chat makes them user turns)")
    return groups


def trial(train, args):
    """Groups for can_pack before anything is sampled: three short ones, and one as long as groups can get in training."""
    longest = max(train, key=lambda g: len(g.prompt_ids))
    room = min(args.group_size * args.max_new_tokens, args.max_length - len(longest.prompt_ids), 2048)
    short = [Group(g.where, g.prompt, [], {}, g.prompt_ids, [g.prompt_ids[-9:], g.prompt_ids[-5:]]) for g in train[:3]]
    filler = (longest.prompt_ids * room)[:room]
    return short + [Group(longest.where, longest.prompt, [], {}, longest.prompt_ids, [filler, filler])]


def main(argv=None):
    args = parse_args(argv)
    # --- setup
    device = pick_device(args.device)
    args.dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    encoder = load_encoder(args.model, args.chat_template, args.chat)
    if args.ref_model:
        ref_tokenizer = load_encoder(args.ref_model, flag="--ref-model").tokenizer
        if ref_tokenizer.get_vocab() != encoder.tokenizer.get_vocab():
            fail(f"--ref-model {args.ref_model}: its tokeniser differs from --model's: log-probs cannot be compared.")
    train = load_data(args.dataset, args, encoder, "train")
    if args.eval_dataset:
        held_out = load_data(args.eval_dataset, args, encoder, "eval")
        if both := {str(g.prompt) for g in train} & {str(g.prompt) for g in held_out}:
            print(f"  {len(both)} prompts of --eval-dataset are also trained on")
    else:
        train, held_out = split_by_prompt(train, args.eval_fraction, args.seed)
    every = list(load_rewards(args.reward + args.watch, args, device).items())       # one table: no two have one name
    rewards, watch = dict(every[:len(args.reward)]), dict(every[len(args.reward):])
    steps = plan_steps(len(train), args.batch_size, args.epochs, args.max_steps, args.seed)
    out, start, evaluated = open_run(args, train + held_out, len(steps))
    due = lambda step: step in (0, len(steps)) or args.eval_every and step % args.eval_every == 0  # noqa: E731

    policy = load_model(args.model, encoder, device)
    packed = can_pack(policy, trial(train, args))
    reference = None
    if args.beta:
        reference = load_model(args.ref_model or args.model, encoder, device, "--ref-model").requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=args.weight_decay, fused=device.type != "mps")
    if start:
        start = load_checkpoint(out / "checkpoint", policy, optimizer)
    size = sum(p.numel() for p in policy.parameters())
    print(f"{size / 1e6:.2f} M parameters on {device} in {args.dtype}; "
          f"{len(train):,} prompts to train on, {len(held_out):,} held out; "
          f"{len(steps):,} steps of {args.batch_size} prompts × {args.group_size} answers; "
          f"rewards: {', '.join(rewards)}" + (f"; watched: {', '.join(watch)}" if watch else ""))
    if args.top_p < 1:
        print("note: with --top-p below 1 samples are not the policy's own; the ratio stays that of the full softmax")
    if size > 1e8 and args.learning_rate >= 1e-4:
        print(f"note: --learning-rate {args.learning_rate:g} suits the toy; for this size 5e-7 to 5e-6 is usual")
    if held_out and args.eval_samples and due(start) and not evaluated:
        log(out, start, result := evaluate(policy, encoder, held_out, rewards, watch, args, autocast))
        print(eval_line(start, result, args))

    # --- loop
    stopped, recent = catch_signals(), []                    # recent: what completions.jsonl holds
    if start and (out / "completions.jsonl").is_file():
        lines = (out / "completions.jsonl").read_text().splitlines()
        recent = [line for line in map(json.loads, lines) if line["step"] <= start]
    bar = tqdm(range(start, len(steps)), initial=start, total=len(steps), desc=args.loss, unit="step", disable=None)
    for step in bar:
        # sample
        spent = Counter()                                    # seconds
        more = lambda prompts, seed: rollout(policy, encoder, prompts, rewards, watch, args, autocast,  # noqa: E731
                                             args.group_size, seed, spent)
        rolls = every = more([train[i] for i in steps[step]], draw_seed(args.seed, "train", step, 0))
        if args.dynamic_sampling:
            rolls, every = fill(rolls, more, train, steps[step], args, step)
        metrics, began = describe(every, [*rewards, *watch]), time.perf_counter()
        if rolls:                                            # dynamic sampling may have found no group to learn from
            # advantages
            ended = [e for roll in rolls for e in roll["ended"]]                                     # (N,)
            lengths = [len(ids) for roll in rolls for ids in roll["ids"]]                            # (N,)
            raw = [math.nan if x is None else x for roll in rolls for x in roll["reward"]]           # (N,)
            penalty = [overlong_penalty(n, args.max_new_tokens, args.overlong_penalty) for n in lengths]
            r = torch.tensor(raw, dtype=torch.float64) + torch.tensor(penalty, dtype=torch.float64)  # (N,)
            A = advantages(r.view(len(rolls), -1), args.advantage, args.loss).flatten()              # (N,)
            counts = [0 if x.isnan() or args.mask_truncated and not e else n for x, n, e in zip(r, lengths, ended)]
            # log-probs before the update
            in_reward, k1 = args.kl == "reward", 0 * r       # (N,) Σ_t k1 of each answer; NaN where r is
            wanted = [in_reward or n > 0 and (a != 0 or args.beta > 0) for n, a in zip(counts, A.tolist())]
            plan = minibatches(rolls, wanted, args, packed)
            with torch.no_grad(), autocast:
                for micro in (micro for _, micros in plan for micro in micros):
                    if reference is not None:
                        micro.ref, owner = forward(reference, micro.groups, packed, args)
                    if in_reward or len(plan) * args.updates_per_batch > 1:
                        micro.old, owner = forward(policy, micro.groups, packed, args)
                    if in_reward:
                        k1[micro.index] += sum_by_owner(micro.old - micro.ref, owner, len(micro.index)).double().cpu()
            if in_reward:                                    # (10)
                A = A - args.beta * advantages(k1.view(len(rolls), -1), "none", args.loss).flatten()
            A = A.to(device)
            # update
            sums, norms = Counter(), []
            for numbers, micros in plan * args.updates_per_batch:
                w = torch.zeros(len(A))
                w[numbers] = weights([counts[i] for i in numbers], args.loss, args.max_new_tokens)
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(step, len(steps), args)
                optimizer.zero_grad(set_to_none=True)
                for micro in micros:
                    with autocast:
                        logp, owner = forward(policy, micro.groups, packed, args)                    # (T,), (T,)
                    loss, micro_sums = micro_loss(logp, owner, micro, A, w.to(device), args)
                    loss.backward()
                    sums.update(micro_sums)
                norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm or math.inf).item())
                if not math.isfinite(norms[-1]):
                    fail(f"step {step + 1}: the gradient is not finite; try a lower --learning-rate.")
                optimizer.step()
            spent["update"] = time.perf_counter() - began
            computed = sum(g.tokens() for _, micros in plan for micro in micros for g in micro.groups)
            metrics |= {"loss": sums["loss"] / len(norms), "grad_norm": statistics.mean(norms),
                        "learning_rate": lr_at(step, len(steps), args),
                        "tokens_per_second": args.updates_per_batch * computed / spent["update"]}
            metrics |= {k: sums[k] / max(1, sums["tokens"]) for k in ("clip_ratio", "kl") if k in sums}
            recent = [line for line in recent if line["step"] > step - 7]                            # the last 8 steps
            recent += [{"step": step + 1, "prompt": roll["group"].prompt, "completions": roll["texts"], "rewards": roll["reward"],
                        "advantages": a} for roll, a in zip(rolls, A.view(len(rolls), -1).tolist())]
            (out / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in recent))
        else:
            tqdm.write(f"step {step + 1}: in all {len(every)} groups the rewards are alike; no update")
        sampled = sum(len(ids) for roll in every for ids in roll["ids"])
        metrics |= {"sample_tokens_per_second": sampled / spent["sample"], **{f"seconds/{k}": v for k, v in spent.items()}}
        log(out, step + 1, metrics)
        shown = {"reward": "reward", "kl": "kl", "len": "completions/mean_length", "cut": "completions/clipped_ratio",
                 "same": "completions/identical", "flat": "frac_reward_zero_std"}
        bar.set_postfix({k: f"{metrics[v]:.4g}" for k, v in shown.items() if v in metrics}, refresh=False)
        last = step + 1 == len(steps)
        if last or stopped or args.save_every and (step + 1) % args.save_every == 0:
            save_checkpoint(out / "checkpoint", policy, optimizer, step + 1)
        if held_out and args.eval_samples and due(step + 1):
            log(out, step + 1, result := evaluate(policy, encoder, held_out, rewards, watch, args, autocast))
            tqdm.write(eval_line(step + 1, result, args))
        if stopped and not last:
            bar.close()
            print(f"stopped after step {step + 1} of {len(steps)}; --resume goes on from there")
            raise SystemExit(130)

    # --- save
    for line in recent[-3:]:
        some = list(zip(line["completions"], line["advantages"]))[:4]
        print(f"  {str(line['prompt'])[-70:]!r} ▸ " + ", ".join(f"{t[:40]!r} {a:+.2f}" for t, a in some))
    save_model(out, policy, encoder.tokenizer)
    print(f"saved in {out}: model, args.json, metrics.jsonl, completions.jsonl, checkpoint/")


if __name__ == "__main__":
    main()
