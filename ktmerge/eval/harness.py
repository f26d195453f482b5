"""lm_eval as a door: its tasks by name, read, asked and marked by lm_eval itself on a model that is already loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.errors import KtmergeError, UsageError, did_you_mean, first_line
from ktmerge.eval.hub import content_digest
from ktmerge.eval.quiet import quiet_harness
from ktmerge.eval.rows import Part, of_part
from ktmerge.eval.scores import TaskScore
from ktmerge.eval.task_files import refuse_code
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.harness import HarnessTask
from ktmerge.recipes.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ktmerge.eval.likelihood import LikelihoodScorer

NO_FILTER = "none"


@dataclass(frozen=True)
class HarnessSet:
    """Tasks of lm_eval with their rows.

    Attributes:
        parts: lm_eval's own objects: a task, a group, or the tasks of a tag.
        manager: lm_eval's list of tasks.
        rows: of each task, the numbers of the rows that are asked.
        metric: of lm_eval's, with its filter.
        others: metrics with a value for each item that are shown beside it.
        prompts: of each item, without chat template.
        references: of each item, the index of the right choice or the answer.
        choices: of each item, if all tasks have such.
        data_digest: sha256 over the rows.
        digest: sha256 over all that is asked, and by which lm_eval.
    """

    parts: list[Any] = field(repr=False)
    manager: Any = field(repr=False)
    rows: dict[str, list[int]]
    metric: tuple[str, str]
    others: list[tuple[str, str]]
    prompts: list[str]
    references: list[Any]
    choices: list[list[str]]
    data_digest: str
    digest: str
    signature: str


def read_harness(task: HarnessTask, folder: Path, share: float, part: Part) -> HarnessSet:
    """Find a task of lm_eval, read its rows and write its prompts.

    Args:
        task: which.
        folder: of the suite file.
        share: of the rows that are kept for selection.
        part: which rows.

    Raises:
        UsageError: lm_eval isn't installed, has no such task, cannot read its data, or can't ask it of a loaded model.
    """
    if find_spec("lm_eval") is None:
        raise UsageError(f"task '{task.name}' is lm_eval's; install it with: pip install 'ktmerge[lm-eval]'.")
    own = None if task.include_path is None else (folder / task.include_path).resolve()
    try:
        with quiet_harness():
            manager = _manager(task.lm_eval, own)
            loaded = manager.load([task.lm_eval])
            tasks: dict[str, Any] = loaded["tasks"]
            for one in tasks.values():
                _refuse(one)
            rows = {name: _rows(one, task, share, part) for name, one in tasks.items()}
            return _made(task, manager, loaded, rows)
    except UsageError as error:
        raise UsageError(f"task '{task.name}': {error}") from None
    except Exception as error:  # lm_eval, datasets and a task's own code raise whatever they like
        raise UsageError(f"task '{task.name}': lm_eval cannot make '{task.lm_eval}': {first_line(error)}") from error


def score_harness(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: HarnessTask,
    made: HarnessSet,
    likelihood: LikelihoodScorer,
    *,
    batch_size: int,
    progress: Progress = SILENT,
    label: str = "score",
) -> TaskScore:
    """Let lm_eval ask and mark its items on a loaded model.

    Log-likelihoods come from ``likelihood``, which reads common beginnings once; tokens, answers and marks are
    lm_eval's.

    Raises:
        UsageError: an item's score isn't between 0 and 1.
        KtmergeError: lm_eval fails.
    """
    from lm_eval import simple_evaluate

    from ktmerge.eval.harness_model import LoadedModel

    try:
        with quiet_harness():
            lm = LoadedModel(model, tokenizer, likelihood, batch_size, progress, f"{label} ({len(made.prompts)} items)")
            found = simple_evaluate(
                model=lm, tasks=made.parts, task_manager=made.manager, num_fewshot=task.num_fewshot, samples=made.rows,
                fewshot_random_seed=task.seed, apply_chat_template=task.chat, bootstrap_iters=0, log_samples=True,
            )  # fmt: skip
    except KtmergeError:
        raise
    except Exception as error:  # a task's own code may raise anything
        raise KtmergeError(f"lm_eval failed: {type(error).__name__}: {first_line(error)}") from error
    samples = [one for name in made.rows for one in found["samples"][name]]
    own = _of_filter(samples, made.metric[1])
    scores = _values(own, made.metric[0])
    if not ((scores >= 0) & (scores <= 1)).all():
        raise UsageError(f"task '{task.name}': items score beyond 0 to 1 in '{made.metric[0]}'; choose another metric.")
    figures = {",".join(pair) if pair[1] != NO_FILTER else pair[0]: 100 * float(_values(_of_filter(samples, pair[1]),
               pair[0]).mean()) for pair in made.others}  # fmt: skip
    return TaskScore(scores, _details(own), figures, made.signature)


def _manager(name: str, own: Path | None) -> Any:
    """lm_eval's list of tasks; only that of the user's folder where the task is there: the other takes long."""
    if own is not None:
        if not own.is_dir():
            raise UsageError(f"include_path: {own}: no such folder.")
        refuse_code(own)
        manager = _index(str(own), False)
        if name in manager.all_tasks:
            return manager
    manager = _index(None if own is None else str(own), True)
    if name not in manager.all_tasks:
        raise UsageError(f"lm_eval has no task '{name}'.{did_you_mean(name, manager.all_tasks, list_all=False)}")
    return manager


@lru_cache(maxsize=4)
def _index(own: str | None, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=own, include_defaults=defaults)


def _refuse(one: Any) -> None:
    """What lm_eval can't ask of a loaded model, or would run code for."""
    instead = "run it with lm_eval and import its results with 'ktmerge eval import'"
    if getattr(one, "MULTIMODAL", False):
        raise UsageError(f"'{one.task_name}' shows images, which lm_eval can't do with a loaded model; {instead}.")
    if getattr(one, "UNSAFE_CODE", False):
        raise UsageError(f"'{one.task_name}' runs code that the model writes; {instead}.")


