"""The replaced modules. A module is replaced by giving it a subclass of its own class that overrides forward, so its
submodules, parameters, names, methods and attributes stay the original ones, and isinstance holds.

In training mode, and wherever the fused computation would not be faithful, the original forward runs.
"""

import copy
import warnings
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import graphs, torch_backend
from .adapters import PATCH_EMBEDDING, STAGE, SUPPORTED, Adapter, adapter_of, why_not
from .autocast import autocast_dtype
from .backends import choose
from .calls import is_traced, is_transformed, kind_of, needs_grad
from .errors import in_a_line, raise_out_of_memory
from .modules import DTYPES, dropouts, patches
from .plan import Plan
from .recompute import FusedForward
from .self_check import is_asked_for, self_check
from .specs import ImageScale

IMAGE_DTYPES = (*DTYPES, torch.uint8)


class Settings:
    """What optimize was told of a module, and what was found since, which no copy or pickle takes along.

    Attributes:
        image_scale: Mean and std for uint8 images.
        plan: How the module runs: a Plan, a SequencePlan or a ClassifierPlan, None where that is not known.
        failure: How Triton failed at the module, None where it has not.
        unchecked: Whether Triton's next answer is to be checked; until it was, no CUDA graph is made.
    """

    def __init__(self, backend: str, cuda_graphs: bool | str = "auto", image_scale: ImageScale | None = None):
        self.backend = backend
        self.cuda_graphs = cuda_graphs
        self.image_scale = image_scale
        self.forget()

    def forget(self) -> None:
        """Find out anew how the module runs."""
        self.plan: Any = None
        self.failure: str | None = None
        self.unchecked = is_asked_for()

    def __reduce__(self):
        return Settings, (self.backend, self.cuda_graphs, self.image_scale)


class Fused:
    """What all replaced modules share; their other parent is the class they had."""

    original: type[nn.Module]
    _swinfast: Settings

    def __init__(self, *args, **kwargs):
        """A module of the same class, not optimised yet, as type(fast)(...) makes it."""
        super().__init__(*args, **kwargs)
        self._swinfast = Settings("auto")

    def _apply(self, fn, recurse=True):
        """As nn.Module's; the plan, and what it keeps in memory, ends with the first weight that is moved or cast."""

        def apply(tensor):
            result = fn(tensor)
            if result is not tensor:  # to() gives back what is already as it should be
                self._swinfast.plan = None
            return result

        return super()._apply(apply, recurse)

    def __reduce_ex__(self, protocol):
        """Rebuild from the two parents: the class itself is made at run time and can't be imported."""
        # a plan is of one module, and so is what Module.compile made
        state = self.__dict__ | {"_swinfast": copy.copy(self._swinfast), "_compiled_call_impl": None}
        return _rebuild, (type(self).__bases__[0], self.original), state

    def _replicate_for_data_parallel(self):
        """Replicas of nn.DataParallel hold tensors in place of parameters: they run the original."""
        replica = super()._replicate_for_data_parallel()
        replica.__class__ = self.original
        return replica


