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
from test_score import reward_model

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


# --- alarms and checks ------------------------------------------------------------------------------------------------------

def trained_rm(folder, **config):
    """The toy with a random head and statistics as train_rm.py stores them."""
    return str(reward_model(folder, **config))


def test_c_scores_far_from_those_of_the_training_raise_an_alarm(tmp_path, capsys):
    near = trained_rm(tmp_path / "near", reward_mean=0.0, reward_std=100.0)
    far = trained_rm(tmp_path / "far", reward_mean=1000.0, reward_std=0.5)
    for folder, share, alarm in ((near, "0.0 %", False), (far, "100.0 %", True)):
        score.main(["--reward-model", folder, "--limit", "20"])
        said = capsys.readouterr().out
        assert f"{folder}: {share} of 40 scores lie more than 3" in said and ("do not trust it" in said) == alarm
        lines = grpo(tmp_path / f"out-{alarm}", "--reward", folder, "--max-steps", 2, "--eval-samples", 0)
        said = capsys.readouterr()
        assert [line[f"rewards/{Path(folder).name}/unusual"] for line in lines] == [float(alarm)] * 2
        assert (said.out + said.err).count("do not trust it here") == alarm              # once, not each step


def test_c_conflicting_labels_are_counted_in_the_account(tmp_path, capsys):
    def pair(prompt, chosen, rejected):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    rows = [pair("1+1", "2", "3"), pair("1+1", "3", "2"), pair("1+1", "2", "4"), pair("2+2", "4", "2")]
    held_out = write(tmp_path / "eval.jsonl", rows[3:])
    run(train_dpo, tmp_path / "dpo", "--dataset", write(tmp_path / "a.jsonl", rows), "--eval-dataset", held_out)
    said = capsys.readouterr().out
    assert "2 completions are chosen in one row and rejected in another of the same prompt" in said
    assert "1 prompts of --eval-dataset are also trained on" in said
    lists = [{"prompt": "p", "completions": ["a", "b", "c"], "scores": s} for s in ([2, 1, 0], [2, 0, 1], [0, 1, 2])]
    labelled = [{"prompt": "p", "completion": "a", "label": value} for value in (True, False)]
    for data, count in ((lists, 2), (labelled, 1), (labelled[:1], 0)):
        groups, _ = common.read_groups(write(tmp_path / "d.jsonl", data), tuple(common.FORMATS))
        assert common.conflicting(groups) == count


def test_c_pointwise_labels_train_a_verifier(tmp_path, capsys):
    rows = []
    for line in read(TOY / "pairs.jsonl")[:400]:
        for name, label in (("chosen", True), ("rejected", False)):
            rows.append({"prompt": line["prompt"], "completion": line[name], "label": label})
    data = write(tmp_path / "labelled.jsonl", rows)
    with pytest.raises(SystemExit):
        train_rm.main(["--dataset", data, "--output-dir", str(tmp_path / "no")])
    assert "--loss pointwise" in capsys.readouterr().err
    flags = ["--dataset", data, "--limit", 0, "--loss", "pointwise", "--lr", 1e-3, "--max-steps", 60, "--batch-size", 16]
    lines = run(train_rm, tmp_path / "out", *flags)
    assert lines[-1]["eval/rewards/accuracies"] > 0.85 and lines[-1]["eval/auc"] > 0.95
    assert lines[-1]["eval/loss"] < 0.4 and lines[-1]["eval/n"] == 80
    said = capsys.readouterr().out
    assert "of 80 completions, AUC" in said and "(0.6931 if all scores were equal)" in said
    score.main(["--reward-model", str(tmp_path / "out"), "--dataset", data, "--limit", "40"])
    assert "label = True" in capsys.readouterr().out


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_c_pointwise_is_the_cross_entropy_and_auc_that_of_all_pairs(smoothing):
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(30, generator=generator).round(decimals=1).double()                  # with ties
    labels = (torch.rand(30, generator=generator) < 0.4).long().tolist()
    groups = [Group("", "", [], scores=[x], prompt_ids=[i], completion_ids=[[5, 6]]) for i, x in enumerate(labels)]
    args = train_rm.parse_args(["--loss", "pointwise", "--label-smoothing", str(smoothing)])
    loss, sums = train_rm.micro_loss(r, groups, args)
    p = torch.tensor([1 - smoothing if x else smoothing for x in labels]).double()
    assert loss.item() == pytest.approx(torch.nn.functional.binary_cross_entropy_with_logits(r, p, reduction="sum").item())
    far = train_rm.micro_loss(1e4 * r, groups, args)[0]
    assert math.isfinite(far)
    result = train_rm.evaluate(groups, r, args)
    good = [x.item() for x, label in zip(r, labels) if label]
    bad = [x.item() for x, label in zip(r, labels) if not label]
    auc = statistics.mean([0.5 * (1 + (a > b) - (a < b)) for a in good for b in bad])
    assert result["eval/auc"] == pytest.approx(auc)
    assert result["eval/rewards/accuracies"] == pytest.approx(sums["rewards/accuracies"] / 30)


