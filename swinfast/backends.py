"""Which backend computes a replaced module.

A backend is a module with ``name``, ``derive_patch_embed``, ``patch_embed``, ``derive_stage`` and ``stage``, as
``torch_backend`` defines them: the derive functions make what they need of the parameters, once per weights.
"""

from types import ModuleType

import torch

from . import torch_backend

CHOICES = ("auto", "torch", "triton")


def check_choice(choice: str) -> None:
    """Refuse a backend that is unknown (ValueError) or can't run here (RuntimeError)."""
    if choice not in CHOICES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, CHOICES))}, got {choice!r}")
    if choice == "triton":
        raise RuntimeError(
            "backend='triton' can't run: this version of swinfast has no Triton kernels; use backend='auto' or 'torch'"
        )


def backend_for(choice: str, device: torch.device) -> ModuleType:
    """The backend that a choice means for tensors on a device."""
    return torch_backend
