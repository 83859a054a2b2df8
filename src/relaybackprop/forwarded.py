"""The model's methods that training frameworks call on the module that they train. A relay forwards them.

timm's optimizers ask a model which parameters have no weight decay (`no_weight_decay`) and which layer each belongs to
(`group_matcher`), by name. In a relay the model's names begin with "model.", so these two are translated.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

from torch import nn

PREFIX = "model."  # of the model's names in a relay
OTHERS = (float("inf"),)  # timm's group of parameters that no pattern matches: the last one

_Group = tuple[float, ...]


def forwarded(model: nn.Module, name: str) -> Callable[..., Any]:
    """Return a method of the model as its relay has it.

    Args:
        model: of the relay.
        name: one of `FORWARDED`.

    Raises:
        AttributeError: the model does not have the method.
    """
    method, translate = getattr(model, name), FORWARDED[name]
    return method if translate is None else partial(translate, model)


def _no_weight_decay(model: Any) -> set[str]:
    return {PREFIX + name for name in model.no_weight_decay()}


def _group_matcher(model: Any, coarse: bool = False) -> Callable[[str], _Group]:
    """A function from names to groups, which timm takes like patterns. Heads are in the model's last group."""
    group_of = _grouping(model.group_matcher(coarse=coarse))
    last = max(group_of(name) for name, _ in model.named_parameters())

    def group_in_relay(name: str) -> _Group:
        return group_of(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else last

    return group_in_relay


def _grouping(matcher: Any) -> Callable[[str], _Group]:
    """A group matcher as a function: timm's are patterns by group name, lists of (pattern, suffix), or functions."""
    if callable(matcher):
        return lambda name: _as_group(matcher(name))
    patterns = [
        (float(number), re.compile(pattern), suffix or ())
        for number, spec in enumerate(matcher.values())
        if spec is not None
        for pattern, suffix in ([(spec, None)] if isinstance(spec, str) else spec)
    ]

    def group_of(name: str) -> _Group:
        for number, pattern, suffix in patterns:
            if match := pattern.match(name):
                return (number, *map(float, match.groups()), *suffix)
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
