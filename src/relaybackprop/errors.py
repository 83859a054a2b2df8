"""Exceptions. Each message states the problem with the given value, the requirement, and the remedy.

Each class derives from `RelayError` and from the built-in exception that fits it, so that `except ValueError` works.
"""


class RelayError(Exception):
    """Base class of all errors raised by relaybackprop.

    The message has the form "problem: requirement. Remedy."

    Args:
        problem: what is wrong, with the given value; a clause.
        requirement: what is allowed, or why it is not allowed; a clause.
        remedy: what to do; one or more sentences.

    Example:
        ```python
        try:
            relay = Relay(model, plan, heads)
        except RelayError as error:
            print(error.remedy)
        ```
    """

    def __init__(self, problem: str, requirement: str, remedy: str) -> None:
        # All three are in `args`, so that the error can be pickled between processes.
        super().__init__(problem, requirement, remedy)
        self.problem = problem
        self.requirement = requirement
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}: {self.requirement}. {self.remedy}"


class PlanError(RelayError, ValueError):
    """An invalid plan or argument, independent of the model."""


class ModuleNameError(RelayError, ValueError):
    """A plan that names a module that the model does not have."""


class WindowError(RelayError, ValueError):
    """A window whose end is above its head, that does not overlap its neighbour, or that exceeds a limit."""


class HeadError(RelayError, ValueError):
    """Heads that do not belong to the plan's windows, or whose output does not fit the target."""


class BoundaryError(RelayError, RuntimeError):
    """A boundary module that the forward pass did not run, ran twice, or ran without recording gradients."""


class LeakError(RelayError, RuntimeError):
    """A path of the forward pass that bypasses the end of a window."""


class AppliedTwiceError(RelayError, RuntimeError):
    """A plan applied to a model or head that is a `Relay` or contains one."""


class CompiledOverlapError(RelayError, RuntimeError):
    """Compiled code where windows overlap, or a boundary inside compiled code."""


class DoubleBackwardError(RelayError, RuntimeError):
    """A backward pass through a relay graph with `create_graph=True`."""


class TransformError(RelayError, RuntimeError):
    """A module compiled by `torch.jit`, or a forward pass inside a `torch.func` transform."""


class EarlyReleaseError(RelayError, RuntimeError):
    """A case that `Relay.forward_backward` does not support. `Relay.forward` may support it."""


def pluralized(count: int, noun: str) -> str:
    """Return a count with its noun for a message, such as "1 head" or "2 heads"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
