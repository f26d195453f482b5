"""Whether an output is what its record says, and whether its recipe gives the same bytes again. Loads no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ktmerge.checkpoints.files import file_digest
from ktmerge.checkpoints.layout import read_json
from ktmerge.checkpoints.regular import is_below, is_file
from ktmerge.checkpoints.workroom import passing_room, workroom
from ktmerge.errors import UsageError
from ktmerge.merge.blending import blend
from ktmerge.merge.lock import FILE as LOCK
from ktmerge.merge.lock import departures, locked_now, read_lock, told
from ktmerge.merge.planning import plan_blend
from ktmerge.merge.record import FILE, origin
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.load import parse_recipe
from ktmerge.recipes.schema import Recipe

Against = Literal["record", "recipe", "rebuilt"]
State = Literal["equal", "differs", "missing", "extra", "may differ"]

_SECTIONS = {
    "methods": "meaning of the methods",
    "random": "seed and random numbers",
    "coefficients": "what happens to every tensor",
    "statistics": "measured statistics",
    "versions": "versions",
}


@dataclass(frozen=True)
class Check:
    """One thing that was compared.

    Attributes:
        what: a file, or a section of the record.
        against: what the record says, what the recipe says now, or what it gives now.
        state: ``may differ``: another version of something that computes; only a rebuild tells.
        told: what was found, in words; empty if it is equal.
    """

    what: str
    against: Against
    state: State
    told: str = ""


@dataclass(frozen=True)
class Verification:
    """What was compared, in the order of the comparison."""

    out: Path
    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing differs. What may differ only counts where nothing was rebuilt to tell."""
        return all(check.state in ("equal", "may differ") for check in self.checks)

    def table(self) -> tuple[list[str], list[list[str]], str]:
        """Columns, rows and title."""
        rows = [[check.state, check.what, check.against, check.told] for check in self.checks]
        verdict = "is what its record says" if self.holds else "is NOT what its record says"
        return ["", "what", "against", "found"], rows, f"{self.out} {verdict}"

    def to_json(self) -> dict[str, Any]:
        return {"out": str(self.out), "holds": self.holds, "checks": [asdict(check) for check in self.checks]}


def recorded_recipe(out: Path, base: str | None = None, experts: Mapping[str, str] | None = None) -> Recipe:
    """The recipe that an output's record tells, whose paths start at the working folder.

    Args:
        out: a folder that `blend` wrote.
        base: where the base is here; else what the record says.
        experts: where experts are here, by name.

    Raises:
        UsageError: it has no such record, names other experts, or models whose place has to be said.
    """
    document = dict(_record(out)["recipe"])
    if base is not None:
        document["base"] = base
    own = {name: dict(expert) for name, expert in document["experts"].items()}
    for name, model in (experts or {}).items():
        if name not in own:
            raise UsageError(f"{out}: was not made with an expert '{name}', but with {', '.join(own)}.")
        own[name]["model"] = model
    places = {"--base ": document["base"], **{f"--expert {name}=": one["model"] for name, one in own.items()}}
    lost = [option for option, model in places.items() if not {"/", "+"} & set(model) and not os.path.isdir(model)]
    if lost:
        raise UsageError(
            f"{out}: its record has no paths of the machine it was made on; say where the models are, with --recipe or "
            f"{' '.join(f'{option}FOLDER' for option in lost)}."
        )
    return parse_recipe({**document, "experts": own}, str(out / FILE), Path.cwd())


