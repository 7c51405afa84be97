"""train_grpo.py: its derivation by enumeration, every loss against float64, rewards, rollouts, and the script itself."""
import contextlib
import itertools
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
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoConfig,
    GPTNeoForCausalLM,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import train_grpo
from common import Group
from train_grpo import (
    VARIANTS,
    RewardError,
    Rollout,
    Tokens,
    advantage_scale,
    advantages,
    as_groups,
    clip_range,
    combine,
    fill,
    kl_term,
    main,
    micro_loss,
    overlong_penalty,
    parse_args,
    pass_at_k,
    weights,
    zero_variance,
)

TOY = Path(__file__).parent / "toy"
CPU = torch.device("cpu")
NONE = contextlib.nullcontext()


def run(out, *flags):
    small = ["--batch-size", 4, "--group-size", 4, "--limit", 60, "--max-new-tokens", 8, "--eval-samples", 8]
    main(list(map(str, ["--output-dir", out, *small, *flags])))
    return metrics(out)


def metrics(out):
    return read(Path(out) / "metrics.jsonl")


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def timeless(lines):
    kept = []
    for line in lines:
        kept.append({name: value for name, value in line.items() if "second" not in name})
    return kept


def refused(capsys, *flags):
    """The last line on stderr of a run that must end with exit code 2."""
    with pytest.raises(SystemExit) as end:
        main(list(map(str, flags)))
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def args_of(*flags):
    return parse_args(list(map(str, flags)))


def owners(lengths):
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def batch(lengths, seed=0, dtype=torch.float32):
    """Log-probs now and when sampled, for completions of these lengths."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(sum(lengths), generator=g, dtype=torch.float64)
    new = old + 0.4 * torch.randn(sum(lengths), generator=g, dtype=torch.float64)
    return new.to(dtype), old.to(dtype)


def tokens(logp, old, A, lengths):
    """Tokens as a surrogate gets them, A (K,) the advantage of each completion."""
    owner = owners(lengths)
    nothing = torch.full_like(old, math.nan)
    return Tokens(A[owner], torch.ones_like(old), old, nothing, owner, torch.tensor(lengths), logp)


def surrogate(x, args):
    variant = VARIANTS[args.loss]
    return variant.surrogate(x, variant.ratio(x), args)


def weights_of(lengths, args):
    """Weight of a token of each completion (K,); length 0: does not count."""
    lengths = torch.tensor(lengths)
    return weights(lengths, lengths > 0, torch.zeros_like(lengths), args)


# --- the derivation, by enumeration ----------------------------------------------------------------------------------

POLICY = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REWARD = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
ZERO = torch.zeros(3, dtype=torch.float64)


def force(loss):
    """Gradient, by the logits of POLICY, of loss(its log-probs)."""
    logits = POLICY.log().requires_grad_()
    return torch.autograd.grad(loss(logits.log_softmax(0)), logits)[0]


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


def reverse_kl(logp):
    return (logp.exp() * (logp - REF.log())).sum()


def test_eq1_policy_gradient_is_the_gradient_of_the_expected_reward():
    exact = force(lambda logp: (logp.exp() * REWARD).sum())
    assert torch.allclose(force(lambda logp: (POLICY * REWARD * logp).sum()), exact)


def test_eq2_a_baseline_costs_nothing():
    assert torch.allclose(force(lambda logp: (POLICY * 7.3 * logp).sum()), ZERO, atol=1e-12)


def test_eq3_leave_one_out_is_the_centred_reward_times_g_over_g_minus_1():
    rewards = [1.0, 0.0, 2.0, 5.0]
    wanted = []
    for i, x in enumerate(rewards):
        wanted.append(x - statistics.mean(rewards[:i] + rewards[i + 1:]))
    r = torch.tensor([rewards])
    assert advantages(r, "leave-one-out")[0].tolist() == pytest.approx(wanted)
    assert (advantages(r, "none")[0] * 4 / 3).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("loss", VARIANTS)
def test_eq4_on_policy_gradient_is_minus_advantage_times_grad_logp(loss):
    """Also G6: ratio exactly 1."""
    lengths = [2, 5, 3]
    A = torch.tensor([0.7, -1.2, 0.0])
    logp = batch(lengths)[0].requires_grad_()
    args = args_of("--loss", loss)
    w = weights_of(lengths, args)[owners(lengths)]
    losses, _ = surrogate(tokens(logp, logp.detach(), A, lengths), args)
    assert torch.allclose(gradient((losses * w).sum(), logp), -A[owners(lengths)] * w, atol=1e-6)


def test_eq9_what_each_kl_descends():
    """Exact expectations over three tokens: the numbers of G9, and the gradients as loss terms."""
    d = (REF / POLICY).log()
    assert (POLICY * -d).sum().item() == pytest.approx(0.085123, abs=1e-6)
    assert (POLICY * (d.exp() - 1 - d)).sum().item() == pytest.approx(0.085123, abs=1e-6)
    assert (POLICY * d.square() / 2).sum().item() == pytest.approx(0.080088, abs=1e-6)

    def of(kind):
        return force(lambda logp: (POLICY * kl_term(kind, logp, POLICY.log(), REF.log())).sum())
    reverse = force(reverse_kl)
    forward = force(lambda logp: (REF * (REF.log() - logp)).sum())
    assert torch.allclose(reverse, torch.tensor([0.1759, -0.0981, -0.0778], dtype=torch.float64), atol=1e-4)
    assert torch.allclose(of("k2"), reverse)
    assert torch.allclose(of("k3-unbiased"), reverse)
    assert torch.allclose(of("k3"), forward)
    assert torch.allclose(forward, torch.tensor([0.2, -0.1, -0.1], dtype=torch.float64))
    k1_in_the_loss = force(lambda logp: (POLICY * (logp - REF.log())).sum())
    assert torch.allclose(k1_in_the_loss, ZERO, atol=1e-12)
    k1_in_the_reward = force(lambda logp: (POLICY * (POLICY / REF).log() * logp).sum())
    assert torch.allclose(k1_in_the_reward, reverse)


def test_eq9_on_policy_k3_unbiased_and_k2_have_the_same_gradient_token_by_token():
    ref = batch([6], 1)[0]
    found = []
    for kind in ("k2", "k3-unbiased"):
        logp = batch([6], 2)[0].requires_grad_()
        found.append(gradient(kl_term(kind, logp, logp.detach(), ref).sum(), logp))
    assert torch.allclose(*found, atol=1e-6) and found[0].abs().min() > 1e-3


def test_eq9_k3_unbiased_stays_unbiased_off_policy():
    """Samples from another policy, weighted by ρ: still the gradient of KL(π ‖ π_ref); a detached ratio would not be."""
    old = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    ours = force(lambda logp: (old * kl_term("k3-unbiased", logp, old.log(), REF.log())).sum())
    assert torch.allclose(ours, force(reverse_kl))


def test_eq10_only_k1_in_the_reward_is_exact_for_completions_of_more_than_one_token():
    """Two tokens over three: the KL of whole completions counts what the first token does to the second's KL."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, generator=g, dtype=torch.float64)      # logits of token 1, of token 2 after each
    ref = torch.randn(4, 3, generator=g, dtype=torch.float64)

    def completions(logits):                                 # (3, 3) log-probs of the first and of the second token
        first, *second = logits.log_softmax(-1)
        return first[:, None].expand(3, 3), torch.stack(second)
    a0, b0 = completions(start)
    ra, rb = completions(ref)
    p = (a0 + b0).exp()

    def force_of(loss):
        logits = start.clone().requires_grad_()
        return gradient(loss(*completions(logits)).sum(), logits)
    exact = force_of(lambda a, b: (a + b).exp() * (a + b - ra - rb))
    in_reward = force_of(lambda a, b: p * (a0 + b0 - ra - rb) * (a + b))                     # r − β Σ k1
    assert torch.allclose(in_reward, exact)
    for kind in ("k2", "k3-unbiased", "k3"):
        ours = force_of(lambda a, b: p * (kl_term(kind, a, a0, ra) + kl_term(kind, b, b0, rb)))
        assert 0.05 < (ours - exact).norm() / exact.norm() < 1
        if kind != "k3":                                     # of the last token, with nothing after it, they are exact
            assert torch.allclose(ours[1:], exact[1:]) and not torch.allclose(ours[0], exact[0])


