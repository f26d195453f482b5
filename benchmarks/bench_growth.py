"""How a TIES blend grows with parameters and with experts: whole processes, wall seconds and peak memory, and a plot.

    python benchmarks/bench_growth.py --plot docs/growth.svg

Inputs are in the page cache. Needs about 30 GB of disk; checkpoints are made in --folder and kept for the next call.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from bench_blend import compile_kernels, describe, ktmerge_command, median, read_all, run_sides
from synthetic import count, make

from ktmerge.drawing import drawn, new_figure, to_file

SIZES = ("0.25b", "0.5b", "1b", "1.5b")
EXPERTS = (1, 2, 3, 5)
TIES = {"method": "ties", "density": 0.2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ktmerge-bench")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    compile_kernels(arguments.folder)
    rows = []
    for size, experts in [*((size, 3) for size in SIZES), *(("0.5b", n) for n in EXPERTS if n != 3)]:
        folder = arguments.folder / f"{size}-{experts}"
        base, paths = make(folder, size, experts)
        read_all([base, *paths])
        command = ktmerge_command(folder, TIES, base, paths, folder / "out")
        cost = median(run_sides({"ktmerge": command}, [base, *paths], folder / "out", arguments.runs)["ktmerge"])
        rows.append({"parameters": count(size), "experts": experts, "wall": cost.wall, "peak_gb": cost.peak_gb})
        print(f"{size} + {experts:2d} experts {describe(cost)}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))
    if arguments.plot:
        arguments.plot.write_bytes(picture(rows, arguments.plot.suffix[1:]))


def picture(rows: list[dict[str, float]], kind: str) -> bytes:
    """Wall time over parameters and over experts, peak memory beside it."""
    panels = {
        "billion parameters (3 experts)": [(row["parameters"] / 1e9, row) for row in rows if row["experts"] == 3],
        "experts (0.5 billion parameters)": [
            (row["experts"], row) for row in rows if row["parameters"] == count("0.5b")
        ],
    }
    with drawn():
        figure = new_figure(640, 260)
        for axes, (label, points) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            ordered = sorted(points, key=lambda point: point[0])
            places = [place for place, _ in ordered]
            axes.plot(places, [row["wall"] for _, row in ordered], marker="o", color="#2b6cb0", label="wall seconds")
            memory = [10 * row["peak_gb"] for _, row in ordered]
            axes.plot(places, memory, marker="s", color="#c05621", label="peak memory, 0.1 GB")
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.set_xlabel(label)
        figure.axes[0].legend(frameon=False)
        figure.suptitle(f"TIES, bf16, {os.cpu_count()} cores, inputs in the page cache")
        figure.tight_layout()
        return to_file(figure, kind)


if __name__ == "__main__":
    main()
