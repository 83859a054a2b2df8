"""A2: the largest batch that fits, and its speed.

The peaks of two small batches predict the largest one. From there, batches grow by the factor `STEP`, or shrink by it,
its square and so on, until the largest batch that fits is within `STEP` of one that does not. Gradients are checked
first, as in `benchmarks.memory`.
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
from benchmarks.measure import Metrics, Step, clock_of, interleave, peak_bytes
from relaybackprop import Plan, Window, head_for

STEP = 1.05
TRIES = 10
ROUNDS = 2


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        images: the largest batch that fits.
        too_large: the smallest batch that did not fit; None if the limit on batches was reached.
        peak: bytes allocated with `images`.
    """

    images: int
    too_large: int | None
    peak: int


def measure(session: Session, settings: Settings) -> None:
    """Measure and record all contenders on all networks."""
    for network, deep in settings.deep.items():
        for position, branches in enumerate(deep.ends):
            names = {f"{network}/early_release_{branches}": "early_release"}
            if position == 0:  # contenders without branches
                names = {f"{network}/{contender}": contender for contender in ("standard", "checkpoint_every")} | names
            workload = session.attempt(
                "A2",
                f"{network}_{branches}",
                lambda deep=deep, branches=branches: checked(session, settings, deep, branches),
            )
            if workload is None:
                session.skip("A2", list(names), f"no network: see {network}_{branches}")
                continue
            for name, contender in names.items():
                metrics = session.attempt(
                    "A2",
                    name,
                    lambda workload=workload, contender=contender: fill(session, settings, workload, contender),
                )
                if metrics is not None:
                    session.measured("A2", name, metrics)
                free_memory()


def checked(session: Session, settings: Settings, deep: Deep, branches: int) -> memory.Workload:
    """Build a network and check the gradients of its contenders.

    Raises:
        WrongGradientsError: the gradients of a contender and its peer differ.
    """
    workload = build(deep, branches, settings.pixels, session.device)
    try:
        memory.check_gradients(workload)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise WrongGradientsError(str(error)) from error
    return workload


def build(deep: Deep, branches: int, pixels: int, device: str) -> memory.Workload:
    """Build a network with heads at its ends. Neighbouring windows share the block below each head."""
    images, ends = torch.randn(2, 3, pixels, pixels, device=device), deep.ends[branches]
    with torch.device(device):
        model = deep.build(pixels)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if isinstance(
        getattr(model, "heads", None), nn.Module
    ):  # torchvision initialises to zeros, which would block gradients
        nn.init.normal_(model.get_parameter("heads.head.weight"), std=0.02)
    windows = {
        f"aux{index}": Window(top=end, bottom=ends[index - 1] if index else None) for index, end in enumerate(ends)
    }
    plan = Plan(Window(bottom=ends[-1]), windows)
    heads: dict[str, nn.Module] = dict(head_for(model, plan, images.to("meta"), CLASSES).items())
    for head in heads.values():
        for module in head.to(device).modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    for module in (model, *heads.values()):
        module.to(memory_format=torch.channels_last)  # pyright: ignore
    return memory.Workload(
        model, plan, heads, blocks_of(model), images, torch.zeros(2, dtype=torch.long, device=device)
    )


def fill(session: Session, settings: Settings, workload: memory.Workload, contender: str) -> Metrics:
    """Find a contender's largest batch and time it."""

    def step_of(count: int) -> Step:
        return memory.contenders(batch_of(workload, count))[contender]

    for parameter in workload.modules.parameters():
        parameter.grad = torch.zeros_like(parameter)
    capacity = settings.capacity or torch.cuda.get_device_properties(session.device).total_memory
    capacity -= torch.cuda.memory_allocated() if session.device == "cuda" else 0
    result = search(step_of, capacity, settings.small, settings.max_images, lambda: session.left_s > 0)
    step = step_of(result.images)
    times = interleave(
        {contender: step}, rounds=ROUNDS, budget_s=0, warmup=0, min_rounds=ROUNDS, clock=clock_of(session.device)
    )
    metrics: Metrics = {
        "images": result.images,
        "images_per_s": result.images / statistics.median(times[contender]),
        "peak_mb": result.peak / MB,
    }
    return metrics if result.too_large is None else metrics | {"refused": result.too_large}


def batch_of(workload: memory.Workload, count: int) -> memory.Workload:
    """Return the workload with a different batch size."""
    shape, device = (count, *workload.images.shape[1:]), workload.images.device
    images: Tensor = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    return replace(workload, images=images, labels=torch.randint(CLASSES, (count,), device=device))


def search(
    step_of: Callable[[int], Step], capacity: int, small: tuple[int, int], max_images: int, has_time: Callable[[], bool]
) -> SearchResult:
    """Find the largest batch whose step allocates no more than `capacity` bytes.

    Args:
        step_of: function that returns the step for a batch size.
        capacity: available bytes, in addition to those already allocated.
        small: batch sizes whose peaks predict the largest one.
        max_images: maximum batch size.
        has_time: function that returns whether the search may continue. If not, the result is the largest batch so
            far.

    Raises:
        OutOfMemoryError: even the small batches do not fit.
    """
    step_of(small[0])()  # searches the graph and fills caches
    peaks = [peak_bytes(step_of(count)) for count in small]
    if peaks[-1] > capacity:
        raise torch.OutOfMemoryError(
            f"{small[-1]} images require {peaks[-1] / MB:.0f} MB: only {capacity / MB:.0f} MB are available"
        )
    per_image = max(1.0, (peaks[1] - peaks[0]) / (small[1] - small[0]))
    best, too_large, shrink = SearchResult(small[1], None, peaks[1]), None, STEP
    count = min(max_images, max(best.images + 1, int((capacity - peaks[1]) / per_image) + small[1]))
    for _ in range(TRIES):
        if best.images >= max_images or not has_time():
            break
        peak = fitting(step_of, count, capacity)
        if peak is None:
            too_large, count, shrink = count, int(count / shrink), shrink**2
        else:
            best, count = SearchResult(count, None, peak), min(max_images, max(count + 1, int(count * STEP)))
        if too_large is not None:
            if too_large <= max(best.images + 1, best.images * STEP):
                break
            if peak is not None or count <= best.images:
                count = max(math.isqrt(best.images * too_large), best.images + 1)
    return replace(best, too_large=too_large)


def fitting(step_of: Callable[[int], Step], count: int, capacity: int) -> int | None:
    """Return the peak of a batch's step, or None if it does not fit."""
    try:
        peak = peak_bytes(step_of(count))
    except torch.OutOfMemoryError:
        peak = capacity + 1
    if peak > capacity:
        free_memory()
        return None
    return peak
