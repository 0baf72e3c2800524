"""The optional self-check: with SWINFAST_SELF_CHECK=1 the first answer of every Triton module must pass the policy."""

import copy
import os

import torch
from torch import Tensor, nn

from .adapters import HOOKS
from .verify import NOTHING, OVERFLOW, Verification, verify


def is_asked_for() -> bool:
    """Whether SWINFAST_SELF_CHECK is set."""
    return os.environ.get("SWINFAST_SELF_CHECK") == "1"


def self_check(module: nn.Module, x: Tensor) -> str | None:
    """Why the fused computation of a module is wrong for an image of its input, None where it is right, or where there
    is nothing finite to tell it by: then the next answer is checked."""
    outcome = _judged(module, x)
    module._swinfast.unchecked = outcome is None
    return None if outcome is None or outcome.passed else f"self-check: {outcome.reason}"


def _judged(module: nn.Module, x: Tensor) -> Verification | None:
    """Of the image with the most finite numbers; None where nothing can be said of it.

    It takes a copy of the module in float64, and as long as that.
    """
    finite = x.isfinite().flatten(1).sum(1)
    if not finite.any():
        return None
    image = int(finite.argmax())
    fast, plain = copy.deepcopy(module), copy.deepcopy(module)
    plain.__class__ = module.original
    fast._swinfast.unchecked = False
    fast._swinfast.cuda_graphs = False
    for twin in (fast, plain):
        for hooks in HOOKS:  # they are not to see this
            getattr(twin, hooks).clear()
    with torch.inference_mode(False):
        outcome = verify(plain, fast, x[image : image + 1].clone())
    return None if outcome.reason in (NOTHING, OVERFLOW) else outcome
