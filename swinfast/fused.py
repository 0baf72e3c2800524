"""The replaced modules. A module is replaced by giving it a subclass of its own class that overrides forward, so its
submodules, parameters, names, methods and attributes stay the original ones, and isinstance holds.

In training mode, and wherever the fused computation would not be faithful, the original forward runs.
"""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_globals

from .adapters import HOOKS, Adapter, adapter_of, why_not
from .backends import backend_for
from .plan import Plan
from .recompute import FusedForward

CHUNK_TOKENS = 4 * 56 * 56  # that a CPU works on at a time: four images of 224 x 224, about what its caches hold
ImageScale = tuple[tuple[float, ...], tuple[float, ...]]


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
            plan = self._swinfast.plan = Plan(self.adapter, self)
        return plan

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor or x.is_meta:
            if why_not(self.adapter, self) is not None:
                return super().forward(x)
            spec = self.adapter.read(self)
            return self._run(spec, None, self._prepare(spec, x))
        if _is_transformed():
            return super().forward(x)
        plan = self.plan()
        if plan.reason is not None or plan.is_random():
            return super().forward(x)
        x = self._prepare(plan.spec, x)
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in plan.parameters)):
            return FusedForward.apply(self, plan, x, *plan.parameters)
        return self.fused_forward(plan, x)

    def original_forward(self, x: Tensor) -> Tensor:
        return self.original.forward(self, x)

    def fused_forward(self, plan: Plan, x: Tensor) -> Tensor:
        return self._run(plan.spec, plan, x)

    def _prepare(self, spec: Any, x: Tensor) -> Tensor:
        """The input as the original takes it, where the fused module takes more."""
        return x

    def _run(self, spec: Any, plan: Plan | None, x: Tensor) -> Tensor:
        """The fused computation. Without a plan, in a traced graph, everything is derived on the spot."""
        raise NotImplementedError

    def _tables(self, spec: Any, plan: Plan | None, device: torch.device, derive) -> Any:
        """What the backend derives from the parameters; autocast casts only what is left as it is."""
        if plan is None:
            return derive(spec, pack=False)
        pack = not torch.is_autocast_enabled(device.type)
        return plan.derived((derive.__module__, pack), partial(derive, pack=pack))


class FusedPatchEmbed(FusedComputation):
    """Patch embedding that casts floating-point images to the model's dtype and normalises uint8 ones."""

    def _prepare(self, spec, x):
        self._check(spec, x)
        if x.dtype == torch.uint8:
            x = self._normalise(x)
        return x.to(spec.proj.weight.dtype)

    def _run(self, spec, plan, x):
        backend = backend_for(self._swinfast.backend, x.device)
        tables = self._tables(spec, plan, x.device, backend.derive_patch_embed)
        return backend.patch_embed(spec, tables, x).permute(0, 3, 1, 2)

    def _check(self, spec, images: Tensor) -> None:
        """Errors of the types that the original raises."""
        if images.dim() != 4:
            raise ValueError(f"images must be [B, {spec.proj.in_channels}, H, W], got shape {tuple(images.shape)}")
        if images.shape[1] != spec.proj.in_channels:
            raise RuntimeError(f"images must have {spec.proj.in_channels} channels, got shape {tuple(images.shape)}")
        if not images.is_floating_point() and images.dtype != torch.uint8:
            raise RuntimeError(f"images must be floating-point or uint8, got {images.dtype}")
        if spec.img_size is not None:
            for axis, got, expected in zip(("height", "width"), images.shape[2:], spec.img_size, strict=True):
                assert got == expected, f"Input image {axis} ({got}) doesn't match model ({expected})."

    def _normalise(self, images: Tensor) -> Tensor:
        if self._swinfast.image_scale is None:
            raise ValueError(
                "images are uint8 and the model's config has no mean and std to normalise them with: "
                "give optimize(..., mean=..., std=...), or pass floating-point images"
            )
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in self._swinfast.image_scale)
        return (images / 255 - mean) / std


class FusedStage(FusedComputation):
    """Patch merging and the blocks of one stage, [B, C, H, W] in and out."""

    def _run(self, spec, plan, x):
        backend = backend_for(self._swinfast.backend, x.device)
        tables = self._tables(spec, plan, x.device, backend.derive_stage)
        return backend.stage(spec, tables, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FusedStages(Fused):
    """The Sequential of stages. On a CPU a large batch goes through in chunks that stay in its caches."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != "cpu":
            return super().forward(x)
        chunk = max(1, CHUNK_TOKENS // max(1, x.shape[2] * x.shape[3]))
        if x.shape[0] <= chunk or _is_transformed() or not all(map(_takes_chunks, self)):
            return super().forward(x)
        return torch.cat([self.original.forward(self, part) for part in x.split(chunk)])


def _takes_chunks(stage: nn.Module) -> bool:
    """Whether nothing in or on a stage could tell a part of a batch from the whole."""
    hooked = any(getattr(stage, hooks) for hooks in HOOKS)
    return isinstance(stage, FusedStage) and not hooked and stage.plan().reason is None


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


def _is_transformed() -> bool:
    """Whether the call is under something that must see the original's own operations: hooks on every module,
    forward-mode differentiation, or a torch.func transform."""
    return bool(
        module_globals._has_any_global_hook()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
