"""Train a reward model: one number for how good a completion is, learnt from pairs or ranked lists.

    python train_rm.py                                   # 10 seconds on two CPU cores, no network
    python train_rm.py --model Qwen/Qwen2.5-0.5B-Instruct --lr 1e-5 \\
        --dataset trl-lib/ultrafeedback_binarized

With no flags it trains on the toy of tests/toy (sums) and ends with the fraction of unseen sums
whose correct completion it prefers: about 99 %. Before the first step a random head decides, and
the loss is printed beside that of equal scores: 0.6931 = log 2.

Differs from the papers in: the head has no bias (a constant changes no comparison). The score is
read at the last token, *by length*, of what the chat template writes, or of text + EOS. The result
is a plain AutoModelForSequenceClassification with one label, and plain transformers gives the same
scores, alone and in padded batches. Variants are one function and one row of LOSSES each.
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
#    so a raw score means nothing alone, nor beside another model's. That is why mean, std and
#    length curve of the training completions' scores are saved.
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
#    Hard labels drawn from (1), or p_chosen equal to (1): the minimum is r up to (3), so h is
#    calibrated, which eval/ece checks. A column margin says by how much the better completion is
#    better (Touvron et al. 2023, Llama 2, arXiv 2307.09288, eq. 2):
#
#        L = −p log σ( h − m ) − (1 − p) log σ( −h − m )    m ≥ 0, whichever is better         (6)
#
# 5. Ranked lists. K completions of one prompt hold up to K(K−1)/2 pairs i ≻ j (ties hold none):
#
#        L = −1/n Σ_{i≻j} log σ( r_i − r_j ),    n = K(K−1)/2 without ties                     (7)
#
#    (Ouyang et al. 2022, InstructGPT, arXiv 2203.02155, eq. 1.) All pairs of a prompt stay in one
#    batch: spread over the steps of an epoch they would be K − 1 passes over the same text, while a
#    reward model overfits in a second pass. The weight 1/n makes a prompt count as one.
#    `--loss plackett-luce` reads the list as successive choices, each the best of what is left:
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
#    It moves the mean of a prompt's scores while (4) moves their differences; 0.01 is usual.
#
# 7. Single completions, each with a label, good or bad (`--loss pointwise`): a verifier. The score
#    is the log-odds of "good", so it has an absolute meaning, and (3) does not hold:
#
#        L = −p log σ( r ) − (1 − p) log σ( −r ),    p = 1 − ε where good, else ε             (11)
#
#    The head has no bias: the share of good completions is learnt by the weights.
#
# 8. What a reward model is not. It has learnt what tells chosen from rejected *here*: length, lists
#    and a confident tone do so in most data. Hence accuracy is reported where the chosen completion
#    is the longer and where it is the shorter, beside that of length alone. Off the data its score
#    is an extrapolation, and an optimiser looks exactly there (Goodhart; Gao et al. 2022, arXiv
#    2210.10760). Two people agree in 65 to 75 % of such pairs: then a model that is always right
#    agrees with one person's labels in 77 to 85 %. More than that on human labels is a leak.

# --- imports --------------------------------------------------------------------------------------
import argparse
import json
import math
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Callable, NamedTuple

import numpy
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

import common
from common import FORMATS, between, compare, fail, for_all

TOY = Path(__file__).parent / "tests" / "toy"
NAME = Path(__file__).stem.removeprefix("train_")    # a copy of this file writes to runs/ITS NAME
SAVE_SECONDS = 600                                   # a checkpoint at least this often


# --- arguments ------------------------------------------------------------------------------------
# Blocks between `shared` marks are the same text in other trainers.

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
    g = p.add_argument_group("reward model")
    losses = [f"{name:14} {row.function.__doc__.splitlines()[0]}" for name, row in LOSSES.items()]
    g.add_argument("--loss", choices=LOSSES, metavar="NAME", default="bradley-terry", help="\n".join(losses))
    g.add_argument("--label-smoothing", type=between(0, 0.499), default=0.0, help="probability that a label is wrong, eq. 5 at the top of this file")
    g.add_argument("--center-coef", type=between(0, 1e6), default=0.0, help="weight of (2 · mean score of a prompt)², which fixes the offset, eq. 10 there")
    p.set_defaults(learning_rate=3e-4)
    args = p.parse_args(argv)

    # A flag that the loss does not read is refused: ignored, it would seem to have had its effect.
    for flag in ("label_smoothing", "center_coef"):
        if getattr(args, flag) and flag not in LOSSES[args.loss].reads:
            p.error(f"--loss {args.loss} does not read --{flag.replace('_', '-')}: drop it")
    return args


# --- the algorithm: pure functions ----------------------------------------------------------------
# Shapes: K completions, M pairs of them.

def bradley_terry(r, h, pairs, p_good):
    """−log σ(r_w − r_l), mean over the pairs of a prompt (Ouyang et al. 2022, eq. 1)"""
    right = F.logsigmoid(h - pairs.margin)                                       # (M,)
    wrong = F.logsigmoid(-h - pairs.margin)                                      # (M,)
    return (-pairs.p * right - (1 - pairs.p) * wrong) * pairs.weight             # (M,)  (6) (7)


def plackett_luce(r, h, pairs, p_good):
    """successive choices of the best completion that is left, no label noise, no margins (9)"""
    left = torch.eye(len(r), dtype=torch.bool, device=r.device)                  # (K, K)
    left[pairs.better, pairs.worse] = True       # itself and what is worse; alone its loss is 0
    return r.masked_fill(~left, -math.inf).logsumexp(1) - r                      # (K,)  (9)


def pointwise(r, h, pairs, p_good):
    """cross-entropy of σ(r) with the label of each completion: a verifier (11)"""
    return -p_good * F.logsigmoid(r) - (1 - p_good) * F.logsigmoid(-r)           # (K,)  (11)


class Loss(NamedTuple):
    """A row of LOSSES: the function, and what the loop must know of it."""
    function: Callable        # (rewards, differences, Comparisons, p_good) → (M,) or (K,) losses
    gives: tuple              # formats it can use, by what they give: see common.FORMATS
    reads: tuple              # the flags that change it; another one is refused


LOSSES = {
    "bradley-terry": Loss(bradley_terry, ("pair", "list"), ("label_smoothing", "center_coef")),
    "plackett-luce": Loss(plackett_luce, ("pair", "list"), ("center_coef",)),
    "pointwise": Loss(pointwise, ("label",), ("label_smoothing",)),
}


def micro_loss(r, groups, args):
    """Scores (K,) of a micro-batch → (sum of its losses, Counter of metric sums).

    The caller divides by counts of the whole step: nothing here divides by a number of the
    micro-batch, so how a step is cut does not change its gradient.
    """
    pairs = compare(groups, args.label_smoothing, r.device)
    h = r[pairs.better] - r[pairs.worse]                                         # (M,)
    good = r.new_tensor([score for g in groups for score in g.scores])           # (K,) pointwise
    p_good = good.clamp(args.label_smoothing, 1 - args.label_smoothing)
    loss = LOSSES[args.loss].function(r, h, pairs, p_good).sum()
    if args.center_coef:
        for part in r.split([len(g.completion_ids) for g in groups]):
            loss = loss + args.center_coef * (2 * part.mean()).square()          # (10)

    # Sums of the metrics, each prompt counting as one; ties count half.
    sums = Counter(loss=loss.item())
    if len(h) == 0:
        sums["rewards/accuracies"] = outcome(r * (2 * p_good - 1)).sum().item()
        return loss, sums
    columns = {"chosen": r[pairs.better], "rejected": r[pairs.worse], "margins": h}
    for name, column in columns.items():
        sums[f"rewards/{name}"] = (column * pairs.weight).double().sum().item()
    sums["rewards/accuracies"] = (outcome(h) * pairs.weight).double().sum().item()
    return loss, sums


def outcome(h):
    """Differences → 1 right, 0 wrong, 1/2 a tie."""
    return 0.5 * (1 + h.detach().sign())


# --- the model ------------------------------------------------------------------------------------
# score.py and train_grpo.py read reward models by these, too.

def load_reward_model(path, encoder, device, new_head=False):
    """A reward model in float32 and eval mode: AutoModelForSequenceClassification with one label.
    new_head=True is for training: a causal LM gets a new random head (torch's generator). For
    scoring it would give numbers that look like scores."""
    trained = common.is_reward_model(path)
    if not trained and not new_head:
        fail(f"{path} is no reward model (with a head for one score); train_rm.py makes one.")
    new = () if trained else ("score.",)
    model = common.load_weights(
        AutoModelForSequenceClassification, path, encoder, device, new, num_labels=1)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        fail(f"{path}: {type(model).__name__} has no linear head called score.")
    return model


@common.through_root
def reward_scores(model, batch):
    """The reward of every completion, read at its last token, found by length: (K,) float32. The
    head is float32: in bfloat16 2,000 scores near 4 collapse to 90 values."""
    hidden = common.hidden_states(model, batch)[batch.last]         # (K, d)
    with torch.autocast(hidden.device.type, enabled=False):
        return model.score(hidden.float())[:, 0].clone()     # of a view FSDP warns


def set_pad_token(model, encoder):
    """Another pad token than EOS for a reward model that is saved: transformers reads the score at
    the last token that is not the pad token, so a final EOS would be taken for padding."""
    tokenizer = encoder.tokenizer
    if tokenizer.pad_token_id in (None, *encoder.stops):
        used = {*encoder.stops, *encoder.bos}
        turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant")]
        for some in (turns, turns[1:]):
            with suppress(Exception):                        # no template, or no system turn in it
                used |= {*encoder.encode(encoder.render(some), control=True)}
        free = sorted(set(tokenizer.all_special_ids) - used)
        if free:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(free[0])
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id


# --- scores and length ----------------------------------------------------------------------------

def calibrate(scores, lengths, curve, mean):
    """Scores without what their length explains: score − curve(length) + mean, (n,) float64 (Huang
    et al. 2024, arXiv 2409.17407). curve: of length_curve(), with straight lines between its knots
    and constant beyond the ends: a line there would be an extrapolation."""
    expected = numpy.interp(lengths, *zip(*curve))
    return torch.as_tensor(scores, dtype=torch.float64) - torch.from_numpy(expected) + mean


def length_curve(scores, lengths, bins=50):
    """(n,), (n,) float64 → [[mean length, mean score], …] of about equally full bins: what length
    alone predicts. A common length has a bin of its own."""
    fractions = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:]
    bin_of = torch.searchsorted(lengths.quantile(fractions).unique(), lengths)   # (below, edge]
    inside = [bin_of == b for b in bin_of.unique()]
    return [[lengths[own].mean().item(), scores[own].mean().item()] for own in inside]


def note_statistics(config, groups, scores):
    """Mean, std and length curve of the scores, into the config: with them score.py and GRPO put
    the scores of different models and of completions of different lengths on one scale."""
    r, lengths = flat(groups, scores)
    config.reward_mean = r.mean().item()
    config.reward_std = r.std(correction=0).item()
    config.reward_by_length = length_curve(r, lengths)
    calibrated = calibrate(r, lengths, config.reward_by_length, config.reward_mean)
    config.reward_std_calibrated = calibrated.std(correction=0).item()


# --- evaluation -----------------------------------------------------------------------------------

def flat(groups, scores):
    """Scores of every group → (scores, lengths) of all completions, (N,) float64 each."""
    lengths = [len(ids) for g in groups for ids in g.completion_ids]
    rewards = torch.tensor([score for part in scores for score in part], dtype=torch.float64)
    return rewards, torch.tensor(lengths, dtype=torch.float64)


def evaluate(groups, scores, args):
    """Exact means, never of batch means: ece and lengths over pairs, the rest over prompts.

    eval/ece: expected calibration error of σ(|h|), the probability of the preferred side, in five
    bins from 0.5 to 1.
    eval/length_accuracy: what the better of "the longer wins" and "the shorter wins" gets right,
    without any model.
    """
    r, lengths = flat(groups, scores)                                            # (N,)
    sums = micro_loss(r, groups, args)[1]
    result = {name: value / len(groups) for name, value in sums.items()}
    pairs = compare(groups)
    h = r[pairs.better] - r[pairs.worse]                                         # (M,)
    owners = [groups[i].prompt_ids for i in pairs.group]
    if args.loss == "pointwise":                             # a completion a group, none a pair
        h = r * torch.tensor([2 * g.scores[0] - 1 for g in groups])
        owners = [g.prompt_ids for g in groups]
    correct = outcome(h)                                                         # (M,)
    accuracy = common.mean_and_error(correct, owners, proportion=True)
    result |= {"n": len(h), "rewards/accuracies": accuracy[0], "accuracy_se": accuracy[1]}
    sure = torch.sigmoid(h.abs())                                                # (M,) 0.5 … 1
    bins = ((sure - 0.5) * 10).long().clamp(max=4)
    result["ece"] = common.sum_by(correct - sure, bins, 5).abs().sum().item() / len(h)
    result |= {"score_mean": r.mean().item(), "score_std": r.std(correction=0).item()}

    # What length explains: a model can be no more than a ruler.
    result["length_correlation"] = torch.corrcoef(torch.stack([r, lengths]))[0, 1].item()
    if args.loss == "pointwise":
        good = torch.tensor([g.scores == [1] for g in groups])
        result["auc"] = outcome(r[good][:, None] - r[~good]).mean().item()   # P(good above bad)
        return {f"eval/{name}": value for name, value in result.items()}
    longer = outcome(lengths[pairs.better] - lengths[pairs.worse])               # (M,) 0.5: as long
    for name, value in {"longer": 1, "shorter": 0}.items():
        result[f"accuracy_{name}"] = correct[longer == value].mean().item()
    result["length_accuracy"] = max(longer.mean().item(), 1 - longer.mean().item())
    return {f"eval/{name}": value for name, value in result.items()}


def eval_line(step, result):
    """One line for the terminal."""
    r = {name.removeprefix("eval/"): value for name, value in result.items()}
    line = f"step {step}: eval loss {r['loss']:.4f}"
    if "loss_expected" in r:
        line += f" ({r['loss_expected']:.4f} if all scores were equal)"
    line += f", accuracy {100 * r['rewards/accuracies']:.1f} ± {100 * r['accuracy_se']:.1f} %"
    line += f" of {r['n']:,}, ECE {r['ece']:.3f}, scores {r['score_mean']:.2f} ± "
    line += f"{r['score_std']:.2f}, correlation with length {r['length_correlation']:.2f}"
    if "auc" in r:
        return line + f", AUC {r['auc']:.3f}"
    return line + (f"\n  length alone gets {100 * r['length_accuracy']:.1f} %; accuracy "
                   f"{100 * r['accuracy_longer']:.1f} % where the chosen completion is the longer, "
                   f"{100 * r['accuracy_shorter']:.1f} % where the shorter")


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

def prepare(groups, dropped, args):
    """Drops lists in which no completion is better than another."""
    kept = [g for g in groups if len(set(g.scores)) > 1 or args.loss == "pointwise"]
    dropped["where no completion is better than another"] += len(groups) - len(kept)
    return kept


def main(argv=None):
    args = parse_args(argv)
    # --- setup
    usable = [name for name, row in FORMATS.items() if row.gives in LOSSES[args.loss].gives]
    # --- shared: data ---
    common.check_output_dir(args)
    device, autocast = common.set_up_device(args)
    encoder = common.load_encoder(args.model, args, args.chat_template, to_last_token=True)
    train, held_out, max_length = common.load_data(args, encoder, usable, prepare)
    plan = common.make_plan(len(train), args)
    # --- end shared ---
    torch.manual_seed(args.seed)                             # a new head is a function of the seed
    model = load_reward_model(args.model, encoder, device, new_head=True)
    set_pad_token(model, encoder)
    packed = common.can_pack(model, train, reward_scores)

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

    def evaluate_now(step):
        """Evaluates after `step` updates → metrics; says them in a line."""
        scores = for_all(reward_scores, model, held_out, args, packed, autocast, "evaluate")
        result = evaluate(held_out, scores, args)
        if step == 0:
            zeros = [[0.0] * len(part) for part in scores]
            result["eval/loss_expected"] = evaluate(held_out, zeros, args)["eval/loss"]
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

        # The gradient of the whole step, summed over micro-batches (memory, not statistics).
        optimizer.zero_grad(set_to_none=True)
        for micro, share in common.my_micro_batches(groups, args.micro_batch_tokens, packed):
            with autocast:
                rewards = reward_scores(model, common.lay_out(model, micro, packed))    # (K,)
            part, part_sums = micro_loss(rewards, micro, args)
            (part * share / len(groups)).backward()
            sums.update(part_sums if share else {})
        sums = common.sum_over_processes(sums)
        metrics = {name: value / len(groups) for name, value in sums.items()}

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
    used = dict.fromkeys(i for places in plan for i in places)
    some = [train[i] for i in used][:500]                    # a sample: they cost a forward
    scores = for_all(reward_scores, model, some, args, packed, autocast, "statistics")
    note_statistics(model.config, some, scores)
    common.save_model(out, model, encoder.tokenizer, adapter)
    print(f"scores of the training completions: {model.config.reward_mean:.3f} ± "
          f"{model.config.reward_std:.3f}")
    if results and results[-1]["eval/loss"] > results[0]["eval/loss"]:
        print("note: the held-out loss is higher than at the start: try a lower --lr, fewer epochs")


if __name__ == "__main__":
    common.run(main)
