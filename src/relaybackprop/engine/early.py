"""Early release: run each loss's backward pass as soon as the forward pass reaches its head.

Note [Early release]
1. The graph is cut at the lower end of each window: the layers above the cut read new leaves, where their graph ends. A
   *segment* is the part of the graph between two cuts.
2. A segment is *final* when no later loss reaches it. Later losses have their heads higher up, and the layers that they
   do not reach are below their windows, so the final segments are the lowest ones.
3. When a segment becomes final, one backward pass computes the gradients of its weights from the sum of all losses that
   reach it, as in Note [Lanes] 1 of `relaybackprop.engine.junction`, and frees its saved tensors. The layers above have
   not run yet.
4. To reach a final segment, a loss may have to cross segments that are not final, where it overlaps with later losses.
   It crosses them in a lane: a pass that computes input gradients only and retains the graph. Its gradients at its head
   and at each cut are held, and join the sum when the segment becomes final.
5. So a segment with G distinct sums costs W + G*D, as in one backward pass over the full graph, minus the lowest input
   gradient of each overlap, which is not needed when its segments become final.
6. Saved tensors of a segment live from its forward pass until the backward pass of the last loss whose window contains
   it, so the peak is the memory that the largest window saves.
"""

from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from relaybackprop.engine import graph
from relaybackprop.engine.calls import Calls
from relaybackprop.engine.junction import Gradients, Junction, Lanes, Losses, add, cross
from relaybackprop.engine.memory import InPlaceCheck
from relaybackprop.engine.pytree import replace_tensors, tensors_in
from relaybackprop.engine.routes import check_eager, foreign_head_error, leak_error, same_ends
from relaybackprop.errors import EarlyReleaseError
from relaybackprop.plan import PRIMARY, Boundary

Compute = Callable[[str, Any], Tensor]
"""Computes one loss, weighted and scaled, from its name and the value that its head reads."""


@dataclass(eq=False)
class _Segment:
    """The part of the graph between two cuts.

    Args:
        bottom: the cut at its lower end; None for the lowest segment.
        leaves: the leaves that replace the tensors of that cut.
        older_nodes: sequence numbers of the nodes below the cut, to find paths that bypass it.
        cut: the gradient edges below the cut, for error messages. Set only while the graph is searched and cleared when
            the segment is freed, because the edges keep their nodes.
    """

    bottom: Boundary | None = None
    leaves: list[Tensor] = field(default_factory=list[Tensor])
    older_nodes: frozenset[int] = frozenset()
    cut: list[GradientEdge] = field(default_factory=list[GradientEdge])
    # Gradients at its heads, and gradients from above at its upper end, by set of losses. `held` is the sum of the
    # gradients that were already sent to lower segments, and `held_losses` are their losses.
    heads: dict[str, tuple[list[GradientEdge], Gradients]] = field(
        default_factory=dict[str, tuple[list[GradientEdge], Gradients]]
    )
    sources: list[GradientEdge] = field(default_factory=list[GradientEdge])
    lanes: dict[Losses, Gradients] = field(default_factory=dict[Losses, Gradients])
    held_losses: Losses = frozenset()
    held: Gradients = field(default_factory=Gradients)

    def gradients_of(self, losses: Losses) -> tuple[list[GradientEdge], list[Tensor]]:
        """Return the edges in this segment where a backward pass of these losses starts, and their gradients."""
        groups = [group for name, group in self.heads.items() if name in losses]
        above = losses.difference(self.heads)
        if above:
            groups.append((self.sources, self._from_above(above)))
        pairs = [(edge, g) for edges, gradients in groups for edge, g in zip(edges, gradients, strict=True)]
        nonzero = [(edge, g) for edge, g in pairs if g is not None]
        return [edge for edge, _ in nonzero], [g for _, g in nonzero]

    def _from_above(self, losses: Losses) -> Gradients:
        if losses in self.lanes:
            return self.lanes[losses]
        unheld = losses - self.held_losses
        return add(self.held, self.lanes[unheld]) if unheld else self.held

    def has(self, losses: Losses) -> bool:
        """Return whether the sum of exactly these losses has already arrived from above."""
        return losses in self.lanes or losses == self.held_losses

    def hold(self) -> None:
        """Hold the gradients sent to lower segments, to add them to those of later losses."""
        if self.lanes:
            # Lanes are nested sums of losses that were not held before, so the largest includes all of them.
            losses, gradients = max(self.lanes.items(), key=lambda lane: len(lane[0]))
            self.held = add(gradients, self.held) if self.held_losses else gradients
            self.held_losses |= losses
            self.lanes.clear()


