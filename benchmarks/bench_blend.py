"""Blend the same checkpoints with ktmerge and with mergekit: whole processes, wall and CPU seconds, peak memory.

    python benchmarks/bench_blend.py                      # 0.5B, base + 3 experts, every job, one run each
    python benchmarks/bench_blend.py --size 1.5b --jobs ties --only ktmerge
    python benchmarks/bench_blend.py --runs 3 --json results.json

Inputs are read once before each run, so both sides find them in the page cache; runs of both sides take turns, and the
ratio is the median over the pairs. The floor is reading every input and writing one output, nothing done in between.
ktmerge starts every run without what earlier blends of these inputs found out, but knows their sha256, which the first
blend of new files works out; what that takes, and what a blend takes that may recall, is told in rows of their own.
Checkpoints are made in --folder and kept for the next call.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from compileall import compile_dir
from dataclasses import asdict, dataclass
from pathlib import Path

from synthetic import SHAPES, make

import ktmerge

BIN = Path(sys.executable).parent
BLOCK = 1 << 24

# job -> (ktmerge's blend section, mergekit's method and parameters)
JOBS = {
    "task_arithmetic": ({"method": "task_arithmetic", "lambda": 0.3}, ("task_arithmetic", {"lambda": 0.3})),
    "ties": ({"method": "ties", "density": 0.2}, ("ties", {"density": 0.2})),
    "ties_global": ({"method": "ties", "density": 0.2, "scope": "global"}, None),
    "dare_ties": ({"method": "dare_ties", "density": 0.2}, ("dare_ties", {"density": 0.2})),
}


@dataclass(frozen=True)
class Cost:
    """What one process took."""

    wall: float
    cpu: float
    peak_gb: float


def measure(command: list[str]) -> Cost:
    """Run a command to its end; the operating system's own accounting of it."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)}\nfailed:\n{log.read().decode()[-3000:]}")
    return Cost(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6)


def median(costs: list[Cost]) -> Cost:
    return Cost(*(statistics.median(getattr(cost, field) for cost in costs) for field in ("wall", "cpu", "peak_gb")))


def read_all(paths: list[Path]) -> None:
    for path in paths:
        with (path / "model.safetensors").open("rb", buffering=0) as file:
            while file.read(BLOCK):
                pass


def floor(inputs: list[Path], out: Path) -> Cost:
    """Read every input, write an output of the base's size, nothing in between."""
    script = (
        "import sys\n"
        f"for path in {[str(path / 'model.safetensors') for path in inputs]!r}:\n"
        f"    with open(path, 'rb', buffering=0) as file:\n        while file.read({BLOCK}): pass\n"
        f"left = {(inputs[0] / 'model.safetensors').stat().st_size}\nblock = bytes({BLOCK})\n"
        f"with open({str(out)!r}, 'wb', buffering=0) as file:\n"
        f"    while left > 0: left -= file.write(block[:left])\n"
    )
    try:
        return measure([sys.executable, "-c", script])
    finally:
        out.unlink(missing_ok=True)


