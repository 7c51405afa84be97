"""Train a reward model: one number for how good a completion is, learnt from pairs or ranked lists.

    python train_rm.py                                   # 10 seconds on two CPU cores, no network
    python train_rm.py --model Qwen/Qwen2.5-0.5B-Instruct --lr 1e-5 \\
        --dataset trl-lib/ultrafeedback_binarized

With no flags it trains on the toy of tests/toy (sums) and ends with the fraction of unseen sums
whose correct completion it prefers: about 99 %. Before the first step that is whatever the random
head gives (54.5, 21.0, 32.5 % for seeds 0 to 2); it is measured and reported, and beside its loss
stands that of an uninformative score: 0.6931 = log 2. A head that starts at zero begins there and
ranks as well at the end, but its scores stay smaller: held-out loss 0.17 instead of 0.07.

Differs from the papers in: the score is read at the last token *by length*, whatever its id, and
the head has no bias (a constant changes no comparison). The result is a plain
AutoModelForSequenceClassification with one label: plain transformers gives the same scores on
text + EOS, padded on the right, unless the EOS is also the pad token: then it takes the final EOS
for padding and reads the token before. Variants are one function and one row of LOSSES each.
"""
# --- derivation -----------------------------------------------------------------------------------
#
# Notation: x prompt, y completion, y_w chosen ("wins"), y_l rejected ("loses"), r(x, y) the score,
# one real number, r_w = r(x, y_w), r_l = r(x, y_l), h = r_w − r_l, σ(z) = 1 / (1 + e^−z).
#
# 1. What people compare. The Bradley–Terry model (an assumption: one scalar utility for all,
#    logistic noise) says
#
#        p(y_w ≻ y_l | x) = e^{r_w} / ( e^{r_w} + e^{r_l} ) = σ( r_w − r_l )                   (1)
#        L_BT = −E log σ( h )                                                                  (2)
#
#    Where all scores are equal, h = 0 and L = log 2 = 0.6931. The noise fixes the unit: a score
#    higher by 1 wins 73 % of the comparisons, by 3 95 %.
#
# 2. Only differences matter. For any function f of the prompt
#
#        r'(x, y) = r(x, y) + f(x)   has the same h, the same p and the same L                 (3)
#
#    so rewards come in equivalence classes, and comparisons cannot tell their members apart. A raw
#    score therefore means nothing alone, nor beside another model's, and scores of different
#    prompts compare only as far as the model happens to put them on one scale. That is why mean,
#    std and length curve of the training completions' scores are saved.
#
# 3. The gradient, and what a pair contributes:
#
#        ∇L_BT = −σ( −h ) [ ∇ r_w − ∇ r_l ]                                                    (4)
#
#    σ(−h) is the probability that the model gives to the opposite order: near 1 for pairs that are
#    ranked the wrong way, near 0 for those that are settled. Nothing stops h on separable data:
#    hence few epochs, or label noise.
#
# 4. A label that is right only with probability p (label smoothing ε: p = 1 − ε; a column p_chosen:
#    its own p):
#
#        L = −p log σ( h ) − (1 − p) log σ( −h ),    least at σ(h) = p                         (5)
#
#    Hard labels drawn from (1) for some r*, or p_chosen equal to (1): the minimum is r = r* up to
#    (3), so h is calibrated, which eval/ece checks. That needs no margin and no smoothing: ε moves
#    σ(h) to 1 − ε even where every label is right, and with margins the loss is no likelihood. A
#    column margin says by how much the better completion is better (Touvron et al. 2023, Llama 2,
#    arXiv 2307.09288, eq. 2):
#
#        L = −p log σ( h − m ) − (1 − p) log σ( −h − m )    m ≥ 0, whichever is better         (6)
#
#    Its minimum exaggerates: with p = 0.9 and m = 1 it is at σ(h) = 0.957.
#
# 5. Ranked lists. K completions of one prompt hold up to K(K−1)/2 pairs i ≻ j (ties hold none):
#
#        L = −1/n Σ_{i≻j} log σ( r_i − r_j ),    n = K(K−1)/2 without ties                     (7)
#
#    (Ouyang et al. 2022, InstructGPT, arXiv 2203.02155, eq. 1.) All pairs of a prompt stay in one
#    batch: each completion is in K − 1 of them, and spread over the steps of an epoch they would be
#    K − 1 passes over the same text, while a reward model overfits in a second pass. It is also
#    cheaper: K completions and one prompt in the forward, not K(K−1) completions. The weight 1/n
#    makes a prompt count as one, however many completions it has. `--loss plackett-luce` reads the
#    list as successive choices instead, each time the best of those that are left:
#
#        p( y_1 ≻ … ≻ y_K ) = Π_k e^{r_k} / Σ_{j≥k} e^{r_j},    for K = 2 it is (1)            (8)
#        L_PL = Σ_k [ log Σ_{j≥k} e^{r_j} − r_k ]               equal scores: log K!           (9)
#
#    Ties are not compared: each is a choice out of itself and those that are strictly worse.
#
# 6. Centring, `--center-coef c`, picks the member of the class (3) whose prompts have mean score 0
#    (Eisenstein et al. 2023, arXiv 2312.09244, who have pairs only; mean over prompts):
#
#        L + c ( 2/K Σ_k r_k )²,    for a pair c ( r_w + r_l )²                               (10)
#
#    It moves the mean of a prompt's scores while (4) moves their differences: it fixes the offset
#    and not what is preferred. The sum of (r_i + r_j)² over all pairs of a list would not do: it is
#    (K − 2) Σ r² + (Σ r)², and its first term shrinks the differences. A large c would still cost
#    capacity; 0.01 is usual.
#
# 7. Single completions, each with a label, good or bad (`--loss pointwise`): a verifier. The score is
#    the log-odds of "good", so it has an absolute meaning, and (3) does not hold:
#
#        L = −p log σ( r ) − (1 − p) log σ( −r ),    p = 1 − ε where good, else ε             (11)
#
#    The head has no bias: the share of good completions is learnt by the weights.
#
# 8. What a reward model is not. It has learnt what tells chosen from rejected *here*: length, lists
#    and a confident tone do so in most data. Hence accuracy is reported where the chosen completion
#    is the longer and where it is the shorter, beside that of length alone. Off the data its score
#    is an extrapolation, and an optimiser looks exactly there: the more a policy is pushed, the
#    more it finds completions that score well and are not good (Goodhart; Gao et al. 2022, arXiv
#    2210.10760). How accurate can it be? Two people agree in a = 65 to 75 % of such pairs. If each
#    is right with probability q, then a = q² + (1 − q)² and q is 77 to 85 %: the accuracy, against
#    one person's labels, of a model that is always right. More than that on human labels is a leak;
#    the labels of an AI are more consistent and allow more.

