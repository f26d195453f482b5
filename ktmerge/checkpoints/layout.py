"""Which files of a checkpoint folder hold its weights, which travel with them, and which must not.

Knows file names and the shard index; opens no weight file.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate
from pathlib import Path, PurePosixPath
from typing import Any

from ktmerge.checkpoints.regular import once, read_regular
from ktmerge.errors import UsageError

INDEX_SUFFIX = ".safetensors.index.json"

# Other copies of the weights, and what a training run leaves: neither describes a blend of the checkpoint.
_LEFT_BEHIND = (
    "*.safetensors",
    f"*{INDEX_SUFFIX}",
    "*.bin.index.json",
    "pytorch_model*",
    "model*.bin",
    "adapter_model*.bin",
    "model*.pt*",
    "consolidated*.pt*",
    "*.gguf",
    "*.onnx",
    "*.onnx_data",
    "*.msgpack",
    "*.h5",
    "*.ot",
    "*.ckpt",
    "*.tflite",
    "*.pyc",
    "optimizer.*",
    "scheduler.pt",
    "rng_state*.pth",
    "training_args.bin",
    "trainer_state.json",
    "ktmerge.json",
    "ktmerge-run.json",
    "ktmerge-selection.*",
    "ktmerge-losses.png",
    "ktmerge-events.tfevents",
    "log.jsonl",
)
_STAYS = re.compile("|".join(translate(pattern) for pattern in _LEFT_BEHIND))
_TRAINER_FOLDERS = re.compile(r"^(checkpoint-\d+|global_step\d+|__pycache__)$")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")


@dataclass(frozen=True)
class Layout:
    """The files of one checkpoint folder, as paths relative to it.

    ``weight_map`` says which tensor the index promises in which file; ``None`` without an index.
    """

    weight_files: tuple[str, ...]
    index_file: str | None
    weight_map: dict[str, str] | None
    other_files: tuple[str, ...]
    left_behind: tuple[str, ...]


def read_layout(root: Path) -> Layout:
    """Find the weights of the checkpoint in the folder ``root``.

    Raises:
        UsageError: not a folder, no safetensors weights, several that could be meant, or a lying index.
    """
    names = _names(root)
    index = _choose_index(root, names)
    if index is not None:
        weight_map = _weight_map(root, index)
        weights = tuple(sorted(set(weight_map.values())))
        for file in weights:
            if not (root / file).exists():
                raise UsageError(f"{root / index}: names the file '{file}', which is missing from the folder.")
        if "model.safetensors" in names and "model.safetensors" not in weights:
            raise UsageError(
                f"{root}: has both model.safetensors and {index}, which names other files; loaders disagree on which "
                "one counts. Delete the stale one."
            )
    else:
        weight_map = None
        weights = (_single(root, names),)
    carried, left_behind = files_beside(root, set(weights))
    return Layout(weights, index, weight_map, carried, left_behind)


def _names(root: Path) -> set[str]:
    try:
        names = set(os.listdir(root))
    except NotADirectoryError:
        raise UsageError(f"{root}: is a file; give the folder of the checkpoint.") from None
    except OSError as error:
        raise UsageError(f"{root}: cannot be read as a checkpoint folder: {error.strerror}.") from None
    if "adapter_config.json" in names:
        raise UsageError(
            f"{root}: is a PEFT adapter, not a whole model; as an expert of a recipe it is folded into the base, "
            "elsewhere give a whole model (PeftModel.merge_and_unload, then save_pretrained)."
        )
    return names


def _choose_index(root: Path, names: set[str]) -> str | None:
    indexes = sorted(name for name in names if name.endswith(INDEX_SUFFIX))
    preferred = f"model{INDEX_SUFFIX}"
    if preferred in indexes:
        return preferred
    if "model.safetensors" in names or not indexes:
        return None
    if len(indexes) > 1:
        raise UsageError(f"{root}: has several weight indexes ({', '.join(indexes)}); keep one.")
    return indexes[0]


def _single(root: Path, names: set[str]) -> str:
    files = sorted(name for name in names if name.endswith(".safetensors") and not name.startswith("ktmerge-"))
    if "model.safetensors" in files:
        return "model.safetensors"
    if len(files) == 1 and not _SHARD.search(files[0]):
        return files[0]
    if any(_SHARD.search(name) for name in files):
        raise UsageError(f"{root}: has shards such as {files[0]}, but their index (*{INDEX_SUFFIX}) is missing.")
    if files:
        raise UsageError(f"{root}: several files could be the weights ({', '.join(files)}), and there is no index.")
    raise UsageError(f"{root}: {_nothing_found(root, names)}")


def _nothing_found(root: Path, names: set[str]) -> str:
    pickled = sorted(name for name in names if fnmatchcase(name, "*.bin") or name.endswith((".pth", ".pt", ".ckpt")))
    if pickled:
        return (
            f"has its weights only as {pickled[0]}, a pickle that may run code when opened; convert it to safetensors "
            "first (load it with transformers where you trust it, then save_pretrained)."
        )
    if any(name.endswith(".gguf") for name in names):
        return "has its weights only as GGUF; convert them to safetensors first."
    folders = sorted(path.parent.name for path in root.glob("*/*.safetensors"))
    if folders:
        return f"has no weights of its own; did you mean one of its folders ({', '.join(dict.fromkeys(folders))})?"
    return "no *.safetensors found; give the folder of a checkpoint."


def _weight_map(root: Path, index: str) -> dict[str, str]:
    document = read_json(root / index, unique=True)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{root / index}: has no weight_map from tensor names to files.")
    sound: dict[str, str] = {}
    for name, file in weight_map.items():
        if isinstance(file, str) and file in sound:
            continue
        said = f"{root / index}: tensor {name!r} is said to be in {file!r}"
        if not isinstance(file, str) or not file.endswith(".safetensors") or not file.isprintable() or len(file) > 255:
            raise UsageError(f"{said}, which is no safetensors file.")
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\\" in file:
            raise UsageError(f"{said}, outside the folder.")
        sound[file] = path.as_posix()  # without what leads nowhere, as in ./model.safetensors
    return {name: sound[file] for name, file in weight_map.items()}


def read_config(root: Path, name: str = "config.json") -> dict[str, Any]:
    """What a configuration file of a checkpoint folder holds; nothing if there is none. Raises as `read_json` does."""
    return read_json(root / name) if (root / name).exists() else {}


def read_json(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """Read a JSON file that must hold an object; ``unique``: in which no key may stand twice.

    Raises:
        UsageError: unreadable, not JSON, or not an object.
    """
    try:
        document = json.loads(read_regular(path).decode("utf-8"), object_pairs_hook=once if unique else None)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}.") from None
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply.") from None
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error}).") from None
    if not isinstance(document, dict):
        raise UsageError(f"{path}: not a JSON object.")
    return document


def files_beside(root: Path, weights: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files below ``root`` other than its ``weights`` that travel with them, and those that don't.

    Raises:
        UsageError: one is unreadable, or neither file nor folder.
    """
    modules = _modules(root)
    carried: list[str] = []
    left_behind: list[str] = []
    for path in _files_below(os.fspath(root)):
        relative = os.path.relpath(path, root).replace(os.sep, "/")
        if relative in weights:
            continue
        folder, name = os.path.split(relative)
        if _STAYS.match(name) and not (folder in modules and name.endswith((".safetensors", ".bin"))):
            left_behind.append(relative)
            continue
        try:
            regular = stat.S_ISREG(os.stat(path).st_mode)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror}.") from None
        if not regular:
            raise UsageError(f"{path}: is neither a file nor a folder; remove it from the checkpoint.")
        carried.append(relative)
    return tuple(sorted(carried)), tuple(sorted(left_behind))


def _modules(root: Path) -> set[str]:
    """Folders with the further modules (pooling, dense) of a sentence-transformers model, whose weights are its own."""
    try:
        listed = json.loads(read_regular(root / "modules.json"))
    except (OSError, ValueError, RecursionError):
        return set()
    found = [one.get("path") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    return {path for path in found if isinstance(path, str) and path}


def _files_below(root: str) -> Iterator[str]:
    """All files but hidden ones and those of training runs; linked folders are entered, each once, but for those that
    ``root`` lies in.
    """

    def refuse(error: OSError) -> None:
        raise UsageError(f"{error.filename}: cannot be read: {error.strerror}.") from None

    entered = {os.fspath(parent) for parent in Path(os.path.realpath(root)).parents}
    for folder, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _TRAINER_FOLDERS.match(name))
        yield from (os.path.join(folder, name) for name in files if not name.startswith("."))
