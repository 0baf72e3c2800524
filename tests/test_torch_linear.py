"""Packed linear layers: what is found out about them holds for the whole process."""

import pytest
import torch

from swinfast.torch_linear import can_pack, has_native_bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_default_device(dtype):
    """Packing is tried on the CPU, wherever new tensors go by default."""
    can_pack.cache_clear()
    expected = can_pack(dtype)
    assert expected or dtype == torch.bfloat16 or not torch.backends.mkldnn.is_available()
    can_pack.cache_clear()
    with torch.device("meta"):
        assert can_pack(dtype) == expected


@pytest.mark.parametrize(
    ("most", "native"),
    [("AVX2", False), ("AVX512_CORE", False), ("AVX512_CORE_BF16", True), ("AVX512_CORE_AMX", True), ("all", True)],
)
@pytest.mark.parametrize("name", ["DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA"])
def test_bfloat16_where_onednn_is_limited(monkeypatch, name, most, native):
    """What the CPU could do counts for nothing then: bfloat16 products would be emulated."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_arm_bf16_supported", lambda: False, raising=False)
    monkeypatch.setenv(name, most)
    assert has_native_bfloat16.__wrapped__() == native
