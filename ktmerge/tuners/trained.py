"""What is trained: from expressions to the parameters of a loaded model, their rates, and a table to look at first.

Loads no torch; it asks parameters for their shapes only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.parts import Parts
from ktmerge.errors import UsageError
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.recipes.training import TrainExpression
from ktmerge.tuners.machine import GRADIENT_BYTES, STATE_BYTES, WEIGHT_BYTES

_HEAD = "lm_head.weight"
"""What stands for a head that has no tensor of its own."""
_HOLDING = ("llm.layers", "vision.layers", "audio.layers", "encoder.layers", "connector")
"""Parts that adapters are told to be in."""


@dataclass(frozen=True)
class PartSummary:
    """What is trained of one part; of towers with layers, all layers that are treated alike.

    Attributes:
        tensors, parameters: that there are.
        trained: parameters that are trained: all, or none of them.
        rate: learning rate; 0 if it is frozen.
    """

    part: str
    tensors: int
    parameters: int
    trained: int
    rate: float


@dataclass(frozen=True)
class Trained:
    """The parameters a job trains, by their names in the model.

    Attributes:
        rates: learning rate of each trained parameter.
        summaries: part by part, in the model's order.
        shared: pairs of parts that one trained tensor belongs to, of which only the first was asked for.
    """

    rates: Mapping[str, float]
    summaries: tuple[PartSummary, ...]
    shared: tuple[tuple[str, str], ...] = ()

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(one.trained for one in self.summaries)

    @property
    def total(self) -> int:
        """How many numbers the model has."""
        return sum(one.parameters for one in self.summaries)

    @property
    def is_full(self) -> bool:
        """Whether every parameter is trained."""
        return self.parameters == self.total

    def to_json(self) -> dict[str, Any]:
        """For the record: counts by part."""
        return {
            "tensors": len(self.rates),
            "parameters": self.parameters,
            "of": self.total,
            "parts": [vars(one) for one in self.summaries],
        }

    def lines(self, share: float = STATE_BYTES) -> list[str]:
        """The table as text.

        Args:
            share: bytes that the optimizer keeps for each trained parameter.
        """
        rows = [("part", "tensors", "parameters", "weights", "gradients", "optimizer", "rate")]
        for one in self.summaries:
            rate = f"{one.rate:g}" if one.trained else "frozen"
            rows.append((one.part, str(one.tensors), *_sizes(one.parameters, one.trained, share), rate))
        count = sum(one.tensors for one in self.summaries)
        rows.append(("all", str(count), *_sizes(self.total, self.parameters, share), ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        head = (
            f"training {len(self.rates)} of {count} tensors, {self.parameters:,} of {self.total:,} parameters "
            f"({self.parameters / max(1, self.total):.1%}):"
        )
        return [head, *("  " + _row(row, widths) for row in rows)]


def require_trainable(base: Checkpoint, job: FinetuneJob) -> None:
    """Refuse expressions that match nothing, from the headers alone.

    Raises:
        UsageError: a term of ``train`` matches no tensor, or a rule of ``learning_rates`` no trained one.
    """
    parts, wanted = header_matcher(base, job)
    names = [*base.tensors, *([_HEAD] if parts.of(_HEAD) == "head" and _HEAD not in base.tensors else [])]
    _rates([[name] for name in names if wanted(name)], parts, job)


def header_matcher(base: Checkpoint, job: FinetuneJob) -> tuple[Parts, Callable[[str], bool]]:
    """The parts that headers tell of, with a head that is tied to the embedding; and whether a tensor is trained.

    Raises:
        UsageError: a term of ``train`` matches no tensor.
    """
    names, config = list(base.tensors), base.config
    ties = config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings"))
    parts = Parts(names, config)
    tied = bool(ties) and not any(parts.of(name) == "head" for name in names)
    if tied:
        parts = Parts([*names, _HEAD], config)
    asked = TrainExpression.parse(job.train if job.adapter is None else job.adapted_part).matcher(parts)
    return parts, lambda name: asked(name) or (tied and parts.of(name) == "embed" and asked(_HEAD))


def choose_trained(model: Any, base: Checkpoint, job: FinetuneJob) -> Trained:
    """Freeze every parameter of ``model`` that ``job`` does not train; say which are trained, at which rates.

    A tensor that is shared (a tied head) is trained if any of its names is asked for.

    Raises:
        UsageError: as `require_trainable`.
    """
    aliases: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases[id(parameter)].append(name)
    groups = [aliases[id(parameter)] for _, parameter in model.named_parameters()]
    parts = Parts([name for names in groups for name in names], base.config)
    wanted = TrainExpression.parse(job.train).matcher(parts)
    chosen = [names for names in groups if any(map(wanted, names))]
    rates = _rates(chosen, parts, job)
    sizes = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in rates)
        sizes[name] = int(parameter.numel())
    shared = [_shared(names, wanted, parts) for names in chosen]
    return Trained(
        rates, _summaries(groups, rates, parts.of, sizes), tuple(pair for pair in shared if pair is not None)
    )


def choose_adapted(model: Any, base: Checkpoint, job: FinetuneJob) -> Trained:
    """What is trained of a model with an adapter: the parameters that ask for gradients, B at its own rate.

    Raises:
        UsageError: as `require_trainable`.
    """
    named = dict(model.named_parameters())
    parts = Parts(named, base.config)
    moving = [name for name, one in named.items() if one.requires_grad]
    times = 1.0 if job.adapter is None else job.adapter.used_b_rate
    rates = {
        name: rate * (times if "lora_B" in name else 1.0)
        for name, rate in _rates([[name] for name in moving], parts, job).items()
    }
    sizes = {name: int(one.numel()) for name, one in named.items()}
    what = "adapter" if job.adapter is None else job.adapter.name

    def label(name: str) -> str:
        if name not in rates:
            return parts.of(name)
        return f"{what} in {parts.of(name)}" if parts.of(name).startswith(_HOLDING) else what

    ordered = [[name] for name in sorted(named, key=lambda name: rates.get(name, 0.0))]
    return Trained(rates, _summaries(ordered, rates, label, sizes))


def _rates(groups: Iterable[list[str]], parts: Parts, job: FinetuneJob) -> dict[str, float]:
    """The rate of each tensor, by its first name: of the first rule that matches any of its names.

    Raises:
        UsageError: a rule matches nothing, or nothing that is trained.
    """
    rules = {text: TrainExpression.parse(text, "learning_rates").matcher(parts) for text in job.learning_rates}
    unused = set(rules)
    rates: dict[str, float] = {}
    for names in groups:
        rule = next((one for one, matches in rules.items() if any(map(matches, names))), None)
        rates[names[0]] = job.learning_rate if rule is None else job.learning_rates[rule]
        unused.discard(rule or "")
    if unused:
        trained = sorted({parts.of(name).partition("[")[0] for name in rates})
        raise UsageError(
            f"learning_rates '{sorted(unused)[0]}': matches nothing that is trained and left by earlier rules; "
            f"trained are {', '.join(trained)}."
        )
    return rates


def _shared(names: list[str], wanted: Any, parts: Parts) -> tuple[str, str] | None:
    asked = [parts.of(name) for name in names if wanted(name)]
    other = [parts.of(name) for name in names if not wanted(name)]
    return (asked[0], other[0]) if other else None


def _summaries(
    groups: list[list[str]], rates: Mapping[str, float], part_of: Callable[[str], str], sizes: Mapping[str, int]
) -> tuple[PartSummary, ...]:
    """One row for each run of neighbouring layers, or other part, at one rate."""
    found: dict[tuple[str, float], list[list[str]]] = defaultdict(list)
    for names in groups:
        found[part_of(names[0]), rates.get(names[0], 0.0)].append(names)
    runs: list[tuple[str, int | None, int, float, list[str]]] = []
    for (part, rate), members in found.items():
        tower, layered, number = part.partition(".layers[")
        own = [names[0] for names in members]
        layer = int(number.rstrip("]")) if layered else None
        last = runs[-1] if runs else None
        if last and layer is not None and (last[0], last[2], last[3]) == (f"{tower}.layers", layer, rate):
            runs[-1] = (last[0], last[1], layer + 1, rate, [*last[4], *own])
        else:
            runs.append((f"{tower}.layers" if layered else part, layer, (layer or 0) + 1, rate, own))
    return tuple(
        PartSummary(
            part if first is None else f"{part}[{first}:{end}]",
            len(names),
            sum(sizes[name] for name in names),
            sum(sizes[name] for name in names if name in rates),
            rate,
        )
        for part, first, end, rate, names in runs
    )


def _sizes(parameters: int, trained: int, state: float) -> tuple[str, str, str, str]:
    return (
        f"{parameters:,}",
        _bytes(WEIGHT_BYTES * parameters),
        _bytes(GRADIENT_BYTES * trained),
        _bytes(state * trained),
    )


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _row(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
    return "  ".join(cells).rstrip()
