"""Initial losses of the paper's recipes at the small scale, and of models A and B, for each output-layer gain.

python -m experiments.second.start IMAGES    # a folder of images; writes results/second-check/start.json
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from experiments.second.arms import RESULTS
from relaylab.data.datasets import InMemoryDataset
from relaylab.data.memory import decode_all
from relaylab.data.sources.subset import Subset
from relaylab.files import write_text
from relaylab.models.building import build_relay
from relaylab.recipes import PAPER
from relaylab.recipes.files import read_recipe
from relaylab.recipes.scales import at_scale
from relaylab.recipes.schema import Gain, Recipe
from relaylab.train.images import RunImages, classes_of, crop_spec_of, open_source

IMAGES, SEEDS = 64, (0, 1, 2)


def recipes() -> list[Recipe]:
    """Return models A and B of the second check, and the first recipe of the paper for each network."""
    found = [read_recipe(Path(__file__).with_name(f"{name}.toml")) for name in ("model-a", "model-b")]
    for recipe in PAPER.values():
        if recipe.network.architecture not in {own.network.architecture for own in found}:
            found.append(at_scale(recipe, "small"))
    return found


def with_gain(recipe: Recipe, gain: Gain) -> Recipe:
    """Return a recipe with the gain of all last layers."""
    auxiliary = {name: replace(window, gain=gain) for name, window in recipe.plan.auxiliary.items()}
    network, plan = replace(recipe.network, gain=gain), replace(recipe.plan, auxiliary=auxiliary)
    return replace(recipe, network=network, plan=plan)


def initial_losses(recipe: Recipe, images: RunImages, seed: int) -> dict[str, float]:
    """Return each loss of an untrained network on a batch, over the loss of guessing, ln C."""
    torch.manual_seed(seed)
    relay = build_relay(recipe)
    batch = next(iter(images.train.evaluation(IMAGES)))
    normalised = images.augmentation(recipe, seed).eval()(batch.images)
    with torch.no_grad():
        output = relay(normalised)
    logits = {"primary": output.primary, **output.auxiliary}
    chance = math.log(recipe.network.num_classes)
    return {name: nn.functional.cross_entropy(own, batch.labels).item() / chance for name, own in logits.items()}


def main(folder: str) -> None:
    """Write the mean initial losses over the seeds, by recipe and gain."""
    source = open_source([Path(folder)], split="train")
    chosen = Subset(source, np.linspace(0, len(source) - 1, IMAGES).astype(int))
    result: dict[str, dict[str, dict[str, float]]] = {}
    for recipe in recipes():
        spec = crop_spec_of(recipe)
        data = InMemoryDataset(decode_all(chosen, spec), spec)
        images = RunImages(data, data, spec, data.statistics(), True, classes_of(chosen))
        own = result[recipe.name] = {}
        for gain in ("he", "quiet"):
            losses = [initial_losses(with_gain(recipe, gain), images, seed) for seed in SEEDS]
            own[gain] = {name: round(sum(loss[name] for loss in losses) / len(losses), 3) for name in losses[0]}
        print(recipe.name, own)
    write_text(RESULTS / "start.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
