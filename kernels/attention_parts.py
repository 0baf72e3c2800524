"""attention_parts: the attention half of a block up to its norm, in parts: proj(window_attention(qkv(x))) is their sum.

    x [B, H, W, C], parts [B, H, W, heads, C] in float32; table from cpb_bias

One program computes one head of one window as in qkv_attention, and then what that head adds to the projection, so
that what it attends to never leaves it either. norm_residual adds the parts up. That writes and reads heads times as
much as the projection's result, which pays where rows are so few that it stays in the L2 cache.
Definition: reference.ops.attention_parts. Source: as window_attention.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .heads import head_of_window, prepared
from .launch import arch_of, check, check_vectors, launch, operator, precision_name
from .tiles import begin, store_part


@triton.jit(do_not_specialize=["height", "width", "windows_h", "windows_w"])
def _attention_parts_kernel(
    x,  # [B, H, W, C]
    qkv_weight,  # [3C, C]
    qkv_bias,  # [3C]
    logit_scale,  # [HEADS]
    table,  # as in head_of_window
    proj_weight,  # [C, C]
    proj_bias,  # [C]
    out,  # [B, H, W, HEADS, C]
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
    BLOCK_N: tl.constexpr,
    OVERLAPPED: tl.constexpr = False,
):
    begin(OVERLAPPED)
    C: tl.constexpr = HEADS * HEAD_DIM
    attended, offset, inside, head = head_of_window(
        x, qkv_weight, qkv_bias, logit_scale, table, height, width, windows_h, windows_w, HEADS, HEAD_DIM, WINDOW_H,
        WINDOW_W, SHIFT_H, SHIFT_W, PADDED, SLOTS, QUERIES, KEYS, ARRANGED, BLOCK_D, PRECISION, BLOCK_K,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    attended = attended.to(proj_weight.dtype.element_ty)
    k = head * HEAD_DIM + d  # past the head's channels, where it attends to zeros
    WHOLE: tl.constexpr = HEAD_DIM == BLOCK_D
    if WHOLE:  # in a run, which the compiler doesn't see
        k = tl.max_contiguous(tl.multiple_of(k, BLOCK_D), BLOCK_D)
    rows = out + offset * HEADS + head * C
    store_part(attended, proj_weight, k, proj_bias, head == 0, rows, inside, C, C, WHOLE, PRECISION, BLOCK_N)


@operator
def attention_parts(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    logit_scale: Tensor,
    table: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    window_size: list[int],
    shift_size: list[int],
) -> Tensor:
    """What each head adds to proj(window_attention(qkv(x))), the projection's bias with the first.

    Args:
        x: [B, H, W, C], float16, bfloat16 or float32, contiguous.
        qkv_weight, qkv_bias: [3C, C], [3C], of the dtype of x, or 16-bit where x is float32.
        logit_scale: [heads], a logarithm.
        table: From cpb_bias, of the same window and shift, as window_attention or as attention_block takes it.
        proj_weight, proj_bias: [C, C], [C], of the dtype of qkv_weight.
        window_size, shift_size: (rows, columns) in tokens, at most 64 in a window.

    Returns:
        [B, H, W, heads, C] in float32.

    Raises:
        ValueError: A tensor of another shape, dtype or device, or not contiguous; more than 64 tokens in a window.
    """
    programs, numbers, constants, sizes = prepared(x, qkv_weight, qkv_bias, logit_scale, table, window_size, shift_size)
    channels, heads = x.shape[-1], logit_scale.shape[0]
    check("proj_weight", proj_weight, (channels, channels), like=qkv_weight)
    check_vectors(channels, qkv_weight, proj_bias=proj_bias)
    chosen = config("attention_parts", arch_of(x.device), precision_name(qkv_weight.dtype), **sizes)
    out = torch.empty((*x.shape[:-1], heads, channels), dtype=torch.float32, device=x.device)
    launch(
        _attention_parts_kernel,
        programs,
        *(x, qkv_weight, qkv_bias, logit_scale, table, proj_weight, proj_bias, out, *numbers),
        config=chosen,
        **constants | chosen.blocks,
    )
    return out
