"""What the scripts share: whatever must be the same in training, sampling and scoring.

A GROUP is one prompt with K completions: a pair is a group of two, a ranking a group of K, a
labelled completion a group of one; GRPO samples groups of G. After the reader, all is in groups.
Shapes: R rows of N tokens in a packed batch, K completions in it, T completion tokens in all of
them, V vocabulary. Functions called "collective" have to be called by all processes of torchrun.
"""
import argparse
import csv
import ctypes
import functools
import gzip
import hashlib
import inspect
import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict)
from torch.distributed import fsdp
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
    ContinuousBatchingConfig, GenerationConfig)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging


# --- errors, flags, processes ---------------------------------------------------------------------

def fail(message):
    """Bad input is for the user to fix: one line on stderr, exit code 2, no traceback."""
    print("error: " + " ".join(str(message).split())[:900], file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def failing(message):
    """What the outside world raises in this block (files, templates, …) ends in one sentence."""
    try:
        yield
    except Exception as error:
        fail(f"{message} ({type(error).__name__}: {error}).")


def run(main):
    """main(); what a user or the outside world can cause ends in one line."""
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted")
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        fail(f"{type(error).__name__}: {error}")
    if dist.is_initialized():
        dist.destroy_process_group()


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawTextHelpFormatter):
    def _get_help_string(self, action):  # no "(default: …)" where it is None, 0, False or empty
        return super()._get_help_string(action) if action.default else action.help


def between(low, high, kind=float):
    """An argparse type: a number from low to high; NaN is in no interval."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value
    return number


def rank():
    """Which process of torchrun this is; 0 is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value):
    """[the value of every process], in all of them. Collective."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def sum_over_processes(sums):
    """Counter → its sums over all processes. Collective."""
    result = Counter()
    for part in gather(sums):
        result.update(part)  # not +, which drops what is negative
    return result


def set_up_device(args):
    """Joins the processes of torchrun, if any → (device, the autocast to compute in). auto: cuda in
    bfloat16 where there is one, else cpu in float32. Weights and sums are float32."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    name = found if args.device == "auto" else args.device
    with failing(f"--device {name}: not available on this machine"):
        if name == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))      # FSDP uses this one
            torch.backends.cuda.enable_cudnn_sdp(False)      # it plans 0.5 s for every new shape
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    sys.stdout = open(os.devnull, "w") if rank() else sys.stdout
    if args.dtype == "auto":
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    return device, torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def progress_bar(items, what):
    """tqdm that is erased at its end; none if `what` is empty or there is no terminal."""
    return tqdm(items, what, leave=False, disable=rank() > 0 or not what or None)


def end_step(bar, step, steps, text):
    """Says what a step did: on the bar or, where there is no terminal, in some twenty lines a run.
    And glibc would keep what tensors of ever other sizes left free: twice the memory of a run."""
    bar.set_postfix_str(text, refresh=False)
    if bar.disable and step % math.ceil(steps / 20) == 0:
        print(f"step {step} of {steps}: {text}", flush=True)
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


# ① read -------------------------------------------------------------------------------------------
# In: a file, a folder or a hub id. Out: groups of text, and a line that says what was read.

class Row(dict):
    """A row of data that remembers which columns were read, so that the others can be named."""
    columns_read = frozenset()

    def get(self, name, default=None):
        if name in self:
            self.columns_read |= {name}
        return super().get(name, default)


@dataclass
class Group:
    """One prompt and its K completions, first as text (or chat messages), then as token ids."""
    prompt: str | list              # text, or [{"role": …, "content": …}, …]
    completions: list               # K texts
    row: Row = field(default_factory=Row)               # every column: rewards may read any
    scores: list = field(default_factory=list)          # K, higher is better; pair: 1, 0; label: 1
    margin: float = 0.0             # by how much the better completion of a pair is better
    p_chosen: float | None = None   # probability that the first of a pair is the better
    where: str = ""                 # "pairs.jsonl, line 7", for error messages
    prompt_ids: list = field(default_factory=list)      # P ids, BOS and template included
    completion_ids: list = field(default_factory=list)  # K lists, with end token unless truncated
    ended: list = field(default_factory=list)           # K booleans: False where truncated
    ref: list = field(default_factory=list)             # K log-probs of the reference

    def tokens(self):               # that a shared-prefix forward computes
        return len(self.prompt_ids) + sum(map(len, self.completion_ids))


def check_path(name):
    """A name that can only be a path must exist: it would be asked for on the hub, for minutes."""
    in_a_folder = Path(name).parent != Path(".") and Path(name).parent.is_dir()
    a_path = in_a_folder or name.count("/") > 1 or name.startswith((".", "/", "~"))
    if a_path and not Path(name).exists():
        fail(f"{name}: there is no such file or directory.")


def read_rows(source, split, config=None):
    """All rows of a file, a folder or a hub dataset → [(where, Row)]. JSON and CSV by the standard
    library: `datasets` turns "007" into 7.0, "NA" into nothing, and names no line of an error."""
    name = source.removesuffix(".gz")
    check_path(source)
    with failing(f"{source} (split {split}): neither a file nor a dataset that can be read"):
        if not name.endswith((".json", ".jsonl", ".csv")):
            import datasets                                  # here: it takes seconds to import
            if any((Path(source) / file).exists() for file in ("state.json", "dataset_dict.json")):
                rows = datasets.load_from_disk(source)
                rows = rows[split] if isinstance(rows, dict) else rows
            elif name.endswith(".parquet"):
                rows = datasets.Dataset.from_parquet(source)
            else:
                rows = datasets.load_dataset(source, config, split=split)
            return [(f"{source}, row {i}", Row(row)) for i, row in enumerate(rows, 1)]

        opened = gzip.open if source.endswith(".gz") else open
        with opened(source, "rt", encoding="utf-8-sig", newline="") as file:
            if name.endswith(".csv"):
                reader = csv.DictReader(file, strict=True)
                return [(f"{source}, line {reader.line_num}", Row(row)) for row in reader]
            text = file.read()
        if text.lstrip().startswith("["):
            return [(f"{source}, row {i}", Row(row)) for i, row in enumerate(json.loads(text), 1)]
    rows = []
    for i, line in enumerate(text.split("\n"), 1):  # splitlines() also splits at U+2028
        if line.strip():
            with failing(f"{source}, line {i}: not a JSON object"):
                rows.append((f"{source}, line {i}", Row(json.loads(line))))
    return rows


def plain_message(message):
    """A chat message whose content is text: parts joined, no Nones (Arrow adds them), arguments of
    tool calls decoded (OpenAI writes them as JSON, templates expect objects)."""
    message = {key: value for key, value in message.items() if value is not None}
    text = message.get("content", "")
    if isinstance(text, list) and all(part.get("type") == "text" for part in text):
        text = "".join(part["text"] for part in text)
    if not isinstance(text, str) or not isinstance(message.get("role"), str):
        raise ValueError(f"a message is {message!r:.90}: only text can be read")
    for call in message.get("tool_calls", []):
        function = call.get("function", call)
        if isinstance(function.get("arguments"), str):
            function["arguments"] = json.loads(function["arguments"])
    return message | {"content": text}


def content(row, names):
    """Text or chat messages of a column; names "a|b": of the one that the row has."""
    column = next((name for name in names.split("|") if name in row), names)
    value = row.get(column)
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
        return list(map(plain_message, value))
    raise ValueError(f"column '{column}' is {value!r:.60}, neither text nor chat messages")


