"""Routing: derive each junction's backward route from the graph of one forward pass.

This is where a path around the end of a window, and compiled code in an overlap, are detected.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.autograd.graph import GradientEdge, Node

from relaybackprop.engine import graph
from relaybackprop.engine.junction import Hop, Junction, Losses, Route
from relaybackprop.engine.memory import shared_memory_error
from relaybackprop.errors import CompiledOverlapError, LeakError


@dataclass(frozen=True)
class LossPath:
    """The path of one loss through the recorded graph.

    Args:
        items: edges under each tensor of the loss's output, by the tensor's keys.
        start: the junction where its head attaches; None for the primary loss, or where nothing needs a gradient.
        top: edges at the top of its window, under its head.
        ends: the junctions where its window ends; empty if it reaches the first layer.
    """

    items: Mapping[tuple[Any, ...], Sequence[GradientEdge]]
    start: Junction | None
    top: Sequence[GradientEdge]
    ends: tuple[Junction, ...]

    @property
    def outputs(self) -> list[GradientEdge]:
        """Edges under the loss's output."""
        return [edge for edges in self.items.values() for edge in edges]


@dataclass(frozen=True)
class Schedule:
    """The routes of all junctions, from the lowest up, and the depth of each loss's window in weight layers."""

    routes: tuple[Route, ...]
    depths: Mapping[str, int]

    def apply(self, junctions: Sequence[Junction], edges: Sequence[list[GradientEdge]]) -> None:
        """Assign their routes to the junctions of one forward pass.

        Args:
            junctions: from the lowest up.
            edges: the edges above each of them, where lanes end.

        Raises:
            CompiledOverlapError: a lane would have to run through compiled code.
        """
        for junction, route in zip(junctions, self.routes, strict=True):
            targets = {target for hop in route.hops for target, _ in hop.targets}
            junction.below = {target: edges[target] for target in targets}
            junction.route = route
            if route.hops:
                check_eager(junction.sources, _between_junctions, f"below the {junction.boundary}")


def make_schedule(junctions: Sequence[Junction], paths: Mapping[str, LossPath], names: Mapping[Node, str]) -> Schedule:
    """Derive each junction's route from the graph of one forward pass.

    Args:
        junctions: all of the pass, from the lowest up.
        paths: by loss.
        names: by node, the module that made it, for error messages.

    Raises:
        LeakError: a path leads around the end of a window, or a head reads more than its boundary.
        BoundaryError: a boundary's value is changed in place and read around the junction.
    """
    arriving = [set[str]() for _ in junctions]
    depths: dict[str, int] = {}
    reached: dict[Node, None] = {}
    for loss, path in paths.items():

        def arrive(node: Node, output: int, loss: str = loss) -> bool:
            junction = junction_at(node, output)
            if junction is not None:
                arriving[junction.index].add(loss)
            return junction is None or loss not in junction.ending

        came_from = graph.walk(path.outputs, arrive)
        reached |= dict.fromkeys(came_from)
        if path.start is not None:
            _check_head(loss, path.outputs, path.start)
        if path.ends:
            _check_leak(loss, path, came_from, names)
        depths[loss] = graph.longest_path(path.top, inside(loss))
    for junction in junctions:
        if junction.in_place:
            _check_in_place(junction, reached)
    return Schedule(tuple(_routes(junctions, arriving)), depths)


def _check_in_place(junction: Junction, reached: Mapping[Node, None]) -> None:
    """Raise if a node bypasses the junction and reads its source, which the trunk modifies in place."""
    sources = {(edge.node, edge.output_nr) for edge in junction.sources}
    for node in reached:
        if getattr(node, "junction", None) is not junction and not sources.isdisjoint(node.next_functions):
            raise shared_memory_error(junction.boundary)


def inside(loss: str) -> graph.Follow:
    """A `Follow` that stops at the ends of a loss's window."""

    def follow(node: Node, output: int) -> bool:
        junction = junction_at(node, output)
        return junction is None or loss not in junction.ending

    return follow


def _routes(junctions: Sequence[Junction], arriving: Sequence[set[str]]) -> Iterator[Route]:
    """Note [Lanes] in `relaybackprop.engine.junction`, from the lowest junction up."""
    needed: list[set[Losses]] = []  # by junction, the lanes to deliver to it
    for junction in junctions:
        above = frozenset(arriving[junction.index])
        staying = frozenset(loss for loss in above if loss not in junction.ending)
        onward = staying.union(junction.heads)
        targets: dict[Losses, list[tuple[int, Losses]]] = {}
        for lower in sorted(_next_below(junction)):
            for lane in needed[lower]:
                if lane & onward:
                    targets.setdefault(lane & onward, []).append((lower, lane))
        # The sum of all losses that arrive needs no lane: the ordinary pass carries it.
        needed.append({staying, *(losses & above for losses in targets)} - {frozenset(), above})
        yield Route(above, onward, tuple(Hop(losses, tuple(to)) for losses, to in targets.items()))


