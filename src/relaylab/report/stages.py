"""Networks as in Table 2 and Figure 2 of the paper: rows of layers on maps of one size, with their losses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from relaybackprop import Plan, RelayError
from relaybackprop.plan import Boundary
from relaybackprop.planning.chain import Link, chain, trace
from relaybackprop.planning.copies import Arguments, run_on_copies
from relaylab.errors import InputError
from relaylab.models.model_b import Inception
from relaylab.models.pyramid import SpatialPyramid, braces
from relaylab.tables import Table


@dataclass(frozen=True)
class Stage:
    """Consecutive layers on maps of one size that the same losses train.

    Attributes:
        name: the common module, or "FIRST to LAST".
        layers: descriptions as in Table 2, from the lowest layer up.
        input_size: size of the input maps in pixels; None for vectors.
        losses: losses whose windows contain the layers, primary loss first.
    """

    name: str
    layers: tuple[str, ...]
    input_size: int | None
    losses: tuple[str, ...]


@dataclass(frozen=True)
class Loss:
    """A loss of the plan.

    Attributes:
        name: name of the loss.
        weight: weight of the loss.
        low: index of the lowest stage in its window.
        top: index of the highest stage in its window, which its head follows.
        depth: number of weight layers in its window, the paper's N.
    """

    name: str
    weight: float
    low: int
    top: int
    depth: int


def stages_of(model: nn.Module, plan: Plan, image_size: int) -> tuple[list[Stage], list[Loss]]:
    """Return the stages of a network from lowest to highest, and the losses of a plan, primary loss first.

    Args:
        model: network without heads, possibly on the meta device, since only shapes are computed.
        plan: windows.
        image_size: side of the images in pixels.

    Raises:
        InputError: the network is not a chain of modules, or a window ends inside one of these modules.
    """
    images = torch.empty(2, 3, image_size, image_size, device="meta")
    try:
        links = chain(model, images)
        depths = trace(model, plan, images).depths
    except RelayError as error:
        raise InputError(f"the network cannot be drawn: {error}") from error
    spans = {loss: _span(links, plan, loss) for loss in plan.windows}
    cuts = {edge for low, top in spans.values() for edge in (low, top + 1)}
    runs = _runs(links, cuts, image_size)
    of_link = [index for index, run in enumerate(runs) for _ in run]
    sides = _input_sides(model, images)
    stages: list[Stage] = []
    size: int | None = image_size
    first = before = 0  # index of the run's lowest link, and the depth below it
    for run in runs:
        losses = tuple(loss for loss, (low, top) in spans.items() if low <= first <= top)
        received = sides.get(_largest(run[0], run, links), size)  # functional pooling below it belongs to no run
        stages.append(Stage(_name(run, links), _words(model, run, before), received, losses))
        size, first, before = _side(run[-1]), first + len(run), run[-1].depth
    return stages, [Loss(n, plan.weights[n], of_link[low], of_link[top], depths[n]) for n, (low, top) in spans.items()]


def _input_sides(model: nn.Module, images: torch.Tensor) -> dict[str, int | None]:
    """Return the size of the maps that each module receives in its first call; None for vectors."""
    sides: dict[str, int | None] = {}

    def record(name: str, arguments: tuple[Any, ...]) -> None:
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        if tensors and name not in sides:
            sides[name] = _side_of(tensors[0].shape)

    def run(copies: Sequence[nn.Module], arguments: Arguments) -> None:
        for name, module in copies[0].named_modules():
            module.register_forward_pre_hook(lambda _, values, name=name: record(name, values))
        copies[0](*arguments[0], **arguments[1])

    run_on_copies([model], images, run)
    return sides


def _span(links: Sequence[Link], plan: Plan, loss: str) -> tuple[int, int]:
    """Return the indices of the lowest and highest link in the window of a loss."""
    window = plan.windows[loss]
    top = len(links) - 1 if window.upper is None else _at(links, window.upper)
    low = _at(links, window.ends[0]) + 1 if window.ends else 0
    return low, top


def _at(links: Sequence[Link], boundary: Boundary) -> int:
    """Return the index of the link with a boundary; -1 for the input of the network."""
    name = boundary.module
    if boundary.side == "output":
        indices = [index for index, link in enumerate(links) if name in link.names]
    else:
        indices = [index - 1 for index, link in enumerate(links) if _is_in(link, name)]
    if not indices:
        raise InputError(f"cannot draw the {boundary}: it is inside a module whose children do not form a chain")
    return indices[0]


def _runs(links: Sequence[Link], cuts: set[int], image_size: int) -> list[list[Link]]:
    """Split the chain at the ends of windows, and where weight layers receive maps of a new size.

    Layers without weights that change the size, such as pooling, belong to the run below.
    """
    runs: list[list[Link]] = []
    size, depth = image_size, 0
    for index, link in enumerate(links):
        side = _side(link)
        is_new = index in cuts or (link.depth > depth and side != size)
        if is_new or not runs:
            runs.append([])
        if link.depth > depth:
            size = side
        runs[-1].append(link)
        depth = link.depth
    return runs


def _side(link: Link) -> int | None:
    """Return the size of the output maps; None for vectors."""
    return _side_of(link.shape)


def _side_of(shape: Sequence[int]) -> int | None:
    return shape[-1] if len(shape) == 4 and shape[-1] > 1 else None


def _name(run: Sequence[Link], links: Sequence[Link]) -> str:
    """Return the module that consists of exactly these links, or the first and the last of several modules."""
    first, last = _largest(run[0], run, links), _largest(run[-1], run, links)
    return first if first == last else f"{first} to {last}"


def _largest(link: Link, run: Sequence[Link], links: Sequence[Link]) -> str:
    """Return the outermost module that contains this link and no link outside the run."""
    name = next(iter(link.names), "")
    parts = name.split(".")
    prefixes = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    within = (prefix for prefix in prefixes if all(other in run for other in links if _is_in(other, prefix)))
    return next(within, name)


def _is_in(link: Link, module: str) -> bool:
    """Return whether a module produces the link, rather than only passing it through, like nn.Flatten."""
    return any(name == module or name.startswith(f"{module}.") for name in link.names[:1])


def _words(model: nn.Module, run: Sequence[Link], depth: int) -> tuple[str, ...]:
    """Describe the layers of a run; consecutive equal layers are counted."""
    words: list[str] = []
    for link in run:
        modules = [model.get_submodule(name) for name in link.names]  # innermost first
        known = [module for module in modules if type(module) in _DESCRIPTIONS]
        if known:
            words.append(_DESCRIPTIONS[type(known[-1])](known[-1]))
        elif link.depth > depth:
            words.append(f"{type(modules[0] if modules else model).__name__}, {link.shape[1]}")
        depth = link.depth
    counted = [(word, len(list(group))) for word, group in groupby(words)]
    return tuple(word if count == 1 else f"[{word}] x {count}" for word, count in counted)


def _convolution(module: nn.Module) -> str:
    conv = cast(nn.Conv2d, module)
    size, stride = conv.kernel_size[0], conv.stride[0]
    return f"conv {size}x{size}, {conv.out_channels}" + (f", stride {stride}" if stride > 1 else "")


def _pooling(module: nn.Module) -> str:
    size, stride = (value[0] if isinstance(value, tuple) else value for value in (module.kernel_size, module.stride))
    return f"maxpool {size}x{size}, {stride}"


def _bottleneck(module: nn.Module) -> str:
    block = cast(Bottleneck, module)
    return f"bottleneck, {block.conv1.out_channels}-{block.conv2.out_channels}-{block.conv3.out_channels}"


_DESCRIPTIONS: Mapping[type[nn.Module], Callable[[Any], str]] = {
    nn.Conv2d: _convolution,
    nn.MaxPool2d: _pooling,
    nn.Linear: lambda module: f"fc {module.out_features}",
    nn.AdaptiveAvgPool2d: lambda _: "average pooling",
    SpatialPyramid: lambda module: f"spp, {braces(module.bins)}",
    Inception: lambda module: f"modified inception, k {module.k}",
    Bottleneck: _bottleneck,
    BasicBlock: lambda module: f"basic block, {module.conv2.out_channels}",
}


def layer_table(stages: Sequence[Stage], losses: Sequence[Loss], title: str) -> Table:
    """Return a network in the format of Table 2, from the lowest layers up, with the losses that train each row."""
    marks = {loss.name: f"({number})" for number, loss in enumerate(losses, start=1)}
    rows: list[tuple[str, ...]] = []
    for index, stage in enumerate(stages):
        size = "-" if stage.input_size is None else f"{stage.input_size}x{stage.input_size}"
        rows.append((size, "".join(marks[loss] for loss in stage.losses) or "none", "; ".join(stage.layers)))
        for loss in (loss for loss in losses[1:] if loss.top == index):
            head = f"auxiliary classifier {marks[loss.name]}, weight {loss.weight:g}, N = {loss.depth}"
            rows.append(("-", "-", head))
    rows.append(("-", "-", f"classifier {marks[losses[0].name]}, N = {losses[0].depth}"))
    return Table(title, ("input size", "gradient", title), tuple(rows))
