"""Blends, on disk and in place, and what belongs to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ktmerge.api.inputs import RecipeLike, loaded_recipe
from ktmerge.checkpoints.files import refuse_holding
from ktmerge.errors import UsageError
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes import load_recipe

if TYPE_CHECKING:
    from ktmerge.merge import BlendReport
    from ktmerge.merge.extraction import Extraction
    from ktmerge.merge.plan import Plan
    from ktmerge.merge.pristine import Pristine


def plan(recipe: RecipeLike) -> Plan:
    """Resolve what would happen to every tensor, reading only headers.

    Raises:
        UsageError: everything that is wrong with the recipe or its inputs, one per line.
    """
    from ktmerge.merge.planning import plan_blend

    return plan_blend(loaded_recipe(recipe))


def blend(
    recipe: RecipeLike,
    out: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    lock: str | Path | None = None,
    progress: Progress = SILENT,
) -> BlendReport:
    """Blend base and experts into the checkpoint folder ``out``; ``resume`` goes on where a killed run stopped.

    ``lock`` names a file that `lock` or an earlier blend wrote, or that blend's folder.

    Raises:
        UsageError: wrong recipe or inputs, others than locked, or ``out`` exists and ``overwrite`` is not set.
        KtmergeError: the run failed, e.g. a full disk; nothing is left half-written.
    """
    from ktmerge import merge
    from ktmerge.merge.lock import read_lock

    locked = None if lock is None else read_lock(Path(lock))
    return merge.blend(
        loaded_recipe(recipe), Path(out), device=device, resume=resume, overwrite=overwrite, locked=locked,
        progress=progress,
    )  # fmt: skip


def refuse_without_out(
    reference: str, *, overrides: Iterable[str] = (), base: str | None = None, experts: Sequence[str] = ()
) -> NoReturn:
    """Say that a blend needs an output, and with it whatever else is wrong.

    Raises:
        UsageError: always.
    """
    problems = ["--out: say where the blended model goes, or add --dry-run."]
    try:
        plan(load_recipe(reference, overrides=overrides, base=base, experts=experts))
    except UsageError as error:
        problems = [*str(error).splitlines(), *problems]
    raise UsageError("\n".join(problems))


def require_apart(reference: str, out: Path) -> None:
    """Refuse an output that the recipe's own file lies in.

    Raises:
        UsageError: it does, and would be lost where the output is replaced.
    """
    if Path(reference).is_file():
        refuse_holding(out, [Path(reference)])


def blend_into(
    model: Any,
    recipe: RecipeLike,
    sources: Pristine | None = None,
    *,
    device: str = "auto",
    measured: bool = True,
    progress: Progress = SILENT,
) -> BlendReport:
    """Blend in place: write the result into the parameters of a loaded transformers model.

    A sweep gives one ``Pristine()`` as ``sources`` to all its blends: every weight is then read from disk once. With
    ``measured=False`` the report says nothing of single tensors, which saves most of a candidate's time.
    """
    from ktmerge import merge

    return merge.blend_into(model, loaded_recipe(recipe), sources, device=device, measured=measured, progress=progress)


def extract_lora(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int = 16,
    energy: float | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Extraction:
    """Write what fine-tuning changed in the linear layers as a PEFT LoRA adapter into the folder ``out``.

    Args:
        base: folder or hub id.
        tuned: folder or hub id.
        out: folder of the adapter.
        rank: of every layer.
        energy: instead, each layer gets the least rank that holds this share of its change's squares.
        overwrite: replace an adapter that is there.
        progress: where to report to.

    Raises:
        UsageError: the models do not belong together, no linear layer changed, or ``out`` exists.
        KtmergeError: weights cannot be read.
    """
    from ktmerge.merge import extraction

    share = 0.9 if energy is None else energy
    return extraction.extract_lora(
        base, tuned, out, rule="rank" if energy is None else "energy", rank=rank, share=share, overwrite=overwrite,
        progress=progress,
    )  # fmt: skip
