"""attention_block: the attention half of a block, y = x + LN(proj(window_attention(qkv(x)))).

    x and y [B, H, W, C], qkv weight [3C, C], proj weight [C, C]; table from cpb_bias

One program computes one window from end to end: q, k and v of one head at a time, its attention, and its share of the
projection's sums, so nothing but x and y touches memory. q and k are one product, get their lengths before they are
rounded, and logits are summed on top of the biases. That is for windows of at most 64 tokens and few channels; for
others linear, window_attention and linear_norm_residual.
Definition: reference.ops.attention_block. Source: as window_attention.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv, config, power_of_two, row_tiles
from .launch import arch_of, check, check_rows, check_vectors, check_weight, launch, operator, precision, precision_name
from .tiles import add_rows, add_vector, begin, dot, layer_norm, load_rows, load_transposed, store_rows, zeros
from .window_attention import check_table, reciprocal_length, softmax_scale, window_tokens

LARGEST_WINDOW = 64  # tokens


@triton.jit(do_not_specialize=["height", "width", "windows_h", "windows_w"])
def _attention_block_kernel(
    x,  # [B, H, W, C]
    qkv_weight,  # [3C, C]
    qkv_bias,  # [3C]
    logit_scale,  # [HEADS]
    table,  # [TYPES, HEADS, SLOTS, SLOTS]
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
    window = tl.program_id(0)
    window_column = window % windows_w
    window_row = (window // windows_w) % windows_h
    image = window // windows_w // windows_h
    i = tl.arange(0, SLOTS)
    token, inside = window_tokens(
        i, window_row, window_column, height, width, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W, PADDED
    )
    offset = image.to(tl.int64) * height * width * C + token.to(tl.int64) * C
    tiles = load_rows(x + offset, inside, C, TILE, COUNT)  # padded tokens are zero
    table += i[:, None] * SLOTS + i[None, :]
    if SHIFT_H > 0 or SHIFT_W > 0:
        window_type = (window_row == windows_h - 1).to(tl.int32) + 2 * (window_column == windows_w - 1).to(tl.int32)
        table += window_type * (HEADS * SLOTS * SLOTS)

    acc = zeros(SLOTS, TILE, COUNT)
    d = tl.arange(0, BLOCK_D)
    two = tl.arange(0, 2 * BLOCK_D)
    # rows of the weights for q and k of the first head, past their end where a head has no such channel
    qk_rows = tl.where(two % BLOCK_D < HEAD_DIM, two // BLOCK_D * C + two % BLOCK_D, 3 * C)
    dtype: tl.constexpr = qkv_weight.dtype.element_ty
    WHOLE: tl.constexpr = HEAD_DIM == BLOCK_D and TILE * COUNT == C
    for head in range(0, HEADS):
        first = head * HEAD_DIM
        qk = _project(tiles, qkv_weight, qkv_bias, first + qk_rows, C, TILE, COUNT, PRECISION, WHOLE)
        q, k = tl.split(tl.permute(tl.reshape(qk, (SLOTS, 2, BLOCK_D)), (0, 2, 1)))
        q *= (reciprocal_length(q) * softmax_scale(tl.load(logit_scale + head)))[:, None]
        k *= reciprocal_length(k)[:, None]
        bias = tl.load(table + head * (SLOTS * SLOTS)).to(tl.float32)
        logits = dot(q.to(dtype), tl.trans(k.to(dtype)), bias, PRECISION)
        p = tl.exp2(logits - tl.max(logits, axis=1)[:, None])
        # v comes after the softmax, where it takes the shared memory of k; channels past the head's meet zeros below
        v = _project(tiles, qkv_weight, qkv_bias, first + 2 * C + d, C, TILE, COUNT, PRECISION, WHOLE)
        attended = dot(p.to(dtype), v.to(dtype), tl.zeros((SLOTS, BLOCK_D), tl.float32), PRECISION)
        attended = (attended * (1.0 / tl.sum(p, axis=1))[:, None]).to(dtype)
        summed = ()
        for t in tl.static_range(COUNT):
            column = t * TILE + tl.arange(0, TILE)
            pointers = proj_weight + column[None, :] * C + (first + d)[:, None]
            if WHOLE:
                w = tl.load(pointers)
            else:
                w = tl.load(pointers, mask=(column < C)[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
            summed = summed + (dot(attended, w, acc[t], PRECISION),)
        acc = summed
    acc = add_vector(acc, proj_bias, C, TILE, COUNT)
    acc = layer_norm(acc, norm_weight, norm_bias, eps, C, TILE, COUNT)
    acc = add_rows(acc, load_rows(x + offset, inside, C, TILE, COUNT, True), COUNT)
    store_rows(out + offset, acc, inside, C, TILE, COUNT)


@triton.jit
def _project(
    tiles, weight, bias, n, C: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The rows n of the weights [3C, C] applied to the window, in float32; zero for rows past the last."""
    acc = tl.zeros((tiles[0].shape[0], n.shape[0]), tl.float32)
    for t in tl.static_range(COUNT):
        column = t * TILE + tl.arange(0, TILE)
        w = load_transposed(weight, n, column, 3 * C, C, WHOLE)
        acc = dot(tiles[t].to(w.dtype), w, acc, PRECISION)
    return acc + tl.load(bias + n, mask=n < 3 * C, other=0.0).to(tl.float32)[None, :]