class EarlyRelease:
    """A forward pass that frees each window as early as possible: the state of one `Relay.forward_backward`.

    Args:
        calls: records the boundaries crossed.
        compute: runs a head and a criterion.
        names: the modules at each node. None if an earlier step with this plan has already searched the graph
            for paths that bypass a cut.

    Attributes:
        depths: the depth of each loss's window, as in `Relay`; set during the search.
    """

    def __init__(self, calls: Calls, compute: Compute, names: graph.ModuleNames | None) -> None:
        self.calls = calls
        self.depths: dict[str, int] = {}
        self._in_place = InPlaceCheck()
        self._heights: list[int] = []  # for each segment, weight layers on the longest path through it
        self._compute = compute
        self._names = names
        self._segments = [_Segment()]
        self._segment_above: dict[Boundary, int] = {}  # for each cut, the index of the segment above it
        self._segment_of_node: dict[int, int] = {}  # by sequence number, the segment that first reached the node
        self._spans: dict[str, range] = {}  # for each loss computed, the segments in its window
        self._propagated: Losses = frozenset()  # losses propagated to the end of their windows
        self._lowest_live = 0  # index of the lowest segment that is not final

    def cross(self, boundary: Boundary, place: Boundary, value: Any) -> Any:
        """Compute the losses attached here, free every final segment, and cut the graph if a window ends here."""
        self.calls.enter(boundary, place, value)
        heads = self.calls.heads_at(boundary, place)
        if heads:
            with self._suspended():
                for name in heads:
                    self.calls.check_order(name)
                    self._start(name, value, boundary)
                self._release(self._end_of_final())
        if any(boundary in window.ends for window in self.calls.plan.windows.values()):
            return self._cut(boundary, place, value)
        return value

    def finish(self, output: Any) -> None:
        """Compute the primary loss from the model's output and free the rest."""
        self.calls.check()
        self.calls.check_has_tensors(f"the output for the loss {PRIMARY!r}", output)
        with self._suspended():
            self._start(PRIMARY, output, None)
            self._release(len(self._segments))

    @contextmanager
    def _suspended(self) -> Generator[None]:
        """Suspend the forward pass, and any checkpointing around it, while heads and backward passes run."""
        self.calls.suspended = True
        try:
            # Only the innermost hooks apply, so these replace the hooks of a checkpoint around the boundary.
            with saved_tensors_hooks(_identity, _identity):
                yield
        finally:
            self.calls.suspended = False

    def _cut(self, boundary: Boundary, place: Boundary, value: Any) -> Any:
        """Start a new segment: replace the tensors at a cut by leaves that the layers above read."""
        tensors = [tensor for tensor in tensors_in(value) if tensor.requires_grad]
        previous, segment = self._segments[-1], _Segment(place)
        sources = [get_gradient_edge(tensor) for tensor in tensors]
        if self._names is not None or place != boundary:  # a module was skipped, so this graph was not searched yet
            segment.older_nodes = previous.older_nodes | _node_numbers(sources)
        if self._names is not None:
            segment.cut = sources
            self._heights.append(graph.longest_path(sources, graph.follow_all))
        if len(self._segments) > self._lowest_live:  # the segment below is not freed: gradients may reach this cut
            previous.sources = sources
        self._segments.append(segment)
        self._segment_above[boundary] = len(self._segments) - 1
        if not tensors:  # nothing below needs a gradient
            return value
        index = len(self._segments) - 1
        segment.leaves, crossed, junction = _leaves_of(tensors, str(place), index)
        self._segment_of_node |= {graph.sequence_number(edge.node): index for edge in graph.edges_of(crossed)}
        if self._names is not None:
            self._in_place.watch(junction, tensors, sources, crossed)
        return replace_tensors(value, tensors, crossed)

    def _start(self, loss: str, value: Any, boundary: Boundary | None) -> None:
        """Compute one loss, and its gradient at its head's input or at the model's output."""
        tensors = [tensor for tensor in tensors_in(value) if tensor.requires_grad]
        without_grad = [tensor for tensor in tensors_in(value) if not tensor.requires_grad]
        edges = [get_gradient_edge(tensor) for tensor in tensors]
        inputs, constants = tensors, without_grad
        if boundary is not None:  # a head may modify its input in place, which the layers above also read
            inputs = [tensor.detach().clone() for tensor in tensors]
            constants = [tensor.clone() for tensor in without_grad]
        leaves, crossed, _ = _leaves_of(inputs, f"head {loss}")
        result = self._compute(loss, replace_tensors(value, [*tensors, *without_grad], [*crossed, *constants]))
        if self._names is not None and boundary is not None:
            _check_head(loss, result, self._segments[-1].older_nodes | _node_numbers(edges), boundary)
        if result.requires_grad:
            with _autocast_disabled(result.device.type):
                result.backward()  # pyright: ignore[reportUnknownMemberType]
        # The window spans the segments from its end up to the current one, which contains the head.
        ends, last = self.calls.plan.windows[loss].ends, len(self._segments) - 1
        self._spans[loss] = range(self._segment_above[ends[0]] if ends else 0, last + 1)
        if self._names is not None:
            highest = graph.longest_path(edges, graph.follow_all)
            self.depths[loss] = highest + sum(self._heights[segment] for segment in self._spans[loss][:-1])
        self._segments[last].heads[loss] = edges, [leaf.grad for leaf in leaves]

    def _release(self, end: int) -> None:
        """Propagate the losses computed so far to every final segment, those below index `end`, and free them."""
        final = range(self._lowest_live, end)
        if not final:
            return
        self._in_place.check(end)
        highest = final[-1]
        # The losses that reach each final segment. No later loss does, so these are its complete sums.
        reaching = {n: frozenset(loss for loss, span in self._spans.items() if n in span) for n in final}
        # Through the segments that are not final, from the top: lanes only (Note [Early release] 4).
        for index in range(len(self._segments) - 1, highest, -1):
            for losses in self._sums(reaching.values(), index):
                self._send(index, losses - self._propagated)
        # Through the final segments: lanes of other sums than the segment's own, then the pass that frees the segment
        # (Note [Early release] 3).
        for index in reversed(final):
            outgoing = self._sums((reaching[n] for n in final if n < index), index)
            for losses in outgoing:
                if losses != reaching[index]:
                    self._send(index, losses)
            self._free(index, reaching[index], propagates=reaching[index] in outgoing)
        for segment in self._segments[highest + 1 :]:
            segment.hold()
        self._propagated = self._propagated.union(*reaching.values())
        self._lowest_live = highest + 1

    def _end_of_final(self) -> int:
        """Return the index of the lowest segment that a later loss may reach."""
        end = len(self._segments)
        for loss, window in self.calls.plan.windows.items():
            if loss not in self._spans:
                end = min(end, self._segment_above.get(window.ends[0], end) if window.ends else 0)
        return end

    def _sums(self, sets: Iterable[Losses], index: int) -> list[Losses]:
        """Return the distinct sets of losses in `sets`, restricted to losses with heads in this segment or above."""
        active = frozenset(loss for loss, span in self._spans.items() if span[-1] >= index)
        return list(dict.fromkeys(losses & active for losses in sets if losses & active))

    def _send(self, index: int, losses: Losses) -> None:
        """Propagate the sum of these losses through a segment, computing input gradients only."""
        segment, below = self._segments[index], self._segments[index - 1]
        if not losses or below.has(losses):
            return
        edges, gradients = segment.gradients_of(losses)
        received: Gradients = [None] * len(below.sources)
        if edges and segment.leaves:
            self._check_paths(index, edges, losses)
            check_eager(edges, graph.follow_all, f"above the {segment.bottom}")
            received = list(_grad(edges, gradients, segment.leaves))
        below.lanes[losses] = received

    def _free(self, index: int, losses: Losses, *, propagates: bool) -> None:
        """Compute the gradients of a segment's weights and free it."""
        segment = self._segments[index]
        edges, gradients = segment.gradients_of(losses)
        if edges:
            self._check_paths(index, edges, losses)
            # If nothing propagates below, exclude the leaves of the cut, so that autograd skips their gradients.
            needed = None if propagates or not segment.leaves else _other_leaves(edges, segment.leaves)
            _backward(edges, gradients, needed)
        if propagates:
            self._segments[index - 1].lanes[losses] = [leaf.grad for leaf in segment.leaves]
        # Drops the last references to the segment's graph.
        self._segments[index] = _Segment(segment.bottom, [], segment.older_nodes)

    def _check_paths(self, index: int, edges: Iterable[GradientEdge], losses: Losses) -> None:
        """Raise if a path from this segment bypasses the cut at its lower end, or leads into a different segment."""
        segment = self._segments[index]
        if self._names is None and not segment.older_nodes:
            return
        names = self._names or graph.ModuleNames()
        parents = graph.walk(edges, graph.follow_all)
        if segment.older_nodes and any(map(graph.is_reentrant_checkpoint, parents)):
            raise EarlyReleaseError(
                f"a reentrant checkpoint above the {segment.bottom}",
                "reentrant checkpointing requires one backward pass over the full graph",
                "Use checkpoint(..., use_reentrant=False), or an ordinary forward and backward pass.",
            )
        inner_nodes = [(node, graph.sequence_number(node)) for node in parents if not graph.is_leaf(node)]
        bypass = next((node for node, node_number in inner_nodes if node_number in segment.older_nodes), None)
        windows = self.calls.plan.windows.items()
        ending = [loss for loss, window in windows if loss in losses and segment.bottom in window.ends]
        if bypass is not None and ending:
            assert segment.bottom is not None, "only the lowest segment has no cut, and no nodes are below it"
            older, ends = segment.older_nodes, {segment.bottom: same_ends(segment.bottom, segment.cut, names) or [None]}
            raise leak_error(
                ending[0],
                ends,
                edges,
                graph.follow_all,
                lambda node: graph.sequence_number(node) in older,
                names,
                early=True,
            )
        # A node of a different segment, such as a cut in a parallel tower, can be reached without crossing this cut.
        for node, node_number in inner_nodes:
            other = self._segment_of_node.setdefault(node_number, index)
            if bypass is None and other != index:
                bypass, segment = node, self._segments[max(index, other)]
        if bypass is not None:
            raise EarlyReleaseError(
                f"a path to {graph.nearest_name_below(bypass, names) or bypass.name()} bypasses the {segment.bottom}",
                "a window ends there, and early release requires every backward path from above to cross it",
                "Use an ordinary forward and backward pass, or end the window where the paths have joined.",
            )


