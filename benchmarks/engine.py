"""What relay backpropagation costs, against standard backpropagation and the other ways to write it.

    python -m benchmarks.engine [--quick] [--json FILE]

Networks: the paper's VGG-22, thinned out so that two cores can run it, and torchvision's ResNet-50 with the paper's
windows. Each contender first has to give the right gradients; then they take turns (`benchmarks.measure`). A step is
one forward and one backward pass, without the optimizer's, which is the same for all. It runs on one thread: on a
machine that others use too, two threads wait for each other, and steps were seen to take twenty times as long.

| contender        | what it is                                                                             |
| ---------------- | -------------------------------------------------------------------------------------- |
| standard         | no head, one loss                                                                      |
| multi_loss       | hand-written: forward with a head, weighted sum of the losses, one backward            |
| relay_multi_loss | the same by `Relay` with `plan.multi_loss()`: what the junctions alone cost            |
| relay            | `Relay` with the paper's windows                                                       |
| two_backward     | the same gradients by two `backward(inputs=...)`, one per window                       |
| overlap_twice    | the same gradients by running the overlap once more on its detached input              |

Figures: `*_time_a_over_b` is the median over the rounds of one round's ratio, `*_iqr` that ratio's interquartile range,
`*_error` the median's standard error, `*_ms_a` a contender's median.
"""

import copy
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import (
    Figures,
    Step,
    Target,
    count_flops,
    environment,
    interleave,
    keep_memory,
    parse_arguments,
    publish,
    ratio,
)
from benchmarks.networks import Subject, resnet50, vgg22
from relaybackprop import Plan, Relay, RelayLoss

SEED = 20160916  # any will do
GRADIENT_TOLERANCE = 1e-9  # float64, relative to a tensor's largest element; rounding alone stays below 1e-12

RESNET50_FLOPS_LIMIT = 1.09
TIME_OVER_FLOPS_LIMIT = 1.05
JUNCTION_OVERHEAD_LIMIT = 0.02
IMPORT_MS_LIMIT = 50.0


class WrongGradientsError(RuntimeError):
    """A contender whose gradients are not what it claims: its time would mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much to run.

    Args:
        width: filters of VGG-22's first segment; 64 in the paper.
        vgg22_pixels: side of its images.
        vgg22_batch: how many of them.
        resnet50_pixels: likewise.
        resnet50_batch: likewise.
        threads: of PyTorch.
        rounds: of every timing, at most.
        vgg22_budget_s: stop its timing after so long.
        resnet50_budget_s: likewise.
        imports: fresh processes to time the import in, at most.
        import_budget_s: start no further one after so long, but run at least three.
    """

    width: int = 16
    vgg22_pixels: int = 64
    vgg22_batch: int = 16
    resnet50_pixels: int = 64
    resnet50_batch: int = 4
    threads: int = 1
    rounds: int
    vgg22_budget_s: float
    resnet50_budget_s: float
    imports: int
    import_budget_s: float


FULL = Settings(rounds=400, vgg22_budget_s=150, resnet50_budget_s=80, imports=15, import_budget_s=40)
QUICK = Settings(rounds=400, vgg22_budget_s=16, resnet50_budget_s=6, imports=5, import_budget_s=6)


