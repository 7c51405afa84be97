"""What the experiments of claims.py share: numbers, a laboratory that runs the scripts through
their main(), and data: sums that the toy's policy was not pretrained on."""
import contextlib
import io
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

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
from common import Group, completion_logps  # noqa: E402
from make_toy import say, slip  # noqa: E402

MAINS = {
    "dpo": train_dpo.main, "rm": train_rm.main, "grpo": train_grpo.main, "score": score.main}
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
    """The highest mean reward at this KL: π_ref tilted by e^{r/β}, from its samples' rewards (P,
    N)."""
    r = torch.tensor(values, dtype=torch.float64)
    even = torch.full_like(r, 1 / r.shape[1])
    low, high = 0.0, 50.0                                    # 1/β, by bisection
    for _ in range(40):
        tilt = (low + high) / 2
        tilted = (tilt * r).softmax(1)
        low, high = (tilt, high) if kl(tilted, even) < budget else (low, tilt)
    return (tilted * r).sum(1).mean().item()


# --- a laboratory: runs the scripts, keeps the table ----------------------------------------------

class Lab:
    """Runs of one experiment in a scratch directory; table: {setting: {metric: [by seed]}}."""

    def __init__(self, scratch, story=None, quick=False):
        self.scratch = Path(scratch)
        self.story = story               # directory of a language model
        self.quick = quick               # two steps a run: for the test
        self.made = 0
        self.table = {}

    def begin(self, seed):
        self.seed = seed
        self.rng = random.Random(seed)
        self.rows = problems(seed)
        self.test = self.rows[-20 if self.quick else -100:]

    def new(self, ending=""):
        self.made += 1
        return self.scratch / f"{self.made}{ending}"

    def call(self, script, flags, inputs):
        """A script's main(), silenced; what it printed is shown where it fails. inputs: flag →
        path, several paths, or rows, which become a file."""
        argv = flags.split()
        for name, value in inputs.items():
            if isinstance(value, list) and isinstance(value[0], dict):
                file = self.new(".jsonl")
                make_toy.write(file, value)
                value = file
            argv += [f"--{name.replace('_', '-')}"]
            argv += map(str, value) if isinstance(value, list) else [str(value)]
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                MAINS[script](argv)
        except SystemExit:
            sys.exit(f"{script} {' '.join(argv)}\n{printed.getvalue()[-2000:]}")

    def train(self, script, flags="", **inputs):
        """A trainer, two epochs, nothing held out → its run directory. Flags given here win."""
        out = self.new()
        flags = f"--output-dir {out} --seed {self.seed} --eval-fraction 0 --epochs 2 {flags}"
        self.call(script, flags + " --max-steps 2" * self.quick, inputs)
        return out

    def evals(self, out):
        """Every evaluation of a run, names without "eval/", the first before any step."""
        lines = common.read_lines(out / "metrics.jsonl")
        lines = [line for line in lines if any(name.startswith("eval/") for name in line)]
        return [{k.removeprefix("eval/"): v for k, v in line.items()} for line in lines]

    def score(self, flags="", **inputs):
        """score.py → the rows that its --output wrote."""
        out = self.new(".jsonl")
        self.call("score", f"--seed {self.seed} --output {out} {flags}", inputs)
        return common.read_lines(out)

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


def plot(file, title, table):
    """One panel a metric: a point with its ± for each setting."""
    pyplot = score.pyplot()
    metrics = list(dict.fromkeys(metric for row in table.values() for metric in row))
    figure, axes = pyplot.subplots(
        1, len(metrics), squeeze=False, sharey=True, layout="constrained",
        figsize=(3 + 2.5 * len(metrics), 1.5 + 0.25 * len(table)))
    for axis, metric in zip(axes.flat, metrics):
        for place, row in enumerate(table.values()):
            if metric in row:
                axis.errorbar(mean(row[metric]), -place, xerr=mean_std(row[metric])[1], fmt="ko")
        axis.set(xlabel=metric, yticks=[-i for i in range(len(table))], yticklabels=list(table))
    figure.suptitle(title, fontsize=9)
    figure.savefig(file, dpi=110)


# --- data: sums that the policy was not pretrained on ---------------------------------------------

def problems(seed):
    """Rows {prompt, answer, terms} in an order of this seed."""
    rows = []
    for name in ("pairs.jsonl", "prompts.jsonl"):
        for row in common.read_lines(TOY / name):
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


def open_policy(folder):
    encoder = common.load_encoder(str(folder))
    return encoder, common.load_model(str(folder), encoder, torch.device("cpu"))


def draw(folder, rows, n, seed, limit=8):
    """n samples of a policy for each row → [Group with completions (texts) and completion_ids]."""
    encoder, model = open_policy(folder)
    prompts = [encoder.prompt(row["prompt"], "")[0] for row in rows]
    samples = common.sample(model, prompts, n, limit, encoder.stops, seed=seed)
    groups = []
    for i, (row, ids) in enumerate(zip(rows, prompts)):
        mine = [s.ids for s in samples[i * n:(i + 1) * n]]
        texts = [encoder.decode(ids, row["prompt"]) for ids in mine]
        groups.append(Group("", row["prompt"], texts, row, prompt_ids=ids, completion_ids=mine))
    return groups


def logps(folder, groups, measure=completion_logps):
    """log π of the completions of groups with ids (N,), or of their tokens (T,)."""
    exact = contextlib.nullcontext()
    return common.for_all(measure, open_policy(folder)[1], groups, 8192, True, exact, "").double()


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


