"""Models to blend by the real command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside these tests

from commands import write_models


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with little models and a recipe."""
    folder = tmp_path / "work"
    write_models(folder, width=32, layers=2, shards=2)
    return folder


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """The same with models of 50 MB in three shards."""
    folder = tmp_path / "work"
    write_models(folder, width=512, layers=10, shards=3)
    return folder
