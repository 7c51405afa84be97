"""Everything that is done with a reward: score, compare, select, make data, and look.

    python score.py                 # the toy's pairs with runs/rm, which saw most of them: no test
    python score.py --policy base tuned --dataset prompts.jsonl --reward runs/rm --ref-model base
    python score.py --policy base tuned --chat --prompt "Why is the sky blue?"     # no reward

A reward is a reward model, a function (file.py:function) or the implicit reward of an aligned
policy (--implicit). Without --policy the completions are those of --dataset; with it each policy
completes the prompts first. ± is one standard error over prompts, std that of the scores.

Differs from the papers in: rejection sampling makes one pass over the samples; length is taken out
by the mean scores of bins, where Huang et al. 2024 fit a locally weighted regression; --num-beams
takes a prefix's reward, as if it ended there, for its value, which Mudgal et al. 2023 learn.
"""
# --- derivation -----------------------------------------------------------------------------------
#
# Notation as in train_dpo.py: x prompt, y completion, r(x, y) its reward, σ(z) = 1 / (1 + e^−z).
#
# 1. A policy π, aligned from π_ref, has a reward inside it (Rafailov et al. 2023, arXiv 2305.18290,
#    eq. 5, up to a constant of the prompt; by tokens: Rafailov et al. 2024, arXiv 2404.12358):
#
#        r̂(x, y) = β log π(y|x)/π_ref(y|x) = Σ_t β log π(y_t|x, y_<t)/π_ref(y_t|x, y_<t)       (1)
#
#    As with a reward model only differences mean something: p(y ≻ y') = σ(r − r'). Several rewards
#    have no common unit: each is z-scored, by the mean and std that train_rm.py stored, then the
#    mean or the minimum is taken (Coste et al. 2023, arXiv 2310.02743, eq. 3–4). That rewards agree
#    is no proof that they are right: models of the same data share its blind spots.
#
# 2. Most rewards rise with length. --calibrate-length subtracts what length alone predicts (Huang
#    et al. 2024, arXiv 2409.17407, by regression; here the mean of a bin of like lengths):
#
#        r*(x, y) = r(x, y) − E[ r | |y| ] + E[ r ]                                            (2)
#
# 3. The best of n, of N samples r_(1) ≤ … ≤ r_(N): the mean of the maximum over all subsets of size
#    n, which has no bias, and how far it is from the policy at most (Stiennon et al. 2020, arXiv
#    2009.01325, app. G.3; an upper bound: Beirami et al. 2024, arXiv 2401.01879):
#
#        best(n) = Σ_i r_(i) C(i − 1, n − 1) / C(N, n)                                         (3)
#        KL( best of n ‖ π ) ≤ log n − (n − 1)/n                                               (4)
#
# 4. Rejection sampling keeps y ~ π_ref with probability (Liu et al. 2023, arXiv 2309.06657)
#
#        exp( ( r(x, y) − max_y' r(x, y') ) / β )                                              (5)
#
#    If the maximum is over all y', those kept follow π_ref(y|x) e^{r(x,y)/β} / Z(x), the optimum
#    that DPO aims at. As in the paper it is that of the prompt's N samples: the best is always
#    kept, and with few samples the tilt is weaker, as a high reward is part of a high maximum.
#
# 5. KL of a policy from its own samples, per completion, up to where one was cut:
#
#        KL( π ‖ π_ref ) = E_x E_{y~π} Σ_t log π(y_t|x, y_<t)/π_ref(y_t|x, y_<t)               (6)

# --- imports --------------------------------------------------------------------------------------
import argparse
import asyncio
import copy
import functools
import html
import importlib.util
import inspect
import json
import math
import sys
import traceback
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise, permutations
from operator import attrgetter
from pathlib import Path
from statistics import fmean as mean
from typing import Callable

import torch

import common
from common import FORMATS, Group, Row, Sample, between, fail, for_all, token_logps
from train_rm import calibrate, load_reward_model, note_statistics, reward_scores

TOY = Path(__file__).parent / "tests" / "toy"
PAGE = 50                       # prompts on a --tokens page
TIE = 1e-4                      # the same completion in another batch differs by less


