"""Shared by all benchmarks: interleaved timing, FLOP and memory counts, environment, command line and result file.

Note [Timing]
1. Contenders take turns in rounds, each round in a new random order, so that other load on the machine affects all
   contenders equally.
2. A ratio is computed within each round, and its median over the rounds: a slow phase is slow for both contenders.
3. Each ratio has its interquartile range and the standard error of the median that follows from it. A smaller
   difference is not significant.
4. Garbage is collected before and between the rounds, not within a measurement.
5. The process keeps freed memory if the C library supports this. Otherwise the amount that is returned to the system
   and allocated again, page by page, depends on the order in which buffers are freed. This was up to 1 % of a step,
   even between two formulations of the same plain PyTorch.
"""

import argparse
import ctypes
import gc
import itertools
import json
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, cast

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler reports its start and stop on stderr

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from relaybackprop.planning.profile import FlopCounter
from relaybackprop.planning.storages import Storages
from relaylab.files import write_text

Step = Callable[[], object]
Metrics = dict[str, float]
S = TypeVar("S")


def count_flops(step: Step) -> int:
    """Count the floating-point operations of one call, forward and backward. Free on the meta device."""
    with FlopCounter() as counter:
        step()
    return counter.total


def count_bytes(step: Step, owned: Iterable[torch.Tensor]) -> int:
    """Count the peak of live bytes during one call. Free on the meta device.

    Args:
        step: the function to call.
        owned: tensors that do not count: parameters, their gradients, the batch.
    """
    storages = Storages(owned)

    class PeakCounter(FlopCounter):
        def on_operation(self, operation: Any, result: Any) -> None:  # noqa: ARG002
            storages.add(result)

    with PeakCounter():
        step()
    return storages.peak


def peak_bytes(step: Step) -> int:
    """Measure the peak of allocated bytes during one call, above the bytes allocated before.

    The allocator's count includes temporary buffers and workspaces, on all devices that the step uses. On a CPU it
    comes from the profiler, so the call takes longer than usual.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step()
    results: Any = cast(Any, profiler).profiler.kineto_results
    events = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(events, key=lambda event: event[0])))


def saved_bytes(step: Step, owned: Iterable[torch.Tensor]) -> int:
    """Count the peak of bytes that autograd saves for backward passes during one call.

    Args:
        step: a step without checkpointing, which saves tensors by other means.
        owned: tensors that do not count, such as parameters.
    """
    storages = Storages(owned)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages.add(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return storages.peak


def keep_memory() -> bool:
    """Make this process keep the memory that it frees (Note [Timing] 5). This cannot be undone.

    Returns:
        Whether the C library, glibc, accepted the settings.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    # The largest allowed values: never trim, and use a separate mapping only for blocks of at least 32 MiB.
    return mallopt(trim_threshold, 2**31 - 1) == 1 and mallopt(mmap_threshold, 2**25) == 1


def event_clock() -> Callable[[], float]:
    """Return a clock of the current CUDA device, in seconds. Each reading waits for the work issued before it."""
    last, seconds = torch.cuda.Event(enable_timing=True), 0.0
    last.record()

    def now() -> float:
        nonlocal last, seconds
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        seconds += last.elapsed_time(event) / 1000  # single precision, so measure only between two readings
        last = event
        return seconds

    return now


def clock_of(device: str) -> Callable[[], float]:
    """Return a clock by CUDA events for a GPU, and the processor's clock otherwise."""
    return event_clock() if torch.device(device).type == "cuda" else time.perf_counter


