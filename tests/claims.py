"""Statements of the literature about preference alignment, each checked by a small experiment.

    python tests/claims.py                         # lists the names with their claims
    python tests/claims.py pass-at-k --seeds 3     # 1 to 4 minutes on one CPU core

Prints one line a setting and a closing line: claim, who says it, what was measured, verdict. ± is
the standard deviation over seeds; a seed draws data, order of training and samples. A claim has
parts "a above b"; a part holds where the mean difference over seeds exceeds its standard deviation.

The experiments run the scripts through their main(), on the toy's sums, which its policy was not
pretrained on. So a verdict is about this toy: it can refute an "always", never prove one.
"""
import argparse
import math
import random
import tempfile
from typing import Callable, NamedTuple

import torch
from lab import (
    BASE, LETTERS, MARKED, RIGHT, TABLE, Lab, accuracy, all_pairs, auc, best_and_worst, draw, ideal,
    kl, letters, logps, marked, marked_pairs, mean, one_wrong_digit, pair, plot, plus_minus, probe,
    rankings, rewarded, right, said, slips, stories, world)

import common
import score
from common import token_logps
from make_toy import ask


# --- the claims: each function is one seed of an experiment, and fills lab.table ------------------

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
        out = lab.train("dpo", flags, dataset=pairs[:400], eval_dataset=pairs[400:])
        last = lab.evals(out)[-1]
        lab.add(name, change=last["chosen_change"], fell=100 * last["chosen_fell"],
                right=100 * last["right"], kl=last["kl"])


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
        far = score.best_of_n_kl(n)
        got = mean([score.best_of_n(r, n, r) for r in start])
        lab.add(f"best of {n}", kl=far, reward=got, missed=ideal(start, far) - got)


def pass_at_k(lab):
    """pass@k in % from 64 samples for each unseen sum."""
    out = lab.train("dpo", "--epochs 1", dataset=slips(lab.rows[:2000], lab.seed))
    for name, folder in (("start", BASE), ("dpo", out)):
        hits = rewarded(draw(folder, lab.test, 64, lab.seed))
        for k in (1, 4, 8, 32):
            lab.add(name, **{f"pass@{k}": 100 * mean([score.best_of_n(h, k, h) for h in hits])})


def noise(lab):
    """Correct samples in % with a share of the labels flipped. cdpo, robust: --label-smoothing at
    that rate; soft, distill: fitted to a reward model of the same labels."""
    for flip in (0.0, 0.1, 0.2, 0.3):
        pairs = slips(lab.rows[:320], lab.seed, flip)
        rm = lab.train("rm", dataset=pairs)
        settings = {
            "dpo": "", "cdpo": f"--label-smoothing {flip}", "ipo": "--loss ipo",
            "robust": f"--loss robust --label-smoothing {flip}",
            "soft": f"--loss soft --reward-model {rm}",
            "distill": f"--loss distill --reward-model {rm}"}
        for name, flags in settings.items():
            if flip or name not in ("cdpo", "robust"):
                out = lab.train("dpo", flags, dataset=pairs)
                lab.add(f"{name} {flip:.0%}", right=100 * probe(out, lab.test, lab.seed)["reward"])


def fitting(lab):
    """Labels drawn with σ(r − r'), r = 2 for the correct sum. J = E[r] − 0.1 KL(π‖π_ref) on own
    samples: the closed-form optimum maximises it."""
    labelled = slips(lab.rows[:256], lab.seed, 1 / (1 + math.exp(2)))
    more = slips(lab.rows[:1024], lab.seed, 0.5)     # only their reward model's labels count
    rm = lab.train("rm", dataset=labelled)
    soft = f"--loss soft --reward-model {rm}"
    runs = {
        "start": BASE,
        "dpo": lab.train("dpo", "--epochs 3", dataset=labelled),
        "dpo, 12 epochs": lab.train("dpo", "--epochs 12", dataset=labelled),
        "ipo": lab.train("dpo", "--loss ipo --epochs 3", dataset=labelled),
        "soft": lab.train("dpo", f"{soft} --epochs 3", dataset=labelled),
        "soft, 3 × unlabelled": lab.train("dpo", f"{soft} --epochs 1", dataset=more)}
    for name, folder in runs.items():
        got = probe(folder, lab.test, lab.seed)
        J = 2 * got["reward"] - 0.1 * got["kl"]
        lab.add(name, J=J, right=100 * got["reward"], kl=got["kl"])


