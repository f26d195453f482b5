"""All methods and stages as tables, from what they say of themselves. Loads no torch.

``python -m ktmerge.merge.catalogue docs/methods.md`` writes them between that page's markers; without a page, they are
printed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmerge.errors import UsageError
from ktmerge.merge.registry import methods, stages
from ktmerge.merge.settings import Setting, blend_setting
from ktmerge.merge.stage import KINDS, Method, Need, Stage
from ktmerge.recipes.schema import Blend

NO_DATA = "none"
"""What a method that asks for no measurement needs of data."""

_DIFFERS = re.compile(r"^Differs from .*?(?=\n\s*\n|\nDiffers from |\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """One method as people read of it.

    Attributes:
        name: in recipes.
        experts: how many it takes.
        when: to use it.
        formula: of the merged delta.
        data: what has to be measured before.
        cost: per matrix of o outputs, i inputs and N experts.
        defaults: its parameters.
        source: paper.
    """

    name: str
    experts: str
    when: str
    formula: str
    data: str
    cost: str
    defaults: str
    source: str


def entries() -> list[Entry]:
    """Every registered method, by name."""
    return [entry(method) for method in methods().values()]


def entry(method: Method) -> Entry:
    """What is said of one method, at its defaults."""
    setting = blend_setting(Blend(method=method.name))
    return Entry(
        name=method.name,
        experts=_experts(method.experts),
        when=method.summary,
        formula=method.formula,
        data=data_of(setting),
        cost=method.cost,
        defaults=", ".join(f"{key} {_plain(value)}" for key, value in defaults(setting).items()),
        source=method.source,
    )


def data_of(setting: Setting) -> str:
    """What has to be measured on data before a blend with this setting, in words; `NO_DATA` if nothing."""
    needs = {
        need for line in setting.pipelines.values() for use in line.uses for need in use.stage.needs(use.parameters)
    }
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
        for found in _DIFFERS.findall(_docstring(stage)):
            yield stage.name, " ".join(found.split())


def method_table() -> str:
    """All methods, in Markdown."""
    columns = ("method", "experts", "when", "merged delta", "data", "cost", "defaults", "source")
    rows = [(f"`{e.name}`", e.experts, e.when, _code(e.formula), e.data, _code(e.cost), e.defaults, e.source)
            for e in entries()]  # fmt: skip
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


def _experts(bounds: tuple[int, int | None]) -> str:
    least, most = bounds
    return str(least) if least == most else f"{least} or more" if most is None else f"{least} to {most}"


def _words(needs: Iterable[Need]) -> Iterator[str]:
    names: dict[str, str] = {"fisher": "Fisher"}
    found: dict[str, list[str]] = {}
    for need in sorted(needs, key=lambda need: (need.measure, need.of)):
        found.setdefault(names.get(need.measure, need.measure), []).append(need.of)
    for measure, models in sorted(found.items()):
        yield f"{measure} of {' and '.join(models)}"


def _parameters(stage: Stage) -> Iterator[str]:
    for name, field in stage.parameters.model_fields.items():
        yield f"{name} ({'needed' if field.is_required() else _plain(field.default)})"


def _users() -> Mapping[str, list[str]]:
    """Methods by the stages they are made of."""
    found: dict[str, list[str]] = {}
    for method in methods().values():
        for pipeline in blend_setting(Blend(method=method.name)).pipelines.values():
            for use in pipeline.uses:
                if method.name not in found.setdefault(use.stage.name, []):
                    found[use.stage.name].append(method.name)
    return found


def _docstring(stage: Stage) -> str:
    lines = (stage.apply.__doc__ or "").splitlines()
    return "\n".join(line.strip() for line in lines)


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