def number(row, column):
    """The number in a column (CSV text counts)."""
    with suppress(TypeError, ValueError):
        if math.isfinite(float(row.get(column))):
            return float(row[column])
    raise ValueError(f"column '{column}' is {row.get(column)!r:.60}, not a finite number")


def transcript_turns(text):
    """The turns of an HH-RLHF transcript as chat messages, without the last one, empty where the
    completion goes; of any other text one user turn."""
    parts = re.split(r"\n\n(Human|Assistant):", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[speaker], "content": said.strip()}
             for speaker, said in zip(parts[1::2], parts[2::2]) if said.strip()]
    return turns if turns and not parts[0].strip() else [{"role": "user", "content": text}]


def pair(row, prompt, chosen, rejected):
    """A pair, with its columns margin and p_chosen. Below 1/2 the completions are swapped and it
    becomes 1 − p_chosen: the loss is the same, and "chosen" is the better one."""
    group = Group(prompt, [chosen, rejected], row, [1, 0])
    if row.get("margin") not in (None, ""):
        group.margin = number(row, "margin")
    if row.get("p_chosen") not in (None, ""):
        group.p_chosen = number(row, "p_chosen")
        if not 0 <= group.p_chosen <= 1:
            raise ValueError("column 'p_chosen' is no probability")
        if group.p_chosen < 0.5:
            group.p_chosen = 1 - group.p_chosen
            group.completions.reverse()
    return group


def read_pair(row, prefer):
    """With a prompt, or two dialogues that differ in the last turn only: messages, or transcripts
    (HH-RLHF), where the prompt ends with the last "Assistant:" that they have in common."""
    chosen = content(row, "chosen")
    rejected = content(row, "rejected")
    if isinstance(chosen, list) and chosen[0]["role"] != "assistant":
        if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
            return "that differ before the last turn"
        return pair(row, chosen[:-1], chosen[-1:], rejected[-1:])
    if isinstance(chosen, list) or any(name in row for name in PROMPT.split("|")):
        return pair(row, content(row, PROMPT), chosen, rejected)
    common = os.path.commonprefix([chosen, rejected])
    prompt, marker, _ = common.rpartition("\n\nAssistant:")
    answers = [text[len(prompt + marker):] for text in (chosen, rejected)]
    further = r"\n\nHuman:|\bHuman:.*\n\nAssistant:"        # a completion that holds an exchange
    if not marker or any(re.search(further, text, re.DOTALL) for text in answers):
        return "that differ before the last turn"
    return pair(row, prompt + marker, *answers)


def read_pku(row, prefer):
    best = int(number(row, f"{prefer}_response_id"))
    chosen = content(row, f"response_{best}")
    return pair(row, content(row, PROMPT), chosen, content(row, f"response_{1 - best}"))


def read_list(row, prefer):
    """With scores or ranks (1: the best); of UltraFeedback objects with an overall_score."""
    texts = row.get("completions") or row.get("responses")
    values = row.get("scores") or row.get("ranks")
    if values is None and all(isinstance(text, dict) for text in texts):
        values = [number(text, "overall_score") for text in texts]
        texts = [text.get("response") for text in texts]
    if not isinstance(texts, list) or not isinstance(values, list) or len(texts) != len(values):
        raise ValueError("completions and scores must be two lists of the same length")
    sign = -1 if values is row.get("ranks") else 1
    scores = [sign * number({"scores": value}, "scores") for value in values]
    texts = [content({"completions": text}, "completions") for text in texts]
    return Group(content(row, PROMPT), texts, row, scores)


def read_labelled(row, prefer):
    """A completion that is good or bad, with its prompt or as the last of `messages`."""
    label = {"true": [1], "1": [1], "false": [0], "0": [0]}.get(str(row.get("label")).lower())
    if label is None:
        raise ValueError(f"column 'label' is {row['label']!r:.60}, neither true nor false")
    group = read_response(row, prefer)
    return group if isinstance(group, str) else replace(group, scores=label)


def read_response(row, prefer):
    if "messages" in row:
        messages = content(row, "messages")
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            return "that do not end with a completion"
        return Group(messages[:-1], [messages[-1:]], row)
    cut = str(row.get("cut")).lower() == "true"              # score.py says so of its samples
    return Group(content(row, PROMPT), [content(row, RESPONSE)], row, ended=[False] if cut else [])


class Format(NamedTuple):
    """A row of FORMATS. To add a format is to add a row: messages and all scripts follow it."""
    gives: str                      # what its groups are: a script asks for these
    columns: tuple                  # what must be there ("a|b": one of them)
    read: Callable                  # (row, --prefer) → Group, or why (a str) the row is dropped


PROMPT = "prompt|question|instruction"
RESPONSE = "response|completion|answer"
FORMATS = {                      # the first whose columns are all there is taken
    "pair": Format("pair", ("chosen", "rejected"), read_pair),
    "PKU-SafeRLHF": Format("pair", (PROMPT, "response_0", "response_1"), read_pku),
    "ranked list": Format("list", (PROMPT, "completions|responses", "scores|ranks"), read_list),
    "UltraFeedback": Format("list", (PROMPT, "completions"), read_list),
    "labelled messages": Format("label", ("messages", "label"), read_labelled),
    "unpaired": Format("label", (PROMPT, "completion", "label"), read_labelled),
    "messages": Format("response", ("messages",), read_response),
    "response": Format("response", (PROMPT, RESPONSE), read_response),
    "prompt": Format("prompt", (PROMPT,), lambda row, _: Group(content(row, PROMPT), [], row)),
}


def to_group(name, row, prefer):
    """One row of a format → Group with K texts, or the reason (a str) for which it is dropped."""
    for column in ("image", "images", "video", "videos", "audio", None):     # None: CSV, too many
        if column in row and row[column]:
            what = f"column '{column}'" if column else "a field too many (quote commas)"
            raise ValueError(f"{what} in this row: only text can be read")

    group = FORMATS[name].read(row, prefer)
    if isinstance(group, str):
        return group

    for k, completion in enumerate(group.completions):  # one assistant message becomes its text
        if isinstance(completion, list):
            if [m["role"] for m in completion] != ["assistant"] or len(completion[0]) > 2:
                raise ValueError("a completion must be one assistant message with nothing but text")
            group.completions[k] = completion[0]["content"]
            if isinstance(group.prompt, str):
                group.prompt = [{"role": "user", "content": group.prompt}]

    stripped = [text.strip() for text in group.completions]
    if len(group.scores) > 1 and len(set(stripped)) == 1:
        return "with identical completions"
    return group if all(stripped) else "with an empty completion"


def find_format(row, usable):
    """The first of the usable FORMATS whose columns the row has."""
    for name in usable:
        if all(set(names.split("|")) & set(row) for names in FORMATS[name].columns):
            return name
    needs = "; or ".join(" + ".join(FORMATS[name].columns) for name in usable).replace("|", "/")
    raise ValueError(f"columns {', '.join(map(str, row))}; needed are {needs} (--columns renames)")


