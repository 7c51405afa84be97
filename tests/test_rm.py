"""train_rm.py: every equation of its derivation, the loss against float64, the script as its user
meets it, and the same scores in plain transformers. a3 … d10 are traps."""
import json
import math
import statistics
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM,
    PreTrainedTokenizerFast, pipeline)

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import train_rm
from common import mean_and_error
from train_rm import calibrate, evaluate, length_curve, main, micro_loss, parse_args

TOY = Path(__file__).parent / "toy"
CPU = torch.device("cpu")
COMPARED = [name for name, row in train_rm.LOSSES.items() if "list" in row.gives]


def run(out, *flags):
    """The script on the toy: few steps → its lines of metrics, without the speed."""
    main(list(map(str, ["--output-dir", out, "--limit", 120, "--batch-size", 16, *flags])))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def refused(capsys, *flags):
    """The one sentence with which the script refuses its flags or data."""
    with pytest.raises(SystemExit) as end:
        main(list(map(str, flags)))
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def rows_of_the_toy(count):
    return [json.loads(line) for line in (TOY / "pairs.jsonl").read_text().splitlines()[:count]]


def group(scores, ids=None, prompt=1, **rest):
    """A group as the losses read it, of completions that all differ unless said."""
    ids = ids or [[k] for k in range(len(scores))]
    scores = list(scores)
    return common.Group("", [], scores=scores, prompt_ids=[prompt], completion_ids=ids, **rest)


