"""The page of the first check and its figures say what results/evidence-SIZE.json has."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from experiments import figures, page
from experiments.findings import RESULTS, SIZES, Finding, Size, read_findings, scheme_of
from experiments.studies import METHODS, PLOTTED, RATES, STUDIES, TAIL
from relaylab.recipes import find_recipe
from relaylab.report.costs import BATCH, cost_of
from relaylab.report.verdict import difference_text, mean_text
from relaylab.tables import renewed
from relaylab.train import requests
from relaylab.train.options import TrainOptions

README = page.PAGE.parents[2] / "README.md"
RECIPES = sorted((Path(page.__file__).parent / "recipes").glob("*.toml"))

# By recipe file: the recipe of the package that it is taken from, what is changed in it, and the runs at its rate.
TRAINED = {
    "model-a-32px": ("table3-model-a-relay", "lr=0.04", "iterations=12000", "network.pyramid=2,1", "model-a/relay"),
    "model-a-64px": ("table3-model-a-relay", "lr=0.04", "iterations=8400", "network.pyramid=4,2,1", "model-a/relay"),
    "model-b-32px": (
        "table3-model-b-relay",
        "lr=0.04",
        "iterations=12000",
        "network.pyramid=2,1",
        "model-b-cores/relay",
    ),
    "model-b-64px": ("table3-model-b-relay", "lr=0.04", "iterations=8400", "network.pyramid=4,2,1"),
    "vgg19-32px": (
        "table1-vgg19-places2",
        "lr=0.01",
        "iterations=12000",
        "network.width=16",
        "vgg-equal-rate/19-relay",
    ),
    "vgg25-32px": (
        "table1-vgg25-places2",
        "lr=0.01",
        "iterations=12000",
        "network.width=16",
        "vgg-equal-rate/25-relay",
    ),
    "resnet50-32px": (
        *("table6-resnet50-relay", "lr=0.025", "iterations=3000", "network.width=16"),
        *("resnet50/standard", "resnet50/relay"),
    ),
}
SHARED = ("optimizer.warmup=500", "scheme=relay", "evaluation.protocol=single crop")
AT_32 = ("network.image_size=32", "images.short_side=36", "optimizer.batch_size=64", "evaluation.scales=36")


def size_of(recipe: Path) -> Size:
    return "32px" if recipe.stem.endswith("32px") else "64px"


def finding(arm: str, seed: int, top1: float) -> Finding:
    return Finding(arm, seed, 0.01, top1, top1 / 2, {1: top1}, (), 0.2)


def test_tables_of_the_page_are_those_of_the_runs() -> None:
    text = page.PAGE.read_text()
    sections = page.sections()
    assert renewed(text, sections) == text, "run: python -m experiments.page"
    name = "model-a-64px"
    assert renewed(text, {name: [*sections[name][:-1], "| something else |"]}) != text


def whole_tables(size: Size) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Titles and rows of the tables of results/evidence-SIZE.md."""
    for part in re.split(r"^\*\*(?=[^*]+\*\*$)", (RESULTS / f"evidence-{size}.md").read_text(), flags=re.MULTILINE)[1:]:
        header, _, *rows = (
            [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")
        )
        yield part.partition("**")[0], [dict(zip(header, row, strict=True)) for row in rows]


@pytest.mark.parametrize("size", SIZES)
def test_the_whole_tables_are_those_of_the_runs(size: Size) -> None:
    findings, studies = read_findings(size), {study.title: study for study in STUDIES.values()}
    raw = json.loads((RESULTS / f"evidence-{size}.json").read_text())["runs"]
    tested = {(run["arm"], run["seed"]): run["tested"] for run in raw}
    seen: set[str] = set()
    for title, rows in whole_tables(size):
        if title not in studies:
            continue
        seen.add(title)
        runs_of = {
            label: {run.seed: run for run in studies[title].runs(label, findings)} for label in studies[title].arms
        }
        for row in rows:
            own = runs_of[row[""]]
            assert row["seeds"] == ", ".join(map(str, own))
            if not own:
                continue
            tests = [tested[run.arm, run.seed] for run in own.values()]
            dead = [100 * test["dead"] for test in tests if test["dead"] is not None]
            assert row["rate"] == f"{next(iter(own.values())).rate:g}"
            assert row["GFLOPs"] == f"{next(iter(own.values())).gflops:.3f}"
            assert row["on training images"] == f"{fmean(test['train'] for test in tests):.2f}"
            assert row["dead"] == (f"{fmean(dead):.0f} %" if dead else "")
            for name, top in (("top-1", "top1"), ("top-5", "top5")):
                errors = {seed: getattr(run, top) for seed, run in own.items()}
                assert row[f"{name} error"] == mean_text(list(errors.values()))
                for base in set(studies[title].against) - {row[""]}:
                    both = [seed for seed in errors if seed in runs_of[base]]
                    pairs = [errors[seed] - getattr(runs_of[base][seed], top) for seed in both]
                    assert row[f"{name} minus {base}"] == difference_text(pairs)
    assert seen == {STUDIES[name].title for name in PLOTTED[size]}


def test_differences_are_paired_and_collapsed_runs_are_counted() -> None:
    study = replace(STUDIES["resnet50"], arms={"standard BP": "a", "Relay BP": "b", "other": "c"})
    found = [finding("a", seed, top1) for seed, top1 in enumerate((90.0, 91.0, 99.0))]
    found += [finding("b", seed, top1) for seed, top1 in enumerate((88.0, 90.0, 89.0))]
    table = page.study_table(study, found)
    assert table.rows == (
        ("standard BP", "0.01", f"{mean_text([90.0, 91.0])} (1 of 3 collapsed)", mean_text([45.0, 45.5]), ""),
        ("Relay BP", "0.01", "89.00 ± 1.00", "44.50 ± 0.50", difference_text([-2.0, -1.0])),
    )
    assert "(one seed)" in page.study_table(replace(study, seeds=(0,)), found).rows[1][-1]


def test_classes_with_many_training_images_come_first() -> None:
    study = STUDIES[f"tail-{TAIL}"]
    errors = {run.arm: run.by_class for run in read_findings("32px") if run.arm in study.arms.values()}
    assert all(len(by_class) == 100 for by_class in errors.values())
    for _, many, some, few in page.thirds_table(read_findings("32px")).rows[:1]:
        assert float(many) < float(some) < float(few), "shuffled sampling favours frequent classes"


@pytest.mark.parametrize("size", SIZES)
def test_the_figures_are_drawn_from_the_runs(size: Size) -> None:
    drawn, findings = figures.figures(size), read_findings(size)
    rates = {line.get_label(): list(line.get_ydata()) for line in drawn["rates"].axes[0].lines}  # pyright: ignore
    by_arm = {run.arm: run.top1 for run in findings}
    for label, scheme in METHODS.items():
        assert rates[label] == [by_arm[f"selection/{scheme}-{rate:g}"] for rate in RATES]
    curves = {tuple(line.get_ydata()) for line in drawn["curves"].axes[0].lines}  # pyright: ignore
    for run in findings:
        if run.arm.startswith("model-a/"):
            assert (tuple(run.curve.values()) in curves) == (not run.collapsed)
    assert len(drawn["errors"].axes) == len(PLOTTED[size])
    for name in drawn:
        assert (RESULTS / f"evidence-{size}-{name}.svg").stat().st_size > 10_000


def test_the_page_quotes_32_pixels() -> None:
    top1 = {(run.arm, run.seed): run.top1 for run in read_findings("32px")}

    def lead(arm: str, base: str) -> str:
        return f"{top1[base, 0] - top1[arm, 0]:.1f}"

    at_19 = lead("vgg-equal-rate/19-relay", "vgg/19-standard")
    at_25 = lead("vgg-equal-rate/25-relay", "vgg/25-standard")
    text = " ".join(page.PAGE.read_text().split())
    relay, standard = "model-b-cores/relay", "model-b-cores/standard"
    model_b = difference_text([top1[relay, seed] - top1[standard, seed] for seed in (3, 4, 5)])
    assert f"{model_b} on model B at 32" in text
    assert f"relay has {at_19} points less with 19 layers, and {at_25} with 25" in text
    assert f"did worse on ResNet-50**, by {lead('resnet50/standard', 'resnet50/relay')} points" in text


def test_links_of_the_page_and_the_readme_exist() -> None:
    for text, folder in ((page.PAGE.read_text(), page.PAGE.parent), (README.read_text(), README.parent)):
        for link in (part.split(")")[0] for part in text.split("](")[1:]):
            if not link.startswith(("http", "#")):
                assert (folder / Path(link.partition("#")[0])).exists(), link


def test_every_recipe_is_one_of_the_first_check() -> None:
    assert {path.stem for path in RECIPES} == TRAINED.keys()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_file_has_the_settings_of_the_first_check(path: Path, tiny_images: Path) -> None:
    base, rate, length, network, *_ = TRAINED[path.stem]
    own = [f"optimizer.{rate}", f"optimizer.{length}", network]
    own += [f"optimizer.evaluate_every={int(length.partition('=')[2]) // 6}"]
    changes = (*own, *SHARED, *(AT_32 if size_of(path) == "32px" else ()))
    expected = requests.resolve(TrainOptions(recipe=base, scale="small", changes=changes, data=(tiny_images,))).recipe
    recipe = requests.resolve(TrainOptions(recipe=str(path), data=(tiny_images,))).recipe
    for part in ("network", "plan", "scheme", "images", "augmentation", "optimizer", "evaluation"):
        assert getattr(recipe, part) == getattr(expected, part), part


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_file_trains_what_the_runs_trained(path: Path) -> None:
    recipe, arms = find_recipe(str(path)), set(TRAINED[path.stem][4:])
    totals = cost_of(recipe).totals
    findings = [run for run in read_findings(size_of(path)) if run.arm in arms]
    assert {run.arm for run in findings} == arms
    for run in findings:
        assert run.rate == recipe.optimizer.lr
        assert max(run.curve) == recipe.optimizer.iterations
        assert run.gflops == totals[scheme_of(run.arm)].flops / BATCH / 1e9
