"""mergekit's YAML to a ktmerge recipe, and what the same words mean differently there. Loads no torch, no mergekit.

Understood: ``models``, or a slice of all their layers, with ``base_model``; parameters as one value, as filters over
tensor names, as gradients over layers, where a recipe can say the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.parts import Parts
from ktmerge.errors import UsageError
from ktmerge.merge.gradients import ParameterSetting, where_rules
from ktmerge.merge.mergekit_file import NO_MEANING, WHERE, Merge, read_merge
from ktmerge.recipes.document import parse_yaml

_DTYPES = ("float32", "bfloat16", "float16")

_ALWAYS = (
    "ktmerge computes in float32 and rounds once, whatever dtype says; mergekit computes in dtype.",
    "buffers and integer tensors are the base's; files beside the weights are the base's.",
)
_TRIM = "among equal magnitudes mergekit's trim keeps an arbitrary choice; ktmerge's goes by a keyed hash."
_DARE = (
    "the random choice is another: mergekit draws one stream in file order, ktmerge by seed, expert, tensor, element.",
    "mergekit drops in every tensor; ktmerge's dare leaves norms, biases and embeddings whole.",
)


def import_mergekit(text: str) -> tuple[dict[str, Any], list[str]]:
    """Translate a mergekit file.

    Args:
        text: the YAML.

    Returns:
        the recipe as plain data, and one sentence for each way in which its result will differ from mergekit's.

    Raises:
        UsageError: it is not a mergekit file, or says something that a recipe cannot say.
    """
    document = parse_yaml(text, WHERE)
    merge = read_merge(document)
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
            raise UsageError(f"{WHERE}: dtype {dtype} cannot be written; use one of {', '.join(_DTYPES)}.")
        recipe["output"] = {"dtype": dtype}
    return recipe, [*differences, *_layers_left(merge), *_ALWAYS]


def _layers_left(merge: Merge) -> list[str]:
    """A slice has to take all layers that the base has, which shows where the base is here."""
    if merge.layers is None:
        return []
    base = Path(merge.base)
    if not base.is_dir():
        return [f"its slice of {merge.layers} layers is taken for all of the base's, which is no folder here."]
    count = Parts(Checkpoint.open(base)).layers.get("llm")
    if count != merge.layers:
        raise UsageError(
            f"{WHERE}: its slice takes {merge.layers} layers, and {base} has {count}; none can be left out."
        )
    return []


_Translation = tuple[dict[str, Any], dict[str, ParameterSetting], list[float], list[str]]
"""Blend section, parameters that may vary over tensors, weights of the experts, differences."""


def _linear(merge: Merge) -> _Translation:
    """A weighted mean of models is a weighted mean of deltas; a base among the models only shortens the delta."""
    weights = merge.weights()
    own = 0.0
    if merge.base_settings is not None:
        setting = merge.base_settings.get("weight", merge.shared.get("weight", ParameterSetting.constant(1.0)))
        own = float(setting.value_or_refuse("base: weight"))
    total = sum(weights) + own
    if not merge.flag("normalize", True) and abs(total - 1) > 1e-9:
        raise UsageError(
            f"{WHERE}: linear without normalize and weights that sum to {total:g} rescales the whole model."
        )
    if sum(weights) == 0 or total == 0:
        raise UsageError(f"{WHERE}: the weights sum to 0.")
    return {"method": "linear"}, {"lambda": ParameterSetting.constant(sum(weights) / total)}, weights, []


def _task_arithmetic(merge: Merge) -> _Translation:
    mean = merge.flag("normalize", False)
    lambda_ = merge.scale
    settings = merge.per_model("weight")
    if len(settings) == 1 and not settings[0].is_constant and not mean:
        # With one expert its weight is nothing but lambda, and lambda may vary from tensor to tensor.
        return {"method": "task_arithmetic"}, {"lambda": settings[0].times(lambda_, "weight")}, [1.0], []
    return {"method": "linear" if mean else "task_arithmetic"}, {"lambda": lambda_}, merge.weights(), []


def _ties(merge: Merge) -> _Translation:
    density = _same(merge.per_model("density", 1.0))
    if density is None or merge.flag("rescale", False):
        return _foreign(merge)
    elected, lambda_, weights = _election(merge, True)
    return {"method": "ties", **elected}, {"density": density, "lambda": lambda_}, weights, [_TRIM]


def _dare(merge: Merge) -> _Translation:
    density = _same(merge.per_model("density", 1.0))
    if density is None:
        return _foreign(merge)
    rescale = "l1" if merge.flag("rescale", True) else "none"
    if merge.method == "dare_ties":
        elected, lambda_, weights = _election(merge, False)
        blend = {"method": "dare_ties", "rescale": rescale, **elected}
        return blend, {"density": density, "lambda": lambda_}, weights, list(_DARE)
    lambda_, weights = merge.scale, merge.weights()
    if merge.flag("normalize", False):
        lambda_ = ParameterSetting.constant(1 / sum(weights)).times(lambda_, "lambda")
    return {"method": "dare", "rescale": rescale}, {"density": density, "lambda": lambda_}, weights, list(_DARE)


def _election(merge: Merge, normalize: bool) -> tuple[dict[str, Any], ParameterSetting, list[float]]:
    """Sign election as mergekit does it: on weighted deltas, an even vote is plus."""
    weights = merge.weights()
    lambda_ = merge.scale
    if min(weights) < 0 or max(weights) <= 0:
        raise UsageError(f"{WHERE}: negative weights turn votes around in {merge.method}; use task_arithmetic.")
    if merge.flag("normalize", normalize):
        return {"aggregate": "wmean", "tie": "plus"}, lambda_, weights
    # Here weights count relative to the largest, there as they are.
    return (
        {"aggregate": "sum", "tie": "plus"},
        ParameterSetting.constant(max(weights)).times(lambda_, "lambda"),
        weights,
    )


def _foreign(merge: Merge) -> _Translation:
    """Let mergekit's own code run."""
    blend: dict[str, Any] = {"method": f"mergekit:{merge.method}"}
    varying: dict[str, ParameterSetting] = {}
    for key, setting in merge.shared.items():
        if key not in (*NO_MEANING, "weight"):
            varying[key] = setting
    for key in dict.fromkeys(key for model in merge.models for key in model.settings):
        if key == "weight" or key in NO_MEANING:
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
    told = [f"{merge.method} runs in mergekit itself, on one tensor at a time, seeded by ktmerge."]
    return blend, varying, weights, told


def _same(settings: Sequence[ParameterSetting]) -> ParameterSetting | None:
    return settings[0] if all(setting == settings[0] for setting in settings) else None
