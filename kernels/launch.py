"""What every launcher shares: checks of arguments, the launch itself, and registration as an operator.

A launcher is a plain function from tensors to a tensor that checks, allocates and launches. ``@operator`` also makes
it ``torch.ops.swinfast.<name>`` for tracing, with itself as the fake implementation: on meta and fake tensors a launch
does nothing.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import Config
from .machine_code import well_compiled

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_ROWS = 2**31 - 2**16  # row numbers are 32-bit integers, offsets 64-bit
INTERPRETED = triton.knobs.runtime.interpret
OWN_DTYPE = ("table", "scale", "shift")  # parameters whose dtype is not that of the others
AUTOCAST_DEVICES = ("cpu", "cuda")
HERE = nullcontext()
_LIBRARY = torch.library.Library("swinfast", "FRAGMENT")


class Launch(NamedTuple):
    """One launch as ``record`` keeps it; a call of PyTorch's own library has no kernel and no programs."""

    kernel: Any
    programs: int
    args: tuple  # tensors and integers, in the order of the kernel's parameters
    constants: dict[str, Any]
    config: Config


_recording: list[Launch] | None = None
_recorded_arch: str | None = None


@contextmanager
def record(arch: str) -> Iterator[list[Launch]]:
    """Collect launches on meta tensors, as they would be on an architecture, in place of ignoring them."""
    global _recording, _recorded_arch
    before = _recording, _recorded_arch
    _recording, _recorded_arch = [], arch
    try:
        yield _recording
    finally:
        _recording, _recorded_arch = before


def arch_of(device: torch.device) -> str:
    """The name of a device's architecture: sm_90, gfx942, … What has none is treated as sm_90."""
    if _recorded_arch is not None:
        return _recorded_arch
    return _arch(device) if device.type == "cuda" else "sm_90"


@functools.lru_cache
def _arch(device: torch.device) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def launch(kernel: Any, programs: int, *args: Any, config: Config, **constants: Any) -> None:
    """Launch a kernel in a row of programs. The first of args is a tensor, the constants are its constexprs."""
    tensor = args[0].base if isinstance(args[0], TensorDescriptor) else args[0]
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        if _recording is not None:
            _recording.append(Launch(kernel, programs, args, constants, config))
        return
    if not programs:
        return
    if not (tensor.is_cuda or INTERPRETED):
        raise RuntimeError(
            f"Triton kernels run on a GPU, got tensors on {tensor.device}; "
            "on a CPU they run only in Triton's interpreter, with TRITON_INTERPRET=1 set before triton is imported"
        )
    elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
    with torch.cuda.device(tensor.device) if elsewhere else HERE:
        well_compiled(kernel[(programs,)], *args, **constants | config.options)


def can_be_described(*tensors: Tensor) -> bool:
    """Whether a GPU's copy engine takes the tensors: rows of whole 16 bytes, the first on a boundary of them."""
    rows_fit = all(t.shape[-1] * t.element_size() % 16 == 0 for t in tensors)
    return rows_fit and all(isinstance(t, FakeTensor) or t.data_ptr() % 16 == 0 for t in tensors)


def described(tensor: Tensor, block: list[int]) -> TensorDescriptor | Tensor:
    """What a kernel loads or stores blocks of a matrix by, in place of pointers."""
    return tensor if isinstance(tensor, FakeTensor) else TensorDescriptor.from_tensor(tensor, block)


@functools.lru_cache
def units(device: torch.device) -> int:
    """The multiprocessors of a GPU; an H100's where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def persistent(tasks: int, device: torch.device, per_unit: int = 1) -> int:
    """How many programs stay and go from task to task: so many to a multiprocessor, or as many as there are tasks.

    While a model is traced for any size that is a symbol, which nothing may be asked: to compare it is to fix it.
    """
    return min(tasks, per_unit * units(device)) if isinstance(tasks, int) else tasks


def left_to_pytorch(*args: Any, config: Config, **constants: Any) -> None:
    """Note, where launches are recorded, that PyTorch's own library computes this one."""
    if _recording is not None and (args[0].is_meta or isinstance(args[0], FakeTensor)):
        _recording.append(Launch(None, 0, args, constants, config))


def precision(dtype: torch.dtype) -> str:
    """How a product of two tiles is computed: TF32 for float32 where PyTorch's own setting allows it."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def precision_of_few(dtype: torch.dtype, device: torch.device) -> str:
    """How a product over so few channels is computed that PyTorch's own is not in TF32 either: as exact as float32."""
    in_three_parts = precision(dtype) == "tf32" and arch_of(device).startswith("sm_")  # which Triton has for NVIDIA's
    return "tf32x3" if in_three_parts else "ieee"


def precision_name(dtype: torch.dtype) -> str:
    """The name that tables of configurations have for a dtype: float16, bfloat16, float32 or tf32."""
    return "tf32" if precision(dtype) == "tf32" else str(dtype).removeprefix("torch.")


