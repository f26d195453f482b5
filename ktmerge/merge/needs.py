"""Whether a recipe's statistics serve what its stages need, found out while planning. Reads headers, loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ktmerge.errors import UsageError, collected, located
from ktmerge.merge.settings import Setting
from ktmerge.merge.stage import Measure, Need, Pipeline
from ktmerge.recipes.schema import Recipe

if TYPE_CHECKING:
    from ktmerge.checkpoints.checkpoint import Checkpoint
    from ktmerge.checkpoints.statistics import Statistics
    from ktmerge.merge.plan import TensorPlan

BASE = "base"
"""What recipes call the statistics of the base."""
_WORDS: dict[Measure, str] = {
    "inputs": "a sample of the inputs",
    "fisher": "the Fisher information",
    "scales": "what its norms scale",
}
_SHOWN = 3


def needs_of(pipeline: Pipeline | None) -> set[Need]:
    """Everything the stages of a pipeline need to be measured."""
    return {need for use in (pipeline.uses if pipeline else ()) for need in use.stage.needs(use.parameters)}


def without_statistics(recipe: Recipe, settings: Iterable[Setting]) -> list[str]:
    """What is wrong as the recipe names no statistics that these settings need; shows without any checkpoint."""
    wanted: dict[str, set[Measure]] = {}
    asking: dict[str, str] = {}
    for setting in settings:
        for pipeline in setting.pipelines.values():
            for owner, measures in _by_owner(needs_of(pipeline), recipe.experts).items():
                wanted.setdefault(owner, set()).update(measures)
                spelled = pipeline.method == "stages"
                asking.setdefault(owner, "its stages need" if spelled else f"method '{pipeline.method}' needs")
    return [
        f"blend: {asking[owner]} {_told(measures)} of {_model(owner)}, and the recipe names no "
        f"statistics of it. {_command(recipe, owner, measures)}"
        for owner, measures in sorted(wanted.items())
        if recipe.statistics_of(owner) is None
    ]


def open_statistics(
    recipe: Recipe, base: Checkpoint, tensors: Sequence[TensorPlan], problems: list[str]
) -> dict[str, Statistics]:
    """The statistics that a plan needs, by ``base`` or the expert's name; what is wrong with them goes to ``problems``.

    Those that the recipe does not name are left out without a word: `without_statistics` tells of them.
    """
    wanted: dict[str, dict[Measure, list[TensorPlan]]] = {}
    pipelines = {id(tensor.pipeline): tensor.pipeline for tensor in tensors}
    needs = {key: needs_of(pipeline) for key, pipeline in pipelines.items()}
    for tensor in (tensor for tensor in tensors if needs[id(tensor.pipeline)]):
        for owner, measures in _by_owner(needs[id(tensor.pipeline)], tensor.sources).items():
            for measure in measures:
                wanted.setdefault(owner, {}).setdefault(measure, []).append(tensor)
    found = {}
    for owner, by_measure in sorted(wanted.items()):
        if recipe.statistics_of(owner) is None:
            continue
        with collected(problems):
            found[owner] = _open(recipe, base, owner, set(by_measure))
            for measure, concerned in sorted(by_measure.items()):
                problems += _gaps(found[owner], owner, measure, concerned)
    return found


def name_in(statistics: Statistics, tensor: TensorPlan, owner: str) -> str:
    """What a tensor is called in the statistics of the base or of an expert."""
    own = tensor.key if owner == BASE else tensor.sources[owner]
    there = own in statistics.samples or statistics.fisher_of(own) is not None or own in (statistics.scales or ())
    return own if there or owner == BASE else tensor.key


def _by_owner(needs: Iterable[Need], experts: Iterable[str]) -> dict[str, set[Measure]]:
    wanted: dict[str, set[Measure]] = {}
    names = list(experts)
    for need in needs:
        for owner in [BASE] if need.of == "base" else names:
            wanted.setdefault(owner, set()).add(need.measure)
    return wanted


def _open(recipe: Recipe, base: Checkpoint, owner: str, measures: set[Measure]) -> Statistics:
    where = _key(owner)
    folder, section = recipe.statistics_folder(owner), recipe.statistics_of(owner)
    assert folder is not None
    assert section is not None
    if not folder.exists():
        if section.is_job:
            raise UsageError(f"{where}: {folder} is not there yet; 'ktmerge run' and 'ktmerge stats --recipe' make it.")
        raise UsageError(f"{where}: no such folder: {folder}. {_command(recipe, owner, measures)}")
    from ktmerge.checkpoints.opening import open_model
    from ktmerge.checkpoints.statistics import Statistics

    with located(where):
        statistics = Statistics.open(folder)
        model = recipe.base if owner == BASE else recipe.experts[owner].model
        measured = open_model(str(model), recipe.folder, None if owner == BASE else base)
    wrong = ""
    if not statistics.is_of(measured):
        wrong = f"was measured in another model than {_model(owner)}, {model}"
    elif "fisher" in measures and not statistics.has_fisher:
        wrong = "has no Fisher information"
    elif "scales" in measures and statistics.scales is None:
        wrong = "does not have what norms scale"
    if wrong:
        raise UsageError(f"{where}: {folder} {wrong}. {_command(recipe, owner, measures, again=True)}")
    return statistics


def _gaps(statistics: Statistics, owner: str, measure: Measure, tensors: Iterable[TensorPlan]) -> Iterator[str]:
    lacking = [tensor.name for tensor in tensors if not _served(statistics, owner, measure, tensor)]
    if lacking:
        method = next(tensor.method for tensor in tensors if tensor.name in lacking)
        yield (
            f"{_key(owner)}: {statistics.root} has not {_WORDS[measure]} of {len(lacking)} tensors that '{method}' "
            f"blends ({', '.join(lacking[:_SHOWN])}{', ...' if len(lacking) > _SHOWN else ''}): the model did not use "
            "them on that data, or holds them in another form. Take them out by a where rule, e.g. "
            f"{{match: '{lacking[0]}', method: linear}}."
        )


def _served(statistics: Statistics, owner: str, measure: Measure, tensor: TensorPlan) -> bool:
    if not tensor.info.numel:
        return True
    name = name_in(statistics, tensor, owner)
    if measure == "fisher":
        info = statistics.fisher_of(name)
        return info is not None and info.shape == tensor.info.shape
    if measure == "scales":
        info = statistics.scales_of(name)
        return info is None or info.shape == tensor.info.shape
    shape, layout = tensor.info.shape, tensor.layout
    if layout is None or name not in statistics.samples:
        return False
    inputs = shape[-2] if layout.transposed else shape[-1]
    from ktmerge.checkpoints.statistics import SAMPLE

    shapes = [statistics.tensors[f"{SAMPLE}/{one}"].shape for one in statistics.samples[name]]
    return all(one[-1] == inputs and one[:-2] == shape[:-2] and one[-2] for one in shapes)


def _command(recipe: Recipe, owner: str, measures: Iterable[Measure], *, again: bool = False) -> str:
    folder = f"stats/{owner}"
    section = recipe.statistics_of(owner)
    if section is not None and section.folder:
        folder = section.folder
    jobs: Mapping[str, Sequence[str]] = (
        {name: job.data for name, job in recipe.finetune.experts.items()} if recipe.finetune else {}
    )
    data = (section.data if section else []) or jobs.get(owner) or [f"{'upstream' if owner == BASE else owner}.jsonl"]
    model = (recipe.base or "BASE") if owner == BASE else recipe.experts[owner].model
    flags = " --fisher empirical" if "fisher" in measures else ""
    flags += " --overwrite" if again else ""
    command = f"ktmerge stats {model} {' '.join(f'--data {one}' for one in data)} --out {folder}{flags}"
    if again:
        return f"Make them again with '{command}'."
    return f"Make them with '{command}', then write '{_key(owner)}: {folder}'."


def _told(measures: Iterable[Measure]) -> str:
    return " and ".join(_WORDS[measure] for measure in sorted(measures, reverse=True))


def _model(owner: str) -> str:
    return "the base" if owner == BASE else f"expert '{owner}'"


def _key(owner: str) -> str:
    return "statistics" if owner == BASE else f"experts.{owner}.statistics"
