"""ResNet-32 for CIFAR-10 (He et al., 2016, section 4.2), and its recipes with K local modules (entry B1)."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

from torch import nn
from torchvision.models.resnet import BasicBlock

from relaylab.recipes.files import read_recipe
from relaylab.recipes.schema import AuxiliaryConfig, PlanConfig, PrimaryConfig, Recipe, changed

BASE = Path(__file__).parents[2] / "experiments" / "recipes" / "resnet50-32px.toml"
SOURCE = "benchmarks.gpu: the 160-epoch recipe of local learning on CIFAR-10, cut to the minutes"
UNITS = 16  # the stem and 15 blocks


def resnet32(num_classes: int = 10) -> nn.Sequential:
    """Return the network: `unit0` to `unit15`, and a classifier. Shortcuts between widths are projections."""
    units = [nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())]
    width = 16
    for planes in (16, 32, 64):
        for index in range(5):
            stride, shortcut = (2 if planes > 16 and index == 0 else 1), None
            if width != planes:
                shortcut = nn.Sequential(nn.Conv2d(width, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
            units.append(nn.Sequential(BasicBlock(width, planes, stride, shortcut)))
            width = planes
    layers = OrderedDict[str, nn.Module]((f"unit{index}", unit) for index, unit in enumerate(units))
    layers["classifier"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
    return nn.Sequential(layers)


def recipe(modules: int, shared: int, iterations: int) -> Recipe:
    """Return the recipe of ResNet-32 in K local modules of equal length, each with its own loss.

    Args:
        modules: K, a divisor of 16.
        shared: number of blocks of the module below that a loss also trains, except under `isolated`.
        iterations: number of updates.
    """
    length = UNITS // modules
    auxiliary = {
        f"aux{index}": AuxiliaryConfig(
            top=f"unit{(index + 1) * length - 1}",
            bottom=f"unit{index * length - shared}" if index * length > shared else None,
            weight=1.0,
            head="auto",
        )
        for index in range(modules - 1)
    }
    plan = PlanConfig(primary=PrimaryConfig(bottom=f"unit{(modules - 1) * length - shared}"), auxiliary=auxiliary)
    base = read_recipe(BASE)
    base = replace(base, network=replace(base.network, width=None), plan=plan)
    values = {
        "name": f"resnet32-k{modules}-shared{shared}",
        "row": f"ResNet-32, K = {modules}, {shared} shared blocks",
        "plan": plan,
        "network.architecture": f"{Path(__file__).resolve()}:resnet32",
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
