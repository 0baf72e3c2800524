"""What a first visit to a GPU should do, in the order of its worth and within a budget of time.

`python -m bench.gpu_check [--minutes 9] [--output FOLDER]`

1. The tests of the kernels, of the Triton stage and of models, with the real compiler: a process for each file, all at
   once, since most of their time is compiling. Mutants are left to CPUs.
2. Whole models beside timm's eager ones, at batch 1, 32 and 256, in float16 and bfloat16.

Everything that was said is in tests.txt and models.csv, and a summary in summary.txt; the exit status is 1 where
anything failed or ran out of time.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton

ROOT = Path(__file__).parents[1]
TESTS = (
    *sorted(ROOT.glob("tests/kernels/test_*.py")),
    *map(ROOT.joinpath, ("tests/test_triton_backend.py", "tests/test_gpu.py")),
)


class Outcome(NamedTuple):
    name: str
    passed: bool
    said: str  # the last line
    seconds: float


def run_tests(files: Sequence[Path], deadline: float, log: Path) -> list[Outcome]:
    """Run each test file in its own process, all at once, until the deadline (of time.monotonic)."""
    began = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not mutants"]
    running = {}
    for file in files:
        out = log.with_name(f".{file.stem}.txt")
        running[file] = (
            out,
            subprocess.Popen(
                [*command, str(file)], cwd=ROOT, env=environment, stdout=out.open("w"), stderr=subprocess.STDOUT
            ),
        )
    outcomes = []
    for file, (out, process) in running.items():
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        text = out.read_text(encoding="utf-8", errors="replace")
        out.unlink()
        with log.open("a", encoding="utf-8") as stream:
            stream.write(f"==== {file.name}\n{text}\n")
        lines = text.strip().splitlines()
        said = lines[-1] if process.returncode >= 0 and lines else "out of time"
        outcomes.append(Outcome(file.name, process.returncode in (0, 5), said, time.monotonic() - began))
    return outcomes


def run_models(deadline: float, output: Path) -> Outcome:
    """Whole models, until the deadline; the rows that are done by then are kept."""
    began = time.monotonic()
    gpu = torch.cuda.is_available()
    sizes = ["--batch-sizes", *(("1", "32", "256") if gpu else ("1",)), "--rounds", "30" if gpu else "2"]
    dtypes = ["--dtypes", *(("float16", "bfloat16") if gpu else ("float32",))]
    command = [sys.executable, "-m", "bench.models", *sizes, *dtypes, "--output", str(output)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, deadline - time.monotonic())
        )
        lines = (done.stdout + done.stderr).strip().splitlines()
        return Outcome("bench.models", done.returncode == 0, lines[-1] if lines else "", time.monotonic() - began)
    except subprocess.TimeoutExpired:
        return Outcome("bench.models", False, "out of time", time.monotonic() - began)


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    deadline = time.monotonic() + 60 * options.minutes
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / "tests.txt"
    log.unlink(missing_ok=True)
    outcomes = run_tests(options.tests, deadline, log)
    outcomes.append(run_models(deadline, options.output / "models.csv"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: the interpreter, and PyTorch"
    lines = [f"{device}, torch {torch.__version__}, triton {triton.__version__}"]
    lines += [f"{'ok  ' if one.passed else 'FAIL'} {one.name}, {one.seconds:.0f} s: {one.said}" for one in outcomes]
    summary = "\n".join(lines)
    (options.output / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    print(summary)
    return int(not all(one.passed for one in outcomes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="folder (default: %(default)s)")
    parser.add_argument("--tests", type=Path, nargs="+", default=TESTS, help="test files (default: all of the kernels)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
