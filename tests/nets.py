"""Small networks of every supported kind, in float64, each with a plan."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from relaybackprop import AuxiliaryHead, LinearHead, Plan, Window

CLASSES = 5


@dataclass(frozen=True)
class Case:
    """A network, a plan for it, its heads, and the prefixes of the parameters that each loss trains."""

    model: nn.Module
    plan: Plan
    heads: dict[str, nn.Module]
    inputs: tuple[Any, ...]
    reaches: dict[str, tuple[str, ...]]


def vgg() -> Case:
    """The paper's Figure 2, but small: five segments, heads after 3 and 4, windows 1-3, 3-4, 4-5. In-place ReLUs."""

    def segment(channels_in: int, channels: int, pool: bool) -> nn.Sequential:
        layers: list[nn.Module] = []
        for position in range(2):
            layers += [nn.Conv2d(channels if position else channels_in, channels, 3, padding=1), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, nn.MaxPool2d(2) if pool else nn.Identity())

    model = nn.Sequential()
    widths = [3, 4, 6, 6, 8, 8]
    for number in range(1, 6):
        model.add_module(f"segment{number}", segment(widths[number - 1], widths[number], pool=number in (1, 3)))
    model.add_module("pool", nn.AdaptiveAvgPool2d(2))
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc1", nn.Linear(8 * 4, 16))
    model.add_module("relu", nn.ReLU(inplace=True))
    model.add_module("dropout", nn.Dropout(0.5))
    model.add_module("fc2", nn.Linear(16, CLASSES))
    plan = Plan(
        primary=Window(bottom="segment4"),
        auxiliary={"aux1": Window(top="segment3"), "aux2": Window(top="segment4", bottom="segment3")},
    )
    heads: dict[str, nn.Module] = {"aux1": AuxiliaryHead(6, CLASSES), "aux2": LinearHead(8, CLASSES)}
    reaches = {
        "primary": ("model.segment4.", "model.segment5.", "model.fc"),
        "aux1": ("model.segment1.", "model.segment2.", "model.segment3.", "heads.aux1."),
        "aux2": ("model.segment3.", "model.segment4.", "heads.aux2."),
    }
    return Case(model, plan, heads, (torch.randn(3, 3, 8, 8),), reaches)


class Residual(nn.Module):
    """A residual block with batch normalisation and an in-place addition."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out += x
        return self.relu(out)


class ResNet(nn.Module):
    """A stem, six residual blocks, global pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.Sequential(*(Residual(6) for _ in range(6)))
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def resnet() -> Case:
    """A small version of the paper's ResNet-50. Three losses share block 2; one head is inside a residual branch."""
    plan = Plan(
        primary=Window(bottom="blocks.2", weight=2.0),
        auxiliary={
            "low": Window(top="blocks.2.conv2"),
            "middle": Window(top="blocks.2"),
            "high": Window(top="blocks.4", after="blocks.0", weight=0.5),
        },
    )
    heads: dict[str, nn.Module] = {name: LinearHead(6, CLASSES) for name in plan.auxiliary}
    below = ("model.stem.", "model.blocks.0.", "model.blocks.1.", "heads.")
    reaches = {
        "primary": ("model.blocks.2.", "model.blocks.3.", "model.blocks.4.", "model.blocks.5.", "model.fc."),
        "low": (*below[:3], "model.blocks.2.conv", "model.blocks.2.norm1", "heads.low."),
        "middle": (*below[:3], "model.blocks.2.", "heads.middle."),
        "high": ("model.blocks.1.", "model.blocks.2.", "model.blocks.3.", "model.blocks.4.", "heads.high."),
    }
    return Case(ResNet(), plan, heads, (torch.randn(4, 3, 6, 6),), reaches)


