"""The operations of Swin Transformer V2, each as the plainest PyTorch that defines it.

Activations are [B, H, W, C]. Weights are laid out as ``torch.nn.Linear`` and ``torch.nn.Conv2d`` keep them. A
kernel with the same name as a function here computes that function.

Source: Liu et al., "Swin Transformer V2" (arXiv:2111.09883), sections 3.2 to 3.4, in the forms of timm's
``swin_transformer_v2_cr`` and ``swin_transformer_v2``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MASK_VALUE = -100.0  # added, not -inf: far logits can still see through it, and so does timm's mask
MAX_LOGIT_SCALE = math.log(100.0)
NORM_EPS = 1e-12  # of the q and k norms, as torch.nn.functional.normalize
LARGEST_OFFSET = 8.0  # in the bounded form of the position bias
LARGEST_BIAS = 16.0


def log_spaced(offsets: Tensor, span: tuple[int, int] | None = None) -> Tensor:
    """sign(d) log(1 + |d|) of offsets [..., (row, column)] in tokens.

    In the bounded form they are scaled first, so that those in a window of the size ``span`` go from -8 to 8, and the
    logarithm is one to the base 8.
    """
    if span is None:
        return offsets.sign() * torch.log(1.0 + offsets.abs())
    rows, columns = (offsets[..., axis] / max(span[axis] - 1, 1) * LARGEST_OFFSET for axis in (0, 1))
    offsets = torch.stack((rows, columns), dim=-1)
    return offsets.sign() * torch.log2(1.0 + offsets.abs()) / math.log2(8.0)


def log_relative_offsets(
    window_size: tuple[int, int], device=None, dtype=torch.float32, span: tuple[int, int] | None = None
) -> Tensor:
    """Log-spaced relative offsets of all pairs in a window.

    Args:
        window_size: (Wh, Ww) in tokens.
        span: As log_spaced takes it.

    Returns:
        [N, N, 2] with N = Wh * Ww, query first; the last axis is (row, column).
    """
    rows, columns = (torch.arange(size, device=device, dtype=dtype) for size in window_size)
    tokens = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).flatten(1)
    return log_spaced((tokens[:, :, None] - tokens[:, None, :]).permute(1, 2, 0), span)


def window_masks(window_size: tuple[int, int], shift_size: tuple[int, int], device=None) -> Tensor:
    """Which pairs of a shifted window must not see each other, for each of the four window types.

    After the cyclic shift only the last row and the last column of windows hold tokens from both ends of the map.
    So a window is of one of four types: 0 interior, 1 last row, 2 last column, 3 both.

    Returns:
        [4, N, N] booleans, True where the pair is masked.
    """
    split_rows = torch.arange(window_size[0], device=device) >= window_size[0] - shift_size[0]
    split_columns = torch.arange(window_size[1], device=device) >= window_size[1] - shift_size[1]
    row_side = split_rows[:, None].expand(window_size).flatten()
    column_side = split_columns[None, :].expand(window_size).flatten()
    # ^, not !=, which torch.compile can't generate C++ for between booleans (PyTorch 2.13)
    across_rows = row_side[:, None] ^ row_side[None, :]
    across_columns = column_side[:, None] ^ column_side[None, :]
    return torch.stack([torch.zeros_like(across_rows), across_rows, across_columns, across_rows | across_columns])


def window_types(grid: tuple[int, int], device=None) -> Tensor:
    """The type (see window_masks) of each window of a grid of windows: [gh * gw] integers in raster order."""
    last_row = torch.arange(grid[0], device=device) == grid[0] - 1
    last_column = torch.arange(grid[1], device=device) == grid[1] - 1
    return (last_row.long()[:, None] + 2 * last_column.long()[None, :]).flatten()


def cpb_bias(
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    window_size: tuple[int, int],
    shift_size: tuple[int, int] = (0, 0),
    span: tuple[int, int] | None = None,
) -> Tensor:
    """Log-spaced continuous position bias with the shift mask added (section 3.3).

    bias[t, h, i, j] = MLP(log-spaced d)[h] + mask[t, i, j] with d the offset from token j to token i and MLP linear,
    ReLU, linear. In the bounded form it is 16 sigmoid(MLP(...)).

    Args:
        fc1_weight, fc1_bias: [hidden, 2], [hidden].
        fc2_weight, fc2_bias: [heads, hidden], [heads] or None.
        window_size, shift_size: (rows, columns) in tokens.
        span: The window in which offsets go from -8 to 8, for the bounded form; None for the plain one.

    Returns:
        [4, heads, N, N] in the dtype of the weights, one table for each window type.
    """
    offsets = log_relative_offsets(window_size, fc1_weight.device, span=span).to(fc1_weight.dtype)
    bias = F.linear(F.relu(F.linear(offsets, fc1_weight, fc1_bias)), fc2_weight, fc2_bias).permute(2, 0, 1)
    if span is not None:
        bias = LARGEST_BIAS * bias.sigmoid()
    mask = window_masks(window_size, shift_size, bias.device).to(bias.dtype) * MASK_VALUE
    return bias + mask[:, None]


def patch_embed(images: Tensor, weight: Tensor, bias: Tensor, norm: tuple[Tensor, Tensor, float] | None) -> Tensor:
    """Non-overlapping patches, linearly embedded, then LayerNorm.

    Args:
        images: [B, in_chans, H, W]; what is left over after whole patches is cut off.
        weight, bias: [C, in_chans, ph, pw], [C].
        norm: LayerNorm's (weight, bias, eps), or None for no norm.

    Returns:
        [B, H // ph, W // pw, C].
    """
    x = F.conv2d(images, weight, bias, stride=weight.shape[-2:]).permute(0, 2, 3, 1)
    return x if norm is None else _layer_norm(x, norm)


def window_attention(
    qkv: Tensor,
    qkv_bias: Tensor,
    logit_scale: Tensor,
    bias: Tensor,
    window_size: tuple[int, int],
    shift_size: tuple[int, int] = (0, 0),
) -> Tensor:
    """Scaled cosine attention inside (shifted) windows (section 3.2).

    softmax(exp(min(logit_scale, log 100)) * cos(q, k) + bias) v, per head and window. The map is rolled by the shift
    first and padded to whole windows after; a padded token is zero before the qkv projection, so its q, k and v are
    the projection's bias, and it is an ordinary key.

    Args:
        qkv: [B, H, W, 3C], q, k and v one after the other, each (heads, C / heads).
        qkv_bias: [3C].
        logit_scale: [heads], a logarithm.
        bias: [4, heads, N, N] from cpb_bias with the same window and shift.
        window_size, shift_size: (rows, columns) in tokens.

    Returns:
        [B, H, W, C].
    """
    batch, height, width, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3
    heads = logit_scale.shape[0]
    grid = (-(-height // window_size[0]), -(-width // window_size[1]))
    padded = (grid[0] * window_size[0], grid[1] * window_size[1])
    qkv = qkv.roll((-shift_size[0], -shift_size[1]), dims=(1, 2))
    if padded != (height, width):
        full = qkv_bias.expand(batch, *padded, 3 * channels).clone()
        full[:, :height, :width] = qkv
        qkv = full
    windows = window_partition(qkv, window_size)  # [B, gh * gw, N, 3C]
    q, k, v = windows.unflatten(-1, (3, heads, channels // heads)).permute(
        3, 0, 1, 4, 2, 5
    )  # each [B, nW, heads, N, d]
    scale = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
    logits = (_unit(q) @ _unit(k).transpose(-2, -1)) * scale[:, None, None]
    logits = logits + bias[window_types(grid, bias.device)]
    out = (logits.softmax(dim=-1) @ v).transpose(2, 3).flatten(-2)
    out = window_reverse(out, window_size, grid)[:, :height, :width]
    return out.roll(shift_size, dims=(1, 2))


def window_partition(x: Tensor, window_size: tuple[int, int]) -> Tensor:
    """[B, H, W, C] with H and W multiples of the window to [B, windows, N, C]."""
    x = x.unflatten(2, (-1, window_size[1])).unflatten(1, (-1, window_size[0]))  # [B, gh, Wh, gw, Ww, C]
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def window_reverse(windows: Tensor, window_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of window_partition: [B, gh * gw, N, C] to [B, H, W, C]."""
    x = windows.unflatten(2, window_size).unflatten(1, grid)  # [B, gh, gw, Wh, Ww, C]
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def qkv_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    logit_scale: Tensor,
    bias: Tensor,
    window_size: tuple[int, int],
    shift_size: tuple[int, int] = (0, 0),
) -> Tensor:
    """window_attention(linear(x)), x [B, H, W, C] to the same."""
    qkv = linear(x, qkv_weight, qkv_bias)
    return window_attention(qkv, qkv_bias, logit_scale, bias, window_size, shift_size)


