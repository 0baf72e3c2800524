"""Where the time of a forward goes on a CPU, by operator, beside its floor. `python -m bench.profile_cpu --help`.

Two times come from the clock, interleaved: of the whole forward, and of its matrix products alone. The operators' times
come from PyTorch's profiler in runs of their own, and are given as shares, since profiling slows a forward down.
Appends rows to a csv under bench/results and prints them as a table.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile, schedule

import swinfast
from bench import RESULTS
from bench.peers import import_timm
from bench.peers_cpu import PRODUCTS, products
from swinfast.arguments import positive
from swinfast.benchmark import compare, randomise
from swinfast.measurements import DTYPES, append, check_header, provenance

COLUMNS = (
    "model",
    "dtype",
    "batch",
    "part",
    "ms_per_image",
    "share",
    "calls",
    "rounds",
    "device",
    "torch",
    "commit",
    "date",
)
WARMUP = 3  # forwards: the first that are profiled take many times as long
WHOLE, REST = "whole forward", "everything else"
PARTS = {  # what operators do in a forward of swinfast
    "mkldnn::_linear_pointwise": "linear layers, GELU in them",
    "aten::bmm": "products of attention",
    "aten::addmm": "classifier",
    "aten::native_layer_norm": "LayerNorm",
    "aten::copy_": "heads apart and together, patches, conversions",
    "aten::index_select": "token order",
    "aten::addcmul": "position bias",
    "aten::exp2_": "exponentials",
    "aten::sum": "sums of exponentials and of k",
    "aten::sub_": "k centred",
    "aten::linalg_vector_norm": "lengths of q and k",
    "aten::mul_": "q and k by lengths, exponentials by sums",
    "aten::add_": "residual",
}


def measure(fast: torch.nn.Module, plain: torch.nn.Module, dtype: torch.dtype, batch: int, rounds: int) -> list[dict]:
    """Rows of the whole forward, of its products, and of each kind of operator by its share."""
    images = torch.randn(batch, 3, *plain.img_size).to(dtype)
    timings = compare({WHOLE: lambda: fast(images), PRODUCTS: products(plain, dtype, batch)}, rounds)
    whole = timings[WHOLE].median
    rows = [row(part, timing.median / batch, timing.median / whole) for part, timing in timings.items()]
    begin = schedule(wait=0, warmup=WARMUP, active=rounds)
    with (
        torch.inference_mode(),
        profile(activities=[ProfilerActivity.CPU], schedule=begin, acc_events=True) as profiler,
    ):
        for _ in range(WARMUP + rounds):
            fast(images)
            profiler.step()
    spent: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        if event.key.startswith("ProfilerStep"):
            continue
        part = PARTS.get(event.key, REST)
        time, calls = spent.get(part, (0.0, 0))
        spent[part] = time + event.self_cpu_time_total, calls + event.count
    total = sum(time for time, _ in spent.values())
    for part, (time, calls) in sorted(spent.items(), key=lambda item: (item[0] == REST, -item[1][0])):
        rows.append(row(part, whole / batch * time / total, time / total) | {"calls": calls // rounds})
    return rows


def row(part: str, seconds: float, share: float) -> dict:
    return {"part": part, "ms_per_image": round(1e3 * seconds, 3), "share": round(share, 4)}


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    check_header(options.output, COLUMNS)
    plain = randomise(import_timm().create_model(options.model)).eval()
    about = provenance(torch.device("cpu"), "measured")
    shared = {"model": options.model, "rounds": options.rounds} | {n: about[n] for n in COLUMNS if n in about}
    for name in options.dtypes:
        fast = swinfast.optimize(plain, dtype=DTYPES[name])
        for batch in options.batch_sizes:
            rows = measure(fast, plain, DTYPES[name], batch, options.rounds)
            append(options.output, *(shared | {"dtype": name, "batch": batch} | row for row in rows), columns=COLUMNS)
            print(f"\n{options.model}, {name}, batch {batch}, {shared['device']}")
            lines = [(row["part"], row["ms_per_image"], f"{row['share']:.1%}", row.get("calls", "")) for row in rows]
            print(tabulate(lines, headers=("part", "ms per image", "share", "calls"), tablefmt="github"), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="swinv2_cr_tiny_ns_224")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--batch-sizes", nargs="+", type=positive, default=[1, 8])
    parser.add_argument(
        "--rounds", type=positive, default=15, help="forwards timed and profiled (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "profile_cpu.csv")
    return parser


if __name__ == "__main__":
    main()
