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
    """All nodes under `starts`, the lower bounds excepted, each with the node that the walk came from."""
    came_from: dict[Node, Node | None] = {}
    stack: list[tuple[Node, int, Node | None]] = [(edge.node, edge.output_nr, None) for edge in starts]
    while stack:
        node, output, parent = stack.pop()
        # `follow` is asked on every edge: a junction tells its trunk from its heads by the output's number.
        if not follow(node, output) or node in came_from:
            continue
        came_from[node] = parent
        stack.extend((below, number, node) for below, number in _below(node))
    return came_from


def longest_path(starts: Iterable[GradientEdge], follow: Follow) -> int:
    """The number of weight layers on the longest way down: trainable convolutions, linear layers and embeddings.

    Only weights with at least two dimensions count, so normalisation layers and biases do not. Shortcuts count as the
    shorter way that they are: ResNet-50 has 50.
    """
    depth: dict[Node, int] = {}
    stack = [edge.node for edge in starts if follow(edge.node, edge.output_nr)]
    roots = tuple(stack)
    while stack:
        node = stack[-1]
        below = [lower for lower, number in _below(node) if follow(lower, number)]
        waiting = [lower for lower in below if lower not in depth]
        if node not in depth and waiting:
            stack.extend(waiting)
            continue
        stack.pop()
        depth[node] = _is_weight_layer(node) + max((depth[lower] for lower in below), default=0)
    return max((depth[root] for root in roots), default=0)


def is_leaf(node: Node) -> bool:
    """Whether a node is a parameter, or a parameter's cast that autocast shares between its uses."""
    if variable_of(node) is not None:
        return True
    below = list(_below(node))
    return node.name().startswith("ToCopyBackward") and len(below) == 1 and is_leaf(below[0][0])


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


def _below(node: Node) -> Iterator[tuple[Node, int]]:
    return ((below, number) for below, number in node.next_functions if below is not None)


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
