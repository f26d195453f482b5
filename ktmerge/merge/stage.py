"""The contract of a stage: one step from expert deltas to a merged delta, and what it declares about itself.

Knows types and declarations only; importing it loads no torch. Stages live in `ktmerge.merge.methods`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, get_args

from pydantic import Field

from ktmerge.recipes.section import Strict

if TYPE_CHECKING:
    from torch import Tensor as Tensor

    from ktmerge.checkpoints.classes import TensorClass
    from ktmerge.checkpoints.matrices import MatrixLayout
    from ktmerge.merge.kernels import Kernels
else:
    Tensor = Any  # for annotations alone: whoever declares a stage needs no torch for it

Kind = Literal["transform", "combine", "calibrate", "guard", "scale"]
Reach = Literal["element", "tensor"]
Scope = Literal["tensor", "global"]
Measure = Literal["inputs", "fisher", "scales"]

KINDS: tuple[Kind, ...] = get_args(Kind)
"""In the order in which a tensor goes through them."""


class Parameters(Strict):
    """Parameters of a stage: typed, with ranges, defaults and descriptions. Nothing is coerced, nothing is extra."""


Amount = Annotated[float, Field(ge=0, le=1e38)]
"""Of a parameter that may be anything from 0 on that fp32 can hold."""

SplitFused = Annotated[bool, Field(description="take maps that share a tensor (query, key and value) apart")]
"""Of a parameter ``split_fused``."""


@dataclass(frozen=True)
class Need:
    """Something measured by running a model on data (``ktmerge stats``) that a stage cannot do without.

    Attributes:
        measure: ``inputs``: a sample of what the linear maps were given; ``fisher``: the mean square of the gradient;
            ``scales``: the mean square of what the scale of a norm multiplies.
        of: measured in the base, on upstream data; or in each expert, on its own data.
    """

    measure: Measure
    of: Literal["base", "experts"]


class Measurements(Protocol):
    """What was measured of one tensor. ``expert`` is a name, or empty for the base on upstream data.

    Every method raises KtmergeError if the tensor was not measured in that model, or a file cannot be read.
    """

    def inputs(self, expert: str = "") -> Tensor:
        """Sampled inputs ``[tokens, i]``, of stacked experts ``[E, tokens, i]``, fp32; those of text tokens first."""

    def fisher(self, expert: str = "") -> Tensor:
        """Diagonal Fisher information of the piece at hand, fp32, shaped like it; not normalised."""

    def fisher_norm(self, expert: str = "") -> float:
        """L2 norm of the diagonal Fisher information over all of the model's tensors."""

    def scales(self, expert: str = "") -> Tensor | None:
        """Mean squares of what the whole tensor multiplies, fp32, shaped like it; None if it is no scale in use."""


@dataclass(frozen=True)
class Context:
    """What a stage may know about the piece of a tensor it works on.

    Attributes:
        tensor: the base's name of the tensor; part of every random key.
        part: e.g. ``llm.layers[3]``.
        layers: number of layers of each stack, e.g. ``{"llm": 30}``.
        tensor_class: matrix, embed, vector or conv.
        shape: of the whole tensor.
        start: index of the piece's first element in the flattened tensor.
        seed: the recipe's.
        experts: names, sorted: the order of all deltas, so that sums do not depend on the recipe's order.
        weights: of the experts, in that order, as the recipe says.
        expert: whose delta is being transformed; empty after combining.
        base: theta_0 of this piece, fp32.
        statistics: what the stage's own `Statistic` declarations found, by name.
        kernels: the arithmetic that has a fast form on some device.
        layout: where the linear maps are in a tensor of class matrix; see `ktmerge.merge.matrices`. Of the bias of
            several, how they share it.
        measured: what `Stage.needs` asked for.
        deltas: of all experts in this piece, flat, before any stage; for statistics of stages that are not given them.
        output: the safetensors tag of the type that the tensor is stored in, e.g. ``BF16``.
    """

    tensor: str
    part: str
    layers: Mapping[str, int]
    tensor_class: TensorClass
    shape: tuple[int, ...]
    start: int
    seed: int
    experts: tuple[str, ...]
    weights: tuple[float, ...]
    base: Tensor
    kernels: Kernels
    expert: str = ""
    statistics: Mapping[str, Any] = field(default_factory=dict)
    layout: MatrixLayout | None = None
    measured: Measurements | None = None
    deltas: tuple[Tensor, ...] = ()
    output: str = "F32"

    @property
    def place(self) -> Place:
        """The tensor's."""
        return Place(self.tensor_class, self.shape, self.layout)


