"""Fills Triton's cache with the kernels that another machine's GPU will launch. No GPU is needed.

`python -m bench.precompile --arch sm_90 [--models NAME …] [--batch-sizes 1 256] [--dtypes float16 …] [--forms tables …]
[--candidates N] [--tests]`

Compiling is most of the time of a first run. Copy the cache (TRITON_CACHE_DIR) to the same path on a machine with the
same versions of Triton and of this project, and nothing that was compiled here is compiled there. Triton keeps whole
paths in it, so at another path it is worth nothing.
"""

import argparse
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported, also where there is no GPU

import torch
from swinfast.kernels.gate import ARCHS, compile_ahead, jobs_of
from swinfast.kernels.launch import Launch
from swinfast.kernels.shapes import PRECISIONS
from tqdm import tqdm

from bench.candidates import candidates
from bench.cases import first_launches, launch_of, model_named
from bench.gpu_check import tests_on_a_gpu
from bench.kernels import COMPOSITIONS, KERNELS
from bench.recorder import launches_of
from bench.targets import find_targets
from swinfast.arguments import positive


def launches(options: argparse.Namespace) -> Iterator[tuple[Launch, str]]:
    """What first forwards launch, and the candidates for it that bench.tune would try; each with its precision."""
    for batch in options.batch_sizes:
        for name, precision, form in itertools.product(options.models, options.dtypes, options.forms):
            choice = COMPOSITIONS[form]
            for launched in first_launches(model_named(name), batch, precision, options.arch, choice):
                yield launched, precision
        if options.candidates:
            yield from _tried(options, batch)
    if options.tests:
        for launched in launches_of((*tests_on_a_gpu(), "-qq")):
            yield launched, "tests"


def _tried(options: argparse.Namespace, batch: int) -> Iterator[tuple[Launch, str]]:
    for target in find_targets(options.models, batch, options.dtypes, options.arch, KERNELS):
        if target.in_use:
            _, *others = candidates(
                target.kernel, dict(target.sizes), target.precision, target.present, options.arch, options.candidates
            )
            for config, case in itertools.product(others, target.cases):
                yield launch_of(case, config, options.arch), case.precision


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    began, failed = time.monotonic(), 0
    with torch.no_grad():
        jobs = jobs_of(launches(options), options.arch)
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        for job, measured in zip(jobs, tqdm(pool.map(compile_ahead, jobs), total=len(jobs), disable=None), strict=True):
            if measured.error:
                failed += 1
                print(f"{job.kernel} ({job.shape}): {measured.error}")
    print(f"{len(jobs)} kernels for {options.arch}, {failed} do not compile, {time.monotonic() - began:.0f} s")
    return int(bool(failed) and not options.candidates)  # a candidate may fail


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.precompile", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHS, default="sm_90", help="default: %(default)s")
    parser.add_argument("--models", nargs="+", metavar="NAME", default=["swinv2_cr_tiny_ns_224"])
    parser.add_argument(
        "--batch-sizes", nargs="+", type=positive, metavar="N", default=[1, 32, 256], help="of the forwards"
    )
    parser.add_argument("--dtypes", nargs="+", choices=PRECISIONS, default=["float16"])
    parser.add_argument("--forms", nargs="+", choices=COMPOSITIONS, default=["tables"], help="compositions of a block")
    parser.add_argument(
        "--candidates", type=positive, default=0, help="of bench.tune too, so many a kernel (default: none)"
    )
    parser.add_argument("--tests", action="store_true", help="what bench.gpu_check's tests launch, too (they run here)")
    parser.add_argument("--processes", type=positive, metavar="N", help="default: as many as there are cores")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
