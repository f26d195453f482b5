"""The command that searches."""

from __future__ import annotations

import shlex
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
    SetOption,
)


@app.command(
    epilog="Example: ktmerge sweep recipe.yaml --range blend.lambda=0:1.2 --range blend.density=0.05:1 --out found"
)
def sweep(
    recipe: Annotated[str, typer.Argument(help="A recipe with an eval section, or a gallery name with --suite.")],
    out: OutOption,
    range_: Annotated[
        list[str] | None,
        typer.Option("--range", help="key=low:high, key=low:high:log, key=low:high:int or key=a|b|c. Repeatable."),
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="Methods to try, with commas between.")] = None,
    suite: Annotated[Path | None, typer.Option("--suite", "-s", help="Suite to choose on; else the recipe's.")] = None,
    held_out: Annotated[
        Path | None, typer.Option("--held-out", help="Suite to report on; else the rows the suite keeps for that.")
    ] = None,
    keep_upstream: Annotated[
        float | None,
        typer.Option(help="Least upstream score, as a share of the base's; by default 0.99, of greedy soups none."),
    ] = None,
    gain_share: Annotated[
        float, typer.Option(help="Share of the experts' downstream gain that counts as reached; chooses nothing.")
    ] = 0.9,
    trials: Annotated[int | None, typer.Option(help="Candidates in all, whoever scores them; by default 60.")] = None,
    sampler: Annotated[
        str,
        typer.Option(
            help="auto, nsga2, tpe, gp, grid, qmc or curve turn numbers; greedy adds experts, the best first, and "
            "keeps those that do no harm."
        ),
    ] = "auto",
    screen: Annotated[
        str | None,
        typer.Option(help="How candidates are compared at first: subset of the items (default), divergence, or full."),
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="Of the selection items that are for screening; by default 0.5.")
    ] = None,
    finalists: Annotated[
        int | None, typer.Option(help="Most candidates that are scored on all selection items; by default 8.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    seeds: Annotated[
        int, typer.Option(help="Draws of each candidate's random masks, over which its scores are averaged.")
    ] = 1,
    storage: Annotated[
        str | None, typer.Option(help="URL of a database that workers share; else a journal file in --out.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that share the work.")] = 1,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit the workers as Slurm jobs.")] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Run the workers on the Ray cluster there is.")] = False,
    base: BaseOption = None,
    expert: ExpertOption = None,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with this sweep, or join its workers.")] = False,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Search for the blend that learns most and keeps enough; report it on items that chose nothing."""
    from ktmerge import api, console

    loaded = api.load_recipe(recipe, overrides=set_ or (), base=base, experts=expert or ())
    outcome = api.sweep(
        loaded, out, ranges=range_ or (), methods=[one.strip() for one in method.split(",")] if method else (),
        suite=suite, held_out=held_out, keep_upstream=keep_upstream, gain_share=gain_share, trials=trials,
        sampler=sampler, screen=screen, share=share, finalists=finalists, seed=seed, seeds=seeds, storage=storage,
        workers=workers, slurm=slurm, ray=ray, device=device, resume=resume, overwrite=overwrite,
        progress=console.TerminalProgress(),
    )  # fmt: skip
    if json_:
        console.print_json(outcome.to_json())
        return
    console.print_table(*outcome.table())
    for line in [*outcome.statement(), *outcome.cautions()]:
        console.stdout().print(line, markup=False, highlight=False)
    files = {name: str(path) for name, path in api.sweep_files(out).items()}
    if outcome.chosen is not None:
        files["blend it"] = f"ktmerge blend --recipe {shlex.quote(files['chosen recipe'])} --out blended"
    console.print_pairs(files)
