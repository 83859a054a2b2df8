"""The report: figures.json with everything measured, and report.html and report.md made from it alone."""

import json
import os
import platform
import statistics
import subprocess
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined

from relaylab import demo_pictures
from relaylab.demo import LR_DROPS, MOMENTUM, SCHEMES, WEIGHT_DECAY, Run, describe
from relaylab.demo_data import ImageSet, epoch_draws
from relaylab.files import write_text
from relaylab.models.layers import DROPOUT
from relaylab.options import DemoConfig
from relaylab.report.balance import balance_picture
from relaylab.report.network import AUXILIARY, PRIMARY

ERRORS = {"top1": "top-1 err.", "top5": "top-5 err."}
PAPER = {  # Table 3, model A
    "standard": {"top1": "50.91", "top5": "19.00"},
    "multi_loss": {"top1": "50.72 (0.19)", "top5": "18.84 (0.18)"},
    "relay": {"top1": "49.75 (1.16)", "top5": "17.83 (1.17)"},
}


def collect(data: ImageSet, config: DemoConfig, runs: Sequence[Run], command: str) -> dict[str, Any]:
    """Everything measured and all that is needed to measure it again, as plain values for JSON.

    Args:
        data: what was trained on.
        config: resolved options.
        runs: all of them.
        command: as it was typed.
    """
    return {
        "format": 1,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "config": asdict(config) | {"data": [path.name for path in config.data], "out": None},
        "recipe": {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "dropout": DROPOUT, "lr_drops": LR_DROPS},
        "environment": _environment(),
        "data": {
            "name": data.name,
            "classes": list(data.classes),
            "train_images": len(data.train.labels),
            "val_images": len(data.val.labels),
            "epoch_draws": epoch_draws(data, config),
            "flip": config.flip,
        },
        **describe(data, config, runs),
        "schemes": SCHEMES,
        "table": table(runs),
        "runs": [asdict(run) for run in runs],
    }


def table(runs: Sequence[Run]) -> dict[str, dict[str, dict[str, float | None]]]:
    """By scheme and error: mean, spread over seeds, improvement over standard BP, and that improvement's spread.

    Errors are those after the last epoch, in per cent. A spread is the sample standard deviation, None with one seed;
    an improvement is the mean over seeds of the difference between two runs that share their seed.
    """
    last = {(run.scheme, run.seed): run.epochs[-1] for run in runs}
    seeds = sorted({run.seed for run in runs})
    rows: dict[str, dict[str, dict[str, float | None]]] = {}
    for scheme in SCHEMES:
        rows[scheme] = {}
        for error in ERRORS:
            values = [last[scheme, seed][error] for seed in seeds]
            gains = [last["standard", seed][error] - last[scheme, seed][error] for seed in seeds]
            rows[scheme][error] = {
                "mean": statistics.fmean(values),
                "spread": statistics.stdev(values) if len(seeds) > 1 else None,
                "gain": statistics.fmean(gains),
                "gain_spread": statistics.stdev(gains) if len(seeds) > 1 else None,
            }
    return rows


def cell(figures: Mapping[str, Any], scheme: str, error: str) -> str:
    """One cell in the form of the paper's Table 3, such as `50.72 (0.19)`; without classes enough for top-5, a dash."""
    if error == "top5" and len(figures["data"]["classes"]) <= 5:
        return "-"
    values = figures["table"][scheme][error]
    return f"{values['mean']:.2f}" + ("" if scheme == "standard" else f" ({values['gain']:.2f})")


def spread(figures: Mapping[str, Any], scheme: str, error: str) -> str:
    """The seed-to-seed spread of a cell, such as `\u00b1 0.30`; empty with one seed."""
    value = figures["table"][scheme][error]["spread"]
    return "" if value is None or cell(figures, scheme, error) == "-" else f"\u00b1 {value:.2f}"


def verdict(figures: Mapping[str, Any]) -> list[str]:
    """What the table says and how far it can be trusted, in sentences computed from it."""
    seeds, images = figures["config"]["seeds"], figures["data"]["val_images"]
    means = ", ".join(
        f"{title} {figures['table'][scheme]['top1']['mean']:.2f}\u00a0%" for scheme, title in SCHEMES.items()
    )
    sentences = [f"Of the {images:,} validation images the trained networks got wrong: {means}."]
    for scheme in ("relay", "multi_loss"):
        title = SCHEMES[scheme][0].upper() + SCHEMES[scheme][1:]
        errors = [error for error in ERRORS if cell(figures, scheme, error) != "-"]
        changes = (f"{ERRORS[error].replace('err.', 'error')} {_change(figures, scheme, error)}" for error in errors)
        sentences.append(f"{title} against standard BP: {'; '.join(changes)}.")
    step = f"{images:,} validation images (one of them is {100 / images:.2f} points)"
    if seeds == 1:
        sentences.append(
            f"With one seed and {step} nobody can tell such a difference from chance: use --seeds 3 or more."
        )
    else:
        sentences.append(f"{seeds} seeds and {step} are a demonstration, not a proof.")
    return sentences


