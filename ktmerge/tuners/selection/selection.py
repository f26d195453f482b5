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

from ktmerge.checkpoints.alignment import align
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.live import as_checkpoint
from ktmerge.checkpoints.parts import Parts
from ktmerge.errors import UsageError
from ktmerge.progress import Progress
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners.machine import CHOSEN_BYTES
from ktmerge.tuners.origins import Origins
from ktmerge.tuners.selection import criteria, store
from ktmerge.tuners.selection.boundary import select_largest
from ktmerge.tuners.selection.compact import Chosen, CompactUpdate
from ktmerge.tuners.selection.halves import chosen_half
from ktmerge.tuners.selection.tally import drawing, rows, tally
from ktmerge.tuners.sharding import add_up, gather, is_writer, like, own, places, whole
from ktmerge.tuners.sharding import rows as rows_of

STATE = "selection.safetensors"


@dataclass
class Selection:
    """One job's choice, for the trained parameters of one model; of sharded ones, masks are of the process's own rows.

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
        self._sizes = {name: own(parameter).numel() for name, parameter in self.parameters.items()}
        self._total = sum(parameter.numel() for parameter in self.parameters.values())
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
        return int(add_up(torch.tensor(sum(int(mask.sum()) for mask in self.masks.values()))))

    def part_of(self, parameter: Tensor) -> slice | None:
        """See `CompactUpdate.part_of`."""
        return self._bound.part_of(parameter)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write all that a resumed run needs."""
        state: dict[str, Tensor] = {f"share/{name}": share for name, share in self._shares.items()}
        state |= {f"resting/{path}": value for path, value in self._bound.resting.items()}
        if self._evidence is not None:
            state |= {f"evidence/{name}": total for name, total in self._evidence.totals.items()}
        found = {path: gather(value) if value.dim() else value for path, value in state.items()}
        masks, touched = _gathered(self.masks), _gathered(self.touched)
        if is_writer():
            store.write(folder / STATE, masks, touched, found, {"history": self.history})

    def load(self, folder: Path) -> None:
        """Go on with what `save` wrote."""
        found = store.read(folder / STATE)
        # shares go by the places of a mask, everything else by rows
        chosen = {name: _span(mask, self.parameters[name]) for name, mask in found.masks.items()}
        self.masks = self._own_rows(found.masks)
        self.touched = self._own_rows(found.touched)
        self.history = found.facts["history"]
        state: dict[str, dict[str, Tensor]] = {"share": {}, "resting": {}, "evidence": {}}
        for path, value in found.others.items():
            kind, _, name = path.partition("/")
            of = name.rpartition("/")[2]
            cut = slice(None) if not value.dim() else chosen[of] if kind == "share" else rows_of(self.parameters[of])
            state[kind][name] = value[cut] if value.dim() else value
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
        masks = {names.get(name, name): mask for name, mask in _gathered(self.masks).items()}
        touched = {names.get(name, name): mask for name, mask in _gathered(self.touched).items()}
        if not is_writer():
            return
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
                    mine = own(parameter)
                    outside = ~self.masks[name].to(mine.device)
                    mine.copy_(torch.where(outside, self._origins[name].to(mine.device), mine))
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
            return {n: torch.full(own(p).shape, n in chosen, dtype=torch.bool) for n, p in self.parameters.items()}
        if job.select == "child_f":
            return {
                name: criteria.coins(parameter.shape, job.seed, name, step)[rows_of(parameter)] < job.selected_density
                for name, parameter in self.parameters.items()
            }
        if job.select == "fused" and job.density is None:
            return {name: self._scores(name, step).view_as(own(p)) > 0.5 for name, p in self.parameters.items()}
        scopes = [self._sizes] if job.selection_scope == "global" else [{n: s} for n, s in self._sizes.items()]
        flat: dict[str, Tensor] = {}
        for sizes in scopes:
            flat |= select_largest(
                lambda name: self._scores(name, step),
                sizes,
                round(job.selected_density * sum(self.parameters[name].numel() for name in sizes)),
                lambda name: self._noise(name, step),
            )
        return {name: flat[name].view(own(parameter).shape) for name, parameter in self.parameters.items()}

    def _noise(self, name: str, step: int) -> Tensor:
        parameter = self.parameters[name]
        return criteria.noise(parameter.numel(), self.job.seed, name, step)[places(parameter)]

    def _own_rows(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: mask[rows_of(self.parameters[name])] for name, mask in masks.items()}

    def _scores(self, name: str, step: int) -> Tensor:
        """fp32, flat: the larger, the sooner chosen."""
        kind, parameter = self.job.select, self.parameters[name]
        if kind == "random":
            every = criteria.coins(torch.Size([parameter.numel()]), self.job.seed, name, step)
            return every[places(parameter)]
        if kind == "magnitude":
            return -self._pretrained(name).abs().reshape(-1).cpu()
        assert self._evidence is not None
        total = self._evidence.totals[name]
        if kind in ("gradient", "child_d"):
            return total.reshape(-1).cpu()
        # a standing is one among all elements of the tensor
        fused = criteria.fusion(*(whole(like(parameter, one)) for one in (self._pretrained(name), total)))
        return fused.reshape(-1)[places(parameter)].cpu()

    def _soft(self, step: int) -> dict[str, Tensor]:
        """The share of its way that each chosen element keeps, ``[chosen]``."""
        found = {}
        for name, mask in self.masks.items():
            parameter = self.parameters[name]
            local = self._scores(name, step).view(mask.shape).to(self._device)
            scores, every = (whole(like(parameter, one)).cpu() for one in (local, mask.to(self._device)))
            if self.job.select == "magnitude":
                scores = 1.0 - criteria.standing(scores)
            elif self.job.select == "gradient":
                scores = criteria.standing(scores.sqrt())
            found[name] = criteria.shares(scores, every)[rows_of(parameter)][mask]
        return found

    def _pretrained(self, name: str) -> Tensor:
        return own(self.parameters[name]) if self._origins is None else self._origins[name]

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
        selected, total = self.selected, self._total
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


def _gathered(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: gather(mask) for name, mask in masks.items()}


def _span(mask: Tensor, parameter: Tensor) -> slice:
    """Which of the chosen elements of a whole tensor are in the process's own rows."""
    mine = rows_of(parameter)
    start = int(mask[: mine.start].sum())
    return slice(start, start + int(mask[mine].sum()))


def _share(row: Mapping[str, Any]) -> float:
    return float(row["touched"] / max(1, row["of"]))
