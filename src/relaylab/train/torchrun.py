"""What torchrun tells its processes, and what they tell the command that has called it. No torch in here."""

import os
from pathlib import Path

from relaylab.errors import LabError

FAILURE = "RELAYLAB_FAILURE"  # in the environment: the file in which a process says that it has failed


def is_launched() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def restart_count() -> int:
    """How often torchrun has started these processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def launch_id() -> str:
    """A name for what torchrun has launched, the same after a restart; empty without torchrun."""
    return f"{os.environ['TORCHELASTIC_RUN_ID']}-{os.getppid()}" if is_launched() else ""


def note_failure(error: LabError) -> bool:
    """Say that this process has failed, with an error that would come again.

    Returns:
        Whether it is the first to say so, and should tell people too.
    """
    file = os.environ.get(FAILURE)
    if file is None:
        return True
    try:
        with Path(file).open("x", encoding="ascii") as new:
            new.write(str(error.exit_code))
    except FileExistsError:
        return False
    return True


def noted_failure() -> int | None:
    """The exit code of a process that has failed, if one has said so."""
    file = os.environ.get(FAILURE)
    return int(Path(file).read_text(encoding="ascii")) if file is not None and Path(file).exists() else None
