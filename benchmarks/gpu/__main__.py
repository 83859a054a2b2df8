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
    """Run all entries, and print one table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measure everything on a GPU.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results.json and log.txt")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no measurement after this (default: 8)")
    parser.add_argument("--tiny", action="store_true", help="small networks on a CPU, to test the script")
    parser.add_argument("--cifar", type=Path, metavar="DATA", help="CIFAR-10, as relaylab --data takes it, for B1")
    parser.add_argument("--places", type=Path, metavar="DATA", help="MiniPlaces, as relaylab --data takes it, for B2")
    parser.add_argument("--only", nargs="+", choices=ENTRIES, metavar="ENTRY", help=f"of {', '.join(ENTRIES)}")
    given = parser.parse_args(argv)
    if not given.tiny and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU; run on a machine that has one, or with --tiny on a CPU")
    if not (math.isfinite(given.minutes) and given.minutes >= 0):
        parser.error(f"--minutes {given.minutes}: expected a finite number of at least 0")
    for option in ("cifar", "places"):
        path: Path | None = getattr(given, option)
        if path is not None and not path.exists():
            parser.error(f"--{option} {path}: there is no such file or folder")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {given.out}: {error.strerror}; give a folder that can be written to")
    if not os.access(given.out, os.W_OK):
        parser.error(f"--out {given.out}: cannot write there; give another folder")
    size = "tiny" if given.tiny else "gpu"
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory(prefix="benchmarks-gpu-") as scratch:
        device = "cpu" if given.tiny else "cuda"
        data = {name: getattr(given, name) for name in ("cifar", "places")}
        options = [f"--minutes {given.minutes:g}", *(f"--{name} DATA" for name, path in data.items() if path)]
        options += ["--tiny"] if given.tiny else []
        options += [f"--only {' '.join(given.only)}"] if given.only else []
        session = Session(
            folder=given.out.resolve(),
            scratch=Path(scratch),
            device=device,
            minutes=given.minutes,
            about=describe(device, size, f"python -m benchmarks.gpu --out DIR {' '.join(options)}"),
        )
        run(session, size, Data(**data), given.only or ENTRIES)
    print_table(session)


def run(session: Session, size: str, data: Data, only: Sequence[str] = ENTRIES) -> None:
    """Run entries in order."""
    settings = SIZES[size]
    works = (
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
        for entry, work in zip(ENTRIES, works, strict=True):
            if entry in only:
                work()
    finally:
        torch.set_num_threads(threads)


def describe(device: str, size: str, command: str) -> dict[str, Any]:
    """Return hardware, versions, commit and command, without the paths of this machine."""
    found: dict[str, Any] = {**environment(), "seed": SEED, "size": size, "device": "cpu", "command": command}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "device_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def small_images(folder: Path) -> Data:
    """Write images of five classes, for recipes at the tiny scale."""
    rng = np.random.default_rng(SEED)
    for split, count in (("train", 12), ("val", 4)):
        for label in range(5):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = rng.normal((40 * label, 200 - 30 * label, 90), 25, (40, 48, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return Data(cifar=folder, places=folder)


def goal(result: Result) -> tuple[float, Target] | None:
    """Return the figure of a result that has a goal, and the goal."""
    figures, contender = result.figures, result.name.partition("/")[2]
    if result.entry == "A1" and contender == "relay" and "time_over_multi_loss" in figures:
        over = figures["time_over_multi_loss"] / figures["flops_over_multi_loss"]
        return over, Target("<=", RELAY_OVER_FLOPS, "time / multi-loss, over FLOPs / multi-loss")
    if result.entry == "A1" and contender == "early_release" and "time_over_multi_loss" in figures:
        return figures["time_over_multi_loss"], Target("<=", EARLY_OVER_MULTI_LOSS, "time / multi-loss")
    if result.entry == "A3" and "loop_over_bare" in figures:
        return figures["loop_over_bare"], Target(">", LOOP, "images/s / bare loop's")
    return None


def verdict(result: Result) -> str:
    """Return a sentence about the goal of a result; empty if it has none."""
    found = goal(result)
    if found is None:
        return ""
    figure, target = found
    met = "met" if target.is_met(figure) else "MISSED"
    return f"{met}: {target.note} = {figure:.3f}, goal {target.relation} {target.limit:g}"


def print_table(session: Session) -> None:
    """Print all results, the goals, and what they depend on."""
    rows: list[tuple[str, ...]] = []
    for result in session.results:
        figures = [f"{result.figures[key]:.4g}" if key in result.figures else "" for key in SHOWN]
        others = [f"{key} {value:.4g}" for key, value in result.figures.items() if key not in SHOWN]
        notes = [result.reason, verdict(result), *([] if result.entry == "A1" else others)]
        rows.append((result.entry, result.name, result.status, *figures, "; ".join(filter(None, notes))))
    print("\n" + "\n".join(markdown_lines(Table("", ("entry", "name", "status", *SHOWN, "note"), tuple(rows)))))
    print("\n" + "\n".join(f"{key}: {value}" for key, value in session.about.items()))
    print(f"\nResults: {session.folder / FILE}")


if __name__ == "__main__":
    main()
