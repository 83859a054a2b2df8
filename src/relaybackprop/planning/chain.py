"""The model as a chain of links, found in one training forward pass of a copy.

A *link* is a module's output that every backward path crosses. The end of a window requires this (`LeakError` in
`relaybackprop.engine.routes`), so a window can end, and a head can read, at any link.

Note [Constants]
A network may compute values from parameters and constants alone, such as Swin v2's position biases or an LSTM's first
hidden state. Layers that do this are neither below nor above a link, but they are not a parallel tower either. If they
feed only layers above the link, they belong to the windows above. If they feed both sides, they are a path that
bypasses the output, which is therefore not a link. A layer depends on the example if one of its operations reads the
memory of the example's tensors, or of values computed from them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import GradientEdge, Node
from torch.utils._python_dispatch import TorchDispatchMode

from relaybackprop.engine import graph
from relaybackprop.engine.pytree import replace_tensors, tensors_in
from relaybackprop.errors import PlanError, pluralized
from relaybackprop.plan import Plan
from relaybackprop.planning.copies import Arguments, run_on_copies
from relaybackprop.planning.layout import Vote, spatial_shape, votes_of
from relaybackprop.planning.storages import Storages
from relaybackprop.relay import Relay


@dataclass(frozen=True)
class Link:
    """A tensor that every backward path from the model's output to anything below it crosses.

    Args:
        name: the outermost module that returns the tensor, preferably one with parameters, then one that returns it
            first in a tuple; empty for a model's output that no inner module returns.
        names: all modules that return the tensor, from innermost to outermost.
        shape: shape of the tensor.
        depth: number of weight layers on the longest path from the model's input, counted as in `Relay.depths`; at
            least 1.
        spatial_shape: sizes of the map, or the number of tokens; empty for vectors. Default: the dimensions of a
            channels-first map.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    depth: int
    spatial_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.spatial_shape is None:
            object.__setattr__(self, "spatial_shape", self.shape[2:])

    @property
    def area(self) -> int:
        """The number of positions of the map, or of tokens; 1 for vectors."""
        return math.prod(self.spatial_shape or ())


def chain(model: nn.Module, example_input: Any) -> tuple[Link, ...]:
    """Find the links of a model in forward order, its output last.

    Modules that run more than once, return several tensors that the model uses, or have no trainable parameters at or
    below them are left out. The model does not change. A copy runs in training mode, on the meta device if possible;
    otherwise this takes the memory and the time of one forward pass (Note [Values] in
    `relaybackprop.planning.copies`).

    Args:
        model: any module.
        example_input: a tensor, a tuple of arguments, or a dict of keyword arguments. Values matter only if the forward
            pass depends on them.

    Raises:
        PlanError: `model` is not a module, does not run on the example, or has fewer than two links.

    Example:
        ```python
        [link.name for link in chain(resnet50(), torch.empty(2, 3, 224, 224))]
        ```
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(
            f"the model is a {type(model).__name__}",
            "it must be an nn.Module",
            "Pass the model first, then an example input.",
        )
    links = run_on_copies([model], example_input, _links_of)
    if len(links) < 2:
        raise PlanError(
            f"{type(model).__name__} has {pluralized(len(links), 'module output')} that every path crosses",
            "at least two are required",
            "Build the model from trainable modules in sequence, or write the plan by hand; "
            "windows may have several ends, Window(after=(...)).",
        )
    return links


def trace(model: nn.Module, plan: Plan, example_input: Any) -> Relay:
    """Run a copy of a model with a plan once, to find the depths of its windows.

    Args:
        model: any module; it does not change.
        plan: the windows. Dummy heads replace the real ones.
        example_input: an example, as in `chain`.

    Returns:
        A relay on the copy, with its `depths` and `order`.

    Raises:
        PlanError: the model does not run on the example.
        RelayError: the plan does not fit the model.

    Example:
        ```python
        print(plan.describe(trace(resnet50(), plan, torch.empty(2, 3, 224, 224)).depths))
        ```
    """

    def run(copies: Sequence[nn.Module], arguments: Arguments) -> Relay:
        relay = Relay(copies[0], plan, {name: DummyHead() for name in plan.auxiliary})
        relay(*arguments[0], **arguments[1])
        return relay

    return run_on_copies([model], example_input, run)


class DummyHead(nn.Module):
    """A dummy head without cost: the sum of its input's elements."""

    def forward(self, value: Any) -> Tensor:
        """Return the sum, a scalar."""
        return sum_elements(tensors_in(value))


