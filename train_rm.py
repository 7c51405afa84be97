"""Train a reward model: one number for how good an answer is, learnt from pairs of answers or ranked lists of them.

    python train_rm.py                                       # 10 seconds on two CPU cores, no network
    python train_rm.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback_binarized --learning-rate 1e-5

With no flags it trains on the toy of tests/toy (sums) and ends with the share of unseen sums whose right answer it
prefers: from about 50 % to about 99 %. Beside the loss of step 0 stands that of a score that says nothing: 0.6931.

Differs from the papers in: the score is read at the last token *by length*, whatever its id, and the head has no bias
(a constant changes no comparison). The result is a plain AutoModelForSequenceClassification with one label: plain
transformers gives the same scores on text + EOS, padded right, unless the EOS is also the pad token: then it takes the
final EOS for padding and reads the token before. Only what goes silently wrong when written twice is in common.py.
"""
# --- derivation -------------------------------------------------------------------------------------------------------
#
# Notation: x prompt, y answer, y_w chosen ("wins"), y_l rejected ("loses"), r(x, y) the score, one real number,
# r_w = r(x, y_w), r_l = r(x, y_l), h = r_w − r_l, σ(z) = 1 / (1 + e^−z).
#
# 1. What people compare. The Bradley–Terry model (an assumption: one scalar utility for all, logistic noise) says
#
#        p(y_w ≻ y_l | x) = e^{r_w} / ( e^{r_w} + e^{r_l} ) = σ( r_w − r_l )                                         (1)
#        L_BT = −E log σ( h )                                                                                        (2)
#
#    Where all scores are equal, h = 0 and L = log 2 = 0.6931. The noise fixes the unit: 1 more is 73 %, 3 more 95 %.
#
# 2. Only differences matter. For any function f of the prompt
#
#        r'(x, y) = r(x, y) + f(x)   has the same h, the same p and the same L                                       (3)
#
#    so rewards come in equivalence classes, and comparisons cannot tell their members apart. A raw score therefore
#    means nothing alone, nor beside another model's, and scores of different prompts compare only as far as the model
#    happens to put them on one scale. The mean, std and length curve of the training answers are saved for that reason.
#
# 3. The gradient, and what a pair is worth:
#
#        ∇L_BT = −σ( −h ) [ ∇ r_w − ∇ r_l ]                                                                          (4)
#
#    σ(−h) is the probability that the model gives to a wrong label: near 1 for pairs ranked the wrong way, near 0
#    for settled ones. Nothing stops h on separable data: hence few epochs, or label noise:
#
# 4. Labels that are right only with probability p (label smoothing ε: p = 1 − ε; a column p_chosen: each pair's own):
#
#        L = −p log σ( h ) − (1 − p) log σ( −h ),     least at σ(h) = p                                              (5)
#
#    So with data that follow (1) for some r*, the minimum is r = r* up to (3): h is calibrated, which eval/ece checks.
#    A column margin says by how much better the better one is (Touvron et al. 2023, Llama 2, arXiv 2307.09288, eq. 2):
#
#        L = −p log σ( h − m ) − (1 − p) log σ( −h − m )         m ≥ 0, whichever of the two is better               (6)
#
# 5. Ranked lists. K answers to one prompt hold up to K(K−1)/2 pairs i ≻ j (ties hold none, n is what is left):
#
#        L = −1/n Σ_{i≻j} log σ( r_i − r_j ),        n = K(K−1)/2 without ties                                       (7)
#
#    (Ouyang et al. 2022, InstructGPT, arXiv 2203.02155, eq. 1.) All pairs of a prompt stay in one batch: each answer is
#    in K − 1 of them: spread over the steps of an epoch they would be K − 1 passes over the same text, and a reward
#    model overfits in a second pass. It is also cheaper: K answers and one prompt in the forward, not K(K−1) answers.
#    The weight 1/n makes a prompt count as one, however many answers it has. `--loss plackett-luce` reads the list as
#    successive choices instead, each time the best of those that are left:
#
#        p( y_1 ≻ … ≻ y_K ) = Π_k e^{r_k} / Σ_{j≥k} e^{r_j},       for K = 2 it is (1)                               (8)
#        L_PL = Σ_k [ log Σ_{j≥k} e^{r_j} − r_k ]                  equal scores: log K!                              (9)
#
#    Tied answers are not compared: each is a choice out of itself and those that are strictly worse.
#
# 6. Centring, `--center-coef c`, picks one member of the class (3): that whose pairs have mean score 0
#    (Eisenstein et al. 2023, arXiv 2312.09244; mean over pairs):
#
#        L + c ( r_w + r_l )²,       gradient 2c ( r_w + r_l ) [ ∇ r_w + ∇ r_l ]                                    (10)
#
#    It moves r_w + r_l, (4) moves r_w − r_l: the offset is fixed, what is preferred does not change. A large c would
#    still cost capacity; 0.01 is usual.
#
# 7. What a reward model is not. It has learnt what tells chosen from rejected *here*: length, lists, a confident tone
#    do so in most data, hence accuracy is reported where the chosen answer is the longer and where the shorter, beside
#    that of length alone. Off the data its score is an extrapolation, and an optimiser looks exactly there: the more a
#    policy is pushed, the more it finds answers that score well and are not good (Goodhart; Gao et al. 2022, arXiv
#    2210.10760). People agree with each other in 65–75 % of such pairs, so much higher on real data is a leak.

