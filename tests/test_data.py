"""Sections ① read, ② tokenise and ⑧ run of common.py: no row is changed or lost in silence, the boundary never moves,
and no run is lost.

Expected values come from hand, from json / csv / pyarrow, or from a plain `tokenizers` object; never from common.py.
a1 … a24 are the traps that a test keeps out: the moving boundary, the second BOS, the end that is never learnt, ….
"""
import argparse
import csv
import functools
import gzip
import io
import json
import os
import re
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import pyarrow.parquet  # noqa: E402
import pytest  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors  # noqa: E402
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402

import common  # noqa: E402
import train_dpo  # noqa: E402
from common import (  # noqa: E402
    FORMATS, MARK, Account, Encoder, Group, failing, read_groups, split_by_prompt, split_transcripts, tokenise, within)

PAIRS = [name for name, row in FORMATS.items() if row.gives == "pair"]


def real(name):
    path = Path(__file__).parents[2] / "shared" / "data" / name
    return path if path.exists() else pytest.skip(f"{name} is not here")


@pytest.fixture
def refuses(capsys):
    """with refuses("line 2", "'chosen'"): … must end with exit code 2 and one sentence that holds these words."""
    @contextmanager
    def refuses(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as error:
            yield
        out, err = capsys.readouterr()
        assert error.value.code == 2 and out == "" and re.fullmatch(r"error: [^\n]+\.\n", err), err
        assert all(w in err for w in words), err
    return refuses


@pytest.fixture
def data(tmp_path):
    """data(rows) → a file of the type that the name says, written by other means than those of common.py."""
    def data(rows, name="d.jsonl"):
        ending = name.removesuffix(".gz").split(".")[1]
        if ending == "parquet":
            buffer = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
            raw = buffer.getvalue()
        elif ending == "csv":
            text = io.StringIO(newline="")
            csv.writer(text).writerows([list(rows[0]), *(r.values() for r in rows)])
            raw = text.getvalue().encode()
        elif ending == "json":
            raw = json.dumps(rows, indent=1).encode()
        else:
            raw = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return str(tmp_path / name)
    return data


def read(path, usable=tuple(FORMATS), **options):
    groups, account = read_groups(str(path), usable, **options)
    return [(g.prompt, g.completions) for g in groups], account


# --- errors and flags -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("interval, kind, good, bad", [
    ("[0, 1)", float, {"0": 0, "0.5": 0.5, "1e-9": 1e-9, "-0.0": 0}, ["1", "-1e-9", "nan", "inf", "-inf", "x", ""]),
    ("(0, inf)", float, {"1e-300": 1e-300, "1e308": 1e308}, ["0", "inf", "1e999", "nan", "-1"]),
    ("[1, inf)", int, {"1": 1, "9" * 400: int("9" * 400)}, ["0", "1e3", "2.0", "inf", "nan", "", "9" * 5000]),
    ("[0, 2e18]", int, {"2000000000000000000": 2 * 10 ** 18}, ["2000000000000000001", "-1"]),
])
def test_flags_are_numbers_within_an_interval(interval, kind, good, bad):
    parse = within(interval, kind)
    for text, value in good.items():
        assert parse(text) == value and type(parse(text)) is kind
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(interval)):
            parse(text)


def test_the_innermost_sentence_is_the_one_that_is_said(refuses, capsys):
    with refuses("inner (KeyError: 'x')"):
        with failing("outer"):
            with failing("inner"):
                raise KeyError("x")
    with refuses("outer (ValueError)"):
        with failing("outer"):
            raise ValueError
    with pytest.raises(KeyboardInterrupt):                   # the user's own end is no failure
        with failing("outer"):
            raise KeyboardInterrupt


# --- ① files ----------------------------------------------------------------------------------------------------------

NASTY = 'commas, "quotes",\nnew\r\nlines, ' + "\u2028 \x85 ünï 🙂 and ['brackets']"
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_every_file_type_gives_the_same_rows(data, ending, suffix):
    rows = [{"prompt": NASTY, "chosen": "yes", "rejected": NASTY}]
    rows += [{"prompt": "q" * 200_000, "chosen": " 1", "rejected": "2"}]
    groups, account = read(data(rows, f"d.{ending}{suffix}"))
    assert groups == [(NASTY, ["yes", NASTY]), ("q" * 200_000, [" 1", "2"])]
    assert account.rows == 2 and account.format == "pair" and not account.dropped


def test_byte_order_mark_blank_lines_and_limit(tmp_path):
    rows = [b'{"prompt": "q%d"}' % i for i in range(5)]
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(rows))
    assert read(tmp_path / "d.jsonl", limit=3)[0] == [("q0", []), ("q1", []), ("q2", [])]
    (tmp_path / "d.csv").write_bytes(b"\xef\xbb\xbfprompt\nq0\n\nq1\n")
    assert read(tmp_path / "d.csv")[0] == [("q0", []), ("q1", [])]


