"""Triton's interpreter, quicker: nearly half of its time goes into what it does again at every call and operation.

None of this changes what it computes or refuses.
"""

import functools
import math
import operator
from collections.abc import Callable
from types import FunctionType, SimpleNamespace

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken() -> None:
    """Once, before any kernel runs."""
    interpreter._patch_lang = _once_in_a_launch(interpreter._patch_lang)
    TritonSemantic.binary_op_sanitize_overflow_impl = _refuse_overflow
    tl.tensor.__init__ = _tensor


def _once_in_a_launch(patch: Callable) -> Callable:
    """Replace the language's functions by those of the interpreter for a launch, not for each function in a kernel."""
    scopes = {}

    def restore() -> None:
        while scopes:
            scopes.popitem()[1].restore()  # the last first

    def patch_once(fn: FunctionType) -> SimpleNamespace:
        modules = _modules_of_language(fn)
        if modules not in scopes:
            scopes[modules] = patch(fn)
        return SimpleNamespace(restore=restore)

    return patch_once


@functools.cache
def _modules_of_language(fn: FunctionType) -> tuple[bool, bool]:
    """Which of them a function sees, and with that, which are patched for it."""
    seen = list(fn.__globals__.values())
    return any(value is tl for value in seen), any(value is tl.core for value in seen)


def _refuse_overflow(semantic: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor, operation: Callable) -> None:
    """The same check in NumPy: exact, and then whether that is a number of this type."""
    scalar = lhs.type.scalar
    if scalar.int_bitwidth >= 64:
        return
    exact = getattr(operator, operation.__name__)(*(x.handle.data.astype(np.int64) for x in (lhs, rhs)))
    fits = scalar.get_int_min_value() <= exact.min() and exact.max() <= scalar.get_int_max_value()
    assert fits, f"{scalar} overflow detected for operation {operation.__name__}"


def _tensor(self: tl.tensor, handle: interpreter.TensorHandle, type: tl.dtype) -> None:
    """A tensor's own __init__, which makes its shape anew each time."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _shape(type.shape if type.is_block() else ())


@functools.cache
def _shape(sizes: tuple[int, ...]) -> tuple[tl.constexpr, tl.tuple]:
    return tl.constexpr(math.prod(sizes)), tl.tuple([tl.constexpr(size) for size in sizes])
