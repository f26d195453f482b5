"""The commands by which whoever has a bundle makes its model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

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
    given = {name: _given(name, one.model) for name, one in inputs.items()}
    words = ["ktmerge", "blend", "-r", _below(folder, contents.RECIPE)]
    if given["base"] != inputs["base"].model:
        words += ["--base", given["base"]]
    experts = {name: model for name, model in given.items() if name != "base"}
    if any(model != inputs[name].model for name, model in experts.items()):
        if any(expert.statistics is not None for expert in recipe.experts.values()):
            for name, model in experts.items():
                words += ["--set", f"{key_of('experts', name, 'model')}={model}"]
        else:  # --expert replaces all of them, weights included
            for name, model in experts.items():
                words += ["--expert", f"{name}={model}:{recipe.experts[name].weight!r}"]
    return shlex.join([*words, "--lock", _below(folder, contents.LOCK), "--out", "blended"])


def apply_command(folder: str) -> str:
    """The command that makes the blended model from the base and the bundle's delta."""
    return shlex.join(["ktmerge", "delta", "apply", "BASE", _below(folder, contents.DELTA), "--out", "blended"])


def _given(name: str, model: str) -> str:
    return "+".join(_part(name, part) for part in model.split("+"))


def _part(name: str, part: str) -> str:
    if not part.startswith("./"):
        return part
    return f"{name.upper()}{'_ADAPTER' if '.adapter-' in part else ''}"


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
