"""The Triton backend: a stage composed of the fused kernels of swinfast.kernels, on maps [B, H, W, C].

What it needs of the parameters is little: the table of position biases, and copies in another dtype under autocast. The
kernels are differentiable nowhere; fused.py gives gradients by the original.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .autocast import without_autocast
from .constants import constant, vector
from .kernels.launch import DTYPES, INTERPRETED, arch_of
from .kernels.norm_residual import LARGEST_CHANNELS
from .kernels.patch_embed import IMAGE_DTYPES
from .kernels.patch_embed import patch_embed as embed
from .kernels.patch_embed import patch_embed_into as embed_into
from .kernels.stages import Block, Linear, Merge, Norm, bias_table, forms_of, run_blocks, run_merge
from .kernels.window_attention import LARGEST_HEAD_DIM, LARGEST_WINDOW
from .specs import BlockSpec, ImageScale, MergeSpec, PatchEmbedSpec, StageSpec

LARGEST_PATCH_EMBED = 1024  # channels, all of which a program holds
OLDEST_CAPABILITY = (8, 0)
capturable = True
may_fail = True  # where a compiler is missing, or it refuses a kernel


class PatchEmbedTables(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    norm: Norm | None


class StageTables(NamedTuple):
    dtype: torch.dtype  # of the residual stream: float32 under autocast, which casts matrix products alone
    merge: Merge | None
    blocks: tuple[Block, ...]


@torch.compiler.assume_constant_result
def why_not_on(device: torch.device) -> str | None:
    """Why the kernels can't run on a device, None where they can."""
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
            found = ".".join(map(str, torch.cuda.get_device_capability(device)))
            return f"{torch.cuda.get_device_name(device)} has compute capability {found}, the kernels need 8.0"
        return None
    if INTERPRETED or device.type == "meta":
        return None
    return f"Triton kernels run on a GPU, and the model is on {device}"


def why_not(spec: PatchEmbedSpec | StageSpec, dtype: torch.dtype) -> str | None:
    """Why the kernels don't cover a module, None where they do."""
    if dtype not in DTYPES:
        return f"no Triton kernels for {str(dtype).removeprefix('torch.')}"
    if isinstance(spec, PatchEmbedSpec):
        channels = spec.proj.out_channels
        return None if channels <= LARGEST_PATCH_EMBED else f"no Triton kernel for patches of {channels} channels"
    if spec.merge is not None and spec.merge.reduction.bias is not None:
        return "no Triton kernel for a patch merging with a bias"
    for block in spec.blocks:
        tokens, channels = block.window[0] * block.window[1], block.qkv.in_features
        if tokens > LARGEST_WINDOW:
            return f"no Triton kernel for windows of {block.window[0]}x{block.window[1]} tokens"
        if channels // block.num_heads > LARGEST_HEAD_DIM:
            return f"no Triton kernel for heads of {channels // block.num_heads} channels"
        if channels > LARGEST_CHANNELS:
            return f"no Triton kernels for {channels} channels"
    return None


def derive_patch_embed(spec: PatchEmbedSpec, traced: bool, autocast: torch.dtype | None) -> PatchEmbedTables:
    """What patch_embed needs of the parameters."""
    dtype, stream = _dtypes(spec.proj, autocast)
    norm = None if spec.norm is None else _norm(spec.norm, stream)
    return PatchEmbedTables(*_linear(spec.proj, spec.proj.bias, dtype), norm)


def patch_embed(
    spec: PatchEmbedSpec,
    tables: PatchEmbedTables,
    images: Tensor,
    image_scale: ImageScale | None,
    out: Tensor | None = None,
) -> Tensor:
    """Images [B, in_chans, H, W] of any strides and dtype to tokens [B, H / ph, W / pw, C], out where it is given."""
    scale = shift = None
    if images.dtype == torch.uint8:
        scale, shift = _scale_and_shift(image_scale, images.device)
    elif images.dtype not in IMAGE_DTYPES:
        images = images.to(tables.weight.dtype)
    with without_autocast(images.device):
        arguments = images, tables.weight, tables.bias, *(tables.norm or (None, None, 1e-5)), scale, shift
        return embed(*arguments) if out is None else embed_into(out, *arguments)


