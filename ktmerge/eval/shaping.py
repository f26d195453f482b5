"""Rows as a task wants them: lists taken apart, columns of other data added, rows left out. Knows no prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ktmerge.errors import UsageError
from ktmerge.eval.templates import Column, Template, missing_column
from ktmerge.recipes.rows import Row


def taken_apart(rows: Sequence[Row], each: Mapping[str, str], task: str) -> list[Row]:
    """A row for each place in the lists of some columns; numbered anew.

    Args:
        rows: with lists.
        each: new column and the column of lists that it is taken from.
        task: names the task in messages.

    Raises:
        UsageError: no such column, no list, or lists of different lengths in one row.
    """
    if not each:
        return list(rows)
    where = f"task '{task}', each"
    found: list[Row] = []
    for row in rows:
        lists: dict[str, Sequence[Any]] = {}
        for name, column in each.items():
            if column not in row.values:
                raise missing_column(where, row, [column])
            value = row.values[column]
            if not isinstance(value, list | tuple):
                raise UsageError(f"{where}: {row.where} has {value!r} in '{column}', a list is needed.")
            lists[name] = value
        lengths = {len(value) for value in lists.values()}
        if len(lengths) > 1:
            counts = ", ".join(f"{len(value)} in '{each[name]}'" for name, value in lists.items())
            raise UsageError(f"{where}: {row.where} has lists of different lengths: {counts}.")
        for place in range(lengths.pop()):
            own = {name: value[place] for name, value in lists.items()}
            found.append(Row(len(found), f"{row.where}, number {place + 1}", {**row.values, **own}, row.number))
    if not found:
        raise UsageError(f"{where}: the lists of all {len(rows)} rows are empty.")
    return found


def joined(rows: Sequence[Row], others: Sequence[Row], by: str, key: str, task: str) -> list[Row]:
    """Rows with the columns that they lack of the other row that belongs to each.

    Args:
        rows: what gets columns.
        others: rows with a name of their own in column ``key``.
        by: column, or expression, of ``rows`` that gives such a name.
        key: column of ``others``.
        task: names the task in messages.

    Raises:
        UsageError: no such column, a name that stands twice, or rows that nothing belongs to.
    """
    where = f"task '{task}', join"
    by_name: dict[str, Row] = {}
    for other in others:
        if key not in other.values:
            raise missing_column(where, other, [key])
        name = str(other.values[key])
        if name in by_name:
            raise UsageError(f"{where}: '{name}' stands in {by_name[name].where} and in {other.where}.")
        by_name[name] = other
    named = Column(by, where)
    found: list[Row] = []
    for row in rows:
        name = str(named.value(row))
        if name not in by_name:
            raise UsageError(
                f"{where}: {row.where} asks for {key} '{name}', which is in none of the {len(others)} rows."
            )
        found.append(replace(row, values={**by_name[name].values, **row.values}))
    return found


def kept(rows: Sequence[Row], condition: str | None, task: str) -> list[Row]:
    """The rows for which an expression is true; they keep their numbers.

    Raises:
        UsageError: the expression fails on a row, or is true for none.
    """
    if condition is None:
        return list(rows)
    where = f"task '{task}', where"
    template = Template(condition, where)
    found = [row for row in rows if _is_true(template.value(row), row, where)]
    if not found:
        raise UsageError(f"{where}: true for none of the {len(rows)} rows.")
    return found


def _is_true(value: Any, row: Row, where: str) -> bool:
    if isinstance(value, str):
        if value.strip().lower() not in ("true", "false"):
            raise UsageError(
                f"{where}: gives {value!r} for {row.where}; it must be one {{{{ expression }}}}, true or false."
            )
        return value.strip().lower() == "true"
    return bool(value)