def double(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def loss_of(name, rewards, scores=(1, 0), flags=(), **label):
    """The sum of the losses of B groups with rewards (B, K), all ranked by `scores`."""
    groups = [group(scores, **label) for _ in rewards]
    args = parse_args(["--loss", name, *flags])
    return micro_loss(rewards.flatten(), groups, args)[0]


# --- the derivation -------------------------------------------------------------------------------

def test_eq1_eq2_eq4_bradley_terry_is_a_softmax_over_two_scores_with_that_gradient():
    r = double([[2, 1], [-1, 4], [0.3, 0.3]]).requires_grad_()
    loss = loss_of("bradley-terry", r)
    assert torch.isclose(loss, -r.softmax(1)[:, 0].log().sum())
    size = 1 / (1 + (r[:, 0] - r[:, 1]).detach().exp())                                  # σ(−h)
    assert torch.allclose(torch.autograd.grad(loss, r)[0], torch.stack([-size, size], 1))
    for p in (1.0, 0.9, 0.3):
        equal = loss_of("bradley-terry", double([[3, 3]]), p_chosen=p)
        assert equal.item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("name", COMPARED)
def test_eq3_c8_a_constant_of_the_prompt_changes_nothing_and_far_scores_stay_finite(name):
    r = double([[0.3, -1, 2, 0.1], [1, 1, 5, -3]])
    constant = double([[-9], [40]])
    for scores in ([3, 1, 2, 0], [3, 3, 2, 0]):
        assert torch.allclose(loss_of(name, r, scores), loss_of(name, r + constant, scores))
    for far in (-2000.0, 2000.0):
        assert loss_of(name, double([[far, 0]])).isfinite()


def test_eq5_eq6_the_minimum_is_at_p_and_margins_exaggerate():
    """Without a margin σ(h) = p, so h is calibrated; with p = 0.9 and m = 1 it is 0.957."""
    def least(p, margin):
        h = torch.linspace(0, 6, 2401, dtype=torch.float64)
        r = torch.stack([h, 0 * h], 1).requires_grad_()
        slope, = torch.autograd.grad(
            loss_of("bradley-terry", r, p_chosen=p, margin=margin), r)
        return torch.sigmoid(h[slope[:, 0].abs().argmin()]).item()

    for p in (0.6, 0.9, 0.99):
        assert least(p, 0.0) == pytest.approx(p, abs=1e-3)
    assert least(0.9, 1.0) == pytest.approx(0.957, abs=1e-3)


def test_eq6_c9_margins():
    rewards = [[2, 1], [0, 1], [1, 1]]
    losses = [loss_of("bradley-terry", double([r]), margin=m) for r, m in zip(rewards, (0, 0.5, 1))]
    assert sum(losses) / 3 == pytest.approx(1.109312, abs=1e-6)          # 1.0670 is the broadcast
    for p in (0.0, 0.2, 1.0):                                # the same label the other way round
        one = loss_of("bradley-terry", double([[1.3, -0.4]]), p_chosen=p, margin=0.7)
        other = loss_of("bradley-terry", double([[-0.4, 1.3]]), p_chosen=1 - p, margin=0.7)
        assert torch.isclose(one, other)


@pytest.mark.parametrize("scores, count", [([4, 1, 3, 2], 6), ([4, 1, 4, 2], 5)])
def test_eq7_all_pairs_of_a_list_weighted_by_their_number(scores, count):
    r = [0.3, -1.0, 2.0, 0.1]
    terms = [math.log1p(math.exp(r[j] - r[i])) for i in range(4) for j in range(4)
             if scores[i] > scores[j]]
    loss = loss_of("bradley-terry", double([r]), scores)
    assert len(terms) == count and loss.item() == pytest.approx(sum(terms) / count)


def test_eq8_eq9_plackett_luce():
    pair = double([[1.3, -0.4], [0, 2]])
    assert torch.isclose(loss_of("plackett-luce", pair), loss_of("bradley-terry", pair))
    r = double([[0.3, -1, 2]])
    first = math.exp(2) / (math.exp(2) + math.exp(0.3) + math.exp(-1))
    second = math.exp(0.3) / (math.exp(0.3) + math.exp(-1))
    loss = loss_of("plackett-luce", r, [2, 1, 3])
    assert loss.item() == pytest.approx(-math.log(first * second))
    equal = loss_of("plackett-luce", double([[0] * 5]), [2, 1, 3, 5, 4])
    assert equal.item() == pytest.approx(math.log(120))
    tied = loss_of("plackett-luce", r, [1, 0, 1])            # each beats the last, none the other
    by_hand = [math.log1p(math.exp(-1 - x)) for x in (0.3, 2)]
    assert tied.item() == pytest.approx(sum(by_hand))


@pytest.mark.parametrize("name", COMPARED)
def test_eq5_eq8_the_minimum_on_labels_from_the_model_is_the_true_reward(name):
    """Every order of three with its Plackett–Luce probability; pairs of such orders follow (1)."""
    true = double([1, -0.5, 0.3])
    weights = []
    for order in permutations(range(3)):
        ranked = true[list(order)]
        weights.append(sum(ranked[k] - ranked[k:].logsumexp(0) for k in range(3)).exp())
    assert sum(weights).item() == pytest.approx(1)                       # (8) is a distribution
    r = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [r], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16,
        line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        total = 0.0
        for weight, order in zip(weights, permutations(range(3))):
            total = total + weight * loss_of(name, r[None], [-order.index(i) for i in range(3)])
        total.backward()
        return total

    optimizer.step(closure)
    assert torch.allclose(r.detach() - r.detach().mean(), true - true.mean(), atol=1e-5)


def test_eq10_a3_centring_moves_the_mean_of_a_prompt_and_leaves_its_differences():
    """For a pair c (r_w + r_l)²; in a list it has no gradient along any difference."""
    flags = ["--center-coef", "0.01"]

    def added(r, scores):
        return loss_of("bradley-terry", r, scores, flags) - loss_of("bradley-terry", r, scores)

    assert added(double([[1.5, 0.25]]), [1, 0]).item() == pytest.approx(0.01 * 1.75 ** 2)
    r = double([[9, 5, 4, 1]]).requires_grad_()
    gradient, = torch.autograd.grad(added(r, [4, 3, 2, 1]), r)
    assert gradient[0].tolist() == pytest.approx([0.01 * 2 * 4.75] * 4)
    assert added(double([[3, 1, -1, -3]]), [4, 3, 2, 1]).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_eq11_pointwise_is_the_cross_entropy_and_auc_that_of_all_pairs(smoothing):
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(30, generator=generator).round(decimals=1).double()  # with ties
    labels = (torch.rand(30, generator=generator) < 0.4).long().tolist()
    groups = [group([label], prompt=i) for i, label in enumerate(labels)]
    args = parse_args(["--loss", "pointwise", "--label-smoothing", str(smoothing)])
    loss, sums = micro_loss(r, groups, args)
    p = double([1 - smoothing if label else smoothing for label in labels])
    exact = torch.nn.functional.binary_cross_entropy_with_logits(r, p, reduction="sum")
    assert loss.item() == pytest.approx(exact.item())
    assert micro_loss(1e4 * r, groups, args)[0].isfinite()
    result = evaluate(groups, [[x] for x in r.tolist()], args)
    good = [x for x, label in zip(r.tolist(), labels) if label]
    bad = [x for x, label in zip(r.tolist(), labels) if not label]
    auc = statistics.mean([0.5 * (1 + (a > b) - (a < b)) for a in good for b in bad])
    right = statistics.mean([0.5 * (1 + (x > 0) - (x < 0)) for x in good + [-x for x in bad]])
    assert result["eval/auc"] == pytest.approx(auc) and result["eval/n"] == 30
    assert result["eval/rewards/accuracies"] == pytest.approx(right)
    assert sums["rewards/accuracies"] == pytest.approx(30 * right)


def test_a5_the_accuracy_that_agreement_allows():
    """Two people agree in 65 to 75 %: a = q² + (1 − q)², so a perfect model gets 77 to 85 %."""
    text = Path(train_rm.__file__).read_text()
    bounds = [round(100 * (0.5 + math.sqrt((a - 0.5) / 2))) for a in (0.65, 0.75)]
    assert "65 to 75 %" in text and f"{bounds[0]} to {bounds[1]} %" in text


# --- a step ---------------------------------------------------------------------------------------

def toy_groups(kind="pair", flags=()):
    """→ (args, encoder, groups): pairs, or lists of 2 to 5 (some tied), of different lengths."""
    args = parse_args(["--limit", "8", *flags])
    encoder = common.load_encoder(args.model, args, to_last_token=True)
    groups, *_ = common.read_groups(args.dataset, "train", ["pair"], args)
    ranks = [[1, 0], [0.5, 2, 1], [3, 3, 1, 2], [1, 2, 3, 4, 4]]
    for i, g in enumerate(groups):
        g.completions[0] += " so it is" * (i % 4)
        g.completions[1] += " perhaps" * (i // 3)
        if kind == "list":
            g.completions += ["a few", "none" * 9, "well, 12"][:i % 4]
            g.scores = ranks[i % 4]
    return args, encoder, common.tokenise(groups, encoder, 512)


def reward_model(encoder):
    torch.manual_seed(0)
    model = train_rm.load_reward_model(TOY / "model", encoder, CPU, new_head=True)
    model.score.weight.data *= 5                             # scores that really differ
    return model


def forward(model, groups, packed):
    return train_rm.reward_scores(model, common.lay_out(model, groups, packed))


def gradient_of(model):
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


CASES = {                                                    # kind of group, flags
    "pairs": ("pair", []),
    "label smoothing": ("pair", ["--label-smoothing", "0.1"]),
    "p_chosen and margin": ("pair", []),
    "centred": ("pair", ["--center-coef", "0.5"]),
    "lists": ("list", ["--label-smoothing", "0.1", "--center-coef", "0.1"]),
    "lists, PL, centred": ("list", ["--loss", "plackett-luce", "--center-coef", "0.1"])}


def case(name):
    args, encoder, groups = toy_groups(*CASES[name])
    if name == "p_chosen and margin":
        for i, g in enumerate(groups):
            g.p_chosen = [0.7, None][i % 2]
            g.margin = [0.6, 0.0, 1.0][i % 3]
    return args, encoder, groups


@pytest.mark.parametrize("name", CASES)
def test_b15_step_loss_and_gradient_against_float64_however_it_is_cut(name):
    """From ids to the gradient, against the plain model, one completion at a time, written out."""
    args, encoder, groups = case(name)
    model = reward_model(encoder)
    exact = AutoModelForSequenceClassification.from_pretrained(
        TOY / "model", num_labels=1, dtype=torch.float64)
    exact.score.weight.data = model.score.weight.data.double()
    expected = 0.0
    for g in groups:
        r = []
        for ids in g.completion_ids:
            hidden = exact.model(torch.tensor([g.prompt_ids + ids])).last_hidden_state
            r.append(exact.score(hidden[0, -1])[0])
        pairs = [(i, j) for i, a in enumerate(g.scores) for j, b in enumerate(g.scores) if a > b]
        p = 1 - args.label_smoothing if g.p_chosen is None else g.p_chosen
        for i, j in pairs if args.loss == "bradley-terry" else ():
            right = torch.log(1 + (g.margin - r[i] + r[j]).exp())
            wrong = torch.log(1 + (g.margin + r[i] - r[j]).exp())
            expected = expected + (p * right + (1 - p) * wrong) / len(pairs)
        for i in range(len(r)) if args.loss == "plackett-luce" else ():
            left = [r[i].exp()] + [r[b].exp() for a, b in pairs if a == i]
            expected = expected - torch.log(left[0] / sum(left))
        expected = expected + args.center_coef * (2 * sum(r) / len(r)) ** 2
    expected.backward()

    counts = []
    metrics = []                                             # d7: means over all rows
    total = sum(g.tokens() for g in groups)
    for budget in (10 ** 9, (2 * total) // 3, 1):
        model.zero_grad()
        sums = Counter()
        micros = common.micro_batches(groups, budget)
        for micro in micros:
            part, part_sums = micro_loss(forward(model, micro, True), micro, args)
            part.backward()
            sums.update(part_sums)
        counts.append(len(micros))
        metrics.append({name: value / len(groups) for name, value in sums.items()})
        assert metrics[-1]["loss"] == pytest.approx(expected.item() / len(groups), rel=1e-5)
        assert metrics[-1] == pytest.approx(metrics[0], abs=1e-5)
        theirs = gradient_of(exact)                          # 7e-5: torch's fast exp in attention
        assert (gradient_of(model) - theirs).norm() < 3e-4 * theirs.norm()
    assert counts[0] == 1 < counts[1] < counts[2] == 8


def test_pairs_of_a_list_are_neither_ties_nor_equal_ids():
    pairs = common.compare([group([0, 1]), group([2, 1, 1, 0], [[5], [6], [7], [5]])])
    assert list(zip(pairs.better.tolist(), pairs.worse.tolist())) == [
        (1, 0), (2, 3), (2, 4), (3, 5), (4, 5)]              # 2 and 5 say the same
    assert pairs.weight.tolist() == [1, 0.25, 0.25, 0.25, 0.25]
    assert pairs.group.tolist() == [0, 1, 1, 1, 1]


def test_c1_c6_a_score_is_the_same_packed_padded_alone_shuffled_and_beside_a_long_neighbour():
    args, encoder, groups = toy_groups("list")
    model = reward_model(encoder)
    eos = encoder.tokenizer.eos_token_id
    groups[3].completion_ids[0] = groups[3].completion_ids[0][:-1] * 9 + [eos]
    groups[2].prompt_ids = groups[2].prompt_ids + [eos] + groups[2].prompt_ids
    alone = []
    for g in groups:
        one = [common.Group("", [], prompt_ids=g.prompt_ids, completion_ids=[ids])
               for ids in g.completion_ids]
        alone.append([forward(model, [x], False).item() for x in one])
    for order in ([0, 1, 2, 3, 4, 5, 6, 7], [5, 2, 7, 3, 0, 6, 1, 4], [3, 2]):
        for packed in (True, False):
            scores = forward(model, [groups[i] for i in order], packed).tolist()
            assert scores == pytest.approx([s for i in order for s in alone[i]], abs=1e-5)
    args.micro_batch_tokens = 40
    autocast = torch.autocast("cpu", enabled=False)
    scores = common.for_all(train_rm.reward_scores, model, groups, args, True, autocast)
    for some, those in zip(scores, alone):
        assert some == pytest.approx(those, abs=1e-5)

    with torch.autocast("cpu", torch.bfloat16):                                          # c7
        scores = forward(model, groups, True)
    assert scores.dtype == torch.float32 and len(set(scores.tolist())) == len(scores)


# --- evaluation -----------------------------------------------------------------------------------

def test_evaluation_by_hand():
    """Four pairs with lengths (1, 2), (2, 1), (1, 3), (4, 1) and h = 1, −2, 0, 1.1."""
    lengths = [(1, 2), (2, 1), (1, 3), (4, 1)]
    groups = [group([1, 0], [[5] * a, [6] * b], a) for a, b in lengths]
    for i, g in enumerate(groups):
        g.prompt_ids = [i]
    scores = [[2.0, 1.0], [0.0, 2.0], [1.0, 1.0], [3.1, 2.0]]
    result = evaluate(groups, scores, parse_args([]))
    assert result["eval/n"] == 4 and result["eval/rewards/accuracies"] == 0.625
    variance = statistics.pvariance([1, 0, 0.5, 1])                      # Wilson's, z = 1
    assert result["eval/accuracy_se"] == pytest.approx(math.sqrt(variance / 4 + 1 / 64) / 1.25)
    h = [1, -2, 0, 1.1]
    assert result["eval/loss"] == pytest.approx(sum(math.log1p(math.exp(-x)) for x in h) / 4)
    one, two, _, four = [1 / (1 + math.exp(-abs(x))) for x in h]         # 1 and 1.1 share a bin
    ece = abs(1 - one + 1 - four) + abs(0 - two) + abs(0.5 - 0.5)
    assert result["eval/ece"] == pytest.approx(ece / 4)
    assert result["eval/accuracy_longer"] == 0.5 and result["eval/accuracy_shorter"] == 0.75
    assert result["eval/length_accuracy"] == 0.5
    r = double(scores).flatten()
    n = double(lengths).flatten()
    assert result["eval/score_std"] == pytest.approx(r.std(correction=0).item())
    correlation = statistics.correlation(r.tolist(), n.tolist())
    assert result["eval/length_correlation"] == pytest.approx(correlation)


def test_a4_of_lists_all_pairs_are_counted_and_the_error_counts_prompts():
    groups = [group([3, 2, 1]), group([1, 0], prompt=2)]
    result = evaluate(groups, [[1.0, 3.0, 2.0], [1.0, 0.0]], parse_args([]))
    assert result["eval/n"] == 4
    assert result["eval/rewards/accuracies"] == pytest.approx((1 / 3 + 1) / 2)
    error = math.sqrt((1 / 3) ** 2 / 2 + 1 / 16) / 1.5
    assert result["eval/accuracy_se"] == pytest.approx(error)


def test_c10_constant_scores_have_accuracy_one_half():
    result = evaluate([group([1, 0])] * 3, [[3.0, 3.0]] * 3, parse_args([]))
    assert result["eval/rewards/accuracies"] == 0.5 and result["eval/ece"] == 0
    assert result["eval/loss"] == pytest.approx(math.log(2))


def test_a4_mean_and_error():
    error = statistics.stdev([1, 2, 6]) / math.sqrt(3)
    assert mean_and_error([1, 2, 6], "abc") == pytest.approx((3, error))
    assert mean_and_error([4.0], "a") == (4, 0)
    ten = [1, 0, 1, 1, 0.5, 0, 1, 1, 1, 0]
    for proportion in (False, True):                         # copies are no new evidence
        once = mean_and_error(ten, range(10), proportion)
        assert mean_and_error(ten * 7, [*range(10)] * 7, proportion) == pytest.approx(once)
    mean, error = mean_and_error([1, 1, 0, 1], [[5, 6], [5, 6], [5, 6], [7]])
    assert mean == pytest.approx(5 / 6) and error == pytest.approx(1 / 6)
    for value in (0, 1):                                     # Wilson's is not 0 at 100 %
        assert mean_and_error([value] * 50, range(50), True) == pytest.approx((value, 0.5 / 51))
    half = mean_and_error([0, 1] * 100, range(200), True)
    assert half[1] == pytest.approx(math.sqrt(0.25 / 200), rel=0.01)
    assert mean_and_error([1, 1, 0], "aaa", True)[1] >= 0.25             # one observation


@pytest.mark.parametrize("K", [2, 6])
def test_a4_the_error_covers_where_pairs_of_a_list_belong_together(K):
    """Right or wrong for all pairs of lists of K, by a score whose noise differs from list to list:
    two errors around the mean hold the truth in 95 % of experiments with 100 prompts."""
    generator = torch.Generator().manual_seed(K)
    i, j = torch.triu_indices(K, K, 1)

    def lists(prompts):
        true, error = torch.randn(2, prompts, K, generator=generator)
        said = true + error * (0.5 + torch.rand(prompts, 1, generator=generator))
        return ((true[:, i] > true[:, j]) == (said[:, i] > said[:, j])).double()

    truth = lists(50_000).mean().item()
    hits = Counter()
    for _ in range(300):
        values = lists(100)
        prompts = torch.arange(100).repeat_interleave(values.shape[1]).tolist()
        for name, owner in (("prompts", prompts), ("pairs", range(len(prompts)))):
            mean, error = mean_and_error(values.flatten(), owner, proportion=True)
            hits[name] += abs(mean - truth) < 1.96 * error
    assert 0.91 <= hits["prompts"] / 300 <= 0.98
    assert K == 2 or hits["pairs"] / 300 < 0.9               # each pair alone: far too narrow


def test_length_curve_is_the_mean_score_of_equally_full_bins_of_lengths():
    lengths = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).double() + 1
    scores = torch.randn(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    by_length = scores[lengths.argsort()].view(10, 100).mean(1)          # each length once
    curve = length_curve(scores, lengths, bins=10)
    assert curve == [pytest.approx([50.5 + 100 * i, by_length[i].item()]) for i in range(10)]
    assert len(length_curve(scores, lengths)) == 50
    common_ones = length_curve(double([1, 2, 3, 6, 6, 6]), double([3, 3, 2, 7, 7, 7]))
    assert common_ones == [[2, 3], [3, 1.5], [7, 6]]         # a bin of its own each


def test_calibrated_scores_do_not_depend_on_length_and_keep_all_else():
    straight = calibrate([5.0] * 4, [1, 2, 3, 9], [[2, 1.0], [4, 3.0]], 2.0)
    assert straight.tolist() == [6, 6, 5, 4]                 # constant beyond the knots
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (5000,), generator=generator).double()
    noise = 0.3 * torch.randn(5000, generator=generator, dtype=torch.float64)
    scores = (lengths / 30).sin() + lengths / 60 + noise     # bent: no line would do
    result = calibrate(scores, lengths, length_curve(scores, lengths), scores.mean())
    for some in lengths.argsort().split(500):
        assert result[some].mean().item() == pytest.approx(scores.mean().item(), abs=0.06)
    assert statistics.correlation(result.tolist(), noise.tolist()) > 0.99


# --- the script -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    return out, run(out, "--max-steps", 6, "--eval-every", 3)


def test_metrics_and_all_tensors_change(straight, capsys):
    out, lines = straight
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert set(lines[1]) == {
        "step", "loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected",
        "rewards/margins", "rewards/accuracies"}
    assert lines[0]["eval/loss_expected"] == pytest.approx(math.log(2))
    assert "(0.6931 if all scores were equal)" in train_rm.eval_line(
        0, {"eval/accuracy_shorter": math.nan, "eval/accuracy_longer": math.nan} | lines[0])
    args = parse_args([])
    encoder = common.load_encoder(out, args, to_last_token=True)
    torch.manual_seed(0)
    before = train_rm.load_reward_model(TOY / "model", encoder, CPU, new_head=True).state_dict()
    after = train_rm.load_reward_model(out, encoder, CPU).state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)            # d4
    assert encoder.tokenizer.pad_token == "<pad>"            # it was none of the ends: kept


def test_saved_config_keeps_the_statistics_of_the_training_completions(straight):
    out, _ = straight
    args = parse_args(["--limit", "120", "--batch-size", "16", "--max-steps", "6"])
    encoder = common.load_encoder(out, args, to_last_token=True)
    model = train_rm.load_reward_model(out, encoder, CPU)
    train, _, _ = common.load_data(args, encoder, ["pair"])
    train = [train[i] for step in common.make_plan(len(train), args) for i in step]
    with torch.no_grad():
        scores = forward(model, train, False).double()
    lengths = double([len(ids) for g in train for ids in g.completion_ids])
    config = model.config
    assert config.reward_mean == pytest.approx(scores.mean().item(), abs=1e-5)
    assert config.reward_std == pytest.approx(scores.std(correction=0).item(), abs=1e-5)
    knots, values = zip(*config.reward_by_length)
    assert list(knots) == lengths.unique().tolist()
    assert list(values) == pytest.approx([scores[lengths == n].mean().item() for n in knots])
    rest = calibrate(scores, lengths, config.reward_by_length, config.reward_mean)
    assert config.reward_std_calibrated == pytest.approx(rest.std(correction=0).item(), abs=1e-5)


def test_d2_d10_resumed_is_bit_equal_and_another_seed_another_head(straight, tmp_path, monkeypatch):
    def die(out, model, optimizer, step, extra, save=common.save_checkpoint):
        save(out, model, optimizer, step, extra)
        raise RuntimeError("killed")

    monkeypatch.setattr(common, "save_checkpoint", die)
    flags = ["--max-steps", 6, "--eval-every", 3]
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "o", *flags, "--save-every", 2)
    monkeypatch.undo()
    assert run(tmp_path / "o", *flags, "--resume", "--save-every", 2) == straight[1]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "o" / name).read_bytes() == (straight[0] / name).read_bytes()
    other = run(tmp_path / "other", "--max-steps", 1, "--seed", 1)
    assert other[0]["eval/score_mean"] != straight[1][0]["eval/score_mean"]


