"""From the arms of the studies to runs of the trainer: each may be stopped and goes on, and several can take turns."""

import fcntl
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.studies import (
    ARMS,
    EVALUATIONS,
    ITERATIONS,
    PYRAMID,
    RATES,
    SELECTION,
    SELECTION_SEED,
    SHARED,
    WIDTH,
    Size,
)
from relaylab.errors import InputError, NonFiniteLossError
from relaylab.files import write_text
from relaylab.models.building import NETWORKS
from relaylab.recipes import find_recipe
from relaylab.recipes.schema import Recipe
from relaylab.train import runs, session
from relaylab.train.options import TrainConfig
from relaylab.train.records import read_metrics

FAILED = "failed.txt"  # beside the checkpoints of a run whose loss was not finite: that is its result
TESTED = "tested.json"  # what a run's network has been found to do; see experiments.testing
WAIT_S = 10.0  # for rates that another process is choosing


class NotChosenError(InputError):
    """A learning rate depends on runs that are not done yet."""

    def __init__(self, arm: str) -> None:
        super().__init__(f"{arm} decides about a learning rate and is not done: train the group {SELECTION} first")


@dataclass(frozen=True)
class Result:
    """The validations of a finished run.

    Attributes:
        scheme: that trained it.
        seed: of weights, batches, crops and dropout.
        validations: step, top1, top5 and loss, in their order.
    """

    scheme: str
    seed: int
    validations: tuple[Mapping[str, float], ...]

    @property
    def last(self) -> Mapping[str, float]:
        """The validation at the end of training."""
        return self.validations[-1]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where runs are made, and how.

    Attributes:
        size: of everything.
        out: folder of the runs.
        data: training and validation images.
        precision: of the arithmetic, as `relaylab train` has it.
    """

    size: Size
    out: Path
    data: tuple[Path, ...]
    precision: str = "bf16"


@dataclass(frozen=True)
class Run:
    """One arm under one seed.

    Attributes:
        arm: its name.
        seed: of weights, batches, crops and dropout.
        config: that trains it.
        iterations: after which it is done.
    """

    arm: str
    seed: int
    config: TrainConfig
    iterations: int

    @property
    def folder(self) -> Path:
        """Of the run."""
        assert self.config.out is not None
        return self.config.out

    @property
    def failed(self) -> bool:
        """Whether its loss was not finite."""
        return (self.folder / FAILED).exists()

    @property
    def is_done(self) -> bool:
        """Whether it has come to its end, or failed."""
        return self.failed or self.result is not None

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Its metrics so far."""
        file = self.folder / runs.METRICS
        return read_metrics(file) if file.is_file() else []

    @property
    def result(self) -> Result | None:
        """What it has found; None if it is not done."""
        if not any((self.folder / name).is_file() for name in (runs.MODEL, TESTED)):
            return None
        return result_of(self.folder, self.iterations, ARMS[self.arm].scheme, self.seed)


def result_of(folder: Path, iterations: int, scheme: str, seed: int) -> Result | None:
    """Return the result of a run, or None if its metrics do not reach its last iteration."""
    if not (folder / runs.METRICS).is_file():
        return None
    found = [line for line in read_metrics(folder / runs.METRICS) if line["kind"] == "val"]
    if not found or found[-1]["step"] != iterations:
        return None
    names = ("step", "top1", "top5", "loss")
    return Result(scheme, seed, tuple({name: line[name] for name in names} for line in found))


