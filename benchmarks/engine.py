"""The cost of relay backpropagation, against standard backpropagation and other formulations of the same gradients.

    python -m benchmarks.engine [--quick] [--json FILE]

Networks: the paper's VGG-22, with fewer filters so that two cores can run it, and torchvision's ResNet-50 with the
paper's windows. The gradients of each contender are checked first; then the contenders take turns
(`benchmarks.measure`). A step is one forward and one backward pass, without the optimizer step, which is the same for
all. It runs on one thread: on a shared machine, two threads wait for each other, and steps took up to twenty times as
long.

| contender        | description                                                                            |
| ---------------- | -------------------------------------------------------------------------------------- |
| standard         | no head, one loss                                                                      |
| multi_loss       | hand-written: forward with a head, weighted sum of the losses, one backward            |
| relay_multi_loss | the same by `Relay` with `plan.multi_loss()`: the cost of the junctions alone          |
| relay            | `Relay` with the paper's windows                                                       |
| two_backward     | the same gradients by two `backward(inputs=...)`, one per window                       |
| overlap_twice    | the same gradients by running the overlap once more on its detached input              |

Metrics: `*_time_a_over_b` is the median of the rounds' ratios, `*_iqr` their interquartile range, `*_error` the
standard error of the median, and `*_ms_a` a contender's median in milliseconds.
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
    Metrics,
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
from benchmarks.networks import Workload, resnet50, vgg22
from relaybackprop import Plan, Relay, RelayLoss

SEED = 20160916  # arbitrary
GRADIENT_TOLERANCE = 1e-9  # float64, relative to a tensor's largest element; rounding alone stays below 1e-12

RESNET50_FLOPS_LIMIT = 1.09
TIME_OVER_FLOPS_LIMIT = 1.05
JUNCTION_OVERHEAD_LIMIT = 0.02
IMPORT_MS_LIMIT = 50.0


class WrongGradientsError(RuntimeError):
    """A contender that does not compute the gradients that it claims, so its time is meaningless."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of a benchmark run.

    Args:
        width: number of filters of VGG-22's first segment; 64 in the paper.
        vgg22_pixels: side of VGG-22's images, in pixels.
        vgg22_batch: batch size of VGG-22.
        resnet50_pixels: side of ResNet-50's images, in pixels.
        resnet50_batch: batch size of ResNet-50.
        threads: number of PyTorch's threads.
        rounds: maximum number of timing rounds.
        vgg22_budget_s: time limit for timing VGG-22, in seconds.
        resnet50_budget_s: time limit for timing ResNet-50, in seconds.
        imports: maximum number of fresh processes in which the import is timed.
        import_budget_s: time in seconds after which no further process starts; at least three run.
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


def contenders(workload: Workload) -> dict[str, Step]:
    """Return all contenders by name, on the same weights; see the table at the top of this file."""
    w, weight = workload, workload.plan.auxiliary["aux"].weight
    assert weight is not None
    criterion = nn.CrossEntropyLoss()
    # All contenders draw dropout masks in the same order, above and then the head, so equal seeds give equal gradients.
    primary_window = [*w.overlap.parameters(), *w.above.parameters()]
    auxiliary_window = [*w.below.parameters(), *w.overlap.parameters(), *w.head.parameters()]

    def standard() -> None:
        criterion(w.model(w.images), w.labels).backward()

    def multi_loss() -> None:
        middle = w.overlap(w.below(w.images))
        primary, auxiliary = w.above(middle), w.head(middle)
        (criterion(primary, w.labels) + weight * criterion(auxiliary, w.labels)).backward()

    def two_backward() -> None:
        middle = w.overlap(w.below(w.images))
        primary, auxiliary = w.above(middle), w.head(middle)
        criterion(primary, w.labels).backward(retain_graph=True, inputs=primary_window)
        (weight * criterion(auxiliary, w.labels)).backward(inputs=auxiliary_window)

    def overlap_twice() -> None:
        bottom = w.below(w.images)
        primary = w.above(w.overlap(bottom.detach()))
        auxiliary = w.head(w.overlap(bottom))
        (criterion(primary, w.labels) + weight * criterion(auxiliary, w.labels)).backward()

    return {
        "standard": standard,
        "multi_loss": multi_loss,
        "relay_multi_loss": _relay_step(workload, workload.plan.multi_loss()),
        "relay": _relay_step(workload, workload.plan),
        "two_backward": two_backward,
        "overlap_twice": overlap_twice,
    }


