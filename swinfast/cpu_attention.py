"""Window attention on a CPU, outside a graph: in place, in scratch memory that the blocks of a stage share.

Beside the matrix products three things cost time there and are avoided: memory fresh from the system, calls of small
operators, and softmax. exp2 takes a fifth of softmax's time. In bfloat16 the products alone are of that type: all
between them is computed in float32, since a CPU converts fast and calculates slowly with 16-bit numbers.

No largest logit is looked for. A cosine bounds the logits of a head: where its scale is small, no exponential leaves
the range of float32. Where it is large, logits are taken relative to the mean of their row, which centring k and the
position bias does, and the sums are looked at: where one is out of range after all, softmax itself computes the row.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .reference.ops import NORM_EPS

LARGEST_LOGIT = 64.0  # e^64 leaves the sums, and their products with v, far from overflow
LEAST_SUM = 1e-30  # of a row's exponentials: what underflows beside it is below any rounding
LOG2_E = math.log2(math.e)


class ExponentTable(NamedTuple):
    """How a block's cosines become logits over log 2: multiplied by factor, and bias added.

    Attributes:
        factor: [heads, 1, 1].
        bias: One [heads, N, N], or four by window type; where not bounded, centred in each row and less an offset for
            each head.
        bounded: Whether every sum is in range, whatever q and k are.
    """

    factor: Tensor
    bias: tuple[Tensor, ...]
    bounded: bool


def exponent_table(bias: Tensor, scale: Tensor) -> ExponentTable:
    """What attend takes.

    Args:
        bias: The position bias, [heads, N, N], or [4, heads, N, N] by window type, of which the first has no mask.
        scale: [heads, 1, 1], factors of the cosines.
    """
    unmasked = bias if bias.dim() == 3 else bias[0]
    low, high = unmasked.amin((-2, -1), keepdim=True), unmasked.amax((-2, -1), keepdim=True)
    # a token sees itself in any window, at worst with a cosine of -1
    if (scale + high <= LARGEST_LOGIT).all() and (low - scale >= math.log(LEAST_SUM)).all():
        bounded = True
    else:
        bounded = False
        offset = (2 * scale + high - low - LARGEST_LOGIT).clamp(0, LARGEST_LOGIT / 2)
        bias = bias - unmasked.mean(-1, keepdim=True) - offset
    bias = bias * LOG2_E
    return ExponentTable(scale * LOG2_E, (bias,) if bias.dim() == 3 else bias.unbind(), bounded)


class Scratch:
    """What attention writes into, for images of one size: [images * windows] windows of N tokens, and views of it.

    Its memory is there from load to release alone: an MLP needs as much again.

    Args:
        grid: Windows along the height and the width of an image.
        dtype, exact: Of the matrix products, and of what is computed between them.
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
        windows, empty = images * grid[0] * grid[1], partial(torch.empty, device="cpu")
        self.qkv_shape = windows, tokens, 3, heads, channels // heads
        self.rounded = empty(2, windows, heads, tokens, channels // heads, dtype=dtype)
        value = empty(1, windows, heads, tokens, channels // heads, dtype=dtype)
        self.products = empty(windows * heads, tokens, tokens, dtype=dtype)
        if dtype == exact:
            self.query_key, self.logits = self.rounded, self.products
        else:  # in one place: once q and k are rounded, they are not needed exactly
            place = empty(max(self.rounded.numel(), self.products.numel()), dtype=exact)
            self.query_key = place[: self.rounded.numel()].view(self.rounded.shape)
            self.logits = place[: self.products.numel()].view(self.products.shape)
        self.key = self.query_key[1]
        # as a linear layer returns them
        self.query_key_by_token = self.query_key.permute(1, 3, 0, 2, 4)  # [windows, N, 2, heads, d]
        self.value_by_token = value.permute(1, 3, 0, 2, 4)
        self.key_sum = empty(windows, heads, 1, channels // heads, dtype=exact)
        self.length = empty(2, windows, heads, tokens, 1, dtype=exact)
        self.query, key = self.rounded.flatten(1, 2)  # each [windows * heads, N, d]
        self.key_transposed, self.value = key.transpose(1, 2), value.flatten(0, 2)
        self.by_window = by_window = self.logits.view(images, *grid, heads, tokens, tokens)
        upper, last_row = by_window[:, :-1], by_window[:, -1:]
        self.by_window_type = upper[:, :, :-1], last_row[:, :, :-1], upper[:, :, -1:], last_row[:, :, -1:]
        self.sums = empty(windows * heads, tokens, 1, dtype=exact)
        # q and k are done with when the result is written
        self.attended, self.attended_by_token = self.query, self.rounded[0].transpose(1, 2)
        self.joined = self.rounded[1].view(windows, tokens, heads, channels // heads)
        self.result = self.joined.view(images, math.prod(grid) * tokens, channels)
        loaded = {x.untyped_storage() for x in (self.query_key, value)}
        later = {x.untyped_storage() for x in (self.rounded, self.products)} - loaded
        self.loaded, self.later = ([(storage, storage.nbytes()) for storage in part] for part in (loaded, later))
        self.release()

    def load(self, qkv: Tensor) -> None:
        """Take q, k and v of tokens in window order, [B, windows * N, 3C]."""
        _resize(self.loaded)
        query_key, value = qkv.view(self.qkv_shape).split((2, 1), dim=2)
        self.query_key_by_token.copy_(query_key)
        self.value_by_token.copy_(value)

    def release(self) -> None:
        """Give the memory back, and lose what is in it."""
        for storage, _ in self.loaded + self.later:
            storage.resize_(0)


def _resize(memory: list[tuple[torch.UntypedStorage, int]]) -> None:
    for storage, size in memory:
        storage.resize_(size)


def attend(scratch: Scratch, table: ExponentTable) -> Tensor:
    """Scaled cosine attention of what is loaded, to [B, windows * N, C] in scratch."""
    _resize(scratch.later)
    length = torch.linalg.vector_norm(scratch.query_key, dim=-1, keepdim=True, out=scratch.length)
    scratch.query_key.mul_(length.clamp_min_(NORM_EPS).reciprocal_())
    if not table.bounded:
        key = scratch.key
        key.sub_(torch.sum(key, dim=-2, keepdim=True, out=scratch.key_sum), alpha=1 / key.shape[-2])
    if scratch.rounded is not scratch.query_key:
        scratch.rounded.copy_(scratch.query_key)
    logits, weights, sums = _logits(scratch, table), scratch.products, scratch.sums
    torch.sum(logits.exp2_(), dim=-1, keepdim=True, out=sums)
    if not table.bounded and not _in_range(sums):
        _repair(scratch, table)
    logits.mul_(sums.reciprocal_())
    if weights is not logits:
        weights.copy_(logits)
    torch.bmm(weights, scratch.value, out=scratch.attended)
    scratch.joined.copy_(scratch.attended_by_token)
    return scratch.result


def _logits(scratch: Scratch, table: ExponentTable) -> Tensor:
    """The logits over log 2."""
    torch.bmm(scratch.query, scratch.key_transposed, out=scratch.products)
    if scratch.logits is not scratch.products:
        scratch.logits.copy_(scratch.products)
    add_bias(scratch, table)
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


def add_bias(scratch: Scratch, table: ExponentTable) -> None:
    """logits = cosines * factor + bias, in place."""
    places = (scratch.by_window,) if len(table.bias) == 1 else scratch.by_window_type
    for windows, bias in zip(places, table.bias, strict=True):
        torch.addcmul(bias, windows, table.factor, out=windows)
