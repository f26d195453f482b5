"""The folder of a sweep: what it is, written first; what it found, written last. And any of its trials as a recipe."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.files import UNFINISHED, write_whole
from ktmerge.checkpoints.regular import read_regular
from ktmerge.errors import UsageError
from ktmerge.recipes.document import yaml_text
from ktmerge.recipes.load import parse_recipe
from ktmerge.recipes.references import moved, way_to
from ktmerge.recipes.schema import Recipe
from ktmerge.sweep.candidates import RECIPE
from ktmerge.sweep.outcome import Outcome
from ktmerge.sweep.settings import SweepSettings, journal

DEFINITION, RESULT, CHOSEN, TABLE, PICTURE, CURVE = (
    "sweep.json", "result.json", "chosen.yaml", "candidates.csv", "front", "curve.csv",
)  # fmt: skip
_PASSWORDS = {"password", "passwd"}
"""What drivers of databases take at the end of a URL."""
_BEFORE = re.compile(rf"journal\.log(\.lock[\w.-]*)?|\.{re.escape(DEFINITION)}{UNFINISHED}")
"""What a worker that was killed early may leave without a definition."""
_NAMES = "|".join(map(re.escape, (DEFINITION, RESULT, CHOSEN, TABLE, CURVE, f"{PICTURE}.png", f"{PICTURE}.svg")))
_OWN = re.compile(rf"{_BEFORE.pattern}|{_NAMES}|\.({_NAMES}){UNFINISHED}")


def begin(out: Path, settings: SweepSettings, study: str, *, resume: bool, overwrite: bool, here: bool = True) -> None:
    """Make the folder, or find that it is this sweep's.

    Args:
        out: the folder.
        settings: of the sweep.
        study: its name.
        resume: whether it may be this sweep's already.
        overwrite: whether another sweep in it gives way.
        here: whether its database can be reached from this machine, and must open before anything is lost.

    Raises:
        UsageError: it holds something else, or this sweep and ``resume`` is not set; or the database does not open, or
            has trials of this sweep, which ``overwrite`` would not delete.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; choose another folder.")
    known = _definition(out) if (out / DEFINITION).exists() else None
    storage = None if settings.storage == journal(out) else _without_password(settings.storage)
    replaced = known is not None and overwrite and not resume
    if known is None:
        if out.exists() and any(not _BEFORE.fullmatch(one.name) for one in out.iterdir()):
            raise UsageError(f"{out}: holds something else than a sweep; choose another folder.")
    elif not replaced:
        _require_same(out, known, settings, study, storage, resume)
    if overwrite and not resume and storage is not None:
        _require_none_elsewhere(settings.storage, study, storage, here)
    fresh = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    if here and storage is not None:
        from ktmerge.sweep.storage import open_storage

        try:
            open_storage(settings.storage)
        except UsageError:
            if fresh:
                shutil.rmtree(out)
            raise
    if replaced:
        for path in out.iterdir():
            if _OWN.fullmatch(path.name):
                path.unlink()
        shutil.rmtree(out / "jobs", ignore_errors=True)
    document = {
        "ktmerge_sweep": 1,
        "study": study,
        "storage": storage,
        "recipes from": way_to(settings.recipe.folder, out),
    }
    write_whole(out / DEFINITION, json.dumps(document, indent=1) + "\n")


def _require_same(
    out: Path, known: dict[str, Any], settings: SweepSettings, study: str, storage: str | None, resume: bool
) -> None:
    """Refuse to go on with another sweep, or with this one unasked.

    Args:
        out: the folder.
        known: what it says of itself.
        settings: of the sweep.
        study: its name.
        storage: where its trials are, without password; None: in the folder.
        resume: whether it may be this sweep's.
    """
    if known["study"] != study:
        raise UsageError(
            f"{out}: holds another sweep: of another recipe, other models, data, ranges or settings; "
            "choose another folder, or add --overwrite."
        )
    if not resume:
        raise UsageError(f"{out}: holds this sweep; add --resume to go on with it or to join it, or --overwrite.")
    if known["storage"] != storage and not _has_study(settings.storage, study):
        raise UsageError(
            f"{out}: holds this sweep, its trials are in {known['storage'] or journal(out)}: name that by --storage."
        )


def _require_none_elsewhere(where: str, study: str, told: str, here: bool) -> None:
    """Refuse to begin anew where trials of the same sweep are kept: they are not this folder's alone to delete."""
    from ktmerge.sweep.storage import open_storage, trials_of

    try:
        count = len(trials_of(open_storage(where), study)) if _is_there(where) else 0
    except UsageError:
        if here:
            raise
        return  # the workers' to find out
    if count:
        raise UsageError(
            f"{told}: has {count} trials of this very sweep, which --overwrite does not delete, as other machines may "
            "share them; add --resume instead to go on with them. To begin anew, name another --storage or --seed, or "
            f"delete the studies {study} and {study}-tasks there by 'optuna delete-study'."
        )


def finish(out: Path, outcome: Outcome) -> None:
    """Write the front as table and picture, the chosen recipe, and all that was found.

    Raises:
        KtmergeError: a file cannot be written.
    """
    from ktmerge.sweep.picture import pictures

    files: dict[str, str | bytes] = {
        RESULT: json.dumps(outcome.to_json(), indent=1, ensure_ascii=False) + "\n",
        TABLE: _csv(outcome),
        **{f"{PICTURE}.{kind}": content for kind, content in pictures(outcome).items()},
    }
    if outcome.curves is not None:
        rows = [[f"{value:.6g}" for value in row] for row in outcome.curves]
        files[CURVE] = _lines([[str(outcome.knob), "upstream_kept_percent", "gain_points"], *rows])
    if outcome.chosen is not None:
        files[CHOSEN] = chosen_text(outcome, out)
    else:
        (out / CHOSEN).unlink(missing_ok=True)
    for name, content in files.items():
        write_whole(out / name, content)


