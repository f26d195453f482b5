"""Commands about deltas."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ktmerge.commands.app import deltas
from ktmerge.commands.options import JsonOption, OutOption, OverwriteOption

BaseArgument = Annotated[str, typer.Argument(help="The base: folder or hub id.")]


@deltas.command("export", epilog="Example: ktmerge delta export ./base blended --out blended-delta")
def delta_export(
    base: BaseArgument,
    model: Annotated[str, typer.Argument(help="What to hand over: folder or hub id.")],
    out: OutOption,
    error: Annotated[
        float | None,
        typer.Option(help="Leave out so much of each tensor's change, in norm (0.01: 1 %); default: nothing."),
    ] = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Write what a model is apart from its base: a fraction of its size, exact unless --error allows less."""
    from ktmerge import api, console

    report = api.export_delta(
        base, model, out, error=error, overwrite=overwrite, progress=console.TerminalProgress()
    )  # fmt: skip
    console.print_json(report.to_json()) if json_ else console.print_pairs(report.pairs())


@deltas.command("apply", epilog="Example: ktmerge delta apply ./base blended-delta --out blended")
def delta_apply(
    base: BaseArgument,
    delta: Annotated[Path, typer.Argument(help="Folder that 'ktmerge delta export' wrote.")],
    out: OutOption,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Make the model again from its base and the delta; another base is refused."""
    from ktmerge import api, console

    report = api.apply_delta(base, delta, out, overwrite=overwrite, progress=console.TerminalProgress())
    console.print_json(report.to_json()) if json_ else console.print_pairs(report.pairs())
