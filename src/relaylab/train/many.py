"""Train the runs of a comparison with shared settings, concurrently or one after another."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from relaylab.errors import INTERRUPTED, WRONG_INPUT, InputError
from relaylab.files import available_cores
from relaylab.recipes.schema import Recipe
from relaylab.train import engine, images, jobs, requests, run_folder, storage
from relaylab.train.devices import device_of
from relaylab.train.failures import Failure, read_failure, write_failure
from relaylab.train.options import TrainOptions
from relaylab.train.segments import segments_of
from relaylab.train.tuning import FOLDER


@dataclass(frozen=True)
class Shared:
    """Settings that all runs of a comparison share, so that results do not depend on the number of jobs.

    Attributes:
        images: "memory" or "disk".
        threads: number of PyTorch threads per process; None for the default, on a GPU.
    """

    images: str
    threads: int | None


def shared_by(
    folder: Path, options: TrainOptions, recipe: Recipe, count: int, *, hold_out: float | None = None
) -> Shared:
    """Check the images and the network of a comparison, and return the settings that its runs share.

    If the folder already contains a run, its settings are reused.

    Args:
        folder: folder of the comparison.
        options: the options of one of its runs.
        recipe: recipe of that run.
        count: number of runs.
        hold_out: images of each class to hold out for tuning: a fraction, or a number; None without tuning.

    Raises:
        InputError: the images or the network cannot be trained.
    """
    jobs.start_server()
    files = sorted([*folder.glob(f"*/{run_folder.CONFIG}"), *folder.glob(f"{FOLDER}/*/*/{run_folder.CONFIG}")])
    existing = files[0].parent if files else None
    cores = available_cores()
    segments_of(recipe)  # builds the network, so that an unknown one raises an error before any process starts
    train, val = images.open_sources(options, recipe.images)
    images.check_images(recipe, train, val)
    if hold_out is not None:
        images.check_tuning_images(recipe.images, train, hold_out)
    if existing is not None:
        options = dataclasses.replace(options, images=run_folder.read_run(existing).options.images)
    in_memory = storage.fits_memory(options, (train, val), images.crop_spec_of(recipe), min(cores, count))
    where = "memory" if in_memory else "disk"
    if device_of(options.accelerator).type == "cuda":
        return Shared(where, None)
    threads = min(torch.get_num_threads(), max(1, cores // count))
    starts = run_folder.read_starts(existing) if existing is not None else []
    return Shared(where, min(starts[0]["threads"], cores) if starts else threads)


def train_many(runs: Mapping[str, TrainOptions], shared: Shared, *, at_once: int | None, iterations: int) -> bool:
    """Train the missing runs of a comparison.

    Args:
        runs: the options of each run by name; `out` is its folder. All have the same number of devices.
        shared: settings shared by all runs of the comparison.
        at_once: number of concurrent processes; None for as many as the cores allow, or one with a GPU.
        iterations: iterations of each run.

    Returns:
        False if a signal stopped the runs. A run that failed has `failure.json` in its folder.

    Raises:
        InputError: a run could not start.
    """
    if next(iter(runs.values())).devices > 1:
        return _train_in_turn(runs)
    most = 1 if shared.threads is None else max(1, available_cores() // shared.threads)
    at_once = min(at_once or most, len(runs))
    workers = max(1, available_cores() // at_once)
    complete = {
        name: dataclasses.replace(
            options,
            images=shared.images,
            workers=workers if options.workers is None else options.workers,
            resume="auto",
        )
        for name, options in runs.items()
    }
    return jobs.train_all(complete, jobs=at_once, threads=shared.threads, iterations=iterations)


def _train_in_turn(runs: Mapping[str, TrainOptions]) -> bool:
    """Train one run at a time on several devices, with torchrun; False if a run was stopped."""
    for number, (name, options) in enumerate(runs.items(), 1):
        assert options.out is not None
        print(f"run {number} of {len(runs)}: {name}", file=sys.stderr, flush=True)
        code = engine.launch(options, requests.arguments_of(options))
        if code == INTERRUPTED:
            return False
        if code == WRONG_INPUT:
            raise InputError(f"the run in {options.out} could not start: see the error above")
        if code and read_failure(options.out) is None:
            options.out.mkdir(parents=True, exist_ok=True)
            write_failure(options.out, Failure("failed", 0, f"its processes exited with code {code}"))
    return True


def is_missing(folder: Path) -> bool:
    """Return whether a run has neither finished nor diverged, so that it has to be trained."""
    return not (folder / run_folder.MODEL).is_file() and getattr(read_failure(folder), "kind", None) != "diverged"
