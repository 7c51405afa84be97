"""train_dpo.py: every equation of its derivation, the loss against float64, and the script as its user meets it."""
import json
import math
import os
import signal
import socket
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import train_dpo
from train_dpo import Completions, dpo, main, micro_loss, normaliser

TOY = Path(__file__).parent / "toy"
PAIRS = [name for name, row in common.FORMATS.items() if row.gives == "pair"]


def pairs(policy_w, policy_l, ref_w, ref_l, p, lengths=None):
    """M pairs, each tensor (M,), as a loss sees them."""
    count = torch.arange(len(policy_w))
    length = torch.ones(2 * len(count)) if lengths is None else lengths
    label = torch.zeros(2 * len(count), dtype=torch.bool)
    return Completions(torch.cat([policy_w, policy_l]), torch.cat([ref_w, ref_l]), length, label, count, count + len(count), p,
                       torch.zeros(len(count)), torch.ones(len(count)))


def golden(p=1.0):
    return pairs(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.5, p)))          # h = 1.5


def with_beta(beta):
    return SimpleNamespace(beta=beta)


def run(out, *flags):
    """The script on the toy: few steps, few samples. Returns the metrics lines."""
    main(["--output-dir", str(out), "--limit", "300", "--batch-size", "16", "--eval-samples", "8", *map(str, flags)])
    return metrics(out)


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def refused(capsys, *flags):
    """The one sentence with which the script refuses its flags or data."""
    with pytest.raises(SystemExit) as end:
        main(list(map(str, flags)))
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def tensors(out):
    return common.AutoModelForCausalLM.from_pretrained(out).state_dict()


# --- the derivation, equation by equation, on four answers that can be enumerated ----------------------------------------

REF = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
REWARD = torch.tensor([1.0, 0.0, -0.5, 0.3], dtype=torch.float64)
BETA = 0.5
Z = (REF * (REWARD / BETA).exp()).sum()
BEST = REF * (REWARD / BETA).exp() / Z                                                   # (3)


def objective(policy):
    return (policy * REWARD).sum() - BETA * (policy * (policy / REF).log()).sum()        # (1)


def test_eq1_eq2_objective_is_minus_beta_kl_to_the_optimum_plus_constant():
    for seed in range(5):
        policy = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(0)
        kl = (policy * (policy / BEST).log()).sum()
        assert torch.isclose(objective(policy), -BETA * kl + BETA * Z.log())


def test_eq3_closed_form_is_the_maximum():
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -objective(logits.softmax(0))
        loss.backward()
        return loss
    optimizer.step(closure)
    assert torch.allclose(logits.softmax(0).detach(), BEST, atol=1e-6)


def test_eq4_reward_is_the_log_ratio_up_to_a_constant():
    assert torch.allclose(BETA * (BEST / REF).log() + BETA * Z.log(), REWARD)


def test_eq5_eq6_the_partition_function_cancels():
    """P(y_w ≻ y_l) from the rewards is σ(β h) of the optimal policy, h from log-probs alone."""
    for w in range(4):
        for l in range(4):
            h = (BEST[w] / REF[w]).log() - (BEST[l] / REF[l]).log()
            assert torch.sigmoid(REWARD[w] - REWARD[l]).item() == pytest.approx(torch.sigmoid(BETA * h).item(), abs=1e-12)
            pair = pairs(*(x.log()[None].float() for x in (BEST[w], BEST[l], REF[w], REF[l])), torch.ones(1))
            assert dpo(pair, with_beta(BETA)).item() == pytest.approx(-torch.sigmoid(BETA * h).log().item(), abs=1e-5)


def test_eq7_dpo_on_all_pairs_reaches_the_closed_form_optimum():
    """Labels from Bradley–Terry (5), so the DPO loss, minimised, must give π* of (3): the whole derivation in one run."""
    w, l = torch.tensor([(i, j) for i in range(4) for j in range(4) if i != j]).T        # noqa: E741
    p = torch.sigmoid(REWARD[w] - REWARD[l])
    logits = REF.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        policy, ref = logits.log_softmax(0), REF.log()
        loss = dpo(pairs(policy[w], policy[l], ref[w], ref[l], p), with_beta(BETA)).mean()
        loss.backward()
        return loss
    optimizer.step(closure)
    assert torch.allclose(logits.softmax(0).detach(), BEST, atol=1e-6)


