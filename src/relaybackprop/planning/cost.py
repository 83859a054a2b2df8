"""The cost of a plan: floating-point operations, saved activations and peak memory of a training step.

The step runs on a copy with the engine that also trains, on the meta device if possible (Note [Values] in
`relaybackprop.planning.copies`), so the counts equal those of a real step.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from relaybackprop.engine.hooks import attach
from relaybackprop.engine.pytree import map_tensors, replace_tensors, tensors_in
from relaybackprop.errors import EarlyReleaseError, LeakError
from relaybackprop.loss import RelayLoss, RelayOutput
from relaybackprop.plan import Boundary, Plan
from relaybackprop.planning.chain import DummyHead, sum_elements
from relaybackprop.planning.copies import Arguments, run_on_copies
from relaybackprop.planning.profile import PartCost, Profiler
from relaybackprop.relay import Relay

STANDARD, MULTI_LOSS, ISOLATED, RELAY = "standard", "multi_loss", "isolated", "relay"
EARLY_RELEASE = "early_release"  # the plan with `Relay.forward_backward`
LOWER_BOUND = "lower_bound"
UNITS = ("", "k", "M", "G", "T", "P")
NAME_WIDTH = 26  # characters, so that the table fits into 120 columns


@dataclass(frozen=True)
class Part:
    """A segment of the model between two boundaries of the plan, or a head.

    Args:
        name: the boundary at the end of the segment, or the head's name.
        parameters: number of elements of the trainable parameters that it uses. Shared ones count in the lowest part.
        schemes: cost by scheme; zero if a scheme does not have the head.
        lower_bound: minimum number of floating-point operations that the plan requires here, forward and backward.
    """

    name: str
    parameters: int
    schemes: Mapping[str, PartCost]
    lower_bound: int


@dataclass(frozen=True)
class Cost:
    """The cost of a training step of a plan, and of other schemes with the same heads. `print` shows a table.

    Args:
        parts: the model's segments from lowest to highest, then the heads. Segments without parameters and cost are
            left out.
        peaks: peak memory of a step in bytes, by scheme, without parameters, their gradients, buffers and the batch.

    Example:
        ```python
        result = cost(model, plan, images)
        result.ratios["relay"]  # FLOPs relative to standard backpropagation
        result.peaks["early_release"]  # bytes
        ```
    """

    parts: tuple[Part, ...]
    peaks: Mapping[str, int]

    @property
    def totals(self) -> dict[str, PartCost]:
        """The cost of a step by scheme."""
        return {name: sum((part.schemes[name] for part in self.parts), PartCost()) for name in self.parts[0].schemes}

    @property
    def lower_bound(self) -> int:
        """The minimum number of floating-point operations that a step of the plan requires."""
        return sum(part.lower_bound for part in self.parts)

    @property
    def ratios(self) -> dict[str, float]:
        """Floating-point operations by scheme, and of the lower bound, relative to standard backpropagation."""
        flops = {name: part_cost.flops for name, part_cost in self.totals.items()} | {LOWER_BOUND: self.lower_bound}
        return {name: count / max(flops[STANDARD], 1) for name, count in flops.items()}

    def __str__(self) -> str:
        totals, plan = self.totals, RELAY if RELAY in self.totals else STANDARD
        flop_unit, flop_letter = _unit_of(max(part_cost.flops for part_cost in totals.values()))
        byte_unit, byte_letter = _unit_of(max(part_cost.saved for part_cost in totals.values()))
        rows = [[f"{flop_letter}FLOPs of a step", "parameters", f"saved {byte_letter}B", *totals, LOWER_BOUND]]

        def add(name: str, parameters: int, schemes: Mapping[str, PartCost], lower_bound: int) -> None:
            counts = [*(part_cost.flops for part_cost in schemes.values()), lower_bound]
            cells = [f"{parameters:,}", f"{schemes[plan].saved / byte_unit:.2f}"]
            rows.append([_shorten(name), *cells, *(f"{count / flop_unit:.2f}" for count in counts)])

        for part in self.parts:
            add(part.name, part.parameters, part.schemes, part.lower_bound)
        add("sum", sum(part.parameters for part in self.parts), totals, self.lower_bound)
        saved = totals[plan].saved / max(totals[STANDARD].saved, 1)
        rows.append(["of standard", "", f"{saved:.3f}", *(f"{ratio:.3f}" for ratio in self.ratios.values())])
        peak_unit, peak_letter = _unit_of(max(self.peaks.values()))
        rows.append([f"peak {peak_letter}B", "", "", *(f"{peak / peak_unit:.2f}" for peak in self.peaks.values()), ""])
        peaks = [peak / max(self.peaks[STANDARD], 1) for peak in self.peaks.values()]
        rows.append(["of standard", "", "", *(f"{peak:.3f}" for peak in peaks), ""])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            row[:] = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        return "\n".join("  ".join(row).rstrip() for row in rows)


def cost(model: nn.Module, plan: Plan, example_input: Any, heads: Mapping[str, nn.Module] | None = None) -> Cost:
    """Count the operations and the memory of a training step, by part of the network and scheme.

    The model does not change. Steps run on meta copies and take no memory. If the forward pass depends on values, they
    run on copies with the example's values, which takes the memory and the time of a few steps (seven with heads).

    Args:
        model: any module.
        plan: the windows. A plan without heads and ends of windows has the scheme "standard" only.
        example_input: an example batch: a tensor, a tuple of arguments, or a dict of keyword arguments. Values matter
            only if the forward pass depends on them.
        heads: the head of each auxiliary loss, by name. Default: dummy heads without cost.

    Returns:
        The costs of the schemes "standard", "multi_loss", "isolated", "relay" (the plan) and "early_release" (the plan
        with `Relay.forward_backward`), without loss functions and optimizer. "isolated" and "early_release" are left
        out if a path bypasses the ends that they require. Only matrix products and convolutions are counted; a
        multiplication and an addition are two operations. Memory is in bytes, for PyTorch's own CPU kernels with fused
        attention. It excludes kernel workspaces, except a convolution's copy of its input gradient. Other devices save
        slightly different amounts for normalisation.

    Raises:
        PlanError: an argument has a wrong type, or the model does not run on the example.
        RelayError: any error that a forward pass of `Relay` with this plan and these heads raises.

    Example:
        ```python
        print(cost(resnet50(), plan, images, {"aux": AuxiliaryHead(1024, 1000)}))
        ```
    """
    if heads is None and isinstance(plan, Plan):  # pyright: ignore[reportUnnecessaryIsInstance]
        heads = {name: DummyHead() for name in plan.auxiliary}
    original = Relay(model, plan, heads)

    def run(copies: Sequence[Relay], arguments: Arguments) -> tuple[Sequence[Boundary], dict[str, Profiler], Profiler]:
        (relay,) = copies
        relay(*arguments[0], **arguments[1])
        profilers: dict[str, Profiler] = {}
        for scheme, other in _schemes(plan, relay.order).items():
            try:
                profilers[scheme] = _profile_step(relay, other, arguments, relay.order, early=scheme == EARLY_RELEASE)
            except (LeakError, EarlyReleaseError):  # a head can read a branch, where a window cannot end
                if scheme not in (ISOLATED, EARLY_RELEASE):
                    raise
        ends = {end for window in plan.windows.values() for end in window.ends}
        return relay.order, profilers, _profile_step(relay, plan.standard(), arguments, relay.order, ends)

    order, profilers, cut_profiler = run_on_copies([original], example_input, run)
    names = [f"up to {boundary}" for boundary in order] + ["up to the model's output"]
    names += [f"head {name}" for name in plan.auxiliary]
    parts: list[Part] = []
    for row, name in enumerate(names):
        schemes = {scheme: profiler.costs[row] for scheme, profiler in profilers.items()}
        # The maximum, since "standard" has no heads.
        parameters = max(profiler.parameters[row] for profiler in profilers.values())
        if parameters or any(part_cost != PartCost() for part_cost in schemes.values()):
            parts.append(Part(name, parameters, schemes, _lower_bound(schemes, cut_profiler.costs[row])))
    return Cost(tuple(parts), {scheme: profiler.memory.peak for scheme, profiler in profilers.items()})


def saved_between(model: nn.Module, names: Sequence[str], example_input: Any) -> list[int]:
    """Count the bytes that standard backpropagation saves in each part of a model.

    Args:
        model: any module.
        names: names of the modules whose outputs divide the model, in forward order.
        example_input: an example batch, as in `cost`.

    Returns:
        The bytes of each part up to one of these modules, and of the rest of the model.
    """
    boundaries = [Boundary("output", name) for name in names]
    profiler = run_on_copies(
        [Relay(model, Plan())], example_input, lambda copies, a: _profile_step(copies[0], Plan(), a, boundaries)
    )
    return [part_cost.saved for part_cost in profiler.costs]


def early_peak(model: nn.Module, plan: Plan, example_input: Any) -> int:
    """Return the peak memory of a step with early release and dummy heads, in bytes.

    Args:
        model: any module.
        plan: the windows.
        example_input: an example batch, as in `cost`.
    """
    original = Relay(model, plan, {name: DummyHead() for name in plan.auxiliary})
    profiler = run_on_copies(
        [original], example_input, lambda copies, a: _profile_step(copies[0], plan, a, (), early=True)
    )
    return profiler.memory.peak


def _schemes(plan: Plan, order: Sequence[Boundary]) -> dict[str, Plan]:
    if plan == plan.standard():
        return {STANDARD: plan}
    schemes = {STANDARD: plan.standard(), MULTI_LOSS: plan.multi_loss(), ISOLATED: plan.isolated(order), RELAY: plan}
    return schemes | {EARLY_RELEASE: plan}


def _lower_bound(schemes: Mapping[str, PartCost], cut: PartCost) -> int:
    """Return the minimum operations of a part (see Cost in docs/method/index.md).

    Args:
        schemes: cost of the part, by scheme.
        cut: cost of the part if the graph of standard backpropagation is cut at the windows' ends.
    """
    if RELAY not in schemes:
        return schemes[STANDARD].flops
    # Subtract the gradients that the ordinary pass computes for a window's end and a junction drops.
    return schemes[RELAY].flops - (schemes[STANDARD].backward - cut.backward)


class _ProfiledHead(nn.Module):
    """A head whose operations count in its own row of the profiler."""

    def __init__(self, head: nn.Module, profiler: Profiler, row: int) -> None:
        super().__init__()
        self.head = head
        self._target = profiler, row

    def forward(self, value: Any) -> Any:
        profiler, row = self._target
        before = profiler.row
        profiler.enter_row(row)
        output = self.head(value)
        profiler.enter_row(before)
        return output


def _profile_step(
    relay: Relay,
    plan: Plan,
    arguments: Arguments,
    order: Sequence[Boundary],
    ends: Collection[Boundary] = (),
    *,
    early: bool = False,
) -> Profiler:
    """Run one training step of a copy with a different plan for the same heads and return its costs by row.

    Args:
        relay: a relay on a copy of the model.
        plan: the plan of the scheme.
        arguments: the arguments of the forward pass.
        order: the boundaries between rows, from lowest to highest. The heads' rows follow.
        ends: boundaries at which to cut the graph, so that the layers below receive no gradient from above.
        early: whether to use `Relay.forward_backward`.
    """
    args, kwargs = arguments = map_tensors(torch.clone, arguments)  # the model may modify them in place
    for parameter in relay.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    rows = {name: row for row, name in enumerate(relay.heads, len(order) + 1)}
    profiler = Profiler(len(order) + 1 + len(rows), [*relay.parameters(), *relay.buffers()], tensors_in(arguments))
    heads = {name: _ProfiledHead(relay.heads[name], profiler, rows[name]) for name in plan.auxiliary}
    step, cut = Relay(relay.model, plan, heads), list[Tensor]()

    def sum_of(output: Any, _target: Any) -> Tensor:
        loss = sum_elements(tensors_in(output))
        profiler.end_forward()
        return loss

    criterion = RelayLoss(dict.fromkeys(plan.windows, sum_of))

    def run() -> None:
        if early:
            step.forward_backward(*args, target=None, loss=criterion, sync=False, **kwargs)
            return
        output: RelayOutput = step(*args, **kwargs)
        loss = sum_elements([criterion(output, None), *cut])
        profiler.record_parameters(loss)
        loss.backward()  # pyright: ignore[reportUnknownMemberType]

    if early:  # warm-up: the first step searches the graph and keeps the tensor at a cut longer
        run()
    profiler.enter_row(0)
    with ExitStack() as stack:
        for row, boundary in enumerate(order, 1):
            crossing = partial(_cross, profiler, row, cut if boundary in ends else None)
            attach(stack, relay.model.get_submodule(boundary.module), boundary.side, crossing)
        with profiler, saved_tensors_hooks(profiler.record_saved, lambda tensor: tensor):
            run()
    return profiler


def _cross(profiler: Profiler, row: int, cut: list[Tensor] | None, value: Any) -> Any:
    """Enter a row. At a cut, detach the value and add its tensors to the losses of the layers below."""
    profiler.enter_row(row)
    tensors = [tensor for tensor in tensors_in(value) if tensor.requires_grad]
    if cut is None or not tensors:
        return value
    cut += tensors
    return replace_tensors(value, tensors, [tensor.detach().clone() for tensor in tensors])


def _unit_of(largest: int) -> tuple[int, str]:
    """Return a power of 1000 for readable numbers, and its prefix."""
    power = max(0, min(len(UNITS) - 1, (len(str(largest)) - 2) // 3))
    return 1000**power, UNITS[power]


def _shorten(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else f"{name[:6]}...{name[9 - NAME_WIDTH :]}"
