"""Copies, kernels and synchronisations of training and evaluation: their order and number, as far as a CPU shows."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.overrides import TorchFunctionMode

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from relaylab.data.augment import Augmentation
from relaylab.data.batches import Batch
from relaylab.data.copying import to_device
from relaylab.data.crops import Crops
from relaylab.data.datasets import ImageDataset, InMemoryDataset, OnDiskDataset
from relaylab.data.geometry import CropSpec
from relaylab.data.loader import TrainingLoader, Workers
from relaylab.data.memory import DecodedImages, decode_all
from relaylab.data.policies import Policy
from relaylab.data.sampling import KeyedSampler, ShuffledSampler
from relaylab.data.sources.opening import open_source
from relaylab.errors import LabError
from relaylab.evaluate import scores, testing
from relaylab.evaluate.protocols import View
from relaylab.evaluate.scores import ScoreFolder, describe_images
from relaylab.evaluate.testing import Scorer
from relaylab.models import model_a
from relaylab.models.file import InputConfig, ModelFile
from relaylab.progress import Silent
from relaylab.recipes.schema import NetworkConfig
from relaylab.train import images, loop, requests, run_folder, session, storage
from relaylab.train.options import TrainOptions
from relaylab.train.state import optimizer_tensors
from relaylab.train.stream import Stream

SPEC = CropSpec(size=24, short_side=28)


def train(tree: Path, out: Path, *changes: str, iterations: int = 4, **options: Any) -> session.Outcome:
    lengths = (f"optimizer.iterations={iterations}", f"optimizer.evaluate_every={iterations}")
    given = {"log_every": 100, "diagnose_every": 0, "workers": 0, "accelerator": "cpu", **options}
    recipe = "table3-model-a-relay"
    return session.train(
        requests.resolve(
            TrainOptions(recipe=recipe, scale="tiny", data=(tree,), out=out, changes=(*lengths, *changes), **given)
        )
    )


# Batches that are fetched ahead


def sampler_of(dataset: ImageDataset) -> KeyedSampler:
    return ShuffledSampler(dataset.labels, seed=3, num_samples=60)


def stream_of(tree: Path, where: str) -> Stream:
    source = open_source([tree], split="train")
    workers = 2 if where == "workers" else 0
    dataset = (
        InMemoryDataset(decode_all(source, SPEC), SPEC) if where == "memory" else OnDiskDataset(source, SPEC, workers)
    )
    return Stream(dataset, sampler_of(dataset), 6, 3, Crops())


def used(stream: Stream, *, ahead: bool) -> Iterator[Batch]:
    for batch in stream:
        if ahead:
            stream.fetch()
        yield batch


@pytest.mark.parametrize("where", ["memory", "disk", "workers"])
def test_a_stream_resumes_after_the_batches_used_not_those_fetched(where: str, tiny_images: Path) -> None:
    """On every boundary, whether or not the next batch was fetched before the position was saved."""
    expected = list(stream_of(tiny_images, where))
    assert len(expected) == 10
    for ahead in (False, True):
        stream, states = stream_of(tiny_images, where), list[dict[str, Any]]()
        states.append(stream.state_dict())
        for batch, other in zip(used(stream, ahead=ahead), expected, strict=True):
            assert torch.equal(batch.images, other.images)
            states.append(stream.state_dict())
        boundaries = (2, 3) if where == "workers" else range(10)
        for done in boundaries:
            state = states[done]
            assert state["sampler"]["draw"] == 6 * done
            resumed = stream_of(tiny_images, where)
            resumed.fetch()  # is dropped
            resumed.load_state_dict(state)
            rest = list(resumed)
            assert len(rest) == 10 - done
            assert all(torch.equal(a.images, b.images) for a, b in zip(rest, expected[done:], strict=True))


def test_faults_of_a_batch_that_was_only_fetched_are_not_in_the_state(tiny_images: Path, tmp_path: Path) -> None:
    tree = tmp_path / "images"
    shutil.copytree(tiny_images, tree)
    for path in sorted((tree / "train" / "class0").iterdir())[:3]:
        path.write_bytes(b"")
    stream = stream_of(tree, "disk")
    fetched, seen = list[int](), list[int]()
    for batch in used(stream, ahead=True):
        seen += [fault.index for fault in batch.faults]
        found = stream.state_dict()["faults"]["numbers"]
        assert found == list(dict.fromkeys(seen))
        fetched.append(len(stream._loader.faults) - len(found))
    assert len(set(seen)) == 3
    assert max(fetched) > 0, "negative control: the loader itself counts those of batches fetched"


def test_the_next_batch_is_fetched_before_the_metrics_are_read(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last kernels of the step are launched. None is fetched after the last step."""
    events: list[str] = []

    def note(owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def noted(*arguments: Any, **options: Any) -> Any:
            events.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, method, noted)

    note(Batch, "to", "copy")
    note(loop.Trainer, "backward", "launch")
    note(loop.Trainer, "check_and_count", "wait")
    note(session.Validation, "__call__", "validate")
    train(tiny_images, tmp_path / "run", iterations=3, accumulate=2)
    step = ["launch", "copy", "launch", "copy", "wait"]
    assert events == ["copy", *step, *step, "launch", "copy", "launch", "wait", "validate"]


