"""Samplers: class-aware sampling (the paper's section 5.1), shuffling, and square-root sampling.

Note [Sampling]
The paper keeps a list of the classes and a list of each class's images, and shuffles a list when it is used up. With C
classes, draw t is in class cycle t // C, and its class is at position t % C of that cycle's permutation. That class has
been drawn t // C times before; with n images, it is in reshuffle (t // C) // n, at position (t // C) % n. With keyed
permutations (Note [Keyed]) the image is thus a function of (seed, t): there is no state to save, and any draw can be
computed directly. Square-root sampling gives a class more than one turn in a cycle and is otherwise the same.

Rank r of R takes draws r, r + R, r + 2R, ... Together the ranks follow one stream, and a global batch is as balanced as
that of a single process. Contiguous slices per rank would not be.
"""

import math
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from operator import length_hint
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from relaylab.data.keyed import Integers, keys, permute
from relaylab.data.sources.listing import few
from relaylab.errors import InputError

BLOCK = 1 << 16  # draws computed in one call
SORTED_AT_ONCE = 1 << 20
SQUARE_ROOT_TURNS = 10  # turns in a cycle of a class with one image: rounding the roots then costs less than 5 %
SHUFFLE, CYCLE, CLASS = range(3)  # uses of permutations, each with its own keys


