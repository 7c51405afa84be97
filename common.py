"""What the scripts share: whatever must be the same in training, sampling and scoring.

⓪ processes  torchrun  →  each computes its share of a step, holds its share of the weights
① read       rows of any known format  →  groups (text)
② tokenise   groups (text)   →  groups (ids): one BOS, one EOS, a boundary that never moves
③ plan       groups          →  steps of micro-batches, a pure function of the seed
④ pack       a micro-batch   →  a few rows without padding, each prompt in them once
⑤ log-probs  a packed batch  →  float32 log-probs of the completion tokens, nothing else
⑥ models     a directory     →  a policy or a reward model, checked
⑦ sample     prompts         →  completions, their log-probs, and whether they ended
⑧ scale      a model         →  sharded, recomputed in the backward, with a LoRA adapter
⑨ run        flags           →  a run directory that a kill at any moment leaves whole

A GROUP is one prompt with K completions: a pair is a group of two, a ranking a group of K, a
labelled completion a group of one; GRPO samples groups of G. After the reader, all is in groups.

Shapes: R rows of N tokens in a packed batch, K completions in it, T completion tokens in all of
them, V vocabulary.
"""
# --- imports --------------------------------------------------------------------------------------
import argparse
import csv
import functools
import gzip
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import types
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, NamedTuple

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
    GenerationConfig)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

try:
    import fcntl
except ImportError:                                          # Windows: runs are not locked there
    fcntl = None


# --- errors, flags, device ------------------------------------------------------------------------

def fail(message):
    """Bad input is for the user to fix: one line on stderr, exit code 2, no traceback."""
    time.sleep(2 * bool(rank()))  # mostly all processes fail alike: the first one's line is enough
    line = " ".join(str(message).splitlines())
    print(f"error: {line[:900]}{'…' * (len(line) > 900)}", file=sys.stderr)
    raise SystemExit(2)


def first_line(error):
    """The type of an exception and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]:.200}" if lines else type(error).__name__


@contextmanager
def failing(message):
    """What the outside world raises in this block (files, templates, …) ends in one sentence."""
    try:
        yield
    except Exception as error:
        fail(f"{message} ({first_line(error)}).")


class Parser(argparse.ArgumentParser):
    """argparse, except that a wrong flag ends as all bad input does: in one line."""

    def error(self, message):
        fail(f"{message} (--help lists the flags).")


def within(interval, kind=float):
    """An argparse type: a number in an interval such as "[0, 1)"; NaN and infinity are in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r:.60} is not {name} in {interval}")
        return value
    return parse


def lora_rank(text):
    """An argparse type: a rank, 0 for none; others need the package peft."""
    rank = within("[0, inf)", int)(text)
    if rank and importlib.util.find_spec("peft") is None:
        raise argparse.ArgumentTypeError("LoRA needs the package peft: pip install peft")
    return rank


def pick_device(name):
    """auto = cuda where there is one, else cpu. A device that is not available is an error."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with failing(f"--device {name}: not available on this machine"):
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # .item(): the device "meta" holds no numbers
    if device.type == "cuda":  # cuDNN plans for every new shape, half a second each: ours all are
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def pick_autocast(dtype, device):
    """The context to compute in, by default bfloat16 on CUDA. Weights and sums stay float32."""
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def compute_dtype(device):
    """What is computed in here: that of the autocast around, or float32."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else torch.float32


def progress_bar(total, what, unit):
    """A bar that is erased at its end; none if `what` is empty or the output is not a terminal."""
    hidden = True if rank() or not what else None
    return tqdm(total=total, desc=what, unit=unit, leave=False, disable=hidden)


# ⓪ processes --------------------------------------------------------------------------------------
# torchrun starts a process for each GPU. All read the same data and make the same plan, which are
# pure functions of the flags; each computes its share of every step. In one process none of this
# does anything. A function that is called "collective" below has to be called by all of them.

def rank():
    """Which process this is; 0 is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(name):
    """Joins the processes that torchrun started, if it did → the device of this one."""
    if "LOCAL_RANK" not in os.environ:
        return pick_device(name)
    cuda = torch.cuda.is_available() and name in ("auto", "cuda")
    device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else name)
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")
    return device


def leave_processes():
    """The end of a run that went well. Gloo's threads now and then abort a process while Python
    takes itself down: not after this."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def gather(value):
    """[the value of every process], in all of them. Collective."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def first(function, *args, **options):
    """What the function returns in the first process, which alone calls it. Collective."""
    result = None
    code = None
    if rank() == 0:
        try:
            result = function(*args, **options)
        except SystemExit as error:
            code = error.code
    result, code = gather((result, code))[0]
    if code is not None:
        raise SystemExit(code)
    return result


def total(sums):
    """Counter → its sums over all processes. Collective."""
    result = Counter()
    for one in gather(sums):
        result.update(one)  # not +, which drops what is negative
    return result


def numbered(keys):
    """A number for each key, from 0 in order of appearance; equal keys share one."""
    numbers = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def my_share(keys):
    """Places of the items that this process looks after; those of one key stay together."""
    return [place for place, n in enumerate(numbered(keys)) if n % world() == rank()]


# ① read -------------------------------------------------------------------------------------------

@dataclass
class Group:
    """One prompt and its K completions, first as text (or chat messages), then as token ids."""
    where: str                      # "pairs.jsonl, line 7", for error messages
    prompt: str | list              # text, or [{"role": …, "content": …}, …]
    completions: list               # K texts
    row: dict = field(default_factory=dict)             # every column: rewards may read any
    scores: list = field(default_factory=list)          # K, higher is better; pair: 1, 0; or empty
    margin: float = 0.0             # by how much the better completion of a pair is better
    p_chosen: float | None = None   # probability that the first of a pair is the better
    prompt_ids: list = field(default_factory=list)      # P ids, BOS and template included
    completion_ids: list = field(default_factory=list)  # K lists, with EOS unless truncated
    ended: list = field(default_factory=list)           # K booleans: False where truncated
    index: list = field(default_factory=list)           # K places in a column of all completions

    def tokens(self):
        """Tokens that a shared-prefix forward computes: the prompt once, every completion once."""
        return len(self.prompt_ids) + sum(map(len, self.completion_ids))

    def longest(self):
        """Tokens of the prompt with its longest completion."""
        return len(self.prompt_ids) + max(map(len, self.completion_ids))


@dataclass
class Account:
    """What became of the rows of one source; str() is what the user reads."""
    source: str
    format: str                     # name of a row of FORMATS
    rows: int
    kept: int = 0
    truncated: int = 0
    dropped: Counter = field(default_factory=Counter)   # reason → rows
    looks_special: int = 0          # rows with text that looks like a special token
    conflicts: int = 0              # completions called good in one row and bad in another
    template_rewrites: bool = False  # whether the chat template changes some completions
    template_drops: bool = False    # whether it leaves out text of some prompts

    def drop(self, groups, kept, reason):
        """Notes that of these groups only `kept` go on → kept."""
        if len(kept) < len(groups):
            self.dropped[reason] = len(groups) - len(kept)
        return kept

    def __str__(self):
        line = (f"{self.source}: {self.rows:,} rows of format '{self.format}', kept {self.kept:,}, "
                f"truncated {self.truncated:,}, dropped {self.dropped.total():,}")
        if self.dropped:
            reasons = [f"{n:,} {reason}" for reason, n in self.dropped.items()]
            line += f" ({', '.join(reasons)})"
        if self.looks_special:
            line += f"\n  {self.looks_special:,} rows hold text that looks like a special token"
            line += "; it is encoded as ordinary text"
        if self.conflicts:
            line += f"\n  {self.conflicts:,} completions are chosen in one row and rejected in "
            line += "another of the same prompt"
        if self.template_rewrites:
            line += "\n  the chat template rewrites some completions (trims or moves text)"
            line += "; what it writes is used"
        if self.template_drops:
            line += "\n  the chat template leaves out or changes text of some prompts"
            line += " (a role that it does not know?)"
        return line


MAGIC = {b"PK\x03\x04": "zip", b"\x1f\x8b": "gzip", b"PAR1": "parquet"}     # how files begin


def read_rows(source, split="train"):
    """All rows of a local .json, .jsonl, .csv or .parquet file (also .gz) or of a hub dataset.

    Returns [(where, row)]: `where` names file and line for error messages. The standard library
    reads JSON and CSV, not `datasets`, whose Arrow tables unify the columns of all rows: a 5 among
    strings would be a traceback about the whole file instead of a sentence about line 17, and a
    missing column would be a silent None.
    """
    path = Path(source)
    name = path.name.removesuffix(".gz")
    with failing(f"{source}: cannot be read"):
        is_file = path.is_file()
    if not is_file:
        if path.exists() and not path.is_dir():
            fail(f"{source}: it is a pipe or a device; give a file.")
        if path.suffix in (".json", ".jsonl", ".csv", ".parquet", ".gz"):
            fail(f"{source}: " + ("it is a folder." if path.is_dir() else "no such file."))
        with failing(f"{source} (split {split}): neither a file nor a dataset that can be loaded"):
            from datasets import load_dataset  # here, because it takes seconds to import
            rows = load_dataset(str(source), split=split)
        return [(f"{source}, {split} row {i}", dict(row)) for i, row in enumerate(rows)]
    if not name.endswith((".json", ".jsonl", ".csv", ".parquet")):
        fail(f"{source}: known file types are .json, .jsonl, .csv and .parquet, also with .gz.")

    with failing(f"{source}: cannot be read"):
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        for start, kind in MAGIC.items():
            if raw.startswith(start) and not (kind == "parquet" and name.endswith(".parquet")):
                fail(f"{source}: its content is a {kind} file, which its name does not say.")
        if name.endswith(".parquet"):
            import pyarrow.parquet
            rows = pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
            return [(f"{source}, row {i}", row) for i, row in enumerate(rows, 1)]
        try:
            text = raw.decode("utf-8-sig")  # -sig: a byte order mark is no part of a column's name
        except UnicodeDecodeError as error:
            line = raw[:error.start].count(b"\n") + 1
            fail(f"{source}, line {line}: it is not text in UTF-8; convert it.")
    return read_csv(source, text) if name.endswith(".csv") else read_json(source, text)


# how str() of a list of messages begins
PRINTED = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")


def read_csv(source, text):
    csv.field_size_limit(2 ** 31 - 1)  # else it refuses cells over 131,072 characters: dialogues
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        names = reader.fieldnames or []
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            fail(f"{source}, line 1: two columns are called '{twice[0]}'; rename one.")
        for row in reader:
            where = f"{source}, line {reader.line_num}"
            if None in row or None in row.values():
                fail(f"{where}: this row does not have the {len(names)} fields of the header.")
            for name, cell in row.items():
                if PRINTED.match(cell):
                    fail(f"{where}: column '{name}' holds a printed list of messages, which would "
                         "be read as text; keep such data in .jsonl or .parquet.")
            rows.append((where, row))
    except csv.Error as error:  # line_num: where the last good row ended
        fail(f"{source}, line {reader.line_num + 1}: broken CSV ({error}).")
    return rows


def no_key_twice(pairs):
    """What json makes of an object: it would keep the last of two values and say nothing."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = [name for name in names if names.count(name) > 1]
        raise ValueError(f"key {twice[0]!r} comes twice in an object")
    return row


def read_json(source, text):
    """One JSON list of objects, or one object a line."""
    rows = []
    where = source
    try:
        if text.lstrip()[:1] == "[":
            for i, row in enumerate(json.loads(text, object_pairs_hook=no_key_twice), 1):
                rows.append((f"{source}, row {i}", row))
        else:
            for i, line in enumerate(text.split("\n"), 1):  # splitlines() also splits at U+2028
                where = f"{source}, line {i}"
                if line.strip():
                    rows.append((where, json.loads(line, object_pairs_hook=no_key_twice)))
    except json.JSONDecodeError as error:
        where = where if where != source else f"{source}, line {error.lineno}"
        fail(f"{where}: broken JSON ({error.msg}).")
    except (ValueError, RecursionError) as error:  # integers of 5,000 digits, lists 5,000 deep
        fail(f"{where}: broken JSON ({first_line(error)}).")

    for where, row in rows:
        if not isinstance(row, dict):
            fail(f"{where}: a row must be an object with named columns, not {type(row).__name__}.")
    return rows