def test_an_error_in_a_fetch_costs_no_step(tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step before is made and saved: the error belongs to the step that would have used the batch."""
    original = TrainingLoader.__iter__

    def failing(self: TrainingLoader) -> Iterator[Batch]:
        for count, batch in enumerate(original(self), 1):
            if count == 4:
                raise LabError("cannot read")
            yield batch

    monkeypatch.setattr(TrainingLoader, "__iter__", failing)
    with pytest.raises(LabError, match="cannot read"):
        train(tiny_images, tmp_path / "run", iterations=6, save_every=1)
    steps = sorted(path.name for path in (tmp_path / "run" / run_folder.CHECKPOINTS).iterdir())
    assert steps == ["step-00000002", "step-00000003"]


# The model file


@pytest.mark.parametrize("changes", [(), ("augmentation.mean=channel", "augmentation.divide=true")], ids=str)
def test_writing_the_model_file_leaves_the_augmentation_on_its_device(
    changes: tuple[str, ...], tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Module.cpu` and its like move a module in place, by `_apply`."""
    moved: list[bool] = []
    is_writing = False
    apply, write = Augmentation._apply, session._write_model

    def watched(self: Augmentation, *arguments: Any, **options: Any) -> Any:
        moved.append(is_writing)
        return apply(self, *arguments, **options)

    def writing(*arguments: Any) -> None:
        nonlocal is_writing
        is_writing = True
        write(*arguments)
        is_writing = False

    monkeypatch.setattr(Augmentation, "_apply", watched)
    monkeypatch.setattr(session, "_write_model", writing)
    train(tiny_images, tmp_path / "run", *changes, iterations=2)
    assert (tmp_path / "run" / run_folder.MODEL).is_file()
    assert moved == [False], "once, to the device, when the trainer was assembled"


# Synchronisations of a step


class Reads(TorchFunctionMode):
    """Records the tensors that the host reads, such as losses, except int64: draws and indices are on the CPU."""

    NAMES = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero", "__array__")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.NAMES and args[0].dtype != torch.int64:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


CLIPPED = "optimizer.clip_norm=0.5"
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"changes": (CLIPPED,), "precision": "bf16"},
    "fp16": {"precision": "fp16", "changes": (CLIPPED,)},
    "early release": {"early_release": True, "accumulate": 2, "precision": "fp16"},
    "multi-loss": {"changes": ("scheme=multi_loss", "optimizer.ema_decay=0.9")},
}


def reads_of_steps(monkeypatch: pytest.MonkeyPatch, mode: Any = Reads) -> list[list[str]]:
    """Return a list that receives the reads of each step."""
    steps, original = list[list[str]](), loop.Trainer.step

    def step(self: loop.Trainer) -> bool:
        with mode() as reads:
            stopping = original(self)
        steps.append(reads.seen)
        return stopping

    monkeypatch.setattr(loop.Trainer, "step", step)
    return steps


