"""A cost model of data-parallel and window-parallel training on many GPUs, and a check of the model.

    python -m benchmarks.scale [--quick] [--json FILE]

The model is a schedule of tasks. Each task occupies a device (or a link) for a time and waits for other tasks, in a
fixed order. Compute times are operations, counted by `relaybackprop.cost`, over a rate. Communication times are bytes
over a bandwidth, plus a latency. docs/method/scale.md lists the assumptions. The check uses two processes on this
machine: it measures their rate, bandwidth and latency separately, then predicts and measures their steps.

Metrics: `check_*_predicted` is the predicted time of a step over the measured one. `*_n*_efficiency_a` is the number of
images per second per GPU, relative to a single GPU with multi-loss training.
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
from benchmarks.measure import Metrics, Target, environment, parse_arguments, publish
from benchmarks.networks import vgg22
from relaybackprop import AuxiliaryHead, Plan, Relay, RelayLoss, Window, cost
from relaybackprop.planning.chain import chain
from relaylab.models import model_a

SEED = 20160916
GPUS = (8, 32, 128, 512, 1024)
WORLD = 2


@dataclass(frozen=True)
class Task:
    """A task that occupies a resource for a time.

    Args:
        name: unique name.
        resource: the resource. It runs one task at a time, in the given order of the tasks.
        seconds: duration, in seconds.
        after: names of earlier tasks that must end first.
    """

    name: str
    resource: str
    seconds: float
    after: tuple[str, ...] = ()


def simulate(tasks: Iterable[Task]) -> dict[str, float]:
    """Return the end of each task, in seconds from the start."""
    ends: dict[str, float] = {}
    free: dict[str, float] = {}
    for task in tasks:
        start = max([free.get(task.resource, 0.0), *(ends[name] for name in task.after)])
        ends[task.name] = free[task.resource] = start + task.seconds
    return ends


@dataclass(frozen=True)
class Cluster:
    """Devices and the links between them.

    Args:
        rate: floating-point operations per second that one device achieves.
        node: number of devices in a machine.
        inside: bytes per second from one device to others in its machine.
        between: bytes per second from one device to other machines.
        latency: latency of one message, in seconds.
    """

    rate: float
    node: int
    inside: float
    between: float
    latency: float

    def all_reduce(self, size: float, devices: int) -> float:
        """Return the seconds of an all-reduce of `size` bytes: within machines, between them, and back."""
        local = min(self.node, devices)
        machines = -(-devices // local)
        seconds = 2 * (local - 1) / local * size / self.inside
        if machines > 1:
            seconds += 2 * (machines - 1) / machines * size / local / self.between
        return seconds + 2 * self.latency * ((local - 1).bit_length() + (machines - 1).bit_length())

    def send(self, size: float) -> float:
        """Return the seconds to send `size` bytes to a device of the same machine."""
        return self.latency + size / self.inside


# Not measured: an H100's order of magnitude for such networks in bf16, NVLink, and 400 Gbit/s for each GPU.
ASSUMED = Cluster(rate=250e12, node=8, inside=300e9, between=50e9, latency=10e-6)


@dataclass(frozen=True)
class Stage:
    """Consecutive layers, including the head that reads them, if any.

    Args:
        forward: operations of a forward pass.
        backward: operations of a backward pass for weights and input.
        lane: operations of a backward pass for the input alone.
        gradients: size of the gradients, in bytes.
    """

    forward: float
    backward: float
    lane: float
    gradients: float


@dataclass(frozen=True)
class Job:
    """A network with one head and overlapping windows.

    Args:
        below: layers that only the auxiliary loss trains.
        overlap: layers of both windows, with the head.
        above: layers that only the primary loss trains.
        images: batch size of each device.
        transferred: size of the overlap's output for the whole batch, in bytes.
    """

    below: Stage
    overlap: Stage
    above: Stage
    images: int
    transferred: float

    @property
    def stages(self) -> tuple[Stage, Stage, Stage]:
        """All stages, from lowest to highest."""
        return self.below, self.overlap, self.above

    @property
    def plain(self) -> float:
        """The number of operations of a multi-loss step."""
        return sum(stage.forward + stage.backward for stage in self.stages)


def job_of(model: nn.Module, plan: Plan, head: nn.Module, batch: int, pixels: int) -> Job:
    """Count the operations of a step of a network with one head, whose window overlaps the primary one."""
    images = torch.empty(batch, 3, pixels, pixels, device="meta")
    result = cost(model, plan, images, {"aux": head})
    low, shared, high, aux = result.parts
    lane = shared.schemes["early_release"].flops - shared.schemes["standard"].flops
    below = Stage(low.schemes["standard"].forward, low.schemes["standard"].backward, 0, 4 * low.parameters)
    overlap_cost = shared.schemes["standard"] + aux.schemes["relay"]
    overlap = Stage(overlap_cost.forward, overlap_cost.backward, lane, 4 * (shared.parameters + aux.parameters))
    above = Stage(high.schemes["standard"].forward, high.schemes["standard"].backward, 0, 4 * high.parameters)
    top = plan.auxiliary["aux"].top
    shape = next(link.shape for link in chain(model, images) if top in link.names)
    return Job(below, overlap, above, batch, 4 * torch.Size(shape).numel())


def data_parallel(job: Job, cluster: Cluster, devices: int, *, early: bool, hidden: bool = True) -> float:
    """Return the seconds of a step in which each device has the whole network and its own batch.

    Args:
        job: the work of a step.
        cluster: the devices and links.
        devices: number of devices.
        early: whether to use `Relay.forward_backward`: the lowest stage is finished before the highest one runs
            forward, and the overlap is last. Otherwise there is one backward pass, from the top.
        hidden: whether communication overlaps with computation. On a CPU the cores do both.
    """
    reduce = [cluster.all_reduce(stage.gradients, devices) for stage in job.stages]
    work = [stage.forward + stage.backward + stage.lane for stage in job.stages]
    if not hidden:
        return sum(work) / cluster.rate + sum(reduce)
    below, overlap, above = job.stages
    if early:
        forward_work = {0: below.forward + overlap.forward + overlap.lane, 2: above.forward, 1: 0.0}
    else:
        forward_work = {2: below.forward + overlap.forward + above.forward, 1: overlap.lane, 0: 0.0}
    tasks: list[Task] = []
    for index, forward in forward_work.items():  # a stage's all-reduce overlaps with the stages after it
        seconds = (forward + job.stages[index].backward) / cluster.rate
        tasks += [
            Task(f"compute{index}", "device", seconds),
            Task(f"reduce{index}", "link", reduce[index], (f"compute{index}",)),
        ]
    return max(simulate(tasks).values())


def window_parallel(job: Job, cluster: Cluster, devices: int, *, micro_batches: int, relay: bool) -> float:
    """Return the seconds of a step in which each pair of devices shares a network and has its own batch.

    The first device of a pair has the layers up to the head, and the second the rest. A batch, twice as large as on one
    device, is processed in equal micro-batches. The gradients of the two devices are averaged separately over the
    pairs.

    Args:
        job: the work of a step.
        cluster: the devices and links.
        devices: number of devices, even.
        micro_batches: number of micro-batches.
        relay: whether to use the job's windows, with which the lower device trains the layers below the overlap without
            waiting for the upper one. Otherwise multi-loss training, in which all layers wait.
    """
    scale = 2 / micro_batches / cluster.rate
    transfer = cluster.send(2 * job.transferred / micro_batches)
    below, overlap, above = job.stages
    tasks: list[Task] = []
    for index in range(micro_batches):
        tasks += [
            Task(f"f{index}", "low", (below.forward + overlap.forward) * scale),
            Task(f"up{index}", "link up", transfer, (f"f{index}",)),
        ]
        if relay:
            tasks.append(Task(f"own{index}", "low", (overlap.lane + below.backward) * scale))
        tasks += [
            Task(f"a{index}", "high", (above.forward + above.backward) * scale, (f"up{index}",)),
            Task(f"down{index}", "link down", transfer, (f"a{index}",)),
        ]
    last_backward = overlap.backward if relay else overlap.backward + below.backward
    tasks += [Task(f"b{index}", "low", last_backward * scale, (f"down{index}",)) for index in range(micro_batches)]
    ends = simulate(tasks)
    low = max(end for name, end in ends.items() if name[0] in "bof")
    high = max(end for name, end in ends.items() if name[0] == "a")
    pairs = devices // 2
    return max(
        low + cluster.all_reduce(below.gradients + overlap.gradients, pairs),
        high + cluster.all_reduce(above.gradients, pairs),
    )


def project(job: Job, cluster: Cluster, counts: Sequence[int] = GPUS) -> Metrics:
    """Return images per second and device, relative to one device with multi-loss training."""
    single_device = job.images / (job.plain / cluster.rate)
    metrics: Metrics = {}
    for devices in counts:
        steps = {
            "data_parallel": data_parallel(job, cluster, devices, early=False),
            "early_release": data_parallel(job, cluster, devices, early=True),
            "window_parallel": window_parallel(job, cluster, devices, micro_batches=8, relay=True),
            "pipelined_multi_loss": window_parallel(job, cluster, devices, micro_batches=8, relay=False),
        }
        metrics |= {f"n{devices}_efficiency_{name}": job.images / s / single_device for name, s in steps.items()}
    return metrics


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of the check.

    Args:
        width: number of filters of VGG-22's first segment.
        batch: batch size of each process.
        rounds: number of timed steps.
    """

    width: int = 24
    batch: int = 16
    rounds: int


