"""qkv_attention: window attention from the tokens themselves, y = window_attention(x W^T + b).

    x and y [B, H, W, C], W [3C, C]; table from cpb_bias

One program computes one head of one window: its q, k and v over all channels, then its attention, so that q, k and v
never leave it. Each head of a window reads the window's tokens and its own weights again. That pays where rows are few:
a launch is saved, and a product over so few rows would leave most of a GPU idle; for more, linear and window_attention.
Windows have at most 64 tokens.
Definition: reference.ops.qkv_attention. Source: as window_attention.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .heads import head_of_window, prepared
from .launch import arch_of, launch, operator, precision_name
from .tiles import begin


@triton.jit(do_not_specialize=["height", "width", "windows_h", "windows_w"])
def _qkv_attention_kernel(
    x,  # [B, H, W, C]
    qkv_weight,  # [3C, C]
    qkv_bias,  # [3C]
    logit_scale,  # [HEADS]
    table,  # as in head_of_window
    out,  # [B, H, W, C]
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
    OVERLAPPED: tl.constexpr = False,
):
    begin(OVERLAPPED)
    attended, offset, inside, head = head_of_window(
        x, qkv_weight, qkv_bias, logit_scale, table, height, width, windows_h, windows_w, HEADS, HEAD_DIM, WINDOW_H,
        WINDOW_W, SHIFT_H, SHIFT_W, PADDED, SLOTS, QUERIES, KEYS, ARRANGED, BLOCK_D, PRECISION, BLOCK_K,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    tl.store(
        (out + offset + head * HEAD_DIM)[:, None] + d[None, :],
        attended.to(out.dtype.element_ty),
        mask=inside[:, None] & (d < HEAD_DIM)[None, :],
    )


@operator
def qkv_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    logit_scale: Tensor,
    table: Tensor,
    window_size: list[int],
    shift_size: list[int],
) -> Tensor:
    """window_attention(x W^T + b).

    Args:
        x: [B, H, W, C], float16, bfloat16 or float32, contiguous.
        qkv_weight, qkv_bias: [3C, C], [3C], of the dtype of x, or 16-bit where x is float32.
        logit_scale: [heads], a logarithm.
        table: From cpb_bias, of the same window and shift, as window_attention or as attention_block takes it.
        window_size, shift_size: (rows, columns) in tokens, at most 64 in a window.

    Returns:
        [B, H, W, C] in the dtype of qkv_weight.

    Raises:
        ValueError: A tensor of another shape, dtype or device, or not contiguous; more than 64 tokens in a window.
    """
    programs, numbers, constants, sizes = prepared(x, qkv_weight, qkv_bias, logit_scale, table, window_size, shift_size)
    chosen = config("qkv_attention", arch_of(x.device), precision_name(qkv_weight.dtype), **sizes)
    out = torch.empty(tuple(x.shape), dtype=qkv_weight.dtype, device=x.device)
    launch(
        _qkv_attention_kernel,
        programs,
        *(x, qkv_weight, qkv_bias, logit_scale, table, out, *numbers),
        config=chosen,
        **constants | chosen.blocks,
    )
    return out
