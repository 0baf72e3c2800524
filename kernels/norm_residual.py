"""norm_residual: y = r + LN(x), then a second LayerNorm on the sum where a block has one.

    x, r and y [rows, C], any C up to 4096; norms in float32. x can come in parts, [rows, PARTS, C], which are added up.

Without r it is y = LN(x), as after a patch merging.

Definition: reference.ops.norm_residual.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import at_most, cdiv, config, row_tiles
from .launch import (
    arch_of,
    check,
    check_pair,
    check_rows,
    check_vectors,
    check_weight,
    launch,
    operator,
    precision_name,
)
from .tiles import add_rows, begin, layer_norm, load_rows, store_rows, zeros

LARGEST_CHANNELS = 4096


@triton.jit(do_not_specialize=["rows"])
def _norm_residual_kernel(
    x,  # [rows, PARTS, C]
    norm_weight,  # [C]
    norm_bias,  # [C]
    residual,  # [rows, C]; nothing without RESIDUAL
    extra_weight,  # [C]
    extra_bias,  # [C]
    out,  # [rows, C]
    rows,
    eps,
    extra_eps,
    C: tl.constexpr,
    TILE: tl.constexpr,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EXTRA_NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    OVERLAPPED: tl.constexpr = False,
):
    begin(OVERLAPPED)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    offset = row.to(tl.int64) * C
    acc = zeros(BLOCK_M, TILE, COUNT)
    for part in tl.static_range(PARTS):
        acc = add_rows(acc, load_rows(x + (offset * PARTS + part * C), inside, C, TILE, COUNT), COUNT)
    acc = layer_norm(acc, norm_weight, norm_bias, eps, C, TILE, COUNT)
    if RESIDUAL:
        acc = add_rows(acc, load_rows(residual + offset, inside, C, TILE, COUNT), COUNT)
    if EXTRA_NORM:
        acc = layer_norm(acc, extra_weight, extra_bias, extra_eps, C, TILE, COUNT)
    store_rows(out + offset, acc, inside, C, TILE, COUNT)


@operator
def norm_residual(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    extra_weight: Tensor | None = None,
    extra_bias: Tensor | None = None,
    extra_eps: float = 1e-5,
) -> Tensor:
    """residual + LN(x), then a second LayerNorm on the sum where extra_weight is given.

    Args:
        x: [..., C], float16, bfloat16 or float32, contiguous, C at most 4096. Or [..., parts, C], in float32 or of the
            dtype of residual: then x is the sum of the parts.
        norm_weight, norm_bias, eps: LayerNorm over C, of the dtype of x, or float32.
        residual: [..., C], of the dtype of the norm's vectors; left out, it is nothing.
        extra_weight, extra_bias, extra_eps: Of the second LayerNorm.

    Returns:
        [..., C] in the dtype of the norms' vectors.

    Raises:
        ValueError: A tensor of another shape, dtype or device, or not contiguous, or too many channels.
    """
    channels = x.shape[-1]
    if channels > LARGEST_CHANNELS:
        raise ValueError(f"x must have at most {LARGEST_CHANNELS} channels, got {channels}")
    in_parts = residual is not None and x.dim() == residual.dim() + 1
    check("x", x, tuple(x.shape))
    if in_parts:
        parts = x.shape[-2]
        check_weight("residual", residual, (*x.shape[:-2], channels), x)
    else:
        parts = 1
        if residual is None:
            check("norm_weight", norm_weight, (channels,))
        else:
            check("residual", residual, tuple(x.shape))
        check_weight("x", x, tuple(x.shape), norm_weight if residual is None else residual)
    like = norm_weight if residual is None else residual  # of the stream
    check_vectors(channels, like, norm_weight=norm_weight, norm_bias=norm_bias)
    has_extra = check_pair(channels, like, extra_weight=extra_weight, extra_bias=extra_bias)
    rows = x.numel() // channels // parts
    check_rows("x", rows)
    out = torch.empty((*x.shape[:-2], channels) if in_parts else x.shape, dtype=like.dtype, device=x.device)
    chosen = config(
        "norm_residual",
        arch_of(x.device),
        precision_name(like.dtype if in_parts else x.dtype),
        channels=channels,
        in_parts=int(in_parts),
        rows=at_most(rows),
    )
    launch(
        _norm_residual_kernel,
        cdiv(rows, chosen.blocks["BLOCK_M"]),
        *(x, norm_weight, norm_bias, x if residual is None else residual),
        *((extra_weight, extra_bias) if has_extra else (norm_weight, norm_bias)),
        *(out, rows, eps, extra_eps),
        C=channels,
        PARTS=parts,
        RESIDUAL=residual is not None,
        EXTRA_NORM=has_extra,
        config=chosen,
        **chosen.blocks | row_tiles(chosen, channels),
    )
    return out
