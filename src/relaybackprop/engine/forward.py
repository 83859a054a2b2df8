"""One forward pass with junctions at the plan's boundaries, for a backward pass over the whole graph."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from relaybackprop.engine.calls import Calls
from relaybackprop.engine.graph import edges_of
from relaybackprop.engine.junction import Junction, Lanes, cross
from relaybackprop.engine.memory import SharedMemory
from relaybackprop.engine.pytree import paths_in, replace_tensors, tensors_in
from relaybackprop.engine.routes import LossPath
from relaybackprop.plan import PRIMARY, Boundary


class ForwardPass:
    """The state of one `Relay.forward`.

    Args:
        calls: the boundaries crossed.

    Attributes:
        junctions: from the lowest up.
        edges: above each junction.
        head_inputs: by name of the loss. Copies: the layers after the boundary, or the head, may modify them in place
            (decision 013).
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.junctions: list[Junction] = []
        self.edges: list[list[GradientEdge]] = []
        self.head_inputs: dict[str, Any] = {}
        self._memory = SharedMemory()
        self._lanes = Lanes()
        self._at: dict[Boundary, Junction] = {}

    def cross(self, boundary: Boundary, place: Boundary, value: Any) -> Any:
        """Insert a junction: return the value for the layers above, and store those for the heads."""
        self.calls.enter(boundary, place, value)
        heads = self.calls.heads_at(boundary, place)
        tensors = [tensor for tensor in tensors_in(value) if tensor.requires_grad and torch.is_grad_enabled()]
        trunk, branches = self._join(boundary, str(place), tensors, heads)
        requiring = {id(tensor) for tensor in tensors}
        plain = [tensor for tensor in tensors_in(value) if heads and id(tensor) not in requiring]
        for name, branch in zip(heads, branches, strict=True):
            owned = [tensor.clone() for tensor in plain]
            self.head_inputs[name] = replace_tensors(value, [*tensors, *plain], [*branch, *owned])
        # Return the same object if nothing is replaced: modules may write into the containers that they are given.
        return replace_tensors(value, tensors, trunk) if trunk else value

    def leave(self, output: Any) -> Any:
        """Insert a junction at each tensor of the model's output, where the primary loss's lanes start."""
        self._memory.check()
        if not any(window.ends for window in self.calls.plan.windows.values()):
            return output
        tensors = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        crossed = [self._join(None, "model's output", [tensor], ())[0][0] for tensor in tensors]
        return replace_tensors(output, tensors, crossed) if crossed else output

    def paths(self, outputs: dict[str, Any]) -> dict[str, LossPath]:
        """The path of each loss through the graph, from its output to the ends of its window."""
        paths: dict[str, LossPath] = {}
        for loss, output in outputs.items():
            window = self.calls.plan.windows[loss]
            self.calls.check_has_tensors(f"the output for the loss {loss!r}", output)
            items = {keys: edges_of([tensor]) for keys, tensor in paths_in(output) if tensor.requires_grad}
            start = None if window.upper is None else self._at.get(window.upper)
            edges = [edge for item in items.values() for edge in item]
            top = edges if loss == PRIMARY else [] if start is None else start.sources
            ends = [self._at[end] for end in window.ends if end in self._at]
            paths[loss] = LossPath(items, start, top, tuple(ends))
        return paths

    def _join(
        self, boundary: Boundary | None, place: str, tensors: list[Tensor], heads: tuple[str, ...]
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        if not tensors:  # nothing below needs a gradient
            return [], [[] for _ in heads]
        sources = [get_gradient_edge(tensor) for tensor in tensors]
        windows = self.calls.plan.windows.items()
        ending = frozenset(loss for loss, window in windows if boundary in window.ends)
        junction = Junction(place, len(self.junctions), heads, ending, self._lanes, sources)
        trunk, branches = cross(junction, tensors)
        self.junctions.append(junction)
        self.edges.append([get_gradient_edge(tensor) for tensor in trunk])
        self._memory.watch(junction, tensors, trunk)
        if boundary is not None:
            self._at[boundary] = junction
        return trunk, branches