FULL = Settings(rounds=40)
QUICK = Settings(rounds=6)


def measure_two_processes(settings: Settings) -> Metrics:
    """Time steps of two processes with and without communication, and communication alone, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, (settings, folder), nprocs=WORLD)
        return torch.load(Path(folder) / "times.pt", weights_only=True)


def _process(rank: int, settings: Settings, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    workload = vgg22(settings.width, 64, settings.batch)
    relay = Relay(workload.model, workload.plan, {"aux": workload.head})
    loss, parallel = RelayLoss(nn.CrossEntropyLoss()), DistributedDataParallel(relay)
    size = sum(parameter.numel() for parameter in relay.parameters())
    whole, one = torch.zeros(size), torch.zeros(1)

    def usual() -> None:
        loss(parallel(workload.images), workload.labels).backward()

    def alone() -> None:
        with parallel.no_sync():
            usual()

    def early(sync: bool) -> None:
        relay.forward_backward(workload.images, target=workload.labels, loss=loss, sync=sync)

    steps: Mapping[str, Callable[[], object]] = {
        "alone": alone,
        "ddp": usual,
        "step_alone": lambda: early(False),
        "step": lambda: early(True),
        "all_reduce": lambda: dist.all_reduce(whole),
        "latency": lambda: dist.all_reduce(one),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step_index in range(settings.rounds + 2):
        for name, step in steps.items():
            for parameter in relay.parameters():
                parameter.grad = torch.zeros_like(parameter)
            dist.barrier()
            begin = time.perf_counter()
            step()
            dist.barrier()
            if step_index >= 2:
                times[name].append(time.perf_counter() - begin)
    if rank == 0:
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        torch.save(medians | {"bytes": 4.0 * size}, Path(folder) / "times.pt")
    dist.destroy_process_group()


def check(settings: Settings) -> Metrics:
    """Predict the steps of two processes from separate measurements and compare them with measured steps."""
    times = measure_two_processes(settings)
    workload = vgg22(settings.width, 64, settings.batch, device="meta")
    job = job_of(workload.model, workload.plan, workload.head, settings.batch, 64)
    # One machine with two devices: all_reduce is 2 * 1/2 * bytes / inside + 2 * latency.
    latency = times["latency"] / 2
    inside = times["bytes"] / (times["all_reduce"] - times["latency"])
    work = sum(stage.forward + stage.backward + stage.lane for stage in job.stages)
    metrics: Metrics = {}
    for key, alone, together in (("data_parallel", "alone", "ddp"), ("early_release", "step_alone", "step")):
        cluster = Cluster(work / times[alone], WORLD, inside, inside, latency)
        predicted = data_parallel(job, cluster, WORLD, early=key == "early_release", hidden=False)
        metrics[f"check_{key}_predicted"] = predicted / times[together]
        metrics[f"check_{key}_ms"] = 1000 * times[together]
        metrics[f"check_{key}_alone_ms"] = 1000 * times[alone]
    metrics |= {"check_all_reduce_ms": 1000 * times["all_reduce"], "check_megabytes_per_s": inside / 1e6}
    return metrics


def jobs() -> dict[str, Job]:
    """Return the jobs to project."""
    with torch.device("meta"):
        model, head = model_a(401), AuxiliaryHead(512, 401)
    plan = Plan(Window(bottom="segment4"), {"aux": Window(top="segment4")})
    transformer = vit_b(224, 1, 64, "meta")
    return {
        "model_a": job_of(model, plan, head, 64, 224),
        "vit_b": job_of(transformer.model, transformer.plan, transformer.head, 64, 224),
    }


def measure(settings: Settings) -> Metrics:
    """Return all metrics."""
    metrics = check(settings)
    for name, job in jobs().items():
        metrics |= {f"{name}_{key}": value for key, value in project(job, ASSUMED).items()}
    return metrics


def targets() -> dict[str, Target]:
    """Return the targets of the metrics."""
    return {f"check_{key}_predicted": Target(">", 0.85, "and < 1.15") for key in ("data_parallel", "early_release")}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark: print the metrics, and write them to a file if --json is given."""
    arguments = parse_arguments("scale", "Model training on many GPUs, and check the model with two processes.", argv)
    settings = QUICK if arguments.quick else FULL
    metrics = measure(settings)
    about = environment() | {
        "quick": arguments.quick,
        "checked": f"VGG-22, width {settings.width}, {settings.batch} x 3 x 64^2 in each of {WORLD} processes, gloo",
        "projected": "64 x 3 x 224^2 on each GPU, gradients in float32",
        "assumed": str(ASSUMED),
        "seed": SEED,
    }
    publish(metrics, targets(), about, arguments.json)


if __name__ == "__main__":
    main()
