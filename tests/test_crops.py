"""Augmentation beyond the paper's: each against torchvision, and as a function of (seed, draw) alone."""

from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

pytest.importorskip("simplejpeg", reason="needs the lab extra")

from sklearn.datasets import load_sample_image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from relaylab.data.augment import ERASED_AREAS, ERASED_RATIOS, Augmentation, Column, random_erasures
from relaylab.data.boxes import NUMBERS, central_box, random_box
from relaylab.data.crops import WINDOWS, Crops
from relaylab.data.geometry import CropSpec, cut_window
from relaylab.data.keyed import keys, seeded
from relaylab.data.mixing import MIXES, Mixing
from relaylab.data.policies import POLICIES, Policy, apply_policy
from relaylab.errors import InputError
from relaylab.recipes.schema import AugmentationConfig

DRAWS = np.arange(20_000)
FLOWER = np.array(load_sample_image("flower.jpg"))  # 427 x 640
SPEC = CropSpec(size=56, short_side=64)


def crop_of(crops: Crops, draw: int, pixels: np.ndarray = FLOWER, spec: CropSpec = SPEC) -> torch.Tensor:
    out = torch.empty(spec.size, spec.size, 3, dtype=torch.uint8)
    numbers = crops.random_numbers(3, [draw])[0].tolist()
    cut_window(pixels, crops.window(spec, *pixels.shape[:2], numbers), out)
    return out


def torchvisions(transform: Any, height: int, width: int, count: int) -> list[dict[str, Any]]:
    """Return the parameters that torchvision draws."""
    image = torch.empty(3, height, width, device="meta")
    with seeded(0):
        return [transform.make_params([image]) for _ in range(count)]


def assert_same_distribution(ours: np.ndarray, theirs: np.ndarray, least: float = 1e-3) -> None:
    """Compare columns by the two-sample Kolmogorov-Smirnov test."""
    from scipy.stats import ks_2samp

    for column, (one, other) in enumerate(zip(ours.T, theirs.T, strict=True)):
        found = ks_2samp(one, other).pvalue
        assert found > least, f"column {column}: p = {found:.2g}"


@pytest.mark.parametrize(("height", "width"), [(427, 640), (300, 300), (900, 200)])
def test_resized_crops_have_torchvisions_distribution(height: int, width: int) -> None:
    """Of left, top, width, height, area and aspect ratio; in the long image most attempts fail."""
    crops = Crops(kind="resized")
    ours = np.array([crops.window(SPEC, height, width, row) for row in crops.random_numbers(0, DRAWS[:6000]).tolist()])
    found = torchvisions(v2.RandomResizedCrop(56), height, width, 6000)
    theirs = np.array([[each[name] for name in ("left", "top", "width", "height")] for each in found])

    def columns(windows: np.ndarray) -> np.ndarray:
        across, down = windows[:, 2:].T
        return np.column_stack([windows, across * down, across / down])

    assert_same_distribution(columns(ours), columns(theirs))
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= [width, height]).all()
    other = Crops(kind="resized", areas=(0.3, 1.0))
    wrong = np.array([other.window(SPEC, height, width, row) for row in other.random_numbers(0, DRAWS[:6000]).tolist()])
    with pytest.raises(AssertionError, match="p ="):  # negative control
        assert_same_distribution(columns(wrong), columns(theirs))


@pytest.mark.parametrize(("height", "width"), [(1, 1000), (1000, 1), (100, 300), (300, 100)])
def test_where_no_attempt_fits_the_central_box_is_torchvisions(height: int, width: int) -> None:
    transform = v2.RandomResizedCrop(56, scale=(1.0, 1.0))
    (found,) = torchvisions(transform, height, width, 1)
    crops = Crops(kind="resized", areas=(1.0, 1.0))
    left, top, across, down = crops.window(SPEC, height, width, crops.random_numbers(0, [5])[0].tolist())
    assert (left, top, across, down) == (found["left"], found["top"], found["width"], found["height"])
    assert (left, top, across, down) == central_box(height, width, (3 / 4, 4 / 3))


def test_a_resized_crop_has_torchvisions_pixels() -> None:
    crops, image = Crops(kind="resized"), torch.from_numpy(FLOWER).permute(2, 0, 1)
    for draw in range(20):
        left, top, width, height = crops.window(SPEC, 427, 640, crops.random_numbers(3, [draw])[0].tolist())
        expected = functional.resized_crop(image, top, left, height, width, [56, 56]).permute(1, 2, 0)
        assert (crop_of(crops, draw).int() - expected.int()).abs().max() <= 1
        moved = functional.resized_crop(image, top, left, height - 9, width, [56, 56]).permute(1, 2, 0)
        assert (crop_of(crops, draw).int() - moved.int()).abs().max() > 9  # negative control