def test_eq7_loss_is_log2_when_policy_is_reference():
    logp = torch.tensor([-3.0, -300.0, -0.1])
    for p in (1.0, 0.9, 0.3):
        loss = dpo(pairs(logp, logp - 5, logp, logp - 5, torch.full((3,), p)), with_beta(0.7))
        assert torch.allclose(loss, torch.full((3,), math.log(2)))


def test_eq8_least_where_sigma_of_beta_h_is_p():
    for p in (0.6, 0.9, 0.99):
        h = torch.tensor([math.log(p / (1 - p)) / 0.3], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(1, dtype=torch.float64)
        dpo(pairs(h, zero, zero, zero, zero + p), with_beta(0.3)).backward()
        assert abs(h.grad.item()) < 1e-12


def test_eq9_gradient_is_minus_beta_sigma_of_minus_beta_h():
    inputs = [torch.tensor([a, b], dtype=torch.float64, requires_grad=True) for a, b in ((-10, -3), (-12, -2.5), (-11, -4), (-11.5, -1))]
    dpo(pairs(*inputs, torch.ones(2, dtype=torch.float64)), with_beta(0.1)).sum().backward()
    h = (inputs[0] - inputs[2] - inputs[1] + inputs[3]).detach()
    size = 0.1 / (1 + (0.1 * h).exp())
    assert torch.allclose(inputs[0].grad, -size) and torch.allclose(inputs[1].grad, size)


# --- values ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("p, value", [(1.0, 0.620957), (0.9, 0.635957), (0.5, 0.695957)])
def test_golden_values(p, value):
    assert dpo(golden(p), with_beta(0.1)).item() == pytest.approx(value, abs=1e-6)


def test_b11_swapping_the_answers_and_p_changes_nothing():
    a, b, c, d = (torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.5))
    for p in (0.0, 0.2, 1.0):
        one = dpo(pairs(a, b, c, d, torch.tensor([p])), with_beta(0.1))
        assert torch.allclose(one, dpo(pairs(b, a, d, c, torch.tensor([1 - p])), with_beta(0.1)))


def test_b18_extreme_margins_stay_finite():
    for margin in (-2000.0, 2000.0):
        x = torch.tensor([margin], requires_grad=True)
        zero = torch.zeros(1)
        loss = dpo(pairs(x, zero, zero, zero, zero + 0.9), with_beta(1.0))
        loss.backward()
        assert torch.isfinite(loss).all() and torch.isfinite(x.grad).all()


