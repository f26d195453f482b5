"""The failures of a training that users can do something about, and what they can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ktmerge.errors import KtmergeError, ToldElsewhereError, first_line
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners.machine import TORCH_WRITES, is_disk_trouble, is_out_of_memory, less_memory
from ktmerge.tuners.partial import Partial
from ktmerge.tuners.processes import Processes


@contextmanager
def explaining(job: FinetuneJob, partial: Partial, processes: Processes, longest: int, device: str) -> Iterator[None]:
    """Answer them with a sentence; of several processes the first one alone.

    Args:
        job: what was asked for.
        partial: the folder that is worked in.
        processes: all that take part.
        longest: tokens of the longest sample.
        device: that is trained on.

    Raises:
        KtmergeError: out of memory, a full disk, a process that is gone.
    """
    try:
        yield
    except KtmergeError as error:
        if processes.is_first:
            raise
        raise ToldElsewhereError(error.exit_code) from None  # these are the same in every process
    except Exception as error:  # the libraries have no common type for either failure
        if processes.has_lost_one(error):
            if not processes.is_first:
                raise ToldElsewhereError(1) from error
            kept = "go on from the last saved step with --resume" if partial.has_state else "start again"
            raise KtmergeError(f"another process of the run is gone, see what it says; {kept}.") from error
        if is_out_of_memory(error):
            raise KtmergeError(f"out of memory while fine-tuning. {less_memory(job, longest, device)}") from error
        if is_disk_trouble(error):
            raise KtmergeError(
                f"{partial.folder}: cannot be written ({_why(error)}); free some space and go on with --resume."
            ) from error
        raise


def _why(error: Exception) -> str:
    """What a library says of a file; torch says where in itself it noticed, and no more."""
    said = first_line(error)
    return "a file could not be written whole" if any(word in said for word in TORCH_WRITES) else said
