"""Swin Transformer V2, the CR variant, in plain PyTorch: the classes and parameters of timm's
``swin_transformer_v2_cr`` under the same names, for inference (there is no dropout).

Images flow one way: patch embedding, stages (patch merging, blocks), pooling, head. Between stages tensors are
[B, C, H, W] views of [B, H, W, C] memory. What each step computes is defined in ``ops``.

Source: Liu et al., "Swin Transformer V2" (arXiv:2111.09883).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import ops
from .classifier import Classifier, Mlp, PatchEmbedding, Stage, Windowed, norm_of
from .sizes import Size, WindowSize


class PatchEmbed(PatchEmbedding):
    """Image to patch embedding: a strided convolution and LayerNorm. [B, in_chans, H, W] to [B, C, H / p, W / p]."""

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return ops.patch_embed(x, self.proj.weight, self.proj.bias, norm_of(self.norm)).permute(0, 3, 1, 2)


class WindowMultiHeadAttention(nn.Module):
    """The parameters of scaled cosine attention with a log-spaced continuous position bias."""

    def __init__(self, dim: int, num_heads: int, window_size: Size, **dd):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the channels, got {num_heads} heads for {dim} channels")
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.meta_mlp = Mlp(2, 384, num_heads, nn.ReLU(), **dd)
        self.logit_scale = nn.Parameter(torch.full((num_heads,), math.log(10.0), **dd))


class SwinTransformerV2CrBlock(Windowed):
    """One block, residual post-norm: attention half, MLP half, and norm3 on the sum where the model has one."""

    def __init__(
        self, dim, num_heads, feat_size, window_size, shift, always_partition, mlp_ratio, init_values, extra_norm,
        norm_layer, **dd,
    ):  # fmt: skip
        super().__init__(feat_size, window_size, shift, always_partition)
        self.attn = WindowMultiHeadAttention(dim, num_heads, self.window_size, **dd)
        self.norm1 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dim, nn.GELU(), **dd)
        self.norm2 = norm_layer(dim, **dd)
        self.norm3 = norm_layer(dim, **dd) if extra_norm else nn.Identity()
        if init_values is not None:
            nn.init.constant_(self.norm1.weight, init_values)
            nn.init.constant_(self.norm2.weight, init_values)

    def forward(self, x: Tensor) -> Tensor:
        attn, window, shift = self.attn, self.window_size, self.shift_size
        bias = ops.cpb_bias(*attn.meta_mlp.weights(), window, shift)
        x = ops.attention_block(
            x, attn.qkv.weight, attn.qkv.bias, attn.logit_scale, bias, attn.proj.weight, attn.proj.bias,
            norm_of(self.norm1), window, shift,
        )  # fmt: skip
        return ops.mlp_block(x, *self.mlp.weights(), norm_of(self.norm2), norm_of(self.norm3))


class PatchMerging(nn.Module):
    """2x2 neighbourhoods to one token. [B, H, W, C] to [B, ceil(H / 2), ceil(W / 2), 2C]."""

    def __init__(self, dim: int, norm_layer, **dd):
        super().__init__()
        self.norm = norm_layer(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return ops.patch_merging(x, norm_of(self.norm), self.reduction.weight)


class SwinTransformerV2CrStage(Stage):
    """Patch merging (but for the first stage), then blocks, every second one shifted. [B, C, H, W] in and out."""

    merging = PatchMerging

    def __init__(self, dim, depth, downscale, feat_size, extra_norm_period, extra_norm_stage, norm_layer, **block):
        super().__init__(dim, downscale, feat_size, norm_layer, device=block["device"], dtype=block["dtype"])

        def extra_norm(number: int) -> bool:
            return bool(extra_norm_period and number % extra_norm_period == 0) or (extra_norm_stage and number == depth)

        self.blocks = nn.Sequential(*[
            SwinTransformerV2CrBlock(
                2 * dim if downscale else dim, feat_size=self.feat_size, shift=index % 2 == 1,
                extra_norm=extra_norm(index + 1), norm_layer=norm_layer, **block,
            )
            for index in range(depth)
        ])  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x.permute(0, 2, 3, 1))
        return self.blocks(x).permute(0, 3, 1, 2)


class SwinTransformerV2Cr(Classifier):
    """Swin Transformer V2, CR variant.

    Args:
        img_size: Image size, an int or (H, W).
        patch_size: Patch size, an int or (h, w).
        window_size: Window in tokens: one int, one (h, w), or one of either per stage. Overrides window_ratio.
        window_ratio: The patch grid over the window, one int or one per stage.
        always_partition: Keep window and shift where the map is not larger than the window.
        strict_img_size: Refuse images of another size (AssertionError).
        dynamic_img_size: Take images of any size; the same as strict_img_size=False.
        in_chans, num_classes, embed_dim, depths, num_heads, mlp_ratio: The architecture.
        init_values: Initial gain of norm1 and norm2, None to leave it at 1.
        norm_layer: torch.nn.LayerNorm, or a partial of it with another eps.
        extra_norm_period: A norm3 after every so many blocks of a stage, 0 for none.
        extra_norm_stage: A norm3 at the end of every stage; the last stage always has one.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none.
        device, dtype: Of the parameters.
    """

    embedding, stage, stages_name = PatchEmbed, SwinTransformerV2CrStage, "stages"
    channels_first = True

    def __init__(
        self,
        img_size: int | Size = (224, 224),
        patch_size: int | Size = 4,
        window_size: WindowSize | None = None,
        window_ratio: int | Sequence[int] = 8,
        always_partition: bool = False,
        strict_img_size: bool = True,
        dynamic_img_size: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        init_values: float | None = 0.0,
        norm_layer: Callable[..., nn.LayerNorm] = nn.LayerNorm,
        extra_norm_period: int = 0,
        extra_norm_stage: bool = False,
        global_pool: str = "avg",
        device=None,
        dtype=None,
    ):
        def options(index: int, count: int) -> dict:
            return {"extra_norm_stage": extra_norm_stage or index == count - 1}

        super().__init__(
            img_size, patch_size, window_size, window_ratio, dynamic_img_size or not strict_img_size, in_chans,
            num_classes, embed_dim, depths, num_heads, global_pool, norm_layer, options, device, dtype,
            always_partition=always_partition, mlp_ratio=mlp_ratio, init_values=init_values,
            extra_norm_period=extra_norm_period,
        )  # fmt: skip
