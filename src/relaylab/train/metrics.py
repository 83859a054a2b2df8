"""Top-k errors: one definition for training, validation and the evaluation of trained networks."""

import torch
from torch import Tensor

TOP = {"top1": 1, "top5": 5}


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Return how many classes score higher than each image's label.

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
    own = scores.gather(1, labels[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > own) | ((scores == own) & before)).sum(dim=1)


def top_errors(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the top-1 and top-5 errors of a batch as scalars, 0 to 1."""
    ranks = label_ranks(scores.detach(), labels)
    return {name: (ranks >= top).float().mean() for name, top in TOP.items()}
