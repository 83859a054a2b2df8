"""Mixup and CutMix, by torchvision: the images and targets of a batch are mixed in pairs.

Note [Mixing]
1. Torchvision mixes each image with the previous one in the batch, all in the same proportion. The sampler's order is
   random, and so are the pairs. With several mixes, one is chosen for each batch, with equal probability.
2. The proportion and the position are functions of (seed, first draw of the batch), which seed torch's generator
   (`seeded`). Each micro-batch of an accumulated batch, and the batch of each process, is mixed separately.
3. The targets become probabilities, (n, classes). Reported training errors refer to the images' original labels.
4. To add a mix, write a transform of (images, labels) with the arguments alpha and num_classes; add it to `MIXES`; and
   add a value of the same name to `AugmentationConfig` (`relaylab.recipes.schema`), with 0 to disable it.
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
        alphas: parameter of the Beta distribution of the proportions, by name in `MIXES`; 0 disables a mix.
        num_classes: number of classes, the length of the targets.
        seed: seed of the run.
    """

    def __init__(self, alphas: Mapping[str, float], num_classes: int, seed: int) -> None:
        mixes = [MIXES[name](alpha=alpha, num_classes=num_classes) for name, alpha in alphas.items() if alpha > 0]
        self._mix = v2.RandomChoice(mixes) if mixes else None
        self._seed = seed

    def __call__(self, images: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed images and targets, or the arguments themselves if no mix is enabled.

        Args:
            images: (n, c, h, w), floating-point.
            labels: int64 (n,), or (n, classes) if images are multi-label; on the device of the images.
            draws: int64 (n,), on the CPU.

        Returns:
            (n, c, h, w), in the images' memory format, and float32 (n, classes).
        """
        if self._mix is None:
            return images, labels
        with seeded(keys(self._seed, int(draws[0]), Column.MIXING).item()):
            return cast("tuple[Tensor, Tensor]", self._mix(images, labels))
