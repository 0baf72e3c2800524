"""Which modules can be replaced: the table of model families, and how each is read into a spec.

A family is matched by structure and by the names of its types and of their file, so that the library it comes from
need not be installed. An adapter answers two questions of a module: what does a backend need to know of it (a spec),
and why must it stay as it is (a reason, or None). Anything inside a module that swinfast does not know is such a
reason.

Two families are known. CR: timm's swinv2_cr_*, and our own. V2: timm's swinv2_*, the models of the paper's authors.
They differ in where the norm of patch merging is, in how the position bias is bounded, in the bias of q, k and v, and
in what lies between their parts: maps [B, C, H, W] in CR, [B, H, W, C] in V2.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from .modules import check_children, check_insides, class_of, is_a, unexpected
from .specs import BlockSpec, MergeSpec, PatchEmbedSpec, StageSpec

CR = ("timm.models.swin_transformer_v2_cr", "swinfast.reference.cr")  # the files whose computations are known
V2 = ("timm.models.swin_transformer_v2", "swinfast.reference.v2")
SHARED = ("timm.layers.patch_embed",)  # where timm's V2 has its patch embedding from, as others have
PATCH_EMBEDDING, STAGE = "patch embedding", "stage"


class Adapter(NamedTuple):
    """How one kind of module of one family is read."""

    kind: str  # PATCH_EMBEDDING or STAGE
    type_name: str
    homes: tuple[str, ...]  # files
    read: Callable[[nn.Module], PatchEmbedSpec | StageSpec]
    check: Callable[[nn.Module], Iterator[str]]  # every reason to leave the module as it is
    channels_first: bool  # whether maps between the family's parts are [B, C, H, W], else [B, H, W, C]
    shared: bool = False  # whether other families have modules of this class, too

    @property
    def memory_format(self) -> torch.memory_format:
        """Of such maps: channels are always last in memory."""
        return torch.channels_last if self.channels_first else torch.contiguous_format


def adapter_of(cls: type) -> Adapter | None:
    """The adapter for a class of modules by its name, None for one that swinfast does not know.

    A copy of a known file may compute anything, and what it computes can't be seen: it is not known.
    """
    return ADAPTERS.get((cls.__module__, cls.__qualname__))


def adapted(model: nn.Module) -> Iterator[tuple[nn.Module, Adapter]]:
    """The modules of a model that swinfast knows, replaced or not.

    Of a class that other families have, too, those that are replaced already, and the one that has stages of a known
    family beside it.
    """
    named = dict(model.named_modules())
    for name, module in named.items():
        adapter = adapter_of(class_of(module))
        if adapter is not None and (not adapter.shared or _is_ours(adapter, name, named)):
            yield module, adapter


def _is_ours(adapter: Adapter, name: str, named: dict[str, nn.Module]) -> bool:
    """Whether a patch embedding of a class that is shared is replaced already, or the only one in the smallest part of
    a model with it and stages that take what it gives."""
    if class_of(named[name]) is not type(named[name]):
        return True
    while name:
        name = name.rpartition(".")[0]
        found = [one for one in (adapter_of(class_of(m)) for m in named[name].modules()) if one is not None]
        if any(one.kind == STAGE and one.channels_first == adapter.channels_first for one in found):
            return sum(one.kind == PATCH_EMBEDDING for one in found) == 1
    return False


def patch_embeds(model: nn.Module) -> list[nn.Module]:
    """The patch embeddings of a model that swinfast knows, replaced or not."""
    return [module for module, adapter in adapted(model) if adapter.kind == PATCH_EMBEDDING]


def parts_of(cls: type) -> tuple[str, ...] | None:
    """The parts of a classifier, in the order in which it calls them: its patch embedding, its stages, and the rest.

    None for a class whose forward swinfast does not know: it is neither timm's nor our own, or a copy of it.
    """
    return CLASSIFIERS.get((cls.__module__, cls.__qualname__))


def why_not(adapter: Adapter, module: nn.Module) -> str | None:
    """The first reason why a module must stay as it is, None where it can be replaced faithfully."""
    try:
        return next(adapter.check(module), None)
    except AttributeError as error:  # the type's name is known, its insides are not
        return f"its structure is not that of a {adapter.type_name}: {error}"


def _read_patch_embed(module: nn.Module, whole_patches: bool) -> PatchEmbedSpec:
    norm = module.norm if isinstance(module.norm, nn.LayerNorm) else None
    return PatchEmbedSpec(module.proj, norm, tuple(module.img_size) if module.strict_img_size else None, whole_patches)


def _check_patch_embed(module: nn.Module) -> Iterator[str]:
    yield from check_children(module, "", {"proj": nn.Conv2d, "norm": (nn.LayerNorm, nn.Identity)})
    proj = module.proj
    plain = {"stride": proj.kernel_size, "padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
    for option, expected in plain.items():
        if getattr(proj, option) != expected:
            yield f"proj has {option} {getattr(proj, option)}, expected {expected}"
    yield from check_insides(module)


def _check_shared_patch_embed(module: nn.Module) -> Iterator[str]:
    for option, expected in {"flatten": False, "output_fmt": "NHWC", "dynamic_img_pad": False}.items():
        if getattr(module, option) != expected:
            yield f"it has {option} {getattr(module, option)}, expected {expected}"
    if module.img_size is None:
        yield "it has no img_size"
    yield from _check_patch_embed(module)


def _read_stage(module: nn.Module, read_block: Callable[[nn.Module], BlockSpec], norm_last: bool) -> StageSpec:
    merge = None
    if not isinstance(module.downsample, nn.Identity):
        merge = MergeSpec(module.downsample.norm, module.downsample.reduction, norm_last)
    return StageSpec(merge, tuple(map(read_block, module.blocks)))


def _read_cr_block(block: nn.Module) -> BlockSpec:
    attn = block.attn
    return BlockSpec(
        **_of_any_block(block),
        qkv_bias_owner=None,
        bias_fc1=attn.meta_mlp.fc1,
        bias_fc2=attn.meta_mlp.fc2,
        bias_span=None,
        norm3=block.norm3 if isinstance(block.norm3, nn.LayerNorm) else None,
    )


def _read_v2_block(block: nn.Module) -> BlockSpec:
    attn = block.attn
    trained = tuple(attn.pretrained_window_size)
    return BlockSpec(
        **_of_any_block(block),
        qkv_bias_owner=attn,
        bias_fc1=attn.cpb_mlp[0],
        bias_fc2=attn.cpb_mlp[2],
        bias_span=trained if trained[0] > 0 else tuple(attn.window_size),
        norm3=None,
    )


def _of_any_block(block: nn.Module) -> dict:
    attn, mlp = block.attn, block.mlp
    return {
        "window": tuple(block.window_size),
        "shift": tuple(block.shift_size),
        "num_heads": attn.num_heads,
        "qkv": attn.qkv,
        "logit_scale_owner": attn,
        "proj": attn.proj,
        "norm1": block.norm1,
        "fc1": mlp.fc1,
        "fc2": mlp.fc2,
        "norm2": block.norm2,
    }


DROPOUT = (nn.Dropout, None)
GELU = (nn.GELU, "timm.layers.activations.GELU")
DROP_PATH = ("DropPath", nn.Identity, None)
BLOCK = {
    "norm1": nn.LayerNorm, "drop_path1": DROP_PATH, "mlp": "Mlp", "norm2": nn.LayerNorm, "drop_path2": DROP_PATH,
}  # fmt: skip
ATTENTION = {"qkv": nn.Linear, "attn_drop": DROPOUT, "proj": nn.Linear, "proj_drop": DROPOUT}


def _check_stage(
    module: nn.Module, blocks: type[nn.Module], block_type: str, check_block: Callable[[nn.Module, str], Iterator[str]]
) -> Iterator[str]:
    yield from check_children(module, "", {"downsample": ("PatchMerging", nn.Identity), "blocks": blocks})
    if not isinstance(module.downsample, nn.Identity):
        children = {"norm": nn.LayerNorm, "reduction": nn.Linear}
        yield from check_children(module.downsample, "downsample.", children)
    if not len(module.blocks):
        yield "it has no blocks"
    for index, block in enumerate(module.blocks):
        prefix = f"blocks.{index}."
        if not is_a(block_type, type(block), class_of(module)):
            yield unexpected(prefix[:-1], type(block), block_type, class_of(module))
        yield from check_block(block, prefix)
        if "logit_scale" not in block.attn._parameters:
            yield f"{prefix}attn.logit_scale is no parameter"
        yield from _check_mlp(block.mlp, prefix + "mlp.", GELU)
        approximation = getattr(block.mlp.act, "approximate", "none")  # timm's has none
        if approximation != "none":
            yield f"{prefix}mlp.act is a GELU with the {approximation} approximation, expected the exact one"
        if tuple(block.attn.window_size) != tuple(block.window_size):
            yield f"{prefix}attn has window {block.attn.window_size}, its block {block.window_size}"
    yield from check_insides(module)


def _check_cr_block(block: nn.Module, prefix: str) -> Iterator[str]:
    children = BLOCK | {"attn": "WindowMultiHeadAttention", "norm3": (nn.LayerNorm, nn.Identity)}
    yield from check_children(block, prefix, children)
    yield from check_children(block.attn, prefix + "attn.", ATTENTION | {"meta_mlp": "Mlp"})
    yield from _check_mlp(block.attn.meta_mlp, prefix + "attn.meta_mlp.", nn.ReLU)


def _check_v2_block(block: nn.Module, prefix: str) -> Iterator[str]:
    yield from check_children(block, prefix, BLOCK | {"attn": "WindowAttention"})
    attn, prefix = block.attn, prefix + "attn."
    yield from check_children(attn, prefix, ATTENTION | {"cpb_mlp": nn.Sequential, "softmax": (nn.Softmax, None)})
    yield from check_children(attn.cpb_mlp, prefix + "cpb_mlp.", {"0": nn.Linear, "1": nn.ReLU, "2": nn.Linear})
    if "softmax" in attn._modules and attn.softmax.dim != -1:
        yield f"{prefix}softmax is over dimension {attn.softmax.dim}, expected the last"
    for name in ("q_bias", "v_bias"):
        if getattr(attn, name) is not attn._parameters.get(name):
            yield f"{prefix}{name} is no parameter"
    if getattr(attn, "k_bias", None) is not attn._buffers.get("k_bias"):
        yield f"{prefix}k_bias is no buffer"
    if attn.q_bias is not None and attn._buffers.get("k_bias", 0) is None:
        yield f"{prefix[:-1]} has q_bias and no k_bias"
    if attn.qkv.bias is not None:
        yield f"{prefix}qkv has a bias of its own"


def _check_mlp(mlp: nn.Module, prefix: str, act: type[nn.Module] | tuple) -> Iterator[str]:
    children = {
        "fc1": nn.Linear, "act": act, "drop1": DROPOUT, "norm": (nn.Identity, None), "fc2": nn.Linear, "drop2": DROPOUT,
    }  # fmt: skip
    yield from check_children(mlp, prefix, children)


def _patch_embedding(homes: tuple[str, ...], check: Callable = _check_patch_embed, **about: bool) -> Adapter:
    read = partial(_read_patch_embed, whole_patches=not about["channels_first"])
    return Adapter(PATCH_EMBEDDING, "PatchEmbed", homes, read, check, **about)


def _stage(type_name: str, homes: tuple[str, ...], read_block: Callable, channels_first: bool, **blocks) -> Adapter:
    read = partial(_read_stage, read_block=read_block, norm_last=not channels_first)
    return Adapter(STAGE, type_name, homes, read, partial(_check_stage, **blocks), channels_first)


OF_CR = {"blocks": nn.Sequential, "block_type": "SwinTransformerV2CrBlock", "check_block": _check_cr_block}
OF_V2 = {"blocks": nn.ModuleList, "block_type": "SwinTransformerV2Block", "check_block": _check_v2_block}
ADAPTERS = {
    (home, adapter.type_name): adapter
    for adapter in (
        _patch_embedding(CR, channels_first=True),
        _stage("SwinTransformerV2CrStage", CR, _read_cr_block, channels_first=True, **OF_CR),
        _patch_embedding(V2[1:], channels_first=False),
        _patch_embedding(SHARED, _check_shared_patch_embed, channels_first=False, shared=True),
        _stage("SwinTransformerV2Stage", V2, _read_v2_block, channels_first=False, **OF_V2),
    )
    for home in adapter.homes
}
CLASSIFIERS = {
    **{(home, "SwinTransformerV2Cr"): ("patch_embed", "stages", "head") for home in CR},
    **{(home, "SwinTransformerV2"): ("patch_embed", "layers", "norm", "head") for home in V2},
}
SUPPORTED = (
    "Swin Transformer V2 models: timm's swinv2_* and swinv2_cr_* families and swinfast.create_model's, but no copies "
    "of their code"
)
