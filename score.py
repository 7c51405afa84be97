"""Everything that is done with a trained reward: score data, compare systems, make preference data, and look.

    python score.py                                          # the toy's pairs with the reward model of train_rm.py
    python score.py --policy base tuned --dataset prompts.jsonl --reward-model runs/rm --ref-model base

The reward is a reward model (--reward-model, one or several) or the implicit reward of an aligned policy (--implicit);
both go through the same code. Without --policy the answers are those of --dataset; with it each policy answers first.
What it prints has its n and its 95 % interval; p is σ(difference of two scores), since a score alone means nothing.
Differs from the papers in: rejection sampling takes each prompt's highest score for the bound of Liu et al. 2023 and
makes one pass over the samples, where the paper goes round again without replacement.
"""
# --- what is computed -------------------------------------------------------------------------------------------------
#
# Notation as in train_dpo.py: x prompt, y answer, r(x, y) its reward, σ(z) = 1 / (1 + e^−z).
#
# 1. Two sorts of reward. A reward model gives r(x, y) at the answer's last token. A policy π, aligned from π_ref, has
#    one inside it (Rafailov et al. 2023, arXiv 2305.18290, eq. 5, up to a constant of the prompt):
#
#        r̂(x, y) = β log π(y|x)/π_ref(y|x) = Σ_t β log π(y_t|x, y_<t)/π_ref(y_t|x, y_<t)                             (1)
#
#    Either is known up to a constant of the prompt only, so what is read off is a difference: p(y ≻ y') = σ(r − r').
#    Several reward models have no common unit: each is z-scored by the mean and std that train_rm.py stored, then
#    the mean or the minimum is taken (Coste et al. 2023, arXiv 2310.02743, eq. 2–3). Where they disagree, the answer is
#    unlike what they were trained on, and none of them should be believed.
#
# 2. Length. Most rewards rise with length. --calibrate-length subtracts what length alone predicts, by locally weighted
#    regression of the score on the length (Huang et al. 2024, arXiv 2409.17407):
#
#        r*(x, y) = r(x, y) − E[ r | |y| ] + E[ r ]                                                                  (2)
#
# 3. The best of n. With N samples sorted r_(1) ≤ … ≤ r_(N), the mean over all subsets of size n of their maximum, which
#    estimates E[max of n] without bias, and the most by which taking the best leaves the policy (Stiennon et al. 2020,
#    arXiv 2009.01325, app. G.3; an upper bound: Beirami et al. 2024, arXiv 2401.01879):
#
#        best(n) = Σ_i r_(i) C(i − 1, n − 1) / C(N, n)                                                               (3)
#        KL( best of n ‖ π ) ≤ log n − (n − 1)/n                                                                     (4)
#
# 4. Rejection sampling (Liu et al. 2023, arXiv 2309.06657, algorithm 1). Keep y ~ π_ref with probability
#
#        exp( ( r(x, y) − max_y' r(x, y') ) / β ),     kept answers follow π_ref(y|x) e^{r(x,y)/β} / Z(x)            (5)
#
#    which is the optimum that DPO aims at. The maximum is that of the N samples, so the best of them is always kept:
#    exact as N grows, and with few samples a little nearer to best-of-N than to (5).
#
# 5. KL of a policy from its own samples: KL( π ‖ π_ref ) = E_x E_{y~π} Σ_t log π(y_t|…)/π_ref(y_t|…), per answer.   (6)

# --- imports ----------------------------------------------------------------------------------------------------------
import argparse
import html
import importlib.util
import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from common import (KINDS, PAIRS, Group, account, calibrate, can_pack, fail, hidden_states, lay_out, load_encoder, load_model, load_reward_model,
                    lowess, micro_batches, pick_device, read_groups, reward_scores, sample, sum_by_completion, token_logps, tokenise)

TOY = Path(__file__).parent / "tests" / "toy"
PAGE = 100                                                   # answers on a --tokens page
TIE = 1e-4                                                   # the same answer in another batch differs by less


