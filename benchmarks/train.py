"""What our training loop costs, against the same model in a bare PyTorch loop on images in memory.

    python -m benchmarks.train [--quick] [--json FILE]

torchvision's ResNet-50 under the paper's relay plan, batches of 8 crops of 64 pixels, one thread. Both loops have the
same weights, images, augmentation and optimizer, and first have to come to the same parameters, bit by bit; then they
take turns (`benchmarks.measure`). The bare loop is augment, forward, loss, zero_grad, backward, step. Ours adds what
makes a run safe and watched: seeds for each step, losses and gradients looked at before the update, metrics every 20
steps.

| figure                 | what it is                                                                               |
| ---------------------- | ---------------------------------------------------------------------------------------- |
| `loop_over_bare`       | our images per second over the bare loop's                                               |
| `look_in_steps`        | what a look at the gradients costs, in steps                                             |
| `diagnostics_overhead` | that, divided by the default number of steps between two looks                           |
| `checkpoint_stall`     | seconds in which a save holds the training up, over the seconds of 1,000 steps           |

`*_iqr` and `*_error` are as in `benchmarks.engine`. A save is written to the disk and checked in full each time; its
speed is the disk's.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Figures, Target, environment, interleave, keep_memory, parse_arguments, publish, ratio
from relaybackprop import Relay
from relaylab.data.datasets import InMemoryDataset
from relaylab.data.geometry import CropSpec
from relaylab.data.memory import DecodedImages, decoded_statistics
from relaylab.data.sources.classes import Classes
from relaylab.models.building import build_criterion, build_relay
from relaylab.recipes import find_recipe
from relaylab.recipes.schema import Recipe
from relaylab.train import requests
from relaylab.train.engine import make_fabric
from relaylab.train.images import RunImages
from relaylab.train.loop import Trainer
from relaylab.train.options import TrainOptions
from relaylab.train.records import Records
from relaylab.train.seeding import seed_all
from relaylab.train.segments import segments_of
from relaylab.train.session import assemble
from relaylab.train.signals import StopRequest

SEED = 0
SPEC = CropSpec(size=64, short_side=72)
GPU_TOLERANCE = 0.05  # of the way that the parameters have moved: there sums are added in any order
LOOP_LIMIT, LOOKS_LIMIT, STALL_LIMIT = 0.97, 0.02, 0.01
STALL_STEPS = 1000


class DifferentTrainingError(RuntimeError):
    """Two loops that do not train alike: their times cannot be compared."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much to run.

    Attributes:
        device: of both loops; "cpu" or "cuda".
        precision: of both loops; "32" or "bf16".
        recipe: what is trained, with the network as it is for large images.
        crop_spec: crops of the images in memory. The network takes any size.
        images: in memory.
        check_steps: after which both loops have to have the same parameters.
        steps: in one measurement of a loop.
        rounds: of every timing, at most.
        loop_budget_s: stop the comparison of the loops after so long.
        looks_budget_s: stop that of steps with and without a look after so long.
        saves: checkpoints to write.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["32", "bf16"] = "32"
    recipe: Recipe
    crop_spec: CropSpec = SPEC
    images: int = 512
    check_steps: int = 3
    steps: int = 3
    rounds: int = 400
    loop_budget_s: float = 220
    looks_budget_s: float = 80
    saves: int = 7


def settings_of(*, quick: bool) -> Settings:
    """The full benchmark's, or those of one that ends within 50 seconds."""
    recipe = find_recipe("table6-resnet50-relay")
    full = Settings(recipe=replace(recipe, optimizer=replace(recipe.optimizer, batch_size=8)))
    return replace(full, loop_budget_s=18, looks_budget_s=8, saves=3) if quick else full


