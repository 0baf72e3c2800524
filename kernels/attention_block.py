"""attention_block: the attention half of a block, y = x + LN(proj(window_attention(qkv(x)))).

    x and y [B, H, W, C], qkv weight [3C, C], proj weight [C, C]; table from cpb_bias

One program computes one window from end to end: q, k and v of one head at a time, its attention, and its share of the
projection's sums, so nothing but x and y touches memory. q and k are one product, get their lengths before they are
rounded, and logits are summed on top of the biases. That is for windows of at most 64 tokens and few channels; for
others linear, window_attention and linear_norm_residual. Where the tables say so, attention_warpgroups computes it.
Definition: reference.ops.attention_block. Source: as window_attention.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_warpgroups import PER_UNIT, attention_kernel, fits
from .configs import at_most, config, row_tiles
from .launch import (
    arch_of,
    check,
    check_rows,
    check_vectors,
    check_weight,
    launch,
    operator,
    persistent,
    precision,
    precision_name,
)
from .tiles import add_rows, begin, dot, layer_norm, load_rows, load_transposed, store_rows, vector_rows
from .warpgroups import has_warpgroups
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


@triton.jit(do_not_specialize=["height", "width", "windows_h", "windows_w"])
def _attention_block_kernel(
    x,  # [B, H, W, C]
    qkv_weight,  # [3C, C]
    qkv_bias,  # [3C]
    logit_scale,  # [HEADS]
    table,  # [TYPES, HEADS, SLOTS // 16, 2 SLOTS, 8]
    proj_weight,  # [C, C]
    proj_bias,  # [C]
    norm_weight,  # [C]
    norm_bias,  # [C]
    out,  # [B, H, W, C]
    height,
    width,
    windows_h,
    windows_w,
    eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
    PADDED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAPPED: tl.constexpr = False,
):
    begin(OVERLAPPED)
    C: tl.constexpr = HEADS * HEAD_DIM
    place = tl.program_id(0) % (windows_h * windows_w)
    window_column = place % windows_w
    window_row = place // windows_w
    image = tl.program_id(0) // (windows_h * windows_w)
    i = tl.arange(0, SLOTS)
    token, inside = window_tokens(
        i, window_row, window_column, height, width, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W, PADDED
    )
    offset = token.to(tl.int64) * C
    first = image * height.to(tl.int64) * width * C
    x += first
    out += first
    if SHIFT_H > 0 or SHIFT_W > 0:
        table += window_type(window_row, window_column, windows_h, windows_w) * (HEADS * SLOTS * SLOTS)

    d = tl.arange(0, BLOCK_D)
    two = tl.arange(0, 2 * BLOCK_D)
    # the first head's rows of the weights: of q and k, and of v; past their end where a head has no such channel
    qk_rows = tl.where(two % BLOCK_D < HEAD_DIM, two // BLOCK_D * C + two % BLOCK_D, 3 * C)
    v_rows = tl.where(d < HEAD_DIM, 2 * C + d, 3 * C)
    tiles = load_rows(x + offset, inside, C, TILE, COUNT)  # padded tokens are zero
    acc = vector_rows(proj_bias, SLOTS, C, TILE, COUNT)
    for head in range(0, HEADS):
        acc = _add_head(
            acc, tiles, head, qk_rows, v_rows, qkv_weight, qkv_bias, logit_scale, table, proj_weight,
            HEADS, HEAD_DIM, TILE, COUNT, PRECISION,
        )  # fmt: skip
    acc = layer_norm(acc, norm_weight, norm_bias, eps, C, TILE, COUNT)
    acc = add_rows(acc, load_rows(x + offset, inside, C, TILE, COUNT, True), COUNT)
    store_rows(out + offset, acc, inside, C, TILE, COUNT)


@triton.jit
def _add_head(
    acc, tiles, head, qk_rows, v_rows, qkv_weight, qkv_bias, logit_scale, table, proj_weight,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc with one head's share of the projection's sums."""
    C: tl.constexpr = HEADS * HEAD_DIM
    SLOTS: tl.constexpr = acc[0].shape[0]
    BLOCK_D: tl.constexpr = v_rows.shape[0]
    dtype: tl.constexpr = qkv_weight.dtype.element_ty
    n = head * HEAD_DIM + qk_rows
    if HEAD_DIM == BLOCK_D:  # whole runs of channels, which the compiler doesn't see
        qk_bias = tl.load(qkv_bias + tl.max_contiguous(tl.multiple_of(n, BLOCK_D), BLOCK_D)).to(tl.float32)
    else:
        qk_bias = tl.load(qkv_bias + n, mask=n < 3 * C, other=0.0).to(tl.float32)
    qk = tl.broadcast_to(qk_bias[None, :], (SLOTS, 2 * BLOCK_D))
    weights = _qkv_weights(qkv_weight, n, C, TILE, COUNT, HEAD_DIM == BLOCK_D)
    for t in tl.static_range(COUNT):
        qk = dot(tiles[t].to(dtype), weights[t], qk, PRECISION)
    q, k = unit_q_and_k(qk, tl.load(logit_scale + head), dtype)
    p, share = softmax(q, k, arranged_bias(table + head * (SLOTS * SLOTS), SLOTS), dtype, PRECISION)
    # v comes after the softmax, where it takes the shared memory of k; channels past the head's meet zeros below
    v = tl.zeros((SLOTS, BLOCK_D), tl.float32)
    n = head * HEAD_DIM + v_rows
    weights = _qkv_weights(qkv_weight, n, C, TILE, COUNT, HEAD_DIM == BLOCK_D)
    for t in tl.static_range(COUNT):
        v = dot(tiles[t].to(dtype), weights[t], v, PRECISION)
    v_bias = tl.load(qkv_bias + n, mask=n < 3 * C, other=0.0)
    attended = dot(p, v.to(dtype), tl.zeros((SLOTS, BLOCK_D), tl.float32), PRECISION)
    # what the keys count for sums up to one, so the bias of each v is that of the sum
    attended = attended * share[:, None] + v_bias.to(tl.float32)[None, :]
    attended = attended.to(dtype)
    k = head * HEAD_DIM + tl.arange(0, BLOCK_D)  # past the head's channels, where it attends to zeros
    weights = ()
    for t in tl.static_range(COUNT):
        column = t * TILE + tl.arange(0, TILE)
        weights = weights + (load_transposed(proj_weight, column, k, C, C, HEAD_DIM == BLOCK_D and TILE * COUNT == C),)
    summed = ()
    for t in tl.static_range(COUNT):
        summed = summed + (dot(attended, weights[t], acc[t], PRECISION),)
    return summed


