"""train_dpo.py: every row of LOSSES for value and gradient against formulas of its own in float64,
golden values, and what must hold whatever the loss: micro-batches, packing and flags that it does
not read change nothing. b5 … b18 are traps."""
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import train_dpo
from train_dpo import LOSSES, Completions, main, mismatch, parse_args

TOY = Path(__file__).parent / "toy"
PAIRWISE = [name for name in LOSSES if name not in ("plackett-luce", "kto", "sft")]


def double(*columns):
    return [torch.as_tensor(column, dtype=torch.float64) for column in columns]


def pairs(w, l, a, b, n, k, p, m, shift=0.0):                            # noqa: E741
    """M pairs as a loss sees them. w, l: log π of chosen and rejected; a, b: log π_ref; n, k: their
    tokens; p, m: label and margin."""
    first = torch.arange(len(w))
    label = torch.arange(2 * len(w)) < len(w)
    return Completions(
        torch.cat([w, l]), torch.cat([w - a, l - b]), label, first, first + len(w), w - a, l - b, n,
        k, w - a - (l - b), p, m, shift)


def one_pair(logps, refs=(0, 0), tokens=(1, 1), p=1):
    return pairs(*double(*([number] for number in (*logps, *refs, *tokens, p, 0))))


def loss_of(name, x, *flags):
    return LOSSES[name].function(x, parse_args(["--loss", name, *flags]))


def group(ids, scores, prompt=1):
    """A group as the losses read it, with a reference of 0."""
    ref = [0.0] * len(ids)
    return common.Group("", [], scores=scores, prompt_ids=[prompt], completion_ids=ids, ref=ref)


# --- formulas of their own: from the papers, written another way, plain exp and log in float64 ----
# x: what both() makes; v = log π_w/π_ref, u = log π_l/π_ref, h = v − u, B = β.

def sigma(z):
    return 1 / (1 + torch.exp(-z))


def nll(z):
    return torch.log(1 + torch.exp(-z))


def log_odds(mean_logp):
    return torch.log(torch.exp(mean_logp) / (1 - torch.exp(mean_logp)))


def kl(p, q):
    return q * torch.log(q / p) + (1 - q) * torch.log((1 - q) / (1 - p))


FORMULAS = {
    "dpo": lambda x: x.p * nll(x.B * x.h) + (1 - x.p) * nll(-x.B * x.h),
    "soft": lambda x: sigma(x.m) * nll(x.B * x.h) + sigma(-x.m) * nll(-x.B * x.h),
    "robust": lambda x: (x.p * nll(x.B * x.h) - (1 - x.p) * nll(-x.B * x.h)) / (2 * x.p - 1),
    "ipo": lambda x: (x.h - 1 / (2 * x.B)) ** 2,
    "ipo mean": lambda x: (x.v / x.n - x.u / x.k - 1 / (2 * x.B)) ** 2,
    "hinge": lambda x: torch.clamp(1 - x.B * x.h, min=0),
    "dpop": lambda x: nll(x.B * (x.h - x.dpop_lambda * torch.clamp(x.a - x.w, min=0))),
    "rdpo": lambda x: nll(x.B * x.h + x.length_penalty * (x.n - x.k)),
    "dpo-norm": lambda x: nll(x.B * (x.v / x.n - x.u / x.k)),
    "exo": lambda x: kl(torch.clamp(x.p, 1e-3, 1 - 1e-3), sigma(x.B * x.h)),
    "nca": lambda x: nll(x.B * x.v) + nll(-x.B * x.v) / 2 + nll(-x.B * x.u) / 2,
    "bco": lambda x: nll(x.B * (x.v - x.shift)) + nll(x.B * (x.shift - x.u)),
    "sppo": lambda x: (x.v - 1 / (2 * x.B)) ** 2 + (x.u + 1 / (2 * x.B)) ** 2,
    "apo-zero": lambda x: sigma(-x.B * x.v) + sigma(x.B * x.u),
    "apo-down": lambda x: sigma(x.B * x.v) + sigma(-x.B * x.h),
    "distill": lambda x: (x.B * x.h - x.m) ** 2,
    "simpo": lambda x: nll(x.B * (x.w / x.n - x.l / x.k) - x.gamma),
    "orpo": lambda x: -x.w / x.n + x.B * nll(log_odds(x.w / x.n) - log_odds(x.l / x.k)),
    "cpo": lambda x: nll(x.B * (x.w - x.l)),
    "slic": lambda x: torch.clamp(x.gamma - x.w + x.l, min=0)}