class Inception(nn.Module):
    """The paper's modified inception module: 1x1, 3x3 and two 3x3 convolutions, concatenated."""

    def __init__(self, channels: int, k: int) -> None:
        super().__init__()
        self.branch1 = nn.Conv2d(channels, k, 1)
        self.branch3 = nn.Conv2d(channels, k, 3, padding=1)
        self.branch5a = nn.Conv2d(channels, 2 * k, 3, padding=1)
        self.branch5b = nn.Conv2d(2 * k, 2 * k, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.branch5b(self.branch5a(x).relu())
        return torch.cat([self.branch1(x), self.branch3(x), deep], dim=1).relu()


def inception() -> Case:
    """Concatenating modules; the aux head's window is nested in the primary one; one head on a single branch."""
    model = nn.Sequential(Inception(3, 2), Inception(8, 2), Inception(8, 2), Inception(8, 2), nn.Flatten())
    model.append(nn.Linear(8 * 9, CLASSES))
    plan = Plan(
        primary=Window(after="0"),
        auxiliary={"branch": Window(top="2.branch3"), "nested": Window(top="2", bottom="2")},
    )
    heads: dict[str, nn.Module] = {"branch": LinearHead(2, CLASSES), "nested": LinearHead(8, CLASSES)}
    reaches = {
        "primary": ("model.1.", "model.2.", "model.3.", "model.5."),
        "branch": ("model.0.", "model.1.", "model.2.branch3.", "heads.branch."),
        "nested": ("model.2.", "heads.nested."),
    }
    return Case(model, plan, heads, (torch.randn(2, 3, 3, 3),), reaches)


class Encoded(NamedTuple):
    """The two tensors that a transformer block returns."""

    tokens: Tensor
    bias: Tensor


class Block(nn.Module):
    """A transformer encoder layer that also returns a running position bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=0.2, batch_first=True)
        self.shift = nn.Linear(8, 8)

    def forward(self, state: Encoded) -> Encoded:
        return Encoded(self.layer(state.tokens + state.bias), torch.tanh(self.shift(state.bias)))


class Transformer(nn.Module):
    """Embedding, a learnt position bias, five blocks and a classifier on the mean token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(6, 8))
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, words: Tensor) -> dict[str, Tensor]:
        state = Encoded(self.embed(words), self.position)
        for block in self.blocks:
            state = block(state)
        return {"logits": self.fc(state.tokens.mean(1) + state.bias.mean(0))}


class TokenHead(nn.Module):
    """A classifier on a block's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, state: Encoded) -> dict[str, Tensor]:
        return {"logits": self.fc(state.tokens.mean(1) + state.bias.mean(0))}


def transformer() -> Case:
    """Two tensors cross each boundary, outputs are dictionaries, and no loss trains block 3."""
    plan = Plan(
        primary=Window(after="blocks.3"),
        auxiliary={"aux": Window(top="blocks.1"), "other": Window(top="blocks.2", bottom="blocks.1")},
    )
    heads: dict[str, nn.Module] = {"aux": TokenHead(), "other": TokenHead()}
    low = ("model.embed.", "model.position", "model.blocks.0.", "model.blocks.1.", "heads.aux.")
    reaches = {
        "primary": ("model.blocks.4.", "model.fc."),
        "aux": low,
        "other": ("model.blocks.1.", "model.blocks.2.", "heads.other."),
    }
    return Case(Transformer(), plan, heads, (torch.randint(11, (3, 6)),), reaches)


CASES: dict[str, Callable[[], Case]] = {
    "vgg": vgg,
    "resnet": resnet,
    "inception": inception,
    "transformer": transformer,
}


def make_case(name: str, seed: int = 0) -> Case:
    """Return one of the cases in float64, with seeded weights."""
    torch.manual_seed(seed)
    case = CASES[name]()
    for module in (case.model, *case.heads.values()):
        module.double()
    inputs = tuple(value.double() if value.is_floating_point() else value for value in case.inputs)
    return Case(case.model, case.plan, case.heads, inputs, case.reaches)
