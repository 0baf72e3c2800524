"""Attention a head of a window at a time, from the tokens themselves: what qkv_attention and attention_parts share."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .configs import at_most
from .launch import check, check_rows, check_vectors, check_weight, precision
from .tiles import dot, hash_now, in_each_row, load_transposed
from .window_attention import padded_size
from .windows import (
    arranged_bias,
    check_table,
    check_window,
    grid_and_constants,
    in_threads,
    slots,
    softmax,
    unit_q_and_k,
    window_tokens,
    window_type,
)


@triton.jit
def head_of_window(
    x,  # [B, H, W, C]
    qkv_weight,  # [3C, C]
    qkv_bias,  # [3C]
    logit_scale,  # [HEADS]
    table,  # [TYPES, HEADS, QUERIES, KEYS], or ARRANGED [TYPES, HEADS, SLOTS // 16, 2 SLOTS, 8]
    height,
    width,
    windows_h,
    windows_w,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
    PADDED: tl.constexpr,
    SLOTS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    ARRANGED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """This program's head of this program's window: (what it attends to [SLOTS, BLOCK_D] in float32, where the slots'
    rows of channels begin in x, which slots are tokens of the map, the head)."""
    C: tl.constexpr = HEADS * HEAD_DIM
    dtype: tl.constexpr = qkv_weight.dtype.element_ty
    head = tl.program_id(0) % HEADS
    window = tl.program_id(0) // HEADS
    image = window // (windows_h * windows_w)
    window_column = window % windows_w
    window_row = window // windows_w % windows_h
    i = tl.arange(0, SLOTS)
    token, inside = window_tokens(
        i, window_row, window_column, height, width, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W, PADDED
    )
    offset = (image * height.to(tl.int64) * width + token) * C
    if SHIFT_H > 0 or SHIFT_W > 0:
        table += window_type(window_row, window_column, windows_h, windows_w) * (HEADS * QUERIES * KEYS)

    d = tl.arange(0, BLOCK_D)
    two = tl.arange(0, 2 * BLOCK_D)
    # the head's rows of the weights; past their end where a head has no such channel
    first = head * HEAD_DIM
    qk_rows = tl.where(two % BLOCK_D < HEAD_DIM, first + two // BLOCK_D * C + two % BLOCK_D, 3 * C)
    v_rows = tl.where(d < HEAD_DIM, first + 2 * C + d, 3 * C)
    WHOLE: tl.constexpr = HEAD_DIM == BLOCK_D
    if WHOLE:  # in runs, which the compiler doesn't see
        qk_rows = tl.max_contiguous(tl.multiple_of(qk_rows, BLOCK_D), BLOCK_D)
        v_rows = tl.max_contiguous(tl.multiple_of(v_rows, BLOCK_D), BLOCK_D)
    qk = in_each_row(qkv_bias, qk_rows, 3 * C, SLOTS, WHOLE)
    v = in_each_row(qkv_bias, v_rows, 3 * C, SLOTS, WHOLE)
    for start in range(0, C, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = inside[:, None]
        if C % BLOCK_K != 0:
            mask = mask & (k < C)[None, :]
        tile = tl.load(x + offset[:, None] + k[None, :], mask=mask, other=0.0).to(dtype)  # padded tokens are zero
        qk_weight = load_transposed(qkv_weight, qk_rows, k, 3 * C, C, WHOLE and C % BLOCK_K == 0)
        v_weight = load_transposed(qkv_weight, v_rows, k, 3 * C, C, WHOLE and C % BLOCK_K == 0)
        qk = dot(tile, qk_weight, qk, PRECISION)
        v = dot(tile, v_weight, v, PRECISION)

    q, k = unit_q_and_k(qk, tl.load(logit_scale + head), dtype)
    if ARRANGED:
        bias = arranged_bias(table + head * (SLOTS * SLOTS), SLOTS)
    else:
        row, column = tl.minimum(i, QUERIES - 1), tl.arange(0, SLOTS)
        places = table + head * (QUERIES * KEYS) + row[:, None] * KEYS + column[None, :]
        if KEYS < SLOTS:
            bias = tl.load(places, mask=(column < KEYS)[None, :], other=float("-inf"))
        else:
            bias = tl.load(places)
    p, share = softmax(q, k, bias, dtype, PRECISION)
    attended = dot(p, v.to(dtype), tl.zeros((SLOTS, BLOCK_D), tl.float32), PRECISION) * share[:, None]
    return attended, offset, inside, head


def prepared(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    logit_scale: Tensor,
    table: Tensor,
    window_size: list[int],
    shift_size: list[int],
) -> tuple[int, tuple[int, ...], dict[str, Any], dict[str, int]]:
    """What a launch is made of, its arguments checked, which are those of qkv_attention.

    Returns:
        (programs, (height, width, windows_h, windows_w), constants, the sizes that configurations are looked up by).
    """
    check("x", x, (None,) * 4)
    batch, height, width, channels = x.shape
    heads = logit_scale.shape[0]
    check_window(window_size, channels, heads)
    rows = batch * height * width
    check_rows("x", rows)
    check_weight("qkv_weight", qkv_weight, (3 * channels, channels), x)
    check_vectors(3 * channels, qkv_weight, qkv_bias=qkv_bias)
    check_vectors(heads, x, logit_scale=logit_scale)
    size, arranged = slots(window_size), table.dim() == 5
    if arranged:
        queries = keys = size
    else:
        queries, keys = padded_size(x.device, qkv_weight.dtype, tuple(window_size), channels // heads)
    layout = in_threads(size) if arranged else (queries, keys)
    check_table(table, heads, layout, shift_size, qkv_weight.dtype, x.device)
    (windows_h, windows_w), constants = grid_and_constants(x, heads, channels // heads, window_size, shift_size)
    constants |= {
        "SLOTS": size,
        "QUERIES": queries,
        "KEYS": keys,
        "ARRANGED": arranged,
        "PRECISION": precision(qkv_weight.dtype),
    }
    sizes = {
        "channels": channels,
        "tokens": size,
        "block_d": constants["BLOCK_D"],
        "stream_bytes": x.element_size(),
        "rows": at_most(rows),
    }
    return batch * windows_h * windows_w * heads, (height, width, windows_h, windows_w), constants, sizes


hash_now(globals())
