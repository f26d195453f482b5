"""Commands that do the whole job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ktmerge.commands.app import app
from ktmerge.commands.options import (
    DeviceOption,
    JsonOption,
    OutOption,
    OverwriteOption,
    ResumeOption,
    SetOption,
)


@app.command(epilog="Example: ktmerge run recipe.yaml --out result")
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe with finetune, blend and eval sections.")],
    out: OutOption,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Go the whole way of a recipe: fine-tune, measure, blend, score, report."""
    from ktmerge import api, console

    loaded = api.load_recipe(recipe, overrides=set_ or ())
    result = api.run(
        loaded, out, device=device, resume=resume, overwrite=overwrite, progress=console.TerminalProgress()
    )
    if json_:
        console.print_json(result.to_json())
    else:
        if result.results is not None:
            console.stdout().print(result.results.table())
        console.print_pairs(result.pairs())


@app.command(epilog="Example: ktmerge demo --out ktmerge-demo")
def demo(out: OutOption = Path("ktmerge-demo")) -> None:
    """Do the whole job on a small real model: two fine-tunes, blends, scores, a report."""
    from ktmerge import console
    from ktmerge.demo import run_demo

    console.print_pairs({"report": str(run_demo(out, progress=console.TerminalProgress()))})
