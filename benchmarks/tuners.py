"""The survey's table: every way to tune a small language model and a small model that sees, with E, F, O and H.

    python benchmarks/tuners.py                       # everything, into docs/tuners.md, .csv and .svg
    python benchmarks/tuners.py --seeds 1 --worlds vision --out /tmp/look

The worlds are those of `forgetting.py`; what is trained is trained by `ktmerge finetune`. Every way has the same steps
and samples and is tried with the same learning rates on the first seed; the rate with the best H on the selection split
is that of all seeds, and what is told is measured on the report split. Orders of samples are compared where all tasks
of the world of text are learned at once. What is trained and scored is kept in --folder, so that a stopped run goes on
when it is started again; a table of what is there so far says what is missing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import survey
from pages import fill
from pool import Task, workers
from tuned import Place, chosen, place_of, prepare, specialist, try_one
from tunings import FULL, TOGETHER, Tuning, tuning_of, tunings
from worlds import WORLDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--worlds", default=",".join((*WORLDS, TOGETHER)))
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes of one thread each")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ktmerge-forgetting")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    parser.add_argument("--only", choices=["train", "report"], help="just this step")
    arguments = parser.parse_args()

    worlds, seeds, folder = arguments.worlds.split(","), range(arguments.seeds), arguments.folder
    if arguments.only in (None, "train"):
        with workers(_steps, arguments.jobs) as run:
            for shares in (False, True):  # the base of the world that it is part of, which is there by then
                some = [world for world in worlds if (world == TOGETHER) == shares]
                run([("prepare", world, str(seed), str(folder)) for seed in seeds for world in some])
            for seed in seeds:
                for blends in (False, True):
                    parts = [place_of(world, seed, folder) for world in worlds]
                    run([task for part in parts for task in _tasks(part, blends)])
    if arguments.only in (None, "report"):
        tables = [
            table
            for world in worlds
            if (table := survey.Table.of([place_of(world, seed, folder) for seed in seeds])) is not None
        ]
        fill(arguments.out / "tuners.md", "\n\n".join(table.text() for table in tables))
        (arguments.out / "tuners.csv").write_text(survey.to_csv(tables), encoding="utf-8")
        (arguments.out / "tuners.svg").write_bytes(survey.picture(tables, "svg"))


def _tasks(part: Place, blends: bool) -> Iterator[Task]:
    """What there is to try on one seed: on the first every value, on the others what was chosen there."""
    first = place_of(part.name, 0, part.folder)
    for tuning in tunings(part.name):
        if (tuning.blend is not None) == blends:
            for value in tuning.values(part.world.name) if part.seed == 0 else _values(first, tuning):
                yield ("try", part.name, str(part.seed), str(part.folder), tuning.name, repr(value))


def _values(first: Place, tuning: Tuning) -> list[float]:
    """What was chosen on the first seed; of the full fine-tune also the one that is blended."""
    blended = tuning.name == FULL and any(one.blend is not None for one in tunings(first.name))
    wanted = {chosen(first, tuning), specialist(first) if blended else None}
    return sorted(value for value in wanted if value is not None)


def _steps(step: str, world: str, seed: str, folder: str, *rest: str) -> None:
    part = place_of(world, int(seed), Path(folder))
    if step == "prepare":
        prepare(part)
    else:
        name, value = rest
        try_one(part, tuning_of(name), float(value))


if __name__ == "__main__":
    main()
