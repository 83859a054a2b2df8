"""The built-in data set: scikit-learn's handwritten digits, written once as a tar file of PNG images."""

import io
import tarfile
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from relaylab.data.sources.cache import atomic_cache_write, cache_folder
from relaylab.outside.folders import is_our_own

NAME = "digits-1.tar"  # rename it if its contents change: a cached file is never rewritten
TRAINING = 1000  # of 1,797 images; the others are for validation
MARGIN = 1  # pixels of background on each side, so that 8x8 crops shift by one pixel


def digits_tar(cache: Path | None = None) -> Path:
    """Return the path of the digits' tar file, which is written to the cache if it is not there yet.

    It contains 1,000 images train/DIGIT/NNNN.png and 797 images val/DIGIT/NNNN.png of 10x10 pixels, where NNNN is the
    index in scikit-learn's data set. The split is stratified and always the same.

    Args:
        cache: cache folder; by default `RELAYLAB_CACHE`, or the user's cache folder.

    Raises:
        InputError: the cache cannot be written.
    """
    path = cache_folder(cache) / "digits" / NAME
    if not is_our_own(path):
        with atomic_cache_write(path) as temporary:
            _write(temporary)
    return path


def _write(path: Path) -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = cast("tuple[NDArray[np.float64], NDArray[np.int64]]", load_digits(return_X_y=True))
    grey = np.round(pixels * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    grey = np.pad(grey, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))
    indices = range(len(labels))
    splits: Any = train_test_split(indices, train_size=TRAINING, stratify=labels, random_state=0)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for split, chosen in zip(("train", "val"), splits, strict=True):
            for index in sorted(chosen, key=lambda index: (labels[index], index)):
                file = io.BytesIO()
                Image.fromarray(grey[index]).save(file, "PNG")
                member = tarfile.TarInfo(f"{split}/{labels[index]}/{index:04d}.png")
                member.size, member.mode = file.tell(), 0o644
                file.seek(0)
                archive.addfile(member, file)