def test_c_weights_and_the_price_of_disagreement(tmp_path, capsys):
    a = trained_rm(tmp_path / "a", reward_mean=0.0, reward_std=1.0)
    b = trained_rm(tmp_path / "b", reward_mean=1.0, reward_std=4.0)
    given = {}
    for name, flags in {"mean": [], "weighted": ["--reward-weights", "3", "1"],
                        "less": ["--aggregate", "mean-std", "--std-coef", "0.5"]}.items():
        file = tmp_path / f"{name}.jsonl"
        score.main(["--reward-model", a, b, "--limit", "5", "--output", str(file), *flags])
        given[name] = read(file)
    score.main(["--reward-model", a, "--limit", "5", "--output", str(tmp_path / "one.jsonl")])
    for i, row in enumerate(read(tmp_path / "one.jsonl")):
        z = [row["score_chosen"], (row["score_chosen"] - 1) / 4]
        wanted = {"mean": sum(z) / 2, "weighted": (3 * z[0] + z[1]) / 4, "less": sum(z) / 2 - 0.5 * statistics.stdev(z)}
        assert {name: rows[i]["score_chosen"] for name, rows in given.items()} == pytest.approx(wanted, abs=1e-5)
    for flags in (["--reward-weights", "1"], ["--std-coef", "2"], ["--aggregate", "mean-std"]):
        with pytest.raises(SystemExit):
            score.parse_args(["--reward-model", a, *flags])


def test_c_histograms_of_training_data_and_of_an_untrained_head(tmp_path, capsys):
    rm = trained_rm(tmp_path / "rm", reward_mean=0.0, reward_std=1.0)
    data = read(TOY / "pairs.jsonl")
    train = write(tmp_path / "seen.jsonl", data[:40])
    test = write(tmp_path / "test.jsonl", data[40:60])
    score.main(["--reward-model", rm, "--dataset", test, "--beside", train, "--untrained", str(TOY / "model")])
    said = capsys.readouterr().out
    trained, untrained = said.split("\n" + rm + "\n")[1].split(f"{TOY}/model, a new head")
    bars = [sum(map(int, re.findall(r" (\d+)(?= |$)", line[11:]))) for line in trained.splitlines()[1:]]
    assert sum(bars) == 2 * 60 and "chosen of seen" in trained
    bars = [sum(map(int, re.findall(r" (\d+)(?= |$)", line[11:]))) for line in untrained.splitlines()[2:]]
    assert sum(bars) == 2 * 20
    assert "accuracy" in said and "of 20 pairs" in said      # what stands beside is in no number
    with pytest.raises(SystemExit):
        score.main(["--reward-model", rm, "--untrained", rm, "--dataset", test])
    assert "is a trained reward model" in capsys.readouterr().err


def test_c_log_probs_change_by_position():
    groups = [Group("", "", [], scores=[1, 0], prompt_ids=[1], completion_ids=[[5] * 7, [6] * 2], index=[0, 1])]
    start = torch.zeros(9)
    now = torch.tensor([-1.0, -1, -1, -1, -1, 0.5, 0.25, 9, 9])
    change = train_dpo.change(groups, now, start)
    assert change["chosen_change"] == -4.25
    assert change["chosen_change_opening"] == -5 and change["chosen_change_rest"] == 0.75
    assert change["chosen_fell_opening"] == 1 and change["chosen_fell_rest"] == 0


def test_c_curves_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "metrics.jsonl", [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}])
    score.main(["--dataset", str(tmp_path / "run"), "--tensorboard"])
    assert list((tmp_path / "run" / "tensorboard").glob("events.out*"))
    with pytest.raises(SystemExit):
        score.parse_args(["--tensorboard"])
