"""The model as a chain of links, read off one training forward pass of a copy.

A *link* is a module's output that every backward path crosses. The same holds for the end of a window (`LeakError` in
`relaybackprop.engine.routes`), so any link can be one, or the place of a head.

Note [Constants]
A network may compute values from parameters and constants alone: Swin v2's position biases, an LSTM's first hidden
state. Such layers are not another tower beside a link, although they are neither below nor above it. Where they feed
layers above the link only, no path leads around it: they are part of the windows above. Where they feed both sides,
they are the path around, and the place is not a link. A layer depends on the example if one of its operations reads
memory that the example's tensors were written to, values in between included.
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
        name: of the outermost module whose output it is, one with parameters if there is one, and one that returns it
            first; empty for a model's output that no inner module returns.
        names: of all modules whose output it is, the innermost first.
        shape: of the tensor.
        depth: weight layers on the longest path from the model's input, counted as `Relay.depths`; at least 1.
        sides: sizes of the map, or the number of tokens; empty for vectors. By default those of channels-first maps.
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
    """The links of a model in forward order, its output last.

    A module is left out that runs more than once, returns several tensors that the model goes on to use, or has nothing
    trainable below. The model is left alone: a copy runs in training mode, without values if the model allows it. A
    model that looks at values takes the memory and the time of one forward pass.

    Args:
        model: any module.
        example_input: a tensor, a tuple of arguments, or a dict of named ones. Values matter only where the model
            looks at them.

    Raises:
        PlanError: no module, a model that does not run on the example, or fewer than two links.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(
            "a model, an nn.Module", f"a {type(model).__name__}", "Pass the model, and then an example input."
        )
    links = on_copies([model], example_input, _links_of)
    if len(links) < 2:
        raise PlanError(
            "a model with at least two places, outputs of modules, that every way through it passes",
            f"{len(links)} in {type(model).__name__}",
            "Build the model from modules that follow one another and are trainable, or write the plan by hand; "
            "windows may have several ends, Window(after=(...)).",
        )
    return links


def traced(model: nn.Module, plan: Plan, example_input: Any) -> Relay:
    """Run a copy of a model with a plan once, for the depths of its windows.

    Args:
        model: any module; it is not changed.
        plan: its windows. Heads that cost nothing take the place of the real ones.
        example_input: as for `chain`.

    Returns:
        A relay on the copy; its `depths` and `order` are known.

    Raises:
        PlanError: a model that does not run on the example.
        RelayError: a plan that does not fit the model.

    Example:
        >>> print(plan.describe(traced(resnet50(), plan, torch.empty(2, 3, 224, 224)).depths))  # doctest: +SKIP
    """

    def run(copies: Sequence[nn.Module], arguments: Arguments) -> Relay:
        relay = Relay(copies[0], plan, {name: StandIn() for name in plan.auxiliary})
        relay(*arguments[0], **arguments[1])
        return relay

    return on_copies([model], example_input, run)


class StandIn(nn.Module):
    """A head that costs nothing and keeps nothing: the sum of all that it reads."""

    def forward(self, value: Any) -> Tensor:
        """A scalar."""
        return total(tensors_in(value))


