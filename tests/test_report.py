"""Tables and figures of the paper, submissions, and the report, from tiny runs and synthetic scores."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from browser import check, chromium
from relaylab.cli import main
from relaylab.data.sources.opening import open_source
from relaylab.errors import InputError
from relaylab.evaluate.scores import ImageList, ScoreFolder
from relaylab.evaluate.submission import FORMATS, check_submission, read_test_list, submission_lines
from relaylab.report.paper_figures import pick_photos, plain
from relaylab.report.paper_tables import paper_table
from relaylab.tables import Table, render

LABELS = torch.arange(200) % 10


def score_folder(path: Path, *, fingerprint: str = "f", classes: int = 10) -> ScoreFolder:
    names = tuple(f"{i}.jpg" for i in range(200))
    images = ImageList("made up", fingerprint, tuple(map(str, range(classes))), LABELS % classes, names)
    return ScoreFolder(path, images)


def add(folder: ScoreFolder, name: str, wrong: int, each: str = "single-crop", **values: object) -> None:
    """A network that misclassifies the first images as the next class."""
    known = {"network.architecture": "model_a", "scheme": "standard", "images.sampling": "class-aware", "a.b": 1}
    seed = values.pop("seed", 0)
    folder.add(name, {"sha256": name, "seed": seed, "values": {**known, **values}})
    labels = folder.images.labels.clone()
    labels[:wrong] = (labels[:wrong] + 1) % len(folder.images.classes)
    scores = torch.nn.functional.one_hot(labels, len(folder.images.classes)).float()
    folder.write(name, each, 0, (3 * scores).log_softmax(1))


def test_table_3_has_means_improvements_and_the_papers_figures(tmp_path: Path) -> None:
    folder = score_folder(tmp_path)
    for seed, wrong in enumerate((100, 104)):
        add(folder, f"standard-{seed}", wrong, seed=seed)
        add(folder, f"relay-{seed}", wrong - 20, seed=seed, scheme="relay", **{"plan.x": seed})
        add(folder, f"dense-only-{seed}", 0, "dense-32", seed=seed, scheme="relay")
    table = paper_table("3", [folder])
    cells = {row[0]: row[1:] for row in table.rows}
    assert cells["standard BP"][0] == "51.00 ± 1.41"
    assert cells["Relay BP"][0] == "41.00 ± 1.41 (+10.00)"
    assert cells["Relay BP (the paper)"] == ("49.75 (+1.16)", "17.83 (+1.17)")
    assert "multi-loss + standard BP" not in cells, "there is none"
    assert any("top-1 -10.00 [" in note and "2 seeds" in note for note in table.notes)
    assert paper_table("4", [folder]).rows[0][1].startswith("0.00")


def test_other_tables(tmp_path: Path) -> None:
    folder = score_folder(tmp_path)
    for depth, wrong in (("vgg19", 50), ("vgg25", 60)):
        add(folder, depth, wrong, "dense-32", **{"network.architecture": depth})
    assert [row[1] for row in paper_table("1", [folder]).rows][:2] == ["25.00", "30.00"]
    for scheme, wrong in (("standard", 40), ("relay", 30)):
        add(folder, f"resnet-{scheme}", wrong, "dense-32", **{"network.architecture": "resnet50", "scheme": scheme})
        own = {"standard": "multi_loss"}.get(scheme, scheme)
        add(folder, f"inception-{own}", wrong, "dense-32", **{"network.architecture": "inception_v3", "scheme": own})
    six = paper_table("6", [folder])
    assert [row[0] for row in six.rows] == [
        "standard BP",
        "Relay BP",
        "standard BP (the paper)",
        "Relay BP (the paper)",
    ]
    assert six.rows[0][1::2] == ("20.00", "20.00"), "Inception-v3's own auxiliary classifier is its standard BP"
    assert six.rows[1][1::2] == ("15.00 (+5.00)", "15.00 (+5.00)")
    assert six.rows[3][1:] == ("20.26 (+0.91)", "4.93 (+0.44)", "18.52 (+0.66)", "3.97 (+0.46)")
    sampled = score_folder(tmp_path / "sampling")
    for sampling, wrong in (("shuffled", 40), ("class-aware", 30)):
        add(sampled, sampling, wrong, **{"images.sampling": sampling})
    rows = paper_table("sampling", [sampled]).rows
    assert [row[0] for row in rows] == ["plain sampling", "class-aware sampling"]
    assert rows[1][3] == "15.00"


@pytest.mark.parametrize("number", ["1", "3", "4", "5", "6", "sampling"])
def test_a_table_of_nothing_is_refused(tmp_path: Path, number: str) -> None:
    with pytest.raises(InputError, match="table"):
        paper_table(number, [score_folder(tmp_path)])


def test_what_cannot_stand_in_one_table_is_refused(tmp_path: Path) -> None:
    folder = score_folder(tmp_path / "one")
    add(folder, "a", 10)
    add(folder, "b", 10, scheme="relay", **{"a.b": 2})
    with pytest.raises(InputError, match=r"a and b cannot be compared in one column: a\.b is 1 and 2"):
        paper_table("3", [folder])
    with pytest.raises(InputError, match="different images"):
        paper_table("3", [folder, score_folder(tmp_path / "two", fingerprint="g")])
    with pytest.raises(InputError, match="different classes"):
        paper_table("3", [folder, score_folder(tmp_path / "three", fingerprint="h", classes=7)])
    with pytest.raises(InputError, match=r"unknown table .2.: expected one of 1, 3"):
        paper_table("2", [folder])
    twice = score_folder(tmp_path / "four")
    add(twice, "a", 10)
    add(twice, "b", 10)
    with pytest.raises(InputError, match="same recipe and seed"):
        paper_table("3", [twice])
    uneven = score_folder(tmp_path / "five")
    add(uneven, "a", 10, "dense-32")
    add(uneven, "b", 10, "dense-48", scheme="relay")
    with pytest.raises(InputError, match="a was evaluated by dense-32, b by dense-48: evaluate both alike"):
        paper_table("4", [uneven])


def test_tables_are_written_as_their_formats_need_it() -> None:
    table = Table("50 % of a_b", ("x", "y | z"), (("<&>", "1 ± 2"),), ("note_1",))
    assert "| x | y \\| z |" in render(table, "markdown")
    latex = render(table, "latex")
    assert r"50 \% of a\_b" in latex
    assert r"<\&> & 1 $\pm$ 2 \\" in latex
    html = render(table, "html")
    assert '<th scope="row">&lt;&amp;&gt;</th>' in html


def made_up_scores() -> Tensor:
    return torch.randn(3, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "first"), [("ilsvrc", 1), ("places2", 0)])
def test_submissions_are_in_the_official_order(name: str, first: int) -> None:
    scores, expected = made_up_scores(), ["test/c.jpg", "test/a.jpg", "test/b.jpg"]
    lines = submission_lines(["a.jpg", "b.jpg", "c.jpg"], scores, expected, FORMATS[name])
    check_submission(lines, expected, 10, FORMATS[name])
    best = (scores[2].argsort(descending=True)[:5] + first).tolist()
    assert lines[0].split()[-5:] == list(map(str, best))
    assert lines[0].startswith("test/c.jpg ") == (name == "places2")
    for wrong, message in [
        (lines[:2], "2 lines for 3"),
        ([*lines[:2], lines[2].rsplit(" ", 1)[0]], "five different labels"),
        ([*lines[:2], lines[2].rsplit(" ", 1)[0] + " 99"], "labels from"),
        ([*lines[:2], lines[2].rsplit(" ", 1)[0] + " " + lines[2].split()[-2]], "five different labels"),
    ]:
        with pytest.raises(InputError, match=message):
            check_submission(wrong, expected, 10, FORMATS[name])
    if name == "places2":
        with pytest.raises(InputError, match="line 1 starts with"):
            check_submission(lines[::-1], expected, 10, FORMATS[name])


def test_missing_and_extra_images_are_named() -> None:
    names = ["a.jpg", "b.jpg", "c.jpg"]
    form = FORMATS["places2"]
    with pytest.raises(
        InputError, match=r"1 images of the list have no scores: d\.jpg; 1 images have scores .*: c\.jpg"
    ):
        submission_lines(names, made_up_scores(), ["a.jpg", "b.jpg", "d.jpg"], form)
    with pytest.raises(InputError, match=r"two images have the name a\.jpg: x/a\.jpg and y/a\.jpg"):
        submission_lines(["x/a.jpg", "y/a.jpg", "b.jpg"], made_up_scores(), ["a.jpg"], form)
    with pytest.raises(InputError, match="needs five labels"):
        submission_lines(names, made_up_scores()[:, :4], names, form)
    with pytest.raises(InputError, match=r"are NaN, first of a\.jpg"):
        submission_lines(names, made_up_scores() * float("nan"), names, form)


def test_test_lists(tmp_path: Path) -> None:
    file = tmp_path / "test.txt"
    file.write_text("b.jpg\na.jpg 3\n\n")
    assert read_test_list(file) == ["b.jpg", "a.jpg"]
    file.write_text("b.jpg\nb.jpg\n")
    with pytest.raises(InputError, match=r"line 2: b\.jpg is already on line 1"):
        read_test_list(file)
    file.write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        read_test_list(file)
    with pytest.raises(InputError, match="cannot read"):
        read_test_list(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> Path:
    """A comparison of two schemes, and its scores."""
    folder = tmp_path_factory.mktemp("report")
    options = ["--scale", "tiny", "--data", str(tiny_images), "--workers", "0", "--diagnose-every", "1"]
    options += ["--schemes", "standard,relay", "--seeds", "0", "--log-every", "1"]
    assert main(["compare", "table3-model-a-relay", *options, "--out", str(folder / "runs")]) == 0
    evaluated = ["--protocol", "single-crop,dense", "--ensemble", "product", "--workers", "0"]
    assert main(["eval", str(folder / "runs"), *evaluated, "--out", str(folder / "scores")]) == 0
    return folder


def test_commands_make_tables_figures_and_submissions(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = str(tiny / "scores")
    capsys.readouterr()
    for number in ("3", "4", "5"):
        for form in ("markdown", "latex", "html"):
            assert main(["table", number, scores, "--format", form]) == 0
            assert "Relay BP" in capsys.readouterr().out or number == "5"
    runs = [str(tiny / "runs" / name) for name in ("standard-s0", "relay-s0")]
    for number, sources in (("1", runs), ("2", runs[1:]), ("4", [scores])):
        for suffix in ("svg", "png"):
            file = tmp_path / f"figure{number}.{suffix}"
            assert main(["figure", number, *sources, "--out", str(file)]) == 0
            assert file.stat().st_size > 3000
    listed = tmp_path / "list.txt"
    names = (tiny / "scores" / "images.txt").read_text().split()
    listed.write_text("\n".join(names[::-1]) + "\n")
    out = tmp_path / "submission.txt"
    assert main(["submit", scores, "--list", str(listed), "--out", str(out)]) == 0
    assert [line.split()[0] for line in out.read_text().splitlines()] == names[::-1]
    listed.write_text("\n".join(names[:-1]) + "\n")
    assert main(["submit", scores, "--list", str(listed), "--out", str(out)]) == 2
    assert "1 images have scores and are not in the list" in capsys.readouterr().err


def test_the_page_is_whole(tiny: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert main(["report", str(tiny / "runs"), "--scores", str(tiny / "scores"), "--out", str(page)]) == 0
    text = page.read_text()
    assert "<script" not in text
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", text), "nothing from elsewhere"
    assert text.count("<img") == text.count(" alt=")
    ids = set(re.findall(r'id="([^"]+)"', text))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= ids
    for expected in (
        "Table 3.",
        "Table 4.",
        "Table 5.",
        "Most confused classes",
        "All values of the recipe",
    ):
        assert expected in text
    moved = tmp_path / "scores"
    shutil.copytree(tiny / "scores", moved)
    for file in moved.rglob("model.json"):
        file.write_text(file.read_text().replace('"data"', '"gone"'))
    assert main(["report", str(tiny / "runs"), "--scores", str(moved), "--out", str(page)]) == 0
    assert "No example images: the images" in page.read_text(), "the images may be elsewhere by now"
    bare = tmp_path / "bare.html"
    assert main(["report", str(tiny / "runs"), "--out", str(bare)]) == 0
    assert "require per-image scores" in bare.read_text()


def test_the_page_refuses_runs_that_do_not_belong_together(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    relay = tiny / "runs" / "relay-s0"
    other = tmp_path / "other"
    shutil.copytree(relay, other)
    config = json.loads((other / "config.json").read_text())
    empty = tmp_path / "empty"
    shutil.copytree(relay, empty)
    (empty / "metrics.jsonl").write_text("")
    for change, message in [
        ({"classes": ["a", "b", "c", "d", "x"]}, "different classes"),
        ({"options": config["options"] | {"data": ["/elsewhere"]}}, "different images"),
        ({}, "the same scheme and seed"),
    ]:
        (other / "config.json").write_text(json.dumps(config | change))
        assert main(["report", str(relay), str(other), "--out", str(tmp_path / "r.html")]) == 2
        assert message in capsys.readouterr().err
    assert main(["report", str(empty), "--out", str(tmp_path / "r.html")]) == 2
    assert "has no metrics; train it first" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "no" / "r.html")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_each_method_may_have_a_learning_rate_of_its_own(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, page = tmp_path / "runs", tmp_path / "r.html"
    shutil.copytree(tiny / "runs", folder)
    shutil.copytree(folder / "relay-s0", tmp_path / "relay-s1")
    changes = {folder / "relay-s0": ("lr", 0.5), tmp_path / "relay-s1": ("seed", 1)}
    for run, (what, value) in changes.items():
        config = json.loads((run / "config.json").read_text())
        if what == "lr":
            config["options"]["changes"].append(f"optimizer.lr={value}")
            config["recipe"]["values"]["optimizer.lr"] = value
        else:
            config["options"]["seed"] = value
        (run / "config.json").write_text(json.dumps(config))
    assert main(["report", str(folder), "--out", str(page)]) == 0
    text = page.read_text()
    assert "standard BP: 0.01; Relay BP: 0.5" in text
    assert [cell(text, method, "learning rate") for method in ("standard BP", "Relay BP")] == ["0.01", "0.5"]
    sources = re.search(r">optimizer\.lr</th>.*?data-label=\"source\">([^<]*)<", text)
    assert sources is not None
    assert sources[1] == "standard BP: the paper, section 5.1; Relay BP: the command line"
    assert main(["report", str(folder), str(tmp_path / "relay-s1"), "--out", str(page)]) == 2
    assert "different recipes (optimizer.lr)" in capsys.readouterr().err


def cell(page: str, row: str, column: str) -> str:
    """Return a cell of the main table."""
    table = page[page.index("<table>") : page.index("</table>")]
    found = re.search(rf'<th scope="row">{re.escape(row)}</th>(.*?)</tr>', table)
    assert found is not None
    cells = dict(re.findall(r'<td data-label="([^"]*)">([^<]*)</td>', found[1]))
    return cells[column]


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="no Chromium: the page is not opened in a browser")
def test_the_page_opens_in_a_browser(tiny: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert main(["report", str(tiny / "runs"), "--scores", str(tiny / "scores"), "--out", str(page)]) == 0
    assert check(page, tmp_path)["images"] >= 10


def test_photos_are_sure_and_of_different_classes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for label in range(3):
        (tmp_path / "val" / f"00{label}_x_y").mkdir(parents=True)
        for number in range(4):
            pixels = random.integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "val" / f"00{label}_x_y" / f"{number}.png")
    source = open_source(tmp_path, split="val", cache=tmp_path / "cache")
    labels = torch.as_tensor(source.labels[:].astype("int64"))
    sure = torch.linspace(1, 5, len(labels))
    scores = (sure[:, None] * torch.nn.functional.one_hot(labels, 3)).log_softmax(1)
    photos = pick_photos(source, source.classes, scores, right=True)
    assert sorted(photo.truth for photo in photos) == sorted(source.classes)
    assert all(photo.guesses[0][0] == photo.truth for photo in photos)
    assert photos[0].guesses[0][1] == max(photo.guesses[0][1] for photo in photos)
    assert pick_photos(source, source.classes, scores, right=False) == []
    assert len(pick_photos(source, source.classes, scores.roll(1, dims=1), right=False, count=2)) == 2
    assert plain("003_coffee_shop") == "coffee shop"
    assert plain("abbey") == "abbey"
