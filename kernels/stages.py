"""A stage composed of the operations: which of them make up each half of a block is a choice of the tables (configs).

    attention_half: "attention_block"; or "attention_parts" with norm_residual after it; or before the projection
                    "qkv_attention", or "linear" and "window_attention"
    mlp_half:       "mlp_block"; or "mlp_parts" with norm_residual after it; or "linear" for fc1 with GELU, and fc2
    projection, mlp_output: "linear_norm_residual", or "linear" with norm_residual after it

All depend on the number of rows. But the first also decides how the table of position biases is laid out, as it says
for many rows; for few it may differ from that only by those that take both layouts.

Weights come as named tuples in one dtype; where they are from is the caller's business.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_block import attention_block
from .attention_parts import attention_parts
from .configs import MANY, at_most, config
from .cpb_bias import cpb_bias
from .launch import arch_of, precision_name
from .linear import linear
from .linear_norm_residual import linear_norm_residual
from .merge_norm import merge_norm
from .mlp_block import mlp_block
from .mlp_parts import mlp_parts
from .norm_residual import norm_residual
from .qkv_attention import qkv_attention
from .window_attention import padded_size, window_attention
from .windows import arranged, slots

BOTH_LAYOUTS = ("attention_parts", "qkv_attention")  # which tables of position biases they take
AFTER = {  # what comes after an operation that needs no choice of projection or mlp_output
    "attention_block": [],
    "attention_parts": ["norm_residual"],
    "mlp_block": [],
    "mlp_parts": ["norm_residual"],
}
Size = tuple[int, int]


class Linear(NamedTuple):
    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]


class Norm(NamedTuple):
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    eps: float


class Merge(NamedTuple):
    """Weights of a patch merging."""

    norm: Norm
    reduction: Tensor  # [2C, 4C]
    norm_last: bool  # over 2C after the reduction, else over 4C before it


class Forms(NamedTuple):
    """Which operation computes each part of a block."""

    attention_half: str
    projection: str
    mlp_half: str
    mlp_output: str

    def operations(self) -> list[str]:
        """The names of all operations, in order."""
        half = ["linear", "window_attention"] if self.attention_half == "window_attention" else [self.attention_half]
        rest = [self.mlp_half]
        for operations, end in ((half, self.projection), (rest, self.mlp_output)):
            operations += AFTER[operations[-1]] if operations[-1] in AFTER else _operations(end)
        return half + rest


def _operations(form: str) -> list[str]:
    return [form] if form == "linear_norm_residual" else ["linear", "norm_residual"]


class Block(NamedTuple):
    """One block: its windows, how it is computed, and its weights."""

    window_size: Size
    shift_size: Size
    forms: Forms  # for many rows
    table: Tensor  # of position biases, see bias_table
    logit_scale: Tensor  # [heads]
    qkv: Linear
    proj: Linear
    norm1: Norm
    fc1: Linear
    fc2: Linear
    norm2: Norm
    norm3: Norm | None


@torch.compiler.assume_constant_result
def forms_of(channels: int, window_size: Size, dtype: torch.dtype, device: torch.device, rows: int = MANY) -> Forms:
    """Which operations make up a block, by the tables."""
    arch, precision, tokens = arch_of(device), precision_name(dtype), window_size[0] * window_size[1]

    def use(part: str, rows: int = rows) -> str:
        return config(part, arch, precision, channels=channels, tokens=tokens, rows=rows).blocks["use"]

    forms = Forms(*map(use, Forms._fields))
    return forms if forms.attention_half in BOTH_LAYOUTS else forms._replace(attention_half=use("attention_half", MANY))


def bias_table(
    forms: Forms,
    mlp: tuple[Tensor, Tensor, Tensor, Tensor],
    head_dim: int,
    window_size: Size,
    shift_size: Size,
    dtype: torch.dtype,
    span: Size | None = None,
) -> Tensor:
    """The table of position biases as a block's attention in a dtype takes it.

    Args:
        forms: Those for many rows.
        mlp, span: As in cpb_bias.
    """
    apart = forms.attention_half == "window_attention"
    padded = padded_size(mlp[0].device, dtype, window_size, head_dim) if apart else [slots(window_size)] * 2
    table = cpb_bias(*mlp, list(window_size), list(shift_size), padded, dtype, span and list(span))
    return table if apart else arranged(table)


def run_blocks(blocks: Sequence[Block], x: Tensor) -> Tensor:
    """Blocks one after the other. x [B, H, W, C], contiguous, to the same.

    Here and below a name is bound anew where its tensor is not needed any more: that is what frees its memory.
    """
    for block in blocks:
        forms = _forms(block, x)
        x = _attention_half(block, forms, x)
        x = _mlp_half(block, forms, x)
    return x


def _forms(block: Block, x: Tensor) -> Forms:
    """How a block is computed for as many rows as x has; in a graph, that may be for any number, for many."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return block.forms
    channels = x.shape[-1]
    return forms_of(channels, block.window_size, block.qkv.weight.dtype, x.device, at_most(x.numel() // channels))


def _attention_half(block: Block, forms: Forms, x: Tensor) -> Tensor:
    window, shift = list(block.window_size), list(block.shift_size)
    if forms.attention_half == "attention_block":
        return attention_block(
            x, *block.qkv, block.logit_scale, block.table, *block.proj, *block.norm1, window, shift
        )  # fmt: skip
    if forms.attention_half == "attention_parts":
        parts = attention_parts(x, *block.qkv, block.logit_scale, block.table, *block.proj, window, shift)
        return norm_residual(parts, *block.norm1, x)
    if forms.attention_half == "qkv_attention":
        y = qkv_attention(x, *block.qkv, block.logit_scale, block.table, window, shift)
    else:
        y = linear(x, *block.qkv)
        y = window_attention(y, block.qkv.bias, block.logit_scale, block.table, window, shift)
    return _linear_norm_residual(forms.projection, y, block.proj, block.norm1, x, None)


def _mlp_half(block: Block, forms: Forms, x: Tensor) -> Tensor:
    if forms.mlp_half == "mlp_block":
        return mlp_block(x, *block.fc1, *block.fc2, *block.norm2, *(block.norm3 or ()))
    if forms.mlp_half == "mlp_parts":
        return norm_residual(mlp_parts(x, *block.fc1, *block.fc2), *block.norm2, x, *(block.norm3 or ()))
    y = linear(x, *block.fc1, gelu=True)
    return _linear_norm_residual(forms.mlp_output, y, block.fc2, block.norm2, x, block.norm3)


def run_merge(merge: Merge, x: Tensor) -> Tensor:
    """Patch merging. [B, H, W, C], contiguous, to [B, ceil(H / 2), ceil(W / 2), 2C]."""
    dtype = x.dtype
    x = merge_norm(x) if merge.norm_last else merge_norm(x, *merge.norm)
    x = linear(x, merge.reduction, None)
    return norm_residual(x, *merge.norm) if merge.norm_last else x.to(dtype)


def _linear_norm_residual(
    form: str, x: Tensor, layer: Linear, norm: Norm, residual: Tensor, extra_norm: Norm | None
) -> Tensor:
    extra = extra_norm or ()
    if form == "linear_norm_residual":
        return linear_norm_residual(x, *layer, *norm, residual, *extra)
    x = linear(x, *layer)
    return norm_residual(x, *norm, residual, *extra)