def read_groups(source, split, usable, args):
    """Rows → (groups, name of their format, Counter of why rows are dropped). usable: names of
    FORMATS; the first that fits the columns of the first row is taken."""
    renames = [rename.partition("=")[::2] for rename in args.columns]            # (new, old)
    groups = []
    dropped = Counter()
    name = None
    for where, row in read_rows(source, split, args.dataset_config)[:args.limit or None]:
        try:
            new = {new: row.pop(old) for new, old in renames}    # first all, so that a swap works
            row = Row(row | new)
            name = name or find_format(row, usable)
            group = to_group(name, row, args.prefer)
        except KeyError as error:
            fail(f"{where}: column {error} is missing among {', '.join(row)} (--columns NEW=OLD).")
        except (ValueError, TypeError, AttributeError) as error:
            fail(f"{where}: {error}.")
        if isinstance(group, str):
            dropped[group] += 1
        else:
            groups.append(replace(group, where=where))
    return groups, name, dropped


def account(source, name, groups, dropped):
    """Says in one line what became of the rows of a source, and of their columns."""
    columns = dict.fromkeys(column for g in groups for column in g.row)
    used = {"answer"}.union(*(g.row.columns_read for g in groups))   # answer: by the evaluation
    rest = ", ".join(column for column in columns if column not in used) or "nothing"
    rest = f"for the rewards: {rest}" if name == "prompt" else f"NOT READ: {rest}"
    line = f"{source}: format '{name}' (read: {', '.join(c for c in columns if c in used)}; {rest}"
    truncated = sum(not all(g.ended) for g in groups)
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items() if n) or "none"
    print(f"{line}), kept {len(groups):,}, truncated {truncated:,}, dropped: {reasons}")
    if not groups:
        fail(f"{source}: no rows are left.")
    over = sum(n for reason, n in dropped.items() if reason.startswith("over"))
    share = over / (len(groups) + over)
    if share > 0.05:
        print(f"  note: {100 * share:.0f} % are too long; the rest is another distribution: "
              "--overlong truncate keeps all but too long prompts")


# ② tokenise ---------------------------------------------------------------------------------------
# In: groups of text. Out: the same groups with token ids, or the reason for which one is dropped.

MARK = "\ufdd0"      # a noncharacter, never in real text: brackets text that only looks special