def best_and_worst(policy, rows, seed):
    """Pairs of a policy's own samples, 4 a row; none where all four are right or wrong."""
    pairs = []
    groups = draw(policy, rows, 4, seed)
    for g, r in zip(groups, rewarded(groups)):
        if max(r) > min(r):
            best, worst = r.index(max(r)), r.index(min(r))
            pairs.append(pair(g.row, g.completions[best], g.completions[worst]))
    return pairs


def stories(rng):
    """Prompts for a story model → rows to train on, rows to test with."""
    rows = []
    for a in "dog cat boy girl bird bear frog fish".split():
        for b in "Tim Tom Ben Sam Lily Sue Mia Ann Max Bob Joe Amy".split():
            rows.append({"prompt": f"Once upon a time there was a {a} named {b}."})
    rng.shuffle(rows)
    return rows[:72], rows[72:]


def probe(folder, rows, seed, ref=BASE, reward=right, n=4, limit=8):
    """A policy's own samples: KL(π‖π_ref) per completion, mean reward, tokens."""
    groups = draw(folder, rows, n, seed + 1000, limit)
    lengths = [len(ids) for g in groups for ids in g.completion_ids]
    far = (logps(folder, groups) - logps(ref, groups)).mean().item()
    return {"kl": far, "reward": mean(sum(rewarded(groups, reward), [])), "length": mean(lengths)}


def marked(lab):
    """A policy whose sums, half of them slips, end with 0 to 5 marks "!" that mean nothing."""
    rows = []
    for row in lab.rows[:1500]:
        text = row["answer"] if lab.rng.random() < 0.5 else slip(*row["terms"], lab.rng)
        rows.append(row | {"response": say(text + "!" * lab.rng.randrange(6))})
    return lab.train("dpo", "--loss sft --epochs 8 --batch-size 64 --lr 2e-3", dataset=rows)


def rankings(lab):
    """Ranked lists of 4 sums, noisy scores but for the last 60; the pairs of the noisy ones."""
    ranked = []
    for row in lab.rows[:260]:
        true = int(row["answer"])
        values = [true, *(true + d for d in lab.rng.sample((-21, -10, -2, -1, 1, 2, 10, 21), 3))]
        noisy = 1.5 if len(ranked) < 200 else 0.0
        scores = [-abs(v - true) ** 0.5 + lab.rng.gauss(0, noisy) for v in values]
        texts = [say(str(v)) for v in values]
        ranked.append({"prompt": row["prompt"], "completions": texts, "scores": scores})
    shuffled = []
    for row in ranked[:200]:
        texts = row["completions"]
        group = Group("", "", texts, scores=row["scores"], completion_ids=texts)
        for a, b in common.pairs_of(group):
            shuffled.append({"prompt": row["prompt"], "chosen": texts[a], "rejected": texts[b]})
    return ranked, shuffled


def marked_pairs(lab):
    """Pairs of marked sums: chosen is correct in 80 %, and the one with more marks in 80 %."""
    pairs = []
    for row in lab.rows[1500:2200]:
        texts = [row["answer"], slip(*row["terms"], lab.rng)]
        marks = sorted(lab.rng.sample(range(6), 2), reverse=lab.rng.random() < 0.8)
        if lab.rng.random() < 0.2:
            texts.reverse()
        pairs.append(pair(row, *(text + "!" * n for text, n in zip(texts, marks)), more=marks))
    return pairs


def one_wrong_digit(lab):
    """Slips of one digit → (groups with ids, whether each of their tokens is the wrong one)."""
    encoder = open_policy(BASE)[0]
    groups = []
    wrong = []
    for row in lab.test * 3:
        text = slip(*row["terms"], lab.rng)
        differs = [a != b for a, b in zip(text, row["answer"])]
        if len(text) == len(row["answer"]) and sum(differs) == 1:
            groups.append(Group("", row["prompt"], [text], row))
            encoder(groups[-1])
            wrong += [*differs, None]                        # None: the end token
    return groups, wrong


def world(lab):
    """3 prompts with 6 answers of one token that can be enumerated → (directory of π_ref, groups of
    all answers, rewards (P, 6)); π_ref is fitted to answer + end."""
    tokenizer = make_toy.make_tokeniser()
    torch.manual_seed(lab.seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0))
    folder = lab.new()
    with contextlib.redirect_stderr(io.StringIO()):          # a progress bar
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    encoder = common.load_encoder(str(folder))
    groups = [Group("", x, list("abcdef")) for x in ("?", "??", "???")]
    rows = []
    for g in groups:
        encoder(g)
        for y in g.completions:
            rows += [{"prompt": g.prompt, "response": y}] * lab.rng.randint(1, 6)
    flags = f"--loss sft --model {folder} --max-steps 150 --lr 1e-2 --batch-size 128"
    ref = lab.train("dpo", flags, dataset=rows)
    return ref, groups, [[lab.rng.uniform(-1, 1) for _ in range(6)] for _ in groups]


def all_pairs(groups, rewards):
    """All pairs of a world, labelled with σ(r − r') and with both rewards."""
    pairs = []
    for g, r in zip(groups, rewards):
        for i, j in common.pairs_of(replace(g, scores=r)):
            p = 1 / (1 + math.exp(r[j] - r[i]))
            pairs.append(pair({"prompt": g.prompt}, g.completions[i], g.completions[j], p_chosen=p,
                              score_chosen=r[i], score_rejected=r[j]))
    return pairs
