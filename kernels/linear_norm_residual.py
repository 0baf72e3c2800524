"""linear_norm_residual: y = r + LN(x W^T + b), then a second LayerNorm on the sum where a block has one.

    x [rows, K], W [C, K], b [C], r and y [rows, C]; sums and norms in float32.

One program holds whole rows of C channels, so this is for few channels; for more, linear and norm_residual.
Definition: reference.ops.linear_norm_residual.
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
    precision,
    precision_name,
)
from .tiles import add_rows, add_vector, begin, dot, layer_norm, load_rows, load_transposed, store_rows, zeros


@triton.jit(do_not_specialize=["rows"])
def _linear_norm_residual_kernel(
    x,  # [rows, K]
    weight,  # [C, K]
    bias,  # [C]
    norm_weight,  # [C]
    norm_bias,  # [C]
    residual,  # [rows, C]
    extra_weight,  # [C]
    extra_bias,  # [C]
    out,  # [rows, C]
    rows,
    eps,
    extra_eps,
    C: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    COUNT: tl.constexpr,
    EXTRA_NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPPED: tl.constexpr = False,
):
    begin(OVERLAPPED)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    x_rows = x + row.to(tl.int64)[:, None] * K
    acc = zeros(BLOCK_M, TILE, COUNT)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = inside[:, None]
        if K % BLOCK_K != 0:
            mask = mask & (k < K)[None, :]
        tile = tl.load(x_rows + k[None, :], mask=mask, other=0.0).to(weight.dtype.element_ty)
        summed = ()
        for i in tl.static_range(COUNT):
            column = i * TILE + tl.arange(0, TILE)
            w = load_transposed(weight, column, k, C, K, TILE * COUNT == C and K % BLOCK_K == 0)
            summed = summed + (dot(tile, w, acc[i], PRECISION),)
        acc = summed
    acc = add_vector(acc, bias, C, TILE, COUNT)
    acc = layer_norm(acc, norm_weight, norm_bias, eps, C, TILE, COUNT)
    offset = row.to(tl.int64) * C
    acc = add_rows(acc, load_rows(residual + offset, inside, C, TILE, COUNT), COUNT)
    if EXTRA_NORM:
        acc = layer_norm(acc, extra_weight, extra_bias, extra_eps, C, TILE, COUNT)
    store_rows(out + offset, acc, inside, C, TILE, COUNT)


@operator
def linear_norm_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    residual: Tensor,
    extra_weight: Tensor | None = None,
    extra_bias: Tensor | None = None,
    extra_eps: float = 1e-5,
) -> Tensor:
    """residual + LN(x W^T + b), then a second LayerNorm on the sum where extra_weight is given.

    Args:
        x: [..., K], float16, bfloat16 or float32, contiguous.
        weight, bias: [C, K], [C], of the dtype of x, or 16-bit where x is float32.
        norm_weight, norm_bias, eps: LayerNorm over C.
        residual: [..., C], of the dtype of x, or float32; the norms' vectors are of its dtype.
        extra_weight, extra_bias, extra_eps: Of the second LayerNorm.

    Returns:
        [..., C] in the dtype of residual.

    Raises:
        ValueError: A tensor of another shape, dtype or device, or not contiguous.
    """
    check("weight", weight, (None, None))
    channels, k = weight.shape
    check("x", x, (*x.shape[:-1], k))
    check_weight("weight", weight, (channels, k), x)
    check("residual", residual, (*x.shape[:-1], channels))
    check_weight("x", x, tuple(x.shape), residual)
    check_vectors(channels, weight, bias=bias)
    check_vectors(channels, residual, norm_weight=norm_weight, norm_bias=norm_bias)
    has_extra = check_pair(channels, residual, extra_weight=extra_weight, extra_bias=extra_bias)
    rows = x.numel() // k
    check_rows("x", rows)
    out = torch.empty_like(residual)
    chosen = config(
        "linear_norm_residual",
        arch_of(x.device),
        precision_name(weight.dtype),
        channels=channels,
        k=k,
        stream_bytes=residual.element_size(),
        rows=at_most(rows),
    )
    launch(
        _linear_norm_residual_kernel,
        cdiv(rows, chosen.blocks["BLOCK_M"]),
        *(x, weight, bias, norm_weight, norm_bias, residual),
        *((extra_weight, extra_bias) if has_extra else (norm_weight, norm_bias)),
        *(out, rows, eps, extra_eps),
        C=channels,
        K=k,
        EXTRA_NORM=has_extra,
        PRECISION=precision(weight.dtype),
        config=chosen,
        **chosen.blocks | row_tiles(chosen, channels),
    )
    return out
