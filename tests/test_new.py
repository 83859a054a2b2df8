"""`relaylab recipes new`, and custom networks from images to an exported program."""

import json
import re
import shutil
from pathlib import Path
from textwrap import dedent

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")
pytest.importorskip("timm")

from relaylab import cli  # noqa: E402
from relaylab.commands.new import NewOptions, _grid, main  # noqa: E402 # pyright: ignore[reportPrivateUsage]
from relaylab.errors import InputError  # noqa: E402
from relaylab.models.file import read_model  # noqa: E402
from relaylab.recipes.changes import recipe_problems  # noqa: E402
from relaylab.recipes.files import read_recipe  # noqa: E402
from relaylab.recipes.schema import OptimizerConfig  # noqa: E402

NETWORK = """
    from torch import nn

    def chain(num_classes, width=4):
        inputs, strides = [3, *[width] * 5], (1, 1, 2, 1, 2, 1)
        layers = [nn.Conv2d(n, width, 3, stride, 1) for n, stride in zip(inputs, strides, strict=True)]
        blocks = [nn.Sequential(layer, nn.ReLU()) for layer in layers]
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

    def short(num_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))
"""


@pytest.fixture
def place(own_imports: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(dedent(NETWORK))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_the_file_says_what_the_images_and_the_network_tell(
    place: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("recipes", "new", "net.py:chain", "--data", tiny_images, "--epochs", "2", "--options", "width=6") == 0
    assert "Next:   relaylab compare chain.toml --data" in capsys.readouterr().out
    text = (place / "chain.toml").read_text()
    assert '"net.py:chain"' in text
    about = "60 training images, 5 classes of 12 images, shorter sides of 40 pixels"
    assert about in text.replace("\n# ", " ")
    assert "# Windows from relaybackprop.suggest_plan:" in text
    for scheme in ("standard BP", "multi-loss", "Relay BP", "Relay BP, --early-release"):
        assert f"#   {scheme} " in text
    recipe = read_recipe(place / "chain.toml")
    assert recipe.network.architecture == f"{place.resolve()}/net.py:chain"
    assert (recipe.network.num_classes, recipe.network.image_size, recipe.network.options) == (5, 32, {"width": 6})
    assert (recipe.optimizer.batch_size, recipe.optimizer.iterations, recipe.images.short_side) == (8, 14, 32)
    assert (recipe.augmentation.padding, recipe.augmentation.crop, recipe.evaluation.scales) == (4, "window", (32,))
    assert "He et al., 2016" in recipe.source_of("augmentation.padding")
    assert recipe.images.sampling == "shuffled"
    assert recipe.plan.auxiliary["aux"].head == "auto"
    assert "60 images" not in "".join(source for _, _, source in recipe.fields())


def test_larger_crops_are_the_papers_windows(place: Path, tiny_images: Path) -> None:
    main(NewOptions(network="net.py:chain", data=(tiny_images,), out=place / "larger.toml", size=40))
    recipe = read_recipe(place / "larger.toml")
    assert (recipe.images.short_side, recipe.augmentation.padding, recipe.augmentation.crop) == (44, 0, "window")


def test_a_recipe_for_pretrained_weights_has_a_smaller_rate_and_trains(
    place: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from net import chain  # pyright: ignore

    torch.save(chain(num_classes=7).state_dict(), place / "weights.pt")
    new = ("recipes", "new", "net.py:chain", "--data", tiny_images, "--epochs", "1", "--out")
    assert run(*new, "fresh.toml") == 0
    (place / "sub").mkdir()
    assert run(*new, "sub/tuned.toml", "--pretrained", "weights.pt") == 0
    fresh, tuned = (read_recipe(place / name) for name in ("fresh.toml", "sub/tuned.toml"))
    assert tuned.optimizer.lr == fresh.optimizer.lr / 10
    assert tuned.source_of("optimizer.lr").startswith("a tenth, since the weights are pretrained, of ")
    assert tuned.network.pretrained == str(place.resolve() / "weights.pt")
    capsys.readouterr()
    assert run("train", "sub/tuned.toml", "--data", tiny_images, "--out", "run", "--images", "memory") == 0
    assert "weights.pt: 12 of 14 tensors fit" in capsys.readouterr().err
    assert run(*new, "other.toml", "--pretrained", "none.pt") == 2
    assert "none.pt" in capsys.readouterr().err


def test_networks_of_one_size_are_built_for_the_crops(place: Path, tiny_images: Path) -> None:
    main(NewOptions(network="timm:vit_tiny_patch16_224", data=(tiny_images,), out=place / "vit.toml"))
    recipe = read_recipe(place / "vit.toml")
    assert recipe.network.options == {"img_size": 32}
    assert recipe.optimizer.clip_norm == 1


def test_a_network_that_no_plan_fits_is_left_standard_backpropagation(
    place: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("recipes", "new", "net.py:short", "--data", tiny_images, "--epochs", "1") == 0
    assert "relaylab train short.toml" in capsys.readouterr().out
    assert "No windows were found for this network" in (place / "short.toml").read_text()
    recipe = read_recipe(place / "short.toml")
    assert (recipe.scheme, recipe.plan.auxiliary) == ("standard", {})
    assert run("cost", "short.toml") == 0
    assert run("train", "short.toml", "--data", tiny_images, "--accelerator", "cpu", "--workers", "0") == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("net.py",), "net.py is a file: expected net.py:FUNCTION; this file has chain, short"),
        (("timm:resnet81",), "timm has no model 'resnet81'"),
        (("net.py:chain", "--size", "4"), "--size must be at least 8"),
        (("net.py:chain", "--hold-out", "-1"), "--hold-out is -1: expected a number of images"),
        (("net.py:chain", "--hold-out", "1.5"), "--hold-out is 1.5: expected a number of images"),
        (("net.py:chain", "--hold-out", "inf"), "--hold-out is inf: expected a number of images"),
        (("net.py:chain", "--hold-out", "2", "--val-split", "test"), "cannot be combined with --val-split"),
        (("net.py:chain", "--options", "width"), "--options width: expected KEY=VALUE"),
        (("net.py:chain", "--options", "widht=3"), "nearest: width"),
        (("net.py:chain", "--val-split", "test"), "has no test folder, only train, val"),
        (("net.py:chain", "--out", "net.txt"), "the name must end in .toml"),
    ],
)
def test_wrong_options_are_explained(
    arguments: tuple[str, ...], said: str, place: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("recipes", "new", *arguments, "--data", tiny_images) == 2
    assert said in capsys.readouterr().err
    assert not list(place.glob("*.toml"))


def optimizer_of(place: Path, *arguments: str | Path) -> OptimizerConfig:
    assert run("recipes", "new", *arguments, "--batch-size", "8", "--out", "proposed.toml") == 0
    recipe = read_recipe(place / "proposed.toml")
    assert recipe_problems(recipe) == []
    (place / "proposed.toml").unlink()
    return recipe.optimizer


def test_the_optimizer_is_the_usual_one_of_the_networks_normalisation(place: Path, tiny_images: Path) -> None:
    images = ("--data", tiny_images)
    vit = optimizer_of(place, "timm:test_vit", *images)
    assert (vit.algorithm, vit.lr, vit.weight_decay, vit.clip_norm) == ("adamw", 8.8e-05, 0.05, 1.0)
    assert not vit.decay_norms_and_biases
    resnet = optimizer_of(place, "timm:test_resnet", *images)
    assert (resnet.algorithm, resnet.lr, resnet.decay_norms_and_biases) == ("sgd", 0.1 * 8 / 256, False)
    plain = optimizer_of(place, "net.py:chain", *images)
    assert (plain.algorithm, plain.lr, plain.decay_norms_and_biases) == ("sgd", 0.01, True)
    assert optimizer_of(place, "timm:test_resnet", *images, "--optimizer", "adamw").weight_decay == 0.05
    assert optimizer_of(place, "timm:test_vit", *images, "--optimizer", "sgd").weight_decay == 0.0005


def test_an_existing_file_is_kept(place: Path, tiny_images: Path) -> None:
    (place / "chain.toml").write_text("mine")
    with pytest.raises(InputError, match=r"chain.toml already exists"):
        main(NewOptions(network="net.py:chain", data=(tiny_images,)))


TRAIN = ("--accelerator", "cpu", "--workers", "0", "--out", "run")


@pytest.mark.parametrize("network", ["timm:test_resnet", "net.py:chain"])
def test_from_images_to_an_exported_program(
    network: str, place: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ("--data", tiny_images, "--size", "32", "--batch-size", "12", "--epochs", "1", "--out", "mine.toml")
    assert run("recipes", "new", network, *made) == 0
    assert run("train", "mine.toml", "--data", tiny_images, *TRAIN) == 0
    capsys.readouterr()
    assert run("eval", "run", "--protocol", "single-crop,dense", "--scales", "40", "--workers", "0") == 0
    assert run("export", "run", "--format", "safetensors", "pt2", "--out", "out") == 0
    picture = tiny_images / "val" / "class1" / "0.png"
    predicted: list[object] = []
    for model in ("run", "out/model.safetensors"):
        capsys.readouterr()
        assert run("predict", model, picture, "--format", "json") == 0
        predicted.append(json.loads(capsys.readouterr().out))
    assert predicted[0] == predicted[1]
    model = read_model(place / "out" / "model.safetensors")
    images = torch.rand(3, 3, 32, 32) * 255
    program = torch.export.load(place / "out" / "model.pt2").module()
    x = (images - torch.tensor(model.input.mean).view(3, 1, 1)) / torch.tensor(model.input.std).view(3, 1, 1)
    assert torch.allclose(program(images), model.model()(x), atol=1e-4)
    assert run("report", "run") == 0
    assert Path("run/report.html").is_file()
    monkeypatch.setenv("RELAYLAB_CACHE", str(place / "another machine"))
    capsys.readouterr()
    for path in ("run", "out/model.safetensors"):
        assert run("predict", path, picture) == (2 if network.startswith("net") else 0)
    if network.startswith("net"):
        assert "relaylab recipes allow" in capsys.readouterr().err
        assert run("recipes", "allow", network) == 0
        assert run("predict", "run", picture) == 0


def test_a_run_from_elsewhere_does_not_run_its_code(place: Path, tiny_images: Path) -> None:
    assert run("recipes", "new", "net.py:chain", "--data", tiny_images, "--epochs", "1", "--out", "mine.toml") == 0
    assert run("train", "mine.toml", "--data", tiny_images, *TRAIN) == 0
    stranger = place / "stranger.py"
    stranger.write_text(f"open({str(place / 'ran')!r}, 'w')\n" + dedent(NETWORK))
    config = place / "run" / "config.json"
    config.write_text(config.read_text().replace(f"{place.resolve()}/net.py", str(stranger)))
    for command in (("train", "--resume", "run"), ("figure", "2", "run"), ("diagnose", "information", "run")):
        assert run(*command) == 2
    assert not (place / "ran").exists()


def test_jobs_and_schemes_of_a_network_file(place: Path, tiny_images: Path) -> None:
    assert run("recipes", "new", "net.py:chain", "--data", tiny_images, "--epochs", "1", "--out", "mine.toml") == 0
    shared = ("--data", tiny_images, "--accelerator", "cpu", "--workers", "0", "--seeds", "0", "--jobs", "2")
    assert run("compare", "mine.toml", *shared, "--schemes", "standard,relay") == 0
    names = {path.parent.name for path in place.glob("runs/compare/mine/*/model.safetensors")}
    assert names == {"standard-s0", "relay-s0"}


def test_a_test_part_takes_the_place_of_validation(
    place: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = shutil.copytree(tiny_images, place / "images")
    (images / "val").rename(images / "test")
    assert run("recipes", "new", "net.py:chain", "--data", images) == 2
    assert "--val-split test" in capsys.readouterr().err
    made = ("--data", images, "--val-split", "test", "--epochs", "1", "--out", "mine.toml")
    assert run("recipes", "new", "net.py:chain", *made) == 0
    assert read_recipe(place / "mine.toml").images.val_split == "test"
    assert run("train", "mine.toml", "--data", images, *TRAIN) == 0
    capsys.readouterr()
    assert run("eval", "run", "--workers", "0", "--out", "scores") == 0
    assert "20 images, 5 classes" in capsys.readouterr().out
    assert run("report", "run", "--scores", "scores") == 0


@pytest.mark.parametrize(("count", "each"), [("0.25", 3), ("2", 2)])
def test_images_without_parts_are_divided_by_class(
    count: str, each: int, place: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tiny_images / "train"
    assert run("recipes", "new", "net.py:chain", "--data", images) == 2
    assert "--hold-out 0.2" in capsys.readouterr().err
    made = ("--data", images, "--hold-out", count, "--epochs", "1", "--out", "mine.toml")
    assert run("recipes", "new", "net.py:chain", *made) == 0
    assert f"{60 - 5 * each} training images" in (place / "mine.toml").read_text()
    assert run("train", "mine.toml", "--data", images, *TRAIN) == 0
    counts = json.loads((place / "run" / "config.json").read_text())["counts"]
    assert counts == {"train": [12 - each] * 5, "val": [each] * 5}
    capsys.readouterr()
    assert run("eval", "run", "--workers", "0", "--out", "scores") == 0
    assert f"{5 * each} images, 5 classes" in capsys.readouterr().out
    assert run("report", "run", "--scores", "scores", "--images") == 0


def test_training_starts_from_given_weights(place: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = ("--data", tiny_images, "--epochs", "1", "--out", "mine.toml")
    assert run("recipes", "new", "net.py:chain", *made) == 0
    still = ("--data", tiny_images, *TRAIN[:-2], "--set", "optimizer.lr=1e-30", "optimizer.iterations=1")
    assert run("train", "mine.toml", *still, "network.pretrained=nowhere.safetensors") == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert run("train", "mine.toml", *still, "--out", "first", "--seed", "1") == 0
    assert run("train", "mine.toml", *still, "network.pretrained=first/model.safetensors", "--out", "second") == 0
    assert "14 of 14 tensors fit, 100.0% of the parameters" in (place / "second" / "log.txt").read_text()
    states = [read_model(place / name / "model.safetensors").state for name in ("first", "second")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_network_file_that_changes_is_told_when_a_run_resumes(
    place: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("recipes", "new", "net.py:chain", "--data", tiny_images, "--epochs", "1", "--out", "mine.toml") == 0
    assert run("train", "mine.toml", "--data", tiny_images, *TRAIN) == 0
    (place / "net.py").write_text(dedent(NETWORK) + "\n# changed\n")
    capsys.readouterr()
    assert run("train", "--resume", "run") == 0
    assert "before: the network may differ" in capsys.readouterr().err


def test_a_network_that_cannot_be_drawn_is_an_error_of_one_line_and_has_a_page(
    place: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from relaybackprop.errors import PlanError
    from relaylab.report import stages

    def decline(*_: object) -> None:
        raise PlanError("the modules form a knot", "a chain is required", "Untie it.")

    assert run("recipes", "new", "net.py:chain", "--data", tiny_images, "--epochs", "1", "--out", "mine.toml") == 0
    assert run("train", "mine.toml", "--data", tiny_images, *TRAIN) == 0
    monkeypatch.setattr(stages, "chain", decline)
    capsys.readouterr()
    assert run("draw", "mine.toml", "--out", "drawn") == 2
    assert "the network cannot be drawn: the modules form a knot: a chain is required" in capsys.readouterr().err
    assert run("report", "run") == 0
    assert Path("run/report.html").is_file()


def test_a_drawing_has_the_sizes_below_functional_pooling(
    place: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "pooled.py").write_text(
        dedent("""
        from torch import nn
        from torch.nn import functional as F

        class Pooled(nn.Module):
            def __init__(self, num_classes):
                super().__init__()
                self.convs = nn.ModuleList(nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8, 8))
                self.last = nn.Linear(8 * 2 * 2, num_classes)

            def forward(self, x):
                for conv in self.convs:
                    x = F.max_pool2d(F.relu(conv(x)), 2)
                return self.last(x.flatten(1))
    """)
    )
    assert run("recipes", "new", "pooled.py:Pooled", "--data", tiny_images) == 0
    capsys.readouterr()
    assert run("draw", "Pooled.toml", "--out", "drawn") == 0
    table = capsys.readouterr().out
    sizes = [line.split("|")[1].strip() for line in table.splitlines() if "conv 3x3" in line]
    assert sizes == ["32x32", "16x16", "8x8", "4x4"]


def scarce_images(folder: Path, images: Path, count: int = 1) -> Path:
    shutil.copytree(images, folder)
    for path in folder.glob("train/*/*"):
        if int(path.stem) >= count:
            path.unlink()
    return folder


def test_a_class_with_one_image_is_too_few_to_compare(
    place: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = scarce_images(place / "few", tiny_images)
    assert run("recipes", "new", "net.py:chain", "--data", data) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "5 training images, 5 classes of 1 image, shorter" in out
    assert "A class has only 1 image: too few to tune or compare." in out
    assert "Next: relaylab train chain.toml --data" in out
    assert "A class has only 1 image" in (place / "chain.toml").read_text()
    assert "with 1 step per epoch" in (place / "chain.toml").read_text()
    assert "30 epochs of 1 step\n" in (place / "chain.toml").read_text()
    tune = ("--tune", "optimizer.lr=0.01,0.03", "--out", "compared")
    assert run("compare", "chain.toml", "--data", data, *tune) == 2
    assert "--tune-hold-out 0.2: too few training images of a class: " in (error := capsys.readouterr().err)
    assert "class0 has 1 and 1 would be held out" in error
    assert "add images of these classes, or compare without --tune" in error
    assert not (place / "compared" / "tuning").exists(), "before any trial"


def test_the_suggested_rates_are_round_and_small_networks_are_measured_in_kb(
    place: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [_grid(rate) for rate in (0.003125, 0.05, 8.8e-5)] == [
        [0.001, 0.003, 0.01], [0.01, 0.03, 0.1], [3e-5, 1e-4, 3e-4],
    ]  # fmt: skip
    assert run("recipes", "new", "net.py:chain", "--data", tiny_images) == 0
    out = capsys.readouterr().out
    assert "--tune optimizer.lr=0.003,0.01,0.03\n" in out
    assert re.search(r"Relay BP +\S+ GFLOPs per image, +\S+ x, peak memory +[1-9][0-9,]* kB\n", out)


def test_a_network_in_place_of_a_recipe_leads_to_recipes_new(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", "net.py:chain") == 2
    assert "unknown recipe 'net.py:chain': it names a network; `relaylab recipes new net.py:chain ...` writes one" in (
        capsys.readouterr().err
    )
