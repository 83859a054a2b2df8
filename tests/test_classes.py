"""Classes keep their identity: matched by key between training sets, validation sets, models and scores."""

import json
import logging
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from relaylab.cli import main
from relaylab.data.sources.classes import Classes, look_alikes, match
from relaylab.data.sources.opening import open_source
from relaylab.errors import InputError
from relaylab.evaluate.submission import FORMATS, official_labels, read_kit, submission_lines
from relaylab.models.file import KEY, read_model, read_tensors, save_tensors

COUNT = 11  # folders 0 .. 10, which sort as 0, 1, 10, 2, ...


def numbered(*names: str) -> Classes:
    """The classes of a list: without names, or with these."""
    return Classes(names or tuple(map(str, range(COUNT))), names or tuple(map(str, range(COUNT))), numbered=True)


def folders(*keys: str, names: Sequence[str] = ()) -> Classes:
    return Classes(keys, tuple(names) or keys)


CRANES = folders("n1", "n2", "n3", names=("tench", "crane (n2)", "crane (n3)"))
DIGITS = folders(*sorted(map(str, range(COUNT))))


@pytest.mark.parametrize(
    ("own", "wanted", "used", "places"),
    [
        (folders("b"), folders("a", "b"), [0], (1,)),
        (folders("10", "2"), DIGITS, [0, 1], (2, 3)),
        (numbered(), DIGITS, range(COUNT), (0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 2)),
        (DIGITS, numbered(), range(COUNT), (0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9)),
        (numbered(), numbered(), range(COUNT), tuple(range(COUNT))),
        (numbered(), folders("3", "5", "7"), [3, 7], (-1, -1, -1, 0, -1, 1, -1, 2, -1, -1, -1)),
        (numbered(), folders("003", "005", "010"), [3, 10], (-1, -1, -1, 0, -1, 1, -1, -1, -1, -1, 2)),
        (numbered("zoo", "bus"), folders("bus", "zoo"), [0, 1], (1, 0)),
        (numbered("zoo", "bus"), numbered("bus", "zoo"), [0, 1], (1, 0)),
        (numbered("zoo", "bus"), numbered(), [0, 1], (0, 1)),
        (numbered("0", "1", "10", "2"), DIGITS, [2, 3], (0, 1, 2, 3)),
        (CRANES, CRANES, [0, 1, 2], (0, 1, 2)),
        (folders("n1", "n3"), CRANES, [0, 1], (0, 2)),
        (CRANES, folders("n3", "n2", "n1"), [0, 1, 2], (2, 1, 0)),
        (folders("tench"), CRANES, [0], (0,)),
        (CRANES, folders("tench", "bus"), [0], (0, -1, -1)),
        (CRANES, Classes.stored(["tench", "crane", "crane"], None, numbered=False), [0, 1, 2], (0, 1, 2)),
        (folders("a", "empty"), folders("a", "b"), [0], (0, -1)),
        (numbered(), Classes.of([f"class {number}" for number in range(COUNT)]), [10], tuple(range(COUNT))),
    ],
)
def test_classes_match_by_key(own: Classes, wanted: Classes, used: Sequence[int], places: tuple[int, ...]) -> None:
    assert match(own, wanted, title="others", used=used) == (places, "")