def _relay_step(workload: Workload, plan: Plan) -> Step:
    relay = Relay(workload.model, plan, {"aux": workload.head})
    criterion = RelayLoss(nn.CrossEntropyLoss())

    def step() -> None:
        criterion(relay(workload.images), workload.labels).backward()

    return step


def check_gradients(workload: Workload, contenders_of: Callable[[Workload], dict[str, Step]] = contenders) -> None:
    """Check the gradients of all contenders, in float64, on two images of the batch.

    `relay`, `two_backward` and `overlap_twice` must agree, and so must the two multi-loss contenders. Below the
    overlap, the former must differ from the latter.

    Args:
        workload: the network and its batch; it does not change.
        contenders_of: function that returns the contenders.

    Raises:
        WrongGradientsError: a contender computes other gradients than it claims.
    """
    # A copy, since batch statistics change.
    exact = copy.deepcopy(replace(workload, images=workload.images[:2].double(), labels=workload.labels[:2]))
    exact.model.double()
    exact.head.double()
    pairs = [("relay_multi_loss", "multi_loss"), ("relay", "two_backward")]
    if not any(isinstance(module, nn.BatchNorm2d) for module in exact.overlap.modules()):
        pairs.append(("overlap_twice", "two_backward"))  # batch statistics would be updated twice
    steps = contenders_of(exact)
    gradients = {name: _gradients(exact, steps[name]) for name in {name for pair in pairs for name in pair}}
    for name, peer in pairs:
        for parameter in gradients[peer]:
            error = difference(gradients[name][parameter], gradients[peer][parameter])
            if not error <= GRADIENT_TOLERANCE:
                raise WrongGradientsError(
                    f"the gradients of {parameter} by {name} and by {peer} have a relative difference of {error:.2g}: "
                    "they must agree. Repair the contender; the time of a wrong step is meaningless."
                )
    first = next(iter(gradients["relay"]))
    if difference(gradients["relay"][first], gradients["multi_loss"][first]) <= GRADIENT_TOLERANCE:
        raise WrongGradientsError(
            f"the gradient of {first}, below the primary window, includes both losses: it must be the gradient of the "
            "auxiliary loss alone. The plan has no effect."
        )


def _gradients(workload: Workload, step: Step) -> dict[str, Tensor | None]:
    modules = {"model": workload.model, "head": workload.head}
    workload.clear()
    torch.manual_seed(SEED)  # the head has dropout
    step()
    gradients = {
        f"{prefix}.{name}": p.grad for prefix, module in modules.items() for name, p in module.named_parameters()
    }
    workload.clear()
    return gradients


def difference(first: Tensor | None, second: Tensor | None) -> float:
    """Return the largest difference relative to the largest element; infinite if only one of them exists."""
    if first is None or second is None:
        return 0.0 if first is second else math.inf
    return ((first - second).abs().max() / second.abs().max().clamp_min(torch.finfo(second.dtype).tiny)).item()


def flops(workload: Workload, names: Sequence[str] = ("multi_loss", "relay")) -> dict[str, int]:
    """Count the floating-point operations of a step.

    Args:
        workload: the network and its batch; cheapest on the meta device.
        names: contenders to count, including `multi_loss`.

    Returns:
        Operations by contender, and the minimum for relay as "lower_bound".
    """
    steps = contenders(workload)
    counts = {name: count_flops(steps[name]) for name in names}
    # Multi-loss has the head and one gradient of everything. Relay also needs the primary loss's own input gradients in
    # the overlap, except those of its lowest layers, which would be discarded.
    with torch.no_grad():
        bottom = workload.below(workload.images)
    parameters = list(workload.overlap.parameters())
    weights = _count_backward(workload.overlap, bottom, parameters)
    value = bottom.detach().requires_grad_()
    everything = _count_backward(workload.overlap, value, [value, *parameters])
    inputs = _count_backward(workload.overlap, value, [value])
    # Input gradients except the lowest layers' = (all that weight gradients need) - (weight gradients alone).
    counts["lower_bound"] = counts["multi_loss"] + weights - (everything - inputs)
    return counts


def _count_backward(module: nn.Module, value: Tensor, inputs: Sequence[Tensor]) -> int:
    output = module(value)
    return count_flops(lambda: torch.autograd.grad(output, inputs, torch.ones_like(output)))


