"""Align a language model with preference pairs: direct preference optimisation (DPO), and the SFT that comes before it.

    python train_dpo.py                                      # 10 seconds on two CPU cores, no network
    python train_dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback_binarized --lr 1e-6

With no flags it trains the toy of tests/toy (sums) and ends with the share of right answers on sums that it never saw:
from about 45 % to about 90 %. Before the first step the loss is 0.6931 = log 2, whatever the model and the data.

Differs from the paper (Rafailov et al. 2023, arXiv 2305.18290) in: nothing that changes the loss. AdamW instead of
RMSprop, and the reference's log-probs are computed once and kept on disk, since they never change.
Variants are one function each in LOSSES; `--loss sft` is maximum likelihood on the chosen answers, which makes π_ref
where there is no SFT model yet. Only what goes silently wrong when written twice is in common.py.
"""
# --- derivation -------------------------------------------------------------------------------------------------------
#
# Notation: x prompt, y answer, y_w chosen ("wins"), y_l rejected ("loses"), π the policy that is trained, π_ref the
# frozen model it starts from, σ(z) = 1 / (1 + e^−z). log π(y|x) = Σ_t log π(y_t | x, y_<t), end token included.
#
# 1. The goal. Answers with a high reward r(x, y), by a policy that stays near π_ref:
#
#        max_π  E_x E_{y~π} [ r(x, y) ] − β KL( π(·|x) ‖ π_ref(·|x) )                                                (1)
#
#    β is the price of leaving π_ref: a large β keeps the policy close, a small β lets it go where the reward is.
#
# 2. Its optimum is known. For one prompt, write the objective as an expectation under π and complete it to a KL:
#
#        E_{y~π} [ r − β log π/π_ref ] = −β E_{y~π} [ log π(y|x) − log( π_ref(y|x) e^{r(x,y)/β} ) ]
#                                      = −β KL( π ‖ π* ) + β log Z(x)                                                (2)
#        π*(y|x) = π_ref(y|x) e^{r(x,y)/β} / Z(x),     Z(x) = Σ_y π_ref(y|x) e^{r(x,y)/β}                            (3)
#
#    Z(x) does not depend on π and a KL is at least 0, so π* is the maximum, unique where π_ref > 0. An answer that
#    π_ref never gives, π* never gives either. Z(x) sums over all answers: (3) cannot be computed, and need not be.
#
# 3. Turn (3) round: every policy is optimal for some reward, namely
#
#        r(x, y) = β log( π*(y|x) / π_ref(y|x) ) + β log Z(x)                                                        (4)
#
#    The log-ratio is the reward, up to a constant of the prompt. We call r̂(x, y) = β log π(y|x)/π_ref(y|x) the
#    implicit reward of π: it is what rewards/chosen and rewards/rejected report, and what score.py --implicit shows.
#
# 4. What people compare. The Bradley–Terry model (an assumption: one scalar utility, logistic noise) says
#
#        p(y_w ≻ y_l | x) = σ( r(x, y_w) − r(x, y_l) )                                                               (5)
#
#    Only the difference matters, so the log Z(x) of (4) cancels, and the data's likelihood is a function of π alone:
#
#        h = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)                                                   (6)
#        L_DPO = −E log σ( β h )                                                                                     (7)
#
#    At the start π = π_ref, h = 0 and L = log 2 = 0.6931 for every pair: any other number is a bug (dropout, a wrong
#    mask, a reference that is not the starting point), which is why it is printed beside the measured one.
#    A label that is right only with probability p (label smoothing ε: p = 1 − ε, "cDPO"; a column p_chosen: its own p):
#
#        L = −p log σ( β h ) − (1 − p) log σ( −β h ),     least at σ(βh) = p                                         (8)
#
#    With p = 1 nothing stops h: on separable data (7) falls for ever; β no longer bounds the KL. With p < 1 it stops.
#
# 5. The gradient, and what its two factors do:
#
#        ∇L_DPO = −β σ( −β h ) [ ∇ log π(y_w|x) − ∇ log π(y_l|x) ]                                                   (9)
#
#    The bracket raises the chosen and lowers the rejected answer. σ(−βh) is the probability that the implicit reward
#    gets this pair wrong: 1/2 at the start, near 1 for pairs that are ranked the wrong way, near 0 for those that are
#    settled. β appears twice: as the size of the step, and in how soon a pair counts as settled (h ≈ 3/β).
#
# 6. Why both log-probs can fall. (7) sees only h: lowering log π(y_l) by 10 is worth as much as raising log π(y_w) by
#    10, and lowering is easier, for the mass may go anywhere. Where y_w and y_l share most tokens, the push against
#    y_l takes y_w with it (their gradients nearly cancel in (9), what remains hits both). The share of pairs whose
#    chosen log-prob fell is reported (eval/chosen_fell). Some of it is no bug; where samples get worse, the cures are,
#    in this order: a lower learning rate, a larger β, fewer epochs, or an anchor on the chosen answer, `--sft-coef α`:
#
#        L = L_DPO − α log π(y_w|x) / |y_w|       |y_w| tokens, end included; mean over pairs                       (10)
#
#    (Pang et al. 2024, arXiv 2404.19733, iterative RPO, per sequence as there; others divide by the batch's tokens.)
#
# 7. `--loss sft` is −log π(y_w|x) summed over all pairs of a step and divided by their tokens: nats per token.     (11)

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
from tqdm import tqdm

