"""Tasks in processes of one thread each."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from ktmerge.errors import KtmergeError

Task = tuple[str, ...]
"""Words that say what to do."""
Run = Callable[[Sequence[Task]], None]
"""Does all tasks before it returns."""


@contextmanager
def workers(steps: Callable[..., None], jobs: int) -> Iterator[Run]:
    """Processes that do tasks, and say how long each took if it was more than a second; those that are refused, why.

    Args:
        steps: called with the words of a task; a function of a module, so that other processes find it.
        jobs: how many processes.
    """
    with multiprocessing.get_context("spawn").Pool(jobs, _begin) as pool:
        yield partial(_run, pool, steps)


def _run(pool: Any, steps: Callable[..., None], tasks: Sequence[Task]) -> None:
    started = time.perf_counter()
    for number, (task, said) in enumerate(pool.imap_unordered(partial(_do, steps), tasks), 1):
        if said:
            minutes = (time.perf_counter() - started) / 60
            print(f"{number}/{len(tasks)} {minutes:5.1f} min  {' '.join(task)}: {said}", flush=True)


def _begin() -> None:
    import torch
    from transformers.utils import logging

    os.nice(10)
    torch.set_num_threads(1)
    logging.disable_progress_bar()


def _do(steps: Callable[..., None], task: Task) -> tuple[Task, str]:
    started = time.perf_counter()
    try:
        steps(*task)
    except KtmergeError as error:
        return task, f"refused: {error}"
    seconds = time.perf_counter() - started
    return task, f"{seconds:.1f} s" if seconds > 1 else ""
