"""Recipe and headers to a plan: what happens to every tensor, every mistake found, nothing read yet. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from ktmerge.checkpoints import Alignment, Checkpoint, Parts, TensorClass, TensorInfo, align, open_model
from ktmerge.checkpoints.dtypes import BITS
from ktmerge.checkpoints.experts import fit_experts
from ktmerge.checkpoints.matrices import MatrixLayout, matrix_layout
from ktmerge.checkpoints.quantised import scheme_of
from ktmerge.checkpoints.statistics import Statistics
from ktmerge.checkpoints.tying import claimed_tie, tied_head
from ktmerge.checkpoints.union import join_vocabularies
from ktmerge.checkpoints.vocabulary import fit_vocabulary
from ktmerge.errors import UsageError
from ktmerge.merge.needs import open_statistics, without_statistics
from ktmerge.merge.rules import Rule, resolve_rules
from ktmerge.merge.settings import Setting, blend_setting
from ktmerge.merge.stage import Pipeline
from ktmerge.recipes.schema import Recipe

Action = Literal["base", "expert", "blend"]

_OUTPUT_TAGS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


_WAY_OUT = "Give the unquantised model, or write 'dequantise: true'"


@dataclass(frozen=True)
class TensorPlan:
    """What becomes of one tensor.

    Attributes:
        info: the base's header entry.
        action: take the base's, take the expert's, or blend.
        dtype: safetensors tag of the output.
        key: name under which random choices are made: its own, or its embedding's for a tied head.
        sources: the name of this tensor in each expert that has it, experts sorted by name.
        expert: whose tensor is taken, for the action ``expert``.
        pipeline: the stages, for the action ``blend``.
        lambda_: scale of the merged delta, for the action ``blend``.
        rule: index of the ``where`` rule that decided, if one did.
        layout: where the linear maps are, of class matrix.
    """

    info: TensorInfo
    part: str
    tensor_class: TensorClass
    action: Action
    dtype: str
    key: str
    sources: Mapping[str, str]
    expert: str | None = None
    pipeline: Pipeline | None = None
    lambda_: float = 1.0
    rule: int | None = None
    layout: MatrixLayout | None = None

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def nbytes(self) -> int:
        """Bytes of the output; of a type that is kept, those of the input."""
        return self.info.nbytes if self.dtype == self.info.dtype else self.info.numel * BITS[self.dtype] // 8

    @property
    def is_alias(self) -> bool:
        """A head tied to its embedding, stored a second time: it must get the same values."""
        return self.key != self.name

    @property
    def method(self) -> str:
        """For people to read: the method's name, or what is kept."""
        if self.pipeline is not None:
            return self.pipeline.method
        return "keep base" if self.expert is None else f"keep {self.expert}"

    def coefficients(self) -> dict[str, Any]:
        """Everything that decides this tensor's values, as plain data."""
        return {
            "name": self.name,
            "action": self.action,
            "expert": self.expert,
            "dtype": self.dtype,
            "stages": None if self.pipeline is None else self.pipeline.spec(),
            "lambda": None if self.pipeline is None else self.lambda_,
        }


@dataclass(frozen=True)
class ExpertPlan:
    """One expert: its weight, its headers, and how its names answer to the base's."""

    name: str
    weight: float
    checkpoint: Checkpoint
    alignment: Alignment


