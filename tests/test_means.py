"""Every mean that the lab reports is a plain float64 sum over its images, divided by their number.

With 65 images the last batch has one image, and the shares of two processes are not equal.
"""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from relaybackprop import Plan, Relay
from relaylab.data.augment import Augmentation
from relaylab.data.datasets import InMemoryDataset
from relaylab.data.geometry import CropSpec
from relaylab.data.memory import DecodedImages, decoded_statistics
from relaylab.evaluate.ensembles import combined
from relaylab.evaluate.error_rates import error_rates, per_class_errors
from relaylab.train.meter import Meter
from relaylab.train.validation import Validation

COUNT, CLASSES = 65, 7


def images(count: int = COUNT) -> DecodedImages:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 4, 4, 3), dtype=torch.uint8, generator=generator)
    return DecodedImages(pixels, torch.randint(0, CLASSES, (count,), generator=generator), tuple("abcdefg"))


def network() -> Relay:
    torch.manual_seed(0)
    return Relay(nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES)), Plan())


def validated(fabric: Any, count: int = COUNT) -> dict[str, float]:
    dataset = InMemoryDataset(images(count), CropSpec(size=4, short_side=4))
    augment = Augmentation(torch.zeros(3), torch.full((3,), 64.0), seed=0, flip=False)
    return Validation(dataset, augment, nn.CrossEntropyLoss(), fabric)(network())


def by_hand(count: int = COUNT) -> dict[str, float]:
    """Sums over all images one by one, in float64."""
    known, model = images(count), network().model.double()
    sums = dict.fromkeys(("loss", "top1", "top5"), 0.0)
    for pixels, label in zip(known.images, known.labels.tolist(), strict=True):
        with torch.no_grad():
            scores = model(pixels.permute(2, 0, 1)[None].double() / 64)[0]
        sums["loss"] += float(scores.exp().sum().log() - scores[label])
        rank = int((scores > scores[label]).sum())
        sums["top1"] += 100 * (rank >= 1)
        sums["top5"] += 100 * (rank >= 5)
    return {name: total / count for name, total in sums.items()}


def in_process(rank: int, ranks: int, store: str, results: Any) -> None:
    """Validate in one of several processes, which share their sums by gloo."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)

    def all_reduce(tensor: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        dist.all_reduce(tensor)
        return tensor

    fabric = SimpleNamespace(
        world_size=ranks,
        global_rank=rank,
        device=torch.device("cpu"),
        autocast=nullcontext,
        all_reduce=all_reduce,
    )
    results.put([validated(fabric), validated(fabric, 1)])
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # of Python 3.12, where torch has threads
def test_validation_in_one_and_two_processes(tmp_path: Any) -> None:
    one = SimpleNamespace(
        world_size=1,
        global_rank=0,
        device=torch.device("cpu"),
        autocast=nullcontext,
        all_reduce=lambda tensor, reduce_op: tensor,
    )
    expected, single = by_hand(), by_hand(1)
    assert validated(one) == pytest.approx(expected, rel=1e-6, abs=1e-4)
    results = mp.get_context("fork").SimpleQueue()
    mp.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        in_process, (2, str(tmp_path / "store"), results), nprocs=2, start_method="fork"
    )
    for _ in range(2):
        whole, first = results.get()
        assert whole == pytest.approx(expected, rel=1e-6, abs=1e-4)
        assert first == pytest.approx(single, rel=1e-6, abs=1e-4), "more processes than images"


def test_error_rates_and_ensembles() -> None:
    generator = torch.Generator().manual_seed(1)
    members = [torch.randn(COUNT, CLASSES, generator=generator).log_softmax(1) for _ in range(2)]
    labels = images().labels
    mixed = combined(members, "average")
    wrong = [0.0] * CLASSES
    counts = [0] * CLASSES
    for row, label in enumerate(labels.tolist()):
        probabilities = [sum(float(m[row, c].double().exp()) for m in members) / 2 for c in range(CLASSES)]
        np.testing.assert_allclose(mixed[row].exp().numpy(), probabilities, rtol=1e-5)
        wrong[label] += max(range(CLASSES), key=probabilities.__getitem__) != label
        counts[label] += 1
    found = error_rates(mixed, labels)
    assert found.top1.value == pytest.approx(100 * sum(wrong) / COUNT)
    classes = [100 * each / count for each, count in zip(wrong, counts, strict=True)]
    assert found.mean_per_class == pytest.approx(sum(classes) / CLASSES)
    np.testing.assert_allclose(per_class_errors(mixed, labels), classes)


def test_statistics_of_images() -> None:
    found = decoded_statistics(images(), CropSpec(size=4, short_side=4))
    pixels = images().images.double().reshape(-1, 3)
    np.testing.assert_allclose(found.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.std, pixels.std(0, correction=0), rtol=1e-12)
    np.testing.assert_allclose(found.mean_image, images().images.double().mean(0), rtol=1e-6)


def test_metrics_of_training_are_means_over_steps_with_batches_of_one_size() -> None:
    random = np.random.default_rng(0)
    values, meter = random.random(COUNT), Meter()
    for value in values:
        meter.count({"primary": float(value), "top1": float(value > 0.5), "top5": 0.0}, float(value))
    found = meter.values(batch_size=4)
    assert found["loss"]["primary"] == pytest.approx(float(values.sum()) / COUNT)
    assert found["top1"] == pytest.approx(100 * float((values > 0.5).sum()) / COUNT)
    assert found["gradient_norm"] == pytest.approx(float(values.sum()) / COUNT)
