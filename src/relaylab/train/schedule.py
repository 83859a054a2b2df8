"""The learning rate as a function of the iteration, and of how often the error has stopped falling."""

import math
from dataclasses import dataclass, replace
from typing import Any

from relaylab.recipes.schema import CosineConfig, DecayConfig, OptimizerConfig, PlateauConfig, StepsConfig


@dataclass(frozen=True, slots=True)
class Plateau:
    """What a plateau schedule has seen.

    Attributes:
        best: the least error so far, in per cent.
        since: evaluations since then.
        drops: how often the rate has fallen.
    """

    best: float = math.inf
    since: int = 0
    drops: int = 0

    def after(self, error: float, patience: int) -> "Plateau":
        """The state after one more evaluation."""
        if error < self.best:
            return replace(self, best=error, since=0)
        if self.since + 1 >= patience:
            return replace(self, since=0, drops=self.drops + 1)
        return replace(self, since=self.since + 1)

    def state_dict(self) -> dict[str, Any]:
        """As plain values; infinity, which JSON lacks, as None."""
        return {"best": None if math.isinf(self.best) else self.best, "since": self.since, "drops": self.drops}

    @staticmethod
    def from_state(state: dict[str, Any]) -> "Plateau":
        """The state that `state_dict` has written."""
        best = math.inf if state["best"] is None else float(state["best"])
        return Plateau(best, int(state["since"]), int(state["drops"]))


def learning_rate(config: OptimizerConfig, iteration: int, drops: int = 0) -> float:
    """The rate of one update.

    Args:
        config: of the optimizer and its schedule.
        iteration: of the update, from 0.
        drops: how often a plateau schedule has seen the error stop falling.
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
