"""Align a language model with preference pairs: direct preference optimisation (DPO), and SFT.

    python train_dpo.py                                  # 10 seconds on two CPU cores, no network
    python train_dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --lr 1e-6 \\
        --dataset trl-lib/ultrafeedback_binarized

With no flags it trains the toy of tests/toy (sums); the fraction of correct samples on sums that it
never saw goes from about 50 % to about 90 %. Before the first step the loss is 0.6931 = log 2,
whatever the model and the data.

Differs from the paper (Rafailov et al. 2023, arXiv 2305.18290) in: nothing that changes the loss.
AdamW instead of RMSprop, and the reference's log-probs are computed once. Variants are one function
and one row of LOSSES each; `--loss sft` is maximum likelihood on the chosen completions, which
makes π_ref where there is no SFT model yet.
"""
# --- derivation -----------------------------------------------------------------------------------
#
# Notation: x prompt, y completion, y_w chosen ("wins"), y_l rejected ("loses"), π the policy that
# is trained, π_ref the frozen model it starts from (the reference), σ(z) = 1 / (1 + e^−z),
# log π(y|x) = Σ_t log π(y_t | x, y_<t), end token included.
#
# 1. The goal. Completions with a high reward r(x, y), by a policy that stays near π_ref:
#
#        max_π  E_x E_{y~π} [ r(x, y) ] − β KL( π(·|x) ‖ π_ref(·|x) )                          (1)
#
#    β is the price of leaving π_ref: a large β keeps the policy close, a small β lets it go where
#    the reward is. It prices the KL and never bounds it.
#
# 2. Its optimum is known. For one prompt, write the objective as an expectation under π and
#    complete it to a KL:
#
#        E_{y~π} [ r − β log π/π_ref ] = −β KL( π ‖ π* ) + β log Z(x)                          (2)
#        π*(y|x) = π_ref(y|x) e^{r(x,y)/β} / Z(x),    Z(x) = Σ_y π_ref(y|x) e^{r(x,y)/β}       (3)
#
#    Z(x) does not depend on π and a KL is at least 0, so π* is the maximum.
#
# 3. Turn (3) round: every policy is optimal for some reward, namely
#
#        r(x, y) = β log( π*(y|x) / π_ref(y|x) ) + β log Z(x)                                  (4)
#
#    The log-ratio is the reward, up to a constant of the prompt. r̂(x, y) = β log π(y|x)/π_ref(y|x)
#    is the implicit reward of π: what rewards/chosen and rewards/rejected report.
#
# 4. What people compare. The Bradley–Terry model (an assumption: one utility, logistic noise)
#
#        p(y_w ≻ y_l | x) = σ( r(x, y_w) − r(x, y_l) )                                         (5)
#
#    Only the difference matters, so the log Z(x) of (4) cancels, and the likelihood of the data is
#    a function of π alone:
#
#        h = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x) = D_w − D_l                 (6)
#        L_DPO = −E log σ( β h )                                                               (7)
#
#    At the start π = π_ref, h = 0 and L = log 2 = 0.6931 for every pair. Another number is a bug:
#    the expected number is printed beside the measured one.
#    A label that is right only with probability p (label smoothing ε: p = 1 − ε, "cDPO"; a column
#    p_chosen: its own p):
#
#        L = −p log σ( β h ) − (1 − p) log σ( −β h ),    least at σ(βh) = p                    (8)
#
#    With p = 1 nothing stops h: for labels that are always the same, the optimum has h = ∞ for
#    every β (Azar et al. 2023, arXiv 2310.12036). With p < 1 h stops at a finite value.
#
# 5. The gradient, and what its two factors do:
#
#        ∇L_DPO = −β σ( −β h ) [ ∇ log π(y_w|x) − ∇ log π(y_l|x) ]                             (9)
#
#    The bracket raises the chosen and lowers the rejected completion. σ(−βh) is 1/2 at the start,
#    near 1 for pairs that are ranked the wrong way, near 0 for those that are settled.
#
# 6. Why both log-probs can fall. (7) sees only h: lowering y_l can go on for ever, and the mass may
#    go anywhere. Where y_w and y_l share most tokens, the push against y_l takes y_w with it (Pal
#    et al. 2024, arXiv 2402.13228; Razin et al. 2024, arXiv 2410.08847). eval/chosen_fell is the
#    fraction of prompts where it did. Where samples get worse, try a lower learning rate, a larger
#    β, or an anchor on the chosen completion, `--sft-coef α` (Pang et al. 2024, arXiv 2404.19733):
#
#        L = L_DPO − α log π(y_w|x) / |y_w|    |y_w| tokens, end included; mean over pairs    (10)
#
# 7. `--loss sft`: −log π(y_w|x), summed over a step, divided by its tokens; nats a token.     (11)
#
# 8. Fitting the policy to a reward model. A trained reward r says of any two completions of a
#    prompt p = σ( (r_1 − r_2)/T ). `--loss soft` is the cross-entropy (8) between this p and the
#    win rate σ(βh) that the policy implies, `--loss distill` the same by squares:
#
#        ∇L_soft = −β ( p − σ( βh ) ) [ ∇ log π(y_1|x) − ∇ log π(y_2|x) ]                     (12)
#        L_distill = ( βh − (r_1 − r_2)/T )²                                                  (13)
#
#    Both pull h to (r_1 − r_2)/(βT) from either side and stop there; with p = 1 (12) is (9).

