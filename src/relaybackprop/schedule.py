"""WHO goes where: from the graph of one forward pass, each junction's route for the backward pass.

Also the place where a window that cannot work is found out: a path around its end, or compiled code in an overlap.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.autograd.graph import GradientEdge, Node

from relaybackprop import graph
from relaybackprop.errors import BoundaryError, CompiledOverlapError, LeakError
from relaybackprop.junction import Hop, Junction, Losses, Route


@dataclass(frozen=True)
class LossPath:
    """One loss's way as the forward pass laid it out.

    Args:
        outputs: edges under the loss's output.
        start: the junction where its head attaches; None for the primary loss, or where nothing needs a gradient.
        top: edges at the top of its window, under its head.
        end: the junction where its window ends; None if it goes down to the first layer.
    """

    outputs: Sequence[GradientEdge]
    start: Junction | None
    top: Sequence[GradientEdge]
    end: Junction | None


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

        def follow(node: Node, output: int, loss: str = loss, path: LossPath = path) -> bool:
            junction = junction_at(node, output)
            if junction is not None:
                arriving[junction.index].add(loss)
            return junction is None or junction is not path.end

        came_from = graph.walk(path.outputs, follow)
        reached |= dict.fromkeys(came_from)
        if path.start is not None:
            _check_head(loss, path.outputs, path.start)
        if path.end is not None:
            _check_leak(loss, came_from, path.end, names)
        depths[loss] = graph.longest_path(path.top, follow)
    for junction in junctions:
        if junction.in_place:
            _check_in_place(junction, reached)
    return Schedule(tuple(_routes(junctions, paths, arriving)), depths)


def shared_memory_error(boundary: str) -> BoundaryError:
    """For values at a boundary that are changed in place and read by another name."""
    return BoundaryError(
        f"the tensors of the {boundary} to be changed in place by no other name than the boundary's own",
        "a change in place of memory that is also read around the boundary, which autograd cannot follow there",
        "Use inplace=False where the value is changed.",
    )


def _check_in_place(junction: Junction, reached: Mapping[Node, None]) -> None:
    """The trunk goes on in place: whoever reads the boundary's source around the junction reads changed memory."""
    sources = {(edge.node, edge.output_nr) for edge in junction.sources}
    for node in reached:
        if getattr(node, "junction", None) is not junction and not sources.isdisjoint(node.next_functions):
            raise shared_memory_error(junction.boundary)


def _routes(
    junctions: Sequence[Junction], paths: Mapping[str, LossPath], arriving: Sequence[set[str]]
) -> Iterator[Route]:
    """Note [Lanes] in `relaybackprop.junction`, from the lowest junction up."""
    needed: list[set[Losses]] = []  # by junction, the lanes that have to be delivered to it
    for junction in junctions:
        above = frozenset(arriving[junction.index])
        kept = frozenset(loss for loss in above if paths[loss].end is not junction)
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
    """The junctions that a way down from here meets first."""
    met: set[int] = set()

    def follow(node: Node, output: int) -> bool:
        lower = junction_at(node, output)
        if lower is not None:
            met.add(lower.index)
        return lower is None

    graph.walk(junction.sources, follow)
    return met


def junction_at(node: Node, output: int) -> Junction | None:
    """The junction at this node, if the walk enters it from the trunk's side and not from a head's."""
    junction = getattr(node, "junction", None)
    return junction if isinstance(junction, Junction) and output < len(junction.sources) else None


def leak_error(
    loss: str, end: str, node: Node, came_from: Mapping[Node, Node | None], names: Mapping[Node, str]
) -> LeakError:
    """For a way from a loss around the end of its window.

    Args:
        loss: its name.
        end: the boundary in words.
        node: the first one below the end on this way.
        came_from: of the walk that found it.
        names: by node, the module that made it.
    """
    lower = graph.nearest_name_below(node, names) or node.name()
    upper = graph.nearest_name(came_from[node], names, came_from) or f"the loss {loss!r}"
    return LeakError(
        f"every way down from the loss {loss!r} to pass the end of its window, the {end}",
        f"a way around it: from {lower} (below) to {upper} (above)",
        "Let the window end where the two ways have joined or have not yet parted, such as the input or "
        "output of the whole block.",
    )


def foreign_head_error(loss: str, start: str) -> LeakError:
    """For a head that reads other inner values than its boundary's."""
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


def _check_leak(loss: str, came_from: Mapping[Node, Node | None], end: Junction, names: Mapping[Node, str]) -> None:
    below = graph.walk(end.sources, graph.everywhere)
    for node in came_from:
        # Parameters may be shared: each use counts where it happens.
        if node in below and not graph.is_leaf(node):
            raise leak_error(loss, end.boundary, node, came_from, names)


def _check_head(loss: str, outputs: Sequence[GradientEdge], start: Junction) -> None:
    """A head that reads other inner values than its boundary's would send gradients past the lanes."""
    head = graph.walk(outputs, lambda node, _output: getattr(node, "junction", None) is not start)
    below = graph.walk(start.sources, graph.everywhere)
    if any(node in below and not graph.is_leaf(node) for node in head):
        raise foreign_head_error(loss, start.boundary)
