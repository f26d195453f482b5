"""transformers' Trainer with three changes: what is projected, how losses are evaluated, what a checkpoint holds.

Imports torch and transformers; import it only where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, cast

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import Trainer

from ktmerge.errors import KtmergeError
from ktmerge.tuners.callbacks import StepCallback
from ktmerge.tuners.collate import IGNORED, Collator
from ktmerge.tuners.encode import Encoded, Extras
from ktmerge.tuners.keeping.distil import TAUGHT, Teacher
from ktmerge.tuners.keeping.pull import Pull
from ktmerge.tuners.keeping.replay import ReplaySampler
from ktmerge.tuners.loss import answer_loss, answers, count_trained, following, pieces
from ktmerge.tuners.optimizers import InBackward, OnHost, spare_embeddings
from ktmerge.tuners.packing import LengthSampler, PackingCollator
from ktmerge.tuners.reach import with_gradient
from ktmerge.tuners.selection.selection import Selection

WEIGHTS = "model.safetensors"


class Keeper(Protocol):
    """Something with a state of its own."""

    def save(self, folder: Path) -> None:
        """Write it beside the weights of a checkpoint."""

    def load(self, folder: Path) -> None:
        """Go on with what `save` wrote."""


class AnswerTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    """Trains on `answer_loss` where the model computes it faithfully, else on the model's own loss.

    Args:
        lean: whether the model passed `projects_faithfully`.
        piece_tokens: split every batch into pieces of this many tokens; None: take it whole.
        eval_sets: samples by name; their mean losses per trained token are logged as ``eval_<name>_loss``.
        rates: learning rate of each trained parameter, by name.
        selection: what of them moves; None: all.
        pull: what draws them back to the base.
        teacher: the frozen base, whose answers are learned, too.
        sampler: the order of the samples; None: shuffled in every epoch.
        keepers: what else goes into checkpoints and comes out of them.
        in_backward: step each parameter as soon as its gradient is there.
        on_host: keep the optimizer's state in the host's memory.
    """

    def __init__(
        self,
        *,
        lean: bool,
        piece_tokens: int | None,
        eval_sets: Mapping[str, Sequence[Encoded]],
        rates: Mapping[str, float],
        selection: Selection | None = None,
        pull: Pull | None = None,
        teacher: Teacher | None = None,
        sampler: ReplaySampler | LengthSampler | None = None,
        keepers: Sequence[Keeper] = (),
        in_backward: bool = False,
        on_host: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(eval_dataset=dict(eval_sets) or None, **kwargs)
        self._lean = lean
        self._piece_tokens = piece_tokens
        self._eval_sets = eval_sets
        self._rates = rates
        self._selection = selection
        self._pull, self._teacher, self._sampler, self._keepers = pull, teacher, sampler, keepers
        self._distilled, self._untold = 0.0, 0
        self._resumed: Path | None = None
        self._tokens, self._step_seconds = 0, 0.0
        self._steps_in_backward, self._on_host = in_backward, on_host
        self._in_backward: InBackward | None = None
        self._is_passing = False
        self._random: dict[str, Any] = {}
        self.add_callback(StepCallback(self._remember_random))
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
            spare_embeddings(network, self.args.optim)
            self.optimizer = kind(groups, **settings)
            if self._on_host:
                OnHost(self.optimizer)
            if self._steps_in_backward:
                self._in_backward = InBackward(self.optimizer)
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
        data: Any = self.train_dataset
        samples = [sample for sample in data if not sample.replayed]
        job = self._selection.job if self._selection is not None else None
        count = min(len(samples), job.select_samples if job is not None else 0)
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(self.args.seed))[:count].tolist()
        self._network.eval()  # the same gradients every time: nothing is dropped
        for inputs, parts in self._batches([samples[place] for place in order]):
            items = self._items(inputs)
            for part in parts:
                with self.compute_loss_context_manager():
                    loss = self._sum_of_losses(part, items) / items
                torch.autograd.backward(with_gradient(loss))
            yield
            self._network.zero_grad()
        self._network.train()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self._sampler is None else self._sampler

    def _clip_grad_norm(self, model: Any) -> Any:
        self._untold += 1
        if self._in_backward is not None:
            return self._in_backward.take_norm()
        if self._selection is not None:
            self._selection.observe()  # the data's gradients alone say what matters to the data
        if self._pull is not None:
            self._pull.add_gradients()
        if self._selection is not None:
            self._selection.mask_gradients()
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
        self._is_passing = True
        split = self._lean and self._piece_tokens is not None and num_items_in_batch is not None
        loss = torch.zeros((), device=self.args.device)
        for piece in pieces(inputs, self._piece_tokens or 0) if split else [inputs]:
            loss += super().training_step(model, piece, num_items_in_batch)
        self._tokens += int(inputs["attention_mask"].sum())
        self._step_seconds += perf_counter() - started
        self._is_passing = False
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss per trained token, over all the batches accumulated for one step."""
        if return_outputs:
            return super().compute_loss(model, _given(inputs), True, num_items_in_batch)
        return with_gradient(self._loss(model, inputs, num_items_in_batch))

    def _loss(self, model: Any, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        given = _given(inputs)
        items = count_trained(inputs) if num_items_in_batch is None else num_items_in_batch
        if self._teacher is None:
            if self._lean:
                return answer_loss(model, given) / items
            return cast(torch.Tensor, super().compute_loss(model, given, False, num_items_in_batch))
        if self._lean:
            logits, targets, wanted = answers(model, given)
            loss = functional.cross_entropy(logits.float(), targets, reduction="sum") / items
        else:
            loss, outputs = super().compute_loss(model, given, True, num_items_in_batch)
            wanted = following(inputs["labels"]) != IGNORED
            logits = outputs.logits[wanted]
        distilled = self._teacher.loss(inputs, logits, wanted) / items
        self._distilled += float(distilled.detach())
        total: torch.Tensor = loss + distilled
        return total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Report; the losses of training with what the base adds to them."""
        if "loss" in logs and self._pull is not None:
            logs["pull"] = self._pull.penalty
        if "loss" in logs and self._teacher is not None:
            logs["distillation"] = self._distilled / max(1, self._untold)
            self._distilled, self._untold = 0.0, 0
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean loss per trained token of every evaluation set: independent of batch size, drawing no random numbers."""
        metrics = {f"eval_{name}_loss": loss for name, loss in self.losses().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def losses(self) -> dict[str, float]:
        """Mean loss per trained token of every evaluation set."""
        return {name: self._mean_loss(samples) for name, samples in self._eval_sets.items()}

    def _mean_loss(self, samples: Sequence[Encoded]) -> float:
        self._network.eval()
        total, count = 0.0, 0
        with torch.no_grad(), self.compute_loss_context_manager():
            for inputs, parts in self._batches(sorted(samples, key=len, reverse=True)):
                items = self._items(inputs)
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

    def _items(self, inputs: dict[str, Any]) -> int:
        """Trained tokens of a batch."""
        return count_trained(inputs)

    def _sum_of_losses(self, inputs: dict[str, Any], items: int) -> torch.Tensor:
        given = _given(inputs)
        if self._lean:
            return answer_loss(self._network, given)
        loss: torch.Tensor = self._network(**given).loss
        return loss * items

    def save_last_step(self) -> bool:
        """After a failure, save the state that the last step left; whether there is such a state."""
        if not self._is_passing or self._steps_in_backward or not self._random:
            return False
        self._network.zero_grad()
        torch.set_rng_state(self._random["cpu"])
        if "cuda" in self._random:
            torch.cuda.set_rng_state(self._random["cuda"])
        self._save_checkpoint(self._network, trial=None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return True

    def _remember_random(self, step: int) -> None:
        self._random = {"cpu": torch.get_rng_state()}
        if self.args.device.type == "cuda":
            self._random["cuda"] = torch.cuda.get_rng_state()

    # A checkpoint holds the parameters under the names of the modules. The Trainer's own would hold them under the
    # names of the file format, which differ for architectures that convert on loading, and resume would skip those.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self._save_weights(folder / WEIGHTS)
        if self._selection is not None:
            self._selection.save(folder)
        for keeper in self._keepers:
            keeper.save(folder)

    def _save_weights(self, file: Path) -> None:
        save_file(trained_tensors(self._network), file)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        stored = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        own = trained_tensors(self._network)
        if stored.keys() != own.keys():
            raise KtmergeError(f"{resume_from_checkpoint}: holds other tensors than the model; start with --overwrite.")
        with torch.no_grad():
            for name, tensor in own.items():
                self._set(tensor, stored[name])
        for keeper in self._keepers:
            keeper.load(Path(resume_from_checkpoint))

    def _set(self, tensor: torch.Tensor, whole: torch.Tensor) -> None:
        tensor.copy_(whole)


def _given(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch the model and its loss are given."""
    return {name: value for name, value in inputs.items() if name != TAUGHT}


def trained_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters and saved buffers, the shared ones once."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = model.state_dict()
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers() if name in state}
    return {name: tensor.contiguous() for name, tensor in {**parameters, **buffers}.items()}


def build_collator(
    tokenizer: Any,
    taught: Callable[[Encoded], bool] | None = None,
    *,
    row_tokens: int | None = None,
    extras: Extras | None = None,
) -> Collator | PackingCollator:
    """The collator for a tokenizer; any token will do as padding, since it is masked.

    Args:
        tokenizer: whose padding token is used, if it has one.
        taught: see `Collator`.
        row_tokens: pack samples into rows of about so many tokens; None: a row for each sample.
        extras: see `Collator`; packed samples have none.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Collator(pad, taught, extras) if row_tokens is None else PackingCollator(pad, row_tokens)