# --- imports --------------------------------------------------------------------------------------
import argparse
import json
import math
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import FORMATS, between, compare, completion_logps, fail, for_all

TOY = Path(__file__).parent / "tests" / "toy"
NAME = Path(__file__).stem.removeprefix("train_")    # a copy of this file writes to runs/ITS NAME
SAVE_SECONDS = 600                                   # a checkpoint at least this often
TIE = 1e-3                       # nats that count as no change: the rounding of float32 sums


# --- arguments ------------------------------------------------------------------------------------
# Blocks between `shared` marks are the same text in other trainers.

def defaults(flag):
    """The losses that read a flag, with its default in each."""
    read = {name: row.flags[flag] for name, row in LOSSES.items() if flag in row.flags}
    return "default: " + ", ".join(f"{name} {value}" for name, value in read.items())


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
    g = p.add_argument_group("DPO")
    losses = [f"{name:14} {row.function.__doc__.splitlines()[0]}" for name, row in LOSSES.items()]
    g.add_argument("--loss", choices=LOSSES, metavar="NAME", default="dpo", help="\n".join(losses))
    g.add_argument("--ref-model", help="reference policy; default: --model as it is at the start")
    g.add_argument("--eval-samples", type=natural, default=256, help="held-out prompts sampled at each evaluation, up to twice the longest answer or 256 tokens")
    g = p.add_argument_group("read by some losses only; (n): equation n at the top of this file")
    positive = between(1e-6, 1e6)
    weight = between(0, 1e6)
    g.add_argument("--beta", type=positive, help="price of leaving the reference (1): larger stays closer; " + defaults("beta"))
    g.add_argument("--label-smoothing", type=between(0, 0.499), help="probability that a label is wrong (8); " + defaults("label_smoothing"))
    g.add_argument("--sft-coef", type=weight, help="weight of the chosen completion's mean NLL (10); " + defaults("sft_coef"))
    g.add_argument("--reward-temperature", type=positive, help="score_chosen and score_rejected are divided by it (12); " + defaults("reward_temperature"))
    g.add_argument("--gamma", type=weight, help="target margin; " + defaults("gamma"))
    g.add_argument("--ipo-normalise", choices=["sum", "mean"], help="log-ratios of completions or per token; " + defaults("ipo_normalise"))
    g.add_argument("--dpop-lambda", type=weight, help="price of a fallen chosen log-prob; " + defaults("dpop_lambda"))
    g.add_argument("--length-penalty", type=between(-1e6, 1e6), help="α, nats a token; " + defaults("length_penalty"))
    g.add_argument("--desirable-weight", type=weight, help="λ_D; " + defaults("desirable_weight"))
    g.add_argument("--undesirable-weight", type=weight, help="λ_U; " + defaults("undesirable_weight"))
    flags = LOSSES[p.parse_known_args(argv)[0].loss].flags
    p.set_defaults(**flags)
    args = p.parse_args(argv)

    # A flag that the loss does not read is refused: ignored, it would seem to have had its effect.
    for row in LOSSES.values():
        for flag in row.flags:
            if flag not in flags and getattr(args, flag) is not None:
                p.error(f"--loss {args.loss} does not read --{flag.replace('_', '-')}: drop it")
    return args


# --- the algorithm: pure functions ----------------------------------------------------------------
# Shapes: K completions, M pairs of them. Log-probs are summed over the completion's tokens, end
# included, in float32.

