"""Damaged and hostile files of every kind, from a harness; RELAYLAB_MUTATIONS=N runs N cases, RELAYLAB_SEED others."""

import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro", reason="needs the lab extra")

import numpy as np
import torch
from PIL import Image

import mutations
from caffe_files import THIN, random_state, write_pair
from mutations import ALLOWED, Kind
from relaylab.cli import main
from relaylab.data import decode as decoding
from relaylab.data.geometry import CropSpec
from relaylab.data.sources.opening import open_source
from relaylab.data.sources.source import LARGEST_FILE, Source
from relaylab.data.statistics import image_statistics
from relaylab.evaluate.predict import find_pictures, open_network, predict
from relaylab.evaluate.results import read_ensembles
from relaylab.evaluate.scores import ScoreFolder
from relaylab.models.building import build_relay
from relaylab.models.caffe.importing import import_caffe
from relaylab.outside.reading import read_bytes, typed
from relaylab.recipes.files import read_recipe
from relaylab.report.comparison import open_runs
from relaylab.train import checkpoint, requests, run_folder
from relaylab.train.options import TrainOptions
from relaylab.train.state import Progress, State, load_tensors

CASES = int(os.environ.get("RELAYLAB_MUTATIONS", 200))
SEED = int(os.environ.get("RELAYLAB_SEED", 0))


def contents(source: Source) -> Any:
    """What a data set is to a training: images by name with labels and content."""
    images: list[Any] = []
    for number in range(len(source)):
        try:
            images.append((source.name(number), int(source.labels[number]), hash(source.read(number))))
        except OSError as error:
            images.append((source.name(number), str(error)))
    return list(source.classes), images


def images_of(folder: Path, *more: Path) -> Any:
    cache = folder.with_name(f"{folder.name}-cache")
    source = open_source([folder, *more], cache=cache)
    found = contents(source)
    source.close()
    return found


