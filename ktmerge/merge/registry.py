"""Every stage and method by name. Files in `ktmerge.merge.methods` are found by themselves; none loads torch."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ParamSpec, TypeVar

from ktmerge.errors import UsageError, did_you_mean
from ktmerge.merge.stage import Kind, Method, Parameters, Stage

Declared = ParamSpec("Declared")
Apply = TypeVar("Apply", bound=Callable[..., Any])
Provider = Callable[[str], Method]
Found = TypeVar("Found", Method, Stage)

_FOLDER = "ktmerge.merge.methods"
_STAGES: dict[str, Stage] = {}
_METHODS: dict[str, Method] = {}
_PROVIDERS: dict[str, Provider] = {}


def stage(
    name: str, kind: Kind, parameters: type[Parameters] = Parameters, **declared: Any
) -> Callable[[Apply], Apply]:
    """Register the decorated function as a stage; ``declared`` are further attributes of `Stage`.

    Raises:
        ValueError: the name is taken.
    """

    def register(apply: Apply) -> Apply:
        if name in _STAGES:
            raise ValueError(f"two stages are called '{name}'")
        _STAGES[name] = Stage(name, kind, parameters, apply, **declared)
        return apply

    return register


def _registering(make: Callable[Declared, Method]) -> Callable[Declared, Method]:
    def register(*values: Declared.args, **named: Declared.kwargs) -> Method:
        new = make(*values, **named)
        if new.name in _METHODS:
            raise ValueError(f"two methods are called '{new.name}'")
        _METHODS[new.name] = new
        return new

    return register


method = _registering(Method)
"""Register a method, given the attributes of `Method`; ValueError if its name is taken."""


def provider(prefix: str) -> Callable[[Provider], Provider]:
    """Register the decorated function as the source of all methods called ``prefix:something``."""

    def register(provide: Provider) -> Provider:
        _PROVIDERS[prefix] = provide
        return provide

    return register


def methods() -> dict[str, Method]:
    """All methods by name, sorted."""
    _discover()
    return dict(sorted(_METHODS.items()))


def stages() -> dict[str, Stage]:
    """All stages by name, sorted."""
    _discover()
    return dict(sorted(_STAGES.items()))


def find_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        UsageError: there is none.
    """
    found = _found(name, _METHODS)
    if found is not None:
        return found
    prefix, colon, rest = name.partition(":")
    if colon and prefix in _PROVIDERS:
        return _PROVIDERS[prefix](rest)
    if name in _STAGES:
        raise UsageError(f"'{name}' is no method but a {_STAGES[name].kind} stage; write it under stages.")
    known = [*_METHODS, *(f"{prefix}:<name>" for prefix in _PROVIDERS)]
    raise UsageError(f"there is no method '{name}'.{did_you_mean(name, known)}")


def find_stage(name: str, kind: Kind) -> Stage:
    """The stage called ``name``, which must be of that kind.

    Raises:
        UsageError: there is none, or it is of another kind.
    """
    found = _found(name, _STAGES)
    if found is None:
        same = [stage.name for stage in _STAGES.values() if stage.kind == kind]
        raise UsageError(f"there is no {kind} stage '{name}'.{did_you_mean(name, same)}")
    if found.kind != kind:
        raise UsageError(f"'{name}' is a {found.kind} stage; write it under {found.kind}, not {kind}.")
    return found


def _found(name: str, registered: Mapping[str, Found]) -> Found | None:
    """What is registered under a name. Its file is called as it begins, as a rule: all files are read if not."""
    if name not in registered:
        words = name.split("_")
        beginnings = ("_".join(words[:count]) for count in range(len(words), 0, -1))
        file = next((file for file in beginnings if file in _files()), None)
        if file is not None:
            importlib.import_module(f"{_FOLDER}.{file}")
    if name not in registered:
        _discover()
    return registered.get(name)


@cache
def _discover() -> None:
    for file in _files():
        importlib.import_module(f"{_FOLDER}.{file}")


@cache
def _files() -> tuple[str, ...]:
    folder = importlib.import_module(_FOLDER)
    return tuple(module.name for module in pkgutil.iter_modules(folder.__path__))
