"""The memory and time of early release, against other methods to save memory.

    python -m benchmarks.memory [--quick] [--json FILE]

torchvision's ResNet-50 and ViT-B/16, each with two auxiliary branches. A step is one forward and one backward pass that
accumulates into existing gradients. Gradients are checked first; then the contenders take turns
(`benchmarks.measure`).

| contender         | description                                                                                   |
| ----------------- | --------------------------------------------------------------------------------------------- |
| standard          | no heads, one loss                                                                          |
| multi_loss        | both heads, all losses down to the first layer, one backward pass                           |
| relay             | the plan's windows, one forward and one backward pass                                       |
| early_release     | the same gradients by `Relay.forward_backward`                                              |
| isolated_release  | windows without overlap by `Relay.forward_backward`: gradient-isolated training             |
| checkpoint_every  | standard, each block in `torch.utils.checkpoint`                                            |
| checkpoint_second | standard, every second block                                                                |
| checkpoint_equal  | standard, the fewest blocks from the lowest up with which its peak is early release's or less |

Metrics: `*_activation_ratio` is the peak of the bytes that autograd saves, relative to standard backpropagation.
`*_peak_mb_a` is the peak of allocated memory without parameters, gradients and the batch, but with temporary buffers.
`*_peak_predicted_a` is the prediction of `relaybackprop.planning.cost` over the measured peak. `*_time_a_over_b` and
others are as in `benchmarks.engine`.
"""

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    saved_bytes,
)
from relaybackprop import AuxiliaryHead, Plan, Relay, RelayLoss, Window, cost

SEED = 20160916
GRADIENT_TOLERANCE = 1e-9  # float64, relative to a tensor's largest element
PREDICTED = ("standard", "multi_loss", "relay", "early_release")
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of a benchmark run.

    Args:
        pixels: side of the images.
        resnet50_batch: batch size of ResNet-50.
        vit_b_batch: batch size of ViT-B/16.
        rounds: maximum number of timing rounds.
        budget_s: time limit for timing one network, in seconds.
    """

    pixels: int = 224
    resnet50_batch: int
    vit_b_batch: int
    rounds: int
    budget_s: float


FULL = Settings(resnet50_batch=4, vit_b_batch=2, rounds=40, budget_s=200)
QUICK = Settings(pixels=64, resnet50_batch=2, vit_b_batch=2, rounds=3, budget_s=4)
GPU = Settings(resnet50_batch=128, vit_b_batch=64, rounds=40, budget_s=60)


@dataclass(frozen=True)
class Workload:
    """A network with two branches.

    Args:
        model: the model without the heads.
        plan: the windows.
        heads: the heads by name.
        blocks: the modules to checkpoint, from lowest to highest.
        images: images of a batch.
        labels: labels of the batch.
    """

    model: nn.Module
    plan: Plan
    heads: dict[str, nn.Module]
    blocks: list[nn.Module]
    images: Tensor
    labels: Tensor

    @property
    def modules(self) -> nn.ModuleDict:
        """The model and the heads."""
        return nn.ModuleDict({"model": self.model, **self.heads})


class TokenHead(nn.Module):
    """The end of a vision transformer: layer normalisation and a linear layer on the class token."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the class scores (batch, classes) of tokens (batch, tokens, width)."""
        return self.fc(self.norm(tokens[:, 0]))


def resnet50(pixels: int, batch: int, *, classes: int = 1000, device: str = "cpu") -> Workload:
    """Return ResNet-50 with heads in the first and the second stage, which save most of its activations."""
    from torchvision.models import resnet50 as build

    with torch.device(device):
        model = build(num_classes=classes)
        heads: dict[str, nn.Module] = {"low": AuxiliaryHead(256, classes), "high": AuxiliaryHead(512, classes)}
    for head in heads.values():
        head.dropout = nn.Identity()  # random masks would make contenders differ
    plan = Plan(
        Window(bottom="layer2.1"), {"low": Window(top="layer1.1"), "high": Window(top="layer2.1", bottom="layer1.1")}
    )
    blocks = [*model.layer1, *model.layer2, *model.layer3, *model.layer4]
    return Workload(model, plan, heads, blocks, *_batch(pixels, batch, classes, device))


def vit_b(pixels: int, batch: int, *, classes: int = 1000, device: str = "cpu") -> Workload:
    """Return ViT-B/16 with heads after the fifth and the eighth of its twelve blocks."""
    from torchvision.models import vit_b_16 as build

    with torch.device(device):
        model = build(image_size=pixels, num_classes=classes)
        heads: dict[str, nn.Module] = {"low": TokenHead(768, classes), "high": TokenHead(768, classes)}
    nn.init.normal_(
        cast(Any, model.heads.head).weight, std=0.02
    )  # torchvision initialises to zeros, which would block gradients
    low, high = "encoder.layers.encoder_layer_4", "encoder.layers.encoder_layer_7"
    plan = Plan(Window(bottom=high), {"low": Window(top=low), "high": Window(top=high, bottom=low)})
    return Workload(model, plan, heads, list(model.encoder.layers), *_batch(pixels, batch, classes, device))


