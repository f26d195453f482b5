"""The lock of a blend: all that decides its bytes, input files by their sha256 included. Loads no torch.

A lock has no path of the machine it was made on; whoever has the same files anywhere can hold theirs against it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.digests import FileDigest, digest_of, input_files
from ktmerge.checkpoints.files import file_digest
from ktmerge.checkpoints.regular import is_file, read_regular
from ktmerge.checkpoints.signals import uninterrupted
from ktmerge.checkpoints.workers import Workers
from ktmerge.errors import UsageError, refuse
from ktmerge.merge.card import licence
from ktmerge.merge.plan import Plan
from ktmerge.merge.record import FILE as RECORD
from ktmerge.merge.record import inputs_of, origin
from ktmerge.merge.report import BlendReport
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.document import read_yaml, yaml_text

FILE = "ktmerge.lock.yaml"
VERSION = 1
TUNED = "ktmerge-run.json"
_HEAD = "# What a blend was made of, to the last bit. Written by ktmerge; not to be edited.\n"
_THREADS = 2

Digests = Mapping[str, Mapping[str, FileDigest]]


@dataclass(frozen=True)
class Departure:
    """One thing that is not as a lock says.

    Attributes:
        what: in words.
        told: how it differs.
        decides: whether it changes what is written; versions of libraries may, and only a blend tells.
    """

    what: str
    told: str
    decides: bool = True


@contextmanager
def digesting(plan: Plan, *, rehash: bool = False) -> Iterator[Callable[[], Digests]]:
    """Work out the sha256 of every input file in the background, while the blend reads the same pages.

    Args:
        plan: whose inputs.
        rehash: read every file, also what is remembered.

    Yields:
        what waits for size and sha256 by input and file; KtmergeError if one cannot be read, or changed meanwhile.
    """
    stop, pool = threading.Event(), Workers(_THREADS, "digest")
    try:
        with uninterrupted():
            found = {
                name: {file: pool.submit(digest_of, path, stop, rehash=rehash) for file, path in files.items()}
                for name, files in files_of(plan).items()
            }
        yield lambda: {name: {file: one.result() for file, one in files.items()} for name, files in found.items()}
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def lock(plan: Plan, digests: Digests, report: BlendReport | None = None) -> dict[str, Any]:
    """All that decides the bytes of ``plan``'s output, and of a blend that was done, what came out."""
    told = origin(plan)
    references = {"base": told["recipe"]["base"]}
    references |= {name: expert["model"] for name, expert in told["recipe"]["experts"].items()}
    inputs = {
        name: {
            "model": references[name],
            **({"licence": stated} if (stated := licence(checkpoint)) else {}),
            **told["inputs"][name],
            "files": {_as_text(file): asdict(one) for file, one in digests[name].items()},
            **_tuned(checkpoint),
        }
        for name, checkpoint in inputs_of(plan).items()
    }
    return {
        "ktmerge_lock": VERSION,
        **told,
        "numerics": {
            "compute": "float32, rounded once",
            "order of experts": "by name",
            "rounding": plan.recipe.output.rounding,
            "dtype": plan.recipe.output.dtype,
            "tensors": "the base's names, shapes and ties",
            "other files": "the base's",
        },
        "inputs": inputs,
        **({} if report is None else {"output": output_of(report)}),
    }


def output_of(report: BlendReport) -> dict[str, Any]:
    """What came out: files by their sha256, and how far each part moved."""
    beside = {_as_text(file): digest for file, digest in report.beside.items()}
    return {"sha256": report.out, "beside": beside, "parts": report.parts()}


def lock_text(document: Mapping[str, Any]) -> str:
    """A lock as YAML; the same lock gives the same text."""
    plain = json.loads(json.dumps(document))
    return _HEAD + yaml_text(plain)


def read_lock(path: Path) -> dict[str, Any]:
    """A lock from its file, or from the folder of a blend.

    Raises:
        UsageError: there is none, it is no lock, or a newer ktmerge wrote it.
    """
    file = path / FILE if os.path.isdir(path) else path
    if not is_file(file, path):
        raise UsageError(f"{file}: no such lock; 'ktmerge recipe lock' writes one.")
    document = read_yaml(file)
    version = document.get("ktmerge_lock") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(version, int):
        raise UsageError(f"{file}: is no lock; 'ktmerge recipe lock' writes one.")
    if version > VERSION:
        raise UsageError(f"{file}: a lock of version {version}, this ktmerge knows {VERSION}; upgrade ktmerge.")
    wanted = {"recipe": dict, "versions": dict, "methods": dict, "random": dict, "inputs": dict, "coefficients": str}
    broken = [key for key, kind in wanted.items() if not isinstance(document.get(key), kind)]
    broken += [] if broken else [f"inputs.{name}" for name, one in document["inputs"].items() if not _is_input(one)]
    output = document.get("output", {"sha256": {}})
    broken += [] if isinstance(output, dict) and _are_digests(output.get("sha256")) else ["output"]
    if broken:
        raise UsageError(f"{file}: the lock's '{broken[0]}' is missing or not what ktmerge writes; make it anew.")
    return document


