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
           ("--output|X/nofolder", "--output"), ("--output|/dev/full", "No space"), ("--tokens|/dev/full", "No space"), ("--columns|prompt=chosen", "'prompt' already"), ("--split|test", "--split"), ("--prefer|safer", "--prefer")),
    ("score", ["--dataset", "X/responses.jsonl", "X/otherprompt.jsonl", "--reward-model", "X/rm"], ["no prompt in common"]), ("score", ["--dataset", "X/two"], ["metrics.jsonl"]),
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


# --- what is accepted, and said ---------------------------------------------------------------------------------------

def out_of(world, script, *flags, code=0):
    """A run in a folder of its own → its stdout."""
    given, out, err = end(world, script, [*SMALL[script], "--eval-samples", "0", *flags] if script == "dpo" else [*SMALL[script], *flags])
    assert given == code and not err, err
    return out


def test_what_is_said_where_it_was_silent(world, tmp_path):
    def said(script, *flags):
        text = out_of(world, script, "--output-dir", str(tmp_path / "o"), *flags)
        shutil.rmtree(tmp_path / "o")
        return text
    assert "the first 5 of 12 rows" in said("dpo", "--dataset", "X/good.jsonl", "--limit", "5")
    rows = (world / "speaker.jsonl").read_text()
    (tmp_path / "speaker.jsonl").write_text(rows + rows.replace("1+1", "2+2"))
    assert "leaves out" in said("dpo", "--dataset", str(tmp_path / "speaker.jsonl"), "--chat-template", "X/nosystem.jinja")
    assert "nothing was learnt" in said("grpo", "--dataset", "X/answers.jsonl", "--reward", "X/same.py:right", "--beta", "0", "--eval-fraction", "0")
    assert "nothing was learnt" in said("grpo", "--dataset", "X/answers.jsonl", "--reward", "X/nobodys.py:right", "--beta", "0", "--eval-fraction", "0")
    (tmp_path / "p.jsonl").write_text(with_row(ROW, p_chosen=0.1, prompt="other", answer=3.0))
    assert "p_chosen below 1/2" in said("dpo", "--loss", "sft", "--dataset", str(tmp_path / "p.jsonl"))
    groups = common.read_groups(str(tmp_path / "p.jsonl"), ["pair"])[0]
    common.read_soft_labels(groups, 0)
    assert groups[-1].completions == ["3", "2"] and str(groups[-1].row["answer"]) == "3"     # --loss sft keeps the first


def test_one_row_prints_no_nan(world):
    (world / "one.jsonl").write_text(lines(ROW))
    code, out, err = end(world, "score", ["--dataset", "X/one.jsonl", "--reward-model", "X/rm"])
    (world / "one.jsonl").unlink()
    assert code == 0 and not err and "nan" not in out


def test_an_answer_of_many_megabytes_is_dropped_without_being_encoded(world, tmp_path):
    (tmp_path / "big.jsonl").write_text(PAIRS + lines(ROW | {"prompt": "big", "chosen": "2" * 20_000_000}))
    began = time.process_time()
    said = out_of(world, "dpo", "--dataset", str(tmp_path / "big.jsonl"), "--output-dir", str(tmp_path / "o"))
    assert "1 over --max-length 512" in said and time.process_time() - began < 5


def test_state_space_models_train_and_their_sampling_is_refused(world, tmp_path):
    flags = [*SHORT, "--dataset", "X/good.jsonl", "--model", "X/m-mamba", "--output-dir", str(tmp_path / "o")]
    code, _, err = end(world, "dpo", flags)
    assert code == 2 and "--eval-samples 0" in err.splitlines()[-1]
    assert end(world, "dpo", [*flags, "--eval-samples", "0"])[0] == 0


# --- work is not lost -------------------------------------------------------------------------------------------------

def contents(folder):
    """{name: bytes} of what counts in a run directory."""
    found = {}
    for file in sorted(Path(folder).rglob("*")):
        if file.is_file() and file.name != "lock" and ".writing" not in str(file):
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


