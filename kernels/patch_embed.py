"""patch_embed: images to embedded patches, y = LN(W patch + b), or without the norm.

    images [B, in_chans, H, W] of any strides and dtype, W [C, in_chans, ph, pw], b [C], y [B, H // ph, W // pw, C]

The convolution is a product of gathered patches with the weights: no patch overlaps another. Pixels become
scale * pixel + shift per channel on their way, in float32, where a scale is given: that normalises uint8 images.
Definition: reference.ops.patch_embed. Source: timm's PatchEmbed.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import at_most, cdiv, columns, config
from .launch import (
    arch_of,
    check,
    check_rows,
    check_vectors,
    check_weight,
    launch,
    operator,
    precision_name,
    precision_of_few,
)
from .tiles import begin, dot, layer_norm, load_transposed, store_rows, vector_rows, zeros

LARGEST_RUN = 16  # a power of two: bytes of uint8 that one instruction loads
IMAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.uint8)


@triton.jit(do_not_specialize=["rows", "patches_h", "patches_w", "image_stride", "channel_stride", "row_stride"])
def _patch_embed_kernel(
    images,  # [B, in_chans, H, W], strided
    scale,  # [in_chans], float32
    shift,  # [in_chans], float32
    weight,  # [C, in_chans, ph, pw]
    bias,  # [C]
    norm_weight,  # [C]
    norm_bias,  # [C]
    out,  # [B, patches_h, patches_w, C]
    rows,
    patches_h,
    patches_w,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    eps,
    C: tl.constexpr,
    K: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    RUN: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    TILE: tl.constexpr,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPPED: tl.constexpr = False,
):
    begin(OVERLAPPED)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    patch_column = row % patches_w
    patch_row = (row // patches_w) % patches_h
    image = row // patches_w // patches_h
    corner = image.to(tl.int64) * image_stride
    corner += (patch_row * PATCH_H).to(tl.int64) * row_stride + (patch_column * PATCH_W).to(tl.int64) * column_stride
    corner = tl.multiple_of(corner, RUN)
    acc = vector_rows(bias, BLOCK_M, C, TILE, COUNT) if HAS_BIAS else zeros(BLOCK_M, TILE, COUNT)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        channel = k // (PATCH_H * PATCH_W)
        place = channel.to(tl.int64) * channel_stride
        place += (k // PATCH_W % PATCH_H).to(tl.int64) * row_stride + (k % PATCH_W).to(tl.int64) * column_stride
        place = tl.max_contiguous(tl.multiple_of(place, RUN), RUN)
        mask = inside[:, None]
        if K % BLOCK_K != 0:
            mask = mask & (k < K)[None, :]
        pixels = tl.load(images + corner[:, None] + place[None, :], mask=mask, other=0)
        if SCALED:
            factor = tl.load(scale + channel, mask=k < K, other=0.0)
            offset = tl.load(shift + channel, mask=k < K, other=0.0)
            pixels = pixels.to(tl.float32) * factor[None, :] + offset[None, :]
        pixels = pixels.to(weight.dtype.element_ty)
        summed = ()
        for i in tl.static_range(COUNT):
            column = i * TILE + tl.arange(0, TILE)
            w = load_transposed(weight, column, k, C, K, TILE * COUNT == C and K % BLOCK_K == 0)
            summed = summed + (dot(pixels, w, acc[i], PRECISION),)
        acc = summed
    if NORM:
        acc = layer_norm(acc, norm_weight, norm_bias, eps, C, TILE, COUNT)
    store_rows(out + row.to(tl.int64) * C, acc, inside, C, TILE, COUNT)


def side_by_side(strides: tuple[int, ...], patch_w: int) -> int:
    """How many pixels of a patch's row lie side by side in memory, at a place that is a multiple of so many.

    A thread loads so many at once. Strides that are symbols, while a model is traced, promise nothing.
    """
    run = math.gcd(patch_w, LARGEST_RUN)
    fit = strides[3] == 1 and all(isinstance(stride, int) and stride % run == 0 for stride in strides[:3])
    return run if fit else 1


@operator
def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Non-overlapping patches, linearly embedded, then LayerNorm where norm_weight is given.

    Args:
        images: [B, in_chans, H, W], float16, bfloat16, float32 or uint8, of any strides; what is left over after whole
            patches is cut off.
        weight, bias: [C, in_chans, ph, pw], [C] or None, float16, bfloat16 or float32, contiguous.
        norm_weight, norm_bias, eps: LayerNorm over C, of the dtype of weight, or float32.
        scale, shift: [in_chans] each, float32: pixels become scale * pixel + shift.

    Returns:
        [B, H // ph, W // pw, C] in the dtype of norm_weight, or of weight where there is no norm.

    Raises:
        ValueError: A tensor of another shape, dtype or device, or parameters that are not contiguous.
    """
    return patch_embed_into(None, images, weight, bias, norm_weight, norm_bias, eps, scale, shift)


