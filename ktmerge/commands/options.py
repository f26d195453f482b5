"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# typer reads annotations at run time, so these stay ... | None for Python 3.10.
RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="A recipe file, or a gallery name (ktmerge recipe list).")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key of the recipe, e.g. blend.lambda=0.8. Repeatable.")
]
JobSetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key: max_length=512; with --recipe one of the recipe's. Repeatable."),
]
BaseOption = Annotated[str | None, typer.Option("--base", help="Base model: folder or hub id; replaces the recipe's.")]
ExpertOption = Annotated[
    list[str] | None,
    typer.Option(
        "--expert", help="A tuned model, as model, name=model or name=model:weight; replaces the recipe's. Repeatable."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output, in one step.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")]
RehashOption = Annotated[
    bool, typer.Option("--rehash", help="Read every input again, also what seems unchanged since its sha256 was taken.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Where the result goes.")]