class Observer(Protocol):
    """Gathers one statistic in as many passes over the data as it takes.

    The result must depend neither on the order nor on the sizes of the pieces it is shown.
    """

    @property
    def done(self) -> bool:
        """Whether no (further) pass is needed."""

    def observe(self, values: Any, context: Context) -> None:
        """Take in one piece: what the stage itself would be given (a delta, all deltas, or the merged delta)."""

    def end_pass(self) -> None:
        """All pieces have been shown once."""

    def result(self) -> Any:
        """What the stage finds in ``context.statistics``; valid once done."""


class OnePass:
    """What an `Observer` is that has seen enough after one pass."""

    done = False

    def end_pass(self) -> None:
        self.done = True


@dataclass(frozen=True)
class Statistic:
    """A number (or a few) that a stage needs to know before it can work on any element.

    Attributes:
        observer: a new one, given over how many elements, of one expert's deltas or of the merged delta.
    """

    name: str
    scope: Scope
    observer: Callable[[int], Observer]


@dataclass(frozen=True)
class Place:
    """What kind of tensor a piece is of; as in `Context`."""

    tensor_class: TensorClass
    shape: tuple[int, ...]
    layout: MatrixLayout | None = None


@dataclass(frozen=True)
class Stage:
    """One registered stage.

    ``apply`` is a pure function on fp32 tensors, by kind:

    * transform: ``(delta, parameters, context) -> delta``
    * combine: ``(deltas, parameters, context) -> merged``, ``deltas`` a list in the order of ``context.experts``
    * calibrate, guard: ``(merged, deltas, parameters, context) -> merged``, ``deltas`` as they came from the experts
    * scale: ``(merged, parameters, context) -> merged``

    With reach ``element`` the tensors are flat pieces of any size and position, but for what ``grain`` says; with reach
    ``tensor`` they are whole and shaped. Inputs are never changed in place.

    Attributes:
        statistics: what has to be known first, given the parameters.
        needs: what has to be measured on data before, given the parameters.
        whole: parameters with which a stage of reach ``element`` works as one of reach ``tensor``.
        grain: how many elements a stage of reach ``element`` wants to see together, as a row's: pieces begin and end at
            multiples of it.
        portable: whether a stage of reach ``element`` rounds as IEEE 754 says and no other way, so that every device
            gives the same bits: no exponentials, no sums of fractions in an order of the device's own choice, no matrix
            products. A GPU is given nothing else; divisions by a plain number are `ktmerge.merge.arithmetic.quotient`.
        objection: why these parameters cannot go with these experts and weights, if they cannot; asked while planning.
        compiled: the same in the words of `ktmerge.merge.program`, for the compiled kernels, or None: of a transform,
            given the parameters, a Trim or Drop; of a combine, given parameters and weights by name, a Sum, Largest or
            Elect;
            of a guard or scale, given the parameters, a Clamp, Cap or Ramp.
        last: whether what it makes is stored as it is: no stage may come after it, and lambda is 1.
    """

    name: str
    kind: Kind
    parameters: type[Parameters]
    apply: Callable[..., Tensor]
    reach: Reach = "element"
    statistics: Callable[[Any], Sequence[Statistic]] = lambda _: ()
    objection: Callable[[Any, Mapping[str, float]], str | None] = lambda *_: None
    compiled: Callable[..., Any] = lambda *_: None
    needs: Callable[[Any], Sequence[Need]] = lambda _: ()
    whole: Callable[[Any], bool] = lambda _: False
    grain: Callable[[Any, Place], int] = lambda *_: 1
    portable: bool = True
    last: bool = False

    @property
    def on_maps(self) -> bool:
        """Whether it works on linear maps only: it takes fused ones apart, or asks for their inputs."""
        if self.reach == "element":
            return False
        if "split_fused" in self.parameters.model_fields:
            return True
        required = any(field.is_required() for field in self.parameters.model_fields.values())
        return not required and any(need.measure == "inputs" for need in self.needs(self.parameters()))

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.apply.__doc__ or "").strip().splitlines()[0]


@dataclass(frozen=True)
class StageUse:
    """A stage with the parameters it is used with."""

    stage: Stage
    parameters: Parameters

    @property
    def reach(self) -> Reach:
        """The stage's, or ``tensor`` where these parameters call for it."""
        return "tensor" if self.stage.whole(self.parameters) else self.stage.reach

    def statistics(self) -> Sequence[Statistic]:
        """What has to be known before this use."""
        return self.stage.statistics(self.parameters)

    def wants(self, scope: Scope) -> bool:
        """Whether something of that scope has to be known."""
        return any(one.scope == scope for one in self.statistics())

    def spec(self) -> dict[str, Any]:
        """``{name: parameters}``, as a recipe would spell it."""
        return {self.stage.name: self.parameters.model_dump(mode="json")}


