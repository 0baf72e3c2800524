"""What a launch costs on the host, by operation and for a forward without CUDA graphs.

`python -m bench.overhead [--model NAME] [--dtype float16] [--device cpu|cuda] [--output FILE]`

On a CPU a launcher does everything but launch: it checks its arguments, looks its configuration up, allocates its
output and calls a kernel that does nothing. On a GPU the launch by Triton comes on top, and whole forwards are timed
too, until they return: at batch 1, where the GPU waits for the host.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from unittest import mock

import torch
from swinfast.kernels import launch
from swinfast.kernels.launch import arch_of
from swinfast.kernels.shapes import PRECISIONS
from tabulate import tabulate
from torch import Tensor

import swinfast
from bench import RESULTS
from bench.cases import Case, call_arguments, cases_of, inputs_of, model_named, operation, tf32_setting
from swinfast.measurements import append, check_header, provenance
from swinfast.pipeline import resolve_device

COLUMNS = (
    "model", "dtype", "operation", "shape", "calls", "host_us", "forward_us", "device", "torch", "triton", "driver",
    "commit", "date", "source",
)  # fmt: skip
CALLS, ROUNDS = 100, 15  # in one timing, and timings; the least counts: the cost without what else the machine does
WITHOUT_LAUNCH = "measured, without Triton's launch"


def launching_nothing(cases: Sequence[Case]) -> AbstractContextManager:
    """Kernels on CPU tensors do nothing, at no cost."""
    stack = ExitStack()
    stack.enter_context(mock.patch.object(launch, "INTERPRETED", True))
    for kernel in {id(case.launch.kernel): case.launch.kernel for case in cases if case.launch.kernel}.values():
        stack.enter_context(mock.patch.object(type(kernel), "run", lambda *_, **__: None, create=True))
    stack.enter_context(mock.patch.object(torch.nn.functional, "linear", _unwritten))
    return stack


def _unwritten(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.empty((*x.shape[:-1], len(weight)), dtype=x.dtype)


def host_us(function: Callable[[], object], device: torch.device) -> float:
    """Microseconds until a call returns."""
    times = []
    for _ in range(ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(CALLS):
            function()
        times.append((time.perf_counter() - began) / CALLS)
    return 1e6 * min(times)


def rows_of(cases: Sequence[Case], device: torch.device) -> list[dict]:
    """A row of each operation and shape, in the order of a forward."""
    rows = []
    for case in cases:
        arguments = tuple(call_arguments(case, inputs_of(case, device)).values())
        function = operation(case)
        with torch.no_grad(), tf32_setting(case.precision):
            function(*arguments)  # compiles
            us = host_us(lambda f=function, a=arguments: f(*a), device)
        rows.append({
            "operation": case.operation, "shape": case.shape, "calls": case.calls, "host_us": round(us, 2),
            "forward_us": round(us * case.calls, 1),
        })  # fmt: skip
    return rows


def whole_forward(name: str, precision: str, device: torch.device) -> dict:
    """A row of a whole forward at batch 1, what surrounds the launches included."""
    model = swinfast.create_model(name, device=device, dtype=PRECISIONS[precision]).eval()
    fast = swinfast.optimize(model, backend="triton", cuda_graphs=False)
    images = torch.randn(1, 3, *model.img_size, device=device).to(PRECISIONS[precision])
    with torch.no_grad(), tf32_setting(precision):
        fast(images)
        us = host_us(lambda: fast(images), device)
    return {"operation": "forward", "calls": 1, "host_us": round(us, 1), "forward_us": round(us, 1)}


def by_operation(rows: Sequence[dict]) -> list[tuple[str, int, float, float]]:
    """(operation, launches, microseconds of one, of all) in a forward, the costliest first."""
    sums: dict[str, tuple[int, float]] = {}
    for row in rows:
        calls, total = sums.get(row["operation"], (0, 0.0))
        sums[row["operation"]] = calls + row["calls"], total + row["forward_us"]
    lines = [(name, calls, total / calls, total) for name, (calls, total) in sums.items()]
    return sorted(lines, key=lambda line: -line[-1])


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    check_header(options.output, COLUMNS)
    device = resolve_device(options.device)
    gpu = device.type == "cuda"
    cases = cases_of(model_named(options.model), 1, options.dtype, arch_of(device))
    with nullcontext() if gpu else launching_nothing(cases):
        rows = rows_of(cases, device)
    launches = by_operation(rows)
    if gpu:
        rows.append(whole_forward(options.model, options.dtype, device))
    about = provenance(device, "measured" if gpu else WITHOUT_LAUNCH)
    about |= {"model": options.model, "dtype": options.dtype}
    append(options.output, *(row | about for row in rows), columns=COLUMNS)
    print(tabulate(launches, headers=("operation", "launches", "µs each", "µs a forward"), floatfmt=".2f"))
    count, total = sum(line[1] for line in launches), sum(line[-1] for line in launches)
    print(f"{count} launches, {total / count:.2f} µs each, {total:.0f} µs a forward on the host ({about['source']})")
    if gpu:
        print(f"a whole forward without graphs returns after {rows[-1]['host_us']:.0f} µs")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="swinv2_cr_tiny_ns_224")
    parser.add_argument("--dtype", choices=PRECISIONS, default="float16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, metavar="FILE", default=RESULTS / "overhead.csv")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