from common import (PAIRS, account, can_pack, fail, load_encoder, load_model, lay_out, micro_batches, pick_device,
                    plan_steps, read_groups, sample, soft_labels, split_by_prompt, sum_by_completion, token_logps, tokenise)

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
    g = p.add_argument_group("DPO")
    g.add_argument("--loss", choices=LOSSES, default="dpo", help="; ".join(f"{k}: {f.__doc__.splitlines()[0]}" for k, f in LOSSES.items()))
    g.add_argument("--beta", type=float, default=0.1, help="price of leaving the reference (1): larger stays closer")
    g.add_argument("--label-smoothing", type=float, default=0.0, help="probability that a label is wrong (8), in [0, 0.5)")
    g.add_argument("--sft-coef", type=float, default=0.0, help="weight of the chosen answer's mean NLL (10)")
    g.add_argument("--ref-model", help="reference policy; default: --model as it is at the start")
    g.add_argument("--eval-samples", type=int, default=256, help="held-out prompts to sample an answer for at each evaluation")
    p.set_defaults(dataset=str(TOY / "pairs.jsonl"), output_dir="runs/dpo", learning_rate=1e-3)
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
    for name in ("eval_samples", "sft_coef"):
        if not 0 <= getattr(args, name) < math.inf:
            p.error(f"--{name.replace('_', '-')} must not be negative")
    if not 0 < args.beta < math.inf:
        p.error("--beta must be positive: at 0 the loss is constant")
    if not 0 <= args.label_smoothing < 0.5:
        p.error("--label-smoothing must be in [0, 0.5): from 0.5 on the labels say nothing")
    if args.loss == "sft" and (args.label_smoothing or args.sft_coef or args.ref_model):
        p.error("--loss sft has no reference, no labels to smooth and is itself the SFT term: "
                "drop --ref-model, --label-smoothing, --sft-coef")
    return args


# --- the algorithm: pure functions ------------------------------------------------------------------------------------
# Shapes: B pairs. Log-probs are summed over the completion's tokens, end included, in float32.

class Pairs(NamedTuple):
    policy_chosen: torch.Tensor                              # (B,) log π(y_w|x)
    policy_rejected: torch.Tensor | None                     # (B,) log π(y_l|x)
    ref_chosen: torch.Tensor | None                          # (B,) log π_ref(y_w|x)
    ref_rejected: torch.Tensor | None                        # (B,) log π_ref(y_l|x)
    p: torch.Tensor | None                                   # (B,) probability that the label is right


def dpo(pairs, beta):
    """sigmoid loss of Rafailov et al. 2023 (eq. 7), with label smoothing cDPO

    Token sums, mean over pairs. −log σ(βh), or the cross-entropy against p. Returns (B,).
    """
    assert all(x.shape == pairs.p.shape for x in pairs)
    h = (pairs.policy_chosen - pairs.ref_chosen) - (pairs.policy_rejected - pairs.ref_rejected)      # (B,)  (6)
    return -pairs.p * F.logsigmoid(beta * h) - (1 - pairs.p) * F.logsigmoid(-beta * h)               # (B,)  (7) (8)


