"""The small part of tests/faults/run.py: each fault is a real one, and each promise is kept.

    pytest tests/test_faults.py
"""
import sys

import pytest
from faults import common
from faults.run import PARTS
from helpers import ENCODING, needs

QUICK, SLOW = ({f"{part}-{name}": action for part, actions in PARTS.items() for name, action in actions[kind].items()}
               for kind in (1, 2))
pytestmark = [pytest.mark.dist, needs(*ENCODING),
              pytest.mark.skipif(sys.platform != "linux", reason="they need Linux's prlimit, /proc")]


@pytest.fixture(autouse=True)
def processes(monkeypatch):
    """One rank begins where PyTorch is imported already; none outlives its test."""
    monkeypatch.setattr(common, "forking", True)
    yield
    common.end_all()


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_promise_is_kept(name):
    rows = {**QUICK, **SLOW}[name]()
    assert rows and not [row for row in rows if row.outcome.startswith("BROKEN")]
