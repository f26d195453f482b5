"""checkpoint + suite -> scores, comparison, report. The base is always scored in the same run with the same code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktmerge.eval.comparison import merge_results
    from ktmerge.eval.evaluation import evaluate
    from ktmerge.eval.page import render
    from ktmerge.eval.results import Generation, PathPoint, Results
    from ktmerge.eval.samples import generations
    from ktmerge.eval.scorer import score_model
    from ktmerge.eval.scores import TaskScore
    from ktmerge.eval.screened import Screened
    from ktmerge.eval.screening import screen
    from ktmerge.eval.sets import encode_sets, read_sets
    from ktmerge.eval.unlabelled import disagreement, divergence, least_disagreeing, trade_off

__all__ = [
    "Generation",
    "PathPoint",
    "Results",
    "Screened",
    "TaskScore",
    "disagreement",
    "divergence",
    "encode_sets",
    "evaluate",
    "generations",
    "least_disagreeing",
    "merge_results",
    "read_sets",
    "render",
    "score_model",
    "screen",
    "trade_off",
]

_HOME = {
    "Generation": "results",
    "PathPoint": "results",
    "Results": "results",
    "Screened": "screened",
    "TaskScore": "scores",
    "disagreement": "unlabelled",
    "divergence": "unlabelled",
    "encode_sets": "sets",
    "evaluate": "evaluation",
    "generations": "samples",
    "least_disagreeing": "unlabelled",
    "merge_results": "comparison",
    "read_sets": "sets",
    "render": "page",
    "score_model": "scorer",
    "screen": "screening",
    "trade_off": "unlabelled",
}


def __getattr__(name: str) -> Any:
    """Import a name's module on first use: reading a score file needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'ktmerge.eval' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"ktmerge.eval.{_HOME[name]}"), name)
