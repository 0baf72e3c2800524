"""patch_merging: each 2x2 neighbourhood to one token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import (
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
    check_mixed,
    each_dtype,
    few_examples,
    mutant,
    odd_dtypes,
)
from swinfast.kernels import patch_merging as module
from swinfast.kernels import tiles
from swinfast.reference import ops

CASES = {  # batch, height, width, channels, channels of the output
    "tiny": (2, 8, 6, 96, 192),
    "odd": (2, 5, 7, 32, 64),
    "odd rows": (1, 3, 4, 44, 88),
    "odd columns": (3, 2, 3, 20, 33),
    "many": (1, 14, 14, 16, 32),
    "one token": (1, 1, 1, 12, 24),
}


def arguments(batch, height, width, channels, reduced, dtype=torch.float32):
    draw = Draw(dtype)
    weight = draw(reduced, 4 * channels, std=(4 * channels) ** -0.5)
    return {"x": draw(batch, height, width, channels, mean=0.5), **draw.norm(4 * channels), "weight": weight}


def reference(x, norm_weight, norm_bias, eps, weight):
    return ops.patch_merging(x, (norm_weight, norm_bias, eps), weight)


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype):
    check(module.patch_merging, reference, arguments(*CASES[name], dtype), dtype)


@few_examples
@given(*[st.integers(1, largest) for largest in (3, 9, 9, 60, 100)], odd_dtypes)
def test_odd_shapes(batch, height, width, channels, reduced, dtype):
    check(module.patch_merging, reference, arguments(batch, height, width, channels, reduced, dtype), dtype)


@pytest.mark.parametrize("block_k", [16, 64, 256])
def test_blocks(block_k):
    for name in ("odd", "odd rows"):
        with blocks(BLOCK_M=16, BLOCK_N=16, BLOCK_K=block_k):
            check(module.patch_merging, reference, arguments(*CASES[name]), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_stream_in_float32(dtype):
    args = arguments(*CASES["odd"])
    check_mixed(module.patch_merging, reference, args | {"weight": args["weight"].to(dtype)}, dtype)


@each_dtype
def test_extremes(dtype):
    args = arguments(*CASES["odd"], dtype)
    args["x"][:, 0:2] = 0
    args["x"][:, 2:4] = 6e4 * args["x"][:, 2:4].sign()
    args["x"][:, 4] = 6e4
    check(module.patch_merging, reference, args, dtype)


def test_large_mean():
    """The variance must not be taken as the mean of squares less the squared mean."""
    args = arguments(*CASES["tiny"])
    args["x"] += 1000
    check(module.patch_merging, reference, args, torch.float32)


def test_runs_and_images_are_independent():
    args = arguments(3, 5, 3, 12, 20)
    assert_repeatable(module.patch_merging, args)
    assert_images_apart(module.patch_merging, args, "x")
    assert_empty_batch(module.patch_merging, args, "x")


def test_operator():
    assert_operator(module.patch_merging, arguments(2, 3, 4, 8, 16, torch.bfloat16), ["x"])


def test_errors():
    op, args = module.patch_merging, arguments(2, 3, 4, 8, 16)
    assert_refuses_tensors(op, args, "norm_weight", "norm_bias", "weight")
    x = args["x"]
    assert_refuses(op, args, r"^x must have shape \[any, any, any, any\], got \[3, 4, 8\]", x=x[0])
    assert_refuses(op, args, r"^weight must have shape \[16, 28\], got \[16, 32\]", x=x[..., :7].contiguous())
    assert_refuses(op, args, "^x must be contiguous, got strides", x=x.transpose(1, 2))
    assert_refuses(op, args, "^x must be float16, bfloat16 or float32, got torch.float64", x=x.double())


# fmt: off
MUTANTS = {
    "channel order swapped": ("tiny", module, "quarter % 2, quarter // 2", "quarter // 2, quarter % 2"),
    "rows past the map": ("odd", module, " & (top[:, None] + down[None, :] < height)", ""),
    "columns past the map": ("odd", module, " & (left[:, None] + right[None, :] < width)", ""),
    "odd rows cut off":
        ("odd", module, "(height + 1) // 2, (width", "(height + 1) // 2 * 0 + height // 2, (width"),
    "padding at the front":
        ("odd columns", module, "left = 2 * (row % merged_w)", "left = 2 * (row % merged_w) - width % 2"),
    "images mixed up":
        ("odd", module, "(row // merged_w // merged_h).to(tl.int64)", "(row // merged_w // merged_h * 0)"),
    "no norm": ("tiny", module, "(tile - mean[:, None]) * rstd[:, None] * scale[None, :] + shift[None, :]", "tile"),
    "no norm weight": ("tiny", module, " * scale[None, :]", ""),
    "no norm bias": ("tiny", module, " + shift[None, :]", ""),
    "another eps": ("tiny", module, "squares / K + eps", "squares / K + 1e-5"),
    "means of tiles apart": ("tiny", module, " + gap * gap * (start * count / (start + count))", ""),
    "mean of the last tile": ("tiny", module, "mean += gap * (count / (start + count))", "mean += gap"),
    "K tail in the variance": ("odd columns", module, "tl.where((k < K)[None, :], deviation, 0.0)", "deviation"),
    "K tail not masked": ("odd columns", module, "if 4 * C % BLOCK_K != 0:", "if False:"),
    "edges of W not masked": ("odd columns", tiles, "if WHOLE:", "if True:"),
    "rows not masked": ("odd columns", module, "inside = row < rows", "inside = row < rows + 1"),
    "columns of W not masked": ("odd columns", module, "(column < N)[None, :])", "(column < N + 1)[None, :])"),
    "quarter of another tile": ("tiny", module, "tl.min(k, axis=0) // C", "tl.max(k, axis=0) * 0"),
}
# fmt: on


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    case, *change = MUTANTS[name]
    with blocks(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32):
        assert_fails(mutant(tmp_path, module, *change).patch_merging, reference, arguments(*CASES[case]))
