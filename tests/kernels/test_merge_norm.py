"""merge_norm: each 2x2 neighbourhood to one token, normalised and as it is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import (
    DEVICE,
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
from swinfast.kernels import merge_norm as module
from swinfast.reference import ops

CASES = {  # batch, height, width, channels
    "tiny": (2, 8, 6, 96),
    "odd": (2, 5, 7, 32),
    "odd rows": (1, 3, 4, 44),
    "odd columns": (3, 2, 3, 20),
    "many": (1, 14, 14, 16),
    "one token": (1, 1, 1, 12),
}


def arguments(batch, height, width, channels, dtype=torch.float32, norm=True):
    draw = Draw(dtype)
    return {"x": draw(batch, height, width, channels, mean=0.5), **(draw.norm(4 * channels) if norm else {})}


def reference(x, norm_weight=None, norm_bias=None, eps=1e-5):
    return ops.merge_norm(x, None if norm_weight is None else (norm_weight, norm_bias, eps))


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype):
    check(module.merge_norm, reference, arguments(*CASES[name], dtype), dtype)


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_without_a_norm(name, dtype):
    args = arguments(*CASES[name], dtype, norm=False)
    assert torch.equal(run(module.merge_norm, args), reference(**args))


@few_examples
@given(*[st.integers(1, largest) for largest in (3, 9, 9, 200)], odd_dtypes)
def test_odd_shapes(batch, height, width, channels, dtype):
    check(module.merge_norm, reference, arguments(batch, height, width, channels, dtype), dtype)


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_blocks(rows):
    for name in ("odd", "odd rows"):
        with blocks(BLOCK_M=rows):
            check(module.merge_norm, reference, arguments(*CASES[name]), torch.float32)


@each_dtype
def test_extremes(dtype):
    args = arguments(*CASES["odd"], dtype)
    args["x"][:, 0:2] = 0
    args["x"][:, 2:4] = 6e4 * args["x"][:, 2:4].sign()
    args["x"][:, 4] = 6e4
    check(module.merge_norm, reference, args, dtype)


def test_large_mean():
    """The variance must not be taken as the mean of squares less the squared mean."""
    args = arguments(*CASES["tiny"])
    args["x"] += 1000
    check(module.merge_norm, reference, args, torch.float32)


def test_runs_and_images_are_independent():
    args = arguments(3, 5, 3, 12)
    assert_repeatable(module.merge_norm, args)
    assert_images_apart(module.merge_norm, args, "x")
    assert_empty_batch(module.merge_norm, args, "x")


def test_operator():
    for norm in (True, False):
        assert_operator(module.merge_norm, arguments(2, 3, 4, 8, torch.bfloat16, norm), ["x"])


def test_errors():
    op, args = module.merge_norm, arguments(2, 3, 4, 8)
    assert_refuses_tensors(op, args, "norm_weight", "norm_bias")
    x = args["x"]
    assert_refuses(op, args, r"^x must have shape \[any, any, any, any\], got \[3, 4, 8\]", x=x[0])
    assert_refuses(op, args, "^x must be contiguous, got strides", x=x.transpose(1, 2))
    assert_refuses(op, args, "^x must be float16, bfloat16 or float32, got torch.float64", x=x.double())
    wide = torch.zeros(1, 1, 1, 2049, device=DEVICE)
    assert_refuses(op, args, "^x must have at most 2048 channels, got 2049", x=wide)
    for one, other in (("norm_weight", "norm_bias"), ("norm_bias", "norm_weight")):
        assert_refuses(op, args, f"^{one} and {other} must be given together, got {one} alone", **{other: None})


# fmt: off
MUTANTS = {
    "channel order swapped": ("tiny", module, "column // C % 2, column // C // 2", "column // C // 2, column // C % 2"),
    "rows past the map": ("odd", module, " & (top[:, None] + down[None, :] < height)", ""),
    "columns past the map": ("odd", module, " & (left[:, None] + right[None, :] < width)", ""),
    "odd rows cut off":
        ("odd", module, "(height + 1) // 2, (width", "(height + 1) // 2 * 0 + height // 2, (width"),
    "padding at the front":
        ("odd columns", module, "left = 2 * (row % merged_w)", "left = 2 * (row % merged_w) - width % 2"),
    "images mixed up": ("odd", module, "image * height * width", "0 * image * height * width"),
    "no norm": ("tiny", module, "if NORM:", "if False:"),
    "norm over C": ("tiny", module, "eps, 4 * C, TILE", "eps, C, TILE"),
    "another eps": ("tiny", module, "norm_bias, eps, 4", "norm_bias, 1e-5, 4"),
    "channel tail not masked": ("odd columns", module, "if TILE * COUNT > 4 * C:", "if False:"),
    "rows not masked": ("odd columns", module, "inside = row < rows", "inside = row < rows + 1"),
}
# fmt: on


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    case, *change = MUTANTS[name]
    with blocks(BLOCK_M=4):
        assert_fails(mutant(tmp_path, module, *change).merge_norm, reference, arguments(*CASES[case]))
