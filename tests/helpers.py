"""What the tests share: models whose every parameter matters, and how outputs are compared."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from swinfast.benchmark import randomise

__all__ = ["random_images", "randomise", "relative_rms", "small_model_args", "write_image"]


def relative_rms(got: Tensor, expected: Tensor) -> float:
    """RMS of got - expected over RMS of expected, in float64; infinite where their shapes differ."""
    if got.shape != expected.shape:
        return math.inf
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    return ((got - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


def small_model_args(**overrides) -> dict:
    """Arguments of a model with two stages that still has shifts, merging and several heads."""
    return {
        "img_size": 64,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 4,
        "num_classes": 10,
    } | overrides


def random_images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed images, the same for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def write_image(file: Path, seed: int = 0, size: tuple[int, int] = (36, 40)) -> Path:
    """Write an image of noise, size is (width, height); the file's ending says the format."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file
