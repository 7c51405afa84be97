"""Align a language model with preference pairs: direct preference optimisation (DPO), and SFT.

    python train_dpo.py                                  # 10 seconds on two CPU cores, no network
    python train_dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --lr 1e-6 \\
        --dataset trl-lib/ultrafeedback_binarized

With no flags it trains the toy of tests/toy (sums); the fraction of correct samples on sums that it
never saw goes from about 50 % to about 90 %. Before the first step the loss is
0.6931 = log 2, whatever the model and the data.

Differs from the paper (Rafailov et al. 2023, arXiv 2305.18290) in: nothing that changes the loss.
AdamW instead of RMSprop, and the reference's log-probs are computed once and kept on disk, since
they never change. Variants are one function and one row of LOSSES each; `--loss sft` is maximum
likelihood on the chosen completions, which makes π_ref where there is no SFT model yet.
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
#        E_{y~π} [ r − β log π/π_ref ] = −β E_{y~π} [ log π(y|x) − log( π_ref(y|x) e^{r(x,y)/β} ) ]
#                                      = −β KL( π ‖ π* ) + β log Z(x)                          (2)
#        π*(y|x) = π_ref(y|x) e^{r(x,y)/β} / Z(x),    Z(x) = Σ_y π_ref(y|x) e^{r(x,y)/β}       (3)
#
#    Z(x) does not depend on π and a KL is at least 0, so π* is the maximum, unique where π_ref > 0.
#    A completion that π_ref never gives, π* never gives either. Z(x) sums over all completions: (3)
#    cannot be computed, and need not be.
#
# 3. Turn (3) round: every policy is optimal for some reward, namely
#
#        r(x, y) = β log( π*(y|x) / π_ref(y|x) ) + β log Z(x)                                  (4)
#
#    The log-ratio is the reward, up to a constant of the prompt. We call
#    r̂(x, y) = β log π(y|x)/π_ref(y|x) the implicit reward of π: it is what rewards/chosen and
#    rewards/rejected report, and what score.py --implicit shows, also token by token (Rafailov et
#    al. 2024, arXiv 2404.12358). (4) also answers "but the policy in training is not the optimal
#    one": it is, for its own implicit reward.
#
# 4. What people compare. The Bradley–Terry model (an assumption: one utility, logistic noise)
#
#        p(y_w ≻ y_l | x) = σ( r(x, y_w) − r(x, y_l) )                                         (5)
#
#    Only the difference matters, so the log Z(x) of (4) cancels, and the likelihood of the data is
#    a function of π alone:
#
#        h = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)                             (6)
#        L_DPO = −E log σ( β h )                                                               (7)
#
#    DPO is offline and off policy: the pairs are given, and nobody samples from π to learn.
#    At the start π = π_ref, h = 0 and L = log 2 = 0.6931 for every pair. Another number is a bug
#    (dropout, a wrong mask, a reference that is not the starting point), so it is printed beside
#    the measured one; in bfloat16 rounding shows in the fourth digit (0.6930 on HH-RLHF).
#    A label that is right only with probability p (label smoothing ε: p = 1 − ε, "cDPO"; a column
#    p_chosen: its own p):
#
#        L = −p log σ( β h ) − (1 − p) log σ( −β h ),    least at σ(βh) = p                    (8)
#
#    With p = 1 nothing stops h: for labels that are always the same, the optimum has h = ∞ for
#    every β (Azar et al. 2023, arXiv 2310.12036). With p < 1 h stops at a finite value; that does
#    not bound the KL, which h does not determine.
#
# 5. The gradient, and what its two factors do:
#
#        ∇L_DPO = −β σ( −β h ) [ ∇ log π(y_w|x) − ∇ log π(y_l|x) ]                             (9)
#
#    The bracket raises the chosen and lowers the rejected completion. σ(−βh) is the probability
#    that the implicit reward gives to the opposite order: 1/2 at the start, near 1 for pairs that
#    are ranked the wrong way, near 0 for those that are settled. β appears twice: as the size of
#    the step, and in how soon a pair counts as settled (h ≈ 3/β).
#
# 6. Why both log-probs can fall. (7) sees only h, and log π(y_w) ≤ 0 is bounded above while
#    log π(y_l) is unbounded below: lowering y_l can go on for ever, and the mass may go anywhere.
#    Where y_w and y_l share most tokens, the push against y_l takes y_w with it (Pal et al. 2024,
#    arXiv 2402.13228; Razin et al. 2024, arXiv 2410.08847). The fraction of pairs whose chosen
#    log-prob fell is reported (eval/chosen_fell). Some of it is no bug; where samples get worse,
#    try a lower learning rate, a larger β, fewer epochs, or an anchor on the chosen completion,
#    `--sft-coef α`:
#
#        L = L_DPO − α log π(y_w|x) / |y_w|    |y_w| tokens, end included; mean over pairs    (10)
#
#    (Pang et al. 2024, arXiv 2404.19733, iterative RPO, per completion as there; others divide by
#    the tokens of the batch.)
#
# 7. `--loss sft`: −log π(y_w|x), summed over a step, divided by its tokens; nats a token.     (11)
#
# 8. Fitting the policy to a reward model. A trained reward r says of any two completions of a
#    prompt, labelled by nobody, p = σ( (r_1 − r_2)/T ). `--loss soft` is the cross-entropy (8)
#    between this p and the win rate σ(βh) that the policy implies:
#
#        ∇L_soft = −β ( p − σ( βh ) ) [ ∇ log π(y_1|x) − ∇ log π(y_2|x) ]                     (12)
#
#    It pulls h to (r_1 − r_2)/(βT) from either side and stops there; with p = 1 it is (9). Z(x)
#    never enters: (4) is only used for a difference. So does `--loss distill`, by squares:
#
#        L_distill = ( βh − (r_1 − r_2)/T )²                                                  (13)

# --- imports --------------------------------------------------------------------------------------
import argparse
import hashlib
import math
import random
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

import common
from common import (
    FORMATS, Plan, compare, completion_logps, fail, for_all, log, reward_scores, token_logps,
    within)

TOY = Path(__file__).parent / "tests" / "toy"
NAME = Path(__file__).stem.removeprefix("train_")    # a copy of this file writes to runs/ITS NAME
SAVE_SECONDS = 600                                   # a checkpoint at least this often
# Nats that count as no change: the rounding of float32 sums of hundreds. That of bfloat16 is
# larger: there some pairs count as right or wrong at step 0 (accuracy 50.9 % on HH-RLHF).
TIE = 1e-3


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
    g = p.add_argument_group("DPO")
    losses = [f"{name}: {row.function.__doc__.splitlines()[0]}" for name, row in LOSSES.items()]
    g.add_argument("--loss", choices=LOSSES, default="dpo", help="; ".join(losses))
    g.add_argument("--ref-model", help="reference policy; default: --model as it is at the start")
    g.add_argument("--eval-samples", type=natural, default=256, help="held-out prompts to sample for at each evaluation")
    g = p.add_argument_group("read by some losses only; their defaults are in LOSSES")
    positive = within("(0, inf)")
    weight = within("[0, inf)")
    g.add_argument("--beta", type=positive, help="price of leaving the reference (1): larger stays closer")
    g.add_argument("--label-smoothing", type=within("[0, 0.5)"), help="probability that a label is wrong (8)")
    g.add_argument("--sft-coef", type=weight, help="weight of the chosen completion's mean NLL (10)")
    g.add_argument("--reward-model", metavar="DIR", help="soft, distill: labels the pairs; else the columns of score.py do")
    g.add_argument("--reward-temperature", type=within("[1e-6, inf)"), help="soft, distill: rewards are divided by it (12)")
    g.add_argument("--gamma", type=weight, help="simpo, slic: target margin")
    g.add_argument("--ipo-normalise", choices=["sum", "mean"], help="ipo: log-ratios of completions or per token")
    g.add_argument("--dpop-lambda", type=weight, help="dpop: price of a fallen chosen log-prob")
    g.add_argument("--length-penalty", type=within("(-inf, inf)"), help="rdpo: α, nats a token")
    g.add_argument("--desirable-weight", type=weight, help="kto: λ_D")
    g.add_argument("--undesirable-weight", type=weight, help="kto: λ_U")
    p.set_defaults(dataset=f"{TOY}/pairs.jsonl", learning_rate=1e-3)
    flags = LOSSES[p.parse_known_args(argv)[0].loss].flags
    p.set_defaults(**flags)
    args = p.parse_args(argv)

    # A flag that the loss does not read is refused: ignored, it would seem to have had its effect.
    for row in LOSSES.values():
        for flag in row.flags:
            if flag not in flags and getattr(args, flag) is not None:
                p.error(f"--loss {args.loss} does not read --{flag.replace('_', '-')}: drop it")
    names = ("model", "ref_model", "reward_model", "dataset", "eval_dataset", "chat_template")
    common.check_run(args, names)
    return args


# --- the algorithm: pure functions ----------------------------------------------------------------
# Shapes: K completions, M pairs of them. Log-probs are summed over the completion's tokens, end
# included, in float32.

@dataclass
class Completions:
    """What a loss sees of some groups: their K completions, and M pairs "chosen ≻ rejected" of
    them."""
    policy: torch.Tensor      # (K,) log π(y|x)
    ref: torch.Tensor         # (K,) log π_ref(y|x); 0 for a loss without reference
    length: torch.Tensor      # (K,) tokens of y, end included
    label: torch.Tensor       # (K,) True where the completion itself is said to be good (kto)
    chosen: torch.Tensor      # (M,) index of the better completion of each pair
    rejected: torch.Tensor    # (M,) index of the worse one
    p: torch.Tensor           # (M,) probability that the pair is labelled right
    margin: torch.Tensor      # (M,) by how much the chosen one is better (distill)
    weight: torch.Tensor      # (M,) 1 / pairs of the same prompt
    shift: float = 0.0        # a common baseline of the log-ratios, in nats (kto, bco)

    @property
    def D(self):
        """log π(y|x)/π_ref(y|x), the implicit reward without its β: (K,)"""
        return self.policy - self.ref

    @property
    def D_w(self):
        return self.D[self.chosen]                                               # (M,)

    @property
    def D_l(self):
        return self.D[self.rejected]                                             # (M,)

    @property
    def n_w(self):
        return self.length[self.chosen]                                          # (M,)

    @property
    def n_l(self):
        return self.length[self.rejected]                                        # (M,)

    @property
    def h(self):
        return self.D_w - self.D_l                                               # (M,)  (6)


# Pairs with a reference. Each gives (M,) losses; σ is the logistic function, r = βD.

def dpo(x, args):
    """sigmoid loss of Rafailov et al. 2023 (eq. 7), with label smoothing cDPO

    Token sums. −log σ(βh), or the cross-entropy against p. β 0.01 to 0.5, 0.1 is usual. → (M,)
    """
    right = F.logsigmoid(args.beta * x.h)                                        # (M,)
    wrong = F.logsigmoid(-args.beta * x.h)                                       # (M,)
    return -x.p * right - (1 - x.p) * wrong                                      # (M,)  (7) (8)


def robust(x, args):
    """dpo with labels flipped at a known rate, unbiased (Chowdhury et al. 2024, arXiv 2403.00409)

    Token sums; its mean over labels flipped at rate ε is the dpo loss of the true ones. Unbounded
    below: it falls for ever as h grows, so watch the margin. β as dpo; ε is --label-smoothing.
    """
    right = F.logsigmoid(args.beta * x.h)
    wrong = F.logsigmoid(-args.beta * x.h)
    return (-x.p * right + (1 - x.p) * wrong) / (2 * x.p - 1)


def ipo(x, args):
    """squared distance of h from 1/(2β) (Azar et al. 2023, arXiv 2310.12036, eq. 17)

    Token sums as in the paper, or --ipo-normalise mean: log-ratios per token, the authors' later
    word. A finite target even where labels never disagree. β is its τ: 0.01 to 0.5.
    """
    h = x.h
    if args.ipo_normalise == "mean":
        h = x.D_w / x.n_w - x.D_l / x.n_l
    return (h - 1 / (2 * args.beta)).square()


def hinge(x, args):
    """max(0, 1 − βh), no gradient once a pair is apart (RSO, Liu et al. 2023, arXiv 2309.06657)

    Token sums. β is its γ: pairs count as settled at h = 1/β.
    """
    return F.relu(1 - args.beta * x.h)


def dpop(x, args):
    """dpo that also pays where the chosen log-prob falls (Pal et al. 2024, arXiv 2402.13228)

    Token sums. −log σ(β (h − λ max(0, −D_w))): the penalty stands inside σ. λ 5 to 500.
    """
    fall = F.relu(-x.D_w)
    return -F.logsigmoid(args.beta * (x.h - args.dpop_lambda * fall))


def rdpo(x, args):
    """dpo for the reward r − α|y|: length costs (Park et al. 2024, arXiv 2403.19159)

    Token sums. −log σ(βh + α (|y_w| − |y_l|)), α from --length-penalty, nats a token.
    """
    return -F.logsigmoid(args.beta * x.h + args.length_penalty * (x.n_w - x.n_l))


def dpo_norm(x, args):
    """dpo on log-ratios per token (Tülu 3, Lambert et al. 2024, arXiv 2411.15124)

    Token means: long completions weigh no more than short ones. β is larger for it: 2 to 10.
    """
    return -F.logsigmoid(args.beta * (x.D_w / x.n_w - x.D_l / x.n_l))


def exo(x, args):
    """KL of the policy's win rate from the label's, mode-seeking (Ji et al. 2024, arXiv 2402.00856)

    Token sums. The reverse direction of dpo's cross-entropy. A sure label has an infinite KL, so p
    is at most 0.999, as in the paper's code.
    """
    p = x.p.clamp(1e-3, 1 - 1e-3)
    right = F.logsigmoid(args.beta * x.h)
    wrong = F.logsigmoid(-args.beta * x.h)
    return right.exp() * (right - p.log()) + wrong.exp() * (wrong - (1 - p).log())


def nca(x, args):
    """absolute likelihoods, pulled to the reference (Chen et al. 2024, arXiv 2402.05369)

    Token sums. −log σ(r_w) − ½ log σ(−r_w) − ½ log σ(−r_l).
    """
    r_w = args.beta * x.D_w
    r_l = args.beta * x.D_l
    return -F.logsigmoid(r_w) - 0.5 * F.logsigmoid(-r_w) - 0.5 * F.logsigmoid(-r_l)


def bco(x, args):
    """good or bad as two classes around a baseline δ (Jung et al. 2024, arXiv 2404.04656)

    Token sums. −log σ(r_w − βδ) − log σ(βδ − r_l); δ is a running mean of the log-ratios of all
    completions, from the steps before this one.
    """
    r_w = args.beta * (x.D_w - x.shift)
    r_l = args.beta * (x.D_l - x.shift)
    return -F.logsigmoid(r_w) - F.logsigmoid(-r_l)


def sppo(x, args):
    """each log-ratio regressed on ±1/(2β) (Wu et al. 2024, arXiv 2405.00675, hard labels)

    Token sums. One step of self-play; the data should come from π_ref.
    """
    target = 1 / (2 * args.beta)
    return (x.D_w - target).square() + (x.D_l + target).square()


def apo_zero(x, args):
    """chosen up, rejected down, each by itself (D'Oosterlinck et al. 2024, arXiv 2408.06266)

    Token sums. 1 − σ(r_w) + σ(r_l). For chosen completions better than the policy's own.
    """
    return 1 - torch.sigmoid(args.beta * x.D_w) + torch.sigmoid(args.beta * x.D_l)


def apo_down(x, args):
    """both down, rejected further (as apo-zero)

    Token sums. σ(r_w) + 1 − σ(βh). For chosen completions worse than the policy's own.
    """
    return torch.sigmoid(args.beta * x.D_w) + 1 - torch.sigmoid(args.beta * x.h)


def distill(x, args):
    """(βh − (r_1 − r_2)/T)², regression on a reward model's difference (arXiv 2405.19316)  (13)

    Token sums. Its minimum is (3) with the reward model's r.  REBEL (arXiv 2404.16767) is this with
    π_ref replaced by the policy of the step before, on its own samples.
    """
    return (args.beta * x.h - x.margin).square()


def plackett_luce(x, args):
    """a ranked list as successive choices of the best that is left, r = βD (Plackett 1975)

    Token sums; for K = 2 it is dpo. Σ_k [ log Σ_{j = k or worse than k} e^{r_j} − r_k ] → (K,)
    """
    return common.choice_losses(args.beta * x.D, x.chosen, x.rejected)           # (K,)


# Single labelled completions.

def kto(x, args):
    """good and bad completions, each against the KL z₀ (Ethayarajh et al. 2024, arXiv 2402.01306)

    Token sums. λ_D (1 − σ(β(D − z₀))) where good, λ_U (1 − σ(β(z₀ − D))) where bad; z₀ estimates
    KL(π‖π_ref) from mismatched pairs, see mismatch(). → (K,)
    """
    good = args.desirable_weight * torch.sigmoid(-args.beta * (x.D - x.shift))
    bad = args.undesirable_weight * torch.sigmoid(args.beta * (x.D - x.shift))
    return torch.where(x.label, good, bad)


# Without a reference: x.D is log π(y|x).

def simpo(x, args):
    """log-probs per token, with a target margin (Meng et al. 2024, arXiv 2405.14734, eq. 6)

    Token means. −log σ(β (log π_w/n_w − log π_l/n_l) − γ), γ absolute (others give γ/β). β 2 to 10.
    """
    return -F.logsigmoid(args.beta * (x.D_w / x.n_w - x.D_l / x.n_l) - args.gamma)


def orpo(x, args):
    """SFT and the odds of chosen against rejected (Hong et al. 2024, arXiv 2403.07691, eq. 6–7)

    Token means. −m_w − β log σ(log odds_w − log odds_l), m = log π/n, odds = e^m/(1 − e^m); the SFT
    term is of the completion alone. β is its λ, 0.1 to 1.
    """
    m_w = x.D_w / x.n_w
    m_l = x.D_l / x.n_l
    log_odds = (m_w - log_1_minus_exp(m_w)) - (m_l - log_1_minus_exp(m_l))
    return -m_w - args.beta * F.logsigmoid(log_odds)


def log_1_minus_exp(m):
    """log(1 − e^m) for m ≤ 0, stable at both ends; just below 0 where m = 0, so that it is
    finite."""
    m = m.clamp(max=-1e-6)
    return torch.where(m > -math.log(2), torch.log(-torch.expm1(m)), torch.log1p(-m.exp()))


def cpo(x, args):
    """dpo with a uniform reference (Xu et al. 2024, arXiv 2401.08417); --sft-coef is its NLL term

    Token sums. −log σ(β (log π_w − log π_l)) + NLL, per token as in its code.
    """
    return -F.logsigmoid(args.beta * x.h)


def slic(x, args):
    """max(0, γ − log π_w + log π_l) (Zhao et al. 2023, arXiv 2305.10425); --sft-coef regularises

    Token sums, γ is its δ.
    """
    return F.relu(args.gamma - x.h)


def sft(x, args):
    """maximum likelihood on the chosen completions, no reference

    Token sums, divided by the tokens of the step: nats a token. → (K,)
    """
    return -x.policy                                                             # (K,)  (11)


class Loss(NamedTuple):
    """A row of LOSSES: the function, and what the loop must know of it."""
    function: Callable        # (Completions, args) → losses of pairs (M,) or completions (K,)
    flags: dict               # the flags that it reads, with their defaults; any other is refused
    gives: tuple = ("pair", "list")      # formats it can use, by what they give: see common.FORMATS
    per: str = "pair"         # "pair": weighted by 1 / pairs of the prompt; "completion"; "token"
    reference: bool = True    # whether it needs log π_ref
    shift: str = ""           # x.shift is a "running" mean, or of "mismatched" completions


REF_FREE = {"beta": 0.1, "sft_coef": 0.0}
PAIRED = REF_FREE | {"ref_model": None}
NOISY = PAIRED | {"label_smoothing": 0.0}                # reads p, also of the column p_chosen
REWARDED = PAIRED | {"reward_model": None, "reward_temperature": 1.0}
WEIGHTS = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
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
    "bco": Loss(bco, PAIRED, shift="running"),
    "sppo": Loss(sppo, PAIRED),
    "apo-zero": Loss(apo_zero, PAIRED),
    "apo-down": Loss(apo_down, PAIRED),
    "soft": Loss(dpo, REWARDED, gives=("pair",)),
    "distill": Loss(distill, REWARDED, gives=("pair",)),
    "plackett-luce": Loss(plackett_luce, {"beta": 0.1, "ref_model": None}, per="completion"),
    "kto": Loss(
        kto, WEIGHTS | {"beta": 0.1, "ref_model": None}, gives=("label", "pair"),
        per="completion", shift="mismatched"),
    "simpo": Loss(simpo, REF_FREE | {"beta": 2.0, "gamma": 1.0}, reference=False),
    "orpo": Loss(orpo, {"beta": 0.1}, reference=False),
    "cpo": Loss(cpo, REF_FREE | {"sft_coef": 1.0}, reference=False),
    "slic": Loss(slic, {"gamma": 1.0, "sft_coef": 0.1}, reference=False),
    "sft": Loss(sft, {}, gives=("pair", "label", "response"), per="token", reference=False),
}


def normaliser(groups, args):
    """What the losses of a step are divided by, counted over all of it: its tokens or prompts."""
    if LOSSES[args.loss].per == "token":
        return sum(len(ids) for g in groups for ids in g.completion_ids)
    return len(groups)


def micro_loss(logps, ref_logps, shift, groups, args):
    """Log-probs of a micro-batch → (sum of its losses, Counter of metric sums).

    logps: (K,) as completion_logps() gives them; ref_logps: (N,) the column of all completions;
    shift: the baseline of the step. The caller divides by counts of the whole step: nothing here
    divides by a number of the micro-batch, so how a step is cut does not change its gradient.
    """
    loss = LOSSES[args.loss]
    index = [i for g in groups for i in g.index]
    lengths = [len(ids) for g in groups for ids in g.completion_ids]
    good = [g.scores != [0] for g in groups for _ in g.completion_ids]
    pairs = compare(groups, args.label_smoothing or 0.0, logps.device)
    x = Completions(
        policy=logps,
        ref=ref_logps[index].to(logps.device),
        length=torch.tensor(lengths, device=logps.device),
        label=torch.tensor(good, device=logps.device),
        chosen=pairs.better,
        rejected=pairs.worse,
        p=pairs.p,
        margin=pairs.margin,
        weight=pairs.weight,
        shift=shift)

    losses = loss.function(x, args)                                              # (M,) or (K,)
    if args.sft_coef:
        losses = losses - args.sft_coef * x.policy[x.chosen] / x.n_w             # (M,)  (10)
    weight = x.weight if loss.per == "pair" else torch.ones_like(losses)
    sums = measure(x, losses.detach(), weight, args)
    return (losses * weight).sum(), sums


def outcome(margin, args):
    """(M,) differences of implicit rewards → 1 right, 0 wrong, 1/2 a tie."""
    tie = TIE * (args.beta or 1.0)
    return 0.5 * (1 + torch.where(margin.abs() > tie, margin.sign(), 0))


@torch.no_grad()
def measure(x, losses, weight, args):
    """Sums of the metrics over some groups, each prompt counting as one → Counter."""
    sums = Counter(loss=(losses * weight).double().sum().item())
    rewards = (args.beta or 1.0) * x.D                                           # (K,)
    if len(x.chosen) == 0:               # single completions: the good count as chosen
        for name, these in (("chosen", x.label), ("rejected", ~x.label)):
            sums[f"count/{name}"] = these.sum().item()
            sums[f"logps/{name}"] = x.policy[these].double().sum().item()
            sums[f"rewards/{name}"] = rewards[these].double().sum().item()
        return sums

    chosen = rewards[x.chosen]                                                   # (M,)
    rejected = rewards[x.rejected]                                               # (M,)
    margin = chosen - rejected
    values = {
        "logps/chosen": x.policy[x.chosen],
        "logps/rejected": x.policy[x.rejected],
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margin,
        "rewards/accuracies": outcome(margin, args)}
    if LOSSES[args.loss].reference:
        values["chosen_fell"] = (chosen < -TIE * (args.beta or 1.0)).float()
    for name, value in values.items():
        sums[name] = (value * x.weight).double().sum().item()
    return sums


def means(sums, groups, args):
    """Sums over a whole step or split → means: the loss by its normaliser, all else per prompt; of
    single completions per good and per bad one, absent where there is none."""
    result = {}
    for name, value in sums.items():
        count = sums.get(f"count/{name.split('/')[-1]}", len(groups))
        if count and not name.startswith("count/"):
            result[name] = value / count
    result["loss"] = sums["loss"] / normaliser(groups, args)
    return result


# --- labels and baselines -------------------------------------------------------------------------

def prepare(groups, account, args):
    """What --loss makes of the rows before they are tokenised → groups."""
    loss = LOSSES[args.loss]
    if args.reward_model:                                # it labels those that a step uses, later
        groups = readable(groups, account, args)
    elif "reward_model" in loss.flags:
        label_by_columns(groups, args)
    else:
        common.read_soft_labels(groups, args.label_smoothing)
        soft = [g for g in groups if g.p_chosen is not None]
        if soft and "label_smoothing" not in loss.flags:
            print(f"  --loss {args.loss} reads the column p_chosen of {len(soft):,} rows only to "
                  "see which completion is the better one")
        elif args.loss == "robust" and any(g.p_chosen == 0.5 for g in soft):
            fail(f"{account.source}: --loss robust divides by 2 p_chosen − 1, which is 0 in a row.")

    ranked = [g for g in groups if len(g.scores) < 2 or len(set(g.scores)) > 1]
    groups = account.drop(groups, ranked, "where no completion is better than another")
    if args.loss == "sft":
        whole = [g for g in groups if g.ended != [False]]    # no end token belongs behind others
        groups = account.drop(groups, whole, "that were truncated when sampled")
        kept = [g for g in groups if g.scores != [0]]    # no use for a bad completion …
        for g in account.drop(groups, kept, "with label false"):
            del g.completions[1:], g.scores[1:]          # … nor for the rejected one
        return kept
    if args.loss == "kto":
        singles = []
        for g in groups:
            for text, score in zip(g.completions, g.scores):
                singles.append(replace(g, completions=[text], scores=[score]))
        good = sum(g.scores == [1] for g in singles)
        if 0 < good < len(singles):
            ratio = (len(singles) - good) / good
            print(f"  {good:,} good and {len(singles) - good:,} bad completions: the paper wants "
                  f"λ_D/λ_U in [{ratio:.2f}, {4 / 3 * ratio:.2f}] (--desirable-weight, "
                  "--undesirable-weight)")
        return singles
    return groups


def label(group, first, second, args):
    """p_chosen and margin of a pair from its two rewards; the better completion comes first (12)"""
    if first < second:
        for column in (group.completions, group.completion_ids, group.ended):
            column.reverse()
    group.margin = abs(first - second) / args.reward_temperature
    group.p_chosen = 1 / (1 + math.exp(-group.margin))


def label_by_columns(groups, args):
    """Rewards that stand in the rows: score_chosen and score_rejected, or for soft p_chosen."""
    unscored = []
    for g in groups:
        if g.row.get("score_chosen") in (None, ""):
            unscored.append(g)
            continue
        first = common.number(g.row, "score_chosen", g.where)
        second = common.number(g.row, "score_rejected", g.where)
        label(g, first, second, args)

    common.read_soft_labels(unscored, 0.0)
    for g in unscored:
        if args.loss == "distill" or g.p_chosen is None:
            fail(f"{g.where}: --loss {args.loss} needs rewards: --reward-model DIR, or the columns "
                 "score_chosen and score_rejected that score.py --output writes.")
        if args.reward_temperature != 1:
            fail(f"{g.where}: --reward-temperature divides rewards; this row has p_chosen only.")


def readable(groups, account, args):
    """The groups that fit the positions of --reward-model."""
    if not common.has_reward_head(args.reward_model, "--reward-model"):
        fail(f"--reward-model {args.reward_model} is a language model; train_rm.py makes a reward "
             "model of it.")
    encoder = common.load_encoder(args.reward_model, chat=args.chat, flag="--reward-model")
    if encoder.max_positions == math.inf:
        return groups
    views = [replace(g) for g in groups]
    own = replace(account, dropped=Counter())
    fits = common.tokenise(views, own, encoder, encoder.max_positions, progress="measure")
    fits = set(map(id, fits))
    kept = [g for g, view in zip(groups, views) if id(view) in fits]
    reason = f"over the {encoder.max_positions} positions of --reward-model"
    return account.drop(groups, kept, reason)


def label_by_model(groups, args, device):
    """Labels pairs by --reward-model, which has its own tokeniser and template → its hash."""
    encoder = common.load_encoder(args.reward_model, chat=args.chat, flag="--reward-model")
    model = common.load_reward_model(args.reward_model, encoder, device)
    copies = [encoder(replace(g)) for g in groups]
    packed = common.can_pack(model, copies, reward_scores)
    autocast = common.pick_autocast(args.dtype, device)
    scores = for_all(
        reward_scores, model, copies, args.micro_batch_tokens, packed, autocast, "label pairs")
    for g, (first, second) in zip(groups, scores.view(-1, 2).tolist()):
        label(g, first, second, args)
    return common.model_fingerprint(model)


def mismatch(groups, max_length, seed):
    """For every prompt a completion that belongs to another one, to estimate KL(π‖π_ref) for kto.

    The paper rotates the completions of a batch; rotated here are those of a shuffle of all rows,
    so neither the order of the file nor the batch size matters, and π_ref is measured beforehand.
    """
    order = list(range(len(groups)))
    random.Random(f"{seed} mismatch").shuffle(order)
    others = [None] * len(groups)
    twice = order * 2
    for place, i in enumerate(order):
        turned = twice[place + 1:place + min(1001, len(order))]
        foreign = [j for j in turned if groups[j].prompt_ids != groups[i].prompt_ids]
        if not foreign:
            fail("--loss kto needs completions of two different prompts, and all rows have one.")
        ids = groups[foreign[0]].completion_ids[0][:max_length - len(groups[i].prompt_ids)]
        others[i] = replace(groups[i], completion_ids=[ids], scores=[])
    return others


def reference_logps(model, fingerprint, groups, held_out, args, autocast):
    """What is measured once, at the start → tensors, and the file of --output-dir that keeps them.

    logps (N,): log π_ref of the completions of these groups, NaN for others; 0 for a loss without
    reference.
    tokens (T,): that of every token of the held-out completions, of whose change the evaluation
    tells. The file's name is a hash of all that the numbers depend on: config and weights of the
    model, every token id (so tokeniser, template, lengths and rows), the dtype.
    """
    reference = LOSSES[args.loss].reference
    parts = [fingerprint, common.data_fingerprint(groups + held_out)]
    parts += [args.dtype, next(model.parameters()).device.type, str(reference)]
    name = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
    file = Path(args.output_dir) / "ref_logps" / f"{name}.safetensors"
    if common.first(file.exists):
        print(f"reference log-probs: read from {file}")
        with common.failing(f"{file}: cannot be read; without it they are computed again"):
            return common.first(load_file, file), file

    packed = common.can_pack(model, groups)
    budget = args.micro_batch_tokens
    index = [i for g in groups for i in g.index]
    logps = torch.full((max(index) + 1,), math.nan if reference else 0.0)
    tokens = torch.zeros(0)
    if reference:
        logps[index] = for_all(
            completion_logps, model, groups, budget, packed, autocast, "reference log-probs")
    if held_out:
        tokens = for_all(
            token_logps, model, held_out, budget, packed, autocast, "held-out log-probs")
    return {"logps": logps, "tokens": tokens}, file


# --- evaluation -----------------------------------------------------------------------------------

def change(groups, now, start):
    """How the log-probs of the held-out chosen completions moved since the start, or from those of
    --ref-model.

    now, start: (T,) per token. Where both log-probs fall, it is mostly the opening phrase that
    does.
    """
    first = 5                                            # tokens of the opening phrase
    lengths = torch.tensor([len(ids) for g in groups for ids in g.completion_ids])
    opening = []
    for part in (now - start).split(lengths.tolist()):
        opening.append(torch.stack([part[:first].sum(), part[first:].sum()]))
    opening, rest = torch.stack(opening).T               # (N,) each
    best = []                                            # of each prompt, but no bad single one
    for g in groups:
        if g.scores != [0]:
            k = g.scores.index(max(g.scores)) if g.scores else 0
            best.append(g.index[k] - groups[0].index[0])
    if not best:
        return {}

    total = (opening + rest)[best]
    length = lengths[best]
    median = length.float().median()
    result = {"chosen_change": total.mean().item()}
    for name, these in (("short", length <= median), ("long", length > median)):
        if these.any():
            result[f"chosen_change_{name}"] = total[these].mean().item()
    result["chosen_fell"] = (total < -TIE).double().mean().item()
    result["chosen_change_opening"] = opening[best].mean().item()
    result["chosen_fell_opening"] = (opening[best] < -TIE).double().mean().item()
    later = rest[best][length > first]
    if len(later):
        result["chosen_change_rest"] = later.mean().item()
        result["chosen_fell_rest"] = (later < -TIE).double().mean().item()
    return result


def evaluate(
        model, encoder, groups, at_start, shift, args, packed, autocast, show=0, moved=True):
    """Exact means over all held-out groups (never a mean of batch means), and samples.

    at_start: what reference_logps() gives. moved: False at step 0, where the KL is 0.
    """
    tokens = for_all(
        token_logps, model, groups, args.micro_batch_tokens, packed, autocast, "evaluate")
    lengths = torch.tensor([len(ids) for g in groups for ids in g.completion_ids])
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    logps = common.sum_by(tokens, owner, len(lengths))
    sums = micro_loss(logps, at_start["logps"], shift, groups, args)[1]
    pairs = compare(groups)
    result = means(sums, groups, args) | {"n": len(pairs.better) or len(groups)}
    result |= change(groups, tokens, at_start["tokens"])
    if len(pairs.better):                                # pairs of one prompt: not independent
        ratio = logps - at_start["logps"][[i for g in groups for i in g.index]]
        margin = (args.beta or 1.0) * (ratio[pairs.better] - ratio[pairs.worse])
        cluster = common.number_prompts(groups)[pairs.prompt]
        right = common.proportion(outcome(margin, args), cluster, pairs.weight)
        result["accuracy_se"] = right.half
    result |= sample_answers(model, encoder, groups, args, packed, autocast, show, moved)
    return {f"eval/{name}": value for name, value in result.items()}


def sample_answers(model, encoder, groups, args, packed, autocast, show, moved):
    """Samples for held-out prompts: their KL from the reference, and where rows have an `answer`,
    the fraction that equals it."""
    by_prompt = {tuple(g.prompt_ids): g for g in groups}                         # each prompt once
    asked = list(by_prompt.values())
    with_answer = [g for g in asked if isinstance(g.row.get("answer"), (str, int, float))]
    asked = (with_answer or asked)[:args.eval_samples]
    longest = max(len(ids) for g in groups for ids in g.completion_ids)
    room = encoder.max_positions - max((len(g.prompt_ids) for g in asked), default=0)
    if not asked or room <= 0:
        return {}

    prompts = [g.prompt_ids for g in asked]
    limit = int(min(2 * longest, 256, room))
    with autocast:
        samples = common.sample(
            model, prompts, 1, limit, encoder.stops, seed=args.seed, progress="sample")
    texts = [encoder.decode(s.ids, g.prompt).strip() for g, s in zip(asked, samples)]
    for g, s, text in list(zip(asked, samples, texts))[:show]:
        note = "" if s.ended else "  (truncated)"
        tqdm.write(f"  {encoder.text(g.prompt_ids)[-80:]!r} ▸ {text[:200]!r}{note}")

    result = {"kl": 0.0}
    if moved or args.ref_model:
        own = [replace(g, completion_ids=[s.ids]) for g, s in zip(asked, samples)]
        result = own_kl(model, encoder, own, args, packed, autocast)
    if with_answer:
        answers = [str(g.row["answer"]).strip() for g in asked]
        correct = torch.tensor([text == answer for text, answer in zip(texts, answers)])
        right = common.proportion(correct, torch.arange(len(asked)))         # a prompt each
        result |= {"right": right.mean, "right_se": right.half, "right_n": len(asked)}
    return result


def own_kl(model, encoder, own, args, packed, autocast):
    """KL(π‖π_ref) per completion, from the policy's own samples; the reference is loaded for it,
    unless it is the policy without its adapter."""
    device = next(model.parameters()).device
    budget = args.micro_batch_tokens
    ours = for_all(completion_logps, model, own, budget, packed, autocast, "KL")
    reference = model                                    # with LoRA: its adapter off
    if args.ref_model or not args.lora_rank:
        path = args.ref_model or args.model
        reference = common.load_model(path, encoder, device, "--ref-model")
    if args.ref_model:
        packed = packed and common.can_pack(reference, own)
    with common.adapter_off(reference):
        theirs = for_all(completion_logps, reference, own, budget, packed, autocast, "KL")
    ratio = (ours - theirs).double()
    error = ratio.std(correction=1).item() / math.sqrt(len(ratio)) if len(ratio) > 1 else math.inf
    return {"kl": ratio.mean().item(), "kl_se": error}


def eval_line(step, result, expected=None):
    """One line for the terminal; expected: the loss that theory says."""
    r = {name.removeprefix("eval/"): value for name, value in result.items()}
    line = f"step {step}: eval loss {r['loss']:.4f}"
    if expected is not None:
        line += f" (expected {expected:.4f})"
    if "rewards/margins" in r:
        margin = round(r["rewards/margins"], 3) + 0.0    # + 0.0: -0.000 becomes 0.000
        line += f", accuracy {100 * r['rewards/accuracies']:.1f} ± {100 * r['accuracy_se']:.1f} %"
        line += f" of {r['n']} pairs, margin {margin:.3f}"
        line += f", log π chosen {r['logps/chosen']:.2f} rejected {r['logps/rejected']:.2f}"
    if "chosen_fell" in r:
        line += f", chosen fell in {100 * r['chosen_fell']:.0f} %"
    if "kl" in r:
        line += f", KL {r['kl']:.2f}"
    if "right" in r:
        line += f", correct samples {100 * r['right']:.1f} ± {100 * r['right_se']:.1f} %"
        line += f" of {r['right_n']}"
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

def main(argv=None):
    args = parse_args(argv)
    # --- setup
    loss = LOSSES[args.loss]
    usable = [name for name, row in FORMATS.items() if row.gives in loss.gives]

    # --- shared: setup ---
    device = common.join_processes(args.device)
    autocast = common.pick_autocast(args.dtype, device)
    encoder = common.load_encoder(args.model, args.chat_template, args.chat)
    max_length = common.fitting_length(args, encoder)
    # --- end shared ---

    train, held_out = common.load_data(args, encoder, usable, max_length, prepare)
    # --- shared: plan ---
    plan = Plan(len(train), args.batch_size, args.epochs, args.max_steps, args.seed)
    # Hashes of what the run depends on beside its flags: --resume compares them.
    depends = {"data_sha256": common.data_fingerprint(train + held_out)}
    # --- end shared ---
    every = train + held_out
    others = []
    if loss.shift == "mismatched":
        others = mismatch(every, max_length, args.seed)
        common.number_completions(every + others)
    # Of the rows that no step uses, nothing is computed.
    used = [*plan.used(), *range(len(train), len(every))]
    measured = [every[i] for i in used]
    if args.reward_model:
        depends["reward_model_sha256"] = label_by_model(measured, args, device)
    if others:
        measured += [others[i] for i in used]

    # The reference is measured before the policy is loaded, or is the policy: never two in memory.
    options = (measured, held_out, args, autocast)
    if args.ref_model:
        other = common.load_encoder(args.ref_model, flag="--ref-model")
        common.check_same_tokeniser(encoder, other, f"--ref-model {args.ref_model}")
        reference = common.load_model(args.ref_model, encoder, device, "--ref-model")
        depends["reference_sha256"] = common.model_fingerprint(reference)
        at_start, file = reference_logps(reference, depends["reference_sha256"], *options)
        del reference
    model = common.load_model(args.model, encoder, device)
    packed = common.can_pack(model, train)
    depends["model_sha256"] = common.model_fingerprint(model)
    if not args.ref_model:
        at_start, file = reference_logps(model, depends["model_sha256"], *options)

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
    if common.first(lambda: not file.exists()):
        common.save_tensors(at_start, file)
    ref_logps = at_start["logps"]

    def baseline(groups):
        """x.shift: of the log-ratios of these groups, in nats."""
        if loss.shift != "mismatched":
            return extra.get("shift", 0.0)
        foreign = [others[g.index[0]] for g in groups]
        budget = args.micro_batch_tokens
        logps = for_all(completion_logps, model, foreign, budget, packed, autocast, "")
        ref = ref_logps[[g.index[0] for g in foreign]]
        return max(0.0, (logps - ref).mean().item())     # no KL is negative, an estimate may be

    def look(step, show=0):
        """Evaluates after `step` updates, for metrics.jsonl and the terminal."""
        shift = baseline(held_out)
        result = evaluate(
            model, encoder, held_out, at_start, shift, args, packed, autocast, show,
            moved=step > 0)
        log(out, step, result)
        expected = None                                  # the loss where π = π_ref
        if step == 0 and loss.reference and not args.ref_model:
            ref = ref_logps[[i for g in held_out for i in g.index]]
            sums = micro_loss(ref, ref_logps, 0.0, held_out, args)[1]
            expected = means(sums, held_out, args)["loss"]
        tqdm.write(eval_line(step, result, expected))

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

    # --- loop
    for step in bar:
        began = time.perf_counter()
        groups = [train[i] for i in plan[step]]
        sums = Counter()
        shift = baseline(groups)

        # The gradient of the whole step, summed over micro-batches (memory, not statistics).
        optimizer.zero_grad(set_to_none=True)
        for micro, weight in common.my_micro_batches(groups, args.micro_batch_tokens, packed):
            with autocast:
                batch = common.lay_out(model, micro, packed)
                logps = completion_logps(model, batch)                          # (K,)
            part, part_sums = micro_loss(logps, ref_logps, shift, micro, args)
            (part * weight / normaliser(groups, args)).backward()
            sums.update(part_sums if weight else {})
        sums = common.total(sums)

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

        metrics = means(sums, groups, args)
        metrics["grad_norm"] = grad_norm.item()
        metrics["learning_rate"] = lr_at(step, len(plan), args)
        tokens = sum(g.tokens() for g in groups)
        metrics["tokens_per_second"] = tokens / (time.perf_counter() - began)
        shown = {"loss": "loss", "acc": "rewards/accuracies", "margin": "rewards/margins"}
        if loss.shift == "running":                      # kept in the checkpoint
            mean = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / (2 * args.beta)
            extra["shift"] = 0.9 * extra.get("shift", 0.0) + 0.1 * mean

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
    common.save_model(out, model, encoder.tokenizer, adapter)
    print(f"saved in {out}: model, args.json, metrics.jsonl, checkpoint/")


if __name__ == "__main__":
    common.run(main)
