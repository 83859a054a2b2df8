"""Plans: frozen values that declare how far down each loss reaches. They are validated on construction.

A *window* is the range of consecutive layers that one loss trains. The paper's Figure 2 and Table 2 are such plans.
Other training schemes are transformations of one plan:

    plan                 relay: bounded windows that overlap
    plan.multi_loss()    every window reaches the first layer
    plan.isolated()      windows that do not overlap (greedy, local learning)
    plan.standard()      no auxiliary losses
"""

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, cast

from torch import nn

from relaybackprop.errors import PlanError, WindowError

PRIMARY = "primary"
PRIMARY_WEIGHT = 1.0
AUXILIARY_WEIGHT = 0.3  # as in the paper, sections 5.1 and 5.2


@dataclass(frozen=True)
class Boundary:
    """A place in the forward pass: all tensors of one module's input or output.

    Args:
        side: "input" or "output".
        module: name of the module, as in `model.named_modules()`.

    Example:
        ```python
        str(Boundary("output", "layer3.3"))  # 'output of layer3.3'
        ```
    """

    side: Literal["input", "output"]
    module: str

    def __str__(self) -> str:
        return f"{self.side} of {self.module}"


@dataclass(frozen=True, kw_only=True)
class Window:
    """The layers that one loss trains (paper, section 4).

    Without `bottom` and `after` the window reaches the first layer.

    Args:
        top: name of the module whose output the loss's head reads; None for the primary loss.
        bottom: name of the lowest module of the window. The loss's gradient stops at its input.
        after: name of the module just below the window. The gradient stops at its output. A window with side inputs,
            such as the skip connections of a U-Net, has several names: the module below the window first, then the
            sources of the side inputs.
        weight: factor of the loss, positive and finite. Default: 1.0 for the primary loss, 0.3 for an auxiliary one.

    Raises:
        PlanError: `bottom` and `after` are both given, a name is not a string or is empty, `after` equals `top`, or
            the weight is invalid.

    Example:
        ```python
        window = Window(top="layer3.3", after="layer2")
        window.ends  # (Boundary(side='output', module='layer2'),)
        ```
    """

    top: str | None = None
    bottom: str | None = None
    after: str | tuple[str, ...] | None = None
    weight: float | None = None
    above: InitVar[Any] = None  # the name of `after` before 0.2

    def __post_init__(self, above: Any) -> None:
        if above is not None:
            raise PlanError(
                f"above={above!r} is not supported since 0.2", "`after` replaces it", "Rename the argument."
            )
        if isinstance(self.after, (tuple, list)):  # one form, so that equal windows compare equal
            after = tuple(self.after)
            object.__setattr__(self, "after", after[0] if len(after) == 1 else after)
        for role, names in (("top", self.top), ("bottom", self.bottom), ("after", self.after)):
            for name in names if role == "after" and isinstance(names, tuple) and names else (names,):
                if name is not None and (not isinstance(name, str) or not name):
                    raise PlanError(
                        f"{role}={names!r} is not the name of a module",
                        f"{role} must be a name that model.named_modules() lists, or None",
                        "Give a name such as 'layer3.0'.",
                    )
        if self.bottom is not None and self.after is not None:
            raise PlanError(
                f"both bottom={self.bottom!r} and after={self.after!r} are given",
                "a window has one lower end",
                "Keep `bottom` (ends at its input) or `after` (ends at its output), and drop the other.",
            )
        if self.upper is not None and self.upper in self.ends:
            raise PlanError(
                f"after={self.after!r} is also the top",
                "a window must have at least one layer",
                "Start the window after a lower module.",
            )
        if self.weight is not None and not _is_positive(self.weight):
            raise PlanError(
                f"weight={self.weight!r} is invalid",
                "a weight must be positive and finite",
                "To drop a loss, leave its window out of the plan.",
            )

    @property
    def upper(self) -> Boundary | None:
        """The boundary where the loss's head attaches; None for the primary loss."""
        return None if self.top is None else Boundary("output", self.top)

    @property
    def ends(self) -> tuple[Boundary, ...]:
        """The boundaries where the gradient stops, the main one first; empty if it reaches the first layer."""
        if self.bottom is not None:
            return (Boundary("input", self.bottom),)
        names = () if self.after is None else (self.after,) if isinstance(self.after, str) else self.after
        return tuple(Boundary("output", name) for name in names)


