"""CSV files with a header as labelled lists: columns, delimiters, names, classes, and what is wrong with them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("simplejpeg", reason="needs the lab extra")

from relaylab.cli import main
from relaylab.data.sources.index import IndexedImages
from relaylab.data.sources.opening import open_source
from relaylab.data.sources.subset import Subset
from relaylab.errors import InputError
from test_sources import names, write

Open = Callable[..., IndexedImages]
FILES = {f"000{number}.jpg": f"image {number}" for number in range(5)}


@pytest.fixture
def listed(tmp_path: Path) -> Open:
    """Open a CSV file of this text with a folder of five images."""
    root = write(tmp_path / "images", FILES)

    def open_text(text: str | bytes, name: str = "labels.csv", **options: object) -> IndexedImages:
        path = write(tmp_path, {name: text}) / name
        return open_source([root, path], cache=tmp_path / "cache", **options)

    return open_text


def labels(source: IndexedImages) -> list[tuple[str, str]]:
    """Each image's name, and the name of its class."""
    return [(source.relative_name(n).decode(), source.classes[label]) for n, label in enumerate(source.labels)]


def several(source: IndexedImages) -> dict[str, set[str]]:
    """The classes of each image."""
    assert source.targets is not None
    assert (source.targets.dtype, source.labels.tolist()) == (np.uint8, [-1] * len(source))
    return {
        source.relative_name(n).decode(): {source.classes[place] for place in np.flatnonzero(row)}
        for n, row in enumerate(source.targets)
    }


EXPECTED = [("0002.jpg", "dog"), ("0000.jpg", "cat"), ("0003.jpg", "dog")]


@pytest.mark.parametrize(
    "text",
    [
        "filename,label\n0002.jpg,dog\n0000.jpg,cat\n0003.jpg,dog\n",
        "\ufeffid,age,breed,Class\n0002,7,x,dog\n0000,8,y,cat\n0003,9,z,dog\n",  # no extensions, a BOM
        "Label;Image ID\r\ndog;0002\r\ncat;0000\r\n\r\ndog;0003\r\n",
        "target\twhere it is\ndog\t/0002.jpg\ncat\t./0000.jpg\ndog\t0003\n",  # found by its values
        'path,note,category\n"0002.jpg","a, b\nand c",dog\n"0000.jpg","",cat\n"0003.jpg",e,"dog"\n',
        "file,label,class_id\n0002.jpg,dog,5\n0000.jpg,cat,4\n0003.jpg,dog,5\n",
        "name,cat,dog\n0002,0,1\n0000,1,0\n0003,0.0,1.0\n",  # one label each
    ],
)
def test_columns_are_recognised(text: str, listed: Open) -> None:
    source = listed(text)
    assert (labels(source), source.classes, source.folders) == (EXPECTED, ("cat", "dog"), ("cat", "dog"))
    assert source.targets is None
    assert source.read(1) == b"image 0"


def test_names_may_be_below_folders_or_whole_paths(tmp_path: Path, listed: Open) -> None:
    write(tmp_path / "images" / "a" / "b", {"0.v2.png": "deep"})
    source = listed(f"image,label\na/b/0.v2,x\n{tmp_path / 'images'}/0000.jpg,y\n")
    assert labels(source) == [("a/b/0.v2.png", "x"), ("0000.jpg", "y")]


def test_numbers_are_sorted_as_numbers_and_categories_name_them(tmp_path: Path, listed: Open) -> None:
    text = "file,label\n0002.jpg,10\n0000.jpg,2\n0003.jpg,2.0\n"
    source = listed(text)
    assert (source.classes, source.labels.tolist()) == (("2", "10"), [1, 0, 0])
    write(tmp_path, {"categories.txt": "".join(f"/c/class{number} {number}\n" for number in range(12))})
    source = listed(text)
    assert (len(source.classes), source.labels.tolist()) == (12, [10, 2, 2])
    assert listed("file,label\n0002.jpg,class3\n").labels.tolist() == [3]
    with pytest.raises(
        InputError, match=r"classes that are not in its categories file: 12, cat; expected class0, class1, class2 and"
    ):
        listed("file,label\n0002.jpg,cat\n0001.jpg,12\n0000.jpg,3\n")


def test_classes_are_those_of_the_training_set(listed: Open) -> None:
    train = listed("file,label\n0000.jpg,dog\n0001.jpg,cat\n0002.jpg,ant\n")
    val = listed("file,label\n0003.jpg,dog\n", "val.csv", classes=train.folders)
    assert (val.classes, val.labels.tolist()) == (("ant", "cat", "dog"), [2])
    with pytest.raises(InputError, match="has unexpected classes: owl"):
        listed("file,label\n0003.jpg,owl\n", "val.csv", classes=train.folders)


@pytest.mark.parametrize(
    "text",
    [
        "file,labels\n0000,cat;dog\n0001,dog\n0002,ant|cat|dog\n",
        'file,tags\n0000,"cat, dog"\n0001,dog\n0002,"ant,cat,dog,cat"\n',
        "file,labels\n0000,dog  cat\n0001,dog\n0002,ant cat dog\n",
        "file,label\n0000,dog cat\n0001,dog\n0002,ant cat dog\n0003,cat\n0004,ant\n",  # all parts stand alone, too
        "file,ant,note,cat,dog\n0000,0,x,1,1\n0001,0,y,0,1\n0002,1,z,1,1\n",
    ],
)
def test_several_labels(text: str, listed: Open) -> None:
    source = listed(text)
    found = several(source)
    expected = {"0000.jpg": {"cat", "dog"}, "0001.jpg": {"dog"}, "0002.jpg": {"ant", "cat", "dog"}}
    assert source.classes == ("ant", "cat", "dog")
    assert {name: found[name] for name in expected} == expected


