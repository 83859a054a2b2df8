"""Dense evaluation of models A and B, against the evaluation of their windows one by one.

    python -m benchmarks.dense [--quick] [--json FILE]

A 448-pixel image gives a map of 28 x 28 with 225 windows of 14 x 14. Both contenders map its 512 channels to the class
scores of all windows, through the pyramid and three fully connected layers of the paper's size; batch size 1, float32.
The lower bound is the time of the fully connected layers alone, for given features.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Metrics, Target, environment, interleave, parse_arguments, publish, ratio
from relaylab.models.dense import SlidingPyramid
from relaylab.models.layers import classifier
from relaylab.models.pyramid import SpatialPyramid, num_features

BINS, WINDOW, MAP, CHANNELS, CLASSES = (7, 3, 2, 1), 14, 28, 512, 401
TARGETS = {"windows_over_dense": Target(">", 10.0, "with at least two threads; each single window reads all weights")}


def one_by_one(pyramid: nn.Module, last: nn.Module, features: Tensor) -> Tensor:
    """Return the scores (windows, classes), with each window evaluated separately."""
    offsets = range(features.shape[-1] - WINDOW + 1)
    windows = [features[:, :, i : i + WINDOW, j : j + WINDOW] for i in offsets for j in offsets]
    return torch.cat([last(pyramid(window)) for window in windows])


def run(quick: bool) -> Metrics:
    """Return all metrics."""
    torch.manual_seed(0)
    channels, hidden = (64, 512) if quick else (CHANNELS, 4096)
    pyramid = SpatialPyramid(BINS, WINDOW)
    slid, last = SlidingPyramid(pyramid), classifier(num_features(channels, BINS), hidden, CLASSES).eval()
    features = torch.rand(1, channels, MAP, MAP)

    def dense() -> Tensor:
        return last(slid(features).flatten(0, 2))

    with torch.inference_mode():
        torch.testing.assert_close(dense(), one_by_one(pyramid, last, features), rtol=1e-3, atol=1e-3)
        ready = slid(features).flatten(0, 2)
        times = interleave(
            {
                "windows": lambda: one_by_one(pyramid, last, features),
                "dense": dense,
                "bound": lambda: last(ready),
            },
            rounds=5,
            budget_s=20 if quick else 150,
            warmup=1,
        )
    gain, bound = ratio(times["windows"], times["dense"]), ratio(times["dense"], times["bound"])
    return {
        "windows_over_dense": gain.median,
        "windows_over_dense_iqr": gain.iqr,
        "dense_over_bound": bound.median,
        "windows_s": statistics.median(times["windows"]),
        "dense_s": statistics.median(times["dense"]),
        "windows": float(len(ready)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark: print the metrics, and write them to a file if --json is given."""
    arguments = parse_arguments("dense", "Compare dense evaluation with windows one by one.", argv)
    started = time.perf_counter()
    metrics = run(arguments.quick)
    about: dict[str, Any] = environment() | {
        "benchmark": "dense",
        "quick": arguments.quick,
        "threads": torch.get_num_threads(),
        "elapsed_s": round(time.perf_counter() - started, 1),
    }
    publish(metrics, TARGETS, about, arguments.json)


if __name__ == "__main__":
    main()
