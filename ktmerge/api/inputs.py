"""What every verb takes: recipes, models by name, files to read and to write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ktmerge.checkpoints.files import refuse_unwritable
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


def named_models(models: str | Path | Sequence[str | Path] | Mapping[str, str | Path]) -> dict[str, str | Path]:
    if isinstance(models, (str, Path)):
        models = [models]
    if isinstance(models, Mapping):
        pairs = [(f"{name}={path}", name, str(path)) for name, path in models.items()]
    else:
        pairs = [(str(model), *_named(str(model))) for model in models]
    named: dict[str, str | Path] = {}
    for model, name, path in pairs:
        if not name or not path:
            raise UsageError(f"'{model}': give a model as folder or name=folder.")
        if name == "base":
            raise UsageError(f"{model}: only the untuned model is called 'base'; call this one otherwise: name=folder.")
        if name in named:
            raise UsageError(f"two models are called '{name}'; tell them apart with name=folder.")
        named[name] = path
    return named


def _named(model: str) -> tuple[str, str]:
    """Name and path of a folder or ``name=folder``."""
    name, equals, path = model.partition("=")
    return (name, path) if equals else (Path(os.path.abspath(model)).name, model)  # of "." and "..", too


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Refuse to replace a file silently.

    Raises:
        UsageError: ``path`` exists and ``overwrite`` is not set, or its folder does not exist or may not be written to.
    """
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; name a file.")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; choose another name, or add --overwrite.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: the folder {path.absolute().parent} does not exist.")
    refuse_unwritable(path)


def text_of(path: Path) -> str:
    try:
        return read_regular(path).decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a text file in UTF-8.") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.") from None
