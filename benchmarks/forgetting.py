"""How much every method keeps of what the base knew, and of what the experts learned: a first honest comparison.

    python benchmarks/forgetting.py                       # everything, into docs/results.md, .csv and .svg
    python benchmarks/forgetting.py --seeds 1 --methods linear,ties --out /tmp/look

Two worlds are made from packages (fetched once): a text model and a vision-language model, each pretrained here and
then fully fine-tuned on other things. Every method is swept along its ways with as many points as every other (see
`paths`); the way and the point are chosen on one split and reported on another. What is trained or scored is kept in
--folder, so that a stopped run goes on when it is started again.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import findings
from pages import fill
from parts import kept, part_of, score_models
from paths import knob_of, takes
from pool import workers
from sweep import sweep
from worlds import WORLDS

from ktmerge.merge.registry import methods

KINDS = ("single", "multi")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--worlds", default=",".join(WORLDS))
    parser.add_argument("--methods", help="names, separated by commas; default: all that are registered")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes of one thread each")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ktmerge-forgetting")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    parser.add_argument("--only", choices=["train", "sweep", "report"], help="just this step")
    arguments = parser.parse_args()

    names = arguments.methods.split(",") if arguments.methods else list(methods())
    worlds = arguments.worlds.split(",")
    seeds = range(arguments.seeds)
    folder = str(arguments.folder)
    kinds = [(world, kind) for world in worlds for kind in KINDS]
    wanted = {at: [name for name in names if worthwhile(name, len(part_of(*at, 0, arguments.folder).experts))]
              for at in kinds}  # fmt: skip
    if arguments.only != "report":
        with workers(_steps, arguments.jobs) as run:
            if arguments.only in (None, "train"):
                run([("train", world, str(seed), folder) for seed in seeds for world in worlds])
            if arguments.only in (None, "sweep"):
                places = [(world, kind, str(seed), folder) for seed in seeds for world, kind in kinds]
                run([("score", *place) for place in places])
                run([("sweep", *place, name) for place in places for name in wanted[place[:2]]])
    if arguments.only in (None, "report"):
        found = {}
        sections = []
        for world, kind in kinds:
            every = [part_of(world, kind, seed, arguments.folder) for seed in seeds]
            parts = [part for part in every if all(kept(part, name) is not None for name in wanted[world, kind])]
            if not parts:
                print(f"{world}, {kind}: no seed is swept to the end yet; left out")
                continue
            title = f"{world}, {'one task' if kind == 'single' else f'{len(parts[0].experts)} tasks'}"
            title += "" if len(parts) == len(every) else f" ({len(parts)} of {len(every)} seeds)"
            found[title] = list(findings.rows(parts, wanted[world, kind]))
            sections += [f"### {title}", findings.verdict(found[title]), findings.table(found[title], parts)]
            sections += [missing] if (missing := findings.absent(parts, wanted[world, kind])) else []
        write(arguments.out, "\n\n".join(sections), found)


def worthwhile(name: str, experts: int) -> bool:
    """Whether a method takes so many experts and is not, by its own promise, ``linear`` with one."""
    method = methods()[name]
    same = experts == 1 and method.promises.neutral == {} and knob_of(method) is None
    return takes(method, experts) and (not same or name in findings.RIVALS)


def write(out: Path, text: str, found: dict[str, list[findings.Row]]) -> None:
    """The tables between the page's markers, the CSV and the picture beside it."""
    fill(out / "results.md", text)
    (out / "results.csv").write_text(findings.to_csv(found), encoding="utf-8")
    (out / "results.svg").write_bytes(findings.picture(found, "svg"))


def _steps(step: str, world: str, *rest: str) -> None:
    if step == "train":
        seed, folder = rest
        path = Path(folder) / world / seed
        path.mkdir(parents=True, exist_ok=True)
        WORLDS[world].train(path, int(seed))
        return
    kind, seed, folder, *method = rest
    part = part_of(world, kind, int(seed), Path(folder))
    action: Any = score_models if step == "score" else sweep
    action(part, *method)


if __name__ == "__main__":
    main()