CASES = {name: ["--loss", name] for name in PAIRWISE} | {
    "cdpo": ["--label-smoothing", "0.1"],
    "robust 0.2": ["--loss", "robust", "--label-smoothing", "0.2"],
    "exo 0.1": ["--loss", "exo", "--label-smoothing", "0.1"],
    "ipo mean": ["--loss", "ipo", "--ipo-normalise", "mean"],
    "simpo 10": ["--loss", "simpo", "--beta", "10", "--gamma", "0.3"],
    "rdpo -": ["--loss", "rdpo", "--length-penalty", "-0.2"],
    "dpop 5": ["--loss", "dpop", "--dpop-lambda", "5", "--beta", "0.3"]}
DATA = double(                                               # w, l, a, b, n, k, m
    [-10, -3, -19], [-12, -2.5, -31], [-11, -2, -22], [-11.5, -6, -30], [5, 2, 9], [8, 3, 4],
    [1.5, 0.2, 3])


def both(name):
    """→ (loss by the script, loss by FORMULAS, leaf of the log-probs), three pairs each."""
    args = parse_args(CASES[name])
    w, l, a, b, n, k, m = DATA                                           # noqa: E741
    p = sigma(m) if name == "soft" else torch.full_like(m, 1 - (args.label_smoothing or 0))
    if not LOSSES[args.loss].reference:
        a = b = torch.zeros_like(a)
    policy = torch.cat([w, l]).requires_grad_()
    w, l = policy.split(3)                                               # noqa: E741
    ours = LOSSES[args.loss].function(pairs(w, l, a, b, n, k, p, m, -0.4), args)
    x = SimpleNamespace(**vars(args), w=w, l=l, a=a, n=n, k=k, p=p, m=m, shift=-0.4, B=args.beta)
    x.v = w - a
    x.u = l - b
    x.h = x.v - x.u
    return ours, FORMULAS.get(name, FORMULAS[args.loss])(x), policy


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_against_float64(name):
    ours, theirs, policy = both(name)
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    mine, = torch.autograd.grad(ours.sum(), policy, retain_graph=True)
    other, = torch.autograd.grad(theirs.sum(), policy)
    assert torch.allclose(mine, other, rtol=1e-7, atol=1e-10) and mine.abs().sum() > 0


def test_b6_losses_differ_in_value_and_gradient():
    seen = []
    for name in CASES.keys() - {"robust"}:                   # without flips it is dpo
        ours, _, policy = both(name)
        gradient, = torch.autograd.grad(ours.sum(), policy)
        seen.append((round(ours.sum().item(), 6), str(gradient.round(decimals=6).tolist())))
    assert [len(set(column)) for column in zip(*seen)] == [len(CASES) - 1] * 2


GOLDEN = [                                                   # (loss, flags, p, value)
    ("dpo", [], 1, 0.620957),
    ("dpo", [], 0.9, 0.635957),
    ("dpo", [], 0.5, 0.695957),
    ("robust", [], 0.9, 0.602207),
    ("ipo", [], 1, 12.25),
    ("ipo", ["--ipo-normalise", "mean"], 1, 22.443909),
    ("simpo", ["--beta", "2", "--gamma", "1"], 1, 2.126928),    # b8: 3.0486 if γ were a ratio
    ("orpo", ["--beta", "1"], 1, 2 + 1.042058),
    ("hinge", [], 1, 0.85),
    ("sppo", [], 1, (1 - 5) ** 2 + (-0.5 + 5) ** 2),            # the authors' code takes half of it
    ("apo-zero", [], 1, 1 - 1 / (1 + math.exp(-0.1)) + 1 / (1 + math.exp(0.05)))]


@pytest.mark.parametrize("name, flags, p, value", GOLDEN)
def test_golden_values(name, flags, p, value):
    refs = (-11, -11.5) if LOSSES[name].reference else (0, 0)
    x = one_pair((-10, -12), refs, (5, 8), p)
    assert loss_of(name, x, *flags).item() == pytest.approx(value, abs=1e-5)


def test_exo_clamps_a_sure_label():
    """At h = 0: KL((½, ½) ‖ (0.999, 0.001)). The authors' code takes log p = 0 and −10: 4.3069."""
    by_hand = -math.log(2) - (math.log(0.999) + math.log(0.001)) / 2
    assert loss_of("exo", one_pair((-3, -3))).item() == pytest.approx(by_hand)
    assert by_hand == pytest.approx(2.7612, abs=1e-4)


