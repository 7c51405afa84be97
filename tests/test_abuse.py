"""What a hostile world does to the scripts: every row of the table ends with the exit code that is promised, one line on
stderr that says what to mend, and no file changed but those that are named."""
import contextlib
import fcntl
import gzip
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForSequenceClassification, BertConfig, BertLMHeadModel, MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration)

import common  # noqa: E402
import score  # noqa: E402
import train_dpo  # noqa: E402
import train_grpo  # noqa: E402
import train_rm  # noqa: E402

TOY = ROOT / "tests" / "toy"
MAIN = {"dpo": train_dpo.main, "rm": train_rm.main, "grpo": train_grpo.main, "score": score.main}
SHORT = ["--limit", "20", "--batch-size", "4", "--max-steps", "1"]
SMALL = {"dpo": [*SHORT, "--eval-samples", "2"], "rm": SHORT, "score": ["--limit", "20"],
         "grpo": [*SHORT, "--eval-samples", "2", "--group-size", "2", "--max-new-tokens", "4"]}


# --- the world --------------------------------------------------------------------------------------------------------

def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


ROW = {"prompt": "1+1", "chosen": "2", "rejected": "3"}
LIST = {"prompt": "1+1", "completions": ["2", "3"], "scores": [1, 0]}
PKU = {"prompt": "p", "response_0": "a", "response_1": "b"}
USER, BOT = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}
TALK = {"chosen": [USER, BOT], "rejected": [USER, BOT | {"content": "3"}]}


def with_row(row, **changes):
    """Eleven good rows and a bad one in line 12."""
    good = [row | {"prompt": f"{i}+{i}"} for i in range(11)]
    return lines(*good, row | changes)


