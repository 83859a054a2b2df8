"""Crops and arithmetic against the plain path, and chance that is keyed by seed and draw alone."""

import io

import numpy as np
import pytest
import torch

pytest.importorskip("simplejpeg", reason="needs the lab extra")

from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks.plain_crops import plain_centre_crop, plain_input, plain_training_crop
from relaylab.data import geometry
from relaylab.data.augment import (
    IMAGENET_COMPONENTS,
    Augmentation,
    ColourComponents,
    arithmetic,
    random_flips,
    random_shifts,
)
from relaylab.data.decode import decode
from relaylab.data.geometry import CropSpec, cut_window, training_window
from relaylab.data.keyed import uniforms
from relaylab.errors import InputError

SMALL = CropSpec(size=56, short_side=64)
DRAWS = np.arange(12)


def photograph(name: str, width: int, height: int, quality: int = 90) -> bytes:
    image = Image.fromarray(load_sample_image(name)).resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def crop(data: bytes, spec: CropSpec, seed: int, draw: int) -> torch.Tensor:
    pixels = decode(data, short_side=spec.short_side if spec.reduced_decoding else None)
    out = torch.empty(spec.size, spec.size, 3, dtype=torch.uint8)
    place = uniforms(seed, [draw], 2)[0]
    cut_window(pixels, training_window(spec, *pixels.shape[:2], *place), out)
    return out


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2))


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (300, 280)])
def test_fast_crops_are_pillows(name: str, width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = photograph(name, width, height)
    for fast in (geometry.FAST_RESIZE, False):
        monkeypatch.setattr(geometry, "FAST_RESIZE", fast)
        for draw in range(4):
            ours = crop(data, CropSpec(), 3, draw).numpy()
            assert psnr(ours, plain_training_crop(data, CropSpec(), seed=3, draw=draw)) >= 55
            assert psnr(ours, plain_training_crop(data, CropSpec(), seed=3, draw=draw + 4)) < 30


def test_resize_is_pillows_to_a_level() -> None:
    image = Image.fromarray(load_sample_image("flower.jpg"))
    for window in ((0, 0, 427, 427), (13, 100, 300, 300), (200, 7, 57, 80), (1, 1, 56, 56), (30, 9, 500, 40)):
        left, top, width, height = window
        out = torch.empty(56, 56, 3, dtype=torch.uint8)
        cut_window(np.array(image), window, out)
        part = image.crop((left, top, left + width, top + height)).resize((56, 56), Image.Resampling.BILINEAR)
        assert np.abs(out.numpy().astype(int) - np.array(part)).max() <= 1


@pytest.mark.parametrize(
    ("name", "size", "side", "short"), [("china.jpg", 93, 106, 107), ("flower.jpg", 168, 192, 214)]
)
def test_reduced_decoding_acts_and_stays_close(name: str, size: int, side: int, short: int) -> None:
    data = photograph(name, 640, 427)
    spec = CropSpec(size=size, short_side=side, reduced_decoding=True)
    pixels = decode(data, short_side=side)
    assert min(pixels.shape[:2]) == short  # a quarter and a half
    out = torch.empty(size, size, 3, dtype=torch.uint8)
    geometry.cut_box(pixels, geometry.centre_box(spec, *pixels.shape[:2]), out)
    assert 32 <= psnr(out.numpy(), plain_centre_crop(data, spec)) < 60


def test_the_arithmetic_is_the_plain_one() -> None:
    data = photograph("china.jpg", 100, 80)
    mean = np.random.default_rng(0).uniform(80, 140, (56, 56, 3))
    crops = np.stack([plain_training_crop(data, SMALL, seed=7, draw=draw) for draw in DRAWS])
    expected = np.stack([plain_input(data, SMALL, mean, seed=7, draw=d, components=IMAGENET_COMPONENTS) for d in DRAWS])
    images = torch.from_numpy(crops)
    before = images.clone()
    augmentation = Augmentation(torch.from_numpy(mean), seed=7)
    result = augmentation(images, torch.from_numpy(DRAWS))
    assert 0 < random_flips(7, DRAWS).sum() < len(DRAWS)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, torch.from_numpy(expected).float(), rtol=0, atol=1e-3)
    assert torch.equal(images, before)
    other = Augmentation(torch.from_numpy(mean), seed=8)(images, torch.from_numpy(DRAWS))
    assert (other - result).abs().amax((1, 2, 3)).min() > 0.1  # every image got another shift


def test_evaluation_only_subtracts_and_divides() -> None:
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    mean, std = torch.tensor([120.0, 115.0, 100.0]), torch.tensor([60.0, 58.0, 57.0])
    evaluation = Augmentation(mean, std).eval()
    expected = (images.double() - mean.double()) / std.double()
    torch.testing.assert_close(evaluation(images).double(), expected.permute(0, 3, 1, 2), rtol=1e-6, atol=1e-5)
    half = Augmentation(mean, dtype=torch.bfloat16).eval()(images)
    assert half.dtype == torch.bfloat16
    assert (half.float() - (images.float() - mean).permute(0, 3, 1, 2)).abs().max() <= 0.5
    with pytest.raises(InputError, match="needs the batch's draws"):
        evaluation.train()(images)


