"""What holds for the repository as a whole: shared text is the same text, every flag is read, the README speaks of what is there."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAINERS = ["train_rm.py", "train_dpo.py", "train_grpo.py"]


def shared_blocks(name):
    return dict(re.findall(r"# --- shared: (.*?) ---\n(.*?)# --- end shared ---", (ROOT / name).read_text(), re.DOTALL))


@pytest.mark.parametrize("name", TRAINERS[1:])
def test_shared_blocks_are_the_same_text_in_every_trainer(name):
    first = shared_blocks(TRAINERS[0])
    assert set(first) == {"flags", "refused flags", "run directory"} and shared_blocks(name) == first


@pytest.mark.parametrize("name", TRAINERS + ["score.py"])
def test_every_flag_is_read(name):
    text = (ROOT / name).read_text()
    for flag in re.findall(r'add_argument\("--([a-z-]+)"', text):
        uses = len(re.findall(rf"\bargs\.{flag.replace('-', '_')}\b|\"{flag.replace('-', '_')}\"", text))
        assert uses or "getattr(args, " in text and flag.replace("-", "_") in text, flag


def test_layout():
    """The layout that was asked for: nothing else at the top level but dot-files (and what runs leave behind)."""
    names = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")} - {"runs", "__pycache__"}
    assert names == {"README.md", "requirements.txt", "common.py", "score.py", "tests", *TRAINERS}


def test_readme_names_only_flags_and_files_that_exist():
    readme = (ROOT / "README.md").read_text()
    known = set().union(*(re.findall(r'"(--[a-z-]+)"', (ROOT / n).read_text()) for n in TRAINERS + ["score.py", "tests/bench.py", "tests/toy/make_toy.py"]))
    unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme)) - known
    assert not unknown
    for file in re.findall(r"`((?:tests/)?[a-z_/]+\.(?:py|jsonl|txt))`", readme):
        assert (ROOT / file).exists() or (ROOT / "tests/toy" / file).exists() or file in ("metrics.jsonl", "completions.jsonl", "prompts.jsonl", "pairs.jsonl"), file
    assert "@" not in re.sub(r"pass@\w", "", readme)          # no placeholder left
