"""Scan a source: formats and sizes of its images, and the images that cannot be read."""

import io
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from relaylab.data.batches import OrderedBatches, spread
from relaylab.data.decode import FORMATS, decode_checked, without_notes
from relaylab.data.faults import Fault, ImageFault
from relaylab.data.loader import Workers
from relaylab.data.sources.source import Source, class_counts, targets_of
from relaylab.files import available_cores
from relaylab.progress import Task

BATCH = 32


@dataclass
class ScanResults:
    """Results of scanning some or all images of a source.

    Attributes:
        widths: widths of the readable images, upright, in pixels.
        heights: heights of the readable images, upright, in pixels.
        file_sizes: sizes of the readable images in bytes.
        kinds: number of images by format and colour mode, such as "JPEG RGB" or "JPEG RGB, progressive".
        unreadable: images that cannot be decoded.
        damaged: images that strict decoding rejects but Pillow decodes, perhaps incompletely.
    """

    widths: list[int] = field(default_factory=list[int])
    heights: list[int] = field(default_factory=list[int])
    file_sizes: list[int] = field(default_factory=list[int])
    kinds: Counter[str] = field(default_factory=Counter[str])
    unreadable: list[Fault] = field(default_factory=list[Fault])
    damaged: list[Fault] = field(default_factory=list[Fault])

    @property
    def examined(self) -> int:
        """Number of images that were scanned."""
        return len(self.file_sizes) + len(self.unreadable)

    def add(self, other: "ScanResults") -> None:
        """Add the results of more images."""
        for name in ("widths", "heights", "file_sizes", "unreadable", "damaged"):
            getattr(self, name).extend(getattr(other, name))
        self.kinds.update(other.kinds)


class ScanDataset(Dataset[ScanResults]):
    """A PyTorch data set that decodes and describes a batch of images at a time."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitems__(self, pairs: NDArray[np.int64]) -> ScanResults:
        """Scan the images whose indices are in the second column of `pairs`."""
        results = ScanResults()
        for index in pairs[:, 1].tolist():
            try:
                data = self.source.read(index)
                pixels, complaint = decode_checked(data)
            except (ImageFault, OSError) as error:
                reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
                results.unreadable.append(Fault(index, self.source.name(index), reason))
                continue
            if complaint is not None:
                results.damaged.append(Fault(index, self.source.name(index), complaint))
            results.heights.append(pixels.shape[0])
            results.widths.append(pixels.shape[1])
            results.file_sizes.append(len(data))
            results.kinds[kind(data)] += 1
        return results


def kind(data: bytes) -> str:
    """Describe an encoded image: format, colour mode, and whether it is progressive or animated."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.init()
            with Image.open(io.BytesIO(without_notes(data)), formats=FORMATS) as image:
                text = f"{image.format} {image.mode}"
                progressive = bool(image.info.get("progressive"))
                animated = image.format in ("GIF", "WEBP") and _is_animated(image)
    except MemoryError:
        raise
    except Exception:  # damaged bytes can raise anything in Pillow's readers
        return "unknown"
    return text + ", progressive" * progressive + ", animated" * animated


def _is_animated(image: Image.Image) -> bool:
    """Return whether there is a second frame. Counting all frames would mean reading them."""
    try:
        return bool(getattr(image, "is_animated", False))
    except MemoryError:
        raise
    except Exception:
        return False


def scan(
    source: Source,
    results: ScanResults,
    *,
    limit: int | None = None,
    workers: int | None = None,
    task: Task | None = None,
) -> None:
    """Decode images and add the findings to `results`.

    Args:
        source: encoded images.
        results: updated after every batch, so that an interruption keeps the results so far.
        limit: maximum number of images to scan, evenly spread; None for all.
        workers: processes that decode; None for one per core.
        task: progress display, which counts images and shows the number of bad ones.
    """
    indices = spread(len(source), limit)
    workers = min(available_cores() if workers is None else workers, len(indices) // BATCH)
    for batch in Workers(count=workers).loader(ScanDataset(source), OrderedBatches(indices, BATCH)):
        results.add(batch)
        bad = len(results.unreadable) + len(results.damaged)
        if task is not None:
            task.advance(batch.examined, f"{bad} bad" if bad else None)


def summary(source: Source, results: ScanResults) -> dict[str, Any]:
    """Return a summary of a source and its scan as plain values, for JSON and tables."""
    targets = targets_of(source)
    counts = class_counts(source)
    unlabelled = source.labels < 0 if targets is None else ~targets.any(axis=1)
    sides = np.minimum(results.widths, results.heights)
    return {
        "title": source.title,
        "images": len(source),
        "unlabelled": int(unlabelled.sum()),
        "several_labels": None if targets is None else int((targets.sum(axis=1) > 1).sum()),
        "classes": [[name, count] for name, count in zip(source.classes, counts.tolist(), strict=True)],
        "notes": list(getattr(source, "notes", ())),
        "ignored_files": dict(getattr(source, "ignored", {})),
        "ignored_folders": dict(getattr(source, "skipped", {})),
        "examined": results.examined,
        "kinds": dict(results.kinds.most_common()),
        "short_side": _spread_of(sides),
        "width": _spread_of(results.widths),
        "height": _spread_of(results.heights),
        "file_bytes": _spread_of(results.file_sizes),
        "unreadable": [[fault.name, fault.reason] for fault in results.unreadable],
        "damaged": [[fault.name, fault.reason] for fault in results.damaged],
    }


def _spread_of(values: Any) -> dict[str, int] | None:
    if not len(values):
        return None
    least, median, most = np.quantile(values, [0, 0.5, 1]).astype(np.int64).tolist()
    return {"least": least, "median": median, "most": most}
