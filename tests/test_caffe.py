"""The authors' Model B from Caffe's files: the same bits, the same scores as another engine's, and clear refusals."""

import contextlib
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision", reason="needs the lab extra")
pytest.importorskip("google.protobuf", reason="needs the lab extra")

from caffe_files import FULL, THIN, Change, definition, messages, random_state, write_pair
from relaylab.errors import InputError
from relaylab.models.building import build_network
from relaylab.models.caffe import reading
from relaylab.models.caffe.importing import import_caffe
from relaylab.models.caffe.schema import NetParameter
from relaylab.models.file import InputConfig, load_state, read_model, save_model
from relaylab.recipes.schema import NetworkConfig

Pair = tuple[Path, Path]
CLOSE = 1e-4  # largest relative difference of two engines' scores in single precision


@pytest.fixture
def state() -> dict[str, Tensor]:
    return random_state(THIN)


@pytest.fixture
def pair(tmp_path: Path, state: dict[str, Tensor]) -> Pair:
    return write_pair(tmp_path, THIN, state)


def equal(one: Any, other: Any) -> bool:
    return list(one) == list(other) and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


@pytest.mark.parametrize(
    ("source", "old"),
    [  # layers of type Input are younger than the old form
        *(("Input", False), ("input_dim", False), ("input_shape", False), ("ImageData", False)),
        *(("input_dim", True), ("input_shape", True), ("ImageData", True)),
    ],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_every_form_gives_the_same_bits(
    source: str, old: bool, in_place: bool, state: dict[str, Tensor], tmp_path: Path
) -> None:
    imported = import_caffe(*write_pair(tmp_path, THIN, state, source=source, old=old, in_place=in_place))
    assert imported.network == THIN
    assert equal(imported.state, state)
    if source == "ImageData":
        expected = InputConfig(resize=72, how="both sides", crop=64, channels="BGR", mean=(100.5, 110.25, 120.1))
    else:
        expected = InputConfig(resize=73, how="both sides", crop=64, channels="BGR", mean=(105.448, 113.768, 116.052))
    assert imported.input == expected


def test_dropout_and_softmax_may_be_absent(state: dict[str, Tensor], tmp_path: Path) -> None:
    assert equal(import_caffe(*write_pair(tmp_path, THIN, state, dropout=False, softmax=False)).state, state)


def test_layers_of_the_training_phase_are_passed_over(state: dict[str, Tensor], tmp_path: Path) -> None:
    def change(network: Any) -> None:
        network.layer.add(name="a", type="InnerProduct", bottom=["pool3"], top=["a"]).include.add(phase=0)
        network.layer.add(name="b", type="InnerProduct", bottom=["pool3"], top=["b"]).exclude.add(phase=1)
        network.layer.add(name="c", type="SoftmaxWithLoss", bottom=["fc3"], top=["c"])

    assert equal(import_caffe(*write_pair(tmp_path, THIN, state, change)).state, state)


def test_the_model_file_gives_the_networks_own_scores(pair: Pair, state: dict[str, Tensor], tmp_path: Path) -> None:
    save_model(tmp_path / "b.safetensors", import_caffe(*pair))
    kept = read_model(tmp_path / "b.safetensors")
    assert "net.caffemodel" in kept.about
    model = build_network(THIN).eval()
    load_state(model, state)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(kept.model()(images), model(images))


def test_layers_that_the_prototxt_does_not_name_are_passed_over(pair: Pair, state: dict[str, Tensor]) -> None:
    network = NetParameter()
    network.layer.add(name="auxiliary/fc").blobs.add()
    pair[1].write_bytes(network.SerializeToString() + pair[1].read_bytes())
    assert equal(import_caffe(*pair).state, state)


def test_double_precision_is_rounded(pair: Pair, state: dict[str, Tensor]) -> None:
    network = NetParameter.FromString(pair[1].read_bytes())
    for layer in network.layer:
        for blob in layer.blobs:
            blob.double_data = np.frombuffer(blob.data, "<f4").astype("<f8").tobytes()
            blob.ClearField("data")
    pair[1].write_bytes(network.SerializeToString())
    assert equal(import_caffe(*pair).state, state)


# Another engine


def opencv(pair: Pair, images: Tensor) -> Tensor:
    """Class scores of OpenCV's reader and engine."""
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    if int(cv2.__version__.partition(".")[0]) >= 5:
        pytest.skip(f"OpenCV {cv2.__version__} reads no Caffe files; needs opencv-python-headless<5")
    cv2.setNumThreads(1)
    network = cv2.dnn.readNetFromCaffe(*map(str, pair))
    network.setInput(images.numpy())
    return torch.from_numpy(network.forward().copy())


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return ((one - other).abs().max() / one.abs().max()).item()


def compare(pair: Pair, config: NetworkConfig, state: dict[str, Tensor]) -> float:
    """The difference from OpenCV's scores, after two controls: BGR read as RGB, and two branches swapped."""
    images = 50 * torch.randn(1, 3, config.image_size, config.image_size)
    theirs = opencv(pair, images)
    imported = import_caffe(*pair)
    assert imported.network == config
    assert equal(imported.state, state)
    model = imported.model()
    with torch.no_grad():
        found = difference(theirs, model(images))
        flipped = difference(theirs, model(images.flip(1)))
        module: Any = model.get_submodule("segment3.inception2")
        module.forward = lambda maps: torch.cat(
            [module.branch3x3(maps), module.branch1x1(maps), module.branch3x3dbl(maps)], dim=1
        )
        swapped = difference(theirs, model(images))
    assert flipped > 10 * CLOSE
    assert swapped > 10 * CLOSE
    return found


@pytest.mark.parametrize(("size", "pyramid"), [(60, (4, 2, 1)), (64, (4, 2, 1)), (208, (7, 3, 2, 1)), (200, (7, 2))])
def test_opencv_agrees_also_where_caffe_rounds_up(size: int, pyramid: tuple[int, ...], tmp_path: Path) -> None:
    config = NetworkConfig(architecture="model_b", num_classes=7, image_size=size, width=4, pyramid=pyramid)
    state = random_state(config)
    assert compare(write_pair(tmp_path, config, state, softmax=False), config, state) < CLOSE


@pytest.mark.slow
def test_opencv_agrees_at_full_size(tmp_path: Path) -> None:
    state = random_state(FULL)
    pair = write_pair(tmp_path, FULL, state, softmax=False, old=True, source="input_dim")
    assert abs(pair[1].stat().st_size - reading.AUTHORS_SIZE) < 50_000
    assert compare(pair, FULL, state) < CLOSE
    pair[1].unlink()  # pytest keeps the folders of three runs


# Refusals


def refused(pair: Pair, message: str, classes: Path | None = None) -> str:
    with pytest.raises(InputError, match=message) as caught:
        import_caffe(*pair, classes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def layer(network: Any, name: str) -> Any:
    return next(layer for layer in network.layer if layer.name == name)


def set_field(name: str, path: str, value: Any) -> Change:
    """A change of one parameter of one layer."""

    def change(network: Any) -> None:
        message = layer(network, name)
        *groups, field = path.split(".")
        for group in groups:
            message = getattr(message, group)
        if isinstance(value, list):
            getattr(message, field)[:] = value
        else:
            setattr(message, field, value)

    return change


def without(name: str) -> Change:
    """A change that takes out a layer in place."""
    return lambda network: network.layer.remove(layer(network, name))


def set_size(sides: slice, values: list[int]) -> Change:
    """A change of some of the input's sides (images, channels, height, width)."""

    def change(network: Any) -> None:
        layer(network, "data").input_param.shape[0].dim[sides] = values

    return change


def with_layer(**fields: Any) -> Change:
    return lambda network: network.layer.add(**fields)


DEVIATIONS: dict[str, tuple[Change, str]] = {
    "another kernel": (
        set_field("2/inception1/branch3x3/0", "convolution_param.kernel_size", [5]),
        r"'2/inception1/branch3x3/0' is a 5x5 convolution with 2 filters, .*, where Model B has a 3x3 convolution",
    ),
    "oblong kernel": (set_field("1/conv1", "convolution_param.kernel_size", [7, 5]), "'1/conv1' is a 7x5 conv"),
    "padding": (set_field("1/conv1", "convolution_param.pad", [2]), "stride 2x2, padding 2x2, where .* padding 3x3"),
    "stride": (set_field("1/conv1", "convolution_param.stride", []), "'1/conv1' is .* stride 1x1.* stride 2x2"),
    "filters": (set_field("3/inception4/branch3x3dbl/0", "convolution_param.num_output", 4), "with 4 f.*with 8 f"),
    "odd width": (set_field("1/conv1", "convolution_param.num_output", 5), "5 filters: expected an even number"),
    "groups": (set_field("4/inception1/branch1x1/0", "convolution_param.group", 2), ", 2 groups, where"),
    "dilation": (set_field("4/inception1/branch3x3/0", "convolution_param.dilation", [2]), ", dilated, where"),
    "no bias": (set_field("4/inception1/branch3x3/0", "convolution_param.bias_term", False), ", no bias, where"),
    "no ReLU": (without("2/inception3/branch3x3/0/relu"), "'2/inception3/branch3x3/0' is .*, where Model B has ReLU"),
    "no classifier's ReLU": (without("relu1"), "'fc1' is a fully connected layer .*, where Model B has ReLU"),
    "leaky ReLU": (set_field("relu2", "relu_param.negative_slope", 0.1), "'relu2' is ReLU, with a negative slope"),
    "no module": (
        set_field("3/inception3/branch1x1/0", "bottom", ["3/inception1"]),
        "'3/inception3' joins branches of different blobs",
    ),
    "order of branches": (
        set_field(
            "2/inception1",
            "bottom",
            ["2/inception1/branch3x3/0", "2/inception1/branch1x1/0", "2/inception1/branch3x3dbl/2"],
        ),
        r"'2/inception1/branch1x1/0' is a 1x1 .* where Model B has a 3x3 .* \(segment2.inception1.branch3x3.0\)",
    ),
    "order of grids": (set_field("pyramid", "bottom", ["flat4", "flat2", "flat1"]), r"\[4, 2, 1\] .*the coarsest"),
    "two grids alike": (set_field("pyramid", "bottom", ["flat1", "flat2", "flat2", "flat4"]), "'flat2' is used twice"),
    "axis": (set_field("3/inception1", "concat_param.axis", 2), "along axis 2, where .* along axis 1"),
    "average pooling": (set_field("pool2", "pooling_param.pool", 1), "'pool2' is average pooling of 2x2"),
    "rounding": (set_field("pool2", "pooling_param.round_mode", 1), "'pool2' is .*, rounding down, where"),
    "overlapping pooling": (set_field("pool1", "pooling_param.kernel_size", 3), "'pool1' is max pooling of 3x3"),
    "grid": (set_field("grid2", "pooling_param.stride", 1), "'grid2' is max pooling of 2x2, stride 1x1, where"),
    "global pooling": (set_field("grid1", "pooling_param.global_pooling", True), "'grid1' is pooling of the whole"),
    "another type": (set_field("pool3", "type", "LRN"), "'pool3' is a layer of type LRN, where Model B has Pooling"),
    "hidden units": (set_field("fc2", "inner_product_param.num_output", 64), "'fc2' is .* with 64 .* 128 outputs"),
    "transposed": (set_field("fc2", "inner_product_param.transpose", True), "'fc2' is .*, transposed, where"),
    "classes": (set_field("fc3", "inner_product_param.num_output", 2**31), "is the file damaged"),
    "one class": (set_field("fc3", "inner_product_param.num_output", 1), "num_classes is 1"),
    "flattening": (set_field("flat2", "flatten_param.axis", 2), "'flat2' is flattening, of other axes"),
    "unknown blob": (set_field("fc1", "bottom", ["nowhere"]), "'fc1' reads 'nowhere', which no earlier layer produces"),
    "blob made twice": (set_field("pool2", "top", ["pool1"]), "'pool2' produces 'pool1', which an earlier layer also"),
    "no input": (set_field("1/conv1", "bottom", []), "'1/conv1' is an input, where Model B has Convolution"),
    "an auxiliary branch": (
        with_layer(name="aux", type="InnerProduct", bottom=["pool3"], top=["aux"]),
        r"ends in 2 layers \(prob, aux\): expected one",
    ),
    "a layer more": (with_layer(name="more", type="ReLU", bottom=["prob"], top=["more"]), "'more' is ReLU, where"),
    "grey images": (set_size(slice(1, 2), [1]), r"'data' has the size \(1, 64, 64\): expected 3 channels"),
    "oblong images": (set_size(slice(3, 4), [70]), r"'data' has the size \(3, 64, 70\): expected 3 channels and a sq"),
    "other images": (set_size(slice(2, 4), [96, 96]), "'grid1' is max pooling of 4x4, .* of a 6x6 map into a grid"),
    "no size": (set_field("data", "type", "Data"), "expected 3 channels and a square"),
}
IMAGES: dict[str, tuple[Change, str]] = {
    "a mean image": (set_field("images", "transform_param.mean_file", "m"), "'images' subtracts a mean image"),
    "other values": (set_field("images", "transform_param.scale", 0.1), "'images' subtracts .* or scales its values"),
    "two means": (set_field("images", "transform_param.mean_value", [1, 2]), "2 values of mean_value: expected one"),
    "no crop": (set_field("images", "transform_param.crop_size", 0), "expected 3 channels and a square"),
    "oblong": (set_field("images", "image_data_param.new_width", 80), "resized to 72x80: expected a square"),
}


@pytest.mark.parametrize("name", DEVIATIONS)
def test_another_network_is_refused_by_name(name: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    change, message = DEVIATIONS[name]
    refused(write_pair(tmp_path, THIN, state, change), message)


@pytest.mark.parametrize("name", IMAGES)
def test_other_images_are_refused(name: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    change, message = IMAGES[name]
    refused(write_pair(tmp_path, THIN, state, change, source="ImageData"), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>\n<html><body>GitHub</body></html>", "is a web page; download the raw file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 685025107\n", "is a Git LFS pointer"),
        (b"PK\x03\x04....", "is an archive"),
        (b"PK\x03\x04" + b"\0" * 26 + b"archive/data.pkl", "is a PyTorch file"),
        (b"\x80\x02\x8a\nl\xfc\x9c", "is a PyTorch file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(range(256)), "is an HDF5 file; .*snapshot_format: BINARYPROTO"),
        (b"\x93NUMPY\1\0v\0{'descr': '<f4'}", "is a NumPy file"),
        (b'\x18\0\0\0\0\0\0\0{"__metadata__":{"a":"b"}}', "is a safetensors file"),
        (b"\x08\xe8\x07\x12\x0fnet1.caffemodel\x20\x02", "is the state of a solver .* pass the .caffemodel"),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_files_of_failed_downloads_are_recognised(content: bytes, message: str, which: int, pair: Pair) -> None:
    pair[which].write_bytes(content)
    assert str(pair[which]) in refused(pair, message)


def test_swapped_arguments(pair: Pair) -> None:
    refused((pair[1], pair[0]), "are prototxt and caffemodel swapped")
    refused((pair[0], pair[0]), "it is text; are prototxt and caffemodel swapped")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: 'x'", "has no layers"),
        ("layer { name: 'x' ", "is not a Caffe prototxt"),
        ("a { " * 100_000, "is not a Caffe prototxt"),
        ("layers { type: NOVEL }", "is not a Caffe prototxt"),
        ("layer { blobs { data: 1.0 } }", "is not a Caffe prototxt"),
        ("input: 'data'\nlayer { name: 'x' }", "input 'data' has no size"),
        ("layer { name: 'data' type: 'Input' top: 'data' }", "has no size"),
        ("layer { name: 'x' top: 'y' }", r"ends in 0 layers \(none\)"),
        ("layer { name: 'x' bottom: 'y' top: 'y' }", "reads 'y', which no earlier layer produces"),
        ("layer { top: 'y' } layer { name: 'two' bottom: 'y' top: 'p' top: 'q' }", "'two' makes 2 blobs"),
        ("layer { top: 'y' } layer { bottom: 'y' top: 'y' type: 'N\\nN' }", r"a layer of type N\\nN, where Model B"),
    ],
)
def test_invalid_prototxts_are_refused(text: str, message: str, pair: Pair) -> None:
    pair[0].write_text(text)
    refused(pair, message)


def test_files_that_cannot_be_read(pair: Pair, tmp_path: Path) -> None:
    refused((tmp_path / "no", pair[1]), "no such file: .*no$")
    refused((pair[0], tmp_path / "no"), "no such file: .*no$")
    refused((tmp_path, pair[1]), "is not a file")
    with pair[1].open("wb") as file:
        file.truncate(reading.LARGEST_BINARY + 1)  # takes no space
    refused(pair, r"has 2,147,483,648 bytes, more than the limit of 2,147,483,647")
    with pair[0].open("wb") as file:
        file.truncate(reading.LARGEST_TEXT + 1)
    refused(pair, "are prototxt and caffemodel swapped")


def rewritten(pair: Pair, change: Callable[[Any], None]) -> Pair:
    network = NetParameter.FromString(pair[1].read_bytes())
    change(network)
    pair[1].write_bytes(network.SerializeToString())
    return pair


def blob(network: Any, name: str, number: int) -> Any:
    return layer(network, name).blobs[number]


def unpacked(network: Any) -> None:
    """Two numbers, each with its own tag, as other programs may write them."""
    one = blob(network, "fc1", 1)
    one.ClearField("data")
    one.MergeFromString(b"\x2d\0\0\x80\x3f" * 2)


def set_data(name: str, number: int, value: float, kind: str = "<f4") -> Change:
    """A change of all numbers of one blob."""

    def change(network: Any) -> None:
        one = blob(network, name, number)
        size = len(one.data) // 4
        one.ClearField("data")
        setattr(one, "data" if kind == "<f4" else "double_data", np.full(size, value, kind).tobytes())

    return change


def set_shape(name: str, number: int, shape: list[int]) -> Change:
    """A change of one blob's shape."""

    def change(network: Any) -> None:
        blob(network, name, number).shape.dim[:] = shape

    return change


BAD_WEIGHTS: dict[str, tuple[Change, str]] = {
    "no layer": (without("fc1"), "'fc1' is missing: expected its weights; is the file truncated"),
    "no layers": (lambda network: network.Clear(), "is empty"),
    "no weights": (
        lambda network: [layer.ClearField("blobs") for layer in network.layer],
        "has no weights: expected the caffemodel of a trained network",
    ),
    "no bias": (lambda network: layer(network, "1/conv1").blobs.pop(), "'1/conv1' has 1 blobs: expected two"),
    "a blob more": (
        lambda network: layer(network, "1/conv1").blobs.add(data=b"1234").shape.dim.append(1),
        "has 3 blobs",
    ),
    "twice": (lambda network: network.layer.append(network.layer[0]), "'1/conv1' occurs twice"),
    "another shape": (
        set_shape("fc3", 0, [128, 5]),
        r"'fc3', weight: shape \(128, 5\), expected \(5, 128\)",
    ),
    "a side more": (set_shape("fc3", 0, [5, 128, 2]), r"shape \(5, 128, 2\) but 2,560 bytes; is the file damaged"),
    "no shape": (
        lambda network: blob(network, "fc3", 0).ClearField("shape"),
        r"shape \(\) but .* bytes; is the file damaged",
    ),
    "negative sides": (set_shape("fc3", 0, [-5, -128]), "bytes; is the file damaged"),
    "odd bytes": (lambda network: setattr(blob(network, "fc2", 1), "data", b"123"), "bytes; is the file damaged"),
    "no numbers": (lambda network: blob(network, "fc2", 1).ClearField("data"), "'fc2', blob 1 has no packed values"),
    "unpacked numbers": (unpacked, "'fc1', blob 1 has no packed values"),
    "not a number": (set_data("fc3", 1, np.nan), "'fc3', bias has values that are infinite or NaN"),
    "infinite": (
        set_data("2/inception1/branch3x3/0", 0, np.inf),
        "'2/inception1/branch3x3/0', weight has values that are infinite",
    ),
    "too large for single precision": (set_data("fc3", 1, 1e300, "<f8"), "'fc3', bias has values that are infinite"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_are_refused_by_name(name: str, pair: Pair) -> None:
    change, message = BAD_WEIGHTS[name]
    assert str(pair[1]) in refused(rewritten(pair, change), message)


@pytest.mark.parametrize(("cuts", "ends"), [(15, 3), pytest.param(80, 20, marks=pytest.mark.slow)])
def test_a_file_cut_off_anywhere_is_refused(cuts: int, ends: int, state: dict[str, Tensor], tmp_path: Path) -> None:
    pair = write_pair(tmp_path, THIN, state, softmax=False)  # a text without its last layer might be good
    parts = [len(part.SerializeToString()) for part in messages(definition(THIN)[1], state)]
    between = {sum(parts[:count]) for count in range(len(parts))}  # there a part is a whole message
    assert sum(parts) == pair[1].stat().st_size
    for path, places in zip(pair, (set[int](), between), strict=True):
        whole = path.read_bytes()
        end = len(whole.rstrip()) if path == pair[0] else len(whole)
        for cut in {*range(0, end, end // cuts), *range(ends), *range(end - ends, end), *places}:
            path.write_bytes(whole[:cut])
            refused(pair, re.escape(str(path)))
        path.write_bytes(whole)
    import_caffe(*pair)


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_damaged_bytes_raise_only_input_errors(count: int, pair: Pair) -> None:
    dice = random.Random(0)
    for path in pair:
        whole = path.read_bytes()
        for _ in range(count):
            damaged = bytearray(whole)
            for _ in range(dice.choice((1, 3, 30))):
                damaged[dice.randrange(len(damaged) if dice.random() < 0.5 else 400)] = dice.randrange(256)
            path.write_bytes(damaged)
            with contextlib.suppress(InputError):  # some changes are weights as good as others
                import_caffe(*pair)
        path.write_bytes(whole)


# Class names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("abbey\nbar\ncave\ndam\nski slope\n", ("abbey", "bar", "cave", "dam", "ski slope")),
        ("/a/abbey\n/b/bar/outdoor\n\nc\nd\ne", ("abbey", "bar/outdoor", "c", "d", "e")),
        ("/b/bar 1\n/a/abbey 0\n/c/cave 2\n/d/dam 3\n/e/eel 4\n", ("abbey", "bar", "cave", "dam", "eel")),
    ],
)
def test_class_names(text: str, names: tuple[str, ...], pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text(text)
    assert import_caffe(*pair, tmp_path / "classes.txt").classes == names
    assert import_caffe(*pair).classes == tuple(f"class {number}" for number in range(5))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\n", "has 2 class names: expected 5, the number of the network's outputs"),
        (b"", "has 0 class names"),
        (b"a 0\nb 1\nc 2\nd 3\ne 5\n", "leaves out class 4"),
        (b"\xff\xfe", "is not text"),
    ],
)
def test_wrong_class_names(content: bytes, message: str, pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(content)
    refused(pair, message, tmp_path / "classes.txt")
    refused(pair, "no such file", tmp_path / "nowhere.txt")
