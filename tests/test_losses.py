"""train_dpo.py: every row of LOSSES for value and gradient against formulas of its own in float64, golden values, and
what must hold whatever the loss: no dependence on micro-batches, packing and flags that it does not read."""
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import train_dpo
from train_dpo import LOSSES, Completions, main, means, micro_loss, mismatch, normaliser, parse_args

TOY = Path(__file__).parent / "toy"
PAIRS = [name for name, row in common.FORMATS.items() if row.gives == "pair"]


def double(*xs):
    return [torch.as_tensor(x, dtype=torch.float64) for x in xs]


def completions(policy, ref, length, p, margin, shift=0.0, label=None):
    """M pairs, chosen first: policy, ref, length (2M,)."""
    m = len(policy) // 2
    first = torch.arange(m)
    label = torch.zeros(2 * m, dtype=torch.bool) if label is None else label
    return Completions(policy, ref, length, label, first, first + m, p, margin, torch.ones(m), shift)


# --- formulas of their own: from the papers, written another way than the script's -----------------------------------------
# w, l: log π of chosen and rejected; a, b: log π_ref; n, k: tokens; p, m: label and margin. Plain exp and log in float64.

def sigma(z):
    return 1 / (1 + torch.exp(-z))


def odds(mean_logp):
    probability = torch.exp(mean_logp)
    return probability / (1 - probability)


def formula(name, w, l, a, b, n, k, p, m, args, shift=0.0):              # noqa: E741
    B = args.beta
    if name in ("dpo", "soft"):
        z = B * (w - l - a + b)
        return -p * torch.log(sigma(z)) - (1 - p) * torch.log(1 - sigma(z))
    if name == "robust":
        z, e = B * (w - l - a + b), 1 - p
        return (-(1 - e) * torch.log(sigma(z)) + e * torch.log(sigma(-z))) / (1 - 2 * e)
    if name == "ipo":
        if args.ipo_normalise == "mean":
            return ((w - a) / n - (l - b) / k - 1 / (2 * B)) ** 2
        return (w - a - (l - b) - 1 / (2 * B)) ** 2
    if name == "hinge":
        return torch.clamp(1 - B * (w - l - a + b), min=0)
    if name == "dpop":
        ratio = torch.exp(w - a) / torch.exp(l - b) / torch.exp(args.dpop_lambda * torch.clamp(a - w, min=0))
        return -torch.log(ratio ** B / (1 + ratio ** B))
    if name == "rdpo":
        return torch.log(1 + torch.exp(-B * (w - l - a + b) - args.length_penalty * (n - k)))
    if name == "dpo-norm":
        return torch.log(1 + torch.exp(-B * ((w - a) / n - (l - b) / k)))
    if name == "exo":
        q = sigma(B * (w - l - a + b))
        p = torch.clamp(p, 1e-3, 1 - 1e-3)
        return q * torch.log(q / p) + (1 - q) * torch.log((1 - q) / (1 - p))
    if name == "nca":
        return -torch.log(sigma(B * (w - a))) - torch.log(sigma(-B * (w - a))) / 2 - torch.log(sigma(-B * (l - b))) / 2
    if name == "bco":
        return -torch.log(sigma(B * (w - a) - B * shift)) - torch.log(sigma(B * shift - B * (l - b)))
    if name == "sppo":
        return (w - a - 1 / (2 * B)) ** 2 + (l - b + 1 / (2 * B)) ** 2
    if name == "apo-zero":
        return 1 - sigma(B * (w - a)) + sigma(B * (l - b))
    if name == "apo-down":
        return sigma(B * (w - a)) + 1 - sigma(B * (w - a) - B * (l - b))
    if name == "distill":
        return (B * (w - l - a + b) - m) ** 2
    if name == "simpo":
        return torch.log(1 + torch.exp(-(B / n * w - B / k * l - args.gamma)))
    if name == "orpo":
        return -w / n - B * torch.log(sigma(torch.log(odds(w / n) / odds(l / k))))
    if name == "cpo":
        return torch.log(1 + torch.exp(-B * (w - l)))
    if name == "slic":
        return torch.clamp(args.gamma - w + l, min=0)
    raise KeyError(name)


