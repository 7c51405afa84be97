"""Sections ① read and ② tokenise of common.py: no row is changed or lost in silence, and the
boundary between prompt and completion never moves. Most of what is refused is in test_run.py.

Expected values come from hand, from json, csv and pyarrow, or from a plain `tokenizers` object.
a1 … a24 are the traps that a test keeps out: the moving boundary, the second BOS, ….
"""
import argparse
import csv
import functools
import gzip
import io
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pyarrow.parquet
import pytest
from tokenizers import (
    Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import train_dpo
from common import FORMATS, Encoder, Group, Row

FLAGS = vars(train_dpo.parse_args([]))


def options(**flags):
    return argparse.Namespace(**(FLAGS | flags))


def real(name):
    path = Path(__file__).parents[2] / "shared" / "data" / name
    return path if path.exists() else pytest.skip(f"{name} is not here")


@pytest.fixture
def refuses(capsys):
    """with refuses("line 2"): … has to end with exit code 2 and a line with these words."""
    @contextmanager
    def refuses(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as error:
            yield
        said = capsys.readouterr().err.splitlines()[-1]
        assert error.value.code == 2 and said.startswith("error: "), said
        assert all(word in said for word in words), said
    return refuses


@pytest.fixture
def data(tmp_path, monkeypatch):
    """data(rows) → a file of the type that the name says, written without common.py."""
    def data(rows, name="d.jsonl"):
        ending = name.removesuffix(".gz").split(".")[1]
        if ending == "parquet":
            monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
            return str(tmp_path / name)
        if ending == "csv":
            text = io.StringIO(newline="")
            csv.writer(text).writerows([list(rows[0]), *(row.values() for row in rows)])
            raw = text.getvalue().encode()
        elif ending == "json":
            raw = json.dumps(rows, indent=1).encode()
        else:
            raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return str(tmp_path / name)
    return data


def read(path, *usable, split="train", **flags):
    return common.read_groups(str(path), split, usable or tuple(FORMATS), options(**flags))


def texts(path, *usable, **flags):
    return [(g.prompt, g.completions) for g in read(path, *usable, **flags)[0]]


# --- ① files --------------------------------------------------------------------------------------

NASTY = 'commas, "quotes",\nnew\r\nlines, ' + "\u2028 \x85 ünï 🙂 and ['brackets']"
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize("name", [
    "d.json", "d.jsonl", "d.csv", "d.json.gz", "d.jsonl.gz", "d.csv.gz", "d.parquet"])
def test_every_file_type_gives_the_same_rows(data, name):
    rows = [{"prompt": NASTY, "chosen": "007", "rejected": NASTY}]
    rows += [{"prompt": "q" * 100_000, "chosen": " NA", "rejected": "2"}]
    groups, format, dropped = read(data(rows, name))
    assert [(g.prompt, g.completions) for g in groups] == [
        (NASTY, ["007", NASTY]), ("q" * 100_000, [" NA", "2"])]
    assert format == "pair" and not dropped


def test_byte_order_mark_blank_lines_and_limit(tmp_path):
    rows = [b'{"prompt": "q%d"}' % i for i in range(5)]
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(rows))
    assert texts(tmp_path / "d.jsonl", limit=3) == [("q0", []), ("q1", []), ("q2", [])]
    (tmp_path / "d.csv").write_bytes(b"\xef\xbb\xbfprompt\nq0\n\nq1\n")
    assert texts(tmp_path / "d.csv") == [("q0", []), ("q1", [])]


@pytest.mark.parametrize("name, content, words", [           # further ones: REFUSED of test_run.py
    ("a.json", b'[{"prompt": "a"}, "b"]', "a.json"),
    ("a.csv", b"prompt,chosen,rejected\na,b,c\na,b\n", "line 3: column 'rejected'"),
    ("a.parquet", b"PAR1 this is none", "a.parquet"),
    ("a.jsonl", b'{"text": "a", "label": 1}', "prompt/question/instruction"),
])
def test_broken_files_end_in_one_sentence(tmp_path, refuses, name, content, words):
    (tmp_path / name).write_bytes(content)
    with refuses(name, words):
        read(tmp_path / name)


def test_a_row_of_csv_with_a_field_too_many_is_refused(tmp_path, refuses):
    (tmp_path / "f.csv").write_text("prompt,chosen,rejected\na,b,c\na,b,c,d\n")
    with refuses("f.csv", "line 3", "a field too many"):
        load(letters(), dataset=str(tmp_path / "f.csv"))


def test_what_is_no_file_is_asked_for_on_the_hub_unless_it_can_only_be_a_path(
        tmp_path, refuses, monkeypatch):
    def load_dataset(name, config, split):
        if name == "org/none":
            raise ConnectionError("offline\nand a long story")
        return [{"prompt": f"{name} {config} {split}"}]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(
        load_dataset=load_dataset, load_from_disk=None))
    assert texts("org/name", split="test", dataset_config="main") == [("org/name main test", [])]
    with refuses("org/none", "train", "ConnectionError: offline"):
        read("org/none")
    common.check_path("org/name")
    (tmp_path / "runs").mkdir()
    for name in ("./x", "../x", "/x/y.jsonl", "~/x", "a/b/c", "runs/dpo", f"{tmp_path}/x.jsonl"):
        with refuses(name, "no such file"):
            read(name)
    with refuses("x.jsonl", "No such file"):
        read("x.jsonl")


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": "q"}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "splits")
    assert texts(tmp_path / "one") == texts(tmp_path / "splits", split="test") == [("q", [])]


