"""Calls of a plan's modules in one forward pass, and the checks that both engines share."""

import threading
from typing import Any

import torch

from relaybackprop.engine.pytree import tensors_in
from relaybackprop.errors import BoundaryError, WindowError
from relaybackprop.plan import PRIMARY, Boundary, Plan

MAX_MISSES = 32  # forward passes in a row. Layer drop of 0.5 skips a module 32 times in a row once in 4 billion passes.


class Calls:
    """The boundaries that one forward pass has crossed.

    Args:
        plan: the plan whose boundaries to record.
        missed: for each boundary, the number of forward passes in a row that did not call its module. `check` updates
            it.

    Attributes:
        order: the boundaries crossed so far, from lowest to highest.
        places: for each boundary crossed, the boundary where this happened: a later one if the module was skipped
            (Note [Skipped modules] in `relaybackprop.engine.hooks`).
        suspended: whether heads or backward passes are running, whose calls are not part of the forward pass.
    """

    def __init__(self, plan: Plan, missed: dict[Boundary, int]) -> None:
        self.plan = plan
        self.order: list[Boundary] = []
        self.places: dict[Boundary, Boundary] = {}
        self.suspended = False
        self._missed = missed
        self._records = torch.is_grad_enabled()
        self._thread = threading.get_ident()

    def is_active(self) -> bool:
        """Return whether a call belongs to this forward pass. Another thread may be running the plain model."""
        return not self.suspended and threading.get_ident() == self._thread

    def enter(self, boundary: Boundary, place: Boundary, value: Any) -> None:
        """Record that a value crosses a boundary.

        Raises:
            BoundaryError: it is the second call, gradients are not recorded, or the value has no tensors.
        """
        if boundary in self.order:
            first_place = f" (first at the {self.places[boundary]}, where layer drop seemed to have skipped the module)"
            skipped = "" if self._ran(boundary) else first_place
            raise BoundaryError(
                f"the forward pass reaches the {boundary} a second time{skipped}",
                "a boundary module must run once per forward pass",
                "Choose a boundary at a module that runs once; modules inside a window may run many times.",
            )
        if self._records and not torch.is_grad_enabled():
            raise BoundaryError(
                f"gradients are not recorded at the {boundary}, inside torch.no_grad() or a reentrant checkpoint",
                "the gradient of a loss must start or stop there",
                "Use checkpoint(..., use_reentrant=False), or move the boundary out of the part without gradients.",
            )
        self.check_has_tensors(f"the {boundary}", value)
        self.order.append(boundary)
        self.places[boundary] = place

    def heads_at(self, boundary: Boundary, place: Boundary) -> tuple[str, ...]:
        """Return the names of the losses whose heads read the value that crosses a boundary."""
        if place != boundary:
            return ()
        return tuple(name for name, window in self.plan.auxiliary.items() if window.upper == boundary)

    def losses(self) -> list[str]:
        """Return the names of this forward pass's losses, without those whose top module was skipped."""
        auxiliary = [name for name, window in self.plan.auxiliary.items() if self._ran(window.upper)]
        return [PRIMARY, *auxiliary]

    def check(self) -> None:
        """Check that the forward pass crossed every boundary, each window's lower end before its top.

        Raises:
            BoundaryError: a module was not called, and layer drop does not explain it.
            WindowError: the top of a window ran before its lower end.
        """
        for boundary in self.plan.boundaries:
            self._missed[boundary] = 0 if self._ran(boundary) else self._missed.get(boundary, 0) + 1
            if boundary not in self.order or self._missed[boundary] >= MAX_MISSES:
                repeated = "" if boundary not in self.order else f", {MAX_MISSES} times in a row"
                raise BoundaryError(
                    f"the forward pass never called {boundary.module!r}{repeated}",
                    "it is a boundary of the plan, which must run in each training forward pass",
                    "Name a module that the forward pass calls; containers such as nn.ModuleList are never called.",
                )
        for loss in self.losses()[1:]:
            self.check_order(loss)

    def check_order(self, loss: str) -> None:
        """Raise `WindowError` if the top of a loss's window ran before the window's first end."""
        window = self.plan.windows[loss]
        if not window.ends:
            return
        reached = [place for place in self.order if place in (window.ends[0], window.upper)]
        if reached[0] == window.upper:
            raise WindowError(
                f"the window of {loss!r} is inverted",
                f"its top must be above its lower end, but the forward pass reaches the {window.upper} before the "
                f"{window.ends[0]}",
                "Swap them, or choose different modules.",
            )

    def check_has_tensors(self, place: str, value: Any) -> None:
        """Raise `BoundaryError` if a value has no visible tensors. Hidden ones would bypass the ends of windows."""
        if self._records and not tensors_in(value):
            raise BoundaryError(
                f"no tensor found in {place}, {_type_names(value)}",
                "tensors must be bare or in tuples, lists, mappings or dataclasses",
                "Return the tensors in one of these, or choose a different module.",
            )

    def _ran(self, boundary: Boundary | None) -> bool:
        return boundary is not None and self.places.get(boundary) == boundary


def _type_names(value: Any) -> str:
    """Name the type of a value, or the types of a module's arguments."""
    match value:
        case ((*args,), {**kwargs}):
            return f"({', '.join(type(item).__name__ for item in (*args, *kwargs.values()))})"
        case _:
            return type(value).__name__
