"""Does an optimised model give the answers of the plain one? The numerics policy as a function."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_model
from .autocast import autocast_dtype, without_autocast
from .modules import class_of

# Beside twice the error of the plain computation: what a fused kernel may be off where plain PyTorch happens to be
# nearly exact, relative to the size of the outputs. Twice the noise measured on whole models, see docs/numerics.md.
ABSOLUTE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 2e-4}
FACTOR = 2.0
NOTHING = "nothing finite to compare"
OVERFLOW = "NaN or infinity, in the plain model's answers too, where the oracle has none"
NO_MEASURE = "the plain model's answers are NaN or infinity wherever the oracle's are not: its errors are not known"


@dataclass(frozen=True)
class Errors:
    """Errors of an output against the float64 oracle: the largest, and the RMS; relative: over the oracle's RMS."""

    max: float
    relative_max: float
    relative_rms: float


@dataclass(frozen=True)
class Verification:
    """The outcome of ``swinfast.verify``.

    Attributes:
        fast, plain: Errors of the optimised and the plain model, both in ``dtype``, against the plain one in float64.
        top1_agreement: Share of images for which plain and optimised model agree on the largest output; None where the
            output is no [B, classes].
        passed: Whether the optimised model is as right as the plain one.
        reason: Why not, or "".
    """

    dtype: torch.dtype
    fast: Errors
    plain: Errors
    top1_agreement: float | None
    passed: bool
    reason: str

    def __str__(self) -> str:
        agreement = "" if self.top1_agreement is None else f", top-1 agreement {self.top1_agreement:.2%}"
        return (
            f"{'passed' if self.passed else 'FAILED: ' + self.reason} ({str(self.dtype).removeprefix('torch.')}): "
            f"relative RMS error {self.fast.relative_rms:.2e} (plain model {self.plain.relative_rms:.2e}), "
            f"largest {self.fast.max:.2e} ({self.plain.max:.2e}){agreement}"
        )


def verify(model: nn.Module, fast: nn.Module, images: Tensor) -> Verification:
    """Compare an optimised model with the plain one it was made from.

    The oracle is the plain model in float64, with its weights rounded to the dtype of the optimised one. The optimised
    model passes where its largest and its RMS error are at most twice those of the plain model in the same dtype, plus
    a small absolute part, and where NaN and infinities stand at the same places as in the oracle. Where the oracle has
    nothing else in an output, nothing could be compared, and that fails. A plain model can be right by luck: its errors
    are the larger ones of two runs, of which the second sees its images changed by no more than their dtype's rounding.

    In an autocast region both models run in it, and are judged as what it makes of them: computations in its dtype.

    Args:
        model: The plain model. It returns a tensor, or a sequence or mapping of tensors.
        fast: The optimised one, of any dtype, on the device of images.
        images: [B, in_chans, H, W], floating-point, as the models take them.

    Raises:
        ValueError: The models have different state_dict keys, model is optimised, fast is in training mode, or images
            is not floating-point or not [B, C, H, W] of at least one image.
        TypeError: An argument is of another type, or the model returns something else than tensors.
    """
    check_model("model", model)
    check_model("fast", fast)
    if any(class_of(module) is not type(module) for module in model.modules()):
        raise ValueError("model is optimized itself: fast is to be compared with the plain model that it was made from")
    _check_images(images)
    if fast.training:
        raise ValueError("fast is in training mode, where it runs the original computation: call fast.eval() first")
    if model.state_dict().keys() != fast.state_dict().keys():
        raise ValueError("model and fast have different parameters: fast must be made from model by swinfast.optimize")
    parameter = next(fast.parameters())
    device, stored = parameter.device, parameter.dtype
    region = autocast_dtype(device)
    dtype = stored if region is None or stored == torch.float64 else region  # which autocast leaves alone
    images = images.to(device, stored)
    with torch.no_grad(), tf32_as_in_products():
        fast_out = _outputs(fast(images))  # the first, since its errors say what is wrong with images
        plain = copy.deepcopy(model).to(device, stored).eval()
        plain_out, nudged_out = _outputs(plain(images)), _outputs(plain(_nudge(images, dtype)))
        with without_autocast(device):
            oracle = _outputs(plain.double()(images.double()))
    reason = _compare(fast_out, (plain_out, nudged_out), oracle, stored, dtype)
    agreement = None
    if len(oracle) == 1 and oracle[0].dim() == 2 and oracle[0].numel() and fast_out[0].shape == oracle[0].shape:
        agreement = (fast_out[0].argmax(-1) == plain_out[0].argmax(-1)).double().mean().item()
    fast_errors, plain_errors = (
        _errors(fast_out, oracle),
        _worst(_errors(plain_out, oracle), _errors(nudged_out, oracle)),
    )
    return Verification(dtype, fast_errors, plain_errors, agreement, not reason, reason)


