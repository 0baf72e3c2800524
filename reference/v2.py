"""Swin Transformer V2 as its authors published it, in plain PyTorch: the classes and parameters of timm's
``swin_transformer_v2`` under the same names, for inference (there is no dropout).

Between its parts maps are [B, H, W, C]. It differs from the CR variant in this: the position bias is bounded and of
offsets that are scaled by a window's size, which may be that of the training; k has no bias; the norm of patch merging
comes after its reduction; there is one more norm before the head, and no third one in blocks.

Source: Liu et al., "Swin Transformer V2" (arXiv:2111.09883).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import ops
from .classifier import Classifier, Mlp, PatchEmbedding, Stage, Windowed, norm_of
from .sizes import Size, WindowSize, pair


class PatchEmbed(PatchEmbedding):
    """Image to patch embedding: a strided convolution and LayerNorm. [B, in_chans, H, W] to [B, H / p, W / p, C]."""

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        for axis, got, patch in zip(("height", "width"), x.shape[-2:], self.patch_size, strict=True):
            if not self.strict_img_size and got % patch:
                raise AssertionError(f"Input image {axis} ({got}) should be divisible by patch size ({patch}).")
        return ops.patch_embed(x, self.proj.weight, self.proj.bias, norm_of(self.norm))


class WindowAttention(nn.Module):
    """The parameters of scaled cosine attention with a bounded position bias."""

    def __init__(self, dim, num_heads, window_size: Size, pretrained_window_size: Size, qkv_bias: bool, **dd):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the channels, got {num_heads} heads for {dim} channels")
        self.num_heads = num_heads
        self.window_size = window_size
        self.pretrained_window_size = pretrained_window_size
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0), **dd))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 512, **dd), nn.ReLU(inplace=True), nn.Linear(512, num_heads, bias=False, **dd)
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.q_bias = nn.Parameter(torch.zeros(dim, **dd)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim, **dd)) if qkv_bias else None
        self.proj = nn.Linear(dim, dim, **dd)

    def qkv_bias(self) -> Tensor:
        """[3C]; k has none."""
        if self.q_bias is None:
            return self.qkv.weight.new_zeros(len(self.qkv.weight))
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))

    def position_bias(self, shift_size: Size) -> Tensor:
        """[4, heads, N, N], with the mask."""
        fc1, _, fc2 = self.cpb_mlp
        span = self.pretrained_window_size if self.pretrained_window_size[0] > 0 else self.window_size
        return ops.cpb_bias(fc1.weight, fc1.bias, fc2.weight, None, self.window_size, shift_size, span)


class SwinTransformerV2Block(Windowed):
    """One block, residual post-norm: attention half, MLP half."""

    def __init__(
        self, dim, num_heads, feat_size, window_size, shift, always_partition, mlp_ratio, qkv_bias,
        pretrained_window_size, norm_layer, **dd,
    ):  # fmt: skip
        super().__init__(feat_size, window_size, shift, always_partition)
        self.attn = WindowAttention(dim, num_heads, self.window_size, pretrained_window_size, qkv_bias, **dd)
        self.norm1 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dim, nn.GELU(), **dd)
        self.norm2 = norm_layer(dim, **dd)
        for norm in (self.norm1, self.norm2):
            nn.init.zeros_(norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        attn, window, shift = self.attn, self.window_size, self.shift_size
        x = ops.attention_block(
            x, attn.qkv.weight, attn.qkv_bias(), attn.logit_scale.flatten(), attn.position_bias(shift),
            attn.proj.weight, attn.proj.bias, norm_of(self.norm1), window, shift,
        )  # fmt: skip
        return ops.mlp_block(x, *self.mlp.weights(), norm_of(self.norm2))


class PatchMerging(nn.Module):
    """2x2 neighbourhoods to one token. [B, H, W, C] to [B, ceil(H / 2), ceil(W / 2), 2C]."""

    def __init__(self, dim: int, norm_layer, **dd):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **dd)
        self.norm = norm_layer(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return ops.patch_merging(x, norm_of(self.norm), self.reduction.weight, norm_last=True)


class SwinTransformerV2Stage(Stage):
    """Patch merging (but for the first stage), then blocks, every second one shifted. [B, H, W, C] in and out."""

    merging = PatchMerging

    def __init__(self, dim, depth, downscale, feat_size, norm_layer, **block):
        super().__init__(dim, downscale, feat_size, norm_layer, device=block["device"], dtype=block["dtype"])
        self.blocks = nn.ModuleList([
            SwinTransformerV2Block(
                2 * dim if downscale else dim, feat_size=self.feat_size, shift=index % 2 == 1, norm_layer=norm_layer,
                **block,
            )
            for index in range(depth)
        ])  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class SwinTransformerV2(Classifier):
    """Swin Transformer V2.

    Args:
        img_size: Image size, an int or (H, W).
        patch_size: Patch size, an int or (h, w).
        in_chans, num_classes, embed_dim, depths, num_heads, mlp_ratio, qkv_bias: The architecture.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none.
        window_size: Window in tokens: one int, one (h, w), or one of either per stage.
        always_partition: Keep window and shift where the map is not larger than the window.
        strict_img_size: Refuse images of another size (AssertionError).
        dynamic_img_size: Take images of any whole number of patches; the same as strict_img_size=False.
        norm_layer: torch.nn.LayerNorm, or a partial of it with another eps.
        pretrained_window_sizes: For each stage the window (an int or a pair) that it was trained with, 0 for its own.
        device, dtype: Of the parameters.
    """

    embedding, stage, stages_name = PatchEmbed, SwinTransformerV2Stage, "layers"
    channels_first = False
    last_norm = True

    def __init__(
        self,
        img_size: int | Size = 224,
        patch_size: int | Size = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: WindowSize = 7,
        always_partition: bool = False,
        strict_img_size: bool = True,
        dynamic_img_size: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_layer: Callable[..., nn.LayerNorm] = nn.LayerNorm,
        pretrained_window_sizes: Sequence[int | Size] = (0, 0, 0, 0),
        device=None,
        dtype=None,
    ):
        def options(index: int, count: int) -> dict:
            if len(pretrained_window_sizes) < count:
                raise ValueError(
                    f"pretrained_window_sizes must have one for each of {count} stages, got {pretrained_window_sizes!r}"
                )
            return {"pretrained_window_size": pair(pretrained_window_sizes[index])}

        super().__init__(
            img_size, patch_size, window_size, None, dynamic_img_size or not strict_img_size, in_chans, num_classes,
            embed_dim, depths, num_heads, global_pool, norm_layer, options, device, dtype,
            always_partition=always_partition, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias,
        )  # fmt: skip

    def set_input_size(
        self,
        img_size: int | Size | None = None,
        patch_size: int | Size | None = None,
        window_size: WindowSize | None = None,
        window_ratio: int | Sequence[int] | None = None,
        always_partition: bool | None = None,
    ) -> None:
        """As Classifier's; patch_size must be what it is."""
        if patch_size is not None and pair(patch_size) != self.patch_embed.patch_size:
            raise ValueError(f"patch_size can't be changed from {self.patch_embed.patch_size}, got {patch_size!r}")
        super().set_input_size(img_size, window_size, window_ratio, always_partition)
