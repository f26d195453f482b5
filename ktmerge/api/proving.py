"""Locks, and proofs that an output is what it is said to be."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ktmerge.api.inputs import RecipeLike, loaded_recipe, refuse_existing
from ktmerge.checkpoints.files import write_whole
from ktmerge.errors import UsageError
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes import gallery, load_recipe
from ktmerge.recipes.schema import Recipe

if TYPE_CHECKING:
    from ktmerge.merge.comparison import Comparison
    from ktmerge.merge.lock import Departure
    from ktmerge.merge.verification import Verification

_SUFFIX = ".lock.yaml"


def lock(
    recipe: str | Path,
    out: str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
    base: str | None = None,
    experts: Iterable[str] = (),
    overwrite: bool = False,
) -> Path:
    """Write the lock of a recipe: every input by its sha256, and all else that decides the bytes of its blend.

    Args:
        recipe: file or gallery name.
        out: the lock; default: ``NAME.lock.yaml`` beside the recipe, of one from the gallery here.
        overrides: ``key=value`` strings.
        base: replaces the recipe's.
        experts: ``name=model`` or ``name=model:weight``, replace the recipe's.
        overwrite: replace a lock that is there.

    Returns:
        the path of the lock.

    Raises:
        UsageError: wrong recipe or inputs, or the lock exists.
        KtmergeError: an input cannot be read.
    """
    from ktmerge.merge.lock import lock_text, locked_now
    from ktmerge.merge.planning import plan_blend

    target = lock_path(recipe) if out is None else Path(out)
    loaded = load_recipe(recipe, overrides=overrides, base=base, experts=experts)
    refuse_existing(target, overwrite)
    write_whole(target, lock_text(locked_now(plan_blend(loaded))), replace=overwrite)
    return target


def lock_path(recipe: str | Path) -> Path:
    """Where the lock of a recipe lies unless another place is named."""
    path, from_gallery = gallery.locate(recipe)
    name = path.name.removesuffix(path.suffix) + _SUFFIX
    return Path(name) if from_gallery else path.with_name(name)


def check_lock(
    recipe: RecipeLike,
    lock: str | Path,
    *,
    overrides: Iterable[str] = (),
    base: str | None = None,
    experts: Iterable[str] = (),
    rehash: bool = False,
) -> list[Departure]:
    """Where a recipe with its inputs is not as a lock says.

    Args:
        recipe: file, gallery name, or loaded.
        lock: what it is held against.
        overrides: ``key=value`` strings.
        base: replaces the recipe's.
        experts: ``name=model`` or ``name=model:weight``, replace the recipe's.
        rehash: read every input for its digest, also those that seem unchanged since they were read last.

    Raises:
        UsageError: wrong recipe or inputs, or no such lock.
        KtmergeError: an input cannot be read.
    """
    from ktmerge.merge.lock import departures, locked_now, read_lock
    from ktmerge.merge.planning import plan_blend

    locked = read_lock(Path(lock))
    plan = plan_blend(loaded_recipe(recipe, overrides, base, experts))
    return departures(locked, locked_now(plan, rehash=rehash))


def diff(first: str, second: str) -> Comparison:
    """In what two differ, and whether it changes the weights that are written.

    Args:
        first: a recipe file or gallery name, a lock, or the folder of a blend.
        second: likewise.

    Raises:
        UsageError: one is none of these, or its recipe is not valid.
    """
    from ktmerge.merge.comparison import compare

    return compare(first, second)


def verify(
    out: str | Path,
    recipe: RecipeLike | None = None,
    *,
    base: str | None = None,
    experts: Iterable[str] = (),
    rebuild: bool = False,
    rehash: bool = False,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Verification:
    """Hold a blended model against its record, and if asked blend again and compare bytes.

    Args:
        out: a folder that `blend` wrote; it is only read.
        recipe: what it was made by. If not given and something has to be blended or compared, the recipe in its
            record, whose paths start at the working folder.
        base: where the base is, if not where that recipe says.
        experts: ``name=model`` where experts are.
        rebuild: blend again, into a temporary folder beside ``out``.
        rehash: read every input for its digest, also those that seem unchanged since they were read last.
        device: auto, cpu or cuda.
        progress: where to report.

    Raises:
        UsageError: ``out`` has no record, or the recipe or its inputs are wrong.
        KtmergeError: something cannot be read, or the new blend failed.
    """
    from ktmerge.merge.verification import recorded_recipe
    from ktmerge.merge.verification import verify as held

    given = list(experts)
    if recipe is not None:
        found: Recipe | None = loaded_recipe(recipe, (), base, given)
    elif rebuild or rehash or base is not None or given:
        pairs = [one.partition("=") for one in given]
        for name, equals, model in pairs:
            if not equals or not model:
                raise UsageError(f"--expert {name}: write name=model.")
        found = recorded_recipe(Path(out), base, {name: model for name, _, model in pairs})
    else:
        found = None
    return held(Path(out), found, rebuild=rebuild, rehash=rehash, device=device, progress=progress)
