"""A recipe as it is handed over: every model by commit and sha256, every file by a name that stays in the bundle.

And back: a stranger's recipe is held to that before it is written anywhere.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ktmerge.checkpoints.hub import cached_as
from ktmerge.checkpoints.opening import locate_model
from ktmerge.errors import UsageError, printable
from ktmerge.merge.plan import Plan
from ktmerge.merge.record import portable
from ktmerge.recipes import ready
from ktmerge.recipes.schema import Recipe
from ktmerge.sharing import contents
from ktmerge.sharing.manifest import Input

BASE = "base"
_SHOWN_DIGITS = 16
_COMMIT = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*@[0-9a-f]{40}", re.ASCII)
_LOCAL = re.compile(r"\./[A-Za-z0-9][\w.-]*\.(?:adapter-)?sha256-[0-9a-f]{16}", re.ASCII)
_PLACES = ("data", "subset", "images", "shots_from", "include_path")
"""Keys of a task that name a file or folder, or a part of one."""
_DRIVE = re.compile(r"[A-Za-z]:")


def inputs_of(plan: Plan, locked: Mapping[str, Any]) -> dict[str, Input]:
    """Every model of a plan as whoever receives it can get it or recognise it.

    Args:
        plan: whose inputs are on this machine.
        locked: its lock.
    """
    references = {BASE: plan.recipe.base or "", **{name: one.model for name, one in plan.recipe.experts.items()}}
    found = {}
    for name, given in locked["inputs"].items():
        one = Input.model_validate({"model": "unknown", "files": given["files"]})
        folders = [folder for folder in locate_model(references[name], plan.recipe.folder) if folder is not None]
        told = [cached_as(folder) or _local(name, one, adapter=number > 0) for number, folder in enumerate(folders)]
        found[name] = one.model_copy(update={"model": "+".join(told)})
    return found


def pinned(recipe: Recipe, inputs: Mapping[str, Input], statistics: Mapping[str, str]) -> dict[str, Any]:
    """A recipe's document with everything in it that names a place named as others can understand it.

    How its experts were fine-tuned is left out: they are pinned, and their data are not handed over.

    Args:
        recipe: as it is here.
        inputs: by ``base`` or expert.
        statistics: digests, likewise.
    """
    document: dict[str, Any] = recipe.model_dump(
        mode="json", by_alias=True, exclude_unset=True, exclude={"finetune", "folder"}
    )
    document["base"] = inputs[BASE].model
    for name, expert in document["experts"].items():
        expert["model"] = inputs[name].model
    for name, section in ((BASE, document), *document["experts"].items()):
        section.pop("statistics", None)
        if name in statistics:
            section["statistics"] = measured(name, statistics[name])
    return document


def measured(name: str, digest: str) -> str:
    """What the statistics of a model are called in a recipe that is handed over."""
    return f"./{name}.statistics-{digest[:_SHOWN_DIGITS]}"


def portable_tasks(document: Mapping[str, Any]) -> dict[str, Any]:
    """A suite, or the eval section of a recipe, whose tasks name data by no path of this machine."""
    told: dict[str, Any] = copy.deepcopy(dict(document))
    for holder, key in _places(told):
        if isinstance(holder[key], str):
            holder[key] = portable(holder[key])
    return told


def require_pinned(recipe: Recipe, inputs: Mapping[str, Input], statistics: Mapping[str, str], where: str) -> None:
    """Hold a stranger's recipe to what a recipe that is handed over may name.

    Raises:
        UsageError: an input without commit or digest, or with another than locked; data or statistics elsewhere than
            in the bundle's folder.
    """
    references = {BASE: recipe.base or "", **{name: expert.model for name, expert in recipe.experts.items()}}
    if recipe.blend is None or set(references) != set(inputs):
        raise UsageError(f"{where}: recipe and lock are of different models, so nothing pins what would be blended.")
    for name, reference in references.items():
        locked = inputs[name].model
        if reference != locked:
            raise UsageError(
                f"{where}: the recipe's {name} is '{printable(reference)}', locked is '{printable(locked)}'."
            )
        for part in reference.split("+"):
            local = (_local(name, inputs[name]), _local(name, inputs[name], adapter=True))
            if not _COMMIT.fullmatch(part) and not (_LOCAL.fullmatch(part) and part in local):
                raise UsageError(
                    f"{where}: the recipe's {name} is '{printable(part)}', which says neither org/name@commit nor "
                    "the digest of what was locked; it could become another model."
                )
        section = recipe.statistics_of(name)
        wanted = measured(name, statistics[name]) if name in statistics else None
        if (None if section is None else section.folder) != wanted or (section is not None and section.is_job):
            raise UsageError(f"{where}: the recipe names statistics of {name} that are not those that were locked.")
    if recipe.finetune is not None:
        raise UsageError(f"{where}: the recipe says how to fine-tune models; one that is handed over names them.")


def require_suite(name: str | None, files: Mapping[str, Any], where: str) -> None:
    """Refuse an evaluation suite that is neither in the bundle nor one that comes with ktmerge.

    Raises:
        UsageError: likewise.
    """
    inside = name in files and str(name).startswith(f"{contents.SUITES}/")
    if name is not None and not inside and name not in ready.names():
        raise UsageError(f"{where}: the recipe's suite '{printable(name)}' is not in the bundle.")


def require_inside(document: Any, where: str) -> None:
    """Refuse a suite, or eval section, whose tasks read files outside its own folder.

    Raises:
        UsageError: likewise.
    """
    for holder, key in _places(document):
        place = holder[key]
        if isinstance(place, str) and not _is_inside(place):
            raise UsageError(
                f"{where}: a task's {key} is '{printable(place)}', which is not below the bundle's folder."
            )


def _local(name: str, one: Input, adapter: bool = False) -> str:
    """A name for a folder that was on no hub; no hub id can look like it."""
    return f"./{name}.{'adapter-' if adapter else ''}sha256-{one.digest[:_SHOWN_DIGITS]}"


def _places(document: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Every key of every task that names a place, with the mapping that holds it."""
    for side in ("upstream", "downstream"):
        tasks = document.get(side) if isinstance(document, dict) else None
        for task in tasks if isinstance(tasks, list) else ():
            if not isinstance(task, dict):
                continue
            yield from ((task, key) for key in _PLACES if key in task)
            if isinstance(task.get("join"), dict):
                yield from ((task["join"], key) for key in ("data", "subset") if key in task["join"])


def _is_inside(place: str) -> bool:
    plain = place.removeprefix("hf:")
    parts = plain.split("/")
    return (
        bool(plain)
        and plain.isprintable()
        and not plain.startswith(("/", "~"))
        and ".." not in parts
        and "\\" not in plain
        and "://" not in plain
        and not _DRIVE.match(plain)
    )