@pytest.mark.parametrize("m", [0.0, -1e-8, -1e-4, -1.0, -50.0])
def test_b9_orpo_is_finite_near_certainty(m):
    policy = torch.tensor([5 * m, -7.0], requires_grad=True)
    zero = torch.zeros(1)
    x = pairs(*policy.split(1), zero, zero, zero + 5, zero + 5, zero + 1, zero)
    loss = loss_of("orpo", x)
    loss.backward()
    assert torch.isfinite(loss).all() and torch.isfinite(policy.grad).all()
    if m <= -1e-4:
        odds = math.exp(m + 1.4) * math.expm1(-1.4) / math.expm1(m)
        assert loss.item() == pytest.approx(-m + 0.1 * math.log1p(1 / odds), rel=1e-4)


def test_b10_kto_golden():
    D = torch.tensor([1.0, -0.5], requires_grad=True)
    z = 0.2 / 3                                              # of (0.3, −0.2, 0.1)
    x = SimpleNamespace(D=D, label=torch.tensor([True, False]), shift=z)
    losses = loss_of("kto", x)
    assert losses.tolist() == pytest.approx([0.476684, 0.485837], abs=1e-6)
    losses.sum().backward()
    good, bad = [1 / (1 + math.exp(-0.1 * (d - z))) for d in (1.0, -0.5)]
    expected = [-0.1 * good * (1 - good), 0.1 * bad * (1 - bad)]
    assert D.grad.tolist() == pytest.approx(expected, abs=1e-7)
    weighted = loss_of("kto", x, "--desirable-weight", "2", "--undesirable-weight", "0.5")
    assert weighted.tolist() == pytest.approx([2 * 0.476684, 0.5 * 0.485837], abs=1e-6)


