"""Concurrent runs, each in its own process, with one progress display.

Note [Jobs]
1. The processes are forked from a server that has imported PyTorch once (`forkserver`), so that a run starts in
   milliseconds. Each process reports through its own pipe: a killed process holds no lock and corrupts no other
   report, and the parent notices the end of its pipe.
2. All runs use the same number of threads, regardless of how many run concurrently: sums are then accumulated in the
   same order, and the results do not depend on the number of jobs.
3. SIGINT and SIGTERM are forwarded as SIGTERM. Each run finishes its step and saves a checkpoint. A process whose pipe
   breaks, because its parent was killed, does the same.
4. One process at a time lists and decodes images; the next one finds the index and the mean image in the cache.
"""

import io
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, suppress
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

from relaylab.errors import InputError, LabError
from relaylab.progress import progress
from relaylab.train.failures import Failure, read_failure, write_failure
from relaylab.train.options import TrainOptions
from relaylab.train.signals import StopRequest, receiving

CONTEXT = multiprocessing.get_context("forkserver")
SECONDS_BETWEEN_REPORTS = 0.2
SECONDS_BETWEEN_LINES = 20.0  # where stderr is not a terminal


@dataclass(frozen=True, slots=True)
class _Report:
    """A message from a run's process: its progress, a line for the terminal, or its end and the reason."""

    step: int
    note: str = ""
    line: str = ""
    end: Literal["finished", "stopped", "failed", "refused"] | None = None  # refused: it did not start
    error: str = ""


@dataclass(eq=False)
class _Job:
    """A run in a separate process, and its last report."""

    name: str
    folder: Path
    process: BaseProcess
    pipe: Connection
    last: _Report


def start_server() -> None:
    """Start the server that forks the processes. It imports PyTorch in the background."""
    CONTEXT.set_forkserver_preload(["relaylab.train.session"])
    forkserver.ensure_running()


def train_all(runs: Mapping[str, TrainOptions], *, jobs: int, threads: int | None, iterations: int) -> bool:
    """Train runs concurrently. See Note [Jobs].

    Args:
        runs: the options of each run by name; `out` is its folder.
        jobs: maximum number of concurrent processes.
        threads: number of PyTorch threads per process; None for the default.
        iterations: iterations of each run.

    Returns:
        False if a signal stopped the runs; the same call resumes them. A run that failed has `failure.json` in its
        folder.

    Raises:
        InputError: a run could not start. The others were stopped.
    """
    waiting, running, ended = list(runs), list[_Job](), list[_Job]()
    with ExitStack() as stack:
        stop = stack.enter_context(receiving())
        lock = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relaylab-")))
        task = stack.enter_context(progress("train", iterations * len(runs), every_s=SECONDS_BETWEEN_LINES))
        stack.callback(_end_all, running, signal.SIGKILL)
        is_forwarded = False
        while running or (waiting and not stop):
            while waiting and len(running) < jobs and not stop:
                name = waiting.pop(0)
                running.append(_start(name, runs[name], threads, lock, jobs))
            if stop and not is_forwarded:
                is_forwarded = True
                _end_all(running, signal.SIGTERM)
            before = sum(job.last.step for job in (*running, *ended))
            ready = wait([job.pipe for job in running], timeout=0.5)
            for job in [job for job in running if job.pipe in ready and not _receive(job)]:
                running.remove(job)
                ended.append(job)
                text = _settle(job, is_stopping=bool(stop))
                print(f"{len(ended)} of {len(runs)}: {job.name}: {text}", file=sys.stderr)
                if job.last.end == "refused":
                    stop.signal = "refused"
            shown = "; ".join(f"{job.name} {job.last.step / iterations:.0%}" for job in running)
            steps = sum(job.last.step for job in (*running, *ended)) - before
            task.advance(steps, f"{len(ended)}/{len(runs)} runs done; {shown}")
    refused = [job.last.error for job in ended if job.last.end == "refused"]
    if refused:
        raise InputError(refused[0])
    return not (stop and (waiting or any(job.last.end == "stopped" for job in ended)))


