"""Commands that score, compare and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ktmerge.commands.app import app
from ktmerge.commands.options import (
    BaseOption,
    DeviceOption,
    JsonOption,
    OutOption,
    OverwriteOption,
    SetOption,
)


@app.command(
    "eval", epilog="Example: ktmerge eval runs/spam blended --base ./base --suite suite.yaml --out scores.json"
)
def evaluate(
    models: Annotated[
        list[str] | None, typer.Argument(help="Model folders, or name=folder; without any, the base alone.")
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option("--suite", "-s", help="Suite file or name (ktmerge suite list). Repeatable: scored as one."),
    ] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="Take suite and base from this recipe.")] = None,
    base: BaseOption = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write scores (JSON) here.")] = None,
    batch_size: Annotated[
        str, typer.Option(help="Sequences per forward pass, or auto: what fits. Scores don't depend on it.")
    ] = "auto",
    device: DeviceOption = "auto",
    reference: Annotated[
        str | None, typer.Option("--reference", help="Name of the full fine-tune: for gain share and healed items.")
    ] = None,
    part: Annotated[
        str | None, typer.Option("--part", help="Rows to score: selection, report or all (see the suite's selection).")
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Score everything, even what was scored before.")
    ] = False,
    without_labels: Annotated[
        bool,
        typer.Option(
            "--without-labels", help="No scores: KL to the base upstream, to --expert downstream, for choosing."
        ),
    ] = False,
    expert: Annotated[
        list[str] | None, typer.Option("--expert", help="With --without-labels: name=model to learn from. Repeatable.")
    ] = None,
    line: Annotated[
        bool, typer.Option("--line", help="With --without-labels: models in a coefficient's order; compare neighbours.")
    ] = False,
    weight: Annotated[
        float, typer.Option("--weight", help="With --without-labels: of the experts in J, from 0 to 1.")
    ] = 0.5,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Score base and models on upstream and downstream sets, with the same code in one go."""
    from ktmerge import api, console

    if without_labels:
        given = {"--reference": reference is not None, "--no-cache": no_cache}
        _refuse(given, "means nothing with --without-labels; leave it out.")
        screened = api.screen(
            models or (), suite=suite, recipe=recipe, overrides=set_ or (), base=base, experts=expert or (), line=line,
            weight=weight, out=out, batch_size=_batch_size(batch_size), device=device, part=part, overwrite=overwrite,
            progress=console.TerminalProgress(),
        )  # fmt: skip
        console.print_json(screened.to_json()) if json_ else console.stdout().print(screened.table())
        return
    given = {"--expert": bool(expert), "--line": line, "--weight": weight != 0.5}
    _refuse(given, "means something with --without-labels only; add that.")
    results = api.evaluate(
        models or (), suite=suite, recipe=recipe, overrides=set_ or (), base=base, out=out,
        batch_size=_batch_size(batch_size), device=device, reference=reference, part=part, cache=not no_cache,
        overwrite=overwrite, progress=console.TerminalProgress(),
    )  # fmt: skip
    console.print_json(results.to_json()) if json_ else console.stdout().print(results.table())


def _refuse(options: dict[str, bool], why: str) -> None:
    for option, given in options.items():
        if given:
            raise typer.BadParameter(why, param_hint=option)


def _batch_size(text: str) -> int | None:
    """None for auto."""
    if text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise typer.BadParameter(f"'{text}' is neither a number of at least 1 nor auto.", param_hint="--batch-size")
    return None if text == "auto" else int(text)


@app.command(
    "import-scores",
    epilog="Example: ktmerge eval import base=logs/base tuned=logs/tuned --upstream gqa --downstream sqa -o s.json",
)
def import_scores(
    files: Annotated[
        list[str], typer.Argument(help="Result or sample files, or folders of such: name=path. Repeat a name for more.")
    ],
    base: Annotated[str | None, typer.Option("--base", help="Name of the untuned model; by default the first.")] = None,
    upstream: Annotated[list[str] | None, typer.Option(help="Set the model must keep. Repeatable.")] = None,
    downstream: Annotated[list[str] | None, typer.Option(help="Set it was tuned for. Repeatable.")] = None,
    metric: Annotated[list[str] | None, typer.Option("--metric", help="set=metric. Repeatable.")] = None,
    items: Annotated[
        list[str] | None, typer.Option("--items", help="set=N: items behind a total without standard error.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write scores (JSON) here.")] = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Join what lm_eval, lmms-eval or VLMEvalKit measured: also 'ktmerge eval import'."""
    from ktmerge import api, console

    results = api.import_scores(
        files, base=base, upstream=upstream or (), downstream=downstream or (), metrics=metric or (), items=items or (),
        out=out, overwrite=overwrite,
    )  # fmt: skip
    console.print_json(results.to_json()) if json_ else console.stdout().print(results.table())


@app.command(epilog="Example: ktmerge compare scores-ties.json scores-linear.json")
def compare(
    scores: Annotated[list[Path], typer.Argument(help="Score files of 'ktmerge eval' with the same base and suite.")],
    sequence: Annotated[
        str | None, typer.Option("--sequence", help="Models tuned one after the other: model=set,model=set,...")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Put several score files into one table, with paired differences."""
    from ktmerge import api, console

    results = api.compare(scores)
    transfer = None if sequence is None else api.backward_transfer(results, sequence)
    if json_:
        console.print_json({**results.to_json(), **({} if transfer is None else {"sequence": transfer.to_json()})})
    elif transfer is not None:
        console.print_table(*transfer.table())
    else:
        console.stdout().print(results.table())
        console.stdout().print(results.differences_table())


@app.command(epilog="Example: ktmerge report scores.json --out report.html --md card.md")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Score files of 'ktmerge eval', or folders of 'ktmerge run'.")],
    out: OutOption = Path("report.html"),
    recipe: Annotated[
        list[Path] | None, typer.Option("--recipe", "-r", help="Recipe to print in it. Repeatable.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Headline.")] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Draw how far each layer of every model moved; reads their weights.")
    ] = False,
    md: Annotated[Path | None, typer.Option("--md", help="Write tables for a model card here, too.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write every score here, too.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a self-contained HTML page: tables, pictures, recipes with locks, answers side by side."""
    from ktmerge import api, console

    page = api.report(
        runs, out, recipes=recipe or (), title=title, layers=layers, markdown=md, csv=csv, overwrite=overwrite,
        progress=console.TerminalProgress(),
    )  # fmt: skip
    written = {"report": page, "model card": md, "scores": csv}
    console.print_pairs({what: str(path) for what, path in written.items() if path is not None})
