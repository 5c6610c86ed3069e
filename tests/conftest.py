"""Fixtures that several test files use, the order of the tests, what property tests try, and pytest's last lines."""
import math
from pathlib import Path

import promises
import pytest
from helpers import write_shards
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

from plumbing import curve, runlog

# the same examples at every run, on every machine and in any order of the tests; a test may give max_examples
settings.register_profile("same", derandomize=True, deadline=None, database=None, suppress_health_check=[
    HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("same")
# none of the constants in modules: which have been imported depends on the tests before
providers._get_local_constants = lambda: providers._local_constants


def pytest_collection_modifyitems(items) -> None:
    """The longest tests come first, so that none is left alone at the end."""
    long = ("notebook_runs", "compiled", "lm_eval")
    items.sort(key=lambda item: item.path.stem != "test_faults" and not any(word in item.name for word in long))


def pytest_terminal_summary(terminalreporter, config) -> None:
    """After a run of all files, say which promises were checked."""
    if config.args != config.getini("testpaths") or config.option.keyword:
        return
    outcomes = {}
    for outcome in ("passed", "skipped", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            outcomes[report.nodeid] = "failed" if outcome == "error" else outcome
    terminalreporter.section("promises")
    for line in promises.lines(outcomes):
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def spared(request):
    """Draw no picture of a run in this process, which takes half of a small one's time, but for `whole` runs.

    Nor does a slow run look after its folder then, as it does with a picture every ten seconds.
    """
    with pytest.MonkeyPatch.context() as patch:  # of its own: a test may undo what it has patched
        if not request.node.get_closest_marker("whole"):
            patch.setattr(curve, "draw", lambda *_, **__: None)
            patch.setattr(runlog, "PICTURE_SECONDS", math.inf)
        yield


@pytest.fixture
def shard_folder(tmp_path) -> Path:
    return write_shards(tmp_path / "data")
