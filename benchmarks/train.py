"""The overhead of our training loop, against a bare PyTorch loop with the same model on images in memory.

    python -m benchmarks.train [--quick] [--json FILE]

torchvision's ResNet-50 with the paper's relay plan, batches of 8 crops of 64 pixels, one thread. Both loops have the
same weights, images, augmentation and optimizer. They are first checked to reach the same parameters, bit for bit;
then they take turns (`benchmarks.measure`). The bare loop is augment, forward, loss, zero_grad, backward, step. Our
loop adds seeds for each step, checks of losses and gradients before the update, and metrics every 20 steps.

| metric                 | description                                                                              |
| ---------------------- | ---------------------------------------------------------------------------------------- |
| `loop_over_bare`       | our images per second over the bare loop's                                               |
| `look_in_steps`        | cost of the gradient statistics of one step, in steps                                    |
| `diagnostics_overhead` | that cost, divided by the default number of steps between gradient statistics            |
| `checkpoint_stall`     | seconds that a checkpoint blocks training, over the seconds of 1,000 steps               |

`*_iqr` and `*_error` are as in `benchmarks.engine`. Each checkpoint is written to disk and verified completely; its
speed is limited by the disk.
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

from benchmarks.measure import Metrics, Target, environment, interleave, keep_memory, parse_arguments, publish, ratio
from relaybackprop import Relay
from relaylab.data.datasets import InMemoryDataset
from relaylab.data.geometry import CropSpec
from relaylab.data.memory import DecodedImages, decoded_statistics
from relaylab.data.sources.classes import Classes
from relaylab.models.building import build_criterion, build_relay
from relaylab.recipes import find_recipe
from relaylab.recipes.schema import Recipe
from relaylab.train.engine import make_fabric
from relaylab.train.images import RunImages
from relaylab.train.loop import Trainer
from relaylab.train.options import TrainOptions
from relaylab.train.records import Records
from relaylab.train.requests import Request
from relaylab.train.seeding import seed_all
from relaylab.train.segments import segments_of
from relaylab.train.session import assemble
from relaylab.train.signals import StopRequest

SEED = 0
SPEC = CropSpec(size=64, short_side=72)
GPU_TOLERANCE = 0.05  # relative to the change of the parameters, since the order of sums varies on a GPU
LOOP_LIMIT, STATISTICS_LIMIT, STALL_LIMIT = 0.97, 0.02, 0.01
STALL_STEPS = 1000


class DifferentTrainingError(RuntimeError):
    """Two loops that train differently, so that their times cannot be compared."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of a benchmark run.

    Attributes:
        device: device of both loops, "cpu" or "cuda".
        precision: precision of both loops, "32" or "bf16".
        recipe: the recipe, with the network for large images.
        crop_spec: crops of the images in memory. The network accepts any size.
        images: number of images in memory.
        check_steps: number of steps after which both loops must have the same parameters.
        steps: number of steps in one measurement of a loop.
        rounds: maximum number of timing rounds.
        loop_budget_s: time limit for comparing the loops, in seconds.
        statistics_budget_s: time limit for comparing steps with and without gradient statistics, in seconds.
        saves: number of checkpoints to write.
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
    statistics_budget_s: float = 80
    saves: int = 7


def settings_of(*, quick: bool) -> Settings:
    """Return the settings of the full benchmark, or of a short one that ends within 50 seconds."""
    recipe = find_recipe("table6-resnet50-relay")
    full = Settings(recipe=replace(recipe, optimizer=replace(recipe.optimizer, batch_size=8)))
    return replace(full, loop_budget_s=18, statistics_budget_s=8, saves=3) if quick else full


