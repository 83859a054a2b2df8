"""Scaling on paper: what data-parallel and window-parallel training would cost on many GPUs, and a check of the model.

    python -m benchmarks.scale [--quick] [--json FILE]

The model is a schedule of tasks: each takes a device (or a link) for a time and waits for others, in a fixed order.
Times of computing are operations, counted by `relaybackprop.cost`, over a rate; times of communication are bytes over a
bandwidth, plus a latency. docs/method/scale.md lists the assumptions. The check: two processes on this machine, whose
rate, bandwidth and latency are measured apart from each other, and whose steps are then predicted and measured.

Figures: `check_*_predicted` is the predicted time of a step over the measured one; `*_n*_efficiency_a` the images per
second and GPU over those of a single GPU that trains by multi-loss.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.formulations import vit_b
from benchmarks.measure import Figures, Target, environment, parse_arguments, publish
from benchmarks.networks import vgg22
from relaybackprop import AuxiliaryHead, Plan, Relay, RelayLoss, Window, cost
from relaybackprop.planning.chain import chain
from relaylab.models import model_a

SEED = 20160916
GPUS = (8, 32, 128, 512, 1024)
WORLD = 2


@dataclass(frozen=True)
class Task:
    """Something that takes a resource for a time.

    Args:
        name: any that is hashable and has not been used.
        resource: what it takes; one thing at a time goes on there, in the order in which tasks are given.
        seconds: how long.
        after: names of tasks that have to be over, all of them given before.
    """

    name: str
    resource: str
    seconds: float
    after: tuple[str, ...] = ()


def simulate(tasks: Iterable[Task]) -> dict[str, float]:
    """When each task is over, in seconds from the start."""
    ends: dict[str, float] = {}
    free: dict[str, float] = {}
    for task in tasks:
        start = max([free.get(task.resource, 0.0), *(ends[name] for name in task.after)])
        ends[task.name] = free[task.resource] = start + task.seconds
    return ends


@dataclass(frozen=True)
class Cluster:
    """Devices and what connects them.

    Args:
        rate: floating-point operations per second that one device achieves.
        node: devices in a machine.
        inside: bytes per second of one device to others in its machine.
        between: bytes per second of one device to other machines.
        latency: seconds of one message.
    """

    rate: float
    node: int
    inside: float
    between: float
    latency: float

    def all_reduce(self, size: float, devices: int) -> float:
        """Seconds to add up `size` bytes over all devices: within machines, between them, and back."""
        here = min(self.node, devices)
        machines = -(-devices // here)
        seconds = 2 * (here - 1) / here * size / self.inside
        if machines > 1:
            seconds += 2 * (machines - 1) / machines * size / here / self.between
        return seconds + 2 * self.latency * ((here - 1).bit_length() + (machines - 1).bit_length())

    def send(self, size: float) -> float:
        """Seconds to hand `size` bytes to a device of the same machine."""
        return self.latency + size / self.inside


# Not measured: an H100's order of magnitude for such networks in bf16, NVLink, and 400 Gbit/s for each GPU.
ASSUMED = Cluster(rate=250e12, node=8, inside=300e9, between=50e9, latency=10e-6)


@dataclass(frozen=True)
class Stage:
    """Consecutive layers, with the head on them if there is one.

    Args:
        forward: operations of a forward pass.
        backward: of a backward pass for weights and input.
        lane: of one for the input alone.
        gradients: bytes.
    """

    forward: float
    backward: float
    lane: float
    gradients: float


@dataclass(frozen=True)
class Job:
    """A network with one head and overlapping windows.

    Args:
        below: layers that the auxiliary loss alone trains.
        overlap: layers of both windows, with the head.
        above: the rest.
        images: in a batch, for each device.
        handed_on: bytes of the overlap's output, for the whole batch.
    """

    below: Stage
    overlap: Stage
    above: Stage
    images: int
    handed_on: float

    @property
    def stages(self) -> tuple[Stage, Stage, Stage]:
        """From the lowest up."""
        return self.below, self.overlap, self.above

    @property
    def plain(self) -> float:
        """Operations of a multi-loss step."""
        return sum(stage.forward + stage.backward for stage in self.stages)


def job_of(model: nn.Module, plan: Plan, head: nn.Module, batch: int, pixels: int) -> Job:
    """Count a step of a network with one head, whose window overlaps the primary one."""
    images = torch.empty(batch, 3, pixels, pixels, device="meta")
    found = cost(model, plan, images, {"aux": head})
    low, shared, high, aux = found.parts
    lane = shared.schemes["early_release"].flops - shared.schemes["standard"].flops
    below = Stage(low.schemes["standard"].forward, low.schemes["standard"].backward, 0, 4 * low.parameters)
    spent = shared.schemes["standard"] + aux.schemes["relay"]
    overlap = Stage(spent.forward, spent.backward, lane, 4 * (shared.parameters + aux.parameters))
    above = Stage(high.schemes["standard"].forward, high.schemes["standard"].backward, 0, 4 * high.parameters)
    top = plan.auxiliary["aux"].top
    shape = next(link.shape for link in chain(model, images) if top in link.names)
    return Job(below, overlap, above, batch, 4 * torch.Size(shape).numel())


def data_parallel(job: Job, cluster: Cluster, devices: int, *, early: bool, hidden: bool = True) -> float:
    """Seconds of a step in which each device has the whole network and a batch of its own.

    Args:
        job: what a step computes.
        cluster: where.
        devices: how many.
        early: by `Relay.forward_backward`: the lowest stage is finished before the highest one runs forward, the
            overlap last. Else one backward pass, from the top.
        hidden: whether devices compute while gradients travel. A CPU's cores do both.
    """
    reduce = [cluster.all_reduce(stage.gradients, devices) for stage in job.stages]
    work = [stage.forward + stage.backward + stage.lane for stage in job.stages]
    if not hidden:
        return sum(work) / cluster.rate + sum(reduce)
    below, overlap, above = job.stages
    if early:
        before = {0: below.forward + overlap.forward + overlap.lane, 2: above.forward, 1: 0.0}
    else:
        before = {2: below.forward + overlap.forward + above.forward, 1: overlap.lane, 0: 0.0}
    tasks: list[Task] = []
    for number, forward in before.items():  # each stage's gradients travel while the stages after it are computed
        seconds = (forward + job.stages[number].backward) / cluster.rate
        tasks += [
            Task(f"compute{number}", "device", seconds),
            Task(f"reduce{number}", "link", reduce[number], (f"compute{number}",)),
        ]
    return max(simulate(tasks).values())


def window_parallel(job: Job, cluster: Cluster, devices: int, *, parts: int, relay: bool) -> float:
    """Seconds of a step in which pairs of devices share a network, and all pairs have batches of their own.

    The first device of a pair has the layers up to the head, the second the rest; a batch, twice as large as on one
    device, goes through in equal parts. Gradients of the two devices are averaged over the pairs apart from each other.

    Args:
        job: what a step computes.
        cluster: where.
        devices: an even number.
        parts: of a batch.
        relay: with the job's windows, where the lower device need not wait for the upper one to train what lies below
            the overlap; else by multi-loss training, where all has to wait.
    """
    scale = 2 / parts / cluster.rate
    hand = cluster.send(2 * job.handed_on / parts)
    below, overlap, above = job.stages
    tasks: list[Task] = []
    for part in range(parts):
        tasks += [
            Task(f"f{part}", "low", (below.forward + overlap.forward) * scale),
            Task(f"up{part}", "link up", hand, (f"f{part}",)),
        ]
        if relay:
            tasks.append(Task(f"own{part}", "low", (overlap.lane + below.backward) * scale))
        tasks += [
            Task(f"a{part}", "high", (above.forward + above.backward) * scale, (f"up{part}",)),
            Task(f"down{part}", "link down", hand, (f"a{part}",)),
        ]
    rest = overlap.backward if relay else overlap.backward + below.backward
    tasks += [Task(f"b{part}", "low", rest * scale, (f"down{part}",)) for part in range(parts)]
    ends = simulate(tasks)
    low = max(end for name, end in ends.items() if name[0] in "bof")
    high = max(end for name, end in ends.items() if name[0] == "a")
    pairs = devices // 2
    return max(
        low + cluster.all_reduce(below.gradients + overlap.gradients, pairs),
        high + cluster.all_reduce(above.gradients, pairs),
    )


def project(job: Job, cluster: Cluster, counts: Sequence[int] = GPUS) -> Figures:
    """Images per second and device over those of one device that trains by multi-loss."""
    alone = job.images / (job.plain / cluster.rate)
    figures: Figures = {}
    for devices in counts:
        steps = {
            "data_parallel": data_parallel(job, cluster, devices, early=False),
            "early_release": data_parallel(job, cluster, devices, early=True),
            "window_parallel": window_parallel(job, cluster, devices, parts=8, relay=True),
            "pipelined_multi_loss": window_parallel(job, cluster, devices, parts=8, relay=False),
        }
        figures |= {f"n{devices}_efficiency_{name}": job.images / s / alone for name, s in steps.items()}
    return figures


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much to run for the check.

    Args:
        width: filters of VGG-22's first segment.
        batch: images of each process.
        rounds: steps that are timed.
    """

    width: int = 24
    batch: int = 16
    rounds: int


