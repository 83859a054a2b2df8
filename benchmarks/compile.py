"""What it costs that layers in overlaps stay eager, and what a compiled overlap would give.

    python -m benchmarks.compile [--quick] [--json FILE]

Networks: the thinned VGG-22 of `benchmarks.networks`, and a vision transformer of twelve blocks of width 192 whose
sixth and seventh both losses train. Under multi-loss training everything may be compiled, so that the price of an eager
overlap can be read off there. Contenders first have to give the right gradients; then they take turns.

| contender                | what it is                                                                          |
| ------------------------ | ----------------------------------------------------------------------------------- |
| multi_loss_eager         | hand-written, nothing compiled                                                      |
| multi_loss_compiled      | the three parts of the network compiled                                             |
| multi_loss_eager_overlap | all but the overlap compiled                                                        |
| relay_eager              | `Relay`, nothing compiled                                                           |
| relay_compiled           | `Relay`, with the modules outside of the overlap compiled                           |
| two_streams              | the overlap as one compiled function with two outputs, see Note [Two streams]       |

Note [Two streams]
A relay gradient in an overlap is one pass for the weights, with the sum of the losses, and one for the input, with the
lower loss alone. Let f be the overlap. The function (weights, x) -> (f(weights, x.detach()), f(weights.detach(), x))
has the same value twice; send the sum into the first output's gradient and the lower loss's into the second's, and one
backward pass gives both, with no graph kept for a second one. Compiled, the common forward pass can be computed once.
Batch statistics would be taken twice, and dropout drawn twice: it is for networks that have neither in the overlap.
"""

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.func import functional_call

from benchmarks.measure import (
    Figures,
    Step,
    Target,
    begin,
    interleave,
    parse_arguments,
    publish,
    ratio,
)
from benchmarks.networks import Subject, vgg22, without_dropout
from relaybackprop import Plan, Relay, RelayLoss, Window

M = TypeVar("M", bound=nn.Module)

SEED = 20160916
TOLERANCE = 1e-9  # of a gradient's largest element, in double precision; in single, rounding turns ReLUs over
EAGER_OVERLAP_LIMIT = 1.03


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much to run.

    Args:
        batch: images.
        rounds: of every timing, at most.
        budget_s: stop timing a network after so long.
    """

    batch: int
    rounds: int
    budget_s: float


FULL = Settings(batch=16, rounds=200, budget_s=60)
QUICK = Settings(batch=2, rounds=3, budget_s=1)
GPU = Settings(batch=256, rounds=200, budget_s=30)


class _Embed(nn.Module):
    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.patches(images).flatten(2).transpose(1, 2) + self.position


class _Classify(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.norm(tokens.mean(1)))


def vit(pixels: int, batch: int, *, width: int = 192, classes: int = 100, device: str = "cpu") -> Subject:
    """Twelve blocks without dropout; both losses train the sixth and the seventh."""

    def block() -> nn.Module:
        return nn.TransformerEncoderLayer(width, 3, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)

    with torch.device(device):
        parts = [_Embed(width, (pixels // 8) ** 2), *(block() for _ in range(12)), _Classify(width, classes)]
        model, head = nn.Sequential(*parts), _Classify(width, classes)
        images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(classes, (batch,))
    plan = Plan(Window(bottom="6"), {"aux": Window(top="7")})
    return Subject(model, model[:6], model[6:8], model[8:], head, plan, images, labels)


class _Part(torch.autograd.Function):
    """From two equal values of an overlap, what the layers above and the head read."""

    @staticmethod
    def forward(_ctx: FunctionCtx, for_weights: Tensor, _for_input: Tensor) -> tuple[Tensor, Tensor]:
        return for_weights.clone(), for_weights.clone()

    @staticmethod
    def backward(_ctx: FunctionCtx, above: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        return above + head, head


def contenders(subject: Subject) -> dict[str, Step]:
    """See the table at the top of this file."""
    s, criterion, weight = subject, nn.CrossEntropyLoss(), subject.plan.auxiliary["aux"].weight
    assert weight is not None
    compiled = {name: cast(nn.Module, torch.compile(getattr(s, name))) for name in ("below", "overlap", "above")}

    def multi_loss(below: nn.Module, overlap: nn.Module, above: nn.Module) -> Step:
        def step() -> None:
            middle = overlap(below(s.images))
            loss = criterion(above(middle), s.labels) + weight * criterion(s.head(middle), s.labels)
            loss.backward()

        return step

    relay, loss = Relay(s.model, s.plan, {"aux": s.head}), RelayLoss(criterion)

    def by(relay: Relay) -> Step:
        def step() -> None:
            loss(relay(s.images), s.labels).backward()

        return step

    names = [name for name, _ in s.overlap.named_parameters()]

    def twice(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        held = dict(zip(names, parameters, strict=True))
        fixed = {name: parameter.detach() for name, parameter in held.items()}
        return functional_call(s.overlap, held, (x.detach(),)), functional_call(s.overlap, fixed, (x,))

    streams: Any = torch.compile(twice)

    def two_streams() -> None:
        pair = streams(compiled["below"](s.images), *s.overlap.parameters())
        middle, for_head = cast(tuple[Tensor, Tensor], _Part.apply(*pair))  # pyright: ignore
        primary, auxiliary = compiled["above"](middle), s.head(for_head)
        (criterion(primary, s.labels) + weight * criterion(auxiliary, s.labels)).backward()

    return {
        "multi_loss_eager": multi_loss(s.below, s.overlap, s.above),
        "multi_loss_compiled": multi_loss(**compiled),
        "multi_loss_eager_overlap": multi_loss(compiled["below"], s.overlap, compiled["above"]),
        "relay_eager": by(relay),
        "relay_compiled": by(_compiled_outside(relay, s.overlap)),
        "two_streams": two_streams,
    }


def _compiled_outside(relay: Relay, overlap: nn.Module) -> Relay:
    """The same weights in a copy of the modules, of which those outside of the overlap are compiled."""
    inside = set(overlap.modules())
    names = [name for name, child in relay.model.named_children() if child not in inside]
    copied = twin(relay)
    for name in names:
        copied.model.get_submodule(name).compile()
    return copied


def twin(module: M) -> M:
    """Return a copy of the modules with the same parameters and buffers, to be compiled in place."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    memo |= {id(buffer): buffer for buffer in module.buffers()}
    return copy.deepcopy(module, memo)


