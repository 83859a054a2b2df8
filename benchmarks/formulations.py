"""Five formulations of the same gradients: operations, memory and time, on four networks with the paper's windows.

    python -m benchmarks.formulations [--quick] [--json FILE]

ResNet-50, models A and B, and ViT-B/16 with one head and two of its twelve blocks in both windows. Contenders are
the formulations of `benchmarks.engine`, and two more:

| contender     | description                                                                                    |
| ------------- | ---------------------------------------------------------------------------------------------- |
| early_release | `Relay.forward_backward`                                                                       |
| reference     | the definition, `relaybackprop.reference`: one `autograd.grad` per loss, and one for its mask  |

Operations and memory are counted on the meta device at the paper's size, 224 pixels, with a batch size of `COUNTED`.
They are exact, except for workspaces of convolutions. Times are measured at a smaller size. Gradients are checked
first; then the contenders take turns. Dropout is disabled, since the formulations would draw it in different orders.

Metrics: `*_flops_a` and `*_peak_a` relative to standard backpropagation, `*_flops_lower_bound` the minimum, and
`*_time_a_over_relay` and others as in `benchmarks.engine`.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks import engine, networks
from benchmarks.measure import (
    Metrics,
    Step,
    Target,
    begin,
    count_bytes,
    count_flops,
    interleave,
    parse_arguments,
    publish,
    ratio,
)
from benchmarks.networks import Workload, without_dropout
from relaybackprop import AuxiliaryHead, Plan, Relay, RelayLoss, Window
from relaybackprop.planning.copies import dry_run
from relaybackprop.reference import reference_gradients
from relaylab.models import model_a, model_b

SEED = 20160916
COUNTED = 8
FORMULATIONS = ("standard", "multi_loss", "relay", "early_release", "two_backward", "overlap_twice", "reference")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of a benchmark run.

    Args:
        pixels: side of the images for timing.
        batch: batch size for timing.
        width: number of filters of the first segment of models A and B; 64 in the paper.
        rounds: maximum number of timing rounds.
        budget_s: time limit for timing one network, in seconds.
    """

    pixels: int
    batch: int
    width: int
    rounds: int
    budget_s: float


FULL = Settings(pixels=112, batch=4, width=32, rounds=60, budget_s=60)
QUICK = Settings(pixels=112, batch=1, width=8, rounds=3, budget_s=1)
GPU = Settings(pixels=224, batch=64, width=64, rounds=60, budget_s=30)


def resnet50(pixels: int, batch: int, _width: int, device: str) -> Workload:
    """Return ResNet-50 as in `benchmarks.networks`, without dropout."""
    return without_dropout(networks.resnet50(pixels, batch, device=device))


def places_a(pixels: int, batch: int, width: int, device: str) -> Workload:
    """Return model A with the windows of Table 2: both losses train segment 4."""
    with torch.device(device):
        model = model_a(401, width=width, image_size=pixels)
    return _of_segments(model, 4, 8 * width, pixels, batch, device)


def places_b(pixels: int, batch: int, width: int, device: str) -> Workload:
    """Return model B. Both losses train segment 3."""
    with torch.device(device):
        model = model_b(401, width=width, image_size=pixels)
    return _of_segments(model, 3, 8 * width, pixels, batch, device)


def _of_segments(model: nn.Sequential, shared: int, channels: int, pixels: int, batch: int, device: str) -> Workload:
    with torch.device(device):
        head = AuxiliaryHead(channels, 401)
        images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(401, (batch,))
    name = f"segment{shared}"
    plan = Plan(Window(bottom=name), {"aux": Window(top=name)})
    workload = Workload(model, model[: shared - 1], model[shared - 1], model[shared:], head, plan, images, labels)
    return without_dropout(workload)


class _Embed(nn.Module):
    """The layers of torchvision's vision transformer below its first block."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.conv_proj, self.class_token = transformer.conv_proj, transformer.class_token
        self.pos_embedding = transformer.encoder.pos_embedding

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.conv_proj(images).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(len(images), -1, -1), tokens], dim=1) + self.pos_embedding


class _FirstToken(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


def vit_b(pixels: int, batch: int, _width: int, device: str) -> Workload:
    """Return ViT-B/16. Both losses train its sixth and seventh blocks."""
    return transformer(12, 768, 16, pixels, batch, device)


def transformer(heads: int, width: int, patch: int, pixels: int, batch: int, device: str) -> Workload:
    """Return a vision transformer of twelve blocks. Both losses train the sixth and the seventh."""
    from torchvision.models import VisionTransformer

    with torch.device(device):
        model = VisionTransformer(pixels, patch, 12, heads, width, 4 * width, num_classes=1000)
        head = nn.Sequential(_FirstToken(), nn.LayerNorm(width), nn.Linear(width, 1000))
        images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(1000, (batch,))
    nn.init.normal_(
        cast(Any, model.heads.head).weight, std=0.02
    )  # torchvision initialises to zeros, which would block gradients
    layers = list(model.encoder.layers)
    block_name = "encoder.layers.encoder_layer_{}".format
    plan = Plan(Window(bottom=block_name(5)), {"aux": Window(top=block_name(6))})
    below, overlap = nn.Sequential(_Embed(model), *layers[:5]), nn.Sequential(*layers[5:7])
    above = nn.Sequential(*layers[7:], model.encoder.ln, _FirstToken(), model.heads)
    return Workload(model, below, overlap, above, head, plan, images, labels)


def contenders(workload: Workload) -> dict[str, Step]:
    """Return all formulations of one step's gradients, on the same weights."""
    w, criterion = workload, nn.CrossEntropyLoss()
    relay, loss = Relay(w.model, w.plan, {"aux": w.head}), RelayLoss(criterion)

    def early_release() -> None:
        relay.forward_backward(w.images, target=w.labels, loss=loss)

    def losses(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: criterion(output, w.labels) for name, output in outputs.items()}

    def reference() -> None:
        gradients = reference_gradients(w.model, w.plan, {"aux": w.head}, losses, w.images)
        for name, parameter in relay.named_parameters():
            parameter.grad = gradients[name]

    steps = engine.contenders(workload) | {"early_release": early_release, "reference": reference}
    return {name: steps[name] for name in (*FORMULATIONS, "relay_multi_loss")}


