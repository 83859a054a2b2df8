"""The command line of `python -m benchmarks.gpu`; see `benchmarks.gpu`."""

import argparse
import math
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu import commands, compiled, largest, steps, training
from benchmarks.gpu.commands import Data
from benchmarks.gpu.session import FILE, Result, Session
from benchmarks.gpu.settings import SIZES
from benchmarks.measure import Target, environment
from relaylab.tables import Table, markdown_lines

SEED = 20160916
ENTRIES = ("A1", "A2", "A3", "A1c", "A4", "B")
PACKAGES = ("torch", "torchvision", "triton", "lightning-fabric", "numpy")
SHOWN = (
    "images",
    "batch",
    "ms",
    "images_per_s",
    "peak_mb",
    *(f"{a}_over_multi_loss" for a in ("time", "flops", "peak")),
)
RELAY_OVER_FLOPS, EARLY_OVER_MULTI_LOSS, LOOP = 1.03, 1.12, 0.97


def main(argv: Sequence[str] | None = None) -> None:
    """Run all entries and print one table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Run all GPU measurements.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results.json and log.txt")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no measurement after this time (default: 8)")
    parser.add_argument("--tiny", action="store_true", help="small networks on a CPU, to test the script")
    parser.add_argument("--cifar", type=Path, metavar="DATA", help="CIFAR-10, as relaylab --data takes it, for B1")
    parser.add_argument("--places", type=Path, metavar="DATA", help="MiniPlaces, as relaylab --data takes it, for B2")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=ENTRIES,
        metavar="ENTRY",
        help=f"entries to run, of {', '.join(ENTRIES)} (default: all)",
    )
    parsed = parser.parse_args(argv)
    if not parsed.tiny and not torch.cuda.is_available():
        parser.error("PyTorch does not find a GPU; run on a machine with a GPU, or pass --tiny")
    if not (math.isfinite(parsed.minutes) and parsed.minutes >= 0):
        parser.error(f"--minutes {parsed.minutes}: expected a finite number of at least 0")
    for option in ("cifar", "places"):
        path: Path | None = getattr(parsed, option)
        if path is not None and not path.exists():
            parser.error(f"--{option} {path}: the file or folder does not exist")
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {parsed.out}: {error.strerror}; choose a writable folder")
    if not os.access(parsed.out, os.W_OK):
        parser.error(f"--out {parsed.out}: not writable; choose a different folder")
    size = "tiny" if parsed.tiny else "gpu"
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory(prefix="benchmarks-gpu-") as scratch:
        device = "cpu" if parsed.tiny else "cuda"
        data = {name: getattr(parsed, name) for name in ("cifar", "places")}
        options = [f"--minutes {parsed.minutes:g}", *(f"--{name} DATA" for name, path in data.items() if path)]
        options += ["--tiny"] if parsed.tiny else []
        options += [f"--only {' '.join(parsed.only)}"] if parsed.only else []
        session = Session(
            folder=parsed.out.resolve(),
            scratch=Path(scratch),
            device=device,
            minutes=parsed.minutes,
            about=describe(device, size, f"python -m benchmarks.gpu --out DIR {' '.join(options)}"),
        )
        run(session, size, Data(**data), parsed.only or ENTRIES)
    print_table(session)


def run(session: Session, size: str, data: Data, only: Sequence[str] = ENTRIES) -> None:
    """Run entries in order."""
    settings = SIZES[size]
    entry_functions = (
        lambda: steps.measure(session, settings),
        lambda: largest.measure(session, settings),
        lambda: training.measure(session, settings),
        lambda: compiled.measure(session, settings, size),
        lambda: commands.run_tests(session, settings),
        lambda: commands.compare(session, settings, data),
    )
    threads = torch.get_num_threads()
    if session.device == "cpu":
        torch.set_num_threads(1)
        if data == Data():
            data = small_images(session.scratch / "images")
    try:
        for entry, function in zip(ENTRIES, entry_functions, strict=True):
            if entry in only:
                function()
    finally:
        torch.set_num_threads(threads)


def describe(device: str, size: str, command: str) -> dict[str, Any]:
    """Return hardware, versions, commit and command, without paths."""
    about: dict[str, Any] = {**environment(), "seed": SEED, "size": size, "device": "cpu", "command": command}
    for package in PACKAGES:
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            about[package] = "absent"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "device": properties.name,
            "device_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return about


def small_images(folder: Path) -> Data:
    """Write images of five classes, for recipes at the tiny scale."""
    rng = np.random.default_rng(SEED)
    for split, count in (("train", 12), ("val", 4)):
        for label in range(5):
            class_folder = folder / split / f"class{label}"
            class_folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.normal((40 * label, 200 - 30 * label, 90), 25, (40, 48, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(class_folder / f"{index}.png")
    return Data(cifar=folder, places=folder)


def goal(result: Result) -> tuple[float, Target] | None:
    """Return the metric of a result that has a target, and the target; None for other results."""
    metrics, contender = result.metrics, result.name.partition("/")[2]
    if result.entry == "A1" and contender == "relay" and "time_over_multi_loss" in metrics:
        value = metrics["time_over_multi_loss"] / metrics["flops_over_multi_loss"]
        return value, Target("<=", RELAY_OVER_FLOPS, "time / multi-loss, over FLOPs / multi-loss")
    if result.entry == "A1" and contender == "early_release" and "time_over_multi_loss" in metrics:
        return metrics["time_over_multi_loss"], Target("<=", EARLY_OVER_MULTI_LOSS, "time / multi-loss")
    if result.entry == "A3" and "loop_over_bare" in metrics:
        return metrics["loop_over_bare"], Target(">", LOOP, "images/s / bare loop's")
    return None


def verdict(result: Result) -> str:
    """Return a sentence about the target of a result; empty if it has none."""
    reached = goal(result)
    if reached is None:
        return ""
    figure, target = reached
    met = "met" if target.is_met(figure) else "MISSED"
    return f"{met}: {target.note} = {figure:.3f}, goal {target.relation} {target.limit:g}"


def print_table(session: Session) -> None:
    """Print all results, their targets, and the environment."""
    rows: list[tuple[str, ...]] = []
    for result in session.results:
        metrics = [f"{result.metrics[key]:.4g}" if key in result.metrics else "" for key in SHOWN]
        others = [f"{key} {value:.4g}" for key, value in result.metrics.items() if key not in SHOWN]
        notes = [result.reason, verdict(result), *([] if result.entry == "A1" else others)]
        rows.append((result.entry, result.name, result.status, *metrics, "; ".join(filter(None, notes))))
    print("\n" + "\n".join(markdown_lines(Table("", ("entry", "name", "status", *SHOWN, "note"), tuple(rows)))))
    print("\n" + "\n".join(f"{key}: {value}" for key, value in session.about.items()))
    print(f"\nResults: {session.folder / FILE}")


if __name__ == "__main__":
    main()