# --- imports --------------------------------------------------------------------------------------
import argparse
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import FORMATS, Plan, compare, fail, for_all, log, reward_scores, within

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
    g = p.add_argument_group("reward model")
    losses = [f"{name}: {row.function.__doc__.splitlines()[0]}" for name, row in LOSSES.items()]
    g.add_argument("--loss", choices=LOSSES, default="bradley-terry", help="; ".join(losses))
    g.add_argument("--label-smoothing", type=within("[0, 0.5)"), default=0.0, help="probability that a label is wrong (5)")
    g.add_argument("--center-coef", type=within("[0, inf)"), default=0.0, help="weight of (2 · mean score of a prompt)², which fixes the offset (10)")
    p.set_defaults(dataset=f"{TOY}/pairs.jsonl", learning_rate=3e-4)
    args = p.parse_args(argv)

    # A flag that the loss does not read is refused: ignored, it would seem to have had its effect.
    for flag in ("label_smoothing", "center_coef"):
        if getattr(args, flag) != p.get_default(flag) and flag not in LOSSES[args.loss].reads:
            p.error(f"--loss {args.loss} does not read --{flag.replace('_', '-')}: drop it")
    common.check_run(args, ("model", "dataset", "eval_dataset", "chat_template"))
    return args


# --- the algorithm: pure functions ----------------------------------------------------------------
# Shapes: K completions, M pairs of them. Scores and losses are float32 in training, float64 in
# evaluation.

