"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from relaylab.outside.showing import direct, printable

SECONDS_BETWEEN_LINES = 5.0
SECONDS_WITHOUT_LINES = 1.0  # shorter work leaves no line in a log


class Task(Protocol):
    """The progress of one task."""

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Advance by `count` units and optionally update the status text."""
        ...


class Silent:
    """A progress task that displays nothing."""

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Do nothing."""


class _Bar:
    def __init__(self, progress: Progress, what: str, total: int, done: int) -> None:
        self.progress = progress
        self.task = progress.add_task(printable(what), total=total, completed=done, note="")

    def advance(self, count: int = 1, note: str | None = None) -> None:
        fields: dict[str, Any] = {} if note is None else {"note": printable(note)}
        self.progress.update(self.task, advance=count, **fields)


class _Lines:
    """Progress for log files: a line every few seconds, and one at the end."""

    def __init__(self, what: str, total: int, done: int, every_s: float) -> None:
        self.what, self.total, self.done, self.note, self.every_s = what, total, done, "", every_s
        self.began_at = self.last_line_at = time.monotonic()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        self.done += count
        self.note = self.note if note is None else note
        now = time.monotonic()
        is_end = bool(count) and self.done >= self.total and now - self.began_at >= SECONDS_WITHOUT_LINES
        if is_end or now - self.last_line_at >= self.every_s:
            self.last_line_at = now
            line = printable(f"{self.what}: {self.done}/{self.total}  {self.note}".rstrip())
            print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int, *, done: int = 0, every_s: float = SECONDS_BETWEEN_LINES) -> Iterator[Task]:
    """Show the progress of a task on stderr within the block.

    Example::

        with progress("decoding", len(source)) as task:
            task.advance(64, note="2 bad")

    Args:
        what: name of the task, one or two words.
        total: size of the task in the units that `advance` counts.
        done: units that are already done.
        every_s: seconds between two lines in a log.
    """
    console = Console(file=direct(sys.stderr), stderr=True)
    if not console.is_terminal:
        yield _Lines(what, total, done, every_s)
        return
    columns = (  # on a narrow terminal, the note is truncated first
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=8),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn(
            "{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
        ),
    )
    with Progress(*columns, console=console, expand=True) as bar:
        yield _Bar(bar, what, total, done)
