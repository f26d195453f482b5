"""What should make one stop before blending: a wrong base, experts that learned the same, values that are broken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ktmerge.merge.diagnostics.measures import ALL, Movement, Pair
from ktmerge.merge.diagnostics.table import percent

if TYPE_CHECKING:
    from ktmerge.merge.diagnostics.inspection import Inspection

FAR = 0.1
"""||tau|| / ||theta_0|| of matrices above which a fine-tune of this base is unlikely."""
UNLIKE = 0.5
"""Cosine between weights of model and base below which the ones do not descend from the others."""
ALIKE = 0.9
"""Cosine between two experts' deltas above which they learned the same, or share another base."""
WHOLE = 0.999
"""Share of the base's weights that a fine-tune of it has under whatever names."""
HALF = 0.5
"""Share of changes below half an ulp of the base's type from which on rounding to it undoes a fine-tune."""


def warnings_of(found: Inspection) -> Iterator[str]:
    """One sentence each."""
    yield from _broken(found.broken)
    far = {name for name, moved in found.matrices.items() if moved.relative > FAR}
    pairs = {names: found.pair(*names, ALL) or Pair() for names in found.pairs}
    alike = {names: pair.cosine for names, pair in pairs.items() if pair.cosine is not None and pair.cosine > ALIKE}
    for name in found.models:
        yield from _one(found, name, name in far)
    for (first, second), cosine in alike.items():
        said = f"{first} and {second} moved in the same direction (cosine {cosine:.2f}):"
        if {first, second} & far:
            yield f"{said} they share a base that is not this one; inspect them with that one."
        else:
            yield f"{said} they learned the same; a sum would count it twice, so average them (method: linear)."


def _one(found: Inspection, name: str, far: bool) -> Iterator[str]:
    matrices = found.matrices[name]
    if not found.movements[name]:
        yield f"{name}: none of its weights could be measured; those it shares with the base are packed or no floats."
        return
    if found.coverage[name] < WHOLE:
        yield (
            f"{name} has only {percent(found.coverage[name], 1)} of the base's weights; the rest was not measured "
            "(see what is missing or of another shape)."
        )
    if not any(moved.changed for moved in found.movements[name].values()):
        yield f"{name} equals the base everywhere."
        return
    if far and not matrices.base:
        yield f"{name} changed matrices that are all 0 in the base, so it was tuned from another; find its own base."
        return
    if far and _unlike(matrices):
        yield (
            f"{name} is not a fine-tune of this base: its matrices have nothing of the base's (cosine "
            f"{matrices.likeness:.2f}, {_times(matrices)}). Blending the two would ruin both; find its own base."
        )
        return
    anew = {part: moved for part in found.contents if (moved := found.movement(name, part)) and _unlike(moved)}
    for part, moved in anew.items():
        yield (
            f"{name}: its {part} has nothing of the base's ({_times(moved)}); it was probably trained anew. Keep "
            "that part whole, from one of the two, by a rule under blend.where."
        )
    if far and not anew:
        yield (
            f"{name} moved far: its matrices by {_times(matrices)}, fine-tunes rarely by over {FAR:.0%}. It was "
            "probably tuned from another base of this family, or trained much further; a blend may be useless."
        )
    spread = found.spread(name, ALL)
    lost = spread.below(0.5) if spread is not None else 0.0
    if lost > HALF:
        yield (
            f"{name}: {lost:.0%} of its changes are under half a step of the base's type, and rounding to it would "
            "undo them; set output.dtype to the type of the tuned model."
        )


def _broken(found: Mapping[tuple[str, str], int]) -> Iterator[str]:
    by_model: dict[str, dict[str, int]] = {}
    for (model, tensor), count in found.items():
        by_model.setdefault(model, {})[tensor] = count
    for model, tensors in by_model.items():
        first, count = next(iter(tensors.items()))
        more = f", and {len(tensors) - 1} more tensors have some" if len(tensors) > 1 else ""
        yield (
            f"{model or 'the base'}: {count} values of '{first}' are NaN or infinite{more}; they count as unchanged "
            "here, and a blend refuses them."
        )


def _unlike(moved: Movement) -> bool:
    """Whether nothing of the base is left."""
    return moved.relative > FAR and moved.likeness is not None and moved.likeness < UNLIKE


def _times(moved: Movement) -> str:
    return f"{moved.relative:.0%} of the base's norm"
