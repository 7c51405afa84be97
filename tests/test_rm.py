"""train_rm.py: every equation of its derivation, the loss against float64, and the script as its user meets it."""
import json
import math
import socket
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import train_rm
from train_rm import Completions, evaluate, main, micro_loss

TOY = Path(__file__).parent / "toy"
PAIRS = [name for name, row in common.FORMATS.items() if row.gives == "pair"]
COMPARED = [name for name, row in train_rm.LOSSES.items() if "list" in row.gives]    # losses of comparisons


def run(out, *flags):
    """The script on the toy: few steps. Returns the metrics lines."""
    main(["--output-dir", str(out), "--limit", "300", "--batch-size", "16", *map(str, flags)])
    return metrics(out)


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def refused(capsys, *flags):
    """The one sentence with which the script refuses its flags or data."""
    with pytest.raises(SystemExit) as end:
        main(list(map(str, flags)))
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def loss_of(name, rewards, scores=(1, 0), p=1.0, margin=0.0):
    """A loss of B lists that are all ranked by `scores` (without them: pairs, the chosen one first) → (B,).

    rewards: (B, K) or (K,); p and margin: one number or (B,).
    """
    rewards = torch.as_tensor(rewards) if isinstance(rewards, torch.Tensor) else torch.tensor(rewards).double()
    rewards = rewards if rewards.dim() == 2 else rewards[None]
    B, K = rewards.shape
    order = [(i, j) for i in range(K) for j in range(K) if scores[i] > scores[j]]
    owner = torch.arange(B).repeat_interleave(len(order))                                # (M,)
    chosen = owner * K + torch.tensor([i for i, _ in order] * B)
    rejected = owner * K + torch.tensor([j for _, j in order] * B)
    p = torch.as_tensor(p, dtype=rewards.dtype).expand(B)[owner]
    margin = torch.as_tensor(margin, dtype=rewards.dtype).expand(B)[owner]
    weight = torch.full((len(owner),), 1 / len(order), dtype=rewards.dtype)
    x = Completions(rewards.flatten(), chosen, rejected, p, margin, weight)
    losses = train_rm.LOSSES[name].function(x, None)                                     # (M,) or (K,)
    if train_rm.LOSSES[name].per == "pairs":
        losses = losses * weight
    return losses.view(B, -1).sum(1)


def bradley_terry(rewards, *scores, **labels):
    return loss_of("bradley-terry", rewards, *scores, **labels)


def plackett_luce(rewards, *scores):
    return loss_of("plackett-luce", rewards, *scores)


def group(scores, completion_ids, prompt_ids=(1,)):
    """A group as the losses read it."""
    return common.Group("", "", [], scores=scores, prompt_ids=list(prompt_ids), completion_ids=completion_ids)


def forward(model, groups, packed):
    """Scores of all completions: (K,)."""
    return common.reward_scores(model, common.lay_out(model, groups, packed))


# --- the derivation, equation by equation -----------------------------------------------------------------------------

def test_eq1_bradley_terry_is_a_softmax_over_two_scores():
    r = torch.tensor([[2.0, 1.0], [-1.0, 4.0], [0.3, 0.3]], dtype=torch.float64)
    assert torch.allclose(bradley_terry(r), -r.softmax(1)[:, 0].log())


def test_eq2_loss_is_log2_where_scores_are_equal():
    for p in (1.0, 0.9, 0.3):
        assert bradley_terry([[3.0, 3.0], [-70.0, -70.0]], p=p).tolist() == pytest.approx([0.693147] * 2, abs=1e-6)


@pytest.mark.parametrize("name", COMPARED)
def test_eq3_c8_a_constant_of_the_prompt_changes_nothing(name):
    r = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f = torch.tensor([[1.0], [-9], [0], [40], [3]])
    assert torch.allclose(loss_of(name, r), loss_of(name, r + f))
    ranked = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(loss_of(name, ranked, [3, 1, 2, 0]), loss_of(name, ranked - 7, [3, 1, 2, 0]))


def test_eq4_gradient_is_minus_sigma_of_minus_h():
    r = torch.tensor([[1.0, 3.0], [0.2, 0.2], [9.0, -9.0]], dtype=torch.float64, requires_grad=True)
    bradley_terry(r).sum().backward()
    size = 1 / (1 + (r[:, 0] - r[:, 1]).detach().exp())
    assert torch.allclose(r.grad, torch.stack([-size, size], 1))


def test_eq5_least_where_sigma_of_h_is_p():
    for p in (0.6, 0.9, 0.99):
        r = torch.tensor([[math.log(p / (1 - p)), 0.0]], dtype=torch.float64, requires_grad=True)
        bradley_terry(r, p=p).sum().backward()
        assert r.grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", COMPARED)