def toy_groups(n=8):
    encoder = common.load_encoder(TOY / "model")
    groups, account = common.read_groups(TOY / "pairs.jsonl", PAIRS, limit=n)
    for i, g in enumerate(groups):                                                       # very different lengths
        g.completions[0] += " so it is" * (i % 4)
        g.completions[1] += " perhaps" * (i // 3)
    groups = common.tokenise(groups, account, encoder, 512)
    common.number_completions(groups)
    return encoder, groups


REF_LOGPS = torch.tensor([(-3.0 - i, -2.0 - 0.5 * i) for i in range(8)]).flatten()       # of toy_groups()


def only_chosen(groups):
    """As --loss sft has them."""
    for g in groups:
        del g.completion_ids[1:], g.scores[1:]
    common.number_completions(groups)


FLAGS = {"dpo": [], "cdpo": ["--label-smoothing", "0.1"], "dpo + sft": ["--sft-coef", "0.7"], "sft": ["--loss", "sft"]}


def step_gradient(model, groups, args, budget):
    model.zero_grad()
    total = 0.0
    for micro in common.micro_batches(groups, budget):
        logps = common.completion_logps(model, common.lay_out(model, micro, True))
        loss, _ = micro_loss(logps, REF_LOGPS, 0.0, micro, args)
        (loss / normaliser(groups, args)).backward()
        total += loss.item() / normaliser(groups, args)
    return total, [p.grad.clone() for p in model.parameters()]


def distance(a, b):
    """‖a − b‖ / ‖b‖ of two gradients, all tensors in one."""
    a, b = (torch.cat([x.detach().double().flatten() for x in xs]) for xs in (a, b))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_b15_one_two_or_eight_micro_batches_give_one_gradient(flags):
    encoder, groups = toy_groups()
    model, args = common.load_model(TOY / "model", encoder, "cpu"), train_dpo.parse_args(flags)
    if args.loss == "sft":
        only_chosen(groups)
    total = sum(g.tokens() for g in groups)
    counts, results = [], []
    for budget in (10 ** 9, (2 * total) // 3, 1):
        counts.append(len(common.micro_batches(groups, budget)))
        results.append(step_gradient(model, groups, args, budget))
    assert counts == [1, 2, 8]
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert distance(gradient, results[0][1]) < 1e-5


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_step_loss_and_gradient_against_float64(flags):
    """The whole way from token ids to the gradient, against the plain model in float64, one completion at a time."""
    encoder, groups = toy_groups()
    args = train_dpo.parse_args(flags)
    model = common.load_model(TOY / "model", encoder, "cpu")
    exact = AutoModelForCausalLM.from_pretrained(TOY / "model", dtype=torch.float64)
    losses, tokens = [], 0
    for g in groups:
        logps = []
        for ids in g.completion_ids:
            logits = exact(torch.tensor([g.prompt_ids + ids])).logits[0].log_softmax(-1)
            logps.append(sum(logits[len(g.prompt_ids) + t - 1, i] for t, i in enumerate(ids)))
        n = len(g.completion_ids[0])
        if args.loss == "sft":
            losses.append(-logps[0])
            tokens += n
        else:
            ref = REF_LOGPS[g.index]
            z = args.beta * ((logps[0] - ref[0]) - (logps[1] - ref[1]))
            e = args.label_smoothing
            losses.append((1 - e) * torch.log1p((-z).exp()) + e * torch.log1p(z.exp()) - args.sft_coef * logps[0] / n)
            tokens += 1
    expected = sum(losses) / tokens
    expected.backward()
    if args.loss == "sft":
        only_chosen(groups)
    loss, gradient = step_gradient(model, groups, args, 100)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert distance(gradient, [p.grad for p in exact.parameters()]) < 3e-4     # 7e-5 is the fast exp in torch's CPU attention


def test_b6_every_option_changes_loss_and_gradient():
    encoder, groups = toy_groups()
    model = common.load_model(TOY / "model", encoder, "cpu")
    seen = []
    for flags in ([], ["--label-smoothing", "0.1"], ["--sft-coef", "0.5"], ["--beta", "0.3"]):
        loss, gradient = step_gradient(model, groups, train_dpo.parse_args(flags), 10 ** 9)
        seen.append((loss, gradient[3].norm().item()))
    assert len({round(a, 6) for a, _ in seen}) == len({round(b, 7) for _, b in seen}) == 4


def test_eq10_b7_sft_coef_zero_is_dpo_and_adds_the_mean_token_nll_of_chosen():
    _, groups = toy_groups()
    policy = torch.linspace(-9, -1, 16).requires_grad_()
    loss = {c: micro_loss(policy, REF_LOGPS, 0.0, groups, train_dpo.parse_args(["--sft-coef", str(c)]))[0] for c in (0.0, 0.5)}
    assert torch.equal(loss[0.0], micro_loss(policy, REF_LOGPS, 0.0, groups, train_dpo.parse_args([]))[0])
    nll = sum(-policy[2 * i] / len(g.completion_ids[0]) for i, g in enumerate(groups))
    assert torch.allclose(loss[0.5] - loss[0.0], 0.5 * nll)
    assert torch.autograd.grad(loss[0.5], policy)[0][0::2].lt(0).all()                   # raising log π(chosen) lowers the loss


def test_b13_rewards_are_zero_and_accuracy_one_half_at_the_start():
    _, groups = toy_groups()
    args = train_dpo.parse_args([])
    sums = micro_loss(REF_LOGPS, REF_LOGPS, 0.0, groups, args)[1]
    result = train_dpo.means(sums, groups, args)
    assert result["loss"] == pytest.approx(math.log(2)) and result["rewards/accuracies"] == 0.5
    assert result["rewards/margins"] == result["rewards/chosen"] == result["chosen_fell"] == 0


def test_d7_means_are_over_all_rows_not_over_micro_batches():
    _, groups = toy_groups()
    logps = torch.linspace(-9, -1, 16)
    args = train_dpo.parse_args([])
    whole = train_dpo.means(micro_loss(logps, REF_LOGPS, 0.0, groups, args)[1], groups, args)
    parts = Counter()
    for some in (slice(0, 1), slice(1, 8)):
        parts.update(micro_loss(logps[2 * some.start:2 * some.stop], REF_LOGPS, 0.0, groups[some], args)[1])
    assert {k: pytest.approx(v) for k, v in whole.items()} == train_dpo.means(parts, groups, args)


def test_b16_learning_rate_warms_up_and_ends_where_it_says():
    args = train_dpo.parse_args(["--learning-rate", "1", "--warmup-steps", "4"])
    rates = [train_dpo.lr_at(s, 24, args) for s in range(25)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[24] == pytest.approx(0, abs=1e-12)
    assert rates[14] == pytest.approx(0.5) and all(a >= b for a, b in zip(rates[4:], rates[5:]))
    linear = train_dpo.parse_args(["--learning-rate", "1", "--lr-schedule", "linear"])
    assert train_dpo.lr_at(9, 10, linear) == pytest.approx(1 / 9) and train_dpo.lr_at(0, 10, linear) == 1.0
    assert train_dpo.lr_at(9, 10, train_dpo.parse_args(["--learning-rate", "1", "--lr-schedule", "constant"])) == 1.0


# --- the script --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    return out, run(out, "--max-steps", 10, "--eval-every", 5)


def test_zero_flag_smoke(tmp_path, monkeypatch, capsys):
    """All defaults but the number of steps; with the network gone (D8)."""
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the script used the network"))
    monkeypatch.chdir(tmp_path)
    main(["--max-steps", "3", "--eval-samples", "16"])
    said = capsys.readouterr().out
    assert "0.6931 (expected 0.6931)" in said and "correct samples" in said and "'<s><user>" in said
    assert {f.name for f in Path("runs/dpo").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "args.json", "metrics.jsonl", "checkpoint"}


def test_metrics_and_step_0(straight):
    lines = straight[1]
    assert [m["step"] for m in lines] == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]
    assert lines[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6) and lines[0]["eval/rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert lines[1]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert set(lines[1]) >= {"loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/margins",
                             "rewards/accuracies", "logps/chosen", "logps/rejected", "tokens_per_second"}
    assert lines[-1]["eval/loss"] < lines[0]["eval/loss"]
    assert all(math.isfinite(v) for m in lines for v in m.values())


def test_saved_model_loads_in_plain_transformers_with_the_same_numbers(straight):
    out, lines = straight
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    encoder, base = common.load_encoder(TOY / "model"), AutoModelForCausalLM.from_pretrained(TOY / "model")
    groups, account = common.read_groups(TOY / "pairs.jsonl", PAIRS, limit=300)
    _, held_out = common.split_by_prompt(common.tokenise(groups, account, encoder, 512), 0.1, 0)
    total = 0.0
    for g in held_out:
        text = tokenizer.apply_chat_template(g.prompt + [{"role": "assistant", "content": g.completions[0]}], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        total += logps[len(g.prompt_ids) - 1:].sum().item()
    assert total / len(held_out) == pytest.approx(lines[-1]["eval/logps/chosen"], abs=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters()))


def test_d10_same_seed_same_run_other_seed_other(straight, tmp_path):
    drop = lambda lines: [{k: v for k, v in m.items() if k != "tokens_per_second"} for m in lines]  # noqa: E731
    assert drop(run(tmp_path / "same", "--max-steps", 10, "--eval-every", 5)) == drop(straight[1])
    assert drop(run(tmp_path / "other", "--max-steps", 2, "--seed", 1))[1] != drop(straight[1])[1]


def test_d2_killed_and_resumed_is_bit_equal(straight, tmp_path, monkeypatch):
    def die(out, step, values, log=train_dpo.log):
        if step == 7:
            raise RuntimeError("killed")
        log(out, step, values)
    monkeypatch.setattr(train_dpo, "log", die)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, "--max-steps", 10, "--eval-every", 5, "--save-every", 4)
    monkeypatch.undo()
    assert [f.name for f in (tmp_path / "checkpoint").iterdir()] == ["step-4.safetensors"] and metrics(tmp_path)[-1]["step"] == 6
    lines = run(tmp_path, "--max-steps", 10, "--eval-every", 5, "--save-every", 4, "--resume")
    keep = lambda ms: [{k: v for k, v in m.items() if k != "tokens_per_second"} for m in ms]  # noqa: E731
    assert keep(lines) == keep(straight[1])
    last = "checkpoint/step-10.safetensors"
    assert (tmp_path / last).read_bytes() == (straight[0] / last).read_bytes()
    assert (tmp_path / "model.safetensors").read_bytes() == (straight[0] / "model.safetensors").read_bytes()


def test_d3_kill_while_saving_keeps_the_previous_checkpoint(straight, tmp_path, monkeypatch):
    calls = []

    def die(tensors, file, save=common.save_file):
        calls.append(file)
        if len(calls) == 3:                                  # 1 reference log-probs, 2 first checkpoint, 3 the second
            Path(file).write_bytes(b"half a file")
            raise RuntimeError("killed")
        save(tensors, file)
    monkeypatch.setattr(common, "save_file", die)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, "--max-steps", 10, "--save-every", 3)
    monkeypatch.undo()
    assert {f.name for f in (tmp_path / "checkpoint").iterdir()} == {"step-3.safetensors", "step-6.safetensors.writing"}
    run(tmp_path, "--max-steps", 10, "--save-every", 3, "--resume")
    assert (tmp_path / "model.safetensors").read_bytes() == (straight[0] / "model.safetensors").read_bytes()


