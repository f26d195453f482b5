"""All methods and stages as tables, from what they say of themselves. Loads no torch.

``python -m ktmerge.merge.catalogue docs/methods.md`` writes them between that page's markers; without a page, they are
printed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import getdoc
from pathlib import Path
from typing import Any

from ktmerge.errors import UsageError
from ktmerge.merge.needs import needs_of
from ktmerge.merge.registry import methods, stages
from ktmerge.merge.settings import Setting, blend_setting
from ktmerge.merge.stage import KINDS, Need, Stage
from ktmerge.recipes.schema import Blend

NO_DATA = "none"
"""What a method that asks for no measurement needs of data."""

_DIFFERS = re.compile(r"^Differs from .*?(?=\n\s*\n|\nDiffers from |\Z)", re.MULTILINE | re.DOTALL)


def data_of(setting: Setting) -> str:
    """What has to be measured on data before a blend with this setting, in words; `NO_DATA` if nothing."""
    needs = {need for pipeline in setting.pipelines.values() for need in needs_of(pipeline)}
    return ", ".join(_words(needs)) or NO_DATA


def data_of_recipe(blend: Blend) -> str:
    """The same for a recipe's blend section; methods of other tools need nothing measured and are not asked."""
    return NO_DATA if ":" in (blend.method or "") else data_of(blend_setting(blend))


def defaults(setting: Setting) -> dict[str, Any]:
    """The parameters of what a method does to matrices, and lambda."""
    pipeline = setting.pipelines["matrix"]
    return {**pipeline.parameters(), "lambda": setting.lambda_}


def differences() -> Iterator[tuple[str, str]]:
    """Name of a stage, and one thing it does otherwise than others, from its docstring."""
    for stage in stages().values():
        for found in _DIFFERS.findall(getdoc(stage.apply) or ""):
            yield stage.name, " ".join(found.split())


def method_table() -> str:
    """All methods at their defaults, in Markdown; the cost is per matrix of o outputs, i inputs and N experts."""
    columns = ("method", "experts", "when", "merged delta", "data", "cost", "defaults", "source")
    rows = []
    for one in methods().values():
        setting = blend_setting(Blend(method=one.name))
        told = ", ".join(f"{key} {_plain(value)}" for key, value in defaults(setting).items())
        rows.append(
            (f"`{one.name}`", one.takes, one.summary, _code(one.formula), data_of(setting), _code(one.cost),
             told, one.source)
        )  # fmt: skip
    return _table(columns, rows)


def stage_table() -> str:
    """All stages in the order in which a tensor goes through them, in Markdown."""
    rows = [
        (kind, f"`{stage.name}`", stage.summary, ", ".join(_parameters(stage)))
        for kind in KINDS
        for stage in stages().values()
        if stage.kind == kind
    ]
    return _table(("kind", "stage", "what it does", "parameters"), rows)


def difference_list() -> str:
    """What stages do otherwise, in Markdown."""
    users = _users()
    found = []
    for name, text in differences():
        used = ", ".join(f"`{one}`" for one in users.get(name, ()) if one != name)
        found.append(f"* `{name}`{f' (in {used})' if used else ''}: {text[:1].lower()}{text[1:]}")
    return "\n".join(found)


SECTIONS = {"methods": method_table, "stages": stage_table, "differences": difference_list}
"""What stands between the markers ``<!-- name -->`` and ``<!-- end of name -->`` of a page."""


def fill(page: str) -> str:
    """The page with its sections written anew.

    Raises:
        UsageError: a marker is missing.
    """
    for name, make in SECTIONS.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        if page.count(start) != 1 or page.count(end) != 1:
            raise UsageError(f"the page needs one line '{start.strip()}' and, below it, one '{end.strip()}'.")
        before, _, rest = page.partition(start)
        page = f"{before}{start}\n{make()}\n\n{end}{rest.partition(end)[2]}"
    return page


def _words(needs: Iterable[Need]) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for need in sorted(needs, key=lambda need: (need.measure, need.of)):
        found.setdefault(need.measure if need.measure != "fisher" else "Fisher", []).append(need.of)
    for measure, models in sorted(found.items()):
        yield f"{measure} of {' and '.join(models)}"


def _parameters(stage: Stage) -> Iterator[str]:
    for name, field in stage.parameters.model_fields.items():
        yield f"{name} ({'needed' if field.is_required() else _plain(field.default)})"


def _users() -> Mapping[str, list[str]]:
    """Methods by the stages they are made of."""
    found: dict[str, list[str]] = {}
    for method in methods().values():
        pipelines = blend_setting(Blend(method=method.name)).pipelines.values()
        for name in {use.stage.name for pipeline in pipelines for use in pipeline.uses}:
            found.setdefault(name, []).append(method.name)
    return found


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str]) -> None:
    """Write the sections of the pages named, or print them."""
    for name in arguments:
        path = Path(name)
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
    if not arguments:
        print("\n\n".join(make() for make in SECTIONS.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
