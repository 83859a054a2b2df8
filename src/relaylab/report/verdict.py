"""The verdict of a comparison: for each pair of methods, the paired difference over seeds with its interval."""

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from relaylab.recipes.schema import SCHEME_NAMES
from relaylab.train.metrics import is_at_chance

CONFIDENCE = 0.95
RELEVANT = 1.0  # points of error; methods are equivalent if the interval is within plus or minus this value
MOST_SEEDS = 100
DISTURBED = 1.5  # ratio of time to FLOPs beyond which times are not reported
NOT_LEARNT = "all runs are at chance level: train longer or change the learning rate"
PAIRS = (
    ("relay", "standard"),
    ("relay", "multi_loss"),
    ("multi_loss", "standard"),
    ("isolated", "relay"),
    ("isolated", "standard"),
    ("isolated", "multi_loss"),
)
PLURAL = ("isolated",)  # schemes with plural names
TREATMENTS = ("relay", "isolated", "multi_loss")  # by priority
Errors = Mapping[int, float | None]  # by seed; None where the run failed
Decision = Literal["better", "worse", "equal", "undecided", "one seed", "no verdict"]


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of training by one method.

    Attributes:
        seconds: time of a run's updates, mean over seeds; None if not recorded.
        flops: FLOPs of a training step, relative to standard BP; None if unknown.
        memory: predicted peak memory of a training step, relative to standard BP; None if unknown.
    """

    seconds: float | None = None
    flops: float | None = None
    memory: float | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference between two methods' errors.

    Attributes:
        ours: scheme.
        base: baseline scheme.
        values: error of `ours` minus that of `base`, in points, for each seed that both have finished.
        at_chance: whether all finished runs of both are at chance level.
    """

    ours: str
    base: str
    values: tuple[float, ...]
    at_chance: bool = False

    @property
    def decision(self) -> Decision:
        """The conclusion from the interval; "equal" if it is within plus or minus `RELEVANT` points.

        "no verdict" if no run has learnt anything, since equal errors then say nothing about the methods.
        """
        if self.at_chance:
            return "no verdict"
        ends = interval(self.values)
        if ends is None:
            return "one seed"
        if (ends[0] > 0 or ends[1] < 0) and round(statistics.fmean(self.values), 2):
            return "better" if ends[1] < 0 else "worse"
        return "equal" if max(-ends[0], ends[1]) < RELEVANT else "undecided"

    @property
    def seeds_needed(self) -> int | None:
        """The number of seeds needed for a decision, given this mean and spread; None for more than `MOST_SEEDS`."""
        mean, spread = abs(statistics.fmean(self.values)), statistics.stdev(self.values)
        wanted = max(mean, RELEVANT - mean)
        counts = range(len(self.values) + 1, MOST_SEEDS + 1)
        return next((n for n in counts if stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * spread / n**0.5 < wanted), None)

    @property
    def text(self) -> str:
        """The conclusion in one sentence, without a full stop."""
        ours, base = _capital(SCHEME_NAMES[self.ours]), SCHEME_NAMES[self.base]
        verb = "are" if self.ours in PLURAL else "is"
        mean, ends = statistics.fmean(self.values), interval(self.values)
        size = range_text(abs(mean), ends and ((-ends[1], -ends[0]) if mean < 0 else ends))
        match self.decision:
            case "no verdict":
                return f"{ours} vs {base}: no verdict; {NOT_LEARNT}"
            case "better" | "worse":
                return f"{ours} {verb} {self.decision} than {base} by {size} points"
            case "equal":
                most = max(map(abs, ends or (0.0,)))
                return f"{ours} and {base}: difference of at most {most:.2f} points ({difference_text(self.values)})"
            case "undecided":
                needed = self.seeds_needed
                seeds = f"{needed}" if needed else f"more than {MOST_SEEDS:,}"
                word = "better" if mean < 0 else "worse"
                return f"{ours} vs {base}: inconclusive ({word} by {size} points); {seeds} seeds needed"
            case "one seed":
                word = "better" if mean < 0 else "worse"
                seen = f"{word} by {size} points" if round(mean, 2) else "no difference"
                return f"{ours} vs {base}: {seen} with one seed, which may be noise; use several, such as --seeds 0,1,2"