class Completions(NamedTuple):
    """What a loss sees of some groups: K completions, and M pairs "chosen ≻ rejected" of them."""
    policy: torch.Tensor      # (K,) log π(y|x)
    D: torch.Tensor           # (K,) log π(y|x)/π_ref(y|x); without a reference log π(y|x)
    label: torch.Tensor       # (K,) True where the completion itself is said to be good (kto)
    chosen: torch.Tensor      # (M,) index of the better completion of each pair
    rejected: torch.Tensor    # (M,) index of the worse one
    D_w: torch.Tensor         # (M,) D of the better one, D_l of the worse one
    D_l: torch.Tensor         # (M,)
    n_w: torch.Tensor         # (M,) tokens of the better one, n_l of the worse one
    n_l: torch.Tensor         # (M,)
    h: torch.Tensor           # (M,) D_w − D_l                                                  (6)
    p: torch.Tensor           # (M,) probability that the pair is labelled right
    margin: torch.Tensor      # (M,) by how much the chosen one is better (distill)
    shift: float              # a common baseline of the log-ratios, in nats (kto, bco)


# Pairs with a reference. Each gives (M,) losses; σ is the logistic function, r = βD.

def dpo(x, args):
    """sigmoid loss of Rafailov et al. 2023 (eq. 7), with label smoothing cDPO

    −log σ(βh), or the cross-entropy against p. β 0.01 to 0.5, 0.1 is usual."""
    right = F.logsigmoid(args.beta * x.h)                                        # (M,)
    wrong = F.logsigmoid(-args.beta * x.h)                                       # (M,)
    return -x.p * right - (1 - x.p) * wrong                                      # (M,)  (7) (8)


def robust(x, args):
    """dpo with labels flipped at a known rate, unbiased (Chowdhury et al. 2024, arXiv 2403.00409)

    Unbounded below: it falls for ever as h grows, so watch the margin."""
    right = F.logsigmoid(args.beta * x.h)
    wrong = F.logsigmoid(-args.beta * x.h)
    return (-x.p * right + (1 - x.p) * wrong) / (2 * x.p - 1)


def ipo(x, args):
    """squared distance of h from 1/(2β) (Azar et al. 2023, arXiv 2310.12036, eq. 17)

    --ipo-normalise mean: log-ratios per token, the authors' later word. β is its τ."""
    h = x.D_w / x.n_w - x.D_l / x.n_l if args.ipo_normalise == "mean" else x.h
    return (h - 1 / (2 * args.beta)).square()


def hinge(x, args):
    """max(0, 1 − βh), no gradient once a pair is apart (RSO, Liu et al. 2023, arXiv 2309.06657)"""
    return F.relu(1 - args.beta * x.h)


def dpop(x, args):
    """dpo that also pays where the chosen log-prob falls (Pal et al. 2024, arXiv 2402.13228)

    The penalty stands inside σ. λ 5 to 500."""
    return -F.logsigmoid(args.beta * (x.h - args.dpop_lambda * F.relu(-x.D_w)))


def rdpo(x, args):
    """dpo for the reward r − α|y|: length costs (Park et al. 2024, arXiv 2403.19159)"""
    return -F.logsigmoid(args.beta * x.h + args.length_penalty * (x.n_w - x.n_l))


def dpo_norm(x, args):
    """dpo on log-ratios per token (Tülu 3, Lambert et al. 2024, arXiv 2411.15124), β 2 to 10"""
    return -F.logsigmoid(args.beta * (x.D_w / x.n_w - x.D_l / x.n_l))


def exo(x, args):
    """KL of the policy's win rate from the label's, mode-seeking (Ji et al. 2024, arXiv 2402.00856)

    A sure label has an infinite KL, so p is at most 0.999 here. The authors' code is another loss
    at sure labels: with h = 0, log π_w = 0 and log π_l = −10 it gives 4.3069, this 2.7612."""
    p = x.p.clamp(1e-3, 1 - 1e-3)
    right = F.logsigmoid(args.beta * x.h)
    wrong = F.logsigmoid(-args.beta * x.h)
    return right.exp() * (right - p.log()) + wrong.exp() * (wrong - (1 - p).log())


def nca(x, args):
    """absolute likelihoods, pulled to the reference (Chen et al. 2024, arXiv 2402.05369)"""
    r_w = args.beta * x.D_w
    r_l = args.beta * x.D_l
    return -F.logsigmoid(r_w) - 0.5 * F.logsigmoid(-r_w) - 0.5 * F.logsigmoid(-r_l)


def bco(x, args):
    """good or bad as two classes around a baseline δ (Jung et al. 2024, arXiv 2404.04656)

    δ is a running mean of the log-ratios of all completions, from the steps before this one."""
    r_w = args.beta * (x.D_w - x.shift)
    r_l = args.beta * (x.D_l - x.shift)
    return -F.logsigmoid(r_w) - F.logsigmoid(-r_l)


def sppo(x, args):
    """each log-ratio regressed on ±1/(2β) (Wu et al. 2024, arXiv 2405.00675, hard labels)

    Without the factor 1/2 of the authors' code."""
    target = 1 / (2 * args.beta)
    return (x.D_w - target).square() + (x.D_l + target).square()


