"""The cost of eager layers in overlaps, and the gain of a compiled overlap.

    python -m benchmarks.compile [--quick] [--json FILE]

Networks: the small VGG-22 of `benchmarks.networks`, and a vision transformer of twelve blocks of width 192. Both losses
train its sixth and seventh blocks. In multi-loss training everything can be compiled, so it shows the cost of an eager
overlap. Gradients are checked first; then the contenders take turns.

| contender                | description                                                                         |
| ------------------------ | ----------------------------------------------------------------------------------- |
| multi_loss_eager         | hand-written, nothing compiled                                                      |
| multi_loss_compiled      | the three parts of the network compiled                                             |
| multi_loss_eager_overlap | everything except the overlap compiled                                              |
| relay_eager              | `Relay`, nothing compiled                                                           |
| relay_compiled           | `Relay`, with the modules outside the overlap compiled                              |
| two_streams              | the overlap as one compiled function with two outputs, see Note [Two streams]       |

Note [Two streams]
A relay gradient in an overlap is one pass for the weights, with the sum of the losses, and one for the input, with the
lower loss alone. Let f be the overlap. The function (weights, x) -> (f(weights, x.detach()), f(weights.detach(), x))
returns the same value twice. With the sum as the gradient of the first output, and the lower loss's gradient as that of
the second, one backward pass computes both, without retaining the graph for another pass. Compiled, the common forward
pass can be computed once. Batch statistics would be updated twice, and dropout drawn twice, so it suits only networks
without either in the overlap.
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
    Metrics,
    Step,
    Target,
    begin,
    interleave,
    parse_arguments,
    publish,
    ratio,
)
from benchmarks.networks import Workload, vgg22, without_dropout
from relaybackprop import Plan, Relay, RelayLoss, Window

M = TypeVar("M", bound=nn.Module)

SEED = 20160916
TOLERANCE = 1e-9  # of a gradient's largest element, in double precision; in single, rounding flips ReLUs
EAGER_OVERLAP_LIMIT = 1.03


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of a benchmark run.

    Args:
        batch: number of images.
        rounds: maximum number of timing rounds.
        budget_s: time limit for timing one network, in seconds.
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


def vit(pixels: int, batch: int, *, width: int = 192, classes: int = 100, device: str = "cpu") -> Workload:
    """Return a transformer of twelve blocks without dropout. Both losses train the sixth and the seventh."""

    def block() -> nn.Module:
        return nn.TransformerEncoderLayer(width, 3, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)

    with torch.device(device):
        parts = [_Embed(width, (pixels // 8) ** 2), *(block() for _ in range(12)), _Classify(width, classes)]
        model, head = nn.Sequential(*parts), _Classify(width, classes)
        images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(classes, (batch,))
    plan = Plan(Window(bottom="6"), {"aux": Window(top="7")})
    return Workload(model, model[:6], model[6:8], model[8:], head, plan, images, labels)


class _Part(torch.autograd.Function):
    """Maps the two equal values of an overlap to the inputs of the layers above and of the head."""

    @staticmethod
    def forward(_ctx: FunctionCtx, for_weights: Tensor, _for_input: Tensor) -> tuple[Tensor, Tensor]:
        return for_weights.clone(), for_weights.clone()

    @staticmethod
    def backward(_ctx: FunctionCtx, above: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        return above + head, head


def contenders(workload: Workload) -> dict[str, Step]:
    """Return all contenders by name; see the table at the top of this file."""
    w, criterion, weight = workload, nn.CrossEntropyLoss(), workload.plan.auxiliary["aux"].weight
    assert weight is not None
    compiled = {name: cast(nn.Module, torch.compile(getattr(w, name))) for name in ("below", "overlap", "above")}

    def multi_loss(below: nn.Module, overlap: nn.Module, above: nn.Module) -> Step:
        def step() -> None:
            middle = overlap(below(w.images))
            loss = criterion(above(middle), w.labels) + weight * criterion(w.head(middle), w.labels)
            loss.backward()

        return step

    relay, loss = Relay(w.model, w.plan, {"aux": w.head}), RelayLoss(criterion)

    def relay_step(relay: Relay) -> Step:
        def step() -> None:
            loss(relay(w.images), w.labels).backward()

        return step

    names = [name for name, _ in w.overlap.named_parameters()]

    def two_outputs(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        trained = dict(zip(names, parameters, strict=True))
        frozen = {name: parameter.detach() for name, parameter in trained.items()}
        return functional_call(w.overlap, trained, (x.detach(),)), functional_call(w.overlap, frozen, (x,))

    streams: Any = torch.compile(two_outputs)

    def two_streams() -> None:
        pair = streams(compiled["below"](w.images), *w.overlap.parameters())
        middle, for_head = cast(tuple[Tensor, Tensor], _Part.apply(*pair))  # pyright: ignore
        primary, auxiliary = compiled["above"](middle), w.head(for_head)
        (criterion(primary, w.labels) + weight * criterion(auxiliary, w.labels)).backward()

    return {
        "multi_loss_eager": multi_loss(w.below, w.overlap, w.above),
        "multi_loss_compiled": multi_loss(**compiled),
        "multi_loss_eager_overlap": multi_loss(compiled["below"], w.overlap, compiled["above"]),
        "relay_eager": relay_step(relay),
        "relay_compiled": relay_step(_compiled_outside(relay, w.overlap)),
        "two_streams": two_streams,
    }


def _compiled_outside(relay: Relay, overlap: nn.Module) -> Relay:
    """Return a copy of the modules with the same weights, in which those outside the overlap are compiled."""
    overlapping = set(overlap.modules())
    names = [name for name, child in relay.model.named_children() if child not in overlapping]
    copied = twin(relay)
    for name in names:
        copied.model.get_submodule(name).compile()
    return copied


def twin(module: M) -> M:
    """Return a copy of the modules with the same parameters and buffers, to be compiled in place."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    memo |= {id(buffer): buffer for buffer in module.buffers()}
    return copy.deepcopy(module, memo)


