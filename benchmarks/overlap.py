"""Gradient averaging during early release on a slow link: two processes whose messages are delayed.

    python -m benchmarks.overlap [--quick] [--json FILE]

| contender | description                                                                     |
| --------- | ------------------------------------------------------------------------------- |
| end       | early release, then an all-reduce of each 25 MB; the only method before 0.2     |
| during    | `Relay.forward_backward`: each bucket is sent when its gradients are final      |

The link is simulated: gloo sums the gradients, and `wait` then returns no earlier than `latency + bytes / bandwidth`
after the call, or after the end of the previous message. As on a GPU, a delayed message does not use the cores. All
times include gloo's own time, even with the `free` link, which has no delay. Bandwidths are chosen so that all messages
of a step last 0.25 to 2 times as long as the step on the free link.

Lower bound: with a step of C seconds on the free link, messages of T seconds in total, and t seconds for the last
bucket, which is sent when everything is computed, a step takes at least max(C + t, T).

Metrics: `*_hidden` is the fraction of the messages' time in which `during` does not wait for them, the median of the
rounds; for `end` it is 0. `*_during_over_end` compares times within each round. `*_over_bound` compares the time of
`during` with the lower bound.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from benchmarks.measure import Metrics, Target, environment, interleave, keep_memory, parse_arguments, publish, ratio
from benchmarks.networks import Workload, resnet50, vgg22, without_dropout
from relaybackprop import Relay, RelayLoss

SEED = 20160916
WORLD = 2
LATENCY = 1e-3
LOADS = (0.25, 0.5, 1.0, 2.0)  # time of all messages over time of a step without delay


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of a benchmark run.

    Args:
        workloads: functions that return a network and its batch, by name.
        loads: see `LOADS`.
        rounds: number of timing rounds.
    """

    workloads: dict[str, Callable[[], Workload]]
    loads: tuple[float, ...] = LOADS
    rounds: int


def small_vgg() -> Workload:
    """Return VGG-22 with 38 MB of gradients, a third of them in the classifier."""
    return vgg22(24, 64, 16)


def small_resnet() -> Workload:
    """Return ResNet-50 on small images, with 115 MB of gradients."""
    return resnet50(64, 8)


def tiny() -> Workload:
    """Return a tiny network to test the benchmark."""
    return vgg22(4, 32, 2)


FULL = Settings(workloads={"vgg22": small_vgg, "resnet50": small_resnet}, rounds=9)
QUICK = Settings(workloads={"vgg22": small_vgg}, loads=(0.5,), rounds=5)


