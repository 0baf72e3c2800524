"""Triton's interpreter goes on to refuse what it did, and leaves nothing behind."""

import operator

import pytest
import torch
import triton
import triton.language as tl
from swinfast.kernels.launch import INTERPRETED
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")


@triton.jit
def _combine(a, b, OPERATION: tl.constexpr):
    return a + b if OPERATION == "add" else a - b if OPERATION == "sub" else a * b


@triton.jit
def _kernel(a, b, out, OPERATION: tl.constexpr):
    i = tl.arange(0, 4)
    nothing = tl.zeros((4,), tl.int32)  # by a function of the language that is itself written in it
    tl.store(out + i, _combine(tl.load(a + i), tl.load(b + i), OPERATION) + nothing)


def run(operation: str, a: list[int], b: list[int], dtype: torch.dtype) -> torch.Tensor:
    out = torch.zeros(4, dtype=dtype)
    _kernel[(1,)](torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype), out, operation)
    return out


@pytest.mark.parametrize(
    ("operation", "fits", "other"),
    [
        ("add", 2**31 - 2, 1),
        ("add", -(2**31) + 1, -1),
        ("sub", 2**31 - 2, -1),
        ("sub", -(2**31) + 1, 1),
        ("mul", 2**30 - 1, 2),
        ("mul", -(2**30), 2),
    ],
)
def test_overflow_is_refused(operation, fits, other):
    """Of one number among others. The last that fits is right, and so is the next in 64 bits."""
    numbers, others = [1, 1, fits, 1], [1, 1, other, 1]
    assert run(operation, numbers, others, torch.int32)[2] == getattr(operator, operation)(fits, other)
    numbers[2] = too_large = fits + (1 if fits > 0 else -1)
    assert run(operation, numbers, others, torch.int64)[2] == getattr(operator, operation)(too_large, other)
    with pytest.raises(InterpreterError, match=f"int32 overflow detected for operation {operation}"):
        run(operation, numbers, others, torch.int32)


def test_a_launch_leaves_the_language_as_it_was():
    names = ("load", "arange", "range", "static_range", "sum", "math")
    modules = {
        (module, name): getattr(module, name) for module in (tl, tl.core) for name in names if hasattr(module, name)
    }
    methods = {name: getattr(tl.tensor, name) for name in ("__add__", "to", "__str__")}
    assert tl.core.is_builtin(tl.load) and tl.core.is_builtin(tl.tensor.__add__)  # after the launches before this test
    run("add", [1] * 4, [1] * 4, torch.int32)
    with pytest.raises(InterpreterError):
        run("add", [2**31 - 1] * 4, [1] * 4, torch.int32)
    assert all(getattr(module, name) is one for (module, name), one in modules.items())
    assert all(getattr(tl.tensor, name) is one for name, one in methods.items())
