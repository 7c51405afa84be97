"""Everything that is done with a trained reward: score, compare, select, make data, and look.

    python score.py                              # the toy's pairs, with the model of train_rm.py
    python score.py --policy base tuned --dataset prompts.jsonl --reward-model runs/rm \\
        --ref-model base                         # score, win rate and KL of two policies

The reward is a reward model (--reward-model, one or several) or the implicit reward of an aligned
policy (--implicit); both go through the same code. Without --policy the completions are those of
--dataset; with it each policy completes the prompts first. A score alone means nothing, so p is
σ(difference of two scores).

95 % intervals stand in brackets, with whole prompts as the unit, since what is said of one prompt
is not independent: of accuracies Wilson's, of mean scores, margins, correlations, win rates, KL and
best of n a bootstrap. Behind ± stands a standard deviation. Counts, ties, mean lengths and mean
σ(margin) are said of these rows only and have no interval.

Differs from the papers in: rejection sampling makes one pass over the samples, unless --rso-keep
asks for the rounds of Liu et al. 2023; length is taken out by the mean scores of bins, where Huang
et al. 2024 fit a locally weighted regression; --num-beams takes the reward of a prefix for its
value, where Mudgal et al. 2023 learn that value.
"""
# --- derivation -----------------------------------------------------------------------------------
#
# Notation as in train_dpo.py: x prompt, y completion, r(x, y) its reward, σ(z) = 1 / (1 + e^−z).
#
# 1. Two sorts of reward. A reward model gives r(x, y) at the completion's last token. A policy π,
#    aligned from π_ref, has one inside it (Rafailov et al. 2023, arXiv 2305.18290, eq. 5, up to a
#    constant of the prompt; token by token: Rafailov et al. 2024, arXiv 2404.12358):
#
#        r̂(x, y) = β log π(y|x)/π_ref(y|x) = Σ_t β log π(y_t|x, y_<t)/π_ref(y_t|x, y_<t)       (1)
#
#    Either is known up to a constant of the prompt only, so what is read off is a difference:
#    p(y ≻ y') = σ(r − r'). Several reward models have no common unit: each is z-scored by the mean
#    and std that train_rm.py stored, then the mean or the minimum is taken (Coste et al. 2023,
#    arXiv 2310.02743, eq. 3–4), or the mean less λ times the std of their scores (eq. 5 there takes
#    the variance). Where they disagree, the completion is unlike what they were
#    trained on, and none of them should be believed. That they agree is no proof that they are
#    right: models trained on the same data share its blind spots.
#
# 2. Length. Most rewards rise with length. --calibrate-length subtracts what length alone predicts
#    (Huang et al. 2024, arXiv 2409.17407, by regression; here the mean of a bin of like lengths):
#
#        r*(x, y) = r(x, y) − E[ r | |y| ] + E[ r ]                                            (2)
#
# 3. The best of n. With N samples sorted r_(1) ≤ … ≤ r_(N), the mean over all subsets of size n of
#    their maximum, which estimates E[max of n] without bias, and the most by which taking the best
#    leaves the policy (Stiennon et al. 2020, arXiv 2009.01325, app. G.3; an upper bound: Beirami et
#    al. 2024, arXiv 2401.01879):
#
#        best(n) = Σ_i r_(i) C(i − 1, n − 1) / C(N, n)                                         (3)
#        KL( best of n ‖ π ) ≤ log n − (n − 1)/n                                               (4)
#
# 4. Rejection sampling (Liu et al. 2023, arXiv 2309.06657, algorithm 1). Keep y ~ π_ref with
#    probability
#
#        exp( ( r(x, y) − max_y' r(x, y') ) / β )                                              (5)
#
#    If the maximum is over all y', those kept follow π_ref(y|x) e^{r(x,y)/β} / Z(x), the optimum
#    that DPO aims at. As in the paper the maximum is that of the prompt's N
#    samples, so the best of them is always kept. The paper goes on in rounds until M are kept, each
#    round over the samples that are left, with their maximum (--rso-keep M); M = N keeps all,
#    whatever β. In one round what is kept has, up to a constant, the density
#
#        π_ref(y|x) e^{r/β} E[ e^{−max/β} | r ]
#
#    whose last factor falls in r: where a reward is high, so is the maximum that it is part of. So
#    with few samples the tilt is weaker than that of (5) and nearer to π_ref (N = 1 keeps all);
#    it is exact as N grows and the maximum no longer depends on r.
#
# 5. KL of a policy from its own samples, per completion. A truncated completion counts up to where
#    it was truncated; what would have followed is not in it.
#
#        KL( π ‖ π_ref ) = E_x E_{y~π} Σ_t log π(y_t|x, y_<t)/π_ref(y_t|x, y_<t)               (6)

# --- imports --------------------------------------------------------------------------------------
import argparse
import html
import importlib.util
import json
import math
import os
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

import common
from common import FORMATS, Account, Group, Sample, fail, token_logps, within

TOY = Path(__file__).parent / "tests" / "toy"
PAGE = 100                      # completions on a --tokens page
TIE = 1e-4                      # the same completion in another batch differs by less
GIVES = ("pair", "list", "label", "response")        # formats with completions to score


# --- arguments ------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = common.Parser(
        description=__doc__.split("\n")[0], allow_abbrev=False,
        usage="%(prog)s [--flag value …]  (--help lists the flags)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    count = within("[1, 1e12]", int)
    natural = within("[0, 1e12]", int)
    g = p.add_argument_group("data")
    g.add_argument("--dataset", nargs="+", default=[], help="rows of any format; several files of responses: systems to compare; run directories: their curves")
    g.add_argument("--split", default="train", help="split of a hub dataset")
    g.add_argument("--columns", nargs="+", default=[], metavar="NEW=OLD", help="rename: prompt=question chosen=best")
    g.add_argument("--prefer", choices=["better", "safer"], default="better", help="PKU-SafeRLHF: which label")
    g.add_argument("--limit", type=natural, default=0, help="only the first N rows (0 = all)")
    g.add_argument("--chat", action="store_true", help="plain-text prompts become user turns of the chat template")
    g.add_argument("--chat-template", metavar="FILE", help="Jinja template instead of the tokeniser's own")
    g.add_argument("--max-length", type=count, default=1024, help="tokens of prompt + completion")
    g.add_argument("--overlong", choices=["drop", "truncate"], default="drop", help="groups over --max-length")
    g = p.add_argument_group("reward")
    g.add_argument("--reward-model", nargs="+", default=[], metavar="DIR", help="one or several; default: runs/rm, which train_rm.py makes")
    g.add_argument("--aggregate", choices=["mean", "min", "mean-std"], default="mean", help="of several reward models, each z-scored; mean-std: minus --std-coef times their std")
    g.add_argument("--reward-weights", nargs="+", type=within("(0, inf)"), default=[], metavar="W", help="of the mean, one per --reward-model (none: 1 each)")
    g.add_argument("--std-coef", type=within("(0, inf)"), default=1.0, help="--aggregate mean-std: λ, the price of disagreement")
    g.add_argument("--implicit", metavar="POLICY", help="score by the implicit reward of this policy against --ref-model (1)")
    g.add_argument("--ref-model", help="reference policy: of --implicit, and of KL(π‖π_ref) with --policy")
    g.add_argument("--beta", type=within("(0, inf)"), help="scale of the implicit reward (1), temperature of --select rso (5); default: with --implicit that in the policy's args.json, else 0.1")
    g.add_argument("--calibrate-length", action="store_true", help="subtract what length alone predicts from every score (2)")
    g = p.add_argument_group("generate")
    g.add_argument("--policy", nargs="+", default=[], metavar="DIR", help="these complete the prompts of --dataset; several: systems to compare")
    g.add_argument("--samples", type=count, default=1, help="completions of each policy for each prompt")
    g.add_argument("--max-new-tokens", type=count, default=128, help="longest sampled completion")
    g.add_argument("--temperature", type=within("[0, inf)"), default=1.0, help="of sampling (0 = greedy)")
    g.add_argument("--top-p", type=within("(0, 1]"), default=1.0, help="sample from the smallest set of tokens with this probability")
    g.add_argument("--num-beams", type=natural, default=0, help="value-guided decoding: beams kept by the reward of their prefixes (0 = off)")
    g.add_argument("--beam-chunk", type=count, default=4, help="tokens between two looks of --num-beams at the reward")
    g = p.add_argument_group("write and look")
    g.add_argument("--output", type=new_file, metavar="F.jsonl", help="every row with its score; with --select the selected completions")
    g.add_argument("--pairs", type=new_file, metavar="F.jsonl", help="best against worst completion of a prompt (--select rso: of the kept), with scores and p_chosen")
    g.add_argument("--keep-chosen", action="store_true", help="--pairs: chosen stays that of --dataset, rejected is the worst sample")
    g.add_argument("--select", choices=["best", "rso"], help="--output: the best of --samples, or rejection sampling (5)")
    g.add_argument("--confidence", type=within("[0.5, 1)"), default=0.5, help="--output: only pairs whose better completion is better with this probability or more")
    g.add_argument("--rso-keep", type=natural, default=0, metavar="M", help="--select rso: rounds until M samples of each prompt are kept (0 = one round)")
    g.add_argument("--by", metavar="COLUMN", help="the result for each value of this column too")
    g.add_argument("--beside", nargs="+", default=[], metavar="FILE", help="rows whose scores stand beside in the histogram and --plot: the training data beside a test")
    g.add_argument("--untrained", metavar="DIR", help="a base model: the histogram and --plot also show what a new, random head on it says")
    g.add_argument("--tensorboard", action="store_true", help="run directories: write their curves for tensorboard, in RUN/tensorboard")
    g.add_argument("--plot", type=figure_file, metavar="F.png", help="histogram of the scores, or curves of run directories (needs matplotlib)")
    g.add_argument("--tokens", type=new_file, metavar="F.html", help=f"page of up to {PAGE} completions, tokens coloured by their part in the reward")
    g = p.add_argument_group("run")
    g.add_argument("--micro-batch-tokens", type=count, default=8192, help="tokens per forward: memory, not the result")
    g.add_argument("--seed", type=within("[0, 2e18]", int), default=0, help="of sampling, rejection and bootstrap")
    g.add_argument("--device", default="auto", help="auto = cuda where there is one, else cpu")
    g.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="to compute in; weights: float32")
    args = p.parse_args(argv)
    check_flags(args, p.error)
    return args