def test_eq5_and_eq8_minimum_on_labels_from_the_model_is_the_true_reward_up_to_a_constant(name):
    """Every order of three with its Plackett–Luce probability; pairs of such orders follow Bradley–Terry (1)."""
    true = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    orders = list(permutations(range(3)))
    weight = []
    for order in orders:
        ranked = true[list(order)]
        choices = [ranked[k] - ranked[k:].logsumexp(0) for k in range(3)]
        weight.append(sum(choices).exp())
    assert sum(weight).item() == pytest.approx(1)                                        # (8) is a distribution
    r = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [r], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        total = 0
        for w, order in zip(weight, orders):
            total = total + w * loss_of(name, r, [-order.index(i) for i in range(3)])[0]
        total.backward()
        return total
    optimizer.step(closure)
    assert torch.allclose(r.detach() - r.detach().mean(), true - true.mean(), atol=1e-6)


def test_eq6_c9_golden_margins():
    r = torch.tensor([[2.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    m = torch.tensor([0, 0.5, 1.0])
    value = bradley_terry(r, margin=m).mean().item()
    assert value == pytest.approx(1.109312, abs=1e-6)                                    # 1.0670 is the broadcast


def test_eq6_swapping_the_answers_and_p_changes_nothing():
    for p in (0.0, 0.2, 1.0):
        one = bradley_terry([[1.3, -0.4]], p=p, margin=0.7)
        assert torch.allclose(one, bradley_terry([[-0.4, 1.3]], p=1 - p, margin=0.7))


def test_eq6_with_margins_the_minimum_is_not_at_p():
    """So a model that was trained with margins is not calibrated."""
    h = torch.linspace(0, 6, 60001, dtype=torch.float64)
    losses = bradley_terry(torch.stack([h, 0 * h], 1), p=0.9, margin=1.0)
    assert torch.sigmoid(h[losses.argmin()]).item() == pytest.approx(0.957, abs=5e-4)


def test_eq7_all_pairs_of_a_list_weighted_by_their_number():
    r, scores = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64), [4, 1, 3, 2]
    by_hand = [math.log1p(math.exp(r[j] - r[i])) for i in range(4) for j in range(4) if scores[i] > scores[j]]
    assert len(by_hand) == 6 and bradley_terry(r, scores).item() == pytest.approx(sum(by_hand) / 6)
    tied = [4, 1, 4, 2]                                                                  # one pair less: 1/5 each
    by_hand = [math.log1p(math.exp(r[j] - r[i])) for i in range(4) for j in range(4) if tied[i] > tied[j]]
    assert len(by_hand) == 5 and bradley_terry(r, tied).item() == pytest.approx(sum(by_hand) / 5)


def test_eq9_plackett_luce_by_hand_and_log_k_factorial_where_equal():
    r = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    first = math.exp(2) / (math.exp(2) + math.exp(0.3) + math.exp(-1))
    second = math.exp(0.3) / (math.exp(0.3) + math.exp(-1))
    assert plackett_luce(r, [2, 1, 3]).item() == pytest.approx(-math.log(first * second))
    assert plackett_luce(torch.zeros(5), [2, 1, 3, 5, 4]).item() == pytest.approx(math.log(120))


def test_eq8_plackett_luce_of_two_is_bradley_terry():
    r = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    a = bradley_terry(r)
    b = plackett_luce(r)
    assert torch.allclose(a, b)
    assert torch.allclose(*(torch.autograd.grad(x.sum(), r)[0] for x in (a, b)))


def test_eq9_tied_answers_are_not_compared():
    r = torch.randn(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Each beats the last, none the other.
    by_hand = sum(math.log(math.exp(r[i]) + math.exp(r[2])) - r[i] for i in (0, 1))
    assert plackett_luce(r, [1, 1, 0]).item() == pytest.approx(by_hand.item())


@pytest.mark.parametrize("name", COMPARED)
def test_extreme_scores_stay_finite(name):
    for far in (-2000.0, 2000.0):
        r = torch.tensor([[far, 0.0]], requires_grad=True)
        value = loss_of(name, r)
        value.sum().backward()
        assert torch.isfinite(value).all() and torch.isfinite(r.grad).all()


# --- a step: values and gradients -------------------------------------------------------------------------------------

def toy_groups(kind="pair", n=8):
    """Pairs, or lists of 2 to 5 answers (some tied), of very different lengths; the prompts are those of the toy."""
    encoder = common.load_encoder(TOY / "model")
    groups, account = common.read_groups(TOY / "pairs.jsonl", PAIRS, limit=n)
    ranks = [[1.0, 0.0], [0.5, 2.0, 1.0], [3.0, 3.0, 1.0, 2.0], [1.0, 2.0, 3.0, 4.0, 4.0]]
    for i, g in enumerate(groups):
        g.completions[0] += " so it is" * (i % 4)
        g.completions[1] += " perhaps" * (i // 3)
        if kind == "ranked list":
            g.completions += ["a few", "none" * 9, "well, 12"][:i % 4]
            g.scores = ranks[i % 4]
    return encoder, common.tokenise(groups, account, encoder, 512)


def reward_model(encoder, seed=0):
    torch.manual_seed(seed)
    model = common.load_reward_model(TOY / "model", encoder, "cpu", new_head=True)
    model.score.weight.data *= 5                                                         # scores that really differ
    return model


# Each case: kind of group, flags
CASES = {
    "pairs": ("pair", []),
    "label smoothing": ("pair", ["--label-smoothing", "0.1"]),
    "p_chosen": ("pair", []),
    "margin": ("pair", []),
    "centred": ("pair", ["--center-coef", "0.5"]),
    "pairs, PL": ("pair", ["--loss", "plackett-luce"]),
    "lists": ("ranked list", ["--label-smoothing", "0.1", "--center-coef", "0.1"]),
    "lists, PL": ("ranked list", ["--loss", "plackett-luce"]),
    "lists, PL, centred": ("ranked list", ["--loss", "plackett-luce", "--center-coef", "0.1"]),
}


def case(name):
    kind, flags = CASES[name]
    encoder, groups = toy_groups(kind)
    for i, g in enumerate(groups):
        if name == "p_chosen":
            g.p_chosen = 0.7
        if name == "margin" and i % 2:                                                   # every other pair has one
            g.margin = 0.6
    return encoder, groups, train_rm.parse_args(flags)


def step_gradient(model, groups, args, budget):
    model.zero_grad()
    total = 0.0
    for micro in common.micro_batches(groups, budget):
        loss, _ = micro_loss(forward(model, micro, True), micro, args)
        (loss / len(groups)).backward()
        total += loss.item() / len(groups)
    return total, [p.grad.clone() for p in model.parameters()]


def distance(a, b):
    """‖a − b‖ / ‖b‖ of two gradients, all tensors in one."""
    a, b = (torch.cat([x.detach().double().flatten() for x in xs]) for xs in (a, b))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", CASES)
def test_step_loss_and_gradient_against_float64(name):
    """From token ids to the gradient: the plain model in float64, one completion at a time, formulas written out."""
    encoder, groups, args = case(name)
    model = reward_model(encoder)
    exact = AutoModelForSequenceClassification.from_pretrained(TOY / "model", num_labels=1, dtype=torch.float64)
    exact.score.weight.data = model.score.weight.data.double()
    total = 0
    for g in groups:
        r = []
        for ids in g.completion_ids:
            hidden = exact.model(torch.tensor([g.prompt_ids + ids])).last_hidden_state
            r.append(exact.score(hidden[0, -1])[0])
        pairs = [(i, j) for i in range(len(r)) for j in range(len(r)) if g.scores[i] > g.scores[j]]
        if args.loss == "plackett-luce":
            for i in range(len(r)):
                worse = [r[j] for j in range(len(r)) if g.scores[i] > g.scores[j]]
                total = total - torch.log(r[i].exp() / (r[i].exp() + sum(x.exp() for x in worse)))
        else:
            p = 1 - args.label_smoothing if g.p_chosen is None else g.p_chosen
            for i, j in pairs:
                h = r[i] - r[j]
                right = torch.log(1 / (1 + (g.margin - h).exp()))
                wrong = torch.log(1 / (1 + (g.margin + h).exp()))
                total = total - (p * right + (1 - p) * wrong) / len(pairs)
        total = total + args.center_coef * (2 * sum(r) / len(r)) ** 2
    expected = total / len(groups)
    expected.backward()
    loss, gradient = step_gradient(model, groups, args, 100)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    # 7e-5 is the fast exp in torch's CPU attention.
    assert distance(gradient, [p.grad for p in exact.parameters()]) < 3e-4


@pytest.mark.parametrize("name", CASES)
def test_b15_one_two_or_eight_micro_batches_give_one_gradient(name):
    encoder, groups, args = case(name)
    model = reward_model(encoder)
    total = sum(g.tokens() for g in groups)
    counts = []
    results = []
    for budget in (10 ** 9, (2 * total) // 3, 1):
        counts.append(len(common.micro_batches(groups, budget)))
        results.append(step_gradient(model, groups, args, budget))
    assert counts[0] == 1 < counts[1] < counts[2] == 8
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert distance(gradient, results[0][1]) < 1e-4                                  # the fast exp


def test_b6_every_option_changes_loss_and_gradient():
    seen = []
    for name in ("pairs", "label smoothing", "p_chosen", "margin", "centred"):
        encoder, groups, args = case(name)
        loss, gradient = step_gradient(reward_model(encoder), groups, args, 10 ** 9)
        seen.append((round(loss, 6), round(gradient[-1].norm().item(), 6)))
    assert len({a for a, _ in seen}) == len({b for _, b in seen}) == 5


def test_eq10_c8_centring_pulls_the_sum_to_zero_and_leaves_the_difference():
    _, groups = toy_groups()
    rewards = torch.linspace(-1, 2, 16, dtype=torch.float64, requires_grad=True)
    loss = {}
    for c in (0.0, 0.01):
        loss[c] = micro_loss(rewards, groups, train_rm.parse_args(["--center-coef", str(c)]))[0] / 8
    both = rewards[0::2] + rewards[1::2]
    assert (loss[0.01] - loss[0.0]).item() == pytest.approx((0.01 * both ** 2).mean().item())
    gradient = torch.autograd.grad(loss[0.01] - loss[0.0], rewards)[0]
    assert torch.allclose(gradient[0::2], 0.02 * both.detach() / 8)
    assert torch.allclose(gradient[0::2], gradient[1::2])


def test_d7_means_are_over_all_rows_not_over_micro_batches():
    _, groups = toy_groups("ranked list")
    sizes = [len(g.completion_ids) for g in groups]
    args = train_rm.parse_args([])
    parts = Counter()
    rewards = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0))
    whole = train_rm.means(micro_loss(rewards, groups, args)[1], groups)
    for a, b in ((0, 1), (1, 8)):
        parts.update(micro_loss(rewards[sum(sizes[:a]):sum(sizes[:b])], groups[a:b], args)[1])
    assert {k: pytest.approx(v) for k, v in whole.items()} == train_rm.means(parts, groups)


def test_pairs_of_a_list_are_neither_ties_nor_equal_ids():
    ranked = group([2, 1, 1, 0], [[5], [6], [7], [5]])
    assert common.pairs_of(ranked) == [(0, 1), (0, 2), (1, 3), (2, 3)]                   # 0 and 3 say the same


# --- scores -----------------------------------------------------------------------------------------------------------

def test_c1_c6_a_score_is_the_same_packed_padded_alone_shuffled_and_beside_a_long_neighbour():
    encoder, groups = toy_groups("ranked list")
    model = reward_model(encoder)
    # About ten times as long; an EOS inside the prompt.
    groups[3].completion_ids[0] = groups[3].completion_ids[0][:-1] * 9 + [encoder.eos]
    groups[2].prompt_ids = groups[2].prompt_ids + [encoder.eos] + groups[2].prompt_ids
    alone = []
    for g in groups:
        one = [common.Group("", "", [], prompt_ids=g.prompt_ids, completion_ids=[ids]) for ids in g.completion_ids]
        alone.append([forward(model, [x], False).item() for x in one])
    for order in ([0, 1, 2, 3, 4, 5, 6, 7], [5, 2, 7, 3, 0, 6, 1, 4], [3, 2]):
        for packed in (True, False):
            scores = forward(model, [groups[i] for i in order], packed).tolist()
            assert scores == pytest.approx([s for i in order for s in alone[i]], abs=1e-5)
    autocast = torch.autocast("cpu", enabled=False)
    scores = common.for_all(common.reward_scores, model, groups, 40, True, autocast, "")
    assert scores.tolist() == pytest.approx([s for values in alone for s in values], abs=1e-5)


def test_c7_scores_and_head_are_float32_under_autocast():
    encoder, groups = toy_groups()
    with torch.autocast("cpu", torch.bfloat16):
        scores = forward(reward_model(encoder), groups, True)
    assert scores.dtype == torch.float32 and len(set(scores.tolist())) == 16


# --- evaluation -------------------------------------------------------------------------------------------------------

def test_c10_constant_scores_have_accuracy_one_half_and_no_correlation():
    _, groups = toy_groups()
    result = evaluate(groups, torch.full((16,), 3.0), train_rm.parse_args([]))
    assert result["eval/rewards/accuracies"] == 0.5 and result["eval/ece"] == 0
    assert result["eval/loss"] == pytest.approx(math.log(2))
    assert "eval/length_correlation" not in result and all(math.isfinite(v) for v in result.values())
    assert "–" not in train_rm.eval_line(0, result) and "nan" in train_rm.eval_line(0, result)


def test_evaluation_by_hand():
    """Three pairs with lengths (1, 2), (2, 1), (1, 3) and differences 1, −2, 0; every number worked out here."""
    groups = [group([1, 0], [[5] * a, [6] * b], [a, b]) for a, b in ((1, 2), (2, 1), (1, 3))]
    x = torch.tensor([2.0, 1, 0, 2, 1, 1])
    y = torch.tensor([1.0, 2, 2, 1, 1, 3])
    result = evaluate(groups, x, train_rm.parse_args([]))
    assert result["eval/rewards/accuracies"] == pytest.approx(0.5) and result["eval/n"] == 3
    # Three prompts: V = 3/2 · Σ (v − p)² / 3² = 1/12, so n = p (1 − p) / V = 3; Wilson with z = 1.
    assert result["eval/accuracy_se"] == pytest.approx(math.sqrt(0.25 / 3 + 1 / 36) / (1 + 1 / 3))
    assert result["eval/loss"] == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(2)) + math.log(2)) / 3)
    one = 1 / (1 + math.exp(-1))
    two = 1 / (1 + math.exp(-2))
    assert result["eval/ece"] == pytest.approx(((1 - one) + two) / 3)                    # right, wrong, 0.5 for a tie
    assert result["eval/accuracy_longer"] == 0 and result["eval/n_longer"] == 1
    assert result["eval/accuracy_shorter"] == 0.75 and result["eval/n_shorter"] == 2
    assert result["eval/length_accuracy"] == pytest.approx(2 / 3)
    assert result["eval/score_mean"] == pytest.approx(x.mean().item())
    assert result["eval/score_std"] == pytest.approx(x.std(correction=0).item())
    assert result["eval/length_correlation"] == pytest.approx(torch.corrcoef(torch.stack([x, y]))[0, 1].item())