def apo_zero(x, args):
    """chosen up, rejected down, each by itself (D'Oosterlinck et al. 2024, arXiv 2408.06266)

    For chosen completions better than the policy's own."""
    return 1 - torch.sigmoid(args.beta * x.D_w) + torch.sigmoid(args.beta * x.D_l)


def apo_down(x, args):
    """both down, rejected further (as apo-zero); for chosen completions worse than the policy's"""
    return torch.sigmoid(args.beta * x.D_w) + 1 - torch.sigmoid(args.beta * x.h)


def soft(x, args):
    """cross-entropy with a reward model's win rate p, from the columns of score.py (12)"""
    return dpo(x, args)


def distill(x, args):
    """(βh − (r_1 − r_2)/T)², regression on a reward model's difference (arXiv 2405.19316) (13)

    REBEL (arXiv 2404.16767) is this with π_ref replaced by the policy of the step before."""
    return (args.beta * x.h - x.margin).square()


def plackett_luce(x, args):
    """a ranked list as successive choices of the best that is left, r = βD (Plackett 1975) → (K,)

    Σ_k [ log Σ_{j = k or worse than k} e^{r_j} − r_k ]; for K = 2 it is dpo."""
    r = args.beta * x.D
    left = torch.eye(len(r), dtype=torch.bool, device=r.device)                  # (K, K)
    left[x.chosen, x.rejected] = True            # itself and what is worse; alone its loss is 0
    return r.masked_fill(~left, -math.inf).logsumexp(1) - r                      # (K,)


# Single labelled completions.

def kto(x, args):
    """good and bad completions, each against the KL z₀ (Ethayarajh et al. 2024, arXiv 2402.01306)

    λ_D (1 − σ(β(D − z₀))) where good, λ_U (1 − σ(β(z₀ − D))) where bad; z₀, in x.shift, estimates
    KL(π‖π_ref) from mismatched pairs, see mismatch(). → (K,)"""
    good = args.desirable_weight * torch.sigmoid(-args.beta * (x.D - x.shift))
    bad = args.undesirable_weight * torch.sigmoid(args.beta * (x.D - x.shift))
    return torch.where(x.label, good, bad)


# Without a reference: x.D is log π(y|x).

def simpo(x, args):
    """log-probs per token, with a target margin (Meng et al. 2024, arXiv 2405.14734, eq. 6)

    −log σ(β (log π_w/n_w − log π_l/n_l) − γ), γ absolute (others give γ/β). β 2 to 10."""
    return -F.logsigmoid(args.beta * (x.D_w / x.n_w - x.D_l / x.n_l) - args.gamma)


def orpo(x, args):
    """SFT and the odds of chosen against rejected (Hong et al. 2024, arXiv 2403.07691, eq. 6–7)

    −m_w − β log σ(log odds_w − log odds_l), m = log π/n, odds = e^m/(1 − e^m). β is its λ."""
    m_w = (x.D_w / x.n_w).clamp(max=-1e-6)  # just below 0, so that the odds are finite
    m_l = (x.D_l / x.n_l).clamp(max=-1e-6)
    not_w = torch.log(-torch.expm1(m_w))                     # log(1 − e^m)
    not_l = torch.log(-torch.expm1(m_l))
    log_odds = (m_w - not_w) - (m_l - not_l)
    return -x.D_w / x.n_w - args.beta * F.logsigmoid(log_odds)


def cpo(x, args):
    """dpo with a uniform reference (Xu et al. 2024, arXiv 2401.08417); --sft-coef is its NLL term

    The NLL is a mean over pairs of means per token; the authors' code takes one over all tokens."""
    return -F.logsigmoid(args.beta * x.h)


def slic(x, args):
    """max(0, γ − log π_w + log π_l) (Zhao et al. 2023, arXiv 2305.10425); --sft-coef regularises

    By the mean NLL per token, where the paper's regulariser is the sum."""
    return F.relu(args.gamma - x.h)


def sft(x, args):
    """maximum likelihood on the chosen completions, no reference, nats a token → (K,)"""
    return -x.policy                                                             # (K,)  (11)


class Loss(NamedTuple):
    """A row of LOSSES: the function, and what the loop must know of it."""
    function: Callable        # (Completions, args) → losses of pairs (M,) or completions (K,)
    flags: dict               # the flags that it reads, with their defaults; any other is refused
    gives: tuple = ("pair", "list")      # formats it can use, by what they give: see common.FORMATS
    per: str = "pair"         # each loss is of a "pair" or a "completion", and a step's sum is
                              # divided by its prompts; "token": of a completion, by its tokens
    reference: bool = True    # whether it needs log π_ref


