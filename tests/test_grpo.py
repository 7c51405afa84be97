"""train_grpo.py: its derivation by enumeration, every loss against float64, rewards, rollouts, and the script itself."""
import contextlib
import json
import math
import signal
import socket
import statistics
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPTNeoConfig, GPTNeoForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import train_grpo
from train_grpo import (CLIP, LOSSES, Micro, advantages, combine, fill, kl_term, main, micro_loss, minibatches, overlong_penalty, parse_args, pass_at_k, weights)

TOY = Path(__file__).parent / "toy"


def run(out, *flags):
    main(["--output-dir", str(out), "--batch-size", "4", "--group-size", "4", "--limit", "60", "--max-new-tokens", "8", "--eval-samples", "8", *map(str, flags)])
    return metrics(out)


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def timeless(lines):
    return [{k: v for k, v in m.items() if "second" not in k} for m in lines]


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as end:
        main(list(map(str, flags)))
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def batch(lengths, seed=0, dtype=torch.float32):
    """Log-probs now and when sampled, owner, for answers of these lengths."""
    g = torch.Generator().manual_seed(seed)
    owner = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])
    old = -3 * torch.rand(len(owner), generator=g, dtype=torch.float64)
    return (old + 0.4 * torch.randn(len(owner), generator=g, dtype=torch.float64)).to(dtype), old.to(dtype), owner


# --- the derivation, by enumeration --------------------------------------------------------------------------------------

POLICY, REF = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REWARD = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)


def softmax_policy():
    logits = POLICY.log().requires_grad_()
    return logits, logits.log_softmax(0)


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def test_eq1_policy_gradient_is_the_gradient_of_the_expected_reward():
    logits, logp = softmax_policy()
    exact = gradient((logp.exp() * REWARD).sum(), logits)
    logits, logp = softmax_policy()
    assert torch.allclose(gradient((POLICY * REWARD * logp).sum(), logits), exact)


def test_eq2_a_baseline_costs_nothing():
    logits, logp = softmax_policy()
    assert torch.allclose(gradient((POLICY * 7.3 * logp).sum(), logits), torch.zeros(3, dtype=torch.float64), atol=1e-12)


def test_eq3_leave_one_out_is_the_centred_reward_times_g_over_g_minus_1():
    r = torch.tensor([[1.0, 0.0, 2.0, 5.0]])
    loo = [x - statistics.mean([y for j, y in enumerate(r[0].tolist()) if j != i]) for i, x in enumerate(r[0].tolist())]
    assert advantages(r, "none", "rloo")[0].tolist() == pytest.approx(loo)
    assert (advantages(r, "none")[0] * 4 / 3).tolist() == pytest.approx(loo)


@pytest.mark.parametrize("loss", LOSSES)
def test_eq4_on_policy_gradient_is_minus_advantage_times_grad_logp(loss):
    """Also G6: ratio exactly 1."""
    lengths, A = [2, 5, 3], torch.tensor([0.7, -1.2, 0.0])
    logp, _, owner = batch(lengths)
    logp.requires_grad_()
    args = parse_args(["--loss", loss])
    w = weights(lengths, loss, 8)[owner]
    grad = gradient((LOSSES[loss](logp, logp.detach(), A, owner, args)[0] * w).sum(), logp)
    assert torch.allclose(grad, -A[owner] * w, atol=1e-6)


def test_eq9_what_each_kl_descends():
    """Exact expectations over three tokens: the numbers of G9, and the gradients as loss terms."""
    d = (REF / POLICY).log()
    assert (POLICY * -d).sum().item() == pytest.approx(0.085123, abs=1e-6)
    assert (POLICY * (d.exp() - 1 - d)).sum().item() == pytest.approx(0.085123, abs=1e-6)
    assert (POLICY * d.square() / 2).sum().item() == pytest.approx(0.080088, abs=1e-6)

    def force(kind):
        logits, logp = softmax_policy()
        return gradient((POLICY * kl_term(kind, logp, POLICY.log(), REF.log())).sum(), logits)
    logits, logp = softmax_policy()
    reverse = gradient((logp.exp() * (logp - REF.log())).sum(), logits)
    logits, logp = softmax_policy()
    forward = gradient((REF * (REF.log() - logp)).sum(), logits)
    assert torch.allclose(reverse, torch.tensor([0.1759, -0.0981, -0.0778], dtype=torch.float64), atol=1e-4)
    assert torch.allclose(force("k2"), reverse) and torch.allclose(force("k3-unbiased"), reverse)
    assert torch.allclose(force("k3"), forward) and torch.allclose(forward, torch.tensor([0.2, -0.1, -0.1], dtype=torch.float64))
    logits, logp = softmax_policy()
    assert torch.allclose(gradient((POLICY * (logp - REF.log())).sum(), logits), torch.zeros(3, dtype=torch.float64), atol=1e-12)     # k1 in the loss
    logits, logp = softmax_policy()
    assert torch.allclose(gradient(-(POLICY * (-(POLICY / REF).log()) * logp).sum(), logits), reverse)                               # k1 in the reward


def test_eq9_k3_unbiased_stays_unbiased_off_policy():
    """Samples from another policy, weighted by ρ: the gradient of KL(π ‖ π_ref) still, which a detached ratio would not give."""
    old = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    logits, logp = softmax_policy()
    ours = gradient((old * kl_term("k3-unbiased", logp, old.log(), REF.log())).sum(), logits)
    logits, logp = softmax_policy()
    assert torch.allclose(ours, gradient((logp.exp() * (logp - REF.log())).sum(), logits))