def test_ece_equals_ten_bins_on_pairs_taken_both_ways_round():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(500, generator=generator, dtype=torch.float64) * 2
    groups = [group([1, 0], [[5], [6]]) for _ in h]
    ece = evaluate(groups, torch.stack([h, 0 * h], 1).flatten(), train_rm.parse_args([]))["eval/ece"]
    p = torch.cat([torch.sigmoid(h), torch.sigmoid(-h)])
    label = torch.cat([torch.ones(500), torch.zeros(500)]).double()
    bins = (p * 10).long().clamp(max=9)
    assert ece == pytest.approx(sum((label - p)[bins == b].sum().abs().item() for b in range(10)) / 1000)


def test_accuracy_of_lists_counts_all_pairs_and_the_error_counts_prompts():
    ranked = group([3, 2, 1], [[5], [6], [7]])
    pair = group([1, 0], [[5], [6]], [2])
    result = evaluate([ranked, pair], torch.tensor([1.0, 3.0, 2.0, 1.0, 0.0]), train_rm.parse_args([]))
    assert result["eval/n"] == 4 and result["eval/rewards/accuracies"] == 0.5            # one of the list and the pair
    # Of two prompts: V = 2 · (0.5² + 0.5²) / 4² = 1/16, as if the four were independent: n = 4.
    assert result["eval/accuracy_se"] == pytest.approx(math.sqrt(0.25 / 4 + 1 / 64) / (1 + 1 / 4))


