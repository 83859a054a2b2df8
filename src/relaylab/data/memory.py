"""Small data sets: decoded once, kept in memory or on the GPU, and cropped there without worker processes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from relaylab.data.batches import Batch, ImageBatches, OrderedBatches
from relaylab.data.copying import to_device
from relaylab.data.crops import Crops
from relaylab.data.faults import Fault, FaultLog
from relaylab.data.geometry import CropSpec, centre_box, cut_window
from relaylab.data.loader import EvaluationLoader, TrainingLoader, Workers
from relaylab.data.sampling import DrawBatches, KeyedSampler
from relaylab.data.sources.source import Source, targets_of
from relaylab.data.statistics import ImageStatistics, sum_batch
from relaylab.errors import InputError
from relaylab.progress import Task

SHARE = 0.8  # largest fraction of the free memory for images


@dataclass(frozen=True, eq=False)
class DecodedImages:
    """All images of a source, decoded to squares.

    Attributes:
        images: uint8 (n, side, side, 3), RGB: the shorter side resized to `side`, then a centre crop.
        labels: int64 (n,), or float32 (n, classes) of 0 and 1 if images are multi-label; on the same device.
        classes: class names in the order of the labels.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


def decode_all(
    source: Source,
    crop_spec: CropSpec,
    *,
    device: torch.device | str = "cpu",
    workers: int = 0,
    faults: FaultLog | None = None,
    task: Task | None = None,
) -> DecodedImages:
    """Decode a whole source into memory. It needs n * short_side^2 * 3 bytes, and 4 bytes per target.

    Args:
        source: encoded images.
        crop_spec: crop settings; `short_side` is the side of the squares. Cropping happens later.
        device: device that stores the images.
        workers: processes that decode; 0 decodes in this process.
        faults: log of unreadable images, which are omitted; with None, unreadable images are an error.
        task: progress display, which counts images.

    Raises:
        InputError: there is too little memory, or, after all images have been tried, some cannot be read.
        TooManyFaultsError: more images are unreadable than `faults` allows.
    """
    side = crop_spec.short_side
    needed, free = decoded_bytes(source, side), free_memory(device)
    if needed > SHARE * free:
        raise InputError(
            f"{len(source)} images of {side} x {side} need {needed / 1e9:.2f} GB; {free / 1e9:.2f} GB of memory are "
            f"free on {device}: read the images from disk instead, or use fewer or smaller images"
        )
    images = torch.empty(len(source), side, side, 3, dtype=torch.uint8, device=device)
    targets = targets_of(source)
    labels = torch.empty(len(source), dtype=torch.int64, device=device)
    if targets is not None:
        labels = torch.empty(targets.shape, dtype=torch.float32, device=device)
    dataset = ImageBatches(source, replace(crop_spec, size=side), training=False)
    unreadable: list[Fault] = []
    done = 0
    for batch in Workers(count=workers).loader(dataset, OrderedBatches(range(len(source)), 64)):
        images[done : done + len(batch)] = batch.images
        labels[done : done + len(batch)] = batch.labels
        done += len(batch)
        unreadable += batch.faults
        if task is not None:
            task.advance(len(batch))
    if unreadable:
        if faults is None:
            more = f", and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
            first = unreadable[0]
            raise InputError(
                f"unreadable image {first.name}: {first.reason}{more}; `relaylab data check` lists all of them"
            )
        faults.record(unreadable)
        good = torch.ones(len(source), dtype=torch.bool, device=device)
        good[[fault.index for fault in unreadable]] = False
        images, labels = images[good], labels[good]
    return DecodedImages(images, labels, tuple(source.classes))


def decoded_bytes(source: Source, side: int) -> int:
    """Return the memory in bytes of the targets of a source and of its decoded images with this side in pixels."""
    targets = targets_of(source)
    return len(source) * side * side * 3 + (0 if targets is None else 4 * targets.size)


def free_memory(device: torch.device | str) -> int:
    """Return the free memory of a device in bytes."""
    device = torch.device(device)
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def memory_training_loader(
    decoded: DecodedImages,
    sampler: KeyedSampler,
    crop_spec: CropSpec,
    *,
    batch_size: int,
    seed: int = 0,
    crops: Crops | None = None,
    pin_memory: bool = False,
) -> TrainingLoader:
    """Return a loader of random crops of decoded images, as `relaylab.data.loader.training_loader` does for files.

    If the source's images are squares of `short_side`, both loaders return the same crops. Resized crops and policies
    are computed on the CPU in this process, on whatever device the images are. With `pin_memory`, batches of images on
    the CPU are in pinned memory; ignored without a GPU.

    Raises:
        InputError: the side of the images is not the crop spec's `short_side`, or the batch size is below 1.
    """
    _check_side(decoded, crop_spec)
    draws = DrawBatches(sampler, batch_size)
    crops = crops or Crops()

    def batches() -> Iterator[Batch]:
        for pairs in draws:
            chosen, indices = torch.from_numpy(pairs.T.copy())
            places = crops.random_numbers(seed, pairs[:, 0])
            if crops.are_resized:
                batch = _cut(decoded, crop_spec, chosen, indices, crops, places)
            else:
                spare = crop_spec.short_side + 2 * crops.padding - crop_spec.size + 1
                corners = torch.from_numpy((places * spare).astype(np.int64) - crops.padding)
                batch = _gather(decoded, crop_spec.size, chosen, indices, corners, is_padded=crops.padding > 0)
            if crops.policy is not None:
                images = batch.images.cpu()
                crops.finish(images, seed, pairs[:, 0])
                batch = replace(batch, images=images.to(batch.images.device))
            yield _pinned(batch) if pin_memory else batch

    return TrainingLoader(batches, draws, FaultLog(len(decoded)))


