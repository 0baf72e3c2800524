"""Packed linear layers: what is found out about them holds for the whole process."""

import pytest
import torch

from swinfast.torch_linear import can_pack, has_native_bfloat16, make_linear


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


@pytest.mark.parametrize("gelu", [False, True])
def test_numbers_that_are_not_side_by_side(gelu):
    """oneDNN's operators take them for such, and read others."""
    x, weight, bias = torch.randn(3, 8), torch.randn(16, 8), torch.randn(16)
    expected = make_linear(weight, bias, gelu=gelu)(x)
    apart = [torch.stack([one, one + 1], -1)[..., 0] for one in (weight, bias)]
    assert torch.allclose(make_linear(*apart, gelu=gelu, pack=True)(x), expected, atol=1e-5)
    same = bias[:1].expand(16)
    one = make_linear(weight, same, gelu=gelu, pack=True)(x)
    assert torch.allclose(one, make_linear(weight, same.contiguous(), gelu=gelu)(x), atol=1e-5)