# --- imports ----------------------------------------------------------------------------------------------------------
import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common import (PAIRS, account, can_pack, fail, lay_out, load_encoder, load_reward_model, lowess, micro_batches,
                    number, pick_device, plan_steps, read_groups, reward_scores, soft_labels, split_by_prompt, tokenise)

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
    g = p.add_argument_group("reward model")
    g.add_argument("--loss", choices=LOSSES, default="bradley-terry", help="; ".join(f"{k}: {f.__doc__.splitlines()[0]}" for k, f in LOSSES.items()))
    g.add_argument("--label-smoothing", type=float, default=0.0, help="probability that a label is wrong (5), in [0, 0.5)")
    g.add_argument("--center-coef", type=float, default=0.0, help="weight of (r_w + r_l)², which fixes the offset (10)")
    p.set_defaults(dataset=str(TOY / "pairs.jsonl"), output_dir="runs/rm", learning_rate=3e-4)
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
    if not 0 <= args.label_smoothing < 0.5:
        p.error("--label-smoothing must be in [0, 0.5): from 0.5 on the labels say nothing")
    if not 0 <= args.center_coef < math.inf:
        p.error("--center-coef must not be negative")
    if args.loss == "plackett-luce" and args.label_smoothing:
        p.error("--loss plackett-luce has no pairs whose labels could be smoothed: drop --label-smoothing")
    return args


# --- the algorithm: pure functions ------------------------------------------------------------------------------------
# Shapes: B groups (prompts), K answers in the largest of them (pairs: 2), N in all. Scores and losses are float32.

class Lists(NamedTuple):
    rewards: torch.Tensor                                    # (B, K)    r(x, y), 0 where a group has fewer answers
    better: torch.Tensor                                     # (B, K, K) True at [b, i, j]: answer i is better than j
    p: torch.Tensor                                          # (B,)      probability that the labels are right
    margin: torch.Tensor                                     # (B,)      by how much the better one is better


def over_pairs(values, better):
    """Mean over the pairs of each group: (B, K, K) → (B,). The 1/n of (7), so that a prompt counts as one."""
    return torch.where(better, values, 0).sum((1, 2)) / better.sum((1, 2))


def bradley_terry(lists):
    """−log σ(r_w − r_l), mean over the pairs of a prompt (Ouyang et al. 2022, eq. 1)

    With margins, label smoothing and soft labels; mean over prompts. Returns (B,).
    """
    B, K = lists.rewards.shape
    assert lists.better.shape == (B, K, K) and lists.p.shape == lists.margin.shape == (B,)
    h = lists.rewards[:, :, None] - lists.rewards[:, None, :]                                        # (B, K, K)
    p, m = lists.p[:, None, None], lists.margin[:, None, None]                                       # (B, 1, 1)
    return over_pairs(-p * F.logsigmoid(h - m) - (1 - p) * F.logsigmoid(-h - m), lists.better)       # (B,)  (6) (7)


