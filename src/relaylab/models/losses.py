"""Losses for class indices (n,) and for soft targets (n, classes), such as mixup's. They are means over images.

The weight of an image depends only on its class, not on the batch, so the mean over images is the same for any number
of micro-batches and processes. torch's weighted mean divides by the sum of the weights in the batch, so it is not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

POWERS = {"balanced": 1.0, "square-root": 0.5}


def class_weights(kind: str, counts: Sequence[int]) -> Tensor:
    """Return the weight of each class, with mean 1 over all training images; 0 for a class without images.

    "balanced" is scikit-learn's `compute_class_weight("balanced")`.

    Args:
        kind: a name in `POWERS`.
        counts: number of training images of each class.
    """
    images = torch.tensor(counts, dtype=torch.float64)
    weights = torch.where(images > 0, images.clamp(min=1) ** -POWERS[kind], 0.0)
    return (weights * images.sum() / (weights * images).sum()).float()


class WeightedCrossEntropy(nn.Module):
    """Softmax cross-entropy with a weight per class, averaged over images.

    It is `torch.nn.functional.cross_entropy` with `weight`, but without the division by the sum of the weights.
    """

    weights: Tensor

    def __init__(self, label_smoothing: float, weights: Tensor) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        """Return the loss of scores (n, classes)."""
        losses = F.cross_entropy(scores, target, self.weights, reduction="none", label_smoothing=self.label_smoothing)
        return losses.mean()


class BinaryCrossEntropy(nn.Module):
    """Sigmoid and binary cross-entropy per class, averaged over classes and images.

    Like timm's `BinaryCrossEntropy`, whose smoothed targets are s / classes and 1 - s + s / classes. Soft targets are
    also smoothed, as in torch's `CrossEntropyLoss`. The weight of an image is the weight of its class, or the mean of
    the weights of its classes.
    """

    weights: Tensor | None

    def __init__(self, label_smoothing: float = 0.0, weights: Tensor | None = None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        """Return the loss of scores (n, classes)."""
        count = scores.shape[-1]
        soft = F.one_hot(target, count) if target.ndim == 1 else target
        soft = soft.to(scores.dtype)
        smooth = soft * (1 - self.label_smoothing) + self.label_smoothing / count
        losses = F.binary_cross_entropy_with_logits(scores, smooth, reduction="none").mean(-1)
        return losses.mean() if self.weights is None else (losses * (soft * self.weights).sum(-1)).mean()