def verify(
    out: Path,
    recipe: Recipe | None = None,
    *,
    rebuild: bool = False,
    rehash: bool = False,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Verification:
    """Hold an output against its record, a recipe against the record, and if asked a new blend against both.

    Args:
        out: a folder that `blend` wrote; it is only read.
        recipe: what it was made by, with models that are there; needed to rebuild.
        rebuild: blend again, into a temporary folder beside ``out`` (where nobody may write there: among this user's
            temporary files), and compare bytes.
        rehash: read every input for its digest, also those that seem unchanged since they were read last.
        device: auto, cpu or cuda.
        progress: where to report.

    Raises:
        UsageError: ``out`` has no record, or the recipe or its inputs are wrong.
        KtmergeError: something cannot be read, or the new blend failed.
    """
    record = _record(out)
    digests = {**record["output"]["sha256"], **record["output"].get("beside", {})}
    checks = list(_files(out, digests, progress))
    if recipe is not None:
        plan = plan_blend(recipe)
        checks += _sections(record, origin(plan))
        if (out / LOCK).exists():
            checks += _inputs(read_lock(out), locked_now(plan, rehash=rehash), rebuild)
        if rebuild:
            checks += _rebuilt(out, recipe, digests, device, progress)
    return Verification(out, tuple(checks))


def _record(out: Path) -> dict[str, Any]:
    path = out / FILE
    document = read_json(path) if path.is_file() else {}
    if document.get("kind") != "blend":
        raise UsageError(f"{out}: has no record of a blend ({FILE}); give a folder that 'ktmerge blend' wrote.")
    if document.get("ktmerge") != 1:
        raise UsageError(f"{path}: is of a version this ktmerge does not know; use the one that wrote it.")
    if not _is_whole(document):
        raise UsageError(f"{path}: is damaged; it is no longer as 'ktmerge blend' wrote it.")
    return document


def _is_whole(document: Mapping[str, Any]) -> bool:
    """Whether what is looked up in a record is there, and of its kind."""
    sections = [document.get(key) for key in ("output", "inputs", "versions", "recipe")]
    if not all(isinstance(section, dict) for section in sections):
        return False
    digests, beside = document["output"].get("sha256"), document["output"].get("beside", {})
    experts = document["recipe"].get("experts")
    if not all(isinstance(section, dict) for section in (digests, beside, experts)):
        return False
    places = [document["recipe"].get("base"), *(isinstance(one, dict) and one.get("model") for one in experts.values())]
    texts = [*digests.values(), *beside.values(), *places]
    return all(isinstance(text, str) for text in texts) and all(map(is_below, [*digests, *beside]))


def _files(out: Path, digests: Mapping[str, str], progress: Progress) -> Iterator[Check]:
    """Files against their digests."""
    with progress.task(f"check {out.name}", len(digests)) as step:
        for file, digest in digests.items():
            if not is_file(out / file, file):
                yield Check(file, "record", "missing")
            else:
                yield _compared(file, "record", _apart(file_digest(out / file), digest))
            step.advance()
    there = {str(path.relative_to(out)) for path in out.rglob("*.safetensors")}
    for file in sorted(there - set(digests)):
        yield Check(file, "record", "extra", "the blend wrote no such file")


def _sections(record: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Check]:
    """What decides the bytes, as it was and as it is."""
    names = list(dict.fromkeys([*record["inputs"], *now["inputs"]]))
    for name in names:
        before, after = record["inputs"].get(name), now["inputs"].get(name)
        what = "headers of the base" if name == "base" else f"headers of expert {name}"
        why = "tensors, types or shapes are others" if before and after else "on one side only"
        yield _compared(what, "recipe", "" if before == after else why)
    for key, what in _SECTIONS.items():
        before, after = record.get(key), now.get(key)
        if before != after:
            yield Check(what, "recipe", "may differ" if key == "versions" else "differs", told(before, after))
        elif before is not None:
            yield Check(what, "recipe", "equal")


def _inputs(locked: Mapping[str, Any], now: Mapping[str, Any], rebuilt: bool) -> Iterator[Check]:
    """The files of base and experts against what the output's lock says of them."""
    changed = {one.what: one.told for one in departures(locked, now)}
    for name, given in now["inputs"].items():
        if (what := f"input {name}") in changed:  # its files cannot be held against those that were locked
            yield Check(what, "recipe", "may differ" if rebuilt else "differs", changed[what])
            continue
        for file in given["files"]:
            what = f"{name}/{file}"
            yield _compared(what, "recipe", changed.get(what, ""))
    gone = {f"{name}/{file}" for name, given in locked["inputs"].items() for file in given["files"]} & set(changed)
    here = {f"{name}/{file}" for name, given in now["inputs"].items() for file in given["files"]}
    for what in sorted(gone - here):
        yield Check(what, "recipe", "missing", changed[what])


def _rebuilt(out: Path, recipe: Recipe, digests: Mapping[str, str], device: str, progress: Progress) -> Iterator[Check]:
    beside = out.absolute().with_name(f"{out.absolute().name}-verify")
    with workroom(beside if os.access(beside.parent, os.W_OK) else passing_room("verify")) as folder:
        report = blend(recipe, folder / "again", device=device, afresh=True, progress=progress)
    known = not digests.keys() <= report.out.keys()  # earlier versions recorded nothing but the weights
    found = {**report.out, **report.beside} if known else report.out
    for file in dict.fromkeys([*digests, *found]):
        if file == LOCK:  # it calls the models as the recipe does, here perhaps otherwise
            continue
        if file not in found:
            yield Check(file, "rebuilt", "missing", "the new blend has no such file")
        elif file not in digests:
            yield Check(file, "rebuilt", "extra", "only the new blend has this file")
        else:
            yield _compared(file, "rebuilt", _apart(found[file], digests[file]))


def _apart(found: str, recorded: str) -> str:
    return "" if found == recorded else f"sha256 {found[:12]}..., recorded {recorded[:12]}..."


def _compared(what: str, against: Against, told: str) -> Check:
    """Whether there is something to tell."""
    return Check(what, against, "differs" if told else "equal", told)