def check_gradients(subject: Subject) -> None:
    """Raise unless contenders that claim the same gradients have them, in double precision, on two images.

    Raises:
        RuntimeError: which contender.
    """
    exact = copy.deepcopy(replace(subject, images=subject.images[:2].double(), labels=subject.labels[:2]))
    exact.model.double()
    exact.head.double()
    found: dict[str, list[Tensor]] = {}
    for name, step in contenders(exact).items():
        exact.clear()
        step()
        found[name] = [p.grad for p in exact.parameters if p.grad is not None]
    peers = dict.fromkeys(("relay_compiled", "two_streams"), "relay_eager")
    peers |= dict.fromkeys(("multi_loss_compiled", "multi_loss_eager_overlap"), "multi_loss_eager")
    for name, peer in peers.items():
        if not _alike(found[name], found[peer]):
            raise RuntimeError(f"{name} and {peer} differ in their gradients: their times mean nothing")
    if _alike(found["relay_eager"], found["multi_loss_eager"]):
        raise RuntimeError("relay and multi_loss agree in their gradients: the plan has no effect")


def _alike(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(bool((a - b).abs().max() <= TOLERANCE * b.abs().max()) for a, b in zip(one, other, strict=True))


def measure_network(name: str, subject: Subject, settings: Settings) -> Figures:
    """Times of all contenders."""
    check_gradients(subject)
    steps = contenders(subject)
    times = interleave(steps, rounds=settings.rounds, budget_s=settings.budget_s, before=subject.clear)
    figures: Figures = {f"{name}_rounds": len(times["relay_eager"])}
    figures |= {f"{name}_ms_{contender}": 1000 * statistics.median(seconds) for contender, seconds in times.items()}
    pairs = {
        "multi_loss_compiled_over_eager": ("multi_loss_compiled", "multi_loss_eager"),
        "eager_overlap_over_compiled": ("multi_loss_eager_overlap", "multi_loss_compiled"),
        "relay_compiled_over_eager": ("relay_compiled", "relay_eager"),
        "two_streams_over_relay_compiled": ("two_streams", "relay_compiled"),
    }
    for key, (over, under) in pairs.items():
        found = ratio(times[over], times[under])
        figures |= {f"{name}_{key}": found.median, f"{name}_{key}_error": found.error}
    return figures


def measure(settings: Settings, device: str = "cpu") -> Figures:
    """All figures."""
    subjects = {
        "vgg22": vgg22(16, 64, settings.batch, device=device),
        "vit": vit(64, settings.batch, device=device),
    }
    figures: Figures = {}
    for name, subject in subjects.items():
        figures |= measure_network(name, without_dropout(subject), settings)
    return figures


def targets() -> dict[str, Target]:
    """What the figures have to reach."""
    return {f"{name}_eager_overlap_over_compiled": Target("<=", EAGER_OVERLAP_LIMIT) for name in ("vgg22", "vit")}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures, and write them to a file if asked to."""
    arguments = parse_arguments("compile", "Measure what an eager overlap costs.", argv)
    settings, device, about = begin(arguments, quick=QUICK, full=FULL, gpu=GPU, seed=SEED)
    cast(Any, torch)._dynamo.config.recompile_limit = 64  # blocks of one class share their code; 8 is not enough
    figures = measure(settings, device)
    publish(figures, targets(), about | {"batch": settings.batch}, arguments.json)


if __name__ == "__main__":
    main()