def test_eq10_only_k1_in_the_reward_is_exact_for_answers_of_more_than_one_token():
    """Two tokens over three, by enumeration: the KL of whole answers counts what the first token does to the second's KL."""
    g = torch.Generator().manual_seed(0)
    start, ref = (torch.randn(4, 3, generator=g, dtype=torch.float64) for _ in range(2))     # logits of token 1, of token 2 after each

    def answers(logits):                                     # (3, 3) log-probs of the first and of the second token
        first, *second = logits.log_softmax(-1)
        return first[:, None].expand(3, 3), torch.stack(second)
    (a0, b0), (ra, rb) = answers(start), answers(ref)
    p = (a0 + b0).exp()

    def force(loss):
        logits = start.clone().requires_grad_()
        return gradient((p * loss(*answers(logits))).sum(), logits)
    logits = start.clone().requires_grad_()
    a, b = answers(logits)
    exact = gradient(((a + b).exp() * (a + b - ra - rb)).sum(), logits)
    assert torch.allclose(force(lambda a, b: (a0 + b0 - ra - rb) * (a + b)), exact)                                          # r − β Σ k1
    for kind in ("k2", "k3-unbiased", "k3"):
        ours = force(lambda a, b: kl_term(kind, a, a0, ra) + kl_term(kind, b, b0, rb))
        assert 0.05 < (ours - exact).norm() / exact.norm() < 1
        if kind != "k3":                                     # of the last token, with nothing after it, they are exact
            assert torch.allclose(ours[1:], exact[1:]) and not torch.allclose(ours[0], exact[0])


def test_g9_kl_of_distant_models_is_finite_and_still_pulls():
    for kind in ("k3", "k2", "k3-unbiased"):
        logp = torch.tensor([-100.0, -0.1], requires_grad=True)
        value = kl_term(kind, logp, logp.detach(), torch.tensor([-0.1, -100.0]))
        value.sum().backward()
        assert torch.isfinite(value).all() and torch.isfinite(logp.grad).all() and logp.grad[1] >= 1      # far above the reference: down


# --- losses: values and gradients ----------------------------------------------------------------------------------------

def by_hand(loss, logp, old, A, lengths, eps, L):
    """Each loss from its paper, answer by answer, token by token, in float64."""
    lo, hi = eps
    clip = lambda x: max(min(x, torch.tensor(1 + hi, dtype=torch.float64)), torch.tensor(1 - lo, dtype=torch.float64))  # noqa: E731
    split = list(zip(logp.split(lengths), old.split(lengths), A.tolist()))
    N, M = len(lengths), sum(lengths)
    ppo = lambda r, a: min(r * a, clip(r) * a)  # noqa: E731
    if loss == "grpo":
        return -sum(sum(ppo((x - y).exp(), a) for x, y in zip(p, q)) / len(p) for p, q, a in split) / N
    if loss == "dapo":
        return -sum(ppo((x - y).exp(), a) for p, q, a in split for x, y in zip(p, q)) / M
    if loss == "dr-grpo":
        return -sum(ppo((x - y).exp(), a) for p, q, a in split for x, y in zip(p, q)) / (N * L)
    if loss == "gspo":
        return -sum(ppo((p - q).mean().exp(), a) for p, q, a in split) / N
    if loss == "rloo":
        return -sum(ppo((p - q).sum().exp(), a) for p, q, a in split) / N
    return -sum(min((x - y).exp().item(), 1 + hi) * a * x for p, q, a in split for x, y in zip(p, q)) / M            # cispo


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss", LOSSES)
def test_eq6_eq7_eq8_value_and_gradient_against_float64(loss, seed):
    lengths, A, L = [3, 1, 6, 4], torch.tensor([1.0, -0.5, 0.3, -2.0]), 9
    args = parse_args(["--loss", loss, "--clip-high", "0.3", *([] if loss == "cispo" else ["--clip-low", "0.15"])])
    logp, old, owner = batch(lengths, seed)
    logp.requires_grad_()
    ours = (LOSSES[loss](logp, old, A, owner, args)[0] * weights(lengths, loss, L)[owner]).sum()
    exact, old64, _ = batch(lengths, seed, torch.float64)
    exact.requires_grad_()
    theirs = by_hand(loss, exact, old64, A, lengths, (0.15, 0.3), L)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
    assert torch.allclose(gradient(ours, logp).double(), gradient(theirs, exact), atol=1e-5)


@pytest.mark.parametrize("kind", ["k3", "k2", "k3-unbiased"])
def test_micro_loss_is_surrogate_and_kl_under_one_weight_however_the_step_is_cut(kind):
    """Value and gradient against float64, answers numbered out of order, one that does not count and whose KL is NaN."""
    lengths, A, beta = [3, 1, 6, 4], torch.tensor([1.0, -0.5, 0.3, -2.0]), 0.3
    args = parse_args(["--kl", kind, "--beta", str(beta)])
    logp, old, owner = batch(lengths, 5)
    ref = old + 0.4 * torch.randn(len(old), generator=torch.Generator().manual_seed(6))
    logp.requires_grad_()
    w = weights([3, 0, 6, 4], "grpo", 9)
    index = [2, 0, 3, 1]                                     # the batch's answers as the step numbers them
    step_A, step_w = torch.zeros(4), torch.zeros(4)
    step_A[index], step_w[index] = A, w
    ref[owner == 1] = math.nan
    one, sums = micro_loss(logp, owner, Micro([], index, old, ref), step_A, step_w, args)
    cut, where = sum(lengths[:2]), [owner < 2, owner >= 2]
    halves = [micro_loss(logp[m], owner[m] - k, Micro([], index[k:k + 2], old[m], ref[m]), step_A, step_w, args) for m, k in zip(where, (0, 2))]
    assert cut == int(where[0].sum()) and sums["tokens"] == 13 == sum(s["tokens"] for _, s in halves)

    x, y, z = logp.detach().double().requires_grad_(), old.double(), ref.double().nan_to_num()
    rho = (x - y).exp()
    surrogate = -torch.minimum(rho * A.double()[owner], rho.clamp(0.8, 1.2) * A.double()[owner])
    estimate = {"k3": (z - x).exp() - 1 - (z - x), "k2": (z - x) ** 2 / 2, "k3-unbiased": rho * ((z - x).exp() - 1 - (z - x))}[kind]
    assert math.isfinite(sums["kl"])                         # of what counts
    n = torch.tensor(lengths, dtype=torch.float64)[owner]
    exact = ((surrogate + beta * estimate) / (3 * n))[owner != 1].sum()
    assert one.item() == pytest.approx(exact.item(), rel=1e-5) == sum(loss for loss, _ in halves).item()
    wanted = gradient(exact, x).float()
    assert torch.allclose(gradient(one, logp), wanted, atol=1e-6) and torch.allclose(gradient(sum(loss for loss, _ in halves), logp), wanted, atol=1e-6)


