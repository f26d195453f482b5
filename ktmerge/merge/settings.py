"""From what a recipe says about methods and parameters to pipelines of stages. Reads no checkpoint, loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

from pydantic import ValidationError

from ktmerge.errors import UsageError, collected, did_you_mean, located, refuse
from ktmerge.merge.registry import find_method, find_stage
from ktmerge.merge.stage import KINDS, Kind, Method, Parameters, Pipeline, Promises, Stage, Stages, StageUse
from ktmerge.recipes.load import FIXED_BLEND_KEYS, FIXED_RULE_KEYS, shown
from ktmerge.recipes.schema import Blend, Recipe, WhereRule

if TYPE_CHECKING:
    from ktmerge.checkpoints.classes import TensorClass

FLOAT_CLASSES: tuple[TensorClass, ...] = ("matrix", "embed", "vector", "conv")
_SPELLED_OUT = "stages"


@dataclass(frozen=True)
class Setting:
    """One way to blend: a method with its parameters resolved for every tensor class, and lambda."""

    method: Method
    pipelines: Mapping[TensorClass, Pipeline]
    lambda_: float

    def lambda_of(self, tensor_class: TensorClass) -> float:
        """Scale of the merged delta of tensors of one class."""
        if tensor_class in self.method.otherwise:
            return max(-1.0, min(1.0, self.lambda_))
        return self.lambda_

    def objections(self, weights: Mapping[str, float]) -> list[str]:
        """Why the method cannot take these experts."""
        least, most = self.method.experts
        count = len(weights)
        if count < least or (most is not None and count > most):
            wanted = self.method.takes
            return [f"method '{self.method.name}' takes {wanted} expert{'s' if wanted != '1' else ''}, not {count}."]
        found = []
        for pipeline in self.pipelines.values():
            for use in pipeline.uses:
                objection = use.stage.objection(use.parameters, dict(sorted(weights.items())))
                if objection:
                    found.append(f"{objection}.")
                if use.stage.last and (use is not pipeline.uses[-1] or self.lambda_ != 1):
                    name = use.stage.name
                    found.append(f"'{name}' comes last, at lambda 1; scale before it, with interpolate or lines.")
        return list(dict.fromkeys(found))


def blend_setting(blend: Blend) -> Setting:
    """What the blend section says for tensors that no rule changes.

    Raises:
        UsageError: everything that is wrong with it, one per line.
    """
    method = _method_of(blend)
    pipelines = _pipelines(method, blend.parameters, "blend", FIXED_BLEND_KEYS)
    return Setting(method, pipelines, method.lambda_ if blend.lambda_ is None else blend.lambda_)


def rule_setting(rule: WhereRule, where: str, blend: Blend, outer: Setting) -> Setting:
    """What a rule says for its tensors: the blend section's setting, changed where the rule says so.

    A rule with another method starts from that method's defaults; an explicit ``blend.lambda`` holds there too.

    Raises:
        UsageError: everything that is wrong with it, one per line.
    """
    method, inherited = outer.method, blend.parameters
    if rule.method is not None:
        with located(f"{where}.method"):
            method, inherited = find_method(rule.method), {}
    pipelines = _pipelines(method, {**inherited, **rule.parameters}, where, FIXED_RULE_KEYS)
    lambda_ = next((one for one in (rule.lambda_, blend.lambda_) if one is not None), method.lambda_)
    return Setting(method, pipelines, lambda_)


def weights_of(recipe: Recipe) -> dict[str, float]:
    """Weights of the experts by name."""
    return {name: expert.weight for name, expert in recipe.experts.items()}


def parameter_names(pipeline: Pipeline) -> set[str]:
    """Names of all parameters of a pipeline's stages."""
    return {name for use in pipeline.uses for name in type(use.parameters).model_fields}


def _method_of(blend: Blend) -> Method:
    if blend.method is not None:
        with located("blend.method"):
            return find_method(blend.method)
    stages = _spelled_out(blend.stages or {})
    rest = _without_maps(stages)
    return Method(
        name=_SPELLED_OUT,
        summary="stages spelled out in the recipe",
        source="",
        stages=stages,
        otherwise=rest,
        promises=Promises(neutral=None, identical="other"),
        semantics=2 if rest else 1,
    )


def _spelled_out(document: Mapping[str, Any]) -> Stages:
    """Read ``blend.stages``."""
    problems = [f"blend.stages: unknown key '{key}'.{did_you_mean(key, KINDS)}" for key in document if key not in KINDS]
    found: dict[str, Any] = {}
    for kind in KINDS:
        if kind not in document:
            continue
        entries = document[kind] if isinstance(document[kind], list) else [document[kind]]
        where = f"blend.stages.{kind}"
        if kind == "combine" and len(entries) != 1:
            problems.append(f"{where}: exactly one stage combines the deltas, not {len(entries)}.")
            continue
        with collected(problems):
            uses = tuple(
                _entry(entry, f"{where}[{i}]" if len(entries) > 1 else where) for i, entry in enumerate(entries)
            )
            found[kind] = uses[0] if kind == "combine" else uses
    refuse(problems)
    return Stages(**found)


def _without_maps(stages: Stages) -> dict[TensorClass, Stages]:
    """What becomes of other tensors than matrices: stages for linear maps are left out, a combine is the mean there."""
    rest: dict[str, Any] = {kind: tuple(use for use in stages.of(kind) if not _on_maps(use[0], kind)) for kind in KINDS}
    kept = Stages(**{**rest, "combine": rest["combine"][0] if rest["combine"] else ("mean", {})})
    return {} if kept == stages else dict.fromkeys(FLOAT_CLASSES[1:], kept)


