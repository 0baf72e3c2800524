"""Image files to uint8 pixels: decode, resize, crop, as timm's evaluation transform does.

It needs Pillow alone, so that a process which does nothing but decode starts fast and stays small.
"""

import io
import math
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageFile

Size = tuple[int, int]
Source = str | Path | bytes | tuple[str, int, int]  # a file, its bytes, or (archive, offset, size) of a file in it
LARGEST_RESIZED = 2**25  # pixels of a whole resized image; a strip one pixel high would become thousands wide


@dataclass(frozen=True)
class Crop:
    """Resize so that the image covers size / crop_pct, and cut out the centre.

    Attributes:
        size: (H, W) of the result.
        crop_pct: Share of the resized image's side that the crop keeps.
        interpolation: Pillow's name of the resampling filter, in lower case.
        channels: 3 for RGB, 1 for L.
        draft: Let libjpeg decode at a half, a quarter or an eighth where that is still large enough. It is faster and
            changes the pixels.
    """

    size: Size
    crop_pct: float = 0.9
    interpolation: str = "bicubic"
    channels: int = 3
    draft: bool = False

    @property
    def mode(self) -> str:
        """Pillow's name of the result's mode."""
        return "RGB" if self.channels == 3 else "L"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the result."""
        return (*self.size, self.channels)

    def load(self, source: Source) -> Image.Image:
        """Decode an image file; raises OSError (or Pillow's own errors) where it can't be read."""
        if isinstance(source, tuple):
            source = _read_span(*source)
        elif isinstance(source, str | os.PathLike) and not stat.S_ISREG(Path(source).stat().st_mode):
            raise OSError("no regular file")  # to read a pipe could take for ever
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if self.draft:
                image.draft(self.mode, self._resized((image.height, image.width))[::-1])
            return self(image)

    def __call__(self, image: Image.Image) -> Image.Image:
        """A PIL image of any mode, resized and cropped to size, in RGB (or L)."""
        image = image.convert(self.mode)
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
        (height, width), (whole_height, whole_width) = map(min, self.size, resized), resized
        top, left = round((whole_height - height) / 2.0), round((whole_width - width) / 2.0)
        x, y = image.width / whole_width, image.height / whole_height
        box = (left * x, top * y, (left + width) * x, (top + height) * y)
        return _center_crop(image.resize((width, height), self._filter, box=box), self.size)

    def _resized(self, size: Size) -> Size:
        """(H, W) after resizing: the shorter side to size / crop_pct for square crops, else to cover both sides."""
        scaled = tuple(math.floor(side / self.crop_pct) for side in self.size)
        if scaled[0] == scaled[1]:
            short, long = min(size), max(size)
            long = int(scaled[0] * long / short)
            return (scaled[0], long) if size[0] <= size[1] else (long, scaled[0])
        ratio = min(side / target for side, target in zip(size, scaled, strict=True))
        return tuple(round(side / ratio) for side in size)


def pillow_settings() -> dict[str, int | bool | None]:
    """What a program may have changed of how Pillow reads files."""
    return {
        "max_image_pixels": Image.MAX_IMAGE_PIXELS,
        "load_truncated_images": ImageFile.LOAD_TRUNCATED_IMAGES,
        "bomb_warning_is_error": _bomb_warning_is_error(),
    }


def set_pillow(settings: dict[str, int | bool | None]) -> None:
    """As pillow_settings said in another process. Pillow's warning of large images is an error there, or unheard."""
    Image.MAX_IMAGE_PIXELS = settings["max_image_pixels"]
    ImageFile.LOAD_TRUNCATED_IMAGES = settings["load_truncated_images"]
    warnings.simplefilter("error" if settings["bomb_warning_is_error"] else "ignore", Image.DecompressionBombWarning)


def _bomb_warning_is_error() -> bool:
    """By the first filter that is for all warnings of that category."""
    for action, message, category, module, line in warnings.filters:
        if issubclass(Image.DecompressionBombWarning, category) and not (message or module or line):
            return action == "error"
    return False


def _read_span(archive: str, offset: int, size: int) -> bytes:
    with Path(archive).open("rb") as stream:
        stream.seek(offset)
        data = stream.read(size)
    if len(data) < size:
        raise EOFError(f"{archive} ends after {len(data)} of {size} bytes of this image")
    return data


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