def test_b6_losses_differ_in_value_and_gradient():
    lengths, A = [3, 1, 6], torch.tensor([1.0, -0.5, 0.3])
    logp, old, owner = batch(lengths)
    seen = set()
    for loss in LOSSES:
        x = logp.clone().requires_grad_()
        value = (LOSSES[loss](x, old, A, owner, parse_args(["--loss", loss]))[0] * weights(lengths, loss, 16)[owner]).sum()
        seen.add((round(value.item(), 6), round(gradient(value, x).norm().item(), 6)))
    assert len(seen) == len(LOSSES)


def test_g13_aggregation_golden_values():
    """Lengths 2 and 6, A = ±1, limit 8, on policy."""
    logp, owner, A = torch.zeros(8), torch.tensor([0] * 2 + [1] * 6), torch.tensor([1.0, -1.0])
    for loss, value in (("grpo", 0.0), ("dapo", 0.5), ("dr-grpo", 0.25), ("gspo", 0.0)):
        token = LOSSES[loss](logp, logp, A, owner, parse_args(["--loss", loss]))[0]
        assert (token * weights([2, 6], loss, 8)[owner]).sum().item() == pytest.approx(value, abs=1e-7)


def test_g12_answers_that_do_not_count_are_in_no_denominator():
    for loss in LOSSES:
        assert torch.allclose(weights([2, 0, 6], loss, 8)[[0, 2]], weights([2, 6], loss, 8)) and weights([2, 0, 6], loss, 8)[1] == 0
        assert weights([0, 0], loss, 8).tolist() == [0, 0]   # all masked: loss 0, no NaN


def test_g14_gspo_ratio_is_per_answer():
    owner = torch.tensor([0] * 2 + [1] * 6)
    args = SimpleNamespace(clip_low=1.0, clip_high=1.0, dual_clip=0)
    loss, _ = LOSSES["gspo"](torch.full((8,), 0.1), torch.zeros(8), torch.tensor([1.0, -1.0]), owner, args)
    assert loss.tolist() == pytest.approx([-1.105171] * 2 + [1.105171] * 6, abs=1e-6)


@pytest.mark.parametrize("flags", [["--loss", x] for x in LOSSES] + [["--dual-clip", "1.3"]], ids=lambda f: f[-1])
def test_clip_ratio_counts_the_tokens_that_the_clip_took(flags):
    """Of the ratio that this loss clips, not always the token's: where nothing is left of a token's gradient it was clipped."""
    args = parse_args([*flags, "--clip-high", "0.3", *([] if "cispo" in flags else ["--clip-low", "0.2"])])
    lengths, A = [3, 1, 6, 4, 5], torch.tensor([1.0, -0.5, 0.3, -2.0, 0.0])
    logp, old, owner = batch(lengths, 3)
    logp.requires_grad_()
    losses, cut = LOSSES[args.loss](logp, old, A, owner, args)
    if args.loss == "cispo":                                 # cuts the weight and keeps the gradient
        wanted = ((logp - old).exp() > 1.3) & (A[owner] != 0)
    else:
        wanted = (gradient(losses.sum(), logp) == 0) & (A[owner] != 0)
    assert cut.tolist() == wanted.tolist() and 0 < cut.sum() < len(cut)


@pytest.mark.parametrize("A, ratio, objective, moves", [(1, 1.5, 1.2, False), (-1, 1.5, -1.5, True), (-1, 0.5, -0.8, False), (1, 0.5, 0.5, True)])
def test_g15_which_side_is_clipped(A, ratio, objective, moves):
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, _ = LOSSES["grpo"](logp, torch.zeros(1), torch.tensor([float(A)]), torch.zeros(1, dtype=torch.long), parse_args([]))
    assert loss.item() == pytest.approx(-objective, abs=1e-6) and bool(gradient(loss.sum(), logp).abs() > 0) == moves
    higher, _ = LOSSES["dapo"](logp, torch.zeros(1), torch.tensor([float(A)]), torch.zeros(1, dtype=torch.long), parse_args(["--loss", "dapo"]))
    assert (higher.item() != pytest.approx(loss.item())) == (A > 0 and ratio > 1)        # 0.28 changes only this side


def test_dual_clip_bounds_the_loss_of_a_bad_answer():
    args = parse_args(["--dual-clip", "3"])
    logp = torch.tensor([math.log(9.0)], requires_grad=True)
    loss, _ = LOSSES["grpo"](logp, torch.zeros(1), torch.tensor([-1.0]), torch.zeros(1, dtype=torch.long), args)
    assert loss.item() == pytest.approx(3.0) and gradient(loss.sum(), logp).item() == 0
    good, _ = LOSSES["grpo"](torch.tensor([math.log(0.1)]), torch.zeros(1), torch.tensor([1.0]), torch.zeros(1, dtype=torch.long), args)
    assert good.item() == pytest.approx(-0.1)                # a good answer's is left alone


# --- advantages and rewards ----------------------------------------------------------------------------------------------

def test_eq5_g10_advantages():
    one = lambda r, scale="group-std": advantages(torch.tensor([r]), scale)[0].tolist()  # noqa: E731
    assert one([1.0, 0, 0, 1]) == pytest.approx([0.865875, -0.865875, -0.865875, 0.865875], abs=1e-6)
    assert one([1.0] * 4) == [0] * 4 and max(map(abs, one([0.1] * 8))) < 1e-3
    assert max(map(abs, one([0.35] * 7 + [0.95]))) < math.sqrt(8)
    r = torch.tensor([[1.0, 0.0], [10.0, 4.0]])
    std = statistics.stdev([1, 0, 10, 4]) + 1e-4
    assert advantages(r, "none").tolist() == [[0.5, -0.5], [3, -3]]
    assert advantages(r, "batch-std").flatten().tolist() == pytest.approx([0.5 / std, -0.5 / std, 3 / std, -3 / std])
    assert advantages(r, "group-std").flatten().tolist() == pytest.approx([0.7071, -0.7071] * 2, abs=1e-3)