def total(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of all elements of all tensors that a gradient can go through, a scalar."""
    return torch.stack([t.sum() for t in tensors if t.is_floating_point() or t.is_complex()]).sum()


@dataclass(frozen=True)
class _Output:
    """The mark on a tensor with a gradient in a module's output.

    Args:
        module: its name.
        node: the mark's.
        shape: of the tensor.
        rank: names for what the tensor is are preferred in this order. A head reads the first tensor of an output.
    """

    module: str
    node: Node
    shape: tuple[int, ...]
    rank: tuple[bool, bool, int]


class _Influence(TorchDispatchMode):
    """Finds the operations that depend on some tensors' values, by the numbers that autograd gives to their nodes.

    Attributes:
        nodes: the numbers.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.nodes = set[int]()
        self._storages = Storages()
        self._storages.note(source)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation. Autograd has numbered its node before it arrives here."""
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
    """Run a copy and find its links."""
    layers = list[Layer]()
    calls = _mark_outputs(copies[0], layers)
    with _Influence(arguments) as influence:
        outputs = tensors_in(copies[0](*arguments[0], **arguments[1]))
    once = [made[0] for made in calls.values() if len(made) == 1]
    return _links(once, outputs, influence.nodes, layers)


def _mark_outputs(model: nn.Module, layers: list[Layer]) -> dict[str, list[list[_Output]]]:
    """Let every module's output go through a node of its own, as a junction would be.

    Without them a value that goes through nn.Identity could not be told from one that also goes around it.

    Args:
        model: a copy, on which the hooks stay.
        layers: filled in by the forward pass with the layers that tell their layout.

    Returns:
        By module, filled in by the forward pass: for each call the tensors in its output.
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
    """Identity."""

    @staticmethod
    def forward(_ctx: FunctionCtx, tensor: Tensor) -> Tensor:
        return tensor.detach()  # as `relaybackprop.engine.junction` does it, for in-place operations that follow


def _links(
    calls: Iterable[list[_Output]], outputs: Sequence[Tensor], dependent: set[int], layers: Sequence[Layer]
) -> tuple[Link, ...]:
    """Walk the graph once, from the parameters up; sets of nodes are integers with one bit for each node."""
    outputs = [tensor for tensor in outputs if tensor.requires_grad]
    roots = [edge.node for edge in graph.edges_of(outputs)]
    order = {node: number for number, node in enumerate(_from_below(roots))}
    read = ([output for output in call if output.node in order] for call in calls)
    marks = {call[0].node: call[0] for call in read if len(call) == 1}
    inner = [[order[lower] for lower in _next(node) if lower in order] for node in order]
    is_layer = [_is_weight_layer(node) for node in order]
    depths: list[int] = []
    below: list[int] = []  # each with itself
    depends: list[bool] = []  # on the example
    for number, (node, lower) in enumerate(zip(order, inner, strict=True)):
        depths.append(is_layer[number] + max((depths[other] for other in lower), default=0))
        depends.append(graph.number_of(node) in dependent or any(depends[other] for other in lower))
        below.append(1 << number)
        for other in lower:
            below[number] |= below[other]
    if not any(depends):  # an example whose tensors are in objects of an unknown type
        depends = [True] * len(order)
    users: list[list[int]] = [[] for _ in order]
    for number, lower in enumerate(inner):
        for other in lower:
            users[other].append(number)
    top = {order[root] for root in roots}
    passed = _counts_below(users, top)
    towers = _set(number for number in range(len(order)) if is_layer[number] and depends[number])
    above = [0] * len(order)  # each with itself
    for number in reversed(range(len(order))):
        above[number] = 1 << number
        for other in users[number]:
            above[number] |= above[other]

    def is_link(number: int) -> bool:
        # No way around it to anything below, and no layer beside it: another tower, if it is not constant.
        is_crossed = passed[number] == below[number].bit_count()
        return depths[number] > 0 and depends[number] and is_crossed and not towers & ~(below[number] | above[number])

    groups: dict[Node, list[Node]] = {}  # by what the marks are on
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
    if roots and (not links or top != {last}):  # several outputs, or something else than a tensor
        shape, depth = tuple(outputs[0].shape), max(depths[order[root]] for root in roots)
        links.append(Link("", (), shape, depth, sides(layers, "", shape)))
    return tuple(links)


def _counts_below(users: Sequence[Sequence[int]], roots: set[int]) -> list[int]:
    """For each node how many nodes only ways through it lead to, itself included: the size of its dominator subtree.

    Args:
        users: for each node those that use it, all of larger numbers.
        roots: nodes that are outputs.
    """
    outside = len(users)  # what uses the roots
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
    """All nodes but the parameters', each after those below it."""
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
