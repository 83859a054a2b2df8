"""Optimizers by name, and their parameter groups.

To add an optimizer, add a function to `OPTIMIZERS`, and its name and values to `OptimizerConfig` in
`relaylab.recipes.schema`. Checkpoints save all of its tensors.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from relaybackprop import Relay
from relaybackprop.forwarded import PREFIX
from relaylab.recipes.schema import OptimizerConfig
from relaylab.train.layers import layer_factors
from relaylab.train.segments import Segments

Groups = list[dict[str, Any]]


def _sgd(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, config.lr, momentum=config.momentum)


def _adamw(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    first, second = config.betas
    return torch.optim.AdamW(groups, config.lr, betas=(first, second), eps=config.eps)


OPTIMIZERS: Mapping[str, Callable[[Groups, OptimizerConfig], torch.optim.Optimizer]] = {"sgd": _sgd, "adamw": _adamw}


def build_optimizer(relay: Relay, segments: Segments, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build a recipe's optimizer for the trainable parameters."""
    return OPTIMIZERS[config.algorithm](parameter_groups(relay, segments, config), config)


def parameter_groups(relay: Relay, segments: Segments, config: OptimizerConfig) -> Groups:
    """Return one parameter group per combination of weight decay and "lr_factor", a learning rate factor."""
    factors = dict[str, float]()
    if config.layer_decay is not None:
        names = [name.removeprefix(PREFIX) for name in segments.of if name.startswith(PREFIX)]
        factors = layer_factors(relay.model, names, config.layer_decay)
    no_decay = set[str]() if config.decay_norms_and_biases else _no_decay(relay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in relay.named_parameters():
        if parameter.requires_grad:
            factor = config.segment_lr.get(segments.of[name], 1.0) * factors.get(name.removeprefix(PREFIX), 1.0)
            groups.setdefault((factor, 0.0 if name in no_decay else config.weight_decay), []).append(parameter)
    return [
        {"params": parameters, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay), parameters in groups.items()
    ]


def _no_decay(relay: Relay) -> set[str]:
    """Return the parameters without weight decay: those with at most one dimension, or listed by the network."""
    small = {name for name, parameter in relay.named_parameters() if parameter.ndim <= 1}
    return small | set(relay.no_weight_decay()) if hasattr(relay, "no_weight_decay") else small


def state_tensors(config: OptimizerConfig) -> int:
    """Return the number of state tensors that the optimizer keeps per parameter, each of the parameter's shape."""
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.zeros(2)
    optimizer = OPTIMIZERS[config.algorithm]([{"params": [parameter]}], config)
    optimizer.step()
    state = optimizer.state[parameter].values()
    return sum(isinstance(value, Tensor) and value.shape == parameter.shape for value in state)