FULL = Settings(rounds=40)
QUICK = Settings(rounds=6)


def measure_pair(settings: Settings) -> Figures:
    """Two processes: times of steps with and without communication, and of communication alone, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, (settings, folder), nprocs=WORLD)
        return torch.load(Path(folder) / "times.pt", weights_only=True)


def _process(rank: int, settings: Settings, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    subject = vgg22(settings.width, 64, settings.batch)
    relay = Relay(subject.model, subject.plan, {"aux": subject.head})
    loss, parallel = RelayLoss(nn.CrossEntropyLoss()), DistributedDataParallel(relay)
    size = sum(parameter.numel() for parameter in relay.parameters())
    whole, one = torch.zeros(size), torch.zeros(1)

    def usual() -> None:
        loss(parallel(subject.images), subject.labels).backward()

    def alone() -> None:
        with parallel.no_sync():
            usual()

    def early(sync: bool) -> None:
        relay.forward_backward(subject.images, target=subject.labels, loss=loss, sync=sync)

    steps: Mapping[str, Callable[[], object]] = {
        "alone": alone,
        "ddp": usual,
        "step_alone": lambda: early(False),
        "step": lambda: early(True),
        "all_reduce": lambda: dist.all_reduce(whole),
        "latency": lambda: dist.all_reduce(one),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(settings.rounds + 2):
        for name, step in steps.items():
            for parameter in relay.parameters():
                parameter.grad = torch.zeros_like(parameter)
            dist.barrier()
            begin = time.perf_counter()
            step()
            dist.barrier()
            if number >= 2:
                times[name].append(time.perf_counter() - begin)
    if rank == 0:
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        torch.save(medians | {"bytes": 4.0 * size}, Path(folder) / "times.pt")
    dist.destroy_process_group()


def check(settings: Settings) -> Figures:
    """Predict the steps of two processes from what they do apart from each other."""
    times = measure_pair(settings)
    subject = vgg22(settings.width, 64, settings.batch, device="meta")
    job = job_of(subject.model, subject.plan, subject.head, settings.batch, 64)
    # One machine with two devices: all_reduce is 2 * 1/2 * bytes / inside + 2 * latency.
    latency = times["latency"] / 2
    inside = times["bytes"] / (times["all_reduce"] - times["latency"])
    work = sum(stage.forward + stage.backward + stage.lane for stage in job.stages)
    figures: Figures = {}
    for key, alone, together in (("data_parallel", "alone", "ddp"), ("early_release", "step_alone", "step")):
        cluster = Cluster(work / times[alone], WORLD, inside, inside, latency)
        predicted = data_parallel(job, cluster, WORLD, early=key == "early_release", hidden=False)
        figures[f"check_{key}_predicted"] = predicted / times[together]
        figures[f"check_{key}_ms"] = 1000 * times[together]
        figures[f"check_{key}_alone_ms"] = 1000 * times[alone]
    figures |= {"check_all_reduce_ms": 1000 * times["all_reduce"], "check_megabytes_per_s": inside / 1e6}
    return figures


def jobs() -> dict[str, Job]:
    """Projected jobs."""
    with torch.device("meta"):
        model, head = model_a(401), AuxiliaryHead(512, 401)
    plan = Plan(Window(bottom="segment4"), {"aux": Window(top="segment4")})
    transformer = vit_b(224, 1, 64, "meta")
    return {
        "model_a": job_of(model, plan, head, 64, 224),
        "vit_b": job_of(transformer.model, transformer.plan, transformer.head, 64, 224),
    }


def measure(settings: Settings) -> Figures:
    """All figures."""
    figures = check(settings)
    for name, job in jobs().items():
        figures |= {f"{name}_{key}": value for key, value in project(job, ASSUMED).items()}
    return figures


def targets() -> dict[str, Target]:
    """What the figures have to reach."""
    return {f"check_{key}_predicted": Target(">", 0.85, "and < 1.15") for key in ("data_parallel", "early_release")}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures, and write them to a file if asked to."""
    arguments = parse_arguments("scale", "Model training on many GPUs, and check the model with two processes.", argv)
    settings = QUICK if arguments.quick else FULL
    figures = measure(settings)
    about = environment() | {
        "quick": arguments.quick,
        "checked": f"VGG-22, width {settings.width}, {settings.batch} x 3 x 64^2 in each of {WORLD} processes, gloo",
        "projected": "64 x 3 x 224^2 on each GPU, gradients in float32",
        "assumed": str(ASSUMED),
        "seed": SEED,
    }
    publish(figures, targets(), about, arguments.json)


if __name__ == "__main__":
    main()
