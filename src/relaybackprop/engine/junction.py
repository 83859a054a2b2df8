"""Junctions: autograd nodes at window boundaries that split and join gradients by the method's equation.

For every parameter theta (paper, section 4):

    grad(theta) = sum over the losses l whose window contains theta of  weight_l * d loss_l / d theta

A *junction* is the identity in the forward pass, inserted wherever a head attaches or a window ends. It returns its
input once for the layers above and once for each head. In the backward pass it receives the gradients of all these
outputs.

Note [Lanes]
1. The ordinary autograd pass propagates the sum of all losses that are active in a segment. That sum is correct for
   every parameter of the segment, so each weight gradient is computed once and each `AccumulateGrad` node fires once.
2. Where a window ends, the ended losses must leave the sum. A sum cannot be split afterwards, so the sum of the other
   losses is computed separately in a *lane*: a nested `torch.autograd.grad` from junction to junction, which computes
   input gradients only.
3. A lane is identified by its set of losses: it is the sum of the gradients of exactly these losses at this boundary.
   A junction where windows end drops the ordinary sum and returns the lane of the losses that do not end there.
4. A segment with G distinct sums (the ordinary pass and its lanes) costs one weight-gradient pass and G input-gradient
   passes, W + G*D. Outside overlaps G is 1 and nothing is computed twice.
5. A lane propagates in hops, each from a junction to the next ones below, where losses that start there join the sum.
   If a path bypasses a junction (a head inside a residual branch), one hop has several targets, one above another. The
   upper target returns None when the hop runs through it, because its gradient has already been delivered.
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
    """Lanes of one forward pass that have been delivered but not yet used. Its junctions share this object."""

    delivered: dict[tuple[int, Losses], Gradients] = field(default_factory=dict[tuple[int, Losses], Gradients])
    is_hopping: bool = False
    backward_id: int = -1

    def begin(self, backward_id: int) -> None:
        """Discard the lanes of an earlier, interrupted backward pass over the same graph."""
        if backward_id != self.backward_id:
            self.backward_id = backward_id
            self.delivered.clear()

    def deliver(self, index: int, losses: Losses, gradients: Gradients) -> None:
        """Add to the lane of `losses` at junction number `index`."""
        existing = self.delivered.get((index, losses))
        self.delivered[index, losses] = gradients if existing is None else add(existing, gradients)


@dataclass(eq=False, frozen=True)
class Hop:
    """One lane from a junction to the next ones below. Each target is a junction index and the lane's losses there."""

    losses: Losses
    targets: tuple[tuple[int, Losses], ...]


@dataclass(eq=False, frozen=True)
class Route:
    """The backward routing of one junction; see `relaybackprop.engine.routes`.

    Args:
        incoming: losses whose gradients arrive from above.
        outgoing: losses whose gradients propagate to the layers below.
        hops: lanes to propagate before the ordinary pass.
    """

    incoming: Losses
    outgoing: Losses
    hops: tuple[Hop, ...]


