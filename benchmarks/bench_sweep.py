r"""What one more candidate of a sweep costs beyond its scoring: from a recipe to a model in memory that can be scored.

    python benchmarks/bench_sweep.py --base demo/base --expert verdicts=demo/experts/verdicts --json sweep.json
    python benchmarks/bench_sweep.py --base demo/base --expert verdicts=demo/experts/verdicts \
        --expert languages=demo/experts/languages --dtype bfloat16 --method ties --method metagpt --side 'in place'

All sides take turns, as often as ``--runs`` says, each time at another lambda (``ties_density``: at another density).
What they begin with, and need only once a sweep, is not counted: processes started, kernels compiled, base and experts
read, a model built, and what is kept from one candidate to the next: thresholds, changes in order, decompositions,
merged deltas.

* write: every parameter copied once from a ready copy in memory to the model, by torch on all cores
* in place: ktmerge, into the loaded model (what ``ktmerge sweep`` does)
* disk: ktmerge, to a folder, which is then loaded
* mergekit: what mergekit-evolve does with ``--in-memory``: plan, execute, copy each tensor into the loaded model; it
  reads base and experts from their files for every candidate
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ktmerge
from ktmerge.checkpoints.quiet import quiet_transformers
from ktmerge.eval.loading import load_model
from ktmerge.merge.decompositions import keeping
from ktmerge.recipes.load import parse_recipe
from ktmerge.recipes.schema import Recipe

CPU = torch.device("cpu")
LAMBDAS = (0.3, 0.5, 0.7, 0.9, 0.4, 0.6, 0.8)
WARM = (1.0, 0.95, 0.85)
"""Values of candidates that are not counted."""
BLENDS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "task_arithmetic": {"method": "task_arithmetic"},
    "ties": {"method": "ties", "density": 0.3},
    "ties_density": {"method": "ties"},
    "dg_hard": {"method": "dg_hard"},
    "metagpt": {"method": "metagpt"},
}
SIDES = ["write", "in place", "disk", "mergekit"]
TURNED = {"ties_density": "density"}
"""What is turned where that is not lambda."""
MERGEKIT: dict[str, Callable[[float, int], dict[str, Any]]] = {
    "task_arithmetic": lambda value, experts: {"merge_method": "task_arithmetic", "parameters": {"lambda": value}},
    "ties": lambda value, experts: {
        "merge_method": "ties", "parameters": {"lambda": value, "density": 0.3, "normalize": experts > 1},
    },
}  # fmt: skip
"""Where both mean the same work; a lone ``linear`` is two models' average there."""


def recipe_of(base: Path, experts: dict[str, Path], name: str, value: float) -> Recipe:
    document = {
        "ktmerge": 1,
        "base": str(base),
        "experts": {name: {"model": str(path)} for name, path in experts.items()},
        "blend": {**BLENDS[name], TURNED.get(name, "lambda"): value},
    }
    return parse_recipe(document, "benchmark", Path.cwd())


def through_disk(recipe: Recipe, folder: Path, dtype: torch.dtype) -> None:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    ktmerge.blend(recipe, out)
    load_model(out, CPU, dtype)


class InMemory:
    """mergekit's own classes, put together as ``mergekit.evo.actors.InMemoryMergeEvaluator`` does."""

    def __init__(self, base: Path, experts: dict[str, Path]) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self._base, self._experts = base, experts
        self._config = AutoConfig.from_pretrained(base)
        self._model = AutoModelForCausalLM.from_config(self._config, dtype=torch.bfloat16)

    def merge(self, method: str, value: float) -> None:
        from mergekit.architecture import arch_info_for_config
        from mergekit.config import MergeConfiguration
        from mergekit.graph import Executor
        from mergekit.options import MergeOptions
        from mergekit.plan import MergePlanner

        own = MERGEKIT[method](value, len(self._experts))
        models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in self._experts.values()]
        config = MergeConfiguration.model_validate(
            {**own, "base_model": str(self._base), "models": models, "dtype": "bfloat16"}
        )
        planner = MergePlanner(config, arch_info_for_config(self._config), MergeOptions(quiet=True), self._config)
        parameters = dict(self._model.named_parameters())
        for task, values in Executor(self._tasks(planner)).run(quiet=True):
            name = task.weight_info.name
            if name in parameters:
                parameters[name].data.copy_(values)

    @staticmethod
    def _tasks(planner: Any) -> list[Any]:
        """As `MergePlanner.plan_in_memory`, whose objects mergekit 0.1.5 refuses to make with today's pydantic."""
        from mergekit.io.tasks import ReturnTensor

        planner._plan()
        return [
            ReturnTensor.model_construct(weight_info=info, tensor_task=task, dtype=planner.config.out_dtype)
            for info, task in planner._tensors
        ]


def sides_of(
    name: str, base: Path, experts: dict[str, Path], live: Live, folder: Path, wanted: list[str]
) -> dict[str, Callable[[float], None]]:
    found: dict[str, Callable[[float], None]] = {
        "write": lambda value: live.write(),
        "in place": lambda value: live.blend(recipe_of(base, experts, name, value)),
        "disk": lambda value: through_disk(recipe_of(base, experts, name, value), folder, live.dtype),
    }
    if name in MERGEKIT and "mergekit" in wanted:
        other = InMemory(base, experts)
        found["mergekit"] = lambda value: other.merge(name, value)
    return {side: run for side, run in found.items() if side in wanted}


class Live:
    """A model in memory, and the parameters of a second one."""

    def __init__(self, base: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._model = load_model(base, CPU, dtype)
        self._own = dict(self._model.named_parameters())  # tied ones once
        self._other = {name: values.detach().clone() for name, values in self._own.items()}
        self._sources = ktmerge.Pristine()

    def write(self) -> None:
        with torch.no_grad():
            for name, values in self._own.items():
                values.copy_(self._other[name])

    def blend(self, recipe: Recipe) -> None:
        ktmerge.blend_into(self._model, recipe, self._sources, measured=False)


def timed(run: Callable[[float], None], value: float) -> float:
    started = time.perf_counter()
    run(value)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--expert", action="append", required=True, help="name=folder; repeatable")
    parser.add_argument("--method", action="append", choices=list(BLENDS), help="default: all")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the model")
    parser.add_argument("--side", action="append", choices=SIDES, help="repeatable; write and others; default: all")
    parser.add_argument("--folder", type=Path, help="for the blends on disk; default: a temporary one")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    experts = {name: Path(path) for name, _, path in (text.partition("=") for text in arguments.expert)}
    live = Live(arguments.base, getattr(torch, arguments.dtype))
    wanted = ["write", *(arguments.side or SIDES)]
    report = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, quiet_transformers(), keeping(8.0):
        for name in arguments.method or BLENDS:
            sides = sides_of(name, arguments.base, experts, live, Path(folder), wanted)
            for run in sides.values():
                for value in WARM:
                    run(value)  # what is done once a sweep
            seconds: dict[str, list[float]] = {side: [] for side in sides}
            for i in range(arguments.runs):
                for side, run in sides.items():
                    seconds[side].append(timed(run, LAMBDAS[i % len(LAMBDAS)]))
            for side, own in seconds.items():
                median, least = statistics.median(own), min(own)
                ratio = median / statistics.median(seconds["write"])
                print(f"{name:16} {side:9} {median:7.3f} s (least {least:.3f}), {ratio:6.1f} x write", flush=True)
                report.append({"blend": name, "side": side, "median": median, "least": least, "runs": own})
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