@pytest.mark.parametrize("way", WAYS)
def test_a_step_reads_from_the_device_once(
    way: str, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(WAYS[way])
    steps = reads_of_steps(monkeypatch)
    train(tiny_images, tmp_path / "run", *options.pop("changes", ()), iterations=3, **options)
    assert steps == [["tolist"]] * 3


def test_gradient_statistics_read_twice_more(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for all cosines, once for all magnitudes."""
    steps = reads_of_steps(monkeypatch)
    train(tiny_images, tmp_path / "run", iterations=3, diagnose_every=2, precision="fp16")
    assert [len(reads) for reads in steps] == [1, 3, 1]


class Synchronisations:
    """Records the synchronisations of a GPU, as `torch.cuda.set_sync_debug_mode` reports them."""

    def __enter__(self) -> "Synchronisations":
        torch.cuda.set_sync_debug_mode("warn")
        self._catching = warnings.catch_warnings(record=True)
        self._warnings = self._catching.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._catching.__exit__(*error)  # pyright: ignore
        found = [str(warning.message) for warning in self._warnings]
        self.seen = [text for text in found if "synchronizing" in text]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_on_a_gpu_synchronises_once(
    way: str, where: str, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"accelerator": "cuda", "images": where, **WAYS[way]}
    steps = reads_of_steps(monkeypatch, Synchronisations)
    train(tiny_images, tmp_path / "run", *options.pop("changes", ()), iterations=5, **options)
    assert [len(seen) for seen in steps[1:]] == [1] * 4, steps  # the first one also initialises libraries


def test_an_update_that_would_not_be_finite_changes_nothing(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fp16, neither weights nor momentum; the scale is halved. Otherwise training stops before the update."""
    original, update = loop.Trainer.backward, loop.Trainer.update
    seen: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]] = []

    def backward(self: loop.Trainer, *arguments: Any) -> Any:
        found = original(self, *arguments)
        if self.progress.step == 2:
            next(self.relay.parameters()).grad[0] = float("nan")  # pyright: ignore
        return found

    def state(trainer: loop.Trainer) -> dict[str, torch.Tensor]:
        moments = optimizer_tensors(trainer.relay, trainer.optimizer.optimizer)
        return {name: t.clone() for name, t in {**trainer.relay.state_dict(), **moments}.items()}

    def updated(self: loop.Trainer, norm: float) -> None:
        before = state(self)
        update(self, norm)
        assert self.scaler is not None
        seen.append((before, state(self), self.scaler.get_scale()))

    monkeypatch.setattr(loop.Trainer, "backward", backward)
    monkeypatch.setattr(loop.Trainer, "update", updated)
    train(tiny_images, tmp_path / "run", iterations=4, precision="fp16")
    scales = [scale for *_, scale in seen]
    assert scales[2:] == [scales[1] / 2] * 2
    for step, (before, after, _) in enumerate(seen):
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert bool(changed) == (step != 2), changed[:3]


# Images in memory

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
WINDOWS, RESIZED, POLICY = Crops(padding=2), Crops(kind="resized"), Crops(policy=Policy(name="randaugment"))
TRAIN, VAL = 60 * 3 * 28**2, 20 * 3 * 28**2  # bytes of the images of `tiny_images`


