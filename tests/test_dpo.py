"""train_dpo.py: every equation of its derivation, the loss against float64, and the script as its
user meets it. a4, b6 … d10 are traps."""
import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig,
    GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM)

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import train_dpo
from train_dpo import dpo, main, micro_loss, parse_args

TOY = Path(__file__).parent / "toy"
CPU = torch.device("cpu")


def run(out, *flags):
    """The script on the toy: few steps, few samples → its lines of metrics."""
    small = ["--limit", 120, "--batch-size", 16, "--eval-samples", 4]
    main(list(map(str, ["--output-dir", out, *small, *flags])))
    return metrics(out)


def metrics(out):
    """What a run logged, but for its speed."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def refused(capsys, *flags):
    """The one sentence with which the script refuses its flags or data."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(list(map(str, flags)))
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def weights(out):
    return (out / "model.safetensors").read_bytes()


def rows_of_the_toy(count):
    return [json.loads(line) for line in (TOY / "pairs.jsonl").read_text().splitlines()[:count]]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# --- the derivation, on four completions that can be enumerated -----------------------------------

REF = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
REWARD = torch.tensor([1.0, 0.0, -0.5, 0.3], dtype=torch.float64)
BETA = 0.5
Z = (REF * (REWARD / BETA).exp()).sum()
BEST = REF * (REWARD / BETA).exp() / Z                                                   # (3)


def at(h, p=1.0):
    """What dpo() reads of pairs."""
    h = torch.as_tensor(h, dtype=torch.float64)
    return SimpleNamespace(h=h, p=torch.as_tensor(p, dtype=torch.float64))


