"""What a recipe will do, in plain words, part by part. Reads headers where models are there; loads no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ktmerge.errors import printable
from ktmerge.merge.plan import Plan, TensorPlan
from ktmerge.merge.planning import plan_here
from ktmerge.merge.sections import check_recipe
from ktmerge.merge.settings import FLOAT_CLASSES, Setting, blend_setting, rule_setting
from ktmerge.merge.stage import Pipeline, StageUse
from ktmerge.recipes.load import suite_of
from ktmerge.recipes.schema import Recipe, WhereRule

_SOURCE = re.compile(r"\s*\((?:[^()]*?(?:arXiv|ACL|eq\.|section|Shoemake|Karcher|CGM)[^()]*)\)")
_CLASSES = {
    "matrix": "linear maps",
    "embed": "embeddings and heads",
    "vector": "norms and biases",
    "conv": "convolutions",
    "buffer": "integer tensors",
}
_KINDS = {
    "transform": "each expert's change by itself",
    "combine": "all changes together",
    "calibrate": "then the merged change",
    "guard": "then the merged change",
    "scale": "then the merged change",
}


@dataclass(frozen=True)
class Explanation:
    """Paragraphs under headings; a paragraph is a list of lines."""

    name: str
    sections: tuple[tuple[str, tuple[str, ...]], ...]

    def text(self) -> str:
        """As Markdown."""
        parts = [f"# {self.name}"]
        for heading, lines in self.sections:
            parts += [f"## {heading}", "\n".join(f"* {printable(' '.join(line.split()))}" for line in lines)]
        return "\n\n".join(parts) + "\n"

    def to_json(self) -> dict[str, object]:
        return {"recipe": self.name, "sections": {heading: list(lines) for heading, lines in self.sections}}


def explain(recipe: Recipe) -> Explanation:
    """Say what every section of a recipe comes to.

    Raises:
        UsageError: the recipe is wrong in a way that shows without its models.
    """
    check_recipe(recipe)
    plan = plan_here(recipe)  # without models that are here, what the recipe says can still be told
    sections = [
        ("What it is for", [recipe.description] if recipe.description else []),
        ("How the experts are made", list(_tuning(recipe))),
        ("What goes in", list(_inputs(recipe, plan))),
        ("What happens to each part", list(_parts(recipe, plan))),
        ("What comes out", list(_output(recipe, plan))),
        ("What is scored", list(_scoring(recipe))),
    ]
    return Explanation(recipe.name, tuple((heading, tuple(lines)) for heading, lines in sections if lines))


def _tuning(recipe: Recipe) -> Iterator[str]:
    for name, job in recipe.finetune.experts.items() if recipe.finetune else ():
        length = f"{job.max_steps} steps" if job.max_steps else f"{job.epochs:g} epoch{'s' if job.epochs != 1 else ''}"
        trained = "all of the base" if job.train == "full" else f"'{job.train}' of the base"
        if job.adapter is not None:
            trained = f"a {job.adapter.name} adapter at '{job.adapted_part}' of the base"
        selected = "" if job.select == "none" else f", where the elements chosen by '{job.select}' alone move"
        shared = ", the first of them together with the others of this curriculum, on the data of all"
        together = shared if job.curriculum == "shared" else ""
        folded = ", then folded into it" if job.adapter is not None and job.adapter.family.folds else ""
        yield f"{name}: {trained} is trained on {', '.join(job.data)} for {length}{together}{selected}{folded}."


def _inputs(recipe: Recipe, plan: Plan | None) -> Iterator[str]:
    size = "" if plan is None else f" ({len(plan.base.tensors)} tensors, {plan.base.nbytes / 1e9:.2f} GB)"
    yield f"The base is {recipe.base or 'given on the command line (--base)'}{size}."
    weights = {expert.weight for expert in recipe.experts.values()}
    for name, expert in sorted(recipe.experts.items()):
        share = "" if len(weights) == 1 else f", weight {expert.weight:g}"
        yield f"Expert {name} is {expert.model}{share}."
    if not recipe.experts:
        yield "Experts are given on the command line (--expert name=model)."
    elif len(weights) == 1 and len(recipe.experts) > 1 and recipe.blend is not None:
        yield f"All experts have the same weight, {next(iter(weights)):g}."
    if recipe.blend is not None:
        yield "What is blended is each expert's change: expert minus base, in float32."
    for name in ("base", *sorted(recipe.experts)):
        section, folder = recipe.statistics_of(name), recipe.statistics_folder(name)
        if section is not None and folder is not None:
            there = "are there" if os.path.exists(folder) else "are to be made by 'ktmerge stats' or 'ktmerge run'"
            yield f"Statistics of {name}, in {section.folder or f'stats/{name}'}, {there}."
    if plan is None and recipe.base and recipe.experts and recipe.blend is not None:
        yield "Not all of these models are here: parts are told by what the recipe says, not tensor by tensor."


def _parts(recipe: Recipe, plan: Plan | None) -> Iterator[str]:
    blend = recipe.blend
    if blend is None:
        return
    setting = blend_setting(blend)
    if plan is not None:
        yield from _planned(plan)
        return
    for number, rule in enumerate(blend.where):
        yield f"{_condition(rule)}{' (unless said above)' if number else ''}: {_ruled(rule, number, recipe, setting)}"
    alone = len(recipe.experts) == 1
    rest = "Everything else" if blend.where else "Every part"
    for kinds, pipeline, lambda_ in _alike(setting):
        told = "all tensors" if len(kinds) == len(FLOAT_CLASSES) else ", ".join(kinds)
        yield f"{rest}, {told}: {_steps(pipeline, lambda_, alone)}"
    yield "Integer and boolean tensors stay the base's."


def _planned(plan: Plan) -> Iterator[str]:
    groups: dict[str, list[TensorPlan]] = {}
    for tensor in plan.tensors:
        groups.setdefault(_treatment(tensor, len(plan.experts) == 1), []).append(tensor)
    for treatment, tensors in groups.items():
        parts = list(dict.fromkeys(tensor.part.partition("[")[0] for tensor in tensors))
        kinds = list(dict.fromkeys(_CLASSES.get(tensor.tensor_class, tensor.tensor_class) for tensor in tensors))
        size = sum(tensor.info.nbytes for tensor in tensors) / 1e6
        count = f"{len(tensors)} tensor{'s' if len(tensors) > 1 else ''}"
        yield f"{', '.join(parts)}: {', '.join(kinds)} ({count}, {size:.1f} MB): {treatment}"


def _treatment(tensor: TensorPlan, alone: bool) -> str:
    if tensor.pipeline is None:
        return "kept as in the base." if tensor.expert is None else f"taken from {tensor.expert}, unchanged."
    return _steps(tensor.pipeline, tensor.lambda_, alone)


def _alike(setting: Setting) -> Iterator[tuple[list[str], Pipeline, float]]:
    """Classes of tensors that are treated alike."""
    groups: dict[str, tuple[list[str], Pipeline, float]] = {}
    for kind in FLOAT_CLASSES:
        pipeline, lambda_ = setting.pipelines[kind], setting.lambda_of(kind)
        group = groups.setdefault(f"{pipeline.spec()} {lambda_}", ([], pipeline, lambda_))
        group[0].append(_CLASSES[kind])
    yield from groups.values()


def _condition(rule: WhereRule) -> str:
    given = [
        *([f"the part {rule.part}"] if rule.part else []),
        *([f"tensors called {rule.match}"] if rule.match else []),
        *([_CLASSES[rule.tensor_class]] if rule.tensor_class else []),
    ]
    text = ", of them ".join(given)
    return text[:1].upper() + text[1:]


def _ruled(rule: WhereRule, number: int, recipe: Recipe, setting: Setting) -> str:
    if rule.keep is not None:
        return "kept as in the base." if rule.keep == "base" else f"taken from {rule.keep}, unchanged."
    assert recipe.blend is not None
    own = rule_setting(rule, f"blend.where[{number}]", recipe.blend, setting)
    return " Or, ".join(
        f"{' and '.join(kinds)}: {_steps(pipeline, lambda_, len(recipe.experts) == 1)}"
        for kinds, pipeline, lambda_ in _alike(own)
    )


def _steps(pipeline: Pipeline, lambda_: float, alone: bool) -> str:
    """The stages in words, in order; with one expert alone its mean or sum is no step."""
    if lambda_ == 0:
        return "kept as in the base, as lambda is 0."
    told = [use for use in pipeline.uses if not (alone and use.stage.name in ("mean", "sum"))]
    steps = [f"{_KINDS[use.stage.kind]}: {_step(use)}" for use in told]
    steps = steps or ["the expert's change as it is"]
    scale = "added to the base." if lambda_ == 1 else f"times lambda {lambda_:g}, added to the base."
    return "; ".join([*steps, scale])


def _step(use: StageUse) -> str:
    summary = _SOURCE.sub("", use.stage.summary).rstrip(".")
    given = use.parameters.model_dump(mode="json")
    fields = type(use.parameters).model_fields
    shown = [
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in given.items()
        if value is not None and (type(value) in (int, float) or value != fields[key].default)
    ]
    summary = summary[:1].lower() + summary[1:] if summary[1:2].islower() else summary
    return summary + (f" [{', '.join(shown)}]" if shown else "")


def _output(recipe: Recipe, plan: Plan | None) -> Iterator[str]:
    if recipe.blend is None:
        return
    output = recipe.output
    kind = "each tensor in the base's type" if output.dtype == "base" else output.dtype
    rounding = (
        "to the nearest value"
        if output.rounding == "nearest"
        else "up or down by chance, so that small changes survive on average"
    )
    yield f"One checkpoint with the base's tensor names, shapes and inference cost: {kind}, rounded once, {rounding}."
    if output.vocabulary == "union":
        yield "Its vocabulary also has the tokens that experts added."
    if output.not_finite == "keep_base":
        yield "Where an input is not finite, the base's value stays; else such inputs are refused."
    yield (
        f"Whatever is drawn is drawn by seed {recipe.seed}; the same inputs give the same bytes (where matrices are "
        "decomposed or solved for: on the same kind of processor, with the same torch)."
    )
    yield from plan.notes if plan is not None else ()


def _scoring(recipe: Recipe) -> Iterator[str]:
    if recipe.eval is None:
        return
    suite = suite_of(recipe)
    for side, tasks in (("kept", suite.upstream), ("learned", suite.downstream)):
        if tasks:
            yield f"What was {side}: {', '.join(task.name for task in tasks)}."
    models = "Base, experts and blend" if recipe.blend is not None else "Base and experts"
    yield f"{models} are scored by the same code on the same items."
