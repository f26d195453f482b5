"""What is in checkpoints, and what to do with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ktmerge.api.inputs import named_models, refuse_existing
from ktmerge.errors import UsageError
from ktmerge.progress import SILENT, Progress

if TYPE_CHECKING:
    from ktmerge.merge.diagnostics.inspection import Inspection
    from ktmerge.merge.recommendation import Recommendation


def inspect(
    base: str | Path,
    tuned: str | Path | Sequence[str | Path] | Mapping[str, str | Path] = (),
    *,
    headers_only: bool = False,
    common: bool = False,
    plot: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Inspection:
    """What is in a checkpoint and how far tuned models moved from it, by part and layer.

    Args:
        base: folder or hub id.
        tuned: folders or hub ids (of PEFT adapters too), ``name=model`` strings, or a mapping of names to models.
        headers_only: read only the files' headers.
        common: also say how much the changes of two or more tuned models have in common; takes minutes.
        plot: write a heat map, layer by kind of tensor, to this PNG, SVG or PDF file.
        overwrite: replace a picture that is there.
        progress: where to report to.

    Raises:
        UsageError: a folder is no checkpoint, a name is given twice, a model shares nothing with the base, or the
            picture cannot be drawn or exists.
        KtmergeError: weights cannot be read.
    """
    from ktmerge.merge.diagnostics.inspecting import inspect as inspect_models

    models = named_models(tuned)
    target = None if plot is None else Path(plot)
    if target is not None:
        from ktmerge.merge.diagnostics.picture import require_drawable

        require_drawable(target, models, headers_only=headers_only)
        refuse_existing(target, overwrite)
    found = inspect_models(base, models, headers_only=headers_only, common=common, progress=progress)
    if target is not None:
        from ktmerge.checkpoints.files import write_whole
        from ktmerge.merge.diagnostics.picture import heat_map

        write_whole(target, heat_map(found, target), replace=overwrite)
    return found


def recommend(
    base: str | Path,
    tuned: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    *,
    statistics: bool = False,
    progress: Progress = SILENT,
) -> Recommendation:
    """Which three recipes to try on these models, why, and the commands for it.

    Args:
        base: folder or hub id.
        tuned: at least one; as of `inspect`.
        statistics: whether data of both sides are at hand, so that methods that measure on them are worth a try.
        progress: where to report to.

    Raises:
        UsageError: no tuned model, one that shares nothing with the base, or one that equals it.
        KtmergeError: weights cannot be read.
    """
    from ktmerge.merge.diagnostics.rank import rank_share
    from ktmerge.merge.recommendation import recommend as choose

    models = {name: str(model) for name, model in named_models(tuned).items()}
    if not models:
        raise UsageError("name at least one tuned model after the base.")
    found = inspect(base, models, progress=progress)
    for name in models:
        if not found.matrices[name].changed:
            raise UsageError(f"{name}: none of its matrices differs from the base's; there is nothing to blend.")
    rank = rank_share(base, models)
    return choose(found, str(base), models, statistics=statistics, rank=rank)
