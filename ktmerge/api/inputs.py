"""What every verb takes: recipes, models by name, files to read and to write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ktmerge.checkpoints.regular import read_regular
from ktmerge.errors import UsageError
from ktmerge.recipes import load_recipe
from ktmerge.recipes.schema import Recipe

RecipeLike = str | Path | Recipe


def loaded_recipe(
    recipe: RecipeLike, overrides: Iterable[str] = (), base: str | None = None, experts: Iterable[str] = ()
) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return load_recipe(recipe, overrides=overrides, base=base, experts=experts)


def named_models(models: Sequence[str | Path] | Mapping[str, str | Path]) -> dict[str, str | Path]:
    if isinstance(models, Mapping):
        return dict(models)
    named: dict[str, str | Path] = {}
    for model in models:
        name, equals, path = str(model).partition("=")
        if not equals:
            name, path = Path(os.path.abspath(str(model))).name, str(model)  # of "." and "..", too
        if not name or not path:
            raise UsageError(f"'{model}': give a model as folder or name=folder.")
        if name == "base":
            raise UsageError(f"{model}: only the untuned model is called 'base'; call this one otherwise: name=folder.")
        if name in named:
            raise UsageError(f"two models are called '{name}'; tell them apart with name=folder.")
        named[name] = path
    return named


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Refuse to replace a file silently.

    Raises:
        UsageError: ``path`` exists and ``overwrite`` is not set, or its folder does not exist.
    """
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; choose another name, or add --overwrite.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: the folder {path.absolute().parent} does not exist.")


def text_of(path: Path) -> str:
    try:
        return read_regular(path).decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a text file in UTF-8.") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.") from None