def test_ctrl_c_saves_and_resumes(straight, tmp_path, monkeypatch, capsys):
    def interrupt(out, step, values, log=train_dpo.log):
        log(out, step, values)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)             # ignored where the suite runs in the background
    monkeypatch.setattr(train_dpo, "log", interrupt)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--max-steps", 10)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.undo()
    assert end.value.code == 130 and "--resume" in capsys.readouterr().out
    run(tmp_path, "--max-steps", 10, "--resume")
    assert (tmp_path / "model.safetensors").read_bytes() == (straight[0] / "model.safetensors").read_bytes()


def test_resume_refuses_other_flags_and_other_data(tmp_path, capsys):
    rows = (TOY / "pairs.jsonl").read_text().splitlines(True)
    (tmp_path / "p.jsonl").write_text("".join(rows[:200]))
    out = tmp_path / "run"
    flags = ("--output-dir", out, "--dataset", tmp_path / "p.jsonl", "--batch-size", 16, "--eval-samples", 8)
    main(list(map(str, [*flags, "--max-steps", 3])))
    assert "--beta 0.1, not 0.2" in refused(capsys, *flags, "--resume", "--beta", 0.2)
    assert "after step 3" in refused(capsys, *flags, "--max-steps", 2, "--resume")
    (tmp_path / "p.jsonl").write_text("".join(rows[1:201]))
    assert "data is not what it was" in refused(capsys, *flags, "--max-steps", 4, "--resume")    # another plan, another split
    (tmp_path / "p.jsonl").write_text("".join(rows[:200]).replace('"answer": "91"', '"answer": "92"'))
    assert "data is not what it was" in refused(capsys, *flags, "--max-steps", 4, "--resume")    # what is correct is data, too
    (tmp_path / "p.jsonl").write_text("".join(rows[:200]))
    main(list(map(str, [*flags, "--max-steps", 4, "--resume"])))
    assert "--max-steps was 3 and is 4" in capsys.readouterr().out
    (out / "args.json").write_text("[1, 2]")
    assert "args.json" in refused(capsys, *flags, "--max-steps", 5, "--resume")
    assert "no checkpoint" in refused(capsys, "--output-dir", tmp_path / "none", "--resume", "--limit", 50)


