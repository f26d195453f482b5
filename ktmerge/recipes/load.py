"""From a file, a gallery name and ``--set`` overrides to a checked recipe; every error says where and what to do."""

from __future__ import annotations

import copy
import functools
import os
import re
import types
import typing
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from ktmerge.errors import UsageError, did_you_mean, printable
from ktmerge.recipes import gallery, ready
from ktmerge.recipes.document import read_yaml
from ktmerge.recipes.late import Late
from ktmerge.recipes.migration import RECIPE_STEPS, SUITE_STEPS, migrated
from ktmerge.recipes.overrides import apply_overrides
from ktmerge.recipes.places import Places
from ktmerge.recipes.schema import SCHEMA_VERSION, Blend, Recipe, WhereRule

if TYPE_CHECKING:
    from ktmerge.recipes.suites import Suite

Model = TypeVar("Model", bound=BaseModel)

_MOST_PROBLEMS, _MOST_LETTERS = 50, 200
"""Of one file that are told; of a key or value that is shown."""


def load_recipe(
    reference: str | Path,
    *,
    overrides: Iterable[str] = (),
    base: str | None = None,
    experts: Iterable[str] = (),
) -> Recipe:
    """Load a recipe.

    Args:
        reference: path of a YAML file, or a name from the gallery (``ktmerge recipe list``).
        overrides: ``key=value`` strings, see :func:`ktmerge.recipes.overrides.apply_overrides`.
        base: replaces ``base``; a path is taken relative to the current folder.
        experts: ``name=model`` or ``name=model:weight`` strings that replace ``experts``, likewise; without a name the
            folder's is taken.

    Raises:
        UsageError: anything that keeps the recipe from being valid.
    """
    path, from_gallery = gallery.locate(reference)
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys; see 'ktmerge recipe show ties'.")
    document, written = _present(document, str(path)), copy.deepcopy(document)
    if base is not None:
        document["base"] = _from_here(base)
    chosen = [_expert(text) for text in ([experts] if isinstance(experts, str) else experts)]
    twice = [name for name, count in Counter(name for name, _ in chosen).items() if count > 1]
    if twice:
        raise UsageError(f"--expert: '{twice[0]}' is given more than once; give each expert a name of its own.")
    if chosen:
        document["experts"] = dict(chosen)
    apply_overrides(document, [overrides] if isinstance(overrides, str) else overrides)
    file = path if document == written else None  # with other keys than the file has, its lines say nothing
    if from_gallery:
        return parse_recipe(document, str(reference), Path.cwd(), file)
    return parse_recipe(document, str(path), path.resolve().parent, file)


def parse_recipe(document: dict[str, Any], where: str, folder: Path, file: Path | None = None) -> Recipe:
    """Check a recipe given as plain data; ``where`` names it in messages, and so do lines of the ``file`` it is in."""
    return validate(Recipe, _present(document, where), where, file).model_copy(update={"folder": folder})


def _present(document: dict[str, Any], where: str) -> dict[str, Any]:
    """A recipe's document in the schema version of today."""
    if "ktmerge" not in document and "merge_method" in document:
        raise UsageError(
            f"{where}: this is a mergekit file; 'ktmerge recipe import {where} --out recipe.yaml' makes it a recipe."
        )
    return migrated(document, "ktmerge", SCHEMA_VERSION, RECIPE_STEPS, where)


def load_suite(reference: str | Path) -> Suite:
    """Load an evaluation suite: a YAML file, or one of the ready suites by its name.

    Raises:
        UsageError: missing, not YAML, or not a suite.
    """
    from ktmerge.recipes.suites import SUITE_VERSION, Suite

    path, folder = ready.locate(reference)
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise UsageError(f"{path}: a suite is a mapping with upstream and downstream tasks.")
    document = migrated(document, "ktmerge_suite", SUITE_VERSION, SUITE_STEPS, str(path))
    suite = validate(Suite, document, str(path), path)
    places = Places(path)
    sides = {"upstream": suite.upstream, "downstream": suite.downstream}
    found = {task.name: places.at((side, number)) for side, tasks in sides.items() for number, task in enumerate(tasks)}
    return suite.model_copy(update={"folder": folder, "places": found})


