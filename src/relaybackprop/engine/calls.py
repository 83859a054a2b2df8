"""Calls of a plan's modules in one forward pass, with the checks that both engines share."""

import threading
from typing import Any

import torch

from relaybackprop.engine.pytree import tensors_in
from relaybackprop.errors import BoundaryError, WindowError
from relaybackprop.plan import PRIMARY, Boundary, Plan

MISSES = 32  # forward passes in a row; layer drop of 0.5 skips one module that often once in 4 billion passes


class Calls:
    """The boundaries that one forward pass has crossed.

    Args:
        plan: its boundaries.
        missed: by boundary, the number of forward passes in a row without a call of its module; updated by `check`.

    Attributes:
        order: the boundaries crossed so far, the lowest first.
        places: by boundary, where it was crossed: another boundary if its module was skipped (Note [Skipped modules]).
        aside: whether heads or backward passes are running, which are not part of the forward pass.
    """

    def __init__(self, plan: Plan, missed: dict[Boundary, int]) -> None:
        self.plan = plan
        self.order: list[Boundary] = []
        self.places: dict[Boundary, Boundary] = {}
        self.aside = False
        self._missed = missed
        self._records = torch.is_grad_enabled()
        self._thread = threading.get_ident()

    def is_active(self) -> bool:
        """Whether a call belongs to this forward pass; another thread may be running the plain model."""
        return not self.aside and threading.get_ident() == self._thread

    def enter(self, boundary: Boundary, place: Boundary, value: Any) -> None:
        """Record that a value crosses a boundary.

        Raises:
            BoundaryError: it is the second call, no gradients are recorded, or the value has no tensors.
        """
        if boundary in self.order:
            first = f"; the first was the {self.places[boundary]}, as if layer drop skipped it"
            moved = "" if self._ran(boundary) else first
            raise BoundaryError(
                f"the {boundary} once in a forward pass",
                f"a second time{moved}",
                "Choose a boundary at a module that runs once; modules inside a window may run many times.",
            )
        if self._records and not torch.is_grad_enabled():
            raise BoundaryError(
                f"the {boundary} to run while gradients are recorded",
                "torch.no_grad() inside the model, or reentrant checkpointing",
                "Use checkpoint(..., use_reentrant=False), or move the boundary out of the part without gradients.",
            )
        self.check_has_tensors(f"the {boundary}", value)
        self.order.append(boundary)
        self.places[boundary] = place

    def heads_at(self, boundary: Boundary, place: Boundary) -> tuple[str, ...]:
        """Names of the losses whose heads read the value that crosses a boundary."""
        if place != boundary:
            return ()
        return tuple(name for name, window in self.plan.auxiliary.items() if window.upper == boundary)

    def losses(self) -> list[str]:
        """Names of the losses of this forward pass, except those whose heads' modules were skipped."""
        auxiliary = [name for name, window in self.plan.auxiliary.items() if self._ran(window.upper)]
        return [PRIMARY, *auxiliary]

    def check(self) -> None:
        """Raise unless the forward pass ran every boundary, each window's lower end before its top.

        Raises:
            BoundaryError: a module was never called and layer drop does not explain it.
            WindowError: a window whose top runs before its lower end.
        """
        for boundary in self.plan.boundaries:
            self._missed[boundary] = 0 if self._ran(boundary) else self._missed.get(boundary, 0) + 1
            if boundary not in self.order or self._missed[boundary] >= MISSES:
                often = "" if boundary not in self.order else f", {MISSES} times in a row"
                raise BoundaryError(
                    f"the forward pass to run {boundary.module!r}, a boundary of the plan",
                    f"a forward pass that never called it{often}",
                    "Name a module that the forward pass calls; containers such as nn.ModuleList are never called.",
                )
        for loss in self.losses()[1:]:
            self.check_upright(loss)

    def check_upright(self, loss: str) -> None:
        """Raise `WindowError` if the top of a loss's window ran before the window's main end."""
        window = self.plan.windows[loss]
        if not window.ends:
            return
        reached = [place for place in self.order if place in (window.ends[0], window.upper)]
        if reached[0] == window.upper:
            raise WindowError(
                f"the window of {loss!r} to have its top above its lower end",
                f"top, the {window.upper}, which the forward pass reaches before the {window.ends[0]}",
                "Swap them, or name other modules.",
            )

    def check_has_tensors(self, place: str, value: Any) -> None:
        """Raise `BoundaryError` if a value has no visible tensors: hidden ones would bypass the ends of windows."""
        if self._records and not tensors_in(value):
            raise BoundaryError(
                f"tensors in {place}, bare or in tuples, lists, mappings or dataclasses",
                f"{_kind_of(value)} without any that can be found",
                "Return the tensors in one of these, or choose another module.",
            )

    def _ran(self, boundary: Boundary | None) -> bool:
        return boundary is not None and self.places.get(boundary) == boundary


def _kind_of(value: Any) -> str:
    """The type of a value, or the types of a module's arguments."""
    match value:
        case ((*args,), {**kwargs}):
            return f"({', '.join(type(item).__name__ for item in (*args, *kwargs.values()))})"
        case _:
            return type(value).__name__