def test_words_of_one_name_are_not_several_labels(listed: Open) -> None:
    source = listed('file,label\n0000,traffic light\n0001,light\n0002,"tench, Tinca tinca"\n')
    assert (source.classes, source.targets) == (("light", "tench, Tinca tinca", "traffic light"), None)
    known = listed("file,label\n0000,traffic light\n", "val.csv", classes=("traffic", "light"))
    assert several(known) == {"0000.jpg": {"traffic", "light"}}


def test_an_image_without_any_of_the_classes(listed: Open) -> None:
    source = listed("file,a,b\n0000,0,0\n0001,1,0\n0002,0,1\n")
    assert several(source) == {"0000.jpg": set(), "0001.jpg": {"a"}, "0002.jpg": {"b"}}


def test_targets_follow_the_classes_and_the_images(listed: Open) -> None:
    text = "file,a,b\n0000,0,1\n0001,1,1\n0002,0,0\n"
    source, other = listed(text), listed(text, classes=("b", "c", "a"))
    assert source.targets is not None
    assert other.targets is not None
    assert source.targets.tolist() == [[0, 1], [1, 1], [0, 0]]
    assert other.targets.tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 0]]
    part = Subset(source, [2, 1])
    assert part.targets is not None
    assert part.targets.tolist() == [[0, 0], [1, 1]]
    assert source.fingerprint != listed(text.replace("0002,0,0", "0002,1,0")).fingerprint
    with pytest.raises(ValueError, match="read-only"):
        source.targets[0, 0] = 1


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_a_header_in_quotes(mark: str, listed: Open) -> None:
    found = listed(f'"file"{mark}"label"\n"0000"{mark}"x, y; z"\n"0001"{mark}"y"\n')
    assert found.classes == ("x, y; z", "y")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_refused(encoding: str, listed: Open) -> None:
    with pytest.raises(InputError, match=r"labels.csv is not UTF-8 text, but probably UTF-16; save it as UTF-8"):
        listed("\ufefffile,label\n0000,x\n".encode(encoding))


def test_a_number_that_is_too_long_is_a_name(listed: Open) -> None:
    assert listed(f"file,label\n0000,1\n0001,{'9' * 5000}\n").classes == ("1", "9" * 5000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,age,size\n0000,7,8\n", r"labels.csv has no column with classes: its columns are file, age, size; expec"),
        (
            "what,label\nx,1\n",
            r"has no column with images of .*: its columns are what, label; expected a column such as file",
        ),
        ("file,label\n", r"no images in .*: there are no lines after the header; its columns are file, label"),
        ("file,label\n7,x\n0001,x\n8,x\n9,y\n6,y\n", r"4 of the 5 images of labels.csv are not in .*: 7, 8, 9 and 1"),
        ("file,label\n0000,x\n0001,\n0002, \n", r"2 of 3 images have no label, such as the one in line 3; remove"),
        ("file,labels\n0000,x\n0001,;\n0002,x;y\n", r"labels that consist of divider characters only"),
        ("file,label\n0000,x,y\n", r"labels.csv, line 2: 3 fields; the header has 2"),
        ('file,label\n0000,"x\n', r"labels.csv, line \d: unexpected end of data"),
        ("file,label\n0000,x\n0000.jpg,y\n", r"has 0000.jpg more than once"),
        ("file,label\n../0000,x\n", r"line 2: ../0000 leads out of"),
        (
            "file,a,b\n" + "".join(f"{n},0,1\n" for n in range(100)) + "100,2,1\n",
            r"line 102, column a: '2'; expected 0 or",
        ),
        ("file,a,a\n0000,0,1\n", r"has the columns a more than once"),
        (f"file{',a' * 50_000}\n0000{',1' * 50_000}\n", r"has the columns a more than once"),
    ],
)
def test_errors_explain_the_problem(text: str, message: str, tmp_path: Path, listed: Open) -> None:
    write(tmp_path / "images", {f"{number}.jpg": "" for number in range(101)} if "100,2" in text else {})
    with pytest.raises(InputError, match=message):
        listed(text)


def test_a_name_that_two_files_have(tmp_path: Path, listed: Open) -> None:
    write(tmp_path / "images", {"0001.png": "another"})
    with pytest.raises(InputError, match=r"line 3: 0001 matches 0001.(jpg|png), 0001.(jpg|png); add the extensions"):
        listed("file,label\n0000,x\n0001,y\n")
    assert names(listed("file,label\n0000,x\n0001.png,y\n"))[1].endswith("0001.png")


def test_lists_without_a_header_are_read_as_before(listed: Open) -> None:
    source = listed("0002.jpg,3\n0000.jpg, 1\n")
    assert (source.labels.tolist(), source.classes[3], source.notes) == ([3, 1], "class 3", ())


def test_inspect_prints_the_columns_that_were_read(
    tmp_path: Path, listed: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    listed("file,age,labels,size\n0000,7,a;b,1\n0001,8,a,1\n0002,8,a,2\n")
    command = ["data", "inspect", str(tmp_path / "images"), str(tmp_path / "labels.csv"), "--workers=0"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "3 images in 2 classes" in out
    assert "images by file, classes by labels; ignored: age, size" in out
    assert "several labels per image, separated by semicolons or bars" in out
    assert "multi-label         1\n" in out
    assert "images per class    1 (b) to 3 (a)" in out
