"""window_attention: scaled cosine attention inside (shifted) windows of a map.

    y = softmax(s cos(q, k) + bias + mask) v    with s = exp(min(logit_scale, log 100)), per window and head

    qkv [B, H, W, 3C], q, k and v one after the other, each (heads, C / heads); table from cpb_bias; y [B, H, W, C]

The shift, the partition into windows, the padding to whole windows and their inverses are index arithmetic: the map is
rolled by the shift first and padded after. A padded token is zero before the qkv projection, so its q, k and v are the
projection's bias and it is an ordinary key. The products of q and k are of the raw values; their lengths divide the
logits, in float32. More tokens than fit one block of keys go through the softmax block by block.
Definition: reference.ops.window_attention. Source: arXiv:2111.09883, section 3.2, and timm's WindowMultiHeadAttention.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, cdiv, config, power_of_two
from .launch import arch_of, check, check_rows, check_weight, launch, operator, precision_name, precision_of_few
from .tiles import begin, dot
from .windows import (
    check_table,
    grid_and_constants,
    images_at_once,
    reciprocal_length,
    softmax_scale,
    window_tokens,
    window_type,
)

LARGEST_HEAD_DIM = 64
LARGEST_WINDOW = 576  # tokens


@triton.jit
def _load_head(rows, bias, inside, token, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PADDED: tl.constexpr):
    """One head's q, k or v [slots, BLOCK_D]; padded tokens get the projection's bias, slots past the window zero."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (d < HEAD_DIM)[None, :]
    x = tl.load(rows[:, None] + d[None, :], mask=mask, other=0.0)
    if PADDED:
        fill = tl.load(bias + d, mask=d < HEAD_DIM, other=0.0)
        x = tl.where((token & (inside == 0))[:, None], fill[None, :], x)
    return x