REF_FREE = {"beta": 0.1, "sft_coef": 0.0}
PAIRED = REF_FREE | {"ref_model": None}
NOISY = PAIRED | {"label_smoothing": 0.0}                # reads p, also of the column p_chosen
REWARDED = PAIRED | {"reward_temperature": 1.0}
SINGLE = {"beta": 0.1, "ref_model": None, "desirable_weight": 1.0, "undesirable_weight": 1.0}
LOSSES = {
    "dpo": Loss(dpo, NOISY),
    "robust": Loss(robust, NOISY),
    "ipo": Loss(ipo, PAIRED | {"ipo_normalise": "sum"}),
    "hinge": Loss(hinge, PAIRED),
    "dpop": Loss(dpop, PAIRED | {"dpop_lambda": 50.0}),
    "rdpo": Loss(rdpo, PAIRED | {"length_penalty": 0.01}),
    "dpo-norm": Loss(dpo_norm, PAIRED | {"beta": 5.0}),
    "exo": Loss(exo, NOISY),
    "nca": Loss(nca, PAIRED),
    "bco": Loss(bco, PAIRED),
    "sppo": Loss(sppo, PAIRED),
    "apo-zero": Loss(apo_zero, PAIRED),
    "apo-down": Loss(apo_down, PAIRED),
    "soft": Loss(soft, REWARDED, gives=("pair",)),
    "distill": Loss(distill, REWARDED, gives=("pair",)),
    "plackett-luce": Loss(plackett_luce, {"beta": 0.1, "ref_model": None}, per="completion"),
    "kto": Loss(kto, SINGLE, gives=("label", "pair"), per="completion"),
    "simpo": Loss(simpo, REF_FREE | {"beta": 2.0, "gamma": 1.0}, reference=False),
    "orpo": Loss(orpo, {"beta": 0.1}, reference=False),
    "cpo": Loss(cpo, REF_FREE | {"sft_coef": 1.0}, reference=False),
    "slic": Loss(slic, {"gamma": 1.0, "sft_coef": 0.1}, reference=False),
    "sft": Loss(sft, {}, gives=("pair", "label", "response"), per="token", reference=False),
}


def micro_loss(logps, shift, groups, args):
    """Log-probs (K,) of a micro-batch → (sum of its losses, Counter of metric sums).

    The caller divides by counts of the whole step: nothing here divides by a number of the
    micro-batch, so how a step is cut does not change its gradient. shift: of the whole step.
    """
    loss = LOSSES[args.loss]
    device = logps.device
    pairs = compare(groups, args.label_smoothing or 0.0, device)
    good = [g.scores != [0] for g in groups for _ in g.completion_ids]
    lengths = [len(ids) for g in groups for ids in g.completion_ids]
    label = torch.tensor(good, device=device)                                    # (K,)
    n = torch.tensor(lengths, device=device)                                     # (K,)
    D = logps
    if loss.reference:
        D = logps - torch.tensor([ref for g in groups for ref in g.ref], device=device)
    w, l = pairs.better, pairs.worse
    x = Completions(
        logps, D, label, w, l, D[w], D[l], n[w], n[l], D[w] - D[l], pairs.p, pairs.margin, shift)

    losses = loss.function(x, args)                                              # (M,) or (K,)
    if args.sft_coef:
        losses = losses - args.sft_coef * logps[w] / n[w]                        # (M,)  (10)
    weight = pairs.weight if loss.per == "pair" else torch.ones_like(losses)

    # Sums of the metrics, each prompt counting as one; of single completions the good are chosen.
    sums = {"prompts": len(groups), "chosen": len(groups), "rejected": len(groups)}
    sums["tokens"] = n.sum().item()
    per_prompt = pairs.weight
    if len(w) == 0:
        w = label.nonzero()[:, 0]
        l = (~label).nonzero()[:, 0]
        per_prompt = 1.0
        sums |= {"chosen": len(w), "rejected": len(l)}
    values = {"loss": losses * weight}
    beta = args.beta or 1.0
    for name, column in {"logps": logps, "rewards": beta * D}.items():
        values[f"{name}/chosen"] = column[w] * per_prompt
        values[f"{name}/rejected"] = column[l] * per_prompt
    if len(pairs.better):
        values["rewards/margins"] = beta * x.h * per_prompt
        values["rewards/accuracies"] = outcome(x.h) * per_prompt
    sums |= {name: value.detach().double().sum().item() for name, value in values.items()}
    return values["loss"].sum(), Counter(sums)


