"""train_grpo.py: its derivation by enumeration, every loss against float64, rewards, the script."""
import contextlib
import itertools
import json
import math
import socket
import statistics
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import score
import train_grpo
from common import Group, Row
from score import Reward, RewardError
from train_grpo import (
    VARIANTS, Rollout, advantages, as_groups, combine, fill, kl_term, main, overlong_penalty,
    parse_args, pass_at_k, reward_column, reward_of, solved, statistics_of, surrogate,
    zero_variance)

TOY = Path(__file__).parent / "toy"
CPU = torch.device("cpu")
NONE = contextlib.nullcontext()
NAN = math.nan
QUESTION = [{"role": "user", "content": "1+1"}]
SMALL = ["--batch-size", 4, "--group-size", 4, "--limit", 60, "--max-new-tokens", 8,
         "--eval-samples", 8]


def run(out, *flags):
    """The script on the toy → the lines of metrics.jsonl."""
    main(list(map(str, ["--output-dir", out, *SMALL, *flags])))
    return read(out / "metrics.jsonl")


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def refused(capsys, *flags):
    """The last line on stderr of a run that must end with exit code 2."""
    with pytest.raises(SystemExit) as end:
        main(list(map(str, flags)))
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def assert_same_run(folder, lines, other, wanted):
    """Two runs with the same metrics, samples and model, to the last bit."""
    def timeless(lines):
        return [{k: v for k, v in line.items() if "second" not in k} for line in lines]

    assert timeless(lines) == timeless(wanted)
    for name in ("model.safetensors", "completions.jsonl"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


def files_of(folder):
    return {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


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


def step_loss(logp, old, A, lengths, args):
    """(loss of a step with completions of these lengths and advantages A (K,), what was clipped)"""
    n = torch.tensor(lengths)
    owner = owners(lengths)
    losses, clipped = surrogate(logp, old, A[owner], owner, n, args)
    weight = VARIANTS[args.loss].weight(n.float(), args.max_new_tokens) * torch.ones(len(n))
    return (losses * weight[owner]).sum(), clipped


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


def optional(column):
    """A column as a list, None for NaN."""
    return [None if math.isnan(x) else x for x in column]


# --- the derivation, by enumeration ---------------------------------------------------------------

POLICY = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REWARD = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)


def force(loss):
    """Gradient, by the logits of POLICY, of loss(its log-probs)."""
    logits = POLICY.log().requires_grad_()
    return gradient(loss(logits.log_softmax(0)), logits)


def reverse_kl(logp):
    return (logp.exp() * (logp - REF.log())).sum()


@pytest.mark.parametrize("loss, factor", [("rloo", 1), ("dr-grpo", 2 / 3)])
def test_eq1_to_eq4_the_mean_over_all_groups_of_three_is_the_gradient_of_the_expected_reward(
        loss, factor):
    """Without the sample itself a baseline is exact, the group's mean is short by (G − 1)/G."""
    args = args_of("--loss", loss, "--max-new-tokens", 1)
    exact = force(lambda logp: (logp.exp() * REWARD).sum())

    def expected_loss(logp):
        total = 0
        for group in itertools.product(range(3), repeat=3):
            ids = torch.tensor(group)
            A = advantages(REWARD[ids][None], args.advantage)[0]
            loss, _ = step_loss(logp[ids], logp[ids].detach(), A, [1, 1, 1], args)
            total = total + POLICY[ids].prod() * loss
        return total

    assert torch.allclose(force(expected_loss), -factor * exact, atol=1e-7)


def test_eq9_g9_a13_what_each_kl_descends():
    """Exact expectations over three tokens; the default descends the KL of the objective."""
    d = (REF / POLICY).log()
    assert (POLICY * -d).sum().item() == pytest.approx(0.085123, abs=1e-6)

    def value(kind):
        return (POLICY * kl_term(kind, POLICY.log(), POLICY.log(), REF.log())).sum().item()

    def of(kind, old=POLICY):
        return force(lambda logp: (old * kl_term(kind, logp, old.log(), REF.log())).sum())

    assert [value(kind) for kind in ("k3", "k3-unbiased", "k2")] == pytest.approx(
        [0.085123, 0.085123, 0.080088], abs=1e-6)
    reverse = force(reverse_kl)
    assert reverse.tolist() == pytest.approx([0.1759, -0.0981, -0.0778], abs=1e-4)
    assert torch.allclose(of("k2"), reverse)
    assert of("k3").tolist() == pytest.approx([0.2, -0.1, -0.1])
    assert args_of().kl == "k3-unbiased"
    assert torch.allclose(of("k3-unbiased"), reverse)
    # Samples from another policy, weighted by ρ: a detached ratio would not do.
    other = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    assert torch.allclose(of("k3-unbiased", other), reverse)


def test_eq10_only_k1_in_the_reward_is_exact_for_completions_of_more_than_one_token():
    """Two tokens over three: the KL of completions counts what the first does to the second's."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, generator=g, dtype=torch.float64)  # token 1, token 2 behind each
    ref = torch.randn(4, 3, generator=g, dtype=torch.float64)

    def completions(logits):                                 # (3, 3) log-probs of both tokens
        first, *second = logits.log_softmax(-1)
        return first[:, None].expand(3, 3), torch.stack(second)

    def force_of(loss):
        logits = start.clone().requires_grad_()
        return gradient(loss(*completions(logits)).sum(), logits)

    a0, b0 = completions(start)
    ra, rb = completions(ref)
    p = (a0 + b0).exp()
    exact = force_of(lambda a, b: (a + b).exp() * (a + b - ra - rb))
    in_reward = force_of(lambda a, b: p * (a0 + b0 - ra - rb) * (a + b))
    assert torch.allclose(in_reward, exact)
    for kind in ("k2", "k3-unbiased", "k3"):
        ours = force_of(lambda a, b: p * (kl_term(kind, a, a0, ra) + kl_term(kind, b, b0, rb)))
        assert 0.05 < (ours - exact).norm() / exact.norm() < 1
        if kind != "k3":                                     # exact only of the last token
            assert torch.allclose(ours[1:], exact[1:]) and not torch.allclose(ours[0], exact[0])


@pytest.mark.parametrize("kind", ["k3", "k2", "k3-unbiased"])
def test_g9_kl_of_distant_models_is_finite_and_still_pulls(kind):
    logp = torch.tensor([-100.0, -0.1], requires_grad=True)
    value = kl_term(kind, logp, logp.detach(), torch.tensor([-0.1, -100.0]))
    pull = gradient(value.sum(), logp)
    assert value.isfinite().all() and pull.isfinite().all()
    assert pull[1] >= 1                                      # far above the reference: down


# --- losses: values and gradients -----------------------------------------------------------------

def by_hand(loss, logp, old, A, lengths, eps, L):
    """Each loss from its paper, completion by completion, token by token."""
    low = torch.tensor(1 - eps[0], dtype=torch.float64)
    high = torch.tensor(1 + eps[1], dtype=torch.float64)

    def ppo(log_ratio, a):
        ratio = log_ratio.exp()
        return min(ratio * a, max(min(ratio, high), low) * a)

    K = len(lengths)
    M = sum(lengths)
    total = 0
    for new, before, a in zip(logp.split(lengths), old.split(lengths), A.tolist()):
        if loss == "gspo":
            total = total - ppo((new - before).mean(), a) / K
        elif loss == "rloo":
            total = total - ppo((new - before).sum(), a) / K
        elif loss == "cispo":
            for x, y in zip(new, before):
                total = total - min((x - y).exp().item(), high.item()) * a * x / M
        else:
            divisor = {"grpo": len(new) * K, "dapo": M, "dr-grpo": K * L}[loss]
            total = total - sum(ppo(x - y, a) for x, y in zip(new, before)) / divisor
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss", VARIANTS)
def test_b6_eq6_eq7_eq8_value_and_gradient_against_float64(loss, seed):
    """Of completions that another policy sampled."""
    lengths = [3, 1, 6, 4]
    A = torch.tensor([1.0, -0.5, 0.3, -2.0])
    low = [] if loss == "cispo" else ["--clip-low", 0.1]
    args = args_of("--loss", loss, "--clip-high", 0.1, "--max-new-tokens", 9, *low)
    logp, old = batch(lengths, seed)
    logp.requires_grad_()
    value, clipped = step_loss(logp, old, A, lengths, args)
    exact, old64 = batch(lengths, seed, torch.float64)
    exact.requires_grad_()
    wanted = by_hand(loss, exact, old64, A, lengths, (0.1, 0.1), 9)
    slope = gradient(wanted, exact)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-6)
    assert torch.allclose(gradient(value, logp).double(), slope, atol=1e-5)
    # Of a clipped token no gradient is left, but in cispo, which clips the weight.
    lost = (logp - old).exp() > 1.1 if loss == "cispo" else slope == 0
    assert clipped.tolist() == lost.tolist()


@pytest.mark.parametrize("loss, log_ratio, value", [
    ("grpo", 0, 0.0), ("dapo", 0, 0.5), ("dr-grpo", 0, 0.25), ("gspo", 0, 0.0), ("gspo", 0.1, 0.0)])
def test_g13_g14_aggregation_golden_values(loss, log_ratio, value):
    """Lengths 2 and 6, A = ±1, limit 8; gspo's ratio is not the product over a completion."""
    args = args_of("--loss", loss, "--max-new-tokens", 8, "--clip-low", 1, "--clip-high", 1)
    logp = torch.full((8,), float(log_ratio))
    found, _ = step_loss(logp, torch.zeros(8), torch.tensor([1.0, -1.0]), [2, 6], args)
    assert found.item() == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("A, ratio, objective, moves", [
    (1, 1.5, 1.2, False), (-1, 1.5, -1.5, True), (-1, 0.5, -0.8, False), (1, 0.5, 0.5, True)])
def test_g15_which_side_is_clipped(A, ratio, objective, moves):
    def one_token(*flags):
        logp = torch.tensor([math.log(ratio)], requires_grad=True)
        loss, _ = step_loss(logp, torch.zeros(1), torch.tensor([float(A)]), [1], args_of(*flags))
        return loss.item(), gradient(loss, logp).item()

    loss, slope = one_token()
    assert loss == pytest.approx(-objective, abs=1e-6) and (slope != 0) == moves
    higher, _ = one_token("--loss", "dapo")                  # 0.28 changes only this side
    assert (higher != pytest.approx(loss)) == (A > 0 and ratio > 1)


# --- advantages -----------------------------------------------------------------------------------

def test_eq3_eq5_g10_g16_advantages_and_soft_overlong_penalty():
    def one(r, scale="group-std"):
        return advantages(torch.tensor([r]).double(), scale)[0].tolist()

    assert one([1.0, 0, 0, 1]) == pytest.approx([0.865875, -0.865875, -0.865875, 0.865875])
    assert max(map(abs, one([0.35] * 7 + [0.95]))) < math.sqrt(8)
    assert one([1.0, 0, 2, 5], "leave-one-out") == pytest.approx([-4 / 3, -8 / 3, 0, 4])
    r = torch.tensor([[1.0, 0.0], [10.0, 4.0]], dtype=torch.float64)
    std = statistics.stdev([1, 0, 10, 4]) + 1e-4
    assert advantages(r, "none").tolist() == [[0.5, -0.5], [3, -3]]
    assert advantages(r, "batch-std").flatten().tolist() == pytest.approx(
        [0.5 / std, -0.5 / std, 3 / std, -3 / std])
    n = torch.tensor([3, 16, 18, 20, 25])
    assert overlong_penalty(n, 20, 4).tolist() == [0, 0, -0.5, -1, -1]


@pytest.mark.parametrize("scale", ["group-std", "batch-std", "none", "leave-one-out"])
def test_a_zero_variance_group_is_one_whose_advantages_are_all_0(scale):
    """Exactly 0, though the mean of three times 0.1 is not 0.1; no reward is no advantage."""
    r = torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.2, 0.1], [NAN, 0.7, 0.7], [NAN, 5, NAN],
                      [NAN, NAN, NAN], [NAN, 1, 2]], dtype=torch.float64)
    A = advantages(r, scale)
    assert zero_variance(r).tolist() == [True, False, True, True, True, False]
    assert zero_variance(r).tolist() == (A == 0).all(1).tolist()
    assert A[5, 0] == 0
    if scale != "batch-std":  # NaN is in no mean and no std
        assert A[5, 1:].tolist() == advantages(r[5:, 1:], scale)[0].tolist()


