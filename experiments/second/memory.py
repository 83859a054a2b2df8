"""Predicted cost of a training step of ResNet-32 at its published size, for each way to divide it into windows.

python -m experiments.second.memory    # writes results/second-check/memory.json; some minutes, nothing is trained
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from experiments.second.windows import ARMS, recipe
from relaybackprop import cost
from relaylab.files import write_text
from relaylab.models.building import build_relay
from relaylab.models.named import allow
from relaylab.recipes.changes import with_changes
from relaylab.recipes.files import read_recipe

RESULTS = Path(__file__).parents[2] / "results" / "second-check"
PUBLISHED, BATCH = ("network.options.width=16", "network.image_size=32"), 1024
ISOLATED = {15: 1, 8: 1, 4: 1, 2: 2}  # windows, and the shared blocks of the recipe that is trained isolated


def step(windows: int, shared: int, *, is_isolated: bool = False) -> dict[str, Any]:
    """Return peak memory in bytes and floating-point operations of a step, relative to standard BP, by scheme."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        path.write_text(recipe(windows, shared), encoding="utf-8")
        published, _ = with_changes(read_recipe(path), PUBLISHED)
    allow(published.network)
    relay = build_relay(published, on_meta=True)
    images = torch.empty(BATCH, 3, published.network.image_size, published.network.image_size, device="meta")
    if is_isolated:
        relay(images)  # sets the order
        relay.plan = relay.plan.isolated(relay.order)
    result = cost(relay.model, relay.plan, images, dict(relay.heads.items()))
    return {"peaks": dict(result.peaks), "flops": {name: round(ratio, 4) for name, ratio in result.ratios.items()}}


if __name__ == "__main__":
    steps = {f"windows-{windows}-{shared}-relay": step(windows, shared) for windows, shared in ARMS}
    for windows, shared in ISOLATED.items():
        steps[f"windows-{windows}-{shared}-isolated"] = step(windows, shared, is_isolated=True)
    write_text(RESULTS / "memory.json", json.dumps(steps, indent=1) + "\n")
