"""Whole models: timm eager against swinfast, interleaved. `python -m bench.models --help`.

Appends a row for each measurement to a csv under bench/results. A speed is written only beside its error: a model
whose answers fail swinfast.verify is not timed.
"""

import argparse
import copy
import csv
import subprocess
from datetime import date
from pathlib import Path

import torch
from torch import nn

import swinfast
from bench.peers import import_timm
from swinfast.benchmark import Timing, compare, describe_device, randomise
from swinfast.predict import resolve_device

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMNS = (
    "model", "infer_img_size", "infer_batch_size", "infer_samples_per_sec", "infer_step_time", "infer_step_time_p95",
    "param_count", "engine", "dtype", "device", "rel_error", "top1_agreement", "rounds", "torch", "commit", "date",
    "source",
)  # fmt: skip


def main() -> None:
    options = _parser().parse_args()
    timm, commit = import_timm(), commit_of_this()
    device = resolve_device(options.device)
    for name in options.models:
        plain = randomise(timm.create_model(name)).eval().to(device)
        for dtype in options.dtypes:
            for batch in options.batch_sizes:
                for row in measure(plain, name, DTYPES[dtype], batch, device, options.rounds):
                    append(options.output, row | {"commit": commit})
                    print(
                        f"{name} {dtype} batch {batch} {row['engine']}: {row['infer_samples_per_sec']} img/s, "
                        f"{row['infer_step_time']} ms, relative error {row['rel_error']}",
                        flush=True,
                    )


def measure(
    plain: nn.Module, name: str, dtype: torch.dtype, batch: int, device: torch.device, rounds: int
) -> list[dict]:
    """Rows of timm eager and swinfast for one model, dtype and batch size, from one interleaved run.

    Args:
        plain: The model in float32, with random weights that matter.
    """
    fast = swinfast.optimize(plain, dtype=dtype)
    outcome = swinfast.verify(plain, fast, torch.randn(2, 3, *plain.img_size, device=device))
    if not outcome.passed:
        raise RuntimeError(f"{name} in {dtype} is wrong, so its speed means nothing: {outcome}")
    eager = copy.deepcopy(plain).to(dtype)
    images = torch.randn(batch, 3, *plain.img_size, device=device, dtype=dtype)
    timings = compare({"timm eager": lambda: eager(images), "swinfast": lambda: fast(images)}, rounds, device=device)
    errors = {"timm eager": outcome.plain, "swinfast": outcome.fast}
    shared = {"top1_agreement": outcome.top1_agreement, "rounds": rounds}
    return [
        row_of(plain, name, dtype, batch, device, timing)
        | shared
        | {"engine": engine, "rel_error": f"{errors[engine].relative_rms:.2e}"}
        for engine, timing in timings.items()
    ]


def row_of(plain: nn.Module, name: str, dtype: torch.dtype, batch: int, device: torch.device, timing: Timing) -> dict:
    """What a row says whatever the engine is."""
    return {
        "model": name,
        "infer_img_size": plain.img_size[0],
        "infer_batch_size": batch,
        "infer_samples_per_sec": round(batch / timing.median, 2),
        "infer_step_time": round(1e3 * timing.median, 2),
        "infer_step_time_p95": round(1e3 * timing.p95, 2),
        "param_count": round(sum(p.numel() for p in plain.parameters()) / 1e6, 2),
        "dtype": str(dtype).removeprefix("torch."),
        "device": describe_device(device),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "source": "measured",
    }


def append(path: Path, row: dict) -> None:
    """Add a row to a csv file, with a header where the file is new."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def commit_of_this() -> str:
    """The commit that was measured, marked where files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, cwd=RESULTS.parent
    )
    return described.stdout.strip() or "unknown"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["swinv2_cr_tiny_ns_224"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.csv")
    return parser


if __name__ == "__main__":
    main()
