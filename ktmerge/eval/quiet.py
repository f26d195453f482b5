"""Keeping lm_eval from writing to the terminal, from moving other people's dice, and its templates in a sandbox."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from ktmerge.checkpoints.quiet import quiet_transformers


@contextmanager
def quiet_harness() -> Iterator[None]:
    """While lm_eval works: no log, no progress bars of its own; seeds are put back; Jinja can't reach Python."""
    import torch
    from lm_eval import evaluator, utils
    from tqdm import tqdm

    log = logging.getLogger("lm_eval")
    level, chance, numpy_chance = log.level, random.getstate(), np.random.get_state()
    start = tqdm.__init__

    def hidden(self: Any, *args: Any, **settings: Any) -> None:
        start(self, *args, **{**settings, "disable": True})

    with ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_replaced(tqdm, "__init__", hidden))
        stack.enter_context(_replaced(evaluator, "get_git_commit_hash", lambda: None))  # it asks git, aloud
        stack.enter_context(_replaced(utils, "env", _sandboxed(utils.env)))
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)
            random.setstate(chance)
            np.random.set_state(numpy_chance)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


def _sandboxed(env: Any) -> Any:
    from jinja2.sandbox import SandboxedEnvironment

    safe = SandboxedEnvironment(
        loader=env.loader, undefined=env.undefined, keep_trailing_newline=env.keep_trailing_newline
    )
    safe.filters.update(env.filters)
    return safe