def departures(locked: Mapping[str, Any], now: Mapping[str, Any]) -> list[Departure]:
    """Where a lock made now is not as one made before."""
    found = []
    recut = False
    for name in dict.fromkeys([*locked["inputs"], *now["inputs"]]):
        before, after = locked["inputs"].get(name), now["inputs"].get(name)
        if before is None or after is None:
            found.append(Departure(f"input {name}", "is in the lock only" if after is None else "is not in the lock"))
        elif _are_cut_otherwise(before, after):
            recut = True
            told_by, there = (", ".join(sorted(_weights(one["files"]))) for one in (before, after))
            found.append(
                Departure(
                    f"input {name}", f"has the same tensors, but in {there}, where {told_by} was locked; whether the "
                    "numbers are the same cannot be told by the digests of files: take or save it as it was locked"
                )
            )  # fmt: skip
        else:
            if _apart(before["files"]) != _apart(after["files"]):
                found += _changed_files(name, before["files"], after["files"])
            if before.get("headers") != after.get("headers"):
                found.append(Departure(f"input {name}", "has other tensors, types or shapes"))
    for key, what in (("methods", "what methods mean"), ("random", "seed and random numbers"),
                      ("statistics", "measured statistics")):  # fmt: skip
        if locked.get(key) != now.get(key):
            found.append(Departure(what, told(locked.get(key), now.get(key))))
    if locked["coefficients"] != now["coefficients"] and not recut:  # they stand in the order of the files
        found.append(Departure("what happens to every tensor", "method, parameters, rules or weights are others"))
    if locked["versions"] != now["versions"]:
        found.append(Departure("versions", told(locked["versions"], now["versions"]), decides=False))
    return found


def require_unchanged(locked: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Hold a plan against a lock; what may differ only is returned, a sentence each.

    Raises:
        UsageError: something else is not as locked, one per line.
    """
    found = departures(locked, now)
    problems = [f"{one.what}: {one.told}; this is not what was locked." for one in found if one.decides]
    refuse(problems)
    return [f"{one.what}: {one.told}" for one in found]


def locked_now(plan: Plan, *, rehash: bool = False) -> dict[str, Any]:
    """The lock of ``plan``, its inputs read for it where they are not remembered, or all of them.

    Raises:
        KtmergeError: a file cannot be read.
    """
    with digesting(plan, rehash=rehash) as digests:
        return lock(plan, digests())


def recorded(plan: Plan, out: Path, progress: Progress = SILENT) -> BlendReport | None:
    """What ``out`` says of itself if it is a whole output of this very plan, and of these very files; else None.

    Raises:
        KtmergeError: a file of it or of the inputs cannot be read.
    """
    try:
        document = json.loads(read_regular(out / RECORD))
        same = all(document.get(key) == value for key, value in origin(plan).items())
        report = BlendReport(
            plan.recipe.name, [], notes=list(document["notes"]), out=dict(document["output"]["sha256"])
        )
        report.recorded = list(document["parts"])
        report.beside = dict(document["output"].get("beside", {}))
        if not same or set(Checkpoint.open(out).weight_files) != set(report.out):
            return None
        locked = read_lock(out)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, UsageError):
        return None
    files = {**report.out, **report.beside}
    with progress.task(f"check {out.name}", len(files)) as step:
        for file, digest in files.items():
            if not os.path.isfile(out / file) or file_digest(out / file) != digest:
                return None
            step.advance()
    return None if departures(locked, locked_now(plan)) else report


def told(before: Any, after: Any) -> str:
    """What differs between two small mappings, in words."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return "other than recorded"
    keys = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
    return ", ".join(f"{key} {after.get(key, 'none')}, recorded {before.get(key, 'none')}" for key in keys)


def _apart(files: Mapping[str, Any]) -> list[Any]:
    """Files of a model with an adapter over it, whose names start with what their folders happen to be called."""
    folders = all("/" in file for file in files)
    return sorted((file.partition("/")[2] if folders else file, str(one)) for file, one in files.items())


def _are_cut_otherwise(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether one model's tensors, by name, type and shape, lie in files of other names."""
    same = before.get("headers") == after.get("headers") is not None
    return same and _weights(before["files"]) != _weights(after["files"])


def _weights(files: Mapping[str, Any]) -> set[str]:
    return {file for file, _ in _apart(files) if file.endswith(".safetensors")}


def _changed_files(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Departure]:
    for file in dict.fromkeys([*before, *after]):
        old, new = before.get(file), after.get(file)
        if old == new:
            continue
        if old is None or new is None:
            yield Departure(f"{name}/{file}", "is missing" if new is None else "is not in the lock")
        elif old.get("size") != new["size"]:
            yield Departure(f"{name}/{file}", f"has {new['size']} bytes, locked {old.get('size')}")
        else:
            yield Departure(
                f"{name}/{file}", f"sha256 {new['sha256'][:12]}..., locked {str(old.get('sha256'))[:12]}..."
            )


def _as_text(file: str) -> str:
    """A file's name with the bytes escaped that are no text: YAML has no way to hold them."""
    return file.encode("utf-8", "backslashreplace").decode("utf-8")


def _is_input(one: Any) -> bool:
    """Whether a lock says of an input what the code that reads locks relies on."""
    files = one.get("files") if isinstance(one, dict) else None
    return isinstance(files, dict) and all(
        isinstance(file, dict) and isinstance(file.get("size"), int) and isinstance(file.get("sha256"), str)
        for file in files.values()
    )


def _are_digests(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(digest, str) for digest in found.values())


def files_of(plan: Plan) -> dict[str, dict[str, Path]]:
    """Every file that is read, by input and name."""
    return {name: input_files(one, carried=name == "base") for name, one in inputs_of(plan).items()}


def _tuned(checkpoint: Checkpoint) -> dict[str, Any]:
    """How a model was fine-tuned, if ktmerge did it: settings, digests of its data, what was trained."""
    try:
        record = json.loads((checkpoint.root / TUNED).read_text(encoding="utf-8"))
        kept = {key: record[key] for key in ("ktmerge", "job", "inputs") if key in record}
    except (OSError, ValueError, TypeError):
        return {}
    return {"tuned": kept} if kept else {}