class FusedComputation(Fused):
    """A module whose forward a backend computes."""

    @property
    def adapter(self) -> Adapter:
        return adapter_of(self.original)

    def plan(self) -> Plan:
        """How this module runs now."""
        plan = self._swinfast.plan
        if plan is None or not plan.holds(self):
            plan = Plan(self.adapter, self, self._swinfast.backend, self._swinfast.failure)
            self._swinfast.plan = plan
        return plan

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):
            return super().forward(x)
        if self.training or is_transformed():
            return self._original_forward(x)
        if is_traced(x):
            return self._traced_forward(x)
        plan = self.plan()
        if plan.reason is not None or plan.is_random():
            return self._original_forward(x)
        self._check(plan.spec, x)
        if needs_grad(x, plan.parameters):
            return FusedForward.apply(self, plan, self._kept(self._prepare(x)), *plan.parameters)
        return self.fused_forward(plan, x)

    def fused_forward(self, plan: Plan, x: Tensor) -> Tensor:
        """The fused computation without gradients, by another backend where Triton fails at it."""
        if not plan.backend.may_fail:
            return self.compute(plan, x)
        try:
            out = self.compute(plan, x)
            due = self._swinfast.unchecked and not graphs.is_capturing(x.device)  # where nothing is computed now
            problem = self_check(self, self._prepare(x)) if due else None
        except Exception as error:
            raise_out_of_memory(error)
            problem = in_a_line(error)
        return out if problem is None else self._fall_back(problem, x)

    def _fall_back(self, problem: str, x: Tensor) -> Tensor:
        """Compute without Triton, now and from now on; where PyTorch fails too, the input is at fault."""
        plan = Plan(self.adapter, self, self._swinfast.backend, problem)
        out = self._original_forward(x) if plan.backend is None else self.compute(plan, x)
        self._swinfast.plan, self._swinfast.failure, self._swinfast.unchecked = plan, problem, False
        kind = self.adapter.kind
        warnings.warn(f"Triton failed, so a {kind} is computed without it from now on: {problem}", stacklevel=2)
        return out

    def compute(self, plan: Plan, x: Tensor) -> Tensor:
        """The fused computation by the plan's backend."""
        return self._run(plan.backend, plan.spec, self.tables(plan, kind_of(x)), x)

    def tables(self, plan: Plan, kind: tuple) -> Any:
        """What the plan's backend needs of the parameters, made once."""
        derive = partial(self._derive, plan.backend, traced=False, autocast=kind[0])
        return plan.derived(kind, derive)

    def _original_forward(self, x: Tensor) -> Tensor:
        """The original computation, of an input that the fused one takes."""
        return super().forward(self._prepare(x))

    def _traced_forward(self, x: Tensor) -> Tensor:
        """In a graph everything is derived on the spot, so that the graph sees edited weights."""
        if why_not(self.adapter, self) is not None or any(dropout.training for dropout in dropouts(self)):
            return self._original_forward(x)
        spec, parameters = self.adapter.read(self), tuple(self.parameters())
        settings = self._swinfast
        choice = choose(settings.backend, spec, parameters[0].device, parameters[0].dtype, settings.failure)
        if choice.backend is None:
            return self._original_forward(x)
        self._check(spec, x)
        # the graph must be differentiable where gradients are wanted, and only PyTorch's operations are
        backend = torch_backend if needs_grad(x, parameters) else choice.backend
        return self._run(backend, spec, self._derive(backend, spec, True, autocast_dtype(x.device)), x)

    def _check(self, spec: Any, x: Tensor) -> None:
        """Refuse what the original refuses, with errors of its types."""

    def _prepare(self, x: Tensor) -> Tensor:
        """The input as the original takes it, where the fused module takes more."""
        return x

    def _kept(self, x: Tensor) -> Tensor:
        """The input as a backward pass will find it again."""
        return x

    def _derive(self, backend: ModuleType, spec: Any, traced: bool, autocast: torch.dtype | None) -> Any:
        """What the backend needs of the parameters."""
        raise NotImplementedError

    def _run(self, backend: ModuleType, spec: Any, tables: Any, x: Tensor) -> Tensor:
        """The fused computation."""
        raise NotImplementedError


