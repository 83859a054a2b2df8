"""Exceptions: each says what was expected, what was received, and what to do.

Each derives from `RelayError` and from the built-in exception that fits it, so that `except ValueError` catches it.
"""


class RelayError(Exception):
    """Base class of all errors raised by relaybackprop.

    Args:
        expected: the valid values.
        received: the given value, with its name.
        remedy: the change to make.
    """

    def __init__(self, expected: str, received: str, remedy: str) -> None:
        # All three are in `args`, so that the error can be pickled between processes.
        super().__init__(expected, received, remedy)
        self.expected = expected
        self.received = received
        self.remedy = remedy

    def __str__(self) -> str:
        return f"expected {self.expected}; received {self.received}. {self.remedy}"


class PlanError(RelayError, ValueError):
    """An invalid plan or argument, whatever the model."""


class ModuleNameError(RelayError, ValueError):
    """A plan that names a module that the model does not have."""


class WindowError(RelayError, ValueError):
    """A window whose end is above its head, or that does not overlap its neighbour where it must."""


class HeadError(RelayError, ValueError):
    """Heads that do not belong to the plan's windows, or whose output does not fit the target."""


class BoundaryError(RelayError, RuntimeError):
    """A boundary module that the forward pass did not run, ran twice, or ran without recording gradients."""


class LeakError(RelayError, RuntimeError):
    """A path of the forward pass that bypasses the end of a window."""


class AppliedTwiceError(RelayError, RuntimeError):
    """A plan applied to a model that already has one."""


class CompiledOverlapError(RelayError, RuntimeError):
    """Compiled code that gradients must pass twice, or a boundary inside compiled code."""


class DoubleBackwardError(RelayError, RuntimeError):
    """A backward pass through a relay graph with `create_graph=True`."""


class TransformError(RelayError, RuntimeError):
    """A module compiled by `torch.jit`, or a forward pass inside a `torch.func` transform."""


class EarlyReleaseError(RelayError, RuntimeError):
    """A case that `Relay.forward_backward` does not support, although `Relay.forward` may."""
