"""The Trainer of a run on several processes: each has a share of every batch and the rows of every tensor.

transformers' Trainer trains a model that is sharded already as it is; what differs here is who takes which samples, and
that checkpoints are those of one process, so that any number of processes can go on with them.

Imports torch and transformers; import it only where they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, RandomSampler

from ktmerge.tuners.encode import Encoded
from ktmerge.tuners.loss import count_trained
from ktmerge.tuners.processes import Processes
from ktmerge.tuners.sharding import add_up, gather, is_writer, like, own, put_together, require_sharded, rows
from ktmerge.tuners.sharing import Share, SharedBatches, muted
from ktmerge.tuners.trainer import AnswerTrainer, trained_tensors

_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"
"""As the Trainer of one process calls them."""


class ShardedTrainer(AnswerTrainer):
    """`AnswerTrainer` for a model that `shard` has cut.

    Args:
        processes: of the run.
        batch_size: samples that one process would take together.
        kwargs: of `AnswerTrainer`; its ``lean`` must hold.
    """

    def __init__(self, *, processes: Processes, batch_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._processes, self._batch_size = processes, batch_size
        require_sharded(self._network)

    # --- who takes which samples --------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """The batches of this process."""
        order = self._get_train_sampler()
        if isinstance(order, RandomSampler):  # what accelerate makes of it in one process
            order = SeedableRandomSampler(order.data_source, generator=order.generator, data_seed=self.args.data_seed)
        size, passes = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        batches = SharedBatches(order, size, passes, self._processes.rank, self._processes.count)
        data: Any = self.train_dataset
        return DataLoader(Share(data), batch_sampler=batches, collate_fn=self.data_collator)  # type: ignore[arg-type]

    def _batches(self, samples: Sequence[Encoded]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        collate: Any = self.data_collator
        count = self._processes.count
        for first in range(0, len(samples), self._batch_size):
            batch = samples[first : first + self._batch_size]
            inputs = self._prepare_inputs(collate(batch[self._processes.rank :: count] or [muted(batch[0])]))
            yield inputs, [inputs]

    # FSDP takes the mean of the processes' gradients; what is wanted is the sum, over the tokens of all.

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss per trained token of all processes, as many times as there are processes."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss * self._processes.count

    def _items(self, inputs: dict[str, Any]) -> int:
        return int(add_up(torch.tensor(count_trained(inputs))))

    def _sum_of_losses(self, inputs: dict[str, Any], items: int) -> Tensor:
        return super()._sum_of_losses(inputs, items) * self._processes.count

    def _mean_loss(self, samples: Sequence[Encoded]) -> float:
        own_share = torch.tensor(super()._mean_loss(samples), dtype=torch.float64)
        return float(add_up(own_share)) / self._processes.count

    @property
    def tokens_per_second(self) -> float:
        """Of all processes."""
        return float(add_up(torch.tensor(super().tokens_per_second, dtype=torch.float64)))

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save_last_step(self) -> bool:
        """What failed in one process cannot be saved by the others."""
        return False

    def _save_weights(self, file: Path) -> None:
        found = put_together(trained_tensors(self._network))
        if is_writer():
            save_file(found, file)

    def _set(self, tensor: Tensor, whole: Tensor) -> None:
        own(tensor).copy_(whole[rows(tensor)] if tensor.dim() else whole)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer: Any = self.optimizer
        document = optimizer.state_dict()
        document["state"] = {
            place: {key: gather(value) if _has_rows(value) else value for key, value in state.items()}
            for place, state in document["state"].items()
        }
        if is_writer():
            scheduler: Any = self.lr_scheduler
            torch.save(document, Path(output_dir) / _OPTIMIZER)
            torch.save(scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        document = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        document["state"] = {
            place: self._own_state(parameters[place], state) for place, state in sorted(document["state"].items())
        }
        optimizer.load_state_dict(document)
        scheduler.load_state_dict(torch.load(folder / _SCHEDULER, weights_only=True))

    def _own_state(self, parameter: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """Of what an optimizer knows of a whole tensor, or of all chosen elements: what concerns this process."""
        if isinstance(parameter, DTensor):
            device = own(parameter).device
            return {
                key: like(parameter, value[rows(parameter)].to(device)) if _has_rows(value) else value
                for key, value in state.items()
            }
        mine = self._selection.part_of(parameter) if self._selection is not None else None
        cut = slice(None) if mine is None else mine
        return {key: value[cut] if _has_rows(value) else value for key, value in state.items()}


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
