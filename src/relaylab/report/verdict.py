"""The verdict of a comparison: differences paired by seed, their confidence interval, and one sentence."""

import statistics
from collections.abc import Collection, Mapping, Sequence

from scipy import stats

from relaylab.recipes.schema import SCHEME_NAMES

CONFIDENCE = 0.95
COMPARED = ("standard", "multi_loss", "isolated")  # with the scheme in question, in this order
IN_QUESTION = ("relay", "isolated", "multi_loss")
UNCLEAR = "not distinguishable from"
Errors = Mapping[int, float | None]  # by seed; None where the run failed


def paired_differences(ours: Errors, base: Errors) -> list[float]:
    """Return ours minus base for each seed that both have finished."""
    pairs = ((value, base.get(seed)) for seed, value in ours.items())
    return [value - other for value, other in pairs if value is not None and other is not None]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the confidence interval of the mean (t), or None for fewer than two values."""
    if len(values) < 2:
        return None
    mean, error = statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return mean - half, mean + half


def mean_text(values: Sequence[float]) -> str:
    """Format a mean over seeds, followed by the standard deviation if there are several."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def difference_text(values: Sequence[float]) -> str:
    """Format the mean of paired differences, followed by its confidence interval."""
    if not values:
        return "no common seed"
    mean, *ends = (round(value, 2) + 0.0 for value in (statistics.fmean(values), *(interval(values) or ())))  # no -0.00
    return f"{mean:+.2f} [{ends[0]:+.2f}, {ends[1]:+.2f}]" if ends else f"{mean:+.2f} (one seed)"


def chance_error(classes: int, top: int) -> float:
    """Return the error of guessing, in per cent."""
    return 100 * (1 - min(top, classes) / classes)


def in_question(schemes: Collection[str]) -> str | None:
    """Return the scheme that a comparison is about: the others are what it is compared with."""
    return next((scheme for scheme in IN_QUESTION if scheme in schemes and len(schemes) > 1), None)


def verdict(results: Mapping[str, Errors]) -> str:
    """Summarise a comparison in one sentence, from the top-1 error by scheme and seed, in per cent."""
    trained = {scheme: own for scheme, own in results.items() if any(value is not None for value in own.values())}
    ours = in_question(trained)
    bases = [scheme for scheme in COMPARED if scheme in trained and scheme != ours]
    failed = _failed(results)
    if ours is None or not bases:
        names = ", ".join(SCHEME_NAMES[scheme] for scheme in trained) or "no method"
        return f"Nothing to compare: {names} finished{failed}."
    found = {scheme: paired_differences(trained[ours], trained[scheme]) for scheme in bases}
    paired = {scheme: values for scheme, values in found.items() if values}
    if not paired:
        return f"Nothing to compare: {SCHEME_NAMES[ours]} and {SCHEME_NAMES[bases[0]]} have no seed in common{failed}."
    text = _comparisons({SCHEME_NAMES[scheme]: values for scheme, values in paired.items()})
    return f"The top-1 error of {SCHEME_NAMES[ours]} is {text}; {_basis(paired)}{failed}."


def _comparisons(paired: Mapping[str, Sequence[float]]) -> str:
    """Say by how much the error is lower or higher than that of each method, or that chance may explain it."""
    clauses: dict[str, list[str]] = {}
    for base, values in paired.items():
        mean, ends = statistics.fmean(values), interval(values)
        word = f"{abs(mean):.2f} points {'lower' if mean < 0 else 'higher'} than"
        if ends is not None and (ends[0] <= 0 <= ends[1] or not round(mean, 2)):
            word = UNCLEAR
        elif not round(mean, 2):
            word = "the same as"
        basis = "one seed" if ends is None else difference_text(values)
        clauses.setdefault(word, []).append(f"that of {base} ({basis})")
    joined = {word: (" or " if word == UNCLEAR else " and ").join(bases) for word, bases in clauses.items()}
    return " and ".join(f"{word} {bases}" for word, bases in joined.items())


def _basis(paired: Mapping[str, Sequence[float]]) -> str:
    """Say what the intervals are over, or that there are none."""
    counts = list(dict.fromkeys(len(values) for values in paired.values() if len(values) > 1))
    if not counts:
        return "this may be chance: compare with --seeds 0,1,2"
    return f"{100 * CONFIDENCE:.0f} % intervals over {' and '.join(map(str, counts))} paired seeds (t)"


def _failed(results: Mapping[str, Errors]) -> str:
    counts = {scheme: sum(value is None for value in own.values()) for scheme, own in results.items()}
    parts = [f"{count} of {SCHEME_NAMES[scheme]}" for scheme, count in counts.items() if count]
    return f"; failed runs, left out: {', '.join(parts)}" if parts else ""