@pytest.mark.parametrize("kind", WINDOWS)
def test_padding_is_torchvisions_pad(kind: str) -> None:
    """For an image of the size that it is resized to; windows of a padded image lie inside it, and reach every edge."""
    small = np.ascontiguousarray(FLOWER[:32, 100:132])
    spec, padded = CropSpec(size=32, short_side=32), Crops(kind=kind, padding=4)
    image = functional.pad(torch.from_numpy(small).permute(2, 0, 1), [4])
    corners = set()
    for draw in range(400):
        left, top, width, height = padded.window(spec, 32, 32, padded.random_numbers(3, [draw])[0].tolist())
        corners.add((left, top))
        expected = functional.resized_crop(image, top + 4, left + 4, height, width, [32, 32]).permute(1, 2, 0)
        assert (crop_of(padded, draw, small, spec).int() - expected.int()).abs().max() <= 1
    assert min(corners)[0] == -4
    assert len(corners) > 70
    if kind == "window":
        assert {place for corner in corners for place in corner} == set(range(-4, 5))


def test_padding_grows_with_the_source() -> None:
    crops = Crops(padding=4)
    assert crops.window(CropSpec(size=32, short_side=32), 320, 640, [0.0, 0.0]) == (-40, -40, 320, 320)
    assert crops.window(CropSpec(size=32, short_side=32), 320, 640, [1 - 2**-53, 1 - 2**-53]) == (360, 40, 320, 320)


def test_boxes_that_have_to_be_smaller_are() -> None:
    half = [0.5] * NUMBERS
    assert random_box(half, 40, 40, (1.0, 1.0), (1.0, 1.0)) == (0, 0, 40, 40)
    assert random_box(half, 40, 40, (1.0, 1.0), (1.0, 1.0), smaller=True) is None
    assert random_box(half, 40, 60, (0.5, 0.5), (1.0, 1.0)) == (13, 3, 35, 35)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_torchvisions_and_keyed(name: str) -> None:
    """The pixels of a draw depend on nothing but (seed, draw); torch's generator is where it was."""
    transforms = {
        "randaugment": v2.RandAugment(2, 9, interpolation=InterpolationMode.BILINEAR),
        "trivialaugment": v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR),
        "autoaugment": v2.AutoAugment(interpolation=InterpolationMode.BILINEAR),
    }
    images = torch.from_numpy(np.stack([FLOWER[:64, 64 * i : 64 * i + 64] for i in range(8)]))
    draws, state = np.arange(40, 48), torch.get_rng_state()
    changed = images.clone()
    apply_policy(Policy(name=name), changed, 5, draws)
    assert torch.equal(torch.get_rng_state(), state)
    for row in reversed(range(8)):
        torch.rand(row)  # the generator is elsewhere now
        alone = images[row : row + 1].clone()
        apply_policy(Policy(name=name), alone, 5, draws[row : row + 1])
        assert torch.equal(alone[0], changed[row])
        with seeded(keys(5, int(draws[row]), Column.POLICY).item()):
            plain = transforms[name](v2.functional.to_pil_image(images[row].permute(2, 0, 1)))
        assert torch.equal(torch.from_numpy(np.array(plain)), changed[row])
    for seed, others in ((6, draws), (5, draws + 8)):  # negative controls
        other = images.clone()
        apply_policy(Policy(name=name), other, seed, others)
        assert sum(torch.equal(*pair) for pair in zip(other, changed, strict=True)) < 5


def test_a_policys_settings_act() -> None:
    images = torch.from_numpy(np.stack([FLOWER[:64, 64 * i : 64 * i + 64] for i in range(8)]))
    results = []
    for settings in ({}, {"operations": 5}, {"magnitude": 30}):
        results.append(images.clone())
        apply_policy(Policy(name="randaugment", **settings), results[-1], 0, DRAWS[:8])
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_erasing_has_torchvisions_distribution() -> None:
    boxes = random_erasures(0, DRAWS, 64, 0.25)
    erased = boxes[:, 2] > 0
    assert abs(erased.mean() - 0.25) < 0.015
    assert (boxes[~erased] == 0).all()
    found = torchvisions(v2.RandomErasing(), 64, 64, 5000)
    theirs = np.array([[each[name] for name in ("j", "i", "w", "h")] for each in found if each["v"] is not None])
    assert_same_distribution(boxes[erased], theirs)
    turned = boxes[erased][:, [1, 0, 3, 2]]  # negative control: the range of aspect ratios is not quite symmetric
    assert not np.array_equal(turned, boxes[erased])
    assert (ERASED_AREAS, [1 / ratio for ratio in ERASED_RATIOS]) == ((0.02, 0.33), pytest.approx([3.3, 0.3]))


