"""Where a measurement was made and of what: columns that every row of a result file has."""

import os
import re
import subprocess
from datetime import date
from functools import cache
from pathlib import Path

import torch
import triton

from swinfast.benchmark import describe_device

ROOT = Path(__file__).parents[1]


def provenance(device: torch.device, source: str) -> dict[str, str]:
    """Device, versions, commit, date and what kind of number it is: "measured", or why it is no measurement."""
    return {
        "device": describe_device(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver": driver_of(device),
        "commit": commit_of_this(),
        "date": date.today().isoformat(),
        "source": source,
    }


@cache
def commit_of_this() -> str:
    """The commit that is measured, marked where files differ from it; SWINFAST_COMMIT in a copy that has no history."""
    described = _said(["git", "describe", "--always", "--dirty", "--exclude=*"])
    return described or os.environ.get("SWINFAST_COMMIT", "unknown")


@cache
def driver_of(device: torch.device) -> str:
    """The version of the GPU's driver, "" on a CPU or where it can't be told."""
    if device.type != "cuda":
        return ""
    return _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).partition("\n")[0]


def slug(device: torch.device) -> str:
    """The device's name as part of a file's name: nvidia_h100_80gb_hbm3."""
    return re.sub(r"[^a-z0-9]+", "_", describe_device(device).lower()).strip("_")


def _said(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
