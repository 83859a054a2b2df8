"""Records of a run: metrics as JSON lines and TensorBoard events, and the log."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch.utils.tensorboard import SummaryWriter

from relaylab.errors import InputError
from relaylab.files import write_text
from relaylab.outside.folders import open_for_writing
from relaylab.outside.reading import LARGEST, DamagedFileError, parse, read_bytes, typed
from relaylab.outside.showing import terminal
from relaylab.train.run_folder import LOG, METRICS, TENSORBOARD

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """A line of metrics: its kind and step, the number of updates made."""

    kind: Literal["train", "val", "gradients"]
    step: int

    def __post_init__(self) -> None:
        """Check the step."""
        if not 0 <= self.step < 2**63:
            raise ValueError(f"step {self.step}")


@dataclass(frozen=True)
class _Training(Line):
    loss: dict[str, float]
    top1: float | None = None  # absent for multi-label images
    top5: float | None = None


@dataclass(frozen=True)
class _Validation(Line):
    loss: float
    top1: float | None = None
    top5: float | None = None
    map: float | None = None
    map_error: float | None = None

    def __post_init__(self) -> None:
        """Check that the line has the error of a measure."""
        Line.__post_init__(self)
        if None in (self.top1, self.top5) and None in (self.map, self.map_error):
            raise ValueError("expected top1 and top5, or map and map_error")


@dataclass(frozen=True)
class _Gradients(Line):
    layers: dict[str, dict[str, float]]
    segments: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    cosines: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])


KINDS = {"train": _Training, "val": _Validation, "gradients": _Gradients}


class Records:
    """The metrics of a run.

    Args:
        folder: the run folder.
        step: the step to resume from. Lines of later steps are dropped, since they will be written again.
        validated: whether the checkpoint includes the validation of that step; if not, its line is dropped too.
    """

    def __init__(self, folder: Path, step: int, *, validated: bool = True) -> None:
        file = folder / METRICS
        if file.exists():
            pending = None if validated else (step, "val")
            lines = [line for line in read_metrics(file) if line["step"] <= step]
            kept = [line for line in lines if (line["step"], line["kind"]) != pending]
            write_text(file, "".join(f"{json.dumps(line)}\n" for line in kept))
        self._file = open_for_writing(file, "a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=step + 1)

    def write(self, kind: str, step: int, values: Values) -> None:
        """Write one line.

        Args:
            kind: "train", "val" or "gradients".
            step: updates made.
            values: numbers by name, optionally in nested groups.
        """
        self._file.write(json.dumps({"kind": kind, "step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in _leaves(kind, values):
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        self._board.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file, up to the first truncated or damaged line."""
    lines: list[dict[str, Any]] = []
    for text in read_bytes(file, LARGEST).splitlines():
        try:
            line = parse(text, dict[str, Any], str(file))
            typed(line, KINDS[typed(line, Line, str(file)).kind], str(file))
        except (DamagedFileError, RecursionError):
            break
        lines.append(line)
    return lines


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run.

    Raises:
        InputError: the run has no metrics yet.
    """
    file = folder / METRICS
    lines = read_metrics(file) if file.is_file() else []
    if not lines:
        raise InputError(f"the run in {folder} has no metrics; train it first: relaylab train --resume {folder}")
    return lines


def _leaves(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(f"{name}/{key}", part)
    elif isinstance(value, int | float):
        yield name, value


class _Stderr(logging.Handler):
    """Write to the current stderr, which progress bars replace. Errors are skipped, since they are also raised."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR:
            print(self.format(record), file=sys.stderr)


class _LogFile(logging.FileHandler):
    """A log file handler that does not follow links."""

    def _open(self) -> Any:
        return open_for_writing(Path(self.baseFilename), "a", encoding="utf-8")


class _Escaping(logging.Formatter):
    """Escape control characters, which names of files may contain."""

    def format(self, record: logging.LogRecord) -> str:
        return terminal(super().format(record))


@contextmanager
def logging_to(folder: Path | None, shown: int = logging.INFO) -> Iterator[None]:
    """Send the lab's log to stderr and to a run's log file.

    Args:
        folder: the run folder; None in all processes except the first, which log only warnings.
        shown: minimum level for stderr.
    """
    logger = logging.getLogger("relaylab")
    handlers: list[logging.Handler] = [_Stderr(shown)]
    handlers[0].setFormatter(_Escaping())
    if folder is not None:
        handlers.append(_LogFile(folder / LOG, encoding="utf-8"))
        handlers[1].setFormatter(_Escaping("%(asctime)s %(levelname)s %(message)s"))
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO if folder is not None else logging.WARNING)
    logger.propagate = False
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(level)
        logger.propagate = propagate