def test_a_reward_model_keeps_its_head_and_one_of_two_outputs_is_refused(
        straight, tmp_path, capsys):
    lines = run(tmp_path / "on", "--model", straight[0], "--max-steps", 1)
    assert lines[0]["eval/loss"] == pytest.approx(straight[1][-1]["eval/loss"], abs=1e-5)
    two = AutoModelForSequenceClassification.from_pretrained(TOY / "model", num_labels=2)
    two.save_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(tmp_path / "two")
    assert "two" in refused(                                                             # c3
        capsys, "--model", tmp_path / "two", "--output-dir", tmp_path / "o", "--limit", 50)
    args = parse_args([])
    encoder = common.load_encoder(args.model, args)
    with pytest.raises(SystemExit):                                                      # c4
        train_rm.load_reward_model(args.model, encoder, CPU)
    assert "is no reward model" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMPARED)
def test_ranked_lists_are_learnt_and_lists_without_a_winner_dropped(name, tmp_path, capsys):
    rows = []
    for i in range(60):
        k = 3 + i % 2
        rows.append({"prompt": f"{i}", "completions": ["999", "55", "1", "11"][:k],
                     "scores": [3, 2, 1, 1][:k]})
    rows.append({"prompt": "tied", "completions": ["a", "b"], "scores": [1, 1]})
    data = write(tmp_path / "lists.jsonl", rows)
    lines = run(tmp_path / "o", "--dataset", data, "--epochs", 6, "--lr", 1e-3, "--loss", name)
    said = capsys.readouterr().out
    assert "kept 60" in said and "1 where no completion is better than another" in said
    assert lines[-1]["eval/rewards/accuracies"] > 0.9
    assert lines[-1]["eval/loss"] < lines[0]["eval/loss"]


