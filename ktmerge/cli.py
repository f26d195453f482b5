"""The commands: parse, call one function, print. No logic, and nothing heavy before a command needs it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from ktmerge.errors import KtmergeError

app = typer.Typer(
    name="ktmerge",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune fully, blend back with the base, score what was learned and what was kept.",
    epilog="Start with: ktmerge demo",
)
recipes = typer.Typer(no_args_is_help=True, help="Check, show, list and import recipes.")
app.add_typer(recipes, name="recipe")

# typer reads annotations at run time, so these stay ... | None for Python 3.10.
RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="A recipe file, or a gallery name (ktmerge recipe list).")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a key, e.g. --set blend.lambda=0.8.")]
BaseOption = Annotated[str | None, typer.Option("--base", help="Base model: folder or hub id; replaces the recipe's.")]
ExpertOption = Annotated[
    list[str] | None,
    typer.Option("--expert", help="name=model or name=model:weight; replaces the recipe's experts. Repeatable."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output, in one step.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Where the result goes.")]


def _version(wanted: bool) -> None:
    if wanted:
        from ktmerge import __version__

        typer.echo(f"ktmerge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="Example: ktmerge finetune --base ./base --data train.jsonl --out runs/spam --set learning_rate=2e-5"
)
def finetune(
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Make the experts this recipe describes.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="With --recipe: just this expert. Repeatable.")
    ] = None,
    base: BaseOption = None,
    data: Annotated[list[str] | None, typer.Option("--data", help="Without --recipe: JSONL, JSON or parquet.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Without --recipe: where the tuned model goes.")
    ] = None,
    train: Annotated[
        str | None, typer.Option("--train", help="full, top:K, last:K, connector, llm, head, ...; joined by +.")
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            "--select", help="Which elements move: magnitude, gradient, fused, random, child_f, child_d, half."
        ),
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="With --select: share of elements that move.")
    ] = None,
    every: Annotated[int | None, typer.Option("--every", help="With --select: choose again every K steps.")] = None,
    scope: Annotated[str | None, typer.Option("--scope", help="With --select: tensor or global.")] = None,
    mask: Annotated[str | None, typer.Option("--mask", help="With --select: hard or soft.")] = None,
    replay: Annotated[
        list[str] | None, typer.Option("--replay", help="Upstream data to mix into every batch. Repeatable.")
    ] = None,
    ratio: Annotated[float | None, typer.Option("--ratio", help="With --replay: its share of a batch.")] = None,
    set_: SetOption = None,
    preview: Annotated[
        int, typer.Option("--preview", help="Show N samples with the trained tokens marked, and stop.")
    ] = 0,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Fine-tune a base model on your data: every weight of it, or what --train says."""
    from ktmerge import api, console

    settings: dict[str, Any] = {
        "train": train,
        "select": select,
        "density": density,
        "every": every,
        "scope": scope,
        "mask": mask,
    }
    settings |= {"replay": replay or None, "replay_ratio": ratio}
    jobs = api.finetune_jobs(
        recipe, only=only or (), base=base, data=data or (), out=out, overrides=set_ or (), settings=settings
    )
    if preview:
        for job in jobs:
            console.print_preview(api.preview(job, preview))
        return
    reports = api.finetune_all(jobs, resume=resume, overwrite=overwrite, progress=console.TerminalProgress())
    if json_:
        console.print_json([report.to_json() for report in reports])
    else:
        for report in reports:
            console.print_pairs(report.pairs())


