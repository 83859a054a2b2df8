"""Hooks on the plan's modules, only while a forward pass runs (decision 001); afterwards no trace is left.

Note [Skipped modules]
Layer drop skips modules of an `nn.ModuleList` at random. Where the module of a boundary is skipped, while modules
before it in the list have run in their order,
1. a window that ends there ends at the input of the next module of the list that runs: at all of its inputs where it
   would end at the input of the skipped module, and at the first one where it would end at its output;
2. where no later module of the list runs, it ends at the output of the module that owns the list, and layers in between
   are not trained by this loss in this pass. End windows at modules that others of the list follow;
3. a head that reads its output has no input, and the forward pass has no output for it.
"""

import difflib
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.autograd.graph import Node

from relaybackprop.engine.pytree import tensors_in
from relaybackprop.errors import CompiledOverlapError, ModuleNameError, TransformError
from relaybackprop.plan import Boundary, Plan


class Crosser(Protocol):
    """An engine, as the hooks see it."""

    def is_active(self) -> bool:
        """Whether a call belongs to the forward pass, rather than to another thread or to a backward pass."""
        ...

    def cross(self, boundary: Boundary, place: Boundary, value: Any) -> Any:
        """Take a value across a boundary of the plan and return the value to use.

        `place` is where it crosses: the boundary itself, or another one where a module was skipped.
        """
        ...


@contextmanager
def boundaries(model: nn.Module, plan: Plan, engine: Crosser) -> Generator[None]:
    """While this context is open, calls of the plan's modules cross its boundaries."""
    with ExitStack() as stack:
        for container, inside in _lists(model, plan).items():
            _attach_list(stack, model, container, inside, engine)
        for boundary in plan.boundaries:
            crossing = partial(_cross, engine, boundary)
            attach(stack, find_module(model, boundary.module), boundary.side, crossing)
        yield


def _cross(engine: Crosser, boundary: Boundary, value: Any) -> Any:
    refuse_transforms(f"the {boundary}")
    return engine.cross(boundary, boundary, value) if engine.is_active() else value


def _lists(model: nn.Module, plan: Plan) -> dict[str, list[Boundary]]:
    """By name of a module list, the boundaries in it."""
    found: dict[str, list[Boundary]] = {}
    for boundary in plan.boundaries:
        container, _, leaf = boundary.module.rpartition(".")
        if leaf.isdecimal() and isinstance(model.get_submodule(container), nn.ModuleList):
            found.setdefault(container, []).append(boundary)
    return found


def _attach_list(stack: ExitStack, model: nn.Module, container: str, wanted: list[Boundary], engine: Crosser) -> None:
    """Cross boundaries late where their modules are skipped: Note [Skipped modules]."""
    ran: list[int] = []  # numbers of the list's modules in the order in which they ran
    number_of = {boundary: int(boundary.module.rpartition(".")[2]) for boundary in wanted}
    upwards = sorted(wanted, key=lambda boundary: (number_of[boundary], boundary.side))  # "input" before "output"

    def pass_by(number: int | None, place: Boundary, value: Any) -> Any:
        if not engine.is_active():
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
    for name, module in model.get_submodule(container).named_children():  # each once: a shared one by its first name
        if name.isdecimal():
            attach(stack, module, "input", partial(pass_by, int(name), Boundary("input", f"{container}.{name}")))
    attach(stack, model.get_submodule(owner), "output", partial(pass_by, None, Boundary("output", owner)))


def _cross_late(engine: Crosser, boundary: Boundary, place: Boundary, value: Any) -> Any:
    """Cross at the inputs of the next module: all of them, or what takes the place of a skipped module's output."""
    if boundary.side == "input" or place.side == "output" or not value[0]:
        return engine.cross(boundary, place, value)
    (first, *others), named = value
    return (engine.cross(boundary, place, first), *others), named


@contextmanager
def node_names(model: nn.Module, enabled: bool) -> Generator[dict[Node, str]]:
    """Record which module makes which node of the graph, the innermost one first, for error messages."""
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
        CompiledOverlapError: it is inside a compiled module, where no boundary can be.
        TransformError: it is compiled by torch.jit.
    """
    module = model
    for depth, part in enumerate(name.split(".")):
        if _is_compiled(module):
            raise CompiledOverlapError(
                f"the boundary {name!r} outside of compiled code",
                f"{'.'.join(name.split('.')[:depth]) or 'the whole model'!r} compiled as one",
                "Compile modules outside of overlaps, one by one.",
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
    if compiled is not None:  # module.compile(): a hook would be traced into the compiled code, so stay outside of it

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
    """Raise where a compiler or a torch.func transform traces through a boundary.

    Raises:
        CompiledOverlapError: a compiler does.
        TransformError: a transform does.
    """

    def refuse() -> None:
        raise CompiledOverlapError(
            f"{place} to run eagerly, so that gradients can split and join there",
            "a compiler that traces through it",
            "Compile modules outside of overlaps, one by one; export relay.eval() or relay.model.",
        )

    # The compiler would take an exception in traced code as a reason to fall back to eager code.
    if torch.compiler.is_compiling():
        torch.compiler.disable(refuse)()  # pyright: ignore
    if torch._C._are_functorch_transforms_active():  # pyright: ignore
        raise TransformError(
            f"{place} outside of torch.func transforms",
            "a transform such as torch.func.grad or vmap, which cannot split gradients",
            "Call backward() on the loss, or transform relay.model.",
        )


def _is_compiled(module: nn.Module) -> bool:
    """Whether calls of the module run compiled code: by module.compile(), or as the result of torch.compile(module)."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "dynamo_ctx")


def _eager_modules(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """A module and its submodules by name, except compiled ones: hooks in there would change the compiled code."""
    if _is_compiled(module) or isinstance(module, torch.jit.ScriptModule):
        return
    yield name, module
    for child_name, child in module.named_children():
        yield from _eager_modules(child, f"{name}.{child_name}" if name else child_name)