def new_file(text):
    """An argparse type: a file that can be written."""
    file = Path(text)
    try:
        usable = text.strip() and not file.is_dir() and file.parent.is_dir()
    except (OSError, ValueError):                            # a name that no file can have
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(
            f"{text!r:.60}: its folder is missing, it is a folder, or it is no name")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r:.60} cannot be written")
    return text


def figure_file(text):
    """An argparse type: a file that matplotlib can write."""
    if Path(text).suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text}: its name must end in .png, .pdf or .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("it needs matplotlib: pip install matplotlib")
    return new_file(text)


def check_flags(args, error):
    """Combinations that cannot work are refused before anything is loaded."""
    systems = max(len(args.policy), len(args.dataset))
    sampling = args.samples > 1 or args.num_beams

    if args.implicit and (args.reward_model or not args.ref_model):
        error("--implicit takes the place of --reward-model and needs --ref-model: its reward is "
              "β log π/π_ref")
    if args.ref_model and not (args.implicit or args.policy):
        error("--ref-model is of use with --implicit or with --policy only")
    if args.aggregate != "mean" and len(args.reward_model) < 2:
        error(f"--aggregate {args.aggregate} needs several --reward-model")
    if args.reward_weights and len(args.reward_weights) != max(2, len(args.reward_model)):
        error("--reward-weights needs several --reward-model, and one number for each")
    if args.reward_weights and args.aggregate == "min":
        error("--reward-weights belong to a mean: drop them or --aggregate min")
    if args.std_coef != 1 and args.aggregate != "mean-std":
        error("--std-coef goes with --aggregate mean-std")
    if args.tensorboard and not all(Path(source).is_dir() for source in sources(args)):
        error("--tensorboard writes the curves of run directories: give those as --dataset")
    if args.untrained and args.implicit:
        error("--untrained stands beside a --reward-model, not --implicit")

    if not args.policy and (sampling or args.keep_chosen):
        error("--samples, --num-beams and --keep-chosen need --policy, which makes the completions")
    if args.num_beams and args.samples > 1:
        error("--num-beams gives one completion a prompt: drop it or --samples")
    if args.temperature == 0 and sampling:
        error("--temperature 0 always gives the same completion: drop it, or --samples and "
              "--num-beams")

    if args.policy and len(args.dataset) > 1:
        error("--policy completes the prompts of one --dataset")
    if systems > 1 and (args.pairs or args.select or args.by):
        error("--pairs, --select and --by take one system: one --policy or one --dataset")
    if args.confidence > 0.5 and (args.policy or args.select or not args.output):
        error("--confidence selects the pairs of --dataset for --output: give that, and neither "
              "--policy nor --select")
    if args.keep_chosen and not args.pairs:
        error("--keep-chosen needs --pairs")
    if args.select and not (args.output and args.samples > 1):
        error("--select needs --policy, --samples above 1 and --output")
    if args.rso_keep and (args.select != "rso" or args.rso_keep >= args.samples):
        error("--rso-keep goes with --select rso and is below --samples: of as many, all are kept")
    if args.pairs and args.policy and args.samples < 2 and not args.keep_chosen:
        error("--pairs needs two completions of a prompt: --samples 2 or more, or --keep-chosen")

    check_files(args)


def check_files(args):
    """Nothing is written over what is read, whatever links lead there."""
    reads = common.paths_of(args, (
        "reward_model", "implicit", "ref_model", "policy", "chat_template", "beside", "untrained"))
    if not args.reward_model and not args.implicit:
        reads.append(("--reward-model", "runs/rm"))
    for source in sources(args):                             # of a run directory its curves
        with common.failing(f"--dataset {source:.60}: it is no name"):
            run = Path(source) / "metrics.jsonl"
            reads.append(("--dataset", str(run) if Path(source).is_dir() else source))

    common.check_paths(reads, common.paths_of(args, ("output", "pairs", "plot", "tokens")))
    if args.by is not None and not args.by:
        fail("--by: '' is no column.")
    if args.split != "train" and all(Path(source).exists() for source in sources(args)):
        fail(f"--split {args.split}: files have no splits.")


def sources(args):
    """--dataset, or the toy's: pairs to score, prompts for a --policy."""
    return args.dataset or [f"{TOY}/prompts.jsonl" if args.policy else f"{TOY}/pairs.jsonl"]


# --- pure functions -------------------------------------------------------------------------------
# Lists of floats in, floats out. A cluster is a prompt: its completions are not independent.

def mean(xs):
    return sum(xs) / len(xs) if xs else math.nan


def tensor(xs):
    return torch.tensor(xs, dtype=torch.float64)


def std(xs):
    return tensor(xs).std().item() if len(xs) > 1 else 0.0


def sigmoid(z):
    return 1 / (1 + math.exp(-z)) if z > -700 else 0.0


def group_by(items, labels):
    """{label: [items with it]}, in order of appearance."""
    parts = {}
    for item, label in zip(items, labels):
        parts.setdefault(label, []).append(item)
    return parts


def redraw(rows, clusters, seed=0, rounds=2000):
    """Bootstrap: (N, C) rows → (rounds, C) sums over whole clusters drawn with replacement."""
    cluster = torch.tensor(common.numbered(clusters))                            # (N,)
    n = int(cluster.max()) + 1
    sums = rows.new_zeros(n, rows.shape[1]).index_add(0, cluster, rows)          # (clusters, C)
    generator = torch.Generator().manual_seed(seed)
    totals = []
    for _ in range(rounds):
        drawn = torch.randint(n, (n,), generator=generator)
        totals.append(sums[drawn].sum(0))
    return torch.stack(totals)