def sft(pairs, beta):
    """maximum likelihood on the chosen answers, no reference (beta unused)

    Token sums, divided by the tokens of the step: nats per token. Returns (B,).
    """
    return -pairs.policy_chosen                                                                      # (B,)  (11)


LOSSES = {"dpo": dpo, "sft": sft}


def forward(model, groups, packed):
    """Summed log-probs of all completions of a micro-batch, groups in order, completions within: (K,) float32."""
    batch = lay_out(model, groups, packed)
    return sum_by_completion(token_logps(model, batch), batch)


def micro_loss(policy, groups, args):
    """Log-probs of a micro-batch → (sum of its losses, Counter of metric sums); the caller divides by the step's count.

    policy: (K,) as forward() gives them. Nothing here divides by a number of the micro-batch, so how a step is cut into
    micro-batches does not change its gradient.
    """
    device, per_group = policy.device, len(groups[0].completion_ids)
    policy = policy.view(len(groups), per_group)                                                     # (B, 2) or (B, 1)
    length = torch.tensor([len(g.completion_ids[0]) for g in groups], device=device)                 # (B,)
    if args.loss == "sft":
        pairs = Pairs(policy[:, 0], None, None, None, None)
    else:
        ref = torch.tensor([g.ref_logps for g in groups], device=device)                             # (B, 2)
        p = torch.tensor([float(g.row.get("p_chosen", 1 - args.label_smoothing)) for g in groups], device=device)
        pairs = Pairs(policy[:, 0], policy[:, 1], ref[:, 0], ref[:, 1], p)
    losses = LOSSES[args.loss](pairs, args.beta)                                                     # (B,)
    if args.sft_coef:
        losses = losses - args.sft_coef * pairs.policy_chosen / length                               # (B,)  (10)
    with torch.no_grad():
        values = {"loss": losses, "logps/chosen": pairs.policy_chosen}
        if pairs.ref_chosen is not None:
            chosen = args.beta * (pairs.policy_chosen - pairs.ref_chosen)                            # (B,)
            rejected = args.beta * (pairs.policy_rejected - pairs.ref_rejected)                      # (B,)
            margin, tie = chosen - rejected, args.beta * 1e-3        # 0.001: float32 rounding of sums of hundreds
            accuracy = 0.5 * (1 + torch.where(margin.abs() > tie, margin.sign(), 0))                 # ties half
            values |= {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": margin,
                       "rewards/accuracies": accuracy, "logps/rejected": pairs.policy_rejected,
                       "chosen_fell": (chosen < -tie).float()}
        sums = Counter({k: v.double().sum().item() for k, v in values.items()})
    return losses.sum(), sums


def normaliser(groups, loss):
    """What the sum of losses of a step is divided by, counted over the whole step: pairs, for sft tokens."""
    return sum(len(g.completion_ids[0]) for g in groups) if loss == "sft" else len(groups)


def means(sums, groups, loss):
    """Sums over a whole step or split → means: the loss by its normaliser, everything else per pair."""
    return {k: v / (normaliser(groups, loss) if k == "loss" else len(groups)) for k, v in sums.items()}


@torch.no_grad()
def reference_logps(args, policy, encoder, groups, device, autocast):
    """Sets g.ref_logps (K floats) of every group: log π_ref of each completion, computed once and kept on disk.

    The file's name is a hash of all that the numbers depend on: the reference's weights, every token id of every group
    (so tokeniser, template, lengths and rows), and the dtype. Anything else in the folder is never read. The reference
    is gone from memory before training starts; policy=None loads args.ref_model for the time of this function.
    """
    model = policy or load_model(args.ref_model, encoder, device, "--ref-model")
    key = hashlib.sha256(f"{device.type} {args.dtype}".encode())
    for name, tensor in model.state_dict().items():
        key.update(name.encode())
        key.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    key.update(json.dumps([(g.prompt_ids, g.completion_ids) for g in groups]).encode())
    file = Path(args.output_dir) / "ref_logps" / f"{key.hexdigest()[:32]}.safetensors"
    if file.exists():
        flat = load_file(file)["logps"].tolist()
        tqdm.write(f"reference log-probs: read from {file}")
    else:
        packed, by_group = can_pack(model, groups), {}
        micros = micro_batches(groups, args.micro_batch_tokens, packed)
        for micro in tqdm(micros, desc="reference log-probs", unit="batch", disable=None):
            with autocast:
                values = iter(forward(model, micro, packed).tolist())
            by_group |= {id(g): [next(values) for _ in g.completion_ids] for g in micro}
        flat = [v for g in groups for v in by_group[id(g)]]
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logps": torch.tensor(flat)}, f"{file}.tmp")
        os.replace(f"{file}.tmp", file)
    values = iter(flat)
    for g in groups:
        g.ref_logps = [next(values) for _ in g.completion_ids]