def correlation(x, y):
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


def test_length_curve_is_the_mean_score_of_equally_full_bins_of_lengths():
    lengths = torch.randperm(1000, generator=torch.Generator().manual_seed(0)) + 1
    scores = torch.randn(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    by_length = scores[lengths.argsort()].view(10, 100).mean(1)                          # each length stands there once
    curve = common.length_curve(scores, lengths, bins=10)
    assert curve == [pytest.approx([50.5 + 100 * i, by_length[i].item()]) for i in range(10)]
    assert len(common.length_curve(scores, lengths)) == 50
    # Common lengths have a bin of their own, however many there are.
    assert common.length_curve([1, 2, 3, 6, 6, 6], [3, 3, 2, 7, 7, 7]) == [[2, 3], [3, 1.5], [7, 6]]
    assert common.length_curve([1, 2, 3], [4, 4, 4]) == [[4, 2]]


def test_calibrate_goes_straight_between_the_knots_and_is_constant_beyond_them():
    curve = [[2, 1.0], [4, 3.0]]
    assert common.calibrate([5.0] * 4, [1, 2, 3, 9], curve, 2.0).tolist() == [6, 6, 5, 4]
    x = torch.randint(1, 60, (200,), generator=torch.Generator().manual_seed(0)).double()
    line = [[n, 0.5 * n] for n in range(1, 60)]
    assert torch.allclose(common.calibrate(0.5 * x, x, line, 7.0), torch.full((200,), 7.0).double())
    assert common.calibrate([5.0], [3], [[4, 1.0]], 2.0).tolist() == [6]


@pytest.mark.parametrize("longest", [3, 59, 3000])
def test_calibrated_scores_do_not_depend_on_length_and_keep_all_else(longest):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest + 1, (5000,), generator=generator).double()
    noise = 0.3 * torch.randn(5000, generator=generator, dtype=torch.float64)
    scores = (2 * lengths / longest).sin() + lengths / longest + noise                   # bent: no line would do
    curve = common.length_curve(scores, lengths)
    calibrated = common.calibrate(scores, lengths, curve, scores.mean())
    # In every tenth of the lengths the mean is what it was for all: length predicts nothing any more.
    assert abs(correlation(scores, lengths)) > 0.3 and abs(correlation(calibrated, lengths)) < 0.01
    for some in lengths.argsort().split(500):
        assert calibrated[some].mean().item() == pytest.approx(scores.mean().item(), abs=0.06)
    assert correlation(calibrated, noise) > 0.99                                         # what length does not explain