def minimum(loss):
    """The distribution over four completions at which loss(their log-probs) is least."""
    logits = REF.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-18,
        line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(logits.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.softmax(0).detach()


def objective(policy):
    return (policy * REWARD).sum() - BETA * (policy * (policy / REF).log()).sum()        # (1)


def test_eq1_eq2_eq3_the_objective_is_minus_a_kl_to_the_closed_form_which_is_its_maximum():
    policy = torch.tensor([0.3, 0.1, 0.2, 0.4], dtype=torch.float64)
    kl = (policy * (policy / BEST).log()).sum()
    assert torch.isclose(objective(policy), -BETA * kl + BETA * Z.log())
    assert torch.allclose(minimum(lambda logp: -objective(logp.exp())), BEST, atol=1e-6)


def test_eq4_eq5_eq6_the_reward_is_the_log_ratio_up_to_a_constant_that_cancels():
    log_ratio = (BEST / REF).log()
    assert torch.allclose(BETA * log_ratio + BETA * Z.log(), REWARD)
    h = log_ratio[:, None] - log_ratio
    win = torch.sigmoid(REWARD[:, None] - REWARD)                                        # (5)
    assert torch.allclose(dpo(at(h), SimpleNamespace(beta=BETA)), -win.log())


@pytest.mark.parametrize("name", ["dpo", "soft", "distill"])
def test_eq7_eq12_eq13_all_pairs_under_a_reward_reach_the_closed_form_optimum(name):
    """Labels from (5), so the loss, minimised, must give π* of (3): the derivation in one run."""
    i, j = torch.tensor([(i, j) for i in range(4) for j in range(4) if i != j]).T
    margin = REWARD[i] - REWARD[j]

    def loss(logp):
        D = logp - REF.log()
        x = SimpleNamespace(h=D[i] - D[j], p=torch.sigmoid(margin), margin=margin)
        return train_dpo.LOSSES[name].function(x, SimpleNamespace(beta=BETA)).mean()

    assert torch.allclose(minimum(loss), BEST, atol=1e-6)


def test_eq7_loss_is_log2_when_policy_is_reference_and_finite_far_from_it():
    args = SimpleNamespace(beta=0.7)
    assert dpo(at([0, 0], [1, 0.3]), args).tolist() == pytest.approx([math.log(2)] * 2)
    assert dpo(at([-2000, 2000], 0.9), args).isfinite().all()                            # b18


def test_eq8_least_where_sigma_of_beta_h_is_p_and_b11_swapping_changes_nothing():
    args = SimpleNamespace(beta=0.3)
    for p in (0.6, 0.9, 0.99):
        x = at(math.log(p / (1 - p)) / 0.3, p)
        x.h.requires_grad_()
        dpo(x, args).backward()
        assert abs(x.h.grad.item()) < 1e-12
        assert torch.equal(dpo(at(1.5, p), args), dpo(at(-1.5, 1 - x.p), args))


def test_eq9_gradient_is_minus_beta_sigma_of_minus_beta_h():
    x = at([1.5, -0.5])
    x.h.requires_grad_()
    dpo(x, SimpleNamespace(beta=0.1)).sum().backward()
    assert x.h.grad.tolist() == pytest.approx([-0.1 / (1 + math.exp(0.1 * h)) for h in (1.5, -0.5)])


# --- a step ---------------------------------------------------------------------------------------

def toy_groups(args, n=8):
    """→ (encoder, pairs of very different lengths with a reference)."""
    encoder = common.load_encoder(args.model, args)
    args.limit = n
    groups, _, dropped = common.read_groups(args.dataset, "train", ["pair"], args)
    for i, g in enumerate(groups):
        g.completions[0] += " so it is" * (i % 4)
        g.completions[1] += " perhaps" * (i // 3)
    groups = common.tokenise(train_dpo.prepare(groups, dropped, args), encoder, 512)
    for i, g in enumerate(groups):
        g.ref = [-3.0 - i, -2.0 - 0.5 * i][:len(g.completion_ids)]
    return encoder, groups


FLAGS = {
    "dpo": [], "cdpo": ["--label-smoothing", "0.1"], "eq10": ["--sft-coef", "0.7"],
    "eq11": ["--loss", "sft"]}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_step_loss_and_gradient_against_float64(flags):
    """From ids to the gradient, against the plain model in float64, one completion at a time."""
    args = parse_args(flags)
    encoder, groups = toy_groups(args)
    exact = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float64)
    expected = 0.0
    for g in groups:
        logps = []
        for ids in g.completion_ids:
            logits = exact(torch.tensor([g.prompt_ids + ids])).logits[0].log_softmax(-1)
            start = len(g.prompt_ids) - 1
            logps.append(sum(logits[start + t, token] for t, token in enumerate(ids)))
        if args.loss == "sft":
            expected = expected - logps[0]
            continue
        z = args.beta * (logps[0] - g.ref[0] - logps[1] + g.ref[1])
        e = args.label_smoothing
        expected = expected + (1 - e) * torch.log1p((-z).exp()) + e * torch.log1p(z.exp())
        expected = expected - args.sft_coef * logps[0] / len(g.completion_ids[0])
    expected.backward()

    model = common.load_model(args.model, encoder, CPU)
    batch = common.lay_out(model, groups, True)
    loss, sums = micro_loss(common.completion_logps(model, batch), 0.0, groups, args)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    tokens = sum(len(g.completion_ids[0]) for g in groups)
    count = tokens if args.loss == "sft" else len(groups)
    assert train_dpo.means(sums, args)["loss"] == pytest.approx(expected.item() / count, rel=1e-5)
    ours, theirs = [torch.cat([p.grad.double().flatten() for p in m.parameters()])
                    for m in (model, exact)]
    assert (ours - theirs).norm() < 3e-4 * theirs.norm()     # torch's fast exp in CPU attention


def test_d7_means_are_over_all_rows_not_over_micro_batches():
    args = parse_args([])
    _, groups = toy_groups(args)
    logps = torch.linspace(-9, -1, 16)
    whole = micro_loss(logps, 0.0, groups, args)[1]
    parts = Counter()
    for i, j in ((0, 1), (1, 8)):
        parts.update(micro_loss(logps[2 * i:2 * j], 0.0, groups[i:j], args)[1])
    assert train_dpo.means(parts, args) == pytest.approx(train_dpo.means(whole, args))


def test_b16_learning_rate_warms_up_and_ends_where_it_says():
    args = parse_args(["--learning-rate", "1", "--warmup-steps", "4"])
    rates = [train_dpo.lr_at(step, 24, args) for step in range(25)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[24] == pytest.approx(0, abs=1e-12)
    assert rates[14] == pytest.approx(0.5) and rates[4:] == sorted(rates[4:], reverse=True)
    linear = parse_args(["--learning-rate", "1", "--lr-schedule", "linear"])
    assert train_dpo.lr_at(9, 10, linear) == pytest.approx(1 / 9)
    assert train_dpo.lr_at(0, 10, linear) == 1                # a tenth of ten steps of warm-up
    constant = parse_args(["--learning-rate", "1", "--lr-schedule", "constant"])
    assert train_dpo.lr_at(9, 10, constant) == 1


# --- the script: what it measures -----------------------------------------------------------------

@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    return out, run(out, "--max-steps", 6, "--eval-every", 3)


def test_zero_flags_without_a_network(tmp_path, monkeypatch, capsys):                    # d8
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network was used"))
    monkeypatch.chdir(tmp_path)
    main(["--max-steps", "1", "--eval-samples", "4"])
    said = capsys.readouterr().out
    assert "0.6931 (expected 0.6931)" in said and "correct samples" in said and "'<s><user>" in said
    made = {file.name for file in Path("runs/dpo").iterdir()}
    assert made >= {
        "config.json", "model.safetensors", "tokenizer.json", "args.json", "metrics.jsonl",
        "checkpoint"}


def test_metrics(straight):
    out, lines = straight
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert set(lines[1]) == {
        "step", "loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected",
        "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"}
    assert lines[-1]["eval/loss"] < lines[0]["eval/loss"]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    before = AutoModelForCausalLM.from_pretrained(TOY / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)            # d4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_b13_the_first_loss_is_log2_since_the_reference_is_measured_in_the_same_batches(
        dtype, tmp_path):
    lines = run(tmp_path / "o", "--dtype", dtype, "--max-steps", 2, "--micro-batch-tokens", 100)
    for line, prefix in ((lines[0], "eval/"), (lines[1], "")):
        assert line[f"{prefix}loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert line[f"{prefix}rewards/accuracies"] == 0.5
        assert line[f"{prefix}rewards/margins"] == 0
    assert lines[0]["eval/kl"] == 0


def test_b12_dropout_is_off_and_stays_in_the_config(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, attn_pdrop=0.1,
        resid_pdrop=0.1, embd_pdrop=0.1, bos_token_id=1, eos_token_id=2)
    ).save_pretrained(tmp_path / "gpt2")
    lines = run(tmp_path / "o", "--model", tmp_path / "gpt2", "--max-steps", 1)
    assert lines[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert json.loads((tmp_path / "o/config.json").read_text())["resid_pdrop"] == 0.1


def test_b17_a_bfloat16_checkpoint_is_trained_in_float32(tmp_path):
    before = AutoModelForCausalLM.from_pretrained(TOY / "model", dtype=torch.bfloat16)
    before.save_pretrained(tmp_path / "bf16")
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(tmp_path / "bf16")
    run(tmp_path / "o", "--model", tmp_path / "bf16", "--max-steps", 3, "--lr", 1e-6,
        "--lr-schedule", "constant", "--dtype", "bfloat16", "--eval-samples", 0)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "o").state_dict()
    for name, was in before.state_dict().items():            # 3e-6: nothing is rounded away
        assert "proj" not in name or (after[name] - was.float()).abs().mean() > 1e-6


def test_saved_model_loads_in_plain_transformers_with_the_same_numbers(straight):
    out, lines = straight
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    args = parse_args(["--limit", "120"])
    _, held_out, _ = common.load_data(args, common.load_encoder(args.model, args), ["pair"])
    total = 0.0
    for g in held_out:
        dialogue = g.prompt + [{"role": "assistant", "content": g.completions[0]}]
        text = tokenizer.apply_chat_template(dialogue, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        total += logps[len(g.prompt_ids) - 1:].sum().item()
    assert total / len(held_out) == pytest.approx(lines[-1]["eval/logps/chosen"], abs=1e-4)


def test_evaluation_by_hand(monkeypatch):
    """Two rows of one prompt and one of another: the error counts two prompts (a4), and the chosen
    completion of one row in three has become less likely."""
    groups = []
    for prompt, ref in ((1, [-2.0, -2.0]), (1, [-2.0, -2.0]), (2, [-2.0, -2.0])):
        groups.append(common.Group(
            "", [], scores=[1, 0], prompt_ids=[prompt], completion_ids=[[5], [6]], ref=ref))
    logps = [[-1.0, -3.0], [-2.0, -2.0], [-4.0, -1.0]]       # h = 2, 0, −3
    monkeypatch.setattr(train_dpo, "for_all", lambda *rest: logps)
    args = parse_args(["--beta", "0.5", "--eval-samples", "0"])
    encoder = SimpleNamespace(max_positions=9)
    result = train_dpo.evaluate(None, encoder, groups, 0.0, args, True, None, None, 7)
    losses = [math.log1p(math.exp(-0.5 * h)) for h in (2, 0, -3)]
    assert result["eval/loss"] == pytest.approx(sum(losses) / 3)
    assert result["eval/rewards/accuracies"] == pytest.approx(1.5 / 3)       # a tie counts half
    error = math.sqrt(0.375 ** 2 / 2 + 1 / 16) / (1 + 1 / 2)                 # of 0.75 and 0, Wilson
    assert result["eval/accuracy_se"] == pytest.approx(error)
    assert result["eval/rewards/chosen"] == pytest.approx(0.5 * (1 + 0 - 2) / 3)
    assert result["eval/rewards/margins"] == pytest.approx(0.5 * (2 + 0 - 3) / 3)
    assert result["eval/chosen_fell"] == pytest.approx(1 / 3) and result["eval/n"] == 3


def test_p_chosen_below_one_half_is_the_same_pair_the_other_way_round(tmp_path):
    rows = rows_of_the_toy(40)
    flat = write(tmp_path / "flat.jsonl", [row | {"p_chosen": 0.5} for row in rows])
    flags = ["--max-steps", 2, "--eval-samples", 0]
    assert run(tmp_path / "f", "--dataset", flat, *flags)[1]["grad_norm"] < 1e-4         # (8)
    sure = [row | {"p_chosen": 0.9} for row in rows]
    turned = []
    for row in sure:
        turned.append(row | {"chosen": row["rejected"], "rejected": row["chosen"], "p_chosen": 0.1})
    a, b = [run(tmp_path / name, "--dataset", write(tmp_path / f"{name}.jsonl", data), *flags)
            for name, data in (("sure", sure), ("turned", turned))]
    for one, two in zip(a, b):
        assert one == pytest.approx(two, abs=1e-5)


def test_eq11_sft_learns_from_responses_and_leaves_bad_ones_out(tmp_path, capsys):
    rows = [{"prompt": f"{i}+1", "completion": "yes", "label": i % 4 > 0} for i in range(40)]
    data = ["--loss", "sft", "--chat", "--dataset", write(tmp_path / "u.jsonl", rows)]
    lines = run(tmp_path / "u", *data, "--epochs", 5)
    assert lines[-1]["eval/loss"] < lines[0]["eval/loss"] / 2
    assert "10 with label false" in capsys.readouterr().out
    rows = [{"prompt": f"{i}+1", "response": "yes", "cut": i < 3} for i in range(20)]
    run(tmp_path / "r", *data[:3], "--dataset", write(tmp_path / "r.jsonl", rows), "--max-steps", 1)
    assert "3 with label false or truncated when sampled" in capsys.readouterr().out
    assert "logps/chosen" in lines[1] and "logps/rejected" not in lines[1]       # there are none


def test_robust_leaves_out_labels_that_say_nothing(tmp_path, capsys):
    rows = [{"prompt": f"{i}+1", "chosen": "2", "rejected": "3", "p_chosen": 0.5 + 0.4 * (i > 2)}
            for i in range(40)]
    data = ["--dataset", write(tmp_path / "p.jsonl", rows), "--loss", "robust"]
    lines = run(tmp_path / "r", *data, "--max-steps", 1)
    assert "3 with p_chosen 0.5" in capsys.readouterr().out
    assert math.isfinite(lines[0]["eval/loss"]) and math.isfinite(lines[1]["loss"])


# --- the script: runs, kills, refusals ------------------------------------------------------------

def test_d10_same_seed_same_run_other_seed_other(straight, tmp_path):
    assert run(tmp_path / "same", "--max-steps", 6, "--eval-every", 3) == straight[1]
    assert run(tmp_path / "other", "--max-steps", 1, "--seed", 1)[1]["loss"] != straight[1][1]


def kill_in_log(monkeypatch):
    def open_run(*given, open_run=common.open_run):
        out, log = open_run(*given)

        def dying_log(step, values):
            if step == 5:
                raise RuntimeError("killed")
            log(step, values)

        return out, dying_log
    monkeypatch.setattr(common, "open_run", open_run)


def kill_in_save(monkeypatch):                                                           # d3
    def save(state, file, save=torch.save):
        if state["step"] == 4:
            Path(file).write_bytes(b"half a file")
            raise RuntimeError("killed")
        save(state, file)
    monkeypatch.setattr(torch, "save", save)


def spoil_the_gradient(monkeypatch):
    def clip(model, bound, clip_gradient=common.clip_gradient):
        calls.append(clip_gradient(model, bound))
        return math.nan if len(calls) == 5 else calls[-1]
    calls = []
    monkeypatch.setattr(common, "clip_gradient", clip)


def press_ctrl_c(monkeypatch):
    def clip(model, bound, clip_gradient=common.clip_gradient):
        calls.append(clip_gradient(model, bound))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return calls[-1]
    calls = []
    monkeypatch.setattr(common, "clip_gradient", clip)


@pytest.mark.parametrize("end, code, saved", [
    (kill_in_log, None, 4), (kill_in_save, None, 2), (spoil_the_gradient, 2, 4),
    (press_ctrl_c, 130, 3)])
def test_d2_d3_a_run_that_was_ended_resumes_to_the_same_bits(
        end, code, saved, straight, tmp_path, monkeypatch, capsys):
    flags = ["--max-steps", 6, "--eval-every", 3, "--save-every", 2]
    handlers = [(name, signal.getsignal(name)) for name in (signal.SIGINT, signal.SIGTERM)]
    end(monkeypatch)
    with pytest.raises(SystemExit if code else RuntimeError) as error:
        run(tmp_path / "o", *flags)
    monkeypatch.undo()
    for name, handler in handlers:
        signal.signal(name, handler)
    said = capsys.readouterr()
    if code:
        assert error.value.code == code and "--resume" in said.out + said.err
    state = torch.load(tmp_path / "o/checkpoint/state.pt", weights_only=True)
    assert state["step"] == saved
    assert run(tmp_path / "o", *flags, "--resume") == straight[1]
    assert weights(tmp_path / "o") == weights(straight[0])


def test_a_checkpoint_is_written_every_ten_minutes_unasked(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(train_dpo, "SAVE_SECONDS", 0)
    monkeypatch.setattr(common, "save_checkpoint", lambda out, m, o, step, e: steps.append(step))
    run(tmp_path / "o", "--max-steps", 3, "--eval-fraction", 0)
    assert steps == [1, 2, 3]


def test_the_reference_is_kept_and_a_longer_resume_measures_what_is_missing(tmp_path, measured):
    flags = ["--lr-schedule", "constant", "--eval-samples", 0]
    straight = run(tmp_path / "a", *flags, "--max-steps", 4)
    run(tmp_path / "b", *flags, "--max-steps", 2)
    before = torch.load(tmp_path / "b/checkpoint/state.pt", weights_only=True)["extra"]["reference"]
    assert len(before) == 2 * 16 + 12                        # two steps and what is held out
    measured.clear()
    resumed = run(tmp_path / "b", *flags, "--max-steps", 4, "--resume")
    assert [len(groups) for _, groups in measured] == [16, 16, 12]       # two steps, an evaluation
    after = torch.load(tmp_path / "b/checkpoint/state.pt", weights_only=True)["extra"]["reference"]
    assert len(after) == 4 * 16 + 12 and before.items() <= after.items()
    assert [line for line in resumed if "loss" in line] == [x for x in straight if "loss" in x]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_resume_refuses_other_flags_other_data_and_another_model(tmp_path, capsys):
    data = write(tmp_path / "p.jsonl", rows_of_the_toy(60))
    flags = ["--output-dir", tmp_path / "o", "--dataset", data, "--eval-samples", 0, "--max-steps"]
    main([str(flag) for flag in [*flags, 1]])
    assert "--beta was 0.1, now 0.2" in refused(capsys, *flags, 2, "--resume", "--beta", 0.2)
    write(data, [row | {"answer": "7"} for row in rows_of_the_toy(60)])      # a column is data, too
    assert "the data or the model is not what it was" in refused(capsys, *flags, 2, "--resume")
    write(data, rows_of_the_toy(60))
    main([str(flag) for flag in [*flags, 2, "--resume"]])
    none = ["--output-dir", tmp_path / "none", "--resume", "--limit", 50]
    assert "no checkpoint" in refused(capsys, *none)


def contents(folder):
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_new_run_keeps_an_earlier_one_as_a_whole_and_a_failing_start_touches_nothing(
        tmp_path, capsys):
    out = tmp_path / "run"
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "p", "chosen": 5, "rejected": "x"}])
    run(out, "--max-steps", 1, "--eval-samples", 0)
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    everything = contents(tmp_path)
    for flags, words in {
            ("--dataset", bad): "line 1",
            ("--dataset", TOY / "prompts.jsonl"): "chosen",
            ("--loss", "dppo"): "dppo",
            ("--loss", "distill"): "score_chosen",
            ("--model", tmp_path / "nothing"): "nothing",
            ("--ref-model", tmp_path / "nothing"): "nothing",
            ("--device", "cuda:99"): "--device cuda:99",
            ("--max-length", 4): "no rows are left",
            ("--model", out): "--output-dir",                # it would be renamed away
            ("--resume", "--batch-size", 16, "--seed", 5): "--seed was 0, now 5"}.items():
        assert words in refused(capsys, "--output-dir", out, "--limit", 120, *flags)
        assert contents(tmp_path) == everything, flags
    assert "no run" in refused(capsys, "--output-dir", tmp_path)         # it is somebody's folder

    for number in (1, 2):
        run(out, "--max-steps", 1, "--eval-samples", 0)
        assert f"kept as {out}-{number}" in capsys.readouterr().out
        assert contents(tmp_path / "run-1") == before
    assert not (out / "notes.txt").exists() and (tmp_path / "run-2/model.safetensors").exists()