def test_a_new_run_keeps_an_earlier_one_as_a_whole(tmp_path, capsys):
    out = tmp_path / "run"
    run(out, "--max-steps", 2)
    (out / "notes.json").write_text("mine")
    before = {f.name: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    run(out, "--max-steps", 1)
    assert "kept as" in capsys.readouterr().out
    assert {f.name: f.read_bytes() for f in (tmp_path / "run-1").rglob("*") if f.is_file()} == before
    assert (out / "checkpoint/step-1.safetensors").exists() and not (out / "notes.json").exists()
    run(out, "--max-steps", 1)
    assert (tmp_path / "run-2/model.safetensors").exists() and (tmp_path / "run-1/model.safetensors").exists()
    assert "--output-dir" in refused(capsys, "--output-dir", out, "--model", out)        # the reference would be what is trained
    assert "--output-dir" in refused(capsys, "--output-dir", tmp_path, "--model", out)   # or would be moved away before it is read


def test_an_input_inside_the_output_directory_is_refused(tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "p.jsonl").write_text("".join((TOY / "pairs.jsonl").read_text().splitlines(True)[:50]))
    assert "--dataset" in refused(capsys, "--output-dir", out, "--dataset", out / "p.jsonl")
    (tmp_path / "link").symlink_to(out)
    assert "--eval-dataset" in refused(capsys, "--output-dir", tmp_path / "link", "--limit", 50, "--eval-dataset", out / "p.jsonl")


def test_a_gradient_that_is_not_finite_ends_the_run_with_the_state_before_it(straight, tmp_path, monkeypatch, capsys):
    def spoil(*x, micro_loss=train_dpo.micro_loss):
        loss, sums = micro_loss(*x)
        calls.append(loss)
        return (loss * math.nan if len(calls) == 7 else loss), sums
    calls = []
    monkeypatch.setattr(train_dpo, "micro_loss", spoil)
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "o", "--max-steps", 10)               # calls 1 and 2 are the evaluation, so the 5th step
    said = capsys.readouterr().err
    assert end.value.code == 2 and "step 5" in said and "not finite" in said and "--resume" in said
    monkeypatch.undo()
    run(tmp_path / "o", "--max-steps", 10, "--resume")
    assert (tmp_path / "o/model.safetensors").read_bytes() == (straight[0] / "model.safetensors").read_bytes()


