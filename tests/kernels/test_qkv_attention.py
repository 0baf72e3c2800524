"""qkv_attention: window_attention(x W^T + b)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import (
    DEVICE,
    DTYPES,
    WINDOWS_IN_A_TILE,
    Draw,
    assert_empty_batch,
    assert_fails,
    assert_images_apart,
    assert_operator,
    assert_refuses,
    assert_refuses_tensors,
    assert_repeatable,
    bias_of,
    cast,
    check,
    check_mixed,
    each_dtype,
    extreme_tokens,
    few_examples,
    in_rows,
    mutant,
    odd_dtypes,
    run,
    windows_and_heads,
)
from swinfast.kernels import heads, tiles, windows
from swinfast.kernels import qkv_attention as module
from swinfast.kernels.configs import Config, override
from swinfast.reference import ops

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN in the interpreter
CASES = WINDOWS_IN_A_TILE | {"tiny": (2, (14, 14), (7, 7), (3, 3), 3, 32)}
LAYOUTS = ("arranged", "rows")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def arguments(batch, size, window, shift, heads, head_dim, dtype=torch.float32, layout="rows"):
    args = Draw(dtype).attention(batch, size, window, shift, heads, head_dim, layout)
    return args | {"window_size": list(window), "shift_size": list(shift)}


def reference(x, qkv_weight, qkv_bias, logit_scale, table, window_size, shift_size):
    bias = bias_of(in_rows(table), window_size, x.dtype)
    return ops.qkv_attention(x, qkv_weight, qkv_bias, logit_scale, bias, window_size, shift_size)


@each_dtype
@each_layout
@pytest.mark.parametrize("name", CASES)
def test_cases(name, layout, dtype):
    check(module.qkv_attention, reference, arguments(*CASES[name], dtype, layout), dtype)


@each_dtype
def test_tables_of_fewer_queries_and_keys_than_slots(dtype):
    """As window_attention's are with blocks of other sizes: 36 tokens are 48 queries and keys, and 64 slots."""
    sizes = {"window_attention": {"BLOCK_M": 16, "BLOCK_N": 16}, "qkv_attention": {"BLOCK_K": 16}}
    with override(lambda kernel, shape: Config(sizes[kernel], 4, 1, "test")):
        args = arguments(1, (6, 6), (6, 6), (0, 0), 2, 16, dtype)
        assert args["table"].shape == (1, 2, 48, 48)
        check(module.qkv_attention, reference, args, dtype)


