"""Deeper networks with more branches in constant memory: a test of the paper's last sentence.

    python -m benchmarks.depth [--quick] [--json FILE]      # also writes a plot next to FILE

A residual network (torchvision's bottleneck blocks, 3, 4, 6 and 3 in the four stages) and a vision transformer (six
blocks), and both with two, four and eight times as many blocks. `suggest_plan` gets the same memory budget for all
depths, `BUDGET` of the peak of standard backpropagation at the lowest depth, and finds the fewest branches that fit. A
step is one forward and one backward pass that accumulates into existing gradients. Memory excludes parameters, their
gradients and the batch, which grow with depth for any method. `benchmarks.memory` and the tests check the gradients.

Metrics, by network and depth: `*_branches`, `*_layers`, `*_peak_mb_a` and `*_ms_a` by contender, and the time ratio
`*_time_early_release_over_standard`. `*_growth` is the peak at the highest depth over that at the lowest; for early
release, the largest peak over that at the lowest depth.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.measure import (
    Metrics,
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
    """The size of a benchmark run.

    Args:
        depths: multiples of the lowest depth, from lowest to highest.
        pixels: side of the images.
        batch: batch size.
        rounds: maximum number of timing rounds.
        budget_s: time limit for timing a network of one depth, in seconds.
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
        """Return the class scores (batch, classes) of tokens (batch, tokens, width)."""
        return self.fc(self.norm(tokens.mean(1)))


def residual_network(depth: int, _pixels: int) -> nn.Module:
    """Return a network of bottleneck blocks: 50 layers at depth 1."""
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [3 * depth, 4 * depth, 6 * depth, 3 * depth], num_classes=CLASSES)


def vision_transformer(depth: int, pixels: int) -> nn.Module:
    """Return a network of encoder blocks of width 384: six blocks at depth 1."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(pixels, 16, 6 * depth, 6, 384, 1536, num_classes=CLASSES)


def head_for_shape(shape: tuple[int, ...]) -> nn.Module:
    """Return a head for a map (batch, channels, height, width) or tokens (batch, tokens, width)."""
    return LinearHead(shape[1], CLASSES) if len(shape) == 4 else MeanTokenHead(shape[2])


def measure_depth(
    name: str,
    build: Callable[[int, int], nn.Module],
    depth: int,
    settings: Settings,
    device: str,
    budget: int | None,
) -> tuple[Metrics, int]:
    """Measure the memory and time of one network.

    Returns:
        The metrics, and the memory budget: the given one, or the peak of the lowest depth.
    """
    with torch.device(device):
        model = build(depth, settings.pixels)
        images = torch.randn(settings.batch, 3, settings.pixels, settings.pixels)
        labels = torch.randint(CLASSES, (settings.batch,))
    if budget is None:
        budget = int(BUDGET * cost(model, Plan(), images).peaks["standard"])
    suggestion = suggest_plan(model, images, memory_budget=budget)
    heads = {head: head_for_shape(shape).to(device) for head, shape in suggestion.head_inputs.items()}
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
    result = ratio(times["early_release"], times["standard"])
    key = f"{name}_x{depth}"
    metrics: Metrics = {
        f"{key}_layers": sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules()),
        f"{key}_branches": len(heads),
        f"{key}_time_early_release_over_standard": result.median,
        f"{key}_time_early_release_over_standard_error": result.error,
    }
    metrics |= {f"{key}_peak_mb_{contender}": peak / MB for contender, peak in peaks.items()}
    metrics |= {f"{key}_ms_{contender}": 1000 * statistics.median(seconds) for contender, seconds in times.items()}
    return metrics, budget


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(settings: Settings, device: str = "cpu") -> Metrics:
    """Return all metrics."""
    metrics: Metrics = {}
    for name, build in {"resnet": residual_network, "vit": vision_transformer}.items():
        budget = None
        for depth in settings.depths:
            results, budget = measure_depth(name, build, depth, settings, device, budget)
            metrics |= results
        lowest, highest = settings.depths[0], settings.depths[-1]
        early = [metrics[f"{name}_x{depth}_peak_mb_early_release"] for depth in settings.depths]
        standard = [metrics[f"{name}_x{depth}_peak_mb_standard"] for depth in (lowest, highest)]
        metrics |= {
            f"{name}_early_release_growth": max(early) / early[0],
            f"{name}_standard_growth": standard[1] / standard[0],
        }
    return metrics


def picture(metrics: Metrics, depths: Sequence[int]) -> Figure:
    """Plot peak memory against depth, with the time ratio as labels."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        panels = figure.subplots(1, 2, squeeze=False)[0]
        for axes, (name, title) in zip(panels, TITLES.items(), strict=True):
            for contender, colour, label in (
                ("standard", "#4d4d4d", "standard BP"),
                ("early_release", "#009e73", "relay, early release"),
            ):
                values = [metrics[f"{name}_x{depth}_peak_mb_{contender}"] for depth in depths]
                axes.plot(depths, values, "o-", color=colour, label=label)
            for depth in depths:
                key = f"{name}_x{depth}"
                time = metrics[f"{key}_time_early_release_over_standard"]
                text = f"{metrics[f'{key}_branches']:.0f} branches\n{time:.2f} x time"
                position = (depth, metrics[f"{key}_peak_mb_early_release"])
                axes.annotate(text, position, (0, -8), textcoords="offset points", ha="center", va="top", fontsize=8)
            axes.set(xscale="log", yscale="log", title=title, xlabel="depth", ylabel="memory of a step, MB")
            axes.set_xticks(depths, [f"x{depth}\n{metrics[f'{name}_x{depth}_layers']:.0f} layers" for depth in depths])
            low, high = axes.get_ylim()
            axes.set_ylim(low / 2, high)
            ticks = [tick for tick in (20, 50, 100, 200, 500, 1000, 2000, 5000) if low / 2 < tick < high]
            axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
            axes.minorticks_off()
            axes.margins(x=0.15)
        panels[0].legend(loc="upper left", fontsize=10)
    return figure


def targets() -> dict[str, Target]:
    """Return the targets of the metrics."""
    return {f"{name}_early_release_growth": Target("<=", 1.2) for name in ("resnet", "vit")}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark: print the metrics, and write them to a file if --json is given."""
    arguments = parse_arguments("depth", "Measure memory and time of networks of growing depth.", argv)
    settings, device, about = begin(arguments, quick=QUICK, full=FULL, gpu=GPU, seed=SEED)
    metrics = measure(settings, device)
    about |= {
        "pixels": settings.pixels,
        "batch": settings.batch,
    }
    publish(metrics, targets(), about, arguments.json)
    if arguments.json is not None:
        write_figure(picture(metrics, settings.depths), arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
