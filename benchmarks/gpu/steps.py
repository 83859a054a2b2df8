"""A1: time and memory of one training step by every method, with gradients checked first.

Note [Checked]
1. Contenders first compute the gradients of two images in double precision, on the measured device and in the measured
   memory format. They must agree with `relaybackprop.reference`, the definition, within `TOLERANCE` of each tensor's
   largest element.
2. They are timed in turns, each without gradients at the start: in bfloat16 autocast and by CUDA events on a GPU
   (`benchmarks.measure.event_clock`), in float32 on a CPU.
3. `flops_*` counts multiplications and additions on the meta device. The time ratio over the FLOP ratio is 1 if the
   time of a step is proportional to its operations.
"""

import copy
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.models.vision_transformer import EncoderBlock

from benchmarks import engine, formulations
from benchmarks.gpu.session import Session, WrongGradientsError
from benchmarks.gpu.settings import Build, Settings
from benchmarks.measure import Metrics, Step, clock_of, count_flops, interleave, peak_bytes, ratio
from benchmarks.memory import checkpointing
from benchmarks.networks import Workload
from relaybackprop import Plan
from relaybackprop.planning.copies import dry_run
from relaybackprop.reference import reference_gradients
from relaylab.models.model_b import Inception

TOLERANCE = 1e-9
BLOCKS = (Bottleneck, EncoderBlock, Inception)
CONTENDERS = (
    "standard",
    "multi_loss",
    "relay",
    "early_release",
    "two_backward",
    "overlap_twice",
    "checkpoint_every",
)
MULTI_LOSS, STANDARD = ("multi_loss",), ("standard", "checkpoint_every")
MB = 1e6


@dataclass(frozen=True)
class Prepared:
    """A network and a batch on the device, and the FLOPs of each contender's step."""

    workload: Workload
    flops: Mapping[str, int]