@pytest.mark.parametrize("flags", [
    ["--beta", "0"], ["--beta", "nan"], ["--label-smoothing", "0.5"], ["--batch-size", "0"],
    ["--learning-rate", "-1"], ["--eval-fraction", "1"], ["--sft-coef", "-1"],
    ["--epoch", "2"]])                                       # no abbreviations
def test_bad_flags_end_in_one_sentence(flags, capsys):
    assert flags[0] in refused(capsys, *flags)


def test_models_that_cannot_be_a_policy_are_refused(tmp_path, capsys):
    flags = ("--model", tmp_path / "m", "--output-dir", tmp_path / "o", "--limit", 50)
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(tmp_path / "m")
    reward = AutoModelForSequenceClassification.from_pretrained(TOY / "model", num_labels=1)
    reward.save_pretrained(tmp_path / "m")                   # tied embeddings: none is missing
    assert "reward model" in refused(capsys, *flags)
    AutoModelForCausalLM.from_pretrained(TOY / "model").save_pretrained(tmp_path / "m")
    (tmp_path / "m/model.safetensors").write_bytes(weights(TOY / "model")[:1000])
    assert "cannot be loaded" in refused(capsys, *flags)


def test_a_copy_of_the_script_writes_to_a_directory_of_its_own(tmp_path):
    copy = tmp_path / "train_mine.py"
    copy.write_text(Path(train_dpo.__file__).read_text())
    spec = importlib.util.spec_from_file_location("train_mine", copy)
    mine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mine)
    assert mine.parse_args([]).output_dir == "runs/mine" and parse_args([]).output_dir == "runs/dpo"