def test_g11_no_reward_is_in_no_mean_and_has_no_advantage():
    nan = math.nan
    assert advantages(torch.tensor([[1.0, 0.0, nan, 1.0, 0.0]]), "group-std")[0, 2] == 0
    assert advantages(torch.tensor([[1.0, 0.0, nan]]), "group-std")[0, :2].tolist() == advantages(torch.tensor([[1.0, 0.0]]), "group-std")[0].tolist()
    assert advantages(torch.tensor([[nan, 1.0], [nan, nan]]), "group-std").tolist() == [[0, 0], [0, 0]]
    assert combine([[1.0, None, None], [2.0, 4.0, None]], [1, 0.5], "sum") == [2.0, 2.0, None]
    assert combine([[1.0, 3.0], [2.0, 4.0]], [1, 0.5], "min") == [1.0, 2.0]


@pytest.mark.parametrize("body, words", [("return [1.0]", "1 values for"), ("return 1.0", "1.0 values"), ("return [float('nan')] * len(completions)", "reward is nan"),
                                         ("return [float('inf')] * len(completions)", "reward is inf")])
def test_g11_bad_rewards_name_the_function(body, words, tmp_path, capsys):
    (tmp_path / "r.py").write_text(f"def bad(completions, **_):\n    {body}\n")
    said = refused(capsys, "--reward", f"{tmp_path / 'r.py'}:bad", "--output-dir", tmp_path / "o", "--limit", 30, "--eval-samples", 8)
    assert "bad" in said and words in said


def test_g16_soft_overlong_penalty_and_dynamic_sampling_on_the_raw_reward():
    assert [overlong_penalty(n, 20, 4) for n in (3, 16, 18, 20, 25)] == [0, 0, -0.5, -1, -1]
    assert overlong_penalty(100, 20, 0) == 0
    roll = lambda rewards: {"reward": rewards}  # noqa: E731
    assert train_grpo.alike(roll([0.0, 0.0])) and not train_grpo.alike(roll([0.0, 1.0])) and train_grpo.alike(roll([0.0, None]))
    asked, seeds, train = [], [], list(range(9))

    def more(prompts, seed):
        asked.append(prompts)
        seeds.append(seed)
        return [roll([0.0, float(len(asked) > 1)]) for _ in prompts]
    first = [roll([1.0, 1.0]), roll([0.0, 1.0]), roll([0.0, 0.0])]
    kept, every = fill(first, more, train, [0, 1, 2], SimpleNamespace(seed=0), 5)
    assert len(kept) == 3 and len(every) == 7 and every[:3] == first and [len(x) for x in asked] == [2, 2] and seeds[0] != seeds[1]
    assert len({0, 1, 2, *asked[0], *asked[1]}) == 7         # no prompt twice in a step
    kept, every = fill([roll([0.0, 0.0])] * 3, lambda prompts, seed: [roll([1.0, 1.0]) for _ in prompts], train, [0, 1, 2], SimpleNamespace(seed=0), 5)
    assert kept == [] and len(every) == 9                    # the prompts ran out


def test_pass_at_k_is_unbiased():
    for n, right, k in ((4, 1, 2), (8, 3, 4), (5, 0, 3), (5, 5, 1)):
        from itertools import combinations
        draws = list(combinations([1] * right + [0] * (n - right), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))


# --- rollouts ----------------------------------------------------------------------------------------------------------

def setup(*flags):
    args = parse_args(["--max-new-tokens", "8", "--limit", "12", *flags])
    encoder = common.load_encoder(TOY / "model")
    groups, report = common.read_groups(TOY / "prompts.jsonl", ("prompt",), limit=12)
    groups = common.tokenise(groups, report, encoder, 64)
    return args, encoder, groups, common.load_model(TOY / "model", encoder, "cpu"), contextlib.nullcontext()


def test_g7_each_answer_sees_its_own_rows_columns_and_g18_its_text():
    args, encoder, groups, policy, none = setup()
    seen = []

    def reward(gs, texts, ids, ended):
        seen.extend(zip(gs, texts, ids))
        return [float(gs_.row["answer"]) for gs_ in gs]
    rolls = train_grpo.rollout(policy, encoder, groups, {"id": reward}, {}, args, none, 3, 0, Counter())
    assert [g.row["answer"] for g, _, _ in seen] == [g.row["answer"] for g in groups for _ in range(3)]
    assert all(r["reward"] == [float(r["group"].row["answer"])] * 3 for r in rolls)
    for _, text, ids in seen:                                # what the model wrote, without the end token
        assert text == encoder.tokenizer.decode([i for i in ids if i != encoder.eos]) and "</s>" not in text


