"""What swinfast finds on a machine: versions, devices and what computes on each, and what is missing."""

import os
import platform
from typing import Any

import torch

from . import __version__
from .backends import why_no_triton
from .benchmark import cpu_name
from .measurements import driver_of, version_of
from .torch_linear import can_pack, has_native_bfloat16

OPTIONAL = {  # package: the extra that brings it, and what for
    "huggingface_hub": ("hub", "published weights can't be downloaded"),
    "timm": ("bench", "bench/ compares with timm"),
    "matplotlib": ("bench", "no plots"),
    "sklearn": ("train", "the example model can't be trained anew"),
    "onnxruntime": ("peers", "bench.peers_cpu compares with it"),
    "openvino": ("peers", "bench.peers_cpu compares with it"),
}
Info = dict[str, Any]


def info() -> Info:
    """``versions`` by package (None: not installed), ``devices``, and ``missing``: what, and why or how to get it."""
    packages = ("torch", "triton", "numpy", "timm")
    versions = {"swinfast": __version__, "python": platform.python_version()}
    versions |= {name: version_of(name) for name in packages} | {"torch": torch.__version__, "cuda": torch.version.cuda}
    devices = [_cpu(), *(_gpu(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))]
    return {"versions": versions, "devices": devices, "missing": _missing(devices)}


def _cpu() -> Info:
    return {
        "device": "cpu",
        "name": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "native_bfloat16": has_native_bfloat16(),
        "packed_linears": [str(d).removeprefix("torch.") for d in (torch.float32, torch.bfloat16) if can_pack(d)],
        "backend": "torch",
        "table": None,
    }


def _gpu(device: torch.device) -> Info:
    properties = torch.cuda.get_device_properties(device)
    problem = why_no_triton(device)
    return {
        "device": str(device),
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "driver": driver_of(device),
        "native_bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
        "backend": "torch" if problem else "triton",
        "why_not_triton": problem,
        "table": None if problem else _table(device),
    }


def _table(device: torch.device) -> str:
    """The file of configurations that is asked first."""
    from .kernels.configs import rows
    from .kernels.launch import arch_of

    return f"{arch_of(device)}.json" if rows(arch_of(device)) else "default.json"


def _missing(devices: list[Info]) -> Info:
    found: Info = {}
    if len(devices) == 1:
        built = torch.version.cuda or torch.version.hip
        found["GPU"] = "PyTorch finds none" if built else f"this PyTorch ({torch.__version__}) is built for CPUs alone"
    if version_of("triton") is None:
        found["Triton"] = "not installed: PyTorch computes everywhere"
    cpu = devices[0]
    if not cpu["native_bfloat16"]:
        found["bfloat16 on this CPU"] = "no matrix instructions for it: computed in float32"
    for dtype in ("float32", "bfloat16"):
        if dtype not in cpu["packed_linears"]:
            found[f"packed linear layers in {dtype}"] = "this PyTorch does not have them: F.linear computes"
    for package, (extra, purpose) in OPTIONAL.items():
        if version_of(package) is None:
            found[package] = f"{purpose}; pip install 'swinfast[{extra}]'"
    return found
