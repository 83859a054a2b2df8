"""Memory and time of a training step of the CIFAR ResNets in K windows, isolated or overlapping.

    python -m benchmarks.windows [--quick] [--json FILE]

ResNet-32 and ResNet-110 at the size of the papers on local learning: width 16, 32 pixels, a batch of 1,024 (256 on a
CPU; memory is proportional to it). The windows are those of the second check (`experiments.second.windows`), trained
with early release. Contenders: standard BP, the same with every block in `torch.utils.checkpoint`, multi-loss with the
heads of the largest number of windows, and each division into K windows that share S blocks with the window below, or
none (isolated). `benchmarks.memory` and the tests check the gradients.

Metrics, by network and division, such as `resnet32_15_1_relay`: `*_peak_mb`, the peak of allocated memory of a step
without parameters, gradients and the batch; `*_first_mb`, that of the first step, which also searches the graph;
`*_predicted_mb`, the prediction of `relaybackprop.planning.cost`; `*_flops`, floating-point operations over those of
standard BP; `*_time`, the time of a step over that of standard BP, at a batch of 128.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.measure import Metrics, Step, begin, interleave, parse_arguments, peak_bytes, publish, ratio
from benchmarks.memory import Workload, contenders
from experiments.second.windows import ARMS, ISOLATED, PUBLISHED, blocks, load
from relaybackprop import Relay, cost
from relaylab.models.building import build_relay

SEED = 20160916
CLASSES = 10
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of a benchmark run.

    Args:
        depths: depths of the networks, keys of `experiments.second.windows.ARMS`.
        batch: batch size for memory.
        timed_batch: batch size for time.
        pixels: side of the images.
        rounds: maximum number of timing rounds.
        budget_s: time limit for timing one network, in seconds.
    """

    depths: tuple[int, ...]
    batch: int
    timed_batch: int
    pixels: int = 32
    rounds: int
    budget_s: float


FULL = Settings(depths=(32, 110), batch=256, timed_batch=128, rounds=5, budget_s=60)
QUICK = Settings(depths=(32,), batch=4, timed_batch=4, pixels=16, rounds=2, budget_s=2)
GPU = Settings(depths=(32, 110), batch=1024, timed_batch=1024, rounds=20, budget_s=15)


def workload(relay: Relay, depth: int, batch: int, pixels: int, device: str) -> Workload:
    """Return a relay's network, windows and heads with a batch of random images."""
    modules = [relay.model.get_submodule(name) for name in blocks(depth)]
    with torch.device(device):
        images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(CLASSES, (batch,))
    return Workload(relay.model, relay.plan, dict(relay.heads.items()), modules, images, labels)


def divisions(depth: int) -> Iterator[tuple[str, int, int, str]]:
    """Yield name, windows, shared blocks and contender of each division of a network, standard BP first."""
    most = max(ARMS[depth])
    yield "standard", *most, "standard"
    yield "checkpointed", *most, "checkpoint_every"
    yield "multi_loss", *most, "multi_loss"
    for windows, shared in ISOLATED[depth]:
        yield f"{windows}_{shared}_isolated", windows, shared, "isolated_release"
    for windows, shared in ARMS[depth]:
        yield f"{windows}_{shared}_relay", windows, shared, "early_release"


def measure_network(depth: int, settings: Settings, device: str) -> Metrics:
    """Measure memory and time of all divisions of one network."""
    metrics: Metrics = {}
    timed: dict[str, Step] = {}
    for division, windows, shared, contender in divisions(depth):
        key = f"resnet{depth}_{division}"
        relay = build_relay(load(windows, shared, depth, PUBLISHED)).to(device)
        own = workload(relay, depth, settings.batch, settings.pixels, device)
        metrics |= {f"{key}_{name}": value for name, value in _predicted(own, contender).items()}
        for parameter in own.modules.parameters():
            parameter.grad = torch.zeros_like(parameter)
        step = contenders(own)[contender]
        metrics[f"{key}_first_mb"] = peak_bytes(step) / MB
        metrics[f"{key}_peak_mb"] = peak_bytes(step) / MB
        timed[key] = contenders(workload(relay, depth, settings.timed_batch, settings.pixels, device))[contender]
    times = interleave(timed, rounds=settings.rounds, budget_s=settings.budget_s, warmup=1)
    standard = times[f"resnet{depth}_standard"]
    for key, seconds in times.items():
        result = ratio(seconds, standard)
        metrics |= {f"{key}_time": result.median, f"{key}_time_error": result.error}
    return metrics


def _predicted(own: Workload, contender: str) -> Metrics:
    """Return the predicted peak in MB and the operations relative to standard BP; none for checkpointing."""
    if contender == "checkpoint_every":
        return {}
    plan, scheme = (own.plan.isolated(), "early_release") if contender == "isolated_release" else (own.plan, contender)
    result = cost(own.model, plan, own.images.to("meta"), own.heads)
    return {"predicted_mb": result.peaks[scheme] / MB, "flops": result.ratios[scheme]}


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark, print its table and write its JSON file."""
    parsed = parse_arguments("windows", "Memory and time of ResNets in K windows.", arguments)
    settings, device, about = begin(parsed, quick=QUICK, full=FULL, gpu=GPU, seed=SEED)
    metrics: Metrics = {}
    for depth in settings.depths:
        metrics |= measure_network(depth, settings, device)
    publish(metrics, {}, about, parsed.json)


if __name__ == "__main__":
    main()
