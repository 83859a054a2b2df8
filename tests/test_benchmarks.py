"""The benchmarks measure what they claim. No test depends on wall-clock time."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import engine, measure, networks, sampler
from benchmarks import input as input_benchmark

KEYS = {
    "resnet50_flops_relay_over_standard",
    "vgg22_time_relay_over_multi_loss",
    "vgg22_flops_relay_over_multi_loss",
    "vgg22_time_two_backward_over_relay",
    "vgg22_time_overlap_twice_over_relay",
    "junction_overhead",
    "import_ms",
    "resnet50_flops_lower_bound",
    "resnet50_time_relay_over_multi_loss",
    "resnet50_flops_relay_over_multi_loss",
}
TINY = engine.Settings(
    width=2,
    vgg22_pixels=32,
    vgg22_batch=2,
    resnet50_pixels=64,
    resnet50_batch=1,
    rounds=2,
    vgg22_budget_s=0,
    resnet50_budget_s=0,
    imports=1,
    import_budget_s=0,
)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_of_a_convolution(device):
    conv = nn.Conv2d(3, 5, 3, padding=1, device=device)
    image = torch.zeros(2, 3, 8, 8, device=device, requires_grad=True)
    one_pass = 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)  # multiply and add; output elements; inputs of each
    assert measure.count_flops(lambda: conv(image)) == one_pass
    assert measure.count_flops(lambda: conv(image).sum().backward()) == 3 * one_pass
    assert measure.count_flops(lambda: conv(image.detach()).sum().backward()) == 2 * one_pass


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_of_a_linear_layer(device):
    linear = nn.Linear(7, 11, device=device)
    features = torch.zeros(4, 7, device=device, requires_grad=True)
    one_pass = 2 * (4 * 11) * 7
    assert measure.count_flops(lambda: linear(features)) == one_pass
    assert measure.count_flops(lambda: linear(features).sum().backward()) == 3 * one_pass
    # FlopCounterMode fails under autograd.grad, which the engine's lanes use.
    output = linear(features)
    assert measure.count_flops(lambda: torch.autograd.grad(output.sum(), features)) == one_pass


def test_flops_on_the_meta_device_equal_a_real_step():
    names = list(engine.contenders(engine.vgg22(2, 32, 2)))
    assert engine.flops(engine.vgg22(2, 32, 2, device="meta"), names) == engine.flops(engine.vgg22(2, 32, 2), names)


def test_flops_of_vgg22_by_hand():
    filters = [3, *[2] * 2, *[4] * 2, *[8] * 5, *[16] * 5, *[16] * 5]
    pixels = [32**2] * 2 + [16**2] * 2 + [8**2] * 5 + [4**2] * 5 + [2**2] * 5
    convolutions = [18 * a * b * area for a, b, area in zip(filters, filters[1:], pixels, strict=False)]
    forward = sum(convolutions) + 2 * (16 * 128 + 128 * 128 + 128 * 100)
    counts = engine.flops(engine.vgg22(2, 32, 1, device="meta"), ["standard", "multi_loss", "relay"])
    assert len(convolutions) == 19
    assert counts["standard"] == 3 * forward - convolutions[0]  # the images' gradient is not needed
    assert counts["relay"] - counts["multi_loss"] == sum(convolutions[9:14])  # one more input-gradient pass
    assert counts["lower_bound"] - counts["multi_loss"] == sum(convolutions[10:14])


def test_resnet50_flop_ratios():
    pytest.importorskip("torchvision")
    names = ["standard", "multi_loss", "relay", "two_backward", "overlap_twice"]
    counts = engine.flops(engine.resnet50(224, 1, device="meta"), names)
    over_standard = {name: count / counts["standard"] for name, count in counts.items()}
    assert over_standard["relay"] <= engine.RESNET50_FLOPS_LIMIT
    expected = {"lower_bound": 1.069, "relay": 1.086, "two_backward": 1.154, "overlap_twice": 1.238}
    assert {name: round(over_standard[name], 3) for name in expected} == expected


def test_vgg22_matches_the_paper():
    with torch.device("meta"):
        model = networks.VGG22(64, 224, 1000)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 19
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 3
    assert [sum(isinstance(m, nn.Conv2d) for m in segment) for segment in list(model.children())[:5]] == [2, 2, 5, 5, 5]
    assert [conv.out_channels for conv in convolutions] == [64] * 2 + [128] * 2 + [256] * 5 + [512] * 10


def test_contender_gradients_on_vgg22():
    engine.check_gradients(engine.vgg22(2, 32, 2))


def test_contender_gradients_on_resnet50():
    pytest.importorskip("torchvision")
    workload = engine.resnet50(64, 1)
    before = {name: value.clone() for name, value in workload.model.state_dict().items()}
    engine.check_gradients(workload)
    after = workload.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in workload.parameters)


@pytest.mark.parametrize(
    ("broken", "by", "message"),
    [
        ("relay", "multi_loss", r"gradients of model\.segment1.* by relay and by two_backward"),
        ("relay_multi_loss", "relay", "by relay_multi_loss and by multi_loss"),
        ("overlap_twice", "standard", "by overlap_twice and by two_backward"),
        ("two_backward", "standard", "by relay and by two_backward"),
    ],
)
def test_wrong_contender_raises(broken, by, message):
    def cheating(workload):
        steps = engine.contenders(workload)
        return steps | {broken: steps[by]}

    with pytest.raises(engine.WrongGradientsError, match=message):
        engine.check_gradients(engine.vgg22(2, 32, 2), cheating)


def test_plan_without_effect_raises():
    def cheating(workload):
        steps = engine.contenders(workload)
        return dict.fromkeys(steps, steps["multi_loss"])

    with pytest.raises(engine.WrongGradientsError, match="The plan has no effect"):
        engine.check_gradients(engine.vgg22(2, 32, 2), cheating)


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


def test_interleave_times_each_contender_once_a_round():
    clock, calls = FakeClock(), []
    seconds = itertools.count(1)

    def contender(name):
        def step():
            calls.append(name)
            clock.work(next(seconds))

        return step

    names = "abc"
    times = measure.interleave({n: contender(n) for n in names}, rounds=4, warmup=1, seed=3, clock=clock)
    rounds = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    assert len(rounds) == 5
    assert all(sorted(once) == list(names) for once in rounds)
    assert len({tuple(once) for once in rounds}) > 1
    # The n-th call took n seconds; the first three were the warm-up.
    assert times == {n: [float(3 * r + rounds[r].index(n) + 1) for r in range(1, 5)] for n in names}


def test_interleave_does_not_time_the_setup():
    clock = FakeClock()
    times = measure.interleave(
        {"a": lambda: clock.work(2)}, rounds=3, warmup=0, clock=clock, before=lambda: clock.work(100)
    )
    assert times == {"a": [2.0] * 3}


@pytest.mark.parametrize(("budget_s", "expected"), [(0, 3), (25, 3), (45, 4), (1000, 10)])
def test_interleave_stops_at_its_budget_after_the_minimum_rounds(budget_s, expected):
    clock = FakeClock()
    times = measure.interleave(
        {"a": lambda: clock.work(4), "b": lambda: clock.work(6)}, rounds=10, budget_s=budget_s, warmup=1, clock=clock
    )
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": expected, "b": expected}


def test_interleave_restores_the_garbage_collector():
    import gc

    def fail():
        assert not gc.isenabled()
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        measure.interleave({"a": fail}, rounds=1)
    assert gc.isenabled()


def test_ratio_is_computed_per_round():
    # The machine slows down tenfold on the way; the ratios do not.
    measured = measure.ratio([1.0, 2.4, 30.0, 48.0, 13.0], [1.0, 2.0, 20.0, 40.0, 10.0])
    assert measured.median == pytest.approx(1.2)
    assert (measured.low, measured.high, measured.rounds) == (pytest.approx(1.2), pytest.approx(1.3), 5)
    assert measured.iqr == pytest.approx(0.1)
    assert 0 < measured.error < measured.iqr


def test_targets():
    assert measure.Target("<=", 1.0).is_met(1.0)
    assert not measure.Target("<", 1.0).is_met(1.0)
    assert measure.Target("<", 1.0).is_met(0.9)
    assert not measure.Target(">", 1.0).is_met(1.0)
    assert measure.Target(">", 1.0).is_met(1.1)
    text = measure.table({"a": 2.0, "a_error": 0.6}, {"a": measure.Target("<", 1.0)})
    assert text.endswith("MISSED?")
    text = measure.table({"a": 2.0, "a_error": 0.4, "a_iqr": 0.1, "b": 3.0}, {"a": measure.Target("<", 1.0, "why")})
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["a", "2.0000", "+-", "0.4000", "<", "1", "(why)", "MISSED"],
        ["b", "3"],
    ]


@pytest.mark.slow
def test_main_writes_all_metrics(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchvision")
    checked = []
    monkeypatch.setattr(engine, "QUICK", TINY)
    monkeypatch.setattr(engine, "check_gradients", checked.append)  # slow, and tested above
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    file = tmp_path / "engine.json"
    engine.main(["--quick", "--json", str(file)])
    assert [type(workload.model).__name__ for workload in checked] == ["VGG22", "ResNet"]
    result = json.loads(file.read_text())
    assert set(result) == {"figures", "environment"}
    assert set(result["figures"]) >= KEYS
    assert all(isinstance(figure, (int, float)) for figure in result["figures"].values())
    assert set(result["environment"]) >= {"torch", "python", "cpu", "cores", "threads", "commit", "date", "seed"}
    assert str(Path(__file__).parents[1]) not in file.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["engine.json"]
    printed = capsys.readouterr().out
    assert all(key in printed for key in KEYS)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_result_file_is_written_atomically(tmp_path):
    file = tmp_path / "result.json"
    measure.write_result(file, {"a": 1.0}, {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        measure.write_result(file, {"a": float("nan")}, {})
    with pytest.raises(TypeError):
        measure.write_result(file, {"a": 1.0}, {"b": object()})
    assert json.loads(file.read_text()) == {"figures": {"a": 1.0}, "environment": {}}
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "{folder}/missing/result.json"], "missing does not exist; create it first"),
        (["--json", "{folder}"], "is a folder: pass the path of a file"),
        (["--json"], "expected one argument"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_invalid_arguments_exit_before_measuring(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "measure", lambda settings: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stopped:
        engine.main([argument.format(folder=tmp_path) for argument in arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# The benchmark of the sampler.


def test_sampler_benchmark_in_miniature(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampler, "IMAGES", 40_100)
    monkeypatch.setattr(sampler, "in_fresh_process", sampler.measure_build)
    file = tmp_path / "sampler.json"
    sampler.main(["--quick", "--json", str(file)])
    metrics = json.loads(file.read_text())["figures"]
    keys = {"draws_per_s", "index_build_s", "private_mb", "distinct_classes_per_batch", "resume_ms"}
    assert keys <= metrics.keys()
    assert 237.5 < metrics["distinct_classes_per_batch"] < 239.7
    assert metrics["distinct_classes_per_batch_contiguous"] < 205
    assert "distinct_classes_per_batch" in capsys.readouterr().out


def test_sampler_benchmark_labels():
    labels = sampler.make_labels()
    assert len(labels) == sampler.IMAGES
    counts = np.bincount(labels)
    assert len(counts) == sampler.CLASSES
    assert 6 < counts.max() / counts.min() < 9  # the paper's 4,000 to 30,000


def test_epoch_index_is_class_aware_and_split_over_ranks(monkeypatch):
    monkeypatch.setattr(sampler, "IMAGES", 8_020)
    labels = sampler.make_labels()
    slices = [sampler.EpochIndex(labels, rank, seed=3).indices for rank in range(sampler.RANKS)]
    stream = [labels[image] for part in slices for image in part]
    assert sorted(stream[:401]) == list(range(401))
    assert sorted(stream[401:802]) == list(range(401))


# The benchmark of the input pipeline.


@pytest.mark.slow
def test_input_benchmark_in_miniature(tmp_path, monkeypatch):
    tiny = input_benchmark.Settings(files=20, images=64, batch=16, rounds=2, large=20_000)
    monkeypatch.setattr(input_benchmark, "QUICK", tiny)
    monkeypatch.setattr(input_benchmark, "SMALL", 500)
    file = tmp_path / "input.json"
    input_benchmark.main(["--quick", "--json", str(file)])
    metrics = json.loads(file.read_text())["figures"]
    keys = {"images_per_core_over_torchvision", "images_per_core_over_libjpeg", "slowdown_10k_to_8m"}
    assert keys <= metrics.keys()
    assert metrics["least_psnr_db"] >= 55


def test_wrong_crops_raise(tmp_path, monkeypatch):
    names = input_benchmark.write_photographs(tmp_path, 4)
    source = input_benchmark.write_index_of(tmp_path, names, 500, tmp_path / "index.safetensors")
    input_benchmark.check_pixels(source)
    monkeypatch.setattr(input_benchmark, "plain_training_crop", lambda *_, **__: np.zeros((224, 224, 3)))
    with pytest.raises(input_benchmark.WrongPixelsError, match="it must be at least"):
        input_benchmark.check_pixels(source)
