"""Hooks on the plan's modules, registered only while a forward pass runs (decision 001).

Note [Skipped modules]
Layer drop skips modules of an `nn.ModuleList` at random. If the module of a boundary is skipped, and earlier modules of
the list have run in order:
1. A window that ends there ends at the input of the next module of the list that runs. All inputs of the next module
   replace the skipped module's input; the next module's first input replaces the skipped module's output.
2. If no later module of the list runs, the window ends at the output of the module that owns the list, and the loss
   does not train the layers in between in this pass. To avoid this, do not end windows at the last module of a list.
3. A head that reads the skipped module's output does not run, and the relay's output does not include it.
"""

import difflib
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import nn

from relaybackprop.engine.calls import Calls
from relaybackprop.engine.graph import ModuleNames
from relaybackprop.engine.pytree import tensors_in
from relaybackprop.errors import CompiledOverlapError, ModuleNameError, TransformError
from relaybackprop.plan import Boundary, Plan


class Engine(Protocol):
    """The interface that the hooks require of an engine."""

    calls: Calls

    def cross(self, boundary: Boundary, place: Boundary, value: Any) -> Any:
        """Process the value at a boundary and return the value that the layers above read.

        `place` is the boundary itself, or a later one if a module was skipped.
        """
        ...


@contextmanager
def boundary_hooks(model: nn.Module, plan: Plan, engine: Engine) -> Generator[None]:
    """Register hooks that pass the values at the plan's boundaries to the engine and remove them on exit."""
    with ExitStack() as stack:
        for container, in_list in _boundaries_by_list(model, plan).items():
            _attach_list(stack, model, container, in_list, engine)
        for boundary in plan.boundaries:
            crossing = partial(_cross, engine, boundary)
            attach(stack, find_module(model, boundary.module), boundary.side, crossing)
        yield


def _cross(engine: Engine, boundary: Boundary, value: Any) -> Any:
    check_no_transforms(f"the {boundary}")
    return engine.cross(boundary, boundary, value) if engine.calls.is_active() else value


def _boundaries_by_list(model: nn.Module, plan: Plan) -> dict[str, list[Boundary]]:
    """Return the boundaries at the modules of each `nn.ModuleList`, by the name of the list."""
    by_list: dict[str, list[Boundary]] = {}
    for boundary in plan.boundaries:
        container, _, leaf = boundary.module.rpartition(".")
        if leaf.isdecimal() and isinstance(model.get_submodule(container), nn.ModuleList):
            by_list.setdefault(container, []).append(boundary)
    return by_list


def _attach_list(
    stack: ExitStack, model: nn.Module, container: str, list_boundaries: list[Boundary], engine: Engine
) -> None:
    """Register hooks that cross the boundaries of skipped modules later: Note [Skipped modules]."""
    ran: list[int] = []  # indices of the list's modules, in the order they ran
    index_of = {boundary: int(boundary.module.rpartition(".")[2]) for boundary in list_boundaries}
    by_height = sorted(list_boundaries, key=lambda b: (index_of[b], b.side))  # sorts "input" before "output"

    def cross_skipped(next_index: int | None, place: Boundary, value: Any) -> Any:
        if not engine.calls.is_active():
            return value
        # In a list whose modules run out of order, a module that has not run yet may still run.
        in_order = bool(ran) and ran == sorted(ran)
        for boundary in by_height:
            index = index_of[boundary]
            if in_order and index not in ran and ran[-1] < index and (next_index is None or next_index > index):
                value = _cross_late(engine, boundary, place, value)
        if next_index is not None:
            ran.append(next_index)
        return value

    owner = container.rpartition(".")[0]
    for name, module in model.get_submodule(container).named_children():  # once, if shared
        if name.isdecimal():
            attach(stack, module, "input", partial(cross_skipped, int(name), Boundary("input", f"{container}.{name}")))
    attach(stack, model.get_submodule(owner), "output", partial(cross_skipped, None, Boundary("output", owner)))


