"""Finished runs' networks on training and validation images alike: do they fit, do they generalise?"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.training import Run
from relaylab.data.geometry import View
from relaylab.data.memory import DecodedImages, MemoryEvaluationLoader, decode_all
from relaylab.data.subset import Thinned, few_per_class
from relaylab.errors import InputError
from relaylab.evaluate.figures import misses
from relaylab.evaluate.protocols import Pass
from relaylab.evaluate.testing import Scorer
from relaylab.files import write_text
from relaylab.model_file import read_model
from relaylab.progress import progress
from relaylab.train import runs
from relaylab.train.images import open_sources
from relaylab.train.options import TrainConfig

TESTED_PER_CLASS = 100  # images, in both parts: there are as many validation images
BATCH = 100
FILE = "tested.json"


@dataclass(frozen=True)
class Tested:
    """Single-crop top-1 errors of a network, in per cent, in float32 and without augmentation and dropout.

    Attributes:
        train: on 100 training images of each class.
        val: on the validation images.
        by_class: on those of each class.
        dead: share of the channels of all rectifiers that are zero on all of the training images.
    """

    train: float
    val: float
    by_class: tuple[float, ...]
    dead: float


def test_finished(found: Sequence[Run]) -> None:
    """Test what has not been tested yet.

    Args:
        found: finished runs, of one size and on the same images.

    Raises:
        InputError: images that cannot be used.
    """
    missing = [run for run in found if not (run.folder / FILE).exists()]
    if not missing:
        return
    recipe = runs.recipe_of(missing[0].folder)
    view = View(size=recipe.network.image_size, short_side=recipe.images.short_side)
    parts = _decoded(missing[0].config, view)
    with progress("test", len(missing)) as task:
        for run in missing:
            write_text(run.folder / FILE, json.dumps(asdict(_test(run, parts, view))) + "\n")
            task.advance(1, note=f"{run.arm}, seed {run.seed}")


def tested(run: Run) -> Tested | None:
    """What a test of a run has found; None if it has not been tested."""
    try:
        values = json.loads((run.folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Tested(**{**values, "by_class": tuple(values["by_class"])})


def _decoded(config: TrainConfig, view: View) -> dict[str, DecodedImages]:
    train, val = open_sources(config)
    return {
        "train": decode_all(Thinned(train, few_per_class(train.labels, TESTED_PER_CLASS)), view),
        "val": decode_all(val, view),
    }


def _test(run: Run, parts: dict[str, DecodedImages], view: View) -> Tested:
    model = read_model(run.folder / runs.MODEL)
    if model.classes != parts["train"].classes:
        raise InputError(f"{run.folder} was trained on other classes")
    scorer = Scorer(model)
    with _watched(scorer.network) as alive:
        train = _misses(scorer, parts["train"], view)
        dead = 1 - torch.cat(list(alive.values())).float().mean()
    val = _misses(scorer, parts["val"], view)
    labels = parts["val"].labels
    by_class = [val[labels == label].mean().item() for label in range(len(model.classes))]
    return Tested(train.mean().item(), val.mean().item(), tuple(by_class), dead.item())


def _misses(scorer: Scorer, images: DecodedImages, view: View) -> Tensor:
    batches = MemoryEvaluationLoader(images, view, batch_size=BATCH)
    scores = torch.cat([scorer(Pass("single-crop"), batch.images[:, None]) for batch in batches])
    return torch.from_numpy(misses(scores, images.labels, 1))


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
