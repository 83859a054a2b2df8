"""Images that cannot be used: said by name, counted, and too many of them stop the work."""

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
        number: in its source.
        name: where it is.
        reason: why not.
        draw: the draw that asked for it; None outside training.
        replacement: number of the image used in its stead; None outside training.
    """

    number: int
    name: str
    reason: str
    draw: int | None = None
    replacement: int | None = None


class TooManyFaultsError(LabError):
    """So many images cannot be read that something is wrong with the data as a whole."""


class FaultLog:
    """What a process knows of unreadable images: each is logged once by name, and too many of them stop the work.

    Args:
        num_images: in the source.
        max_share: of them may be unreadable, from 0 to 1; `ALWAYS_ALLOWED` images are allowed whatever their share.
        file: where the whole list goes when there are too many; None for nowhere. Lines of name, tab, reason.
    """

    def __init__(self, num_images: int, *, max_share: float = 0.001, file: Path | None = None) -> None:
        if not 0 <= max_share <= 1:
            raise InputError(f"max_share must be 0 to 1, not {max_share}")
        self.limit = max(ALWAYS_ALLOWED, int(max_share * num_images))
        self.file = file
        self._reasons: dict[int, tuple[str, str]] = {}

    def __len__(self) -> int:
        """Distinct images so far."""
        return len(self._reasons)

    def record(self, faults: Iterable[Fault]) -> None:
        """Take note of faults.

        Args:
            faults: of a batch. Those of images that are known already count for nothing.

        Raises:
            TooManyFaultsError: more distinct images than allowed.
        """
        for fault in faults:
            if fault.number in self._reasons:
                continue
            self._reasons[fault.number] = fault.name, fault.reason
            log.warning("unreadable image %s: %s", fault.name, fault.reason)
        if len(self) > self.limit:
            raise TooManyFaultsError(self._complaint())

    def lines(self) -> list[str]:
        """An image a line, in the order in which they were found: name, tab, reason."""
        return [f"{name}\t{reason}" for name, reason in self._reasons.values()]

    def state_dict(self) -> dict[str, Any]:
        """What is known, in lists of integers and strings."""
        names = [list(pair) for pair in self._reasons.values()]
        return {"numbers": list(self._reasons), "reasons": names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Know what another log knew, in place of what this one did."""
        self._reasons = {
            number: (name, reason) for number, (name, reason) in zip(state["numbers"], state["reasons"], strict=True)
        }

    def _complaint(self) -> str:
        first = "; ".join(f"{name} ({reason})" for name, reason in list(self._reasons.values())[:NAMED])
        more = f"; and {len(self) - NAMED} more" if len(self) > NAMED else ""
        where = f"; all of them are listed in {self.file}" if self._write_list() else ""
        return f"{len(self)} unreadable images, {self.limit} allowed: {first}{more}{where}"

    def _write_list(self) -> bool:
        if self.file is None:
            return False
        try:
            write_text(self.file, "".join(f"{line}\n" for line in self.lines()))
        except OSError as error:  # what has to be said is the images, not this
            log.warning("cannot write %s: %s", self.file, error.strerror)
            return False
        return True