def test_g9_kl_of_distant_models_is_finite_and_still_pulls():
    for kind in ("k3", "k2", "k3-unbiased"):
        logp = torch.tensor([-100.0, -0.1], requires_grad=True)
        value = kl_term(kind, logp, logp.detach(), torch.tensor([-0.1, -100.0]))
        value.sum().backward()
        assert torch.isfinite(value).all() and torch.isfinite(logp.grad).all()
        assert logp.grad[1] >= 1                             # far above the reference: down


# --- losses: values and gradients ------------------------------------------------------------------------------------

def by_hand(loss, logp, old, A, lengths, eps, L):
    """Each loss from its paper, completion by completion, token by token, in float64."""
    low = torch.tensor(1 - eps[0], dtype=torch.float64)
    high = torch.tensor(1 + eps[1], dtype=torch.float64)

    def ppo(log_ratio, a):
        ratio = log_ratio.exp()
        return min(ratio * a, max(min(ratio, high), low) * a)
    total = 0
    for new, before, a in zip(logp.split(lengths), old.split(lengths), A.tolist()):
        if loss == "gspo":
            total = total - ppo((new - before).mean(), a) / len(lengths)
        elif loss == "rloo":
            total = total - ppo((new - before).sum(), a) / len(lengths)
        else:
            for x, y in zip(new, before):
                if loss == "cispo":
                    total = total - min((x - y).exp().item(), high.item()) * a * x / sum(lengths)
                else:
                    divisor = {"grpo": len(new) * len(lengths), "dapo": sum(lengths), "dr-grpo": len(lengths) * L}
                    total = total - ppo(x - y, a) / divisor[loss]
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss", VARIANTS)
def test_eq6_eq7_eq8_value_and_gradient_against_float64(loss, seed):
    lengths = [3, 1, 6, 4]
    A = torch.tensor([1.0, -0.5, 0.3, -2.0])
    low = [] if loss == "cispo" else ["--clip-low", 0.15]
    args = args_of("--loss", loss, "--clip-high", 0.3, "--max-new-tokens", 9, *low)
    logp, old = batch(lengths, seed)
    logp.requires_grad_()
    losses, _ = surrogate(tokens(logp, old, A, lengths), args)
    ours = (losses * weights_of(lengths, args)[owners(lengths)]).sum()
    exact, old64 = batch(lengths, seed, torch.float64)
    exact.requires_grad_()
    theirs = by_hand(loss, exact, old64, A, lengths, (0.15, 0.3), 9)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
    assert torch.allclose(gradient(ours, logp).double(), gradient(theirs, exact), atol=1e-5)


def test_advantages_may_differ_from_token_to_token():
    lengths = [3, 2]
    A = torch.tensor([1.0, -0.5, 0.0, 0.3, -2.0])            # (T,)
    args = args_of("--clip-low", 0.15, "--clip-high", 0.3)
    logp, old = batch(lengths, 4)
    x = Tokens(A, torch.ones(5), old, old, owners(lengths), torch.tensor(lengths), logp)
    ratio = (logp - old).exp()
    wanted = -torch.minimum(ratio * A, ratio.clamp(0.85, 1.3) * A)
    assert torch.allclose(surrogate(x, args)[0], wanted, atol=1e-6)


@pytest.mark.parametrize("kind", ["k3", "k2", "k3-unbiased"])
def test_micro_loss_is_surrogate_and_kl_under_one_weight_however_the_step_is_cut(kind):
    """Value and gradient against float64; completions numbered out of order; one that does not count, its KL NaN."""
    args = args_of("--kl", kind, "--beta", 0.3)
    index = [2, 0, 3, 1]                                     # the batch's completions as the step numbers them
    lengths = [3, 1, 6, 4]                                   # in the batch's order, as all that follows
    owner = owners(lengths)
    A = torch.tensor([1.0, -0.5, 0.3, -2.0])
    logp, old = batch(lengths, 5)
    ref = old + 0.4 * torch.randn(len(old), generator=torch.Generator().manual_seed(6))
    ref[owner == 1] = math.nan
    logp.requires_grad_()
    w = weights_of([3, 0, 6, 4], args)

    # The same columns in the step's order.
    order = sorted(range(4), key=lambda k: index[k])
    step_lengths = torch.tensor([lengths[k] for k in order])
    step_owner = torch.arange(4).repeat_interleave(step_lengths)
    step = Tokens(
        A=A[order][step_owner],
        weight=w[order][step_owner],
        old=torch.cat([old[owner == k] for k in order]),
        ref=torch.cat([ref[owner == k] for k in order]),
        owner=step_owner,
        lengths=step_lengths)

    def part(first, last):
        mine = (owner >= first) & (owner < last)
        group = Group("", "", [], index=index[first:last])
        return micro_loss(step.of([group], logp[mine]), args)
    one, sums = part(0, 4)
    halves = [part(0, 2), part(2, 4)]
    both = halves[0][0] + halves[1][0]
    assert sums["tokens"] == 13 == halves[0][1]["tokens"] + halves[1][1]["tokens"]

    x = logp.detach().double().requires_grad_()
    y = old.double()
    z = ref.double().nan_to_num()
    ratio = (x - y).exp()
    by_token = A.double()[owner]
    objective = torch.minimum(ratio * by_token, ratio.clamp(0.8, 1.2) * by_token)
    k3 = (z - x).exp() - 1 - (z - x)
    estimate = {"k3": k3, "k2": (z - x) ** 2 / 2, "k3-unbiased": ratio * k3}[kind]
    assert math.isfinite(sums["kl"])                         # of what counts
    n = torch.tensor(lengths, dtype=torch.float64)[owner]
    exact = ((0.3 * estimate - objective) / (3 * n))[owner != 1].sum()
    assert one.item() == pytest.approx(exact.item(), rel=1e-5) == both.item()
    wanted = gradient(exact, x).float()
    assert torch.allclose(gradient(one, logp), wanted, atol=1e-6)
    assert torch.allclose(gradient(both, logp), wanted, atol=1e-6)


def test_b6_losses_differ_in_value_and_gradient():
    lengths = [3, 1, 6]
    A = torch.tensor([1.0, -0.5, 0.3])
    seen = set()
    for loss in VARIANTS:
        logp, old = batch(lengths)
        logp.requires_grad_()
        args = args_of("--loss", loss, "--max-new-tokens", 16)
        losses, _ = surrogate(tokens(logp, old, A, lengths), args)
        value = (losses * weights_of(lengths, args)[owners(lengths)]).sum()
        seen.add((round(value.item(), 6), round(gradient(value, logp).norm().item(), 6)))
    assert len(seen) == len(VARIANTS)


