"""Routing: derive each junction's backward route from the graph of one forward pass.

This module also detects paths that bypass the end of a window, and compiled code in an overlap.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.autograd.graph import GradientEdge, Node

from relaybackprop.engine import graph
from relaybackprop.engine.junction import Hop, Junction, Losses, Route
from relaybackprop.engine.memory import in_place_error
from relaybackprop.errors import CompiledOverlapError, LeakError
from relaybackprop.plan import Boundary

MAX_ENDS = 6  # the longest list of ends that an error proposes


@dataclass(frozen=True)
class LossPath:
    """The path of one loss through the recorded graph.

    Args:
        items: gradient edges of each tensor of the loss's output, by the tensor's keys.
        start: the junction where its head attaches; None for the primary loss, or if nothing there needs a gradient.
        top: gradient edges at the top of its window, below its head.
        ends: the junctions where its window ends, by place; empty if it reaches the first layer.
    """

    items: Mapping[tuple[Any, ...], Sequence[GradientEdge]]
    start: Junction | None
    top: Sequence[GradientEdge]
    ends: Mapping[Boundary, Junction]

    @property
    def outputs(self) -> list[GradientEdge]:
        """The gradient edges of the loss's output."""
        return [edge for edges in self.items.values() for edge in edges]


@dataclass(frozen=True)
class Schedule:
    """The routes of all junctions from lowest to highest, and the depth of each loss's window in weight layers."""

    routes: tuple[Route, ...]
    depths: Mapping[str, int]

    def apply(self, junctions: Sequence[Junction], edges: Sequence[list[GradientEdge]]) -> None:
        """Assign the routes to the junctions of one forward pass.

        Args:
            junctions: the junctions, from lowest to highest.
            edges: the gradient edges above each junction, where lanes end.

        Raises:
            CompiledOverlapError: a lane would run through compiled code.
        """
        for junction, route in zip(junctions, self.routes, strict=True):
            targets = {target for hop in route.hops for target, _ in hop.targets}
            junction.below = {target: edges[target] for target in targets}
            junction.route = route
            if route.hops:
                check_eager(junction.sources, _between_junctions, f"below the {junction.boundary}")


def make_schedule(junctions: Sequence[Junction], paths: Mapping[str, LossPath], names: graph.ModuleNames) -> Schedule:
    """Derive each junction's route from the graph of one forward pass.

    Args:
        junctions: all junctions of the pass, from lowest to highest.
        paths: the path of each loss.
        names: the modules at each node, for error messages.

    Raises:
        LeakError: a path bypasses the end of a window, or a head reads more than its boundary.
        BoundaryError: a boundary's value is modified in place and also read on a path around the junction.
    """
    incoming = [set[str]() for _ in junctions]
    depths: dict[str, int] = {}
    reached: dict[Node, None] = {}
    for loss, path in paths.items():

        def arrive(node: Node, output: int, loss: str = loss) -> bool:
            junction = junction_at(node, output)
            if junction is not None:
                incoming[junction.index].add(loss)
            return junction is None or loss not in junction.ending

        parents = graph.walk(path.outputs, arrive)
        reached |= dict.fromkeys(parents)
        if path.start is not None:
            _check_head(loss, path.outputs, path.start)
        if path.ends:
            _check_leak(loss, path, parents, names)
        depths[loss] = graph.longest_path(path.top, within_window(loss))
    for junction in junctions:
        if junction.in_place:
            _check_in_place(junction, reached)
    return Schedule(tuple(_routes(junctions, incoming)), depths)


def _check_in_place(junction: Junction, reached: Mapping[Node, None]) -> None:
    """Raise if a node other than the junction reads its source, which the trunk modifies in place."""
    sources = {(edge.node, edge.output_nr) for edge in junction.sources}
    for node in reached:
        if getattr(node, "junction", None) is not junction and not sources.isdisjoint(node.next_functions):
            raise in_place_error(junction.boundary)


def within_window(loss: str) -> graph.Follow:
    """Return a `Follow` that stops at the ends of a loss's window."""

    def follow(node: Node, output: int) -> bool:
        junction = junction_at(node, output)
        return junction is None or loss not in junction.ending

    return follow


def _routes(junctions: Sequence[Junction], incoming: Sequence[set[str]]) -> Iterator[Route]:
    """Yield the route of each junction, from lowest to highest: Note [Lanes] in `relaybackprop.engine.junction`."""
    needed: list[set[Losses]] = []  # for each junction, the lanes to deliver to it
    for junction in junctions:
        above = frozenset(incoming[junction.index])
        continuing = frozenset(loss for loss in above if loss not in junction.ending)
        outgoing = continuing.union(junction.heads)
        # This junction sends the lanes that the next junctions below need, one hop for each distinct sum.
        targets: dict[Losses, list[tuple[int, Losses]]] = {}
        for lower in sorted(_next_below(junction)):
            for lane in needed[lower]:
                if lane & outgoing:
                    targets.setdefault(lane & outgoing, []).append((lower, lane))
        # Its lanes are the sets of losses that it returns and sends, except the sum of all incoming losses (ordinary
        # pass).
        needed.append({continuing, *(losses & above for losses in targets)} - {frozenset(), above})
        yield Route(above, outgoing, tuple(Hop(losses, tuple(to)) for losses, to in targets.items()))


def _next_below(junction: Junction) -> set[int]:
    """Return the indices of the first junctions on the paths below this one."""
    reached_below: set[int] = set()

    def follow(node: Node, output: int) -> bool:
        lower = junction_at(node, output)
        if lower is not None:
            reached_below.add(lower.index)
        return lower is None

    graph.walk(junction.sources, follow)
    return reached_below


