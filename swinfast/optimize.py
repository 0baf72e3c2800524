"""The pass: find what can be replaced in a model, and replace it."""

import copy
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from . import graphs
from .adapters import SUPPORTED, adapted, parts_of, patch_embeds
from .arguments import check_model, finite_numbers
from .backends import check_choice
from .classifier import FusedClassifier
from .fused import FUSED, Fused, FusedStage, ImageScale, Settings, fuse, not_optimized
from .modules import DTYPES, class_of
from .sequence import FusedStages
from .variants import per_channel


def optimize(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    cuda_graphs: bool | str = "auto",
    inplace: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """A faster model with the same answers, methods and state_dict, of the same class or one derived from it.

    Every supported module is replaced wherever it sits: in a bare classifier, a features_only model, a backbone inside
    something larger. In eval mode the fused computation runs, with or without grad mode; in training mode the original
    one. ``swinfast.report`` says what runs where.

    Args:
        model: The model; it is left untouched unless inplace.
        dtype: Dtype to convert the copy to (torch.float32, bfloat16, float16, float64), None to leave it.
        backend: "auto" for the best one for the tensors' device, "torch" or "triton" to force one.
        cuda_graphs: Whether all launches of a classifier, or of stages that are called by themselves, are one CUDA
            graph, for each size and stream that is seen twice. "auto" for sizes where launching would take longer than
            computing, True for all, False for none. Stages that PyTorch computes are launched one by one.
        inplace: Replace in the model itself and return it, in place of a deep copy.
        mean, std: One for each channel or one for all, to normalise uint8 images with, for pixel values in 0..1; by
            default those of the model's config (``pretrained_cfg``), where it has one, and of an optimised model those
            that it has.

    Returns:
        The optimised model.

    Raises:
        TypeError: model is no torch.nn.Module.
        ValueError: An argument is not one of those named above, or there is nothing to replace.
        RuntimeError: A forced backend, or CUDA graphs, can't run here.
    """
    _check_arguments(model, dtype, cuda_graphs, mean, std)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    check_choice(backend, device)
    if cuda_graphs is True and not graphs.are_possible(device):
        raise RuntimeError(f"cuda_graphs=True can't run: no GPU, and the model is on {device}; use cuda_graphs='auto'")
    if next(adapted(model), None) is None:
        raise ValueError(f"found nothing to optimize in {type(model).__name__}; supported are {SUPPORTED}")
    if not inplace:
        model = copy.deepcopy(model)
    if dtype is not None:
        model.to(dtype)
    given = None if mean is None else (finite_numbers(mean), finite_numbers(std))
    scales = _image_scales(model)
    for module, adapter in list(adapted(model)):
        known = module._swinfast.image_scale if isinstance(module, Fused) else None
        scale = given or known or scales.get(module)
        if not isinstance(module, Fused):
            fuse(module, FUSED[adapter.kind])
        module._swinfast = Settings(backend, cuda_graphs, scale)
    for module in list(model.modules()):
        if type(module) is nn.Sequential and len(module) and all(isinstance(child, FusedStage) for child in module):
            fuse(module, FusedStages)
        if parts_of(class_of(module)) is not None and not isinstance(module, Fused):
            fuse(module, FusedClassifier)
        if isinstance(module, (FusedStages, FusedClassifier)):
            module._swinfast = Settings(backend, cuda_graphs)
    if backend != "triton":
        _warn_of_float16(model)
    return model


def refresh(model: nn.Module) -> None:
    """Forget everything derived from the weights of an optimised model, its CUDA graphs, and that Triton failed at one.

    Needed only after edits that PyTorch does not count: through ``parameter.data`` or raw memory, by a collective of
    torch.distributed, such as a broadcast of weights, or by another process in shared memory.

    Raises:
        TypeError: model is no torch.nn.Module.
        ValueError: It has not been through ``optimize``.
    """
    check_model("model", model)
    replaced = [module for module in model.modules() if isinstance(module, Fused)]
    if not replaced:
        raise not_optimized(model)
    for module in replaced:
        module._swinfast.forget()


def _image_scales(model: nn.Module) -> dict[nn.Module, ImageScale]:
    """For each patch embedding the mean and std of the innermost model around it that has a config with them."""
    scales = {}
    for owner in model.modules():
        config = getattr(owner, "pretrained_cfg", None)
        scale = [finite_numbers(config.get(name)) for name in ("mean", "std")] if isinstance(config, dict) else [None]
        for module in patch_embeds(owner) if None not in scale else ():
            channels = getattr(module._modules.get("proj"), "in_channels", None)  # what wraps a layer may not tell
            scales[module] = tuple(per_channel(values, channels) for values in scale)
    return scales


def _check_arguments(model, dtype, cuda_graphs, mean, std) -> None:
    check_model("model", model)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))} or None, got {dtype!r}")
    if cuda_graphs != "auto" and not isinstance(cuda_graphs, bool):
        raise ValueError(f"cuda_graphs must be 'auto', True or False, got {cuda_graphs!r}")
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be given together, got mean={mean!r} and std={std!r}")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and finite_numbers(values) is None:
            raise ValueError(f"{name} must be a sequence of numbers, one for each channel, got {values!r}")
    if mean is not None and len(mean) != len(std):
        raise ValueError(f"mean and std must be of one length, got {len(mean)} and {len(std)} values")
    if std is not None and min(std) <= 0:
        raise ValueError(f"std must be above 0, got {std!r}")


def _warn_of_float16(model: nn.Module) -> None:
    parameter = next((p for m in model.modules() if isinstance(m, FusedStage) for p in m.parameters()), None)
    if parameter is not None and parameter.device.type == "cpu" and parameter.dtype == torch.float16:
        warnings.warn(
            "float16 has no fast path on a CPU and is computed in float32 there; "
            "bfloat16 takes half the memory too, and is faster on CPUs that have it",
            stacklevel=3,
        )
