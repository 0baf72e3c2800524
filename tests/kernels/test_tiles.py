"""What kernels share, by itself."""

import math

import torch
import triton
import triton.language as tl
from graph_captures import DEVICE
from swinfast.kernels.tiles import to_tf32


@triton.jit
def _to_tf32_kernel(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, to_tf32(tl.load(x + i)))


def rounded(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    _to_tf32_kernel[(1,)](x, out, SIZE=len(x))
    return out


def test_to_tf32():
    """The nearest number with 10 bits of mantissa, halves away from zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, generator=generator) * 10.0 ** torch.randint(-30, 30, (1024,), generator=generator)
    x[:4] = torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-23, 2 - 2**-23])
    mantissa, exponent = torch.frexp(x.double())
    expected = torch.ldexp((mantissa.abs() * 2**11 + 0.5).floor().copysign(mantissa), exponent - 11).float()
    assert torch.equal(rounded(x.to(DEVICE)).cpu(), expected)
    assert expected[:4].tolist() == [1 + 2**-10, -1 - 2**-10, 1, 2]


def test_to_tf32_of_no_numbers():
    all_ones = torch.tensor([-1, 2**31 - 1], dtype=torch.int32).view(torch.float32)
    largest = torch.finfo(torch.float32).max
    x = torch.cat([torch.tensor([math.inf, -math.inf, math.nan, largest, 0.0, -0.0]), all_ones])
    out = rounded(x.to(DEVICE)).cpu()
    assert out[[0, 1, 3]].tolist() == [math.inf, -math.inf, math.inf]
    assert out[[2, 6, 7]].isnan().all()
    assert not out[4:6].any() and torch.equal(out[4:6].signbit(), x[4:6].signbit())