class BareLoop:
    """A plain PyTorch training loop on the trainer's images."""

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
        """Run one update."""
        batch = next(self.batches).to(self.device)
        with self.autocast:
            loss = self.criterion(self.relay(self.augment(batch.images, batch.draws)), batch.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class TrainerLoop:
    """Our trainer, step by step. Its records and checkpoints are in `folder`."""

    def __init__(self, settings: Settings, images: RunImages, folder: Path) -> None:
        recipe = settings.recipe
        config = TrainOptions(accelerator=settings.device, precision=settings.precision, seed=SEED)
        request = Request(config, recipe, folder)
        fabric = make_fabric(config)
        self.trainer: Trainer = assemble(fabric, request, images, segments_of(recipe), StopRequest())
        self.trainer.records = Records(folder, 0)
        self.trainer.module.train()
        self.with_statistics, self.without = replace(config, diagnose_every=1), replace(config, diagnose_every=0)

    def step(self) -> None:
        """Run one update without gradient statistics."""
        self.trainer.options = self.without
        self.trainer.step()

    def step_with_statistics(self) -> None:
        """Run one update with gradient statistics."""
        self.trainer.options = self.with_statistics
        self.trainer.step()


def random_images(recipe: Recipe, crop_spec: CropSpec, count: int) -> RunImages:
    """Return random images, in as many classes as the recipe has or as there are images."""
    classes = tuple(f"class {label}" for label in range(min(count, recipe.network.num_classes)))
    generator = torch.Generator().manual_seed(SEED)
    pixels = torch.randint(
        0, 256, (count, crop_spec.short_side, crop_spec.short_side, 3), dtype=torch.uint8, generator=generator
    )
    train_images = InMemoryDataset(DecodedImages(pixels, torch.arange(count) % len(classes), classes), crop_spec)
    val = train_images.subset(np.arange(len(classes), dtype=np.int64))
    identity = Classes.of(classes)
    return RunImages(
        train_images,
        val,
        crop_spec,
        decoded_statistics(train_images.decoded, crop_spec),
        in_memory=True,
        identity=identity,
    )


def check(ours: TrainerLoop, bare: BareLoop, steps: int) -> None:
    """Train both loops and compare all parameters: bit for bit on a CPU, within `GPU_TOLERANCE` on a GPU.

    Raises:
        DifferentTrainingError: a parameter differs, or did not change: two loops that do nothing would agree, too.
    """
    start = {name: parameter.detach().clone() for name, parameter in bare.relay.named_parameters()}
    for _ in range(steps):
        step = ours.trainer.progress.step
        ours.step()
        seed_all(SEED, step, 0)  # dropout as in our loop
        bare.step()
    ours_parameters: dict[str, Tensor] = dict(ours.trainer.relay.named_parameters())
    for name, parameter in bare.relay.named_parameters():
        if bare.device == "cpu" and not torch.equal(parameter, ours_parameters[name]):
            raise DifferentTrainingError(f"{name} differs between the loops after {steps} steps")
        if steps and torch.equal(parameter, start[name]):
            raise DifferentTrainingError(f"{name} did not change in {steps} steps: neither loop trains it")
    bare_parameters = {name: p.detach() for name, p in bare.relay.named_parameters()}
    pairs = [(ours_parameters[name].detach() - p, p - start[name]) for name, p in bare_parameters.items()]
    distance, moved = (torch.nn.utils.get_total_norm(list(each)).item() for each in zip(*pairs, strict=True))
    if not distance <= GPU_TOLERANCE * moved:
        raise DifferentTrainingError(
            f"after {steps} steps the parameters of the loops differ by {distance / moved:.2g} of their change: at "
            f"most {GPU_TOLERANCE} is allowed"
        )


@contextmanager
def loops(settings: Settings) -> Iterator[tuple[TrainerLoop, BareLoop]]:
    """Yield both loops, after a check that they train alike. A temporary folder contains our records."""
    with tempfile.TemporaryDirectory(prefix="relaylab-train-") as folder:
        images = random_images(settings.recipe, settings.crop_spec, settings.images)
        ours, bare = TrainerLoop(settings, images, Path(folder)), BareLoop(settings, images)
        try:
            check(ours, bare, settings.check_steps)
            yield ours, bare
        finally:
            if ours.trainer.records is not None:
                ours.trainer.records.close()


def measure(settings: Settings) -> Metrics:
    """Return all metrics."""
    with loops(settings) as (ours, bare):
        batch, steps = settings.recipe.optimizer.batch_size, settings.steps
        contenders = {
            "bare": lambda: [bare.step() for _ in range(steps)],
            "ours": lambda: [ours.step() for _ in range(steps)],
        }
        times = interleave(contenders, rounds=settings.rounds, budget_s=settings.loop_budget_s, warmup=1)
        result = ratio(times["bare"], times["ours"])
        step_s = statistics.median(times["ours"]) / steps
        metrics: Metrics = {
            "loop_over_bare": result.median,
            "loop_over_bare_iqr": result.iqr,
            "loop_over_bare_error": result.error,
            "images_per_s_ours": batch / step_s,
            "images_per_s_bare": batch * steps / statistics.median(times["bare"]),
            "loop_rounds": result.rounds,
        }
        variants = {"without": ours.step, "with": ours.step_with_statistics}
        times = interleave(variants, rounds=settings.rounds, budget_s=settings.statistics_budget_s, warmup=1)
        result = ratio(times["with"], times["without"])
        interval = TrainOptions().diagnose_every
        metrics |= {
            "look_in_steps": result.median - 1,
            "look_in_steps_error": result.error,
            "diagnostics_overhead": (result.median - 1) / interval,
            "diagnostics_overhead_error": result.error / interval,
            "look_rounds": result.rounds,
        }
        return metrics | _measure_saves(ours.trainer, settings.saves, step_s)


def _measure_saves(trainer: Trainer, count: int, step_s: float) -> Metrics:
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
    "diagnostics_overhead": Target("<", STATISTICS_LIMIT),
    "checkpoint_stall": Target("<", STALL_LIMIT),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark: print the metrics, and write them to a file if --json is given."""
    arguments = parse_arguments("train", "Measure the overhead of our training loop.", argv)
    settings = settings_of(quick=arguments.quick)
    started, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        keeps = keep_memory()
        about: dict[str, Any] = environment()
        metrics = measure(settings)
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
    publish(metrics, TARGETS, about, arguments.json)


if __name__ == "__main__":
    main()