def _start(name: str, options: TrainOptions, threads: int | None, lock: Path, jobs: int) -> _Job:
    assert options.out is not None
    pipe, child_end = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_work, args=(options, threads, child_end, lock, jobs, dict(os.environ)), name=name)
    process.start()
    child_end.close()
    return _Job(name, options.out, process, pipe, _Report(0))


def _receive(job: _Job) -> bool:
    """Receive one report; False if the process has closed its end of the pipe."""
    try:
        report = job.pipe.recv()
    except (EOFError, OSError):
        return False
    if report.line:
        print(f"{job.name}: {report.line}", file=sys.stderr)
    else:
        job.last = report
    return True


def _settle(job: _Job, *, is_stopping: bool) -> str:
    """Describe how a run ended once its process has exited, and write its failure if the run has not done so."""
    job.process.join()
    job.pipe.close()
    if job.last.end is None and is_stopping:
        job.last = replace(job.last, end="stopped", note="")
    elif job.last.end == "stopped" and not is_stopping:
        job.last = replace(job.last, end="failed", error="stopped by a signal")
    elif job.last.end is None:
        code = job.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        job.last = replace(job.last, end="failed", error=f"its process {how}")
    if job.last.end != "failed":
        return f"{job.last.end}, {job.last.note}" if job.last.note else str(job.last.end)
    failure = read_failure(job.folder) or Failure("failed", job.last.step, job.last.error)
    with suppress(OSError):  # e.g. a full disk
        job.folder.mkdir(parents=True, exist_ok=True)
        write_failure(job.folder, failure)
    return failure.text


def _end_all(running: Sequence[_Job], signum: signal.Signals) -> None:
    for job in running:
        with suppress(ProcessLookupError):
            os.kill(job.process.pid or 0, signum)


class _Reporter(io.TextIOBase):
    """The run's end of the pipe: a `Task` that sends its progress, and a stderr that sends its lines."""

    def __init__(self, pipe: Connection, stop: StopRequest) -> None:
        self.pipe, self.stop = pipe, stop
        self.has_begun, self.step, self.sent_at, self.text = False, 0, 0.0, ""

    def advance(self, count: int = 1, note: str | None = None) -> None:
        self.has_begun, self.step = True, self.step + count
        if time.monotonic() - self.sent_at >= SECONDS_BETWEEN_REPORTS:
            self.sent_at = time.monotonic()
            self.send(_Report(self.step, note or ""))

    def write(self, text: str) -> int:
        self.text += text
        *lines, self.text = self.text.split("\n")
        for line in filter(None, lines):
            self.send(_Report(self.step, line=line))
        return len(text)

    def send(self, report: _Report) -> None:
        try:
            self.pipe.send(report)
        except OSError:  # the parent was killed
            if not self.stop:
                self.stop.receive(signal.SIGTERM)


def _last_text(last: Mapping[str, float]) -> str:
    """Format the error of the last validation."""
    from relaylab.train.metrics import deciding

    measure = deciding(last)
    return f"{measure.title} {last[measure.name]:.2f} %"


def _work(
    options: TrainOptions,
    threads: int | None,
    pipe: Connection,
    lock: Path,
    jobs: int,
    environment: dict[str, str],
) -> None:
    """Train one run: the main function of its process."""
    import torch

    from relaylab.train import requests, run_folder, session
    from relaylab.train.signals import stopping

    os.environ.update(environment)
    if threads is not None:
        torch.set_num_threads(threads)
    with stopping() as stop, pipe:
        reporter = _Reporter(pipe, stop)
        with redirect_stderr(reporter):
            try:
                request, first = requests.resolve(options), run_folder.locked(lock, wait=True)
                outcome = session.train(request, task=reporter, first=first, stop=stop, runs=jobs)
            except Exception as error:  # a comparison reports any failure of a run
                if not isinstance(error, LabError):
                    traceback.print_exc()
                end = "refused" if isinstance(error, InputError) and not reporter.has_begun else "failed"
                reporter.send(_Report(reporter.step, end=end, error=str(error) or type(error).__name__))
            else:
                last = _last_text(outcome.last) if outcome.last else f"step {outcome.step}"
                end = "finished" if outcome.finished else "stopped"
                reporter.send(_Report(outcome.step, last, end=end))
