"""The forward pass with junctions at the plan's boundaries, for one backward pass over the whole graph."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from relaybackprop.engine.calls import Calls
from relaybackprop.engine.graph import edges_of
from relaybackprop.engine.junction import Junction, Lanes, cross
from relaybackprop.engine.memory import InPlaceCheck
from relaybackprop.engine.pytree import paths_in, replace_tensors, tensors_in
from relaybackprop.engine.routes import LossPath
from relaybackprop.plan import PRIMARY, Boundary


class ForwardPass:
    """The state of one `Relay.forward`.

    Args:
        calls: records the boundaries crossed.

    Attributes:
        junctions: all junctions, from lowest to highest.
        edges: the gradient edges above each junction.
        head_inputs: the input of each head, by loss. These are copies, because the layers above the boundary, or the
            head, may modify them in place (decision 013).
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.junctions: list[Junction] = []
        self.edges: list[list[GradientEdge]] = []
        self.head_inputs: dict[str, Any] = {}
        self._in_place = InPlaceCheck()
        self._lanes = Lanes()
        self._junction_at: dict[Boundary, Junction] = {}

    def cross(self, boundary: Boundary, place: Boundary, value: Any) -> Any:
        """Insert a junction. Returns the value for the layers above, and stores those for the heads."""
        self.calls.enter(boundary, place, value)
        heads = self.calls.heads_at(boundary, place)
        tensors = [tensor for tensor in tensors_in(value) if tensor.requires_grad and torch.is_grad_enabled()]
        trunk, branches = self._insert_junction(boundary, str(place), tensors, heads)
        ids = {id(tensor) for tensor in tensors}
        without_grad = [tensor for tensor in tensors_in(value) if heads and id(tensor) not in ids]
        for name, branch in zip(heads, branches, strict=True):
            copies = [tensor.clone() for tensor in without_grad]
            self.head_inputs[name] = replace_tensors(value, [*tensors, *without_grad], [*branch, *copies])
        # Return the same object if nothing is replaced: modules may write into the containers that they receive.
        return replace_tensors(value, tensors, trunk) if trunk else value

    def finish(self, output: Any) -> Any:
        """Insert a junction at each tensor of the model's output, where lanes of the primary loss start."""
        self._in_place.check()
        if not any(window.ends for window in self.calls.plan.windows.values()):
            return output
        tensors = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        crossed = [self._insert_junction(None, "model's output", [tensor], ())[0][0] for tensor in tensors]
        return replace_tensors(output, tensors, crossed) if crossed else output

    def paths(self, outputs: dict[str, Any]) -> dict[str, LossPath]:
        """Return the path of each loss through the graph, from its output to the ends of its window."""
        paths: dict[str, LossPath] = {}
        for loss, output in outputs.items():
            window = self.calls.plan.windows[loss]
            self.calls.check_has_tensors(f"the output for the loss {loss!r}", output)
            # One item per tensor: if a path bypasses the window's end, the error states the item where it starts.
            items = {keys: edges_of([tensor]) for keys, tensor in paths_in(output) if tensor.requires_grad}
            start = None if window.upper is None else self._junction_at.get(window.upper)
            edges = [edge for item in items.values() for edge in item]
            top = edges if loss == PRIMARY else [] if start is None else start.sources
            ends = {self.calls.places[end]: self._junction_at[end] for end in window.ends if end in self._junction_at}
            paths[loss] = LossPath(items, start, top, ends)
        return paths

    def _insert_junction(
        self, boundary: Boundary | None, place: str, tensors: list[Tensor], heads: tuple[str, ...]
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Insert a junction at these tensors. Returns the trunk's tensors, and copies for each head."""
        if not tensors:  # nothing below needs a gradient
            return [], [[] for _ in heads]
        sources = [get_gradient_edge(tensor) for tensor in tensors]
        windows = self.calls.plan.windows.items()
        ending = frozenset(loss for loss, window in windows if boundary in window.ends)
        junction = Junction(place, len(self.junctions), heads, ending, self._lanes, sources)
        trunk, branches = cross(junction, tensors)
        self.junctions.append(junction)
        self.edges.append([get_gradient_edge(tensor) for tensor in trunk])
        self._in_place.watch(junction, tensors, sources, trunk)
        if boundary is not None:
            self._junction_at[boundary] = junction
        return trunk, branches