def interleave(
    contenders: Mapping[str, Step],
    *,
    rounds: int,
    budget_s: float = math.inf,
    warmup: int = 2,
    min_rounds: int = 3,
    seed: int = 0,
    before: Step = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time contenders in turns. See Note [Timing].

    Args:
        contenders: functions to call, by name.
        rounds: maximum number of rounds. Every contender runs once per round.
        budget_s: time in seconds after which no further round starts, warm-up included.
        warmup: number of rounds that are not counted.
        min_rounds: minimum number of rounds, even if `budget_s` is exceeded.
        seed: seed of the order within the rounds.
        before: function that is called before each measurement, and not timed.
        clock: returns the time in seconds.

    Returns:
        Seconds by round for each contender. All lists have the same length.
    """
    order = list(contenders)
    shuffle = random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in contenders}
    started, gc_enabled = clock(), gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for round_index in range(warmup + rounds):
            if round_index >= warmup + min_rounds and clock() - started > budget_s:
                break
            shuffle(order)
            for name in order:
                before()
                start_time = clock()
                contenders[name]()
                elapsed = clock() - start_time
                if round_index >= warmup:
                    times[name].append(elapsed)
            gc.collect(0)
    finally:
        if gc_enabled:
            gc.enable()
    return times


@dataclass(frozen=True)
class Ratio:
    """The ratio of two contenders' times over the rounds.

    Attributes:
        median: median of the rounds' ratios.
        low: first quartile.
        high: third quartile.
        rounds: number of rounds.
    """

    median: float
    low: float
    high: float
    rounds: int

    @property
    def iqr(self) -> float:
        """The interquartile range of a single round's ratio."""
        return self.high - self.low

    @property
    def error(self) -> float:
        """The standard error of the median, as if the rounds were independent and normally distributed."""
        # A normal distribution is 1.349 standard deviations wide between its quartiles, and its median's error is
        # sqrt(pi / 2) times the standard error of its mean.
        return math.sqrt(math.pi / 2 / self.rounds) * self.iqr / 1.349


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Compare two contenders round by round.

    Args:
        numerator: seconds by round of the first contender.
        denominator: seconds by round of the second contender; at least two rounds.
    """
    by_round = [a / b for a, b in zip(numerator, denominator, strict=True)]
    low, median, high = statistics.quantiles(by_round, n=4, method="inclusive")
    return Ratio(median, low, high, len(by_round))


@dataclass(frozen=True)
class Target:
    """The target of a metric.

    Attributes:
        relation: "<=", "<" or ">".
        limit: the value that the metric is compared with.
        note: origin of the limit, for the table.
    """

    relation: str
    limit: float
    note: str = ""

    def is_met(self, value: float) -> bool:
        """Return whether a value meets the target."""
        if self.relation == "<=":
            return value <= self.limit
        return value < self.limit if self.relation == "<" else value > self.limit


def table(metrics: Metrics, targets: Mapping[str, Target]) -> str:
    """Format the metrics as text: those with a target first, then the others.

    A metric's `*_error` follows its value. A verdict has a question mark if the limit is within two errors.
    """
    rows = [("metric", "value", "target", "")]
    for key, target in targets.items():
        verdict = "met" if target.is_met(metrics[key]) else "MISSED"
        if abs(metrics[key] - target.limit) < 2 * metrics.get(f"{key}_error", 0.0):
            verdict += "?"
        note = f" ({target.note})" if target.note else ""
        rows.append((key, _cell(metrics, key), f"{target.relation} {target.limit:.4g}{note}", verdict))
    spreads = {f"{key}_{spread}" for key in metrics for spread in ("iqr", "error")}
    rows += [(key, _cell(metrics, key), "", "") for key in metrics if key not in targets and key not in spreads]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _cell(metrics: Metrics, key: str) -> str:
    error = metrics.get(f"{key}_error")
    return f"{metrics[key]:.4g}" if error is None else f"{metrics[key]:.4f} +- {error:.4f}"


def environment() -> dict[str, Any]:
    """Describe the environment that the metrics depend on, without names of machines, users or folders."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "modified": bool(_git("status", "--porcelain")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@dataclass(frozen=True)
class Arguments:
    """The command line of a benchmark.

    Attributes:
        quick: run for at most 50 seconds on two cores.
        json: file for the result, or None.
    """

    quick: bool
    json: Path | None


def parse_arguments(name: str, description: str, argv: Sequence[str] | None = None) -> Arguments:
    """Parse a benchmark's command line. Errors end the program before anything is measured.

    Args:
        name: name of the benchmark's module.
        description: text for `--help`.
        argv: the arguments; None for the arguments of the process.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="run fewer rounds, for at most 50 s on two cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the metrics and the environment to FILE")
    parsed = parser.parse_args(argv)
    file: Path | None = parsed.json
    if file is not None:
        if file.is_dir():
            parser.error(f"--json {file} is a folder: pass the path of a file")
        if not file.parent.is_dir():
            parser.error(f"--json {file}: the folder {file.parent} does not exist; create it first")
        if not os.access(file.parent, os.W_OK):
            parser.error(f"--json {file}: the folder {file.parent} is not writable; choose a different one")
    return Arguments(parsed.quick, file)


def begin(arguments: Arguments, *, quick: S, full: S, gpu: S, seed: int) -> tuple[S, str, dict[str, Any]]:
    """Choose the settings and the device: a GPU if there is one, otherwise one thread of a CPU. Sets the seed.

    Returns:
        The settings, the device, and the environment of the metrics.
    """
    on_gpu = torch.cuda.is_available()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    keep_memory()
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    about = environment() | {"device": device, "quick": arguments.quick, "seed": seed}
    return quick if arguments.quick else gpu if on_gpu else full, "cuda" if on_gpu else "cpu", about


def publish(metrics: Metrics, goals: Mapping[str, Target], about: Mapping[str, Any], file: Path | None) -> None:
    """Print the table and the environment, and write both to a file if one is given.

    Raises:
        ValueError: a metric is not finite.
    """
    print(table(metrics, goals))
    print("\n" + "\n".join(f"{key}: {value}" for key, value in about.items()))
    if file is not None:
        write_result(file, metrics, about)


def write_result(file: Path, metrics: Metrics, about: Mapping[str, Any]) -> None:
    """Write {"figures": {key: number}, "environment": {...}} as JSON, atomically.

    Raises:
        ValueError: a metric is not finite, which JSON does not support.
    """
    text = json.dumps({"figures": metrics, "environment": dict(about)}, indent=2, allow_nan=False) + "\n"
    write_text(file, text)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine() or "unknown"


def _git(*arguments: str) -> str:
    """Return the output of git in this file's checkout; empty if there is none."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
