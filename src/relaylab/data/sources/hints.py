"""The error message for folders without readable images: the files they contain instead, and what to do with them."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

MOST_FILES = 20_000  # maximum number of files to count
MOST_KINDS = 5
OWN_SOURCE = "write a Source (docs/how-to/data.md#a-source-of-your-own)"
ADVICE = {
    "HEIC and camera raw files": (
        ".heic .heif .jxl .dng .cr2 .cr3 .nef .arw",
        "convert them to JPEG or PNG, for example with ImageMagick: magick mogrify -format jpg FILES",
    ),
    "videos": (".mp4 .avi .mov .mkv .webm .mpg .mpeg", "extract frames: ffmpeg -i VIDEO -vf fps=1 CLASS/NAME-%05d.jpg"),
    "DICOM files": (".dcm .dicom", f"convert them to PNG with pydicom, or {OWN_SOURCE}"),
    "tar or zip files": (".tar .gz .xz .bz2 .zst .tgz .zip", "give these files instead of the folder"),
    "Parquet files": (".parquet", "give these files instead of the folder"),
    "arrays and databases": (
        ".npy .npz .h5 .hdf5 .mat .tfrecord .mdb .lmdb .beton .pkl .pt .bin .arrow .rec",
        f"write the images to CLASS/IMAGE, or {OWN_SOURCE}",
    ),
    "lists": (".csv .tsv .txt .json", "also give the list, if it contains the class of each image"),
}


def no_images(title: object, roots: Sequence[Path]) -> str:
    """Return the error message for folders in which no images were found."""
    names = [name for root in roots for name in islice(_files(root), MOST_FILES)]
    found = Counter(os.path.splitext(name)[1].lower() for name in names)  # noqa: PTH122 (names, not paths)
    expected = f"no images in {title}: expected CLASS/IMAGE or {{train,val}}/CLASS/IMAGE"
    if not found:
        return f"{expected}; it has no files"
    kinds = [f"{count:,} {kind or 'without extension'}" for kind, count in found.most_common(MOST_KINDS)]
    more = " and others" if len(found) > MOST_KINDS else ""
    most = max(ADVICE, key=lambda kind: sum(found[extension] for extension in ADVICE[kind][0].split()))
    has_most = any(found[extension] for extension in ADVICE[most][0].split())
    advice = f". For {most}: {ADVICE[most][1]}" if has_most else ""
    return f"{expected}; it has {', '.join(kinds)}{more}{advice}"


def _files(root: Path) -> Iterable[str]:
    return (name for _, _, names in os.walk(root) for name in names if not name.startswith("."))
