"""What every registered method costs: one blend each, in a process of its own; wall and CPU seconds, peak memory.

    python benchmarks/bench_methods.py                        # 0.05B, base + 3 experts
    python benchmarks/bench_methods.py --size 0.5b --markdown costs.md --csv costs.csv
    python benchmarks/bench_methods.py --methods ties,tsv_m

Methods that take one expert get one. What methods need measured is drawn at random: it costs them as much as if it were
true. Checkpoints and statistics are made in --folder and kept for the next call. Rows go to --csv as they come;
what has a row there is not measured again, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench_blend import BIN, Cost, compile_kernels, describe, read_all
from measured import write_statistics
from paths import takes
from synthetic import SHAPES, count, make

from ktmerge.merge.catalogue import NO_DATA, data_of
from ktmerge.merge.kernels.native import GROUPS, native
from ktmerge.merge.needs import needs_of
from ktmerge.merge.registry import methods
from ktmerge.merge.settings import blend_setting
from ktmerge.merge.stage import Need
from ktmerge.recipes.schema import Blend

TOKENS = 512
"""Rows of each sample of inputs."""


@dataclass(frozen=True)
class Row:
    """One method and what its blend took; no cost if it failed, and then why."""

    method: str
    experts: int
    data: str
    cost: Cost | None
    failure: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SHAPES), default="0.05b")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--methods", help="names, separated by commas; default: all that are registered")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds after which a method is given up")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ktmerge-bench")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()

    names = arguments.methods.split(",") if arguments.methods else list(methods())
    compile_kernels(arguments.folder)
    apart(compile_groups)
    folder = arguments.folder / f"{arguments.size}-{arguments.experts}"
    base, experts = make(folder, arguments.size, arguments.experts)
    print(f"{platform.machine()}, {os.cpu_count()} cores; {arguments.size} ({count(arguments.size) / 1e6:.0f}M), bf16")
    rows = from_csv(arguments.csv) if arguments.csv and arguments.csv.exists() else []
    for name in [name for name in names if name not in {row.method for row in rows}]:
        rows.append(run(name, folder, base, experts, arguments.limit))
        told = describe(rows[-1].cost) if rows[-1].cost else rows[-1].failure
        print(f"{name:24s} {rows[-1].experts} {told}", flush=True)
        if arguments.csv:
            arguments.csv.write_text(to_csv(rows), encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(to_markdown(rows), encoding="utf-8")


def apart(work: Callable[..., object], *arguments: object) -> None:
    """Do it in a process of its own: Linux counts what this one ever held as the peak of every process it starts."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{work.__name__}: failed")


def compile_groups() -> None:
    """Compile what any method asks for, so that none pays for it."""
    kernels = native()
    for entries in GROUPS.values() if kernels is not None else ():
        getattr(kernels, entries[0])


def run(name: str, folder: Path, base: Path, experts: list[Path], limit: float) -> Row:
    """Blend once with a method, inputs in the page cache."""
    method = methods()[name]
    used = experts if takes(method, len(experts)) else experts[:1] if takes(method, 1) else experts[:2]
    setting = blend_setting(Blend(method=name))
    needs = {need for pipeline in setting.pipelines.values() for need in needs_of(pipeline)}
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(_recipe(name, folder, base, used, needs)))  # JSON is YAML
    read_all([base, *used])
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        cost, failure = measure([str(BIN / "ktmerge"), "blend", "--recipe", str(recipe), "--out", str(out)], limit)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return Row(name, len(used), data_of(setting), cost, failure)


def measure(command: list[str], limit: float) -> tuple[Cost | None, str]:
    """What a command took, by the operating system's accounting; or why it failed."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            if time.perf_counter() - started > limit:
                process.kill()
                os.wait4(process.pid, 0)
                process.returncode = -9
                return None, f"given up after {limit:.0f} s"
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            return None, f"failed: {lines[-1] if lines else process.returncode}"
    return Cost(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6), ""


def to_csv(rows: list[Row]) -> str:
    """Every number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "experts", "data", "wall_s", "cpu_s", "peak_gb", "failure"])
    for row in rows:
        cost = [f"{row.cost.wall:.2f}", f"{row.cost.cpu:.2f}", f"{row.cost.peak_gb:.3f}"] if row.cost else [""] * 3
        writer.writerow([row.method, row.experts, row.data, *cost, row.failure])
    return text.getvalue()


def from_csv(path: Path) -> list[Row]:
    """The rows that an earlier run wrote, without its failures, which are worth another try."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(row["method"], int(row["experts"]), row["data"],
                Cost(float(row["wall_s"]), float(row["cpu_s"]), float(row["peak_gb"])))
            for row in csv.DictReader(file) if not row["failure"]
        ]  # fmt: skip


def to_markdown(rows: list[Row]) -> str:
    """A table, the cheapest first by CPU time, which others on the machine disturb less than wall time."""
    lines = ["| method | experts | data | wall | CPU | peak memory |", "| --- | --- | --- | --- | --- | --- |"]
    for row in sorted(rows, key=lambda row: row.cost.cpu if row.cost else float("inf")):
        data = "–" if row.data == NO_DATA else row.data
        cost = (
            f"{row.cost.wall:.1f} s | {row.cost.cpu:.1f} s | {row.cost.peak_gb:.2f} GB"
            if row.cost
            else f"{row.failure} | | "
        )
        lines.append(f"| `{row.method}` | {row.experts} | {data} | {cost} |")
    return "\n".join(lines) + "\n"


def _recipe(name: str, folder: Path, base: Path, used: list[Path], needs: set[Need]) -> dict[str, object]:
    document: dict[str, object] = {"ktmerge": 1, "base": str(base), "blend": {"method": name}}
    measures = {of: {need.measure for need in needs if need.of == of} for of in ("base", "experts")}

    def statistics(model: Path, of: str) -> dict[str, str]:
        wanted = measures[of]
        if not wanted:
            return {}
        made = folder / f"stats-{model.name}-{'-'.join(sorted(wanted))}"
        apart(write_statistics, model, made, wanted, TOKENS)
        return {"statistics": str(made)}

    document |= statistics(base, "base")
    document["experts"] = {path.name: {"model": str(path), **statistics(path, "experts")} for path in used}
    return document


if __name__ == "__main__":
    sys.exit(main())