@dataclass(frozen=True)
class Pipeline:
    """The stages one tensor goes through: transforms of each delta, one combine, then what works on the merged delta.

    The scale by lambda follows last and is not part of it.
    """

    method: str
    transforms: tuple[StageUse, ...]
    combine: StageUse
    after: tuple[StageUse, ...] = ()
    semantics: int = 1

    @property
    def uses(self) -> tuple[StageUse, ...]:
        """All stages in order; the index into them is a stage's position."""
        return (*self.transforms, self.combine, *self.after)

    @property
    def reach(self) -> Reach:
        """``tensor`` if any stage has to see tensors whole."""
        return "tensor" if any(use.reach == "tensor" for use in self.uses) else "element"

    @property
    def portable(self) -> bool:
        """Whether every device gives the same bits."""
        return self.reach == "element" and all(use.stage.portable for use in self.uses)

    def grain(self, place: Place) -> int:
        """How many elements of a tensor have to be in one piece, for the sake of all stages."""
        return math.lcm(*(max(1, use.stage.grain(use.parameters, place)) for use in self.uses))

    def spec(self) -> list[dict[str, Any]]:
        """Every stage and parameter as plain data."""
        return [use.spec() for use in self.uses]

    def prefix(self, position: int) -> str:
        """Every stage and parameter up to ``position``: tensors with the same share statistics of global scope."""
        return json.dumps([use.spec() for use in self.uses[: position + 1]])

    def pools(self) -> list[tuple[int, str]]:
        """Position of every stage with statistics of global scope, and all stages up to it: what shares them."""
        found = [position for position, use in enumerate(self.uses) if use.wants("global")]
        return [(position, self.prefix(position)) for position in found]

    def parameters(self) -> dict[str, Any]:
        """All parameters by name, of all stages together; for people to read."""
        return {key: value for use in self.uses for key, value in use.parameters.model_dump(mode="json").items()}

    def knobs(self) -> dict[str, Any]:
        """The parameters worth a glance: numbers, and choices that are not the default."""
        defaults = {key: field.default for use in self.uses for key, field in type(use.parameters).model_fields.items()}
        return {
            key: value
            for key, value in self.parameters().items()
            if type(value) in (int, float) or value != defaults[key]
        }


@dataclass(frozen=True)
class Stages:
    """Stages by name with the parameters that differ from their defaults: what a preset or a recipe writes down."""

    combine: tuple[str, Mapping[str, Any]] = ("mean", {})
    transform: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    calibrate: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    guard: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    scale: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def of(self, kind: Kind) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """Those of a kind; one that combines."""
        found: Any = getattr(self, kind)
        return [found] if kind == "combine" else found


@dataclass(frozen=True)
class Promises:
    """What a method claims about itself; the property tests hold every registered method to it.

    Attributes:
        neutral: parameters under which one expert, lambda 1, comes back bit for bit; None if there are none.
        identical: what several equal experts give: the one (``mean``), as many times it (``sum``), or ``other``.
        scale: deltas times c give the merged delta times c.
        sign: negated deltas give the negated merged delta.
        experts: the order of the experts changes nothing.
        elements: shuffled elements give the shuffled merged delta; not so for random choices, which go by position.
        unbiased: the merged delta's mean over seeds is that of ``neutral``.
        tolerance: of all of these, relative to the tensor's largest value; 0 is bit for bit. Decompositions round.
        rotations: turning the outputs and the inputs of a matrix in all models turns the merged matrix alike.
        nothing: parameters under which the base comes back bit for bit, lambda 1; lambda 0 always does.
    """

    neutral: Mapping[str, Any] | None = field(default_factory=dict)
    identical: Literal["mean", "sum", "other"] = "mean"
    scale: bool = True
    sign: bool = True
    experts: bool = True
    elements: bool = True
    unbiased: bool = False
    tolerance: float = 0.0
    rotations: bool = False
    nothing: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Method:
    """A point in the grid of stages, under the name people know it by.

    Attributes:
        summary: one line: when to use it.
        source: paper, arXiv id.
        lambda_: default scale of the merged delta.
        experts: least and most number of experts; None for no limit.
        otherwise: stages for tensor classes that the method proper does not suit. They never get a lambda above 1 (or
            below -1): a matrix may be pushed beyond its experts, a norm times 1.5 breaks the model.
        formula: of the merged delta, in one line of plain text.
        cost: per matrix of o outputs, i inputs and N experts, e.g. ``N oi`` or ``eigh i^3``.
        semantics: raised whenever the same recipe would give other bytes.
        own: stages that exist only inside this method, not in the registry.
    """

    name: str
    summary: str
    source: str
    stages: Stages
    lambda_: float = 1.0
    experts: tuple[int, int | None] = (1, None)
    otherwise: Mapping[TensorClass, Stages] = field(default_factory=dict)
    formula: str = ""
    cost: str = "N oi"
    promises: Promises = Promises()
    semantics: int = 1
    own: tuple[Stage, ...] = ()

    @property
    def takes(self) -> str:
        """How many experts, in words."""
        least, most = self.experts
        return str(least) if least == most else f"{least} or more" if most is None else f"{least} to {most}"