# --- arguments ------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False,
        usage="%(prog)s [--flag value …]  (--help lists the flags)",
        formatter_class=common.HelpFormatter)
    count = between(1, 1e12, int)
    natural = between(0, 1e12, int)
    g = p.add_argument_group("data")
    g.add_argument("--dataset", nargs="+", default=[], help="rows of any format; several files of responses: systems to compare; run directories: their curves; default: the toy's")
    g.add_argument("--dataset-config", help="configuration of a hub dataset")
    g.add_argument("--split", default="train", help="split of a hub dataset")
    g.add_argument("--columns", nargs="+", default=[], metavar="NEW=OLD", help="rename: prompt=question chosen=best")
    g.add_argument("--prefer", choices=["better", "safer"], default="better", help="PKU-SafeRLHF: which label")
    g.add_argument("--limit", type=natural, default=0, help="only the first N rows (0 = all)")
    g.add_argument("--chat", action="store_true", help="plain prompts become user turns of the chat template, transcripts their turns")
    g.add_argument("--chat-template", metavar="FILE", help="Jinja template instead of the tokeniser's own, for --policy and --implicit")
    g.add_argument("--chat-template-kwargs", type=json.loads, default={}, metavar="JSON", help='for the template: \'{"enable_thinking": false}\'')
    g.add_argument("--max-length", type=count, default=1024, help="tokens of prompt + completion")
    g.add_argument("--overlong", choices=["drop", "truncate"], default="drop", help="groups over --max-length")
    g = p.add_argument_group("reward")
    g.add_argument("--reward", "--reward-model", nargs="+", default=[], metavar="SPEC", help="file.py:function, or the directory or hub id of a reward model; one or several; default: runs/rm, which train_rm.py makes")
    g.add_argument("--aggregate", choices=["mean", "min"], default="mean", help="of several rewards, each z-scored")
    g.add_argument("--implicit", metavar="POLICY", help="score by the implicit reward of this policy against --ref-model (1)")
    g.add_argument("--ref-model", help="reference policy: of --implicit, and of KL(π‖π_ref) with --policy (not for beams nor another --temperature than 1)")
    g.add_argument("--beta", type=between(1e-6, 1e6), help="scale of the implicit reward (1), temperature of --select rso (5); default: with --implicit that in the policy's args.json, else 0.1")
    g.add_argument("--calibrate-length", action="store_true", help="subtract what length alone predicts from every score (2)")
    g = p.add_argument_group("generate")
    g.add_argument("--policy", nargs="+", default=[], metavar="DIR", help="these complete the prompts of --dataset; several: systems to compare")
    g.add_argument("--prompt", nargs="+", default=[], metavar="TEXT", help="complete these, not --dataset, and show the answers in full")
    g.add_argument("--samples", type=count, default=1, help="completions of each policy for each prompt")
    g.add_argument("--max-new-tokens", type=count, default=128, help="longest sampled completion")
    g.add_argument("--temperature", type=between(0, 1e6), default=1.0, help="of sampling (0 = greedy)")
    g.add_argument("--num-beams", type=natural, default=0, help="value-guided decoding: beams kept by the reward of their prefixes (0 = off)")
    g.add_argument("--beam-chunk", type=count, default=4, help="tokens between two looks of --num-beams at the reward")
    g = p.add_argument_group("write and look")
    g.add_argument("--output", metavar="F.jsonl", help="every row with its score; with --select the selected completions")
    g.add_argument("--pairs", metavar="F.jsonl", help="best against worst completion of a prompt (--select rso: of the kept), with scores and p_chosen")
    g.add_argument("--keep-chosen", action="store_true", help="--pairs: chosen stays that of --dataset, rejected is the worst sample")
    g.add_argument("--select", choices=["best", "rso"], help="--output: the best of --samples, or rejection sampling (5)")
    g.add_argument("--confidence", type=between(0.5, 1), default=0.5, help="--output: only pairs whose better completion is better with this probability or more")
    g.add_argument("--beside", nargs="+", default=[], metavar="FILE", help="rows whose scores stand beside in the histogram and --plot: the training data beside a test")
    g.add_argument("--untrained", nargs="+", default=[], metavar="DIR", help="a base model: the histogram and --plot also show what a new, random head on it says")
    g.add_argument("--plot", metavar="F.svg", help="histogram of the scores, or curves of run directories: .png, .pdf or .svg (needs matplotlib)")
    g.add_argument("--tokens", metavar="F.html", help=f"page of up to {PAGE} prompts, tokens coloured by their part in the reward")
    g = p.add_argument_group("run")
    g.add_argument("--micro-batch-tokens", type=count, default=8192, help="tokens per forward: memory, not the result")
    g.add_argument("--seed", type=natural, default=0, help="of everything that is random")
    g.add_argument("--device", default="auto", help="auto = cuda where there is one, else cpu")
    g.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="to compute in; weights: float32")
    args = p.parse_args(argv)

    # What cannot work is refused before anything is loaded.
    several = len(args.policy) > 1 or len(args.dataset) > 1
    alone = args.pairs or args.select
    many = args.samples > 1
    sampling = many or args.num_beams or args.keep_chosen or args.prompt
    figures = importlib.util.find_spec("matplotlib") and (".png", ".pdf", ".svg")
    refused = {
        "--implicit goes with --ref-model and without --reward":
        args.implicit and (args.reward or not args.ref_model),
        "--samples, --num-beams, --keep-chosen, --prompt: with --policy; --prompt: no --dataset":
        sampling and not args.policy or args.prompt and args.dataset,
        "--pairs, --select: one --policy or one --dataset; several --policy: one --dataset":
        several and (alone or args.policy and args.dataset[1:]),
        "--confidence chooses pairs of --dataset for --output, without --policy":
        args.confidence > 0.5 and (args.policy or not args.output),
        "--select chooses for --output from --samples, two or more":
        args.select and not (many and args.output),
        "--pairs needs two completions: --samples 2 or --keep-chosen; --num-beams makes one":
        many and args.num_beams or args.pairs and args.policy and not (many or args.keep_chosen),
        "--plot needs matplotlib (pip install it) and a name in .png, .pdf or .svg":
        args.plot and not (figures and args.plot.endswith(figures))}
    for message, wrong in refused.items():
        if wrong:
            p.error(message)

    for file in (args.output, args.pairs, args.tokens, args.plot):
        if file and (not Path(file).parent.is_dir() or file in args.dataset):
            p.error(f"{file}: its folder is missing, or it is the --dataset")
    if not args.dataset and not args.prompt:
        args.dataset = [f"{TOY}/prompts.jsonl" if args.policy else f"{TOY}/pairs.jsonl"]
    return args


# --- rewards --------------------------------------------------------------------------------------
# Used here and by train_grpo.py: whatever gives a number to a completion.

class RewardError(Exception):
    """A reward that cannot be used, in one sentence."""