PAIRWISE = [name for name, row in LOSSES.items() if name not in ("plackett-luce", "kto", "sft")]
CASES = {name: [] for name in PAIRWISE} | {
    "cdpo": ["--label-smoothing", "0.1"], "robust 0.2": ["--loss", "robust", "--label-smoothing", "0.2"],
    "exo 0.1": ["--loss", "exo", "--label-smoothing", "0.1"], "ipo mean": ["--loss", "ipo", "--ipo-normalise", "mean"],
    "simpo 10": ["--loss", "simpo", "--beta", "10", "--gamma", "0.3"], "rdpo -": ["--loss", "rdpo", "--length-penalty", "-0.2"],
    "dpop 5": ["--loss", "dpop", "--dpop-lambda", "5", "--beta", "0.3"]}
DATA = double([-10.0, -3.0, -19.0], [-12.0, -2.5, -31.0], [-11.0, -2.0, -22.0], [-11.5, -6.0, -30.0], [5, 2, 9], [8, 3, 4],
              [1.5, 0.2, 3.0])


def case(name):
    args = parse_args(CASES[name] or ["--loss", name])
    return args.loss, args


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_against_float64(name):
    loss, args = case(name)
    w, l, a, b, n, k, m = DATA                                           # noqa: E741
    p = torch.full((3,), 1 - (args.label_smoothing or 0.0), dtype=torch.float64)
    if loss == "soft":
        p = sigma(m)
    shift = -0.4 if loss == "bco" else 0.0
    if not LOSSES[loss].reference:
        a, b = torch.zeros(3).double(), torch.zeros(3).double()
    policy = torch.cat([w, l]).requires_grad_()
    x = completions(policy, torch.cat([a, b]), torch.cat([n, k]), p, m, shift)
    ours = LOSSES[loss].function(x, args)
    theirs = formula(loss, policy[:3], policy[3:], a, b, n, k, p, m, args, shift)
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    mine, = torch.autograd.grad(ours.sum(), policy, retain_graph=True)
    other, = torch.autograd.grad(theirs.sum(), policy)
    assert torch.allclose(mine, other, rtol=1e-7, atol=1e-10) and mine.abs().sum() > 0


def golden(loss, *flags, shift=0.0):
    args = parse_args(["--loss", loss, "--beta", "0.1", *flags])
    ref = torch.tensor([-11.0, -11.5]) if LOSSES[loss].reference else torch.zeros(2)
    p = torch.tensor([1 - (args.label_smoothing or 0.0)])
    x = completions(torch.tensor([-10.0, -12.0]), ref, torch.tensor([5.0, 8.0]), p, torch.tensor([0.0]), shift)
    return LOSSES[loss].function(x, args).item()


def test_golden_values():
    assert golden("dpo") == pytest.approx(0.620957, abs=1e-6)
    assert golden("dpo", "--label-smoothing", "0.1") == pytest.approx(0.635957, abs=1e-6)
    assert golden("robust", "--label-smoothing", "0.1") == pytest.approx(0.602207, abs=1e-6)
    assert golden("ipo") == pytest.approx(12.25) and golden("ipo", "--ipo-normalise", "mean") == pytest.approx(22.443909, abs=1e-5)
    assert golden("simpo", "--beta", "2", "--gamma", "1") == pytest.approx(2.126928, abs=1e-6)           # B8: 3.0486 if γ is a ratio
    assert golden("hinge") == pytest.approx(1 - 0.15) and golden("sppo") == pytest.approx((1 - 5) ** 2 + (-0.5 + 5) ** 2)
    assert golden("apo-zero") == pytest.approx(1 - 1 / (1 + math.exp(-0.1)) + 1 / (1 + math.exp(0.05)), abs=1e-6)


def test_golden_orpo():
    x = completions(torch.tensor([-10.0, -12.0]), torch.zeros(2), torch.tensor([5.0, 5.0]), torch.ones(1), torch.zeros(1))
    args = parse_args(["--loss", "orpo", "--beta", "1"])
    x.policy = torch.tensor([-10.0, -7.0])                   # mean log-probs −2 and −1.4, as in the published example of the ratio
    m_w, m_l = -2.0, -1.4
    log_odds = (m_w - math.log1p(-math.exp(m_w))) - (m_l - math.log1p(-math.exp(m_l)))
    assert LOSSES["orpo"].function(x, args).item() == pytest.approx(2.0 + math.log1p(math.exp(-log_odds)), abs=1e-5)