def plackett_luce(lists):
    """successive choices of the best answer that is left (9)

    Sum over the choices of a list, mean over prompts. No label noise, no margins. Returns (B,).
    """
    itself = torch.eye(lists.rewards.shape[1], dtype=torch.bool, device=lists.rewards.device)
    left = lists.rewards[:, None, :].masked_fill(~(lists.better | itself), -math.inf)                # (B, K, K)
    return (left.logsumexp(2) - lists.rewards).sum(1)                                                # (B,)  (9)


LOSSES = {"bradley-terry": bradley_terry, "plackett-luce": plackett_luce}


def pairs_of(group):
    """The pairs (i, j) of a group in which answer i is better than j: no ties, nor where cutting left the same ids."""
    scores, ids = group.row.get("scores", (1, 0)), group.completion_ids           # in a pair the chosen one comes first
    return [(i, j) for i in range(len(ids)) for j in range(len(ids)) if scores[i] > scores[j] and ids[i] != ids[j]]


def forward(model, groups, packed):
    """Scores of all answers of a micro-batch, groups in order, answers within: (N,) float32."""
    return reward_scores(model, lay_out(model, groups, packed))


def micro_loss(rewards, groups, args):
    """Scores of a micro-batch → (sum of its losses, Counter of metric sums); the caller divides by the step's groups.

    rewards: as forward() gives them. Nothing here divides by a number of the micro-batch, so how a step is cut into
    micro-batches does not change its gradient.
    """
    device = rewards.device
    r = pad_sequence(rewards.split([len(g.completion_ids) for g in groups]), batch_first=True)       # (B, K)
    better = torch.zeros(*r.shape, r.shape[1], dtype=torch.bool, device=device)                      # (B, K, K)
    places = [(b, i, j) for b, g in enumerate(groups) for i, j in pairs_of(g)]
    better[tuple(torch.tensor(places, device=device).T)] = True
    p = torch.tensor([float(g.row.get("p_chosen", 1 - args.label_smoothing)) for g in groups], device=device)
    margin = torch.tensor([float(g.row.get("margin", 0)) for g in groups], device=device)
    losses = LOSSES[args.loss](Lists(r, better, p, margin))                                          # (B,)
    if args.center_coef:
        total = r[:, :, None] + r[:, None, :]                                                        # (B, K, K)
        losses = losses + args.center_coef * over_pairs(total ** 2, better)                          # (B,)  (10)
    with torch.no_grad():
        chosen, rejected = r[:, :, None].expand(better.shape), r[:, None, :].expand(better.shape)    # (B, K, K)
        each = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
                "rewards/accuracies": 0.5 * (1 + (chosen - rejected).sign())}                        # ties half
        values = {"loss": losses} | {k: over_pairs(v, better) for k, v in each.items()}              # (B,) each
        sums = Counter({k: v.double().sum().item() for k, v in values.items()})
    return losses.sum(), sums


def means(sums, groups):
    """Sums over a whole step or split → means per group."""
    return {k: v / len(groups) for k, v in sums.items()}


# --- evaluation -------------------------------------------------------------------------------------------------------

@torch.no_grad()
def score_groups(model, groups, args, packed, autocast, progress):
    """Scores of the answers of all groups, in their order: [K floats, …]."""
    by_group, micros = {}, micro_batches(groups, args.micro_batch_tokens, packed)
    for micro in tqdm(micros, desc=progress, unit="batch", leave=False, disable=None):
        with autocast:
            values = iter(forward(model, micro, packed).tolist())
        by_group |= {id(g): [next(values) for _ in g.completion_ids] for g in micro}
    return [by_group[id(g)] for g in groups]


def correlation(x, y):
    """Pearson's, or None where one of the two is constant."""
    x, y = x - x.mean(), y - y.mean()
    return (x @ y / (x.norm() * y.norm())).item() if x.norm() > 0 and y.norm() > 0 else None