@dataclass
class Reward:
    """A function of the user's, or a reward model with a tokeniser of its own."""
    name: str
    function: Callable | None = None
    encoder: common.Encoder | None = None
    model: torch.nn.Module | None = None
    scores: Callable = reward_scores                 # (model, batch) → (K,), of completions
    parts: Callable | None = None                    # (model, batch) → (T,), of tokens
    packed: bool | None = None                       # unknown before the first completions

    def read(self, groups, max_length=math.inf, overlong="drop", dropped=None):
        """Groups as its tokeniser reads them, those that fit: {id(group): view}."""
        if self.function:
            return {id(g): g for g in groups}
        views = {id(g): replace(g) for g in groups}
        limit = min(max_length, self.encoder.max_positions)
        kept = common.tokenise(list(views.values()), self.encoder, limit, overlong, dropped)
        fits = set(map(id, kept))
        return {key: view for key, view in views.items() if id(view) in fits}

    def measure(self, views, args, autocast, what=""):
        """[the scores of the completions of each view], as the model or the function gives them;
        NaN for none. Collective."""
        if self.function:  # one process asks: it may be slow, or random
            answer = common.gather(ask(self, views) if common.rank() == 0 else None)[0]
        else:
            if self.packed is None:
                check = reward_scores if hasattr(self.model, "score") else token_logps
                self.packed = common.can_pack(self.model, views, check)
            answer = for_all(self.scores, self.model, views, args, self.packed, autocast, what)
            if not all(math.isfinite(score) for scores in answer for score in scores):
                answer = f"{self.name}: a score is not a finite number; try --dtype float32."
        if isinstance(answer, str):
            raise RewardError(answer)
        return answer


def said(group, k):
    """Completion k in the form of its prompt: text, or one assistant message."""
    if isinstance(group.prompt, str):
        return group.completions[k]
    return [{"role": "assistant", "content": group.completions[k]}]


def ask(reward, groups):
    """What a function says of some groups, or a sentence on what is wrong with it. It is called as
    in trl, f(prompts, completions, completion_ids, **columns of the rows) → a number or None (NaN)
    for each completion, and may be `async`: completions of chats are [{"role": "assistant",
    "content": …}], plain text keeps its leading space. It gets copies."""
    asked = [(g, k) for g in groups for k in range(len(g.completions))]
    given = {"prompts": [g.prompt for g, _ in asked]}
    given["completions"] = [said(g, k) for g, k in asked]
    given["completion_ids"] = [g.completion_ids[k] if g.completion_ids else [] for g, k in asked]
    for name in dict.fromkeys(name for g in groups for name in g.row if name != "prompt"):
        given.setdefault(name, [dict.get(g.row, name) for g, _ in asked])

    try:
        values = reward.function(**copy.deepcopy(given))
        if inspect.isawaitable(values):
            values = asyncio.run(values)
        values = values.tolist() if hasattr(values, "tolist") else list(values)
        numbers = [math.nan if value is None else float(value) for value in values]
    except (Exception, SystemExit) as error:                 # sys.exit(0) would end the run as done
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return (f"reward {reward.name}: {type(error).__name__}: {error} (line {frame.lineno} of "
                f"{frame.filename}). It is called with {', '.join(given)}, without trainer_state "
                "and what else trl's trainer has, and returns a number or None for each.")
    if len(values) != len(asked):
        return f"reward {reward.name}: {len(values)} values for {len(asked)} completions."
    for value, number, (g, k) in zip(values, numbers, asked):
        if isinstance(value, str) or math.isinf(number):
            return (f"reward {reward.name}: {value!r:.60} for {g.completions[k][:60]!r} is neither "
                    "a finite number nor None.")
    rest = iter(numbers)
    return [list(islice(rest, len(g.completions))) for g in groups]


def load_reward(spec, args, device, new_head=False):
    """file.py:function, or the directory or hub id of a reward model → Reward."""
    file, _, name = spec.partition(":")
    if file.endswith(".py"):
        common.check_path(f"./{file}" if not Path(file).is_absolute() else file)
        with common.failing(f"{spec}: {file} cannot be imported"):
            function = getattr(load_module(file), name, None)
        if not callable(function):
            fail(f"{spec}: {file} has no function '{name}': give file.py:function.")
        return Reward(name, function)
    encoder = common.load_encoder(spec, args, to_last_token=True)
    model = load_reward_model(spec, encoder, device, new_head)
    return Reward(Path(spec).name, encoder=encoder, model=model, parts=prefix_gains)