@dataclass(frozen=True)
class Plan:
    """Everything a blend will do. Experts are sorted by name: their order in the recipe has no influence.

    ``texts`` are those of the base's files that change with the vocabulary; ``statistics``, by ``base`` or the expert's
    name, are those that a stage needs.
    """

    recipe: Recipe
    base: Checkpoint
    experts: tuple[ExpertPlan, ...]
    tensors: tuple[TensorPlan, ...]
    layers: Mapping[str, int]
    notes: tuple[str, ...] = field(default=())
    texts: Mapping[str, str] = field(default_factory=dict)
    statistics: Mapping[str, Statistics] = field(default_factory=dict)

    def expert(self, name: str) -> ExpertPlan:
        """The expert of that name."""
        return next(expert for expert in self.experts if expert.name == name)

    @property
    def dtypes(self) -> dict[str, str]:
        """Output tags by name."""
        return {tensor.name: tensor.dtype for tensor in self.tensors}

    def table(self) -> tuple[list[str], list[list[str]], str]:
        """Columns, rows and title: what happens to which part, a row for each group of tensors treated alike."""
        columns = ["part", "class", "what", "lambda", "parameters", "tensors", "MB"]
        rows = [
            [
                g["part"],
                g["class"],
                g["method"],
                g["lambda"],
                g["parameters"],
                str(g["tensors"]),
                f"{g['bytes'] / 1e6:.1f}",
            ]
            for g in self._groups()
        ]
        return columns, rows, f"{self.recipe.name}: {len(self.tensors)} tensors, {len(self.experts)} experts"

    def summary(self) -> str:
        """The table as plain text, notes below."""
        columns, rows, title = self.table()
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [columns, *rows]
        ]
        return "\n".join([title, *(line.rstrip() for line in lines), *(f"note: {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, one entry a tensor."""
        return {
            "recipe": self.recipe.name,
            "experts": {expert.name: expert.weight for expert in self.experts},
            "groups": self._groups(),
            "notes": list(self.notes),
            "tensors": [
                {"part": tensor.part, "class": tensor.tensor_class, "rule": tensor.rule, **tensor.coefficients()}
                for tensor in self.tensors
            ],
        }

    def _groups(self) -> list[dict[str, Any]]:
        """Tensors of one part (all layers of a stack together) that are treated alike."""
        groups: dict[tuple[str, ...], dict[str, Any]] = {}
        for tensor in self.tensors:
            given = tensor.pipeline.knobs() if tensor.pipeline is not None else {}
            row = {
                "part": tensor.part.partition("[")[0],
                "method": tensor.method,
                "lambda": f"{tensor.lambda_:g}" if tensor.pipeline is not None else "",
                "parameters": ", ".join(f"{key}={value}" for key, value in given.items()),
            }
            group = groups.setdefault(tuple(row.values()), {**row, "class": "", "tensors": 0, "bytes": 0})
            if tensor.tensor_class not in group["class"]:
                group["class"] = ", ".join(filter(None, (group["class"], tensor.tensor_class)))
            group["tensors"] += 1
            group["bytes"] += tensor.info.nbytes
        return list(groups.values())


def check_recipe(recipe: Recipe) -> None:
    """Find every mistake in a recipe's blend section that shows without its checkpoints.

    Raises:
        UsageError: everything found, one per line.
    """
    problems: list[str] = []
    if recipe.blend is None:
        return
    setting = _collect(problems, lambda: blend_setting(recipe.blend))
    if setting is not None:
        if recipe.experts:
            problems += [f"blend: {objection}" for objection in setting.objections(weights_of(recipe))]
        rules = _collect(problems, lambda: resolve_rules(recipe, setting, None)) or ()
        if recipe.base is not None:
            problems += without_statistics(recipe, settings_of(setting, rules))
    refuse(problems)


def plan_blend(recipe: Recipe) -> Plan:
    """Resolve what happens to every tensor, from headers alone.

    Raises:
        UsageError: everything that is wrong with the recipe or its inputs, one per line.
    """
    if recipe.blend is None:
        raise UsageError(f"the recipe '{recipe.name}' has no blend section.")
    problems: list[str] = []
    setting = _collect(problems, lambda: blend_setting(recipe.blend))
    if recipe.base is None:
        problems.append("base: the recipe names none; add it, or give --base.")
    if not recipe.experts:
        problems.append("experts: the recipe names none; add one, or give --expert name=folder.")
    elif setting is not None:
        problems += [f"blend: {objection}" for objection in setting.objections(weights_of(recipe))]
    base = _collect(problems, lambda: _open(recipe, "base", recipe.base)) if recipe.base is not None else None
    opened = _open_experts(recipe, base, problems)
    texts: Mapping[str, str] = {}
    if base is not None and recipe.output.vocabulary == "union" and not problems:
        union = _collect(problems, partial(join_vocabularies, base, opened))
        base, texts = (base, {}) if union is None else (union.base, union.texts)
    experts = [
        _align(recipe, base, name, one, bool(texts), problems) for name, one in opened.items() if base is not None
    ]
    tensors: tuple[TensorPlan, ...] = ()
    layers: Mapping[str, int] = {}
    if setting is not None:
        parts = Parts(base) if base is not None else None
        rules = _collect(problems, lambda: resolve_rules(recipe, setting, parts)) or ()
        if base is not None and parts is not None:
            found = [expert for expert in experts if expert is not None]
            tensors = decide(base, _bare(recipe, base, found, parts), setting, rules, problems)
            layers = parts.layers
        problems += without_statistics(recipe, settings_of(setting, rules))
    statistics = open_statistics(recipe, base, tensors, problems) if base is not None else {}
    refuse(problems)
    assert base is not None
    ready = tuple(expert for expert in experts if expert is not None)
    return Plan(recipe, base, ready, tensors, layers, tuple(_notes(base, ready)), texts, statistics)


def settings_of(setting: Setting, rules: Iterable[Rule]) -> list[Setting]:
    """All settings that some tensors are blended by."""
    return [setting, *(rule.setting for rule in rules if rule.setting is not None)]


def _collect(problems: list[str], find: Any) -> Any:
    """Call ``find``; keep what it complains about for later."""
    try:
        return find()
    except UsageError as error:
        problems += str(error).splitlines()
        return None


def refuse(problems: Iterable[str]) -> None:
    """Raise UsageError with all that is wrong, if anything is."""
    lines = list(dict.fromkeys(problems))
    if lines:
        raise UsageError("\n".join(lines))


def weights_of(recipe: Recipe) -> dict[str, float]:
    """Weights of the experts by name."""
    return {name: expert.weight for name, expert in recipe.experts.items()}


def _open(recipe: Recipe, role: str, reference: str | None, base: Checkpoint | None = None) -> Checkpoint:
    try:
        return open_model(str(reference), recipe.folder, base, dequantised=recipe.dequantise)
    except UsageError as error:
        raise UsageError("\n".join(f"{role}: {line}" for line in str(error).splitlines())) from None


def _open_experts(recipe: Recipe, base: Checkpoint | None, problems: list[str]) -> dict[str, Checkpoint]:
    """The experts that can be opened, sorted by name, their tensors named as the base names its."""
    opened = {}
    for name in sorted(recipe.experts):
        where = f"experts.{name}.model"
        model = recipe.experts[name].model
        checkpoint = _collect(problems, partial(_open, recipe, where, model, base))
        tuned = recipe.finetune is not None and name in recipe.finetune.experts
        if checkpoint is None and tuned and not (recipe.folder / model).exists():
            problems[-1] += " The recipe says how to make it: run 'ktmerge finetune --recipe' or 'ktmerge run' first."
        scheme = None if checkpoint is None else scheme_of(checkpoint)
        if checkpoint is None or base is None:
            continue
        if scheme is not None and scheme_of(base) is None:
            problems.append(f"experts.{name}: its weights are quantised by {scheme}, the base's are not. {_WAY_OUT}.")
            continue
        opened[name] = fit_experts(base, checkpoint)
    return opened


def _align(
    recipe: Recipe, base: Checkpoint, name: str, checkpoint: Checkpoint, grown: bool, problems: list[str]
) -> ExpertPlan | None:
    label = f"experts.{name}"
    fitted = _collect(problems, lambda: fit_vocabulary(base, checkpoint, label, grown=grown))
    if fitted is None:
        return None
    alignment = align(base, fitted, label)
    _collect(problems, alignment.require_complete)
    return ExpertPlan(name, recipe.experts[name].weight, fitted, alignment)


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
            layout=matrix_layout(key, info.shape, base.config) if kind == "matrix" else None,
        )


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
        problems.append(
            f"base: {len(quantised)} tensors are quantised by {scheme_of(base)} ({', '.join(quantised[:3])}...): sums "
            f"of packed codes mean nothing. {_WAY_OUT}, or keep these tensors with a where rule."
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
    return replace(tensor, action=action, expert=expert, pipeline=pipeline, lambda_=lambda_, rule=index)


def _notes(base: Checkpoint, experts: Iterable[ExpertPlan]) -> Iterable[str]:
    yield from (f"base: {note}" for note in base.notes)
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
