"""Operations in place on values that cross a boundary: autograd knows a junction's tensors by two names."""

from torch import Tensor

from relaybackprop.engine.junction import Junction
from relaybackprop.errors import BoundaryError


class SharedMemory:
    """The tensors below and above each junction, which share memory; their versions tell changes in place."""

    def __init__(self) -> None:
        self._crossed: list[tuple[Junction, list[Tensor], list[tuple[Tensor, int]]]] = []

    def watch(self, junction: Junction, below: list[Tensor], above: list[Tensor]) -> None:
        """Add the tensors of a junction."""
        self._crossed.append((junction, below, [(tensor, tensor._version) for tensor in above]))

    def check(self) -> None:
        """Mark junctions above which the forward pass continued in place.

        Raises:
            BoundaryError: it changed the memory by another name, which autograd would follow through that name alone.
        """
        passed_on = set[int]()  # to another junction, above which the change in place was made
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
    """The error for values at a boundary that are changed in place and read by another name."""
    return BoundaryError(
        f"the tensors of the {boundary} to be changed in place by no other name than the boundary's own",
        "a change in place of memory that is also read around the boundary, which autograd cannot follow there",
        "Use inplace=False where the value is changed.",
    )


def _is_at(tensor: Tensor, junction: Junction) -> bool:
    """Whether the tensor is still the junction's output, as far as autograd knows."""
    return getattr(tensor.grad_fn, "junction", None) is junction
