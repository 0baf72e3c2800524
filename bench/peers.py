"""What swinfast is compared with: timm as it is, compiled, with PyTorch's fused attention, and a ViT."""

import copy
import math
import sys
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinfast.benchmark import randomise
from swinfast.engines import Engine, compiled_engine, compiler_of, eager_engine, swinfast_engine

VIT = "vit_small_patch16_224"
EQUAL_TO_VIT = ("swinv2_cr_tiny_224", "swinv2_cr_tiny_ns_224")  # 4.66 GMACs, the ViT has 4.61
ENGINES = ("swinfast", "eager", "compile", "max-autotune", "sdpa", "sdpa-compile", "vit")


def engines_named(keys: Sequence[str], model: str, device: torch.device) -> list[Engine]:
    """Engines by their keys, in the order of ENGINES; the ViT only beside models that it equals in GMACs."""
    mode = "max-autotune" if device.type == "cuda" else None
    makers = {
        "swinfast": swinfast_engine,
        "eager": lambda: eager_engine("timm"),
        "compile": lambda: compiled_engine("timm"),
        "max-autotune": lambda: compiled_engine("timm", "max-autotune"),
        "sdpa": lambda: Engine("SDPA form", sdpa_form),
        "sdpa-compile": lambda: Engine(
            "SDPA form, compiled", compiler_of(sdpa_form, mode), shares_pool=mode is not None
        ),
        "vit": lambda: vit_engine(device),
    }
    wanted = [key for key in ENGINES if key in keys and (key != "vit" or model in EQUAL_TO_VIT)]
    return [makers[key]() for key in wanted]


def vit_engine(device: torch.device) -> Engine:
    """A compiled ViT-S/16, whose answers are held to its own float64.

    By torch.compile's default mode: max-autotune lost a GPU's context in it (docs/benchmarks.md).
    """
    plain = randomise(import_timm().create_model(VIT)).eval().to(device)
    return compiled_engine("timm")._replace(model=VIT, plain=plain)


def sdpa_form(plain: nn.Module, dtype: torch.dtype) -> nn.Module:
    """timm's model with F.scaled_dot_product_attention: what a user writes who knows PyTorch well.

    The position bias and the shift mask are added up once, and q and k are normalised before.
    """
    model = copy.deepcopy(plain).to(dtype)
    for stage in model.stages if hasattr(model, "stages") else model.layers:
        for block in stage.blocks:
            block.attn = _SdpaAttention(block.attn, block.attn_mask)
    return model


def _bias_of_v2(attn: nn.Module) -> Tensor:
    """The position bias [1, heads, N, N] of timm's WindowAttention."""
    tokens = attn.window_size[0] * attn.window_size[1]
    by_offset = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
    bias = by_offset[attn.relative_position_index.view(-1)].view(1, tokens, tokens, -1)
    return 16 * torch.sigmoid(bias.permute(0, 3, 1, 2))


class _SdpaAttention(nn.Module):
    """In place of timm's WindowMultiHeadAttention, or its WindowAttention."""

    def __init__(self, attn: nn.Module, mask: Tensor | None):
        super().__init__()
        self.num_heads, self.qkv, self.proj = attn.num_heads, attn.qkv, attn.proj
        with torch.no_grad():
            if hasattr(attn, "cpb_mlp"):
                bias = _bias_of_v2(attn)
                if attn.q_bias is not None:
                    self.qkv.bias = nn.Parameter(torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)))
            else:
                bias = attn._relative_positional_encodings()  # [1, heads, N, N]
            windows = 1 if mask is None else len(mask)
            if mask is not None:
                bias = bias + mask.to(bias).unsqueeze(1)  # [windows, heads, N, N]
            scale = attn.logit_scale.clamp(max=math.log(100.0)).exp()
        self.windows = windows
        self.register_buffer("bias", bias.flatten(0, 1).unsqueeze(0).contiguous())  # [1, windows * heads, N, N]
        self.register_buffer("scale", scale.view(-1, 1, 1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: [B * windows, N, C]; mask is in the bias already."""
        count, tokens, channels = x.shape
        qkv = self.qkv(x).view(count, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # [B * windows, heads, N, C / heads]
        q, k = F.normalize(q, dim=-1) * self.scale, F.normalize(k, dim=-1)
        q, k, v = (t.reshape(count // self.windows, -1, tokens, t.shape[-1]) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, self.bias.expand(len(q), -1, -1, -1), scale=1.0)
        x = x.reshape(count, self.num_heads, tokens, -1).transpose(1, 2).reshape(count, tokens, channels)
        return self.proj(x)


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
