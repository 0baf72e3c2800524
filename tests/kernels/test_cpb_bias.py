"""cpb_bias: the table of position biases and masks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import (
    DTYPES,
    Draw,
    assert_fails,
    assert_operator,
    assert_refuses,
    assert_refuses_tensors,
    assert_repeatable,
    check,
    each_dtype,
    few_examples,
    mutant,
    odd_dtypes,
    run,
    table_of,
)
from swinfast.kernels import cpb_bias as module
from swinfast.reference import ops

CASES = {  # window, shift, padding of queries and keys, heads, hidden units; the span, in the bounded form
    "no shift": ((7, 7), (0, 0), (64, 64), 2, 384),
    "shift": ((7, 7), (3, 3), (64, 64), 2, 16),
    "rows shifted": ((4, 5), (2, 0), (32, 20), 3, 65),
    "columns shifted": ((2, 3), (0, 1), (6, 16), 2, 7),
    "not square": ((3, 6), (0, 0), (18, 32), 1, 16),
    "one token": ((1, 1), (0, 0), (16, 16), 2, 3),
    "12x12": ((12, 12), (6, 6), (192, 144), 1, 16),
    "bounded": ((8, 8), (4, 4), (64, 64), 2, 512, (8, 8)),
    "bounded by another window": ((6, 4), (0, 0), (32, 32), 3, 16, (3, 5)),
    "bounded, one token": ((1, 3), (0, 1), (16, 16), 2, 5, (1, 3)),
}


def arguments(window, shift, padded, heads, hidden, span=None, dtype=torch.float32):
    draw = Draw(dtype)
    sizes = {"window_size": list(window), "shift_size": list(shift), "padded_size": list(padded)}
    sizes |= {"dtype": None, "span": None if span is None else list(span)}
    return {**draw.linear(2, hidden, "fc1_"), **draw.linear(hidden, heads, "fc2_"), **sizes}


def reference(fc1_weight, fc1_bias, fc2_weight, fc2_bias, window_size, shift_size, padded_size, dtype=None, span=None):
    bias = ops.cpb_bias(fc1_weight, fc1_bias, fc2_weight, fc2_bias, window_size, shift_size, span)
    exact = bias.dtype == torch.float64  # the oracle: not rounded to the table's dtype
    table = table_of(bias.double(), shift_size, padded_size, torch.float32)
    return table if exact else table.to(bias.dtype)


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype):
    table = check(module.cpb_bias, reference, arguments(*CASES[name], dtype=dtype), dtype)
    assert table.dtype == (torch.float32 if dtype == torch.float32 else torch.float16)


@st.composite
def cases(draw):
    window = draw(st.tuples(*[st.integers(1, 9)] * 2))
    shift = tuple(draw(st.integers(0, extent - 1)) for extent in window)
    padded = tuple(math.prod(window) + draw(st.integers(0, 40)) for _ in range(2))
    span = draw(st.none() | st.tuples(*[st.integers(1, 9)] * 2))
    return window, shift, padded, draw(st.integers(1, 4)), draw(st.integers(1, 80)), span


@few_examples
@given(cases(), odd_dtypes)
def test_odd_shapes(case, dtype):
    check(module.cpb_bias, reference, arguments(*case, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_for_attention_in_another_dtype(dtype):
    args = arguments(*CASES["no shift"])
    got, expected = run(module.cpb_bias, args | {"dtype": dtype}), run(module.cpb_bias, args)
    assert torch.equal(got, expected.half())


def test_extremes():
    """A bias past float16 is a large one, not infinite: two would make NaN. NaN stays."""
    args = arguments((2, 2), (1, 1), (4, 4), 3, 8, dtype=torch.float16)
    for head, value in enumerate((6e4, -6e4, math.nan)):
        args["fc2_bias"][head] = value
    table = run(module.cpb_bias, args)
    assert table[0, 0].min() > 5e4
    assert table[0, 1].max() < -5e4
    assert table[:, :2].isfinite().all()
    assert table[:, 2].isnan().all()


def test_a_large_bias_in_float32():
    """No number of float32 is cut to what float16 can hold."""
    args = arguments(*CASES["shift"])
    args["fc2_bias"][0] = 3e5
    check(module.cpb_bias, reference, args, torch.float32)


def test_nan_in_a_hidden_unit():
    """It reaches every bias, as through PyTorch's ReLU: on a GPU a maximum drops it unless told otherwise."""
    args = arguments(*CASES["shift"])
    args["fc1_bias"][5] = math.nan
    assert run(module.cpb_bias, args).isnan()[..., :49, :49].all()


def test_runs_are_the_same():
    assert_repeatable(module.cpb_bias, arguments(*CASES["shift"]))


def test_operator():
    for name in ("columns shifted", "bounded, one token"):
        assert_operator(module.cpb_bias, arguments(*CASES[name], dtype=torch.bfloat16), [])