class FusedPatchEmbed(FusedComputation):
    """Patch embedding that casts floating-point images to the model's dtype and normalises uint8 ones."""

    def _original_forward(self, images):
        """Images as they are where somebody else's code sees them before the projection: it may expect them so."""
        proj = self.proj
        if type(proj) is not nn.Conv2d or proj._forward_pre_hooks or next(patches(self), None) is not None:
            return self.original.forward(self, images)
        return super()._original_forward(images)

    def _prepare(self, images):
        dtype = self.proj.weight.dtype
        _check_kind(images)
        if images.dtype == dtype or images.dim() != 4:
            return images
        if images.dtype == torch.uint8:
            self._check_image_scale(images.shape[1])
        elif torch.float64 not in (images.dtype, dtype) and autocast_dtype(images.device) is not None:
            return images  # autocast casts what is not float64, as the weights are
        return torch_backend.normalise(images, self._swinfast.image_scale, dtype)

    def _derive(self, backend, spec, traced, autocast):
        return backend.derive_patch_embed(spec, traced, autocast)

    def _run(self, backend, spec, tables, x, out=None):
        if out is not None and self.adapter.channels_first:
            out = _channels_last(out)
        out = backend.patch_embed(spec, tables, x, self._swinfast.image_scale, out)
        return _channels_first(out) if self.adapter.channels_first else out

    def _check(self, spec, images):
        _check_kind(images)
        if images.dim() != 4:
            raise ValueError(f"images must be [B, {spec.proj.in_channels}, H, W], got shape {tuple(images.shape)}")
        if images.shape[1] != spec.proj.in_channels:
            raise RuntimeError(f"images must have {spec.proj.in_channels} channels, got shape {tuple(images.shape)}")
        patch = spec.proj.kernel_size
        if images.shape[2] < patch[0] or images.shape[3] < patch[1]:
            raise RuntimeError(f"images must be at least {patch[0]} by {patch[1]}, got shape {tuple(images.shape)}")
        if spec.img_size is not None:
            for axis, got, expected in zip(("height", "width"), images.shape[2:], spec.img_size, strict=True):
                if got != expected:
                    raise AssertionError(f"Input image {axis} ({got}) doesn't match model ({expected}).")
        elif spec.whole_patches:
            for axis, got, size in zip(("height", "width"), images.shape[2:], patch, strict=True):
                if got % size:
                    raise AssertionError(f"Input image {axis} ({got}) should be divisible by patch size ({size}).")
        if images.dtype == torch.uint8:
            self._check_image_scale(spec.proj.in_channels)

    def _check_image_scale(self, channels):
        scale = self._swinfast.image_scale
        if scale is None:
            raise ValueError(
                "images are uint8 and the model's config has no mean and std to normalise them with: "
                "give optimize(..., mean=..., std=...), or pass floating-point images"
            )
        if len(scale[0]) not in (1, channels):
            raise ValueError(
                f"images are uint8 and of {channels} channels, and the mean and std to normalise them with of "
                f"{len(scale[0])}: give optimize(..., mean=..., std=...), or pass floating-point images"
            )
        if not all(value > 0 for value in scale[1]):
            raise ValueError(f"images are uint8, and the std to normalise them with must be above 0, got {scale[1]}")


def _check_kind(images: Any) -> None:
    """Refuse what are no images, whatever their sizes."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
    if images.dtype not in IMAGE_DTYPES:
        raise RuntimeError(f"images must be float32, float64, bfloat16, float16 or uint8, got {images.dtype}")
    if images.layout != torch.strided:
        raise RuntimeError(f"images must be a dense tensor, got one of layout {images.layout}")


class FusedStage(FusedComputation):
    """Patch merging and the blocks of one stage, [B, C, H, W] in and out, or [B, H, W, C] if its family has it so."""

    def fused_forward(self, plan, x):
        if self._swinfast.unchecked or not graphs.may_run(self._swinfast.cuda_graphs, plan, x):
            return super().fused_forward(plan, x)
        kind = kind_of(x)
        return plan.graphs.run(
            x,
            kind,
            reads=lambda: (self.tables(plan, kind),),
            compute=lambda tables, held: self._run(plan.backend, plan.spec, *tables, held.pop()),
            plain=lambda: FusedComputation.fused_forward(self, plan, x),
        )

    def _kept(self, x):
        return x.clone()  # the original keeps none of its input, which may be changed in place

    def _derive(self, backend, spec, traced, autocast):
        return backend.derive_stage(spec, traced, autocast)

    def _run(self, backend, spec, tables, x):
        channels_first = self.adapter.channels_first
        held = [_channels_last(x) if channels_first else x]
        del x  # so that a stage can free its input
        out = backend.stage(spec, tables, held.pop())
        return _channels_first(out) if channels_first else out


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


FUSED = {PATCH_EMBEDDING: FusedPatchEmbed, STAGE: FusedStage}


def not_optimized(model: nn.Module) -> ValueError:
    """The error for a model without replaced modules, where one with them is needed."""
    return ValueError(f"{type(model).__name__} is not optimized: call swinfast.optimize, which takes {SUPPORTED}")


def fuse(module: nn.Module, mixin: type[Fused]) -> None:
    """Replace a module, in place."""
    module.__class__ = _fused_class(mixin, type(module))


@cache
def _fused_class(mixin: type[Fused], original: type[nn.Module]) -> type[nn.Module]:
    return type(f"Fused{original.__name__}", (mixin, original), {"original": original, "__doc__": mixin.__doc__})


def _rebuild(mixin: type[Fused], original: type[nn.Module]) -> nn.Module:
    cls = _fused_class(mixin, original)
    return cls.__new__(cls)