BODY = gzip.compress(b'{"prompt": "a"}\n' * 50)
BROKEN = {                                                   # name: (bytes, words of the sentence)
    "a.jsonl": (b'{"prompt": "a"}\n{"prompt": \n', ["line 2", "broken JSON"]),
    "b.json": (b'[{"prompt": "a"},\n{"prompt"}]', ["line 2", "broken JSON"]),
    "c.jsonl": (b'{"prompt": "a"}\n["b"]\n', ["line 2", "list"]),
    "d.json": (b'[{"prompt": "a"}, "b"]', ["row 2", "str"]),
    "e.csv": (b'prompt,chosen,rejected\na,b,c\na,b\n', ["line 3", "3 fields"]),
    "f.csv": (b'prompt,chosen,rejected\na,b,c\na,b,c,d\n', ["line 3", "3 fields"]),
    "u.csv": (b'prompt,"chosen\na,b\n', ["line 1", "broken CSV"]),
    "g.csv": (b'prompt\na\n"never closed\nx\nx\n', ["line 3", "broken CSV"]),
    "h.jsonl.gz": (b'{"prompt": "a"}\n', ["cannot be read"]),
    "i.jsonl.gz": (BODY[:-20], ["cannot be read"]),
    "j.jsonl.gz": (BODY[:12] + b"\xff\xff" + BODY[14:], ["cannot be read"]),
    "k.parquet": (b"PAR1 this is none", ["cannot be read"]),
    "l.jsonl": (b'{"prompt": "\xff"}', ["line 1", "UTF-8"]),
    "m.txt": (b"a", [".jsonl"]),
    "n.jsonl": (b"\n", ["no rows"]),
    "o.json": (b"[]", ["no rows"]),
    "p.csv": (b"prompt\n", ["no rows"]),
    "q.jsonl": (b'{"text": "a"}', ["text", "fit no format", "prompt", "--columns"]),
    "r.json": (b"[" * 100_000, ["r.json: broken JSON"]),
    "s.json": (b'[\n' + b"1" * 5000 + b"]", ["s.json: broken JSON"]),
    "t.jsonl": (b'{"prompt": "a"}\n{"prompt": ' + b"1" * 5000 + b"}", ["line 2", "broken JSON"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_end_in_one_sentence(tmp_path, refuses, name):
    content, words = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with refuses(name, *words):
        read(tmp_path / name)


def test_missing_files_and_the_hub(tmp_path, refuses, monkeypatch):
    def load_dataset(name, split):
        if name == "org/none":
            raise ConnectionError("offline\nand a long story")
        return [{"prompt": f"{name} {split}"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read("org/name", split="test")[0] == [("org/name test", [])]
    with refuses("org/none", "train", "ConnectionError: offline"):
        read("org/none")
    with refuses("none.jsonl", "no such file"):
        read(tmp_path / "none.jsonl")


# --- ① formats --------------------------------------------------------------------------------------------------------

def ask(text):
    return {"role": "user", "content": text}


def say(text):
    return {"role": "assistant", "content": text}


U, B = ask("u"), say("b")
H, A = "\n\nHuman:", "\n\nAssistant:"
PKU = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1}

EXAMPLES = [                                                 # (format, row, its prompt, its completions)
    ("pair", PAIR, "p", ["a", "b"]),
    ("pair", {"prompt": [U], "chosen": [say("a")], "rejected": [B]}, [U], ["a", "b"]),
    ("pair", {"prompt": [U], "chosen": "a", "rejected": "b"}, [U], ["a", "b"]),
    ("pair", {"prompt": "u", "chosen": [say("a")], "rejected": [B]}, [U], ["a", "b"]),
    ("pair", {"prompt": "u", "chosen": [U, say("a")], "rejected": [U, B]}, [U], ["a", "b"]),  # as in UltraFeedback
    ("pair, prompt inside", {"chosen": [U, B, U, say("a")], "rejected": [U, B, U, B]}, [U, B, U], ["a", "b"]),
    ("pair, prompt inside", {"chosen": f"{H} p{A} a", "rejected": f"{H} p{A} b"}, f"{H} p{A}", [" a", " b"]),
    ("PKU-SafeRLHF", PKU, "p", ["b", "a"]),
    ("ranked list", {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 3.5, 2]}, "p", ["a", "b", "c"]),
    ("ranked list", {"question": "p", "responses": ["a", "b", "c"], "ranks": [3, 1, 2]}, "p", ["a", "b", "c"]),
    ("unpaired", {"prompt": "p", "completion": "a", "label": True}, "p", ["a"]),
    ("response", {"prompt": "p", "response": "a"}, "p", ["a"]),
    ("prompt", {"question": "p"}, "p", []),
]

MISSING = []                                                 # (format, row, a column without which it is an error)
for example in EXAMPLES:
    row = example[1]
    for column in row:
        if column != "prompt" or row.get("chosen", [0])[0] != U:      # whole dialogues need no prompt
            MISSING.append((example[0], row, column))


@pytest.mark.parametrize("name, row, prompt, completions", EXAMPLES)
def test_every_format_is_recognised(data, name, row, prompt, completions):
    for file in ("d.jsonl", "d.parquet"):
        groups, account = read(data([row], file))
        assert account.format == name and groups == [(prompt, completions)]


@pytest.mark.parametrize("name, row, column", MISSING)
def test_a16_a_column_that_a_later_row_lacks(data, refuses, name, row, column):
    with refuses("d.jsonl, line 2", f"'{column}'", "missing"):
        read(data([row, {k: v for k, v in row.items() if k != column}]), [name])


NO_TEXT = [
    None, 5, ["a"], {"x": 1}, float("nan"), [], [ask(None)], [ask(["a"])], [ask([None])], [ask([{"type": "image"}])],
    [{"role": 1, "content": "a"}], [{"role": None, "content": "a"}]]


@pytest.mark.parametrize("bad", NO_TEXT)
@pytest.mark.parametrize("column", ["prompt", "chosen"])
def test_a16_what_is_no_text_is_refused(data, refuses, column, bad):
    with refuses("d.jsonl, line 2", f"'{column}'"):
        read(data([PAIR, PAIR | {column: bad}]))


def test_a16_nulls_of_parquet_and_parts_of_messages(data, refuses):
    with refuses("d.parquet, row 2", "'chosen'"):
        read(data([PAIR, PAIR | {"chosen": None}], "d.parquet"))
    parts = ask([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}])
    assert read(data([{"prompt": [parts]}]))[0] == [([ask("one two")], [])]


def test_columns_are_renamed_all_at_once(data, refuses):
    file = data([{"question": "p", "best": "a", "worst": "b", "id": 1}])
    [group], _ = read_groups(file, PAIRS, columns=["prompt=question", "chosen=best", "rejected=worst"])
    assert (group.prompt, group.completions) == ("p", ["a", "b"]) and group.row == PAIR | {"id": 1}
    for wrong in ("prompt=nosuch", "prompt", "prompt="):
        with refuses(f"--columns {wrong}", "d.jsonl", "question"):
            read(file, columns=[wrong])
    assert read(data([PAIR]), columns=["chosen=rejected", "rejected=chosen"])[0] == [("p", ["b", "a"])]
    rows = [{"prompt": "p", "best": "a", "rejected": "b"}, {"prompt": "p", "rejected": "b"}]
    with refuses("d.jsonl, line 2", "'best'"):
        read(data(rows), columns=["chosen=best"])


def test_a_format_that_the_script_cannot_use_is_named(data, refuses):
    with refuses("d.jsonl", "'unpaired'", "chosen"):
        read(data([{"prompt": "p", "completion": "a", "label": 1}]), PAIRS)


@pytest.mark.parametrize("prefer, chosen", [("better", "b"), ("safer", "a")])
def test_a19_pku_labels(data, refuses, prefer, chosen):
    row = PKU | {"safer_response_id": 0}
    for name in ("d.jsonl", "d.csv"):                        # in CSV the ids are text
        groups, _ = read(data([row], name), prefer=prefer)
        assert groups[0][1][0] == chosen
    for bad in (2, -1, None, "x", True, float("nan")):
        with refuses("d.jsonl, line 2", f"'{prefer}_response_id'"):
            read(data([row, row | {f"{prefer}_response_id": bad}]), prefer=prefer)
    other = {"better": "safer", "safer": "better"}[prefer]
    with refuses("line 1", f"'{other}_response_id'", "missing"):
        read(data([{k: v for k, v in row.items() if k != f"{other}_response_id"}]), prefer=other)


def test_a19_real_pku_rows():
    file = real("pku-saferlhf/train-128.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    want = []
    for r in rows:
        best = r["better_response_id"]
        pair = [r[f"response_{best}"], r[f"response_{1 - best}"]]
        if all(pair) and pair[0] != pair[1]:
            want.append((r["prompt"], pair))
    assert read(file)[0] == want and len(rows) == 128


def test_ranked_lists_carry_scores_of_which_higher_is_better(data, refuses):
    for values, want in [({"scores": [1, 3.5, "2"]}, [1, 3.5, 2]), ({"ranks": [3, 1, 2]}, [-3, -1, -2])]:
        [group], _ = read_groups(data([{"prompt": "p", "completions": ["a", "b", "c"]} | values]), ["ranked list"])
        assert group.scores == want
    good = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}
    bad_values = [("responses", ["a"]), ("responses", "ab"), ("responses", ["a", 5])]
    bad_values += [("scores", [1, None]), ("scores", [1, float("inf")]), ("scores", 1)]
    for column, bad in bad_values:
        with refuses("d.jsonl, line 2", f"'{column}'"):
            read(data([good, good | {column: bad}]))


LABELS = [(label, 1) for label in (True, 1, "true", "True", "1")]
LABELS += [(label, 0) for label in (False, 0, "FALSE", "0")]
LABELS += [(label, None) for label in (None, 2, "good", "")]


@pytest.mark.parametrize("label, want", LABELS)
def test_labels_of_unpaired_rows(data, refuses, label, want):
    file = data([{"prompt": "p", "completion": "a", "label": 1}, {"prompt": "p", "completion": "a", "label": label}])
    if want is None:
        with refuses("d.jsonl, line 2", "'label'"):
            read(file)
    else:
        assert read_groups(file, ["unpaired"])[0][1].scores == [want]


def test_further_columns_are_kept(data):
    row = PAIR | {"score_chosen": 8.5, "score_rejected": 3, "p_chosen": 0.9}
    assert read_groups(data([row]), PAIRS)[0][0].row == row
    gsm = {"question": "1+1?", "answer": "#### 2", "level": 3}        # what was said, or what is correct
    [said], _ = read_groups(data([gsm]), ["response"])
    [asked], _ = read_groups(data([gsm]), ["prompt"])
    assert (said.prompt, said.completions, said.row) == ("1+1?", ["#### 2"], {"question": "1+1?", "level": 3})
    assert (asked.prompt, asked.completions, asked.row) == ("1+1?", [], gsm)


def test_a15_empty_and_identical_completions_are_dropped_and_counted(data):
    completions = [("", "x"), ("x", " \n"), ("x", "x"), (" x", "x "), ("x", "y")]
    groups, account = read(data([{"prompt": "p", "chosen": a, "rejected": b} for a, b in completions]))
    assert groups == [("p", ["x", "y"])] and account.rows == 5
    assert account.dropped == {"with an empty completion": 2, "with identical completions": 2}


@pytest.mark.parametrize("chosen, rejected, want", [
    (f"{H} a{A} b{H} c{A} d", f"{H} a{A} b{H} c{A} e", (f"{H} a{A} b{H} c{A}", " d", " e")),
    (f"{H} a{A} b{H} c{A} d", f"{H} a{A} x{H} c{A} d", None),                        # they part in an earlier turn
    (f"{H} a{A} b", f"{H} x{A} b", None),                                            # … in the question
    (f"{H} a{A} b", f"{H} a{A} b{H} c{A} d", None),                                  # one goes on
    (f"{H} a{A} b", f"{H} a{A} b.  Human: c{A} d", None),                            # … as some rows of HH-RLHF do
    (f"{H} a{A} say {A} x", f"{H} a{A} no", (f"{H} a{A}", f" say {A} x", " no")),    # a completion quotes the marker
    (f"{H} a{A} no", f"{H} a{A} {A}", (f"{H} a{A}", " no", f" {A}")),
    (f"{H} a{A} d", f"{H} a{A} d and more", (f"{H} a{A}", " d", " d and more")),     # one begins like the other
    (f"{H} a{A}", f"{H} a{A} d", (f"{H} a{A}", "", " d")),
    ("no marker", "no mark", None),
    ("", "", None),
])
def test_a12_transcripts_are_split_at_the_last_shared_assistant(chosen, rejected, want):
    assert split_transcripts(chosen, rejected) == want


def test_a12_what_cannot_be_split_is_dropped_and_counted(data, refuses):
    rows = [
        {"chosen": f"{H} a{A} b", "rejected": f"{H} a{A} c"},
        {"chosen": f"{H} a{A} b", "rejected": f"{H} x{A} b"},
        {"chosen": f"{H} a{A} b", "rejected": f"{H} a{A} b"},
        {"chosen": f"{H} a{A}", "rejected": f"{H} a{A} d"},
        {"chosen": [U, B, U, B], "rejected": [U, say("else"), U, say("x")]},
        {"chosen": [B], "rejected": [say("x")]}]
    groups, account = read(data(rows))
    assert groups == [(f"{H} a{A}", [" b", " c"])]
    assert account.dropped == {
        "that differ before the last turn": 3, "with identical completions": 1, "with an empty completion": 1}
    for bad in ({"rejected": [U, B]}, {"chosen": [U, U], "rejected": [U, B]}):
        with refuses("d.jsonl, line 2"):
            read(data(rows[:1] + [rows[0] | bad]))


def test_a12_real_hh_rlhf():
    groups, account = read_groups(str(real("hh-rlhf/harmless-base-test.jsonl.gz")), PAIRS)
    # Four completions are empty (lines 87, 517, 926, 1104), four hold a further exchange (1255, 1689, 1951, 2037).
    assert account.rows == 2312
    assert account.dropped == {"with an empty completion": 4, "that differ before the last turn": 4}
    kept = {int(g.where.rpartition(" ")[2]) for g in groups}
    assert set(range(1, 2313)) - kept == {87, 517, 926, 1104, 1255, 1689, 1951, 2037}
    for g in groups:
        assert g.prompt.endswith(A) and [g.prompt + c for c in g.completions] == [g.row["chosen"], g.row["rejected"]]
        assert not any(H in c for c in g.completions)


# --- ② tokenisers, made by hand ---------------------------------------------------------------------------------------

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
WORDS = ["yes", "hello", "world", "is", "I", "do"]           # one token each, also with a space before
ASCII = [chr(c) for c in range(33, 127)]


def wrap(model, pre_tokenizer, decoder, normalizer=None, bos=True, template=None, **names):
    backend = Tokenizer(model)
    backend.decoder = decoder
    if pre_tokenizer:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer:
        backend.normalizer = normalizer
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(SPECIAL)
    defaults = {"bos_token": "<s>" if bos else None, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **(defaults | names))


def numbered(*tokens):
    return {t: i for i, t in enumerate(dict.fromkeys(SPECIAL + list(tokens)))}


def bpe(alphabet, space, **options):
    """Merges from left to right: y es → ye s → yes, then ▁ yes → ▁yes."""
    merges = []
    for word in WORDS:
        merges += [(word[:i], word[i]) for i in range(1, len(word))]
    merges += [(space, word) for word in WORDS]
    return models.BPE(numbered(*alphabet, *(a + b for a, b in merges)), merges, **options)


def byte_level(**options):
    model = bpe(sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ")
    return wrap(model, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), **options)


def sentencepiece(**options):
    """As Llama 2: a "▁" before every text, bytes for what is unknown."""
    alphabet = [f"<0x{i:02X}>" for i in range(256)] + ["▁"] + ASCII
    model = bpe(alphabet, "▁", unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    strip = decoders.Strip(" ", 1, 0)
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return wrap(model, None, decoder, normalizer, **options)


def metaspace(**options):
    """The same "▁", put there by the pre-tokeniser."""
    model = bpe(["▁", "\n"] + ASCII, "▁", unk_token="<unk>")
    how = {"prepend_scheme": "first"}
    return wrap(model, pre_tokenizers.Metaspace(**how), decoders.Metaspace(**how), **options)


def wordpiece(**options):
    model = models.WordPiece(numbered(" ", "\n", *ASCII, *("##" + c for c in ASCII), *WORDS), unk_token="<unk>")
    decoder = decoders.Sequence([decoders.Replace("##", ""), decoders.Fuse()])
    return wrap(model, pre_tokenizers.Split(Regex(r"\s|\w+|[^\w\s]"), "isolated"), decoder, **options)


def letters(**options):
    """One token a character."""
    model = models.WordLevel(numbered(" ", "\n", *ASCII), unk_token="<unk>")
    return wrap(model, pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse(), **options)


@functools.cache
def pretrained(name):
    return AutoTokenizer.from_pretrained(real(name))


TOKENISERS = {f.__name__: f for f in (byte_level, sentencepiece, metaspace, wordpiece, letters)}
TOKENISERS |= {f"{f.__name__}, no BOS": functools.partial(f, bos=False) for f in (byte_level, sentencepiece)}
TOKENISERS |= {name: functools.partial(pretrained, name) for name in ("qwen2.5-tokenizer", "stories260k")}

# Chat templates. CHAT writes <s> itself, and ends turns in EOS and a newline.
CHAT = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
END = CHAT.replace("</s>", "<|end|>").replace("{{ '<s>' }}", "")              # another end of turn, no BOS
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|system|>Be kind.<|end|>\n' }}{% endif %}" + END
TRIM = CHAT.replace("m.content", "m.content | trim")
SPACE = CHAT.replace("m.content", "' ' + m.content").replace("'<|assistant|>'", "'<|assistant|> '")    # " yes" merges
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system please') }}{% endif %}" + CHAT
FICKLE = "{{ messages | length }}" + CHAT


def encode(tokenizer, prompt, *completions, **options):
    return Encoder(tokenizer, **options)(Group("d.jsonl, line 7", prompt, list(completions)))


def plain_ids(tokenizer, text):
    """Without common.py: what the tokenizers library makes of a text, special tokens recognised."""
    tokenizer.backend_tokenizer.encode_special_tokens = False
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def tokens(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


# --- ② traps ----------------------------------------------------------------------------------------------------------

SEAMS = {
    "the answer is ": ["yes", "no"],
    "the answer is": [" yes", "\nyes", "7", "yes"],
    "hel": ["lo world", " hello", "p"],
    "say it\n": ["\n\nyes", " no"],
    "Assistant:": [" I do", "I do", " 7", "  two"],
}


@pytest.mark.parametrize("name", TOKENISERS)
def test_a1_a3_a24_boundary_never_moves(name):
    tokenizer = TOKENISERS[name]()
    encoder = Encoder(tokenizer)
    eos = tokenizer.eos_token_id
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token else []
    for prompt, completions in SEAMS.items():
        group = encoder(Group("", prompt, completions))
        alone = plain_ids(tokenizer, prompt)
        assert group.prompt_ids == bos + alone and group.ended == [True] * len(completions)
        for completion, ids in zip(completions, group.completion_ids):
            joint = plain_ids(tokenizer, prompt + completion)
            assert ids[-1] == eos and eos not in ids[:-1]
            assert tokenizer.decode(group.prompt_ids + ids, skip_special_tokens=True) == prompt + completion
            if joint[:len(alone)] == alone:
                assert ids[:-1] == joint[len(alone):]
            else:
                assert ids[:-1] != joint[len(alone):]
            assert encoder.decode(ids) == completion         # of plain text, whether there is a template or not


@pytest.mark.parametrize("make, prompt, completion, want_prompt, want_completion", [
    (byte_level, "it is ", "yes", "<s> i t Ġis Ġ", "yes </s>"),
    (byte_level, "it is", " yes", "<s> i t Ġis", "Ġyes </s>"),
    (byte_level, "hel", "lo world", "<s> hel", "l o Ġworld </s>"),
    (sentencepiece, "it is ", "yes", "<s> ▁ i t ▁is ▁", "yes </s>"),
    (sentencepiece, "a:", "I do", "<s> ▁ a :", "I ▁do </s>"),
    (sentencepiece, "a:", " I do", "<s> ▁ a :", "▁I ▁do </s>"),
    (sentencepiece, "hel", "lo world", "<s> ▁ hel", "l o ▁world </s>"),
    (sentencepiece, "a", "\nI", "<s> ▁ a", "<0x0A> I </s>"),
    (metaspace, "hel", "lo world", "<s> ▁ hel", "l o ▁world </s>"),
    (metaspace, "a:", "I do", "<s> ▁ a :", "I ▁do </s>"),
    (wordpiece, "hel", "lo", "<s> h ##e ##l", "l ##o </s>"),
    (letters, "ab", "yes", "<s> a b", "y e s </s>"),
])
def test_a1_a24_token_by_token(make, prompt, completion, want_prompt, want_completion):
    tokenizer = make()
    group = encode(tokenizer, prompt, completion)
    assert tokens(tokenizer, group.prompt_ids) == want_prompt
    assert tokens(tokenizer, group.completion_ids[0]) == want_completion


@pytest.mark.parametrize("make", [byte_level, sentencepiece, metaspace])
@pytest.mark.parametrize("template", [CHAT, END, DEFAULT_SYSTEM, TRIM, SPACE, NO_SYSTEM])
@pytest.mark.parametrize("bos", [True, False])
def test_a2_a6_a7_a8_a_chat_is_rendered_once_begins_once_and_ends_once(make, template, bos):
    tokenizer = make(bos=bos, template=template)
    messages = [U, B, ask("hello")]
    completions = ["yes", "I do\nso"]
    group = encode(tokenizer, messages, *completions)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    start = [1] if bos and "<s>" not in template else []
    assert text.rstrip(" ").endswith("<|assistant|>")                                            # a8
    assert group.prompt_ids == start + plain_ids(tokenizer, text)
    assert group.prompt_ids.count(1) == (bos or "<s>" in template)                               # a2, a3
    end = SPECIAL.index("<|end|>" if "<|end|>" in template else "</s>")
    for completion, ids in zip(completions, group.completion_ids):
        full = tokenizer.apply_chat_template(messages + [say(completion)], tokenize=False).removesuffix("\n")
        assert ids.count(end) == 1 and ids[-1] == end and 1 not in ids                           # a6
        whole = tokenizer.decode(start + plain_ids(tokenizer, full))
        assert tokenizer.decode(group.prompt_ids + ids) == whole                                 # a7
        assert whole.count("Be kind.") == ("Be kind." in template)
    assert Encoder(tokenizer).prompt(messages)[0] == group.prompt_ids                            # what is sampled from


@pytest.mark.parametrize("bos", [True, False])
def test_a3_bos_where_the_template_writes_none(bos):
    tokenizer = letters(bos=bos, template=END)
    first = "<s> " if bos else ""
    assert tokens(tokenizer, encode(tokenizer, [U], "y").prompt_ids) == first + "<|user|> u <|end|> \n <|assistant|>"
    assert tokens(tokenizer, encode(tokenizer, "ab", "y").prompt_ids) == first + "a b"
    assert tokens(tokenizer, encode(tokenizer, "<s>a", "y").prompt_ids) == first + "< s > a"


def test_a4_pad_is_eos():
    tokenizer = letters(template=CHAT, pad_token="</s>")
    group = encode(tokenizer, [U, B, U], "y", "yes")
    turns = "<|user|> u </s> \n <|assistant|> b </s> \n <|user|> u </s> \n <|assistant|>"
    assert tokens(tokenizer, group.prompt_ids) == "<s> " + turns
    assert [tokens(tokenizer, ids) for ids in group.completion_ids] == ["y </s>", "y e s </s>"]
    assert group.tokens() == 14 + 2 + 4


@pytest.mark.parametrize("template, eos_of_generation, stops, end", [
    (None, None, [2], 2), (None, 7, [2, 7], 2), (None, [2, 7], [2, 7], 2),
    (END, None, [2, 7], 7), (END, [3], [2, 3, 7], 7), (CHAT, [0, 2], [0, 2], 2),
])
def test_a5_all_that_ends_a_completion(template, eos_of_generation, stops, end):
    tokenizer = letters(template=template)
    encoder = Encoder(tokenizer, generation_config=SimpleNamespace(eos_token_id=eos_of_generation))
    assert encoder.stops == stops
    group = encoder(Group("", [U] if template else "u", ["y"]))
    assert group.completion_ids == [plain_ids(tokenizer, "y") + [end]]
    for stop in stops:
        assert encoder.decode(plain_ids(tokenizer, "yes") + [stop]) == "yes"
        assert encoder.decode([stop]) == ""                  # a15: EOS alone is a completion
    assert encoder.decode(plain_ids(tokenizer, " yes")) == " yes"             # truncated: nothing to take off


def test_a5_a_model_without_any_end_is_refused(refuses):
    assert Encoder(letters(eos_token=None, template=END)).stops == [7]
    with refuses("EOS"):
        Encoder(letters(eos_token=None))


def test_a9_a_template_that_rewrites(refuses):
    tokenizer = letters(template=TRIM)
    account = Account("d.jsonl", "pair", 1)
    [group] = tokenise([Group("d.jsonl, line 7", [U], ["\n  yes ", "no"])], account, Encoder(tokenizer), 99)
    assert tokens(tokenizer, group.completion_ids[0]) == "y e s </s>" and "rewrites some completions" in str(account)
    with refuses("d.jsonl, line 7", "character 0", "'1<s>", "'2<s>"):
        encode(letters(template=FICKLE), [U], "yes")


def test_a10_prompts_are_lists_of_ids():
    ids, text = Encoder(letters(template=CHAT)).prompt([ask("x" * 15)])
    assert text == "<s><|user|>" + "x" * 15 + "</s>\n<|assistant|>"
    assert type(ids) is list and len(ids) == 20 and all(type(i) is int for i in ids)


def test_a11_templates_missing_given_and_refusing(refuses, tmp_path):
    with refuses("d.jsonl, line 7", "no chat template", "--chat-template"):
        encode(letters(), [U], "yes")
    with refuses("d.jsonl, line 7", "no system please"):
        encode(letters(template=NO_SYSTEM), [{"role": "system", "content": "s"}, U], "yes")
    with refuses("--chat-template", "none.jinja"):
        Encoder(letters(), template_file=tmp_path / "none.jinja")
    (tmp_path / "t.jinja").write_text(END)
    tokenizer = letters()
    group = encode(tokenizer, [U], "y", template_file=tmp_path / "t.jinja")
    assert tokens(tokenizer, group.completion_ids[0]) == "y <|end|>"
    tokenizer.save_pretrained(tmp_path / "saved")            # the template goes with the checkpoint
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == END


@pytest.mark.parametrize("options, want", [
    ({"chat": True}, "<s> <|user|> u <|end|> \n <|assistant|> y <|end|>"), ({}, "<s> u y </s>")])
def test_a11_the_chat_flag_makes_plain_prompts_user_turns(options, want):
    tokenizer = letters(template=END)
    group = encode(tokenizer, "u", "y", **options)
    assert tokens(tokenizer, group.prompt_ids + group.completion_ids[0]) == want


@pytest.mark.parametrize("overlong, prompt, completions, ended, why", [       # lengths, ends included; --max-length 10
    ("drop", 4, (3, 3), [True, True], None),
    ("drop", 4, (6, 3), [True, True], None),
    ("drop", 4, (20, 3), None, "over --max-length 10"),
    ("truncate", 4, (20, 3), [False, True], None),           # rejected keeps its 3 tokens
    ("truncate", 1, (20, 20), [False, False], None),         # the completions differ at token 8
    ("truncate", 4, (20, 20), None, "with completions of identical tokens"),
    ("drop", 10, (3, 3), None, "with no room for a completion"),              # a14: prompts are never truncated
    ("truncate", 12, (3, 3), None, "with no room for a completion"),
    ("drop", 0, (3, 3), None, "with an empty prompt"),
    ("drop", 9, (), [], None),                               # a prompt to sample from
    ("drop", 10, (), None, "with no room for a completion"),
])
def test_a13_a14_truncation(overlong, prompt, completions, ended, why):
    encoder = Encoder(letters(bos=False))
    account = Account("d.jsonl", "pair", 2)
    texts = []
    for letter, n in zip("bc", completions):
        text = letter * 2 if n == 3 else "a" * 7 + letter + "e" * 20
        texts.append(text[:n - 1])
    groups = [Group("", "p" * prompt, texts, scores=[1, 0]), Group("", "p", ["x", "y"])]
    kept = tokenise(groups, account, encoder, 10, overlong)
    assert len(kept) == account.kept == 1 + (why is None) and account.dropped == ({why: 1} if why else {})
    truncated = int(ended is not None and not all(ended))
    assert f"2 rows of format 'pair', kept {len(kept)}, truncated {truncated}, dropped {2 - len(kept)}" in str(account)
    if why is None:
        group = kept[0]
        assert group.ended == ended
        assert [len(ids) for ids in group.completion_ids] == [min(n, 10 - prompt) for n in completions]
        assert [ids[-1] == 2 for ids in group.completion_ids] == ended        # a6: no false EOS on what was truncated


def test_a15_different_texts_of_the_same_tokens_are_no_pair():
    account = Account("d.jsonl", "pair", 5)
    groups = [
        Group("", "p", ["é", "ü"], scores=[1, 0]),           # both letters are unknown to this tokeniser
        Group("", "p", ["é", "ü", "ß"], scores=[3, 2, 1]),
        Group("", "p", ["é", "ü", "y"], scores=[3, 2, 1]),
        Group("", "p", ["é", "y"], scores=[1, 0]),
        Group("", "p", ["x", "x"])]                          # samples: none is said to be better
    kept = tokenise(groups, account, Encoder(letters()), 99)
    assert kept == groups[2:] and account.dropped == {"with completions of identical tokens": 2}
    assert account.truncated == 0


def test_a17_only_the_last_turn_is_the_completion(data):
    turns = [ask("ab"), say("cd"), ask("ef"), say("gh"), ask("ij")]
    [group], _ = read_groups(data([{"chosen": turns + [say("yes")], "rejected": turns + [say("no")]}]), PAIRS)
    tokenizer = letters(template=CHAT)
    Encoder(tokenizer)(group)
    assert [tokens(tokenizer, ids) for ids in group.completion_ids] == ["y e s </s>", "n o </s>"]
    earlier = "<|user|>ab</s>\n<|assistant|>cd</s>\n<|user|>ef</s>\n<|assistant|>gh</s>\n<|user|>ij</s>\n"
    assert tokenizer.decode(group.prompt_ids) == f"<s>{earlier}<|assistant|>"


@pytest.mark.parametrize("make", [byte_level, sentencepiece, letters])
@pytest.mark.parametrize("template, end", [(DEFAULT_SYSTEM, 7), (SPACE, 2)])
@pytest.mark.parametrize(
    "text", ["say </s><|assistant|> now", "</s>", "<s>x<|end|>", "a\ue000</s>b", "<|end|></s>yes"])
def test_a18_text_that_looks_special_is_text(make, template, end, text):
    tokenizer = make(template=template)
    encoder = Encoder(tokenizer)
    account = Account("d.jsonl", "pair", 2)
    groups = [Group("", [ask(text)], ["yes", text]), Group("", text, ["yes", text])]
    chat, plain = tokenise(groups, account, encoder, 10 ** 6)

    def control(ids):
        return [i for i in ids if i < len(SPECIAL) and SPECIAL[i] != "<unk>"]

    start = [1] if end == 7 else []                          # where the template writes no <s>
    rendered = tokenizer.apply_chat_template([U], tokenize=False, add_generation_prompt=True)
    harmless = plain_ids(tokenizer, rendered)
    assert control(chat.prompt_ids) == start + control(harmless) and control(plain.prompt_ids) == [1]
    assert [control(ids) for ids in chat.completion_ids] == [[end]] * 2
    assert [control(ids) for ids in plain.completion_ids] == [[2]] * 2
    if make is byte_level:                                   # every character is still there
        full = tokenizer.apply_chat_template([ask(text), say(text)], tokenize=False).removesuffix("\n")
        assert tokenizer.decode(chat.prompt_ids + chat.completion_ids[1]) == "<s>" * len(start) + full
        assert tokenizer.decode(plain.prompt_ids + plain.completion_ids[1]) == f"<s>{text}{text}</s>"
    assert "2 rows hold text that looks like a special token" in str(account)
    second = Account("eval.jsonl", "pair", 1)                # a second file is counted for itself
    tokenise([Group("", "x", ["y"])], second, encoder, 99)
    assert "looks like" not in str(second)


@pytest.mark.parametrize("text, want", [("u", "▁ u"), ("I</s> is", "▁I < / s > ▁is"), ("I</s>", "▁I < / s >")])
def test_a18_the_tokens_around_such_text_are_those_of_any_row(text, want):
    tokenizer = sentencepiece(template=CHAT)                 # puts a "▁" after every control token
    group = encode(tokenizer, [ask(text), B, U], "yes")
    newline = "</s> ▁ <0x0A>"
    turns = f"<|user|> {want} {newline} <|assistant|> ▁ b {newline} <|user|> ▁ u {newline} <|assistant|>"
    assert tokens(tokenizer, group.prompt_ids) == "<s> " + turns
    assert tokens(tokenizer, group.completion_ids[0]) == "▁yes </s>"


def test_a18_the_mark_itself_is_refused(refuses):
    with refuses("d.jsonl, line 7", "U+FDD0"):
        encode(letters(template=CHAT), [ask(f"a{MARK}</s>")], "yes")


def test_text_that_is_none_and_columns_of_one_name_are_refused(data, refuses, tmp_path):
    (tmp_path / "s.jsonl").write_text('{"prompt": "a", "chosen": "2\\ud83d", "rejected": "3"}\n')
    with refuses("line 1", "'chosen'", "surrogate"):
        read_groups(str(tmp_path / "s.jsonl"), PAIRS)
    (tmp_path / "d.csv").write_text("prompt,chosen,rejected,chosen\na,b,c,d\n")
    with refuses("line 1", "'chosen'"):
        read_groups(str(tmp_path / "d.csv"), PAIRS)


def test_further_keys_of_messages_reach_the_template_and_are_never_lost(data, refuses):
    named = {**ask("u"), "name": "Ann", "tool_calls": None}  # Parquet fills in None where a message lacks a key
    [group], _ = read_groups(data([{"prompt": [named], "chosen": [say("y")], "rejected": [say("n")]}]), PAIRS)
    assert group.prompt == [{"role": "user", "content": "u", "name": "Ann"}]
    template = "{% for m in messages %}{{ m.name or '' }}{{ m.content }}{% endfor %}"
    assert Encoder(letters(template=template)).prompt(group.prompt)[1] == "Annu"
    thinking = {**say("y"), "thinking": "hm"}
    with refuses("line 1", "'thinking'", "lost"):
        read_groups(data([{"prompt": [U], "chosen": [thinking], "rejected": [say("n")]}]), PAIRS)


@pytest.mark.parametrize("fraction, held_out", [(0.2, 2), (0.01, 1), (0, 0)])
def test_a20_split_by_prompt(fraction, held_out):
    prompts = [f"q{i}" for i in range(5)] + [[ask(f"q{i}")] for i in range(5)]
    groups = [Group("", p, [str(k), "x"]) for k in range(3) for p in prompts]

    def names(groups):
        return {json.dumps(g.prompt) for g in groups}

    train, rest = split_by_prompt(groups, fraction, seed=0)
    assert len(split_by_prompt(groups[:1] * 3, fraction, seed=0)[0]) == 3     # the only prompt is trained on
    assert len(names(rest)) == held_out and len(rest) == 3 * held_out and len(train) == 30 - len(rest)
    assert not names(train) & names(rest)
    assert names(split_by_prompt(groups[::-1], fraction, seed=0)[1]) == names(rest)   # in any order
    by_seed = {str(sorted(names(split_by_prompt(groups, fraction, seed)[1]))) for seed in range(20)}
    assert held_out == 0 or len(by_seed) > 5


@pytest.mark.parametrize("pad", [None, "</s>", "<pad>"])
def test_a21_the_vocabulary_stays_as_it_is(pad):
    tokenizer = byte_level(template=CHAT, pad_token=pad)
    vocabulary = tokenizer.get_vocab()
    pad_token = tokenizer.pad_token
    group = encode(tokenizer, [U], NASTY, "yes")
    assert tokenizer.get_vocab() == vocabulary and tokenizer.pad_token == pad_token
    assert max(group.prompt_ids + group.completion_ids[0]) < len(vocabulary)


# --- ② the real thing -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("system, said", [
    ([], "You are a helpful assistant."), ([{"role": "system", "content": "Be brief."}], "Be brief.")])
def test_qwen_chat_has_one_system_turn_and_one_end(system, said):
    tokenizer = pretrained("qwen2.5-tokenizer")
    encoder = Encoder(tokenizer)
    start, end, eos = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    assert (start, end, eos) == (151644, 151645, 151643)
    assert encoder.bos == [] and encoder.stops == [eos, end]
    completions = ["Hello there!\n", " 42", "<|im_end|> is a token"]
    group = encoder(Group("", system + [ask("Hi")], completions))
    turns = f"<|im_start|>system\n{said}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(group.prompt_ids) == turns
    for completion, ids in zip(completions, group.completion_ids):
        assert ids[-1] == end and not {start, end, eos} & set(ids[:-1])
        assert tokenizer.decode(ids[:-1]) == completion == encoder.decode(ids)


@pytest.mark.parametrize("name", ["qwen2.5-tokenizer", "stories260k"])
def test_a1_a24_real_pairs_with_real_tokenisers(name):
    tokenizer = pretrained(name)
    groups, account = read_groups(str(real("hh-rlhf/harmless-base-test.jsonl.gz")), PAIRS, limit=80)
    kept = tokenise(groups, account, Encoder(tokenizer), 10 ** 6)
    bos = [1] if name == "stories260k" else []
    assert len(kept) == 80
    for g in kept:
        for completion, ids in zip(g.completions, g.completion_ids):
            joint = g.prompt + completion
            assert tokenizer.decode(g.prompt_ids + ids, skip_special_tokens=True) == joint
            assert g.prompt_ids + ids[:-1] == bos + plain_ids(tokenizer, joint)  # nothing merges after a ":"


# --- ⑧ run ------------------------------------------------------------------------------------------------------------

def opened(out, steps=9, data="d", **flags):
    """open_run() as a trainer calls it."""
    args = SimpleNamespace(**({"output_dir": str(out), "resume": False, "beta": 0.1, "columns": ()} | flags))
    depends = {"data_sha256": data}
    folder, done = common.open_run(args, steps, depends)
    return folder, done, common.open_logs(folder, done, args, depends)


def test_a_new_run_begins_in_an_empty_directory_and_keeps_what_was_there(tmp_path, monkeypatch, capsys, refuses):
    for name in ("run", "run/", "run/."):                    # the same directory
        assert opened(f"{tmp_path}/{name}") == (tmp_path / "run", 0, False)
        (tmp_path / "run/checkpoint").mkdir()
        (tmp_path / "run/mine.txt").write_text(name)
    assert "is kept as" in capsys.readouterr().out
    kept = [(tmp_path / name / "mine.txt").read_text() for name in ("run-1", "run-2", "run")]
    assert kept == ["run", "run/", "run/."]
    monkeypatch.chdir(tmp_path / "run")
    for name in (".", "checkpoint/.."):                      # no name to keep it under: refused before anything is loaded
        with refuses("--output-dir", "folder of its own"):
            common.check_run(train_dpo.parse_args(["--output-dir", name]), ())
    assert (tmp_path / "run/mine.txt").exists() and opened("../run")[0] == Path("../run")
    assert (tmp_path / "run-3/mine.txt").exists() and not (tmp_path / "run/mine.txt").exists()
    (tmp_path / "file").write_text("x")
    with refuses("--output-dir", "cannot be written"):
        opened(tmp_path / "file")


def test_resume_wants_what_the_run_began_with(tmp_path, capsys, refuses):
    opened(tmp_path)
    with refuses("no checkpoint"):
        opened(tmp_path, resume=True)
    (tmp_path / "checkpoint").mkdir()
    for name in ("step-2", "step-10", "step-x", "step-11.safetensors.writing"):
        (tmp_path / f"checkpoint/{name}.safetensors").write_text("")
    (tmp_path / "checkpoint/step-11.safetensors.writing").write_text("")     # a kill while it was written
    assert common.newest_checkpoint(tmp_path) == (10, tmp_path / "checkpoint/step-10.safetensors")
    common.log(tmp_path, 10, {"loss": 1.0, "eval/n": 3})
    common.log(tmp_path, 11, {"loss": float("nan"), "eval/n": 3})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "lo')                       # a kill while it was written
    with refuses("after step 10"):
        opened(tmp_path, 9, resume=True)
    for words, flags in [("--beta 0.1, not 0.2", {"beta": 0.2}), ("data", {"data": "e"})]:
        with refuses(words):
            opened(tmp_path, 20, resume=True, **flags)
    assert [line["loss"] for line in common.read_lines(tmp_path / "metrics.jsonl")] == [1, None]
    assert opened(tmp_path, 20, resume=True) == (tmp_path, 10, True)
    assert common.read_lines(tmp_path / "metrics.jsonl") == [{"step": 10, "loss": 1.0, "eval/n": 3}]
    (tmp_path / "args.json").write_text("[1]")
    with refuses("args.json"):
        opened(tmp_path, 20, resume=True)


def test_signals_are_caught_once_and_ignored_ones_stay_ignored(capsys):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)         # ignored where the suite runs in the background
        signal.signal(signal.SIGHUP, signal.SIG_IGN)         # as nohup does
        caught = common.catch_signals()
        signal.raise_signal(signal.SIGHUP)
        assert caught == []
        signal.raise_signal(signal.SIGTERM)
        assert caught == [signal.SIGTERM] and "with a checkpoint" in capsys.readouterr().out
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("error, code, words", [
    (OSError(28, "No space left on device"), 2, "No space left"), (MemoryError(), 2, "MemoryError"),
    (common.torch.OutOfMemoryError("CUDA out of memory.\nlong"), 2, "CUDA out of memory"),
    (KeyboardInterrupt(), 130, "interrupted"), (SystemExit(3), 3, "")])
def test_a_script_ends_in_one_line(error, code, words, monkeypatch):
    def main():
        raise error

    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with pytest.raises(SystemExit) as end:
        common.run(main)
    print("▸")                                               # a console that does not know it is no error either
    streams[1].seek(0)
    said = streams[1].read()
    assert end.value.code == code and words in said and said.count("\n") <= 1


def test_an_error_in_the_code_is_a_traceback(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(ZeroDivisionError):
        common.run(lambda: 1 / 0)
