"""Where the time of a forward goes on a GPU and on its host. `python -m bench.profile_gpu [--batch 1] [--overlapped]`

Prints every kernel of a forward's CUDA graph in order, how long the graph takes with a cold L2 cache, and what one call
takes the host and altogether. The kernels are appended to a csv under bench/results.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from swinfast.kernels import configs
from swinfast.kernels.configs import Config
from swinfast.kernels.launch import arch_of
from swinfast.kernels.shapes import PRECISIONS
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

import swinfast
from bench import RESULTS
from bench.cases import tf32_setting
from bench.in_forward import Forward
from bench.peaks import timer_of
from bench.tables import slug
from swinfast.arguments import positive
from swinfast.measurements import append, check_header, provenance
from swinfast.pipeline import resolve_device

COLUMNS = ("model", "batch", "dtype", "overlapped", "place", "kernel", "start_us", "time_us", "gap_us")
PROVENANCE = ("device", "torch", "triton", "driver", "commit", "date", "source")
REPLAYS, CALLS = 5, 200


class Kernel(NamedTuple):
    """One kernel, by microseconds from the start of its forward."""

    name: str
    start: float
    time: float


def timeline(launch: Callable[[], object]) -> list[Kernel]:
    """The kernels of the last of some launches."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(REPLAYS):
            launch()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    last = events[-(len(events) // REPLAYS) :]
    start = last[0].time_range.start
    return [Kernel(e.name, e.time_range.start - start, e.time_range.elapsed_us()) for e in last]


def rows_of(kernels: Sequence[Kernel]) -> Iterator[dict]:
    """A row for each kernel: gap_us is the time before it in which nothing ran, negative where kernels overlap."""
    end = 0.0
    for place, kernel in enumerate(kernels):
        yield {
            "place": place,
            "kernel": kernel.name,
            "start_us": round(kernel.start, 2),
            "time_us": round(kernel.time, 2),
            "gap_us": round(kernel.start - end, 2),
        }
        end = max(end, kernel.start + kernel.time)


def overlapped(arch: str, precision: str) -> configs.Choose:
    """All kernels of ours as the tables have them, and overlapped."""

    def choose(kernel: str, shape: dict[str, int]) -> Config:
        with configs.override(lambda *_: None):
            chosen = configs.config(kernel, arch, precision, **shape)
        return chosen if "use" in chosen.blocks else chosen._replace(blocks=chosen.blocks | {"OVERLAPPED": True})

    return choose


def of_the_host(call: Callable[[], object], wait: Callable[[], object]) -> tuple[float, float]:
    """Microseconds of one call at a time: until it returns, and until its answer is there."""
    times = []
    for _ in range(CALLS):
        wait()
        start = time.perf_counter()
        call()
        returned = time.perf_counter()
        wait()
        times.append((1e6 * (returned - start), 1e6 * (time.perf_counter() - start)))
    return tuple(statistics.median(one) for one in zip(*times, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    device = resolve_device("auto")
    if device.type != "cuda":
        _parser().error("this needs a GPU; bench.profile_cpu says where the time goes on a CPU")
    about = provenance(device, "measured")
    output = options.output or RESULTS / f"profile_{slug(about['device'])}.csv"
    check_header(output, COLUMNS + PROVENANCE)
    forward = Forward(options.model, options.batch, options.dtype, device)
    launch = forward.launches(overlapped(arch_of(device), options.dtype) if options.overlapped else lambda *_: None)
    rows = list(rows_of(timeline(launch)))
    what = {"model": options.model, "batch": options.batch, "dtype": options.dtype, "overlapped": options.overlapped}
    append(output, *(what | row | about for row in rows), columns=COLUMNS + PROVENANCE)
    print(tabulate(rows, headers="keys"))
    for part, microseconds in summary(rows).items():
        print(f"{part}: {microseconds:.1f} µs")
    print(", ".join(about.values()))
    print(f"the graph with a cold cache: {1e6 * timer_of(device)(launch):.1f} µs")
    if not options.overlapped:
        fast = swinfast.optimize(forward.plain, dtype=PRECISIONS[options.dtype])
        with torch.inference_mode(), tf32_setting(options.dtype):
            for _ in range(3):  # the second is captured
                fast(forward.images)
            returns, answers = of_the_host(lambda: fast(forward.images), torch.cuda.synchronize)
        print(f"a call returns after {returns:.1f} µs, and its answer is there after {answers:.1f} µs")
    return 0


def summary(rows: Sequence[dict]) -> dict[str, float]:
    """Microseconds from the first kernel's start to the last's end, and by kernel, the longest first."""
    kernels: dict[str, float] = {}
    for row in rows:
        kernels[row["kernel"]] = kernels.get(row["kernel"], 0.0) + row["time_us"]
    whole = max(row["start_us"] + row["time_us"] for row in rows)
    return {"forward": whole} | dict(sorted(kernels.items(), key=lambda one: -one[1]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.profile_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="swinv2_cr_tiny_ns_224", help="default: %(default)s")
    parser.add_argument("--batch", type=positive, default=1, help="default: %(default)s")
    parser.add_argument("--dtype", choices=PRECISIONS, default="float16", help="default: %(default)s")
    parser.add_argument("--overlapped", action="store_true", help="start each kernel before the one before it is done")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: bench/results/profile_<device>.csv")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