def test_g8_the_sampled_ids_are_the_ids_that_are_trained_on():
    args, encoder, groups, policy, none = setup()
    rolls = train_grpo.rollout(policy, encoder, groups[:3], {"zero": lambda g, t, i, e: [0.0] * len(t)}, {}, args, none, 4, 0, Counter())
    ids = [ids for r in rolls for ids in r["ids"]]
    wanted = [i not in (1, 4, 5, 6, 7) for i in range(12)]   # the second group gives no gradient
    for args.micro_batch_tokens, args.minibatches, packed in [(10 ** 6, 1, True), (12, 1, True), (1, 1, True), (30, 2, True), (10 ** 6, 5, False)]:
        plan, found = minibatches(rolls, wanted, args, packed), {}
        assert len(plan) == min(args.minibatches, 3) and sorted(i for numbers, _ in plan for i in numbers) == list(range(12))
        for numbers, micros in plan:
            assert {i for m in micros for i in m.index} == {i for i in numbers if wanted[i]}
            for micro in micros:
                assert [(g.prompt_ids, c) for g in micro.groups for c in g.completion_ids] == [(rolls[i // 4]["group"].prompt_ids, ids[i]) for i in micro.index]
                found |= {i: ids[i] for i in micro.index}
        assert sorted(i for _, micros in plan for m in micros for i in m.index) == sorted(found) == [i for i in range(12) if wanted[i]]


def test_g5_training_forward_gives_the_log_probs_of_the_rollout():
    args, encoder, groups, policy, none = setup("--temperature", "0.7")
    answers = common.sample(policy, [g.prompt_ids for g in groups], 3, 8, encoder.stops, 0.7, seed=1)
    made = [common.Group("", "", [], {}, g.prompt_ids, [a.ids for a in answers[i]]) for i, g in enumerate(groups)]
    logp, _ = train_grpo.forward(policy, made, True, args)
    assert torch.allclose(logp, torch.tensor([x for group in answers for a in group for x in a.logps]), atol=1e-5)


def test_g7_permuting_the_prompts_permutes_the_answers_and_nothing_else():
    _, encoder, groups, policy, _ = setup()
    ask = lambda prompts, seed=1: [[a.ids for a in group] for group in common.sample(policy, prompts, 3, 8, encoder.stops, seed=seed)]  # noqa: E731
    prompts = [g.prompt_ids for g in groups]
    assert ask(prompts) == ask(prompts[::-1])[::-1] != ask(prompts, seed=2) and ask(prompts)[:4] == ask(prompts[:4])
    first, second = ask([prompts[0]] * 2)
    assert first != second                                   # G17: the same prompt twice is two draws


def reward_model(folder, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(TOY / "model", num_labels=1)
    model.config.pad_token_id = 0
    model.config.reward_mean, model.config.reward_std = 0.3, 2.0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(folder)
    return model


def test_g18_a_reward_model_scores_text_as_plain_transformers_does(tmp_path, capsys):
    model = reward_model(tmp_path / "rm").eval()
    args, encoder, groups, _, _ = setup()
    f = train_grpo.load_rewards([str(tmp_path / "rm")], args, torch.device("cpu"))["rm"]
    assert "z-scored" not in capsys.readouterr().out
    texts = [str(i * 7) for i in range(len(groups))]
    for g, text, score in zip(groups, texts, f(groups, texts, None)):
        ids = encoder.tokenizer.apply_chat_template(g.prompt + [{"role": "assistant", "content": text}], return_dict=False, return_tensors="pt")
        assert score == pytest.approx((model(ids).logits[0, 0].item() - 0.3) / 2, abs=1e-4)
    (cut,) = f(groups[:1], texts[:1], None, [False])         # no end token behind an answer that did not end
    ids = encoder.tokenizer.apply_chat_template(groups[0].prompt + [{"role": "assistant", "content": texts[0]}], return_dict=False, return_tensors="pt")
    assert ids[0, -1] == encoder.eos and cut == pytest.approx((model.score(model.model(ids[:, :-1]).last_hidden_state[0, -1])[0].item() - 0.3) / 2, abs=1e-4)


def test_a_reward_model_reads_plain_prompts_as_the_policy_does(tmp_path):
    """--chat: the policy answers a user turn, so the reward model must see one."""
    reward_model(tmp_path / "rm")
    args, encoder, groups, _, _ = setup()
    turns = train_grpo.load_rewards([str(tmp_path / "rm")], args, torch.device("cpu"))["rm"](groups[:3], list("123"), None)
    plain = [common.Group("", g.prompt[0]["content"], []) for g in groups[:3]]
    args.chat = True
    assert train_grpo.load_rewards([str(tmp_path / "rm")], args, torch.device("cpu"))["rm"](plain, list("123"), None) == turns


def test_g11_a_reward_model_without_statistics_says_so_and_a_broken_one_ends_the_run(tmp_path, capsys):
    model = reward_model(tmp_path / "rm")
    del model.config.reward_mean, model.config.reward_std
    model.save_pretrained(tmp_path / "rm")
    args, encoder, groups, _, _ = setup()
    train_grpo.load_rewards([str(tmp_path / "rm")], args, torch.device("cpu"))
    assert "not z-scored" in capsys.readouterr().out
    model.score.weight.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "rm")
    f = train_grpo.load_rewards([str(tmp_path / "rm")], args, torch.device("cpu"))["rm"]
    with pytest.raises(SystemExit):
        f(groups[:2], ["1", "2"], None)
    assert "not finite" in capsys.readouterr().err


def test_g11_what_users_bring_as_a_reward_function(tmp_path, capsys):
    (tmp_path / "beside.py").write_text("ONE = 1.0\n")
    (tmp_path / "r.py").write_text("from __future__ import annotations\nfrom dataclasses import dataclass\nimport torch\nfrom beside import ONE\nLOADED = []\n"
                                   "@dataclass\nclass Point:\n    x: int = 0\n"
                                   "def tensor(completions, **_):\n    LOADED.append(1)\n    return torch.full((len(completions),), ONE)\n"
                                   "def count(completions, **_):\n    return [len(LOADED)] * len(completions)\n"
                                   "def column(completions, extra, **_):\n    return [x if x is None else float(x) for x in extra]\n"
                                   "def text(completions, **_):\n    return ['1'] * len(completions)\n"
                                   "def missing(completions, solution):\n    return [0.0] * len(completions)\n")
    args, _, groups, _, _ = setup()
    load = lambda *names: train_grpo.load_rewards([f"{tmp_path / 'r.py'}:{n}" for n in names], args, torch.device("cpu"))  # noqa: E731
    rewards = load("tensor", "count", "column")
    groups[1].row |= {"extra": 3, "prompts": "a column that is called as trl's argument"}    # a column that the first row lacks
    texts = ["1"] * 3
    assert rewards["tensor"](groups[:3], texts, None) == [1.0] * 3 and rewards["count"](groups[:3], texts, None) == [1.0] * 3     # read once
    assert rewards["column"](groups[:3], texts, None) == [None, 3.0, None]
    for name, words in (("text", "reward is '1'"), ("missing", "'solution'")):
        with pytest.raises(SystemExit):
            load(name)[name](groups[:3], texts, None)
        said = capsys.readouterr().err
        assert words in said and f"r.py:{name}" in said and "answer" in said, said           # names the function and the columns


# --- the script --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    return out, run(out, "--max-steps", 6, "--eval-every", 3)


def test_zero_flag_smoke(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the script used the network"))
    monkeypatch.chdir(tmp_path)
    main(["--max-steps", "2", "--eval-samples", "16"])
    said = capsys.readouterr().out
    assert "pass@1" in said and {f.name for f in Path("runs/grpo").iterdir()} >= {"config.json", "model.safetensors", "args.json", "metrics.jsonl", "completions.jsonl", "checkpoint"}


def test_metrics_of_the_first_step(straight):
    first = straight[1][1]
    assert first["kl"] == pytest.approx(0, abs=1e-8) and first["clip_ratio"] == 0 and first["step"] == 1
    assert set(first) >= {"loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "clip_ratio",
                          "completions/mean_length", "completions/clipped_ratio", "completions/identical", "rewards/right/mean", "rewards/right/count", "tokens_per_second"}
    assert first["loss"] == pytest.approx(0, abs=1e-5)       # D7: mean advantage 0, ratio 1: a loss of 0 at the start is right
    rows = [json.loads(line) for line in (straight[0] / "completions.jsonl").read_text().splitlines()]
    assert all(len(r["completions"]) == len(r["rewards"]) == len(r["advantages"]) == 4 for r in rows)
    assert all(abs(sum(r["advantages"])) < 1e-5 for r in rows)


def test_d2_resume_is_bit_equal_rollouts_included(straight, tmp_path, monkeypatch):
    def die(out, step, values, log=train_grpo.log):
        if step == 5:
            raise RuntimeError("killed")
        log(out, step, values)
    monkeypatch.setattr(train_grpo, "log", die)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, "--max-steps", 6, "--eval-every", 3, "--save-every", 2)
    monkeypatch.undo()
    lines = run(tmp_path, "--max-steps", 6, "--eval-every", 3, "--save-every", 2, "--resume")
    assert timeless(lines) == timeless(straight[1])
    assert (tmp_path / "model.safetensors").read_bytes() == (straight[0] / "model.safetensors").read_bytes()
    assert (tmp_path / "completions.jsonl").read_bytes() == (straight[0] / "completions.jsonl").read_bytes()


def test_d2_a_stopped_run_loses_no_evaluation(straight, tmp_path, monkeypatch):
    for at in (3, 6):                                        # SIGTERM in a step after which an evaluation is due, the last one too
        def stop(out, step, values, log=train_grpo.log):
            log(out, step, values)
            if step == at and "loss" in values:
                signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(train_grpo, "log", stop)
        try:
            run(tmp_path, "--max-steps", 6, "--eval-every", 3, *(["--resume"] if at == 6 else []))
        except SystemExit as end:
            assert end.code == 130 and at == 3
        monkeypatch.undo()
    assert timeless(metrics(tmp_path)) == timeless(straight[1])


PARTS = {                                                    # flags under which one step shows each part of the loop
    "mask": ["--mask-truncated"], "penalty": ["--max-new-tokens", 4, "--overlong-penalty", 2], "temperature": ["--temperature", 0.7, "--kl", "k2"],
    "minibatch": ["--minibatches", 2, "--loss", "dapo"], "weights": ["--reward-weights", 1, 0.3], "min": ["--reward-weights", 1, 0.3, "--reward-aggregate", "min"],
    "KL in the reward": ["--kl", "reward"], "rloo": ["--loss", "rloo"], "dr-grpo": ["--loss", "dr-grpo"],
}


def other_model(folder):
    """A reference that differs from the toy's policy."""
    model = common.AutoModelForCausalLM.from_pretrained(TOY / "model")
    model.model.norm.weight.data *= 1.5
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", PARTS)
def test_the_first_gradient_of_the_loop_is_that_of_the_formulas(name, tmp_path, monkeypatch):
    """Masks, missing rewards, penalties, KL, weights and minibatches of the whole loop against plain transformers, one answer at a time."""
    ref, model = other_model(tmp_path / "ref"), common.AutoModelForCausalLM.from_pretrained(TOY / "model")
    (tmp_path / "r.py").write_text(                          # no reward for some; with answers of 3 tokens at most some are cut
        "def a(completions, answer, **_):\n    return [None if c[0]['content'][-1:] == '2' else float(c[0]['content'][1:] == x[1:]) for c, x in zip(completions, answer)]\n"
        "def b(completions, **_):\n    return [None if c[0]['content'][-1:] == '2' else int('1' in c[0]['content'][1:]) + len(c[0]['content']) / 2 for c in completions]\n")
    sampled, gradients, rollout, clip = [], [], train_grpo.rollout, torch.nn.utils.clip_grad_norm_

    def note(parameters, limit):
        parameters = list(parameters)
        gradients.append([p.grad.clone() for p in parameters])
        return clip(parameters, limit)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", note)
    monkeypatch.setattr(train_grpo, "rollout", lambda *a: (sampled.append(rollout(*a)), sampled[-1])[1])
    flags = ["--group-size", 6, "--max-new-tokens", 3, "--eval-samples", 0, "--beta", 0.5, "--max-steps", 1, "--ref-model", tmp_path / "ref",
             "--reward", f"{tmp_path / 'r.py'}:a", f"{tmp_path / 'r.py'}:b", "--watch", f"{TOY / 'reward.py'}:close", *PARTS[name]]
    run(tmp_path / "o", *flags)
    args, rolls = parse_args(list(map(str, flags))), sampled[0]

    def logp(m, prompt, ids):
        rows = m(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1] / args.temperature
        return rows.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    terms = []
    for number, roll in enumerate(rolls):
        new = [logp(model, roll["group"].prompt_ids, ids) for ids in roll["ids"]]
        old = [logp(ref, roll["group"].prompt_ids, ids).detach() for ids in roll["ids"]]
        w, join = args.reward_weights, {"sum": sum, "min": min}[args.reward_aggregate]
        r = [None if x is None else join([w[0] * x, w[1] * y]) for x, y in zip(roll["by_reward"]["a"], roll["by_reward"]["b"])]
        if args.overlong_penalty:
            r = [None if x is None else x - max(0, len(ids) - 2) / 2 for x, ids in zip(r, roll["ids"])]
        there, k1 = [x for x in r if x is not None], [(p - q).sum().item() for p, q in zip(new, old)]
        k1_mean = statistics.mean(k for k, x in zip(k1, r) if x is not None) if there else 0
        for x, k, p, q, ended in zip(r, k1, new, old, roll["ended"]):
            if x is None or args.mask_truncated and not ended or number % args.minibatches:
                continue
            A, n = x - statistics.mean(there), len(there)
            A *= 0 if n < 2 else n / (n - 1) if args.loss == "rloo" else 1 if args.advantage == "none" else 1 / (statistics.stdev(there) + 1e-4)
            if args.kl == "reward":                          # β is not divided by the rewards' spread
                A -= 0.5 * (k - k1_mean)
            terms.append(-A * p + 0.5 * {"k3": (q - p).exp() - 1 - (q - p), "k2": (q - p) ** 2 / 2, "reward": 0 * p}[args.kl])
    cut = [not e for roll in rolls for e in roll["ended"]]
    assert any(x is None for roll in rolls for x in roll["reward"]) and not all(cut) and (any(cut) or args.max_new_tokens > 3)
    loss = {"dapo": lambda: torch.cat(terms).mean(), "rloo": lambda: torch.stack([t.sum() for t in terms]).mean(),
            "dr-grpo": lambda: torch.cat(terms).sum() / len(terms) / args.max_new_tokens}.get(args.loss, lambda: torch.stack([t.mean() for t in terms]).mean())()
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    assert max(g.abs().max() for g in wanted) > 1e-2
    assert all(torch.allclose(ours, g, atol=2e-5) for ours, g in zip(gradients[0], wanted))


@pytest.mark.parametrize("flags", [["--loss", x] for x in LOSSES] + [["--kl", "reward"], ["--kl", "k2", "--mask-truncated"], ["--updates-per-batch", 2, "--minibatches", 2]],
                         ids=lambda f: "-".join(map(str, f)))
def test_b15_micro_batches_do_not_change_the_result(flags, tmp_path):
    states = []
    for budget in (100_000, 40, 1):
        lines = run(tmp_path / str(budget), "--max-steps", 2, "--lr", 1e-5, "--micro-batch-tokens", budget, *flags)
        states.append((common.AutoModelForCausalLM.from_pretrained(tmp_path / str(budget)).state_dict(), lines[1]["grad_norm"], lines[1]["loss"]))
    for state, norm, loss in states[1:]:
        assert norm == pytest.approx(states[0][1], rel=1e-3) and loss == pytest.approx(states[0][2], abs=1e-5)


def test_g6_second_update_sees_moved_weights_and_the_old_log_probs(tmp_path):
    one = run(tmp_path / "a", "--max-steps", 1, "--updates-per-batch", 1, "--lr", 5e-3, "--warmup-steps", 0)
    two = run(tmp_path / "b", "--max-steps", 1, "--updates-per-batch", 2, "--lr", 5e-3, "--warmup-steps", 0)
    assert one[1]["clip_ratio"] == 0 < two[1]["clip_ratio"] and one[1]["entropy"] == pytest.approx(two[1]["entropy"], abs=1e-5)


@pytest.mark.parametrize("kl", ["k3", "k2", "k3-unbiased", "reward"])
def test_g9_with_no_reward_to_gain_the_policy_moves_to_the_reference(kl, tmp_path):
    """Every sign right: rewards all alike, another model as the reference; only the KL is left, and it must fall."""
    other_model(tmp_path / "ref")
    (tmp_path / "r.py").write_text("def one(completions, **_):\n    return [1.0] * len(completions)\n")
    lines = run(tmp_path / kl, "--ref-model", tmp_path / "ref", "--reward", f"{tmp_path / 'r.py'}:one", "--kl", kl, "--beta", 1, "--advantage", "none",
                "--lr", 3e-4, "--lr-schedule", "constant", "--warmup-steps", 0, "--batch-size", 16, "--epochs", 4, "--eval-fraction", 0)
    kls = [m["kl"] for m in lines]
    assert statistics.mean(kls[-3:]) < 0.6 * statistics.mean(kls[:3])


def test_beta_0_loads_no_reference_and_options_run(tmp_path, monkeypatch):
    loads, load = [], train_grpo.load_model
    monkeypatch.setattr(train_grpo, "load_model", lambda *a: (loads.append(a), load(*a))[1])
    lines = run(tmp_path / "a", "--beta", 0, "--max-steps", 2, "--dynamic-sampling", "--overlong-penalty", 2, "--advantage", "batch-std")
    assert len(loads) == 1 and "kl" not in lines[1] and lines[1]["completions/sampled_groups"] >= 4
    reward_model(tmp_path / "rm")
    spec = f"{TOY / 'reward.py'}:right"
    lines = run(tmp_path / "b", "--reward", tmp_path / "rm", f"{TOY / 'reward.py'}:close", "--reward-weights", 1, 0.5, "--watch", spec, "--max-steps", 1)
    assert {"rewards/rm/mean", "rewards/close/mean", "rewards/right/mean", "rewards/right/count"} <= set(lines[1])


def test_a_watched_reward_of_the_same_name_is_not_trained_on(tmp_path):
    for name, value in (("one", 1), ("two", 7)):
        (tmp_path / f"{name}.py").write_text(f"def score(completions, **_):\n    return [{value}.0] * len(completions)\n")
    line = run(tmp_path / "o", "--reward", f"{tmp_path / 'one.py'}:score", "--watch", f"{tmp_path / 'two.py'}:score", "--max-steps", 1)[1]
    assert line["reward"] == 1 == line["rewards/score/mean"] and line["rewards/score_1/mean"] == 7


def test_dynamic_sampling_logs_all_that_was_sampled_and_says_when_nothing_was_learnt(tmp_path, capsys):
    (tmp_path / "r.py").write_text("def zero(completions, **_):\n    return [0.0] * len(completions)\n")
    flags = ("--dynamic-sampling", "--max-steps", 1)
    line = run(tmp_path / "o", *flags)[1]
    assert line["rewards/right/count"] == 4 * line["completions/sampled_groups"] > 16
    line = run(tmp_path / "p", *flags, "--reward", f"{tmp_path / 'r.py'}:zero")[1]
    assert "loss" not in line and line["reward"] == 0 and line["completions/sampled_groups"] == 20 and "no update" in capsys.readouterr().out


def test_pass_at_k_counts_the_answers_that_have_a_reward(tmp_path):
    (tmp_path / "r.py").write_text("def sure(completions, **_):\n    return [1.0 if i % 2 else None for i in range(len(completions))]\n")
    first = run(tmp_path / "o", "--reward", f"{tmp_path / 'r.py'}:sure", "--max-steps", 1)[0]
    assert first["eval/pass@1"] == 1 == first["eval/pass@2"] and "eval/pass@4" not in first   # no prompt has 4 of them


def test_a_window_that_no_config_names_is_found_before_training(tmp_path, capsys):
    """GPT-Neo's local layers count by place in the row: in a tree of several answers too few tokens would be seen."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    config = GPTNeoConfig(vocab_size=len(tokenizer), hidden_size=32, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=2, window_size=24,
                          max_position_embeddings=128, bos_token_id=1, eos_token_id=2)
    GPTNeoForCausalLM(config).save_pretrained(tmp_path / "neo")
    tokenizer.save_pretrained(tmp_path / "neo")
    run(tmp_path / "o", "--model", tmp_path / "neo", "--max-steps", 1, "--max-new-tokens", 12)
    assert "packed forward fails with GPTNeo" in capsys.readouterr().out


def test_a_prompt_and_an_answer_may_fill_max_length(tmp_path, capsys):
    for length, kept in ((16, 60), (15, 10)):                # the longest prompts have 8 tokens, --max-new-tokens is 8
        run(tmp_path / str(length), "--max-length", length, "--max-steps", 1)
        assert f"kept {kept}" in capsys.readouterr().out


def test_no_gradient_where_all_rewards_are_alike(tmp_path, capsys):
    (tmp_path / "r.py").write_text("def one(completions, **_):\n    return [1.0] * len(completions)\n")
    lines = run(tmp_path / "o", "--reward", f"{tmp_path / 'r.py'}:one", "--beta", 0, "--max-steps", 1)
    assert lines[1]["frac_reward_zero_std"] == 1 and lines[1]["grad_norm"] == 0 and lines[1]["reward_std"] == 0
    (tmp_path / "n.py").write_text("def none(completions, **_):\n    return [None] * len(completions)\n")
    flags = ("--reward", f"{tmp_path / 'n.py'}:none", "--beta", 0, "--max-steps", 1)
    line = run(tmp_path / "p", *flags, "--eval-fraction", 0)[0]
    assert "reward" not in line and line["rewards/none/count"] == 0 and line["grad_norm"] == 0
    assert "got a reward" in refused(capsys, "--output-dir", tmp_path / "q", "--limit", 60, *flags)      # rather than a run for nothing


def test_g19_what_gives_no_gradient_is_not_computed_and_stays_in_the_denominators(tmp_path, monkeypatch):
    """β = 0: every second prompt's answers are rewarded alike. All computed or only the rest: the same update, fewer tokens."""
    (tmp_path / "r.py").write_text("def odd(prompts, completions, **_):\n"
                                   "    return [float(c[0]['content'][:1] in '13579') * (sum(map(ord, p[0]['content'])) % 2) for p, c in zip(prompts, completions)]\n")
    flags, computed, gradients = ("--reward", f"{tmp_path / 'r.py'}:odd", "--beta", 0, "--max-steps", 1, "--batch-size", 16), [], []
    real, forward, clip = train_grpo.minibatches, train_grpo.forward, torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(train_grpo, "forward", lambda m, groups, *x: (computed.append(sum(g.tokens() for g in groups)), forward(m, groups, *x))[1])

    def note(parameters, limit):
        parameters = list(parameters)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        return clip(parameters, limit)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", note)
    some = run(tmp_path / "some", *flags)
    monkeypatch.setattr(train_grpo, "minibatches", lambda rolls, wanted, *x: real(rolls, [True] * len(wanted), *x))
    every = run(tmp_path / "every", *flags)
    assert 0 < some[1]["frac_reward_zero_std"] < 1 and computed[0] < computed[1]
    assert some[1]["entropy"] == every[1]["entropy"] and some[1]["loss"] == pytest.approx(every[1]["loss"], abs=1e-6)
    assert gradients[0].norm() > 0.1 and torch.allclose(*gradients, atol=1e-5)


@pytest.mark.parametrize("flags, words", [
    (["--group-size", "1"], ["--group-size"]), (["--temperature", "0"], ["--temperature"]), (["--loss", "gpro"], ["gpro", "'grpo'"]),
    (["--reward", "nothing.py:f"], ["nothing.py:f"]), (["--reward", f"{TOY / 'reward.py'}:wrong"], ["wrong", "reward.py"]),
    (["--reward", str(TOY / "model")], ["not a reward model", "train_rm.py"]), (["--reward-weights", "1", "2"], ["--reward-weights"]),
    (["--loss", "gspo", "--dual-clip", "3"], ["--dual-clip"]), (["--loss", "rloo", "--advantage", "group-std"], ["--advantage"]),
    (["--beta", "0", "--ref-model", "x"], ["--ref-model"]), (["--max-new-tokens", "512"], ["--max-new-tokens"]),
    (["--overlong-penalty", "129"], ["--overlong-penalty", "--max-new-tokens"]), (["--clip-low", "-0.5"], ["--clip-low"]),
    (["--loss", "cispo", "--clip-low", "0.5"], ["--clip-low", "cispo"]), (["--beta", "0", "--kl", "reward"], ["--kl", "--beta"]),
    (["--calibrate-length"], ["--calibrate-length", "reward-model"]), (["--temperature", "nan"], ["--temperature"]), (["--beta", "nan"], ["--beta"]),
])
def test_bad_input_ends_in_one_sentence(flags, words, capsys, tmp_path):
    said = refused(capsys, *flags, "--output-dir", tmp_path / "out")
    assert all(w in said for w in words), said


def test_clip_defaults_belong_to_the_loss():
    assert [(parse_args(["--loss", x]).clip_low, parse_args(["--loss", x]).clip_high) for x in LOSSES] == [CLIP[x] for x in LOSSES]
