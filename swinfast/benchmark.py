"""Fair timing: candidates take turns in one run, so that a machine whose speed drifts slows all of them alike."""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median and the 95th percentile of all rounds."""

    median: float
    p95: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        ordered = sorted(seconds)
        return cls(statistics.median(ordered), ordered[math.ceil(0.95 * len(ordered)) - 1])


def compare(candidates: Mapping[str, Callable[[], object]], rounds: int = 10, warmup: int = 2) -> dict[str, Timing]:
    """Time functions of no arguments, one call of each in turn, under inference mode.

    Args:
        candidates: Functions by name.
        rounds: Timed calls of each.
        warmup: Calls of each before that.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.inference_mode():
        for round_ in range(-warmup, rounds):
            for name, function in candidates.items():
                _synchronize()
                start = time.perf_counter()
                function()
                _synchronize()
                if round_ >= 0:
                    seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(values) for name, values in seconds.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def describe_device(device: torch.device) -> str:
    """The processor's name, and for a CPU its vector instructions and the threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    name = name or platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({capability}, {torch.get_num_threads()} threads of {os.cpu_count()})"


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
            elif "meta_mlp" in name:
                value = normal(shape, 0.7 if "fc1" in name else 0.1)
            elif name.endswith("bias"):
                value = normal(shape, 0.3)
            else:
                value = normal(shape, math.prod(shape[1:]) ** -0.5)
            parameter.copy_(value)
    return model
