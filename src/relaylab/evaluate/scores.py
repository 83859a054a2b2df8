"""Class scores on disk: a network's output for every image, from which all results are computed.

FOLDER/images.txt                     names of the images, in order
FOLDER/labels.safetensors             their labels; in the header title, fingerprint, names and keys of the classes
FOLDER/scores/NAME/model.json         description of a network
FOLDER/scores/NAME/VIEW/000000.safetensors   log-probabilities, float16 (images, classes), of CHUNK images

Note [Scores]
1. An interruption loses at most one chunk. Chunks are written atomically, and their headers identify network, images
   and view; chunks that do not match are rejected.
2. Half precision stores log-probabilities to about three digits. All results are computed from the stored values and
   are therefore reproducible; rounding changes the order of two classes in few images.
3. Chunks are validated on reading: they must be logarithms of probabilities that sum to 1.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relaylab.data.sources.classes import Classes, classes_of
from relaylab.data.sources.file_states import sample
from relaylab.data.sources.source import UNLABELLED, Source
from relaylab.errors import InputError
from relaylab.evaluate.protocols import PROTOCOLS, Kind, average
from relaylab.files import write_text
from relaylab.models.file import read_tensors, save_tensors
from relaylab.outside.folders import refuse_links
from relaylab.outside.reading import LARGEST, DamagedFileError, check_keys, parse, read_bytes, read_json, typed

CHUNK = 1024
LEAST = -60000.0  # about the lowest float16 value
NAMES_HASH = "names"
ROUNDING = 0.02  # tolerance on the sum of probabilities, for half precision
IMAGES, LABELS, SCORES, MODEL = "images.txt", "labels.safetensors", "scores", "model.json"


@dataclass(frozen=True, eq=False)
class ImageList:
    """The images of a folder of scores.

    Attributes:
        title: title of the data set.
        fingerprint: hash of images, labels and classes.
        classes: names, in the order of the labels.
        labels: int64 (n,).
        names: names of the images.
        keys: keys of the classes; None in folders of earlier versions. See Note [Classes] in
            `relaylab.data.sources.classes`.
        numbered: whether the labels come from a list.
        contents: hash of the file sizes of the images, equal for copies of a data set; empty if unknown.
    """

    title: str
    fingerprint: str
    classes: tuple[str, ...]
    labels: Tensor
    names: tuple[str, ...]
    keys: tuple[str, ...] | None = None
    numbered: bool = False
    contents: str = ""

    @property
    def identity(self) -> Classes:
        """The classes by key."""
        return Classes.stored(self.classes, self.keys, numbered=self.numbered)

    def is_same(self, other: "ImageList") -> bool:
        """Return whether two lists have the same images and classes; an earlier version is compared by name."""
        if (self.keys is None) != (other.keys is None):
            return _fingerprint(self, self.classes) == _fingerprint(other, other.classes)
        return self.fingerprint == other.fingerprint

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @property
    def is_labelled(self) -> bool:
        """Whether all images have a label."""
        return bool((self.labels != UNLABELLED).all())


def describe_images(source: Source) -> ImageList:
    """Describe a data set. Image names are relative to their common parent folder."""
    labels = torch.as_tensor(source.labels[:].astype("int64"))
    names, classes = [source.name(index) for index in range(len(source))], classes_of(source)
    shared = len(os.path.commonpath([name.rpartition("/")[0] for name in names]))
    names = tuple(name[shared:].removeprefix("/") for name in names)
    images = ImageList(source.title, "", classes.names, labels, names, classes.keys, classes.numbered)
    return replace(images, fingerprint=_fingerprint(images, classes.keys), contents=_contents(source))


def _contents(source: Source) -> str:
    size: Callable[[int], int] | None = getattr(source, "size", None)  # not all sources have it
    try:
        sizes = [size(index) for index in sample(len(source))] if size else []
    except (OSError, AttributeError):  # a missing image, reported when it is read; a subset of a source without sizes
        return ""
    return sha256(json.dumps(sizes).encode()).hexdigest()[:32] if sizes else ""


def _fingerprint(images: ImageList, classes: Sequence[str]) -> str:
    """Return a hash of images and classes that does not depend on the folder, unlike a source's fingerprint."""
    text = json.dumps([images.names, classes, images.labels.tolist()])
    return sha256(text.encode()).hexdigest()


