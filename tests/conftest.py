"""Fixtures that several test files use, and the order of the tests."""
from pathlib import Path

import pytest
from helpers import write_shards


def pytest_collection_modifyitems(items) -> None:
    """The longest tests come first, so that none is left alone at the end."""
    items.sort(key=lambda item: item.path.stem != "test_faults" and "lm_eval" not in item.name)


@pytest.fixture
def shard_folder(tmp_path) -> Path:
    return write_shards(tmp_path / "data")