# --- LoRA -----------------------------------------------------------------------------------------

def mixture_of_experts(folder):
    """A tiny Qwen3Moe model with the tokeniser of the toy."""
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=2, max_position_embeddings=64, bos_token_id=1,
        eos_token_id=2)
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "mixture of experts"])
def test_lora_saves_a_plain_checkpoint_equal_to_the_trained_model(kind, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    base = TOY / "model" if kind == "llama" else mixture_of_experts(tmp_path / "moe")
    base = Path(shutil.copytree(base, tmp_path / "base"))
    GenerationConfig(eos_token_id=[2, 5], do_sample=True, top_k=7).save_pretrained(base)
    trained = []

    def save(out, model, *rest, save_model=common.save_model):
        trained.append(model)
        save_model(out, model, *rest)

    monkeypatch.setattr(common, "save_model", save)
    out = tmp_path / "o"
    lines = run(out, "--model", base, "--lora-rank", 4, "--lr", 1e-2, "--max-steps", 3)
    assert lines[0]["eval/loss"] == lines[0]["eval/loss_expected"]                       # b13
    assert lines[0]["eval/kl"] == 0 != lines[-1]["eval/kl"]
    args = parse_args(["--limit", "20"])
    encoder = common.load_encoder(out, args)
    groups, *_ = common.read_groups(args.dataset, "train", ["pair"], args)
    groups = common.tokenise(groups, encoder, 512)

    def logps(model):
        with torch.no_grad():
            return common.completion_logps(model, common.lay_out(model, groups, False))

    start = AutoModelForCausalLM.from_pretrained(base).eval()
    now = logps(trained[0])
    assert (now - logps(start)).abs().max() > 0.1
    assert torch.allclose(logps(AutoModelForCausalLM.from_pretrained(out).eval()), now, atol=1e-4)
    kept = GenerationConfig.from_pretrained(out)
    assert (kept.eos_token_id, kept.top_k) == ([2, 5], 7)    # where its samples end
    beside = peft.PeftModel.from_pretrained(start, out / "adapter")
    assert torch.allclose(logps(beside.get_base_model()), now, atol=1e-4)
    frozen = [n for n, p in trained[0].named_parameters() if not p.requires_grad and "lora" in n]
    learnt = [n for n, p in trained[0].named_parameters() if p.requires_grad and "lora" not in n]
    assert not frozen and not learnt
