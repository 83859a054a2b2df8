"""Small data sets: decoded once, kept in memory or on the GPU, and cut into batches there without worker processes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from relaylab.data.batches import Batch, ImageBatches, OrderedBatches
from relaylab.data.faults import Fault, FaultLog
from relaylab.data.geometry import View, centre_box
from relaylab.data.keyed import uniforms
from relaylab.data.loader import Workers
from relaylab.data.sampling import DrawBatches, KeyedSampler
from relaylab.data.sources.source import Source
from relaylab.data.statistics import ImageStatistics, sum_batch
from relaylab.errors import InputError
from relaylab.progress import Silent, Task

SHARE = 0.8  # of the free memory may be filled with images


@dataclass(frozen=True, eq=False)
class DecodedImages:
    """All images of a source as squares.

    Attributes:
        images: uint8 (n, side, side, 3), RGB: the shorter side resized to `side`, the centre cut out.
        labels: int64 (n,), on the same device.
        classes: names in the order of the labels.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Images."""
        return len(self.images)


def decode_all(
    source: Source,
    view: View,
    *,
    device: torch.device | str = "cpu",
    workers: int = 0,
    faults: FaultLog | None = None,
    task: Task | None = None,
) -> DecodedImages:
    """Decode a whole source into memory: n * short_side^2 * 3 bytes.

    Args:
        source: of encoded images.
        view: its `short_side` is the side of the squares; the crop is taken later.
        device: where they are kept.
        workers: processes that decode; 0 decodes in this one.
        faults: takes note of unreadable images, which are then left out; None makes them an error.
        task: counts images.

    Raises:
        InputError: there is too little memory, or images that cannot be read, after all have been tried.
        TooManyFaultsError: more of them than `faults` allows.
    """
    task = task or Silent()
    side = view.short_side
    needed, free = len(source) * side * side * 3, free_memory(device)
    if needed > SHARE * free:
        raise InputError(
            f"{len(source)} images of {side} x {side} need {needed / 1e9:.2f} GB; {free / 1e9:.2f} GB of memory are "
            f"free on {device}: read them from disk as they are needed, or take fewer or smaller images"
        )
    images = torch.empty(len(source), side, side, 3, dtype=torch.uint8, device=device)
    labels = torch.empty(len(source), dtype=torch.int64, device=device)
    dataset = ImageBatches(source, replace(view, size=side), training=False)
    found: list[Fault] = []
    done = 0
    for batch in Workers(count=workers).loader(dataset, OrderedBatches(range(len(source)), 64)):
        images[done : done + len(batch)] = batch.images
        labels[done : done + len(batch)] = batch.labels
        done += len(batch)
        found += batch.faults
        task.advance(len(batch))
    if found and faults is None:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise InputError(
            f"unreadable image {found[0].name}: {found[0].reason}{more}; `relaylab data check` lists them all"
        )
    if found and faults is not None:
        faults.record(found)
        good = torch.ones(len(source), dtype=torch.bool, device=device)
        good[[fault.number for fault in found]] = False
        images, labels = images[good], labels[good]
    return DecodedImages(images, labels, tuple(source.classes))


def free_memory(device: torch.device | str) -> int:
    """Bytes that are free for use on a device."""
    device = torch.device(device)
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


class MemoryTrainingLoader:
    """Training batches of decoded images; otherwise as `relaylab.data.loader.TrainingLoader`.

    Of square images of the view's shorter side the windows are the very same as that loader's.

    Args:
        decoded: images.
        sampler: of them; its position is where the stream begins.
        view: the crop's size, and the side of the images.
        batch_size: images in a batch.
        seed: of the windows; give `Augmentation` the same.

    Raises:
        InputError: the images have not the view's side, or a batch size below 1.
    """

    def __init__(
        self, decoded: DecodedImages, sampler: KeyedSampler, view: View, *, batch_size: int, seed: int = 0
    ) -> None:
        _check_side(decoded, view)
        self._decoded, self._view, self._seed = decoded, view, seed
        self._draws = DrawBatches(sampler, batch_size)

    @property
    def position(self) -> int:
        """Draws of this rank that have been used."""
        return self._draws.sampler.position

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._draws)

    def __iter__(self) -> Iterator[Batch]:
        """The batches from `position` to the end of its epoch."""
        spare = self._view.short_side - self._view.size + 1
        for pairs in self._draws:
            draws, numbers = torch.from_numpy(pairs.T.copy())
            corners = (uniforms(self._seed, pairs[:, 0], 2) * spare).astype(np.int64)
            yield _gather(self._decoded, self._view.size, draws, numbers, torch.from_numpy(corners))

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is. The other loader's too, but for the faults, of which there are none here."""
        return {"sampler": self._draws.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader was.

        Raises:
            InputError: a state of another stream.
        """
        self._draws.load_state_dict(state["sampler"])


class MemoryEvaluationLoader:
    """Centre crops of all decoded images in order.

    Args:
        decoded: images.
        view: the crop's size, and the side of the images.
        batch_size: images in a batch; the last one may have fewer.

    Raises:
        InputError: the images have not the view's side, or a batch size below 1.
    """

    def __init__(self, decoded: DecodedImages, view: View, *, batch_size: int) -> None:
        _check_side(decoded, view)
        self._decoded, self._view = decoded, view
        self._batches = OrderedBatches(range(len(decoded)), batch_size)

    def __len__(self) -> int:
        """Batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """The batches; the last one may be smaller."""
        side, size = self._view.short_side, self._view.size
        offset = int(centre_box(self._view, side, side)[0])
        images = self._decoded.images[:, offset : offset + size, offset : offset + size]
        for pairs in self._batches:
            numbers = torch.from_numpy(pairs[:, 0].copy())
            rows = slice(int(numbers[0]), int(numbers[-1]) + 1)
            yield Batch(images[rows].contiguous(), self._decoded.labels[rows], numbers, numbers)


def decoded_statistics(decoded: DecodedImages, view: View) -> ImageStatistics:
    """The statistics of decoded images' centre crops, as `relaylab.data.statistics.compute` finds them from files."""
    sums, products = np.zeros((view.size, view.size, 3), np.int64), np.zeros((3, 3), np.int64)
    for batch in MemoryEvaluationLoader(decoded, view, batch_size=1024):
        parts = sum_batch(batch.images)
        sums += parts[0]
        products += parts[1]
    return ImageStatistics(sums, products, len(decoded))


def _check_side(decoded: DecodedImages, view: View) -> None:
    side = decoded.images.shape[1]
    if side != view.short_side:
        raise InputError(f"decoded images of {side} x {side} for a shorter side of {view.short_side}: decode them anew")


def _gather(decoded: DecodedImages, size: int, draws: Tensor, numbers: Tensor, corners: Tensor) -> Batch:
    """Windows cut out of images, by one gather on their device."""
    device = decoded.images.device
    # All that the device needs to know in one copy, from pinned memory: then nobody waits for it.
    where = torch.cat([numbers[:, None], corners], dim=1)
    if device.type == "cuda":
        where = where.pin_memory()
    rows, left, top = where.to(device, non_blocking=True).unbind(1)
    pixels = torch.arange(size, device=device)
    across, down = left[:, None] + pixels, top[:, None] + pixels
    images = decoded.images[rows[:, None, None], down[:, :, None], across[:, None, :]]
    return Batch(images, decoded.labels[rows], draws, numbers)