PAIRS = with_row(ROW)
TOY_TEMPLATE = (TOY / "model/chat_template.jinja").read_text()
DATA = {
    "good.jsonl": PAIRS, "empty.jsonl": "", "blank.jsonl": "\n \n", "broken.jsonl": PAIRS + '{"prompt": ', "number.jsonl": PAIRS + "5\n",
    "text.jsonl": '"prompt"\n', "list.jsonl": PAIRS + "[1, 2]\n", "deep.jsonl": '{"prompt": ' + "[" * 100_000 + "\n", "digits.jsonl": '{"prompt": ' + "9" * 5000 + "}\n",
    "twice.jsonl": PAIRS + '{"prompt": "1+1", "chosen": "2", "chosen": "4", "rejected": "3"}\n',
    "utf16.jsonl": PAIRS.encode("utf-16"), "latin.jsonl": b'{"prompt": "caf\xe9"}\n', "zipped.jsonl": None, "gzipped.jsonl": gzip.compress(PAIRS.encode()),
    "no.jsonl.gz": PAIRS, "torn.jsonl.gz": gzip.compress(PAIRS.encode() * 99)[:200], "text.parquet": PAIRS, "rows.xml": "<a/>", "rows": PAIRS,
    "header.csv": "prompt,chosen,rejected\n", "short.csv": "prompt,chosen,rejected\n1,2\n", "quote.csv": 'prompt,chosen,rejected\n1,"2,3\n',
    "same.csv": "prompt,chosen,chosen\n1,2,3\n", "printed.csv": "prompt,chosen,rejected\n\"[{'role': 'user', 'content': '1+1'}]\",2,3\n",
    "prompts.jsonl": lines({"prompt": "1+1"}), "surrogate.jsonl": PAIRS + '{"prompt": "\\ud83d", "chosen": "a", "rejected": "b"}\n',
    "role.jsonl": lines({"prompt": [{"role": "\ud83d", "content": "x"}], "chosen": "a", "rejected": "b"}),
    "norole.jsonl": lines({"prompt": [{"role": None, "content": "x"}], "chosen": "a", "rejected": "b"}),
    "tool.jsonl": lines({"prompt": [USER], "chosen": [BOT | {"tool_calls": ["x"]}], "rejected": [BOT]}),
    "speaker.jsonl": lines({"prompt": [{"role": "system", "content": "x"}, USER], "chosen": [BOT], "rejected": [BOT | {"content": "3"}]}),
    "twoturns.jsonl": lines({"prompt": [USER], "chosen": [BOT, USER], "rejected": [BOT]}),
    "promptnumber.jsonl": with_row(ROW, prompt=5), "promptnull.jsonl": with_row(ROW, prompt=None), "nomessages.jsonl": with_row(ROW, prompt=[]),
    "nocontent.jsonl": with_row(ROW, prompt=[{"role": "user"}]), "image.jsonl": with_row(ROW, chosen=[{"role": "assistant", "content": [{"type": "image"}]}]),
    "missing.jsonl": PAIRS + lines({"prompt": "x", "chosen": "y"}), "mixed.jsonl": lines({"chosen": "a", "rejected": [BOT]}),
    "alike.jsonl": lines(ROW | {"rejected": "2"}), "unknown.jsonl": lines(ROW | {"chosen": "中文", "rejected": "日本"}), "silent.jsonl": lines(ROW | {"chosen": " "}),
    "mark.jsonl": lines({"prompt": [USER | {"content": "\ufdd0"}], "chosen": [BOT], "rejected": [BOT | {"content": "3"}]}),
    "margin.jsonl": with_row(ROW, margin=-1), "margintext.jsonl": with_row(ROW, margin="much"), "pchosen.jsonl": with_row(ROW, p_chosen=1.5),
    "pchosennan.jsonl": with_row(ROW, p_chosen=float("nan")), "pchosenlist.jsonl": with_row(ROW, p_chosen=[0.5]), "pku.jsonl": lines(PKU | {"better_response_id": 2}),
    "pkuempty.jsonl": lines(PKU | {"better_response_id": None}), "scores.jsonl": with_row(LIST, scores=[1]), "scoretext.jsonl": with_row(LIST, scores=[1, "good"]),
    "scoreinf.jsonl": with_row(LIST, scores=[1, float("inf")]), "against.jsonl": with_row(LIST, ranks=[2, 1]), "ranks.jsonl": with_row(LIST, ranks=[1, 2, 3]),
    "label.jsonl": lines({"prompt": "a", "completion": "b", "label": "maybe"}), "dialogue.jsonl": lines(TALK | {"prompt": "something else"}),
    "single.jsonl": lines({"chosen": [BOT], "rejected": [BOT]}), "nomark.jsonl": lines({"chosen": "a", "rejected": "b"}),
    "long.jsonl": lines(ROW | {"chosen": "2" * 600}), "answers.jsonl": lines({"prompt": "1+1", "answer": "2"}),
    "responses.jsonl": lines({"prompt": "1+1", "response": "2"}), "otherprompt.jsonl": lines({"prompt": "2+2", "response": "2"}),
    "empty.jinja": " \n", "syntax.jinja": "{% if %}", "noprompt.jinja": "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}",
    "noanswer.jinja": "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "binary.jinja": b"\xff\xfe\x00",
    "undefined.jinja": "{{ nothing.at.all }}", "moves.jinja": "{{ messages | length }}" + "{% for m in messages %}{{ m.content }}{% endfor %}",
    "nosystem.jinja": TOY_TEMPLATE.replace("{{ raise_exception", "{#").replace("+ m['role']) }}", "#}"),
}
REWARDS = {
    "syntax": "def right(:\n", "importing": "import no_such_module\n", "raising": "raise ValueError('not today')\n", "leaving": "import sys\nsys.exit(0)\n",
    "tab": "def right(completions, **_):\n\treturn [\n", "number": "right = 5\n", "bytes": b"\xff\xfe", "none": "def right(completions, **_):\n    return None\n",
    "short": "def right(completions, **_):\n    return [1]\n", "infinite": "def right(completions, **_):\n    return [float('inf')] * len(completions)\n",
    "nan": "def right(completions, **_):\n    return [float('nan')] * len(completions)\n", "words": "def right(completions, **_):\n    return ['good'] * len(completions)\n",
    "dict": "def right(completions, **_):\n    return {}\n", "generator": "def right(completions, **_):\n    yield 1\n", "missing": "def right(completions, solution):\n    return [1]\n",
    "nobody": "def right():\n    return [1]\n", "exits": "import sys\ndef right(completions, **_):\n    sys.exit(0)\n", "fails": "def right(completions, **_):\n\n    return [1 / 0]\n",
    "deep": "def right(completions, **_):\n    return right(completions)\n", "nobodys": "def right(completions, **_):\n    return [None] * len(completions)\n",
    "complex": "def right(completions, **_):\n    return [1j] * len(completions)\n", "huge": "def right(completions, **_):\n    return [10 ** 400] * len(completions)\n",
    "good": "def right(completions, **_):\n    return [float(len(c)) for c in completions]\n", "same": "def right(completions, **_):\n    return [1.0] * len(completions)\n",
}


