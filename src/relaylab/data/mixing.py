"""Mixup and CutMix: whole batches in which images and their targets are mixed in pairs, by torchvision.

Note [Mixing]
1. Torchvision mixes each image with the one before it in the batch, all in one proportion. The sampler's order is
   random, so the pairs are, too. With several mixes, one is chosen for each batch, with equal probability.
2. The proportion and the place are functions of (seed, first draw of the batch): torch's generator is `seeded` by them.
   A part of an accumulated batch, and the batch of each process, is mixed within itself.
3. The targets become probabilities, (n, classes). Reported training errors are measured against the images' own labels.
4. To add one: a transform of (images, labels) with the arguments alpha and num_classes, a line in `MIXES`, and a value
   of the same name in `AugmentationConfig` (`relaylab.recipes.schema`), 0 for none.
"""

from collections.abc import Callable, Mapping
from typing import cast

from torch import Tensor
from torchvision.transforms import v2

from relaylab.data.augment import Column
from relaylab.data.keyed import keys, seeded

MIXES: Mapping[str, Callable[..., v2.Transform]] = {
    "mixup": v2.MixUp,  # Zhang, Cisse, Dauphin and Lopez-Paz, 2018
    "cutmix": v2.CutMix,  # Yun et al., 2019
}


class Mixing:
    """Mix the images of a batch, and their targets. See Note [Mixing].

    Args:
        alphas: of the Beta distribution of the proportions, by a name in `MIXES`; mixes with 0 are left out.
        num_classes: length of the targets.
        seed: of the run.
    """

    def __init__(self, alphas: Mapping[str, float], num_classes: int, seed: int) -> None:
        mixes = [MIXES[name](alpha=alpha, num_classes=num_classes) for name, alpha in alphas.items() if alpha > 0]
        self._mix = v2.RandomChoice(mixes) if mixes else None
        self._seed = seed

    def __call__(self, images: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed images and targets; without a mix, the images and labels themselves.

        Args:
            images: (n, c, h, w), floating-point.
            labels: int64 (n,), or (n, classes) where images may have several; on the images' device.
            draws: int64 (n,), on the CPU.

        Returns:
            (n, c, h, w), in the images' memory format, and float32 (n, classes).
        """
        if self._mix is None:
            return images, labels
        with seeded(keys(self._seed, int(draws[0]), Column.MIXING).item()):
            return cast("tuple[Tensor, Tensor]", self._mix(images, labels))
