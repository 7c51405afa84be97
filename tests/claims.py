"""Statements of the literature about preference alignment, each checked by a small experiment.

    python tests/claims.py                         # lists the names with their claims
    python tests/claims.py pass-at-k --seeds 3     # 1 to 4 minutes on one CPU core

Prints one line a setting and a closing line: claim, what was measured, verdict. ± is the standard
deviation over seeds; a seed draws data, order of training and samples. A claim has parts "a above
b"; a part holds where the mean difference over seeds exceeds its standard deviation.

The experiments run the scripts through their main(), on the toy's sums, which its policy was not
pretrained on. So a verdict is about this toy: it can refute an "always", never prove one.
"""
import argparse
import contextlib
import io
import itertools
import json
import math
import random
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

ROOT = Path(__file__).parents[1]
TOY = ROOT / "tests" / "toy"
sys.path[:0] = [str(ROOT), str(TOY)]

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import common  # noqa: E402
import make_toy  # noqa: E402
import score  # noqa: E402
import train_dpo  # noqa: E402
import train_grpo  # noqa: E402
import train_rm  # noqa: E402
from common import Group, Row, completion_logps, token_logps  # noqa: E402
from make_toy import ask, say, slip  # noqa: E402

SCRIPTS = {"dpo": train_dpo, "rm": train_rm, "grpo": train_grpo, "score": score}
BASE = TOY / "model"                             # the toy's policy
RIGHT = f"{TOY}/reward.py:right"                 # rewards as train_grpo.py takes them
MARKED = f"{__file__}:score_marked"
LETTERS = f"{__file__}:score_letters"
TABLE = f"{__file__}:look_up"


# --- numbers --------------------------------------------------------------------------------------

def mean_std(values):
    """Mean and standard deviation (n − 1; 0 for one value)."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std().item() if len(values) > 1 else 0.0


def mean(values):
    return mean_std(values)[0]


def plus_minus(values):
    return "{:.3g} ± {:.1g}".format(*mean_std(values))


def auc(positive, negative):
    """Probability that a positive scores above a negative; ties count half."""
    difference = torch.tensor(positive)[:, None] - torch.tensor(negative)[None]
    return (0.5 * (1 + difference.sign())).mean().item()


def kl(p, q):
    """KL(p ‖ q) of two tables (…, A) of probabilities, mean over rows."""
    return (p * (p / q).log()).sum(-1).mean().item()


def accuracy(rows):
    """% of scored pairs ranked right, from the columns of score.py."""
    return 100 * mean([float(r["score_chosen"] > r["score_rejected"]) for r in rows])


def ideal(values, budget):
    """The highest mean reward at this KL: π_ref tilted by e^{r/β}, from its samples' rewards."""
    r = torch.tensor(values, dtype=torch.float64)                                # (P, N)
    even = torch.full_like(r, 1 / r.shape[1])
    low, high = 0.0, 50.0                                    # 1/β, by bisection
    for _ in range(40):
        tilt = (low + high) / 2
        tilted = (tilt * r).softmax(1)
        low, high = (tilt, high) if kl(tilted, even) < budget else (low, tilt)
    return (tilted * r).sum(1).mean().item()


# --- a laboratory: runs the scripts, keeps the table ----------------------------------------------

