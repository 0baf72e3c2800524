"""The models of timm's swinv2_cr and swinv2 families: architecture, tag of the weights, and how images are prepared."""

from collections.abc import Sequence
from typing import Any, NamedTuple

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
_SMALL = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_LARGE = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}
_HUGE = {"embed_dim": 352, "depths": (2, 2, 18, 2), "extra_norm_period": 6}
_GIANT = {"embed_dim": 512, "depths": (2, 2, 42, 2), "num_heads": (16, 32, 64, 128), "extra_norm_period": 6}
_NS = {"extra_norm_stage": True}

_LARGER = {"pretrained_window_sizes": (12, 12, 12, 6)}  # windows than in training


class Variant(NamedTuple):
    """Attributes:
    model: The class of the model, by its name in swinfast.reference.
    arguments: Of it, besides img_size.
    img_size: In pixels.
    tag: Of the published weights, or "untrained".
    config: What its data configuration has other than most.
    """

    model: str
    arguments: dict[str, Any]
    img_size: int
    tag: str
    config: dict[str, Any]


def _cr(arguments: dict[str, Any], img_size: int, tag: str = "untrained") -> Variant:
    return Variant("SwinTransformerV2Cr", arguments, img_size, tag, {"crop_pct": 1.0 if img_size > 224 else 0.9})


def _v2(arguments: dict[str, Any], img_size: int, window: int, tag: str = "ms_in1k") -> Variant:
    config = {"crop_pct": 1.0 if img_size > 256 else 0.9, "license": "mit"}
    if tag == "ms_in22k":
        config["num_classes"] = 21841
    return Variant("SwinTransformerV2", arguments | {"window_size": window}, img_size, tag, config)


_FINE_TUNED = "ms_in22k_ft_in1k"
VARIANTS: dict[str, Variant] = {
    "swinv2_cr_tiny_384": _cr(_TINY, 384),
    "swinv2_cr_tiny_224": _cr(_TINY, 224),
    "swinv2_cr_tiny_ns_224": _cr(_TINY | _NS, 224, "sw_in1k"),
    "swinv2_cr_small_384": _cr(_SMALL, 384),
    "swinv2_cr_small_224": _cr(_SMALL, 224, "sw_in1k"),
    "swinv2_cr_small_ns_224": _cr(_SMALL | _NS, 224, "sw_in1k"),
    "swinv2_cr_small_ns_256": _cr(_SMALL | _NS, 256),
    "swinv2_cr_base_384": _cr(_BASE, 384),
    "swinv2_cr_base_224": _cr(_BASE, 224),
    "swinv2_cr_base_ns_224": _cr(_BASE | _NS, 224),
    "swinv2_cr_large_384": _cr(_LARGE, 384),
    "swinv2_cr_large_224": _cr(_LARGE, 224),
    "swinv2_cr_huge_384": _cr(_HUGE | {"num_heads": (11, 22, 44, 88)}, 384),
    "swinv2_cr_huge_224": _cr(_HUGE | {"num_heads": (8, 16, 32, 64)}, 224),
    "swinv2_cr_giant_384": _cr(_GIANT, 384),
    "swinv2_cr_giant_224": _cr(_GIANT, 224),
    "swinv2_tiny_window8_256": _v2(_TINY, 256, 8),
    "swinv2_tiny_window16_256": _v2(_TINY, 256, 16),
    "swinv2_small_window8_256": _v2(_SMALL, 256, 8),
    "swinv2_small_window16_256": _v2(_SMALL, 256, 16),
    "swinv2_base_window8_256": _v2(_BASE, 256, 8),
    "swinv2_base_window16_256": _v2(_BASE, 256, 16),
    "swinv2_base_window12_192": _v2(_BASE, 192, 12, "ms_in22k"),
    "swinv2_base_window12to16_192to256": _v2(_BASE | _LARGER, 256, 16, _FINE_TUNED),
    "swinv2_base_window12to24_192to384": _v2(_BASE | _LARGER, 384, 24, _FINE_TUNED),
    "swinv2_large_window12_192": _v2(_LARGE, 192, 12, "ms_in22k"),
    "swinv2_large_window12to16_192to256": _v2(_LARGE | _LARGER, 256, 16, _FINE_TUNED),
    "swinv2_large_window12to24_192to384": _v2(_LARGE | _LARGER, 384, 24, _FINE_TUNED),
}


def data_config(name: str) -> dict[str, Any]:
    """The data configuration of a variant, with the keys of timm's ``pretrained_cfg``."""
    _, _, size, tag, config = VARIANTS[name]
    trained = tag != "untrained"
    return {
        "architecture": name,
        "tag": tag,
        "hf_hub_id": f"timm/{name}.{tag}" if trained else None,
        "num_classes": 1000,
        "input_size": (3, size, size),
        "fixed_input_size": True,
        "pool_size": (size // 32, size // 32),
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "apache-2.0",
    } | config


def per_channel(values: Sequence[float], channels: int | None) -> tuple[float, ...]:
    """A configuration's mean or std for a model of so many channels: for an RGB model made for one, their average."""
    return (sum(values) / len(values),) if channels == 1 else tuple(values)
