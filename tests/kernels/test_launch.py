"""What the launchers share, and whether the tests of kernels can be trusted."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import test_attention_block
import test_linear
import test_norm_residual
import torch
from kernel_helpers import DEVICE, DTYPES, assert_as_right_as_plain, check, mutant, run
from swinfast.kernels import attention_block, launch, linear, norm_residual, tiles, windows
from swinfast.kernels.configs import Config
from swinfast.kernels.launch import Launch, arch_of, precision, precision_name, record
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")


def meta_linear(rows: int = 5, **options) -> torch.Tensor:
    x, weight = (torch.empty(shape, device=META, dtype=torch.float16) for shape in ((rows, 96), (32, 96)))
    return linear.linear(x, weight, None, **options)


@pytest.mark.parametrize("changed", [attention_block, windows, tiles])
def test_unchanged_copy_passes(changed, tmp_path):
    """So what makes a mutant fail is its change."""
    copy = mutant(tmp_path, attention_block, changed, "import", "import")
    args = test_attention_block.arguments(*test_attention_block.CASES["padded"])
    got = check(copy.attention_block, test_attention_block.reference, args, torch.float32)
    assert torch.equal(got, run(attention_block.attention_block, args))


def test_mutants_register_no_operator(tmp_path):
    copy = mutant(tmp_path, linear, linear, "import", "import")
    assert copy.linear is not linear.linear
    assert not hasattr(copy.linear, "__wrapped__")


def test_policy():
    oracle = torch.linspace(-3, 3, 101, dtype=torch.float64)
    plain = oracle.half()
    assert_as_right_as_plain(plain, plain, oracle, torch.float16)
    for wrong, message in (
        (plain * 1.002, "RMS error"),
        (torch.cat([plain[:-1], plain[-1:] + 0.008]), "largest error"),
        (torch.cat([plain[:-1], plain[-1:] * torch.inf]), "NaN or infinity"),
        (plain[1:], "shape"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_as_right_as_plain(wrong, plain, oracle, torch.float16)


def test_record():
    with record("sm_80") as outer:
        first = meta_linear(gelu=True)
        with record("gfx942") as inner:
            assert arch_of(DEVICE) == arch_of(META) == "gfx942"
            meta_linear()
        assert arch_of(META) == "sm_80"
    meta_linear()  # is not recorded, and launches nothing
    assert (first.shape, first.device, first.dtype) == ((5, 32), META, torch.float16)
    assert [type(one) for one in (*outer, *inner)] == [Launch, Launch]
    assert outer[0].kernel is linear._linear_kernel
    assert outer[0].constants["GELU"] is True
    assert inner[0].kernel is None  # the library's
    assert outer[0].args[-1] == 5
    assert outer[0].programs == 1


def test_arch():
    assert arch_of(torch.device("cpu")) == "sm_90"
    if DEVICE.type == "cuda" and not torch.version.hip:
        assert arch_of(DEVICE) == "sm_" + "".join(map(str, torch.cuda.get_device_capability()))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="about tensors on a CPU")
def test_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match=r"^Triton kernels run on a GPU, got tensors on cpu.*TRITON_INTERPRET=1"):
        norm_residual.norm_residual(*test_norm_residual.arguments((2, 4), False).values())


@contextmanager
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_precision():
    names = ["float32", "float16", "bfloat16"]
    assert [precision_name(dtype) for dtype in DTYPES] == names
    assert {precision(dtype) for dtype in DTYPES} == {"ieee"}
    with tf32():
        assert [precision_name(dtype) for dtype in DTYPES] == ["tf32", *names[1:]]
        assert [precision(dtype) for dtype in DTYPES] == ["tf32", "ieee", "ieee"]


@pytest.mark.parametrize("options", [{}, {"maxnreg": 96}, {"OVERLAPPED": True}], ids=str)
def test_options_reach_the_launch(monkeypatch, options):
    """Without an error of Triton's a launch that is not overlapped would go unseen."""
    seen = []
    kernel = {(1,): lambda *args, **options: seen.append(options)}
    monkeypatch.setattr(launch, "INTERPRETED", True)
    chosen = Config({"BLOCK_M": 16} | options, 2, 3, "a test")
    launch.launch(kernel, 1, torch.ones(1, device=DEVICE), config=chosen, **chosen.blocks)
    expected = {"launch_pdl": True} if "OVERLAPPED" in options else {}
    assert seen == [{"BLOCK_M": 16, "num_warps": 2, "num_stages": 3} | options | expected]


def test_too_many_rows():
    with pytest.raises(ValueError, match=r"^x must have at most 2147418112 rows, got 2147483648"):
        meta_linear(2**31)


def test_keyword_arguments():
    args = test_linear.arguments((2, 4), 3, True, True)
    expected = linear.linear(*args.values())
    with torch.no_grad():
        assert torch.equal(linear.linear(**args), expected)
    assert torch.equal(linear.linear(**args), expected)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True])
def test_dispatch_modes_see_the_operator(grad):
    x, vector = torch.randn(2, 8, device=DEVICE), torch.randn(8, device=DEVICE)
    with torch.set_grad_enabled(grad), Seen() as seen:
        norm_residual.norm_residual(x, vector, vector, 1e-5, x)
    assert seen.names == ["swinfast::norm_residual"]
