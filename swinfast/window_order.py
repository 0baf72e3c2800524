"""Token orders. A map of H x W tokens in window order holds each window's tokens side by side, so that attention
needs no roll, partition or reverse; one index_select goes from one order to another.

A WindowOrder is rolled by its shift first and padded to whole windows after, as the model does. None stands for
raster order. Index tensors depend on sizes alone and are cached; under tracing they are computed in the graph.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .constants import constant

Size = tuple[int, int]


class WindowOrder(NamedTuple):
    size: Size  # of the map, (H, W) in tokens
    window: Size
    shift: Size

    @property
    def grid(self) -> Size:
        """Windows along the height and the width."""
        return -(-self.size[0] // self.window[0]), -(-self.size[1] // self.window[1])

    @property
    def padded(self) -> bool:
        """Whether windows hang over the map's edge."""
        return bool(self.size[0] % self.window[0] or self.size[1] % self.window[1])

    @property
    def is_raster(self) -> bool:
        """Whether window order and raster order are the same."""
        in_line = self.grid[1] == 1 or self.window[0] == 1
        return in_line and self.shift == (0, 0) and not self.padded


@constant
def change(old: WindowOrder | None, new: WindowOrder | None, device: torch.device) -> Tensor | None:
    """Index that brings tokens from one order to another, None where the two are the same.

    Where new is padded its pad slots hold index 0, see pad_mask.
    """
    old = None if old is None or old.is_raster else old
    new = None if new is None or new.is_raster else new
    if old == new:
        return None
    if new is None:
        return _slots(old, device)
    tokens = _tokens(new, device).clamp(min=0)
    return tokens if old is None else _slots(old, device)[tokens]


@constant
def pad_mask(order: WindowOrder, device: torch.device) -> Tensor:
    """[slots, 1] booleans: True for the slots of a padded order that hold no token of the map."""
    return (_tokens(order, device) < 0)[:, None]


@constant
def merge(size: Size, order: WindowOrder | None, device: torch.device) -> Tensor:
    """Index of the four tokens that patch merging puts into each token of a merged map in the given order.

    Args:
        size: (H, W) before merging, both even.
        order: Of the merged map; not padded.

    Returns:
        [4 * H/2 * W/2], for each merged token (column, row) = (0, 0), (0, 1), (1, 0), (1, 1).
    """
    height, width = size
    tokens = torch.arange(height * width, device=device).view(height // 2, 2, width // 2, 2)
    groups = tokens.permute(0, 2, 3, 1).reshape(-1, 4)  # of each merged token, in raster order
    return (groups if order is None else groups[_tokens(order, device)]).flatten()


def _tokens(order: WindowOrder, device: torch.device) -> Tensor:
    """Raster index of the token in each slot, -1 for padding."""
    (height, width), (wh, ww), (gh, gw), (sh, sw) = order.size, order.window, order.grid, order.shift
    tokens = torch.arange(height * width, device=device).view(height, width).roll((-sh, -sw), (0, 1))
    tokens = F.pad(tokens, (0, gw * ww - width, 0, gh * wh - height), value=-1)
    return tokens.reshape(gh, wh, gw, ww).transpose(1, 2).flatten()


def _slots(order: WindowOrder, device: torch.device) -> Tensor:
    """Slot of each token of the map, in raster order."""
    (height, width), (wh, ww), (gh, gw), (sh, sw) = order.size, order.window, order.grid, order.shift
    slots = torch.arange(gh * wh * gw * ww, device=device).view(gh, gw, wh, ww).transpose(1, 2)
    return slots.reshape(gh * wh, gw * ww)[:height, :width].roll((sh, sw), (0, 1)).flatten()
