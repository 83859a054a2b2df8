"""The cost model by hand, the simulated link of the overlap benchmark, and the tables of docs/method/scale.md."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision", reason="needs torchvision")

from benchmarks import overlap, scale
from benchmarks.scale import Cluster, Job, Stage

ROOT = Path(__file__).parents[1]
# One operation per second, two devices, and an all-reduce of one second per byte.
CLUSTER = Cluster(rate=1.0, node=2, inside=1.0, between=1.0, latency=0.0)


def job(below: float, overlap: float, above: float) -> Job:
    """Return a job with gradients of these sizes, in bytes."""
    stages = Stage(2, 4, 0, below), Stage(3, 6, 5, overlap), Stage(7, 8, 0, above)
    return Job(*stages, images=1, transferred=0.0)


@pytest.mark.parametrize(
    ("gradients", "ordinary", "early"),
    [
        ((0, 0, 0), 35, 35),
        ((1, 2, 3), 36, 37),  # only the last stage is not hidden: below, or the overlap
        ((15, 0, 0), 50, 35),  # hidden behind the top, 15 seconds
        ((16, 0, 0), 51, 35),
        ((40, 0, 0), 75, 54),  # longer than all later stages
        ((0, 0, 20), 40, 49),
    ],
)
def test_data_parallel_by_hand(gradients: tuple[float, float, float], ordinary: float, early: float) -> None:
    """Ordinary: forward 12, above 8, lane and overlap 11, below 4. Early: below 14, above 15, overlap 6."""
    given = job(*gradients)
    assert scale.data_parallel(given, CLUSTER, 2, early=False) == ordinary
    assert scale.data_parallel(given, CLUSTER, 2, early=True) == early
    assert scale.data_parallel(given, CLUSTER, 2, early=True, hidden=False) == 35 + sum(gradients)


def test_link_transmits_one_message_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 100.0

        def perf_counter(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += seconds

    class Done:
        def wait(self) -> None:
            pass

    clock = Clock()
    monkeypatch.setattr(overlap, "time", clock)
    link = overlap.Link(lambda *_args, **_kwargs: Done())
    message = torch.zeros(1000)
    link.all_reduce(message)
    assert clock.now == 100  # without delay
    link.latency, link.bandwidth = 1.0, 4000 / 2
    works = [link.all_reduce(message, async_op=True) for _ in range(2)]
    assert clock.now == 100
    clock.now = 101
    arrivals = []
    for work in works:
        assert work is not None
        work.wait()
        arrivals.append(clock.now)
    assert arrivals == [103, 106]
    assert link.waited == 5
    assert link.sizes == [4000] * 3


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch is built without gloo")
def test_overlap_benchmark_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = overlap.Settings(workloads={"tiny": overlap.tiny}, loads=(4.0,), rounds=3)
    monkeypatch.setattr(overlap, "QUICK", tiny)
    monkeypatch.setattr(overlap, "targets", lambda _settings: {})
    file = tmp_path / "overlap.json"
    overlap.main(["--quick", "--json", str(file)])
    metrics = json.loads(file.read_text())["figures"]
    assert metrics["tiny_messages"] > 3
    assert metrics["tiny_load4.0_end_ms"] > metrics["tiny_free_end_ms"]


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table after some words in docs/method/scale.md, without the header."""
    text = (ROOT / "docs" / "method" / "scale.md").read_text()
    table = re.search(r"(^\|.*\n)+", text[text.index(heading) :], re.MULTILINE)
    assert table is not None
    lines = table.group().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def figures_of(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / name).read_text())["figures"]


NAMES = {"model A": "model_a", "ViT-B/16": "vit_b", "VGG-22": "vgg22", "ResNet-50": "resnet50"}
WAYS = ("data_parallel", "early_release", "window_parallel", "pipelined_multi_loss")


def test_docs_table_of_many_gpus() -> None:
    found = figures_of("scale.json")
    table = rows("## Predictions")
    assert len(table) == 2 * len(scale.GPUS)
    for name, gpus, *cells in table:
        key = f"{NAMES[name]}_n{gpus.replace(',', '')}_efficiency_"
        assert cells == [f"{found[key + way]:.2f}" for way in WAYS]
    for name, job in scale.jobs().items():
        for key, value in scale.project(job, scale.ASSUMED).items():
            assert found[f"{name}_{key}"] == pytest.approx(value, rel=1e-9), key


def test_docs_table_of_the_check() -> None:
    found = figures_of("scale.json")
    for (_, alone, together, predicted), key in zip(rows("## Comparison with a real run"), WAYS[:2], strict=True):
        assert alone == f"{found[f'check_{key}_alone_ms']:.0f} ms"
        assert together == f"{found[f'check_{key}_ms']:.0f} ms"
        assert predicted == f"{found[f'check_{key}_predicted']:.3f}"


def test_docs_table_of_averaging() -> None:
    found = figures_of("overlap.json")
    for name, load, bandwidth, end, during, compared, hidden, bound in rows("## Averaging while"):
        key = f"{NAMES[name]}_load{load}_"
        assert bandwidth == f"{found[key + 'megabytes_per_s']:.0f} MB/s"
        assert (end, during) == tuple(f"{found[f'{key}{way}_ms']:.0f} ms" for way in ("end", "during"))
        assert compared == f"{found[key + 'during_over_end']:.2f} ± {found[key + 'during_over_end_error']:.2f}"
        assert hidden == f"{100 * found[key + 'hidden']:.0f} %"
        assert bound == f"{found[key + 'over_bound']:.2f}"