def slots(window_size: tuple[int, int]) -> int:
    """Tokens of a window padded to whole tiles: both sides of the table (see cpb_bias) that attention_block takes."""
    return max(16, power_of_two(window_size[0] * window_size[1]))


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
        table: From cpb_bias, of the same window and shift, its padded_size twice slots(window_size).
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
    if window_size[0] * window_size[1] > LARGEST_WINDOW:
        raise ValueError(f"window_size must be at most {LARGEST_WINDOW} tokens, got {window_size}")
    if channels % heads:
        raise ValueError(f"logit_scale must have a number of heads that divides {channels} channels, got {heads}")
    check_rows("x", batch * height * width)
    check_weight("qkv_weight", qkv_weight, (3 * channels, channels), x)
    check("proj_weight", proj_weight, (channels, channels), like=qkv_weight)
    check_vectors(3 * channels, qkv_weight, qkv_bias=qkv_bias)
    check_vectors(heads, x, logit_scale=logit_scale)
    check_vectors(channels, qkv_weight, proj_bias=proj_bias)
    check_vectors(channels, x, norm_weight=norm_weight, norm_bias=norm_bias)
    size = slots(window_size)
    types = 4 if any(shift_size) else 1
    table_dtype = torch.float32 if qkv_weight.dtype == torch.float32 else torch.float16
    check_table(table, (types, heads, size, size), table_dtype, x.device)
    chosen = config(
        "attention_block",
        arch_of(x.device),
        precision_name(qkv_weight.dtype),
        channels=channels,
        tokens=size,
        stream_bytes=x.element_size(),
    )
    out = torch.empty_like(x)
    windows_h, windows_w = cdiv(height, window_size[0]), cdiv(width, window_size[1])
    launch(
        _attention_block_kernel,
        batch * windows_h * windows_w,
        *(x, qkv_weight, qkv_bias, logit_scale, table, proj_weight, proj_bias, norm_weight, norm_bias, out),
        *(height, width, windows_h, windows_w, eps),
        HEADS=heads,
        HEAD_DIM=channels // heads,
        WINDOW_H=window_size[0],
        WINDOW_W=window_size[1],
        SHIFT_H=shift_size[0],
        SHIFT_W=shift_size[1],
        PADDED=bool(height % window_size[0] or width % window_size[1]),
        SLOTS=size,
        BLOCK_D=max(16, power_of_two(channels // heads)),
        PRECISION=precision(qkv_weight.dtype),
        config=chosen,
        **chosen.blocks | row_tiles(chosen, channels),
    )
    return out
