"""The index at the size of Places2: opened at once, small in every worker; damaged or outdated ones are found out."""

import json
import multiprocessing
import os
import pickle
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from relaylab.data.sources.index import IndexedImages, UnusableIndexError, write_index
from relaylab.data.sources.listing import Listing, Place

PLACES2 = 8_100_000
NUM_CLASSES = 401
NAME = len(b"a/class_000/00000000.jpg")
LOOKED_UP = 20_000
MEGABYTE = 1_000_000


def synthetic(count: int) -> Listing:
    """Images in an archive, as many as wanted, with names that say their numbers."""
    numbers = np.arange(count)
    labels = (numbers * NUM_CLASSES // count).astype(np.int16)
    names = np.empty((count, NAME), np.uint8)
    names[:] = np.frombuffer(b"a/class_000/00000000.jpg", np.uint8)
    for values, last, digits in ((labels, 10, 3), (numbers, 19, 8)):
        for place in range(digits):
            names[:, last - place] = ord("0") + values // 10**place % 10
    return Listing(
        title="synthetic",
        classes=tuple(f"class {label}" for label in range(NUM_CLASSES)),
        folders=tuple(f"class_{label:03}" for label in range(NUM_CLASSES)),
        places=(Place("/nowhere/images.tar", "images.tar"),),
        labels=labels,
        names=names.reshape(-1),
        bounds=np.arange(0, (count + 1) * NAME, NAME, dtype=np.uint32),
        place=np.zeros(count, np.uint16),
        spans=np.stack([numbers * 1024, np.full(count, 1000)], axis=1),
        ignored={},
        file_states=(),
    )


@pytest.fixture(scope="module")
def places2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("index") / "places2.safetensors"
    write_index(path, synthetic(PLACES2))
    yield path
    path.unlink()  # 400 MB


@pytest.fixture
def small(tmp_path: Path) -> Path:
    write_index(tmp_path / "small.safetensors", synthetic(1000))
    return tmp_path / "small.safetensors"


def expected(number: int) -> str:
    return f"images.tar/a/class_{number * NUM_CLASSES // PLACES2:03}/{number:08}.jpg"


def look_up(source: IndexedImages | None, answers: "multiprocessing.Queue[int]") -> None:
    """A worker: private memory after looking all over the index; None for a worker that does nothing."""
    if source is not None:
        for number in np.random.default_rng(0).integers(len(source), size=LOOKED_UP).tolist():
            assert source.name(number) == expected(number)
        assert source.labels.sum() > 0  # every page of the labels
    answers.put(psutil.Process().memory_full_info().uss)


def private_bytes(method: str, source: IndexedImages | None) -> int:
    context: Any = multiprocessing.get_context(method)
    answers = context.Queue()
    worker = context.Process(target=look_up, args=(source, answers))
    worker.start()
    used = answers.get(timeout=60)
    worker.join()
    return used


def test_opening_takes_no_time(places2: Path) -> None:
    def seconds() -> float:
        start = time.perf_counter()
        assert len(IndexedImages(places2, fresh=True)) == PLACES2
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.5
    assert len(pickle.dumps(IndexedImages(places2))) < 1000


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # of Python 3.12, where torch has threads
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_has_little_memory_of_its_own(method: str, places2: Path) -> None:
    source = IndexedImages(places2)
    more = private_bytes(method, source) - private_bytes(method, None)
    assert more < 60 * MEGABYTE, f"{more / MEGABYTE:.1f} MB"


def test_labels_are_mapped_and_read_only(places2: Path) -> None:
    source = IndexedImages(places2)
    mapped = [one for one in psutil.Process().memory_maps() if one.path == str(places2)]
    assert mapped
    assert not source.labels.flags.writeable
    assert not source.labels.flags.owndata
    np.testing.assert_array_equal(np.bincount(source.labels), np.bincount(synthetic(PLACES2).labels))


def test_numbers_out_of_range(small: Path) -> None:
    source = IndexedImages(small)
    assert source.name(999).endswith("00000999.jpg")
    for number in (-1, 1000):
        with pytest.raises(IndexError, match=r"expected 0 \.\. 999"):
            source.name(number)


def test_an_index_made_anew_is_not_mistaken_for_the_old_one(small: Path) -> None:
    source = IndexedImages(small)
    pickled = pickle.dumps(source)
    assert pickle.loads(pickled).name(5) == source.name(5)
    before = source.name(5)
    write_index(small, synthetic(900))
    assert source.name(5) == before
    with pytest.raises(UnusableIndexError, match="made anew"):
        pickle.loads(pickled)


def test_descriptors_are_closed(small: Path) -> None:
    before = psutil.Process().num_fds()
    source = IndexedImages(small)
    source.name(3)
    assert psutil.Process().num_fds() > before
    del source
    assert psutil.Process().num_fds() == before


@pytest.mark.parametrize("length", [0, 4, 100, 5000, -1])
def test_a_file_cut_short(length: int, small: Path) -> None:
    os.truncate(small, length if length >= 0 else small.stat().st_size - 1)
    with pytest.raises(UnusableIndexError, match=r"damaged|cannot read"):
        IndexedImages(small)


def rewritten(path: Path, **changes: object) -> None:
    """Change the header's metadata, or a tensor's entry."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for name, value in changes.items():
        (header["__metadata__"] if name in header["__metadata__"] else header)[name] = value
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "relaylab image index 0"},
        {"about": "{}"},
        {"about": "["},
        {"labels": {"dtype": "I16", "shape": [999], "data_offsets": [0, 1998]}},
        {"labels": {"dtype": "BOOL", "shape": [1000], "data_offsets": [0, 1000]}},
        {"labels": {"dtype": "I16", "shape": [1000], "data_offsets": [10**9, 10**9 + 2000]}},
        {"names": {"dtype": "U8", "shape": [10], "data_offsets": [0, 10]}},
        {"spans": []},
    ],
)
def test_a_header_that_does_not_fit(changes: dict[str, object], small: Path) -> None:
    rewritten(small)
    assert len(IndexedImages(small)) == 1000
    rewritten(small, **changes)
    with pytest.raises(UnusableIndexError, match="damaged"):
        IndexedImages(small)


def test_any_damage_is_found_or_harmless(small: Path) -> None:
    data = small.read_bytes()
    generator = np.random.default_rng(0)
    found = 0
    for position in generator.integers(4000, size=300).tolist():
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(generator.integers(8))
        small.write_bytes(damaged)
        try:
            IndexedImages(small).name(0)
        except (UnusableIndexError, OSError, IndexError):
            found += 1
    assert found > 50
