"""`relaylab demo`: standard BP, multi-loss and relay on handwritten digits or on the user's images."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from relaylab.commands.compare import CompareOptions, compare, print_results
from relaylab.errors import FAILED, INTERRUPTED, InputError, raise_all
from relaylab.files import ROOT, new_folder, write_text
from relaylab.options import Folder, Images, Listed, Number, OptionalList, path_problems, too_small
from relaylab.recipes.scales import stored_side
from relaylab.train.options import Changes, RuntimeOptions

if TYPE_CHECKING:
    from relaylab.recipes.schema import Recipe

PAGE = "report.html"
EPOCHS, SEEDS = {"digits": 30, "photos": 12}, {"digits": "0,1,2", "photos": "0"}  # by recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """Train standard BP, multi-loss and relay on one network, and write a page.

    Without options the images are handwritten digits that are installed with the lab; training then takes about two
    minutes on two cores. The demo is `relaylab compare digits`, or `photos` with --data, followed by `relaylab report`.
    """

    data: Images = ()
    """Images: a folder or tar files with train/CLASS/IMAGE and val/CLASS/IMAGE; or, together with --val-data, anything
    that docs/data.md describes. (default: the handwritten digits)."""

    val_data: Images = ()
    """Validation images, where --data has training images only."""

    out: Folder = None
    """Folder for the runs and the page; it may hold those of an earlier demo. (default: runs/demo/NAME, after the
    images)."""

    schemes: Listed = "standard,multi-loss,relay"
    """Schemes to compare."""

    seeds: OptionalList = ""
    """Seeds; each scheme is trained once per seed. (default: 0,1,2 for the digits, 0 for photographs)."""

    epochs: Number = None
    """Passes over the training images. (default: 30 for the digits, 12 for photographs)."""

    jobs: Number = None
    """Runs at once, each in its own process. (default: as many as the cores allow; 1 with a GPU)."""

    workers: Number = None
    """Processes that decode images, for each run. (default: the cores divided among the runs at once)."""

    changes: Changes = ()
    """Change values of the recipe, such as network.image_size=32 or images.long_tail=50; `relaylab recipes show photos`
    lists them."""


def main(options: DemoOptions) -> int:
    """Train what is missing, print the table and the verdict, and write the page."""
    recipe = "photos" if options.data else "digits"
    problems = path_problems((*options.data, *options.val_data))
    if options.val_data and not options.data:
        problems.append("--val-data needs --data")
    raise_all(problems + too_small(options, epochs=1))
    name = (options.data[0].resolve().name.lstrip(".").partition(".")[0] if options.data else "") or recipe
    with new_folder(options.out, ROOT / "demo" / name, may_hold=True) as folder:
        shared = {key: getattr(options, key) for key in ("data", "val_data", "schemes", "jobs", "workers")}
        seeds, changes = options.seeds or SEEDS[recipe], suited(recipe, options)
        given = CompareOptions(recipe=recipe, seeds=seeds, changes=changes, **shared)
        comparison = compare(given, folder)
        if comparison is None:
            return INTERRUPTED
        print_results(comparison, folder, given.changes)
        if comparison.runs:
            from relaylab.report.page import render_page

            write_text(folder / PAGE, render_page(comparison))
            print(f"Page:    {(folder / PAGE).resolve()}")
        return FAILED if comparison.failures else 0


def suited(name: str, options: DemoOptions) -> tuple[str, ...]:
    """Return the user's changes of a recipe by name, and those that suit it to the images and to the network's size."""
    from relaylab.recipes import find_recipe
    from relaylab.recipes.changes import with_changes
    from relaylab.recipes.schema import value_text
    from relaylab.train import jobs

    recipe, problems = with_changes(find_recipe(name), options.changes)
    raise_all(problems)
    jobs.start_server()
    values = _sizes(recipe, name) | _counts(recipe, name, options)
    present = {key: value for key, value, _ in recipe.fields()}
    given = {change.partition("=")[0].strip() for change in options.changes}
    more = [f"{key}={value_text(value)}" for key, value in values.items() if key not in given and present[key] != value]
    return (*options.changes, *more)


def _sizes(recipe: "Recipe", name: str) -> dict[str, object]:
    """Return the values that depend on the size of the crops; head and overlap are at the last segment but one."""
    from relaylab.models.small import segment_count

    size = recipe.network.image_size
    segment = f"segment{segment_count(max(4, size)) - 1}"
    values: dict[str, object] = {"plan.primary.bottom": segment, "plan.auxiliary.aux.top": segment}
    if name == "photos":
        values |= {"images.short_side": stored_side(size), "evaluation.scales": (stored_side(size),)}
    return values


def _counts(recipe: "Recipe", name: str, options: DemoOptions) -> dict[str, object]:
    """Return the values that depend on the images: the number of classes and of iterations."""
    import numpy as np

    from relaylab.data.sources.digits import digits_tar
    from relaylab.data.sources.source import targets_of
    from relaylab.train.images import check_classes, chosen_numbers, open_sources

    train, val = open_sources(
        RuntimeOptions(data=options.data or (digits_tar(),), val_data=options.val_data), recipe.images
    )
    if targets_of(train) is not None:
        advice = "relaylab recipes new writes a recipe for several labels, which relaylab compare trains"
        raise InputError(f"{train.title}: the demo is for images of one class each; {advice}")
    check_classes(train, val)
    labels = np.asarray(train.labels)
    chosen, _ = chosen_numbers(recipe.images, labels)
    count = len(labels) if chosen is None else len(chosen)
    epoch = max(1, count // recipe.optimizer.batch_size)
    return {
        "network.num_classes": len(train.classes),
        "optimizer.iterations": (options.epochs or EPOCHS[name]) * epoch,
        "optimizer.evaluate_every": epoch,
    }
