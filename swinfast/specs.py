"""What a backend needs to know of a module that it runs: sizes, and the modules that own the parameters.

A spec holds modules, never tensors, so that it stays true when weights are edited, moved or replaced.
"""

from typing import NamedTuple

from torch import nn

Size = tuple[int, int]
ImageScale = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, to normalise uint8 images with


class PatchEmbedSpec(NamedTuple):
    """Image to patch embedding."""

    proj: nn.Conv2d
    norm: nn.LayerNorm | None
    img_size: Size | None  # None: any size


class MergeSpec(NamedTuple):
    """2x2 patch merging: LayerNorm over 4C, then a linear reduction to 2C."""

    norm: nn.LayerNorm
    reduction: nn.Linear


class BlockSpec(NamedTuple):
    """One residual post-norm block."""

    window: Size
    shift: Size
    num_heads: int
    qkv: nn.Linear
    logit_scale_owner: nn.Module  # its .logit_scale is the parameter, [heads]
    bias_fc1: nn.Linear
    bias_fc2: nn.Linear
    proj: nn.Linear
    norm1: nn.LayerNorm
    fc1: nn.Linear
    fc2: nn.Linear
    norm2: nn.LayerNorm
    norm3: nn.LayerNorm | None


class StageSpec(NamedTuple):
    """Patch merging, where a stage begins with it, and its blocks."""

    merge: MergeSpec | None
    blocks: tuple[BlockSpec, ...]