@functools.cache                                             # a file with two rewards is read once
def load_module(file):
    """A file as python runs it: known by name, its folder importable."""
    spec = importlib.util.spec_from_file_location(f"reward {file}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.append(str(Path(file).parent))
    spec.loader.exec_module(module)
    return module


def prefix_gains(model, batch):
    """r(x, y_≤t) − r(x, y_<t) of every completion token: (T,). A reward model is trained at the
    ends only: its score of half a completion is a guess, if often a good one."""
    hidden = common.hidden_states(model, batch)
    with torch.autocast(hidden.device.type, enabled=False):
        scores = model.score(hidden.float())[:, 0]           # (R·N,) at every place
    ends = batch.owner.bincount().cumsum(0) - 1              # (K,) each completion's last token
    place = batch.read.roll(-1)                              # (T,) a token predicts the next one …
    place[ends] = batch.last                                 # … and the last one none
    return scores[place] - scores[batch.read]


def implicit_reward(name, encoder, policy, reference, beta):
    """(1) of a policy, as a Reward."""
    def parts(policy, batch):
        return beta * (token_logps(policy, batch) - token_logps(reference, batch))       # (T,)

    def scores(policy, batch):
        return common.sum_by(parts(policy, batch), batch.owner, len(batch.last))         # (K,)

    return Reward(name, encoder=encoder, model=policy, scores=scores, parts=parts)


def load_rewards(args, device):
    """--reward, --implicit or runs/rm → [Reward]; none where nothing asks for one."""
    trained = Path(args.implicit or "") / "args.json"        # of the training of --implicit
    if args.implicit and args.beta is None and trained.is_file():
        args.beta = json.loads(trained.read_text()).get("beta")
    args.beta = args.beta or 0.1
    if args.implicit:
        encoder = common.load_encoder(args.implicit, args, args.chat_template)
        policy = common.load_model(args.implicit, encoder, device)
        reference = common.load_reference(args, encoder, device)
        name = f"{args.beta:g} · log π/π_ref of {args.implicit} against {args.ref_model}"
        return [implicit_reward(name, encoder, policy, reference, args.beta)]

    default = Path("runs/rm/config.json").is_file() and not args.prompt
    specs = args.reward or ["runs/rm"] * default
    needed = args.select or args.num_beams or args.plot or args.pairs and not args.keep_chosen
    if not specs and (needed or args.tokens or not args.policy):
        fail("no reward: there is no runs/rm, which train_rm.py makes; give --reward.")
    return [load_reward(spec, args, device) for spec in specs]


# --- the table ------------------------------------------------------------------------------------

@dataclass(eq=False)
class Completion:
    """One completion: a row of the table that everything below works on."""
    system: str                     # the file or the policy that it is from
    gives: str                      # of a file: as in common.FORMATS; else "policy"
    group: Group                    # its prompt, its row, and all completions of that row
    k: int                          # which of these it is
    name: str                       # in the report: its system, of a pair chosen or rejected
    text: str
    cut: bool | None                # at --max-new-tokens, so it did not end; None: not known
    prompt: str                     # for people, and the unit of all errors
    read: list = field(default_factory=list)         # (M,) the tokens that each reward reads
    raw: list = field(default_factory=list)          # (M,) what each of them gives
    score: float = math.nan         # one number out of `raw`


def tensor(xs):
    return torch.as_tensor(xs, dtype=torch.float64)


def group_by(items, labels):
    """{label: [items with it]}, in order of appearance."""
    groups = {}
    for item, label in zip(items, labels):
        groups.setdefault(label, []).append(item)
    return groups


def by_group(table):
    """[[the completions of one group], …]: of a pair two, of a policy --samples."""
    return list(group_by(table, [id(c.group) for c in table]).values())


def table_of(system, gives, groups):
    """Groups → [Completion]"""
    table = []
    for g in groups:
        turns = [g.prompt]
        if not isinstance(g.prompt, str):
            turns = [f"{turn['role']}: {turn['content']}" for turn in g.prompt]
        prompt = "\n".join(filter(None, [dict.get(g.row, "system"), *turns]))
        for k, text in enumerate(g.completions):
            name = ("chosen", "rejected")[k] if gives == "pair" else system
            cut = not g.ended[k] if g.ended else None
            table.append(Completion(system, gives, g, k, name, text, cut, prompt))
    return table


def load_rows(source, usable, args):
    """A file whose rows are of a format that gives one of `usable` → (which, groups)."""
    formats = [name for name, row in FORMATS.items() if row.gives in usable]
    groups, name, dropped = common.read_groups(source, args.split, formats, args)
    for g in groups:
        if g.p_chosen is not None and common.number(g.row, "p_chosen") < 0.5:
            g.completions.reverse()                          # back to the order of the data
        later = set(g.row) if ".py:" in str(args.reward) else {"system", "tools"}
        g.row.columns_read |= later
    common.account(source, name, groups, dropped)
    return FORMATS[name].gives, groups


# --- the policies complete the prompts ------------------------------------------------------------

def completed(group, samples, encoder):
    """A prompt with its sampled completions: ids for the KL, text for the reward."""
    return replace(
        group, completions=[encoder.decode(s.ids, group.prompt) for s in samples],
        completion_ids=[s.ids for s in samples], ended=[s.ended for s in samples])


def complete(path, encoder, given, rewards, args, device, autocast):
    """A policy's completions of the prompts of given groups → table; says the KL to --ref-model."""
    policy = common.load_model(path, encoder, device)
    reference = common.load_reference(args, encoder, device) if args.ref_model else None
    bare = [replace(g, completions=[], scores=[]) for g in given]
    dropped = Counter()
    limit = min(args.max_length, encoder.max_positions)
    asked = common.tokenise(bare, encoder, limit, "drop", dropped, args.max_new_tokens)
    if dropped:
        common.account(f"prompts for {path}", "prompt", asked, dropped)
    common.show_example(encoder, asked[0])
    asked = list({tuple(g.prompt_ids): g for g in asked}.values())               # each once

    if args.num_beams:
        samples = guided(policy, encoder, asked, rewards[0], args, autocast)
    else:
        prompt_ids = [g.prompt_ids for g in asked]
        with autocast:
            samples = common.sample(
                policy, prompt_ids, args.samples, args.max_new_tokens, encoder.stops,
                args.temperature, args.seed, what=f"sample {path}")

    groups = [completed(g, samples[i * args.samples:(i + 1) * args.samples], encoder)
              for i, g in enumerate(asked)]
    table = table_of(path, "policy", groups)
    cut = sum(c.cut for c in table)
    print(f"{path}: {len(asked):,} different prompts, {cut:,} of {len(table):,} samples were cut")

    if reference and args.temperature == 1 and not args.num_beams:
        ratio = implicit_reward(path, encoder, policy, reference, 1.0)
        views = {id(g): g for g in groups}
        ratios = measured(ratio, views, args, autocast, "KL")
        values = [ratios[id(c.group)][c.k] for c in table]
        print(f"  KL(π‖π_ref) {estimate(values, table)} nats")                    # (6)
    return table


def guided(policy, encoder, prompts, reward, args, autocast):
    """Value-guided decoding → the best Sample of each prompt: a beam search by reward. Each beam
    samples --num-beams continuations of --beam-chunk tokens; of all of them, and of the beams that
    ended, the --num-beams with the highest reward stay. With --implicit: Zhou et al. 2024 (arXiv
    2405.19262); with a reward model: Mudgal et al. 2023 (arXiv 2310.17022)."""
    beams = [[Sample([], [], False)] for _ in prompts]
    for start in range(0, args.max_new_tokens, args.beam_chunk):
        alive = [(i, beam) for i, own in enumerate(beams) for beam in own if not beam.ended]
        if not alive:
            break
        prefixes = [prompts[i].prompt_ids + beam.ids for i, beam in alive]
        tokens = min(args.beam_chunk, args.max_new_tokens - start)
        with autocast:
            more = common.sample(
                policy, prefixes, args.num_beams, tokens, encoder.stops, args.temperature,
                args.seed + start)

        # What ended competes with every continuation; of equal ids one stands.
        beams = [list(filter(attrgetter("ended"), own)) for own in beams]
        for number, s in enumerate(more):
            i, beam = alive[number // args.num_beams]
            beams[i].append(Sample(beam.ids + s.ids, [], s.ended))
        groups = []
        for i, own in enumerate(beams):
            beams[i] = list({tuple(beam.ids): beam for beam in own}.values())
            groups.append(completed(prompts[i], beams[i], encoder))

        # The highest rewards stay; where the reward has no room for the prompt all are alike.
        views = reward.read(groups, args.max_length, args.overlong)
        scores = measured(reward, views, args, autocast) if views else {}
        for i, g in enumerate(groups):
            values = scores.get(id(g), [0.0] * len(beams[i]))
            order = sorted(range(len(values)), key=values.__getitem__, reverse=True)
            beams[i] = [beams[i][k] for k in order[:args.num_beams]]
    return [own[0] for own in beams]


# --- score ----------------------------------------------------------------------------------------

def measured(reward, views, args, autocast, what=""):
    """{id(group): the scores of its completions} of the views that Reward.read() gives."""
    try:
        return dict(zip(views, reward.measure(list(views.values()), args, autocast, what)))
    except RewardError as error:
        fail(error)


def score(table, rewards, args, autocast):
    """Every reward's number for every completion → the table of those that all could read."""
    for reward in rewards:
        groups = [siblings[0].group for siblings in by_group(table)]
        dropped = Counter()
        views = reward.read(groups, args.max_length, args.overlong, dropped)
        if dropped:
            common.account(f"read by {reward.name}", "text", list(views.values()), dropped)
        if reward.encoder:
            common.show_example(reward.encoder, next(iter(views.values())))

        scores = measured(reward, views, args, autocast, "score")
        kept = []
        for c in table:
            values = scores.get(id(c.group), [math.nan])
            if math.isfinite(sum(values)):                   # a function may give none
                ids = views[id(c.group)].completion_ids
                c.read.append(c.text.split() if reward.function else ids[c.k])
                c.raw.append(values[c.k])
                kept.append(c)
        if not kept:
            fail(f"{reward.name} gives no completion a score.")
        table = kept
        line = f"reward {reward.name}: scores {len(kept):,} completions, length in "
        line += "words" if reward.function else "tokens"
        config = getattr(reward.model, "config", None)
        if getattr(config, "reward_std", 0):                 # far from them is an extrapolation
            z = (tensor([c.raw[-1] for c in kept]) - config.reward_mean) / config.reward_std
            far = 100 * (z.abs() > 3).double().mean()
            line += f"; {far:.1f} % lie over 3 std from those of its training (bad above 5 %)"
        print(line)
    return table


def aggregate(table, beside, rewards, args):
    """raw → score. Several rewards are z-scored and joined; mean, std and length curve are those
    that train_rm.py stored, else those of the table."""
    columns = []                                             # of each reward (N,)
    for m, reward in enumerate(rewards):
        values = tensor([c.raw[m] for c in table + beside])                      # (N,)
        lengths = tensor([len(c.read[m]) for c in table + beside])               # (N,)
        stored = getattr(reward.model, "config", None)
        if not hasattr(stored, "reward_std_calibrated"):
            stored = argparse.Namespace()
            column = argparse.Namespace(completion_ids=[c.read[m] for c in table])
            note_statistics(stored, [column], [values[:len(table)].tolist()])
        width = stored.reward_std
        if args.calibrate_length:                                                # (2)
            values = calibrate(values, lengths, stored.reward_by_length, stored.reward_mean)
            width = stored.reward_std_calibrated
        if len(rewards) > 1:
            values = (values - stored.reward_mean) / (width or 1.0)
        columns.append(values.tolist())

    join = min if args.aggregate == "min" else mean
    for c, scores in zip(table + beside, zip(*columns)):
        c.score = join(scores)


# --- report ---------------------------------------------------------------------------------------

def estimate(values, table, proportion=False):
    """The mean of one value for each completion of the table ± its standard error."""
    middle, error = common.mean_and_error(values, [c.prompt for c in table], proportion)
    if proportion:
        return f"{100 * middle:.1f} ± {100 * error:.1f} %"
    return f"{middle:.3f} ± {error:.3f}"


def summary(table):
    """Mean score, and what length has to do with it."""
    if not table[0].raw:
        return f"{len(table):,} completions; without --reward they have no score"
    values = tensor([[c.score, len(c.read[0])] for c in table])                  # (N, 2)
    middle = values.mean(0)
    std = values.std(0, correction=0)
    correlation = ((values - middle) / std).prod(1).mean()
    return (f"score {estimate(values[:, 0], table)} (std {std[0]:.2f}) over {len(table):,} "
            f"completions of length {middle[1]:.1f}, correlation of score with length "
            f"{correlation:.2f}")


def win(a, b):
    """1 where score a beats score b, 0 where it loses, 1/2 where they tie."""
    return 0.5 if abs(a - b) <= TIE else float(a > b)


def accuracy(table):
    """How often the better of two completions that the data ranks scores higher; "" without any."""
    pairs = []
    for siblings in by_group(table):
        for a, b in permutations(siblings, 2):
            known = a.group.scores
            if known and known[a.k] > known[b.k] and a.read[0] != b.read[0]:
                pairs.append((a, b))
    if not pairs:
        return ""

    better = [a for a, _ in pairs]
    wins = [win(a.score, b.score) for a, b in pairs]
    longer = [win(len(a.read[0]), len(b.read[0])) for a, b in pairs]
    margins = tensor([a.score - b.score for a, b in pairs])
    return (f"accuracy {estimate(wins, better, True)} of {len(wins):,} pairs, {wins.count(0.5)} "
            f"ties; margin {estimate(margins, better)} (std {margins.std(correction=0):.2f}); "
            f"length alone (the longer is the better) {estimate(longer, better, True)}")


def report(table, args):
    """Prints what the scores are like, of chosen and rejected or of each system."""
    rivals = [c for c in table if c.system == table[0].system]
    rivals_of = group_by(rivals, [c.prompt for c in rivals])
    for name, own in group_by(table, [c.name for c in table]).items():
        print(f"{name}: {summary(own)}")
        if own[0].raw and own[0].system != rivals[0].system:
            pairs = [(a, b) for a in own for b in rivals_of[a.prompt]]
            wins = [win(a.score, b.score) for a, b in pairs]
            rate = estimate(wins, [a for a, _ in pairs], True)
            print(f"  wins {rate} of {len(wins):,} against {rivals[0].name} (a tie is half a win)")

    if len(rivals) < len(table):
        return
    line = accuracy(table)
    if line:
        print(line)
    labels = [c.group.scores[0] for c in table if c.gives == "label"]
    for label, own in group_by(table, labels).items():
        print(f"  label {label}: {summary(own)}")
    if args.samples > 1 and table[0].raw:
        report_best_of_n(by_group(table))


def best_of_n(scores, n, values):
    """(3): E[value of the best of n by score], unbiased, from N ≥ n samples and their values."""
    order = sorted(range(len(scores)), key=scores.__getitem__)
    weighted = sum(values[k] * math.comb(i, n - 1) for i, k in enumerate(order))
    return weighted / math.comb(len(scores), n)


def report_best_of_n(groups):
    """(3) and (4) for 1, 2, 4, … samples."""
    prompts = [siblings[0] for siblings in groups]
    samples = len(groups[0])
    print("best of n   KL at most   score")
    sizes = {2 ** e for e in range(samples.bit_length())}
    for n in sorted(sizes | {samples}):
        expected = []
        for siblings in groups:
            scores = [c.score for c in siblings]
            expected.append(best_of_n(scores, n, scores))
        bound = math.log(n) - (n - 1) / n                                        # (4)
        print(f"{n:>9} {bound:>12.3f}   {estimate(expected, prompts)}")


def show_answers(table, most):
    """The answers of all policies to a prompt below one another, uncut."""
    by_prompt = group_by(table, [c.prompt for c in table])
    for answers in list(by_prompt.values())[:most]:
        print(f"\n▸ {answers[0].prompt}")
        for c in answers:
            scored = f", score {c.score:.3f}" if c.raw else ""
            print(f"\n[{c.name}{scored}{', cut' if c.cut else ''}]\n{c.text.strip()}")


def histogram(series, bins=12):
    """{name: values} → lines for the terminal, one column of bars per name, one common scale."""
    every = [value for values in series.values() for value in values]
    low = min(every)
    step = (max(every) - low) / bins or 1.0
    width = max(8, min(28, 80 // len(series)))
    lines = [f"{low + b * step:>10.3f} " for b in range(bins)]
    for values in series.values():
        counts = Counter(min(bins - 1, int((value - low) / step)) for value in values)
        for b in range(bins):
            bar = "█" * round((width - 7) * counts[b] / max(counts.values()))
            lines[b] += f"{bar} {counts[b] or ''}".ljust(width)
    head = " " * 11 + "".join(f"{name[2 - width:]:<{width}}" for name in series)
    return "\n".join(line.rstrip() for line in [head, *lines])


# --- write ----------------------------------------------------------------------------------------

# Columns that hold prompt, completions and scores in a format's own way; all others are kept.
READ = {name for row in FORMATS.values() for names in row.columns for name in names.split("|")}
TAKEN = READ - {"answer", "label"} | {"score", "score_chosen", "score_rejected", "p_chosen"}


def write_rows(file, rows):
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    if common.rank() == 0:
        common.write_file(Path(file), "".join(lines))
    print(f"{file}: {len(rows):,} rows")


def row_of(c, columns):
    """A row to write: the prompt, the other columns of its row, and these, unless None or NaN.
    What a row says of its own completions is not said of a policy's."""
    taken = TAKEN | {"margin", "label", "cut"} if c.gives == "policy" else TAKEN
    kept = {name: value for name, value in c.group.row.items() if name not in taken}
    new = {name: value for name, value in columns.items() if value not in (None, math.nan)}
    return {"prompt": c.group.prompt} | kept | new


def pair_row(chosen, rejected):
    return row_of(rejected, {
        "chosen": said(chosen.group, chosen.k), "rejected": said(rejected.group, rejected.k),
        "score_chosen": chosen.score, "score_rejected": rejected.score,
        "p_chosen": tensor(chosen.score - rejected.score).sigmoid().item()})


def scored_rows(table, confidence):
    """--output: pairs stay pairs, rankings rankings, single completions single ones."""
    rows = []
    for siblings in by_group(table):
        c = siblings[0]
        texts = [said(one.group, one.k) for one in siblings]
        scores = [one.score for one in siblings]
        if c.gives == "pair":
            row = pair_row(*siblings)
            if max(row["p_chosen"], 1 - row["p_chosen"]) >= confidence:
                rows.append(row)
        elif c.gives == "list":
            columns = {"completions": texts, "scores": scores, "scores_before": c.group.scores}
            rows.append(row_of(c, columns))
        else:
            name = "completion" if c.gives == "label" else "response"
            for one, text in zip(siblings, texts):
                policy = c.system if c.gives == "policy" else c.group.row.get("policy", c.system)
                columns = {name: text, "score": one.score, "cut": one.cut, "policy": policy}
                rows.append(row_of(one, columns))
    return rows


def rejection_sample(scores, beta, generator):
    """(5): indices of the samples that are kept; never none, since the best is always kept."""
    u = torch.rand(len(scores), generator=generator, dtype=torch.float64)
    accepted = u < ((tensor(scores) - max(scores)) / beta).exp()
    return accepted.nonzero()[:, 0].tolist()


def write_selected(groups, given, args):
    """--select and --pairs, without what is empty or cut: training would put an end token behind
    it. given: of --keep-chosen, the data's own, which is better whatever the scores say."""
    generator = torch.Generator().manual_seed(args.seed)
    given = {c.prompt: c for c in given if not c.cut}
    rows = []
    pairs = []
    for siblings in groups:
        kept = siblings
        if args.select == "rso":
            indices = rejection_sample([c.score for c in siblings], args.beta, generator)
            kept = [siblings[i] for i in indices]
        kept = [c for c in kept if c.text.strip() and not c.cut]
        kept.sort(key=lambda c: c.score)
        for c in kept[-1:] if args.select == "best" else kept:
            rows.append(row_of(c, {"response": said(c.group, c.k), "score": c.score}))

        best = kept[-1] if kept and kept[-1].score > kept[0].score else None
        chosen = given.get(siblings[0].prompt) if args.keep_chosen else best
        if kept and chosen and chosen.text.strip() != kept[0].text.strip():
            pairs.append(pair_row(chosen, kept[0]))
            if given:
                pairs[-1].pop("p_chosen", None)

    if args.select:
        write_rows(args.output, rows)
    if args.pairs and not pairs:
        fail("--pairs: no row has two different completions that ended (--samples makes several).")
    if args.pairs:
        write_rows(args.pairs, pairs)


PAGE_STYLE = """:root{color-scheme:light dark}div{white-space:pre-wrap}.p{border-top:1px solid}
body{font:16px/1.9 sans-serif;max-width:60rem;margin:2rem auto}.p,small{color:gray}"""


def write_tokens(table, reward, args, autocast):
    """An HTML page: tokens are red or blue, as strongly as their part in the reward."""
    if not reward.parts:
        fail("--tokens needs a reward model or --implicit: a function has no tokens.")
    table = sorted(table, key=lambda c: c.prompt)            # systems beside each other
    groups = by_group(table)[:PAGE]
    asked = [siblings[0].group for siblings in groups]
    views = list(reward.read(asked, args.max_length, args.overlong).values())
    parts = for_all(reward.parts, reward.model, views, args, reward.packed, autocast)
    scale = tensor(sum(parts, [])).abs().quantile(0.98).item() or 1.0    # without the extremes
    title = f"Each token's part in the reward {html.escape(reward.name)}"
    page = [f'<!doctype html><meta charset="utf-8"><style>{PAGE_STYLE}</style><h1>{title}</h1>'
            f"red lowers it by {scale:.3g} or more, blue raises it; point at a token"]

    for siblings, values in zip(groups, map(iter, parts)):
        page.append(f'<div class="p">{html.escape(siblings[0].prompt)}</div>')
        for c in siblings:
            line = f"<div><small>{html.escape(c.name)} {c.score:+.3f}</small> "
            ids = c.read[0]
            texts = [reward.encoder.text(ids[:t]) for t in range(len(ids) + 1)]
            for before, after in pairwise(texts):            # some tokens are parts of a character
                value = next(values)
                colour = "225 45 35" if value < 0 else "30 120 235"
                strength = 0.7 * min(1, abs(value) / scale)
                line += (f'<span style="background:rgb({colour}/{strength:.2f})" '
                         f'title="{value:+.4f}">{html.escape(after[len(before):]) or "·"}</span>')
            page.append(line + "</div>")
    if common.rank() == 0:
        common.write_file(Path(args.tokens), "\n".join(page) + "</html>\n")
    print(f"{args.tokens}: {len(views)} groups")


# A mid-grey and middle tones can be read on white and on dark pages.
COLOURED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
LOOK = dict.fromkeys(COLOURED, "#7f7f7f") | {
    "axes.prop_cycle": "cycler(color=['#3b82c4', '#d9772b', '#3a9d5d', '#b0579b', '#c94f4f'])",
    "axes.facecolor": "none", "figure.facecolor": "none", "legend.framealpha": 0,
    "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none",
    "axes.ymargin": 0.35,                                    # room for the legend
    "figure.constrained_layout.use": True}


def figure(file, panels, draw):
    """A figure with draw(axis, content) for each of panels, {title: content}."""
    import matplotlib                    # here, because only --plot needs it
    matplotlib.use("Agg")                # no display
    from matplotlib import pyplot
    pyplot.rcParams.update(LOOK)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    sheet = pyplot.figure(figsize=(5 * columns, 3.2 * rows))

    for number, (title, content) in enumerate(panels.items(), 1):
        axis = sheet.add_subplot(rows, columns, number, title=title)
        draw(axis, content)
        axis.legend()
        axis.locator_params(nbins=5)                         # an SVG stays small
    sheet.savefig(f"{file}.writing", format=Path(file).suffix[1:])
    Path(f"{file}.writing").replace(file)
    print(f"{file}: {len(panels)} panels")


def draw_histogram(axis, series):
    """{name: scores}; densities, since there may be more of one than of another."""
    labels = [f"{name}: mean {mean(values):.2f}" for name, values in series.items()]
    axis.hist(list(series.values()), 15, density=True, label=labels)     # side by side
    axis.set(xlabel="score", ylabel="density of completions")


# --plot of runs draws the first six that they have: unit, metrics.
PANELS = {
    "loss": ("loss", "eval/loss"),
    "fraction of pairs": ("rewards/accuracies", "eval/rewards/accuracies"),
    "reward, chosen − rejected": ("rewards/margins", "eval/rewards/margins"),
    "reward": ("reward", "eval/reward"),
    "log-prob of a completion, nats": ("logps/chosen", "logps/rejected"),
    "KL from the reference, nats": ("eval/kl", "kl"),
    "fraction of samples": ("eval/right", "eval/pass@1"),
    "tokens": ("completions/mean_length",),
    "norm of the gradient": ("grad_norm",)}


def draw_curves(axis, curves):
    """A colour for each run, dashes for an evaluation."""
    for (name, number, run), points in curves.items():
        stretches = tensor(points).split(math.ceil(len(points) / 60))
        steps, values = torch.stack([stretch.mean(0) for stretch in stretches]).T
        style = "--" if name.startswith("eval/") or name == "logps/rejected" else "-"
        style += "o" if len(points) < 5 else ""
        axis.plot(steps, values, style, color=f"C{number}", label=f"{run} {name}")
    axis.set(title="", xlabel="optimizer step", ylabel=axis.get_title())


def compare_runs(args):
    """First and last value of every metric of run directories in the terminal, curves in --plot."""
    curves = {}                                  # {(metric, number, run): [(step, value), …]}
    for number, run in enumerate(args.dataset):
        metrics = Path(run) / "metrics.jsonl"                # a kill may have torn its last line
        for line in metrics.read_text(encoding="utf-8").rpartition("\n")[0].splitlines():
            values = json.loads(line)
            for name, value in values.items():
                curves.setdefault((name, number, run), []).append((values["step"], value))
    for (name, _, run), points in sorted(curves.items()):
        print(f"{name:<28} {points[0][1]:.4g} → {points[-1][1]:.4g}   {run}")

    panels = {}
    for unit, names in PANELS.items():
        drawn = {key: points for key, points in curves.items() if key[0] in names}
        if drawn and len(panels) < 6:
            panels[unit] = drawn
    if args.plot:
        figure(args.plot, panels, draw_curves)


# --- main -----------------------------------------------------------------------------------------

def main(argv=None):
    args = parse_args(argv)
    if any((Path(name) / "metrics.jsonl").is_file() for name in args.dataset):
        return compare_runs(args)

    # --- load: what cannot be used is found before time is spent
    device, autocast = common.set_up_device(args)
    usable = ("pair",) if args.confidence > 0.5 else ("pair", "list", "label", "response")
    wanted = ("pair", "response" if args.keep_chosen else "prompt") if args.policy else usable
    files = [load_rows(source, wanted, args) for source in args.dataset]
    if len(files) > 1 and {"pair", "list"} & {gives for gives, _ in files}:
        fail(f"--dataset {' '.join(args.dataset)}: systems to compare have one response a row.")
    if args.prompt:
        read = FORMATS["prompt"].read
        files = [("prompt", [read(Row(prompt=text), args.prefer) for text in args.prompt])]
    beside = [load_rows(source, usable, args) for source in args.beside]
    rewards = load_rewards(args, device)
    encoders = [common.load_encoder(path, args, args.chat_template) for path in args.policy]
    torch.manual_seed(args.seed)
    untrained = [load_reward(path, args, device, new_head=True) for path in args.untrained]

    # --- the completions: a table for each file or policy
    tables = [table_of(source, *rows) for source, rows in zip(args.dataset, files)]
    groups = files[0][1]
    if args.policy:
        options = (groups, rewards, args, device, autocast)
        tables = [complete(path, encoder, *options) for path, encoder in zip(args.policy, encoders)]
    if args.keep_chosen:            # the data's completions are a system too, scored like the rest
        chosen = [replace(g, completions=g.completions[:1], scores=[]) for g in groups]
        tables.append(table_of("chosen in the data", "response", chosen))
    systems = len(tables)
    tables += [table_of(source, *rows) for source, rows in zip(args.beside, beside)]

    # --- score
    tables = [score(table, rewards, args, autocast) for table in tables]
    table = sum(tables[:systems], [])
    beside = sum(tables[systems:], [])
    aggregate(table, beside, rewards, args)

    # --- report, on the prompts that all systems have
    systems_of = group_by([c.system for c in table], [c.prompt for c in table])
    shared = {prompt for prompt, names in systems_of.items() if len(set(names)) == systems}
    met = [c for c in table if c.prompt in shared]
    print(f"{len(shared):,} prompts" + " are in all systems; only these count" * (systems > 1))
    if not met:
        fail("there is nothing to compare.")

    if args.prompt or not rewards:
        show_answers(met, len(met) if args.prompt else 5)
    report(met, args)
    shown = {}
    if rewards:
        series = group_by([c.score for c in met], [c.name for c in met])
        for c in beside:
            series.setdefault(f"{c.system}: {c.name}", []).append(c.score)
        shown[", ".join(reward.name for reward in rewards)] = series
    for reward in untrained:
        bare = [replace(c, read=[], raw=[]) for c in met]
        bare = score(bare, [reward], args, autocast)
        names = [c.name for c in bare]
        shown[f"{reward.name}, a new head"] = group_by([c.raw[0] for c in bare], names)
    for title, series in shown.items():
        print(f"{title}\n{histogram(series)}")

    # --- write
    if args.plot and common.rank() == 0:
        figure(args.plot, shown, draw_histogram)
    if args.tokens:
        write_tokens(met, rewards[0], args, autocast)
    if args.output and not args.select:
        write_rows(args.output, scored_rows(table, args.confidence))
    if args.select or args.pairs:
        given = tables[systems - 1] if args.keep_chosen else []
        write_selected(by_group(tables[0]), given, args)


if __name__ == "__main__":
    common.run(main)
