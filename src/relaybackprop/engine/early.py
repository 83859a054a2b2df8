"""Early release: run each loss's backward pass as soon as the forward pass reaches its head.

Note [Early release]
1. The forward pass is cut at the lower end of each window: the layers above the cut read leaves, and the graph below it
   ends. A *segment* is the part of the graph between two cuts.
2. A segment is *final* when no later loss reaches it. Later losses have their heads higher up, and the layers that they
   do not reach are below their windows, so the final segments are the lowest ones.
3. When a segment becomes final, one backward pass computes the gradients of its weights from the sum of all losses that
   reach it, as in Note [Lanes] 1 of `relaybackprop.engine.junction`, and frees its saved tensors. The layers above have
   not run yet.
4. To reach a final segment, a loss may have to cross segments that are not final, where it overlaps with later losses.
   It crosses them in a lane, a pass that computes input gradients only and retains the graph. Its gradient is held at
   its head and at each cut, and joins the sum when the segment becomes final.
5. So a segment with G distinct sums costs W + G*D, as in one backward pass over the whole graph, less the lowest input
   gradient of each overlap, which is not needed when its segments become final.
6. Saved tensors of a segment live from its forward pass until the backward pass of the last loss whose window contains
   it, so the peak is what the largest window saves.
"""

from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge, saved_tensors_hooks

from relaybackprop.engine import graph
from relaybackprop.engine.calls import Calls
from relaybackprop.engine.junction import Gradients, Junction, Lanes, Losses, add, cross
from relaybackprop.engine.memory import SharedMemory
from relaybackprop.engine.pytree import replace_tensors, tensors_in
from relaybackprop.engine.routes import check_eager, foreign_head_error, leak_error
from relaybackprop.errors import EarlyReleaseError
from relaybackprop.plan import PRIMARY, Boundary

Compute = Callable[[str, Any], Tensor]
"""Compute one loss, weighted and scaled, from its name and the value that its head reads."""


@dataclass(eq=False)
class _Segment:
    """The part of the graph between two cuts.

    Args:
        bottom: the cut below it; None for the lowest segment.
        leaves: the tensors that its layers read from below the cut.
        older: numbers of the nodes below the cut, to find paths around it.
    """

    bottom: Boundary | None = None
    leaves: list[Tensor] = field(default_factory=list[Tensor])
    older: frozenset[int] = frozenset()
    # Gradients at its heads, and gradients from above at its top by sets of losses. `held` is the sum of those already
    # sent to lower segments; `waiting` names their losses.
    heads: dict[str, tuple[list[GradientEdge], Gradients]] = field(
        default_factory=dict[str, tuple[list[GradientEdge], Gradients]]
    )
    sources: list[GradientEdge] = field(default_factory=list[GradientEdge])
    lanes: dict[Losses, Gradients] = field(default_factory=dict[Losses, Gradients])
    waiting: Losses = frozenset()
    held: Gradients = field(default_factory=Gradients)

    def arrived(self, losses: Losses) -> tuple[list[GradientEdge], list[Tensor]]:
        """The edges in this segment at which the backward pass of these losses starts, and their gradients."""
        groups = [arrived for name, arrived in self.heads.items() if name in losses]
        above = losses.difference(self.heads)
        if above:
            groups.append((self.sources, self._from_above(above)))
        pairs = [(edge, g) for edges, gradients in groups for edge, g in zip(edges, gradients, strict=True)]
        known = [(edge, g) for edge, g in pairs if g is not None]
        return [edge for edge, _ in known], [g for _, g in known]

    def _from_above(self, losses: Losses) -> Gradients:
        if losses in self.lanes:
            return self.lanes[losses]
        rest = losses - self.waiting
        return add(self.held, self.lanes[rest]) if rest else self.held

    def has(self, losses: Losses) -> bool:
        """Whether the sum of exactly these losses has already arrived from above."""
        return losses in self.lanes or losses == self.waiting

    def hold(self) -> None:
        """Hold the gradients sent to lower segments, to add them to those of later losses."""
        if self.lanes:
            losses, gradients = max(self.lanes.items(), key=lambda lane: len(lane[0]))
            self.held = add(gradients, self.held) if self.waiting else gradients
            self.waiting |= losses
            self.lanes.clear()


