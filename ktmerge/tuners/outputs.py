"""The folders that a fine-tune leaves: the tuned model, and what its job asks for beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.digests import remember
from ktmerge.checkpoints.files import refuse_overlap
from ktmerge.checkpoints.staging import refuse_output
from ktmerge.progress import Progress
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners.export import export, publish_adapter
from ktmerge.tuners.partial import LOG, Partial
from ktmerge.tuners.report import RECORD


@dataclass(frozen=True)
class Outputs:
    """Where the results of one job go.

    Attributes:
        out: the tuned model, or the adapter where it cannot be folded in.
        last: the weights of the last step, beside an average of them and others.
        adapter: what was folded into the tuned model.
    """

    job: FinetuneJob
    out: Path
    last: Path | None
    adapter: Path | None

    @classmethod
    def of(cls, job: FinetuneJob, out: Path) -> Outputs:
        """What ``job`` leaves in ``out`` and beside it."""
        last = out.with_name(f"{out.name}-last") if job.average != "none" and job.export == "both" else None
        adapter = out.with_name(f"{out.name}-adapter") if job.adapter is not None and job.adapter.keep else None
        return cls(job, out, last, adapter)

    def refuse(self, base: Path, *, overwrite: bool, resume: bool) -> None:
        """Refuse folders that hold something that is to stay.

        Raises:
            UsageError: one is there, or is, holds or lies in the base.
        """
        refuse_overlap(self.out, [base])
        refuse_output(self.out, overwrite or (resume and (self.out / RECORD).exists()))
        for beside in (self.last, self.adapter):
            if beside is not None:
                refuse_overlap(beside, [base])
                refuse_output(beside, overwrite or resume)

    def publish(
        self,
        base: Checkpoint,
        partial: Partial,
        record: dict[str, Any],
        *,
        overwrite: bool,
        resume: bool,
        progress: Progress,
    ) -> dict[str, Any]:
        """Write all of them from what training left in ``partial``; the tuned model last.

        Returns:
            the record as it stands in the tuned model: with the sha256 of its weights.

        Raises:
            KtmergeError: one cannot be written.
        """
        dtype, again = self.job.save_dtype, overwrite or resume
        told: dict[str, Any] = {}

        def texts(digests: Mapping[str, str]) -> dict[str, str]:
            told.update(record, output={"sha256": dict(digests)})
            return {
                RECORD: json.dumps(told, indent=2, ensure_ascii=False) + "\n",
                LOG: partial.log.read_text("utf-8"),
            }

        if self.last is not None:
            export(base, partial.last, self.last, dtype=dtype, texts=texts, overwrite=again, progress=progress)
        if self.adapter is not None:
            publish_adapter(partial.kept_adapter, self.adapter, overwrite=again)
        if self.job.adapter is not None and not self.job.adapter.family.folds:
            publish_adapter(partial.final, self.out, texts=texts, overwrite=overwrite)
        else:
            extras = sorted(partial.final.glob("ktmerge-*"))
            export(
                base, partial.final, self.out, dtype=dtype, texts=texts, extras=extras, overwrite=overwrite,
                progress=progress,
            )  # fmt: skip
        for file, digest in told["output"]["sha256"].items():
            remember(self.out / file, digest)
        return told
