"""What a blend runs on: the device, the cores. Loads torch only where another than the CPU is asked for."""

from __future__ import annotations

import os

from ktmerge.errors import UsageError


def choose_device(wanted: str, option: str = "--device ") -> str:
    """The device called ``auto``, ``cpu`` or ``cuda`` (with or without an index), as torch calls it.

    ``auto`` is the CPU: from file to file its compiled kernels wait for the disk already, and the bytes are the same.

    Args:
        wanted: by whoever says what blends.
        option: how that was said.

    Raises:
        UsageError: there is no such device here.
    """
    if wanted in ("auto", "cpu"):
        return "cpu"
    kind, colon, index = wanted.partition(":")
    if kind != "cuda" or (colon and not index.isdecimal()):
        raise UsageError(f"{option}{wanted}: unknown; write auto, cpu or cuda.")
    import torch

    if not torch.cuda.is_available():
        raise UsageError(f"{option}{wanted}: no CUDA device is available here; use cpu or auto.")
    if index and int(index) >= torch.cuda.device_count():
        raise UsageError(f"{option}{wanted}: there are only {torch.cuda.device_count()} CUDA devices.")
    return wanted


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
