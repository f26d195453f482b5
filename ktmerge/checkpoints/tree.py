"""A model kept as a tree: a folder of checkpoints, one for each of its modules, with a config above them all.

VILA is published so (``llm/``, ``vision_tower/``, ``mm_projector/``). Its tensors are named after their folders.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_CONFIGS = ("config.json", "model_index.json")
_TEXT = re.compile(r"^(llm|language_model|text_model|text_encoder)$")


def find_branches(root: Path) -> tuple[str, ...]:
    """The folders of a tree, sorted; none if ``root`` is not one: it has weights, no config, or one such folder."""
    if not any((root / file).is_file() for file in _CONFIGS) or next(root.glob("*.safetensors"), None) is not None:
        return ()
    found = sorted({path.parent.name for path in root.glob("*/*.safetensors") if not path.parent.name.startswith(".")})
    folders = [name for name in found if (root / name / "config.json").is_file()]
    return tuple(folders) if len(folders) > 1 else ()


def tree_config(root: dict[str, Any], branches: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the configs of a tree say together; the language model's stands as ``text_config``, as in one file."""
    text = next((config for name, config in branches.items() if _TEXT.match(name)), None)
    return {**branches, **({} if text is None else {"text_config": text}), **root}
