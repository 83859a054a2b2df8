"""What the images of a source are like: formats, sizes, and which cannot be read."""

import io
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from relaylab.data.batches import OrderedBatches
from relaylab.data.decode import FORMATS, decode_checked
from relaylab.data.faults import Fault, ImageFault
from relaylab.data.loader import Workers
from relaylab.data.sources.source import Source
from relaylab.files import available_cores
from relaylab.progress import Silent, Task

BATCH = 32


@dataclass
class Survey:
    """Findings on some images of a source.

    Attributes:
        numbers: of the images that were looked at, those that can be read.
        widths: in pixels, of the same, upright.
        heights: likewise.
        file_sizes: in bytes, likewise.
        kinds: how many there are of each format and colour mode, such as "JPEG RGB" or "JPEG RGB, progressive".
        unreadable: images of which there are no pixels.
        damaged: images that strict decoding refuses and that Pillow reads all the same, perhaps in part.
    """

    numbers: list[int] = field(default_factory=list[int])
    widths: list[int] = field(default_factory=list[int])
    heights: list[int] = field(default_factory=list[int])
    file_sizes: list[int] = field(default_factory=list[int])
    kinds: Counter[str] = field(default_factory=Counter[str])
    unreadable: list[Fault] = field(default_factory=list[Fault])
    damaged: list[Fault] = field(default_factory=list[Fault])

    @property
    def examined(self) -> int:
        """How many images were looked at."""
        return len(self.numbers) + len(self.unreadable)

    def add(self, other: "Survey") -> None:
        """Take over another survey's findings."""
        for name in ("numbers", "widths", "heights", "file_sizes", "unreadable", "damaged"):
            getattr(self, name).extend(getattr(other, name))
        self.kinds.update(other.kinds)


class Examination(Dataset[Survey]):
    """A source's images, decoded and described a batch at a time."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitems__(self, pairs: NDArray[np.int64]) -> Survey:
        """Survey of the images whose numbers are in the second column."""
        survey = Survey()
        for number in pairs[:, 1].tolist():
            self._examine(number, survey)
        return survey

    def _examine(self, number: int, survey: Survey) -> None:
        try:
            data = self.source.read(number)
            pixels, complaint = decode_checked(data)
        except (ImageFault, OSError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            survey.unreadable.append(Fault(number, self.source.name(number), reason))
            return
        if complaint is not None:
            survey.damaged.append(Fault(number, self.source.name(number), complaint))
        survey.numbers.append(number)
        survey.heights.append(pixels.shape[0])
        survey.widths.append(pixels.shape[1])
        survey.file_sizes.append(len(data))
        survey.kinds[kind(data)] += 1


def kind(data: bytes) -> str:
    """Format and colour mode of an encoded image; what costs time or is seldom seen is mentioned."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.init()
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                text = f"{image.format} {image.mode}"
                progressive = bool(image.info.get("progressive"))
                animated = image.format in ("GIF", "WEBP") and _frames(image) > 1
    except MemoryError:
        raise
    except Exception:  # Pillow's readers let through whatever odd bytes bring about in them
        return "unknown"
    return text + ", progressive" * progressive + ", animated" * animated


def _frames(image: Image.Image) -> int:
    """Counting them reads all of them, of which only the first needs to be sound."""
    try:
        return getattr(image, "n_frames", 1)
    except MemoryError:
        raise
    except Exception:
        return 1


def survey(
    source: Source,
    findings: Survey,
    *,
    limit: int | None = None,
    workers: int | None = None,
    task: Task | None = None,
) -> None:
    """Decode images and describe them.

    Args:
        source: of the images.
        findings: what is found is added here as it is found, so that nothing is lost when the work is broken off.
        limit: look at no more than so many, evenly spread; None for all.
        workers: processes that decode; None for one on each core.
        task: is told of every image.
    """
    task = task or Silent()
    numbers = spread(len(source), limit)
    workers = min(available_cores() if workers is None else workers, len(numbers) // BATCH)
    for part in Workers(count=workers).loader(Examination(source), OrderedBatches(numbers, BATCH)):
        findings.add(part)
        bad = len(findings.unreadable) + len(findings.damaged)
        task.advance(part.examined, f"{bad} bad" if bad else None)


def spread(count: int, limit: int | None) -> NDArray[np.int64]:
    """At most `limit` of the numbers below `count`, evenly spread."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.arange(limit) * count // limit


def summary(source: Source, findings: Survey) -> dict[str, Any]:
    """Figures on a source for people and programs, as plain values.

    Args:
        source: that was surveyed.
        findings: on it.
    """
    labels = np.asarray(source.labels)
    counts = np.bincount(labels[labels >= 0], minlength=len(source.classes))
    sides = np.minimum(findings.widths, findings.heights)
    return {
        "title": source.title,
        "images": len(source),
        "unlabelled": int((labels < 0).sum()),
        "classes": [[name, count] for name, count in zip(source.classes, counts.tolist(), strict=True)],
        "ignored_files": dict(getattr(source, "ignored", {})),
        "examined": findings.examined,
        "kinds": dict(findings.kinds.most_common()),
        "short_side": _spread_of(sides),
        "width": _spread_of(findings.widths),
        "height": _spread_of(findings.heights),
        "file_bytes": _spread_of(findings.file_sizes),
        "unreadable": [[fault.name, fault.reason] for fault in findings.unreadable],
        "damaged": [[fault.name, fault.reason] for fault in findings.damaged],
    }


def _spread_of(values: Any) -> dict[str, int] | None:
    if not len(values):
        return None
    least, median, most = np.quantile(values, [0, 0.5, 1]).astype(np.int64).tolist()
    return {"least": least, "median": median, "most": most}
