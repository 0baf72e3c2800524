"""The PyTorch backend: a whole stage in window order, in plain aten code.

Tokens are gathered into the first block's windows on entry (patch merging gathers anyway) and stay in window order:
LayerNorm and the MLP don't care. Where the next block is shifted, one index_select re-orders the residual stream; the
map's own order returns once, at the end. Position biases and masks come from tables that are derived once per weights.

Every operation here is differentiable and traceable when the tables come from derive_stage(..., traced=True).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import cpu_attention, window_order
from .constants import constant, vector
from .cpu_attention import ExponentTable, Scratch
from .reference.ops import (
    LARGEST_BIAS,
    MASK_VALUE,
    MAX_LOGIT_SCALE,
    NORM_EPS,
    log_spaced,
    window_masks,
    window_types,
)
from .specs import BlockSpec, ImageScale, MergeSpec, PatchEmbedSpec, Size, StageSpec
from .torch_linear import Linear, can_pack, has_native_bfloat16, make_linear
from .window_order import WindowOrder

# Numbers of the residual stream that are worked on at a time on a CPU: about what its caches hold with all that is made
# of them (2, 4, 8 and 16 images in the four stages of a base model).
CPU_PART = 2 * 56 * 56 * 128
WIDE = {8: torch.int64, 16: torch.complex128}  # dtypes of so many bytes
NormWeights = tuple[Tensor | None, Tensor | None, float]

capturable = False  # index tensors are kept in a cache that forgets some
may_fail = False


class BlockTables(NamedTuple):
    """What is derived from a block's parameters."""

    bias: Tensor | None  # [heads, N, N], or [4, heads, N, N] by window type where the block is shifted
    scale: Tensor  # [2, heads, 1, 1]: factors of the normalised q and k
    exponents: ExponentTable | None  # for attention in place: it has the bias in it, which can be large
    qkv: Linear
    proj: Linear
    fc1_gelu: Linear
    fc2: Linear
    norm1: NormWeights
    norm2: NormWeights
    norm3: NormWeights | None


class MergeTables(NamedTuple):
    """What is derived from the parameters of a patch merging."""

    norm: NormWeights
    reduction: Linear
    norm_last: bool


class StageTables(NamedTuple):
    dtype: torch.dtype  # that the stage computes in
    traced: bool  # whether for a graph
    merge: MergeTables | None
    blocks: tuple[BlockTables, ...]
    in_place: bool  # whether attention computes in scratch memory: on a CPU outside a graph


