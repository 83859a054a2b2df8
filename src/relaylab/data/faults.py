"""Unreadable images: each is logged by name and counted, and too many of them are an error."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relaylab.errors import InputError, LabError
from relaylab.files import write_text

log = logging.getLogger("relaylab.data")

ALWAYS_ALLOWED = 10  # images, in data sets of any size
NAMED = 10  # images in an error message


class ImageFault(ValueError):
    """An image cannot be decoded. The message gives the reason, without the image's name."""


@dataclass(frozen=True, slots=True)
class Fault:
    """An image that could not be read or decoded.

    Attributes:
        index: index in the source.
        name: path of the image, for messages.
        reason: why it could not be read.
        draw: the draw that selected it; None outside training.
        replacement: index of the image that was used instead; None outside training.
    """

    index: int
    name: str
    reason: str
    draw: int | None = None
    replacement: int | None = None


class TooManyFaultsError(LabError):
    """More images are unreadable than allowed, so the data set as a whole is probably damaged."""


class FaultLog:
    """Collects the unreadable images of a process. Each is logged once by name; too many raise an error.

    Args:
        num_images: size of the source.
        max_share: fraction of the images that may be unreadable, 0 to 1; `ALWAYS_ALLOWED` images are always allowed.
        file: file for the complete list if there are too many, with lines of name, tab, reason; None for no file.
    """

    def __init__(self, num_images: int, *, max_share: float = 0.001, file: Path | None = None) -> None:
        if not 0 <= max_share <= 1:
            raise InputError(f"max_share must be 0 to 1, not {max_share}")
        self.limit = max(ALWAYS_ALLOWED, int(max_share * num_images))
        self.file = file
        self._reasons: dict[int, tuple[str, str]] = {}

    def __len__(self) -> int:
        return len(self._reasons)

    def record(self, faults: Iterable[Fault]) -> None:
        """Record the faults of a batch. An image is counted only once.

        Raises:
            TooManyFaultsError: more distinct images are unreadable than allowed.
        """
        for fault in faults:
            if fault.index in self._reasons:
                continue
            self._reasons[fault.index] = fault.name, fault.reason
            log.warning("unreadable image %s: %s", fault.name, fault.reason)
        if len(self) > self.limit:
            first = "; ".join(f"{name} ({reason})" for name, reason in list(self._reasons.values())[:NAMED])
            more = f"; and {len(self) - NAMED} more" if len(self) > NAMED else ""
            where = f"; {self.file} lists all of them" if self._write_list() else ""
            raise TooManyFaultsError(f"{len(self)} unreadable images, {self.limit} allowed: {first}{more}{where}")

    def lines(self) -> list[str]:
        """Return one line per image in the order of discovery: name, tab, reason."""
        return [f"{name}\t{reason}" for name, reason in self._reasons.values()]

    def state_dict(self) -> dict[str, Any]:
        """Return the recorded images as lists of integers and strings."""
        return {"numbers": list(self._reasons), "reasons": [list(pair) for pair in self._reasons.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the recorded images by the images in `state`."""
        self._reasons = dict(zip(state["numbers"], map(tuple, state["reasons"]), strict=True))

    def _write_list(self) -> bool:
        if self.file is None:
            return False
        try:
            write_text(self.file, "".join(f"{line}\n" for line in self.lines()))
        except OSError as error:  # the error about the faults matters more
            log.warning("cannot write %s: %s", self.file, error.strerror)
            return False
        return True
