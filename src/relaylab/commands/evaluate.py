"""Commands for trained networks: `eval`, `predict` and `submit`."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from relaylab.errors import INTERRUPTED, WRONG_INPUT, InputError, nearest, raise_all
from relaylab.files import ROOT, available_cores, write_text
from relaylab.options import (
    PICTURES,
    File,
    Folder,
    Images,
    Listed,
    Model,
    MustExist,
    Number,
    OptionalList,
    Runs,
    Switch,
    Word,
    listed,
    too_small,
    writable,
)
from relaylab.outside.showing import printable

if TYPE_CHECKING:
    from relaylab.evaluate.ensembles import Combine
    from relaylab.evaluate.predict import Prediction
    from relaylab.evaluate.protocols import Kind, View

MOST_DRAWN = 40  # images in one figure
Pictures = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """Evaluate trained networks: class scores, error rates and ensembles.

    The class scores of every image are stored, and error rates with confidence intervals are computed from them.

    Evaluation can be interrupted at any time, and resumed with the same command. Existing scores are reused, so further
    ensembles of the same networks take only seconds.
    """

    runs: Runs = ()
    """Folders of finished runs or comparisons, or model files."""

    protocol: Listed = "single-crop"
    """Protocols: single-crop (centre), ten-crop (corners and centre, with mirror images) and dense (the network
    slides over whole images at several scales)."""

    scales: OptionalList = ""
    """For dense: shorter sides of the images in pixels (default: the recipe's sizes or, if it has none, the paper's
    224,256,320,384,448, scaled in proportion if the shorter side of the training images is not 256 pixels)."""

    flip: Switch = False
    """For dense: also evaluate mirrored images."""

    ensemble: OptionalList = ""
    """Also evaluate ensembles of all given networks: average, product, learnt-weights. With learnt-weights, half of the
    images are used to fit the weights, and all ensembles are evaluated on the other half."""

    against: Word = None
    """Baseline network for the comparisons (default: standard BP with the same seed, if given)."""

    data: Annotated[Images, MustExist] = ()
    """Images, as for `relaylab train` (default: the images of the first run)."""

    split: Annotated[
        Literal["val", "test", "train", "all"] | None,
        tyro.conf.arg(metavar="{val,test,train,all}", help_behavior_hint=""),
    ] = None
    """Split of the images; all for images without splits (default: the validation split of the first run, or its
    held-out images if there is none)."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type; auto uses a GPU if available."""

    workers: Number = None
    """Data-loading processes (default: one per core)."""

    batch_size: int = 32
    """Crops per batch; whole images are batched up to the same number of pixels."""

    out: Folder = None
    """Folder for scores and tables; may contain scores of other networks for the same images (default:
    runs/eval/NAME)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictOptions:
    """Print the five most likely classes of images."""

    model: Model
    """Folder of a finished run, a model file (.safetensors), or an exported ONNX program (.onnx)."""

    images: Pictures
    """Image files, folders of images, or - to read one image from stdin."""

    format: Literal["text", "json"] = "text"
    """Output format."""

    picture: File = None
    """Also draw the images with their predicted classes, to this .png or .svg file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitOptions:
    """Write a submission file for a challenge.

    The file has five labels for each test image, in the official order.
    """

    scores: Annotated[Path, MustExist, tyro.conf.Positional, tyro.conf.arg(metavar="SCORES", help_behavior_hint="")]
    """Output folder of `relaylab eval --split test`."""

    list: Annotated[Path, MustExist, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
    """The challenge's list of test images, one per line."""

    network: OptionalList = ""
    """Networks to use; several form an ensemble (default: all in the folder)."""

    protocol: Literal["single-crop", "ten-crop", "dense"] = "dense"
    """Evaluation protocol of the scores."""

    combine: Literal["average", "product"] = "product"
    """Method of combining the probabilities of several networks."""

    format: Literal["ilsvrc", "places2"] = "places2"
    """Submission format."""

    kit: Annotated[File, MustExist] = None
    """For ilsvrc: meta.mat or map_clsloc.txt of the development kit, which map synsets to labels."""

    out: File = None
    """Output file (default: submission.txt)."""


def main(options: EvaluateOptions) -> int:
    """Evaluate the given networks, except where scores exist, and print the table.

    The exit code is 130 after SIGINT or SIGTERM, in which case the same command resumes.
    """
    kinds, combine, scales = _listed(options)
    from relaylab.evaluate.images import open_images, output_orders
    from relaylab.evaluate.protocols import views_of
    from relaylab.evaluate.results import ensemble_of, write
    from relaylab.evaluate.scores import SCORES, ScoreFolder, describe_images
    from relaylab.evaluate.testing import Scorer, check_dense, evaluate
    from relaylab.evaluate.trained import find_trained
    from relaylab.models.file import read_model
    from relaylab.progress import progress
    from relaylab.train.devices import device_of
    from relaylab.train.signals import stopping

    networks = find_trained(options.runs)
    names = [network.name for network in networks]
    if combine and len(networks) < 2:
        raise InputError("an ensemble needs at least two networks")
    device = device_of(options.accelerator)
    models = {network.name: read_model(network.file) for network in networks}
    if several := [name for name, model in models.items() if model.has_several_labels]:
        raise InputError(
            f"{several[0]} is a multi-label network, which `relaylab eval` does not support: its mean average "
            "precision is in metrics.jsonl and in `relaylab report`; for single images, use `relaylab predict`"
        )
    views: dict[str, list[View]] = {}
    for network in networks:
        taken, sides = models[network.name].input, scales or network.scales
        views[network.name] = [p for kind in kinds for p in views_of(kind, taken, sides, flip=options.flip)]
        if "dense" in kinds:
            try:
                check_dense(models[network.name])
            except InputError as error:
                raise InputError(f"{network.name}: {error}; remove dense from --protocol") from None
    out = options.out or ROOT / "eval" / options.runs[0].resolve().name
    scored = [path.name for path in (out / SCORES).glob("*")]
    if options.against is not None and options.against not in {*names, *scored}:
        raise InputError(f"--against {options.against}: unknown network{nearest(options.against, names)}")
    orders = output_orders(networks, models)
    source = open_images(options.data, options.split, networks, models)
    folder = ScoreFolder(out, describe_images(source))
    workers = available_cores() if options.workers is None else options.workers
    total = len(source) * sum(map(len, views.values()))
    with stopping() as stop, progress("evaluate", total) as task:
        for network in networks:
            name, model, network_views = network.name, models[network.name], views[network.name]
            folder.add(name, {"sha256": network.sha256(), "file": str(network.file.absolute()), **network.about})
            if all(folder.has(name, p.name, i) for p in network_views for i in range(len(folder.chunks))):
                task.advance(len(source) * len(network_views))
                continue
            done = evaluate(
                Scorer(model, device), source, folder, name, network_views,
                workers=workers, task=task, batch_size=options.batch_size, order=orders[name],
                stopped=lambda: bool(stop),
            )  # fmt: skip
            if not done:
                print(f"Stopped; finished scores are in {folder.path}. Run the same command again to resume.")
                return INTERRUPTED
    if not folder.images.is_labelled:
        print(f"{folder.path.resolve()}: scores of {len(source):,} images, not all labelled. Next: relaylab submit")
        return 0
    learnt = "learnt-weights" in combine
    ensembles = [ensemble_of(folder, names, kind, how, held_out=learnt) for kind in kinds for how in combine]
    print(write(folder, ensembles, options.against))
    return 0


def predict(options: PredictOptions) -> int:
    """Print the most likely classes of images. Unreadable images are reported on stderr, and the exit code is 2."""
    from relaylab.evaluate.predict import find_pictures, open_network
    from relaylab.evaluate.predict import predict as predictions
    from relaylab.report.paper_figures import prediction_figure
    from relaylab.report.style import write_figure

    path = options.picture and writable(options.picture, "--picture", PICTURES)
    network = open_network(options.model)
    pictures = find_pictures(options.images, sys.stdin.buffer.read)
    if path is not None and len(pictures) > MOST_DRAWN:
        raise InputError(f"--picture: cannot draw {len(pictures)} images, at most {MOST_DRAWN}")
    printed: list[dict[str, object]] = []
    drawn: list[Prediction] = []
    failed = 0
    for picture, result in zip(pictures, predictions(network, pictures), strict=True):
        if isinstance(result, InputError):
            print(f"relaylab: {printable(str(result))}", file=sys.stderr)
            printed.append({"image": picture.name, "error": str(result)})
            failed = WRONG_INPUT
            continue
        printed.append({"image": result.name, "classes": [dataclasses.asdict(guess) for guess in result.guesses]})
        if path is not None:
            drawn.append(result)
        if options.format == "text":
            print(printable(result.name))
            if not result.guesses:
                print("  no class has a probability of 50 % or more; the most likely:")
            for guess in result.guesses or result.below:
                print(f"  {100 * guess.probability:5.1f} %  {printable(guess.name)}")
    if options.format == "json":
        print(json.dumps(printed, indent=1, allow_nan=False))
    if path is not None and drawn:
        write_figure(prediction_figure(drawn), path)
    return failed


def submit(options: SubmitOptions) -> int:
    """Write a submission file, after checking it as the challenge's server would."""
    from relaylab.evaluate.ensembles import combined
    from relaylab.evaluate.scores import ScoreFolder
    from relaylab.evaluate.submission import (
        FORMATS,
        check_submission,
        official_labels,
        read_kit,
        read_test_list,
        submission_lines,
    )

    folder = ScoreFolder(options.scores)
    names = listed(options.network)[0] or folder.names()
    if not names:
        raise InputError(f"{folder.path} has no scores: run `relaylab eval --split test` first")
    scores = combined([folder.protocol(name, options.protocol) for name in names], options.combine)
    expected = read_test_list(options.list)
    form = FORMATS[options.format]
    labels = official_labels(folder.images.identity, form, options.kit and read_kit(options.kit))
    lines = submission_lines(folder.images.names, scores, expected, form, labels)
    check_submission(lines, expected, len(folder.images.classes), form)
    out = options.out or Path("submission.txt")
    write_text(out, "".join(f"{line}\n" for line in lines))
    print(f"{out.resolve()}: {len(lines):,} images, {' x '.join(names)}, {options.protocol}")
    return 0


def _listed(options: EvaluateOptions) -> "tuple[list[Kind], list[Combine], list[int]]":
    """Parse the options that are lists and report all invalid options at once."""
    from relaylab.evaluate.ensembles import COMBINE
    from relaylab.evaluate.protocols import PROTOCOLS

    kinds, problems = listed(options.protocol, PROTOCOLS, "protocol")
    combine, unknown = listed(options.ensemble, COMBINE, "ensemble")
    scales, _ = listed(options.scales)
    problems += unknown
    if not all(part.isdecimal() and int(part) for part in scales):
        problems.append(f"--scales {options.scales}: expected sizes in pixels, separated by commas")
        scales = []
    if not kinds and not problems:
        problems.append(f"--protocol is empty: expected one or more of {', '.join(PROTOCOLS)}")
    if (scales or options.flip) and "dense" not in kinds:
        problems.append("--scales and --flip require the dense protocol: add dense to --protocol")
    raise_all(problems + too_small(options, batch_size=1, workers=0))
    return list(dict.fromkeys(kinds)), list(dict.fromkeys(combine)), [int(part) for part in scales]