class PatchEmbedTables(NamedTuple):
    dtype: torch.dtype  # that it computes in
    given: torch.dtype  # that it gives
    traced: bool
    proj: Linear
    norm: NormWeights | None


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in for parameters of this dtype and device.

    A CPU without matrix instructions for a 16-bit type takes ten times as long in it as in float32.
    """
    native = dtype == torch.bfloat16 and has_native_bfloat16()
    if device.type == "cpu" and dtype.itemsize == 2 and not native:
        return torch.float32
    return dtype


def derive_patch_embed(spec: PatchEmbedSpec, traced: bool, autocast: torch.dtype | None) -> PatchEmbedTables:
    """What patch_embed needs of the parameters, as for derive_stage."""
    pack = not traced and autocast is None
    weight, bias = spec.proj.weight, spec.proj.bias
    dtype = compute_dtype(weight.dtype, weight.device) if pack else weight.dtype
    bias = None if bias is None else bias.to(dtype)
    norm = None if spec.norm is None else _norm_weights(spec.norm, dtype)
    given = weight.dtype
    if autocast is not None and weight.device.type == "cpu" and given != torch.float64:
        given = autocast  # there, LayerNorm leaves what the convolution made of it
    return PatchEmbedTables(dtype, given, traced, make_linear(weight.flatten(1).to(dtype), bias, pack=pack), norm)


def patch_embed(
    spec: PatchEmbedSpec,
    tables: PatchEmbedTables,
    images: Tensor,
    image_scale: ImageScale | None,
    out: Tensor | None = None,
) -> Tensor:
    """Images [B, in_chans, H, W] to tokens [B, H / ph, W / pw, C], out where it is given: one permuted copy and one
    matrix product."""
    ph, pw = spec.proj.kernel_size
    shape = images.shape[0], images.shape[2] // ph, images.shape[3] // pw, spec.proj.out_channels
    dtype = spec.proj.weight.dtype

    def compute(images: Tensor, out: Tensor | None) -> Tensor:
        x = _patches(normalise(images, image_scale, dtype), (ph, pw), tables)
        x = tables.proj(x)
        x = x if tables.norm is None else _layer_norm(x, tables.norm)
        return x.to(tables.given) if out is None else out.copy_(x)

    # four times as many as in a stage: nothing is as large in here as what an MLP hides
    made = _in_parts(compute, tables, images, shape, tables.given, 4 * CPU_PART)
    return made if out is None else out.copy_(made)


def _patches(images: Tensor, patch: Size, tables: PatchEmbedTables) -> Tensor:
    """Images [B, C, H, W] as [B, H / ph, W / pw, C * ph * pw]."""
    (ph, pw), (batch, channels, height, width) = patch, images.shape
    gh, gw = height // ph, width // pw
    x = images[:, :, : gh * ph, : gw * pw].to(tables.dtype).resolve_neg()
    wide = None if tables.traced or not x.is_contiguous() or x.storage_offset() % pw else WIDE.get(pw * x.itemsize)
    if wide is None:
        x = x.reshape(batch, channels, gh, ph, gw, pw).permute(0, 2, 4, 1, 3, 5)
    else:  # what a patch has of a row is one number to be copied
        x = x.view(-1).view(wide).view(batch, channels, gh, ph, gw).permute(0, 2, 4, 1, 3)
        x = x.clone(memory_format=torch.contiguous_format).view(tables.dtype)
    return x.reshape(batch, gh, gw, channels * ph * pw)


def _in_parts(
    compute: Callable[[Tensor, Tensor | None], Tensor],
    tables: PatchEmbedTables | StageTables,
    x: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    part: int,
) -> Tensor:
    """compute(x, None), on a CPU and outside a graph some images at a time, about as many each time.

    Args:
        compute: Makes of images a tensor of this shape and dtype, and returns it; in its second argument, if given.
        part: How many numbers of the result at a time at most.
    """
    if tables.traced or x.device.type != "cpu":
        return compute(x, None)
    parts = -(-shape[0] // max(1, part // max(1, math.prod(shape[1:]))))
    if parts <= 1:
        return compute(x, None)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    for images, place in zip(x.chunk(parts), out.chunk(parts), strict=True):
        compute(images, place)
    return out


def normalise(images: Tensor, image_scale: ImageScale | None, dtype: torch.dtype) -> Tensor:
    """Images as the original takes them: of its dtype, uint8 ones normalised."""
    if images.dtype == torch.uint8:
        mean, std = _mean_and_std(image_scale, images.device)
        images = (images.float() / 255 - mean) / std
    return images.to(dtype)


@constant
def _mean_and_std(image_scale: ImageScale, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(vector(values, device)[:, None, None] for values in image_scale)


def derive_stage(spec: StageSpec, traced: bool, autocast: torch.dtype | None) -> StageTables:
    """What stage needs of the parameters.

    Args:
        traced: For a graph that is traced: nothing is packed.
        autocast: The dtype of the autocast region that stage will run in, None outside one. It casts only what is
            left as it is, so nothing is packed.
    """
    pack = not traced and autocast is None
    weight = spec.blocks[0].qkv.weight
    dtype = compute_dtype(weight.dtype, weight.device) if pack else weight.dtype
    merge = None
    if spec.merge is not None:
        norm, reduction, norm_last = spec.merge
        merge = MergeTables(_norm_weights(norm, dtype), _linear(reduction, reduction.bias, dtype, pack), norm_last)
    alike = len({(block.window, block.num_heads) for block in spec.blocks}) == 1  # they share scratch memory
    in_place = pack and alike and weight.device.type == "cpu"
    blocks = tuple(_derive_block(block, dtype, pack, in_place) for block in spec.blocks)
    return StageTables(dtype, traced, merge, blocks, in_place)


def _derive_block(block: BlockSpec, dtype: torch.dtype, pack: bool, in_place: bool) -> BlockTables:
    logit_scale = block.logit_scale()
    exact = torch.promote_types(logit_scale.dtype, torch.float32)
    # LayerNorm of bfloat16 is faster on a CPU with weights in float32
    norm_dtype = exact if pack and logit_scale.device.type == "cpu" else dtype
    scale = logit_scale.to(exact).clamp(max=MAX_LOGIT_SCALE).exp()[:, None, None]
    bias = _bias_table(block, exact)
    return BlockTables(
        bias=None if in_place else bias,
        scale=torch.stack([scale, torch.ones_like(scale)]),
        exponents=cpu_attention.exponent_table(bias, scale) if in_place else None,
        qkv=_linear(block.qkv, block.qkv_bias(), dtype, pack),
        proj=_linear(block.proj, block.proj.bias, dtype, pack),
        fc1_gelu=_linear(block.fc1, block.fc1.bias, dtype, pack, gelu=True),
        fc2=_linear(block.fc2, block.fc2.bias, dtype, pack),
        norm1=_norm_weights(block.norm1, norm_dtype),
        norm2=_norm_weights(block.norm2, norm_dtype),
        norm3=None if block.norm3 is None else _norm_weights(block.norm3, norm_dtype),
    )


def _bias_table(block: BlockSpec, dtype: torch.dtype) -> Tensor:
    """The position bias, and the shift mask for the four window types; the MLP sees each distinct offset once."""
    (wh, ww), device = block.window, block.bias_fc1.weight.device
    fc1, fc2 = block.bias_fc1, block.bias_fc2
    steps = [torch.arange(1 - size, size, device=device, dtype=torch.float32) for size in block.window]
    offsets = log_spaced(torch.stack(torch.meshgrid(*steps, indexing="ij"), dim=-1), block.bias_span)
    offsets = offsets.to(fc1.weight.dtype).to(dtype)  # rounded as the buffer of a converted model is
    hidden = F.relu(_linear(fc1, fc1.bias, dtype, pack=False)(offsets))
    bias = _linear(fc2, fc2.bias, dtype, pack=False)(hidden)  # [2Wh - 1, 2Ww - 1, heads]
    if block.bias_span is not None:
        bias = LARGEST_BIAS * bias.sigmoid()
    row, column = torch.arange(wh, device=device), torch.arange(ww, device=device)
    row, column = row.repeat_interleave(ww), column.repeat(wh)
    bias = bias[row[:, None] - row + wh - 1, column[:, None] - column + ww - 1].permute(2, 0, 1)
    if block.shift == (0, 0):
        return bias.contiguous()
    return bias + window_masks(block.window, block.shift, device)[:, None].to(dtype) * MASK_VALUE


def stage(spec: StageSpec, tables: StageTables, x: Tensor) -> Tensor:
    """One stage. x [B, H, W, C] to [B, H', W', C'], both contiguous, in the dtype of x."""
    size = (x.shape[1], x.shape[2]) if spec.merge is None else ((x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2)
    shape = x.shape[0], *size, spec.blocks[0].qkv.in_features
    return _in_parts(partial(_stage, spec, tables, size), tables, x, shape, x.dtype, CPU_PART)


def _stage(spec: StageSpec, tables: StageTables, size: Size, x: Tensor, out: Tensor | None) -> Tensor:
    """One stage on a map of this size, after merging; into out where it is given."""
    given = x.dtype
    x = x.to(tables.dtype)
    if spec.merge is None:
        x, order = x.flatten(1, 2), None
    else:
        order = _stream_order(spec.blocks[0], size)
        x = _merge(tables.merge, x, size, order)
    scratch = _scratch(spec.blocks[0], tables, x, size) if tables.in_place else None
    for block, block_tables in zip(spec.blocks, tables.blocks, strict=True):
        wanted = _stream_order(block, size)
        x = _reorder(x, order, wanted)
        order = wanted
        x = _block(block, block_tables, x, size, scratch)
    if out is None:
        return _reorder(x, order, None).unflatten(1, size).to(given)
    index = window_order.change(order, None, x.device)
    if index is None or x.dtype != given:
        return out.copy_(_reorder(x, order, None).unflatten(1, size))
    torch.index_select(x, 1, index, out=out.flatten(1, 2))
    return out


def _stream_order(block: BlockSpec, size: Size) -> WindowOrder | None:
    """The order of the residual stream in a block: its windows, or raster where these are padded."""
    order = WindowOrder(size, block.window, block.shift)
    return None if order.padded else order


def _reorder(x: Tensor, old: WindowOrder | None, new: WindowOrder | None) -> Tensor:
    index = window_order.change(old, new, x.device)
    return x if index is None else x.index_select(1, index)


def _merge(tables: MergeTables, x: Tensor, size: Size, order: WindowOrder | None) -> Tensor:
    """Patch merging straight into the order of the first block. [B, H, W, C] to [B, H/2 * W/2, 2C]."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    index = window_order.merge((2 * size[0], 2 * size[1]), order, x.device)
    x = x.flatten(1, 2).index_select(1, index).unflatten(1, (-1, 4)).flatten(2)
    if tables.norm_last:
        return _layer_norm(tables.reduction(x), tables.norm)
    return tables.reduction(_layer_norm(x, tables.norm))


def _scratch(block: BlockSpec, tables: StageTables, x: Tensor, size: Size) -> Scratch:
    """For all blocks of a stage."""
    order, exact = WindowOrder(size, block.window, block.shift), tables.blocks[0].scale.dtype
    return Scratch(x.shape[0], order.grid, math.prod(block.window), block.num_heads, x.shape[-1], x.dtype, exact)


def _block(block: BlockSpec, tables: BlockTables, x: Tensor, size: Size, scratch: Scratch | None) -> Tensor:
    """One block on the residual stream [B, H * W, C]."""
    x = _norm_residual(_attention(block, tables, x, size, scratch), tables.norm1, x)
    x = _norm_residual(tables.fc2(tables.fc1_gelu(x)), tables.norm2, x)
    return x if tables.norm3 is None else _layer_norm(x, tables.norm3)


def _attention(block: BlockSpec, tables: BlockTables, x: Tensor, size: Size, scratch: Scratch | None) -> Tensor:
    """Scaled cosine attention and the projection, [B, H * W, C] in and out."""
    order = WindowOrder(size, block.window, block.shift)
    if scratch is None:
        x = tables.proj(_attend(block, tables, tables.qkv(_windows(x, order)), order.grid))
    else:
        scratch.load(tables.qkv(_windows(x, order)))
        x = tables.proj(cpu_attention.attend(scratch, tables.exponents))
        scratch.release()
    return x.index_select(1, window_order.change(order, None, x.device)) if order.padded else x


def _windows(x: Tensor, order: WindowOrder) -> Tensor:
    """The residual stream as windows [B, windows * N, C]: as it is, or with zeros where they are padded."""
    if not order.padded:
        return x
    x = x.index_select(1, window_order.change(None, order, x.device))
    return x.masked_fill_(window_order.pad_mask(order, x.device), 0.0)


def _attend(block: BlockSpec, tables: BlockTables, qkv: Tensor, grid: Size) -> Tensor:
    """Scaled cosine attention of qkv [B, windows * N, 3C]."""
    batch, tokens, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    qkv = qkv.view(-1, math.prod(block.window), 3, block.num_heads, channels // block.num_heads)
    qkv = qkv.permute(2, 0, 3, 1, 4).contiguous()  # [3, B * windows, heads, N, d]
    query_key, value = qkv[:2], qkv[2]
    # In float16 a norm overflows or loses its eps; bfloat16 has the range of float32.
    exact = torch.float32 if qkv.dtype == torch.float16 else qkv.dtype
    length = torch.linalg.vector_norm(query_key, dim=-1, keepdim=True, dtype=exact).clamp_min(NORM_EPS)
    query, key = (query_key * (tables.scale[:, None] / length).to(exact)).to(qkv.dtype)
    # A softmax of 16-bit numbers takes twice as long on a CPU as one in float32 with the conversions.
    logits = (query @ key.transpose(-2, -1)).to(tables.bias.dtype)
    _add_bias(logits.unflatten(0, (-1, *grid)), tables.bias)
    out = logits.softmax(dim=-1).to(value.dtype) @ value
    return out.transpose(1, 2).reshape(batch, tokens, channels)


def _add_bias(logits: Tensor, bias: Tensor) -> None:
    """Add the position bias in place. logits [B, gh, gw, heads, N, N]; a table of four goes by window type."""
    if bias.dim() == 3:
        logits += bias
        return
    if torch.compiler.is_compiling():
        # Slices of one window would fix the size of what is exported for any size, and Inductor would look for minutes
        # at what lies in which slice of a batch of any size.
        logits += bias[window_types(logits.shape[1:3], bias.device)].unflatten(0, logits.shape[1:3])
        return
    interior, last_row, last_column, corner = bias
    logits[:, :-1, :-1] += interior
    logits[:, -1:, :-1] += last_row
    logits[:, :-1, -1:] += last_column
    logits[:, -1:, -1:] += corner


def _norm_residual(x: Tensor, norm: NormWeights, residual: Tensor) -> Tensor:
    x = _layer_norm(x, norm)
    return x.add_(residual) if x.dtype == residual.dtype else x + residual


def _layer_norm(x: Tensor, norm: NormWeights) -> Tensor:
    weight, bias, eps = norm
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _norm_weights(norm: nn.LayerNorm, dtype: torch.dtype) -> NormWeights:
    weight, bias = (None if parameter is None else parameter.to(dtype) for parameter in (norm.weight, norm.bias))
    return weight, bias, norm.eps


def _linear(layer: nn.Linear, bias: Tensor | None, dtype: torch.dtype, pack: bool, gelu: bool = False) -> Linear:
    bias = None if bias is None else bias.to(dtype)
    return make_linear(layer.weight.to(dtype), bias, gelu=gelu, pack=pack)


def describe(spec: PatchEmbedSpec | MergeSpec | BlockSpec, dtype: torch.dtype, device: torch.device) -> str:
    """What runs a module with parameters of this dtype on this device, in words for the report."""
    computed = compute_dtype(dtype, device)
    text = f"PyTorch, {str(computed).removeprefix('torch.')}"
    if device.type == "cpu" and can_pack(computed):
        text += ", packed weights"
    if computed != dtype:
        text += f" (this CPU has no fast {str(dtype).removeprefix('torch.')}: a float32 model saves the conversions)"
    return text
