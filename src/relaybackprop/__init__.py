"""Relay backpropagation for any PyTorch model: declare how far down each loss may reach.

Example:
    >>> relay = Relay(model, plan, heads)  # doctest: +SKIP
    >>> criterion = RelayLoss(nn.CrossEntropyLoss(), plan)  # doctest: +SKIP
    >>> criterion(relay(images), labels).backward()  # doctest: +SKIP
    >>> relay.step(images, target=labels, loss=criterion)  # the same in the memory of one window  # doctest: +SKIP
"""

from relaybackprop.cost import Cost, cost
from relaybackprop.errors import RelayError
from relaybackprop.heads import AuxiliaryHead, DenseHead, LinearHead, Select, TokenHead
from relaybackprop.loss import RelayLoss, RelayOutput
from relaybackprop.matching import head_for
from relaybackprop.plan import Plan, Window
from relaybackprop.reach import Reach, reach
from relaybackprop.relay import Relay, RelayStep
from relaybackprop.suggest import Suggestion, suggest_plan

__all__ = [
    "AuxiliaryHead",
    "Cost",
    "DenseHead",
    "LinearHead",
    "Plan",
    "Reach",
    "Relay",
    "RelayError",
    "RelayLoss",
    "RelayOutput",
    "RelayStep",
    "Select",
    "Suggestion",
    "TokenHead",
    "Window",
    "cost",
    "head_for",
    "reach",
    "suggest_plan",
]
