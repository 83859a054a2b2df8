"""Unit tests of the trainer: schedules, recipe overrides, segments, gradient magnitudes and cosines."""

import json
import math
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from relaybackprop import Plan, Relay, RelayLoss, Window
from relaylab.data import statistics
from relaylab.data.augment import Augmentation
from relaylab.data.datasets import InMemoryDataset, OnDiskDataset
from relaylab.data.geometry import CropSpec
from relaylab.data.memory import DecodedImages
from relaylab.errors import InputError
from relaylab.models.building import build_relay
from relaylab.recipes import changes, find_recipe
from relaylab.recipes.scales import at_scale
from relaylab.recipes.schema import CosineConfig, DecayConfig, PlateauConfig, StepsConfig
from relaylab.train import checkpoint, gradients, requests, segments, validation
from relaylab.train.devices import precision_warnings
from relaylab.train.engine import make_fabric
from relaylab.train.images import RunImages, open_images
from relaylab.train.meter import Meter
from relaylab.train.metrics import informative_tops, result_text
from relaylab.train.normalisation import has_local_batch_norm
from relaylab.train.options import TrainOptions
from relaylab.train.records import Records, read_metrics
from relaylab.train.schedule import Plateau, learning_rate
from relaylab.train.signals import StopRequest

RELAY = at_scale(find_recipe("table3-model-a-relay"), "tiny")
OPTIMIZER = replace(RELAY.optimizer, lr=1.0, iterations=100)


