"""Reseed every random number generator before each training step. See Note [Loop] 1 in `relaylab.train.loop`."""

import random

import numpy as np
import torch

from relaylab.data.keyed import keys


def seed_all(seed: int, step: int, rank: int) -> None:
    """Seed all generators from the seed of the run, the step and the rank of the process.

    Equivalent to `torch.manual_seed`, which spends a millisecond formatting its stack until CUDA is initialised.
    """
    key = int(keys(seed, step, rank)[0])
    torch.default_generator.manual_seed(key)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(key)
    random.seed(key)
    np.random.seed(key & 0xFFFF_FFFF)  # noqa: NPY002 (models may use it)
