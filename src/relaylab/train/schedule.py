"""Learning rate schedules."""

import math
from dataclasses import dataclass, replace

from relaylab.recipes.schema import CosineConfig, DecayConfig, OptimizerConfig, PlateauConfig, StepsConfig


@dataclass(frozen=True, slots=True)
class Plateau:
    """The state of a plateau schedule.

    Attributes:
        best: the lowest error so far, in per cent; None before the first evaluation.
        since: number of evaluations since then.
        drops: number of times the rate was lowered.
    """

    best: float | None = None
    since: int = 0
    drops: int = 0

    def after(self, error: float, patience: int) -> "Plateau":
        """Return the state after one more evaluation."""
        if self.best is None or error < self.best:
            return replace(self, best=error, since=0)
        if self.since + 1 >= patience:
            return replace(self, since=0, drops=self.drops + 1)
        return replace(self, since=self.since + 1)


def learning_rate(config: OptimizerConfig, iteration: int, drops: int = 0) -> float:
    """Return the learning rate of an iteration, counted from 0.

    Args:
        config: the optimizer's settings, which include the schedule.
        iteration: index of the update.
        drops: for a plateau schedule, the number of times the rate was lowered.
    """
    schedule, progress = config.schedule, iteration / config.iterations
    match schedule:
        case PlateauConfig():
            share = max(schedule.factor**drops, schedule.least)
        case StepsConfig():
            share = schedule.factor ** sum(progress >= at for at in schedule.at)
        case DecayConfig():
            share = schedule.factor ** (iteration // schedule.every)
        case CosineConfig():
            share = schedule.least + (1 - schedule.least) * (1 + math.cos(math.pi * progress)) / 2
    warm = min(1.0, (iteration + 1) / config.warmup) if config.warmup else 1.0
    return config.lr * share * warm
