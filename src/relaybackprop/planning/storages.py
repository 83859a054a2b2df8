"""Memory accounting by storages, as they are allocated and freed. Works on the meta device too."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from relaybackprop.engine.pytree import tensors_in


class Storages:
    """Total bytes of the noted storages that are alive. A storage shared by several tensors counts once.

    Args:
        owned: tensors whose storages do not count.

    Attributes:
        now: bytes alive.
        most: peak of `now`.
    """

    def __init__(self, owned: Iterable[Tensor] = ()) -> None:
        self.now = 0
        self.most = 0
        # By address. Holds the owned storages, so that no other storage can reuse their addresses.
        self._known = {_address(tensor): tensor.untyped_storage() for tensor in _with_storage(list(owned))}
        self._alive = set[int]()

    def note(self, value: Any) -> int:
        """Count the new storages of all tensors in a value and return their bytes."""
        new = 0
        for tensor in _with_storage(value):
            address, storage = _address(tensor), tensor.untyped_storage()
            if address not in self._known and address not in self._alive:
                self._alive.add(address)
                weakref.finalize(storage, self._drop, address, storage.nbytes())
                new += storage.nbytes()
        self.now += new
        self.most = max(self.most, self.now)
        return new

    def holds(self, value: Any) -> bool:
        """Whether any tensor in a value has a noted storage."""
        return any(_address(tensor) in self._alive for tensor in _with_storage(value))

    def need(self, size: int) -> None:
        """Count the temporary workspace of an operation, in bytes."""
        self.most = max(self.most, self.now + size)

    def _drop(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self.now -= size


def _with_storage(value: Any) -> list[Tensor]:
    """Return all tensors in a value except sparse ones, which have no storage of their own."""
    return [tensor for tensor in tensors_in(value) if tensor.layout == torch.strided]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # pyright: ignore
