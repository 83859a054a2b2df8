"""Profiler of a training step: operations, saved bytes and peak memory, by part of the network."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode

from relaybackprop.engine import graph
from relaybackprop.planning.storages import Storages


@dataclass(frozen=True)
class PartCost:
    """The cost of one training step in one part of the network.

    Args:
        forward: floating-point operations of the forward pass.
        backward: floating-point operations of the backward pass.
        saved: bytes that autograd saves for the backward pass, including the batch, but not parameters and buffers.
            Each storage counts once, where it is first saved. Early release does not hold all of them at once.
    """

    forward: int = 0
    backward: int = 0
    saved: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations of both passes."""
        return self.forward + self.backward

    def __add__(self, other: "PartCost") -> "PartCost":
        return PartCost(self.forward + other.forward, self.backward + other.backward, self.saved + other.saved)


class FlopCounter(TorchDispatchMode):
    """Counts the floating-point operations of matrix products and convolutions by PyTorch's own formulas.

    A multiplication and an addition count as two, padding as ordinary input, and all other operations as zero.
    PyTorch's `FlopCounterMode` is not used, since it tracks modules and fails under `autograd.grad`.

    Attributes:
        total: floating-point operations so far.
    """

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        from torch.utils.flop_counter import flop_registry  # lazy: costs 0.1 s, and training does not need it

        self.total = 0
        self._formulas: Mapping[Any, Callable[..., int]] = flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and add its FLOPs."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = self._formulas.get(func.overloadpacket)
        if formula is not None and args[0] is not None:  # the gradient of attention may be None
            self.add(formula(*args, **kwargs, out_val=result))
        self.on_operation(func.overloadpacket, result)
        return result

    def on_operation(self, operation: Any, result: Any) -> None:
        """Receive the result of each operation. Subclasses override it."""

    def add(self, flops: int) -> None:
        """Add the FLOPs of an operation."""
        self.total += flops


class Profiler(FlopCounter):
    """Profiles a step by row. A row is a part of the network.

    Operations of the forward pass count in the current row, those of the backward pass in the row that created the
    node. Autograd numbers nodes as it creates them, so the nodes of each row have consecutive numbers.

    Args:
        rows: number of rows.
        owned: parameters and buffers, which do not count as memory.
        batch: tensors of the batch, which do not count as memory.

    Attributes:
        spent: the cost of each row.
        parameters: elements of the parameters of each row.
        row: the current row.
        memory: memory in use, excluding the owned tensors, their gradients and the batch.
    """

    def __init__(self, rows: int, owned: Sequence[Tensor], batch: Sequence[Tensor]) -> None:
        super().__init__()
        gradients = [tensor.grad for tensor in owned if tensor.grad is not None]
        self.memory = Storages([*owned, *gradients, *batch])
        self.costs = [PartCost() for _ in range(rows)]
        self.parameters = [0] * rows
        self.row = 0
        self._backward_row = 0  # row of the last node that ran in a backward pass
        self._end = 0  # sequence number of the first node that the backward pass creates
        self._starts: list[tuple[int, int]] = [(-1, 0)]  # sequence number of a row's first node, and the row
        self._saved = Storages(owned)

    def enter_row(self, row: int) -> None:
        """Set the current row of the forward pass."""
        self.row = row
        self._starts.append((torch.autograd._get_sequence_nr(), row))  # pyright: ignore

    def add(self, flops: int) -> None:
        """Add the FLOPs of an operation of the forward pass, or of the node that runs in the backward pass."""
        super().add(flops)
        node = cast(Node | None, torch._C._current_autograd_node())  # pyright: ignore[reportPrivateUsage]
        if node is None:
            self.costs[self.row] += PartCost(forward=flops)
            return
        # Nodes that checkpointing creates in the backward pass belong to the node that recomputes them.
        if graph.sequence_number(node) < self._end:
            self._backward_row = self._row_of(node)
        self.costs[self._backward_row] += PartCost(backward=flops)

    def on_operation(self, operation: Any, result: Any) -> None:
        """Add the storages and the workspace of an operation."""
        self.memory.add(result)
        if operation is torch.ops.aten.convolution_backward and result[0] is not None:
            self.memory.add_workspace(result[0].nbytes)  # a CPU copies the result from the library's memory format

    def record_saved(self, tensor: Tensor) -> Tensor:
        """Record a tensor that autograd saves and return it: a pack hook of `saved_tensors_hooks`."""
        node = cast(Node | None, torch._C._current_autograd_node())  # pyright: ignore[reportPrivateUsage]
        self.costs[self.row if node is None else self._backward_row] += PartCost(saved=self._saved.add(tensor))
        return tensor

    def end_forward(self) -> None:
        """Mark the end of the forward pass. The backward pass creates all later nodes."""
        self._end = torch.autograd._get_sequence_nr()  # pyright: ignore

    def record_parameters(self, loss: Tensor) -> None:
        """Assign each parameter to the first row that uses it."""
        rows: dict[Tensor, int] = {}
        for node in graph.walk(graph.edges_of([loss]), graph.follow_all):
            for lower, _ in node.next_functions:
                variable = None if lower is None else graph.variable_of(lower)
                if variable is not None:
                    rows[variable] = min(self._row_of(node), rows.get(variable, len(self.costs)))
        self.parameters = [sum(v.numel() for v, r in rows.items() if r == row) for row in range(len(self.costs))]

    def _row_of(self, node: Node) -> int:
        return self._starts[bisect_right(self._starts, graph.sequence_number(node), key=lambda start: start[0]) - 1][1]