def _leaves_of(tensors: list[Tensor], place: str, index: int = 0) -> tuple[list[Tensor], list[Tensor], Junction]:
    """Return new leaves in the same memory, and tensors computed from them that may be modified in place."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    junction = Junction(place, index, (), frozenset(), Lanes(), [get_gradient_edge(leaf) for leaf in leaves])
    return leaves, cross(junction, leaves)[0] if leaves else [], junction


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _backward(edges: list[GradientEdge], gradients: list[Tensor], inputs: list[Tensor] | None = None) -> None:
    """Accumulate gradients into `.grad` of `inputs`, or of all leaves if None."""
    if inputs is None or inputs:
        with _autocast_disabled(gradients[0].device.type):
            torch.autograd.backward(edges, gradients, inputs=inputs)


def _grad(edges: list[GradientEdge], gradients: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Compute input gradients only, and retain the graph for a later backward pass."""
    with _autocast_disabled(gradients[0].device.type):
        return torch.autograd.grad(edges, inputs, gradients, retain_graph=True, allow_unused=True)


def _autocast_disabled(device: str) -> AbstractContextManager[object]:
    """Disable autocast, as backward passes require."""
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()


def _other_leaves(edges: Iterable[GradientEdge], leaves: Collection[Tensor]) -> list[Tensor]:
    """Return all leaves below the edges except the given ones."""
    excluded = {id(leaf) for leaf in leaves}
    variables = [graph.variable_of(node) for node in graph.walk(edges, graph.follow_all)]
    return [tensor for tensor in variables if tensor is not None and id(tensor) not in excluded]


def _check_head(loss: str, result: Tensor, older_nodes: Collection[int], boundary: Boundary) -> None:
    """Raise `LeakError` if a head reads values of the model other than those at its boundary."""
    nodes = graph.walk(graph.edges_of([result]), graph.follow_all)
    if any(graph.sequence_number(node) in older_nodes and not graph.is_leaf(node) for node in nodes):
        raise foreign_head_error(loss, str(boundary))


def _node_numbers(edges: Iterable[GradientEdge]) -> frozenset[int]:
    """Return the sequence numbers of all nodes below the edges."""
    return frozenset(map(graph.sequence_number, graph.walk(edges, graph.follow_all)))
