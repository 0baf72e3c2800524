"""Each kernel of a forward: is it right, how long does it take, and how near is it to its floor.

`python -m bench.kernels [--model NAME …] [--batch N] [--dtypes float16 …] [--kernels linear …] [--minutes M]`

Shapes are those that a model's forward launches. An output is checked first; a wrong kernel has no time. Times are
medians of triton.testing.do_bench, which overwrites the L2 cache before every call. The floor of a kernel is the
longer of two times: its FLOPs at the card's rate of matrix products, and its tensors read and written once at the
card's bandwidth, both measured in the same run. Beside it stands the definition (reference.ops) in plain PyTorch and
compiled.

Where there is no GPU, a small model goes through Triton's interpreter: that shows that this script works, and its times
measure nothing, so they are written to no file but one that is asked for.
"""

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, NamedTuple

import torch

if not torch.cuda.is_available():  # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from swinfast.kernels.gate import ARCHS, compile_ahead, jobs_of
from swinfast.kernels.launch import arch_of
from swinfast.kernels.shapes import PRECISIONS
from tabulate import tabulate

from bench import OUT_OF_TIME, RESULTS
from bench.cases import (
    FORMS,
    Case,
    Oracle,
    Wrong,
    call_arguments,
    cases_of,
    choose_forms,
    definition,
    inputs_of,
    model_named,
    operation,
    tf32_setting,
)
from bench.peaks import Peaks, Timer, launches_of, measure_peaks, rows_of, timer_of
from bench.roofline import bytes_of, flops_of
from bench.tables import slug
from swinfast.arguments import positive
from swinfast.errors import in_a_line
from swinfast.measurements import append, check_header, provenance
from swinfast.pipeline import resolve_device

KERNELS = (
    "attention_block", "attention_parts", "linear", "linear_norm_residual", "merge_norm", "mlp_block", "mlp_parts",
    "norm_residual", "patch_embed", "qkv_attention", "window_attention",
)  # fmt: skip
COLUMNS = (
    "model", "batch", "kernel", "shape", "launches", "dtype", "device", "time_us", "tb_per_s", "tflop_per_s",
    "share_of_floor", "bound", "intensity", "eager_us", "compiled_us", "rel_error", "config", "problem", "torch",
    "triton", "driver", "commit", "date", "source",
)  # fmt: skip
COMPOSITIONS = {"tables": None} | {name: choose_forms(forms) for name, forms in FORMS.items()}
GOAL = 0.6  # of its floor, that a kernel should reach
COMPILE_WAIT = 180.0  # seconds for all kernels, at most
NOT_ENOUGH = 20.0  # seconds that must be left to compile the definition of another kernel


class Options(NamedTuple):
    """What of a case is measured."""

    device: torch.device
    timer: Timer
    eager: bool
    check_only: bool


def measure(case: Case, peaks: Peaks, options: Options) -> dict[str, Any]:
    """A row of one case. A kernel that is wrong or can't run has a problem in place of a time."""
    row = {"kernel": case.operation, "shape": case.shape, "launches": case.calls, "dtype": case.precision}
    config = case.launch.config
    row["config"] = json.dumps({**config.blocks, "num_warps": config.num_warps, "num_stages": config.num_stages})
    inputs = inputs_of(case, options.device)
    with torch.no_grad(), tf32_setting(case.precision):
        function, arguments = operation(case), call_arguments(case, inputs)
        try:
            row["rel_error"] = f"{Oracle(case, inputs).check(function(**arguments)):.2e}"
        except Exception as error:  # whatever a kernel or its compiler throws is what the row reports
            return row | {"problem": problem_of(error)}
        if options.check_only:
            return row
        try:
            seconds = options.timer(launches_of(lambda: function(**arguments), options.device))
        except Exception as error:
            return row | {"problem": problem_of(error)}
        row |= speed(case, seconds, peaks)
        if options.eager:
            plain, given = definition(case, inputs, PRECISIONS[case.precision])
            with suppress(torch.OutOfMemoryError):  # the definition takes more memory than the kernel
                row["eager_us"] = round(1e6 * options.timer(lambda: plain(**given)), 2)
    return row


