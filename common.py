"""What the scripts share: only what goes silently wrong when it is written twice.

① read       rows of any known format  →  groups (text)
② tokenise   groups (text)             →  groups (ids), with one BOS, one end, and a border that never moves
③ plan       groups                    →  steps of micro-batches, a pure function of the seed
④ pack       a micro-batch             →  a few rows without padding, each prompt in them once
⑤ log-probs  a packed batch            →  float32 log-probs of the completion tokens, nothing else
⑥ sample     prompts                   →  completions, their log-probs, and whether they ended by themselves
⑦ length     scores and lengths        →  the score without what the length explains

A GROUP is one prompt with K completions: a pair is a group of two, a ranking a group of K, an unpaired label a group of
one, GRPO samples a group of G. Everything after the reader sees groups only.

Shapes: R rows of N tokens in a packed batch, K completions in it, T completion tokens in all of them, V vocabulary.
"""
import csv
import gzip
import hashlib
import inspect
import io
import json
import math
import random
import re
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          GenerationConfig)
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()                  # one bar at a time: ours


NOT_LOADED = (OSError, ValueError, ImportError, KeyError, SafetensorError)     # what from_pretrained raises for bad files


def fail(message):
    """Bad input is the user's to mend: one sentence on stderr, exit code 2, no traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def pick_device(name):
    """auto = cuda where there is one, else cpu. A device that is not there is an error before anything is read."""
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name}: not to be had here ({str(error).splitlines()[0]}).")
    return device


# ① read ---------------------------------------------------------------------------------------------------------------

@dataclass
class Group:
    """One prompt and its K completions, first as text (or chat messages), then as token ids."""
    where: str                                               # "pairs.jsonl, line 7": what an error message names
    prompt: str | list                                       # text, or [{"role": …, "content": …}, …]
    completions: list                                        # K texts, or K assistant messages
    row: dict = field(default_factory=dict)                  # every column of the row, for rewards, margins, answers
    prompt_ids: list = field(default_factory=list)           # P ids, BOS and template included
    completion_ids: list = field(default_factory=list)       # K lists of ids, each with its end token unless it was cut
    ended: list = field(default_factory=list)                # K booleans: False where --overlong truncate cut the end

    def tokens(self):
        """Tokens that a shared-prefix forward computes: the prompt once, every completion once."""
        return len(self.prompt_ids) + sum(map(len, self.completion_ids))


# Formats in the order in which they are tried: name, and what must be there ("a|b" = one of them).
KINDS = {
    "pair": ["prompt", "chosen", "rejected"],
    "pair, prompt inside": ["chosen", "rejected"],
    "PKU-SafeRLHF": ["prompt|question", "response_0", "response_1", "better_response_id|safer_response_id"],
    "ranked list": ["prompt|question", "completions|responses", "scores|ranks"],
    "unpaired": ["prompt", "completion", "label"],
    "response": ["prompt|question", "response|completion|answer"],
    "prompt": ["prompt|question"],
}
PAIRS = ("pair", "pair, prompt inside", "PKU-SafeRLHF")


def read_rows(source, split="train"):
    """All rows of a local .json, .jsonl, .csv or .parquet file (also .gz) or of a hub dataset.

    Returns [(where, row)]: `where` names file and line for error messages. The standard library reads JSON and CSV, not
    `datasets`, whose Arrow tables unify the columns of all rows: a 5 among strings would be a traceback about the whole
    file instead of a sentence about line 17, and a missing column would be a silent None.
    """
    path = Path(source)
    name = path.name.removesuffix(".gz")
    if not path.is_file():
        if path.suffix in (".json", ".jsonl", ".csv", ".parquet", ".gz"):
            fail(f"{source}: no such file.")
        from datasets import load_dataset                    # here, because it takes seconds to import
        try:
            rows = load_dataset(str(source), split=split)
        except Exception as error:                           # whatever the hub or the network answered: say it, end
            fail(f"{source} (split {split}): neither a file nor a dataset that could be loaded "
                 f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}).")
        return [(f"{source}, {split} row {i}", dict(row)) for i, row in enumerate(rows)]
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if name.endswith(".parquet"):
            import pyarrow.parquet
            table = pyarrow.parquet.read_table(io.BytesIO(raw))
            return [(f"{source}, row {i}", row) for i, row in enumerate(table.to_pylist(), 1)]
        text = raw.decode("utf-8-sig")                       # -sig: a byte order mark is not part of a column's name
    except (OSError, EOFError, ValueError, zlib.error) as error:   # ValueError: bad UTF-8, pyarrow's ArrowInvalid
        fail(f"{source}: cannot be read ({error}).")
    if name.endswith(".csv"):
        csv.field_size_limit(2 ** 31 - 1)                    # else it refuses cells over 131,072 characters: dialogues
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows, names = [], reader.fieldnames or []
        if twice := [name for name in names if names.count(name) > 1]:
            fail(f"{source}, line 1: two columns are called '{twice[0]}'; rename one.")
        try:
            for row in reader:
                where = f"{source}, line {reader.line_num}"
                if None in row or None in row.values():
                    fail(f"{where}: this row does not have the {len(reader.fieldnames)} fields of the header.")
                rows.append((where, row))
        except csv.Error as error:                           # line_num: where the last good row ended
            fail(f"{source}, line {reader.line_num + 1}: broken CSV ({error}).")
        return rows
    if not name.endswith((".json", ".jsonl")):
        fail(f"{source}: known file types are .json, .jsonl, .csv and .parquet, also with .gz.")
    if text.lstrip()[:1] == "[":                             # one JSON list
        try:
            rows = [(f"{source}, row {i}", row) for i, row in enumerate(json.loads(text), 1)]
        except json.JSONDecodeError as error:
            fail(f"{source}, line {error.lineno}: broken JSON ({error.msg}).")
    else:                                                    # one object a line
        rows = []
        for i, line in enumerate(text.split("\n"), 1):       # str.splitlines() would also cut inside JSON text
            try:
                if line.strip():
                    rows.append((f"{source}, line {i}", json.loads(line)))
            except json.JSONDecodeError as error:
                fail(f"{source}, line {i}: broken JSON ({error.msg}).")
    for where, row in rows:
        if not isinstance(row, dict):
            fail(f"{where}: a row must be an object with named columns, not {type(row).__name__}.")
    return rows


def text_or_messages(row, column, where):
    """The checked value of a column: a str, or a list of messages whose content is a str. Anything else is an error."""
    def text(value):
        try:
            value.encode()
        except UnicodeEncodeError:
            fail(f"{where}: column '{column}' holds half of a surrogate pair (like \\ud83d), which is no text; mend it.")
        return value

    value = row.get(column)
    if isinstance(value, str):
        return text(value)
    if isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m and "content" in m for m in value):
        messages = []
        for message in value:
            content = message["content"]
            if isinstance(content, list):                    # [{"type": "text", "text": …}, …]
                parts = [part.get("text") if isinstance(part, dict) else None for part in content]
                content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
            if not isinstance(content, str) or not isinstance(message["role"], str):
                fail(f"{where}: in column '{column}' a message's role or content is {content!r:.60}, not text.")
            given = {k: v for k, v in message.items() if v is not None}   # a template may read further keys
            messages.append(given | {"content": text(content)})
        return messages
    fail(f"{where}: column '{column}' is {value!r:.60}, neither text nor a list of messages with role and content.")


def number(row, column, where, low=-math.inf, high=math.inf):
    """The finite number in a column (CSV text counts), or an error that names the row."""
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and low <= value <= high):
        between = f" in [{low:g}, {high:g}]" if high < math.inf else ""
        fail(f"{where}: column '{column}' is {row[column]!r:.60}, not a number{between}.")
    return value


def soft_labels(groups, label_smoothing):
    """Checks the column p_chosen, the probability that `chosen` is the better answer, and turns pairs below 1/2 round:
    the same loss, and "chosen" is the better one wherever an accuracy is counted. A missing value is no soft label."""
    turned = 0
    for g in groups:
        if g.row.get("p_chosen", "") in (None, ""):
            g.row.pop("p_chosen", None)
        if "p_chosen" in g.row:
            if label_smoothing:
                fail(f"{g.where}: rows with p_chosen carry their own label noise; drop --label-smoothing.")
            g.row["p_chosen"] = number(g.row, "p_chosen", g.where, 0, 1)
            if g.row["p_chosen"] < 0.5:
                g.row["p_chosen"], turned = 1 - g.row["p_chosen"], turned + 1
                g.completions.reverse()
    if turned:
        print(f"  {turned:,} pairs have p_chosen below 1/2: their answers change places, p_chosen becomes 1 − p_chosen")


def split_transcripts(chosen, rejected):
    """HH-RLHF: two transcripts that share all but the last assistant turn → (prompt, chosen, rejected).

    The prompt ends with the last "\\n\\nAssistant:" inside the longest common prefix, so an answer that quotes this
    marker stays whole. None where they part earlier: then an answer would hold a further exchange.
    """
    marker, common = "\n\nAssistant:", 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    cut = chosen.rfind(marker, 0, common) + len(marker)
    answers = chosen[cut:], rejected[cut:]
    if cut < len(marker) or any(re.search(r"\n\nHuman:|\bHuman:.*\n\nAssistant:", a, re.DOTALL) for a in answers):
        return None
    return chosen[:cut], *answers


def to_group(kind, row, where, prefer):
    """One row of a known kind → Group, or the reason (a str) for which it is dropped."""
    def column(names):                                       # "prompt|question" → the one that this row has
        found = [n for n in names.split("|") if n in row]
        return found[0] if found else fail(f"{where}: column '" + names.replace("|", "' or '") + "' is missing.")

    get = lambda names: text_or_messages(row, column(names), where)  # noqa: E731
    extra = dict(row)
    if kind in PAIRS[:2]:
        chosen, rejected = get("chosen"), get("rejected")
        if kind == "pair" and not (isinstance(chosen, list) and chosen[0]["role"] != "assistant"):
            prompt = get("prompt")
        elif isinstance(chosen, str) and isinstance(rejected, str):
            if not (parts := split_transcripts(chosen, rejected)):
                return "that differ before the last turn"
            prompt, chosen, rejected = parts
        elif isinstance(chosen, list) and isinstance(rejected, list):     # whole dialogues: all but the last message
            if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
                return "that differ before the last turn"
            prompt, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:]
        else:
            fail(f"{where}: 'chosen' and 'rejected' must both be text or both be lists of messages.")
        completions = [chosen, rejected]
    elif kind == "PKU-SafeRLHF":
        name = f"{prefer}_response_id"
        best = row.get(column(name))
        if str(best) not in ("0", "1"):
            fail(f"{where}: column '{name}' is {best!r}, neither 0 nor 1.")
        prompt = get("prompt|question")
        completions = [get(f"response_{int(best)}"), get(f"response_{1 - int(best)}")]
    elif kind == "ranked list":
        prompt, name, by = get("prompt|question"), column("completions|responses"), column("scores|ranks")
        values = row[name]
        if not isinstance(values, list) or not isinstance(row[by], list) or not len(values) == len(row[by]) > 1:
            fail(f"{where}: columns '{name}' and '{by}' must be two lists of the same length, two or more.")
        completions = [text_or_messages({name: v}, name, where) for v in values]
        sign = -1.0 if by == "ranks" else 1.0                # rank 1 is the best, so its score is the highest
        extra["scores"] = [sign * number({by: v}, by, where) for v in row[by]]
    elif kind == "unpaired":
        prompt, completions = get("prompt"), [get("completion")]
        label = {"true": True, "1": True, "false": False, "0": False}.get(str(row[column("label")]).lower())
        if label is None:
            fail(f"{where}: column 'label' is {row['label']!r}, neither true nor false.")
        extra["label"] = label
    elif kind == "response":
        prompt, name = get("prompt|question"), column("response|completion|answer")
        completions = [get(name)]
        if name == "answer":
            del extra["answer"]                              # here it is what was said, elsewhere what would be right
    else:
        prompt, completions = get("prompt|question"), []
    if any(isinstance(c, list) for c in completions) and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):                             # every completion becomes one assistant message's text
        for i, c in enumerate(completions):
            if isinstance(c, list):
                if len(c) != 1 or c[0]["role"] != "assistant":
                    fail(f"{where}: a completion must be one assistant message, not {[m['role'] for m in c]}.")
                if more := sorted(set(c[0]) - {"role", "content"}):
                    fail(f"{where}: an answer's message has '{more[0]}' besides role and content, which would be lost; "
                         "move it or remove it.")
                completions[i] = c[0]["content"]
    if any(not c.strip() for c in completions):
        return "with an empty answer"
    if kind in PAIRS and completions[0].strip() == completions[1].strip():
        return "with identical answers"
    return Group(where, prompt, completions, extra)


def read_groups(source, kinds, split="train", columns=(), limit=0, prefer="better", why=""):
    """Rows → (groups, report). `kinds`: the formats that the caller can use, of KINDS; the first that fits is taken.
    why: what the caller says about rows that it cannot use.

    report: Counter with "rows", "kept" and one entry per reason for which rows were dropped, and report.kind.
    """
    rows = read_rows(source, split)
    rows = rows[:limit] if limit else rows
    if not rows:
        fail(f"{source}: no rows.")
    first = rows[0][1]
    renames = [rename.partition("=")[::2] for rename in columns]         # (new, old)
    for new, old in renames:
        if not new or old not in first:
            fail(f"--columns {new}={old}: {source} has no column '{old}' (it has: {', '.join(first)}); write NEW=OLD.")
    for where, row in rows if renames else []:
        if lacking := [old for _, old in renames if old not in row]:
            fail(f"{where}: column '{lacking[0]}' is missing.")
        values = {new: row[old] for new, old in renames}     # all at once: chosen=rejected rejected=chosen swaps them
        for _, old in renames:
            row.pop(old, None)
        row.update(values)
    have = set(first)
    fits = [k for k, need in KINDS.items() if all(have & set(n.split("|")) for n in need)]
    kind = next((k for k in fits if k in kinds), None)
    if kind is None:
        needs = "; or ".join(" + ".join(n.replace("|", " or ") for n in KINDS[k]) for k in kinds)
        problem = f"are rows of kind '{fits[0]}', which this script cannot use{why}" if fits else "fit no format"
        fail(f"{source}: its columns ({', '.join(first)}) {problem}; needed are {needs}. --columns NEW=OLD renames.")
    groups, report = [], Counter(rows=len(rows))
    for where, row in rows:
        made = to_group(kind, row, where, prefer)
        if isinstance(made, str):
            report[made] += 1
        else:
            groups.append(made)
    report.kind = kind
    return groups, report


# ② tokenise -----------------------------------------------------------------------------------------------------------

MARK = "\ufdd0"      # a noncharacter, never in real text: brackets text that only looks special


class Encoder:
    """A tokeniser together with the decisions that must be the same in training, sampling and scoring.

    bos       prepended where the tokeniser prepends one itself, never twice (the template may have written it already)
    end       the id that ends an answer: the template's end of turn in a chat, else the tokeniser's EOS
    stops     every id at which sampling stops: EOS, generation_config's EOS ids, the template's end of turn
    template  messages become text by the tokeniser's chat template; plain text stays as it is unless `chat` is set
    """

    def __init__(self, tokenizer, config=None, generation_config=None, template_file=None, chat=False):
        self.tokenizer, self.chat = tokenizer, chat
        self.max_positions = getattr(config, "max_position_embeddings", None) or math.inf
        if template_file:
            if not Path(template_file).is_file():
                fail(f"--chat-template {template_file}: no such file.")
            try:
                tokenizer.chat_template = Path(template_file).read_text(encoding="utf-8")    # saved with the checkpoint
            except UnicodeDecodeError as error:
                fail(f"--chat-template {template_file}: not a text file ({error}).")
        first = tokenizer("a")["input_ids"][0]
        self.bos = [first] if first == tokenizer.bos_token_id else []
        added = tokenizer.added_tokens_decoder.values()
        special = {t.content for t in added if t.special} | set(tokenizer.all_special_tokens)
        self.special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self.looks_special = 0                               # rows with such a string, encoded as ordinary text
        self.template_changes_answers = False
        ends = getattr(generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self.turn_end = self._turn_end() if tokenizer.chat_template else None
        stops = [self.turn_end, tokenizer.eos_token_id, *ends]
        self.stops = sorted({i for i in stops if i is not None})
        if not self.stops:
            fail(f"the tokeniser in {tokenizer.name_or_path} names no EOS token, so no answer could ever end; "
                 "set eos_token in its config.")
        self.eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else self.stops[0]
        self.continuation = self._continuation()
        self.anchor = [] if tokenizer.chat_template else self.continuation("a")      # see decode

    def _turn_end(self):
        """Id of the first control token that the template writes after an answer, or None."""
        messages = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
        text = self.render(messages, "the chat template")
        tail = self.tokenizer(text.rpartition("ANSWER")[2], add_special_tokens=False)["input_ids"]
        control = set(self.tokenizer.added_tokens_decoder) | set(self.tokenizer.all_special_ids)
        return next((i for i in tail if i in control), None)

    def _continuation(self):
        """The same tokeniser without the space that some put before whatever they encode.

        SentencePiece-like tokenisers (Llama 2, Mistral v1) turn "yes" into "▁yes": right where a text starts, wrong for
        an answer, which continues one. The three places where such a space is switched on are switched off in a copy.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            return lambda text, control=False: self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=not control)["input_ids"]

        def without_prefix(node):
            if isinstance(node, list):
                return [without_prefix(x) for x in node if not (isinstance(x, dict) and x.get("type") == "Prepend")]
            if not isinstance(node, dict):
                return node
            node = {k: without_prefix(v) for k, v in node.items()}
            node.update({k: v for k, v in (("prepend_scheme", "never"), ("add_prefix_space", False)) if k in node})
            return node

        from tokenizers import Tokenizer
        spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for part in ("normalizer", "pre_tokenizer"):
            node = spec.get(part)
            spec[part] = None if isinstance(node, dict) and node.get("type") == "Prepend" else without_prefix(node)
        backend = Tokenizer.from_str(json.dumps(spec))
        backend.no_padding()
        backend.no_truncation()

        def encode(text, control=False):
            backend.encode_special_tokens = not control
            return backend.encode(text, add_special_tokens=False).ids
        return encode

    def render(self, messages, where, generation_prompt=False):
        """Chat template → text in which data that only looks like a control token stands between MARKs."""
        mark = lambda m: {**m, "content": self.special.sub(lambda s: MARK + s[0] + MARK, m["content"])}  # noqa: E731
        if self.tokenizer.chat_template is None:
            fail(f"{where}: chat messages, but the tokeniser in {self.tokenizer.name_or_path} has no chat template; "
                 "give one with --chat-template FILE.")
        if any(MARK in m["content"] for m in messages):
            fail(f"{where}: a message holds U+FDD0, a noncharacter of Unicode that serves as a mark here.")
        marked = [mark(m) for m in messages] if hasattr(self, "stops") else messages
        try:
            return self.tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=generation_prompt)
        except Exception as error:                           # jinja2's errors, or a raise_exception() in the template
            fail(f"{where}: the chat template refuses these messages ({error}).")

    def ids(self, text, control, continues=False):
        """Token ids of a text. control: special strings in it (outside MARKs) are those tokens; else plain text.
        continues: the text goes on from one that is encoded already, see _continuation."""
        if MARK not in text or not control:
            if continues:
                return self.continuation(text, control)
            return self.tokenizer(text, add_special_tokens=False, split_special_tokens=not control)["input_ids"]
        ids = []
        for i, piece in enumerate(text.split(MARK)):         # odd pieces stand between MARKs: ordinary text
            # Up to its first special token a piece continues what stands before it, from there on it is as ever.
            first = self.special.search(piece) if i % 2 == 0 else None
            cut = 0 if i == 0 and not continues else first.start() if first else len(piece)
            ids += self.continuation(piece[:cut]) if cut else []
            ids += self.ids(piece[cut:], True) if piece[cut:] else []
        return ids

    def with_bos(self, ids):
        return ids if ids[:1] == self.bos else self.bos + ids    # a template may have written it already

    def prompt(self, prompt, where="prompt"):
        """Text or messages → (prompt_ids, the text they encode). The same ids for training, sampling and scoring."""
        if isinstance(prompt, str) and self.chat:
            prompt = [{"role": "user", "content": prompt}]
        control = not isinstance(prompt, str)
        text = self.render(prompt, where, generation_prompt=True) if control else prompt
        return self.with_bos(self.ids(text, control)), text

    def __call__(self, group):
        """Fills prompt_ids, completion_ids and ended of a group.

        Prompt and answer are encoded apart and concatenated, so the border never moves and every answer of a prompt has
        the same prompt ids. Where the ids of prompt + answer begin with the prompt's ids, the answer's ids are their
        rest (that is how the model will see such text); where a merge crosses the border, the answer is encoded alone.
        """
        group.prompt_ids, text = self.prompt(group.prompt, group.where)
        chat = not isinstance(group.prompt, str) or self.chat
        messages = [{"role": "user", "content": group.prompt}] if isinstance(group.prompt, str) else group.prompt
        spoken = [group.prompt] if isinstance(group.prompt, str) else [m["content"] for m in group.prompt]
        self.looks_special += any(self.special.search(t) for t in spoken + group.completions)
        group.completion_ids, group.ended = [], []
        for answer in group.completions:
            if chat:
                full = self.render(messages + [{"role": "assistant", "content": answer}], group.where)
                if not full.startswith(text):
                    at = next((i for i, (a, b) in enumerate(zip(text, full)) if a != b), len(full))
                    fail(f"{group.where}: the chat template writes the prompt differently once an answer follows "
                         f"(from character {at}: {text[at:at + 30]!r} against {full[at:at + 30]!r}); "
                         "use another --chat-template.")
                self.template_changes_answers |= answer not in full.replace(MARK, "")
            else:
                full = text + answer
            joint = self.with_bos(self.ids(full, chat))
            if joint[:len(group.prompt_ids)] == group.prompt_ids:
                ids = joint[len(group.prompt_ids):]
            else:
                ids = self.ids(full[len(text):], chat, continues=True)
            end = self.turn_end if chat and self.turn_end is not None else self.eos
            first_stop = next((i for i, t in enumerate(ids) if t in self.stops), len(ids)) if chat else len(ids)
            group.completion_ids.append(ids[:first_stop] + [ids[first_stop] if first_stop < len(ids) else end])
            group.ended.append(True)
        return group

    def decode(self, ids):
        """Text of sampled ids as a reward function sees it: without the end token, everything else as it was written.

        SentencePiece-like decoders drop a space at the start: right for a text, wrong for an answer that continues one,
        which is decoded behind an "a". Not where there is a chat template: those write that space themselves.
        """
        def text(ids):
            return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        ids = ids[:-1] if ids and ids[-1] in self.stops else ids
        return text(self.anchor + ids).removeprefix(text(self.anchor))

    def show(self, group, width=160):
        """One group with its border: prompt ▸ answer. Control tokens are visible, long prompts lose their middle."""
        def text(ids):
            return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        short = lambda s: s if len(s) <= width else s[:width // 2] + " … " + s[-width // 2:]  # noqa: E731
        lines = [f"  prompt {short(text(group.prompt_ids))!r}"]
        for ids, ended in zip(group.completion_ids, group.ended):
            lines.append(f"  ▸ {short(text(ids))!r}{'' if ended else '  (cut, no end token)'}")
        return "\n".join(lines)


def tokenise(groups, report, encoder, max_length, overlong="drop", progress="tokenise"):
    """Encode all groups, keep those that fit, and count in `report` what was cut and dropped, and why.

    max_length bounds prompt + longest completion. overlong: "drop" the group, or "truncate" the end of each completion
    that is too long (its end token goes with it: a cut answer must not teach the model to stop there).
    """
    kept, encoder.looks_special, encoder.template_changes_answers = [], 0, False         # counted for each source
    for group in tqdm(groups, desc=progress, unit="row", leave=False, disable=None):
        room = max_length - len(encoder(group).prompt_ids)
        longest = max(map(len, group.completion_ids), default=1)
        if not group.prompt_ids:
            report["with an empty prompt"] += 1
        elif room < 1:
            report["with no room for an answer"] += 1
        elif longest > room and overlong == "drop":
            report[f"over --max-length {max_length}"] += 1
        else:
            if longest > room:
                group.ended = [len(ids) <= room for ids in group.completion_ids]
                group.completion_ids = [ids[:room] for ids in group.completion_ids]
                if len(group.completion_ids) == 2 and group.completion_ids[0] == group.completion_ids[1]:
                    report["with answers identical after truncation"] += 1
                    continue
                report["truncated"] += 1
            kept.append(group)
    report["kept"] = len(kept)
    return kept


def account(source, report, encoder):
    """The one line that says what became of every row."""
    why = {k: v for k, v in report.items() if k not in ("rows", "kept", "truncated")}
    dropped = ", ".join(f"{v:,} {k}" for k, v in why.items())
    line = (f"{source}: {report['rows']:,} rows of kind '{report.kind}', kept {report['kept']:,}, "
            f"truncated {report['truncated']:,}, dropped {sum(why.values()):,}" + (f" ({dropped})" if dropped else ""))
    if encoder.looks_special:
        line += f"\n  {encoder.looks_special:,} rows hold text that looks like a special token; it stays ordinary text"
    if encoder.template_changes_answers:
        line += "\n  the chat template rewrites some answers (trims or moves text): what it writes is trained on"
    return line


def split_by_prompt(groups, fraction, seed):
    """(train, eval) without a common prompt. Depends on the prompts and the seed, not on the order of the rows."""
    key = lambda g: hashlib.sha256(f"{seed} {json.dumps(g.prompt)}".encode()).hexdigest()  # noqa: E731
    prompts = sorted({key(g) for g in groups})
    count = round(fraction * len(prompts)) or (fraction > 0)
    held_out = set(prompts[:min(count, len(prompts) - 1)])   # one at least is trained on
    return [g for g in groups if key(g) not in held_out], [g for g in groups if key(g) in held_out]


# ③ plan ---------------------------------------------------------------------------------------------------------------

def plan_steps(n, batch_size, epochs, max_steps, seed):
    """The group indices of every optimizer step: a pure function of its arguments, so any process can compute it whole.

    Every epoch is a new permutation, its last step may be smaller: no row is dropped. max_steps > 0 wins over epochs.
    """
    if n == 0:
        fail("no rows are left to train on.")
    steps = []
    epochs = math.ceil(max_steps / math.ceil(n / batch_size)) if max_steps > 0 else epochs
    for epoch in range(epochs):
        order = list(range(n))
        random.Random(f"{seed} {epoch}").shuffle(order)
        steps += [order[i:i + batch_size] for i in range(0, n, batch_size)]
    return steps[:max_steps] if max_steps > 0 else steps


def micro_batches(groups, budget, packed=True):
    """Split groups into lists of at most `budget` tokens; a single group over the budget stands alone, never dropped.

    Longest first: groups of like size meet. Only memory depends on the budget: losses are normalised over the step.
    packed=False counts what pad() lays out: every completion with its prompt, filled up to the widest.
    """
    width = lambda group: len(group.prompt_ids) + max(map(len, group.completion_ids))  # noqa: E731
    cost = lambda group, widest: group.tokens() if packed else len(group.completion_ids) * width(widest)  # noqa: E731
    batches, used = [], 0
    for group in sorted(groups, key=Group.tokens if packed else width, reverse=True):
        if not batches or used + cost(group, batches[-1][0]) > budget:
            batches.append([])
            used = 0
        batches[-1].append(group)
        used += cost(group, batches[-1][0])
    return batches


# ④ pack ---------------------------------------------------------------------------------------------------------------

ROW = 1024           # a packed row is about this long, or as its longest tree: attention costs row², not batch²
TREE = 4096          # no tree (a prompt and completions behind it) is longer, unless one completion alone makes it so
EVEN = 3072          # row length at which attention costs as much as the rest of a layer: 6 × its width, see lay_out()


@dataclass
class Batch:
    """A micro-batch for one forward. `tree` is None in the padded layout (one completion a row, nothing shared)."""
    input_ids: torch.Tensor                                  # (R, N)
    positions: torch.Tensor                                  # (R, N) a completion's go on from its prompt's end
    lengths: torch.Tensor                                    # (R,)   real tokens of each row
    tree: torch.Tensor | None                                # (R, N) which tree of the row; -1 = filler
    branch: torch.Tensor | None                              # (R, N) which completion; -1 = prompt
    read: torch.Tensor                                       # (T,)   where in R·N completion token t is predicted
    target: torch.Tensor                                     # (T,)   the id of completion token t
    owner: torch.Tensor                                      # (T,)   which of the K completions token t belongs to
    last: torch.Tensor                                       # (K,)   where in R·N each completion's last token stands
    count: int                                               # K, in the order of the groups given

    def to(self, device):
        return Batch(*(v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v
                       for v in vars(self).values()))


def _batch(rows, shared, count):
    """Lay out rows of trees: rows = [[(prompt_ids, [(k, completion_ids), …]), …], …]."""
    width = max(sum(len(p) + sum(len(c) for _, c in cs) for p, cs in row) for row in rows)
    ids, positions, tree, branch = ([[] for _ in rows] for _ in range(4))
    read, target, owner, last = ([None] * count for _ in range(4))
    for r, row in enumerate(rows):
        for number_, (prompt, completions) in enumerate(row):
            assert prompt and all(c for _, c in completions), "an empty prompt or completion: nothing predicts it"
            ids[r] += prompt
            positions[r] += range(len(prompt))
            tree[r] += [number_] * len(prompt)
            branch[r] += [-1] * len(prompt)
            end_of_prompt = r * width + len(ids[r]) - 1
            for k, completion in completions:
                start = r * width + len(ids[r])
                ids[r] += completion
                positions[r] += range(len(prompt), len(prompt) + len(completion))
                tree[r] += [number_] * len(completion)
                branch[r] += [k] * len(completion)
                # The last prompt token predicts the first token of every completion; after that each token the next.
                read[k] = [end_of_prompt, *range(start, start + len(completion) - 1)]
                target[k], owner[k], last[k] = completion, [k] * len(completion), start + len(completion) - 1
    lengths = torch.tensor([len(x) for x in ids])
    fill = lambda xs, value: torch.tensor([x + [value] * (width - len(x)) for x in xs])  # noqa: E731
    flat = lambda xs: torch.tensor([x for sub in xs for x in sub])  # noqa: E731
    return Batch(fill(ids, 0), fill(positions, 0), lengths,
                 fill(tree, -1) if shared else None, fill(branch, -1) if shared else None,
                 flat(read), flat(target), flat(owner), torch.tensor(last), count)


def pack(groups, row=ROW, tree=TREE, even=EVEN):
    """Shared-prefix layout: each prompt once, its completions behind it, several such trees a row, hardly any filler.

    A group becomes several trees where that is cheaper. With m completions of C tokens behind a prompt of P, each
    costs (P/m + C) tokens times 1 + (P + mC)/even for attention; that is least at mC = √(P (P + even)). So a long
    prompt stands once, and many long answers to a short prompt do not pay for attending (masked) to each other.
    """
    trees, count = [], 0
    for group in groups:
        prompt = len(group.prompt_ids)
        room = max(min(tree - prompt, math.sqrt(prompt * (prompt + even))), max(map(len, group.completion_ids)))
        part, used = [], 0
        for completion in group.completion_ids:
            if part and used + len(completion) > room:
                trees.append((group.prompt_ids, part))
                part, used = [], 0
            part.append((count, completion))
            used += len(completion)
            count += 1
        trees.append((group.prompt_ids, part))
    size = lambda t: len(t[0]) + sum(len(c) for _, c in t[1])  # noqa: E731
    trees.sort(key=size, reverse=True)
    total, best = sum(map(size, trees)), None
    for number_ in range(math.ceil(total / max(row, size(trees[0]))), len(trees) + 1):
        rows, load = [[] for _ in range(number_)], [0] * number_
        for t in trees:                                      # longest first, into the emptiest row: about equal rows
            r = load.index(min(load))
            rows[r].append(t)
            load[r] += size(t)
        if best is None or number_ * max(load) < best[0]:    # what is computed, filler included
            best = number_ * max(load), rows
        if best[0] <= 1.05 * total:
            break
    rows = best[1]
    return _batch(rows, True, count)


def pad(groups):
    """The plain layout, right for any causal LM: one completion a row behind its own prompt, filled up right."""
    flat = [(g.prompt_ids, ids) for g in groups for ids in g.completion_ids]
    return _batch([[(p, [(k, ids)])] for k, (p, ids) in enumerate(flat)], False, len(flat))


def lay_out(model, groups, packed):
    """The batch of a micro-batch for this model: packed with rows that suit its width, or padded where it cannot pack.

    A layer of width h costs about 24 h² operations a token and attention 4 h times the row length: even at 6 h.
    """
    if not packed:
        return pad(groups)
    even = 6 * (getattr(model.config, "hidden_size", None) or EVEN // 6)
    return pack(groups, row=min(2 * ROW, max(128, even // 3)), even=even)


def attention_mask(batch, config):
    """What lets a completion see its own prompt and itself, causally. See "Why it is fast" in the README.

    A token q attends to k where k is not later in the row, stands in the same tree, and is in the prompt or in q's own
    completion. Sliding windows count by *position*, not by place in the row. SDPA takes booleans; attention run eagerly
    adds the mask to the scores, so it must be 0 / very negative (a boolean would be added as 0 and 1, silently wrong).
    """
    if batch.tree is None:
        return torch.arange(batch.input_ids.shape[1], device=batch.lengths.device) < batch.lengths[:, None]   # (R, N)
    place = torch.arange(batch.tree.shape[1], device=batch.tree.device)
    q, k = (lambda x: x[:, :, None]), (lambda x: x[:, None, :])
    mask = (q(batch.tree) == k(batch.tree)) & (place[:, None] >= place)
    mask &= (k(batch.branch) == -1) | (q(batch.branch) == k(batch.branch))
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    masks = {"full_attention": mask}                         # (R, N, N)
    if window:
        masks["sliding_attention"] = mask & (q(batch.positions) - k(batch.positions) < window)
    if config._attn_implementation == "eager":
        lowest = torch.finfo(torch.float32).min
        masks = {name: torch.zeros(m.shape, device=m.device).masked_fill(~m, lowest) for name, m in masks.items()}
    masks = {name: m[:, None] for name, m in masks.items()}  # (R, 1, N, N)
    types = set(getattr(config, "layer_types", None) or [])
    if len(types) > 1:
        return masks                                         # layers of both sorts: the model picks by layer
    return masks["sliding_attention" if window and types != {"full_attention"} else "full_attention"]


# ⑤ log-probs ----------------------------------------------------------------------------------------------------------

CHUNK = 2 ** 26      # logits computed at once (256 MiB in float32)


def hidden_states(model, batch):
    """Last hidden states at every place of the batch: (R·N, d), in the dtype that the model computes in."""
    backbone = getattr(model, model.base_model_prefix)
    takes = inspect.signature(backbone.forward).parameters
    extra = {"position_ids": batch.positions} if "position_ids" in takes else {}
    mask = attention_mask(batch, backbone.config)
    out = backbone(input_ids=batch.input_ids, attention_mask=mask, use_cache=False, **extra)
    return out.last_hidden_state.flatten(0, 1)


def head_logits(model, hidden):
    """The language-model head and what some models do after it, in float32: (n, d) → (n, V)."""
    logits, config = model.get_output_embeddings()(hidden).float(), model.config
    if scale := getattr(config, "logit_scale", None):                    # cohere
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):                 # granite
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):          # gemma2, gemma3
        logits = torch.tanh(logits / cap) * cap
    return logits


class _GatherLogSoftmax(torch.autograd.Function):
    """log_softmax(logits)[target] in the memory of the logits: (n, V), (n,) → (n,).

    The forward leaves the unnormalised probabilities where the logits were, the backward the gradient; usual operations
    would hold three such arrays, and with 150,000 tokens to choose from they are the largest there are. The logits must
    be nobody else's, and the backward runs once.
    """

    @staticmethod
    def forward(ctx, logits, target):
        chosen, top = logits.gather(1, target[:, None])[:, 0], logits.amax(1)
        total = logits.sub_(top[:, None]).exp_().sum(1)
        ctx.save_for_backward(logits, total, target)
        return chosen - top - total.log()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):                                 # d logp / d logits = one-hot(target) − softmax(logits)
        if getattr(ctx, "spent", False):
            raise RuntimeError("the log-probs of a batch can be differentiated once: their memory is used again")
        ctx.spent = True
        logits, total, target = ctx.saved_tensors
        return logits.mul_(-(grad / total)[:, None]).scatter_add_(1, target[:, None], grad[:, None]), None


def token_logps(model, batch, temperature=1.0):
    """log π(y_t | x, y_<t) of every completion token at a temperature: (T,) float32. batch.owner says whose it is.

    The head runs only where a completion token is predicted, in chunks, and a chunk is recomputed in the backward
    instead of kept (without `checkpoint` all chunks would be kept and chunking would save nothing). All but the last:
    its backward comes first, so at the peak it is there anyway, and a batch of one chunk recomputes nothing.
    """
    batch = batch.to(next(model.parameters()).device)
    if batch.tree is None:                                   # the fallback asks the model itself for logits
        mask = attention_mask(batch, model.config)
        logits = model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits
        logits = logits.flatten(0, 1)[batch.read].float() / temperature
        return logits.log_softmax(-1).gather(1, batch.target[:, None])[:, 0]
    hidden = hidden_states(model, batch)[batch.read]         # (T, d)

    def logps(h, target):                                    # (n, d), (n,) → (n,)
        logits = head_logits(model, h)
        return _GatherLogSoftmax.apply(logits / temperature if temperature != 1 else logits, target)

    size = max(1, CHUNK // model.get_output_embeddings().weight.shape[0])
    whole, rest = divmod(len(hidden), size)
    sizes = [rest] * (rest > 0) + [size] * whole             # the kept one is a full one
    chunks = list(zip(hidden.split(sizes), batch.target.split(sizes)))
    done = [checkpoint(logps, h, t, use_reentrant=False) if torch.is_grad_enabled() else logps(h, t)
            for h, t in chunks[:-1]]
    return torch.cat(done + [logps(*chunks[-1])])


def sum_by_completion(values, batch):
    """(T,) per token → (K,) per completion."""
    return values.new_zeros(batch.count).index_add(0, batch.owner.to(values.device), values)


def load_encoder(path, template_file=None, chat=False, flag="--model"):
    """The Encoder of a model directory or hub id, without its weights: bad data is found before they are loaded."""
    try:
        config, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    except NOT_LOADED as error:
        why = str(error).strip().splitlines()[0]
        fail(f"{flag} {path}: neither a model directory nor a hub id that could be loaded ({why}).")
    try:
        generation_config = GenerationConfig.from_pretrained(path)
    except OSError as error:                                 # many checkpoints have none
        if (Path(path) / "generation_config.json").exists():
            fail(f"{flag} {path}: generation_config.json cannot be read ({str(error).strip().splitlines()[0]}).")
        generation_config = None
    return Encoder(tokenizer, config, generation_config, template_file, chat)


def check_vocabulary(model, encoder, what):
    """Every id of the tokeniser must have an embedding."""
    if (top := max(encoder.tokenizer.get_vocab().values())) >= (rows := model.get_input_embeddings().weight.shape[0]):
        fail(f"{what}: the tokeniser has ids up to {top}, the model {rows} embeddings; they do not belong together.")


def load_model(path, encoder, device, flag="--model"):
    """A causal LM in float32 and in eval mode: dropout would make policy and reference differ from the first step.

    Float32 masters on purpose: bfloat16 weights under AdamW at lr 1e-6 realise about 2 % of the update. Only
    safetensors are read, never a pickle, and code from the checkpoint is never run.
    """
    architectures = AutoConfig.from_pretrained(path).architectures or []
    if any("SequenceClassification" in a for a in architectures):        # where embeddings are tied no weight is missing
        fail(f"{flag} {path}: {architectures[0]} is a reward model, not a language model.")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    except NOT_LOADED as error:
        fail(f"{flag} {path}: cannot be loaded as a causal language model ({str(error).strip().splitlines()[0]}).")
    if missing := sorted(info["missing_keys"]):
        fail(f"{flag} {path}: the checkpoint lacks {missing[0]}, which would be random; is it a causal language model?")
    check_vocabulary(model, encoder, f"{flag} {path}")
    return model.to(device).eval()


def load_reward_model(path, encoder, device, flag="--reward-model", new_head=False):
    """A reward model in float32 and eval mode: the backbone and one linear head without bias, a plain
    AutoModelForSequenceClassification with one label.

    new_head=True is for training: a causal LM gets a new random head (torch's generator), a reward model keeps its own.
    For scoring a missing head is an error, since a random one would give numbers that look like scores.
    """
    config = AutoConfig.from_pretrained(path)
    trained = any("SequenceClassification" in a for a in config.architectures or [])
    if trained and config.num_labels != 1:
        fail(f"{flag} {path}: its head has {config.num_labels} outputs, a reward model has one.")
    if not trained and not new_head:
        kind = (config.architectures or ["no model that is known"])[0]
        fail(f"{flag} {path} is {kind}, not a reward model: its head would be random; train one with train_rm.py.")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()               # its table of missing weights: checked below
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    except NOT_LOADED as error:
        fail(f"{flag} {path}: cannot be loaded as a reward model ({str(error).strip().splitlines()[0]}).")
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = sorted(k for k in info["missing_keys"] if trained or not k.startswith("score."))
    if missing:
        fail(f"{flag} {path}: the checkpoint lacks {missing[0]}, which would be random.")
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        fail(f"{flag} {path}: {type(model).__name__} has no linear head called score.")
    check_vocabulary(model, encoder, f"{flag} {path}")
    pad_id = encoder.tokenizer.pad_token_id
    model.config.pad_token_id = encoder.eos if pad_id is None else pad_id
    return model.to(device).eval()


def reward_scores(model, batch):
    """The reward of every completion of a batch, read at its last token by length, never by token id: (K,) float32.

    Backbone in the dtype of autocast, head in float32: in bfloat16 2,000 scores near 4 collapse to 90 values.
    """
    batch = batch.to(next(model.parameters()).device)
    hidden = hidden_states(model, batch)[batch.last]         # (K, d)
    with torch.autocast(hidden.device.type, enabled=False):
        return model.score(hidden.float())[:, 0]


@torch.no_grad()
def can_pack(model, groups, measure=token_logps, tolerance=1e-3):
    """Check, do not trust: a few groups through the packed and through the plain padded forward, in float32.

    measure(model, batch): what is compared, token_logps or reward_scores. At most two completions of a group are used.

    Each group is one tree, however training would split it (even=∞). The shortest groups, together in one row, where a
    state that runs on from tree to tree would show (Mamba); where the model has a sliding window also the shortest group
    that exceeds it; and the longest, since a model may have a window that its config calls otherwise and that counts by
    place in the row (GPT-Neo). Returns whether they agree, and says so
    in one line where they do not: then the padded path serves, slower but right for any causal LM.
    """
    two = [Group(g.where, g.prompt, [], prompt_ids=g.prompt_ids, completion_ids=g.completion_ids[:2])
           for g in groups if g.completion_ids]
    by_size = sorted(two, key=Group.tokens)
    window = getattr(model.config, "sliding_window", None) or math.inf
    short, long = by_size[:3], by_size[3:]
    long = [g for g in long[:-1] if len(g.prompt_ids) + max(map(len, g.completion_ids)) > window][:1] + long[-1:]
    try:
        worst = 0.0
        for few in [short] + [[g] for g in long]:
            packed = measure(model, pack(few, row=sum(map(Group.tokens, few)), even=math.inf))
            worst = max(worst, (packed - measure(model, pad(few))).abs().max().item())
        why = None if worst <= tolerance else f"its numbers differ by {worst:.2g}"
    except Exception as error:                               # a model that takes no such mask may fail in any way
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    if why:
        print(f"packed forward fails with {type(model).__name__} ({why:.120}): using the padded one, slower and right")
    return why is None


# ⑥ sample -------------------------------------------------------------------------------------------------------------

@dataclass
class Sample:
    ids: list                                                # with the end token where it ended by itself
    logps: list                                              # their log-probs at the sampling temperature, before top-p
    ended: bool                                              # False: cut at max_new_tokens


class RoomyLayer(DynamicLayer):
    """A cache layer that takes room for 64 tokens at a time; transformers' own copies all of itself for every token."""
    room = None                                              # 2 × (rows, heads, used + free, d); keys, values view it

    def update(self, key_states, value_states, *args, **kwargs):
        used, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if self.room is None or end > self.room[0].shape[-2]:
            self.room = [F.pad(old, (0, 0, 0, end - used + 63)) for old in (self.keys, self.values)]
        for room, new in zip(self.room, (key_states, value_states)):
            room[:, :, used:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self.room = None                                     # rows left: keys and values are copies now


@torch.no_grad()
def sample(model, prompts, n, max_new_tokens, stops, temperature=1.0, top_p=1.0, greedy=False, seed=0,
           cache_tokens=2 ** 17, progress=None):
    """n answers for each prompt (lists of ids) → for each prompt a list of n Samples.

    Each prompt is prefilled once and its cache repeated n times; answers that ended leave the batch. Nothing is taken
    from the checkpoint's generation_config. Sampling inverts the CDF at uniforms that are drawn up front, seeded by the
    prompt: so what is sampled depends neither on the batch and order of the prompts nor on when others end.
    cache_tokens bounds rows × (prompt + answer) of one batch: memory only.
    """
    if not greedy and not (temperature > 0 and 0 < top_p <= 1):
        raise ValueError(f"sampling needs temperature > 0 and 0 < top_p <= 1, not {temperature} and {top_p}; "
                         "greedy=True is the limit T → 0")
    device, was_training = next(model.parameters()).device, model.training
    temperature = 1.0 if greedy else temperature
    if not prompts:
        return []
    uniform, seen = [], Counter()
    for prompt in prompts:                                   # a prompt has its own numbers, at whatever place it stands
        seen[key] = seen[(key := str(prompt))] + 1
        own = int.from_bytes(hashlib.sha256(f"{seed} {key} {seen[key]}".encode()).digest()[:7], "big")
        uniform.append(torch.rand(n, max_new_tokens, generator=torch.Generator().manual_seed(own), dtype=torch.float64))
    uniform = torch.stack(uniform)                           # (P, n, max_new_tokens)
    takes = inspect.signature(model.forward).parameters
    stop = torch.tensor(stops, device=device)
    results = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    bar = tqdm(total=len(prompts) * n, desc=progress, unit="answer", leave=False, disable=None if progress else True)
    model.eval()                                             # train mode with checkpointing silently drops the cache
    try:
        while order:
            width = len(prompts[order[0]])
            size = 1                                         # as many prompts, alike in length, as the cache can hold
            while size < len(order) and (size + 1) * n * (len(prompts[order[size]]) + max_new_tokens) <= cache_tokens:
                size += 1
            batch, order = order[:size], order[size:]
            width = len(prompts[batch[-1]])                  # filled up on the left: all answers begin in one column
            ids = torch.tensor([[0] * (width - len(prompts[i])) + list(prompts[i]) for i in batch], device=device)
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            rows = torch.arange(size * n, device=device)     # rows still running, as indices into the outputs below
            u = uniform[batch].flatten(0, 1).to(device)      # (size·n, max_new_tokens)
            out_ids = torch.zeros(size * n, max_new_tokens, dtype=torch.long, device=device)
            out_logps = torch.zeros(size * n, max_new_tokens, device=device)
            length = torch.full((size * n,), max_new_tokens, device=device)
            ended = torch.zeros(size * n, dtype=torch.bool, device=device)
            cache = None
            for t in range(max_new_tokens):
                extra = {"position_ids": positions} if "position_ids" in takes else {}
                extra |= {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
                out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
                logits = out.logits[:, -1].float() / temperature                 # (rows, V)
                if cache is None:                            # prefilled: each prompt's cache, mask and logits n times
                    cache = getattr(out, "past_key_values", None)
                    if cache is None:
                        fail(f"{type(model).__name__} keeps no past_key_values, so it cannot be sampled from here.")
                    for layer in getattr(cache, "layers", []):
                        if type(layer) is DynamicLayer:      # sliding windows and linear attention keep their own
                            layer.__class__ = RoomyLayer
                    cache.reorder_cache(torch.arange(size, device=device).repeat_interleave(n))
                    logits, mask, positions = (x.repeat_interleave(n, 0) for x in (logits, mask, positions[:, -1:]))
                logp = logits.log_softmax(-1)
                if greedy:
                    token = logp.argmax(-1)
                else:
                    token = draw(logp.exp(), u[rows, t], top_p)
                out_ids[rows, t] = token
                out_logps[rows, t] = logp.gather(1, token[:, None])[:, 0]
                done = torch.isin(token, stop)
                if done.any():                               # finished rows leave: cost follows the tokens made
                    length[rows[done]] = t + 1
                    ended[rows[done]] = True
                    stay = (~done).nonzero()[:, 0]
                    bar.update(int(done.sum()))
                    if len(stay) == 0:
                        break
                    cache.reorder_cache(stay)                # unlike batch_select_indices also for linear attention
                    rows, token, mask, positions = rows[stay], token[stay], mask[stay], positions[stay]
                ids, positions = token[:, None], positions + 1
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            bar.update(int((~ended).sum()))
            out_ids, out_logps, length, ended = (x.tolist() for x in (out_ids, out_logps, length, ended))
            samples = [Sample(i[:m], p[:m], e) for i, p, m, e in zip(out_ids, out_logps, length, ended)]
            for j, i in enumerate(batch):
                results[i] = samples[j * n:(j + 1) * n]
    finally:
        model.train(was_training)
        bar.close()
    return results


def draw(probs, u, top_p=1.0):
    """Inverse CDF: the first token whose cumulative probability exceeds u. probs (n, V), u (n,) in [0, 1) → (n,)."""
    if top_p < 1:                                            # the smallest set of tokens that holds at least top_p
        p, index = probs.sort(-1, descending=True)
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
        probs = torch.zeros_like(probs).scatter(1, index, p)
    wide = torch.float32 if probs.device.type == "mps" else torch.float64    # float32 sums of 150,000 lose the tail
    cdf = probs.cumsum(-1, dtype=wide)
    token = torch.searchsorted(cdf, (u.to(wide) * cdf[:, -1])[:, None], right=True)[:, 0]
    return token.clamp(max=probs.shape[1] - 1)


# ⑦ length -------------------------------------------------------------------------------------------------------------

def lowess(x, y, at, frac=0.5):
    """Locally weighted regression (Cleveland 1979, one pass): the value at each `at` of a line fitted around it.

    x, y (n,), at (a,) → (a,) float64. The nearest frac·n points take part, with tricube weights that end at 0 at the
    farthest of them. Where they all have one x there is no slope to fit, and the value is their mean.
    """
    x, y, at = (torch.as_tensor(v, dtype=torch.float64) for v in (x, y, at))
    distance = (x - at[:, None]).abs()                                           # (a, n)
    reach = distance.kthvalue(min(len(x), max(1, math.ceil(frac * len(x)))), 1).values[:, None]
    tricube = (1 - (distance / reach.clamp(min=1e-12)).clamp(max=1) ** 3) ** 3
    # A reach of 0: so many points stand right here that no other is needed.
    weight = torch.where(reach > 0, tricube, (distance == 0).double())
    # All within reach may stand at its edge, where the weight is 0 (two lengths, `at` between): then all count alike.
    weight = torch.where(weight.sum(1, keepdim=True) > 1e-9, weight, (distance <= reach).double())
    weight = weight / weight.sum(1, keepdim=True)
    mean_x, mean_y = weight @ x, weight @ y                                      # (a,)
    dx, dy = x - mean_x[:, None], y - mean_y[:, None]                            # (a, n)
    var = (weight * dx ** 2).sum(1)
    slope = torch.where(var > 1e-9, (weight * dx * dy).sum(1) / var.clamp(min=1e-9), 0.0)
    return mean_y + slope * (at - mean_x)


def calibrate(score, length, curve, mean):
    """Scores without what their length explains: score − curve(length) + mean (Huang et al. 2024, arXiv 2409.17407).

    curve: [[length, fitted score], …] by length, config.reward_by_length; mean: config.reward_mean. Between knots
    straight lines, beyond the ends constant: a line there would be an extrapolation. score, length (n,) → (n,) float64.
    """
    score, length = (torch.as_tensor(v, dtype=torch.float64) for v in (score, length))
    x, y = torch.tensor(curve, dtype=torch.float64).T.contiguous()               # (knots,) each
    right = torch.searchsorted(x, length.contiguous()).clamp(min=1, max=max(1, len(x) - 1))
    left, right = right - 1, right.clamp(max=len(x) - 1)
    share = ((length - x[left]) / (x[right] - x[left]).clamp(min=1e-12)).clamp(0, 1)
    return score - (y[left] + share * (y[right] - y[left])) + mean
