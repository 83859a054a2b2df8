"""Scales of the paper's recipes, from its full size to a few seconds of training."""

from typing import Any

from relaylab.errors import InputError
from relaylab.recipes.schema import Recipe, Scale, StepsConfig, changed

SCALES: tuple[Scale, ...] = ("paper", "small", "tiny")

SMALL: dict[str, Any] = {
    "network.num_classes": 100,
    "network.image_size": 64,
    "images.data_set": "MiniPlaces",
    "images.short_side": 72,
    "augmentation.divide": True,
    "optimizer.batch_size": 128,
    "optimizer.iterations": 28_000,
    "optimizer.schedule": StepsConfig(),
    "optimizer.evaluate_every": 700,
}
SMALL_WIDTH, SMALL_PYRAMID = 16, (4, 2, 1)
TINY: dict[str, Any] = {
    **SMALL,
    "network.num_classes": 5,
    "network.image_size": 32,
    "images.data_set": "any",
    "images.short_side": 36,
    "optimizer.batch_size": 4,
    "optimizer.iterations": 2,
    "optimizer.evaluate_every": 1,
}
TINY_WIDTH, TINY_PYRAMID = 4, (2, 1)


def at_scale(recipe: Recipe, scale: Scale) -> Recipe:
    """Return a recipe of the paper at a given scale. Depth, stages, windows, scheme and learning rates are kept.

    "small" is for MiniPlaces: 100 classes of Places2, images of 72 pixels, crops of 64. "tiny" is for tests: two steps
    on any five classes.
    """
    if scale == "paper":
        return recipe
    if scale not in SCALES:
        raise InputError(f"unknown scale {scale!r}: expected one of {', '.join(SCALES)}")
    is_small = scale == "small"
    values = dict(SMALL if is_small else TINY)
    if recipe.network.width is not None:
        values["network.width"] = SMALL_WIDTH if is_small else TINY_WIDTH
    if recipe.network.pyramid is not None:
        values["network.pyramid"] = SMALL_PYRAMID if is_small else TINY_PYRAMID
    if recipe.images.data_set == "ImageNet 2012":
        values["images.sampling"] = recipe.images.sampling
    least, by = values["network.image_size"], values["images.short_side"] / recipe.images.short_side
    values["evaluation.scales"] = tuple(max(least, round(side * by)) for side in recipe.evaluation.scales)
    smaller = changed(recipe, f"ours: the {scale} scale", values)
    too_large = [name for name, window in recipe.plan.auxiliary.items() if window.head == "inception"]
    heads = {f"plan.auxiliary.{name}.head": "googlenet" for name in too_large}
    return changed(smaller, f"ours: the {scale} scale; Inception's own needs a map of 17 pixels", heads)


def stored_side(size: int) -> int:
    """Return the image size for crops of `size` pixels, in the paper's proportion of 256 to 224.

    It is a multiple of 4, so that centre crops are exactly centred: 72 rather than 73 pixels for crops of 64.
    """
    return max(size, 4 * round(size * 256 / 224 / 4))