class ScoreFolder:
    """A folder of scores of several networks on the same images.

    Args:
        path: the folder.
        images: the images; None to read them from the folder.

    Raises:
        InputError: the folder does not exist, or contains scores of different images.
    """

    def __init__(self, path: Path, images: ImageList | None = None) -> None:
        self.path = path
        present = _read_images(path) if (path / LABELS).is_file() else None
        found = present or images
        if found is None:
            raise InputError(f"{path} has no scores: expected an output folder of `relaylab eval`")
        if images is not None and not images.is_same(found):
            raise InputError(
                f"{path} contains scores of {len(found)} images of {found.title}, which differ from these "
                f"{len(images)} images of {images.title}: choose a different folder with --out"
            )
        if images is not None and images.contents and found.contents not in ("", images.contents):
            raise InputError(
                f"{path} contains scores of an earlier version of {found.title}: file sizes of images have changed "
                "since; choose a different folder with --out"
            )
        self.images = found
        if images is not None and path.is_dir():  # scores will be written to it
            refuse_links(path)
        if present is None:
            path.mkdir(parents=True, exist_ok=True)
            write_text(path / IMAGES, "".join(f"{name}\n" for name in found.names))
            header = {"title": found.title, "fingerprint": found.fingerprint, "classes": json.dumps(found.classes)}
            header |= {"contents": found.contents, NAMES_HASH: _names_hash(found.names)}
            if found.keys is not None:
                header |= {"keys": json.dumps(found.keys), "numbered": json.dumps(found.numbered)}
            save_tensors({"labels": found.labels}, path / LABELS, header)

    @property
    def chunks(self) -> list[range]:
        """The image indices of each chunk."""
        count = len(self.images)
        return [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]

    def names(self) -> list[str]:
        """Return the networks with scores, in the order in which they were added."""
        files = [(path.stat().st_mtime_ns, path.parent.name) for path in (self.path / SCORES).glob(f"*/{MODEL}")]
        return [name for _, name in sorted(files)]

    def about(self, name: str) -> dict[str, Any]:
        """Return the description of a network.

        Raises:
            InputError: unknown network.
        """
        path = self.path / SCORES / name / MODEL
        if not path.is_file():
            raise InputError(f"{self.path} has no scores of {name}: missing {path}")
        about = read_json(path, dict[str, Any])
        typed(about, _About, str(path))
        return about

    def add(self, name: str, about: dict[str, Any]) -> None:
        """Add a network, if it does not exist yet.

        Raises:
            InputError: the folder contains scores of a different network with this name.
        """
        folder = self.path / SCORES / name
        if not (folder / MODEL).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / MODEL, json.dumps(about, indent=1) + "\n")
        elif self.about(name)["sha256"] != about["sha256"]:
            raise InputError(
                f"{self.path} contains scores of {name} with different weights: choose a different folder with --out"
            )

    def has(self, name: str, view: str, chunk: int) -> bool:
        """Return whether a chunk exists."""
        return self._file(name, view, chunk).is_file()

    def write(self, name: str, view: str, chunk: int, log_probabilities: Tensor) -> None:
        """Write one chunk of a view: log-probabilities (images, classes).

        Raises:
            InputError: NaN scores.
        """
        bad = log_probabilities.isnan().any(dim=1).nonzero().flatten()
        if len(bad):
            image = self.images.names[self.chunks[chunk][int(bad[0])]]
            problem = f"the scores of {len(bad)} images are NaN, first of {image}"
            raise InputError(f"{name}, {view}: {problem}")
        file = self._file(name, view, chunk)
        file.parent.mkdir(exist_ok=True)
        save_tensors({"log_probabilities": log_probabilities.clamp(min=LEAST).half()}, file, self._header(name, view))

    def read(self, name: str, view: str) -> Tensor:
        """Read all log-probabilities of a view, float32 (images, classes).

        Raises:
            InputError: chunks are missing, damaged or NaN, or belong to different images or networks.
        """
        header, parts = self._header(name, view), []
        for index, chunk in enumerate(self.chunks):
            shape = (len(chunk), len(self.images.classes))
            file = self._file(name, view, index)
            tensors, stored = read_tensors(file)
            if stored != header:
                raise InputError(f"{file} contains scores of different images, or of a different network or view")
            part = tensors.get("log_probabilities")
            if part is None or part.shape != shape:
                raise InputError(f"{file} does not have scores of shape {shape}: delete it and evaluate again")
            if part.isnan().any():
                raise InputError(f"{file} has NaN scores: delete it and evaluate again")
            if part.dtype != torch.float16 or not _are_log_probabilities(part.float()):
                raise InputError(f"{file} does not contain log-probabilities: delete it and evaluate again")
            parts.append(part.float())
        return torch.cat(parts)

    def views(self, name: str) -> list[str]:
        """Return the complete views."""
        folders = sorted(path.name for path in (self.path / SCORES / name).iterdir() if path.is_dir())
        return [view for view in folders if all(self.has(name, view, i) for i in range(len(self.chunks)))]

    def protocols(self, name: str) -> list[Kind]:
        """Return the protocols with at least one complete view."""
        complete = self.views(name)
        return [kind for kind in PROTOCOLS if any(view.startswith(kind) for view in complete)]

    def views_of(self, name: str, kind: Kind) -> tuple[str, ...]:
        """Return the complete views of a protocol; of a scale with and without mirroring, only the former."""
        complete = [view for view in self.views(name) if view.startswith(kind)]
        return tuple(view for view in complete if f"{view}-flip" not in complete)

    def protocol(self, name: str, kind: Kind) -> Tensor:
        """Return the log-probabilities (images, classes) of a protocol: the mean probabilities of its views.

        Raises:
            InputError: there is no complete view, or one cannot be read; see `read`.
        """
        views = self.views_of(name, kind)
        if not views:
            others = f" (there are {', '.join(self.protocols(name))})" if self.protocols(name) else ""
            missing = f"no complete {kind} scores of {name}{others}"
            raise InputError(f"{self.path} has {missing}: run `relaylab eval --protocol {kind}`")
        return average(torch.stack([self.read(name, view) for view in views]), 0)

    def _file(self, name: str, view: str, chunk: int) -> Path:
        return self.path / SCORES / name / view / f"{chunk:06d}.safetensors"

    def _header(self, name: str, view: str) -> dict[str, str]:
        return {"model": self.about(name)["sha256"], "images": self.images.fingerprint, "pass": view}


