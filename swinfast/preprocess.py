"""Images for a model: timm's evaluation transform, in Pillow and PyTorch alone.

Resize so that the image covers size / crop_pct, cut out the centre, scale to 0..1, normalise. As in timm, an image of
any mode becomes RGB by Pillow's conversion, and EXIF rotation is not applied.
"""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .adapters import patch_embeds
from .arguments import finite_numbers
from .pixels import Crop, Size
from .variants import IMAGENET_MEAN, IMAGENET_STD, per_channel


@dataclass(frozen=True)
class Transform:
    """The evaluation transform of a model.

    Attributes:
        size: (H, W) of the result.
        crop_pct: Share of the resized image's side that the crop keeps.
        interpolation: Pillow's name of the resampling filter, in lower case.
        mean, std: Per channel, for values in 0..1.
    """

    size: Size
    crop_pct: float = 0.9
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, image: Image.Image) -> Tensor:
        """A PIL image of any mode to [C, H, W] float32, C = 3, or 1 for models of one channel."""
        return self.normalise(self.crop(image))

    def load(self, path: str | Path) -> Tensor:
        """Decode a file and transform it; raises OSError (or Pillow's own errors) where it can't be read."""
        return self.normalise(self.crop.load(path))

    @property
    def crop(self) -> Crop:
        """The part of it that works on pixels."""
        return Crop(self.size, self.crop_pct, self.interpolation, len(self.mean))

    def normalise(self, image: Image.Image) -> Tensor:
        """An RGB or L image to float32 [C, H, W]."""
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8, copy=True)).reshape(*image.size[::-1], len(self.mean))
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device="cpu")[:, None, None] for values in (self.mean, self.std)
        )
        return pixels.permute(2, 0, 1).contiguous().float().div(255).sub(mean).div(std)


def transform_of(model: nn.Module) -> Transform:
    """The evaluation transform for a model, by its ``pretrained_cfg`` and, where it or its patch embedding has one, its
    image size. What the config leaves out, or names None, is timm's default.

    Raises:
        ValueError: The model has no ``pretrained_cfg``, or one that asks for what is not supported.
    """
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping):
        raise ValueError(f"{type(model).__name__} has no pretrained_cfg to prepare images by")
    crop_mode = config.get("crop_mode") or "center"
    if crop_mode != "center":
        raise ValueError(f"crop_mode must be 'center', got {crop_mode!r}")
    input_size = _input_size(config.get("input_size"))
    channels = getattr(model, "in_chans", input_size[0])
    mean = _per_channel("mean", config.get("mean"), IMAGENET_MEAN, channels)
    std = _per_channel("std", config.get("std"), IMAGENET_STD, channels)
    if min(std) <= 0:
        raise ValueError(f"std must be above 0, got {std}")
    interpolation = config.get("interpolation") or "bicubic"
    if not isinstance(interpolation, str) or interpolation.upper() not in Image.Resampling.__members__:
        raise ValueError(f"interpolation must be one of Pillow's filters, got {interpolation!r}")
    crop_pct = config.get("crop_pct") or 0.875
    if not isinstance(crop_pct, Real) or not 0 < crop_pct < math.inf:
        raise ValueError(f"crop_pct must be a number above 0, got {crop_pct!r}")
    sized = [model, *patch_embeds(model)]  # wrappers and models for features have none of their own
    size = tuple(next((one.img_size for one in sized if getattr(one, "img_size", None)), input_size[1:]))
    return Transform(size, crop_pct, interpolation, mean, std)


def _input_size(given: Any) -> tuple[int, int, int]:
    if given is None:
        return 3, 224, 224
    try:
        channels, height, width = map(operator.index, given)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise ValueError(f"input_size must be three whole numbers, of channels, rows and columns, got {given!r}")
    return channels, height, width


def _per_channel(name: str, given: Any, default: tuple[float, ...], channels: int) -> tuple[float, ...]:
    values = default if given is None else finite_numbers(given)
    if channels not in (1, 3):
        raise ValueError(f"image files have 1 or 3 channels, the model takes {channels}")
    if values is None:
        raise ValueError(f"{name} must be a sequence of numbers, one for each channel, got {given!r}")
    if len(values) == channels:
        return values
    if channels == 1:
        return per_channel(values, channels)
    if len(values) == 1:
        return values * channels
    raise ValueError(f"{name} must have {channels} values, got {values}")