def paired_differences(ours: Errors, base: Errors) -> list[float]:
    """Return the differences between two methods for each seed that both have finished."""
    pairs = ((value, base.get(seed)) for seed, value in ours.items())
    return [value - other for value, other in pairs if value is not None and other is not None]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the confidence interval of the mean (Student's t), or None for fewer than two values."""
    if len(values) < 2:
        return None
    mean, error = statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return mean - half, mean + half


def mean_text(values: Sequence[float]) -> str:
    """Format a mean over seeds, with the standard deviation if there are several."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def range_text(mean: float, ends: tuple[float, float] | None) -> str:
    """Format an unsigned mean, with its interval."""
    mean, *rest = (round(value, 2) + 0.0 for value in (mean, *(ends or ())))  # adding 0.0 turns -0.00 into 0.00
    return f"{mean:.2f} [{rest[0]:.2f}, {rest[1]:.2f}]" if rest else f"{mean:.2f}"


def difference_text(values: Sequence[float]) -> str:
    """Format the mean of paired differences, with its confidence interval."""
    if not values:
        return "no seed in common"
    mean, *ends = (
        round(value, 2) + 0.0 for value in (statistics.fmean(values), *(interval(values) or ()))
    )  # adding 0.0 turns -0.00 into 0.00
    return f"{mean:+.2f} [{ends[0]:+.2f}, {ends[1]:+.2f}]" if ends else f"{mean:+.2f} (one seed)"


def compared_scheme(schemes: Collection[str]) -> str | None:
    """Return the scheme that a comparison evaluates against the others; None if there is only one scheme."""
    return next((scheme for scheme in TREATMENTS if scheme in schemes and len(schemes) > 1), None)


def differences(results: Mapping[str, Errors], guess: float) -> list[Difference]:
    """Return the differences of all pairs of methods with a seed in common.

    Isolated windows are compared with Relay BP, and with the others only if there is no Relay BP.

    Args:
        results: errors by scheme and seed, in per cent.
        guess: chance level of the error.
    """
    pairs: list[Difference] = []
    for ours, base in PAIRS:
        if ours == "isolated" and base != "relay" and "relay" in results:
            continue
        values = paired_differences(results.get(ours, {}), results.get(base, {}))
        finished = [value for scheme in (ours, base) for value in results.get(scheme, {}).values() if value is not None]
        at_chance = all(is_at_chance(value, guess) for value in finished)
        pairs += [Difference(ours, base, tuple(values), at_chance)] if values else []
    return pairs


def verdict(
    results: Mapping[str, Errors],
    guess: float,
    costs: Mapping[str, Cost] | None = None,
    *,
    error: str = "per cent of top-1 error",
) -> list[str]:
    """Return the verdict of a comparison, in sentences.

    Args:
        results: errors by scheme and seed, in per cent.
        guess: chance level of the error.
        costs: costs by scheme.
        error: unit of the errors.
    """
    pairs = differences(results, guess)
    if not pairs:
        finished = [
            SCHEME_NAMES[scheme] for scheme, by_seed in results.items() if any(v is not None for v in by_seed.values())
        ]
        reason = "have no seed in common" if len(finished) > 1 else "is the only finished method"
        subject = " and ".join(finished)
        text = f"No verdict: {subject} {reason}." if finished else "No verdict: no method has finished."
        return [text, *_failed(results)]
    lines = [f"{pair.text}.{_cost_text(pair, costs or {})}" for pair in pairs]
    counts = sorted({len(pair.values) for pair in pairs if len(pair.values) > 1}, reverse=True)
    basis = (
        [f"{100 * CONFIDENCE:.0f} % confidence intervals over {' and '.join(map(str, counts))} paired seeds (t)"]
        if counts
        else []
    )
    lines.append(f"Points are {error}; {'; '.join([*basis, f'chance level {guess:.2f} %'])}.")
    return [*lines, *_not_learnt(results, guess), *_failed(results)]


def _cost_text(pair: Difference, costs: Mapping[str, Cost]) -> str:
    """Format the cost of a method relative to its baseline."""
    parts: list[str] = []
    ours, base = (costs.get(scheme, Cost()) for scheme in (pair.ours, pair.base))
    for name, unit in (("seconds", "training time"), ("flops", "FLOPs"), ("memory", "peak memory")):
        own, other = getattr(ours, name), getattr(base, name)
        if own and other and not (name == "seconds" and _is_disturbed(ours, base)):
            parts.append(f"{own / other:.2f} x the {unit}")
    if not parts:
        return ""
    listed = f"{', '.join(parts[:-1])}{' and ' if parts[1:] else ''}{parts[-1]}"
    return f" {_capital(SCHEME_NAMES[pair.ours])} take{'' if pair.ours in PLURAL else 's'} {listed}."


def _is_disturbed(one: Cost, other: Cost) -> bool:
    """Return whether times differ much more than FLOPs, which suggests that other processes slowed some runs."""
    if not (one.seconds and other.seconds and one.flops and other.flops):
        return False
    ratio = one.seconds / other.seconds / (one.flops / other.flops)
    return not 1 / DISTURBED < ratio < DISTURBED


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _not_learnt(results: Mapping[str, Errors], guess: float) -> list[str]:
    """Report the runs at chance level."""
    lost = {
        scheme: sum(v is not None and is_at_chance(v, guess) for v in by_seed.values())
        for scheme, by_seed in results.items()
    }
    parts = [f"{count} of {SCHEME_NAMES[scheme]}" for scheme, count in lost.items() if count]
    return [f"Runs at chance level: {', '.join(parts)}."] if parts else []


def _failed(results: Mapping[str, Errors]) -> list[str]:
    counts = {scheme: sum(value is None for value in by_seed.values()) for scheme, by_seed in results.items()}
    parts = [f"{count} of {SCHEME_NAMES[scheme]}" for scheme, count in counts.items() if count]
    return [f"Failed runs, excluded: {', '.join(parts)}."] if parts else []