def check_gradients(workload: Workload) -> None:
    """Check that contenders that claim the same gradients compute them, in double precision, on two images.

    Raises:
        RuntimeError: the gradients of two contenders differ, or the plan has no effect.
    """
    exact = copy.deepcopy(replace(workload, images=workload.images[:2].double(), labels=workload.labels[:2]))
    exact.model.double()
    exact.head.double()
    gradients: dict[str, list[Tensor]] = {}
    for name, step in contenders(exact).items():
        exact.clear()
        step()
        gradients[name] = [p.grad for p in exact.parameters if p.grad is not None]
    peers = dict.fromkeys(("relay_compiled", "two_streams"), "relay_eager")
    peers |= dict.fromkeys(("multi_loss_compiled", "multi_loss_eager_overlap"), "multi_loss_eager")
    for name, peer in peers.items():
        if not _all_close(gradients[name], gradients[peer]):
            raise RuntimeError(f"{name} and {peer} differ in their gradients: their times are meaningless")
    if _all_close(gradients["relay_eager"], gradients["multi_loss_eager"]):
        raise RuntimeError("relay and multi_loss agree in their gradients: the plan has no effect")


def _all_close(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(bool((a - b).abs().max() <= TOLERANCE * b.abs().max()) for a, b in zip(first, second, strict=True))


def measure_network(name: str, workload: Workload, settings: Settings) -> Metrics:
    """Time all contenders."""
    check_gradients(workload)
    steps = contenders(workload)
    times = interleave(steps, rounds=settings.rounds, budget_s=settings.budget_s, before=workload.clear)
    metrics: Metrics = {f"{name}_rounds": len(times["relay_eager"])}
    metrics |= {f"{name}_ms_{contender}": 1000 * statistics.median(seconds) for contender, seconds in times.items()}
    pairs = {
        "multi_loss_compiled_over_eager": ("multi_loss_compiled", "multi_loss_eager"),
        "eager_overlap_over_compiled": ("multi_loss_eager_overlap", "multi_loss_compiled"),
        "relay_compiled_over_eager": ("relay_compiled", "relay_eager"),
        "two_streams_over_relay_compiled": ("two_streams", "relay_compiled"),
    }
    for key, (numerator, denominator) in pairs.items():
        result = ratio(times[numerator], times[denominator])
        metrics |= {f"{name}_{key}": result.median, f"{name}_{key}_error": result.error}
    return metrics


def measure(settings: Settings, device: str = "cpu") -> Metrics:
    """Return all metrics."""
    workloads = {
        "vgg22": vgg22(16, 64, settings.batch, device=device),
        "vit": vit(64, settings.batch, device=device),
    }
    metrics: Metrics = {}
    for name, workload in workloads.items():
        metrics |= measure_network(name, without_dropout(workload), settings)
    return metrics


def targets() -> dict[str, Target]:
    """Return the targets of the metrics."""
    return {f"{name}_eager_overlap_over_compiled": Target("<=", EAGER_OVERLAP_LIMIT) for name in ("vgg22", "vit")}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark: print the metrics, and write them to a file if --json is given."""
    arguments = parse_arguments("compile", "Measure the cost of an eager overlap.", argv)
    settings, device, about = begin(arguments, quick=QUICK, full=FULL, gpu=GPU, seed=SEED)
    cast(Any, torch)._dynamo.config.recompile_limit = 64  # blocks of one class share their code; 8 is not enough
    metrics = measure(settings, device)
    publish(metrics, targets(), about | {"batch": settings.batch}, arguments.json)


if __name__ == "__main__":
    main()
