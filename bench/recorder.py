"""What tests launch: `pytest -p bench.recorder` keeps it in a folder, and launches_of(command) is it again.

Without a GPU tests run in Triton's interpreter, so what they will launch on one is known before.
"""

import importlib
import os
import pickle
import pkgutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import swinfast.kernels
import torch
from swinfast.kernels import launch as launching
from swinfast.kernels.launch import Launch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton.tools.tensor_descriptor import TensorDescriptor

FOLDER = "SWINFAST_LAUNCHES"  # environment variable that names it
ROOT = Path(__file__).parents[1]
_seen: dict[str, tuple] = {}


def launches_of(command: Sequence[str]) -> Iterator[Launch]:
    """What a command launches that runs tests, as pytest with its options. Those that fail it names itself."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {FOLDER: folder, "TRITON_INTERPRET": "1"}
        subprocess.run([*command, "-p", "bench.recorder"], cwd=ROOT, env=environment, check=False)
        kept: dict[str, tuple] = {}
        for file in Path(folder).iterdir():
            kept |= pickle.loads(file.read_bytes())
    for module, function, programs, args, constants, config in kept.values():
        kernel = getattr(importlib.import_module(module), function)
        yield Launch(kernel, programs, tuple(map(_restored, args)), constants, config)


def pytest_collection_finish(session: pytest.Session) -> None:
    """From now on keep what is launched, whatever module does it."""
    real = launching.launch

    def launch(kernel: Any, programs: int, *args: Any, config: Any, **constants: Any) -> None:
        tensor = args[0].base if isinstance(args[0], TensorDescriptor) else args[0]
        if programs and not tensor.is_meta and not isinstance(tensor, FakeTensor):
            kept = kernel.fn.__module__, kernel.fn.__name__, programs, tuple(map(_plain, args)), constants, config
            _seen.setdefault(repr(kept), kept)
        real(kernel, programs, *args, config=config, **constants)

    for found in pkgutil.iter_modules(swinfast.kernels.__path__, "swinfast.kernels."):
        if not found.name.endswith("__main__"):
            module = importlib.import_module(found.name)
            if module is not launching and getattr(module, "launch", None) is real:
                module.launch = launch


def pytest_sessionfinish(session: pytest.Session) -> None:
    Path(os.environ[FOLDER], f"{os.getpid()}.pickle").write_bytes(pickle.dumps(_seen))


def _plain(value: Any) -> tuple:
    """An argument as data: of a tensor what a kernel is compiled for."""
    if isinstance(value, TensorDescriptor):
        return "descriptor", _plain(value.base), list(value.block_shape)
    if isinstance(value, Tensor):
        return "tensor", value.dtype, tuple(value.shape), value.stride(), value.data_ptr() % 16
    return "value", value


def _restored(plain: tuple) -> Any:
    kind, *what = plain
    if kind == "value":
        return what[0]
    if kind == "descriptor":
        return TensorDescriptor.from_tensor(_restored(what[0]), what[1])
    dtype, shape, stride, offset = what
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    whole = torch.empty(extent + 16, dtype=dtype, device="meta")  # a meta tensor's address is its offset in bytes
    return whole.as_strided(shape, stride, offset // dtype.itemsize)
