"""What holds for every test: one thread for tiny tensors, fixed seeds, single precision by default."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def _steady() -> None:
    torch.set_num_threads(1)  # threads cost more than they give at these sizes
    torch.manual_seed(0)
    assert torch.get_default_dtype() == torch.float32, "a test has changed the default dtype"


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
