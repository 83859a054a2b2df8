"""Hooks on the plan's modules, registered only while a forward pass runs (decision 001).

Note [Skipped modules]
Layer drop skips modules of an `nn.ModuleList` at random. If the module of a boundary is skipped, while earlier modules
of the list have run in their order,
1. a window that ends there ends at the input of the next module of the list that runs: at all of its inputs in place of
   the skipped module's input, at the first one in place of the skipped module's output;
2. if no later module of the list runs, it ends at the output of the module that owns the list, and this loss does not
   train the layers in between in this pass. End windows at modules that others of the list follow;
3. a head that reads the skipped module's output does not run, and the forward pass has no output for it.
"""

import difflib
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.autograd.graph import Node

from relaybackprop.engine.calls import Calls
from relaybackprop.engine.pytree import tensors_in
from relaybackprop.errors import CompiledOverlapError, ModuleNameError, TransformError
from relaybackprop.plan import Boundary, Plan


class Crosser(Protocol):
    """The interface of an engine to the hooks."""

    calls: Calls

    def cross(self, boundary: Boundary, place: Boundary, value: Any) -> Any:
        """Process the value at a boundary, and return the value that the layers above read.

        `place` is the boundary itself, or another one if a module was skipped.
        """
        ...


@contextmanager
def boundaries(model: nn.Module, plan: Plan, engine: Crosser) -> Generator[None]:
    """Make calls of the plan's modules cross its boundaries inside this context."""
    with ExitStack() as stack:
        for container, inside in _lists(model, plan).items():
            _attach_list(stack, model, container, inside, engine)
        for boundary in plan.boundaries:
            crossing = partial(_cross, engine, boundary)
            attach(stack, find_module(model, boundary.module), boundary.side, crossing)
        yield


def _cross(engine: Crosser, boundary: Boundary, value: Any) -> Any:
    refuse_transforms(f"the {boundary}")
    return engine.cross(boundary, boundary, value) if engine.calls.is_active() else value


def _lists(model: nn.Module, plan: Plan) -> dict[str, list[Boundary]]:
    """The boundaries in each module list, by its name."""
    found: dict[str, list[Boundary]] = {}
    for boundary in plan.boundaries:
        container, _, leaf = boundary.module.rpartition(".")
        if leaf.isdecimal() and isinstance(model.get_submodule(container), nn.ModuleList):
            found.setdefault(container, []).append(boundary)
    return found


def _attach_list(stack: ExitStack, model: nn.Module, container: str, wanted: list[Boundary], engine: Crosser) -> None:
    """Cross boundaries late if their modules are skipped: Note [Skipped modules]."""
    ran: list[int] = []  # indices of the list's modules, in the order they ran
    number_of = {boundary: int(boundary.module.rpartition(".")[2]) for boundary in wanted}
    upwards = sorted(wanted, key=lambda boundary: (number_of[boundary], boundary.side))  # "input" before "output"

    def pass_by(number: int | None, place: Boundary, value: Any) -> Any:
        if not engine.calls.is_active():
            return value
        in_order = bool(ran) and ran == sorted(ran)
        for boundary in upwards:
            own = number_of[boundary]
            if in_order and own not in ran and ran[-1] < own and (number is None or number > own):
                value = _cross_late(engine, boundary, place, value)
        if number is not None:
            ran.append(number)
        return value

    owner = container.rpartition(".")[0]
    for name, module in model.get_submodule(container).named_children():  # a shared module once, by its first name
        if name.isdecimal():
            attach(stack, module, "input", partial(pass_by, int(name), Boundary("input", f"{container}.{name}")))
    attach(stack, model.get_submodule(owner), "output", partial(pass_by, None, Boundary("output", owner)))


def _cross_late(engine: Crosser, boundary: Boundary, place: Boundary, value: Any) -> Any:
    """Cross at the inputs of the next module: all of them, or the first in place of a skipped module's output."""
    if boundary.side == "input" or place.side == "output" or not value[0]:
        return engine.cross(boundary, place, value)
    (first, *others), named = value
    return (engine.cross(boundary, place, first), *others), named