def test_nothing_that_was_there_is_lost_however_often_a_start_fails(world, tmp_path):
    out = tmp_path / "o"
    shutil.copytree(TOY / "model", out)                      # a model without args.json
    model = contents(out)
    flags = [*SMALL["grpo"], "--dataset", "X/answers.jsonl", "--output-dir", str(out), "--reward"]
    for _ in range(3):                                       # each fails at its first sample, after the rename
        assert end(world, "grpo", [*flags, "X/fails.py:right"])[0] == 2
    assert contents(tmp_path / "o-1") == model and not (tmp_path / "o-2").exists()
    assert end(world, "grpo", [*flags, "X/good.py:right"])[0] == 0
    done = contents(out)
    assert end(world, "grpo", [*flags, "X/fails.py:right"])[0] == 2
    assert contents(tmp_path / "o-2") == done and contents(tmp_path / "o-1") == model and not (out / "lock").exists()


def test_a_link_to_another_disk_stays_a_link(world, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "o").symlink_to(tmp_path / "disk")
    flags = ["--dataset", "X/good.jsonl", "--output-dir", str(tmp_path / "o")]
    out_of(world, "dpo", *flags)
    first = contents(tmp_path / "disk")
    out_of(world, "dpo", *flags)
    assert (tmp_path / "o").is_symlink() and contents(tmp_path / "disk-1") == first and contents(tmp_path / "disk").keys() == first.keys()


def test_a_stale_lock_is_taken_over(world, tmp_path):
    (tmp_path / "lock").write_text("4194304\n")
    out_of(world, "dpo", "--dataset", "X/good.jsonl", "--output-dir", str(tmp_path))
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "lock").exists()


def test_of_several_processes_only_the_first_takes_a_stale_lock(tmp_path, monkeypatch):
    (tmp_path / "lock").write_text("4194304\n")
    monkeypatch.setenv("RANK", "1")
    train_rm.parse_args(["--output-dir", str(tmp_path)])
    assert not common.HELD


OPERATIONS = [(os, "replace"), (os, "unlink"), (os, "mkdir"), (os, "rmdir"), (common, "save_file"), (Path, "write_text"), (Path, "unlink"), (Path, "mkdir"), (Path, "rmdir")]


@contextlib.contextmanager
def at_every_file_operation(folder, action):
    """action(number, name) before every operation that changes something in a folder."""
    count = []

    def wrap(name, real):
        def operation(*args, **options):
            if any(str(arg).startswith(str(folder)) for arg in args if isinstance(arg, (str, Path))):
                count.append(name)
                action(len(count), name)
            return real(*args, **options)
        return operation

    def opening(file, mode="r", *args, real=open, **options):
        if str(file).startswith(str(folder)) and set(mode) & set("wa+x"):
            count.append("open")
            action(len(count), "open")
        return real(file, mode, *args, **options)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in OPERATIONS:
            patch.setattr(owner, name, wrap(name, getattr(owner, name)))
        patch.setattr("builtins.open", opening)
        yield count


