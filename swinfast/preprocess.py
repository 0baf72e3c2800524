"""Images for a model: timm's evaluation transform, in Pillow and PyTorch alone.

Resize so that the image covers size / crop_pct, cut out the centre, scale to 0..1, normalise. As in timm, an image of
any mode becomes RGB by Pillow's conversion, and EXIF rotation is not applied.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .variants import IMAGENET_MEAN, IMAGENET_STD

Size = tuple[int, int]
LARGEST_RESIZED = 2**25  # pixels of a whole resized image; a strip one pixel high would become thousands wide


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
        with Image.open(path) as image:
            return self(image)

    def crop(self, image: Image.Image) -> Image.Image:
        """Resized and cropped to size, in RGB (or L)."""
        image = image.convert("RGB" if len(self.mean) == 3 else "L")
        width, height = image.size
        resized = self._resized((height, width))
        if resized[0] * resized[1] > max(LARGEST_RESIZED, width * height):
            return self._resized_crop(image, resized)
        if resized != (height, width):
            image = image.resize(resized[::-1], self._filter)
        return _center_crop(image, self.size)

    @property
    def _filter(self) -> Image.Resampling:
        return Image.Resampling[self.interpolation.upper()]

    def _resized_crop(self, image: Image.Image, resized: Size) -> Image.Image:
        """Resize only what the crop will keep, for strips that would grow to gigabytes.

        The same but for rounding, and for overshoots, which Pillow clips after either of its two passes.
        """
        (height, width), (whole_height, whole_width) = self.size, resized
        top, left = round((whole_height - height) / 2.0), round((whole_width - width) / 2.0)
        x, y = image.width / whole_width, image.height / whole_height
        box = (left * x, top * y, (left + width) * x, (top + height) * y)
        return image.resize((width, height), self._filter, box=box)

    def normalise(self, image: Image.Image) -> Tensor:
        """An RGB or L image to float32 [C, H, W]."""
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8, copy=True)).reshape(*image.size[::-1], len(self.mean))
        mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (self.mean, self.std))
        return pixels.permute(2, 0, 1).contiguous().float().div(255).sub(mean).div(std)

    def _resized(self, size: Size) -> Size:
        """(H, W) after resizing: the shorter side to size / crop_pct for square crops, else to cover both sides."""
        scaled = tuple(math.floor(side / self.crop_pct) for side in self.size)
        if scaled[0] == scaled[1]:
            short, long = min(size), max(size)
            long = int(scaled[0] * long / short)
            return (scaled[0], long) if size[0] <= size[1] else (long, scaled[0])
        ratio = min(side / target for side, target in zip(size, scaled, strict=True))
        return tuple(round(side / ratio) for side in size)


def transform_of(model: nn.Module) -> Transform:
    """The evaluation transform for a model, by its ``pretrained_cfg`` and, where it has one, its image size.

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
    size = tuple(getattr(model, "img_size", input_size[1:]))
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


def _center_crop(image: Image.Image, size: Size) -> Image.Image:
    """The centre of an image, on black where the image is smaller."""
    (height, width), (old_width, old_height) = size, image.size
    if width > old_width or height > old_height:
        left = (width - old_width) // 2 if width > old_width else 0
        top = (height - old_height) // 2 if height > old_height else 0
        canvas = Image.new(image.mode, (max(width, old_width), max(height, old_height)))
        canvas.paste(image, (left, top))
        image = canvas
    top = round((image.height - height) / 2.0)
    left = round((image.width - width) / 2.0)
    return image.crop((left, top, left + width, top + height))
