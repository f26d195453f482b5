"""The commands by which whoever has a bundle makes its model."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping

from ktmerge.recipes.overrides import key_of
from ktmerge.recipes.schema import Recipe
from ktmerge.sharing import contents
from ktmerge.sharing.manifest import Input


def blend_command(inputs: Mapping[str, Input], recipe: Recipe, folder: str) -> str:
    """The command that blends; models that are on no hub stand in it as names in capitals.

    Args:
        inputs: by ``base`` or expert.
        recipe: of the bundle.
        folder: where the bundle was unpacked; empty: here.
    """
    words = ["ktmerge", "blend", "-r", _below(folder, contents.RECIPE)]
    capitals = _capitals(inputs)
    given = {name: _given(capitals[name], one.model) for name, one in inputs.items()}
    if given["base"] != inputs["base"].model:
        words += ["--base", given["base"]]
    experts = {name: model for name, model in given.items() if name != "base"}
    measured = [name for name in inputs if recipe.statistics_of(name) is not None]
    if any(model != inputs[name].model for name, model in experts.items()):
        if any(
            name in experts for name in measured
        ):  # --expert would lose them, and what is set is the recipe's to find
            for name, model in experts.items():
                words += ["--set", f"{key_of('experts', name, 'model')}={_anywhere(model, inputs[name].model)}"]
        else:  # --expert replaces all of them, weights included
            for name, model in experts.items():
                words += ["--expert", f"{name}={model}:{recipe.experts[name].weight!r}"]
    for name in measured:
        key = "statistics" if name == "base" else key_of("experts", name, "statistics")
        words += ["--set", f"{key}=/PATH/{capitals[name]}_STATISTICS"]
    return shlex.join([*words, "--lock", _below(folder, contents.LOCK), "--out", "blended"])


def _capitals(names: Iterable[str]) -> dict[str, str]:
    """What stands for each model; two that differ by case only are told apart by number."""
    found: dict[str, str] = {}
    for name in names:
        upper = name.upper()
        found[name] = upper if upper not in found.values() else f"{upper}_{len(found)}"
    return found


def _anywhere(given: str, model: str) -> str:
    """Folders to be named in full: the recipe would look for others beside itself."""
    parts = zip(given.split("+"), model.split("+"), strict=True)
    return "+".join(one if one == before else f"/PATH/{one}" for one, before in parts)


def apply_command(folder: str) -> str:
    """The command that makes the blended model from the base and the bundle's delta."""
    return shlex.join(["ktmerge", "delta", "apply", "BASE", _below(folder, contents.DELTA), "--out", "blended"])


def _given(capitals: str, model: str) -> str:
    return "+".join(_part(capitals, part) for part in model.split("+"))


def _part(capitals: str, part: str) -> str:
    if not part.startswith("./"):
        return part
    return f"{capitals}{'_ADAPTER' if '.adapter-' in part else ''}"


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
