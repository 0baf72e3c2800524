"""What the benchmarks share: `pytest bench/ --benchmark-only`."""

import pytest
import torch

from swinfast.predict import resolve_device


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU where there is one."""
    return resolve_device("auto")
