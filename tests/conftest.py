"""What holds for every test: one thread for tiny tensors, fixed seeds, single precision by default."""

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def _steady() -> None:
    torch.set_num_threads(1)  # threads cost more than they give at these sizes
    torch.manual_seed(0)
    assert torch.get_default_dtype() == torch.float32, "a test has changed the default dtype"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data beside the checkout."""
    path = SHARED / "data"
    if not path.is_dir():
        pytest.skip("real data: the folder shared/data beside the checkout is absent")
    return path