def test_b10_no_completion_is_mismatched_with_its_own_prompt(capsys):
    groups = [group([[10 + i] * 9], [i % 2], i // 2) for i in range(7)]
    for seed in range(5):
        others = mismatch(groups, 6, seed)
        assert [o.prompt_ids for o in others] == [g.prompt_ids for g in groups]
        for other, g in zip(others, groups):
            assert (other.completion_ids[0][0] - 10) // 2 != g.prompt_ids[0]
            assert len(other.completion_ids[0]) == 5         # what has no room is left out
    assert mismatch(groups, 6, 0) != mismatch(groups, 6, 1)
    with pytest.raises(SystemExit):
        mismatch(groups[:2], 6, 0)
    assert "two different prompts" in capsys.readouterr().err


def test_plackett_luce_of_two_is_dpo_and_of_equal_rewards_log_k_factorial():
    w, l, a, b = DATA[:4]                                                # noqa: E741
    for i in range(3):
        x = one_pair((w[i], l[i]), (a[i], b[i]))
        assert loss_of("plackett-luce", x).sum().item() == pytest.approx(loss_of("dpo", x).item())
    args = parse_args(["--loss", "plackett-luce"])
    for count in (2, 3, 4):                                  # with K = 3 there are as many pairs
        ranked = group([[i] for i in range(count)], list(range(count, 0, -1)))
        loss, _ = train_dpo.micro_loss(torch.zeros(count), 0.0, [ranked], args)
        assert loss.item() == pytest.approx(math.lgamma(count + 1), abs=1e-5)


def test_robust_is_unbiased_under_flips():
    w, l, a, b, n, k, m = DATA                                           # noqa: E741
    right = loss_of("robust", pairs(w, l, a, b, n, k, 0 * m + 0.8, m))
    flipped = loss_of("robust", pairs(l, w, b, a, k, n, 0 * m + 0.8, m))
    clean = loss_of("dpo", pairs(w, l, a, b, n, k, 0 * m + 1, m))
    assert torch.allclose(0.8 * right + 0.2 * flipped, clean)


def test_b5_ipo_mean_does_not_depend_on_length_and_sums_do():
    once = pairs(*DATA[:6], DATA[6], DATA[6])
    twice = pairs(*[2 * column for column in DATA[:6]], DATA[6], DATA[6])
    for normalise, same in (("mean", True), ("sum", False)):
        one, two = [loss_of("ipo", x, "--ipo-normalise", normalise) for x in (once, twice)]
        assert torch.allclose(one, two) == same


@pytest.mark.parametrize("name", PAIRWISE)
def test_b18_extreme_log_ratios_stay_finite(name):
    for far in (-2000.0, 2000.0):
        policy = torch.tensor([min(far, 0.0) - 1, min(-far, 0.0) - 1], requires_grad=True)
        ref = torch.tensor([-1.0]) * LOSSES[name].reference
        rest = torch.tensor([[3.0], [4.0], [0.9], [1.0]])
        loss = loss_of(name, pairs(*policy.split(1), ref, ref, *rest))
        loss.sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(policy.grad).all()


VALUES = {
    "beta": "0.7", "label_smoothing": "0.1", "sft_coef": "0.2", "ref_model": "x",
    "reward_temperature": "2.0", "gamma": "0.4", "ipo_normalise": "mean", "dpop_lambda": "3.0",
    "length_penalty": "0.1", "desirable_weight": "2.0", "undesirable_weight": "2.0"}


@pytest.mark.parametrize("name", LOSSES)
def test_b6_a_flag_that_the_loss_does_not_read_is_refused(name, capsys):
    assert {flag for row in LOSSES.values() for flag in row.flags} == set(VALUES)
    for flag, value in VALUES.items():
        option = "--" + flag.replace("_", "-")
        given = ["--loss", name, option, value]
        if flag in LOSSES[name].flags:
            assert str(getattr(parse_args(given), flag)) == value
            continue
        with pytest.raises(SystemExit) as end:
            parse_args(given)
        said = capsys.readouterr().err.splitlines()[-1]
        assert end.value.code == 2 and name in said and option in said


# --- the step: micro-batches, packing, lists, the SFT term ----------------------------------------

def toy_groups(name, n=6):
    """The first rows of the toy in very different lengths as --loss NAME has them → (args, encoder,
    groups with a reference)."""
    args = parse_args(["--loss", name, "--limit", str(n)])
    encoder = common.load_encoder(args.model, args)
    groups, _, dropped = common.read_groups(args.dataset, "train", ["pair"], args)
    for i, g in enumerate(groups):
        g.completions[0] += " so it is" * (i % 4)
        g.completions[1] += " perhaps" * (i // 3)
        g.row |= {"score_chosen": 0.5 * i, "score_rejected": 1.0}
    groups = train_dpo.prepare(groups, dropped, args)
    for i, g in enumerate(groups):
        if name in ("plackett-luce", "hinge"):               # lists of three
            g.completions.append("no" * (1 + i % 2))
            g.scores = [3, 2, 1]
    groups = common.tokenise(groups, encoder, 512)
    for i, g in enumerate(groups):
        g.ref = [-3.0 - (i + k) % 7 for k in range(len(g.completion_ids))]
    return args, encoder, groups


@pytest.mark.parametrize("name", LOSSES)
def test_b15_neither_micro_batches_nor_packing_change_loss_or_gradient(name):
    args, encoder, groups = toy_groups(name)
    model = common.load_model(args.model, encoder, torch.device("cpu"))
    half = sum(g.tokens() for g in groups) // 2
    results = []
    for budget, packed in ((10 ** 9, True), (half, True), (1, False)):
        model.zero_grad()
        total = 0.0
        micros = common.micro_batches(groups, budget, packed)
        for micro in micros:
            logps = common.completion_logps(model, common.lay_out(model, micro, packed))
            loss = train_dpo.micro_loss(logps, 0.3, micro, args)[0]
            loss.backward()
            total += loss.item()
        gradient = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        results.append((len(micros), total, gradient))
    assert results[0][0] == 1 and results[2][0] == len(groups)
    for _, loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][1], rel=2e-5)
        assert (gradient - results[0][2]).norm() < 3e-5 * results[0][2].norm()


def test_lists_weigh_their_pairs_by_one_over_their_number():
    args, _, groups = toy_groups("hinge")
    logps = -torch.arange(18.0).sqrt()
    total = 0.0
    for g, now in zip(groups, logps.view(6, 3).tolist()):
        D = [logp - ref for logp, ref in zip(now, g.ref)]
        each = [max(0.0, 1 - args.beta * (D[i] - D[j])) for i, j in ((0, 1), (0, 2), (1, 2))]
        total += sum(each) / 3
    loss, _ = train_dpo.micro_loss(logps, 0.0, groups, args)
    assert loss.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("name, coef", [("dpo", 0.5), ("cpo", 1.0), ("slic", 0.1)])
def test_eq10_b7_the_sft_term_is_the_mean_nll_of_each_chosen_completion(name, coef):
    """−1 of one token, −9 of three: 1 and 3, mean 2 (cpo); the authors average over tokens, 2.5.
    slic: 0.1 · 3 = 0.3 for the second; the paper sums, 0.9."""
    groups = [group([[5], [6]], [1, 0]), group([[5] * 3, [6] * 3], [1, 0])]
    logps = torch.tensor([-1.0, -2.0, -9.0, -5.0], requires_grad=True)

    def loss(*flags):
        return train_dpo.micro_loss(logps, 0.0, groups, parse_args(["--loss", name, *flags]))[0] / 2

    default = ["--sft-coef", str(coef)] if name == "dpo" else []         # the others have one
    term = loss(*default) - loss("--sft-coef", "0")
    gradient, = torch.autograd.grad(term, logps)
    assert term.item() == pytest.approx(coef * (1 + 3) / 2, abs=1e-6)
    assert gradient.tolist() == pytest.approx([-coef / 2, 0, -coef / 6, 0], abs=1e-6)


# --- the script -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The toy's pairs with two rewards; in a third of them the reward prefers `rejected`."""
    file = tmp_path_factory.mktemp("scored") / "p.jsonl"
    with open(file, "w") as out:
        for i, line in enumerate((TOY / "pairs.jsonl").read_text().splitlines()[:40]):
            row = json.loads(line) | {"score_chosen": 1.0 + i % 3, "score_rejected": 1.5}
            out.write(json.dumps(row) + "\n")
    return str(file)


@pytest.mark.parametrize("loss", ["soft", "distill"])
def test_labels_by_two_rewards_and_the_better_one_comes_first(loss, scored):
    args = parse_args(["--loss", loss, "--reward-temperature", "2"])
    groups, _, dropped = common.read_groups(scored, "train", ["pair"], args)
    for i, g in enumerate(train_dpo.prepare(groups, dropped, args)):
        better, difference = [("rejected", 0.5), ("chosen", 0.5), ("chosen", 1.5)][i % 3]
        assert g.completions[0] == g.row[better][0]["content"]
        assert g.margin == difference / 2
        assert g.p_chosen == pytest.approx(1 / (1 + math.exp(-difference / 2)))


def test_p_chosen_wins_over_smoothing_and_distill_needs_two_rewards(capsys):
    g = replace(group([[5], [6]], [1, 0]), p_chosen=0.7, where="row 7")
    p = common.compare([g, replace(g, p_chosen=None)], 0.2).p
    assert p.tolist() == pytest.approx([0.7, 0.8])
    assert train_dpo.label_by_scores([g], parse_args(["--loss", "soft"]))[0].p_chosen == 0.7
    with pytest.raises(SystemExit):
        train_dpo.label_by_scores([g], parse_args(["--loss", "distill"]))
    said = capsys.readouterr().err
    assert "row 7" in said and "score_chosen" in said and "score.py" in said


def run(out, *flags):
    small = ["--limit", 40, "--batch-size", 8, "--eval-samples", 2, "--max-steps", 2]
    main(list(map(str, ["--output-dir", out, *small, *flags])))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_on_the_toy(name, tmp_path, scored, measured):
    lines = run(tmp_path / "o", "--loss", name, "--dataset", scored)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    first, last = lines[0], lines[-1]
    assert first["eval/kl"] == 0 != last["eval/kl"] and last["eval/loss"] != first["eval/loss"]
    assert ("rewards/margins" in lines[1]) == (name not in ("kto", "sft"))
    if LOSSES[name].reference:
        assert first["eval/loss"] == pytest.approx(first["eval/loss_expected"], abs=1e-6)
    else:                                                    # none is measured for the training
        assert max(len(groups) for _, groups in measured) <= 4


@pytest.mark.parametrize("name", ["bco", "kto", "sft"])
def test_a_run_resumes_to_the_same_bits_and_does_not_depend_on_micro_batches(name, tmp_path):
    flags = ["--loss", name, "--lr-schedule", "constant", "--eval-samples", 0]
    runs = {"a": run(tmp_path / "a", *flags, "--max-steps", 3)}
    run(tmp_path / "b", *flags)
    runs["b"] = run(tmp_path / "b", *flags, "--max-steps", 3, "--resume")
    runs["c"] = run(tmp_path / "c", *flags, "--max-steps", 3, "--micro-batch-tokens", 1)
    a, b, c = [[line["loss"] for line in lines if "loss" in line] for lines in runs.values()]
    assert a == b and a == pytest.approx(c, abs=1e-5) and len(a) == 3
    one, two = [(tmp_path / run / "model.safetensors").read_bytes() for run in "ab"]
    assert one == two