def suite_of(recipe: Recipe) -> Suite:
    """The suite a recipe's eval section names or spells out.

    Raises:
        UsageError: the recipe has no eval section, or its suite file is not valid.
    """
    from ktmerge.recipes.suites import Suite

    section = recipe.eval
    if section is None:
        raise UsageError(f"the recipe '{recipe.name}' has no eval section; add one, or give --suite.")
    if section.suite is not None:
        file = recipe.folder / section.suite
        return load_suite(section.suite if section.suite in ready.names() and not file.exists() else file)
    return Suite(
        ktmerge_suite=1,
        name=recipe.name,
        upstream=section.upstream,
        downstream=section.downstream,
        folder=recipe.folder,
    )


def validate(model: type[Model], document: Any, where: str, file: Path | None = None) -> Model:
    """Check ``document`` against ``model`` and turn what is wrong into one sentence a line, nearest names included.

    Args:
        model: what it should be.
        document: plain data.
        where: names it in messages.
        file: YAML that holds just that document; messages then name its lines.

    Raises:
        UsageError: it is not valid.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        places = Places(file) if file is not None else None
        problems = [
            f"{where if places is None else places.at(problem['loc'])}: {_sentence(model, problem)}"
            for problem in error.errors()[:_MOST_PROBLEMS]
        ]
        if error.error_count() > _MOST_PROBLEMS:
            problems.append(f"{where}: and {error.error_count() - _MOST_PROBLEMS} more of that kind.")
        raise UsageError("\n".join(dict.fromkeys(problems))) from None


def _sentence(model: type[BaseModel], problem: Any) -> str:
    location: tuple[str | int, ...] = problem["loc"]
    key = _spell(model, location)
    if problem["type"] == "extra_forbidden":
        owner = _model_at(model, location[:-1])
        meant = _elsewhere(str(location[-1])) if owner is Recipe else ""
        return f"unknown key '{key}'.{meant or did_you_mean(str(location[-1]), _keys(owner) if owner else ())}"
    if problem["type"] == "missing":
        return f"the key '{key}' is missing."
    if problem["type"] == "union_tag_invalid":
        tag = str(problem["ctx"]["tag"])
        return f"{key}.kind: there is no kind '{tag}'.{did_you_mean(tag, sorted(_kinds() - {'lm_eval'}))}"
    if problem["type"] == "string_pattern_mismatch" and location[-1] == "name":
        return f"{key}: letters, digits and _ . - make a name, a letter or digit first, not {shown(problem['input'])}."
    if key and problem["type"] in _SHAPES:
        first = _FIRST_KEYS.get((location[0], len(location))) if isinstance(problem["input"], str) else None
        such = f", such as {{{first}: {printable(_short(problem['input']))}}}" if first else ""
        return f"{key}: must be {_SHAPES[problem['type']]}{such}, not {_shape(problem['input'])}."
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if not key:
        return f"{message}."
    given = "" if isinstance(problem["input"], (dict, list)) else f", not {shown(problem['input'])}"
    return f"{key}: {message}{given}."


_SHAPES = {"model_type": "keys with values", "dict_type": "keys with values", "list_type": "a list"}
"""What pydantic says of a value of another shape, in a reader's words."""


_FIRST_KEYS: Mapping[tuple[str | int, int], str] = {("experts", 2): "model", ("blend", 1): "method"}
"""By section and depth: the key that is left out where it is given as a text."""

_LONGEST_PARAMETER = 40
_MERGEKIT = {"base_model": "base", "models": "experts", "merge_method": "blend.method", "dtype": "output.dtype"}


