"""Routing: derive each junction's backward route from the graph of one forward pass.

Windows that cannot work are detected here: a path around the end of a window, or compiled code in an overlap.
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
        items: edges under each tensor of the loss's output, by the keys that lead to it.
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
        """Set the junctions of one forward pass on their routes.

        Args:
            junctions: from the lowest up.
            edges: the edges above each of them, to which lanes are sent.

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
    """Walk the graph of one forward pass and decide each junction's route.

    Args:
        junctions: all of the pass, from the lowest up.
        paths: by loss.
        names: by node, the module that made it, for error messages.

    Raises:
        LeakError: a loss finds a way around the end of its window, or a head reads more than its boundary.
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
    """The trunk continues in place: a reader of the boundary's source around the junction reads changed memory."""
    sources = {(edge.node, edge.output_nr) for edge in junction.sources}
    for node in reached:
        if getattr(node, "junction", None) is not junction and not sources.isdisjoint(node.next_functions):
            raise shared_memory_error(junction.boundary)


def inside(loss: str) -> graph.Follow:
    """Follow the graph down to the ends of a loss's window."""

    def follow(node: Node, output: int) -> bool:
        junction = junction_at(node, output)
        return junction is None or loss not in junction.ending

    return follow


def _routes(junctions: Sequence[Junction], arriving: Sequence[set[str]]) -> Iterator[Route]:
    """Note [Lanes] in `relaybackprop.engine.junction`, from the lowest junction up."""
    needed: list[set[Losses]] = []  # by junction, the lanes that have to be delivered to it
    for junction in junctions:
        above = frozenset(arriving[junction.index])
        kept = frozenset(loss for loss in above if loss not in junction.ending)
        onward = kept.union(junction.heads)
        targets: dict[Losses, list[tuple[int, Losses]]] = {}
        for lower in sorted(_next_below(junction)):
            for lane in needed[lower]:
                if lane & onward:
                    targets.setdefault(lane & onward, []).append((lower, lane))
        # What arrives as a whole needs no lane: it is the ordinary pass.
        needed.append({kept, *(losses & above for losses in targets)} - {frozenset(), above})
        yield Route(above, onward, tuple(Hop(losses, tuple(to)) for losses, to in targets.items()))


def _next_below(junction: Junction) -> set[int]:
    """The junctions that the paths down from here meet first."""
    met: set[int] = set()

    def follow(node: Node, output: int) -> bool:
        lower = junction_at(node, output)
        if lower is not None:
            met.add(lower.index)
        return lower is None

    graph.walk(junction.sources, follow)
    return met


def junction_at(node: Node, output: int) -> Junction | None:
    """The junction at this node, if the walk enters it from the trunk's side rather than a head's."""
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
    """The error for a path from a loss around the ends of its window.

    Args:
        loss: its name.
        ends: the boundaries in words.
        node: the first one below the ends on this path.
        came_from: of the walk that found it.
        names: by node, the module that made it.
        unread: items of the model's output that alone lead around, if the others do not.
    """
    lower = graph.nearest_name_below(node, names)
    upper = graph.nearest_name(came_from[node], names, came_from) or f"the loss {loss!r}"
    remedy = (
        "Let the window end where the two paths have joined or have not yet parted, such as the input or output of "
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
    """The error for a head that reads other inner values than its boundary's."""
    return LeakError(
        f"the head {loss!r} to read the {start} and nothing else of the model",
        "a head that also reads values from further below, directly or inside of an object of an unknown type",
        "Let the module at the boundary return all that the head needs, as tensors in tuples, mappings or dataclasses.",
    )


def check_eager(edges: Sequence[GradientEdge], follow: graph.Follow, place: str) -> None:
    """Raise if there is compiled code where gradients pass more than once.

    Args:
        edges: from which they start.
        follow: how far they go.
        place: in words.

    Raises:
        CompiledOverlapError: there is.
    """
    if any(node.name().startswith("CompiledFunction") for node in graph.walk(edges, follow)):
        raise CompiledOverlapError(
            f"eager layers {place}, where windows overlap and gradients pass more than once",
            "compiled code, whose buffers may be gone, or silently stale, when the second gradient comes",
            "Compile the layers outside of the overlap only, module by module.",
        )


def _between_junctions(node: Node, output: int) -> bool:
    return junction_at(node, output) is None


def _check_leak(loss: str, path: LossPath, came_from: Mapping[Node, Node | None], names: Mapping[Node, str]) -> None:
    below = graph.walk((edge for end in path.ends for edge in end.sources), graph.everywhere)

    def leaks(nodes: Iterable[Node]) -> Node | None:  # parameters may be shared: each use counts where it happens
        return next((node for node in nodes if node in below and graph.uses_leaf(node)), None)

    node = leaks(came_from)
    if node is None:
        return
    around = [keys for keys, edges in path.items.items() if leaks(graph.walk(edges, inside(loss))) is not None]
    unread = ["".join(f"[{key!r}]" for key in keys) for keys in around] if len(around) < len(path.items) else []
    ends = " and the ".join(end.boundary for end in path.ends)
    raise leak_error(loss, ends, node, came_from, names, unread)


def _check_head(loss: str, outputs: Sequence[GradientEdge], start: Junction) -> None:
    """A head that reads other inner values than its boundary's would send gradients past the lanes."""
    head = graph.walk(outputs, lambda node, _output: getattr(node, "junction", None) is not start)
    below = graph.walk(start.sources, graph.everywhere)
    if any(node in below and not graph.is_leaf(node) for node in head):
        raise foreign_head_error(loss, start.boundary)