# --- arguments --------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                usage="%(prog)s [--flag value …]  (--help lists the flags)",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("data")
    g.add_argument("--dataset", nargs="+", help="rows of any format; several files of responses: systems to compare; run directories: their curves")
    g.add_argument("--split", default="train", help="split of a hub dataset")
    g.add_argument("--columns", nargs="+", default=[], metavar="NEW=OLD", help="rename columns: prompt=question chosen=best")
    g.add_argument("--prefer", choices=["better", "safer"], default="better", help="PKU-SafeRLHF: which of its two labels")
    g.add_argument("--limit", type=int, default=0, help="only the first N rows (0 = all)")
    g.add_argument("--chat", action="store_true", help="plain-text prompts become user turns of the chat template")
    g.add_argument("--chat-template", metavar="FILE", help="Jinja template instead of the tokeniser's own")
    g.add_argument("--max-length", type=int, default=1024, help="tokens of prompt + completion")
    g.add_argument("--overlong", choices=["drop", "truncate"], default="drop", help="groups over --max-length: drop, or cut completions")
    g = p.add_argument_group("reward")
    g.add_argument("--reward-model", nargs="+", metavar="DIR", help="one or several; default: runs/rm, which train_rm.py makes")
    g.add_argument("--aggregate", choices=["mean", "min"], default="mean", help="of several reward models, each z-scored")
    g.add_argument("--implicit", metavar="POLICY", help="score by the implicit reward of this policy against --ref-model (1)")
    g.add_argument("--ref-model", help="reference policy: of --implicit, and of KL(π‖π_ref) with --policy")
    g.add_argument("--beta", type=float, default=0.1, help="scale of the implicit reward (1), temperature of --select rso (5)")
    g.add_argument("--calibrate-length", action="store_true", help="subtract what length alone predicts from every score (2)")
    g = p.add_argument_group("generate")
    g.add_argument("--policy", nargs="+", metavar="DIR", help="these answer the prompts of --dataset; several: systems to compare")
    g.add_argument("--samples", type=int, default=1, help="answers of each policy to each prompt")
    g.add_argument("--max-new-tokens", type=int, default=128, help="longest sampled answer")
    g.add_argument("--temperature", type=float, default=1.0, help="of sampling (0 = greedy)")
    g.add_argument("--top-p", type=float, default=1.0, help="sample from the smallest set of tokens with this probability")
    g.add_argument("--num-beams", type=int, default=0, help="value-guided decoding: beams kept by the reward of their prefixes (0 = off)")
    g.add_argument("--beam-chunk", type=int, default=4, help="tokens between two looks of --num-beams at the reward")
    g = p.add_argument_group("write and look")
    g.add_argument("--output", metavar="F.jsonl", help="every row with its score; with --select the selected answers")
    g.add_argument("--pairs", metavar="F.jsonl", help="best against worst answer of a prompt (--select rso: of the kept), with scores and p_chosen")
    g.add_argument("--keep-chosen", action="store_true", help="--pairs: chosen stays that of --dataset, rejected is the worst sample")
    g.add_argument("--select", choices=["best", "rso"], help="--output: the best of --samples, or rejection sampling (5)")
    g.add_argument("--by", metavar="COLUMN", help="the result for each value of this column too")
    g.add_argument("--plot", metavar="F.png", help="histogram of the scores, or curves of run directories (needs matplotlib)")
    g.add_argument("--tokens", metavar="F.html", help=f"page of up to {PAGE} answers, tokens coloured by their share of the reward")
    g = p.add_argument_group("run")
    g.add_argument("--micro-batch-tokens", type=int, default=8192, help="tokens per forward: memory, no effect on the result")
    g.add_argument("--seed", type=int, default=0, help="of sampling, rejection and bootstrap")
    g.add_argument("--device", default="auto", help="auto = cuda where there is one, else cpu")
    g.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="to compute in; auto: bfloat16 on cuda; weights: float32")
    args = p.parse_args(argv)
    for name in ("max_length", "samples", "max_new_tokens", "beam_chunk", "micro_batch_tokens"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("limit", "temperature", "num_beams"):
        if not 0 <= getattr(args, name) < math.inf:
            p.error(f"--{name.replace('_', '-')} must not be negative")
    if not 0 < args.beta < math.inf or not 0 < args.top_p <= 1:
        p.error("--beta must be positive and --top-p in (0, 1]")
    if args.implicit and (args.reward_model or not args.ref_model):
        p.error("--implicit takes the place of --reward-model and needs --ref-model: its reward is β log π/π_ref")
    if args.ref_model and not (args.implicit or args.policy):
        p.error("--ref-model is of use with --implicit or with --policy only")
    if args.aggregate == "min" and len(args.reward_model or []) < 2:
        p.error("--aggregate min needs several --reward-model")
    if not args.policy and (args.samples > 1 or args.num_beams or args.keep_chosen):
        p.error("--samples, --num-beams and --keep-chosen need --policy, which makes the answers")
    if args.num_beams and args.samples > 1 or args.temperature == 0 and (args.samples > 1 or args.num_beams):
        p.error("--num-beams gives one answer a prompt, --temperature 0 gives always the same: drop one of these flags")
    if len(args.policy or []) > 1 or len(args.dataset or []) > 1:
        if args.policy and len(args.dataset or []) > 1:
            p.error("several --policy answer the prompts of one --dataset")
        if args.pairs or args.select or args.by:
            p.error("--pairs, --select and --by take one system: one --policy or one --dataset")
    if args.keep_chosen and not args.pairs or args.select and not (args.output and args.policy and (args.samples > 1)):
        p.error("--keep-chosen needs --pairs; --select needs --policy, --samples above 1 and --output")
    if args.pairs and args.policy and args.samples < 2 and not args.keep_chosen:
        p.error("--pairs needs two answers to a prompt: --samples 2 or more, or --keep-chosen")
    args.dataset = args.dataset or [str(TOY / ("prompts.jsonl" if args.policy else "pairs.jsonl"))]
    for name in ("output", "pairs", "plot", "tokens"):
        file = Path(getattr(args, name) or "x")
        if not file.parent.is_dir() or file.is_dir() or file.absolute() in [Path(d).absolute() for d in args.dataset]:
            p.error(f"--{name} {file}: cannot be written (its folder is missing, or it is a folder or the data itself)")
    files = [Path(f).absolute() for f in (args.output, args.pairs, args.plot, args.tokens) if f]
    if len(set(files)) < len(files):
        p.error("--output, --pairs, --plot and --tokens must be different files")
    if args.plot and Path(args.plot).suffix not in (".png", ".pdf", ".svg"):
        p.error(f"--plot {args.plot}: its name must end in .png, .pdf or .svg")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        p.error("--plot needs matplotlib: pip install matplotlib")
    return args


# --- pure functions ---------------------------------------------------------------------------------------------------
# Lists of floats in, floats out. A cluster is a prompt: its answers are not independent, so prompts are resampled.

def mean(xs):
    return sum(xs) / len(xs) if xs else math.nan


def std(xs):
    middle = mean(xs)
    return math.sqrt(sum((x - middle) ** 2 for x in xs) / (len(xs) - 1)) if len(xs) > 1 else 0.0


def sigmoid(z):
    return 1 / (1 + math.exp(-z)) if z > -700 else 0.0


def wilson(p, n, z=1.96):
    """95 % interval of a proportion (Wilson 1927): never outside [0, 1], and not empty at p = 1."""
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def bootstrap(values, clusters, seed=0, rounds=2000):
    """95 % percentile interval of the mean; whole clusters (prompts) are drawn with replacement."""
    sums = {}
    for v, c in zip(values, clusters):
        total, count = sums.get(c, (0.0, 0))
        sums[c] = (total + v, count + 1)
    table = torch.tensor(list(sums.values()), dtype=torch.float64)                       # (clusters, 2)
    generator, n = torch.Generator().manual_seed(seed), len(table)
    drawn = torch.stack([table[torch.randint(n, (n,), generator=generator)].sum(0) for _ in range(rounds)])
    low, high = (drawn[:, 0] / drawn[:, 1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def win_rate(a, b):
    """(wins of a over b with ties half, ties), both as shares of all len(a)·len(b) meetings of two lists of scores."""
    margins = [x - y for x in a for y in b]
    ties = sum(abs(m) <= TIE for m in margins) / len(margins)
    return sum(m > TIE for m in margins) / len(margins) + ties / 2, ties


def correlation(xs, ys):
    """Pearson's r; nan where one of them does not vary."""
    sx, sy, mx, my = std(xs), std(ys), mean(xs), mean(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys)) / (len(xs) - 1) / (sx * sy) if sx and sy else math.nan


def best_of_n(scores, n, values=None):
    """(3): unbiased E[value of the best of n] from N ≥ n samples; values: of each sample, default its score."""
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    values = scores if values is None else values
    return sum(values[k] * math.comb(i, n - 1) for i, k in enumerate(order)) / math.comb(len(scores), n)


def best_of_n_kl(n):
    return math.log(n) - (n - 1) / n                         # (4)


def rejection_sample(scores, beta, generator):
    """(5): indices of the samples that are kept; never none, since the best is kept with probability 1."""
    u, best = torch.rand(len(scores), generator=generator, dtype=torch.float64).tolist(), max(scores)
    return [i for i, r in enumerate(scores) if u[i] < math.exp((r - best) / beta)]


def histogram(series, bins=12, width=28):
    """{name: values} → lines for the terminal, one column of bars per name, one common scale."""
    values = [v for vs in series.values() for v in vs]
    low, high = min(values), max(values)
    step = (high - low) / bins or 1.0
    counts = {name: Counter(min(bins - 1, int((v - low) / step)) for v in vs) for name, vs in series.items()}
    width = max(8, min(width, 80 // len(series)))
    share = {name: {b: n / len(series[name]) for b, n in c.items()} for name, c in counts.items()}
    most = max(s for c in share.values() for s in c.values())
    lines = [" " * 11 + "".join(f"{name[-width + 8:]:<{width}}" for name in series)]
    for b in range(bins):
        bars = ("█" * round((width - 7) * share[name].get(b, 0) / most) + f" {counts[name][b]}" * (counts[name][b] > 0)
                for name in series)
        lines.append(f"{low + b * step:>10.3f} " + "".join(f"{bar:<{width}}" for bar in bars))
    return "\n".join(line.rstrip() for line in lines)


def align(systems):
    """Groups of several systems by prompt → [(one group of each system), …] in the first's order. The k-th group of
    a prompt meets the k-th of the other files; what has no partner is left out (the caller reports how many)."""
    tables = [{g.key: g for g in s.groups} for s in systems]
    return [tuple(t[key] for t in tables) for key in tables[0] if all(key in t for t in tables)]


# --- scorers: what gives an answer its number -------------------------------------------------------------------------

@dataclass
class Scorer:
    """A reward model, or a policy and its reference (beta is not None). The rest of the file sees no difference."""
    name: str
    encoder: object
    models: tuple
    beta: float | None = None
    packed: bool | None = None                               # None: not yet checked

    def __call__(self, batch):
        """Reward of every completion of a batch: (K,)"""
        return (reward_scores(self.models[0], batch) if self.beta is None
                else sum_by_completion(self.tokens(batch), batch))       # (1)

    def tokens(self, batch):
        """Every completion token's share of the reward, in the order of batch.target: (T,)

        Implicit reward: the terms of (1). Reward model: by how much the score of the prefix changes with the token,
        r(x, y_≤t) − r(x, y_<t); trained at ends only, such a score of half an answer is a guess, if often a good one.
        """
        if self.beta is not None:
            policy, ref = (token_logps(m, batch) for m in self.models)
            return self.beta * (policy - ref)
        batch = batch.to(next(self.models[0].parameters()).device)
        hidden = hidden_states(self.models[0], batch)
        with torch.autocast(hidden.device.type, enabled=False):
            score = self.models[0].score(hidden.float())[:, 0]           # (R·N,) at every place
        before = score[batch.read]                           # (T,) where token t is predicted stands token t − 1
        after = before.roll(-1)
        ends = torch.cat([batch.owner[1:] != batch.owner[:-1], batch.owner.new_ones(1, dtype=torch.bool)])
        after[ends] = score[batch.last]
        return after - before


def load_scorers(args, device):
    """All scorers, tokenisers first, so that a wrong directory is found before anything big is loaded."""
    if args.implicit:
        both = ((args.implicit, "--implicit"), (args.ref_model, "--ref-model"))
        encoder, ref = (load_encoder(d, args.chat_template, args.chat, flag) for d, flag in both)
        if encoder.tokenizer.get_vocab() != ref.tokenizer.get_vocab():
            fail(f"--ref-model {args.ref_model}: its tokeniser is not --implicit's: log-probs cannot be compared.")
        models = tuple(load_model(d, encoder, device, flag) for d, flag in both)
        return [Scorer(args.implicit, encoder, models, args.beta)]
    if not args.reward_model and not Path("runs/rm/config.json").is_file():
        fail("runs/rm is missing: run train_rm.py first, which makes it, or give --reward-model or --implicit.")
    dirs = args.reward_model or ["runs/rm"]
    encoders = [load_encoder(d, args.chat_template, args.chat, "--reward-model") for d in dirs]
    return [Scorer(d, e, (load_reward_model(d, e, device),)) for d, e in zip(dirs, encoders)]


def encode(groups, encoder, report, max_length, overlong):
    """Groups (text) → {index: the group as this scorer sees it}. Sampled answers that did not end get no end token."""
    copies = [replace(g, prompt_ids=[], completion_ids=[], ended=[]) for g in groups]
    kept = {id(c) for c in tokenise(copies, report, encoder, int(min(max_length, encoder.max_positions)), overlong)}
    for g, c in zip(groups, copies):
        for k, cut in enumerate(getattr(g, "cut", [])):
            if id(c) in kept and cut and c.ended[k] and len(c.completion_ids[k]) > 1:
                c.completion_ids[k], c.ended[k] = c.completion_ids[k][:-1], False
    return {i: c for i, c in enumerate(copies) if id(c) in kept}


@torch.no_grad()
def measure(scorer, groups, args, autocast, by_token=False, quiet=False):
    """Encoded groups → for each K rewards, or (by_token) K lists with one value a token. Batches change nothing."""
    if scorer.packed is None:
        what = reward_scores if scorer.beta is None else token_logps
        scorer.packed = all(can_pack(m, groups, what) for m in scorer.models)
    result = {}
    bar = tqdm(total=len(groups), desc="score", unit="row", leave=False, disable=True if quiet else None)
    for micro in micro_batches(groups, args.micro_batch_tokens, scorer.packed):
        with autocast:
            batch = lay_out(scorer.models[0], micro, scorer.packed)
            values = iter((scorer.tokens(batch) if by_token else scorer(batch)).float().tolist())
        for g in micro:
            result[id(g)] = [[next(values) for _ in ids] if by_token else next(values) for ids in g.completion_ids]
        bar.update(len(micro))
    bar.close()
    return [result[id(g)] for g in groups]


def score_all(groups, scorers, args, autocast, what, reports):
    """Sets raw (K lists of one score per scorer), lengths (tokens, end included) and encoded of every group. Returns
    those that all scorers' tokenisers have room for, in order."""
    tables = []
    for scorer, report in zip(scorers, reports):
        tables.append(encode(groups, scorer.encoder, report, args.max_length, args.overlong))
        scorer.packed = None                                 # checked anew: other groups may be longer
        if scorer is scorers[0] or len(tables[-1]) != len(tables[0]):
            print(account(what, report, scorer.encoder))
    common = [i for i in range(len(groups)) if all(i in t for t in tables)]
    if not common:
        fail(f"{what}: no rows are left; the line above says why.")
    values = [measure(s, [t[i] for i in common], args, autocast) for s, t in zip(scorers, tables)]
    for j, i in enumerate(common):
        g = groups[i]
        g.encoded = tables[0][i]
        g.raw = [list(r) for r in zip(*(v[j] for v in values))]          # (K, M)
        g.lengths = [len(ids) for ids in g.encoded.completion_ids]
        if not all(math.isfinite(r) for rs in g.raw for r in rs):
            fail(f"{g.where}: its score is not a finite number; try --dtype float32.")
    return [groups[i] for i in common]


def aggregate(groups, scorers, args):
    """raw → plain (before --calibrate-length), scores (what is used) and spread of every group, each a list of K.

    One scorer: its own unit. Several: z-scored, then mean or minimum; spread is their std, answer by answer.
    Mean, std and length curve are those that train_rm.py stored, else those of these very answers, which is printed.
    """
    lengths, combine = [n for g in groups for n in g.lengths], min if args.aggregate == "min" else mean
    raw = [[r[m] for g in groups for r in g.raw] for m in range(len(scorers))]           # (M, answers)
    z, calibrated = [], []
    for scorer, values in zip(scorers, raw):
        config = scorer.models[0].config if scorer.beta is None else None
        mu, sd, curve = (getattr(config, f"reward_{name}", None) for name in ("mean", "std", "by_length"))
        stored = mu is not None and bool(sd)
        if len(scorers) > 1 and not stored:
            print(f"note: {scorer.name} has no stored mean and std of its scores: it is z-scored by these answers")
        mu, sd = (mu, sd) if stored else (mean(values), std(values) or 1.0)
        if args.calibrate_length:                            # (2)
            middle, source = mu, "the curve stored with it"
            if not (stored and curve):
                at = sorted({sorted(lengths)[i * (len(lengths) - 1) // 49] for i in range(50)})      # 50 quantiles
                curve, middle = list(zip(at, lowess(lengths, values, at).tolist())), mean(values)
                source = "a curve fitted to these answers"
            print(f"length: {scorer.name} is calibrated by {source}")
            values = calibrate(values, lengths, curve, middle).tolist()
        calibrated.append(values)
        z.append([[(v - mu) / sd for v in vs] if len(scorers) > 1 else vs for vs in (raw[len(z)], values)])
    rows = iter(zip(zip(*calibrated), zip(*(before for before, _ in z)), zip(*(after for _, after in z))))
    for g in groups:
        g.calibrated, before, after = zip(*(next(rows) for _ in g.raw))                  # (K, M) each
        g.plain, g.scores, g.spread = list(map(combine, before)), list(map(combine, after)), list(map(std, before))


def p_better(g, i, j):
    """p(answer i ≻ answer j) of a group: σ(r_i − r_j), each scorer in its own unit, then their mean."""
    return mean([sigmoid(a - b) for a, b in zip(g.calibrated[i], g.calibrated[j])])


# --- systems: where answers come from ---------------------------------------------------------------------------------

@dataclass
class System:
    name: str
    groups: list                                             # response files: one completion each; --policy: --samples
    kind: str
    kl: list | None = None                                   # log π(y)/π_ref(y) of every sampled answer (6)


def set_keys(groups, what):
    """g.key = (prompt, k): this is the k-th row with that prompt. Prints how many prompts come more than once."""
    seen = Counter()
    for g in groups:
        prompt = json.dumps(g.prompt, sort_keys=True)
        g.key = (prompt, seen[prompt])
        seen[prompt] += 1
    if (more := sum(n > 1 for n in seen.values())) and what:
        print(f"{what}: {more} of {len(seen)} prompts come more than once ({len(groups) - len(seen)} rows): "
              "the k-th answer meets the k-th")


@torch.no_grad()
def generate(path, ref, groups, scorer, args, device, autocast):
    """A policy's answers to the prompts of `groups` → System: with sampled ids for the KL, text for the reward."""
    encoder = load_encoder(path, args.chat_template, args.chat, "--policy")
    policy = load_model(path, encoder, device, "--policy")
    answered = [Group(g.where, g.prompt, [], g.row, encoder.prompt(g.prompt, g.where)[0]) for g in groups]
    set_keys(answered, "")
    limit, longest = int(min(args.max_length, encoder.max_positions)), args.max_new_tokens
    fits = [g for g in answered if 0 < len(g.prompt_ids) <= limit - longest]
    if not fits:
        fail(f"--policy {path}: no prompt leaves room for --max-new-tokens {longest} within {limit} tokens.")
    left_out = len(answered) - len(fits)
    print(f"{path}: answers {len(fits)} prompts" + (f", {left_out} left out that are too long" if left_out else ""))
    with autocast:
        if args.num_beams:
            sampled = guided(policy, encoder, fits, scorer, args, autocast)
        else:
            by_prompt = sample(policy, [g.prompt_ids for g in fits], args.samples, longest, encoder.stops,
                               args.temperature or 1.0, args.top_p, greedy=args.temperature == 0, seed=args.seed,
                               progress=f"sample {path}")
            sampled = [[(s.ids, s.ended) for s in samples] for samples in by_prompt]
    kl = None
    for g, answers in zip(fits, sampled):
        g.completion_ids, g.completions = [ids for ids, _ in answers], [encoder.decode(ids) for ids, _ in answers]
        g.cut = [not ended for _, ended in answers]
    if ref and (args.temperature != 1 or args.top_p != 1 or args.num_beams):
        print("KL(π‖π_ref) is left out: it needs answers sampled from π itself, --temperature 1, --top-p 1, no beams")
    elif ref:
        if load_encoder(ref, flag="--ref-model").tokenizer.get_vocab() != encoder.tokenizer.get_vocab():
            fail(f"--ref-model {ref}: its tokeniser differs from --policy {path}'s: log-probs cannot be compared.")
        ratio = Scorer(path, encoder, (policy, load_model(ref, encoder, device, "--ref-model")), 1.0)
        kl = [r for rs in measure(ratio, fits, args, autocast) for r in rs]              # (6)
    if n := sum(map(sum, (g.cut for g in fits))):
        print(f"{path}: {n} of {len(fits) * len(fits[0].cut)} answers hit --max-new-tokens: scored without an end")
    return System(path, fits, "policy", kl)


def guided(policy, encoder, groups, scorer, args, autocast):
    """Value-guided decoding: beam search in which the reward of the unfinished answers decides, not their log-prob.

    Each beam samples --num-beams continuations of --beam-chunk tokens; of all of them, and of the answers that ended,
    the --num-beams with the highest reward stay; at the end the best is the answer. This is the block-wise controlled
    decoding of Mudgal et al. 2023 (arXiv 2310.17022) and, with --implicit, the chunk-level beam search of Zhou et al.
    2024 (arXiv 2405.19262). The prefixes are scored as they stand, though the reward model saw whole answers only.
    """
    beams = [[([], False)] for _ in groups]                  # of each prompt: (ids, ended)
    starts = range(0, args.max_new_tokens, args.beam_chunk)
    for start in tqdm(starts, desc="beams", unit="chunk", leave=False, disable=None):
        alive = [(i, ids) for i, bs in enumerate(beams) for ids, ended in bs if not ended]
        if not alive:
            break
        n = min(args.beam_chunk, args.max_new_tokens - start)
        more = sample(policy, [groups[i].prompt_ids + ids for i, ids in alive], args.num_beams, n, encoder.stops,
                      args.temperature, args.top_p, seed=args.seed + start)
        pool = [{tuple(ids): True for ids, ended in bs if ended} for bs in beams]
        for (i, ids), samples in zip(alive, more):
            pool[i] |= {tuple(ids + s.ids): s.ended for s in samples}
        texts = [Group(g.where, g.prompt, [encoder.decode(list(ids)) for ids in p]) for g, p in zip(groups, pool)]
        for t, p in zip(texts, pool):
            t.cut = [not ended for ended in p.values()]
        table = encode(texts, scorer.encoder, Counter(), args.max_length, "truncate")
        rewards = dict(zip(table, measure(scorer, list(table.values()), args, autocast, quiet=True)))
        for i, p in enumerate(pool):
            ranked = sorted(zip(rewards.get(i, [0.0] * len(p)), p.items()), key=lambda x: -x[0])
            beams[i] = [(list(ids), ended) for _, (ids, ended) in ranked[:args.num_beams]]
    return [bs[:1] for bs in beams]


# --- report -----------------------------------------------------------------------------------------------------------

def interval(low, high, scale=1.0, digits=1):
    return f"[{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def order(g, kind):
    """Pairs (i, j) of completions of which the data says that i is the better: chosen and rejected, or by rank."""
    if kind in PAIRS:
        return [(0, 1)]
    scores = g.row.get("scores", []) if kind == "ranked list" else []
    return [(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b]


def accuracy_line(meetings):
    """meetings: [(group, i, j)], i said to be the better. Ties count half."""
    wins = [win_rate([g.scores[i]], [g.scores[j]])[0] for g, i, j in meetings]
    p, n = mean(wins), len(wins)
    margins = [g.scores[i] - g.scores[j] for g, i, j in meetings]
    return (f"accuracy {100 * p:.1f} % {interval(*wilson(p, n), 100)} of {n:,} pairs, {wins.count(0.5)} ties; margin "
            f"{mean(margins):.3f} ± {std(margins):.3f}, mean σ(margin) {mean([p_better(*m) for m in meetings]):.3f}")


def report_one(system, args, scorers):
    """One file or one policy: what its scores are like. Returns the series of the histogram."""
    groups, kind = system.groups, system.kind
    scores, lengths, plain = ([v for g in groups for v in getattr(g, a)] for a in ("scores", "lengths", "plain"))
    series = {"score": scores}
    if kind in PAIRS:
        series = {"chosen": [g.scores[0] for g in groups], "rejected": [g.scores[1] for g in groups]}
    for name, values in series.items():
        print(f"{name}: {mean(values):.3f} ± {std(values):.3f} over {len(values):,} answers")
    r, before = correlation(scores, lengths), correlation(plain, lengths)
    print(f"correlation of score with length {r:.2f}; mean length {mean(lengths):.1f} tokens")
    if args.calibrate_length:
        print(f"before --calibrate-length: mean {mean(plain):.3f}, correlation with length {before:.2f}")
    if meetings := [(g, i, j) for g in groups for i, j in order(g, kind)]:
        print(accuracy_line(meetings))
        longer = [m for m in meetings if m[0].lengths[m[1]] > m[0].lengths[m[2]]]
        shorter = [m for m in meetings if m[0].lengths[m[1]] < m[0].lengths[m[2]]]
        for what, some in (("where the better is the longer", longer), ("where the better is the shorter", shorter)):
            if some:
                print(f"  {what}: {accuracy_line(some)}")
        alone = 100 * (len(longer) + (len(meetings) - len(longer) - len(shorter)) / 2) / len(meetings)
        print(f"  length alone (the longer is the better): {alone:.1f} %")
        if len(scorers) > 1:
            split = sum(len({a > b for a, b in zip(g.raw[i], g.raw[j])}) > 1 for g, i, j in meetings)
            print(f"  the reward models disagree about {100 * split / len(meetings):.1f} % of the pairs")
    if by := args.by or ("label" if kind == "unpaired" else None):
        values = {}
        for g in groups:
            values.setdefault(str(g.row[by]), []).append(g)
        for value, some in sorted(values.items()):
            these = [(g, i, j) for g in some for i, j in order(g, kind)]
            own = [s for g in some for s in g.scores]
            line = accuracy_line(these) if these else f"score {mean(own):.3f} ± {std(own):.3f} of {len(own)}"
            print(f"  {by} = {value}: {line}")
    if system.kl:
        bounds = interval(*bootstrap(system.kl, [g.key[0] for g in groups for _ in g.scores], args.seed), digits=3)
        print(f"KL(π‖π_ref) {mean(system.kl):.3f} {bounds} nats per answer")
    if kind == "policy" and (n := len(groups[0].scores)) > 1:
        known = all("answer" in g.row for g in groups)
        right = [[float(t.strip() == str(g.row["answer"]).strip()) for t in g.completions] for g in groups if known]
        print("best of n" + " " * 5 + "score   KL at most" + "   equals column 'answer'" * known)
        for k in sorted({2 ** e for e in range(n.bit_length()) if 2 ** e <= n} | {n}):
            line = f"{k:>9} {mean([best_of_n(g.scores, k) for g in groups]):>9.3f} {best_of_n_kl(k):>12.3f}"
            share = mean([best_of_n(g.scores, k, r) for g, r in zip(groups, right)])
            print(line + f" {100 * share:>24.1f} %" * known)
    return series


def report_many(systems, args):
    """Several systems side by side, on the prompts that all of them answer. Returns the series of the histogram."""
    rows = align(systems)
    if not rows:
        fail("the systems have no prompt in common.")
    left_out = {s.name: len(s.groups) - len(rows) for s in systems if len(s.groups) > len(rows)}
    clusters, series = [r[0].key[0] for r in rows], {}
    print(f"{len(rows):,} answers of each are compared, to {len(set(clusters)):,} prompts"
          + (f"; without a partner: {left_out}" if left_out else ""))
    for k, system in enumerate(systems):
        mine, first = [r[k] for r in rows], [r[0] for r in rows]
        scores, lengths, plain = ([v for g in mine for v in getattr(g, a)] for a in ("scores", "lengths", "plain"))
        per_row = [mean(g.scores) for g in mine]
        series[f"{k + 1} {Path(system.name).name}"] = scores
        bounds = interval(*bootstrap(per_row, clusters, args.seed), digits=3)
        before = f"; before --calibrate-length {mean(plain):.3f}, {correlation(plain, lengths):.2f}"
        print(f"{k + 1} {system.name}: score {mean(scores):.3f} {bounds} ± {std(scores):.3f}, {mean(lengths):.1f} "
              f"tokens, correlation with length {correlation(scores, lengths):.2f}" + before * args.calibrate_length)
        if k:
            wins, ties = zip(*(win_rate(a.scores, b.scores) for a, b in zip(mine, first)))
            alike = [(win_rate([x], [y])[0], c) for a, b, c in zip(mine, first, clusters)
                     for x, n in zip(a.scores, a.lengths) for y, m in zip(b.scores, b.lengths)
                     if max(n, m) <= 1.1 * min(n, m)]
            share = lambda w, c: f"{100 * mean(w):.1f} % {interval(*bootstrap(w, c, args.seed), 100)}"  # noqa: E731
            print(f"  wins {share(wins, clusters)} against 1, ties {100 * mean(ties):.1f} %; "
                  "of like length (within 10 %): " + (f"{share(*zip(*alike))} of {len(alike):,}" if alike else "none"))
        if system.kl:
            own = [g.key[0] for g in system.groups for _ in g.scores]
            bounds = interval(*bootstrap(system.kl, own, args.seed), digits=3)
            print(f"  KL(π‖π_ref) {mean(system.kl):.3f} {bounds} nats per answer")
    scores, lengths = ([v for r in rows for g in r for v in getattr(g, a)] for a in ("scores", "lengths"))
    print(f"correlation of score with length over all systems {correlation(scores, lengths):.2f}")
    return series


# --- files ------------------------------------------------------------------------------------------------------------

def says(prompt, text):
    """An answer in the form of its prompt: text, or one assistant message."""
    return [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text


def extra(g):
    """The row's columns without those that hold prompt, answers and scores in its own format."""
    taken = {"prompt", "question", "chosen", "rejected", "completion", "response", "completions", "responses",
             "scores", "score", "p_chosen", "spread", "response_0", "response_1", "better_response_id",
             "safer_response_id", "score_chosen", "score_rejected"}
    return {k: v for k, v in g.row.items() if k not in taken}


def usable(g, i):
    """Whether an answer can be trained on: not empty, nor cut at --max-new-tokens, for it would get a false end token."""
    return bool(g.completions[i].strip()) and not (getattr(g, "cut", None) and g.cut[i])


def output_rows(system, scorers, several):
    """One row per group: pairs stay pairs, rankings rankings, single answers single answers, with their scores."""
    for g in system.groups:
        base, rest, say = {"prompt": g.prompt}, extra(g), [says(g.prompt, t) for t in g.completions]
        spread = {"spread": [round(s, 6) for s in g.spread]} if len(scorers) > 1 else {}
        if system.kind in PAIRS:
            scores = {"score_chosen": g.scores[0], "score_rejected": g.scores[1], "p_chosen": p_better(g, 0, 1)}
            yield base | {"chosen": say[0], "rejected": say[1]} | rest | scores | spread
        elif system.kind == "ranked list":
            before = {} if "ranks" in g.row else {"scores_before": g.row["scores"]}
            yield base | {"completions": say} | rest | {"scores": g.scores} | before | spread
        else:
            for k, s in enumerate(say):
                name = "completion" if system.kind == "unpaired" else "response"
                row = base | {name: s} | rest | {"score": g.scores[k]} | ({"system": system.name} if several else {})
                row |= {"spread": g.spread[k]} if spread else {}
                yield row | ({"cut": g.cut[k]} if hasattr(g, "cut") else {})


def pair_rows(groups, kept, given=None):
    """The best against the worst of each group's kept answers. given: {key: group of the data's answer}, which then is
    chosen, without a p_chosen, since the label is the data's, not the scorer's. Empty, cut or equal answers are left out."""
    for g, indices in zip(groups, kept):
        ranked = sorted((i for i in indices if usable(g, i)), key=lambda i: g.scores[i])
        if not ranked or given is not None and g.key not in given:
            continue
        (a, i), (b, j) = (given[g.key], 0) if given else (g, ranked[-1]), (g, ranked[0])
        if a.completions[i].strip() != b.completions[j].strip():
            row = {"prompt": g.prompt, "chosen": says(g.prompt, a.completions[i]),
                   "rejected": says(g.prompt, b.completions[j])}
            row |= extra(g) | {"score_chosen": a.scores[i], "score_rejected": b.scores[j]}
            yield row if given else row | {"p_chosen": p_better(g, i, j)}


def write_jsonl(file, rows):
    lines = [json.dumps(r, ensure_ascii=False, default=str) + "\n" for r in rows]
    Path(file).write_text("".join(lines), encoding="utf-8")
    print(f"{file}: {len(lines):,} rows")


def pieces(encoder, ids):
    """The text of every token; a few before it are decoded too, for spaces and broken characters depend on them."""
    text = lambda ids: encoder.tokenizer.decode(  # noqa: E731
        encoder.anchor + ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [text(ids[max(0, t - 4):t + 1])[len(text(ids[max(0, t - 4):t])):] or "·" for t in range(len(ids))]


STYLE = """:root{color-scheme:light dark;--fg:#1a1a1a;--bg:#fff;--soft:#666;--line:#ddd}
@media(prefers-color-scheme:dark){:root{--fg:#eee;--bg:#161616;--soft:#aaa;--line:#3a3a3a}}
body{font:16px/1.9 system-ui,sans-serif;color:var(--fg);background:var(--bg)}small,.p{color:var(--soft)}
body{max-width:60rem;margin:2rem auto;padding:0 1rem}section{border-top:1px solid var(--line);padding:.7rem 0}
.p,.a{white-space:pre-wrap;overflow-wrap:anywhere}.a span:hover{outline:2px solid currentColor}
.a span{background:rgb(var(--c)/var(--o));border-radius:3px;padding:.15em .05em}.m{--c:225 45 35}.u{--c:30 120 235}"""


def tokens_page(answers, title):
    """[(prompt, label, score, [token text], [value]), …] → a page by itself: red lowers the reward, blue raises it."""
    size = sorted(abs(v) for *_, vs in answers for v in vs)
    scale = size[min(len(size) - 1, int(0.98 * len(size)))] or 1.0       # a few extremes must not make the rest pale
    title, parts, before = html.escape(title), [], None
    for prompt, label, score, texts, values in answers:
        if prompt != before:
            parts.append(f'<section><div class="p">{html.escape(prompt)}</div></section>')
        before = prompt
        spans = (f'<span class="{"m" if v < 0 else "u"}" style="--o:{0.7 * min(1, abs(v) / scale):.2f}" '
                 f'title="{html.escape(repr(t))} {v:+.4f}">' + html.escape(t).replace("\n", "↵\n") + "</span>"
                 for t, v in zip(texts, values))
        parts.append(f'<div class="a"><small>{html.escape(label)} {score:+.3f}</small> {"".join(spans)}</div>')
    return ('<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f'<title>{title}</title><style>{STYLE}</style><h1 style="font-size:1.2rem">{title}</h1>'
            f'<p class="a"><span class="m" style="--o:.7">red lowers the reward</span> by {scale:.3g} or more, '
            '<span class="u" style="--o:.7">blue raises it</span>. Point at a token for its value.</p>'
            f'{"".join(parts)}</html>\n')


def write_tokens(file, systems, scorer, args, autocast):
    picked, count = [], 0
    for s, g in ((s, g) for row in align(systems) for s, g in zip(systems, row)):    # prompt by prompt
        if count + len(g.completions) > PAGE and picked:
            break
        picked.append((s, g))
        count += len(g.completions)
    values = measure(scorer, [g.encoded for _, g in picked], args, autocast, by_token=True)
    answers = []
    for (s, g), vs in zip(picked, values):
        prompt = g.prompt if isinstance(g.prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in g.prompt)
        names = ["chosen", "rejected"] if s.kind in PAIRS else [f"{Path(s.name).name} {k + 1}" for k in range(len(vs))]
        answers += [(prompt, name, sum(v) if scorer.beta is not None else r[0], pieces(scorer.encoder, ids), v)
                    for name, r, ids, v in zip(names, g.raw, g.encoded.completion_ids, vs)]
    what = ("β log π/π_ref" if scorer.beta is not None else "change of the prefix score") + f" of {scorer.name}"
    Path(file).write_text(tokens_page(answers, f"Each token's share of the reward: {what}"), encoding="utf-8")
    print(f"{file}: {len(answers)} answers, tokens coloured by {what}")


def plot_scores(file, series):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    labels = [f"{n}: {mean(v):.2f} ± {std(v):.2f}" for n, v in series.items()]
    axes.hist(list(series.values()), bins=40, histtype="stepfilled", alpha=0.5, label=labels)
    axes.set(xlabel="reward", ylabel="answers")
    axes.legend()
    figure.savefig(file, dpi=150)
    print(f"{file}: histogram")


def curves(args):
    """metrics.jsonl of run directories: first and last value of every metric in the terminal, curves in the file."""
    tables, runs, file = {}, args.dataset, args.plot
    if args.policy or args.output or args.pairs or args.tokens:
        fail("--dataset with run directories goes with --plot, not with --policy, --output, --pairs or --tokens.")
    for run in runs:
        if not (Path(run) / "metrics.jsonl").is_file():
            fail(f"--dataset {run}: there is no metrics.jsonl in it; give run directories only, or files only.")
        tables[run] = {}
        for line in (Path(run) / "metrics.jsonl").read_text().split("\n"):
            try:
                values = json.loads(line) if line.strip() else {}
                for key, value in values.items():
                    if key != "step" and isinstance(value, (int, float)):
                        tables[run].setdefault(key, []).append((values["step"], value))
            except (ValueError, KeyError, AttributeError):
                fail(f"{run}/metrics.jsonl: a line is not a JSON object with a step.")
    names = sorted({k for t in tables.values() for k, points in t.items()
                    if len({v for _, v in points}) > 1 and not k.endswith("_se")})       # constants are no curves
    if not names:
        fail(f"--dataset {' '.join(runs)}: nothing in metrics.jsonl has changed yet.")
    for name in names:
        ends = (f"{t[name][0][1]:.4g} → {t[name][-1][1]:.4g}" if name in t else "–" for t in tables.values())
        print(f"{name:<28}" + "   ".join(ends))
    if file:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
        height = math.ceil(len(names) / 3)
        figure, axes = plt.subplots(height, 3, figsize=(13, 2.6 * height), squeeze=False, layout="constrained")
        for axis, name in zip(axes.flat, names):
            for run, t in tables.items():
                points = t.get(name, [(math.nan, math.nan)])
                axis.plot(*zip(*points), marker="o" if len(points) < 5 else None, label=run)
            axis.set_title(name, fontsize=9)
        for axis in list(axes.flat)[len(names):]:
            axis.axis("off")
        axes.flat[0].legend(fontsize=7)
        figure.savefig(file, dpi=110)
        print(f"{file}: curves of {len(names)} metrics")


# --- main -------------------------------------------------------------------------------------------------------------

def main(argv=None):
    args = parse_args(argv)
    if any(Path(d).is_dir() for d in args.dataset):
        return curves(args)
    # --- setup
    device = pick_device(args.device)
    args.dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    given = tuple(k for k in KINDS if k != "prompt")
    kinds = PAIRS + ("response",) if args.keep_chosen else PAIRS[:2] + ("prompt",) if args.policy else given
    files = [read_groups(f, kinds, args.split, args.columns, args.limit, args.prefer) for f in args.dataset]
    for (groups, report), file in zip(files, args.dataset):
        if not groups:
            why = ", ".join(f"{v:,} {k}" for k, v in report.items() if k not in ("rows", "kept"))
            fail(f"{file}: no rows are left of {report['rows']:,}: {why}.")
        for g in groups if args.by else []:
            if args.by not in g.row:
                fail(f"{g.where}: column '{args.by}' is missing, which --by asks for.")
        if len(files) > 1 and report.kind not in ("response", "unpaired"):
            fail(f"{file}: rows of kind '{report.kind}' cannot be compared; each --dataset needs prompt and response.")
    scorers = load_scorers(args, device)
    for scorer in scorers:
        if args.max_length > (most := scorer.encoder.max_positions):
            print(f"--max-length {args.max_length} is lowered to {most}, the positions that {scorer.name} has")

    # --- answers: those of the files, or those that the policies give
    systems, reports = [], []
    if args.policy:
        set_keys(files[0][0], "")
        asked = [g for g in files[0][0] if g.key[1] == 0]                # each prompt once
        if len(asked) < len(files[0][0]):
            print(f"{args.dataset[0]}: {len(files[0][0]):,} rows, {len(asked):,} prompts: each is answered once")
        for path in args.policy:
            systems.append(generate(path, args.ref_model, asked, scorers[0], args, device, autocast))
        if args.keep_chosen:                                 # the data's answers are a system too, scored like the rest
            chosen = [replace(g, completions=g.completions[:1]) for g in asked]
            set_keys(chosen, "")
            systems.append(System("chosen in the data", chosen, "response"))
        reports = [Counter(rows=len(s.groups)) for s in systems]
    else:
        for (groups, report), file in zip(files, args.dataset):
            set_keys(groups, file if len(files) > 1 else "")
            systems.append(System(file, groups, report.kind))
            reports.append(report)

    # --- score
    for system, report in zip(systems, reports):
        own = [Counter(report) for _ in scorers]             # each tokeniser counts for itself what it drops
        for r in own:
            r.kind = system.kind
        before = system.groups
        system.groups = score_all(before, scorers, args, autocast, system.name, own)
        if system.kl and len(system.groups) < len(before):   # the KL stays that of the answers that are reported
            left, n = {id(g) for g in system.groups}, args.samples
            system.kl = [v for i, g in enumerate(before) if id(g) in left for v in system.kl[i * n:(i + 1) * n]]
    aggregate([g for s in systems for g in s.groups], scorers, args)
    print(scorers[0].encoder.show(systems[0].groups[0].encoded))
    implicit = f"{args.beta:g} · log π/π_ref of {args.implicit} against {args.ref_model}"
    spread = mean([s for x in systems for g in x.groups for s in g.spread])
    several = f"{args.aggregate} of {len(scorers)} z-scored models; they differ by {spread:.3f} (mean std per answer)"
    print("reward: " + (implicit if args.implicit else several if len(scorers) > 1 else scorers[0].name))
    data = [json.loads(f.read_text()).get("dataset") for s in scorers if (f := Path(s.name) / "args.json").is_file()]
    trained_on = {Path(d).resolve() for d in data if d and Path(d).exists()}
    if not args.policy and trained_on & {Path(f).resolve() for f in args.dataset}:
        print("note: the reward was trained on rows of this very file, so this is no test of it")

    # --- report, and what is written
    groups = systems[0].groups
    series = report_many(systems, args) if len(systems) > 1 else report_one(systems[0], args, scorers)
    print(histogram(series))
    if args.plot:
        plot_scores(args.plot, series)
    if args.tokens:
        write_tokens(args.tokens, systems, scorers[0], args, autocast)
    kept = [list(range(len(g.scores))) for g in groups]
    if args.select == "rso":
        generator, n = torch.Generator().manual_seed(args.seed), sum(len(g.scores) for g in groups)
        kept = [rejection_sample(g.scores, args.beta, generator) for g in groups]
        print(f"rejection sampling at β {args.beta:g}: {100 * sum(map(len, kept)) / n:.1f} % of {n:,} samples accepted"
              f", {sum(len(k) == 1 for k in kept)} of {len(kept)} prompts keep the best one only")
    if args.output:
        if args.select:
            picked = [[i for i in indices if usable(g, i)] for g, indices in zip(groups, kept)]
            if args.select != "rso":
                picked = [[max(indices, key=lambda i, g=g: g.scores[i])] if indices else [] for g, indices in zip(groups, picked)]
            if empty := sum(not indices for indices in picked):
                print(f"  {empty} prompts left out: all their answers were cut or empty")
            picked = [(g, i) for g, indices in zip(groups, picked) for i in indices]
            write_jsonl(args.output, ({"prompt": g.prompt, "response": says(g.prompt, g.completions[i])} | extra(g)
                                      | {"score": g.scores[i]} for g, i in picked))
        else:
            write_jsonl(args.output, (r for s in systems for r in output_rows(s, scorers, len(systems) > 1)))
    if args.pairs:
        given = {g.key: g for g in systems[1].groups} if args.keep_chosen else {}
        rows = list(pair_rows(groups, kept, given if args.keep_chosen else None))
        if not rows:
            fail("--pairs: no row has two different answers that ended (a row of a response file holds one; --policy with "
                 "--samples 2 or more makes several).")
        write_jsonl(args.pairs, rows)
        print(f"  {len(groups) - len(rows)} prompts left out: their answers were equal, empty or cut")


if __name__ == "__main__":
    main()