def test_errors():
    op, args = module.cpb_bias, arguments(*CASES["rows shifted"])
    assert_refuses_tensors(op, args, "fc1_bias", "fc2_weight", "fc2_bias")
    weight = args["fc1_weight"]
    assert_refuses(op, args, r"^fc1_weight must have shape \[65, 2\], got \[65, 1\]", fc1_weight=weight[:, :1])
    assert_refuses(op, args, "^fc1_weight must be contiguous, got", fc1_weight=weight.mT.contiguous().mT)
    assert_refuses(op, args, "^fc1_weight must be float16, bfloat16 or float32, got", fc1_weight=weight.double())
    for shift in ([4, 0], [0, 5], [-1, 0]):
        assert_refuses(op, args, "^shift_size must be at least 0 and less than the window", shift_size=shift)
    for padded in ([19, 32], [32, 19]):
        assert_refuses(op, args, "^padded_size must be at least 20 tokens, got", padded_size=padded)
    assert_refuses(op, args, r"^span must be at least 1 by 1 tokens, got \[0, 4\]", span=[0, 4])


# fmt: off
MUTANTS = {
    "no mask": ("shift", "tl.where(masked, MASK_VALUE, 0.0)", "0.0"),
    "another mask": ("shift", "constexpr(-100.0)", "constexpr(-99.9)"),
    "no bias": ("no shift", "bias = (bias +", "bias = (0 * bias +"),
    "bias transposed": ("no shift", "i_row - j_row + WINDOW_H", "j_row - i_row + WINDOW_H",
                        "i_column - j_column + WINDOW_W", "j_column - i_column + WINDOW_W"),
    "rows and columns swapped": ("no shift", "fc1_weight + 2 * unit,", "fc1_weight + 2 * unit + 1,",
        "w_column = tl.load(fc1_weight + 2 * unit + 1,", "w_column = tl.load(fc1_weight + 2 * unit,"),
    "no log2(e)": ("no shift", "0.0)) * LOG2_E", "0.0))"),
    "mask off by one row": ("shift", "i_row >= WINDOW_H - SHIFT_H", "i_row > WINDOW_H - SHIFT_H"),
    "mask off by one column": ("shift", "j_column >= WINDOW_W - SHIFT_W", "j_column > WINDOW_W - SHIFT_W"),
    "window types swapped": ("rows shifted", "window_type % 2 == 1", "window_type // 2 == 1",
                             "across_columns & (window_type // 2 == 1)", "across_columns & (window_type % 2 == 1)"),
    "no sign": ("no shift", "tl.where(offset < 0, -distance, distance)", "distance"),
    "linear spacing": ("no shift", "tl.log(1.0 + distance)", "distance"),
    "natural log where bounded": ("bounded", "tl.log2(1.0", "tl.log(1.0"),
    "to the base 2 where bounded": ("bounded", " / 3.0", " / 1.0"),
    "not scaled": ("bounded", " * LARGEST_OFFSET", ""),
    "scaled by the window's size": ("bounded", "span - 1, 1", "span, 1"),
    "spans swapped": ("bounded by another window", "(WINDOW_H - 1), span_h", "(WINDOW_H - 1), span_w",
                      "(WINDOW_W - 1), span_w", "(WINDOW_W - 1), span_h"),
    "spans of the window": ("bounded by another window", "*(span or (0, 0))", "window_h, window_w"),
    "no sigmoid": ("bounded", "acc = LARGEST_BIAS / (1.0 + tl.exp(-acc))", "acc = acc"),
    "another largest bias": ("bounded", "constexpr(16.0)", "constexpr(15.9)"),
    "sigmoid in the plain form": ("no shift", "if BOUNDED:\n        acc", "if True:\n        acc"),
    "log2 spacing": ("no shift", "tl.log(1.0", "tl.log2(1.0"),
    "no ReLU": ("no shift", "tl.maximum(hidden, 0.0", "tl.maximum(hidden, -1000.0"),
    "no hidden bias": ("no shift", " + b[None, :]", ""),
    "no bias of heads": ("no shift", "acc += tl.load(fc2_bias", "_ = tl.load(fc2_bias"),
    "first block of hidden units alone": ("no shift", "range(0, HIDDEN, BLOCK", "range(0, BLOCK_HIDDEN, BLOCK"),
    "hidden tail not masked": ("rows shifted", "inside = unit < HIDDEN", "inside = unit >= 0"),
    "padded keys weigh": ("no shift", "bias = tl.where(j < TOKENS, bias, float(\"-inf\"))", ""),
    "keys past the table stored": ("rows shifted", "(i < QUERIES) & (j < KEYS)", "(i < QUERIES) & (j >= 0)"),
    "queries past the table stored": ("12x12", "(i < QUERIES) & (j < KEYS)", "(i >= 0) & (j < KEYS + 1)"),
    "offsets past the end stored": ("no shift", "mask=offset < OFFSETS", "mask=offset >= 0"),
}
# fmt: on


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    case, *snippets = MUTANTS[name]
    assert_fails(mutant(tmp_path, module, module, *snippets).cpb_bias, reference, arguments(*CASES[case]))


@pytest.mark.filterwarnings("ignore:overflow")
def test_mutant_without_the_clamp_is_infinite(tmp_path):
    wrong = mutant(tmp_path, module, module, "bias = tl.minimum(tl.maximum(", "_ = tl.minimum(tl.maximum(")
    args = arguments((2, 2), (1, 1), (4, 4), 1, 8, dtype=torch.float16)
    args["fc2_bias"].fill_(-6e4)
    assert run(wrong.cpb_bias, args).isinf().any()
