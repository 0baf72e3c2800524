"""attention_block: x + LN(proj(window_attention(qkv(x))))."""

import pytest
import torch
from hypothesis import given
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
    windows_and_heads,
)
from swinfast.kernels import attention_block as module
from swinfast.kernels import tiles, windows
from swinfast.reference import ops

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN in the interpreter
CASES = WINDOWS_IN_A_TILE


def arguments(batch, size, window, shift, heads, head_dim, dtype=torch.float32):
    draw, channels = Draw(dtype), heads * head_dim
    args = draw.attention(batch, size, window, shift, heads, head_dim)
    return {
        **args,
        **draw.linear(channels, channels, "proj_"),
        **draw.norm(channels),
        "window_size": list(window),
        "shift_size": list(shift),
    }


def reference(x, qkv_weight, qkv_bias, logit_scale, table, proj_weight, proj_bias, norm_weight, norm_bias, eps,
              window_size, shift_size):  # fmt: skip
    return ops.attention_block(
        x, qkv_weight, qkv_bias, logit_scale, bias_of(in_rows(table), window_size, x.dtype), proj_weight, proj_bias,
        (norm_weight, norm_bias, eps), window_size, shift_size,
    )  # fmt: skip


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype):
    check(module.attention_block, reference, arguments(*CASES[name], dtype), dtype)


def test_arranged():
    """Number i of thread 4 r + q, in part c of rows 16 p and on, is of a row r or r + 8 and 16 columns from 16 c on."""
    table = torch.arange(2 * 64 * 64).view(1, 2, 64, 64)
    arranged = windows.arranged(table)
    assert arranged.shape == (1, 2, 4, 128, 8) and arranged.is_contiguous()
    assert torch.equal(in_rows(arranged), table)
    head, c, p, r, q = 1, 3, 2, 5, 1
    row, column = 16 * p + r, 16 * c + 2 * q
    expected = [(row + down, column + right) for right in (0, 8) for down in (0, 8)]
    expected = [table[0, head, i, j + pair] for i, j in expected for pair in (0, 1)]
    assert arranged[0, head, c, 32 * p + 4 * r + q].tolist() == expected


@few_examples
@given(windows_and_heads(3), odd_dtypes)
def test_odd_shapes(case, dtype):
    check(module.attention_block, reference, arguments(*case, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_stream_in_float32(dtype):
    args = arguments(*CASES["padded"])
    args |= cast({name: value for name, value in args.items() if name.startswith(("qkv", "proj"))}, dtype)
    check_mixed(module.attention_block, reference, args | {"table": args["table"].half()}, dtype)


@each_dtype
def test_extremes(dtype):
    check(module.attention_block, reference, extreme_tokens(arguments(*CASES["padded"], dtype)), dtype)


def test_runs_and_images_are_independent():
    args = arguments(3, (5, 6), (4, 3), (2, 1), 2, 8)
    assert_repeatable(module.attention_block, args)
    assert_images_apart(module.attention_block, args, "x")
    assert_empty_batch(module.attention_block, args, "x")


def test_operator():
    args = arguments(2, (3, 4), (2, 3), (1, 1), 1, 8, torch.bfloat16)
    assert_operator(module.attention_block, args, ["x"], keep=["table"])


def test_errors():
    op, args = module.attention_block, arguments(2, (5, 6), (4, 3), (2, 1), 2, 8)
    names = ("qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "norm_weight", "norm_bias")
    assert_refuses_tensors(op, args, *names)
    table = args["table"]
    for wrong in (table[:1], table.half(), table.mT, table.to("meta"), in_rows(table)):
        message = r"^table must be what arranged\(cpb_bias\) gives: contiguous \[4, 2, 1, 32, 8\] of"
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
    "no bias": ("tiny", windows, "bias.to(tl.float32)", "0 * bias.to(tl.float32)"),
    "bias transposed":
        ("tiny", windows, "tl.reshape(bias, (SLOTS, SLOTS))", "tl.trans(tl.reshape(bias, (SLOTS, SLOTS)))"),
    "bias of another row": ("tiny", windows, "(0, 5, 1, 3, 4, 2, 6)", "(0, 6, 1, 3, 4, 2, 5)"),
    "bias of another head": ("tiny", module, "table + head *", "table + (head + 1) % HEADS *"),
    "row shift off by one": ("tiny", windows, "row += SHIFT_H % height", "row += SHIFT_H - 1"),
    "column shift off by one": ("tiny", windows, "column += SHIFT_W % width", "column += SHIFT_W + 1"),
    "no logit clamp": ("tiny", windows, "LARGEST_LOGIT_SCALE, prop", "100.0, prop"),
    "no q norm": ("tiny", windows, "reciprocal_length(q) *", "(reciprocal_length(q) * 0 + 1) *"),
    "no k norm": ("tiny", windows, "(k * reciprocal_length(k)[:, None])", "k"),
    "no log2(e)": ("tiny", windows, "tl.exp2(scale * LOG2_E) * LOG2_E", "tl.exp2(scale * LOG2_E)"),
    "window types swapped": ("tiny", windows, "(window_row == windows_h - 1).to(tl.int32) + 2 *",
                             "2 * (window_row == windows_h - 1).to(tl.int32) +"),
    "no bias of q and k": ("tiny", module, "tl.broadcast_to(qk_bias", "tl.broadcast_to(0 * qk_bias"),
    "no bias of v": ("tiny", module, "v_bias.to(tl.float32)", "0 * v_bias.to(tl.float32)"),
    "bias of v not that of the sum": ("tiny", module, " + v_bias.to(tl.float32)", " + 49 * v_bias.to(tl.float32)"),
    "padded keys left out":
        ("padded", module, "arranged_bias(table + head * (SLOTS * SLOTS), SLOTS)",
         "tl.where(tl.max(tl.abs(tiles[0]), axis=1)[None, :] > 0, "
         "arranged_bias(table + head * (SLOTS * SLOTS), SLOTS), float('-inf'))"),
    "slots past the window not masked":
        ("tiny", windows, "inside = i < WINDOW_H * WINDOW_W", "inside = i >= 0"),
    "padded tokens not masked": ("padded", windows, "if PADDED:", "if False:"),
    "head tail of q and k": ("padded", module, "tl.where(two % BLOCK_D < HEAD_DIM,", "tl.where(two >= 0,"),
    "q and k swapped": ("tiny", module, "two // BLOCK_D * C", "(1 - two // BLOCK_D) * C"),
    "edges of W not masked": ("padded", tiles, "if WHOLE:", "if True:"),
    "no projection bias": ("tiny", module, "acc = vector_rows(proj_bias", "acc = vector_rows(norm_bias"),
    "no norm": ("tiny", module, "acc = layer_norm", "_ = layer_norm"),
    "another eps": ("tiny", tiles, "squares / C + eps", "squares / C + 1e-5"),
    "residual left out": ("tiny", module, "acc = add_rows", "_ = add_rows"),
    "one head of three": ("tiny", module, "range(0, HEADS)", "range(0, 1)"),
}
# fmt: on


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    case, *change = MUTANTS[name]
    assert_fails(mutant(tmp_path, module, *change).attention_block, reference, arguments(*CASES[case]))


def test_mutant_without_a_smallest_length_fails(tmp_path):
    wrong = mutant(tmp_path, module, windows, "SMALLEST_LENGTH * SMALLEST_LENGTH", "0.0")
    assert_fails(wrong.attention_block, reference, extreme_tokens(arguments(*CASES["padded"])))
