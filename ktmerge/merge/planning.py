"""From a recipe and headers to a plan: every tensor resolved, every mistake found, nothing read. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

from ktmerge.checkpoints.alignment import align
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.classes import TensorClass
from ktmerge.checkpoints.experts import fit_experts
from ktmerge.checkpoints.hub import on_this_machine
from ktmerge.checkpoints.matrices import MatrixLayout, bias_layout, matrix_layout
from ktmerge.checkpoints.opening import open_model
from ktmerge.checkpoints.parts import Parts
from ktmerge.checkpoints.quantised import scheme_of, way_out
from ktmerge.checkpoints.tying import claimed_tie, tied_head
from ktmerge.checkpoints.union import join_vocabularies
from ktmerge.checkpoints.vocabulary import fit_vocabulary
from ktmerge.errors import UsageError, attempt, located, refuse
from ktmerge.merge.needs import open_statistics, without_statistics
from ktmerge.merge.plan import Action, ExpertPlan, Plan, TensorPlan
from ktmerge.merge.rules import Rule, resolve_rules
from ktmerge.merge.sections import settings_of
from ktmerge.merge.settings import Setting, blend_setting, weights_of
from ktmerge.merge.stage import Pipeline
from ktmerge.recipes.schema import Recipe

_OUTPUT_TAGS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def plan_blend(recipe: Recipe) -> Plan:
    """Resolve what happens to every tensor, from headers alone.

    Raises:
        UsageError: everything that is wrong with the recipe or its inputs, one per line.
    """
    if recipe.blend is None:
        raise UsageError(f"the recipe '{recipe.name}' has no blend section.")
    problems: list[str] = []
    setting = attempt(problems, partial(blend_setting, recipe.blend))
    if recipe.base is None:
        problems.append("base: the recipe names none; add it, or give --base.")
    if not recipe.experts:
        problems.append("experts: the recipe names none; add one, or give --expert name=folder.")
    elif setting is not None:
        problems += [f"blend: {objection}" for objection in setting.objections(weights_of(recipe))]
    base = attempt(problems, lambda: _open(recipe, "base", recipe.base)) if recipe.base is not None else None
    opened = _open_experts(recipe, base, problems)
    texts: Mapping[str, str] = {}
    if base is not None and recipe.output.vocabulary == "union" and not problems:
        union = attempt(problems, partial(join_vocabularies, base, opened))
        base, texts = (base, {}) if union is None else (union.base, union.texts)
    experts = [
        _align(recipe, base, name, one, bool(texts), problems) for name, one in opened.items() if base is not None
    ]
    ready = tuple(expert for expert in experts if expert is not None)
    tensors: tuple[TensorPlan, ...] = ()
    rules: tuple[Rule, ...] = ()
    layers: Mapping[str, int] = {}
    if setting is not None:
        parts = Parts(base) if base is not None else None
        rules = attempt(problems, lambda: resolve_rules(recipe, setting, parts)) or ()
        if base is not None and parts is not None:
            tensors = decide(base, _bare(recipe, base, ready, parts), setting, rules, problems)
            layers = parts.layers
        problems += without_statistics(recipe, settings_of(setting, rules))
    require_complete(ready, tensors, rules, problems)
    statistics = open_statistics(recipe, base, tensors, problems) if base is not None else {}
    refuse(problems)
    assert base is not None
    return Plan(recipe, base, ready, tensors, layers, tuple(_notes(base, ready)), texts, statistics)


def plan_here(recipe: Recipe) -> Plan | None:
    """The same where all models are on this machine and fit one another; nothing is fetched for it."""
    base = on_this_machine(recipe.base or "", recipe.folder)
    models = {name: on_this_machine(one.model, recipe.folder) for name, one in recipe.experts.items()}
    if base is None or None in models.values():
        return None
    experts = {name: one.model_copy(update={"model": models[name]}) for name, one in recipe.experts.items()}
    try:
        return plan_blend(recipe.model_copy(update={"base": base or None, "experts": experts}))
    except UsageError:
        return None


def _open(recipe: Recipe, role: str, reference: str | None, base: Checkpoint | None = None) -> Checkpoint:
    with located(role):
        return open_model(str(reference), recipe.folder, base, dequantised=recipe.dequantise)


def _open_experts(recipe: Recipe, base: Checkpoint | None, problems: list[str]) -> dict[str, Checkpoint]:
    """The experts that can be opened, sorted by name, their tensors named as the base names its."""
    opened = {}
    for name in sorted(recipe.experts):
        where = f"experts.{name}.model"
        model = recipe.experts[name].model
        checkpoint = attempt(problems, partial(_open, recipe, where, model, base))
        tuned = recipe.finetune is not None and name in recipe.finetune.experts
        if checkpoint is None and tuned and not (recipe.folder / model).exists():
            problems[-1] += " The recipe says how to make it: run 'ktmerge finetune --recipe' or 'ktmerge run' first."
        scheme = None if checkpoint is None else scheme_of(checkpoint)
        if checkpoint is None or base is None:
            continue
        if scheme is not None and scheme_of(base) is None:
            said = f"experts.{name}: its weights are quantised by {scheme}, the base's are not"
            problems.append(f"{said}. {way_out(scheme)}.")
            continue
        opened[name] = fit_experts(base, checkpoint)
    return opened


def _align(
    recipe: Recipe, base: Checkpoint, name: str, checkpoint: Checkpoint, grown: bool, problems: list[str]
) -> ExpertPlan | None:
    label = f"experts.{name}"
    fitted = attempt(problems, lambda: fit_vocabulary(base, checkpoint, label, grown=grown))
    if fitted is None:
        return None
    return ExpertPlan(name, recipe.experts[name].weight, fitted, align(base, fitted, label))


def require_complete(
    experts: Iterable[ExpertPlan], tensors: Sequence[TensorPlan], rules: Sequence[Rule], problems: list[str]
) -> None:
    """Complain of an expert that lacks a tensor, unless a rule keeps another's there."""
    for expert in experts:
        kept = {one.name for one in tensors if one.rule is not None and rules[one.rule].keep not in (None, expert.name)}
        attempt(problems, partial(expert.alignment.require_complete, kept))


