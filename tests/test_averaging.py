"""The moving average of weights: values, swapping, and use in runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from relaylab.errors import InputError
from relaylab.models.file import read_model
from relaylab.train import requests, run_folder, session
from relaylab.train.averaging import Average
from relaylab.train.options import TrainOptions
from test_optimizers import ADAMW
from test_train import SHORT, assert_identical, final, lines_of, stop_after, train

AVERAGED = ("optimizer.ema_decay=0.6", *ADAMW)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def numbers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def change(module: nn.Module) -> None:
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.add_(torch.rand(tensor.shape) if tensor.is_floating_point() else 1)


def test_it_is_the_moving_average_with_a_warm_up() -> None:
    module = network()
    expected = {name: t.double() for name, t in numbers(module).items() if t.is_floating_point()}
    average = Average(module, 0.25)
    for step, decay in enumerate([2 / 11, 3 / 12, 0.25, 0.25], 1):
        change(module)
        average.update(step)
        now = module.state_dict()
        expected = {name: decay * old + (1 - decay) * now[name].double() for name, old in expected.items()}
    found = average.state()
    assert set(found) == {f"{name}/ema" for name in expected}  # num_batches_tracked is not averaged
    for name, tensor in expected.items():
        torch.testing.assert_close(found[f"{name}/ema"].double(), tensor, rtol=1e-6, atol=1e-6)


def test_the_exchange_is_exact_even_after_an_error() -> None:
    module = network()
    average = Average(module, 0.9)
    first = numbers(module)
    change(module)
    now, kept = numbers(module), {name: tensor.clone() for name, tensor in average.state().items()}
    with average.swapped():
        inside = numbers(module)
    assert_identical(inside | {"1.num_batches_tracked": first["1.num_batches_tracked"]}, first)
    assert inside["1.num_batches_tracked"] == now["1.num_batches_tracked"]
    with pytest.raises(RuntimeError, match="validation"), average.swapped():
        raise RuntimeError("validation")
    assert_identical(numbers(module), now)
    assert_identical(average.state(), kept)


def test_weights_that_modules_share_are_exchanged_once() -> None:
    module = network()
    module.append(nn.Linear(2, 2)).append(nn.Linear(2, 2))
    module[4].weight = module[3].weight
    average = Average(module, 0.9)
    change(module)
    now = numbers(module)
    with average.swapped():
        assert not torch.equal(module[4].weight, now["4.weight"])
    assert_identical(numbers(module), now)


def test_a_checkpoint_without_an_average_is_refused() -> None:
    with pytest.raises(InputError, match="has no average of these weights"):
        Average(network(), 0.9).load({"0.weight/exp_avg": torch.zeros(4, 3)})


KINDS: dict[str, dict[str, Any]] = {
    "dropout": {"accumulate": 2, "early_release": True, "precision": "bf16"},
    "batch norm": {"recipe": "table6-resnet50-relay", "short": True, "changes": (*SHORT, "network.width=8")},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_an_average_resumes_bit_for_bit(
    kind: str, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(KINDS[kind])
    options["changes"] = (*options.get("changes", ()), *AVERAGED)
    stop, end = (4, 6) if "short" in options else (6, 12)
    whole = train(tiny_images, tmp_path / "whole", keep=9, **options)
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        train(tiny_images, tmp_path / "stopped", **options)
    assert session.train(requests.resolve(TrainOptions(resume=str(tmp_path / "stopped")))).finished
    stored = final(tmp_path / "whole", end)
    assert_identical(final(tmp_path / "stopped", end), stored)
    assert lines_of(tmp_path / "stopped") == lines_of(tmp_path / "whole")
    assert {"ema_top1", "ema_top5", "ema_loss"} < whole.last.keys()
    assert whole.last["ema_loss"] != whole.last["loss"]
    raw, average = (read_model(tmp_path / "stopped" / name) for name in (run_folder.MODEL, run_folder.AVERAGED))
    for name, tensor in average.state.items():
        own = f"optimizer/model.{name}/ema" if tensor.is_floating_point() else f"model/model.{name}"
        assert torch.equal(tensor, stored[own]), name
        assert torch.equal(raw.state[name], stored[f"model/model.{name}"]), name
    assert f"top-1 {whole.last['ema_top1']:.2f} %" in average.about
    assert "averaged weights: val. error top-1" in (tmp_path / "whole" / run_folder.LOG).read_text()


def test_an_average_changes_nothing_in_the_training(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ("optimizer.iterations=4", "optimizer.evaluate_every=2")
    train(tiny_images, tmp_path / "plain", short=True, changes=short)
    train(tiny_images, tmp_path / "averaged", short=True, changes=(*short, "optimizer.ema_decay=0.9"))
    plain, averaged = final(tmp_path / "plain", 4), final(tmp_path / "averaged", 4)
    assert_identical({name: averaged[name] for name in plain}, plain)
    assert {name.rpartition("/")[2] for name in averaged.keys() - plain.keys()} == {"ema"}
    assert not (tmp_path / "plain" / run_folder.AVERAGED).exists()
    without = [{k: v for k, v in line.items() if not k.startswith("ema_")} for line in lines_of(tmp_path / "averaged")]
    assert without == lines_of(tmp_path / "plain")


def test_the_space_for_checkpoints_counts_every_tensor(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has the actual size of two checkpoints."""
    changes = ("optimizer.iterations=1", "optimizer.evaluate_every=1", *AVERAGED)
    train(tiny_images, tmp_path / "run", short=True, changes=changes)
    size = sum(tensor.nbytes for name, tensor in final(tmp_path / "run", 1).items() if not name.endswith("/step"))
    usage = type("Usage", (), {"free": 2 * size - 1})
    monkeypatch.setattr(session.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=rf"checkpoints need {2 * size / 1e6:,.0f} MB"):
        train(tiny_images, tmp_path / "other", short=True, changes=changes)
    usage.free = 2 * size
    train(tiny_images, tmp_path / "third", short=True, changes=changes)