@contextmanager
def node_names(model: nn.Module, enabled: bool) -> Generator[dict[Node, str]]:
    """Record the innermost module that makes each node of the graph, for error messages."""
    names: dict[Node, str] = {}
    with ExitStack() as stack:
        for name, module in _eager_modules(model, "") if enabled else ():

            def note(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
                for tensor in tensors_in(output):
                    if tensor.grad_fn is not None:
                        names.setdefault(tensor.grad_fn, name)

            stack.callback(module.register_forward_hook(note).remove)
        yield names


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return the submodule of this name.

    Raises:
        ModuleNameError: the model does not have it; the message lists the nearest names.
        CompiledOverlapError: it is inside a compiled module.
        TransformError: it is compiled by torch.jit.
    """
    module = model
    for depth, part in enumerate(name.split(".")):
        if _is_compiled(module):
            raise CompiledOverlapError(
                f"the boundary {name!r} outside compiled code",
                f"{'.'.join(name.split('.')[:depth]) or 'the whole model'!r} compiled as one",
                "Compile modules outside overlaps, one by one.",
            )
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            modules = cast(Iterator[tuple[str, nn.Module]], model.named_modules())
            names = [other for other, _ in modules if other]
            near = difflib.get_close_matches(name, names, cutoff=0.4)
            raise ModuleNameError(
                "the name of a module of the model",
                f"{name!r}, which {type(model).__name__} does not have",
                f"Nearest: {', '.join(near)}." if near else "print(model) shows the names.",
            )
        module = child
    if isinstance(module, torch.jit.ScriptModule):
        raise TransformError(
            f"{name!r}, a boundary of the plan, as an ordinary nn.Module",
            "a torch.jit.ScriptModule, whose calls run no hooks",
            "Train the original module and script relay.model afterwards.",
        )
    return module


def attach(stack: ExitStack, module: nn.Module, side: str, crossing: Callable[[Any], Any]) -> None:
    """Pass a module's inputs, as (args, kwargs), or outputs through a function until the stack is closed."""

    def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return crossing((args, kwargs))

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        return crossing(output)

    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is not None:  # module.compile() would trace a hook into the compiled code, so wrap the call

        def call(*args: Any, **kwargs: Any) -> Any:
            if side == "output":
                return crossing(compiled(*args, **kwargs))
            args, kwargs = crossing((args, kwargs))
            return compiled(*args, **kwargs)

        module._compiled_call_impl = call  # pyright: ignore[reportPrivateUsage]
        stack.callback(setattr, module, "_compiled_call_impl", compiled)
    elif side == "input":
        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    else:
        stack.callback(module.register_forward_hook(after).remove)


def refuse_transforms(place: str) -> None:
    """Raise `CompiledOverlapError` or `TransformError` if a compiler or a torch.func transform traces `place`."""

    def refuse() -> None:
        raise CompiledOverlapError(
            f"{place} to run eagerly, so that gradients can split and join there",
            "a compiler that traces through it",
            "Compile modules outside overlaps, one by one; export relay.eval() or relay.model.",
        )

    # An exception in traced code would only make the compiler fall back to eager code.
    if torch.compiler.is_compiling():
        torch.compiler.disable(refuse)()  # pyright: ignore
    if torch._C._are_functorch_transforms_active():  # pyright: ignore
        raise TransformError(
            f"{place} outside torch.func transforms",
            "a transform such as torch.func.grad or vmap, which cannot split gradients",
            "Call backward() on the loss, or transform relay.model.",
        )


def _is_compiled(module: nn.Module) -> bool:
    """Whether the module was compiled, by module.compile() or torch.compile(module)."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "dynamo_ctx")


def _eager_modules(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """A module and its submodules by name, except compiled ones, where hooks would change the compiled code."""
    if _is_compiled(module) or isinstance(module, torch.jit.ScriptModule):
        return
    yield name, module
    for child_name, child in module.named_children():
        yield from _eager_modules(child, f"{name}.{child_name}" if name else child_name)
