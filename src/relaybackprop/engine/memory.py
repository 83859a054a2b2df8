"""Detection of in-place operations at boundaries, where two tensors of the graph share memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from relaybackprop.engine.junction import Junction
from relaybackprop.errors import BoundaryError


@dataclass(eq=False)
class _Crossed:
    """The tensors at a junction.

    Args:
        junction: the junction.
        below: input tensors with their gradient edges.
        above: output tensors with their versions.
    """

    junction: Junction
    below: list[tuple[Tensor, GradientEdge]]
    above: list[tuple[Tensor, int]]


class InPlaceCheck:
    """Checks the tensors below and above each junction, which share memory, by their version counters."""

    def __init__(self) -> None:
        self._crossed: list[_Crossed] = []

    def watch(
        self, junction: Junction, below: Sequence[Tensor], edges: Sequence[GradientEdge], above: Sequence[Tensor]
    ) -> None:
        """Add the tensors of a junction; `edges` are those of the tensors below it."""
        versions = [(tensor, tensor._version) for tensor in above]
        self._crossed.append(_Crossed(junction, list(zip(below, edges, strict=True)), versions))

    def check(self, end: int | None = None) -> None:
        """Mark the junctions whose values were modified in place above them, and stop watching them.

        Args:
            end: stop watching only the junctions with an index below `end`. No later loss reaches the layers above
                these, so later changes cannot affect a gradient. None stops watching all.

        Raises:
            BoundaryError: a value was modified through another tensor, or both above and below the junction.
        """
        explained = set[int]()  # tensors that were modified above another, higher junction
        for crossed in reversed(self._crossed):
            junction = crossed.junction
            changed = [tensor for tensor, version in crossed.above if tensor._version != version]
            aliased = [t for t in changed if id(t) not in explained and _is_at(t, junction)]
            direct = {tensor.data_ptr() for tensor in changed if not any(tensor is other for other in aliased)}
            # Tensors of one storage, as from chunk(), share the version counter. Only those at the address of a
            # modified tensor count as modified.
            if any(not direct or tensor.data_ptr() in direct for tensor in aliased):
                raise in_place_error(junction.boundary)
            if direct:
                if any(_has_moved(tensor, edge) for tensor, edge in crossed.below):
                    raise in_place_error(junction.boundary)
                junction.in_place = True
                explained |= {id(tensor) for tensor, _ in crossed.below}
        self._crossed = [crossed for crossed in self._crossed if end is not None and crossed.junction.index >= end]


def in_place_error(boundary: str) -> BoundaryError:
    """Build the error for values at a boundary that are modified in place through another tensor."""
    return BoundaryError(
        f"the {boundary} is modified in place through another tensor that shares its memory",
        "autograd cannot track a value that is modified above a boundary and also read on a path around it",
        "Use inplace=False where the value is modified.",
    )


def _is_at(tensor: Tensor, junction: Junction) -> bool:
    """Return whether autograd still treats the tensor as the junction's output."""
    return getattr(tensor.grad_fn, "junction", None) is junction


def _has_moved(tensor: Tensor, edge: GradientEdge) -> bool:
    """Return whether a tensor has been modified in place since its gradient edge was `edge`.

    The edge of a view changes with every change of its memory, so views are not checked.
    """
    return not tensor._is_view() and get_gradient_edge(tensor)[:2] != edge[:2]
