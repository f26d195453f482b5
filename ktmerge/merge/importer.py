"""mergekit's YAML to a ktmerge recipe, and what the same words mean differently there. Loads no torch, no mergekit.

Understood: ``models`` with ``base_model``; parameters as one value, as filters over tensor names, as gradients over
layers, where a recipe can say the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmerge.errors import UsageError, did_you_mean
from ktmerge.merge.gradients import Setting, read_setting, where_rules
from ktmerge.recipes.document import parse_yaml

_WHERE = "mergekit file"
_KEYS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "name", "tokenizer_source")
_REFUSED = {
    "slices": "layers cannot be stacked or left out: the output has the base's architecture",
    "modules": "write one recipe with where rules by part (vision, connector, llm) instead",
    "tokenizer": "the base's tokenizer is carried as it is; grow the vocabulary of the base before tuning",
    "chat_template": "the base's chat template is carried as it is",
}
_DTYPES = ("float32", "bfloat16", "float16")
_NO_MEANING = ("int8_mask",)
"""Parameters that change how mergekit computes, not what."""

_ALWAYS = (
    "ktmerge computes in float32 and rounds once, whatever dtype says; mergekit computes in dtype.",
    "buffers and integer tensors are the base's; files beside the weights are the base's.",
)
_TRIM = "among equal magnitudes mergekit's trim keeps an arbitrary choice; ktmerge's goes by a keyed hash."
_DARE = (
    "the random choice is another: mergekit draws one stream in file order, ktmerge by seed, expert, tensor, element.",
    "mergekit drops in every tensor; ktmerge's dare leaves norms, biases and embeddings whole.",
)


@dataclass(frozen=True)
class _Model:
    name: str
    reference: str
    settings: Mapping[str, Setting]


@dataclass
class _Merge:
    """A mergekit document, read."""

    method: str
    base: str
    models: list[_Model]
    base_settings: Mapping[str, Setting] | None
    shared: Mapping[str, Setting]

    def per_model(self, key: str, default: float | None = None) -> list[Setting]:
        """A parameter of every model, from the model, else from the document, else the default."""
        found = []
        for model in self.models:
            setting = model.settings.get(key, self.shared.get(key))
            if setting is None and default is None:
                raise UsageError(f"{_WHERE}: {self.method} needs {key} for {model.reference}.")
            found.append(setting if setting is not None else Setting.constant(default))
        return found

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


def import_mergekit(text: str) -> tuple[dict[str, Any], list[str]]:
    """Translate a mergekit file.

    Args:
        text: the YAML.

    Returns:
        the recipe as plain data, and one sentence for each way in which its result will differ from mergekit's.

    Raises:
        UsageError: it is not a mergekit file, or says something that a recipe cannot say.
    """
    document = parse_yaml(text, _WHERE)
    merge = _read(document)
    translate = {
        "linear": _linear,
        "task_arithmetic": _task_arithmetic,
        "ties": _ties,
        "dare_linear": _dare,
        "dare_ties": _dare,
    }.get(merge.method, _foreign)
    blend, varying, weights, differences = translate(merge)
    rules, defaults = where_rules(varying, Path(merge.base))
    recipe: dict[str, Any] = {
        "ktmerge": 1,
        "name": re.sub(r"[^A-Za-z0-9_.-]+", "-", str(document.get("name", merge.method))),
        "description": f"imported from a mergekit file ({merge.method})",
        "base": merge.base,
        "experts": {m.name: {"model": m.reference, "weight": w} for m, w in zip(merge.models, weights, strict=True)},
        "blend": {**blend, **defaults, **({"where": rules} if rules else {})},
    }
    dtype = document.get("out_dtype") or document.get("dtype")
    if dtype is not None:
        if dtype not in _DTYPES:
            raise UsageError(f"{_WHERE}: dtype {dtype} cannot be written; use one of {', '.join(_DTYPES)}.")
        recipe["output"] = {"dtype": dtype}
    return recipe, [*differences, *_ALWAYS]


_Translation = tuple[dict[str, Any], dict[str, Setting], list[float], list[str]]
"""Blend section, parameters that may vary over tensors, weights of the experts, differences."""


def _linear(merge: _Merge) -> _Translation:
    """A weighted mean of models is a weighted mean of deltas; a base among the models only shortens the delta."""
    weights = merge.weights()
    own = 0.0
    if merge.base_settings is not None:
        setting = merge.base_settings.get("weight", merge.shared.get("weight", Setting.constant(1.0)))
        own = float(setting.value_or_refuse("base: weight"))
    total = sum(weights) + own
    if not merge.flag("normalize", True) and abs(total - 1) > 1e-9:
        raise UsageError(
            f"{_WHERE}: linear without normalize and weights that sum to {total:g} rescales the whole model."
        )
    if sum(weights) == 0 or total == 0:
        raise UsageError(f"{_WHERE}: the weights sum to 0.")
    return {"method": "linear"}, {"lambda": Setting.constant(sum(weights) / total)}, weights, []


def _task_arithmetic(merge: _Merge) -> _Translation:
    mean = merge.flag("normalize", False)
    lambda_ = merge.shared.get("lambda", Setting.constant(1.0))
    settings = merge.per_model("weight")
    if len(settings) == 1 and not settings[0].is_constant and not mean:
        # With one expert its weight is nothing but lambda, and lambda may vary from tensor to tensor.
        return {"method": "task_arithmetic"}, {"lambda": settings[0].times(lambda_, "weight")}, [1.0], []
    return {"method": "linear" if mean else "task_arithmetic"}, {"lambda": lambda_}, merge.weights(), []


def _ties(merge: _Merge) -> _Translation:
    density = _same(merge.per_model("density", 1.0))
    if density is None or merge.flag("rescale", False):
        return _foreign(merge)
    elected, lambda_, weights = _election(merge, True)
    return {"method": "ties", **elected}, {"density": density, "lambda": lambda_}, weights, [_TRIM]


def _dare(merge: _Merge) -> _Translation:
    density = _same(merge.per_model("density", 1.0))
    if density is None:
        return _foreign(merge)
    rescale = "l1" if merge.flag("rescale", True) else "none"
    if merge.method == "dare_ties":
        elected, lambda_, weights = _election(merge, False)
        blend = {"method": "dare_ties", "rescale": rescale, **elected}
        return blend, {"density": density, "lambda": lambda_}, weights, list(_DARE)
    lambda_, weights = merge.shared.get("lambda", Setting.constant(1.0)), merge.weights()
    if merge.flag("normalize", False):
        lambda_ = Setting.constant(1 / sum(weights)).times(lambda_, "lambda")
    return {"method": "dare", "rescale": rescale}, {"density": density, "lambda": lambda_}, weights, list(_DARE)


def _election(merge: _Merge, normalize: bool) -> tuple[dict[str, Any], Setting, list[float]]:
    """Sign election as mergekit does it: on weighted deltas, an even vote is plus."""
    weights = merge.weights()
    lambda_ = merge.shared.get("lambda", Setting.constant(1.0))
    if min(weights) < 0 or max(weights) <= 0:
        raise UsageError(f"{_WHERE}: negative weights turn votes around in {merge.method}; use task_arithmetic.")
    if merge.flag("normalize", normalize):
        return {"aggregate": "wmean", "tie": "plus"}, lambda_, weights
    # Here weights count relative to the largest, there as they are.
    return {"aggregate": "sum", "tie": "plus"}, Setting.constant(max(weights)).times(lambda_, "lambda"), weights


def _foreign(merge: _Merge) -> _Translation:
    """Let mergekit's own code run."""
    blend: dict[str, Any] = {"method": f"mergekit:{merge.method}"}
    varying: dict[str, Setting] = {}
    for key, setting in merge.shared.items():
        if key not in (*_NO_MEANING, "weight"):
            varying[key] = setting
    for key in dict.fromkeys(key for model in merge.models for key in model.settings):
        if key == "weight" or key in _NO_MEANING:
            continue
        settings = merge.per_model(key)
        same = _same(settings)
        if same is not None:
            varying[key] = same
        else:
            varying.pop(key, None)
            blend[key] = {
                m.name: s.value_or_refuse(f"{m.reference}: {key}") for m, s in zip(merge.models, settings, strict=True)
            }
    given = any("weight" in one for one in (merge.shared, *(model.settings for model in merge.models)))
    weights = merge.weights() if given else [1.0] * len(merge.models)
    return (
        blend,
        varying,
        weights,
        [f"{merge.method} runs in mergekit itself, on one tensor at a time, seeded by ktmerge."],
    )