def junction_at(node: Node, output: int) -> Junction | None:
    """Return the junction at this node if the walk enters it from the trunk, or None (from a head, or no junction)."""
    junction = getattr(node, "junction", None)
    return junction if isinstance(junction, Junction) and output < len(junction.sources) else None


def leak_error(
    loss: str,
    ends: Mapping[Boundary, Sequence[str | None]],
    starts: Iterable[GradientEdge],
    follow: graph.Follow,
    is_below: Callable[[Node], bool],
    names: graph.ModuleNames,
    bypassing_items: Sequence[str] = (),
    early: bool = False,
) -> LeakError:
    """Build the error for paths of a loss that bypass the ends of its window.

    Args:
        loss: name of the loss.
        ends: the ends, each with the modules whose outputs are the same ends (None if there is no such module).
        starts: the edges where the paths start.
        follow: the edges that the paths follow.
        is_below: whether a node is below the ends.
        names: the modules at each node.
        bypassing_items: items of the model's output whose paths bypass the ends, if those of other items do not.
        early: whether the pass is an early release, which does not support several ends.
    """
    crossings, parents = graph.crossings(starts, follow, is_below)
    leaks = [edge for edge in crossings if any(map(graph.uses_leaf, graph.walk([edge], follow)))]
    first = leaks[0]
    lower = graph.nearest_name_below(first.node, names)
    upper = graph.nearest_name(crossings[first], names, parents) or f"the loss {loss!r}"
    main = [name for modules in ends.values() for name in modules]
    place = _proposed_ends(main, graph.possible_ends(leaks, follow, names), early)
    remedy = f"End the window where the two paths have joined or not yet split, such as {place}."
    if bypassing_items:
        remedy = (
            f"The path starts at {', '.join(bypassing_items)} of the model's output. If the primary loss does not read "
            "that item, select its input, for example Relay(..., output='logits') or output=lambda output: "
            "output[0]."
        )
    return LeakError(
        f"a path from {lower or first.node.name()} (below) to {upper} (above) bypasses the end of the window of "
        f"{loss!r}",
        f"every backward path of the loss must cross that end, the {' and the '.join(map(str, ends))}",
        remedy,
    )


def _proposed_ends(main: Sequence[str | None], bypasses: Sequence[str | None], early: bool) -> str:
    """Return where to end a window, given the modules at its present ends and those on the paths that bypass them."""
    block = "the input or output of the whole block"
    modules = list(dict.fromkeys((*main, *bypasses)))
    if None in bypasses or len(modules) > MAX_ENDS:
        return block
    listed = ", ".join("..." if module is None else repr(module) for module in modules)
    if len(modules) == 1:
        return f"after={listed}"
    paths = "both" if len(modules) == 2 else "all paths"
    return f"{block}, or end it on {paths}: after=({listed}){', with an ordinary backward pass' if early else ''}"


def same_ends(place: Boundary, sources: Sequence[GradientEdge], names: graph.ModuleNames) -> list[str | None]:
    """Return the modules whose outputs are the same end of a window as a boundary: one, or those at its inputs."""
    return [place.module] if place.side == "output" else graph.possible_ends(sources, graph.follow_all, names)


def foreign_head_error(loss: str, start: str) -> LeakError:
    """Build the error for a head that reads values of the model other than those at its boundary."""
    return LeakError(
        f"the head {loss!r} also reads values from layers below, directly or inside an object of an unknown type",
        f"a head must read the {start} and nothing else of the model",
        "Return all inputs of the head from the module at the boundary, as tensors in tuples, mappings or dataclasses.",
    )


def check_eager(edges: Sequence[GradientEdge], follow: graph.Follow, place: str) -> None:
    """Raise `CompiledOverlapError` if a walk from `edges` finds compiled code; `place` describes the layers."""
    if any(node.name().startswith("CompiledFunction") for node in graph.walk(edges, follow)):
        raise CompiledOverlapError(
            f"torch.compile is not supported {place}, where windows overlap",
            "gradients propagate through these layers more than once, and compiled code may have freed or silently "
            "overwritten its buffers by then",
            "Compile only layers outside the overlap, module by module.",
        )


def _between_junctions(node: Node, output: int) -> bool:
    return junction_at(node, output) is None


def _check_leak(loss: str, path: LossPath, parents: Mapping[Node, Node | None], names: graph.ModuleNames) -> None:
    """Raise `LeakError` if a path of the loss reaches a layer below the ends of its window."""
    below = graph.walk((edge for end in path.ends.values() for edge in end.sources), graph.follow_all)

    def leaks(nodes: Iterable[Node]) -> bool:  # parameters may be shared, so look for their uses
        return any(node in below and graph.uses_leaf(node) for node in nodes)

    if not leaks(parents):
        return
    follow = within_window(loss)
    # If only some items of the model's output leak, the primary loss may not read them at all, so the error lists
    # them.
    leaking = [keys for keys, edges in path.items.items() if leaks(graph.walk(edges, follow))]
    all_leak = len(leaking) == len(path.items)
    bypassing_items = [] if all_leak else ["".join(f"[{key!r}]" for key in keys) for keys in leaking]
    ends = {place: same_ends(place, end.sources, names) for place, end in path.ends.items()}
    raise leak_error(loss, ends, path.outputs, follow, below.__contains__, names, bypassing_items)


def _check_head(loss: str, outputs: Sequence[GradientEdge], start: Junction) -> None:
    """Raise `LeakError` if a head reads values other than its boundary's: their gradients would bypass the lanes."""
    head = graph.walk(outputs, lambda node, _output: getattr(node, "junction", None) is not start)
    below = graph.walk(start.sources, graph.follow_all)
    if any(node in below and not graph.is_leaf(node) for node in head):
        raise foreign_head_error(loss, start.boundary)
