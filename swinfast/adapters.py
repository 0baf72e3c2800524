"""Which modules can be replaced: the table of model families, and how each is read into a spec.

A family is matched by structure and by the names of its types and of their file, so that the library it comes from
need not be installed. An adapter answers two questions of a module: what does a backend need to know of it (a spec),
and why must it stay as it is (a reason, or None). Anything inside a module that swinfast does not know is such a
reason.
"""

import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from .specs import BlockSpec, MergeSpec, PatchEmbedSpec, StageSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
WEIGHTED = (nn.Conv2d, nn.LayerNorm, nn.Linear)

CLASSIFIER = "SwinTransformerV2Cr"
HOMES = ("timm.models.swin_transformer_v2_cr", "swinfast.reference.model")  # the files whose computations are known
MODULE = frozenset(dir(nn.Module))


def _constant(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, which would import the compiler, and Triton with it.

    For what the class of a module answers. A compiled model guards the class already; whatever else is asked of it in
    the graph would be one more guard, checked at every call.
    """
    function._dynamo_marked_constant = True
    return function


class Adapter(NamedTuple):
    """How one kind of module of one family is read."""

    kind: str  # "patch embedding" or "stage"
    type_name: str
    read: Callable[[nn.Module], PatchEmbedSpec | StageSpec]
    check: Callable[[nn.Module], Iterator[str]]  # every reason to leave the module as it is


def adapter_of(cls: type) -> Adapter | None:
    """The adapter for a class of modules by its name, None for one that swinfast does not know.

    A copy of a known file may compute anything, and what it computes can't be seen: it is not known.
    """
    return ADAPTERS.get(cls.__qualname__) if cls.__module__ in HOMES else None


def adapter_for(module: nn.Module) -> Adapter | None:
    """The adapter for a module, replaced or not."""
    return adapter_of(class_of(module))


def is_patch_embed(module: nn.Module) -> bool:
    """Whether a module is a patch embedding that swinfast knows, replaced or not."""
    adapter = adapter_for(module)
    return adapter is not None and adapter.kind == "patch embedding"


def is_classifier(cls: type) -> bool:
    """Whether a class of modules is a classifier whose forward swinfast knows: timm's or our own, and no copy of it."""
    return cls.__module__ in HOMES and cls.__qualname__ == CLASSIFIER


def why_not(adapter: Adapter, module: nn.Module) -> str | None:
    """The first reason why a module must stay as it is, None where it can be replaced faithfully."""
    try:
        return next(adapter.check(module), None)
    except AttributeError as error:  # the type's name is known, its insides are not
        return f"its structure is not that of a {adapter.type_name}: {error}"


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or the one that it had before it was replaced."""
    return _original(type(module))


@_constant
def _original(cls: type[nn.Module]) -> type[nn.Module]:
    return getattr(cls, "original", cls)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks of its own, which must see its calls."""
    return any(getattr(module, hooks) for hooks in HOOKS)


def dropouts(module: nn.Module) -> list[nn.Module]:
    """What makes a module's answers random where it is in training mode, though the module may not be."""
    return [m for m in module.modules() if is_dropout(type(m))]


@_constant
def is_dropout(cls: type[nn.Module]) -> bool:
    """Whether modules of a class give random answers in training mode."""
    return issubclass(cls, nn.Dropout) or cls.__name__ == "DropPath"


def _read_patch_embed(module: nn.Module) -> PatchEmbedSpec:
    norm = module.norm if isinstance(module.norm, nn.LayerNorm) else None
    return PatchEmbedSpec(module.proj, norm, tuple(module.img_size) if module.strict_img_size else None)


def _check_patch_embed(module: nn.Module) -> Iterator[str]:
    yield from _check_children(module, "", {"proj": nn.Conv2d, "norm": (nn.LayerNorm, nn.Identity)})
    proj = module.proj
    plain = {"stride": proj.kernel_size, "padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
    for option, expected in plain.items():
        if getattr(proj, option) != expected:
            yield f"proj has {option} {getattr(proj, option)}, expected {expected}"
    yield from _check_insides(module)


def _read_stage(module: nn.Module) -> StageSpec:
    merge = None
    if not isinstance(module.downsample, nn.Identity):
        merge = MergeSpec(module.downsample.norm, module.downsample.reduction)
    return StageSpec(merge, tuple(_read_block(block) for block in module.blocks))


def _read_block(block: nn.Module) -> BlockSpec:
    attn, mlp = block.attn, block.mlp
    return BlockSpec(
        window=tuple(block.window_size),
        shift=tuple(block.shift_size),
        num_heads=attn.num_heads,
        qkv=attn.qkv,
        logit_scale_owner=attn,
        bias_fc1=attn.meta_mlp.fc1,
        bias_fc2=attn.meta_mlp.fc2,
        proj=attn.proj,
        norm1=block.norm1,
        fc1=mlp.fc1,
        fc2=mlp.fc2,
        norm2=block.norm2,
        norm3=block.norm3 if isinstance(block.norm3, nn.LayerNorm) else None,
    )


def _check_stage(module: nn.Module) -> Iterator[str]:
    yield from _check_children(module, "", {"downsample": ("PatchMerging", nn.Identity), "blocks": nn.Sequential})
    if not isinstance(module.downsample, nn.Identity):
        children = {"norm": nn.LayerNorm, "reduction": nn.Linear}
        yield from _check_children(module.downsample, "downsample.", children)
    if not len(module.blocks):
        yield "it has no blocks"
    for index, block in enumerate(module.blocks):
        prefix = f"blocks.{index}."
        known = "SwinTransformerV2CrBlock"
        if not is_a(known, type(block), class_of(module)):
            yield _unexpected(prefix[:-1], type(block), known, class_of(module))
        yield from _check_block(block, prefix)
    yield from _check_insides(module)


def _check_block(block: nn.Module, prefix: str) -> Iterator[str]:
    drop_path = ("DropPath", nn.Identity, None)
    dropout = (nn.Dropout, None)
    norm = nn.LayerNorm
    children = {
        "attn": "WindowMultiHeadAttention", "norm1": norm, "drop_path1": drop_path, "mlp": "Mlp", "norm2": norm,
        "drop_path2": drop_path, "norm3": (norm, nn.Identity),
    }  # fmt: skip
    yield from _check_children(block, prefix, children)
    attn_children = {
        "qkv": nn.Linear, "attn_drop": dropout, "proj": nn.Linear, "proj_drop": dropout, "meta_mlp": "Mlp",
    }  # fmt: skip
    yield from _check_children(block.attn, prefix + "attn.", attn_children)
    if "logit_scale" not in block.attn._parameters:
        yield f"{prefix}attn.logit_scale is no parameter"
    for mlp, name, act in ((block.mlp, "mlp.", nn.GELU), (block.attn.meta_mlp, "attn.meta_mlp.", nn.ReLU)):
        mlp_children = {
            "fc1": nn.Linear, "act": act, "drop1": dropout, "norm": (nn.Identity, None), "fc2": nn.Linear,
            "drop2": dropout,
        }  # fmt: skip
        yield from _check_children(mlp, prefix + name, mlp_children)
    if block.mlp.act.approximate != "none":
        yield f"{prefix}mlp.act is a GELU with the {block.mlp.act.approximate} approximation, expected the exact one"
    if tuple(block.attn.window_size) != tuple(block.window_size):
        yield f"{prefix}attn has window {block.attn.window_size}, its block {block.window_size}"


def _check_children(module: nn.Module, prefix: str, expected: dict) -> Iterator[str]:
    """Each child must be exactly of an expected type, given as a class or a type's name; None: may be absent."""
    for name in module._modules:
        if name not in expected:
            yield f"{prefix}{name} is unknown to swinfast"
    for name, types in expected.items():
        types = types if isinstance(types, tuple) else (types,)
        child = module._modules.get(name)
        if child is None:
            if None not in types:
                yield f"{prefix}{name} is missing"
        elif type(child) not in types and not any(
            isinstance(t, str) and is_a(t, type(child), class_of(module)) for t in types
        ):
            known = " or ".join(t if isinstance(t, str) else t.__name__ for t in types if t is not None)
            yield _unexpected(prefix + name, type(child), known, class_of(module))


@_constant
def is_a(name: str, child: type, parent: type) -> bool:
    """Whether a child is of the type that its parent's own file knows by a name."""
    home = sys.modules.get(parent.__module__)
    return child.__name__ == name and getattr(home, name, None) is child


def _unexpected(name: str, cls: type, known: str, parent: type) -> str:
    """Why a module of a class is none of the known ones, which its parent may have in its own file."""
    if cls.__name__ not in known:
        return f"{name} is a {cls.__name__}, expected {known}"
    if cls.__module__ == parent.__module__ and _was_defined_anew(cls):
        return _defined_anew(name, cls)
    return f"{name} is a {cls.__module__}.{cls.__name__}, expected {known}"


def _defined_anew(name: str, cls: type) -> str:
    return f"the class of {name} was defined anew: {cls.__module__} was loaded again after the model was made"


@_constant
def _was_defined_anew(cls: type) -> bool:
    """Whether a class's file has another one in its place by now, as after importlib.reload."""
    now = getattr(sys.modules.get(cls.__module__), cls.__qualname__, None)
    alike = isinstance(now, type) and (now.__module__, now.__qualname__) == (cls.__module__, cls.__qualname__)
    return alike and now is not cls


def _check_insides(module: nn.Module) -> Iterator[str]:
    """Reasons that any module can have: hooks and patches inside it, weights of foreign or mixed kinds."""
    yield from patches(module)
    for name, child in module.named_modules():
        if not name:
            continue
        if is_hooked(child):
            yield f"{name} has hooks"
        for weight in ("weight", "bias") if isinstance(child, WEIGHTED) else ():
            # in this order: that an attribute is missing is a slow guard, by way of Module.__getattr__
            if weight not in child._parameters and getattr(child, weight, None) is not None:
                yield f"{name}.{weight} is no parameter"
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        if type(parameter) not in (nn.Parameter, torch.Tensor) and not is_fake(parameter):  # export fakes them
            yield f"{name} is a {type(parameter).__name__}, expected torch.nn.Parameter"
        if parameter.layout != torch.strided:
            yield f"{name} has layout {parameter.layout}, expected torch.strided"
        if parameter.dtype not in DTYPES:
            yield f"{name} is {parameter.dtype}, expected a floating-point dtype of at least 16 bits"
    if len({(parameter.dtype, parameter.device) for parameter in parameters.values()}) > 1:
        yield "its parameters are of several dtypes or devices"


def patches(module: nn.Module) -> Iterator[str]:
    """What was put in place of methods of a module and those inside it, on them or on their classes."""
    for name, child in module.named_modules():
        cls = class_of(child)
        for method in foreign_methods(cls):
            place = name or cls.__name__
            yield _defined_anew(place, cls) if _was_defined_anew(cls) else f"the {method} method of {place} is patched"
        for method in methods(cls) if name else ():
            if method in child.__dict__:
                yield f"the {method} method of {name} is patched"


@_constant
def foreign_methods(cls: type) -> tuple[str, ...]:
    """Methods of a class that are defined elsewhere than the class: somebody put them there."""
    home = getattr(sys.modules.get(cls.__module__), "__dict__", None)
    found = ((name, getattr(cls, name)) for name in methods(cls))
    others = ((name, method) for name, method in found if method is not nn.Module.forward)
    return tuple(name for name, method in others if getattr(method, "__globals__", None) is not home)


@_constant
def methods(cls: type) -> tuple[str, ...]:
    """Names of what may be patched: forward, and the other functions of a class that is not PyTorch's."""
    return _methods(cls)


@cache
def _methods(cls: type) -> tuple[str, ...]:
    if cls.__module__.startswith("torch."):
        return ("forward",)
    names = (name for name in dir(cls) if name == "forward" or name not in MODULE)
    return tuple(name for name in names if isinstance(getattr(cls, name), FunctionType) or name == "forward")


ADAPTERS = {
    adapter.type_name: adapter
    for adapter in (
        Adapter("patch embedding", "PatchEmbed", _read_patch_embed, _check_patch_embed),
        Adapter("stage", "SwinTransformerV2CrStage", _read_stage, _check_stage),
    )
}
SUPPORTED = (
    "Swin Transformer V2 CR models: timm's swinv2_cr_* family and swinfast.create_model's, but no copies of their code"
)
