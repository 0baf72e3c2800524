"""The 16 models of timm's swinv2_cr family: architecture, weights tag, and how images are prepared for them."""

from collections.abc import Sequence
from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
_SMALL = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_LARGE = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}
_HUGE = {"embed_dim": 352, "depths": (2, 2, 18, 2), "extra_norm_period": 6}
_GIANT = {"embed_dim": 512, "depths": (2, 2, 42, 2), "num_heads": (16, 32, 64, 128), "extra_norm_period": 6}
_NS = {"extra_norm_stage": True}

# name: (arguments, image size, tag of the published weights or "untrained")
VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "swinv2_cr_tiny_384": (_TINY, 384, "untrained"),
    "swinv2_cr_tiny_224": (_TINY, 224, "untrained"),
    "swinv2_cr_tiny_ns_224": (_TINY | _NS, 224, "sw_in1k"),
    "swinv2_cr_small_384": (_SMALL, 384, "untrained"),
    "swinv2_cr_small_224": (_SMALL, 224, "sw_in1k"),
    "swinv2_cr_small_ns_224": (_SMALL | _NS, 224, "sw_in1k"),
    "swinv2_cr_small_ns_256": (_SMALL | _NS, 256, "untrained"),
    "swinv2_cr_base_384": (_BASE, 384, "untrained"),
    "swinv2_cr_base_224": (_BASE, 224, "untrained"),
    "swinv2_cr_base_ns_224": (_BASE | _NS, 224, "untrained"),
    "swinv2_cr_large_384": (_LARGE, 384, "untrained"),
    "swinv2_cr_large_224": (_LARGE, 224, "untrained"),
    "swinv2_cr_huge_384": (_HUGE | {"num_heads": (11, 22, 44, 88)}, 384, "untrained"),
    "swinv2_cr_huge_224": (_HUGE | {"num_heads": (8, 16, 32, 64)}, 224, "untrained"),
    "swinv2_cr_giant_384": (_GIANT, 384, "untrained"),
    "swinv2_cr_giant_224": (_GIANT, 224, "untrained"),
}


def data_config(name: str) -> dict[str, Any]:
    """The data configuration of a variant, with the keys of timm's ``pretrained_cfg``."""
    _, size, tag = VARIANTS[name]
    trained = tag != "untrained"
    return {
        "architecture": name,
        "tag": tag,
        "hf_hub_id": f"timm/{name}.{tag}" if trained else None,
        "num_classes": 1000,
        "input_size": (3, size, size),
        "fixed_input_size": True,
        "pool_size": (size // 32, size // 32),
        "crop_pct": 1.0 if size > 224 else 0.9,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "apache-2.0",
    }


def per_channel(values: Sequence[float], channels: int | None) -> tuple[float, ...]:
    """A configuration's mean or std for a model of so many channels: for an RGB model made for one, their average."""
    return (sum(values) / len(values),) if channels == 1 else tuple(values)
