"""patch_merging: each 2x2 neighbourhood of a map to one token, y = W LN(concatenation).

    x [B, H, W, C], norm over 4C, W [N, 4C] with N = 2C, y [B, ceil(H / 2), ceil(W / 2), N]

Channels are concatenated as (column in the pair, row in the pair, C); odd sizes are padded with zeros, which take part
in the norm. The gather is index arithmetic. Each program first takes the mean and variance of its rows, tile by tile
(Chan's update, so nothing cancels), and then multiplies the normalised rows by its columns of W.
Definition: reference.ops.patch_merging. Source: timm's PatchMerging.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv, config
from .launch import arch_of, check, check_rows, check_vectors, check_weight, launch, operator, precision, precision_name
from .tiles import dot, load_transposed


@triton.jit(do_not_specialize=["rows", "height", "width"])
def _patch_merging_kernel(
    x,  # [B, H, W, C]
    norm_weight,  # [4C]
    norm_bias,  # [4C]
    weight,  # [N, 4C]
    out,  # [B, ceil(H / 2), ceil(W / 2), N]
    rows,
    height,
    width,
    eps,
    C: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K: tl.constexpr = 4 * C
    program = tl.program_id(0)
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row = (program // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (program % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    merged_h, merged_w = (height + 1) // 2, (width + 1) // 2
    top = 2 * (row // merged_w % merged_h)
    left = 2 * (row % merged_w)
    corner = x + ((row // merged_w // merged_h).to(tl.int64) * height * width + top.to(tl.int64) * width + left) * C

    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)  # sum of squared deviations from the mean
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tile = _load_merged(corner, k, top, left, inside, height, width, C, BLOCK_K).to(tl.float32)
        count = tl.minimum(K - start, BLOCK_K)
        tile_mean = tl.sum(tile, axis=1) / count
        deviation = tile - tile_mean[:, None]
        if K % BLOCK_K != 0:
            deviation = tl.where((k < K)[None, :], deviation, 0.0)
        gap = tile_mean - mean
        squares += tl.sum(deviation * deviation, axis=1) + gap * gap * (start * count / (start + count))
        mean += gap * (count / (start + count))
    rstd = tl.rsqrt(squares / K + eps)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tile = _load_merged(corner, k, top, left, inside, height, width, C, BLOCK_K).to(tl.float32)
        scale = tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)
        shift = tl.load(norm_bias + k, mask=k < K, other=0.0).to(tl.float32)
        tile = (tile - mean[:, None]) * rstd[:, None] * scale[None, :] + shift[None, :]
        w = load_transposed(weight, column, k, N, K, N % BLOCK_N == 0 and K % BLOCK_K == 0)
        acc = dot(tile.to(w.dtype), w, acc, PRECISION)
    out_rows = out + row.to(tl.int64)[:, None] * N
    tl.store(out_rows + column[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None] & (column < N)[None, :])


@triton.jit
def _load_merged(corner, k, top, left, inside, height, width, C: tl.constexpr, BLOCK_K: tl.constexpr):
    """Channels k of the merged tokens whose upper left tokens start at corner."""
    if C % BLOCK_K == 0:  # one of the four tokens for the whole tile
        quarter = tl.min(k, axis=0) // C + tl.zeros_like(k)
    else:
        quarter = k // C
    down, right = quarter % 2, quarter // 2
    mask = inside[:, None] & (top[:, None] + down[None, :] < height) & (left[:, None] + right[None, :] < width)
    if 4 * C % BLOCK_K != 0:
        mask = mask & (k < 4 * C)[None, :]
    place = (down * width + right).to(tl.int64) * C + k % C
    return tl.load(corner[:, None] + place[None, :], mask=mask, other=0.0)


@operator
def patch_merging(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor) -> Tensor:
    """Concatenate each 2x2 neighbourhood, LayerNorm, reduce.

    Args:
        x: [B, H, W, C], float16, bfloat16 or float32, contiguous; odd sizes are padded with zeros at the end.
        norm_weight, norm_bias, eps: LayerNorm over 4C.
        weight: [N, 4C], N = 2C in a Swin transformer; of the dtype of x, or 16-bit where x is float32.

    Returns:
        [B, ceil(H / 2), ceil(W / 2), N] in the dtype of x.

    Raises:
        ValueError: A tensor of another shape, dtype or device, or not contiguous.
    """
    check("x", x, (None,) * 4)
    batch, height, width, channels = x.shape
    reduced = weight.shape[0]
    check_weight("weight", weight, (reduced, 4 * channels), x)
    check_vectors(4 * channels, x, norm_weight=norm_weight, norm_bias=norm_bias)
    check_rows("x", batch * height * width)
    merged_h, merged_w = (height + 1) // 2, (width + 1) // 2
    rows = batch * merged_h * merged_w
    out = torch.empty((batch, merged_h, merged_w, reduced), dtype=x.dtype, device=x.device)
    chosen = config("patch_merging", arch_of(x.device), precision_name(weight.dtype), channels=channels)
    launch(
        _patch_merging_kernel,
        cdiv(rows, chosen.blocks["BLOCK_M"]) * cdiv(reduced, chosen.blocks["BLOCK_N"]),
        *(x, norm_weight, norm_bias, weight, out, rows, height, width, eps),
        C=channels,
        N=reduced,
        PRECISION=precision(weight.dtype),
        config=chosen,
        **chosen.blocks,
    )
    return out
