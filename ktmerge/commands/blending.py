"""Commands that blend, and what belongs to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ktmerge.commands.app import app
from ktmerge.commands.options import (
    BaseOption,
    DeviceOption,
    ExpertOption,
    JsonOption,
    OutOption,
    OverwriteOption,
    RecipeOption,
    ResumeOption,
    SetOption,
)


@app.command(epilog="Example: ktmerge blend --recipe ties --base ./base --expert spam=runs/spam --out blended")
def blend(
    file: Annotated[str | None, typer.Argument(metavar="[recipe]", help="The same as --recipe.")] = None,
    recipe: RecipeOption = "",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the blended model goes.")] = None,
    trial: Annotated[int | None, typer.Option("--trial", help="Instead of a recipe: a trial of --study.")] = None,
    study: Annotated[Path | None, typer.Option("--study", help="Folder of a sweep.")] = None,
    storage: Annotated[str | None, typer.Option("--storage", help="The sweep's URL, if it needs a password.")] = None,
    base: BaseOption = None,
    expert: ExpertOption = None,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done to which tensors, and stop.")
    ] = False,
    lock: Annotated[
        Path | None, typer.Option("--lock", help="Refuse other inputs, settings or bytes than this lock says.")
    ] = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Blend base and experts into one ordinary checkpoint."""
    from ktmerge import api, console
    from ktmerge.allocation import share_one_heap

    if file is not None and recipe:
        raise typer.BadParameter(f"names another recipe beside '{file}'; give one.", param_hint="--recipe")
    recipe = recipe or file or ""
    if study is None and trial is None:
        if not recipe:
            raise typer.BadParameter(
                "give a file, or a name that 'ktmerge recipe list' shows, such as wise-ft; or a trial of a sweep "
                "(--trial, --study).", param_hint="--recipe",
            )  # fmt: skip
        if out is None and not dry_run:
            api.refuse_without_out(recipe, overrides=set_ or (), base=base, experts=expert or ())
        if out is not None:
            api.require_apart(recipe, out)
        loaded = api.load_recipe(recipe, overrides=set_ or (), base=base, experts=expert or ())
    else:
        loaded = api.trial_to_blend(
            study, trial, storage=storage, needs_out=out is None and not dry_run,
            besides={"--recipe": recipe, "--base": base, "--expert": expert, "--set": set_},
        )  # fmt: skip
    if dry_run or out is None:
        plan = api.plan(loaded)
        console.print_json(plan.to_json()) if json_ else console.print_table(*plan.table())
        return
    share_one_heap()
    progress = console.TerminalProgress()
    report = api.blend(loaded, out, device=device, resume=resume, overwrite=overwrite, lock=lock, progress=progress)
    if study is not None and trial is not None:
        for note in api.compare_with_trial(study, trial, out):
            report.notes.append(note)
            progress.note(note)
    console.print_json(report.to_json()) if json_ else console.print_table(*report.table())


@app.command("extract-lora", epilog="Example: ktmerge extract-lora ./base runs/spam --rank 16 --out adapter")
def extract_lora(
    base: Annotated[str, typer.Argument(help="Base model.")],
    tuned: Annotated[str, typer.Argument(help="Tuned model.")],
    out: OutOption,
    rank: Annotated[int, typer.Option(help="Rank of every layer.")] = 16,
    energy: Annotated[
        float | None, typer.Option(help="Instead: each layer's least rank that holds this share of its change.")
    ] = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Write what fine-tuning changed as a LoRA adapter, and say how much of it the rank holds."""
    from ktmerge import api, console

    result = api.extract_lora(
        base, tuned, out, rank=rank, energy=energy, overwrite=overwrite, progress=console.TerminalProgress()
    )
    console.print_json(result.to_json()) if json_ else console.print_table(*result.table())
