"""transformers' Trainer with three changes: what is projected, how losses are evaluated, what a checkpoint holds.

Imports torch and transformers; import it only where they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

from ktmerge.errors import KtmergeError
from ktmerge.tuners.collate import Collator
from ktmerge.tuners.encode import Encoded
from ktmerge.tuners.loss import answer_loss, count_trained, pieces
from ktmerge.tuners.selection.selection import Selection

WEIGHTS = "model.safetensors"


class AnswerTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    """Trains on `answer_loss` where the model computes it faithfully, else on the model's own loss.

    Args:
        lean: whether the model passed `projects_faithfully`.
        piece_tokens: split every batch into pieces of this many tokens; None: take it whole.
        eval_sets: samples by name; their mean losses per trained token are logged as ``eval_<name>_loss``.
        rates: learning rate of each trained parameter, by name.
        selection: what of them moves; None: all.
    """

    def __init__(
        self,
        *,
        lean: bool,
        piece_tokens: int | None,
        eval_sets: Mapping[str, Sequence[Encoded]],
        rates: Mapping[str, float],
        selection: Selection | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(eval_dataset=dict(eval_sets) or None, **kwargs)
        self._lean = lean
        self._piece_tokens = piece_tokens
        self._eval_sets = eval_sets
        self._rates = rates
        self._selection = selection
        self._resumed: Path | None = None
        self._tokens, self._step_seconds = 0, 0.0
        if lean:
            # have the trained tokens of all accumulated batches counted: compute_loss divides by their number
            self.model_accepts_loss_kwargs = True

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train to the end, from the start or a checkpoint."""
        self._resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer, with a group for every learning rate, with and without weight decay (norms and biases)."""
        if self.optimizer is None:
            network = self._network if model is None else model
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, network)
            groups = self._groups(network)
            names = [group.pop("names") for group in groups]
            self.optimizer = kind(groups, **settings)
            if self._selection is not None:
                self._selection.bind(self.optimizer, names)
                if self._resumed is None:
                    self._selection.begin(self._gradients)
                else:
                    self._selection.load(self._resumed)
        found: torch.optim.Optimizer = self.optimizer
        return found

    def _groups(self, network: torch.nn.Module) -> list[dict[str, Any]]:
        decayed = set(self.get_decay_parameter_names(network))
        groups: dict[tuple[float, bool], dict[str, torch.nn.Parameter]] = {}
        for name, parameter in network.named_parameters():
            if name in self._rates:
                groups.setdefault((self._rates[name], name in decayed), {})[name] = parameter
        return [
            {
                "params": list(members.values()),
                "names": list(members),
                "lr": rate,
                "weight_decay": self.args.weight_decay if decays else 0.0,
            }
            for (rate, decays), members in groups.items()
        ]

    def _gradients(self) -> Iterator[None]:
        """Have the parameters hold the gradient of one batch after another, of samples drawn by the seed."""
        samples: Any = self.train_dataset
        job = self._selection.job if self._selection is not None else None
        count = min(len(samples), job.select_samples if job is not None else 0)
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(self.args.seed))[:count].tolist()
        self._network.eval()  # the same gradients every time: nothing is dropped
        for inputs, parts in self._batches([samples[place] for place in order]):
            items = count_trained(inputs)
            for part in parts:
                with self.compute_loss_context_manager():
                    loss = self._sum_of_losses(part, items) / items
                torch.autograd.backward(loss)
            yield
            self._network.zero_grad()
        self._network.train()

    def _clip_grad_norm(self, model: Any) -> Any:
        if self._selection is not None:
            self._selection.before_clipping()
        clip: Any = super()._clip_grad_norm
        return clip(model)

    @property
    def _network(self) -> Any:
        return self.model

    @property
    def tokens_per_second(self) -> float:
        """Tokens of samples, without padding, per second of forward and backward passes."""
        return self._tokens / max(self._step_seconds, 1e-9)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one batch; the gradient is that of the whole batch however it is split."""
        started = perf_counter()
        split = self._lean and self._piece_tokens is not None and num_items_in_batch is not None
        loss = torch.zeros((), device=self.args.device)
        for piece in pieces(inputs, self._piece_tokens or 0) if split else [inputs]:
            loss += super().training_step(model, piece, num_items_in_batch)
        self._tokens += int(inputs["attention_mask"].sum())
        self._step_seconds += perf_counter() - started
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss per trained token, over all the batches accumulated for one step."""
        if not self._lean or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        items = count_trained(inputs) if num_items_in_batch is None else num_items_in_batch
        return answer_loss(model, inputs) / items

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean loss per trained token of every evaluation set: independent of batch size, drawing no random numbers."""
        metrics = {f"eval_{name}_loss": self._mean_loss(samples) for name, samples in self._eval_sets.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _mean_loss(self, samples: Sequence[Encoded]) -> float:
        self._network.eval()
        total, count = 0.0, 0
        with torch.no_grad(), self.compute_loss_context_manager():
            for inputs, parts in self._batches(sorted(samples, key=len, reverse=True)):
                items = count_trained(inputs)
                total += sum(float(self._sum_of_losses(part, items)) for part in parts)
                count += items
        return total / count

    def _batches(self, samples: Sequence[Encoded]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Batches in order, each whole and in the pieces it is worked on in."""
        collate: Any = self.data_collator
        size = self.args.per_device_train_batch_size
        for first in range(0, len(samples), size):
            inputs = self._prepare_inputs(collate(samples[first : first + size]))
            split = self._lean and self._piece_tokens is not None
            found = list(pieces(inputs, self._piece_tokens or 0)) if split else [inputs]
            yield inputs, [part for part in found if count_trained(part)]

    def _sum_of_losses(self, inputs: dict[str, Any], items: int) -> torch.Tensor:
        if self._lean:
            return answer_loss(self._network, inputs)
        loss: torch.Tensor = self._network(**inputs).loss
        return loss * items

    # A checkpoint holds the parameters under the names of the modules. The Trainer's own would hold them under the
    # names of the file format, which differ for architectures that convert on loading, and resume would skip those.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_tensors(self._network), folder / WEIGHTS)
        if self._selection is not None:
            self._selection.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        stored = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        own = _tensors(self._network)
        if stored.keys() != own.keys():
            raise KtmergeError(f"{resume_from_checkpoint}: holds other tensors than the model; start with --overwrite.")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(stored[name])


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters and saved buffers, the shared ones once."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = model.state_dict()
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers() if name in state}
    return {name: tensor.contiguous() for name, tensor in {**parameters, **buffers}.items()}


def build_collator(tokenizer: Any) -> Collator:
    """The collator for a tokenizer; any token will do as padding, since it is masked."""
    return Collator(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)
