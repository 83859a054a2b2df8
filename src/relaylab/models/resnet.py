"""ResNet-50: torchvision's, and the same for small images."""

from torch import nn
from torchvision.models import ResNet
from torchvision.models import resnet50 as torchvision_resnet50

SMALL = 112  # pixels; below, the usual stem would leave maps of 3x3 and less


def resnet50(num_classes: int = 1000, *, image_size: int = 224, width: int = 64) -> ResNet:
    """ResNet-50 (the paper's [27]).

    DEVIATION(small-resnet): on images of less than 112 pixels the first convolution has stride 1 and no pooling follows
    it, so that 64 pixels leave an 8x8 map. All weights keep their shapes.

    Args:
        num_classes: length of the output.
        image_size: side of the images in pixels.
        width: filters of the 3x3 convolutions of the first stage, and with them those of the others; the 1x1
            convolutions around them keep their outputs (torchvision's `width_per_group`).

    Returns:
        torchvision's module, with its names: images (batch, 3, h, w) to class scores (batch, num_classes).
    """
    model = torchvision_resnet50(num_classes=num_classes, width_per_group=width)
    if image_size < SMALL:
        model.conv1.stride = (1, 1)
        model.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return model
