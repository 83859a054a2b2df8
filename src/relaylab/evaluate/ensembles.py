"""Ensembles: combine the class probabilities of several networks."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from relaylab.errors import InputError
from relaylab.evaluate.protocols import average

Combine = Literal["average", "product", "learnt-weights"]
COMBINE: tuple[Combine, ...] = ("average", "product", "learnt-weights")
STEPS = 200


def combined(log_probabilities: Sequence[Tensor], how: Combine, weights: Tensor | None = None) -> Tensor:
    """Combine the log-probabilities of an ensemble's members.

    Args:
        log_probabilities: of each member, (images, classes).
        how: "average" of the probabilities; their "product", normalised; or their average by "learnt-weights".
        weights: (members,), for learnt weights; see `fit_weights`.

    Returns:
        Log-probabilities, (images, classes).

    Raises:
        InputError: members of different shapes, an unknown `how`, or missing weights.
    """
    shapes = {tuple(member.shape) for member in log_probabilities}
    if len(shapes) != 1:
        raise InputError(f"an ensemble's members have scores of the same images and classes, not of shapes {shapes}")
    stacked = torch.stack(list(log_probabilities))
    match how:
        case "average":
            return average(stacked, 0)
        case "product":
            return stacked.mean(dim=0).log_softmax(dim=1)
        case "learnt-weights":
            if weights is None:
                raise InputError("learnt weights have to be learnt first, on images that nothing is reported of")
            return (stacked + weights.log()[:, None, None]).logsumexp(dim=0)
        case _:
            raise InputError(f"unknown way to combine {how!r}: expected one of {', '.join(COMBINE)}")


def fit_weights(log_probabilities: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return the weights of the members' probabilities that maximise the likelihood of the labels.

    The likelihood is concave in the weights; expectation maximisation finds its only maximum.

    Args:
        log_probabilities: of each member, (images, classes), for images that no result is reported on.
        labels: (images,).

    Returns:
        (members,), positive, with sum 1.
    """
    of_label = torch.stack([member.double()[torch.arange(len(labels)), labels] for member in log_probabilities])
    weights = torch.full((len(of_label),), 1 / len(of_label), dtype=torch.float64)
    for _ in range(STEPS):
        shares = (of_label + weights.log()[:, None]).softmax(dim=0)
        weights = shares.mean(dim=1).clamp(min=1e-9)
        weights = weights / weights.sum()
    return weights.float()


def halves(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Split images into two halves with the same classes, one to fit on and the other to report.

    Args:
        labels: (images,).

    Returns:
        Their indices. The first half has every other image of each class, in order.
    """
    rank = torch.empty_like(labels)
    for label in labels.unique():
        own = (labels == label).nonzero().flatten()
        rank[own] = torch.arange(len(own))
    return (rank % 2 == 0).nonzero().flatten(), (rank % 2 == 1).nonzero().flatten()
