"""Models compared without labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ktmerge.api.asked import asked, referred
from ktmerge.api.inputs import RecipeLike, named_models, refuse_existing
from ktmerge.progress import SILENT, Progress

if TYPE_CHECKING:
    from ktmerge.eval import Screened


def screen(
    models: Sequence[str | Path] | Mapping[str, str | Path],
    *,
    suite: str | Path | Sequence[str | Path] | None = None,
    recipe: RecipeLike | None = None,
    overrides: Iterable[str] = (),
    base: str | Path | None = None,
    experts: Sequence[str | Path] | Mapping[str, str | Path] = (),
    line: bool = False,
    weight: float = 0.5,
    out: str | Path | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    part: str | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Screened:
    """Measure models without labels: KL to the base upstream, KL to the experts downstream, disagreement on a line.

    Args:
        models: folders, ``name=folder`` strings, or a mapping of names to folders.
        suite: a suite file or the name of a ready suite; or several. Its right answers play no part.
        recipe: instead of a suite, a recipe whose eval section names one.
        overrides: ``key=value`` strings for the recipe.
        base: the untuned model; defaults to the recipe's.
        experts: fine-tunes to learn from, like ``models``; one with a downstream set's name is asked on that set.
        line: the models are in the order of a coefficient; neighbours' answers are compared (arXiv 2503.23733).
        weight: of the experts in J, in [0, 1].
        out: JSON file to write.
        batch_size: most sequences in a forward pass.
        device: auto, cpu or cuda.
        part: which rows: all, selection or report.
        overwrite: replace a file that is there.
        progress: where to report to.

    Raises:
        UsageError: no suite, no base, unreadable data, different tokenizers, an existing file.
        KtmergeError: a model is broken, or memory does not suffice.
    """
    from ktmerge import eval as evaluation

    wanted = asked(suite, recipe, overrides, base)
    if out is not None:
        refuse_existing(Path(out), overwrite)
    screened = evaluation.screen(
        {name: referred(str(path)) for name, path in named_models(models).items()}, wanted.suite,
        base=wanted.base, experts={name: referred(str(path)) for name, path in named_models(experts).items()},
        line=line, weight=weight, batch_size=batch_size, bootstrap=wanted.bootstrap, seed=wanted.seed, device=device,
        part=part, progress=progress,
    )  # fmt: skip
    if out is not None:
        screened.save(Path(out), overwrite=overwrite)
    return screened
