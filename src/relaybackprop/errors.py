"""Errors that say what was expected, what was received, and what to do.

Every error of the package is a child of `RelayError` and of the built-in exception that fits it, so that
`except ValueError` keeps working in code that has never heard of this package.
"""


class RelayError(Exception):
    """Base of all errors raised by relaybackprop.

    Args:
        expected: what would have been right.
        received: what was given instead, with names and values.
        remedy: what to change.
    """

    def __init__(self, expected: str, received: str, remedy: str) -> None:
        # All three go to `args`, so that the error survives pickling between processes.
        super().__init__(expected, received, remedy)
        self.expected = expected
        self.received = received
        self.remedy = remedy

    def __str__(self) -> str:
        return f"expected {self.expected}; received {self.received}. {self.remedy}"


class PlanError(RelayError, ValueError):
    """A plan that is wrong in itself, without looking at any model."""


class ModuleNameError(RelayError, ValueError):
    """A plan that names a module which the model does not have."""


class WindowError(RelayError, ValueError):
    """A window that is upside down, or does not overlap its neighbour where it must."""


class HeadError(RelayError, ValueError):
    """Heads that do not belong to the plan's windows, or whose output does not fit the target."""


class BoundaryError(RelayError, RuntimeError):
    """A boundary module that the forward pass never ran, ran twice, or ran without recording gradients."""


class LeakError(RelayError, RuntimeError):
    """A path of the forward pass that goes around the end of a window."""


class AppliedTwiceError(RelayError, RuntimeError):
    """A plan applied to a model that already has one."""


class CompiledOverlapError(RelayError, RuntimeError):
    """Compiled code where a gradient has to pass twice, or a boundary inside compiled code."""


class DoubleBackwardError(RelayError, RuntimeError):
    """A backward pass through a relay graph with `create_graph=True`."""


class TransformError(RelayError, RuntimeError):
    """A module compiled by `torch.jit`, or a forward pass inside a `torch.func` transform."""


class EarlyReleaseError(RelayError, RuntimeError):
    """A call of `Relay.forward_backward` that cannot work, although a forward and a backward pass might."""