# --- ① formats ------------------------------------------------------------------------------------

def ask(text):
    return {"role": "user", "content": text}


def say(text):
    return {"role": "assistant", "content": text}


U, B = ask("u"), say("b")
H, A = "\n\nHuman:", "\n\nAssistant:"
PKU = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1}
ULTRA = [{"response": "a", "overall_score": 2.5}, {"response": "b", "overall_score": 4.0}]

EXAMPLES = [                     # (format, row, its prompt, its completions, scores)
    ("pair", PAIR, "p", "ab", [1, 0]),
    ("pair", {"prompt": [U], "chosen": [say("a")], "rejected": [B]}, [U], "ab", [1, 0]),
    ("pair", {"prompt": [U], "chosen": "a", "rejected": "b"}, [U], "ab", [1, 0]),
    ("pair", {"prompt": "u", "chosen": [say("a")], "rejected": [B]}, [U], "ab", [1, 0]),
    ("pair", {"prompt": "u", "chosen": [U, say("a")], "rejected": [U, B]}, [U], "ab", [1, 0]),
    ("pair", {"chosen": [U, B, U, say("a")], "rejected": [U, B, U, B]}, [U, B, U], "ab", [1, 0]),
    ("pair", {"chosen": f"{H} p{A}a", "rejected": f"{H} p{A}b"}, f"{H} p{A}", "ab", [1, 0]),
    ("PKU-SafeRLHF", PKU, "p", "ba", [1, 0]),
    ("ranked list", {"prompt": "p", "completions": ["a", "b"], "scores": [1, 3.5]}, "p", "ab",
     [1, 3.5]),
    ("ranked list", {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [3, 1, 2]}, "p", "abc",
     [-3, -1, -2]),
    ("UltraFeedback", {"prompt": "p", "completions": ULTRA}, "p", "ab", [2.5, 4]),
    ("labelled messages", {"messages": [U, B], "label": False}, [U], "b", [0]),
    ("unpaired", {"prompt": "p", "completion": "a", "label": True}, "p", "a", [1]),
    ("messages", {"messages": [U, B, U, say("a")]}, [U, B, U], "a", []),
    ("response", {"prompt": "p", "response": "a"}, "p", "a", []),
    ("response", {"prompt": "p", "answer": "a"}, "p", "a", []),
    ("prompt", {"prompt": "p"}, "p", "", []),
]


@pytest.mark.parametrize("name, row, prompt, completions, scores", EXAMPLES)
def test_every_format_is_recognised_whatever_its_prompt_is_called(
        data, name, row, prompt, completions, scores):
    files = [data([row], "d.parquet")]
    for column in ("prompt", "question", "instruction"):
        renamed = {column if old == "prompt" else old: value for old, value in row.items()}
        files.append(data([renamed], f"{column}.jsonl"))
    for file in files:
        [group], format, _ = read(file)
        assert (format, group.prompt, group.completions) == (name, prompt, list(completions))
        assert group.scores == scores


def test_a16_nulls_of_parquet_parts_of_messages_and_pictures(data, refuses):
    with refuses("d.parquet, row 2", "'chosen'"):
        read(data([PAIR, PAIR | {"chosen": None}], "d.parquet"))
    parts = ask([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}])
    assert texts(data([{"prompt": [parts], "image": None}])) == [([ask("one two")], [])]
    with refuses("line 1", "only text"):
        read(data([{"prompt": [ask([{"type": "text", "text": "a"}, {"type": "image"}])]}]))
    for column in ("image", "images", "video", "audio"):
        with refuses("line 1", f"'{column}'"):
            read(data([PAIR | {column: ["x.png"]}]))


