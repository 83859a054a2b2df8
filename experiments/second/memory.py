"""Predicted cost of a training step of ResNet-32 at its published size, for each way to divide it into windows.

python -m experiments.second.memory    # writes results/second-check/memory.json; some minutes, nothing is trained
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from experiments.second.networks import resnet
from experiments.second.windows import ARMS, recipe
from relaybackprop import Plan, Relay, cost
from relaylab.files import write_text
from relaylab.models.building import build_head, build_plan
from relaylab.recipes.files import read_recipe

RESULTS = Path(__file__).parents[2] / "results" / "second-check"
WIDTH, BATCH, CLASSES, PIXELS = 16, 1024, 10, 32
ISOLATED = {15: 1, 8: 1, 4: 1, 2: 2}  # windows, and the shared blocks of the recipe that is trained isolated


def step(windows: int, shared: int, *, is_isolated: bool = False) -> dict[str, Any]:
    """Return peak memory in bytes and floating-point operations of a step, relative to standard BP, by scheme."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        path.write_text(recipe(windows, shared), encoding="utf-8")
        plan_config = read_recipe(path).plan
    images = torch.empty(BATCH, 3, PIXELS, PIXELS, device="meta")
    with torch.device("meta"):
        model = resnet(CLASSES, width=WIDTH)
        heads: dict[str, nn.Module] = {
            name: build_head("conv", (WIDTH * 2 ** (int(window.top[len("layer")]) - 1), 8, 8), CLASSES, True)
            for name, window in plan_config.auxiliary.items()
        }
    plan: Plan = build_plan(plan_config)
    if is_isolated:
        relay = Relay(model, plan, heads)
        relay(images)
        plan = plan.isolated(relay.order)
    result = cost(model, plan, images, heads)
    return {"peaks": dict(result.peaks), "flops": {name: round(ratio, 4) for name, ratio in result.ratios.items()}}


if __name__ == "__main__":
    steps = {f"windows-{windows}-{shared}-relay": step(windows, shared) for windows, shared in ARMS}
    for windows, shared in ISOLATED.items():
        steps[f"windows-{windows}-{shared}-isolated"] = step(windows, shared, is_isolated=True)
    write_text(RESULTS / "memory.json", json.dumps(steps, indent=1) + "\n")
