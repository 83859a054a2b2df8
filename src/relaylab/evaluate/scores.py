"""Class scores on disk: a network's output for every image, from which all results are computed.

FOLDER/images.txt                     names of the images, in order
FOLDER/labels.safetensors             their labels; title, fingerprint, and names and keys of the classes in the header
FOLDER/scores/NAME/model.json         description of a network
FOLDER/scores/NAME/PASS/000000.safetensors   log-probabilities, float16 (images, classes), CHUNK images each

Note [Scores]
1. An interruption loses one chunk. Chunks are written atomically, and their headers name network, images and pass;
   chunks of others are refused.
2. Half precision keeps log-probabilities to a thousandth: enough for all results, which are computed from the stored
   values and are therefore reproducible. Two classes closer than that change places in few images.
3. Nothing impossible is read: scores are logarithms of shares of one, and every file has its sum.
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
LEAST = -60000.0  # the smallest number of float16, roughly
NAMES_HASH = "names"
ROUNDING = 0.02  # of a sum of shares, by half precision
IMAGES, LABELS, SCORES, MODEL = "images.txt", "labels.safetensors", "scores", "model.json"


@dataclass(frozen=True, eq=False)
class ImageList:
    """The images of a folder of scores.

    Attributes:
        title: of the data set.
        fingerprint: differs for other images, labels or classes.
        classes: names, in the order of the labels.
        labels: int64 (n,).
        names: of the images.
        keys: the classes' keys; None in folders of earlier versions. See Note [Classes] in
            `relaylab.data.sources.classes`.
        numbered: whether the labels are those of a list.
        contents: a hash of the images' sizes in bytes, which a copy of the data set shares; empty where unknown.
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
        """Return whether these are another list's images and classes; earlier versions told classes apart by name."""
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
    """Describe a data set. Image names are kept without the folder that all of them share."""
    labels = torch.as_tensor(source.labels[:].astype("int64"))
    names, classes = [source.name(number) for number in range(len(source))], classes_of(source)
    shared = len(os.path.commonpath([name.rpartition("/")[0] for name in names]))
    names = tuple(name[shared:].removeprefix("/") for name in names)
    images = ImageList(source.title, "", classes.names, labels, names, classes.keys, classes.numbered)
    return replace(images, fingerprint=_fingerprint(images, classes.keys), contents=_contents(source))


def _contents(source: Source) -> str:
    size: Callable[[int], int] | None = getattr(source, "size", None)  # sources of other kinds may not know it
    try:
        sizes = [size(number) for number in sample(len(source))] if size else []
    except (OSError, AttributeError):  # an absent image, an error where it is read; a subset of another kind of source
        return ""
    return sha256(json.dumps(sizes).encode()).hexdigest()[:32] if sizes else ""


def _fingerprint(images: ImageList, classes: Sequence[str]) -> str:
    """Return a hash of images and classes: not the source's own, so the same images in another folder have the same."""
    text = json.dumps([images.names, classes, images.labels.tolist()])
    return sha256(text.encode()).hexdigest()