@app.command(epilog="Example: ktmerge stats ./base --data upstream.jsonl --out stats/base")
def stats(
    model: Annotated[str | None, typer.Argument(help="Model folder or hub id.")] = None,
    data: Annotated[list[str] | None, typer.Option("--data", help="JSONL, JSON or parquet, as for finetune.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the statistics go.")] = None,
    images: Annotated[str | None, typer.Option("--images", help="Folder of the images that rows name.")] = None,
    self_generate: Annotated[
        int | None, typer.Option("--self-generate", min=1, help="Instead of data: so many texts the model writes.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Rows of the data to use; default 256.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to keep of each input; default 2048.")] = None,
    fisher: Annotated[str | None, typer.Option(help="none (default), empirical or sampled.")] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Make the statistics this recipe describes.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="With --recipe: just those of 'base' or an expert. Repeatable.")
    ] = None,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Measure a model on data, for the methods that need it: inputs of its linear maps, Fisher information."""
    from ktmerge import api, console

    settings = {"data": data or [], "images": images, "self_generate": self_generate, "samples": samples,
                "tokens": tokens, "fisher": fisher}  # fmt: skip
    jobs = api.measurements(recipe, only=only or (), model=model, out=out, settings=settings, overrides=set_ or ())
    reports = api.measure_all(
        jobs, device=device, resume=resume, overwrite=overwrite, progress=console.TerminalProgress()
    )
    if json_:
        console.print_json([report.to_json() for report in reports])
    else:
        for report in reports:
            console.print_pairs(report.pairs())


@app.command(epilog="Example: ktmerge blend --recipe ties --base ./base --expert spam=runs/spam --out blended")
def blend(
    recipe: RecipeOption,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the blended model goes.")] = None,
    base: BaseOption = None,
    expert: ExpertOption = None,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done to which tensors, and stop.")
    ] = False,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Blend base and experts into one ordinary checkpoint."""
    from ktmerge import api, console

    if out is None and not dry_run:
        api.refuse_without_out(recipe, overrides=set_ or (), base=base, experts=expert or ())
    loaded = api.load_recipe(recipe, overrides=set_ or (), base=base, experts=expert or ())
    if dry_run or out is None:
        plan = api.plan(loaded)
        console.print_json(plan.to_json()) if json_ else console.print_table(*plan.table())
        return
    report = api.blend(
        loaded, out, device=device, resume=resume, overwrite=overwrite, progress=console.TerminalProgress()
    )
    console.print_json(report.to_json()) if json_ else console.print_table(*report.table())


@app.command(
    "eval", epilog="Example: ktmerge eval runs/spam blended --base ./base --suite suite.yaml --out scores.json"
)
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model folders, or name=folder.")],
    suite: Annotated[Path | None, typer.Option("--suite", "-s", help="Suite file.")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="Take suite and base from this recipe.")] = None,
    base: BaseOption = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write scores (JSON) here.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass; scores don't depend on it.")] = 16,
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
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Score base and models on upstream and downstream sets, with the same code in one go."""
    from ktmerge import api, console

    results = api.evaluate(
        models, suite=suite, recipe=recipe, overrides=set_ or (), base=base, out=out, batch_size=batch_size,
        device=device, reference=reference, part=part, cache=not no_cache, overwrite=overwrite,
        progress=console.TerminalProgress(),
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


@app.command(epilog="Example: ktmerge report scores.json --out report.html")
def report(
    scores: Annotated[Path, typer.Argument(help="Score file of 'ktmerge eval' or 'ktmerge run'.")],
    out: OutOption = Path("report.html"),
    recipe: Annotated[
        list[Path] | None, typer.Option("--recipe", "-r", help="Recipe to print in it. Repeatable.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Headline.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a self-contained HTML page with the table, the picture and the recipe."""
    from ktmerge import api, console

    console.print_pairs(
        {"report": str(api.report(scores, out, recipes=recipe or (), title=title, overwrite=overwrite))}
    )


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


@app.command(epilog="Example: ktmerge demo --out ktmerge-demo")
def demo(out: OutOption = Path("ktmerge-demo")) -> None:
    """Do the whole job on a small real model: two fine-tunes, blends, scores, a report."""
    from ktmerge import console
    from ktmerge.demo import run_demo

    console.print_pairs({"report": str(run_demo(out, progress=console.TerminalProgress()))})


