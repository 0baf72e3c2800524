"""What the benchmarks share: `pytest bench/ --benchmark-only`. Without a GPU kernels run in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from swinfast.pipeline import resolve_device


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU where there is one."""
    return resolve_device("auto")
