"""Loaders, statistics and memory: the same batches however they are made, and nothing unreadable that goes unsaid."""

import io
import json
import logging
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("simplejpeg", reason="needs the lab extra")

from PIL import Image

from benchmarks.plain_crops import plain_centre_crop, plain_training_crop
from relaylab.data import loader as loading
from relaylab.data import memory
from relaylab.data.batches import Batch, ImageBatches, OrderedBatches
from relaylab.data.crops import Crops
from relaylab.data.datasets import OnDiskDataset
from relaylab.data.decode import decode_checked
from relaylab.data.faults import Fault, FaultLog, TooManyFaultsError
from relaylab.data.geometry import CropSpec
from relaylab.data.loader import TrainingLoader, evaluation_loader, training_loader
from relaylab.data.memory import decode_all, memory_evaluation_loader, memory_training_loader
from relaylab.data.policies import Policy
from relaylab.data.sampling import ClassAwareSampler
from relaylab.data.sources.opening import open_source
from relaylab.data.statistics import compute, image_statistics
from relaylab.errors import InputError

SPEC = CropSpec(size=32, short_side=36)
CLASSES = ("abbey", "beach", "canyon")


class InMemory:
    """A source whose files are bytes in memory, or errors."""

    title = "test images"
    classes: Sequence[str] = CLASSES

    def __init__(self, files: list[bytes | str], labels: Sequence[int]) -> None:
        self.files, self.labels, self.reads = files, np.array(labels, np.int16), 0

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        self.reads += 1
        data = self.files[index]
        if isinstance(data, str):
            raise OSError(2, data)
        return data

    def name(self, index: int) -> str:
        return f"{self.classes[self.labels[index]]}/{index}.jpg"


def picture(index: int, width: int, height: int) -> bytes:
    rng = np.random.default_rng(index)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def pictures(count: int = 30, *, square: bool = False) -> InMemory:
    sizes = [(36, 36)] * count if square else [(40 + 7 * (i % 5), 60 - 5 * (i % 3)) for i in range(count)]
    return InMemory([picture(i, *size) for i, size in enumerate(sizes)], [i % len(CLASSES) for i in range(count)])


def sampler(source: InMemory, num_samples: int = 40) -> ClassAwareSampler:
    return ClassAwareSampler(source.labels, seed=4, num_samples=num_samples)


def loader(source: InMemory, workers: int = 0, **options: Any) -> TrainingLoader:
    return training_loader(source, sampler(source), SPEC, batch_size=8, workers=workers, seed=9, **options)


def assert_same(one: Iterable[Batch], other: Iterable[Batch]) -> None:
    for a, b in zip(one, other, strict=True):
        for field in ("images", "labels", "draws", "indices"):
            assert torch.equal(getattr(a, field), getattr(b, field)), field
        assert a.faults == b.faults


@pytest.fixture(scope="module")
def source() -> InMemory:
    return pictures()


@pytest.fixture(scope="module")
def batches(source: InMemory) -> list[Batch]:
    return list(loader(source))


def test_batches_are_what_the_draws_say(source: InMemory, batches: list[Batch]) -> None:
    assert [len(batch) for batch in batches] == [8] * 5
    draws = torch.cat([batch.draws for batch in batches])
    numbers = torch.cat([batch.indices for batch in batches])
    assert draws.tolist() == list(range(40))
    assert numbers.tolist() == sampler(source).draw(np.arange(40)).tolist()
    moved = 0
    for batch in batches:
        assert batch.images.dtype == torch.uint8
        assert batch.labels.tolist() == source.labels[batch.indices.numpy()].tolist()
        for image, draw, number in zip(batch.images, batch.draws.tolist(), batch.indices.tolist(), strict=True):
            expected = plain_training_crop(source.read(number), SPEC, seed=9, draw=draw).astype(int)
            assert np.abs(image.numpy() - expected)[1:-1, 1:-1].max() <= 1  # see Note [Windows] 3
            other = plain_training_crop(source.read(number), SPEC, seed=9, draw=draw + 1).astype(int)
            moved += int(np.abs(image.numpy() - other)[1:-1, 1:-1].max() > 5)
    assert moved > 30  # of 40; there are not many windows, and some draws have the same