def sum_elements(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of all elements of floating-point and complex tensors, a scalar."""
    return torch.stack([t.sum() for t in tensors if t.is_floating_point() or t.is_complex()]).sum()


@dataclass(frozen=True)
class _Output:
    """A marked tensor in a module's output."""

    module: str
    node: Node
    shape: tuple[int, ...]
    # Sort key of a tensor's names, the preferred one first. A head reads the first tensor of an output.
    rank: tuple[bool, bool, int]


class _DependencyTracker(TorchDispatchMode):
    """Records the operations that depend on the values of some tensors.

    Attributes:
        nodes: autograd's sequence numbers of these operations' nodes.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.nodes = set[int]()
        self._storages = Storages()
        self._storages.add(source)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation. Autograd has already numbered its node."""
        node = torch.autograd._get_sequence_nr() - 1  # pyright: ignore
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        # zeros_like, new_zeros and similar operations read the shape only.
        reads_values = not name.endswith("_like") and not name.startswith("new_")
        if reads_values and self._storages.contains((args, kwargs)):
            self._storages.add(result)
            if torch.is_grad_enabled():
                self.nodes.add(node)
        return result


def _links_of(copies: Sequence[nn.Module], arguments: Arguments) -> tuple[Link, ...]:
    """Run a copy of the model and return its links."""
    votes = list[Vote]()
    calls = _mark_outputs(copies[0], votes)
    with _DependencyTracker(arguments) as tracker:
        outputs = tensors_in(copies[0](*arguments[0], **arguments[1]))
    called_once = [per_call[0] for per_call in calls.values() if len(per_call) == 1]
    return _links(called_once, outputs, tracker.nodes, votes)


def _mark_outputs(model: nn.Module, votes: list[Vote]) -> dict[str, list[list[_Output]]]:
    """Register hooks that insert an identity node at each tensor that a module returns, as a junction does.

    Without these nodes, a value that passes through `nn.Identity` looks like one that also bypasses it. The forward
    pass appends votes on layouts to `votes`. To the result it appends, for each module and call, the marked tensors.
    """
    calls: dict[str, list[list[_Output]]] = {}
    for name, module in cast(Iterable[tuple[str, nn.Module]], model.named_modules()):
        calls[name] = []

        def mark(module: nn.Module, _args: Any, output: Any, name: str = name) -> Any:
            votes.extend(votes_of(name, module, output))
            has_no_parameters = next(module.parameters(), None) is None
            tensors = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
            marked = [cast(Tensor, _Mark.apply(tensor)) for tensor in tensors]  # pyright: ignore[reportUnknownMemberType]
            calls[name].append(
                [
                    _Output(name, edge.node, tuple(tensor.shape), (has_no_parameters, position > 0, name.count(".")))
                    for position, (edge, tensor) in enumerate(zip(graph.edges_of(marked), marked, strict=True))
                ]
            )
            return replace_tensors(output, tensors, marked) if tensors else None

        module.register_forward_hook(mark)
    return calls


class _Mark(torch.autograd.Function):
    """The identity, as a node of the graph."""

    @staticmethod
    def forward(_ctx: FunctionCtx, tensor: Tensor) -> Tensor:
        return tensor.detach()  # as in `relaybackprop.engine.junction`, for later in-place operations


def _links(
    calls: Iterable[list[_Output]], outputs: Sequence[Tensor], dependent: set[int], votes: Sequence[Vote]
) -> tuple[Link, ...]:
    """Find the links in one walk from the parameters up. Sets of nodes are integers with one bit for each node.

    Args:
        calls: the marked tensors of each module that ran once.
        outputs: the model's output tensors.
        dependent: sequence numbers of the nodes that depend on the example.
        votes: votes on layouts.
    """
    outputs = [tensor for tensor in outputs if tensor.requires_grad]
    roots = [edge.node for edge in graph.edges_of(outputs)]
    order = {node: index for index, node in enumerate(_bottom_up(roots))}
    used = ([output for output in call if output.node in order] for call in calls)
    marks = {call[0].node: call[0] for call in used if len(call) == 1}
    lower_of = [[order[lower] for lower in _next(node) if lower in order] for node in order]
    is_layer = [_is_weight_layer(node) for node in order]
    # Upwards: the depth of each node, the nodes below it, and whether it depends on the example.
    depths: list[int] = []
    below: list[int] = []  # including the node itself
    depends: list[bool] = []  # whether each node depends on the example
    for index, (node, lower) in enumerate(zip(order, lower_of, strict=True)):
        depths.append(is_layer[index] + max((depths[other] for other in lower), default=0))
        depends.append(graph.sequence_number(node) in dependent or any(depends[other] for other in lower))
        below.append(1 << index)
        for other in lower:
            below[index] |= below[other]
    if not any(depends):  # the example's tensors are in objects of an unknown type
        depends = [True] * len(order)
    # Downwards: the nodes above each node, and how many nodes only paths through it reach.
    users: list[list[int]] = [[] for _ in order]
    for index, lower in enumerate(lower_of):
        for other in lower:
            users[other].append(index)
    top = {order[root] for root in roots}
    dominated = _dominated_counts(users, top)
    dependent_layers = _bitset(index for index in range(len(order)) if is_layer[index] and depends[index])
    above = [0] * len(order)  # including the node itself
    for index in reversed(range(len(order))):
        above[index] = 1 << index
        for other in users[index]:
            above[index] |= above[other]

    def is_link(index: int) -> bool:
        # No path bypasses it, and no layer that depends on the example is in a parallel tower.
        is_crossed = dominated[index] == below[index].bit_count()
        return (
            depths[index] > 0
            and depends[index]
            and is_crossed
            and not dependent_layers & ~(below[index] | above[index])
        )

    # Marks of one tensor, returned by several modules, follow each other: group them by the node below the lowest.
    groups: dict[Node, list[Node]] = {}
    for node in order:
        if node in marks and is_link(order[node]):
            source = node
            while source in marks:
                (source,) = _next(source)
            groups.setdefault(source, []).append(node)
    links: list[Link] = []
    last = 0
    for nodes in groups.values():
        last = order[nodes[-1]]
        marks_here = [marks[node] for node in nodes if marks[node].module]
        best = min(marks_here, key=lambda mark: mark.rank, default=None)
        name, shape = "" if best is None else best.module, marks[nodes[0]].shape
        names = tuple(mark.module for mark in marks_here)
        links.append(Link(name, names, shape, depths[last], spatial_shape(votes, name, shape)))
    if roots and (not links or top != {last}):  # several outputs, or one that is not a link
        shape, depth = tuple(outputs[0].shape), max(depths[order[root]] for root in roots)
        links.append(Link("", (), shape, depth, spatial_shape(votes, "", shape)))
    return tuple(links)


def _dominated_counts(users: Sequence[Sequence[int]], roots: set[int]) -> list[int]:
    """Return the size of each node's dominator subtree: how many nodes only paths through it reach, itself included.

    Args:
        users: for each node, the nodes that use it, all of larger indices.
        roots: the output nodes.
    """
    # A node's parent in the dominator tree is the lowest common ancestor of its users there. One pass suffices, since
    # the graph has no cycles.
    root = len(users)  # a virtual node above the roots
    parent, level, counts = [root] * (root + 1), [0] * (root + 1), [1] * (root + 1)
    for index in reversed(range(root)):
        users_above = [*users[index], *([root] if index in roots else [])]
        ancestor = users_above[0]
        for other in users_above[1:]:
            while ancestor != other:
                if level[ancestor] < level[other]:
                    ancestor, other = other, ancestor
                ancestor = parent[ancestor]
        parent[index], level[index] = ancestor, level[ancestor] + 1
    for index in range(root):
        counts[parent[index]] += counts[index]
    return counts[:-1]


def _bottom_up(roots: Sequence[Node]) -> list[Node]:
    """Return all nodes except leaves, each after the nodes below it."""
    done: dict[Node, None] = {}
    stack = list(roots)
    while stack:
        pending = [lower for lower in _next(stack[-1]) if lower not in done and not graph.is_leaf(lower)]
        if pending and stack[-1] not in done:
            stack.extend(pending)
        else:
            done[stack.pop()] = None
    return list(done)


def _next(node: Node) -> list[Node]:
    return [lower for lower, _ in node.next_functions if lower is not None]


def _is_weight_layer(node: Node) -> bool:
    return graph.longest_path([GradientEdge(node, 0)], lambda other, _output: other is node) == 1


def _bitset(indices: Iterable[int]) -> int:
    return sum(1 << index for index in set(indices))
