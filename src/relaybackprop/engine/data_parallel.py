"""Data parallel training where `DistributedDataParallel` cannot serve: it wants one backward pass, at the end."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:  # not every torch has it
    from torch.distributed import ProcessGroup

BUCKET_BYTES = 25 * 2**20  # as in DistributedDataParallel


def is_parallel(group: "ProcessGroup | None" = None) -> bool:
    """Whether there are other processes to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def average_gradients(module: nn.Module, group: "ProcessGroup | None" = None) -> None:
    """Replace each gradient by its mean over all processes. A parameter that no process has used keeps none.

    Call it once for each update, in all processes; `Relay.forward_backward` does.

    Args:
        module: with the same parameters in all processes.
        group: of the processes; None for all.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not is_parallel(group) or not parameters:
        return
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX, group=group)
    for parameter, is_used in zip(parameters, used.unbind(), strict=True):
        if parameter.grad is None and is_used.item():
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for bucket in _buckets(gradients):
        total = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(total, group=group)
        total /= dist.get_world_size(group)
        start = 0
        for gradient in bucket:
            gradient.copy_(total[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()


def share_buffers(module: nn.Module, group: "ProcessGroup | None" = None) -> None:
    """Give all processes the first one's buffers, such as the running statistics of batch normalisation.

    Args:
        module: with the same buffers in all processes.
        group: of the processes; None for all.
    """
    if is_parallel(group):
        for buffer in module.buffers():
            dist.broadcast(buffer, group_src=0, group=group)


def _buckets(gradients: Iterable[Tensor]) -> list[list[Tensor]]:
    """Runs of gradients of one type and device, each of about `BUCKET_BYTES`."""
    buckets: dict[tuple[torch.dtype, torch.device], list[list[Tensor]]] = {}
    for gradient in gradients:
        runs = buckets.setdefault((gradient.dtype, gradient.device), [[]])
        if sum(other.nbytes for other in runs[-1]) >= BUCKET_BYTES:
            runs.append([])
        runs[-1].append(gradient)
    return [run for runs in buckets.values() for run in runs]