@pytest.mark.parametrize(
    ("own", "wanted", "used", "message"),
    [
        (folders("c", "a"), folders("a", "b"), [0, 1], "others has unexpected classes: c; .* a, b"),
        (folders("11", "12"), DIGITS, [0, 1], "unexpected classes: 11, 12; expected the 11 classes 0, 1, 10"),
        (numbered(), folders("3", "5", "7"), [0, 1, 2], "unexpected labels: 0, 1, 2; .* 3, 5, 7"),
        (numbered(), folders("1st", "2", "3"), [0, 1], "unexpected labels: 0, 1; .* 1st, 2, 3"),
        (numbered(), folders("a", "b"), [2], "unexpected labels: 2; .* a, b"),
        (folders("a", "b"), numbered(), [0, 1], "unexpected classes: a, b; expected the 11 classes 0, 1, 2"),
        (numbered("cat", "dog"), numbered("bus", "zoo"), [0, 1], "unexpected classes: cat, dog"),
        (
            folders("crane"),
            CRANES,
            [0],
            "unexpected classes: crane; .* several classes are called crane: name the folders",
        ),
        (folders("crane"), Classes(CRANES.keys, ("tench", "crane", "crane")), [0], "several classes are called crane"),
        (folders("Bus"), folders("bus"), [0], "'Bus' and 'bus' differ only in case"),
        (folders("n1"), folders("tench", "crane"), [0], "add the file with the names"),
    ],
)
def test_classes_that_cannot_be_matched_are_refused(
    own: Classes, wanted: Classes, used: Sequence[int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        match(own, wanted, title="others", used=used)


@pytest.mark.timeout(60)  # a search that is quadratic in the classes takes minutes
def test_many_repeated_classes_are_refused_quickly() -> None:
    keys = tuple(map(str, range(50_000))) * 2
    with pytest.raises(InputError, match="more than once"):
        Classes(keys, keys)
    wanted = Classes(keys[:50_000], ("crane",) * 50_000)
    with pytest.raises(InputError, match="several classes are called crane"):
        match(Classes(("crane",), ("crane",)), wanted, title="others")
    with pytest.raises(InputError, match="unexpected classes"):
        match(Classes.of([f"x{key}" for key in keys[:50_000]]), wanted, title="others")


def test_matching_by_rank_returns_a_remark() -> None:
    places, remark = match(numbered(), folders("n2", "n1"), title="val.txt", used=[0, 1])
    assert places[:2] == (0, 1)
    assert "val.txt has no class names: label 0 is taken to be n2" in remark


def test_names_that_look_alike() -> None:
    name = unicodedata.normalize("NFC", "caf\u00e9")
    decomposed = unicodedata.normalize("NFD", name)
    assert look_alikes([name], [decomposed]) == [
        r"'caf\xe9' and 'cafe\u0301' differ only in Unicode form (NFC and NFD)"
    ]
    assert look_alikes(["a b"], ["a  b "]) == ["'a b' and 'a  b ' differ only in white space"]
    assert "white space" in look_alikes(["a b"], ["a\u00a0b"])[0]
    assert "white space" in look_alikes(["bus"], ["bus\u200b"])[0]
    assert "case, Unicode form and white space" in look_alikes(["Caf\u00e9 x"], ["cafe\u0301  x"])[0]
    assert look_alikes(["bus", "zoo"], ["bus", "car"]) == []


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training folders 0 .. 10; the same validation images as folders, as a flat list, and with names beside."""
    root = tmp_path_factory.mktemp("digits")
    lines: list[str] = []
    for number in range(COUNT):
        picture(root / f"train/{number}/a.png", number)
        picture(root / f"train/{number}/b.png", 100 + number)
        for copy in range(2):
            picture(root / f"tree/{number}/{copy}.png", 1000 * (1 + copy) + number)
            picture(root / f"flat/img_{number}_{copy}.png", 1000 * (1 + copy) + number)
            lines.append(f"img_{number}_{copy}.png {number}\n")
    (root / "flat" / "val.txt").write_text("".join(lines))
    (root / "named").mkdir()
    (root / "named" / "val.txt").write_text("".join(lines))
    (root / "named" / "categories.txt").write_text("".join(f"{number} {number}\n" for number in range(COUNT)))
    (root / "tree.txt").write_text("".join(f"{number}/{copy}.png {number}\n" for number in range(11) for copy in "01"))
    return root


LISTS = (("flat/val.txt", "flat"), ("named/val.txt", "flat"), ("tree.txt", "tree"))


@pytest.mark.parametrize("paths", LISTS)
def test_the_labels_of_a_list_are_those_of_folders_called_by_numbers(paths: Sequence[str], digits: Path) -> None:
    train = open_source(digits / "train")
    assert list(train.folders[:4]) == ["0", "1", "10", "2"]
    source = open_source([digits / path for path in paths], classes=train.identity)
    by_name = {source.name(i).rpartition("img_")[2].rpartition("tree/")[2]: i for i in range(len(source))}
    for name, index in by_name.items():
        assert train.folders[source.labels[index]] == name.partition("_")[0].partition("/")[0]


@pytest.fixture(scope="module")
def digits_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(train_command(digits / "train", out, "--val-data", str(digits / "tree"))) == 0
    return out


def train_command(data: Path, out: Path, *more: str, classes: int = COUNT) -> list[str]:
    sets = [f"network.num_classes={classes}", "optimizer.iterations=4", "optimizer.evaluate_every=4"]
    command = ["train", "table1-vgg13-imagenet", "--scale", "tiny", "--workers", "0", "--diagnose-every", "0"]
    return [*command, "--data", str(data), "--out", str(out), *more, "--set", *sets]


def last(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_training_sees_the_same_classes_by_a_list(digits: Path, digits_run: Path, tmp_path: Path) -> None:
    paths = [str(digits / path) for path in LISTS[0]]
    assert main(train_command(digits / "train", tmp_path / "run", "--val-data", *paths)) == 0
    assert last(tmp_path / "run")["loss"] == pytest.approx(last(digits_run)["loss"], rel=1e-6)
    assert last(tmp_path / "run")["top1"] == last(digits_run)["top1"]


def errors(run: Path, out: Path, *data: Path | str) -> tuple[float, str]:
    paths = ["--data", *map(str, data), "--split", "all"] if data else []
    assert main(["eval", str(run), "--out", str(out), "--workers", "0", *paths]) == 0
    found = json.loads((out / "evaluation.json").read_text())
    return found["errors"][0]["top5"]["value"], (out / "evaluation.md").read_text().splitlines()[0]


def test_evaluation_sees_the_same_classes_by_a_list(digits: Path, digits_run: Path, tmp_path: Path) -> None:
    right, title = errors(digits_run, tmp_path / "tree", digits / "tree")
    assert 0 < right < 100
    assert title.endswith("22 images, 11 classes")
    for number, paths in enumerate(LISTS):
        assert errors(digits_run, tmp_path / f"list{number}", *(digits / path for path in paths))[0] == right


def test_a_subset_is_evaluated_as_a_subset(digits: Path, digits_run: Path, tmp_path: Path) -> None:
    for name in ("3", "10"):
        for copy in range(2):
            picture(tmp_path / f"some/{name}/{copy}.png", 1000 * (1 + copy) + int(name))
    lines = (digits / "flat" / "val.txt").read_text().splitlines()
    chosen = [line for line in lines if line.split()[1] in ("3", "10")]
    (tmp_path / "some.txt").write_text("\n".join(chosen))
    right, title = errors(digits_run, tmp_path / "tree", tmp_path / "some")
    assert title.endswith("4 images, 2 of 11 classes")
    assert errors(digits_run, tmp_path / "list", tmp_path / "some.txt", digits / "flat") == (
        right,
        "# some.txt: 4 images, 2 of 11 classes",
    )


def test_other_numbers_are_refused(
    digits: Path, digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "others/11/1.png", 1)
    picture(tmp_path / "others/12/1.png", 1)
    command = ["eval", str(digits_run), "--out", str(tmp_path / "scores"), "--split", "all", "--workers", "0"]
    assert main([*command, "--data", str(tmp_path / "others")]) == 2
    assert "unexpected classes: 11, 12; expected the 11 classes 0, 1, 10" in capsys.readouterr().err
    assert not (tmp_path / "scores").exists()


def test_a_model_file_of_an_earlier_version_is_matched_by_its_names(
    digits: Path, digits_run: Path, tmp_path: Path
) -> None:
    """Files of earlier versions have names only."""
    path = digits_run / "model.safetensors"
    tensors, metadata = read_tensors(path)
    header = json.loads(metadata[KEY])
    assert header["keys"] == sorted(map(str, range(COUNT)))
    del header["keys"], header["numbered"]
    old = tmp_path / "old.safetensors"
    save_tensors(tensors, old, {KEY: json.dumps(header)})
    if header["has_mean_image"]:
        mean, _ = read_tensors(path.with_name("model.mean.safetensors"))
        save_tensors(mean, tmp_path / "old.mean.safetensors", {})
    assert read_model(old).identity == read_model(path).identity
    right, _ = errors(digits_run, tmp_path / "new", digits / "tree")
    assert errors(old, tmp_path / "scores", *(digits / path for path in LISTS[0]))[0] == right


@pytest.fixture(scope="module")
def cranes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three synsets, two of which the file beside calls crane; and a run on them."""
    root = tmp_path_factory.mktemp("cranes")
    for number, name in enumerate(("n01440764", "n02012849", "n03126707")):
        for copy in range(8):
            picture(root / f"data/train/{name}/{copy}.png", 10 * number + copy)
            picture(root / f"data/val/{name}/{copy}.png", 100 + 10 * number + copy)
            picture(root / f"plain/{name}/{copy}.png", 100 + 10 * number + copy)
            if number < 2:
                picture(root / f"some/{name}/{copy}.png", 100 + 10 * number + copy)
    mapping = "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\n"
    (root / "data" / "LOC_synset_mapping.txt").write_text(mapping)
    assert main(train_command(root / "data", root / "run", classes=3)) == 0
    return root


def test_two_classes_of_one_name(cranes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right, _ = errors(cranes / "run", tmp_path / "own")
    assert errors(cranes / "run", tmp_path / "data", cranes / "data" / "val")[0] == right
    assert errors(cranes / "run", tmp_path / "plain", cranes / "plain")[0] == right
    assert errors(cranes / "run", tmp_path / "some", cranes / "some")[1].endswith("16 images, 2 of 3 classes")
    capsys.readouterr()
    command = ["predict", str(cranes / "run"), str(cranes / "data/val/n02012849/0.png")]
    assert main([*command, "--format", "json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert {each["key"] for each in found["classes"]} == {"n01440764", "n02012849", "n03126707"}
    assert len({each["name"] for each in found["classes"]}) == 3, "the two cranes are told apart"
    out = tmp_path / "information"
    assert main(["diagnose", "information", str(cranes / "run"), "--images", "24", "--out", str(out)]) == 0


def test_scores_of_an_earlier_version_are_still_used(cranes: Path, tmp_path: Path) -> None:
    """They have names for the classes, and a fingerprint that was made of these."""
    right, _ = errors(cranes / "run", tmp_path / "scores", cranes / "some")
    labels = tmp_path / "scores" / "labels.safetensors"
    tensors, header = read_tensors(labels)
    assert json.loads(header["keys"]) == ["n01440764", "n02012849", "n03126707"]
    save_tensors(tensors, labels, {name: header[name] for name in ("title", "fingerprint", "classes")})
    chunk = next((tmp_path / "scores").rglob("000000.safetensors"))
    time = chunk.stat().st_mtime_ns
    assert errors(cranes / "run", tmp_path / "scores", cranes / "some")[0] == right
    assert chunk.stat().st_mtime_ns == time, "nothing was computed again"


def test_networks_with_other_orders_of_the_same_classes_are_one_ensemble(
    digits: Path, digits_run: Path, tmp_path: Path
) -> None:
    """One was trained on folders 0, 1, 10, 2, ..., the other one has the outputs of a list: 0, 1, 2, ..."""
    path = digits_run / "model.safetensors"
    tensors, metadata = read_tensors(path)
    header = json.loads(metadata[KEY])
    order = torch.tensor([header["keys"].index(str(number)) for number in range(COUNT)])
    outputs = [name for name, tensor in tensors.items() if tensor.shape[0] == COUNT]
    assert outputs
    listed = tmp_path / "listed.safetensors"
    keys = list(map(str, range(COUNT)))
    changed = {**header, "keys": keys, "classes": [f"class {key}" for key in keys], "numbered": True}
    save_tensors(tensors | {name: tensors[name][order] for name in outputs}, listed, {KEY: json.dumps(changed)})
    if header["has_mean_image"]:
        mean, _ = read_tensors(path.with_name("model.mean.safetensors"))
        save_tensors(mean, tmp_path / "listed.mean.safetensors", {})
    out = tmp_path / "scores"
    command = ["eval", str(digits_run), str(listed), "--data", str(digits / "tree"), "--split", "all"]
    assert main([*command, "--ensemble", "average", "--out", str(out), "--workers", "0"]) == 0
    found = json.loads((out / "evaluation.json").read_text())
    one, two = (entry["top1"]["value"] for entry in found["errors"])
    assert one == two == found["ensembles"][0]["errors"]["top1"]["value"]


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ("abc", ["a", "b", "images"], "classes with train images but no val images: c; classes with val images but no"),
        (["caf\u00e9", "b"], ["cafe\u0301", "b"], r"'caf\xe9' and 'cafe\u0301' differ only in Unicode form"),
        (["Cat", "b"], ["cat", "b"], "'Cat' and 'cat' differ only in case"),
        (["a b", "b"], ["a  b", "b"], "'a b' and 'a  b' differ only in white space"),
    ],
)
def test_classes_of_one_part_only_are_refused_by_name(
    train: Sequence[str], val: Sequence[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, names in (("train", train), ("val", val)):
        for number, name in enumerate(names):
            picture(tmp_path / f"data/{part}/{name}/1.png", number)
    assert main(train_command(tmp_path / "data", tmp_path / "run", classes=2)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "num_classes" not in error, "no advice to train on nothing"
    assert not (tmp_path / "run").exists()


def test_classes_without_images_are_not_suggested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        (tmp_path / f"data/{part}/empty").mkdir(parents=True)
        for number, name in enumerate("ab"):
            picture(tmp_path / f"data/{part}/{name}/1.png", number)
    assert main(train_command(tmp_path / "data", tmp_path / "run", classes=2)) == 2
    error = capsys.readouterr().err
    assert "remove the 1 classes without images (empty folders" in error
    assert ": empty" in error
    assert "num_classes" not in error


def test_a_guess_is_logged_on_each_opening(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "1.png", 1)
    (tmp_path / "val.txt").write_text("1.png 1\n")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            source = open_source(tmp_path / "val.txt", classes=["n1", "n2"])
        assert source.labels.tolist() == [1]
        assert "label 0 is taken to be n1" in caplog.text


def test_submissions_have_the_official_labels(tmp_path: Path) -> None:
    places2, ilsvrc = FORMATS["places2"], FORMATS["ilsvrc"]
    assert official_labels(DIGITS, places2) == [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]
    assert official_labels(folders("1", "10", *map(str, range(2, 10))), ilsvrc) == [1, 10, *range(2, 10)]
    assert official_labels(numbered("zoo", "bus"), places2) == [0, 1]
    synsets = folders("n01440764", "n02012849")
    with pytest.raises(InputError, match=r"define the labels of the \w+: give it with --kit"):
        official_labels(synsets, ilsvrc)
    kit = tmp_path / "map_clsloc.txt"
    kit.write_text("n02012849 1 crane\nn01440764 2 tench\n")
    assert official_labels(synsets, ilsvrc, read_kit(kit)) == [2, 1]
    with pytest.raises(InputError, match="the development kit lacks the classes n3; it contains n01440764, n02012849"):
        official_labels(folders("n3"), ilsvrc, read_kit(kit))
    kit.write_text("tench\n")
    with pytest.raises(InputError, match=r"expected meta.mat, or SYNSET NUMBER lines as in map_clsloc.txt"):
        read_kit(kit)
    scores = torch.eye(6).roll(2, dims=1)
    lines = submission_lines(list("abcdef"), scores, list("abcdef"), places2, [5, 4, 3, 2, 1, 0])
    assert [line.split()[1] for line in lines] == ["3", "2", "1", "0", "5", "4"]
