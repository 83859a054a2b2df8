"""A4, B1 and B2: commands of this project in child processes, each with a time limit."""

import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.session import NO_TIME, ROOT, Session
from benchmarks.gpu.settings import Settings
from experiments.second import windows
from relaylab.files import write_text

LEAST_S = 20.0  # the time that a comparison takes to start
RECIPES = ROOT / "experiments" / "second"


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images of B: paths for `relaylab --data`, or None."""

    cifar: Path | None = None
    places: Path | None = None


def run_tests(session: Session, settings: Settings) -> None:
    """A4: run the tests that require a GPU, and record how many passed."""
    if session.left_s <= 0:
        session.skip("A4", ["tests"], NO_TIME)
        return
    files = [str(file) for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text()]
    command = ["pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    code, output = session.run(command, settings.tests_s)
    if code is None:
        session.skip("A4", ["tests"], f"not finished within {settings.tests_s:g} s, or the time limit was reached")
        return
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", output)}
    if not counts:
        session.skip("A4", ["tests"], f"exit code {code}: {output[-300:]}")
        return
    kinds = ("passed", "failed", "error", "skipped")
    session.measured("A4", "tests", {kind: counts.get(kind, 0) for kind in kinds})


def compare(session: Session, settings: Settings, data: Data) -> None:
    """B1 and B2: compare schemes, each at its own learning rate, and record each comparison."""
    folder = session.scratch / "recipes"
    folder.mkdir(exist_ok=True)
    for count in settings.windows:
        for shared in settings.shared:
            file = folder / f"windows-{count}-{shared}.toml"
            write_text(file, windows.recipe(count, shared))
            schemes = settings.schemes["B1"] if shared == settings.shared[0] else "relay"
            _compare(session, settings, "B1", file, data.cifar, schemes)
    for name in settings.places:
        file = RECIPES / f"{name}.toml"
        _compare(session, settings, "B2", file, data.places, settings.schemes["B2"])


def _compare(session: Session, settings: Settings, entry: str, file: Path, images: Path | None, schemes: str) -> None:
    """Run one comparison and record its table. The log contains the full output."""
    name = file.stem
    if images is None:
        option = "--cifar" if entry == "B1" else "--places"
        session.skip(entry, [name], f"no images: pass {option}")
        return
    if session.left_s < LEAST_S:
        session.skip(entry, [name], NO_TIME)
        return
    overrides = [f"optimizer.iterations={settings.iterations}", f"optimizer.evaluate_every={settings.iterations}"]
    command = ["relaylab", "compare", str(file), "--data", str(images), "--seeds", settings.seeds]
    command += ["--tune", f"optimizer.lr={settings.rates[entry]}", *settings.gains.get(entry, ())]
    command += ["--jobs", str(settings.jobs), "--images", "memory", "--precision", "bf16"]
    command += ["--out", str(session.scratch / "runs" / name), "--set", *overrides, *settings.changes.get(entry, ())]
    command += ["--schemes", schemes]
    exit_code, output = session.run(command, session.left_s)
    rows = {row: float(error) for row, error in re.findall(r"^\| ([^|]+?) \| [^|]+? \| ([\d.]+)", output, re.MULTILINE)}
    if exit_code == 0:
        session.measured(
            entry, name, {f"top-1 error of {row}": error for row, error in rows.items() if row != "guessing"}
        )
    else:
        reason = NO_TIME if exit_code is None else f"exit code {exit_code}: {output[-300:]}"
        session.skip(entry, [name], reason)