@pytest.mark.parametrize(("workers", "start"), [(0, None), (1, None), (2, None), (1, "spawn")])
def test_workers_change_nothing(source: InMemory, batches: list[Batch], workers: int, start: str | None) -> None:
    made = loader(source, workers, start=start, prefetch=2)
    state = torch.get_rng_state()
    first = list(made)  # all of them held at once: no slot is used again under somebody's hands
    assert_same(first, batches)
    second = list(made)
    assert second[0].draws[0] == 40
    assert_same(first, batches)
    assert not torch.equal(second[0].images, first[0].images)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_is_broken_off_goes_on(source: InMemory, batches: list[Batch], workers: int) -> None:
    made = loader(source, workers, prefetch=2)
    for count, _ in enumerate(made, 1):
        if count == 2:
            break
    assert made.position == 16
    state = json.loads(json.dumps(made.state_dict()))  # nothing but numbers and strings
    assert_same(made, batches[2:])
    fresh = loader(source, 2 - workers)
    fresh.load_state_dict(state)
    assert_same(fresh, batches[2:])
    assert fresh.position == 40
    with pytest.raises(InputError, match="seed"):
        training_loader(source, ClassAwareSampler(source.labels, seed=5), SPEC, batch_size=8).load_state_dict(state)


def test_seeds_differ(source: InMemory, batches: list[Batch]) -> None:
    other = training_loader(source, sampler(source), SPEC, batch_size=8, seed=10)
    for a, b in zip(other, batches, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert not torch.equal(a.images, b.images)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_goes_through_all_images_in_order(source: InMemory, workers: int) -> None:
    made = evaluation_loader(source, SPEC, batch_size=8, workers=workers)
    assert len(made) == 4
    for _ in range(2):
        found = list(made)
        assert [len(batch) for batch in found] == [8, 8, 8, 6]
        assert torch.cat([batch.indices for batch in found]).tolist() == list(range(30))
        for number, image in enumerate(torch.cat([batch.images for batch in found])):
            expected = plain_centre_crop(source.read(number), SPEC).astype(int)
            assert np.abs(image.numpy() - expected).max() <= 2  # see Note [Windows] 4


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_names_what_it_cannot_read(workers: int) -> None:
    source = pictures()
    source.files[20] = b"not an image"
    made = evaluation_loader(source, SPEC, batch_size=8, workers=workers)
    with pytest.raises(
        InputError, match=r"^unreadable image canyon/20\.jpg: no image of a known format; .*needs all images$"
    ):
        list(made)


@pytest.fixture
def damaged() -> InMemory:
    source = pictures()
    for number in (4, 7, 10):  # of beach, which has ten
        source.files[number] = source.files[number][:200]
    source.files[12] = "No such file or directory"
    return source


def test_unreadable_images_are_replaced_by_the_draw(damaged: InMemory, batches: list[Batch]) -> None:
    made = list(loader(damaged))
    assert_same(loader(damaged, 2), made)
    faults = [fault for batch in made for fault in batch.faults]
    assert {fault.index for fault in faults} == {4, 7, 10, 12}
    assert {fault.reason for fault in faults if fault.index == 12} == {"No such file or directory"}
    replaced = {fault.draw: fault for fault in faults}
    for batch, whole in zip(made, batches, strict=True):
        assert torch.equal(batch.labels, whole.labels)  # the class stays
        for row, draw in enumerate(batch.draws.tolist()):
            number = int(batch.indices[row])
            if draw in replaced:
                assert replaced[draw].replacement == number != int(whole.indices[row])
                assert damaged.labels[number] == batch.labels[row]
                expected = plain_training_crop(damaged.read(number), SPEC, seed=9, draw=draw).astype(int)
                assert np.abs(batch.images[row].numpy() - expected)[1:-1, 1:-1].max() <= 1
            else:
                assert torch.equal(batch.images[row], whole.images[row])
    assert len({replaced[draw].replacement for draw in replaced if replaced[draw].index == 4}) > 1


def test_faults_are_counted_once_and_logged_by_name(damaged: InMemory, caplog: pytest.LogCaptureFixture) -> None:
    made = loader(damaged)
    with caplog.at_level(logging.WARNING, "relaylab.data"):
        for _ in range(3):
            list(made)
    assert len(made.faults) == 4
    assert sorted(record.getMessage().split(":")[0] for record in caplog.records) == [
        f"unreadable image {name}" for name in ("abbey/12.jpg", "beach/10.jpg", "beach/4.jpg", "beach/7.jpg")
    ]
    fresh = loader(damaged)
    fresh.load_state_dict(made.state_dict())
    assert fresh.faults.lines() == made.faults.lines()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_class_without_readable_images_stops_the_work(workers: int) -> None:
    source = pictures()
    for number in range(1, 30, 3):
        source.files[number] = b""
    made = loader(source, workers)
    with pytest.raises(InputError, match=r"^class beach: beach/\d+\.jpg cannot be read \(the file is empty\)"):
        list(made)


def test_too_many_faults_stop_the_work(tmp_path: Path) -> None:
    source = pictures(60)
    for number in range(0, 36, 3):
        source.files[number] = b""
    source.files[3] = "gone"
    file = tmp_path / "faults.txt"
    made = training_loader(source, sampler(source, 240), SPEC, batch_size=8, fault_file=file, max_fault_share=0.0)
    with pytest.raises(TooManyFaultsError, match=r"^11 unreadable images, 10 allowed: .*; and 1 more; .*faults\.txt$"):
        list(made)
    assert file.read_text().splitlines() == made.faults.lines()
    assert len(made.faults) == 11
    assert [path.name for path in tmp_path.iterdir()] == ["faults.txt"]
    enough = training_loader(source, sampler(source, 240), SPEC, batch_size=8, max_fault_share=0.2)
    list(enough)
    assert len(enough.faults) == 12


def test_the_list_of_faults_is_no_reason_to_hide_them(tmp_path: Path) -> None:
    log = FaultLog(100, file=tmp_path / "none" / "faults.txt")
    assert FaultLog(8_000_000).limit == 8000
    log.record(Fault(0, "a", "b") for _ in range(50))
    with pytest.raises(TooManyFaultsError) as caught:
        log.record(Fault(number, f"n{number}", "empty") for number in range(20))
    assert "none" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_little_shared_memory_is_said_before(source: InMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=100_000)
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(loading, "SHARED_MEMORY", Path("/"))
    with pytest.raises(InputError, match="need 0 MB of shared memory; / has 0 MB free: use fewer workers"):
        loader(source, 1)
    loader(source, 0)


def test_batch_sizes_are_checked(source: InMemory) -> None:
    for make in (
        lambda: OrderedBatches([1], 0),
        lambda: training_loader(source, sampler(source), SPEC, batch_size=0),
    ):
        with pytest.raises(InputError, match="batch_size must be at least 1"):
            make()


def centre_crops(source: InMemory, numbers: Iterable[int]) -> np.ndarray:
    numbers = np.array(list(numbers))
    batch = ImageBatches(source, SPEC, training=False).__getitems__(np.stack([numbers, numbers], 1))
    assert isinstance(batch, Batch)
    return batch.images.numpy().astype(np.float64)


def test_statistics_are_those_of_float64(source: InMemory) -> None:
    found = compute(source, SPEC)
    crops = centre_crops(source, range(30))
    pixels = crops.reshape(-1, 3)
    np.testing.assert_allclose(found.mean_image, crops.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.std, pixels.std(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(pixels.T, bias=True), rtol=1e-11)
    components = found.components()
    rebuilt = components.vectors @ np.diag(components.eigenvalues) @ components.vectors.T
    np.testing.assert_allclose(rebuilt, np.cov((pixels / 255).T, bias=True), rtol=1e-9)
    assert (np.diff(components.eigenvalues) <= 0).all()
    assert (found.count, found.unreadable) == (30, ())


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 7), (2, 4), (1, 64)])
def test_statistics_do_not_depend_on_how_they_are_made(source: InMemory, workers: int, batch_size: int) -> None:
    one, other = compute(source, SPEC), compute(source, SPEC, workers=workers, batch_size=batch_size)
    np.testing.assert_array_equal(one.sums, other.sums)
    np.testing.assert_array_equal(one.products, other.products)


