"""Where a scored model comes from, as its own folder tells: recipe, lock, and how to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.errors import UsageError
from ktmerge.recipes.document import read_yaml, yaml_text

if TYPE_CHECKING:
    from ktmerge.eval.results import Results

LOCK = "ktmerge.lock.yaml"
_LARGEST = 1 << 22


@dataclass(frozen=True)
class Provenance:
    """One blended model.

    Attributes:
        recipe: as understood, YAML.
        lock: the text of its lock.
        summary: method and parameters in a line.
        inputs: sha256 of the weights that went in, by input.
    """

    recipe: str
    lock: str
    summary: str
    inputs: Mapping[str, str]


def provenance(results: Results) -> dict[str, Provenance]:
    """Of every model whose folder is still there and has a lock; a lock that cannot be read counts as none."""
    found = {}
    for name, model in results.models.items():
        path = Path(model.path) / LOCK
        try:
            if path.is_file() and path.stat().st_size <= _LARGEST:
                found[name] = _of(read_yaml(path), path.read_text(encoding="utf-8"))
        except (OSError, UsageError, LookupError, TypeError, AttributeError, UnicodeDecodeError):
            continue
    return found


def _of(lock: Any, text: str) -> Provenance:
    recipe = lock["recipe"]
    blend = dict(recipe.get("blend") or {})
    method = blend.pop("method", "stages")
    knobs = ", ".join(f"{key} {value}" for key, value in blend.items() if isinstance(value, (int, float, str)))
    count = len(blend.get("where") or ())
    rules = f", {count} rule{'s' if count > 1 else ''}" if count else ""
    inputs = {
        name: ", ".join(
            f"{file} {one['sha256'][:12]}" for file, one in given["files"].items() if file.endswith(".safetensors")
        )
        for name, given in lock["inputs"].items()
    }
    document = yaml_text(recipe)
    return Provenance(document, text, f"{method}{f': {knobs}' if knobs else ''}{rules}", inputs)
