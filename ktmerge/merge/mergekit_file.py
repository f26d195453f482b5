"""What a mergekit YAML file says: its models, the base among them, and their parameters. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmerge.errors import UsageError, did_you_mean
from ktmerge.merge.gradients import ParameterSetting, read_setting

WHERE = "mergekit file"
_KEYS = (
    "merge_method",
    "models",
    "slices",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "name",
    "tokenizer_source",
)
_REFUSED = {
    "modules": "write one recipe with where rules by part (vision, connector, llm) instead",
    "tokenizer": "the base's tokenizer is carried as it is; grow the vocabulary of the base before tuning",
    "chat_template": "the base's chat template is carried as it is",
}
NO_MEANING = ("int8_mask",)
"""Parameters that change how mergekit computes, not what."""


@dataclass(frozen=True)
class Model:
    """One of the models that are merged, by the name of its expert, with its own parameters."""

    name: str
    reference: str
    settings: Mapping[str, ParameterSetting]


@dataclass
class Merge:
    """A mergekit document, read."""

    method: str
    base: str
    models: list[Model]
    base_settings: Mapping[str, ParameterSetting] | None
    shared: Mapping[str, ParameterSetting]
    layers: int | None = None
    """How many a slice takes that takes all; None: the file has no slices."""

    def per_model(self, key: str, default: float | None = None) -> list[ParameterSetting]:
        """A parameter of every model, from the model, else from the document, else the default."""
        found = []
        for model in self.models:
            setting = model.settings.get(key, self.shared.get(key))
            if setting is None and default is None:
                raise UsageError(f"{WHERE}: {self.method} needs {key} for {model.reference}.")
            found.append(setting if setting is not None else ParameterSetting.constant(default))
        return found

    @property
    def scale(self) -> ParameterSetting:
        """Lambda, 1 if it is not given."""
        return self.shared.get("lambda", ParameterSetting.constant(1.0))

    def flag(self, key: str, default: bool) -> bool:
        """A shared yes or no."""
        setting = self.shared.get(key)
        value = default if setting is None else setting.value_or_refuse(f"parameters.{key}")
        return bool(value)

    def weights(self) -> list[float]:
        """One number per model.

        Raises:
            UsageError: a weight varies over layers or tensors, which a recipe can only say as lambda of one expert.
        """
        settings = self.per_model("weight", 1.0 if self.method == "linear" else None)
        return [float(s.value_or_refuse(f"{m.reference}: weight")) for m, s in zip(self.models, settings, strict=True)]


def read_merge(document: Any) -> Merge:
    """Check the document's outline and collect its models.

    Raises:
        UsageError: it is not a mergekit file, or says something that a recipe cannot say.
    """
    if not isinstance(document, dict) or not isinstance(document.get("merge_method"), str):
        raise UsageError(f"{WHERE}: has no merge_method; is it a mergekit file?")
    for key in document:
        if key in _REFUSED:
            raise UsageError(f"{WHERE}: '{key}' cannot be said in a recipe: {_REFUSED[key]}.")
        if key not in _KEYS:
            raise UsageError(f"{WHERE}: unknown key '{key}'.{did_you_mean(str(key), _KEYS)}")
    if document.get("tokenizer_source") not in (None, "base"):
        raise UsageError(f"{WHERE}: 'tokenizer_source' cannot be said in a recipe: {_REFUSED['tokenizer']}.")
    entries, layers = document.get("models"), None
    if "slices" in document:
        entries, layers = _whole_slice([] if "models" in document else document["slices"])
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{WHERE}: has no models.")
    listed = [_entry(entry, f"models[{index}]") for index, entry in enumerate(entries)]
    method = document["merge_method"]
    base = _reference(document["base_model"], "base_model") if document.get("base_model") is not None else None
    if base is None and method != "linear":
        raise UsageError(f"{WHERE}: {method} without base_model cannot be said in a recipe; name the base.")
    base = base if base is not None else listed[0][0]
    shared = _settings(document.get("parameters"), "parameters")
    own = next((settings for reference, settings in listed if reference == base), None)
    others = [(reference, settings) for reference, settings in listed if reference != base]
    if method == "karcher":  # has no use for a base: a model listed there is one of the equals
        others = listed
    if not others:
        raise UsageError(f"{WHERE}: names no model besides the base.")
    names = _names([reference for reference, _ in others])
    models = [Model(name, *other) for name, other in zip(names, others, strict=True)]
    return Merge(method, base, models, own, shared, layers)


def _whole_slice(slices: Any) -> tuple[list[Any], int]:
    """The models of the one slice that takes the same layers of all of them, from the first on, and how many."""
    refused = UsageError(
        f"{WHERE}: 'slices' cannot be said in a recipe, but for one that takes all layers of every model: layers "
        "cannot be stacked or left out, as the output has the base's architecture."
    )
    one = slices[0] if isinstance(slices, list) and len(slices) == 1 else None
    sources = one.get("sources") if isinstance(one, dict) and set(one) == {"sources"} else None
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        raise refused
    ranges = [source.get("layer_range") for source in sources]
    first = ranges[0] if ranges else None
    whole = isinstance(first, list) and len(first) == 2 and first[0] == 0 and type(first[1]) is int
    if not whole or any(other != first for other in ranges):
        raise refused
    assert isinstance(first, list)
    return [{key: value for key, value in source.items() if key != "layer_range"} for source in sources], first[1]


def _entry(entry: Any, where: str) -> tuple[str, Mapping[str, ParameterSetting]]:
    if not isinstance(entry, dict) or "model" not in entry:
        raise UsageError(f"{WHERE}: {where} names no model.")
    unknown = next((key for key in entry if key not in ("model", "parameters")), None)
    if unknown is not None:
        raise UsageError(f"{WHERE}: {where}: unknown key '{unknown}'.{did_you_mean(unknown, ('model', 'parameters'))}")
    return _reference(entry["model"], f"{where}.model"), _settings(entry.get("parameters"), f"{where}.parameters")


def _settings(document: Any, where: str) -> Mapping[str, ParameterSetting]:
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UsageError(f"{WHERE}: {where} is not a mapping of parameters.")
    return {str(key): read_setting(value, f"{where}.{key}") for key, value in document.items() if key not in NO_MEANING}


def _reference(reference: Any, where: str) -> str:
    if isinstance(reference, dict) and isinstance(reference.get("model"), str) and len(reference) == 1:
        reference = reference["model"]
    if not isinstance(reference, str):
        raise UsageError(
            f"{WHERE}: {where}: write a folder or hub id, an adapter as 'model+adapter'; overrides cannot be said."
        )
    return reference


def _names(references: Sequence[str]) -> list[str]:
    """Short, unique expert names from folders or hub ids."""
    found: list[str] = []
    for reference in references:
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(reference.partition("@")[0]).name).lstrip("-._") or "expert"
        stem = f"{stem}-model" if stem == "base" else stem
        name, number = stem, 2
        while name in found:
            name, number = f"{stem}-{number}", number + 1
        found.append(name)
    return found