class Encoder:
    """A tokeniser with the decisions that training, sampling and scoring must share.

    bos: what prompts begin with where the tokeniser puts it itself. eos ends a completion of plain
    text, turn_end one in a chat. stops: where sampling ends, these and generation_config's EOS.
    Prompt and completion are encoded apart, so the boundary never moves and every completion of a
    prompt has the same prompt ids. Data that looks like a special token stays ordinary text. A
    policy's completion ends with its turn; a reward model reads on to_last_token of what the
    template writes (often a newline), as every other tool does."""

    def __init__(self, tokenizer, args, config, generation_config, template, to_last_token=False):
        self.tokenizer = tokenizer
        self.chat = args.chat
        self.template_args = args.chat_template_kwargs
        self.to_last_token = to_last_token
        self.max_positions = getattr(config, "max_position_embeddings", None) or math.inf
        if template:
            with failing(f"--chat-template {template} cannot be read"):
                tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        added = tokenizer.added_tokens_decoder               # {id: token}
        special = {*tokenizer.all_special_tokens, *(t.content for t in added.values() if t.special)}
        longest_first = sorted(special, key=len, reverse=True)
        self.control_ids = {*added, *tokenizer.all_special_ids}
        self.special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

        first = tokenizer("a")["input_ids"][0]
        self.bos = [first] if first == tokenizer.bos_token_id else []
        # SentencePiece-like tokenisers put a space before a text; behind an anchor it is not there.
        self.adds_space = False
        self.anchor = self.encode("\n")
        self.adds_space = self.encode("\nab")[len(self.anchor):] != self.encode("ab")

        ends = getattr(generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self.turn_end = tokenizer.eos_token_id
        if tokenizer.chat_template:  # the first control token behind a completion
            answer = {"role": "assistant", "content": "ANSWER"}
            text = self.render([{"role": "user", "content": "QUESTION"}, answer])
            behind = self.encode(text.rpartition("ANSWER")[2], control=True)
            self.turn_end = next((i for i in behind if i in self.control_ids), self.turn_end)
        self.stops = sorted({self.turn_end, tokenizer.eos_token_id, *ends} - {None})
        if tokenizer.eos_token_id is None:
            fail(f"the tokeniser in {tokenizer.name_or_path} has no EOS: nothing would ever end.")

    def encode(self, text, control=False, continues=False):
        """Text → ids without BOS. control: special strings outside MARKs are those tokens.
        continues: the text goes on from another one."""
        ids = []
        for i, piece in enumerate(text.split(MARK) if control else [text]):
            anchored = self.adds_space and (continues or i > 0)
            found = self.tokenizer(
                "\n" * anchored + piece, add_special_tokens=False,
                split_special_tokens=not control or i % 2 == 1)      # odd pieces: between MARKs
            ids += found["input_ids"][len(self.anchor) if anchored else 0:]
        return ids

    def is_chat(self, prompt):
        return self.chat or not isinstance(prompt, str)

    def render(self, messages, tools=None, **options):
        """Chat template → text. What only looks like a special token stands between MARKs."""
        marked = [m | {"content": self.special.sub(rf"{MARK}\g<0>{MARK}", m["content"])}
                  for m in messages]
        return self.tokenizer.apply_chat_template(
            marked, tools=tools, tokenize=False, **options, **self.template_args)

    def chat_texts(self, group):
        """A group → (text of its prompt, [text behind it of each completion]) by the template. With
        the row's `system` and `tools`; a last assistant message is continued, not closed."""
        plain = isinstance(group.prompt, str)
        turns = transcript_turns(group.prompt) if plain else group.prompt
        transcript = plain and turns[0]["content"] != group.prompt
        if group.row.get("system"):
            turns = [{"role": "system", "content": group.row["system"]}, *turns]
        tools = group.row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) and tools else tools or None
        continued = turns[-1]["role"] == "assistant"
        begun = turns[-1]["content"] if continued else ""
        prompt = self.render(
            turns, tools, continue_final_message=continued, add_generation_prompt=not continued)

        completions = []
        for text in group.completions:
            text = text if continued or not transcript else text.strip()     # "Assistant: I do"
            answer = {"role": "assistant", "content": begun + text}
            joint = self.render([*(turns[:-1] if continued else turns), answer], tools)
            if not joint.startswith(prompt):
                raise ValueError("it writes the prompt differently once a completion follows, as "
                                 "templates do that leave earlier thinking out")
            completions.append(joint[len(prompt):])
        return prompt, completions

    def __call__(self, group):
        """Fills prompt_ids and completion_ids of a group → the group."""
        chat = self.is_chat(group.prompt)
        prompt = group.prompt
        completions = group.completions
        if chat:
            with failing(f"{group.where}: the chat template (--chat-template FILE) fails here"):
                prompt, completions = self.chat_texts(group)

        ids = self.encode(prompt, control=chat)
        group.prompt_ids = ids if ids[:1] == self.bos else self.bos + ids
        group.completion_ids = []
        group.ended = [True] * len(completions)
        for text in completions:
            behind_text = group.prompt_ids[-1:] and group.prompt_ids[-1] not in self.control_ids
            ids = self.encode(text, control=chat, continues=behind_text)
            stops = [i for i, token in enumerate(ids) if token in self.stops]
            if not chat or not stops:
                ids.append(self.turn_end if chat else self.tokenizer.eos_token_id)
            elif not self.to_last_token:
                ids = ids[:stops[0] + 1]
            group.completion_ids.append(ids)
        return group

    def text(self, ids):
        """Every id as text, control tokens included, nothing cleaned up."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def decode(self, ids, prompt=""):
        """Text of ids sampled for a prompt, as a reward function sees it: without the end token,
        and with the space that SentencePiece-like decoders drop (a chat's template writes it)."""
        ids = ids[:-1] if ids and ids[-1] in self.stops else ids
        anchor = [] if self.is_chat(prompt) else self.anchor
        return self.text(anchor + ids).removeprefix(self.text(anchor))


def tokenise(groups, encoder, max_length, overlong="drop", dropped=None, reserve=1):
    """Encodes groups → those that fit in max_length. overlong: "drop" a group, or "truncate" its
    completions, without an end token: they must not teach the model to stop there."""
    dropped = Counter() if dropped is None else dropped
    kept = []
    for g in progress_bar(groups, "tokenise"):
        encoder(g)
        room = max_length - len(g.prompt_ids)
        g.ended = [len(ids) <= room for ids in g.completion_ids]
        cut = [ids[:max(0, room)] for ids in g.completion_ids]

        if not g.prompt_ids:
            dropped["with an empty prompt"] += 1
        elif room < reserve or overlong == "drop" and not all(g.ended):
            dropped[f"over --max-length {max_length}"] += 1
        elif len(g.scores) > 1 and len(set(map(tuple, cut))) == 1:
            dropped["with completions of the same tokens"] += 1
        else:
            g.completion_ids = cut
            kept.append(g)
    return kept


def load_groups(source, split, args, encoder, usable, max_length, prepare=None, reserve=1):
    """Rows of a source → tokenised groups; says what became of the rows and shows one."""
    groups, name, dropped = read_groups(source, split, usable, args)
    groups = prepare(groups, dropped, args) if prepare else groups
    groups = tokenise(groups, encoder, max_length, args.overlong, dropped, reserve)
    account(source, name, groups, dropped)
    show_example(encoder, groups[0])
    return groups


def show_example(encoder, group):
    """A group as its encoder reads it, and what may surprise."""
    for ids in (group.prompt_ids, *group.completion_ids):
        text = encoder.text(ids)
        print(f"  ▸ {text if len(text) <= 200 else text[:100] + ' … ' + text[-100:]!r}")
    template = encoder.tokenizer.chat_template
    if template and not encoder.is_chat(group.prompt):
        print("  note: plain text; --chat makes prompts and transcripts turns of the chat template")
    if template and "strftime_now" in template:
        print("  note: the template writes today's date: --resume on another day finds other data")


def load_data(args, encoder, usable, prepare=None, reserve=1):
    """--dataset, and --eval-dataset, --eval-split or a part of the first → (train, held_out,
    max_length). The same prompts are held out whatever the order of the rows, none is trained on.
    prepare(groups, dropped, args) → groups comes before; reserve: tokens free behind a prompt."""
    max_length = min(args.max_length, encoder.max_positions)
    options = (args, encoder, usable, max_length, prepare, reserve)
    rest = train = load_groups(args.dataset, args.split, *options)
    held_apart = args.eval_dataset or args.eval_split
    if held_apart:
        other = args.eval_dataset or args.dataset
        rest = load_groups(other, args.eval_split or args.split, *options)

    def shuffled_place(prompt):
        return hashlib.sha256(f"{args.seed} {prompt}".encode()).hexdigest()

    prompts = sorted({json.dumps(g.prompt) for g in rest}, key=shuffled_place)
    if not held_apart:
        wanted = round(args.eval_fraction * len(prompts)) or (args.eval_fraction > 0)
        prompts = prompts[:min(wanted, len(prompts) - 1)]
    held_prompts = set(prompts[:args.eval_limit or None])
    held_out = [g for g in rest if json.dumps(g.prompt) in held_prompts]
    kept = [g for g in train if json.dumps(g.prompt) not in held_prompts]
    if held_apart and len(kept) < len(train):
        print(f"  note: {len(train) - len(kept):,} rows with a held-out prompt are left out")
    return kept, held_out, max_length


# ③ plan -------------------------------------------------------------------------------------------
# In: groups with ids. Out: which of them make an optimizer step, and which of these one forward.

def make_plan(n, args):
    """The indices of the groups of every optimizer step, a pure function of the flags. Every epoch
    is a new permutation, its last step may be smaller: no row is dropped."""
    per_epoch = math.ceil(n / args.batch_size) or fail("no rows are left to train on.")
    steps = args.max_steps or args.epochs * per_epoch
    plan = []
    for epoch in range(math.ceil(steps / per_epoch)):
        order = list(range(n))
        random.Random(f"{args.seed} {epoch}").shuffle(order)
        plan += [order[i:i + args.batch_size] for i in range(0, n, args.batch_size)]
    return plan[:steps]


def micro_batches(groups, budget, packed=True):
    """Splits groups into lists of at most `budget` tokens, longest first; a group over it stands
    alone. Only memory depends on the budget: losses are normalised over the step."""
    def cost(g):
        return g.tokens() if packed else len(g.completion_ids) * g.tokens()  # no prompt is shared

    batches = []
    used = math.inf  # the first group opens a batch
    for g in sorted(groups, key=cost, reverse=True):
        if used + cost(g) > budget:
            batches.append([])
            used = 0
        batches[-1].append(g)
        used += cost(g)
    return batches


def my_micro_batches(groups, budget, packed=True):
    """This process's share of a step: [(micro-batch, weight)]; FSDP averages gradients, hence the
    weight. All run equally many forwards, as each one gathers weights: some with weight 0."""
    by_size = sorted(groups, key=Group.tokens, reverse=True)
    shares = [micro_batches(by_size[r::world()], budget, packed) for r in range(world())]
    mine = [(micro, world()) for micro in shares[rank()]]
    return mine + [(by_size[-1:], 0)] * (max(map(len, shares)) - len(mine))


class Comparisons(NamedTuple):
    """M pairs "better ≻ worse" among the K completions of some groups."""
    better: torch.Tensor    # (M,) which completion, groups in order
    worse: torch.Tensor     # (M,)
    weight: torch.Tensor    # (M,) 1 / pairs of the same prompt, so that every prompt counts as one
    p: torch.Tensor         # (M,) probability that the label is right
    margin: torch.Tensor    # (M,) by how much the better one is better
    group: torch.Tensor     # (M,) which group


def compare(groups, label_smoothing=0.0, device=None):
    """All pairs of all groups in which one scores higher and the ids differ → Comparisons."""
    rows = []
    first = 0                                                # the group's first completion
    for place, g in enumerate(groups):
        pairs = [(first + i, first + j) for i, j in itertools.permutations(range(len(g.scores)), 2)
                 if g.scores[i] > g.scores[j] and g.completion_ids[i] != g.completion_ids[j]]
        p = 1 - label_smoothing if g.p_chosen is None else g.p_chosen
        rows += [(i, j, place, 1 / len(pairs), p, g.margin) for i, j in pairs]
        first += len(g.completion_ids)
    columns = torch.tensor(rows, dtype=torch.float64, device=device).view(-1, 6).unbind(1)
    better, worse, group = [column.long() for column in columns[:3]]
    return Comparisons(better, worse, *[column.float() for column in columns[3:]], group)


def mean_and_error(values, prompts, proportion=False):
    """The error behind every ±: (mean, its standard error) of values and of which prompt each is.
    What is said of one prompt is not independent, so the prompts are the sample: σ/√P over their P
    means. Of a proportion half of Wilson's interval (z = 1), which is not 0 where all are right."""
    by_prompt = {}
    for value, prompt in zip(torch.as_tensor(values).tolist(), prompts):
        by_prompt.setdefault(str(prompt), []).append(value)
    means = [statistics.fmean(own) for own in by_prompt.values()]
    n = len(means)
    error = math.sqrt(statistics.pvariance(means) / max(1, n - 1))
    if proportion:
        error = math.sqrt(statistics.pvariance(means) / n + 1 / (4 * n * n)) / (1 + 1 / n)
    return statistics.fmean(means), error


# ④ pack -------------------------------------------------------------------------------------------
# In: a micro-batch of groups. Out: tensors for one forward, and what each token may attend to.

@dataclass
class Batch:
    """A micro-batch for one forward: packed, or padded (a completion a row)."""
    input_ids: torch.Tensor         # (R, N)
    positions: torch.Tensor         # (R, N) a completion's go on from its prompt's end
    segment: torch.Tensor           # (R, N) which prompt or completion of the row; -1 = padding
    parent: torch.Tensor            # (R, N) the segment of its prompt
    read: torch.Tensor              # (T,)   where in R·N completion token t is predicted
    target: torch.Tensor            # (T,)   the id of completion token t
    owner: torch.Tensor             # (T,)   which of the K completions token t belongs to
    last: torch.Tensor              # (K,)   where in R·N each completion's last token stands
    packed: bool


def tree_tokens(tree):
    """How many there are in a tree: (ids of a prompt, [(which of the K completions, ids), …])."""
    return len(tree[0]) + sum(len(ids) for _, ids in tree[1])


def assemble(rows, packed, device):
    """Lays out rows of trees → Batch."""
    width = max(sum(map(tree_tokens, row)) for row in rows)
    grid = []                                                # R·N × (id, position, segment, parent)
    tokens = []                                              # T × (read, target, owner)
    last = {}
    for row in rows:
        segment = 0
        for prompt, branches in row:
            parent = segment
            end_of_prompt = len(grid) + len(prompt) - 1
            grid += [(token, i, parent, parent) for i, token in enumerate(prompt)]
            for k, ids in branches:
                segment += 1
                for i, token in enumerate(ids):
                    # The prompt's last token predicts a completion's first, each token the next.
                    tokens.append((len(grid) - 1 if i else end_of_prompt, token, k))
                    grid.append((token, len(prompt) + i, segment, parent))
                last[k] = len(grid) - 1
            segment += 1
        grid += [(0, 0, -1, -1)] * (-len(grid) % width)

    tokens.sort(key=lambda token: token[2])                  # by completion, their tokens in order
    last = torch.tensor([last[k] for k in sorted(last)], device=device)
    grid = torch.tensor(grid, device=device).view(len(rows), width, 4)
    return Batch(*grid.unbind(2), *torch.tensor(tokens, device=device).unbind(1), last, packed)


def trees_of(groups, even):
    """Groups → trees, several of a group where repeating its prompt costs less than a long tree:
    with m completions of C tokens behind a prompt of P, each costs (P/m + C) tokens times
    1 + (P + mC)/even for attention; that is least at mC = √(P (P + even))."""
    trees = []
    k = 0
    for g in groups:
        room = math.sqrt(len(g.prompt_ids) * (len(g.prompt_ids) + even))
        used = math.inf  # the first completion opens a tree
        for ids in g.completion_ids:
            if used + len(ids) > room:
                trees.append((g.prompt_ids, []))
                used = 0
            trees[-1][1].append((k, ids))
            used += len(ids)
            k += 1
    return trees


def balanced_rows(groups, even):
    """Several trees a row, the longest first, each to the emptiest. Attention costs row²: rows are
    short, and their number is the smallest that pads at most 5 %, or the one that pads least."""
    trees = sorted(trees_of(groups, even), key=tree_tokens, reverse=True)
    tokens = sum(map(tree_tokens, trees))
    longest = max(tree_tokens(trees[0]), min(2048, max(128, even // 3)))
    layouts = []
    for count in range(math.ceil(tokens / longest), len(trees) + 1):
        rows = [[] for _ in range(count)]
        sizes = [0] * count
        for tree in trees:
            emptiest = sizes.index(min(sizes))
            rows[emptiest].append(tree)
            sizes[emptiest] += tree_tokens(tree)

        layouts.append((count * max(sizes), count, rows))
        if layouts[-1][0] <= 1.05 * tokens:
            break
    return min(layouts)[2]


def lay_out(model, groups, packed):
    """A micro-batch → Batch: packed, or padded, which is right for any causal LM. A layer of width
    h costs about 24 h² operations a token, attention 4 h times the row length: even at 6 h."""
    if packed:
        even = 6 * (getattr(model.config, "hidden_size", None) or 512)
        return assemble(balanced_rows(groups, even), True, model.device)
    every = [(g.prompt_ids, ids) for g in groups for ids in g.completion_ids]
    rows = [[(prompt, [(k, ids)])] for k, (prompt, ids) in enumerate(every)]     # one a row
    return assemble(rows, False, model.device)


def attention_mask(batch, config):
    """A token attends, causally, to its own segment and to that of its prompt: (R, 1, N, N), or a
    dict of two for models with two types of layers; padded: (R, N). Sliding windows count by
    *position*, not by place in the row."""
    if not batch.packed:
        return batch.segment >= 0

    key = batch.segment[:, None, :]                          # queries stand in [:, :, None]
    mask = (key == batch.segment[:, :, None]) | (key == batch.parent[:, :, None])
    masks = {"full_attention": mask.tril()[:, None]}
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        near = batch.positions[:, :, None] - batch.positions[:, None] < window
        masks["sliding_attention"] = masks["full_attention"] & near[:, None]
    if getattr(config, "_attn_implementation", "") == "eager":   # which adds its mask to the scores
        masks = {name: torch.where(mask, 0.0, -math.inf) for name, mask in masks.items()}

    used = set(getattr(config, "layer_types", None) or [list(masks)[-1]])
    return masks if len(used) > 1 else masks[used.pop()]     # of a dict the model picks by layer


# ⑤ log-probs --------------------------------------------------------------------------------------
# In: a model and a batch. Out: what a loss needs of each completion, in float32, and nothing else.

CHUNK = 2 ** 26      # logits computed at once (256 MiB in float32)


def through_root(measure):
    """measure(model, …) where FSDP has gathered the weights outside the layers too: embedding, last
    norm, head. A call of the model itself would do that, but head and backbone are used apart."""
    def call(model, *args):
        if not isinstance(model, fsdp.FSDPModule):
            return measure(model, *args)
        result = model.run(measure, *args)                   # see shard()
        if not torch.is_grad_enabled():                      # no backward will give them back
            model.reshard()
        return result
    return call


def forward_with(module, **inputs):
    """A forward with those of the inputs that it takes, without the router loss of experts."""
    takes = inspect.signature(module.forward).parameters
    inputs = {"use_cache": False, "output_router_logits": False} | inputs
    return module(**{name: value for name, value in inputs.items() if name in takes})


def hidden_states(model, batch):
    """Last hidden states at every place of the batch: (R·N, d), in the dtype of the compute."""
    backbone = getattr(model, model.base_model_prefix)
    mask = attention_mask(batch, backbone.config)
    out = forward_with(
        backbone, input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.positions)
    return out.last_hidden_state.flatten(0, 1)


def head_logits(model, hidden):
    """The head and what some models do after it, in float32: (n, d) → (n, V)."""
    logits = model.get_output_embeddings()(hidden).float()
    config = model.config
    if getattr(config, "logit_scale", None):                 # cohere
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None):              # granite
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)   # gemma2, gemma3
    return torch.tanh(logits / cap) * cap if cap else logits


class GatherLogSoftmax(torch.autograd.Function):
    """log_softmax(logits)[target] in the memory of the logits: (n, V), (n,) → (n,), where usual
    operations hold three such arrays. The logits must be nobody else's, and backward runs once."""

    @staticmethod
    def forward(ctx, logits, target):
        chosen = logits.gather(1, target[:, None])[:, 0]     # (n,)
        top = logits.amax(1)                                 # (n,)
        Z = logits.sub_(top[:, None]).exp_().sum(1)          # (n,)
        ctx.save_for_backward(logits, Z, target)
        return chosen - top - Z.log()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # d logp / d logits = one-hot(target) − softmax(logits)
        logits, Z, target = ctx.saved_tensors
        logits.mul_(-(grad / Z)[:, None])
        return logits.scatter_add_(1, target[:, None], grad[:, None]), None


@through_root
def token_logps(model, batch, temperature=1.0):
    """log π(y_t | x, y_<t) of all completion tokens, batch.owner says whose: (T,) float32. Only
    where one is predicted the head runs, in chunks that are recomputed in the backward: all but the
    last, whose backward comes first, so that at the peak it is there anyway."""
    if not batch.packed:  # the model's own forward, which every causal LM has
        mask = attention_mask(batch, model.config)
        out = forward_with(model, input_ids=batch.input_ids, attention_mask=mask)
        logits = out.logits.flatten(0, 1)[batch.read].float() / temperature
        return logits.log_softmax(-1).gather(1, batch.target[:, None])[:, 0]

    def logps(hidden, target):                               # (n, d), (n,) → (n,)
        logits = head_logits(model, hidden)
        return GatherLogSoftmax.apply(
            logits if temperature == 1 else logits / temperature, target)    # a copy of V numbers

    hidden = hidden_states(model, batch)[batch.read]         # (T, d)
    chunk = max(1, CHUNK // model.get_output_embeddings().weight.shape[0])
    full, rest = divmod(len(hidden), chunk)
    sizes = [rest] * (rest > 0) + [chunk] * full             # the last one is a full one
    *earlier, last = zip(hidden.split(sizes), batch.target.split(sizes))
    done = [checkpoint(logps, *part, use_reentrant=False) for part in earlier]
    return torch.cat([*done, logps(*last)])


def sum_by(values, owner, count):
    """(T,) values of tokens → (count,) sums; owner (T,) says which sum a token belongs to."""
    return values.new_zeros(count).index_add(0, owner, values)


def completion_logps(model, batch):
    """log π(y|x) of every completion, its end token included: (K,) float32."""
    return sum_by(token_logps(model, batch), batch.owner, len(batch.last))


@torch.no_grad()
def for_all(measure, model, groups, args, packed, autocast, what=""):
    """measure(model, batch) of all groups → for each a list, of one value a completion or a token,
    as measure gives them. Collective: each process measures its share."""
    place = {id(g): i for i, g in enumerate(groups)}
    parts = {}                                               # place of a group → its values
    for micro, _ in progress_bar(my_micro_batches(groups, args.micro_batch_tokens, packed), what):
        batch = lay_out(model, micro, packed)
        with autocast:
            values = measure(model, batch).float().cpu()
        sizes = [len(g.completion_ids) for g in micro]
        if len(values) == len(batch.target):
            sizes = [sum(map(len, g.completion_ids)) for g in micro]
        for g, part in zip(micro, values.split(sizes)):
            parts[place[id(g)]] = part.tolist()
    for others in gather(parts):
        parts |= others
    return [parts[i] for i in range(len(groups))]


@torch.no_grad()
def can_pack(model, groups, measure=token_logps):
    """Whether measure(model, batch) is the same packed and padded, on the shortest three groups in
    one row (a state may run on from tree to tree) and on the longest (a window). Collective."""
    two = [replace(g, completion_ids=g.completion_ids[:2]) for g in groups]
    two.sort(key=Group.tokens)
    problem = ""
    for few in (two[:3], two[-1:]):
        try:
            row = assemble([trees_of(few, 1e12)], True, model.device)
            apart = measure(model, row) - measure(model, lay_out(model, few, False))
            if not apart.abs().max() <= 1e-3:
                problem = f"its numbers differ by {apart.abs().max():.2g}"
        except Exception as error:  # a model that takes no such mask may fail in any way
            problem = f"it fails: {error}"
    if problem:
        print(f"{type(model).__name__} is padded, slower but correct: packed, {problem:.120}")
    return not any(gather(problem))


# ⑥ models -----------------------------------------------------------------------------------------
# In: a directory or hub id. Out: its tokeniser with our decisions, its weights in float32.

def load_encoder(path, args, template=None, to_last_token=False):
    """The Encoder of a model directory or hub id. No weights: bad data is found before them."""
    check_path(path)
    with failing(f"{path}: neither a model directory nor a hub id that could be loaded"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        generation_config = None
        with suppress(OSError):  # many checkpoints have none
            generation_config = GenerationConfig.from_pretrained(path)
        return Encoder(tokenizer, args, config, generation_config, template, to_last_token)


def load_weights(auto_class, path, encoder, device, new=(), **options):
    """A model in eval mode and float32: bfloat16 weights under AdamW at lr 1e-6 realise about 2 %
    of the update. Only safetensors are read, and code from a checkpoint is never run."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with failing(f"{path}: cannot be loaded"):
        model, info = auto_class.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, **options)
    missing = [name for name in info["missing_keys"] if not name.startswith(tuple(new))]
    if missing:
        fail(f"{path}: the checkpoint lacks {min(missing)}, which would be random.")
    if len(encoder.tokenizer) > model.get_input_embeddings().weight.shape[0]:
        fail(f"{path}: the tokeniser has more ids than the model embeddings.")
    return model.to(device).eval()  # dropout would make policy and reference differ


def load_model(path, encoder, device):
    """A causal LM in float32 and eval mode."""
    if is_reward_model(path):
        fail(f"{path} is a reward model, not a language model.")
    return load_weights(AutoModelForCausalLM, path, encoder, device)


def load_reference(args, encoder, device):
    """π_ref to stand beside the policy: sharded like it, and in the dtype of the compute wherever
    that changes no number (the layers' linear weights, which autocast would cast at every use)."""
    path = args.ref_model or args.model
    vocabulary = encoder.tokenizer.get_vocab()
    if args.ref_model and load_encoder(path, args).tokenizer.get_vocab() != vocabulary:
        fail(f"{path}: its tokeniser differs from the policy's: log-probs cannot be compared.")
    model = load_model(path, encoder, device).requires_grad_(False)
    if world() > 1:                                          # FSDP gathers all weights in it
        shard(model.to(getattr(torch, args.dtype)), args.dtype)
        return model
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            module.to(getattr(torch, args.dtype))
    return model


def is_reward_model(path):
    """Whether a model says that it has a head for one score."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    return "SequenceClassification" in str(config.architectures) and config.num_labels == 1


# ⑦ sample -----------------------------------------------------------------------------------------
# In: a policy and prompts (ids). Out: sampled completions, the ids that are trained on.

CACHE = 2 ** 17      # tokens in the cache of a batch on the CPU; its logits: CHUNK / 16


@dataclass
class Sample:                       # a sampled completion
    ids: list                       # with the end token where it ended by itself
    logps: list                     # of these ids at the sampling temperature
    ended: bool                     # False: truncated at max_new_tokens


def sample(
        model, prompts, n, max_new_tokens, stops, temperature=1.0, seed=0, adapter=None, what=""):
    """n completions of each of P prompts (ids) → P·n Samples, number i of prompt i // n. At
    temperature 0 greedy. Without CUDA the cut into batches changes nothing. Collective."""
    if model.device.type == "cuda" or isinstance(model, fsdp.FSDPModule):
        kind = model.device.type                             # no casts, a cache of half the size
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        model = plain_copy(model, adapter, low)
    options = (max_new_tokens, stops, temperature)
    mine = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))[rank()::world()]
    if model.device.type == "cuda":
        samples = sample_paged(model, [prompts[i] for i in mine], n, *options, seed + rank())
    else:
        rng = torch.Generator().manual_seed(seed)            # whatever the batches and processes
        uniform = torch.rand(len(prompts), n, max_new_tokens, generator=rng, dtype=torch.float64)
        longest = max(map(len, prompts), default=0) + max_new_tokens
        rows = min(CACHE // longest, CHUNK // 16 // model.get_output_embeddings().weight.shape[0])
        size = max(1, rows // n)                             # prompts in a batch
        samples = []
        for start in progress_bar(range(0, len(mine), size), what):
            batch = mine[start:start + size]
            samples += sample_batch(model, [prompts[i] for i in batch], uniform[batch], *options)
    results = {i: samples[j * n:(j + 1) * n] for j, i in enumerate(mine)}
    for others in gather(results):
        results |= others
    return [s for i in range(len(prompts)) for s in results[i]]


@torch.no_grad()
def sample_batch(model, prompts, uniform, max_new_tokens, stops, temperature):
    """Each prompt is prefilled once and its cache repeated n times; what ended leaves the batch.
    uniform: (P, n, max_new_tokens) random numbers, at which the CDF is inverted."""
    device = model.device

    def forward(ids, mask, positions, cache):
        out = forward_with(
            model, input_ids=ids, attention_mask=mask, position_ids=positions,
            past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].float(), getattr(out, "past_key_values", None)

    width = max(map(len, prompts))       # padded on the left: all completions begin in one column
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    mask = torch.arange(width, device=device) >= width - lengths[:, None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits, cache = forward(ids, mask, positions, None)
    if cache is None:
        fail(f"{type(model).__name__} keeps no past_key_values: it cannot be sampled from here.")

    prompt = torch.arange(len(prompts), device=device).repeat_interleave(uniform.shape[1])
    cache.reorder_cache(prompt)  # unlike batch_repeat_interleave also for linear attention
    logits = logits[prompt]                                                      # (P·n, V)
    mask = mask[prompt]
    positions = positions[prompt, -1:]
    uniform = uniform.flatten(0, 1).to(device)                                   # (P·n, tokens)
    rows = torch.arange(len(prompt), device=device)          # which completions are in the batch
    stop_ids = torch.tensor(stops, device=device)
    samples = [Sample([], [], False) for _ in rows]
    for t in range(max_new_tokens):
        logp = (logits / (temperature or 1.0)).log_softmax(-1)                   # (rows, V)
        token = inverse_cdf(logp.exp(), uniform[rows, t]) if temperature else logp.argmax(-1)
        ended = torch.isin(token, stop_ids)
        columns = (rows, token, logp.gather(1, token[:, None])[:, 0], ended)
        for row, token_id, its_logp, done in zip(*[column.tolist() for column in columns]):
            samples[row].ids.append(token_id)
            samples[row].logps.append(its_logp)
            samples[row].ended = done
        if ended.all() or t + 1 == max_new_tokens:
            return samples
        if ended.any():
            stay = (~ended).nonzero()[:, 0]
            cache.reorder_cache(stay)
            rows, token, mask, positions = [x[stay] for x in (rows, token, mask, positions)]
        mask = F.pad(mask, (0, 1), value=True)
        positions = positions + 1
        logits, cache = forward(token[:, None], mask, positions, cache)


def inverse_cdf(probs, u):
    """The first token whose cumulative probability exceeds u: (n, V), (n,) → (n,)."""
    cdf = probs.cumsum(1, dtype=torch.float64)               # float32 sums lose the tail
    if not cdf[:, -1].isfinite().all():
        fail("sampling: the probabilities are not finite numbers: did the weights diverge?")
    at = u[:, None] * cdf[:, -1:] * (1 - 1e-12)              # rounding must not pass the last one
    return torch.searchsorted(cdf, at, right=True)[:, 0]


def sample_paged(model, prompts, n, max_new_tokens, stops, temperature, seed):
    """As sample_batch(), by transformers: a paged cache that shares prompts, and CUDA graphs."""
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=temperature > 0, temperature=temperature or 1.0,
        top_k=0, eos_token_id=stops, num_return_sequences=n)
    outputs = model.generate_batch(
        prompts, config, ContinuousBatchingConfig(return_logprobs=True, seed=seed))
    by_prompt = {}
    for output in outputs.values():
        if output.error:
            fail(f"sampling: {output.error}")
        ids = output.generated_tokens
        one = Sample(ids, output.logprobs, bool(ids) and ids[-1] in stops)
        by_prompt.setdefault(tuple(output.prompt_ids), []).append(one)
    return [by_prompt[tuple(prompt)].pop() for prompt in prompts for _ in range(n)]


# ⑧ scale ------------------------------------------------------------------------------------------
# In: a model as it was loaded. Out: the same model for a large GPU job, and back to a plain one.

def layers_of(model):
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def prepare_model(model, args):
    """--lora-rank, --gradient-checkpointing and torchrun, in place → peft's adapter, or None."""
    adapter = add_lora(model, args) if args.lora_rank else None
    if args.gradient_checkpointing:  # transformers' own switch needs train mode, which has dropout
        for layer in layers_of(model):
            layer.forward = functools.partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    if world() > 1:
        shard(model, args.dtype)
    return adapter


def add_lora(model, args):
    """An adapter on all linear layers that peft finds; only it (and a reward's head) is trained. On
    CUDA the frozen weights take the dtype of the compute."""
    with failing("--lora-rank needs peft: pip install peft"):
        import peft                                          # here, since it is an optional package
    for name, p in model.named_parameters():
        if model.device.type == "cuda" and not name.startswith("score."):
            p.data = p.data.to(getattr(torch, args.dtype))
    torch.manual_seed(args.seed)  # A is random, B is 0: at the start nothing changes
    config = peft.LoraConfig(
        r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules="all-linear",
        exclude_modules=["score"])
    with failing(f"--lora-rank: peft cannot adapt {type(model).__name__}"):
        adapter = peft.get_peft_model(model, config)

    if hasattr(model, "score"):
        model.score.requires_grad_(True)
    adapted = {*config.target_modules, *(config.target_parameters or ())}    # as peft found them
    print(f"LoRA of rank {args.lora_rank} adapts: {', '.join(sorted(adapted))}")
    return adapter.eval()  # what peft adds is in train mode


def shard(model, dtype):
    """FSDP2: each process keeps its share of every weight, gradient and moment, in float32. The
    weights of a layer are gathered while it computes, in the dtype of the compute."""
    policy = fsdp.MixedPrecisionPolicy(getattr(torch, dtype), torch.float32)
    for layer in layers_of(model):
        fsdp.fully_shard(layer, mp_policy=policy)
    if hasattr(model, "score"):
        fsdp.fully_shard(model.score)                        # a reward's head computes in float32
    fsdp.fully_shard(model, mp_policy=policy)

    def run(measure, *args):
        return measure(model, *args)

    model.run = run
    fsdp.register_fsdp_forward_method(model, "run")               # see through_root()


def clip_gradient(model, bound):
    """Clips the norm of the gradient of all processes → what it was."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), bound)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


@torch.no_grad()
def plain_copy(model, adapter, dtype, save_adapter=None):
    """A model of transformers with these weights, unsharded, the adapter merged by peft.
    save_adapter: a folder for it alone; only rank 0 gets the copy then, on the CPU. Collective."""
    saving = save_adapter is not None
    options = StateDictOptions(full_state_dict=True, cpu_offload=saving)
    weights = get_model_state_dict(model, options=options)
    if not weights:
        return None

    kind = AutoModelForSequenceClassification if hasattr(model, "score") else AutoModelForCausalLM
    copy = kind.from_config(model.config, dtype=dtype).eval()
    copy.generation_config = getattr(model, "generation_config", None)       # EOS ids, defaults
    if adapter:  # changed in place as the model was, so that the weights have the same names
        adapted = type(adapter)(copy, adapter.peft_config["default"])
    copy.load_state_dict(weights)
    if adapter and saving:
        adapted.save_pretrained(save_adapter, save_embedding_layers=False)
    if adapter:
        copy = adapted.merge_and_unload()
    return copy if saving else copy.to(model.device)


# ⑨ run directory ----------------------------------------------------------------------------------
# In: flags, data and a model that work. Out: model, args.json, metrics.jsonl, checkpoint/.

MAY_CHANGE = {       # flags that may differ between the start of a run and --resume
    "output_dir", "eval_every", "eval_samples", "save_every", "micro_batch_tokens",
    "device", "gradient_checkpointing", "max_steps", "epochs", "learning_rate", "tensorboard"}


def fingerprint(groups, model):
    """Hash of the token ids, labels and columns of the data, of the model's config, and of the norm
    of every weight."""
    digest = hashlib.sha256()
    for g in groups:
        digest.update(repr((g.prompt_ids, g.completion_ids, g.scores, g.margin, g.row)).encode())
    digest.update(str(model.config.to_dict() | {"_name_or_path": ""}).encode())
    for name, p in model.named_parameters():
        digest.update(f"{name} {p.detach().double().norm().item():.12g}".encode())
    return digest.hexdigest()


def check_output_dir(args):
    """Refuses a directory that is no run's, and one from which a model is read: it gets renamed."""
    out = Path(args.output_dir).resolve()
    if out.exists() and any(out.iterdir()) and not (out / "checkpoint").exists():
        fail(f"--output-dir {out} is not empty, and no run.")
    for path in (args.model, getattr(args, "ref_model", None)):
        if path and Path(path).exists() and Path(path).resolve().is_relative_to(out):
            fail(f"{path} is in --output-dir {out}: give another one.")


def read_checkpoint(args, mark):
    """What --resume goes on from, if flags and fingerprint are those of the start; else None."""
    if not args.resume:
        return None
    out = Path(args.output_dir)
    with failing(f"--resume: {out} holds no checkpoint that can be read"):
        before = json.loads((out / "args.json").read_text(encoding="utf-8"))
        state = torch.load(out / "checkpoint" / "state.pt", weights_only=True, map_location="cpu")
    for flag, value in vars(args).items():
        if flag != "resume" and before.get(flag) != value:
            changed = f"--resume: --{flag.replace('_', '-')} was {before.get(flag)}, now {value}"
            if flag not in MAY_CHANGE:
                fail(changed)
            print(changed)
    if before["fingerprint"] != mark:
        fail("--resume: the data or the model is not what it was at the start (the same happens "
             "where a chat template writes today's date).")
    return state


def restore(state, model, optimizer):
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
    weights = {"model_state_dict": state["weights"], "optim_state_dict": state["moments"]}
    set_state_dict(model, optimizer, **weights, options=options)


def open_run(args, mark, state):
    """→ (path, log(step, values)), once all that can fail has been tried. An earlier run is renamed
    as a whole to NAME-1, NAME-2, …; --resume cuts metrics.jsonl at its checkpoint. Collective."""
    out = Path(args.output_dir)
    if rank() == 0:
        if state:
            os.truncate(out / "metrics.jsonl", state["log_size"])
        elif out.exists() and any(out.iterdir()):
            names = (out.with_name(f"{out.name}-{number}") for number in itertools.count(1))
            kept = next(path for path in names if not path.exists())
            print(f"{out}: an earlier run is kept as {kept}")
            os.replace(out, kept)
        (out / "checkpoint").mkdir(parents=True, exist_ok=bool(state))   # of two runs one fails
        (out / "metrics.jsonl").touch()
        write_file(out / "args.json", json.dumps(vars(args) | {"fingerprint": mark}, indent=1))
    gather(None)
    writer = None
    if args.tensorboard and rank() == 0:
        with failing("--tensorboard needs the package: pip install tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(out, purge_step=state["step"] + 1 if state else None)

    def log(step, values):
        values = {name: value for name, value in values.items() if value == value}   # no NaN
        if rank() == 0:
            with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
        for name, value in values.items() if writer else ():
            writer.add_scalar(name, value, step)

    return out, log


def write_file(file, content):
    """Text, or what torch.save() takes, written beside a file and renamed into place whole."""
    beside = file.with_name(file.name + ".writing")
    if isinstance(content, str):
        beside.write_text(content, encoding="utf-8")
    else:
        torch.save(content, beside)
    os.replace(beside, file)


def save_checkpoint(out, model, optimizer, step, extra):
    """Unsharded weights and moments after `step` updates, and what else the loop remembers. No
    random state: every random number is a function of seed and step. Collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    if rank() == 0:
        state = {"weights": weights, "moments": moments, "step": step, "extra": extra}
        state["log_size"] = (out / "metrics.jsonl").stat().st_size
        write_file(out / "checkpoint" / "state.pt", state)


def save_model(out, model, tokenizer, adapter=None):
    """A plain Hugging Face checkpoint in `out`, with a LoRA adapter merged into it, and alone in
    adapter/. Each file is renamed into place, config.json last. Collective."""
    if adapter or isinstance(model, fsdp.FSDPModule):
        model = plain_copy(model, adapter, torch.float32, save_adapter=out / "adapter")
    if rank() == 0:
        writing = out / "model.writing"
        model.save_pretrained(writing)
        tokenizer.save_pretrained(writing)
        for file in sorted(writing.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, out / file.name)
        writing.rmdir()
    print(f"saved in {out}: model, args.json, metrics.jsonl, checkpoint/")


def describe(model, train, held_out, plan, args):
    """The start line: what is trained, on what, for how long."""
    size = model.num_parameters() / 1e6
    changing = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    print(f"{changing:.2f} M of {size:.2f} M parameters trained on {world()} × {model.device}; "
          f"{len(train):,} groups, {len(held_out):,} held out; {len(plan):,} steps")
    if changing > 50 and args.learning_rate >= 1e-4:
        print("  note: such a --lr suits the toy; usual here is 1e-6, for a reward model 1e-5")


def catch_signals():
    """→ a list that Ctrl-C and SIGTERM add to: the loop saves and stops once it holds one."""
    caught = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: caught.append(signum))
    return caught
