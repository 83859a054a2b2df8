"""`relaylab demo`: compare standard BP, multi-loss and Relay BP on handwritten digits or the user's images."""

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
EPOCHS, SEEDS = {"digits": 30, "photos": 12}, {"digits": "0,1,2", "photos": "0"}  # defaults by recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """Compare standard BP, multi-loss and Relay BP on a small network, and write an HTML report.

    By default the images are scikit-learn's handwritten digits, and training takes about two minutes on two cores. The
    demo runs `relaylab compare digits` (`photos` with --data), then `relaylab report`.
    """

    data: Images = ()
    """Images: a folder or tar files with train/CLASS/IMAGE and val/CLASS/IMAGE; with --val-data, training images in any
    format of docs/how-to/data.md (default: the handwritten digits)."""

    val_data: Images = ()
    """Validation images, if --data has training images only."""

    out: Folder = None
    """Folder for the runs and the report; may contain the runs of an earlier demo (default: runs/demo/NAME, named after
    the images)."""

    schemes: Listed = "standard,multi-loss,relay"
    """Training schemes to compare: standard, multi-loss, relay, isolated."""

    seeds: OptionalList = ""
    """Seeds; each scheme is trained once per seed (default: 0,1,2 for the digits, 0 with --data)."""

    epochs: Number = None
    """Epochs to train (default: 30 for the digits, 12 with --data)."""

    jobs: Number = None
    """Number of concurrent runs, each in its own process (default: as many as the cores allow; 1 with a GPU)."""

    workers: Number = None
    """Data-loading processes per run (default: the cores divided by the number of concurrent runs)."""

    changes: Changes = ()
    """Override values of the recipe, such as network.image_size=32 or images.long_tail=50; `relaylab recipes show
    photos` lists them."""


def main(options: DemoOptions) -> int:
    """Train the missing runs, print the table and the verdict, and write the report."""
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
            print(f"Report:  {(folder / PAGE).resolve()}")
        return FAILED if comparison.failures else 0


def suited(name: str, options: DemoOptions) -> tuple[str, ...]:
    """Return the user's changes of a recipe, and further ones that adapt it to the images and the size of the crops."""
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
    """Return the values that depend on the crop size. The head and the overlap are at the second-last segment."""
    from relaylab.models.small import segment_count

    size = recipe.network.image_size
    segment = f"segment{segment_count(max(4, size)) - 1}"
    values: dict[str, object] = {"plan.primary.bottom": segment, "plan.auxiliary.aux.top": segment}
    if name == "photos":
        values |= {"images.short_side": stored_side(size), "evaluation.scales": (stored_side(size),)}
    return values


def _counts(recipe: "Recipe", name: str, options: DemoOptions) -> dict[str, object]:
    """Return the values that depend on the images: the numbers of classes and of iterations."""
    from relaylab.data.sources.digits import digits_tar
    from relaylab.data.sources.source import targets_of
    from relaylab.train.images import check_classes, chosen_indices, open_sources

    train, val = open_sources(
        RuntimeOptions(data=options.data or (digits_tar(),), val_data=options.val_data), recipe.images
    )
    if targets_of(train) is not None:
        advice = "use `relaylab recipes new` and `relaylab compare` for multi-label images"
        raise InputError(f"{train.title}: the demo does not support multi-label images; {advice}")
    check_classes(train, val)
    chosen, _ = chosen_indices(recipe.images, train)
    count = len(train) if chosen is None else len(chosen)
    epoch = max(1, count // recipe.optimizer.batch_size)
    return {
        "network.num_classes": len(train.classes),
        "optimizer.iterations": (options.epochs or EPOCHS[name]) * epoch,
        "optimizer.evaluate_every": epoch,
    }