@constant
def _scale_and_shift(image_scale: ImageScale, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and summand that normalise uint8 pixels."""
    scales = [(1 / (255 * std), -mean / std) for mean, std in zip(*image_scale, strict=True)]
    scale, shift = (vector(values, device) for values in zip(*scales, strict=True))
    return scale, shift


def derive_stage(spec: StageSpec, traced: bool, autocast: torch.dtype | None) -> StageTables:
    """What stage needs of the parameters."""
    dtype, stream = _dtypes(spec.blocks[0].qkv, autocast)
    merge = None
    if spec.merge is not None:
        reduction = spec.merge.reduction.weight.to(dtype).contiguous()
        merge = Merge(_norm(spec.merge.norm, stream), reduction, spec.merge.norm_last)
    return StageTables(stream, merge, tuple(_derive_block(block, dtype, stream) for block in spec.blocks))


def _dtypes(layer: nn.Linear | nn.Conv2d, autocast: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of matrix products and of the residual stream."""
    dtype = layer.weight.dtype
    return (dtype, dtype) if autocast is None else (autocast, torch.float32)


def _derive_block(block: BlockSpec, dtype: torch.dtype, stream: torch.dtype) -> Block:
    channels, device = block.qkv.in_features, block.qkv.weight.device
    forms = forms_of(channels, block.window, dtype, device)
    mlp = tuple(
        p.contiguous()
        for layer in (block.bias_fc1, block.bias_fc2)
        for p in _biased(layer, layer.bias, layer.weight.dtype)
    )
    return Block(
        window_size=block.window,
        shift_size=block.shift,
        forms=forms,
        table=bias_table(forms, mlp, channels // block.num_heads, block.window, block.shift, dtype, block.bias_span),
        logit_scale=block.logit_scale().to(stream),
        qkv=_biased(block.qkv, block.qkv_bias(), dtype),
        proj=_biased(block.proj, block.proj.bias, dtype),
        norm1=_norm(block.norm1, stream),
        fc1=_biased(block.fc1, block.fc1.bias, dtype),
        fc2=_biased(block.fc2, block.fc2.bias, dtype),
        norm2=_norm(block.norm2, stream),
        norm3=None if block.norm3 is None else _norm(block.norm3, stream),
    )


def stage(spec: StageSpec, tables: StageTables, x: Tensor) -> Tensor:
    """One stage. x [B, H, W, C] to [B, H', W', C'], contiguous, in the dtype of x."""
    given = x.dtype
    with without_autocast(x.device):
        held = [x.to(tables.dtype).contiguous()]
        del x  # what is handed on can be freed there
        if tables.merge is not None:
            held = [run_merge(tables.merge, held.pop())]
        return run_blocks(tables.blocks, held.pop()).to(given)


def describe(spec: PatchEmbedSpec | MergeSpec | BlockSpec, dtype: torch.dtype, device: torch.device) -> str:
    """Which kernels run a module with parameters of this dtype on this device, in words for the report."""
    if isinstance(spec, BlockSpec):
        forms = forms_of(spec.qkv.in_features, spec.window, dtype, device)
        kernels = " + ".join(dict.fromkeys(forms.operations()))
    elif isinstance(spec, MergeSpec):
        kernels = "merge_norm + linear" + (" + norm_residual" if spec.norm_last else "")
    else:
        kernels = "patch_embed"
    return f"Triton, {arch_of(device)}, {str(dtype).removeprefix('torch.')}: {kernels}"


def _linear(layer: nn.Linear | nn.Conv2d, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """Weights in a dtype, contiguous: no copy where they are so already."""
    bias = None if bias is None else bias.to(dtype).contiguous()
    return Linear(layer.weight.to(dtype).contiguous(), bias)


def _biased(layer: nn.Linear, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """As _linear; a bias that is missing is zero."""
    weight, bias = _linear(layer, bias, dtype)
    return Linear(weight, weight.new_zeros(len(weight)) if bias is None else bias)


def _norm(norm: nn.LayerNorm, dtype: torch.dtype) -> Norm:
    like = {"dtype": dtype, "device": norm.weight.device if norm.weight is not None else None}
    weight = torch.ones(norm.normalized_shape, **like) if norm.weight is None else norm.weight.to(dtype).contiguous()
    bias = torch.zeros_like(weight) if norm.bias is None else norm.bias.to(dtype).contiguous()
    return Norm(weight, bias, norm.eps)