def test_the_validation_loss_is_the_mean_over_images() -> None:
    """With 65 images, the last batch has one image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (65, 4, 4, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 7, (65,), generator=generator)
    dataset = InMemoryDataset(DecodedImages(images, labels, tuple("abcdefg")), CropSpec(size=4, short_side=4))
    relay = Relay(nn.Sequential(nn.Flatten(), nn.Linear(48, 7)), Plan())
    augment = Augmentation(torch.zeros(3), torch.full((3,), 64.0), seed=0, flip=False)
    fabric = make_fabric(TrainOptions(recipe="x", accelerator="cpu"))
    found = validation.Validation(dataset, augment, nn.CrossEntropyLoss(), fabric)(relay)
    with torch.no_grad():
        scores = relay.model.double()(images.permute(0, 3, 1, 2).double() / 64)
    losses = nn.functional.cross_entropy(scores, labels, reduction="none")
    assert found["loss"] == pytest.approx(losses.sum().item() / 65, rel=1e-6)
    batches = (losses[:64].mean() + losses[64:].mean()).item() / 2
    assert found["loss"] != pytest.approx(batches, rel=1e-3), "negative control: the mean over batches is another"
    ranks = scores.argsort(dim=1, descending=True)
    for name, top in {"top1": 1, "top5": 5}.items():
        wrong = sum(int(label not in row[:top]) for row, label in zip(ranks.tolist(), labels.tolist(), strict=True))
        assert found[name] == pytest.approx(100 * wrong / 65, abs=1e-4)
    assert relay.training


def test_batch_normalisation_over_single_images_is_looked_at_before_the_first_step() -> None:
    resnet, inception = (at_scale(find_recipe(f"table6-{name}-relay"), "tiny") for name in ("resnet50", "inception-v3"))
    four = TrainOptions(recipe="x", accumulate=4)
    assert requests.batch_problems(resnet, four, 1) == [], "its last map has more than one place"
    assert has_local_batch_norm(build_relay(resnet, on_meta=True))
    assert not has_local_batch_norm(build_relay(RELAY, on_meta=True))
    assert requests.batch_problems(RELAY, four, 1) == []
    (problem,) = requests.batch_problems(inception, TrainOptions(recipe="x", accumulate=2), 2)
    assert "would normalise a single value per channel" in problem
    synchronised = TrainOptions(recipe="x", accumulate=2, batch_norm="synchronised")
    assert requests.batch_problems(inception, synchronised, 2) == [], "two processes have two values"
    assert requests.batch_problems(inception, TrainOptions(recipe="x", accumulate=2), 1) == []


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (StepsConfig(at=(0.5, 0.75)), {0: 1, 49: 1, 50: 0.1, 74: 0.1, 75: 0.01, 99: 0.01}),
        (DecayConfig(factor=0.5, every=30), {0: 1, 29: 1, 30: 0.5, 89: 0.25, 90: 0.125}),
        (CosineConfig(), {0: 1, 50: 0.5, 75: (1 + math.cos(0.75 * math.pi)) / 2}),
        (CosineConfig(least=0.2), {0: 1, 50: 0.6}),
    ],
)
def test_rates_follow_the_schedule(schedule, rates: dict[int, float]) -> None:
    config = replace(OPTIMIZER, schedule=schedule)
    assert {step: learning_rate(config, step) for step in rates} == pytest.approx(rates)


def test_a_plateau_lowers_the_rate_after_its_patience_and_not_below_the_least() -> None:
    config = replace(OPTIMIZER, schedule=PlateauConfig(patience=2, least=0.01))
    state, drops = Plateau(), []
    for error in (50, 40, 41, 40, 39, 39, 39, 39, 39, 39, 39):
        state = state.after(error, 2)
        drops.append(state.drops)
        state = Plateau(**json.loads(json.dumps(asdict(state))))  # as through a checkpoint
    assert drops == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4]
    assert [learning_rate(config, 5, n) for n in range(4)] == pytest.approx([1, 0.1, 0.01, 0.01])
    assert Plateau(**json.loads(json.dumps(asdict(Plateau()), allow_nan=False))) == Plateau()


def test_warm_up_rises_linearly_to_the_rate() -> None:
    config = replace(OPTIMIZER, warmup=4, schedule=StepsConfig())
    assert [learning_rate(config, step) for step in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_changes_are_made_by_dotted_names_and_say_where_they_come_from() -> None:
    recipe, problems = changes.with_changes(
        RELAY,
        [
            "optimizer.lr=0.5",
            "optimizer.clip_norm=2",
            "augmentation.flip=false",
            "network.pyramid=2,1",
            "plan.auxiliary.aux.weight=0.7",
            "optimizer.segment_lr.aux+primary=0.5",
            "scheme=multi_loss",
        ],
    )
    assert problems == []
    assert (recipe.optimizer.lr, recipe.optimizer.clip_norm, recipe.augmentation.flip) == (0.5, 2.0, False)
    assert (recipe.plan.auxiliary["aux"].weight, recipe.scheme, recipe.network.pyramid) == (0.7, "multi_loss", (2, 1))
    assert recipe.optimizer.segment_lr == {"aux+primary": 0.5}
    assert recipe.source_of("optimizer.lr") == "the command line" != recipe.source_of("optimizer.momentum")
    assert recipe.plan.auxiliary["aux"].top == RELAY.plan.auxiliary["aux"].top
    assert RELAY.optimizer.lr == 0.01, "the recipe itself is as it was"


def test_a_schedule_of_another_kind_takes_its_values_from_the_other_changes() -> None:
    recipe, problems = changes.with_changes(RELAY, ["optimizer.schedule.kind=plateau", "optimizer.schedule.patience=3"])
    assert (recipe.optimizer.schedule, problems) == (PlateauConfig(patience=3), [])
    recipe, problems = changes.with_changes(RELAY, ["optimizer.schedule.kind=cosine"])
    assert (recipe.optimizer.schedule, problems) == (CosineConfig(), [])
    recipe, problems = changes.with_changes(RELAY, ["optimizer.schedule.at=0.2,0.4"])
    assert (recipe.optimizer.schedule, problems) == (StepsConfig(at=(0.2, 0.4)), [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer.lr", "expected KEY=VALUE"),
        ("optimizer.lrr=1", "no value optimizer.lrr; nearest: optimizer.lr"),
        ("optimiser.lr=1", "nearest: optimizer.lr"),
        ("images.heldout=1", "no value images.heldout; nearest: images.held_out"),
        ("optimizer.lr=fast", "expected a number"),
        ("optimizer.iterations=1.5", "expected an integer"),
        ("augmentation.flip=perhaps", "expected true or false"),
        ("images.sampling=random", "expected one of class-aware, shuffled, square-root"),
        ("augmentation.crop=centre", "expected one of window, resized"),
        ("augmentation.policy=randaug", "expected one of randaugment, trivialaugment, autoaugment"),
        ("augmentation.padding=2.5", "expected an integer"),
        ("augmentation.crop_scale=a,b", "expected a number"),
        ("optimizer=1", "optimizer is a group"),
        ("plan.auxiliary.aux2.weight=1", "no value plan.auxiliary.aux2.weight; nearest: plan.auxiliary.aux.weight"),
        ("optimizer.schedule.kind=stairs", "expected one of plateau, steps, decay, cosine"),
        ("optimizer.schedule.kind=plateau", "also requires optimizer.schedule.patience"),
        ("name=other", "no value name"),
    ],
)
def test_a_wrong_change_is_explained(text: str, said: str) -> None:
    recipe, problems = changes.with_changes(RELAY, [text])
    assert [said in problem for problem in problems] == [True], problems
    assert recipe == RELAY


def test_all_wrong_changes_are_told_at_once() -> None:
    _, problems = changes.with_changes(
        RELAY, ["a=1", "optimizer.lr=x", "optimizer.momentum=0.9", "optimizer.momentum=1"]
    )
    assert len(problems) == 3


@pytest.mark.parametrize(
    "change",
    [
        "optimizer.lr=nan", "optimizer.lr=inf", "optimizer.lr=0", "optimizer.momentum=1", "optimizer.batch_size=0",
        "optimizer.iterations=0", "optimizer.evaluate_every=0", "loss.label_smoothing=1", "optimizer.clip_norm=0",
        "optimizer.schedule.at=0.9,0.1", "optimizer.schedule.factor=0", "optimizer.segment_lr.aux=-1",
        "images.short_side=8", "plan.auxiliary.aux.weight=inf", "optimizer.weight_decay=nan", "images.held_out=0",
        "images.held_out=inf", "images.held_out=nan", "images.set_aside=1.5",
        "images.long_tail=0.5", "augmentation.crop_scale=0.5", "augmentation.crop_scale=0.5,0.1",
        "augmentation.crop_scale=0,1", "augmentation.crop_scale=0.1,1.5", "augmentation.crop_ratio=2,inf",
        "augmentation.crop_ratio=nan,1", "augmentation.crop_ratio=0.5,1,2", "augmentation.padding=-1",
        "augmentation.policy_operations=0", "augmentation.policy_magnitude=31", "augmentation.policy_magnitude=-1",
        "augmentation.erasing=1.5", "augmentation.erasing=-0.5", "augmentation.mixup=-1", "augmentation.cutmix=inf",
    ],
)  # fmt: skip
def test_values_that_cannot_be_trained_with_are_found(change: str) -> None:
    recipe, problems = changes.with_changes(RELAY, [change])
    assert problems == []
    found = changes.recipe_problems(recipe)
    assert [change.split("=")[0] in problem for problem in found] == [True], found
    assert changes.recipe_problems(RELAY) == []


def test_segments_are_named_by_the_losses_that_train_them() -> None:
    found = segments.segments_of(at_scale(find_recipe("figure2-vgg19-relay"), "tiny"))
    assert list(found.losses) == ["aux1", "aux1+aux2", "aux2+primary", "primary", "head aux1", "head aux2"]
    assert set(found.overlaps) == {"aux1+aux2", "aux2+primary"}
    numbers = [10, 12, 14, 16]  # torchvision's, of the convolutions between the second and the third pooling
    assert found.parameters("aux1+aux2") == [f"model.features.{n}.{w}" for n in numbers for w in ("weight", "bias")]
    standard = replace(RELAY, scheme="standard")
    assert set(segments.segments_of(standard).losses) == {"primary"}


def test_a_segment_that_does_not_exist_is_named_with_those_that_do() -> None:
    found = segments.segments_of(RELAY)
    config = replace(RELAY.optimizer, segment_lr={"auxx": 1.0, "aux": 2.0})
    (problem,) = segments.segment_problems(config, found)
    assert "auxx" in problem
    assert "aux+primary" in problem


def small_relay() -> tuple[Relay, RelayLoss, segments.Segments, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    parts = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)]
    model = nn.Sequential(*parts, nn.Linear(6, 3)).double()
    plan = Plan(Window(bottom="1"), {"aux": Window(top="2", weight=0.3)})
    relay = Relay(model, plan, {"aux": nn.Linear(6, 3).double()})
    of, losses = {}, {"aux": ("aux",), "aux+primary": ("aux", "primary"), "primary": ("primary",), "head aux": ("aux",)}
    for name, _ in relay.named_parameters():
        place = name.split(".")[1]
        of[name] = (
            "head aux"
            if name.startswith("heads")
            else {"0": "aux", "1": "aux+primary", "2": "aux+primary"}.get(place, "primary")
        )
    images, labels = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    return relay, RelayLoss(nn.CrossEntropyLoss()), segments.Segments(of, losses), images, labels


def test_angles_are_those_of_the_losses_own_gradients_and_training_goes_on_as_without() -> None:
    """Against one autograd.grad per loss on the plain model; relative error below 1e-12."""
    relay, criterion, found, images, labels = small_relay()
    output = relay(images)
    losses = criterion.terms(output, labels)
    weighted = {name: relay.plan.weights[name] * loss for name, loss in losses.items()}
    angles = gradients.overlap_cosines(relay, weighted, found)
    sum(weighted.values()).backward()
    seen = {name: p.grad.clone() for name, p in relay.named_parameters()}
    # The same network by hand, without windows: only the overlap is compared, which both losses reach.
    hidden = relay.model[2](relay.model[1](relay.model[0](images)))
    primary = nn.functional.cross_entropy(relay.model[4](relay.model[3](hidden)), labels)
    auxiliary = 0.3 * nn.functional.cross_entropy(relay.heads["aux"](hidden), labels)
    own = [p for number in (1, 2) for p in relay.model[number].parameters()]
    a, b = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, own, retain_graph=True)])
        for loss in (auxiliary, primary)
    )
    expected = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    assert angles == {"aux+primary": {"aux, primary": pytest.approx(expected, rel=1e-12)}}
    assert abs(expected) < 0.999, "a cosine that any mistake would give"
    relay.zero_grad()
    criterion(relay(images), labels).backward()
    assert all(torch.equal(seen[name], p.grad) for name, p in relay.named_parameters()), "the look left a trace"


def test_sizes_are_mean_magnitudes_by_layer_and_segment() -> None:
    relay, criterion, found, images, labels = small_relay()
    criterion(relay(images), labels).backward()
    layers, by_segment = gradients.magnitudes(relay, found)
    weight = relay.model[1][0].weight
    assert layers["1.0"]["gradient"] == pytest.approx(weight.grad.abs().mean().item(), rel=1e-12)
    assert layers["1.0"]["ratio"] == pytest.approx((weight.grad.abs().mean() / weight.abs().mean()).item(), rel=1e-12)
    own = [p for number in (1, 2) for p in relay.model[number].parameters()]
    grads, weights = (torch.cat([t.flatten() for t in ts]).abs() for ts in ([p.grad for p in own], own))
    assert by_segment["aux+primary"]["gradient"] == pytest.approx(grads.mean().item(), rel=1e-12)
    assert by_segment["aux+primary"]["ratio"] == pytest.approx((grads.sum() / weights.sum()).item(), rel=1e-12)
    assert set(by_segment) == set(found.losses)
    assert "1.0.bias" not in layers
    assert len(layers) == 6


def test_metrics_of_steps_without_a_checkpoint_are_dropped(tmp_path: Path) -> None:
    records = Records(tmp_path, 0)
    for step in (2, 4, 6):
        records.write("train", step, {"loss": {"primary": 1.0 / step}, "top1": 50.0, "top5": 10.0})
    records.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # as left by a killed process
    Records(tmp_path, 4).close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2, 4]


def test_metrics_are_there_for_tensorboard_too(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = Records(tmp_path, 0)
    records.write("val", 3, {"top1": 12.5, "loss": 0.5})
    records.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("val/top1")] == [(3, 12.5)]


def test_a_checkpoint_comes_back_as_it_was_and_old_ones_go(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        tensors = {"w": torch.full((2,), step)}, {"w/m": torch.ones(1)}
        checkpoint.write(tmp_path, checkpoint.Checkpoint(*tensors, {"step": step, "x": 0.1}))
    found = checkpoint.read(checkpoint.path_of(tmp_path, 4))
    assert found.model["w"].tolist() == [4, 4]
    assert found.optimizer["w/m"].tolist() == [1.0]
    assert dict(found.state) == {"format": checkpoint.FORMAT, "step": 4, "x": 0.1}
    checkpoint.prune(tmp_path, 2, [2])
    assert [checkpoint.step_of(path) for path in checkpoint.newest(tmp_path)] == [8, 6, 2]
    assert checkpoint.newest_valid(tmp_path) == checkpoint.path_of(tmp_path, 8)
    (tmp_path / ".unfinished-step-00000010").mkdir()
    checkpoint.write(tmp_path, checkpoint.Checkpoint(*tensors, {"step": 8}))  # overwrites itself
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{n}" for n in (2, 6, 8)]


@pytest.mark.timeout(60)  # reading all of a sparse file takes hours
@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE])
def test_a_sparse_file_in_a_checkpoint_is_refused_at_once(name: str, tmp_path: Path) -> None:
    tensors = {"w": torch.ones(3)}, {"w/m": torch.ones(1)}
    path = checkpoint.write(tmp_path, checkpoint.Checkpoint(*tensors, {"step": 1}))
    with (path / name).open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(checkpoint.DamagedCheckpointError, match=f"{name} is damaged or modified"):
        checkpoint.read(path)


def test_the_sums_are_those_that_sha256sum_checks(tmp_path: Path) -> None:
    import shutil
    import subprocess

    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    path = checkpoint.write(tmp_path, checkpoint.Checkpoint({"w": torch.ones(3)}, {}, {"step": 1}))
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(command, cwd=path, capture_output=True).returncode == 0
    (path / "state.json").write_text("{}")
    assert subprocess.run(command, cwd=path, capture_output=True).returncode == 1


def test_a_second_ctrl_c_stops_at_once_but_not_the_same_one_passed_on() -> None:
    import signal

    request = StopRequest()
    assert not request
    request.receive(signal.SIGINT)
    assert request
    assert request.signal == "SIGINT"
    request.receive(signal.SIGINT)  # torchrun's copy
    request.receive(signal.SIGTERM)
    request._since -= 5
    request.receive(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        request.receive(signal.SIGINT)


def test_batches_of_validation_images_fit_the_device_and_the_images() -> None:
    def dataset(size: int) -> InMemoryDataset:
        decoded = DecodedImages(torch.zeros(1, size, size, 3, dtype=torch.uint8), torch.zeros(1).long(), ("a",))
        return InMemoryDataset(decoded, CropSpec(size=size, short_side=size))

    gpu = torch.device("cuda")
    assert [validation.batch_size(dataset(size), gpu) for size in (64, 224, 512)] == [1000, 81, 64]
    assert validation.batch_size(dataset(64), torch.device("cpu")) == 64
    on_disk = OnDiskDataset(dataset, CropSpec(size=64, short_side=64), workers=1)  # pyright: ignore
    assert validation.batch_size(on_disk, gpu) == 64


def test_sums_on_another_device_are_the_same() -> None:
    images = torch.randint(0, 256, (40, 5, 5, 3), dtype=torch.uint8)
    for ours, theirs in zip(statistics._sum_on_device(images), statistics.sum_batch(images), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours == theirs).all()


def opened(images: Path, where: str, *changes: str) -> RunImages:
    config = TrainOptions(recipe=RELAY.name, scale="tiny", data=(images,), changes=changes, images=where)  # pyright: ignore
    return open_images(requests.resolve(config).recipe, config, device=torch.device("cpu"), first=nullcontext())


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_images_set_aside_take_the_place_of_the_validation_images(where: str, tiny_images: Path) -> None:
    counts = opened(tiny_images, where, "images.held_out=3").counts()
    assert counts == {"train": [9] * 5, "val": [3] * 5}
    counts = opened(tiny_images, where, "images.long_tail=4", "images.held_out=2").counts()
    assert sorted(counts["train"], reverse=True) == [10, 7, 5, 4, 2]
    assert counts["val"] == [2] * 5
    with pytest.raises(InputError, match="would leave none"):
        opened(tiny_images, where, "images.held_out=12")


def test_the_top5_error_of_at_most_five_classes_is_left_out() -> None:
    line = {"top1": 60.0, "top5": 0.0, "ema_top1": 50.0, "ema_top5": 0.0}
    assert result_text(line, 5) == "error top-1 60.00 %"
    assert result_text(line, 5, "ema_") == "error top-1 50.00 %"
    assert result_text(line, 6) == "error top-1 60.00 %, top-5 0.00 %"
    for classes, text in ((5, " top-1 60 "), (6, " top-1/5 60/0 ")):
        meter = Meter(shown=informative_tops(classes))
        meter.count({"primary": 1.0, "top1": 0.6, "top5": 0.0}, 1.0)
        assert text in meter.text(8)
        assert {"top1", "top5"} < meter.values(8).keys(), "the records do not change"


@pytest.mark.parametrize(
    ("precision", "capabilities", "warned"),
    [
        ("bf16", {"architecture": "x86_64", "avx512_f": True}, True),
        ("bf16", {"architecture": "x86_64", "avx512_bf16": True}, False),
        ("bf16", {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, False),
        ("fp16", {"architecture": "x86_64", "amx_bf16": True, "amx_fp16": False}, True),
        ("fp16", {"architecture": "x86_64", "avx512_fp16": True}, False),
        ("bf16", {"architecture": "aarch64"}, False),
        ("32", {"architecture": "x86_64"}, False),
    ],
)
def test_a_precision_that_the_cpu_emulates_is_a_warning(
    precision: Literal["32", "bf16", "fp16"],
    capabilities: dict[str, object],
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    texts = precision_warnings(TrainOptions(recipe="x", accelerator="cpu", precision=precision))
    expected = f"this CPU has no instructions for --precision {precision}: --precision 32 is usually faster"
    assert texts == [expected] * warned