def read(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


class Lab:
    """Runs of one experiment in a scratch directory; table: {setting: {metric: [by seed]}}."""

    def __init__(self, scratch, story=None, quick=False):
        self.scratch = Path(scratch)
        self.story = story               # directory of a language model
        self.quick = quick               # two steps a run: for the test
        self.made = itertools.count()
        self.table = {}

    def begin(self, seed):
        self.seed = seed
        self.rng = random.Random(seed)
        self.rows = problems(seed)
        self.test = self.rows[-20 if self.quick else -100:]

    def call(self, script, flags, inputs):
        """A script's main(), silenced; what it printed is shown where it fails. inputs: flag →
        path, several paths, or rows, which become a file."""
        argv = flags.split()
        for name, value in inputs.items():
            if isinstance(value, list) and isinstance(value[0], dict):
                file = self.scratch / f"{next(self.made)}.jsonl"
                make_toy.write(file, value)
                value = file
            argv += [f"--{name.replace('_', '-')}"]
            argv += map(str, value) if isinstance(value, list) else [str(value)]
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                SCRIPTS[script].main(argv)
        except SystemExit:
            sys.exit(f"{script} {' '.join(argv)}\n{printed.getvalue()[-2000:]}")

    def train(self, script, flags="", **inputs):
        """A trainer, two epochs, nothing held out → its run directory. Flags given here win."""
        out = self.scratch / f"{next(self.made)}"
        flags = f"--output-dir {out} --seed {self.seed} --eval-fraction 0 --epochs 2 {flags}"
        self.call(script, flags + " --max-steps 2" * self.quick, inputs)
        return out

    def evals(self, out):
        """Every evaluation of a run, names without "eval/", the first before any step."""
        lines = [line for line in read(out / "metrics.jsonl") if "loss" not in line]
        return [{k.removeprefix("eval/"): v for k, v in line.items()} for line in lines]

    def score(self, flags="", **inputs):
        """score.py → the rows that its --output wrote."""
        out = self.scratch / f"{next(self.made)}.jsonl"
        self.call("score", f"--seed {self.seed} --output {out} {flags}", inputs)
        return read(out)

    def add(self, setting, **metrics):
        row = self.table.setdefault(setting, {})
        for name, value in metrics.items():
            row.setdefault(name, []).append(value)

    def judge(self, parts):
        """[(metric, higher, lower), …], each a setting or a number → (measured, verdict)"""
        said = []
        held = []
        count = len(next(iter(next(iter(self.table.values())).values())))
        for metric, *sides in parts:
            values = [self.table[s][metric] if isinstance(s, str) else [s] * count for s in sides]
            gap, std = mean_std([x - y for x, y in zip(*values)])
            held.append(gap > std)
            shown = [f"{s} {plus_minus(v)}" if isinstance(s, str) else f"{s:g}"
                     for s, v in zip(sides, values)]
            said.append(f"{metric}: {shown[0]} {'>' if held[-1] else 'not >'} {shown[1]}")
        verdict = "holds" if all(held) else "depends" if any(held) else "does not hold"
        return "; ".join(said), verdict


# --- data: sums that the policy was not pretrained on ---------------------------------------------

def problems(seed):
    """Rows {prompt, answer, terms} in an order of this seed."""
    rows = []
    for row in read(TOY / "pairs.jsonl") + read(TOY / "prompts.jsonl"):
        terms = [int(n) for n in row["prompt"][0]["content"].split("+")]
        rows.append({"prompt": row["prompt"], "answer": row["answer"], "terms": terms})
    random.Random(seed).shuffle(rows)
    return rows


def said(row, text):
    """A completion in the form of its prompt."""
    return text if isinstance(row["prompt"], str) else say(text)


def pair(row, chosen, rejected, **columns):
    return row | {"chosen": said(row, chosen), "rejected": said(row, rejected)} | columns


def slips(rows, seed, flip=0.0):
    """Pairs of the correct sum and a slip; a fraction of the labels is the wrong way round."""
    rng = random.Random(f"slips {seed}")
    pairs = []
    for row in rows:
        texts = [row["answer"], slip(*row["terms"], rng)]
        if rng.random() < flip:
            texts.reverse()
        pairs.append(pair(row, *texts))
    return pairs


OPTIONS = SimpleNamespace(chat=False, chat_template_kwargs={}, micro_batch_tokens=8192)


def open_encoder(folder):
    return common.load_encoder(str(folder), OPTIONS)


def open_policy(folder):
    return common.load_model(str(folder), open_encoder(folder), torch.device("cpu"))


def draw(folder, rows, n, seed, limit=8):
    """n samples of a policy for each row → [Group with completions (texts) and completion_ids]."""
    encoder = open_encoder(folder)
    groups = [encoder(Group(row["prompt"], [], Row(row))) for row in rows]
    samples = common.sample(
        open_policy(folder), [g.prompt_ids for g in groups], n, limit, encoder.stops, seed=seed)
    for i, g in enumerate(groups):
        g.completion_ids = [s.ids for s in samples[i * n:(i + 1) * n]]
        g.completions = [encoder.decode(ids, g.prompt) for ids in g.completion_ids]
    return groups


def logps(folder, groups, measure=completion_logps):
    """log π of the completions of groups with ids (N,), or of their tokens (T,)."""
    exact = contextlib.nullcontext()
    parts = common.for_all(measure, open_policy(folder), groups, OPTIONS, True, exact)
    return torch.tensor(sum(parts, []), dtype=torch.float64)


def right(text, row):
    """Marks behind a sum do not count: see marked()."""
    return float(text.strip().rstrip("!") == row["answer"])


def letters(text, row):
    return float(text.count("s"))


def score_letters(completions, **_):
    """letters() as train_grpo.py calls a reward."""
    return [letters(text, None) for text in completions]


def score_marked(completions, answer, **_):
    """right() as train_grpo.py calls a reward."""
    return [right(c[0]["content"], {"answer": a}) for c, a in zip(completions, answer)]


def look_up(completions, table, **_):
    """The reward that a row's table has for a completion, −2 for others, for train_grpo.py."""
    return [values.get(text, -2.0) for text, values in zip(completions, table)]


def rewarded(groups, reward=right):
    """Rewards of samples (P, N)"""
    return [[reward(text, g.row) for text in g.completions] for g in groups]


def probe(folder, rows, seed, ref=BASE, reward=right, n=4, limit=8):
    """A policy's own samples: KL(π‖π_ref) per completion, mean reward, tokens."""
    groups = draw(folder, rows, n, seed + 1000, limit)
    lengths = [len(ids) for g in groups for ids in g.completion_ids]
    far = (logps(folder, groups) - logps(ref, groups)).mean().item()
    return {"kl": far, "reward": mean(sum(rewarded(groups, reward), [])), "length": mean(lengths)}


# --- the claims: each function is one seed of an experiment, and fills lab.table ------------------

class Claim(NamedTuple):
    """A row of CLAIMS."""
    said: str                 # one sentence, and who says it
    function: Callable        # one seed: fills the table of a Lab
    parts: list               # (metric, higher, lower): settings of the table, or numbers


CLAIMS = {}


def claim(name, said, parts):
    """Puts the function below it into CLAIMS."""
    def enter(function):
        CLAIMS[name] = Claim(said, function, parts)
        return function
    return enter


@claim(
    "falling", "DPO lowers the chosen log-prob too, more where the two share most tokens (Pal et "
    "al. 2024, Razin et al. 2024)",
    [("change", higher, "near")
     for higher in (0, "far", "sft-coef 1", "dpop", "beta 0.5", "lr 1e-4", "ipo")])
def falling(lab):
    """Change of the held-out chosen log-prob in nats, % of pairs where it fell, correct samples in
    %. near: the rejected sum differs in one digit; far: in all."""
    settings = {
        "near": "", "far": "", "sft-coef 1": "--sft-coef 1", "dpop": "--loss dpop",
        "beta 0.5": "--beta 0.5", "lr 1e-4": "--lr 1e-4", "ipo": "--loss ipo"}
    for name, flags in settings.items():
        rng = random.Random(lab.seed)
        pairs = []
        for row in lab.rows[:500]:
            digits = list(row["answer"])
            for i in range(len(digits)) if name == "far" else [rng.randrange(len(digits))]:
                digits[i] = rng.choice("123456789".replace(digits[i], ""))
            pairs.append(pair(row, row["answer"], "".join(digits)))
        first, *_, last = lab.evals(
            lab.train("dpo", flags, dataset=pairs[:400], eval_dataset=pairs[400:]))
        lab.add(name, change=last["logps/chosen"] - first["logps/chosen"],
                fell=100 * last["chosen_fell"], right=100 * last["right"], kl=last["kl"])


def stories(rng):
    """Prompts for a story model → rows to train on, rows to test with."""
    rows = []
    for a in "dog cat boy girl bird bear frog fish".split():
        for b in "Tim Tom Ben Sam Lily Sue Mia Ann Max Bob Joe Amy".split():
            rows.append({"prompt": f"Once upon a time there was a {a} named {b}."})
    rng.shuffle(rows)
    return rows[:72], rows[72:]


@claim(
    "frontier", "DPO has the best reward at every KL (Rafailov et al. 2023, fig. 2)",
    [("missed", f"{other} {beta}", f"dpo {beta}")
     for beta in (0.1, 0.5) for other in ("soft", "ipo", "grpo")]
    + [("missed", other, "dpo 0.5") for other in ("sft on best of 8", "best of 8")])
def frontier(lab):
    """KL and reward on own samples, and how much reward the ideal() tilt of the reference has more
    at that KL. Toy: 1 for the correct sum; --story: letters s in 24 tokens."""
    model, reward, limit, spec = BASE, right, 8, RIGHT
    train, test = lab.rows[:320], lab.test
    if lab.story:
        model, reward, limit, spec = lab.story, letters, 24, LETTERS
        train, test = stories(lab.rng)
    pairs = []
    best = []
    groups = draw(model, train, 8, lab.seed, limit)
    for g, r in zip(groups, rewarded(groups, reward)):
        best.append(g.row | {"response": said(g.row, g.completions[r.index(max(r))])})
        for i in range(0, 8, 2):
            first = lab.rng.random() < 1 / (1 + math.exp(r[i + 1] - r[i]))
            a, b = (i, i + 1) if first else (i + 1, i)
            pairs.append(pair(g.row, g.completions[a], g.completions[b],
                              score_chosen=r[a], score_rejected=r[b]))
    flags = f"--model {model} --lr 5e-4 --epochs 1"
    if lab.story:                    # samples are cut: no end token may stand behind them
        shortest = min(len(g.prompt_ids) for g in groups)
        flags += f" --lr 1e-4 --overlong truncate --max-length {shortest + 20}"
    runs = {"sft on best of 8": lab.train("dpo", f"{flags} --loss sft --epochs 4", dataset=best)}
    for beta in (0.1, 0.5):
        for loss in ("dpo", "soft", "ipo"):
            runs[f"{loss} {beta}"] = lab.train(
                "dpo", f"{flags} --loss {loss} --beta {beta}", dataset=pairs)
        runs[f"grpo {beta}"] = lab.train(
            "grpo", f"{flags} --max-length 512 --loss rloo --kl reward --beta {beta} --max-steps 30"
            f" --batch-size 8 --max-new-tokens {limit} --reward {spec}", dataset=train)
    start = rewarded(draw(model, test, 64, lab.seed + 1000, limit), reward)
    for name, out in runs.items():
        got = probe(out, test, lab.seed, model, reward, 8, limit)
        lab.add(name, kl=got["kl"], reward=got["reward"],
                missed=ideal(start, got["kl"]) - got["reward"])
    for n in (2, 8):
        far = math.log(n) - (n - 1) / n
        got = mean([score.best_of_n(r, n, r) for r in start])
        lab.add(f"best of {n}", kl=far, reward=got, missed=ideal(start, far) - got)


@claim(
    "pass-at-k", "DPO's pass@k is always above that of its start (the notes of this project)",
    [(f"pass@{k}", "dpo", "start") for k in (1, 4, 8, 32)])
def pass_at_k(lab):
    """pass@k in % from 64 samples for each unseen sum."""
    out = lab.train("dpo", "--epochs 1", dataset=slips(lab.rows[:2000], lab.seed))
    for name, folder in (("start", BASE), ("dpo", out)):
        hits = rewarded(draw(folder, lab.test, 64, lab.seed))
        for k in (1, 4, 8, 32):
            lab.add(name, **{f"pass@{k}": 100 * mean([score.best_of_n(h, k, h) for h in hits])})


@claim(
    "noise", "with 30 % of the labels flipped these keep more than DPO (Mitchell 2023, Chowdhury "
    "et al. 2024, Azar et al. 2023)",
    [("right", f"{loss} 30%", "dpo 30%") for loss in ("cdpo", "robust", "ipo", "soft", "distill")])
def noise(lab):
    """Correct samples in % with a share of the labels flipped. cdpo, robust: --label-smoothing at
    that rate; soft, distill: fitted to the scores of a reward model of the same labels."""
    for flip in (0.0, 0.1, 0.2, 0.3):
        pairs = slips(lab.rows[:320], lab.seed, flip)
        scored = lab.score(dataset=pairs, reward=lab.train("rm", dataset=pairs))
        settings = {
            "dpo": "", "cdpo": f"--label-smoothing {flip}", "ipo": "--loss ipo",
            "robust": f"--loss robust --label-smoothing {flip}",
            "soft": "--loss soft", "distill": "--loss distill"}
        for name, flags in settings.items():
            if flip or name not in ("cdpo", "robust"):
                data = scored if name in ("soft", "distill") else pairs
                out = lab.train("dpo", flags, dataset=data)
                lab.add(f"{name} {flip:.0%}", right=100 * probe(out, lab.test, lab.seed)["reward"])


@claim(
    "fitting", "fitting a reward model (soft) beats DPO on the same pairs; unlabelled pairs add to "
    "it (Fisch et al. 2024, the notes)",
    [("J", "soft", "dpo"), ("J", "soft, 3 × unlabelled", "soft"), ("J", "dpo", "dpo, 12 epochs")])
def fitting(lab):
    """Labels drawn with σ(r − r'), r = 2 for the correct sum. J = E[r] − 0.1 KL(π‖π_ref) on own
    samples: the closed-form optimum maximises it."""
    labelled = slips(lab.rows[:256], lab.seed, 1 / (1 + math.exp(2)))
    more = slips(lab.rows[:1024], lab.seed, 0.5)     # only their reward model's labels count
    rm = lab.train("rm", dataset=labelled)
    soft, soft_more = (lab.score(dataset=rows, reward=rm) for rows in (labelled, more))
    runs = {
        "start": BASE,
        "dpo": lab.train("dpo", "--epochs 3", dataset=labelled),
        "dpo, 12 epochs": lab.train("dpo", "--epochs 12", dataset=labelled),
        "ipo": lab.train("dpo", "--loss ipo --epochs 3", dataset=labelled),
        "soft": lab.train("dpo", "--loss soft --epochs 3", dataset=soft),
        "soft, 3 × unlabelled": lab.train("dpo", "--loss soft --epochs 1", dataset=soft_more)}
    for name, folder in runs.items():
        got = probe(folder, lab.test, lab.seed)
        J = 2 * got["reward"] - 0.1 * got["kl"]
        lab.add(name, J=J, right=100 * got["reward"], kl=got["kl"])


SUMS = ("below 50", "above 50", "three digits", "three operands")


@claim(
    "implicit", "an explicit reward model ranks better than DPO's implicit one (Lin et al. 2024)",
    [("accuracy", f"{name}, rm", f"{name}, dpo") for name in SUMS])
def implicit(lab):
    """Held-out pairs ranked right in %, after training on operands below 50. The policy's
    pretraining had neither three-digit operands nor three of them."""
    low = [row for row in lab.rows if max(row["terms"]) < 50]
    tests = {"below 50": low[-150:],
             "above 50": [row for row in lab.rows if min(row["terms"]) >= 50][:150],
             "three digits": [], "three operands": []}
    for _ in range(150):
        x, y, z = (lab.rng.randrange(10, 100) for _ in range(3))
        for name, a, text in ((SUMS[2], 100 + x, 100 + x), (SUMS[3], x + y, f"{x}+{y}")):
            tests[name].append({"prompt": ask(text, z), "answer": str(a + z), "terms": (a, z)})
    train = slips(low[:600], lab.seed)
    rewards = {
        "rm": {"reward": lab.train("rm", dataset=train)},
        "dpo": {"implicit": lab.train("dpo", dataset=train), "ref_model": BASE}}
    for name, rows in tests.items():
        for kind, reward in rewards.items():
            scored = lab.score(dataset=slips(rows, lab.seed), **reward)
            lab.add(f"{name}, {kind}", accuracy=accuracy(scored))


@claim(
    "lists", "all pairs of a list in one step generalise better than the same pairs shuffled "
    "(Ouyang et al. 2022)",
    [("accuracy", f"lists, epoch {e}", f"shuffled, epoch {e}") for e in (1, 4)])
def lists(lab):
    """Held-out pairs ranked right in % after each epoch of a reward model; lists of 4 sums with
    noisy ranks, 48 pairs a step: all 6 of a list in one step, or shuffled."""
    ranked = []
    shuffled = []
    for row in lab.rows[:260]:
        true = int(row["answer"])
        values = [true, *(true + d for d in lab.rng.sample((-21, -10, -2, -1, 1, 2, 10, 21), 3))]
        noisy = 1.5 if len(ranked) < 200 else 0.0
        scores = [-abs(v - true) ** 0.5 + lab.rng.gauss(0, noisy) for v in values]
        texts = [say(str(v)) for v in values]
        ranked.append({"prompt": row["prompt"], "completions": texts, "scores": scores})
        for i, j in itertools.permutations(range(4), 2):
            if noisy and scores[i] > scores[j]:
                shuffled.append(row | {"chosen": texts[i], "rejected": texts[j]})
    for name, data, size in (("lists", ranked[:200], 8), ("shuffled", shuffled, 48)):
        flags = f"--batch-size {size} --eval-every 25 --epochs 4 --lr 1e-3"
        out = lab.train("rm", flags, dataset=data, eval_dataset=ranked[200:])
        for epoch, e in enumerate(lab.evals(out)[1:], 1):
            lab.add(f"{name}, epoch {epoch}", accuracy=100 * e["rewards/accuracies"])


def marked(lab):
    """A policy whose sums, half of them slips, end with 0 to 5 marks "!" that mean nothing."""
    rows = []
    for row in lab.rows[:1500]:
        text = row["answer"] if lab.rng.random() < 0.5 else slip(*row["terms"], lab.rng)
        rows.append(row | {"response": say(text + "!" * lab.rng.randrange(6))})
    return lab.train("dpo", "--loss sft --epochs 8 --batch-size 64 --lr 2e-3", dataset=rows)


@claim(
    "length", "rewards and DPO prefer length; calibration, R-DPO and length-normalised losses less "
    "(Huang et al. 2024, Park et al. 2024, Meng et al. 2024)",
    [("bias", "rm", 0), ("bias", "rm", "rm, calibrated")]
    + [("length", "dpo", lower) for lower in ("start", "rdpo", "dpo-norm", "simpo")])
def length(lab):
    """Marked sums; chosen is the correct one in 80 % and the longer one in 80 % of the pairs. bias:
    accuracy where chosen is the longer minus where it is the shorter; tokens and % of samples."""
    sft = marked(lab)
    pairs = []
    for row in lab.rows[1500:2200]:
        texts = [row["answer"], slip(*row["terms"], lab.rng)]
        marks = sorted(lab.rng.sample(range(6), 2), reverse=lab.rng.random() < 0.8)
        if lab.rng.random() < 0.2:
            texts.reverse()
        pairs.append(pair(row, *(text + "!" * n for text, n in zip(texts, marks)), more=marks))
    train, test = pairs[:500], pairs[500:]
    rm = lab.train("rm", dataset=train)
    for name, flags in {"rm": "", "rm, calibrated": "--calibrate-length"}.items():
        scored = lab.score(flags, dataset=test, reward=rm)
        longer = [r for r in scored if r["more"][0] > r["more"][1]]
        shorter = [r for r in scored if r["more"][0] < r["more"][1]]
        lab.add(name, bias=accuracy(longer) - accuracy(shorter))
    settings = {
        "dpo": "", "rdpo": "--loss rdpo --length-penalty 0.2",
        "dpo-norm": "--loss dpo-norm --beta 0.5", "simpo": "--loss simpo"}
    runs = {"start": sft}
    for name, flags in settings.items():
        runs[name] = lab.train("dpo", f"--model {sft} --lr 3e-4 {flags}", dataset=train)
    for name, folder in runs.items():
        got = probe(folder, lab.test, lab.seed, sft, limit=12)
        lab.add(name, length=got["length"], right=100 * got["reward"])


@claim(
    "credit", "DPO's implicit reward finds the wrong token, and can guide the decoding of its "
    "start (Rafailov et al. 2024, From r to Q*)",
    [("auc", "implicit", 0.9), ("auc", "implicit", "reference"),
     ("right", "start, guided", "start"), ("right", "start, guided", "dpo")])
def credit(lab):
    """AUC with which the fall of a token's log-prob finds the one wrong digit of a sum, and with
    which −log π_ref does; correct samples in % where the implicit reward guides the start."""
    dpo = lab.train("dpo", "--epochs 1", dataset=slips(lab.rows[:1000], lab.seed))
    encoder = open_encoder(BASE)
    groups = []
    wrong = []                                               # whether a token is the wrong one
    for row in lab.test * 3:
        text = slip(*row["terms"], lab.rng)
        differs = [a != b for a, b in zip(text, row["answer"])]
        if len(text) == len(row["answer"]) and sum(differs) == 1:
            groups.append(encoder(Group(row["prompt"], [text], Row(row))))
            wrong += [*differs, None]                        # None: the end token
    before = logps(BASE, groups, token_logps)
    after = logps(dpo, groups, token_logps)
    for name, blame in {"implicit": before - after, "reference": -before}.items():
        found = [b for b, w in zip(blame.tolist(), wrong) if w]
        other = [b for b, w in zip(blame.tolist(), wrong) if w is False]
        lab.add(name, auc=auc(found, other))
    ways = {"start": "--samples 4", "dpo": "--samples 4", "start, greedy": "--temperature 0",
            "start, guided": "--num-beams 4 --beam-chunk 1"}
    for name, flags in ways.items():
        policy = dpo if name == "dpo" else BASE
        rows = lab.score(f"{flags} --max-new-tokens 8", dataset=lab.test, policy=policy,
                         implicit=dpo, ref_model=BASE)
        lab.add(name, right=100 * mean([right(r["response"][0]["content"], r) for r in rows]))


@claim(
    "overoptimise", "optimised for a proxy of less data, the gold reward is lower; ensembles help "
    "(Gao et al. 2022, Coste et al. 2023)",
    [("gold", "GRPO, 1000", "GRPO, 100"), ("gold", "GRPO, mean of 3", "GRPO, 300"),
     ("gold 32", "best of n, 3000", "best of n, 100"),
     ("gold 32", "best of n, min of 3", "best of n, 300")])
def overoptimise(lab):
    """% of correct samples (gold) for the best of n and for GRPO by the reward model of 100 to
    3,000 pairs; mean and minimum (best of n only) of three reward models of 100 pairs."""
    rms = {}
    parts = {"100": (0, 100), "b": (100, 200), "c": (200, 300), "300": (0, 300), "1000": (0, 1000),
             "3000": (0, 3000)}
    for name, (first, end) in parts.items():
        pairs = slips(lab.rows[first:end], f"{lab.seed} {name}")
        rms[name] = lab.train("rm", f"--epochs {max(1, 1000 // (end - first))}", dataset=pairs)
    three = [rms["100"], rms["b"], rms["c"]]                 # as many labels as "300" has
    for name in ("100", "300", "1000", "3000", "mean of 3", "min of 3"):
        several = " of 3" in name
        flags = f"--aggregate {name[:4].strip()}" if several else ""
        rows = lab.score(f"{flags} --samples 32 --max-new-tokens 8", policy=BASE,
                         dataset=lab.test[:64], reward=three if several else rms[name])
        proxy = [row["score"] for row in rows]
        gold = [right(row["response"][0]["content"], row) for row in rows]
        for n in (1, 4, 32):
            best = [score.best_of_n(proxy[i:i + 32], n, gold[i:i + 32])
                    for i in range(0, len(rows), 32)]
            lab.add(f"best of n, {name}", **{f"gold {n}": 100 * mean(best)})
    for name in ("100", "300", "1000", "mean of 3"):
        out = lab.train("grpo", "--beta 0 --lr 1e-3 --lr-schedule constant --batch-size 8 "
                        f"--max-new-tokens 8 --max-steps 40 --watch {RIGHT}",
                        dataset=lab.rows[3000:-100], reward=rms.get(name, three))
        lab.add(f"GRPO, {name}", gold=100 * probe(out, lab.test, lab.seed)["reward"])


@claim(
    "on-policy", "iterative DPO beats offline DPO at as many labels (Guo et al. 2024)",
    [("right", f"iterative, {which} π_ref", "offline") for which in ("first", "last")])
def on_policy(lab):
    """Correct samples in %: 480 prompts of which 4 samples each are labelled, all by the start or
    in 3 rounds by the last policy; π_ref is the start, or the last policy."""
    def best_and_worst(policy, rows, seed):
        """Pairs of a policy's own samples; none where all four are right or wrong."""
        pairs = []
        groups = draw(policy, rows, 4, seed)
        for g, r in zip(groups, rewarded(groups)):
            if max(r) > min(r):
                best, worst = r.index(max(r)), r.index(min(r))
                pairs.append(pair(g.row, g.completions[best], g.completions[worst]))
        return pairs

    pairs = best_and_worst(BASE, lab.rows[:480], lab.seed)
    runs = {"start": BASE, "offline": lab.train("dpo", "--epochs 3", dataset=pairs)}
    for name in ("iterative, first π_ref", "iterative, last π_ref"):
        policy = BASE
        for i in range(3):
            pairs = best_and_worst(policy, lab.rows[i * 160:][:160], lab.seed + i)
            flags = f"--epochs 3 --model {policy}"
            flags += f" --ref-model {BASE}" if "first" in name else ""
            policy = lab.train("dpo", flags, dataset=pairs)
        runs[name] = policy
    for name, policy in runs.items():
        lab.add(name, right=100 * probe(policy, lab.test, lab.seed)["reward"])


def grpo(settings, start=None):
    """GRPO, 24 steps of 64 samples: correct samples in %, KL(π‖π_ref), tokens. settings: {name:
    flags}; start: makes the policy to start from."""
    def measure(lab):
        model = start(lab) if start else BASE
        for name, flags in settings.items():
            out = lab.train(
                "grpo", f"--model {model} --max-new-tokens 12 --max-steps 24 --batch-size 8 "
                f"--group-size 8 --lr 1e-3 --beta 0 --reward {MARKED if start else RIGHT} {flags}",
                dataset=lab.rows[1500:-100])
            got = probe(out, lab.test, lab.seed, model, limit=12)
            lab.add(name, right=100 * got["reward"], kl=got["kl"], length=got["length"])
    return measure


claim("grpo-length", "GRPO's 1/length weight makes samples longer than Dr. GRPO's (Liu et al. "
      "2025)", [("length", "grpo", "dr-grpo")])(
    grpo({"grpo": "", "dr-grpo": "--loss dr-grpo --advantage group-std"}, marked))
claim("grpo-std", "advantages that are not divided by the std learn better (Liu et al. 2025)",
      [("right", "none", "group-std")])(grpo({"none": "--advantage none", "group-std": ""}))
claim("grpo-group", "larger groups learn better from as many samples (Shao et al. 2024)",
      [("right", "4", "2"), ("right", "8", "4"), ("right", "16", "8")])(
    grpo({f"{n}": f"--group-size {n} --batch-size {64 // n}" for n in (2, 4, 8, 16)}))
claim("grpo-kl", "a KL with the objective's gradient does better than k3, at β 0.2 (DeepSeek-V3.2)",
      [("right", "k3-unbiased", "k3"), ("right", "reward", "k3")])(
    grpo({kind: f"--kl {kind} --beta 0.2" for kind in ("k3", "k3-unbiased", "reward")}))
claim("grpo-updates", "several updates per batch learn more from as many samples (Schulman et al. "
      "2017)", [("right", "2", "1"), ("right", "4", "2")])(
    grpo({f"{n}": f"--updates-per-batch {n}" for n in (1, 2, 4)}))


TWO = math.log(2)
STEP_0 = {
    "dpo": TWO, "robust": TWO, "ipo": 25, "hinge": 1, "dpop": TWO, "dpo-norm": TWO, "sppo": 50,
    "nca": 2 * TWO, "bco": 2 * TWO, "apo-zero": 1, "apo-down": 1, "kto": 0.5, "plackett-luce": TWO,
    "exo": -TWO - 0.5 * math.log(0.999 * 0.001)}


@claim(
    "step-0", "before the first step these 14 losses have the value of theory (the papers)",
    [("error", 2e-3, name) for name in (*STEP_0, "grpo")])
def step_0(lab):
    """|loss before the first step − theory|; GRPO: clipped share and KL of its first step."""
    pairs = slips(lab.rows[:100], lab.seed)
    for loss, theory in STEP_0.items():
        out = lab.train("dpo", f"--loss {loss} --max-steps 1 --eval-samples 1", dataset=pairs[:64],
                        eval_dataset=pairs[64:])
        lab.add(loss, error=abs(lab.evals(out)[0]["loss"] - theory))
    out = lab.train("grpo", "--max-steps 1 --batch-size 8 --max-new-tokens 8", dataset=lab.rows[:8])
    first = read(out / "metrics.jsonl")[0]
    lab.add("grpo", error=max(first["clip_ratio"], abs(first["kl"])))


def world(lab):
    """3 prompts with 6 answers of one token that can be enumerated → (directory of π_ref, groups of
    all answers, rewards (P, 6)); π_ref is fitted to answer + end."""
    tokenizer = make_toy.make_tokeniser()
    torch.manual_seed(lab.seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0))
    folder = lab.scratch / f"{next(lab.made)}"
    with contextlib.redirect_stderr(io.StringIO()):          # a progress bar
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    groups = [open_encoder(folder)(Group(x, list("abcdef"))) for x in ("?", "??", "???")]
    rows = []
    for g in groups:
        for y in g.completions:
            rows += [{"prompt": g.prompt, "response": y}] * lab.rng.randint(1, 6)
    flags = f"--loss sft --model {folder} --max-steps 150 --lr 1e-2 --batch-size 128"
    ref = lab.train("dpo", flags, dataset=rows)
    return ref, groups, [[lab.rng.uniform(-1, 1) for _ in range(6)] for _ in groups]


