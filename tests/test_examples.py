"""The examples run, they learn, and what they train with are the relay's gradients, whoever runs the loop."""

import copy
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from oracle import assert_same
from relaybackprop import Plan, Relay, RelayLoss
from relaybackprop.reference import reference_gradients

KEPT = "kept.safetensors"
EPOCHS = 2
LEARNT = 20.0  # per cent of errors after them; chance is 90
STEP = 1e-12  # float64, relative to the norm of the step; rounding alone stays below 3e-14


@pytest.fixture(autouse=True)
def _leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert {path.name for path in tmp_path.iterdir()} <= {KEPT}


@pytest.fixture
def plain_loop() -> ModuleType:
    return example("plain_loop", "sklearn", "safetensors")


@pytest.fixture
def lightning_trainer() -> ModuleType:
    return example("lightning_trainer", "sklearn", "lightning")


@pytest.fixture
def accelerate_loop() -> Iterator[ModuleType]:
    yield example("accelerate_loop", "sklearn", "accelerate")
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # one for all Accelerators of a process
    GradientState._reset_state()


@pytest.fixture
def early_release() -> ModuleType:
    return example("early_release", "sklearn")


def example(name: str, *needs: str) -> ModuleType:
    for package in needs:
        pytest.importorskip(package)
    return importlib.import_module(f"examples.{name}")


# Lightning 2.6 asks for the leaves of a batch as PyTorch 2.15 no longer likes it.
lightning_warns = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")


def test_plain_loop(plain_loop: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file that it saves has the names of the plain network, and its error."""
    from safetensors.torch import load_file

    file = tmp_path / KEPT
    error = plain_loop.main(epochs=EPOCHS, save_to=str(file))
    assert error < LEARNT
    assert capsys.readouterr().out.splitlines()[-1] == f"test error {error:.1f} %"
    torch.manual_seed(0)
    _, test = plain_loop.digits()
    model = plain_loop.make_relay().model
    model.load_state_dict(load_file(file))  # strict: no key too many
    assert plain_loop.error_of(model, DataLoader(test, batch_size=256)) == error


@lightning_warns
def test_lightning_trainer(lightning_trainer: ModuleType) -> None:
    assert lightning_trainer.main(epochs=EPOCHS) < LEARNT


def test_accelerate_loop(accelerate_loop: ModuleType) -> None:
    assert accelerate_loop.main(epochs=EPOCHS) < LEARNT


@pytest.mark.slow
def test_early_release(early_release: ModuleType) -> None:
    assert early_release.main(epochs=2 * EPOCHS) < LEARNT  # forty layers take longer
    tight, loose = early_release.make_relay(0.35), early_release.make_relay(0.6)
    assert len(tight.heads) > len(loose.heads)


def test_without_the_auxiliary_loss_the_lower_layers_stand_still(plain_loop: ModuleType) -> None:
    relay = plain_loop.make_relay().double()
    before = copy.deepcopy(relay.state_dict())
    silent = {"primary": nn.CrossEntropyLoss(), "aux": lambda scores, _labels: 0 * scores.sum()}
    plain_loop.train_epoch(relay, RelayLoss(silent), sgd(relay), loader_of(plain_loop, batch_size=32))
    same = {name for name, value in relay.state_dict().items() if torch.equal(value, before[name])}
    assert {name for name in same if name.startswith("model.")} == {
        f"model.{layer}.0.{kind}" for layer in (0, 1) for kind in ("weight", "bias")
    }


def test_a_step_of_the_plain_loop(plain_loop: ModuleType) -> None:
    relay = plain_loop.make_relay().double()

    def step(trained: Relay) -> None:
        loader = loader_of(plain_loop, batch_size=32)
        plain_loop.train_epoch(trained, RelayLoss(nn.CrossEntropyLoss()), sgd(trained), loader)

    check_step(relay, step, loader_of(plain_loop, batch_size=32))


@lightning_warns
@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # on more cores; the example's main does the same
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_step_of_lightning(lightning_trainer: ModuleType, tmp_path: Path, clip: float | None) -> None:
    import lightning

    module = lightning_trainer.LitDigits().double()
    loader = loader_of(lightning_trainer, batch_size=32)

    def step(trained: Relay) -> None:
        module.relay = trained
        trainer = lightning.Trainer(
            accelerator="cpu", max_steps=1, gradient_clip_val=clip, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, loader, loader)
        assert trainer.callback_metrics.keys() == {"loss_primary", "loss_aux", "error"}

    check_step(module.relay, step, loader, clip)


def test_a_step_of_accelerate_over_two_batches(accelerate_loop: ModuleType) -> None:
    """Two batches of 16, accumulated, are one of 32."""
    from accelerate import Accelerator

    relay = accelerate_loop.make_relay().double()

    def step(trained: Relay) -> None:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        criterion = RelayLoss(nn.CrossEntropyLoss())
        prepared = accelerator.prepare(trained, sgd(trained), loader_of(accelerate_loop, batch_size=16))
        accelerate_loop.train_epoch(accelerator, prepared[0], criterion, *prepared[1:])

    check_step(relay, step, loader_of(accelerate_loop, batch_size=32))


def check_step(relay: Relay, step: Callable[[Relay], None], loader: Any, clip: float | None = None) -> None:
    """Raise unless the step changes every parameter as the method's definition says, in plain PyTorch."""
    (batch,) = loader
    trained = copy.deepcopy(relay)
    step(trained)
    got = changes(relay, trained)
    assert_same(got, changes(relay, step_by_definition(relay, relay.plan, batch, clip)), STEP)
    with pytest.raises(AssertionError, match=r"model\.0\.0\.weight"):  # negative control: the windows matter
        assert_same(got, changes(relay, step_by_definition(relay, relay.plan.multi_loss(), batch, clip)), STEP)


def step_by_definition(relay: Relay, plan: Plan, batch: list[Tensor], clip: float | None) -> Relay:
    relay = copy.deepcopy(relay)
    images, labels = batch

    def losses(outputs: dict[str, Any]) -> dict[str, Tensor]:
        return {name: nn.functional.cross_entropy(scores, labels) for name, scores in outputs.items()}

    gradients = reference_gradients(relay.model, plan, dict(relay.heads.items()), losses, images)
    for name, parameter in relay.named_parameters():
        parameter.grad = gradients[name]
    if clip is not None:
        norm = nn.utils.clip_grad_norm_(relay.parameters(), clip)
        assert norm > 2 * clip, "nothing was clipped"
    sgd(relay).step()
    return relay


def changes(before: Relay, after: Relay) -> dict[str, Tensor]:
    old = dict(before.named_parameters())
    return {name: (new - old[name]).detach() for name, new in after.named_parameters()}


def sgd(relay: Relay) -> torch.optim.Optimizer:
    """The examples' optimizer."""
    return torch.optim.SGD(relay.parameters(), lr=0.02, momentum=0.9)


def loader_of(module: ModuleType, batch_size: int) -> Any:
    """32 digits in float64, always the same."""
    torch.manual_seed(0)
    train, _ = module.digits()
    images, labels = next(iter(DataLoader(train, batch_size=32)))
    return DataLoader(TensorDataset(images.double(), labels), batch_size)
