"""linear_norm_residual: residual + LN(x W^T + b), with a second LayerNorm and without."""

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
    cast,
    check,
    check_mixed,
    each_dtype,
    few_examples,
    mutant,
    odd_dtypes,
)
from swinfast.kernels import linear_norm_residual as module
from swinfast.kernels import tiles
from swinfast.reference import ops

CASES = {  # shape of x, channels, second norm
    "projection": ((2, 7, 5, 96), 96, False),
    "fc2": ((3, 23, 384), 96, True),
    "tails": ((3, 44), 88, True),
    "wide": ((2, 16), 352, False),
    "one": ((1, 1), 2, False),
}


def arguments(shape, channels, extra, dtype=torch.float32):
    draw = Draw(dtype)
    args = {"x": draw(*shape), **draw.linear(shape[-1], channels), **draw.norm(channels)}
    return args | {"residual": draw(*shape[:-1], channels)} | draw.extra_norm(channels, extra)


def reference(
    x, weight, bias, norm_weight, norm_bias, eps, residual, extra_weight=None, extra_bias=None, extra_eps=0.0
):  # fmt: skip
    extra_norm = None if extra_weight is None else (extra_weight, extra_bias, extra_eps)
    return ops.linear_norm_residual(x, weight, bias, (norm_weight, norm_bias, eps), residual, extra_norm)


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype):
    check(module.linear_norm_residual, reference, arguments(*CASES[name], dtype), dtype)


@few_examples
@given(st.integers(1, 80), st.integers(1, 70), st.integers(2, 200), st.booleans(), odd_dtypes)
def test_odd_shapes(rows, k, channels, extra, dtype):
    check(module.linear_norm_residual, reference, arguments((rows, k), channels, extra, dtype), dtype)


@pytest.mark.parametrize("keep", ["stream", "x and stream"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_residual_in_float32(dtype, keep):
    args = arguments(*CASES["tails"])
    changed = ("weight", "bias") if keep == "x and stream" else ("x", "weight", "bias")
    args |= cast({name: args[name] for name in changed}, dtype)
    check_mixed(module.linear_norm_residual, reference, args, dtype)


@each_dtype
@pytest.mark.filterwarnings("ignore:overflow")
def test_extremes(dtype):
    args = arguments((4, 44), 40, True, dtype)
    args["x"][0] = 0
    args["x"][1] = 6e4 * args["x"][1].sign()
    args["residual"][2] = 6e4
    check(module.linear_norm_residual, without_overflow, args, dtype)


def without_overflow(**args):
    """The definition in float32 at least: in float16 the product overflows, before the norm brings it back."""
    return reference(**cast(args, torch.promote_types(args["x"].dtype, torch.float32)))


def test_runs_and_rows_are_independent():
    args = arguments((3, 5, 36), 40, True)
    assert_repeatable(module.linear_norm_residual, args)
    for batched in ("x", "residual"):
        assert_images_apart(module.linear_norm_residual, args, batched)
    assert_empty_batch(module.linear_norm_residual, args, "x", "residual")


@pytest.mark.parametrize("extra", [False, True])
def test_operator(extra):
    args = arguments((2, 3, 20), 24, extra, torch.bfloat16)
    assert_operator(module.linear_norm_residual, args, ["x", "residual"])


def test_errors():
    op, args = module.linear_norm_residual, arguments((2, 3, 20), 24, True)
    names = ("weight", "bias", "norm_weight", "norm_bias", "residual", "extra_weight", "extra_bias")
    assert_refuses_tensors(op, args, *names)
    x = torch.zeros(2, 3, 21, device=DEVICE)
    assert_refuses(op, args, r"^x must have shape \[2, 3, 20\], got \[2, 3, 21\]", x=x)
    assert_refuses(op, args, "^x must be contiguous, got strides", x=x[..., 1:])
    assert_refuses(op, args, "^x must be float16, bfloat16 or float32, got torch.float64", x=args["x"].double())
    assert_refuses(op, args, "^extra_weight and extra_bias must be given together", extra_bias=None)


# fmt: off
MUTANTS = {
    "residual left out": ("projection", module, "acc = add_rows", "_ = add_rows"),
    "no bias": ("projection", module, "acc = add_vector", "_ = add_vector"),
    "no norm": ("projection", module, "acc = layer_norm(acc, norm", "_ = layer_norm(acc, norm"),
    "no second norm": ("fc2", module, "if EXTRA_NORM:", "if False:"),
    "second norm with the first's eps": ("fc2", module, "extra_bias, extra_eps, C", "extra_bias, eps, C"),
    "another eps": ("projection", tiles, "squares / C + eps", "squares / C + 1e-5"),
    "K tail not masked": ("tails", module, "if K % BLOCK_K != 0:", "if False:"),
    "edges of W not masked": ("tails", tiles, "if WHOLE:", "if True:"),
    "rows not masked": ("tails", module, "inside = row < rows", "inside = row < rows + 1"),
    "channel tail of the bias":
        ("tails", tiles, "tl.load(vector + columns, mask=columns < C, other=0.0)", "tl.load(vector + columns)"),
    "tiles of channels mixed up": ("fc2", module, "column = i * TILE", "column = (COUNT - 1 - i) * TILE"),
}
# fmt: on


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    case, *change = MUTANTS[name]
    with blocks(BLOCK_M=32, BLOCK_K=16):
        assert_fails(mutant(tmp_path, module, *change).linear_norm_residual, reference, arguments(*CASES[case]))
