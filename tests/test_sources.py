"""Data sets of all kinds: trees, lists, ImageNet, tar files; and that nothing is lost, doubled or followed outside."""

import io
import os
import pickle
import tarfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relaylab.data.sources import file_states
from relaylab.data.sources.index import IndexedImages
from relaylab.data.sources.listing import IMAGE_EXTENSIONS, is_image
from relaylab.data.sources.opening import META, TRUTH, open_source
from relaylab.data.sources.source import UNLABELLED
from relaylab.data.sources.subset import Subset, held_out, long_tail
from relaylab.errors import InputError
from relaylab.progress import Silent, Task

Open = Callable[..., IndexedImages]
LONG_AGO = 1_600_000_000


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """`open_source` with a cache of the test's own."""

    def call(*paths: Path, **options: object) -> IndexedImages:
        return open_source(paths, cache=tmp_path / "cache", **options)  # pyright: ignore[reportArgumentType]

    return call


def write(root: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def age(root: Path) -> None:
    """Make everything old enough for an index to be trusted."""
    for path in (root, *root.rglob("*")):
        if not path.is_symlink():
            os.utime(path, (LONG_AGO, LONG_AGO))


def tar(path: Path, files: Mapping[str, bytes], mode: str = "w", links: Mapping[str, str] | None = None) -> Path:
    with tarfile.open(path, mode) as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return path


def content(source: IndexedImages) -> list[tuple[int, bytes]]:
    return [(int(source.labels[number]), source.read(number)) for number in range(len(source))]


def names(source: IndexedImages) -> list[str]:
    return [os.fsdecode(source.relative_name(number)) for number in range(len(source))]


class Watched:
    """Counts the pieces of work that were shown."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def __call__(self, what: str, total: int) -> AbstractContextManager[Task]:
        self.shown.append(what)
        return nullcontext(Silent())


TREE = {
    "train/bus/2.jpg": b"bus 2",
    "train/bus/1.JPEG": b"bus 1",
    "train/bus/deep/0.png": b"bus deep",
    "train/bus/deep.jpg/x.gif": b"bus x",
    "train/arch/1.jpg": b"arch 1",
    "val/bus/9.jpg": b"val bus",
    "val/zoo/9.jpg": b"val zoo",
}


def test_a_tree_is_read_as_torchvision_reads_it(tmp_path: Path, opened: Open) -> None:
    folder = pytest.importorskip("torchvision.datasets.folder")
    root = write(tmp_path / "data", TREE)
    ours = opened(root / "train")
    classes, labels = folder.find_classes(root / "train")
    theirs = folder.make_dataset(root / "train", labels, IMAGE_EXTENSIONS)
    assert list(ours.classes) == classes == ["arch", "bus"]
    assert [(str(root / "train" / name), label) for name, label in zip(names(ours), ours.labels, strict=True)] == theirs
    assert ours.labels.dtype == np.int16
    assert {*folder.IMG_EXTENSIONS, ".gif", ".avif", ".jfif", ".jpe"} == set(IMAGE_EXTENSIONS)


def test_splits_share_the_classes_of_train_and_val(tmp_path: Path, opened: Open) -> None:
    root = write(tmp_path / "data", TREE)
    train, val = opened(root, split="train"), opened(root, split="val")
    assert list(train.classes) == list(val.classes) == ["arch", "bus", "zoo"]
    assert content(val) == [(1, b"val bus"), (2, b"val zoo")]
    assert val.name(0) == f"{root}/val/bus/9.jpg"
    assert len(train) == 5


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (None, "has the splits train, val: choose one .--split, or split= in Python."),
        ("test", "no test folder, only train, val"),
        ("x", "expected one"),
    ],
)
def test_a_split_must_be_given_and_exist(split: str | None, message: str, tmp_path: Path, opened: Open) -> None:
    root = write(tmp_path / "data", TREE)
    with pytest.raises(InputError, match=message):
        opened(root, split=split)
    packed = tar(tmp_path / "data.tar", dict(TREE))
    with pytest.raises(InputError, match=message.replace("no test folder", "no images in test/CLASS/IMAGE")):
        opened(packed, split=split)


def test_a_class_may_be_called_train(tmp_path: Path, opened: Open) -> None:
    files = {"train/1.jpg": b"t", "bus/1.jpg": b"b"}
    assert content(opened(write(tmp_path / "data", files))) == [(0, b"b"), (1, b"t")]
    assert content(opened(tar(tmp_path / "data.tar", files))) == [(0, b"b"), (1, b"t")]


def test_tree_and_tars_give_the_same_numbers(tmp_path: Path, opened: Open) -> None:
    tree = opened(write(tmp_path / "data", TREE), split="train")
    order = sorted(TREE, key=lambda name: hash(name[::-1]))
    parts = [
        tar(tmp_path / f"part{part}.tar{end}", {f"./{name}": TREE[name] for name in order[part::2]}, f"w:{end[1:]}")
        for part, end in enumerate(("", ".xz"))
    ]
    tars = opened(*parts, split="train")
    assert content(tars) == content(tree)
    assert names(tars) == names(tree)
    assert tars.classes == tree.classes
    assert tars.name(0) in {f"{part}/train/arch/1.jpg" for part in parts}
    assert tars.title == "part0.tar + part1.tar.xz"


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_unpacked_once(kind: str, tmp_path: Path, opened: Open) -> None:
    packed = tar(tmp_path / f"a.tar.{kind}", {"bus/1.jpg": b"x" * 5000}, f"w:{kind}")
    os.utime(packed, (LONG_AGO, LONG_AGO))
    watched = Watched()
    assert opened(packed, watch=watched).read(0) == b"x" * 5000
    assert watched.shown == [f"unpacking a.tar.{kind}", f"listing a.tar.{kind}"]
    opened(packed, watch=watched)
    assert len(watched.shown) == 2
    tar(packed, {"bus/1.jpg": b"y"}, f"w:{kind}")
    assert opened(packed).read(0) == b"y"
    assert len(list((tmp_path / "cache" / "tars").iterdir())) == 1
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"damaged or cut short"):
        opened(packed)
    assert len(list((tmp_path / "cache" / "tars").iterdir())) == 1  # and no half-written file


def test_class_names_from_files(tmp_path: Path, opened: Open) -> None:
    files = {
        "classes.txt": b"0 00_bus /b/bus\n1 01_zoo /z/zoo/outdoor\n",
        "train/00_bus/1.jpg": b"",
        "train/01_zoo/1.jpg": b"",
    }
    tree = opened(write(tmp_path / "data", files), split="train")
    packed = opened(tar(tmp_path / "a.tar", files), split="train")
    for source in (tree, packed):
        assert list(source.classes) == ["bus", "zoo/outdoor"]
        assert list(source.folders) == ["00_bus", "01_zoo"]
    mapping = {"LOC_synset_mapping.txt": "n00000002 crane, bird\nn00000001 tench, Tinca tinca\n"}
    synsets = write(tmp_path / "imagenet", {**mapping, "train/n00000002/1.JPEG": b"", "train/n00000001/1.JPEG": b""})
    assert list(opened(synsets / "train").classes) == ["tench, Tinca tinca", "crane, bird"]


def test_classes_can_be_those_of_another_set(tmp_path: Path, opened: Open) -> None:
    root = write(tmp_path / "data", {"zoo/1.jpg": b"z", "bus/1.jpg": b"b"})
    source = opened(root, classes=["zoo", "arch", "bus"])
    assert content(source) == [(2, b"b"), (0, b"z")]
    assert list(source.classes) == ["zoo", "arch", "bus"]
    with pytest.raises(InputError, match="unexpected classes: zoo"):
        opened(root, classes=["bus"])
    with pytest.raises(InputError, match="more than once"):
        opened(root, classes=["bus", "zoo", "bus"])


def test_empty_classes_are_kept_and_other_files_counted(tmp_path: Path, opened: Open) -> None:
    root = write(tmp_path / "data", {"bus/1.jpg": b"", "bus/notes.TXT": b"", "bus/._1.jpg": b"", "bus/LICENSE": b""})
    (root / "arch").mkdir()
    (root / ".hidden").mkdir()
    source = opened(root)
    assert list(source.classes) == ["arch", "bus"]
    assert source.ignored == {".txt": 1, ".jpg": 1, "no extension": 1}
    assert not is_image("__MACOSX/._1.jpg")


def test_a_test_split_may_be_without_classes(tmp_path: Path, opened: Open) -> None:
    files = {"test/2.jpg": b"2", "test/1.jpg": b"1", "train/bus/1.jpg": b"", "train/zoo/1.jpg": b""}
    for path in (write(tmp_path / "data", files), tar(tmp_path / "a.tar", files), tmp_path / "data" / "test"):
        source = opened(path, split="test")
        assert content(source) == [(UNLABELLED, b"1"), (UNLABELLED, b"2")]
        assert list(source.classes) == []
    with pytest.raises(InputError, match="images but no class folders"):
        opened(tmp_path / "data" / "test")
    with pytest.raises(InputError, match="images but no class folders"):
        opened(tar(tmp_path / "flat.tar", {"1.jpg": b"1"}))


def test_folders_by_first_letter_are_not_taken_for_classes(tmp_path: Path, opened: Open) -> None:
    files = {"a/abbey/1.jpg": b"", "b/bakery/shop/1.jpg": b""}
    for path in (write(tmp_path / "data_large", files), tar(tmp_path / "a.tar", files)):
        with pytest.raises(InputError, match="by first letter"):
            opened(path)
    assert list(opened(write(tmp_path / "letters", {"a/1.jpg": b"", "b/1.jpg": b""})).classes) == ["a", "b"]
    files = {"train/a/1.jpg": b"", "train/b/1.jpg": b""}
    assert list(opened(write(tmp_path / "split", files), split="train").classes) == ["a", "b"]


def test_names_of_any_bytes(tmp_path: Path, opened: Open) -> None:
    name = os.fsdecode(b"\xff\n\x1b name.jpg")
    try:
        root = write(tmp_path / "data", {f"bus/{name}": b"odd", "b\u00fcs/1.jpg": b"even"})
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    packed = tmp_path / "a.tar"
    with tarfile.open(packed, "w", format=tarfile.GNU_FORMAT) as archive:
        archive.add(root, "")
    for source in (opened(root), opened(packed)):
        assert source.relative_name(0) == b"bus/\xff\n\x1b name.jpg"
        assert source.name(0).endswith(r"/bus/\xff\n\x1b name.jpg")
        assert source.name(1).endswith("/b\u00fcs/1.jpg")
        assert [source.read(0), source.read(1)] == [b"odd", b"even"]


@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_out_of_the_tree_are_refused(what: str, tmp_path: Path, opened: Open) -> None:
    root = write(tmp_path / "data", {"bus/1.jpg": b"1"})
    outside = write(tmp_path / "data2", {"1.jpg": b"secret"})
    link = root / "bus" / ("2.jpg" if what == "file" else "more")
    link.symlink_to(outside / "1.jpg" if what == "file" else outside)
    with pytest.raises(InputError, match=rf"{link.name} leads out of"):
        opened(root)
    list_file = write(tmp_path, {"list.txt": f"bus/{'2.jpg' if what == 'file' else 'more/1.jpg'} 0\n"}) / "list.txt"
    with pytest.raises(InputError, match=rf"{link.name} leads out of"):
        opened(list_file, root)


def test_links_inside_the_tree_are_followed_but_not_in_circles(tmp_path: Path, opened: Open) -> None:
    root = write(tmp_path / "data", {"bus/1.jpg": b"1", "zoo/1.jpg": b"z"})
    (root / "bus" / "2.jpg").symlink_to(root / "zoo" / "1.jpg")
    (root / "coach").symlink_to("bus")
    assert [label for label, _ in content(opened(root))] == [0, 0, 1, 1, 2]
    (root / "bus" / "zoo").symlink_to(root / "zoo")
    (root / "zoo" / "bus").symlink_to(root / "bus")
    with pytest.raises(InputError, match="leads back to a folder that contains it"):
        opened(root)
    for link in (root / "bus" / "zoo", root / "zoo" / "bus"):
        link.unlink()
    (root / "bus" / "3.jpg").symlink_to("nothing.jpg")
    with pytest.raises(InputError, match="is broken: its target does not exist"):
        opened(root)


def test_an_index_is_used_again_until_the_data_change(tmp_path: Path, opened: Open) -> None:
    root = write(tmp_path / "data", {"bus/deep/1.jpg": b"1", "zoo/1.jpg": b"z"})
    age(root)
    watched = Watched()

    def listed() -> int:
        watched.shown.clear()
        return len(opened(root, watch=watched))

    assert (listed(), len(watched.shown)) == (2, 1)
    assert (listed(), len(watched.shown)) == (2, 0)
    write(root, {"bus/deep/2.jpg": b"2"})
    assert (listed(), len(watched.shown)) == (3, 1)
    assert (listed(), len(watched.shown)) == (3, 1)  # changed a moment ago: its time proves nothing yet
    age(root)
    assert [listed(), listed(), len(watched.shown)] == [3, 3, 0]
    (root / "bus" / "deep" / "1.jpg").unlink()
    assert (listed(), len(watched.shown)) == (2, 1)
    age(root)
    listed()
    (index,) = (tmp_path / "cache" / "index").iterdir()
    index.write_bytes(index.read_bytes()[:-1])
    assert (listed(), len(watched.shown)) == (2, 1)


def overwrite(path: Path, content: bytes) -> None:
    """Write over a file in place, and leave its time as it was, as copying tools can."""
    before = path.stat()
    with path.open("r+b") as file:
        file.truncate(0)
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_overwritten_images_are_detected(tmp_path: Path, opened: Open) -> None:
    root = write(tmp_path / "data", {"bus/1.jpg": b"1", "zoo/1.jpg": b"z", "list.txt": "bus/1.jpg 0\nzoo/1.jpg 1\n"})
    age(root)
    watched = Watched()
    for paths in ([root], [root / "list.txt"]):
        before = opened(*paths, watch=watched).fingerprint
        watched.shown.clear()
        assert opened(*paths, watch=watched).fingerprint == before
        assert not watched.shown, "read from the index"
        overwrite(root / "zoo" / "1.jpg", b"y")  # of the same length
        after = opened(*paths, watch=watched)
        assert watched.shown, "made anew"
        assert after.fingerprint != before
        assert content(after)[1] == (1, b"y")
        assert Subset(after, [0]).size(0) == 1


def test_of_many_images_some_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert file_states.sample(10) == range(10)
    assert len(file_states.sample(8_100_000)) <= file_states.MOST_IMAGES
    assert file_states.sample(8_100_000)[-1] > 8_000_000
    monkeypatch.setattr(file_states, "MOST_IMAGES", 3)
    assert list(file_states.sample(7)) == [0, 3, 6]


def test_an_unwritable_cache_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "data", {"bus/1.jpg": b"1"})
    write(tmp_path, {"file": b""})
    monkeypatch.setenv("RELAYLAB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"cannot write to the cache .*RELAYLAB_CACHE"):
        open_source([root])
    monkeypatch.setenv("RELAYLAB_CACHE", str(tmp_path / "elsewhere"))
    assert open_source([root]).read(0) == b"1"
    assert [path.suffix for path in (tmp_path / "elsewhere" / "index").iterdir()] == [".safetensors"]


def test_images_that_vanish_raise_oserror(tmp_path: Path, opened: Open) -> None:
    root = write(tmp_path / "data", {"bus/1.jpg": b"1" * 100, "bus/2.jpg": b"2" * 9000})
    tree, packed = opened(root), tar(tmp_path / "a.tar", {"bus/1.jpg": b"1" * 100, "bus/2.jpg": b"2" * 9000})
    early, late = opened(packed), opened(packed)
    assert early.read(1) == pickle.loads(pickle.dumps(late)).read(1) == b"2" * 9000
    (root / "bus" / "1.jpg").unlink()
    with pytest.raises(FileNotFoundError):
        tree.read(0)
    os.truncate(packed, 4000)
    with pytest.raises(OSError, match="changed since it was indexed"):  # open already, and still all there
        early.read(0)
    with pytest.raises(OSError, match="shorter than it was"):
        early.read(1)
    with pytest.raises(OSError, match="changed since it was indexed"):
        late.read(0)


def test_paths_that_cannot_be_used(tmp_path: Path, opened: Open) -> None:
    root = write(tmp_path / "data", {"bus/1.jpg": b"1", "photo.jpg": b"", "empty/notes.md": b""})
    for paths, message in {
        (): "no paths given: expected folders",
        (tmp_path / "absent",): "no such file or folder",
        (root / "photo.jpg",): "expected folders, tar files",
        (root, root / "bus" / ".."): "more than once",
        (root, root / "bus"): "contains another given folder",
        (root / "empty",): "no images in empty: expected CLASS/IMAGE",
    }.items():
        with pytest.raises(InputError, match=message):
            opened(*paths)
    with pytest.raises(InputError, match="root and categories are only for a list"):
        opened(root, root=root)


# Lists


PLACES = {
    "data/a/airfield/00000001.jpg": b"airfield 1",
    "data/a/airfield/00000002.jpg": b"airfield 2",
    "data/b/bakery/shop/my photo.jpg": b"bakery",
    "categories_places365.txt": "/a/airfield 0\n/b/bakery/shop 1\n/z/zoo 2\n",
    "places365_train_standard.txt": "/b/bakery/shop/my photo.jpg 1\r\n\n"
    "/a/airfield/00000002.jpg 0\n/a/airfield/00000001.jpg 0\n",
}


def test_places_lists(tmp_path: Path, opened: Open) -> None:
    kit = write(tmp_path, PLACES)
    source = opened(kit / "places365_train_standard.txt", root=kit / "data")
    assert content(source) == [(1, b"bakery"), (0, b"airfield 2"), (0, b"airfield 1")]  # the order of the list
    assert list(source.classes) == ["airfield", "bakery/shop", "zoo"]
    (kit / "categories_places365.txt").unlink()
    assert list(opened(kit / "places365_train_standard.txt", kit / "data").classes) == ["airfield", "bakery/shop"]


def test_lists_of_flat_folders(tmp_path: Path, opened: Open) -> None:
    root = write(tmp_path / "val", {f"Places365_val_{number}.jpg": str(number) for number in range(3)})
    lists = {
        "val.txt": "Places365_val_2.jpg 165\nPlaces365_val_0.jpg 3\n",
        "val.csv": "\ufeffPlaces365_val_2.jpg,165\nPlaces365_val_0.jpg, 3\n",
        "test.txt": "Places365_val_2.jpg\nPlaces365_val_0.jpg",
    }
    write(root, lists)
    for name in ("val.txt", "val.csv"):
        source = opened(root / name)
        assert content(source) == [(165, b"2"), (3, b"0")]
        assert len(source.classes) == 166
        assert source.classes[165] == "class 165"
    assert content(opened(root / "test.txt")) == [(UNLABELLED, b"2"), (UNLABELLED, b"0")]
    assert opened(root / "val.txt", classes=[f"scene {number}" for number in range(401)]).classes[165] == "scene 165"
    with pytest.raises(InputError, match="unexpected labels: 165; expected the 100 classes 0, 1, 2 and"):
        opened(root / "val.txt", classes=[str(number) for number in range(100)])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a/1.jpg 0\na/2.jpg x", r"line 2: label 'x'; expected an integer"),
        ("a/1.jpg 0\n\na/2.jpg 2", r"line 3: label 2; expected 0 \.\. 1"),
        ("a/1.jpg -1", r"line 1: label -1; expected"),
        ("a/1.jpg 0\na/2.jpg", r"line 2: some lines have a label and others do not"),
        ("a/../../1.jpg 0", r"line 1: a/\.\./\.\./1.jpg leads out of"),
        ("notes.txt 0", r"line 1: 'notes.txt 0'; expected NAME LABEL"),
        ("a/1.jpg 0\n/a/./1.jpg 0", r"has a/1.jpg more than once"),
        ("a/1.jpg 0\na/8.jpg 0\nb/9.jpg 0\n", r"2 of the 3 images of list.txt are not in .*: a/8.jpg, b/9.jpg;"),
        ("a/folder.jpg 0", r"1 of the 1 images .*: a/folder.jpg \(is a folder\)"),
        ("/etc/hosts.jpg 0", r"1 of the 1 images"),
        ("", "no images in"),
    ],
)
def test_invalid_lists_are_refused(lines: str, message: str, tmp_path: Path, opened: Open) -> None:
    root = write(tmp_path / "data", {"a/1.jpg": b"1", "a/2.jpg": b"2", "a/folder.jpg/x": b""})
    write(tmp_path, {"list.txt": lines, "categories.txt": "first 0\nsecond 1\n"})
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "list.txt", root)
    write(tmp_path, {"list.txt": "a/1.jpg 0"})
    assert content(opened(tmp_path / "list.txt", root)) == [(0, b"1")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("first 0\nsecond", "line 2"),
        ("first 0\nsecond 0", "line 2: class 0 is given twice"),
        ("x 1", "leaves out class 0"),
    ],
)
def test_invalid_categories_are_refused(text: str, message: str, tmp_path: Path, opened: Open) -> None:
    write(tmp_path, {"data/1.jpg": b"", "list.txt": "1.jpg 0", "names": text})
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "list.txt", tmp_path / "data", categories=tmp_path / "names")


# ImageNet


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """Three synsets whose numbers are not in sorted order, and an inner one, laid out as in the real meta.mat."""
    from scipy.io import savemat

    rows = [(1, "n03", "crane, machine", 0), (2, "n01", "tench", 0), (3, "n02", "crane", 0), (4, "n00", "thing", 3)]
    kinds = [
        ("ILSVRC2012_ID", object),
        ("WNID", object),
        ("words", object),
        ("gloss", object),
        ("num_children", object),
    ]
    synsets = np.array([[(number, wnid, words, "", below)] for number, wnid, words, below in rows], kinds)
    folder = tmp_path / "ILSVRC2012_devkit_t12"
    write(folder, {f"data/{TRUTH}": "2\n1\n3\n2\n"})
    savemat(folder / "data" / META, {"synsets": synsets})
    return folder


def test_imagenet_validation(tmp_path: Path, devkit: Path, opened: Open) -> None:
    files = {f"ILSVRC2012_val_{number:08}.JPEG": str(number).encode() for number in (1, 2, 3, 4)}
    folder, packed = write(tmp_path / "val", files), tar(tmp_path / "ILSVRC2012_img_val.tar", files)
    for source in (opened(folder, devkit), opened(packed, devkit / "data" / TRUTH, devkit / "data" / META)):
        assert content(source) == [(0, b"1"), (2, b"2"), (1, b"3"), (0, b"4")]
        assert list(source.folders) == ["n01", "n02", "n03"]
        assert list(source.classes) == ["tench", "crane", "crane, machine"]
    (folder / "ILSVRC2012_val_00000004.JPEG").unlink()
    with pytest.raises(InputError, match=f"3 images, but {TRUTH} has 4 lines"):
        opened(folder, devkit)
    long = tar(tmp_path / "long.tar", {f"ILSVRC2012_val_{'1' * 5000}.JPEG": b"1"})
    with pytest.raises(InputError, match=r"expected ILSVRC2012_val_1 \.\. 4"):
        opened(long, devkit / "data" / TRUTH, devkit / "data" / META)
    write(devkit, {f"data/{TRUTH}": "2\n1\n9\n"})
    with pytest.raises(InputError, match=r"line 3: meta.mat has no class 9"):
        opened(folder, devkit)
    write(devkit, {f"data/{META}": b"nonsense"})
    with pytest.raises(InputError, match=r"is not the meta.mat"):
        opened(folder, devkit)
    with pytest.raises(InputError, match="expected ImageNet's validation images"):
        opened(folder, devkit / "data" / META)


def test_imagenet_training_tar_of_tars(tmp_path: Path, opened: Open) -> None:
    inner = {
        name: tar(tmp_path / name, {f"{name[:3]}_{number}.JPEG": f"{name} {number}".encode() for number in (2, 1)})
        for name in ("n02.tar", "n01.tar")
    }
    outer = tar(tmp_path / "ILSVRC2012_img_train.tar", {name: path.read_bytes() for name, path in inner.items()})
    source = opened(outer)
    assert list(source.classes) == ["n01", "n02"]
    assert names(source) == ["n01/n01_1.JPEG", "n01/n01_2.JPEG", "n02/n02_1.JPEG", "n02/n02_2.JPEG"]
    assert content(source)[2] == (1, b"n02.tar 1")
    damaged = inner["n01.tar"].read_bytes()[:1000]
    with pytest.raises(InputError, match=r"n01\.tar"):
        opened(tar(tmp_path / "b.tar", {"n01.tar": damaged, "n02.tar": inner["n02.tar"].read_bytes()}))


# Tar files


@pytest.mark.parametrize(
    ("files", "links", "message"),
    [
        ({"../bus/1.jpg": b""}, {}, r"whose path leads out of it, \.\./bus/1.jpg"),
        ({"bus/../../1.txt": b""}, {}, "whose path leads out of it"),
        ({"/bus/1.jpg": b""}, {}, "whose path leads out of it, /bus/1.jpg"),
        ({"C:/bus/1.jpg": b""}, {}, "whose path leads out of it, C:/bus/1.jpg"),
        ({"bus/1.jpg": b""}, {"bus/2.jpg": "1.jpg"}, r"bus/2.jpg is a link"),
        ({"bus/1.jpg": b"", "./bus//1.jpg": b""}, {}, r"bus/1.jpg more than once"),
        ({"bus/notes.txt": b""}, {}, "no images"),
    ],
)
def test_invalid_members_are_refused(
    files: dict[str, bytes], links: dict[str, str], message: str, tmp_path: Path, opened: Open
) -> None:
    with pytest.raises(InputError, match=message):
        opened(tar(tmp_path / "a.tar", files, links=links))


def test_droppings_in_a_tar_are_counted(tmp_path: Path, opened: Open) -> None:
    files = {"bus/1.jpg": b"1", "bus/._1.jpg": b"", "__MACOSX/bus/2.jpg": b"", "README": b""}
    source = opened(tar(tmp_path / "a.tar", files, links={"link": "/etc/passwd"}))
    assert len(source) == 1
    assert source.ignored == {".jpg": 2, "no extension": 2}
    assert source.skipped == {"__MACOSX": 1}


SYSTEM = ("@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "System Volume Information", ".Trash-1000", "__MACOSX")
SYSTEM += ("__pycache__", "node_modules", "LOST.DIR", "found.001", "$WinREAgent", "@snapshots")


def test_system_folders_are_not_classes(tmp_path: Path, opened: Open) -> None:
    files = {
        "bus/1.jpg": b"1",
        "zoo/deep/1.jpg": b"2",
        "zoo/deep/@eaDir/1.jpg/THUMB_M.jpg": b"",
        "bus/@eaDir/x.jpg": b"",
    }
    files |= {f"{name}/1.jpg": b"" for name in SYSTEM} | {f"{name}/bus/2.jpg": b"" for name in SYSTEM}
    expected = dict.fromkeys(SYSTEM, 1) | {"@eaDir": 3}
    for root in (write(tmp_path / "data", files), tar(tmp_path / "a.tar", files)):
        source = opened(root)
        assert list(source.classes) == ["bus", "zoo"]
        assert [content for _, content in content(source)] == [b"1", b"2"]
        assert source.skipped == expected
    split = {f"{part}/{name}": content for part in ("train", "val") for name, content in files.items()}
    for root in (write(tmp_path / "split", split), tar(tmp_path / "split.tar", split)):
        assert list(opened(root, split="train").classes) == ["bus", "zoo"]
    write(tmp_path / "test", {"test/1.jpg": b"1", "@eaDir/1.jpg": b"", "test/@eaDir/1.jpg": b""})
    assert names(opened(tmp_path / "test", split="test")) == ["test/1.jpg"]


def test_a_sparse_image_is_refused(tmp_path: Path, opened: Open) -> None:
    path = tar(tmp_path / "a.tar", {"bus/1.jpg": b"x" * 600})
    data = bytearray(path.read_bytes())
    data[156:157] = tarfile.GNUTYPE_SPARSE
    data[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(data[:512]))[0]  # pyright: ignore[reportAttributeAccessIssue]
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"bus/1.jpg is sparse"):
        opened(path)


def test_the_same_image_in_two_tars(tmp_path: Path, opened: Open) -> None:
    parts = [tar(tmp_path / name, {"bus/1.jpg": b"1"}) for name in ("a.tar", "b.tar")]
    with pytest.raises(InputError, match=r"a.tar \+ b.tar has bus/1.jpg more than once"):
        opened(*parts)


def test_damaged_tars(tmp_path: Path, opened: Open) -> None:
    path = tar(tmp_path / "a.tar", {f"bus/{number}.jpg": b"x" * 700 for number in range(4)})
    data = path.read_bytes()
    for damaged, message in (
        (data[:3000], "unexpected end of data"),
        (data[: 4 * 1536], "is truncated"),  # whole members but no end
        (data[:1536] + b"?" * 512 + data[2048:], "damaged at byte 1,536"),
        (data + data, "consists of several concatenated tars"),
        (b"", "cannot read a.tar"),
        (b"no tar" * 1000, "cannot read a.tar"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=message):
            opened(path)
    path.write_bytes(data[: 4 * 1536 + 512])
    assert len(opened(path)) == 4  # one zero block is an end


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4 * 1024), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_damaged_tar_is_an_input_error_or_readable(changes: list[tuple[int, int]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = tar(Path(folder) / "a.tar", {"bus/1.jpg": b"1" * 700, "zoo/1.jpg": b"2" * 700})
        data = bytearray(path.read_bytes())
        for position, value in changes:
            data[position] = value
        path.write_bytes(data)
        try:
            source = open_source([path], cache=Path(folder) / "cache")
        except InputError:
            return
        content(source)


def test_miniplaces(shared_data: Path, tmp_path: Path, opened: Open) -> None:
    archive = shared_data / "miniplaces72_val.tar.xz"
    watched = Watched()
    source = opened(archive, split="val", watch=watched)
    assert len(source) == 10_000
    assert np.bincount(source.labels).tolist() == [100] * 100
    assert source.classes[0] == "abbey"
    assert source.name(74).startswith(f"{archive.resolve()}/val/000_abbey/")
    with tarfile.open(archive) as packed:
        member = next(one for one in packed if one.name == os.fsdecode(source.relative_name(0)))
        file = packed.extractfile(member)
        assert file is not None
        assert source.read(0) == file.read()
    shown = len(watched.shown)
    assert opened(archive, split="val", watch=watched).read(9_999)[:2] == b"\xff\xd8"
    assert len(watched.shown) == shown


# Subsets


def test_a_tar_overwritten_in_place_is_found_out(tmp_path: Path, opened: Open) -> None:
    packed = tar(tmp_path / "a.tar", {"bus/1.jpg": b"1" * 100, "zoo/1.jpg": b"2" * 100})
    source = opened(packed)
    assert source.read(0) == b"1" * 100
    with packed.open("r+b") as file:  # the same inode, the same size
        content = file.read()
        file.seek(0)
        file.write(content.replace(b"1" * 100, b"3" * 100))
    os.utime(packed, ns=(1, 1))
    with pytest.raises(OSError, match="changed since it was indexed"):
        source.read(0)


def test_splits_of_one_tar_have_their_own_fingerprints(tmp_path: Path, opened: Open) -> None:
    files = {f"{split}/{name}/1.jpg": split.encode() for split in ("train", "val") for name in ("bus", "zoo")}
    packed = tar(tmp_path / "a.tar", files)
    train, val = (opened(packed, split=split) for split in ("train", "val"))
    assert train.fingerprint != val.fingerprint
    assert Subset(train, [0]).fingerprint != Subset(val, [0]).fingerprint


def test_paths_may_be_strings(tmp_path: Path, opened: Open) -> None:
    root = write(tmp_path / "data", {"bus/1.jpg": b"", "zoo/1.jpg": b""})
    assert len(open_source(str(root))) == len(open_source([str(root)])) == len(opened(root)) == 2


def test_classes_of_odd_bytes_are_shown_escaped(tmp_path: Path, opened: Open) -> None:
    try:
        root = write(tmp_path / "data", {os.fsdecode(b"caf\xe9/1.jpg"): b"", "bus/1.jpg": b""})
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    source = opened(root)
    assert list(source.classes) == ["bus", "caf\\xe9"]
    again = opened(root, classes=source.folders)
    assert again.labels.tolist() == source.labels.tolist()


def test_a_list_does_not_leave_its_root_by_a_link_higher_up(tmp_path: Path, opened: Open) -> None:
    write(tmp_path / "outside", {"sub/x.jpg": b"secret"})
    root = write(tmp_path / "data", {"bus/1.jpg": b""})
    (root / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "list.txt").write_text("bus/1.jpg 0\nlink/sub/x.jpg 1\n")
    with pytest.raises(InputError, match="leads out of"):
        opened(tmp_path / "list.txt", root)


def test_an_unusual_list_is_read_quickly(tmp_path: Path, opened: Open) -> None:
    root = write(tmp_path / "data", {"bus/1.jpg": b""})
    (tmp_path / "list.txt").write_text("bus/1" + " " * 20_000 + "1 2\n")
    with pytest.raises(InputError, match="line 1"):
        opened(tmp_path / "list.txt", root)


def test_fingerprints_tell_data_apart(tmp_path: Path, opened: Open) -> None:
    root = write(tmp_path / "data", {"bus/1.jpg": b"", "zoo/1.jpg": b"", "zoo/2.jpg": b""})
    source = opened(root)
    assert opened(root).fingerprint == source.fingerprint
    parts = [Subset(source, numbers).fingerprint for numbers in ([0, 1], [0, 2], [0, 1])]
    assert parts[0] == parts[2]
    assert len({source.fingerprint, *parts}) == 3
    write(root, {"bus/2.jpg": b""})
    assert opened(root).fingerprint != source.fingerprint
    other = opened(write(tmp_path / "other" / "data", {"bus/1.jpg": b"", "zoo/1.jpg": b"", "zoo/2.jpg": b""}))
    assert other.fingerprint != source.fingerprint


def test_a_subset_of_a_source(tmp_path: Path, opened: Open) -> None:
    source = opened(write(tmp_path / "data", {f"bus/{number}.jpg": str(number) for number in range(5)}))
    subset = Subset(source, np.array([4, 1]))
    assert [subset.read(0), subset.read(1)] == [b"4", b"1"]
    assert subset.name(0) == source.name(4)
    assert len(subset) == len(subset.labels) == 2
    assert pickle.loads(pickle.dumps(subset)).read(0) == b"4"
    for indices in ([], [5], [-1], [0.5], [[1]]):
        with pytest.raises(InputError, match="indices"):
            Subset(source, np.array(indices))


def test_a_long_tail() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 1000))
    kept = long_tail(labels, ratio=100, seed=1)
    sizes = np.bincount(labels[kept])
    assert np.array_equal(kept, np.unique(kept))
    assert sorted(sizes, reverse=True) == [round(1000 * 100 ** (-rank / 9)) for rank in range(10)]
    assert np.array_equal(kept, long_tail(labels, ratio=100, seed=1))
    assert not np.array_equal(sizes, np.bincount(labels[long_tail(labels, ratio=100, seed=2)]))
    assert len(long_tail(labels, ratio=1, seed=0)) == len(labels)
    few = long_tail(np.array([0] * 100 + [2]), ratio=1e6, seed=0)
    assert set(np.array([0] * 100 + [2])[few]) == {0, 2}
    for ratio, seed in ((0.5, 0), (float("nan"), 0), (2, -1)):
        with pytest.raises(InputError, match="expected a ratio >= 1"):
            long_tail(labels, ratio=ratio, seed=seed)
    with pytest.raises(InputError, match="cannot choose images by class: some have no label"):
        long_tail(np.array([0, UNLABELLED]), ratio=2, seed=0)


def test_held_out_images() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 10))
    stay, aside = held_out(labels, count=3, seed=0)
    assert np.array_equal(np.sort(np.concatenate([stay, aside])), np.arange(40))
    assert np.bincount(labels[aside]).tolist() == [3] * 4
    for numbers in (stay, aside):
        assert np.array_equal(numbers, np.unique(numbers))
    assert np.array_equal(aside, held_out(labels, count=3, seed=0)[1])
    assert not np.array_equal(aside, held_out(labels, count=3, seed=1)[1])
    assert np.bincount(labels[held_out(labels, count=0.25, seed=0)[1]]).tolist() == [2] * 4
    assert np.bincount(labels[held_out(labels, count=0.01, seed=0)[1]]).tolist() == [1] * 4
    for count, seed in ((0, 0), (3, -1)):
        with pytest.raises(InputError, match="expected count > 0 and seed >= 0"):
            held_out(labels, count=count, seed=seed)
    with pytest.raises(InputError, match="class 0 has 10 images: holding out 10 would leave none"):
        held_out(labels, count=10, seed=0)
    with pytest.raises(InputError, match="class 'oak' has 10 images: holding out 10 would leave none"):
        held_out(labels, count=10, seed=0, classes=["oak", "elm"])
    with pytest.raises(InputError, match="cannot choose images by class: some have no label"):
        held_out(np.array([0, UNLABELLED]), count=1, seed=0)
