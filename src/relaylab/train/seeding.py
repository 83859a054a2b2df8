"""All that is random in a training step, seeded anew for each one. See Note [Loop] 1 in `relaylab.train.loop`."""

import random

import numpy as np
import torch

from relaylab.data.keyed import keys


def seed_all(seed: int, step: int, rank: int) -> None:
    """Seed every generator that a step may use.

    Args:
        seed: of the run.
        step: updates made before.
        rank: of this process.
    """
    key = int(keys(seed, step, rank)[0])
    torch.manual_seed(key)
    random.seed(key)
    np.random.seed(key & 0xFFFF_FFFF)  # noqa: NPY002 (for models that use it)