@recipes.command("check", epilog="Example: ktmerge recipe check recipe.yaml")
def recipe_check(recipe: Annotated[str, typer.Argument(help="Recipe file or gallery name.")], set_: SetOption = None,
                 base: BaseOption = None, expert: ExpertOption = None, json_: JsonOption = False) -> None:  # fmt: skip
    """Find every mistake of a recipe, reading only headers."""
    from ktmerge import api, console

    checked = api.check(recipe, overrides=set_ or (), base=base, experts=expert or ())
    console.print_json(checked.to_json()) if json_ else console.print_pairs(checked.pairs())


@recipes.command("verify", epilog="Example: ktmerge recipe verify blended --recipe recipe.yaml --rebuild")
def recipe_verify(
    out: Annotated[Path, typer.Argument(help="A folder that 'ktmerge blend' wrote.")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="What it was made by; else the recipe in its record.")
    ] = None,
    base: BaseOption = None,
    expert: ExpertOption = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Blend again beside it, and compare byte for byte.")
    ] = False,
    device: DeviceOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Prove that a blended model is what its record says; exit code 1 if it is not."""
    from ktmerge import api, console

    found = api.verify(
        out, recipe, base=base, experts=expert or (), rebuild=rebuild, device=device,
        progress=console.TerminalProgress(),
    )  # fmt: skip
    console.print_json(found.to_json()) if json_ else console.print_table(*found.table())
    if not found.holds:
        raise typer.Exit(1)


@recipes.command("show", epilog="Example: ktmerge recipe show ties")
def recipe_show(recipe: Annotated[str, typer.Argument(help="Recipe file or gallery name.")], set_: SetOption = None,
                json_: JsonOption = False) -> None:  # fmt: skip
    """Print a recipe; with --set or --json as ktmerge understands it, defaults written out."""
    from ktmerge import api, console

    if json_:
        console.print_json(api.load_recipe(recipe, overrides=set_ or ()).model_dump(mode="json", by_alias=True))
    else:
        sys.stdout.write(api.show_recipe(recipe, set_ or ()))


@recipes.command("list", epilog="Example: ktmerge recipe list")
def recipe_list(json_: JsonOption = False) -> None:
    """List the recipes that come with ktmerge, when to use each, and what each has to measure on data before."""
    from ktmerge import api, console

    listed = [vars(recipe) for recipe in api.list_recipes()]
    if json_:
        console.print_json(listed)
    else:
        columns = ("name", "when", "method", "data")
        console.print_table(columns, [[row[column] for column in columns] for row in listed])


@recipes.command("import", epilog="Example: ktmerge recipe import mergekit.yaml --out recipe.yaml")
def recipe_import(
    source: Annotated[Path, typer.Argument(help="A mergekit YAML file.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the recipe here; else print it.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Turn a mergekit YAML into a recipe, and say where the semantics differ."""
    from ktmerge import api, console

    text, differences = api.import_recipe(source, out, overwrite=overwrite)
    if out is None:
        sys.stdout.write(text)
    for difference in differences:
        console.stderr().print(f"note: {difference}", markup=False)


_stopped: list[int] = []
"""Signals that asked this process to stop."""


def _stop(number: int, frame: FrameType | None) -> None:
    _stopped.append(number)
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Entry point: exit code 0 done, 1 the run failed, 2 bad input, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    sys.exit(_exit_code(arguments))


def _exit_code(arguments: list[str] | None) -> int:
    try:
        result: Any = app(args=arguments, standalone_mode=False)
    except KtmergeError as error:
        if _stopped:
            return _interrupted()
        from ktmerge import console

        console.fail(str(error))
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, SystemExit) as error:
        if _stopped:  # typer leaves by itself, and some libraries fail oddly when stopped while they are imported
            return _interrupted()
        if not hasattr(error, "exit_code") or not hasattr(error, "show"):
            raise
        error.show()  # a usage error of the command line itself
        return int(error.exit_code)
    if _stopped:
        return _interrupted()
    return result if isinstance(result, int) else 0


def _interrupted() -> int:
    from ktmerge import console

    console.fail("interrupted; nothing was left half-written.")
    return 130