def test_a_checkpoint_is_written_every_ten_minutes_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(train_dpo, "SAVE_SECONDS", 0)
    steps = []

    def note(out, model, optimizer, step, extra, save=common.save_checkpoint):
        steps.append(step)
        save(out, model, optimizer, step, extra)
    monkeypatch.setattr(common, "save_checkpoint", note)
    run(tmp_path / "o", "--max-steps", 3)
    assert steps == [1, 2, 3]
    assert {f.name for f in (tmp_path / "o/checkpoint").iterdir()} == {"step-2.safetensors", "step-3.safetensors"}


def test_a_copy_of_the_script_runs_and_writes_to_a_directory_of_its_own(tmp_path):
    """cp train_dpo.py train_mine.py: a fork is a copy."""
    import importlib.util
    copy = tmp_path / "train_mine.py"
    copy.write_text(Path(train_dpo.__file__).read_text())
    spec = importlib.util.spec_from_file_location("train_mine", copy)
    mine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mine)
    assert mine.parse_args([]).output_dir == "runs/mine" and train_dpo.parse_args([]).output_dir == "runs/dpo"


def test_b12_dropout_is_off_and_stays_in_the_config(tmp_path):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, attn_pdrop=0.1, resid_pdrop=0.1,
                               embd_pdrop=0.1, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    lines = run(tmp_path / "out", "--model", tmp_path / "gpt2", "--max-steps", 1)
    assert lines[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6) and lines[1]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert json.loads((tmp_path / "out/config.json").read_text())["resid_pdrop"] == 0.1


