"""Metrics of overlapping pieces of text (BLEU, chrF, ROUGE, CIDEr), by the packages that define them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

from ktmerge.errors import UsageError
from ktmerge.eval.captions import caption_words

OVERLAP = ("sentence_bleu", "sentence_chrf", "rouge1", "rouge2", "rougeL", "rougeLsum", "cider")
PACKAGES = {"sentence_bleu": "sacrebleu", "sentence_chrf": "sacrebleu", "cider": "pycocoevalcap"}


@dataclass(frozen=True)
class Overlap:
    """Scores of a set of answers.

    Attributes:
        scores: of each answer; [0, 1], CIDEr [0, 10].
        figures: numbers of the whole set that are not the mean of its answers' scores (0-100).
        signature: of the tokeniser and settings behind them.
    """

    scores: list[float]
    figures: dict[str, float] = field(default_factory=dict)
    signature: str = ""


def overlap(metric: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Overlap:
    """Score ``predictions`` against the references of each.

    Raises:
        UsageError: the metric's package is not installed.
    """
    require(metric)
    return _MEASURES[metric](predictions, references)


def require(metric: str, items: int | None = None) -> None:
    """Refuse a metric whose package is not here, or that means nothing for so few items, before anything is scored.

    Raises:
        UsageError: it says what to do.
    """
    if metric not in OVERLAP:
        return
    if metric == "cider" and items == 1:
        raise UsageError("CIDEr of a single item is always 0, as its weights come from the set; give it more items.")
    try:
        import_module(package(metric))
    except ImportError:
        raise UsageError(
            f"the metric '{metric}' needs the package {package(metric).replace('_', '-')}; "
            "install it with: pip install 'ktmerge[metrics]'."
        ) from None


def package(metric: str) -> str:
    """The package that defines an overlap metric."""
    return PACKAGES.get(metric, "rouge_score")


def _columns(references: Sequence[Sequence[str]]) -> Any:
    """References as sacrebleu's corpus scores take them: the first of every item, the second, ..., None where none."""
    most = max(map(len, references))
    return [[own[i] if i < len(own) else None for own in references] for i in range(most)]


def _bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Overlap:
    from sacrebleu.metrics.bleu import BLEU

    sentence, corpus = BLEU(effective_order=True), BLEU()
    scores = [sentence.sentence_score(said, list(own)).score / 100 for said, own in _pairs(predictions, references)]
    whole = corpus.corpus_score(list(predictions), _columns(references)).score
    return Overlap(_bounded(scores), {"bleu": whole}, str(corpus.get_signature()))


def _chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Overlap:
    from sacrebleu.metrics.chrf import CHRF

    chrf = CHRF()
    scores = [chrf.sentence_score(said, list(own)).score / 100 for said, own in _pairs(predictions, references)]
    whole = chrf.corpus_score(list(predictions), _columns(references)).score
    return Overlap(_bounded(scores), {"chrf": whole}, str(chrf.get_signature()))


def _rouge(kind: str) -> Callable[[Sequence[str], Sequence[Sequence[str]]], Overlap]:
    def measure(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Overlap:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=False)
        scores = [scorer.score_multi(list(own), said)[kind].fmeasure for said, own in _pairs(predictions, references)]
        return Overlap(_bounded(scores), signature=f"{kind}, F-measure, no stemmer, best reference")

    return measure


def _cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Overlap:
    """CIDEr-D (arXiv 1411.5726), with the document frequencies of this very set: subsets do not compare.

    The official evaluation tokenises by a Java program (Stanford's PTBTokenizer); here a rule does what it does to
    captions, so published numbers may differ by a few tenths.
    """
    from pycocoevalcap.cider.cider import Cider

    wanted = {i: [caption_words(one) for one in own] for i, own in enumerate(references)}
    said = {i: [caption_words(one)] for i, one in enumerate(predictions)}
    require("cider", len(said))
    _, scores = Cider().compute_score(wanted, said)
    return Overlap(
        np.clip(scores, 0.0, 10.0).tolist(),
        signature="CIDEr-D, lower case, words as in the Penn Treebank by a rule, no punctuation",
    )


def _pairs(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> zip[tuple[str, Sequence[str]]]:
    return zip(predictions, references, strict=True)


def _bounded(scores: list[float]) -> list[float]:
    """Without the last digits by which a perfect 100 may come out above 100."""
    return [min(1.0, max(0.0, score)) for score in scores]


_MEASURES: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], Overlap]] = {
    "sentence_bleu": _bleu,
    "sentence_chrf": _chrf,
    **{kind: _rouge(kind) for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")},
    "cider": _cider,
}
