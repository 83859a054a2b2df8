"""Dense networks against the plain ones, window by window, in float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from relaylab.errors import InputError
from relaylab.models import inception_v3, model_a, model_b, resnet50, vgg
from relaylab.models.dense import SlidingPyramid, dense
from relaylab.models.pyramid import SpatialPyramid


def one_by_one(pyramid: nn.Module, features: Tensor, size: int) -> Tensor:
    """The windows of a map, each through the plain pyramid."""
    rows, columns = (side - size + 1 for side in features.shape[-2:])
    windows = [
        [pyramid(features[:, :, top : top + size, left : left + size]) for left in range(columns)]
        for top in range(rows)
    ]
    return torch.stack([torch.stack(row, dim=1) for row in windows], dim=1)


@pytest.mark.parametrize(("bins", "size"), [((7, 3, 2, 1), 14), ((7, 3, 2, 1), 20), ((4, 2, 1), 4), ((3,), 7)])
def test_sliding_pyramid_is_the_pyramid_of_each_window(bins: tuple[int, ...], size: int) -> None:
    features = torch.randn(2, 3, size + 3, size + 5, dtype=torch.float64)
    pyramid = SpatialPyramid(bins, size)
    slid = SlidingPyramid(pyramid)(features)
    assert slid.shape[1:3] == (4, 6)
    assert_close(slid, one_by_one(pyramid, features, size), rtol=0, atol=0)
    with pytest.raises(AssertionError):  # and of no other window
        assert_close(slid, one_by_one(pyramid, features.roll(1, dims=3), size), rtol=0, atol=0)


def test_sliding_pyramid_refuses_small_maps() -> None:
    with pytest.raises(InputError, match="smaller than the windows of 4 x 4"):
        SlidingPyramid(SpatialPyramid((2, 1), 4))(torch.zeros(1, 1, 4, 3))


@pytest.mark.parametrize("name", ["model_a", "model_b"])
def test_models_a_and_b_slide_over_their_last_map(name: str) -> None:
    make = {"model_a": model_a, "model_b": model_b}[name]
    model = make(7, width=4, image_size=64, pyramid=(4, 2, 1)).double().eval()
    images = torch.randn(2, 3, 100, 81, dtype=torch.float64)
    maps: list[Tensor] = []
    last = model.segment5 if name == "model_a" else model.segment4
    assert isinstance(last, nn.Sequential)
    whole = dense(model)
    pyramid = last.spp
    body = nn.Sequential(*list(model.children())[:-2], *list(last.children())[:-1])
    with torch.no_grad():
        features = body(images)
        maps = [
            model.classifier(pyramid(features[:, :, top : top + 4, left : left + 4]))
            for top in range(features.shape[2] - 3)
            for left in range(features.shape[3] - 3)
        ]
        scores = whole(images)
    assert scores.shape == (2, 7, 4, 3)
    assert_close(scores.flatten(2), torch.stack(maps, dim=2), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("image_size", [64, 224])
def test_vgg_slides_its_fully_connected_layers_as_convolutions(image_size: int) -> None:
    model = vgg(13, 5, width=2, image_size=image_size).double().eval()
    images = torch.randn(1, 3, image_size + 64, image_size + 32, dtype=torch.float64)
    side = image_size // 32
    first = model.classifier[0]
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        scores = dense(model, map_size=side)(images)
        features = model.features(images)
        weight = first.weight.view(len(first.weight), -1, side, side)
        hidden = nn.functional.conv2d(features, weight, first.bias)
        expected = model.classifier[1:](hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert scores.shape == (1, 5, 3, 2)
    assert_close(scores, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["resnet50", "inception_v3"])
def test_global_pooling_is_the_mean_of_the_score_map(name: str) -> None:
    model = {"resnet50": resnet50, "inception_v3": inception_v3}[name](5, image_size=112).double().eval()
    seen: list[Tensor] = []
    model.avgpool.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))  # pyright: ignore
    with torch.no_grad():
        scores = dense(model)(torch.randn(1, 3, 150, 180, dtype=torch.float64))
        per_place = model.fc(seen[0].permute(0, 2, 3, 1)).mean(dim=(1, 2))
    assert_close(scores[:, :, 0, 0], per_place, rtol=1e-10, atol=1e-12)


def test_at_its_own_size_a_dense_network_is_the_network() -> None:
    model = model_a(7, width=4, image_size=64, pyramid=(4, 2, 1)).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert_close(dense(model)(images)[:, :, 0, 0], model(images), rtol=1e-12, atol=1e-14)


def test_other_networks_have_no_dense_form() -> None:
    with pytest.raises(InputError, match="Sequential has no dense form"):
        dense(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))
    with pytest.raises(InputError, match="map_size is missing"):
        dense(vgg(13, 5, width=2, image_size=64))