def test_b13_reference_cache_is_read_again_and_keyed_by_all_it_depends_on(tmp_path, capsys):
    def kept():
        return [f.name for f in (tmp_path / "run/ref_logps").iterdir()]

    first = run(tmp_path / "run", "--max-steps", 3, "--epochs", 2)
    names = kept()
    assert len(names) == 1
    again = run(tmp_path / "run", "--max-steps", 3, "--epochs", 2)
    assert "read from" in capsys.readouterr().out and kept() == names
    assert [m["loss"] for m in first if "loss" in m] == [m["loss"] for m in again if "loss" in m]
    other_config = straight_copy(tmp_path / "config", weight=0.0, rope_theta=77.0)
    for flags in (["--max-length", 9], ["--limit", 200], ["--ref-model", straight_copy(tmp_path / "weight")], ["--ref-model", other_config]):
        run(tmp_path / "run", "--max-steps", 1, *flags)
        assert "read from" not in capsys.readouterr().out
        names += kept()
    assert len(set(names)) == len(names) == 5


def straight_copy(folder, weight=0.1, rope_theta=None):
    """The toy model with one weight changed, or its config."""
    model = AutoModelForCausalLM.from_pretrained(TOY / "model")
    model.model.norm.weight.data[0] += weight
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(folder)
    if rope_theta:
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": rope_theta}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_models_that_cannot_be_a_policy_are_refused(tmp_path, capsys):
    tokenizer, model = AutoTokenizer.from_pretrained(TOY / "model"), tmp_path / "m"
    AutoModelForSequenceClassification.from_pretrained(TOY / "model", num_labels=1).save_pretrained(model)      # embeddings tied: no weight is missing
    tokenizer.save_pretrained(model)
    flags = ("--model", model, "--output-dir", tmp_path / "o", "--limit", 50)
    assert "reward model" in refused(capsys, *flags)
    AutoModelForCausalLM.from_pretrained(TOY / "model").save_pretrained(model)
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:1000])
    assert "cannot be loaded" in refused(capsys, *flags)
    (model / "generation_config.json").write_text("{")
    assert "generation_config.json" in refused(capsys, *flags)
    (tmp_path / "file").write_text("x")
    assert "--output-dir" in refused(capsys, "--output-dir", tmp_path / "file" / "x", "--limit", 50)