def check(name: str, tensor: Tensor, shape: tuple[int | None, ...], like: Tensor | None = None) -> None:
    """Refuse a tensor that is not contiguous or not of a shape (None: any size), or has another dtype or device.

    Raises:
        ValueError: It names the argument, what came and what was expected.
    """
    if tensor.shape != shape and not _fits(tensor.shape, shape):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{expected}], got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for shape {list(tensor.shape)}")
    if like is None:
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")
        return
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name} must be {like.dtype} as the other arguments, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the other arguments, got {tensor.device}")


def _fits(got: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    if len(got) != len(wanted):
        return False
    return all(want is None or size == want for size, want in zip(got, wanted, strict=True))


def check_weight(name: str, weight: Tensor, shape: tuple[int | None, ...], x: Tensor) -> None:
    """Check a weight (or bias) of a matrix product with x: of its dtype, or 16-bit where x is float32.

    The latter is what autocast means: 16-bit products on a residual stream in float32.
    """
    check(name, weight, shape)
    mixed = x.dtype == torch.float32 and weight.dtype in DTYPES
    if weight.device != x.device or not (weight.dtype == x.dtype or mixed):
        raise ValueError(
            f"{name} must be {x.dtype} on {x.device} as the other arguments, got {weight.dtype} on {weight.device}"
        )


def check_vectors(channels: int, like: Tensor, **vectors: Tensor | None) -> None:
    """Check that each vector is [channels]; None stands for one that is left out."""
    for name, vector in vectors.items():
        if vector is not None:
            check(name, vector, (channels,), like=like)


def check_pair(channels: int, like: Tensor, **vectors: Tensor | None) -> bool:
    """Whether there is a LayerNorm that may be left out; its two vectors are checked, by their names."""
    (weight_name, weight), (bias_name, bias) = vectors.items()
    if (weight is None) != (bias is None):
        given, missing = (weight_name, bias_name)[:: 1 if bias is None else -1]
        raise ValueError(f"{given} and {missing} must be given together, got {given} alone")
    check_vectors(channels, like, **vectors)
    return weight is not None


def check_mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> tuple[int, int, int]:
    """Check an MLP's input [..., C] and weights; (rows of x, units of the hidden layer, C)."""
    check("fc1_weight", fc1_weight, (None, None))
    hidden, channels = fc1_weight.shape
    check("x", x, (*x.shape[:-1], channels))
    check_weight("fc1_weight", fc1_weight, (hidden, channels), x)
    check_vectors(hidden, fc1_weight, fc1_bias=fc1_bias)
    check("fc2_weight", fc2_weight, (channels, hidden), like=fc1_weight)
    check_vectors(channels, fc1_weight, fc2_bias=fc2_bias)
    rows = x.numel() // channels
    check_rows("x", rows)
    return rows, hidden, channels


def check_rows(name: str, rows: int) -> None:
    """Refuse more rows than 32-bit row numbers can count."""
    if isinstance(rows, int) and rows > LARGEST_ROWS:  # a symbolic number is checked when it is known
        raise ValueError(f"{name} must have at most {LARGEST_ROWS} rows, got {rows}")


def operator(launcher: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Register a launcher as ``torch.ops.swinfast.<its name>``, with a fake and an autocast rule.

    The function that is returned calls the launcher itself in plain eager calls, which is quicker, and the operator
    wherever something must see it: tracing, dispatch modes, tensor subclasses, autocast, grad mode.
    """
    name = launcher.__name__
    op = torch.library.custom_op(f"swinfast::{name}", launcher, mutates_args=())
    op.register_fake(launcher)
    for device in AUTOCAST_DEVICES:
        _LIBRARY.impl(name, _autocast_rule(launcher, device), f"Autocast{device.upper()}")

    @functools.wraps(launcher)
    def call(*args, **kwargs):
        first = args[0] if args else next(iter(kwargs.values()))
        plain = (
            not torch.is_grad_enabled()
            and type(first) in (Tensor, nn.Parameter)
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._is_any_autocast_enabled()
        )
        return launcher(*args, **kwargs) if plain else op(*args, **kwargs)

    return call


def _autocast_rule(launcher: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """Floating-point tensors in the dtype of the autocast region, as for a linear layer, but for those of OWN_DTYPE."""
    name, parameters = launcher.__name__, tuple(inspect.signature(launcher).parameters)
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def cast(parameter: str, value: Any, dtype: torch.dtype) -> Any:
        eligible = isinstance(value, Tensor) and value.dtype in DTYPES and value.device.type == device
        return value.to(dtype) if eligible and parameter not in OWN_DTYPE else value

    def rule(*args, **kwargs):
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(key):
            args = [cast(*pair, dtype) for pair in zip(parameters, args, strict=False)]
            return getattr(torch.ops.swinfast, name)(*args, **{k: cast(k, v, dtype) for k, v in kwargs.items()})

    return rule
