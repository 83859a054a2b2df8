"""The report, from synthetic run folders: intervals, chance level, sources, failures, rows of the paper, images."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from browser import check, chromium
from relaylab.cli import main
from relaylab.errors import InputError
from relaylab.recipes import find_recipe
from relaylab.recipes.changes import with_changes
from relaylab.recipes.scales import at_scale
from relaylab.report.balance import draws_per_epoch
from relaylab.report.comparison import open_runs
from relaylab.report.costs import cost_of
from relaylab.report.page import question, render_page
from relaylab.report.style import layer_name
from relaylab.report.summary import failure_table, papers_table, recipe_table, summary
from relaylab.tables import Table
from relaylab.train import run_folder
from relaylab.train.options import TrainOptions

RECIPE = "table3-model-a-relay"
TOP1 = {
    "standard": {0: 50.0, 1: 52.0, 2: 51.0},
    "multi_loss": {0: 49.0, 1: 53.0, 2: 49.0},
    "relay": {0: 48.0, 1: 49.9, 2: 49.1},
}


def make_run(folder: Path, scheme: str, seed: int, top1: float, *, scale: str = "tiny", **options: Any) -> Path:
    """Create a run folder as training leaves it, with synthetic errors."""
    changes = (*options.pop("changes", ()), f"scheme={scheme}")
    classes = options.pop("classes", 8)
    if scale == "tiny":
        changes = (f"network.num_classes={classes}", *changes)
    config = TrainOptions(recipe=RECIPE, scale=scale, changes=changes, seed=seed, data=(Path("/data/places"),))  # pyright: ignore
    recipe, problems = with_changes(at_scale(find_recipe(RECIPE), config.scale), changes)
    assert not problems
    run = folder / f"{scheme.replace('_', '-')}-s{seed}"
    run.mkdir(parents=True)
    counts = {"train": [10 * (label + 1) for label in range(classes)], "val": [5] * classes}
    run_folder.write_config(run, config, recipe, {"classes": [f"class {n}" for n in range(classes)], "counts": counts})
    start = {
        "started_at": "now",
        "device": "cpu",
        "processes": 1,
        "threads": 1,
        "versions": {},
        "command": ["relaylab"],
    }
    (run / run_folder.ENVIRONMENT).write_text(json.dumps({"starts": [start]}))
    step = recipe.optimizer.iterations
    line = {"kind": "val", "step": step, "top1": top1, "top5": top1 / 2, "loss": 1.5, "seconds": 20.0 + seed}
    (run / run_folder.METRICS).write_text(json.dumps(line) + "\n")
    return run


def make_comparison(folder: Path, errors: Mapping[str, Mapping[int, float]] = TOP1, **options: Any) -> Path:
    for scheme, own in errors.items():
        for seed, top1 in own.items():
            make_run(folder, scheme, seed, top1, **options)
    return folder


def rows_of(table: Table) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


def test_relay_is_compared_with_standard_bp_and_multi_loss_and_each_difference_has_one_interval(tmp_path: Path) -> None:
    comparison = open_runs([make_comparison(tmp_path)])
    rows = rows_of(summary(comparison))
    assert list(rows) == ["standard BP", "multi-loss", "Relay BP", "chance level"]
    assert rows["standard BP"]["Relay BP minus this method, top-1"] == "-2.00 [-2.25, -1.75]"
    assert rows["multi-loss"]["Relay BP minus this method, top-1"] == "-1.33 [-5.37, +2.71]"
    assert rows["Relay BP"]["Relay BP minus this method, top-1"] == ""
    assert rows["Relay BP"]["top-1 error, %"] == "49.00 ± 0.95"
    page = render_page(comparison).replace("\u00a0", " ")
    intervals = re.findall(r"[+-]\d+\.\d\d \[[+-]\d+\.\d\d, [+-]\d+\.\d\d\]", page)
    assert sorted(intervals) == sorted(
        ["-2.00 [-2.25, -1.75]", "-1.33 [-5.37, +2.71]", "-1.00 [-1.12, -0.88]", "-0.67 [-2.69, +1.35]"]
    ), "two differences of two errors"
    assert "Relay BP is better than standard BP by 2.00 [1.75, 2.25] points." in page
    assert "with 95 % confidence intervals over seeds (t) in brackets" in page
    assert page.index("Relay BP vs multi-loss: inconclusive") < page.index("<table>") < page.index("<img")
    assert question(comparison) == "Does Relay BP train model A better than standard BP and multi-loss?"


def test_guessing_has_a_row_and_a_line_where_it_is_in_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = open_runs([make_comparison(tmp_path)])
    guessing = rows_of(summary(comparison))["chance level"]
    assert (guessing["top-1 error, %"], guessing["top-5 error, %"]) == ("87.50", "37.50")
    drawn: list[list[str]] = []
    from relaylab.report import curves

    def look(draw: Any, *_args: Any, **_options: Any) -> str:
        from matplotlib.figure import Figure

        axes = Figure().add_subplot()
        draw(axes)
        drawn.append(axes.get_legend_handles_labels()[1])
        return ""

    monkeypatch.setattr(curves, "plot", look)
    metrics = {"relay": [comparison.runs[0].metrics]}
    for guess in (87.5, 55.0):
        curves.curve_plot(metrics, "val", "top1", "", "", guess=guess)
    assert drawn == [["Relay BP"], ["Relay BP", "chance level"]]


def test_top_5_is_left_out_where_it_is_always_right(tmp_path: Path) -> None:
    comparison = open_runs([make_comparison(tmp_path, classes=5)])
    assert not any("top-5" in name for name in summary(comparison).header)
    assert "Validation error, top-5" not in render_page(comparison)


def test_averaged_weights_have_columns_of_their_own(tmp_path: Path) -> None:
    make_comparison(tmp_path)
    assert not any("averaged" in name for name in summary(open_runs([tmp_path])).header)
    for file in tmp_path.glob(f"*/{run_folder.METRICS}"):
        line = json.loads(file.read_text())
        file.write_text(json.dumps({**line, "ema_top1": line["top1"] - 1, "ema_top5": 2.0, "ema_loss": 1.0}) + "\n")
    comparison = open_runs([tmp_path])
    rows = rows_of(summary(comparison))
    assert rows["Relay BP"]["averaged weights, top-1 error, %"] == "48.00 ± 0.95"
    assert rows["chance level"]["averaged weights, top-1 error, %"] == "87.50"
    assert rows["standard BP"]["Relay BP minus this method, averaged weights, top-1"] == "-2.00 [-2.25, -1.75]"
    assert "Validation error, averaged weights, top-1" in render_page(comparison)


def test_each_method_has_its_rate_seconds_and_flops(tmp_path: Path) -> None:
    make_comparison(tmp_path, {"standard": TOP1["standard"]})
    make_comparison(tmp_path, {"relay": TOP1["relay"]}, changes=("optimizer.lr=0.04",))
    comparison = open_runs([tmp_path])
    rows = rows_of(summary(comparison))
    assert [rows[name]["learning rate"] for name in ("standard BP", "Relay BP")] == ["0.01", "0.04"]
    assert rows["Relay BP"]["training time"] == "21 s"
    ratios = cost_of(comparison.runs[0].recipe).ratios
    assert 1 < ratios["relay"] < 3
    assert rows["standard BP"]["FLOPs"] == "100 %"
    assert rows["Relay BP"]["FLOPs"] == f"{100 * ratios['relay']:.0f} %"


def test_values_of_the_command_line_have_it_as_their_source(tmp_path: Path) -> None:
    make_comparison(tmp_path, {"standard": {0: 50.0}}, changes=("optimizer.momentum=0.8",))
    changes = ("optimizer.momentum=0.8", "optimizer.lr=0.04", "plan.auxiliary.aux.weight=0.5")
    make_comparison(tmp_path, {"relay": {0: 50.0}}, changes=changes)
    rows = rows_of(recipe_table(open_runs([tmp_path])))
    assert rows["optimizer.momentum"] == {"name": "optimizer.momentum", "value": "0.8", "source": "the command line"}
    assert rows["optimizer.lr"]["value"] == "standard BP: 0.01; Relay BP: 0.04"
    assert rows["optimizer.lr"]["source"] == "standard BP: the paper, section 5.1; Relay BP: the command line"
    assert rows["plan.auxiliary.aux.weight"]["value"] == "standard BP: 0.3; Relay BP: 0.5"
    assert rows["optimizer.weight_decay"]["source"] == "the paper, section 5.1"


def test_failed_runs_are_results(tmp_path: Path) -> None:
    make_comparison(tmp_path)
    failed = tmp_path / "multi-loss-s1"
    failure = {"kind": "diverged", "step": 7, "error": "step 8: not finite: the loss primary"}
    (failed / "failure.json").write_text(json.dumps(failure))
    (failed / run_folder.METRICS).write_text("")
    early = tmp_path / "isolated-s0"  # it failed before its configuration was written
    early.mkdir()
    (early / "failure.json").write_text(json.dumps({"kind": "failed", "step": 0, "error": "out of memory"}))
    comparison = open_runs([tmp_path])
    rows = rows_of(summary(comparison))
    assert rows["multi-loss"]["runs"] == "2 of 3 seeds; 1 diverged"
    assert rows["multi-loss"]["Relay BP minus this method, top-1"].startswith("-0.45 [")
    assert (rows["isolated windows"]["runs"], rows["isolated windows"]["top-1 error, %"]) == (
        "0 of 1 seed; 1 failed",
        "",
    )
    table = failure_table(comparison)
    assert table is not None
    assert table.rows == (
        ("multi-loss, seed 1", "diverged", "7", "step 8: not finite: the loss primary"),
        ("isolated windows, seed 0", "failed", "0", "out of memory"),
    )
    page = render_page(comparison)
    assert "2 of 3 seeds; 1 diverged" in page.replace("\u00a0", " ")
    assert "Failed runs, excluded: 1 of multi-loss, 1 of isolated windows." in page
    (failed / run_folder.MODEL).write_text("it has been run again, to its end")
    with pytest.raises(InputError, match="has no metrics"):
        open_runs([tmp_path])


def test_runs_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", "relay", 0, 50.0)
    windows = ("plan.auxiliary.aux.weight=1",)
    other = make_run(tmp_path / "b", "relay", 1, 51.0, changes=windows)
    with pytest.raises(InputError, match=r"different recipes \(plan.auxiliary.aux.weight\)"):
        open_runs([one, other])
    failed = make_run(tmp_path / "c", "relay", 2, 51.0, changes=("optimizer.momentum=0.5",))
    (failed / run_folder.MODEL).unlink(missing_ok=True)
    (failed / "failure.json").write_text(json.dumps({"kind": "failed", "step": 1, "error": "it burst"}))
    with pytest.raises(InputError, match=r"which failed, and .* have different recipes \(optimizer.momentum\)"):
        open_runs([one, failed])
    same = make_run(tmp_path / "d", "relay", 0, 51.0)
    (same / run_folder.MODEL).unlink(missing_ok=True)
    (same / "failure.json").write_text(json.dumps({"kind": "failed", "step": 1, "error": "it burst"}))
    with pytest.raises(InputError, match="more than one run has this scheme and seed"):
        open_runs([one, same])


def test_a_comparison_of_failures_alone_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, "relay", 0, 50.0)
    (run / "failure.json").write_text(json.dumps({"kind": "failed", "step": 3, "error": "it burst"}))
    with pytest.raises(InputError, match=r"all runs have failed.*Relay BP, seed 0: failed after step 3: it burst"):
        open_runs([tmp_path])
    (run / "failure.json").write_text("{")
    with pytest.raises(InputError, match=r"failure\.json is damaged: remove it"):
        open_runs([tmp_path])


def test_the_papers_rows_are_beside_ours_only_on_the_papers_task(tmp_path: Path) -> None:
    small = open_runs([make_comparison(tmp_path / "small")])
    assert not any("the paper" in name for name in rows_of(summary(small)))
    table = papers_table(small)
    assert table is not None
    assert rows_of(table)["Relay BP (the paper)"]["top-1 error, %"] == "49.75 (+1.16)"
    page = render_page(small)
    assert "compare the signs of the differences, not their values." in page
    assert page.index("<details>") < page.index("49.75 (+1.16)")
    full = open_runs([make_comparison(tmp_path / "full", scale="paper", classes=401)])
    rows = rows_of(summary(full))
    assert rows["Relay BP (the paper)"]["top-5 error, %"] == "17.83 (+1.17)"
    assert papers_table(full) is None
    other = make_comparison(tmp_path / "other", scale="paper", classes=100, changes=("network.num_classes=100",))
    assert not any("the paper" in name for name in rows_of(summary(open_runs([other]))))


def test_the_balance_of_classes_is_shown(tmp_path: Path) -> None:
    counts = np.array([1, 4, 16, 64])
    assert draws_per_epoch(counts, "shuffled").tolist() == [1, 4, 16, 64]
    assert draws_per_epoch(counts, "class-aware").tolist() == [21.25] * 4
    assert draws_per_epoch(counts, "square-root") == pytest.approx(85 * np.array([1, 2, 4, 8]) / 15)
    page = render_page(open_runs([make_comparison(tmp_path)]))
    assert "draws per class in an epoch" in page
    assert "360 training and 40 validation images (one validation image" in page
    assert "Training images of the class" not in page, "images stay out unless they are asked for"


def test_training_images_are_shown_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    for split in ("train", "val"):
        for label in range(8):
            (data / split / f"{label:03d}_a_b{label}").mkdir(parents=True)
            Image.new("RGB", (40, 30), (20 * label, 0, 0)).save(data / split / f"{label:03d}_a_b{label}" / "0.png")
    run = make_run(tmp_path / "runs", "relay", 0, 50.0)
    config = json.loads((run / run_folder.CONFIG).read_text())
    config["options"]["data"] = [str(data)]
    (run / run_folder.CONFIG).write_text(json.dumps(config))
    page = tmp_path / "page.html"
    assert main(["report", str(run), "--out", str(page)]) == 0
    assert "Training images of the class" not in page.read_text()
    assert main(["report", str(run), "--images", "--out", str(page)]) == 0
    assert page.read_text().count("Training images of the class") == 8
    config["options"]["data"] = [str(tmp_path / "gone")]
    (run / run_folder.CONFIG).write_text(json.dumps(config))
    assert main(["report", str(run), "--images", "--out", str(page)]) == 0
    assert "No sample images:" in page.read_text()
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="no Chromium: the page is not opened in a browser")
def test_wide_intervals_and_long_reasons_fit_every_screen(tmp_path: Path) -> None:
    schemes = ("standard", "multi_loss", "relay", "isolated")
    make_comparison(tmp_path, {s: {0: 50 + 100.0 * n, 1: 70 + 200.0 * n} for n, s in enumerate(schemes)})
    failure = {"kind": "diverged", "step": 7, "error": "a_long_word_of_an_error" * 9}
    for seed in (2, 3):
        run = make_run(tmp_path, "standard", seed, 50.0)
        (run / "failure.json").write_text(json.dumps(failure))
    page = tmp_path / "page.html"
    page.write_text(render_page(open_runs([tmp_path])))
    assert "+300.00 [-970.62, +1570.62]" in page.read_text().replace("\u00a0", " ")
    check(page, tmp_path)


def test_layers_have_readable_names() -> None:
    assert layer_name("segment4.conv2") == "segment 4, conv 2"
    assert layer_name("classifier.fc1.weight") == "classifier, fc 1"
    assert layer_name("layer3.0.conv1") == "layer3.0, conv1"
    assert layer_name("heads.aux.fc2") == "head aux, fc2"
    assert layer_name("fc") == "fc"