def test_calls_of_tools_in_the_history(data):
    calls = [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    decoded = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    result = {"role": "tool", "content": "2"}
    for call in ({"role": "assistant", "content": None, "tool_calls": calls},
                 {"role": "assistant", "tool_calls": calls}):
        want = [U, {"role": "assistant", "content": "", "tool_calls": decoded}, result]
        assert texts(data([{"messages": [U, call, result, B]}])) == [(want, ["b"])]


def test_further_keys_of_messages_reach_the_template(data):
    named = {**ask("u"), "name": "Ann", "tool_calls": None}  # Parquet adds None for what lacks
    [group], _, _ = read(data([{"prompt": [named], "chosen": [B], "rejected": [say("n")]}]))
    assert group.prompt == [{"role": "user", "content": "u", "name": "Ann"}]
    tokenizer = letters(template="{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}")
    assert tokenizer.decode(encode(tokenizer, group.prompt).prompt_ids) == "<s>Annu"


def test_columns_are_renamed_all_at_once(data, refuses):
    file = data([{"x": "p", "best": "a", "worst": "b", "id": 1}])
    renames = ["prompt=x", "chosen=best", "rejected=worst"]
    [group], _, _ = read(file, "pair", columns=renames)
    assert (group.prompt, group.completions) == ("p", ["a", "b"]) and group.row == PAIR | {"id": 1}
    for wrong in ("prompt=nosuch", "prompt", "prompt="):
        with refuses("d.jsonl, line 1", f"'{wrong.partition('=')[2]}'"):
            read(file, columns=[wrong])
    swap = ["chosen=rejected", "rejected=chosen"]
    assert texts(data([PAIR]), columns=swap) == [("p", ["b", "a"])]
    shp = {"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}  # 1: A is better
    renames = ["prompt=history", "response_1=human_ref_A", "response_0=human_ref_B",
               "better_response_id=labels"]
    assert texts(data([shp, shp | {"labels": 0}]), columns=renames) == [
        ("p", ["a", "b"]), ("p", ["b", "a"])]


@pytest.mark.parametrize("prefer, chosen", [("better", "b"), ("safer", "a")])
def test_a19_pku_labels(data, refuses, prefer, chosen):
    row = PKU | {"safer_response_id": 0}
    for name in ("d.jsonl", "d.csv"):                        # in CSV the ids are text
        assert texts(data([row], name), prefer=prefer)[0][1][0] == chosen
    with refuses("d.jsonl, line 2"):
        read(data([row, row | {f"{prefer}_response_id": -1}]), prefer=prefer)


def test_numbers_that_are_not_finite_are_refused(data, refuses):
    for bad in (float("nan"), float("inf")):
        with refuses("d.jsonl, line 1", "'margin'"):
            read(data([PAIR | {"margin": bad}]))
    with refuses("d.jsonl, line 1", "'scores'"):
        read(data([{"prompt": "p", "responses": ["a", "b"], "scores": [1, float("nan")]}]))


def test_a_probability_below_half_swaps_the_pair(data):
    rows = [PAIR | {"p_chosen": p, "margin": "1.5"} for p in (0.9, 0.2)]
    a, b = read(data(rows))[0]
    assert (a.completions, a.p_chosen, a.margin) == (["a", "b"], 0.9, 1.5)
    assert (b.completions, b.p_chosen, b.scores) == (["b", "a"], 0.8, [1, 0])


def test_labels_of_unpaired_rows(data):
    row = {"prompt": "p", "completion": "a"}
    for want, labels in [([1], (True, 1, "true", "True", "1")), ([0], (False, 0, "FALSE", "0"))]:
        groups, _, _ = read(data([row | {"label": label} for label in labels]))
        assert [g.scores for g in groups] == [want] * len(labels)


def test_further_columns_are_kept_and_an_answer_is_one_where_it_was_said(data):
    gsm = {"question": "1+1?", "answer": "#### 2", "level": 3}
    [said], _, _ = read(data([gsm]), "response")
    [asked], _, _ = read(data([gsm]), "prompt")
    assert (said.completions, said.row, asked.completions, asked.row) == (["#### 2"], gsm, [], gsm)


def test_a15_empty_and_identical_completions_are_dropped_and_counted(data):
    pairs = [("", "x"), ("x", " \n"), ("x", "x"), (" x", "x "), ("x", "y")]
    groups, _, dropped = read(data([{"prompt": "p", "chosen": a, "rejected": b} for a, b in pairs]))
    assert [g.completions for g in groups] == [["x", "y"]]
    assert dropped == {"with an empty completion": 2, "with identical completions": 2}


@pytest.mark.parametrize("chosen, rejected, want", [
    (f"{H} a{A} b{H} c{A} d", f"{H} a{A} b{H} c{A} e", (f"{H} a{A} b{H} c{A}", " d", " e")),
    (f"{H} a{A} b{H} c{A} d", f"{H} a{A} x{H} c{A} d", None),        # they part in an earlier turn
    (f"{H} a{A} b", f"{H} x{A} b", None),                            # … in the question
    (f"{H} a{A} b", f"{H} a{A} b{H} c{A} d", None),                  # one goes on
    (f"{H} a{A} d", f"{H} a{A} d and more", (f"{H} a{A}", " d", " d and more")),
    ("no marker", "no mark", None),
    ([U, B, U, B], [U, say("else"), U, say("x")], None),
])
def test_a12_transcripts_are_split_at_the_last_shared_assistant(data, chosen, rejected, want):
    groups, _, dropped = read(data([{"chosen": chosen, "rejected": rejected}]))
    assert [(g.prompt, *g.completions) for g in groups] == ([want] if want else [])
    assert dropped == ({} if want else {"that differ before the last turn": 1})


def test_a12_real_hh_rlhf():
    groups, _, dropped = read(real("hh-rlhf/harmless-base-test.jsonl.gz"))
    # Four completions are empty (lines 87, 517, 926, 1104), four hold a further turn; that of line
    # 1953 only quotes "Assistant:".
    assert dropped == {"with an empty completion": 4, "that differ before the last turn": 4}
    kept = {int(g.where.rpartition(" ")[2]) for g in groups}
    assert set(range(1, 2313)) - kept == {87, 517, 926, 1104, 1255, 1689, 1951, 2037}
    for g in groups:
        assert g.prompt.endswith(A) and not any(H in text for text in g.completions)
        assert [g.prompt + text for text in g.completions] == [g.row["chosen"], g.row["rejected"]]


# --- ② tokenisers, made by hand -------------------------------------------------------------------

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
WORDS = ["yes", "hello", "world", "is", "I", "do"]           # one token each, also behind a space
ASCII = [chr(c) for c in range(33, 127)]


def wrap(model, pre_tokenizer, decoder, normalizer=None, bos=True, template=None, **names):
    backend = Tokenizer(model)
    backend.decoder = decoder
    if pre_tokenizer:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer:
        backend.normalizer = normalizer
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(SPECIAL)
    names = {"bos_token": "<s>" if bos else None, "eos_token": "</s>", "pad_token": "<pad>",
             "unk_token": "<unk>", **names}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)


def numbered(*tokens):
    return {token: i for i, token in enumerate(dict.fromkeys(SPECIAL + list(tokens)))}


def bpe(alphabet, space, **more):
    """Merges from left to right: y es → ye s → yes, then ▁ yes → ▁yes."""
    merges = []
    for word in WORDS:
        merges += [(word[:i], word[i]) for i in range(1, len(word))]
    merges += [(space, word) for word in WORDS]
    return models.BPE(numbered(*alphabet, *(a + b for a, b in merges)), merges, **more)


def byte_level(**more):
    model = bpe(sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ")
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return wrap(model, split, decoders.ByteLevel(), **more)


def sentencepiece(**more):
    """As Llama 2: a "▁" before every text, bytes for what is unknown."""
    alphabet = [f"<0x{i:02X}>" for i in range(256)] + ["▁"] + ASCII
    model = bpe(alphabet, "▁", unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return wrap(model, None, decoder, normalizer, **more)


def wordpiece(**more):
    vocabulary = numbered(" ", "\n", *ASCII, *("##" + c for c in ASCII), *WORDS)
    split = pre_tokenizers.Split(Regex(r"\s|\w+|[^\w\s]"), "isolated")
    decoder = decoders.Sequence([decoders.Replace("##", ""), decoders.Fuse()])
    return wrap(models.WordPiece(vocabulary, unk_token="<unk>"), split, decoder, **more)


def letters(**more):
    """One token a character."""
    model = models.WordLevel(numbered(" ", "\n", *ASCII), unk_token="<unk>")
    return wrap(model, pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse(), **more)


@functools.cache
def pretrained(name):
    return AutoTokenizer.from_pretrained(real(name))


TOKENISERS = {f.__name__: f for f in (byte_level, sentencepiece, letters)}
TOKENISERS["sentencepiece, no BOS"] = functools.partial(sentencepiece, bos=False)
for name in ("qwen2.5-tokenizer", "stories260k"):
    TOKENISERS[name] = functools.partial(pretrained, name)

# Chat templates. CHAT writes <s> itself, and ends turns in EOS and a newline.
CHAT = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
END = CHAT.replace("</s>", "<|end|>").replace("{{ '<s>' }}", "")     # another end, as ChatML
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|system|>Be kind.<|end|>\n' }}{% endif %}" + END)
TRIM = CHAT.replace("m.content", "m.content | trim")
SPACE = CHAT.replace("m.content", "' ' + m.content").replace("'<|assistant|>'", "'<|assistant|> '")
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system please') }}{% endif %}"
    + CHAT)


def encoder_of(tokenizer, last=False, generation=None, template=None, **flags):
    return Encoder(tokenizer, options(**flags), None, generation, template, last)


def encode(tokenizer, prompt, *completions, row=(), **more):
    group = Group(prompt, list(completions), Row(row), where="d.jsonl, line 7")
    return encoder_of(tokenizer, **more)(group)


def plain_ids(tokenizer, text):
    """What the tokenizers library makes of a text, special tokens recognised."""
    tokenizer.backend_tokenizer.encode_special_tokens = False
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def tokens(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def said(tokenizer, group):
    """What a model reads: the prompt, and each completion."""
    return [tokenizer.decode(ids) for ids in (group.prompt_ids, *group.completion_ids)]


# --- ② traps --------------------------------------------------------------------------------------

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
    encoder = encoder_of(tokenizer)
    eos = tokenizer.eos_token_id
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token else []
    for prompt, completions in SEAMS.items():
        group = encoder(Group(prompt, completions))
        alone = plain_ids(tokenizer, prompt)
        assert group.prompt_ids == bos + alone
        for completion, ids in zip(completions, group.completion_ids):
            joint = plain_ids(tokenizer, prompt + completion)
            assert ids[-1] == eos and eos not in ids[:-1]
            whole = tokenizer.decode(group.prompt_ids + ids, skip_special_tokens=True)
            assert whole == prompt + completion
            assert (ids[:-1] == joint[len(alone):]) == (joint[:len(alone)] == alone)
            assert encoder.decode(ids) == completion


@pytest.mark.parametrize("make, prompt, completion, want_prompt, want_completion", [
    (byte_level, "it is ", "yes", "<s> i t Ġis Ġ", "yes </s>"),
    (byte_level, "it is", " yes", "<s> i t Ġis", "Ġyes </s>"),
    (sentencepiece, "it is ", "yes", "<s> ▁ i t ▁is ▁", "yes </s>"),
    (sentencepiece, "a:", "I do", "<s> ▁ a :", "I ▁do </s>"),
    (sentencepiece, "a:", " I do", "<s> ▁ a :", "▁I ▁do </s>"),
    (sentencepiece, "a", "\nI", "<s> ▁ a", "<0x0A> I </s>"),
    (wordpiece, "hel", "lo", "<s> h ##e ##l", "l ##o </s>"),
    (letters, "<s>a", "yes", "<s> < s > a", "y e s </s>"),
])
def test_a1_a24_token_by_token(make, prompt, completion, want_prompt, want_completion):
    tokenizer = make()
    group = encode(tokenizer, prompt, completion)
    assert tokens(tokenizer, group.prompt_ids) == want_prompt
    assert tokens(tokenizer, group.completion_ids[0]) == want_completion


@pytest.mark.parametrize("template", [CHAT, END, DEFAULT_SYSTEM, TRIM, SPACE, NO_SYSTEM])
@pytest.mark.parametrize("make, last", [
    (byte_level, False), (byte_level, True), (letters, False)])
def test_a2_a3_a6_a7_a8_a_chat_is_rendered_once_begins_once_and_ends_once(make, template, last):
    for bos in (True, False):
        tokenizer = make(bos=bos, template=template)
        messages = [U, B, ask("hello")]
        completions = ["yes", "I do\nso"]
        group = encode(tokenizer, messages, *completions, last=last)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        start = [1] if bos and "<s>" not in template else []
        assert text.rstrip(" ").endswith("<|assistant|>")                                    # a8
        assert group.prompt_ids == start + plain_ids(tokenizer, text)
        assert group.prompt_ids.count(1) == (bos or "<s>" in template)                   # a2, a3
        end = SPECIAL.index("<|end|>" if "<|end|>" in template else "</s>")
        for completion, ids in zip(completions, group.completion_ids):
            full = tokenizer.apply_chat_template(messages + [say(completion)], tokenize=False)
            full = full if last else full.removesuffix("\n")
            assert ids.count(end) == 1 and 1 not in ids and (last or ids[-1] == end)         # a6
            whole = tokenizer.decode(start + plain_ids(tokenizer, full))
            assert tokenizer.decode(group.prompt_ids + ids) == whole                         # a7


def test_c5_a_policy_ends_with_its_turn_a_reward_model_reads_to_the_last_token():
    tokenizer = letters(template=END)
    ends = {}
    for last in (False, True):
        chat, plain = [encode(tokenizer, prompt, "y", last=last) for prompt in ([U], "u")]
        ends[last] = [tokens(tokenizer, g.completion_ids[0]) for g in (chat, plain)]
    assert ends == {False: ["y <|end|>", "y </s>"], True: ["y <|end|> \n", "y </s>"]}


def test_a4_a17_a21_pad_is_eos_and_only_the_last_turn_is_the_completion(data):
    turns = [U, B, U]
    file = data([{"chosen": turns + [say("y")], "rejected": turns + [say("yes")]}])
    tokenizer = letters(template=CHAT, pad_token="</s>")
    vocabulary = tokenizer.get_vocab()
    group = encoder_of(tokenizer)(read(file)[0][0])
    assert tokenizer.get_vocab() == vocabulary and tokenizer.pad_token == "</s>"
    assert type(group.prompt_ids) is list and type(group.prompt_ids[0]) is int       # a10
    history = "<|user|> u </s> \n <|assistant|> b </s> \n <|user|> u </s> \n <|assistant|>"
    assert tokens(tokenizer, group.prompt_ids) == "<s> " + history
    assert [tokens(tokenizer, ids) for ids in group.completion_ids] == ["y </s>", "y e s </s>"]
    assert group.tokens() == 14 + 2 + 4


@pytest.mark.parametrize("template, eos_of_generation, stops, end", [
    (None, None, [2], 2), (None, 7, [2, 7], 2), (None, [2, 7], [2, 7], 2),
    (END, None, [2, 7], 7), (END, [3], [2, 3, 7], 7), (CHAT, [0, 2], [0, 2], 2),
])
def test_a5_all_that_ends_a_completion(template, eos_of_generation, stops, end):
    tokenizer = letters(template=template)
    encoder = encoder_of(tokenizer, generation=SimpleNamespace(eos_token_id=eos_of_generation))
    assert encoder.stops == stops
    group = encoder(Group([U] if template else "u", ["y"]))
    assert group.completion_ids == [plain_ids(tokenizer, "y") + [end]]
    for stop in stops:
        assert encoder.decode(plain_ids(tokenizer, "yes") + [stop]) == "yes"
        assert encoder.decode([stop]) == ""                  # a15: EOS alone is a completion
    assert encoder.decode(plain_ids(tokenizer, " yes")) == " yes"        # truncated


THINKING = (                                                 # the last answer keeps its thoughts
    "{% set n = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set n.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{{ '<|' + m.role + '|>' + (m.content if loop.index0 == n.last or m.role == 'user' "
    "else m.content.split('</think>')[-1]) + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def test_a9_a_template_that_rewrites_the_prompt_is_refused(refuses):
    tokenizer = letters(template=THINKING)
    with refuses("d.jsonl, line 7", "thinking"):
        encode(tokenizer, [U, say("<think>hm</think>b"), U], "yes")
    assert said(tokenizer, encode(tokenizer, [U, B, U], "yes"))[1] == "yes<|end|>"


def test_a5_a11_templates_missing_given_and_refusing(refuses, tmp_path):
    with refuses("EOS"):
        encoder_of(letters(eos_token=None))
    with refuses("d.jsonl, line 7", "--chat-template"):
        encode(letters(), [U], "yes")
    with refuses("d.jsonl, line 7", "no system please"):
        encode(letters(template=NO_SYSTEM), [{"role": "system", "content": "s"}, U], "yes")
    (tmp_path / "t.jinja").write_text(END)
    tokenizer = letters()
    group = encode(tokenizer, [U], "y", template=tmp_path / "t.jinja")
    assert tokens(tokenizer, group.completion_ids[0]) == "y <|end|>"
    tokenizer.save_pretrained(tmp_path / "saved")            # it goes with the checkpoint
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == END


def test_the_chat_flag_makes_plain_prompts_user_turns_and_transcripts_their_turns():
    tokenizer = byte_level(template=END, bos=False)
    long = f"{H} u{A} b{H} is it{A}"
    user = "<|user|>{}<|end|>\n"
    for prompt, completion, turns, want in [
        ("u", "yes", user.format("u"), "yes"),
        ("u", " yes", user.format("u"), " yes"),
        (long, " yes", user.format("u") + "<|assistant|>b<|end|>\n" + user.format("is it"), "yes"),
        (f"x{H} u{A}", " yes", user.format(f"x{H} u{A}"), " yes")]:
        group = encode(tokenizer, prompt, completion, chat=True)
        assert said(tokenizer, group) == [turns + "<|assistant|>", want + "<|end|>"]
        plain = encode(tokenizer, prompt, completion)
        assert said(tokenizer, plain) == [prompt, completion + "</s>"]


def test_the_space_behind_the_marker_goes_in_a_transcript_of_one_turn_as_well():
    tokenizer = byte_level(template=END, bos=False)
    group = encode(tokenizer, f"{H} u{A}", " yes", chat=True)
    assert said(tokenizer, group) == ["<|user|>u<|end|>\n<|assistant|>", "yes<|end|>"]
    group = encode(tokenizer, f"{H} u{A} Sure,", " yes", chat=True)      # not of one that goes on
    assert said(tokenizer, group) == ["<|user|>u<|end|>\n<|assistant|>Sure,", " yes<|end|>"]


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("template", [END, TRIM, SPACE])
def test_a_prompt_that_ends_in_an_answer_is_continued(make, template):
    tokenizer = make(template=template)
    group = encode(tokenizer, [ask("q"), say("Sure, the answer is")], " yes", " no")
    assert said(tokenizer, group)[0].endswith("Sure, the answer is")
    whole = tokenizer.apply_chat_template(
        [ask("q"), say("Sure, the answer is yes")], tokenize=False).removesuffix("\n")
    start = [] if "<s>" in template else [1]
    assert group.prompt_ids + group.completion_ids[0] == start + plain_ids(tokenizer, whole)
    assert said(tokenizer, group)[2].strip() == ("no<|end|>" if template == END else "no</s>")


def test_arguments_of_the_template_reach_it():
    tokenizer = letters(template="{{ mood }}" + END)
    group = encode(tokenizer, [U], "y", chat_template_kwargs={"mood": "kind"})
    assert said(tokenizer, group)[0] == "<s>kind<|user|>u<|end|>\n<|assistant|>"


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
def test_columns_system_and_tools_are_read_where_there_is_a_chat(tools, data, capsys):
    template = "{% for t in tools or [] %}{{ t.name }}{% endfor %}" + END
    tokenizer = letters(bos=False, template=template)
    for prompt, chat in (("u", True), ([U], False), ("u", False)):
        file = data([PAIR | {"prompt": prompt, "system": "s", "tools": tools, "more": 1}])
        encoder = encoder_of(tokenizer, chat=chat)
        [group] = common.load_groups(file, "train", options(), encoder, ["pair"], 99)
        used, _, rest = capsys.readouterr().out.partition("NOT READ: ")
        rest = rest.partition(")")[0].split(", ")
        if encoder.is_chat(prompt):
            turns = "f<|system|>s<|end|>\n<|user|>u<|end|>\n<|assistant|>"
            assert said(tokenizer, group)[0] == turns and rest == ["more"]
            assert "system" in used and "tools" in used
        else:
            assert rest == ["system", "tools", "more"]


@pytest.mark.parametrize("overlong, prompt, completions, ended, why", [       # --max-length 10
    ("drop", 4, (3, 3), [True, True], None),                 # lengths, ends included
    ("drop", 4, (6, 3), [True, True], None),
    ("drop", 4, (20, 3), None, "over --max-length 10"),
    ("truncate", 4, (20, 3), [False, True], None),           # rejected keeps its 3 tokens
    ("truncate", 1, (20, 20), [False, False], None),         # they differ at token 8
    ("drop", 10, (3, 3), None, "over --max-length 10"),      # a14: prompts are never truncated
    ("truncate", 12, (3, 3), None, "over --max-length 10"),
    ("drop", 0, (3, 3), None, "with an empty prompt"),
    ("drop", 9, (), [], None),                               # a prompt to sample from
    ("drop", 10, (), None, "over --max-length 10"),
])
def test_a13_a14_truncation(overlong, prompt, completions, ended, why, capsys):
    made = []
    for letter, n in zip("bc", completions):
        text = letter * 2 if n == 3 else "a" * 7 + letter + "e" * 20
        made.append(text[:n - 1])
    groups = [Group("p" * prompt, made, scores=[1, 0]), Group("p", ["x", "y"])]
    dropped = common.Counter()
    kept = common.tokenise(groups, encoder_of(letters(bos=False)), 10, overlong, dropped)
    assert len(kept) == 1 + (why is None) and dropped == ({why: 1} if why else {})
    if why is None:
        lengths = [len(ids) for ids in kept[0].completion_ids]
        assert kept[0].ended == ended and lengths == [min(n, 10 - prompt) for n in completions]
        assert [ids[-1] == 2 for ids in kept[0].completion_ids] == ended      # a6: no false EOS
    common.account("d", "pair", kept, dropped)
    line = capsys.readouterr().out
    truncated = int(why is None and not all(ended))
    reasons = f"1 {why}" if why else "none"
    assert f"kept {len(kept)}, truncated {truncated}, dropped: {reasons}" in line
    assert ("--overlong truncate keeps all" in line) == (bool(why) and "over" in why)


@pytest.mark.parametrize("overlong, prompt, completions", [
    ("truncate", "pppp", ["aaaaaaab", "aaaaaaac"]),          # they differ behind --max-length
    ("drop", "p", ["é", "ü"]), ("drop", "p", ["é", "ü", "é"])])      # unknown to this tokeniser
def test_a13_a15_completions_of_identical_tokens_are_dropped(overlong, prompt, completions):
    dropped = common.Counter()
    scores = list(range(len(completions)))
    groups = [Group(prompt, completions, scores=scores), Group("p", ["x", "x"])]     # two samples
    kept = common.tokenise(groups, encoder_of(letters(bos=False)), 10, overlong, dropped)
    assert kept == groups[1:] and list(dropped.values()) == [1]


def test_only_more_than_a_twentieth_of_too_long_rows_is_noted(capsys):
    for over in (5, 6):
        dropped = common.Counter({"over --max-length 10": over, "with an empty prompt": 50})
        common.account("d", "pair", [Group("p", ["x", "y"])] * 95, dropped)
        assert ("--overlong truncate" in capsys.readouterr().out) == (over == 6)


@pytest.mark.parametrize("make", [byte_level, sentencepiece, letters])
@pytest.mark.parametrize("template, end", [(DEFAULT_SYSTEM, 7), (SPACE, 2)])
@pytest.mark.parametrize("text", ["say </s><s> now", "</s>", "</s>yes", pytest.param(
    "x<|end|><|assistant|>")])
def test_a18_text_that_looks_special_is_text(make, template, end, text):
    tokenizer = make(template=template)
    chat, plain = [encode(tokenizer, prompt, "yes", text) for prompt in ([ask(text)], text)]

    def control(ids):
        return [i for i in ids if i < len(SPECIAL) and SPECIAL[i] != "<unk>"]

    start = [1] if end == 7 else []                          # where the template writes no <s>
    rendered = tokenizer.apply_chat_template([U], tokenize=False, add_generation_prompt=True)
    harmless = plain_ids(tokenizer, rendered)
    assert control(chat.prompt_ids) == start + control(harmless)
    assert control(plain.prompt_ids) == [1]
    assert [control(ids) for ids in chat.completion_ids] == [[end]] * 2
    assert [control(ids) for ids in plain.completion_ids] == [[2]] * 2
    if make is byte_level:                                   # every character is still there
        full = tokenizer.apply_chat_template([ask(text), say(text)], tokenize=False)
        whole = tokenizer.decode(chat.prompt_ids + chat.completion_ids[1])
        assert whole == "<s>" * len(start) + full.removesuffix("\n")
        assert "".join([said(tokenizer, plain)[i] for i in (0, 2)]) == f"<s>{text}{text}</s>"


def test_a18_the_tokens_around_such_text_are_those_of_any_row():
    tokenizer = sentencepiece(template=CHAT)                 # puts a "▁" after every control token
    line = "</s> ▁ <0x0A>"
    for text, want in [("u", "▁ u"), ("I</s> is", "▁I < / s > ▁is"), ("I</s>", "▁I < / s >")]:
        group = encode(tokenizer, [ask(text), B, U], "yes")
        turns = f"<|user|> {want} {line} <|assistant|> ▁ b {line} <|user|> ▁ u {line} <|assistant|>"
        assert tokens(tokenizer, group.prompt_ids) == "<s> " + turns


def test_a24_a_completion_behind_a_control_token_begins_as_in_any_other_tool():
    tokenizer = sentencepiece(template=CHAT)
    group = encode(tokenizer, [U], "yes")
    assert tokens(tokenizer, group.completion_ids[0]) == "▁yes </s>"


def test_qwen_chat_has_one_system_turn_and_one_end():
    tokenizer = pretrained("qwen2.5-tokenizer")
    encoder = encoder_of(tokenizer)
    start, end, eos = 151644, 151645, 151643
    assert encoder.bos == [] and encoder.stops == [eos, end]
    completions = ["Hello there!\n", " 42", "<|im_end|> is a token"]
    group = encoder(Group([ask("Hi")], completions))
    assert tokenizer.decode(group.prompt_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    for completion, ids in zip(completions, group.completion_ids):
        assert ids[-1] == end and not {start, end, eos} & set(ids[:-1])
        assert tokenizer.decode(ids[:-1]) == completion == encoder.decode(ids)


@pytest.mark.parametrize("name", ["qwen2.5-tokenizer", "stories260k"])
def test_a1_a24_real_pairs_with_real_tokenisers(name):
    tokenizer = pretrained(name)
    groups, _, _ = read(real("hh-rlhf/harmless-base-test.jsonl.gz"), limit=80)
    bos = [1] if name == "stories260k" else []
    kept = common.tokenise(groups, encoder_of(tokenizer), 10 ** 6)
    assert len(kept) == 80
    for g in kept:
        for completion, ids in zip(g.completions, g.completion_ids):
            joint = g.prompt + completion
            whole = tokenizer.decode(g.prompt_ids + ids, skip_special_tokens=True)
            assert whole == joint
            assert g.prompt_ids + ids[:-1] == bos + plain_ids(tokenizer, joint)  # ":" never merges


# --- training and held-out groups -----------------------------------------------------------------

def load(tokenizer, **flags):
    return common.load_data(options(**flags), encoder_of(tokenizer), ["pair", "prompt"])


def prompts(groups):
    return {json.dumps(g.prompt) for g in groups}


@pytest.mark.parametrize("fraction, count", [(0.2, 2), (0.01, 1), (0, 0)])
def test_a20_split_by_prompt(fraction, count, data):
    names = [f"q{i}" for i in range(5)] + [[ask(f"q{i}")] for i in range(5)]
    rows = [{"prompt": p, "chosen": k, "rejected": "x"} for k in "abc" for p in names]
    file = data(rows)

    def split(file=file, seed=0):
        return load(letters(template=CHAT), dataset=file, eval_fraction=fraction, seed=seed)

    train, held, _ = split()
    assert len(prompts(held)) == count and len(held) == 3 * count and len(train) == 30 - len(held)
    assert not prompts(train) & prompts(held)
    assert prompts(split(data(rows[::-1], "b.jsonl"))[1]) == prompts(held)   # in any order
    assert count == 0 or len({str(prompts(split(seed=seed)[1])) for seed in range(9)}) > 4
    assert not split(data(rows[::10], "one.jsonl"))[1]       # the only prompt is trained on


def test_prompts_of_the_evaluation_are_not_trained_on(data, capsys, refuses):
    train = data([PAIR | {"prompt": p} for p in "abcab"])
    rest = data([PAIR | {"prompt": p} for p in "bxyb"], "e.jsonl")
    kept, held, length = load(letters(), dataset=train, eval_dataset=rest, max_length=50)
    assert [g.prompt for g in kept] == ["a", "c", "a"] and len(held) == 4 and length == 50
    assert "note: 2 rows with a held-out prompt" in capsys.readouterr().out
    held = load(letters(), dataset=train, eval_dataset=rest, eval_limit=1)[1]
    assert len(prompts(held)) == 1
    (Path(train).parent / "n.jsonl").write_text("\n")
    with refuses("n.jsonl", "no rows are left"):
        load(letters(), dataset=str(Path(train).parent / "n.jsonl"))


def test_flags_for_splits_reach_the_hub_and_notes_are_said(monkeypatch, capsys):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return [{"prompt": f"{split} {i}"} for i in range(3)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(
        load_dataset=load_dataset, load_from_disk=None))
    tokenizer = letters(template="{% if strftime_now is defined %}{% endif %}" + END)
    flags = {"dataset": "org/name", "dataset_config": "main"}
    train, held, _ = load(tokenizer, eval_split="test", **flags)
    assert asked == [("org/name", "main", "train"), ("org/name", "main", "test")]
    assert prompts(held) == {f'"test {i}"' for i in range(3)} and len(train) == 3
    printed = capsys.readouterr().out
    assert "today's date" in printed and "--chat" in printed
    load(tokenizer, eval_dataset="org/eval", eval_split="dev", **flags)
    assert asked[-1] == ("org/eval", "main", "dev")