@dataclass(eq=False)
class Junction:
    """One boundary in one forward pass.

    Args:
        boundary: the boundary's name in error messages.
        index: position of the junction, counted from the lowest, 0.
        heads: names of the losses whose heads attach here.
        ending: names of the losses whose windows end here.
        lanes: lanes of the forward pass, shared by its junctions.
        sources: gradient edges of the boundary's tensors.
    """

    boundary: str
    index: int
    heads: tuple[str, ...]
    ending: Losses
    lanes: Lanes
    sources: list[GradientEdge]
    # Set at the end of the forward pass. A junction without a route returns the sum of all gradients: the forward pass
    # raised an error, or called backward itself.
    in_place: bool = False
    route: Route | None = None
    below: dict[int, list[GradientEdge]] = field(default_factory=dict[int, list[GradientEdge]])

    def propagate(self, gradients: Gradients) -> Gradients:
        """Send the lanes and return the gradients for the layers below.

        Args:
            gradients: gradients of the trunk's tensors, then of each head's tensors.
        """
        num_tensors = len(self.sources)
        backward_id = torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateUsage]
        # A hop runs through this junction, which is already a target of it (Note [Lanes] 5). Compare the pass as well:
        # autograd has one thread per device, and a junction on another device may be in the ordinary pass now.
        if self.lanes.is_hopping and backward_id != self.lanes.backward_id:
            return [None] * num_tensors
        groups = [gradients[start : start + num_tensors] for start in range(0, len(gradients), num_tensors)]
        from_above, head_gradients = groups[0], dict(zip(self.heads, groups[1:], strict=True))
        if self.route is None:
            return add(from_above, *head_gradients.values())
        self.lanes.begin(backward_id)
        # Lanes first: the ordinary pass frees the saved tensors that they need.
        for hop in self.route.hops:
            self._send(hop, self._sum_of(hop.losses, from_above, head_gradients))
        outgoing = self._sum_of(self.route.outgoing, from_above, head_gradients)
        for key in [key for key in self.lanes.delivered if key[0] == self.index]:
            del self.lanes.delivered[key]
        return outgoing

    def _sum_of(self, losses: Losses, from_above: Gradients, head_gradients: dict[str, Gradients]) -> Gradients:
        """Return the gradient of exactly these losses at this boundary."""
        assert self.route is not None
        losses_above = losses & self.route.incoming
        from_heads = [gradients for name, gradients in head_gradients.items() if name in losses]
        if losses_above == self.route.incoming:  # the ordinary pass has this sum, so there is no lane for it
            return add(from_above, *from_heads)
        lane = self.lanes.delivered.get((self.index, losses_above))
        return add([None] * len(from_above) if lane is None else lane, *from_heads)

    def _send(self, hop: Hop, gradients: Gradients) -> None:
        """Propagate one lane to the next junctions below in a nested pass that computes input gradients only."""
        sent = [(edge, g) for edge, g in zip(self.sources, gradients, strict=True) if g is not None]
        if not sent:
            return
        edges = [edge for target, _ in hop.targets for edge in self.below[target]]
        self.lanes.is_hopping = True
        try:
            received = torch.autograd.grad(
                outputs=[edge for edge, _ in sent],
                inputs=edges,
                grad_outputs=[g for _, g in sent],
                retain_graph=True,  # the ordinary pass needs it next
                allow_unused=True,
            )
        finally:
            self.lanes.is_hopping = False
        remaining = list[Tensor | None](received)
        for target, losses in hop.targets:
            num_tensors = len(self.below[target])
            self.lanes.deliver(target, losses, remaining[:num_tensors])
            remaining = remaining[num_tensors:]


class _Cross(torch.autograd.Function):
    """The identity in the forward pass, and `Junction.propagate` in the backward pass."""

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
                "a backward pass through a relay graph records a graph itself (create_graph=True)",
                "higher derivatives through relay windows are not defined",
                "Set create_graph=False, or use relay.model for higher derivatives.",
            )
        junction = cast(Any, ctx).junction
        assert isinstance(junction, Junction)
        return None, *junction.propagate(list(gradients))


def cross(junction: Junction, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Insert a junction at tensors that require gradients.

    Args:
        junction: a new junction whose sources are the tensors' edges.
        tensors: all tensors of the boundary.

    Returns:
        The trunk's tensors, and copies for each head, with the shapes and values of `tensors`.
    """
    crossed: tuple[Tensor, ...] = _Cross.apply(junction, *tensors)  # pyright: ignore
    num_tensors = len(tensors)
    groups = [list(crossed[start : start + num_tensors]) for start in range(0, len(crossed), num_tensors)]
    return groups[0], groups[1:]


def add(*terms: Gradients) -> Gradients:
    """Return the sum of gradients, tensor by tensor; None counts as zero. Not in place: autograd owns the terms."""
    total = list(terms[0])
    for term in terms[1:]:
        for position, gradient in enumerate(term):
            current = total[position]
            total[position] = gradient if current is None else current if gradient is None else current + gradient
    return total
