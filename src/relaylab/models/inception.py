"""Inception-v3: torchvision's without its auxiliary classifier, and a variant for small images."""

from typing import Any

from torch import Tensor
from torch.nn import functional
from torchvision.models import Inception3

SMALLEST, ENLARGED = 75, 96  # pixels


class EnlargingInception3(Inception3):
    """Inception-v3 for small images, which are enlarged bilinearly first.

    Args:
        image_size: side of the crops in pixels. Crops are enlarged to 96 pixels, larger images by the same factor.
        arguments: arguments of `torchvision.models.Inception3`.
    """

    def __init__(self, image_size: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.image_size = image_size

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return class scores (batch, num_classes) of images (batch, 3, h, w)."""
        size = [side * ENLARGED // self.image_size for side in x.shape[-2:]]
        images = functional.interpolate(x, size, mode="bilinear", align_corners=False)
        return super().forward(images)  # pyright: ignore[reportReturnType] (without aux_logits it is a tensor)


def inception_v3(num_classes: int = 1000, *, image_size: int = 299) -> Inception3:
    """Build Inception-v3 (the paper's [26]) without the auxiliary classifier, which the plan's heads replace.

    DEVIATION(small-inception): images of less than 75 pixels are enlarged to 96.

    Args:
        num_classes: number of classes, the length of the output.
        image_size: side of the images in pixels.

    Returns:
        torchvision's module, with its names: images (batch, 3, h, w) to class scores (batch, num_classes).
    """
    arguments: dict[str, Any] = {"num_classes": num_classes, "aux_logits": False, "init_weights": True}
    return EnlargingInception3(image_size, **arguments) if image_size < SMALLEST else Inception3(**arguments)