def middle_95(draws):
    """95 % percentile interval of bootstrapped values: (rounds,)"""
    draws = draws[~draws.isnan()]                            # a correlation of equal rows is none
    if len(draws) == 0:
        return math.nan, math.nan
    return tuple(draws.quantile(tensor([0.025, 0.975])).tolist())


def bootstrap(values, clusters, seed=0, rounds=2000):
    """95 % interval of a mean."""
    values = tensor(values)
    sums = redraw(torch.stack([values, torch.ones_like(values)], 1), clusters, seed, rounds)
    return middle_95(sums[:, 0] / sums[:, 1])


def bootstrap_correlation(xs, ys, clusters, seed=0, rounds=2000):
    """95 % interval of Pearson's r."""
    x = tensor(xs) - mean(xs)
    y = tensor(ys) - mean(ys)
    rows = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], 1)
    n, x, y, xx, yy, xy = redraw(rows, clusters, seed, rounds).T
    return middle_95((xy - x * y / n) / ((xx - x * x / n) * (yy - y * y / n)).sqrt())


def win(a, b):
    """1 where score a beats score b, 0 where it loses, 1/2 where they tie."""
    return 0.5 if abs(a - b) <= TIE else float(a > b)


def correlation(xs, ys):
    """Pearson's r; nan where one of them does not vary."""
    return torch.corrcoef(tensor([xs, ys]))[0, 1].item() if len(xs) > 1 else math.nan


def best_of_n(scores, n, values):
    """(3): unbiased E[value of the best of n] from N ≥ n samples. values: of each sample, its score
    or whatever else it is worth."""
    order = sorted(range(len(scores)), key=scores.__getitem__)
    total = sum(values[k] * math.comb(i, n - 1) for i, k in enumerate(order))
    return total / math.comb(len(scores), n)


def best_of_n_kl(n):
    return math.log(n) - (n - 1) / n                         # (4)


def rejection_sample(scores, beta, generator, keep=0):
    """(5): indices of the samples that are kept; never none, since the best is always kept.

    keep > 0: in rounds over those that are left, each with their maximum, until so many are kept.
    """
    scores = tensor(scores)
    left = torch.arange(len(scores))
    kept = []
    while not kept or len(kept) < keep:
        u = torch.rand(len(left), generator=generator, dtype=torch.float64)
        accepted = u < ((scores[left] - scores[left].max()) / beta).exp()
        kept += left[accepted].tolist()
        left = left[~accepted]
    return sorted(kept[:keep or None])


