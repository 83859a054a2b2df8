"""Several runs of one comparison: what they share, and their training, at once or one after another."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from relaylab.errors import INTERRUPTED, WRONG_INPUT, InputError
from relaylab.files import available_cores
from relaylab.recipes.schema import Recipe
from relaylab.train import engine, images, jobs, runs
from relaylab.train.failures import Failure, read_failure, write_failure
from relaylab.train.options import TrainConfig
from relaylab.train.segments import segments_of
from relaylab.train.tuning import FOLDER


@dataclass(frozen=True)
class Shared:
    """Settings that all runs of a comparison share, so that no result depends on the number of jobs.

    Attributes:
        images: "memory" or "disk".
        threads: of each process; None for PyTorch's default, on a GPU.
    """

    images: str
    threads: int | None


def shared_by(folder: Path, config: TrainConfig, recipe: Recipe, count: int) -> Shared:
    """Check the images and the network of a comparison, and return what its runs share.

    If the folder holds a run already, also of an earlier command, that run decides.

    Args:
        folder: of the comparison.
        config: the options of one of its runs.
        recipe: of that run.
        count: number of runs.

    Raises:
        InputError: images or a network that cannot be trained.
    """
    jobs.start_server()
    files = sorted([*folder.glob(f"*/{runs.CONFIG}"), *folder.glob(f"{FOLDER}/*/*/{runs.CONFIG}")])
    begun = files[0].parent if files else None
    cores = available_cores()
    segments_of(recipe)  # which builds the network: an unknown one is an error before any process starts
    train, val = images.open_sources(config, recipe.images)
    images.check_images(recipe, train, val)
    if begun is not None:
        config = dataclasses.replace(config, images=runs.read_run(begun).options.images)
    in_memory = images.fits_memory(config, (train, val), images.crop_spec_of(recipe), min(cores, count))
    where = "memory" if in_memory else "disk"
    if config.accelerator != "cpu" and torch.cuda.is_available():
        return Shared(where, None)
    threads = min(torch.get_num_threads(), max(1, cores // count))
    starts = runs.starts_of(begun) if begun is not None else []
    return Shared(where, min(starts[0]["threads"], cores) if starts else threads)


def train_many(configs: Mapping[str, TrainConfig], shared: Shared, *, at_once: int | None, iterations: int) -> bool:
    """Train runs that are missing.

    Args:
        configs: the options of each run by name; `out` is its folder. All have the same number of devices.
        shared: by all runs of the comparison.
        at_once: processes at once; None for as many as the cores allow, or one with a GPU.
        iterations: of each run.

    Returns:
        False if a signal stopped the runs. A run that failed has `failure.json` in its folder.

    Raises:
        InputError: a run could not begin.
    """
    if next(iter(configs.values())).devices > 1:
        return _train_in_turn(configs)
    fitting = 1 if shared.threads is None else max(1, available_cores() // shared.threads)
    at_once = min(at_once or fitting, len(configs))
    workers = max(1, available_cores() // at_once)
    complete = {
        name: dataclasses.replace(
            config, images=shared.images, workers=workers if config.workers is None else config.workers, resume="auto"
        )
        for name, config in configs.items()
    }
    return jobs.train_all(complete, jobs=at_once, threads=shared.threads, iterations=iterations)


def _train_in_turn(configs: Mapping[str, TrainConfig]) -> bool:
    """Train with several devices, whose processes torchrun starts; False if a run was stopped."""
    for number, (name, config) in enumerate(configs.items(), 1):
        assert config.out is not None
        print(f"run {number} of {len(configs)}: {name}", file=sys.stderr, flush=True)
        code = engine.launch(config, runs.arguments_of(config))
        if code == INTERRUPTED:
            return False
        if code == WRONG_INPUT:
            raise InputError(f"the run in {config.out} could not begin: see the error above")
        if code and read_failure(config.out) is None:
            config.out.mkdir(parents=True, exist_ok=True)
            write_failure(config.out, Failure("failed", 0, f"its processes ended with exit code {code}"))
    return True


def is_missing(folder: Path) -> bool:
    """Return whether a run has to be trained: it has neither finished nor diverged."""
    return not (folder / runs.MODEL).is_file() and getattr(read_failure(folder), "kind", None) != "diverged"