class Link:
    """A simulated link between all processes, which transmits one message at a time.

    Its `all_reduce` replaces that of `torch.distributed`.

    Args:
        all_reduce: `torch.distributed.all_reduce`.

    Attributes:
        latency: latency of each message, in seconds.
        bandwidth: bytes per second; 0 for a link without delay.
        sizes: sizes of the messages so far, in bytes.
        waited: seconds that this process has waited for delayed messages so far.
    """

    def __init__(self, all_reduce: Callable[..., Any]) -> None:
        self.latency = self.bandwidth = self.waited = 0.0
        self.sizes: list[int] = []
        self._all_reduce = all_reduce
        self._busy_until = 0.0

    def seconds(self, size: int) -> float:
        """Return the duration of a message of `size` bytes, in seconds."""
        return self.latency + size / self.bandwidth if self.bandwidth else 0.0

    def all_reduce(
        self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> "Delayed | None":
        """Start an all-reduce whose result is delayed."""
        self.sizes.append(tensor.nbytes)
        self._busy_until = max(self._busy_until, time.perf_counter()) + self.seconds(tensor.nbytes)
        work = Delayed(self, self._all_reduce(tensor, op, group=group, async_op=True), self._busy_until)
        if async_op:
            return work
        work.wait()
        return None


@dataclass(frozen=True)
class Delayed:
    """A message that arrives no earlier than `until`."""

    link: Link
    work: Any
    until: float

    def wait(self) -> None:
        """Block until the message has arrived."""
        self.work.wait()
        remaining = max(0.0, self.until - time.perf_counter())
        time.sleep(remaining)
        self.link.waited += remaining


def average_at_end(parameters: Sequence[nn.Parameter], bucket_bytes: int = 25 * 2**20) -> None:
    """Average all gradients after the step, one bucket after the other."""
    used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    buckets: list[list[Tensor]] = [[]]
    for parameter in parameters:
        if sum(gradient.nbytes for gradient in buckets[-1]) >= bucket_bytes:
            buckets.append([])
        assert parameter.grad is not None
        buckets[-1].append(parameter.grad)
    for bucket in buckets:
        total = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(total)
        total /= dist.get_world_size()
        for gradient, mean in zip(bucket, total.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def measure_two_processes(settings: Settings) -> dict[str, Metrics]:
    """Run two processes and return the metrics of the first one, by network."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, (settings, folder), nprocs=WORLD)
        return torch.load(Path(folder) / "metrics.pt", weights_only=True)


def _process(rank: int, settings: Settings, folder: str) -> None:
    torch.set_num_threads(1)
    keep_memory()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    link = Link(dist.all_reduce)
    metrics: dict[str, Metrics] = {}
    with mock.patch.object(dist, "all_reduce", link.all_reduce):
        for name, make in settings.workloads.items():
            torch.manual_seed(SEED)
            metrics[name] = _measure(without_dropout(make()), settings, link, rank)
    if rank == 0:
        torch.save(metrics, Path(folder) / "metrics.pt")
    dist.destroy_process_group()


def _measure(workload: Workload, settings: Settings, link: Link, rank: int) -> Metrics:
    relay = Relay(workload.model, workload.plan, {"aux": workload.head})
    loss, parameters = RelayLoss(nn.CrossEntropyLoss()), list(relay.parameters())
    images = workload.images + rank  # different images in each process

    def clear() -> None:
        relay.zero_grad()
        dist.barrier()

    def step(*, sync: bool) -> None:
        relay.forward_backward(images, target=workload.labels, loss=loss, sync=sync)

    def at_end() -> None:
        step(sync=False)
        average_at_end(parameters)

    def overlapped() -> None:
        step(sync=True)

    def run(contender: Callable[[], None]) -> list[Tensor]:
        clear()
        link.sizes.clear()
        contender()
        return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]

    run(overlapped)  # the first step records when gradients are final
    gradients, sizes = run(overlapped), link.sizes[:]
    torch.testing.assert_close(gradients, run(at_end))

    free = interleave({"end": at_end, "during": overlapped}, rounds=settings.rounds, before=clear, min_rounds=1)
    seconds = torch.tensor(statistics.median(free["during"]))
    dist.broadcast(seconds, 0)  # all processes simulate the same link
    links = {0.0: 0.0}
    for load in settings.loads:
        links[load] = sum(sizes) / max(1e-9, load * float(seconds) - LATENCY * len(sizes))

    waits: dict[str, list[float]] = {}

    def on_link(name: str, bandwidth: float, contender: Callable[[], None]) -> Callable[[], None]:
        def timed() -> None:
            link.latency, link.bandwidth, link.waited = LATENCY, bandwidth, 0.0
            contender()
            link.bandwidth = 0.0
            waits.setdefault(name, []).append(link.waited)

        return timed

    contenders = {
        f"{name} {load}": on_link(f"{name} {load}", bandwidth, contender)
        for load, bandwidth in links.items()
        for name, contender in (("end", at_end), ("during", overlapped))
    }
    times = interleave(contenders, rounds=settings.rounds, before=clear)
    return _metrics(times, waits, links, sizes)


def _metrics(
    times: dict[str, list[float]], waits: dict[str, list[float]], links: dict[float, float], sizes: Sequence[int]
) -> Metrics:
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    metrics: Metrics = {
        "megabytes": sum(sizes) / 1e6,
        "messages": len(sizes),
        "last_message_megabytes": sizes[-1] / 1e6,
        "free_end_ms": 1000 * medians["end 0.0"],
        "free_during_ms": 1000 * medians["during 0.0"],
    }
    for load, bandwidth in links.items():
        if not bandwidth:
            continue
        end, overlapped = medians[f"end {load}"], medians[f"during {load}"]
        compared = ratio(times[f"during {load}"], times[f"end {load}"])
        total, last = LATENCY * len(sizes) + sum(sizes) / bandwidth, LATENCY + sizes[-1] / bandwidth
        bound = [max(computing + last, total) for computing in times["during 0.0"]]
        metrics |= {
            f"load{load}_megabytes_per_s": bandwidth / 1e6,
            f"load{load}_end_ms": 1000 * end,
            f"load{load}_during_ms": 1000 * overlapped,
            f"load{load}_during_over_end": compared.median,
            f"load{load}_during_over_end_error": compared.error,
            f"load{load}_hidden": 1 - statistics.median(waits[f"during {load}"]) / total,
            f"load{load}_over_bound": ratio(times[f"during {load}"], bound).median,
        }
    return metrics


def targets(settings: Settings) -> dict[str, Target]:
    """Return the targets of the metrics."""
    loads = [load for load in settings.loads if 0.25 <= load <= 1]
    return {f"{name}_load{load}_during_over_end": Target("<", 1) for name in settings.workloads for load in loads}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark: print the metrics, and write them to a file if --json is given."""
    arguments = parse_arguments("overlap", "Measure gradient averaging during early release on a slow link.", argv)
    settings = QUICK if arguments.quick else FULL
    about = environment() | {
        "quick": arguments.quick,
        "link": f"simulated: {LATENCY} s of latency; gloo between {WORLD} processes of one thread each sums gradients",
        "seed": SEED,
    }
    results = measure_two_processes(settings)
    metrics = {f"{name}_{key}": value for name, result in results.items() for key, value in result.items()}
    publish(metrics, targets(settings), about, arguments.json)


if __name__ == "__main__":
    main()
