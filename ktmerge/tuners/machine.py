"""What a fine-tune runs on: device, precision, and whether its memory will do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ktmerge.errors import UsageError
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners.optimizers import KINDS

WEIGHT_BYTES, GRADIENT_BYTES, STATE_BYTES = 4, 4, 8
"""Per parameter: fp32 masters and gradients, and the two moments of Adam."""
CHOSEN_BYTES, _MASK_BYTES = 20, 2
"""Of a selection, per element that moves its value, place and moments (Adam's); and for every element two masks."""
TORCH_WRITES = ("inline_container", "PytorchStreamWriter")
"""What torch's errors have in them when a file cannot be written."""
_WRITE_FAILURES = (*TORCH_WRITES, "I/O error", "os error")


@dataclass(frozen=True)
class Machine:
    """Where a job is computed, and in which precision its forward pass is."""

    device: Literal["cuda", "cpu"]
    name: str
    precision: Literal["float32", "bfloat16"]
    threads: int


def choose_machine(precision: str) -> Machine:
    """The first CUDA device if there is one, else all cores; ``auto`` is bfloat16 on a CUDA device that computes in it.

    On a CPU ``auto`` is float32 even where bfloat16 is faster (1.4 times, with AVX-512): a forward pass in bfloat16
    doesn't see changes below half of its last place, so the first dozens of steps at a usual rate are taken blindly.
    Four steps at 5e-5 on a model of 135M parameters took the loss from 5.2 to 0.9 in float32, to 2.7 in bfloat16.

    Raises:
        UsageError: bfloat16 is asked of a CUDA device that cannot.
    """
    import torch

    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        able = bool(torch.cuda.is_bf16_supported(including_emulation=False))
        if precision == "bfloat16" and not able:
            raise UsageError(
                f"precision bfloat16: {torch.cuda.get_device_name()} cannot compute in it; use float32 or auto."
            )
        return Machine("cuda", torch.cuda.get_device_name(), _resolved(precision, auto_is_bfloat16=able), threads)
    return Machine("cpu", f"cpu, {threads} threads", _resolved(precision, auto_is_bfloat16=False), threads)


def _resolved(precision: str, *, auto_is_bfloat16: bool) -> Literal["float32", "bfloat16"]:
    return "bfloat16" if precision == "bfloat16" or (precision == "auto" and auto_is_bfloat16) else "float32"


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    """Have CUDA compute the same bits every time, where it can; a CPU with a fixed number of threads always does."""
    if device != "cuda":
        yield
        return
    import torch

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling: Any = torch.utils.deterministic
    fill = filling.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        filling.fill_uninitialized_memory = fill


def state_bytes(job: FinetuneJob) -> float:
    """What the optimizer keeps for each trained parameter: of a selection, for those that move, and masks."""
    state = 0.0 if job.offload_optimizer else KINDS[job.optimizer].state_bytes
    if job.select == "none":
        return state
    density = job.density if job.select == "fused" else job.selected_density
    return _MASK_BYTES + (CHOSEN_BYTES - STATE_BYTES + state) * (density or 0.5)


def kept_bytes(job: FinetuneJob) -> float:
    """What is kept for each trained parameter besides: the base's values, Fisher information, averages, evidence."""
    pulled = (4.0 if job.fisher else 0.0) + (4.0 if job.l2_sp else 0.0)
    averages = {"none": 0.0, "ema": 4.0, "lawa": 4.0 * job.lawa_window}[job.average]
    evidence = 4.0 if job.selects_by_gradient and job.selects_every else 0.0
    origins = 4.0 if job.mask == "soft" or (job.select == "fused" and job.every) else 0.0
    guard = 0.0 if job.stop_upstream is None else 4.0
    return pulled + averages + evidence + origins + guard + (4.0 if job.distill else 0.0)


def less_memory(job: FinetuneJob, longest: int, device: str) -> str:
    """The three settings to change when memory runs out, of those that would change anything.

    Args:
        job: that needs too much.
        longest: tokens of its longest sample.
        device: what it runs on.
    """
    part = max((size for size in range(1, job.batch_size) if job.batch_size % size == 0), default=0)
    times = job.gradient_accumulation * (job.batch_size // max(1, part))
    ways = {
        f"batch_size={part} and gradient_accumulation={times} (same result, less memory)": part > 0
        and not job.replay
        and not job.optimizer_in_backward,
        "activation_checkpointing=true": not job.activation_checkpointing,
        f"a max_length below {longest}, the longest sample": True,
        "offload_optimizer=true": device != "cpu" and not job.offload_optimizer and job.select == "none",
        "optimizer=adafactor": job.optimizer == "adamw" and job.select != "child_f",
        "a train that moves less, such as last:4": True,
    }
    first, second, third = [way for way, helps in ways.items() if helps][:3]
    return f"Set {first}, {second}, or {third}."


def memory_available(device: str) -> float:
    """Bytes free on the device, within the limit of the container if there is one."""
    if device == "cuda":
        import torch

        return float(torch.cuda.mem_get_info()[0])
    return min(_system_left(), _container_left())


def _system_left() -> float:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))


def _container_left() -> float:
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="utf-8").strip()
        used = (group / "memory.current").read_text(encoding="utf-8").strip()
    except OSError:
        return float("inf")
    return float("inf") if limit == "max" else float(limit) - float(used)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on any device."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in said or "out of memory" in said)


def is_disk_trouble(error: BaseException) -> bool:
    """Whether an error means that a file could not be written, as any of the libraries says it."""
    said = str(error)
    return isinstance(error, OSError) or any(word in said for word in _WRITE_FAILURES)
