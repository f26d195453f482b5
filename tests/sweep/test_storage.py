"""Where a sweep is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktmerge import api
from ktmerge.errors import UsageError


def test_a_storage_that_cannot_be_opened_leaves_no_folder(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for url in ("foo://x", f"sqlite:///{tmp_path}/missing/s.db"):
        with pytest.raises(UsageError, match="cannot be opened"):
            api.sweep(world.recipe, tmp_path / "out", ranges=["lambda=0:1"], storage=url)
        assert not (tmp_path / "out").exists()