def contenders(subject: Subject) -> dict[str, Step]:
    """All ways to compute one step's gradients, on the same weights; see the table at the top of this file."""
    s, weight = subject, subject.plan.auxiliary["aux"].weight
    assert weight is not None
    criterion = nn.CrossEntropyLoss()
    # Whoever draws dropout masks does so in this order: above, then the head. Then equal seeds give equal gradients.
    primary_window = [*s.overlap.parameters(), *s.above.parameters()]
    auxiliary_window = [*s.below.parameters(), *s.overlap.parameters(), *s.head.parameters()]

    def standard() -> None:
        criterion(s.model(s.images), s.labels).backward()

    def multi_loss() -> None:
        middle = s.overlap(s.below(s.images))
        primary, auxiliary = s.above(middle), s.head(middle)
        (criterion(primary, s.labels) + weight * criterion(auxiliary, s.labels)).backward()

    def two_backward() -> None:
        middle = s.overlap(s.below(s.images))
        primary, auxiliary = s.above(middle), s.head(middle)
        criterion(primary, s.labels).backward(retain_graph=True, inputs=primary_window)
        (weight * criterion(auxiliary, s.labels)).backward(inputs=auxiliary_window)

    def overlap_twice() -> None:
        bottom = s.below(s.images)
        primary = s.above(s.overlap(bottom.detach()))
        auxiliary = s.head(s.overlap(bottom))
        (criterion(primary, s.labels) + weight * criterion(auxiliary, s.labels)).backward()

    return {
        "standard": standard,
        "multi_loss": multi_loss,
        "relay_multi_loss": _by_relay(subject, subject.plan.multi_loss()),
        "relay": _by_relay(subject, subject.plan),
        "two_backward": two_backward,
        "overlap_twice": overlap_twice,
    }


def _by_relay(subject: Subject, plan: Plan) -> Step:
    relay = Relay(subject.model, plan, {"aux": subject.head})
    criterion = RelayLoss(nn.CrossEntropyLoss())

    def step() -> None:
        criterion(relay(subject.images), subject.labels).backward()

    return step


def check_gradients(subject: Subject, contenders_of: Callable[[Subject], dict[str, Step]] = contenders) -> None:
    """Raise unless all contenders' gradients are what they claim, in float64, on two images of the batch.

    Those of `relay`, `two_backward` and `overlap_twice` have to agree with each other, those of the two multi-loss
    contenders too, and below the overlap the former have to differ from the latter.

    Args:
        subject: is not changed.
        contenders_of: what makes the contenders.

    Raises:
        WrongGradientsError: which contender, and where.
    """
    # A copy, since batch statistics change.
    exact = copy.deepcopy(replace(subject, images=subject.images[:2].double(), labels=subject.labels[:2]))
    exact.model.double()
    exact.head.double()
    pairs = [("relay_multi_loss", "multi_loss"), ("relay", "two_backward")]
    if not any(isinstance(module, nn.BatchNorm2d) for module in exact.overlap.modules()):
        pairs.append(("overlap_twice", "two_backward"))  # on batch normalisation it counts the overlap's batch twice
    steps = contenders_of(exact)
    gradients = {name: _gradients(exact, steps[name]) for name in {name for pair in pairs for name in pair}}
    for name, peer in pairs:
        for parameter in gradients[peer]:
            found = difference(gradients[name][parameter], gradients[peer][parameter])
            if not found <= GRADIENT_TOLERANCE:
                raise WrongGradientsError(
                    f"expected the gradient of {parameter} to be the same by {name} and by {peer}; received a relative "
                    f"difference of {found:.2g}. Repair the contender: a wrong step's time means nothing."
                )
    first = next(iter(gradients["relay"]))
    if difference(gradients["relay"][first], gradients["multi_loss"][first]) <= GRADIENT_TOLERANCE:
        raise WrongGradientsError(
            f"expected the gradient of {first}, below the primary window, to be the auxiliary loss's alone; received "
            "that of both losses. The plan has no effect."
        )


def _gradients(subject: Subject, step: Step) -> dict[str, Tensor | None]:
    modules = {"model": subject.model, "head": subject.head}
    subject.clear()
    torch.manual_seed(SEED)  # the head has dropout
    step()
    gradients = {f"{at}.{name}": p.grad for at, module in modules.items() for name, p in module.named_parameters()}
    subject.clear()
    return gradients


def difference(one: Tensor | None, other: Tensor | None) -> float:
    """Return the largest difference relative to the largest element; infinite if only one of them exists."""
    if one is None or other is None:
        return 0.0 if one is other else math.inf
    return ((one - other).abs().max() / other.abs().max().clamp_min(torch.finfo(other.dtype).tiny)).item()