def _same(settings: Sequence[Setting]) -> Setting | None:
    return settings[0] if all(setting == settings[0] for setting in settings) else None


def _read(document: Any) -> _Merge:
    """Check the document's outline and collect its models.

    Raises:
        UsageError: see `import_mergekit`.
    """
    if not isinstance(document, dict) or not isinstance(document.get("merge_method"), str):
        raise UsageError(f"{_WHERE}: has no merge_method; is it a mergekit file?")
    for key in document:
        if key in _REFUSED:
            raise UsageError(f"{_WHERE}: '{key}' cannot be said in a recipe: {_REFUSED[key]}.")
        if key not in _KEYS:
            raise UsageError(f"{_WHERE}: unknown key '{key}'.{did_you_mean(str(key), _KEYS)}")
    if document.get("tokenizer_source") not in (None, "base"):
        raise UsageError(f"{_WHERE}: 'tokenizer_source' cannot be said in a recipe: {_REFUSED['tokenizer']}.")
    entries = document.get("models")
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{_WHERE}: has no models.")
    listed = [_entry(entry, f"models[{index}]") for index, entry in enumerate(entries)]
    method = document["merge_method"]
    base = _reference(document["base_model"], "base_model") if document.get("base_model") is not None else None
    if base is None and method != "linear":
        raise UsageError(f"{_WHERE}: {method} without base_model cannot be said in a recipe; name the base.")
    base = base if base is not None else listed[0][0]
    shared = _settings(document.get("parameters"), "parameters")
    own = next((settings for reference, settings in listed if reference == base), None)
    others = [(reference, settings) for reference, settings in listed if reference != base]
    if method == "karcher":  # has no use for a base: a model listed there is one of the equals
        others = listed
    if not others:
        raise UsageError(f"{_WHERE}: names no model besides the base.")
    names = _names([reference for reference, _ in others])
    models = [_Model(name, *other) for name, other in zip(names, others, strict=True)]
    return _Merge(method, base, models, own, shared)


def _entry(entry: Any, where: str) -> tuple[str, Mapping[str, Setting]]:
    if not isinstance(entry, dict) or "model" not in entry:
        raise UsageError(f"{_WHERE}: {where} names no model.")
    unknown = next((key for key in entry if key not in ("model", "parameters")), None)
    if unknown is not None:
        raise UsageError(f"{_WHERE}: {where}: unknown key '{unknown}'.{did_you_mean(unknown, ('model', 'parameters'))}")
    return _reference(entry["model"], f"{where}.model"), _settings(entry.get("parameters"), f"{where}.parameters")


def _settings(document: Any, where: str) -> Mapping[str, Setting]:
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UsageError(f"{_WHERE}: {where} is not a mapping of parameters.")
    return {
        str(key): read_setting(value, f"{where}.{key}") for key, value in document.items() if key not in _NO_MEANING
    }


def _reference(reference: Any, where: str) -> str:
    if isinstance(reference, dict) and isinstance(reference.get("model"), str) and len(reference) == 1:
        reference = reference["model"]
    if not isinstance(reference, str):
        raise UsageError(
            f"{_WHERE}: {where}: write a folder or hub id, an adapter as 'model+adapter'; overrides cannot be said."
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
