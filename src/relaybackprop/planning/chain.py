"""The model as a chain of links, found in one training forward pass of a copy.

A *link* is a module's output that every backward path crosses. That is what the end of a window requires (`LeakError`
in `relaybackprop.engine.routes`), so a window can end, and a head can read, at any link.

Note [Constants]
A network may compute values from parameters and constants alone: Swin v2's position biases, an LSTM's first hidden
state. Such layers are neither below nor above a link, but are not a parallel tower either. If they feed only layers
above the link, they belong to the windows above. If they feed both sides, they are a path that bypasses the place,
which is therefore not a link. A layer depends on the example if one of its operations reads the memory of the
example's tensors, or of values computed from them.
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
from relaybackprop.errors import PlanError
from relaybackprop.plan import Plan
from relaybackprop.planning.copies import Arguments, on_copies
from relaybackprop.planning.layout import Layer, layers_in, sides
from relaybackprop.planning.storages import Storages
from relaybackprop.relay import Relay


@dataclass(frozen=True)
class Link:
    """A tensor that every backward path from the model's output to anything below it crosses.

    Args:
        name: the outermost module that returns the tensor, preferably one with parameters, then one that returns it
            first in a tuple; empty for a model's output that no inner module returns.
        names: all modules that return the tensor, the innermost first.
        shape: the tensor's shape.
        depth: weight layers on the longest path from the model's input, counted as in `Relay.depths`; at least 1.
        sides: sizes of the map, or the number of tokens; empty for vectors. Default: those of a channels-first map.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    depth: int
    sides: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.sides is None:
            object.__setattr__(self, "sides", self.shape[2:])

    @property
    def area(self) -> int:
        """Positions of the map, or tokens; 1 for vectors."""
        return math.prod(self.sides or ())


def chain(model: nn.Module, example_input: Any) -> tuple[Link, ...]:
    """Find the links of a model in forward order, its output last.

    Modules are left out that run more than once, return several tensors that the model uses, or have no trainable
    parameters at or below them. The model is not changed: a copy runs in training mode, on the meta device if possible,
    otherwise with the memory and the time of one forward pass (Note [Values] in `relaybackprop.planning.copies`).

    Args:
        model: any module.
        example_input: a tensor, a tuple of arguments, or a dict of keyword arguments. Values matter only where the
            forward pass depends on them.

    Raises:
        PlanError: `model` is not a module, does not run on the example, or has fewer than two links.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(
            "a model, an nn.Module", f"a {type(model).__name__}", "Pass the model, and then an example input."
        )
    links = on_copies([model], example_input, _links_of)
    if len(links) < 2:
        raise PlanError(
            "a model with at least two module outputs that every path through it crosses",
            f"{len(links)} in {type(model).__name__}",
            "Build the model from trainable modules in sequence, or write the plan by hand; "
            "windows may have several ends, Window(after=(...)).",
        )
    return links


def traced(model: nn.Module, plan: Plan, example_input: Any) -> Relay:
    """Run a copy of a model with a plan once, to find the depths of its windows.

    Args:
        model: any module; it is not changed.
        plan: the windows. Dummy heads replace the real ones.
        example_input: as for `chain`.

    Returns:
        A relay on the copy, with its `depths` and `order`.

    Raises:
        PlanError: the model does not run on the example.
        RelayError: the plan does not fit the model.

    Example:
        >>> print(plan.describe(traced(resnet50(), plan, torch.empty(2, 3, 224, 224)).depths))  # doctest: +SKIP
    """

    def run(copies: Sequence[nn.Module], arguments: Arguments) -> Relay:
        relay = Relay(copies[0], plan, {name: StandIn() for name in plan.auxiliary})
        relay(*arguments[0], **arguments[1])
        return relay

    return on_copies([model], example_input, run)


class StandIn(nn.Module):
    """A dummy head without cost: the sum of its input's elements."""

    def forward(self, value: Any) -> Tensor:
        """Return the sum, a scalar."""
        return total(tensors_in(value))


