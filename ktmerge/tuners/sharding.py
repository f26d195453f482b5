"""A model spread over several processes by FSDP2: every tensor cut into as many runs of rows as there are processes.

Everything that looks at single elements works on the rows of its own process (`own`); what is written to files is put
together again (`gather`), so that files look the same whatever number of processes wrote them, and any number can read
them (`rows`). Of a plain tensor, its own rows are all of it.

Imports torch; import it only where it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

from ktmerge.errors import KtmergeError
from ktmerge.tuners.processes import Processes


def shard(model: Any, processes: Processes, device: str) -> None:
    """Cut a model in place: each block a unit that is put together for its forward and backward, the rest another.

    Args:
        model: as transformers loads it, on the host; what is not trained is frozen already.
        processes: more than one.
        device: cuda or cpu.

    Raises:
        KtmergeError: something stayed whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (processes.count,))
    blocks = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # so the Trainer knows that placement and the reduction of gradients are taken care of
    model._is_distributed_loading_by_transformers = model._is_fsdp_managed_module = True
    require_sharded(model)


def require_sharded(model: torch.nn.Module) -> None:
    """Make sure that no process holds a whole parameter.

    Raises:
        KtmergeError: one does.
    """
    whole = next((name for name, one in model.named_parameters() if not isinstance(one, DTensor)), None)
    if whole is not None:
        raise KtmergeError(
            f"several processes were started, and '{whole}' is not sharded; this is an error of ktmerge."
        )


def own(tensor: Tensor) -> Tensor:
    """The rows of this process, in the memory of the tensor itself; without gradient."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def rows(tensor: Tensor) -> slice:
    """Which rows of the whole `own` are."""
    if not isinstance(tensor, DTensor):
        return slice(0, tensor.shape[0] if tensor.dim() else 1)
    count, mesh = int(tensor.shape[0]), tensor.device_mesh
    chunk = -(-count // mesh.size())
    start = min(count, mesh.get_local_rank() * chunk)
    return slice(start, min(count, start + chunk))


def places(tensor: Tensor) -> slice:
    """Which elements of the flat whole `own` are."""
    found, width = rows(tensor), int(torch.Size(tensor.shape[1:]).numel())
    return slice(found.start * width, found.stop * width)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process; without gradient."""
    with torch.no_grad():
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def add_up(counts: Tensor) -> Tensor:
    """The sum over all processes, of numbers on the host; in place."""
    if _count() > 1:
        distributed.all_reduce(counts)
    return counts


def before(count: int) -> int:
    """The sum of a number over the processes before this one."""
    if _count() == 1:
        return 0
    counts = torch.zeros(_count(), dtype=torch.int64)
    counts[distributed.get_rank()] = count
    return int(add_up(counts)[: distributed.get_rank()].sum())


def gather(part: Tensor) -> Tensor:
    """The parts of all processes, one behind the other, on the host of the first; elsewhere nothing.

    Args:
        part: rows of a tensor, or a `DTensor`; any number of them, of the same width in all processes.
    """
    local = own(part)
    if _count() == 1:
        return local.cpu()
    counts = torch.zeros(_count(), dtype=torch.int64)
    counts[distributed.get_rank()] = local.shape[0]
    lengths = add_up(counts).tolist()
    sent = local.to(torch.uint8) if local.dtype == torch.bool else local
    padded = sent.new_zeros((max(lengths), *local.shape[1:]))
    padded[: local.shape[0]] = sent
    found = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(found, padded)
    if distributed.get_rank():
        return local.new_zeros(0, device="cpu")
    joined = torch.cat([one[:length].cpu() for one, length in zip(found, lengths, strict=True)])
    return joined.to(local.dtype)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Have the first process write tensors, of which every process has rows, as if there were one process."""
    from safetensors.torch import save_file

    found = {name: gather(tensor).contiguous() for name, tensor in tensors.items()}
    if is_writer():
        save_file(found, path)


def put_together(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors by name, on the host of the first process, the rows of sharded ones together; elsewhere empty."""
    found = {name: gather(one) if isinstance(one, DTensor) else one.detach() for name, one in tensors.items()}
    return found if is_writer() else {}


def is_writer() -> bool:
    """Whether this process writes files."""
    return _count() == 1 or distributed.get_rank() == 0


def like(parameter: Tensor, local: Tensor) -> Tensor:
    """Own rows as a tensor that is sharded as the parameter is."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _count() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
