"""Linear probes: synthetic vectors, per-image gradients against an oracle, and the command."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from relaybackprop import LinearHead, Plan, Relay, Window
from relaylab.cli import main
from relaylab.diagnose.information import ACTIVATIONS, LENGTH, collect, weight_layers
from relaylab.diagnose.probe import entropy_bits, readable_bits
from relaylab.diagnose.runs import names_of
from relaylab.errors import InputError


def made_up(count: int, signal: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 8, count)
    vectors = random.normal(size=(count, 20)).astype(np.float32)
    vectors[:, :8] += (signal * np.eye(8)[labels]).astype(np.float32)
    return vectors, labels


def test_probes_find_what_is_there_and_nothing_else() -> None:
    told = readable_bits(made_up(400, 20, 0), made_up(400, 20, 1))
    _, labels = made_up(400, 20, 1)
    assert told.value == pytest.approx(entropy_bits(labels), abs=0.1)
    some = readable_bits(made_up(400, 2, 0), made_up(400, 2, 1))
    nothing = readable_bits(made_up(400, 0, 0), made_up(400, 0, 1))
    assert nothing.value < 0.05 < some.low < some.high < told.value
    # A probe tested on its own training data finds information in noise; hence the two halves.
    random = np.random.default_rng(2)
    noise = random.normal(size=(100, 200)).astype(np.float32), random.integers(0, 8, 100)
    fresh = random.normal(size=(100, 200)).astype(np.float32), random.integers(0, 8, 100)
    assert readable_bits(noise, noise).value > 0.3 > 0.1 > readable_bits(noise, fresh).value


def test_probes_refuse_what_they_cannot_read() -> None:
    vectors, labels = made_up(100, 1, 0)
    with pytest.raises(InputError, match="class 9 has too few images"):
        readable_bits((vectors, labels), (vectors, np.full(100, 9)))
    with pytest.raises(InputError, match="not finite"):
        readable_bits((vectors * np.inf, labels), (vectors, labels))


def small_relay() -> Relay:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.ReLU(inplace=True),
    ]
    model = nn.Sequential(*layers, nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 5))
    plan = Plan(Window(bottom="2"), {"aux": Window(top="1", weight=0.3)})
    return Relay(model, plan, {"aux": LinearHead(6, 5)}).double()


def test_gradients_are_those_of_each_image_alone() -> None:
    relay = small_relay()
    images, labels = torch.randn(7, 3, 6, 6, dtype=torch.float64), torch.arange(7) % 5
    found = collect(relay, [(images[:4], labels[:4]), (images[4:], labels[4:])])
    assert relay.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in relay.parameters())
    assert not any(module._forward_hooks for module in relay.modules()), "no hook is left"
    assert {layer for layer, _ in found} == set(weight_layers(relay.model)) == {"0", "2", "6"}
    assert {source for layer, source in found if layer == "0"} == {ACTIVATIONS, "primary", "aux"}
    assert ("2", "aux") not in found, "it lies above the head"
    # The oracle: one image at a time, no ReLU in place, gradients by autograd.grad.
    model, head = relay.model.eval(), relay.heads["aux"].eval()
    for number in range(7):
        first = model[0](images[number : number + 1])
        second = model[2](first.relu())
        scores = model[6](second.relu().flatten(1))
        losses = {
            "primary": functional.cross_entropy(scores, labels[number : number + 1]),
            "aux": functional.cross_entropy(head(first.relu()), labels[number : number + 1]),
        }
        for layer, output, source in [("0", first, "primary"), ("2", second, "primary"), ("0", first, "aux")]:
            gradient = torch.autograd.grad(losses[source], output, retain_graph=True)[0]
            expected = functional.normalize(_pooled(gradient), dim=1)
            assert_close(found[layer, source][number], expected[0], rtol=1e-10, atol=1e-12)
            assert not torch.allclose(found[layer, source][(number + 1) % 7], expected[0]), "and of no other image"
        assert_close(found["0", ACTIVATIONS][number], _pooled(first)[0], rtol=1e-10, atol=1e-12)


def _pooled(tensor: Tensor) -> Tensor:
    return functional.adaptive_avg_pool2d(tensor, 2).flatten(1)


def test_long_vectors_are_projected_alike_in_every_batch() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2 * LENGTH), nn.ReLU(), nn.Linear(2 * LENGTH, 3))
    relay = Relay(model, Plan())
    images, labels = torch.randn(6, 3, 2, 2), torch.arange(6) % 3
    whole = collect(relay, [(images, labels)])
    parts = collect(relay, [(images[:1], labels[:1]), (images[1:], labels[1:])])
    assert whole["1", "primary"].shape == (6, LENGTH)
    for key, vectors in whole.items():
        assert_close(vectors, parts[key])
    other = collect(relay, [(images, labels)], seed=1)
    assert not torch.allclose(other["1", "primary"], whole["1", "primary"])


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "one" / "relay-s0", tmp_path / "two" / "relay-s0", tmp_path / "two" / "relay-s1"]
    assert names_of(folders) == ["one/relay-s0", "two/relay-s0", "two/relay-s1"]
    assert names_of(folders[1:]) == ["relay-s0", "relay-s1"]


def test_the_command_reads_runs(tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "table3-model-a-relay", "--scale", "tiny", "--data", str(tiny_images), "--workers", "0"]
    run = tmp_path / "relay"
    assert main([*train, "--out", str(run), "--set", "network.num_classes=5"]) == 0
    out = tmp_path / "information"
    command = ["diagnose", "information", str(run), "--out", str(out)]
    assert main([*command, "--images", "20"]) == 2
    assert "--images 20: expected at least 40 for 5 classes" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--data", str(tiny_images), "--images", "40"]) == 0
    figures = json.loads((out / "information.json").read_text())
    sources = {(each["source"], each["trained"]) for each in figures["runs"]["relay"]}
    assert sources == {("activations", True), ("primary", True), ("primary", False), ("aux", True)}
    page = (out / "information.html").read_text()
    assert "<h3>Limitations</h3>" in page
    assert '<th scope="row">segment 4, conv 2</th>' in page
    assert "relay at step 2" in page
    assert not re.search(r"""<script|(?:src|href)=["'](?!data:|#)""", page), "self-contained"
    assert (out / "information.svg").stat().st_size > 10_000
    for folder in (run / "checkpoints").iterdir():
        (folder / "SHA256SUMS").unlink()
    assert main(["diagnose", "information", str(run), "--out", str(tmp_path / "again")]) == 2
    assert "no valid checkpoint" in capsys.readouterr().err
