"""What a call of a replaced module is: whether it is traced, or differentiated, and under which settings."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as module_globals

from .autocast import autocast_dtype

KEY = torch._C._TorchDispatchModeKey


def kind_of(x: Tensor) -> tuple[torch.dtype | None, str]:
    """What the fused computation depends on besides weights and input: the autocast region, whether TF32 is allowed."""
    return autocast_dtype(x.device), torch.backends.cuda.matmul.fp32_precision


def is_traced(x: Tensor) -> bool:
    """Whether a graph is made of this call, or the tensor is none that can be computed with."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor or x.is_meta:
        return True
    return (
        torch._C._get_dispatch_mode(KEY.FAKE) is not None
        or torch._C._get_dispatch_mode(KEY.PROXY) is not None  # of make_fx, as the next one
        or torch._ops._get_dispatch_mode_pre_dispatch(KEY.PROXY) is not None
    )


def needs_grad(x: Tensor, parameters: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))


def is_transformed() -> bool:
    """Whether the call is under something that must see the original's own operations: hooks on every module,
    forward-mode differentiation, or a torch.func transform. A compiled graph is transformed as a whole."""
    return not torch.compiler.is_compiling() and bool(
        module_globals._has_any_global_hook()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
