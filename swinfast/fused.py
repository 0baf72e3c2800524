"""The replaced modules. A module is replaced by giving it a subclass of its own class that overrides forward, so its
submodules, parameters, names, methods and attributes stay the original ones, and isinstance holds.

In training mode, and wherever the fused computation would not be faithful, the original forward runs.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_globals

from . import torch_backend
from .adapters import Adapter, adapter_of, why_not
from .autocast import autocast_dtype
from .backends import choose
from .plan import Plan
from .recompute import FusedForward
from .specs import ImageScale

# Numbers of the residual stream that a CPU works on at a time, about what its caches hold with all that is made of
# them: 2, 4, 8 and 16 images in the four stages of a tiny model.
PART = 2 * 56 * 56 * 96


class Settings:
    """What optimize was told of a module, and its plan, which no copy or pickle takes along."""

    def __init__(self, backend: str, image_scale: ImageScale | None = None):
        self.backend = backend
        self.image_scale = image_scale  # mean and std for uint8 images
        self.plan: Plan | None = None

    def __reduce__(self):
        return Settings, (self.backend, self.image_scale)

    def __deepcopy__(self, memo):
        return Settings(self.backend, self.image_scale)


class Fused:
    """What all replaced modules share; their other parent is the class they had."""

    original: type[nn.Module]

    def __reduce_ex__(self, protocol):
        """Rebuild from the two parents: the class itself is made at run time and can't be imported."""
        return _rebuild, (type(self).__bases__[0], self.original), self.__dict__

    def _replicate_for_data_parallel(self):
        """Replicas of nn.DataParallel hold tensors in place of parameters: they run the original."""
        replica = super()._replicate_for_data_parallel()
        replica.__class__ = self.original
        return replica