def _bare(recipe: Recipe, base: Checkpoint, experts: Iterable[ExpertPlan], parts: Parts) -> Iterator[TensorPlan]:
    """Every tensor before anything is said of how to blend it."""
    tied = tied_head(base)
    classes = base.classes
    tag = _OUTPUT_TAGS.get(recipe.output.dtype)
    for name, info in base.tensors.items():
        key = tied[1] if tied is not None and name == tied[0] else name
        kind = classes[name]
        own = base.written.get(name, info.dtype)
        yield TensorPlan(
            info=info,
            part=parts.of(key),
            tensor_class=kind,
            action="base",
            dtype=tag if tag is not None and info.is_float and kind not in ("buffer", "quant") else own,
            key=key,
            sources={one.name: one.alignment.mapping[name] for one in experts if name in one.alignment.mapping},
            layout=_layout(base, key, kind, info.shape),
        )


def _layout(base: Checkpoint, name: str, kind: TensorClass, shape: tuple[int, ...]) -> MatrixLayout | None:
    if kind == "vector":
        return bias_layout(name, shape, base.tensors, base.config)
    return matrix_layout(name, shape, base.config) if kind == "matrix" else None


def decide(
    base: Checkpoint, tensors: Iterable[TensorPlan], setting: Setting, rules: Iterable[Rule], problems: list[str]
) -> tuple[TensorPlan, ...]:
    """What becomes of tensors, whatever was decided of them before; ``problems`` take what is wrong."""
    ordered, classes = list(rules), base.classes
    plans = []
    matched: dict[int, set[TensorClass]] = {rule.index: set() for rule in ordered}
    for tensor in tensors:
        rule = next((rule for rule in ordered if rule.matches(tensor.key, classes[tensor.key])), None)
        if rule is not None:
            matched[rule.index].add(tensor.tensor_class)
        plans.append(_decided(tensor, setting, rule))
    for rule in ordered:
        problems += rule.unused(matched[rule.index])
    quantised = [plan.name for plan in plans if plan.tensor_class == "quant" and plan.action == "blend"]
    if quantised:
        scheme = scheme_of(base)
        problems.append(
            f"base: {len(quantised)} tensors are quantised by {scheme} ({', '.join(quantised[:3])}...): sums "
            f"of packed codes mean nothing. {way_out(scheme)}, or keep these tensors with a where rule."
        )
    return tuple(plans)


def _decided(tensor: TensorPlan, setting: Setting, rule: Rule | None) -> TensorPlan:
    action: Action = "base"
    expert: str | None = None
    pipeline: Pipeline | None = None
    lambda_ = 1.0
    keep = None if rule is None else rule.keep
    if keep is not None and keep != "base" and keep in tensor.sources:
        action, expert = "expert", keep
    elif keep is None and tensor.tensor_class != "buffer":
        chosen = setting if rule is None or rule.setting is None else rule.setting
        action, pipeline = "blend", chosen.pipelines.get(tensor.tensor_class)
        lambda_ = chosen.lambda_of(tensor.tensor_class)
    index = None if rule is None else rule.index
    return TensorPlan(  # `replace` takes twice as long, for every tensor of every candidate of a sweep
        tensor.info, tensor.part, tensor.tensor_class, action, tensor.dtype, tensor.key, tensor.sources,
        expert, pipeline, lambda_, index, tensor.layout,
    )  # fmt: skip


def _notes(base: Checkpoint, experts: Iterable[ExpertPlan]) -> Iterable[str]:
    yield from (f"base: {note}" for note in base.notes)
    modules = [file for file in base.other_files if file.endswith(".safetensors")]
    yield from (f"base: {file} is a module by itself; it is carried, not blended." for file in modules)
    for label, checkpoint in (("base", base), *((one.name, one.checkpoint) for one in experts)):
        apart = [file for file in checkpoint.left_behind if file.endswith(".safetensors") and "ktmerge-" not in file]
        if apart:
            more = f" and {len(apart) - 1} more" if len(apart) > 1 else ""
            yield f"{label}: {apart[0]}{more}: no part of its weights; neither read nor carried."
    for expert in experts:
        yield from (f"{expert.name}: {note}" for note in expert.checkpoint.notes)
        renamed = expert.alignment.renamed
        if renamed:
            first = next(iter(renamed.items()))
            yield f"{expert.name}: {len(renamed)} tensors go by other names there ({first[1]} is {first[0]})."
    claimed = claimed_tie(base)
    if claimed is not None and tied_head(base) is not None:
        yield f"the base stores '{claimed[0]}' beside '{claimed[1]}', which its config ties to it; both get the same."
    elif claimed is not None:
        yield f"the base's '{claimed[0]}' is not its '{claimed[1]}', though its config ties them; they stay two."
