"""Packed linear layers: what is found out about them holds for the whole process."""

import pytest
import torch

from swinfast.torch_linear import can_pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_default_device(dtype):
    """Packing is tried on the CPU, wherever new tensors go by default."""
    can_pack.cache_clear()
    expected = can_pack(dtype)
    assert expected or dtype == torch.bfloat16 or not torch.backends.mkldnn.is_available()
    can_pack.cache_clear()
    with torch.device("meta"):
        assert can_pack(dtype) == expected