@triton.jit(do_not_specialize=["height", "width", "windows_h", "windows_w", "images"])
def _window_attention_kernel(
    qkv,  # [B, H, W, 3C]
    qkv_bias,  # [3C]
    logit_scale,  # [HEADS]
    table,  # [TYPES, HEADS, QUERIES, KEYS]
    out,  # [B, H, W, C]
    height,
    width,
    windows_h,
    windows_w,
    images,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    IMAGES: tl.constexpr,
    OVERLAPPED: tl.constexpr = False,
):
    begin(OVERLAPPED)
    C: tl.constexpr = HEADS * HEAD_DIM
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    WHOLE: tl.constexpr = KEYS - TAIL  # keys in blocks of BLOCK_N, then a tail
    FIRST: tl.constexpr = BLOCK_N if WHOLE > 0 else TAIL

    program = tl.program_id(0)
    query_block = program % (QUERIES // BLOCK_M)
    program = program // (QUERIES // BLOCK_M)
    head = program % HEADS
    place = program // HEADS % (windows_h * windows_w)
    window_column = place % windows_w
    window_row = place // windows_w
    # the same window and head of several images: where its tokens lie and the table are found once
    first = (program // HEADS // (windows_h * windows_w)) * IMAGES

    pixels = height.to(tl.int64) * width
    qkv += first * pixels * (3 * C) + head * HEAD_DIM
    out += first * pixels * C + head * HEAD_DIM
    qkv_bias += head * HEAD_DIM
    i = query_block * BLOCK_M + tl.arange(0, BLOCK_M)
    token, inside = window_tokens(
        i, window_row, window_column, height, width, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W, PADDED
    )
    token = token.to(tl.int64)
    scale = softmax_scale(tl.load(logit_scale + head))
    table += (head * QUERIES + i)[:, None] * KEYS
    if SHIFT_H > 0 or SHIFT_W > 0:
        table += window_type(window_row, window_column, windows_h, windows_w) * (HEADS * QUERIES * KEYS)
    d = tl.arange(0, BLOCK_D)
    first_keys = _keys(
        0, table, window_row, window_column, height, width,
        C, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W, PADDED, FIRST,
    )  # fmt: skip
    for image in range(0, IMAGES):
        present = first + image < images
        there = inside & present
        q = _load_head(qkv + token * (3 * C), qkv_bias, there, i < TOKENS, HEAD_DIM, BLOCK_D, PADDED)
        q_factor = reciprocal_length(q) * scale
        logits, v = _logits(first_keys, q, q_factor, qkv, qkv_bias, present, C, HEAD_DIM, PADDED, BLOCK_D, PRECISION)
        largest = tl.max(logits, axis=1)
        p = tl.exp2(logits - largest[:, None])
        total = tl.sum(p, axis=1)
        acc = dot(p.to(v.dtype), v, tl.zeros((BLOCK_M, BLOCK_D), tl.float32), PRECISION)
        if WHOLE > BLOCK_N:  # else the first block is of another size, and the compiler minds even a loop of no turns
            for start in range(FIRST, WHOLE, BLOCK_N):
                acc, total, largest = _further_keys(
                    acc, total, largest, start, table, window_row, window_column, height, width, q, q_factor,
                    qkv, qkv_bias, present,
                    C, HEAD_DIM, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W, PADDED, BLOCK_D, BLOCK_N, PRECISION,
                )  # fmt: skip
        if WHOLE > 0 and TAIL > 0:
            acc, total, largest = _further_keys(
                acc, total, largest, WHOLE, table, window_row, window_column, height, width, q, q_factor,
                qkv, qkv_bias, present,
                C, HEAD_DIM, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W, PADDED, BLOCK_D, TAIL, PRECISION,
            )  # fmt: skip
        acc = acc * (1.0 / total)[:, None]
        tl.store(
            (out + token * C)[:, None] + d[None, :],
            acc.to(out.dtype.element_ty),
            mask=there[:, None] & (d < HEAD_DIM)[None, :],
        )
        qkv += pixels * (3 * C)
        out += pixels * C


@triton.jit
def _keys(
    start, table, window_row, window_column, height, width,
    C: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of keys, whatever the image: offsets of their rows, which are in the map, in the window, and the bias."""
    j = start + tl.arange(0, BLOCK)
    token, inside = window_tokens(
        j, window_row, window_column, height, width, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W, PADDED
    )
    return token.to(tl.int64) * (3 * C), inside, j < WINDOW_H * WINDOW_W, tl.load(table + j[None, :])


@triton.jit
def _logits(
    keys, q, q_factor, qkv, qkv_bias, present,
    C: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of the queries and a block of keys in units of log2(e), and the values of the block."""
    offset, inside, slot, bias = keys
    there = inside & present
    k = _load_head(qkv + C + offset, qkv_bias + C, there, slot, HEAD_DIM, BLOCK_D, PADDED)
    v = _load_head(qkv + 2 * C + offset, qkv_bias + 2 * C, there, slot, HEAD_DIM, BLOCK_D, PADDED)
    logits = dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32), PRECISION)
    logits = logits * q_factor[:, None] * reciprocal_length(k)[None, :]
    return logits + bias.to(tl.float32), v


@triton.jit
def _further_keys(
    acc, total, largest, start, table, window_row, window_column, height, width, q, q_factor, qkv, qkv_bias, present,
    C: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr, PADDED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take another block of keys into a softmax: its powers are relative to the largest logit so far."""
    keys = _keys(
        start, table, window_row, window_column, height, width,
        C, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W, PADDED, BLOCK,
    )  # fmt: skip
    logits, v = _logits(keys, q, q_factor, qkv, qkv_bias, present, C, HEAD_DIM, PADDED, BLOCK_D, PRECISION)
    new = tl.maximum(largest, tl.max(logits, axis=1))
    shrink = tl.exp2(largest - new)
    p = tl.exp2(logits - new[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    return dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISION), total, new


def attention_config(
    arch: str, precision_name: str, window_size: tuple[int, int], head_dim: int
) -> tuple[Config, tuple[int, int], int]:
    """How windows of a size are cut into blocks.

    Returns:
        (configuration, (queries, keys) with the padding to whole blocks, keys of the last, smaller block).
    """
    tokens = window_size[0] * window_size[1]
    block_d = max(16, power_of_two(head_dim))
    chosen = config("window_attention", arch, precision_name, tokens=tokens, block_d=block_d)
    block_m, block_n = chosen.blocks["BLOCK_M"], chosen.blocks["BLOCK_N"]
    whole = tokens // block_n * block_n
    tail = max(16, power_of_two(tokens - whole)) if tokens > whole else 0
    return chosen, (cdiv(tokens, block_m) * block_m, whole + tail), tail


@torch.compiler.assume_constant_result
def padded_size(device: torch.device, dtype: torch.dtype, window_size: tuple[int, int], head_dim: int) -> list[int]:
    """The padded_size of the table (see cpb_bias) that window_attention takes on a device."""
    return list(attention_config(arch_of(device), precision_name(dtype), window_size, head_dim)[1])


@operator
def window_attention(
    qkv: Tensor,
    qkv_bias: Tensor,
    logit_scale: Tensor,
    table: Tensor,
    window_size: list[int],
    shift_size: list[int],
) -> Tensor:
    """Scaled cosine attention inside (shifted) windows.

    Args:
        qkv: [B, H, W, 3C], float16, bfloat16 or float32, contiguous.
        qkv_bias: [3C], q, k and v of padded tokens.
        logit_scale: [heads], a logarithm, of the dtype of qkv or float32.
        table: From cpb_bias, of the same window and shift and of padded_size.
        window_size, shift_size: (rows, columns) in tokens.

    Returns:
        [B, H, W, C] in the dtype of qkv.

    Raises:
        ValueError: A tensor of another shape, dtype or device, or not contiguous; more than 576 tokens in a window or
            64 channels in a head.
    """
    check("qkv", qkv, (None,) * 4)
    heads = logit_scale.shape[0]
    batch, height, width, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3
    head_dim, tokens = channels // heads, window_size[0] * window_size[1]
    check("qkv", qkv, (batch, height, width, 3 * heads * head_dim))
    check_rows("qkv", batch * height * width)
    check("qkv_bias", qkv_bias, (3 * channels,), like=qkv)
    check("logit_scale", logit_scale, (heads,))
    check_weight("qkv", qkv, tuple(qkv.shape), logit_scale)
    if tokens > LARGEST_WINDOW or head_dim > LARGEST_HEAD_DIM:
        raise ValueError(
            f"windows must have at most {LARGEST_WINDOW} tokens and heads {LARGEST_HEAD_DIM} channels, "
            f"got windows {window_size} and {head_dim} channels"
        )
    chosen, (queries, keys), tail = attention_config(
        arch_of(qkv.device), precision_name(qkv.dtype), tuple(window_size), head_dim
    )
    check_table(table, heads, (queries, keys), shift_size, qkv.dtype, qkv.device)
    out = torch.empty((batch, height, width, channels), dtype=qkv.dtype, device=qkv.device)
    (windows_h, windows_w), constants = grid_and_constants(qkv, heads, head_dim, window_size, shift_size)
    programs = windows_h * windows_w * heads * (queries // chosen.blocks["BLOCK_M"])
    images = images_at_once(chosen.blocks.get("IMAGES", 1), batch, programs)
    launch(
        _window_attention_kernel,
        cdiv(batch, images) * programs,
        *(qkv, qkv_bias, logit_scale, table, out, height, width, windows_h, windows_w, batch),
        QUERIES=queries,
        KEYS=keys,
        PRECISION=precision_of_few(qkv.dtype, qkv.device),
        TAIL=tail,
        config=chosen,
        **constants | chosen.blocks | {"IMAGES": images},
    )
    return out