def valid_text(value, column, where):
    """A text or a list of parts, [{"type": "text", "text": …}, …] → the text, or an error."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in value]
        value = "".join(parts) if all(isinstance(part, str) for part in parts) else value
    if not isinstance(value, str):
        fail(f"{where}: in column '{column}' a message's role or content is {value!r:.60}, not "
             "text.")
    try:
        value.encode()
    except UnicodeEncodeError:
        fail(f"{where}: column '{column}' holds half of a surrogate pair (like \\ud83d), which is "
             "not valid text; remove it.")
    return value


def text_or_messages(row, names, where):
    """The checked value of a column: text, or chat messages whose content is text; else an error.

    names: of the column, or "prompt|question": the one of these that the row has.
    """
    column = either(row, names, where)
    value = row[column]
    if isinstance(value, str):
        return valid_text(value, column, where)

    def is_message(m):
        return isinstance(m, dict) and "role" in m and "content" in m

    if not isinstance(value, list) or not value or not all(map(is_message, value)):
        fail(f"{where}: column '{column}' is {value!r:.60}, neither text nor a list of messages "
             "with role and content.")

    messages = []
    for message in value:
        given = {k: v for k, v in message.items() if v is not None}  # a template may read any key
        given["role"] = valid_text(message["role"], column, where)
        given["content"] = valid_text(message["content"], column, where)
        messages.append(given)
    return messages


def number(row, column, where, low=-math.inf, high=math.inf):
    """The finite number in a column (CSV text counts), or an error that names the row."""
    try:
        value = float(row[either(row, column, where)])
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not (math.isfinite(value) and low <= value <= high):
        limits = f" in [{low:g}, {high:g}]" if high < math.inf else ""
        fail(f"{where}: column '{column}' is {row[column]!r:.60}, not a number{limits}.")
    return value


def either(row, names, where):
    """The column that this row has, of names such as "prompt|question"."""
    for name in names.split("|"):
        if name in row:
            return name
    fail(f"{where}: column '" + names.replace("|", "' or '") + "' is missing.")


def split_transcripts(chosen, rejected):
    """HH-RLHF: two transcripts that differ in the last turn only → (prompt, chosen, rejected).

    The prompt ends with the last "\\n\\nAssistant:" inside the longest common prefix, so a
    completion that quotes this marker stays whole. None where they part earlier: then a completion
    would hold a further exchange.
    """
    marker = "\n\nAssistant:"
    common = len(os.path.commonprefix([chosen, rejected]))
    boundary = chosen.rfind(marker, 0, common) + len(marker)
    if boundary < len(marker):
        return None
    further_turn = re.compile(r"\n\nHuman:|\bHuman:.*\n\nAssistant:", re.DOTALL)
    if further_turn.search(chosen, boundary) or further_turn.search(rejected, boundary):
        return None
    return chosen[:boundary], chosen[boundary:], rejected[boundary:]


# The functions of FORMATS: one row → Group, or the reason (a str) for which it is dropped.

def read_pair(row, where, prefer):
    chosen = text_or_messages(row, "chosen", where)
    prompt = text_or_messages(row, "prompt", where)
    if isinstance(chosen, list) and chosen[0]["role"] != "assistant":
        # Whole dialogues, beside a prompt column that repeats what they begin with.
        told = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]
        spoken = {m["content"].strip() for m in chosen[:-1]}
        if not spoken.issuperset(text.strip() for text in told):
            return "whose prompt column is not in the dialogue (--columns unused=prompt drops it)"
        return read_dialogues(row, where, prefer)
    rejected = text_or_messages(row, "rejected", where)
    return Group(where, prompt, [chosen, rejected], row, [1, 0])


def read_dialogues(row, where, prefer):
    chosen = text_or_messages(row, "chosen", where)
    rejected = text_or_messages(row, "rejected", where)
    if type(chosen) is not type(rejected):
        fail(f"{where}: 'chosen' and 'rejected' must both be text or both be lists of messages.")
    if isinstance(chosen, str):
        parts = split_transcripts(chosen, rejected)
    else:  # the prompt is all but the last message
        same = chosen[:-1] == rejected[:-1] and len(chosen) > 1
        parts = (chosen[:-1], chosen[-1:], rejected[-1:]) if same else None
    if parts is None:
        return "that differ before the last turn"
    return Group(where, parts[0], list(parts[1:]), row, [1, 0])


def read_pku(row, where, prefer):
    column = f"{prefer}_response_id"
    best = row[either(row, column, where)]
    if str(best) not in ("0", "1"):
        fail(f"{where}: column '{column}' is {best!r}, neither 0 nor 1.")
    prompt = text_or_messages(row, PROMPT, where)
    chosen = text_or_messages(row, f"response_{int(best)}", where)
    rejected = text_or_messages(row, f"response_{1 - int(best)}", where)
    return Group(where, prompt, [chosen, rejected], row, [1, 0])


def read_list(row, where, prefer):
    prompt = text_or_messages(row, PROMPT, where)
    name = either(row, "completions|responses", where)
    by = either(row, "scores|ranks", where)
    texts = row[name]
    values = row[by]
    if not (isinstance(texts, list) and isinstance(values, list) and len(texts) == len(values) > 1):
        fail(f"{where}: columns '{name}' and '{by}' must be two lists of the same length, two or "
             "more.")
    completions = [text_or_messages({name: text}, name, where) for text in texts]
    sign = -1.0 if by == "ranks" else 1.0  # rank 1 is the best, so its score is the highest
    scores = [sign * number({by: value}, by, where) for value in values]
    if by == "scores" and isinstance(row.get("ranks"), list):
        ranks = [number({"ranks": value}, "ranks", where) for value in row["ranks"]]
        if len(ranks) != len(scores):
            fail(f"{where}: columns 'scores' and 'ranks' differ in length.")
        for i, score in enumerate(scores):
            if any(score > scores[j] and ranks[i] > ranks[j] for j in range(len(ranks))):
                fail(f"{where}: columns 'scores' and 'ranks' contradict each other; drop one "
                     "(--columns unused=ranks).")
    return Group(where, prompt, completions, row, scores)


def read_labelled(row, where, prefer):
    prompt = text_or_messages(row, "prompt", where)
    completion = text_or_messages(row, "completion", where)
    label = row[either(row, "label", where)]
    value = {"true": 1, "1": 1, "false": 0, "0": 0}.get(str(label).lower())
    if value is None:
        fail(f"{where}: column 'label' is {label!r}, neither true nor false.")
    return Group(where, prompt, [completion], row, [value])


def read_response(row, where, prefer):
    prompt = text_or_messages(row, PROMPT, where)
    name = either(row, "response|completion|answer", where)
    completion = text_or_messages(row, name, where)
    if name == "answer":  # here it is what was said, elsewhere what would be correct
        row = {column: value for column, value in row.items() if column != "answer"}
    cut = str(row.get("cut")).lower() == "true"              # score.py says so of its samples
    return Group(where, prompt, [completion], row, ended=[False] if cut else [])


def read_prompt(row, where, prefer):
    return Group(where, text_or_messages(row, PROMPT, where), [], row)


class Format(NamedTuple):
    """A row of FORMATS. To add a format is to add a row: messages and all scripts follow it.

    The first row whose columns are all there wins, so a new one goes above every row that would
    match its data too ("prompt" matches whatever has a prompt or a question).
    """
    gives: str                      # what its groups are: a script asks for these
    columns: tuple                  # what must be there ("a|b": one of them)
    read: Callable                  # (row, where, prefer) → Group, or why the row is dropped


PROMPT = "prompt|question"
FORMATS = {                      # in the order in which they are tried
    "pair": Format("pair", ("prompt", "chosen", "rejected"), read_pair),
    "pair, prompt inside": Format("pair", ("chosen", "rejected"), read_dialogues),
    "PKU-SafeRLHF": Format(
        "pair", (PROMPT, "response_0", "response_1", "better_response_id|safer_response_id"),
        read_pku),
    "ranked list": Format("list", (PROMPT, "completions|responses", "scores|ranks"), read_list),
    "unpaired": Format("label", ("prompt", "completion", "label"), read_labelled),
    "response": Format("response", (PROMPT, "response|completion|answer"), read_response),
    "prompt": Format("prompt", (PROMPT,), read_prompt),
}


def to_group(format_name, row, where, prefer):
    """One row of a format → Group with K texts, or the reason (a str) for which it is dropped."""
    group = FORMATS[format_name].read(row, where, prefer)
    if isinstance(group, str):
        return group
    if any(isinstance(c, list) for c in group.completions) and isinstance(group.prompt, str):
        group.prompt = [{"role": "user", "content": group.prompt}]

    for k, completion in enumerate(group.completions):  # one assistant message becomes its text
        if isinstance(completion, list):
            roles = [message["role"] for message in completion]
            if roles != ["assistant"]:
                fail(f"{where}: a completion must be one assistant message, not {roles}.")
            further = sorted(set(completion[0]) - {"role", "content"})
            if further:
                fail(f"{where}: a completion's message has '{further[0]}' besides role and "
                     "content, which would be lost; move it or remove it.")
            group.completions[k] = completion[0]["content"]

    answer = group.row.get("answer")
    if isinstance(answer, float) and answer.is_integer():
        group.row["answer"] = int(answer)  # a column with gaps made 91.0 of 91: never equal to "91"
    stripped = [c.strip() for c in group.completions]
    if not all(stripped):
        return "with an empty completion"
    if FORMATS[format_name].gives == "pair" and stripped[0] == stripped[1]:
        return "with identical completions"
    return group


def rename_columns(rows, columns, source):
    """--columns new=old …: all at once, so that chosen=rejected rejected=chosen swaps the two."""
    first = rows[0][1]
    renames = [rename.partition("=")[::2] for rename in columns]         # (new, old)
    for new, old in renames:
        if not new or old not in first:
            fail(f"--columns {new}={old}: {source} has no column '{old}' (it has: "
                 f"{', '.join(first)}); write NEW=OLD.")
        if new in first and new not in [taken for _, taken in renames]:
            fail(f"--columns {new}={old}: {source} has a column '{new}' already; rename that one "
                 f"too, for example unused={new}.")
    names = [new for new, _ in renames]
    if len(set(names)) < len(names):
        fail(f"--columns {' '.join(columns)}: two columns would get one name.")
    for where, row in rows:
        values = {}
        for new, old in renames:
            if old not in row:
                fail(f"{where}: column '{old}' is missing.")
            values[new] = row[old]
        for _, old in renames:
            row.pop(old, None)
        row.update(values)


def read_groups(source, usable, split="train", columns=(), limit=0, prefer="better", why=""):
    """Rows → (groups, Account). usable: names of FORMATS, the first of them that fits is taken.

    why: what the caller says about rows that it cannot use.
    """
    rows = read_rows(source, split)
    if limit and limit < len(rows):
        print(f"{source}: the first {limit:,} of {len(rows):,} rows are taken (--limit)")
        rows = rows[:limit]
    if not rows:
        fail(f"{source}: no rows.")
    if columns:
        rename_columns(rows, columns, source)

    have = set(rows[0][1])
    fits = []
    for name, entry in FORMATS.items():
        if all(have & set(names.split("|")) for names in entry.columns):
            fits.append(name)
    taken = [name for name in fits if name in usable]
    if not taken:
        needs = [" + ".join(FORMATS[name].columns).replace("|", "/") for name in usable]
        problem = "fit no format"
        if fits:
            names = " or ".join(f"'{name}'" for name in fits)
            problem = f"are rows of format {names}, which cannot be used here{why}"
        fail(f"{source}: its columns ({', '.join(rows[0][1])}) {problem}; needed are "
             f"{'; or '.join(needs)}. --columns NEW=OLD renames.")

    if prefer != "better" and taken[0] != "PKU-SafeRLHF":
        fail(f"{source}: --prefer {prefer} is for rows of format 'PKU-SafeRLHF', these are of "
             f"format '{taken[0]}'.")
    account = Account(source, taken[0], len(rows))
    groups = []
    for where, row in rows:
        group = to_group(taken[0], row, where, prefer)
        if isinstance(group, str):
            account.dropped[group] += 1
        else:
            groups.append(group)
    return groups, account


def read_soft_labels(groups, label_smoothing):
    """Reads the columns p_chosen and margin of pairs; None and "" stand for no value.

    p_chosen is the probability that `chosen` is the better. Pairs below 1/2 swap their completions
    and p becomes 1 − p: the loss is the same, and "chosen" is the better one wherever an accuracy
    is counted.
    """
    swapped = 0
    for g in groups:
        if g.row.get("margin") not in (None, ""):
            g.margin = number(g.row, "margin", g.where)
            if g.margin < 0:
                fail(f"{g.where}: column 'margin' is {g.margin:g}: below 0 the rejected completion "
                     "would be better.")
        if g.row.get("p_chosen") in (None, ""):
            continue
        if g.scores != [1, 0]:
            fail(f"{g.where}: column 'p_chosen' belongs to a pair; --columns unused=p_chosen takes "
                 "it away.")
        if label_smoothing:
            fail(f"{g.where}: rows with p_chosen carry their own label noise; drop "
                 "--label-smoothing.")
        g.p_chosen = number(g.row, "p_chosen", g.where, 0, 1)
        if g.p_chosen < 0.5:
            g.p_chosen = 1 - g.p_chosen
            g.completions.reverse()
            swapped += 1
    if swapped:
        print(f"  {swapped:,} pairs have p_chosen below 1/2: their completions are swapped, "
              "p_chosen becomes 1 − p_chosen")


# ② tokenise ---------------------------------------------------------------------------------------

MARK = "\ufdd0"      # a noncharacter, never in real text: brackets text that only looks special


class Encoder:
    """A tokeniser with the decisions that training, sampling and scoring must share.

    bos       what prompts begin with where the tokeniser puts it itself, never twice
    eos       ends a completion of plain text
    turn_end  ends a completion in a chat: what the template writes, else EOS
    stops     every id at which sampling stops: these two and generation_config's EOS ids

    Messages become text by the chat template; plain text stays as it is unless `chat` is set.
    """

    def __init__(
            self, tokenizer, config=None, generation_config=None, template_file=None, chat=False):
        self.tokenizer = tokenizer
        self.chat = chat
        self.max_positions = getattr(config, "max_position_embeddings", None) or math.inf
        self.template_rewrites = False  # True once the chat template changed a completion
        self.template_drops = False     # True once it left out text of a prompt
        self.template_name = f"the chat template in {tokenizer.name_or_path}"
        self.ready = {}                 # (text, control) → ids, see encode_ahead()
        if template_file:
            self.template_name = f"--chat-template {template_file}"
            with failing(f"{self.template_name}: cannot be read as text"):
                tokenizer.chat_template = Path(template_file).read_text(encoding="utf-8")
            if not tokenizer.chat_template.strip():
                fail(f"{self.template_name}: it is empty.")
        if type(self.max_positions) not in (int, float):
            fail(f"the config in {tokenizer.name_or_path} has max_position_embeddings "
                 f"{self.max_positions!r:.60}, not a number.")

        added = tokenizer.added_tokens_decoder
        self.control_ids = set(added) | set(tokenizer.all_special_ids)
        special = {token.content for token in added.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        longest_first = sorted(special, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

        first = tokenizer("a")["input_ids"][0]
        self.bos = [first] if first == tokenizer.bos_token_id else []
        from_config = getattr(generation_config, "eos_token_id", None)
        from_config = from_config if isinstance(from_config, list) else [from_config]
        self.turn_end = self.find_turn_end() if tokenizer.chat_template else None
        self.stops = sorted({self.turn_end, tokenizer.eos_token_id, *from_config} - {None})
        if not self.stops:
            fail(f"the tokeniser in {tokenizer.name_or_path} names no EOS token, so no completion "
                 "could ever end; set eos_token in its config.")
        self.eos = self.stops[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.turn_end = self.eos if self.turn_end is None else self.turn_end

        # Some tokenisers put a space before whatever they encode, see continuation() and decode().
        self.adds_space = self.continuation("ab") != self.plain("ab")
        self.plain_anchor = self.continuation("a")

    def find_turn_end(self):
        """Id of the first control token that the template writes after a completion, or None."""
        answer = {"role": "assistant", "content": "ANSWER"}
        text = self.render(self.messages("QUESTION") + [answer], "a question and an answer")
        for word, what in (("QUESTION", "prompt"), ("ANSWER", "completion")):
            if word not in text:
                fail(f"{self.template_name}: it does not write the {what}.")
        behind = self.plain(text.rpartition("ANSWER")[2], control=True)
        return next((token for token in behind if token in self.control_ids), None)

    def plain(self, text, control=False):
        """Token ids without BOS. control: special strings are those tokens, else ordinary text."""
        if (text, control) in self.ready:
            return self.ready[text, control]
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=not control)
        return encoded["input_ids"]

    def continuation(self, text, control=False):
        """Token ids of a text that goes on from another one.

        SentencePiece-like tokenisers (Llama 2, Mistral v1) turn "yes" into "▁yes": right where a
        text starts, wrong for a completion. Behind an anchor with which the text does not merge,
        that space is the anchor's.
        """
        for anchor in ("\n", "a", "1", "."):
            before = self.plain(anchor)
            joint = self.plain(anchor + text, control)
            if joint[:len(before)] == before:
                return joint[len(before):]
        return self.plain(text, control)

    def render(self, messages, where, generation_prompt=False):
        """Chat template → text. What only looks like a control token stands between MARKs."""
        if self.tokenizer.chat_template is None:
            fail(f"{where}: chat messages, but the tokeniser in {self.tokenizer.name_or_path} has "
                 "no chat template; give one with --chat-template FILE (a reward model: in its "
                 "training).")
        marked = []
        for message in messages:
            if MARK in message["content"]:
                fail(f"{where}: a message holds U+FDD0, a noncharacter of Unicode that serves as a "
                     "mark here.")
            content = self.special.sub(lambda found: MARK + found[0] + MARK, message["content"])
            marked.append(message | {"content": content})
        with failing(f"{where}: {self.template_name} refuses these messages"):
            return self.tokenizer.apply_chat_template(
                marked, tokenize=False, add_generation_prompt=generation_prompt)

    def ids(self, text, control, continues=False):
        """Token ids of a text, without BOS.

        control: special strings outside MARKs are those tokens, else all is ordinary text.
        continues: the text goes on from one that is encoded already.
        """
        ids = []
        for i, piece in enumerate(text.split(MARK) if control else [text]):
            continues = continues or i > 0
            encode = self.continuation if continues and self.adds_space else self.plain
            if piece:
                ids += encode(piece, control and i % 2 == 0)  # odd pieces stand between MARKs
        return ids

    def with_bos(self, ids):
        return ids if ids[:1] == self.bos else self.bos + ids  # a template may have written it

    def messages(self, prompt):
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt

    def is_chat(self, prompt):
        return self.chat or not isinstance(prompt, str)

    def prompt_text(self, prompt, where="prompt"):
        if not self.is_chat(prompt):
            return prompt
        text = self.render(self.messages(prompt), where, generation_prompt=True)
        written = text.replace(MARK, "")
        said = [message["content"].strip() for message in self.messages(prompt)]
        self.template_drops |= not all(one in written for one in said)
        return text

    def prompt(self, prompt, where="prompt"):
        """Text or messages → (prompt_ids, text): the same in training, sampling and scoring."""
        text = self.prompt_text(prompt, where)
        return self.with_bos(self.ids(text, control=self.is_chat(prompt))), text

    def joined_text(self, group, completion, prompt_text):
        """The text of prompt and completion together, as the model is to see it."""
        if not self.is_chat(group.prompt):
            return prompt_text + completion
        answer = {"role": "assistant", "content": completion}
        text = self.render(self.messages(group.prompt) + [answer], group.where)
        if not text.startswith(prompt_text):
            at = len(os.path.commonprefix([text, prompt_text]))
            fail(f"{group.where}: the chat template writes the prompt differently once a "
                 f"completion follows (from character {at}: {prompt_text[at:at + 30]!r} against "
                 f"{text[at:at + 30]!r}); use another --chat-template.")
        self.template_rewrites |= completion not in text.replace(MARK, "")
        return text

    def texts(self, group):
        """(text of the prompt, [text of prompt and completion together, …]) of a group."""
        prompt_text = self.prompt_text(group.prompt, group.where)
        return prompt_text, [self.joined_text(group, c, prompt_text) for c in group.completions]

    def encode_ahead(self, groups, texts):
        """Tokenises the texts of some groups in one go: a batch runs in all threads."""
        pieces = {False: [], True: []}  # by whether special strings are those tokens
        for group, (prompt_text, joint) in zip(groups, texts):
            chat = self.is_chat(group.prompt)
            for text in (prompt_text, *joint):
                for i, piece in enumerate(text.split(MARK) if chat else [text]):
                    pieces[chat and i % 2 == 0].append(piece)

        self.ready = {}
        for control, some in pieces.items():
            different = [piece for piece in dict.fromkeys(some) if piece]
            if different:
                encoded = self.tokenizer(
                    different, add_special_tokens=False, split_special_tokens=not control)
                for piece, ids in zip(different, encoded["input_ids"]):
                    self.ready[piece, control] = ids

    def __call__(self, group, texts=None):
        """Fills prompt_ids, completion_ids and ended of a group. texts: what texts() gives.

        Prompt and completion are encoded apart and concatenated, so the boundary never moves and
        every completion of a prompt has the same prompt ids. Where the ids of prompt + completion
        begin with the prompt's ids, the completion's ids are the rest (that is how the model will
        see such text); where a merge crosses the boundary, the completion is encoded alone.
        """
        chat = self.is_chat(group.prompt)
        prompt_text, joined = texts or self.texts(group)
        group.prompt_ids = self.with_bos(self.ids(prompt_text, control=chat))
        group.completion_ids = []
        for text in joined:
            joint = self.with_bos(self.ids(text, control=chat))
            if joint[:len(group.prompt_ids)] == group.prompt_ids:
                ids = joint[len(group.prompt_ids):]
            else:
                ids = self.ids(text[len(prompt_text):], control=chat, continues=True)

            end = self.turn_end if chat else self.eos
            stops = [i for i, token in enumerate(ids) if token in self.stops]
            if chat and stops:  # the template wrote the end of turn, and maybe a newline
                end = ids[stops[0]]
                ids = ids[:stops[0]]
            group.completion_ids.append(ids + [end])
        group.ended = [True] * len(group.completions)
        return group

    def looks_special(self, group):
        """Whether the data holds text that looks like a control token."""
        texts = [message["content"] for message in self.messages(group.prompt)]
        return any(map(self.special.search, texts + group.completions))

    def text(self, ids):
        """Every id as text, control tokens included, nothing cleaned up."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def anchor(self, prompt):
        """The ids behind which a completion of this prompt is decoded.

        SentencePiece-like decoders drop a space at the start: right for a text, wrong for a
        completion, so that stands behind an "a". Not in a chat: its template writes that space.
        """
        return [] if self.is_chat(prompt) else self.plain_anchor

    def decode(self, ids, prompt=""):
        """Text of ids sampled for a prompt, as a reward function sees it: as written, without the
        end token."""
        if ids and ids[-1] in self.stops:
            ids = ids[:-1]
        anchor = self.anchor(prompt)
        return self.text(anchor + ids).removeprefix(self.text(anchor))

    def show(self, group):
        """One group as `prompt ▸ completion`, control tokens visible, long texts shortened."""
        def shorten(text):
            return text if len(text) <= 160 else text[:80] + " … " + text[-80:]

        lines = [f"  prompt {shorten(self.text(group.prompt_ids))!r}"]
        for ids, ended in zip(group.completion_ids, group.ended):
            note = "" if ended else "  (truncated, no end token)"
            lines.append(f"  ▸ {shorten(self.text(ids))!r}{note}")
        return "\n".join(lines)


