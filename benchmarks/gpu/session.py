"""The results of one run: recorded as soon as they exist, within a time limit."""

import gc
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from benchmarks.measure import Metrics
from relaylab.files import write_text

T = TypeVar("T")
Status = Literal["measured", "out of memory", "wrong gradients", "failed", "not run"]

ROOT = Path(__file__).parents[2]
FILE, LOG = "results.json", "log.txt"
NO_TIME = "the time limit was reached"
GRACE_S = 5.0  # for a child process to end after SIGTERM


class WrongGradientsError(RuntimeError):
    """A contender computes other gradients than it claims."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A measurement of one contender, or the reason why there is none."""

    entry: str
    name: str
    status: Status
    reason: str = ""
    metrics: Metrics = field(default_factory=dict)


@dataclass(kw_only=True)
class Session:
    """One run of the benchmark.

    Attributes:
        folder: folder of results.json and log.txt.
        scratch: folder for temporary files.
        device: "cuda" or "cpu".
        minutes: time after which no further measurement starts.
        about: hardware, versions, commit and command.
    """

    folder: Path
    scratch: Path
    device: str
    minutes: float
    about: Mapping[str, Any]
    results: list[Result] = field(default_factory=list)
    started_at: float = field(default_factory=time.perf_counter)

    @property
    def left_s(self) -> float:
        """Seconds until the time limit."""
        return 60 * self.minutes - (time.perf_counter() - self.started_at)

    def record(self, result: Result) -> None:
        """Add a result, and rewrite the file of results atomically."""
        self.results.append(result)
        elapsed = round(time.perf_counter() - self.started_at, 1)
        content = {"environment": {**self.about, "elapsed_s": elapsed}, "results": [_content(r) for r in self.results]}
        write_text(self.folder / FILE, json.dumps(content, indent=2) + "\n")
        print(f"{elapsed:7.1f} s  {result.entry} {result.name}: {result.status} {result.reason}".rstrip(), flush=True)

    def measured(self, entry: str, name: str, metrics: Metrics) -> None:
        """Record the metrics of a contender."""
        self.record(Result(entry=entry, name=name, status="measured", metrics=metrics))

    def skip(self, entry: str, names: Sequence[str], reason: str) -> None:
        """Record the reason why some contenders did not run."""
        for name in names:
            self.record(Result(entry=entry, name=name, status="not run", reason=reason))

    def attempt(self, entry: str, name: str, work: Callable[[], T]) -> T | None:
        """Call a function if there is time left. A failure is recorded under the contender's name.

        Returns:
            The function's result; None if it failed, or if the time limit was reached.
        """
        if self.left_s <= 0:
            self.skip(entry, [name], NO_TIME)
            return None
        try:
            return work()
        except Exception as error:  # any failure of one contender is a result
            status, text = status_of(error), " ".join(f"{type(error).__name__}: {error}".split())
        # Outside the handler, whose traceback would keep the contender's tensors alive.
        free_memory()
        self.record(Result(entry=entry, name=name, status=status, reason=text[:400]))
        return None

    def run(self, command: Sequence[str], limit_s: float) -> tuple[int | None, str]:
        """Run a Python module in its own process group, until `limit_s` or the time limit.

        Returns:
            The exit code, or None after a timeout; and the output, which is also added to the log.
        """
        free_memory()
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        file = self.scratch / "output.txt"
        with file.open("w") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code = _wait(child, max(1.0, min(limit_s, self.left_s)))
        text = file.read_text(errors="replace").strip()
        with (self.folder / LOG).open("a") as log:
            log.write(f"$ python -m {shlex.join(command)}\n{text}\nexit code: {code}\n\n")
        return code, text


def _content(result: Result) -> dict[str, Any]:
    content = asdict(result)
    return content | {"figures": content.pop("metrics")}  # the key in the file


def status_of(error: Exception) -> Status:
    """Return the status of a contender that raised this error."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return "wrong gradients" if isinstance(error, WrongGradientsError) else "failed"


def free_memory() -> None:
    """Return unused memory to the device, for the next contender or another process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _wait(child: "subprocess.Popen[bytes]", limit_s: float) -> int | None:
    """Wait for a child; after the limit, end its process group and return None."""
    try:
        return child.wait(limit_s)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if child.poll() is None:  # even after Ctrl-C
            os.killpg(child.pid, signal.SIGTERM)
            try:
                child.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    return None
