"""One training forward pass: junctions go in at the plan's boundaries, and nothing stays behind."""

import difflib
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from relaybackprop.errors import BoundaryError, CompiledOverlapError, ModuleNameError, WindowError
from relaybackprop.graph import edges_of
from relaybackprop.junction import Junction, Lanes, cross
from relaybackprop.plan import PRIMARY, Boundary, Plan
from relaybackprop.schedule import LossPath, shared_memory_error
from relaybackprop.structure import replace_tensors, tensors_in

Crossing = Callable[[Any], Any]
"""What a boundary does to the value that crosses it."""

Versioned = tuple[Tensor, int]
"""A tensor and the version that it had: another one means that somebody has changed it in place."""


class Passage:
    """The state of one forward pass. It lives as long as `Relay.forward` runs.

    Args:
        plan: where heads attach and windows end.
        copies: by boundary, whether its heads need memory of their own because somebody goes on in place. Until that is
            known they have it.
    """

    def __init__(self, plan: Plan, copies: Mapping[Boundary, bool]) -> None:
        self.plan = plan
        self.copies = copies
        self.order: list[Boundary] = []
        self.junctions: list[Junction] = []
        self.edges: list[list[GradientEdge]] = []  # above each junction
        self.head_inputs: dict[str, Any] = {}
        self.copied: set[Boundary] = set()
        self._watched: dict[Boundary, list[Versioned]] = {}  # what trunk and heads read
        self._trunks: list[tuple[Junction, list[Tensor], list[Versioned]]] = []  # below and above each junction
        self._lanes = Lanes()
        self._at: dict[Boundary, Junction] = {}
        self._records = torch.is_grad_enabled()
        self._thread = threading.get_ident()

    def enter(self, boundary: Boundary, value: Any) -> bool:
        """Note that a value comes to a boundary. False where it is none of this forward pass's business.

        Raises:
            BoundaryError: it is the second one, no gradients are recorded, or no tensors are found.
            CompiledOverlapError: a compiler traces through.
        """
        refuse_tracing(f"the {boundary}")
        if threading.get_ident() != self._thread:  # somebody evaluates the plain model meanwhile
            return False
        if boundary in self.order:
            raise BoundaryError(
                f"the {boundary} once in a forward pass",
                "a second time",
                "Choose a boundary at a module that runs once; modules inside a window may run many times.",
            )
        if self._records and not torch.is_grad_enabled():
            raise BoundaryError(
                f"the {boundary} to run while gradients are recorded",
                "torch.no_grad() inside of the model, or reentrant checkpointing",
                "Use checkpoint(..., use_reentrant=False), or move the boundary out of the part without gradients.",
            )
        self.check_has_tensors(f"the {boundary}", value)
        self.order.append(boundary)
        return True

    def cross(self, boundary: Boundary, value: Any) -> Any:
        """Let a value cross a boundary: the trunk's side of it is returned, the heads' sides are kept."""
        if not self.enter(boundary, value):
            return value
        heads = tuple(name for name, window in self.plan.auxiliary.items() if window.upper == boundary)
        # Inference tensors have no version to tell by whether somebody has changed them: copy, and learn nothing.
        inference = torch.is_inference_mode_enabled()
        copy = bool(heads) and (inference or self.copies.get(boundary, True))
        if copy:
            self.copied.add(boundary)
        tensors = [tensor for tensor in tensors_in(value) if tensor.requires_grad and torch.is_grad_enabled()]
        trunk, branches = self._join(boundary, str(boundary), tensors, heads, copy)
        if heads:
            plain = [tensor for tensor in tensors_in(value) if not any(tensor is other for other in tensors)]
            watched = [*trunk, *plain]
            for name, branch in zip(heads, branches, strict=True):
                owned = [tensor.clone() for tensor in plain] if copy else plain
                self.head_inputs[name] = replace_tensors(value, [*tensors, *plain], [*branch, *owned])
                watched += [*branch, *owned]
            if not inference:
                self._watched[boundary] = _with_versions(watched)
        # The very same object where nothing is replaced: modules may write into the containers that they are given.
        return replace_tensors(value, tensors, trunk) if trunk else value

    def leave(self, output: Any) -> Any:
        """Let the model's output cross last junctions, one a tensor, from which the primary loss's lanes start."""
        tensors = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        crossed = [self._join(None, "model's output", [tensor], (), False)[0][0] for tensor in tensors]
        return replace_tensors(output, tensors, crossed) if crossed else output

    def modified(self) -> dict[Boundary, bool]:
        """For each boundary with a head, whether the trunk or a head has since changed what they read in place."""
        return {boundary: any(map(_is_modified, watched)) for boundary, watched in self._watched.items()}

    def check_in_place(self) -> None:
        """Note where the trunk went on in place, and raise where that was by another name for the same memory.

        A junction's tensors share memory with their sources, but autograd does not know: it would follow a change in
        place through one of the names only.
        """
        passed_on = set[int]()  # to another junction, above which the change in place was made
        for junction, sources, trunk in reversed(self._trunks):
            changed = [tensor for tensor, version in trunk if _is_modified((tensor, version))]
            foreign = [t for t in changed if id(t) not in passed_on and _is_at(t, junction)]
            own = {tensor.data_ptr() for tensor in changed if not any(tensor is other for other in foreign)}
            # Neighbours in one storage, as from chunk(), share their version but not their address.
            if any(not own or tensor.data_ptr() in own for tensor in foreign):
                raise shared_memory_error(junction.boundary)
            if own:
                junction.in_place = True
                passed_on |= {id(tensor) for tensor in sources}

    def check(self) -> None:
        """Raise unless the forward pass met every boundary, and no window upside down."""
        for boundary in self.plan.boundaries:
            if boundary not in self.order:
                raise BoundaryError(
                    f"the forward pass to run {boundary.module!r}, a boundary of the plan",
                    "a forward pass that never called it",
                    "Name a module that the forward pass calls; containers such as nn.ModuleList are never called.",
                )
        for loss in self.plan.auxiliary:
            self.check_upright(loss)

    def check_upright(self, loss: str) -> None:
        """Raise if the forward pass has met the top of a loss's window before its lower end."""
        window = self.plan.windows[loss]
        if window.lower is None:
            return
        met = [place for place in self.order if place in (window.lower, window.upper)]
        if met[0] == window.upper:
            raise WindowError(
                f"the window of {loss!r} to have its top above its lower end",
                f"top, the {window.upper}, which the forward pass meets before the {window.lower}",
                "Swap them, or name other modules.",
            )

    def paths(self, outputs: Mapping[str, Any]) -> dict[str, LossPath]:
        """Each loss's way through the graph, from its output to the end of its window."""
        paths: dict[str, LossPath] = {}
        for loss, window in self.plan.windows.items():
            self.check_has_tensors(f"the output for the loss {loss!r}", outputs[loss])
            edges = edges_of(tensors_in(outputs[loss]))
            start = None if window.upper is None else self._at.get(window.upper)
            top = edges if loss == PRIMARY else [] if start is None else start.sources
            end = None if window.lower is None else self._at.get(window.lower)
            paths[loss] = LossPath(edges, start, top, end)
        return paths

    def check_has_tensors(self, place: str, value: Any) -> None:
        """Raise unless tensors are found in a value."""
        # Tensors that are not found would carry their gradients past every window's end without a word.
        if self._records and not tensors_in(value):
            raise BoundaryError(
                f"tensors in {place}, bare or in tuples, lists, mappings or dataclasses",
                f"{_kind_of(value)} without any that can be found",
                "Return the tensors in one of these, or choose another module.",
            )

    def _join(
        self, boundary: Boundary | None, place: str, tensors: list[Tensor], heads: tuple[str, ...], copy: bool
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        if not tensors:  # nothing below needs a gradient
            return [], [[] for _ in heads]
        sources = [get_gradient_edge(tensor) for tensor in tensors]
        junction = Junction(place, len(self.junctions), heads, self._lanes, sources)
        trunk, branches = cross(junction, tensors, copy=copy)
        self.junctions.append(junction)
        self.edges.append([get_gradient_edge(tensor) for tensor in trunk])
        self.watch(junction, tensors, trunk)
        if boundary is not None:
            self._at[boundary] = junction
        return trunk, branches

    def watch(self, junction: Junction, below: list[Tensor], above: list[Tensor]) -> None:
        """Let `check_in_place` look at a junction's tensors, in one memory but two graphs."""
        self._trunks.append((junction, below, _with_versions(above)))


def modified_error(who: str, boundary: Boundary) -> BoundaryError:
    """For memory that others read too and that somebody has begun to change in place."""
    return BoundaryError(
        f"{who} the {boundary} to leave it alone, as in the first forward pass",
        "a change in place of memory that others read too",
        "Use inplace=False there. The next forward pass will copy.",
    )


def _with_versions(tensors: list[Tensor]) -> list[Versioned]:
    return [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]


def _is_modified(watched: Versioned) -> bool:
    return watched[0]._version != watched[1]


def _is_at(tensor: Tensor, junction: Junction) -> bool:
    """Whether the tensor is still what the junction handed on, as far as autograd knows."""
    return getattr(tensor.grad_fn, "junction", None) is junction


def _kind_of(value: Any) -> str:
    """The value's type; of a module's arguments, their types."""
    match value:
        case ((*args,), {**kwargs}):
            return f"({', '.join(type(item).__name__ for item in (*args, *kwargs.values()))})"
        case _:
            return type(value).__name__


def refuse_tracing(place: str) -> None:
    """Raise where a compiler traces through a boundary.

    Raises:
        CompiledOverlapError: it does.
    """

    def refuse() -> None:
        raise CompiledOverlapError(
            f"{place} to run eagerly, so that gradients can split and join there",
            "a compiler that traces through it",
            "Compile the modules between the plan's boundaries, one by one.",
        )

    # The compiler would take an exception in traced code for a reason to run the code without it, and go on.
    if torch.compiler.is_compiling():
        torch.compiler.disable(refuse)()  # pyright: ignore


@contextmanager
def boundaries(model: nn.Module, passage: Passage) -> Generator[None]:
    """While this context is open, calls of the plan's modules cross its boundaries. Afterwards no trace is left."""
    with ExitStack() as stack:
        for boundary in passage.plan.boundaries:
            module = find_module(model, boundary.module)
            _attach(stack, module, boundary.side, partial(passage.cross, boundary))
        yield


@contextmanager
def node_names(model: nn.Module, enabled: bool) -> Generator[dict[Node, str]]:
    """Note which module makes which node of the graph, the innermost one first. For error messages."""
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
    """The submodule of this name.

    Raises:
        ModuleNameError: there is none; the message lists the nearest names.
        CompiledOverlapError: it lies inside of a compiled module, where no boundary can be.
    """
    module = model
    for depth, part in enumerate(name.split(".")):
        if _is_compiled(module):
            raise CompiledOverlapError(
                f"the boundary {name!r} outside of compiled code",
                f"{'.'.join(name.split('.')[:depth]) or 'the whole model'!r} compiled as one",
                "Compile the modules between the plan's boundaries, one by one.",
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
    return module


def _attach(stack: ExitStack, module: nn.Module, side: str, crossing: Crossing) -> None:
    """Let what goes into, or comes out of, a module's calls cross a boundary, until the stack is closed."""

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


def _is_compiled(module: nn.Module) -> bool:
    """Whether calls of the module run compiled code: by module.compile(), or as what torch.compile(module) returns."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "dynamo_ctx")


def _eager_modules(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """A module and those below it, by name, without what is compiled: hooks in there would change the compiled code."""
    if _is_compiled(module):
        return
    yield name, module
    for child_name, child in module.named_children():
        yield from _eager_modules(child, f"{name}.{child_name}" if name else child_name)