@few_examples
@given(windows_and_heads(3), odd_dtypes, st.sampled_from(LAYOUTS))
def test_odd_shapes(case, dtype, layout):
    check(module.qkv_attention, reference, arguments(*case, dtype, layout), dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_stream_in_float32(dtype):
    args = arguments(*CASES["padded"])
    args |= cast({name: value for name, value in args.items() if name.startswith("qkv")}, dtype)
    args["table"] = args["table"].half()
    assert run(module.qkv_attention, args).dtype == dtype
    check_mixed(module.qkv_attention, reference, args, dtype)


@each_dtype
def test_extremes(dtype):
    check(module.qkv_attention, reference, extreme_tokens(arguments(*CASES["padded"], dtype)), dtype)


@each_layout
def test_runs_and_images_are_independent(layout):
    args = arguments(3, (5, 6), (4, 3), (2, 1), 2, 8, layout=layout)
    assert_repeatable(module.qkv_attention, args)
    assert_images_apart(module.qkv_attention, args, "x")
    assert_empty_batch(module.qkv_attention, args, "x")


@each_layout
def test_operator(layout):
    args = arguments(2, (3, 4), (2, 3), (1, 1), 1, 8, torch.bfloat16, layout)
    assert_operator(module.qkv_attention, args, ["x"], keep=["table"])


@each_layout
def test_errors(layout):
    op, args = module.qkv_attention, arguments(2, (5, 6), (4, 3), (2, 1), 2, 8, layout=layout)
    assert_refuses_tensors(op, args, "qkv_weight", "qkv_bias")
    table = args["table"]
    source, shape = {"arranged": (r"arranged\(cpb_bias\)", "2, 1, 32, 8"), "rows": ("cpb_bias", "2, 16, 16")}[layout]
    for wrong in (table[:1], table.half(), table.mT, table.to("meta")):
        message = rf"^table must be what {source} gives: contiguous \[4, {shape}\] of"
        assert_refuses(op, args, message, table=wrong)
    x = args["x"]
    assert_refuses(op, args, r"^x must have shape \[any, any, any, any\], got \[5, 6, 16\]", x=x[0])
    assert_refuses(op, args, "^x must be contiguous, got strides", x=x.transpose(1, 2))
    assert_refuses(op, args, "^x must be float16, bfloat16 or float32, got torch.float64", x=x.double())
    assert_refuses(op, args, "^window_size must be at most 64 tokens, got", window_size=[5, 13])
    scale = torch.zeros(3, device=DEVICE)
    assert_refuses(op, args, "^logit_scale must have a number of heads that divides 16", logit_scale=scale)


# fmt: off
MUTANTS = {
    "row shift off by one": ("tiny", windows, "row += SHIFT_H % height", "row += SHIFT_H - 1"),
    "column shift off by one": ("tiny", windows, "column += SHIFT_W % width", "column += SHIFT_W + 1"),
    "no logit clamp": ("tiny", windows, "LARGEST_LOGIT_SCALE, prop", "100.0, prop"),
    "no q norm": ("tiny", windows, "reciprocal_length(q) *", "(reciprocal_length(q) * 0 + 1) *"),
    "no k norm": ("tiny", windows, "(k * reciprocal_length(k)[:, None])", "k"),
    "another head's scale": ("tiny", heads, "logit_scale + head", "logit_scale + (head + 1) % HEADS"),
    "window types swapped": ("tiny", windows, "(window_row == windows_h - 1).to(tl.int32) + 2 *",
                             "2 * (window_row == windows_h - 1).to(tl.int32) +"),
    "another head's weights": ("tiny", heads, "first = head * HEAD_DIM", "first = (HEADS - 1 - head) * HEAD_DIM"),
    "no bias of q and k":
        ("tiny", heads, "qk = in_each_row(qkv_bias, qk_rows, 3 * C, SLOTS, WHOLE)",
         "qk = tl.zeros((SLOTS, 2 * BLOCK_D), tl.float32)"),
    "no bias of v":
        ("tiny", heads, "v = in_each_row(qkv_bias, v_rows, 3 * C, SLOTS, WHOLE)",
         "v = tl.zeros((SLOTS, BLOCK_D), tl.float32)"),
    "q and k swapped": ("tiny", heads, "two // BLOCK_D * C", "(1 - two // BLOCK_D) * C"),
    "the first channels alone": ("tiny", heads, "range(0, C, BLOCK_K)", "range(0, C - BLOCK_K, BLOCK_K)"),
    "channels past the last": ("padded", heads, "if C % BLOCK_K != 0:", "if False:"),
    "padded tokens not masked": ("padded", windows, "if PADDED:", "if False:"),
    "slots past the window not masked":
        ("tiny", windows, "inside = i < WINDOW_H * WINDOW_W", "inside = i >= 0"),
    "head tail of the weights": ("padded", heads, "tl.where(two % BLOCK_D < HEAD_DIM,", "tl.where(two >= 0,"),
    "head tail of the output": ("padded", module, " & (d < HEAD_DIM)[None, :]", ""),
    "edges of W not masked": ("padded", tiles, "if WHOLE:", "if True:"),
    "sum left out": ("tiny", heads, " * share[:, None]", ""),
    "the first image again": ("tiny", heads, "(image * height", "(0 * height"),
    "images of another size": ("padded", heads, "window // windows_w % windows_h", "window // windows_w % 1"),
}
OF_A_LAYOUT = {
    "arranged": {
        "no bias": (windows, "bias.to(tl.float32)", "0 * bias.to(tl.float32)"),
        "bias of another row": (windows, "(0, 5, 1, 3, 4, 2, 6)", "(0, 6, 1, 3, 4, 2, 5)"),
        "bias of another head": (heads, "table + head * (SLOTS", "table + (head + 1) % HEADS * (SLOTS"),
    },
    "rows": {
        "no bias": (windows, "bias.to(tl.float32)", "0 * bias.to(tl.float32)"),
        "bias of another row": (heads, "row[:, None] * KEYS", "(QUERIES - 1 - row)[:, None] * KEYS"),
        "bias of another head": (heads, "table + head * (QUERIES", "table + (head + 1) % HEADS * (QUERIES"),
    },
}
# fmt: on


@each_layout
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, layout, tmp_path):
    case, *change = MUTANTS[name]
    args = arguments(*CASES[case], layout=layout)
    assert_fails(mutant(tmp_path, module, *change).qkv_attention, reference, args)


@pytest.mark.parametrize("layout, name", [(layout, name) for layout in LAYOUTS for name in OF_A_LAYOUT[layout]])
def test_mutants_of_a_layout_fail(layout, name, tmp_path):
    args = arguments(*CASES["tiny"], layout=layout)
    wrong = mutant(tmp_path, module, *OF_A_LAYOUT[layout][name])
    assert_fails(wrong.qkv_attention, reference, args)


def test_mutant_without_a_smallest_length_fails(tmp_path):
    wrong = mutant(tmp_path, module, windows, "SMALLEST_LENGTH * SMALLEST_LENGTH", "0.0")
    assert_fails(wrong.qkv_attention, reference, extreme_tokens(arguments(*CASES["padded"])))
