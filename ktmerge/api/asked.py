"""What a measurement is asked for: the sets, the base, and what a recipe says of both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ktmerge.api.inputs import RecipeLike, loaded_recipe
from ktmerge.errors import UsageError
from ktmerge.recipes.load import suite_of

if TYPE_CHECKING:
    from ktmerge.eval.subject import Reference
    from ktmerge.recipes.suites import Suite


@dataclass(frozen=True)
class Asked:
    """Attributes:
    suite: the sets.
    base: folder of the untuned model.
    bootstrap: resamples behind each interval.
    seed: of the resamples.
    """

    suite: Suite
    base: Path
    bootstrap: int = 2000
    seed: int = 0


def asked(
    suite: str | Path | Sequence[str | Path] | None,
    recipe: RecipeLike | None,
    overrides: Iterable[str],
    base: str | Path | None,
) -> Asked:
    """Sets and base, named or by a recipe.

    Raises:
        UsageError: neither names them, or they cannot be read.
    """
    from ktmerge.checkpoints.hub import resolve
    from ktmerge.recipes.combining import load_suites

    loaded = None if recipe is None else loaded_recipe(recipe, overrides)
    if suite:
        sets = load_suites([suite] if isinstance(suite, str | Path) else suite)
    elif loaded is not None:
        sets = suite_of(loaded)
    else:
        raise UsageError("nothing to score on: give --suite, or --recipe with an eval section.")
    if base is not None:
        untuned = resolve(str(base), Path.cwd())
    elif loaded is not None and loaded.base is not None:
        untuned = resolve(loaded.base, loaded.folder)
    else:
        raise UsageError("the base is always scored in the same run: name it with --base.")
    section = loaded.eval if loaded is not None else None
    return Asked(sets, untuned, section.bootstrap, section.seed) if section is not None else Asked(sets, untuned)


def referred(model: str) -> Reference:
    """The folder of a model or adapter, or both of ``model+adapter``."""
    from ktmerge.checkpoints.opening import locate_model

    path, adapter = locate_model(model, Path.cwd())
    return path if adapter is None else (path, adapter)