@dataclass
class Completions:
    """What a loss sees of some groups: their completions, and which are better than which."""
    rewards: torch.Tensor     # (K,) r(x, y)
    chosen: torch.Tensor      # (M,) index of the better completion of each pair
    rejected: torch.Tensor    # (M,) index of the worse one
    p: torch.Tensor           # (M,) probability that the label is right
    margin: torch.Tensor      # (M,) by how much the better one is better
    weight: torch.Tensor      # (M,) 1 / pairs of the same prompt, the 1/n of (7)
    p_good: torch.Tensor | None = None   # (K,) probability that the completion is good (pointwise)

    @property
    def h(self):
        return self.rewards[self.chosen] - self.rewards[self.rejected]           # (M,)


def bradley_terry(x, args):
    """−log σ(r_w − r_l), mean over the pairs of a prompt (Ouyang et al. 2022, eq. 1)

    With margins, label smoothing and soft labels; mean over prompts. → (M,)
    """
    right = F.logsigmoid(x.h - x.margin)                                         # (M,)
    wrong = F.logsigmoid(-x.h - x.margin)                                        # (M,)
    return -x.p * right - (1 - x.p) * wrong                                      # (M,)  (6) (7)


def plackett_luce(x, args):
    """successive choices of the best completion that is left (9)

    Sum over the choices of a list, mean over prompts. No label noise, no margins. → (K,)
    """
    return common.choice_losses(x.rewards, x.chosen, x.rejected)                 # (K,)  (9)


def pointwise(x, args):
    """cross-entropy of σ(r) with the label of each completion: a verifier (11)

    No comparisons; mean over completions. → (K,)
    """
    good = F.logsigmoid(x.rewards)                                               # (K,)
    bad = F.logsigmoid(-x.rewards)                                               # (K,)
    return -x.p_good * good - (1 - x.p_good) * bad                               # (K,)  (11)


class Loss(NamedTuple):
    """A row of LOSSES: the function, and what the loop must know of it."""
    function: Callable        # (Completions, args) → losses of pairs (M,) or completions (K,)
    gives: tuple              # formats it can use, by what they give: see common.FORMATS
    per: str                  # a prompt's loss: mean over its "pairs" or sum over "completions"
    reads: tuple              # the flags that change it; another one is refused
    columns: tuple            # the columns of pairs that change it; another one is refused


LOSSES = {
    "bradley-terry": Loss(
        bradley_terry, gives=("pair", "list"), per="pairs",
        reads=("label_smoothing", "center_coef"), columns=("p_chosen", "margin")),
    "plackett-luce": Loss(
        plackett_luce, gives=("pair", "list"), per="completions",
        reads=("center_coef",), columns=()),
    "pointwise": Loss(
        pointwise, gives=("label",), per="completions", reads=("label_smoothing",), columns=()),
}


def labels(groups, rewards):
    """1 for the good and 0 for the bad of single completions; of others nothing: (K,)"""
    column = [score if len(g.scores) == 1 else 0.5 for g in groups for score in g.scores]
    return torch.tensor(column, dtype=rewards.dtype, device=rewards.device)


def micro_loss(rewards, groups, args):
    """Scores of a micro-batch → (sum of its losses, Counter of metric sums).

    rewards: (K,) as reward_scores() gives them. The caller divides by counts of the whole step:
    nothing here divides by a number of the micro-batch, so how a step is cut into micro-batches
    does not change its gradient.
    """
    loss = LOSSES[args.loss]
    pairs = compare(groups, args.label_smoothing, rewards.device)
    x = Completions(
        rewards=rewards,
        chosen=pairs.better,
        rejected=pairs.worse,
        p=pairs.p,
        margin=pairs.margin,
        weight=pairs.weight,
        p_good=labels(groups, rewards).clamp(args.label_smoothing, 1 - args.label_smoothing))

    losses = loss.function(x, args)                                              # (M,) or (K,)
    weight = x.weight if loss.per == "pairs" else torch.ones_like(losses)
    terms = losses * weight
    if args.center_coef:
        sizes = torch.tensor([len(g.completion_ids) for g in groups], device=rewards.device)
        owner = torch.arange(len(groups), device=rewards.device).repeat_interleave(sizes)
        middle = common.sum_by(rewards, owner, len(groups)) / sizes              # (groups,)
        terms = torch.cat([terms, args.center_coef * (2 * middle) ** 2])         # (10)
    sums = measure(x, terms.detach())
    return terms.sum(), sums


