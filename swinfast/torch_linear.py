"""Linear layers for the PyTorch backend: oneDNN weights packed ahead of time where this PyTorch has them.

The packing operators are private to PyTorch, so each is tried on a small problem before it is used; without them a
layer is F.linear. A packed weight can't be copied, pickled or traced: it belongs in a cache, never in a module.
"""

import os
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]
X86_WITH_BFLOAT16 = ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT")  # in what oneDNN can be limited to


def make_linear(weight: Tensor, bias: Tensor | None, *, gelu: bool = False, pack: bool = False) -> Linear:
    """A function that computes x W^T + b, with the exact GELU after it where asked for.

    Args:
        weight, bias: As torch.nn.Linear has them, [out, in] and [out] or None.
        gelu: Apply the exact GELU to the result.
        pack: Repack the weight for oneDNN where that is possible; it is not possible in a traced graph.
    """
    if not (pack and weight.device.type == "cpu" and can_pack(weight.dtype)):
        if gelu:
            return lambda x: F.gelu(F.linear(x, weight, bias))
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    bias = None if bias is None else bias.contiguous()  # the operators take its strides for 1
    pointwise = torch.ops.mkldnn._linear_pointwise
    if gelu and _fuses_gelu():
        return lambda x: pointwise(x, packed, bias, "gelu", [], "none")
    if gelu:
        return lambda x: torch.ops.aten.gelu_(pointwise(x, packed, bias, "none", [], ""))
    return lambda x: pointwise(x, packed, bias, "none", [], "")


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether packed linears exist here for this dtype and compute the right thing."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        shapes = ((3, 8), (16, 8), (16,))
        x, weight, bias = (torch.randn(shape, generator=generator, device="cpu").to(dtype) for shape in shapes)
        expected = F.linear(x.double(), weight.double(), bias.double())
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            plain = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "").double()
            gelu = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "gelu", [], "none").double()
        except (RuntimeError, AttributeError, NotImplementedError):
            return False
    tolerance = 16 * torch.finfo(dtype).eps
    close = [(plain, expected), (gelu, F.gelu(expected))]
    return all(torch.allclose(got, want, rtol=tolerance, atol=tolerance) for got, want in close)


@cache
def _fuses_gelu() -> bool:
    """Whether oneDNN's GELU pays: with AVX-512 it costs less than a pass of its own, with AVX2 more."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@cache
def has_native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16, AMX, Arm BF16), and oneDNN may."""
    most = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    probes = ["_is_arm_bf16_supported"]
    if any(isa in most.upper() for isa in X86_WITH_BFLOAT16):
        probes += ["_is_avx512_bf16_supported", "_is_amx_tile_supported"]
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)