AHEAD = 1000         # rows that are tokenised in one go


def tokenise(groups, account, encoder, max_length, overlong="drop", progress="tokenise"):
    """Encodes all groups, keeps those that fit, and notes in `account` what became of the rest.

    max_length bounds prompt + longest completion. overlong: "drop" the group, or "truncate" the
    completions that are too long (EOS goes with the rest: a truncated completion must not teach
    the model to stop there).
    """
    kept = []
    encoder.template_rewrites = False  # of this source
    encoder.template_drops = False
    # Beyond this a text has too many tokens whatever they are: 50 MB are not encoded to be dropped.
    most = 2 * max_length * max(map(len, encoder.tokenizer.get_vocab()))
    bar = progress_bar(len(groups), progress, "row")
    for i, group in enumerate(groups):
        if i % AHEAD == 0:
            ahead = []
            for g in groups[i:i + AHEAD]:
                ahead.append(replace(g, completions=[text[:most] for text in g.completions]))
            texts = [encoder.texts(g) for g in ahead]
            encoder.encode_ahead(ahead, texts)
        one = encoder(ahead[i % AHEAD], texts[i % AHEAD])
        group.prompt_ids = one.prompt_ids
        group.completion_ids = one.completion_ids
        group.ended = one.ended
        bar.update()
        account.looks_special += encoder.looks_special(group)
        room = max_length - len(group.prompt_ids)
        fits = [len(ids) <= room for ids in group.completion_ids]
        ids = [ids[:max(0, room)] for ids in group.completion_ids]

        if not group.prompt_ids:
            account.dropped["with an empty prompt"] += 1
        elif room < 1:
            account.dropped["with no room for a completion"] += 1
        elif not all(fits) and overlong == "drop":
            account.dropped[f"over --max-length {max_length}"] += 1
        elif len(group.scores) > 1 and len(set(map(tuple, ids))) == 1:
            account.dropped["with completions of identical tokens"] += 1
        else:
            group.completion_ids = ids
            group.ended = fits
            account.truncated += not all(fits)
            kept.append(group)
    bar.close()
    encoder.ready = {}
    account.kept = len(kept)
    account.template_rewrites = encoder.template_rewrites
    account.template_drops = encoder.template_drops
    return kept


def conflicting(groups):
    """How many completions are the best in one row and the worst in another of the same prompt.

    Of a pair or list the highest score is the best, of single completions the label says it.
    """
    good = set()
    bad = set()
    for g in groups:
        both = len(set(g.scores)) > 1
        for text, score in zip(g.completions, g.scores):
            said = (json.dumps(g.prompt), text)
            if score == (max(g.scores) if both else 1):
                good.add(said)
            elif score == (min(g.scores) if both else 0):
                bad.add(said)
    return len(good & bad)


def load_groups(source, args, encoder, usable, max_length, what, prepare=None, why=""):
    """Rows of a source → tokenised groups. Prints the account and one example with its boundary.

    prepare(groups, account, args) → groups: what the caller checks and drops before tokenising.
    """
    groups, account = read_groups(
        source, usable, args.split, args.columns, args.limit, args.prefer, why)
    if prepare:
        groups = prepare(groups, account, args)
    groups = tokenise(groups, account, encoder, max_length, args.overlong, f"tokenise {what}")
    account.conflicts = conflicting(groups)
    print(f"{what}: {account}")
    if not groups:
        fail(f"{source}: no rows are left; the line above says why.")
    print(encoder.show(groups[0]))
    if encoder.tokenizer.chat_template and not encoder.is_chat(groups[0].prompt):
        print("  the tokeniser has a chat template, but these prompts stay plain text (--chat "
              "makes them user turns)")
    return groups


def load_data(args, encoder, usable, max_length, prepare=None, why=""):
    """--dataset and --eval-dataset, or a part of the first → (train, held_out), numbered."""
    options = (args, encoder, usable, max_length)
    train = load_groups(args.dataset, *options, "train", prepare, why)
    if args.eval_dataset:
        held_out = load_groups(args.eval_dataset, *options, "eval", prepare, why)
        common = {str(g.prompt) for g in train} & {str(g.prompt) for g in held_out}
        if common:
            print(f"  {len(common)} prompts of --eval-dataset are also trained on")
        chosen = some_prompts(held_out, args.eval_limit or len(held_out), args.seed)
        held_out = [g for g in held_out if json.dumps(g.prompt) in chosen]
    else:
        train, held_out = split_by_prompt(train, args.eval_fraction, args.seed, args.eval_limit)
    number_completions(train + held_out)
    return train, held_out


def number_completions(groups):
    """Numbers all completions from 0, groups in order, in g.index. Returns how many there are."""
    first = 0
    for g in groups:
        g.index = list(range(first, first + len(g.completion_ids)))
        first += len(g.completion_ids)
    return first