def test_a_limit_takes_images_spread_evenly(source: InMemory) -> None:
    class Counted:
        done = 0

        def advance(self, count: int = 1, note: str | None = None) -> None:
            self.done += count

    task = Counted()
    found = compute(source, SPEC, limit=10, task=task, batch_size=4)
    np.testing.assert_array_equal(found.sums, centre_crops(source, range(0, 30, 3)).sum(0))
    assert (found.count, task.done) == (10, 10)
    assert compute(source, SPEC, limit=99).count == 30
    with pytest.raises(InputError, match="limit must be at least 1"):
        image_statistics(source, SPEC, key="k", folder=Path(), limit=0)


def test_statistics_leave_unreadable_images_out_and_name_them(damaged: InMemory) -> None:
    found = compute(damaged, SPEC, batch_size=5)
    whole = [number for number in range(30) if number not in (4, 7, 10, 12)]
    np.testing.assert_array_equal(found.sums, centre_crops(damaged, whole).sum(0))
    np.testing.assert_allclose(found.std, centre_crops(damaged, whole).reshape(-1, 3).std(0), rtol=1e-12)
    assert found.count == 26
    assert found.unreadable == ("beach/4.jpg", "beach/7.jpg", "beach/10.jpg", "abbey/12.jpg")
    damaged.files = [b""] * 30
    with pytest.raises(InputError, match=r"none of 30 images can be read: abbey/0\.jpg: the file is empty"):
        compute(damaged, SPEC)