def steps_of(workload: Workload) -> dict[str, Step]:
    """Return all contenders on the same weights."""
    steps = formulations.contenders(workload)
    steps["checkpoint_every"] = checkpointing(steps["standard"], blocks_of(workload.model))
    return {name: in_half_precision(steps[name], workload.images) for name in CONTENDERS}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks to checkpoint: residual, encoder or inception blocks, or the segments of model A."""
    blocks: list[nn.Module] = [module for module in model.modules() if isinstance(module, BLOCKS)]
    return blocks or [child for name, child in model.named_children() if name.startswith("segment")]


def in_half_precision(step: Step, images: Tensor) -> Step:
    """Return the step in bfloat16 autocast if the images are on a GPU. Autocast does not change double precision."""

    def autocast() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            step()

    return autocast if images.is_cuda else step


def channels_last(workload: Workload) -> Workload:
    """Return the workload with weights and images in channels-last memory format."""
    for module in (workload.model, workload.head):
        module.to(memory_format=torch.channels_last)  # pyright: ignore
    return replace(workload, images=workload.images.contiguous(memory_format=torch.channels_last))


def measure(session: Session, settings: Settings) -> None:
    """Measure and record all contenders on all networks."""
    for name, build in settings.networks.items():
        measure_network(session, settings, name, build)


def measure_network(session: Session, settings: Settings, name: str, build: Build) -> None:
    """Measure and record all contenders on one network."""
    prepared = session.attempt("A1", name, lambda: prepare(settings, build, session.device))
    if prepared is None:
        session.skip("A1", [f"{name}/{contender}" for contender in CONTENDERS], f"no network: see {name}")
        return
    peaks = _measure_peaks(session, name, prepared.workload)
    session.attempt("A1", f"{name}/times", lambda: _time(session, settings, name, prepared, peaks))
    timed = {result.name for result in session.results if result.entry == "A1"}
    untimed = [full_name for full_name in (f"{name}/{contender}" for contender in CONTENDERS) if full_name not in timed]
    session.skip("A1", untimed, f"no times: see {name}/times")


def _measure_peaks(session: Session, network: str, workload: Workload) -> dict[str, int]:
    """Return the peaks of the contenders with correct gradients. The reasons for the others are recorded."""
    steps, references, peaks = steps_of(workload), dict[Plan, dict[str, Tensor]](), dict[str, int]()
    exact = copy.deepcopy(replace(workload, images=workload.images[:2].double(), labels=workload.labels[:2]))
    exact.model.double()
    exact.head.double()

    def work(contender: str) -> int:
        check(exact, contender, references)
        return peak(workload, steps[contender])

    for contender in CONTENDERS:
        measured_peak = session.attempt("A1", f"{network}/{contender}", lambda contender=contender: work(contender))
        if measured_peak is not None:
            peaks[contender] = measured_peak
        workload.clear()
    return peaks


def prepare(settings: Settings, build: Build, device: str) -> Prepared:
    """Build a network with its batch and count FLOPs."""
    with dry_run():
        meta_copy = build(settings.pixels, 2, settings.width, "meta")
        counted = steps_of(meta_copy)
        counted["early_release"]()  # searches the graph
        flops = {name: count_flops(step) for name, step in counted.items()}
        flops["lower_bound"] = engine.flops(meta_copy)["lower_bound"]
    batch = settings.batch or third_of_card(settings, build, device)
    return Prepared(channels_last(build(settings.pixels, batch, settings.width, device)), flops)


def third_of_card(settings: Settings, build: Build, device: str) -> int:
    """Return the batch size whose standard step takes a third of the GPU's memory, from two small batches."""
    small, large = 16, 32
    peaks: list[int] = []
    for batch in (small, large):
        workload = channels_last(build(settings.pixels, batch, settings.width, device))
        peaks.append(peak(workload, steps_of(workload)["standard"]) + torch.cuda.memory_allocated())
        del workload
    per_image = (peaks[1] - peaks[0]) / (large - small)
    third = torch.cuda.get_device_properties(device).total_memory / 3
    batch = int((third - peaks[0]) / per_image) + small
    return max(small, min(batch, settings.max_images) // 16 * 16)


def peak(workload: Workload, step: Step) -> int:
    """Return the peak of allocated bytes during the second step, gradients included."""
    workload.clear()
    step()  # searches the graph and fills caches
    workload.clear()
    return peak_bytes(step)


def claimed(plan: Plan, contender: str) -> Plan:
    """Return the plan whose gradients a contender claims to compute."""
    if contender in STANDARD:
        return plan.standard()
    return plan.multi_loss() if contender in MULTI_LOSS else plan


def check(exact: Workload, contender: str, references: dict[Plan, dict[str, Tensor]]) -> None:
    """Compare a contender's gradients with the definition. See Note [Checked] 1.

    Args:
        exact: two images, in double precision.
        contender: name of the contender.
        references: reference gradients by plan. Those of this contender's plan are added.

    Raises:
        WrongGradientsError: the gradients differ.
    """
    plan, criterion = claimed(exact.plan, contender), nn.CrossEntropyLoss()
    heads = {"aux": exact.head} if plan.auxiliary else {}

    def losses(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: criterion(output, exact.labels) for name, output in outputs.items()}

    if plan not in references:
        references[plan] = reference_gradients(exact.model, plan, heads, losses, exact.images)
    exact.clear()
    steps_of(exact)[contender]()
    parameters = {f"model.{name}": p for name, p in exact.model.named_parameters()}
    parameters |= {f"heads.aux.{name}": p for name, p in exact.head.named_parameters()}
    for name, parameter in parameters.items():
        right = references[plan].get(name, torch.zeros_like(parameter))
        error = engine.difference(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, right)
        if not error <= TOLERANCE:
            raise WrongGradientsError(
                f"{contender}: the gradient of {name} differs from the reference by {error:.2g} of its largest "
                f"element: at most {TOLERANCE} is allowed"
            )
    exact.clear()


def _time(session: Session, settings: Settings, network: str, prepared: Prepared, peaks: Mapping[str, int]) -> None:
    """Time the contenders with correct gradients, in turns, and record their metrics."""
    workload, steps = prepared.workload, steps_of(prepared.workload)
    times = interleave(
        {name: steps[name] for name in peaks},
        rounds=settings.rounds,
        budget_s=min(settings.budget_s, session.left_s),
        warmup=1,
        min_rounds=2,
        before=workload.clear,
        clock=clock_of(session.device),
    )
    workload.clear()
    batch = len(workload.images)
    for name, seconds in times.items():
        metrics: Metrics = {
            "batch": batch,
            "ms": 1000 * statistics.median(seconds),
            "images_per_s": batch / statistics.median(seconds),
            "peak_mb": peaks[name] / MB,
            "rounds": len(seconds),
        }
        for peer in ("standard", "multi_loss"):
            metrics[f"flops_over_{peer}"] = prepared.flops[name] / prepared.flops[peer]
            metrics[f"bound_over_{peer}"] = prepared.flops["lower_bound"] / prepared.flops[peer]
            if peer in times and peer != name:
                result = ratio(seconds, times[peer])
                metrics |= {f"time_over_{peer}": result.median, f"time_over_{peer}_error": result.error}
                metrics[f"peak_over_{peer}"] = peaks[name] / peaks[peer]
        session.measured("A1", f"{network}/{name}", metrics)
