"""Score the same multiple-choice items with ktmerge and with lm_eval, on the demo's model: equal scores, and how fast.

    python benchmarks/bench_eval.py                  # every set, three turns
    python benchmarks/bench_eval.py --items 40 --sets capitals,shots --runs 1 --json results.json
    python benchmarks/bench_eval.py --only whole --items 40 --json whole.json          # the two commands alone

Two things are timed, each in processes of its own that take turns: *scoring* (model loaded; from texts to scores) and
the *whole process* of both commands as a user types them, after one run of each that is not counted, in an order that
turns round. lm_eval computes in fp32, as ktmerge does on a processor, and is given every batch size of --batch-sizes;
whole, the last of them or the fastest, if scoring was timed. No item occurs twice in a set, and every item has to score
the same on both sides, in both measurements. The machine's load is printed: figures of a busy one say little. Needs
ktmerge[demo,lm-eval]; the model and the texts are fetched once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench_blend import Cost, describe, measure, median

BIN = Path(sys.executable).parent
SETS = {
    "capitals": "4 short choices after a short question",
    "shots": "the same after 5 worked examples",
    "verdicts": "2 labels after a review",
    "endings": "4 second halves after the first half of a review",
}
METRICS = ("acc", "acc_norm")


def write_sets(folder: Path, items: int) -> None:
    """The rows of every set as JSONL: prompt, choices, answer (its index); drawn from the demo's texts."""
    from ktmerge.checkpoints.cache import cache_folder
    from ktmerge.demo.data import write_data, write_rows

    write_data(folder / "demo", cache_folder())
    capitals = [_capital(row) for row in _rows(folder, "capitals", "report", "select")]
    before = "\n\n".join(f"{row['prompt']} {row['choices'][row['answer']]}" for row in capitals[:5])
    reviews = _rows(folder, "verdicts", "train")
    made = {
        "capitals": capitals[5:],
        "shots": [{**row, "prompt": f"{before}\n\n{row['prompt']}"} for row in capitals[5:]],
        "verdicts": [_verdict(row) for row in reviews],
        "endings": _endings([row["prompt"].split("\n")[0].removeprefix("Review: ") for row in reviews]),
    }
    for name, rows in made.items():
        write_rows(folder / f"{name}.jsonl", rows[:items])


def _rows(folder: Path, name: str, *splits: str) -> list[dict[str, Any]]:
    files = [folder / "demo" / split / f"{name}.jsonl" for split in splits]
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def _capital(row: dict[str, Any]) -> dict[str, Any]:
    answer = row["options"].index(row["capital"])
    return {"prompt": f"The capital of {row['country']} is", "choices": row["options"], "answer": answer}


def _verdict(row: dict[str, Any]) -> dict[str, Any]:
    choices = ["fresh", "rotten"]
    return {"prompt": row["prompt"], "choices": choices, "answer": choices.index(row["completion"].strip())}


