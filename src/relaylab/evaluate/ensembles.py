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
        log_probabilities: (images, classes) for each member.
        how: "average" of the probabilities; their normalised "product"; or their weighted average, "learnt-weights".
        weights: (members,), for "learnt-weights"; see `fit_weights`.

    Returns:
        Log-probabilities, (images, classes).

    Raises:
        InputError: members of different shapes, an unknown method, or missing weights.

    Example:
        >>> combined([torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()], "average").exp()
        tensor([[0.7000, 0.3000]])
    """
    shapes = {tuple(member.shape) for member in log_probabilities}
    if len(shapes) != 1:
        raise InputError(f"the members of an ensemble must have scores of the same images and classes, got {shapes}")
    stacked = torch.stack(list(log_probabilities))
    match how:
        case "average":
            return average(stacked, 0)
        case "product":
            return stacked.mean(dim=0).log_softmax(dim=1)
        case "learnt-weights":
            if weights is None:
                raise InputError("learnt-weights requires weights: fit them first, with `fit_weights`")
            return (stacked + weights.log()[:, None, None]).logsumexp(dim=0)
        case _:
            raise InputError(f"unknown ensemble {how!r}: expected one of {', '.join(COMBINE)}")


def fit_weights(log_probabilities: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Fit the weights of the members' probabilities by maximum likelihood.

    The log-likelihood is concave in the weights, so that expectation maximisation finds the global maximum.

    Args:
        log_probabilities: (images, classes) for each member, on images that are not used to report results.
        labels: (images,).

    Returns:
        Weights (members,), positive, with sum 1.
    """
    of_label = torch.stack([member.double()[torch.arange(len(labels)), labels] for member in log_probabilities])
    weights = torch.full((len(of_label),), 1 / len(of_label), dtype=torch.float64)
    for _ in range(STEPS):
        shares = (of_label + weights.log()[:, None]).softmax(dim=0)
        weights = shares.mean(dim=1).clamp(min=1e-9)
        weights = weights / weights.sum()
    return weights.float()


def halves(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Split images into two halves, stratified by class: one to fit on, the other to report.

    Args:
        labels: (images,).

    Returns:
        The indices of the halves; the first has every other image of each class, in order.
    """
    rank = torch.empty_like(labels)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        rank[members] = torch.arange(len(members))
    return (rank % 2 == 0).nonzero().flatten(), (rank % 2 == 1).nonzero().flatten()