def test_g11_weighted_sum_of_the_rewards_that_there_are():
    args = args_of("--reward", "a", "b", "--reward-weights", 1, 0.5)
    some = ([1.0, 2.0], [NAN, 4.0], [NAN, NAN])
    assert optional(combine(rewards, args) for rewards in some) == [2.0, 2.0, None]
    assert combine([1.0, 2.0], args_of("--reward", "a", "b")) == 3.0


# --- rollouts made by hand ------------------------------------------------------------------------

def rollouts_of(rewards, ended=None, logps=None, ids=None):
    """A Rollout for each list of rewards; completion k has k + 1 ids."""
    result = []
    for i, r in enumerate(rewards):
        own = [[10 + i] * k + [20 + k] for k in range(len(r))]
        group = Group(
            str(i), [""] * len(r), prompt_ids=[1, 2, 3 + i], completion_ids=(ids or own)[:len(r)],
            ended=ended or [True] * len(r))
        result.append(Rollout(group, logps or [-1.0] * len(r), {"r": r}, r))
    return result


def test_g16_dynamic_sampling_replaces_groups_without_variance():
    args = args_of("--group-size", 2)
    asked = []

    def roll_out(prompts, n, *purpose):
        asked.append((prompts, purpose))
        return rollouts_of([[0.0, float(len(asked) > 1)]] * len(prompts))

    first = rollouts_of([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    kept, sampled = fill(first, roll_out, list(range(7)), [0, 1, 2], 5, args)
    assert [one.reward for one in kept] == [[0, 1]] * 3
    assert len(sampled) == 7 and sampled[:3] == first
    (some, purpose), (more, other) = asked
    assert len(some) == len(more) == 2 and purpose != other
    assert len({0, 1, 2, *some, *more}) == 7                 # no prompt twice in a step


def test_g12_a12_masked_completions_are_in_no_mean_of_their_group():
    some = rollouts_of([[1.0, 0.0, 0.0, 0.0]], ended=[True, True, False, False])
    for flags, wanted in ((["--mask-truncated"], [0.5, -0.5, 0, 0]),
                          ([], [0.75, -0.25, -0.25, -0.25])):
        r = reward_column(some, args_of(*flags)).view(1, 4)
        assert advantages(r, "none").tolist() == [wanted]
    # Dynamic sampling sees a group that gives no gradient as one.
    args = args_of("--mask-truncated", "--group-size", 4)
    alike = rollouts_of([[1.0, 1.0, 0.0, 0.0]], ended=[True, True, False, False])
    assert fill(alike, None, [0], [0], 0, args)[0] == []


def test_pass_at_k_is_unbiased_and_of_rewards_of_0_and_1_only():
    for n, correct, k in ((4, 1, 2), (8, 3, 4), (5, 0, 3), (5, 5, 1)):
        draws = list(itertools.combinations([1] * correct + [0] * (n - correct), k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))

    some = solved(rollouts_of([[1, 0, 0, 0], [1, 1, 1, 1], [NAN, 1, 0, NAN], [0] * 4]), 4)
    assert some["pass@1"] == pytest.approx((0.25 + 1 + 0.5 + 0) / 4)
    assert some["pass@4"] == pytest.approx((1 + 1 + 0) / 3)  # two of the third have no reward
    error = common.mean_and_error([0.25, 1, 0.5, 0], range(4), proportion=True)[1]
    assert some["pass@1_se"] == error > 0.1
    assert solved(rollouts_of([[1.0, 0.5]]), 2) == {}        # a score


def test_statistics_of_samples():
    logps = [-1.0, -2.0, -3.0, -4.0]
    ids = [[7, 2], [7, 2], [8], [9, 9, 9]]
    rewards = [[1.0, 1.0, 0.0, NAN], [2.0, 2.0, 2.0, 2.0]]
    some = statistics_of(rollouts_of(rewards, [True, True, True, False], logps, ids), args_of())
    wanted = {
        "reward": 10 / 7, "reward_std": 3 ** -0.5 / 2, "frac_reward_zero_std": 0.5,
        "entropy": 20 / 16, "completions/mean_length": 2,
        "completions/clipped_ratio": 0.25,
        "rewards/r/mean": 10 / 7, "rewards/r/count": 7}
    assert some == pytest.approx(wanted)


@pytest.mark.parametrize("budget, packed, count", [
    (10 ** 6, True, 3), (9, True, 4), (1, True, 9), (10 ** 6, False, 9)])
def test_g7_g8_the_sampled_ids_are_the_ids_that_are_trained_on(budget, packed, count):
    rollouts = rollouts_of([[0.0] * 4] * 3)
    wanted = [i for i in range(12) if i not in (3, 4, 6)]
    args = args_of("--group-size", 4, "--micro-batch-tokens", budget)
    groups, places_of = as_groups(rollouts, wanted, packed, args)
    assert sum(places_of, []) == wanted and len(groups) == count
    for g, places in zip(groups, places_of):
        assert len(g.completion_ids) == len(places)
        assert g.tokens() <= budget or len(places) == 1
        for ids, i in zip(g.completion_ids, places):
            assert ids == rollouts[i // 4].group.completion_ids[i % 4]
            assert g.prompt_ids == rollouts[i // 4].group.prompt_ids


# --- rewards --------------------------------------------------------------------------------------

def answered(prompts, texts):
    """A group for each prompt, with these completions."""
    return [Group(p, list(texts), Row(tags=["a"], answer="7")) for p in prompts]


def from_file(folder, source, name="f"):
    """The reward of a file with this source."""
    (folder / "r.py").write_text(textwrap.dedent(source))
    return score.load_reward(f"{folder}/r.py:{name}", args_of(), CPU)


def ask(reward, groups=None):
    """What a reward says of the completions of some groups, NaN as None."""
    parts = reward.measure(groups or answered(["p"], "123"), args_of(), NONE)
    return [optional(part) for part in parts]


@pytest.mark.parametrize("given, body, words", [
    ("**_", "return [1.0]", ["1 values for 3"]),
    ("**_", "return 1.0", ["not iterable"]),
    ("**_", "return ['1'] * 3", ["'1'", "neither a finite number nor None"]),
    ("**_", "return ['good'] * 3", ["'good'"]),
    ("**_", "return [float('inf')] * 3", ["inf for '1'", "finite"]),
    ("**_", "return [{}['key']]", ["KeyError: 'key'", "line 2 of", "r.py"]),
    ("**_", "raise SystemExit(0)", ["SystemExit"]),
    ("trainer_state, **_", "return [0.0] * 3", ["'trainer_state'", "trl's trainer"]),
    ("solution, **_", "return [0.0] * 3", [
        "'solution'", "called with prompts, completions, completion_ids, tags, answer"]),
])
def test_g11_a_bad_reward_is_named_in_a_sentence(given, body, words, tmp_path):
    reward = from_file(tmp_path, f"def bad(completions, {given}):\n  {body}\n", "bad")
    with pytest.raises(RewardError) as error:
        ask(reward)
    assert all(word in str(error.value) for word in ["reward bad:", *words]), error.value


def test_g11_what_users_bring_as_a_reward_function(tmp_path):
    (tmp_path / "beside.py").write_text("ONE = 1.0\n")
    from_file(tmp_path, """
        from __future__ import annotations
        from dataclasses import dataclass
        import asyncio
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
            return (len(LOADED) for _ in completions)

        async def waits(completions, **_):
            await asyncio.sleep(0)
            return [float(text) for text in completions]

        def nothing(completions, **_):
            return [float("nan"), None, True]
        """, "tensor")

    def call(name):
        return ask(score.load_reward(f"{tmp_path}/r.py:{name}", args_of(), CPU))

    assert call("tensor") == call("count") == [[1.0] * 3]    # the file is read once
    assert call("waits") == [[1.0, 2.0, 3.0]]
    assert call("nothing") == [[None, None, 1.0]]


def test_g7_g18_what_a_reward_function_gets_are_copies_in_trl_s_conventions():
    seen = []

    def rude(prompts, completions, completion_ids, tags, extra, answer):
        seen.append(str((prompts, completions, completion_ids, tags, extra, answer)))
        for one in (prompts[0], tags[0], completion_ids[0]):
            one.append("changed")
        return [0.0] * len(completions)

    chat = [{"role": "user", "content": "a"}]
    groups = answered([chat, "plain"], [" 7", "8"])
    groups[1].row["extra"] = 3                               # the first row lacks it
    groups[0].row["prompt"] = "the file's"
    groups[0].completion_ids = [[4], [5, 6]]
    before = str(groups)
    assert ask(Reward("rude", rude), groups) == [[0, 0], [0, 0]]
    assert str(groups) == before
    said = [[{"role": "assistant", "content": text}] for text in (" 7", "8")]
    assert seen == [str((
        [chat, chat, "plain", "plain"], [*said, " 7", "8"], [[4], [5, 6], [], []], [["a"]] * 4,
        [None, None, 3, 3], ["7"] * 4))]


@pytest.fixture(scope="module")
def rm(tmp_path_factory):
    """A reward model with the statistics that train_rm.py stores, in a folder."""
    folder = tmp_path_factory.mktemp("models") / "rm"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(TOY / "model", num_labels=1)
    model.config.pad_token_id = 0
    model.config.reward_mean = 0.3
    model.config.reward_std = 2.0
    model.config.reward_std_calibrated = 0.5
    model.config.reward_by_length = [[2.0, 0.0], [6.0, 4.0]]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(folder)
    return folder


def test_g18_a_reward_model_reads_text_as_plain_transformers_does(rm, capsys):
    """Its z-score; to its last token, whether or not the policy ended; plain prompts by --chat."""
    args = args_of("--reward", rm)
    model = AutoModelForSequenceClassification.from_pretrained(rm)
    tokenizer = AutoTokenizer.from_pretrained(rm)
    texts = ["5", "123456"]
    groups = answered([QUESTION, QUESTION * 2], texts)
    groups[1].ended = [True, False]
    (reward,) = train_grpo.load_rewards(args, CPU).values()
    assert reward.name == "rm" and "note" not in capsys.readouterr().out

    raw = []
    for g in groups:
        for text in texts:
            messages = [*g.prompt, {"role": "assistant", "content": text}]
            ids = tokenizer.apply_chat_template(messages, return_dict=False)
            raw.append(model(torch.tensor([ids])).logits[0, 0].item())
    ours = reward_of(reward, groups, args, NONE)
    assert ours == pytest.approx([(r - 0.3) / 2 for r in raw], abs=1e-4)

    plain = answered(["1+1"], texts)
    chat = args_of("--reward", rm, "--chat")
    (reward,) = train_grpo.load_rewards(chat, CPU).values()
    assert reward_of(reward, plain, chat, NONE) == pytest.approx(ours[:2], abs=1e-5)


def test_g11_a_reward_model_without_statistics_says_so_and_a_broken_one_ends(tmp_path, rm, capsys):
    model = AutoModelForSequenceClassification.from_pretrained(rm)
    del model.config.reward_std
    model.score.weight.data.fill_(NAN)
    model.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(rm).save_pretrained(tmp_path / "rm")
    args = args_of("--reward", tmp_path / "rm")
    (reward,) = train_grpo.load_rewards(args, CPU).values()
    assert "mean and std" in capsys.readouterr().out
    with pytest.raises(RewardError, match="rm: a score is not a finite number"):
        reward_of(reward, answered([QUESTION], "12"), args, NONE)


# --- the script -----------------------------------------------------------------------------------

def text(completion):
    return completion[0]["content"]


def same(completions, **_):
    """Every completion is as good as any."""
    return [1.0] * len(completions)


@pytest.fixture
def rewards(monkeypatch):
    """A dict: with a function in it, `--reward NAME` is that function."""
    functions = {"same": same, "none": lambda completions, **_: [None] * len(completions)}
    load = train_grpo.load_reward

    def find(spec, *rest):
        return Reward(spec, functions[spec]) if spec in functions else load(spec, *rest)

    monkeypatch.setattr(train_grpo, "load_reward", find)
    return functions


@pytest.fixture
def gradients(monkeypatch):
    """A list in which the gradient of every update will be, as lists of tensors."""
    noted = []
    clip = common.clip_gradient

    def note(model, bound):
        noted.append([p.grad.clone() for p in model.parameters()])
        return clip(model, bound)

    monkeypatch.setattr(common, "clip_gradient", note)
    return noted


STRAIGHT = ("--max-steps", 6, "--eval-every", 3)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(folder of a run, its metrics, {seed of the samples: prompts})"""
    out = tmp_path_factory.mktemp("straight")
    calls = []
    sample = common.sample

    def note(model, prompts, *rest, **more):
        calls.append((rest[4], str(prompts)))
        return sample(model, prompts, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "sample", note)
        return out, run(out, *STRAIGHT), calls


def test_zero_flag_smoke(tmp_path, monkeypatch, capsys):
    """D8: no network."""
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network was used"))
    monkeypatch.chdir(tmp_path)
    main(["--max-steps", "1", "--eval-samples", "8"])
    assert "pass@1" in capsys.readouterr().out
    assert {f.name for f in Path("runs/grpo").iterdir()} >= {
        "config.json", "model.safetensors", "args.json", "metrics.jsonl", "completions.jsonl",
        "checkpoint"}


def test_metrics_of_the_first_step(straight):
    first = straight[1][1]
    assert first["step"] == 1 and first["kl"] == 0 == first["clip_ratio"]
    assert first["loss"] == pytest.approx(0, abs=1e-5)       # D7: mean advantage 0, ratio 1
    rows = read(straight[0] / "completions.jsonl")
    assert len(rows) == 4 and {row["step"] for row in rows} == {6}
    assert all(len(row["completions"]) == len(row["rewards"]) == 4 for row in rows)
    assert all(abs(sum(row["advantages"])) < 1e-5 for row in rows)


def test_g17_every_step_samples_anew_and_every_evaluation_alike(straight):
    by_prompts = {}
    for seed, prompts in straight[2]:
        by_prompts.setdefault(prompts, []).append(seed)
    evaluations = max(by_prompts.values(), key=len)
    assert len(evaluations) == 3 and len(set(evaluations)) == 1
    assert len({seed for seed, _ in straight[2]}) == 7


def test_d2_resume_is_bit_equal_samples_included(straight, tmp_path, monkeypatch):
    def die(bar, step, steps, words):
        if step == 5:
            raise KeyError("killed")                         # logged, not saved

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(common, "end_step", die)
        run(tmp_path, *STRAIGHT, "--save-every", 2)
    lines = run(tmp_path, *STRAIGHT, "--save-every", 2, "--resume")
    assert_same_run(tmp_path, lines, *straight[:2])


def test_a_run_that_fails_at_its_start_leaves_the_run_before_it_untouched(
        tmp_path, rewards, capsys):
    rewards["text"] = lambda completions, **_: ["1"] * len(completions)
    run(tmp_path / "o", "--max-steps", 1)
    before = files_of(tmp_path)
    said = refused(capsys, "--output-dir", tmp_path / "o", *SMALL, "--reward", "text")
    assert "reward text: '1' for" in said
    assert files_of(tmp_path) == before


def right(completions, answer, **_):
    return [float(text(c) == a) for c, a in zip(completions, answer)]


@pytest.mark.parametrize("at, answer, words", [
    (4, [1.0], "1 values for"),                            # calls: evaluation, steps 1, 2, 3
    (5, [None] * 24, "got a reward"),                        # the evaluation after step 3
])
def test_no_step_is_lost_where_a_reward_fails_in_mid_run(
        at, answer, words, straight, tmp_path, rewards, capsys):
    calls = []

    def failing(completions, **columns):
        calls.append(len(completions))
        return answer if len(calls) == at else right(completions, **columns)

    rewards["right"] = failing
    flags = ("--output-dir", tmp_path, *SMALL, *STRAIGHT, "--reward", "right")
    said = refused(capsys, *flags)
    done = at - 2
    assert words in said and f"after step {done} is saved" in said and "--resume" in said
    assert torch.load(tmp_path / "checkpoint/state.pt")["step"] == done
    lines = run(tmp_path, *STRAIGHT, "--reward", "right", "--resume")
    assert_same_run(tmp_path, lines, *straight[:2])


@pytest.mark.parametrize("twice", ["--minibatches", "--updates-per-batch"])
@pytest.mark.parametrize("update, kept", [(1, 3), (2, 2)])
def test_a_gradient_that_is_not_finite_loses_at_most_its_step(
        update, kept, twice, tmp_path, monkeypatch, capsys):
    """In the first update of a step its start is saved; half a step never is."""
    flags = (*SMALL, "--max-steps", 4, "--save-every", 2, "--eval-fraction", 0, twice, 2)
    calls = []
    before = {}
    clip = common.clip_gradient

    def broken(model, bound):
        calls.append(1)
        if len(calls) == 6 + update:                         # two updates a step
            before.update(files_of(tmp_path / "o/checkpoint"))
        return clip(model, bound) * (NAN if len(calls) == 6 + update else 1)

    with monkeypatch.context() as patch:
        patch.setattr(common, "clip_gradient", broken)
        said = refused(capsys, "--output-dir", tmp_path / "o", *flags)
    assert "step 4: the gradient is not finite" in said and ("--resume" in said) == (update == 1)
    checkpoint = tmp_path / "o/checkpoint"
    assert torch.load(checkpoint / "state.pt")["step"] == kept
    assert (files_of(checkpoint) == before) == (update == 2)
    lines = run(tmp_path / "o", *flags, "--resume")
    assert_same_run(tmp_path / "o", lines, tmp_path / "p", run(tmp_path / "p", *flags))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Folder of a reference that differs from the toy's policy."""
    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(TOY / "model")
    model.model.norm.weight.data *= 1.5
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(folder)
    return folder


PARTS = {                            # flags under which one step shows each part of the loop
    "mask": ["--mask-truncated"],
    "penalty": ["--max-new-tokens", 4, "--overlong-penalty", 2],
    "temperature": ["--temperature", 0.7, "--kl", "k2"],
    "minibatch": ["--minibatches", 2, "--loss", "dapo"],
    "weights": ["--reward-weights", 1, 0.3],
    "KL in the reward": ["--kl", "reward"],
    "rloo": ["--loss", "rloo"],
    "rloo, KL in the reward": ["--loss", "rloo", "--kl", "reward"],
    "dr-grpo": ["--loss", "dr-grpo"],
    "gspo": ["--loss", "gspo"],
    "cispo": ["--loss", "cispo"],
    "the paper's KL": ["--kl", "k3"],
    "no KL": ["--beta", 0],
    "padded": [],
}


def some_a(completions, answer, **_):
    values = [float(text(c)[1:] == x[1:]) for c, x in zip(completions, answer)]
    return [None if text(c)[-1:] == "2" else v for c, v in zip(completions, values)]


def some_b(completions, **_):
    values = [int("1" in text(c)[1:]) + len(text(c)) / 2 for c in completions]
    return [None if text(c)[-1:] == "2" else v for c, v in zip(completions, values)]


def expected_step(rollouts, model, ref, args):
    """(loss of the first update, mean k3, entropy) from the formulas, a completion at a time."""
    column = []                      # of all completions: (rollout, k, log π, log π_ref)
    for one in rollouts:
        for k, ids in enumerate(one.group.completion_ids):
            prompt = one.group.prompt_ids
            both = []
            for m in (model, ref):
                logits = m(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1]
                logp = (logits / args.temperature).log_softmax(-1)
                both.append(logp.gather(1, torch.tensor(ids)[:, None])[:, 0])
            column.append((one, k, both[0], both[1].detach()))
    entropy = -sum(p.sum().item() for _, _, p, _ in column) / sum(len(p) for _, _, p, _ in column)

    w = args.reward_weights or [1, 1]
    rewards = []
    for one, k, p, _ in column:
        a, b = one.rewards["some_a"][k], one.rewards["some_b"][k]
        penalty = max(0, len(p) - 2) / 2 if args.overlong_penalty else 0
        left_out = math.isnan(a) or args.mask_truncated and not one.group.ended[k]
        rewards.append(None if left_out else w[0] * a + w[1] * b - penalty)
    assert None in rewards and len(set(rewards)) > 3

    terms = []
    k3s = []
    for i, (_, _, p, q) in enumerate(column):
        group = [j for j in range(i // 6 * 6, i // 6 * 6 + 6) if rewards[j] is not None]
        if rewards[i] is None or i // 6 % args.minibatches:
            continue
        factor = len(group) / max(1, len(group) - 1) if args.loss == "rloo" else 1
        A = rewards[i] - statistics.mean(rewards[j] for j in group)
        if args.loss not in ("rloo", "dr-grpo") and len(group) > 1:
            A /= statistics.stdev(rewards[j] for j in group) + 1e-4
        if args.kl == "reward":                              # β is not divided by the spread
            k1 = {j: (column[j][2] - column[j][3]).sum().item() for j in group}
            A -= args.beta * (k1[i] - statistics.mean(k1.values()))
        k3 = (q - p).exp() - 1 - (q - p)
        kl = {"k3-unbiased": (p - p.detach()).exp() * k3, "k3": k3, "k2": (q - p) ** 2 / 2,
              "reward": 0 * p}[args.kl]
        terms.append(-A * factor * p + args.beta * kl)
        k3s.append(k3)

    every = torch.cat(terms)
    N = len(terms)
    if args.loss in ("dapo", "cispo"):
        loss = every.mean()
    elif args.loss == "rloo":
        loss = every.sum() / N
    elif args.loss == "dr-grpo":
        loss = every.sum() / N / args.max_new_tokens
    else:
        loss = torch.stack([t.mean() for t in terms]).mean()
    return loss, torch.cat(k3s).mean().item(), entropy


@pytest.mark.parametrize("name", PARTS)
def test_b15_the_first_gradient_of_the_loop_is_that_of_the_formulas(
        name, other, tmp_path, monkeypatch, rewards, gradients):
    """Masks, missing rewards, KL, weights, minibatches and micro-batches of the whole loop against
    plain transformers; some have no reward, with at most 3 tokens some are truncated."""
    rewards |= {"some_a": some_a, "some_b": some_b}
    model = AutoModelForCausalLM.from_pretrained(TOY / "model")
    ref = AutoModelForCausalLM.from_pretrained(other)
    if name == "padded":
        monkeypatch.setattr(common, "can_pack", lambda *_: False)
    sampled = []
    column = train_grpo.reward_column
    monkeypatch.setattr(
        train_grpo, "reward_column", lambda some, args: sampled.append(some) or column(some, args))
    flags = ["--group-size", 6, "--max-new-tokens", 3, "--eval-fraction", 0, "--max-steps", 1,
             "--beta", 0.5, *PARTS[name], "--reward", "some_a", "some_b",
             "--watch", f"{TOY}/reward.py:close"]
    if name != "no KL":
        flags += ["--ref-model", other]

    (line,) = run(tmp_path / "one", *flags)
    loss, kl, entropy = expected_step(sampled[-1], model, ref, args_of(*flags))
    if "--minibatches" not in flags:
        assert line.get("kl", kl) == pytest.approx(kl, rel=1e-3)
    assert line["entropy"] == pytest.approx(entropy, rel=1e-4)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    updates = len(gradients)
    run(tmp_path / "cut", *flags, "--micro-batch-tokens", 25)
    assert wanted.abs().max() > 1e-2
    for i in (0, updates):
        found = torch.cat([g.flatten() for g in gradients[i]])
        assert torch.allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("loss", ["grpo", "gspo", "cispo"])
def test_b15_g6_later_updates_see_moved_weights_and_the_old_log_probs(loss, tmp_path, gradients):
    """The same whatever the micro-batches are."""
    flags = ("--loss", loss, "--max-steps", 1, "--lr", 3e-4, "--warmup-steps", 0, "--clip-high",
             0.01, "--eval-fraction", 0, "--updates-per-batch", 2, "--minibatches", 2)
    (line,) = run(tmp_path / "a", *flags)
    (again,) = run(tmp_path / "b", *flags, "--micro-batch-tokens", 25)
    assert line["clip_ratio"] > 0
    assert line["clip_ratio"] == pytest.approx(again["clip_ratio"], abs=0.02)
    assert line["entropy"] == again["entropy"]
    assert len(gradients) == 8
    for ours, theirs in zip(gradients[:4], gradients[4:]):
        a, b = [torch.cat([g.flatten() for g in one]) for one in (ours, theirs)]
        assert (a - b).norm() < 0.02 * a.norm()


def test_d7_metrics_are_means_over_the_updates_of_a_step(other, tmp_path):
    lines = []
    for count in (1, 2):
        flags = ("--ref-model", other, "--lr", 0, "--updates-per-batch", count, "--max-steps", 1)
        lines.append(run(tmp_path / str(count), *flags, "--eval-fraction", 0)[0])
    for name in ("loss", "kl", "grad_norm", "clip_ratio"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-4)
    assert lines[0]["loss"] > 1e-3


@torch.no_grad()
def distance(folder, other):
    """Mean KL(π ‖ π_ref) of the next token, exactly, over the right answers to some prompts."""
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (folder, other)]
    tokenizer = AutoTokenizer.from_pretrained(other)
    kls = []
    for row in read(TOY / "prompts.jsonl")[:20]:
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=False)
        ids = prompt + tokenizer.encode(row["answer"], add_special_tokens=False)
        logits = [m(torch.tensor([ids])).logits[0, len(prompt) - 1:] for m in models]
        p, q = [x.log_softmax(-1) for x in logits]
        kls.append((p.exp() * (p - q)).sum(-1).mean().item())
    return statistics.mean(kls)


@pytest.mark.parametrize("kl", ["k3", "k2", "k3-unbiased", "reward"])
def test_g9_with_no_reward_to_gain_the_policy_moves_to_the_reference(kl, other, tmp_path, rewards):
    """Every sign right: rewards all alike, only the KL is left, and it must fall."""
    run(tmp_path, "--ref-model", other, "--reward", "same", "--kl", kl, "--beta", 1, "--lr", 3e-4,
        "--lr-schedule", "constant", "--warmup-steps", 0, "--batch-size", 16, "--max-steps", 4,
        "--eval-fraction", 0)
    assert distance(tmp_path, other) < 0.75 * distance(TOY / "model", other)


def test_beta_0_loads_no_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "load_reference", None)
    assert "kl" not in run(tmp_path, "--beta", 0, "--max-steps", 1)[1]


def test_several_rewards_by_name_and_a_watched_one_is_not_trained_on(rm, tmp_path):
    for name, value in (("one", 1), ("two", 7)):
        body = f"def score(completions, **_):\n    return [{value}.0] * len(completions)\n"
        (tmp_path / f"{name}.py").write_text(body)
    flags = ("--reward", f"{tmp_path}/one.py:score", rm, "--reward-weights", 1, 0, "--watch",
             f"{tmp_path}/two.py:score")
    line = run(tmp_path / "o", *flags, "--max-steps", 1)[1]
    assert line["reward"] == 1 == line["rewards/score/mean"] and line["rewards/score_2/mean"] == 7
    assert line["rewards/rm/count"] == 16


@pytest.mark.parametrize("more", [[], ["--mask-truncated"]])
def test_dynamic_sampling_logs_all_that_was_sampled_and_says_when_nothing_was_learnt(
        more, tmp_path, rewards, capsys):
    flags = ("--dynamic-sampling", "--max-steps", 1, *more)
    line = run(tmp_path / "o", *flags)[1]
    assert line["rewards/right/count"] > 16
    assert "nothing was learnt" not in capsys.readouterr().out
    line = run(tmp_path / "p", *flags, "--reward", "same")[1]
    assert not {"loss", "grad_norm", "learning_rate"} & set(line)
    assert line["reward"] == 1 and line["rewards/same/count"] == 4 * 20
    assert "nothing was learnt" in capsys.readouterr().out


def test_no_gradient_where_all_rewards_are_alike_unless_length_costs(tmp_path, rewards, capsys):
    flags = ("--reward", "same", "--beta", 0, "--max-steps", 1, "--eval-fraction", 0)
    (line,) = run(tmp_path / "o", *flags)
    assert line["frac_reward_zero_std"] == 1 and line["grad_norm"] == 0 == line["reward_std"]
    assert "nothing was learnt" in capsys.readouterr().out
    (line,) = run(tmp_path / "p", *flags, "--overlong-penalty", 6)
    assert line["grad_norm"] > 0.1 and "nothing was learnt" not in capsys.readouterr().out


def test_without_any_reward_nothing_moves_and_an_evaluation_ends_the_run(
        tmp_path, rewards, capsys):
    flags = (*SMALL, "--reward", "none", "--beta", 0, "--max-steps", 1)
    (line,) = run(tmp_path / "o", *flags, "--eval-fraction", 0)
    assert "reward" not in line and line["rewards/none/count"] == 0 == line["grad_norm"]
    assert "got a reward" in refused(capsys, "--output-dir", tmp_path / "p", *flags)
    assert not (tmp_path / "p").exists()


def test_g19_what_gives_no_gradient_is_not_computed(tmp_path, monkeypatch):
    """β = 0: only groups with different rewards. That they stay in the denominators: "no KL"."""
    computed = []
    cut = common.my_micro_batches

    def note(groups, *rest):
        computed.extend(ids for g in groups for ids in g.completion_ids)
        return cut(groups, *rest)

    monkeypatch.setattr(common, "my_micro_batches", note)
    run(tmp_path, "--beta", 0, "--max-steps", 1, "--eval-fraction", 0, "--batch-size", 16)
    A = [a for row in read(tmp_path / "completions.jsonl") for a in row["advantages"]]
    assert 0 < len(computed) == sum(a != 0 for a in A) < len(A)


def test_a_prompt_and_a_completion_may_fill_max_length(tmp_path, capsys):
    for length, kept in ((16, 60), (15, 10)):                # the longest prompts have 8 tokens
        run(tmp_path / str(length), "--max-length", length, "--max-steps", 1)
        assert f"kept {kept}" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (["--temperature", "0"], ["--temperature"]),
    (["--loss", "gpro"], ["gpro", "'grpo'"]),
    (["--reward", f"{TOY}/reward.py:wrong"], ["wrong", "reward.py"]),
    (["--reward", f"{TOY}/model"], ["no reward model", "train_rm.py"]),
    (["--loss", "rloo", "--advantage", "group-std"], ["--advantage"]),
    (["--beta", "0", "--ref-model", "x"], ["--ref-model"]),
    (["--beta", "0", "--kl", "reward"], ["--kl", "--beta"]),
    (["--max-new-tokens", "512", "--max-length", "512"], ["--max-new-tokens"]),
    (["--overlong-penalty", "129"], ["--overlong-penalty", "--max-new-tokens"]),
    (["--loss", "cispo", "--clip-low", "0.5"], ["--clip-low", "cispo"]),
])
def test_bad_input_ends_in_one_sentence(flags, words, capsys, tmp_path):
    said = refused(capsys, *flags, "--output-dir", tmp_path / "out")
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_clip_and_advantage_defaults_belong_to_the_loss():
    for flags, wanted in ((["dapo"], (0.2, 0.28, "group-std")),
                          (["gspo", "--clip-high", 0], (3e-4, 0, "group-std")),
                          (["dr-grpo"], (0.2, 0.2, "none")),
                          (["dr-grpo", "--advantage", "batch-std"], (0.2, 0.2, "batch-std"))):
        args = args_of("--loss", *flags)
        assert (args.clip_low, args.clip_high, args.advantage) == wanted
