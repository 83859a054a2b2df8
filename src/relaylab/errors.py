"""Errors that the command line shows as one line, exit codes, and suggestions for misspelt names."""

import difflib
from collections.abc import Iterable

FAILED, WRONG_INPUT, INTERNAL, INTERRUPTED, BROKEN_PIPE = 1, 2, 70, 130, 141  # exit codes; 128 + the signal's number
MOST_NAMES = 12  # if no name is similar, the maximum number listed


class LabError(Exception):
    """Base class of errors that the command line shows without a traceback."""

    exit_code = FAILED


class InputError(LabError, ValueError):
    """Invalid input from the user, such as a path, a data set or an option."""

    exit_code = WRONG_INPUT


class NonFiniteLossError(LabError, ArithmeticError):
    """A loss or gradient is infinite or NaN. Raised before the weights are updated."""


def raise_all(problems: list[str]) -> None:
    """Raise one InputError that lists all problems, one per line; do nothing if there are none."""
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        raise InputError(f"{len(problems)} problems:\n  " + "\n  ".join(problems))


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the suffix of an error message that lists the known names most similar to an unknown one."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or (names if len(names) <= MOST_NAMES else [])
    return f"; nearest: {', '.join(near)}" if near else ""