def test_c9_margins_of_the_data_reach_the_loss_and_a_missing_one_is_zero(tmp_path):
    """One step of the script: the loss is that of its scores before it, with the file's margins."""
    rows = rows_of_the_toy(16)
    margins = [2.0, None, "1.5", ""] + [0.5] * 12
    data = write(tmp_path / "m.jsonl", [row | {"margin": m} for row, m in zip(rows, margins)])
    lines = run(tmp_path / "o", "--dataset", data, "--eval-fraction", 0, "--max-steps", 1)
    args = parse_args(["--dataset", str(data)])
    encoder = common.load_encoder(args.model, args, to_last_token=True)
    torch.manual_seed(0)
    model = train_rm.load_reward_model(args.model, encoder, CPU, new_head=True)
    groups, *_ = common.read_groups(args.dataset, "train", ["pair"], args)
    scores = forward(model, common.tokenise(groups, encoder, 512), True).view(-1, 2)
    m = torch.tensor([float(m or 0) for m in margins])
    expected = (m - scores[:, 0] + scores[:, 1]).exp().log1p()           # −log σ(h − m)
    assert lines[0]["loss"] == pytest.approx(expected.mean().item(), abs=1e-5)


def test_pointwise_labels_train_a_verifier(tmp_path, capsys):
    rows = []
    for row in rows_of_the_toy(300):
        for name in ("chosen", "rejected"):
            rows.append({"prompt": row["prompt"], "completion": row[name],
                         "label": name == "chosen"})
    data = write(tmp_path / "labelled.jsonl", rows)
    lines = run(tmp_path / "o", "--dataset", data, "--limit", 0, "--loss", "pointwise",
                "--lr", 1e-3, "--max-steps", 40)
    assert lines[-1]["eval/rewards/accuracies"] > 0.8 and lines[-1]["eval/auc"] > 0.9
    assert lines[-1]["eval/n"] == 60 and "AUC" in capsys.readouterr().out
    refusal = refused(capsys, "--dataset", data, "--output-dir", tmp_path / "no")
    assert "chosen" in refusal


