"""One recipe under several schemes and seeds: run what is missing, and one table with the spread over the seeds."""

import dataclasses
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from scipy import stats

from relaylab.errors import INTERRUPTED, LabError, raise_all
from relaylab.files import ROOT, write_text
from relaylab.recipes.schema import SCHEMES
from relaylab.report.style import SCHEME_COLOURS, SCHEME_DASHES, plot
from relaylab.train import runs
from relaylab.train.options import CompareConfig, Engine, TrainConfig, listed_schemes, listed_seeds
from relaylab.train.records import read_metrics

CONFIDENCE = 0.95
TABLE, FIGURES, CURVES = "comparison.md", "comparison.json", "curves.svg"


@dataclass(frozen=True)
class Result:
    """One run of a comparison.

    Attributes:
        scheme: what trained it.
        seed: of weights, batches, crops and dropout.
        validations: step, top1, top5 and loss, in their order.
    """

    scheme: str
    seed: int
    validations: tuple[Mapping[str, float], ...]

    @property
    def last(self) -> Mapping[str, float]:
        """At the end of training."""
        return self.validations[-1]


def compare(config: CompareConfig) -> int:
    """Train what is missing, then write and print the table.

    Returns:
        The exit code: 0, or 130 if a run was interrupted; what is done stays done.

    Raises:
        InputError: all that is wrong with the options, before anything is trained.
        LabError: a run that fails.
    """
    schemes, wrong_schemes = listed_schemes(config.schemes)
    seeds, wrong_seeds = listed_seeds(config.seeds)
    problems = wrong_schemes + wrong_seeds
    if any(change.replace(" ", "").startswith("scheme=") for change in config.changes):
        problems.append("--set scheme=...: say which with --schemes")
    raise_all(problems)
    folder = config.out or ROOT / "compare" / (config.recipe or "")
    if config.out is None and config.scale != "paper":
        folder = folder.with_name(f"{folder.name}-{config.scale}")
    members = {
        (scheme, seed): _member(config, scheme, seed, folder) for seed, scheme in itertools.product(seeds, schemes)
    }
    requests = {key: runs.understand(member) for key, member in members.items()}
    for number, (key, request) in enumerate(requests.items(), 1):
        if result_of(members[key], request.recipe.optimizer.iterations, *key) is None:
            print(f"run {number} of {len(requests)}: {SCHEMES[key[0]]}, seed {key[1]}", flush=True)
            if _is_interrupted(members[key], request):
                return INTERRUPTED
    iterations = next(iter(requests.values())).recipe.optimizer.iterations
    results = [result_of(members[key], iterations, *key) for key in members]
    print(write(folder, config, [result for result in results if result is not None]))
    return 0


def _member(config: CompareConfig, scheme: str, seed: int, folder: Path) -> TrainConfig:
    shared = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(Engine)}
    shared["changes"] = (*config.changes, f"scheme={scheme}")
    out = folder / f"{scheme.replace('_', '-')}-s{seed}"
    return TrainConfig(**shared, seed=seed, out=out, resume="auto")


def _is_interrupted(config: TrainConfig, request: runs.Request) -> bool:
    """Train one run; whether somebody wanted it to stop."""
    from relaylab.train import engine

    if config.devices == 1:
        from relaylab.train import session

        return session.train(request).interrupted
    code = engine.launch(config, runs.arguments_of(config))
    if code not in (0, INTERRUPTED):
        raise LabError(f"the run in {config.out} has failed; say the same again to go on")
    return code == INTERRUPTED


def result_of(config: TrainConfig, iterations: int, scheme: str, seed: int) -> Result | None:
    """What a run has found, if it has been carried out to its end."""
    assert config.out is not None
    if not (config.out / runs.MODEL).is_file():
        return None
    return validated(config.out, iterations, scheme, seed)


def validated(folder: Path, iterations: int, scheme: str, seed: int) -> Result | None:
    """What a run's metrics say, if they go to its end."""
    if not (folder / runs.METRICS).is_file():
        return None
    found = [line for line in read_metrics(folder / runs.METRICS) if line["kind"] == "val"]
    if not found or found[-1]["step"] != iterations:
        return None
    return Result(
        scheme, seed, tuple({name: line[name] for name in ("step", "top1", "top5", "loss")} for line in found)
    )