# --- the script -------------------------------------------------------------------------------------------------------

def toy_split(encoder):
    """(train, held out) of the runs below."""
    groups, account = common.read_groups(TOY / "pairs.jsonl", PAIRS, limit=300)
    return common.split_by_prompt(common.tokenise(groups, account, encoder, 512), 0.1, 0)


def without_speed(lines):
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    return out, run(out, "--max-steps", 10, "--eval-every", 5)


def test_zero_flag_smoke(tmp_path, monkeypatch, capsys):
    """All defaults but the number of steps; with the network gone (D8)."""
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the script used the network"))
    monkeypatch.chdir(tmp_path)
    main(["--max-steps", "3"])
    said = capsys.readouterr().out
    assert "(0.6931 if all scores were equal)" in said and "'<s><user>" in said
    assert "training accuracy, first pass" in said and "repeated passes" not in said
    made = {f.name for f in Path("runs/rm").iterdir()}
    assert made >= {"config.json", "model.safetensors", "tokenizer.json", "args.json", "metrics.jsonl", "checkpoint"}


def test_metrics(straight):
    lines = straight[1]
    assert [m["step"] for m in lines] == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]
    assert set(lines[1]) == {
        "step", "loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/margins",
        "rewards/accuracies", "tokens_per_second"}
    assert set(lines[0]) >= {
        "eval/loss", "eval/n", "eval/rewards/accuracies", "eval/accuracy_se", "eval/ece", "eval/score_mean",
        "eval/score_std", "eval/length_correlation", "eval/length_accuracy", "eval/n_longer", "eval/n_shorter"}
    assert all(math.isfinite(v) for m in lines for v in m.values())


