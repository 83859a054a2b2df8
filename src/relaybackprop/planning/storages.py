"""How many bytes are alive: storages, counted when they are made and when they are freed. Also on the meta device."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from relaybackprop.engine.pytree import tensors_in


class Storages:
    """Bytes of all storages that have been noted and are still alive. A storage counts once, however many share it.

    Args:
        owned: tensors whose storages do not count.

    Attributes:
        now: bytes alive.
        most: the largest `now` so far.
    """

    def __init__(self, owned: Iterable[Tensor] = ()) -> None:
        self.now = 0
        self.most = 0
        # By address, with those that do not count held, so that no other storage can take their addresses.
        self._known = {_address(tensor): tensor.untyped_storage() for tensor in _with_storage(list(owned))}
        self._alive = set[int]()

    def note(self, value: Any) -> int:
        """Count the storages of all tensors in a value that are new.

        Returns:
            Their bytes.
        """
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
        """Whether a storage of a tensor in a value has been noted and is still alive."""
        return any(_address(tensor) in self._alive for tensor in _with_storage(value))

    def need(self, size: int) -> None:
        """Count bytes that an operation takes for itself while it runs."""
        self.most = max(self.most, self.now + size)

    def _drop(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self.now -= size


def _with_storage(value: Any) -> list[Tensor]:
    """All tensors in a value but sparse ones, which have no storage of their own."""
    return [tensor for tensor in tensors_in(value) if tensor.layout == torch.strided]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # pyright: ignore