@torch.no_grad()
def measure(x, terms):
    """Sums of the metrics over some groups, each prompt counting as one → Counter."""
    sums = Counter(loss=terms.double().sum().item())
    if len(x.chosen) == 0:                               # single completions
        right = 0.5 * (1 + (x.rewards * (2 * x.p_good - 1)).sign())
        sums["rewards/accuracies"] = right.double().sum().item()
        return sums
    values = {
        "rewards/chosen": x.rewards[x.chosen],
        "rewards/rejected": x.rewards[x.rejected],
        "rewards/margins": x.h,
        "rewards/accuracies": 0.5 * (1 + x.h.sign())}    # ties count half
    for name, value in values.items():
        sums[name] = (value * x.weight).double().sum().item()
    return sums


def means(sums, groups):
    """Sums over a whole step or split → means per prompt."""
    return {name: value / len(groups) for name, value in sums.items()}


# --- evaluation -----------------------------------------------------------------------------------

def completion_lengths(groups):
    """Tokens of every completion, end included: (N,) float64."""
    lengths = [len(ids) for g in groups for ids in g.completion_ids]
    return torch.tensor(lengths, dtype=torch.float64)


def correlation(x, y):
    """Pearson's, or None where one of the two is constant."""
    x_centred = x - x.mean()
    y_centred = y - y.mean()
    norms = (x_centred.norm() * y_centred.norm()).item()
    return (x_centred @ y_centred).item() / norms if norms > 0 else None


def calibration_error(correct, sure):
    """ECE of M pairs: of each bin |fraction correct − mean probability|, weighted by its pairs."""
    bins = ((sure - 0.5) * 10).long().clamp(max=4)                               # (M,)
    return common.sum_by(correct - sure, bins, 5).abs().sum().item() / len(sure)


def evaluate(groups, scores, args):
    """Exact means over all pairs of the groups (never a mean of batch means); scores: (N,).

    eval/ece: expected calibration error of σ(h) in ten bins. Every pair is taken both ways (h with
    label 1, −h with label 0), for with the chosen one always first the label would say nothing. The
    two ways mirror each other, so five bins over the probability of the preferred side, 0.5 to 1,
    hold the same number.
    eval/ece_floor: what it would be of a perfectly calibrated model with these h, by chance alone;
    about 0.05 for 200 pairs.
    eval/auc, of single completions: how often a good one scores higher than a bad one.
    eval/length_accuracy: what the better of "the longer wins" and "the shorter wins" gets right,
    without any model.
    """
    rewards = scores.double()                                                    # (N,)
    lengths = completion_lengths(groups)                                         # (N,)
    pairs = compare(groups)
    prompt = common.number_prompts(groups)                                       # (groups,)
    h = rewards[pairs.better] - rewards[pairs.worse]                             # (M,)
    cluster = prompt[pairs.prompt]                                               # (M,)
    if args.loss == "pointwise":                             # a completion a group, none a pair
        good = labels(groups, rewards) == 1                                      # (N,)
        h = torch.where(good, rewards, -rewards)
        cluster = prompt
    correct = 0.5 * (1 + h.sign())                                               # (M,) ties half
    accuracy = correct.mean()
    n = len(h)
    result = means(micro_loss(rewards, groups, args)[1], groups)
    result |= {"n": n, "rewards/accuracies": accuracy.item()}

    # What is said of one prompt is not independent.
    result["accuracy_se"] = common.proportion(correct, cluster).half

    sure = torch.sigmoid(h.abs())                                                # (M,) 0.5 … 1
    result["ece"] = calibration_error(correct, sure)
    generator = torch.Generator().manual_seed(0)
    floor = []
    for _ in range(100):
        drawn = torch.rand(n, generator=generator, dtype=torch.float64) < sure
        floor.append(calibration_error(drawn.double(), sure))
    result["ece_floor"] = sum(floor) / 100
    result["score_mean"] = rewards.mean().item()
    result["score_std"] = rewards.std(correction=0).item()

    # What length explains: a model can be no more than a ruler.
    trend = correlation(rewards, lengths)
    if trend is not None:
        result["length_correlation"] = trend
    if args.loss == "pointwise":
        if good.any() and not good.all():
            worse = rewards[~good].sort().values             # of any prompts
            below = torch.searchsorted(worse, rewards[good])                     # ties count half
            not_above = torch.searchsorted(worse, rewards[good], right=True)
            result["auc"] = ((below + not_above) / 2).double().mean().item() / len(worse)
        return {f"eval/{name}": value for name, value in result.items()}
    longer = 0.5 * (1 + (lengths[pairs.better] - lengths[pairs.worse]).sign())   # (M,) 0.5: as long
    for name, value in {"longer": 1, "shorter": 0}.items():
        some = correct[longer == value]
        result[f"n_{name}"] = len(some)
        if len(some):
            result[f"accuracy_{name}"] = some.mean().item()
    fraction = longer.mean().item()
    result["length_accuracy"] = max(fraction, 1 - fraction)
    return {f"eval/{name}": value for name, value in result.items()}