def test_c1_to_c5_saved_model_gives_the_same_scores_in_plain_transformers(straight):
    """Text and template from the saved tokeniser, padded right, with nothing of ours: the same ids and scores."""
    out, lines = straight
    model = AutoModelForSequenceClassification.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.score.out_features == 1 and model.config.pad_token_id == tokenizer.pad_token_id is not None
    encoder = common.load_encoder(TOY / "model")
    held_out = toy_split(encoder)[1]
    dialogues = [g.prompt + [{"role": "assistant", "content": c}] for g in held_out for c in g.completions]
    texts = [tokenizer.apply_chat_template(dialogue, tokenize=False) for dialogue in dialogues]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
    theirs = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    assert theirs == [g.prompt_ids + c for g in held_out for c in g.completion_ids]
    with torch.no_grad():
        scores = model(**batch).logits[:, 0]
    ours = common.reward_scores(common.load_reward_model(out, common.load_encoder(out), "cpu"), common.pack(held_out))
    assert torch.allclose(scores, ours, atol=1e-5)
    assert scores.mean().item() == pytest.approx(lines[-1]["eval/score_mean"], abs=1e-5)


def test_saved_config_keeps_the_statistics_of_the_training_completions(straight):
    out = straight[0]
    model = common.load_reward_model(out, common.load_encoder(out), "cpu")
    train = toy_split(common.load_encoder(TOY / "model"))[0]
    train = [train[i] for step in common.Plan(len(train), 16, 1, 10, 0) for i in step]   # what it was trained on
    with torch.no_grad():
        scores = common.reward_scores(model, common.pack(train)).double()
    lengths = torch.tensor([len(ids) for g in train for ids in g.completion_ids])
    assert model.config.reward_mean == pytest.approx(scores.mean().item(), abs=1e-5)
    assert model.config.reward_std == pytest.approx(scores.std(correction=0).item(), abs=1e-5)
    knots, values = zip(*model.config.reward_by_length)
    assert sorted(set(lengths.tolist())) == list(knots) and len(knots) <= 50
    means = [scores[lengths == n].mean().item() for n in knots]
    assert list(values) == pytest.approx(means, abs=1e-5)
    calibrated = common.calibrate(scores, lengths, model.config.reward_by_length, model.config.reward_mean)
    assert abs(correlation(scores, lengths.double())) > 0.05 and abs(correlation(calibrated, lengths.double())) < 1e-4