def test_g13_aggregation_golden_values():
    """Lengths 2 and 6, A = ±1, limit 8, on policy."""
    logp = torch.zeros(8)
    x = tokens(logp, logp, torch.tensor([1.0, -1.0]), [2, 6])
    for loss, value in (("grpo", 0.0), ("dapo", 0.5), ("dr-grpo", 0.25), ("gspo", 0.0)):
        args = args_of("--loss", loss, "--max-new-tokens", 8)
        w = weights_of([2, 6], args)[x.owner]
        assert (surrogate(x, args)[0] * w).sum().item() == pytest.approx(value, abs=1e-7)


def test_g12_completions_that_do_not_count_are_in_no_denominator():
    for loss in VARIANTS:
        args = args_of("--loss", loss, "--max-new-tokens", 8)
        some = weights_of([2, 0, 6], args)
        assert torch.allclose(some[[0, 2]], weights_of([2, 6], args)) and some[1] == 0
        assert weights_of([0, 0], args).tolist() == [0, 0]   # all masked: loss 0, no NaN
        apart = weights(torch.tensor([2, 5, 6]), torch.tensor([True] * 3), torch.tensor([0, 1, 0]), args)
        assert torch.allclose(apart[[0, 2]], weights_of([2, 6], args))       # every minibatch has its own denominators
        assert torch.allclose(apart[1:2], weights_of([5], args))


def test_g14_gspo_ratio_is_per_completion():
    args = SimpleNamespace(loss="gspo", clip_low=1.0, clip_high=1.0, dual_clip=0)
    x = tokens(torch.full((8,), 0.1), torch.zeros(8), torch.tensor([1.0, -1.0]), [2, 6])
    assert surrogate(x, args)[0].tolist() == pytest.approx([-1.105171] * 2 + [1.105171] * 6, abs=1e-6)


@pytest.mark.parametrize("flags", [*[["--loss", x] for x in VARIANTS], ["--dual-clip", 1.3]], ids=lambda f: str(f[-1]))
def test_clip_ratio_counts_the_tokens_that_the_clip_took(flags):
    """Of the ratio that this loss clips, not always the token's: where no gradient is left of a token it was clipped."""
    low = [] if "cispo" in flags else ["--clip-low", 0.2]
    args = args_of(*flags, "--clip-high", 0.3, *low)
    lengths = [3, 1, 6, 4, 5]
    logp, old = batch(lengths, 3)
    logp.requires_grad_()
    x = tokens(logp, old, torch.tensor([1.0, -0.5, 0.3, -2.0, 0.0]), lengths)
    losses, zeroed = surrogate(x, args)
    if args.loss == "cispo":                                 # clips the weight and keeps the gradient
        wanted = ((logp - old).exp() > 1.3) & (x.A != 0)
    else:
        wanted = (gradient(losses.sum(), logp) == 0) & (x.A != 0)
    assert zeroed.tolist() == wanted.tolist() and 0 < zeroed.sum() < len(zeroed)


def one_token(ratio, A, *flags):
    """Loss of one token, and its gradient by the log-prob."""
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    losses, _ = surrogate(tokens(logp, torch.zeros(1), torch.tensor([float(A)]), [1]), args_of(*flags))
    return losses.item(), gradient(losses.sum(), logp).item()


@pytest.mark.parametrize("A, ratio, objective, moves", [
    (1, 1.5, 1.2, False), (-1, 1.5, -1.5, True), (-1, 0.5, -0.8, False), (1, 0.5, 0.5, True)])
def test_g15_which_side_is_clipped(A, ratio, objective, moves):
    loss, slope = one_token(ratio, A)
    assert loss == pytest.approx(-objective, abs=1e-6) and (slope != 0) == moves
    higher, _ = one_token(ratio, A, "--loss", "dapo")
    assert (higher != pytest.approx(loss)) == (A > 0 and ratio > 1)          # 0.28 changes only this side


def test_dual_clip_bounds_the_loss_of_a_bad_completion():
    assert one_token(9.0, -1, "--dual-clip", 3) == (pytest.approx(3.0), 0)
    assert one_token(0.1, 1, "--dual-clip", 3)[0] == pytest.approx(-0.1)     # a good one's is left alone


# --- advantages and rewards ------------------------------------------------------------------------------------------

def test_eq5_g10_advantages():
    def one(r, scale="group-std"):
        return advantages(torch.tensor([r]), scale)[0].tolist()
    assert one([1.0, 0, 0, 1]) == pytest.approx([0.865875, -0.865875, -0.865875, 0.865875], abs=1e-6)
    assert one([1.0] * 4) == [0] * 4 and max(map(abs, one([0.1] * 8))) < 1e-3
    assert max(map(abs, one([0.35] * 7 + [0.95]))) < math.sqrt(8)
    r = torch.tensor([[1.0, 0.0], [10.0, 4.0]])
    std = statistics.stdev([1, 0, 10, 4]) + 1e-4
    assert advantages(r, "none").tolist() == [[0.5, -0.5], [3, -3]]
    assert advantages(r, "batch-std").flatten().tolist() == pytest.approx([0.5 / std, -0.5 / std, 3 / std, -3 / std])
    assert advantages(r, "group-std").flatten().tolist() == pytest.approx([0.7071, -0.7071] * 2, abs=1e-3)


@pytest.mark.parametrize("scale", ["group-std", "batch-std", "none", "leave-one-out"])
def test_a_zero_variance_group_is_one_whose_advantages_are_all_0(scale):
    """Exactly 0, though the mean of three times 0.1 is not 0.1: what is filtered is what gives no gradient."""
    nan = math.nan
    r = torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.2, 0.1], [nan, 0.7, 0.7], [nan, 5.0, nan], [nan, nan, nan], [nan, 1, 2]],
                     dtype=torch.float64)
    assert zero_variance(r).tolist() == [True, False, True, True, True, False]
    assert zero_variance(r).tolist() == (advantages(r, scale) == 0).all(1).tolist()


def test_g11_no_reward_is_in_no_mean_and_has_no_advantage():
    nan = math.nan
    assert advantages(torch.tensor([[1.0, 0.0, nan, 1.0, 0.0]]), "group-std")[0, 2] == 0
    without = advantages(torch.tensor([[1.0, 0.0]]), "group-std")[0].tolist()
    assert advantages(torch.tensor([[1.0, 0.0, nan]]), "group-std")[0, :2].tolist() == without
    assert advantages(torch.tensor([[nan, 1.0], [nan, nan]]), "group-std").tolist() == [[0, 0], [0, 0]]
    some = torch.tensor([[1.0, nan, nan], [2.0, 4.0, nan]], dtype=torch.float64)
    assert optional(combine(some, [1, 0.5], "sum")) == [2.0, 2.0, None]
    assert optional(combine(some, [1, 0.5], "min")) == [1.0, 2.0, None]
    assert combine(torch.tensor([[1.0, 3.0], [2.0, 4.0]]).double(), [1, 0.5], "min").tolist() == [1.0, 2.0]


def optional(column):
    """A column as a list, None for NaN."""
    return [None if math.isnan(x) else x for x in column.tolist()]


