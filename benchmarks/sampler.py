"""Class-aware sampling at the size of Places2, against the way it is usually done.

    python -m benchmarks.sampler [--quick] [--json FILE]

8.1 million synthetic labels in 401 classes of 4,000 to 30,000 images (scaled), as the paper describes Places2. The
contender is the algorithm of mmdetection's ClassAwareSampler, written anew: each epoch it lays out, on every rank, the
whole epoch's indices from reshuffled lists, and gives a rank a contiguous slice. The lists start afresh every epoch.

`draws_per_s` counts draws that come out of the sampler's iterator as Python integers, on one core. Memory is private
(USS), measured in a process of its own that holds the labels already. Distinct classes are those of a global batch of
256 over 8 ranks, averaged over 401 consecutive batches.
"""

import itertools
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks.measure import Figures, Target, environment, parse_arguments, publish
from relaylab.data.sampling import ClassAwareSampler, ShuffledSampler, SquareRootSampler

IMAGES, CLASSES = 8_100_000, 401
BATCH, RANKS, BATCHES = 256, 8, 401
TARGETS = {
    "draws_per_s": Target(">", 5e6, "on one core"),
    "private_mb": Target("<", 100.0, "at 8.1 M images"),
    "distinct_classes_per_batch": Target(">", 238.0, "expected: 238.6"),
    "resume_ms": Target("<", 50.0, "to the first draw, from a new sampler's state"),
}


def make_labels() -> NDArray[np.int16]:
    """Labels sorted by class, the classes' sizes spread evenly from 4 to 30 parts."""
    sizes = np.random.default_rng(0).integers(4_000, 30_000, CLASSES)
    ends = np.rint(np.cumsum(sizes) / sizes.sum() * IMAGES).astype(np.int64)
    return np.repeat(np.arange(CLASSES, dtype=np.int16), np.diff(ends, prepend=0))


class EpochIndex:
    """mmdetection's algorithm: an epoch's indices are laid out in advance, and each rank has a contiguous slice.

    Args:
        labels: of all images.
        rank: of this process.
        seed: of the epoch.
    """

    def __init__(self, labels: NDArray[Any], rank: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        by_class = [np.flatnonzero(labels == label).tolist() for label in range(CLASSES)]
        class_list, lists = _endless(list(range(CLASSES)), random), [_endless(images, random) for images in by_class]
        indices = [next(lists[next(class_list)]) for _ in range(len(labels))]
        each = len(labels) // RANKS
        self.indices = indices[rank * each : (rank + 1) * each]


def _endless(items: list[int], random: np.random.Generator) -> Iterator[int]:
    """The paper's list: shuffled anew whenever it runs out."""
    while True:
        for place in random.permutation(len(items)):
            yield items[place]


def measure_speed(labels: NDArray[np.int16], draws: int, rounds: int) -> Figures:
    """Draws per second of each sampler, iterated; the kinds take turns."""
    samplers = {
        "draws_per_s": ClassAwareSampler(labels),
        "square_root_draws_per_s": SquareRootSampler(labels),
        "shuffled_draws_per_s": ShuffledSampler(labels),
    }
    speeds: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sampler in samplers.items():
            begun = time.perf_counter()
            deque(itertools.islice(sampler, draws), maxlen=0)
            speeds[name].append(draws / (time.perf_counter() - begun))
    return {name: statistics.median(values) for name, values in speeds.items()}


def measure_resume(labels: NDArray[np.int16], rounds: int = 20) -> Figures:
    """Milliseconds from a state to the first draw, far into training: draw 800,000 x 256."""
    state = ClassAwareSampler(labels).state_dict() | {"draw": 800_000 * BATCH}
    sampler, times = ClassAwareSampler(labels), list[float]()
    for number in range(rounds):
        begun = time.perf_counter()
        sampler.load_state_dict(state | {"draw": state["draw"] + number})
        next(iter(sampler))
        times.append(1e3 * (time.perf_counter() - begun))
    return {"resume_ms": statistics.median(times)}


def distinct_classes(labels: NDArray[np.int16], draws_of_rank: list[NDArray[np.int64]]) -> float:
    """The mean number of distinct classes in a global batch.

    Args:
        labels: of all images.
        draws_of_rank: for each rank, the images of its parts of the batches, one after another.
    """
    each = BATCH // RANKS
    batches = np.concatenate([labels[draws].reshape(-1, each) for draws in draws_of_rank], axis=1)
    return float(np.mean([len(np.unique(batch)) for batch in batches]))


def measure_batches(labels: NDArray[np.int16]) -> Figures:
    """Ours and, from the same stream, what contiguous slices of an epoch for each rank would give."""
    each, whole = BATCH // RANKS, ClassAwareSampler(labels)
    interleaved = [ClassAwareSampler(labels, rank=rank, num_replicas=RANKS) for rank in range(RANKS)]
    ours = [sampler.draw(sampler.global_draws(0, BATCHES * each)) for sampler in interleaved]
    slices = [whole.draw(np.arange(BATCHES * each) + rank * (IMAGES // RANKS)) for rank in range(RANKS)]
    return {
        "distinct_classes_per_batch": distinct_classes(labels, ours),
        "distinct_classes_per_batch_contiguous": distinct_classes(labels, slices),
    }


def measure_build(contender: str) -> Figures:
    """Seconds and private megabytes of one sampler, in this process: run it in a fresh one."""
    labels, process = make_labels(), psutil.Process()
    before, begun = process.memory_full_info().uss, time.perf_counter()
    built = ClassAwareSampler(labels) if contender == "ours" else EpochIndex(labels, rank=0, seed=0)
    seconds, after = time.perf_counter() - begun, process.memory_full_info().uss
    assert built is not None, "alive while its memory is measured"
    return {"s": seconds, "mb": (after - before) / 1e6}


def in_fresh_process(contender: str) -> Figures:
    """`measure_build` where nothing else has left memory behind."""
    code = f"from benchmarks.sampler import measure_build as m; f = m({contender!r}); print(f['s'], f['mb'])"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    seconds, megabytes = map(float, output.split())
    return {"s": seconds, "mb": megabytes}


def run(quick: bool) -> Figures:
    """All figures."""
    labels = make_labels()
    builds = [in_fresh_process("ours") for _ in range(3)]
    theirs = in_fresh_process("theirs")
    return {
        **measure_speed(labels, 500_000 if quick else 2_000_000, 5 if quick else 15),
        "index_build_s": statistics.median(build["s"] for build in builds),
        "private_mb": statistics.median(build["mb"] for build in builds),
        **measure_resume(labels),
        **measure_batches(labels),
        "epoch_index_build_s": theirs["s"],
        "epoch_index_private_mb": theirs["mb"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark: figures and environment to the terminal and, if asked for, to a file."""
    arguments = parse_arguments("sampler", "Class-aware sampling at the size of Places2.", argv)
    started = time.perf_counter()
    figures = run(arguments.quick)
    about: dict[str, Any] = environment() | {
        "benchmark": "sampler",
        "quick": arguments.quick,
        "labels": f"{IMAGES:,} images in {CLASSES} classes, sorted by class",
        "elapsed_s": round(time.perf_counter() - started, 1),
    }
    publish(figures, TARGETS, about, arguments.json)


if __name__ == "__main__":
    main()