@pytest.mark.parametrize(
    ("free", "crops", "runs", "expected"),
    [
        (4 * (TRAIN + VAL), WINDOWS, 1, (CUDA, CUDA)),
        (4 * (TRAIN + VAL) - 4, WINDOWS, 1, (CUDA, CPU)),
        (4 * TRAIN - 4, WINDOWS, 1, (CPU, CUDA)),
        (4 * VAL - 4, WINDOWS, 1, (CPU, CPU)),
        (8 * (TRAIN + VAL), WINDOWS, 2, (CUDA, CUDA)),
        (8 * (TRAIN + VAL) - 8, WINDOWS, 2, (CUDA, CPU)),
        (10**12, RESIZED, 1, (CPU, CUDA)),
        (10**12, POLICY, 1, (CPU, CUDA)),
    ],
)
def test_a_gpu_stores_the_images_that_fit_into_a_share_of_its_memory(
    free: int,
    crops: Crops,
    runs: int,
    expected: tuple[torch.device, ...],
    tiny_images: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sources = open_source([tiny_images], split="train"), open_source([tiny_images], split="val")
    assert [len(source) for source in sources] == [60, 20]
    monkeypatch.setattr(storage, "free_memory", lambda device: {"cuda": free}[device.type])
    assert storage.storage_devices(CUDA, sources, SPEC, crops, runs) == expected
    assert storage.storage_devices(CPU, sources, SPEC, crops, runs) == (CPU, CPU)


@pytest.mark.parametrize("resized", [False, True])
def test_a_run_decodes_its_images_to_where_they_are_stored(
    resized: bool, tiny_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a recorder in the place of the GPU, and with pinned batches of what remains on the CPU."""
    devices: list[torch.device] = []

    def decode(*arguments: Any, device: torch.device, **options: Any) -> DecodedImages:
        devices.append(device)
        return decode_all(*arguments, **options)

    monkeypatch.setattr(storage, "decode_all", decode)
    monkeypatch.setattr(storage, "free_memory", lambda _: 10**12)
    changes = ("augmentation.crop=resized",) if resized else ()
    options = TrainOptions(recipe="table3-model-a-relay", scale="tiny", data=(tiny_images,), changes=changes)
    recipe = requests.resolve(options).recipe
    opened = images.open_images(recipe, options, device=CUDA, first=nullcontext())
    assert devices == [CPU if resized else CUDA, CUDA]
    pinned: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Batch, "pin_memory", lambda self: (pinned.append(len(self)), self)[1])
    assert isinstance(opened.val, InMemoryDataset)
    training = opened.train.training(sampler_of(opened.train), 6, 3, images.crops_of(recipe))
    assert len(list(training)) == 10
    assert len(list(opened.val.subset(np.arange(5)).evaluation(5))) == 1
    assert pinned == [6] * 10 + [5]
    devices.clear()
    opened = images.open_images(recipe, options, device=CPU, first=nullcontext())
    assert devices == [CPU, CPU]
    list(opened.val.evaluation(5))
    assert len(pinned) == 11, "not pinned without a GPU"


def on_meta(decoded: DecodedImages) -> DecodedImages:
    return DecodedImages(decoded.images.to("meta"), decoded.labels.to("meta"), decoded.classes)


@pytest.mark.parametrize("crops", [Crops(), WINDOWS], ids=["window", "padded"])
def test_images_on_a_device_are_cropped_without_reading_from_it(crops: Crops, tiny_images: Path) -> None:
    """The meta device has no values: to read one is an error."""
    decoded = decode_all(open_source([tiny_images], split="train"), SPEC)
    here, there = InMemoryDataset(decoded, SPEC), InMemoryDataset(on_meta(decoded), SPEC, pin_memory=True)
    sampler = sampler_of(here)
    batches = [*there.training(sampler, 6, 3, crops), *there.evaluation(20)]
    assert [tuple(batch.images.shape) for batch in batches] == [(6, 24, 24, 3)] * 10 + [(20, 24, 24, 3)] * 3
    assert all(batch.images.is_meta and batch.labels.is_meta for batch in batches)
    assert not any(batch.draws.is_meta or batch.indices.is_meta for batch in batches)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):  # negative control
        next(iter(there.training(sampler_of(here), 6, 3, RESIZED)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("crops", [WINDOWS, RESIZED, POLICY], ids=["window", "resized", "policy"])
def test_batches_of_images_on_a_gpu_and_pinned_ones_are_the_same(crops: Crops, tiny_images: Path) -> None:
    source = open_source([tiny_images], split="train")
    here = InMemoryDataset(decode_all(source, SPEC), SPEC, pin_memory=True)
    there = InMemoryDataset(decode_all(source, SPEC, device="cuda"), SPEC)
    for pinned, other in zip(
        [*here.training(sampler_of(here), 6, 3, crops), *here.evaluation(20)],
        [*there.training(sampler_of(here), 6, 3, crops), *there.evaluation(20)],
        strict=True,
    ):
        assert pinned.images.is_pinned()
        assert pinned.labels.is_pinned()
        assert other.images.is_cuda
        assert other.labels.is_cuda
        assert torch.equal(pinned.images, other.images.cpu())
        assert torch.equal(pinned.labels, other.labels.cpu())


# Augmentation


class Copies(TorchFunctionMode):
    """Records the shapes of the tensors that are copied from the CPU to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_cpu and args and isinstance(args[0], torch.Tensor):
            self.seen += [tuple(args[0].shape)] if args[0].is_cpu else []
        return result


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({"erasing": 0.5}, 8),
        ({}, 4),
        ({"flip": False}, 3),
        ({"components": None}, 1),
        ({"flip": False, "components": None, "erasing": 0.5}, 4),
        ({"flip": False, "components": None}, 0),
    ],
    ids=str,
)
def test_augmentation_copies_its_random_numbers_at_once_and_reads_nothing(options: dict[str, Any], width: int) -> None:
    """On the meta device, where there is nothing to read."""
    crops, draws = torch.zeros(5, 8, 8, 3, dtype=torch.uint8, device="meta"), torch.arange(5)
    augment = Augmentation(torch.zeros(8, 8, 3), torch.ones(3), seed=1, **options).to("meta")
    with Copies() as copies:
        result = augment(crops, draws)
    assert result.is_meta
    assert result.shape == (5, 3, 8, 8)
    assert copies.seen == ([(5, width)] if width else [])


