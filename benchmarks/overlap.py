"""Averaging while early release runs, on a slow link: two processes, whose messages are delayed.

    python -m benchmarks.overlap [--quick] [--json FILE]

| contender | what                                                                         |
| --------- | ---------------------------------------------------------------------------- |
| end       | early release, then an all-reduce of each 25 MB: until 0.2 the only way      |
| during    | `Relay.forward_backward`: each bucket leaves when the gradients in it are final |

The link is simulated: gloo adds the gradients up, and `wait` then returns no earlier than `latency + bytes / bandwidth`
after the call, or after the end of the message before. A delayed message takes no time from the cores, as on a GPU.
What gloo itself takes is in all times, also with the `free` link, which delays nothing. Bandwidths are chosen so that
all messages of a step last 0.25 to 2 times as long as the step on the free link.

Lower bound: a step of C seconds on the free link, messages of T seconds in all and t for the last bucket, which leaves
when everything is computed, takes at least max(C + t, T).

Figures: `*_hidden` is the share of all messages' time in which `during` does not wait for them, the median of the
rounds; for `end` it is 0. `*_during_over_end` compares times within each round, `*_over_bound` that of `during` with
the lower bound.
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

from benchmarks.measure import Figures, Target, environment, interleave, keep_memory, parse_arguments, publish, ratio
from benchmarks.networks import Subject, resnet50, vgg22, without_dropout
from relaybackprop import Relay, RelayLoss

SEED = 20160916
WORLD = 2
LATENCY = 1e-3
LOADS = (0.25, 0.5, 1.0, 2.0)  # time of all messages over time of a step without delay


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of a benchmark run.

    Args:
        subjects: by name, what makes the network and its batch.
        loads: see `LOADS`.
        rounds: of every timing.
    """

    subjects: dict[str, Callable[[], Subject]]
    loads: tuple[float, ...] = LOADS
    rounds: int


def small_vgg() -> Subject:
    """VGG-22, 38 MB of gradients, a third of them the classifier's."""
    return vgg22(24, 64, 16)


def small_resnet() -> Subject:
    """ResNet-50 on small images, 115 MB of gradients."""
    return resnet50(64, 8)


def tiny() -> Subject:
    """For a test of the benchmark."""
    return vgg22(4, 32, 2)


FULL = Settings(subjects={"vgg22": small_vgg, "resnet50": small_resnet}, rounds=9)
QUICK = Settings(subjects={"vgg22": small_vgg}, loads=(0.5,), rounds=5)


