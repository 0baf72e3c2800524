"""Which backend computes a replaced module.

A backend is a module with ``derive_patch_embed``, ``patch_embed``, ``derive_stage``, ``stage`` and ``describe``, as
``torch_backend`` defines them: the derive functions make what they need of the parameters, once per weights. Where it
is ``capturable`` a CUDA graph may be made of it. Where it ``may_fail`` another computes in its place when it does.
"""

from types import ModuleType
from typing import NamedTuple

import torch

from . import torch_backend
from .specs import PatchEmbedSpec, StageSpec

CHOICES = ("auto", "torch", "triton")
PREFER_TRITON = ("cuda",)  # types of devices where "auto" does


class Choice(NamedTuple):
    """Attributes:
    backend: What computes the module, None where the original must.
    reason: Why the original must, None where a backend computes.
    note: Why "auto" did not take the backend that it would prefer on the device, or None.
    """

    backend: ModuleType | None
    reason: str | None = None
    note: str | None = None


def check_choice(choice: str, device: torch.device) -> None:
    """Refuse a backend that is unknown (ValueError), or that nothing here can run (RuntimeError)."""
    if choice not in CHOICES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, CHOICES))}, got {choice!r}")
    if choice == "triton":
        _require(torch.device("cuda") if device.type == "cpu" and torch.cuda.is_available() else device)


def choose(
    choice: str,
    spec: PatchEmbedSpec | StageSpec,
    device: torch.device,
    dtype: torch.dtype,
    failure: str | None = None,
) -> Choice:
    """What a choice means for a module with parameters of a dtype on a device.

    Args:
        failure: How Triton failed at the module before, if it did.

    Raises:
        RuntimeError: Triton is forced and can't run on the device.
    """
    if choice == "torch" or (choice == "auto" and device.type not in PREFER_TRITON):
        return Choice(torch_backend)
    if choice == "triton":
        _require(device)
    problem = why_no_triton(device) or _triton_backend().why_not(spec, dtype) or failure
    if problem is None:
        return Choice(_triton_backend())
    if choice == "auto":
        return Choice(torch_backend, note=f"not Triton: {problem}")
    return Choice(None, reason=problem)


def _require(device: torch.device) -> None:
    problem = why_no_triton(device)
    if problem is not None:
        raise RuntimeError(f"backend='triton' can't run: {problem}; use backend='auto' or 'torch'")


def why_no_triton(device: torch.device) -> str | None:
    """Why Triton kernels can't run on a device, None where they can."""
    try:
        return _triton_backend().why_not_on(device)
    except ImportError as error:
        return f"Triton is not installed ({error})"


def _triton_backend() -> ModuleType:
    """Imported where it is needed: Triton exists on Linux alone, and takes its time."""
    from . import triton_backend

    return triton_backend
