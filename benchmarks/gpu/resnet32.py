"""Recipes of ResNet-32 for CIFAR-10 with K local modules (entry B1)."""

from dataclasses import replace
from pathlib import Path

from experiments.second import networks
from experiments.second.windows import BLOCKS
from relaylab.recipes.files import read_recipe
from relaylab.recipes.schema import AuxiliaryConfig, PlanConfig, PrimaryConfig, Recipe, changed

BASE = Path(__file__).parents[2] / "experiments" / "recipes" / "resnet50-32px.toml"
SOURCE = "benchmarks.gpu: the 160-epoch recipe of local learning on CIFAR-10, cut to the minutes"
UNITS = ("stem", *BLOCKS)


def recipe(modules: int, shared: int, iterations: int) -> Recipe:
    """Return the recipe of ResNet-32 in K local modules of equal length, each with its own loss.

    Args:
        modules: K, a divisor of 16.
        shared: number of blocks of the module below that a loss also trains, except under `isolated`.
        iterations: number of updates.
    """
    length = len(UNITS) // modules
    auxiliary = {
        f"aux{index}": AuxiliaryConfig(
            top=UNITS[(index + 1) * length - 1],
            bottom=UNITS[index * length - shared] if index * length > shared else None,
            weight=1.0,
            head="auto",
        )
        for index in range(modules - 1)
    }
    plan = PlanConfig(primary=PrimaryConfig(bottom=UNITS[(modules - 1) * length - shared]), auxiliary=auxiliary)
    base = read_recipe(BASE)
    base = replace(base, network=replace(base.network, width=None), plan=plan)
    values = {
        "name": f"resnet32-k{modules}-shared{shared}",
        "row": f"ResNet-32, K = {modules}, {shared} shared blocks",
        "plan": plan,
        "network.architecture": f"{networks.__file__}:resnet",
        "network.num_classes": 10,
        "network.image_size": 32,
        "images.data_set": "any",
        "images.short_side": 32,
        "augmentation.padding": 4,
        "augmentation.colour_shift": 0.0,
        "augmentation.mean": "channel",
        "optimizer.batch_size": 128,
        "optimizer.lr": 0.1,
        "optimizer.warmup": 0,
        "optimizer.iterations": iterations,
        "optimizer.evaluate_every": iterations,
        "evaluation.scales": (32,),
    }
    return changed(base, SOURCE, values)
