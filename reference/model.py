"""Swin Transformer V2, the CR variant, in plain PyTorch: the classes and parameters of timm's
``swin_transformer_v2_cr`` under the same names, for inference (there is no dropout).

Images flow one way: patch embedding, stages (patch merging, blocks), pooling, head. Between stages tensors are
[B, C, H, W] views of [B, H, W, C] memory. What each step computes is defined in ``ops``.

Source: Liu et al., "Swin Transformer V2" (arXiv:2111.09883).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, _assert, nn

from . import ops
from .sizes import (
    Size,
    WindowSize,
    halve,
    image_size,
    pair,
    stage_input,
    stage_numbers,
    stage_ratios,
    stage_windows,
    whole_number,
    windows_from_ratio,
)


class PatchEmbed(nn.Module):
    """Image to patch embedding: a strided convolution and LayerNorm. [B, in_chans, H, W] to [B, C, H / p, W / p]."""

    def __init__(self, img_size: Size, patch_size: int | Size, in_chans, embed_dim, norm_layer, strict_img_size, **dd):
        super().__init__()
        self.img_size = img_size
        self.patch_size = pair(patch_size)
        self.strict_img_size = strict_img_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size, **dd)
        self.norm = norm_layer(embed_dim, **dd)

    @property
    def grid_size(self) -> Size:
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    def forward(self, x: Tensor) -> Tensor:
        if self.strict_img_size:
            for axis, got, expected in zip(("height", "width"), x.shape[-2:], self.img_size, strict=True):
                if got != expected:
                    raise AssertionError(f"Input image {axis} ({got}) doesn't match model ({expected}).")
        return ops.patch_embed(x, self.proj.weight, self.proj.bias, _norm(self.norm)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
    """The parameters of a two-layer MLP."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int, act: nn.Module, **dd):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features, **dd)
        self.act = act
        self.fc2 = nn.Linear(hidden_features, out_features, **dd)

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias


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


