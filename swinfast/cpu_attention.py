"""Window attention on a CPU, outside a graph: in place, in scratch memory that the blocks of a stage share.

Beside the matrix products three things cost time there and are avoided: memory fresh from the system, calls of small
operators, and softmax. exp2 takes a fifth of softmax's time, and the sums divide the result instead of the weights.

No largest logit is looked for. A cosine bounds the logits of a head: where its scale is small, no exponential leaves
the range of float32. Where it is large, logits are taken relative to the mean of their row, which centring k and the
position bias does, and the sums are looked at: where one is out of range after all, softmax itself computes the row.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

NORM_EPS = 1e-12
LARGEST_LOGIT = 64.0  # e^64 leaves the sums, and their products with v, far from overflow
LEAST_SUM = 1e-30  # of a row's exponentials: what underflows beside it is below any rounding
LOG2_E = math.log2(math.e)


class ExponentTable(NamedTuple):
    bias: (
        Tensor  # the position bias over log 2; where not bounded, centred in each row and less an offset for each head
    )
    bounded: bool  # whether every sum is in range, whatever q and k are


def exponent_table(bias: Tensor, scale: Tensor) -> ExponentTable:
    """The position bias for attend.

    Args:
        bias: [heads, N, N], or [4, heads, N, N] by window type, of which the first has no mask.
        scale: [heads, 1, 1], factors of the cosines.
    """
    unmasked, scale = bias if bias.dim() == 3 else bias[0], scale.to(bias.dtype)
    low, high = unmasked.amin((-2, -1), keepdim=True), unmasked.amax((-2, -1), keepdim=True)
    # a token sees itself in any window, at worst with a cosine of -1
    if (scale + high <= LARGEST_LOGIT).all() and (low - scale >= math.log(LEAST_SUM)).all():
        return ExponentTable(bias * LOG2_E, True)
    offset = (2 * scale + high - low - LARGEST_LOGIT).clamp(0, LARGEST_LOGIT / 2)
    return ExponentTable((bias - unmasked.mean(-1, keepdim=True) - offset) * LOG2_E, False)


class Scratch:
    """What attention writes into, for images of one size: [images * windows] windows of N tokens, and views of it.

    Args:
        grid: Windows along the height and the width of an image.
        dtype, exact: Of q, k and v, and of the logits.
    """

    def __init__(
        self,
        images: int,
        grid: tuple[int, int],
        tokens: int,
        heads: int,
        channels: int,
        dtype: torch.dtype,
        exact: torch.dtype,
    ):
        windows = images * grid[0] * grid[1]
        split = torch.empty(3, windows, heads, tokens, channels // heads, dtype=dtype)
        self.by_token = split.permute(1, 3, 0, 2, 4)  # [windows, N, 3, heads, d], as a linear layer returns it
        self.query_key = split[:2]
        self.length = torch.empty(2, windows, heads, tokens, 1, dtype=dtype)
        self.query, self.key, self.value = split.flatten(1, 2)  # each [windows * heads, N, d]
        self.key_transposed = self.key.transpose(1, 2)
        self.products = torch.empty(windows * heads, tokens, tokens, dtype=dtype)
        self.logits = self.products if dtype == exact else torch.empty_like(self.products, dtype=exact)
        self.by_window = self.logits.view(images, *grid, heads, tokens, tokens)
        self.sums = torch.empty(windows * heads, tokens, 1, dtype=exact)
        self.inverse = self.sums if dtype == exact else torch.empty_like(self.sums, dtype=dtype)
        # q and k are done with when the result is written
        self.attended = self.query
        self.attended_by_token = split[0].transpose(1, 2)
        self.inverse_by_token = self.inverse.view(windows, heads, tokens, 1).transpose(1, 2)
        self.joined = split[1].view(windows, tokens, heads, channels // heads)


def attend(scratch: Scratch, table: ExponentTable, qkv: Tensor, scale: Tensor) -> Tensor:
    """Scaled cosine attention of tokens in window order.

    Args:
        qkv: [B, windows * N, 3C].
        scale: [2, heads, 1, 1], factors of the normalised q and k.

    Returns:
        [B, windows * N, C], in scratch.
    """
    scratch.by_token.copy_(qkv.view(scratch.by_token.shape))
    length = torch.linalg.vector_norm(scratch.query_key, dim=-1, keepdim=True, out=scratch.length)
    scratch.query_key.mul_(torch.div(scale[:, None], length.clamp_min_(NORM_EPS), out=length))
    if not table.bounded:
        scratch.key.sub_(scratch.key.mean(dim=1, keepdim=True))
    logits, weights, sums = _logits(scratch, table), scratch.products, scratch.sums
    torch.sum(logits.exp2_(), dim=-1, keepdim=True, out=sums)
    if not table.bounded and not _in_range(sums):
        _repair(scratch, table)
    if weights is not logits:
        weights.copy_(logits)
    torch.bmm(weights, scratch.value, out=scratch.attended)
    torch.reciprocal(sums, out=sums)
    if scratch.inverse is not sums:
        scratch.inverse.copy_(sums)
    torch.mul(scratch.attended_by_token, scratch.inverse_by_token, out=scratch.joined)
    return scratch.joined.view(*qkv.shape[:2], qkv.shape[2] // 3)


def _logits(scratch: Scratch, table: ExponentTable) -> Tensor:
    """The logits over log 2."""
    torch.bmm(scratch.query, scratch.key_transposed, out=scratch.products)
    if scratch.logits is not scratch.products:
        scratch.logits.copy_(scratch.products)
    add_bias(scratch.by_window, table.bias, LOG2_E)
    return scratch.logits


def _in_range(sums: Tensor) -> bool:
    if not sums.numel():
        return True
    least, largest = torch.aminmax(sums)
    return least.item() >= LEAST_SUM and largest.item() <= 1 / LEAST_SUM  # neither holds for NaN


def _repair(scratch: Scratch, table: ExponentTable) -> None:
    """Softmax in place of the exponentials in the rows whose sums are out of range; the others stay as they are."""
    exponentials, sums = scratch.logits.clone(), scratch.sums
    lost = ~((sums >= LEAST_SUM) & (sums <= 1 / LEAST_SUM))[..., 0]  # NaN too
    weights = _logits(scratch, table)[lost].div_(LOG2_E).softmax(dim=-1)
    scratch.logits.copy_(exponentials)
    scratch.logits[lost] = weights
    sums[lost] = 1.0


def add_bias(logits: Tensor, bias: Tensor, factor: float) -> None:
    """logits = logits * factor + bias, in place. [B, gh, gw, heads, N, N]; a table of four goes by window type."""
    if bias.dim() == 3:
        torch.add(bias, logits, alpha=factor, out=logits)
        return
    parts = (logits[:, :-1, :-1], logits[:, -1:, :-1], logits[:, :-1, -1:], logits[:, -1:, -1:])
    for part, part_bias in zip(parts, bias, strict=True):
        torch.add(part_bias, part, alpha=factor, out=part)
