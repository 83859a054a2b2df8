"""Sizes and repetitions: on a GPU, and on a CPU to test the script."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import nn
from torchvision.models import VisionTransformer, resnet152, vit_l_16
from torchvision.models.resnet import Bottleneck, ResNet

from benchmarks import formulations
from benchmarks.networks import Workload, residual, without_dropout
from experiments.second.windows import PUBLISHED
from relaylab.recipes import find_recipe
from relaylab.recipes.scales import at_scale
from relaylab.recipes.schema import Recipe, changed

CLASSES = 1000
Build = Callable[[int, int, int, str], Workload]
"""Builds a workload from the side of the images, the batch size, the width of models A and B, and the device."""


@dataclass(frozen=True, kw_only=True)
class Deep:
    """A deep network for A2.

    Attributes:
        build: function that returns the network for images of a given side.
        ends: for each number of branches, the blocks that the heads follow. The blocks between two ends, and below and
            above them, save about the same number of bytes for the backward pass.
    """

    build: Callable[[int], nn.Module]
    ends: Mapping[int, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of a run.

    Attributes:
        pixels: side of the images (A1, A2).
        width: filters of the first segment of models A and B; 64 in the paper.
        networks: networks of A1.
        batch: batch size of A1; None for one that fills a third of the GPU's memory.
        max_images: maximum batch size.
        small: batch sizes whose peaks predict the largest one (A2).
        rounds: maximum number of timing rounds.
        budget_s: time limit for timing one network, in seconds.
        deep: networks of A2.
        capacity: bytes that A2 may allocate; None for the whole memory of the GPU.
        recipe: recipe of A3.
        side: shorter side of the images (A3).
        images: number of images in memory (A3).
        files: number of images on disk (A3).
        steps: number of steps in one measurement (A3).
        workers: number of worker processes that decode images.
        compiled: networks to compile.
        compile_s: time limit for one compiled network, in seconds.
        backend: backend of torch.compile.
        tests_s: time limit for A4, in seconds.
        windows: numbers of windows (B1).
        shared: numbers of shared blocks (B1).
        places: recipes of B2.
        rates: learning rates for `--tune`, by entry.
        gains: other values for `--tune`, by entry.
        iterations: number of updates of each run (B).
        jobs: number of concurrent runs (B).
        seeds: seeds (B).
        schemes: schemes of B, by entry. In B1, only the first number of shared blocks has schemes other than relay.
        changes: changes of the recipes of B, by entry.
    """

    pixels: int = 224
    width: int = 64
    networks: Mapping[str, Build]
    batch: int | None = None
    max_images: int = 2048
    small: tuple[int, int] = (8, 16)
    rounds: int = 30
    budget_s: float = 15
    deep: Mapping[str, Deep]
    capacity: int | None = None
    recipe: Recipe
    side: int = 256
    images: int = 4096
    files: int = 400
    steps: int = 10
    workers: int = 16
    compiled: tuple[str, ...]
    compile_s: float = 120
    backend: str = "inductor"
    tests_s: float = 60
    windows: tuple[int, ...] = (4, 8, 15)
    shared: tuple[int, ...] = (1, 2)
    places: tuple[str, ...] = ("model-a", "model-b")
    rates: Mapping[str, str] = field(default_factory=lambda: {"B1": "0.05,0.1,0.2", "B2": "0.005,0.01,0.02"})
    gains: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    iterations: int = 1000
    jobs: int = 6
    seeds: str = "0,1,2"
    schemes: Mapping[str, str] = field(
        default_factory=lambda: {"B1": "standard,relay,isolated", "B2": "standard,multi-loss,relay,isolated"}
    )
    changes: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])


def _vit_l(pixels: int) -> nn.Module:
    return vit_l_16(image_size=pixels, num_classes=CLASSES)


def _resnet152(_pixels: int) -> nn.Module:
    return resnet152(num_classes=CLASSES)


def _small_resnet(_pixels: int) -> nn.Module:
    return ResNet(Bottleneck, [2, 2, 2, 1], num_classes=CLASSES, width_per_group=4)


def _small_vit(pixels: int) -> nn.Module:
    return VisionTransformer(pixels, 16, 6, 2, 32, 64, num_classes=CLASSES)


def _small_transformer(pixels: int, batch: int, _width: int, device: str) -> Workload:
    return formulations.transformer(2, 32, 16, pixels, batch, device)


def _small_residual(pixels: int, batch: int, _width: int, device: str) -> Workload:
    build = partial(ResNet, Bottleneck, [1, 1, 5, 1], width_per_group=4)
    return without_dropout(residual(build, pixels, batch, device=device))


def _after(*blocks: int) -> tuple[str, ...]:
    return tuple(f"encoder.layers.encoder_layer_{block}" for block in blocks)


NETWORKS: Mapping[str, Build] = {
    "resnet50": formulations.resnet50,
    "model_a": formulations.places_a,
    "model_b": formulations.places_b,
    "vit_b": formulations.vit_b,
}
GPU = Settings(
    networks=NETWORKS,
    deep={
        "resnet152": Deep(
            build=_resnet152,
            ends={2: ("layer2.2", "layer3.13"), 4: ("layer1.1", "layer2.4", "layer3.7", "layer3.21")},
        ),
        "vit_l": Deep(build=_vit_l, ends={2: _after(7, 15), 4: _after(4, 9, 14, 19)}),
    },
    recipe=changed(find_recipe("table6-resnet50-relay"), "one card", {"optimizer.batch_size": 256}),
    compiled=("resnet50", "vit_b"),
    gains={"B2": ("*.gain=he,quiet",)},
    changes={
        "B1": ("optimizer.warmup=100", *PUBLISHED),
        "B2": (
            "optimizer.warmup=100",
            "network.width=64",
            "network.image_size=64",
            "network.pyramid=4,2,1",
            "images.short_side=72",
            "evaluation.scales=72",
        ),
    },
)
TINY = Settings(
    pixels=112,  # the pyramids of models A and B need a map of 7 pixels
    width=2,
    networks={**NETWORKS, "resnet50": _small_residual, "vit_b": _small_transformer},
    batch=2,
    max_images=8,
    small=(1, 2),
    rounds=2,
    budget_s=0,
    deep={
        "small_resnet": Deep(
            build=_small_resnet, ends={2: ("layer1.1", "layer2.1"), 4: ("layer1.0", "layer1.1", "layer2.0", "layer2.1")}
        ),
        "small_vit": Deep(build=_small_vit, ends={2: _after(1, 3), 4: _after(0, 1, 2, 3)}),
    },
    capacity=60_000_000,
    recipe=changed(at_scale(find_recipe("table3-model-a-relay"), "tiny"), "tiny", {"optimizer.iterations": 1000}),
    side=36,
    images=20,
    files=20,
    steps=2,
    workers=2,
    compiled=("vit_b",),
    backend="aot_eager",
    windows=(4,),
    shared=(1,),
    places=("model-a",),
    rates=dict.fromkeys(("B1", "B2"), "0.001,0.003,0.01"),
    iterations=2,
    jobs=2,
    seeds="0",
    schemes=dict.fromkeys(("B1", "B2"), "standard,relay"),
    changes=dict.fromkeys(("B1", "B2"), ("network.num_classes=5", "optimizer.batch_size=4", "optimizer.warmup=0")),
)
SIZES = {"gpu": GPU, "tiny": TINY}