def histogram(series, bins=12):
    """{name: values} → lines for the terminal, one column of bars per name, one common scale."""
    every = [v for values in series.values() for v in values]
    low = min(every)
    step = (max(every) - low) / bins or 1.0
    width = max(8, min(28, 80 // len(series)))

    counts = {}
    tallest = 0.0                                            # fraction of the values of a name
    for name, values in series.items():
        counts[name] = Counter(min(bins - 1, int((v - low) / step)) for v in values)
        tallest = max(tallest, max(counts[name].values()) / len(values))

    lines = [" " * 11 + "".join(f"{name[-width + 2:]:<{width}}" for name in series)]
    for b in range(bins):
        line = f"{low + b * step:>10.3f} "
        for name, values in series.items():
            n = counts[name][b]
            bar = "█" * round((width - 7) * (n / len(values)) / tallest)
            line += f"{bar + f' {n}' * (n > 0):<{width}}"
        lines.append(line)
    return "\n".join(line.rstrip() for line in lines)


# --- the data that flows --------------------------------------------------------------------------

@dataclass(eq=False)
class System:
    """Where completions come from: a file, or a policy."""
    name: str
    gives: str                      # of a file: as in common.FORMATS; else "policy"
    groups: list                    # text; of a policy also the sampled ids, and which ended
    account: Account | None = None  # of a file: what became of its rows
    alias: str = ""                 # what the report calls it
    completions: list = field(default_factory=list)  # of all groups, in order

    def __post_init__(self):
        self.alias = Path(self.name).name
        self.account = self.account or Account(self.name, self.gives, len(self.groups))
        for group, key in zip(self.groups, number_rows(self.groups)):
            for k, text in enumerate(group.completions):
                ended = group.ended[k] if group.ended else None
                self.completions.append(Completion(self, group, key, k, text, ended))


@dataclass(eq=False)
class Completion:
    """One completion of one system: a row of the table that everything below works on."""
    system: System
    group: Group                    # its prompt and row
    key: tuple                      # (prompt, number): which of its system's rows with this prompt
    k: int                          # which completion of its group
    text: str
    ended: bool | None              # False: truncated at --max-new-tokens; None: not sampled
    log_ratio: float | None = None  # log π(y)/π_ref(y) of a sampled completion (6)
    view: Group | None = None       # its group as the first scorer's tokeniser reads it
    raw: list = field(default_factory=list)          # (M,) what each of M scorers gives
    lengths: list = field(default_factory=list)      # (M,) its tokens, as each of them reads it
    plain: float = math.nan         # one number out of `raw`
    score: float = math.nan         # the same after --calibrate-length (2): what is used
    spread: float = math.nan        # by how much the scorers differ: std of their z-scores

    @property
    def ids(self):
        return self.view.completion_ids[self.k]

    @property
    def length(self):
        return len(self.ids)            # tokens, end included

    @property
    def shown_as(self):                 # in the report
        if self.system.gives == "pair":
            return ("chosen", "rejected")[self.k]
        return self.system.alias


def number_rows(groups):
    """(prompt, number) of every group: how many before it have this prompt."""
    seen = Counter()
    keys = []
    for g in groups:
        prompt = json.dumps(g.prompt, sort_keys=True)
        keys.append((prompt, seen[prompt]))
        seen[prompt] += 1
    return keys


def by_group(table):
    """[[the completions of one group], …]: of a pair two, of a policy --samples."""
    groups = group_by(table, [id(c.group) for c in table])
    return list(groups.values())


def by_key(table):
    """{(prompt, number): the completions of that row, of all systems}"""
    return group_by(table, [c.key for c in table])


def align(systems, table):
    """The completions of the rows that all systems have, row by row. The k-th row of a prompt meets
    the k-th of the other systems."""
    rows = []
    for cell in by_key(table).values():
        if len({c.system for c in cell}) == len(systems):
            rows += cell
    return rows


def ranked_pairs(table):
    """[(better, worse), …]: the pairs of completions that the data itself ranks."""
    pairs = []
    for siblings in by_group(table):
        for i, j in common.pairs_of(siblings[0].view):
            pairs.append((siblings[i], siblings[j]))
    return pairs


def p_better(a, b):
    """p(a ≻ b) of two completions: σ of the difference of their scores, so above 1/2 for the
    higher one."""
    return sigmoid(a.score - b.score)


# --- load -----------------------------------------------------------------------------------------

def load_system(source, gives, args):
    """A file whose rows are of a format that gives one of these → System."""
    usable = [name for name, row in FORMATS.items() if row.gives in gives]
    groups, account = common.read_groups(
        source, usable, args.split, args.columns, args.limit, args.prefer)
    if not groups:
        fail(f"{account}; no rows are left.")
    return System(source, FORMATS[account.format].gives, groups, account)


def load_files(args):
    """The files of --dataset → [System]."""
    gives = GIVES
    if args.policy:
        gives = ("pair", "response") if args.keep_chosen else ("pair", "prompt")
    systems = []
    for source in sources(args):
        system = load_system(source, gives, args)
        rows = f"{source}: rows of format '{system.account.format}'"
        if len(args.dataset) > 1 and system.gives not in ("response", "label"):
            fail(f"{rows} cannot be compared; each --dataset needs prompt and response.")
        if args.confidence > 0.5 and system.gives != "pair":
            fail(f"{rows} have no better completion that --confidence could be about; drop it.")
        for g in system.groups:
            if args.by and args.by not in g.row:
                fail(f"{g.where}: column '{args.by}' is missing, which --by asks for.")
            if system.gives == "label":
                g.row["label"] = bool(g.scores[0])           # however the file writes it
        systems.append(system)
    return systems


@dataclass
class Scorer:
    """A reward model, or (beta is not None) a policy and its reference. Nothing else sees which."""
    name: str
    encoder: common.Encoder
    models: list                    # [reward model], or [policy, reference]
    beta: float | None = None
    packed: bool | None = None      # None: not yet checked

    def measure(self, groups, args, autocast, by_token=False, progress="score"):
        """The reward of every completion of some groups, (N,), or what each token adds to it, (T,):
        float32 on the CPU. No batch changes a value."""
        function = token_logps
        if self.beta is None:
            function = prefix_gains if by_token else common.reward_scores
        if self.packed is None:
            self.packed = all(common.can_pack(model, groups, function) for model in self.models)

        columns = []
        for model in self.models:
            columns.append(common.for_all(
                function, model, groups, args.micro_batch_tokens, self.packed, autocast, progress))
        if self.beta is None:
            return columns[0]
        parts = self.beta * (columns[0] - columns[1])        # (T,)  (1)
        if by_token:
            return parts
        sizes = torch.tensor([len(ids) for g in groups for ids in g.completion_ids])
        owner = torch.arange(len(sizes)).repeat_interleave(sizes)
        return common.sum_by(parts, owner, len(sizes))


def prefix_gains(model, batch):
    """By how much each completion token changes a reward model's score: (T,).

    r(x, y_≤t) − r(x, y_<t). The model is trained at the ends only: its score of half a completion
    is a guess, if often a good one.
    """
    batch = batch.to(next(model.parameters()).device)
    hidden = common.hidden_states(model, batch)
    with torch.autocast(hidden.device.type, enabled=False):
        scores = model.score(hidden.float())[:, 0]           # (R·N,) at every place
    ends = batch.owner.bincount().cumsum(0) - 1              # (K,) each completion's last token
    place = batch.read.roll(-1)                              # (T,) a token predicts the next one …
    place[ends] = batch.last                                 # … and the last one none
    return scores[place] - scores[batch.read]


def beta_of(args):
    """--beta; else that of the training of --implicit, else 0.1."""
    if args.beta is not None:
        return args.beta
    file = Path(args.implicit or "") / "args.json"
    if args.implicit and file.is_file():
        with common.failing(f"{file}: cannot be read"):
            return dict(json.loads(file.read_text(encoding="utf-8"))).get("beta") or 0.1
    return 0.1


def load_scorers(args, device):
    """All scorers, tokenisers first: a wrong directory is found before anything big is loaded."""
    if args.implicit:
        encoder = common.load_encoder(args.implicit, args.chat_template, args.chat, "--implicit")
        policy = common.load_model(args.implicit, encoder, device, "--implicit")
        models = [policy, load_reference(args, encoder, device)]
        scorers = [Scorer(args.implicit, encoder, models, beta_of(args))]
    else:
        if not args.reward_model and not Path("runs/rm/config.json").is_file():
            fail("runs/rm is missing: run train_rm.py first, which makes it, or give "
                 "--reward-model or --implicit.")
        scorers = []
        for folder in args.reward_model or ["runs/rm"]:
            encoder = common.load_encoder(folder, args.chat_template, args.chat, "--reward-model")
            scorers.append(Scorer(folder, encoder, []))
        for scorer in scorers:
            model = common.load_reward_model(scorer.name, scorer.encoder, device)
            scorer.models.append(model)

    for scorer in scorers:
        most = scorer.encoder.max_positions
        if args.max_length > most:
            print(f"--max-length {args.max_length} is lowered to {most}, the positions that "
                  f"{scorer.name} has")
    return scorers


def load_reference(args, encoder, device):
    """--ref-model, for log-probs that are compared with those of a policy with this tokeniser."""
    ref_encoder = common.load_encoder(args.ref_model, flag="--ref-model")
    common.check_same_tokeniser(encoder, ref_encoder, f"--ref-model {args.ref_model}")
    return common.load_model(args.ref_model, encoder, device, "--ref-model")


# --- the policies complete the prompts ------------------------------------------------------------

def complete_prompts(data, scorer, args, device, autocast):
    """--policy: each completes the prompts of the data → [System]."""
    keys = number_rows(data.groups)
    asked = [g for g, (_, number) in zip(data.groups, keys) if number == 0]      # each prompt once
    print(f"{data.name}: {len(data.groups):,} rows, {len(asked):,} prompts: each is completed once")
    systems = []
    for path in args.policy:
        systems.append(generate(path, asked, scorer, args, device, autocast))
    if args.keep_chosen:            # the data's completions are a system too, scored like the rest
        chosen = [replace(g, completions=g.completions[:1], scores=[]) for g in asked]
        systems.append(System("chosen in the data", "response", chosen))
    return systems


def completed(group, samples, encoder):
    """A prompt with its sampled completions: ids for the KL, text for the reward."""
    return replace(
        group, scores=[],
        completions=[encoder.decode(s.ids, group.prompt) for s in samples],
        completion_ids=[s.ids for s in samples],
        ended=[s.ended for s in samples])


def generate(path, asked, scorer, args, device, autocast):
    """The completions of a policy → System, with log-ratios where --ref-model asks for the KL."""
    encoder = common.load_encoder(path, args.chat_template, args.chat, "--policy")
    policy = common.load_model(path, encoder, device, "--policy")
    limit = min(args.max_length, encoder.max_positions)

    # Prompts that fit, each once.
    prompts = []
    for g in asked:
        ids = encoder.prompt(g.prompt, g.where)[0]
        if 0 < len(ids) <= limit - args.max_new_tokens:
            prompts.append(replace(g, prompt_ids=ids))
    print(f"{path}: {len(prompts):,} of {len(asked):,} prompts leave room for --max-new-tokens "
          f"{args.max_new_tokens} within {limit} tokens, and are completed")
    if not prompts:
        fail(f"--policy {path}: no prompt leaves room; the line above says why.")

    if args.num_beams:
        samples = guided(policy, encoder, prompts, scorer, args, autocast)
    else:
        with autocast:
            samples = common.sample(
                policy, [g.prompt_ids for g in prompts], args.samples, args.max_new_tokens,
                encoder.stops, args.temperature or 1.0, args.top_p,
                greedy=args.temperature == 0, seed=args.seed, progress=f"sample {path}")
    truncated = sum(not s.ended for s in samples)
    print(f"{path}: {truncated:,} of {len(samples):,} completions hit --max-new-tokens: scored "
          "without an end")

    groups = []
    for i, g in enumerate(prompts):
        own = samples[i * args.samples:(i + 1) * args.samples]
        groups.append(completed(g, own, encoder))
    system = System(path, "policy", groups)

    if args.ref_model and (args.temperature != 1 or args.top_p != 1 or args.num_beams):
        print("KL(π‖π_ref) is left out: it needs completions sampled from π itself, "
              "--temperature 1, --top-p 1, no beams")
    elif args.ref_model:
        models = [policy, load_reference(args, encoder, device)]
        ratio = Scorer(path, encoder, models, beta=1.0)
        values = ratio.measure(groups, args, autocast, progress="KL")
        for c, value in zip(system.completions, values.tolist()):
            c.log_ratio = value                              # (6)
    return system


def guided(policy, encoder, prompts, scorer, args, autocast):
    """Value-guided decoding → the best Sample of each prompt: a beam search in which the reward of
    the unfinished completions decides, not their log-prob.

    Each beam samples --num-beams continuations of --beam-chunk tokens; of all of them, and of the
    beams that ended, the --num-beams with the highest reward stay. With --implicit this is the
    chunk-level beam search of Zhou et al. 2024 (arXiv 2405.19262). With a reward model it is the
    block-wise controlled decoding of Mudgal et al. 2023 (arXiv 2310.17022), but for the value of a
    prefix: theirs is learnt to predict the reward of the whole completion, here it is the prefix's
    own score, by a model that saw whole completions only.
    """
    beams = [(i, Sample([], [], False)) for i in range(len(prompts))]
    starts = range(0, args.max_new_tokens, args.beam_chunk)
    for start in tqdm(starts, desc="beams", unit="chunk", leave=False, disable=None):
        alive = [(i, beam) for i, beam in beams if not beam.ended]
        if not alive:
            break
        prefixes = [prompts[i].prompt_ids + beam.ids for i, beam in alive]
        tokens = min(args.beam_chunk, args.max_new_tokens - start)
        with autocast:
            more = common.sample(
                policy, prefixes, args.num_beams, tokens, encoder.stops, args.temperature,
                args.top_p, seed=args.seed + start)

        # What ended competes with every continuation; of equal ids one stands.
        pool = {(i, *beam.ids): beam for i, beam in beams if beam.ended}
        for number, s in enumerate(more):
            i, beam = alive[number // args.num_beams]
            longer = Sample(beam.ids + s.ids, beam.logps + s.logps, s.ended)
            pool[i, *longer.ids] = longer

        # The highest rewards stay; where the scorer has no room for the prompt all are alike.
        parts = group_by(pool.values(), [key[0] for key in pool])          # {i: [Sample]}
        groups = [completed(prompts[i], samples, encoder) for i, samples in parts.items()]
        account = Account("beams", "policy", len(groups))
        views = read_as(scorer, groups, account, args.max_length, "truncate")
        if not views:
            fail(f"{scorer.name} has no room for any prompt: {account}.")
        column = scorer.measure(list(views.values()), args, autocast, progress="")
        rewards = iter(column.tolist())
        beams = []                                           # flat: of every prompt the best few
        for g, (i, samples) in zip(groups, parts.items()):
            values = [next(rewards) if id(g) in views else 0.0 for _ in samples]
            order = sorted(range(len(samples)), key=values.__getitem__, reverse=True)
            beams += [(i, samples[k]) for k in order[:args.num_beams]]
    best = dict(reversed(beams))                             # the first beam of each prompt
    return [best[i] for i in range(len(prompts))]


# --- score ----------------------------------------------------------------------------------------

def read_as(scorer, groups, account, max_length, overlong):
    """{id(group): the group as the scorer's tokeniser reads it} of those that are kept. A sampled
    completion that did not end gets no end token."""
    views = [replace(g) for g in groups]
    limit = min(max_length, scorer.encoder.max_positions)
    kept = common.tokenise(views, account, scorer.encoder, limit, overlong)
    kept_ids = set(map(id, kept))

    result = {}
    for g, view in zip(groups, views):
        for k, ended in enumerate(g.ended):
            ids = view.completion_ids[k]
            if view.ended[k] and not ended and len(ids) > 1:
                ids.pop()
                view.ended[k] = False
        if id(view) in kept_ids:
            result[id(g)] = view
    return result


def score_system(system, scorers, args, autocast):
    """The completions of a system that every scorer has room for, with their raw scores."""
    kept = system.completions
    for scorer in scorers:                                   # each counts for itself what it drops
        account = deepcopy(system.account)
        groups = [siblings[0].group for siblings in by_group(kept)]
        views = read_as(scorer, groups, account, args.max_length, args.overlong)
        if scorer is scorers[0] or len(views) < len(groups):
            print(account)
        if not views:
            fail(f"{system.name}: no rows are left; the line above says why.")

        scorer.packed = None                                 # checked anew: groups may be longer
        kept = [c for c in kept if id(c.group) in views]
        values = scorer.measure(list(views.values()), args, autocast)
        for c, value in zip(kept, values.tolist()):
            if not math.isfinite(value):
                fail(f"{c.group.where}: its score is not a finite number; try --dtype float32.")
            view = views[id(c.group)]
            c.view = c.view or view
            c.raw.append(value)
            c.lengths.append(len(view.completion_ids[c.k]))
    return kept


def unit_of(scorer, values, lengths, args):
    """What a scorer's numbers are measured by: their mean, std and curve by length, as train_rm.py
    stored them, else those of these very completions."""
    unit = {
        "reward_mean": mean(values),
        "reward_std": std(values),
        "reward_by_length": common.length_curve(values, lengths)}
    config = vars(scorer.models[0].config)
    unit |= {name: config[name] for name in unit if config.get(name) is not None}
    calibrated = common.calibrate(values, lengths, unit["reward_by_length"], unit["reward_mean"])
    unit["reward_std_calibrated"] = calibrated.std().item() if len(values) > 1 else 0.0
    stored = {name: config[name] for name in unit if config.get(name) is not None}
    if args.calibrate_length or len(args.reward_model) > 1:
        print(f"{scorer.name}: its config gives {', '.join(stored) or 'no mean, std or curve'}; "
              "whatever else is needed is that of these completions")
    return unit | stored


def aggregate(table, others, scorers, args):
    """raw → plain, score and spread of the table, and of others in the units of the table.

    One scorer: its own unit. Several: z-scored, then joined by --aggregate.
    """
    every = table + others
    raw = tensor([c.raw for c in every])                                         # (N, M)
    calibrated = raw.clone()                                                     # (N, M)
    middle = torch.zeros_like(raw[0])                                            # (M,)
    scale = torch.ones_like(raw[0])                                              # (M,)
    scale_calibrated = torch.ones_like(raw[0])                                   # (M,)

    for m, scorer in enumerate(scorers):
        values = raw[:, m]
        lengths = [c.lengths[m] for c in every]
        own = len(table)
        unit = unit_of(scorer, values[:own].tolist(), lengths[:own], args)
        if args.calibrate_length:
            calibrated[:, m] = common.calibrate(
                values, lengths, unit["reward_by_length"], unit["reward_mean"])              # (2)
        if len(scorers) > 1:
            middle[m] = unit["reward_mean"]
            scale[m] = unit["reward_std"] or 1.0
            width = "reward_std_calibrated" if args.calibrate_length else "reward_std"
            scale_calibrated[m] = unit[width] or 1.0

    factors = args.reward_weights or [1.0] * len(scorers)

    def combine(scores):
        if args.aggregate == "min":
            return min(scores)
        average = sum(w * s for w, s in zip(factors, scores)) / sum(factors)
        return average - args.std_coef * std(scores) if args.aggregate == "mean-std" else average

    plain = ((raw - middle) / scale).tolist()
    final = ((calibrated - middle) / scale_calibrated).tolist()
    for c, before, after in zip(every, plain, final):
        c.plain = combine(before)
        c.score = combine(after)
        c.spread = std(before)


def series_of(systems, table):
    """{what the completions are, of which file: their scores}"""
    series = {}
    for c in table:
        name = c.shown_as
        if c.system.gives == "pair":
            name += f" of {Path(c.system.name).stem}"
        series.setdefault(name, []).append(c.score)
    return series


def untrained_series(table, args, device, autocast):
    """What a new head on a base model says of the same completions: before any training, chosen
    and rejected are alike."""
    encoder = common.load_encoder(args.untrained, args.chat_template, args.chat, "--untrained")
    torch.manual_seed(args.seed)
    model = common.load_reward_model(args.untrained, encoder, device, "--untrained", new_head=True)
    if hasattr(model.config, "reward_mean"):
        fail(f"--untrained {args.untrained} is a trained reward model: give its base model.")
    scorer = Scorer(args.untrained, encoder, [model])
    groups = [siblings[0].group for siblings in by_group(table)]
    account = Account(args.untrained, "histogram", len(groups))
    views = read_as(scorer, groups, account, args.max_length, args.overlong)
    if not views:
        fail(f"--untrained {args.untrained} has no room for any of these rows.")
    kept = [c for c in table if id(c.group) in views]
    values = scorer.measure(list(views.values()), args, autocast).tolist()
    return group_by(values, [c.shown_as for c in kept])


# --- report ---------------------------------------------------------------------------------------

def describe_reward(scorers, table, args):
    """What the numbers are, with an example, and whether they are a test of the reward."""
    print(scorers[0].encoder.show(table[0].view))
    what = scorers[0].name
    if args.implicit:
        what = f"{beta_of(args):g} · log π/π_ref of {args.implicit} against {args.ref_model}"
    if len(scorers) > 1:
        what = (f"{args.aggregate} of {len(scorers)} z-scored models; they differ by "
                f"{mean([c.spread for c in table]):.3f} (mean std per completion)")
    print(f"reward: {what}")
    for m, scorer in enumerate(scorers):
        report_unusual(scorer, [c.raw[m] for c in table])

    data = [Path(source).resolve() for source in sources(args)]
    for scorer in scorers:
        file = Path(scorer.name) / "args.json"
        if file.is_file() and not args.policy:
            trained_on = json.loads(file.read_text()).get("dataset")
            if trained_on and Path(trained_on).resolve() in data:
                print(f"note: {scorer.name} was trained on rows of this very data, so this is no "
                      "test of it")


def report_unusual(scorer, values):
    """An alarm: scores far from those of the training completions are an extrapolation."""
    config = scorer.models[0].config
    if scorer.beta is not None or not getattr(config, "reward_std", 0):
        return
    z = (tensor(values) - config.reward_mean) / config.reward_std                # (N,)
    far = (z.abs() > 3).sum().item()
    share = 100 * far / len(z)
    line = (f"{scorer.name}: {share:.1f} % of {len(z):,} scores lie more than 3 standard "
            "deviations from those of its training completions, from "
            f"{z.min():+.1f} to {z.max():+.1f}")
    if share > 5:
        line += ": these are unlike what it was trained on, do not trust it here"
    print(line)


def prompts_of(part):
    """The clusters of the intervals: rows of one prompt belong together."""
    return [c.key[0] for c in part]


def in_brackets(value, interval, digits=3):
    low, high = interval
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def with_interval(values, part, seed, digits=3):
    """The mean of one value for each completion, with its bootstrap interval over prompts."""
    return in_brackets(mean(values), bootstrap(values, prompts_of(part), seed), digits)


def length_trend(values, part, seed):
    """Correlation of one value for each completion with its length, with its interval."""
    lengths = [c.length for c in part]
    r = correlation(values, lengths)
    if math.isnan(r):
        return "none"                                        # one row, or all alike
    return in_brackets(r, bootstrap_correlation(values, lengths, prompts_of(part), seed), 2)


def summary(part, args):
    """Mean score ± standard deviation, and what length has to do with it."""
    scores = [c.score for c in part]
    lengths = [c.length for c in part]
    line = (f"{with_interval(scores, part, args.seed)} ± {std(scores):.3f} over {len(part):,} "
            f"completions of {mean(lengths):.1f} tokens, correlation of score with length "
            f"{length_trend(scores, part, args.seed)}")
    if args.calibrate_length:
        plain = [c.plain for c in part]
        line += (f"; before --calibrate-length {with_interval(plain, part, args.seed)}, "
                 f"correlation with length {length_trend(plain, part, args.seed)}")
    return line


def fraction(values, part):
    """Values of 1, 0 and 1/2, one for each of part's completions, in percent, with Wilson's
    interval: the pairs of a prompt are one cluster."""
    cluster = torch.tensor(common.numbered(prompts_of(part)))
    p = common.proportion(tensor(values), cluster, z=1.96)
    return f"{100 * p.mean:.1f} % [{100 * p.low:.1f}, {100 * p.high:.1f}]"


def accuracy(pairs, seed):
    """pairs: (better, worse) completions. Ties count half."""
    better = [a for a, _ in pairs]
    wins = [win(a.score, b.score) for a, b in pairs]
    margins = [a.score - b.score for a, b in pairs]
    return (f"accuracy {fraction(wins, better)} of {len(wins):,} pairs, {wins.count(0.5)} ties; "
            f"margin {with_interval(margins, better, seed)} ± {std(margins):.3f}, mean σ(margin) "
            f"{mean([p_better(*pair) for pair in pairs]):.3f}")


def report(systems, table, args):
    """Prints what the scores are like → {series: scores} for the histogram: chosen and rejected,
    or several systems on the rows that all of them have."""
    met = align(systems, table)
    if len(systems) > 1:
        keys = by_key(met)
        prompts = {prompt for prompt, _ in keys}
        print(f"{len(keys):,} rows of each are compared, of {len(prompts):,} prompts: where a "
              "prompt comes more than once, its k-th row meets the k-th")
        alone = Counter(c.system.name for c in table) - Counter(c.system.name for c in met)
        if alone:
            print(f"  completions without a partner are left out: {dict(alone)}")
    if not met:
        fail("the systems have no prompt in common.")

    first = by_key([c for c in met if c.system is systems[0]])
    parts = group_by(met, [c.shown_as for c in met])

    scores = {}
    for name, part in parts.items():
        scores[name] = [c.score for c in part]
        print(f"{name}: score {summary(part, args)}")
        if part[0].system is not systems[0]:
            report_wins([(a, b) for a in part for b in first[a.key]], args.seed)
        ratios = [c.log_ratio for c in part]
        if None not in ratios:
            print(f"  KL(π‖π_ref) {with_interval(ratios, part, args.seed)} nats per completion")
    if len(parts) > 1:
        print(f"all: score {summary(met, args)}")

    report_accuracy(ranked_pairs(met), args.seed)
    labelled = len(systems) == 1 and systems[0].gives == "label"
    if args.by or labelled:
        report_by(args.by or "label", met, args.seed)
    if args.samples > 1 and len(systems) == 1:
        report_best_of_n(by_group(met), args.seed)
    return scores


def report_wins(pairs, seed):
    """pairs: (a system's completion, the first system's) of the same row."""
    alike = []
    for a, b in pairs:
        if max(a.length, b.length) <= 1.1 * min(a.length, b.length):
            alike.append((a, b))
    print(f"  wins {win_rate(pairs, seed)} against (1); of like length (within 10 %): "
          f"{win_rate(alike, seed)}")


def win_rate(pairs, seed):
    """How often the first of a pair scores higher. Ties count half."""
    if not pairs:
        return "none"
    wins = [100 * win(a.score, b.score) for a, b in pairs]
    ties = 100 * wins.count(50) / len(wins)
    rate = with_interval(wins, [a for a, _ in pairs], seed, digits=1)
    return f"{rate} % of {len(wins):,}, ties {ties:.1f} %"


def report_accuracy(pairs, seed):
    """How often the better completion scores higher, and what length alone would say."""
    if not pairs:
        return
    print(accuracy(pairs, seed))

    longer = [win(a.length, b.length) for a, b in pairs]
    parts = group_by(pairs, longer)
    if 1 in parts:
        print(f"  where the better is the longer: {accuracy(parts[1], seed)}")
    if 0 in parts:
        print(f"  where the better is the shorter: {accuracy(parts[0], seed)}")
    better = [a for a, _ in pairs]
    print(f"  length alone (the longer is the better): {fraction(longer, better)}")

    if len(pairs[0][0].raw) > 1:
        split = []
        for a, b in pairs:
            signs = {x > y for x, y in zip(a.raw, b.raw)}
            split.append(len(signs) - 1)
        print(f"  the reward models disagree about {fraction(split, better)} of the pairs")


def report_by(column, table, seed):
    """The result for each value of a column."""
    parts = group_by(table, [str(c.group.row[column]) for c in table])
    for value, part in sorted(parts.items()):
        pairs = ranked_pairs(part)
        scores = [c.score for c in part]
        line = f"score {with_interval(scores, part, seed)} ± {std(scores):.3f} of {len(scores)}"
        print(f"  {column} = {value}: {accuracy(pairs, seed) if pairs else line}")


def report_best_of_n(groups, seed):
    """(3) and (4) for n = 1, 2, 4, … samples a prompt; where rows have an `answer`, how often the
    best of n equals it."""
    known = all("answer" in siblings[0].group.row for siblings in groups)
    samples = len(groups[0])
    sizes = {2 ** e for e in range(samples.bit_length())} | {samples}

    first = [siblings[0] for siblings in groups]             # of each prompt, for its cluster
    print("best of n   KL at most   score" + " " * 20 + "equals column 'answer', %" * known)
    for n in sorted(sizes):
        expected = []
        hits = []
        for siblings in groups:
            scores = [c.score for c in siblings]
            answer = str(siblings[0].group.row.get("answer")).strip()
            correct = [c.text.strip() == answer for c in siblings]
            expected.append(best_of_n(scores, n, scores))
            hits.append(100 * best_of_n(scores, n, correct))
        line = f"{n:>9} {best_of_n_kl(n):>12.3f}   {with_interval(expected, first, seed):<25}"
        print((line + with_interval(hits, first, seed, 1) * known).rstrip())


# --- write: data ----------------------------------------------------------------------------------

# Columns that hold prompt, completions and scores in a format's own way; all others are kept.
READ = {name for row in FORMATS.values() for names in row.columns for name in names.split("|")}
WRITTEN = {"score", "score_chosen", "score_rejected", "p_chosen", "spread"}
TAKEN = READ - {"answer", "label"} | WRITTEN
ABOUT = {"margin", "label"}          # what these say is true of the row's own completions only


def row_of(group, said, scores, own=True):
    """A row to write: prompt, completions, the columns of the row that are kept, scores. own:
    whether the completions are those of the row."""
    taken = TAKEN if own else TAKEN | ABOUT
    kept = {name: value for name, value in group.row.items() if name not in taken}
    return {"prompt": group.prompt} | said | kept | scores


def as_said(c):
    """A completion in the form of its prompt: text, or one assistant message."""
    if isinstance(c.group.prompt, str):
        return c.text
    return [{"role": "assistant", "content": c.text}]


def pair_row(chosen, rejected, own):
    said = {"chosen": as_said(chosen), "rejected": as_said(rejected)}
    scores = {"score_chosen": chosen.score, "score_rejected": rejected.score}
    return row_of(rejected.group, said, scores | {"p_chosen": p_better(chosen, rejected)}, own)


def list_row(siblings):
    group = siblings[0].group
    scores = {"scores": [c.score for c in siblings]}
    if "ranks" in group.row:                                 # a reader would take them for the same
        scores["ranks_before"] = group.row["ranks"]
    else:
        scores["scores_before"] = group.scores
    return row_of(group, {"completions": [as_said(c) for c in siblings]}, scores)


def single_row(c, several_systems):
    name = "completion" if c.system.gives == "label" else "response"
    scores = {"score": c.score}
    if several_systems:
        scores["system"] = c.system.name
    if len(c.raw) > 1:
        scores["spread"] = c.spread
    if c.ended is not None:
        scores["cut"] = not c.ended
    return row_of(c.group, {name: as_said(c)}, scores, own=c.ended is None)


def output_rows(table, several_systems, confidence):
    """Pairs stay pairs, rankings rankings, single completions single ones, with their scores."""
    rows = []
    for siblings in by_group(table):
        gives = siblings[0].system.gives
        if gives not in ("pair", "list"):
            rows += [single_row(c, several_systems) for c in siblings]
            continue
        row = pair_row(*siblings, own=True) if gives == "pair" else list_row(siblings)
        if gives == "pair" and max(row["p_chosen"], 1 - row["p_chosen"]) < confidence:
            continue
        rows.append(row)
        if len(siblings[0].raw) > 1:
            rows[-1]["spread"] = [round(c.spread, 6) for c in siblings]
    return rows


def write_jsonl(file, rows):
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    common.write_beside(file, "".join(lines))
    print(f"{file}: {len(lines):,} rows")


def accept(groups, args):
    """--select rso: the completions of each prompt that rejection sampling keeps (5)."""
    generator = torch.Generator().manual_seed(args.seed)
    kept = []
    for siblings in groups:
        scores = [c.score for c in siblings]
        indices = rejection_sample(scores, beta_of(args), generator, args.rso_keep)
        kept.append([siblings[i] for i in indices])
    samples = sum(map(len, groups))
    alone = sum(len(siblings) == 1 for siblings in kept)
    share = 100 * sum(map(len, kept)) / samples
    print(f"rejection sampling at β {beta_of(args):g}: {share:.1f} % of {samples:,} samples "
          f"accepted, {alone} of {len(kept)} prompts keep the best one only")
    return kept


def trainable(c):
    """Not empty, nor truncated at --max-new-tokens: training would put an end token behind it."""
    return bool(c.text.strip()) and c.ended is not False


def by_score(c):
    return c.score


def write_selected(groups, args):
    """--select: the completions of each prompt that were kept, or the best of them."""
    rows = []
    empty = 0
    for siblings in groups:
        selected = list(filter(trainable, siblings))
        empty += not selected
        if args.select == "best":
            selected = sorted(selected, key=by_score)[-1:]
        for c in selected:
            rows.append(row_of(c.group, {"response": as_said(c)}, {"score": c.score}, own=False))
    write_jsonl(args.output, rows)
    if empty:
        print(f"  {empty} prompts left out: all their completions were truncated or empty")


def write_pairs(groups, given, args):
    """--pairs: best against worst of each prompt. given: {key: the data's own chosen completions},
    of --keep-chosen: better whatever the scores say, so without a p_chosen."""
    rows = []
    for siblings in groups:
        order = sorted(filter(trainable, siblings), key=by_score)
        best = given.get(siblings[0].key, []) if args.keep_chosen else order
        if order and best and best[-1].text.strip() != order[0].text.strip():
            rows.append(pair_row(best[-1], order[0], own=False))
            if args.keep_chosen:
                del rows[-1]["p_chosen"]

    if not rows:
        fail("--pairs: no row has two different completions that ended (a row of a response file "
             "holds one; --policy with --samples 2 or more makes several).")
    write_jsonl(args.pairs, rows)
    print(f"  {len(groups) - len(rows)} prompts left out: their completions were equal, empty or "
          "truncated")


# --- write: pages and figures ---------------------------------------------------------------------

STYLE = """:root{color-scheme:light dark;--fg:#1a1a1a;--bg:#fff;--soft:#666;--line:#ddd}
@media(prefers-color-scheme:dark){:root{--fg:#eee;--bg:#161616;--soft:#aaa;--line:#3a3a3a}}
body{font:16px/1.9 system-ui,sans-serif;color:var(--fg);background:var(--bg)}
small,.p{color:var(--soft)}
body{max-width:60rem;margin:2rem auto;padding:0 1rem}
section{border-top:1px solid var(--line);padding:.7rem 0}
.p,.a{white-space:pre-wrap;overflow-wrap:anywhere}.a span:hover{outline:2px solid currentColor}
.a span{background:rgb(var(--c)/var(--o));border-radius:3px;padding:.15em .05em}
.m{--c:225 45 35}.u{--c:30 120 235}"""


def token_texts(encoder, ids, prompt):
    """The text of every token; a few before it are decoded too, for spaces and broken characters
    depend on them."""
    texts = []
    anchor = encoder.anchor(prompt)
    for t in range(len(ids)):
        before = anchor + ids[max(0, t - 4):t]
        text = encoder.text(before + ids[t:t + 1])
        texts.append(text[len(encoder.text(before)):] or "·")
    return texts


def span(text, value, scale):
    """A token: red lowers the reward, blue raises it, as strongly as its value."""
    colour = "m" if value < 0 else "u"
    strength = 0.7 * min(1, abs(value) / scale)
    shown = html.escape(text).replace("\n", "↵\n")
    return (f'<span class="{colour}" style="--o:{strength:.2f}" '
            f'title="{html.escape(repr(text))} {value:+.4f}">{shown}</span>')


def tokens_page(completions, title):
    """[(prompt, label, score, [token text], [value]), …] → an HTML page that stands alone."""
    sizes = sorted(abs(v) for *_, values in completions for v in values)
    # A few extremes must not make the rest pale.
    scale = sizes[min(len(sizes) - 1, int(0.98 * len(sizes)))] or 1.0
    title = html.escape(title)

    parts = []
    last_prompt = None
    for prompt, label, score, texts, values in completions:
        if prompt != last_prompt:
            parts.append(f'<section><div class="p">{html.escape(prompt)}</div></section>')
        last_prompt = prompt
        spans = "".join(span(text, value, scale) for text, value in zip(texts, values))
        label = f"<small>{html.escape(label)} {score:+.3f}</small>"
        parts.append(f'<div class="a">{label} {spans}</div>')

    return ('<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f'<title>{title}</title><style>{STYLE}</style><h1 style="font-size:1.2rem">{title}</h1>'
            f'<p class="a"><span class="m" style="--o:.7">red lowers the reward</span> by '
            f'{scale:.3g} or more, <span class="u" style="--o:.7">blue raises it</span>. Point at '
            f'a token for its value.</p>{"".join(parts)}</html>\n')


def write_tokens(file, table, scorer, args, autocast):
    """table: prompt by prompt. As many groups as fit on a page, at least one."""
    picked = []
    for siblings in by_group(table):
        if picked and len(picked) + len(siblings) > PAGE:
            break
        picked += siblings

    views = [siblings[0].view for siblings in by_group(picked)]
    values = scorer.measure(views, args, autocast, by_token=True)
    shown = []
    for c, parts in zip(picked, values.split([c.length for c in picked])):
        prompt = c.group.prompt
        if isinstance(prompt, list):
            prompt = "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        texts = token_texts(scorer.encoder, c.ids, c.group.prompt)
        shown.append((prompt, f"{c.shown_as} {c.k + 1}", c.raw[0], texts, parts.tolist()))

    what = "change of the prefix score" if scorer.beta is None else "β log π/π_ref"
    page = tokens_page(shown, f"Each token's part in the reward: {what} of {scorer.name}")
    common.write_beside(file, page)
    print(f"{file}: {len(shown)} completions, tokens coloured by {what} of {scorer.name}")


def plot_scores(file, panels):
    """A histogram for each panel: title → {name: scores}. Counts become densities where the files
    are of different sizes."""
    figure, axes = pyplot().subplots(
        1, len(panels), figsize=(7 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (title, series) in zip(axes[0], panels.items()):
        labels = [f"{n}: {mean(v):.2f} ± {std(v):.2f}" for n, v in series.items()]
        density = len(set(map(len, series.values()))) > 1
        axis.hist(
            list(series.values()), bins=40, histtype="stepfilled", alpha=0.5, label=labels,
            density=density)
        axis.set(xlabel="reward", ylabel="density" if density else "completions", title=title)
        axis.legend()
    with common.renamed(Path(file).resolve()) as writing:
        figure.savefig(writing, dpi=150, format=Path(file).suffix[1:])
    print(f"{file}: histogram")


def pyplot():
    """matplotlib without a display; imported here, because only --plot needs it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


# --- curves of run directories --------------------------------------------------------------------

def read_curves(run):
    """metrics.jsonl of a run directory → {metric: [(step, value), …]}."""
    file = Path(run) / "metrics.jsonl"
    if not file.is_file():
        fail(f"--dataset {run}: there is no metrics.jsonl in it; give run directories only, or "
             "files only.")
    curves = {}
    with common.failing(f"{file}: a line is not a JSON object with a step"):
        for line in common.read_lines(file):
            step = line.pop("step")
            for name, value in line.items():
                if isinstance(value, (int, float)):
                    curves.setdefault(name, []).append((step, value))
    return curves


def compare_runs(args):
    """First and last value of every metric of run directories in the terminal, curves in --plot."""
    if args.tensorboard:
        for run in args.dataset:
            write_tensorboard(run, read_curves(run))
    if args.policy or args.output or args.pairs or args.tokens:
        fail("--dataset with run directories goes with --plot, not with --policy, --output, "
             "--pairs or --tokens.")
    runs = {run: read_curves(run) for run in args.dataset}
    changing = set()                                         # what never changes is no curve
    for curves in runs.values():
        for name, points in curves.items():
            if len(set(dict(points).values())) > 1 and not name.endswith("_se"):
                changing.add(name)

    if not changing:
        fail(f"--dataset {' '.join(runs)}: nothing in metrics.jsonl has changed yet.")
    for name in sorted(changing):
        ends = []
        for curves in runs.values():
            points = curves.get(name)
            ends.append(f"{points[0][1]:.4g} → {points[-1][1]:.4g}" if points else "–")
        print(f"{name:<28}" + "   ".join(ends))
    if args.plot:
        plot_curves(args.plot, runs, sorted(changing))


def write_tensorboard(run, curves):
    with common.failing("--tensorboard: it needs pip install tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    with SummaryWriter(Path(run) / "tensorboard") as writer:
        for name, points in curves.items():
            for step, value in points:
                writer.add_scalar(name, value, step)


def plot_curves(file, runs, names):
    height = math.ceil(len(names) / 3)
    figure, axes = pyplot().subplots(
        height, 3, figsize=(13, 2.6 * height), squeeze=False, layout="constrained")

    for axis in axes.flat[len(names):]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names):
        axis.set_title(name, fontsize=9)
        for run, curves in runs.items():
            points = curves.get(name, [(math.nan, math.nan)])
            axis.plot(*zip(*points), marker="o" if len(points) < 5 else None, label=run)

    axes.flat[0].legend(fontsize=7)
    with common.renamed(Path(file).resolve()) as writing:
        figure.savefig(writing, dpi=110, format=Path(file).suffix[1:])
    print(f"{file}: curves of {len(names)} metrics")


# --- main -----------------------------------------------------------------------------------------

def main(argv=None):
    args = parse_args(argv)
    if any(Path(source).is_dir() for source in sources(args)):
        compare_runs(args)
        return

    # --- load
    device = common.join_processes(args.device)
    autocast = common.pick_autocast(args.dtype, device)
    systems = load_files(args)
    scorers = load_scorers(args, device)

    # --- complete the prompts
    if args.policy:
        systems = complete_prompts(systems[0], scorers[0], args, device, autocast)

    if len(systems) > 1:
        for number, system in enumerate(systems, 1):
            system.alias += f" ({number})"

    # --- score
    beside = [load_system(source, GIVES, args) for source in args.beside]
    table = []
    for system in systems + beside:
        table += score_system(system, scorers, args, autocast)
    others = [c for c in table if c.system in beside]
    table = [c for c in table if c.system not in beside]
    aggregate(table, others, scorers, args)

    # --- report
    describe_reward(scorers, table, args)
    series = report(systems, table, args)
    series |= series_of(beside, others)
    panels = {scorers[0].name: series}
    if args.untrained:
        panels[f"{args.untrained}, a new head"] = untrained_series(table, args, device, autocast)
    for title, shown in panels.items():
        if len(panels) > 1:
            print(title)
        print(histogram(shown))

    # --- write
    if args.plot and common.rank() == 0:
        plot_scores(args.plot, panels)
    if args.tokens:
        write_tokens(args.tokens, align(systems, table), scorers[0], args, autocast)
    if args.output and not args.select:
        rows = output_rows(table, len(systems) > 1, args.confidence)
        write_jsonl(args.output, rows)
        if args.confidence > 0.5:
            print(f"  {len(by_group(table)) - len(rows)} pairs left out: neither completion is the "
                  f"better one with a probability of {args.confidence:g}")

    groups = by_group([c for c in table if c.system is systems[0]])
    if args.select == "rso":
        groups = accept(groups, args)
    if args.select:
        write_selected(groups, args)
    if args.pairs:
        given = by_key([c for c in table if c.system is systems[-1]])
        write_pairs(groups, given, args)


if __name__ == "__main__":
    common.run(main)
