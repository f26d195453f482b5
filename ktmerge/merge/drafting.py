"""A first recipe from a few answers, with comments that say what to turn. Loads no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import yaml

from ktmerge.checkpoints.expressions import PartExpression
from ktmerge.errors import UsageError
from ktmerge.merge.catalogue import NO_DATA, data_of_recipe
from ktmerge.merge.diagnostics.signs import Signs
from ktmerge.merge.recommendation import Advice, choose
from ktmerge.recipes import load_recipe
from ktmerge.recipes.schema import Blend

Lean = Literal["upstream", "balanced", "downstream"]
LEANS: tuple[Lean, ...] = ("upstream", "balanced", "downstream")


def draft(
    name: str,
    base: str,
    experts: Mapping[str, str],
    *,
    statistics: bool = False,
    keep: Sequence[str] = (),
    lean: str = "balanced",
) -> str:
    """The text of a recipe for these models: the method to try first, its knob where ``lean`` wants it.

    Args:
        name: of the recipe.
        base: folder or hub id.
        experts: models by name.
        statistics: whether data of both sides are at hand to measure on.
        keep: part expressions that stay the base's.
        lean: what matters most: what the base could (``upstream``), what was learned (``downstream``), or both.

    Raises:
        UsageError: no experts, an unknown ``lean``, or a part that cannot be read.
    """
    if not experts:
        raise UsageError("a recipe blends at least one expert: name=model.")
    if lean not in LEANS:
        raise UsageError(f"'{lean}': lean towards {', '.join(LEANS)}.")
    for part in keep:
        PartExpression.parse(part)
    unmeasured = Signs(
        experts=len(experts), statistics=statistics, relative=0.0, changed=1.0, small=0.0, rank=None, cosine=None,
        conflict=None, effective=float(len(experts)),
    )  # fmt: skip
    advice = choose(unmeasured)[0]
    recipe = load_recipe(advice.recipe)
    assert recipe.blend is not None
    measured, rounding = data_of_recipe(recipe.blend) != NO_DATA, recipe.output.rounding
    lines = [
        "# Check it:  ktmerge recipe check THIS_FILE      what it will do:  ktmerge recipe explain THIS_FILE",
        "# In an editor: ktmerge recipe schema > recipe.schema.json, and as first line here:",
        "#   # yaml-language-server: $schema=recipe.schema.json",
        "ktmerge: 1",
        f"name: {_scalar(name)}",
        f"base: {_scalar(base)}   # a folder, relative to this file, or org/name@revision",
        "experts:",
        *_experts(experts, measured),
        *(["statistics: {data: upstream.jsonl}   # what the base should not forget"] if measured else []),
        *_blend(recipe.blend, advice, keep, lean),
        "output:",
        "  dtype: base   # each tensor in the base's type",
        f"  rounding: {rounding}   # stochastic keeps small changes on average, nearest is what others do",
        "seed: 42   # of whatever is drawn",
        "# What to score, so that both sides are proven (docs/scoring.md):",
        "# eval: {suite: suite.yaml}",
    ]
    return "\n".join(lines) + "\n"


def _experts(experts: Mapping[str, str], measured: bool) -> Iterator[str]:
    for name, model in experts.items():
        yield f"  {_scalar(name)}:"
        yield f"    model: {_scalar(model)}"
        if len(experts) > 1:
            yield "    weight: 1.0   # its share"
        if measured:
            yield "    statistics:   # 'ktmerge run' measures"
            yield f"      data: {_scalar(f'{name}.jsonl')}   # what it was tuned on"


def _blend(blend: Blend, advice: Advice, keep: Sequence[str], lean: str) -> Iterator[str]:
    key, values = advice.sweep[0].rpartition(".")[2], sorted(advice.sweep[1])
    chosen = {"upstream": values[0], "balanced": values[len(values) // 2], "downstream": values[-1]}[lean]
    yield "blend:"
    yield f"  method: {blend.method}   # {advice.why}"
    told = f"from {values[0]:g} (nearer to the base) to {values[-1]:g} (nearer to the experts)"
    yield f"  {key}: {chosen:g}   # turn this: {told}"
    if keep:
        yield "  where:   # the first rule that matches decides"
    for part in keep:
        yield f"    - part: {_scalar(part)}"
        yield "      keep: base   # copied byte for byte"


def _scalar(text: str) -> str:
    """Text as YAML, quoted where it has to be."""
    return textwrap.dedent(yaml.safe_dump(text, allow_unicode=True, width=10**6)).removesuffix("...\n").strip()