def _elsewhere(key: str) -> str:
    """Where a key belongs that stands at the top of a recipe by mistake: mergekit's, or one of the blend's."""
    near = did_you_mean(key, _keys(Recipe), list_all=False)
    if key in _MERGEKIT:
        return f" Did you mean '{_MERGEKIT[key]}'?"
    if near or not key.isidentifier() or len(key) > _LONGEST_PARAMETER:
        return near
    if key in FIXED_BLEND_KEYS:
        return f" Did you mean 'blend.{key}'?"
    return f" If the method has it, it is 'blend.{key}'.{did_you_mean(key, _keys(Recipe))}"


def _shape(value: Any) -> str:
    return "a list" if isinstance(value, list) else "keys with values" if isinstance(value, dict) else shown(value)


def shown(value: Any) -> str:
    """As YAML has it."""
    return _short("null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value))


def _short(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}..."


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items() if not field.exclude]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Every model class inside an annotation such as ``list[Task] | None``."""
    if isinstance(annotation, Late):
        return [annotation.model]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [found for inner in typing.get_args(annotation) for found in _models(inner)]
    return []


def _model_at(model: type[BaseModel], location: tuple[str | int, ...]) -> type[BaseModel] | None:
    """Follow an error location down to the model whose key is wrong."""
    current: list[type[BaseModel]] = [model]
    for step in location:
        following: list[type[BaseModel]] = []
        for candidate in current:
            for name, field in candidate.model_fields.items():
                if step in (name, field.alias):
                    following += _models(field.annotation)
        tagged = [c for c in current if _tag(c) == step]
        current = following or tagged or current
    return current[0] if current else None


def _tag(model: type[BaseModel]) -> str | None:
    """The value of ``kind`` that selects this task model."""
    kind = model.model_fields.get("kind")
    values = typing.get_args(kind.annotation) if kind else ()
    return values[0] if values else None


def _spell(model: type[BaseModel], location: tuple[str | int, ...]) -> str:
    """``('blend', 'where', 0, 'lambda')`` as ``blend.where[0].lambda``; the tags of task kinds are left out."""
    text = ""
    for i, step in enumerate(location):
        if isinstance(step, int):
            text += f"[{step}]"
        elif i and isinstance(location[i - 1], int) and step in _kinds() and i < len(location) - 1:
            continue
        else:
            text += f".{step}"
    return printable(_short(text.lstrip(".")))


@functools.cache
def _kinds() -> frozenset[str]:
    from ktmerge.recipes.harness import HarnessTask
    from ktmerge.recipes.suites import AnyTask

    return frozenset(str(_tag(task)) for task in (*typing.get_args(AnyTask), HarnessTask))


def _expert(text: str) -> tuple[str, dict[str, Any]]:
    name, equals, model = text.partition("=") if "=" in text else ("", "", text)
    if bool(equals) != bool(name) or not model:
        raise UsageError(
            f"--expert {text}: write name=model or name=model:weight; without name=, the folder's name counts."
        )
    head, colon, tail = model.rpartition(":")
    if colon and head and not Path(model).exists():
        with suppress(ValueError):
            return name or _name_of(head), {"model": _from_here(head), "weight": float(tail)}
    return name or _name_of(model), {"model": _from_here(model)}


def _name_of(model: str) -> str:
    """What an expert is called that was given by its folder or hub id alone."""
    folder = os.path.abspath(model) if Path(model).exists() else model.partition("@")[0]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(folder).name)


def _from_here(model: str) -> str:
    """A path given on the command line is relative to the current folder, not to the recipe's."""
    if Path(model).exists():
        return str(Path(model).absolute())
    model_and_adapter = model.split("+")
    return "+".join(map(_from_here, model_and_adapter)) if all(model_and_adapter[1:]) and "+" in model else model


FIXED_BLEND_KEYS = frozenset(_keys(Blend))
FIXED_RULE_KEYS = frozenset(_keys(WhereRule))