def test_statistics_are_kept(damaged: InMemory, tmp_path: Path) -> None:
    def made(**options: Any) -> bool:
        before = damaged.reads
        known = {"key": "fingerprint", "folder": tmp_path / "cache", "crop_spec": SPEC} | options
        found = image_statistics(damaged, known.pop("crop_spec"), **known)
        assert len(found.unreadable) == 4 or "limit" in options
        return damaged.reads > before

    assert made()
    assert not made()
    assert not made(workers=1, batch_size=3)
    for change in ({"key": "other"}, {"crop_spec": CropSpec(size=30, short_side=36)}, {"limit": 5}):
        assert made(**change)
        assert not made(**change)
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 4
    for content in (b"", b"x" * 1000, files[0].read_bytes()[:-9]):
        for file in files:
            file.write_bytes(content)
        assert made()
        assert not made()


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_gives_the_same_batches_as_files(workers: int) -> None:
    source = pictures(square=True)
    decoded = decode_all(source, SPEC, workers=workers)
    made = memory_training_loader(decoded, sampler(source), SPEC, batch_size=8, seed=9)
    assert len(made) == 5
    from_files = loader(source)
    assert_same(made, from_files)
    assert_same(memory_evaluation_loader(decoded, SPEC, batch_size=8), evaluation_loader(source, SPEC, batch_size=8))
    state = loader(source)
    next(iter(state))
    made.load_state_dict(state.state_dict())
    assert next(iter(made)).draws[0] == 8
    shifted = memory_training_loader(decoded, sampler(source), SPEC, batch_size=8, seed=8)
    assert not torch.equal(next(iter(shifted)).images, next(iter(loader(source))).images)