def test_a_reward_model_keeps_its_head_and_seeds_make_new_ones(straight, tmp_path):
    lines = run(tmp_path / "on", "--model", straight[0], "--max-steps", 1, "--eval-every", 1)
    assert lines[0]["eval/loss"] == pytest.approx(straight[1][-1]["eval/loss"], abs=1e-5)
    other = run(tmp_path / "one", "--max-steps", 1, "--seed", 1)
    assert other[0]["eval/score_mean"] != straight[1][0]["eval/score_mean"]


def test_d4_every_tensor_changes(straight):
    encoder = common.load_encoder(TOY / "model")
    torch.manual_seed(0)
    before = common.load_reward_model(TOY / "model", encoder, "cpu", new_head=True).state_dict()
    after = common.load_reward_model(straight[0], encoder, "cpu").state_dict()
    assert all(not torch.equal(before[k], after[k]) for k in before)


def test_d10_same_seed_same_run_other_seed_other(straight, tmp_path):
    lines = run(tmp_path / "same", "--max-steps", 10, "--eval-every", 5)
    assert without_speed(lines) == without_speed(straight[1])


def test_d2_killed_and_resumed_is_bit_equal(straight, tmp_path, monkeypatch):
    def die(out, step, values, log=train_rm.log):
        if step == 7:
            raise RuntimeError("killed")
        log(out, step, values)
    monkeypatch.setattr(train_rm, "log", die)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, "--max-steps", 10, "--eval-every", 5, "--save-every", 4)
    monkeypatch.undo()
    lines = run(tmp_path, "--max-steps", 10, "--eval-every", 5, "--save-every", 4, "--resume")
    assert without_speed(lines) == without_speed(straight[1])
    for part in ("checkpoint/step-10", "model"):
        assert (tmp_path / f"{part}.safetensors").read_bytes() == (straight[0] / f"{part}.safetensors").read_bytes()
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((straight[0] / "config.json").read_text())


def test_first_pass_accuracy_stands_apart(tmp_path, capsys):
    lines = run(tmp_path, "--limit", 40, "--epochs", 3, "--eval-fraction", 0)
    said = capsys.readouterr().out

    def correct(steps):
        return sum(m["rewards/accuracies"] * (8 if m["step"] % 3 == 0 else 16) for m in steps)      # 16 + 16 + 8 groups
    assert f"{100 * correct(lines[:3]) / 40:.1f} % of 40 groups" in said
    assert f"repeated passes: {100 * correct(lines[3:]) / 80:.1f} % of 80 groups" in said


@pytest.mark.parametrize("flags", [[], ["--loss", "plackett-luce"]], ids=["bradley-terry", "plackett-luce"])
def test_ranked_lists_are_learnt_and_lists_of_ties_dropped_and_counted(flags, tmp_path, capsys):
    rows = []
    for i in range(60):
        k = 3 + i % 2
        rows.append({"prompt": f"{i}", "completions": ["999", "55", "1", "11"][:k], "scores": [3, 2, 1, 1][:k]})
    rows.append({"prompt": "tied", "completions": ["a", "b"], "scores": [1, 1]})
    rows.append({"prompt": "same", "completions": ["a", "a"], "scores": [1, 0]})
    rows.append({"prompt": "all the same", "completions": ["a", "a", "a"], "scores": [2, 1, 0]})
    data = write(tmp_path / "lists.jsonl", rows)
    lines = run(tmp_path / "out", "--dataset", data, "--epochs", 8, "--learning-rate", 1e-3, *flags)
    said = capsys.readouterr().out
    assert "kept 60" in said and "1 where no completion is better than another" in said
    assert "2 with completions of identical tokens" in said
    assert lines[-1]["eval/rewards/accuracies"] > 0.95 and lines[-1]["eval/loss"] < lines[0]["eval/loss"]
    assert lines[-1]["eval/n"] in range(6 * 3, 6 * 5 + 1)


def test_c9_a_missing_margin_is_zero_for_its_row_only(tmp_path):
    rows = [json.loads(line) for line in (TOY / "pairs.jsonl").read_text().splitlines()[:20]]
    for i, value in ((0, 2.0), (1, None), (2, "1.5"), (3, "")):
        rows[i]["margin"] = value
    groups, account = common.read_groups(write(tmp_path / "m.jsonl", rows), PAIRS)
    common.read_soft_labels(groups, 0.0)
    groups = common.tokenise(groups, account, common.load_encoder(TOY / "model"), 512)[:5]
    expected = [math.log1p(math.exp(m)) for m in (2, 0, 1.5, 0, 0)]                      # h = 0: −log σ(−m)
    loss = micro_loss(torch.zeros(10), groups, train_rm.parse_args([]))[0]
    assert loss.item() == pytest.approx(sum(expected), abs=1e-5)