@pytest.mark.parametrize("script", ["dpo", "grpo"])
def test_a_kill_or_a_full_disk_at_any_file_operation_leaves_what_can_be_gone_on_from(script, world, tmp_path):
    own = {"dpo": ["--eval-samples", "0"], "grpo": ["--group-size", "2", "--max-new-tokens", "2", "--reward", "X/good.py:right", "--beta", "0"]}
    flags = ["--limit", "6", "--batch-size", "3", "--max-steps", "2", "--save-every", "1", "--eval-fraction", "0", *own[script],
             "--dataset", "X/good.jsonl", "--output-dir"]
    out = tmp_path / "o"
    states = {}                                              # what a kill leaves: contents → a copy of the folder

    def copy(number, name):
        if out.exists() and contents(out) not in [contents(kept) for kept in states.values()]:
            states[number] = tmp_path / f"killed-{number}"
            subprocess.run(["cp", "-r", out, states[number]], check=True)      # not by what is watched
    with at_every_file_operation(out, copy) as operations:
        assert end(world, script, [*flags, str(out)])[0] == 0
    straight = contents(out)
    assert len(operations) > 20

    # A kill just before any of them: the same bits in the end.
    for state in states.values():
        resume = ["--resume"] if list(state.glob("checkpoint/step-*.safetensors")) else []
        code, _, err = end(world, script, [*flags, str(state), *resume])
        assert code == 0, err
        for name in ("model.safetensors", "config.json", "completions.jsonl", "checkpoint/step-2.safetensors"):
            assert contents(state).get(name) == straight.get(name), (state, name)
        steps = [json.loads(line)["step"] for line in (state / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2]

    # A disk that is full at any of them: one line, and whole files.
    for number in range(1, len(operations) + 1):
        shutil.rmtree(out)

        def full(now, name):
            if now == number:
                raise OSError(28, "No space left on device")
        with at_every_file_operation(out, full):
            code, _, err = end(world, script, [*flags, str(out)])
        out.mkdir(exist_ok=True)
        if code:                                             # an operation whose failure is harmless may end well
            assert code == 2 and err.count("\n") == 1 and "No space" in err, err
            for line in (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []:
                json.loads(line)
            for file in out.glob("checkpoint/step-*.safetensors"):
                load_file(file)
        else:
            assert contents(out).keys() == straight.keys()


def test_divergence_never_takes_the_place_of_what_is_good(world, tmp_path):
    flags = ["--dataset", "X/good.jsonl", "--max-steps", "6", "--save-every", "1", "--lr", "1e30", "--lr-schedule", "constant", "--warmup-steps", "0", "--output-dir", str(tmp_path)]
    code, _, err = end(world, "dpo", [*SMALL["dpo"], *flags])
    assert code == 2 and err.count("\n") == 1 and "finite" in err
    for file in (tmp_path / "checkpoint").glob("*"):
        assert all(torch.isfinite(tensor).all() for name, tensor in load_file(file).items() if name.startswith("weight"))
    assert not (tmp_path / "model.safetensors").exists()
    strict = {"parse_constant": lambda name: pytest.fail(f"{name} in metrics.jsonl")}
    assert [json.loads(line, **strict) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_resume_says_what_changed_since_the_start(world, tmp_path):
    for file in ("good.py", "answers.jsonl"):
        shutil.copy(world / file, tmp_path)
    shutil.copytree(TOY / "model", tmp_path / "m")
    flags = [*SMALL["grpo"], "--dataset", f"{tmp_path}/answers.jsonl", "--model", f"{tmp_path}/m", "--ref-model", f"{tmp_path}/m", "--reward", f"{tmp_path}/good.py:right", "--eval-fraction", "0",
             "--output-dir", str(tmp_path / "o")]
    assert end(world, "grpo", flags)[0] == 0
    flags += ["--resume", "--max-steps"]
    assert "is not what" not in end(world, "grpo", [*flags, "1"])[1]
    (tmp_path / "good.py").write_text(REWARDS["good"].replace("len(c)", "-len(c)"))
    code, out, err = end(world, "grpo", [*flags, "2"])
    assert code == 0 and "the reward is not what it was" in out and "--max-steps was 1 and is 2" in out
    torch.set_num_threads(torch.get_num_threads() + 1)
    try:
        code, out, err = end(world, "grpo", [*flags, "3"])
    finally:
        torch.set_num_threads(torch.get_num_threads() - 1)
    assert code == 0 and "threads was" in out and "the reward" not in out.split("threads was")[0]     # said once
    for what, change in {"data": lambda: (tmp_path / "answers.jsonl").write_text(lines({"prompt": "1+1", "answer": "3"})),
                         "model": lambda: model_copy(tmp_path / "n", weights=fill(NORM, 2.0)) or shutil.copy(tmp_path / "n/model.safetensors", tmp_path / "m")}.items():
        change()
        before = contents(tmp_path / "o")
        one_line(*(end(world, "grpo", [*flags, "4"])[i] for i in (0, 2)), ["--resume", f"the {what} is not what"] if what == "data" else ["--resume", "is not what"])
        assert contents(tmp_path / "o") == before
        shutil.copy(world / "answers.jsonl", tmp_path)


# --- signals and consoles ---------------------------------------------------------------------------------------------

def forked(world, script, flags, during=lambda pid: None):
    """A script in a child of this process (imports are done) → (exit code, stdout, stderr); during(pid) may send it signals."""
    files = [open(world.parent / f"{name}-{os.getpid()}", "w+b") for name in ("out", "err")]
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)        # until main() begins: what comes before is the test's own
    pid = os.fork()
    if not pid:
        def begin():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            MAIN[script]([flag.replace("X/", f"{world}/") for flag in flags])
        code = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for name in ("SIGTERM", "SIGHUP"):               # which whoever started this may have ignored
                signal.signal(getattr(signal, name), signal.SIG_DFL)
            torch.set_num_threads(1)
            for number, file in enumerate(files, 1):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
            common.run(begin)
            code = 0
        except SystemExit as error:
            code = error.code
        except BaseException as error:
            print("TRACEBACK", repr(error), file=sys.stderr)
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    during(pid)
    status = os.waitpid(pid, 0)[1]
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read().decode())
        file.close()
    return os.waitstatus_to_exitcode(status), *texts


def test_ctrl_c_ends_in_one_line_at_any_moment(world, tmp_path):
    flags = ["--limit", "100", "--max-steps", "3", "--eval-samples", "4", "--output-dir", str(tmp_path / "o")]
    began = time.monotonic()
    assert forked(world, "dpo", flags)[0] == 0
    lasts = time.monotonic() - began
    ends = []
    for i in range(8):
        def interrupt(pid):
            time.sleep(0.02 + lasts * i / 8)
            os.kill(pid, signal.SIGINT)
            if i % 2:                                        # and a second time
                time.sleep(0.01)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGINT)
        code, out, err = forked(world, "dpo", flags, interrupt)
        assert code in (0, 130) and err in ("", "interrupted\n"), (i, code, err)
        assert code == 0 or err or "--resume goes on" in out
        ends.append(code)
    assert 130 in ends


