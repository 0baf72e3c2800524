"""window_attention: scaled cosine attention inside (shifted) windows of a map."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given
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
    bias_of,
    blocks,
    check,
    each_dtype,
    few_examples,
    mutant,
    odd_dtypes,
    table_of,
    windows_and_heads,
)
from swinfast.kernels import window_attention as module
from swinfast.kernels import windows
from swinfast.reference import ops

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN in the interpreter
CASES = {  # batch, size of the map, window, shift, heads, channels of a head
    "no shift": (2, (14, 14), (7, 7), (0, 0), 2, 32),
    "all window types": (1, (14, 14), (7, 7), (3, 3), 2, 32),
    "rows shifted": (1, (12, 10), (4, 5), (2, 0), 2, 16),
    "columns shifted": (1, (8, 9), (4, 3), (0, 1), 3, 8),
    "padded": (2, (10, 9), (7, 7), (3, 3), 2, 44),
    "padded, no shift": (1, (5, 9), (4, 4), (0, 0), 2, 16),
    "8x8": (1, (16, 16), (8, 8), (4, 4), 1, 64),
    "12x12": (1, (24, 12), (12, 12), (6, 0), 1, 32),
    "16x16": (1, (16, 16), (16, 16), (8, 8), 1, 16),
    "24x24": (1, (20, 24), (24, 24), (12, 0), 1, 8),
    "one token": (1, (3, 2), (1, 1), (0, 0), 1, 8),
    "map smaller than the shift": (1, (2, 9), (7, 4), (5, 2), 2, 8),
}


def arguments(batch, size, window, shift, heads, head_dim, dtype=torch.float32):
    draw, channels = Draw(dtype), heads * head_dim
    scale = draw(heads, mean=math.log(10), std=0.5)
    scale[1:] = 8  # far above the clamp
    bias = draw.position_bias(window, shift, heads)
    padded = module.padded_size(DEVICE, dtype, window, head_dim)
    return {
        "qkv": draw(batch, *size, 3 * channels),
        "qkv_bias": draw(3 * channels),
        "logit_scale": scale,
        "table": table_of(bias, shift, padded, dtype),
        "window_size": list(window),
        "shift_size": list(shift),
    }


def reference(qkv, qkv_bias, logit_scale, table, window_size, shift_size):
    bias = bias_of(table, window_size, qkv.dtype)
    return ops.window_attention(qkv, qkv_bias, logit_scale.to(qkv.dtype), bias, window_size, shift_size)


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype):
    check(module.window_attention, reference, arguments(*CASES[name], dtype), dtype)


@pytest.mark.parametrize("block_m, block_n", [(16, 64), (64, 16), (32, 128), (128, 32)])
def test_blocks(block_m, block_n):
    with blocks(BLOCK_M=block_m, BLOCK_N=block_n):
        for name in ("12x12", "padded"):
            check(module.window_attention, reference, arguments(*CASES[name]), torch.float32)


@few_examples
@given(windows_and_heads(2), odd_dtypes)
def test_odd_shapes(case, dtype):
    check(module.window_attention, reference, arguments(*case, dtype), dtype)


def extremes(dtype):
    args = arguments(*CASES["padded"], dtype)
    args["qkv"][:, 0] = 0
    args["qkv"][:, 1] = 6e4 * args["qkv"][:, 1].sign()
    return args


@each_dtype
def test_extremes(dtype):
    args = extremes(dtype)
    check(module.window_attention, reference, args, dtype)
    args["logit_scale"][0] = math.nan
    check(module.window_attention, reference, args, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_logit_scale_in_float32(dtype):
    args = arguments(*CASES["rows shifted"], dtype)
    check(module.window_attention, reference, args | {"logit_scale": args["logit_scale"].float()}, dtype)


def several_images(dtype=torch.float32):
    return arguments(5, (5, 6), (4, 3), (2, 1), 2, 8, dtype)


@each_dtype
@pytest.mark.parametrize("images", [2, 4, 8])
def test_several_images_in_a_program(images, dtype):
    """The last program has fewer of them; blocks of keys within each."""
    with mock.patch.object(windows, "ENOUGH_PROGRAMS", 1):
        for sizes in ({"BLOCK_M": 16, "BLOCK_N": 16}, {"BLOCK_M": 32, "BLOCK_N": 32}):
            with blocks(**sizes, IMAGES=images):
                check(module.window_attention, reference, several_images(dtype), dtype)


def test_images_in_a_program():
    """As many as leave enough programs."""
    most = windows.ENOUGH_PROGRAMS
    assert [windows.images_at_once(8, 256, programs) for programs in (1, most // 128, most // 64, most)] == [1, 2, 4, 8]
    assert windows.images_at_once(8, 1, most) == 1
    assert windows.images_at_once(1, 256, most) == 1


def test_runs_and_images_are_independent():
    args = arguments(3, (5, 6), (4, 3), (2, 1), 2, 8)
    assert_repeatable(module.window_attention, args)
    assert_images_apart(module.window_attention, args, "qkv")
    assert_empty_batch(module.window_attention, args, "qkv")


def test_operator():
    args = arguments(2, (3, 4), (2, 3), (1, 1), 1, 8, torch.bfloat16)
    assert_operator(module.window_attention, args, ["qkv"], keep=["table"])


def test_errors():
    op, args = module.window_attention, arguments(2, (5, 6), (4, 3), (2, 1), 2, 8)
    assert_refuses_tensors(op, args, "qkv_bias")
    for wrong in (args["table"][:1], args["table"].half(), args["table"].mT, args["table"].to("meta")):
        assert_refuses(op, args, r"^table must be what cpb_bias gives: contiguous \[4, 2, 16, 16\] of", table=wrong)
    assert_refuses(op, args, r"^table must be what cpb_bias gives: contiguous \[1, 2, 16, 16\] of", shift_size=[0, 0])
    qkv = args["qkv"]
    assert_refuses(op, args, r"^qkv must have shape \[2, 5, 6, 48\], got \[2, 5, 6, 49\]", qkv=_one_more(qkv))
    assert_refuses(op, args, r"^qkv must have shape \[any, any, any, any\], got \[5, 6, 48\]", qkv=qkv[0])
    assert_refuses(op, args, "^qkv must be contiguous, got strides", qkv=qkv.transpose(1, 2))
    assert_refuses(op, args, "^qkv must be float16, bfloat16 or float32, got torch.float64", qkv=qkv.double())
    for window, heads in (([24, 25], 2), ([4, 3], 1)):
        big = {"window_size": window, "logit_scale": args["logit_scale"][:heads]}
        wide = {"qkv": torch.zeros(1, 5, 6, 3 * 66, device=DEVICE), "qkv_bias": torch.zeros(3 * 66, device=DEVICE)}
        assert_refuses(op, args, "^windows must have at most 576 tokens and heads 64 channels", **big, **wide)


def _one_more(x):
    return torch.cat([x, x[..., :1]], dim=-1)


# fmt: off
MUTANTS = {
    "no bias": ("no shift", module, "return logits + bias.to(tl.float32), v", "return logits, v"),
    "bias transposed": ("8x8", module, "(head * QUERIES + i)[:, None] * KEYS", "head * QUERIES * KEYS + i[:, None]",
                        "table + j[None, :]", "table + j[None, :] * 64"),
    "bias of another head": ("no shift", module, "table += (head * QUERIES + i)", "table += (head // 2 * QUERIES + i)"),
    "row shift off by one": ("all window types", windows, "row += SHIFT_H % height", "row += SHIFT_H - 1"),
    "column shift off by one": ("columns shifted", windows, "column += SHIFT_W % width", "column += SHIFT_W + 1"),
    "no shift of rows": ("rows shifted", windows, "if SHIFT_H > 0:", "if False:"),
    "shift not reduced to the map": ("map smaller than the shift", windows, "SHIFT_H % height", "SHIFT_H"),
    "roll after the padding": ("padded", windows, "row >= height, row - height", "row >= 14, row - 14"),
    "no logit clamp": ("no shift", windows, "LARGEST_LOGIT_SCALE, prop", "100.0, prop"),
    "no q norm": ("no shift", module, "reciprocal_length(q) *", "(reciprocal_length(q) * 0 + 1) *"),
    "no k norm": ("no shift", module, " * reciprocal_length(k)[None, :]", ""),
    "no logit scale": ("no shift", module, "softmax_scale(tl.load(logit_scale + head))", "1.442695"),
    "no log2(e)": ("no shift", windows, "tl.exp2(scale * LOG2_E) * LOG2_E", "tl.exp2(scale * LOG2_E)"),
    "window types swapped": ("all window types", windows,
        "(window_row == windows_h - 1).to(tl.int32) + 2 *", "2 * (window_row == windows_h - 1).to(tl.int32) +"),
    "type of the first column": ("all window types", windows, "window_column == windows_w - 1", "window_column == 0"),
    "padded tokens zero": ("padded", module, "fill[None, :], x)", "0 * fill[None, :], x)"),
    "padded tokens of another head": ("padded", module, "qkv_bias += head * HEAD_DIM", "qkv_bias += 0"),
    "padded keys left out":
        ("padded", module, "return logits + bias.to(tl.float32), v",
         "return tl.where(inside[None, :], logits + bias, float('-inf')), v"),
    "slots past the window not masked": ("no shift", windows, "inside = i < WINDOW_H * WINDOW_W", "inside = i >= 0"),
    "head tail not masked": ("padded", module, "if HEAD_DIM < BLOCK_D:", "if False:"),
    "head tail stored":
        ("columns shifted", module, "there[:, None] & (d < HEAD_DIM)[None, :]", "there[:, None] & (d >= 0)"),
    "last block of keys left out": ("no shift", module, "if WHOLE > 0 and TAIL > 0:", "if False:"),
    "middle blocks of keys left out": ("12x12", module, "range(FIRST, WHOLE, BLOCK_N)", "range(WHOLE, WHOLE, BLOCK_N)"),
    "sums not rescaled": ("12x12", module, "acc * shrink[:, None]", "acc"),
    "totals not rescaled": ("12x12", module, "total * shrink", "total"),
    "k and v swapped": ("no shift", module, "qkv + 2 * C + offset, qkv_bias + 2 * C", "qkv + C + offset, qkv_bias + C"),
}
OF_SEVERAL_IMAGES = {
    "images past the batch": ("first + image < images", "first + image < images + 1"),
    "the first image again": ("        qkv += pixels * (3 * C)\n", ""),
    "another image's place": ("        out += pixels * C\n", "        out += pixels * (C + 1)\n"),
    "images skipped": ("(windows_h * windows_w)) * IMAGES", "(windows_h * windows_w)) * (IMAGES + 1)"),
    "the last images left out": ("cdiv(batch, images) * programs", "batch // images * programs"),
}
# fmt: on


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    case, *change = MUTANTS[name]
    wrong = mutant(tmp_path, module, *change)
    with blocks(BLOCK_M=32, BLOCK_N=32):
        assert_fails(wrong.window_attention, reference, arguments(*CASES[case]))


@pytest.mark.parametrize("name", OF_SEVERAL_IMAGES)
def test_mutants_of_several_images_fail(name, tmp_path):
    wrong = mutant(tmp_path, module, module, *OF_SEVERAL_IMAGES[name])
    with mock.patch.object(windows, "ENOUGH_PROGRAMS", 1), blocks(BLOCK_M=32, BLOCK_N=32, IMAGES=2):
        assert_fails(wrong.window_attention, reference, several_images())


def test_mutant_without_a_smallest_length_fails(tmp_path):
    wrong = mutant(tmp_path, module, windows, "SMALLEST_LENGTH * SMALLEST_LENGTH", "0.0")
    assert_fails(wrong.window_attention, reference, extremes(torch.float32))
