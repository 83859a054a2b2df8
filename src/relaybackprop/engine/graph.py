"""Read-only walks over the autograd graph of a forward pass."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Follow = Callable[[Node, int], bool]
"""Whether a walk enters a node at the output with this index (`output_nr`)."""

_WEIGHT_LAYER = re.compile(r"Conv|Addmm|^Mm|Linear|Embedding")
# Nodes allowed between a weight and the operation that uses it, including autocast's cached casts.
_VIEW_OR_CAST = re.compile(r"^(T|Transpose|View|UnsafeView|Permute|ToCopy|Alias)Backward\d*$")


def edges_of(tensors: Iterable[Tensor]) -> list[GradientEdge]:
    """Return the gradient edges of the tensors that require gradients."""
    return [get_gradient_edge(tensor) for tensor in tensors if tensor.requires_grad]


def follow_all(_node: Node, _output: int) -> bool:
    """Follow every edge."""
    return True


def walk(starts: Iterable[GradientEdge], follow: Follow) -> dict[Node, Node | None]:
    """Return all nodes below `starts` that `follow` admits, each with the node from which the walk reached it."""
    parents: dict[Node, Node | None] = {}
    seen = set[tuple[Node, int]]()
    stack: list[tuple[Node, int, Node | None]] = [(edge.node, edge.output_nr, None) for edge in starts]
    while stack:
        node, output_nr, parent = stack.pop()
        # Call `follow` for every edge: the output's index distinguishes a junction's trunk from its heads.
        if not follow(node, output_nr) or (node, _tensor_index(node, output_nr)) in seen:
            continue
        seen.add((node, _tensor_index(node, output_nr)))
        parents.setdefault(node, parent)
        stack.extend((below, output_nr, node) for below, output_nr in _below(node, output_nr))
    return parents


def longest_path(starts: Iterable[GradientEdge], follow: Follow) -> int:
    """Count the trainable convolutions, linear layers and embeddings on the longest path.

    Weights with at least two dimensions count; normalisation layers and biases do not. ResNet-50 has 50.
    """
    depth: dict[tuple[Node, int], int] = {}
    stack = [(edge.node, edge.output_nr) for edge in starts if follow(edge.node, edge.output_nr)]
    roots = tuple((node, _tensor_index(node, output_nr)) for node, output_nr in stack)
    while stack:
        node, output_nr = stack[-1]
        below = [edge for edge in _below(node, output_nr) if follow(*edge)]
        # Depth first without recursion, which deep graphs would exhaust: a node waits for all nodes below it.
        pending = [edge for edge in below if (edge[0], _tensor_index(*edge)) not in depth]
        if (node, _tensor_index(node, output_nr)) not in depth and pending:
            stack.extend(pending)
            continue
        stack.pop()
        longest = max((depth[lower, _tensor_index(lower, output_nr)] for lower, output_nr in below), default=0)
        depth[node, _tensor_index(node, output_nr)] = _is_weight_layer(node) + longest
    return max((depth[root] for root in roots), default=0)


def is_leaf(node: Node) -> bool:
    """Return whether a node is a parameter, or autocast's cached cast of one, which several layers may share."""
    if variable_of(node) is not None:
        return True
    below = list(_below(node))
    return node.name().startswith("ToCopyBackward") and len(below) == 1 and is_leaf(below[0][0])


def uses_leaf(node: Node) -> bool:
    """Return whether a node is not a leaf but reads one. A reentrant checkpoint counts: its layers may."""
    return not is_leaf(node) and (is_reentrant_checkpoint(node) or any(is_leaf(below) for below, _ in _below(node)))


def is_reentrant_checkpoint(node: Node) -> bool:
    """Return whether a node is a reentrant checkpoint, whose layers are not in the graph."""
    return node.name() == "CheckpointFunctionBackward"


def variable_of(node: Node) -> Tensor | None:
    """Return the leaf whose gradient a node accumulates, or None for any other node."""
    return cast(Any, node).variable if node.name().startswith("torch::autograd::AccumulateGrad") else None


def sequence_number(node: Node) -> int:
    """Return autograd's sequence number of a node, in order of creation. Parameters have the maximum."""
    return cast(Any, node)._sequence_nr()


def nearest_name(node: Node | None, names: Mapping[Node, str], parents: Mapping[Node, Node | None]) -> str | None:
    """Return the module whose output is at this node, or the first one above it on the path of the walk."""
    while node is not None and node not in names:
        node = parents.get(node)
    return None if node is None else names[node]


def nearest_name_below(node: Node, names: Mapping[Node, str]) -> str | None:
    """Return the module whose output is at this node, or the first one below it, breadth first."""
    queue, seen = [node], {node}
    for current in queue:
        if current in names:
            return names[current]
        for below, _ in _below(current):
            if below not in seen:
                seen.add(below)
                queue.append(below)
    return None


def _tensor_index(node: Node, output_nr: int) -> int:
    """Return the index of the junction's tensor at an output; 0 for other nodes."""
    junction = getattr(node, "junction", None)
    return 0 if junction is None else output_nr % len(junction.sources)


def _below(node: Node, output_nr: int | None = None) -> Iterator[tuple[Node, int]]:
    """Return the edges below a node, or below one output of a junction."""
    edges = node.next_functions
    if output_nr is not None and hasattr(node, "junction"):
        edges = (edges[_tensor_index(node, output_nr)],)
    return ((below, output_nr) for below, output_nr in edges if below is not None)


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
