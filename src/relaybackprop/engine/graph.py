"""Walks over an autograd graph: what lies between two places. Read-only, and only after a forward pass."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Follow = Callable[[Node, int], bool]
"""Whether a walk goes into this node, given by the number of its output which the walk comes from."""

_WEIGHT_LAYER = re.compile(r"Conv|Addmm|^Mm|Linear|Embedding")
# What may stand between a weight and the operation that uses it, autocast's cached casts among them.
_VIEW_OR_CAST = re.compile(r"^(T|Transpose|View|UnsafeView|Permute|ToCopy|Alias)Backward\d*$")


def edges_of(tensors: Iterable[Tensor]) -> list[GradientEdge]:
    """The graph's edges under the tensors that have any."""
    return [get_gradient_edge(tensor) for tensor in tensors if tensor.requires_grad]


def everywhere(_node: Node, _output: int) -> bool:
    """Follow every edge."""
    return True


def walk(starts: Iterable[GradientEdge], follow: Follow) -> dict[Node, Node | None]:
    """All nodes under `starts` as far as `follow` goes, each with the node from which the walk reached it."""
    came_from: dict[Node, Node | None] = {}
    seen = set[tuple[Node, int]]()
    stack: list[tuple[Node, int, Node | None]] = [(edge.node, edge.output_nr, None) for edge in starts]
    while stack:
        node, output, parent = stack.pop()
        # `follow` is asked on every edge: a junction tells its trunk from its heads by the output's number.
        if not follow(node, output) or (node, _slot(node, output)) in seen:
            continue
        seen.add((node, _slot(node, output)))
        came_from.setdefault(node, parent)
        stack.extend((below, number, node) for below, number in _below(node, output))
    return came_from


def longest_path(starts: Iterable[GradientEdge], follow: Follow) -> int:
    """The number of weight layers on the longest path down: trainable convolutions, linear layers and embeddings.

    Only weights with at least two dimensions count, so normalisation layers and biases do not. Shortcuts count as the
    shorter path that they are: ResNet-50 has 50.
    """
    depth: dict[tuple[Node, int], int] = {}
    stack = [(edge.node, edge.output_nr) for edge in starts if follow(edge.node, edge.output_nr)]
    roots = tuple((node, _slot(node, output)) for node, output in stack)
    while stack:
        node, output = stack[-1]
        below = [edge for edge in _below(node, output) if follow(*edge)]
        waiting = [edge for edge in below if (edge[0], _slot(*edge)) not in depth]
        if (node, _slot(node, output)) not in depth and waiting:
            stack.extend(waiting)
            continue
        stack.pop()
        longest = max((depth[lower, _slot(lower, number)] for lower, number in below), default=0)
        depth[node, _slot(node, output)] = _is_weight_layer(node) + longest
    return max((depth[root] for root in roots), default=0)


def is_leaf(node: Node) -> bool:
    """Whether a node is a parameter, or a parameter's cast that autocast shares between its uses."""
    if variable_of(node) is not None:
        return True
    below = list(_below(node))
    return node.name().startswith("ToCopyBackward") and len(below) == 1 and is_leaf(below[0][0])


def uses_leaf(node: Node) -> bool:
    """Whether a node that is not a leaf itself reads a parameter or another leaf; a reentrant checkpoint may."""
    return not is_leaf(node) and (hides_leaves(node) or any(is_leaf(below) for below, _ in _below(node)))


def hides_leaves(node: Node) -> bool:
    """Whether a node runs a backward pass of its own, over layers that the graph does not show."""
    return node.name() == "CheckpointFunctionBackward"


def variable_of(node: Node) -> Tensor | None:
    """The leaf whose gradient a node accumulates; None for all other nodes."""
    return cast(Any, node).variable if node.name().startswith("torch::autograd::AccumulateGrad") else None


def number_of(node: Node) -> int:
    """Autograd numbers its nodes as it makes them; parameters' have the largest number there is."""
    return cast(Any, node)._sequence_nr()


def nearest_name(node: Node | None, names: Mapping[Node, str], came_from: Mapping[Node, Node | None]) -> str | None:
    """The module whose output is at this node or, the way back up, the first one above."""
    while node is not None and node not in names:
        node = came_from.get(node)
    return None if node is None else names[node]


def nearest_name_below(node: Node, names: Mapping[Node, str]) -> str | None:
    """The module whose output is at this node or, breadth first, the first one below."""
    queue, seen = [node], {node}
    for current in queue:
        if current in names:
            return names[current]
        for below, _ in _below(current):
            if below not in seen:
                seen.add(below)
                queue.append(below)
    return None


def _slot(node: Node, output: int) -> int:
    """The number of the junction's tensor that an edge reads; 0 at other nodes."""
    junction = getattr(node, "junction", None)
    return 0 if junction is None else output % len(junction.sources)


def _below(node: Node, output: int | None = None) -> Iterator[tuple[Node, int]]:
    """The edges below a node; of a junction, those of one of its outputs."""
    edges = node.next_functions
    if output is not None and hasattr(node, "junction"):
        edges = (edges[_slot(node, output)],)
    return ((below, number) for below, number in edges if below is not None)


def _is_weight_layer(node: Node) -> bool:
    return bool(_WEIGHT_LAYER.search(node.name())) and any(_is_weight(below) for below, _ in _below(node))


def _is_weight(node: Node) -> bool:
    while _VIEW_OR_CAST.match(node.name()):
        below = list(_below(node))
        if len(below) != 1:
            return False
        node = below[0][0]
    variable = variable_of(node)
    return variable is not None and variable.ndim >= 2