ROW = {"prompt": "1+1", "chosen": "2", "rejected": "3"}
LIST = {"prompt": "1+1", "completions": ["2", "3"], "scores": [1, 0]}


@pytest.mark.parametrize("row, flags, words", [
    ({"prompt": "1+1", "response": "2"}, [], ["response", "chosen"]),
    (ROW | {"margin": "much"}, [], ["line 1", "margin", "much"]),
    (ROW | {"p_chosen": 1.5}, [], ["line 1", "p_chosen"]),
    (LIST | {"scores": [1, 1]}, [], ["no rows are left"]),
    (LIST | {"scores": [1]}, [], ["line 1", "same length"]),
    (ROW, ["--loss", "plackett-luce", "--label-smoothing", "0.1"], ["--label-smoothing"]),
    (ROW, ["--loss", "pointwise", "--center-coef", "0.1"], ["--center-coef"]),
    (ROW, ["--loss", "brad"], ["--loss", "bradley-terry"]),
    (ROW, ["--label-smoothing", "0.5"], ["--label-smoothing"]),
    (ROW, ["--eval-samples", "3"], ["--eval-samples"])])
def test_bad_input_ends_in_one_sentence(row, flags, words, capsys, tmp_path):
    data = write(tmp_path / "rows.jsonl", [row])
    said = refused(capsys, "--dataset", data, *flags, "--output-dir", tmp_path / "out")
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()                   # before anything is made