@pytest.mark.parametrize("body, words", [
    ("return [1.0]", "1 values for"),
    ("return 1.0", "1.0 values"),
    ("return [float('nan')] * len(completions)", "reward is nan"),
    ("return [float('inf')] * len(completions)", "reward is inf"),
    ("\n    return {}['key']", "KeyError: 'key', in line 3 of"),
])
def test_g11_bad_rewards_name_the_function(body, words, tmp_path, capsys):
    (tmp_path / "r.py").write_text(f"def bad(completions, **_):\n    {body}\n")
    flags = ("--output-dir", tmp_path / "o", "--limit", 30, "--eval-samples", 8)
    said = refused(capsys, "--reward", f"{tmp_path}/r.py:bad", *flags)
    assert "bad" in said and words in said


def rollout_of(rewards):
    """A Rollout with nothing in it but rewards, P lists of G; a prompt's number is its group."""
    flat = torch.tensor(rewards, dtype=torch.float64).flatten()
    nothing = [[]] * len(flat)
    return Rollout(list(range(len(rewards))), nothing, nothing, flat > 9, flat, {"r": flat}, flat, Counter())


def test_g16_soft_overlong_penalty_and_dynamic_sampling_on_the_raw_reward():
    assert overlong_penalty(torch.tensor([3, 16, 18, 20, 25]), 20, 4).tolist() == [0, 0, -0.5, -1, -1]
    assert overlong_penalty(torch.tensor([100]), 20, 0).tolist() == [0]
    assert zero_variance(torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, math.nan]])).tolist() == [True, False, True]
    args = SimpleNamespace(seed=0, mask_truncated=False)
    train = list(range(9))
    asked = []
    seeds = []

    def more(prompts, seed):
        asked.append(prompts)
        seeds.append(seed)
        return rollout_of([[0.0, float(len(asked) > 1)]] * len(prompts))
    first = rollout_of([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    kept, every = fill(first, more, train, [0, 1, 2], args, 5)
    assert len(kept.groups) == 3 and len(every.groups) == 7
    assert kept.reward.tolist() == [0, 1] * 3 and every.reward.tolist()[:6] == first.reward.tolist()
    assert [len(x) for x in asked] == [2, 2] and seeds[0] != seeds[1]
    assert len({0, 1, 2, *asked[0], *asked[1]}) == 7         # no prompt twice in a step

    def alike(prompts, seed):
        return rollout_of([[1.0, 1.0]] * len(prompts))
    kept, every = fill(rollout_of([[0.0, 0.0]] * 3), alike, train, [0, 1, 2], args, 5)
    assert kept.groups == [] == kept.ids and len(every.groups) == 9          # the prompts ran out


def test_pass_at_k_is_unbiased():
    for n, correct, k in ((4, 1, 2), (8, 3, 4), (5, 0, 3), (5, 5, 1)):
        draws = list(itertools.combinations([1] * correct + [0] * (n - correct), k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


# --- rollouts --------------------------------------------------------------------------------------------------------

def setup(*flags):
    """args, encoder, 12 prompts, policy."""
    args = args_of("--max-new-tokens", 8, "--limit", 12, *flags)
    encoder = common.load_encoder(TOY / "model")
    groups, account = common.read_groups(TOY / "prompts.jsonl", ("prompt",), limit=12)
    groups = common.tokenise(groups, account, encoder, 64)
    return args, encoder, groups, common.load_model(TOY / "model", encoder, CPU)


def no_reward(groups, texts, ids, ended):
    return torch.zeros(len(texts), dtype=torch.float64)


def draw(policy, encoder, groups, args, n, reward=no_reward):
    return train_grpo.sample_and_reward(policy, encoder, groups, {"r": reward}, args, NONE, n, 0)


def test_g7_each_completion_sees_its_own_rows_columns_and_g18_its_text():
    args, encoder, groups, policy = setup()
    seen = []

    def answer(asked, texts, ids, ended):
        seen.extend(zip(asked, texts, ids))
        return torch.tensor([float(g.row["answer"]) for g in asked], dtype=torch.float64)
    rollout = draw(policy, encoder, groups, args, 3, answer)
    wanted = [g.row["answer"] for g in groups for _ in range(3)]
    assert [g.row["answer"] for g, _, _ in seen] == wanted
    assert rollout.reward.tolist() == list(map(float, wanted)) == rollout.rewards["r"].tolist()
    assert rollout.prompt.tolist() == [i for i in range(12) for _ in range(3)] and rollout.size == 3
    for _, text, ids in seen:                                # what the model wrote, without the end token
        assert text == encoder.tokenizer.decode([i for i in ids if i != encoder.eos]) and "</s>" not in text


def test_join_and_take_keep_every_column_beside_its_completion():
    args, encoder, groups, policy = setup()
    rollout = draw(policy, encoder, groups[:5], args, 3)
    parts = [rollout.take(torch.tensor([i in chosen for i in range(5)])) for chosen in ({0, 1}, {2, 4})]
    both = parts[0].join(parts[1])
    kept = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 14]
    assert both.groups == [groups[i] for i in (0, 1, 2, 4)]
    for name in ("ids", "texts"):
        assert getattr(both, name) == [getattr(rollout, name)[i] for i in kept]
    for name in ("ended", "logps", "reward", "lengths"):
        assert torch.equal(getattr(both, name), getattr(rollout, name)[kept])
    assert torch.equal(both.rewards["r"], rollout.rewards["r"][kept])
    assert both.prompt.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_g8_the_sampled_ids_are_the_ids_that_are_trained_on():
    args, encoder, groups, policy = setup()
    rollout = draw(policy, encoder, groups[:3], args, 4)
    wanted = torch.tensor([i not in (1, 4, 5, 6, 7) for i in range(12)])     # the second group gives no gradient
    for budget, count, packed in [(10 ** 6, 1, True), (12, 1, True), (1, 1, True), (30, 2, True), (10 ** 6, 5, False)]:
        args = args_of("--micro-batch-tokens", budget, "--minibatches", count, "--loss", "dapo")
        part = rollout.prompt % count
        seen = []
        for number in range(count):
            mine = as_groups(rollout, wanted & (part == number), args, packed)
            index = [i for g in mine for i in g.index]
            assert set(index) == set((wanted & (part == number)).nonzero()[:, 0].tolist())
            for micro in common.micro_batches(mine, budget, packed):
                made = [(g.prompt_ids, ids) for g in micro for ids in g.completion_ids]
                index = [i for g in micro for i in g.index]
                assert made == [(rollout.groups[i // 4].prompt_ids, rollout.ids[i]) for i in index]
                assert all(g.tokens() <= budget or len(g.index) == 1 for g in micro)
                seen += index
        assert sorted(seen) == wanted.nonzero()[:, 0].tolist()
        _, minibatches, _ = train_grpo.prepare(rollout, policy, policy, args, packed, NONE)
        assert len(minibatches) == min(count, 3)
        assert sorted(i for mine in minibatches for g in mine for i in g.index) == list(range(12))


def test_g5_training_forward_gives_the_log_probs_of_the_rollout():
    args, encoder, groups, policy = setup("--temperature", 0.7)
    samples = common.sample(policy, [g.prompt_ids for g in groups], 3, 8, encoder.stops, 0.7, seed=1)
    for i, g in enumerate(groups):
        g.completion_ids = [s.ids for s in samples[3 * i:3 * i + 3]]
    common.number_completions(groups)
    lengths = torch.tensor([len(s.ids) for s in samples])
    logps = train_grpo.log_probs(policy, [groups], lengths, args, True, NONE)
    assert torch.allclose(logps, torch.tensor([x for s in samples for x in s.logps]), atol=1e-5)


def test_g7_permuting_the_prompts_permutes_the_completions_and_nothing_else():
    _, encoder, groups, policy = setup()

    def ask(prompts, seed=1):
        ids = [s.ids for s in common.sample(policy, prompts, 3, 8, encoder.stops, seed=seed)]
        return [ids[i:i + 3] for i in range(0, len(ids), 3)]
    prompts = [g.prompt_ids for g in groups]
    assert ask(prompts) == ask(prompts[::-1])[::-1] != ask(prompts, seed=2) and ask(prompts)[:4] == ask(prompts[:4])
    first, second = ask([prompts[0]] * 2)
    assert first != second                                   # G17: the same prompt twice is two draws


def reward_model(folder, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(TOY / "model", num_labels=1)
    model.config.pad_token_id = 0
    model.config.reward_mean = 0.3
    model.config.reward_std = 2.0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(folder)
    return model


def load_reward(spec, args):
    (reward,) = train_grpo.load_rewards([str(spec)], args, CPU).values()
    return reward


def test_g18_a_reward_model_scores_text_as_plain_transformers_does(tmp_path, capsys):
    model = reward_model(tmp_path / "rm").eval()
    args, encoder, groups, _ = setup()
    assert list(train_grpo.load_rewards([str(tmp_path / "rm")], args, CPU)) == ["rm"]
    reward = load_reward(tmp_path / "rm", args)
    assert "z-scored" not in capsys.readouterr().out
    texts = [str(i * 7) for i in range(len(groups))]

    def plain(g, text):
        said = {"role": "assistant", "content": text}
        return encoder.tokenizer.apply_chat_template(g.prompt + [said], return_dict=False, return_tensors="pt")
    for g, text, score in zip(groups, texts, reward(groups, texts, None, [True] * len(texts)).tolist()):
        assert score == pytest.approx((model(plain(g, text)).logits[0, 0].item() - 0.3) / 2, abs=1e-4)
    (truncated,) = reward(groups[:1], texts[:1], None, [False])              # no end token where it did not end
    ids = plain(groups[0], texts[0])
    assert ids[0, -1] == encoder.eos
    hidden = model.model(ids[:, :-1]).last_hidden_state[0, -1]
    assert truncated.item() == pytest.approx((model.score(hidden)[0].item() - 0.3) / 2, abs=1e-4)


def test_a_reward_model_reads_plain_prompts_as_the_policy_does(tmp_path):
    """--chat: the policy answers a user turn, so the reward model must see one."""
    reward_model(tmp_path / "rm")
    args, encoder, groups, _ = setup()
    ended = [True] * 3
    turns = load_reward(tmp_path / "rm", args)(groups[:3], list("123"), None, ended)
    plain = [Group("", g.prompt[0]["content"], []) for g in groups[:3]]
    chat, *_ = setup("--chat")
    assert load_reward(tmp_path / "rm", chat)(plain, list("123"), None, ended).tolist() == turns.tolist()


def test_g11_a_reward_model_without_statistics_says_so_and_a_broken_one_ends_the_run(tmp_path, capsys):
    model = reward_model(tmp_path / "rm")
    del model.config.reward_mean, model.config.reward_std
    model.save_pretrained(tmp_path / "rm")
    args, encoder, groups, _ = setup()
    reward = load_reward(tmp_path / "rm", args)
    assert "not z-scored" in capsys.readouterr().out

    def broken(model, batch):
        return torch.full((batch.count,), math.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_grpo, "reward_scores", broken)
        with pytest.raises(RewardError, match="not a finite number"):
            reward(groups[:2], ["1", "2"], None, [True, True])
    model.score.weight.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "rm")
    with pytest.raises(SystemExit):
        load_reward(tmp_path / "rm", args)(groups[:2], ["1", "2"], None, [True, True])
    assert "NaN" in capsys.readouterr().err


REWARDS = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from beside import ONE

LOADED = []

@dataclass
class Point:
    x: int = 0

def tensor(completions, **_):
    LOADED.append(1)
    return torch.full((len(completions),), ONE)

def count(completions, **_):
    return [len(LOADED)] * len(completions)

def column(completions, extra, **_):
    return [x if x is None else float(x) for x in extra]

def text(completions, **_):
    return ['1'] * len(completions)

def missing(completions, solution):
    return [0.0] * len(completions)

def rude(prompts, completions, completion_ids, tags, **_):
    for prompt, said, ids, tag in zip(prompts, completions, completion_ids, tags):
        prompt[0]["content"] = "changed"
        prompt.append(said[0])
        ids.clear()
        tag.append("changed")
    return [1.0] * len(completions)
"""


def test_g11_what_users_bring_as_a_reward_function(tmp_path):
    (tmp_path / "beside.py").write_text("ONE = 1.0\n")
    (tmp_path / "r.py").write_text(REWARDS)
    args, _, groups, _ = setup()
    texts = ["1"] * 3
    ids = [[1], [1], [1]]
    names = ("tensor", "count", "column", "text", "missing")
    rewards = train_grpo.load_rewards([f"{tmp_path}/r.py:{name}" for name in names], args, CPU)
    groups[1].row |= {"extra": 3, "prompts": "a column that is called as trl's argument"}    # the first row lacks it

    def call(name):
        return optional(rewards[name](groups[:3], texts, ids, [True] * 3))
    assert call("tensor") == [1.0] * 3 == call("count")      # the file is read once
    assert call("column") == [None, 3.0, None]
    for name, *words in (("text", "reward is '1'", "completion"), ("missing", "'solution'", "answer")):
        with pytest.raises(RewardError) as error:
            call(name)
        assert all(word in str(error.value) for word in [*words, f"r.py:{name}"])    # names the function and the columns


def test_a_reward_function_gets_copies(tmp_path):
    (tmp_path / "beside.py").write_text("ONE = 1.0\n")
    (tmp_path / "r.py").write_text(REWARDS)
    args, encoder, groups, policy = setup()
    for g in groups:
        g.row["tags"] = ["a"]
    before = [str(g.prompt) for g in groups]
    rollout = draw(policy, encoder, groups, args, 2, load_reward(f"{tmp_path}/r.py:rude", args))
    assert [str(g.prompt) for g in groups] == before and all(g.row["tags"] == ["a"] for g in groups)
    assert rollout.ids == draw(policy, encoder, groups, args, 2).ids


# --- the script ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    return out, run(out, "--max-steps", 6, "--eval-every", 3)


def test_zero_flag_smoke(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the script used the network"))
    monkeypatch.chdir(tmp_path)
    main(["--max-steps", "2", "--eval-samples", "16"])
    assert "pass@1" in capsys.readouterr().out
    made = {f.name for f in Path("runs/grpo").iterdir()}
    assert made >= {"config.json", "model.safetensors", "args.json", "metrics.jsonl", "completions.jsonl", "checkpoint"}


def test_metrics_of_the_first_step(straight):
    first = straight[1][1]
    assert first["kl"] == pytest.approx(0, abs=1e-8) and first["clip_ratio"] == 0 and first["step"] == 1
    assert set(first) >= {
        "loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "clip_ratio",
        "completions/mean_length", "completions/clipped_ratio", "completions/identical", "completions/sampled_groups",
        "rewards/right/mean", "rewards/right/count", "tokens_per_second", "sample_tokens_per_second",
        "seconds/sample", "seconds/reward", "seconds/update"}
    assert first["loss"] == pytest.approx(0, abs=1e-5)       # D7: mean advantage 0, ratio 1: a loss of 0 is correct
    rows = read(straight[0] / "completions.jsonl")
    assert all(len(r["completions"]) == len(r["rewards"]) == len(r["advantages"]) == 4 for r in rows)
    assert all(abs(sum(r["advantages"])) < 1e-5 for r in rows)


def log_then(action):
    """train_grpo.log, with action(step, values) after it."""
    log = train_grpo.log

    def both(out, step, values):
        log(out, step, values)
        action(step, values)
    return both


def test_d2_resume_is_bit_equal_rollouts_included(straight, tmp_path, monkeypatch):
    def die(out, step, values, log=train_grpo.log):
        if step == 5:
            raise RuntimeError("killed")
        log(out, step, values)
    flags = ("--max-steps", 6, "--eval-every", 3, "--save-every", 2)
    monkeypatch.setattr(train_grpo, "log", die)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, *flags)
    monkeypatch.undo()
    assert timeless(run(tmp_path, *flags, "--resume")) == timeless(straight[1])
    for name in ("model.safetensors", "completions.jsonl"):
        assert (tmp_path / name).read_bytes() == (straight[0] / name).read_bytes()


def test_d2_a_stopped_run_loses_no_evaluation(straight, tmp_path, monkeypatch):
    for at in (3, 6):                    # SIGTERM in a step after which an evaluation is due, the last one too
        def stop(step, values):
            if step == at and "loss" in values:
                signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(train_grpo, "log", log_then(stop))
        try:
            run(tmp_path, "--max-steps", 6, "--eval-every", 3, *(["--resume"] if at == 6 else []))
        except SystemExit as end:
            assert end.code == 130 and at == 3
        monkeypatch.undo()
    assert timeless(metrics(tmp_path)) == timeless(straight[1])


FAILING = """
import json
from pathlib import Path

CALLS = []

def right(completions, answer, **_):
    CALLS.append(1)
    if len(CALLS) == FAIL_AT:
        BODY
    return [float(c[0]["content"].strip() == str(a)) for c, a in zip(completions, answer)]
"""


@pytest.mark.parametrize("at, body, words", [
    (4, "raise ValueError('no judge today')", "no judge today"),             # calls: evaluation, then steps 1, 2, 3
    (4, "return [None]", "1 values for"),
    (5, "return [None] * len(completions)", "got a reward"),                 # the evaluation after step 3
])
def test_no_step_is_lost_where_a_reward_fails_in_mid_run(at, body, words, straight, tmp_path, capsys):
    """The last good state is saved before the run ends, the message says how to go on, and to the same bits."""
    flags = ["--max-steps", 6, "--eval-every", 3, "--reward", f"{tmp_path}/r.py:right"]
    (tmp_path / "r.py").write_text(FAILING.replace("FAIL_AT", str(at)).replace("BODY", body))
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "o", *flags)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    done = at - 2
    assert end.value.code == 2 and words in said and "--resume" in said and f"after step {done}" in said
    assert [f.name for f in (tmp_path / "o/checkpoint").iterdir()] == [f"step-{done}.safetensors"]
    (tmp_path / "r.py").write_text(FAILING.replace("FAIL_AT", "0").replace("BODY", "pass"))
    assert timeless(run(tmp_path / "o", *flags, "--resume")) == timeless(straight[1])
    assert (tmp_path / "o/model.safetensors").read_bytes() == (straight[0] / "model.safetensors").read_bytes()


def test_a_gradient_that_is_not_finite_is_not_applied_and_the_run_goes_on(straight, tmp_path, monkeypatch, capsys):
    clip = torch.nn.utils.clip_grad_norm_
    norms = []

    def broken(parameters, bound):
        norms.append(clip(parameters, bound))
        return norms[-1] * (math.nan if len(norms) == fail_at else 1)
    for fail_at in (1, 3):
        norms.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
            with pytest.raises(SystemExit):
                run(tmp_path / str(fail_at), "--max-steps", 6, "--eval-every", 3)
        assert "not finite" in capsys.readouterr().err
        lines = run(tmp_path / str(fail_at), "--max-steps", 6, "--eval-every", 3, "--resume")
        assert timeless(lines) == timeless(straight[1])


PARTS = {                                                    # flags under which one step shows each part of the loop
    "mask": ["--mask-truncated"],
    "penalty": ["--max-new-tokens", 4, "--overlong-penalty", 2],
    "temperature": ["--temperature", 0.7, "--kl", "k2"],
    "minibatch": ["--minibatches", 2, "--loss", "dapo"],
    "weights": ["--reward-weights", 1, 0.3],
    "min": ["--reward-weights", 1, 0.3, "--reward-aggregate", "min"],
    "KL in the reward": ["--kl", "reward"],
    "rloo": ["--loss", "rloo"],
    "dr-grpo": ["--loss", "dr-grpo"],
    "the paper's KL": ["--kl", "k3"],
}

SOME_REWARDS = """
def text(completion):
    return completion[0]["content"]

def a(completions, answer, **_):
    values = [float(text(c)[1:] == x[1:]) for c, x in zip(completions, answer)]
    return [None if text(c)[-1:] == "2" else v for c, v in zip(completions, values)]

def b(completions, **_):
    values = [int("1" in text(c)[1:]) + len(text(c)) / 2 for c in completions]
    return [None if text(c)[-1:] == "2" else v for c, v in zip(completions, values)]
"""


def other_model(folder):
    """A reference that differs from the toy's policy."""
    model = AutoModelForCausalLM.from_pretrained(TOY / "model")
    model.model.norm.weight.data *= 1.5
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(folder)
    return model


def note_gradients(monkeypatch):
    """The list in which the gradient of every update from now on will be, as lists of tensors."""
    clip = torch.nn.utils.clip_grad_norm_
    noted = []

    def note(parameters, limit):
        parameters = list(parameters)
        noted.append([p.grad.clone() for p in parameters])
        return clip(parameters, limit)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", note)
    return noted


@pytest.mark.parametrize("name", PARTS)
def test_the_first_gradient_of_the_loop_is_that_of_the_formulas(name, tmp_path, monkeypatch):
    """Masks, missing rewards, penalties, KL, weights and minibatches of the whole loop against plain transformers, one
    completion at a time. Some have no reward; with at most 3 tokens some are truncated."""
    ref = other_model(tmp_path / "ref")
    model = AutoModelForCausalLM.from_pretrained(TOY / "model")
    (tmp_path / "r.py").write_text(SOME_REWARDS)
    gradients = note_gradients(monkeypatch)
    sampled = []
    sample_and_reward = train_grpo.sample_and_reward

    def note(*given):
        sampled.append(sample_and_reward(*given))
        return sampled[-1]
    monkeypatch.setattr(train_grpo, "sample_and_reward", note)
    flags = ["--group-size", 6, "--max-new-tokens", 3, "--eval-samples", 0, "--beta", 0.5, "--max-steps", 1,
             "--ref-model", tmp_path / "ref", "--reward", f"{tmp_path}/r.py:a", f"{tmp_path}/r.py:b",
             "--watch", f"{TOY}/reward.py:close", *PARTS[name]]
    run(tmp_path / "o", *flags)
    args = args_of(*flags)
    rollout = sampled[0]

    def logp(m, i):
        prompt = rollout.groups[i // 6].prompt_ids
        ids = rollout.ids[i]
        rows = m(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1] / args.temperature
        return rows.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    new = [logp(model, i) for i in range(24)]
    old = [logp(ref, i).detach() for i in range(24)]
    k1 = [(p - q).sum().item() for p, q in zip(new, old)]
    w = args.reward_weights or [1, 1]
    join = {"sum": sum, "min": min}[args.reward_aggregate]
    r = []
    for x, y, ids in zip(optional(rollout.rewards["a"]), optional(rollout.rewards["b"]), rollout.ids):
        penalty = max(0, len(ids) - 2) / 2 if args.overlong_penalty else 0
        r.append(None if x is None else join([w[0] * x, w[1] * y]) - penalty)
    if args.mask_truncated:                                  # no part of their group either
        r = [x if ended else None for x, ended in zip(r, rollout.ended)]

    terms = []
    for i in range(24):
        group = [j for j in range(i // 6 * 6, i // 6 * 6 + 6) if r[j] is not None]
        n = len(group)
        if r[i] is None or i // 6 % args.minibatches:
            continue
        A = r[i] - statistics.mean(r[j] for j in group)
        if n < 2:
            A = 0
        elif args.loss == "rloo":
            A *= n / (n - 1)
        elif args.loss != "dr-grpo":
            A /= statistics.stdev(r[j] for j in group) + 1e-4
        if args.kl == "reward":                              # β is not divided by the rewards' spread
            A -= 0.5 * (k1[i] - statistics.mean(k1[j] for j in group))
        p = new[i]
        q = old[i]
        k3 = (q - p).exp() - 1 - (q - p)
        kinds = {"k3-unbiased": (p - p.detach()).exp() * k3, "k3": k3, "k2": (q - p) ** 2 / 2, "reward": 0 * p}
        kl = kinds[args.kl]
        terms.append(-A * p + 0.5 * kl)
    ended = rollout.ended.tolist()
    assert None in r and any(ended) and (not all(ended) or args.max_new_tokens > 3)
    if args.loss == "dapo":
        loss = torch.cat(terms).mean()
    elif args.loss == "rloo":
        loss = torch.stack([t.sum() for t in terms]).mean()
    elif args.loss == "dr-grpo":
        loss = torch.cat(terms).sum() / len(terms) / args.max_new_tokens
    else:
        loss = torch.stack([t.mean() for t in terms]).mean()
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    assert max(g.abs().max() for g in wanted) > 1e-2
    assert all(torch.allclose(ours, g, atol=2e-5) for ours, g in zip(gradients[0], wanted))


@pytest.mark.parametrize("flags", [
    *[["--loss", x] for x in VARIANTS],
    ["--kl", "reward"],
    ["--kl", "k2", "--mask-truncated"],
    ["--updates-per-batch", 2, "--minibatches", 2],
], ids=lambda f: "-".join(map(str, f)))
def test_b15_micro_batches_do_not_change_the_result(flags, tmp_path):
    found = []
    for budget in (100_000, 40, 1):
        lines = run(tmp_path / str(budget), "--max-steps", 2, "--lr", 1e-5, "--micro-batch-tokens", budget, *flags)
        found.append((lines[1]["grad_norm"], lines[1]["loss"]))
    for norm, loss in found[1:]:
        assert norm == pytest.approx(found[0][0], rel=1e-3) and loss == pytest.approx(found[0][1], abs=1e-5)


def test_g6_second_update_sees_moved_weights_and_the_old_log_probs(tmp_path):
    flags = ("--max-steps", 1, "--lr", 5e-3, "--warmup-steps", 0)
    one = run(tmp_path / "a", *flags, "--updates-per-batch", 1)
    two = run(tmp_path / "b", *flags, "--updates-per-batch", 2)
    assert one[1]["clip_ratio"] == 0 < two[1]["clip_ratio"]
    assert one[1]["entropy"] == pytest.approx(two[1]["entropy"], abs=1e-5)


@pytest.mark.parametrize("kl", ["k3", "k2", "k3-unbiased", "reward"])
def test_g9_with_no_reward_to_gain_the_policy_moves_to_the_reference(kl, tmp_path):
    """Every sign right: rewards all alike, another model as the reference; only the KL is left, and it must fall."""
    other_model(tmp_path / "ref")
    (tmp_path / "r.py").write_text("def one(completions, **_):\n    return [1.0] * len(completions)\n")
    lines = run(
        tmp_path / kl, "--ref-model", tmp_path / "ref", "--reward", f"{tmp_path}/r.py:one", "--kl", kl, "--beta", 1,
        "--advantage", "none", "--lr", 3e-4, "--lr-schedule", "constant", "--warmup-steps", 0, "--batch-size", 16,
        "--epochs", 4, "--eval-fraction", 0)
    kls = [line["kl"] for line in lines]
    assert statistics.mean(kls[-3:]) < 0.6 * statistics.mean(kls[:3])


def test_beta_0_loads_no_reference_and_options_run(tmp_path, monkeypatch):
    loads = []
    load = common.load_model

    def note(*given):
        loads.append(given)
        return load(*given)
    monkeypatch.setattr(common, "load_model", note)
    options = ("--dynamic-sampling", "--overlong-penalty", 2, "--advantage", "batch-std")
    lines = run(tmp_path / "a", "--beta", 0, "--max-steps", 2, *options)
    assert len(loads) == 1 and "kl" not in lines[1] and lines[1]["completions/sampled_groups"] >= 4
    reward_model(tmp_path / "rm")
    lines = run(
        tmp_path / "b", "--reward", tmp_path / "rm", f"{TOY}/reward.py:close", "--reward-weights", 1, 0.5,
        "--watch", f"{TOY}/reward.py:right", "--max-steps", 1)
    assert {"rewards/rm/mean", "rewards/close/mean", "rewards/right/mean", "rewards/right/count"} <= set(lines[1])


def test_a_watched_reward_of_the_same_name_is_not_trained_on(tmp_path):
    for name, value in (("one", 1), ("two", 7)):
        body = f"def score(completions, **_):\n    return [{value}.0] * len(completions)\n"
        (tmp_path / f"{name}.py").write_text(body)
    flags = ("--reward", f"{tmp_path}/one.py:score", "--watch", f"{tmp_path}/two.py:score")
    line = run(tmp_path / "o", *flags, "--max-steps", 1)[1]
    assert line["reward"] == 1 == line["rewards/score/mean"] and line["rewards/score_1/mean"] == 7


def test_dynamic_sampling_logs_all_that_was_sampled_and_says_when_nothing_was_learnt(tmp_path, capsys):
    (tmp_path / "r.py").write_text("def zero(completions, **_):\n    return [0.0] * len(completions)\n")
    flags = ("--dynamic-sampling", "--max-steps", 1)
    line = run(tmp_path / "o", *flags)[1]
    assert line["rewards/right/count"] == 4 * line["completions/sampled_groups"] > 16
    line = run(tmp_path / "p", *flags, "--reward", f"{tmp_path}/r.py:zero")[1]
    assert not {"loss", "grad_norm", "learning_rate"} & set(line)
    assert line["reward"] == 0 and line["completions/sampled_groups"] == 20 and "no update" in capsys.readouterr().out


def test_nothing_to_learn_is_said_unless_the_penalty_of_length_teaches_something(tmp_path, capsys):
    (tmp_path / "r.py").write_text("def zero(completions, **_):\n    return [0.0] * len(completions)\n")
    flags = ("--reward", f"{tmp_path}/r.py:zero", "--max-steps", 2)
    run(tmp_path / "o", *flags)
    assert "nothing was learnt" in capsys.readouterr().out
    line = run(tmp_path / "p", *flags, "--overlong-penalty", 6)[1]
    assert line["grad_norm"] > 0.1 and "nothing was learnt" not in capsys.readouterr().out


def test_pass_at_k_counts_the_completions_that_have_a_reward(tmp_path):
    (tmp_path / "r.py").write_text(
        "def sure(completions, **_):\n    return [1.0 if i % 2 else None for i in range(len(completions))]\n")
    first = run(tmp_path / "o", "--reward", f"{tmp_path}/r.py:sure", "--max-steps", 1)[0]
    assert first["eval/pass@1"] == 1 == first["eval/pass@2"] and "eval/pass@4" not in first      # no prompt has 4 of them


def test_a_window_that_no_config_names_is_found_before_training(tmp_path, capsys):
    """GPT-Neo's local layers count by place in the row: in a tree of several completions they would see too few tokens."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    config = GPTNeoConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=2,
        window_size=24, max_position_embeddings=128, bos_token_id=1, eos_token_id=2)
    GPTNeoForCausalLM(config).save_pretrained(tmp_path / "neo")
    tokenizer.save_pretrained(tmp_path / "neo")
    run(tmp_path / "o", "--model", tmp_path / "neo", "--max-steps", 1, "--max-new-tokens", 12)
    assert "packed forward fails with GPTNeo" in capsys.readouterr().out


def test_a_prompt_and_a_completion_may_fill_max_length(tmp_path, capsys):
    for length, kept in ((16, 60), (15, 10)):                # the longest prompts have 8 tokens, --max-new-tokens is 8
        run(tmp_path / str(length), "--max-length", length, "--max-steps", 1)
        assert f"kept {kept}" in capsys.readouterr().out


def test_no_gradient_where_all_rewards_are_alike(tmp_path, capsys):
    (tmp_path / "r.py").write_text("def one(completions, **_):\n    return [1.0] * len(completions)\n")
    line = run(tmp_path / "o", "--reward", f"{tmp_path}/r.py:one", "--beta", 0, "--max-steps", 1)[1]
    assert line["frac_reward_zero_std"] == 1 and line["grad_norm"] == 0 and line["reward_std"] == 0
    (tmp_path / "n.py").write_text("def none(completions, **_):\n    return [None] * len(completions)\n")
    flags = ("--reward", f"{tmp_path}/n.py:none", "--beta", 0, "--max-steps", 1)
    line = run(tmp_path / "p", *flags, "--eval-fraction", 0)[0]
    assert "reward" not in line and line["rewards/none/count"] == 0 and line["grad_norm"] == 0
    said = refused(capsys, "--output-dir", tmp_path / "q", "--limit", 60, *flags)
    assert "got a reward" in said                            # rather than a run for nothing


def test_g19_what_gives_no_gradient_is_not_computed_and_stays_in_the_denominators(tmp_path, monkeypatch):
    """β = 0, every second prompt rewarded alike. All computed or only the rest: the same update, fewer tokens."""
    (tmp_path / "r.py").write_text(
        "def odd(prompts, completions, **_):\n"
        "    sums = [sum(map(ord, p[0]['content'])) % 2 for p in prompts]\n"
        "    return [float(c[0]['content'][:1] in '13579') * s for c, s in zip(completions, sums)]\n")
    flags = ("--reward", f"{tmp_path}/r.py:odd", "--beta", 0, "--max-steps", 1, "--batch-size", 16)
    computed = Counter()
    token_logps = train_grpo.token_logps

    def note(model, given, temperature):
        computed[name] += int(given.lengths.sum())
        return token_logps(model, given, temperature)
    monkeypatch.setattr(train_grpo, "token_logps", note)
    gradients = note_gradients(monkeypatch)
    name = "some"
    some = run(tmp_path / name, *flags)
    monkeypatch.setattr(train_grpo, "as_groups", lambda rollout, wanted, *rest: as_groups(rollout, wanted | True, *rest))
    name = "every"
    every = run(tmp_path / name, *flags)
    assert 0 < some[1]["frac_reward_zero_std"] < 1 and computed["some"] < computed["every"]
    assert some[1]["entropy"] == every[1]["entropy"] and some[1]["loss"] == pytest.approx(every[1]["loss"], abs=1e-6)
    ours, theirs = [torch.cat([g.flatten() for g in one]) for one in gradients]
    assert ours.norm() > 0.1 and torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("flags, words", [
    (["--group-size", "1"], ["--group-size"]),
    (["--temperature", "0"], ["--temperature"]),
    (["--temperature", "nan"], ["--temperature"]),
    (["--loss", "gpro"], ["gpro", "'grpo'"]),
    (["--reward", "nothing.py:f"], ["nothing.py:f"]),
    (["--reward", f"{TOY}/reward.py:wrong"], ["wrong", "reward.py"]),
    (["--reward", f"{TOY}/model"], ["not a reward model", "train_rm.py"]),
    (["--reward-weights", "1", "2"], ["--reward-weights"]),
    (["--reward-weights", "inf"], ["--reward-weights"]),
    (["--loss", "gspo", "--dual-clip", "3"], ["--dual-clip"]),
    (["--dual-clip", "0.5"], ["--dual-clip"]),
    (["--loss", "rloo", "--advantage", "group-std"], ["--advantage"]),
    (["--beta", "0", "--ref-model", "x"], ["--ref-model"]),
    (["--beta", "nan"], ["--beta"]),
    (["--beta", "0", "--kl", "reward"], ["--kl", "--beta"]),
    (["--max-new-tokens", "512"], ["--max-new-tokens"]),
    (["--overlong-penalty", "129"], ["--overlong-penalty", "--max-new-tokens"]),
    (["--clip-low", "-0.5"], ["--clip-low"]),
    (["--loss", "cispo", "--clip-low", "0.5"], ["--clip-low", "cispo"]),
    (["--calibrate-length"], ["--calibrate-length", "reward-model"]),
])
def test_bad_input_ends_in_one_sentence(flags, words, capsys, tmp_path):
    said = refused(capsys, *flags, "--output-dir", tmp_path / "out")
    assert all(word in said for word in words), said


def test_clip_and_advantage_defaults_belong_to_the_loss():
    defaults = {"grpo": (0.2, 0.2, "group-std"), "dapo": (0.2, 0.28, "group-std"), "dr-grpo": (0.2, 0.2, "none"),
                "gspo": (3e-4, 4e-4, "group-std"), "cispo": (1.0, 4.0, "group-std"), "rloo": (0.2, 0.2, "leave-one-out")}
    assert set(defaults) == set(VARIANTS)
    for loss, (low, high, scale) in defaults.items():
        args = args_of("--loss", loss)
        assert clip_range(args) == (1 - low, 1 + high) and advantage_scale(args) == scale
        assert args.clip_low is None and args.clip_high is None and args.advantage is None   # as the user left them
    assert clip_range(args_of("--loss", "dapo", "--clip-low", 0.1, "--clip-high", 0)) == (0.9, 1)
    assert advantage_scale(args_of("--loss", "dr-grpo", "--advantage", "batch-std")) == "batch-std"
    assert advantage_scale(args_of("--loss", "rloo", "--advantage", "none")) == "leave-one-out"