@pytest.mark.parametrize("mean_logp", [0.0, -1e-8, -1e-4, -1.0, -50.0])
def test_b9_orpo_is_finite_near_certainty(mean_logp):
    policy = torch.tensor([5 * mean_logp, -7.0], requires_grad=True)
    x = completions(policy, torch.zeros(2), torch.tensor([5.0, 5.0]), torch.ones(1), torch.zeros(1))
    loss = LOSSES["orpo"].function(x, parse_args(["--loss", "orpo"]))
    loss.backward()
    assert torch.isfinite(loss).all() and torch.isfinite(policy.grad).all()
    if mean_logp <= -1e-4:
        w, l = double([5 * mean_logp], [-7.0])               # noqa: E741
        n, = double([5.0])
        exact = formula("orpo", w, l, w * 0, w * 0, n, n, None, None, parse_args(["--loss", "orpo"]))
        assert loss.item() == pytest.approx(exact.item(), rel=1e-4)


def test_b10_kto_golden_and_detached_baseline():
    args = parse_args(["--loss", "kto", "--beta", "0.1"])
    z = max(0.0, (0.3 - 0.2 + 0.1) / 3)
    assert z == pytest.approx(0.0666667, abs=1e-6)
    D = torch.tensor([1.0, -0.5], requires_grad=True)
    x = Completions(D, torch.zeros(2), torch.ones(2), torch.tensor([True, False]), *[torch.zeros(0, dtype=torch.long)] * 2,
                    *[torch.zeros(0)] * 3, shift=z)
    losses = LOSSES["kto"].function(x, args)
    assert losses.tolist() == pytest.approx([0.476684, 0.485837], abs=1e-6)
    losses.sum().backward()
    s = [1 / (1 + math.exp(-0.1 * (d - z))) for d in (1.0, -0.5)]
    assert D.grad.tolist() == pytest.approx([-0.1 * s[0] * (1 - s[0]), 0.1 * s[1] * (1 - s[1])], abs=1e-7)
    weighted = parse_args(["--loss", "kto", "--desirable-weight", "2", "--undesirable-weight", "0.5"])
    assert LOSSES["kto"].function(x, weighted).tolist() == pytest.approx([2 * 0.476684, 0.5 * 0.485837], abs=1e-6)


