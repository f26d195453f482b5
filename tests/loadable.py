"""Whether transformers finds all weights of its own model in a checkpoint, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import transformers


def assert_loads_whole(folder: Path) -> None:
    """Load it on the meta device; shapes that differ are listed like the rest."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, found = getattr(transformers, architecture).from_pretrained(
        folder, device_map="meta", output_loading_info=True, local_files_only=True, ignore_mismatched_sizes=True
    )
    assert list(model.parameters())
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
