"""Stateless random numbers and permutations: pure functions of a key and a counter.

Note [Keyed]
1. A stateful generator has to run from its start to reach draw 10^8, and its state has to be saved. A keyed function
   computes any draw directly, in any process and in any order: the sampler resumes in O(1), and the augmentation of an
   image does not depend on the number of workers.
2. `mix` is SplitMix64's output function (Steele, Lea and Flood, 2014), a bijection of 64-bit words.
3. `permute` is a Feistel network on the fewest bits that hold the domain. Its round functions keep the upper bits of a
   multiplication, with a new key each round. Values outside the domain are permuted again until they are inside (cycle
   walking; Black and Rogaway, 2002). This gives a permutation of exactly the domain, in fewer than two passes on
   average. The halves are combined by XOR: addition would need fewer passes, but would leave neighbours at the same few
   distances. On 5 bits and fewer, not all permutations would be equally likely; there, a position is mapped to the rank
   of its hash among the hashes of all positions.
4. None of this is cryptographically secure.
5. Libraries that draw from torch's global generator are called with the generator `seeded` by a key.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]
Halves = NDArray[np.uint32]

ROUNDS = 8  # with 6, small domains fail a chi-squared test of their permutations
FEW = 32  # see Note [Keyed] 3
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ODD_1, _ODD_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S11, _S27, _S30, _S31, _S32 = (np.uint64(shift) for shift in (11, 27, 30, 31, 32))
_LCG, _STEP, _ONE, _S16 = (np.uint32(word) for word in (747796405, 2891336453, 1, 16))


def mix(words: Words) -> Words:
    """Scramble 64-bit words: each bit of the result depends on every bit of the argument."""
    words = words + _GOLDEN
    words = (words ^ (words >> _S30)) * _ODD_1
    words = (words ^ (words >> _S27)) * _ODD_2
    return words ^ (words >> _S31)


def keys(seed: int, *counters: ArrayLike) -> Words:
    """Return a 64-bit key for each combination of counters, integers or arrays, which are broadcast. Order matters."""
    key = mix(np.array([seed & 0xFFFF_FFFF_FFFF_FFFF], np.uint64))  # an array, since NumPy scalars warn of overflow
    for counter in counters:
        key = mix(key ^ np.asarray(counter).astype(np.uint64))
    return key


def uniforms(seed: int, numbers: ArrayLike, count: int) -> NDArray[np.float64]:
    """Return random numbers (n, count), uniform in [0, 1), which depend only on (seed, number, column)."""
    key = keys(seed, np.asarray(numbers)[:, None], np.arange(count))
    return (key >> _S11).astype(np.float64) * 2.0**-53


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Seed torch's CPU generator within the block and restore its state afterwards. Takes 5 microseconds."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key)  # torch.manual_seed would also seed the generators of GPUs
        yield


def permute(positions: Integers, sizes: ArrayLike, key: Words) -> Integers:
    """Map positions by keyed permutations. See Note [Keyed] 3.

    Args:
        positions: (n,), each in 0 .. size - 1.
        sizes: sizes of the permuted domains, 1 to 2**31: a single size, which is faster, or (n,).
        key: a single key or (n,), from `keys`. Each key selects a different permutation.

    Returns:
        (n,), each in 0 .. size - 1. With a single size and key, different positions have different results.
    """
    size = np.atleast_1d(np.asarray(sizes).astype(np.uint32))
    key = np.broadcast_to(key, positions.shape)
    few = size <= FEW
    if not few.any():
        return _walk(positions, size, key)
    size, few = np.broadcast_to(size, positions.shape), np.broadcast_to(few, positions.shape)
    image = np.empty(positions.shape, np.int64)
    image[few] = _ranks(positions[few], size[few], key[few])
    many = ~few
    image[many] = _walk(positions[many], size[many], key[many])
    return image


def _ranks(positions: Integers, sizes: Halves, key: Words) -> Integers:
    """Permute small domains: return the rank of each position's hash among the hashes of all positions."""
    others = np.arange(FEW)
    hashes = mix(key[:, None] ^ mix(others.astype(np.uint64)))
    own = np.take_along_axis(hashes, positions[:, None], axis=1)
    return ((hashes < own) & (others < sizes[:, None])).sum(axis=1)


def _walk(positions: Integers, sizes: Halves, key: Words) -> Integers:
    """Cycle walking: apply the Feistel network until every position is inside its domain."""
    image = _feistel(positions.astype(np.uint32), sizes, key)
    outside = np.flatnonzero(image >= sizes)
    while len(outside):
        sizes_here = sizes if len(sizes) == 1 else sizes[outside]
        again = _feistel(image[outside], sizes_here, key[outside])
        image[outside] = again
        outside = outside[again >= sizes_here]
    return image.astype(np.int64)


def _feistel(words: Halves, sizes: Halves, key: Words) -> Halves:
    """Permute 0 .. 2**bits - 1, where `bits` is the smallest number of bits that holds the size."""
    bits = np.frexp((sizes - _ONE).astype(np.float64))[1].astype(np.uint32)
    low_bits = bits >> _ONE
    low_mask = (_ONE << low_bits) - _ONE
    high_mask = (_ONE << (bits - low_bits)) - _ONE
    high, low = words >> low_bits, words & low_mask
    multipliers = key.astype(np.uint32), (key >> _S32).astype(np.uint32)
    hashed = np.empty_like(words)
    for step in range(ROUNDS):
        to, by, mask = (high, low, high_mask) if step % 2 == 0 else (low, high, low_mask)
        multiplier = multipliers[step % 2]
        np.add(by, _STEP, out=hashed)
        np.multiply(hashed, multiplier, out=hashed)
        np.right_shift(hashed, _S16, out=hashed)
        np.bitwise_and(hashed, mask, out=hashed)
        np.bitwise_xor(to, hashed, out=to)
        np.multiply(multiplier, _LCG, out=multiplier)
        np.add(multiplier, _STEP, out=multiplier)
    return (high << low_bits) | low
