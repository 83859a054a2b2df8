"""The report's section on training images: samples of each class, and the class balance."""

from pathlib import Path

import numpy as np
from PIL import Image

from relaylab.data.decode import decode
from relaylab.data.faults import ImageFault
from relaylab.data.sources import digits
from relaylab.data.sources.source import targets_of
from relaylab.errors import InputError
from relaylab.report.balance import balance_plot, draws_per_epoch
from relaylab.report.comparison import Run
from relaylab.report.html import image_uri, svg_uri
from relaylab.report.paper_figures import plain
from relaylab.train.images import open_training
from relaylab.train.options import TrainOptions

CLASSES, EACH = 10, 4  # classes shown, and images per class
TILE, GAP = 80, 4  # pixels


def is_embedded(run: Run) -> bool:
    """Return whether the images of a run are the packaged digits, which any report may show, as they show no people."""
    return [Path(path).name for path in run.about["data"]] == [digits.NAME]


def sample_strips(run: Run) -> tuple[list[tuple[str, str]], str]:
    """Return the name and a strip of training images of each class, or the reason why there are none."""
    data, val_data = (tuple(map(Path, run.about[name])) for name in ("data", "val_data"))
    try:
        source = open_training(TrainOptions(data=data, val_data=val_data))
        labels, targets, strips = np.asarray(source.labels), targets_of(source), list[tuple[str, str]]()
        for label, name in enumerate(run.classes[:CLASSES]):
            has_label = labels == label if targets is None else targets[:, label]
            tiles = [_tile(decode(source.read(int(n)))) for n in np.flatnonzero(has_label)[:EACH]]
            if tiles:
                strips.append((plain(name), image_uri(np.concatenate(tiles, axis=1)[:, :-GAP], "png")))
    except (InputError, ImageFault, OSError) as error:
        return [], str(error)
    return strips, ""


def _tile(pixels: np.ndarray) -> np.ndarray:
    """Return the centre square with a gap on its right; small images are enlarged without smoothing."""
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    how = Image.Resampling.NEAREST if side <= TILE // 2 else Image.Resampling.LANCZOS
    square = Image.fromarray(pixels[top : top + side, left : left + side]).resize((TILE, TILE), how)
    return np.pad(np.asarray(square), ((0, 0), (0, GAP), (0, 0)), constant_values=255)


def balance(run: Run) -> str | None:
    """Plot the training images and draws per class; None if the run has no record of them."""
    if not run.counts:
        return None
    sizes, sampling = run.counts["train"], run.recipe.images.sampling
    counts = {"training images": sizes}
    if sampling != "shuffled":
        counts[f"draws per epoch, {sampling} sampling"] = draws_per_epoch(sizes, sampling).tolist()
    names = [plain(name) for name in run.classes]
    return svg_uri(balance_plot(counts, names, title="Training images per class", unit="images", size=(5.6, 4.0)))