def ktmerge_command(folder: Path, blend: dict[str, object], base: Path, experts: list[Path], out: Path) -> list[str]:
    recipe = {
        "ktmerge": 1,
        "base": str(base),
        "experts": {path.name: {"model": str(path)} for path in experts},
        "blend": blend,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return [str(BIN / "ktmerge"), "blend", "--recipe", str(path), "--out", str(out)]


def mergekit_command(
    folder: Path, method: tuple[str, dict[str, float]], base: Path, experts: list[Path], out: Path
) -> list[str]:
    name, parameters = method
    per_model = {"weight": 1.0} | {key: value for key, value in parameters.items() if key == "density"}
    config = {
        "merge_method": name,
        "base_model": str(base),
        "models": [{"model": str(path), "parameters": per_model} for path in experts],
        "parameters": {key: value for key, value in parameters.items() if key != "density"},
        "dtype": "bfloat16",
    }
    path = folder / "mergekit.yaml"
    path.write_text(json.dumps(config))
    return [str(BIN / "mergekit-yaml"), str(path), str(out)]


def run_sides(sides: dict[str, list[str]], inputs: list[Path], out: Path, runs: int) -> dict[str, list[Cost]]:
    """Every side in turn, as often as there are runs, so that a slow minute of the machine hits all of them."""
    costs: dict[str, list[Cost]] = {side: [] for side in sides}
    for _ in range(runs):
        for side, command in sides.items():
            shutil.rmtree(out, ignore_errors=True)
            forget()
            read_all(inputs)
            costs[side].append(measure(command))
    shutil.rmtree(out, ignore_errors=True)
    return costs


def forget() -> None:
    """Drop the thresholds and samples that earlier blends left."""
    shutil.rmtree(Path(os.environ["KTMERGE_CACHE"]) / "thresholds", ignore_errors=True)


def blend_with_memory(folder: Path, base: Path, experts: list[Path], runs: int) -> dict[str, Cost]:
    """A first blend of files, which hashes them, and blends that recall what one of density 0.2 found."""
    out = folder / "out"

    def timed(blend: dict[str, object]) -> Cost:
        shutil.rmtree(out, ignore_errors=True)
        read_all([base, *experts])
        return measure(ktmerge_command(folder, blend, base, experts, out))

    costs: dict[str, list[Cost]] = {}
    first = JOBS["ties"][0]
    for _ in range(runs):
        forget()
        shutil.rmtree(Path(os.environ["KTMERGE_CACHE"]) / "digests", ignore_errors=True)
        costs.setdefault("ties, first of new files", []).append(timed(first))
        costs.setdefault("ties, then another lambda", []).append(timed(first | {"lambda": 0.7}))
        forget()
        timed(first)
        costs.setdefault("ties, then another density", []).append(timed(first | {"density": 0.3}))
    shutil.rmtree(out, ignore_errors=True)
    return {name: median(some) for name, some in costs.items()}


def compile_kernels(folder: Path) -> Cost:
    """A small TIES blend that finds no compiled kernels; those of all jobs are kept for the runs to come."""
    base, experts = make(folder / "tiny-1", "tiny", 1)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    os.environ["KTMERGE_CACHE"] = str(folder / "cache")
    costs: dict[str, Cost] = {}
    for name in ("ties", *JOBS):
        command = ktmerge_command(folder, JOBS[name][0], base, experts, folder / "tiny-out")
        costs.setdefault(name, measure(command))
        shutil.rmtree(folder / "tiny-out")
    return costs["ties"]


def describe(cost: Cost) -> str:
    return f"{cost.wall:7.2f} s wall {cost.cpu:7.2f} s CPU {cost.peak_gb:5.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SHAPES), default="0.5b")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--only", choices=["ktmerge", "mergekit"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ktmerge-bench")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    folder = arguments.folder / f"{arguments.size}-{arguments.experts}"
    base, experts = make(folder, arguments.size, arguments.experts)
    inputs = [base, *experts]
    print(f"{platform.machine()}, {os.cpu_count()} cores; {arguments.size}, base + {arguments.experts}, bf16")
    read_all(inputs)
    compile_dir(Path(ktmerge.__file__).parent, quiet=2)  # as pip does; an editable install may lack it
    results: dict[str, dict[str, object]] = {}

    first = compile_kernels(arguments.folder)
    print(f"{'first blend (compiles)':32s} {describe(first)}")
    results["first"] = asdict(first)
    lowest = median([floor(inputs, folder / "floor.bin") for _ in range(max(arguments.runs, 3))])
    print(f"{'floor (read all, write one)':32s} {describe(lowest)}")
    results["floor"] = asdict(lowest)
    for name, command in {"--help": ["--help"], "recipe check": ["recipe", "check", "ties"]}.items():
        cost = median([measure([str(BIN / "ktmerge"), *command]) for _ in range(5)])
        print(f"{'ktmerge ' + name:32s} {describe(cost)}")
        results[name] = asdict(cost)

    if arguments.only != "mergekit":
        for name, cost in blend_with_memory(folder, base, experts, arguments.runs).items():
            print(f"{name:32s} {describe(cost)}", flush=True)
            results[name] = asdict(cost)

    for job in arguments.jobs.split(","):
        blend, method = JOBS[job]
        row: dict[str, object] = {}
        sides = {}
        if arguments.only != "mergekit":
            sides["ktmerge"] = ktmerge_command(folder, blend, base, experts, folder / "out")
        if arguments.only != "ktmerge" and method is not None:
            sides["mergekit"] = mergekit_command(folder, method, base, experts, folder / "out")
        found = run_sides(sides, inputs, folder / "out", arguments.runs)
        costs = {side: median(some) for side, some in found.items()}
        for side, cost in costs.items():
            print(f"{job + ' ' + side:32s} {describe(cost)}", flush=True)
            row[side] = asdict(cost)
        if "ktmerge" in costs:
            row["of_floor"] = costs["ktmerge"].wall / lowest.wall
            print(f"{'':32s} {row['of_floor']:.1f} x the floor")
        if len(costs) == 2:
            pairs = zip(found["mergekit"], found["ktmerge"], strict=True)
            ratios = [(theirs.wall / ours.wall, theirs.cpu / ours.cpu) for theirs, ours in pairs]
            row["wall_ratio"], row["cpu_ratio"] = (statistics.median(column) for column in zip(*ratios, strict=True))
            print(f"{'':32s} mergekit / ktmerge: {row['wall_ratio']:.1f} x wall, {row['cpu_ratio']:.1f} x CPU")
        results[job] = row
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
