"""What the scripts say about themselves, held to enumeration, simulation and the words in which they say it."""
import itertools
import json
import math
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import common
import score
import train_dpo
import train_grpo
import train_rm
from common import Group, proportion

TOY = ROOT / "tests" / "toy"


def read(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def run(script, out, *flags):
    small = ["--limit", 200, "--batch-size", 8, "--max-steps", 2]
    script.main(list(map(str, ["--output-dir", out, *small, *flags])))
    return read(Path(out) / "metrics.jsonl")


def grpo(out, *flags):
    small = ["--batch-size", 4, "--group-size", 4, "--limit", 60, "--max-new-tokens", 8, "--eval-samples", 8]
    return run(train_grpo, out, *small, *flags)


# --- intervals ----------------------------------------------------------------------------------------------------------

def lists(prompts, K, noise, generator):
    """Right or wrong for every pair of lists of K: what a score says whose noise differs by list. → (prompts, pairs)"""
    i, j = torch.triu_indices(K, K, 1)
    true = torch.randn(prompts, K, generator=generator, dtype=torch.float64)
    error = torch.randn(prompts, K, generator=generator, dtype=torch.float64)
    said = true + noise * error * (0.5 + torch.rand(prompts, 1, generator=generator, dtype=torch.float64))
    return ((true[:, i] - true[:, j]).sign() == (said[:, i] - said[:, j]).sign()).double()


@pytest.mark.parametrize("K", [2, 6, 9])
def test_a4_wilson_by_prompt_covers_95_percent_where_pairs_of_a_list_belong_together(K):
    generator = torch.Generator().manual_seed(K)
    truth = lists(100_000, K, 1.0, generator).mean().item()
    rounds = 600
    clustered = alone = 0
    for _ in range(rounds):
        values = lists(100, K, 1.0, generator)
        prompt = torch.arange(100).repeat_interleave(values.shape[1])
        p = proportion(values.flatten(), prompt, z=1.96)
        clustered += p.low <= truth <= p.high
        q = proportion(values.flatten(), torch.arange(values.numel()), z=1.96)
        alone += q.low <= truth <= q.high
    assert 0.92 <= clustered / rounds <= 0.975
    if K > 2:                                                # as if every pair were a prompt of its own: far too narrow
        assert alone / rounds < 0.90


def test_a4_ties_have_no_error_and_all_right_has_one():
    many = torch.arange(200)
    tied = proportion(torch.full((200,), 0.5), many)
    assert tied == (0.5, 0.5, 0.5) and tied.half == 0
    right = proportion(torch.ones(200), many)
    assert right.mean == right.high == 1 and right.low == pytest.approx(200 / 201)       # Wilson, z = 1
    assert proportion(torch.zeros(200), many).high == pytest.approx(1 / 201)
    half = proportion(torch.arange(200) % 2, many)
    assert half.half == pytest.approx(math.sqrt(0.25 / 200), rel=0.01)                   # √(p (1 − p)/n)
    ties = torch.tensor([0.5] * 100 + [1.0, 0.0] * 50)                                   # half of the variance
    assert proportion(ties, many).half == pytest.approx(half.half / math.sqrt(2), rel=0.01)
    of_one = proportion(torch.tensor([1.0, 1.0, 0.0]), torch.zeros(3).long())
    assert of_one.half > 0.34                                # one prompt is one observation


def test_a4_ten_copies_of_a_prompt_are_no_new_evidence():
    values = torch.tensor([1.0, 0, 1, 1, 0.5, 0, 1, 1, 1, 0])
    once = proportion(values, torch.arange(10))
    ten = proportion(values.repeat(10), torch.arange(10).repeat(10))
    assert ten == pytest.approx(once)
    weighted = proportion(torch.tensor([1.0, 0, 1]), torch.tensor([0, 0, 1]), torch.tensor([0.5, 0.5, 1.0]))
    assert weighted.mean == 0.75


def test_a4_dpo_at_step_0_is_50_percent_without_error_and_rows_of_one_prompt_are_a_cluster(tmp_path, capsys):
    lines = run(train_dpo, tmp_path / "out", "--eval-samples", 0, "--max-steps", 1)
    assert lines[0]["eval/rewards/accuracies"] == 0.5 and lines[0]["eval/accuracy_se"] == 0
    assert "accuracy 50.0 ± 0.0 %" in capsys.readouterr().out
    data = read(TOY / "pairs.jsonl")[:40]
    evals = {}
    for name, held_out in (("once", data[:8]), ("four times", data[:8] * 4)):
        file = write(tmp_path / f"{name}.jsonl", held_out)
        flags = ["--eval-dataset", file, "--eval-samples", 0, "--max-steps", 6, "--lr", 1e-3]
        evals[name] = run(train_dpo, tmp_path / name, *flags)[-1]
    se = [x["eval/accuracy_se"] for x in evals.values()]
    assert se[0] == pytest.approx(se[1]) and se[0] > 0


def test_a4_an_accuracy_of_100_percent_has_an_error():
    groups = [Group("", "", [], scores=[1, 0], prompt_ids=[i], completion_ids=[[5], [6]]) for i in range(50)]
    result = train_rm.evaluate(groups, torch.tensor([1.0, 0.0] * 50), train_rm.parse_args([]))
    assert result["eval/rewards/accuracies"] == 1 and result["eval/accuracy_se"] == pytest.approx(0.5 / 51)
    assert "100.0 ± 1.0 %" in train_rm.eval_line(1, result)


def test_a11_bootstrap_of_a_correlation_covers_it():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(100):
        x, noise = torch.randn(2, 80, generator=generator)
        y = 0.6 * x + 0.8 * noise
        low, high = score.bootstrap_correlation(x.tolist(), y.tolist(), range(80), seed, rounds=300)
        hits += low <= 0.6 <= high
    assert 86 <= hits <= 99
    x = [1.0, 2.0, 3.0, 5.0]
    assert score.bootstrap_correlation(x, x, range(4)) == pytest.approx((1, 1))


def test_a11_every_estimate_of_the_report_has_an_interval(tmp_path, capsys):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(TOY / "model", num_labels=1)
    model.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(tmp_path / "rm")
    capsys.readouterr()
    number = r"-?\d+\.\d+ \[-?\d+\.\d+, -?\d+\.\d+\]"
    reward = ["--reward-model", str(tmp_path / "rm"), "--limit", "30"]
    score.main([*reward, "--calibrate-length"])
    said = capsys.readouterr().out
    for what in (f"score {number} ±", f"length {number}", f"margin {number} ±", f"before --calibrate-length {number}",
                 r"accuracy \d+.\d % \[", r"the longer is the better\): \d+.\d % \["):
        assert re.search(what, said), what
    score.main([*reward, "--policy", str(TOY / "model"), "--samples", "4", "--max-new-tokens", "6"])
    table = capsys.readouterr().out.split("best of n")[1].splitlines()[1:4]
    for line in table:
        assert len(re.findall(number, line)) == 2, line


# --- rejection sampling ---------------------------------------------------------------------------------------------------

REF = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
REWARD = torch.tensor([0.0, 0.5, 1.0, 1.2], dtype=torch.float64)


def kept_mean(n, beta):
    """E[r] of what one round keeps of n samples, exactly: π_ref e^{r/β} E[e^{−max/β} | r]."""
    below = REF.cumsum(0)                                    # P(r ≤ REWARD[m])
    density = []
    for k in range(4):
        at_most = torch.where(torch.arange(4) >= k, below ** (n - 1), 0)                 # P(max ≤ m | the first is k)
        at = at_most.diff(prepend=torch.zeros(1, dtype=torch.float64))
        density.append(REF[k] * (REWARD[k] / beta).exp() * (at * (-REWARD / beta).exp()).sum())
    density = torch.stack(density)
    return (density / density.sum() * REWARD).sum().item()


def test_a1_one_round_of_few_samples_stays_nearer_to_the_reference():
    tilted = REF * (REWARD / 0.5).exp()
    exact = (tilted / tilted.sum() * REWARD).sum().item()
    best = ((REF.cumsum(0) ** 8).diff(prepend=torch.zeros(1, dtype=torch.float64)) * REWARD).sum().item()
    reference = (REF * REWARD).sum().item()
    assert reference == pytest.approx(0.36)
    assert reference < kept_mean(8, 0.5) < exact < best
    assert kept_mean(8, 0.1) < (tilted := REF * (REWARD / 0.1).exp()) @ REWARD / tilted.sum() - 0.15   # no little gap
    generator = torch.Generator().manual_seed(0)
    kept = []
    for ys in torch.multinomial(REF, 8 * 4000, replacement=True, generator=generator).view(-1, 8):
        kept += [REWARD[ys[i]].item() for i in score.rejection_sample(REWARD[ys].tolist(), 0.5, generator)]
    assert statistics.mean(kept) == pytest.approx(kept_mean(8, 0.5), abs=0.01)


def rounds_of_the_paper(rewards, beta, count, generator):
    """Algorithm 1 of Liu et al. 2023, arXiv 2309.06657, as its appendix writes it; indices for texts."""
    candidates = dict(enumerate(rewards))
    accepted = []
    while len(accepted) < count:
        highest = max(candidates.values())
        draws = torch.rand(len(candidates), generator=generator, dtype=torch.float64).tolist()
        removed = []
        for (c, r), u in zip(candidates.items(), draws):
            if u >= math.exp((r - highest) / beta):
                continue
            accepted.append(c)
            removed.append(c)
            if len(accepted) == count:
                break
        for c in removed:
            candidates.pop(c)
    return sorted(accepted)


def test_a1_rounds_are_the_papers():
    rewards = torch.randn(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tolist()
    for seed, count in itertools.product(range(20), (1, 4, 10)):
        ours = score.rejection_sample(rewards, 0.3, torch.Generator().manual_seed(seed), count)
        assert ours == rounds_of_the_paper(rewards, 0.3, count, torch.Generator().manual_seed(seed))
    with pytest.raises(SystemExit):
        score.parse_args(["--rso-keep", "2"])


# --- reward model -----------------------------------------------------------------------------------------------------------

def test_a3_centring_a_list_of_four_leaves_its_range():
    """A true range of 6 in lists of four, labels drawn from (1): the minimum with c = 0.01 is the range, around 0."""
    true = torch.tensor([3.0, 1.0, -1.0, -3.0], dtype=torch.float64)
    groups = []
    weight = []
    for i, j in itertools.permutations(range(4), 2):         # each pair both ways, as often as (1) says
        ids = [[k + 5] for k in range(4)]
        scores = [0.0] * 4
        scores[i], scores[j] = 2.0, 1.0
        groups.append((i, j))
        weight.append(torch.sigmoid(true[i] - true[j]))
    r = torch.tensor([9.0, 5.0, 4.0, 1.0], dtype=torch.float64, requires_grad=True)
    args = train_rm.parse_args(["--center-coef", "0.01"])
    one = Group("", "", [], scores=[4, 3, 2, 1], prompt_ids=[1], completion_ids=[[5], [6], [7], [8]])
    optimizer = torch.optim.LBFGS([r], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        nll = sum(-w * torch.nn.functional.logsigmoid(r[i] - r[j]) for w, (i, j) in zip(weight, groups)) / 6
        centred = train_rm.micro_loss(r, [one], args)[0] - train_rm.micro_loss(r, [one], train_rm.parse_args([]))[0]
        (nll + centred).backward()
        return nll + centred

    optimizer.step(loss)
    assert (r.max() - r.min()).item() == pytest.approx(6, abs=1e-3) and r.mean().item() == pytest.approx(0, abs=1e-3)
    pair = Group("", "", [], scores=[1, 0], prompt_ids=[1], completion_ids=[[5], [6]])
    both = torch.tensor([1.5, 0.25], dtype=torch.float64)
    added = train_rm.micro_loss(both, [pair], args)[0] - train_rm.micro_loss(both, [pair], train_rm.parse_args([]))[0]
    assert added.item() == pytest.approx(0.01 * 1.75 ** 2)   # for a pair what it always was


def test_a5_accuracy_that_agreement_allows():
    for a, q in ((0.65, 0.77), (0.75, 0.85)):
        exact = 0.5 + math.sqrt((a - 0.5) / 2)               # a = q² + (1 − q)²
        assert exact == pytest.approx(q, abs=0.005)
    assert "77 to 85 %" in (ROOT / "train_rm.py").read_text()


def test_b_margins_exaggerate():
    """(6) with p 0.9 and m 1 is least at σ(h) = 0.957, not at 0.9."""
    h = torch.linspace(0, 6, 60_001, dtype=torch.float64)
    x = train_rm.Completions(torch.stack([h, 0 * h]).flatten(), torch.arange(60_001), 60_001 + torch.arange(60_001),
                             torch.tensor(0.9), torch.tensor(1.0), torch.ones(60_001))
    least = h[train_rm.bradley_terry(x, None).argmin()]
    assert torch.sigmoid(least).item() == pytest.approx(0.957, abs=1e-3)


def test_b_ece_has_a_floor_and_it_is_printed():
    """A perfectly calibrated model does not give 0: about 0.05 for 200 pairs, which stands beside the measured one."""
    generator = torch.Generator().manual_seed(0)
    measured = []
    floors = []
    for _ in range(20):
        h = 2 * torch.randn(200, generator=generator, dtype=torch.float64)
        wins = torch.rand(200, generator=generator, dtype=torch.float64) < torch.sigmoid(h)
        h = torch.where(wins, h, -h)
        groups = [Group("", "", [], scores=[1, 0], prompt_ids=[i], completion_ids=[[5], [6]]) for i in range(200)]
        result = train_rm.evaluate(groups, torch.stack([h, 0 * h], 1).flatten(), train_rm.parse_args([]))
        measured.append(result["eval/ece"])
        floors.append(result["eval/ece_floor"])
    assert statistics.mean(measured) == pytest.approx(statistics.mean(floors), abs=0.006)
    assert 0.035 < statistics.mean(floors) < 0.065
    assert f"(perfect calibration: {result['eval/ece_floor']:.3f})" in train_rm.eval_line(1, result)


# --- GRPO -------------------------------------------------------------------------------------------------------------------

def test_a13_the_default_kl_descends_that_of_the_objective():
    args = train_grpo.parse_args([])
    assert args.kl == "k3-unbiased" and "--kl k3" in train_grpo.__doc__.split("Differs from the paper")[1]
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    ref = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def force(loss):
        logits = policy.log().requires_grad_()
        return torch.autograd.grad(loss(logits.log_softmax(0)), logits)[0]

    objective = force(lambda logp: (logp.exp() * (logp - ref.log())).sum())
    for kind, same in (("k3-unbiased", True), ("k3", False)):
        ours = force(lambda logp: (policy * train_grpo.kl_term(kind, logp, policy.log(), ref.log())).sum())
        assert torch.allclose(ours, objective) == same


def test_a12_a_calibrated_score_is_measured_by_its_own_std(tmp_path, capsys):
    """Scores that follow length: without that trend they vary less, and the z-score must not use the std with it."""
    torch.manual_seed(0)
    out = tmp_path / "rm"
    run(train_rm, out, "--max-steps", 3)
    encoder = common.load_encoder(out)
    model = common.load_reward_model(out, encoder, "cpu")
    assert 0 < model.config.reward_std_calibrated < model.config.reward_std
    capsys.readouterr()

    args = train_grpo.parse_args(["--reward", str(out), "--calibrate-length"])
    reward = train_grpo.model_reward(str(out), "", args, torch.device("cpu"))
    groups, account = common.read_groups(TOY / "pairs.jsonl", ["pair"], limit=200)
    asked = [g for g in groups for _ in range(2)]
    texts = [text for g in groups for text in g.completions]
    values = reward(asked, texts, [[]] * len(asked), [True] * len(asked))
    assert values.std().item() == pytest.approx(1, abs=0.15)
    score.main(["--reward-model", str(out), str(out), "--limit", "200", "--calibrate-length", "--output",
                str(tmp_path / "s.jsonl")])
    scores = [row[name] for row in read(tmp_path / "s.jsonl") for name in ("score_chosen", "score_rejected")]
    assert statistics.stdev(scores) == pytest.approx(values.std().item(), abs=0.02)


def test_a12_implicit_takes_the_beta_of_the_training(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"beta": 0.37}))
    base = ["--implicit", str(tmp_path), "--ref-model", "x"]
    assert score.beta_of(score.parse_args(base)) == 0.37
    assert score.beta_of(score.parse_args([*base, "--beta", "0.5"])) == 0.5
    (tmp_path / "args.json").unlink()
    assert score.beta_of(score.parse_args(base)) == score.beta_of(score.parse_args([])) == 0.1


def test_a12_pass_at_k_is_of_rewards_of_0_and_1_only(tmp_path):
    (tmp_path / "r.py").write_text("def length(completions, **_):\n    return [len(c) / 7 for c in completions]\n")
    lines = grpo(tmp_path / "out", "--reward", f"{tmp_path}/r.py:length", "--beta", 0, "--max-steps", 1)
    assert "eval/reward" in lines[0] and not [name for name in lines[0] if "pass@" in name]
    assert "eval/pass@1" in grpo(tmp_path / "right", "--max-steps", 1)[0]


def test_a12_entropy_is_logged_only_where_the_samples_are_the_policys_own(tmp_path):
    assert "entropy" in grpo(tmp_path / "all", "--max-steps", 1)[1]
    assert "entropy" not in grpo(tmp_path / "top", "--max-steps", 1, "--top-p", 0.9)[1]


def rollout(rewards, ended):
    """One prompt with completions of two tokens each."""
    n = len(rewards)
    return train_grpo.Rollout(
        groups=[Group("", "", [], prompt_ids=[1])], ids=[[5, 6]] * n, texts=[""] * n, ended=torch.tensor(ended),
        logps=torch.zeros(n), rewards={}, reward=torch.tensor(rewards, dtype=torch.float64), seconds={})


def test_a12_masked_completions_are_in_no_mean_of_their_group():
    args = SimpleNamespace(mask_truncated=True)
    some = rollout([1.0, 0.0, 0.0, 0.0], [True, True, False, False])
    r = some.by_prompt(train_grpo.counted_reward(some, args))
    assert train_grpo.advantages(r, "none").tolist() == [[0.5, -0.5, 0, 0]]
    args.mask_truncated = False
    r = some.by_prompt(train_grpo.counted_reward(some, args))
    assert train_grpo.advantages(r, "none").tolist() == [[0.75, -0.25, -0.25, -0.25]]
    # Dynamic sampling sees a group that gives no gradient as one.
    args.mask_truncated = True
    args.seed = 0
    alike = rollout([1.0, 1.0, 0.0, 0.0], [True, True, False, False])
    assert train_grpo.fill(alike, None, [0], [0], args, 0)[0].groups == []


# --- words ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file, words", [
    ("train_grpo.py", "π_ref stays the starting"), ("train_grpo.py", "Schulman 2020"), ("train_grpo.py", "2512.02556"),
    ("README.md", "cosine of"), ("README.md", "repeated"), ("score.py", "eq. 3–4"), ("common.py", "In bfloat16 rounding"),
    ("train_dpo.py", "2310.12036"), ("train_dpo.py", "2404.12358"), ("score.py", "2404.12358"), ("train_dpo.py", "2402.13228"),
    ("train_dpo.py", "2410.08847"), ("train_dpo.py", "offline and off policy"), ("train_dpo.py", "bfloat16 rounding shows")])
def test_what_must_be_said_is_said(file, words):
    assert words in " ".join((ROOT / file).read_text().replace("#", " ").split())


def test_a8_the_start_line_counts_padding_and_repeated_prompts(tmp_path, capsys):
    run(train_dpo, tmp_path / "out", "--eval-fraction", 0, "--max-steps", 1)
    line = next(x for x in capsys.readouterr().out.splitlines() if "each prompt counted once" in x)
    tokens, computed, percent = re.search(r"step 1: (\d+) tokens.*computed (\d+) \((\d+) %", line).groups()
    assert int(computed) >= int(tokens) and int(percent) == round(100 * (int(computed) / int(tokens) - 1))
