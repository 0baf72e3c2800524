"""What both families have in common: the parameters of a patch embedding and of MLPs, windows that fit their map, the
head, and the classifier around the stages."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, _assert, nn

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


class PatchEmbedding(nn.Module):
    """The parameters of a patch embedding, and which images it takes."""

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

    def check(self, x: Tensor) -> None:
        """Refuse images of another size, where the model has one."""
        if self.strict_img_size:
            for axis, got, expected in zip(("height", "width"), x.shape[-2:], self.img_size, strict=True):
                if got != expected:
                    raise AssertionError(f"Input image {axis} ({got}) doesn't match model ({expected}).")


class Mlp(nn.Module):
    """The parameters of a two-layer MLP."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int, act: nn.Module, **dd):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features, **dd)
        self.act = act
        self.fc2 = nn.Linear(hidden_features, out_features, **dd)

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias


class Windowed(nn.Module):
    """A block's window and shift. Its ``attn`` is told of the window.

    A map not larger than its window shrinks the window to the map and drops the shift, unless always_partition.
    """

    def __init__(self, feat_size: Size, window_size: Size, shift: bool, always_partition: bool):
        super().__init__()
        self.shift = shift and any(w // 2 for w in window_size)  # as timm: windows may grow, a shift can't appear
        self.always_partition = always_partition
        self._set_window(feat_size, window_size)

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


class Stage(nn.Module):
    """Patch merging, but for the first stage; its subclasses add the blocks."""

    merging: type[nn.Module]

    def __init__(self, dim: int, downscale: bool, feat_size: Size, norm_layer, **dd):
        super().__init__()
        self.downscale = downscale
        self.downsample = self.merging(dim, norm_layer, **dd) if downscale else nn.Identity()
        self.feat_size = halve(feat_size) if downscale else feat_size

    def set_input_size(self, feat_size: Size, window_size: Size, always_partition: bool | None = None) -> None:
        """feat_size: (H, W) of the stage's input, before merging."""
        self.feat_size = halve(feat_size) if self.downscale else feat_size
        for block in self.blocks:
            block.set_input_size(self.feat_size, window_size, always_partition)


class ClassifierHead(nn.Module):
    """Global pooling, then a linear classifier (Identity for num_classes=0)."""

    POOLS = ("", "avg", "max", "avgmax", "catavgmax")

    def __init__(self, in_features: int, num_classes: int, pool_type: str, over: Size, **dd):
        """over: The two dimensions of a map that are pooled."""
        super().__init__()
        self.in_features = in_features
        self.over = over
        self.pool_type = self._known(pool_type)
        self.reset(num_classes, **dd)

    def reset(self, num_classes: int, pool_type: str | None = None, **dd) -> None:
        if pool_type is not None:
            self.pool_type = self._known(pool_type)
        self.num_features = self.in_features * (2 if self.pool_type == "catavgmax" else 1)
        fc = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.fc = fc.train(self.training)

    def _known(self, pool_type: str) -> str:
        pool = pool_type
        if isinstance(pool, str) and pool.startswith("fast"):  # timm: a way to compute it
            pool = pool.removeprefix("fast") or "avg"
        if pool not in self.POOLS:
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, self.POOLS))}, got {pool_type!r}")
        return pool

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self._pool(x)
        return x if pre_logits else self.fc(x)

    def _pool(self, x: Tensor) -> Tensor:
        if self.pool_type == "":
            return x
        if self.pool_type == "avg":
            return x.mean(self.over)
        if self.pool_type == "max":
            return x.amax(self.over)
        if self.pool_type == "avgmax":
            return 0.5 * (x.mean(self.over) + x.amax(self.over))
        return torch.cat([x.mean(self.over), x.amax(self.over)], dim=1)


