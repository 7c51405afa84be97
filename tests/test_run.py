"""How a run begins, what it leaves behind and what it says: run directories, --resume, signals, bad
input, the recipes, and what holds for the repository as a whole."""
import contextlib
import gzip
import importlib.util
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import score  # noqa: E402
import train_dpo  # noqa: E402
import train_grpo  # noqa: E402
import train_rm  # noqa: E402

TOY = ROOT / "tests" / "toy"
SCRIPT = {"rm": train_rm, "dpo": train_dpo, "grpo": train_grpo, "score": score}
TRAINERS = ["rm", "dpo", "grpo"]
SHORT = ["--limit", "12", "--batch-size", "4", "--max-steps", "2"]
SAMPLING = [*SHORT, "--eval-samples", "2"]
SMALL = {"rm": SHORT, "dpo": SAMPLING, "score": ["--limit", "12"],
         "grpo": [*SAMPLING, "--eval-k", "2", "--group-size", "2", "--max-new-tokens", "4"]}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """D8: no test may reach for the network; runs/ is in a folder of its own; signals are reset."""
    reached = []

    def connect(*address):
        reached.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert not reached


def run(name, *flags):
    SCRIPT[name].main([*SMALL[name], *map(str, flags)])


@pytest.fixture
def shell(capsys):
    """shell(script, *flags) → (exit code, stdout, stderr), as whoever typed it sees them."""
    def end(name, *flags):
        capsys.readouterr()
        code = 0
        try:
            common.run(lambda: run(name, *flags))
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return end


def assert_refused(ended, *words):
    """Exit code 2 and one line that says what to mend; argparse puts its usage above it."""
    code, _, err = ended
    lines = [line for line in err.splitlines() if not line.startswith("usage: ")]
    assert code == 2 and len(lines) == 1 and "error: " in lines[0] and len(lines[0]) < 1000, err
    assert all(word in lines[0] for word in words), (err, words)