class ScoreFolder:
    """A folder of scores of several networks on the same images, which are read from it if they are not given.

    Raises:
        InputError: no such folder, or one of other images.
    """

    def __init__(self, path: Path, images: ImageList | None = None) -> None:
        self.path = path
        present = _read_images(path) if (path / LABELS).is_file() else None
        found = present or images
        if found is None:
            raise InputError(f"{path} holds no scores: expected a folder that `relaylab eval` has written")
        if images is not None and not images.is_same(found):
            raise InputError(
                f"{path} holds scores of {len(found)} images of {found.title}, and these are {len(images)} images of "
                f"{images.title}, or others: take another folder with --out"
            )
        if images is not None and images.contents and found.contents not in ("", images.contents):
            raise InputError(
                f"{path} holds scores of {found.title} as it was: images have been written over since, for their sizes "
                "in bytes are others; take another folder with --out"
            )
        self.images = found
        if images is not None and path.is_dir():  # it will be written to
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
            InputError: there is none of this name.
        """
        path = self.path / SCORES / name / MODEL
        if not path.is_file():
            raise InputError(f"{self.path}: no scores of {name}: there is no {path}")
        about = read_json(path, dict[str, Any])
        typed(about, _About, str(path))
        return about

    def add(self, name: str, about: dict[str, Any]) -> None:
        """Add a network, unless it is there already.

        Raises:
            InputError: the folder has scores of another network of this name.
        """
        folder = self.path / SCORES / name
        if not (folder / MODEL).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / MODEL, json.dumps(about, indent=1) + "\n")
        elif self.about(name)["sha256"] != about["sha256"]:
            raise InputError(f"{self.path} holds scores of {name} with other weights: take another folder with --out")

    def has(self, name: str, of_pass: str, chunk: int) -> bool:
        """Return whether a chunk exists."""
        return self._file(name, of_pass, chunk).is_file()

    def write(self, name: str, of_pass: str, chunk: int, log_probabilities: Tensor) -> None:
        """Write one chunk of a pass: log-probabilities (images, classes).

        Raises:
            InputError: scores that are not numbers.
        """
        bad = log_probabilities.isnan().any(dim=1).nonzero().flatten()
        if len(bad):
            image = self.images.names[self.chunks[chunk][int(bad[0])]]
            problem = f"the scores of {len(bad)} images are not numbers, the first of {image}"
            raise InputError(f"{name}, {of_pass}: {problem}")
        file = self._file(name, of_pass, chunk)
        file.parent.mkdir(exist_ok=True)
        save_tensors(
            {"log_probabilities": log_probabilities.clamp(min=LEAST).half()}, file, self._header(name, of_pass)
        )

    def read(self, name: str, of_pass: str) -> Tensor:
        """Read all log-probabilities of one pass, float32 (images, classes).

        Raises:
            InputError: chunks are missing, damaged, not numbers, or belong to other images or networks.
        """
        header, parts = self._header(name, of_pass), []
        for number, chunk in enumerate(self.chunks):
            shape = (len(chunk), len(self.images.classes))
            file = self._file(name, of_pass, number)
            tensors, found = read_tensors(file)
            if found != header:
                raise InputError(f"{file} holds scores of other images, another network or another pass")
            part = tensors.get("log_probabilities")
            if part is None or part.shape != shape:
                raise InputError(f"{file} holds scores of another shape than {shape}")
            if part.isnan().any():
                raise InputError(f"{file} holds scores that are not numbers: delete it and evaluate again")
            if part.dtype != torch.float16 or not _are_log_probabilities(part.float()):
                raise InputError(f"{file} holds no log-probabilities: delete it and evaluate again")
            parts.append(part.float())
        return torch.cat(parts)

    def passes(self, name: str) -> list[str]:
        """Return the complete passes."""
        folders = sorted(path.name for path in (self.path / SCORES / name).iterdir() if path.is_dir())
        return [each for each in folders if all(self.has(name, each, i) for i in range(len(self.chunks)))]

    def protocols(self, name: str) -> list[Kind]:
        """Return the protocols with a complete pass at least."""
        there = self.passes(name)
        return [kind for kind in PROTOCOLS if any(each.startswith(kind) for each in there)]

    def passes_of(self, name: str, kind: Kind) -> tuple[str, ...]:
        """Return the complete passes of a protocol; of a scale with and without mirror images, only the former."""
        there = [each for each in self.passes(name) if each.startswith(kind)]
        return tuple(each for each in there if f"{each}-flip" not in there)

    def protocol(self, name: str, kind: Kind) -> Tensor:
        """Return a protocol's log-probabilities, (images, classes), from the mean probabilities of its passes.

        Raises:
            InputError: there is no complete pass, or one cannot be read; see `read`.
        """
        passes = self.passes_of(name, kind)
        if not passes:
            others = f"; there are those by {', '.join(self.protocols(name))}" if self.protocols(name) else ""
            missing = f"no whole scores of {name} by {kind}{others}"
            raise InputError(f"{self.path}: {missing}: relaylab eval --protocol {kind}")
        return average(torch.stack([self.read(name, each) for each in passes]), 0)

    def _file(self, name: str, of_pass: str, chunk: int) -> Path:
        return self.path / SCORES / name / of_pass / f"{chunk:06d}.safetensors"

    def _header(self, name: str, of_pass: str) -> dict[str, str]:
        return {"model": self.about(name)["sha256"], "images": self.images.fingerprint, "pass": of_pass}


def check_alike(folders: Sequence[ScoreFolder]) -> None:
    """Check that folders have scores of the same images and classes, so that they can be compared in one table.

    Raises:
        InputError: which folders differ, and in what.
    """
    first, one = folders[0], folders[0].images
    for other in folders[1:]:
        two = other.images
        ours, theirs = one.identity.keys, two.identity.keys
        if ours != theirs and not one.is_same(two):
            detail = next(
                (f"{a} where the other has {b}" for a, b in zip(ours, theirs, strict=False) if a != b), "more"
            )
            what = f"different classes ({len(ours)} and {len(theirs)}; {detail})"
        elif not one.is_same(two):
            what = f"different images ({len(one)} of {one.title}, {len(two)} of {two.title})"
        else:
            continue
        raise InputError(f"{first.path} and {other.path} have {what}: they cannot be compared in one table")


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
        raise InputError(f"{path / IMAGES} names {len(images.names)} images, and there are {len(images.labels)} labels")
    _check_labels(images, where, header.get(NAMES_HASH))
    return images


def _check_labels(images: ImageList, where: str, names: str | None) -> None:
    labels = images.labels
    whole = labels.ndim == 1 and labels.dtype == torch.int64 and len(labels) > 0
    if not whole or int(labels.min()) < UNLABELLED or int(labels.max()) >= len(images.classes):
        raise DamagedFileError(f"{where} is damaged: expected labels from 0 to {len(images.classes) - 1}, int64")
    if names not in (None, _names_hash(images.names)):
        raise DamagedFileError(f"{IMAGES} beside {where} is damaged, or was changed: evaluate again with another --out")


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
    """Return whether scores (images, classes) are logarithms of shares of one, up to half precision."""
    return bool((values <= ROUNDING).all()) and bool(((values.exp().sum(dim=1) - 1).abs() <= ROUNDING).all())
