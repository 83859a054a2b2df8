"""Deeper networks with more branches, in the memory of one window: the paper's last sentence, tried.

    python -m benchmarks.depth [--quick] [--json FILE]      # and a picture beside the file

A residual network (torchvision's bottleneck blocks, 3, 4, 6 and 3 in the four stages) and a vision transformer (six
blocks), and both with two, four and eight times as many blocks. `suggest_plan` gets the same memory budget for all
depths, `BUDGET` of what standard backpropagation needs at the least depth, and finds the fewest branches that will do.
A step is one forward and one backward pass into gradients that are there already; memory is counted besides parameters,
their gradients and the batch, which grow with depth whatever one does. Gradients are those of the ordinary engine: see
`benchmarks.memory`, which checks that, and the tests.

Figures: by network and depth, `*_branches`, `*_layers`, `*_peak_mb_a` and `*_ms_a` by contender, the time ratio
`*_time_early_release_over_standard`; `*_growth` is the peak at the greatest depth over that at the least, and for early
release the largest over that at the least.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.measure import (
    Figures,
    Step,
    Target,
    begin,
    interleave,
    parse_arguments,
    peak_bytes,
    publish,
    ratio,
)
from relaybackprop import LinearHead, Plan, Relay, RelayLoss, cost, suggest_plan
from relaylab.report.style import STYLE, write_figure

SEED = 20160916
BUDGET = 0.65
CLASSES = 100
TITLES = {"resnet": "Residual network", "vit": "Vision transformer"}
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much to run.

    Args:
        depths: multiples of the least depth, the least first.
        pixels: side of the images.
        batch: how many of them.
        rounds: of every timing, at most.
        budget_s: stop timing a network of one depth after so long.
    """

    depths: tuple[int, ...]
    pixels: int
    batch: int
    rounds: int
    budget_s: float


FULL = Settings(depths=(1, 2, 4, 8), pixels=96, batch=16, rounds=20, budget_s=30)
QUICK = Settings(depths=(1, 2), pixels=64, batch=4, rounds=3, budget_s=2)
GPU = Settings(depths=(1, 2, 4, 8), pixels=224, batch=64, rounds=30, budget_s=20)


class MeanTokenHead(nn.Module):
    """Class scores from the mean token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, width) to (batch, classes)."""
        return self.fc(self.norm(tokens.mean(1)))


def residual_network(depth: int, _pixels: int) -> nn.Module:
    """Bottleneck blocks: 50 layers at depth 1."""
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [3 * depth, 4 * depth, 6 * depth, 3 * depth], num_classes=CLASSES)


