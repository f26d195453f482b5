"""Recipes shown, listed and imported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ktmerge.api.inputs import named_models, refuse_existing, text_of
from ktmerge.checkpoints.files import write_whole
from ktmerge.errors import UsageError, located
from ktmerge.recipes import gallery, load_recipe
from ktmerge.recipes.document import yaml_text
from ktmerge.recipes.references import moved

if TYPE_CHECKING:
    from ktmerge.merge.explanation import Explanation


def show_recipe(reference: str, overrides: Iterable[str] = ()) -> str:
    """The text of a recipe; with overrides, the recipe as understood."""
    changed = list(overrides)
    if changed:
        from ktmerge.pipeline import recipe_text

        return recipe_text(load_recipe(reference, overrides=changed))
    path, _ = gallery.locate(reference)
    return text_of(path)


@dataclass(frozen=True)
class Listed:
    """One recipe of the gallery.

    Attributes:
        when: to use it.
        method: what it blends with.
        data: what ``ktmerge stats`` has to measure before; ``none`` if nothing.
    """

    name: str
    when: str
    method: str
    data: str


def list_recipes() -> list[Listed]:
    """Every recipe of the gallery, by name."""
    from ktmerge.merge.catalogue import NO_DATA, data_of_recipe

    listed = []
    for name in gallery.names():
        recipe = load_recipe(name)
        method = (recipe.blend.method or "stages") if recipe.blend else ""
        data = data_of_recipe(recipe.blend) if recipe.blend else NO_DATA
        listed.append(Listed(name, recipe.description, method, data))
    return listed


def import_recipe(source: Path, out: Path | None, *, overwrite: bool = False) -> tuple[str, list[str]]:
    """Read a mergekit YAML; return the recipe's text and where its semantics differ. Writes it to ``out`` if given.

    mergekit's paths start at the working folder, a recipe's where it lies: those that lead somewhere are written anew.

    Raises:
        UsageError: it is not a mergekit file, says what a recipe cannot say, or ``out`` exists.
    """
    from ktmerge.merge.importer import import_mergekit

    if out is not None:
        refuse_existing(out, overwrite)
    with located(str(source)):
        document, differences = import_mergekit(text_of(source))
    if out is not None:
        document["base"] = moved(document["base"], Path.cwd(), out.parent)
        for expert in document["experts"].values():
            expert["model"] = moved(expert["model"], Path.cwd(), out.parent)
    text = yaml_text(document)
    if out is not None:
        write_whole(out, text, replace=overwrite)
    return text, differences


def explain(
    reference: str, *, overrides: Iterable[str] = (), base: str | None = None, experts: Iterable[str] = ()
) -> Explanation:
    """What a recipe will do, in plain words, part by part.

    Raises:
        UsageError: the recipe is wrong in a way that shows without its models.
    """
    from ktmerge.merge import explanation

    return explanation.explain(load_recipe(reference, overrides=overrides, base=base, experts=experts))


def new_recipe(
    out: str | Path,
    *,
    base: str,
    experts: Sequence[str],
    statistics: bool = False,
    keep: Sequence[str] = (),
    lean: str = "balanced",
    overwrite: bool = False,
) -> Path:
    """Write a first recipe, with comments, for a base and its experts.

    Args:
        out: the file.
        base: folder or hub id.
        experts: ``name=model`` strings, or folders.
        statistics: whether data of both sides are at hand to measure on.
        keep: part expressions that stay the base's.
        lean: ``upstream``, ``balanced`` or ``downstream``: what matters most.
        overwrite: replace a file that is there.

    Raises:
        UsageError: no experts, one given twice, an unknown ``lean`` or part, or the file exists.
    """
    from ktmerge.merge.drafting import draft

    target = Path(out)
    refuse_existing(target, overwrite)
    here, folder = Path.cwd(), target.parent
    models = {name: moved(str(model), here, folder) for name, model in named_models(experts).items()}
    text = draft(target.stem, moved(base, here, folder), models, statistics=statistics, keep=keep, lean=lean)
    write_whole(target, text, replace=overwrite)
    return target


def schema_text(kind: str = "recipe") -> str:
    """The JSON Schema of a ``recipe`` or a ``suite``, by which editors complete and check YAML.

    Raises:
        UsageError: another ``kind``.
    """
    from ktmerge.merge.schema import FOLDER, SCHEMAS

    if kind not in SCHEMAS:
        raise UsageError(f"'{kind}': there is a schema of {' and of '.join(SCHEMAS)}.")
    return text_of(FOLDER / f"{kind}.schema.json")
