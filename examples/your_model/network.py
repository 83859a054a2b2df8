"""A small residual network for images of about 32 pixels."""

from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions of 3x3 and a shortcut; the first one may halve the map."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (batch, outputs, h / stride, w / stride)."""
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def small_resnet(num_classes: int, width: int = 16, blocks: int = 2) -> nn.Sequential:
    """Return a network of three stages with `blocks` blocks each, on maps of 1/2, 1/4 and 1/8 of the image."""
    stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    stages: list[nn.Module] = []
    inputs = width
    for stage, outputs in enumerate((width, 2 * width, 4 * width)):
        strides = (1 if stage == 0 else 2, *[1] * (blocks - 1))
        stages += [Block(inputs if i == 0 else outputs, outputs, stride) for i, stride in enumerate(strides)]
        inputs = outputs
    return nn.Sequential(stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))