def test_c9_margins_of_the_data_reach_the_loss_of_a_run(tmp_path):
    """One step of the whole script: its loss is that of its scores before the step, with the margins of the file."""
    rows = [json.loads(line) | {"margin": 0.5 * i} for i, line in enumerate((TOY / "pairs.jsonl").open()) if i < 16]
    data = write(tmp_path / "m.jsonl", rows)
    lines = run(tmp_path / "out", "--dataset", data, "--eval-fraction", 0, "--max-steps", 1)
    encoder = common.load_encoder(TOY / "model")
    torch.manual_seed(0)
    model = common.load_reward_model(TOY / "model", encoder, "cpu", new_head=True)
    groups, account = common.read_groups(data, PAIRS)
    scores = forward(model, common.tokenise(groups, account, encoder, 512), True).view(-1, 2)
    expected = (0.5 * torch.arange(16) - scores[:, 0] + scores[:, 1]).exp().log1p()      # −log σ(h − m)
    assert lines[0]["loss"] == pytest.approx(expected.mean().item(), abs=1e-5)


def test_c1_pad_equal_to_the_end_token_is_said(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    tokenizer.pad_token = tokenizer.eos_token
    model = common.AutoModelForCausalLM.from_pretrained(TOY / "model")
    model.config.pad_token_id = tokenizer.eos_token_id
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    run(tmp_path / "out", "--model", tmp_path / "model", "--max-steps", 1)
    assert capsys.readouterr().out.count("also the pad token (</s>)") == 1
    run(tmp_path / "other", "--max-steps", 1)
    assert "pad token" not in capsys.readouterr().out


def test_c3_a_head_with_two_outputs_is_refused(tmp_path, capsys):
    AutoModelForSequenceClassification.from_pretrained(TOY / "model", num_labels=2).save_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(tmp_path / "two")
    assert "2 outputs" in refused(capsys, "--model", tmp_path / "two", "--output-dir", tmp_path / "out", "--limit", 50)


ROW = {"prompt": "1+1", "chosen": "2", "rejected": "3"}
LIST = {"prompt": "1+1", "completions": ["2", "3"], "scores": [1, 0]}


@pytest.mark.parametrize("row, flags, words", [
    ({"prompt": "1+1", "completion": "2", "label": True}, [],
     ["unpaired", "comparisons of completions of the same prompt", "chosen"]),
    ({"prompt": "1+1", "response": "2"}, [], ["response", "comparisons"]),
    ({"prompt": "1+1"}, [], ["prompt", "comparisons"]),
    ({**ROW, "margin": "much"}, [], ["line 1", "margin", "much"]),
    ({**ROW, "margin": -1}, [], ["line 1", "margin", "below 0"]),
    ({**ROW, "margin": float("nan")}, [], ["line 1", "margin"]),
    ({**ROW, "p_chosen": 1.5}, [], ["line 1", "p_chosen"]),
    ({**ROW, "p_chosen": 0.9}, ["--label-smoothing", "0.1"], ["--label-smoothing"]),
    ({**ROW, "margin": 1}, ["--loss", "plackett-luce"], ["margin", "bradley-terry", "--columns"]),
    ({**LIST, "p_chosen": 0.9}, [], ["line 1", "p_chosen", "pair", "--columns"]),
    ({**LIST, "margin": 1}, [], ["line 1", "margin", "pair", "--columns"]),
    ({**LIST, "scores": [1, 1]}, [], ["no rows are left"]),
    ({**LIST, "scores": [1]}, [], ["same length"]),
    (ROW, ["--loss", "plackett-luce", "--label-smoothing", "0.1"], ["plackett-luce", "--label-smoothing"]),
    (ROW, ["--loss", "brad"], ["--loss", "bradley-terry"]),
    (ROW, ["--label-smoothing", "0.5"], ["--label-smoothing"]),
    (ROW, ["--center-coef", "-1"], ["--center-coef"]),
    (ROW, ["--eval-samples", "3"], ["--eval-samples"]),
])
def test_bad_input_ends_in_one_sentence(row, flags, words, capsys, tmp_path):
    said = refused(capsys, "--dataset", write(tmp_path / "rows.jsonl", [row]), *flags, "--output-dir", tmp_path / "out")
    assert all(w in said for w in words), said
    assert not (tmp_path / "out").exists()                   # before anything is made
