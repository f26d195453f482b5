"""Looks at the machine: versions, devices, memory, disk, and installs that are known to break imports."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

Level = Literal["ok", "info", "warning", "broken"]
_MARKS: dict[Level, str] = {"ok": "✓", "info": "·", "warning": "!", "broken": "✗"}
_CORE = ("torch", "transformers", "safetensors", "mergekit", "peft", "accelerate", "datasets", "numpy", "pydantic")
_FOR_BUILDERS = ("dev", "test")
"""Extras that no user needs."""
_IMPORT_SECONDS = 120


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    level: Level
    what: str
    found: str

    @property
    def mark(self) -> str:
        return _MARKS[self.level]

    @property
    def broken(self) -> bool:
        return self.level == "broken"

    def to_json(self) -> dict[str, Any]:
        return {"level": self.level, "what": self.what, "found": self.found}


def examine() -> list[Finding]:
    """Look at everything; never raises for what it finds."""
    looks: tuple[Callable[[], list[Finding]], ...] = (
        _python,
        _packages,
        _torchvision,
        _extras,
        _devices,
        _memory,
        _disk,
    )
    return [finding for look in looks for finding in look()]


def _python() -> list[Finding]:
    level: Level = "ok" if sys.version_info >= (3, 10) else "broken"
    return [Finding(level, "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]


def _packages() -> list[Finding]:
    findings = []
    for name in ("ktmerge", *_CORE):
        version = _version(name)
        findings.append(
            Finding("ok", name, version) if version else Finding("broken", name, f"not installed: pip install {name}")
        )
    return findings


def _torchvision() -> list[Finding]:
    """A torchvision built for another torch makes every import of a transformers model fail, misleadingly."""
    if find_spec("torchvision") is None:
        return [Finding("info", "torchvision", "not installed, nor needed: pillow processes images")]
    probe = subprocess.run(
        [sys.executable, "-c", "import torchvision"],
        capture_output=True,
        text=True,
        timeout=_IMPORT_SECONDS,
        check=False,
    )
    version = _version("torchvision") or "?"
    if probe.returncode == 0:
        return [Finding("ok", "torchvision", version)]
    reason = (probe.stderr.strip().splitlines() or ["no reason given"])[-1]
    return [
        Finding(
            "broken",
            "torchvision",
            f"{version} does not work with torch {_version('torch')}: {reason}. ktmerge does without it (pillow "
            "processes images), but while it is installed, transformers fails elsewhere with 'Could not import module "
            "PreTrainedModel'. Remove it: pip uninstall torchvision; or install the build that matches your torch",
        )
    ]


def _extras() -> list[Finding]:
    if _version("ktmerge") is None:
        return []
    extras = metadata.metadata("ktmerge").get_all("Provides-Extra") or []
    wanted = [Requirement(text) for text in metadata.requires("ktmerge") or []]
    return [_extra(name, wanted) for name in extras if name not in _FOR_BUILDERS]


def _extra(extra: str, wanted: Iterable[Requirement]) -> Finding:
    own = [one for one in wanted if one.marker is not None and one.marker.evaluate({"extra": extra})]
    lacking = [one for one in own if not one.specifier.contains(_version(one.name) or "0", prereleases=True)]
    if not lacking:
        return Finding("ok", f"extra {extra}", "installed")
    needed = ", ".join(f"{one.name}{one.specifier}" for one in lacking)
    return Finding("info", f"extra {extra}", f"not installed (needs {needed}): pip install 'ktmerge[{extra}]'")


def _devices() -> list[Finding]:
    if find_spec("torch") is None:
        return []
    import torch

    findings = [Finding("ok", "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads")]
    if not torch.cuda.is_available():
        return [*findings, Finding("info", "cuda", "no device; everything runs on the CPU")]
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        findings.append(Finding("ok", f"cuda:{i}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {bf16}"))
    return findings


def _memory() -> list[Finding]:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    total = pages * size / 2**30
    level: Level = "ok" if total >= 7 else "warning"
    return [
        Finding(level, "memory", f"{total:.0f} GiB" + ("" if level == "ok" else "; the demo's fine-tunes need about 5"))
    ]


def _disk() -> list[Finding]:
    from ktmerge.checkpoints.cache import cache_folder

    findings = []
    for what, folder in (("disk here", Path.cwd()), ("disk of the cache", cache_folder())):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(existing).free / 2**30
        level: Level = "ok" if free >= 5 else "warning"
        findings.append(Finding(level, what, f"{free:.0f} GiB free in {folder}"))
    return findings


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