ENDLESS = [*SHORT, "--max-steps", "5000", "--eval-samples", "0", "--dataset", "X/good.jsonl", "--output-dir"]


def until_it_trains(out):
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 3:
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_a_second_one_ends_at_once(name, world, tmp_path):
    def once(pid):
        until_it_trains(tmp_path / "o")
        os.kill(pid, getattr(signal, name))
    code, out, err = forked(world, "dpo", [*ENDLESS, str(tmp_path / "o")], once)
    assert code == 130 and not err and "--resume goes on" in out and list((tmp_path / "o/checkpoint").iterdir())

    def twice(pid):
        until_it_trains(tmp_path / "p")
        for _ in range(2):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, getattr(signal, name))
            time.sleep(0.001)
    code, out, err = forked(world, "dpo", [*ENDLESS, str(tmp_path / "p")], twice)
    assert code == 130 and err in ("", "interrupted\n")


def test_a_second_run_in_the_directory_is_refused(world, tmp_path):
    flags = [*ENDLESS, str(tmp_path / "o")]

    def second(pid):
        until_it_trains(tmp_path / "o")
        for resume in ([], ["--resume"]):
            code, _, err = end(world, "dpo", [*flags, *resume])
            assert code == 2 and (str(pid) in err or resume and "no checkpoint" in err), err
        os.kill(pid, signal.SIGTERM)
    code, _, err = forked(world, "dpo", flags, second)
    assert code == 130 and not err and not (tmp_path / "o-1").exists()


@pytest.mark.parametrize("ending, environment, codes", [
    ("| head -n 1", {"PYTHONIOENCODING": "cp1252"}, "0 0"),  # the reader leaves, the run goes on to its end
    ("> /dev/full", {"PYTHONIOENCODING": "ascii"}, "2"),
], ids=["head", "full"])
def test_consoles(ending, environment, codes, world, tmp_path):
    command = f"{sys.executable} {ROOT}/score.py --dataset {world}/good.jsonl --reward-model {world}/rm --output {tmp_path}/a.jsonl {ending}; echo ${{PIPESTATUS[@]}}"
    done = subprocess.run(["bash", "-c", command], env=os.environ | environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == codes and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    assert (tmp_path / "a.jsonl").exists() or codes == "2"
