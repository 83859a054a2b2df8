"""Run by .ci/run against the installed wheel, away from the checkout: the five lines of the README's first screen."""

from pathlib import Path

import torch
from torch import nn

import relaybackprop
from relaybackprop import LinearHead, Plan, Relay, RelayLoss, Window

assert "site-packages" in relaybackprop.__file__, relaybackprop.__file__
assert (Path(relaybackprop.__file__).parent / "py.typed").exists()

model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
plan = Plan(primary=Window(bottom="2"), auxiliary={"aux": Window(top="3")})
relay = Relay(model, plan, heads={"aux": LinearHead(4, 5)})
criterion = RelayLoss(nn.CrossEntropyLoss())
criterion(relay(torch.randn(2, 3, 8, 8)), torch.tensor([0, 4])).backward()
assert all(parameter.grad is not None and parameter.grad.any() for parameter in relay.parameters())
print("the wheel works:", relaybackprop.__file__)
print(relay.plan)