class FusedComputation(Fused):
    """A module whose forward a backend computes."""

    _swinfast: Settings

    def _apply(self, fn, recurse=True):
        self._swinfast.plan = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self._swinfast.plan = None
        super()._load_from_state_dict(*args, **kwargs)

    def set_input_size(self, *args, **kwargs):
        self._swinfast.plan = None
        return super().set_input_size(*args, **kwargs)

    @property
    def adapter(self) -> Adapter:
        return adapter_of(self.original)

    def plan(self) -> Plan:
        """How this module runs now."""
        plan = self._swinfast.plan
        if plan is None or not plan.holds():
            plan = self._swinfast.plan = Plan(self.adapter, self, self._swinfast.backend)
        return plan

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor or x.is_meta:
            return self._traced_forward(x)
        if _is_transformed():
            return super().forward(x)
        plan = self.plan()
        if plan.reason is not None or plan.is_random():
            return super().forward(x)
        self._check(plan.spec, x)
        if _needs_grad(x, plan.parameters):
            return FusedForward.apply(self, plan, self._prepare(plan.spec, x), *plan.parameters)
        return self.fused_forward(plan, x)

    def original_forward(self, x: Tensor) -> Tensor:
        return self.original.forward(self, x)

    def fused_forward(self, plan: Plan, x: Tensor) -> Tensor:
        autocast = autocast_dtype(x.device)
        derive = partial(self._derive, plan.backend, traced=False, autocast=autocast)
        run = partial(self._run, plan.backend, plan.spec, plan.derived(autocast, derive))
        if x.device.type != "cpu":
            return run(x)
        return _in_parts(run, x, max(1, PART // max(1, self._numbers(plan.spec, x))))

    def _traced_forward(self, x: Tensor) -> Tensor:
        """In a graph everything is derived on the spot, so that the graph sees edited weights."""
        if why_not(self.adapter, self) is not None:
            return super().forward(x)
        spec, parameters = self.adapter.read(self), tuple(self.parameters())
        choice = choose(self._swinfast.backend, spec, parameters[0].device, parameters[0].dtype)
        if choice.backend is None:
            return super().forward(x)
        # the graph must be differentiable where gradients are wanted, and only PyTorch's operations are
        backend = torch_backend if _needs_grad(x, parameters) else choice.backend
        self._check(spec, x)
        return self._run(backend, spec, self._derive(backend, spec, True, autocast_dtype(x.device)), x)

    def _check(self, spec: Any, x: Tensor) -> None:
        """Refuse what the original refuses, with errors of its types."""

    def _prepare(self, spec: Any, x: Tensor) -> Tensor:
        """The input as the original takes it, where the fused module takes more."""
        return x

    def _numbers(self, spec: Any, x: Tensor) -> int:
        """How many numbers one image is inside the module."""
        return x[:1].numel()

    def _derive(self, backend: ModuleType, spec: Any, traced: bool, autocast: torch.dtype | None) -> Any:
        """What the backend needs of the parameters."""
        raise NotImplementedError

    def _run(self, backend: ModuleType, spec: Any, tables: Any, x: Tensor) -> Tensor:
        """The fused computation."""
        raise NotImplementedError


class FusedPatchEmbed(FusedComputation):
    """Patch embedding that casts floating-point images to the model's dtype and normalises uint8 ones."""

    def _prepare(self, spec, x):
        return torch_backend.normalise(x, self._swinfast.image_scale, spec.proj.weight.dtype)

    def _derive(self, backend, spec, traced, autocast):
        return backend.derive_patch_embed(spec, traced, autocast)

    def _run(self, backend, spec, tables, x):
        return backend.patch_embed(spec, tables, x, self._swinfast.image_scale).permute(0, 3, 1, 2)

    def _check(self, spec, images):
        if images.dim() != 4:
            raise ValueError(f"images must be [B, {spec.proj.in_channels}, H, W], got shape {tuple(images.shape)}")
        if images.shape[1] != spec.proj.in_channels:
            raise RuntimeError(f"images must have {spec.proj.in_channels} channels, got shape {tuple(images.shape)}")
        patch = spec.proj.kernel_size
        if images.shape[2] < patch[0] or images.shape[3] < patch[1]:
            raise RuntimeError(f"images must be at least {patch[0]} by {patch[1]}, got shape {tuple(images.shape)}")
        if not images.is_floating_point() and images.dtype != torch.uint8:
            raise RuntimeError(f"images must be floating-point or uint8, got {images.dtype}")
        if spec.img_size is not None:
            for axis, got, expected in zip(("height", "width"), images.shape[2:], spec.img_size, strict=True):
                assert got == expected, f"Input image {axis} ({got}) doesn't match model ({expected})."
        if images.dtype == torch.uint8 and self._swinfast.image_scale is None:
            raise ValueError(
                "images are uint8 and the model's config has no mean and std to normalise them with: "
                "give optimize(..., mean=..., std=...), or pass floating-point images"
            )


class FusedStage(FusedComputation):
    """Patch merging and the blocks of one stage, [B, C, H, W] in and out."""

    def _numbers(self, spec, x):
        return x[:1].numel() if spec.merge is None else x[:1].numel() // 2

    def _derive(self, backend, spec, traced, autocast):
        return backend.derive_stage(spec, traced, autocast)

    def _run(self, backend, spec, tables, x):
        return backend.stage(spec, tables, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _in_parts(run: Callable[[Tensor], Tensor], x: Tensor, images: int) -> Tensor:
    """run(x), a few images at a time: what a part writes stays in a CPU's caches.

    Args:
        run: Maps [B, C, H, W] to [B, C', H', W'], each image on its own.
    """
    if x.shape[0] <= images:
        return run(x)
    whole, done = None, 0
    for part in map(run, x.split(images)):
        if whole is None:
            shape = (x.shape[0], *part.shape[1:])
            whole = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)
        whole[done : done + len(part)] = part
        done += len(part)
    return whole


FUSED = {"patch embedding": FusedPatchEmbed, "stage": FusedStage}


def fuse(module: nn.Module, mixin: type[Fused]) -> None:
    """Replace a module, in place."""
    module.__class__ = _fused_class(mixin, type(module))


@cache
def _fused_class(mixin: type[Fused], original: type[nn.Module]) -> type[nn.Module]:
    return type(f"Fused{original.__name__}", (mixin, original), {"original": original, "__doc__": mixin.__doc__})


def _rebuild(mixin: type[Fused], original: type[nn.Module]) -> nn.Module:
    cls = _fused_class(mixin, original)
    return cls.__new__(cls)


def _needs_grad(x: Tensor, parameters: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))


def _is_transformed() -> bool:
    """Whether the call is under something that must see the original's own operations: hooks on every module,
    forward-mode differentiation, or a torch.func transform."""
    return bool(
        module_globals._has_any_global_hook()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
