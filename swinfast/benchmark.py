"""Fair timing: candidates take turns in one run, so that a machine whose speed drifts slows all of them alike."""

import gc
import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

GPU_WARMUP, GPU_ROUND = 5, 25  # milliseconds of one candidate's turn


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median and the 95th percentile of all rounds."""

    median: float
    p95: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        ordered = sorted(seconds)
        return cls(statistics.median(ordered), ordered[math.ceil(0.95 * len(ordered)) - 1])


def compare(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int = 10,
    warmup: int = 2,
    device: torch.device | None = None,
) -> dict[str, Timing]:
    """Time functions of no arguments in turn, round after round, under inference mode.

    On a CPU a round is one call of each by the wall clock. On a GPU it is some calls of each by
    ``triton.testing.do_bench``: GPU events around every call, after the L2 cache was overwritten.

    Args:
        candidates: Functions by name.
        rounds: Timed rounds.
        warmup: Rounds before that, which are not counted.
        device: Where the functions compute; None for a CPU.
    """
    measure = _on_gpu if device is not None and device.type == "cuda" else _on_cpu
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.inference_mode():
        for round_ in range(-warmup, rounds):
            for name, function in candidates.items():
                times = measure(function)
                if round_ >= 0:
                    seconds[name] += times
    return {name: Timing.of(values) for name, values in seconds.items()}


def _on_cpu(function: Callable[[], object]) -> list[float]:
    start = time.perf_counter()
    function()
    return [time.perf_counter() - start]


def _on_gpu(function: Callable[[], object]) -> list[float]:
    from triton.testing import do_bench

    times = do_bench(function, warmup=GPU_WARMUP, rep=GPU_ROUND, return_mode="all")
    return [time / 1e3 for time in times]


def rotating(function: Callable[..., object], inputs: Sequence[tuple]) -> Callable[[], object]:
    """A function of no arguments that calls another on several inputs in turn, so that none is found in a cache."""
    turns = itertools.cycle(inputs)
    return lambda: function(*next(turns))


def copies_beyond_cache(size: int, device: torch.device) -> int:
    """How many inputs of size bytes it takes until the first is in no cache any more, at least 2."""
    return max(2, -(-2 * cache_size(device) // max(1, size)))


def cache_size(device: torch.device) -> int:
    """Bytes of the last-level cache: L2 of a GPU, L3 of a CPU (32 MiB where it can't be told)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    file = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    text = file.read_text(encoding="utf-8").strip() if file.exists() else ""
    return int(text[:-1]) << 10 if text.endswith("K") and text[:-1].isdigit() else 32 << 20


class PeakMemory:
    """The memory of a GPU that something takes, from when this is made; None everywhere on other devices."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            self._settle()
            self.allocated, self.reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)

    def of(self, call: Callable[[], object]) -> int | None:
        """Bytes at the highest point of a call, all that is kept since the beginning included.

        A captured graph keeps memory that counts as free between its tensors: where the allocator holds more than was
        ever in use, that is the figure.
        """
        if self.device.type != "cuda":
            return None
        self._settle()
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self._settle()
        used = torch.cuda.max_memory_allocated(self.device) - self.allocated
        held = torch.cuda.memory_reserved(self.device) - self.reserved
        return max(used, held)

    def _settle(self) -> None:
        torch.cuda.synchronize(self.device)
        gc.collect()
        torch.cuda.empty_cache()


def describe_device(device: torch.device) -> str:
    """The processor's name, and for a CPU its vector instructions and the threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{cpu_name()} ({capability}, {torch.get_num_threads()} threads of {os.cpu_count()})"


def cpu_name() -> str:
    """The processor's name, or at least the kind of machine."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights under which every part of a model shows in its answers; returns the model.

    A fresh model has norm1 and norm2 gains of zero, so all its blocks are the identity and a comparison would see
    nothing. Here gains are around 1, all biases and the position bias are of a size that shows, and some logit scales
    lie above their clamp. The same keys, shapes and seed give the same values.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, scale: float, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = parameter.shape
            if name.endswith("logit_scale"):
                value = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 + 1.5
                value[::3] = math.log(100.0) + 0.7
            elif "norm" in name:
                value = normal(shape, 0.3, mean=1.0 if name.endswith("weight") else 0.0)
            elif "meta_mlp" in name or "cpb_mlp" in name:
                value = normal(shape, 0.7 if shape[-1] == 2 or "fc1" in name else 0.1)
            elif name.endswith("bias"):
                value = normal(shape, 0.3)
            else:
                value = normal(shape, math.prod(shape[1:]) ** -0.5)
            parameter.copy_(value)
    return model
