"""From trained weights to a checkpoint under the base's names, with everything else the base has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ktmerge.checkpoints.adapter import CONFIG, WEIGHTS
from ktmerge.checkpoints.alignment import align
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.dtypes import torch_dtype
from ktmerge.checkpoints.files import clear_os_errors, file_digest
from ktmerge.checkpoints.staging import Staging, sync_tree
from ktmerge.checkpoints.writer import Writer
from ktmerge.errors import KtmergeError
from ktmerge.progress import SILENT, Progress

if TYPE_CHECKING:
    from ktmerge.checkpoints.reader import Reader

TAGS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_ELEMENTS = 1 << 22
"""Elements converted at a time."""
Texts = Callable[[Mapping[str, str]], Mapping[str, str]]
"""Makes text files by name, given the sha256 of the weight files by name."""


def no_texts(digests: Mapping[str, str]) -> dict[str, str]:
    """Of neither file."""
    return {}


def export(
    base: Checkpoint,
    trained: Path,
    out: Path,
    *,
    dtype: str,
    texts: Texts = no_texts,
    extras: Sequence[Path] = (),
    overwrite: bool,
    progress: Progress = SILENT,
) -> None:
    """Write the weights in ``trained`` as a copy of ``base`` with other values; ``out`` appears by one rename.

    Buffers, and tensors of the base that the model has no use for, keep their bytes.

    Args:
        base: what was fine-tuned.
        trained: a checkpoint as transformers saves it.
        out: the folder to appear.
        dtype: float32, bfloat16, float16, or base (each tensor as in the base).
        texts: makes further files.
        extras: further files to copy, under their own names.
        overwrite: replace a checkpoint at ``out``.
        progress: told the elements written.

    Raises:
        KtmergeError: the trained weights do not answer to the base's, do not fit the type, or cannot be written.
    """
    tuned = Checkpoint.open(trained)
    found = align(base, tuned, "the trained model")
    wrong = (*found.extra, *(pair.name for pair in found.mismatched), *found.ambiguous)
    if wrong:
        raise KtmergeError(f"{out}: transformers names tensors otherwise than the base, e.g. '{wrong[0]}'.")
    changed = {name: other for name, other in found.mapping.items() if base.tensors[name].is_float}
    tags = {name: TAGS.get(dtype, base.tensors[name].dtype) for name in changed}
    with (
        Writer(out, overwrite) as writer,
        base.reader() as before,
        tuned.reader() as after,
        progress.task(f"saving {out.name}", sum(info.numel for info in base.tensors.values()), "items") as step,
    ):
        writer.plan_like(base, tags)
        for name, info in base.tensors.items():
            if name in changed:
                _convert(after, changed[name], writer, name)
            else:
                _copy(before, writer, name)
            step.advance(info.numel)
        for file, text in {**_config(base, dtype), **texts(writer.digests())}.items():
            writer.add_text(file, text)
        for path in extras:
            with clear_os_errors(out / path.name):
                shutil.copyfile(path, writer.folder / path.name)
        writer.copy_files(base)


def publish_adapter(source: Path, out: Path, *, texts: Texts = no_texts, overwrite: bool) -> None:
    """Copy an adapter's files, and what else is to go beside it, to ``out``, which appears by one rename.

    Args:
        source: a folder with an adapter; those of X-LoRA have others inside.
        out: the folder to appear.
        texts: makes further files.
        overwrite: replace an adapter or checkpoint at ``out``.

    Raises:
        KtmergeError: it cannot be written.
    """
    staging = Staging(out, overwrite)
    staging.open()
    try:
        with clear_os_errors(out):
            for file in sorted([*source.rglob(CONFIG), *source.rglob(WEIGHTS), *source.glob("ktmerge-*")]):
                target = staging.folder / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
            weights = [file.relative_to(source).as_posix() for file in sorted(source.rglob(WEIGHTS))]
            for name, text in texts({file: file_digest(staging.folder / file) for file in weights}).items():
                (staging.folder / name).write_text(text, encoding="utf-8")
            sync_tree(staging.folder)
        staging.publish()
    finally:
        staging.discard()


def _convert(reader: Reader, source: str, writer: Writer, name: str) -> None:
    import torch

    info = writer.planned[name]
    for start in range(0, info.numel, _ELEMENTS):
        values = reader.read(source, start, min(start + _ELEMENTS, info.numel)).to(torch_dtype(info.dtype))
        if not bool(torch.isfinite(values).all()):
            raise KtmergeError(f"tensor '{name}' has values that {info.dtype} cannot hold; save as float32 instead.")
        writer.write(name, values, start)


def _copy(reader: Reader, writer: Writer, name: str) -> None:
    position = 0
    for block in reader.blocks(name):
        writer.write_bytes(name, block, position)
        position += len(block)


def _config(base: Checkpoint, dtype: str) -> dict[str, str]:
    """The base's configuration naming the new type: transformers loads weights in the type it finds there."""
    if dtype == "base" or not base.config:
        return {}
    key = "torch_dtype" if "torch_dtype" in base.config else "dtype"
    return {"config.json": json.dumps({**base.config, key: dtype}, indent=2, ensure_ascii=False) + "\n"}