class Bare:
    """The loop that everybody writes, on the trainer's images."""

    def __init__(self, settings: Settings, images: RunImages) -> None:
        recipe, self.device = settings.recipe, settings.device
        self.autocast = torch.autocast(settings.device, torch.bfloat16, enabled=settings.precision == "bf16")
        torch.manual_seed(SEED)
        self.relay: Relay = build_relay(recipe).to(settings.device, memory_format=torch.channels_last)  # pyright: ignore
        self.criterion = build_criterion(recipe.loss)
        config = recipe.optimizer
        self.optimizer = torch.optim.SGD(
            self.relay.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.augment = images.augmentation(recipe, SEED).to(settings.device)
        sampler = images.sampler(recipe, SEED)
        self.batches = iter(images.train.training(sampler, config.batch_size, SEED))

    def step(self) -> None:
        """One update."""
        batch = next(self.batches).to(self.device)
        with self.autocast:
            loss = self.criterion(self.relay(self.augment(batch.images, batch.draws)), batch.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Ours:
    """Our trainer, step by step; its records and checkpoints are in `folder`."""

    def __init__(self, settings: Settings, images: RunImages, folder: Path) -> None:
        recipe = settings.recipe
        config = TrainOptions(accelerator=settings.device, precision=settings.precision, seed=SEED)
        request = requests.Request(config, recipe, folder)
        fabric = make_fabric(config)
        self.trainer: Trainer = assemble(fabric, request, images, segments_of(recipe), StopRequest())
        self.trainer.records = Records(folder, 0)
        self.trainer.module.train()
        self.batches = iter(self.trainer.stream)
        self.with_looks, self.without = replace(config, diagnose_every=1), replace(config, diagnose_every=0)

    def step(self) -> None:
        """One update without a look at the gradients."""
        self.trainer.options = self.without
        self.trainer.step(self.batches)

    def looking_step(self) -> None:
        """One update with a look."""
        self.trainer.options = self.with_looks
        self.trainer.step(self.batches)


def random_images(recipe: Recipe, crop_spec: CropSpec, count: int) -> RunImages:
    """Noise in as many classes as the recipe has, as far as there are images."""
    classes = tuple(f"class {label}" for label in range(min(count, recipe.network.num_classes)))
    generator = torch.Generator().manual_seed(SEED)
    pixels = torch.randint(
        0, 256, (count, crop_spec.short_side, crop_spec.short_side, 3), dtype=torch.uint8, generator=generator
    )
    dataset = InMemoryDataset(DecodedImages(pixels, torch.arange(count) % len(classes), classes), crop_spec)
    val = dataset.subset(np.arange(len(classes), dtype=np.int64))
    identity = Classes.of(classes)
    return RunImages(
        dataset, val, crop_spec, decoded_statistics(dataset.decoded, crop_spec), in_memory=True, identity=identity
    )


def check(ours: Ours, bare: Bare, steps: int) -> None:
    """Train both for some steps and compare all parameters: bit by bit on a CPU; see `GPU_TOLERANCE`.

    Raises:
        DifferentTrainingError: one differs, or has not moved: two loops that do nothing would be alike too.
    """
    start = {name: parameter.detach().clone() for name, parameter in bare.relay.named_parameters()}
    for _ in range(steps):
        step = ours.trainer.progress.step
        ours.step()
        seed_all(SEED, step, 0)  # dropout as in our loop
        bare.step()
    found: dict[str, Tensor] = dict(ours.trainer.relay.named_parameters())
    for name, parameter in bare.relay.named_parameters():
        if bare.device == "cpu" and not torch.equal(parameter, found[name]):
            raise DifferentTrainingError(f"{name} differs between the loops after {steps} steps")
        if steps and torch.equal(parameter, start[name]):
            raise DifferentTrainingError(f"{name} has not moved in {steps} steps: neither loop trains it")
    other = {name: p.detach() for name, p in bare.relay.named_parameters()}
    pairs = [(found[name].detach() - p, p - start[name]) for name, p in other.items()]
    apart, moved = (torch.nn.utils.get_total_norm(list(each)).item() for each in zip(*pairs, strict=True))
    if not apart <= GPU_TOLERANCE * moved:
        raise DifferentTrainingError(
            f"after {steps} steps the loops are {apart / moved:.2g} of their way apart, more than {GPU_TOLERANCE}"
        )


@contextmanager
def loops(settings: Settings) -> Iterator[tuple[Ours, Bare]]:
    """Both loops, checked, with a folder for ours while they are needed."""
    with tempfile.TemporaryDirectory(prefix="relaylab-train-") as folder:
        images = random_images(settings.recipe, settings.crop_spec, settings.images)
        ours, bare = Ours(settings, images, Path(folder)), Bare(settings, images)
        try:
            check(ours, bare, settings.check_steps)
            yield ours, bare
        finally:
            if ours.trainer.records is not None:
                ours.trainer.records.close()


def measure(settings: Settings) -> Figures:
    """All figures."""
    with loops(settings) as (ours, bare):
        batch, steps = settings.recipe.optimizer.batch_size, settings.steps
        contenders = {
            "bare": lambda: [bare.step() for _ in range(steps)],
            "ours": lambda: [ours.step() for _ in range(steps)],
        }
        times = interleave(contenders, rounds=settings.rounds, budget_s=settings.loop_budget_s, warmup=1)
        found = ratio(times["bare"], times["ours"])
        step_s = statistics.median(times["ours"]) / steps
        figures: Figures = {
            "loop_over_bare": found.median,
            "loop_over_bare_iqr": found.iqr,
            "loop_over_bare_error": found.error,
            "images_per_s_ours": batch / step_s,
            "images_per_s_bare": batch * steps / statistics.median(times["bare"]),
            "loop_rounds": found.rounds,
        }
        looks = {"without": ours.step, "with": ours.looking_step}
        times = interleave(looks, rounds=settings.rounds, budget_s=settings.looks_budget_s, warmup=1)
        found = ratio(times["with"], times["without"])
        every = TrainOptions().diagnose_every
        figures |= {
            "look_in_steps": found.median - 1,
            "look_in_steps_error": found.error,
            "diagnostics_overhead": (found.median - 1) / every,
            "diagnostics_overhead_error": found.error / every,
            "look_rounds": found.rounds,
        }
        return figures | _saves(ours.trainer, settings.saves, step_s)


def _saves(trainer: Trainer, count: int, step_s: float) -> Figures:
    seconds: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        trainer.save()
        seconds.append(time.perf_counter() - began)
    size = sum(file.stat().st_size for file in trainer.checkpoints.glob("*/*"))
    stall = statistics.median(seconds)
    return {
        "checkpoint_stall": stall / (STALL_STEPS * step_s),
        "save_s": stall,
        "save_s_most": max(seconds),
        "save_mb": size / 1e6,
        "save_mb_per_s": size / 1e6 / stall,
    }


TARGETS = {
    "loop_over_bare": Target(">", LOOP_LIMIT),
    "diagnostics_overhead": Target("<", LOOKS_LIMIT),
    "checkpoint_stall": Target("<", STALL_LIMIT),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark: figures and environment to the terminal and, if asked for, to a file."""
    arguments = parse_arguments("train", "What our training loop costs over a bare one.", argv)
    settings = settings_of(quick=arguments.quick)
    started, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        keeps = keep_memory()
        about: dict[str, Any] = environment()
        figures = measure(settings)
    finally:
        torch.set_num_threads(threads)
    about |= {
        "benchmark": "train",
        "quick": arguments.quick,
        "seed": SEED,
        "model": f"{settings.recipe.name}, {settings.crop_spec.size} pixels",
        "batch": settings.recipe.optimizer.batch_size,
        "looks_every": TrainOptions().diagnose_every,
        "keeps_memory": keeps,
        "elapsed_s": round(time.perf_counter() - started, 1),
    }
    publish(figures, TARGETS, about, arguments.json)


if __name__ == "__main__":
    main()