def fitting_length(args, encoder):
    """--max-length, or less where the model has fewer positions."""
    if args.max_length > encoder.max_positions:
        print(f"--max-length {args.max_length} is lowered to {encoder.max_positions}, the "
              "positions that the model has")
    return min(args.max_length, encoder.max_positions)


def some_prompts(groups, count, seed):
    """`count` of the different prompts, as JSON, whatever the order of the rows."""
    def place(prompt):
        return hashlib.sha256(f"{seed} {prompt}".encode()).hexdigest()

    return set(sorted({json.dumps(g.prompt) for g in groups}, key=place)[:count])


def split_by_prompt(groups, fraction, seed, limit=0):
    """(train, eval) without a common prompt. limit: of the prompts held out (0 = none)."""
    prompts = [json.dumps(g.prompt) for g in groups]
    different = len(set(prompts))
    count = round(fraction * different) or (fraction > 0)
    count = min(count, limit or count, different - 1)       # one at least is trained on
    held_out = some_prompts(groups, count, seed)
    train = [g for g, prompt in zip(groups, prompts) if prompt not in held_out]
    return train, [g for g, prompt in zip(groups, prompts) if prompt in held_out]


# ③ plan -------------------------------------------------------------------------------------------

class Plan:
    """plan[step]: the group indices of every optimizer step, a pure function of the arguments.

    Every epoch is a new permutation, its last step may be smaller: no row is dropped. max_steps > 0
    wins over epochs. Only the epoch that is asked for is computed: a plan may have a million steps.
    """

    def __init__(self, n, batch_size, epochs, max_steps, seed):
        if n == 0:
            fail("no rows are left to train on.")
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = math.ceil(n / batch_size)
        self.steps = max_steps if max_steps > 0 else epochs * self.steps_per_epoch
        self.epoch = None
        self.order = []

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        if not 0 <= step < self.steps:
            raise IndexError(step)
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = list(range(self.n))
            random.Random(f"{self.seed} {epoch}").shuffle(self.order)
        return self.order[place * self.batch_size:(place + 1) * self.batch_size]

    def used(self):
        """The indices of all groups that some step uses: of the others nothing need be known."""
        if self.steps >= self.steps_per_epoch:
            return list(range(self.n))
        return sorted(i for step in range(self.steps) for i in self[step])


def micro_batches(groups, budget, packed=True):
    """Splits groups into lists of at most `budget` tokens; a group over the budget stands alone.

    Longest first: groups of similar size meet. Only memory depends on the budget: losses are
    normalised over the step. packed=False counts what pad() lays out: every completion with its
    prompt, padded to the longest.
    """
    def cost(group, widest):
        return group.tokens() if packed else len(group.completion_ids) * widest.longest()

    batches = []
    used = 0
    for group in sorted(groups, key=Group.tokens if packed else Group.longest, reverse=True):
        if not batches or used + cost(group, batches[-1][0]) > budget:
            batches.append([])
            used = 0
        batches[-1].append(group)
        used += cost(group, batches[-1][0])
    return batches


def deal(items, size, count):
    """Items, each to the hand of `count` that holds the least so far → (hands, their sizes). With
    the longest first they end about even."""
    hands = [[] for _ in range(count)]
    sizes = [0] * count
    for item in items:
        emptiest = sizes.index(min(sizes))
        hands[emptiest].append(item)
        sizes[emptiest] += size(item)
    return hands, sizes


def my_micro_batches(groups, budget, packed=True):
    """This process's share of a step: [(micro-batch, weight)].

    The groups are dealt out, longest first, each to the process that has the fewest tokens. The
    weight is the number of processes, since FSDP averages their gradients. All run as many
    forwards, because weights are gathered in them: who has fewer repeats one group with weight 0.
    """
    if world() > 1:
        groups = sorted(groups, key=Group.tokens, reverse=True)
    hands, _ = deal(groups, Group.tokens, world())
    shares = [micro_batches(hand, budget, packed) for hand in hands]
    mine = [(micro, world()) for micro in shares[rank()]]
    idle = max(map(len, shares)) - len(mine)
    for _ in range(idle):
        mine.append((groups[-1:], 0))                        # the shortest
    return mine


class Comparisons(NamedTuple):
    """M pairs "better ≻ worse" among the K completions of some groups."""
    better: torch.Tensor    # (M,) which completion, groups in order
    worse: torch.Tensor     # (M,)
    weight: torch.Tensor    # (M,) 1 / pairs of the same prompt, so that every prompt counts as one
    p: torch.Tensor         # (M,) probability that the label is right
    margin: torch.Tensor    # (M,) by how much the better one is better
    prompt: torch.Tensor    # (M,) which group


def pairs_of(group):
    """The pairs (i, j) of a group in which i scores higher: no ties, nor equal token ids."""
    ids = group.completion_ids
    pairs = []
    for i, a in enumerate(group.scores):
        for j, b in enumerate(group.scores):
            if a > b and ids[i] != ids[j]:
                pairs.append((i, j))
    return pairs


def compare(groups, label_smoothing=0.0, device=None):
    """All pairs of all groups → Comparisons."""
    places = []
    values = []
    first = 0
    for number, g in enumerate(groups):
        pairs = pairs_of(g)
        p = 1 - label_smoothing if g.p_chosen is None else g.p_chosen
        for i, j in pairs:
            places.append((first + i, first + j, number))
            values.append((1 / len(pairs), p, g.margin))
        first += len(g.completion_ids)
    better, worse, prompt = torch.tensor(places, device=device).long().view(-1, 3).T.contiguous()
    weight, p, margin = torch.tensor(values, device=device).view(-1, 3).T.contiguous()
    return Comparisons(better, worse, weight, p, margin, prompt)


def choice_losses(r, chosen, rejected):
    """Plackett–Luce: log of the sum of e^r over a completion and those that are worse, less its r.

    r (K,) rewards; chosen, rejected (M,) the pairs of compare() → (K,), 0 where nothing is worse.
    """
    # Choice k is among completion k and those that are worse: K + M candidates in all.
    itself = torch.arange(len(r), device=r.device)                               # (K,)
    choice = torch.cat([itself, chosen])                                         # (K + M,)
    left = r[torch.cat([itself, rejected])]                                      # (K + M,)

    # log Σ e^r of each choice, with the highest reward taken out: exp() cannot overflow.
    top = left.detach().new_zeros(len(r)).scatter_reduce(
        0, choice, left.detach(), "amax", include_self=False)                    # (K,)
    total = sum_by((left - top[choice]).exp(), choice, len(r))                   # (K,)
    return top + total.log() - r


def number_prompts(groups):
    """Which prompt each group has, (groups,): rows of one prompt share a number, so a cluster."""
    return torch.tensor(numbered([str(g.prompt_ids) for g in groups]))


class Proportion(NamedTuple):
    """A mean of values from 0 (wrong) to 1 (right) and its interval by Wilson (1927)."""
    mean: float
    low: float
    high: float

    @property
    def half(self):
        """Half the width of the interval: what stands behind a ±."""
        return (self.high - self.low) / 2


def proportion(values, cluster, weight=None, z=1.0):
    """Mean of values between 0 and 1, with an interval of z standard errors → Proportion.

    values (M,): 1 right, 0 wrong, 1/2 a tie; cluster (M,): the prompt of each, as a number. What
    is said of one prompt is not independent: Wilson's formula gets n = p (1 − p) / V, where V is
    the variance of the mean over prompts, at least that of independent values. Ties vary less:
    where all values are ties, V and the width are 0. Where all are right, or all wrong, or of one
    prompt, n is the number of prompts, and the width is not 0.
    """
    values = values.double()
    weight = torch.ones_like(values) if weight is None else weight.double()
    weight = weight / weight.sum()
    prompts = len(cluster.unique())
    p = (weight * values).sum().item()
    alike = bool(values.min() == values.max())
    p = values[0].item() if alike else p                     # without rounding
    if alike and 0 < p < 1:
        return Proportion(p, p, p)
    if alike or prompts == 1:
        n = prompts
    else:
        apart = weight * (values - p)                                            # (M,)
        by_prompt = sum_by(apart, cluster, int(cluster.max()) + 1)
        among = by_prompt.square().sum().item() * prompts / (prompts - 1)
        n = p * (1 - p) / max(among, apart.square().sum().item())

    # Wilson's interval: all p' with |p − p'| ≤ z √(p' (1 − p') / n).
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Proportion(p, (middle - half) / scale, (middle + half) / scale)


# ④ pack -------------------------------------------------------------------------------------------

ROW = 1024      # tokens in a packed row, or its longest tree's: attention costs row², not batch²
TREE = 4096     # at most in a tree (a prompt, completions behind it), unless one alone is longer
EVEN = 3072     # row length at which attention costs as much as the rest of a layer, see lay_out()


class Tree(NamedTuple):
    """A prompt and the completions behind it, as a packed row holds them."""
    prompt: list                    # ids
    completions: list               # [(which of the batch's K, ids), …]

    def size(self):
        return len(self.prompt) + sum(len(ids) for _, ids in self.completions)


@dataclass
class Batch:
    """A micro-batch for one forward. Padded (a completion a row) it has no `tree` and `branch`."""
    input_ids: torch.Tensor         # (R, N)
    positions: torch.Tensor         # (R, N) a completion's go on from its prompt's end
    lengths: torch.Tensor           # (R,)   tokens of each row, padding left out
    tree: torch.Tensor | None       # (R, N) which tree of the row; -1 = padding
    branch: torch.Tensor | None     # (R, N) which completion; -1 = prompt or padding
    read: torch.Tensor              # (T,)   where in R·N completion token t is predicted
    target: torch.Tensor            # (T,)   the id of completion token t
    owner: torch.Tensor             # (T,)   which of the K completions token t belongs to
    last: torch.Tensor              # (K,)   where in R·N each completion's last token stands
    count: int                      # K, in the order of the groups given

    def to(self, device):
        moved = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device, non_blocking=True)
        return replace(self, **moved)


def assemble(rows, count, shared):
    """Lays out rows of Trees that hold K = count completions → Batch."""
    lengths = [sum(map(Tree.size, row)) for row in rows]
    width = max(lengths)
    input_ids = []                                           # these four: all R·N places
    positions = []
    tree_of = []
    branch = []
    read = [None] * count
    target = [None] * count
    last = [None] * count

    for row in rows:
        for t, tree in enumerate(row):
            past = len(tree.prompt)
            end_of_prompt = len(input_ids) + past - 1
            for k, ids in [(-1, tree.prompt), *tree.completions]:
                assert ids, "an empty prompt or completion: nothing predicts it"
                if k >= 0:
                    # The prompt's last token predicts a completion's first, each token the next.
                    first = len(input_ids)
                    last[k] = first + len(ids) - 1
                    read[k] = [end_of_prompt, *range(first, last[k])]
                    target[k] = ids
                start = 0 if k < 0 else past
                input_ids += ids
                positions += range(start, start + len(ids))
                tree_of += [t] * len(ids)
                branch += [k] * len(ids)

        padding = -len(input_ids) % width
        input_ids += [0] * padding
        positions += [0] * padding
        tree_of += [-1] * padding
        branch += [-1] * padding

    def grid(values):                                        # (R, N)
        return torch.tensor(values).view(len(rows), width)

    return Batch(
        grid(input_ids), grid(positions), torch.tensor(lengths),
        tree=grid(tree_of) if shared else None,
        branch=grid(branch) if shared else None,
        read=torch.tensor([place for places in read for place in places]),
        target=torch.tensor([token for ids in target for token in ids]),
        owner=torch.tensor([k for k, ids in enumerate(target) for _ in ids]),
        last=torch.tensor(last),
        count=count)


def split_into_trees(groups, longest, even):
    """Groups → Trees, several of a group where repeating its prompt costs less than a long tree.

    With m completions of C tokens behind a prompt of P, each costs (P/m + C) tokens times
    1 + (P + mC)/even for attention; that is least at mC = √(P (P + even)). So a long prompt stands
    once, and many long completions of a short prompt do not pay for attending, masked, to each
    other (16 of 256 tokens behind 100, on a CPU: 2.6 times as fast at width 896, 9 times at 64).
    """
    trees = []
    k = 0
    for group in groups:
        prompt = len(group.prompt_ids)
        room = min(longest - prompt, math.sqrt(prompt * (prompt + even)))
        room = max(room, max(map(len, group.completion_ids)))
        used = math.inf  # the first completion opens a tree
        for ids in group.completion_ids:
            if used + len(ids) > room:
                trees.append(Tree(group.prompt_ids, []))
                used = 0
            trees[-1].completions.append((k, ids))
            used += len(ids)
            k += 1
    return trees


def pack(groups, row=ROW, tree=TREE, even=EVEN):
    """Shared-prefix layout: each prompt once with its completions behind it, several trees a row.

    The number of rows is the smallest that pads at most 5 %, or else the one that pads least.
    """
    trees = sorted(split_into_trees(groups, tree, even), key=Tree.size, reverse=True)
    tokens = sum(map(Tree.size, trees))
    fewest = math.ceil(tokens / max(row, trees[0].size()))
    layouts = []
    for count in range(fewest, len(trees) + 1):
        rows, lengths = deal(trees, Tree.size, count)
        layouts.append((count * max(lengths), rows))         # (tokens computed, rows)
        if layouts[-1][0] <= 1.05 * tokens:
            break
    _, rows = min(layouts, key=lambda layout: layout[0])
    return assemble(rows, sum(len(g.completion_ids) for g in groups), shared=True)


def pad(groups):
    """The plain layout, correct for any causal LM: a row for each completion, padded at its end."""
    rows = []
    for g in groups:
        for ids in g.completion_ids:
            rows.append([Tree(g.prompt_ids, [(len(rows), ids)])])
    return assemble(rows, len(rows), shared=False)


