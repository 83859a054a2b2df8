"""Policies: published random sequences of colour and geometry operations on a crop, by torchvision.

Note [Policies]
1. A policy is applied to the uint8 crop, before it is mirrored, shifted and normalised. Mirroring first would make no
   difference, since the operations have a random sign.
2. Torchvision draws from torch's global generator. `seeded` seeds it with a key of (seed, draw) and restores its state
   afterwards: the pixels depend neither on the batch nor on the worker, and the model's randomness is unaffected.
3. The operations run on Pillow images, which is about 1.5 times as fast as on tensors of 224 pixels.
4. Interpolation is bilinear, as in torchvision's training script. Pixels from outside the crop are black.
5. To add a policy, write a function of the settings that returns a transform of one Pillow image; add it to `POLICIES`;
   and add the name to `augmentation.policy` (`relaylab.recipes.schema`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from relaylab.data.augment import Column
from relaylab.data.keyed import keys, seeded
from relaylab.errors import InputError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A policy and its strength.

    Attributes:
        name: a name in `POLICIES`.
        operations: number of successive operations on each crop (RandAugment only).
        magnitude: strength of the operations, 0 to 30 (RandAugment only).

    Raises:
        InputError: the name is unknown.
    """

    name: str
    operations: int = 2
    magnitude: int = 9

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise InputError(f"unknown policy {self.name!r}{nearest(self.name, list(POLICIES))}")


def _randaugment(policy: Policy) -> v2.Transform:
    return v2.RandAugment(policy.operations, policy.magnitude, interpolation=InterpolationMode.BILINEAR)


def _trivialaugment(policy: Policy) -> v2.Transform:  # noqa: ARG001
    return v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)


def _autoaugment(policy: Policy) -> v2.Transform:  # noqa: ARG001
    return v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, interpolation=InterpolationMode.BILINEAR)


POLICIES: Mapping[str, Callable[[Policy], v2.Transform]] = {
    "randaugment": _randaugment,  # Cubuk, Zoph, Shlens and Le, 2020
    "trivialaugment": _trivialaugment,  # Müller and Hutter, 2021; the wide space of operations
    "autoaugment": _autoaugment,  # Cubuk et al., 2019; the policy found on ImageNet
}


@cache
def _transform(policy: Policy) -> v2.Transform:
    return POLICIES[policy.name](policy)


def apply_policy(policy: Policy, images: Tensor, seed: int, draws: ArrayLike) -> None:
    """Apply a policy to crops in place, seeded by (seed, draw). See Note [Policies].

    Args:
        policy: policy to apply.
        images: uint8 (n or more, size, size, 3), on the CPU.
        seed: seed of the run.
        draws: (n,) draws of the images.
    """
    transform = _transform(policy)
    for image, key in zip(images, keys(seed, draws, Column.POLICY).tolist(), strict=False):
        with seeded(key):
            image.copy_(torch.from_numpy(np.array(transform(Image.fromarray(image.numpy())))))