def _next_below(junction: Junction) -> set[int]:
    """The first junctions on the paths below this one."""
    met: set[int] = set()

    def follow(node: Node, output: int) -> bool:
        lower = junction_at(node, output)
        if lower is not None:
            met.add(lower.index)
        return lower is None

    graph.walk(junction.sources, follow)
    return met


def junction_at(node: Node, output: int) -> Junction | None:
    """The junction at this node, if the walk enters it from the trunk rather than from a head."""
    junction = getattr(node, "junction", None)
    return junction if isinstance(junction, Junction) and output < len(junction.sources) else None


def leak_error(
    loss: str,
    ends: str,
    node: Node,
    came_from: Mapping[Node, Node | None],
    names: Mapping[Node, str],
    unread: Sequence[str] = (),
) -> LeakError:
    """The error for a path from a loss around the ends of its window, to `node` below them.

    `came_from` is the result of the walk that found it. `unread` names the items of the model's output whose paths lead
    around, if those of other items do not.
    """
    lower = graph.nearest_name_below(node, names)
    upper = graph.nearest_name(came_from[node], names, came_from) or f"the loss {loss!r}"
    remedy = (
        "Let the window end where the two paths have joined or not yet split, such as the input or output of "
        f"the whole block, or end it on both: after=(..., {lower or '...'!r})."
    )
    if unread:
        remedy = (
            f"The path starts at {', '.join(unread)} of the model's output. If the primary loss does not read that, "
            "name what it reads, for example Relay(..., output='logits') or output=lambda output: output[0]."
        )
    return LeakError(
        f"every backward path of the loss {loss!r} to cross the end of its window, the {ends}",
        f"a path around it: from {lower or node.name()} (below) to {upper} (above)",
        remedy,
    )


def foreign_head_error(loss: str, start: str) -> LeakError:
    """The error for a head that reads values of the model other than its boundary's."""
    return LeakError(
        f"the head {loss!r} to read the {start} and nothing else of the model",
        "a head that also reads values from layers below, directly or inside an object of an unknown type",
        "Let the module at the boundary return all inputs of the head, as tensors in tuples, mappings or dataclasses.",
    )


def check_eager(edges: Sequence[GradientEdge], follow: graph.Follow, place: str) -> None:
    """Raise `CompiledOverlapError` if a walk from `edges` finds compiled code; `place` describes the layers."""
    if any(node.name().startswith("CompiledFunction") for node in graph.walk(edges, follow)):
        raise CompiledOverlapError(
            f"eager layers {place}, where windows overlap and gradients propagate more than once",
            "compiled code, which may have freed or silently overwritten its buffers before the second gradient",
            "Compile only layers outside the overlap, module by module.",
        )


def _between_junctions(node: Node, output: int) -> bool:
    return junction_at(node, output) is None


def _check_leak(loss: str, path: LossPath, came_from: Mapping[Node, Node | None], names: Mapping[Node, str]) -> None:
    below = graph.walk((edge for end in path.ends for edge in end.sources), graph.everywhere)

    def leaks(nodes: Iterable[Node]) -> Node | None:  # parameters may be shared, so look for their uses
        return next((node for node in nodes if node in below and graph.uses_leaf(node)), None)

    node = leaks(came_from)
    if node is None:
        return
    around = [keys for keys, edges in path.items.items() if leaks(graph.walk(edges, inside(loss))) is not None]
    unread = ["".join(f"[{key!r}]" for key in keys) for keys in around] if len(around) < len(path.items) else []
    ends = " and the ".join(end.boundary for end in path.ends)
    raise leak_error(loss, ends, node, came_from, names, unread)


def _check_head(loss: str, outputs: Sequence[GradientEdge], start: Junction) -> None:
    """Raise if a head reads values other than its boundary's: their gradients would bypass the lanes."""
    head = graph.walk(outputs, lambda node, _output: getattr(node, "junction", None) is not start)
    below = graph.walk(start.sources, graph.everywhere)
    if any(node in below and not graph.is_leaf(node) for node in head):
        raise foreign_head_error(loss, start.boundary)
