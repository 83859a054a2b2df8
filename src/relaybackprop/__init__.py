"""Relay backpropagation for any PyTorch model: declare how far down each loss may reach.

Example:
    ```python
    relay = Relay(model, plan, heads)
    criterion = RelayLoss(nn.CrossEntropyLoss())
    criterion(relay(images), labels).backward()
    # Or, with the peak memory of the largest window:
    relay.forward_backward(images, target=labels, loss=criterion)
    ```
"""

from relaybackprop.errors import RelayError
from relaybackprop.heads import AuxiliaryHead, LinearHead, TokenHead
from relaybackprop.loss import RelayLoss
from relaybackprop.plan import Plan, Window
from relaybackprop.planning.cost import cost
from relaybackprop.planning.matching import head_for
from relaybackprop.planning.suggest import suggest_plan
from relaybackprop.reach import reach
from relaybackprop.relay import Relay

_MOVED = {  # names that this package exported before 0.2
    "Cost": "planning.cost",
    "DenseHead": "heads",
    "Reach": "reach",
    "RelayOutput": "loss",
    "RelayStep": "relay as RelayResult",
    "Select": "heads",
    "Suggestion": "planning.suggest",
}

__all__ = [
    "AuxiliaryHead",
    "LinearHead",
    "Plan",
    "Relay",
    "RelayError",
    "RelayLoss",
    "TokenHead",
    "Window",
    "cost",
    "head_for",
    "reach",
    "suggest_plan",
]


def __getattr__(name: str) -> object:
    if name in _MOVED:
        # An ImportError, because `from relaybackprop import name` replaces the message of an AttributeError.
        raise ImportError(f"{name} moved to relaybackprop.{_MOVED[name]} in 0.2")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
