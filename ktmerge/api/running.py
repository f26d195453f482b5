"""The whole way of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ktmerge.api.checking import require_ready
from ktmerge.api.inputs import RecipeLike, loaded_recipe
from ktmerge.progress import SILENT, Progress

if TYPE_CHECKING:
    from ktmerge.pipeline import RunResult


def run(
    recipe: RecipeLike,
    out: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> RunResult:
    """Go the whole way of a recipe: make its experts, measure, blend, score, report. Finished pieces are kept.

    Raises:
        UsageError: the recipe or its inputs are wrong; what shows beforehand is found before anything is made.
        KtmergeError: a piece failed; the finished ones stay.
    """
    from ktmerge import pipeline

    loaded = loaded_recipe(recipe)
    require_ready(loaded)
    return pipeline.run(loaded, Path(out), device=device, resume=resume, overwrite=overwrite, progress=progress)
