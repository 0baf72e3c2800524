"""Small tensors that depend on sizes and settings alone, such as index tensors: made once and kept."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


def constant(function: Callable[..., T]) -> Callable[..., T]:
    """Keep what a function of hashable arguments makes, but make it anew inside a graph or a torch.func transform,
    and where tensors are fake."""

    @lru_cache(maxsize=256)
    def cached(*args):
        made = function(*args)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.is_cuda:  # other streams may use it from now on
                torch.cuda.current_stream(tensor.device).synchronize()
        return made

    def call(*args):
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return function(*args)
        if torch._C._functorch.peek_interpreter_stack() is not None:  # tensors that end with a torch.func transform
            return function(*args)
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return function(*args)
        if torch._C._len_torch_dispatch_stack() and detect_fake_mode() is not None:
            return function(*args)
        with torch.inference_mode(False):  # an inference tensor could not be used by a later training step
            return cached(*args)

    return call


def vector(values: Sequence[float], device: torch.device) -> Tensor:
    """[len(values)] float32, written on the device: a CUDA graph can't capture a copy from the host."""
    return torch.cat([torch.full((1,), value, dtype=torch.float32, device=device) for value in values])
