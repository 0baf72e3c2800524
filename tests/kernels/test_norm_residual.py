"""norm_residual: residual + LN(x), with a second LayerNorm and without; LN(x) by itself."""

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
    run,
)
from swinfast.kernels import norm_residual as module
from swinfast.kernels import tiles
from swinfast.reference import ops

CASES = {  # shape of the residual, second norm, parts of x where it has some
    "tiny": ((2, 7, 7, 96), False),
    "second norm": ((3, 5, 128), True),
    "three tiles": ((5, 1536), True),
    "one row": ((1, 768), False),
    "no power of two": ((21, 44), True),
    "four channels": ((3, 4), False),
    "largest": ((2, 4096), False),
    "three parts": ((2, 7, 7, 96), True, 3),
    "parts of no power of two": ((21, 44), False, 5),
    "one part": ((2, 3, 40), True, 1),
    "many parts": ((3, 384), False, 24),
}


def arguments(shape, extra, parts=None, dtype=torch.float32):
    draw = Draw(dtype)
    x = draw(*shape[:-1], *([] if parts is None else [parts]), shape[-1], mean=0.5)
    args = {"x": x, **draw.norm(shape[-1]), "residual": draw(*shape)}
    return args | draw.extra_norm(shape[-1], extra)


def reference(x, norm_weight, norm_bias, eps, residual=None, extra_weight=None, extra_bias=None, extra_eps=0.0):
    extra_norm = None if extra_weight is None else (extra_weight, extra_bias, extra_eps)
    return ops.norm_residual(x, (norm_weight, norm_bias, eps), residual, extra_norm)


def without_residual(args):
    return args | {"residual": None}


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype):
    check(module.norm_residual, reference, arguments(*CASES[name], dtype=dtype), dtype)


@each_dtype
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case) == 2])
def test_without_a_residual(name, dtype):
    check(module.norm_residual, reference, without_residual(arguments(*CASES[name], dtype=dtype)), dtype)


