"""Whole models: swinfast beside timm's, as it is and compiled, interleaved. `python -m bench.models --help`.

Appends a row for each engine, model, dtype and batch size to a csv under bench/results as soon as it is measured, with
the error of its answers. A wrong answer has no speed: swinfast must pass swinfast.verify (exit status 1 if it does
not), a peer whose answers are far off is left out, and so is one that fails; each is named with the reason. Where
time ran out before all runs, the exit status is 75.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from bench import OUT_OF_TIME, RESULTS
from bench.peers import ENGINES, engines_named, import_timm
from swinfast.arguments import positive
from swinfast.benchmark import describe_device, randomise
from swinfast.engines import Engine, WrongAnswer, measure
from swinfast.measurements import DTYPES, append, check_header, commit_of_this, rows_of
from swinfast.pipeline import resolve_device
from swinfast.torch_linear import has_native_bfloat16

CORE_ENGINES = ("swinfast", "eager", "compile")
CORE_SIZES = (256, 1, 32)


class Defaults(NamedTuple):
    """What is measured where nothing else is asked for, the most valuable first."""

    dtypes: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    engines: tuple[str, ...]
    rounds: int
    minutes: float | None


GPU = Defaults(("float16", "bfloat16", "float32"), (256, 1, 32, 8, 128), ENGINES, 15, None)
CPU = Defaults(("float32", "bfloat16"), (1, 8, 32), (*CORE_ENGINES, "sdpa", "vit"), 7, 8.0)


class Task(NamedTuple):
    """One interleaved run."""

    model: str
    dtype: str
    batch: int
    engines: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.model} {self.dtype} batch {self.batch} ({', '.join(self.engines)})"


def tasks_in_order(
    models: Sequence[str], dtypes: Sequence[str], sizes: Sequence[int], engines: Sequence[str], two_passes: bool
) -> list[Task]:
    """All runs, the most valuable first: by model, the core batch sizes before the others, by dtype.

    With two passes each dtype's sizes are measured with the core engines first, so that these are done if time runs
    out, and once more with all of them, since only engines of one run compare.
    """
    core = tuple(key for key in engines if key in CORE_ENGINES)
    passes = [core, tuple(engines)] if two_passes and core and len(core) < len(engines) else [tuple(engines)]
    sizes = sorted(sizes, key=lambda size: CORE_SIZES.index(size) if size in CORE_SIZES else len(CORE_SIZES))
    groups = ([size for size in sizes if size in CORE_SIZES], [size for size in sizes if size not in CORE_SIZES])
    return [
        Task(model, dtype, size, chosen)
        for model in models
        for group in groups
        for dtype in dtypes
        for chosen in passes
        for size in group
    ]


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    device = resolve_device(options.device)
    options = _with_defaults(options, device)
    check_header(options.output)
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    two_passes = device.type == "cuda"  # where tuning the compiled peers takes minutes
    tasks = tasks_in_order(options.models, options.dtypes, options.batch_sizes, options.engines, two_passes)
    print(f"{describe_device(device)}, PyTorch {torch.__version__}, {commit_of_this()}; {len(tasks)} runs", flush=True)
    status, model = 0, None
    for number, task in enumerate(tasks):
        if deadline is not None and time.monotonic() > deadline:
            print(f"out of time, left out: {'; '.join(map(str, tasks[number:]))}")
            return status or OUT_OF_TIME
        if model is None or model[0] != task.model:
            model = None  # before the next is made
            model = task.model, randomise(import_timm().create_model(task.model)).eval().to(device)
        engines = engines_named(task.engines, task.model, device)
        for line in run(task, engines, model[1], device, options.rounds, options.output):
            status |= line.startswith("swinfast: ")
            print(f"{task.model} {task.dtype} batch {task.batch}, {line}", flush=True)
    return status


def run(
    task: Task, engines: Sequence[Engine], plain: nn.Module, device: torch.device, rounds: int, output: Path
) -> Iterator[str]:
    """Measure and write one task; a line for each engine, "NAME: …" for one that is left out."""
    dtype = DTYPES[task.dtype]
    try:
        comparison = measure(plain, engines, dtype, task.batch, device, rounds)
    except WrongAnswer as error:
        yield f"swinfast: {error}"
        return
    for row in rows_of(comparison, task.model, dtype, task.batch, device, rounds):
        append(output, row)
        name = row["engine"] if row["model"] == task.model else f"{row['model']} {row['engine']}"
        answers = f", error {row['rel_error']}, top-1 {row['top1_agreement']:.1%}" if "rel_error" in row else ""
        memory = f", {row['peak_memory']} MB" if "peak_memory" in row else ""
        yield (
            f"{name}, {row['infer_samples_per_sec']} images/s, {row['infer_step_time']} ms (p95 "
            f"{row['infer_step_time_p95']}){answers}{memory}{row['source'].removeprefix('measured')}"
        )
    for name, reason in comparison.left_out.items():
        yield f"{name}: left out: {reason}"


def _with_defaults(options: argparse.Namespace, device: torch.device) -> argparse.Namespace:
    defaults = GPU if device.type == "cuda" else CPU
    if device.type == "cpu" and not has_native_bfloat16():
        defaults = defaults._replace(dtypes=("float32",))  # emulated, an eager model would take all of the time
    for name in Defaults._fields:
        if getattr(options, name) is None:
            setattr(options, name, getattr(defaults, name))
    if options.output is None:
        options.output = RESULTS / f"{device.type.replace('cuda', 'gpu')}.csv"
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", default=["swinv2_cr_tiny_ns_224"], help="timm's names (default: %(default)s)")
    add("--dtypes", nargs="+", choices=DTYPES, help=f"default: {' '.join(GPU.dtypes)}; CPU: {' '.join(CPU.dtypes)}")
    sizes = " or ".join(" ".join(map(str, defaults.batch_sizes)) for defaults in (GPU, CPU))
    add("--batch-sizes", nargs="+", type=positive, metavar="N", help=f"default: {sizes} on a CPU")
    add("--engines", nargs="+", choices=ENGINES, help=f"default: all; CPU: {' '.join(CPU.engines)}")
    rounds = f"default: {GPU.rounds}; CPU: {CPU.rounds}"
    add("--rounds", type=positive, metavar="N", help=f"turns of each engine, each of many calls on a GPU ({rounds})")
    minutes = f"begin no run later than this (default: no limit; CPU: {CPU.minutes:.0f})"
    add("--minutes", type=float, metavar="N", help=minutes)
    add("--device", default="auto", help="cpu, cuda, cuda:1, … (default: a GPU where there is one)")
    add("--output", type=Path, metavar="FILE", help="default: bench/results/gpu.csv or cpu.csv")
    return parser


if __name__ == "__main__":
    sys.exit(main())
