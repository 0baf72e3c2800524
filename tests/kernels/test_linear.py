"""linear: x W^T + b, with GELU and without."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import (
    DEVICE,
    DTYPES,
    Draw,
    assert_empty_batch,
    assert_fails,
    assert_images_apart,
    assert_operator,
    assert_refuses,
    assert_refuses_tensors,
    assert_repeatable,
    blocks,
    check,
    each_dtype,
    few_examples,
    mutant,
    odd_dtypes,
    run,
)
from swinfast.kernels import linear as module
from swinfast.kernels import tiles
from swinfast.reference import ops

CASES = {  # shape of x, columns, bias, GELU
    "qkv": ((2, 5, 7, 32), 96, True, False),
    "fc1": ((2, 65, 96), 384, True, True),
    "no bias": ((70, 48), 33, False, False),
    "tails": ((131, 44), 132, True, True),
    "one": ((1, 1), 1, True, True),
}


def arguments(shape, columns, bias, gelu, dtype=torch.float32):
    draw = Draw(dtype)
    args = {"x": draw(*shape), **draw.linear(shape[-1], columns), "gelu": gelu}
    return args if bias else args | {"bias": None}


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype):
    check(module.linear, ops.linear, arguments(*CASES[name], dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_x_in_float32(dtype):
    args = arguments(*CASES["tails"], dtype)
    got = run(module.linear, args | {"x": args["x"].float()})
    assert torch.equal(got, run(module.linear, args))


@pytest.mark.parametrize("sizes", [(16, 128, 64), (128, 16, 16), (64, 64, 256)], ids=str)
def test_blocks(sizes):
    with blocks(**dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), sizes, strict=True))):
        check(module.linear, ops.linear, arguments(*CASES["tails"]), torch.float32)


@few_examples
@given(st.integers(1, 150), st.integers(1, 70), st.integers(1, 150), *[st.booleans()] * 2, odd_dtypes)
def test_odd_shapes(rows, k, columns, bias, gelu, dtype):
    check(module.linear, ops.linear, arguments((rows, k), columns, bias, gelu, dtype), dtype)


@each_dtype
@pytest.mark.filterwarnings("ignore:overflow")
def test_extremes(dtype):
    args = arguments((3, 44), 20, True, True, dtype)
    args["x"][0] = 0
    args["x"][1] = 6e4 * args["x"][1].sign()  # some sums overflow float16, and must as in the definition
    check(module.linear, ops.linear, args, dtype)


def test_runs_and_rows_are_independent():
    args = arguments((3, 44, 36), 40, True, True)
    assert_repeatable(module.linear, args)
    assert_images_apart(module.linear, args, "x")
    assert_empty_batch(module.linear, args, "x")


def test_operator():
    assert_operator(module.linear, arguments((2, 3, 20), 24, True, True, torch.bfloat16), ["x"])
    assert_operator(module.linear, arguments((2, 3, 20), 24, False, False, torch.bfloat16), ["x"])


def test_errors():
    args = arguments((2, 3, 20), 24, True, True)
    assert_refuses_tensors(module.linear, args, "weight", "bias")
    assert_refuses(
        module.linear,
        args,
        r"^x must have shape \[2, 3, 20\], got \[2, 3, 21\]",
        x=torch.zeros(2, 3, 21, device=DEVICE),
    )
    assert_refuses(module.linear, args, "^x must be contiguous", x=torch.zeros(2, 20, 3, device=DEVICE).mT)


MUTANTS = {
    "no bias": ("qkv", module, "if HAS_BIAS:", "if False:"),
    "no GELU": ("fc1", module, "if GELU:", "if False:"),
    "fast GELU in float32": ("fc1", module, "gelu(acc, EXACT_GELU)", "gelu(acc, False)"),
    "another GELU": ("fc1", tiles, "0.7071067811865476", "0.707"),
    "K tail not masked": ("tails", module, "K % BLOCK_K != 0", "False"),
    "W^T read as W": ("qkv", tiles, "n[None, :] * K + k[:, None]", "n[None, :] + k[:, None] * N"),
    "edges of W not masked": ("tails", tiles, "if WHOLE:", "if True:"),
    "rows not masked": ("tails", module, "inside = row < rows", "inside = row < rows + 1"),
    "columns not masked": ("tails", module, "(column < N)[None, :])", "(column < N + 1)[None, :])"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    case, *change = MUTANTS[name]
    with blocks(BLOCK_M=32, BLOCK_N=32, BLOCK_K=16):
        assert_fails(mutant(tmp_path, module, *change).linear, ops.linear, arguments(*CASES[case]))