class SwinTransformerV2CrBlock(nn.Module):
    """One block, residual post-norm: attention half, MLP half, and norm3 on the sum where the model has one.

    A map not larger than its window shrinks the window to the map and drops the shift, unless always_partition.
    """

    def __init__(
        self, dim, num_heads, feat_size, window_size, shift, always_partition, mlp_ratio, init_values, extra_norm,
        norm_layer, **dd,
    ):  # fmt: skip
        super().__init__()
        self.shift = shift and any(w // 2 for w in window_size)  # as timm: windows may grow, a shift can't appear
        self.always_partition = always_partition
        self._set_window(feat_size, window_size)
        self.attn = WindowMultiHeadAttention(dim, num_heads, self.window_size, **dd)
        self.norm1 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dim, nn.GELU(), **dd)
        self.norm2 = norm_layer(dim, **dd)
        self.norm3 = norm_layer(dim, **dd) if extra_norm else nn.Identity()
        if init_values is not None:
            nn.init.constant_(self.norm1.weight, init_values)
            nn.init.constant_(self.norm2.weight, init_values)

    def _set_window(self, feat_size: Size, window_size: Size) -> None:
        shift_size = tuple(w // 2 for w in window_size) if self.shift else (0, 0)
        if not self.always_partition:
            shift_size = tuple(0 if f <= w else s for f, w, s in zip(feat_size, window_size, shift_size, strict=True))
            window_size = tuple(min(f, w) for f, w in zip(feat_size, window_size, strict=True))
        self.feat_size, self.window_size, self.shift_size = feat_size, window_size, shift_size

    def set_input_size(self, feat_size: Size, window_size: Size, always_partition: bool | None = None) -> None:
        if always_partition is not None:
            self.always_partition = always_partition
        self._set_window(feat_size, window_size)
        self.attn.window_size = self.window_size

    def forward(self, x: Tensor) -> Tensor:
        attn, window, shift = self.attn, self.window_size, self.shift_size
        bias = ops.cpb_bias(*attn.meta_mlp.weights(), window, shift)
        x = ops.attention_block(
            x, attn.qkv.weight, attn.qkv.bias, attn.logit_scale, bias, attn.proj.weight, attn.proj.bias,
            _norm(self.norm1), window, shift,
        )  # fmt: skip
        return ops.mlp_block(x, *self.mlp.weights(), _norm(self.norm2), _norm(self.norm3))


class PatchMerging(nn.Module):
    """2x2 neighbourhoods to one token. [B, H, W, C] to [B, ceil(H / 2), ceil(W / 2), 2C]."""

    def __init__(self, dim: int, norm_layer, **dd):
        super().__init__()
        self.norm = norm_layer(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return ops.patch_merging(x, _norm(self.norm), self.reduction.weight)


class SwinTransformerV2CrStage(nn.Module):
    """Patch merging (but for the first stage), then blocks, every second one shifted. [B, C, H, W] in and out."""

    def __init__(self, dim, depth, downscale, feat_size, extra_norm_period, extra_norm_stage, norm_layer, **block):
        super().__init__()
        dd = {key: block[key] for key in ("device", "dtype")}
        self.downscale = downscale
        self.downsample = PatchMerging(dim, norm_layer, **dd) if downscale else nn.Identity()
        self.feat_size = halve(feat_size) if downscale else feat_size

        def extra_norm(number: int) -> bool:
            return bool(extra_norm_period and number % extra_norm_period == 0) or (extra_norm_stage and number == depth)

        self.blocks = nn.Sequential(*[
            SwinTransformerV2CrBlock(
                2 * dim if downscale else dim, feat_size=self.feat_size, shift=index % 2 == 1,
                extra_norm=extra_norm(index + 1), norm_layer=norm_layer, **block,
            )
            for index in range(depth)
        ])  # fmt: skip

    def set_input_size(self, feat_size: Size, window_size: Size, always_partition: bool | None = None) -> None:
        """feat_size: (H, W) of the stage's input, before merging."""
        self.feat_size = halve(feat_size) if self.downscale else feat_size
        for block in self.blocks:
            block.set_input_size(self.feat_size, window_size, always_partition)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x.permute(0, 2, 3, 1))
        return self.blocks(x).permute(0, 3, 1, 2)


class ClassifierHead(nn.Module):
    """Global pooling, then a linear classifier (Identity for num_classes=0)."""

    POOLS = ("", "avg", "max", "avgmax", "catavgmax")

    def __init__(self, in_features: int, num_classes: int, pool_type: str, **dd):
        super().__init__()
        self.in_features = in_features
        self.reset(num_classes, pool_type, **dd)

    def reset(self, num_classes: int, pool_type: str | None = None, **dd) -> None:
        if pool_type is not None:
            pool = pool_type.removeprefix("fast") or ("avg" if pool_type else "")  # timm: "fast" is a way to compute it
            if pool not in self.POOLS:
                raise ValueError(f"global_pool must be one of {', '.join(map(repr, self.POOLS))}, got {pool_type!r}")
            self.pool_type = pool
        self.num_features = self.in_features * (2 if self.pool_type == "catavgmax" else 1)
        fc = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.fc = fc.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self._pool(x)
        return x if pre_logits else self.fc(x)

    def _pool(self, x: Tensor) -> Tensor:
        if self.pool_type == "":
            return x
        if self.pool_type == "avg":
            return x.mean((2, 3))
        if self.pool_type == "max":
            return x.amax((2, 3))
        if self.pool_type == "avgmax":
            return 0.5 * (x.mean((2, 3)) + x.amax((2, 3)))
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)