def _batch(pixels: int, batch: int, classes: int, device: str) -> tuple[Tensor, Tensor]:
    with torch.device(device):
        return torch.randn(batch, 3, pixels, pixels), torch.randint(classes, (batch,))


def contenders(workload: Workload) -> dict[str, Step]:
    """Return all contenders except `checkpoint_equal`, on the same weights."""
    w, criterion = workload, nn.CrossEntropyLoss()

    def standard() -> None:
        with _half_precision(w.images):
            loss = criterion(w.model(w.images), w.labels)
        loss.backward()

    def relay_step(plan: Plan) -> Step:
        relay, loss = Relay(w.model, plan, w.heads), RelayLoss(criterion)

        def step() -> None:
            with _half_precision(w.images):
                value = loss(relay(w.images), w.labels)
            value.backward()

        return step

    def release_step(plan: Plan) -> Step:
        relay, loss = Relay(w.model, plan, w.heads), RelayLoss(criterion)

        def step() -> None:
            with _half_precision(w.images):
                relay.forward_backward(w.images, target=w.labels, loss=loss)

        return step

    return {
        "standard": standard,
        "multi_loss": relay_step(w.plan.multi_loss()),
        "relay": relay_step(w.plan),
        "early_release": release_step(w.plan),
        "isolated_release": release_step(w.plan.isolated()),
        "checkpoint_every": checkpointing(standard, w.blocks),
        "checkpoint_second": checkpointing(standard, w.blocks[::2]),
    }


def _half_precision(images: Tensor) -> torch.autocast:
    """Return bfloat16 autocast on a GPU, and disabled autocast on a CPU."""
    return torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda)


def checkpointing(step: Step, blocks: Sequence[nn.Module]) -> Step:
    """Return the same step with some modules recomputed in the backward pass."""

    def checkpointed() -> None:
        with _recomputed(blocks):
            step()

    return checkpointed


