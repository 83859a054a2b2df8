"""A1: time and memory of one training step by every method, with gradients checked first.

Note [Checked]
1. Contenders first compute the gradients of two images in double precision on the device that is measured, in the
   memory format that is measured. They must agree with `relaybackprop.reference`, the definition, to `TOLERANCE` of
   each tensor's largest element.
2. They are timed in turns, each from empty gradients, in bfloat16 by autocast on a GPU and float32 on a CPU, by CUDA
   events on a GPU (`benchmarks.measure.event_clock`).
3. `flops_*` counts multiplications and additions on the meta device. The time ratio over the FLOP ratio is 1 for a
   step that costs exactly its operations.
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
from benchmarks.measure import Figures, Step, clock_of, count_flops, interleave, peak_bytes, ratio
from benchmarks.memory import checkpointing
from benchmarks.networks import Subject
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

    subject: Subject
    flops: Mapping[str, int]


def steps_of(subject: Subject) -> dict[str, Step]:
    """Return all contenders on the same weights."""
    every = formulations.contenders(subject)
    every["checkpoint_every"] = checkpointing(every["standard"], blocks_of(subject.model))
    return {name: in_half_precision(every[name], subject.images) for name in CONTENDERS}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks to checkpoint: residual, encoder or inception blocks, or the segments of model A."""
    found: list[nn.Module] = [module for module in model.modules() if isinstance(module, BLOCKS)]
    return found or [child for name, child in model.named_children() if name.startswith("segment")]


def in_half_precision(step: Step, images: Tensor) -> Step:
    """Return the step under bfloat16 autocast if the images are on a GPU; double precision stays as it is."""

    def autocast() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            step()

    return autocast if images.is_cuda else step


def channels_last(subject: Subject) -> Subject:
    """Return the subject with weights and images in channels-last memory format."""
    for module in (subject.model, subject.head):
        module.to(memory_format=torch.channels_last)  # pyright: ignore
    return replace(subject, images=subject.images.contiguous(memory_format=torch.channels_last))


def measure(session: Session, settings: Settings) -> None:
    """Measure and record all contenders on all networks."""
    for name, build in settings.networks.items():
        measure_network(session, settings, name, build)


def measure_network(session: Session, settings: Settings, name: str, build: Build) -> None:
    """Measure and record all contenders on one network."""
    made = session.attempt("A1", name, lambda: prepare(settings, build, session.device))
    if made is None:
        session.skip("A1", [f"{name}/{contender}" for contender in CONTENDERS], f"no network: see {name}")
        return
    peaks = _check_and_weigh(session, name, made.subject)
    session.attempt("A1", f"{name}/times", lambda: _time(session, settings, name, made, peaks))
    timed = {result.name for result in session.results if result.entry == "A1"}
    untimed = [each for each in (f"{name}/{contender}" for contender in CONTENDERS) if each not in timed]
    session.skip("A1", untimed, f"no times: see {name}/times")


def _check_and_weigh(session: Session, network: str, subject: Subject) -> dict[str, int]:
    """Return the peaks of the contenders whose gradients are right; record why others have none."""
    steps, references, peaks = steps_of(subject), dict[Plan, dict[str, Tensor]](), dict[str, int]()
    exact = copy.deepcopy(replace(subject, images=subject.images[:2].double(), labels=subject.labels[:2]))
    exact.model.double()
    exact.head.double()

    def work(contender: str) -> int:
        check(exact, contender, references)
        return peak(subject, steps[contender])

    for contender in CONTENDERS:
        found = session.attempt("A1", f"{network}/{contender}", lambda contender=contender: work(contender))
        if found is not None:
            peaks[contender] = found
        subject.clear()
    return peaks


def prepare(settings: Settings, build: Build, device: str) -> Prepared:
    """Build a network with its batch, and count FLOPs."""
    with dry_run():
        meta_copy = build(settings.pixels, 2, settings.width, "meta")
        counted = steps_of(meta_copy)
        counted["early_release"]()  # searches the graph
        flops = {name: count_flops(step) for name, step in counted.items()}
        flops["lower_bound"] = engine.flops(meta_copy)["lower_bound"]
    batch = settings.batch or third_of_card(settings, build, device)
    return Prepared(channels_last(build(settings.pixels, batch, settings.width, device)), flops)


def third_of_card(settings: Settings, build: Build, device: str) -> int:
    """Return the batch whose standard step takes a third of the card's memory, from the peaks of two small batches."""
    small, large = 16, 32
    peaks: list[int] = []
    for batch in (small, large):
        subject = channels_last(build(settings.pixels, batch, settings.width, device))
        peaks.append(peak(subject, steps_of(subject)["standard"]) + torch.cuda.memory_allocated())
        del subject
    per_image = (peaks[1] - peaks[0]) / (large - small)
    third = torch.cuda.get_device_properties(device).total_memory / 3
    batch = int((third - peaks[0]) / per_image) + small
    return max(small, min(batch, settings.most_images) // 16 * 16)


def peak(subject: Subject, step: Step) -> int:
    """Return the most bytes allocated during the second step, gradients included."""
    subject.clear()
    step()  # searches the graph and fills caches
    subject.clear()
    return peak_bytes(step)


def claimed(plan: Plan, contender: str) -> Plan:
    """Return the plan whose gradients a contender claims to compute."""
    if contender in STANDARD:
        return plan.standard()
    return plan.multi_loss() if contender in MULTI_LOSS else plan


def check(exact: Subject, contender: str, references: dict[Plan, dict[str, Tensor]]) -> None:
    """Compare a contender's gradients with the definition. See Note [Checked] 1.

    Args:
        exact: two images, in double precision.
        contender: name.
        references: of plans seen so far; this contender's is added.

    Raises:
        WrongGradientsError: they differ.
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
        found = engine.difference(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, right)
        if not found <= TOLERANCE:
            raise WrongGradientsError(
                f"{contender}: the gradient of {name} is {found:.2g} of its largest element off the reference; "
                f"at most {TOLERANCE} is allowed"
            )
    exact.clear()


def _time(session: Session, settings: Settings, network: str, made: Prepared, peaks: Mapping[str, int]) -> None:
    """Time the contenders that passed, in turns, and record them."""
    subject, every = made.subject, steps_of(made.subject)
    times = interleave(
        {name: every[name] for name in peaks},
        rounds=settings.rounds,
        budget_s=min(settings.budget_s, session.left_s),
        warmup=1,
        min_rounds=2,
        before=subject.clear,
        clock=clock_of(session.device),
    )
    subject.clear()
    batch = len(subject.images)
    for name, seconds in times.items():
        figures: Figures = {
            "batch": batch,
            "ms": 1000 * statistics.median(seconds),
            "images_per_s": batch / statistics.median(seconds),
            "peak_mb": peaks[name] / MB,
            "rounds": len(seconds),
        }
        for peer in ("standard", "multi_loss"):
            figures[f"flops_over_{peer}"] = made.flops[name] / made.flops[peer]
            figures[f"bound_over_{peer}"] = made.flops["lower_bound"] / made.flops[peer]
            if peer in times and peer != name:
                found = ratio(seconds, times[peer])
                figures |= {f"time_over_{peer}": found.median, f"time_over_{peer}_error": found.error}
                figures[f"peak_over_{peer}"] = peaks[name] / peaks[peer]
        session.measured("A1", f"{network}/{name}", figures)
