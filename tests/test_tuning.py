"""Tuning: extension of grids, choices, and `relaylab compare --tune`."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from relaylab import cli
from relaylab.errors import InputError
from relaylab.recipes import find_recipe
from relaylab.recipes.changes import with_changes
from relaylab.report.comparison import open_runs
from relaylab.report.summary import summary
from relaylab.report.tuned import tuning_table
from relaylab.train import jobs, requests, run_folder
from relaylab.train.failures import Failure
from relaylab.train.metrics import MEASURES
from relaylab.train.options import TrainOptions
from relaylab.train.trials import Search
from relaylab.train.tuning import (
    FILE,
    FOLDER,
    MOST_ADDED,
    Axis,
    Choice,
    Point,
    Trial,
    Tuning,
    axes_of,
    choice_of,
    name_of,
    next_points,
    of_scheme,
    read_tuning,
)

DIGITS = find_recipe("digits")
SHORT = ("network.width=2", "network.convs=1", "optimizer.batch_size=8", "optimizer.iterations=8")
SHORT = (*SHORT, "optimizer.evaluate_every=4")


def axes(*texts: str) -> tuple[Axis, ...]:
    found, problems = axes_of(texts, DIGITS)
    assert not problems
    return found


def search(grid: tuple[Axis, ...], error: Callable[..., float | None]) -> tuple[Choice, int]:
    """Train all trials, and return the choice and the number of trials."""
    trials: list[Trial] = []
    while points := next_points(grid, trials, lambda _: True):
        assert len(trials) < 100
        for point in points:
            found = error(*map(float, point))
            trials.append(Trial(point, found, found))
    return choice_of(grid, trials), len(trials)


def test_the_grid_grows_until_the_best_value_is_enclosed() -> None:
    rates = axes("optimizer.lr=0.003,0.01,0.03")
    inside, count = search(rates, lambda lr: abs(math.log(lr / 0.01)))
    assert (inside.point, inside.enclosed, count) == (("0.01",), True, 3)
    above, count = search(rates, lambda lr: abs(math.log(lr / 0.1)))
    assert (above.point, above.enclosed, count) == (("0.09",), True, 5)
    assert [trial.point[0] for trial in above.trials] == ["0.003", "0.01", "0.03", "0.09", "0.27"]
    below, _ = search(rates, lambda lr: lr)
    assert (below.enclosed, len(below.trials)) == (False, 3 + MOST_ADDED), "it gives up, and says so"
    diverging, _ = search(rates, lambda lr: None if lr > 0.03 else -lr)
    assert (diverging.point, diverging.enclosed) == (("0.03",), True), "a diverged neighbour encloses"


def test_all_diverged_looks_below() -> None:
    found, count = search(axes("optimizer.lr=1,2"), lambda lr: None if lr > 0.3 else abs(lr - 0.25))
    assert (found.point, found.enclosed) == (("0.25",), True)
    assert count == 5


def test_two_values_are_enclosed_along_both_axes() -> None:
    grid = axes("optimizer.lr=0.01,0.02,0.04", "plan.auxiliary.*.weight=0.3,1")
    assert grid[1].names == ("plan.auxiliary.aux.weight",)
    best, count = search(grid, lambda lr, weight: abs(math.log(lr / 0.02)) + abs(math.log(weight / 3.3)))
    assert (best.point, best.enclosed) == (("0.02", "3.3"), True)
    assert count == 6 + 1 + 3, "the grid, 3.3, then 11 and both rates beside it"
    assert of_scheme(grid, "standard") == grid[:1], "standard BP has no auxiliary losses"
    assert name_of(grid, best.point) == "lr=0.02,weight=3.3"
    assert best.changes == ["optimizer.lr=0.02", "plan.auxiliary.aux.weight=3.3"]


def test_ties_are_broken_by_the_loss_and_then_by_order() -> None:
    grid = axes("optimizer.lr=1,2,4")
    trials = [Trial(("4",), 5.0, 1.0), Trial(("2",), 5.0, 0.5), Trial(("1",), 5.0, 0.5)]
    assert choice_of(grid, trials).point == ("1",)


def test_a_choice_among_trials_at_chance_level_says_so() -> None:
    grid = axes("optimizer.lr=1,2,4")
    points = [("1",), ("2",), ("4",)]
    for errors_of, text in [
        ((75.0, 75.0, 75.0), "all trials at chance level; chosen by loss"),
        ((75.0, 74.5, 75.0), "all trials at chance level; chosen by error"),
        ((75.0, 75.0, None), "all trials that did not diverge are at chance level; chosen by loss"),
        ((75.0, 60.0, 75.0), ""),
        ((None, None, None), ""),
    ]:
        trials = [Trial(axis, error, error and 1.4) for axis, error in zip(points, errors_of, strict=True)]
        choice = choice_of(grid, trials)
        assert choice.chance_text(75.0) == text
        tuning = Tuning(1000, 0.2, 1, {"relay": choice})
        table = tuning_table(tuning, 75.0, MEASURES[0])
        assert table.notes[1:] == ((f"Relay BP: {text}.",) if text else ())
    lost = choice_of(grid, [Trial((lr,), 75.0, 1.4) for lr in "124"])
    outcomes = [row[-1] for row in tuning_table(Tuning(1000, 0.2, 1, {"relay": lost}), 75.0, MEASURES[0]).rows]
    assert outcomes == ["at chance level; chosen, at the edge of the tried values", *["at chance level"] * 2]


def test_tuning_says_on_stderr_that_nothing_was_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ("--tune", "optimizer.lr=1e-7,2e-7", "--set", *SHORT)
    assert cli.main(words_of(tmp_path, *tiny, schemes="standard", seeds="0")) == 0
    assert re.search("standard BP: all trials at chance level; chosen by (loss|error); ", capsys.readouterr().err)


def test_choices_without_an_order_and_single_values_do_not_grow() -> None:
    grid = axes("augmentation.flip=true,false", "optimizer.lr=0.01")
    best, count = search_texts(grid, {("true", "0.01"): 2.0, ("false", "0.01"): 1.0})
    assert (best.point, best.enclosed, count) == (("false", "0.01"), True, 2)
    whole = axes("optimizer.batch_size=16,32")
    assert next_points(whole, [Trial(("16",), 2.0), Trial(("32",), 1.0)], lambda _: True) == [("64",)]
    zero = axes("optimizer.weight_decay=0,0.0002")
    assert next_points(zero, [Trial(("0",), 1.0), Trial(("0.0002",), 2.0)], lambda _: True) == []


def search_texts(grid: tuple[Axis, ...], errors: dict[Point, float]) -> tuple[Choice, int]:
    trials: list[Trial] = []
    while points := next_points(grid, trials, lambda _: True):
        trials += [Trial(point, errors[point], errors[point]) for point in points]
    return choice_of(grid, trials), len(trials)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.lr", "expected KEY=VALUE,VALUE"),
        ("optimizer.lr=1,1", "different values"),
        ("optimizer.rate=1,2", "no value optimizer.rate; nearest: optimizer"),
        ("optimizer.lr=1,fast", "expected a number"),
        ("optimizer.lr=0,1", "optimizer.lr is 0.0: expected a finite number, above 0"),
        ("plan.*.wait=1,2", "unknown value of the recipe; nearest: "),
        ("images.held_out=1,2", "schemes, images, classes and iterations cannot be tuned"),
        ("image*.short_side=40,50", "schemes, images, classes and iterations cannot be tuned"),
        ("optimizer.iterations=8,16", "schemes, images, classes and iterations cannot be tuned"),
        ("optimizer.lr=0.001,1e-3,0.01", "0.001 and 1e-3 are the same value"),
        ("scheme=relay,standard", "use --schemes to choose schemes"),
    ],
)
def test_wrong_grids_are_errors(text: str, message: str) -> None:
    found, problems = axes_of([text], DIGITS)
    assert not found
    assert message in "; ".join(problems)


def test_the_axes_of_a_scheme_follow_from_their_names() -> None:
    (weights,) = axes("*.weight=0.3,1")
    assert weights.names == ("plan.auxiliary.aux.weight",)
    assert of_scheme((weights,), "standard") == ()


def test_a_wildcard_matches_values_that_the_recipe_does_not_set() -> None:
    assert DIGITS.network.gain is None
    (gains,) = axes("*.gain=he,quiet")
    assert gains.names == ("network.gain", "plan.auxiliary.aux.gain")
    assert of_scheme((gains,), "standard") == (gains,), "standard BP depends on the gain of the output layer"


def test_names_of_folders_hold_no_slashes() -> None:
    (files,) = axes("network.pretrained=/some where/a.pth,/some where/../b.pth")
    assert files.values == ("/some where/a.pth", "/b.pth")
    assert name_of((files,), (files.values[0],)) == "pretrained=%2Fsome where%2Fa.pth"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], {"iterations": 100, "warmup": 10, "evaluate_every": 50}),
        (
            ["optimizer.schedule.kind=decay", "optimizer.schedule.factor=0.5", "optimizer.schedule.every=40"],
            {"every": 10},
        ),
        (["optimizer.schedule.kind=plateau", "optimizer.schedule.patience=3"], {"evaluate_every": 12, "patience": 3}),
        (["optimizer.schedule.kind=steps"], {"at": (0.7, 0.9)}),
    ],
)
def test_short_trials_have_a_short_schedule(tmp_path: Path, changes: list[str], expected: dict[str, object]) -> None:
    changes = ["optimizer.iterations=400", "optimizer.evaluate_every=50", *changes]
    recipe, problems = with_changes(DIGITS, changes)
    assert not problems
    grid = axes("optimizer.warmup=20,40")
    search = Search(tmp_path, recipe, TrainOptions(recipe="digits", changes=tuple(changes)), grid, 0.2, 0.25)
    trained = requests.resolve(search.trial_options("relay", ("40",))).recipe
    values = {name.rpartition(".")[2]: value for name, value, _ in trained.fields() if name.startswith("optimizer.")}
    assert {**values, **expected} == values
    assert values["warmup"] == 10


def test_trials_of_other_options_do_not_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = words_of(tmp_path, "--tune", "augmentation.flip=true,false", schemes="standard", seeds="0")
    assert cli.main([*words, "--set", *SHORT]) == 0
    for path in tmp_path.glob("standard-s*"):
        shutil.rmtree(path)
    before = (tmp_path / FILE).read_bytes()
    for more in (
        ["--tune-share", "0.5", "--set", *SHORT],
        ["--tune-hold-out", "5", "--set", *SHORT],
        ["--set", *SHORT, "optimizer.momentum=0.5"],
    ):
        capsys.readouterr()
        assert cli.main([*words, *more]) == 2
        assert "choose a different --out, or remove that folder" in capsys.readouterr().err
        assert (tmp_path / FILE).read_bytes() == before
        assert not list(tmp_path.glob("standard-s*"))


def test_the_report_names_only_values_that_were_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune = ("--tune", "optimizer.lr=0.03", "plan.auxiliary.*.weight=0.5")
    assert cli.main(words_of(tmp_path, *tune, "--set", *SHORT, seeds="0")) == 0
    assert cli.main(words_of(tmp_path, "--set", *SHORT, schemes="multi-loss", seeds="0")) == 0
    table = summary(open_runs([tmp_path]))
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert [rows[name]["weight"] for name in ("standard BP", "multi-loss", "Relay BP")] == ["", "", "0.5"]
    assert all(rows[name]["training time"].endswith(" s") for name in ("standard BP", "multi-loss", "Relay BP"))
    assert "Not tuned: multi-loss" in " ".join(table.notes)
    capsys.readouterr()
    assert cli.main(words_of(tmp_path, "--set", *SHORT, schemes="relay", seeds="1")) == 0, "without --tune"
    assert "weight" not in capsys.readouterr().out
    assert open_runs([tmp_path / "relay-s1"]).tuning is None
    # Choices of schemes outside a later command are kept.
    assert cli.main(words_of(tmp_path, *tune, "--set", *SHORT, schemes="relay", seeds="0")) == 0
    tuning = read_tuning(tmp_path)
    assert tuning is not None
    assert tuning.choices.keys() == {"standard", "relay"}


def words_of(out: Path, *more: str, schemes: str = "standard,relay", seeds: str = "0,1") -> list[str]:
    return ["compare", "digits", "--out", str(out), "--schemes", schemes, "--seeds", seeds, *more]


def stopping_after(count: int) -> Callable[..., bool]:
    """Return a `train_all` that stops after a number of runs."""
    own, left = jobs.train_all, [count]

    def train_all(configs: dict[str, object], **options: object) -> bool:
        some = dict(list(configs.items())[: left[0]])
        left[0] -= len(some)
        finished = own(some, **options) if some else True  # pyright: ignore
        return finished and len(some) == len(configs)

    return train_all


def test_each_scheme_is_compared_at_its_own_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = ("--tune", "optimizer.lr=0.01,0.08", "plan.auxiliary.*.weight=0.3,1", "--tune-share", "0.5", "--set", *SHORT)
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    assert cli.main(words_of(whole, "--jobs", "2", *grid)) == 0
    out, err = capsys.readouterr()
    tuning = read_tuning(whole)
    assert tuning is not None
    assert re.search("best so far is .*; next: ", err), "an extension is logged"
    for scheme, choice in tuning.choices.items():
        run = whole / f"{scheme}-s1"
        values = run_folder.read_run(run).recipe.values
        assert {key: f"{values[key.replace('*', 'aux')]:g}" for key in choice.values} == choice.values
        assert values["optimizer.iterations"] == 8
        assert "images.set_aside" not in values
        trial = next((whole / FOLDER / scheme).glob(f"*/{run_folder.CONFIG}"))
        stored = json.loads(trial.read_text())
        assert stored["recipe"]["values"]["images.set_aside"] == 0.2
        assert stored["recipe"]["values"]["optimizer.iterations"] == 4
        assert sum(stored["counts"]["train"]) + sum(stored["counts"]["val"]) == sum(
            run_folder.read_run(run).counts["train"]
        )
    results = json.loads((whole / "comparison.json").read_text())
    assert results["tuning"]["choices"].keys() == {"standard", "relay"}
    assert results["differences"][0]["ours"] == "relay"
    assert results["verdict"][0] in out
    page = tmp_path / "page.html"
    assert cli.main(["report", str(whole), "--out", str(page)]) == 0
    assert '<h2 id="tuning">Tuning</h2>' in page.read_text()
    assert "tuned on held-out images (--tune)" in page.read_text()
    subprocess.run([sys.executable, str(whole / "relay.py")], check=True)

    # Stopped during tuning and resumed with one job: bitwise the same results.
    for count in (2, 5):
        with monkeypatch.context() as patch:
            patch.setattr(jobs, "train_all", stopping_after(count))
            assert cli.main(words_of(halted, *grid)) == 130
            assert "Stopped while tuning. Run the same command again to resume." in capsys.readouterr().out
    assert cli.main(words_of(halted, "--jobs", "1", *grid)) == 0
    assert (halted / FILE).read_bytes() == (whole / FILE).read_bytes()
    models = sorted(path.relative_to(whole) for path in whole.rglob(run_folder.MODEL))
    assert models == sorted(path.relative_to(halted) for path in halted.rglob(run_folder.MODEL))
    assert len(models) > 10
    for model in models:
        assert (halted / model).read_bytes() == (whole / model).read_bytes(), model


def test_a_grid_of_one_value_needs_no_trials(tmp_path: Path) -> None:
    assert cli.main(words_of(tmp_path, "--tune", "optimizer.lr=0.03", "--set", *SHORT)) == 0
    assert not (tmp_path / FOLDER).exists()
    assert run_folder.read_run(tmp_path / "relay-s0").recipe.values["optimizer.lr"] == 0.03


def test_what_cannot_be_tuned_is_an_error_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, message in [
        (["--tune", "optimizer.lr=0.1,0.2", "--set", "optimizer.lr=1"], "--tune optimizer.lr and --set optimizer.lr"),
        (["--tune", "optimizer.lr=0.1,0.2", "--tune-share", "2"], "--tune-share 2: expected a fraction"),
        (["--tune", "optimizer.lr=0.1,0.2", "--tune-hold-out", "0"], "--tune-hold-out is 0: expected"),
        (["--tune", "optimizer.lr=0.1,0.2", "--tune-hold-out", "2.5"], "--tune-hold-out is 2.5: expected"),
        (["--tune", "optimizer.lr=0.1,0.2", "--tune-hold-out", "inf"], "--tune-hold-out is inf: expected"),
        (["--tune", "optimizer.lr=a,0.2"], "optimizer.lr=a: expected a number"),
        (["--tune", "optimizer.lr=0.1,0.2", "--set", "images.set_aside=0.1"], "--tune sets images.set_aside itself"),
    ]:
        assert cli.main(words_of(tmp_path / "out", *more)) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_trial_that_fails_is_named_and_can_be_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from relaylab.train.failures import write_failure

    def train_all(configs: dict[str, TrainOptions], **_: object) -> bool:
        for config in configs.values():
            assert config.out is not None
            config.out.mkdir(parents=True)
            write_failure(config.out, Failure("failed", 3, "its process was killed by SIGKILL"))
        return True

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "train_all", train_all)
        assert cli.main(words_of(tmp_path, "--tune", "optimizer.lr=0.01,0.02", "--set", *SHORT)) == 1
    error = capsys.readouterr().err
    assert "tuning, standard BP lr=0.01: failed after step 3: its process was killed by SIGKILL" in error
    assert cli.main(words_of(tmp_path, "--tune", "optimizer.lr=0.01,0.02", "--set", *SHORT)) == 0


def test_a_damaged_record_is_an_error_of_its_file(tmp_path: Path) -> None:
    assert read_tuning(tmp_path) is None
    for text in ("{", "[]", '{"seed": 1}'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(InputError, match=FILE):
            read_tuning(tmp_path)
