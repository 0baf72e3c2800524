"""``python -m swinfast.kernels``: compile every kernel for every shape and architecture, and check what came out."""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tabulate import tabulate

from .configs import tile
from .gate import ARCHS, Job, Measured, jobs_of, measure, problems, programs_per_unit
from .launch import INTERPRETED
from .shapes import PRECISIONS, VARIANTS, launches

HEADINGS = ("kernel", "shape", "precision", "arch", "tile", "registers", "spilled", "shared", "per SM", "product")
FEW = 4  # jobs, which take less than processes to start
EPILOG = """\
Nothing here needs a GPU: Triton compiles ahead of time. One row is printed for each kernel: the bytes a thread
spills, the bytes of shared memory a program needs, how many programs fit a multiprocessor at once, and the matrix
instruction that it multiplies with. The exit status is 1 where a configuration spills, does not fit the
architecture or lost its matrix instructions. Results are kept in {cache}, so that only what changed is compiled again.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the gate; the exit status."""
    options = _parser().parse_args(argv)
    if INTERPRETED:
        print("TRITON_INTERPRET is set: unset it, the interpreter compiles nothing", file=sys.stderr)
        return 2
    began = time.monotonic()
    jobs = find_jobs(
        options.arch or list(ARCHS), options.precision or list(PRECISIONS), options.variant or list(VARIANTS)
    )
    if options.subset:
        jobs = subset(jobs)
    measured = measure_all(jobs, cache_file())
    rows = [_row(job, measured[job.key]) for job in jobs]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(tabulate([[row[name] for name in HEADINGS] for row in rows], HEADINGS, tablefmt="plain"))
    refused = [row for row in rows if row["problems"]]
    for row in refused:
        where = f"{row['kernel']} ({row['shape']}), {row['precision']}, {row['arch']}, {row['tile']}"
        print(f"REFUSED {where}: {'; '.join(row['problems'])}")
    print(f"{len(rows)} kernels, {len(refused)} refused, {time.monotonic() - began:.0f} s")
    return 1 if refused else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m swinfast.kernels",
        description="Compile every kernel for every shape, precision and architecture, and check what came out.",
        epilog=EPILOG.format(cache=cache_file()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, choices, what in (
        ("arch", list(ARCHS), "architectures"),
        ("precision", list(PRECISIONS), "precisions"),
        ("variant", list(VARIANTS), "models"),
    ):
        parser.add_argument(
            f"--{name}", nargs="+", choices=choices, metavar=name.upper(), help=f"{what}: {', '.join(choices)} (all)"
        )
    parser.add_argument(
        "--subset", action="store_true", help="one shape of each kernel for each architecture and precision"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to a file")
    return parser


def find_jobs(archs: Sequence[str], precisions: Sequence[str], variants: Sequence[str]) -> list[Job]:
    """What is to be compiled, each thing once."""
    jobs: list[Job] = []
    for arch in archs:
        recorded = ((one, precision) for precision in precisions for one in launches(arch, precision, variants))
        jobs += jobs_of(recorded, arch)
    return jobs


def subset(jobs: Sequence[Job]) -> list[Job]:
    """One shape, the last and mostly the largest, of each kernel on each architecture in each precision."""
    return list({(job.arch, job.kernel, job.precision): job for job in jobs}.values())


def cache_file() -> Path:
    """Where results are kept between runs."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder, "swinfast", "gate.json")


def measure_all(jobs: Sequence[Job], file: Path) -> dict[str, Measured]:
    """Results by the keys of the jobs: from the file where it has them, or compiled in as many processes as cores."""
    known = _load(file)
    missing = [job for job in jobs if job.key not in known]
    for done, (job, result) in enumerate(zip(missing, _measured(missing), strict=True), 1):
        known[job.key] = result
        if done % 200 == 0 or done == len(missing):
            print(f"compiled {done} of {len(missing)}", file=sys.stderr)
            _save(file, known)
    return known


def _measured(jobs: Sequence[Job]) -> Iterator[Measured]:
    if len(jobs) <= FEW:
        yield from map(measure, jobs)
        return
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(measure, jobs, chunksize=4)


def _load(file: Path) -> dict[str, Measured]:
    try:
        return {key: Measured(*values) for key, values in json.loads(file.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError):  # none yet, or another version's
        return {}


def _save(file: Path, results: dict[str, Measured]) -> None:
    """Replace the file at once, with what another run has put there meanwhile."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(_load(file) | results), encoding="utf-8")
    draft.replace(file)


def _row(job: Job, measured: Measured) -> dict:
    return {
        "kernel": job.kernel,
        "shape": job.shape,
        "precision": job.precision,
        "arch": job.arch,
        "tile": tile(job.config),
        "registers": measured.registers,
        "spilled": measured.spilled,
        "shared": measured.shared,
        "per SM": programs_per_unit(job, measured),
        "product": measured.product or "-",
        "problems": problems(job, measured),
    }


if __name__ == "__main__":
    raise SystemExit(main())
