"""Metrics of runs: top-k errors for single-label images, mean average precision for multi-label images.

Note [Measures]
1. A measure is an error in per cent; tables, verdicts, schedules and the choice of checkpoints assume that lower is
   better. Mean average precision is therefore reported as 100 minus its value; records have both.
2. The measures of a run are those in its lines of validation metrics: `measures_of`. The first one is decisive.
3. To add a measure, add a `Measure` to `MEASURES`, and its value to `Validation` (`relaylab.train.validation`).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Measure:
    """An error by which runs are compared, in per cent.

    Attributes:
        name: key in the records.
        short: name for column headers.
        title: full name.
    """

    name: str
    short: str
    title: str

    @property
    def base(self) -> str:
        """The name of the same measure without averaged weights."""
        return self.name.removeprefix(AVERAGED)


TOP = {"top1": 1, "top5": 5}
MAP, MAP_ERROR = "map", "map_error"
LEARNT = 0.98  # fraction of the chance level; a run above it has not learnt anything
AVERAGED = "ema_"  # prefix of metrics of averaged weights
_OWN = (
    Measure("top1", "top-1", "top-1 error"),
    Measure("top5", "top-5", "top-5 error"),
    Measure(MAP_ERROR, "100 - mAP", "100 - mean average precision"),
)
MEASURES = (
    *_OWN,
    *(Measure(f"{AVERAGED}{m.name}", f"averaged weights, {m.short}", f"averaged weights, {m.title}") for m in _OWN),
)


def measures_of(line: Mapping[str, Any]) -> list[Measure]:
    """Return the measures in a line of validation metrics. See Note [Measures] 2."""
    return [measure for measure in MEASURES if measure.name in line]


def deciding(line: Mapping[str, Any]) -> Measure:
    """Return the measure by which runs are compared and checkpoints are chosen, from a line of validation metrics."""
    return measures_of(line)[0]


def informative_tops(classes: int) -> list[str]:
    """Return the names of the top-k errors to show: with at most five classes, the top-5 error is always zero."""
    return [name for name, top in TOP.items() if top == 1 or classes > top]


def result_text(line: Mapping[str, Any], classes: int, prefix: str = "") -> str:
    """Format the metrics of a validation.

    Args:
        line: the metrics.
        classes: number of classes.
        prefix: selects the metrics of averaged weights.
    """
    if f"{prefix}{MAP}" in line:
        return f"mean average precision {line[f'{prefix}{MAP}']:.2f} %"
    errors = (f"top-{TOP[name]} {line[f'{prefix}{name}']:.2f} %" for name in informative_tops(classes))
    return f"error {', '.join(errors)}"


def chance_error(classes: int, top: int) -> float:
    """Return the top-k error at chance level, in per cent."""
    return 100 * (1 - min(top, classes) / classes)


def is_at_chance(error: float, guess: float) -> bool:
    """Return whether a run with this error has not learnt anything; `guess` is the chance level."""
    return error >= LEARNT * guess


def guessed_precision_error(positives: Sequence[int], images: int) -> float:
    """Return 100 minus the mean average precision at chance level, in per cent: the mean fraction of positives.

    Args:
        positives: number of positive images per class; classes without positives are ignored.
        images: total number of images.
    """
    return 100 - 100 * statistics.fmean(count / images for count in positives if count)


def chance_level(measure: Measure, counts: Sequence[int], images: int) -> float:
    """Return the chance level of an error in per cent.

    Args:
        measure: the error.
        counts: number of validation images, or of positive images, per class.
        images: total number of validation images.
    """
    top = TOP.get(measure.base)
    return guessed_precision_error(counts, images) if top is None else chance_error(len(counts), top)


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the rank of each image's label: the number of classes with a higher score.

    Ties, which half precision makes common, are broken in favour of the lower class index, on all machines alike.

    Args:
        scores: (n, classes); without NaN.
        labels: int64 (n,), 0 to classes - 1.

    Returns:
        int64 (n,), 0 where the label has the highest score.

    Example:
        >>> label_ranks(torch.tensor([[0.1, 0.9, 0.4]]), torch.tensor([2]))
        tensor([1])
    """
    target = scores.gather(1, labels[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > target) | ((scores == target) & before)).sum(dim=1)


def top_errors(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the top-1 and top-5 errors of a batch as scalars, 0 to 1."""
    ranks = label_ranks(scores.detach(), labels)
    return {name: (ranks >= top).float().mean() for name, top in TOP.items()}


def average_precision(scores: Tensor, targets: Tensor) -> float:
    """Return the mean average precision, 0 to 1, as computed by scikit-learn, over the classes with positives.

    Args:
        scores: (n, classes), probabilities or any increasing function of them.
        targets: (n, classes), 0 and 1, with at least one 1.

    Returns:
        The mean average precision; NaN if a score is not finite.

    Example:
        >>> average_precision(torch.tensor([[3.0], [2.0], [1.0]]), torch.tensor([[1], [0], [1]]))  # (1/1 + 2/3) / 2
        0.8333333333333333
    """
    from sklearn.metrics import average_precision_score  # slow to import

    if not bool(scores.isfinite().all()):
        return math.nan
    present = (targets > 0).any(dim=0)
    return float(average_precision_score(targets[:, present].cpu().numpy(), scores[:, present].float().cpu().numpy()))
