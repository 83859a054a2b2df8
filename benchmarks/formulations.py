"""The same gradients, written in five ways: operations, memory and time, on four networks with the paper's windows.

    python -m benchmarks.formulations [--quick] [--json FILE]

ResNet-50, models A and B, and ViT-B/16 with one head and two of its twelve blocks in both windows. Contenders are
those of `benchmarks.engine`, and two more:

| contender     | what it is                                                                                     |
| ------------- | ---------------------------------------------------------------------------------------------- |
| early_release | `Relay.forward_backward`                                                                       |
| reference     | the definition, `relaybackprop.reference`: one `autograd.grad` per loss, and one for its mask  |

Operations and memory are counted on the meta device at the paper's size, 224 pixels, in a batch of `COUNTED`; they are
exact, but for workspaces of convolutions. Times are taken at a smaller size; contenders first have to give the right
gradients, and then take turns. Dropout is left out: the formulations would draw it in different orders.

Figures: `*_flops_a` and `*_peak_a` over standard backpropagation's, `*_flops_lower_bound` the least that is possible,
`*_time_a_over_relay` and so on as in `benchmarks.engine`.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks import engine, networks
from benchmarks.measure import (
    Figures,
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
from benchmarks.networks import Subject, without_dropout
from relaybackprop import AuxiliaryHead, Plan, Relay, RelayLoss, Window
from relaybackprop.planning.copies import dry_run
from relaybackprop.reference import reference_gradients
from relaylab.models import model_a, model_b

SEED = 20160916
COUNTED = 8
FORMULATIONS = ("standard", "multi_loss", "relay", "early_release", "two_backward", "overlap_twice", "reference")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much to run.

    Args:
        pixels: side of the images that are timed.
        batch: how many of them.
        width: filters of the first segment of models A and B; 64 in the paper.
        rounds: of every timing, at most.
        budget_s: stop timing a network after so long.
    """

    pixels: int
    batch: int
    width: int
    rounds: int
    budget_s: float


FULL = Settings(pixels=112, batch=4, width=32, rounds=60, budget_s=60)
QUICK = Settings(pixels=112, batch=1, width=8, rounds=3, budget_s=1)
GPU = Settings(pixels=224, batch=64, width=64, rounds=60, budget_s=30)


def resnet50(pixels: int, batch: int, _width: int, device: str) -> Subject:
    """As in `benchmarks.networks`."""
    return without_dropout(networks.resnet50(pixels, batch, device=device))


def places_a(pixels: int, batch: int, width: int, device: str) -> Subject:
    """Model A with the windows of Table 2: both losses train segment 4."""
    with torch.device(device):
        model = model_a(401, width=width, image_size=pixels)
    return _of_segments(model, 4, 8 * width, pixels, batch, device)


def places_b(pixels: int, batch: int, width: int, device: str) -> Subject:
    """Model B: both losses train segment 3."""
    with torch.device(device):
        model = model_b(401, width=width, image_size=pixels)
    return _of_segments(model, 3, 8 * width, pixels, batch, device)


def _of_segments(model: nn.Sequential, shared: int, channels: int, pixels: int, batch: int, device: str) -> Subject:
    with torch.device(device):
        head = AuxiliaryHead(channels, 401)
        images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(401, (batch,))
    name = f"segment{shared}"
    plan = Plan(Window(bottom=name), {"aux": Window(top=name)})
    subject = Subject(model, model[: shared - 1], model[shared - 1], model[shared:], head, plan, images, labels)
    return without_dropout(subject)


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


def vit_b(pixels: int, batch: int, _width: int, device: str) -> Subject:
    """ViT-B/16; both losses train its sixth and seventh blocks."""
    return transformer(12, 768, 16, pixels, batch, device)


def transformer(heads: int, width: int, patch: int, pixels: int, batch: int, device: str) -> Subject:
    """A vision transformer of twelve blocks; both losses train the sixth and the seventh."""
    from torchvision.models import VisionTransformer

    with torch.device(device):
        model = VisionTransformer(pixels, patch, 12, heads, width, 4 * width, num_classes=1000)
        head = nn.Sequential(_FirstToken(), nn.LayerNorm(width), nn.Linear(width, 1000))
        images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(1000, (batch,))
    nn.init.normal_(cast(Any, model.heads.head).weight, std=0.02)  # torchvision's zeros would let no gradient through
    layers = list(model.encoder.layers)
    at = "encoder.layers.encoder_layer_{}".format
    plan = Plan(Window(bottom=at(5)), {"aux": Window(top=at(6))})
    below, overlap = nn.Sequential(_Embed(model), *layers[:5]), nn.Sequential(*layers[5:7])
    above = nn.Sequential(*layers[7:], model.encoder.ln, _FirstToken(), model.heads)
    return Subject(model, below, overlap, above, head, plan, images, labels)