def _cross_late(engine: Engine, boundary: Boundary, place: Boundary, value: Any) -> Any:
    """Cross a boundary at the inputs of the next module: all of them, or the first for a skipped module's output."""
    if boundary.side == "input" or place.side == "output" or not value[0]:
        return engine.cross(boundary, place, value)
    (first, *others), kwargs = value
    return (engine.cross(boundary, place, first), *others), kwargs


@contextmanager
def node_names(model: nn.Module, calls: Calls, enabled: bool) -> Generator[ModuleNames]:
    """Record the modules whose outputs are at each node of the graph, for error messages.

    Modules that run in heads, in another thread or again in a backward pass are not recorded.
    """
    names = ModuleNames()
    with ExitStack() as stack:
        for name, module in _eager_modules(model, "") if enabled else ():
            if not name:  # the model itself
                continue

            def note(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
                if calls.is_active():
                    names.record(name, tensors_in(output))

            stack.callback(module.register_forward_hook(note).remove)
        yield names


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return a submodule by name.

    Raises:
        ModuleNameError: the model does not have it. The message lists the nearest names.
        CompiledOverlapError: the submodule is inside a compiled module.
        TransformError: the submodule is compiled by torch.jit.
    """
    module = model
    for depth, part in enumerate(name.split(".")):
        if _is_compiled(module):
            raise CompiledOverlapError(
                f"the boundary {name!r} is inside {'.'.join(name.split('.')[:depth]) or 'the whole model'!r}, which is "
                "compiled as one",
                "boundaries must be outside compiled code, so that gradients can split and join there",
                "Compile modules outside overlaps, one by one.",
            )
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            modules = cast(Iterator[tuple[str, nn.Module]], model.named_modules())
            names = [other for other, _ in modules if other]
            matches = difflib.get_close_matches(name, names, cutoff=0.4)
            raise ModuleNameError(
                f"{type(model).__name__} has no module {name!r}",
                "a plan must use names that model.named_modules() lists",
                f"Nearest: {', '.join(matches)}." if matches else "print(model) shows the names.",
            )
        module = child
    if isinstance(module, torch.jit.ScriptModule):
        raise TransformError(
            f"{name!r}, a boundary of the plan, is a torch.jit.ScriptModule",
            "a boundary must be an ordinary nn.Module, since calls of script modules run no hooks",
            "Train the original module and script relay.model afterwards.",
        )
    return module


def attach(stack: ExitStack, module: nn.Module, side: str, crossing: Callable[[Any], Any]) -> None:
    """Pass a module's inputs, as (args, kwargs), or its output through a function until the stack is closed."""

    def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return crossing((args, kwargs))

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        return crossing(output)

    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is not None:
        # module.compile() would trace a hook into the compiled code, so wrap the compiled call instead.

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


def check_no_transforms(place: str) -> None:
    """Raise `CompiledOverlapError` or `TransformError` if a compiler or a torch.func transform traces `place`."""

    def refuse() -> None:
        raise CompiledOverlapError(
            f"a compiler traces through {place}",
            "it must run eagerly, so that gradients can split and join",
            "Compile modules outside overlaps, one by one; to export, use relay.eval() or relay.model.",
        )

    # An exception in traced code would only make the compiler fall back to eager code.
    if torch.compiler.is_compiling():
        torch.compiler.disable(refuse)()  # pyright: ignore
    if torch._C._are_functorch_transforms_active():  # pyright: ignore
        raise TransformError(
            f"{place} runs inside a torch.func transform, such as grad or vmap",
            "transforms cannot split gradients at the boundaries of windows",
            "Call backward() on the loss, or transform relay.model.",
        )


def _is_compiled(module: nn.Module) -> bool:
    """Return whether a module was compiled, by module.compile() or torch.compile(module)."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "dynamo_ctx")


def _eager_modules(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and its submodules by name, except compiled ones, whose code a hook would change."""
    if _is_compiled(module) or isinstance(module, torch.jit.ScriptModule):
        return
    yield name, module
    for child_name, child in module.named_children():
        yield from _eager_modules(child, f"{name}.{child_name}" if name else child_name)