def _check_images(images: Any) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating-point, got {images.dtype}")
    if images.dim() != 4 or not images.numel():
        raise ValueError(f"images must be [B, C, H, W] of at least one image, got shape {tuple(images.shape)}")


@contextmanager
def tf32_as_in_products() -> Iterator[None]:
    """Convolutions in TF32 only where matrix products are.

    By default PyTorch has a GPU's convolutions alone in TF32, a plain model's patch embedding among them: hundreds of
    times less exact than all the rest of a float32 model, and no measure for it.
    """
    cudnn = torch.backends.cudnn
    try:
        before = cudnn.allow_tf32
    except RuntimeError:  # set by the newer names, which this one can't be mixed with: somebody's own choice
        before = None
    if before is not None:
        cudnn.allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    try:
        yield
    finally:
        if before is not None:
            cudnn.allow_tf32 = before


def _outputs(output: Any) -> list[Tensor]:
    """The tensors that a model returned, those of a mapping in the order of its keys."""
    if isinstance(output, Tensor):
        return [output]
    outputs = [output[key] for key in sorted(output)] if isinstance(output, Mapping) else output
    if isinstance(outputs, Sequence) and outputs and all(isinstance(one, Tensor) for one in outputs):
        return list(outputs)
    inside = f"({', '.join(type(one).__name__ for one in outputs)})" if isinstance(outputs, list | tuple) else ""
    raise TypeError(
        f"the model must return a tensor, or a sequence or mapping of tensors, got {type(output).__name__}{inside}"
    )


def _nudge(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images changed by one rounding to a dtype, or to their own if that is coarser, up or down at random."""
    rounding = max(torch.finfo(dtype).eps, torch.finfo(images.dtype).eps)
    signs = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(0), device="cpu") * 2 - 1
    return images * (1 + rounding * signs.to(images))


def _compare(
    fast: list[Tensor], plain: Sequence[list[Tensor]], oracle: list[Tensor], stored: torch.dtype, dtype: torch.dtype
) -> str:
    """Why the outputs fail the policy, "" where they pass; stored is the dtype of the weights, dtype of products."""
    if not any(true.numel() for true in oracle):
        return NOTHING
    for index, (got, true, *base) in enumerate(zip(fast, oracle, *plain, strict=True)):
        place = f"output {index}: " if len(oracle) > 1 else ""
        if got.shape != true.shape:
            return f"{place}shape {tuple(got.shape)}, expected {tuple(true.shape)}"
        finite = true.to(stored).isfinite()
        if not torch.equal(got.isfinite(), finite):
            if any(not torch.equal(output.isfinite(), finite) for output in base):
                return f"{place}{OVERFLOW}"
            return f"{place}NaN or infinity where the oracle has none, or the other way round"
        if finite.numel() and not finite.any():
            return f"{place}{NOTHING}"
        if finite.any() and not any((output.isfinite() & finite).any() for output in base):
            return f"{place}{NO_MEASURE}"
        error, allowed = _errors([got], [true]), _worst(*(_errors([output], [true]) for output in base))
        for name, absolute in (("relative_rms", ABSOLUTE[dtype]), ("relative_max", 8 * ABSOLUTE[dtype])):
            bar = FACTOR * getattr(allowed, name) + absolute
            if not getattr(error, name) <= bar:
                words = name.replace("_", " ").replace("rms", "RMS")
                return f"{place}{words} error {getattr(error, name):.2e} is above {bar:.2e}"
    return ""


def _worst(*errors: Errors) -> Errors:
    return Errors(*(max(getattr(e, field) for e in errors) for field in ("max", "relative_max", "relative_rms")))


def _errors(outputs: list[Tensor], oracle: list[Tensor]) -> Errors:
    """Errors where both are finite, over all outputs."""
    pairs = [(got.double(), true) for got, true in zip(outputs, oracle, strict=True) if got.shape == true.shape]
    if not pairs:
        return Errors(math.inf, math.inf, math.inf)
    got = torch.cat([pair[0].flatten() for pair in pairs])
    true = torch.cat([pair[1].flatten() for pair in pairs])
    finite = got.isfinite() & true.isfinite()
    difference, size = (got - true)[finite], true[finite]
    if not difference.numel():
        return Errors(0.0, 0.0, 0.0)
    rms = size.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    largest = difference.abs().max()
    return Errors(largest.item(), (largest / rms).item(), (difference.square().mean().sqrt() / rms).item())