# --- evaluation -------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, encoder, groups, args, packed, autocast, show):
    """Exact means over all held-out groups (never a mean of batch means), and up to --eval-samples sampled answers."""
    sums, micros = Counter(), micro_batches(groups, args.micro_batch_tokens, packed)
    for micro in tqdm(micros, desc="evaluate", unit="batch", leave=False, disable=None):
        with autocast:
            sums.update(micro_loss(forward(model, micro, packed), micro, args)[1])
    result = {f"eval/{k}": v for k, v in means(sums, groups, args.loss).items()} | {"eval/n": len(groups)}
    if "eval/rewards/accuracies" in result:
        p = result["eval/rewards/accuracies"]
        result["eval/accuracy_se"] = math.sqrt(p * (1 - p) / len(groups))
    by_prompt = list({tuple(g.prompt_ids): g for g in groups}.values())                  # each prompt once
    with_answer = [g for g in by_prompt if isinstance(g.row.get("answer"), (str, int, float))]
    asked = with_answer[:args.eval_samples] or by_prompt[:min(show, args.eval_samples)]
    longest = max(len(ids) for g in groups for ids in g.completion_ids)
    room = encoder.max_positions - max((len(g.prompt_ids) for g in asked), default=0)
    if asked and room > 0:
        with autocast:
            answers = sample(model, [g.prompt_ids for g in asked], 1, int(min(2 * longest, 256, room)), encoder.stops,
                             seed=args.seed, progress="sample")
        texts = [encoder.decode(a[0].ids).strip() for a in answers]
        if with_answer:
            n = len(asked)
            p = sum(t == str(g.row["answer"]).strip() for t, g in zip(texts, asked)) / n
            result |= {"eval/right": p, "eval/right_se": math.sqrt(p * (1 - p) / n), "eval/right_n": n}
        for g, a, t in list(zip(asked, answers, texts))[:show]:
            prompt = encoder.tokenizer.decode(g.prompt_ids)
            tqdm.write(f"  {prompt[-80:]!r} ▸ {t[:200]!r}{'' if a[0].ended else '  (cut)'}")
    return result