def vision_transformer(depth: int, pixels: int) -> nn.Module:
    """Encoder blocks of width 384: six at depth 1."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(pixels, 16, 6 * depth, 6, 384, 1536, num_classes=CLASSES)


def head_on(shape: tuple[int, ...]) -> nn.Module:
    """For a map (batch, channels, h, w) or tokens (batch, tokens, width)."""
    return LinearHead(shape[1], CLASSES) if len(shape) == 4 else MeanTokenHead(shape[2])


def measure_depth(
    name: str,
    build: Callable[[int, int], nn.Module],
    depth: int,
    settings: Settings,
    device: str,
    budget: int | None,
) -> tuple[Figures, int]:
    """Memory and time of one network.

    Returns:
        The figures, and the memory budget: the given one, or that of the least depth.
    """
    with torch.device(device):
        model = build(depth, settings.pixels)
        images = torch.randn(settings.batch, 3, settings.pixels, settings.pixels)
        labels = torch.randint(CLASSES, (settings.batch,))
    if budget is None:
        budget = int(BUDGET * cost(model, Plan(), images).peaks["standard"])
    suggestion = suggest_plan(model, images, memory_budget=budget)
    heads = {head: head_on(shape).to(device) for head, shape in suggestion.head_inputs.items()}
    relay, loss = Relay(model, suggestion.plan, heads), RelayLoss(nn.CrossEntropyLoss())
    for parameter in relay.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def standard() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        _wait(device)

    def early_release() -> None:
        relay.forward_backward(images, target=labels, loss=loss)
        _wait(device)

    steps: Mapping[str, Step] = {"standard": standard, "early_release": early_release}
    for step in steps.values():
        step()
    peaks = {contender: peak_bytes(step) for contender, step in steps.items()}
    times = interleave(steps, rounds=settings.rounds, budget_s=settings.budget_s, warmup=1)
    found = ratio(times["early_release"], times["standard"])
    key = f"{name}_x{depth}"
    figures: Figures = {
        f"{key}_layers": sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules()),
        f"{key}_branches": len(heads),
        f"{key}_time_early_release_over_standard": found.median,
        f"{key}_time_early_release_over_standard_error": found.error,
    }
    figures |= {f"{key}_peak_mb_{contender}": peak / MB for contender, peak in peaks.items()}
    figures |= {f"{key}_ms_{contender}": 1000 * statistics.median(seconds) for contender, seconds in times.items()}
    return figures, budget


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(settings: Settings, device: str = "cpu") -> Figures:
    """All figures."""
    figures: Figures = {}
    for name, build in {"resnet": residual_network, "vit": vision_transformer}.items():
        budget = None
        for depth in settings.depths:
            found, budget = measure_depth(name, build, depth, settings, device, budget)
            figures |= found
        least, greatest = settings.depths[0], settings.depths[-1]
        early = [figures[f"{name}_x{depth}_peak_mb_early_release"] for depth in settings.depths]
        standard = [figures[f"{name}_x{depth}_peak_mb_standard"] for depth in (least, greatest)]
        figures |= {
            f"{name}_early_release_growth": max(early) / early[0],
            f"{name}_standard_growth": standard[1] / standard[0],
        }
    return figures


def picture(figures: Figures, depths: Sequence[int]) -> Figure:
    """Peak memory, and above it the price in time, against depth."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        panels = figure.subplots(1, 2, squeeze=False)[0]
        for axes, (name, title) in zip(panels, TITLES.items(), strict=True):
            for contender, colour, label in (
                ("standard", "#4d4d4d", "standard BP"),
                ("early_release", "#009e73", "relay, early release"),
            ):
                values = [figures[f"{name}_x{depth}_peak_mb_{contender}"] for depth in depths]
                axes.plot(depths, values, "o-", color=colour, label=label)
            for depth in depths:
                key = f"{name}_x{depth}"
                time = figures[f"{key}_time_early_release_over_standard"]
                text = f"{figures[f'{key}_branches']:.0f} branches\n{time:.2f} x time"
                place = (depth, figures[f"{key}_peak_mb_early_release"])
                axes.annotate(text, place, (0, -8), textcoords="offset points", ha="center", va="top", fontsize=8)
            axes.set(xscale="log", yscale="log", title=title, xlabel="depth", ylabel="memory of a step, MB")
            axes.set_xticks(depths, [f"x{depth}\n{figures[f'{name}_x{depth}_layers']:.0f} layers" for depth in depths])
            low, high = axes.get_ylim()
            axes.set_ylim(low / 2, high)
            ticks = [tick for tick in (20, 50, 100, 200, 500, 1000, 2000, 5000) if low / 2 < tick < high]
            axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
            axes.minorticks_off()
            axes.margins(x=0.15)
        panels[0].legend(loc="upper left", fontsize=10)
    return figure


def targets() -> dict[str, Target]:
    """What the figures have to reach."""
    return {f"{name}_early_release_growth": Target("<=", 1.2) for name in ("resnet", "vit")}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures, and write them to a file if asked to."""
    arguments = parse_arguments("depth", "Measure memory and time of networks of growing depth.", argv)
    settings, device, about = begin(arguments, quick=QUICK, full=FULL, gpu=GPU, seed=SEED)
    figures = measure(settings, device)
    about |= {
        "pixels": settings.pixels,
        "batch": settings.batch,
    }
    publish(figures, targets(), about, arguments.json)
    if arguments.json is not None:
        write_figure(picture(figures, settings.depths), arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