class KeyedSampler(Sampler[int]):
    """An endless stream of draws for one rank: a PyTorch sampler that yields one epoch per iteration.

    Iterating yields the draws from `position` to the end of the epoch; iterating again continues from there. Draws are
    counted when they are yielded, and a DataLoader with workers requests some batches before it delivers them.
    torchdata's StatefulDataLoader accounts for this; with the plain DataLoader, call `seek` with the draws used.

    Example::

        sampler = ClassAwareSampler(source.labels, seed=0, classes=source.classes)
        loader = training_loader(source, sampler, CropSpec(), batch_size=256)

    Args:
        labels: (n,) class indices from 0, one per image.
        seed: seed of all permutations.
        rank: rank of this process.
        num_replicas: number of processes that share the stream.
        num_samples: draws of this rank per epoch; by default its share of as many draws as there are images.
        classes: class names, for messages, and to include classes without images.

    Raises:
        InputError: there are no images, the labels are not class indices, or the rank is not in 0 .. num_replicas - 1.
    """

    def __init__(
        self,
        labels: ArrayLike,
        *,
        seed: int = 0,
        rank: int = 0,
        num_replicas: int = 1,
        num_samples: int | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        labels = _checked(labels, classes)
        if not 0 <= rank < num_replicas:
            raise InputError(f"rank {rank} of {num_replicas}: expected 0 <= rank < num_replicas")
        if num_samples is not None and num_samples < 1:
            raise InputError(f"num_samples must be at least 1, not {num_samples}")
        self.counts: Integers = np.bincount(labels, minlength=0 if classes is None else len(classes)).astype(np.int64)
        self.num_images = len(labels)
        self.seed, self.rank, self.num_replicas = seed, rank, num_replicas
        self.num_samples = num_samples or math.ceil(self.num_images / num_replicas)
        self.seek(0)

    @property
    def position(self) -> int:
        """Number of draws that this rank has yielded, counted from the position set by `seek`."""
        return self._block_end - length_hint(self._block)

    @abstractmethod
    def draw(self, draws: Integers) -> Integers:
        """Return the image indices (n,) of global draws (n,). This is a pure function of the seed."""

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        end = (self.position // self.num_samples + 1) * self.num_samples
        while self.position < end:
            begin = self.position
            self._block_end = min(begin + BLOCK, end)
            # A list iterator knows its remaining length; counting every draw here would halve the speed.
            self._block = iter(self.draw(self.global_draws(begin, self._block_end)).tolist())
            yield from self._block

    def global_draws(self, begin: int, end: int) -> Integers:
        """Return the draws begin .. end - 1 of this rank as draws of the stream of all ranks."""
        return np.arange(begin, end, dtype=np.int64) * self.num_replicas + self.rank

    def seek(self, position: int) -> None:
        """Continue from the given draw of this rank, in O(1).

        Raises:
            InputError: the position is negative.
        """
        if position < 0:
            raise InputError(f"position must be at least 0, not {position}")
        self._block: Iterator[int] = iter([])
        self._block_end = position

    def state_dict(self) -> dict[str, Any]:
        """Return the position, in draws of all ranks, and the values that identify the stream."""
        return {"draw": self.position * self.num_replicas, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a sampler of the same data and seed stopped. The number of ranks may differ.

        Raises:
            InputError: the state is from a different stream, or does not end at a multiple of the ranks' draws.
        """
        for key, expected in self._identity().items():
            if state.get(key) != expected:
                raise InputError(f"the sampler's state has {key} {state.get(key)!r}; this sampler has {expected!r}")
        draw = state.get("draw")
        if type(draw) is not int or not 0 <= draw < 2**62:
            raise InputError(f"the sampler's state has draw {draw!r}: expected an integer of at least 0")
        position, remainder = divmod(draw, self.num_replicas)
        if remainder:
            raise InputError(
                f"draw {state['draw']} is not a multiple of the number of ranks, {self.num_replicas}: save states "
                "after complete global batches"
            )
        self.seek(position)

    def _identity(self) -> dict[str, Any]:
        counts = zlib.crc32(self.counts.tobytes())
        return {"sampling": type(self).__name__, "seed": self.seed, "images": self.num_images, "class_counts": counts}


class ShuffledSampler(KeyedSampler):
    """Instance-balanced sampling: every image once per pass over the data, in a new order in each pass."""

    def draw(self, draws: Integers) -> Integers:
        """Return the image indices of draws; see `KeyedSampler.draw`."""
        cycles, positions = np.divmod(draws, self.num_images)
        return permute(positions, self.num_images, keys(self.seed, SHUFFLE, cycles))


class ClassAwareSampler(KeyedSampler):
    """The paper's class-aware sampling: each class once per cycle, and each of its images once per pass over them.

    The arguments are the same as for `KeyedSampler`. See Note [Sampling]. It needs an int32 of memory per image.
    Classes without images raise InputError.
    """

    def __init__(self, labels: ArrayLike, **options: Any) -> None:
        super().__init__(labels, **options)
        empty = np.flatnonzero(self.counts == 0)
        if len(empty):
            classes = options.get("classes") or [f"class {label}" for label in range(len(self.counts))]
            names = few([str(classes[label]) for label in empty], 5)
            raise InputError(f"classes without images: {names}; remove these classes or add images")
        self._order = _by_class(np.asarray(labels), self.counts)
        self._starts = np.cumsum(self.counts) - self.counts
        self._turns = self.turns(self.counts)
        self._ends = np.cumsum(self._turns)

    @staticmethod
    def turns(counts: Integers) -> Integers:
        """Return the turns (C,) of each class per cycle, at least 1, given the number of images (C,) of each class."""
        return np.ones_like(counts)

    def draw(self, draws: Integers) -> Integers:
        """Return the image indices of draws; see `KeyedSampler.draw`."""
        length = int(self._ends[-1])
        cycles, positions = np.divmod(draws, length)
        slots = permute(positions, length, keys(self.seed, CYCLE, cycles))
        if length == len(self.counts):  # one turn each
            label, earlier = slots, cycles
        else:
            label = np.searchsorted(self._ends, slots, side="right")
            turns = self._turns[label]
            earlier = cycles * turns + slots - (self._ends[label] - turns)
        count = self.counts[label]
        reshuffles, places = np.divmod(earlier, count)
        key = keys(self.seed, CLASS, (reshuffles << 32) | label)
        return self._order[self._starts[label] + permute(places, count, key)].astype(np.int64)


class SquareRootSampler(ClassAwareSampler):
    """Square-root sampling: each class in proportion to the square root of its size (Mahajan et al., 2018)."""

    @staticmethod
    def turns(counts: Integers) -> Integers:
        """Return ten times the square root of each class's number of images, rounded."""
        return np.rint(SQUARE_ROOT_TURNS * np.sqrt(counts)).astype(np.int64)


SAMPLERS: dict[str, type[KeyedSampler]] = {
    "class-aware": ClassAwareSampler,
    "shuffled": ShuffledSampler,
    "square-root": SquareRootSampler,
}


class DrawBatches(Sampler[Any]):
    """A batch sampler for this package's data sets. Yields arrays (batch, 2) of draws and the images they select.

    The draw is the key of all random choices for the image. No draw is dropped: an epoch has an integer number of
    batches, at least one, and the next epoch starts with the next draw. If training is resumed with a different batch
    size, the epoch may end with a smaller batch. A batch size below 1 raises InputError.
    """

    def __init__(self, sampler: KeyedSampler, batch_size: int) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        self.sampler, self.batch_size = sampler, batch_size

    def __len__(self) -> int:
        return max(1, self.sampler.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        epoch = len(self) * self.batch_size
        end = (self.sampler.position // epoch + 1) * epoch
        at_once = max(1, BLOCK // self.batch_size) * self.batch_size
        while (begin := self.sampler.position) < end:
            draws = self.sampler.global_draws(begin, min(begin + at_once, end))
            pairs = np.stack([draws, self.sampler.draw(draws)], axis=1)
            for first in range(0, len(pairs), self.batch_size):
                self.sampler.seek(begin + min(first + self.batch_size, len(pairs)))
                yield pairs[first : first + self.batch_size]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the sampler."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a sampler."""
        self.sampler.load_state_dict(state)


def _checked(labels: ArrayLike, classes: Sequence[str] | None) -> NDArray[Any]:
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels are {labels.dtype} {labels.shape}: expected integers of shape (images,)")
    if not len(labels):
        raise InputError("no images to sample from")
    least, most = int(labels.min()), int(labels.max())
    if least < 0:
        raise InputError(f"labels contain {least}: expected class indices from 0 (do all images have a label?)")
    if classes is not None and most >= len(classes):
        raise InputError(f"labels contain {most}, but there are only {len(classes)} classes")
    return labels


def _by_class(labels: NDArray[Any], counts: Integers) -> NDArray[np.int32]:
    """Sort image indices by class, in order within each class. Works in chunks for a low peak of memory."""
    order = np.empty(len(labels), np.int32)
    free = np.cumsum(counts) - counts
    for begin in range(0, len(labels), SORTED_AT_ONCE):
        chunk = labels[begin : begin + SORTED_AT_ONCE]
        sizes = np.bincount(chunk, minlength=len(counts))
        to = np.repeat(free - (np.cumsum(sizes) - sizes), sizes) + np.arange(len(chunk))
        order[to] = begin + np.argsort(chunk, kind="stable")
        free = free + sizes
    return order
