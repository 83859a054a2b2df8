"""`relaylab diagnose information`: from runs to the page."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from relaybackprop import Relay
from relaylab.data.sources.opening import open_source
from relaylab.data.sources.source import Source
from relaylab.diagnose import page
from relaylab.diagnose.information import collect, read_all, trained_layers
from relaylab.diagnose.options import InformationConfig
from relaylab.diagnose.probe import entropy_bits
from relaylab.errors import InputError
from relaylab.evaluate.command import class_order
from relaylab.evaluate.protocols import Pass
from relaylab.evaluate.testing import Cuts, Scorer
from relaylab.models.building import build_relay
from relaylab.models.file import ModelFile, read_model
from relaylab.progress import Task, progress
from relaylab.report.page import Run, open_runs
from relaylab.train import checkpoint, runs
from relaylab.train.segments import segments_of

BATCH, LEAST = 50, 8


def run(config: InformationConfig, folder: Path) -> int:
    """Measure, write the page and say where it is.

    Raises:
        InputError: runs that do not belong together or have no checkpoint, or too few images.
    """
    found = open_runs(config.runs)
    runs = dict(zip(names_of([each.folder for each in found]), found, strict=True))
    checkpoints = {name: _newest(each.folder) for name, each in runs.items()}
    first = read_model(_model_of(found[0]))
    source, numbers = _images(config, found[0], first)
    labels = torch.tensor([int(source.labels[number]) for number in numbers])
    read = {}
    for name, each in runs.items():
        model = read_model(_model_of(each))
        relay = load_relay(each, checkpoints[name])
        with progress(f"images, {name}", len(numbers)) as task:
            features = collect(relay, _batches(source, numbers, labels, model, task), seed=config.seed)
        with progress(f"probes, {name}", len(features)) as task:
            trained = trained_layers(segments_of(each.recipe))
            read[name] = read_all(features, labels, trained, seed=config.seed, task=task)
    about = {
        "schemes": {name: each.recipe.scheme for name, each in runs.items()},
        "checkpoints": {name: f"{name} at {path.name}" for name, path in checkpoints.items()},
        "images": len(numbers),
        "entropy": entropy_bits(labels.numpy()),
        "seed": config.seed,
    }
    print(page.write(folder, read, about).resolve())
    return 0


def names_of(folders: Sequence[Path]) -> list[str]:
    """What to call folders: by their own names, with as much of the way to them as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return ["/".join(part) for part in parts]


def load_relay(each: Run, path: Path) -> Relay:
    """A run's network and heads with the weights of a checkpoint, in evaluation mode."""
    relay = build_relay(each.recipe)
    relay.load_state_dict(checkpoint.read(path).model)
    return relay.eval()


def _newest(folder: Path) -> Path:
    path = checkpoint.newest_whole(folder / runs.CHECKPOINTS)
    if path is None:
        raise InputError(f"{folder} has no whole checkpoint, and model files have no auxiliary heads: train it again")
    return path


def _model_of(each: Run) -> Path:
    file = each.folder / runs.MODEL
    if not file.is_file():
        raise InputError(f"the run in {each.folder} has not come to its end: relaylab train --resume {each.folder}")
    return file


def _images(config: InformationConfig, first: Run, model: ModelFile) -> tuple[Source, list[int]]:
    """The validation images, and which of them: as many of each class as can be."""
    own_val = tuple(map(Path, first.about["val_data"]))
    paths = config.data or own_val or tuple(map(Path, first.about["data"]))
    split = None if own_val and not config.data else "val"
    source = open_source(paths, split=split, classes=class_order(model.classes), watch=progress)
    labels = np.asarray(source.labels)
    classes = np.unique(labels)
    each = config.images // len(classes)
    if each < LEAST:
        raise InputError(f"--images {config.images}: {len(classes)} classes need at least {LEAST * len(classes)}")
    numbers = sorted(int(n) for label in classes for n in np.flatnonzero(labels == label)[:each])
    return source, numbers


def _batches(
    source: Source, numbers: Sequence[int], labels: Tensor, model: ModelFile, task: Task
) -> Iterator[tuple[Tensor, Tensor]]:
    scorer = Scorer(model)
    cuts = Cuts(source, [Pass("single-crop")], model.input)
    for start in range(0, len(numbers), BATCH):
        rows = cuts.__getitems__(numbers[start : start + BATCH])
        if isinstance(rows, InputError):
            raise rows
        images = torch.from_numpy(np.concatenate([views[0] for _, views in rows]))
        yield scorer.normalised(images), labels[start : start + BATCH]
        task.advance(len(rows))
