"""Find trained networks by run folder or model file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import file_digest
from pathlib import Path
from typing import Any

from relaylab.errors import InputError, raise_all
from relaylab.train import run_folder


@dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
        name: short, unique name.
        file: model file.
        folder: folder of its run; None for a model file without a run.
        about: description of its run; see `describe_run`.
    """

    name: str
    file: Path
    folder: Path | None
    about: dict[str, Any]

    @property
    def data(self) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
        """The training and validation images of its run."""
        return tuple(map(Path, self.about.get("data", ()))), tuple(map(Path, self.about.get("val_data", ())))

    @property
    def scales(self) -> tuple[int, ...]:
        """The scales for dense evaluation in its recipe, if any."""
        values = self.about.get("values", {})
        return tuple(values["evaluation.scales"]) if values.get("evaluation.protocol") == "dense" else ()

    def sha256(self) -> str:
        """Return the hash of the model file."""
        with self.file.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()


def find_trained(paths: Sequence[Path], *, most: int | None = None) -> list[Trained]:
    """Find trained networks.

    Args:
        paths: folders of runs or comparisons, or model files.
        most: maximum number of networks.

    Raises:
        InputError: invalid paths; the message lists all problems.
    """
    problems: list[str] = []
    networks: list[Trained] = []
    for path in paths:
        for member in _members(path):
            try:
                networks.append(_open(member))
            except InputError as error:
                problems.append(str(error))
    if not paths:
        problems.append("no runs given: pass folders of runs, or model files")
    files = [trained.file.resolve() for trained in networks]
    problems += [f"{file} is given more than once" for file in dict.fromkeys(files) if files.count(file) > 1]
    if most is not None and len(networks) > most:
        problems.append(f"{paths[0]} contains {len(networks)} networks: pass one of its runs")
    raise_all(problems)
    names = [trained.name for trained in networks]
    return [_distinct(trained) if names.count(trained.name) > 1 else trained for trained in networks]


def _members(path: Path) -> list[Path]:
    """Return a run, or the runs of a comparison."""
    if not path.is_dir() or (path / run_folder.CONFIG).exists():
        return [path]
    return sorted(file.parent for file in path.glob(f"*/{run_folder.CONFIG}")) or [path]


def _open(path: Path) -> Trained:
    if path.is_file():
        return Trained(path.stem, path, None, {})
    if not path.exists():
        raise InputError(f"no such file or folder: {path}")
    if not (path / run_folder.CONFIG).is_file():
        raise InputError(f"{path} is not a run: expected a folder with {run_folder.CONFIG}, or a model file")
    if not (path / run_folder.MODEL).is_file():
        raise InputError(f"the run in {path} is unfinished; to complete it: relaylab train --resume {path}")
    return Trained(path.resolve().name, path / run_folder.MODEL, path, describe_run(path))


def describe_run(folder: Path) -> dict[str, Any]:
    """Describe a run: recipe with all values, row of the paper's tables, seed, scale, overrides and images.

    Raises:
        InputError: the run's configuration cannot be read.
    """
    recipe = run_folder.stored_recipe(folder)
    about: dict[str, Any] = {"recipe": recipe.name, "row": recipe.row, "values": run_folder.values_of(recipe)}
    options = run_folder.read_run(folder).options
    about |= {"seed": options.seed, "scale": options.scale, "changes": list(options.changes)}
    return about | {"data": list(map(str, options.data)), "val_data": list(map(str, options.val_data))}


def _distinct(trained: Trained) -> Trained:
    parent = trained.file.resolve().parent
    folder = parent if trained.folder is None else parent.parent
    return replace(trained, name=f"{folder.name}-{trained.name}")