class EarlyRelease:
    """A forward pass that frees each window as early as possible: the state of one `Relay.forward_backward`.

    Args:
        calls: the boundaries crossed.
        compute: runs a head and a criterion.
        names: by node, the module that made it; None if the graph of this plan has already been searched for paths
            around the cuts.

    Attributes:
        depths: by loss, as in `Relay`; set during the search.
    """

    def __init__(self, calls: Calls, compute: Compute, names: Mapping[Node, str] | None) -> None:
        self.calls = calls
        self.depths: dict[str, int] = {}
        self._memory = SharedMemory()
        self._heights: list[int] = []  # by segment, weight layers on the longest path through it
        self._compute = compute
        self._names = names
        self._segments = [_Segment()]
        self._number_above: dict[Boundary, int] = {}  # of the segment above each cut
        self._segment_of: dict[int, int] = {}  # by number of a node, the segment that first reached it
        self._spans: dict[str, range] = {}  # by loss computed, the segments in its window
        self._passed: Losses = frozenset()  # losses propagated to the end of their windows
        self._done = 0  # number of the lowest segment that is not final

    def cross(self, boundary: Boundary, place: Boundary, value: Any) -> Any:
        """Compute the losses attached here, free every final segment, and cut the graph where a window ends."""
        self.calls.enter(boundary, place, value)
        heads = self.calls.heads_at(boundary, place)
        if heads:
            with self._suspended():
                for name in heads:
                    self.calls.check_upright(name)
                    self._start(name, value, boundary)
                self._release(self._first_not_final())
        if any(boundary in window.ends for window in self.calls.plan.windows.values()):
            return self._cut(boundary, place, value)
        return value

    def finish(self, output: Any) -> None:
        """Compute the primary loss from the model's output, and free the rest."""
        self.calls.check()
        self.calls.check_has_tensors(f"the output for the loss {PRIMARY!r}", output)
        with self._suspended():
            self._start(PRIMARY, output, None)
            self._release(len(self._segments))
        self._memory.check()

    @contextmanager
    def _suspended(self) -> Generator[None]:
        """Suspend the forward pass, and any checkpointing around it, while heads and backward passes run."""
        self.calls.aside = True
        try:
            with saved_tensors_hooks(_identity, _identity):
                yield
        finally:
            self.calls.aside = False

    def _cut(self, boundary: Boundary, place: Boundary, value: Any) -> Any:
        tensors = [tensor for tensor in tensors_in(value) if tensor.requires_grad]
        below, segment = self._segments[-1], _Segment(place)
        sources = [get_gradient_edge(tensor) for tensor in tensors]
        if self._names is not None or place != boundary:  # a skipped module: another graph than the one searched
            segment.older = below.older | _numbers(sources)
        if self._names is not None:
            self._heights.append(graph.longest_path(sources, graph.everywhere))
        if len(self._segments) > self._done:  # otherwise no further gradient reaches this cut
            below.sources = sources
        self._segments.append(segment)
        self._number_above[boundary] = len(self._segments) - 1
        if not tensors:  # nothing below needs a gradient
            return value
        segment.leaves, crossed, junction = _leaves_of(tensors, str(place))
        self._segment_of |= {graph.number_of(edge.node): len(self._segments) - 1 for edge in graph.edges_of(crossed)}
        if self._names is not None:
            self._memory.watch(junction, tensors, crossed)
        return replace_tensors(value, tensors, crossed)

    def _start(self, loss: str, value: Any, boundary: Boundary | None) -> None:
        """Compute one loss and its gradient at its head's input, or at the model's output."""
        tensors = [tensor for tensor in tensors_in(value) if tensor.requires_grad]
        plain = [tensor for tensor in tensors_in(value) if not tensor.requires_grad]
        edges = [get_gradient_edge(tensor) for tensor in tensors]
        if boundary is None:
            own, others = tensors, plain
        else:  # a head may continue in place
            own, others = [tensor.detach().clone() for tensor in tensors], [tensor.clone() for tensor in plain]
        leaves, crossed, _ = _leaves_of(own, f"head {loss}")
        result = self._compute(loss, replace_tensors(value, [*tensors, *plain], [*crossed, *others]))
        if self._names is not None and boundary is not None:
            _check_head(loss, result, self._segments[-1].older | _numbers(edges), boundary)
        if result.requires_grad:
            with _full_precision(result.device.type):
                result.backward()  # pyright: ignore[reportUnknownMemberType]
        ends, last = self.calls.plan.windows[loss].ends, len(self._segments) - 1
        self._spans[loss] = range(self._number_above[ends[0]] if ends else 0, last + 1)
        if self._names is not None:
            highest = graph.longest_path(edges, graph.everywhere)
            self.depths[loss] = highest + sum(self._heights[number] for number in self._spans[loss][:-1])
        self._segments[last].heads[loss] = edges, [leaf.grad for leaf in leaves]

    def _release(self, end: int) -> None:
        """Propagate the losses seen so far to every final segment, those below number `end`, then free these."""
        final = range(self._done, end)
        if not final:
            return
        highest = final[-1]
        reach = {n: frozenset(loss for loss, span in self._spans.items() if n in span) for n in final}
        for number in range(len(self._segments) - 1, highest, -1):  # Note [Early release] 4
            for losses in self._sums(reach.values(), number):
                self._send(number, losses - self._passed)
        for number in reversed(final):  # Note [Early release] 3
            onward = self._sums((reach[n] for n in final if n < number), number)
            for losses in onward:
                if losses != reach[number]:
                    self._send(number, losses)
            self._free(number, reach[number], propagates=reach[number] in onward)
        for segment in self._segments[highest + 1 :]:
            segment.hold()
        self._passed = self._passed.union(*reach.values())
        self._done = highest + 1

    def _first_not_final(self) -> int:
        """The lowest segment that a later loss may reach."""
        first = len(self._segments)
        for loss, window in self.calls.plan.windows.items():
            if loss not in self._spans:
                first = min(first, self._number_above.get(window.ends[0], first) if window.ends else 0)
        return first

    def _sums(self, groups: Iterable[Losses], number: int) -> list[Losses]:
        """The distinct sets of losses in `groups`, restricted to losses with heads in this segment or above."""
        here = frozenset(loss for loss, span in self._spans.items() if span[-1] >= number)
        return list(dict.fromkeys(losses & here for losses in groups if losses & here))

    def _send(self, number: int, losses: Losses) -> None:
        """Propagate the sum of these losses through a segment, computing input gradients only."""
        segment, below = self._segments[number], self._segments[number - 1]
        if not losses or below.has(losses):
            return
        edges, gradients = segment.arrived(losses)
        received: Gradients = [None] * len(below.sources)
        if edges and segment.leaves:
            self._check_paths(number, edges, losses)
            check_eager(edges, graph.everywhere, f"above the {segment.bottom}")
            received = list(_grad(edges, gradients, segment.leaves))
        below.lanes[losses] = received

    def _free(self, number: int, losses: Losses, *, propagates: bool) -> None:
        """Compute the gradients of a segment's weights, and free it."""
        segment = self._segments[number]
        edges, gradients = segment.arrived(losses)
        if edges:
            self._check_paths(number, edges, losses)
            # Without the leaves of the cut among the inputs, autograd leaves their gradients out.
            needed = None if propagates or not segment.leaves else _trainable(edges, segment.leaves)
            _backward(edges, gradients, needed)
        if propagates:
            self._segments[number - 1].lanes[losses] = [leaf.grad for leaf in segment.leaves]
        self._segments[number] = _Segment(segment.bottom, older=segment.older)

    def _check_paths(self, number: int, edges: Iterable[GradientEdge], losses: Losses) -> None:
        """Raise if a path leads from this segment around the cut at its bottom, or into another segment."""
        segment = self._segments[number]
        if self._names is None and not segment.older:
            return
        names = self._names or dict[Node, str]()
        came_from = graph.walk(edges, graph.everywhere)
        if segment.older and any(map(graph.hides_leaves, came_from)):
            raise EarlyReleaseError(
                f"layers above the {segment.bottom} without reentrant checkpointing",
                "a reentrant checkpoint, which needs one backward pass over the whole graph",
                "Use checkpoint(..., use_reentrant=False), or an ordinary forward and backward pass.",
            )
        inner = [(node, graph.number_of(node)) for node in came_from if not graph.is_leaf(node)]
        around = next((node for node, own in inner if own in segment.older), None)
        ended = [loss for loss in losses if segment.bottom in self.calls.plan.windows[loss].ends]
        if around is not None and ended:
            raise leak_error(ended[0], str(segment.bottom), around, came_from, names)
        # Another segment's node, such as its own cut, beside the one at the bottom: towers side by side.
        for node, own in inner:
            other = self._segment_of.setdefault(own, number)
            if around is None and other != number:
                around, segment = node, self._segments[max(number, other)]
        if around is not None:
            raise EarlyReleaseError(
                f"every backward path from above the {segment.bottom}, where a window ends, to cross it",
                f"a path around it, to {graph.nearest_name_below(around, names) or around.name()}",
                "Use an ordinary forward and backward pass, or let the window end where the paths have joined.",
            )


