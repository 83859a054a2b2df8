"""The model as a chain of links, read off one training forward pass on the meta device: no values, no memory.

A *link* is a module's output that every way down passes. The same holds for the end of a window (`LeakError` in
`relaybackprop.engine.routes`), so any link can be one, or the place of a head.
"""

import copy
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import GradientEdge, Node
from torch.nn import functional

from relaybackprop.engine import graph
from relaybackprop.engine.pytree import map_tensors, tensors_in
from relaybackprop.errors import PlanError, RelayError
from relaybackprop.plan import Plan
from relaybackprop.relay import Relay

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a model is called with: by position and by name."""

_Output = tuple[Node, tuple[int, ...]]  # the node of a mark on a module's output, and its shape


@dataclass(frozen=True)
class Link:
    """A tensor that every way from the model's output to anything below it passes.

    Args:
        name: of the outermost module whose output it is; empty for a model's output that no inner module yields.
        names: of all modules whose output it is, the innermost first.
        shape: of the tensor.
        depth: weight layers on the longest path from the model's input, counted as `Relay.depths`; at least 1.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    depth: int


def chain(model: nn.Module, example_input: Any) -> tuple[Link, ...]:
    """The links of a model in forward order, its output last.

    Modules that run more than once, return something else than one tensor, or lie where nothing below is trainable
    are none. The model is left alone: a copy without values runs, in training mode.

    Args:
        model: any module.
        example_input: a tensor, a tuple of arguments, or a dict of named ones. Only shapes and types matter.

    Raises:
        PlanError: no module, a model that does not run on the meta device, or fewer than two links.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(
            "a model, an nn.Module", f"a {type(model).__name__}", "Pass the model, and then an example input."
        )
    with dry_run():
        (shadow,), (args, kwargs) = shadows([model]), shadow_input(example_input)
        calls = _mark_outputs(shadow)
        outputs = tensors_in(shadow(*args, **kwargs))
        once = {name: made[0] for name, made in calls.items() if len(made) == 1}
        links = _links({made[0]: (name, made[1]) for name, made in once.items() if made is not None}, outputs)
    if len(links) < 2:
        raise PlanError(
            "a model with at least two places, outputs of modules, that every way through it passes",
            f"{len(links)} in {type(model).__name__}",
            "Build the model from modules that follow one another and are trainable, or write the plan by hand.",
        )
    return links


def traced(model: nn.Module, plan: Plan, example_input: Any) -> Relay:
    """Run a copy of a model with a plan once, without values, for the depths of its windows.

    Args:
        model: any module that runs on the meta device; it is not changed.
        plan: its windows. Heads that cost nothing take the place of the real ones.
        example_input: a tensor, a tuple of arguments, or a dict of named ones. Only shapes and types matter.

    Returns:
        A relay without values; its `depths` and `order` are known.

    Raises:
        PlanError: a model that does not run on the meta device.
        RelayError: a plan that does not fit the model.

    Example:
        >>> print(plan.describe(traced(resnet50(), plan, torch.empty(2, 3, 224, 224)).depths))  # doctest: +SKIP
    """
    with dry_run():
        (shadow,), (args, kwargs) = shadows([model]), shadow_input(example_input)
        relay = Relay(shadow, plan, {name: StandIn() for name in plan.auxiliary})
        relay(*args, **kwargs)
    return relay


def shadows(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Copies in training mode whose tensors have no values. What the modules share, their copies share too."""
    memo: dict[int, Any] = {}
    for module in modules:
        for part in module.modules():
            # Not only parameters and buffers: a tensor that a module just holds would be on another device.
            memo |= {id(tensor): _without_values(tensor) for tensor in tensors_in(vars(part)) if id(tensor) not in memo}
    return [copy.deepcopy(module, memo).train() for module in modules]


def shadow_input(example_input: Any) -> Arguments:
    """Arguments and named arguments without values, from a tensor, a tuple of arguments or a dict of named ones."""
    return arguments_of(map_tensors(_without_values, example_input))


def arguments_of(value: Any) -> Arguments:
    """Arguments and named arguments, from a tensor, a tuple of arguments or a dict of named ones."""
    if isinstance(value, Mapping):
        return (), dict(cast(Mapping[str, Any], value))
    return (cast(tuple[Any, ...], value) if isinstance(value, tuple) else (value,)), {}


