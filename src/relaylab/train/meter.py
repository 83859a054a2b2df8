"""Training metrics: mean losses and errors, images per second, and the share of time spent fetching images.

On a GPU, the time spent fetching a batch overlaps with the execution of the step before, so its share is the upper
bound of the time that the GPU waits for images.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from relaylab.train.metrics import TOP

AVERAGED = 0.9  # weight of the past in the running mean


class Meter:
    """Mean metrics over the steps since the last logged line, and running means for the progress bar.

    Args:
        errors: names of the metrics that are errors; all others are losses.
        shown: names of the errors in the progress bar.
    """

    def __init__(self, errors: Sequence[str] = tuple(TOP), shown: Sequence[str] = tuple(TOP)) -> None:
        self._errors = tuple(errors)
        self._shown = tuple(name for name in errors if name in shown)
        self._seen: dict[str, float] = {}
        self.reset()

    def reset(self) -> None:
        """Start a new line: reset all means."""
        self._sums: dict[str, float] = {}
        self._norms, self._finite, self._steps = 0.0, 0, 0
        self._timed_steps, self._waited, self._began = 0, 0.0, time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Add time that this process spent fetching images."""
        self._waited += seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Exclude the time spent in the block from the throughput."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def count(self, metrics: Mapping[str, float], norm: float) -> None:
        """Add one step: losses and errors (0 to 1) by name, and the gradient norm, which is ignored if infinite."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._seen[name] = AVERAGED * self._seen.get(name, value) + (1 - AVERAGED) * value
        if math.isfinite(norm):
            self._norms += norm
            self._finite += 1
        self._steps += 1
        self._timed_steps += 1

    def values(self, batch_size: int) -> dict[str, Any]:
        """Return the means since the last line; errors in per cent."""
        means = {name: total / self._steps for name, total in self._sums.items()}
        losses = {name: value for name, value in means.items() if name not in self._errors}
        rate, wait = self._speed(batch_size)
        return {
            "loss": losses,
            **{name: 100 * means[name] for name in self._errors},
            "gradient_norm": self._norms / self._finite if self._finite else None,
            "images_per_s": round(rate, 2),
            "data_wait": round(wait, 4),
        }

    def text(self, batch_size: int) -> str:
        """Format the running means in 50 columns, for a progress bar on a terminal of 80."""
        losses = [f"{name} {value:.2f}" for name, value in self._seen.items() if name not in self._errors]
        rate, wait = self._speed(batch_size)
        errors = "/".join(f"{100 * self._seen[name]:.0f}" for name in self._shown)
        errors = f" top-{'/'.join(str(TOP[name]) for name in self._shown)} {errors}" if errors else ""
        return f"{' '.join(losses)}{errors} {rate:.0f} img/s wait {100 * wait:.0f}%"

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of the current line, so that it is the same after resuming; without times."""
        sums = {"sums": self._sums, "norms": self._norms, "finite": self._finite, "steps": self._steps}
        return {**sums, "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the sums of `state_dict`."""
        self.reset()
        self._sums, self._seen = dict(state["sums"]), dict(state["seen"])
        self._norms, self._finite, self._steps = state["norms"], state["finite"], state["steps"]

    def _speed(self, batch_size: int) -> tuple[float, float]:
        elapsed = max(time.perf_counter() - self._began, 1e-9)
        return self._timed_steps * batch_size / elapsed, self._waited / elapsed
