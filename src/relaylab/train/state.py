"""The state of a training run for checkpoints: its progress, and its tensors, which may be sharded."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from relaylab.errors import InputError
from relaylab.train.engine import whole
from relaylab.train.schedule import Plateau

STEP = "step"  # of AdamW and others: number of updates, a scalar on the CPU


@dataclass
class Progress:
    """The progress of a training run.

    Attributes:
        step: number of updates made.
        validated: step of the last validation; -1 before the first.
        plateau: state of a plateau schedule.
        best: step, errors and loss of the validation with the lowest error; empty before the first.
        last: step, errors and loss of the last validation.
        seconds: time spent on updates over all starts, without validation and saving.
    """

    step: int = 0
    validated: int = -1
    plateau: Plateau = field(default_factory=Plateau)
    best: dict[str, float] = field(default_factory=dict[str, float])
    last: dict[str, float] = field(default_factory=dict[str, float])
    seconds: float = 0.0

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> "Progress":
        """Return the progress stored in the state of a checkpoint, which also has other entries."""
        values = {entry.name: state[entry.name] for entry in fields(Progress) if entry.name in state}
        return Progress(**{**values, "plateau": Plateau(**state["plateau"])})


@dataclass(frozen=True)
class _Sums:
    sums: dict[str, float]
    seen: dict[str, float]
    norms: float
    finite: int
    steps: int


@dataclass(frozen=True)
class State:
    """The types of the entries of a checkpoint's state."""

    format: str
    step: int
    recipe: dict[str, Any]
    processes: int
    plateau: Plateau
    stream: dict[str, Any]
    meter: _Sums
    validated: int = -1
    seconds: float = 0.0
    best: dict[str, float] = field(default_factory=dict[str, float])
    last: dict[str, float] = field(default_factory=dict[str, float])
    scaler: dict[str, float] | None = None


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors by parameter and name, such as "NAME/momentum_buffer"."""
    return {
        f"{name}/{key}": whole(value)
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer, model: Mapping[str, Tensor], moments: Mapping[str, Tensor]
) -> None:
    """Load the model and optimizer tensors of a checkpoint. They are copied, since they may be memory-mapped.

    Raises:
        InputError: the tensors belong to a different network.
    """
    current = module.state_dict()
    try:
        module.load_state_dict({name: like(tensor, current.get(name, tensor)) for name, tensor in model.items()})
    except RuntimeError as error:
        raise InputError(
            f"the checkpoint belongs to a different network: {' '.join(str(error).split())[:300]}"
        ) from None
    parameters = dict(module.named_parameters())
    optimizer.state.clear()
    for key, tensor in moments.items():
        name, _, entry = key.rpartition("/")
        if name not in parameters:
            raise InputError(
                f"the checkpoint belongs to a different network: it has {entry} of the unknown parameter {name}"
            )
        shape = parameters[name].shape
        if (entry != STEP and tensor.shape != shape) or not tensor.dtype.is_floating_point or tensor.numel() == 0:
            raise InputError(
                f"the checkpoint's {entry} of {name} has the shape {tuple(tensor.shape)} and dtype {tensor.dtype}: "
                f"expected {tuple(shape)}, floating-point"
            )
        is_count = entry == STEP  # neither sharded nor moved to the device, as in Optimizer.load_state_dict
        optimizer.state[parameters[name]][entry] = tensor.clone() if is_count else like(tensor, parameters[name])


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a copy of a tensor with the device, memory format and sharding of a given one."""
    if isinstance(other, DTensor):
        return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
    if tensor.shape != other.shape:
        return tensor.to(other.device, copy=True)
    return torch.empty_like(other, dtype=tensor.dtype).detach().copy_(tensor)
