"""How much a model computes, counted as timm's benchmark tables do.

- GMACs: multiply-adds of matrix products and convolutions, and 5 for each element that a LayerNorm with weights (4
  for one without) normalises; in 10^9, for one image. Elementwise operators count nothing.
- MActs: elements that matrix products and convolutions give out, those of attention among them; in 10^6, for one image.

timm counts with fvcore; these are its rules, applied to the operators that PyTorch runs.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution)


class Counts(NamedTuple):
    """Multiply-adds and activations of one image, in 10^9 and 10^6."""

    gmacs: float
    macts: float


def counts(model: nn.Module, shape: tuple[int, int, int]) -> Counts:
    """What one image of a shape (C, H, W) takes. Nothing is computed: on meta tensors fused attention is its products.

    Args:
        model: A plain model in eval mode, on any device and of any dtype.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    dtype = next(model.parameters()).dtype
    with torch.no_grad(), torch.device("meta"), _Counter() as counter:
        metas = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        functional_call(model, metas, torch.empty(1, *shape, dtype=dtype))
    return Counts(counter.macs / 1e9, counter.activations / 1e6)


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # here, since it imports Triton

        self.macs = self.activations = 0
        self.flops_of = flop_registry

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        operator = func.overloadpacket
        if operator in PRODUCTS:
            self.macs += self.flops_of[operator](*args, **(kwargs or {}), out_val=out) // 2
            self.activations += out.numel()
        elif operator is aten.native_layer_norm:
            self.macs += (5 if args[2] is not None else 4) * out[0].numel()
        return out