def _rows(one: Any, task: HarnessTask, share: float, part: Part) -> list[int]:
    """Numbers of the rows of ``one`` that are asked: those of the part, then the first so many."""
    rows = [Row(number, "", {}) for number in range(len(one.eval_docs))]
    chosen = [row.number for row in of_part(rows, share, part)][: task.limit]
    if not chosen:
        raise UsageError(f"'{one.task_name}' has no row in the part '{part}'.")
    return chosen


def _made(task: HarnessTask, manager: Any, loaded: Any, rows: dict[str, list[int]]) -> HarnessSet:
    tasks: dict[str, Any] = loaded["tasks"]
    metrics = _metrics(list(tasks.values()))
    chosen = _chosen(task, metrics)
    prompts: list[str] = []
    references: list[Any] = []
    choices: list[list[str]] = []
    asked: list[Any] = []
    docs: list[Any] = []
    for name, one in tasks.items():
        _set_shots(one, task)
        one.build_all_requests(samples=rows[name])
        first: dict[int, Any] = {}
        for instance in one.instances:
            first.setdefault(instance.doc_id, instance)
            asked.append([name, instance.doc_id, instance.request_type, instance.args])
        for instance in first.values():
            prompts.append(str(instance.args[0]))
            references.append(_plain(one.doc_to_target(instance.doc)))
            if one.OUTPUT_TYPE == "multiple_choice":
                choices.append([str(choice) for choice in one.doc_to_choice(instance.doc)])
            docs.append(instance.doc)
    versions = {name: str(one.VERSION) for name, one in tasks.items()}
    settings = task.model_dump(mode="json", exclude={"include_path", "metric"})
    written = [version("lm_eval"), settings, chosen, versions, content_digest([asked, references])]
    said = ", ".join(sorted({f"task version {one}" for one in versions.values()}))
    return HarnessSet(
        parts=_top(task.lm_eval, loaded), manager=manager, rows=rows, metric=chosen,
        others=[pair for pair in metrics if pair != chosen], prompts=prompts, references=references,
        choices=choices if len(choices) == len(prompts) else [],
        data_digest=content_digest(docs), digest=hashlib.sha256(json.dumps(written).encode()).hexdigest(),
        signature=f"lm_eval {version('lm_eval')}, {task.lm_eval}, {said}, {','.join(chosen)}",
    )  # fmt: skip


def _top(name: str, loaded: Any) -> list[Any]:
    groups = loaded.get("groups") or {}
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _set_shots(one: Any, task: HarnessTask) -> None:
    """As lm_eval does it: a task that says 0 stays without worked examples."""
    if task.num_fewshot is not None and one.get_config("num_fewshot") != 0:
        one.set_config(key="num_fewshot", value=task.num_fewshot)
    elif one.get_config("num_fewshot") is None:
        one.set_config(key="num_fewshot", value=0)
    one.set_fewshot_seed(seed=task.seed)


def _metrics(tasks: Sequence[Any]) -> list[tuple[str, str]]:
    """(metric, filter) pairs that all tasks average over items, in the first one's order."""
    from lm_eval.api.metrics import mean, nanmean

    def of(one: Any) -> list[tuple[str, str]]:
        filters = [ensemble.name for ensemble in getattr(one, "_filters", [])] or [NO_FILTER]
        averaged = [name for name, how in one.aggregation().items() if how in (mean, nanmean)]
        return [(name, by) for by in filters for name in averaged]

    first, *rest = [of(one) for one in tasks]
    return [pair for pair in first if all(pair in other for other in rest)]


def _chosen(task: HarnessTask, metrics: Sequence[tuple[str, str]]) -> tuple[str, str]:
    if not metrics:
        raise UsageError(
            f"'{task.lm_eval}' has no metric that is a mean over its items, so models can't be compared item by item; "
            "import its results with 'ktmerge eval import'."
        )
    if not task.metric:
        return metrics[0]
    name, _, by = task.metric.partition(",")
    for pair in metrics:
        if pair[0] == name and by in ("", pair[1]):
            return pair
    known = {name for name, _ in metrics} | {",".join(pair) for pair in metrics if pair[1] != NO_FILTER}
    raise UsageError(f"'{task.lm_eval}' has no metric '{task.metric}' for items.{did_you_mean(task.metric, known)}")


def _of_filter(samples: Sequence[Any], by: str) -> list[Any]:
    return [sample for sample in samples if sample["filter"] == by]


def _values(samples: Sequence[Any], metric: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    try:
        return np.array([float(sample[metric]) for sample in samples])
    except (TypeError, ValueError, KeyError):
        raise UsageError(f"lm_eval's '{metric}' gives no number for each item; choose another metric.") from None


def _details(samples: Sequence[Any]) -> dict[str, list[Any]]:
    """Log-likelihoods of the choices, or what the model said, and what a filter read in it."""
    responses = [[one[0] for one in sample["resps"]] for sample in samples]
    if all(isinstance(one, tuple | list) for said in responses for one in said):
        return {"logprobs": [[round(float(one[0]), 6) for one in said] for said in responses]}
    read = [[_plain(one) for one in sample["filtered_resps"]] for sample in samples]
    return {
        "outputs": [str(said[0]) for said in responses],
        "answers": [str(said[0]) if said else "" for said in read],
    }


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
