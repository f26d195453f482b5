"""Keeps transformers' progress bars and warnings off the terminal, and a broken torchvision out of its way."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers for a while: what matters is checked, and said by us. Loads it."""
    hide_broken_torchvision()
    from transformers.utils import logging as theirs

    library: Any = theirs
    verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(logging.CRITICAL)
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()


@cache
def hide_broken_torchvision() -> None:
    """Have transformers do without a torchvision that cannot be imported; call it before transformers is loaded.

    A torchvision built for another torch is taken for a working one, and then every import of a model fails. Without it
    images are processed by pillow.
    """
    if "torchvision" in sys.modules or find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception:  # of a missing operator, symbol or library: builds differ in what they lack
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # nobody finds it from here on