def evaluate(groups, scores, args):
    """What the scores ([K floats, …]) of a split are worth: counts over all of its pairs, never a mean of batch means.

    eval/ece: expected calibration error of σ(h) in ten bins. Every pair is taken both ways (h with label 1, −h with
    label 0), for with the chosen one always first the label would say nothing. The two ways mirror each other, so five
    bins over the probability of the preferred side, 0.5 to 1, hold the same number.
    eval/length_accuracy: what the better of "the longer wins" and "the shorter wins" gets right, without any model.
    """
    rewards = torch.tensor([s for group in scores for s in group], dtype=torch.float64)              # (N,)
    length = torch.tensor([len(ids) for g in groups for ids in g.completion_ids], dtype=torch.float64)
    first = [0]
    for g in groups:
        first.append(first[-1] + len(g.completion_ids))
    pairs = [(first[b] + i, first[b] + j, b) for b, g in enumerate(groups) for i, j in pairs_of(g)]
    w, l, owner = torch.tensor(pairs).T                      # (P,) each                                   # noqa: E741
    h = rewards[w] - rewards[l]                              # (P,)
    longer = 0.5 * (1 + (length[w] - length[l]).sign())      # (P,) 0.5 = as long
    right, n = 0.5 * (1 + h.sign()), len(h)                  # (P,) ties half
    accuracy = right.mean()
    result = {f"eval/{k}": v for k, v in means(micro_loss(rewards, groups, args)[1], groups).items()}
    result |= {"eval/n": n, "eval/rewards/accuracies": accuracy.item()}
    # Pairs of one list are not independent: the error of a ratio of sums over groups. For single pairs √(p(1−p)/n).
    by_group = torch.zeros(len(groups), dtype=torch.float64).index_add(0, owner, right - accuracy)
    result["eval/accuracy_se"] = by_group.norm().item() / n
    sure = torch.sigmoid(h.abs())                            # (P,) in [0.5, 1]
    gaps = torch.zeros(5, dtype=torch.float64).index_add(0, ((sure - 0.5) * 10).long().clamp(max=4), right - sure)
    result |= {"eval/ece": gaps.abs().sum().item() / n,
               "eval/score_mean": rewards.mean().item(), "eval/score_std": rewards.std(correction=0).item()}
    if (c := correlation(rewards, length)) is not None:
        result["eval/length_correlation"] = c
    for name, these in (("longer", right[longer == 1]), ("shorter", right[longer == 0])):
        result[f"eval/n_{name}"] = len(these)
        if len(these):
            result[f"eval/accuracy_{name}"] = these.mean().item()
    share = longer.mean().item()
    return result | {"eval/length_accuracy": max(share, 1 - share)}


def eval_line(step, result, expected=None):
    """Two lines for the terminal; expected: the loss of a score that says nothing."""
    r = {k.removeprefix("eval/"): v for k, v in result.items()}
    percent = lambda key: f"{100 * r[key]:.1f} %" if key in r else "–"  # noqa: E731
    nothing = f" ({expected:.4f} if all scores were equal)" if expected else ""
    return (f"step {step}: eval loss {r['loss']:.4f}{nothing}"
            f", accuracy {100 * r['rewards/accuracies']:.1f} ± {100 * r['accuracy_se']:.1f} % of {r['n']:,} pairs"
            f", margin {r['rewards/margins']:.3f}, ECE {r['ece']:.3f}"
            f", scores {r['score_mean']:.2f} ± {r['score_std']:.2f}\n"
            f"  length: alone it gets {percent('length_accuracy')}"
            f"; accuracy {percent('accuracy_longer')} where the chosen answer is the longer ({r['n_longer']:,})"
            f", {percent('accuracy_shorter')} where the shorter ({r['n_shorter']:,})"
            f"; correlation with the score {r.get('length_correlation', math.nan):.2f}")


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
    """Rows → tokenised groups; prints what was kept and dropped, and one example with its border."""
    groups, report = read_groups(source, PAIRS + ("ranked list",), args.split, args.columns, args.limit, args.prefer,
                                 why=" (a reward is learnt from comparisons of answers to the same prompt)")
    for g in groups:
        if g.row.get("margin", "") in (None, ""):            # this one has none: 0, and no other's margin moves up
            g.row.pop("margin", None)
        for column in {"p_chosen", "margin"} & set(g.row):
            if report.kind == "ranked list" or args.loss == "plackett-luce":
                fail(f"{g.where}: column '{column}' belongs to a pair under --loss bradley-terry; "
                     f"--columns unused={column} takes it away.")
        if "margin" in g.row and number(g.row, "margin", g.where) < 0:
            fail(f"{g.where}: column 'margin' is {g.row['margin']!r:.60}: below 0 the rejected answer would be better.")
    soft_labels(groups, args.label_smoothing)
    if args.max_length > encoder.max_positions:
        print(f"--max-length {args.max_length} is lowered to {encoder.max_positions}, the positions that the model has")
        args.max_length = encoder.max_positions
    groups = tokenise(groups, report, encoder, args.max_length, args.overlong, f"tokenise {what}")
    kept = [g for g in groups if pairs_of(g)]
    if dropped := len(groups) - len(kept):
        report["where no answer is better than another"], report["kept"], groups = dropped, len(kept), kept
    print(f"{what}: {account(source, report, encoder)}")
    if not groups:
        fail(f"{source}: no rows are left; the line above says why.")
    print(encoder.show(groups[0]))
    if encoder.tokenizer.chat_template and isinstance(groups[0].prompt, str) and not args.chat:
        print("  the tokeniser has a chat template, but these prompts stay plain text (--chat makes them user turns)")
    return groups


