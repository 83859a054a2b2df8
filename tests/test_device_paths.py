"""Copies, kernels and synchronisations of training and evaluation: their order and number, as far as a CPU shows."""

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from relaylab.data.augment import Augmentation
from relaylab.data.batches import Batch
from relaylab.data.crops import Crops
from relaylab.data.datasets import ImageDataset, InMemoryDataset, OnDiskDataset
from relaylab.data.geometry import CropSpec
from relaylab.data.loader import TrainingLoader
from relaylab.data.memory import decode_all
from relaylab.data.sampling import KeyedSampler, ShuffledSampler
from relaylab.data.sources.opening import open_source
from relaylab.errors import LabError
from relaylab.train import loop, requests, run_folder, session
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
