"""A3: the trainer against a bare loop on images in memory, and the trainer on images that workers decode."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks import train
from benchmarks.gpu.session import Session, WrongGradientsError
from benchmarks.gpu.settings import Settings
from benchmarks.measure import Metrics, interleave, ratio
from relaylab.data.datasets import OnDiskDataset
from relaylab.data.geometry import CropSpec
from relaylab.data.sources.classes import classes_of
from relaylab.data.sources.opening import open_source
from relaylab.train.images import RunImages

NAMES = ("memory", "disk")
CHECK_STEPS = 3
ROUNDS = 5
PHOTOGRAPH = (500, 375)  # pixels


def measure(session: Session, settings: Settings) -> None:
    """Measure and record both sources of images."""
    for name, work in zip(NAMES, (from_memory, from_disk), strict=True):
        result = session.attempt("A3", name, lambda work=work: work(session, settings))
        if result is not None:
            session.measured("A3", name, result)


def loop_settings_of(session: Session, settings: Settings) -> train.Settings:
    """Return the settings of `benchmarks.train` for this device."""
    device = cast(Literal["cpu", "cuda"], session.device)
    return train.Settings(
        device=device,
        precision="bf16" if device == "cuda" else "32",
        recipe=settings.recipe,
        crop_spec=CropSpec(size=settings.recipe.network.image_size, short_side=settings.side),
        images=settings.images,
        check_steps=CHECK_STEPS,
        steps=settings.steps,
    )


def from_memory(session: Session, settings: Settings) -> Metrics:
    """Time the trainer and the bare loop in turns, after a check that both train alike.

    Raises:
        WrongGradientsError: they train differently.
    """
    loop_settings = loop_settings_of(session, settings)
    try:
        with train.loops(loop_settings) as (ours, bare):
            sides = {"bare": bare.step, "ours": ours.step}
            contenders = {
                name: lambda step=step: _repeat(step, loop_settings.steps, session.device)
                for name, step in sides.items()
            }
            times = interleave(
                contenders, rounds=ROUNDS, budget_s=min(settings.budget_s, session.left_s), warmup=1, min_rounds=2
            )
            result = ratio(times["bare"], times["ours"])
            metrics: Metrics = {"loop_over_bare": result.median, "loop_over_bare_error": result.error}
            batch = loop_settings.recipe.optimizer.batch_size
            for name, seconds in times.items():
                metrics[f"images_per_s_{name}"] = batch * loop_settings.steps / float(np.median(seconds))
            return metrics | waiting(ours, loop_settings.steps, session.device)
    except train.DifferentTrainingError as error:
        raise WrongGradientsError(str(error)) from error


def from_disk(session: Session, settings: Settings) -> Metrics:
    """Time the trainer on JPEG files that workers decode."""
    config = loop_settings_of(session, settings)
    with images_on_disk(session, settings) as (images, folder):
        ours = train.TrainerLoop(config, images, folder)
        try:
            _repeat(ours.step, config.steps, session.device)
            return {"workers": settings.workers, **waiting(ours, config.steps, session.device)}
        finally:
            if ours.trainer.records is not None:
                ours.trainer.records.close()


def waiting(ours: train.TrainerLoop, steps: int, device: str) -> Metrics:
    """Return the speed of the trainer, and the share of the time that it spends fetching images."""
    ours.trainer.meter.reset()
    _repeat(ours.step, steps, device)
    values = ours.trainer.meter.values(ours.trainer.recipe.optimizer.batch_size)
    return {"images_per_s": values["images_per_s"], "share_waiting": values["data_wait"]}


def _repeat(step: Callable[[], None], steps: int, device: str) -> None:
    for _ in range(steps):
        step()
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def images_on_disk(session: Session, settings: Settings) -> Iterator[tuple[RunImages, Path]]:
    """Write photographs and open them as training does. Yields the images and a folder for the run."""
    config = loop_settings_of(session, settings)
    with tempfile.TemporaryDirectory(prefix="relaylab-gpu-") as name:
        folder = Path(name)
        write_photographs(
            folder / "images", settings.files, min(settings.files // 2, config.recipe.network.num_classes)
        )
        source = open_source((folder / "images",), split=None)
        dataset = OnDiskDataset(source, config.crop_spec, settings.workers, pin_memory=session.device == "cuda")
        identity = classes_of(source)
        (folder / "run").mkdir()
        yield (
            RunImages(dataset, dataset, config.crop_spec, dataset.statistics(), in_memory=False, identity=identity),
            folder / "run",
        )


def write_photographs(folder: Path, count: int, classes: int) -> None:
    """Write JPEGs cut from the two photographs of scikit-learn, in class folders."""
    originals = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    rng = np.random.default_rng(train.SEED)
    for index in range(count):
        image, (width, height) = originals[index % 2], PHOTOGRAPH
        left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        class_folder = folder / f"class{index % classes:03}"
        class_folder.mkdir(parents=True, exist_ok=True)
        image.crop((left, top, left + width, top + height)).save(class_folder / f"{index:06}.jpg", quality=90)