def outcome(h):
    """(M,) differences of log-ratios → 1 right, 0 wrong, 1/2 a tie."""
    return 0.5 * (1 + torch.where(h.abs() > TIE, h.sign(), 0))


def means(sums, args):
    """Sums over a whole step or split → means: the loss by its normaliser, all else per prompt, or
    of single completions per good and per bad one."""
    divisor = "tokens" if LOSSES[args.loss].per == "token" else "prompts"
    result = {"loss": sums["loss"] / sums[divisor]}
    for name, value in sums.items():
        if "/" in name:
            count = sums.get(name.split("/")[1], sums["prompts"])
            result[name] = value / (count or math.nan)       # there is none: NaN, not logged
    return result


# --- labels and baselines -------------------------------------------------------------------------

def prepare(groups, dropped, args):
    """What --loss makes of the rows before they are tokenised → groups."""
    if "reward_temperature" in LOSSES[args.loss].flags:
        groups = label_by_scores(groups, args)

    kept = []
    for g in groups:
        if args.loss == "robust" and g.p_chosen == 0.5:
            dropped["with p_chosen 0.5, where robust is not defined"] += 1
        elif args.loss == "sft" and (g.scores == [0] or g.ended == [False]):
            dropped["with label false or truncated when sampled"] += 1
        elif len(g.scores) > 1 and len(set(g.scores)) == 1:
            dropped["where no completion is better than another"] += 1
        elif args.loss == "sft":                         # no use for the rejected one
            kept.append(replace(g, completions=g.completions[:1], scores=[1]))
        elif args.loss == "kto":
            for text, score in zip(g.completions, g.scores):
                kept.append(replace(g, completions=[text], scores=[score]))
        else:
            kept.append(g)
    return kept


def label_by_scores(groups, args):
    """p_chosen and margin of pairs from the two rewards that score.py --output wrote (12); the
    better one comes first. `soft` can do with a column p_chosen alone."""
    for g in groups:
        if g.p_chosen is not None and args.loss == "soft" and "score_chosen" not in g.row:
            continue
        with common.failing(f"{g.where}: --loss {args.loss} needs the columns score_chosen and "
                            "score_rejected, which score.py --output writes"):
            first = common.number(g.row, "score_chosen")
            second = common.number(g.row, "score_rejected")
        reversed_already = g.p_chosen is not None and common.number(g.row, "p_chosen") < 0.5
        if (first < second) != reversed_already:
            g.completions.reverse()
        g.margin = abs(first - second) / args.reward_temperature
        g.p_chosen = 1 / (1 + math.exp(-g.margin))
    return groups


def mismatch(groups, max_length, seed):
    """Every prompt with a completion of another one, to estimate KL(π‖π_ref) for kto → groups.

    The paper rotates the completions of a batch; here a shuffle of all rows is rotated, so neither
    the order of the file nor the batch size matters, and π_ref can be measured beforehand.
    """
    order = list(range(len(groups)))
    random.Random(f"{seed} mismatch").shuffle(order)
    result = list(groups)
    for place, i in enumerate(order):
        turned = order[place + 1:place + 1001] + order[:place][:1000]
        prompt = groups[i].prompt_ids
        other = next((groups[j] for j in turned if groups[j].prompt_ids != prompt), None)
        if other is None:
            fail("--loss kto needs completions of two different prompts, and all rows have one.")
        ids = other.completion_ids[0][:max_length - len(prompt)]
        result[i] = replace(groups[i], completion_ids=[ids])
    return result


def measure_reference(model, groups, batches, known, args, packed, autocast):
    """Fills g.ref of the groups of some batches, those of the training and the evaluation: there
    π = π_ref gives the same number in every dtype, and the first loss is what theory says.

    batches: lists of places in groups. known: {place: log-probs}, kept in the checkpoint.
    """
    for places in common.progress_bar(batches, "reference"):
        if not known.keys() >= set(places):
            some = [groups[i] for i in places]
            logps = for_all(completion_logps, model, some, args, packed, autocast)
            known |= {i: logp for i, logp in zip(places, logps) if i not in known}
    for i, logp in known.items():
        groups[i].ref = logp


# --- evaluation -----------------------------------------------------------------------------------

