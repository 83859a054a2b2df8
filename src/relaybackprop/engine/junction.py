"""Junctions: the autograd nodes at window boundaries, where gradients split and join by the method's equation.

For every parameter theta (paper, section 4):

    grad(theta) = sum over the losses l whose window contains theta of  weight_l * d loss_l / d theta

A *junction* is an identity in the forward pass, wherever a head attaches or a window ends: it returns its input once
for the layers above and once for each head. In the backward pass it receives the gradients of all of these.

Note [Lanes]
1. The ordinary autograd pass carries the sum of all losses that are active in a segment. That sum is correct for every
   parameter of the segment, so each weight gradient is computed once and each `AccumulateGrad` node fires once.
2. Where a window ends, the sum must lose the ended losses. A sum cannot be split afterwards, so the sum of the other
   losses is computed separately in a *lane*: a nested `torch.autograd.grad` from junction to junction, which computes
   input gradients only.
3. A lane is named by its set of losses: it is the sum of the gradients of exactly these losses at this boundary. A
   junction where windows end drops the ordinary sum, and returns the lane of the losses that do not end there.
4. A segment with G distinct sums (the ordinary pass and its lanes) costs one weight-gradient pass and G input-gradient
   passes, W + G*D. Outside overlaps G is 1 and nothing is computed twice.
5. Lanes hop from a junction to the next ones below, where losses that start there join them. If a path bypasses a
   junction (a head inside a residual branch), one hop has several targets, one above another. The upper one then
   returns None when the hop runs through it, because its gradient has already been delivered.
6. A junction refers to nodes below it in the graph, never to itself or above. Otherwise a forward pass without a
   backward pass would be a reference cycle through C++, which Python's garbage collector cannot free.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import GradientEdge

from relaybackprop.errors import DoubleBackwardError

Losses = frozenset[str]
Gradients = list[Tensor | None]
"""One gradient per tensor of a boundary; None counts as zero."""


@dataclass(eq=False)
class Lanes:
    """Delivered lanes of one forward pass that have not yet been used. Shared by its junctions."""

    delivered: dict[tuple[int, Losses], Gradients] = field(default_factory=dict[tuple[int, Losses], Gradients])
    hopping: bool = False
    backward_id: int = -1

    def begin(self, backward_id: int) -> None:
        """Discard the lanes of an earlier, interrupted backward pass over the same graph."""
        if backward_id != self.backward_id:
            self.backward_id = backward_id
            self.delivered.clear()

    def deliver(self, index: int, losses: Losses, gradients: Gradients) -> None:
        """Add to the lane of `losses` at junction number `index`."""
        arrived = self.delivered.get((index, losses))
        self.delivered[index, losses] = gradients if arrived is None else add(arrived, gradients)


@dataclass(eq=False, frozen=True)
class Hop:
    """One lane from a junction to the next ones below, with (junction index, lane's losses there) of each target."""

    losses: Losses
    targets: tuple[tuple[int, Losses], ...]


@dataclass(eq=False, frozen=True)
class Route:
    """The backward routing of one junction; see `relaybackprop.engine.routes`.

    Args:
        arriving: the losses whose gradients arrive from above.
        onward: the losses whose gradients propagate below.
        hops: the lanes to send ahead of the ordinary pass.
    """

    arriving: Losses
    onward: Losses
    hops: tuple[Hop, ...]


@dataclass(eq=False)
class Junction:
    """One boundary in one forward pass.

    Args:
        boundary: its name in error messages.
        index: number of the junction, counted from the lowest.
        heads: names of the losses whose heads attach here.
        ending: names of the losses whose windows end here.
        lanes: shared by the junctions of the forward pass.
        sources: edges of the boundary's tensors.
    """

    boundary: str
    index: int
    heads: tuple[str, ...]
    ending: Losses
    lanes: Lanes
    sources: list[GradientEdge]
    # Set at the end of the forward pass. Without a route (it raised, or calls backward itself) a junction returns the
    # sum of all gradients.
    in_place: bool = False
    route: Route | None = None
    below: dict[int, list[GradientEdge]] = field(default_factory=dict[int, list[GradientEdge]])

    def pass_down(self, gradients: Gradients) -> Gradients:
        """Send the lanes, and return the gradients to propagate below, from those of the trunk and of each head."""
        width = len(self.sources)
        backward_id = torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateUsage]
        # Note [Lanes] 5. A junction on another device may be in the ordinary pass at the same time.
        if self.lanes.hopping and backward_id != self.lanes.backward_id:
            return [None] * width
        groups = [gradients[start : start + width] for start in range(0, len(gradients), width)]
        arrived, heads = groups[0], dict(zip(self.heads, groups[1:], strict=True))
        if self.route is None:
            return add(arrived, *heads.values())
        self.lanes.begin(backward_id)
        for hop in self.route.hops:
            self._send(hop, self._sum_of(hop.losses, arrived, heads))
        onward = self._sum_of(self.route.onward, arrived, heads)
        for key in [key for key in self.lanes.delivered if key[0] == self.index]:
            del self.lanes.delivered[key]
        return onward

    def _sum_of(self, losses: Losses, arrived: Gradients, heads: dict[str, Gradients]) -> Gradients:
        """The gradient of exactly these losses at this boundary."""
        assert self.route is not None
        from_above = losses & self.route.arriving
        own = [gradients for name, gradients in heads.items() if name in losses]
        if from_above == self.route.arriving:
            return add(arrived, *own)
        lane = self.lanes.delivered.get((self.index, from_above))
        return add([None] * len(arrived) if lane is None else lane, *own)

    def _send(self, hop: Hop, gradients: Gradients) -> None:
        """Propagate one lane to the next junctions below by a nested pass, computing input gradients only."""
        sent = [(edge, g) for edge, g in zip(self.sources, gradients, strict=True) if g is not None]
        if not sent:
            return
        edges = [edge for target, _ in hop.targets for edge in self.below[target]]
        self.lanes.hopping = True
        try:
            received = torch.autograd.grad(
                outputs=[edge for edge, _ in sent],
                inputs=edges,
                grad_outputs=[g for _, g in sent],
                retain_graph=True,  # the ordinary pass needs it next
                allow_unused=True,
            )
        finally:
            self.lanes.hopping = False
        rest = list[Tensor | None](received)
        for target, losses in hop.targets:
            width = len(self.below[target])
            self.lanes.deliver(target, losses, rest[:width])
            rest = rest[width:]


