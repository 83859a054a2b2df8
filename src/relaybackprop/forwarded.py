"""Forwarded methods: methods of the model that training frameworks call on the module that they train.

timm's optimizers call `no_weight_decay` for the names of parameters without weight decay, and `group_matcher` for the
layer group of each name. In a relay these names begin with "model.", so the results of both are translated.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

from torch import nn

PREFIX = "model."  # prefix of the model's parameter names in a relay
OTHERS = (float("inf"),)  # timm's last group, for parameters that no pattern matches

_Group = tuple[float, ...]


def forwarded(model: nn.Module, name: str) -> Callable[..., Any]:
    """Return a method of the model, with translated results where the parameter names differ.

    Args:
        model: the relay's model.
        name: a key of `FORWARDED`.

    Raises:
        AttributeError: the model does not have the method.
    """
    method, translate = getattr(model, name), FORWARDED[name]
    return method if translate is None else partial(translate, model)


def _no_weight_decay(model: Any) -> set[str]:
    return {PREFIX + name for name in model.no_weight_decay()}


def _group_matcher(model: Any, coarse: bool = False) -> Callable[[str], _Group]:
    """Return a function from parameter names to groups, as timm accepts it. Heads are in the model's last group."""
    group_of = _grouping(model.group_matcher(coarse=coarse))
    last = max(group_of(name) for name, _ in model.named_parameters())

    def group_in_relay(name: str) -> _Group:
        return group_of(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else last

    return group_in_relay


def _grouping(matcher: Any) -> Callable[[str], _Group]:
    """Convert a group matcher (patterns by group name, lists of (pattern, suffix), or a function) to a function."""
    if callable(matcher):
        return lambda name: _as_group(matcher(name))
    patterns = [
        (float(index), re.compile(pattern), suffix or ())
        for index, spec in enumerate(matcher.values())
        if spec is not None
        for pattern, suffix in ([(spec, None)] if isinstance(spec, str) else spec)
    ]

    def group_of(name: str) -> _Group:
        for index, pattern, suffix in patterns:
            if match := pattern.match(name):
                return (index, *map(float, match.groups()), *suffix)
        return OTHERS

    return group_of


def _as_group(value: Any) -> _Group:
    return tuple(cast(Iterable[float], value)) if isinstance(value, Iterable) else (value,)


FORWARDED: dict[str, Callable[..., Any] | None] = {
    "no_weight_decay": _no_weight_decay,
    "group_matcher": _group_matcher,
    "set_grad_checkpointing": None,  # timm
    "activation_checkpointing_enable": None,  # transformers 5
    "activation_checkpointing_disable": None,
    "gradient_checkpointing_enable": None,
    "gradient_checkpointing_disable": None,
}