@dataclass(frozen=True)
class Plan:
    """The window of each loss.

    Args:
        primary: window of the loss on the model's output. Default: all layers, standard backpropagation.
        auxiliary: windows of the losses on inner heads, by name of the loss, the lowest head first. A name must not
            contain a dot, be "primary", or be an attribute of `nn.ModuleDict`.

    Raises:
        PlanError: the primary window has a `top`, an auxiliary window does not, or the name of a head is invalid.

    Example:
        ```python
        plan = Plan(primary=Window(bottom="layer3.0"), auxiliary={"aux": Window(top="layer3.3")})
        print(plan)
        # loss     weight  from                down to
        # primary  1       the model's output  input of layer3.0
        # aux      0.3     output of layer3.3  the first layer
        ```
    """

    primary: Window = Window()
    auxiliary: Mapping[str, Window] = field(default_factory=dict[str, Window])

    def __post_init__(self) -> None:
        _check_is_window(PRIMARY, self.primary)
        if self.primary.top is not None:
            raise PlanError(
                f"the primary window has top={self.primary.top!r}",
                "it must not have a `top`, since the primary loss is on the model's output",
                "Leave `top` out, or make it an auxiliary loss.",
            )
        if not isinstance(self.auxiliary, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(
                f"auxiliary is a {type(self.auxiliary).__name__}",
                "it must be a mapping from names to windows",
                "Write auxiliary={'aux': Window(top=...)}.",
            )
        for name, window in self.auxiliary.items():
            _check_head_name(name)
            _check_is_window(name, window)
            if window.top is None:
                raise PlanError(
                    f"the auxiliary loss {name!r} has no `top` ({window})",
                    "a top is the module whose output the head reads",
                    f"Pass {name!r}: Window(top='layer3.0'), with a name from model.named_modules().",
                )
        # Explicit defaults, so that equal plans compare equal.
        object.__setattr__(self, "primary", _with_weight(self.primary, PRIMARY_WEIGHT))
        windows = {name: _with_weight(window, AUXILIARY_WEIGHT) for name, window in self.auxiliary.items()}
        object.__setattr__(self, "auxiliary", MappingProxyType(windows))

    def __hash__(self) -> int:
        return hash((self.primary, frozenset(self.auxiliary.items())))

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping proxy cannot be pickled or deep-copied
        return Plan, (self.primary, dict(self.auxiliary))

    @property
    def windows(self) -> dict[str, Window]:
        """All windows by name of the loss; the primary window is first."""
        return {PRIMARY: self.primary, **self.auxiliary}

    @property
    def weights(self) -> dict[str, float]:
        """The factor of each loss, by name."""
        return {name: window.weight for name, window in self.windows.items() if window.weight is not None}

    @cached_property
    def boundaries(self) -> list[Boundary]:
        """The distinct boundaries where a head attaches or a window ends, in no particular order."""
        places = [place for window in self.windows.values() for place in (window.upper, *window.ends)]
        return list(dict.fromkeys(place for place in places if place is not None))

    def standard(self) -> "Plan":
        """Return the plan of standard backpropagation: the primary loss alone, down to the first layer."""
        return Plan(Window(weight=self.primary.weight))

    def multi_loss(self) -> "Plan":
        """Return the plan of the paper's second baseline: the same losses, all down to the first layer."""
        return self._with_windows({name: _ending(window) for name, window in self.windows.items()})

    def isolated(self, order: Sequence[Boundary] = ()) -> "Plan":
        """Return the plan of local learning: each window starts just above the next lower head, without overlap.

        Heads on the same module share their window. Ends for side inputs remain.

        Args:
            order: the boundaries from low to high, `Relay.order`. Default: the order of `auxiliary`.

        Raises:
            PlanError: `order` lacks the boundary of a head; see `check_relay`.
        """
        if order:
            _check_order(order, [place for window in self.windows.values() if (place := window.upper)], "isolated")
        windows = self.windows
        for lower, upper in self._neighbours(order):
            window, top = windows[upper], windows[lower].top
            assert top is not None, "only the primary window has no top, and it is the highest"
            windows[upper] = _ending(window, after=(top, *(end.module for end in window.ends[1:])))
        lowest = next(iter(self._by_height(order)))
        for name, window in windows.items():
            if window.top == windows[lowest].top:
                windows[name] = _ending(window)
        return self._with_windows(windows)

    def check_relay(self, order: Sequence[Boundary] | None = None) -> None:
        """Check that each window overlaps the next lower one, as relay backpropagation requires (section 4).

        Args:
            order: the boundaries from low to high, `Relay.order`. Without it, the check can compare names only. It then
                detects a missing overlap in two cases: the upper window starts after the lower head's module, or both
                are numbered modules of the same container, which are compared by number.

        Raises:
            PlanError: `order` lacks a boundary of this plan. `Relay.order` is empty before the first forward pass in
                training mode, and belongs to the old plan after `relay.plan = plan` until the next one.
            WindowError: two neighbouring windows do not have a layer in common.

        Example:
            ```python
            relay.train()(images)  # records the order of the boundaries
            relay.plan.check_relay(relay.order)
            ```
        """
        if order is not None:
            _check_order(order, self.boundaries, "check_relay")
        order = order or ()
        windows = self.windows
        for lower, upper in self._neighbours(order):
            ends, head = windows[upper].ends, windows[lower].upper
            assert head is not None, "only the primary window has no upper boundary, and it is the highest"
            if ends and _is_at_or_above(ends[0], head, order):
                raise WindowError(
                    f"the window of {upper!r} ends at the {ends[0]}",
                    f"it must reach below the head of {lower!r}, the {head}, so that neighbouring windows overlap",
                    f"Lower the end of {upper!r}, or raise the head of {lower!r}.",
                )

    def describe(self, depths: Mapping[str, int] | None = None) -> str:
        """Return a table of the windows.

        Args:
            depths: number of weight layers of each window, `Relay.depths`. Adds a column.

        Example:
            ```python
            print(relay.plan.describe(relay.depths))
            ```
        """
        rows = [("loss", "weight", "from", "down to", *(("depth",) if depths else ()))]
        for name, window in self.windows.items():
            start = "the model's output" if window.upper is None else str(window.upper)
            end = " and ".join(map(str, window.ends)) or "the first layer"
            row = name, f"{self.weights[name]:g}", start, end
            rows.append((*row, str(depths[name])) if depths else row)
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def __str__(self) -> str:
        return self.describe()

    def _with_windows(self, windows: Mapping[str, Window]) -> "Plan":
        auxiliary = {name: window for name, window in windows.items() if name != PRIMARY}
        return Plan(windows[PRIMARY], auxiliary)

    def _by_height(self, order: Sequence[Boundary]) -> list[str]:
        """Return the names of the losses from the lowest head to the primary loss."""
        names = list(self.auxiliary)
        if order:
            names.sort(key=lambda name: order.index(cast(Boundary, self.auxiliary[name].upper)))
        return [*names, PRIMARY]

    def _neighbours(self, order: Sequence[Boundary]) -> Iterable[tuple[str, str]]:
        """Yield pairs (lower, upper) of losses with adjacent heads. Heads on one module count as one."""
        names, windows = self._by_height(order), self.windows
        for position, upper in enumerate(names):
            below = [name for name in names[:position] if windows[name].top != windows[upper].top]
            if below:
                yield below[-1], upper


def _check_order(order: Sequence[Boundary], boundaries: Iterable[Boundary], method: str) -> None:
    missing = [str(boundary) for boundary in boundaries if boundary not in order]
    if missing:
        raise PlanError(
            f"the order of boundaries {f'does not include the {missing[0]}' if order else 'is empty'}",
            "it must include all boundaries of the plan, as a forward pass in training mode records them",
            f"Run relay.train()(images) with this plan first, then plan.{method}(relay.order).",
        )


def _is_at_or_above(end: Boundary, head: Boundary, order: Sequence[Boundary]) -> bool:
    if order:
        return order.index(end) >= order.index(head)
    if end == head:
        return True
    end_parent, _, end_leaf = end.module.rpartition(".")
    head_parent, _, head_leaf = head.module.rpartition(".")
    if end_parent != head_parent or not (end_leaf.isdecimal() and head_leaf.isdecimal()):
        return False
    return int(end_leaf) > int(head_leaf)


def _ending(window: Window, *, after: str | tuple[str, ...] | None = None) -> Window:
    return Window(top=window.top, after=after, weight=window.weight)


def _with_weight(window: Window, default: float) -> Window:
    return window if window.weight is not None else dataclasses.replace(window, weight=default)


def _is_positive(weight: object) -> bool:
    if not isinstance(weight, (int, float)) or isinstance(weight, bool):
        return False
    return 0 < weight <= sys.float_info.max  # False for nan; math.isfinite raises on huge integers


def _check_is_window(name: str, window: object) -> None:
    if not isinstance(window, Window):
        raise PlanError(
            f"the loss {name!r} has the {type(window).__name__} {window!r} in place of a window",
            "each loss requires a Window",
            "Write Window(top=..., bottom=...).",
        )


def _check_head_name(name: object) -> None:
    # nn.ModuleDict, which stores the heads, rejects dots and the names of its attributes.
    if not isinstance(name, str) or not name or "." in name or name == PRIMARY or hasattr(nn.ModuleDict(), name):
        raise PlanError(
            f"{name!r} is not a valid name of an auxiliary loss and its head",
            f"a name must be text without a dot, not {PRIMARY!r}, and not an attribute of nn.ModuleDict",
            "Rename the loss, for example 'aux'.",
        )
