"""These tests are for a machine with an NVIDIA GPU: without one they fail, for a skipped proof proves nothing."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def gpu() -> str:
    """The GPU's name."""
    import torch

    if not torch.cuda.is_available():
        pytest.exit("PyTorch sees no GPU here: these tests are for a machine with one (make test-gpu)", returncode=1)
    return torch.cuda.get_device_name()