def flops(subject: Subject, names: Sequence[str] = ("multi_loss", "relay")) -> dict[str, int]:
    """The floating-point operations of a step.

    Args:
        subject: on the meta device this costs next to nothing.
        names: contenders to count; `multi_loss` among them.

    Returns:
        By contender, and under "lower_bound" the least that relay can cost.
    """
    every = contenders(subject)
    counts = {name: count_flops(every[name]) for name in names}
    # Multi-loss has the head and one gradient of everything. Relay needs the primary loss's own input gradients in the
    # overlap besides, but not those into its lowest layers, since they would only be thrown away.
    with torch.no_grad():
        bottom = subject.below(subject.images)
    parameters = list(subject.overlap.parameters())
    weights = _count_backward(subject.overlap, bottom, parameters)
    whole = bottom.detach().requires_grad_()
    everything = _count_backward(subject.overlap, whole, [whole, *parameters])
    inputs = _count_backward(subject.overlap, whole, [whole])
    # Input gradients without the lowest layers' = (all that weights need) - (weight gradients alone).
    counts["lower_bound"] = counts["multi_loss"] + weights - (everything - inputs)
    return counts


def _count_backward(module: nn.Module, value: Tensor, inputs: Sequence[Tensor]) -> int:
    output = module(value)
    return count_flops(lambda: torch.autograd.grad(output, inputs, torch.ones_like(output)))


def measure_flops(settings: Settings) -> Figures:
    """The figures that count operations: exact, on the meta device."""
    names = ["standard", "multi_loss", "relay", "two_backward", "overlap_twice"]
    paper = flops(resnet50(224, 1, device="meta"), names)
    small = flops(resnet50(settings.resnet50_pixels, settings.resnet50_batch, device="meta"))
    thin = flops(vgg22(settings.width, settings.vgg22_pixels, settings.vgg22_batch, device="meta"))
    return {
        "resnet50_flops_relay_over_standard": paper["relay"] / paper["standard"],
        "resnet50_flops_lower_bound": paper["lower_bound"] / paper["standard"],
        "resnet50_flops_multi_loss_over_standard": paper["multi_loss"] / paper["standard"],
        "resnet50_flops_two_backward_over_standard": paper["two_backward"] / paper["standard"],
        "resnet50_flops_overlap_twice_over_standard": paper["overlap_twice"] / paper["standard"],
        "resnet50_flops_relay_over_multi_loss": small["relay"] / small["multi_loss"],
        "vgg22_flops_relay_over_multi_loss": thin["relay"] / thin["multi_loss"],
        "vgg22_flops_lower_bound_over_multi_loss": thin["lower_bound"] / thin["multi_loss"],
    }


def measure_vgg22(settings: Settings) -> Figures:
    """The times of all contenders on VGG-22."""
    subject = vgg22(settings.width, settings.vgg22_pixels, settings.vgg22_batch)
    names = ["multi_loss", "relay_multi_loss", "relay", "two_backward", "overlap_twice"]
    times = _time(subject, names, settings.rounds, settings.vgg22_budget_s)
    figures = dict(_medians("vgg22", times))
    figures |= _ratio("vgg22_time_relay_over_multi_loss", times["relay"], times["multi_loss"])
    figures |= _ratio("vgg22_time_two_backward_over_relay", times["two_backward"], times["relay"])
    figures |= _ratio("vgg22_time_overlap_twice_over_relay", times["overlap_twice"], times["relay"])
    return figures | _ratio("junction_overhead", times["relay_multi_loss"], times["multi_loss"], minus=1.0)


def measure_resnet50(settings: Settings) -> Figures:
    """The times of relay and multi-loss on ResNet-50."""
    subject = resnet50(settings.resnet50_pixels, settings.resnet50_batch)
    names = ["multi_loss", "relay_multi_loss", "relay"]
    times = _time(subject, names, settings.rounds, settings.resnet50_budget_s)
    figures = dict(_medians("resnet50", times))
    figures |= _ratio("resnet50_time_relay_over_multi_loss", times["relay"], times["multi_loss"])
    return figures | _ratio("resnet50_junction_overhead", times["relay_multi_loss"], times["multi_loss"], minus=1.0)