def check_alike(folders: Sequence[ScoreFolder]) -> None:
    """Check that folders have scores of the same images and classes, so that they can be compared in one table.

    Raises:
        InputError: two folders have different images or classes.
    """
    first, one = folders[0], folders[0].images
    for other in folders[1:]:
        two = other.images
        ours, theirs = one.identity.keys, two.identity.keys
        if ours != theirs and not one.is_same(two):
            detail = next(
                (f"{a} where the other has {b}" for a, b in zip(ours, theirs, strict=False) if a != b), "more"
            )
            reason = f"different classes ({len(ours)} and {len(theirs)}; {detail})"
        elif not one.is_same(two):
            reason = f"different images ({len(one)} of {one.title}, {len(two)} of {two.title})"
        else:
            continue
        raise InputError(f"{first.path} and {other.path} have {reason}: they cannot be compared in one table")


def _read_images(path: Path) -> ImageList:
    tensors, header = read_tensors(path / LABELS)
    where = str(path / LABELS)
    try:
        names = tuple(read_bytes(path / IMAGES, LARGEST).decode().splitlines())
    except (OSError, UnicodeError) as error:
        raise DamagedFileError(f"{path} is not a complete folder of scores: {error}") from None
    check_keys(header, ("title", "fingerprint", "classes"), where)
    check_keys(tensors, ("labels",), where)
    keys = parse(header["keys"], tuple[str, ...], f"{where}, keys") if "keys" in header else None
    images = ImageList(
        header["title"],
        header["fingerprint"],
        parse(header["classes"], tuple[str, ...], f"{where}, classes"),
        tensors["labels"],
        names,
        keys,
        parse(header.get("numbered", "false"), bool, f"{where}, numbered"),
        header.get("contents", ""),
    )
    _ = images.identity  # raises an InputError for keys that do not fit
    if len(images.names) != len(images.labels):
        raise InputError(f"{path / IMAGES} lists {len(images.names)} images for {len(images.labels)} labels")
    _check_labels(images, where, header.get(NAMES_HASH))
    return images


def _check_labels(images: ImageList, where: str, names: str | None) -> None:
    labels = images.labels
    whole = labels.ndim == 1 and labels.dtype == torch.int64 and len(labels) > 0
    if not whole or int(labels.min()) < UNLABELLED or int(labels.max()) >= len(images.classes):
        raise DamagedFileError(f"{where} is damaged: expected labels from 0 to {len(images.classes) - 1}, int64")
    if names not in (None, _names_hash(images.names)):
        raise DamagedFileError(
            f"{IMAGES} next to {where} is damaged or modified: evaluate again with a different --out"
        )


@dataclass(frozen=True)
class _About:
    """The types of a network's description; see `relaylab.evaluate.trained.describe_run`."""

    sha256: str
    file: str = ""
    recipe: str = ""
    row: str = ""
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    seed: int = 0
    scale: str = ""
    changes: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    val_data: tuple[str, ...] = ()


def _names_hash(names: Sequence[str]) -> str:
    return sha256(json.dumps(names).encode()).hexdigest()


def _are_log_probabilities(values: Tensor) -> bool:
    """Return whether scores (images, classes) are log-probabilities, up to half precision."""
    return bool((values <= ROUNDING).all()) and bool(((values.exp().sum(dim=1) - 1).abs() <= ROUNDING).all())