def eval_line(step, result, expected=None):
    """One line for the terminal; expected: the loss that theory says."""
    r = {k.removeprefix("eval/"): v for k, v in result.items()}
    line = f"step {step}: eval loss {r['loss']:.4f}" + (f" (expected {expected:.4f})" if expected else "")
    if "rewards/margins" in r:
        line += (f", accuracy {100 * r['rewards/accuracies']:.1f} ± {100 * r['accuracy_se']:.1f} % of {r['n']} pairs"
                 f", margin {round(r['rewards/margins'], 3) + 0.0:.3f}"                  # + 0.0: -0.000 becomes 0.000
                 f", log π chosen {r['logps/chosen']:.2f} rejected {r['logps/rejected']:.2f}"
                 f", chosen fell in {100 * r['chosen_fell']:.0f} %")
    if "right" in r:
        line += f", right samples {100 * r['right']:.1f} ± {100 * r['right_se']:.1f} % of {r['right_n']}"
    return line


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
    kinds = PAIRS + ("unpaired", "response") if args.loss == "sft" else PAIRS
    groups, report = read_groups(source, kinds, args.split, args.columns, args.limit, args.prefer)
    if args.loss == "sft":
        good = [g for g in groups if report.kind != "unpaired" or g.row["label"]]
        if len(good) < len(groups):
            report["with label false"], groups = len(groups) - len(good), good
        for g in groups:
            del g.completions[1:]                            # maximum likelihood has no use for the rejected answer
    else:
        soft_labels(groups, args.label_smoothing)
    if args.max_length > encoder.max_positions:
        print(f"--max-length {args.max_length} is lowered to {encoder.max_positions}, the positions that the model has")
        args.max_length = encoder.max_positions
    groups = tokenise(groups, report, encoder, args.max_length, args.overlong, f"tokenise {what}")
    print(f"{what}: {account(source, report, encoder)}")
    if not groups:
        fail(f"{source}: no rows are left; the line above says why.")
    print(encoder.show(groups[0]))
    if encoder.tokenizer.chat_template and isinstance(groups[0].prompt, str) and not args.chat:
        print("  the tokeniser has a chat template, but these prompts stay plain text (--chat makes them user turns)")
    return groups


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
    steps = plan_steps(len(train), args.batch_size, args.epochs, args.max_steps, args.seed)
    out, start, evaluated = open_run(args, train + held_out, len(steps))
    due = lambda step: step in (0, len(steps)) or args.eval_every and step % args.eval_every == 0  # noqa: E731

    if args.ref_model:                                       # before the policy is loaded: never two models in memory
        reference_logps(args, None, encoder, train + held_out, device, autocast)
    policy = load_model(args.model, encoder, device)
    packed, size = can_pack(policy, train), sum(p.numel() for p in policy.parameters())
    if args.loss != "sft" and not args.ref_model:
        reference_logps(args, policy, encoder, train + held_out, device, autocast)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=args.weight_decay, fused=device.type != "mps")
    if start:
        start = load_checkpoint(out / "checkpoint", policy, optimizer)
    padded = sum(len(g.completion_ids) * max(len(g.prompt_ids) + len(c) for g in b for c in g.completion_ids)
                 for b in ([train[i] for i in s] for s in steps) for g in b)
    shared = sum(train[i].tokens() for s in steps for i in s)
    print(f"{size / 1e6:.2f} M parameters on {device} in {args.dtype}; "
          f"{len(train):,} groups to train on, {len(held_out):,} held out; {len(steps):,} steps of {args.batch_size}, "
          f"{shared / len(steps):,.0f} tokens each (padded batches would compute {padded / shared:.1f} times as many)")
    if size > 1e8 and args.learning_rate >= 1e-4:
        print(f"note: --learning-rate {args.learning_rate:g} suits the toy; for this size 5e-7 to 5e-6 is usual")
    # Step 0 of DPO is log 2 for every pair and any β, ε and p; it is not with another reference or an SFT term.
    expected = math.log(2) if args.loss == "dpo" and not args.ref_model and not args.sft_coef else None
    if held_out and due(start) and not evaluated:
        log(out, start, result := evaluate(policy, encoder, held_out, args, packed, autocast, show=3))
        print(eval_line(start, result, expected if start == 0 else None))

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
                logps = forward(policy, micro, packed)                                               # (K,)
            loss, micro_sums = micro_loss(logps, micro, args)
            (loss / normaliser(groups, args.loss)).backward()
            sums.update(micro_sums)
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm or math.inf)
        if not torch.isfinite(grad_norm):
            rows = ", ".join(g.where for g in groups[:3])
            fail(f"step {step + 1}: the gradient is not finite (rows: {rows} …); try a lower --learning-rate.")
        optimizer.step()
        metrics = means(sums, groups, args.loss)
        metrics |= {"grad_norm": grad_norm.item(), "learning_rate": lr_at(step, len(steps), args),
                    "tokens_per_second": sum(g.tokens() for g in groups) / (time.perf_counter() - began)}
        log(out, step + 1, metrics)
        shown = {"loss": "loss", "acc": "rewards/accuracies", "margin": "rewards/margins", "tok/s": "tokens_per_second"}
        bar.set_postfix({k: f"{metrics[v]:.4g}" for k, v in shown.items() if v in metrics}, refresh=False)
        last = step + 1 == len(steps)
        if last or stopped or args.save_every and (step + 1) % args.save_every == 0:
            save_checkpoint(out / "checkpoint", policy, optimizer, step + 1)
        if held_out and due(step + 1):
            result = evaluate(policy, encoder, held_out, args, packed, autocast, show=3 if last else 0)
            log(out, step + 1, result)
            tqdm.write(eval_line(step + 1, result))
        if stopped and not last:
            bar.close()
            print(f"stopped after step {step + 1} of {len(steps)}; --resume goes on from there")
            raise SystemExit(130)

    # --- save
    save_model(out, policy, encoder.tokenizer)
    print(f"saved in {out}: model, args.json, metrics.jsonl, checkpoint/")


if __name__ == "__main__":
    main()