def _endings(texts: list[str]) -> list[dict[str, Any]]:
    """Each text's second half among those of the three texts after it."""
    halves = [(words[: len(words) // 2], words[len(words) // 2 :]) for words in map(str.split, texts) if len(words) > 9]
    rows = []
    for i in range(len(halves) - 3):
        endings = [" ".join(second) for _, second in halves[i : i + 4]]
        turn = i % 4  # so that the right one stands everywhere
        rows.append({"prompt": " ".join(halves[i][0]), "choices": endings[-turn:] + endings[:-turn], "answer": turn})
    return rows


def write_tasks(folder: Path, names: list[str]) -> tuple[Path, Path]:
    """The suite file, and the folder of lm_eval's task files, that ask the same of the same rows."""
    tasks = [
        {"name": name, "kind": "choice", "data": f"{name}.jsonl", "prompt": "{{ prompt }}", "choices": "choices",
         "answer": "{{ answer }}"}
        for name in names
    ]  # fmt: skip
    suite = folder / "suite.yaml"
    suite.write_text(json.dumps({"ktmerge_suite": 1, "name": "bench", "upstream": tasks}))  # JSON is YAML
    theirs = folder / "tasks"
    theirs.mkdir(exist_ok=True)
    for name in names:
        document = {
            "task": f"bench_{name}", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
            "doc_to_text": "{{prompt}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
            "metric_list": [{"metric": one, "aggregation": "mean", "higher_is_better": True} for one in METRICS],
        }  # fmt: skip
        (theirs / f"{name}.yaml").write_text(json.dumps(document))
    return suite, theirs


def score_ours(model: Path, folder: Path, name: str, batch: str) -> dict[str, Any]:
    """Seconds from texts to scores, and every item's scores and log-likelihoods, by ktmerge."""
    import torch

    from ktmerge.eval import metrics, score_model
    from ktmerge.eval.loading import load_model, load_tokenizer
    from ktmerge.recipes import load_suite

    suite, _ = write_tasks(folder, [name])
    loaded, tokenizer = load_model(model, torch.device("cpu"), torch.float32), load_tokenizer(model)
    wall, cpu = time.perf_counter(), time.process_time()
    found = score_model(loaded, tokenizer, load_suite(suite))[name]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    items = [
        {
            "acc": score,
            "acc_norm": float(metrics.likeliest_by_length(said, row["choices"]) == row["answer"]),
            "logprobs": said,
        }
        for row, score, said in zip(rows, found.scores.tolist(), found.details["logprobs"], strict=True)
    ]
    return {"wall": wall, "cpu": cpu, "items": items}


def score_theirs(model: Path, folder: Path, name: str, batch: str) -> dict[str, Any]:
    """The same by lm_eval, without the seconds its list of tasks takes."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    _, tasks = write_tasks(folder, [name])
    lm = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=batch)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    wall, cpu = time.perf_counter(), time.process_time()
    found = simple_evaluate(model=lm, tasks=[f"bench_{name}"], task_manager=manager, bootstrap_iters=0)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    samples = sorted(found["samples"][f"bench_{name}"], key=lambda sample: sample["doc_id"])
    items = [
        {**{metric: sample[metric] for metric in METRICS}, "logprobs": [float(one[0][0]) for one in sample["resps"]]}
        for sample in samples
    ]
    return {"wall": wall, "cpu": cpu, "items": items}


INSIDE: dict[str, Callable[..., dict[str, Any]]] = {"ktmerge": score_ours, "lm_eval": score_theirs}


def in_process(side: str, model: Path, folder: Path, name: str, batch: str) -> dict[str, Any]:
    """What one side says of a set, scored in a process of its own."""
    out = folder / "inside.json"
    out.unlink(missing_ok=True)
    measure([sys.executable, __file__, "--inside", side, str(model), str(folder), name, batch, str(out)])
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    """The largest difference of a log-likelihood, in nats; refuses unequal scores."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for metric in METRICS:
            if a[metric] != b[metric]:
                sys.exit(f"item {i}: {metric} is {a[metric]} by ktmerge and {b[metric]} by lm_eval")
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a["logprobs"], b["logprobs"], strict=True)]
    return max(abs(a - b) for a, b in pairs)


def scoring(model: Path, folder: Path, name: str, batches: list[str], runs: int) -> dict[str, Any]:
    """Median seconds of both sides on a set, in turns; lm_eval's by batch size."""
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in ("ktmerge", *batches)}
    apart = 0.0
    for _ in range(runs):
        ours = in_process("ktmerge", model, folder, name, "")
        times["ktmerge"].append((ours["wall"], ours["cpu"]))
        for batch in batches:
            theirs = in_process("lm_eval", model, folder, name, batch)
            times[batch].append((theirs["wall"], theirs["cpu"]))
            apart = max(apart, compare(ours["items"], theirs["items"]))
    found = {side: tuple(statistics.median(column) for column in zip(*own, strict=True)) for side, own in times.items()}
    return {"items": len(ours["items"]), "seconds": found, "largest difference": apart}


def whole(model: Path, folder: Path, names: list[str], batch: str, runs: int) -> dict[str, list[Cost]]:
    """Costs of both commands on all sets, in turns, after a run of each that does not count; refuses unequal scores."""
    suite, tasks = write_tasks(folder, names)
    out = folder / "out"
    commands = {
        "ktmerge": [str(BIN / "ktmerge"), "eval", "--base", str(model), "--suite", str(suite), "--no-cache",
                    "--device", "cpu", "--out", str(out / "scores.json"), "--overwrite"],
        "lm_eval": [str(BIN / "lm_eval"), "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32",
                    "--include_path", str(tasks), "--tasks", ",".join(f"bench_{name}" for name in names),
                    "--device", "cpu", "--batch_size", batch, "--output_path", str(out), "--log_samples"],
    }  # fmt: skip
    costs: dict[str, list[Cost]] = {side: [] for side in commands}
    for turn in range(runs + 1):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for side in sorted(commands, reverse=bool(turn % 2)):
            cost = measure(commands[side])
            if turn:
                costs[side].append(cost)
            print(f"  {'turn ' + str(turn) if turn else 'not counted'}: {side:8s} {describe(cost)}", flush=True)
        _compare_whole(out, names)
    return costs


