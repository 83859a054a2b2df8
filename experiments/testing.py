"""Finished runs' networks on training and validation images alike: do they fit, do they generalise?"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from experiments.training import TESTED, Run
from relaylab.data.geometry import View
from relaylab.data.memory import decode_all
from relaylab.data.parts import InMemory
from relaylab.data.sources.source import Source
from relaylab.data.sources.subset import Thinned
from relaylab.errors import InputError
from relaylab.evaluate.error_rates import misses
from relaylab.evaluate.protocols import Pass
from relaylab.evaluate.testing import Scorer
from relaylab.files import write_text
from relaylab.models.file import ModelFile, read_model
from relaylab.progress import progress
from relaylab.recipes.schema import ImagesConfig
from relaylab.train import runs
from relaylab.train.images import chosen_numbers, open_sources
from relaylab.train.validation import batch_size

TESTED_PER_CLASS = 100  # images, in both parts: there are as many validation images


def few_per_class(labels: NDArray[np.integer], count: int) -> NDArray[np.int64]:
    """Return the indices of the first `count` images of each class."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]))


@dataclass(frozen=True)
class Tested:
    """Single-crop top-1 errors of a network, in per cent, in float32 and without augmentation and dropout.

    Attributes:
        train: on at most 100 images of each class, of those that it was trained on.
        val: on the images that it was validated with.
        by_class: on those of each class.
        dead: share of the channels of all rectifiers that are zero on all of those training images; None for a network
            whose rectifiers are no modules.
    """

    train: float
    val: float
    by_class: tuple[float, ...]
    dead: float | None


def test_finished(found: Sequence[Run]) -> None:
    """Test what has not been tested yet.

    Args:
        found: finished runs, of one size and on the same images.

    Raises:
        InputError: images that cannot be used.
    """
    missing = [run for run in found if not (run.folder / TESTED).exists()]
    if not missing:
        return
    sources = open_sources(missing[0].config)
    parts: dict[ImagesConfig, list[InMemory]] = {}
    with progress("test", len(missing)) as task:
        for run in missing:
            recipe = runs.recipe_of(run.folder)
            if recipe.images not in parts:
                view = View(size=recipe.network.image_size, short_side=recipe.images.short_side)
                parts[recipe.images] = [
                    InMemory(decode_all(source, view), view) for source in _tested_images(recipe.images, *sources)
                ]
            scorer = Scorer(_model_of(run, sources[0].classes))
            write_tested(run, test_network(partial(_scores, scorer), scorer.network, *parts[recipe.images]))
            task.advance(1, note=f"{run.arm}, seed {run.seed}")


def _tested_images(config: ImagesConfig, train: Source, val: Source) -> tuple[Source, Source]:
    """A few of the images that a recipe trains on, and those that it is validated with."""
    stay, aside = chosen_numbers(config, train.labels)
    labels = np.asarray(train.labels) if stay is None else np.asarray(train.labels)[stay]
    few = few_per_class(labels, TESTED_PER_CLASS)
    return Thinned(train, few if stay is None else stay[few]), val if aside is None else Thinned(train, aside)


def test_network(score: Callable[[Tensor], Tensor], network: nn.Module, train: InMemory, val: InMemory) -> Tested:
    """Test a network.

    Args:
        score: class scores (n, classes) of uint8 images (n, size, size, 3).
        network: in evaluation mode; what `score` calls.
        train: training images.
        val: validation images.
    """
    few = train.some(few_per_class(train.labels, TESTED_PER_CLASS))
    with torch.inference_mode(), _watched(network) as alive:
        fits = _misses(score, few)
    channels = torch.cat([own.cpu() for own in alive.values()]).float() if alive else None
    with torch.inference_mode():
        misses = _misses(score, val)
    by_class = [misses[val.labels == label].mean().item() for label in range(len(val.decoded.classes))]
    return Tested(
        fits.mean().item(),
        misses.mean().item(),
        tuple(by_class),
        None if channels is None else 1 - channels.mean().item(),
    )


def write_tested(run: Run, found: Tested) -> None:
    """Keep what a test has found beside the run's other files."""
    write_text(run.folder / TESTED, json.dumps(asdict(found)) + "\n")


def tested(run: Run) -> Tested | None:
    """What a test of a run has found; None if it has not been tested."""
    try:
        values = json.loads((run.folder / TESTED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return tested_from(values)


def tested_from(values: Mapping[str, Any]) -> Tested:
    """What a test has found, from the values that JSON has kept."""
    return Tested(**{**values, "by_class": tuple(values["by_class"])})


def _model_of(run: Run, classes: Sequence[str]) -> ModelFile:
    model = read_model(run.folder / runs.MODEL)
    if model.classes != tuple(classes):
        raise InputError(f"{run.folder} was trained on other classes")
    return model


def _scores(scorer: Scorer, images: Tensor) -> Tensor:
    return scorer(Pass("single-crop"), images[:, None])


def _misses(score: Callable[[Tensor], Tensor], part: InMemory) -> NDArray[np.float64]:
    labels = part.decoded.labels
    scores = [score(batch.images).cpu() for batch in part.evaluation(batch_size(part, labels.device))]
    return misses(torch.cat(scores), labels.cpu(), 1)


@contextmanager
def _watched(network: nn.Module) -> Iterator[dict[tuple[str, int], Tensor]]:
    """By rectifier, which of its channels have been positive, (channels,). One may be used at several widths."""
    alive: dict[tuple[str, int], Tensor] = {}

    def noting(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def note(_module: nn.Module, _args: Any, output: Tensor) -> None:
            now = (output > 0).transpose(0, 1).flatten(1).any(dim=1)
            key = name, len(now)
            alive[key] = alive.get(key, torch.zeros_like(now)) | now

        return note

    rectifiers = {name: module for name, module in network.named_modules() if isinstance(module, nn.ReLU)}
    hooks = [module.register_forward_hook(noting(name)) for name, module in rectifiers.items()]
    try:
        yield alive
    finally:
        for hook in hooks:
            hook.remove()
