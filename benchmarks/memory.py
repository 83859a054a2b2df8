"""What early release saves, and what it costs, against what else one would do about memory.

    python -m benchmarks.memory [--quick] [--json FILE]

ResNet-50 and ViT-B/16, torchvision's, each with two auxiliary branches. A step is one forward and one backward pass,
into gradients that are there already. Contenders first have to give the right gradients; then they take turns
(`benchmarks.measure`).

| contender         | what it is                                                                                  |
| ----------------- | --------------------------------------------------------------------------------------------- |
| standard          | no heads, one loss                                                                          |
| multi_loss        | both heads, all losses down to the first layer, one backward pass                           |
| relay             | the plan's windows, one forward and one backward pass                                       |
| early_release     | the same gradients by `Relay.forward_backward`                                              |
| isolated_release  | windows without overlap by `Relay.forward_backward`: gradient-isolated training             |
| checkpoint_every  | standard, each block in `torch.utils.checkpoint`                                            |
| checkpoint_second | standard, every second block                                                                |
| checkpoint_equal  | standard, the fewest blocks from the lowest up with which its peak is early release's or less |

Figures: `*_activation_ratio` is the most that autograd keeps at once, over standard's; `*_peak_mb_a` the most that the
allocator holds at once besides parameters, gradients and the batch, temporary buffers included; `*_peak_predicted_a`
what `relaybackprop.planning.cost` says over what was measured; `*_time_a_over_b` and so on as in `benchmarks.engine`.
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
    Figures,
    Step,
    Target,
    begin,
    interleave,
    kept_bytes,
    parse_arguments,
    peak_bytes,
    publish,
    ratio,
)
from relaybackprop import AuxiliaryHead, Plan, Relay, RelayLoss, Window, cost

SEED = 20160916
GRADIENT_TOLERANCE = 1e-9  # float64, relative to a tensor's largest element
PREDICTED = ("standard", "multi_loss", "relay", "early_release")
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much to run.

    Args:
        pixels: side of the images.
        resnet50_batch: how many of them.
        vit_b_batch: likewise.
        rounds: of every timing, at most.
        budget_s: stop timing a network after so long.
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
class Subject:
    """A network with two branches.

    Args:
        model: without the heads.
        plan: its windows.
        heads: by name.
        blocks: what one would checkpoint, from the lowest up.
        images: a batch.
        labels: its classes.
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
    """What a vision transformer ends with: normalisation and a linear layer on the class token."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Class scores (batch, classes) from tokens (batch, tokens, width)."""
        return self.fc(self.norm(tokens[:, 0]))


def resnet50(pixels: int, batch: int, *, classes: int = 1000, device: str = "cpu") -> Subject:
    """ResNet-50; heads in the first and the second stage, since that is where its activations are."""
    from torchvision.models import resnet50 as build

    with torch.device(device):
        model = build(num_classes=classes)
        heads: dict[str, nn.Module] = {"low": AuxiliaryHead(256, classes), "high": AuxiliaryHead(512, classes)}
    for head in heads.values():
        head.dropout = nn.Identity()  # chance would tell contenders apart
    plan = Plan(
        Window(bottom="layer2.1"), {"low": Window(top="layer1.1"), "high": Window(top="layer2.1", bottom="layer1.1")}
    )
    blocks = [*model.layer1, *model.layer2, *model.layer3, *model.layer4]
    return Subject(model, plan, heads, blocks, *_batch(pixels, batch, classes, device))


def vit_b(pixels: int, batch: int, *, classes: int = 1000, device: str = "cpu") -> Subject:
    """ViT-B/16; heads behind the fifth and the eighth of its twelve blocks."""
    from torchvision.models import vit_b_16 as build

    with torch.device(device):
        model = build(image_size=pixels, num_classes=classes)
        heads: dict[str, nn.Module] = {"low": TokenHead(768, classes), "high": TokenHead(768, classes)}
    nn.init.normal_(cast(Any, model.heads.head).weight, std=0.02)  # torchvision's zeros would let no gradient through
    at = "encoder.layers.encoder_layer_{}".format
    plan = Plan(Window(bottom=at(7)), {"low": Window(top=at(4)), "high": Window(top=at(7), bottom=at(4))})
    return Subject(model, plan, heads, list(model.encoder.layers), *_batch(pixels, batch, classes, device))


