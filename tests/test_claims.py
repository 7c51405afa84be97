"""claims.py: the numbers that it judges by are right, and a claim runs in miniature."""
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import claims


def test_numbers():
    assert claims.mean_std([1, 2, 6]) == pytest.approx((3, math.sqrt(7)))
    assert claims.auc([0.5, 0.9], [0.1, 0.5]) == pytest.approx(3.5 / 4)
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    assert claims.kl(p, q) == pytest.approx(0.25 * (math.log(2) + math.log(2 / 3)))
    p = math.exp(2) / (1 + math.exp(2))                      # the tilt 1/β = 2 of two equal samples
    budget = p * math.log(2 * p) + (1 - p) * math.log(2 - 2 * p)
    assert claims.ideal([[0.0, 1.0]] * 2, budget) == pytest.approx(p, abs=1e-4)


def test_judge(tmp_path):
    lab = claims.Lab(tmp_path)
    for a, b in ((1.0, 0.5), (2.0, 1.6), (3.0, 2.4)):        # paired by seed: 0.5 ± 0.1
        lab.add("a", x=a)
        lab.add("b", x=b)
    assert lab.judge([("x", "a", "b")]) == ("x: a 2 ± 1 > b 1.5 ± 1", "holds")
    assert lab.judge([("x", "b", "a")])[1] == "does not hold"
    assert lab.judge([("x", "a", "b"), ("x", 1.9, "a")])[1] == "depends"


def test_claims_are_listed_and_one_runs(capsys):
    claims.main([])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(claims.CLAIMS)
    claims.check("grpo-std", seeds=1, quick=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["none", "group-std"]
    assert len(lines) == 3 and lines[-1].count(" — ") == 2
