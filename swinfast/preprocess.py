"""Images for a model: timm's evaluation transform, in Pillow and PyTorch alone.

Resize so that the image covers size / crop_pct, cut out the centre, scale to 0..1, normalise. As in timm, an image of
any mode becomes RGB by Pillow's conversion, and EXIF rotation is not applied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .adapters import is_patch_embed
from .pixels import Crop, Size
from .variants import IMAGENET_MEAN, IMAGENET_STD


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
    image size.

    Raises:
        ValueError: The model has no ``pretrained_cfg``, or one that asks for what is not supported.
    """
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping):
        raise ValueError(f"{type(model).__name__} has no pretrained_cfg to prepare images by")
    if config.get("crop_mode", "center") != "center":
        raise ValueError(f"crop_mode must be 'center', got {config['crop_mode']!r}")
    input_size = config.get("input_size", (3, 224, 224))
    channels = getattr(model, "in_chans", input_size[0])
    mean = _per_channel("mean", config.get("mean", IMAGENET_MEAN), channels)
    std = _per_channel("std", config.get("std", IMAGENET_STD), channels)
    interpolation = config.get("interpolation", "bicubic")
    if interpolation.upper() not in Image.Resampling.__members__:
        raise ValueError(f"interpolation must be one of Pillow's filters, got {interpolation!r}")
    sized = [model, *filter(is_patch_embed, model.modules())]  # wrappers and models for features have none of their own
    size = tuple(next((one.img_size for one in sized if getattr(one, "img_size", None)), input_size[1:]))
    return Transform(size, config.get("crop_pct", 0.875), interpolation, mean, std)  # without one: timm's default


def _per_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    values = tuple(values)
    if channels not in (1, 3):
        raise ValueError(f"image files have 1 or 3 channels, the model takes {channels}")
    if len(values) == channels:
        return values
    if channels == 1:  # an RGB model made for one channel
        return (sum(values) / len(values),)
    if len(values) == 1:
        return values * channels
    raise ValueError(f"{name} must have {channels} values, got {values}")