def lay_out(model, groups, packed):
    """The batch of a micro-batch for this model: packed in rows that suit its width, or padded.

    A layer of width h costs about 24 h² operations a token and attention 4 h times the row length:
    even at 6 h.
    """
    if not packed:
        return pad(groups)
    even = 6 * (getattr(model.config, "hidden_size", None) or EVEN // 6)
    return pack(groups, row=min(2 * ROW, max(128, even // 3)), even=even)


def attention_mask(batch, config):
    """What lets a completion see its own prompt and itself, causally; the README has a figure.

    A token attends to those that are not later in the row, stand in the same tree, and are in the
    prompt or in its own completion: (R, 1, N, N), or a dict of two for models with two types of
    layers. Sliding windows count by *position*, not by place in the row. SDPA takes booleans;
    eager attention adds the mask to the scores, so there it is 0 or very negative (a boolean would
    be added as 0 and 1, silently wrong). Padded: (R, N), True where there is a token.
    """
    places = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    if batch.tree is None:
        return places < batch.lengths[:, None]

    # Queries stand in [:, :, None], keys in [:, None].
    mask = (batch.tree[:, :, None] == batch.tree[:, None]) & (places[:, None] >= places)
    own = batch.branch[:, :, None] == batch.branch[:, None]
    mask &= own | (batch.branch[:, None] == -1)
    masks = {"full_attention": mask[:, None]}
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        near = batch.positions[:, :, None] - batch.positions[:, None] < window
        masks["sliding_attention"] = (mask & near)[:, None]
    if config._attn_implementation == "eager":
        lowest = torch.finfo(torch.float32).min
        masks = {name: torch.where(seen, 0.0, lowest) for name, seen in masks.items()}

    types = set(getattr(config, "layer_types", None) or [])
    if len(types) > 1:
        return masks  # the model picks by layer
    if "sliding_attention" in masks and types != {"full_attention"}:
        return masks["sliding_attention"]
    return masks["full_attention"]


# ⑤ log-probs --------------------------------------------------------------------------------------

CHUNK = 2 ** 26      # logits computed at once (256 MiB in float32)


def hidden_states(model, batch):
    """Last hidden states at every place of the batch: (R·N, d), in the dtype of the compute."""
    backbone = getattr(model, model.base_model_prefix)
    inputs = {"input_ids": batch.input_ids, "use_cache": False}
    inputs["attention_mask"] = attention_mask(batch, backbone.config)
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        inputs["position_ids"] = batch.positions
    return backbone(**inputs).last_hidden_state.flatten(0, 1)


def head_logits(model, hidden):
    """The language-model head and what some models do after it, in float32: (n, d) → (n, V)."""
    logits = model.get_output_embeddings()(hidden).float()
    logit_scale = getattr(model.config, "logit_scale", None)             # cohere
    if logit_scale:
        logits = logits * logit_scale
    logits_scaling = getattr(model.config, "logits_scaling", None)       # granite
    if logits_scaling:
        logits = logits / logits_scaling
    cap = getattr(model.config, "final_logit_softcapping", None)         # gemma2, gemma3
    if cap:
        logits = torch.tanh(logits / cap) * cap
    return logits


class GatherLogSoftmax(torch.autograd.Function):
    """log_softmax(logits)[target] in the memory of the logits: (n, V), (n,) → (n,).

    The forward leaves the unnormalised probabilities where the logits were, the backward the
    gradient; usual operations would hold three such arrays, the largest there are. The logits must
    be nobody else's, and the backward runs once.
    """

    @staticmethod
    def forward(ctx, logits, target):
        chosen = logits.gather(1, target[:, None])[:, 0]     # (n,)
        top = logits.amax(1)                                 # (n,)
        total = logits.sub_(top[:, None]).exp_().sum(1)      # (n,)
        ctx.save_for_backward(logits, total, target)
        ctx.spent = False
        return chosen - top - total.log()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # d logp / d logits = one-hot(target) − softmax(logits)
        if ctx.spent:
            raise RuntimeError("the log-probs of a batch can be differentiated once: their memory "
                               "is used again")
        ctx.spent = True
        logits, total, target = ctx.saved_tensors
        logits.mul_(-(grad / total)[:, None])
        return logits.scatter_add_(1, target[:, None], grad[:, None]), None


def through_root(measure):
    """measure(model, …) where FSDP has gathered the weights outside the layers too: embedding, last
    norm, head. A call of the model itself would do that, but head and backbone are used apart."""
    @functools.wraps(measure)
    def call(model, *args, **options):
        if not isinstance(model, FSDPModule):
            return measure(model, *args, **options)
        result = model.run(measure, *args, **options)
        if not torch.is_grad_enabled():  # no backward will give them back
            model.reshard()
        return result
    return call


@through_root
def token_logps(model, batch, temperature=1.0):
    """log π(y_t | x, y_<t) of every completion token, batch.owner says whose: (T,) float32.

    The head runs only where a completion token is predicted, in chunks, and a chunk is recomputed
    in the backward instead of kept. All but the last: its backward comes first, so at the peak it
    is there anyway, and a batch of one chunk recomputes nothing.
    """
    batch = batch.to(next(model.parameters()).device)
    if batch.tree is None:  # padded: the model's own forward, which every causal LM has
        mask = attention_mask(batch, model.config)
        logits = model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits
        logits = logits.flatten(0, 1)[batch.read].float() / temperature
        return logits.log_softmax(-1).gather(1, batch.target[:, None])[:, 0]

    def logps(hidden, target):                               # (n, d), (n,) → (n,)
        logits = head_logits(model, hidden)
        if temperature != 1:
            logits = logits / temperature
        return GatherLogSoftmax.apply(logits, target)

    hidden = hidden_states(model, batch)[batch.read]         # (T, d)
    size = max(1, CHUNK // model.get_output_embeddings().weight.shape[0])
    whole, rest = divmod(len(hidden), size)
    sizes = [rest] * (rest > 0) + [size] * whole             # the last one is a whole one
    *earlier, last = zip(hidden.split(sizes), batch.target.split(sizes))
    done = [checkpoint(logps, *chunk, use_reentrant=False) for chunk in earlier]
    return torch.cat([*done, logps(*last)])


def sum_by(values, owner, count):
    """(T,) values of tokens → (count,) sums; owner (T,) says which sum a token belongs to."""
    return values.new_zeros(count).index_add(0, owner.to(values.device), values)


def completion_logps(model, batch):
    """log π(y|x) of every completion, its end token included: (K,) float32."""
    return sum_by(token_logps(model, batch), batch.owner, batch.count)


@through_root
def reward_scores(model, batch):
    """The reward of every completion, read at its last token, found by length: (K,) float32.

    Backbone in the dtype of autocast, head in float32: in bfloat16 2,000 scores near 4 collapse to
    90 values.
    """
    batch = batch.to(next(model.parameters()).device)
    hidden = hidden_states(model, batch)[batch.last]         # (K, d)
    with torch.autocast(hidden.device.type, enabled=False):
        return model.score(hidden.float())[:, 0].clone()     # of a view FSDP warns


@torch.no_grad()
def for_all(measure, model, groups, budget, packed, autocast, progress):
    """measure(model, batch) of all groups, by micro-batches → one column, float32 on the CPU.
    Collective: each process measures its share.

    It holds the values of all completions, groups in order: one for each completion, (N,), or one
    for each of their tokens, as measure gives them.
    """
    number = {id(g): i for i, g in enumerate(groups)}
    parts = {}                                               # number of a group → its values
    bar = progress_bar(len(groups) / world(), progress, "row")
    for micro, weight in my_micro_batches(groups, budget, packed):
        batch = lay_out(model, micro, packed)
        with autocast:
            values = measure(model, batch).float().cpu()
        # (T,) or (K,)? Where both are as long, every completion has one token: they are the same.
        sizes = [len(g.completion_ids) for g in micro]
        if len(values) == len(batch.target):
            sizes = [sum(map(len, g.completion_ids)) for g in micro]
        parts |= zip([number[id(g)] for g in micro], values.split(sizes))
        bar.update(len(micro) if weight else 0)
    bar.close()
    for others in gather(parts):
        parts |= others
    return torch.cat([parts[i] for i in range(len(groups))])


@torch.no_grad()
def can_pack(model, groups, measure=token_logps):
    """Whether measure(model, batch), logps or scores, is the same packed and padded: a check.

    Collective. A few groups, at most two completions of each, in one tree (even=∞), in float32: the
    shortest three in one row, where a state that runs on from tree to tree would show (Mamba); and
    the longest, where a window that counts by place in the row would (GPT-Neo). Where the two
    differ one line says that training falls back to padding, slower but correct for any causal LM.
    """
    two = [replace(g, completion_ids=g.completion_ids[:2]) for g in groups if g.completion_ids]
    two.sort(key=Group.tokens)
    worst = 0.0
    try:
        for few in (two[:3], [max(two, key=Group.longest)]):
            packed = measure(model, pack(few, row=sum(map(Group.tokens, few)), even=math.inf))
            difference = packed - measure(model, pad(few))
            worst = max(worst, difference.abs().max().item())
        reason = None if worst <= 1e-3 else f"its numbers differ by {worst:.2g}"
    except Exception as error:  # a model that takes no such mask may fail in any way
        reason = first_line(error)
    if reason:
        print(f"packed forward fails with {type(model).__name__} ({reason:.120}): falling back to "
              "padding, slower but correct")
    return all(gather(reason is None))


# ⑥ models -----------------------------------------------------------------------------------------

def read_config(path, flag):
    with failing(f"{flag} {path}: neither a model directory nor a hub id that could be loaded"):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def load_encoder(path, template_file=None, chat=False, flag="--model"):
    """The Encoder of a model directory or hub id. No weights: bad data is found before them."""
    if Path(path).is_file():
        fail(f"{flag} {path}: it is a file; give the model's directory.")
    config = read_config(path, flag)
    generation_config = None
    try:
        generation_config = GenerationConfig.from_pretrained(path)
    except (OSError, ValueError) as error:  # many checkpoints have none
        if (Path(path) / "generation_config.json").exists():
            fail(f"{flag} {path}: generation_config.json cannot be read ({first_line(error)}).")
    ends = getattr(generation_config, "eos_token_id", None)
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and type(end) is not int:
            fail(f"{flag} {path}: eos_token_id in generation_config.json is {end!r:.60}, not a "
                 "number.")
    with failing(f"{flag} {path}: its tokeniser cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        return Encoder(tokenizer, config, generation_config, template_file, chat)


def check_same_tokeniser(encoder, other, what):
    """Log-probs of two models can be compared only where they read the same ids."""
    if encoder.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        fail(f"{what}: its tokeniser differs from the policy's, so log-probs cannot be compared.")


def load_weights(auto_class, path, encoder, device, flag, new=(), **options):
    """A model in float32 and eval mode; a weight that is missing (save `new` ones) is an error.

    Float32 masters on purpose: bfloat16 weights under AdamW at lr 1e-6 realise about 2 % of the
    update. Only safetensors are read, never a pickle, and code from the checkpoint is never run.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()              # one bar at a time: ours
    transformers_logging.set_verbosity_error()               # no table of missing weights
    try:
        with failing(f"{flag} {path}: cannot be loaded"):
            model, info = auto_class.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True, **options)
    finally:
        transformers_logging.set_verbosity(verbosity)

    missing = [name for name in sorted(info["missing_keys"]) if not name.startswith(tuple(new))]
    if missing:
        fail(f"{flag} {path}: the checkpoint lacks {missing[0]}, which would be random.")
    top = max(encoder.tokenizer.get_vocab().values())
    rows = model.get_input_embeddings().weight.shape[0]
    if top >= rows:
        fail(f"{flag} {path}: the tokeniser has ids up to {top}, the model {rows} embeddings; they "
             "do not belong together.")
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            fail(f"{flag} {path}: its weight {name} holds NaN or an infinity; the run that made it "
                 "diverged.")
    return model.to(device).eval()


def load_model(path, encoder, device, flag="--model"):
    """A causal LM in float32 and eval mode: dropout would make policy and reference differ."""
    for name in read_config(path, flag).architectures or []:
        if "SequenceClassification" in name:  # where embeddings are tied no weight is missing
            fail(f"{flag} {path}: {name} is a reward model, not a language model.")
    model = load_weights(AutoModelForCausalLM, path, encoder, device, flag)
    check_causal(model, f"{flag} {path}")
    return model


@torch.no_grad()
def check_causal(model, what):
    """No token may see a later one: AutoModelForCausalLM also loads a BERT, which sees them all."""
    device = next(model.parameters()).device
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[1, 2, 3, 4], [1, 5, 6, 7]], device=device) % size
    with failing(f"{what}: it cannot be run on four tokens"):
        logits = model(ids).logits
    if (logits[0, 0] - logits[1, 0]).abs().max() > 1e-4 * logits[0, 0].abs().max():
        fail(f"{what}: {type(model).__name__} is not causal (what follows a token changes its "
             "prediction), so it is no language model that could be sampled from.")


def load_reward_model(path, encoder, device, flag="--reward-model", new_head=False):
    """A reward model in float32 and eval mode: AutoModelForSequenceClassification with one label.

    new_head=True is for training: a causal LM gets a new random head (torch's generator), a reward
    model keeps its own. For scoring a missing head is an error, since a random one would give
    numbers that look like scores.
    """
    trained = has_reward_head(path, flag)
    if not trained and not new_head:
        fail(f"{flag} {path} is a language model, not a reward model: its head would be random; "
             "train one with train_rm.py.")

    new = () if trained else ("score.",)
    model = load_weights(
        AutoModelForSequenceClassification, path, encoder, device, flag, new, num_labels=1)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        fail(f"{flag} {path}: {type(model).__name__} has no linear head called score.")
    check_statistics(model.config, f"{flag} {path}")
    pad_id = encoder.tokenizer.pad_token_id
    model.config.pad_token_id = encoder.eos if pad_id is None else pad_id
    return model


def has_reward_head(path, flag):
    """Whether a model says that it has a head for one score; one for several is an error."""
    config = read_config(path, flag)
    trained = any("SequenceClassification" in name for name in config.architectures or [])
    if trained and config.num_labels != 1:
        fail(f"{flag} {path}: its head has {config.num_labels} outputs, a reward model has one.")
    return trained


def check_statistics(config, what):
    """What train_rm.py's note_statistics() stored, where it is there: numbers to divide by."""
    def is_number(value):
        return type(value) in (int, float) and math.isfinite(value)

    for name in ("reward_mean", "reward_std"):
        value = getattr(config, name, None)
        if value is not None and not (is_number(value) and (value >= 0 or name == "reward_mean")):
            fail(f"{what}: {name} in its config is {value!r:.60}, which cannot be one.")
    curve = getattr(config, "reward_by_length", None)
    if curve is None:
        return
    with failing(f"{what}: reward_by_length in its config is no list of [length, score]"):
        rising = [length for length, _ in curve]
        if not rising or rising != sorted(set(rising)):
            raise ValueError("the lengths do not rise")
        if not all(is_number(value) for knot in curve for value in knot):
            raise ValueError("not all are finite numbers")


def calibrate(scores, lengths, curve, mean):
    """Scores without what their length explains: score − curve(length) + mean, (n,) float64.

    Huang et al. 2024, arXiv 2409.17407. scores, lengths: (n,); curve: see length_curve(). Between
    its knots straight lines, beyond the ends constant: a line there would be an extrapolation.
    """
    knots, values = zip(*curve)
    expected = torch.from_numpy(numpy.interp(lengths, knots, values))
    return torch.as_tensor(scores, dtype=torch.float64) - expected + mean


def length_curve(scores, lengths, bins=50):
    """[[mean length, mean score], …] of about equally full bins: what length alone predicts.

    A common length has a bin of its own. The paper of calibrate() fits a locally weighted
    regression; means of bins serve as well.
    """
    lengths = torch.as_tensor(lengths, dtype=torch.float64)
    scores = torch.as_tensor(scores, dtype=torch.float64)
    fractions = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:]
    bin_of = torch.searchsorted(lengths.quantile(fractions).unique(), lengths)   # (below, edge]
    curve = []
    for one in bin_of.unique():
        inside = bin_of == one
        curve.append([lengths[inside].mean().item(), scores[inside].mean().item()])
    return curve


# ⑦ sample -----------------------------------------------------------------------------------------

@dataclass
class Sample:
    """A sampled completion."""
    ids: list                       # with the end token where it ended by itself
    logps: list                     # of these ids at the sampling temperature, before top-p
    ended: bool                     # False: truncated at max_new_tokens


class Room(DynamicLayer):
    """A cache layer with room for whole completions, taken once; transformers' own copies all of
    itself for every token.

    Rows that stay move to the front, and view() says what takes part. So no address changes, nor a
    shape within a view, and where the next token goes can be a tensor: what a CUDA graph needs.
    """
    room = None    # keys and values: 2 × (rows, heads, length, d)
    length = 0     # tokens that there is room for
    column = None  # (1,) where the next token goes; None: the last column of the view

    def view(self, rows, end):
        self.keys, self.values = (room[:rows, :, :end] for room in self.room)

    def get_seq_length(self):
        return self.keys.shape[-2] - 1  # a view includes the token that is under way

    def update(self, key_states, value_states, *args, **kwargs):
        for now, new in ((self.keys, key_states), (self.values, value_states)):
            if self.column is None:
                now[:, :, -1:] = new
            else:
                now.index_copy_(2, self.column, new.to(now.dtype))
        return self.keys, self.values

    def reorder_cache(self, stay):
        rows = len(stay)
        used = self.keys.shape[-2]
        now = (self.keys, self.values)
        if self.room is None:
            make = self.keys.new_empty if self.column is None else self.keys.new_zeros  # no NaN
            self.room = [make(rows, k.shape[1], self.length, k.shape[3]) for k in now]
            for room, old in zip(self.room, now):            # straight into its place
                torch.index_select(old, 0, stay, out=room[:rows, :, :used])
        else:
            for room, old in zip(self.room, now):
                room[:rows, :, :used] = old.index_select(0, stay)
        self.view(rows, used)


class Replay:
    """f() as it is, or on CUDA recorded for each key and replayed: one launch, not a thousand.

    The first call of a key runs as it is (libraries set themselves up), the second records, all
    others replay. What f reads and writes must stay where it is; its result is overwritten by the
    next call of the same key.
    """

    def __init__(self, on):
        self.on = on
        self.recorded = {}               # key → (graph, result), or None after the first call
        self.pool = torch.cuda.graph_pool_handle() if on else None

    def __call__(self, key, f):
        if not self.on:
            return f()
        if key not in self.recorded:
            self.recorded[key] = None
            return f()
        if self.recorded[key] is None:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self.pool):
                    result = f()
            except RuntimeError as error:  # the model asks the device for a number in between
                tqdm.write(f"sampling is slower: a step cannot be recorded ({first_line(error)})")
                self.on = False
                return f()
            self.recorded[key] = (graph, result)
        graph, result = self.recorded[key]
        graph.replay()
        return result


WIDTH = 256          # the cache of a recorded step grows by so many tokens
LOOK = 16            # tokens between two looks at which rows have ended


class Decoder:
    """A model with its cache: n rows for each prompt (the longest last), a token of each at a time.

    coarse: few different shapes occur, for each is recorded: rows leave by halves and the cache
    grows by WIDTH. Default: on CUDA. Elsewhere nothing is computed in vain.
    """

    def __init__(self, model, prompts, n, max_new_tokens, coarse=None):
        device = next(model.parameters()).device
        self.model = model
        self.takes = inspect.signature(model.forward).parameters
        self.end = width = len(prompts[-1])                  # columns that hold a token

        # Padded on the left: all completions begin in one column.
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        mask = torch.arange(width, device=device) >= width - lengths[:, None]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = self.forward(ids, mask.long(), positions, None)
        self.cache = getattr(out, "past_key_values", None)
        if self.cache is None:
            fail(f"{type(model).__name__} keeps no past_key_values, so it cannot be sampled from "
                 "here; train_dpo.py --eval-samples 0 trains it without samples.")

        # With a window or without SDPA the model makes its masks itself, of the exact length.
        layers = getattr(self.cache, "layers", [])           # windows and states keep their own
        self.rooms = [layer for layer in layers if type(layer) is DynamicLayer]
        self.own_mask = (
            0 < len(self.rooms) == len(layers) and "position_ids" in self.takes
            and model.config._attn_implementation == "sdpa")
        self.coarse = self.own_mask and (device.type == "cuda" if coarse is None else coarse)
        self.replay = Replay(self.coarse and device.type == "cuda")
        self.column = torch.tensor([width], device=device) if self.coarse else None

        # The prompts are prefilled: now every one n times.
        longest = self.columns(width + max_new_tokens)
        for layer in self.rooms:
            layer.__class__ = Room
            layer.length = longest
            layer.column = self.column
        each = torch.arange(len(prompts), device=device).repeat_interleave(n)
        self.cache.reorder_cache(each)
        self.logits = out.logits[:, -1][each]                # (rows, V)
        self.ids = ids.new_zeros(len(each), 1)               # (rows, 1)
        self.positions = positions[each, -1:]                # (rows, 1)
        self.mask = F.pad(mask, (0, longest - width))[each]  # (rows, longest)

    def forward(self, ids, mask, positions, cache):
        inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
        if "position_ids" in self.takes:
            inputs["position_ids"] = positions
        if "logits_to_keep" in self.takes:
            inputs["logits_to_keep"] = 1
        return self.model(**inputs, use_cache=True)

    def columns(self, end):
        return math.ceil(end / WIDTH) * WIDTH if self.coarse else end

    def rows_for(self, running):
        """How many rows stay where so many still run."""
        return 2 ** (running - 1).bit_length() if self.coarse else running

    def step(self, token):
        """Every row's token (rows,) goes in → logits of the next one: (rows, V)."""
        rows = len(token)
        self.ids[:rows, 0] = token
        self.positions += 1
        self.mask[:, self.end] = True
        if self.coarse:
            self.column.fill_(self.end)
        self.end += 1
        seen = self.columns(self.end)
        for layer in self.rooms:
            layer.view(rows, seen)
        mask = self.mask[:rows, :seen]
        mask = mask[:, None, None] if self.own_mask else mask.long()

        def compute():
            out = self.forward(self.ids[:rows], mask, self.positions[:rows], self.cache)
            return out.logits[:, -1]
        return self.replay((rows, seen), compute)

    def keep(self, stay):
        """These rows go on, the others leave the batch."""
        self.cache.reorder_cache(stay)  # unlike batch_select_indices also for linear attention
        for column in (self.ids, self.positions, self.mask):
            column[:len(stay)] = column[stay]


def uniforms(prompts, n, max_new_tokens, seed):
    """Uniform numbers for n completions of each of P prompts: (P, n, max_new_tokens) float64.

    Seeded by the prompt and by how often it came before, so its place in the list does not matter.
    """
    seen = Counter()
    rows = []
    for prompt in prompts:
        key = str(prompt)
        seen[key] += 1
        digest = hashlib.sha256(f"{seed} {key} {seen[key]}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rows.append(torch.rand(n, max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


@torch.no_grad()
def sample(
        model, prompts, n, max_new_tokens, stops, temperature=1.0, top_p=1.0, greedy=False,
        seed=0, cache_tokens=None, progress=None, coarse=None):
    """n completions of each of P prompts (lists of ids) → P·n Samples, number i of prompt i // n.
    Collective: each process samples its share, for all to have.

    Each prompt is prefilled once and its cache repeated n times; completions that ended leave the
    batch. Nothing is taken from the checkpoint's generation_config. Sampling inverts the CDF at
    uniforms that are drawn up front, seeded by the prompt: in float32 what is sampled depends
    neither on the batch and order of the prompts nor on when others end. In bfloat16 rounding
    depends on the batch, and a token now and then with it. cache_tokens bounds rows × (prompt +
    completion) of one batch: memory only. coarse: see Decoder.
    """
    if not greedy and not (temperature > 0 and 0 < top_p <= 1):
        raise ValueError(f"sampling needs temperature > 0 and 0 < top_p <= 1, not {temperature} "
                         f"and {top_p}; greedy=True is the limit T → 0")
    if not prompts:
        return []
    numbers = uniforms(prompts, n, max_new_tokens, seed)
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    waiting = waiting[rank()::world()]
    results = {}                                             # number of a prompt → its n Samples
    bar = progress_bar(len(waiting) * n, progress, "sample")
    was_training = model.training
    model.eval()  # train mode with checkpointing silently drops the cache
    try:
        whole = model_to_sample(model)
        cache_tokens = cache_tokens or cache_room(whole)
        while waiting:
            # As many prompts, alike in length, as the cache can hold.
            size = 1
            for i in waiting[1:]:
                if (size + 1) * n * (len(prompts[i]) + max_new_tokens) > cache_tokens:
                    break
                size += 1
            batch = waiting[:size]
            waiting = waiting[size:]
            samples = sample_batch(
                whole, [prompts[i] for i in batch], numbers[batch], stops,
                1.0 if greedy else temperature, top_p, greedy, bar, coarse)
            for j, i in enumerate(batch):
                results[i] = samples[j * n:(j + 1) * n]
    finally:
        model.train(was_training)
        bar.close()
    for others in gather(results):
        results |= others
    return [s for i in range(len(prompts)) for s in results[i]]


def model_to_sample(model):
    """The model itself or, on CUDA and where it is sharded, a whole copy of it in the dtype of the
    compute: no casts, LoRA merged, a cache of half the size. Collective."""
    device = next(model.parameters()).device
    if device.type != "cuda" and not isinstance(model, FSDPModule):
        return model
    with torch.device(device):
        copy = AutoModelForCausalLM.from_config(model.config, dtype=compute_dtype(device)).eval()
    places = copy.state_dict()                               # they share memory with the copy
    random = dict(copy.named_parameters())
    for name, weight in whole_weights(model):
        places[name].copy_(weight)
        random.pop(name, None)
    assert not random, f"{min(random)} was not copied"
    return copy


def sample_batch(model, prompts, uniform, stops, temperature, top_p, greedy, bar, coarse=None):
    """Prompts that share a cache, the longest last → Samples. uniform: (P, n, max_new_tokens)."""
    device = next(model.parameters()).device
    n, max_new_tokens = uniform.shape[1:]
    uniform = uniform.flatten(0, 1).to(device)               # (P·n, max_new_tokens)
    stop = torch.tensor(stops, device=device)
    decoder = Decoder(model, prompts, n, max_new_tokens, coarse)

    rows = torch.arange(len(uniform), device=device)         # which completions are in the batch
    ended = torch.zeros(len(uniform), dtype=torch.bool, device=device)
    running = len(uniform)
    steps = []                                               # (rows, their tokens, the log-probs)
    for t in range(max_new_tokens):
        logits = decoder.step(token) if t else decoder.logits
        logp = (logits.float() / temperature).log_softmax(-1)            # (rows, V)
        token = logp.argmax(-1) if greedy else draw(logp.exp(), uniform[rows, t], top_p)
        steps.append((rows, token, logp.gather(1, token[:, None])[:, 0]))

        # Completions that ended leave: cost follows the tokens made. To look is to wait for a GPU.
        ended = ended | torch.isin(token, stop)
        if decoder.coarse and t % LOOK < LOOK - 1:
            continue
        left = len(rows) - int(ended.sum())
        bar.update(running - left)
        running = left
        if running == 0:
            break
        if decoder.rows_for(running) < len(rows):
            stay = ended.to(torch.uint8).argsort(stable=True)[:decoder.rows_for(running)]
            decoder.keep(stay)
            rows = rows[stay]
            token = token[stay]
            ended = ended[stay]

    if not torch.cat([logps for *_, logps in steps]).isfinite().all():
        fail("sampling: the model gives probabilities that are not finite numbers (weights that "
             "diverged, or a --temperature near 0).")
    samples = [Sample([], [], False) for _ in uniform]
    for step in steps:
        for row, token, logp in zip(*[column.tolist() for column in step]):
            if not samples[row].ended:                       # a coarse batch may go on behind it
                samples[row].ids.append(token)
                samples[row].logps.append(logp)
                samples[row].ended = token in stops
    bar.update(running)
    return samples


def cache_room(model):
    """Tokens that the cache of a batch may hold; on CUDA what 40 % of the free memory takes."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return 2 ** 17
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
    return int(0.4 * torch.cuda.mem_get_info(device)[0] / each)


def draw(probs, u, top_p=1.0):
    """Inverse CDF: the first token whose cumulative probability exceeds u; (n, V), (n,) → (n,)."""
    if top_p < 1:  # the smallest set of tokens that holds at least top_p
        p, index = probs.sort(-1, descending=True)
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
        probs = torch.zeros_like(probs).scatter(1, index, p)
    # Float32 sums of 150,000 lose the tail.
    wide = torch.float32 if probs.device.type == "mps" else torch.float64

    # In two levels, blocks of 128 tokens and then one of them: one long sum of V numbers in float64
    # would cost more than the rest of a step.
    blocks = F.pad(probs, (0, -probs.shape[1] % 128)).unflatten(1, (-1, 128))    # (n, V/128, 128)
    sums = blocks.sum(-1, dtype=wide)                                            # (n, V/128)
    cdf = sums.cumsum(1)
    at = u.to(wide)[:, None] * cdf[:, -1:]                                       # (n, 1)
    block = torch.searchsorted(cdf, at, right=True).clamp(max=cdf.shape[1] - 1)  # (n, 1)
    rows = torch.arange(len(probs), device=probs.device)
    within = blocks[rows, block[:, 0]].cumsum(1, dtype=wide)                     # (n, 128)
    rest = at - (cdf.gather(1, block) - sums.gather(1, block))
    rest = rest.minimum(within[:, -1:] * (1 - 2 ** -20))     # rounding must not pass the last one
    place = torch.searchsorted(within, rest, right=True).clamp(max=127)
    return (128 * block + place)[:, 0].clamp(max=probs.shape[1] - 1)


# ⑧ scale ------------------------------------------------------------------------------------------

def trained(model):
    """{name: parameter} of what is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def add_lora(model, args):
    """--lora-rank: an adapter on every linear layer but the head → peft's handle on it, or None.

    It is put into the model itself, which keeps its class and its backbone; only the adapter (and
    a reward model's head) is trained. On CUDA the frozen weights take the dtype of the compute.
    """
    if not args.lora_rank:
        return None
    from peft import LoraConfig, get_peft_model  # here, since it is an optional package
    device = next(model.parameters()).device
    with pick_autocast(args.dtype, device):
        low = compute_dtype(device)
    for name, p in model.named_parameters():
        if device.type == "cuda" and not name.startswith("score."):
            p.data = p.data.to(low)

    torch.manual_seed(args.seed)  # A is random, B is 0: at the start nothing changes
    config = LoraConfig(
        r=args.lora_rank, lora_alpha=args.lora_alpha or 32, target_modules="all-linear",
        task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM")
    adapter = get_peft_model(model, config)
    model.eval()  # what peft adds is in train mode
    return adapter


@contextmanager
def adapter_off(model):
    """The model as it was before LoRA changed it; any other model, or None, as it is."""
    adapted = []
    if model is not None:
        adapted = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    for module in adapted:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters(True)


def wrap_layers(model, args):
    """--compile and --gradient-checkpointing: what they do, they do to one layer at a time."""
    if (args.gradient_checkpointing or args.compile) and not layers_of(model):
        fail(f"--gradient-checkpointing, --compile: {type(model).__name__} does not say what its "
             "layers are.")
    if args.compile:
        print("--compile: the first forward takes a minute or more")
    for layer in layers_of(model):
        if args.compile:
            layer.forward = compiled(layer.forward)
        if args.gradient_checkpointing:  # transformers' switch needs train mode, which has dropout
            layer.forward = functools.partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def compiled(forward):
    """A layer's forward, compiled once for all shapes. Sampling, with a cache, stays as it is."""
    fast = torch.compile(forward, dynamic=True)

    @functools.wraps(forward)
    def call(*args, **kwargs):
        cached = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        return (forward if cached else fast)(*args, **kwargs)
    return call


def shard(model, args):
    """FSDP2, under torchrun: each process keeps its share of every weight, gradient and moment.

    The weights of a layer are gathered while it computes: kept in float32, gathered in the dtype of
    the compute.
    """
    if world() == 1:
        return
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (world(),))
    with pick_autocast(args.dtype, device):
        low = compute_dtype(device)
    policy = MixedPrecisionPolicy()
    if low != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if hasattr(model, "score"):
        fully_shard(model.score, mesh=mesh)                  # a reward's head computes in float32
    fully_shard(model, mesh=mesh, mp_policy=policy)

    def run(self, measure, *args, **options):
        return measure(self, *args, **options)

    model.run = types.MethodType(run, model)
    register_fsdp_forward_method(model, "run")               # see through_root()


def whole(tensor):
    """A weight, gradient or moment without its sharding. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor, like):
    """Of a whole tensor what belongs where `like` is: this process's share, or all of it."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def collect(named):
    """[(name, tensor)] → {name: whole tensor on the CPU} in the first process, {} in the others.
    One at a time, so that no GPU holds them all. Collective."""
    tensors = {}
    for name, tensor in named:
        tensor = whole(tensor)
        if rank() == 0:
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


@torch.no_grad()
def whole_weights(model):
    """(name, weight) of a plain checkpoint, one whole tensor after the other, LoRA added to the
    weights that it adapts. Collective."""
    kept = model.state_dict()
    adapted = {name: m for name, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    for name, p in model.named_parameters():
        if ".lora_" in name or ".original_module." in name:
            continue
        layer = adapted.get(name.removesuffix(".base_layer.weight"))
        weight = p.detach()
        if layer is not None:
            weight = weight + layer.get_delta_weight("default")
        plain = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        yield plain, whole(weight)
    for name, buffer in model.named_buffers():
        if name in kept:
            yield name, buffer


def memory_needed(model, groups, packed, args):
    """About what a process will need: (bytes of weights, gradients and AdamW's moments; bytes of
    the activations of the largest micro-batch of these groups; its tokens).

    The activations are measured: by how much a group more raises what autograd keeps.
    """
    fixed = 0
    for p in model.parameters():
        fixed += p.numel() * (16 if p.requires_grad else p.element_size())

    one = groups[0]
    tokens = args.micro_batch_tokens
    if one.completion_ids:
        micros = micro_batches(groups, tokens, packed)
        tokens = max(sum(map(Group.tokens, micro)) for micro in micros)
    else:  # nothing is sampled yet
        one = replace(one, completion_ids=[one.prompt_ids])
    more = kept_bytes(model, [one, one], packed, args) - kept_bytes(model, [one], packed, args)
    return fixed / world(), more / one.tokens() * tokens, tokens


def kept_bytes(model, groups, packed, args):
    """Bytes that autograd keeps for the backward of these groups, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = next(model.parameters()).device
    batch = lay_out(model, groups, packed).to(device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with pick_autocast(args.dtype, device):
            if packed:  # the head keeps at most CHUNK logits
                result = hidden_states(model, batch)
            else:
                result = model(input_ids=batch.input_ids, use_cache=False).logits
    del result  # not before: freed memory may come again
    return sum(kept.values())


def device_memory(device):
    """Bytes that the device has, or infinity where it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / world()
    return math.inf


# ⑨ run directory ----------------------------------------------------------------------------------

# Flags that may differ between the start of a run and --resume: those that change no result …
FREE = {
    "resume", "output_dir", "eval_every", "eval_samples", "save_every", "micro_batch_tokens",
    "device", "gradient_checkpointing", "compile"}
# … and those that a user may change on purpose; it is said, since the run is another one then.
ANNOUNCED = {"max_steps", "epochs", "learning_rate", "threads"}


def identity(path):
    """What a path leads to: the same for links and `..`, None where there is nothing."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):                            # ValueError: a NUL in the name
        return None
    return found.st_dev, found.st_ino


def holds(folder, path):
    """Whether a path is a folder (or file) or lies in it, whatever links lead there."""
    places = [path, *Path(path).resolve().parents]
    return identity(folder) is not None and identity(folder) in map(identity, places)


def check_paths(reads, writes):
    """What is written must not be what is read: the same file, a file in a model's directory, or a
    directory that holds it.

    reads, writes: [(flag, path), …]. What does not exist, a hub id for example, is passed over.
    """
    for flag, path in [*reads, *writes]:
        if not str(path).strip() or "\0" in str(path):
            fail(f"{flag}: {str(path)!r:.60} is no name.")
    for flag, path in reads:
        if identity(path) is None:
            continue
        parts = [path, *Path(path).iterdir()] if Path(path).is_dir() else [path]
        for out_flag, out in writes:
            is_folder = Path(out).is_dir() or out_flag == "--output-dir"
            if any(holds(out, part) for part in parts) or not is_folder and holds(path, out):
                fail(f"{flag} {path} and {out_flag} {out} overlap: what is read would be written "
                     "over or moved; choose another place to write.")
    for i, (flag, path) in enumerate(writes):
        for other_flag, other in writes[:i]:
            if Path(path).resolve() == Path(other).resolve() or holds(other, path):
                fail(f"{other_flag} and {flag} must be different files.")


def paths_of(args, names):
    """[(flag, path), …] of flags that name files and folders: each is a path, None, or a list."""
    paths = []
    for name in names:
        value = getattr(args, name)
        for path in value if isinstance(value, list) else [value]:
            if path is not None:
                paths.append((f"--{name.replace('_', '-')}", path))
    return paths


def check_run(args, names):
    """The flags of a trainer that name files and folders, before anything is loaded.

    names: of those that are read, see paths_of(); a path may also be file.py:function.
    """
    for name, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        if any(isinstance(one, str) and (not one.strip() or "\0" in one) for one in values):
            fail(f"--{name.replace('_', '-')}: {values!r:.60} names nothing.")
    if args.lora_alpha and not args.lora_rank:
        fail("--lora-alpha: without --lora-rank there is no adapter that it could scale.")
    reads = []
    for flag, path in paths_of(args, names):
        with failing(f"{flag} {path:.60}: it is no name"):
            file = path if Path(path).exists() else path.rpartition(":")[0] or path
        reads.append((flag, file))
    files = [path for path in (args.dataset, args.eval_dataset) if path]
    if args.split != "train" and all(Path(path).is_file() for path in files):
        fail(f"--split {args.split}: {', '.join(files)} is a file, and files have no splits.")

    out = Path(args.output_dir)
    with failing(f"--output-dir {args.output_dir:.60}: cannot be used"):
        out.exists()                                         # raises for a name that none can have
        places = [out, *out.absolute().parents]
        above = next(folder for folder in places if os.path.lexists(folder))
        if not above.is_dir():
            fail(f"--output-dir {out}: {above} is a file, or a link to nothing.")
        if not os.access(above, os.W_OK):
            fail(f"--output-dir {out}: {above} cannot be written.")
    for place in (".", __file__, Path.home(), tempfile.gettempdir()):
        if holds(out, place):
            fail(f"--output-dir {out} holds more than a run ({Path(place).resolve()}): give a "
                 "folder of its own.")
    check_paths(reads, [("--output-dir", args.output_dir)])
    if args.resume and newest_checkpoint(out)[1] is None:
        fail(f"--resume: there is no checkpoint in {out / 'checkpoint'}.")
    if (out / "lock").exists() and os.environ.get("RANK", "0") == "0":
        lock(out)


HELD = []                            # [(open lock file, its path)] of this process


def lock(out):
    """One run at a time writes in a directory: its file `lock` holds the number of the process.

    The system frees the lock when the process ends, however it ends, so a stale one is taken over.
    """
    unlock()
    path = Path(out).resolve() / "lock"
    file = open(path, "a+", encoding="utf-8")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        fail(f"--output-dir {out}: another run writes there (process {file.read().strip()}); wait "
             "for it or choose another directory.")
    except OSError:                                          # a file system without locks
        pass
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    HELD.append((file, path))


def unlock():
    while HELD:
        file, path = HELD.pop()
        path.unlink(missing_ok=True)
        file.close()


def write_beside(file, text):
    """Writes a file under another name, then renames it: a reader or a kill finds it whole."""
    if rank():
        return
    file = Path(file).resolve()                              # a link stays one
    if file.exists() and not file.is_file():                 # a pipe, /dev/null
        file.write_text(text, encoding="utf-8")
        return
    with renamed(file) as writing:
        writing.write_text(text, encoding="utf-8")


@contextmanager
def renamed(file):
    """Another name to write under: renamed into place where all goes well, else removed."""
    writing = file.with_name(file.name + ".writing")
    try:
        yield writing
        os.replace(writing, file)
    except OSError:                                          # a full disk: leave it no fuller
        writing.unlink(missing_ok=True)
        raise


def write_lines(file, rows):
    write_beside(file, "".join(json.dumps(row) + "\n" for row in rows))


def read_lines(file):
    """The objects of a .jsonl file that a run writes; a last line that a kill tore is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def log(out, step, values):
    """One more line of metrics.jsonl. What is not finite becomes null: JSON has no NaN."""
    if rank():
        return
    row = {name: value if math.isfinite(value) else None for name, value in values.items()}
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step} | row) + "\n")


def data_fingerprint(groups):
    """Hash of all that a run reads of its data: token ids, labels and every column."""
    digest = hashlib.sha256()
    for g in groups:
        labels = (g.scores, g.margin, g.p_chosen)
        digest.update(repr((g.prompt_ids, g.completion_ids, labels, g.row)).encode())
    return digest.hexdigest()


def model_fingerprint(model):
    """Hash of a model's config and weights."""
    config = model.config.to_diff_dict()
    config = {k: v for k, v in config.items() if k not in ("transformers_version", "_name_or_path")}
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def file_fingerprint(path):
    """Hash of a file, or of the files of a model's directory."""
    digest = hashlib.sha256()
    files = sorted(Path(path).glob("*.json")) + sorted(Path(path).glob("*.safetensors"))
    for file in files if Path(path).is_dir() else [Path(path)]:
        with open(file, "rb") as opened:
            while block := opened.read(2 ** 20):
                digest.update(block)
    return digest.hexdigest()


def newest_checkpoint(out):
    """(updates, file) of the newest checkpoint of a run directory, or (0, None)."""
    newest = (0, None)
    for file in Path(out).glob("checkpoint/step-*.safetensors"):
        number = file.stem.removeprefix("step-")
        if number.isdecimal() and int(number) >= newest[0]:
            newest = (int(number), file)
    return newest


# What is in a directory that a run would write over: such a directory is kept, under another name.
TRACES = (
    "args.json", "metrics.jsonl", "completions.jsonl", "checkpoint", "config.json",
    "model.safetensors", "model.safetensors.index.json", "tokenizer.json")


def open_run(args, steps, depends):
    """The run directory → (its path, updates already done).

    depends: hashes of what the run depends on beside its flags, which --resume compares. A new run
    begins in an empty directory: what an earlier one left is renamed as a whole to NAME-1, NAME-2,
    …
    """
    out = Path(args.output_dir)
    if args.resume:
        return out, check_resume(out, steps, run_record(args, depends))

    with failing(f"--output-dir {out}: cannot be written"):
        here = out.resolve()                                 # where it is a link, the link stays
        here.mkdir(parents=True, exist_ok=True)
        lock(out)
        begun = {name for name in TRACES if (out / name).exists()}
        logs = {"args.json", "metrics.jsonl"}                # of a start that failed: all there is
        if begun and not (begun == logs and not (out / "metrics.jsonl").stat().st_size):
            number = 1
            while here.with_name(f"{here.name}-{number}").exists():
                number += 1
            earlier = here.with_name(f"{here.name}-{number}")
            os.replace(here, earlier)
            print(f"{out}: an earlier run was here; it is kept as {earlier}")
            here.mkdir(exist_ok=True)
            lock(out)
            (earlier / "lock").unlink()
    return out, 0


def run_record(args, depends):
    """What args.json says of a run: its flags and what else its numbers depend on."""
    return vars(args) | depends | {"threads": torch.get_num_threads()}


def open_logs(out, start, args, depends):
    """args.json and metrics.jsonl, once all is loaded → whether the run was evaluated at `start`.

    Lines of metrics.jsonl from after the checkpoint are dropped: their steps will be done again.
    """
    lines = read_lines(out / "metrics.jsonl") if args.resume else []
    lines = [line for line in lines if line["step"] <= start]
    with failing(f"--output-dir {out}: cannot be written"):
        write_lines(out / "metrics.jsonl", lines)
        text = json.dumps(run_record(args, depends), indent=1)
        write_beside(out / "args.json", text + "\n")
    return any(line["step"] == start and "eval/n" in line for line in lines)


def check_resume(out, steps, record):
    """--resume: flags, data and model must be those of the start → the updates done."""
    done, file = newest_checkpoint(out)
    if file is None:
        fail(f"--resume: there is no checkpoint in {out / 'checkpoint'}.")
    if done > steps:
        fail(f"--resume: the checkpoint is after step {done}, but --max-steps and --epochs end "
             f"this run at {steps}.")
    with failing(f"--resume: args.json or metrics.jsonl in {out} cannot be read"):
        lock(out)
        before = json.loads((out / "args.json").read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError("args.json is no object")
        [line["step"] <= done for line in read_lines(out / "metrics.jsonl")]

    record = json.loads(json.dumps(record))
    for name, value in record.items():
        is_flag = not name.endswith("sha256") and name != "threads"
        what = f"--{name.replace('_', '-')}" if is_flag else name.removesuffix("_sha256")
        if name not in before:
            fail(f"--resume: args.json in {out} lacks '{name}': another script or version wrote "
                 "it.")
        if name in FREE or before[name] == value:
            continue
        if name == "reward_sha256":
            print("--resume: the reward is not what it was at this run's start; from here on the "
                  "new one counts")
        elif name in ANNOUNCED:
            print(f"--resume: {what} was {before[name]} and is {value} from here on"
                  + "; the last digits may differ" * (name == "threads"))
        elif not is_flag:
            fail(f"--resume: the {what} is not what it was at this run's start.")
        else:
            fail(f"--resume: this run began with {what} {before[name]}, not {value}.")
    return done


def save_tensors(tensors, file):
    """A safetensors file, renamed into place whole."""
    if rank():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with renamed(file) as writing:
        try:
            save_file(tensors, writing)
        except SafetensorError as error:                     # its word for a full disk
            raise OSError(f"{writing}: {error}") from error


def save_checkpoint(out, model, optimizer, step, extra):
    """Weights and AdamW's state after `step` updates, in one file that is renamed into place whole.

    Tensors are whole, so a run goes on with any number of processes; all of them must call this.
    extra: name → number, what the loop remembers besides. No random state is kept: every random
    draw is a function of the seed and the step. The checkpoint before this one stays too, and
    weights that are not finite take nobody's place.
    """
    tensors = {f"weight {name}": p for name, p in trained(model).items()}
    for i, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            tensors[f"adamw {i} {name}"] = value
    state = collect(tensors.items())
    for name, value in (extra | {"step": step, "tensors": len(state) + len(extra) + 2}).items():
        state[f"extra {name}"] = torch.tensor(value, dtype=torch.float64)
    if rank():
        return
    folder = out / "checkpoint"
    file = folder / f"step-{step}.safetensors"
    done, before = newest_checkpoint(out)
    kept = f"--resume goes on from step {done}" if done else "there is no checkpoint before it"
    if not all(torch.isfinite(tensor).all() for tensor in state.values()):
        fail(f"step {step}: the weights are no longer finite numbers, so they are not saved; "
             f"{kept}, with a lower --lr.")
    try:
        save_tensors(state, file)
    except OSError as error:
        fail(f"step {step}: the checkpoint cannot be written ({first_line(error)}); {kept}.")
    for old in folder.glob("step-*.safetensors"):
        if old not in (before, file):
            old.unlink()


def load_checkpoint(out, model, optimizer):
    """Restores model and optimizer from the newest checkpoint of a run directory → extra."""
    done, file = newest_checkpoint(out)
    with failing(f"--resume: the checkpoint {file} cannot be read; without it, that of an earlier "
                 "step is taken"):
        state = load_file(file)
    weights = trained(model)
    in_order = list(weights.values())                        # as the optimizer numbers them
    restored = set()
    moments = {}
    extra = {}
    with failing(f"--resume: the checkpoint {file} is not of this run"), torch.no_grad():
        for key, value in state.items():
            kind, *i, name = key.split(" ")
            if kind == "extra":
                extra[name] = value.item()
                continue
            p = weights[name] if kind == "weight" else in_order[int(*i)]
            if name != "step" and (value.shape != p.shape or not torch.isfinite(value).all()):
                raise ValueError(f"{key} has another shape or holds NaN")
            if kind == "weight":
                p.copy_(part(value, p))
                restored.add(name)
            else:
                moments.setdefault(int(*i), {})[name] = part(value, p)
        # What the file says of itself.
        complete = extra.pop("tensors") == len(state) and restored == set(weights)
        if extra.pop("step") != done or not complete:
            raise ValueError("tensors are missing or too many, or it is of another step")
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return extra


def describe_run(model, train, held_out, plan, args, packed, needed):
    """The start lines: sizes, memory (needed: what memory_needed() gives), and what packing saves
    and costs, counted on the first step."""
    weights = sum(p.numel() for p in model.parameters())
    changing = sum(p.numel() for p in trained(model).values())
    groups = [train[i] for i in plan[0]]
    device = next(model.parameters()).device
    where = f"{device} of {world()} processes" if world() > 1 else str(device)
    some = f" ({changing / 1e6:.2f} M trained)" if changing < weights else ""
    print(f"{weights / 1e6:.2f} M parameters{some} on {where}; "
          f"{len(train):,} prompts to train on, {len(held_out):,} held out; "
          f"{len(plan):,} steps of {args.batch_size} prompts")
    if groups[0].completion_ids:
        tokens = sum(g.tokens() for g in groups)
        micros = micro_batches(groups, args.micro_batch_tokens, packed)
        computed = sum(lay_out(model, micro, packed).input_ids.numel() for micro in micros)
        padded = pad(groups).input_ids.numel()
        print(f"  step 1: {tokens:,} tokens, each prompt counted once; computed {computed:,} "
              f"({100 * (computed / tokens - 1):.0f} % padding and repeated prompts); "
              f"one padded batch {padded:,} ({padded / tokens:.1f}×)")
    fixed, activations, tokens = needed
    print(f"  memory: about {fixed / 2 ** 30:.2f} GiB for weights, gradients and moments, "
          f"{activations / 2 ** 30:.2f} GiB for the activations of {tokens:,} tokens")
    has = device_memory(device)
    if fixed + activations > has:
        print(f"note: the device has {has / 2 ** 30:.1f} GiB; --gradient-checkpointing, a smaller "
              "--micro-batch-tokens, --lora-rank or more processes (torchrun) need less")
    if changing > 1e8 and args.learning_rate >= 1e-4:
        print(f"note: --learning-rate {args.learning_rate:g} suits the toy; for this size 5e-7 to "
              "5e-6 is usual, for a reward model 5e-6 to 2e-5")


def save_model(out, model, tokenizer, adapter=None):
    """A plain Hugging Face checkpoint in `out`, each file renamed into place whole. Collective.

    A LoRA adapter is merged into it, and stands beside it in adapter/.
    """
    weights = collect(whole_weights(model))
    alone = {}
    if adapter:
        alone = {f"base_model.model.{name}": p for name, p in trained(model).items()}
    alone = collect(alone.items())
    if rank():
        return
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            fail(f"the weight {name} holds NaN or an infinity: the run diverged, and nothing of it "
                 f"is saved but {out}/checkpoint; try a lower --lr.")
    writing = out / "model.writing"
    shutil.rmtree(writing, ignore_errors=True)
    with failing(f"--output-dir {out}: the model cannot be saved (--resume saves it again)"):
        model.save_pretrained(writing, state_dict=weights)
        tokenizer.save_pretrained(writing)
        if adapter:
            adapter.save_pretrained(
                writing / "adapter", state_dict=alone, save_embedding_layers=False)
        files = [file for file in writing.rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda file: file == writing / "config.json"):
            (out / file.relative_to(writing)).parent.mkdir(exist_ok=True)
            os.replace(file, out / file.relative_to(writing))    # config.json last: all is there
        shutil.rmtree(writing)
        unlock()


def catch_signals():
    """Ctrl-C, SIGTERM and SIGHUP end the run after the current step, a second one ends it at once.

    Returns the list of those that came: the loop writes a checkpoint and stops once it holds one.
    """
    caught = []

    def on_signal(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        tqdm.write("stopping after this step, with a checkpoint (again: at once)")

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)                 # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:        # nohup ignores SIGHUP
            signal.signal(number, on_signal)
    return caught


class Console:
    """stdout or stderr as a run uses it: where its reader leaves (`| head -1`) the run goes on."""

    def __init__(self, stream, needed):
        self.stream = stream
        self.needed = needed         # whether any other failure, of a full disk, is an error

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def attempt(self, action, *args):
        try:
            return action(*args)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if self.needed and not isinstance(error, BrokenPipeError):
                raise

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)


def run(main):
    """main(), with every end that a user or the outside world can cause in one line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")                 # a console without "▸" shows "?"
    sys.stdout = Console(sys.stdout, needed=True)
    sys.stderr = Console(sys.stderr, needed=False)
    try:
        main()
        leave_processes()
        sys.stdout.flush()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)         # one line, however often it is pressed
        print("interrupted", file=sys.stderr)
        raise SystemExit(130)
    except (OSError, MemoryError, RecursionError, torch.OutOfMemoryError) as error:
        fail(f"{first_line(error)}.")
    except RuntimeError as error:
        if world() > 1 and ("gloo" in str(error) or isinstance(error, dist.DistBackendError)):
            fail("another process of this run has ended; --resume goes on from the newest "
                 "checkpoint.")
        if "memory" not in str(error):                       # torch's word for it on the CPU
            raise
        fail(f"not enough memory ({first_line(error)}); a smaller --micro-batch-tokens needs "
             "less.")
    finally:
        unlock()
