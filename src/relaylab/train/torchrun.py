"""State shared between torchrun, its worker processes and the launching command.

This module must not import torch.
"""

import os
from pathlib import Path

from relaylab.errors import InputError, LabError

FAILURE = "RELAYLAB_FAILURE"  # environment variable: file for the exit code of the first failed process


def is_launched() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def restart_count() -> int:
    """Return the number of times torchrun has restarted the processes."""
    return environment_number("TORCHELASTIC_RESTART_COUNT", 0)


def environment_number(name: str, default: int) -> int:
    """Return the value of an environment variable that holds a non-negative integer.

    Raises:
        InputError: it has a different value.
    """
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InputError(f"the environment variable {name} is {text!r}: expected an integer, as set by torchrun")
    return int(text)


def launch_id() -> str:
    """Return an identifier of the torchrun launch that survives restarts; empty without torchrun."""
    return f"{os.environ['TORCHELASTIC_RUN_ID']}-{os.getppid()}" if is_launched() else ""


def note_failure(error: LabError) -> bool:
    """Record the exit code of an error that would repeat after a restart.

    Returns:
        Whether this process is the first to record one, and should report the error.
    """
    try:
        if FAILURE in os.environ:
            with Path(os.environ[FAILURE]).open("x", encoding="ascii") as new:
                new.write(str(error.exit_code))
    except FileExistsError:
        return False
    return True


def noted_failure() -> int | None:
    """Return the exit code that a failed process has recorded, if any."""
    file = os.environ.get(FAILURE)
    return int(Path(file).read_text(encoding="ascii")) if file is not None and Path(file).exists() else None