def test_b17_a_bfloat16_checkpoint_is_trained_in_float32(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(TOY / "model", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(tmp_path / "bf16")
    run(tmp_path / "out", "--model", tmp_path / "bf16", "--max-steps", 5, "--learning-rate", "1e-6", "--lr-schedule", "constant", "--warmup-steps", 0, "--dtype", "bfloat16")
    moved = [(a - b.float()).abs().mean().item() for (n, a), b in zip(tensors(tmp_path / "out").items(), model.state_dict().values()) if "proj" in n]
    assert all(x > 1e-6 for x in moved)                      # 5 steps of about 1e-6: nothing is rounded away


def test_d4_every_tensor_changes(straight):
    before, after = AutoModelForCausalLM.from_pretrained(TOY / "model").state_dict(), tensors(straight[0])
    assert all(not torch.equal(before[k], after[k]) for k in before)


def test_eq11_sft_learns_from_responses_and_from_pairs(tmp_path, capsys):
    rows = [{"prompt": [{"role": "user", "content": f"{i}+1"}], "response": [{"role": "assistant", "content": "yes"}]} for i in range(40)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    lines = run(tmp_path / "a", "--loss", "sft", "--dataset", tmp_path / "r.jsonl", "--max-steps", 10)
    assert lines[-1]["eval/loss"] < lines[0]["eval/loss"] / 2
    rows = [{"prompt": f"{i}+1", "completion": "yes", "label": i % 4 > 0} for i in range(40)]
    (tmp_path / "u.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run(tmp_path / "u", "--loss", "sft", "--dataset", tmp_path / "u.jsonl", "--chat", "--max-steps", 1)
    assert "kept 30" in (said := capsys.readouterr().out) and "10 with label false" in said           # what is bad is not imitated
    lines = run(tmp_path / "b", "--loss", "sft", "--max-steps", 5)
    assert lines[0]["eval/loss"] < 2 and "rewards/margins" not in lines[1]


def test_soft_labels_from_the_data(tmp_path, capsys):
    rows = [dict(json.loads(line), p_chosen=0.5) for line in (TOY / "pairs.jsonl").read_text().splitlines()[:100]]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    lines = run(tmp_path / "out", "--dataset", tmp_path / "p.jsonl", "--max-steps", 3)
    assert lines[1]["grad_norm"] < 1e-4                      # p = 1/2 is least at h = 0: nothing to learn (8)
    sure = [dict(r, p_chosen=0.9) for r in rows]
    turned = [dict(r, chosen=r["rejected"], rejected=r["chosen"], p_chosen=0.1) if i % 2 else r for i, r in enumerate(sure)]
    runs = []
    for name, those in (("sure", sure), ("turned", turned)):
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in those))
        runs.append(run(tmp_path / name, "--dataset", tmp_path / "p.jsonl", "--max-steps", 3))
    assert "50 pairs have p_chosen below 1/2" in capsys.readouterr().out
    for a, b in zip(*runs):                                  # the same labels, said the other way round
        for k in a.keys() - {"tokens_per_second"}:
            assert a[k] == pytest.approx(b[k], abs=2e-4), k
    rows[7]["p_chosen"] = 1.5
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert "line 8" in (said := refused(capsys, "--dataset", tmp_path / "p.jsonl", "--output-dir", tmp_path / "o")) and "p_chosen" in said


@pytest.mark.parametrize("flags, words", [
    (["--loss", "dppo"], ["--loss", "dppo", "'dpo'", "'sft'"]),
    (["--beta", "0"], ["--beta"]),
    (["--label-smoothing", "0.5"], ["--label-smoothing"]),
    (["--loss", "sft", "--label-smoothing", "0.1"], ["--label-smoothing", "sft"]),
    (["--batch-size", "0"], ["--batch-size"]),
    (["--learning-rate", "-1"], ["--learning-rate"]),
    (["--eval-fraction", "1"], ["--eval-fraction"]),
    (["--epoch", "2"], ["--epoch"]),                         # no abbreviations
    (["--model", "no/such/model"], ["--model", "no/such/model"]),
    (["--dataset", "nothing.jsonl"], ["nothing.jsonl"]),
    (["--dataset", str(TOY / "prompts.jsonl")], ["prompts.jsonl", "chosen"]),
    (["--max-length", "4"], ["pairs.jsonl", "no rows"]),
    (["--beta", "nan"], ["--beta"]), (["--sft-coef", "-1"], ["--sft-coef"]), (["--seed", str(2 ** 63)], ["--seed"]),
    (["--device", "foo"], ["--device foo"]), (["--device", "cuda:99"], ["--device cuda:99"]),
])
def test_bad_input_ends_in_one_sentence(flags, words, capsys, tmp_path):
    said = refused(capsys, *flags, "--output-dir", tmp_path / "out")
    assert all(w in said for w in words), said
    assert not (tmp_path / "out").exists()                   # before anything is made