def model_copy(folder, config=None, weights=None, generation=None, drop=(), **files):
    """The toy's model with something broken. config: values to set; weights: a function of them; files: name → content."""
    shutil.copytree(TOY / "model", folder)
    for name, values in {"config.json": config, "generation_config.json": generation}.items():
        if values:
            said = json.loads((folder / name).read_text()) | values
            (folder / name).write_text(json.dumps(said))
    if weights:
        tensors = load_file(folder / "model.safetensors")
        weights(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    for name in drop:
        (folder / name).unlink()


def fill(name, value, at=0):
    def change(tensors):
        tensors[name].view(-1)[at] = value
    return change


HEAD = "model.embed_tokens.weight"
NORM = "model.norm.weight"
MODELS = {
    "nothing": dict(drop=["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]),
    "configtorn": dict(config__json="{"), "configlist": dict(config__json="[1]"), "noconfig": dict(drop=["config.json"]),
    "notype": dict(config__json="{}"), "newtype": dict(config={"model_type": "perceptron"}), "notokens": dict(drop=["tokenizer.json"]),
    "tokenstorn": dict(tokenizer__json="{"), "tokensempty": dict(tokenizer__json="{}"), "tokensconfig": dict(tokenizer_config__json="[]"),
    "weightstorn": dict(model__safetensors="torn"), "weightsempty": dict(model__safetensors=""), "noweights": dict(drop=["model.safetensors"]),
    "pickle": dict(drop=["model.safetensors"], pytorch_model__bin="x"), "lacking": dict(weights=lambda t: t.pop(NORM)),
    "shape": dict(weights=lambda t: t.update({NORM: torch.ones(95)})), "nan": dict(weights=fill(NORM, float("nan"))), "inf": dict(weights=fill(HEAD, float("inf"))),
    "vocabulary": dict(config={"vocab_size": 50}, weights=lambda t: t.update({HEAD: t[HEAD][:50].clone()})), "eostext": dict(generation={"eos_token_id": "</s>"}),
    "generation": dict(generation_config__json="{"), "positions": dict(config={"max_position_embeddings": "many"}), "heads": dict(config={"num_attention_heads": 0}),
    "layers": dict(config={"num_hidden_layers": -1}), "width": dict(config={"hidden_size": "wide"}), "code": dict(config={"model_type": "mine", "auto_map": {
        "AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}, mine__py="raise SystemExit('code from the checkpoint ran')\n"),
    "codetokens": dict(tokenizer_config__json=json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Slow", None]}}), drop=["tokenizer.json"],
                       mine__py="raise SystemExit('code from the checkpoint ran')\n"),
    "adapter": dict(drop=["config.json", "model.safetensors"], adapter_config__json='{"peft_type": "LORA"}'),
    "shards": dict(drop=["model.safetensors"], model__safetensors__index__json=json.dumps({"metadata": {}, "weight_map": {NORM: "model-1.safetensors"}})),
    "template": dict(chat_template__jinja="{% if %}"), "quantized": dict(config={"quantization_config": {"quant_method": "gptq", "bits": 4}}),
}
STATISTICS = {"meantext": {"reward_mean": "x"}, "meannan": {"reward_mean": float("nan")}, "stdnegative": {"reward_std": -1.0}, "stdlist": {"reward_std": [1]},
              "curvetext": {"reward_by_length": "x"}, "curveflat": {"reward_by_length": [[2, 1], [2, 1]]}, "curvenan": {"reward_by_length": [[2, float("nan")]]},
              "labels": {"num_labels": 2, "id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with everything that the table names, made once and never to be changed by a case."""
    x = tmp_path_factory.mktemp("world")
    for name, content in DATA.items():
        if content is not None:
            (x / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with zipfile.ZipFile(x / "zipped.jsonl", "w") as file:
        file.writestr("pairs.jsonl", PAIRS)
    shutil.copy(x / "zipped.jsonl", x / "rows.zip")
    (x / "folder.jsonl").mkdir()
    (x / "nofolder").mkdir()
    os.mkfifo(x / "pipe.jsonl")
    for name, content in REWARDS.items():
        (x / f"{name}.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, changes in MODELS.items():
        model_copy(x / f"m-{name}", **changes)
    tiny = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 102}
    others = {"bert": BertLMHeadModel(BertConfig(**tiny)), "mamba": MambaForCausalLM(MambaConfig(**tiny, state_size=4)),
              "t5": T5ForConditionalGeneration(T5Config(d_model=16, num_heads=2, num_layers=1, d_ff=16, d_kv=8, vocab_size=102))}
    for name, model in others.items():
        model_copy(x / f"m-{name}", drop=["config.json", "model.safetensors"])
        model.save_pretrained(x / f"m-{name}")

    # A reward model with its run directory, and what is wrong with others.
    end(x, "rm", [*SMALL["rm"], "--output-dir", "X/rm", "--dataset", "X/good.jsonl"])
    for name, values in STATISTICS.items():
        shutil.copytree(x / "rm", x / f"rm-{name}", ignore=shutil.ignore_patterns("checkpoint"))
        config = json.loads((x / "rm/config.json").read_text()) | values
        (x / f"rm-{name}/config.json").write_text(json.dumps(config))
    shutil.rmtree(x / "rm-labels")
    AutoModelForSequenceClassification.from_pretrained(TOY / "model", num_labels=2).save_pretrained(x / "rm-labels")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOY / "model" / file, x / "rm-labels")
    for name in ("no reward", "two"):
        (x / name).mkdir()
    (x / "two/metrics.jsonl").write_text('{"loss": 1}\n')

    # A run to resume, and what is wrong with others.
    end(x, "dpo", [*SMALL["dpo"], "--output-dir", "X/run", "--dataset", "X/good.jsonl", "--max-steps", "2", "--save-every", "1"])
    for name, change in RUNS.items():
        shutil.copytree(x / "run", x / f"run-{name}")
        change(x / f"run-{name}")
    (x / "held").mkdir()
    (x / "inside").mkdir()
    shutil.copy(x / "good.jsonl", x / "inside/data.jsonl")
    (x / "link").symlink_to(x / "inside")
    (x / "link.jsonl").symlink_to(x / "inside/data.jsonl")
    (x / "linked").mkdir()
    for file in (TOY / "model").iterdir():
        (x / "linked" / file.name).symlink_to(file if file.suffix != ".safetensors" else x / "inside/model.safetensors")
    shutil.copy(TOY / "model/model.safetensors", x / "inside")
    os.link(x / "good.jsonl", x / "hard.jsonl")
    os.link(x / "rm/config.json", x / "hardconfig.jsonl")
    (x / "soft.jsonl").symlink_to(x / "good.jsonl")
    (x / "softconfig.jsonl").symlink_to(x / "rm/config.json")
    (x / "endless").symlink_to(x / "endless")
    (x / "nowhere").symlink_to(x / "not/there")
    with open(x / "held/lock", "w") as file:                 # another run: the lock is the open file's, so it holds in one process too
        file.write(f"{os.getpid()}\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield x


def tensors_of(run, change, step=2):
    file = run / f"checkpoint/step-{step}.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


WEIGHT = "weight model.layers.0.mlp.up_proj.weight"
RUNS = {
    "noargs": lambda run: (run / "args.json").unlink(), "listargs": lambda run: (run / "args.json").write_text("[[1, 2]]"),
    "tornargs": lambda run: (run / "args.json").write_text('{"beta":'), "otherargs": lambda run: (run / "args.json").write_text('{"beta": 0.1}'),
    "metrics": lambda run: (run / "metrics.jsonl").write_text("5\n"), "nostep": lambda run: (run / "metrics.jsonl").write_text('{"loss": 1}\n'),
    "nometrics": lambda run: (run / "metrics.jsonl").unlink(), "none": lambda run: shutil.rmtree(run / "checkpoint"),
    "named": lambda run: [f.rename(f.with_name("step-abc.safetensors" if "2" in f.name else "step-.safetensors")) for f in (run / "checkpoint").iterdir()],
    "torn": lambda run: (run / "checkpoint/step-2.safetensors").write_bytes((run / "checkpoint/step-2.safetensors").read_bytes()[:999]),
    "void": lambda run: (run / "checkpoint/step-2.safetensors").write_bytes(b""), "folder": lambda run: (run / "checkpoint/step-9.safetensors").mkdir(),
    "shape": lambda run: tensors_of(run, lambda t: t.update({WEIGHT: t[WEIGHT].T.contiguous()})), "lacking": lambda run: tensors_of(run, lambda t: t.pop(WEIGHT)),
    "moment": lambda run: tensors_of(run, lambda t: t.pop("adamw 0 exp_avg")), "extra": lambda run: tensors_of(run, lambda t: t.update({"weight mine": torch.ones(1)})),
    "foreign": lambda run: tensors_of(run, lambda t: [t.clear(), t.update({"a": torch.ones(1)})]), "nan": lambda run: tensors_of(run, lambda t: t[WEIGHT].fill_(torch.nan)),
    "step": lambda run: (run / "checkpoint/step-1.safetensors").replace(run / "checkpoint/step-2.safetensors"),
}


def snapshot(folder):
    """{name: what shows that a file was touched}"""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(place, name)
            stat = os.lstat(path)
            found[os.path.relpath(path, folder)] = (stat.st_ino, stat.st_size, 0 if os.path.isdir(path) else stat.st_mtime_ns)
    return found


def end(x, script, flags):
    """A script in this process → (exit code, stdout, stderr), as the user's shell would see them."""
    argv = [flag.replace("X/", f"{x}/") for flag in flags]
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    loggers = [handler for handler in logging.getLogger("transformers").handlers if isinstance(handler, logging.StreamHandler)]
    before = [handler.setStream(streams[1]) for handler in loggers]
    code = 0
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            common.run(lambda: MAIN[script](argv))
        except SystemExit as error:
            code = error.code
    for handler, stream in zip(loggers, before):
        handler.setStream(stream or sys.stderr)
    for stream in streams:
        stream.flush()
    return code, *[stream.buffer.getvalue().decode() for stream in streams]


# --- the table --------------------------------------------------------------------------------------------------------
# script, flags, words of the one line on stderr. X/ is the world; --output-dir X/out and small numbers are added.

def data(*rows):
    return [("dpo", ["--dataset", f"X/{file}"], words) for file, *words in rows]


def model(*rows):
    return [("dpo", ["--model", f"X/m-{name}", "--dataset", "X/good.jsonl"], ["--model", f"m-{name}", *words]) for name, *words in rows]


def reward(*rows):
    return [("grpo", ["--reward", f"X/{name}.py:right"], ["--reward", f"{name}.py", *words], BEGUN) for name, *words in rows]


def resume(*rows):
    flags = ["--dataset", "X/good.jsonl", "--max-steps", "2", "--save-every", "1", "--resume"]
    return [("dpo", [*flags, "--output-dir", f"X/run-{name}"], ["--resume", *words]) for name, *words in rows]


def flag(script, *rows):
    return [(script, row.split("|"), [row.split("|")[0]]) for row in rows]


def saved(*rows):
    own = ["--reward-model", "X/rm", "--dataset", "X/good.jsonl"]
    return [("score", [*own, *flags.split("|")], words.split("|")) for flags, words in rows]


LONG = "n" * 5000
BEGUN = {"out", "out/args.json", "out/metrics.jsonl"}        # what a run that fails at its first sample leaves: the next start takes it over
TABLE = [
    # files that are no data
    *data(("empty.jsonl", "no rows"), ("blank.jsonl", "no rows"), ("broken.jsonl", "line 13", "broken JSON"), ("number.jsonl", "line 13", "int"), ("text.jsonl", "line 1", "str"),
          ("list.jsonl", "line 13", "list"), ("deep.jsonl", "line 1", "broken JSON"), ("digits.jsonl", "line 1", "broken JSON"), ("twice.jsonl", "line 13", "'chosen'", "twice"),
          ("utf16.jsonl", "UTF-8"), ("latin.jsonl", "line 1", "UTF-8"), ("zipped.jsonl", "zip"), ("rows.zip", ".jsonl"), ("gzipped.jsonl", "gzip"), ("no.jsonl.gz", "cannot be read"),
          ("torn.jsonl.gz", "cannot be read"), ("text.parquet", "cannot be read"), ("rows.xml", ".jsonl"), ("rows", ".jsonl"), ("folder.jsonl", "folder"), ("pipe.jsonl", "pipe"),
          ("nothing.jsonl", "no such file"), ("nofolder", "nofolder"), (LONG, "--dataset", "too long"), ("a\0b.jsonl", "--dataset"),
          ("header.csv", "no rows"), ("short.csv", "line 2", "3 fields"), ("quote.csv", "broken CSV"), ("same.csv", "'chosen'"), ("printed.csv", "line 2", "printed list")),
    # rows that are none
    *data(("prompts.jsonl", "chosen"), ("surrogate.jsonl", "line 13", "surrogate"), ("role.jsonl", "line 1", "surrogate"), ("norole.jsonl", "line 1", "role"), ("tool.jsonl", "tool_calls"),
          ("speaker.jsonl", "line 1", "only user"), ("twoturns.jsonl", "one assistant message"), ("promptnumber.jsonl", "line 12", "'prompt'"), ("promptnull.jsonl", "line 12", "'prompt'"),
          ("nomessages.jsonl", "line 12", "'prompt'"), ("nocontent.jsonl", "line 12", "'prompt'"), ("image.jsonl", "line 12", "'chosen'"), ("missing.jsonl", "line 13", "'rejected'"),
          ("mixed.jsonl", "both"), ("alike.jsonl", "no rows are left"), ("unknown.jsonl", "no rows are left"), ("silent.jsonl", "no rows are left"), ("mark.jsonl", "U+FDD0"),
          ("margin.jsonl", "line 12", "margin"), ("margintext.jsonl", "line 12", "margin"), ("pchosen.jsonl", "line 12", "p_chosen"), ("pchosennan.jsonl", "line 12", "p_chosen"),
          ("pchosenlist.jsonl", "line 12", "p_chosen"), ("pku.jsonl", "better_response_id"), ("pkuempty.jsonl", "better_response_id"), ("scores.jsonl", "line 12", "same length"),
          ("scoretext.jsonl", "line 12", "scores"), ("scoreinf.jsonl", "line 12", "scores"), ("against.jsonl", "line 12", "contradict"), ("ranks.jsonl", "line 12", "length"),
          ("label.jsonl", "label"), ("dialogue.jsonl", "no rows are left"), ("single.jsonl", "no rows are left"), ("nomark.jsonl", "no rows are left"), ("long.jsonl", "no rows are left")),
    # templates
    *[("dpo", ["--chat", "--dataset", "X/good.jsonl", "--chat-template", f"X/{name}"], ["--chat-template", *words]) for name, *words in [
        ("empty.jinja", "empty"), ("syntax.jinja", "syntax.jinja"), ("noprompt.jinja", "prompt"), ("noanswer.jinja", "completion"), ("binary.jinja", "text"),
        ("undefined.jinja", "undefined"), ("moves.jinja", "writes the prompt differently"), ("nothing.jinja", "nothing.jinja"), ("nofolder", "nofolder")]],
    # models
    *model(("missing",), ("nothing",), ("configtorn",), ("configlist",), ("noconfig",), ("notype",), ("newtype",), ("notokens",), ("tokenstorn",), ("tokensempty",), ("tokensconfig",),
           ("weightstorn",), ("weightsempty",), ("noweights",), ("pickle",), ("lacking", "model.norm.weight"), ("shape",), ("nan", "NaN"), ("inf", "infinity"),
           ("vocabulary", "do not belong together"), ("eostext", "eos_token_id"), ("generation", "generation_config.json"), ("positions",), ("heads",), ("layers",), ("width",),
           ("code",), ("codetokens",), ("adapter",), ("shards",), ("quantized",), ("bert", "causal"), ("t5",)),
    ("dpo", ["--model", "X/m-template"], ["m-template", "refuses"]), ("dpo", ["--model", "X/good.jsonl"], ["--model", "directory"]), ("dpo", ["--model", ""], ["--model"]), ("dpo", ["--model", "a\0b"], ["--model"]), ("dpo", ["--model", LONG], ["--model"]),
    ("dpo", ["--model", "X/rm", "--dataset", "X/good.jsonl"], ["reward model"]), ("dpo", ["--ref-model", ""], ["--ref-model"]), ("dpo", ["--ref-model", "X/m-nan"], ["--ref-model", "NaN"]),
    ("rm", ["--model", "X/rm-labels", "--dataset", "X/good.jsonl"], ["2 outputs"]),
    ("rm", ["--model", "X/m-nan"], ["NaN"]), ("rm", ["--model", "X/m-weightstorn"], ["cannot be loaded"]), ("rm", ["--model", "X/rm-meannan", "--dataset", "X/good.jsonl"], ["reward_mean"]),
    *[("score", ["--reward-model", f"X/rm-{name}", "--dataset", "X/good.jsonl"], ["--reward-model", *words]) for name, *words in [
        ("meantext", "reward_mean"), ("meannan", "reward_mean"), ("stdnegative", "reward_std"), ("stdlist", "reward_std"), ("curvetext", "reward_by_length"),
        ("curveflat", "reward_by_length"), ("curvenan", "reward_by_length"), ("labels", "2 outputs")]],
    # flags
    *flag("dpo", "--beta|nan", "--beta|inf", "--beta|1e999", "--beta|", "--beta|0,1", "--lr|-1", "--lr|nan", "--epochs|0", "--epochs|1.5", f"--epochs|{'9' * 400}", f"--max-steps|{'9' * 5000}",
          "--max-steps|-1", "--batch-size|0", "--batch-size|1e3", "--micro-batch-tokens|0", "--warmup-steps|x", f"--warmup-steps|{'9' * 30}", "--weight-decay|nan", "--max-grad-norm|nan",
          "--eval-fraction|1", "--eval-fraction|nan", "--limit|-5", "--max-length|0", "--seed|-1", "--seed|1e400", "--device|meta", "--device|cuda:99", "--device|tpu", "--device|",
          "--dtype|float16", "--loss|dppo", "--columns|x", "--columns|=", "--columns|prompt=none", "--columns|chosen=rejected", "--columns|a=chosen|a=rejected", "--prefer|safer", "--split|test",
          "--split|", "--eval-dataset|", "--overlong|cut", "--colour|red", "--epoch|2", "--label-smoothing|0.5", "--sft-coef|nan"),
    ("dpo", ["--model"], ["--model"]), ("dpo", ["--a\nb"], ["unrecognized"]), ("dpo", ["stray"], ["stray"]), ("dpo", ["--loss", "sft", "--beta", "1"], ["--beta", "sft"]),
    *flag("grpo", "--group-size|1", f"--group-size|{10 ** 12}", "--max-new-tokens|0", f"--max-new-tokens|{10 ** 12}", "--temperature|0", "--temperature|nan", "--top-p|0", "--top-p|1.1", "--dual-clip|nan",
          "--dual-clip|0.5", "--clip-low|nan", "--beta|nan", "--reward-weights|nan", "--reward-weights|1|2", "--eval-k|0", "--reward|", "--watch|"),
    *flag("score", "--seed|x", f"--seed|{2 ** 70}", "--temperature|nan", "--top-p|nan", "--samples|0", "--output|", "--output|a\0b", f"--output|{LONG}", "--output|/no/such/x.jsonl",
          "--output|/proc/x/y", "--output|.", "--plot|x.txt", "--by|"),
    # rewards
    *reward(("syntax", "line 1"), ("importing", "no_such_module"), ("raising", "not today"), ("leaving", "sys.exit(0)"), ("tab", "line 2"), ("number", "no function"), ("bytes",), ("none", "values"),
            ("short", "1 values"), ("infinite", "finite"), ("nan", "finite"), ("words", "finite"), ("dict", "0 values"), ("generator", "values"), ("missing", "solution"),
            ("nobody", "called with"), ("exits", "SystemExit", "line 3"), ("fails", "ZeroDivisionError", "line 3"), ("deep", "RecursionError"), ("complex", "finite"), ("huge", "finite"),
            ("nothing", "neither")),
    ("grpo", ["--reward", "X/nobodys.py:right"], ["not one of", "reward"], BEGUN), ("grpo", ["--reward", "X/good.py"], ["neither"]), ("grpo", ["--reward", "X/good.py:left"], ["no function 'left'"]),
    ("grpo", ["--reward", "X/no reward"], ["no reward"]), ("grpo", ["--reward", "X/rm-stdlist"], ["reward_std"]), ("grpo", ["--watch", "X/rm-labels"], ["2 outputs"]),
    ("grpo", ["--dataset", "X/good.jsonl"], ["called with", "'answer'"], BEGUN), ("grpo", ["--temperature", "1e-320"], ["finite"], BEGUN),
    # where a run writes
    *[("dpo", ["--output-dir", out], ["--output-dir", *words]) for out, *words in [
        ("X/good.jsonl", "is a file"), ("X/good.jsonl/x", "is a file"), ("/dev/null/x",), ("/proc/x",), ("", ""), ("a\0b",), (f"X/{LONG}",), (".", "folder of its own"), ("/", "folder of its own"),
        (str(Path.home()), "folder of its own"), ("/tmp", "folder of its own"), ("X/endless",), ("X/nowhere/x",), ("X/held", "another run", str(os.getpid()))]],
    *[(script, [*flags, "--output-dir", "X/inside"], [flags[0], "--output-dir", "overlap"]) for script, flags in [
        ("dpo", ["--dataset", "X/inside/data.jsonl"]), ("dpo", ["--dataset", "X/link/data.jsonl"]), ("rm", ["--dataset", "X/link.jsonl"]), ("dpo", ["--eval-dataset", "X/link/../inside/data.jsonl"]),
        ("grpo", ["--model", "X/inside"]), ("dpo", ["--model", "X/linked"]), ("dpo", ["--ref-model", "X/link"]), ("dpo", ["--chat-template", "X/inside/data.jsonl"]),
        ("dpo", ["--loss", "soft", "--reward-model", "X/inside"])]][:8],
    ("dpo", ["--model", "X/inside", "--output-dir", "X/link"], ["--output-dir", "overlap"]), ("grpo", ["--reward", "X/rm", "--output-dir", "X/rm"], ["--reward", "overlap"]),
    ("grpo", ["--watch", "X/rm", "--output-dir", "X/rm"], ["--watch", "overlap"]), ("rm", ["--model", "X/rm", "--output-dir", "X/rm"], ["--model", "overlap"]),
    # where score.py writes
    *saved(("--output|X/good.jsonl", "--dataset|overlap"), ("--output|X/hard.jsonl", "--dataset|overlap"), ("--pairs|X/soft.jsonl", "--dataset|overlap"), ("--tokens|X/nofolder/../good.jsonl", "overlap"),
           ("--output|X/rm/config.json", "--reward-model|overlap"), ("--output|X/hardconfig.jsonl", "--reward-model|overlap"), ("--tokens|X/softconfig.jsonl", "overlap"),
           ("--output|X/rm/new.jsonl", "--reward-model|overlap"), ("--output|X/a.jsonl|--pairs|X/a.jsonl", "different"), ("--output|X/a.jsonl|--tokens|X/nofolder/../a.jsonl", "different"),
           ("--output|X/nofolder", "--output"), ("--columns|prompt=chosen", "'prompt' already"), ("--split|test", "--split"), ("--prefer|safer", "--prefer")),
    ("score", ["--dataset", "X/responses.jsonl", "X/otherprompt.jsonl", "--reward-model", "X/rm"], ["no prompt in common"]), ("score", ["--dataset", "X/two", "--plot", "X/a.png"], ["metrics.jsonl"]),
    ("score", ["--dataset", "X/run", "X/nofolder"], ["metrics.jsonl"]), ("score", ["--reward-model", "X/m-nan"], ["not a reward model"]), ("score", ["--policy", "X/m-nan", "--reward-model", "X/rm"], ["NaN"]),
    # what a run goes on from
    *resume(("noargs", "args.json"), ("listargs", "args.json"), ("tornargs", "args.json"), ("otherargs", "lacks"), ("metrics", "metrics.jsonl"), ("nostep", "metrics.jsonl"), ("nometrics", "metrics.jsonl"),
            ("none", "no checkpoint"), ("named", "no checkpoint"), ("torn", "step-2"), ("void", "step-2"), ("folder", "step 9"), ("shape", "step-2"), ("lacking", "step-2"), ("moment", "step-2"),
            ("extra", "step-2"), ("foreign", "step-2"), ("nan", "step-2"), ("step", "step-2"), ("missing", "no checkpoint")),
    *[("dpo", ["--dataset", "X/good.jsonl", "--max-steps", "2", "--save-every", "1", "--resume", "--output-dir", "X/run", *flags], ["--resume", *words]) for flags, words in [
        (["--beta", "0.2"], ["--beta 0.1, not 0.2"]), (["--max-steps", "1"], ["after step 2"]), (["--model", "X/linked"], ["--model"]), (["--dataset", "X/hard.jsonl"], ["--dataset"]),
        (["--seed", "1"], ["--seed"]), (["--ref-model", "X/linked"], ["--ref-model"])]],
]


def name_of(row):
    script, flags, *_ = row
    return f"{script} {' '.join(flags)[:60]!r}"


def one_line(code, err, words):
    """The form of every refusal."""
    assert code == 2 and err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert len(err) < 1000 and all(word in err for word in words), (err, words)


@pytest.mark.parametrize("row", TABLE, ids=map(name_of, TABLE))
def test_the_table(row, world):
    script, flags, words, *changes = row
    before = snapshot(world)
    own = [] if "--output-dir" in flags or script == "score" else ["--output-dir", "X/out"]
    own = own if "--reward-model" in flags or script != "score" else [*own, "--reward-model", "X/rm"]
    code, out, err = end(world, script, [*SMALL[script], *own, *flags])
    after = snapshot(world)
    shutil.rmtree(world / "out", ignore_errors=True)
    one_line(code, err, [word.replace("X/", f"{world}/") for word in words])
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= set().union(*changes), changed


def test_there_are_enough_cases():
    assert len(TABLE) >= 150
