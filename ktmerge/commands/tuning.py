"""Commands that make models: fine-tune, and measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ktmerge.commands.app import app
from ktmerge.commands.options import (
    BaseOption,
    DeviceOption,
    JobSetOption,
    JsonOption,
    OverwriteOption,
    ResumeOption,
)


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
    image_root: Annotated[
        str | None, typer.Option("--image-root", help="Folder of the images that rows name; default: beside the data.")
    ] = None,
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
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", help="In place of weights: lora, dora, pissa, ia3, prompt, ...; --train says where."),
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="With --adapter: of a low-rank change.")] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="With --adapter: scale, alpha / rank.")] = None,
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="With --adapter: keep it beside the folded model, as OUT-adapter.")
    ] = False,
    replay: Annotated[
        list[str] | None, typer.Option("--replay", help="Upstream data to mix into every batch. Repeatable.")
    ] = None,
    ratio: Annotated[float | None, typer.Option("--ratio", help="With --replay: its share of a batch.")] = None,
    curriculum: Annotated[
        str | None, typer.Option("--curriculum", help="easy, common or shared first; none (default): shuffled.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write event files for TensorBoard, too.")] = False,
    set_: JobSetOption = None,
    preview: Annotated[
        int, typer.Option("--preview", min=0, help="Show N samples with the trained tokens marked, and stop.")
    ] = 0,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Say how much memory it takes and what would change that, and stop.")
    ] = False,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="With --estimate: so many processes, as torchrun starts them.")
    ] = 1,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Fine-tune a base model on your data: every weight of it, or what --train says."""
    from ktmerge import api, console

    settings: dict[str, Any] = {
        "image_root": image_root,
        "train": train,
        "select": select,
        "density": density,
        "every": every,
        "scope": scope,
        "mask": mask,
    }
    attached = {"name": adapter, "rank": rank, "alpha": alpha, "keep": keep_adapter or None}
    settings |= {"replay": replay or None, "replay_ratio": ratio, "adapter": attached}
    settings |= {"tensorboard": tensorboard or None, "curriculum": curriculum}
    jobs = api.finetune_jobs(
        recipe, only=only or (), base=base, data=data or (), out=out, overrides=set_ or (), settings=settings
    )
    if preview:
        shown = {job.name: api.preview(job, preview) for job in jobs}
        if json_:
            console.print_json({name: [sample.to_json() for sample in samples] for name, samples in shown.items()})
        else:
            for samples in shown.values():
                console.print_preview(samples)
        return
    if estimate:
        _tell([api.estimate(job, processes) for job in jobs], json_)
        return
    reports = api.finetune_all(jobs, resume=resume, overwrite=overwrite, progress=console.TerminalProgress())
    _tell(reports, json_)


@app.command(epilog="Example: ktmerge stats ./base --data upstream.jsonl --out stats/base")
def stats(
    model: Annotated[str | None, typer.Argument(help="Model folder or hub id, or model+adapter.")] = None,
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
    set_: JobSetOption = None,
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
    _tell(reports, json_)


def _tell(found: Sequence[Any], json_: bool) -> None:
    """What was made or estimated, one after the other."""
    from ktmerge import console

    if json_:
        console.print_json([one.to_json() for one in found])
    else:
        for one in found:
            console.print_pairs(one.pairs())