class SwinTransformerV2Cr(nn.Module):
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
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if not isinstance(probe := norm_layer(1, device="meta"), nn.LayerNorm):
            raise TypeError(f"norm_layer must make a torch.nn.LayerNorm, it made a {type(probe).__name__}")
        strict_img_size = strict_img_size and not dynamic_img_size
        self.dynamic_img_size = not strict_img_size
        depths = stage_numbers("depths", depths, 0)
        num_heads = stage_numbers("num_heads", num_heads, 1, len(depths))
        self.img_size = image_size(img_size)
        self.num_classes = whole_number("num_classes", num_classes, 0)
        self.in_chans = whole_number("in_chans", in_chans, 1)
        self.patch_size = patch_size
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.patch_embed = PatchEmbed(self.img_size, patch_size, in_chans, embed_dim, norm_layer, strict_img_size, **dd)
        grid = self.patch_embed.grid_size
        if window_size is None:
            windows = windows_from_ratio(grid, window_ratio, len(depths))
        else:
            windows = stage_windows(window_size, len(depths))
        self._window_reference = windows, grid
        self.feature_info = []
        stages = []
        for index, (depth, heads, window) in enumerate(zip(depths, num_heads, windows, strict=True)):
            stages.append(SwinTransformerV2CrStage(
                embed_dim * 2 ** max(index - 1, 0), depth, downscale=index > 0, feat_size=stage_input(grid, index),
                num_heads=heads, window_size=window, always_partition=always_partition, mlp_ratio=mlp_ratio,
                init_values=init_values, norm_layer=norm_layer, extra_norm_period=extra_norm_period,
                extra_norm_stage=extra_norm_stage or index == len(depths) - 1, **dd,
            ))  # fmt: skip
            self.feature_info.append(
                {
                    "num_chs": embed_dim * 2**index,
                    "reduction": max(pair(patch_size)) * 2**index,
                    "module": f"stages.{index}",
                }
            )
        self.stages = nn.Sequential(*stages)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, **dd)
        self.head_hidden_size = self.head.num_features

    def set_input_size(
        self,
        img_size: int | Size | None = None,
        window_size: WindowSize | None = None,
        window_ratio: int | Sequence[int] | None = None,
        always_partition: bool | None = None,
    ) -> None:
        """Change the image size and the windows; arguments as in the constructor, None keeps what is.

        With neither window_size nor window_ratio each stage keeps its ratio of window to patch grid.
        """
        count = len(self.stages)
        windows = None if window_size is None else stage_windows(window_size, count)
        ratios = None if window_ratio is None else stage_ratios(window_ratio, count)
        if img_size is not None:
            self.img_size = self.patch_embed.img_size = image_size(img_size)
        grid = self.patch_embed.grid_size
        if windows is None and ratios is not None:
            windows = windows_from_ratio(grid, ratios, count)
        if windows is not None:
            self._window_reference = windows, grid
        else:
            reference, reference_grid = self._window_reference
            windows = tuple(
                tuple(max(1, w * g // r) for w, g, r in zip(window, grid, reference_grid, strict=True))
                for window in reference
            )
        for index, (stage, window) in enumerate(zip(self.stages, windows, strict=True)):
            stage.set_input_size(stage_input(grid, index), window, always_partition)

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for num_classes (0: none), with another pooling where global_pool is given."""
        weight = self.patch_embed.proj.weight
        self.num_classes = whole_number("num_classes", num_classes, 0)
        self.head.reset(num_classes, global_pool, device=weight.device, dtype=weight.dtype)
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of chosen stages, [B, C, H, W] each.

        Args:
            x: Images [B, in_chans, H, W].
            indices: The last n stages, a list of stages (negative from the end), or None for all.
            norm: Without effect, as in timm: the stages hold their own norms.
            stop_early: Leave out the stages after the last one asked for.
            output_fmt: "NCHW".
            intermediates_only: Return the features alone, not (last stage's output, features).
        """
        _assert(output_fmt == "NCHW", "Output shape must be NCHW.")
        taken = take_indices(len(self.stages), indices)
        x = self.patch_embed(x)
        features = []
        for index, stage in enumerate(self.stages[: max(taken) + 1] if stop_early else self.stages):
            x = stage(x)
            if index in taken:
                features.append(x)
        return features if intermediates_only else (x, features)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to the last stage's map [B, num_features, H', W']."""
        return self.stages(self.patch_embed(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map to logits [B, num_classes], or with pre_logits to the pooled embedding [B, num_features]."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def take_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Which of count stages are meant: the last n for an int, all for None; negative ones count from the end."""
    if indices is None or isinstance(indices, int):
        last = count if indices is None else indices
        _assert(0 < last <= count, f"last-n ({last}) is out of range (1 to {count})")
        return list(range(count - last, count))
    taken = [count + index if index < 0 else index for index in indices]
    for index in taken:
        _assert(0 <= index < count, f"feature index {index} is out of range (0 to {count - 1})")
    return taken


def _norm(layer: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    return (layer.weight, layer.bias, layer.eps) if isinstance(layer, nn.LayerNorm) else None