def _leaves_of(tensors: list[Tensor], place: str) -> tuple[list[Tensor], list[Tensor], Junction]:
    """New leaves in the same memory, and tensors computed from them, which in-place operations may modify."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    junction = Junction(place, 0, (), frozenset(), Lanes(), [get_gradient_edge(leaf) for leaf in leaves])
    return leaves, cross(junction, leaves)[0] if leaves else [], junction


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _backward(edges: list[GradientEdge], gradients: list[Tensor], inputs: list[Tensor] | None = None) -> None:
    """Accumulate into `.grad` of `inputs`; of all leaves if None."""
    if inputs is None or inputs:
        with _full_precision(gradients[0].device.type):
            torch.autograd.backward(edges, gradients, inputs=inputs)


def _grad(edges: list[GradientEdge], gradients: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Compute input gradients only, and retain the graph for a later backward pass."""
    with _full_precision(gradients[0].device.type):
        return torch.autograd.grad(edges, inputs, gradients, retain_graph=True, allow_unused=True)


def _full_precision(device: str) -> AbstractContextManager[object]:
    """Disable autocast, as backward passes require."""
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()


def _trainable(edges: Iterable[GradientEdge], leaves: Collection[Tensor]) -> list[Tensor]:
    """All leaves under the edges, except those given."""
    given = {id(leaf) for leaf in leaves}
    found = [graph.variable_of(node) for node in graph.walk(edges, graph.everywhere)]
    return [tensor for tensor in found if tensor is not None and id(tensor) not in given]


def _check_head(loss: str, result: Tensor, older: Collection[int], boundary: Boundary) -> None:
    """Raise if a head reads more of the model than its boundary's value."""
    head = graph.walk(graph.edges_of([result]), graph.everywhere)
    if any(graph.number_of(node) in older and not graph.is_leaf(node) for node in head):
        raise foreign_head_error(loss, str(boundary))


def _numbers(edges: Iterable[GradientEdge]) -> frozenset[int]:
    """Numbers of all nodes under the edges."""
    return frozenset(map(graph.number_of, graph.walk(edges, graph.everywhere)))