def speed(case: Case, seconds: float, peaks: Peaks) -> dict[str, Any]:
    """What a time means: rates, and the share of the floor, which is the longer of two times."""
    flops, moved = flops_of(case.launch, case.operation), bytes_of(case.launch)
    floors = {"memory": moved / peaks.bandwidth, "products": flops / peaks.rates[case.precision]}
    bound = max(floors, key=floors.get)
    return {
        "time_us": round(1e6 * seconds, 2),
        "tb_per_s": round(moved / seconds / 1e12, 4),
        "tflop_per_s": round(flops / seconds / 1e12, 3),
        "share_of_floor": round(floors[bound] / seconds, 3),
        "bound": bound,
        "intensity": round(flops / moved, 1),
    }


def compiled_us(case: Case, options: Options) -> float:
    """Microseconds of the definition under torch.compile, with its default mode."""
    inputs = inputs_of(case, options.device)
    plain, given = definition(case, inputs, PRECISIONS[case.precision])
    torch._dynamo.reset()
    compiled = torch.compile(lambda: plain(**given), dynamic=False)
    with torch.no_grad(), tf32_setting(case.precision):
        return round(1e6 * options.timer(compiled), 2)


def problem_of(error: Exception) -> str:
    """What went wrong, on one line."""
    return in_a_line(error, Wrong)[:200]


def compile_all(cases: Iterable[Case], arch: str, pool: Pool | None, seconds: float) -> None:
    """Fill Triton's cache in many processes at once, for so long: compiling is most of the time of a first run."""
    if pool is None or arch not in ARCHS:
        return
    jobs = jobs_of(((case.launch, case.precision) for case in cases), arch)
    with suppress(multiprocessing.TimeoutError):  # a pool whose worker died never ends; a launch compiles what is left
        pool.map_async(compile_ahead, jobs, chunksize=1).get(seconds)


@contextmanager
def compilers(device: torch.device) -> Iterator[Pool | None]:
    """A pool of processes that compile, None where nothing is compiled."""
    if device.type != "cuda":
        yield None
        return
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 1)) as pool:
        yield pool


def find_cases(
    models: Sequence[str],
    batch: int,
    precisions: Sequence[str],
    arch: str,
    kernels: Sequence[str],
    forms: Iterable[str],
) -> list[tuple[str, Case]]:
    """(model, case) of all models, precisions and compositions of a block (COMPOSITIONS), each case once."""
    choices = [COMPOSITIONS[name] for name in forms]
    found = {}
    for name in models:
        model = model_named(name)
        for precision in precisions:
            for choice in choices:
                for case in cases_of(model, batch, precision, arch, choice):
                    if case.operation in kernels:
                        found.setdefault(case.key, (name, case))
    return list(found.values())


def run(
    cases: Sequence[tuple[str, Case]], batch: int, peaks: Peaks, options: Options, deadline: float, rows: list[dict]
) -> None:
    """Add the rows of all cases that fit in before the deadline (of time.monotonic)."""
    for name, case in cases:
        if time.monotonic() > deadline:
            print(f"out of time: {len(cases) - len(rows)} of {len(cases)} kernels were not measured")
            break
        rows.append({"model": name, "batch": batch, **measure(case, peaks, options)})
        if rows[-1].get("problem"):
            print(f"FAILED {case.operation} {case.precision} {case.shape}: {rows[-1]['problem']}", flush=True)


def add_compiled(cases: Sequence[tuple[str, Case]], rows: list[dict], options: Options, deadline: float) -> None:
    """Times of the compiled definitions, of the slowest kernels first, while there is time."""
    order = sorted(range(len(rows)), key=lambda i: -total_us(rows[i]))
    for index in order:
        if time.monotonic() > deadline - NOT_ENOUGH:
            print("out of time: not every definition was compiled")
            return
        try:
            rows[index]["compiled_us"] = compiled_us(cases[index][1], options)
        except Exception as error:  # a compiler's failure is no failure of ours
            print(f"torch.compile of {rows[index]['kernel']} {rows[index]['shape']}: {problem_of(error)}")


def total_us(row: dict) -> float:
    """Microseconds in a forward."""
    return row.get("time_us", 0.0) * row["launches"]