@claim(
    "optimum", "these reach π* = π_ref e^{r/β}/Z, KL below 0.001; IPO, hinge, SimPO, k3, group-std "
    "do not (Rafailov et al. 2023, eq. 4)",
    [("kl", 1e-3, name) for name in ("dpo", "soft", "distill", "grpo, KL in reward")]
    + [("kl", name, 1e-3) for name in ("ipo", "hinge", "simpo", "grpo, k3", "grpo, default")])
def optimum(lab):
    """KL(π ‖ π*) over the 6 answers of each prompt, normalised to them; π* = π_ref e^{r/β}/Z, β =
    0.5. Data: all pairs, preferred with σ(r − r') or, where the loss takes no p, by r > r'."""
    ref, groups, rewards = world(lab)
    pairs = []
    for g, r in zip(groups, rewards):
        for i, j in itertools.permutations(range(6), 2):
            if r[i] > r[j]:
                pairs.append(pair(
                    {"prompt": g.prompt}, g.completions[i], g.completions[j], score_chosen=r[i],
                    score_rejected=r[j], p_chosen=1 / (1 + math.exp(r[j] - r[i]))))
    asked = [{"prompt": g.prompt, "table": dict(zip(g.completions, r))}
             for g, r in zip(groups, rewards)]
    runs = {"start": ref}
    for loss in ("dpo", "soft", "distill", "ipo", "hinge", "simpo"):
        beta = "" if loss == "simpo" else "--beta 0.5"
        flags = f"--model {ref} --loss {loss} {beta} --max-steps 900 --batch-size 15 --lr 1e-3"
        runs[loss] = lab.train("dpo", flags, dataset=pairs)
    settings = {"grpo, KL in reward": "--loss rloo --kl reward", "grpo, k3": "--loss rloo --kl k3",
                "grpo, default": ""}
    for name, flags in settings.items():
        runs[name] = lab.train(
            "grpo", f"--model {ref} {flags} --beta 0.5 --max-steps 700 --batch-size 3 --group-size "
            f"64 --lr 3e-3 --max-length 32 --max-new-tokens 3 --reward {TABLE}", dataset=asked)
    start = logps(ref, groups).view(3, 6)
    best = (start + torch.tensor(rewards) / 0.5).softmax(1)
    for name, folder in runs.items():
        after = logps(folder, groups).view(3, 6)
        lab.add(name, kl=kl(after.softmax(1), best), mass=after.exp().sum(1).mean().item())


# --- main -----------------------------------------------------------------------------------------

def check(name, seeds=3, story=None, quick=False):
    """Runs one experiment and prints it → its table."""
    row = CLAIMS[name]
    with tempfile.TemporaryDirectory() as scratch:
        lab = Lab(scratch, story, quick)
        for seed in range(seeds):
            lab.begin(seed)
            row.function(lab)
    for setting, metrics in lab.table.items():
        shown = ", ".join(f"{metric} {plus_minus(values)}" for metric, values in metrics.items())
        print(f"{setting:<24}{shown}")
    print(" — ".join([row.said, *lab.judge(row.parts)]))
    return lab.table


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("name", nargs="?", choices=CLAIMS, metavar="NAME", help="none: the list")
    p.add_argument("--seeds", type=common.between(1, 1e6, int), default=3)
    p.add_argument("--story", metavar="DIR", help="frontier: a language model instead of the toy")
    args = p.parse_args(argv)
    if args.name:
        check(args.name, args.seeds, args.story)
    for name, row in CLAIMS.items() if not args.name else ():
        print(f"{name:<16}{row.said}")


if __name__ == "__main__":
    main()