def note_statistics(config, groups, scores):
    """Mean, std and length curve of the scores into the config: with them score.py and GRPO put on one scale the scores
    of different models and of answers of different lengths."""
    rewards = torch.tensor([s for group in scores for s in group], dtype=torch.float64)
    length = torch.tensor([len(ids) for g in groups for ids in g.completion_ids], dtype=torch.float64)
    shares = torch.linspace(0, 1, 50, dtype=torch.float64)
    knots = sorted(set(length.quantile(shares, interpolation="nearest").tolist()))
    curve = lowess(length, rewards, torch.tensor(knots)).tolist()
    config.reward_mean, config.reward_std = rewards.mean().item(), rewards.std(correction=0).item()
    config.reward_by_length = [[int(x), y] for x, y in zip(knots, curve)]


def main(argv=None):
    args = parse_args(argv)
    # --- setup
    device = pick_device(args.device)
    args.dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    encoder = load_encoder(args.model, args.chat_template, args.chat)
    train = load_data(args.dataset, args, encoder, "train")
    if args.eval_dataset:
        held_out = load_data(args.eval_dataset, args, encoder, "eval")
        if both := {str(g.prompt) for g in train} & {str(g.prompt) for g in held_out}:
            print(f"  {len(both)} prompts of --eval-dataset are also trained on")
    else:
        train, held_out = split_by_prompt(train, args.eval_fraction, args.seed)
    steps = plan_steps(len(train), args.batch_size, args.epochs, args.max_steps, args.seed)
    out, start, evaluated = open_run(args, train + held_out, len(steps))
    due = lambda step: step in (0, len(steps)) or args.eval_every and step % args.eval_every == 0  # noqa: E731

    torch.manual_seed(args.seed)                             # a new head is a function of the seed
    model = load_reward_model(args.model, encoder, device, "--model", new_head=True)
    if encoder.tokenizer.pad_token_id is None:               # transformers needs one to score a batch
        encoder.tokenizer.pad_token_id = model.config.pad_token_id
    packed, size = can_pack(model, train, reward_scores), sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=args.weight_decay, fused=device.type != "mps")
    if start:
        start = load_checkpoint(out / "checkpoint", model, optimizer)
    padded = sum(len(g.completion_ids) * max(len(g.prompt_ids) + len(c) for g in b for c in g.completion_ids)
                 for b in ([train[i] for i in s] for s in steps) for g in b)
    shared = sum(train[i].tokens() for s in steps for i in s)
    print(f"{size / 1e6:.2f} M parameters on {device} in {args.dtype}; "
          f"{len(train):,} groups to train on, {len(held_out):,} held out; {len(steps):,} steps of {args.batch_size}, "
          f"{shared / len(steps):,.0f} tokens each (padded batches would compute {padded / shared:.1f} times as many)")
    if size > 1e8 and args.learning_rate >= 1e-4:
        print(f"note: --learning-rate {args.learning_rate:g} suits the toy; for this size 5e-6 to 2e-5 is usual")

    def look(step):
        """Evaluates, writes to metrics.jsonl; beside step 0 the loss of a score that says nothing (log 2 for pairs)."""
        result = evaluate(held_out, score_groups(model, held_out, args, packed, autocast, "evaluate"), args)
        log(out, step, result)
        nothing = [[0.0] * len(g.completion_ids) for g in held_out]
        tqdm.write(eval_line(step, result, evaluate(held_out, nothing, args)["eval/loss"] if step == 0 else None))
    if held_out and due(start) and not evaluated:
        look(start)

    # --- loop
    stopped = catch_signals()
    bar = tqdm(range(start, len(steps)), initial=start, total=len(steps), desc=args.loss, unit="step", disable=None)
    for step in bar:
        began, groups, sums = time.perf_counter(), [train[i] for i in steps[step]], Counter()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, len(steps), args)
        optimizer.zero_grad(set_to_none=True)
        for micro in micro_batches(groups, args.micro_batch_tokens, packed):
            with autocast:
                rewards = forward(model, micro, packed)                                              # (N,)
            loss, micro_sums = micro_loss(rewards, micro, args)
            (loss / len(groups)).backward()
            sums.update(micro_sums)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
        if not torch.isfinite(grad_norm):
            rows = ", ".join(g.where for g in groups[:3])
            fail(f"step {step + 1}: the gradient is not finite (rows: {rows} …); try a lower --learning-rate.")
        optimizer.step()
        metrics = means(sums, groups)
        metrics |= {"grad_norm": grad_norm.item(), "learning_rate": lr_at(step, len(steps), args),
                    "tokens_per_second": sum(g.tokens() for g in groups) / (time.perf_counter() - began)}
        log(out, step + 1, metrics)
        shown = {"loss": "loss", "acc": "rewards/accuracies", "margin": "rewards/margins", "tok/s": "tokens_per_second"}
        bar.set_postfix({k: f"{metrics[v]:.4g}" for k, v in shown.items() if v in metrics}, refresh=False)
        last = step + 1 == len(steps)
        if last or stopped or args.save_every and (step + 1) % args.save_every == 0:
            save_checkpoint(out / "checkpoint", model, optimizer, step + 1)
        if held_out and due(step + 1):
            look(step + 1)
        if stopped and not last:
            bar.close()
            print(f"stopped after step {step + 1} of {len(steps)}; --resume goes on from there")
            raise SystemExit(130)

    # --- save
    # In its first pass every batch is unseen when it is scored: that accuracy is an honest one, a repeated one is not.
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    done = [(m["rewards/accuracies"], len(steps[m["step"] - 1])) for m in lines if "loss" in m]      # one entry a step
    once = math.ceil(len(train) / args.batch_size)           # steps of a pass
    parts = {"first pass (each batch before it was trained on)": done[:once], "repeated passes": done[once:]}
    for name, part in parts.items():
        if n := sum(k for _, k in part):
            print(f"training accuracy, {name}: {100 * sum(a * k for a, k in part) / n:.1f} % of {n:,} groups")
    # Statistics of a random sample: more answers would change nothing.
    some = [train[i] for i in dict.fromkeys(i for s in steps for i in s)][:5000]
    note_statistics(model.config, some, score_groups(model, some, args, packed, autocast, "statistics"))
    save_model(out, model, encoder.tokenizer)
    if any(ids[-1] == model.config.pad_token_id for g in some for ids in g.completion_ids):
        print(f"note: the answers' end token is also the pad token ({encoder.tokenizer.pad_token}): "
              "these scripts read the score at the end token, plain transformers takes it for padding, "
              "reads the token before and gives other scores")
    print(f"saved in {out}: model, args.json, metrics.jsonl, checkpoint/; "
          f"scores of the training answers: {model.config.reward_mean:.3f} ± {model.config.reward_std:.3f}")


if __name__ == "__main__":
    main()
