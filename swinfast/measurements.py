"""The table of measurements: what a row says, and csv files of rows, which are only ever added to.

The first columns are those of timm's benchmark tables, in their units: times in milliseconds, parameters and
activations in millions, multiply-adds in 10^9 (swinfast/counts.py). peak_memory is in MB (10^6 bytes). A cell is empty
where nothing was measured.
"""

import contextlib
import csv
import functools
import importlib.util
import os
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from importlib import metadata
from pathlib import Path

import torch
from torch import nn
from torch.utils import collect_env

from . import __version__
from .benchmark import Timing, describe_device
from .counts import counts
from .engines import Comparison, image_shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMNS = (
    "model", "infer_img_size", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "param_count",
    "infer_gmacs", "infer_macts", "engine", "dtype", "device", "torch", "triton", "driver", "commit", "source",
    "rel_error", "top1_agreement", "peak_memory", "infer_step_time_p95", "rounds", "date",
)  # fmt: skip


def rows_of(
    comparison: Comparison, name: str, dtype: torch.dtype, batch: int, device: torch.device, rounds: int
) -> list[dict]:
    """A row for each engine that was measured; name is the model's, of engines with no model of their own.

    All have the same date and time of day, by which rows of one run are known.
    """
    rows, now = [], datetime.now().isoformat(timespec="seconds")
    for one in comparison.measured:
        row = row_of(one.plain, one.model or name, dtype, batch, device, one.timing)
        row |= {"engine": one.engine, "rounds": rounds, "date": now}
        if one.error is not None:
            row["rel_error"] = f"{one.error:.2e}"
        if one.agreement is not None:
            row["top1_agreement"] = round(one.agreement, 4)
        if one.peak_memory is not None:
            row["peak_memory"] = round(one.peak_memory / 1e6, 1)
        if one.graph_failure is not None:
            row["source"] += f", without a CUDA graph, since capturing one failed: {one.graph_failure}"
        rows.append(row)
    return rows


def row_of(plain: nn.Module, name: str, dtype: torch.dtype, batch: int, device: torch.device, timing: Timing) -> dict:
    """What a row says whatever the engine is."""
    channels, height, width = image_shape(plain)
    counted = counts(plain, (channels, height, width))
    return {
        "model": name,
        "infer_img_size": height if height == width else f"{height}x{width}",
        "infer_samples_per_sec": round(batch / timing.median, 2),
        "infer_step_time": round(1e3 * timing.median, 3),
        "infer_batch_size": batch,
        "param_count": round(sum(p.numel() for p in plain.parameters()) / 1e6, 2),
        "infer_gmacs": round(counted.gmacs, 2),
        "infer_macts": round(counted.macts, 2),
        "dtype": str(dtype).removeprefix("torch."),
        "infer_step_time_p95": round(1e3 * timing.p95, 3),
    } | provenance(device, "measured")


def provenance(device: torch.device, source: str) -> dict[str, str]:
    """Device, versions, commit, date and what kind of number it is: "measured", or why it is no measurement."""
    return {
        "device": describe_device(device),
        "torch": torch.__version__,
        "triton": version_of("triton") or "",
        "driver": driver_of(device) or "",
        "commit": commit_of_this(),
        "date": date.today().isoformat(),
        "source": source,
    }


def append(path: Path, *rows: Mapping[str, object], columns: Sequence[str] = COLUMNS) -> None:
    """Add rows to a csv file, with a header where the file is new.

    Raises:
        ValueError: A row has a column that the table has not, or the file has other columns than the table.
    """
    unknown = [name for row in rows for name in row if name not in columns]
    if unknown:
        raise ValueError(f"row has unknown columns {', '.join(dict.fromkeys(unknown))}")
    check_header(path, columns)
    new = not path.exists() or path.stat().st_size == 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def check_header(path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Refuse a file that rows can't be added to (ValueError); one that is new or empty is fine."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open(newline="", encoding="utf-8") as stream:
        found = next(csv.reader(stream), [])
    if tuple(found) == tuple(columns):
        return
    missing = ", ".join(name for name in columns if name not in found) or "none"
    unknown = ", ".join(name for name in found if name not in columns) or "none"
    raise ValueError(
        f"{path} is no table to add to: of its columns are missing: {missing}; unknown: {unknown}; "
        f"expected are, in this order: {', '.join(columns)}"
    )


@functools.cache
def commit_of_this() -> str:
    """The commit that is measured: what SWINFAST_COMMIT says, which knows of a copy whose history is another's or
    missing; else git's, marked where files differ from it; else the version, as v0.1.0.
    """
    if named := os.environ.get("SWINFAST_COMMIT"):
        return named
    root = Path(__file__).parents[1]
    described = ""
    if (root / ".git").exists():
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        with contextlib.suppress(OSError):
            described = subprocess.run(command, capture_output=True, text=True, cwd=root).stdout.strip()
    return described or f"v{__version__}"


@functools.cache
def driver_of(device: torch.device) -> str | None:
    """The version of an NVIDIA GPU's driver, None for other devices or where it can't be told."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return collect_env.get_nvidia_driver_version(collect_env.run)


def version_of(package: str) -> str | None:
    """The version of an installed package, None where it is missing; nothing is imported."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # part of another build, as Triton of PyTorch's for AMD
        return "unknown"