@contextmanager
def dry_run() -> Generator[None]:
    """Run models on the meta device: gradients are recorded, new tensors have no values, random generators stay.

    Raises:
        PlanError: what runs inside raises anything but a `RelayError`.
    """
    try:
        with (
            torch.random.fork_rng(devices=[]),  # pyright: ignore[reportUnknownMemberType]
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.device("meta"),
            _fused_attention(),
        ):
            yield
    except RelayError:
        raise
    except Exception as error:
        raise PlanError(
            "a model that runs in training mode on the meta device, on tensors that have shapes but no values",
            f"{type(error).__name__}: {' '.join([str(error), *getattr(error, '__notes__', ())])}",
            "Give an example input that fits the model. If its forward pass looks at values (item(), if tensor: ...), "
            "write the plan by hand; reach() works with every model.",
        ) from error


@contextmanager
def _fused_attention() -> Generator[None]:
    """Let attention without values cost what attention with values does: PyTorch fuses it everywhere but on meta."""
    attention = functional.scaled_dot_product_attention

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **others: Any,
    ) -> Tensor:
        is_plain = attn_mask is None and dropout_p == 0 and not any(others.values())  # as the CPU's kernel wants it
        if query.device.type != "meta" or query.ndim != 4 or not is_plain:
            return attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **others)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        return kernel(query, key, value, dropout_p, is_causal, scale=scale)[0]

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attention


class StandIn(nn.Module):
    """A head that costs nothing and keeps nothing: the sum of all that it reads."""

    def forward(self, value: Any) -> Tensor:
        """A scalar."""
        return total(tensors_in(value))


def total(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of all elements of all tensors that a gradient can go through, a scalar."""
    return torch.stack([t.sum() for t in tensors if t.is_floating_point() or t.is_complex()]).sum()


def _mark_outputs(model: nn.Module) -> dict[str, list[_Output | None]]:
    """Let every module's output go through a node of its own, as a junction would be.

    Without them a value that goes through nn.Identity could not be told from one that also goes around it.

    Args:
        model: a copy; nobody has to remove the hooks.

    Returns:
        By module, filled in by the forward pass: for each call what came out, None if it cannot be a link.
    """
    calls: dict[str, list[_Output | None]] = {}
    for name, module in cast(Iterable[tuple[str, nn.Module]], model.named_modules()):
        calls[name] = []

        def mark(_module: nn.Module, _args: Any, output: Any, calls: list[Any] = calls[name]) -> Tensor | None:
            calls.append(None)
            if not isinstance(output, Tensor) or not output.requires_grad:
                return None
            marked = cast(Tensor, _Mark.apply(output))  # pyright: ignore[reportUnknownMemberType]
            calls[-1] = marked.grad_fn, tuple(output.shape)
            return marked

        module.register_forward_hook(mark)
    return calls


class _Mark(torch.autograd.Function):
    """Identity."""

    @staticmethod
    def forward(_ctx: FunctionCtx, tensor: Tensor) -> Tensor:
        return tensor.detach()  # as `relaybackprop.engine.junction` does it, for in-place operations that follow


def _without_values(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _links(marks: Mapping[Node, tuple[str, tuple[int, ...]]], outputs: Sequence[Tensor]) -> tuple[Link, ...]:
    """Walk the graph once, from the parameters up; sets of nodes are integers with one bit for each node."""
    outputs = [tensor for tensor in outputs if tensor.requires_grad]
    roots = [edge.node for edge in graph.edges_of(outputs)]
    order = {node: number for number, node in enumerate(_from_below(roots))}
    inner = [[order[lower] for lower in _next(node) if lower in order] for node in order]
    is_layer = [_is_weight_layer(node) for node in order]
    depths: list[int] = []
    below: list[int] = []  # each with itself
    for number, lower in enumerate(inner):
        depths.append(is_layer[number] + max((depths[other] for other in lower), default=0))
        below.append(1 << number)
        for other in lower:
            below[number] |= below[other]
    top = _set(order[root] for root in roots)
    entered = [_set(lower) for lower in inner]

    def is_link(number: int) -> bool:
        inside, self_only = below[number], 1 << number
        if not depths[number] or (top & inside) & ~self_only:
            return False
        for other, lower in enumerate(entered):
            if inside >> other & 1:
                continue
            # A way in that goes around, or layers beside (another tower) that are neither below nor above.
            if (lower & inside) & ~self_only or (is_layer[other] and not below[other] >> number & 1):
                return False
        return True

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
        names = tuple(name for name, _ in (marks[node] for node in nodes) if name)
        name = min(names, key=lambda name: name.count("."), default="")
        links.append(Link(name, names, marks[nodes[0]][1], depths[last]))
    if roots and (not links or top != 1 << last):  # several outputs, or something else than a tensor
        shape, depth = tuple(outputs[0].shape), max(depths[order[root]] for root in roots)
        links.append(Link("", (), shape, depth))
    return tuple(links)


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
