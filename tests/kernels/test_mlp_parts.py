"""mlp_parts: fc2(GELU(fc1 x)), in a part for each chunk of the hidden layer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import (
    DEVICE,
    DTYPES,
    Draw,
    added_up,
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
from swinfast.kernels import mlp_parts as module
from swinfast.kernels import tiles
from swinfast.reference import ops

CASES = {  # shape of x, hidden
    "tiny": ((2, 7, 7, 96), 384),
    "one row": ((1, 128), 512),
    "no power of two": ((21, 44), 100),
    "hidden fewer than a chunk": ((5, 24), 9),
    "four channels": ((3, 4), 16),
}
SIZES = {"BLOCK_M": 16, "BLOCK_HIDDEN": 32, "BLOCK_K": 16, "BLOCK_N": 32}
whole = added_up(module.mlp_parts)


def arguments(shape, hidden, dtype=torch.float32):
    draw = Draw(dtype)
    return {"x": draw(*shape), **draw.linear(shape[-1], hidden, "fc1_"), **draw.linear(hidden, shape[-1], "fc2_")}


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype):
    check(whole, ops.mlp_parts, arguments(*CASES[name], dtype), dtype)


def test_a_part_is_what_a_chunk_adds():
    args = arguments((3, 5, 44), 100)
    with blocks(**SIZES):
        parts = run(module.mlp_parts, args)
    assert parts.shape == (3, 5, 4, 44) and parts.dtype == torch.float32
    for part in range(4):
        alone = torch.zeros_like(args["fc2_weight"])
        alone[:, 32 * part : 32 * (part + 1)] = args["fc2_weight"][:, 32 * part : 32 * (part + 1)]
        bias = args["fc2_bias"] if part == 0 else torch.zeros_like(args["fc2_bias"])
        expected = ops.mlp_parts(**cast(args | {"fc2_weight": alone, "fc2_bias": bias}, torch.float64))
        torch.testing.assert_close(parts[..., part, :].double(), expected, rtol=1e-4, atol=1e-4)


@few_examples
@given(st.integers(1, 40), st.integers(1, 100), st.integers(1, 150), odd_dtypes)
def test_odd_shapes(rows, channels, hidden, dtype):
    check(whole, ops.mlp_parts, arguments((rows, channels), hidden, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_stream_in_float32(dtype):
    args = arguments(*CASES["no power of two"])
    args |= cast({name: value for name, value in args.items() if name != "x"}, dtype)
    check_mixed(whole, ops.mlp_parts, args, dtype)


@each_dtype
def test_extremes(dtype):
    args = arguments((5, 44), 100, dtype)
    args["x"][0] = 0
    args["x"][1] = 6e3 * args["x"][1].sign()  # times ten and the hidden layer in float16 overflows in plain PyTorch too
    check(whole, ops.mlp_parts, args, dtype)


def test_runs_and_rows_are_independent():
    args = arguments((3, 5, 36), 80)
    assert_repeatable(module.mlp_parts, args)
    assert_images_apart(module.mlp_parts, args, "x")
    assert_empty_batch(module.mlp_parts, args, "x")


def test_operator():
    assert_operator(module.mlp_parts, arguments((2, 3, 20), 40, torch.bfloat16), ["x"])


def test_errors():
    op, args = module.mlp_parts, arguments((2, 3, 20), 40)
    assert_refuses_tensors(op, args, "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    x = torch.zeros(2, 20, 3, device=DEVICE).mT
    assert_refuses(op, args, "^x must be contiguous, got strides", x=x)
    assert_refuses(op, args, "^x must be float16, bfloat16 or float32, got torch.int64", x=args["x"].long())
    assert_refuses(op, args, r"^x must have shape \[2, 3, 20\], got \[2, 3, 19\]", x=args["x"][..., :19].contiguous())


# fmt: off
MUTANTS = {
    "no GELU": ("tiny", module, "gelu(hidden, EXACT_GELU)", "hidden"),
    "fast GELU in float32": ("tiny", module, "gelu(hidden, EXACT_GELU)", "gelu(hidden, False)"),
    "no bias of fc1": ("tiny", module, "unit, HIDDEN, BLOCK_M, WHOLE)", "unit, HIDDEN, BLOCK_M, WHOLE) * 0"),
    "no bias of fc2": ("tiny", tiles, "mask=(column < C) & with_bias", "mask=column < 0"),
    "a bias with each part": ("tiny", tiles, " & with_bias", ""),
    "the first channels alone": ("tiny", module, "range(0, C, BLOCK_K)", "range(0, C - BLOCK_K, BLOCK_K)"),
    "the first columns alone": ("tiny", tiles, "range(0, C, BLOCK_N)", "range(0, C - BLOCK_N, BLOCK_N)"),
    "one part over another": ("tiny", module, "row * PARTS + part", "row * PARTS + 0 * part"),
    "another chunk's rows": ("tiny", module, "unit = part * BLOCK_HIDDEN", "unit = 0 * BLOCK_HIDDEN"),
    "the first rows again":
        ("tiny", module, "tl.program_id(0) // PARTS * BLOCK_M", "tl.program_id(0) // PARTS * 0"),
    "rows not masked": ("no power of two", module, "inside = row < rows", "inside = row < rows + 1"),
    "channel tail of x": ("no power of two", module, "if C % BLOCK_K != 0:", "if False:"),
    "channel tail of the result":
        ("no power of two", tiles, "inside[:, None] & (column < C)[None, :])", "inside[:, None])"),
    "edges of weights not masked": ("no power of two", tiles, "if WHOLE:", "if True:"),
}
# fmt: on


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    case, *change = MUTANTS[name]
    with blocks(**SIZES):
        wrong = mutant(tmp_path, module, *change).mlp_parts
        assert_fails(added_up(wrong), ops.mlp_parts, arguments(*CASES[case]))
