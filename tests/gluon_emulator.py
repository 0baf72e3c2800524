"""Runs kernels in Gluon without a GPU: their source on tensors of PyTorch, program after program.

What it knows is what a kernel computes: where it loads from and stores to, in which order it sums, what it rounds.
Layouts mean nothing to it, and a product is there when it is begun: what a layout promises the compiler checks, and
whether something comes too early only a GPU says.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.interpreter import InterpretedFunction

POISON = torch.nan  # of what was never written


class Pointer:
    """A place, or a tensor of places, in the memory of a contiguous tensor."""

    def __init__(self, memory: Tensor, offset: Any = 0):
        self.memory, self.offset = memory, offset
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + offset)

    def load(self, mask: Any = None, other: float = 0.0) -> Tensor:
        offset = torch.as_tensor(self.offset).long()
        mask = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask.expand(offset.shape)
        self._check(offset[mask])
        other = torch.tensor(other, dtype=self.memory.dtype)
        return torch.where(mask, self.memory[torch.where(mask, offset, 0)], other)

    def store(self, value: Tensor, mask: Tensor) -> None:
        mask = mask.expand(value.shape)
        offset = self.offset.expand(value.shape)[mask].long()
        self._check(offset)
        self.memory[offset] = value[mask]

    def _check(self, offset: Tensor) -> None:
        assert ((offset >= 0) & (offset < len(self.memory))).all(), "out of bounds"


class Shared:
    """A tile in shared memory, or a view of one."""

    def __init__(self, tile: Tensor):
        self.tile = tile

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.tile.permute(*order))

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.tile.dtype and value.shape == self.tile.shape
        self.tile.copy_(value)


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any, value: Tensor | None = None) -> Shared:
    tile = torch.full(shape, POISON, dtype=dtype) if value is None else value.clone()
    assert list(tile.shape) == list(shape) and tile.dtype == dtype
    return Shared(tile)


def _multiply(a: Tensor, b: Shared, sums: Tensor, is_async: bool = False) -> Tensor:
    assert a.dtype == b.tile.dtype != torch.float32 == sums.dtype
    return sums + a.float() @ b.tile.float()


def _wait(count: int, deps: list[Any]) -> Any:
    return deps[0] if len(deps) == 1 else tuple(deps)


def _minimum(x: Tensor, y: float, propagate_nan: Any = None) -> Tensor:
    return torch.clamp(x, max=y)


def _maximum(x: Tensor, y: float, propagate_nan: Any = None) -> Tensor:
    return torch.clamp(x, min=y)


def _layout(*args: Any, **named: Any) -> None:
    return None


class Language:
    """What kernels use of triton.language and gluon.language."""

    def __init__(self, program: int, programs: int, warps: int):
        self.program_id = lambda axis: torch.tensor(program, dtype=torch.int32)
        self.num_programs = lambda axis: torch.tensor(programs, dtype=torch.int32)
        self.num_warps = lambda: warps

    constexpr = object
    float16, bfloat16, float32, int32, int64 = torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64
    PropagateNan = types.SimpleNamespace(ALL=None)
    NVMMADistributedLayout = DotOperandLayout = DistributedLinearLayout = staticmethod(_layout)
    NVMMASharedLayout = BlockedLayout = SliceLayout = staticmethod(_layout)
    arange = staticmethod(lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32))
    load = staticmethod(lambda pointer, mask=None, other=0.0: pointer.load(mask, other))
    store = staticmethod(lambda pointer, value, mask: pointer.store(value, mask))
    zeros = staticmethod(lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype))
    broadcast = staticmethod(lambda x, y: torch.broadcast_tensors(x, y))
    split = staticmethod(lambda x: x.unbind(-1))
    sum = staticmethod(lambda x, axis: x.sum(axis))
    max = staticmethod(lambda x, axis: x.amax(axis))
    minimum, maximum = staticmethod(_minimum), staticmethod(_maximum)
    where, abs = staticmethod(torch.where), staticmethod(torch.abs)
    rsqrt, exp2 = staticmethod(torch.rsqrt), staticmethod(torch.exp2)
    convert_layout = staticmethod(lambda x, layout, assert_trivial=False: x)
    allocate_shared_memory = staticmethod(_allocate)
    static_range = staticmethod(range)
    cdiv = staticmethod(lambda x, y: -(-x // y))


OPERATIONS = {
    "warpgroup_mma": _multiply,
    "warpgroup_mma_init": lambda sums: sums,
    "warpgroup_mma_wait": _wait,
    "fence_async_shared": lambda: None,
    "debug_barrier": lambda: None,
    "loop": lambda start, end, step, disable_licm: map(torch.tensor, range(int(start), int(end), int(step))),
    "quotient": lambda x, y: x / y,
}


def emulated(function: Any, language: Language, others: dict[Any, Callable] | None = None) -> Callable:
    """A function of a kernel as one of PyTorch; others: those that are already."""
    others = {} if others is None else others
    source = function.fn
    if source in others:
        return others[source]
    names = dict(source.__globals__)
    defaults = tuple(getattr(value, "value", value) for value in source.__defaults__ or ())  # of constexprs
    made = types.FunctionType(source.__code__, names, source.__name__, defaults, source.__closure__)
    others[source] = made
    for name in set(_names(source.__code__)) & names.keys():
        value = names[name]
        if name in OPERATIONS:
            names[name] = OPERATIONS[name]
        elif name in ("gl", "tl"):
            names[name] = language
        elif isinstance(value, GluonJITFunction | InterpretedFunction) or hasattr(value, "fn"):
            names[name] = emulated(value, language, others)
        elif hasattr(value, "value"):  # a constexpr
            names[name] = value.value
        elif inspect.isfunction(value):  # of constants, such as layouts
            names[name] = _layout
    return made


def _names(code: types.CodeType) -> tuple[str, ...]:
    return code.co_names


def launch(kernel: GluonJITFunction, programs: int, *args: Any, num_warps: int, **constants: Any) -> None:
    """What kernel[(programs,)](*args, …) does on a GPU."""
    values = [Pointer(arg.view(-1)) if isinstance(arg, Tensor) else arg for arg in args]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    for program in range(programs):
        emulated(kernel, Language(program, programs, num_warps))(*values, **constants)


def getitem(kernel: GluonJITFunction, grid: tuple[int]) -> Callable:
    return functools.partial(launch, kernel, *grid)