def _time(subject: Subject, names: Sequence[str], rounds: int, budget_s: float) -> dict[str, list[float]]:
    check_gradients(subject)
    every = contenders(subject)
    return interleave({name: every[name] for name in names}, rounds=rounds, budget_s=budget_s, before=subject.clear)


def _medians(network: str, times: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, float]]:
    for name, seconds in times.items():
        yield f"{network}_ms_{name}", 1000 * statistics.median(seconds)
    yield f"{network}_rounds", min(len(seconds) for seconds in times.values())


def _ratio(key: str, over: Sequence[float], under: Sequence[float], *, minus: float = 0.0) -> Figures:
    found = ratio(over, under)
    return {key: found.median - minus, f"{key}_iqr": found.iqr, f"{key}_error": found.error}


_IMPORT = """
import time
start = time.perf_counter()
import torch
between = time.perf_counter()
import relaybackprop
print(between - start, time.perf_counter() - between)
"""


def measure_import(settings: Settings) -> Figures:
    """What `import relaybackprop` adds to `import torch`, both timed in the same fresh process, many times."""
    runs: list[tuple[float, float]] = []
    started = time.perf_counter()
    # Caches are full: this very process has imported both.
    while len(runs) < settings.imports:
        if len(runs) >= 3 and time.perf_counter() - started > settings.import_budget_s:
            break
        done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise RuntimeError(f"expected a fresh Python to import relaybackprop; received: {done.stderr.strip()}")
        torch_s, ours_s = map(float, done.stdout.split())
        runs.append((torch_s, ours_s))
    torch_ms, ours_ms = (1000 * statistics.median(column) for column in zip(*runs, strict=True))
    return {"import_ms": ours_ms, "import_torch_ms": torch_ms, "import_runs": len(runs)}


def measure(settings: Settings) -> Figures:
    """All figures."""
    figures = measure_flops(settings) | measure_vgg22(settings) | measure_resnet50(settings)
    return figures | measure_import(settings)


def targets(figures: Figures) -> dict[str, Target]:
    """What the figures have to reach. Times are held against what the operations alone would cost."""

    def in_time(network: str) -> Target:
        counted = figures[f"{network}_flops_relay_over_multi_loss"]
        return Target("<=", TIME_OVER_FLOPS_LIMIT * counted, f"{TIME_OVER_FLOPS_LIMIT} x FLOPs, {counted:.4g}")

    return {
        "resnet50_flops_relay_over_standard": Target("<=", RESNET50_FLOPS_LIMIT),
        "resnet50_time_relay_over_multi_loss": in_time("resnet50"),
        "vgg22_time_relay_over_multi_loss": in_time("vgg22"),
        "vgg22_time_two_backward_over_relay": Target(">", 1.0),
        "vgg22_time_overlap_twice_over_relay": Target(">", 1.0),
        "junction_overhead": Target("<", JUNCTION_OVERHEAD_LIMIT),
        "import_ms": Target("<", IMPORT_MS_LIMIT),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark: figures and environment to the terminal and, if asked for, to a file."""
    arguments = parse_arguments("engine", "What relay backpropagation costs.", argv)
    settings = QUICK if arguments.quick else FULL
    started = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    keeps_memory = keep_memory()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            figures = measure(settings)
        about: dict[str, Any] = environment()
    finally:
        torch.set_num_threads(threads)
    about |= {
        "benchmark": "engine",
        "quick": arguments.quick,
        "seed": SEED,
        "keeps_memory": keeps_memory,
        "vgg22": f"width {settings.width}, {settings.vgg22_batch} x 3 x {settings.vgg22_pixels}^2, float32",
        "resnet50": f"{settings.resnet50_batch} x 3 x {settings.resnet50_pixels}^2, float32",
        "elapsed_s": round(time.perf_counter() - started, 1),
    }
    publish(figures, targets(figures), about, arguments.json)


if __name__ == "__main__":
    main()