class Link:
    """A link between all processes on which one message travels at a time, in place of `torch.distributed.all_reduce`.

    Args:
        all_reduce: torch's.

    Attributes:
        latency: seconds of each message.
        bandwidth: bytes per second; 0 for a link without delay.
        sizes: bytes of the messages so far.
        waited: seconds in which this process has waited for delayed messages so far.
    """

    def __init__(self, all_reduce: Callable[..., Any]) -> None:
        self.latency = self.bandwidth = self.waited = 0.0
        self.sizes: list[int] = []
        self._all_reduce = all_reduce
        self._free_at = 0.0

    def seconds(self, size: int) -> float:
        """Duration of a message."""
        return self.latency + size / self.bandwidth if self.bandwidth else 0.0

    def all_reduce(
        self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> "Delayed | None":
        """Add up, and deliver late."""
        self.sizes.append(tensor.nbytes)
        self._free_at = max(self._free_at, time.perf_counter()) + self.seconds(tensor.nbytes)
        work = Delayed(self, self._all_reduce(tensor, op, group=group, async_op=True), self._free_at)
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
        """Block until it has arrived."""
        self.work.wait()
        rest = max(0.0, self.until - time.perf_counter())
        time.sleep(rest)
        self.link.waited += rest


def average_at_end(parameters: Sequence[nn.Parameter], bucket_bytes: int = 25 * 2**20) -> None:
    """Average gradients one bucket after the other, when all are there."""
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


def measure_pair(settings: Settings) -> dict[str, Figures]:
    """Figures by network, from the first of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, (settings, folder), nprocs=WORLD)
        return torch.load(Path(folder) / "figures.pt", weights_only=True)


def _process(rank: int, settings: Settings, folder: str) -> None:
    torch.set_num_threads(1)
    keep_memory()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    link = Link(dist.all_reduce)
    figures: dict[str, Figures] = {}
    with mock.patch.object(dist, "all_reduce", link.all_reduce):
        for name, make in settings.subjects.items():
            torch.manual_seed(SEED)
            figures[name] = _measure(without_dropout(make()), settings, link, rank)
    if rank == 0:
        torch.save(figures, Path(folder) / "figures.pt")
    dist.destroy_process_group()


def _measure(subject: Subject, settings: Settings, link: Link, rank: int) -> Figures:
    relay = Relay(subject.model, subject.plan, {"aux": subject.head})
    loss, parameters = RelayLoss(nn.CrossEntropyLoss()), list(relay.parameters())
    images = subject.images + rank  # other images in each process

    def clear() -> None:
        relay.zero_grad()
        dist.barrier()

    def step(*, sync: bool) -> None:
        relay.forward_backward(images, target=subject.labels, loss=loss, sync=sync)

    def at_end() -> None:
        step(sync=False)
        average_at_end(parameters)

    def during() -> None:
        step(sync=True)

    def run(contender: Callable[[], None]) -> list[Tensor]:
        clear()
        link.sizes.clear()
        contender()
        return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]

    run(during)  # learns when gradients are final
    gradients, sizes = run(during), link.sizes[:]
    torch.testing.assert_close(gradients, run(at_end))

    free = interleave({"end": at_end, "during": during}, rounds=settings.rounds, before=clear, min_rounds=1)
    seconds = torch.tensor(statistics.median(free["during"]))
    dist.broadcast(seconds, 0)  # all processes simulate the same link
    links = {0.0: 0.0}
    for load in settings.loads:
        links[load] = sum(sizes) / max(1e-9, load * float(seconds) - LATENCY * len(sizes))

    waits: dict[str, list[float]] = {}

    def on(name: str, bandwidth: float, contender: Callable[[], None]) -> Callable[[], None]:
        def timed() -> None:
            link.latency, link.bandwidth, link.waited = LATENCY, bandwidth, 0.0
            contender()
            link.bandwidth = 0.0
            waits.setdefault(name, []).append(link.waited)

        return timed

    contenders = {
        f"{name} {load}": on(f"{name} {load}", bandwidth, contender)
        for load, bandwidth in links.items()
        for name, contender in (("end", at_end), ("during", during))
    }
    times = interleave(contenders, rounds=settings.rounds, before=clear)
    return _figures(times, waits, links, sizes)


def _figures(
    times: dict[str, list[float]], waits: dict[str, list[float]], links: dict[float, float], sizes: Sequence[int]
) -> Figures:
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    figures: Figures = {
        "megabytes": sum(sizes) / 1e6,
        "messages": len(sizes),
        "last_message_megabytes": sizes[-1] / 1e6,
        "free_end_ms": 1000 * medians["end 0.0"],
        "free_during_ms": 1000 * medians["during 0.0"],
    }
    for load, bandwidth in links.items():
        if not bandwidth:
            continue
        end, during = medians[f"end {load}"], medians[f"during {load}"]
        compared = ratio(times[f"during {load}"], times[f"end {load}"])
        total, last = LATENCY * len(sizes) + sum(sizes) / bandwidth, LATENCY + sizes[-1] / bandwidth
        bound = [max(computing + last, total) for computing in times["during 0.0"]]
        figures |= {
            f"load{load}_megabytes_per_s": bandwidth / 1e6,
            f"load{load}_end_ms": 1000 * end,
            f"load{load}_during_ms": 1000 * during,
            f"load{load}_during_over_end": compared.median,
            f"load{load}_during_over_end_error": compared.error,
            f"load{load}_hidden": 1 - statistics.median(waits[f"during {load}"]) / total,
            f"load{load}_over_bound": ratio(times[f"during {load}"], bound).median,
        }
    return figures


def targets(settings: Settings) -> dict[str, Target]:
    """Limits of the figures: what has to be reached."""
    loads = [load for load in settings.loads if 0.25 <= load <= 1]
    return {f"{name}_load{load}_during_over_end": Target("<", 1) for name in settings.subjects for load in loads}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures, and write them to a file if asked to."""
    arguments = parse_arguments("overlap", "Averaging of gradients while early release runs, on a slow link.", argv)
    settings = QUICK if arguments.quick else FULL
    about = environment() | {
        "quick": arguments.quick,
        "link": f"simulated: {LATENCY} s of latency; gloo between {WORLD} processes of one thread adds up",
        "seed": SEED,
    }
    found = measure_pair(settings)
    figures = {f"{name}_{key}": value for name, own in found.items() for key, value in own.items()}
    publish(figures, targets(settings), about, arguments.json)


if __name__ == "__main__":
    main()
