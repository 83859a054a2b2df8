"""A mutation harness: damaged and hostile files of every kind that the lab reads, each read in a process of its own.

A case is a kind of input and a seed: one file of the input is changed, and the input is read as a command reads it.
Allowed outcomes are what the undamaged input gives, or an error of ours, within limits on time and memory.
"""

import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS, MEMORY = 5, 1 << 30  # of the processor, and bytes beyond what the process has before
RIGHT, OURS, WRONG, TRACEBACK, OUT_OF_MEMORY = 0, 10, 11, 12, 13  # exit codes of a case's process
NAMES = {RIGHT: "right", OURS: "ours", WRONG: "wrong", TRACEBACK: "traceback", OUT_OF_MEMORY: "memory"}
ALLOWED = ("right", "ours")
PATIENCE = 20  # seconds by the clock for each of the processor's, on a busy machine


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        folder: with the undamaged input.
        files: of the folder, those that are changed.
        read: reads a folder's input and returns something to compare; None of what cannot be compared.
        has_oracle: whether a change that is not noticed must not change the result.
    """

    folder: Path
    files: Sequence[str]
    read: Callable[[Path], Any]
    has_oracle: bool = False


@dataclass(frozen=True)
class Case:
    """A case and its outcome."""

    kind: str
    seed: int
    change: str
    outcome: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} {self.seed} ({self.change}): {self.outcome}: {self.detail}"


def run(kinds: dict[str, Kind], count: int, seed: int, scratch: Path) -> list[Case]:
    """Run cases, the kinds in turn; return them with their outcomes."""
    expected = {name: kind.read(kind.folder) for name, kind in kinds.items()}
    names = list(kinds)
    return [one(names[n % len(names)], kinds, expected, seed + n, scratch) for n in range(count)]


def one(name: str, kinds: dict[str, Kind], expected: dict[str, Any], seed: int, scratch: Path) -> Case:
    """Run one case."""
    kind, choice = kinds[name], random.Random(f"{name} {seed}")
    folder = scratch / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kind.folder, folder)
    file = choice.choice(kind.files)
    change = f"{file}: {mutate(folder / file, choice)}"
    outcome, detail = in_child(lambda: judge(kind, folder, expected[name]), scratch / "told")
    return Case(name, seed, change, outcome, detail)


def table(cases: Sequence[Case]) -> str:
    """Count the outcomes of each kind."""
    counts = Counter((case.kind, case.outcome) for case in cases)
    outcomes = [*NAMES.values(), "hang", "crash"]
    lines = [f"{'':12}" + "".join(f"{outcome:>11}" for outcome in outcomes)]
    for kind in dict.fromkeys(case.kind for case in cases):
        lines.append(f"{kind:12}" + "".join(f"{counts[kind, outcome]:11}" for outcome in outcomes))
    return "\n".join(lines)


def judge(kind: Kind, folder: Path, expected: Any) -> tuple[int, str]:
    """Read the input; return the outcome and its reason."""
    from relaylab.errors import INTERNAL
    from relaylab.outside.translating import line_of

    try:
        found = kind.read(folder)
    except MemoryError:
        return OUT_OF_MEMORY, traceback.format_exc()[-500:]
    except Exception as error:
        line, code = line_of(error)
        if code == INTERNAL:
            return TRACEBACK, traceback.format_exc()[-1500:]
        if line.startswith("not enough memory"):
            return OUT_OF_MEMORY, line
        if len(line) > 5000:
            return WRONG, f"an error of {len(line)} characters: {line[:200]}"
        return OURS, line
    if kind.has_oracle and found != expected:
        return WRONG, f"{str(found)[:300]} in place of {str(expected)[:300]}"
    return RIGHT, ""


def in_child(call: Callable[[], tuple[int, str]], told: Path) -> tuple[str, str]:
    """Judge in a child process with limits; return the outcome and its reason."""
    told.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = TRACEBACK
        try:
            _limit()
            code, text = call()
            told.write_text(text, errors="backslashreplace")
        finally:
            os._exit(code)
    deadline = time.monotonic() + SECONDS * PATIENCE
    status = None
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.005)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "hang", "waits"
    assert status is not None
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return ("hang", "computes") if number in (signal.SIGXCPU, signal.SIGKILL) else ("crash", f"signal {number}")
    return NAMES[os.WEXITSTATUS(status)], told.read_text() if told.exists() else ""


def _limit() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# What is changed. A mutation gets content and a source of random choices, and returns other content.

EXTREMES = (
    None, True, False, 0, -1, 1.5, -0.0, 2**31, 2**63, 2**64, -(2**63), 10**400, float("nan"), float("inf"), 1e308, "",
    "x", "\x1b[31m", "\ud800", "$x^", "../../etc", "a" * 5000, [], {}, [[]], [None], {"": 0}, [0] * 5000,
)  # fmt: skip


def flip(data: bytearray, choice: random.Random) -> bytes:
    """Flip bits."""
    for _ in range(choice.choice((1, 1, 1, 3, 50))):
        data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
    return data


def fill(data: bytearray, choice: random.Random) -> bytes:
    """Overwrite some bytes with the same one."""
    start, size = choice.randrange(len(data)), choice.choice((1, 4, 8, 64))
    end = min(len(data), start + size)
    data[start:end] = bytes([choice.choice((0, 1, 0x7F, 0x80, 0xFF))]) * (end - start)
    return data


def cut(data: bytearray, choice: random.Random) -> bytes:
    """Cut the end off."""
    return data[: choice.choice((0, 1, 8, choice.randrange(len(data)), len(data) - 1))]


def remove(data: bytearray, choice: random.Random) -> bytes:
    """Remove bytes within."""
    start = choice.randrange(len(data))
    del data[start : start + choice.choice((1, 7, 512, 4096))]
    return data


def repeat(data: bytearray, choice: random.Random) -> bytes:
    """Repeat a part, perhaps often."""
    start = choice.randrange(len(data))
    part = data[start : start + choice.choice((1, 16, 512))]
    return data[:start] + part * choice.choice((2, 100, 10_000)) + data[start:]


def insert(data: bytearray, choice: random.Random) -> bytes:
    """Insert random bytes."""
    start = choice.randrange(len(data))
    return data[:start] + choice.randbytes(choice.choice((1, 100))) + data[start:]


def numbers(data: bytearray, choice: random.Random) -> bytes:
    """Replace a number in a text."""
    places = [n for n, byte in enumerate(data[:100_000]) if 48 <= byte < 58]
    if not places:
        return flip(data, choice)
    start = choice.choice(places)
    values = (b"-1", b"0", b"99999999999999999999", b"9" * 5000, b"NaN", b"1e999", b"true", b"x", b"", b"\xff", b"0x1f")
    return data[:start] + choice.choice(values) + data[start + 1 :]


def spaces(data: bytearray, choice: random.Random) -> bytes:
    """Insert a long run of one character into a text."""
    start = choice.randrange(len(data))
    return data[:start] + choice.choice((b" ", b"\t", b"a", b"[", b"{", b",", b"9", b"\0")) * 60_000 + data[start:]


def tree(data: bytearray, choice: random.Random) -> bytes:
    """Change JSON text, that of a file or of a header of safetensors: values, names, nesting."""
    start = 8 if data[8:9] == b"{" and data[:1] != b"{" else 0
    size = struct.unpack("<Q", data[:8])[0] if start else len(data)
    lines = bytes(data[start : start + size]).split(b"\n")
    whole = start or len(lines) < 2 or lines[0] in (b"{", b"[")  # else a line for each value
    place = choice.randrange(len(lines)) if not whole else 0
    try:
        value = json.loads(b"\n".join(lines) if whole else lines[place])
    except ValueError:
        return numbers(data, choice)
    text = _changed(value, choice).encode(errors="surrogatepass")
    text = text if whole else b"\n".join([*lines[:place], text, *lines[place + 1 :]])
    return (struct.pack("<Q", len(text)) if start else b"") + text + data[start + size :]


def _changed(value: Any, choice: random.Random) -> str:
    nodes = list(_nodes(value))
    if not nodes:
        return json.dumps(choice.choice(EXTREMES))
    parent, key = choice.choice(nodes)
    inner = parent[key]
    if isinstance(inner, str) and inner[:1] in "{[" and choice.random() < 0.9:  # JSON in JSON
        try:
            parent[key] = _changed(json.loads(inner), choice)
            return json.dumps(value)
        except ValueError:
            pass
    match choice.randrange(5):
        case 0:
            del parent[key]
        case 1:
            deep = "[" * 5000 + "]" * 5000
            parent[key] = "HERE"
            return json.dumps(value).replace('"HERE"', deep, 1)
        case 2 if isinstance(parent, dict):
            text = json.dumps({key: inner})[1:-1]
            return json.dumps(value).replace(text, f"{text}, {text}", 1)
        case 2:
            parent.append(inner)
        case _:
            parent[key] = choice.choice(EXTREMES)
    return json.dumps(value)


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(pairs):
        yield value, key
        yield from _nodes(part)


MUTATIONS = (flip, flip, fill, cut, remove, repeat, insert, numbers, spaces, tree, tree, tree)


def mutate(path: Path, choice: random.Random) -> str:
    """Change a file in place; return a word for the change."""
    if choice.random() < 0.06:
        path.unlink()
        what = choice.choice(("absent", "folder", "fifo", "empty", "sparse", "dangling"))
        match what:
            case "folder":
                path.mkdir()
            case "fifo":
                os.mkfifo(path)
            case "empty":
                path.touch()
            case "sparse":
                with path.open("wb") as file:
                    file.truncate(1 << 40)
            case "dangling":
                path.symlink_to(path.parent / "nowhere")
            case _:
                pass
        return what
    data = path.read_bytes()
    changes = [choice.choice(MUTATIONS) for _ in range(choice.choice((1, 1, 1, 2)))]
    for change in changes:
        data = change(bytearray(data or b"\0"), choice)
    path.write_bytes(data)
    return ", ".join(change.__name__ for change in changes)