@triton.jit
def _qkv_weights(weight, n, C: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr):
    """The rows n of the weights [3C, C] for q, k and v, transposed; WHOLE: there are all of them."""
    tiles = ()
    for t in tl.static_range(COUNT):
        column = t * TILE + tl.arange(0, TILE)
        tiles = tiles + (load_transposed(weight, n, column, 3 * C, C, WHOLE and TILE * COUNT == C),)
    return tiles


@operator
def attention_block(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    logit_scale: Tensor,
    table: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    window_size: list[int],
    shift_size: list[int],
) -> Tensor:
    """x + LN(proj(window_attention(qkv(x)))).

    Args:
        x: [B, H, W, C], float16, bfloat16 or float32, contiguous.
        qkv_weight, qkv_bias: [3C, C], [3C], of the dtype of x, or 16-bit where x is float32.
        logit_scale: [heads], a logarithm.
        table: From cpb_bias, of the same window and shift, its padded_size twice slots(window_size), and arranged().
        proj_weight, proj_bias: [C, C], [C], of the dtype of qkv_weight.
        norm_weight, norm_bias, eps: LayerNorm over C.
        window_size, shift_size: (rows, columns) in tokens, at most 64 in a window.

    Returns:
        [B, H, W, C] in the dtype of x.

    Raises:
        ValueError: A tensor of another shape, dtype or device, or not contiguous; more than 64 tokens in a window.
    """
    check("x", x, (None,) * 4)
    batch, height, width, channels = x.shape
    heads = logit_scale.shape[0]
    check_window(window_size, channels, heads)
    check_rows("x", batch * height * width)
    check_weight("qkv_weight", qkv_weight, (3 * channels, channels), x)
    check("proj_weight", proj_weight, (channels, channels), like=qkv_weight)
    check_vectors(3 * channels, qkv_weight, qkv_bias=qkv_bias)
    check_vectors(heads, x, logit_scale=logit_scale)
    check_vectors(channels, qkv_weight, proj_bias=proj_bias)
    check_vectors(channels, x, norm_weight=norm_weight, norm_bias=norm_bias)
    size = slots(window_size)
    check_table(table, heads, in_threads(size), shift_size, qkv_weight.dtype, x.device)
    chosen = config(
        "attention_block",
        arch_of(x.device),
        precision_name(qkv_weight.dtype),
        channels=channels,
        tokens=size,
        stream_bytes=x.element_size(),
        rows=at_most(batch * height * width),
        held=int(fits(channels, heads, size) and has_warpgroups(x.device, x, qkv_weight)),
    )
    out = torch.empty_like(x)
    (windows_h, windows_w), constants = grid_and_constants(x, heads, channels // heads, window_size, shift_size)
    windows = batch * windows_h * windows_w
    arguments = (
        *(x, qkv_weight, qkv_bias, logit_scale, table, proj_weight, proj_bias, norm_weight, norm_bias, out),
        *(height, width, windows_h, windows_w),
    )
    if chosen.blocks.get("use") == "warpgroups":
        for name in ("HEAD_DIM", "BLOCK_D"):
            del constants[name]
        programs = persistent(windows, x.device, PER_UNIT)
        launch(attention_kernel, programs, *arguments, batch, eps, config=chosen, **constants | chosen.sizes)
        return out
    launch(
        _attention_block_kernel,
        windows,
        *arguments,
        eps,
        SLOTS=size,
        PRECISION=precision(qkv_weight.dtype),
        config=chosen,
        **constants | chosen.blocks | row_tiles(chosen, channels),
    )
    return out
