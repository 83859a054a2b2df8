"""Detection of in-place operations at boundaries, where two tensors of the graph share memory."""

from torch import Tensor

from relaybackprop.engine.junction import Junction
from relaybackprop.errors import BoundaryError


class InPlaceCheck:
    """Checks the tensors below and above each junction, which share memory, by their version counters."""

    def __init__(self) -> None:
        self._crossed: list[tuple[Junction, list[Tensor], list[tuple[Tensor, int]]]] = []

    def watch(self, junction: Junction, below: list[Tensor], above: list[Tensor]) -> None:
        """Add the tensors of a junction."""
        self._crossed.append((junction, below, [(tensor, tensor._version) for tensor in above]))

    def check(self, below: int | None = None) -> None:
        """Mark the junctions whose values the layers above modified in place, and release their tensors.

        Args:
            below: release the junctions with a smaller index only; None releases all.

        Raises:
            BoundaryError: a value was modified through a tensor that autograd does not relate to the junction.
        """
        explained = set[int]()  # tensors that were modified above another, higher junction
        for junction, sources, above in reversed(self._crossed):
            changed = [tensor for tensor, version in above if tensor._version != version]
            aliased = [t for t in changed if id(t) not in explained and _is_at(t, junction)]
            direct = {tensor.data_ptr() for tensor in changed if not any(tensor is other for other in aliased)}
            # Tensors of one storage, as from chunk(), share the version counter. Only those at the address of a
            # modified tensor count as modified.
            if any(not direct or tensor.data_ptr() in direct for tensor in aliased):
                raise in_place_error(junction.boundary)
            if direct:
                junction.in_place = True
                explained |= {id(tensor) for tensor in sources}
        self._crossed = [watched for watched in self._crossed if below is not None and watched[0].index >= below]


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
