"""The trainer's benchmark in miniature: every figure is there, and loops that train differently are found out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from benchmarks import train as benchmark
from relaylab.recipes import find_recipe
from relaylab.recipes.scales import at_scale


@pytest.fixture
def tiny() -> benchmark.Settings:
    recipe = at_scale(find_recipe("table3-model-a-relay"), "tiny")
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, iterations=1000))
    crop_spec = benchmark.CropSpec(size=32, short_side=36)
    small = {"images": 20, "steps": 2, "rounds": 3, "loop_budget_s": 1, "looks_budget_s": 1, "saves": 2}
    return benchmark.Settings(recipe=recipe, crop_spec=crop_spec, check_steps=2, **small)


def test_the_benchmark_in_miniature(
    tiny: benchmark.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "settings_of", lambda quick: tiny)
    monkeypatch.setattr(benchmark, "keep_memory", lambda: False)  # it would stay so for all other tests
    benchmark.main(["--quick", "--json", str(tmp_path / "result.json")])
    figures = json.loads((tmp_path / "result.json").read_text())["figures"]
    assert benchmark.TARGETS.keys() <= figures.keys()
    assert figures["save_mb"] > 0.1
    assert figures["diagnostics_overhead"] == pytest.approx(figures["look_in_steps"] / 500)
    assert "loop_over_bare" in capsys.readouterr().out


def test_loops_that_train_differently_are_found_out(tiny: benchmark.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark.Bare, "step", lambda self: None)
    with pytest.raises(benchmark.DifferentTrainingError, match="differs between the loops after 2 steps"):
        with benchmark.loops(tiny):
            pass


def test_two_loops_that_do_nothing_are_not_alike(tiny: benchmark.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for loop in (benchmark.Ours, benchmark.Bare):
        monkeypatch.setattr(loop, "step", lambda self: None)
    with pytest.raises(benchmark.DifferentTrainingError, match="has not moved in 2 steps"):
        with benchmark.loops(tiny):
            pass