class Classifier(nn.Module):
    """Patch embedding, stages, head: what its subclasses fill in, and all that can be asked of a model.

    Args:
        img_size, patch_size, window_size, in_chans, num_classes, embed_dim, depths, num_heads, global_pool, norm_layer,
            device, dtype: As in the subclasses.
        window_ratio: The patch grid over the window, where window_size is None.
        any_size: Take images of any size.
        stage_options: Of a stage by its number and the number of stages: more arguments for it.
        **block: Arguments that all stages take for their blocks.
    """

    embedding: type[nn.Module]
    stage: type[nn.Module]
    stages_name: str
    channels_first: bool  # whether maps are [B, C, H, W], else [B, H, W, C]
    last_norm = False  # whether a norm follows the stages

    def __init__(
        self,
        img_size: int | Size,
        patch_size: int | Size,
        window_size: WindowSize | None,
        window_ratio: int | Sequence[int] | None,
        any_size: bool,
        in_chans: int,
        num_classes: int,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        global_pool: str,
        norm_layer: Callable[..., nn.LayerNorm],
        stage_options: Callable[[int, int], dict],
        device,
        dtype,
        **block,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if not isinstance(probe := norm_layer(1, device="meta"), nn.LayerNorm):
            raise TypeError(f"norm_layer must make a torch.nn.LayerNorm, it made a {type(probe).__name__}")
        self.dynamic_img_size = any_size
        depths = stage_numbers("depths", depths, 0)
        num_heads = stage_numbers("num_heads", num_heads, 1, len(depths))
        self.img_size = image_size(img_size)
        self.num_classes = whole_number("num_classes", num_classes, 0)
        self.in_chans = whole_number("in_chans", in_chans, 1)
        self.patch_size = patch_size
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.patch_embed = self.embedding(
            self.img_size, patch_size, in_chans, embed_dim, norm_layer, not any_size, **dd
        )
        grid = self.patch_embed.grid_size
        if window_size is None:
            windows = windows_from_ratio(grid, window_ratio, len(depths))
        else:
            windows = stage_windows(window_size, len(depths))
        self._window_reference = windows, grid
        self.feature_info = []
        stages = []
        for index, (depth, heads, window) in enumerate(zip(depths, num_heads, windows, strict=True)):
            stages.append(self.stage(
                embed_dim * 2 ** max(index - 1, 0), depth, downscale=index > 0, feat_size=stage_input(grid, index),
                num_heads=heads, window_size=window, norm_layer=norm_layer, **stage_options(index, len(depths)),
                **block, **dd,
            ))  # fmt: skip
            self.feature_info.append(
                {
                    "num_chs": embed_dim * 2**index,
                    "reduction": max(pair(patch_size)) * 2**index,
                    "module": f"{self.stages_name}.{index}",
                }
            )
        setattr(self, self.stages_name, nn.Sequential(*stages))
        over = (2, 3) if self.channels_first else (1, 2)
        if self.last_norm:
            self.norm = norm_layer(self.num_features, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, over, **dd)
        self.head_hidden_size = self.head.num_features

    def all_stages(self) -> nn.Sequential:
        return getattr(self, self.stages_name)

    def set_input_size(
        self,
        img_size: int | Size | None = None,
        window_size: WindowSize | None = None,
        window_ratio: int | Sequence[int] | None = None,
        always_partition: bool | None = None,
    ) -> None:
        """Change the image size and the windows; arguments as in the constructor, None keeps what is.

        With neither window_size nor window_ratio, which is the patch grid over the window, one int or one per stage,
        each stage keeps its ratio of window to patch grid.
        """
        count = len(self.all_stages())
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
        for index, (stage, window) in enumerate(zip(self.all_stages(), windows, strict=True)):
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
            norm: Take the last stage's features after the norm that follows it, where the model has one.
            stop_early: Leave out the stages after the last one asked for.
            output_fmt: "NCHW".
            intermediates_only: Return the features alone, not (what forward_features returns, features); stopped early,
                it is the last computed stage's output.
        """
        _assert(output_fmt == "NCHW", "Output shape must be NCHW.")
        stages = self.all_stages()
        taken = take_indices(len(stages), indices)
        x = self.patch_embed(x)
        features = []
        for index, stage in enumerate(stages[: max(taken) + 1] if stop_early else stages):
            x = stage(x)
            ended = self._after_stages(x) if index == len(stages) - 1 else x
            if index in taken:
                features.append(self._channels_first(ended if norm else x))
        return features if intermediates_only else (ended, features)

    def _after_stages(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.last_norm else x

    def _channels_first(self, x: Tensor) -> Tensor:
        """A map of the model's as [B, C, H, W]."""
        return x if self.channels_first else x.permute(0, 3, 1, 2).contiguous()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to the last map, [B, num_features, H', W'] in CR and [B, H', W', num_features] in
        V2."""
        return self._after_stages(self.all_stages()(self.patch_embed(x)))

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


def norm_of(layer: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """LayerNorm's (weight, bias, eps) as ops take it, None for none."""
    return (layer.weight, layer.bias, layer.eps) if isinstance(layer, nn.LayerNorm) else None
