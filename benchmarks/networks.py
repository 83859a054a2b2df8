"""The networks that the benchmarks measure, each with a head, the paper's windows and a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from relaybackprop import AuxiliaryHead, Plan, Window

if TYPE_CHECKING:
    from torchvision.models import ResNet


class VGG22(nn.Module):
    """The paper's 22-layer network (Table 1): VGGNet-19 and one more convolution on each of the three smallest maps.

    Five segments of 3x3 convolutions and ReLU, each ending in max pooling, and three fully connected layers. No batch
    normalisation. No dropout either, which would only add noise.

    Args:
        width: filters of the first segment; 64 in the paper.
        pixels: side of the images, a multiple of 32.
        classes: number of classes.
    """

    def __init__(self, width: int, pixels: int, classes: int) -> None:
        super().__init__()
        self.segment1 = _segment(3, width, 2)
        self.segment2 = _segment(width, 2 * width, 2)
        self.segment3 = _segment(2 * width, 4 * width, 5)
        self.segment4 = _segment(4 * width, 8 * width, 5)
        self.segment5 = _segment(8 * width, 8 * width, 5)
        hidden = 64 * width
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(8 * width * (pixels // 32) ** 2, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # PyTorch's default lets 19 layers without normalisation fade to nothing.
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (batch, classes) from images (batch, 3, pixels, pixels)."""
        x = self.segment3(self.segment2(self.segment1(images)))
        return self.classifier(self.segment5(self.segment4(x)))


def _segment(channels: int, filters: int, convolutions: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU(inplace=True)]
        channels = filters
    return nn.Sequential(*layers, nn.MaxPool2d(2))


@dataclass(frozen=True)
class Subject:
    """A network with one head, its plan, a batch, and the same layers as three runs for those who write by hand.

    Args:
        model: the whole, without the head.
        below: its layers below the overlap of the two windows.
        overlap: those in both windows; the head is on its output.
        above: those above it.
        head: turns the overlap's output into class scores.
        plan: the paper's windows.
        images: a batch.
        labels: its classes.
    """

    model: nn.Module
    below: nn.Module
    overlap: nn.Module
    above: nn.Module
    head: nn.Module
    plan: Plan
    images: Tensor
    labels: Tensor

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of the model and the head."""
        return [*self.model.parameters(), *self.head.parameters()]

    def clear(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None


def vgg22(width: int, pixels: int, batch: int, *, classes: int = 100, device: str = "cpu") -> Subject:
    """VGG-22 with the windows of the paper's Table 2: the head behind segment 4, the primary window from it up."""
    with torch.device(device):
        model = VGG22(width, pixels, classes)
        head = AuxiliaryHead(8 * width, classes)
        images, labels = _batch(batch, pixels, classes)
    below = nn.Sequential(model.segment1, model.segment2, model.segment3)
    above = nn.Sequential(model.segment5, model.classifier)
    plan = Plan(Window(bottom="segment4"), {"aux": Window(top="segment4")})
    return Subject(model, below, model.segment4, above, head, plan, images, labels)


def resnet50(pixels: int, batch: int, *, classes: int = 1000, device: str = "cpu") -> Subject:
    """ResNet-50, torchvision's, with the paper's windows: both losses train conv4.1 to conv4.4 (section 5.2)."""
    from torchvision.models import resnet50 as build  # a second to import; VGG-22 does without

    return residual(build, pixels, batch, classes=classes, device=device)


def residual(
    build: "Callable[..., ResNet]", pixels: int, batch: int, *, classes: int = 1000, device: str = "cpu"
) -> Subject:
    """Return a network of torchvision's bottleneck blocks; both losses train the first four of the third stage."""
    with torch.device(device):
        model = build(num_classes=classes)
        head = AuxiliaryHead(1024, classes)
        images, labels = _batch(batch, pixels, classes)
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    below = nn.Sequential(*stem, model.layer1, model.layer2)
    overlap, rest = model.layer3[:4], model.layer3[4:]
    above = nn.Sequential(*rest, model.layer4, model.avgpool, nn.Flatten(), model.fc)
    plan = Plan(Window(bottom="layer3.0"), {"aux": Window(top="layer3.3")})
    return Subject(model, below, overlap, above, head, plan, images, labels)


def without_dropout(subject: Subject) -> Subject:
    """The same subject, whose gradients are no longer a matter of chance."""
    for module in (subject.model, subject.head):
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    return subject


def _batch(batch: int, pixels: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, pixels, pixels), torch.randint(classes, (batch,))