SUMS = ("below 50", "above 50", "three digits", "three operands")


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
        "rm": {"reward_model": lab.train("rm", dataset=train)},
        "dpo": {"implicit": lab.train("dpo", dataset=train), "ref_model": BASE}}
    for name, rows in tests.items():
        for kind, reward in rewards.items():
            scored = lab.score(dataset=slips(rows, lab.seed), **reward)
            lab.add(f"{name}, {kind}", accuracy=accuracy(scored))


def lists(lab):
    """Held-out pairs ranked right in % after each epoch of a reward model; noisy ranks, 48 pairs a
    step: all 6 of a list of 4 in one step, or shuffled."""
    ranked, shuffled = rankings(lab)
    for name, data, size in (("lists", ranked[:200], 8), ("shuffled", shuffled, 48)):
        flags = f"--batch-size {size} --eval-every 25 --epochs 4 --lr 1e-3"
        out = lab.train("rm", flags, dataset=data, eval_dataset=ranked[200:])
        for epoch, e in enumerate(lab.evals(out)[1:], 1):
            lab.add(f"{name}, epoch {epoch}", accuracy=100 * e["rewards/accuracies"])


def length(lab):
    """Marked sums; chosen is the correct one in 80 % and the longer one in 80 % of the pairs. bias:
    accuracy where chosen is the longer minus where it is the shorter; tokens and % of samples."""
    sft = marked(lab)
    pairs = marked_pairs(lab)
    train, test = pairs[:500], pairs[500:]
    rm = lab.train("rm", dataset=train)
    for name, flags in {"rm": "", "rm, calibrated": "--calibrate-length"}.items():
        scored = lab.score(flags, dataset=test, reward_model=rm)
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


def credit(lab):
    """AUC with which the fall of a token's log-prob finds the one wrong digit of a sum, and with
    which −log π_ref does; correct samples in % where the implicit reward guides the start."""
    dpo = lab.train("dpo", "--epochs 1", dataset=slips(lab.rows[:1000], lab.seed))
    groups, wrong = one_wrong_digit(lab)
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


def overoptimise(lab):
    """% of correct samples (gold) for the best of n and for GRPO by the reward model of 100 to
    3,000 pairs; mean and minimum of three reward models of 100 pairs."""
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
                         dataset=lab.test[:64], reward_model=three if several else rms[name])
        proxy = [row["score"] for row in rows]
        gold = [right(row["response"][0]["content"], row) for row in rows]
        for n in (1, 4, 32):
            best = [score.best_of_n(proxy[i:i + 32], n, gold[i:i + 32])
                    for i in range(0, len(rows), 32)]
            lab.add(f"best of n, {name}", **{f"gold {n}": 100 * mean(best)})
    optimised = {name: [rms[name]] for name in ("100", "300", "1000")}
    optimised |= {"mean of 3": three, "min of 3": three}
    for name, rewards in optimised.items():
        flags = "--reward-aggregate min" if name == "min of 3" else ""
        out = lab.train("grpo", f"{flags} --beta 0 --lr 1e-3 --lr-schedule constant --batch-size 8 "
                        f"--max-new-tokens 8 --max-steps 40 --watch {RIGHT}",
                        dataset=lab.rows[3000:-100], reward=rewards)
        lab.add(f"GRPO, {name}", gold=100 * probe(out, lab.test, lab.seed)["reward"])


def on_policy(lab):
    """Correct samples in %: 480 prompts of which 4 samples each are labelled, all by the start or
    in 3 rounds by the last policy; π_ref is the start, or the last policy."""
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
    measure.__doc__ = grpo.__doc__
    return measure


TWO = math.log(2)
STEP_0 = {
    "dpo": TWO, "robust": TWO, "ipo": 25, "hinge": 1, "dpop": TWO, "dpo-norm": TWO, "sppo": 50,
    "nca": 2 * TWO, "bco": 2 * TWO, "apo-zero": 1, "apo-down": 1, "kto": 0.5, "plackett-luce": TWO,
    "exo": -TWO - 0.5 * math.log(0.999 * 0.001)}


