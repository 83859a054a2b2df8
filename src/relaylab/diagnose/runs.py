"""Probe the networks of runs: their newest checkpoints, on validation images."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relaylab.data.sources.source import Source
from relaylab.diagnose.information import Reading, collect, read_all, trained_layers
from relaylab.diagnose.probe import entropy_bits
from relaylab.errors import InputError
from relaylab.evaluate.images import open_split
from relaylab.evaluate.protocols import View
from relaylab.evaluate.testing import Cuts, Scorer
from relaylab.models.building import build_relay
from relaylab.models.file import ModelFile, read_model
from relaylab.progress import Task, progress
from relaylab.report.comparison import Run, open_runs
from relaylab.train import checkpoint, run_folder
from relaylab.train.segments import segments_of

BATCH, LEAST = 50, 8


def read_runs(
    folders: Sequence[Path], data: Sequence[Path], images: int, seed: int
) -> tuple[dict[str, list[Reading]], dict[str, Any]]:
    """Probe each run, and return its readings, and further values for the page.

    Args:
        folders: folders of runs or comparisons.
        data: paths of images; empty to use the images of the first run.
        images: number of validation images, the same number of each class.
        seed: seed of the projections and of the split into halves.
    """
    opened = open_runs(folders).runs
    runs = dict(zip(names_of([run.folder for run in opened]), opened, strict=True))
    checkpoints = {name: _newest(run.folder) for name, run in runs.items()}
    source, indices = _images(data, images, opened[0], read_model(_model_of(opened[0])))
    labels = torch.tensor([int(source.labels[index]) for index in indices])
    readings: dict[str, list[Reading]] = {}
    for name, run in runs.items():
        model = read_model(_model_of(run))
        relay = build_relay(run.recipe).eval()
        relay.load_state_dict(checkpoint.read(checkpoints[name]).model)
        with progress(f"images, {name}", len(indices)) as task:
            features = collect(relay, _batches(source, indices, labels, model, task), seed=seed)
        with progress(f"probes, {name}", len(features)) as task:
            trained = trained_layers(segments_of(run.recipe))
            readings[name] = read_all(features, labels, trained, seed=seed, task=task)
    about = {
        "schemes": {name: run.recipe.scheme for name, run in runs.items()},
        "checkpoints": {name: f"{name} at step {_step_of(path):,}" for name, path in checkpoints.items()},
        "images": len(indices),
        "entropy": entropy_bits(labels.numpy()),
        "seed": seed,
    }
    return readings, about


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return the names of folders, with as many parent folders as needed to make them unique."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return ["/".join(part) for part in parts]


def _newest(folder: Path) -> Path:
    path = checkpoint.newest_valid(folder / run_folder.CHECKPOINTS)
    if path is None:
        raise InputError(f"{folder} has no valid checkpoint, and model files have no auxiliary heads: train it again")
    return path


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _model_of(run: Run) -> Path:
    file, folder = run.folder / run_folder.MODEL, run.folder
    if not file.is_file():
        raise InputError(f"the run in {folder} is unfinished; to complete it: relaylab train --resume {folder}")
    return file


def _images(data: Sequence[Path], images: int, first: Run, model: ModelFile) -> tuple[Source, list[int]]:
    """Open the validation images and choose the same number of each class."""
    if model.has_several_labels:
        raise InputError(f"{first.folder}: multi-label images are not supported")
    source = open_split(data, first.about, None, model.identity)
    labels = np.asarray(source.labels)
    classes = np.unique(labels)
    per_class = images // len(classes)
    if per_class < LEAST:
        raise InputError(f"--images {images}: expected at least {LEAST * len(classes)} for {len(classes)} classes")
    indices = sorted(int(n) for label in classes for n in np.flatnonzero(labels == label)[:per_class])
    return source, indices


def _batches(
    source: Source, indices: Sequence[int], labels: Tensor, model: ModelFile, task: Task
) -> Iterator[tuple[Tensor, Tensor]]:
    scorer = Scorer(model)
    cuts, views = Cuts(source, model.input), [View("single-crop")]
    for start in range(0, len(indices), BATCH):
        rows = cuts.__getitems__((views, indices[start : start + BATCH]))
        if isinstance(rows, InputError):
            raise rows
        images = torch.from_numpy(np.concatenate([crops[0] for _, crops in rows]))
        yield scorer.normalised(images), labels[start : start + BATCH]
        task.advance(len(rows))
