"""Align a language model with preference pairs: direct preference optimisation (DPO), and SFT.

    python train_dpo.py                                  # 10 seconds on two CPU cores, no network
    python train_dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --lr 1e-6 \\
        --dataset trl-lib/ultrafeedback_binarized

With no flags it trains the toy of tests/toy (sums) and ends with the fraction of correct samples on
sums that it never saw: from about 45 % to about 90 %. Before the first step the loss is
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
#    rewards/rejected report, and what score.py --implicit shows. (4) also answers "but the policy
#    in training is not the optimal one": it is, for its own implicit reward.
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
#    the measured one; in bfloat16 rounding shows in the fourth digit.
#    A label that is right only with probability p (label smoothing ε: p = 1 − ε, "cDPO"; a column
#    p_chosen: its own p):
#
#        L = −p log σ( β h ) − (1 − p) log σ( −β h ),    least at σ(βh) = p                    (8)
#
#    With p = 1 nothing stops h: for labels that are always the same, the optimum has h = ∞ for
#    every β. With p < 1 h stops at a finite value; that does not bound the KL, which h does not
#    determine.
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

# --- imports --------------------------------------------------------------------------------------
import argparse
import hashlib
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

import common
from common import FORMATS, Plan, compare, completion_logps, fail, for_all, log, within

TOY = Path(__file__).parent / "tests" / "toy"
NAME = Path(__file__).stem.removeprefix("train_")    # a copy of this file writes to runs/ITS NAME
SAVE_SECONDS = 600                                   # a checkpoint at least this often


# --- arguments ------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False,
        usage="%(prog)s [--flag value …]  (--help lists the flags)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # --- shared: flags ---
    count = within("[1, inf)", int)
    natural = within("[0, inf)", int)
    g = p.add_argument_group("model and data")
    g.add_argument("--model", default=f"{TOY}/model", help="directory or hub id to start from")
    g.add_argument("--dataset", default="", help=".json .jsonl .csv .parquet (also .gz) or hub id")
    g.add_argument("--split", default="train", help="split of a hub dataset")
    g.add_argument("--eval-dataset", help="evaluate on this, not on a part of --dataset")
    g.add_argument("--eval-fraction", type=within("[0, 1)"), default=0.1, help="of the prompts, held out (0 = none)")
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
    g.add_argument("--warmup-steps", type=int, default=-1, help="linear warm-up (< 0: a tenth of the steps)")
    g.add_argument("--weight-decay", type=within("[0, inf)"), default=0.0, help="AdamW's")
    g.add_argument("--max-grad-norm", type=within("[0, inf)"), default=1.0, help="clip the gradient's norm (0 = never)")
    g.add_argument("--eval-every", type=natural, default=0, help="steps between evaluations (0 = start and end only)")
    g.add_argument("--save-every", type=natural, default=0, help="steps between checkpoints (0 = every ten minutes)")
    g.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output-dir")
    g.add_argument("--seed", type=within("[0, 2e18]", int), default=0, help="of everything that is random")
    g.add_argument("--device", default="auto", help="auto = cuda where there is one, else cpu")
    g.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="to compute in; weights: float32")
    # --- end shared ---
    g = p.add_argument_group("DPO")
    losses = [f"{name}: {row.function.__doc__.splitlines()[0]}" for name, row in LOSSES.items()]
    g.add_argument("--loss", choices=LOSSES, default="dpo", help="; ".join(losses))
    g.add_argument("--beta", type=within("(0, inf)"), default=0.1, help="price of leaving the reference (1): larger stays closer")
    g.add_argument("--label-smoothing", type=within("[0, 0.5)"), default=0.0, help="probability that a label is wrong (8)")
    g.add_argument("--sft-coef", type=within("[0, inf)"), default=0.0, help="weight of the chosen completion's mean NLL (10)")
    g.add_argument("--ref-model", help="reference policy; default: --model as it is at the start")
    g.add_argument("--eval-samples", type=natural, default=256, help="held-out prompts to sample for at each evaluation")
    p.set_defaults(dataset=f"{TOY}/pairs.jsonl", learning_rate=1e-3)
    args = p.parse_args(argv)

    # A flag that the loss does not read is refused: ignored, it would seem to have had its effect.
    for flag in ("beta", "label_smoothing", "sft_coef", "ref_model"):
        if getattr(args, flag) != p.get_default(flag) and flag not in LOSSES[args.loss].reads:
            p.error(f"--loss {args.loss} does not read --{flag.replace('_', '-')}: drop it")
    common.check_inputs(args, ("model", "ref_model", "dataset", "eval_dataset", "chat_template"))
    return args


# --- the algorithm: pure functions ----------------------------------------------------------------
# Shapes: K completions, M pairs of them. Log-probs are summed over the completion's tokens, end
# included, in float32.

@dataclass
class Completions:
    """What a loss sees of some groups: their completions, and which are better than which."""
    policy: torch.Tensor      # (K,) log π(y|x)
    ref: torch.Tensor         # (K,) log π_ref(y|x); NaN for a loss without reference
    length: torch.Tensor      # (K,) tokens of y, end included
    chosen: torch.Tensor      # (M,) index of the better completion of each pair
    rejected: torch.Tensor    # (M,) index of the worse one
    p: torch.Tensor           # (M,) probability that the label is right
    weight: torch.Tensor      # (M,) 1 / pairs of the same prompt

    @property
    def log_ratio(self):
        """log π(y|x)/π_ref(y|x), the implicit reward without its β: (K,)"""
        return self.policy - self.ref

    @property
    def h(self):
        return self.log_ratio[self.chosen] - self.log_ratio[self.rejected]     # (M,)  (6)


def dpo(x, args):
    """sigmoid loss of Rafailov et al. 2023 (eq. 7), with label smoothing cDPO

    Token sums. −log σ(βh), or the cross-entropy against p. β 0.01 to 0.5, 0.1 is usual. → (M,)
    """
    right = F.logsigmoid(args.beta * x.h)                                        # (M,)
    wrong = F.logsigmoid(-args.beta * x.h)                                       # (M,)
    return -x.p * right - (1 - x.p) * wrong                                      # (M,)  (7) (8)


def sft(x, args):
    """maximum likelihood on the chosen completions, no reference

    Token sums, divided by the tokens of the step: nats a token. → (K,)
    """
    return -x.policy                                                             # (K,)  (11)


class Loss(NamedTuple):
    """A row of LOSSES: the function, and what the loop must know of it."""
    function: Callable        # (Completions, args) → losses of pairs (M,) or completions (K,)
    gives: tuple              # formats it can use, by what they give: see common.FORMATS
    per: str                  # the sum over a step is divided by its "prompts" or its "tokens"
    reference: bool           # whether it needs log π_ref
    reads: tuple              # the flags that change it; another one is refused
    at_start: Callable        # args → its value where π = π_ref, None where that depends


def log_2(args):
    return math.log(2)


def unknown(args):
    return None


LOSSES = {
    "dpo": Loss(
        dpo, gives=("pair", "list"), per="prompts", reference=True,
        reads=("beta", "label_smoothing", "sft_coef", "ref_model"), at_start=log_2),
    "sft": Loss(
        sft, gives=("pair", "label", "response"), per="tokens", reference=False,
        reads=(), at_start=unknown),
}


def normaliser(groups, args):
    """What the sum of the losses of a step is divided by, counted over the whole step."""
    if LOSSES[args.loss].per == "tokens":
        return sum(len(ids) for g in groups for ids in g.completion_ids)
    return len(groups)


def micro_loss(logps, ref_logps, groups, args):
    """Log-probs of a micro-batch → (sum of its losses, Counter of metric sums).

    logps: (K,) as completion_logps() gives them; ref_logps: (N,) the column of all completions. The
    caller divides by counts of the whole step: nothing here divides by a number of the micro-batch,
    so how a step is cut into micro-batches does not change its gradient.
    """
    loss = LOSSES[args.loss]
    index = [i for g in groups for i in g.index]
    lengths = [len(ids) for g in groups for ids in g.completion_ids]
    pairs = compare(groups, args.label_smoothing, logps.device)
    x = Completions(
        policy=logps,
        ref=ref_logps[index].to(logps.device),
        length=torch.tensor(lengths, device=logps.device),
        chosen=pairs.better,
        rejected=pairs.worse,
        p=pairs.p,
        weight=pairs.weight)

    losses = loss.function(x, args)                                              # (M,) or (K,)
    if args.sft_coef:
        losses = losses - args.sft_coef * x.policy[x.chosen] / x.length[x.chosen]   # (10)
    weight = x.weight if loss.per == "prompts" else torch.ones_like(losses)
    sums = measure(x, losses.detach(), weight, args)
    return (losses * weight).sum(), sums


@torch.no_grad()
def measure(x, losses, weight, args):
    """Sums of the metrics over some groups, each prompt counting as one → Counter."""
    sums = Counter(loss=(losses * weight).double().sum().item())
    if not LOSSES[args.loss].reference:
        sums["logps/chosen"] = x.policy.double().sum().item()
        return sums
    rewards = args.beta * x.log_ratio                                            # (K,)
    chosen = rewards[x.chosen]                                                   # (M,)
    rejected = rewards[x.rejected]                                               # (M,)
    margin = chosen - rejected
    tie = args.beta * 1e-3                               # float32 rounding of sums of hundreds
    sign = torch.where(margin.abs() > tie, margin.sign(), 0)
    values = {
        "logps/chosen": x.policy[x.chosen],
        "logps/rejected": x.policy[x.rejected],
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margin,
        "rewards/accuracies": 0.5 * (1 + sign),          # ties count half
        "chosen_fell": (chosen < -tie).float()}
    for name, value in values.items():
        sums[name] = (value * x.weight).double().sum().item()
    return sums


def means(sums, groups, args):
    """Sums over a whole step or split → means: the loss by its normaliser, all else per prompt."""
    result = {name: value / len(groups) for name, value in sums.items()}
    result["loss"] = sums["loss"] / normaliser(groups, args)
    return result


def reference_logps(model, groups, args, autocast):
    """log π_ref of every completion: (N,), and the file of --output-dir in which it is kept.

    The file's name is a hash of all that the numbers depend on: config and weights of the
    reference, every token id (so tokeniser, template, lengths and rows), and the dtype.
    """
    parts = [common.model_fingerprint(model), common.data_fingerprint(groups), args.dtype]
    parts.append(next(model.parameters()).device.type)
    name = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
    file = Path(args.output_dir) / "ref_logps" / f"{name}.safetensors"
    if file.exists():
        print(f"reference log-probs: read from {file}")
        return load_file(file)["logps"], file
    packed = common.can_pack(model, groups)
    logps = for_all(
        completion_logps, model, groups, args.micro_batch_tokens, packed, autocast,
        "reference log-probs")
    return logps, file


# --- evaluation -----------------------------------------------------------------------------------

def evaluate(policy, encoder, groups, ref_logps, args, packed, autocast, show=0):
    """Exact means over all held-out groups (never a mean of batch means), and samples."""
    logps = for_all(
        completion_logps, policy, groups, args.micro_batch_tokens, packed, autocast, "evaluate")
    sums = micro_loss(logps, ref_logps, groups, args)[1]
    result = means(sums, groups, args) | {"n": len(groups)}
    if "rewards/accuracies" in result:
        accuracy = result["rewards/accuracies"]
        result["accuracy_se"] = math.sqrt(accuracy * (1 - accuracy) / len(groups))
    result |= sample_answers(policy, encoder, groups, args, autocast, show)
    return {f"eval/{name}": value for name, value in result.items()}


def sample_answers(policy, encoder, groups, args, autocast, show):
    """Samples for held-out prompts; where rows have an `answer`, the fraction that equals it."""
    by_prompt = {tuple(g.prompt_ids): g for g in groups}                         # each prompt once
    asked = list(by_prompt.values())
    with_answer = [g for g in asked if isinstance(g.row.get("answer"), (str, int, float))]
    asked = with_answer[:args.eval_samples] or asked[:min(show, args.eval_samples)]
    longest = max(len(ids) for g in groups for ids in g.completion_ids)
    room = encoder.max_positions - max((len(g.prompt_ids) for g in asked), default=0)
    if not asked or room <= 0:
        return {}

    prompts = [g.prompt_ids for g in asked]
    limit = int(min(2 * longest, 256, room))
    with autocast:
        samples = common.sample(
            policy, prompts, 1, limit, encoder.stops, seed=args.seed, progress="sample")
    texts = [encoder.decode(s.ids).strip() for s in samples]
    for g, s, text in list(zip(asked, samples, texts))[:show]:
        note = "" if s.ended else "  (truncated)"
        tqdm.write(f"  {encoder.text(g.prompt_ids)[-80:]!r} ▸ {text[:200]!r}{note}")
    if not with_answer:
        return {}
    answers = [str(g.row["answer"]).strip() for g in asked]
    correct = sum(text == answer for text, answer in zip(texts, answers)) / len(asked)
    error = math.sqrt(correct * (1 - correct) / len(asked))
    return {"right": correct, "right_se": error, "right_n": len(asked)}


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
        line += f", chosen fell in {100 * r['chosen_fell']:.0f} %"
    if "right" in r:
        line += f", correct samples {100 * r['right']:.1f} ± {100 * r['right_se']:.1f} %"
        line += f" of {r['right_n']}"
    return line


# --- checkpoints ----------------------------------------------------------------------------------
# --- shared: checkpoints ---

def lr_at(step, steps, args):
    """Learning rate of update `step` (from 0): linear warm-up, then the schedule, 0 at `steps`."""
    warmup = args.warmup_steps if args.warmup_steps >= 0 else steps // 10
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)                              # 0 … 1
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return args.learning_rate * decay[args.lr_schedule]


def save_checkpoint(out, model, optimizer, step):
    """Weights and AdamW's state after `step` updates, in one file that is renamed into place whole.

    No random state is kept: every random draw is a function of the seed and the step. The
    checkpoint before this one stays too.
    """
    state = {f"weight {name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for i, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            state[f"adamw {i} {name}"] = value.contiguous()
    folder = out / "checkpoint"
    file = folder / f"step-{step}.safetensors"
    before = common.newest_checkpoint(out)[1]
    common.save_tensors(state, file)
    for old in folder.glob("step-*.safetensors"):
        if old not in (before, file):
            old.unlink()


def load_checkpoint(out, model, optimizer):
    """Restores model and optimizer from the newest checkpoint of a run directory."""
    file = common.newest_checkpoint(out)[1]
    with common.failing(f"--resume: the checkpoint {file} cannot be read"):
        state = load_file(file)
    moments = {}
    with common.failing(f"--resume: the checkpoint {file} is not of this model"), torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(state.pop(f"weight {name}").view(p.shape))
        for key, value in state.items():
            _, i, name = key.split(" ")
            moments.setdefault(int(i), {})[name] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})


# --- end shared ---


# --- main -----------------------------------------------------------------------------------------

def main(argv=None):
    args = parse_args(argv)
    # --- setup
    loss = LOSSES[args.loss]
    usable = [name for name, row in FORMATS.items() if row.gives in loss.gives]

    def prepare(groups, account):
        """What this loss makes of the rows, before they are tokenised."""
        common.read_soft_labels(groups, args.label_smoothing)
        if loss.reference:
            return groups
        kept = [g for g in groups if g.scores != [0]]    # sft has no use for a bad completion …
        if len(kept) < len(groups):
            account.dropped["with label false"] = len(groups) - len(kept)
        for g in kept:
            del g.completions[1:], g.scores[1:]          # … nor for the rejected one
        return kept

    # --- shared: setup ---
    device = common.pick_device(args.device)
    autocast = common.pick_autocast(args.dtype, device)
    encoder = common.load_encoder(args.model, args.chat_template, args.chat)
    max_length = common.fitting_length(args, encoder)
    # --- end shared ---
    train, held_out = common.load_data(args, encoder, usable, max_length, prepare)

    # The reference is measured before the policy is loaded, or is the policy: never two in memory.
    every = train + held_out
    ref_logps = torch.full((sum(len(g.completion_ids) for g in every),), math.nan)           # (N,)
    ref_file = None
    if args.ref_model:
        other = common.load_encoder(args.ref_model, flag="--ref-model")
        common.check_same_tokeniser(encoder, other, f"--ref-model {args.ref_model}")
        reference = common.load_model(args.ref_model, encoder, device, "--ref-model")
        ref_logps, ref_file = reference_logps(reference, every, args, autocast)
        del reference
    model = common.load_model(args.model, encoder, device)
    packed = common.can_pack(model, train)
    if loss.reference and not args.ref_model:
        ref_logps, ref_file = reference_logps(model, every, args, autocast)

    # --- shared: open the run ---
    plan = Plan(len(train), args.batch_size, args.epochs, args.max_steps, args.seed)
    hashes = {"data_sha256": common.data_fingerprint(train + held_out)}
    hashes["model_sha256"] = common.model_fingerprint(model)
    out, start, evaluated = common.open_run(args, len(plan), **hashes)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8,
        weight_decay=args.weight_decay, fused=device.type != "mps")
    if start:
        load_checkpoint(out, model, optimizer)
    common.describe_run(model, train, held_out, plan, args, packed)
    # --- end shared ---
    if ref_file and not ref_file.exists():
        common.save_tensors({"logps": ref_logps}, ref_file)

    def look(step, show=0):
        """Evaluates after `step` updates, for metrics.jsonl and the terminal."""
        result = evaluate(model, encoder, held_out, ref_logps, args, packed, autocast, show)
        log(out, step, result)
        # Another reference or an SFT term moves the loss of step 0 away from what theory says.
        as_theory_says = step == 0 and not args.ref_model and not args.sft_coef
        tqdm.write(eval_line(step, result, loss.at_start(args) if as_theory_says else None))

    # --- shared: before the loop ---
    def due(step):
        """Whether to evaluate after `step` updates."""
        return step in (0, len(plan)) or args.eval_every and step % args.eval_every == 0

    if held_out and due(start) and not evaluated:
        look(start, show=3)
    stopped = common.catch_signals()
    saved_at = time.monotonic()
    steps = range(start, len(plan))
    bar = tqdm(steps, args.loss, len(plan), initial=start, unit="step", disable=None)
    # --- end shared ---

    # --- loop
    for step in bar:
        began = time.perf_counter()
        groups = [train[i] for i in plan[step]]
        sums = Counter()

        # The gradient of the whole step, summed over micro-batches (memory, not statistics).
        optimizer.zero_grad(set_to_none=True)
        for micro in common.micro_batches(groups, args.micro_batch_tokens, packed):
            with autocast:
                batch = common.lay_out(model, micro, packed)
                logps = completion_logps(model, batch)                          # (K,)
            part, part_sums = micro_loss(logps, ref_logps, micro, args)
            (part / normaliser(groups, args)).backward()
            sums.update(part_sums)

        # --- shared: update ---
        # A gradient that is not finite would ruin the weights: the state before it is kept instead.
        bound = args.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), bound)
        if not torch.isfinite(grad_norm):
            save_checkpoint(out, model, optimizer, step)
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

        # --- shared: log ---
        log(out, step + 1, metrics)
        shown = {name: f"{metrics[key]:.4g}" for name, key in shown.items() if key in metrics}
        bar.set_postfix(shown, refresh=False)
        # --- end shared ---

        # --- shared: save and evaluate ---
        last = step + 1 == len(plan)
        asked = args.save_every and (step + 1) % args.save_every == 0
        if last or stopped or asked or time.monotonic() - saved_at > SAVE_SECONDS:
            save_checkpoint(out, model, optimizer, step + 1)
            saved_at = time.monotonic()
        if held_out and due(step + 1):
            look(step + 1, show=3 * last)
        if stopped and not last:
            bar.close()
            print(f"stopped after step {step + 1} of {len(plan)}; --resume goes on from there")
            raise SystemExit(130)
        # --- end shared ---

    # --- save
    common.save_model(out, model, encoder.tokenizer)
    print(f"saved in {out}: model, args.json, metrics.jsonl, checkpoint/")


if __name__ == "__main__":
    common.run(main)