def tree_of(root: Path, count: int = 3) -> Path:
    random = np.random.default_rng(0)
    for label in "abc":
        (root / label).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, (24, 28, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{number}.jpg")
    for path in sorted(root.rglob("*"), reverse=True):
        os.utime(path, (1e9, 1e9))
    return root


def read_model_files(folder: Path) -> Any:
    network = open_network(folder / "model.safetensors")
    (found,) = predict(network, find_pictures([folder / "image.jpg"], bytes))
    if isinstance(found, Exception):
        raise found
    return [asdict(guess) for guess in found.guesses]


def read_onnx(folder: Path) -> Any:
    (found,) = predict(open_network(folder / "model.onnx"), find_pictures([folder / "image.jpg"], bytes))
    if isinstance(found, Exception):
        raise found
    return [guess.name for guess in found.guesses]


def read_scores(folder: Path) -> Any:
    scores = ScoreFolder(folder)
    found = {name: scores.protocol(name, "single-crop").tolist() for name in scores.names()}
    read_ensembles(scores)
    return found, scores.images.labels.tolist(), scores.images.names


def read_run(folder: Path) -> Any:
    found = open_runs([folder])
    requests.resolve(TrainOptions(resume=str(folder)))
    return [(len(run.metrics), run.last) for run in found.runs]


def read_checkpoint(folder: Path) -> Any:
    found = checkpoint.read(folder / "step-00000002")
    return {name: tensor.tolist() for name, tensor in found.model.items()}


def read_tampered(folder: Path, recipe: Any) -> None:
    """As `read_checkpoint`, with right sums: of someone who means it."""
    path = folder / "step-00000002"
    names = (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE)
    sums = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names if (path / name).is_file()}
    (path / checkpoint.SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    found = checkpoint.read(path)
    typed(found.state, State, str(path))
    run_folder.value_changes(found.state["recipe"], recipe, path)
    relay = build_relay(recipe)
    optimizer = torch.optim.SGD(relay.parameters(), lr=0.1, momentum=0.9)
    load_tensors(relay, optimizer, found.model, found.optimizer)
    Progress.from_state(found.state)


def read_names(folder: Path) -> Any:
    return images_of(folder / "data")


def read_caches(folder: Path, data: Path) -> Any:
    """Read a data set that is whole with a cache that may be damaged."""
    source = open_source(data, cache=folder)
    found = image_statistics(source, CropSpec(size=8, short_side=8), key="k", folder=folder / "sums")
    read = contents(source)
    source.close()
    return read, found.count, found.mean.tolist(), found.unreadable


def read_list(folder: Path) -> Any:
    return images_of(folder / "data" / "list.txt")


def read_image(folder: Path) -> Any:
    shapes: list[Any] = []
    for file in sorted(folder.glob("x.*")):
        try:
            shapes.append(decoding.decode(read_bytes(file, LARGEST_FILE)).shape)
        except decoding.ImageFault as fault:
            shapes.append(str(fault))
    return shapes


def read_caffe(folder: Path) -> Any:
    model = import_caffe(folder / "net.prototxt", folder / "net.caffemodel", folder / "classes.txt")
    return model.classes


def onnx_program(path: Path, size: int) -> None:
    onnx = pytest.importorskip("onnx")
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    weights = onnx.numpy_helper.from_array(np.random.default_rng(0).random((3, 4), dtype=np.float32), "w")
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["images"], ["means"]),
            helper.make_node("Flatten", ["means"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["scores"]),
        ],
        "g",
        [helper.make_tensor_value_info("images", floats, ["batch", 3, size, size])],
        [helper.make_tensor_value_info("scores", floats, ["batch", 4])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    about = {
        "input": {"resize": size, "how": "shorter side", "crop": size},
        "classes": list("abcd"),
        "keys": list("abcd"),
    }
    helper.set_model_props(model, {name: json.dumps(value) for name, value in about.items()})
    onnx.save(model, str(path))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> dict[str, Kind]:
    base = tmp_path_factory.mktemp("mutations")
    run = base / "run" / "relay-s0"
    changes = ["scheme=relay", "optimizer.iterations=2", "optimizer.evaluate_every=1", "optimizer.batch_size=4"]
    words = ["train", "table3-model-a-relay", "--scale", "tiny", "--data", str(tiny_images), "--out", str(run)]
    assert main([*words, "--workers", "0", "--diagnose-every", "1", "--set", *changes]) == 0
    other = base / "other"
    shutil.copytree(run, other)
    assert (
        main(["eval", str(run), str(other), "--out", str(base / "scores"), "--ensemble", "product", "--workers", "0"])
        == 0
    )
    image = next(tiny_images.rglob("*.png"))
    model = base / "model"
    model.mkdir()
    Image.open(image).save(model / "image.jpg")
    for name in ("model.safetensors", "model.mean.safetensors"):
        if (run / name).exists():
            shutil.copy(run / name, model)
    checkpoints = base / "checkpoints"
    shutil.copytree(run / run_folder.CHECKPOINTS, checkpoints)
    recipe = requests.recipe_of(run)
    (base / "list").mkdir()
    data = tree_of(base / "list" / "data")
    (data / "list.txt").write_text("".join(f"{c}/{n}.jpg {label}\n" for label, c in enumerate("abc") for n in range(3)))
    (data / "categories.txt").write_text("".join(f"/{c}/{c}road {label}\n" for label, c in enumerate("abc")))
    (data / "classes.txt").write_text("1 a market/outdoor\n2 b tench, Tinca\n3 c x y\n")
    rows = [f"{n},{c}/{n}.jpg,{c}" for c in "abc" for n in range(3)]
    shutil.copytree(data, base / "names" / "data")
    shutil.copytree(base / "names", base / "csv")
    (base / "csv" / "data" / "list.csv").write_text("\n".join(["id,filename,label", *rows]) + "\n")
    for name in ("list.txt", "categories.txt"):
        (base / "names" / "data" / name).unlink()
        (base / "csv" / "data" / name).unlink()
    for name, form in (("tar", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        (base / name).mkdir()
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=form) as archive:
            archive.add(data, ".")
            archive.addfile(tarfile.TarInfo(f"a/{'long' * 60}.txt"))
        (base / name / "data.tar").write_bytes(packed.getvalue())
    (base / "packed").mkdir()
    (base / "packed" / "data.tar.gz").write_bytes(gzip.compress(packed.getvalue()))
    (base / "image").mkdir()
    picture = Image.open(image).convert("RGB")
    for suffix, options in {
        "png": {}, "jpg": {}, "jpeg": {"progressive": True}, "gif": {}, "tif": {"compression": "tiff_lzw"},
        "webp": {}, "bmp": {}, "ppm": {},
    }.items():  # fmt: skip
        picture.save(base / "image" / f"x.{suffix}", **options)
    (base / "caffe").mkdir()
    torch.manual_seed(0)
    write_pair(base / "caffe", THIN, random_state(THIN))
    (base / "caffe" / "classes.txt").write_text("".join(f"class{n} {n}\n" for n in range(THIN.num_classes)))
    (base / "onnx").mkdir()
    onnx_program(base / "onnx" / "model.onnx", 32)
    shutil.copy(model / "image.jpg", base / "onnx")
    (base / "recipe").mkdir()
    from relaylab.recipes.files import to_toml

    (base / "recipe" / "recipe.toml").write_text(to_toml(recipe))
    whole = tree_of(base / "whole")
    read_caches(base / "cache", whole)
    damaged = (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE)
    kept = ("config.json", "environment.json", "metrics.jsonl")
    kinds = {
        "model": Kind(model, _files(model, suffix=".safetensors"), read_model_files, has_oracle=True),
        "onnx": Kind(base / "onnx", ["model.onnx"], read_onnx),
        "scores": Kind(base / "scores", _files(base / "scores"), read_scores, has_oracle=True),
        "run": Kind(base / "run", _files(base / "run", *kept), lambda f: read_run(f / run.name)),
        "checkpoint": Kind(checkpoints, _files(checkpoints), read_checkpoint, has_oracle=True),
        "tampered": Kind(checkpoints, _files(checkpoints, *damaged), lambda f: read_tampered(f, recipe)),
        "list": Kind(base / "list", ["data/list.txt", "data/categories.txt"], read_list),
        "csv": Kind(base / "csv", ["data/list.csv"], lambda f: images_of(f / "data" / "list.csv")),
        "names": Kind(base / "names", ["data/classes.txt"], read_names),
        "cache": Kind(base / "cache", _files(base / "cache"), lambda f: read_caches(f, whole), has_oracle=True),
        "image": Kind(base / "image", _files(base / "image"), read_image),
        "caffe": Kind(base / "caffe", _files(base / "caffe"), read_caffe),
        "recipe": Kind(base / "recipe", ["recipe.toml"], lambda f: read_recipe(f / "recipe.toml").name),
    }
    for name, file in {"tar": "data.tar", "pax": "data.tar", "packed": "data.tar.gz"}.items():
        kinds[name] = Kind(base / name, [file], lambda f, file=file: images_of(f / file))
    return kinds


def _files(folder: Path, *names: str, suffix: str = "") -> list[str]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name.endswith(suffix)]
    return [str(path.relative_to(folder)) for path in paths if not names or path.name in names]


def test_whole_files_are_right_within_the_limits(kinds: dict[str, Kind], tmp_path: Path) -> None:
    for name, kind in kinds.items():
        shutil.copytree(kind.folder, tmp_path / name / "case")
        folder, expected = tmp_path / name / "case", kind.read(kind.folder)
        told = mutations.in_child(partial(mutations.judge, kind, folder, expected), tmp_path / "told")
        assert told == ("right", ""), name


def test_damaged_and_hostile_files(kinds: dict[str, Kind], tmp_path: Path) -> None:
    cases = mutations.run(kinds, CASES, SEED, tmp_path)
    bad = [case for case in cases if case.outcome not in ALLOWED]
    print(mutations.table(cases))
    assert not bad, "\n\n".join([mutations.table(cases), *map(str, bad)])


def test_the_harness_detects_planted_errors(tmp_path: Path) -> None:
    """Negative controls: each outcome that is not allowed."""

    def read(folder: Path) -> Any:
        text = (folder / "x").read_text()
        actions: dict[str, Any] = {
            "wrong": lambda: 2,
            "traceback": lambda: [][1],
            "memory": lambda: bytes(2 << 30),
            "hang": lambda: [None for _ in iter(int, 1)] and None,
            "crash": os.abort,
        }
        return actions[text]() if text in actions else 1

    for outcome in ("wrong", "traceback", "memory", "crash"):
        (tmp_path / "x").write_text(outcome)
        kind = Kind(tmp_path, ["x"], read, has_oracle=True)
        assert mutations.in_child(lambda kind=kind: mutations.judge(kind, tmp_path, 1), tmp_path / "told")[0] == outcome