@pytest.mark.parametrize("is_cuda", [True, False])
def test_copies_to_a_gpu_are_asynchronous_from_pinned_memory(is_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a recorder in the place of the GPU."""
    calls: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: (calls.append("pin"), self)[1])
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *device, **options: (calls.append((device, options)), self)[1])
    device = CUDA if is_cuda else CPU
    to_device(torch.zeros(3), device)
    assert calls == (["pin"] if is_cuda else []) + [((device,), {"non_blocking": True})]


# Evaluation

VIEWS = [View("single-crop"), View("ten-crop")]


def scorer_of(device: str = "cpu") -> Scorer:
    torch.manual_seed(0)
    network = NetworkConfig(architecture="model_a", num_classes=5, image_size=32, width=4, pyramid=(2, 1))
    state = model_a(5, width=4, image_size=32, pyramid=(2, 1)).state_dict()
    config = InputConfig(resize=36, crop=32, mean=(110.0, 115.0, 100.0), std=(50.0, 60.0, 70.0))
    return Scorer(ModelFile(network=network, classes=tuple("abcde"), input=config, state=state, about=""), device)


def scored(tree: Path, out: Path, workers: int, views: list[View] = VIEWS) -> ScoreFolder:
    source = open_source([tree], split="train")
    folder = ScoreFolder(out, describe_images(source))
    folder.add("net", {"sha256": "0" * 64, "file": "net.safetensors", "title": "net"})
    assert testing.evaluate(scorer_of(), source, folder, "net", views, workers=workers, task=Silent())
    return folder


def test_evaluation_starts_its_workers_once_and_copies_scores_once_per_chunk(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where some chunks of some views exist. The scores are those of chunks evaluated one by one."""
    whole = scored(tiny_images, tmp_path / "whole", 0)
    expected = {view: whole.read("net", view.name) for view in VIEWS}
    monkeypatch.setattr(scores, "CHUNK", 16)  # four chunks
    loaders: list[int] = []
    processes: list[set[int]] = []
    copies: list[tuple[int, ...]] = []
    loader, cpu, write = Workers.loader, torch.Tensor.cpu, ScoreFolder.write

    def counted(self: Workers, *arguments: Any, **options: Any) -> Any:
        loaders.append(self.count)
        return loader(self, *arguments, **options)

    def copied(self: torch.Tensor) -> torch.Tensor:
        copies.extend([tuple(self.shape)] if self.is_floating_point() else [])  # not the labels
        return cpu(self)

    def written(self: ScoreFolder, *arguments: Any) -> None:
        processes.append({child.pid for child in psutil.Process().children() if child.name() == "pt_data_worker"})
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "cpu", cpu)
            write(self, *arguments)

    monkeypatch.setattr(Workers, "loader", counted)
    monkeypatch.setattr(torch.Tensor, "cpu", copied)
    monkeypatch.setattr(ScoreFolder, "write", written)
    parts = scored(tiny_images, tmp_path / "parts", 2)
    assert loaders == [2]
    assert copies == [(2, 16, 5)] * 3 + [(2, 12, 5)]
    first, *others = processes[:-2]
    assert all(now and now <= first for now in others), "workers end when there is nothing left to read"
    for view in VIEWS:
        assert torch.equal(parts.read("net", view.name), expected[view])
    some = sorted((tmp_path / "parts").rglob("*.safetensors"))
    for path in some:
        if path.parent.name == "ten-crop" and path.stem in ("000001", "000003"):
            path.unlink()
        elif path.parent.name == "single-crop" and path.stem in ("000003",):
            path.unlink()
    copies.clear()
    parts = scored(tiny_images, tmp_path / "parts", 0)
    assert loaders == [2, 0]
    assert copies == [(1, 16, 5), (2, 12, 5)]
    for view in VIEWS:
        assert torch.equal(parts.read("net", view.name), expected[view])
    scored(tiny_images, tmp_path / "parts", 0)
    assert loaders == [2, 0], "nothing is missing, so nothing is read"


def test_a_scorer_reads_nothing_from_its_device() -> None:
    """On the meta device, where there is nothing to read."""
    scorer = scorer_of("meta")
    for view, crops in ((View("single-crop"), 1), (View("ten-crop"), 5), (View("dense", 40, flip=True), 1)):
        size = view.scale or 32
        result = scorer(view, torch.zeros(3, crops, size, size, 3, dtype=torch.uint8))
        assert result.is_meta
        assert result.shape == (3, 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_scorer_on_a_gpu_gives_the_same() -> None:
    images = torch.randint(0, 256, (3, 5, 32, 32, 3), dtype=torch.uint8)
    here, there = (scorer_of(device)(View("ten-crop"), images) for device in ("cpu", "cuda"))
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), here, rtol=1e-2, atol=1e-2)