def count(build: Callable[..., Workload]) -> Metrics:
    """Count operations and memory at the paper's size, relative to standard backpropagation."""
    with dry_run():
        workload = build(224, COUNTED, 64, "meta")
        for parameter in workload.parameters:
            parameter.grad = torch.zeros_like(parameter)
        gradients = [cast(Tensor, parameter.grad) for parameter in workload.parameters]
        owned = [*workload.parameters, *gradients, *workload.model.buffers(), workload.images]
        metrics: Metrics = {}
        for name, step in contenders(workload).items():
            if name != "relay_multi_loss":
                step()
                metrics |= {f"flops_{name}": count_flops(step), f"peak_{name}": count_bytes(step, owned)}
        metrics["flops_lower_bound"] = engine.flops(workload)["lower_bound"]
    return {key: value / metrics[f"{key.partition('_')[0]}_standard"] for key, value in metrics.items()}


def time(build: Callable[..., Workload], settings: Settings, device: str) -> Metrics:
    """Measure times relative to the relay step."""
    workload = build(settings.pixels, settings.batch, settings.width, device)
    engine.check_gradients(workload, contenders)
    _check_other_formulations(workload)
    steps = {name: step for name, step in contenders(workload).items() if name != "relay_multi_loss"}
    times = interleave(steps, rounds=settings.rounds, budget_s=settings.budget_s, before=workload.clear, warmup=1)
    metrics: Metrics = {"ms_relay": 1000 * statistics.median(times["relay"]), "rounds": len(times["relay"])}
    for name in steps:
        result = ratio(times[name], times["relay"])
        metrics |= {f"time_{name}_over_relay": result.median, f"time_{name}_over_relay_error": result.error}
    return metrics


def _check_other_formulations(workload: Workload) -> None:
    """Check the two formulations that `benchmarks.engine` does not have against two backward passes."""

    def early_release_as_relay(exact: Workload) -> dict[str, Step]:
        steps = contenders(exact)
        return steps | {"relay": steps["early_release"], "relay_multi_loss": steps["multi_loss"]}

    def reference_as_relay(exact: Workload) -> dict[str, Step]:
        steps = contenders(exact)
        return steps | {"relay": steps["reference"], "relay_multi_loss": steps["multi_loss"]}

    engine.check_gradients(workload, early_release_as_relay)
    engine.check_gradients(workload, reference_as_relay)


def measure(settings: Settings, device: str = "cpu") -> Metrics:
    """Return all metrics."""
    builders = {"resnet50": resnet50, "model_a": places_a, "model_b": places_b, "vit_b": vit_b}
    metrics: Metrics = {}
    for name, build in builders.items():
        results = count(build) | time(build, settings, device)
        metrics |= {f"{name}_{key}": value for key, value in results.items()}
    return metrics


def targets(metrics: Metrics) -> dict[str, Target]:
    """Return the targets of the metrics: early release computes the minimum, and the others take longer than relay."""
    goals: dict[str, Target] = {}
    for name in ("resnet50", "model_a", "model_b", "vit_b"):
        bound = metrics[f"{name}_flops_lower_bound"]
        goals[f"{name}_flops_early_release"] = Target("<=", bound * (1 + 1e-9), "the lower bound")
        for other in ("two_backward", "overlap_twice"):
            goals[f"{name}_time_{other}_over_relay"] = Target(">", 1.0)
    return goals


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark: print the metrics, and write them to a file if --json is given."""
    arguments = parse_arguments("formulations", "Compare formulations of relay gradients.", argv)
    settings, device, about = begin(arguments, quick=QUICK, full=FULL, gpu=GPU, seed=SEED)
    metrics = measure(settings, device)
    about |= {
        "timed": f"{settings.batch} x 3 x {settings.pixels}^2, width {settings.width}",
        "counted": f"{COUNTED} x 3 x 224^2, width 64",
    }
    publish(metrics, targets(metrics), about, arguments.json)


if __name__ == "__main__":
    main()
