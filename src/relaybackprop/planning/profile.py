"""What a step costs, counted while it runs, by part of the network: operations, what autograd keeps, what is alive."""

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
    """What one training step costs in one part of the network.

    Args:
        forward: floating-point operations.
        backward: floating-point operations.
        saved: bytes that autograd keeps from the forward for the backward pass, the batch itself among them; each piece
            of memory counts once, where it is first saved. Parameters and buffers do not count. With early release
            they are not kept at the same time.
    """

    forward: int = 0
    backward: int = 0
    saved: int = 0

    @property
    def flops(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.forward + other.forward, self.backward + other.backward, self.saved + other.saved)


class FlopCounter(TorchDispatchMode):
    """Counts the floating-point operations of matrix products and convolutions while it is open.

    PyTorch's own formulas: a multiplication and an addition count as two, padding as ordinary input, and all else as
    nothing. `FlopCounterMode`, which PyTorch builds from them, follows modules and fails under `autograd.grad`.

    Attributes:
        total: so far.
    """

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        from torch.utils.flop_counter import flop_registry  # 0.1 s to import; whoever only trains does without

        self.total = 0
        self._formulas: Mapping[Any, Callable[..., int]] = flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and add its cost."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = self._formulas.get(func.overloadpacket)
        if formula is not None and args[0] is not None:  # attention's backward pass may have no gradient to work on
            self.add(formula(*args, **kwargs, out_val=result))
        self.see(func.overloadpacket, result)
        return result

    def see(self, operation: Any, result: Any) -> None:
        """Note what an operation has returned."""

    def add(self, flops: int) -> None:
        """Note an operation."""
        self.total += flops


class Ledger(FlopCounter):
    """Counts by row: in the forward pass the row entered last, in the backward pass the one that made the node.

    Autograd numbers its nodes as it makes them, so each row's nodes have numbers in a row.

    Attributes:
        spent: by row.
        parameters: likewise, elements.
        row: entered last.
        alive: what a step needs besides what is owned, its gradients and the batch.
    """

    def __init__(self, rows: int, owned: Sequence[Tensor], batch: Sequence[Tensor]) -> None:
        super().__init__()
        gradients = [tensor.grad for tensor in owned if tensor.grad is not None]
        self.alive = Storages([*owned, *gradients, *batch])
        self.spent = [Spent() for _ in range(rows)]
        self.parameters = [0] * rows
        self.row = 0
        self._row_below = 0  # of the node that ran last in a backward pass
        self._end = 0
        self._starts: list[tuple[int, int]] = [(-1, 0)]  # the number of a row's first node, and the row
        self._saved = Storages(owned)

    def enter(self, row: int) -> None:
        """From now on the forward pass is in this row."""
        self.row = row
        self._starts.append((torch.autograd._get_sequence_nr(), row))  # pyright: ignore

    def add(self, flops: int) -> None:
        """Note an operation of the forward pass, or of the node that runs in the backward pass."""
        super().add(flops)
        node = cast(Node | None, torch._C._current_autograd_node())  # pyright: ignore[reportPrivateUsage]
        if node is None:
            self.spent[self.row] += Spent(forward=flops)
            return
        # What checkpointing makes in the backward pass belongs to where it is run from.
        if graph.number_of(node) < self._end:
            self._row_below = self._row_of(node)
        self.spent[self._row_below] += Spent(backward=flops)

    def see(self, operation: Any, result: Any) -> None:
        """Note what an operation has returned."""
        self.alive.note(result)
        if operation is torch.ops.aten.convolution_backward and result[0] is not None:
            self.alive.need(result[0].nbytes)  # on a CPU it comes in the library's order of memory, and is copied

    def keep(self, tensor: Tensor) -> Tensor:
        """Note a tensor that autograd saves."""
        node = cast(Node | None, torch._C._current_autograd_node())  # pyright: ignore[reportPrivateUsage]
        self.spent[self.row if node is None else self._row_below] += Spent(saved=self._saved.note(tensor))
        return tensor

    def close(self) -> None:
        """A backward pass comes: what is made from now on is made by it."""
        self._end = torch.autograd._get_sequence_nr()  # pyright: ignore

    def note_parameters(self, loss: Tensor) -> None:
        """Find out which row uses which parameter first."""
        rows: dict[Tensor, int] = {}
        for node in graph.walk(graph.edges_of([loss]), graph.everywhere):
            for lower, _ in node.next_functions:
                variable = None if lower is None else graph.variable_of(lower)
                if variable is not None:
                    rows[variable] = min(self._row_of(node), rows.get(variable, len(self.spent)))
        self.parameters = [sum(v.numel() for v, r in rows.items() if r == row) for row in range(len(self.spent))]

    def _row_of(self, node: Node) -> int:
        return self._starts[bisect_right(self._starts, graph.number_of(node), key=lambda start: start[0]) - 1][1]