def test_b10_no_completion_is_mismatched_with_its_own_prompt():
    groups = [common.Group("", f"p{i // 2}", ["x"], prompt_ids=[i // 2], completion_ids=[[10 + i] * 9], scores=[i % 2]) for i in range(7)]
    for seed in range(5):
        others = mismatch(groups, 6, seed)
        assert [o.prompt_ids for o in others] == [g.prompt_ids for g in groups]
        assert all((o.completion_ids[0][0] - 10) // 2 != g.prompt_ids[0] for o, g in zip(others, groups))
        assert all(len(o.completion_ids[0]) == 5 for o in others)        # what has no room is left out
    assert [o.completion_ids for o in mismatch(groups, 6, 0)] != [o.completion_ids for o in mismatch(groups, 6, 1)]
    with pytest.raises(SystemExit):
        mismatch(groups[:2], 6, 0)


def test_plackett_luce_of_two_is_dpo_and_of_equal_rewards_log_k_factorial():
    w, l, a, b, n, k, m = DATA                                           # noqa: E741
    one = torch.ones(1, dtype=torch.float64)
    args, plain = parse_args(["--loss", "plackett-luce"]), parse_args([])
    for i in range(3):
        x = completions(torch.stack([w[i], l[i]]), torch.stack([a[i], b[i]]), torch.ones(2), one, one)
        assert LOSSES["plackett-luce"].function(x, args).sum().item() == pytest.approx(LOSSES["dpo"].function(x, plain).item(), abs=1e-12)
    for count, value in ((2, 2), (3, 6), (4, 24)):           # with K = 3 there are as many pairs as completions
        ids, ranks = [[i] for i in range(count)], list(range(count, 0, -1))
        groups = [common.Group("", "p", ["x"] * count, scores=ranks, prompt_ids=[1], completion_ids=ids, index=list(range(count)))]
        loss, _ = micro_loss(torch.zeros(count), torch.zeros(count), 0.0, groups, args)
        assert loss.item() == pytest.approx(math.log(value), abs=1e-5)


def test_eq12_soft_gradient_is_minus_beta_times_p_minus_the_implied_win_rate():
    args = parse_args(["--loss", "soft", "--beta", "0.3"])
    w, l, a, b, n, k, m = DATA                                           # noqa: E741
    policy = torch.cat([w, l]).requires_grad_()
    x = completions(policy, torch.cat([a, b]), torch.cat([n, k]), sigma(m), m)
    LOSSES["soft"].function(x, args).sum().backward()
    size = -0.3 * (sigma(m) - sigma(0.3 * x.h.detach()))
    assert torch.allclose(policy.grad[:3], size) and torch.allclose(policy.grad[3:], -size)


@pytest.mark.parametrize("name", ["soft", "distill"])
def test_eq12_eq13_all_pairs_under_a_reward_reach_the_closed_form_optimum(name):
    """π* = π_ref e^{r/β}/Z on four completions: Z(x) never enters, and yet the minimum is (3)."""
    ref, reward = double([0.1, 0.2, 0.3, 0.4], [1.0, 0.0, -0.5, 0.3])
    args = parse_args(["--loss", name, "--beta", "0.5"])
    best = ref * torch.exp(reward / 0.5)
    best = best / best.sum()
    first, second = torch.combinations(torch.arange(4)).T
    logits = ref.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        gap = reward[first] - reward[second]
        x = Completions(logits.log_softmax(0), ref.log(), torch.ones(4), torch.zeros(4), first, second, sigma(gap), gap, torch.ones(6))
        loss = LOSSES[name].function(x, args).sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    assert torch.allclose(logits.softmax(0).detach(), best, atol=1e-6)


def test_robust_is_unbiased_under_flips():
    args = parse_args(["--loss", "robust", "--label-smoothing", "0.2"])
    one = torch.full((3,), 0.8, dtype=torch.float64)
    w, l, a, b, n, k, m = DATA                                           # noqa: E741
    right = LOSSES["robust"].function(completions(torch.cat([w, l]), torch.cat([a, b]), torch.cat([n, k]), one, m), args)
    flipped = LOSSES["robust"].function(completions(torch.cat([l, w]), torch.cat([b, a]), torch.cat([k, n]), one, m), args)
    clean = LOSSES["dpo"].function(completions(torch.cat([w, l]), torch.cat([a, b]), torch.cat([n, k]), one * 0 + 1, m), parse_args([]))
    assert torch.allclose(0.8 * right + 0.2 * flipped, clean)


def test_b5_ipo_mean_does_not_depend_on_length_and_sums_do():
    args = parse_args(["--loss", "ipo", "--ipo-normalise", "mean"])
    w, l, a, b, n, k, m = DATA                                           # noqa: E741
    once = completions(torch.cat([w, l]), torch.cat([a, b]), torch.cat([n, k]), m, m)
    twice = completions(2 * torch.cat([w, l]), 2 * torch.cat([a, b]), 2 * torch.cat([n, k]), m, m)
    assert torch.allclose(LOSSES["ipo"].function(once, args), LOSSES["ipo"].function(twice, args))
    sums = parse_args(["--loss", "ipo"])
    assert not torch.allclose(LOSSES["ipo"].function(once, sums), LOSSES["ipo"].function(twice, sums))


@pytest.mark.parametrize("name", PAIRWISE)
def test_b18_extreme_log_ratios_stay_finite(name):
    args = parse_args(["--loss", name])
    for far in (-2000.0, 2000.0):
        policy = torch.tensor([min(far, 0.0) - 1, min(-far, 0.0) - 1], requires_grad=True)
        ref = torch.tensor([-1.0, -1.0]) * LOSSES[name].reference
        x = completions(policy, ref, torch.tensor([3.0, 4.0]), torch.tensor([0.9]), torch.tensor([1.0]))
        loss = LOSSES[name].function(x, args)
        loss.sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(policy.grad).all()


def test_b6_losses_differ_in_value_and_gradient():
    w, l, a, b, n, k, m = DATA                                           # noqa: E741
    seen = {}
    for name in CASES.keys() - {"robust"}:                   # without flips it is dpo
        loss, args = case(name)
        policy = torch.cat([w, l]).requires_grad_()
        ref = torch.cat([a, b]) * LOSSES[loss].reference
        p = sigma(m) if loss == "soft" else torch.full((3,), 1 - (args.label_smoothing or 0.0), dtype=torch.float64)
        x = completions(policy, ref, torch.cat([n, k]), p, m, shift=-0.4)
        value = LOSSES[loss].function(x, args).sum()
        gradient, = torch.autograd.grad(value, policy)
        seen[name] = (round(value.item(), 6), tuple(round(g, 6) for g in gradient.tolist()))
    assert len({v for v, _ in seen.values()}) == len({g for _, g in seen.values()}) == len(CASES) - 1


# --- flags -----------------------------------------------------------------------------------------------------------------

VALUES = {"beta": "0.7", "label_smoothing": "0.1", "sft_coef": "0.2", "ref_model": "x", "reward_model": "x", "reward_temperature": "2.0",
          "gamma": "0.4", "ipo_normalise": "mean", "dpop_lambda": "3.0", "length_penalty": "0.1", "desirable_weight": "2.0",
          "undesirable_weight": "2.0"}


@pytest.mark.parametrize("name", LOSSES)
def test_b6_a_flag_that_the_loss_does_not_read_is_refused(name, capsys):
    assert {flag for row in LOSSES.values() for flag in row.flags} == set(VALUES)
    for flag, value in VALUES.items():
        given = ["--loss", name, "--" + flag.replace("_", "-"), value]
        if flag in LOSSES[name].flags:
            assert str(getattr(parse_args(given), flag)) == value
            continue
        with pytest.raises(SystemExit) as end:
            parse_args(given)
        said = capsys.readouterr().err.splitlines()[-1]
        assert end.value.code == 2 and name in said and "--" + flag.replace("_", "-") in said


# --- the step: micro-batches, packing, lists ---------------------------------------------------------------------------------

def toy_groups(name, n=8):
    """The first rows of the toy in very different lengths, as --loss NAME has them, and reference log-probs of all."""
    args = parse_args(["--loss", name])
    encoder = common.load_encoder(TOY / "model")
    groups, account = common.read_groups(TOY / "pairs.jsonl", PAIRS, limit=n)
    for i, g in enumerate(groups):
        g.completions[0] += " so it is" * (i % 4)
        g.completions[1] += " perhaps" * (i // 3)
        g.row |= {"score_chosen": 0.5 * i, "score_rejected": 1.0}
    groups = train_dpo.prepare(groups, account, args)
    if name == "plackett-luce" or name == "hinge":           # lists of three
        for i, g in enumerate(groups):
            g.completions.append("no" * (1 + i % 2))
            g.scores = [3, 2, 1]
    groups = common.tokenise(groups, account, encoder, 512)
    count = common.number_completions(groups)
    ref = -3.0 - torch.arange(count) % 7 if LOSSES[name].reference else torch.zeros(count)
    return encoder, groups, ref, args


def step_gradient(model, groups, ref, args, budget, packed=True):
    model.zero_grad()
    total = 0.0
    micros = common.micro_batches(groups, budget, packed)
    for micro in micros:
        logps = common.completion_logps(model, common.lay_out(model, micro, packed))
        loss, _ = micro_loss(logps, ref, 0.3, micro, args)
        (loss / normaliser(groups, args)).backward()
        total += loss.item() / normaliser(groups, args)
    gradient = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    return len(micros), total, gradient


@pytest.mark.parametrize("name", LOSSES)
def test_b15_neither_micro_batches_nor_packing_change_loss_or_gradient(name):
    encoder, groups, ref, args = toy_groups(name)
    model = common.load_model(TOY / "model", encoder, "cpu")
    budget = sum(g.tokens() for g in groups) // 2
    runs = [step_gradient(model, groups, ref, args, *layout) for layout in ((10 ** 9,), (budget,), (1,), (budget, False))]
    assert runs[0][0] == 1 and runs[2][0] == len(groups)
    for _, loss, gradient in runs[1:]:
        assert loss == pytest.approx(runs[0][1], rel=2e-5)
        assert (gradient - runs[0][2]).norm() < 3e-5 * runs[0][2].norm()


def test_lists_weigh_their_pairs_by_one_over_their_number():
    _, groups, ref, args = toy_groups("hinge")
    logps = -torch.arange(24.0).sqrt()
    loss, _ = micro_loss(logps, ref, 0.0, groups, args)
    total = 0.0
    for g in groups:
        ratio = (logps - ref)[g.index]
        each = [max(0.0, 1 - args.beta * (ratio[i] - ratio[j]).item()) for i, j in ((0, 1), (0, 2), (1, 2))]
        total += sum(each) / 3
    assert loss.item() == pytest.approx(total, rel=1e-5)


# --- the script ------------------------------------------------------------------------------------------------------------

def run(out, *flags):
    main(["--output-dir", str(out), "--limit", "60", "--batch-size", "8", "--eval-samples", "4", "--max-steps", "3", *map(str, flags)])
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The toy's pairs with all the columns that score.py writes; in a third of them the reward prefers `rejected`."""
    file = tmp_path_factory.mktemp("scored") / "p.jsonl"
    rows = [json.loads(line) for line in (TOY / "pairs.jsonl").read_text().splitlines()[:60]]
    lines = []
    for i, row in enumerate(rows):
        first = 1.0 + i % 3
        row |= {"score_chosen": first, "score_rejected": 1.5, "p_chosen": float(sigma(torch.tensor(first - 1.5)))}
        lines.append(json.dumps(row) + "\n")
    file.write_text("".join(lines))
    return file


@pytest.mark.parametrize("loss", ["soft", "distill"])
def test_the_completion_with_the_higher_reward_comes_first_whatever_else_the_row_says(loss, scored):
    groups, account = common.read_groups(str(scored), PAIRS)
    for g in train_dpo.prepare(groups, account, parse_args(["--loss", loss])):
        by_reward = {"chosen": g.row["score_chosen"], "rejected": g.row["score_rejected"]}
        best = max(by_reward, key=by_reward.get)
        assert g.completions[0] == g.row[best][0]["content"]
        assert g.p_chosen == pytest.approx(float(sigma(torch.tensor(abs(g.row["score_chosen"] - 1.5)))))


def test_p_chosen_of_a_list_is_refused_and_lists_without_a_winner_are_dropped(tmp_path, capsys):
    file = tmp_path / "lists.jsonl"
    best = {"prompt": "1+1", "completions": ["2", "3", "4"], "scores": [3, 2, 1]}
    equal = best | {"prompt": "1+2", "scores": [1, 1, 1]}
    file.write_text(json.dumps(best) + "\n" + json.dumps(equal) + "\n")
    groups, account = common.read_groups(str(file), ["ranked list"])
    assert len(train_dpo.prepare(groups, account, parse_args([]))) == 1
    assert account.dropped == {"where no completion is better than another": 1}

    file.write_text(json.dumps(best | {"p_chosen": 0.2}) + "\n")
    with pytest.raises(SystemExit):
        main(["--dataset", str(file), "--output-dir", str(tmp_path / "run")])
    assert "'p_chosen' belongs to a pair" in capsys.readouterr().err


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_on_the_toy(name, tmp_path, scored):
    data = ["--dataset", scored] if "reward_model" in LOSSES[name].flags else []
    lines = run(tmp_path / "o", "--loss", name, *data)
    assert all(math.isfinite(v) for m in lines for v in m.values())
    first, last = lines[0], lines[-1]
    assert first["eval/kl"] == 0 and last["eval/kl"] != 0 and "eval/chosen_change" in last
    assert last["eval/loss"] != first["eval/loss"]
    assert ("rewards/margins" in lines[1]) == (name not in ("kto", "sft"))


def test_bco_and_kto_resume_to_the_same_bits(tmp_path):
    for name in ("bco", "kto"):
        straight = run(tmp_path / name, "--loss", name, "--max-steps", 4)
        run(tmp_path / f"{name} 2", "--loss", name, "--max-steps", 2, "--lr-schedule", "constant")
        whole = run(tmp_path / f"{name} 4", "--loss", name, "--max-steps", 4, "--lr-schedule", "constant")
        resumed = run(tmp_path / f"{name} 2", "--loss", name, "--max-steps", 4, "--lr-schedule", "constant", "--resume")
        assert [m["loss"] for m in whole if "loss" in m] == [m["loss"] for m in resumed if "loss" in m] and straight
        assert (tmp_path / f"{name} 2/model.safetensors").read_bytes() == (tmp_path / f"{name} 4/model.safetensors").read_bytes()


def test_soft_with_sure_labels_is_dpo(tmp_path):
    rows = [json.loads(line) for line in (TOY / "pairs.jsonl").read_text().splitlines()[:60]]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r | {"p_chosen": 1.0}) + "\n" for r in rows))
    soft = run(tmp_path / "soft", "--loss", "soft", "--dataset", tmp_path / "p.jsonl")
    plain = run(tmp_path / "dpo")
    assert [m["loss"] for m in soft if "loss" in m] == [m["loss"] for m in plain if "loss" in m]


def test_soft_and_distill_need_rewards(tmp_path, capsys):
    for name in ("soft", "distill"):
        with pytest.raises(SystemExit) as end:
            run(tmp_path / "o", "--loss", name)
        said = capsys.readouterr().err
        assert end.value.code == 2 and "--reward-model" in said and "score_chosen" in said and "line 1" in said


def test_without_a_reference_none_is_measured_for_training(tmp_path, measured):
    run(tmp_path / "o", "--loss", "simpo")
    seen = [len(groups) for _, groups in measured]
    assert seen and max(seen) <= 6                           # held-out prompts only: 54 are trained on


def test_a_reward_model_labels_the_rows_that_a_step_uses(tmp_path, measured, capsys):
    torch.manual_seed(1)                                     # of its head: it ranks some pairs the other way
    judge = AutoModelForSequenceClassification.from_pretrained(TOY / "model", num_labels=1)
    judge.config.max_position_embeddings = 11
    judge.save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(tmp_path / "judge")
    flags = f"--loss soft --reward-model {tmp_path}/judge --reward-temperature 2 --max-steps 2 --batch-size 8 --save-every 1"
    flags = f"{flags} --limit 200 --eval-limit 10 --eval-samples 0 --output-dir {tmp_path}/run".split()
    train_dpo.main(flags)
    scored, groups = measured[0]
    assert scored == "reward_scores" and len(groups) == 2 * 8 + 10       # of about 200 rows
    assert "over the 11 positions of --reward-model" in capsys.readouterr().out

    # The label is σ((r_1 − r_2)/T), and the better completion comes first.
    encoder = common.load_encoder(tmp_path / "judge")
    model = common.load_reward_model(tmp_path / "judge", encoder, torch.device("cpu"))
    trained = measured[1][1]                                             # of these the reference's log-probs
    scores = common.reward_scores(model, common.pack(trained)).view(-1, 2).double()
    difference = scores[:, 0] - scores[:, 1]
    assert difference.min() >= 0
    assert torch.tensor([g.p_chosen for g in trained]).double().allclose((difference / 2).sigmoid(), atol=1e-4)
    swapped = sum(g.completions[0] != g.row["chosen"][0]["content"] for g in trained)
    assert 0 < swapped < len(trained)
    for g in trained:
        assert encoder(replace(g)).completion_ids == g.completion_ids    # text and ids have swapped together

    judge.score.weight.data *= 2
    judge.save_pretrained(tmp_path / "judge")
    with pytest.raises(SystemExit):
        train_dpo.main([*flags, "--resume", "--max-steps", "3"])
    assert "reward_model" in capsys.readouterr().err
