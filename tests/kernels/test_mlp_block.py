"""mlp_block: x + LN(fc2(GELU(fc1 x))), with a second LayerNorm and without."""

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
from swinfast.kernels import mlp_block as module
from swinfast.kernels import tiles
from swinfast.reference import ops

CASES = {  # shape of x, hidden, second norm
    "tiny": ((2, 7, 5, 96), 384, False),
    "second norm": ((35, 128), 512, True),
    "tails": ((3, 5, 44), 110, True),
    "wide": ((2, 352), 36, False),
    "one": ((1, 2), 1, False),
    "one chunk": ((33, 32), 16, True),
}


def arguments(shape, hidden, extra, dtype=torch.float32):
    draw, channels = Draw(dtype), shape[-1]
    args = {"x": draw(*shape), **draw.linear(channels, hidden, "fc1_"), **draw.linear(hidden, channels, "fc2_")}
    return args | draw.norm(channels) | draw.extra_norm(channels, extra)


def reference(
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, eps,
    extra_weight=None, extra_bias=None, extra_eps=0.0,
):  # fmt: skip
    extra_norm = None if extra_weight is None else (extra_weight, extra_bias, extra_eps)
    norm = (norm_weight, norm_bias, eps)
    return ops.mlp_block(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm, extra_norm)


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype):
    check(module.mlp_block, reference, arguments(*CASES[name], dtype), dtype)


@few_examples
@given(st.integers(1, 150), st.integers(2, 100), st.integers(1, 100), st.booleans(), odd_dtypes)
def test_odd_shapes(rows, channels, hidden, extra, dtype):
    check(module.mlp_block, reference, arguments((rows, channels), hidden, extra, dtype), dtype)


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_ahead(name, dtype):
    """Many chunks, with a part of one and without, and fewer than fc1 would be ahead."""
    with blocks(BLOCK_M=32, BLOCK_HIDDEN=16, AHEAD=2):
        check(module.mlp_block, reference, arguments(*CASES[name], dtype), dtype)


@pytest.mark.parametrize("ahead", [{}, {"AHEAD": 2}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_stream_in_float32(dtype, ahead):
    args = arguments(*CASES["tails"])
    args |= cast({name: value for name, value in args.items() if name.startswith("fc")}, dtype)
    with blocks(BLOCK_M=32, BLOCK_HIDDEN=32, **ahead):
        check_mixed(module.mlp_block, reference, args, dtype)


@each_dtype
@pytest.mark.filterwarnings("ignore:overflow")
def test_extremes(dtype):
    args = arguments((4, 44), 40, True, dtype)
    args["x"][0] = 0
    args["x"][1] = 6e4 * args["x"][1].sign() * 2e-3  # larger hidden values overflow plain float16
    check(module.mlp_block, reference, args, dtype)


def test_runs_and_rows_are_independent():
    args = arguments((3, 5, 36), 40, True)
    assert_repeatable(module.mlp_block, args)
    assert_images_apart(module.mlp_block, args, "x")
    assert_empty_batch(module.mlp_block, args, "x")


@pytest.mark.parametrize("extra", [False, True])
def test_operator(extra):
    assert_operator(module.mlp_block, arguments((2, 3, 20), 24, extra, torch.bfloat16), ["x"])


def test_errors():
    op, args = module.mlp_block, arguments((2, 3, 20), 24, True)
    assert_refuses_tensors(op, args, *[name for name in args if name.endswith(("weight", "bias"))])
    x = torch.zeros(2, 3, 21, device=DEVICE)
    assert_refuses(op, args, r"^x must have shape \[2, 3, 20\], got \[2, 3, 21\]", x=x)
    assert_refuses(op, args, "^x must be contiguous, got strides", x=x[..., 1:])
    assert_refuses(op, args, "^extra_bias and extra_weight must be given together", extra_weight=None)


# fmt: off
MUTANTS = {
    "residual left out": ("tiny", module, "acc = add_rows", "_ = add_rows"),
    "no hidden bias": ("tiny", module, "added if BIAS_FIRST else tl.zeros_like(added)", "tl.zeros_like(added)"),
    "no bias": ("tiny", tiles, "tiles + (in_each_row(", "tiles + (0 * in_each_row("),
    "no norm": ("tiny", module, "acc = layer_norm(acc, norm", "_ = layer_norm(acc, norm"),
    "no second norm": ("second norm", module, "if EXTRA_NORM:", "if False:"),
    "second norm with the first's eps": ("second norm", module, "extra_bias, extra_eps, C", "extra_bias, eps, C"),
    "another eps": ("tiny", tiles, "squares / C + eps", "squares / C + 1e-5"),
    "no GELU": ("tiny", module, "gelu(hidden, EXACT_GELU)", "hidden"),
    "fast GELU in float32": ("tiny", module, "gelu(hidden, EXACT_GELU)", "gelu(hidden, False)"),
    "tanh GELU": ("tiny", module, "gelu(hidden, EXACT_GELU)",
                  "hidden * tl.sigmoid(1.5957691216 * (hidden + 0.044715 * hidden * hidden * hidden))"),
    "edges of W not masked": ("tails", tiles, "if WHOLE:\n        tile", "if True:\n        tile"),
    "edges of vectors not masked": ("tails", tiles, "vector + column, mask=column < C, other=0.0", "vector + column"),
    "rows not masked": ("tails", module, "first + row < rows", "first + row < rows + 1"),
    "one chunk of hidden units":
        ("tiny", module, "range(0, END, BLOCK_HIDDEN)", "range(0, BLOCK_HIDDEN, BLOCK_HIDDEN)"),
}
MUTANTS_AHEAD = {
    "no hidden bias": ("tiny", "return hidden if BIAS_FIRST else hidden + added", "return hidden"),
    "hidden bias twice": ("tiny", "BIAS_FIRST else hidden", "not BIAS_FIRST else hidden"),
    "weights of the chunk between": ("tiny", "start - 2 * BLOCK_HIDDEN", "start - BLOCK_HIDDEN"),
    "first chunk of fc1 again": ("tiny", "fc1_bias, BLOCK_HIDDEN, C", "fc1_bias, 0, C"),
    "a chunk never gets its GELU": ("tiny", "hidden = following", "_ = following"),
    "last weights for the chunk before": ("tiny", "END - 2 * BLOCK_HIDDEN", "END - BLOCK_HIDDEN"),
    "first weights for the last chunk": ("tiny", "fc2_weight, END - BLOCK_HIDDEN", "fc2_weight, 0"),
    "chunk past the last one not masked": ("one chunk", "HIDDEN == END", "HIDDEN == COVER * BLOCK_HIDDEN"),
}
# fmt: on


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    case, *change = MUTANTS[name]
    with blocks(BLOCK_M=32, BLOCK_HIDDEN=16):
        assert_fails(mutant(tmp_path, module, *change).mlp_block, reference, arguments(*CASES[case]))


@pytest.mark.parametrize("name", MUTANTS_AHEAD)
def test_mutants_ahead_fail(name, tmp_path):
    case, *change = MUTANTS_AHEAD[name]
    with blocks(BLOCK_M=32, BLOCK_HIDDEN=16, AHEAD=2):
        assert_fails(mutant(tmp_path, module, module, *change).mlp_block, reference, arguments(*CASES[case]))
