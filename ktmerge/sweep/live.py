"""The one loaded model of a worker: recipes are blended into it in memory, and it is scored as it then is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.checkpoint import Checkpoint, content_digest
from ktmerge.checkpoints.dtypes import torch_dtype
from ktmerge.checkpoints.hub import resolve
from ktmerge.checkpoints.limits import context_length
from ktmerge.eval.encode import has_images
from ktmerge.eval.loading import choose_device, choose_dtype, load_model, load_sight, load_tokenizer
from ktmerge.eval.scorer import score_model
from ktmerge.eval.sets import TaskSet
from ktmerge.merge import blend_into
from ktmerge.merge.decompositions import keeping
from ktmerge.merge.planning import plan_blend
from ktmerge.merge.pristine import Pristine
from ktmerge.merge.sinks import LiveSink
from ktmerge.progress import Progress
from ktmerge.recipes.schema import Recipe
from ktmerge.sweep.rounds import ItemScores, Round, cut
from ktmerge.sweep.seeds import drawn, mean_of

if TYPE_CHECKING:
    from ktmerge.eval.sight import Sight


class LiveModel:
    """Base and experts read once, and one model that takes every blend of them.

    Args:
        recipe: names base and experts.
        device: auto, cpu or cuda.
        batch_size: most sequences in a forward pass.
        gigabytes: most decompositions kept on disk.
        progress: where to report to.

    Raises:
        UsageError: the base cannot be loaded.
    """

    def __init__(
        self, recipe: Recipe, device: str, batch_size: int | None, gigabytes: float, progress: Progress
    ) -> None:
        self._recipe, self._batch_size, self._gigabytes, self._progress = recipe, batch_size, gigabytes, progress
        root = resolve(str(recipe.base), recipe.folder)
        self._device = choose_device(device)
        self.tokenizer = load_tokenizer(root)
        self._length = context_length(Checkpoint.open(root).config)
        self._root = root
        self.sight: Sight | None = None  # loaded with the first set that has images
        self._sources = Pristine(str(self._device))
        self._blended: Recipe | None = None

    @cached_property
    def model(self) -> Any:
        """The model; of the base's weights until something is blended into it."""
        return load_model(self._root, self._device, choose_dtype(self._device))

    def cut(self, sets: Sequence[TaskSet], ends: Sequence[float]) -> list[Round]:
        """The sets in rounds, in this model's tokens."""
        if self.sight is None and any(has_images(item) for one in sets for item in one.items):
            self.sight = load_sight(self._root)
        return cut(sets, ends, self.tokenizer, self._length, self.sight)

    def blend(self, recipe: Recipe) -> None:
        """Make the model what the recipe gives, if that is not what it is.

        Raises:
            KtmergeError: it cannot be blended.
        """
        if self._blended == recipe:
            return
        self._blended = None
        with ExitStack() as stack:
            if self._gigabytes:
                stack.enter_context(keeping(self._gigabytes))
            blend_into(
                self.model, recipe, self._sources, device=str(self._device), measured=False, progress=self._progress
            )
        self._blended = recipe

    def score_blend(self, recipe: Recipe, one: Round, label: str, seeds: int = 1) -> ItemScores:
        """The item scores of what the recipe gives; their mean over so many seeds, the recipe's own the first."""
        draws = []
        for blended in drawn(recipe, seeds):
            self.blend(blended)
            draws.append(self.score(one, label if seeds == 1 else f"{label}, seed {blended.seed}"))
        return mean_of(draws)

    def score(self, one: Round, label: str) -> ItemScores:
        """The item scores of what the model is now."""
        found = score_model(
            self.model, self.tokenizer, one.sets, batch_size=self._batch_size, encoded=one.encoded,
            sight=self.sight, progress=self._progress, label=label,
        )  # fmt: skip
        return {name: score.scores.tolist() for name, score in found.items()}

    def copy_of(self, recipe: Recipe) -> Any:
        """A second model that stays what the recipe gives."""
        model = load_model(self._root, self._device, choose_dtype(self._device))
        blend_into(model, recipe, self._sources, device=str(self._device), measured=False)
        return model

    def digest(self, recipe: Recipe) -> tuple[str | None, list[str]]:
        """sha256 over all tensors as on disk, and those that are not loaded, such as ``mtp.*``, and so not in it.

        It is what `Checkpoint.content_digest` says of the folder the recipe blends to, without these. None: the
        model's types cannot hold all of the output's values.
        """
        import torch

        self.blend(recipe)
        plan = plan_blend(recipe)
        sink = LiveSink(self.model, plan.base)
        digests: dict[str, str] = {}
        loaded = [tensor for tensor in plan.tensors if tensor.name in sink.targets]
        left_out = [tensor.name for tensor in plan.tensors if tensor.name not in sink.targets]
        for tensor in loaded:
            if sink.dtype(tensor.name, tensor.dtype) != tensor.dtype:
                return None, left_out
            digest = hashlib.sha256()
            for piece in sink.targets[tensor.name]:
                own = piece.detach().to(torch_dtype(tensor.dtype)).cpu().contiguous().view(-1).view(torch.uint8)
                digest.update(own.numpy().data)
            digests[tensor.name] = digest.hexdigest()
        return content_digest([replace(tensor.info, dtype=tensor.dtype) for tensor in loaded], digests), left_out