def eval_line(step, result, expected=None):
    """Two lines for the terminal; expected: the loss of an uninformative score."""
    r = {name.removeprefix("eval/"): value for name, value in result.items()}

    def percent(name):
        return f"{100 * r[name]:.1f} %" if name in r else "–"

    line = f"step {step}: eval loss {r['loss']:.4f}"
    if expected is not None:
        line += f" ({expected:.4f} if all scores were equal)"
    line += f", accuracy {100 * r['rewards/accuracies']:.1f} ± {100 * r['accuracy_se']:.1f} %"
    if "rewards/margins" in r:
        line += f" of {r['n']:,} pairs, margin {r['rewards/margins']:.3f}, ECE {r['ece']:.3f}"
    else:
        line += f" of {r['n']:,} completions, AUC {r.get('auc', math.nan):.3f}, ECE {r['ece']:.3f}"
    line += f" (perfect calibration: {r['ece_floor']:.3f})"
    line += f", scores {r['score_mean']:.2f} ± {r['score_std']:.2f}"
    if "rewards/margins" not in r:
        return line
    line += f"\n  length: alone it gets {percent('length_accuracy')}"
    line += f"; accuracy {percent('accuracy_longer')} where the chosen completion is the longer"
    line += f" ({r['n_longer']:,}), {percent('accuracy_shorter')} where the shorter"
    line += f" ({r['n_shorter']:,})"
    return line + f"; correlation with the score {r.get('length_correlation', math.nan):.2f}"


def report_training(out, plan):
    """Prints the accuracy on the training batches, that of the first pass apart.

    In its first pass every batch is unseen when it is scored: that accuracy is an honest one.
    """
    counts = Counter()
    correct = Counter()
    for line in common.read_lines(out / "metrics.jsonl"):
        if "loss" not in line:           # an evaluation
            continue
        step = line["step"] - 1
        name = "repeated passes"
        if step < plan.steps_per_epoch:
            name = "first pass (each batch before it was trained on)"
        counts[name] += len(plan[step])
        correct[name] += len(plan[step]) * line["rewards/accuracies"]
    for name, n in counts.items():
        print(f"training accuracy, {name}: {100 * correct[name] / n:.1f} % of {n:,} groups")