CROPS = {
    "padded": Crops(padding=5),
    "resized": Crops(kind="resized"),
    "resized, padded": Crops(kind="resized", areas=(0.3, 0.9), padding=3),
    "policy": Crops(policy=Policy(name="randaugment")),
    "all": Crops(kind="resized", padding=3, policy=Policy(name="trivialaugment")),
}


@pytest.mark.parametrize("kind", CROPS)
def test_all_kinds_of_crops_are_functions_of_the_draw(kind: str) -> None:
    """However many workers and images in a batch there are, from files and from memory, and after a resume."""
    source, options = pictures(square=True), {"crop_spec": SPEC, "seed": 9, "crops": CROPS[kind]}
    expected = list(training_loader(source, sampler(source), batch_size=8, **options))
    state = torch.get_rng_state()
    assert_same(training_loader(source, sampler(source), batch_size=8, workers=2, **options), expected)
    decoded = decode_all(source, SPEC)
    made = memory_training_loader(decoded, sampler(source), batch_size=8, **options)
    assert_same(made, expected)
    alone = torch.cat([batch.images for batch in training_loader(source, sampler(source), batch_size=1, **options)])
    assert torch.equal(alone, torch.cat([batch.images for batch in expected]))
    stopped = training_loader(source, sampler(source), batch_size=8, **options)
    first = iter(stopped)
    assert_same([next(first), next(first)], expected[:2])
    for resumed in (made, training_loader(source, sampler(source), batch_size=8, workers=1, **options)):
        resumed.load_state_dict({**stopped.state_dict(), "sampler": {**stopped.state_dict()["sampler"], "draw": 16}})
        torch.rand(3)  # the generator is elsewhere now
        assert_same(resumed, expected[2:])
    torch.set_rng_state(state)
    others = (loader(source), training_loader(source, sampler(source), batch_size=8, **(options | {"seed": 8})))
    for other in others:  # negative controls: the paper's crops, and another seed
        same = [torch.equal(*p) for p in zip(alone, torch.cat([batch.images for batch in other]), strict=True)]
        assert np.mean(same) < 0.2


def test_unreadable_images_are_replaced_by_crops_of_the_same_kind(damaged: InMemory) -> None:
    options = {"crop_spec": SPEC, "seed": 9, "crops": CROPS["all"], "batch_size": 8, "max_fault_share": 0.5}
    expected = list(training_loader(damaged, sampler(damaged), **options))
    assert any(batch.faults for batch in expected)
    assert_same(training_loader(damaged, sampler(damaged), workers=2, **options), expected)


def test_evaluation_has_neither_padding_nor_policies(source: InMemory) -> None:
    pairs = np.stack([np.arange(6)] * 2, 1)
    plain = ImageBatches(source, SPEC, training=False).__getitems__(pairs)
    crops = ImageBatches(source, SPEC, training=False, crops=CROPS["all"]).__getitems__(pairs)
    assert_same([crops], [plain])


def test_memory_holds_the_centre_squares(source: InMemory) -> None:
    decoded = decode_all(source, SPEC)
    assert decoded.images.shape == (30, 36, 36, 3)
    assert decoded.labels.tolist() == source.labels.tolist()
    for number in range(30):
        expected = plain_centre_crop(source.read(number), CropSpec(size=36, short_side=36)).astype(int)
        assert np.abs(decoded.images[number].numpy() - expected).max() <= 2
    with pytest.raises(InputError, match="decoded images of 36 x 36 for a shorter side of 40"):
        memory_evaluation_loader(decoded, CropSpec(size=32, short_side=40), batch_size=8)