# --- the same scores in plain transformers --------------------------------------------------------

CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ROLES = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
         "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def tokeniser(special, template, eos):
    """One token a character; EOS is the pad token, too."""
    letters = ["\n"] + [chr(c) for c in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate(special + letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token=eos, chat_template=template,
        extra_special_tokens=special)


CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML, "<|im_end|>"
PLAIN = ["<|endoftext|>"], None, "<|endoftext|>"
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3)


@pytest.mark.parametrize(
    "given, pad", [(CHAT, "<|endoftext|>"), (PLAIN, "<|pad|>")], ids=["chat", "plain"])
def test_c1_c5_a_saved_model_gives_the_same_scores_in_plain_transformers(given, pad, tmp_path):
    """On the text that the template writes, to its last newline, or on text + EOS: alone, in a
    padded batch, and in a pipeline. transformers looks for the last token that is not the pad."""
    chat = given == CHAT
    before = tokeniser(*given)
    before.save_pretrained(tmp_path / "lm")
    torch.manual_seed(0)
    ids = {"eos_token_id": before.eos_token_id, "pad_token_id": before.eos_token_id}
    config = LlamaConfig(vocab_size=len(before), **SMALL, **ids)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    rows = rows_of_the_toy(24)
    for row in () if chat else rows:
        row["prompt"] = row["prompt"][0]["content"] + "="
        row["chosen"] = row["chosen"][0]["content"]
        row["rejected"] = row["rejected"][0]["content"] * 3
    out = tmp_path / "rm"
    data = write(tmp_path / "d.jsonl", rows)
    run(out, "--model", tmp_path / "lm", "--dataset", data, "--max-steps", 2, "--eval-fraction", 0)

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert model.score.out_features == 1 and tokenizer.pad_token == pad != tokenizer.eos_token
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    args = parse_args(["--dataset", str(data)])
    encoder = common.load_encoder(out, args, to_last_token=True)
    groups, *_ = common.read_groups(args.dataset, "train", ["pair"], args)
    groups = common.tokenise(groups, encoder, 64)
    with torch.no_grad():
        ours = forward(train_rm.load_reward_model(out, encoder, CPU), groups, True).tolist()
    assert statistics.pstdev(ours) > 0.02
    mean = model.config.reward_mean                          # as the training saw them
    assert mean == pytest.approx(statistics.fmean(ours), abs=1e-4)

    texts = []
    for g in groups:
        for text in g.completions:
            if chat:
                dialogue = g.prompt + [{"role": "assistant", "content": text}]
                texts.append(tokenizer.apply_chat_template(dialogue, tokenize=False))
            else:
                texts.append(g.prompt + text + tokenizer.eos_token)
    ids = tokenizer(texts[0])["input_ids"]
    assert ids == groups[0].prompt_ids + groups[0].completion_ids[0]
    assert tokenizer.decode(ids).endswith("<|im_end|>\n" if chat else "<|endoftext|>")
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        padded = model(**batch).logits[:, 0].tolist()
        alone = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    classifier = pipeline("text-classification", model=str(out), device="cpu")
    labelled = classifier(texts, function_to_apply="none", batch_size=4)
    for theirs in (padded, alone, [one["score"] for one in labelled]):
        assert theirs == pytest.approx(ours, abs=1e-4)


