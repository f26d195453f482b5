"""mergekit's parameter values that vary: filters over tensor names, gradients over layers; as ``where`` rules."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.parts import Parts
from ktmerge.errors import UsageError

_WHERE = "mergekit file"

Scalar = float | int | bool | str


@dataclass(frozen=True)
class ParameterSetting:
    """Cases in order, first match wins: (part of the tensor's name, or None for all; values over the layers)."""

    cases: tuple[tuple[str | None, tuple[Scalar, ...]], ...]

    @classmethod
    def constant(cls, value: Any) -> ParameterSetting:
        """The same everywhere."""
        return cls(((None, (value,)),))

    @property
    def is_constant(self) -> bool:
        return self.filters == () and len(self.cases[0][1]) == 1

    @property
    def filters(self) -> tuple[str, ...]:
        """The name parts asked for, in order; what comes after a case for all is never reached."""
        found = []
        for part, _ in self.cases:
            if part is None:
                break
            found.append(part)
        return tuple(found)

    @property
    def is_gradient(self) -> bool:
        return any(len(values) > 1 for _, values in self.cases)

    def value_or_refuse(self, where: str) -> Scalar:
        """The one value.

        Raises:
            UsageError: there are several.
        """
        if not self.is_constant:
            raise UsageError(
                f"{_WHERE}: {where} varies over layers or tensors, which a recipe cannot say for it; "
                "use one value and where rules with lambda or density."
            )
        return self.cases[0][1][0]

    def at(self, part: str | None, depth: float) -> Scalar | None:
        """The value for tensors whose name holds ``part`` (None: none of the parts), at relative depth 0 to 1."""
        for asked, values in self.cases:
            if asked is None or asked == part:
                return _interpolate(values, depth)
        return None

    def times(self, other: ParameterSetting, where: str) -> ParameterSetting:
        """This, times a setting with one value."""
        factor = float(other.value_or_refuse(where))
        return ParameterSetting(tuple((part, tuple(float(v) * factor for v in values)) for part, values in self.cases))


def read_setting(value: Any, where: str) -> ParameterSetting:
    """A parameter's value: one, a list over layers, or cases with filters.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(value, list) and value and all(isinstance(case, dict) for case in value):
        return ParameterSetting(tuple(_case(case, where) for case in value))
    if isinstance(value, dict):
        return ParameterSetting((_case(value, where),))
    return ParameterSetting(((None, _values(value, where)),))


def where_rules(settings: Mapping[str, ParameterSetting], base: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rules for what varies, and the values that hold elsewhere.

    Args:
        settings: by parameter.
        base: gradients need the number of layers, so the base's folder.

    Raises:
        UsageError: several parameters vary by different filters, or the number of layers can't be found.
    """
    varying = {key: setting for key, setting in settings.items() if not setting.is_constant}
    defaults = {key: value for key, setting in settings.items() if (value := setting.at(None, 0)) is not None}
    filtered = [setting.filters for setting in varying.values() if setting.filters]
    if any(filters != filtered[0] for filters in filtered):
        raise UsageError(f"{_WHERE}: {' and '.join(varying)} vary by different filters; write the where rules by hand.")
    parts: list[str | None] = [*(filtered[0] if filtered else ()), None]
    layers = _layers(base) if any(setting.is_gradient for setting in varying.values()) else None
    rules = [rule for part in parts for rule in _rules_for(part, varying, defaults, layers)]
    return rules, defaults


@dataclass(frozen=True)
class _Layers:
    """The base's tensors by layer stack, to leave out rules that would match nothing."""

    counts: Mapping[str, int]
    names: tuple[tuple[str, str], ...]

    def any_left(self, part: str) -> bool:
        """Whether a tensor outside all layers has ``part`` in its name."""
        return any(part in name for name, where in self.names if ".layers[" not in where)

    def any_in(self, part: str | None, layer: str) -> bool:
        return any((part is None or part in name) and where == layer for name, where in self.names)


def _rules_for(
    part: str | None, varying: Mapping[str, ParameterSetting], defaults: Mapping[str, Any], layers: _Layers | None
) -> Iterator[dict[str, Any]]:
    match = {} if part is None else {"match": f"*{glob.escape(part)}*"}
    for stack, count in (layers.counts if layers is not None else {}).items():
        for index in range(count):
            place = f"{stack}.layers[{index}]"
            values = _values_at(varying, part, index / max(count - 1, 1))
            same = part is None and values == {key: defaults.get(key) for key in values}
            if layers is not None and layers.any_in(part, place) and not same:
                yield {"part": place, **match, **values}
    if part is not None and (layers is None or layers.any_left(part)):
        yield {**match, **_values_at(varying, part, 0)}


def _values_at(varying: Mapping[str, ParameterSetting], part: str | None, depth: float) -> dict[str, Any]:
    return {key: value for key, setting in varying.items() if (value := setting.at(part, depth)) is not None}


def _layers(base: Path) -> _Layers:
    if not base.is_dir():
        raise UsageError(
            f"{_WHERE}: gradients need the number of layers, but {base} is no folder here; download it first."
        )
    checkpoint = Checkpoint.open(base)
    parts = Parts(checkpoint)
    return _Layers(parts.layers, tuple((name, parts.of(name)) for name in checkpoint.tensors))


def _case(case: Mapping[str, Any], where: str) -> tuple[str | None, tuple[Scalar, ...]]:
    unknown = [key for key in case if key not in ("filter", "value")]
    if unknown or "value" not in case:
        raise UsageError(f"{_WHERE}: {where}: a case has a value and maybe a filter, not {', '.join(map(str, case))}.")
    part = case.get("filter")
    return (None if part in (None, "*") else str(part)), _values(case["value"], where)


def _values(value: Any, where: str) -> tuple[Scalar, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(one, (int, float, bool, str)) for one in values):
        raise UsageError(f"{_WHERE}: {where}: can't read {value!r} as a value or a list of values over the layers.")
    return tuple(values)


def _interpolate(values: tuple[Scalar, ...], depth: float) -> Scalar:
    """Linear between numbers at even distances; steps between texts and flags."""
    if len(values) == 1:
        return values[0]
    place = depth * (len(values) - 1)
    low = min(int(place), len(values) - 1)
    first, second = values[low], values[min(low + 1, len(values) - 1)]
    if isinstance(first, (bool, str)) or isinstance(second, (bool, str)):
        return first
    share = place - low
    return (1 - share) * first + share * second