@contextmanager
def _recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    for block in blocks:
        plain: Callable[..., Any] = block.forward
        block.forward = partial(checkpoint, plain, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def check_gradients(workload: Workload) -> None:
    """Check that contenders that claim the same gradients compute them, in float64, on two images.

    Raises:
        RuntimeError: the gradients of two contenders differ, or the plan has no effect.
    """
    exact = replace(workload, images=workload.images[:2].double(), labels=workload.labels[:2])
    copied = copy.deepcopy(exact)
    copied.modules.double()
    steps = contenders(copied)
    gradients: dict[str, dict[str, Tensor | None]] = {}
    for name in ("standard", "multi_loss", "relay", "early_release", "checkpoint_every"):
        copied.modules.zero_grad()
        steps[name]()
        gradients[name] = {parameter: tensor.grad for parameter, tensor in copied.modules.named_parameters()}
    for name, peer in (("early_release", "relay"), ("checkpoint_every", "standard")):
        for parameter, right in gradients[peer].items():
            if not _is_close(gradients[name][parameter], right):
                raise RuntimeError(
                    f"{name} and {peer} differ in the gradient of {parameter}: their times are meaningless"
                )
    first = next(iter(gradients["relay"]))
    if _is_close(gradients["relay"][first], gradients["multi_loss"][first]):
        raise RuntimeError(f"relay and multi_loss agree in the gradient of {first}: the plan has no effect")


def _is_close(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return bool((first - second).abs().max() <= GRADIENT_TOLERANCE * second.abs().max())


def measure_network(name: str, workload: Workload, settings: Settings) -> Metrics:
    """Measure the memory and time of all contenders on one network."""
    check_gradients(workload)
    steps = contenders(workload)
    parameters = list(workload.modules.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for step in steps.values():
        step()  # the first step of each searches the graph and fills caches
    peaks = {contender: peak_bytes(step) for contender, step in steps.items()}
    count = _fewest_blocks(workload, steps["standard"], peaks["early_release"])
    steps["checkpoint_equal"] = checkpointing(steps["standard"], workload.blocks[:count])
    peaks["checkpoint_equal"] = peak_bytes(steps["checkpoint_equal"])
    owned = [*parameters, *workload.modules.buffers(), workload.images]
    saved = {contender: saved_bytes(steps[contender], owned) for contender in ("standard", "early_release")}
    metrics: Metrics = {
        f"{name}_two_branches_activation_ratio": saved["early_release"] / saved["standard"],
        f"{name}_two_branches_peak_ratio": peaks["early_release"] / peaks["standard"],
        f"{name}_checkpointed_blocks": count,
    }
    metrics |= {f"{name}_peak_mb_{contender}": peak / MB for contender, peak in peaks.items()}
    predicted = cost(workload.model, workload.plan, workload.images, workload.heads)
    metrics |= {f"{name}_peak_predicted_{scheme}": predicted.peaks[scheme] / peaks[scheme] for scheme in PREDICTED}
    standard = predicted.totals["standard"].flops
    metrics |= {f"{name}_flops_{scheme}": predicted.totals[scheme].flops / standard for scheme in PREDICTED}

    def synchronized(step: Step) -> Step:
        def timed() -> None:
            step()
            if workload.images.is_cuda:
                torch.cuda.synchronize()

        return timed

    synchronized_steps = {contender: synchronized(step) for contender, step in steps.items()}
    times = interleave(synchronized_steps, rounds=settings.rounds, budget_s=settings.budget_s, warmup=1)
    metrics |= {f"{name}_ms_{contender}": 1000 * statistics.median(seconds) for contender, seconds in times.items()}
    metrics[f"{name}_rounds"] = len(times["standard"])
    for peer in ("standard", "multi_loss", "relay", "isolated_release"):
        metrics |= _ratio(f"{name}_time_early_release_over_{peer}", times["early_release"], times[peer])
    for peer in ("every", "second", "equal"):
        key = f"{name}_time_early_release_over_checkpoint_{peer}"
        metrics |= _ratio(key, times["early_release"], times[f"checkpoint_{peer}"])
    return metrics


def _fewest_blocks(workload: Workload, standard: Step, limit: int) -> int:
    """Return the smallest number of blocks, from the lowest, to recompute for a peak within the limit; at most all."""
    low, high = 0, len(workload.blocks)
    while low < high:
        middle = (low + high) // 2
        if peak_bytes(checkpointing(standard, workload.blocks[:middle])) <= limit:
            high = middle
        else:
            low = middle + 1
    return low


def _ratio(key: str, numerator: Sequence[float], denominator: Sequence[float]) -> Metrics:
    result = ratio(numerator, denominator)
    return {key: result.median, f"{key}_iqr": result.iqr, f"{key}_error": result.error}


def measure(settings: Settings, device: str = "cpu") -> Metrics:
    """Return all metrics."""
    networks: Mapping[str, tuple[Callable[..., Workload], int]] = {
        "resnet50": (resnet50, settings.resnet50_batch),
        "vit_b": (vit_b, settings.vit_b_batch),
    }
    metrics: Metrics = {}
    for name, (build, batch) in networks.items():
        metrics |= measure_network(name, build(settings.pixels, batch, device=device), settings)
    pairs = {
        "time_over_multi_loss": "time_early_release_over_multi_loss",
        "time_over_checkpointing_at_equal_memory": "time_early_release_over_checkpoint_equal",
    }
    for key, metric in pairs.items():  # for the network with the worse value
        worst = max(networks, key=lambda name: metrics[f"{name}_{metric}"])
        metrics |= {key + end: metrics[f"{worst}_{metric}{end}"] for end in ("", "_iqr", "_error")}
    predicted = [value for key, value in metrics.items() if "_peak_predicted_" in key]
    return metrics | {"peak_prediction_error": max(abs(value - 1) for value in predicted)}


def targets(*, quick: bool) -> dict[str, Target]:
    """Return the targets of the metrics."""
    # With small images, workspaces, which are not predicted, are a large part of the peak.
    predicted = {} if quick else {"peak_prediction_error": Target("<=", 0.1)}
    return {
        "resnet50_two_branches_activation_ratio": Target("<=", 0.5),
        "vit_b_two_branches_activation_ratio": Target("<=", 0.5),
        "time_over_multi_loss": Target("<=", 1.12),
        "time_over_checkpointing_at_equal_memory": Target("<", 1.0),
        **predicted,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark: print the metrics, and write them to a file if --json is given."""
    arguments = parse_arguments("memory", "Measure the memory and time of early release.", argv)
    settings, device, about = begin(arguments, quick=QUICK, full=FULL, gpu=GPU, seed=SEED)
    metrics = measure(settings, device)
    about |= {
        "pixels": settings.pixels,
        "resnet50_batch": settings.resnet50_batch,
        "vit_b_batch": settings.vit_b_batch,
    }
    publish(metrics, targets(quick=arguments.quick), about, arguments.json)


if __name__ == "__main__":
    main()