def _batch(pixels: int, batch: int, classes: int, device: str) -> tuple[Tensor, Tensor]:
    with torch.device(device):
        return torch.randn(batch, 3, pixels, pixels), torch.randint(classes, (batch,))


def contenders(subject: Subject) -> dict[str, Step]:
    """All but `checkpoint_equal`, on the same weights."""
    s, criterion = subject, nn.CrossEntropyLoss()

    def standard() -> None:
        with _half_precision(s.images):
            loss = criterion(s.model(s.images), s.labels)
        loss.backward()

    def by_relay(plan: Plan) -> Step:
        relay, loss = Relay(s.model, plan, s.heads), RelayLoss(criterion)

        def step() -> None:
            with _half_precision(s.images):
                value = loss(relay(s.images), s.labels)
            value.backward()

        return step

    def by_step(plan: Plan) -> Step:
        relay, loss = Relay(s.model, plan, s.heads), RelayLoss(criterion)

        def step() -> None:
            with _half_precision(s.images):
                relay.forward_backward(s.images, target=s.labels, loss=loss)

        return step

    return {
        "standard": standard,
        "multi_loss": by_relay(s.plan.multi_loss()),
        "relay": by_relay(s.plan),
        "early_release": by_step(s.plan),
        "isolated_release": by_step(s.plan.isolated()),
        "checkpoint_every": checkpointing(standard, s.blocks),
        "checkpoint_second": checkpointing(standard, s.blocks[::2]),
    }


def _half_precision(images: Tensor) -> torch.autocast:
    """On a GPU as one would train there; on a CPU in float32."""
    return torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda)


def checkpointing(step: Step, blocks: Sequence[nn.Module]) -> Step:
    """The same step with some modules recomputed in the backward pass."""

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


def check_gradients(subject: Subject) -> None:
    """Raise unless contenders that claim the same gradients have them, in float64, on two images.

    Raises:
        RuntimeError: which contender, and where.
    """
    exact = replace(subject, images=subject.images[:2].double(), labels=subject.labels[:2])
    copied = copy.deepcopy(exact)
    copied.modules.double()
    steps = contenders(copied)
    found: dict[str, dict[str, Tensor | None]] = {}
    for name in ("standard", "multi_loss", "relay", "early_release", "checkpoint_every"):
        copied.modules.zero_grad()
        steps[name]()
        found[name] = {parameter: tensor.grad for parameter, tensor in copied.modules.named_parameters()}
    for name, peer in (("early_release", "relay"), ("checkpoint_every", "standard")):
        for parameter, right in found[peer].items():
            if not _is_same(found[name][parameter], right):
                raise RuntimeError(f"{name} and {peer} differ in the gradient of {parameter}: their times mean nothing")
    first = next(iter(found["relay"]))
    if _is_same(found["relay"][first], found["multi_loss"][first]):
        raise RuntimeError(f"relay and multi_loss agree in the gradient of {first}: the plan has no effect")


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return bool((one - other).abs().max() <= GRADIENT_TOLERANCE * other.abs().max())