def memory_evaluation_loader(
    decoded: DecodedImages, crop_spec: CropSpec, *, batch_size: int, pin_memory: bool = False
) -> EvaluationLoader:
    """Return a loader of the centre crops of all decoded images in order. See `memory_training_loader` on pinning.

    Raises:
        InputError: the side of the images is not the crop spec's `short_side`, or the batch size is below 1.
    """
    _check_side(decoded, crop_spec)
    ordered = OrderedBatches(range(len(decoded)), batch_size)

    def batches() -> Iterator[Batch]:
        side, size = crop_spec.short_side, crop_spec.size
        offset = int(centre_box(crop_spec, side, side)[0])
        images = decoded.images[:, offset : offset + size, offset : offset + size]
        for pairs in ordered:
            indices = torch.from_numpy(pairs[:, 0].copy())
            rows = slice(int(indices[0]), int(indices[-1]) + 1)
            batch = Batch(images[rows].contiguous(), decoded.labels[rows], indices, indices)
            yield _pinned(batch) if pin_memory else batch

    return EvaluationLoader(batches, len(ordered))


def decoded_statistics(decoded: DecodedImages, crop_spec: CropSpec) -> ImageStatistics:
    """Return the statistics of the centre crops of decoded images; see `relaylab.data.statistics.compute`."""
    sums, products = np.zeros((crop_spec.size, crop_spec.size, 3), np.int64), np.zeros((3, 3), np.int64)
    for batch in memory_evaluation_loader(decoded, crop_spec, batch_size=1024):
        batch_sums, batch_products = sum_batch(batch.images)
        sums += batch_sums
        products += batch_products
    return ImageStatistics(sums, products, len(decoded))


def _pinned(batch: Batch) -> Batch:
    """Pin a batch on the CPU. All images need not be pinned, since a batch is a copy of some of them."""
    return batch.pin_memory() if batch.images.device.type == "cpu" and torch.cuda.is_available() else batch


def _check_side(decoded: DecodedImages, crop_spec: CropSpec) -> None:
    side = decoded.images.shape[1]
    if side != crop_spec.short_side:
        raise InputError(
            f"the decoded images are {side} x {side}, but short_side is {crop_spec.short_side}: decode them again"
        )


def _cut(
    decoded: DecodedImages,
    crop_spec: CropSpec,
    draws: Tensor,
    indices: Tensor,
    crops: Crops,
    places: NDArray[np.float64],
) -> Batch:
    """Crop and resize windows one by one, on the CPU."""
    rows = indices.to(decoded.images.device)
    squares, images = (
        decoded.images[rows].cpu().numpy(),
        torch.empty(len(rows), crop_spec.size, crop_spec.size, 3).byte(),
    )
    for square, place, out in zip(squares, places.tolist(), images, strict=True):
        cut_window(square, crops.window(crop_spec, crop_spec.short_side, crop_spec.short_side, place), out)
    return Batch(images.to(decoded.images.device), decoded.labels[rows], draws, indices)


def _gather(
    decoded: DecodedImages, size: int, draws: Tensor, indices: Tensor, corners: Tensor, *, is_padded: bool
) -> Batch:
    """Crop windows with one gather on the images' device. Pixels outside a padded image are black."""
    device, side = decoded.images.device, decoded.images.shape[1]
    rows, left, top = to_device(torch.cat([indices[:, None], corners], dim=1), device).unbind(1)  # a single copy
    pixels = torch.arange(size, device=device)
    across, down = left[:, None] + pixels, top[:, None] + pixels
    if not is_padded:
        images = decoded.images[rows[:, None, None], down[:, :, None], across[:, None, :]]
        return Batch(images, decoded.labels[rows], draws, indices)
    nearest = across.clamp(0, side - 1), down.clamp(0, side - 1)
    images = decoded.images[rows[:, None, None], nearest[1][:, :, None], nearest[0][:, None, :]]
    inside = (down == nearest[1])[:, :, None] & (across == nearest[0])[:, None, :]
    return Batch(images * inside[..., None], decoded.labels[rows], draws, indices)
