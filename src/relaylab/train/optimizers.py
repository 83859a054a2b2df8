"""Optimizers by name, and the parameter groups that they train.

To add an optimizer: a function here with its name in `OPTIMIZERS`, and the name and its values in `OptimizerConfig` of
`relaylab.recipes.schema`. Checkpoints keep all of its tensors.
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
    """Build a recipe's optimizer for the parameters that a loss trains."""
    return OPTIMIZERS[config.algorithm](parameter_groups(relay, segments, config), config)


def parameter_groups(relay: Relay, segments: Segments, config: OptimizerConfig) -> Groups:
    """Return one group for each pair of a factor on the learning rate, stored as "lr_factor", and a weight decay."""
    factors = dict[str, float]()
    if config.layer_decay is not None:
        names = [name.removeprefix(PREFIX) for name in segments.of if name.startswith(PREFIX)]
        factors = layer_factors(relay.model, names, config.layer_decay)
    spared = set[str]() if config.decay_norms_and_biases else _spared(relay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in relay.named_parameters():
        if parameter.requires_grad:
            factor = config.segment_lr.get(segments.of[name], 1.0) * factors.get(name.removeprefix(PREFIX), 1.0)
            groups.setdefault((factor, 0.0 if name in spared else config.weight_decay), []).append(parameter)
    return [
        {"params": parameters, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay), parameters in groups.items()
    ]


def _spared(relay: Relay) -> set[str]:
    """Names of the parameters without weight decay: of at most one dimension, or named by the network."""
    small = {name for name, parameter in relay.named_parameters() if parameter.ndim <= 1}
    return small | set(relay.no_weight_decay()) if hasattr(relay, "no_weight_decay") else small


def state_tensors(config: OptimizerConfig) -> int:
    """Return how many tensors of the size of a parameter the optimizer keeps for each parameter."""
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.zeros(2)
    optimizer = OPTIMIZERS[config.algorithm]([{"params": [parameter]}], config)
    optimizer.step()
    kept = optimizer.state[parameter].values()
    return sum(isinstance(value, Tensor) and value.shape == parameter.shape for value in kept)