def step_0(lab):
    """|loss before the first step − theory|; GRPO: clipped share and KL of its first step."""
    pairs = slips(lab.rows[:100], lab.seed)
    for loss, theory in STEP_0.items():
        out = lab.train("dpo", f"--loss {loss} --max-steps 1 --eval-samples 1", dataset=pairs[:64],
                        eval_dataset=pairs[64:])
        lab.add(loss, error=abs(lab.evals(out)[0]["loss"] - theory))
    out = lab.train("grpo", "--max-steps 1 --batch-size 8 --max-new-tokens 8", dataset=lab.rows[:8])
    first = common.read_lines(out / "metrics.jsonl")[0]
    lab.add("grpo", error=max(first["clip_ratio"], abs(first["kl"])))


def optimum(lab):
    """KL(π ‖ π*) over the 6 answers of each prompt, normalised to them; π* = π_ref e^{r/β}/Z, β =
    0.5. Data: all pairs, preferred with σ(r − r') or, where the loss takes no p, by r > r'."""
    ref, groups, r = world(lab)
    pairs = all_pairs(groups, r)
    asked = [{"prompt": g.prompt, "table": dict(zip(g.completions, v))} for g, v in zip(groups, r)]
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
            f"64 --lr 3e-3 --max-new-tokens 3 --reward {TABLE}", dataset=asked)
    start = logps(ref, groups).view(3, 6)
    best = (start + torch.tensor(r) / 0.5).softmax(1)
    for name, folder in runs.items():
        after = logps(folder, groups).view(3, 6)
        lab.add(name, kl=kl(after.softmax(1), best), mass=after.exp().sum(1).mean().item())


# --- the table ------------------------------------------------------------------------------------

class Claim(NamedTuple):
    """A row of CLAIMS."""
    claim: str                # one sentence
    source: str               # who says it
    function: Callable        # one seed: fills the table of a Lab
    parts: list               # (metric, higher, lower): settings of the table, or numbers


