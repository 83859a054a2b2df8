"""Model files, exported programs and predictions: the same scores everywhere, nothing of the heads, clear refusals."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("torchvision", reason="needs the lab extra")
pytest.importorskip("safetensors", reason="needs the lab extra")

from safetensors import safe_open
from safetensors.torch import load_file

from relaylab.data.geometry import CropSpec
from relaylab.errors import InputError
from relaylab.evaluate.predict import Prediction, crop_of, find_pictures, network_of, open_network, predict
from relaylab.models.building import build_network, build_relay
from relaylab.models.export import Classifier, export, mean_of
from relaylab.models.file import InputConfig, ModelFile, load_state, mean_path, read_model, read_tensors, save_model
from relaylab.recipes import RECIPES
from relaylab.recipes.scales import at_scale

MEAN, STD = (105.0, 113.0, 116.0), (60.0, 61.0, 62.0)
CLOSE = 1e-5  # relative to the largest score, single precision
ARCHITECTURES = {
    "model_a": "table3-model-a-relay",
    "model_b": "table3-model-b-relay",
    "vgg22": "table1-vgg22-places2",
    "resnet50": "table6-resnet50-relay",
}


def trained(recipe_name: str = "table3-model-b-relay", *, mean_image: bool = False, **given: object) -> ModelFile:
    """As after training: the plain model out of a relay, with batch statistics that say something."""
    recipe = at_scale(RECIPES[recipe_name], "tiny")
    relay = build_relay(recipe)
    size = recipe.network.image_size
    with torch.no_grad():
        relay(torch.randn(4, 3, size, size))
        for name, parameter in relay.model.named_parameters():
            if name.endswith("bias"):  # not all zero, and no two the same, as after training
                parameter.normal_()
    image = torch.rand(size, size, 3) * 255 if mean_image else None
    options = {"resize": 36, "crop": size, "mean": MEAN, "std": STD} | given
    return ModelFile(
        network=recipe.network,
        classes=("airport", "bar", "canyon", "dam", "euro"),
        input=InputConfig(**options),  # type: ignore[arg-type]
        state=relay.model.state_dict(),
        mean_image=image,
        about="trained for a test",
    )


def scores_by_hand(model: ModelFile, images: Tensor) -> Tensor:
    network = build_network(model.network)
    network.load_state_dict(dict(model.state))
    x = images.flip(1) if model.input.channels == "BGR" else images
    mean = (
        torch.tensor(model.input.mean).view(3, 1, 1) if model.mean_image is None else model.mean_image.permute(2, 0, 1)
    )
    x = x - mean
    if model.input.std is not None:
        x = x / torch.tensor(model.input.std).view(3, 1, 1)
    with torch.no_grad():
        return network.eval()(x)


def assert_close(got: Tensor, expected: Tensor) -> None:
    error = float((got - expected).abs().max() / expected.abs().max())
    assert error < CLOSE, f"relative error {error:.1e}"


@pytest.fixture(scope="module")
def plain() -> ModelFile:
    """A model file that tests only read."""
    torch.manual_seed(0)
    return trained()


Exported = Callable[[str], tuple[ModelFile, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """By architecture, a network and the folder with its files in all formats, each exported once."""

    @functools.cache
    def export_once(name: str) -> tuple[ModelFile, Path]:
        pytest.importorskip("onnxscript", reason="needs the export extra")
        torch.manual_seed(0)
        channels = "BGR" if name == "model_b" else "RGB"
        model = trained(ARCHITECTURES[name], mean_image=name == "model_a", channels=channels)
        folder = tmp_path_factory.mktemp("exported")
        files = export(model, folder, ("safetensors", "pt2", "onnx"))
        assert [file.name for file in files] == ["model.safetensors", "model.pt2", "model.onnx"]
        return model, folder

    return export_once


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 32, 32) * 255


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11 on its own file
@pytest.mark.parametrize(
    "name", ["model_a", "model_b", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vgg22", "resnet50"))]
)
def test_onnxruntime_and_torch_export_give_the_same_scores(name: str, images: Tensor, exported: Exported) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs the export extra and onnxruntime")
    model, folder = exported(name)
    expected = scores_by_hand(model, images)
    session = runtime.InferenceSession(str(folder / "model.onnx"))
    (scores,) = session.run(["scores"], {"images": images.numpy()})
    assert_close(torch.from_numpy(scores), expected)
    program = torch.export.load(folder / "model.pt2")
    with torch.no_grad():
        assert_close(program.module()(images), expected)
        assert_close(program.module()(images[:1]), expected[:1])  # any size of batch
    assert_close(torch.from_numpy(session.run(None, {"images": images[:1].numpy()})[0]), expected[:1])
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(model.classes)
    assert_close(scores_by_hand(read_model(folder / "model.safetensors"), images), expected)
    with pytest.raises(AssertionError, match="relative error"):  # negative control
        assert_close(torch.from_numpy(scores), scores_by_hand(model, images.flip(1)))


def test_nothing_of_the_heads_is_in_any_file(exported: Exported) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    model, folder = exported("model_b")
    plain = {name for name, _ in build_network(model.network).named_parameters()}
    assert set(load_file(folder / "model.safetensors")) == plain
    names = {initializer.name for initializer in onnx.load(folder / "model.onnx").graph.initializer}
    assert {name.removeprefix("model.") for name in names if name.endswith((".weight", ".bias"))} == plain
    assert not any("head" in name or "aux" in name for name in names)
    program = torch.export.load(folder / "model.pt2")
    assert {name.removeprefix("model.") for name in program.state_dict} - {"mean", "std"} == plain
    elements = sum(tensor.numel() for tensor in model.state.values())
    assert sum(t.numel() for n, t in program.state_dict.items() if n not in ("mean", "std")) == elements


@pytest.mark.parametrize("mean_image", [False, True])
def test_a_model_file_comes_back_as_it_was(mean_image: bool, tmp_path: Path) -> None:
    model, path = trained(mean_image=mean_image, how="both sides"), tmp_path / "b.safetensors"
    save_model(path, model)
    back = read_model(path)
    assert (back.network, back.classes, back.input, back.about) == (
        model.network,
        model.classes,
        model.input,
        model.about,
    )
    assert list(back.state) == sorted(model.state) or set(back.state) == set(model.state)
    assert all(torch.equal(back.state[key], value) for key, value in model.state.items())
    assert mean_path(path).exists() == mean_image
    assert torch.equal(mean_of(back), mean_of(model))
    with safe_open(path, "pt") as file:  # any reader of safetensors can tell what it is
        assert json.loads(file.metadata()["relaylab"])["classes"] == list(model.classes)


def test_state_dicts_that_do_not_fit_are_named() -> None:
    model = trained()
    network = model.model()
    state = dict(model.state)
    del state["classifier.fc3.bias"]
    state["heads.aux.fc1.weight"] = torch.zeros(1)
    state["classifier.fc3.weight"] = torch.zeros(9, 256)
    with pytest.raises(InputError) as error:
        load_state(network, state)
    assert str(error.value) == (
        "the state dict lacks classifier.fc3.bias; it has the unknown keys heads.aux.fc1.weight; it has a different "
        "shape for classifier.fc3.weight (9, 256), not (5, 256)"
    )
    with pytest.raises(InputError, match=r"lacks segment1.conv1.weight, .* and \d+ more"):
        load_state(network, {})


def test_parts_that_do_not_go_together() -> None:
    model = trained()
    parts = {"network": model.network, "input": model.input, "state": model.state}
    with pytest.raises(InputError, match="3 class names for a network of 5 classes"):
        ModelFile(classes=("a", "b", "c"), **parts)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"the mean image has shape \(3, 32, 32\).*expected \(32, 32, 3\)"):
        ModelFile(classes=model.classes, mean_image=torch.zeros(3, 32, 32), **parts)  # type: ignore[arg-type]
    other = InputConfig(crop=48, mean=MEAN)
    with pytest.raises(InputError, match="crop is 48 pixels, but the network expects images of 32"):
        ModelFile(classes=model.classes, network=model.network, input=other, state=model.state)


def test_files_that_are_no_model_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    with pytest.raises(InputError, match="no such file"):
        read_model(path)
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(InputError, match="is not a valid safetensors file"):
        read_model(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="does not state its network: expected a model file"):
        read_model(path)
    save_file({"w": torch.zeros(2)}, path, {"relaylab": json.dumps({"format": "relaylab model 99"})})
    with pytest.raises(InputError, match="'relaylab model 99'; this version reads 'relaylab model 1'"):
        read_model(path)
    save_model(path, trained(mean_image=True))
    mean_path(path).unlink()
    with pytest.raises(InputError, match=r"no such file: .*x.mean.safetensors"):
        read_model(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is not a valid safetensors file"):
        read_model(path)


def test_saving_refuses_another_networks_state(tmp_path: Path) -> None:
    model = trained()
    wrong = ModelFile(
        network=model.network, classes=model.classes, input=model.input, state=trained("table3-model-a-relay").state
    )
    with pytest.raises(InputError, match="lacks"):
        save_model(tmp_path / "x.safetensors", wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        *(("input", "resize", v) for v in (0, 8, "36", 36.5)),
        *(("input", "mean", v) for v in ([1.0, 2.0], ["a", 1, 2], 3, None)),
        *(("input", "std", v) for v in ([0.0, 1.0, 1.0], [1.0], "abc")),
        *(("input", key, "foo") for key in ("how", "channels", "unknown")),
        *(("network", key, v) for key in ("width", "num_classes", "image_size") for v in (0, -4, "4", 1.5)),
        *(("network", "pyramid", v) for v in ([9], [0], ["1"], 5)),
        ("network", "architecture", "vgg7"),
        *((part, None, v) for part in ("input", "network", "classes") for v in (None, [1], 3)),
    ],
)
def test_headers_that_say_something_else(
    part: str, key: str | None, value: object, plain: ModelFile, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    path, model = tmp_path / "x.safetensors", plain
    save_model(path, model)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["relaylab"])
    if key is None:
        header[part] = value
    else:
        header[part][key] = value
    save_file(dict(model.state), path, {"relaylab": json.dumps(header)})
    with pytest.raises(InputError):
        read_model(path).model()


def test_half_precision_is_read_as_single() -> None:
    model = trained()
    half = {key: tensor.half() for key, tensor in model.state.items()}
    network = build_network(model.network)
    load_state(network, half)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


class ByColour(nn.Module):
    """Scores that tell a crop's mean red, green and blue."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images.mean((2, 3)), torch.full((len(images), 2), -1e3)], dim=1)


