"""Commands that only look."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ktmerge.commands.app import app
from ktmerge.commands.options import (
    JsonOption,
    OverwriteOption,
)


@app.command(epilog="Example: ktmerge inspect ./base runs/spam kjv=runs/kjv-2 --plot moved.png")
def inspect(
    base: Annotated[str, typer.Argument(help="Base model.")],
    tuned: Annotated[
        list[str] | None, typer.Argument(help="Tuned models to hold against it: folders, or name=folder.")
    ] = None,
    headers: Annotated[
        bool, typer.Option("--headers", help="Read only the files' headers: names, shapes, parts.")
    ] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer by itself.")] = False,
    common: Annotated[
        bool, typer.Option("--common", help="Also say how much two or more tuned models have in common; takes minutes.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw layer by kind of tensor into this PNG, SVG or PDF file.")
    ] = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Show what is in a checkpoint and how far tuned models moved from it, by part and layer."""
    from ktmerge import api, console

    result = api.inspect(
        base, tuned or (), headers_only=headers, common=common, plot=plot, overwrite=overwrite,
        progress=console.TerminalProgress(),
    )  # fmt: skip
    if json_:
        console.print_json(result.to_json())
    else:
        for columns, rows, title in result.tables(layers=layers):
            console.print_table(columns, rows, title)
        for warning in result.warnings:
            console.stdout().print(f"warning: {warning}", markup=False)


@app.command(epilog="Example: ktmerge recommend ./base spam=runs/spam kjv=runs/kjv --statistics")
def recommend(
    base: Annotated[str, typer.Argument(help="Base model.")],
    tuned: Annotated[list[str], typer.Argument(help="Tuned models: folders, or name=folder.")],
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Data of both sides are at hand to measure on.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Say which three recipes to try on these models, why, and with which commands."""
    from ktmerge import api, console

    found = api.recommend(base, tuned, statistics=statistics, progress=console.TerminalProgress())
    if json_:
        console.print_json(found.to_json())
        return
    for columns, rows, title in found.tables():
        console.print_table(columns, rows, title)
    for line in (*(f"warning: {one}" for one in found.warnings), *found.prepare, *found.commands.values()):
        console.stdout().print(line, markup=False, highlight=False, soft_wrap=True)


@app.command(epilog="Example: ktmerge doctor")
def doctor(json_: JsonOption = False) -> None:
    """Look at this machine: versions, devices, memory, disk, and installs known to break."""
    from ktmerge import console
    from ktmerge.doctor import examine

    findings = examine()
    if json_:
        console.print_json([finding.to_json() for finding in findings])
    else:
        console.print_table(("", "what", "found"), [(f.mark, f.what, f.found) for f in findings])
    if any(finding.broken for finding in findings):
        raise typer.Exit(1)
