"""Networks by name: timm's, torchvision's, and functions of packages and files."""

from pathlib import Path
from textwrap import dedent
from types import MappingProxyType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("timm")

from safetensors.torch import save_file  # noqa: E402

from relaybackprop.heads import LinearHead, TokenHead  # noqa: E402
from relaylab.errors import InputError  # noqa: E402
from relaylab.models.building import build_meta_network, build_network, build_relay  # noqa: E402
from relaylab.models.named import allow  # noqa: E402
from relaylab.models.pretrained import load_pretrained  # noqa: E402
from relaylab.recipes import find_recipe  # noqa: E402
from relaylab.recipes.changes import with_changes  # noqa: E402
from relaylab.recipes.schema import NetworkConfig, Recipe  # noqa: E402
from relaylab.train.segments import segments_of  # noqa: E402

NETWORK = """
    import torch
    from torch import nn

    def small(num_classes, width=4):
        torch.rand(1).item()  # needs values: not on the meta device
        body = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU())
        return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

    def no_module(num_classes):
        return "a network"

    def fails(num_classes):
        return num_classes / 0

    def leaves(num_classes):
        raise SystemExit("usage")

    def no_scores(num_classes):
        return nn.Conv2d(3, num_classes, 3)

    def seven(num_classes):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7))

    class Branching(nn.Module):
        def forward(self, images):
            return images if images.mean() > 0 else -images

    def branching(num_classes):
        return nn.Sequential(Branching(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))
"""


def config(architecture: str, size: int = 32, classes: int = 5, **options: Any) -> NetworkConfig:
    options = MappingProxyType(options)
    return NetworkConfig(architecture=architecture, num_classes=classes, image_size=size, options=options)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(dedent(NETWORK))
    return path


def allowed(path: Path, function: str, **options: Any) -> NetworkConfig:
    network = config(f"{path}:{function}", **options)
    allow(network)
    return network


def test_the_libraries_networks_are_theirs() -> None:
    for network in (config("timm:test_resnet"), config("torchvision:shufflenet_v2_x0_5")):
        assert build_network(network).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    vit = build_network(config("timm:test_vit", img_size=32))
    assert vit.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_a_function_of_a_file_gets_the_classes_and_the_options(file: Path) -> None:
    model = build_network(allowed(file, "small", width=6))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert model.get_parameter("0.0.weight").shape[0] == 6


def test_the_meta_copy_of_a_network_that_needs_values_leaves_the_random_numbers_alone(file: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert all(parameter.is_meta for parameter in build_meta_network(allowed(file, "small")).parameters())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("own_imports")
def test_a_function_of_a_package(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.syspath_prepend(str(file.parent))
    network = config("net:small")
    allow(network)
    assert build_network(network)(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("timm:resnet81", {}, r"timm has no model 'resnet81'; nearest: .*resnet18"),
        ("torchvision:resnet81", {}, r"torchvision has no classifier 'resnet81'; nearest: resnet18"),
        ("FILE:smal", {}, r"net.py has no function 'smal'; nearest: small"),
        ("FILE:small", {"widht": 4}, r"small with num_classes=5, widht=4: TypeError: .*; nearest: width"),
        ("FILE:fails", {}, r"fails with num_classes=5: ZeroDivisionError: .* \(.*net.py, line 14\)"),
        (
            "timm:test_resnet",
            {"pretrained": True},
            r"network.options.pretrained is not allowed: .* set network.pretrained=FILE",
        ),
        ("FILE:leaves", {}, r"leaves with num_classes=5: SystemExit: usage \(.*net.py, line \d+\)"),
        ("FILE:no_module", {}, "no_module returned str: expected a torch.nn.Module"),
        ("FILE:no_scores", {}, r"shape \(2, 5, 30, 30\) for two images: expected class scores of shape \(2, 5\)"),
        (
            "torchvision:googlenet",
            {"init_weights": False},
            r"returns GoogLeNetOutputs .*; network.options.aux_logits=false removes its own auxiliary classifiers",
        ),
        ("FILE:branching", {}, "its forward pass depends on the values of tensors, .* train it in your own loop"),
        ("FILE:seven", {}, r"shape \(2, 7\) for two images: expected class scores of shape \(2, 5\)"),
        (
            "timm:vit_tiny_patch16_224",
            {},
            r"does not run on images \(2, 3, 32, 32\): .*network.image_size, or the image size",
        ),
        (
            "absent_package.nets:small",
            {},
            "cannot import absent_package.nets: .* install absent_package, or pass a file",
        ),
        ("/absent/net.py:small", {}, "no such file: /absent/net.py"),
        ("resnet_50", {}, r"unknown architecture 'resnet_50'; nearest: resnet50; or an external network: timm:NAME"),
    ],
)
def test_wrong_networks_are_explained(file: Path, architecture: str, options: dict[str, Any], message: str) -> None:
    network = config(architecture.replace("FILE", str(file)), **options)
    allow(network)
    with pytest.raises(InputError, match=message):
        build_meta_network(network)


def test_code_that_fails_to_import_is_an_error_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    for code, error in (("1 / 0", "ZeroDivisionError"), ("raise SystemExit(2)", "SystemExit: 2")):
        path.write_text(f"import torch\n{code}\n")
        with pytest.raises(InputError, match=rf"cannot import .*broken.py: {error}"):
            build_network(allowed(path, "small"))


def test_code_that_the_user_has_not_named_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "stranger.py"
    path.write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\ndef small(num_classes): pass\n"
    )
    for architecture in (f"{path}:small", "torch.hub:load"):
        with pytest.raises(InputError, match="is code that has not been allowed on this machine"):
            build_network(config(architecture))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match="returned NoneType"):
        build_network(allowed(path, "small"))
    assert (tmp_path / "ran").exists()


