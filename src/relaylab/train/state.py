"""What a checkpoint has of a training: how far it is, and its tensors, however they are divided among processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from relaylab.errors import InputError
from relaylab.train.engine import whole
from relaylab.train.schedule import Plateau


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        step: updates made.
        validated: the step of the last validation; -1 before the first.
        plateau: of the schedule.
        best: step, top1, top5 and loss of the validation with the least top-1 error; empty before the first.
        last: the same of the last one.
        seconds: spent on updates, over all starts; validation and saving do not count.
    """

    step: int = 0
    validated: int = -1
    plateau: Plateau = field(default_factory=Plateau)
    best: dict[str, float] = field(default_factory=dict[str, float])
    last: dict[str, float] = field(default_factory=dict[str, float])
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "step": self.step,
            "validated": self.validated,
            "plateau": self.plateau.state_dict(),
            "best": self.best,
            "last": self.last,
            "seconds": self.seconds,
        }

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> "Progress":
        """What `state_dict` has written; other keys are left alone."""
        plateau = Plateau.from_state(state["plateau"])
        best, last = dict(state["best"]), dict(state["last"])
        return Progress(state["step"], state["validated"], plateau, best, last, state.get("seconds", 0.0))


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer keeps of each parameter, by the parameter's name and its own: "NAME/momentum_buffer"."""
    return {
        f"{name}/{key}": whole(value)
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer, model: Mapping[str, Tensor], kept: Mapping[str, Tensor]
) -> None:
    """Put a checkpoint's tensors back. Copies: what comes from a file may lie in memory that the file is mapped to.

    Args:
        module: whose parameters the optimizer updates.
        optimizer: new, or used.
        model: the module's state dict.
        kept: what `optimizer_tensors` gave.

    Raises:
        InputError: they are of another module.
    """
    own = module.state_dict()
    try:
        module.load_state_dict({name: _like(tensor, own.get(name, tensor)) for name, tensor in model.items()})
    except RuntimeError as error:
        raise InputError(f"the checkpoint is of another network: {' '.join(str(error).split())[:300]}") from None
    parameters = dict(module.named_parameters())
    optimizer.state.clear()
    for key, tensor in kept.items():
        name, _, what = key.rpartition("/")
        if name not in parameters:
            raise InputError(f"the checkpoint is of another network: it has {what} of {name}, which is not there")
        optimizer.state[parameters[name]][what] = _like(tensor, parameters[name])


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """On the same device, in the same order in memory, and divided in the same way."""
    if isinstance(other, DTensor):
        return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
    if tensor.shape != other.shape:
        return tensor.to(other.device, copy=True)
    return torch.empty_like(other, dtype=tensor.dtype).detach().copy_(tensor)
