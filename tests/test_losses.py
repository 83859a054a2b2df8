"""Losses of recipes: against torch's, timm's and scikit-learn's, and the same for parts of a batch as for all of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from sklearn.utils.class_weight import compute_class_weight

from relaylab.errors import InputError
from relaylab.models.building import build_criterion
from relaylab.models.losses import class_weights
from relaylab.recipes.changes import with_changes
from relaylab.recipes.files import read_recipe, to_toml
from relaylab.recipes.imagenet import ROWS
from relaylab.recipes.schema import LossConfig
from relaylab.train import requests, run_folder, session
from relaylab.train.options import TrainOptions
from test_optimizers import ADAMW
from test_train import final, stop_after, train

COUNTS = (7, 1, 2, 10)
LABELS = torch.tensor([0, 3, 3, 1, 2, 0])
SCORES = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 3
SOFT = torch.softmax(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), -1)
CONFIGS = [
    LossConfig(function=function, label_smoothing=smoothing, class_weights=weights)
    for function in ("cross-entropy", "binary")
    for smoothing in (0.0, 0.1)
    for weights in (None, "balanced", "square-root")
]


def loss_of(config: LossConfig, target: Tensor, scores: Tensor = SCORES) -> Tensor:
    return build_criterion(config, COUNTS)(scores, target)


def test_class_weights_are_exact_in_half_precision() -> None:
    config = LossConfig(function="binary", class_weights="square-root")
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_of(config, LABELS)
    torch.testing.assert_close(found, loss_of(config, LABELS), rtol=1e-6, atol=0)


def test_balanced_weights_are_scikit_learns() -> None:
    labels = np.repeat(np.arange(4), COUNTS)
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    torch.testing.assert_close(class_weights("balanced", COUNTS), torch.from_numpy(expected).float())


@pytest.mark.parametrize("kind", ["balanced", "square-root"])
def test_the_mean_weight_of_the_training_images_is_one(kind: str) -> None:
    weights = class_weights(kind, COUNTS)
    assert (weights * torch.tensor(COUNTS)).sum().item() / sum(COUNTS) == pytest.approx(1)
    ratio = weights[1] / weights[3]
    assert ratio.item() == pytest.approx(10 if kind == "balanced" else 10**0.5)
    assert class_weights(kind, (3, 0, 3)).tolist() == pytest.approx([1, 0, 1])


@pytest.mark.parametrize("config", CONFIGS)
def test_one_hot_targets_give_the_loss_of_class_indices(config: LossConfig) -> None:
    torch.testing.assert_close(loss_of(config, F.one_hot(LABELS, 4).float()), loss_of(config, LABELS))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("target", [LABELS, SOFT], ids=["indices", "soft"])
def test_the_mean_over_equal_parts_is_the_loss_of_the_batch(config: LossConfig, target: Tensor) -> None:
    """Which torch's own weighted mean is not."""
    parts = torch.stack([loss_of(config, target[i : i + 2], SCORES[i : i + 2]) for i in (0, 2, 4)])
    torch.testing.assert_close(parts.mean(), loss_of(config, target))


def test_torchs_weighted_mean_depends_on_the_batch() -> None:
    weights = class_weights("balanced", COUNTS)
    parts = [F.cross_entropy(SCORES[i : i + 2], LABELS[i : i + 2], weights) for i in (0, 2, 4)]
    with pytest.raises(AssertionError):  # negative control
        torch.testing.assert_close(torch.stack(parts).mean(), F.cross_entropy(SCORES, LABELS, weights))