CLAIMS = {
    "falling": Claim(
        "DPO lowers the chosen log-prob too, more where the two share most tokens",
        "Pal et al. 2024, Razin et al. 2024", falling,
        [("change", higher, "near")
         for higher in (0, "far", "sft-coef 1", "dpop", "beta 0.5", "lr 1e-4", "ipo")]),
    "frontier": Claim(
        "DPO has the best reward at every KL", "Rafailov et al. 2023, fig. 2", frontier,
        [("missed", f"{other} {beta}", f"dpo {beta}")
         for beta in (0.1, 0.5) for other in ("soft", "ipo", "grpo")]
        + [("missed", other, "dpo 0.5") for other in ("sft on best of 8", "best of 8")]),
    "pass-at-k": Claim(
        "DPO's pass@k is always above that of its start", "the notes of this project", pass_at_k,
        [(f"pass@{k}", "dpo", "start") for k in (1, 4, 8, 32)]),
    "noise": Claim(
        "with 30 % of the labels flipped these keep more than DPO",
        "Mitchell 2023, Chowdhury et al. 2024, Azar et al. 2023", noise,
        [("right", f"{loss} 30%", "dpo 30%")
         for loss in ("cdpo", "robust", "ipo", "soft", "distill")]),
    "fitting": Claim(
        "fitting a reward model (soft) beats DPO on the same pairs; unlabelled pairs add to it",
        "Fisch et al. 2024, the notes", fitting,
        [("J", "soft", "dpo"), ("J", "soft, 3 × unlabelled", "soft"),
         ("J", "dpo", "dpo, 12 epochs")]),
    "overoptimise": Claim(
        "optimised for a proxy of less data, the gold reward is lower; ensembles help",
        "Gao et al. 2022, Coste et al. 2023", overoptimise,
        [("gold", "GRPO, 1000", "GRPO, 100"), ("gold", "GRPO, mean of 3", "GRPO, 300"),
         ("gold", "GRPO, min of 3", "GRPO, 300"), ("gold 32", "best of n, 3000", "best of n, 100"),
         ("gold 32", "best of n, min of 3", "best of n, 300")]),
    "implicit": Claim(
        "an explicit reward model ranks better than DPO's implicit reward", "Lin et al. 2024",
        implicit,
        [("accuracy", f"{name}, rm", f"{name}, dpo") for name in SUMS]),
    "lists": Claim(
        "all pairs of a list in one step generalise better than the same pairs shuffled",
        "Ouyang et al. 2022", lists,
        [("accuracy", f"lists, epoch {e}", f"shuffled, epoch {e}") for e in (1, 4)]),
    "length": Claim(
        "rewards and DPO prefer length; calibration, R-DPO and length-normalised losses less",
        "Huang et al. 2024, Park et al. 2024, Meng et al. 2024", length,
        [("bias", "rm", 0), ("bias", "rm", "rm, calibrated"), ("length", "dpo", "start"),
         ("length", "dpo", "rdpo"), ("length", "dpo", "dpo-norm"), ("length", "dpo", "simpo")]),
    "credit": Claim(
        "DPO's implicit reward finds the wrong token, and can guide the decoding of its start",
        "Rafailov et al. 2024 (From r to Q*)", credit,
        [("auc", "implicit", 0.9), ("auc", "implicit", "reference"),
         ("right", "start, guided", "start"), ("right", "start, guided", "dpo")]),
    "on-policy": Claim(
        "iterative DPO beats offline DPO at as many labels", "Guo et al. 2024", on_policy,
        [("right", f"iterative, {which} π_ref", "offline") for which in ("first", "last")]),
    "grpo-length": Claim(
        "GRPO's 1/length weight makes samples longer than Dr. GRPO's", "Liu et al. 2025",
        grpo({"grpo": "", "dr-grpo": "--loss dr-grpo --advantage group-std"}, marked),
        [("length", "grpo", "dr-grpo")]),
    "grpo-std": Claim(
        "advantages that are not divided by the std learn better", "Liu et al. 2025",
        grpo({"none": "--advantage none", "group-std": ""}), [("right", "none", "group-std")]),
    "grpo-group": Claim(
        "larger groups learn better from as many samples", "Shao et al. 2024",
        grpo({f"{n}": f"--group-size {n} --batch-size {64 // n}" for n in (2, 4, 8, 16)}),
        [("right", "4", "2"), ("right", "8", "4"), ("right", "16", "8")]),
    "grpo-kl": Claim(
        "a KL with the objective's gradient does better than k3, at β 0.2", "DeepSeek-V3.2, 2025",
        grpo({kind: f"--kl {kind} --beta 0.2" for kind in ("k3", "k3-unbiased", "reward")}),
        [("right", "k3-unbiased", "k3"), ("right", "reward", "k3")]),
    "grpo-updates": Claim(
        "several updates per batch learn more from as many samples", "Schulman et al. 2017",
        grpo({f"{n}": f"--updates-per-batch {n}" for n in (1, 2, 4)}),
        [("right", "2", "1"), ("right", "4", "2")]),
    "step-0": Claim(
        "before the first step these 14 losses have the value of theory", "the papers", step_0,
        [("error", 2e-3, name) for name in (*STEP_0, "grpo")]),
    "optimum": Claim(
        "these reach π* = π_ref e^{r/β}/Z, KL below 0.001; IPO, hinge, SimPO, k3, group-std do not",
        "Rafailov et al. 2023, eq. 4", optimum,
        [("kl", 1e-3, name) for name in ("dpo", "soft", "distill", "grpo, KL in reward")]
        + [("kl", x, 1e-3) for x in ("ipo", "hinge", "simpo", "grpo, k3", "grpo, default")]),
}


# --- main -----------------------------------------------------------------------------------------

def check(name, seeds=3, story=None, quick=False, figure=None):
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
    print(" — ".join([row.claim, row.source, *lab.judge(row.parts)]))
    if figure:
        plot(figure, row.claim, lab.table)
    return lab.table


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("name", nargs="?", choices=CLAIMS, metavar="NAME", help="none: the list")
    p.add_argument("--seeds", type=common.within("[1, inf)", int), default=3)
    p.add_argument("--plot", metavar="F.png", help="a figure of the table (needs matplotlib)")
    p.add_argument("--story", metavar="DIR", help="frontier: a language model instead of the toy")
    args = p.parse_args(argv)
    if args.name:
        check(args.name, args.seeds, args.story, figure=args.plot)
    for name, row in CLAIMS.items() if not args.name else ():
        print(f"{name:<16}{row.claim} ({row.source})")


if __name__ == "__main__":
    main()
