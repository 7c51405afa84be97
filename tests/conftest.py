"""One thread a process: on models this small a second one costs more than it gives."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")                # read when torch is imported

import pytest  # noqa: E402


@pytest.fixture
def measured(monkeypatch):
    """[(name of the measure, groups), …]: what train_dpo.py computes with for_all()."""
    import train_dpo
    calls = []

    def note(measure, model, groups, *rest, for_all=train_dpo.for_all):
        calls.append((measure.__name__, groups))
        return for_all(measure, model, groups, *rest)

    monkeypatch.setattr(train_dpo, "for_all", note)
    return calls
