"""From a checkpoint folder to a model and a tokenizer in memory, quietly, and only if nothing is missing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.files import file_digest
from ktmerge.checkpoints.layout import INDEX_SUFFIX
from ktmerge.checkpoints.quiet import hide_broken_torchvision, quiet_transformers
from ktmerge.errors import KtmergeError, UsageError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from ktmerge.eval.sight import Sight

_TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
"""Files of tokenizers and processors end so, whatever each family calls them."""
_OTHERS = ("config.json", "generation_config.json", "trainer_state.json")


def choose_device(device: str) -> torch.device:
    """``auto``: cuda if there is one, else cpu.

    Raises:
        UsageError: not a device, or not on this machine.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"device '{device}': choose auto, cpu or cuda.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device '{device}': no CUDA device is visible here; choose cpu or auto.")
    try:
        return torch.device(device)
    except RuntimeError:
        raise UsageError(f"device '{device}': choose auto, cpu or cuda.") from None


def choose_dtype(device: torch.device) -> torch.dtype:
    """What all models of a run are scored in: fp32 on CPU; on CUDA bf16, or fp16 where there is no bf16."""
    import torch

    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def load_model(path: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Load the causal language model in ``path`` for scoring, the one that sees where there is one. Only safetensors,
    no code from the folder.

    Raises:
        UsageError: transformers knows no such text model, or weights are missing in the file.
        KtmergeError: it does not fit into the device's memory.
    """
    import torch

    try:
        with quiet_transformers():
            loaded: Any = _loader(path).from_pretrained(
                path,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            model, info = loaded
            model = model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise KtmergeError(f"{path}: does not fit into the memory of {device}.") from error
    except Exception as error:  # transformers raises whatever it likes at broken files and settings
        raise UsageError(f"{path}: transformers cannot load it: {first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UsageError(
            f"{path}: {len(missing)} tensors of the model are in no file, such as '{missing[0]}'; they would be random."
        )
    return model


def _loader(path: Path) -> Any:
    """The class of transformers that loads the model in ``path`` whole."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    sees: Any = AutoModelForImageTextToText
    return sees if "vision_config" in config.to_dict() and type(config) in sees._model_mapping else AutoModelForCausalLM


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in ``path``.

    Raises:
        UsageError: there is none, or transformers cannot read it.
    """
    hide_broken_torchvision()
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise whatever they like at broken files
        raise UsageError(f"{path}: no tokenizer that transformers can load: {first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UsageError(f"{path}: no tokenizer that transformers can load.")
    return tokenizer


def load_sight(path: Path) -> Sight:
    """What prepares images for the model in ``path``.

    Raises:
        UsageError: it has no processor that takes images.
    """
    from ktmerge.checkpoints.processor import load_processor
    from ktmerge.eval.sight import Sight

    return Sight(load_processor(path))


def tokenizer_files_digest(path: Path) -> str:
    """sha256 over all that may be of the tokenizer and the processor: equal files need not be loaded twice."""
    digest = hashlib.sha256()
    for file in sorted([*path.iterdir(), *path.glob("*templates/*")]):
        if (
            file.suffix in _TEXTS
            and file.name not in _OTHERS
            and not file.name.endswith(INDEX_SUFFIX)
            and file.is_file()
        ):
            digest.update(f"{file.relative_to(path)}\0{file_digest(file)}\n".encode())
    return digest.hexdigest()