def patch_embed_into(
    out: Tensor | None,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """patch_embed into a tensor, if it is given: [B, H // ph, W // pw, C], contiguous, of the dtype that it returns.

    No operator: nothing traces, differentiates or casts it.
    """
    check("weight", weight, (None,) * 4)
    channels, in_chans, patch_h, patch_w = weight.shape
    check_vectors(channels, weight, bias=bias)
    stream = weight
    if norm_weight is not None:
        check("norm_weight", norm_weight, (channels,))
        check_weight("weight", weight, tuple(weight.shape), norm_weight)
        stream = norm_weight
    check_vectors(channels, stream, norm_weight=norm_weight, norm_bias=norm_bias)
    if images.dim() != 4 or images.shape[1] != in_chans:
        raise ValueError(f"images must have shape [B, {in_chans}, H, W], got {list(images.shape)}")
    if images.dtype not in IMAGE_DTYPES or images.device != weight.device:
        expected = f"float16, bfloat16, float32 or uint8 on {weight.device}"
        raise ValueError(f"images must be {expected}, got {images.dtype} on {images.device}")
    if (norm_weight is None) != (norm_bias is None) or (scale is None) != (shift is None):
        raise ValueError("norm_weight and norm_bias, and scale and shift, must be given together")
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None and (tuple(vector.shape) != (in_chans,) or vector.dtype != torch.float32):
            raise ValueError(f"{name} must be float32 [{in_chans}], got {vector.dtype} {list(vector.shape)}")
    batch, patches_h, patches_w = images.shape[0], images.shape[2] // patch_h, images.shape[3] // patch_w
    rows, k = batch * patches_h * patches_w, in_chans * patch_h * patch_w
    check_rows("images", rows)
    shape = batch, patches_h, patches_w, channels
    if out is None:
        out = torch.empty(shape, dtype=stream.dtype, device=weight.device)
    else:
        check("out", out, shape, like=stream)
    name = precision_name(weight.dtype)
    chosen = config("patch_embed", arch_of(weight.device), name, channels=channels, k=k, rows=at_most(rows))
    tile, count = columns(channels)
    launch(
        _patch_embed_kernel,
        cdiv(rows, chosen.blocks["BLOCK_M"]),
        images,
        *((weight, weight) if scale is None else (scale, shift)),
        *(weight, weight if bias is None else bias),
        *((weight, weight) if norm_weight is None else (norm_weight, norm_bias)),
        *(out, rows, patches_h, patches_w, *images.stride(), eps),
        C=channels,
        K=k,
        PATCH_H=patch_h,
        PATCH_W=patch_w,
        RUN=side_by_side(images.stride(), patch_w),
        SCALED=scale is not None,
        HAS_BIAS=bias is not None,
        NORM=norm_weight is not None,
        TILE=tile,
        COUNT=count,
        PRECISION=precision_of_few(weight.dtype, weight.device),
        config=chosen,
        **chosen.blocks,
    )
    return out
