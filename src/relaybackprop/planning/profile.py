"""Profiler of a training step: operations, saved bytes and live bytes, by part of the network."""

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
class Spent:
    """The cost of one training step in one part of the network.

    Args:
        forward: floating-point operations of the forward pass.
        backward: floating-point operations of the backward pass.
        saved: bytes that autograd saves for the backward pass, including the batch, but not parameters and buffers.
            Each storage counts once, where it is first saved. Early release does not hold all of them at the same time.
    """

    forward: int = 0
    backward: int = 0
    saved: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations of both passes."""
        return self.forward + self.backward

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.forward + other.forward, self.backward + other.backward, self.saved + other.saved)


class FlopCounter(TorchDispatchMode):
    """Counts the floating-point operations of matrix products and convolutions by PyTorch's own formulas.

    A multiplication and an addition count as two, padding as ordinary input, and all other operations as zero.
    PyTorch's `FlopCounterMode` is not used, since it tracks modules and fails under `autograd.grad`.

    Attributes:
        total: operations so far.
    """

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        from torch.utils.flop_counter import flop_registry  # lazy: costs 0.1 s, and training does not need it

        self.total = 0
        self._formulas: Mapping[Any, Callable[..., int]] = flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and add its cost."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = self._formulas.get(func.overloadpacket)
        if formula is not None and args[0] is not None:  # attention's backward pass may have no gradient
            self.add(formula(*args, **kwargs, out_val=result))
        self.see(func.overloadpacket, result)
        return result

    def see(self, operation: Any, result: Any) -> None:
        """Record the result of an operation; for subclasses."""

    def add(self, flops: int) -> None:
        """Record the cost of an operation."""
        self.total += flops


class Ledger(FlopCounter):
    """Costs of a step by row: in the forward pass the current row, in the backward pass the row that made the node.

    Autograd numbers nodes as it makes them, so each row's nodes have consecutive numbers.

    Attributes:
        spent: costs by row.
        parameters: elements of the parameters by row.
        row: the current row.
        alive: memory besides the owned tensors, their gradients and the batch.
    """

    def __init__(self, rows: int, owned: Sequence[Tensor], batch: Sequence[Tensor]) -> None:
        super().__init__()
        gradients = [tensor.grad for tensor in owned if tensor.grad is not None]
        self.alive = Storages([*owned, *gradients, *batch])
        self.spent = [Spent() for _ in range(rows)]
        self.parameters = [0] * rows
        self.row = 0
        self._row_below = 0  # row of the last node that ran in a backward pass
        self._end = 0
        self._starts: list[tuple[int, int]] = [(-1, 0)]  # the number of a row's first node, and the row
        self._saved = Storages(owned)

    def enter(self, row: int) -> None:
        """Make this the current row of the forward pass."""
        self.row = row
        self._starts.append((torch.autograd._get_sequence_nr(), row))  # pyright: ignore

    def add(self, flops: int) -> None:
        """Record the cost of an operation of the forward pass, or of the node that runs in the backward pass."""
        super().add(flops)
        node = cast(Node | None, torch._C._current_autograd_node())  # pyright: ignore[reportPrivateUsage]
        if node is None:
            self.spent[self.row] += Spent(forward=flops)
            return
        # Nodes that checkpointing makes in the backward pass belong to the node that recomputes them.
        if graph.number_of(node) < self._end:
            self._row_below = self._row_of(node)
        self.spent[self._row_below] += Spent(backward=flops)

    def see(self, operation: Any, result: Any) -> None:
        """Record the storages and the workspace of an operation."""
        self.alive.note(result)
        if operation is torch.ops.aten.convolution_backward and result[0] is not None:
            self.alive.need(result[0].nbytes)  # a CPU copies it from the library's memory format

    def keep(self, tensor: Tensor) -> Tensor:
        """Record a tensor that autograd saves."""
        node = cast(Node | None, torch._C._current_autograd_node())  # pyright: ignore[reportPrivateUsage]
        self.spent[self.row if node is None else self._row_below] += Spent(saved=self._saved.note(tensor))
        return tensor

    def close(self) -> None:
        """Mark the end of the forward pass: the backward pass makes all later nodes."""
        self._end = torch.autograd._get_sequence_nr()  # pyright: ignore

    def note_parameters(self, loss: Tensor) -> None:
        """Assign each parameter to the first row that uses it."""
        rows: dict[Tensor, int] = {}
        for node in graph.walk(graph.edges_of([loss]), graph.everywhere):
            for lower, _ in node.next_functions:
                variable = None if lower is None else graph.variable_of(lower)
                if variable is not None:
                    rows[variable] = min(self._row_of(node), rows.get(variable, len(self.spent)))
        self.parameters = [sum(v.numel() for v, r in rows.items() if r == row) for row in range(len(self.spent))]

    def _row_of(self, node: Node) -> int:
        return self._starts[bisect_right(self._starts, graph.number_of(node), key=lambda start: start[0]) - 1][1]