def test_an_image_counts_as_often_as_the_weight_of_its_class_says() -> None:
    weights = class_weights("balanced", COUNTS)
    alone = F.cross_entropy(SCORES, LABELS, reduction="none")
    config = LossConfig(class_weights="balanced")
    torch.testing.assert_close(loss_of(config, LABELS), (alone * weights[LABELS]).mean())
    binary = F.binary_cross_entropy_with_logits(SCORES, F.one_hot(LABELS, 4).float(), reduction="none").mean(-1)
    config = LossConfig(function="binary", class_weights="balanced")
    torch.testing.assert_close(loss_of(config, LABELS), (binary * weights[LABELS]).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_weights_they_are_torchs_and_timms(smoothing: float) -> None:
    expected = nn.CrossEntropyLoss(label_smoothing=smoothing)
    for target in (LABELS, SOFT):
        assert torch.equal(loss_of(LossConfig(label_smoothing=smoothing), target), expected(SCORES, target))
    timm_loss = pytest.importorskip("timm.loss", reason="needs timm").BinaryCrossEntropy(smoothing=smoothing)
    config = LossConfig(function="binary", label_smoothing=smoothing)
    torch.testing.assert_close(loss_of(config, LABELS), timm_loss(SCORES, LABELS))


def test_class_weights_need_the_number_of_images() -> None:
    with pytest.raises(InputError, match=r"loss.class_weights is balanced: the number of images"):
        build_criterion(LossConfig(class_weights="balanced"))


def test_the_old_name_of_label_smoothing_is_told(tmp_path: Path) -> None:
    recipe, problems = with_changes(ROWS[0], ["optimizer.label_smoothing=0.1"])
    assert problems == ["no value optimizer.label_smoothing: it has been renamed to loss.label_smoothing"]
    assert recipe == ROWS[0]
    text = to_toml(ROWS[0]).replace("[optimizer]\n", "[optimizer]\nlabel_smoothing = 0.1\n")
    (tmp_path / "old.toml").write_text(text)
    with pytest.raises(
        InputError, match=r"no value optimizer.label_smoothing: it has been renamed to loss.label_smoothing"
    ):
        read_recipe(tmp_path / "old.toml")


def test_a_run_that_stored_the_old_name_resumes(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        train(tiny_images, tmp_path / "run", changes=("loss.label_smoothing=0.1",))
    for path in (
        tmp_path / "run" / run_folder.CONFIG,
        tmp_path / "run" / run_folder.CHECKPOINTS / "step-00000006" / "state.json",
    ):
        text = path.read_text()
        assert "loss.label_smoothing" in text
        path.write_text(text.replace("loss.label_smoothing", "optimizer.label_smoothing"))
    renew_sums(tmp_path / "run" / run_folder.CHECKPOINTS / "step-00000006")
    stored = json.loads((tmp_path / "run" / run_folder.CONFIG).read_text())
    assert "optimizer.label_smoothing=0.1" in stored["options"]["changes"]
    assert session.train(requests.resolve(TrainOptions(resume=str(tmp_path / "run")))).finished
    assert requests.recipe_of(tmp_path / "run").loss.label_smoothing == 0.1


def renew_sums(folder: Path) -> None:
    from relaylab.train.checkpoint import SUMS, _sum  # pyright: ignore[reportPrivateUsage]

    names = [line.split("  ")[1] for line in (folder / SUMS).read_text().splitlines()]
    (folder / SUMS).write_text("".join(f"{_sum(folder / name)}  {name}\n" for name in names))


WEIGHTED = (
    "plan.auxiliary.aux.head=linear", "loss.class_weights=balanced", "loss.label_smoothing=0.1", "images.long_tail=4",
    "images.sampling=shuffled", "optimizer.iterations=3", "optimizer.evaluate_every=3",
)  # fmt: skip
# AdamW divides by the gradients' sizes: a large eps keeps it from magnifying the last digits of small ones.
KINDS = {"binary": ("loss.function=binary",), "cross-entropy, adamw": (*ADAMW, "optimizer.eps=0.01")}


@pytest.mark.parametrize("kind", KINDS)
def test_class_weights_are_exact_however_a_step_is_divided(
    kind: str, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is random but the images."""
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, input: input)

    def weights_after(name: str, changes: Sequence[str], **options: Any) -> dict[str, Tensor]:
        train(tiny_images, tmp_path / name, short=True, changes=(*changes, *KINDS[kind]), diagnose_every=0, **options)
        return final(tmp_path / name, 3)

    whole = weights_after("whole", WEIGHTED)
    assert distance(weights_after("parts", WEIGHTED, accumulate=2), whole) < 2e-5
    assert distance(weights_after("early release", WEIGHTED, accumulate=2, early_release=True), whole) < 2e-5
    unweighted = [change for change in WEIGHTED if not change.startswith("loss.class_weights")]
    assert distance(weights_after("unweighted", unweighted), whole) > 1e-4  # negative control


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of a tensor, as a share of its largest value."""
    assert one.keys() == other.keys()
    return max(
        ((one[name] - other[name]).abs().max() / other[name].abs().max().clamp(min=1e-12)).item()
        for name in other
        if name.startswith("model/")
    )
