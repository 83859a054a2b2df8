"""Errors that the command line shows as one line, exit codes, and the nearest names for a misspelt one."""

import difflib
from collections.abc import Iterable

FAILED, WRONG_INPUT, INTERNAL, INTERRUPTED, BROKEN_PIPE = 1, 2, 70, 130, 141  # exit codes; 128 + the signal's number
MOST_NAMES = 12  # all of them are listed where none is near


class LabError(Exception):
    """Base of all errors that the command line shows without a traceback."""

    exit_code = FAILED


class InputError(LabError, ValueError):
    """Invalid input from the user: a path, a data set, an option."""

    exit_code = WRONG_INPUT


class NonFiniteLossError(LabError, ArithmeticError):
    """A loss or gradient that is infinite or NaN, raised before the update."""


def raise_all(problems: list[str]) -> None:
    """Raise one InputError for all problems, if there are any, each on its own line."""
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        raise InputError(f"{len(problems)} problems:\n  " + "\n  ".join(problems))


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the known names closest to an unknown one, as the end of an error message."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or (names if len(names) <= MOST_NAMES else [])
    return f"; nearest: {', '.join(near)}" if near else ""
