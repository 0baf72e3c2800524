"""The peers that swinfast is compared with."""

import sys
from types import ModuleType

import torch


def import_timm() -> ModuleType:
    """timm, also beside a PyTorch build that torchvision's compiled operators don't load with.

    Without them torchvision fails to import on two operators that it registers shapes for; declared here, they
    satisfy it. timm's Swin models use neither.
    """
    try:
        import timm
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "timm")]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", schema)
        import timm
    return timm
