"""cpb_bias: the table that attention adds to its logits, from the log-spaced continuous position bias.

    table[t, h, i, j] = log2(e) * (MLP(sign(d) log(1 + |d|))[h] + mask[t, i, j])

with d the offset from token j to token i of a window, MLP linear, ReLU, linear, and t the type of the window:
interior, last row, last column, both (one type alone where nothing is shifted). The factor makes the softmax one of
powers of two. Rows and columns beyond the window's tokens pad it to whole tiles: -inf for keys, which then weigh
nothing.

In the bounded form the bias is 16 sigmoid(MLP), d is scaled so that it goes from -8 to 8 in a window of the size SPAN,
and the logarithm is one to the base 8.

The MLP runs once for each of the (2 Wh - 1)(2 Ww - 1) distinct offsets, in float32; the table is float16 for 16-bit
weights, which rounds less than bfloat16. Once per weights. Definition: reference.ops.cpb_bias.
Source: arXiv:2111.09883, section 3.3, and timm's WindowMultiHeadAttention and WindowAttention (the bounded form).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, cdiv, power_of_two
from .launch import check, check_vectors, launch, operator

LOG2_E = 1.4426950408889634
MASK_VALUE = tl.constexpr(-100.0)
LARGEST_OFFSET = tl.constexpr(8.0)  # in the bounded form
LARGEST_BIAS = tl.constexpr(16.0)
ALL = tl.constexpr(tl.PropagateNan.ALL)
BLOCK = 64
HERE = Config({}, num_warps=4, num_stages=1, source="once per weights: speed does not matter")


@triton.jit(do_not_specialize=["span_h", "span_w"])
def _offsets_kernel(
    fc1_weight,  # [HIDDEN, 2]
    fc1_bias,  # [HIDDEN]
    fc2_weight,  # [HEADS, HIDDEN]
    fc2_bias,  # [HEADS]
    out,  # [HEADS, (2 Wh - 1) (2 Ww - 1)], float32
    span_h,
    span_w,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    BOUNDED: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    OFFSETS: tl.constexpr = (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    BLOCKS: tl.constexpr = (OFFSETS + BLOCK - 1) // BLOCK
    head = tl.program_id(0) // BLOCKS
    offset = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    # timm keeps the coordinates in the dtype of the model: rounded before they are used
    dtype = fc1_weight.dtype.element_ty
    row = _log_spaced(offset // (2 * WINDOW_W - 1) - (WINDOW_H - 1), span_h, BOUNDED).to(dtype).to(tl.float32)
    column = _log_spaced(offset % (2 * WINDOW_W - 1) - (WINDOW_W - 1), span_w, BOUNDED).to(dtype).to(tl.float32)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        unit = start + tl.arange(0, BLOCK_HIDDEN)
        inside = unit < HIDDEN
        w_row = tl.load(fc1_weight + 2 * unit, mask=inside, other=0.0).to(tl.float32)
        w_column = tl.load(fc1_weight + 2 * unit + 1, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(fc1_bias + unit, mask=inside, other=0.0).to(tl.float32)
        hidden = row[:, None] * w_row[None, :] + column[:, None] * w_column[None, :] + b[None, :]
        hidden = tl.maximum(hidden, 0.0, propagate_nan=ALL)
        w = tl.load(fc2_weight + head * HIDDEN + unit, mask=inside, other=0.0).to(tl.float32)
        acc += tl.sum(hidden * w[None, :], axis=1)
    acc += tl.load(fc2_bias + head).to(tl.float32)
    if BOUNDED:
        acc = LARGEST_BIAS / (1.0 + tl.exp(-acc))
    tl.store(out + head * OFFSETS + offset, acc, mask=offset < OFFSETS)


@triton.jit
def _log_spaced(offset, span, BOUNDED: tl.constexpr):
    """sign(d) log(1 + |d|), in the bounded form of scaled offsets and to the base 8."""
    distance = tl.abs(offset).to(tl.float32)
    if BOUNDED:
        distance = tl.log2(1.0 + distance / tl.maximum(span - 1, 1) * LARGEST_OFFSET) / 3.0
    else:
        distance = tl.log(1.0 + distance)
    return tl.where(offset < 0, -distance, distance)


@triton.jit(do_not_specialize=["heads"])
def _table_kernel(
    by_offset,  # [HEADS, (2 Wh - 1) (2 Ww - 1)], float32
    out,  # [TYPES, HEADS, QUERIES, KEYS]
    heads,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    LOG2_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    BLOCKS_M: tl.constexpr = (QUERIES + BLOCK_M - 1) // BLOCK_M
    BLOCKS_N: tl.constexpr = (KEYS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    j = ((program % BLOCKS_N) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    i = ((program // BLOCKS_N) % BLOCKS_M * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    head = (program // BLOCKS_N // BLOCKS_M) % heads
    window_type = program // BLOCKS_N // BLOCKS_M // heads
    i_row, i_column = i // WINDOW_W, i % WINDOW_W
    j_row, j_column = j // WINDOW_W, j % WINDOW_W
    offset = (i_row - j_row + WINDOW_H - 1) * (2 * WINDOW_W - 1) + i_column - j_column + WINDOW_W - 1
    OFFSETS: tl.constexpr = (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    bias = tl.load(by_offset + head * OFFSETS + offset, mask=(i < TOKENS) & (j < TOKENS), other=0.0)
    # the last row and column of windows hold tokens from both ends of the map, which must not see each other
    across_rows = (i_row >= WINDOW_H - SHIFT_H) != (j_row >= WINDOW_H - SHIFT_H)
    across_columns = (i_column >= WINDOW_W - SHIFT_W) != (j_column >= WINDOW_W - SHIFT_W)
    masked = (across_rows & (window_type % 2 == 1)) | (across_columns & (window_type // 2 == 1))
    bias = (bias + tl.where(masked, MASK_VALUE, 0.0)) * LOG2_E
    if out.dtype.element_ty == tl.float16:
        bias = tl.minimum(tl.maximum(bias, -60000.0, propagate_nan=ALL), 60000.0, propagate_nan=ALL)
    bias = tl.where(i < TOKENS, bias, 0.0)
    bias = tl.where(j < TOKENS, bias, float("-inf"))
    row = (window_type * heads + head) * QUERIES + i
    tl.store(out + row.to(tl.int64) * KEYS + j, bias.to(out.dtype.element_ty), mask=(i < QUERIES) & (j < KEYS))


@operator
def cpb_bias(
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    window_size: list[int],
    shift_size: list[int],
    padded_size: list[int],
    dtype: torch.dtype | None = None,
    span: list[int] | None = None,
) -> Tensor:
    """The bias table of (shifted) window attention.

    Args:
        fc1_weight, fc1_bias: [hidden, 2], [hidden], float16, bfloat16 or float32.
        fc2_weight, fc2_bias: [heads, hidden], [heads].
        window_size, shift_size: (rows, columns) in tokens.
        padded_size: (queries, keys) of the table, each at least the tokens of a window.
        dtype: That attention computes in, by default that of the weights.
        span: The window (rows, columns) in which offsets go from -8 to 8, for the bounded form; None for the plain one.

    Returns:
        [types, heads, queries, keys], float32 for attention in float32 and float16 for 16-bit dtypes; 4 types where
        there is a shift, 1 where there is none. In units of log2(e), -inf for keys beyond the window's tokens.

    Raises:
        ValueError: A tensor of another shape, dtype or device, or not contiguous; a size that makes no sense.
    """
    hidden, heads = fc1_weight.shape[0], fc2_weight.shape[0]
    check("fc1_weight", fc1_weight, (hidden, 2))
    check("fc2_weight", fc2_weight, (heads, hidden), like=fc1_weight)
    check_vectors(hidden, fc1_weight, fc1_bias=fc1_bias)
    check_vectors(heads, fc1_weight, fc2_bias=fc2_bias)
    (window_h, window_w), (shift_h, shift_w), (queries, keys) = window_size, shift_size, padded_size
    if not (0 <= shift_h < window_h and 0 <= shift_w < window_w):
        raise ValueError(f"shift_size must be at least 0 and less than the window {window_size}, got {shift_size}")
    if min(queries, keys) < window_h * window_w:
        raise ValueError(f"padded_size must be at least {window_h * window_w} tokens, got {padded_size}")
    if span is not None and min(span) < 1:
        raise ValueError(f"span must be at least 1 by 1 tokens, got {span}")
    offsets = (2 * window_h - 1) * (2 * window_w - 1)
    device = fc1_weight.device
    by_offset = torch.empty((heads, offsets), dtype=torch.float32, device=device)
    launch(
        _offsets_kernel,
        heads * cdiv(offsets, BLOCK),
        *(fc1_weight, fc1_bias, fc2_weight, fc2_bias, by_offset, *(span or (0, 0))),
        WINDOW_H=window_h,
        WINDOW_W=window_w,
        BOUNDED=span is not None,
        HIDDEN=hidden,
        BLOCK=BLOCK,
        BLOCK_HIDDEN=64,
        config=HERE,
    )
    types = 4 if shift_h or shift_w else 1
    table_dtype = torch.float32 if (dtype or fc1_weight.dtype) == torch.float32 else torch.float16
    out = torch.empty((types, heads, queries, keys), dtype=table_dtype, device=device)
    block_m, block_n = (min(64, power_of_two(size)) for size in (queries, keys))
    launch(
        _table_kernel,
        types * heads * cdiv(queries, block_m) * cdiv(keys, block_n),
        *(by_offset, out, heads),
        WINDOW_H=window_h,
        WINDOW_W=window_w,
        SHIFT_H=shift_h,
        SHIFT_W=shift_w,
        QUERIES=queries,
        KEYS=keys,
        LOG2_E=LOG2_E,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        config=HERE,
    )
    return out
