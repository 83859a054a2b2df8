"""Trained networks by the name that people give: a run's folder, or a model file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

from relaylab.errors import InputError, raise_all
from relaylab.train import runs


@dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
        name: short, another for each.
        file: the model file.
        folder: of its run; None for a model file alone.
        about: what its run says of itself: recipe, scale, changes, seed, values.
    """

    name: str
    file: Path
    folder: Path | None
    about: dict[str, Any]

    @property
    def data(self) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
        """Training and validation images of its run, as `relaylab train` was told."""
        return tuple(map(Path, self.about.get("data", ()))), tuple(map(Path, self.about.get("val_data", ())))

    @property
    def scales(self) -> tuple[int, ...]:
        """Those of dense testing that its recipe names; none if it names none."""
        values = self.about.get("values", {})
        return tuple(values["evaluation.scales"]) if values.get("evaluation.protocol") == "dense" else ()

    def sha256(self) -> str:
        """Of the model file."""
        with self.file.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()


def find_trained(paths: Sequence[Path], *, most: int | None = None) -> list[Trained]:
    """Open trained networks.

    Args:
        paths: folders of runs, or of comparisons, which hold runs; or model files.
        most: largest number of networks that the caller can use.

    Raises:
        InputError: everything that is wrong with the paths, at once.
    """
    problems: list[str] = []
    found: list[Trained] = []
    for path in paths:
        for member in _members(path):
            try:
                found.append(_open(member))
            except InputError as error:
                problems.append(str(error))
    if not paths:
        problems.append("no runs given: name folders of runs, or model files")
    files = [trained.file.resolve() for trained in found]
    problems += [f"{file} is given more than once" for file in dict.fromkeys(files) if files.count(file) > 1]
    if most is not None and len(found) > most:
        problems.append(f"{paths[0]} holds {len(found)} networks: name one of its runs")
    raise_all(problems)
    names = [trained.name for trained in found]
    return [_distinct(trained) if names.count(trained.name) > 1 else trained for trained in found]


def _members(path: Path) -> list[Path]:
    """A run, or the runs of a comparison."""
    if not path.is_dir() or (path / runs.CONFIG).exists():
        return [path]
    return sorted(file.parent for file in path.glob(f"*/{runs.CONFIG}")) or [path]


def _open(path: Path) -> Trained:
    if path.is_file():
        return Trained(path.stem, path, None, {})
    if not path.exists():
        raise InputError(f"no such file or folder: {path}")
    if not (path / runs.CONFIG).is_file():
        raise InputError(f"{path} holds no run: expected {runs.CONFIG}, as `relaylab train` writes it, or a model file")
    if not (path / runs.MODEL).is_file():
        raise InputError(f"the run in {path} is unfinished; to complete it: relaylab train --resume {path}")
    return Trained(path.resolve().name, path / runs.MODEL, path, describe_run(path))


def describe_run(folder: Path) -> dict[str, Any]:
    """What a run says of itself.

    Raises:
        InputError: its configuration cannot be read.
    """
    try:
        config = json.loads((folder / runs.CONFIG).read_text(encoding="utf-8"))
        options, recipe = config["options"], config["recipe"]
        kept = ("seed", "scale", "changes", "data", "val_data")
        return {
            "recipe": recipe["name"],
            "row": recipe["row"],
            "values": recipe["values"],
            **{name: options[name] for name in kept},
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / runs.CONFIG} cannot be read: {type(error).__name__}: {error}") from None


def _distinct(trained: Trained) -> Trained:
    parent = trained.file.resolve().parent
    folder = parent if trained.folder is None else parent.parent
    return Trained(f"{folder.name}-{trained.name}", trained.file, trained.folder, trained.about)