def write(folder: Path, config: CompareConfig, results: Sequence[Result]) -> str:
    """Write the table, the figures behind it and the curves.

    Returns:
        The table.

    Raises:
        OSError: they cannot be written.
    """
    text = table(results)
    title = f"# {config.recipe}" + (f", {config.scale} scale" if config.scale != "paper" else "")
    changes = f"Changed: {', '.join(config.changes)}.\n\n" if config.changes else ""
    notes = (
        "Single-crop errors on the validation images after the last iteration, in per cent: mean +- standard deviation "
        f"over seeds. Differences are paired by seed, with their {100 * CONFIDENCE:.0f} % confidence interval (t). One "
        "seed has the same weights, batches, crops and dropout masks under all schemes.\n"
    )
    write_text(folder / CURVES, curves(results))
    write_text(folder / TABLE, f"{title}\n\n{changes}{text}\n\n{notes}\n![Validation error]({CURVES})\n")
    figures = {"recipe": config.recipe, "scale": config.scale, "changes": config.changes}
    runs_done = [dataclasses.asdict(result) for result in results]
    write_text(folder / FIGURES, json.dumps({**figures, "runs": runs_done}, indent=1) + "\n")
    return f"{text}\n\n{(folder / TABLE).resolve()}"


def table(results: Sequence[Result]) -> str:
    """A comparison's table as Markdown; the first scheme is what the others are compared with."""
    schemes = list(dict.fromkeys(result.scheme for result in results))
    header = ["scheme", "seeds", "top-1 error", "top-5 error"]
    header += [f"{name} minus {SCHEMES[schemes[0]]}" for name in ("top-1", "top-5")]
    lines = [_line(header), _line(["---", "---:", "---:", "---:", "---:", "---:"])]
    for scheme in schemes:
        own = {result.seed: result for result in results if result.scheme == scheme}
        base = {result.seed: result for result in results if result.scheme == schemes[0]}
        cells = [SCHEMES[scheme], str(len(own))]
        cells += [mean_and_spread([result.last[name] for result in own.values()]) for name in ("top1", "top5")]
        for name in ("top1", "top5"):
            both = [seed for seed in own if seed in base]
            pairs = [own[seed].last[name] - base[seed].last[name] for seed in both]
            cells.append("" if scheme == schemes[0] else difference(pairs))
        lines.append(_line(cells))
    return "\n".join(lines)


def difference(values: Sequence[float]) -> str:
    """The mean of paired differences with its confidence interval."""
    if not values:
        return "no common seed"
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.2f} (one seed)"
    error = statistics.stdev(values) / len(values) ** 0.5
    half: float = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * error
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def mean_and_spread(values: Sequence[float]) -> str:
    """The mean, and with several values their standard deviation."""
    spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def curves(results: Sequence[Result]) -> str:
    """Top-1 error against iterations as SVG text: the mean over seeds, and each seed faint behind it."""

    def draw(axes: Axes) -> None:
        for scheme in dict.fromkeys(result.scheme for result in results):
            own = [result for result in results if result.scheme == scheme]
            look: dict[str, Any] = {"color": SCHEME_COLOURS[scheme], "linestyle": SCHEME_DASHES[scheme]}
            steps = [point["step"] for point in own[0].validations]
            rows = [[point["top1"] for point in result.validations] for result in own]
            for row in rows if len(rows) > 1 else []:
                axes.plot(steps, row, linewidth=0.8, alpha=0.3, color=SCHEME_COLOURS[scheme])
            mean = [statistics.fmean(column) for column in zip(*rows, strict=True)]
            marker = "o" if len(steps) == 1 else None
            axes.plot(steps, mean, linewidth=2, marker=marker, label=SCHEMES[scheme], **look)
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

    return plot(draw, "Validation error, top-1", "per cent", size=(7, 4))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
