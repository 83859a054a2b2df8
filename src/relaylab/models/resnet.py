"""ResNet-50: the torchvision network, and variants for small images and with fewer filters."""

from torch import nn
from torchvision.models import ResNet
from torchvision.models import resnet50 as torchvision_resnet50
from torchvision.models.resnet import Bottleneck

SMALL = 112  # pixels; for smaller images, the usual stem would leave maps of at most 3x3
WIDTH = 64  # as in torchvision
BLOCKS = (3, 4, 6, 3)  # number of blocks in each stage


def resnet50(num_classes: int = 1000, *, image_size: int = 224, width: int = WIDTH) -> ResNet:
    """Build ResNet-50 (the paper's [27]).

    DEVIATION(small-resnet): for images of less than 112 pixels the first convolution has stride 1 and is not followed
    by pooling, so that 64 pixels leave an 8x8 map. All weights keep their shapes.

    Args:
        num_classes: number of classes, the length of the output.
        image_size: side of the images in pixels.
        width: filters of the first convolution, which scales all layers; 64 in the paper.

    Returns:
        torchvision's module, with its names: images (batch, 3, h, w) to class scores (batch, num_classes).
    """
    model = torchvision_resnet50(num_classes=num_classes)
    if width != WIDTH:
        _change_width(model, width)
    if image_size < SMALL:
        model.conv1.stride = (1, 1)
        model.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return model


def _change_width(model: ResNet, width: int) -> None:
    """Replace all layers, since the constructor can only change the width of the 3x3 convolutions."""
    model.inplanes = width
    model.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    model.bn1 = nn.BatchNorm2d(width)
    for number, blocks in enumerate(BLOCKS):
        stage = model._make_layer(Bottleneck, width * 2**number, blocks, stride=1 if number == 0 else 2)
        setattr(model, f"layer{number + 1}", stage)
    model.fc = nn.Linear(model.inplanes, model.fc.out_features)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