def _on_maps(name: str, kind: Kind) -> bool:
    try:
        return find_stage(name, kind).on_maps
    except UsageError:  # told where the stages are put together
        return False


def _entry(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    """``trim``, ``{trim: {density: 0.2}}`` or ``{trim: null}``."""
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, Mapping) and len(entry) == 1:
        name, parameters = next(iter(entry.items()))
        if isinstance(name, str) and (parameters is None or isinstance(parameters, Mapping)):
            return name, dict(parameters or {})
    raise UsageError(f"{where}: write a stage's name, or its name and parameters, e.g. {{trim: {{density: 0.2}}}}.")


def _pipelines(
    method: Method, flat: Mapping[str, Any], where: str, fixed: Iterable[str]
) -> dict[TensorClass, Pipeline]:
    """The method's pipeline for each tensor class, parameters filled in from the flat keys beside ``method``."""
    variants = [(_draft(method, stages, where), classes) for stages, classes in _variants(method)]
    known = {name for draft, _ in variants for stage, _ in draft for name in stage.parameters.model_fields}
    owner = "no stage here has a" if method.name == _SPELLED_OUT else f"method '{method.name}' has no"
    problems = [
        f"{where}: {owner} parameter '{key}'.{did_you_mean(key, known | set(fixed))}"
        for key in flat
        if key not in known
    ]
    if method.name == _SPELLED_OUT:
        problems += _ambiguous(variants[0][0], flat, where)
    built: dict[TensorClass, Pipeline] = {}
    for draft, classes in variants:
        uses: list[StageUse] = []
        for stage, own in draft:
            given = own | {key: value for key, value in flat.items() if key in stage.parameters.model_fields}
            with collected(problems):
                uses.append(StageUse(stage, _validated(stage, given, where)))
        if len(uses) == len(draft):
            place = next(place for place, use in enumerate(uses) if use.stage.kind == "combine")
            pipeline = Pipeline(
                method.name, tuple(uses[:place]), uses[place], tuple(uses[place + 1 :]), method.semantics
            )
            built.update(dict.fromkeys(classes, pipeline))
    refuse(problems)
    return built


def _ambiguous(draft: Sequence[tuple[Stage, Any]], flat: Mapping[str, Any], where: str) -> Iterator[str]:
    for key in flat:
        owners = [stage.name for stage, _ in draft if key in stage.parameters.model_fields]
        if len(owners) > 1:
            yield f"{where}.{key}: could be meant for {' or '.join(owners)}; write it inside stages."


def _variants(method: Method) -> list[tuple[Stages, tuple[TensorClass, ...]]]:
    """Which stages work on which tensor classes."""
    proper = tuple(one for one in FLOAT_CLASSES if one not in method.otherwise)
    return [(method.stages, proper), *((stages, (one,)) for one, stages in method.otherwise.items())]


def _draft(method: Method, stages: Stages, where: str) -> list[tuple[Stage, dict[str, Any]]]:
    """The stages in order, each with the parameters the preset or the recipe gives it."""
    own = {stage.name: stage for stage in method.own}
    draft: list[tuple[Stage, dict[str, Any]]] = []
    for kind in KINDS:
        for name, parameters in stages.of(kind):
            with located(f"{where}.stages.{kind}" if method.name == _SPELLED_OUT else where):
                draft.append((own.get(name) or find_stage(name, kind), dict(parameters)))
    return draft


def _validated(stage: Stage, given: Mapping[str, Any], where: str) -> Parameters:
    try:
        return stage.parameters.model_validate(given)
    except ValidationError as error:
        raise UsageError("\n".join(_sentence(stage, problem, where) for problem in error.errors())) from None


def _sentence(stage: Stage, problem: Any, where: str) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else ""
    fields = stage.parameters.model_fields
    if problem["type"] == "extra_forbidden":
        return f"{where}: stage '{stage.name}' has no parameter '{name}'.{did_you_mean(name, fields)}"
    if problem["type"] == "missing":
        return f"{where}.{name}: '{stage.name}' needs it."
    return f"{where}.{name}: must be {_allowed(fields[name])}, not {shown(problem['input'])}."


_KINDS: dict[Any, str] = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def _kind(annotation: Any) -> str:
    """What values a type has, in words."""
    choices = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _kind(choices[0]) + _bounds(mark for one in choices[1:] for mark in getattr(one, "metadata", ()))
    if choices and all(isinstance(choice, str) for choice in choices):
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if get_origin(annotation) is list:
        return "a list, each " + _kind(choices[0])
    if get_origin(annotation) is dict:
        return f"{_kind(choices[1])} for each name"
    if choices:
        return " or ".join(_kind(choice) for choice in choices)
    return _KINDS.get(annotation, str(getattr(annotation, "__name__", annotation)))


def _allowed(field: Any) -> str:
    """The values a field takes, in words: ``one of tensor, global``; ``a number of at least 0 and at most 1``."""
    words = _kind(field.annotation)
    if words.startswith("one of"):
        return words
    if any(getattr(mark, "min_length", 0) for mark in field.metadata):
        return words.replace("a list", "a list of one or more", 1)
    return words + _bounds(field.metadata)


def _bounds(marks: Iterable[Any]) -> str:
    """`` of at least 0 and at most 1``, or nothing."""
    names = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = [f"{word} {getattr(mark, key):g}" for mark in marks for key, word in names.items() if hasattr(mark, key)]
    return (" of " if found and found[0].startswith("at") else " " if found else "") + " and ".join(found)
