"""A recipe to a bundle: pinned, with its lock, suite, scores and card, and if asked the blended model as a delta."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from ktmerge import __version__
from ktmerge.checkpoints.digests import digest_of
from ktmerge.checkpoints.files import clear_os_errors
from ktmerge.checkpoints.regular import is_file
from ktmerge.errors import UsageError
from ktmerge.merge import record
from ktmerge.merge.card import FILE as MODEL_CARD
from ktmerge.merge.card import licence
from ktmerge.merge.lock import lock_text, locked_now, read_lock, require_unchanged
from ktmerge.merge.plan import Plan
from ktmerge.merge.planning import plan_blend
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes import load_suite, ready
from ktmerge.recipes.document import read_yaml, yaml_text
from ktmerge.recipes.schema import Recipe
from ktmerge.sharing import contents
from ktmerge.sharing.card import card
from ktmerge.sharing.checking import require_bundle
from ktmerge.sharing.manifest import FileEntry, Input, Manifest
from ktmerge.sharing.pinning import inputs_of, pinned, portable_tasks
from ktmerge.sharing.scores import portable_scores


def pack_into(
    folder: Path,
    recipe: Recipe,
    *,
    source: Path | None = None,
    scores: Sequence[Path] = (),
    blended: Path | None = None,
    with_deltas: bool = False,
    progress: Progress = SILENT,
) -> Manifest:
    """Write the files of a bundle into an empty folder.

    Args:
        folder: there, and the caller's to make appear whole.
        recipe: with models that are there.
        source: its file, whose text is kept where nothing has to be told otherwise.
        scores: files of `ktmerge eval`.
        blended: what the recipe gave before, held to its lock.
        with_deltas: put in what ``blended`` is apart from the base; blends where it is not given.
        progress: where to report.

    Raises:
        UsageError: recipe or inputs are wrong, ``blended`` is not of this recipe, or a score file is none.
        KtmergeError: something cannot be read or written, or the blend failed.
    """
    plan = plan_blend(recipe)
    if with_deltas and blended is None:
        from ktmerge.merge import blend

        blended = folder / ".blended"
        blend(recipe, blended, progress=progress)
    locked = locked_now(plan) if blended is None else _locked_of(blended, plan, progress)
    inputs = inputs_of(plan, locked)
    measured = {name: str(digest) for name, digest in locked.get("statistics", {}).items()}
    document = pinned(recipe, inputs, measured)
    if "eval" in document:
        document["eval"] = _suite_into(folder, recipe, document["eval"])
    text = _text(document, source)
    _write(folder, contents.RECIPE, text)
    _write(folder, contents.LOCK, lock_text(_told(locked, inputs)))
    for file in scores:
        _write(folder, f"{contents.SCORES}/{_plain(file.stem)}.json", portable_scores(file))
    licences = {name: stated for name, one in record.inputs_of(plan).items() if (stated := licence(one))}
    _write(folder, contents.CARD, card(recipe, text, inputs, licences, delta=with_deltas))
    if blended is not None:
        if with_deltas:
            from ktmerge.deltas import export_delta

            export_delta(plan.base.root, blended, folder / contents.DELTA, progress=progress)
        if (blended / MODEL_CARD).is_file():
            with clear_os_errors(folder):
                shutil.copyfile(blended / MODEL_CARD, folder / contents.MODEL_CARD)
        shutil.rmtree(folder / ".blended", ignore_errors=True)
    manifest = Manifest(
        ktmerge=__version__,
        name=recipe.name,
        description=recipe.description[:2000],
        method=(recipe.blend.method if recipe.blend else None) or "stages",
        files=_entries(folder),
        inputs=inputs,
        statistics=measured,
    )
    _write(folder, contents.MANIFEST, manifest.text())
    require_bundle(folder, manifest, recipe.name)  # what a stranger would refuse is not handed over
    return manifest


def _locked_of(blended: Path, plan: Plan, progress: Progress) -> dict[str, Any]:
    """The lock of an output, which has to be of this very recipe."""
    locked = read_lock(blended)
    for sentence in require_unchanged(locked, locked_now(plan)):
        progress.note(sentence)
    told = locked.get("output", {}).get("sha256", {})
    differing = [
        name
        for name, sha256 in told.items()
        if not is_file(blended / name, name) or digest_of(blended / name).sha256 != sha256
    ]
    if differing or not told:
        raise UsageError(f"{blended}: is not what its lock says ({', '.join(differing) or 'it names no output'}).")
    return locked


def _told(locked: Mapping[str, Any], inputs: Mapping[str, Input]) -> dict[str, Any]:
    """A lock that calls its models as the recipe beside it does."""
    document: dict[str, Any] = json.loads(json.dumps(locked))
    document["recipe"]["base"] = inputs["base"].model
    for name, expert in document["recipe"]["experts"].items():
        expert["model"] = inputs[name].model
    for name, given in document["inputs"].items():
        given["model"] = inputs[name].model
    return document


def _suite_into(folder: Path, recipe: Recipe, section: dict[str, Any]) -> dict[str, Any]:
    """Put the suite that a recipe names into the bundle; the section that names it there."""
    name = section.get("suite")
    if name is None:
        return portable_tasks(section)
    file = recipe.folder / name
    if name in ready.names() and not file.exists():
        return section
    load_suite(file)
    target = f"{contents.SUITES}/{_plain(file.stem)}.yaml"
    document = read_yaml(file)
    told = portable_tasks(document)
    text = file.read_text(encoding="utf-8") if told == document else yaml_text(told)
    _write(folder, target, text)
    return {**section, "suite": target}


def _text(document: dict[str, Any], source: Path | None) -> str:
    """The recipe as it was written if it says the same, comments and all; else written out, below its heading."""
    if source is None:
        return yaml_text(document)
    text = source.read_text(encoding="utf-8")
    if read_yaml(source) == document:
        return text
    heading = takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True))  # such as how it was chosen
    return "".join(heading) + yaml_text(document)


def _plain(stem: str) -> str:
    """A file's name made of letters that a bundle's names have."""
    plain = "".join(one if one.isascii() and (one.isalnum() or one in "._-") else "-" for one in stem)
    return plain.lstrip("._-")[:100] or "unnamed"


def _write(folder: Path, name: str, content: str) -> None:
    path = folder / name
    with clear_os_errors(path):
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            raise UsageError(f"two files would be called {name} in the bundle; give them other names.")
        path.write_bytes(content.encode())


def _entries(folder: Path) -> dict[str, FileEntry]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): digest_of(path) for path in files}
    return {name: FileEntry(size=one.size, sha256=one.sha256) for name, one in found.items()}
