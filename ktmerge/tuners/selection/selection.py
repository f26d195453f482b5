"""Selective tuning: chooses what moves, again every so many steps, and says what was chosen.

Imports torch; import it only where it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ktmerge.checkpoints import Checkpoint, Parts, align
from ktmerge.checkpoints.live import as_checkpoint
from ktmerge.errors import UsageError
from ktmerge.progress import Progress
from ktmerge.recipes.schema import FinetuneJob
from ktmerge.tuners.machine import CHOSEN_BYTES
from ktmerge.tuners.origins import Origins
from ktmerge.tuners.selection import criteria, store
from ktmerge.tuners.selection.boundary import select_largest
from ktmerge.tuners.selection.compact import Chosen, CompactUpdate
from ktmerge.tuners.selection.halves import chosen_half
from ktmerge.tuners.selection.tally import drawing, rows, tally

STATE = "selection.safetensors"


@dataclass
class Selection:
    """One job's choice, for the trained parameters of one model.

    Args:
        job: `select` and the settings beside it.
        parameters: those that are trained, by name, as the base has them.
        parts: of the model.
        progress: told how much was chosen.
    """

    job: FinetuneJob
    parameters: Mapping[str, Parameter]
    parts: Parts
    progress: Progress
    masks: dict[str, Tensor] = field(default_factory=dict)
    touched: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        soft = self.job.mask == "soft"
        again = self.job.select == "fused" and self.job.every is not None
        self._origins = Origins(self.parameters) if soft or again else None
        self._sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
        self._evidence: criteria.Evidence | None = None
        self._update: CompactUpdate | None = None
        self._shares: dict[str, Tensor] = {}

    # --- the way of a run ---------------------------------------------------------------------------------------------

    def bind(self, optimizer: torch.optim.Optimizer, names: Sequence[Sequence[str]]) -> None:
        """Stand before ``optimizer``, whose groups hold the parameters with these names."""
        self._update = CompactUpdate(optimizer, names, keeps_moments=self.job.select == "child_f")

    def begin(self, gradients: Callable[[], Iterator[None]]) -> None:
        """Make the first choice, before the first step.

        Args:
            gradients: has the parameters hold the gradient of one batch after the other.
        """
        if self.job.selects_by_gradient:
            squared = self.job.select != "fused"
            self._evidence = criteria.Evidence(self.parameters, squared=squared)
            for _ in gradients():
                self._evidence.observe()
        self._choose(0)

    def observe(self) -> None:
        """The gradients of a step are complete: learn from them."""
        if self._evidence is not None:
            self._evidence.observe()

    def mask_gradients(self) -> None:
        """Before they are clipped: leave only those of what is chosen."""
        # Child-Tuning F keeps the expected gradient (arXiv 2109.05687, eq. 5)
        scale = 1.0 / self.job.selected_density if self.job.select == "child_f" else 1.0
        self._bound.mask_gradients(scale)

    def after_step(self, step: int) -> None:
        """Choose again, if it is time to."""
        if self.job.selects_every and step % self.job.selects_every == 0:
            self._choose(step)

    @property
    def selected(self) -> int:
        """How many elements move now."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write all that a resumed run needs."""
        state: dict[str, Tensor] = {f"share/{name}": share for name, share in self._shares.items()}
        state |= {f"resting/{path}": value for path, value in self._bound.resting.items()}
        if self._evidence is not None:
            state |= {f"evidence/{name}": total for name, total in self._evidence.totals.items()}
        store.write(folder / STATE, self.masks, self.touched, state, {"history": self.history})

    def load(self, folder: Path) -> None:
        """Go on with what `save` wrote."""
        found = store.read(folder / STATE)
        self.masks, self.touched = found.masks, found.touched
        self.history = found.facts["history"]
        state: dict[str, dict[str, Tensor]] = {"share": {}, "resting": {}, "evidence": {}}
        for path, value in found.others.items():
            kind, _, name = path.partition("/")
            state[kind][name] = value
        self._shares = state["share"]
        self._bound.resting = {path: value.to(self._device) for path, value in state["resting"].items()}
        if state["evidence"]:
            self._evidence = criteria.Evidence(self.parameters, squared=self.job.select != "fused")
            for name, value in state["evidence"].items():
                self._evidence.totals[name].copy_(value)
        self._hand_over()

    def publish(self, folder: Path, base: Checkpoint) -> None:
        """Write what goes with the expert: masks under the base's names, counts, and a drawing of them."""
        # a live model may call a tensor otherwise than the file does
        names = {live: name for name, live in align(base, as_checkpoint(self.parameters, base), "").mapping.items()}
        masks = {names.get(name, name): mask for name, mask in self.masks.items()}
        touched = {names.get(name, name): mask for name, mask in self.touched.items()}
        cells = tally(masks, touched, Parts(list(base.tensors), base.config))
        told = rows(cells)
        store.write(folder / store.MASKS, masks, touched, {}, {"select": self.job.select})
        document = json.dumps({"select": self.job.select, "selections": self.history, "parts": told}, indent=1)
        (folder / store.COUNTS).write_text(document + "\n", encoding="utf-8")
        (folder / store.DRAWING).write_text(drawing(cells, f"select {self.job.select}") + "\n", encoding="utf-8")
        for one in told:
            self.progress.note(f"  {one['part']}: {one['touched']:,} of {one['of']:,} chosen ({_share(one):.2%})")

    # --- choosing -----------------------------------------------------------------------------------------------------

    def _choose(self, step: int) -> None:
        self.masks = self._masks(step)
        self._shares = self._soft(step) if self.job.mask == "soft" else {}
        if self.job.mask == "soft" and self._origins is not None:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    outside = ~self.masks[name].to(parameter.device)
                    parameter.copy_(torch.where(outside, self._origins[name].to(parameter.device), parameter))
        for name, mask in self.masks.items():
            self.touched[name] = mask if name not in self.touched else self.touched[name] | mask
        self._note(step)
        if self._evidence is not None:
            if not self.job.selects_every:
                self._evidence = None
            elif self.job.select != "fused":
                self._evidence.clear()
        self._hand_over()

    def _masks(self, step: int) -> dict[str, Tensor]:
        job = self.job
        if job.select == "half":
            chosen = chosen_half(self.parameters, self.parts, job.seed, step // (job.selects_every or 1))
            return {n: torch.full(p.shape, n in chosen, dtype=torch.bool) for n, p in self.parameters.items()}
        if job.select == "child_f":
            return {
                name: criteria.coins(parameter.shape, job.seed, name, step) < job.selected_density
                for name, parameter in self.parameters.items()
            }
        if job.select == "fused" and job.density is None:
            return {name: self._scores(name, step).view_as(p) > 0.5 for name, p in self.parameters.items()}
        scopes = [self._sizes] if job.selection_scope == "global" else [{n: s} for n, s in self._sizes.items()]
        flat: dict[str, Tensor] = {}
        for sizes in scopes:
            flat |= select_largest(
                lambda name: self._scores(name, step),
                sizes,
                round(job.selected_density * sum(sizes.values())),
                lambda name: criteria.noise(self._sizes[name], job.seed, name, step),
            )
        return {name: flat[name].view(parameter.shape) for name, parameter in self.parameters.items()}

    def _scores(self, name: str, step: int) -> Tensor:
        """fp32, flat: the larger, the sooner chosen."""
        kind = self.job.select
        if kind == "random":
            return criteria.coins(torch.Size([self._sizes[name]]), self.job.seed, name, step)
        if kind == "magnitude":
            return -self._pretrained(name).abs().reshape(-1).cpu()
        assert self._evidence is not None
        total = self._evidence.totals[name]
        scores = total if kind in ("gradient", "child_d") else criteria.fusion(self._pretrained(name), total)
        return scores.reshape(-1).cpu()

    def _soft(self, step: int) -> dict[str, Tensor]:
        """The share of its way that each chosen element keeps, ``[chosen]``."""
        found = {}
        for name, mask in self.masks.items():
            scores = self._scores(name, step).view(mask.shape)
            if self.job.select == "magnitude":
                scores = 1.0 - criteria.standing(scores)
            elif self.job.select == "gradient":
                scores = criteria.standing(scores.sqrt())
            found[name] = criteria.shares(scores, mask)[mask]
        return found

    def _pretrained(self, name: str) -> Tensor:
        return self.parameters[name].detach() if self._origins is None else self._origins[name]

    def _hand_over(self) -> None:
        chosen = {}
        for name, mask in self.masks.items():
            own = mask.to(self._device)
            share = self._shares.get(name)
            if share is None or self._origins is None:
                chosen[name] = Chosen(own)
            else:
                origin = self._origins[name].to(self._device).masked_select(own)
                chosen[name] = Chosen(own, share.to(self._device), origin)
        self._bound.choose(chosen)

    def _note(self, step: int) -> None:
        selected, total = self.selected, sum(self._sizes.values())
        self.history.append({"step": step, "selected": selected})
        if not selected and step == 0:
            raise UsageError(
                f"select {self.job.select}: density {self.job.selected_density:g} chooses none of {total:,} elements; "
                "raise it, or count over all with scope: global."
            )
        if step == 0:
            self.progress.note(
                f"selecting by {self.job.select}: {selected:,} of {total:,} elements move ({selected / total:.2%}); "
                f"their values, places and moments take {CHOSEN_BYTES * selected / 1e6:.1f} MB."
            )

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    @property
    def _bound(self) -> CompactUpdate:
        assert self._update is not None
        return self._update


def _share(row: Mapping[str, Any]) -> float:
    return float(row["touched"] / max(1, row["of"]))
