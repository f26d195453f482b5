"""``mergekit:<name>``: any method of mergekit's tensor interface as a combine stage; imported when one is named."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cache
from typing import Any, Union

from pydantic import Field, create_model

from ktmerge.errors import KtmergeError, UsageError, did_you_mean
from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.registry import provider
from ktmerge.merge.stage import Context, Method, Parameters, Promises, Stage, Stages, Tensor

# What the recipe says elsewhere: experts.<name>.weight, and lambda, which ktmerge applies to the merged delta itself.
_GIVEN = ("weight", "lambda")
_BASE = "base"
# mergekit draws from torch's one generator, which tensors made at the same time would share.
_GENERATOR = threading.Lock()


@provider("mergekit")
@cache
def mergekit_method(name: str) -> Method:
    """The method of that name in mergekit's registry, with mergekit's own parameters.

    Raises:
        UsageError: mergekit has no such method.
    """
    from mergekit.merge_methods import registry

    known = {found.spec.name: found for found in registry.registered_methods()}
    if name not in known:
        raise UsageError(f"mergekit has no method '{name}'.{did_you_mean(name, known)}")
    theirs = known[name]
    own = Stage(
        name=f"mergekit:{name}",
        kind="combine",
        parameters=_parameters(theirs.spec),
        apply=_apply(theirs),
        reach="tensor",
        objection=lambda parameters, weights: _objection(theirs, parameters, weights),
    )
    title = theirs.spec.pretty_name or name
    return Method(
        name=own.name,
        summary=f"{title} as mergekit computes it, on every floating-point tensor.",
        source=theirs.spec.reference_url or "mergekit",
        stages=Stages(combine=(own.name, {})),
        own=(own,),
        promises=Promises(neutral=None, identical="other", scale=False, sign=False, elements=False),
    )


def _parameters(spec: Any) -> type[Parameters]:
    """mergekit's parameters as a model: shared ones as they are, per-model ones as one value or one for each expert."""
    fields: dict[str, Any] = {}
    for parameter in spec.parameters:
        if parameter.name in _GIVEN:
            continue
        kind: Any = parameter.value_type
        if parameter.scope.value != "shared":
            kind = Union[kind, dict[str, kind]]  # noqa: UP007 (a type in a variable, not an annotation)
        default = ... if parameter.required else parameter.default
        fields[parameter.name] = (kind, Field(default, description=parameter.description))
    return create_model(f"mergekit_{spec.name}", __base__=Parameters, **fields)


def _takes_base(theirs: Any) -> bool:
    return theirs.spec.contract.base.value in ("required", "optional")


def _objection(theirs: Any, parameters: Parameters, weights: Mapping[str, float]) -> str | None:
    """What mergekit itself says against these models, and values for experts that are not there."""
    base = _BASE if _takes_base(theirs) else None
    try:
        theirs.validate_inputs([*([base] if base else []), *weights], base)
    except ValueError as error:
        return f"mergekit: {error} ({len(weights)} experts{' and the base' if base else ''} given)"
    for key in type(parameters).model_fields:
        value = getattr(parameters, key)
        if isinstance(value, dict) and value.keys() != weights.keys():
            return f"{key}: give one value, or one for each expert ({', '.join(weights)})"
    return None


def _apply(theirs: Any) -> Any:
    def combine(deltas: list[Tensor], parameters: Parameters, context: Context) -> Tensor:
        """A method of mergekit on the whole tensor; the result is taken as a delta from the base."""
        return _merge(theirs, deltas, parameters, context)

    return combine


def _merge(theirs: Any, deltas: list[Tensor], parameters: Parameters, context: Context) -> Tensor:
    import torch
    from mergekit.merge_methods.api import merge_tensors

    tensors = [context.base + delta for delta in deltas]
    ids = list(context.experts)
    if _takes_base(theirs):
        tensors.insert(0, context.base)
        ids.insert(0, _BASE)
    with _GENERATOR, torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(stream_key(context.seed, theirs.spec.name, "", context.tensor))
        try:
            merged: Tensor = merge_tensors(
                tensors,
                theirs,
                parameters=_values(theirs.spec, parameters, context),
                ids=ids,
                base_index=0 if _takes_base(theirs) else None,
                name=context.tensor,
                dtype=torch.float32,
            )
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            raise KtmergeError(f"mergekit:{theirs.spec.name} failed on '{context.tensor}': {error}") from error
    return merged - context.base


def _values(spec: Any, parameters: Parameters, context: Context) -> dict[str, Any]:
    values = {key: getattr(parameters, key) for key in type(parameters).model_fields}
    names = {parameter.name for parameter in spec.parameters}
    if "weight" in names:
        values["weight"] = dict(zip(context.experts, context.weights, strict=True))
    return values