@pytest.mark.parametrize("given, pad, rows", [               # rows of the embeddings beyond the ids
    (CHAT, "<|endoftext|>", 0),
    (PLAIN, "<|pad|>", 0),
    (PLAIN, "<|pad|>", 30),                                  # room enough: not resized
    ((["<|im_start|>", "<|im_end|>"], CHATML, "<|im_end|>"), "<|pad|>", 0),
    ((["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], ROLES, "<|end|>"), "<|pad|>", 0)])
def test_the_pad_token_is_none_that_the_template_writes(given, pad, rows):
    tokenizer = tokeniser(*given)
    size = len(tokenizer) + rows
    config = LlamaConfig(vocab_size=size, **SMALL, num_labels=1)
    args = SimpleNamespace(chat=False, chat_template_kwargs={})
    encoder = common.Encoder(tokenizer, args, config, None, None, to_last_token=True)
    model = AutoModelForSequenceClassification.from_config(config)
    train_rm.set_pad_token(model, encoder)
    assert tokenizer.pad_token_id == model.config.pad_token_id not in encoder.stops
    turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    if given[1]:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        assert tokenizer.pad_token not in text, "the template writes it"
    assert tokenizer.pad_token == pad
    embeddings = model.get_input_embeddings().weight.shape[0]
    assert embeddings == max(size, len(tokenizer)) == model.config.vocab_size


def test_lora_trains_the_adapter_and_the_head_and_saves_a_plain_checkpoint(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    trained = []

    def save(out, model, *rest, save_model=common.save_model):
        trained.append(model)
        save_model(out, model, *rest)

    monkeypatch.setattr(common, "save_model", save)
    out = tmp_path / "o"
    run(out, "--lora-rank", 4, "--lr", 1e-2, "--max-steps", 3)
    names = [name for name, p in trained[0].named_parameters() if p.requires_grad]
    assert all(".lora_" in name or name == "score.weight" for name in names)
    assert "score.weight" in names and (out / "adapter/adapter_config.json").exists()
    args, _, groups = toy_groups()
    encoder = common.load_encoder(out, args, to_last_token=True)
    with torch.no_grad():
        now = forward(trained[0], groups, True)
        saved = forward(train_rm.load_reward_model(out, encoder, CPU), groups, True)
        start = forward(reward_model(encoder), groups, True) / 5
    assert torch.allclose(saved, now, atol=1e-4) and (start - now).abs().max() > 0.1
