"""Memory accounting by storages, as they are allocated and freed. It also works on the meta device."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from relaybackprop.engine.pytree import tensors_in


class Storages:
    """The total size of the added storages that are alive. A storage that several tensors share counts once.

    Args:
        owned: tensors whose storages do not count.

    Attributes:
        current: bytes alive.
        peak: maximum of `current`, in bytes.
    """

    def __init__(self, owned: Iterable[Tensor] = ()) -> None:
        self.current = 0
        self.peak = 0
        # By address. Holds the owned storages, so that no other storage can reuse their addresses.
        self._known = {_address(tensor): tensor.untyped_storage() for tensor in _with_storage(list(owned))}
        self._alive = set[int]()

    def add(self, value: Any) -> int:
        """Add the new storages of all tensors in a value and return their size in bytes."""
        new = 0
        for tensor in _with_storage(value):
            address, storage = _address(tensor), tensor.untyped_storage()
            if address not in self._known and address not in self._alive:
                self._alive.add(address)
                weakref.finalize(storage, self._drop, address, storage.nbytes())
                new += storage.nbytes()
        self.current += new
        self.peak = max(self.peak, self.current)
        return new

    def contains(self, value: Any) -> bool:
        """Return whether any tensor in a value has an added storage."""
        return any(_address(tensor) in self._alive for tensor in _with_storage(value))

    def add_workspace(self, size: int) -> None:
        """Add the temporary workspace of an operation, in bytes, to the peak."""
        self.peak = max(self.peak, self.current + size)

    def _drop(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self.current -= size


def _with_storage(value: Any) -> list[Tensor]:
    """Return all tensors in a value except sparse ones, which do not have a storage."""
    return [tensor for tensor in tensors_in(value) if tensor.layout == torch.strided]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # pyright: ignore