def note_statistics(config, groups, scores):
    """Mean, std and length curve of the scores (N,), into the config.

    With them score.py and GRPO put on one scale the scores of different models and of completions
    of different lengths. Scores without their length trend vary less: their std is kept, too.
    """
    rewards = scores.double()
    lengths = completion_lengths(groups)
    config.reward_mean = rewards.mean().item()
    config.reward_std = rewards.std(correction=0).item()
    config.reward_by_length = common.length_curve(rewards, lengths)
    calibrated = common.calibrate(rewards, lengths, config.reward_by_length, config.reward_mean)
    config.reward_std_calibrated = calibrated.std(correction=0).item()


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

    def prepare(groups, account, args):
        """What this loss makes of the rows, before they are tokenised."""
        columns = loss.columns if FORMATS[account.format].gives == "pair" else ()
        refused = [name for name in ("p_chosen", "margin") if name not in columns]
        for g in groups:
            given = [name for name in refused if g.row.get(name) not in (None, "")]
            if given:
                fail(f"{g.where}: column '{given[0]}' belongs to a pair under --loss "
                     f"bradley-terry; --columns unused={given[0]} takes it away.")
        common.read_soft_labels(groups, args.label_smoothing)
        kept = [g for g in groups if len(set(g.scores)) > 1 or args.loss == "pointwise"]
        return account.drop(groups, kept, "where no completion is better than another")

    # --- shared: setup ---
    device = common.join_processes(args.device)
    autocast = common.pick_autocast(args.dtype, device)
    encoder = common.load_encoder(args.model, args.chat_template, args.chat)
    max_length = common.fitting_length(args, encoder)
    # --- end shared ---
    train, held_out = common.load_data(
        args, encoder, usable, max_length, prepare,
        why=" with this --loss (a reward is learnt from comparisons of completions of the same "
        "prompt, or with --loss pointwise from rows with a label)")
    # --- shared: plan ---
    plan = Plan(len(train), args.batch_size, args.epochs, args.max_steps, args.seed)
    # Hashes of what the run depends on beside its flags: --resume compares them.
    depends = {"data_sha256": common.data_fingerprint(train + held_out)}
    # --- end shared ---

    torch.manual_seed(args.seed)                             # a new head is a function of the seed
    model = common.load_reward_model(args.model, encoder, device, "--model", new_head=True)
    if encoder.tokenizer.pad_token_id is None:               # transformers scores no batch without
        encoder.tokenizer.pad_token_id = model.config.pad_token_id
    packed = common.can_pack(model, train, reward_scores)
    depends["model_sha256"] = common.model_fingerprint(model)

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

    def score_all(groups, what):
        """The scores of all completions of some groups: (N,)."""
        return for_all(
            reward_scores, model, groups, args.micro_batch_tokens, packed, autocast, what)

    def look(step, show=0):
        """Evaluates after `step` updates, for metrics.jsonl and the terminal.

        show: as in the other trainers, whose shared blocks pass it; here there are no samples.
        """
        scores = score_all(held_out, "evaluate")
        result = evaluate(held_out, scores, args)
        log(out, step, result)
        expected = None
        if step == 0:
            expected = evaluate(held_out, torch.zeros_like(scores), args)["eval/loss"]
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

        # The gradient of the whole step, summed over micro-batches (memory, not statistics).
        optimizer.zero_grad(set_to_none=True)
        for micro, weight in common.my_micro_batches(groups, args.micro_batch_tokens, packed):
            with autocast:
                batch = common.lay_out(model, micro, packed)
                rewards = reward_scores(model, batch)                           # (K,)
            part, part_sums = micro_loss(rewards, micro, args)
            (part * weight / len(groups)).backward()
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

        metrics = means(sums, groups)
        metrics["grad_norm"] = grad_norm.item()
        metrics["learning_rate"] = lr_at(step, len(plan), args)
        tokens = sum(g.tokens() for g in groups)
        metrics["tokens_per_second"] = tokens / (time.perf_counter() - began)
        shown = {"loss": "loss", "acc": "rewards/accuracies", "margin": "rewards/margins"}

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
    report_training(out, plan)
    # Statistics of a random sample: more completions would change nothing.
    first_pass = range(min(len(plan), plan.steps_per_epoch))
    some = [train[i] for step in first_pass for i in plan[step]][:5000]
    note_statistics(model.config, some, score_all(some, "statistics"))
    common.save_model(out, model, encoder.tokenizer, adapter)
    ends = {ids[-1] for g in some for ids in g.completion_ids}
    if model.config.pad_token_id in ends:
        print("note: the completions' end token is also the pad token "
              f"({encoder.tokenizer.pad_token}): these scripts read the score at the end token, "
              "plain transformers takes it for padding, reads the token before and gives other "
              "scores")
    print(f"saved in {out}: model, args.json, metrics.jsonl, checkpoint/; scores of the training "
          f"completions: {model.config.reward_mean:.3f} ± {model.config.reward_std:.3f}")


if __name__ == "__main__":
    common.run(main)