def _change(figures: Mapping[str, Any], scheme: str, error: str) -> str:
    gain, gain_spread = (figures["table"][scheme][error][key] for key in ("gain", "gain_spread"))
    if abs(gain) < 0.005:
        return "the same"
    size = f"{abs(gain):.2f} points {'lower' if gain > 0 else 'higher'}"
    if gain_spread is None:
        return size
    if abs(gain) > gain_spread:
        return f"{size}, more than this difference varies from seed to seed ({gain_spread:.2f})"
    return (
        f"{size}, no more than this difference varies from seed to seed ({gain_spread:.2f}), so it may well be chance"
    )


def write(
    folder: Path, figures: Mapping[str, Any], sample: bytes | None = None, training_images: Sequence[str] = ()
) -> Path:
    """Write figures.json, report.md and report.html, each in one piece or not at all.

    Args:
        folder: an existing folder.
        figures: as `collect` returns them.
        sample: a PNG with some of the images, for the HTML page.
        training_images: where they are, for training-images.txt; none for no such file.

    Returns:
        The path of the HTML page.
    """
    write_text(folder / "figures.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "report.md", render_markdown(figures))
    if training_images:
        write_text(folder / "training-images.txt", "".join(f"{name}\n" for name in training_images))
    write_text(folder / "report.html", render_html(figures, sample))
    return folder / "report.html"


def render_markdown(figures: Mapping[str, Any]) -> str:
    """The table and the words, for places that show Markdown."""
    lines = [f"# relaylab demo on {figures['data']['name']}", "", " ".join(verdict(figures)), ""]
    lines += [
        f"| method | {ERRORS['top1']} | {ERRORS['top5']} | paper, top-1 | paper, top-5 |",
        "|---|---|---|---|---|",
    ]
    for scheme, title in SCHEMES.items():
        ours = [f"{cell(figures, scheme, error)} {spread(figures, scheme, error)}".rstrip() for error in ERRORS]
        lines.append(f"| {' | '.join([title, *ours, *PAPER[scheme].values()])} |")
    lines += [
        "",
        f"Errors in per cent on the validation images, after the last epoch; mean of {figures['config']['seeds']} "
        "seed(s). In brackets the improvement over standard BP; after \u00b1 the standard deviation over seeds.",
        "The paper's columns are its Table 3, model A: Places2, 8.1 million training images, single crop.",
        "",
        f"Command: `{figures['command']}`",
    ]
    return "\n".join(lines) + "\n"


def render_html(figures: Mapping[str, Any], sample: bytes | None = None) -> str:
    """One self-contained page: no scripts, no requests."""
    template = resources.files("relaylab").joinpath("demo.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pictures = {
        "error": demo_pictures.learning_curves(figures, "top1", "Validation error (top-1)", "per cent"),
        "loss": demo_pictures.learning_curves(figures, "train_loss", "Training loss of the main classifier", "nats"),
    }
    for moment, when in (("start", "before the first step"), ("end", "after training")):
        for relative in (False, True):
            title = f"{'Relative magnitude' if relative else 'Magnitude'}, {when}"
            pictures[f"{moment}{'_relative' * relative}"] = demo_pictures.gradients(
                figures, moment, relative=relative, title=title
            )
    pictures["balance"] = _balance(figures)
    return environment.from_string(template).render(
        figures,
        pictures={name: _data_uri(svg.encode(), "image/svg+xml") for name, svg in pictures.items()},
        networks={scheme: _network(figures, scheme) for scheme in SCHEMES},
        sample=None if sample is None else _data_uri(sample, "image/png"),
        scheme_colours=demo_pictures.SCHEME_COLOURS,
        loss_colours={"primary": PRIMARY[0], "aux": AUXILIARY[0][0]},
        errors=ERRORS,
        paper=PAPER,
        verdict=verdict(figures),
        cell=lambda scheme, error: cell(figures, scheme, error),
        spread=lambda scheme, error: spread(figures, scheme, error),
        seconds={scheme: _seconds(figures, scheme) for scheme in SCHEMES},
    )


def _balance(figures: Mapping[str, Any]) -> str:
    draws: dict[str, list[int]] = figures["data"]["epoch_draws"]
    titles = {"shuffled": "shuffled: the classes' sizes", "class-aware": "class-aware", "square-root": "square root"}
    counts = {titles[kind]: count for kind, count in draws.items()}
    return balance_picture(counts, figures["data"]["classes"], title="Draws of each class in an epoch", unit="draws")


def _seconds(figures: Mapping[str, Any], scheme: str) -> float:
    return statistics.fmean(run["seconds"] for run in figures["runs"] if run["scheme"] == scheme)


def _network(figures: Mapping[str, Any], scheme: str) -> dict[str, str]:
    svg = demo_pictures.network(figures, scheme)
    return {"uri": _data_uri(svg.encode(), "image/svg+xml"), "words": demo_pictures.network_in_words(figures, scheme)}


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{b64encode(content).decode()}"


def _environment() -> dict[str, Any]:
    packages = ("relaybackprop", "torch", "torchvision", "numpy", "scikit-learn")
    return {
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "commit": _commit(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown"


def _commit() -> str | None:
    """The commit of the checkout that this file lies in, if it lies in one of ours."""
    here = Path(__file__).resolve().parent
    if here.parent.name != "src":
        return None
    try:
        options = {"capture_output": True, "text": True, "check": True, "timeout": 10, "cwd": here}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--", here.parent], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + (" with local changes" if changed else "")
