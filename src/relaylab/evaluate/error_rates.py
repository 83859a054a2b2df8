"""Error rates in per cent from class scores, with confidence intervals.

Note [Intervals]
1. Intervals are bootstrap intervals over images: 10,000 samples of the images, with replacement. They estimate the
   variation over other images of the same kind, not over training seeds, which takes several runs.
2. The mean of a bootstrap sample depends only on the count of each distinct value, and these counts are multinomial.
   Drawing the counts is equivalent to drawing the images, at a fraction of the cost.
3. Networks are compared by paired differences, image by image. The difficulty that an image has for both cancels, so
   that the interval of the difference is narrower than the intervals of the two errors suggest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relaylab.errors import InputError
from relaylab.train.metrics import label_ranks

RESAMPLES, CONFIDENCE = 10_000, 0.95
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of its confidence interval, in per cent."""

    value: float
    low: float
    high: float

    def text(self, *, signed: bool = False) -> str:
        """Format the interval for a table, such as "12.34 [11.90, 12.81]"."""
        form = "+.2f" if signed else ".2f"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


@dataclass(frozen=True)
class ErrorRates:
    """Top-1 and top-5 error rates over images, and the mean of the per-class top-1 errors, in per cent."""

    top1: Interval
    top5: Interval
    mean_per_class: float


def error_rates(scores: Tensor, labels: Tensor) -> ErrorRates:
    """Compute error rates and their intervals.

    Args:
        scores: (images, classes), higher is more likely.
        labels: (images,) class indices.

    Raises:
        InputError: no images, unlabelled images, or NaN scores.
    """
    top1, top5 = misses(scores, labels, 1), misses(scores, labels, 5)
    return ErrorRates(interval(top1), interval(top5), float(np.nanmean(per_class_errors(scores, labels))))


def misses(scores: Tensor, labels: Tensor, top: int) -> Values:
    """Return 100 for each misclassified image and 0 for the others: the mean is the error rate in per cent.

    Args:
        scores: (images, classes), higher is more likely.
        labels: (images,) class indices.
        top: an image is correct if its label is among this many most likely classes.

    Raises:
        InputError: see `error_rates`.
    """
    if len(scores) != len(labels) or not len(labels):
        raise InputError(f"{len(scores)} rows of scores for {len(labels)} images: expected one row per image")
    if scores.isnan().any():
        raise InputError(f"the scores of {int(scores.isnan().any(dim=1).sum())} images are NaN")
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise InputError("unlabelled images have no error: choose a labelled split with --split")
    return 100.0 * (label_ranks(scores, labels) >= top).double().numpy()


def interval(values: Values, *, seed: int = 0) -> Interval:
    """Return the mean of values (images,) with its bootstrap interval. See Note [Intervals] 2."""
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=RESAMPLES)
    means = drawn @ distinct / len(values)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def difference(ours: Sequence[Values], base: Sequence[Values]) -> Interval:
    """Return the difference between two groups of networks on the same images. See Note [Intervals] 3.

    Args:
        ours: values (images,) of each network, averaged over networks.
        base: values of the baseline networks, which are subtracted.

    Raises:
        InputError: different images.
    """
    if len({len(values) for values in (*ours, *base)}) != 1:
        raise InputError("networks can only be compared on the same images")
    return interval(np.round(np.mean(ours, axis=0) - np.mean(base, axis=0), 6))


def per_class_errors(scores: Tensor, labels: Tensor) -> Values:
    """Return the top-1 error of each class in per cent, (classes,); NaN for a class without images."""
    classes = scores.shape[1]
    wrong = misses(scores, labels, 1)
    counts = np.bincount(labels.numpy(), minlength=classes)
    with np.errstate(invalid="ignore"):
        return np.bincount(labels.numpy(), weights=wrong, minlength=classes) / counts


def confusion(scores: Tensor, labels: Tensor) -> NDArray[np.int64]:
    """Return the confusion matrix (classes, classes): the number of images of class i predicted as class j."""
    classes = scores.shape[1]
    pairs = labels * classes + scores.argmax(dim=1)
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes).numpy()
