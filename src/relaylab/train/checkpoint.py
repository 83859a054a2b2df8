"""Checkpoint files: written atomically, verified on reading, and free of executable code.

Note [Checkpoints]
1. A checkpoint is a folder step-00012000/ with

       model.safetensors       the state dict of the `Relay`: "model." and "heads."
       optimizer.safetensors   optimizer state, such as PARAMETER/momentum_buffer; averaged weights as NAME/ema
       state.json              everything except the tensors
       SHA256SUMS              checksums of the three files, in the format of `sha256sum --check`

2. It is written under a temporary name, flushed to disk and renamed: a folder with the final name is complete. The
   next save removes the temporary folder of a killed process.
3. Checksums are verified before anything is loaded; the error states the damaged file.
4. An old checkpoint is removed only after the new one exists, and it is renamed before its files are removed.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from relaylab.errors import LabError
from relaylab.outside.reading import LARGEST, DamagedFileError, check_keys, open_regular, read_bytes, read_json
from relaylab.outside.showing import reason

log = logging.getLogger("relaylab.train")

FORMAT = "relaylab checkpoint 1"
MODEL, OPTIMIZER, STATE, SUMS = "model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"
PREFIX = "step-"
LARGEST_SUMS = 1 << 16  # bytes
LEFT_OVER = ".unfinished-"


class DamagedCheckpointError(LabError):
    """A checkpoint is incomplete or damaged, or a folder is not a checkpoint."""


class SaveError(LabError):
    """A checkpoint could not be written; the previous one is intact."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The contents of a checkpoint.

    Attributes:
        model: the state dict of the `Relay`.
        optimizer: tensors by parameter and name, such as "PARAMETER/momentum_buffer".
        state: everything else, as JSON values, including "step".
    """

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


def path_of(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return folder / f"{PREFIX}{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step in the name of a checkpoint; None for other names."""
    digits = path.name.removeprefix(PREFIX)
    return int(digits) if path.name.startswith(PREFIX) and digits.isdecimal() else None


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, creating the folder if necessary. See Note [Checkpoints].

    Raises:
        SaveError: it cannot be written.
    """
    path = path_of(folder, int(checkpoint.state["step"]))
    unfinished = folder / f"{LEFT_OVER}{path.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path_left in folder.glob(f"{LEFT_OVER}*"):
            shutil.rmtree(path_left)
        unfinished.mkdir()
        save_file(_plain(checkpoint.model), unfinished / MODEL)
        save_file(_plain(checkpoint.optimizer), unfinished / OPTIMIZER)
        text = json.dumps({"format": FORMAT, **checkpoint.state}, indent=1, allow_nan=False)
        (unfinished / STATE).write_text(text + "\n", encoding="utf-8")
        sums = "".join(f"{_sum(unfinished / name)}  {name}\n" for name in (MODEL, OPTIMIZER, STATE))
        (unfinished / SUMS).write_text(sums, encoding="ascii")
        for name in (MODEL, OPTIMIZER, STATE, SUMS):
            _to_disk(unfinished / name)
        if path.exists():  # damaged, or the run has resumed from an earlier checkpoint
            _remove(path)
        unfinished.rename(path)
        _to_disk(folder)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            shutil.rmtree(unfinished)
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        free = shutil.disk_usage(folder).free / 1e6 if folder.is_dir() else 0.0
        raise SaveError(f"cannot write the checkpoint {path}: {reason} ({free:,.0f} MB free)") from None
    return path


def read(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        DamagedCheckpointError: it is incomplete or modified, or not a checkpoint.
    """
    state = read_state(path)
    try:
        return Checkpoint(load_file(path / MODEL), load_file(path / OPTIMIZER), state)
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {reason(error)}") from None


def read_state(path: Path) -> Mapping[str, Any]:
    """Read a checkpoint's state, after verifying all of its files.

    Raises:
        DamagedCheckpointError: see `read`.
    """
    check(path)
    try:
        state = read_json(path / STATE, dict[str, Any])
        if state.get("format", FORMAT) != FORMAT:
            raise DamagedCheckpointError(f"{path} has the format {state['format']!r}, expected {FORMAT!r}")
        check_keys(state, ("format", "step"), str(path / STATE))
    except DamagedFileError as error:
        raise DamagedCheckpointError(str(error)) from None
    if state["step"] != step_of(path):
        raise DamagedCheckpointError(f"{path} contains step {state['step']!r}: it was renamed")
    return state


def check(path: Path) -> None:
    """Verify the checksums of a checkpoint.

    Raises:
        DamagedCheckpointError: a file is missing or modified; the message states which.
    """
    try:
        pairs = [line.split("  ", 1) for line in read_bytes(path / SUMS, LARGEST_SUMS).decode("ascii").splitlines()]
        sums = {name: digest for digest, name in pairs}
    except (OSError, ValueError):
        raise DamagedCheckpointError(f"{path} is not a complete checkpoint: it has no readable {SUMS}") from None
    for name in (MODEL, OPTIMIZER, STATE):
        try:
            if _sum(path / name) != sums.get(name):
                raise DamagedCheckpointError(f"{path / name} is damaged or modified: its checksum differs from {SUMS}")
        except OSError as error:
            raise DamagedCheckpointError(f"{path / name} cannot be read: {error.strerror}") from None


def newest(folder: Path) -> Iterator[Path]:
    """Iterate over the checkpoints of a run, newest first, without verifying them."""
    numbered = [(step, path) for path in folder.glob(f"{PREFIX}*") if (step := step_of(path)) is not None]
    yield from (path for _, path in sorted(numbered, reverse=True))


def newest_valid(folder: Path) -> Path | None:
    """Return the newest valid checkpoint of a run. Damaged ones are kept, and logged as warnings."""
    for path in newest(folder):
        try:
            read_state(path)
        except DamagedCheckpointError as error:
            log.warning("%s; trying the previous checkpoint", error)
            continue
        return path
    return None


def prune(folder: Path, keep: int, also: Collection[int]) -> None:
    """Remove all checkpoints except the newest `keep` and those of the steps in `also`."""
    for path in list(newest(folder))[keep:]:
        if step_of(path) not in also:
            with suppress(OSError):
                _remove(path)


def _remove(path: Path) -> None:
    unnamed = path.with_name(f"{LEFT_OVER}old-{path.name}")
    path.rename(unnamed)
    shutil.rmtree(unnamed)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sum(path: Path) -> str | None:
    """Return the hash of a file; None for a large file of a different size than its header states (a sparse file)."""
    with os.fdopen(open_regular(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > LARGEST:
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (OSError, SafetensorError, RuntimeError, MemoryError):
                return None
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """Flush a file to disk, so that a power cut cannot leave an empty file under the final name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
