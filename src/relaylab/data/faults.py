"""Unreadable images: logged by name, counted, and an error if there are too many."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relaylab.errors import InputError, LabError
from relaylab.files import write_text

log = logging.getLogger("relaylab.data")

ALWAYS_ALLOWED = 10  # images, in however small a data set
NAMED = 10  # in an error's text


class ImageFault(ValueError):
    """The bytes of one image cannot be turned into pixels; the text says why, without the image's name."""


@dataclass(frozen=True, slots=True)
class Fault:
    """An image that could not be read or decoded.

    Attributes:
        index: index in its source.
        name: its path, for messages.
        reason: why it could not be read.
        draw: the draw that asked for it; None outside training.
        replacement: index of the image used instead; None outside training.
    """

    index: int
    name: str
    reason: str
    draw: int | None = None
    replacement: int | None = None


class TooManyFaultsError(LabError):
    """So many images are unreadable that something is wrong with the data as a whole."""


class FaultLog:
    """A log of the unreadable images that a process has found: each is logged once by name; too many are an error.

    Args:
        num_images: size of the source.
        max_share: share that may be unreadable, from 0 to 1; `ALWAYS_ALLOWED` images are always allowed.
        file: file for the whole list if there are too many, in lines of name, tab, reason; None for no file.
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
        """Record the faults of a batch; images that are known already are not counted again.

        Raises:
            TooManyFaultsError: more distinct images than allowed.
        """
        for fault in faults:
            if fault.index in self._reasons:
                continue
            self._reasons[fault.index] = fault.name, fault.reason
            log.warning("unreadable image %s: %s", fault.name, fault.reason)
        if len(self) > self.limit:
            first = "; ".join(f"{name} ({reason})" for name, reason in list(self._reasons.values())[:NAMED])
            more = f"; and {len(self) - NAMED} more" if len(self) > NAMED else ""
            where = f"; all of them are listed in {self.file}" if self._write_list() else ""
            raise TooManyFaultsError(f"{len(self)} unreadable images, {self.limit} allowed: {first}{more}{where}")

    def lines(self) -> list[str]:
        """Return a line for each image, in the order in which they were found: name, tab, reason."""
        return [f"{name}\t{reason}" for name, reason in self._reasons.values()]

    def state_dict(self) -> dict[str, Any]:
        """Return the faults in lists of integers and strings."""
        return {"numbers": list(self._reasons), "reasons": [list(pair) for pair in self._reasons.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the faults by those of another log."""
        self._reasons = dict(zip(state["numbers"], map(tuple, state["reasons"]), strict=True))

    def _write_list(self) -> bool:
        if self.file is None:
            return False
        try:
            write_text(self.file, "".join(f"{line}\n" for line in self.lines()))
        except OSError as error:  # must not hide the faults themselves
            log.warning("cannot write %s: %s", self.file, error.strerror)
            return False
        return True