def table(rows: Sequence[dict]) -> str:
    """By time in a forward; a kernel below its goal is marked."""
    lines = []
    for row in sorted(rows, key=total_us, reverse=True):
        share = row.get("share_of_floor")
        mark = "" if share is None else f"{share:.0%}{' <' if share < GOAL else ''}"
        cells = [row.get(name, "") for name in ("time_us", "eager_us", "compiled_us", "tb_per_s", "tflop_per_s")]
        names = [row["dtype"], row["kernel"], row["shape"], row["launches"]]
        lines.append([*names, *cells, mark, row.get("bound", ""), row.get("rel_error", ""), row.get("problem", "")])
    headers = (
        "dtype", "kernel", "shape", "launches", "µs", "eager", "compiled", "TB/s", "TFLOP/s", "of floor", "bound",
        "error", "problem",
    )  # fmt: skip
    return tabulate(lines, headers=headers, disable_numparse=True)


def main(argv: Sequence[str] | None = None, timer_of: Callable[[torch.device], Timer] = timer_of) -> int:
    options = _parser().parse_args(argv)
    deadline = time.monotonic() + 60 * options.minutes
    device = resolve_device(options.device)
    gpu = device.type == "cuda"
    models, batch = options.model or (["swinv2_cr_tiny_ns_224"] if gpu else ["small"]), options.batch
    batch = batch if batch is not None else (256 if gpu else 2)
    arch, timer = arch_of(device), timer_of(device)
    about = provenance(device, "measured" if gpu else "interpreter")
    written = RESULTS / f"kernels_{slug(about['device'])}.csv" if gpu and not options.check_only else None
    output = options.output or written
    if output:
        check_header(output, COLUMNS)
    cases = find_cases(models, batch, options.dtypes, arch, options.kernels or KERNELS, options.forms)
    found = {case.operation for _, case in cases}
    if missing := [name for name in options.kernels or () if name not in found]:
        print(f"no case of {', '.join(missing)} in {', '.join(models)} at batch {batch}: add --forms")
        return 1
    with compilers(device) as pool:
        left = deadline - time.monotonic()
        compile_all([case for _, case in cases], arch, pool, max(0.0, min(COMPILE_WAIT, left / 2)))
    peaks = Peaks(math.inf, {}) if options.check_only else measure_peaks(device, options.dtypes, timer)
    wanted = Options(device, timer, eager=options.eager, check_only=options.check_only)
    rows: list[dict] = []
    with suppress(KeyboardInterrupt):  # what was measured until then is still written
        run(cases, batch, peaks, wanted, deadline, rows)
        if gpu and options.eager and options.compiled and not options.check_only:
            add_compiled(cases, rows, wanted, deadline)
    if output:
        append(output, *(row | about for row in (*rows_of(peaks), *rows)), columns=COLUMNS)
    print(table(rows))
    for dtype in () if options.check_only else options.dtypes:
        total = sum(total_us(row) for row in rows if row["dtype"] == dtype)
        print(f"{dtype}: kernels of a forward {total:.1f} µs, {total / batch:.2f} µs an image")
    if not options.check_only:
        print("; ".join(" ".join(f"{key} {value}" for key, value in row.items()) for row in rows_of(peaks)))
    print(", ".join(str(value) for value in about.values()))
    failed = sum("problem" in row for row in rows)
    print(f"{len(rows)} kernels, {failed} wrong or failed{'' if gpu else '; no measurement: no GPU'}")
    if failed:
        return 1
    return OUT_OF_TIME if len(rows) < len(cases) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", metavar="NAME", help="default: swinv2_cr_tiny_ns_224 (small without GPU)")
    parser.add_argument("--batch", type=positive, help="images of the forward (default: 256; 2 without a GPU)")
    parser.add_argument("--dtypes", nargs="+", choices=PRECISIONS, default=["float16"])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, help="default: all that a forward launches")
    parser.add_argument(
        "--forms", nargs="+", choices=COMPOSITIONS, default=["tables"], help="compositions of a block (default: tables)"
    )
    parser.add_argument("--check-only", action="store_true", help="is every kernel right? no times")
    parser.add_argument("--no-eager", dest="eager", action="store_false", help="leave plain PyTorch out")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="leave torch.compile out")
    parser.add_argument("--minutes", type=float, default=9.0, help="at most (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, metavar="FILE", help="csv to append to (default: bench/results)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