def evaluate(model, encoder, groups, shift, args, packed, autocast, adapter, step):
    """Exact means over all held-out groups (never a mean of batch means), and samples."""
    by_group = for_all(completion_logps, model, groups, args, packed, autocast, "evaluate")
    logps = torch.tensor([logp for part in by_group for logp in part])
    result = means(micro_loss(logps, shift, groups, args)[1], args)
    ref = torch.tensor([logp for g in groups for logp in g.ref])
    pairs = compare(groups)
    result["n"] = len(pairs.better) or len(groups)
    if len(pairs.better):
        D = logps - ref if LOSSES[args.loss].reference else logps
        right = outcome(D[pairs.better] - D[pairs.worse])
        prompts = [groups[i].prompt_ids for i in pairs.group]
        result["accuracy_se"] = common.mean_and_error(right, prompts, proportion=True)[1]
    if step == 0 and LOSSES[args.loss].reference and not args.ref_model:
        result["loss_expected"] = means(micro_loss(ref, 0.0, groups, args)[1], args)["loss"]

    # How often the best completion of a prompt is less likely than under the reference.
    fell = []
    for g, now in zip(groups, by_group):
        if g.scores != [0]:
            best = g.scores.index(max(g.scores))
            fell.append(now[best] < g.ref[best] - TIE)
    result["chosen_fell"] = sum(fell) / max(1, len(fell))
    result |= sample_answers(model, encoder, groups, args, packed, autocast, adapter)
    return {f"eval/{name}": value for name, value in result.items()}


def sample_answers(model, encoder, groups, args, packed, autocast, adapter):
    """Samples for held-out prompts: KL(π‖π_ref) per completion, and the fraction that equals the
    rows' `answer`. The reference is loaded again, unless it is the policy without LoRA."""
    asked = list({tuple(g.prompt_ids): g for g in groups}.values())              # each prompt once
    with_answer = [g for g in asked if g.row.get("answer") not in (None, "")]
    asked = (with_answer or asked)[:args.eval_samples]
    longest = max(len(ids) for g in groups for ids in g.completion_ids)
    room = encoder.max_positions - max((len(g.prompt_ids) for g in asked), default=0)
    if not asked or room <= 0:
        return {}
    prompts = [g.prompt_ids for g in asked]
    limit = int(min(2 * longest, 256, room))
    with autocast:
        samples = common.sample(
            model, prompts, 1, limit, encoder.stops, seed=args.seed, adapter=adapter)
    texts = [encoder.decode(s.ids, g.prompt).strip() for g, s in zip(asked, samples)]
    for g, text in list(zip(asked, texts))[:3]:
        tqdm.write(f"  {encoder.text(g.prompt_ids)[-80:]!r} ▸ {text[:200]!r}")

    own = [replace(g, completion_ids=[s.ids]) for g, s in zip(asked, samples)]
    ours = for_all(completion_logps, model, own, args, packed, autocast)
    if adapter and not args.ref_model:
        with adapter.disable_adapter():
            theirs = for_all(completion_logps, model, own, args, packed, autocast)
    else:
        reference = common.load_reference(args, encoder, model.device)   # for this moment only
        theirs = for_all(completion_logps, reference, own, args, packed, autocast)
    ratio = (torch.tensor(ours) - torch.tensor(theirs))[:, 0]
    result = dict(zip(("kl", "kl_se"), common.mean_and_error(ratio, prompts)))
    if with_answer:
        right = [float(text == str(g.row["answer"]).strip()) for g, text in zip(asked, texts)]
        result |= zip(("right", "right_se"), common.mean_and_error(right, prompts, proportion=True))
    return result


