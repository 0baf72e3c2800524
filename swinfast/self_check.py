"""The optional self-check: with SWINFAST_SELF_CHECK=1 the first answer of every Triton module must pass the policy."""

import copy
import os
import warnings

import torch
from torch import Tensor, nn

from .errors import in_a_line
from .modules import HOOKS
from .verify import NO_MEASURE, NOTHING, OVERFLOW, Verification, verify


def is_asked_for() -> bool:
    """Whether SWINFAST_SELF_CHECK is set."""
    return os.environ.get("SWINFAST_SELF_CHECK") == "1"


def self_check(module: nn.Module, x: Tensor) -> str | None:
    """Why the fused computation of a module is wrong for the image of its input with the most finite numbers, None
    where it is right, or where there is nothing finite to tell it by: then the next answer is checked.

    It takes copies of the module, one in float64, and as long as that. A module that can't be copied is not checked.
    """
    finite = x.isfinite().flatten(1).sum(1)
    if not finite.any():
        return None
    try:
        fast, plain = copy.deepcopy(module), copy.deepcopy(module)
    except Exception as error:  # of whatever somebody has put into it
        warnings.warn(f"no self-check of a module that can't be copied: {in_a_line(error)}", stacklevel=2)
        module._swinfast.unchecked = False
        return None
    image = int(finite.argmax())
    outcome = _judged(fast, plain, x[image : image + 1])
    module._swinfast.unchecked = outcome is None
    return None if outcome is None or outcome.passed else f"self-check: {outcome.reason}"


def _judged(fast: nn.Module, plain: nn.Module, x: Tensor) -> Verification | None:
    """By two copies of a module, of which one becomes what it was; None where nothing can be said."""
    plain.__class__ = fast.original
    fast._swinfast.unchecked = False
    fast._swinfast.cuda_graphs = False
    for twin in (fast, plain):
        for hooks in HOOKS:  # they are not to see this
            getattr(twin, hooks).clear()
    with torch.inference_mode(False):
        outcome = verify(plain, fast, x.clone())
    return None if outcome.reason in (NOTHING, OVERFLOW, NO_MEASURE) else outcome
