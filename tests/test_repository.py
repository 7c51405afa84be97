"""What holds for the repository as a whole: shared text is the same text, every flag is read, the README speaks of what is there."""
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAINERS = sorted(f.name for f in ROOT.glob("train_*.py"))   # with forks: a copy must leave the suite green
SCRIPTS = TRAINERS + ["score.py"]


def shared_blocks(name):
    return dict(re.findall(r"# --- shared: (.*?) ---\n(.*?)# --- end shared ---", (ROOT / name).read_text(), re.DOTALL))


@pytest.mark.parametrize("name", TRAINERS)
def test_shared_blocks_are_the_same_text_in_every_trainer(name):
    blocks = shared_blocks("train_dpo.py")
    assert set(blocks) == {"flags", "schedule", "setup", "plan", "open the run", "before the loop", "update", "log", "save and evaluate"}
    assert shared_blocks(name) == blocks


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read(name):
    text = (ROOT / name).read_text() + (ROOT / "common.py").read_text()
    for flag in re.findall(r'add_argument\("--([a-z-]+)"', text):
        assert re.search(rf"\bargs\.{flag.replace('-', '_')}\b|\"{flag.replace('-', '_')}\"", text), flag


@pytest.mark.parametrize("name", SCRIPTS + ["common.py"])
def test_args_are_never_overwritten_after_parsing(name):
    assert not re.findall(r"^ +args\.\w+ [-+|]?= .*", (ROOT / name).read_text(), re.MULTILINE)


def test_layout():
    """The layout that was asked for: nothing else at the top level but dot-files (and what runs leave behind)."""
    names = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")} - {"runs", "__pycache__"}
    assert names - set(TRAINERS) == {"README.md", "requirements.txt", "common.py", "score.py", "tests"}
    assert {"train_rm.py", "train_dpo.py", "train_grpo.py"} <= set(TRAINERS)


def test_readme_names_only_flags_and_files_that_exist():
    readme = (ROOT / "README.md").read_text()
    programs = SCRIPTS + [f"tests/{f.name}" for f in (ROOT / "tests").glob("*.py")] + ["tests/toy/make_toy.py"]
    known = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--shutdown-timeout"}     # torchrun's
    for name in programs:
        known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / name).read_text()))
    unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme)) - known
    assert not unknown
    made = ("metrics.jsonl", "completions.jsonl", "prompts.jsonl", "pairs.jsonl", "train_mine.py")
    for file in re.findall(r"`((?:tests/)?[a-z_/]+\.(?:py|jsonl|txt))`", readme):
        assert (ROOT / file).exists() or (ROOT / "tests/toy" / file).exists() or file in made, file
    assert "@" not in re.sub(r"pass@\w", "", readme)         # no placeholder left
    assert not re.findall(r"RECIPE\d|[A-Z]_RESULTS|\| \? \|", readme)


def test_the_diff_of_two_loops_is_the_one_that_the_readme_shows():
    loops = []
    for name in ("train_rm.py", "train_dpo.py"):
        loop = (ROOT / name).read_text().partition("    # --- loop\n")[2].partition("    # --- save\n")[0]
        loops.append([line.strip() for line in loop.splitlines()])
    real = [line for line in difflib.ndiff(*loops) if line[0] in "+-"]
    shown = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1].splitlines()
    assert sorted(line[0] + line[2:] for line in real) == sorted(line[0] + line[1:].strip() for line in shown)