class _Cross(torch.autograd.Function):
    """Identity in the forward pass; `Junction.pass_down` in the backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, junction: Junction, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        cast(Any, ctx).junction = junction
        # Detached tensors share memory and version counter with their source but are not views to autograd: an in-place
        # ReLU right after the boundary works, and one that modifies a saved tensor is still detected.
        trunk = [tensor.detach() for tensor in tensors]
        # Heads read copies: the layers above, or the head itself, may modify values in place.
        return *trunk, *(tensor.clone() for _ in junction.heads for tensor in tensors)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        if torch.is_grad_enabled():
            raise DoubleBackwardError(
                "a backward pass with create_graph=False",
                "create_graph=True, or autograd.grad inside a graph that is being recorded",
                "Higher derivatives through relay windows are not defined; use relay.model for them.",
            )
        junction = cast(Any, ctx).junction
        assert isinstance(junction, Junction)
        return None, *junction.pass_down(list(gradients))


def cross(junction: Junction, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Put a junction across tensors that require gradients.

    Args:
        junction: a new one, whose sources are the tensors' edges.
        tensors: all tensors of the boundary.

    Returns:
        The trunk's tensors, and copies for each head; same shapes and values as `tensors`.
    """
    crossed: tuple[Tensor, ...] = _Cross.apply(junction, *tensors)  # pyright: ignore
    width = len(tensors)
    groups = [list(crossed[start : start + width]) for start in range(0, len(crossed), width)]
    return groups[0], groups[1:]


def add(*terms: Gradients) -> Gradients:
    """The sum of gradients, tensor by tensor; None counts as zero. Never in place: autograd owns the terms."""
    total = list(terms[0])
    for term in terms[1:]:
        for position, gradient in enumerate(term):
            held = total[position]
            total[position] = gradient if held is None else held if gradient is None else held + gradient
    return total