def test_memory_says_what_is_missing(damaged: InMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"unreadable image beach/4\.jpg: .*, and 3 more; `relaylab data check`"):
        decode_all(damaged, SPEC)
    reads = damaged.reads
    assert reads == 30  # all have been tried
    monkeypatch.setattr(memory, "free_memory", lambda device: 100_000)
    with pytest.raises(InputError, match=r"30 images of 36 x 36 need 0\.00 GB; 0\.00 GB of memory are free on cpu"):
        decode_all(damaged, SPEC)
    assert damaged.reads == reads


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_holds_and_cuts_the_same() -> None:
    source = pictures(square=True)
    made = memory_training_loader(decode_all(source, SPEC, device="cuda"), sampler(source), SPEC, batch_size=8, seed=9)
    assert all(batch.images.is_cuda for batch in made)
    made.load_state_dict(loader(source).state_dict())
    assert_same([batch.to("cpu") for batch in made], loader(source))
    pinned = list(loader(source, 2, pin_memory=True))
    assert all(batch.images.is_pinned() and batch.labels.is_pinned() for batch in pinned)
    assert_same(pinned, loader(source))


def test_real_scenes(shared_data: Path) -> None:
    """Of MiniPlaces, 72 x 72: what Pillow reads is what is decoded, and a window is a piece of it."""
    files: list[bytes] = []
    with tarfile.open(shared_data / "miniplaces72_val.tar.xz", "r|*") as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is not None and member.name.endswith(".jpg"):
                files.append(content.read())
            if len(files) == 60:
                break
    for data in files:
        pixels, complaint = decode_checked(data)
        assert complaint is None
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    source, crop_spec = InMemory(list(files), [i % 3 for i in range(60)]), CropSpec(size=64, short_side=72)
    decoded = decode_all(source, crop_spec)
    streamed = training_loader(source, sampler(source, 60), crop_spec, batch_size=20, seed=2)
    kept = memory_training_loader(decoded, sampler(source, 60), crop_spec, batch_size=20, seed=2)
    for batch, other in zip(streamed, kept, strict=True):
        assert torch.equal(batch.images, other.images)
        for image, draw, number in zip(batch.images, batch.draws.tolist(), batch.indices.tolist(), strict=True):
            expected = plain_training_crop(files[number], crop_spec, seed=2, draw=draw)
            np.testing.assert_array_equal(image.numpy(), expected)


def test_only_one_iterator_at_a_time(source: InMemory) -> None:
    loader = training_loader(source, ClassAwareSampler(source.labels), SPEC, batch_size=4)
    first = iter(loader)
    next(first)
    second = iter(loader)
    next(second)
    with pytest.raises(InputError, match="one at a time"):
        next(first)
    assert next(second).draws.tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize("options", [{"workers": -1}, {"prefetch": 0}, {"start": "nope"}, {"max_fault_share": 2.0}])
def test_options_are_checked(options: dict, source: InMemory) -> None:
    with pytest.raises(InputError, match=r"expected|must be"):
        training_loader(source, ClassAwareSampler(source.labels), SPEC, batch_size=4, **options)


def test_a_state_moves_from_memory_to_files(source: InMemory) -> None:
    decoded = decode_all(source, SPEC)
    memory_loader = memory_training_loader(decoded, ClassAwareSampler(source.labels), SPEC, batch_size=4)
    next(iter(memory_loader))
    files = training_loader(source, ClassAwareSampler(source.labels), SPEC, batch_size=4)
    files.load_state_dict(memory_loader.state_dict())
    assert files.position == 4


def test_statistics_notice_images_that_are_written_over(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (30, 30, 30)).save(path)

    def mean() -> float:
        dataset = OnDiskDataset(open_source(tmp_path / "data"), CropSpec(size=8, short_side=8), workers=0)
        return float(dataset.statistics().mean.mean())

    assert mean() == 30
    for path in (tmp_path / "data").rglob("*.png"):
        with path.open("r+b") as file:
            file.truncate(0)
            Image.new("RGB", (8, 8), (225, 225, 225)).save(file, "PNG")
    assert mean() == 225
