"""What the tests share: models whose every parameter matters, and how outputs are compared."""

import copy
import csv
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import swinfast
from swinfast.benchmark import randomise

SMALL = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 7}
THREE = SMALL | {"depths": (2, 3, 2), "num_heads": (1, 2, 4)}
FEW = SMALL | {"window_size": 4}  # few windows: Triton's interpreter takes one after the other
OPTIONS = {
    "square": FEW | {"img_size": 64},
    "default windows": SMALL | {"img_size": 64},
    "not square": THREE | {"img_size": (64, 96), "window_size": (4, 3)},
    "padded": SMALL | {"img_size": 120, "window_size": 7},
    "padded, odd grids": THREE | {"img_size": (100, 132), "window_size": (5, 3)},
    "padded on one axis": SMALL | {"img_size": (112, 100), "window_size": 7},
    "dynamic": THREE | {"img_size": 64, "window_size": 4, "dynamic_img_size": True},
    "always_partition": THREE | {"img_size": 64, "window_size": 7, "always_partition": True},
    "window as large as the map": SMALL | {"img_size": 64, "window_size": 16},
    "window larger than the map": SMALL | {"img_size": 48, "window_size": (16, 5)},
    "shift on one axis": SMALL | {"img_size": (48, 20), "window_size": (4, 5)},
    "window 1": SMALL | {"img_size": 32, "window_size": 1},
    "window 1 by 6": SMALL | {"img_size": 48, "window_size": (1, 6)},
    "window for each stage": SMALL | {"img_size": 64, "window_size": [(8, 4), (2, 4)]},
    "window_ratio": SMALL | {"img_size": 64, "window_ratio": (4, 2)},
    "extra norms": THREE | {"img_size": 64, "window_size": 4, "extra_norm_stage": True, "extra_norm_period": 2},
    "patch 2 by 4": SMALL | {"img_size": (32, 64), "patch_size": (2, 4)},
    "one channel": FEW | {"img_size": 64, "in_chans": 1},
    "eps": FEW | {"img_size": 64, "norm_layer": partial(nn.LayerNorm, eps=1e-2)},
    "mlp_ratio": FEW | {"img_size": 64, "mlp_ratio": 2.5},
    "head_dim 44": FEW | {"img_size": 64, "embed_dim": 44, "num_heads": (1, 2)},
    "embedding": FEW | {"img_size": 64, "num_classes": 0},
    "no pooling": FEW | {"img_size": 64, "num_classes": 0, "global_pool": ""},
}
ONLY_CR = ("default windows", "window_ratio", "extra norms")
OPTIONS_OF_V2 = {name: {"window_size": 4} | options for name, options in OPTIONS.items() if name not in ONLY_CR} | {
    "no qkv bias": SMALL | {"img_size": 64, "window_size": 4, "qkv_bias": False},
    "windows of another size in training": THREE
    | {"img_size": 64, "window_size": (4, 3), "pretrained_window_sizes": (3, 0, 1)},
}
SOURCES = {
    "timm": "swinv2_cr_tiny_224",
    "reference": "swinv2_cr_tiny_224",
    "timm, V2": "swinv2_tiny_window8_256",
    "reference, V2": "swinv2_tiny_window8_256",
}


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


def images_for(options: dict, batch: int = 1) -> Tensor:
    """Images for a model made with options."""
    size = options["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return random_images(batch, options.get("in_chans", 3), height, width)


def make(timm, options: dict, source: str) -> nn.Module:
    """A model with random weights in eval mode: timm's or our own, of the CR family or of V2."""
    create = timm.create_model if source.startswith("timm") else swinfast.create_model
    try:
        return randomise(create(SOURCES[source], **options)).eval()
    except RuntimeError as error:
        if source.startswith("timm") and "is invalid for input of size" in str(error):
            pytest.skip(f"timm {timm.__version__} does not pad maps to whole windows")
        raise


def assert_same_answers(model: nn.Module, fast: nn.Module, images: Tensor) -> None:
    """By the numerics policy in the model's own dtype, and in float64, where nothing hides behind rounding."""
    outcome = swinfast.verify(model, fast, images)
    assert outcome.passed, outcome
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(images.double())
        got = swinfast.optimize(model, dtype=torch.float64)(images)
    if isinstance(got, torch.Tensor):
        got, expected = [got], [expected]
    for one, other in zip(got, expected, strict=True):
        assert other.std() > 1e-2
        assert relative_rms(one, other) <= 1e-5


def read_csv(file: Path) -> list[list[str]]:
    """All rows, the header first."""
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


def names_in(photos: Path) -> list[str]:
    """The images of the fixture photos, in the order of a run."""
    return [str(photos / name) for name in ("a.png", "b.jpg", "e.png", "sub/c.webp", "sub/d.bmp")]
