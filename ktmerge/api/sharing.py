"""Recipes handed to others, and taken from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ktmerge.api.inputs import RecipeLike, loaded_recipe, refuse_existing
from ktmerge.errors import UsageError
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes import gallery
from ktmerge.recipes.schema import Recipe

if TYPE_CHECKING:
    from ktmerge.sharing.pushing import Pushed
    from ktmerge.sharing.source import Offer
    from ktmerge.sharing.unpacking import Unpacked


def pack(
    recipe: RecipeLike,
    out: str | Path,
    *,
    overrides: Iterable[str] = (),
    base: str | None = None,
    experts: Iterable[str] = (),
    scores: Sequence[str | Path] = (),
    blended: str | Path | None = None,
    with_deltas: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Offer:
    """Write a recipe with all that pins it into one file: its lock, the suite it names, scores, a model card.

    Args:
        recipe: file, gallery name, or loaded, with models that are there.
        out: the bundle, ``NAME.ktr``.
        overrides: ``key=value`` strings.
        base: replaces the recipe's.
        experts: ``name=model`` or ``name=model:weight``, replace the recipe's.
        scores: files of `evaluate` to put in.
        blended: a folder that `blend` wrote of this recipe: its lock says what comes out, too, and its card is put in.
        with_deltas: put in the blended model as what it is apart from the base; without ``blended``, it is made first.
        overwrite: replace a bundle that is there.
        progress: where to report.

    Returns:
        what is in it.

    Raises:
        UsageError: recipe, inputs or files are wrong, or ``out`` exists.
        KtmergeError: something cannot be read or written.
    """
    from ktmerge.checkpoints.workroom import workroom
    from ktmerge.sharing import contents
    from ktmerge.sharing.archive import write_archive
    from ktmerge.sharing.source import ArchiveSource, offer_of

    target = Path(out)
    if target.suffix != contents.SUFFIX:
        raise UsageError(f"{target}: a bundle is called NAME{contents.SUFFIX}.")
    refuse_existing(target, overwrite)
    loaded, source = _loaded(recipe, overrides, base, experts)
    with workroom(target) as folder:
        files = folder / "files"
        files.mkdir()
        _packed(files, loaded, source, scores, blended, with_deltas, progress)
        archive = folder / target.name
        names = sorted(path for path in files.rglob("*") if path.is_file())
        write_archive(archive, {path.relative_to(files).as_posix(): path for path in names})
        offer = offer_of(ArchiveSource(archive))
        refuse_existing(target, overwrite)
        archive.replace(target)
    return type(offer)(ArchiveSource(target), str(target), offer.manifest, offer.size)


def look(reference: str | Path, *, into: str | None = None) -> Offer:
    """What a bundle holds and names, by nothing but its list of files and its manifest.

    Args:
        reference: a file, a folder, ``org/name[@revision]`` on the Hugging Face hub, or an https address of a file.
        into: instead, a model's repository on the hub, which has the bundle in a folder.

    Raises:
        UsageError: there is none, it cannot be had, or nobody should unpack it.
        KtmergeError: the place cannot be reached.
    """
    from ktmerge.sharing.pulling import source_of
    from ktmerge.sharing.source import offer_of

    return offer_of(source_of(str(reference), into=into))


def unpack(
    bundle: str | Path | Offer, out: str | Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> Unpacked:
    """Fetch a bundle, check all of it, and write its files into the folder ``out``, whole or not at all.

    Args:
        bundle: what `look` gave or takes; of an offer, nothing else is fetched than was shown.
        out: gets ``recipe.yaml``, ``recipe.lock.yaml`` and what else is in the bundle.
        overwrite: replace a bundle that is there.
        progress: where to report.

    Raises:
        UsageError: something in it is not in order, or ``out`` exists.
        KtmergeError: it cannot be fetched, or the disk is full.
    """
    from ktmerge.sharing import unpacking
    from ktmerge.sharing.source import Offer

    offer = bundle if isinstance(bundle, Offer) else look(bundle)
    return unpacking.unpack(offer, Path(out), overwrite=overwrite, progress=progress)


def default_folder(offer: Offer) -> Path:
    """Where a bundle goes unless another place is named: a folder called as its recipe, here.

    Raises:
        UsageError: something else has that name: what a stranger calls a recipe must not decide what is replaced.
    """
    from ktmerge.sharing.contents import MANIFEST

    folder = Path("recipe" if offer.manifest is None else offer.manifest.name)
    if any(folder.glob("*")) and not (folder / MANIFEST).exists():
        raise UsageError(f"{folder}: holds something else than a recipe; say with --out where this one goes.")
    return folder


def push(
    recipe: str | Path,
    target: str | None = None,
    *,
    into: str | None = None,
    overrides: Iterable[str] = (),
    base: str | None = None,
    experts: Iterable[str] = (),
    scores: Sequence[str | Path] = (),
    blended: str | Path | None = None,
    with_deltas: bool = False,
    private: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Pushed:
    """Hand a recipe over: to a repository of the hub, a folder, or an address that takes files.

    Args:
        recipe: a bundle, or a recipe that is packed first; see `pack`.
        target: ``org/name[@branch]`` on the hub, made where it is not there; a folder; an https address to PUT to.
        into: instead, a model's repository on the hub, which gets the bundle as a folder of its own.
        overrides: see `pack`.
        base: see `pack`.
        experts: see `pack`.
        scores: see `pack`.
        blended: see `pack`.
        with_deltas: see `pack`.
        private: make a repository that only its owner sees.
        overwrite: replace a bundle that is in the folder.
        progress: where to report.

    Raises:
        UsageError: what is to be pushed, or the target, is wrong, or the hub refuses.
        KtmergeError: the target cannot be reached.
    """
    from ktmerge.checkpoints.workroom import passing_room, workroom
    from ktmerge.sharing import contents, pushing
    from ktmerge.sharing.source import ArchiveSource, FolderSource, offer_of

    if (target is None) == (into is None):
        raise UsageError("give either a target (org/name, folder or address), or --into with the model's repository.")
    with workroom(passing_room("push")) as folder:
        files = folder / "files"
        path = Path(recipe)
        if path.is_dir() or path.suffix == contents.SUFFIX:
            if any((*overrides, base, *experts, *scores, blended, with_deltas)):
                raise UsageError(f"{path}: is packed already; pack it anew to put something else in.")
            if not path.exists():
                raise UsageError(f"{path}: no such bundle.")
            unpack(offer_of(FolderSource(path) if path.is_dir() else ArchiveSource(path)), files)
        else:
            loaded, source = _loaded(recipe, overrides, base, experts)
            files.mkdir()
            _packed(files, loaded, source, scores, blended, with_deltas, progress)
        return pushing.push(files, target, into=into, private=private, overwrite=overwrite, progress=progress)


def _loaded(
    recipe: RecipeLike, overrides: Iterable[str], base: str | None, experts: Iterable[str]
) -> tuple[Recipe, Path | None]:
    """The recipe, and its file."""
    loaded = loaded_recipe(recipe, overrides, base, experts)
    return loaded, None if isinstance(recipe, Recipe) else gallery.locate(recipe)[0]


def _packed(
    folder: Path, recipe: Recipe, source: Path | None, scores: Sequence[str | Path], blended: str | Path | None,
    with_deltas: bool, progress: Progress,
) -> None:  # fmt: skip
    from ktmerge.sharing.packing import pack_into

    pack_into(
        folder, recipe, source=source, scores=[Path(one) for one in scores],
        blended=None if blended is None else Path(blended), with_deltas=with_deltas, progress=progress,
    )  # fmt: skip