def _compare_whole(out: Path, names: list[str]) -> None:
    """Every item's ``acc`` in ktmerge's score file and in lm_eval's samples."""
    ours = json.loads((out / "scores.json").read_text(encoding="utf-8"))["models"]["base"]["tasks"]
    for name in names:
        (samples,) = out.rglob(f"samples_bench_{name}_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
        theirs = [row["acc"] for row in sorted(rows, key=lambda row: int(row["doc_id"]))]
        if ours[name]["scores"] != theirs:
            sys.exit(f"{name}: the two commands give items different scores")


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        side, model, folder, name, batch, out = sys.argv[2:]
        Path(out).write_text(json.dumps(INSIDE[side](Path(model), Path(folder), name, batch)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=95, help="of each set, at most")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--batch-sizes", default="1,16", help="of lm_eval; 1 is its default")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=("scoring", "whole"), help="time only this")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ktmerge-bench-eval")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    from ktmerge.checkpoints.cache import cache_folder
    from ktmerge.demo.model import NAME, base_model

    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    folder, names, batches = arguments.folder, arguments.sets.split(","), arguments.batch_sizes.split(",")
    model = base_model(cache_folder())
    write_sets(folder, arguments.items)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before; {NAME}; fp32")
    results: dict[str, Any] = {"load": os.getloadavg()[0]}
    batch = batches[-1]
    if arguments.only != "whole":
        results |= time_scoring(model, folder, names, batches, arguments.runs)
        batch = min(batches, key=lambda one: results["all"][f"lm_eval, batch {one}"][0])
    if arguments.only != "scoring":
        results["whole process"] = time_whole(model, folder, names, batch, arguments.runs)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


def time_scoring(model: Path, folder: Path, names: list[str], batches: list[str], runs: int) -> dict[str, Any]:
    """Print and return both sides' seconds from texts to scores, by set and in all."""
    results: dict[str, Any] = {}
    total: dict[str, list[float]] = {}
    for name in names:
        found = results[name] = scoring(model, folder, name, batches, runs)
        ours = found["seconds"]["ktmerge"]
        print(f"{name}: {SETS[name]}; {found['items']} items, equal scores, "
              f"log-likelihoods within {found['largest difference']:.0e}")  # fmt: skip
        for side, (wall, cpu) in found["seconds"].items():
            label = side if side == "ktmerge" else f"lm_eval, batch {side}"
            print(f"  {label:20s} {wall:7.2f} s wall {cpu:7.2f} s CPU {found['items'] / wall:7.1f} items/s"
                  f"  {wall / ours[0]:5.1f} x wall {cpu / ours[1]:5.1f} x CPU", flush=True)  # fmt: skip
            total[label] = [a + b for a, b in zip(total.get(label, [0.0, 0.0]), (wall, cpu), strict=True)]
    print("all sets")
    for label, (wall, cpu) in total.items():
        print(f"  {label:20s} {wall:7.2f} s wall {cpu:7.2f} s CPU"
              f"  {wall / total['ktmerge'][0]:5.1f} x wall {cpu / total['ktmerge'][1]:5.1f} x CPU")  # fmt: skip
    return {**results, "all": total}


def time_whole(model: Path, folder: Path, names: list[str], batch: str, runs: int) -> dict[str, Any]:
    """Print and return what both commands cost, the median and every turn."""
    print(f"whole process on {', '.join(names)}; lm_eval in batches of {batch}")
    costs = whole(model, folder, names, batch, runs)
    middle = {side: median(own) for side, own in costs.items()}
    for side, cost in middle.items():
        spread = max(one.wall for one in costs[side]) - min(one.wall for one in costs[side])
        print(f"whole process, {side:8s} {describe(cost)}, median of {runs}, spread {spread:.1f} s wall")
    print(f"lm_eval / ktmerge: {middle['lm_eval'].wall / middle['ktmerge'].wall:.1f} x wall, "
          f"{middle['lm_eval'].cpu / middle['ktmerge'].cpu:.1f} x CPU; equal scores; "
          f"load {os.getloadavg()[0]:.1f} after")  # fmt: skip
    return {
        side: {"median": asdict(middle[side]), "turns": [asdict(one) for one in own]} for side, own in costs.items()
    }


if __name__ == "__main__":
    main()
