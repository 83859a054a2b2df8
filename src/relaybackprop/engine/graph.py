"""Read-only walks over the autograd graph of a forward pass."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Follow = Callable[[Node, int], bool]
"""Whether a walk enters this node, at its output of the given number."""

_WEIGHT_LAYER = re.compile(r"Conv|Addmm|^Mm|Linear|Embedding")
# Nodes allowed between a weight and the operation that uses it, including autocast's cached casts.
_VIEW_OR_CAST = re.compile(r"^(T|Transpose|View|UnsafeView|Permute|ToCopy|Alias)Backward\d*$")


def edges_of(tensors: Iterable[Tensor]) -> list[GradientEdge]:
    """The gradient edges of the tensors that require gradients."""
    return [get_gradient_edge(tensor) for tensor in tensors if tensor.requires_grad]


def everywhere(_node: Node, _output: int) -> bool:
    """Follow every edge."""
    return True


def walk(starts: Iterable[GradientEdge], follow: Follow) -> dict[Node, Node | None]:
    """All nodes under `starts` that `follow` admits, each with the node from which the walk reached it."""
    came_from: dict[Node, Node | None] = {}
    seen = set[tuple[Node, int]]()
    stack: list[tuple[Node, int, Node | None]] = [(edge.node, edge.output_nr, None) for edge in starts]
    while stack:
        node, output, parent = stack.pop()
        # Call `follow` for every edge: the output's number tells a junction's trunk from its heads.
        if not follow(node, output) or (node, _slot(node, output)) in seen:
            continue
        seen.add((node, _slot(node, output)))
        came_from.setdefault(node, parent)
        stack.extend((below, number, node) for below, number in _below(node, output))
    return came_from


def longest_path(starts: Iterable[GradientEdge], follow: Follow) -> int:
    """The number of trainable convolutions, linear layers and embeddings on the longest path.

    Only weights with at least two dimensions count, so normalisation layers and biases do not. ResNet-50 has 50.
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
    """Whether a node is a parameter, or a cast of one that autocast shares between uses."""
    if variable_of(node) is not None:
        return True
    below = list(_below(node))
    return node.name().startswith("ToCopyBackward") and len(below) == 1 and is_leaf(below[0][0])


def uses_leaf(node: Node) -> bool:
    """Whether a node is not a leaf but reads one; a reentrant checkpoint may."""
    return not is_leaf(node) and (hides_leaves(node) or any(is_leaf(below) for below, _ in _below(node)))


def hides_leaves(node: Node) -> bool:
    """Whether a node is a reentrant checkpoint, whose layers are not in the graph."""
    return node.name() == "CheckpointFunctionBackward"


def variable_of(node: Node) -> Tensor | None:
    """The leaf whose gradient a node accumulates; None for all other nodes."""
    return cast(Any, node).variable if node.name().startswith("torch::autograd::AccumulateGrad") else None


def number_of(node: Node) -> int:
    """A node's number in order of creation; parameters have the maximum."""
    return cast(Any, node)._sequence_nr()


def nearest_name(node: Node | None, names: Mapping[Node, str], came_from: Mapping[Node, Node | None]) -> str | None:
    """The module whose output is at this node, or the first one above on the path of the walk."""
    while node is not None and node not in names:
        node = came_from.get(node)
    return None if node is None else names[node]


def nearest_name_below(node: Node, names: Mapping[Node, str]) -> str | None:
    """The module whose output is at this node, or the first one below, breadth first."""
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
    """The index of the junction's tensor at an output; 0 for other nodes."""
    junction = getattr(node, "junction", None)
    return 0 if junction is None else output % len(junction.sources)


def _below(node: Node, output: int | None = None) -> Iterator[tuple[Node, int]]:
    """The edges below a node, or below one output of a junction."""
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
