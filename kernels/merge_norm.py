"""merge_norm: patch merging up to its reduction, each 2x2 neighbourhood of a map concatenated and normalised.

    x [B, H, W, C], norm over 4C if there is one here, y [B, ceil(H / 2), ceil(W / 2), 4C]

Channels are concatenated as (column in the pair, row in the pair, C); odd sizes are padded with zeros, which take part
in the norm. The gather is index arithmetic. The reduction is linear's, on rows that lie one after the other: a product
that normalised its own rows would read them again for every block of its columns.
Definition: reference.ops.merge_norm. Source: arXiv:2103.14030, section 3.1, and timm's PatchMerging.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import at_most, cdiv, columns, config
from .launch import arch_of, check, check_pair, check_rows, launch, operator, precision_name
from .tiles import begin, layer_norm, store_rows

LARGEST_CHANNELS = 2048  # of x


@triton.jit(do_not_specialize=["rows", "height", "width"])
def _merge_norm_kernel(
    x,  # [B, H, W, C]
    norm_weight,  # [4C]; nothing without NORM
    norm_bias,  # [4C]
    out,  # [B, ceil(H / 2), ceil(W / 2), 4C]
    rows,
    height,
    width,
    eps,
    C: tl.constexpr,
    TILE: tl.constexpr,
    COUNT: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    OVERLAPPED: tl.constexpr = False,
):
    begin(OVERLAPPED)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    merged_h, merged_w = (height + 1) // 2, (width + 1) // 2
    top = 2 * (row // merged_w % merged_h)
    left = 2 * (row % merged_w)
    image = (row // merged_w // merged_h).to(tl.int64)
    corner = x + (image * height * width + top.to(tl.int64) * width + left) * C
    tiles = ()
    for i in tl.static_range(COUNT):
        column = i * TILE + tl.arange(0, TILE)
        down, right = column // C % 2, column // C // 2
        mask = inside[:, None] & (top[:, None] + down[None, :] < height) & (left[:, None] + right[None, :] < width)
        if TILE * COUNT > 4 * C:
            mask = mask & (column < 4 * C)[None, :]
        place = (down * width + right).to(tl.int64) * C + column % C
        tiles = tiles + (tl.load(corner[:, None] + place[None, :], mask=mask, other=0.0).to(tl.float32),)
    if NORM:
        tiles = layer_norm(tiles, norm_weight, norm_bias, eps, 4 * C, TILE, COUNT)
    store_rows(out + row.to(tl.int64) * (4 * C), tiles, inside, 4 * C, TILE, COUNT)


@operator
def merge_norm(
    x: Tensor, norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Concatenate each 2x2 neighbourhood, LayerNorm where norm_weight is given.

    Args:
        x: [B, H, W, C], float16, bfloat16 or float32, contiguous, C at most 2048; odd sizes are padded with zeros at
            the end.
        norm_weight, norm_bias, eps: LayerNorm over 4C.

    Returns:
        [B, ceil(H / 2), ceil(W / 2), 4C] in the dtype of x.

    Raises:
        ValueError: A tensor of another shape, dtype or device, or not contiguous, one of two given, or too many
            channels.
    """
    check("x", x, (None,) * 4)
    batch, height, width, channels = x.shape
    if channels > LARGEST_CHANNELS:
        raise ValueError(f"x must have at most {LARGEST_CHANNELS} channels, got {channels}")
    has_norm = check_pair(4 * channels, x, norm_weight=norm_weight, norm_bias=norm_bias)
    check_rows("x", batch * height * width)
    merged_h, merged_w = (height + 1) // 2, (width + 1) // 2
    rows = batch * merged_h * merged_w
    out = torch.empty((batch, merged_h, merged_w, 4 * channels), dtype=x.dtype, device=x.device)
    name = precision_name(x.dtype)
    chosen = config("merge_norm", arch_of(x.device), name, channels=channels, rows=at_most(rows))
    tile, count = columns(4 * channels)
    launch(
        _merge_norm_kernel,
        cdiv(rows, chosen.blocks["BLOCK_M"]),
        *(x, *((norm_weight, norm_bias) if has_norm else (x, x)), out, rows, height, width, eps),
        C=channels,
        TILE=tile,
        COUNT=count,
        NORM=has_norm,
        config=chosen,
        **chosen.blocks,
    )
    return out