def contenders(subject: Subject) -> dict[str, Step]:
    """All formulations of one step's gradients, on the same weights."""
    s, criterion = subject, nn.CrossEntropyLoss()
    relay, loss = Relay(s.model, s.plan, {"aux": s.head}), RelayLoss(criterion)

    def early_release() -> None:
        relay.forward_backward(s.images, target=s.labels, loss=loss)

    def losses(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: criterion(output, s.labels) for name, output in outputs.items()}

    def reference() -> None:
        found = reference_gradients(s.model, s.plan, {"aux": s.head}, losses, s.images)
        for name, parameter in relay.named_parameters():
            parameter.grad = found[name]

    every = engine.contenders(subject) | {"early_release": early_release, "reference": reference}
    return {name: every[name] for name in (*FORMULATIONS, "relay_multi_loss")}


def count(build: Callable[..., Subject]) -> Figures:
    """Operations and memory at the paper's size, over standard backpropagation's."""
    with dry_run():
        subject = build(224, COUNTED, 64, "meta")
        for parameter in subject.parameters:
            parameter.grad = torch.zeros_like(parameter)
        gradients = [cast(Tensor, parameter.grad) for parameter in subject.parameters]
        owned = [*subject.parameters, *gradients, *subject.model.buffers(), subject.images]
        figures: Figures = {}
        for name, step in contenders(subject).items():
            if name != "relay_multi_loss":
                step()
                figures |= {f"flops_{name}": count_flops(step), f"peak_{name}": count_bytes(step, owned)}
        figures["flops_lower_bound"] = engine.flops(subject)["lower_bound"]
    return {key: value / figures[f"{key.partition('_')[0]}_standard"] for key, value in figures.items()}


def time(build: Callable[..., Subject], settings: Settings, device: str) -> Figures:
    """Times, over the relay step's."""
    subject = build(settings.pixels, settings.batch, settings.width, device)
    engine.check_gradients(subject, contenders)
    _check_more(subject)
    steps = {name: step for name, step in contenders(subject).items() if name != "relay_multi_loss"}
    times = interleave(steps, rounds=settings.rounds, budget_s=settings.budget_s, before=subject.clear, warmup=1)
    figures: Figures = {"ms_relay": 1000 * statistics.median(times["relay"]), "rounds": len(times["relay"])}
    for name in steps:
        found = ratio(times[name], times["relay"])
        figures |= {f"time_{name}_over_relay": found.median, f"time_{name}_over_relay_error": found.error}
    return figures


def _check_more(subject: Subject) -> None:
    """Hold the two formulations that `benchmarks.engine` does not know against two backward passes, as it does."""

    def renamed(exact: Subject) -> dict[str, Step]:
        steps = contenders(exact)
        return steps | {"relay": steps["early_release"], "relay_multi_loss": steps["multi_loss"]}

    def defined(exact: Subject) -> dict[str, Step]:
        steps = contenders(exact)
        return steps | {"relay": steps["reference"], "relay_multi_loss": steps["multi_loss"]}

    engine.check_gradients(subject, renamed)
    engine.check_gradients(subject, defined)


def measure(settings: Settings, device: str = "cpu") -> Figures:
    """All figures."""
    builders = {"resnet50": resnet50, "model_a": places_a, "model_b": places_b, "vit_b": vit_b}
    figures: Figures = {}
    for name, build in builders.items():
        found = count(build) | time(build, settings, device)
        figures |= {f"{name}_{key}": value for key, value in found.items()}
    return figures


def targets(figures: Figures) -> dict[str, Target]:
    """What the figures have to reach: nobody computes less, and early release computes the least possible."""
    found: dict[str, Target] = {}
    for name in ("resnet50", "model_a", "model_b", "vit_b"):
        bound = figures[f"{name}_flops_lower_bound"]
        found[f"{name}_flops_early_release"] = Target("<=", bound * (1 + 1e-9), "the lower bound")
        for other in ("two_backward", "overlap_twice"):
            found[f"{name}_time_{other}_over_relay"] = Target(">", 1.0)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures, and write them to a file if asked to."""
    arguments = parse_arguments("formulations", "Compare formulations of relay gradients.", argv)
    settings, device, about = begin(arguments, quick=QUICK, full=FULL, gpu=GPU, seed=SEED)
    figures = measure(settings, device)
    about |= {
        "timed": f"{settings.batch} x 3 x {settings.pixels}^2, width {settings.width}",
        "counted": f"{COUNTED} x 3 x 224^2, width 64",
    }
    publish(figures, targets(figures), about, arguments.json)


if __name__ == "__main__":
    main()
