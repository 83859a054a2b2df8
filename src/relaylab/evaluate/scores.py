"""Class scores on disk: what a network says of every image, so that no figure made of it needs the network again.

FOLDER/images.txt                     names of the images, in order
FOLDER/labels.safetensors             their labels; its header says which images and classes
FOLDER/scores/NAME/model.json         which network
FOLDER/scores/NAME/PASS/000000.safetensors   log-probabilities, float16 (images, classes), CHUNK images each

Note [Scores]
1. Whoever stops half-way loses a chunk. A chunk is written in one piece, and says of which network, images and pass it
   is; one that says something else is refused.
2. Half precision keeps log-probabilities to a thousandth: enough for all figures, which are computed from what is
   stored, so that they come out the same again. Two classes closer than that change places in few images.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from relaylab.data.sources.source import UNLABELLED, Source
from relaylab.errors import InputError
from relaylab.evaluate.protocols import PROTOCOLS, Kind, average
from relaylab.files import replacing, write_text

CHUNK = 1024
LEAST = -60000.0  # the smallest number of float16, roughly
IMAGES, LABELS, SCORES, MODEL = "images.txt", "labels.safetensors", "scores", "model.json"


@dataclass(frozen=True, eq=False)
class ImageList:
    """Which images were looked at.

    Attributes:
        title: of the data set.
        fingerprint: another for other images, labels or classes.
        classes: names, in the order of the labels.
        labels: int64 (n,).
        names: of the images.
    """

    title: str
    fingerprint: str
    classes: tuple[str, ...]
    labels: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @property
    def is_labelled(self) -> bool:
        """Whether all images have a label."""
        return bool((self.labels != UNLABELLED).all())


def describe_images(source: Source) -> ImageList:
    """What is kept of a data set."""
    labels = torch.as_tensor(source.labels[:].astype("int64"))
    names, classes = _short([source.name(number) for number in range(len(source))]), tuple(source.classes)
    # Not the source's own fingerprint: the same images stay the same in another folder.
    told = json.dumps([names, classes, labels.tolist()])
    return ImageList(source.title, sha256(told.encode()).hexdigest(), classes, labels, names)


class ScoreFolder:
    """A folder of scores of some networks on one list of images.

    Args:
        path: of the folder.
        images: what the scores are of; None to read it.

    Raises:
        InputError: no such folder, or one of other images.
    """

    def __init__(self, path: Path, images: ImageList | None = None) -> None:
        self.path = path
        there = _read_images(path) if (path / LABELS).is_file() else None
        if images is None and there is None:
            raise InputError(f"{path} holds no scores: expected a folder that `relaylab eval` has written")
        if images is not None and there is not None and images.fingerprint != there.fingerprint:
            raise InputError(
                f"{path} holds scores of {len(there)} images of {there.title}, and these are {len(images)} images of "
                f"{images.title}, or others: take another folder with --out"
            )
        found = there or images
        assert found is not None
        self.images = found
        if there is None:
            path.mkdir(parents=True, exist_ok=True)
            write_text(path / IMAGES, "".join(f"{name}\n" for name in found.names))
            header = {"title": found.title, "fingerprint": found.fingerprint, "classes": json.dumps(found.classes)}
            _save({"labels": found.labels}, path / LABELS, header)

    @property
    def chunks(self) -> list[range]:
        """Numbers of the images of each chunk."""
        count = len(self.images)
        return [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]

    def names(self) -> list[str]:
        """The networks of which there are scores, in the order in which they were added."""
        files = [(path.stat().st_mtime_ns, path.parent.name) for path in (self.path / SCORES).glob(f"*/{MODEL}")]
        return [name for _, name in sorted(files)]

    def about(self, name: str) -> dict[str, Any]:
        """What is known of a network.

        Raises:
            InputError: there is none of this name.
        """
        try:
            return json.loads((self.path / SCORES / name / MODEL).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: no scores of {name}: {error}") from None

    def add(self, name: str, about: dict[str, Any]) -> None:
        """Make room for a network's scores.

        Raises:
            InputError: there are scores of another network of this name.
        """
        folder = self.path / SCORES / name
        if (folder / MODEL).is_file():
            if self.about(name)["sha256"] != about["sha256"]:
                raise InputError(
                    f"{self.path} holds scores of {name} with other weights: take another folder with --out"
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / MODEL, json.dumps(about, indent=1) + "\n")

    def has(self, name: str, of_pass: str, chunk: int) -> bool:
        """Whether a chunk is there."""
        return self._file(name, of_pass, chunk).is_file()

    def write(self, name: str, of_pass: str, chunk: int, log_probabilities: Tensor) -> None:
        """Write one chunk in one piece.

        Args:
            name: of the network.
            of_pass: its name.
            chunk: its number.
            log_probabilities: (images, classes).

        Raises:
            InputError: one is not a number.
            OSError: it cannot be written.
        """
        bad = log_probabilities.isnan().any(dim=1).nonzero().flatten()
        if len(bad):
            image = self.images.names[self.chunks[chunk][int(bad[0])]]
            raise InputError(
                f"{name}, {of_pass}: the scores of {len(bad)} images are not numbers, the first of {image}"
            )
        file = self._file(name, of_pass, chunk)
        file.parent.mkdir(exist_ok=True)
        _save({"log_probabilities": log_probabilities.clamp(min=LEAST).half()}, file, self._header(name, of_pass))

    def read(self, name: str, of_pass: str) -> Tensor:
        """All scores of one pass: float32 (images, classes), log-probabilities.

        Raises:
            InputError: chunks are missing, damaged or of something else, or not numbers.
        """
        header, parts = self._header(name, of_pass), []
        for number, chunk in enumerate(self.chunks):
            file = self._file(name, of_pass, number)
            tensors, found = _read(file)
            if found != header:
                raise InputError(f"{file} holds scores of other images, another network or another pass")
            part = tensors.get("log_probabilities")
            if part is None or part.shape != (len(chunk), len(self.images.classes)):
                raise InputError(
                    f"{file} holds scores of another shape than ({len(chunk)}, {len(self.images.classes)})"
                )
            if part.isnan().any():
                raise InputError(f"{file} holds scores that are not numbers: delete it and evaluate again")
            parts.append(part.float())
        return torch.cat(parts)

    def passes(self, name: str) -> list[str]:
        """The passes of which all chunks are there."""
        folders = sorted(path.name for path in (self.path / SCORES / name).iterdir() if path.is_dir())
        return [each for each in folders if all(self.has(name, each, i) for i in range(len(self.chunks)))]

    def protocols(self, name: str) -> list[Kind]:
        """The protocols of which there is a whole pass at least."""
        there = self.passes(name)
        return [kind for kind in PROTOCOLS if any(each.startswith(kind) for each in there)]

    def passes_of(self, name: str, kind: Kind) -> tuple[str, ...]:
        """The whole passes of a protocol. Where a scale was looked at with and without mirror images, the former."""
        there = [each for each in self.passes(name) if each.startswith(kind)]
        return tuple(each for each in there if f"{each}-flip" not in there)

    def protocol(self, name: str, kind: Kind) -> Tensor:
        """The log-probabilities that a protocol gives: the mean probability of its passes. (images, classes).

        Raises:
            InputError: there is none, or what is wrong with one; see `read`.
        """
        passes = self.passes_of(name, kind)
        if not passes:
            others = f"; there are those by {', '.join(self.protocols(name))}" if self.protocols(name) else ""
            raise InputError(
                f"{self.path}: no whole scores of {name} by {kind}{others}: relaylab eval --protocol {kind}"
            )
        return average(torch.stack([self.read(name, each) for each in passes]), 0)

    def _file(self, name: str, of_pass: str, chunk: int) -> Path:
        return self.path / SCORES / name / of_pass / f"{chunk:06d}.safetensors"

    def _header(self, name: str, of_pass: str) -> dict[str, str]:
        return {"model": self.about(name)["sha256"], "images": self.images.fingerprint, "pass": of_pass}


def _short(names: Sequence[str]) -> tuple[str, ...]:
    """Names without the folder that all of them share."""
    shared = len(os.path.commonpath([name.rpartition("/")[0] for name in names]))
    return tuple(name[shared:].removeprefix("/") for name in names)


def check_alike(folders: Sequence[ScoreFolder]) -> None:
    """Refuse to put scores of different images or classes into one table.

    Raises:
        InputError: which folders differ, and in what.
    """
    first = folders[0]
    for other in folders[1:]:
        one, two = first.images, other.images
        if one.classes != two.classes:
            different = next((pair for pair in zip(one.classes, two.classes, strict=False) if pair[0] != pair[1]), None)
            detail = f"{different[0]} where the other has {different[1]}" if different else "more"
            raise InputError(
                f"{first.path} and {other.path} have different classes ({len(one.classes)} and {len(two.classes)}; "
                f"{detail}): they cannot stand in one table"
            )
        if one.fingerprint != two.fingerprint:
            raise InputError(
                f"{first.path} and {other.path} have different images ({len(one)} of {one.title}, {len(two)} of "
                f"{two.title}): they cannot stand in one table"
            )


def _read_images(path: Path) -> ImageList:
    tensors, header = _read(path / LABELS)
    try:
        names = tuple((path / IMAGES).read_text(encoding="utf-8").splitlines())
        labels, classes = tensors["labels"], tuple(json.loads(header["classes"]))
        images = ImageList(header["title"], header["fingerprint"], classes, labels, names)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} is no whole folder of scores: {error}") from None
    if len(images.names) != len(images.labels):
        raise InputError(f"{path / IMAGES} names {len(images.names)} images, and there are {len(images.labels)} labels")
    return images


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read: {error}; delete it and evaluate again") from None


def _save(tensors: dict[str, Tensor], file: Path, header: dict[str, str]) -> None:
    with replacing(file) as temporary:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, header)
        temporary.chmod(0o644)
