"""Detection of in-place operations at boundaries, where autograd has two tensors for one memory."""

from torch import Tensor

from relaybackprop.engine.junction import Junction
from relaybackprop.errors import BoundaryError


class SharedMemory:
    """The tensors below and above each junction, which share memory, with their version counters."""

    def __init__(self) -> None:
        self._crossed: list[tuple[Junction, list[Tensor], list[tuple[Tensor, int]]]] = []

    def watch(self, junction: Junction, below: list[Tensor], above: list[Tensor]) -> None:
        """Add the tensors of a junction."""
        self._crossed.append((junction, below, [(tensor, tensor._version) for tensor in above]))

    def check(self) -> None:
        """Mark junctions whose value the layers above modified in place.

        Raises:
            BoundaryError: it was modified through another tensor, which autograd does not relate to the junction.
        """
        passed_on = set[int]()  # to another junction, above which they were modified
        for junction, sources, above in reversed(self._crossed):
            changed = [tensor for tensor, version in above if tensor._version != version]
            foreign = [t for t in changed if id(t) not in passed_on and _is_at(t, junction)]
            own = {tensor.data_ptr() for tensor in changed if not any(tensor is other for other in foreign)}
            # Neighbours in one storage, as from chunk(), share their version but not their address.
            if any(not own or tensor.data_ptr() in own for tensor in foreign):
                raise shared_memory_error(junction.boundary)
            if own:
                junction.in_place = True
                passed_on |= {id(tensor) for tensor in sources}


def shared_memory_error(boundary: str) -> BoundaryError:
    """The error for values at a boundary that are modified in place through another tensor."""
    return BoundaryError(
        f"the tensors of the {boundary} to be changed in place by no other name than the boundary's own",
        "an in-place change of memory that is also read around the boundary, where autograd cannot track it",
        "Use inplace=False where the value is changed.",
    )


def _is_at(tensor: Tensor, junction: Junction) -> bool:
    """Whether autograd still has the tensor as the junction's output."""
    return getattr(tensor.grad_fn, "junction", None) is junction
