"""The processes of one run, as torchrun or a cluster starts them: which this one is, and what all of them agree on.

Loads torch only where there are several.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from ktmerge.errors import KtmergeError, ToldElsewhereError, UsageError
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.finetuning import FinetuneJob

_PATIENCE = timedelta(hours=12)
"""How long processes wait for the first one, which reads, writes and exports for all."""
_OTHER_ENGINES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
_OPTIMIZERS = ("adamw", "sgd")
"""Those whose rules work element by element, so on the rows of any process alike."""
_LOST = ("Connection closed by peer", "Connection reset by peer", "[Gloo", "gloo/transport", "NCCL error")
"""As the libraries say it."""
_T = TypeVar("_T")
_groups: list[Any] = []
"""The group of host memory in which all agree, made once."""


@dataclass(frozen=True)
class Processes:
    """Of a run; of one that was started by itself (`ALONE`) everything here is free.

    Attributes:
        rank: which one this is; the first is 0, and it alone writes and prints.
        count: how many there are.
    """

    rank: int
    count: int

    @classmethod
    def join(cls) -> Processes:
        """Find the others, if there are any.

        Raises:
            UsageError: the launcher asks for another engine, would silently shard nothing, or names no processes.
        """
        found = cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        _refuse_other_engines(found.count)
        if found.is_several:
            _require_launched()
            # accelerate would shard the model a second time
            os.environ.pop("ACCELERATE_USE_FSDP", None)
            _join_groups()
        return found

    @property
    def is_several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def voice(self, progress: Progress) -> Progress:
        """Where this process reports to: the first as it was told, the others nowhere."""
        if not self.is_several and "ACCELERATE_MIXED_PRECISION" in os.environ:
            progress.note("accelerate launch started one process: nothing is sharded. On CPUs, start with torchrun.")
        return progress if self.is_first else SILENT

    def any(self, flag: bool) -> bool:
        """Whether it holds in one of them."""
        return flag if not self.is_several else any(self._gather(flag))

    def has_lost_one(self, error: BaseException) -> bool:
        """Whether an error means that another process is gone."""
        said = str(error)
        return self.is_several and any(word in said for word in _LOST)

    def wait(self) -> None:
        """Until all are here."""
        if self.is_several:
            self._gather(None)

    def first(self, work: Callable[[], _T]) -> _T:
        """Have the first process do something; all get its result, or fail as it does.

        Raises:
            ToldElsewhereError: it failed, in any but the first.
        """
        if not self.is_several:
            return work()
        result: list[Any] = [None]
        with self.together():
            if self.is_first:
                result[0] = work()
        import torch.distributed as distributed

        distributed.broadcast_object_list(result, src=0, group=_groups[0])
        found: _T = result[0]
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """Fail in all of them if one fails in here; the one that does says why.

        Raises:
            ToldElsewhereError: another one failed.
        """
        if not self.is_several:
            yield
            return
        own: KtmergeError | None = None
        try:
            yield
        except KtmergeError as error:
            own = error
        codes = self._gather(None if own is None else own.exit_code)
        teller = next((rank for rank, code in enumerate(codes) if code is not None), None)
        if teller is None:
            return
        if teller == self.rank and own is not None:
            raise own
        raise ToldElsewhereError(codes[teller])

    def _gather(self, value: Any) -> list[Any]:
        import torch.distributed as distributed

        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value, group=_groups[0])
        return values


def passes_of(batch: int, accumulation: int, count: int) -> tuple[int, int]:
    """Samples of a forward pass, at most ``batch``, and passes of a step, for each of ``count`` processes.

    Raises:
        UsageError: the samples of a step cannot be shared equally.
    """
    step = batch * accumulation
    if step % count:
        raise UsageError(
            f"{count} processes cannot share the {step} samples of a step (batch_size {batch} * gradient_accumulation "
            f"{accumulation}) equally; make it a multiple of {count}."
        )
    size = max(size for size in range(1, batch + 1) if step % (size * count) == 0)
    return size, step // (size * count)


ALONE = Processes(0, 1)
"""A run that was started by itself."""


def require_shareable(job: FinetuneJob, count: int) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        UsageError: the job asks for it.
    """
    if count == 1:
        return
    passes_of(job.batch_size, job.gradient_accumulation, count)
    for asked, what in (
        (job.distill > 0, "distill, which needs a whole second model"),
        (job.adapter is not None, "adapter"),
        (job.packing, "packing"),
        (job.curriculum in ("easy", "common"), f"curriculum {job.curriculum}"),
        (job.offload_optimizer, "offload_optimizer"),
        (job.optimizer_in_backward, "optimizer_in_backward"),
        (job.optimizer not in _OPTIMIZERS, f"optimizer {job.optimizer}; take {' or '.join(_OPTIMIZERS)}"),
    ):
        if asked:
            raise UsageError(f"{count} processes share one model, which cannot be had with {what}; use one process.")


def _refuse_other_engines(count: int) -> None:
    for variable, engine in _OTHER_ENGINES.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise UsageError(f"ktmerge finetune shards with FSDP2; the launcher is set to {engine}: take that out.")
    if count == 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UsageError(
            "the launcher asks for FSDP but started one process, so nothing would be sharded; "
            "give it --num_processes, or start with torchrun --nproc-per-node N -m ktmerge finetune."
        )


def _require_launched() -> None:
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {', '.join(missing)} not set: start several processes with "
            "torchrun --nproc-per-node N -m ktmerge finetune, or one without WORLD_SIZE."
        )


def _join_groups() -> None:
    import torch
    import torch.distributed as distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not distributed.is_initialized():
        distributed.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    if not _groups:
        _groups.append(distributed.new_group(backend="gloo", timeout=_PATIENCE))
