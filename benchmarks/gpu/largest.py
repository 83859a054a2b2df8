"""A2: the largest batch that fits, and its speed.

The peaks of two small batches predict the largest one. From there batches grow by `STEP`, or shrink by it, its square
and so on, until the largest one that fits is within `STEP` of one that does not. Gradients are checked first, as in
`benchmarks.memory`.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks import memory
from benchmarks.gpu.session import Session, WrongGradientsError, free_memory
from benchmarks.gpu.settings import CLASSES, Deep, Settings
from benchmarks.gpu.steps import MB, blocks_of
from benchmarks.measure import Figures, Step, clock_of, interleave, peak_bytes
from relaybackprop import Plan, Window, head_for

STEP = 1.05
TRIES = 10
ROUNDS = 2


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        images: the largest batch that fitted.
        refused: the smallest batch that did not; None if the limit on batches was reached.
        peak: bytes allocated at `images`.
    """

    images: int
    refused: int | None
    peak: int


def measure(session: Session, settings: Settings) -> None:
    """Measure and record all contenders on all networks."""
    for network, deep in settings.deep.items():
        for number, branches in enumerate(deep.ends):
            names = {f"{network}/early_release_{branches}": "early_release"}
            if number == 0:  # those that have no branches
                names = {f"{network}/{kind}": kind for kind in ("standard", "checkpoint_every")} | names
            made = session.attempt(
                "A2",
                f"{network}_{branches}",
                lambda deep=deep, branches=branches: checked(session, settings, deep, branches),
            )
            if made is None:
                session.skip("A2", list(names), f"no network: see {network}_{branches}")
                continue
            for name, kind in names.items():
                found = session.attempt("A2", name, lambda made=made, kind=kind: fill(session, settings, made, kind))
                if found is not None:
                    session.measured("A2", name, found)
                free_memory()


def checked(session: Session, settings: Settings, deep: Deep, branches: int) -> memory.Subject:
    """Build a network, and check the gradients of its contenders.

    Raises:
        WrongGradientsError: a contender has others than its peer.
    """
    subject = build(deep, branches, settings.pixels, session.device)
    try:
        memory.check_gradients(subject)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise WrongGradientsError(str(error)) from error
    return subject


def build(deep: Deep, branches: int, pixels: int, device: str) -> memory.Subject:
    """Build a network with heads behind its ends; neighbouring windows share the block below each head."""
    images, ends = torch.randn(2, 3, pixels, pixels, device=device), deep.ends[branches]
    with torch.device(device):
        model = deep.build(pixels)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if isinstance(getattr(model, "heads", None), nn.Module):  # torchvision's zeros would let no gradient through
        nn.init.normal_(model.get_parameter("heads.head.weight"), std=0.02)
    windows = {
        f"aux{number}": Window(top=end, bottom=ends[number - 1] if number else None) for number, end in enumerate(ends)
    }
    plan = Plan(Window(bottom=ends[-1]), windows)
    heads: dict[str, nn.Module] = dict(head_for(model, plan, images.to("meta"), CLASSES).items())
    for head in heads.values():
        for module in head.to(device).modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    for module in (model, *heads.values()):
        module.to(memory_format=torch.channels_last)  # pyright: ignore
    return memory.Subject(model, plan, heads, blocks_of(model), images, torch.zeros(2, dtype=torch.long, device=device))


def fill(session: Session, settings: Settings, subject: memory.Subject, contender: str) -> Figures:
    """Find a contender's largest batch, and time it."""

    def step_of(count: int) -> Step:
        return memory.contenders(batch_of(subject, count))[contender]

    for parameter in subject.modules.parameters():
        parameter.grad = torch.zeros_like(parameter)
    capacity = settings.capacity or torch.cuda.get_device_properties(session.device).total_memory
    capacity -= torch.cuda.memory_allocated() if session.device == "cuda" else 0
    found = search(step_of, capacity, settings.small, settings.most_images, lambda: session.left_s > 0)
    step = step_of(found.images)
    times = interleave(
        {contender: step}, rounds=ROUNDS, budget_s=0, warmup=0, min_rounds=ROUNDS, clock=clock_of(session.device)
    )
    figures: Figures = {
        "images": found.images,
        "images_per_s": found.images / statistics.median(times[contender]),
        "peak_mb": found.peak / MB,
    }
    return figures if found.refused is None else figures | {"refused": found.refused}


def batch_of(subject: memory.Subject, count: int) -> memory.Subject:
    """Return the subject with another number of images."""
    shape, device = (count, *subject.images.shape[1:]), subject.images.device
    images: Tensor = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    return replace(subject, images=images, labels=torch.randint(CLASSES, (count,), device=device))


def search(
    step_of: Callable[[int], Step], capacity: int, small: tuple[int, int], most: int, has_time: Callable[[], bool]
) -> Found:
    """Find the largest batch whose step allocates no more than `capacity` bytes.

    Args:
        step_of: makes the step for a number of images.
        capacity: bytes besides those allocated already.
        small: batches whose peaks predict the largest one.
        most: images, at most.
        has_time: whether the search may continue; otherwise the largest batch so far is the result.

    Raises:
        OutOfMemoryError: even the small batches do not fit.
    """
    step_of(small[0])()  # searches the graph and fills caches
    peaks = [peak_bytes(step_of(count)) for count in small]
    if peaks[-1] > capacity:
        raise torch.OutOfMemoryError(f"{small[-1]} images need {peaks[-1] / MB:.0f} MB of {capacity / MB:.0f} MB")
    per_image = max(1.0, (peaks[1] - peaks[0]) / (small[1] - small[0]))
    best, refused, shrink = Found(small[1], None, peaks[1]), None, STEP
    count = min(most, max(best.images + 1, int((capacity - peaks[1]) / per_image) + small[1]))
    for _ in range(TRIES):
        if best.images >= most or not has_time():
            break
        peak = fitting(step_of, count, capacity)
        if peak is None:
            refused, count, shrink = count, int(count / shrink), shrink**2
        else:
            best, count = Found(count, None, peak), min(most, max(count + 1, int(count * STEP)))
        if refused is not None:
            if refused <= max(best.images + 1, best.images * STEP):
                break
            if peak is not None or count <= best.images:
                count = max(math.isqrt(best.images * refused), best.images + 1)
    return replace(best, refused=refused)


def fitting(step_of: Callable[[int], Step], count: int, capacity: int) -> int | None:
    """Return the peak of a batch's step; None if it does not fit."""
    try:
        peak = peak_bytes(step_of(count))
    except torch.OutOfMemoryError:
        peak = capacity + 1
    if peak > capacity:
        free_memory()
        return None
    return peak
