"""Images and chance of packed runs, on the device before the first step; what runs have in common is there once."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relaylab.data.augment import Augmentation, arithmetic, random_flips, random_shifts
from relaylab.data.geometry import View
from relaylab.data.keyed import uniforms
from relaylab.data.memory import DecodedImages, decode_all
from relaylab.data.parts import InMemory
from relaylab.files import available_cores
from relaylab.progress import progress
from relaylab.recipes.schema import Recipe
from relaylab.train.images import RunImages, check_images, chosen_numbers, open_sources
from relaylab.train.options import TrainConfig

AT_ONCE = 1 << 18  # draws that are worked out at once
IMAGES_PER_WORKER = 500  # to start a worker takes seconds


@dataclass(frozen=True, eq=False)
class Draws:
    """All of a run's draws: which image each takes, and what happens to it.

    Attributes:
        numbers: int64 (n,) of images.
        corners: int64 (n, 2), left and top of the crop.
        flips: bool (n,), which are mirrored.
        shifts: float32 (n, 3), of the colours.
    """

    numbers: Tensor
    corners: Tensor
    flips: Tensor
    shifts: Tensor

    @staticmethod
    def of(images: RunImages, recipe: Recipe, augment: Augmentation) -> "Draws":
        """What `relaylab train` would draw, in the order in which it would, on the CPU."""
        config, view = recipe.optimizer, images.view
        sampler, spare = images.sampler(recipe, augment.seed), view.short_side - view.size + 1
        parts: list[tuple[Any, ...]] = []
        for begin in range(0, config.iterations * config.batch_size, AT_ONCE):
            draws = sampler.numbers(begin, min(begin + AT_ONCE, config.iterations * config.batch_size))
            corners = (uniforms(augment.seed, draws, 2) * spare).astype(np.int64)
            flips = random_flips(augment.seed, draws) & augment.flip
            shifts = np.zeros((len(draws), 3))
            if augment.components is not None:
                shifts = random_shifts(augment.seed, draws, augment.components, augment.strength)
            parts.append((sampler.draw(draws), corners, flips, shifts.astype(np.float32)))
        return Draws(*(torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)))

    def to(self, device: torch.device) -> "Draws":
        """The same on a device."""
        return Draws(*(each.to(device) for each in (self.numbers, self.corners, self.flips, self.shifts)))


@dataclass(frozen=True, eq=False)
class Supply:
    """What one run is trained and tested on.

    Attributes:
        images: training and validation images.
        augment: normalises the validation images; `batch` takes its numbers and does the rest by itself.
        draws: of the training images.
    """

    images: RunImages
    augment: Augmentation
    draws: Draws

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The draws of these numbers as a training batch.

        Nothing is read back from the device and nothing is random, so that a CUDA graph can hold it.

        Args:
            rows: int64 (batch,).

        Returns:
            Augmented images (batch, 3, size, size), and their labels.
        """
        train, draws = self.images.train, self.draws
        assert isinstance(train, InMemory)
        numbers = draws.numbers[rows]
        left, top = draws.corners[rows].unbind(1)
        pixels = torch.arange(self.images.view.size, device=rows.device)
        across, down = left[:, None] + pixels, top[:, None] + pixels
        crops = train.decoded.images[numbers[:, None, None], down[:, :, None], across[:, None, :]]
        images = arithmetic(crops, self.augment.mean, self.augment.scale, draws.flips[rows], draws.shifts[rows])
        return images, train.decoded.labels[numbers]


class Shelf:
    """Decoded images on a device, and what has been drawn from them.

    Args:
        device: that trains.
        config: of any of the runs: where the images are.

    Raises:
        InputError: images that cannot be used.
    """

    def __init__(self, device: torch.device, config: TrainConfig) -> None:
        self.device = device
        self._sources = open_sources(config)
        self._decoded: dict[View, tuple[DecodedImages, DecodedImages]] = {}
        self._images: dict[Any, RunImages] = {}
        self._draws: dict[Any, Draws] = {}

    def supply(self, recipe: Recipe, seed: int) -> Supply:
        """What a run is trained and tested on.

        Raises:
            InputError: the images are not the recipe's.
        """
        check_images(recipe, *self._sources)
        view = View(size=recipe.network.image_size, short_side=recipe.images.short_side)
        choice = view, recipe.images.held_out, recipe.images.long_tail
        if choice not in self._images:
            self._images[choice] = self._chosen(recipe, view)
        images = self._images[choice]
        augment = images.augmentation(recipe, seed).to(self.device)
        length = recipe.optimizer.iterations * recipe.optimizer.batch_size
        key = choice, recipe.images.sampling, recipe.augmentation, seed, length
        if key not in self._draws:
            self._draws[key] = Draws.of(images, recipe, augment).to(self.device)
        return Supply(images, augment, self._draws[key])

    def clear(self) -> None:
        """Forget all draws."""
        self._draws.clear()

    def _chosen(self, recipe: Recipe, view: View) -> RunImages:
        if view not in self._decoded:
            self._decoded[view] = self._decode(view)
        train, val = (InMemory(decoded, view) for decoded in self._decoded[view])
        stay, aside = chosen_numbers(recipe.images, train.labels)
        if aside is not None:
            val = train.some(aside)
        if stay is not None:
            train = train.some(stay)
        return RunImages(train.decoded.classes, train, val, view, train.statistics(), in_memory=True)

    def _decode(self, view: View) -> tuple[DecodedImages, DecodedImages]:
        train, val = self._sources
        workers = min(available_cores(), len(train) // IMAGES_PER_WORKER)
        with progress("decoding", len(train) + len(val)) as task:
            return (
                decode_all(train, view, device=self.device, workers=workers, task=task),
                decode_all(val, view, device=self.device, workers=workers, task=task),
            )
