"""A training's state for checkpoints: its progress, and its tensors, however they are sharded."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from relaylab.errors import InputError
from relaylab.train.engine import whole
from relaylab.train.schedule import Plateau

STEP = "step"  # of AdamW and others: the number of updates, a scalar on the CPU


@dataclass
class Progress:
    """The progress of a training.

    Attributes:
        step: updates made.
        validated: the step of the last validation; -1 before the first.
        best: step, errors and loss of the validation with the lowest error; empty before the first.
        last: the same of the last validation.
        seconds: spent on updates, over all starts; validation and saving do not count.
    """

    step: int = 0
    validated: int = -1
    plateau: Plateau = field(default_factory=Plateau)
    best: dict[str, float] = field(default_factory=dict[str, float])
    last: dict[str, float] = field(default_factory=dict[str, float])
    seconds: float = 0.0

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> "Progress":
        """Read the progress from a checkpoint's state, which has other entries too."""
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
    """The types of what a checkpoint's state holds."""

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
    module: nn.Module, optimizer: torch.optim.Optimizer, model: Mapping[str, Tensor], kept: Mapping[str, Tensor]
) -> None:
    """Load a checkpoint's model and optimizer tensors. They are copied: their memory may be mapped to the file.

    Raises:
        InputError: they belong to another module.
    """
    own = module.state_dict()
    try:
        module.load_state_dict({name: like(tensor, own.get(name, tensor)) for name, tensor in model.items()})
    except RuntimeError as error:
        raise InputError(f"the checkpoint is of another network: {' '.join(str(error).split())[:300]}") from None
    parameters = dict(module.named_parameters())
    optimizer.state.clear()
    for key, tensor in kept.items():
        name, _, what = key.rpartition("/")
        if name not in parameters:
            raise InputError(f"the checkpoint is of another network: it has {what} of {name}, which is not there")
        wanted = parameters[name].shape
        if (what != STEP and tensor.shape != wanted) or not tensor.dtype.is_floating_point or tensor.numel() == 0:
            raise InputError(
                f"the checkpoint's {what} of {name} has the shape {tuple(tensor.shape)} and the type {tensor.dtype}: "
                f"expected {tuple(wanted)}, floating-point"
            )
        is_count = what == STEP  # not divided with the parameter, nor moved to its device, as in torch's own loading
        optimizer.state[parameters[name]][what] = tensor.clone() if is_count else like(tensor, parameters[name])


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a copy with the device, memory format and sharding of another tensor."""
    if isinstance(other, DTensor):
        return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
    if tensor.shape != other.shape:
        return tensor.to(other.device, copy=True)
    return torch.empty_like(other, dtype=tensor.dtype).detach().copy_(tensor)
