"""What kernels share, by itself."""

import math
import sys

import pytest
import torch
import triton
import triton.language as tl
from graph_captures import DEVICE
from kernel_helpers import mutant
from swinfast.kernels import tiles
from swinfast.kernels.tiles import gelu, to_tf32
from torch.nn import functional as F


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


@triton.jit
def _gelu_kernel(x, out, SIZE: tl.constexpr, EXACT: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, gelu(tl.load(x + i), EXACT))


def with_gelu(x: torch.Tensor, exact: bool) -> torch.Tensor:
    x = x.to(DEVICE)
    out = torch.empty_like(x)
    _gelu_kernel[(1,)](x, out, SIZE=len(x), EXACT=exact)
    return out.cpu()


def is_near(exact: bool) -> bool:
    """EXACT: no further from float64 than the erf form in float32 on a CPU, at most and on average."""
    x = torch.cat([torch.linspace(-12, 12, 15 << 10), torch.logspace(-9, 4, 512), -torch.logspace(-9, 4, 512)])
    right = F.gelu(x.double())
    error, allowed = ((y - right).abs() / x.abs() for y in (with_gelu(x, exact), F.gelu(x)))
    if not exact:
        return error.max() <= 7.6e-6
    more = 1 if DEVICE.type == "cpu" else 2  # a GPU's exponentials are approximations
    return error.max() <= allowed.max() and error.square().mean() <= more * allowed.square().mean()


@pytest.mark.parametrize("exact", [True, False])
def test_gelu(exact):
    assert is_near(exact)


@pytest.mark.parametrize("exact", [True, False])
def test_gelu_of_no_numbers_and_large_ones(exact):
    x = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38, 0.0, 65504.0, -65504.0])
    out = with_gelu(x, exact)
    assert out[[0, 3, 6]].tolist() == x[[0, 3, 6]].tolist()
    assert out[[1, 4, 7]].abs().max() <= 1e-12  # what the erf form tends to; of -inf it is none
    assert out[2].isnan() and out[5] == 0


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.skipif(DEVICE.type == "cuda", reason="mutants are for CPUs")
@pytest.mark.parametrize(
    ("exact", "right", "wrong"),
    [
        (True, "8.857554e-06", "8.8e-06"),
        (True, "5.76903e-05", "5.8e-05"),
        (True, "0.000407", "0.00041"),
        (True, "0.00736315", "0.00735"),
        (True, "0.05266663", "0.0527"),
        (True, "0.45916432", "0.45915"),
        (True, "1.15110886", "1.151108"),
        (True, "p = -1.0 +", "p = -0.999999 +"),
        (False, "0.00478159", "0.00478"),
        (False, "0.04830374", "0.0483"),
        (False, "0.46180052", "0.4617"),
        (False, "1.15065444", "1.15065"),
        (False, "p = -1.0 +", "p = -0.99999 +"),
        (True, "8.0)  #", "5.0)  #"),
        (True, "8.0)  #", "40.0)  #"),
        (False, "8.0)  #", "3.0)  #"),
        (False, "8.0)  #", "40.0)  #"),
        (False, "tl.maximum(x, 0.0", "tl.maximum(x, -1.0"),
    ],
)
def test_gelu_of_other_numbers_is_wrong(exact, right, wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "gelu", mutant(tmp_path, tiles, tiles, right, wrong).gelu)
    assert not is_near(exact)
