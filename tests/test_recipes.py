"""The README's recipes, every one of them, shortened: its commands run one after the other, and each reads what the one
before has written."""
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import score
import train_dpo
import train_grpo
import train_rm

SCRIPTS = {"train_rm.py": train_rm, "train_dpo.py": train_dpo, "train_grpo.py": train_grpo, "score.py": score}
TRAIN = ["--limit", "40", "--batch-size", "8", "--max-steps", "2"]
SHORT = {"train_rm.py": TRAIN, "train_dpo.py": TRAIN + ["--eval-samples", "4"], "score.py": ["--limit", "24"],
         "train_grpo.py": TRAIN + ["--eval-samples", "4", "--group-size", "4", "--max-new-tokens", "4"]}


def recipes():
    """{title: lines of shell} of the README's section."""
    section = (ROOT / "README.md").read_text().partition("## Recipes")[2].partition("\n## ")[0]
    return dict(re.findall(r"\*\*([^*]+)\*\*.*?```sh\n(.*?)```", section, re.DOTALL))


def commands(text):
    """The commands of a recipe, its loop `for i in …; do … done` rolled out."""
    lines = []
    loop = re.search(r"for i in ([\d ]+); do\n(.*?)done\n", text, re.DOTALL)
    if not loop:
        return text.splitlines()
    lines += text[:loop.start()].splitlines()
    for i in loop[1].split():
        body = loop[2].replace("$((i-1))", str(int(i) - 1)).replace("$i", i)
        lines += [line.strip() for line in body.splitlines()]
    return lines + text[loop.end():].splitlines()


def run(lines, short=True, *more):
    """Each command in this process, in the current directory."""
    for line in lines:
        program, *words = shlex.split(line)
        if program == "cp":
            assert words[0] == "-r"
            shutil.copytree(words[1], words[2])
            continue
        assert program == "python"
        if short and "--confidence" in words:                # two steps make no reward model sure
            words[words.index("--confidence") + 1] = "0.5"
        SCRIPTS[words[0]].main([*words[1:], *(SHORT[words[0]] if short else []), *more])


def test_there_are_eight_recipes_of_at_most_six_commands():
    assert len(recipes()) == 8
    for text in recipes().values():
        assert sum(line.strip().startswith(("python", "cp")) for line in text.splitlines()) <= 6


@pytest.mark.parametrize("title", recipes())
def test_recipe(title, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    (tmp_path / "runs").mkdir()
    run(commands(recipes()[title]))
    assert list(tmp_path.glob("runs/*/model.safetensors"))