def total(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of all elements of floating-point and complex tensors, a scalar."""
    return torch.stack([t.sum() for t in tensors if t.is_floating_point() or t.is_complex()]).sum()


@dataclass(frozen=True)
class _Output:
    """The mark on a tensor with a gradient in a module's output."""

    module: str
    node: Node
    shape: tuple[int, ...]
    # Sorts a tensor's names, the preferred one first. A head reads the first tensor of an output.
    rank: tuple[bool, bool, int]


class _Influence(TorchDispatchMode):
    """Records the operations that depend on the values of some tensors.

    Attributes:
        nodes: autograd's sequence numbers of these operations.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.nodes = set[int]()
        self._storages = Storages()
        self._storages.note(source)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation. Autograd has numbered its node already."""
        node = torch.autograd._get_sequence_nr() - 1  # pyright: ignore
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        reads_values = not name.endswith("_like") and not name.startswith("new_")  # zeros_like, new_zeros: shapes only
        if reads_values and self._storages.holds((args, kwargs)):
            self._storages.note(result)
            if torch.is_grad_enabled():
                self.nodes.add(node)
        return result


def _links_of(copies: Sequence[nn.Module], arguments: Arguments) -> tuple[Link, ...]:
    """Run a copy of the model and return its links."""
    layers = list[Layer]()
    calls = _mark_outputs(copies[0], layers)
    with _Influence(arguments) as influence:
        outputs = tensors_in(copies[0](*arguments[0], **arguments[1]))
    once = [made[0] for made in calls.values() if len(made) == 1]
    return _links(once, outputs, influence.nodes, layers)


def _mark_outputs(model: nn.Module, layers: list[Layer]) -> dict[str, list[list[_Output]]]:
    """Register hooks that insert a node of its own at each tensor that a module returns, as a junction does.

    Without these nodes, a value that passes through `nn.Identity` looks like one that also bypasses it. The forward
    pass appends votes on layouts to `layers`, and the tensors in each call's output to the result, by module.
    """
    calls: dict[str, list[list[_Output]]] = {}
    for name, module in cast(Iterable[tuple[str, nn.Module]], model.named_modules()):
        calls[name] = []

        def mark(module: nn.Module, _args: Any, output: Any, name: str = name) -> Any:
            layers.extend(layers_in(name, module, output))
            is_bare = next(module.parameters(), None) is None
            tensors = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
            marked = [cast(Tensor, _Mark.apply(tensor)) for tensor in tensors]  # pyright: ignore[reportUnknownMemberType]
            calls[name].append(
                [
                    _Output(name, edge.node, tuple(tensor.shape), (is_bare, position > 0, name.count(".")))
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
    calls: Iterable[list[_Output]], outputs: Sequence[Tensor], dependent: set[int], layers: Sequence[Layer]
) -> tuple[Link, ...]:
    """Find the links in one walk from the parameters up. Sets of nodes are integers with one bit for each node."""
    outputs = [tensor for tensor in outputs if tensor.requires_grad]
    roots = [edge.node for edge in graph.edges_of(outputs)]
    order = {node: number for number, node in enumerate(_from_below(roots))}
    read = ([output for output in call if output.node in order] for call in calls)
    marks = {call[0].node: call[0] for call in read if len(call) == 1}
    inner = [[order[lower] for lower in _next(node) if lower in order] for node in order]
    is_layer = [_is_weight_layer(node) for node in order]
    depths: list[int] = []
    below: list[int] = []  # including the node itself
    depends: list[bool] = []  # on the example
    for number, (node, lower) in enumerate(zip(order, inner, strict=True)):
        depths.append(is_layer[number] + max((depths[other] for other in lower), default=0))
        depends.append(graph.number_of(node) in dependent or any(depends[other] for other in lower))
        below.append(1 << number)
        for other in lower:
            below[number] |= below[other]
    if not any(depends):  # the example's tensors are in objects of an unknown type
        depends = [True] * len(order)
    users: list[list[int]] = [[] for _ in order]
    for number, lower in enumerate(inner):
        for other in lower:
            users[other].append(number)
    top = {order[root] for root in roots}
    passed = _counts_below(users, top)
    towers = _set(number for number in range(len(order)) if is_layer[number] and depends[number])
    above = [0] * len(order)  # including the node itself
    for number in reversed(range(len(order))):
        above[number] = 1 << number
        for other in users[number]:
            above[number] |= above[other]

    def is_link(number: int) -> bool:
        # No path bypasses it, and no layer that depends on the example is in a parallel tower.
        is_crossed = passed[number] == below[number].bit_count()
        return depths[number] > 0 and depends[number] and is_crossed and not towers & ~(below[number] | above[number])

    groups: dict[Node, list[Node]] = {}  # marks by the node that they follow
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
        group = [marks[node] for node in nodes if marks[node].module]
        best = min(group, key=lambda mark: mark.rank, default=None)
        name, shape = "" if best is None else best.module, marks[nodes[0]].shape
        names = tuple(mark.module for mark in group)
        links.append(Link(name, names, shape, depths[last], sides(layers, name, shape)))
    if roots and (not links or top != {last}):  # several outputs, or one that is not a link
        shape, depth = tuple(outputs[0].shape), max(depths[order[root]] for root in roots)
        links.append(Link("", (), shape, depth, sides(layers, "", shape)))
    return tuple(links)


def _counts_below(users: Sequence[Sequence[int]], roots: set[int]) -> list[int]:
    """Return the size of each node's dominator subtree: how many nodes only paths through it reach, itself included.

    `users` has for each node the nodes that use it, all of larger indices; `roots` are the output nodes.
    """
    outside = len(users)  # a virtual node above the roots
    above, level, counts = [outside] * (outside + 1), [0] * (outside + 1), [1] * (outside + 1)
    for number in reversed(range(outside)):
        found = [*users[number], *([outside] if number in roots else [])]
        common = found[0]
        for other in found[1:]:
            while common != other:
                if level[common] < level[other]:
                    common, other = other, common
                common = above[common]
        above[number], level[number] = common, level[common] + 1
    for number in range(outside):
        counts[above[number]] += counts[number]
    return counts[:-1]


def _from_below(roots: Sequence[Node]) -> list[Node]:
    """Return all nodes except leaves, each after those below it."""
    done: dict[Node, None] = {}
    stack = list(roots)
    while stack:
        waiting = [lower for lower in _next(stack[-1]) if lower not in done and not graph.is_leaf(lower)]
        if waiting and stack[-1] not in done:
            stack.extend(waiting)
        else:
            done[stack.pop()] = None
    return list(done)


def _next(node: Node) -> list[Node]:
    return [lower for lower, _ in node.next_functions if lower is not None]


def _is_weight_layer(node: Node) -> bool:
    return graph.longest_path([GradientEdge(node, 0)], lambda other, _output: other is node) == 1


def _set(numbers: Iterable[int]) -> int:
    return sum(1 << number for number in set(numbers))
