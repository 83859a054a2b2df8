"""Errors meant for the person at the command line: one line, no traceback."""


class LabError(Exception):
    """Base of all errors that the command line shows as one line.

    Attributes:
        exit_code: what the command exits with.
    """

    exit_code = 1


class InputError(LabError, ValueError):
    """Something that the user gave is wrong: a path, a data set, an option."""

    exit_code = 2


class NonFiniteLossError(LabError, ArithmeticError):
    """A loss that is infinite or not a number, found before the update."""