def trial_recipe(folder: Path, number: int, storage: str | None = None) -> Recipe:
    """The recipe of a trial.

    Args:
        folder: of the sweep.
        number: of the trial.
        storage: where the sweep's trials are, if the folder does not say it: a URL with a password.

    Raises:
        UsageError: there is no such sweep or trial.
    """
    from ktmerge.sweep.sampling import quietly
    from ktmerge.sweep.storage import open_storage, trial_numbered

    quietly()
    known = _definition(folder)
    where = storage or known.get("storage") or journal(folder)
    if not _is_there(where):
        raise UsageError(f"{where}: the sweep's trials are not there.")
    trial = trial_numbered(open_storage(where), str(known["study"]), number)
    if not isinstance(trial.user_attrs.get(RECIPE), dict):
        raise UsageError(f"--trial {number}: that trial was not begun.")
    source = (folder / known["recipes from"]).resolve()
    return parse_recipe(dict(trial.user_attrs[RECIPE]), f"{folder}, trial {number}", source)


def scored_digest(folder: Path, number: int) -> tuple[str | None, list[str]]:
    """The digest of the model that was scored as a finalist, if that trial was one and the sweep is done; and the
    tensors that are not in it, as they were not loaded.
    """
    try:
        found = json.loads(read_regular(folder / RESULT))
        final = next(one for one in found["finalists"] if one["trial"] == number)
        return final["digest"], [str(name) for name in final.get("left_out", [])]
    except (OSError, ValueError, LookupError, TypeError, RecursionError, StopIteration, AttributeError):
        return None, []


def chosen_text(outcome: Outcome, out: Path) -> str:
    """The chosen recipe as YAML that works from the folder ``out``, with how it was chosen above it."""
    recipe = outcome.settings.recipe
    document = json.loads(json.dumps(outcome.shown.recipe))
    document["name"] = f"{recipe.name}-chosen"
    document["base"] = moved(document["base"], recipe.folder, out)
    for expert in document["experts"].values():
        expert["model"] = moved(expert["model"], recipe.folder, out)
    for name, owner in (("base", document), *document["experts"].items()):
        if (given := owner.get("statistics")) is not None:  # of a job, what it has made
            made = given if isinstance(given, str) else given.get("folder") or f"stats/{name}"
            owner["statistics"] = moved(made, recipe.folder, out)
    said = "\n".join([*outcome.statement(), *outcome.cautions()])
    heading = "".join(f"# {line}\n" for line in said.splitlines())
    return heading + yaml_text(document)


def _definition(folder: Path) -> dict[str, Any]:
    try:
        document: Any = json.loads(read_regular(folder / DEFINITION))
    except OSError:
        raise UsageError(f"{folder}: no sweep; 'ktmerge sweep' writes {DEFINITION} there.") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{folder / DEFINITION}: damaged; not JSON.") from None
    version = document.get("ktmerge_sweep") if isinstance(document, dict) else None
    if isinstance(version, int) and version > 1:
        raise UsageError(f"{folder / DEFINITION}: a sweep of version {version}, this ktmerge knows 1; upgrade ktmerge.")
    told = document if version == 1 else {}
    texts = [told.get("study"), told.get("recipes from"), told.get("storage") or ""]
    if not all(isinstance(one, str) and _can_be_a_path(one) for one in texts):
        raise UsageError(f"{folder / DEFINITION}: no sweep that 'ktmerge sweep' wrote; choose another folder.")
    known: dict[str, Any] = document
    return known


def _can_be_a_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _has_study(where: str, study: str) -> bool:
    from ktmerge.sweep.storage import open_storage, study_names

    return _is_there(where) and study in study_names(open_storage(where))


def _is_there(where: str) -> bool:
    """Whether a storage may have trials; one in a file that is not there would be made by looking."""
    file = where.removeprefix("sqlite:///").partition("?")[0]
    return "://" in file or os.path.isfile(file)


def _without_password(where: str) -> str:
    """The storage as the folder names it; a password may be in two places of a URL."""
    if "://" not in where:
        return where
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(where)
    except (ArgumentError, ValueError):
        raise UsageError(
            "--storage: not the URL of a database, such as postgresql://user:password@host/name."
        ) from None
    told = _PASSWORDS & url.query.keys()
    if url.password is None and not told:
        return where
    return url._replace(password=None).difference_update_query(told).render_as_string(hide_password=False)


def _csv(outcome: Outcome) -> str:
    keys = list(dict.fromkeys(key for one in outcome.candidates for key in one.point))
    finals = {one.candidate.number: one for one in outcome.finals}
    names = ["kl_to_base", "kl_to_experts"] if outcome.settings.screen == "divergence" else ["kept", "gain"]
    sign = -1 if outcome.settings.screen == "divergence" else 1
    rows: list[list[Any]] = [["trial", *keys, *names, "stopped", "final_kept_percent", "final_gain_points", "chosen"]]
    for one in outcome.candidates:
        final = finals.get(one.number)
        rows.append(
            [
                one.number, *(one.point.get(key, "") for key in keys), sign * one.first, sign * one.second,
                one.stopped or "", *(("", "") if final is None else (final.retention, final.gain)),
                int(outcome.chosen is not None and outcome.chosen.number == one.number),
            ]
        )  # fmt: skip
    return _lines(rows)


def _lines(rows: list[list[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