def eval_line(step, result):
    """One line for the terminal."""
    r = {name.removeprefix("eval/"): value for name, value in result.items()}
    line = f"step {step}: eval loss {r['loss']:.4f}"
    if "loss_expected" in r:
        line += f" (expected {r['loss_expected']:.4f})"
    if "accuracy_se" in r:
        line += f", accuracy {100 * r['rewards/accuracies']:.1f} ± {100 * r['accuracy_se']:.1f} %"
        line += f" of {r['n']} pairs, margin {r['rewards/margins']:.3f}"
    line += f", log π chosen {r['logps/chosen']:.2f}"
    if r["logps/rejected"] < 0:                              # NaN: sft has none
        line += f" rejected {r['logps/rejected']:.2f}"
    line += f", chosen fell in {100 * r['chosen_fell']:.0f} %"
    if "kl" in r:
        line += f", KL {r['kl']:.2f} ± {r['kl_se']:.2f}"
    if "right" in r:
        line += f", correct samples {100 * r['right']:.1f} ± {100 * r['right_se']:.1f} %"
    return line


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
    loss = LOSSES[args.loss]
    usable = [name for name, row in FORMATS.items() if row.gives in loss.gives]
    # --- shared: data ---
    common.check_output_dir(args)
    device, autocast = common.set_up_device(args)
    encoder = common.load_encoder(args.model, args, args.chat_template)
    train, held_out, max_length = common.load_data(args, encoder, usable, prepare)
    plan = common.make_plan(len(train), args)
    # --- end shared ---
    model = common.load_model(args.model, encoder, device)
    packed = common.can_pack(model, train)

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

    # The reference: --ref-model, or the policy as it is now. An adapter starts at 0.
    every = train + held_out
    held_places = range(len(train), len(every))
    batches = [*(plan if loss.reference else []), held_places]
    reference = common.load_reference(args, encoder, device) if args.ref_model else model
    measured = extra.setdefault("reference", {})
    measure_reference(reference, every, batches, measured, args, packed, autocast)
    foreign = []
    if args.loss == "kto":
        foreign = mismatch(every, max_length, args.seed)
        measured = extra.setdefault("foreign", {})
        measure_reference(reference, foreign, batches, measured, args, packed, autocast)
    del reference
    if state:
        common.restore(state, model, optimizer)

    def baseline(places):
        """The baseline x.shift of a batch, in nats: kto's z₀ or bco's δ."""
        if args.loss != "kto":
            return extra.get("shift", 0.0)
        some = [foreign[i] for i in places]
        logps = for_all(completion_logps, model, some, args, packed, autocast)
        ratio = torch.tensor(logps) - torch.tensor([g.ref for g in some])
        return max(0.0, ratio.mean().item())             # no KL is negative, an estimate may be

    def evaluate_now(step):
        """Evaluates after `step` updates → metrics; says them in a line."""
        result = evaluate(
            model, encoder, held_out, baseline(held_places), args, packed, autocast, adapter, step)
        tqdm.write(eval_line(step, result))
        return result

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

    # --- loop
    for step in bar:
        began = time.perf_counter()
        groups = [train[i] for i in plan[step]]
        sums = Counter()
        shift = baseline(plan[step])
        divisor = len(groups)
        if loss.per == "token":
            divisor = sum(len(ids) for g in groups for ids in g.completion_ids)

        # The gradient of the whole step, summed over micro-batches (memory, not statistics).
        optimizer.zero_grad(set_to_none=True)
        for micro, share in common.my_micro_batches(groups, args.micro_batch_tokens, packed):
            with autocast:
                logps = completion_logps(model, common.lay_out(model, micro, packed))  # (K,)
            part, part_sums = micro_loss(logps, shift, micro, args)
            (part * share / divisor).backward()
            sums.update(part_sums if share else {})
        metrics = means(common.sum_over_processes(sums), args)
        if args.loss == "bco" and math.isfinite(metrics["loss"]):   # kept in the checkpoint
            mean = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / (2 * args.beta)
            extra["shift"] = 0.9 * extra.get("shift", 0.0) + 0.1 * mean

        # --- shared: update ---
        # A gradient that is not finite would ruin the weights: the state before it is kept instead.
        grad_norm = common.clip_gradient(model, args.max_grad_norm)
        if not math.isfinite(grad_norm):
            common.save_checkpoint(out, model, optimizer, step, extra)
            fail(f"step {step + 1}: the gradient is not finite (rows: {groups[0].where} …). The "
                 "state before it is saved: --resume with a lower --lr goes on from there.")
        for g in optimizer.param_groups:
            g["lr"] = lr_at(step, len(plan), args)
        optimizer.step()

        metrics["grad_norm"] = grad_norm
        metrics["learning_rate"] = lr_at(step, len(plan), args)
        tokens = sum(g.tokens() for g in groups)
        metrics["tokens_per_second"] = tokens / (time.perf_counter() - began)
        log(step + 1, metrics)
        common.end_step(bar, step + 1, len(plan), f"loss {metrics['loss']:.4g}")

        last = step + 1 == len(plan)
        asked = args.save_every and (step + 1) % args.save_every == 0
        # A signal and the ten minutes reach one process before another: all act on the same step.
        late = time.monotonic() - saved_at > SAVE_SECONDS
        late, stop = map(any, zip(*common.gather((late, bool(stopped)))))
        if last or stop or asked or late:
            common.save_checkpoint(out, model, optimizer, step + 1, extra)
            saved_at = time.monotonic()
        if held_out and due(step + 1):
            results.append(evaluate_now(step + 1))
            log(step + 1, results[-1])
        if stop and not last:
            print(f"stopped after step {step + 1} of {len(plan)}; add --resume to go on")
            raise SystemExit(130)
        # --- end shared ---

    # --- save
    common.save_model(out, model, encoder.tokenizer, adapter)
    if results and results[-1]["eval/loss"] > results[0]["eval/loss"]:
        print("note: the held-out loss is higher than at the start: try a lower --lr, fewer epochs")


if __name__ == "__main__":
    common.run(main)
