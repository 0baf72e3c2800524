"""What a backend needs to know of a module that it runs: sizes, and the modules that own the parameters.

A spec holds modules, never tensors, so that it stays true when weights are edited, moved or replaced.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

Size = tuple[int, int]
ImageScale = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, to normalise uint8 images with


class PatchEmbedSpec(NamedTuple):
    """Image to patch embedding."""

    proj: nn.Conv2d
    norm: nn.LayerNorm | None
    img_size: Size | None  # None: any size
    whole_patches: bool  # whether images must be; else what is left over is cut off


class MergeSpec(NamedTuple):
    """2x2 patch merging: a linear reduction from 4C to 2C, with LayerNorm before it or after."""

    norm: nn.LayerNorm
    reduction: nn.Linear
    norm_last: bool


class BlockSpec(NamedTuple):
    """One residual post-norm block."""

    window: Size
    shift: Size
    num_heads: int
    qkv: nn.Linear
    logit_scale_owner: nn.Module  # its .logit_scale is the parameter, of as many numbers as heads
    proj: nn.Linear
    norm1: nn.LayerNorm
    fc1: nn.Linear
    fc2: nn.Linear
    norm2: nn.LayerNorm
    qkv_bias_owner: nn.Module | None  # of .q_bias and .v_bias, where k has none; None where qkv has its own
    bias_fc1: nn.Linear  # of the MLP that makes the position bias
    bias_fc2: nn.Linear
    bias_span: Size | None  # the window whose offsets span -8 to 8, in the bounded form of the bias; None in the plain
    norm3: nn.LayerNorm | None

    def logit_scale(self) -> Tensor:
        """[heads]."""
        return self.logit_scale_owner.logit_scale.flatten()

    def qkv_bias(self) -> Tensor | None:
        """[3C]."""
        owner = self.qkv_bias_owner
        if owner is None:
            return self.qkv.bias
        q_bias = owner.q_bias
        return None if q_bias is None else torch.cat((q_bias, torch.zeros_like(q_bias), owner.v_bias))


class StageSpec(NamedTuple):
    """Patch merging, where a stage begins with it, and its blocks."""

    merge: MergeSpec | None
    blocks: tuple[BlockSpec, ...]
