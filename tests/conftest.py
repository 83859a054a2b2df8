"""Setup of every test: one thread, fixed seeds, single precision, a cache of its own; and the number of processes."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from relaylab.files import available_cores

for library in ("OMP", "OPENBLAS", "MKL"):  # before torch and numpy are imported, and for child processes
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

SHARED = Path(__file__).parents[2] / "shared"


def pytest_configure() -> None:
    """Random examples without a limit on their time, and without a folder of failures that processes would share."""
    from hypothesis import settings

    settings.register_profile("tests", deadline=None, database=None)
    settings.load_profile("tests")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """All cores that this process may use: xdist by itself counts only physical ones, and ignores the affinity."""
    return available_cores()


@pytest.fixture(autouse=True)
def _steady() -> None:
    import torch

    torch.set_num_threads(1)  # a test may have changed it; at these sizes, threads slow everything down
    torch.manual_seed(0)
    assert torch.get_default_dtype() == torch.float32, "a test has changed the default dtype"


@pytest.fixture
def own_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget the modules that a test imports from its folder: other tests import files of the same name."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indexes and unpacked archives go to a folder of the tests, and not to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELAYLAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data beside the checkout."""
    path = SHARED / "data"
    if not path.is_dir():
        pytest.skip("real data: the folder shared/data beside the checkout is absent")
    return path


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of five classes for recipes at the tiny scale: 60 training and 20 validation images."""
    image = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    root, random = tmp_path_factory.mktemp("images"), numpy.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for label in range(5):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.normal((40 * label, 200 - 30 * label, 90), 25, (40, 48, 3)).clip(0, 255)
                image.fromarray(pixels.astype("uint8")).save(folder / f"{number}.png")
    return root
