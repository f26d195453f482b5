"""Whether the files of a bundle are what its manifest says, and whether its recipe can be let in. Blends nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.digests import digest_of
from ktmerge.checkpoints.files import clear_os_errors
from ktmerge.errors import UsageError, printable
from ktmerge.merge.lock import read_lock
from ktmerge.merge.sections import check_recipe
from ktmerge.recipes import load_recipe, load_suite
from ktmerge.recipes.load import parse_recipe
from ktmerge.recipes.schema import Recipe
from ktmerge.sharing import contents
from ktmerge.sharing.manifest import FileEntry, Manifest
from ktmerge.sharing.pinning import require_inside, require_pinned, require_suite
from ktmerge.sharing.scores import require_scores

_NO_CODE = {
    "", ".bpe", ".html", ".jinja", ".json", ".jsonl", ".md", ".model", ".safetensors", ".tiktoken", ".txt", ".vocab",
    ".yaml", ".yml",
}  # fmt: skip
"""How files of a model end that a delta may bring along."""
_CONTROL = re.compile(r"[^\t\n\r -~\xa0-\U0010ffff]")
"""No text has them; C1, beyond ASCII, some terminals obey too."""


def require_bundle(folder: Path, manifest: Manifest, where: str) -> Recipe:
    """Hold the files of a bundle, unpacked into a folder of ours, to its manifest and to one another.

    Args:
        folder: has them, and nothing a stranger could change.
        manifest: of the bundle.
        where: the bundle is called in messages.

    Returns:
        its recipe.

    Raises:
        UsageError: a file is not as the manifest says, recipe or lock are not valid, or do not pin one another.
    """
    for name, entry in manifest.files.items():
        found = digest_of(folder / name)
        if FileEntry(size=found.size, sha256=found.sha256) != entry:
            raise UsageError(f"{where}: '{name}' is not what the bundle's manifest says; it is broken or was changed.")
    with _told_of(folder, where):
        recipe = load_recipe(folder / contents.RECIPE)
        locked = read_lock(folder / contents.LOCK)
        if not _is_foreign(recipe):
            check_recipe(recipe)
    _require_locked(manifest, locked, recipe, where)
    require_pinned(recipe, manifest.inputs, manifest.statistics, where)
    if recipe.eval is not None:
        require_suite(recipe.eval.suite, manifest.files, where)
        require_inside(recipe.eval.model_dump(mode="json"), where)
    for name in manifest.files:
        if name.startswith(f"{contents.SUITES}/"):
            with _told_of(folder, where):
                require_inside(load_suite(folder / name).model_dump(mode="json"), where)
        elif name.startswith(f"{contents.SCORES}/"):
            with clear_os_errors(folder / name):
                require_scores((folder / name).read_bytes(), f"{where}/{name}")
        elif name in (contents.CARD, contents.MODEL_CARD):
            _require_text(folder / name, f"{where}/{name}")
    if contents.DELTA_FILES[0] in manifest.files:
        _require_delta(folder / contents.DELTA, locked, where)
    _require_same_recipe(manifest, locked, recipe, where)
    return recipe


def _is_foreign(recipe: Recipe) -> bool:
    """Whether it names methods of another package, which is not imported for a file that nobody has let in."""
    said = [] if recipe.blend is None else [recipe.blend.method, *(rule.method for rule in recipe.blend.where)]
    return any(":" in method for method in said if method is not None)


@contextmanager
def _told_of(folder: Path, where: str) -> Iterator[None]:
    """Errors name the bundle, and not the temporary folder it lies in."""
    try:
        yield
    except UsageError as error:
        raise UsageError(str(error).replace(str(folder), where)) from None


def _require_locked(manifest: Manifest, locked: Mapping[str, Any], recipe: Recipe, where: str) -> None:
    """What the manifest shows is what the lock says."""
    shown = {name: {file: vars(one) for file, one in given.files.items()} for name, given in manifest.inputs.items()}
    told = {name: given["files"] for name, given in locked["inputs"].items()}
    if shown != told:
        raise UsageError(f"{where}: its manifest shows other inputs than its lock pins; it was changed.")
    if manifest.statistics != locked.get("statistics", {}):
        raise UsageError(f"{where}: its manifest shows other statistics than its lock pins; it was changed.")
    if (manifest.name, manifest.description) != (recipe.name, recipe.description[:2000]):
        raise UsageError(f"{where}: its manifest is of another recipe, '{manifest.name}'.")


def _require_same_recipe(manifest: Manifest, locked: Mapping[str, Any], recipe: Recipe, where: str) -> None:
    """What the lock tells of the recipe is what the recipe says: people compare recipes by their locks."""
    told = parse_recipe(dict(locked["recipe"]), f"{where}/{contents.LOCK}", recipe.folder)
    before, after = _said(told), _said(recipe)
    wrong = [key for key in after if before.get(key) != after[key]]
    wrong += ["random"] if locked["random"].get("seed") != recipe.seed else []
    named = {name: given.get("model") for name, given in locked["inputs"].items()}
    wrong += ["inputs"] if named != {name: one.model for name, one in manifest.inputs.items()} else []
    if wrong:
        raise UsageError(f"{where}: recipe and lock contradict each other ({wrong[0]}); the bundle was changed.")


def _said(recipe: Recipe) -> dict[str, Any]:
    """All that decides what is blended, but for statistics, which are held to their digests."""
    apart = {"finetune", "eval", "folder", "statistics"}
    document: dict[str, Any] = recipe.without_tuning().model_dump(mode="json", by_alias=True, exclude=apart)
    for expert in document["experts"].values():
        expert.pop("statistics", None)
    return document


def _require_text(path: Path, where: str) -> None:
    try:
        with clear_os_errors(path):
            text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{where}: is no text in UTF-8.") from None
    if _CONTROL.search(text):
        raise UsageError(f"{where}: has control characters, which could steer the terminal that shows it.")


def _require_delta(folder: Path, locked: Mapping[str, Any], where: str) -> None:
    from ktmerge.deltas.manifest import BLOBS
    from ktmerge.deltas.manifest import Manifest as Delta

    with _told_of(folder.parent, where):
        delta = Delta.load(folder)
    if delta.base.get("headers") != locked["inputs"]["base"].get("headers"):
        raise UsageError(f"{where}: its delta is of another base than its recipe.")
    came_out = locked.get("output", {}).get("sha256", {})
    if not delta.exact or set(delta.files) != set(came_out):
        raise UsageError(f"{where}: its lock does not say that its recipe gave the model that its delta gives.")
    size = (folder / BLOBS).stat().st_size
    spans = [blob for one in delta.tensors.values() for piece in one.pieces for blob in piece.blobs]
    for name, one in delta.others.items():
        if one.blob is not None and Path(name).suffix not in _NO_CODE:
            raise UsageError(
                f"{where}: its delta brings '{printable(name)[:80]}', which the base has not so; a delta that is "
                "handed over brings texts and settings, no code."
            )
    spans += [blob for _, blob in delta.files.values()] + [one.blob for one in delta.others.values() if one.blob]
    if any(begin + length > size for begin, length in spans):
        raise UsageError(f"{where}: its delta was cut short.")