def read(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def write(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def without_times(line):
    return {k: v for k, v in line.items() if "second" not in k}


def assert_same_bits(a, b):
    """Two run directories that are one run: everything but the clock."""
    for name in ("model.safetensors", "config.json", "completions.jsonl"):
        assert (a / name).exists() == (b / name).exists()
        assert not (a / name).exists() or (a / name).read_bytes() == (b / name).read_bytes()
    lines = [list(map(without_times, read(x / "metrics.jsonl"))) for x in (a, b)]
    assert lines[0] == lines[1]
    states = [torch.load(x / "checkpoint/state.pt", weights_only=True) for x in (a, b)]
    for part in ("weights", "moments"):
        parts = [state[part].get("state", state[part]) for state in states]
        torch.testing.assert_close(*parts, rtol=0, atol=0)
    assert states[0]["step"] == states[1]["step"]


def contents(folder):
    """{name: bytes} of every file below a folder."""
    files = sorted(f for f in Path(folder).rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


# --- the run directory ----------------------------------------------------------------------------

KEYS = {
    "rm": {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"},
    "grpo": {"loss", "reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "clip_ratio",
             "completions/mean_length", "completions/clipped_ratio", "rewards/right/mean"}}
KEYS["dpo"] = KEYS["rm"] | {"logps/chosen", "logps/rejected"}
SAID = {
    "rm": [r"step 0: eval loss [\d.]+ \(0.6931 if all scores were equal\), accuracy [\d.]+ ± \d",
           r"length alone gets [\d.]+ %", r"scores of the training completions: \S+ ± \S+"],
    "dpo": [r"step 0: eval loss 0.6931 \(expected 0.6931\), accuracy 50.0 ± [\d.]+ % of 5 pairs, "
            r"margin 0.000, .*chosen fell in 0 %, KL 0.00 ± 0.00, correct samples [\d.]+ ± [\d.]+",
            r"  '<s><user>\d+\+\d+<bot>' ▸ '"],
    "grpo": [r"step 0: eval reward [\d.]+, pass@1 [\d.]+ ± [\d.]+, pass@2 .* of 2 prompts",
             r"  rewards: right; trained on: the first 1", r"'\d+\+\d+' ▸ reward: '"]}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_says_what_it_does_and_leaves_a_model_flags_and_metrics(name, shell):
    flags = ["--limit", 50, "--batch-size", 1, "--max-steps", 45, "--eval-every", 30, "--seed", 3]
    code, out, err = shell(name, *flags)
    folder = Path("runs") / name
    assert code == 0 and not err
    assert {"model.safetensors", "config.json", "tokenizer.json", "args.json", "metrics.jsonl",
            "checkpoint"} <= {f.name for f in folder.iterdir()}
    assert not list(folder.rglob("*.writing"))

    args = json.loads((folder / "args.json").read_text())
    parsed = SCRIPT[name].parse_args([*SMALL[name], *map(str, flags)])
    assert args.keys() == {*vars(parsed), "fingerprint"} and args["seed"] == 3
    lines = read(folder / "metrics.jsonl")
    steps = [line for line in lines if "grad_norm" in line]
    evals = [line for line in lines if line not in steps]
    assert [line["step"] for line in steps] == list(range(1, 46))
    assert [line["step"] for line in evals] == [0, 30, 45]
    for line in steps:
        assert KEYS[name] | {"learning_rate", "tokens_per_second"} <= line.keys()
    for line in evals:
        assert all(key == "step" or key.startswith("eval/") for key in line)

    # What was read, one example, what is trained; outside a terminal 15 of the 45 steps.
    columns = "read: prompt, chosen, rejected, answer; NOT READ: nothing"
    if name == "grpo":
        columns = "read: prompt, answer; for the rewards: nothing"
    assert f"({columns}), kept 50, truncated 0, dropped: none\n  ▸ '<s><user>" in out
    assert "45 groups, 5 held out; 45 steps" in out and f"saved in {folder}: model" in out
    for words in SAID[name]:
        assert re.search(words, out), words
    assert len(re.findall(r"^step \d+ of 45: ", out, re.MULTILINE)) == 15
    assert out.count("\n") < 45                              # no line a step


def test_columns_that_are_not_read_and_rows_that_are_dropped_are_named(tmp_path, shell):
    row = {"prompt": "1+1", "chosen": "2", "rejected": "3", "source": "x", "margin": 1}
    rows = [row, row | {"rejected": "2"}, row | {"chosen": ""}, row | {"chosen": "2" * 9000}]
    data = write(tmp_path / "d.jsonl", *rows, *[row | {"prompt": f"{i}"} for i in range(9)])
    out = shell("dpo", "--dataset", data, "--limit", 0)[1]
    assert "NOT READ: source" in out and "kept 10" in out and "--chat makes prompts" in out
    for reason in ("with identical completions", "with an empty completion", "over --max-length"):
        assert f"1 {reason}" in out
    assert "9 % are too long" in out


def test_d7_metrics_are_json(tmp_path, shell):
    shell("rm", "--limit", 2, "--eval-fraction", 0.5)
    for line in Path("runs/rm/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_an_earlier_run_is_renamed_as_a_whole_and_a_failing_start_displaces_nothing(shell):
    kept = []
    for seed in range(3):
        out = shell("dpo", "--seed", seed)[1]
        assert seed == 0 or f"an earlier run is kept as runs/dpo-{seed}" in out
        kept.append(contents("runs/dpo"))
    assert contents("runs/dpo-1") == kept[0] and contents("runs/dpo-2") == kept[1]
    assert len(list(Path("runs").iterdir())) == 3


def test_curves_for_tensorboard(shell):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert shell("rm", "--tensorboard")[0] == 0
    curves = EventAccumulator("runs/rm").Reload()
    steps = [line for line in read("runs/rm/metrics.jsonl") if "loss" in line]
    points = [(point.step, point.value) for point in curves.Scalars("loss")]
    assert points == [(line["step"], pytest.approx(line["loss"])) for line in steps]
    assert len(curves.Scalars("eval/loss")) == 2


# --- work is not lost -----------------------------------------------------------------------------

LONGER = ["--max-steps", 4, "--save-every", 1, "--eval-every", 2]
RESUMED = [("rm", []), ("dpo", ["--loss", "bco", "--eval-samples", 0]),
           ("dpo", ["--loss", "kto", "--eval-fraction", 0]),
           ("grpo", ["--minibatches", 2, "--updates-per-batch", 2])]


@contextlib.contextmanager
def before_each_file_operation(action):
    """action(number) comes before everything that changes a file of a run."""
    count = itertools.count(1)
    with pytest.MonkeyPatch.context() as patch:
        def watch(owner, name, real):
            def operation(*args, **options):
                action(next(count))
                return real(*args, **options)
            patch.setattr(owner, name, operation, raising=False)

        for owner, name in ((os, "replace"), (os, "truncate"), (torch, "save"), (Path, "mkdir")):
            watch(owner, name, getattr(owner, name))
        watch(common, "open", open)                          # metrics.jsonl
        yield


@pytest.mark.parametrize("name, own", RESUMED)
def test_d2_after_a_kill_at_any_moment_resume_ends_in_the_same_bits(name, own, tmp_path):
    """What a kill leaves is a copy of the directory, with the line torn that was being written."""
    flags = [*own, *LONGER, "--max-steps", 3]
    out = tmp_path / "out"

    def leave(number):
        if (out / "checkpoint/state.pt").exists():
            shutil.copytree(out, tmp_path / f"killed-{number}", copy_function=shutil.copyfile)
            with open(tmp_path / f"killed-{number}/metrics.jsonl", "a") as file:
                file.write('{"step": 3, "lo')

    with before_each_file_operation(leave):
        run(name, *flags, "--output-dir", out)
    killed = sorted(tmp_path.glob("killed-*"))
    assert len(killed) > 10
    for folder in killed:
        run(name, *flags, "--resume", "--output-dir", folder)
        assert_same_bits(out, folder)


def test_d3_a_disk_that_is_full_at_any_moment_leaves_whole_files(tmp_path, shell):
    out = tmp_path / "out"
    for failing in range(1, 99):
        def full(number):
            if number == failing:
                raise OSError(28, "No space left on device")

        shutil.rmtree(out, ignore_errors=True)
        with before_each_file_operation(full):
            ended = shell("rm", "--save-every", 1, "--output-dir", out)
        if ended[0] == 0:
            break
        assert_refused(ended, "No space left")
        for file in out.glob("checkpoint/state.pt"):
            assert torch.load(file, weights_only=True)["step"] in (1, 2)
        for file in out.glob("metrics.jsonl"):
            read(file)
    assert failing > 10


def forked(name, flags, during):
    """A script in a child of this process (the imports are done), while during(its pid) runs."""
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            run(name, *flags)
        finally:
            os._exit(0)
    during(pid)
    return os.waitpid(pid, 0)[1]


def test_d2_kill_9_twice_and_resume_ends_in_the_same_bits(tmp_path):
    flags = [*LONGER, "--max-steps", 30, "--output-dir"]
    out = tmp_path / "killed"
    moments = random.Random(0)

    def kill(after):
        def during(pid):
            file = out / "metrics.jsonl"
            while not file.exists() or file.read_text().count('"loss"') < after:
                time.sleep(0.002)
            time.sleep(0.03 * moments.random())
            os.kill(pid, signal.SIGKILL)
        return during

    assert forked("rm", [*flags, out], kill(3)) == signal.SIGKILL
    assert forked("rm", [*flags, out, "--resume"], kill(12)) == signal.SIGKILL
    run("rm", *flags, out, "--resume")
    run("rm", *flags, tmp_path / "straight")
    assert_same_bits(tmp_path / "straight", out)


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_says_so_and_ends_with_130(name, number, monkeypatch, shell):
    def kill_in_step_2(bar, step, *rest):
        if step == 2:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(common, "end_step", kill_in_step_2)
        code, out, err = shell(name, "--max-steps", 4)
    assert code == 130 and not err
    assert "stopped after step 2 of 4; add --resume to go on" in out
    run(name, "--max-steps", 4, "--resume")
    run(name, "--max-steps", 4, "--output-dir", "straight")
    assert_same_bits(Path("straight"), Path("runs") / name)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_checkpoint_is_written_every_ten_minutes(name, monkeypatch):
    assert SCRIPT[name].SAVE_SECONDS == 600
    saved = []
    monkeypatch.setattr(SCRIPT[name], "SAVE_SECONDS", -1)    # after every step
    monkeypatch.setattr(common, "save_checkpoint", lambda *args: saved.append(args[3]))
    run(name, "--max-steps", 3)
    assert saved == [1, 2, 3]


@pytest.mark.parametrize("name", TRAINERS)
def test_before_a_gradient_that_is_not_finite_the_state_is_saved(name, monkeypatch, shell):
    real = common.clip_gradient
    norms = iter([0, 0, float("nan")])
    with monkeypatch.context() as patch:
        patch.setattr(common, "clip_gradient", lambda *args: real(*args) + next(norms))
        ended = shell(name, "--max-steps", 4)
    assert_refused(ended, "step 3: the gradient is not finite", "saved", "--resume")
    state = torch.load(f"runs/{name}/checkpoint/state.pt")
    assert state["step"] == 2 and all(w.isfinite().all() for w in state["weights"].values())
    assert not Path(f"runs/{name}/model.safetensors").exists()
    run(name, "--max-steps", 4, "--resume", "--lr", 1e-5)


def test_a_reward_that_fails_later_loses_no_step(tmp_path, shell):
    code = "calls = []\ndef f(completions, **_):\n    calls.append(1)\n    1 / (4 - len(calls))\n"
    (tmp_path / "later.py").write_text(code + "    return [1.0] * len(completions)\n")
    ended = shell("grpo", "--reward", "later.py:f", "--max-steps", 4, "--eval-every", 9)
    assert_refused(ended, "reward f: ZeroDivisionError", "line 4", "state after step 2 is saved")
    assert torch.load("runs/grpo/checkpoint/state.pt")["step"] == 2


# --- what is refused: each in one line, with nothing changed --------------------------------------

ROW = {"prompt": "1+1", "chosen": "2", "rejected": "3"}
LIST = {"prompt": "1+1", "completions": ["2", "3"], "scores": [1, 0]}
PKU = {"prompt": "p", "response_0": "a", "response_1": "b"}
TEXTS = {                        # a good row, and then one that is none
    "broken": '{"prompt": ', "number": "5", "list": "[1, 2]", "deep": '{"a": ' + "[" * 10 ** 5}
ROWS = {
    "missing": {"prompt": "x", "chosen": "y"}, "null": ROW | {"prompt": None},
    "digit": ROW | {"prompt": 5}, "nothing": ROW | {"prompt": []},
    "silent": ROW | {"prompt": [{"role": "user"}, {"content": "x"}]},
    "image": ROW | {"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]},
    "turns": ROW | {"chosen": [{"role": "assistant", "content": "a"}] * 2},
    "speaker": ROW | {"prompt": [{"role": "system", "content": "x"}]},
    "margin": ROW | {"margin": "much"}, "p": ROW | {"p_chosen": 1.5},
    "nan": ROW | {"p_chosen": float("nan")}}
FIRST = {                        # files of one row
    "pku": PKU | {"better_response_id": 2}, "unlabelled": PKU | {"better_response_id": None},
    "scores": LIST | {"scores": [1]}, "words": LIST | {"scores": [1, "good"]},
    "label": {"prompt": "a", "completion": "b", "label": "maybe"}, "alike": ROW | {"rejected": "2"},
    "empty": ROW | {"chosen": " "}, "answers": {"prompt": "1+1", "answer": "2"},
    "bare": {"chosen": "a", "rejected": "b"}, "long": ROW | {"chosen": "2" * 9999}}
REWARDS = {
    "syntax": "def f(:", "raising": "raise ValueError('today')", "missing": "g = 5",
    "exits": "import sys\ndef f(**_): sys.exit(0)", "short": "def f(**_): return [1]",
    "words": "def f(completions, **_): return ['good'] * len(completions)",
    "infinite": "def f(completions, **_): return [float('inf')] * len(completions)",
    "none": "def f(completions, **_): return [None] * len(completions)",
    "none_at_all": "def f(**_): pass", "signature": "def f(solution, **_): return []"}
NORM = "model.norm.weight"


def copy_of(model, folder, **files):
    """A model directory with some files rewritten; None: without it."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("checkpoint", "*.jsonl"))
    for name, content in files.items():
        file = folder / name.replace("__", ".")
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_text(content)
    return folder


class Trap:
    """What a pickle runs when it is read."""

    def __reduce__(self):
        return os.system, ("touch sprung",)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with everything that REFUSED names; run and rm are a trained policy and reward."""
    x = tmp_path_factory.mktemp("world")
    for name, text in TEXTS.items():
        (x / f"{name}.jsonl").write_text(f"{json.dumps(ROW)}\n{text}\n")
    for name, row in ROWS.items():
        write(x / f"{name}.jsonl", ROW, row)
    for name, row in FIRST.items():
        write(x / f"{name}.jsonl", row)
    for name, code in REWARDS.items():
        (x / f"{name}.py").write_text(code)
    (x / "void.jsonl").write_text("")
    (x / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    (x / "torn.jsonl.gz").write_bytes(gzip.compress(b"12345" * 99)[:20])
    (x / "quote.csv").write_text('prompt,chosen,rejected\n1,"2,3\n')
    (x / "syntax.jinja").write_text("{% if %}")
    (x / "folder").mkdir()
    (x / "folder/notes.txt").write_text("mine")

    config = json.loads((TOY / "model/config.json").read_text())
    mine = config | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C"}}
    words = (TOY / "model/tokenizer.json").read_text().replace('"7"', '"seven"')
    copy_of(TOY / "model", x / "m-untyped", config__json="{}")
    copy_of(TOY / "model", x / "m-torn", model__safetensors="torn")
    copy_of(TOY / "model", x / "m-pickle", model__safetensors=None)
    torch.save({"a": Trap()}, x / "m-pickle/pytorch_model.bin")
    copy_of(TOY / "model", x / "m-code", config__json=json.dumps(mine), mine__py="0 / 0")
    copy_of(TOY / "model", x / "m-words", tokenizer__json=words)
    weights = load_file(TOY / "model/model.safetensors")
    weights.pop(NORM)
    save_file(weights, copy_of(TOY / "model", x / "m-lacking") / "model.safetensors")

    run("rm", "--output-dir", x / "rm")
    run("dpo", "--output-dir", x / "run")
    for name in ("torn", "pickled", "argless"):
        shutil.copytree(x / "run", x / f"run-{name}")
    (x / "run-torn/checkpoint/state.pt").write_bytes(b"torn")
    torch.save({"step": Trap()}, x / "run-pickled/checkpoint/state.pt")
    (x / "run-argless/args.json").unlink()
    return x


def data(script, **files):
    return [(f"{script} --dataset X/{name.replace('__', '.')}", words)
            for name, words in files.items()]


REFUSED = [                      # a command, X being the world, and words of the line
    # Data.
    ("dpo --dataset X/missing.json", "no such file"),
    *data("dpo", broken__jsonl="line 2: not a JSON object", number__jsonl="line 2", deep__jsonl="line 2",
          list__jsonl="line 2", void__jsonl="no rows are left", latin__jsonl="utf-8",
          torn__jsonl__gz="torn.jsonl.gz", quote__csv="quote.csv",
          missing__jsonl="line 2|'rejected'",
          null__jsonl="line 2|'prompt'", digit__jsonl="line 2|'prompt'",
          nothing__jsonl="line 2|'prompt'", silent__jsonl="line 2", image__jsonl="line 2|text",
          turns__jsonl="line 2|one assistant message", speaker__jsonl="line 2|only user",
          margin__jsonl="line 2|margin", p__jsonl="line 2|p_chosen", nan__jsonl="line 2|p_chosen",
          pku__jsonl="line 1|response_2", unlabelled__jsonl="better_response_id",
          scores__jsonl="same length", words__jsonl="scores", label__jsonl="label|needed are",
          alike__jsonl="no rows are left", empty__jsonl="no rows are left",
          bare__jsonl="no rows are left", long__jsonl="no rows are left",
          answers__jsonl="prompt, answer|chosen + rejected"),
    ("dpo --loss kto --dataset X/label.jsonl", "line 1|maybe"),
    ("dpo --loss soft", "line 1|score_chosen"), ("rm --loss pointwise", "label|needed are"),
    ("dpo --columns prompt=none", "none"), ("dpo --columns x", "column"),
    ("dpo --chat-template X/syntax.jinja", "TemplateSyntaxError"),
    ("dpo --chat-template X/no.jinja", "no.jinja"), ("rm --max-length 3", "no rows are left"),
    # Models.
    ("dpo --model X/m-missing", "m-missing|no such"), ("dpo --model X/folder", "folder"),
    ("dpo --model X/m-untyped", "m-untyped"), ("dpo --model X/m-torn", "m-torn|cannot be loaded"),
    ("dpo --model X/m-pickle", "m-pickle|cannot be loaded"), ("dpo --model X/m-code", "m-code"),
    ("dpo --model X/m-lacking", f"lacks {NORM}"), ("dpo --model X/rm", "is a reward model"),
    ("dpo --ref-model X/m-words", "tokeniser differs"), ("grpo --ref-model X/rm", "reward model"),
    ("grpo --reward X/m-words", "is no reward model"), ("score --reward X/run", "no reward model"),
    ("score --policy X/rm --reward X/rm", "is a reward model"), ("score", "no reward"),
    # Flags.
    ("dpo --loss dppo", "'dppo'|'ipo'"), ("rm --loss dpo", "'dpo'"), ("grpo --loss ppo", "'ppo'"),
    ("dpo --colour red", "--colour"), ("dpo --epoch 2", "--epoch"), ("dpo --beta nan", "--beta"),
    ("dpo --lr -1", "lr"), ("rm --batch-size 0", "--batch-size"), ("rm --limit x", "--limit"),
    ("dpo --loss ipo --label-smoothing 0.1", "ipo|--label-smoothing"), ("rm --seed -1", "--seed"),
    ("rm --loss pointwise --center-coef 1", "--center-coef"), ("dpo --device cuda:99", "cuda:99"),
    ("dpo --dtype float16", "--dtype"), ("grpo --group-size 1", "--group-size"),
    ("grpo --beta 0 --kl k3", "--beta above 0"), ("grpo --reward-weights 1 2", "--reward-weights"),
    ("score --samples 4", "--policy"), ("score --implicit X/run", "--ref-model"),
    ("score --reward X/rm --plot x.txt", ".svg"), ("score --output no/x.jsonl", "no/x.jsonl"),
    ("score --dataset X/broken.jsonl --output X/broken.jsonl", "broken.jsonl"),
    # Rewards.
    *[(f"grpo --reward X/{name}.py:f", words) for name, words in {
        "syntax": "syntax.py|line 1", "raising": "today", "missing": "no function 'f'",
        "exits": "SystemExit|line 2", "short": "1 values for 2", "words": "'good'",
        "infinite": "inf", "none": "not one of", "none_at_all": "NoneType",
        "signature": "solution"}.items()],
    ("grpo --reward no.py:f", "no.py"), ("score --reward X/short.py:f", "values for"),
    # Run directories.
    ("dpo --output-dir X/folder", "not empty, and no run"), ("dpo --output-dir X/void.jsonl", ""),
    ("dpo --model X/run --output-dir X/run", "run is in --output-dir"),
    ("grpo --ref-model X/run --output-dir X", "not empty|no run"),
    ("grpo --ref-model X/run --output-dir X/run", "is in --output-dir"),
    ("dpo --resume --output-dir X/none", "holds no checkpoint"),
    ("dpo --resume --output-dir X/run-torn", "no checkpoint that can be read"),
    ("dpo --resume --output-dir X/run-pickled", "no checkpoint that can be read"),
    ("dpo --resume --output-dir X/run-argless", "args.json"),
    ("dpo --resume --beta 0.2", "--beta was 0.1, now 0.2"),
    ("dpo --resume --seed 1", "--seed was 0, now 1"),
    ("rm --resume", "--loss was dpo, now bradley-terry"),
    ("dpo --resume --limit 11", "--limit was 12, now 11"),
]


@pytest.mark.parametrize("command, words", REFUSED, ids=[command for command, _ in REFUSED])
def test_refused_in_one_line_with_nothing_changed(command, words, world, tmp_path, shell):
    """Also an earlier run, which --output-dir names, is neither changed nor renamed."""
    def seen():
        return {f: f.stat().st_mtime_ns for f in world.rglob("*") if "__pycache__" not in str(f)}

    name, *flags = command.replace("X/", f"{world}/").replace(" X", f" {world}").split()
    if name != "score" and "--output-dir" not in flags:
        flags += ["--output-dir", world / "run"]
    before = seen()
    assert_refused(shell(name, *flags), *words.split("|"))
    assert seen() == before and not list(tmp_path.iterdir())


def test_resume_with_other_data_or_weights_says_so(world, tmp_path, shell):
    data = tmp_path / "data.jsonl"
    shutil.copy(TOY / "pairs.jsonl", data)
    model = copy_of(TOY / "model", tmp_path / "model")
    flags = ["--dataset", data, "--model", model]
    run("rm", *flags)
    assert shell("rm", *flags, "--resume")[0] == 0
    rows = read(data)
    write(data, rows[0] | {"margin": 1}, *rows[1:])
    assert_refused(shell("rm", *flags, "--resume"), "the data or the model is not what it was")
    write(data, *rows)
    assert shell("rm", *flags, "--resume")[0] == 0
    weights = load_file(model / "model.safetensors")
    weights[NORM][0] += 0.01
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert_refused(shell("rm", *flags, "--resume"), "the data or the model is not what it was")


@pytest.mark.parametrize("raised", [
    KeyboardInterrupt(), MemoryError("512 GiB"), OSError(28, "full"),
    torch.OutOfMemoryError("CUDA out of memory.\nTried to")])
def test_what_the_outside_world_raises_ends_in_one_line(raised, monkeypatch, shell):
    def load_data(*_):
        raise raised

    monkeypatch.setattr(common, "load_data", load_data)
    ended = shell("dpo")
    assert_refused(ended)


# --- the repository -------------------------------------------------------------------------------

FILES = {name: (ROOT / name).read_text() for name in ("common.py", "score.py")}
FILES |= {f.name: f.read_text() for f in sorted(ROOT.glob("train_*.py"))}    # forks too
OURS = ["train_rm.py", "train_dpo.py", "train_grpo.py"]
PAGES = [page for page in (ROOT / "tests/RESULTS.md", ROOT / "README.md") if page.exists()]


def blocks(name):
    text = FILES[name]
    return dict(re.findall(r"# --- shared: (.*?) ---\n(.*?)# --- end shared ---", text, re.DOTALL))


def test_shared_blocks_are_the_same_text():
    """By design "data" differs (the last token of a reward model, room for samples), and GRPO, a
    step of which is several updates, has the end of "update" alone, with `done` for `step + 1`."""
    rm, dpo, grpo = map(blocks, OURS)
    everywhere = {"flags", "schedule", "model and optimizer", "before the loop"}
    assert rm.keys() == dpo.keys() == everywhere | {"data", "update"}
    assert grpo.keys() == everywhere | {"data", "save and evaluate"}
    for name in everywhere | {"update"}:
        assert rm[name] == dpo[name] == grpo.get(name, rm[name]), name
    assert rm["data"].replace(", to_last_token=True", "") == dpo["data"]
    end = rm["update"][rm["update"].index("        last = "):]
    end = re.sub(r"(?<= )\(step \+ 1\)|step \+ 1", "done", end)
    assert grpo["save and evaluate"] == end
    for fork in FILES.keys() - {*OURS, "common.py", "score.py"}:
        for name, text in blocks(fork).items():
            assert text in [blocks(ours).get(name) for ours in OURS], (fork, name)


@pytest.mark.parametrize("name", [name for name in FILES if name != "common.py"])
def test_every_flag_is_read(name):
    text = FILES[name] + FILES["common.py"]
    for flag in re.findall(r'add_argument\("--([a-z-]+)"', FILES[name]):
        assert re.search(rf"\bargs\.{flag.replace('-', '_')}\b", text), flag


@pytest.mark.parametrize("name", ["train_rm.py", "train_dpo.py", "train_grpo.py", "score.py"])
def test_a_copy_under_another_name_runs_and_writes_to_its_own_directory(name, tmp_path):
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    kind = "score" if name == "score.py" else name[6:-3]
    copy = shutil.copy(ROOT / name, tmp_path / f"train_my_{kind}.py")
    spec = importlib.util.spec_from_file_location("copied", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reward = ["--reward", f"{TOY}/reward.py:right", "--output", "scored.jsonl"]
    module.main(SMALL[kind] + (reward if kind == "score" else []))
    made = "scored.jsonl" if kind == "score" else f"runs/my_{kind}/model.safetensors"
    assert (tmp_path / made).exists()


@pytest.fixture
def tracked():
    """Files that belong to the repository: nothing that git ignores."""
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    return [ROOT / f for f in listed.stdout.split("\0") if f and (ROOT / f).is_file()]


def test_layout(tracked):
    """Nothing else at the top level but dot-files (and what runs leave behind)."""
    top = {f.relative_to(ROOT).parts[0] for f in tracked}
    allowed = {*FILES, "README.md", "requirements.txt", "tests", "shared"}
    assert {name for name in top if not name.startswith(".")} <= allowed
    assert {*OURS, "README.md", "requirements.txt", "tests"} <= top


def test_no_file_names_a_path_of_a_machine(tracked):
    for file in tracked:
        text = file.read_bytes().decode(errors="ignore")
        found = re.findall(r"""(?<![\w.])/(?:work|farm|home|root|tmp|Users)/[\w./-]*""", text)
        assert not found or file.suffix == ".safetensors", (file, found)


TORCHRUN = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--standalone",
            "--shutdown-timeout", "--help"}
MADE = {"metrics.jsonl", "completions.jsonl", "args.json", "best.jsonl", "train_mine.py",
        "test_mine.py"}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_pages_name_only_flags_and_files_that_exist(page):
    text = page.read_text()
    known = set(TORCHRUN)
    for file in [*FILES, *(f"tests/{f.name}" for f in (ROOT / "tests").glob("*.py")),
                 "tests/toy/make_toy.py"]:
        known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / file).read_text()))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    for file in re.findall(r"`((?:tests/)?[a-z_/]+\.(?:py|md|txt|jsonl))`", text):
        places = (ROOT / file, ROOT / "tests" / file, TOY / file)
        assert any(place.exists() for place in places) or file in MADE, file
    assert "@@" not in text                                  # a number that is still to come


# --- the recipes ----------------------------------------------------------------------------------

def recipes():
    """{title: commands} of the section that is called so: every ```sh block of it is one recipe."""
    for page in PAGES:
        found = re.search(r"^(#+) Recipes.*?\n(.*?)(?=^#{1,2} |\Z)", page.read_text(),
                          re.DOTALL | re.MULTILINE)
        if found:
            texts = re.findall(r"(.*?)```sh\n(.*?)```", found[2], re.DOTALL)
            titles = [re.findall(r"\*\*(.+?)\*\*", before) for before, _ in texts]
            return {(title or [f"{i}"])[-1]: commands(body)
                    for i, (title, (_, body)) in enumerate(zip(titles, texts))}
    return {}


def commands(text):
    """The commands of a recipe, its loop `for i in …; do … done` rolled out."""
    text = text.replace("\\\n", " ")

    def roll_out(loop):
        return "".join(loop[2].replace("$((i-1))", str(int(i) - 1)).replace("$i", i)
                       for i in loop[1].split())

    text = re.sub(r"for i in ([\d ]+); do\n(.*?)done\n", roll_out, text, flags=re.DOTALL)
    return [line.strip() for line in text.splitlines() if line.strip()]


RECIPES = recipes()


def test_there_are_eight_recipes():
    assert len(RECIPES) == 8


@pytest.mark.parametrize("title", RECIPES)
def test_recipe(title, tmp_path):
    """Its commands one after the other, shortened; each reads what the one before has written."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    for command in RECIPES[title]:
        program, *words = shlex.split(command, comments=True)
        if program in ("cp", "mkdir"):
            subprocess.run([program, *words], check=True)
            continue
        name = words[0].removeprefix("train_").removesuffix(".py")
        if "--confidence" in words:                          # two steps make no reward model sure
            words[words.index("--confidence") + 1] = "0.5"
        SCRIPT[name].main([*words[1:], *SMALL[name]])
    assert list(tmp_path.glob("runs/*/model.safetensors"))
