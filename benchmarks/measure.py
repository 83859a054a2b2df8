"""What every benchmark shares: interleaved timing, counted FLOPs, the environment, the command line and the result.

Note [Timing]
1. Contenders take turns in rounds, each round in a new order, so that whatever else the machine does hits all alike.
2. A ratio is taken within each round and the median taken over the rounds: a slow spell is slow for both sides.
3. The interquartile range goes with each ratio, and with it the standard error of the median that it implies: a
   difference smaller than that is no difference.
4. Garbage is collected before and between the rounds, not within a measurement.
5. Freed memory stays with the process where the C library can be told so. How much of it goes back to the system and
   comes again, page by page, depends on the order in which buffers happen to be freed: up to 1 % of a step, seen even
   between two ways to write the same plain PyTorch.
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

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells on stderr that it starts and stops

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from relaybackprop.planning.profile import FlopCounter
from relaybackprop.planning.storages import Storages
from relaylab.files import write_text

Step = Callable[[], object]
Figures = dict[str, float]
S = TypeVar("S")


def count_flops(step: Step) -> int:
    """The floating-point operations of one call, forward and backward. Works on the meta device, where it is free."""
    with FlopCounter() as counter:
        step()
    return counter.total


def count_bytes(step: Step, owned: Iterable[torch.Tensor]) -> int:
    """The most bytes that are alive at once during one call. Works on the meta device, where it is free.

    Args:
        step: what to call.
        owned: tensors that do not count: parameters, their gradients, the batch.
    """
    alive = Storages(owned)

    class Counter(FlopCounter):
        def on_operation(self, operation: Any, result: Any) -> None:  # noqa: ARG002
            alive.add(result)

    with Counter():
        step()
    return alive.peak


def peak_bytes(step: Step) -> int:
    """The most bytes that PyTorch has allocated at once during one call, above what was there before.

    As the allocator counts: with temporary buffers and workspaces, of all devices that the step uses. On a CPU it is
    read from the profiler, so the call takes longer than usual.
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


def kept_bytes(step: Step, owned: Iterable[torch.Tensor]) -> int:
    """The most bytes that autograd keeps at once for backward passes during one call.

    Args:
        step: without checkpointing, which keeps what it keeps by other means.
        owned: parameters and whatever else is there anyway.
    """
    kept = Storages(owned)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return kept.peak


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, for good; see Note [Timing] 5.

    Returns:
        Whether the C library, glibc, agreed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    # The largest values that it takes: never trim, and map a block of its own only from 32 MiB up.
    return mallopt(trim_threshold, 2**31 - 1) == 1 and mallopt(mmap_threshold, 2**25) == 1


def event_clock() -> Callable[[], float]:
    """Return a clock of the current CUDA device, in seconds: each reading waits for the work issued before it."""
    last, seconds = torch.cuda.Event(enable_timing=True), 0.0
    last.record()

    def now() -> float:
        nonlocal last, seconds
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        seconds += last.elapsed_time(event) / 1000  # in single precision: so only from one reading to the next
        last = event
        return seconds

    return now


def clock_of(device: str) -> Callable[[], float]:
    """Return CUDA's clock by events for a GPU, else the processor's."""
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
        contenders: by name, what to call.
        rounds: at most so many; in each, every contender runs once.
        budget_s: start no further round after so long, warm-up included, but run at least `min_rounds`.
        warmup: rounds that are not counted.
        min_rounds: see `budget_s`.
        seed: of the order within the rounds.
        before: called before each measurement, not timed.
        clock: in seconds.

    Returns:
        By contender, seconds by round. All lists have the same length.
    """
    order = list(contenders)
    shuffle = random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in contenders}
    started, collects = clock(), gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(warmup + rounds):
            if number >= warmup + min_rounds and clock() - started > budget_s:
                break
            shuffle(order)
            for name in order:
                before()
                begin = clock()
                contenders[name]()
                elapsed = clock() - begin
                if number >= warmup:
                    times[name].append(elapsed)
            gc.collect(0)
    finally:
        if collects:
            gc.enable()
    return times


@dataclass(frozen=True)
class Ratio:
    """The ratio of two contenders' times over the rounds.

    Attributes:
        median: of the ratios of the rounds.
        low: their first quartile.
        high: their third quartile.
        rounds: how many there were.
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
        # sqrt(pi / 2) times its mean's.
        return math.sqrt(math.pi / 2 / self.rounds) * self.iqr / 1.349


def ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """Compare two contenders round by round.

    Args:
        over: seconds by round of the one.
        under: and of the other, which divides; at least two rounds.
    """
    by_round = [a / b for a, b in zip(over, under, strict=True)]
    low, median, high = statistics.quantiles(by_round, n=4, method="inclusive")
    return Ratio(median, low, high, len(by_round))


@dataclass(frozen=True)
class Target:
    """What a figure has to reach.

    Attributes:
        relation: "<=", "<" or ">".
        limit: what it is compared with.
        note: where the limit comes from, for the table.
    """

    relation: str
    limit: float
    note: str = ""

    def is_met(self, figure: float) -> bool:
        """Whether a figure is on the right side of the limit."""
        if self.relation == "<=":
            return figure <= self.limit
        return figure < self.limit if self.relation == "<" else figure > self.limit


def table(figures: Figures, targets: Mapping[str, Target]) -> str:
    """The figures as text: those with a target first, then what explains them.

    A figure's `*_error` goes behind it. A verdict has a question mark where the limit is within two errors.
    """
    rows = [("figure", "value", "target", "")]
    for key, target in targets.items():
        verdict = "met" if target.is_met(figures[key]) else "MISSED"
        if abs(figures[key] - target.limit) < 2 * figures.get(f"{key}_error", 0.0):
            verdict += "?"
        note = f" ({target.note})" if target.note else ""
        rows.append((key, _cell(figures, key), f"{target.relation} {target.limit:.4g}{note}", verdict))
    spreads = {f"{key}_{spread}" for key in figures for spread in ("iqr", "error")}
    rows += [(key, _cell(figures, key), "", "") for key in figures if key not in targets and key not in spreads]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _cell(figures: Figures, key: str) -> str:
    error = figures.get(f"{key}_error")
    return f"{figures[key]:.4g}" if error is None else f"{figures[key]:.4f} +- {error:.4f}"


def environment() -> dict[str, Any]:
    """What the figures depend on, without names of machines, users or folders."""
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
        quick: end within 50 seconds on two cores.
        json: where the result goes, besides the terminal.
    """

    quick: bool
    json: Path | None


def parse_arguments(name: str, description: str, argv: Sequence[str] | None = None) -> Arguments:
    """Read a benchmark's command line; whatever is wrong with it ends the program before anything is measured.

    Args:
        name: of the benchmark's module.
        description: for `--help`.
        argv: the arguments; None for the process's own.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: ends within 50 s on two cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures and the environment here")
    given = parser.parse_args(argv)
    file: Path | None = given.json
    if file is not None:
        if file.is_dir():
            parser.error(f"--json: expected a file, received the folder {file}; name a file in it")
        if not file.parent.is_dir():
            parser.error(f"--json: expected a file in an existing folder; {file.parent} is none; make it first")
        if not os.access(file.parent, os.W_OK):
            parser.error(f"--json: expected a folder that can be written to; {file.parent} cannot")
    return Arguments(given.quick, file)


def begin(arguments: Arguments, *, quick: S, full: S, gpu: S, seed: int) -> tuple[S, str, dict[str, Any]]:
    """Choose how much to run, and where: on a GPU if there is one, else on one thread of a CPU. Sets the seed.

    Returns:
        The settings, the device, and what the figures will depend on.
    """
    on_gpu = torch.cuda.is_available()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    keep_memory()
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    about = environment() | {"device": device, "quick": arguments.quick, "seed": seed}
    return quick if arguments.quick else gpu if on_gpu else full, "cuda" if on_gpu else "cpu", about


def publish(figures: Figures, goals: Mapping[str, Target], about: Mapping[str, Any], file: Path | None) -> None:
    """Print the table and what the figures depend on, and write both to a file if there is one.

    Raises:
        ValueError: as `write_result`.
    """
    print(table(figures, goals))
    print("\n" + "\n".join(f"{key}: {value}" for key, value in about.items()))
    if file is not None:
        write_result(file, figures, about)


def write_result(file: Path, figures: Figures, about: Mapping[str, Any]) -> None:
    """Write {"figures": {key: number}, "environment": {...}} as JSON. FILE is whole or untouched, whatever happens.

    Raises:
        ValueError: a figure is not finite, which JSON cannot say.
    """
    text = json.dumps({"figures": figures, "environment": dict(about)}, indent=2, allow_nan=False) + "\n"
    write_text(file, text)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine() or "unknown"


def _git(*arguments: str) -> str:
    """What git says about the checkout that this file is in; nothing if there is none."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
