"""The failure file of a run: written when a run fails, reported by comparisons, removed when the run restarts."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from relaylab.files import write_text
from relaylab.outside.reading import DamagedFileError, read_json

FILE = "failure.json"


@dataclass(frozen=True, slots=True)
class Failure:
    """The failure of a run.

    Attributes:
        kind: "diverged" if a loss or gradient was not finite, which rerunning the recipe would repeat; else "failed".
        step: updates made before the failure.
        error: the error message.
    """

    kind: Literal["diverged", "failed"]
    step: int
    error: str

    @property
    def text(self) -> str:
        """A one-line description."""
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
