"""An exponential moving average of a training's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from relaylab.errors import InputError
from relaylab.train.engine import whole
from relaylab.train.state import like

SUFFIX = "/ema"  # of the names in checkpoints


class Average:
    """The moving average of a module's parameters and floating-point buffers, sharded as they are.

    After update t it is decay * average + (1 - decay) * weights, with the smaller of the decay and (1 + t) / (10 + t):
    the first weights, which are random, are soon forgotten. Other buffers are not averaged.

    Args:
        module: that is trained; its weights now are the first average.
        decay: between 0 and 1, such as 0.999.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        named = (*module.named_parameters(), *module.named_buffers())  # each once, even where modules share it
        self._names = [name for name, tensor in named if tensor.is_floating_point()]
        self._tensors = {name: tensor.clone() for name, tensor in self._current().items()}

    def update(self, step: int) -> None:
        """Update the average after an update of the weights, of which `step` have been made."""
        average = get_ema_multi_avg_fn(min(self._decay, (1 + step) / (10 + step)))
        current = self._current()
        for is_sharded in (False, True):  # torch refuses lists of both
            names = [name for name, tensor in current.items() if isinstance(tensor, DTensor) == is_sharded]
            if names:
                average([self._tensors[name] for name in names], [current[name] for name in names], step)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Exchange the module's weights for the average in the block; afterwards both are what they were."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self._current().items():
            kept = tensor.clone()
            tensor.copy_(self._tensors[name])
            self._tensors[name].copy_(kept)

    def _current(self) -> dict[str, Tensor]:
        """The weights themselves, not copies; FSDP's `state_dict` divides parameters that it has gathered."""
        state = self._module.state_dict()
        return {name: state[name] for name in self._names if name in state}

    def state(self) -> dict[str, Tensor]:
        """Return the average for a checkpoint, in all processes together."""
        return {f"{name}{SUFFIX}": whole(tensor) for name, tensor in self._tensors.items()}

    def load(self, kept: Mapping[str, Tensor]) -> None:
        """Load the average of a checkpoint.

        Args:
            kept: as from `state`; other tensors are ignored.

        Raises:
            InputError: it has no average of this module.
        """
        found = {name.removesuffix(SUFFIX): tensor for name, tensor in kept.items() if name.endswith(SUFFIX)}
        if found.keys() != self._tensors.keys():
            raise InputError("the checkpoint has no average of these weights (optimizer.ema_decay)")
        self._tensors = {name: like(tensor, self._tensors[name]) for name, tensor in found.items()}
