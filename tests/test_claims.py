"""claims.py: every claim is listed, the numbers it judges by are right, and a claim runs."""
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import claims
import lab


def test_every_claim_is_listed(capsys):
    claims.main([])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(claims.CLAIMS)
    for row in claims.CLAIMS.values():
        assert row.claim and row.source and row.function.__doc__ and row.parts


def test_mean_std():
    assert lab.mean_std([1, 2, 6]) == pytest.approx((3, math.sqrt((4 + 1 + 9) / 2)))
    assert lab.mean_std([5]) == (5, 0)
    assert lab.plus_minus([1, 2, 6]) == "3 ± 3"


def test_auc_is_the_share_of_pairs_in_the_right_order():
    positive, negative = [0.1, 0.5, 0.9], [0.1, 0.2, 0.7, 0.95]
    wins = sum((a > b) + 0.5 * (a == b) for a in positive for b in negative)
    assert lab.auc(positive, negative) == pytest.approx(wins / 12)


def test_kl_of_two_tables():
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert lab.kl(p, q) == pytest.approx(first / 2, abs=1e-6)
    assert lab.kl(p, p) == 0


def test_ideal_is_the_tilted_reference():
    values = [[0.0, 1.0], [0.0, 1.0]]
    p = math.exp(2) / (1 + math.exp(2))                      # 1/β = 2
    budget = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert lab.ideal(values, budget) == pytest.approx(p, abs=1e-4)


def test_judge(tmp_path):
    room = lab.Lab(tmp_path)
    for a, b in ((1.0, 0.5), (2.0, 1.6), (3.0, 2.4)):        # paired by seed: 0.5 ± 0.1
        room.add("a", x=a)
        room.add("b", x=b)
    assert room.judge([("x", "a", "b")])[1] == "holds"
    assert room.judge([("x", "b", "a")])[1] == "does not hold"
    assert room.judge([("x", "a", "b"), ("x", 1.9, "a")])[1] == "depends"
    assert "x: a 2 ± 1 > b 1.5 ± 1" in room.judge([("x", "a", "b")])[0]


def test_flipped_labels_are_the_share_that_was_asked_for():
    pairs = lab.slips(lab.problems(0)[:1000], 0, flip=0.3)
    flipped = sum(row["rejected"][0]["content"] == row["answer"] for row in pairs)
    assert 250 < flipped < 350
    assert all(row["chosen"] != row["rejected"] for row in pairs)


def test_a_claim_runs(capsys, tmp_path):
    table = claims.check("grpo-std", seeds=1, quick=True)
    assert set(table) == {"none", "group-std"}
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and said[-1].count(" — ") == 3