def run_of(name: str, seed: int, place: Place) -> Run:
    """How an arm is trained.

    Args:
        name: of the arm.
        seed: one of its seeds.
        place: where.

    Raises:
        NotChosenError: its learning rate depends on runs that are not done yet.
    """
    arm = ARMS[name]
    share = arm.length * (arm.length_at_32px if place.size == "32px" else 1)
    iterations = round(ITERATIONS[place.size] * share)
    rate = chosen_rate(arm.scheme, place) if arm.rate is None else arm.rate
    changes = {
        f"scheme={arm.scheme}",
        f"optimizer.lr={rate:g}",
        f"optimizer.iterations={iterations}",
        f"optimizer.evaluate_every={max(1, iterations // EVALUATIONS)}",
        *_sizes(find_recipe(arm.recipe), place.size),
        *SHARED[place.size],
        *arm.changes,
    }
    config = TrainConfig(
        recipe=arm.recipe,
        scale="small",
        changes=tuple(sorted(changes)),
        data=place.data,
        seed=seed,
        out=place.out / f"{name}-s{seed}",
        resume="auto",
        precision=place.precision,  # pyright: ignore[reportArgumentType]
        diagnose_every=max(1, iterations // (2 * EVALUATIONS)),
        log_every=max(1, iterations // 240),
    )
    return Run(name, seed, config, iterations)


def _sizes(recipe: Recipe, size: Size) -> Iterator[str]:
    if "width" in NETWORKS[recipe.network.architecture].options:
        yield f"network.width={WIDTH[size]}"
    if recipe.network.pyramid is not None:
        yield f"network.pyramid={PYRAMID[size]}"


def chosen_rate(scheme: str, place: Place) -> float:
    """The learning rate under which a scheme has the least top-1 error on the images that were set aside.

    Raises:
        NotChosenError: the runs that decide about it are not done.
    """
    errors: dict[float, float] = {}
    for rate in RATES:
        run = run_of(f"{SELECTION}/{scheme}-{rate:g}", SELECTION_SEED, place)
        if run.result is not None:
            errors[rate] = run.result.last["top1"]
        elif not run.failed:
            raise NotChosenError(run.arm)
    if not errors:
        raise InputError(f"{scheme} failed under all learning rates: give it smaller ones")
    return min(errors, key=lambda rate: errors[rate])


def keys_of(groups: Sequence[str]) -> list[tuple[str, int]]:
    """Arms and seeds in the order in which they are run: group by group, and in a group seed by seed.

    Args:
        groups: what stands before the slash in the arms' names.
    """
    keys: list[tuple[str, int]] = []
    for group in groups:
        own = [name for name in ARMS if name.partition("/")[0] == group]
        seeds = sorted({seed for name in own for seed in ARMS[name].seeds})
        keys += [(name, seed) for seed in seeds for name in own if seed in ARMS[name].seeds]
    return keys


def begun_runs(place: Place) -> list[Run]:
    """The runs that have been validated at least once, or have failed, in the order of `ARMS`."""
    found: list[Run] = []
    for name, arm in ARMS.items():
        for seed in arm.seeds:
            with suppress(InputError):  # without a learning rate nothing has begun
                run = run_of(name, seed, place)
                if run.failed or any(line["kind"] == "val" for line in run.lines):
                    found.append(run)
    return found


def train_missing(groups: Sequence[str], place: Place) -> bool:
    """Train what is not done yet and what no other process is training.

    Args:
        groups: of arms.
        place: where.

    Returns:
        Whether all has been trained, and not interrupted.

    Raises:
        InputError: what is wrong with the images.
    """
    keys = keys_of(groups)
    while True:
        waiting = False
        for number, key in enumerate(keys, 1):
            with claimed(key, place) as mine:
                if not mine:
                    continue
                try:
                    run = run_of(*key, place)
                except NotChosenError:
                    waiting = True
                    break
                if run.is_done:
                    continue
                print(f"run {number} of {len(keys)}: {key[0]}, seed {key[1]}", flush=True)
                try:
                    if session.train(runs.understand(run.config)).interrupted:
                        return False
                except NonFiniteLossError as error:
                    write_text(run.folder / FAILED, f"{error}\n")
        if not waiting:
            return True
        time.sleep(WAIT_S)


@contextmanager
def claimed(key: tuple[str, int], place: Place) -> Iterator[bool]:
    """Whether this process may train an arm under a seed; others may not then, until it is through or has died."""
    place.out.mkdir(parents=True, exist_ok=True)
    with (place.out / f".{key[0].replace('/', '-')}-s{key[1]}.lock").open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
