"""What a device reaches at its best: a large copy and large matrix products. `python -m bench.peaks [--device cuda]`

A kernel's floor is taken from these where they were measured in the same run: published peaks are out of any program's
reach.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from swinfast.kernels.shapes import PRECISIONS
from tabulate import tabulate

from bench.cases import tf32_setting
from swinfast.capture import capture
from swinfast.measurements import provenance
from swinfast.pipeline import resolve_device

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 22}  # of the source; as many are written
MATRIX = {"cuda": 8192, "cpu": 256}

Timer = Callable[..., float]


class Peaks(NamedTuple):
    """Bytes per second of a copy, read and written, and FLOP per second by precision."""

    bandwidth: float
    rates: dict[str, float]


def timer_of(device: torch.device) -> Timer:
    """timer(function, rep=100) gives seconds: by do_bench, median on a GPU; one call elsewhere."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return lambda function, rep=100: do_bench(function, warmup=rep / 4, rep=rep, return_mode="median") / 1e3

    import time

    def once(function: Callable[[], object], rep: float = 0) -> float:
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    return once


def launches_of(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """What a function launches, without what it takes the host: its CUDA graph. Without a GPU it is the function."""
    if device.type != "cuda":
        return function
    function()  # a first launch loads the kernel, which a capture does not allow
    replay, _ = capture(function, device)

    def launch(reads: object = function) -> None:  # whose tensors must stay for as long as the graph
        replay()

    return launch


def measure_peaks(device: torch.device, precisions: Sequence[str], timer: Timer) -> Peaks:
    """Copy bandwidth and the rate of a square matrix product in each precision, on random data."""
    source, n = torch.randn(COPY_BYTES[device.type] // 4, device=device), MATRIX[device.type]
    target, rates = torch.empty_like(source), {}
    bandwidth = 2 * COPY_BYTES[device.type] / timer(lambda: target.copy_(source))
    for precision in precisions:
        a, b = (torch.randn(n, n, device=device).to(PRECISIONS[precision]) for _ in range(2))
        with tf32_setting(precision):
            rates[precision] = 2 * n**3 / timer(lambda a=a, b=b: a @ b)
    return Peaks(bandwidth, rates)


def rows_of(peaks: Peaks) -> list[dict]:
    """Rows as bench.kernels writes them."""
    rows = [{"kernel": "copy", "tb_per_s": round(peaks.bandwidth / 1e12, 4)}]
    for precision, rate in peaks.rates.items():
        rows.append({"kernel": "matrix product", "dtype": precision, "tflop_per_s": round(rate / 1e12, 2)})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    device = resolve_device(parser.parse_args(argv).device)
    rows = rows_of(measure_peaks(device, list(PRECISIONS), timer_of(device)))
    print(tabulate(rows, headers="keys"))
    print(", ".join(provenance(device, "measured").values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