def measure_network(name: str, subject: Subject, settings: Settings) -> Figures:
    """Memory and time of all contenders on one network."""
    check_gradients(subject)
    steps = contenders(subject)
    parameters = list(subject.modules.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for step in steps.values():
        step()  # the first step of each searches the graph and fills caches
    peaks = {contender: peak_bytes(step) for contender, step in steps.items()}
    count = _fewest(subject, steps["standard"], peaks["early_release"])
    steps["checkpoint_equal"] = checkpointing(steps["standard"], subject.blocks[:count])
    peaks["checkpoint_equal"] = peak_bytes(steps["checkpoint_equal"])
    owned = [*parameters, *subject.modules.buffers(), subject.images]
    kept = {contender: kept_bytes(steps[contender], owned) for contender in ("standard", "early_release")}
    figures: Figures = {
        f"{name}_two_branches_activation_ratio": kept["early_release"] / kept["standard"],
        f"{name}_two_branches_peak_ratio": peaks["early_release"] / peaks["standard"],
        f"{name}_checkpointed_blocks": count,
    }
    figures |= {f"{name}_peak_mb_{contender}": peak / MB for contender, peak in peaks.items()}
    counted = cost(subject.model, subject.plan, subject.images, subject.heads)
    figures |= {f"{name}_peak_predicted_{scheme}": counted.peaks[scheme] / peaks[scheme] for scheme in PREDICTED}
    standard = counted.totals["standard"].flops
    figures |= {f"{name}_flops_{scheme}": counted.totals[scheme].flops / standard for scheme in PREDICTED}

    def synchronised(step: Step) -> Step:
        def timed() -> None:
            step()
            if subject.images.is_cuda:
                torch.cuda.synchronize()

        return timed

    every = {contender: synchronised(step) for contender, step in steps.items()}
    times = interleave(every, rounds=settings.rounds, budget_s=settings.budget_s, warmup=1)
    figures |= {f"{name}_ms_{contender}": 1000 * statistics.median(seconds) for contender, seconds in times.items()}
    figures[f"{name}_rounds"] = len(times["standard"])
    for under in ("standard", "multi_loss", "relay", "isolated_release"):
        figures |= _ratio(f"{name}_time_early_release_over_{under}", times["early_release"], times[under])
    for under in ("every", "second", "equal"):
        key = f"{name}_time_early_release_over_checkpoint_{under}"
        figures |= _ratio(key, times["early_release"], times[f"checkpoint_{under}"])
    return figures


def _fewest(subject: Subject, standard: Step, limit: int) -> int:
    """How many blocks, from the lowest up, have to be recomputed for a peak within the limit; all if none suffice."""
    low, high = 0, len(subject.blocks)
    while low < high:
        middle = (low + high) // 2
        if peak_bytes(checkpointing(standard, subject.blocks[:middle])) <= limit:
            high = middle
        else:
            low = middle + 1
    return low


def _ratio(key: str, over: Sequence[float], under: Sequence[float]) -> Figures:
    found = ratio(over, under)
    return {key: found.median, f"{key}_iqr": found.iqr, f"{key}_error": found.error}


def measure(settings: Settings, device: str = "cpu") -> Figures:
    """All figures."""
    networks: Mapping[str, tuple[Callable[..., Subject], int]] = {
        "resnet50": (resnet50, settings.resnet50_batch),
        "vit_b": (vit_b, settings.vit_b_batch),
    }
    figures: Figures = {}
    for name, (build, batch) in networks.items():
        figures |= measure_network(name, build(settings.pixels, batch, device=device), settings)
    pairs = {
        "time_over_multi_loss": "time_early_release_over_multi_loss",
        "time_over_checkpointing_at_equal_memory": "time_early_release_over_checkpoint_equal",
    }
    for key, part in pairs.items():  # the network where it is worse
        worst = max(networks, key=lambda name: figures[f"{name}_{part}"])
        figures |= {key + end: figures[f"{worst}_{part}{end}"] for end in ("", "_iqr", "_error")}
    predicted = [value for key, value in figures.items() if "_peak_predicted_" in key]
    return figures | {"peak_prediction_error": max(abs(value - 1) for value in predicted)}


def targets(*, quick: bool) -> dict[str, Target]:
    """What the figures have to reach."""
    # Small images leave workspaces, which nobody predicts, a large part in the peak.
    predicted = {} if quick else {"peak_prediction_error": Target("<=", 0.1)}
    return {
        "resnet50_two_branches_activation_ratio": Target("<=", 0.5),
        "vit_b_two_branches_activation_ratio": Target("<=", 0.5),
        "time_over_multi_loss": Target("<=", 1.12),
        "time_over_checkpointing_at_equal_memory": Target("<", 1.0),
        **predicted,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures, and write them to a file if asked to."""
    arguments = parse_arguments("memory", "Measure what early release saves and costs.", argv)
    settings, device, about = begin(arguments, quick=QUICK, full=FULL, gpu=GPU, seed=SEED)
    figures = measure(settings, device)
    about |= {
        "pixels": settings.pixels,
        "resnet50_batch": settings.resnet50_batch,
        "vit_b_batch": settings.vit_b_batch,
    }
    publish(figures, targets(quick=arguments.quick), about, arguments.json)


if __name__ == "__main__":
    main()
