"""Exponential moving average (EMA) of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from relaylab.errors import InputError
from relaylab.train.engine import whole
from relaylab.train.state import like

SUFFIX = "/ema"  # of tensor names in checkpoints


class Average:
    """Exponential moving average of a module's parameters and floating-point buffers, sharded like them.

    Update t computes `average = d * average + (1 - d) * weights` with `d = min(decay, (1 + t) / (10 + t))`, so that the
    random initial weights are forgotten quickly. Other buffers are not averaged.

    Args:
        module: the module being trained; its current weights initialise the average.
        decay: between 0 and 1, such as 0.999.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        named = (*module.named_parameters(), *module.named_buffers())  # shared tensors only once
        self._names = [name for name, tensor in named if tensor.is_floating_point()]
        self._tensors = {name: tensor.clone() for name, tensor in self._current().items()}

    def update(self, step: int) -> None:
        """Update the average; `step` is the number of optimizer steps made so far."""
        average = get_ema_multi_avg_fn(min(self._decay, (1 + step) / (10 + step)))
        current = self._current()
        for is_sharded in (False, True):  # torch does not accept mixed lists
            names = [name for name, tensor in current.items() if isinstance(tensor, DTensor) == is_sharded]
            if names:
                average([self._tensors[name] for name in names], [current[name] for name in names], step)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Use the average as the module's weights within the block; both are restored afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self._current().items():
            saved = tensor.clone()
            tensor.copy_(self._tensors[name])
            self._tensors[name].copy_(saved)

    def _current(self) -> dict[str, Tensor]:
        """The live tensors, not copies. With FSDP, `state_dict` first reshards gathered parameters."""
        state = self._module.state_dict()
        return {name: state[name] for name in self._names if name in state}

    def state(self) -> dict[str, Tensor]:
        """Return the unsharded average for a checkpoint. A collective: all processes must call it."""
        return {f"{name}{SUFFIX}": whole(tensor) for name, tensor in self._tensors.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the average from a checkpoint.

        Args:
            tensors: tensors that `state` returned; names without its suffix are ignored.

        Raises:
            InputError: the average is missing, or belongs to a different module.
        """
        averages = {name.removesuffix(SUFFIX): tensor for name, tensor in tensors.items() if name.endswith(SUFFIX)}
        if averages.keys() != self._tensors.keys():
            raise InputError("the checkpoint has no average of these weights (optimizer.ema_decay)")
        self._tensors = {name: like(tensor, self._tensors[name]) for name, tensor in averages.items()}
