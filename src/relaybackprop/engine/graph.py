"""Read-only walks over the autograd graph of a forward pass."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Follow = Callable[[Node, int], bool]
"""Whether a walk enters a node at the output with this index (`output_nr`)."""

_WEIGHT_LAYER = re.compile(r"Conv|Addmm|^Mm|Linear|Embedding")
# Nodes allowed between a weight and the operation that uses it, including autocast's cached casts.
_VIEW_OR_CAST = re.compile(r"^(T|Transpose|View|UnsafeView|Permute|ToCopy|Alias)Backward\d*$")


class ModuleNames:
    """The modules of one forward pass by the nodes of their outputs, for error messages.

    It stores the nodes' sequence numbers, which are unique per thread, so that early release can free the nodes.
    """

    def __init__(self) -> None:
        self._modules: dict[int, list[str]] = {}  # from the innermost module to the outermost
        self._calls = Counter[str]()
        self._several = set[str]()  # modules that return several tensors

    def record(self, module: str, tensors: Iterable[Tensor]) -> None:
        """Record one call of a module, after the calls of its submodules."""
        nodes = {tensor.grad_fn: None for tensor in tensors if tensor.grad_fn is not None}
        self._calls[module] += 1
        if len(nodes) > 1:
            self._several.add(module)
        for node in nodes:
            self._modules.setdefault(sequence_number(node), []).append(module)

    def innermost(self, node: Node) -> str | None:
        """Return the innermost module whose output is at a node, if possible one that runs once."""
        modules = self._modules.get(sequence_number(node), [])
        return next((name for name in modules if self._calls[name] == 1), modules[0] if modules else None)

    def possible_end(self, node: Node) -> str | None:
        """Return the outermost module that runs once and returns the tensor at a node and no other."""
        modules = reversed(self._modules.get(sequence_number(node), []))
        return next((name for name in modules if self._calls[name] == 1 and name not in self._several), None)


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


def crossings(
    starts: Iterable[GradientEdge], follow: Follow, is_below: Callable[[Node], bool]
) -> tuple[dict[GradientEdge, Node | None], dict[Node, Node | None]]:
    """Find the edges where paths from `starts` first enter a set of nodes.

    Args:
        starts: the edges where the paths start.
        follow: the edges that the paths follow.
        is_below: whether a node is in the set. Parameters are ignored, since layers may share them.

    Returns:
        The edges into the set, each with the node above it (None at a start), and the result of the walk above them.
    """
    starts = list(starts)
    parents = walk(starts, lambda node, output_nr: follow(node, output_nr) and not is_below(node))
    edges: list[tuple[GradientEdge, Node | None]] = [(edge, None) for edge in starts]
    edges += [(GradientEdge(*below), node) for node in parents for below in _below(node)]
    found: dict[GradientEdge, Node | None] = {}
    for edge, upper in edges:
        if is_below(edge.node) and not is_leaf(edge.node) and follow(edge.node, edge.output_nr):
            found.setdefault(GradientEdge(edge.node, edge.output_nr), upper)
    return found, parents


def possible_ends(starts: Iterable[GradientEdge], follow: Follow, names: ModuleNames) -> list[str | None]:
    """Return the modules at whose outputs a window would end that ends at `starts`, with the same parameters below it.

    An item is None if an operation outside all modules reads a parameter first.
    """
    ends: dict[str | None, None] = {}
    stack, seen = [(edge.node, edge.output_nr) for edge in reversed(list(starts))], set[tuple[Node, int]]()
    while stack:
        node, output_nr = stack.pop()
        if (node, output_nr) in seen or is_leaf(node) or not follow(node, output_nr):
            continue
        seen.add((node, output_nr))
        name = names.possible_end(node)
        if name is not None or uses_leaf(node):
            ends[name] = None
        else:  # without parameters, such as an activation or a sum: the window may end at its inputs instead
            stack.extend(reversed(list(_below(node, output_nr))))
    return list(ends)


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


def nearest_name(node: Node | None, names: ModuleNames, parents: Mapping[Node, Node | None]) -> str | None:
    """Return the module whose output is at this node, or the first one above it on the path of the walk."""
    while node is not None:
        name = names.innermost(node)
        if name is not None:
            return name
        node = parents.get(node)
    return None


def nearest_name_below(node: Node, names: ModuleNames) -> str | None:
    """Return the module whose output is at this node, or the first one below it, breadth first."""
    queue, seen = [node], {node}
    for current in queue:
        name = names.possible_end(current) or names.innermost(current)
        if name is not None:
            return name
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
