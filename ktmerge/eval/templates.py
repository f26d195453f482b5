"""Templates of a task over one row: sandboxed Jinja in which a column that isn't there is an error."""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ktmerge.errors import UsageError, did_you_mean
from ktmerge.recipes.rows import Row


class _NoTextError(ValueError):
    """A value that would stand in a prompt as Python writes it."""


def _printed(value: Any) -> Any:
    """What a template prints; null, lists and mappings are no text, and a prompt with them is a mistake in the data.

    So is a number that is none, as tables have it where a value is missing.
    """
    if isinstance(value, float) and value != value:
        raise _NoTextError(
            "it prints nan, a missing number, where text is needed; if that is meant, write '... | string'"
        )
    if value is None or isinstance(value, dict | list | tuple | bytes):
        kind = "null" if value is None else "a mapping" if isinstance(value, dict) else "bytes"
        kind = "a list" if isinstance(value, list | tuple) else kind
        raise _NoTextError(f"it prints {kind} where text is needed; if that is meant, write '... | string'")
    return value


MOST_STEPS = 100_000
"""How far the ranges of one template may count together over a row: nested loops end."""
MOST_LETTERS = 10_000_000
"""Length of what a template may make by multiplying."""
_steps: ContextVar[int] = ContextVar("steps", default=0)


def _range(*arguments: int) -> range:
    counted = range(*arguments)
    _steps.set(_steps.get() + len(counted))
    if _steps.get() > MOST_STEPS:
        raise OverflowError(f"its ranges count further than {MOST_STEPS:,} in all")
    return counted


class _Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox that ends: no endless ranges, no powers and products that fill the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _size_of(operator, left, right) > MOST_LETTERS:
            raise OverflowError(f"'{operator}' makes something too large")
        return super().call_binop(context, operator, left, right)


def _size_of(operator: str, left: Any, right: Any) -> int:
    """Length of a repeated text or list, or bits of a whole number; 0 for what cannot grow."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
    times, repeated = (left, right) if isinstance(left, int) else (right, left)
    if operator == "*" and isinstance(times, int) and isinstance(repeated, str | bytes | list | tuple):
        return len(repeated) * max(times, 0)
    return 0


_ENVIRONMENT = _Sandbox(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False, finalize=_printed)
_ENVIRONMENT.globals["range"] = _range


class Template:
    """One template of a task. ``where`` names it in messages, as in ``task 'capitals', prompt``."""

    def __init__(self, source: str, where: str) -> None:
        self._where = where
        try:
            self._columns = meta.find_undeclared_variables(_ENVIRONMENT.parse(source))
            self._template = _ENVIRONMENT.from_string(source)
        except TemplateSyntaxError as error:
            raise UsageError(
                f"{where}: not a valid template: {str(error.message).rstrip('.')} (line {error.lineno} of it)."
            ) from None
        self._expression = _sole_expression(source)

    def text(self, row: Row) -> str:
        """Render the template over ``row``.

        Raises:
            UsageError: a column is missing, or the template fails or asks for what the sandbox forbids.
        """
        return str(self._evaluate(self._template.render, row))

    def value(self, row: Row) -> Any:
        """What the template's expression is, with its type, if it is one ``{{ expression }}``; else its text."""
        if self._expression is None:
            return self.text(row)
        value = self._evaluate(self._expression, row)
        if isinstance(value, StrictUndefined):
            raise self._undefined(row, str(value._undefined_message))
        return value

    def _evaluate(self, function: Any, row: Row) -> Any:
        _steps.set(0)
        try:
            return function(row.values)
        except UndefinedError as error:
            raise self._undefined(row, str(error.message)) from None
        except SecurityError as error:
            raise UsageError(f"{self._where}: the template may not do this: {str(error).rstrip('.')}.") from None
        except _NoTextError as error:
            null = [name for name in sorted(self._columns) if name in row.values and row.values[name] is None]
            column = f" (null stands in '{null[0]}')" if null else ""
            raise UsageError(f"{self._where}: the template fails on {row.where}: {error}{column}.") from None
        except RecursionError:
            raise UsageError(f"{self._where}: the template fails on {row.where}: it calls itself endlessly.") from None
        except MemoryError:
            raise UsageError(
                f"{self._where}: the template fails on {row.where}: it makes something too large."
            ) from None
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UsageError(f"{self._where}: the template fails on {row.where}: {str(error).rstrip('.')}.") from None

    def _undefined(self, row: Row, message: str) -> UsageError:
        return missing_column(self._where, row, sorted(self._columns - row.values.keys()), message)


class Column:
    """A column by its name, or an expression over the row; ``where`` names it in messages."""

    def __init__(self, source: str, where: str) -> None:
        self._source, self._where = source, where
        self._template = Template(source, where) if is_template(source) else None

    def value(self, row: Row) -> Any:
        """What it holds in ``row``.

        Raises:
            UsageError: there is no such column, or the expression fails.
        """
        if self._template is not None:
            return self._template.value(row)
        if self._source not in row.values:
            raise missing_column(self._where, row, [self._source])
        return row.values[self._source]


def missing_column(where: str, row: Row, missing: list[str], message: str = "") -> UsageError:
    """The error for columns that a template needs and ``row`` lacks; ``message`` if it is not a matter of columns."""
    if not missing:
        return UsageError(f"{where}: the template fails on {row.where}: {message}.")
    near = did_you_mean(missing[0], row.values)
    hint = near if near.startswith(" Did you mean") else ""
    found = ", ".join(map(str, row.values)) or "none"
    return UsageError(f"{where}: {row.where} has no column '{missing[0]}'; its columns are: {found}.{hint}")


def is_template(source: str) -> bool:
    """Whether a text holds Jinja, and isn't just the name of a column."""
    return any(mark in source for mark in ("{{", "{%", "{#"))


def _sole_expression(source: str) -> Any:
    """The compiled expression of a template that is one ``{{ expression }}``, so that its type isn't lost; or None."""
    match = re.fullmatch(r"\{\{[-+]?(.*?)[-+]?\}\}", source.strip(), re.DOTALL)
    if match is None:
        return None
    try:
        return _ENVIRONMENT.compile_expression(match[1], undefined_to_none=False)
    except TemplateSyntaxError:
        return None