def test_erased_pixels_are_torchvisions_zeros() -> None:
    images, draws = torch.randint(0, 256, (12, 40, 40, 3), dtype=torch.uint8), torch.arange(12)
    mean = torch.rand(40, 40, 3) * 255
    plain = Augmentation(mean, seed=4)(images, draws)
    erasing = Augmentation(mean, seed=4, erasing=0.7)
    boxes = random_erasures(4, draws.numpy(), 40, 0.7)
    expected = plain.clone()
    for image, (left, top, width, height) in zip(expected, boxes.tolist(), strict=True):
        image.copy_(functional.erase(image, top, left, height, width, torch.zeros(3, 1, 1)))
    result = erasing(images, draws)
    assert torch.equal(result, expected)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert 0 < (boxes[:, 2] > 0).sum() < 12
    assert not torch.equal(result, plain)
    assert torch.equal(erasing(images[5:7], draws[5:7]), result[5:7])
    assert torch.equal(erasing.eval()(images), Augmentation(mean).eval()(images))


@pytest.mark.parametrize("names", [("mixup",), ("cutmix",), ("mixup", "cutmix")])
def test_mixed_targets_are_the_share_of_the_pixels(names: tuple[str, ...]) -> None:
    """Images that are one colour each: the targets can be read from the pixels."""
    images = torch.eye(4)[:, :, None, None].expand(4, 4, 20, 20).contiguous(memory_format=torch.channels_last)
    labels, mixing = torch.arange(4), Mixing(dict.fromkeys(names, 1.0), 4, seed=2)
    kinds, lams = set(), []
    for first in range(0, 400, 4):
        mixed, targets = mixing(images, labels, torch.arange(first, first + 4))
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        torch.testing.assert_close(mixed.mean((2, 3)), targets)
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal((targets > 0).sum(1) <= 2, torch.ones(4).bool())
        lams.append(float(targets[0, 0]))
        if 0.05 < lams[-1] < 0.95:
            kinds.add("cutmix" if ((mixed == 0) | (mixed == 1)).all() else "mixup")
        again, same = mixing(images, labels, torch.arange(first, first + 4))
        assert torch.equal(again, mixed)
        assert torch.equal(same, targets)
    assert kinds == set(names)
    assert len(set(lams)) > 30


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_proportions_have_their_beta_distribution(alpha: float) -> None:
    from scipy.stats import beta, kstest

    mixing = Mixing({"mixup": alpha}, 2, seed=0)
    pair = torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])
    lams = [float(mixing(*pair, torch.tensor([first]))[1][0, 0]) for first in range(0, 3000, 2)]
    assert kstest(lams, beta(alpha, alpha).cdf).pvalue > 1e-3
    assert kstest(lams, beta(2 * alpha, 2 * alpha).cdf).pvalue < 1e-6  # negative control


def test_mixing_is_torchvisions_and_keyed() -> None:
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([4, 0, 1, 4, 2, 3])
    state = torch.get_rng_state()
    mixed, targets = Mixing({"mixup": 0.4, "cutmix": 0.0}, 5, seed=7)(images, labels, torch.arange(90, 96))
    assert torch.equal(torch.get_rng_state(), state)
    with seeded(keys(7, 90, Column.MIXING).item()):
        expected = v2.RandomChoice([v2.MixUp(alpha=0.4, num_classes=5)])(images, labels)
    assert torch.equal(mixed, expected[0])
    assert torch.equal(targets, expected[1])
    for seed, first in ((8, 90), (7, 96)):  # negative controls
        other, _ = Mixing({"mixup": 0.4}, 5, seed)(images, labels, torch.arange(first, first + 6))
        assert not torch.equal(other, mixed)
    same, hard = Mixing({"mixup": 0.0, "cutmix": 0.0}, 5, seed=7)(images, labels, torch.arange(6))
    assert same is images
    assert hard is labels


def test_random_numbers_of_different_uses_are_different_columns() -> None:
    columns = list(Column)
    assert columns == sorted(set(columns))
    assert Column.RESIZED >= Column.REPLACEMENT + 8
    assert Column.ERASING == Column.RESIZED + NUMBERS
    assert Column.POLICY == Column.ERASING + 1 + NUMBERS
    assert WINDOWS["window"].columns == range(2)  # those of the paper's crops in all earlier runs


def test_registries_and_the_recipes_values_have_the_same_names() -> None:
    hints = get_type_hints(AugmentationConfig)
    assert set(get_args(hints["crop"])) == set(WINDOWS)
    policies = {name for part in get_args(hints["policy"]) for name in get_args(part)}
    assert policies == set(POLICIES)
    assert set(MIXES) <= set(hints)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="unknown crop 'resize'; nearest: resized"):
        Crops(kind="resize")
    with pytest.raises(InputError, match="unknown policy 'randaug'; nearest: randaugment"):
        Policy(name="randaug")


def test_a_seeds_block_restores_the_generator_after_an_error() -> None:
    state = torch.get_rng_state()

    def fail() -> None:
        with seeded(3):
            torch.rand(2)
            raise InputError("stop")

    with pytest.raises(InputError, match="stop"):
        fail()
    assert torch.equal(torch.get_rng_state(), state)
