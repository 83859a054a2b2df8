"""The place of the decoded images of a run: on disk, in memory or on the GPU."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from relaylab.data.crops import Crops
from relaylab.data.datasets import InMemoryDataset
from relaylab.data.faults import FaultLog
from relaylab.data.geometry import CropSpec
from relaylab.data.memory import decode_all, decoded_bytes, free_memory
from relaylab.data.sources.source import Source
from relaylab.progress import progress
from relaylab.train.options import RuntimeOptions

MEMORY_SHARE = 0.5  # fraction of the free memory for decoded images; otherwise they are decoded on demand
DEVICE_SHARE = 0.25  # fraction of a GPU's free memory for decoded images: training needs the rest
IMAGES_PER_PROCESS = 2000  # with fewer images, starting another process takes longer than decoding


def fits_memory(options: RuntimeOptions, sources: Sequence[Source], crop_spec: CropSpec, copies: int) -> bool:
    """Return whether all images are decoded into memory: according to `--images`, or if they fit.

    `copies` is the number of processes on this machine, each of which holds all images.
    """
    if options.images != "auto":
        return options.images == "memory"
    needed = sum(decoded_bytes(source, crop_spec.short_side) for source in sources)
    return needed * copies <= MEMORY_SHARE * free_memory("cpu")


def storage_devices(
    device: torch.device, sources: tuple[Source, Source], crop_spec: CropSpec, crops: Crops, runs: int = 1
) -> tuple[torch.device, torch.device]:
    """Return the devices that store the decoded training and validation images.

    A GPU stores images if they fit into `DEVICE_SHARE` of its free memory and are cropped on it; resized crops and
    policies are computed on the CPU. Otherwise the images remain on the CPU, and batches are pinned.

    Args:
        device: device to train on.
        sources: training and validation images.
        crop_spec: crops with the side of the decoded images.
        crops: settings of the training crops.
        runs: number of concurrent runs that share the device.
    """
    if device.type == "cpu":
        return device, device
    left, devices = DEVICE_SHARE * free_memory(device) / runs, list[torch.device]()
    for source, on_device in zip(sources, (crops.are_windows, True), strict=True):
        needed = decoded_bytes(source, crop_spec.short_side)
        fits = on_device and needed <= left
        left -= needed if fits else 0
        devices.append(device if fits else torch.device("cpu"))
    return devices[0], devices[1]


def decode_in_memory(
    sources: tuple[Source, Source],
    devices: tuple[torch.device, torch.device],
    crop_spec: CropSpec,
    workers: int,
    fault_file: Path | None,
    *,
    pin: bool,
) -> Iterator[InMemoryDataset]:
    """Decode the training images, then the validation images; `pin` is for batches that are copied to a GPU."""
    train, val = sources
    with progress("decoding", len(train) + len(val)) as task:
        logs = FaultLog(len(train), file=fault_file), None
        for source, device, faults in zip(sources, devices, logs, strict=True):
            enough = min(workers, len(source) // IMAGES_PER_PROCESS)
            decoded = decode_all(source, crop_spec, device=device, workers=enough, faults=faults, task=task)
            yield InMemoryDataset(decoded, crop_spec, pin)