def recipe_with(*changes: str) -> Recipe:
    recipe, problems = with_changes(find_recipe("photos"), ("network.num_classes=5", "network.image_size=32", *changes))
    assert not problems
    return recipe


def test_heads_fit_their_inputs() -> None:
    lacking = ("network.width=none", "network.convs=none", "plan.auxiliary.aux.head=auto")
    resnet = recipe_with(
        *lacking, "network.architecture=timm:test_resnet", "plan.primary.bottom=none", "plan.primary.after=layer2",
        "plan.auxiliary.aux.top=layer3", "plan.auxiliary.aux.gain=quiet",
    )  # fmt: skip
    relay = build_relay(resnet)
    assert isinstance(relay.heads["aux"], LinearHead)
    assert relay.heads["aux"].fc.weight.std() < 0.01
    vit = recipe_with(
        *lacking, "network.architecture=timm:test_vit", "network.options.img_size=32", "plan.primary.bottom=blocks.3",
        "plan.auxiliary.aux.top=blocks.3",
    )  # fmt: skip
    assert isinstance(build_relay(vit).heads["aux"], TokenHead)
    assert set(segments_of(vit).overlaps) == {"aux+primary"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("plan.auxiliary.aux.top=layer33",), "recipe photos: ResNet has no module 'layer33': .*Nearest: layer3,"),
        (("plan.auxiliary.aux.head=linear", "network.architecture=timm:test_vit", "network.options.img_size=32",
          "plan.auxiliary.aux.top=blocks.3"), r"but its input has shape \(\d+, \d+\): use the head 'auto'"),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_is_an_error_before_training(changes: tuple[str, ...], message: str) -> None:
    base = ("network.width=none", "network.convs=none", "network.architecture=timm:test_resnet")
    given = {change.partition("=")[0]: change for change in (*base, "plan.primary.bottom=none", *changes)}
    with pytest.raises(InputError, match=message):
        segments_of(recipe_with(*given.values()))


def test_pretrained_weights_and_tensors_that_do_not_fit(tmp_path: Path) -> None:
    other = build_network(config("timm:test_resnet", classes=9))
    state = {f"module.{key}": tensor for key, tensor in other.state_dict().items()} | {"module.extra": torch.zeros(1)}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "weights.pt")
    save_file(other.state_dict(), tmp_path / "weights.safetensors")
    for name in ("weights.pt", "weights.safetensors"):
        model = build_network(config("timm:test_resnet"))
        fresh = model.fc.weight.clone()  # type: ignore[union-attr]
        lines = load_pretrained(model, tmp_path / name)
        assert torch.equal(model.conv1[0].weight, other.conv1[0].weight)  # type: ignore[index,union-attr]
        assert torch.equal(model.fc.weight, fresh)  # type: ignore[union-attr]
        assert "of a different shape: fc.weight (9, " in lines[1]
        assert any("not used: extra" in line for line in lines) == (name == "weights.pt")


def test_weights_of_another_network_or_kind_are_refused(tmp_path: Path) -> None:
    model = build_network(config("timm:test_resnet"))
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="has no weights that fit this network: it contains a, expected conv1"):
        load_pretrained(model, tmp_path / "other.pt")
    torch.save(model, tmp_path / "whole.pt")
    with pytest.raises(InputError, match="not a state dict that can be read with weights_only=True"):
        load_pretrained(model, tmp_path / "whole.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="has no state dict"):
        load_pretrained(model, tmp_path / "list.pt")
