"""`relaylab table`, `relaylab figure` and `relaylab submit`."""

from collections.abc import Sequence
from pathlib import Path

from relaylab.data.sources.opening import open_source
from relaylab.data.sources.source import Source
from relaylab.errors import InputError
from relaylab.evaluate.command import class_order
from relaylab.evaluate.ensembles import combined
from relaylab.evaluate.options import FigureConfig, SubmitConfig, TableConfig
from relaylab.evaluate.protocols import Kind
from relaylab.evaluate.scores import ScoreFolder, describe_images
from relaylab.evaluate.submission import FORMATS, check_submission, read_test_list, submission_lines
from relaylab.files import write_text
from relaylab.progress import progress
from relaylab.recipes.schema import SCHEMES
from relaylab.report.paper_figures import default_path, gradient_figure, photo_figure, pick_photos, window_figure
from relaylab.report.paper_tables import paper_table
from relaylab.report.style import write_figure
from relaylab.tables import render
from relaylab.train import runs
from relaylab.train.records import read_metrics


def table(config: TableConfig) -> int:
    """Write or print one of the paper's tables."""
    text = render(paper_table(config.number, [ScoreFolder(path) for path in config.scores]), config.format)
    if config.out is None:
        print(text)
    else:
        write_text(config.out, text)
        print(config.out.resolve())
    return 0


def figure(config: FigureConfig) -> int:
    """Draw one of the paper's figures."""
    path = default_path(config.number, config.out)
    sources = list(config.sources)
    if not sources:
        raise InputError("of what? Give runs for figures 1 and 2, and a folder of scores for figures 3 and 4")
    match config.number:
        case "1":
            made = gradient_figure({title_of(folder): metrics_of(folder) for folder in sources})
        case "2":
            if len(sources) > 1:
                raise InputError("figure 2 shows one run; give one")
            title = title_of(sources[0])
            made = window_figure(runs.recipe_of(sources[0]), title)
        case _:
            folder = ScoreFolder(sources[0])
            names = folder.names()
            name = config.network or names[-1]
            if name not in names:
                raise InputError(f"{folder.path}: no scores of {name}: expected one of {', '.join(names)}")
            right = config.number == "3"
            scores = folder.protocol(name, folder.protocols(name)[0])
            photos = pick_photos(images_of(folder, name, config.data), folder.images.classes, scores, right=right)
            if not photos:
                raise InputError(f"{name} classifies no image {'rightly' if right else 'wrongly'}")
            made = photo_figure(photos, f"{'Rightly' if right else 'Wrongly'} classified by {name}")
    write_figure(made, path)
    print(path.resolve())
    return 0


def submit(config: SubmitConfig) -> int:
    """Write a challenge's submission file, and read it again to see whether it is one."""
    folder = ScoreFolder(config.scores)
    names = [name.strip() for name in config.network.split(",") if name.strip()] or folder.names()
    if not names:
        raise InputError(f"{folder.path} holds no network's scores")
    kind: Kind = config.protocol
    scores = combined([folder.protocol(name, kind) for name in names], config.combine)
    expected = read_test_list(config.list)
    form = FORMATS[config.format]
    lines = submission_lines(folder.images.names, scores, expected, form)
    check_submission(lines, expected, len(folder.images.classes), form)
    out = config.out or Path("submission.txt")
    write_text(out, "".join(f"{line}\n" for line in lines))
    print(f"{out.resolve()}: {len(lines):,} images, {' x '.join(names)}, {kind}")
    return 0


def images_of(folder: ScoreFolder, name: str, data: Sequence[Path] = ()) -> Source:
    """The images that scores are of.

    Raises:
        InputError: they are not where the network's run had them, or are others.
    """
    about = folder.about(name)
    options = [(data or tuple(map(Path, about.get("data", ()))), "val")]
    options += [(paths, None) for paths in (data, tuple(map(Path, about.get("val_data", ())))) if paths]
    for paths, split in options:
        try:
            source = open_source(paths, split=split, classes=class_order(folder.images.classes), watch=progress)
        except InputError:
            continue
        if describe_images(source).fingerprint == folder.images.fingerprint:
            return source
    raise InputError(f"the images that {folder.path} holds scores of are not found, or have changed: give --data")


def title_of(folder: Path) -> str:
    """A run in a few words.

    Raises:
        InputError: there is none in the folder.
    """
    if not (folder / runs.CONFIG).is_file():
        raise InputError(f"{folder} holds no run: expected {runs.CONFIG}, as `relaylab train` writes it")
    recipe = runs.recipe_of(folder)
    return f"{SCHEMES[recipe.scheme]} ({folder.resolve().name})"


def metrics_of(folder: Path) -> list[dict[str, object]]:
    """The lines of a run's metrics.

    Raises:
        InputError: there are none.
    """
    file = folder / runs.METRICS
    lines = read_metrics(file) if file.is_file() else []
    if not lines:
        raise InputError(f"{folder} holds an empty run: train it first, relaylab train --resume {folder}")
    return lines
