"""What a blend runs on: the device, the cores. Loads torch only where there may be another than the CPU."""

from __future__ import annotations

import ctypes
import os

from ktmerge.errors import UsageError


def choose_device(wanted: str) -> str:
    """The device called ``auto``, ``cpu`` or ``cuda`` (with or without an index), as torch calls it.

    Raises:
        UsageError: there is no such device here.
    """
    if wanted == "cpu" or (wanted == "auto" and not _has_driver()):
        return "cpu"
    kind, _, index = wanted.partition(":")
    if kind not in ("auto", "cuda") or (index and not index.isdecimal()):
        raise UsageError(f"--device {wanted}: unknown; write auto, cpu or cuda.")
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is available here; use cpu or auto.")
    if index and int(index) >= torch.cuda.device_count():
        raise UsageError(f"--device {wanted}: there are only {torch.cuda.device_count()} CUDA devices.")
    return wanted


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_driver() -> bool:
    """Whether the driver that every CUDA device needs is installed; asking torch would take a second."""
    for name in ("libcuda.so.1", "nvcuda.dll", "libamdhip64.so"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False