def measure_flops(settings: Settings) -> Metrics:
    """Return the metrics that count operations. They are exact, on the meta device."""
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


def measure_vgg22(settings: Settings) -> Metrics:
    """Time all contenders on VGG-22."""
    workload = vgg22(settings.width, settings.vgg22_pixels, settings.vgg22_batch)
    names = ["multi_loss", "relay_multi_loss", "relay", "two_backward", "overlap_twice"]
    times = _time(workload, names, settings.rounds, settings.vgg22_budget_s)
    metrics = dict(_medians("vgg22", times))
    metrics |= _ratio("vgg22_time_relay_over_multi_loss", times["relay"], times["multi_loss"])
    metrics |= _ratio("vgg22_time_two_backward_over_relay", times["two_backward"], times["relay"])
    metrics |= _ratio("vgg22_time_overlap_twice_over_relay", times["overlap_twice"], times["relay"])
    return metrics | _ratio("junction_overhead", times["relay_multi_loss"], times["multi_loss"], offset=1.0)


def measure_resnet50(settings: Settings) -> Metrics:
    """Time relay and multi-loss on ResNet-50."""
    workload = resnet50(settings.resnet50_pixels, settings.resnet50_batch)
    names = ["multi_loss", "relay_multi_loss", "relay"]
    times = _time(workload, names, settings.rounds, settings.resnet50_budget_s)
    metrics = dict(_medians("resnet50", times))
    metrics |= _ratio("resnet50_time_relay_over_multi_loss", times["relay"], times["multi_loss"])
    return metrics | _ratio("resnet50_junction_overhead", times["relay_multi_loss"], times["multi_loss"], offset=1.0)


def _time(workload: Workload, names: Sequence[str], rounds: int, budget_s: float) -> dict[str, list[float]]:
    check_gradients(workload)
    steps = contenders(workload)
    return interleave({name: steps[name] for name in names}, rounds=rounds, budget_s=budget_s, before=workload.clear)


def _medians(network: str, times: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, float]]:
    for name, seconds in times.items():
        yield f"{network}_ms_{name}", 1000 * statistics.median(seconds)
    yield f"{network}_rounds", min(len(seconds) for seconds in times.values())


def _ratio(key: str, numerator: Sequence[float], denominator: Sequence[float], *, offset: float = 0.0) -> Metrics:
    result = ratio(numerator, denominator)
    return {key: result.median - offset, f"{key}_iqr": result.iqr, f"{key}_error": result.error}


_IMPORT = """
import time
start = time.perf_counter()
import torch
between = time.perf_counter()
import relaybackprop
print(between - start, time.perf_counter() - between)
"""


def measure_import(settings: Settings) -> Metrics:
    """Time `import relaybackprop` after `import torch`, in fresh processes."""
    runs: list[tuple[float, float]] = []
    started = time.perf_counter()
    # Bytecode is cached: this process has imported both.
    while len(runs) < settings.imports:
        if len(runs) >= 3 and time.perf_counter() - started > settings.import_budget_s:
            break
        process = subprocess.run(
            [sys.executable, "-c", _IMPORT], capture_output=True, text=True, timeout=300, check=False
        )
        if process.returncode:
            raise RuntimeError(f"importing relaybackprop in a fresh process failed: {process.stderr.strip()}")
        torch_s, package_s = map(float, process.stdout.split())
        runs.append((torch_s, package_s))
    torch_ms, package_ms = (1000 * statistics.median(column) for column in zip(*runs, strict=True))
    return {"import_ms": package_ms, "import_torch_ms": torch_ms, "import_runs": len(runs)}


def measure(settings: Settings) -> Metrics:
    """Return all metrics."""
    metrics = measure_flops(settings) | measure_vgg22(settings) | measure_resnet50(settings)
    return metrics | measure_import(settings)


def targets(metrics: Metrics) -> dict[str, Target]:
    """Return the targets of the metrics. Times are compared with the cost of the operations alone."""

    def in_time(network: str) -> Target:
        counted = metrics[f"{network}_flops_relay_over_multi_loss"]
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
    """Run the benchmark: print the metrics, and write them to a file if --json is given."""
    arguments = parse_arguments("engine", "Measure the cost of relay backpropagation.", argv)
    settings = QUICK if arguments.quick else FULL
    started = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    keeps_memory = keep_memory()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            metrics = measure(settings)
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
    publish(metrics, targets(metrics), about, arguments.json)


if __name__ == "__main__":
    main()