def attention_parts(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    logit_scale: Tensor,
    bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    window_size: tuple[int, int],
    shift_size: tuple[int, int] = (0, 0),
) -> Tensor:
    """proj(qkv_attention(x)), x [B, H, W, C] to the same: what the kernel's parts add up to."""
    attended = qkv_attention(x, qkv_weight, qkv_bias, logit_scale, bias, window_size, shift_size)
    return linear(attended, proj_weight, proj_bias)


def attention_block(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    logit_scale: Tensor,
    bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm: tuple[Tensor, Tensor, float],
    window_size: tuple[int, int],
    shift_size: tuple[int, int] = (0, 0),
) -> Tensor:
    """The attention half of a block, residual post-norm: x + LN(proj(window_attention(qkv(x)))), x [B, H, W, C]."""
    projected = attention_parts(
        x, qkv_weight, qkv_bias, logit_scale, bias, proj_weight, proj_bias, window_size, shift_size
    )
    return norm_residual(projected, norm, x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x W^T + b, then the exact (erf) GELU where asked for."""
    x = F.linear(x, weight, bias)
    return F.gelu(x) if gelu else x


def norm_residual(
    x: Tensor,
    norm: tuple[Tensor, Tensor, float],
    residual: Tensor | None,
    extra_norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """residual + LN(x), then a second LayerNorm on the sum where a block has one. Without a residual, LN(x).

    x is [..., C], or [..., parts, C] of which it is the sum.
    """
    x = x.sum(-2) if residual is not None and x.dim() > residual.dim() else x
    x = _layer_norm(x, norm) if residual is None else residual + _layer_norm(x, norm)
    return x if extra_norm is None else _layer_norm(x, extra_norm)


def linear_norm_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: tuple[Tensor, Tensor, float],
    residual: Tensor,
    extra_norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """residual + LN(x W^T + b), then a second LayerNorm on the sum where a block has one."""
    return norm_residual(linear(x, weight, bias), norm, residual, extra_norm)


def mlp_parts(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """fc2(GELU(fc1 x)): what the kernel's parts add up to."""
    return linear(linear(x, fc1_weight, fc1_bias, gelu=True), fc2_weight, fc2_bias)


def mlp_block(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm: tuple[Tensor, Tensor, float],
    extra_norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """The MLP half of a block: x + LN(fc2(GELU(fc1 x))), then a second LayerNorm on the sum where a block has one."""
    return norm_residual(mlp_parts(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias), norm, x, extra_norm)


def merge_norm(x: Tensor, norm: tuple[Tensor, Tensor, float] | None) -> Tensor:
    """Each 2x2 neighbourhood to one token: concatenate, then LayerNorm where there is one here.

    Channels are concatenated as (column in the pair, row in the pair, C). Odd sizes are padded with zeros at the end.

    Args:
        x: [B, H, W, C].
        norm: LayerNorm over 4C as (weight, bias, eps), or None.

    Returns:
        [B, ceil(H / 2), ceil(W / 2), 4C].
    """
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, H/2, row, W/2, column, C]
    x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)
    return x if norm is None else _layer_norm(x, norm)


def patch_merging(x: Tensor, norm: tuple[Tensor, Tensor, float], weight: Tensor, norm_last: bool = False) -> Tensor:
    """Each 2x2 neighbourhood to one token: merge_norm, then the reduction by weight [2C, 4C]; or the norm after it.

    [B, H, W, C] to [B, ceil(H / 2), ceil(W / 2), 2C].
    """
    if norm_last:
        return norm_residual(linear(merge_norm(x, None), weight, None), norm, None)
    return linear(merge_norm(x, norm), weight, None)


def _layer_norm(x: Tensor, norm: tuple[Tensor, Tensor, float]) -> Tensor:
    weight, bias, eps = norm
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _unit(x: Tensor) -> Tensor:
    """x over its length, by way of fp32 at least: in fp16 eps would round to 0 and a zero row become NaN."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(exact, dim=-1, eps=NORM_EPS).to(x.dtype)