@pytest.mark.parametrize("options", [{"flip": False}, {"components": None}, {"flip": False, "components": None}])
def test_parts_can_be_left_out(options: dict) -> None:
    images, draws = torch.randint(0, 256, (12, 8, 8, 3), dtype=torch.uint8), torch.from_numpy(DRAWS)
    result = Augmentation(torch.zeros(3), **options)(images, draws).permute(0, 2, 3, 1)
    flips = torch.from_numpy(random_flips(0, DRAWS)) & options.get("flip", True)
    plain = torch.where(flips[:, None, None, None], images.flip(2), images).float()
    shifts = result - plain
    assert (shifts - shifts[:, :1, :1]).abs().max() < 1e-3  # one for each image
    assert (shifts.abs().max() > 1) == ("components" not in options)


def test_wrong_means_and_deviations_are_refused() -> None:
    for mean in (torch.zeros(4), torch.zeros(3, 8, 8), torch.tensor(1.0)):
        with pytest.raises(InputError, match="mean: expected shape"):
            Augmentation(mean)
    for std in (torch.zeros(3), torch.ones(2), torch.tensor([1.0, float("nan"), 1.0])):
        with pytest.raises(InputError, match="std: expected"):
            Augmentation(torch.zeros(3), std)


def test_shifts_have_the_distribution_of_alexnet() -> None:
    draws = np.arange(200_000)
    shifts = random_shifts(5, draws, IMAGENET_COMPONENTS)
    vectors, values = IMAGENET_COMPONENTS.vectors, IMAGENET_COMPONENTS.eigenvalues
    expected = vectors @ np.diag((0.1 * 255 * values) ** 2) @ vectors.T
    np.testing.assert_allclose(np.cov(shifts.T), expected, rtol=0.02, atol=0.02 * expected.max())
    factors = shifts @ np.linalg.inv(vectors).T / (0.1 * 255 * values)
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.01
    assert np.abs(factors.mean(0)).max() < 0.01
    assert np.abs((factors**4).mean(0) - 3).max() < 0.1  # normal, not merely of the right variance
    assert np.isfinite(shifts).all()
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=2e-3)
    np.testing.assert_allclose(random_shifts(5, draws[:9], IMAGENET_COMPONENTS, 0.2), 2 * shifts[:9])


def test_chance_is_a_function_of_seed_and_draw() -> None:
    draws = np.arange(10_000)
    flips = random_flips(1, draws)
    assert abs(flips.mean() - 0.5) < 0.02
    np.testing.assert_array_equal(random_flips(1, draws[::-1])[::-1], flips)
    np.testing.assert_array_equal(random_flips(1, draws[700:701]), flips[700:701])
    assert abs((random_flips(2, draws) == flips).mean() - 0.5) < 0.02
    data = photograph("china.jpg", 200, 150)
    crops = [crop(data, SMALL, 0, draw) for draw in range(6)]
    assert all(not torch.equal(one, other) for i, one in enumerate(crops) for other in crops[:i])
    assert torch.equal(crops[3], crop(data, SMALL, 0, 3))
    assert np.abs(np.corrcoef(uniforms(1, draws, 7).T) - np.eye(7)).max() < 0.05  # position, flip, colour: independent


def test_arithmetic_draws_nothing_from_the_global_generators() -> None:
    state = torch.get_rng_state()
    images, draws = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.tensor([1, 2])
    results = [Augmentation(torch.zeros(3))(images, draws) for _ in range(2)]
    assert torch.equal(*results)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same() -> None:
    images, draws = torch.randint(0, 256, (12, 56, 56, 3), dtype=torch.uint8), torch.from_numpy(DRAWS)
    augmentation = Augmentation(torch.rand(56, 56, 3) * 255, torch.tensor([60.0, 58.0, 57.0]), seed=2)
    expected = augmentation(images, draws)
    result = augmentation.cuda()(images.cuda(), draws)
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-6, atol=1e-5)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_components_are_columns() -> None:
    red_only = ColourComponents(np.array([0.1, 0.0, 0.0]), np.eye(3))
    shifts = random_shifts(0, DRAWS, red_only)
    assert (shifts[:, 0] != 0).all()
    assert (shifts[:, 1:] == 0).all()
    tilted = ColourComponents(np.array([0.1, 0.0, 0.0]), np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1.0]]))
    np.testing.assert_allclose(random_shifts(0, DRAWS, tilted)[:, 1], shifts[:, 0])


def test_arithmetic_by_hand() -> None:
    image = torch.tensor([[[[10, 20, 30], [40, 50, 60]]]], dtype=torch.uint8)
    mean = torch.arange(6.0).view(1, 2, 3)
    image, mean = image.expand(1, 2, 2, 3).contiguous(), mean.expand(2, 2, 3).contiguous()
    result = arithmetic(image, mean, torch.tensor([1.0, 2.0, 1.0]), torch.tensor([True]), torch.tensor([[1.0, 2, 3]]))
    expected = [[40 + 1 - 0, 10 + 1 - 3], [2 * (50 + 2 - 1), 2 * (20 + 2 - 4)], [60 + 3 - 2, 30 + 3 - 5]]
    assert result[0, :, 0].tolist() == expected