def test_predictions_name_the_likeliest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(std=None, mean=(0.0, 0.0, 0.0))
    monkeypatch.setattr(ModelFile, "model", lambda _: ByColour())
    Image.new("RGB", (50, 40), (10, 30, 20)).save(tmp_path / "green.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    paths = [tmp_path / name for name in ("green.png", "broken.jpg", "absent.png")]
    green, broken, absent = predict(network_of(model), find_pictures(paths, bytes))
    assert isinstance(green, Prediction)
    assert [guess.name for guess in green.guesses][:3] == ["bar", "canyon", "airport"]
    assert sum(guess.probability for guess in green.guesses) == pytest.approx(1)
    assert isinstance(broken, InputError)
    assert "cannot decode" in str(broken)
    assert isinstance(absent, InputError)
    assert "cannot read" in str(absent)


def test_an_onnx_program_predicts_what_its_model_file_does(exported: Exported, tmp_path: Path) -> None:
    _, folder = exported("model_b")
    Image.new("RGB", (50, 40), (10, 130, 20)).save(tmp_path / "green.png")
    pictures = find_pictures([tmp_path / "green.png"], bytes)
    one, other = (next(predict(open_network(folder / f"model.{kind}"), pictures)) for kind in ("safetensors", "onnx"))
    assert isinstance(one, Prediction)
    assert isinstance(other, Prediction)
    assert [guess.name for guess in one.guesses] == [guess.name for guess in other.guesses]
    assert other.guesses[0].probability == pytest.approx(one.guesses[0].probability, abs=1e-5)
    (tmp_path / "broken.onnx").write_bytes(b"no program")
    with pytest.raises(InputError, match="is not an ONNX program written by"):
        open_network(tmp_path / "broken.onnx")
    with pytest.raises(InputError, match="can execute code"):
        open_network(folder / "model.pt2")


def test_pictures_come_from_files_folders_and_stdin(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for name in ("b.png", "deep/a.jpg", "deep/er/c.webp", "deep/notes.txt"):
        (tmp_path / name).write_bytes(name.encode())
    found = find_pictures([tmp_path / "b.png", tmp_path / "deep", Path("-")], lambda: b"piped")
    assert [each.read() for each in found] == [b"b.png", b"deep/a.jpg", b"deep/er/c.webp", b"piped"]
    with pytest.raises(InputError, match="contains no images"):
        find_pictures([tmp_path / "empty"], bytes)
    with pytest.raises(InputError, match="no images given"):
        find_pictures([], bytes)


def test_bgr_networks_see_bgr() -> None:
    model = trained(channels="BGR", std=None, mean=(1.0, 2.0, 3.0))
    classifier = Classifier(model)
    classifier.model = nn.Identity()
    red = torch.zeros(1, 3, 32, 32)
    red[:, 0] = 200
    assert classifier(red)[0, :, 0, 0].tolist() == [-1, -2, 197]


@pytest.mark.parametrize("size", [(340, 256), (256, 340), (500, 333), (64, 64)])
def test_crops_are_those_of_torchvision(size: tuple[int, int], tmp_path: Path) -> None:
    from torchvision.transforms import v2

    pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    picture.save(tmp_path / "x.png")
    config = InputConfig(resize=256, crop=224, mean=MEAN)
    assert CropSpec(size=config.crop, short_side=config.resize).short_side == 256
    for how, target in (("shorter side", 256), ("both sides", (256, 256))):
        expected = v2.functional.pil_to_tensor(v2.CenterCrop(224)(v2.Resize(target, antialias=True)(picture))).float()
        # `how` comes from a list of plain strings, which pyright does not take for the literals that they are.
        crop = crop_of(np.array(picture), InputConfig(resize=256, crop=224, mean=MEAN, how=how))  # type: ignore
        assert float((crop - expected).abs().max()) <= 2, how
        assert float((crop.flip(2) - expected).abs().mean()) > 5  # negative control


def test_the_same_tensors_are_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from relaylab.models.file import save_tensors\n"
        "save_tensors({'b': torch.ones(2), 'a': torch.zeros(3)}, Path(sys.argv[1]), dict.fromkeys('ezyxwvé', 'n\\n'))"
    )
    files = [tmp_path / f"{run}.safetensors" for run in range(4)]
    for file in files:
        subprocess.run([sys.executable, "-c", code, str(file)], check=True)
    assert len({file.read_bytes() for file in files}) == 1
    tensors, header = read_tensors(files[0])
    assert torch.equal(tensors["a"], torch.zeros(3))
    assert header["é"] == "n\n"