@few_examples
@given(st.integers(1, 40), st.integers(1, 600), st.booleans(), st.none() | st.integers(1, 9), odd_dtypes)
def test_odd_shapes(rows, channels, extra, parts, dtype):
    check(module.norm_residual, reference, arguments((rows, channels), extra, parts, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_residual_in_float32(dtype):
    args = arguments(*CASES["second norm"])
    args["x"] = args["x"].to(dtype)
    check_mixed(module.norm_residual, reference, args, dtype)
    check_mixed(module.norm_residual, reference, without_residual(args), dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_parts_in_float32(dtype):
    args = arguments(*CASES["three parts"])
    args = cast(args, dtype, keep=["x"])
    check_mixed(module.norm_residual, reference, args, dtype)
    assert run(module.norm_residual, args).dtype == dtype


@each_dtype
@pytest.mark.filterwarnings("ignore:overflow")
def test_extremes(dtype):
    args = arguments((5, 44), True, dtype=dtype)
    args["x"][0] = 0
    args["x"][1] = 6e4 * args["x"][1].sign()
    args["x"][2] = 6e4
    args["residual"][3] = 6e4
    check(module.norm_residual, reference, args, dtype)


def test_large_mean():
    """The variance must not be taken as the mean of squares less the squared mean."""
    args = arguments((5, 96), False)
    args["x"] += 1000
    check(module.norm_residual, reference, args, torch.float32)


@pytest.mark.parametrize("parts", [None, 3])
def test_runs_and_rows_are_independent(parts):
    args = arguments((3, 5, 36), True, parts)
    assert_repeatable(module.norm_residual, args)
    for batched in ("x", "residual"):
        assert_images_apart(module.norm_residual, args, batched)
    assert_empty_batch(module.norm_residual, args, "x", "residual")


@pytest.mark.parametrize("extra, parts", [(False, None), (True, None), (True, 3)])
def test_operator(extra, parts):
    args = arguments((2, 3, 20), extra, parts, torch.bfloat16)
    assert_operator(module.norm_residual, args, ["x", "residual"])
    if parts is None:
        assert_operator(module.norm_residual, without_residual(args), ["x"])


def test_errors():
    op, args = module.norm_residual, arguments((2, 3, 20), True)
    assert_refuses_tensors(op, args, "norm_weight", "norm_bias", "residual", "extra_weight", "extra_bias")
    assert_refuses(
        op, args, r"^residual must have shape \[2, 3, 21\], got \[2, 3, 20\]", x=torch.zeros(2, 3, 21, device=DEVICE)
    )
    assert_refuses(op, args, "^x must be contiguous, got strides", x=torch.zeros(2, 20, 3, device=DEVICE).mT)
    assert_refuses(op, args, "^x must be float16, bfloat16 or float32, got torch.int64", x=args["x"].long())
    alone = without_residual(args)
    assert_refuses_tensors(op, alone, "norm_weight", "norm_bias", "extra_weight", "extra_bias")
    assert_refuses(
        op, alone, "^x must be torch.bfloat16 on .*, got torch.float32", **cast(alone, torch.bfloat16, keep=["x"])
    )
    assert_refuses(op, args, "^x must have at most 4096 channels, got 4097", x=torch.zeros(1, 4097, device=DEVICE))
    parts = arguments((2, 3, 20), True, 4)
    assert_refuses(
        op, parts, r"^residual must have shape \[2, 3, 20\], got \[2, 4, 20\]", residual=torch.zeros(2, 4, 20)
    )
    assert_refuses(op, parts, "^residual must be torch.bfloat16 on .*, got torch.float32", x=parts["x"].bfloat16())
    assert_refuses(op, parts, "^residual must be .*, got torch.float32 on meta", residual=parts["residual"].to("meta"))
    for one, other in (("extra_weight", "extra_bias"), ("extra_bias", "extra_weight")):
        assert_refuses(op, args, f"^{one} and {other} must be given together, got {one} alone", **{other: None})


# fmt: off
MUTANTS = {
    "no residual": ("tiny", module, "if RESIDUAL:", "if False:"),
    "another row's residual": ("tiny", module, "load_rows(residual + offset", "load_rows(residual + 0"),
    "residual normalised": ("tiny", module, "load_rows(x + (offset", "load_rows(residual + (offset"),
    "no second norm": ("second norm", module, "if EXTRA_NORM:", "if False:"),
    "second norm with the first's eps": ("second norm", module, "extra_bias, extra_eps, C", "extra_bias, eps, C"),
    "second norm with the first's weight":
        ("second norm", module, "acc, extra_weight, extra", "acc, norm_weight, extra"),
    "another eps": ("tiny", tiles, "squares / C + eps", "squares / C + 1e-5"),
    "eps outside of the root": ("tiny", tiles, "tl.rsqrt(squares / C + eps)", "1.0 / (tl.sqrt(squares / C) + eps)"),
    "variance of a sample": ("tiny", tiles, "squares / C", "squares / (C - 1)"),
    "no mean": ("tiny", tiles, "tiles[i] - mean[:, None]", "tiles[i]"),
    "no norm bias": ("tiny", tiles, "* w[None, :] + b[None, :]", "* w[None, :]"),
    "no norm weight": ("tiny", tiles, "rstd[:, None] * w[None, :]", "rstd[:, None]"),
    "channel tail in the variance":
        ("no power of two", tiles, "(columns < C)[None, :], deviation, 0.0", "True, deviation, 0"),
    "channel tail not masked":
        ("no power of two", tiles, "COUNT * TILE > C:\n            mask", "False:\n            mask"),
    "rows not masked": ("no power of two", module, "inside = row < rows", "inside = row < rows + 1"),
    "the first part alone": ("three parts", module, "tl.static_range(PARTS)", "tl.static_range(1)"),
    "parts of another row": ("three parts", module, "(offset * PARTS", "(offset"),
    "the first part again": ("three parts", module, "+ part * C", "+ 0 * part * C"),
    "one tile of three":
        ("three tiles", tiles, "for i in tl.static_range(1, COUNT):", "for i in tl.static_range(1, 1):"),
}
# fmt: on


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    case, *change = MUTANTS[name]
    with blocks(BLOCK_M=8):
        assert_fails(mutant(tmp_path, module, *change).norm_residual, reference, arguments(*CASES[case]))
