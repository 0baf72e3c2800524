"""What the kernels of attention in windows share: where windows lie, cosine attention in a tile, and tables of biases.

A window of at most LARGEST_TILE tokens is one tile: it has as many slots as the next power of two.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv, power_of_two
from .tiles import dot, hash_now, quotient

LARGEST_TILE = 64  # tokens
ENOUGH_PROGRAMS = 1024  # several for every multiprocessor of a large GPU
SMALLEST_LENGTH = tl.constexpr(1e-12)  # of q and k, as in torch.nn.functional.normalize
LARGEST_LOGIT_SCALE = tl.constexpr(4.605170185988092)  # log(100)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def window_tokens(
    i,
    window_row,
    window_column,
    height,
    width,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Where slot i of a window lies in the map: (token in raster order, whether it is in the map and the window)."""
    row = window_row * WINDOW_H + i // WINDOW_W
    column = window_column * WINDOW_W + i % WINDOW_W
    inside = i < WINDOW_H * WINDOW_W
    if PADDED:
        inside = inside & (row < height) & (column < width)
    if SHIFT_H > 0:
        row += SHIFT_H % height  # a map can be smaller than the shift
        row = tl.where(row >= height, row - height, row)
    if SHIFT_W > 0:
        column += SHIFT_W % width
        column = tl.where(column >= width, column - width, column)
    return row * width + column, inside


@triton.jit
def window_type(window_row, window_column, windows_h, windows_w):
    """Which of a table's types a window of a shifted map is of: + 1 in the last row, + 2 in the last column."""
    return (window_row == windows_h - 1).to(tl.int32) + 2 * (window_column == windows_w - 1).to(tl.int32)


@triton.jit
def reciprocal_length(x):
    """1 / |x| of each row, in float32."""
    x = x.to(tl.float32)
    return tl.rsqrt(tl.maximum(tl.sum(x * x, axis=1), SMALLEST_LENGTH * SMALLEST_LENGTH))


@triton.jit
def softmax_scale(logit_scale):
    """The factor of the cosines, in units of log2(e)."""
    # NaN must pass: a plain minimum would replace it
    scale = tl.minimum(logit_scale.to(tl.float32), LARGEST_LOGIT_SCALE, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(scale * LOG2_E) * LOG2_E


@triton.jit
def unit_q_and_k(qk, logit_scale, dtype: tl.constexpr):
    """q and k [slots, d] of unit length, q times what scales the cosines, of a product [slots, 2 d] in float32."""
    SLOTS: tl.constexpr = qk.shape[0]
    q, k = tl.split(tl.permute(tl.reshape(qk, (SLOTS, 2, qk.shape[1] // 2)), (0, 2, 1)))
    q = (q * (reciprocal_length(q) * softmax_scale(logit_scale))[:, None]).to(dtype)
    k = (k * reciprocal_length(k)[:, None]).to(dtype)
    return q, k


@triton.jit
def arranged_bias(table, SLOTS: tl.constexpr):
    """The biases [slots, slots] of one head, of a table that is arranged()."""
    thread, part, number = tl.arange(0, 2 * SLOTS), tl.arange(0, SLOTS // 16), tl.arange(0, 8)
    bias = tl.load(table + ((part[None, :, None] * (2 * SLOTS) + thread[:, None, None]) * 8 + number[None, None, :]))
    bias = tl.permute(tl.reshape(bias, (SLOTS // 16, 8, 4, SLOTS // 16, 2, 2, 2)), (0, 5, 1, 3, 4, 2, 6))
    return tl.reshape(bias, (SLOTS, SLOTS))


@triton.jit
def softmax(q, k, bias, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """2^(q k^T + bias), each row over its largest, in dtype, and one over the sum of each row in float32."""
    logits = dot(q, tl.trans(k), bias.to(tl.float32), PRECISION)
    p = tl.exp2(logits - tl.max(logits, axis=1)[:, None])
    return p.to(dtype), quotient(1.0, tl.sum(p, axis=1))


def arranged(table: Tensor) -> Tensor:
    """A table of cpb_bias in the order of threads, for attention_block: [TYPES, HEADS, SLOTS // 16, 2 SLOTS, 8].

    Of a product of 16 rows, the eight numbers that a thread of an NVIDIA GPU has in 16 columns lie side by side: in two
    rows that are eight apart, two neighbours in each eight columns.
    """
    types, heads, size, _ = table.shape
    parts = size // 16
    table = table.view(types, heads, parts, 2, 8, parts, 2, 4, 2)  # rows: 16, half, 8; columns: 16, half, 4, pair
    return table.permute(0, 1, 5, 2, 4, 7, 6, 3, 8).reshape(types, heads, *in_threads(size))


def in_threads(size: int) -> tuple[int, int, int]:
    """What a head has of an arranged() table of so many slots."""
    return size // 16, 2 * size, 8


def slots(window_size: tuple[int, int]) -> int:
    """Tokens of a window padded to whole tiles: both sides of a table (see cpb_bias) that is arranged()."""
    return max(16, power_of_two(window_size[0] * window_size[1]))


def check_window(window_size: list[int], channels: int, heads: int) -> None:
    """Refuse windows that are too large for one tile, and channels that are no whole heads."""
    if window_size[0] * window_size[1] > LARGEST_TILE:
        raise ValueError(f"window_size must be at most {LARGEST_TILE} tokens, got {window_size}")
    if channels % heads:
        raise ValueError(f"logit_scale must have a number of heads that divides {channels} channels, got {heads}")


def images_at_once(largest: int, batch: int, programs: int) -> int:
    """How many images a program goes through: a power of two, at most largest, that leaves enough programs."""
    images = 1
    if not (isinstance(batch, int) and isinstance(programs, int)):  # symbols, while a model is traced for any size
        return images
    while 2 * images <= largest and batch * programs >= 2 * images * ENOUGH_PROGRAMS:
        images *= 2
    return images


def grid_and_constants(
    x: Tensor, heads: int, head_dim: int, window_size: list[int], shift_size: list[int]
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Rows and columns of windows in a map x [B, H, W, …], and what kernels are compiled for of windows and heads."""
    height, width = x.shape[1:3]
    return (cdiv(height, window_size[0]), cdiv(width, window_size[1])), {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "WINDOW_H": window_size[0],
        "WINDOW_W": window_size[1],
        "SHIFT_H": shift_size[0],
        "SHIFT_W": shift_size[1],
        "PADDED": bool(height % window_size[0] or width % window_size[1]),
        "BLOCK_D": max(16, power_of_two(head_dim)),
    }


def check_table(
    table: Tensor, heads: int, layout: tuple[int, ...], shift_size: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse a table of biases that was not made for this use.

    Args:
        layout: What a head has of it: (queries, keys), or in_threads of an arranged() one.
        dtype: Of the products.
    """
    shape = (4 if any(shift_size) else 1, heads, *layout)
    table_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    if not (
        tuple(table.shape) == shape and table.dtype == table_dtype and table.device == device and table.is_contiguous()
    ):
        source = "cpb_bias" if len(layout) == 2 else "arranged(cpb_bias)"
        raise ValueError(
            f"table must be what {source} gives: contiguous {list(shape)} of {table_dtype} on {device}, "
            f"got {list(table.shape)} of {table.dtype} on {table.device}"
        )


hash_now(globals())
