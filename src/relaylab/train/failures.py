"""The failure of a run, a file in its folder: comparisons report it, and the next start of the run removes it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from relaylab.files import write_text
from relaylab.outside.reading import DamagedFileError, read_json

FILE = "failure.json"


@dataclass(frozen=True, slots=True)
class Failure:
    """The end of a run before its last iteration, after `step` updates.

    Attributes:
        kind: "diverged" if a loss or gradient was not finite, which the same recipe will repeat; "failed" otherwise.
    """

    kind: Literal["diverged", "failed"]
    step: int
    error: str

    @property
    def text(self) -> str:
        """One sentence for tables and terminals."""
        return f"{self.kind} after step {self.step}: {' '.join(self.error.split())}"


def write_failure(folder: Path, failure: Failure) -> None:
    """Write the failure of a run."""
    write_text(folder / FILE, json.dumps(asdict(failure), indent=1) + "\n")


def read_failure(folder: Path) -> Failure | None:
    """Read the failure of a run; None if it has not failed, or the file is damaged."""
    try:
        return read_json(folder / FILE, Failure)
    except DamagedFileError:
        return None
