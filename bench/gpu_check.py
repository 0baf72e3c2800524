"""What a first visit to a GPU should do, in the order of its worth and within a budget of time.

`python -m bench.gpu_check [--minutes 9] [--output FOLDER] [--steps NAME …]`

Each step gets its share of the time that is left, so what one does not need is there for the next. A step that is
missing, fails or runs out of time is named, the rest goes on, and what it had written by then is kept. In the folder
lie at most eight files: the summary, a log of all that was said, the results, and the table that tuning wrote. The exit
status is 1 where anything failed or was cut short.
"""

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from swinfast.kernels.configs import FOLDER
from swinfast.kernels.launch import arch_of

from bench import OUT_OF_TIME
from swinfast.measurements import provenance

ROOT = Path(__file__).parents[1]
GPU = torch.cuda.is_available()
PYTHON = (sys.executable, "-m")
GRACE = 15.0  # seconds before the end of its time that a step's script is told to stop by itself
LEAST = 0.05  # minutes that a step is started for
LAST_WORDS = 20.0  # seconds that a process has to end after it was interrupted
PATIENCE = 150  # seconds for one test
LARGEST_LOG = 12 << 20
WIDEST = 150  # columns of the summary
MODEL = "swinv2_cr_tiny_ns_224"
MODEL_OF_V2 = "swinv2_tiny_window16_256"
COMPOSITIONS = ("tables", "parts", "heads", "apart")  # of a block
EVERY_DTYPE = ("--dtypes", "float16", "bfloat16", "float32", "tf32")
NAMING = (  # tests as they end, and where those are that take long
    "-v", "-p", "bench.gpu_tests", "-p", "no:cacheprovider", "-p", "no:benchmark", "-rfE", "--tb=short",
    "--durations=10", "--durations-min=3", "-o", f"faulthandler_timeout={PATIENCE - 10}",
)  # fmt: skip
FAILED = re.compile(r"(\[gw\d+\] \[ *\d+%\] |tests/.+? )(FAILED|ERROR)\b")  # a test, as it ends

Command = Sequence[str]


class Visit(NamedTuple):
    """What the steps know of each other."""

    output: Path
    minutes: float  # that the step has
    tuned: bool = False  # whether the table is another than when the visit began


class Step(NamedTuple):
    """One step: its share of the time, its commands, one after the other, and lines of its end for the summary."""

    share: float
    commands: Callable[[Visit], list[Command]]
    lines: int = 1


class Outcome(NamedTuple):
    name: str
    state: str  # "ok", "FAILED", "out of time", "missing: …", "left out: …"
    seconds: float
    said: list[str]

    @property
    def passed(self) -> bool:
        return self.state == "ok" or self.state.startswith("left out")


class Missing(Exception):
    """A step has nothing to run here: said why."""


def _minutes(visit: Visit, grace: float = GRACE) -> tuple[str, str]:
    return "--minutes", f"{max(0.2, visit.minutes - grace / 60):.2f}"


def _environment(visit: Visit) -> list[Command]:
    facts = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
    smi = [("nvidia-smi", f"--query-gpu={facts}", "--format=csv")] if shutil.which("nvidia-smi") else []
    return [*smi, (*PYTHON, "bench.peaks")]


def _check(visit: Visit) -> list[Command]:
    """Every kernel at the shapes of real models, as the tables have it and in other compositions, in every dtype."""
    models = (MODEL, "swinv2_cr_tiny_384", MODEL_OF_V2, "--batch", "4") if GPU else ("small", "--batch", "1")
    command = (*PYTHON, "bench.kernels", "--check-only", "--forms", *COMPOSITIONS, "--model", *models)
    return [(*command, *(EVERY_DTYPE if GPU else ("--dtypes", "float16")), *_minutes(visit))]


def _sanitize(visit: Visit) -> list[Command]:
    script = (*PYTHON, "bench.sanitize", "--models", "padded", "small V2", "--dtypes", "float16", "bfloat16", "float32")
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not tool:
        raise Missing("no compute-sanitizer on the PATH")
    watched = [(tool, "--tool", one, "--error-exitcode", "9", *script) for one in ("memcheck", "racecheck")]
    return [(*script, "--compile"), *watched]


def _tests(visit: Visit) -> list[Command]:
    return [tests_on_a_gpu()]


def tests_on_a_gpu() -> Command:
    """Every kernel; and what has tests for a GPU: equality with timm, graphs, export. Mutants are for CPUs.

    In many processes where pytest-xdist is there; most of their time is compiling.
    """
    marked = [file for file in sorted(ROOT.glob("tests/test_*.py")) if "mark.gpu" in file.read_text(encoding="utf-8")]
    files = [*sorted(ROOT.glob("tests/kernels/test_*.py")), ROOT / "tests/test_triton_backend.py", *marked]
    command = [*PYTHON, "pytest", *NAMING, "-k", "not mutant", "-m", "not slow"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", str(PATIENCE), "--timeout-method", "thread"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(_processes()), "--dist", "worksteal"]
    return (*command, *(str(file.relative_to(ROOT)) for file in dict.fromkeys(files)))


def _processes() -> int:
    """As many as there are cores and, at 2 GB each, room on the GPU."""
    cores = max(1, (os.cpu_count() or 2) - 1)
    if not GPU or not shutil.which("nvidia-smi"):
        return cores
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    megabytes = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return max(1, min(cores, int(megabytes[0]) // 2048)) if megabytes and megabytes[0].isdigit() else cores


def _models(visit: Visit, file: str = "models.csv") -> list[Command]:
    """swinfast beside the plain model first: compiling the peers may take longer than there is."""
    options = ("--device", "cuda" if GPU else "cpu", *_minutes(visit), "--output", str(visit.output / file))
    command = (*PYTHON, "bench.models", "--models", MODEL, *options)
    if not GPU:
        return [(*command, "--dtypes", "float32", "--batch-sizes", "1", "--rounds", "2")]
    command = (*command, "--dtypes", "float16", "bfloat16", "--batch-sizes", "1", "32", "256")
    return [(*command, "--engines", "swinfast", "eager"), command]


def _models_again(visit: Visit) -> list[Command]:
    """The same with the tuned table, where tuning changed it."""
    if not visit.tuned:
        raise Missing("tuning changed no table")
    return _models(visit, "models_tuned.csv")


def _kernels(visit: Visit) -> list[Command]:
    size = ("--model", MODEL, "--batch", "256") if GPU else ()
    return [(*PYTHON, "bench.kernels", *size, *_minutes(visit), "--output", str(visit.output / "kernels.csv"))]


def _profile(visit: Visit) -> list[Command]:
    if not GPU:
        raise Missing("profiling needs a GPU")
    options = ("--model", MODEL, "--output", str(visit.output / "profile.csv"))
    return [(*PYTHON, "bench.profile_gpu", "--batch", size, *options) for size in ("1", "256")]


def _tune(visit: Visit) -> list[Command]:
    if not GPU:
        raise Missing("tuning needs a GPU")
    log, half = str(visit.output / "tune.jsonl"), visit._replace(minutes=visit.minutes / 2)
    options = ("--model", MODEL, "--resume", "--log", log, *_minutes(half, 3 * GRACE))  # a target is long
    return [(*PYTHON, "bench.tune", "--batch", size, *options) for size in ("256", "1")]


STEPS = {
    "environment": Step(0.06, _environment, 9),
    "check": Step(0.12, _check, 3),
    "tests": Step(0.38, _tests, 10),
    "sanitize": Step(0.18, _sanitize, 3),
    "models": Step(0.16, _models, 9),
    "kernels": Step(0.08, _kernels, 4),
    "profile": Step(0.06, _profile, 2),
    "tune": Step(0.40, _tune, 3),
    "models-again": Step(0.16, _models_again, 6),
}


def _table() -> Path:
    return FOLDER / f"{arch_of(torch.device('cuda', 0) if GPU else torch.device('cpu'))}.json"


def run_step(name: str, step: Step, visit: Visit, log: Path) -> Outcome:
    """Run a step's commands within its time; all they say goes to the log."""
    began = time.monotonic()
    deadline = began + 60 * visit.minutes
    start = log.stat().st_size
    states = []
    try:
        commands = step.commands(visit)
        for place, command in enumerate(commands):  # each an equal part of the time that is left
            left = (deadline - time.monotonic()) / (len(commands) - place)
            states.append(run_command(command, time.monotonic() + left, log))
    except Missing as missing:
        return Outcome(name, f"left out: {missing}", 0.0, [])
    except OSError as error:
        states.append(f"missing: {error}")
    with log.open("rb") as stream:
        stream.seek(start)
        text = stream.read().decode("utf-8", errors="replace")
    state = next((state for state in states if state != "ok"), "ok")
    if state == "out of time" and (failed := len(set(filter(FAILED.match, text.splitlines())))):
        state = f"out of time, {failed} failed"
    return Outcome(name, state, time.monotonic() - began, _end_of(text, step.lines))


def _end_of(text: str, count: int) -> list[str]:
    """The last lines, and before them what went wrong, in as many lines."""
    lines = [line.rstrip()[:WIDEST] for line in text.splitlines() if line.strip() and not line.startswith("==== ")]
    wrong = [line for line in lines[:-1] if line.startswith(("FAILED", "WRONG", "ERROR"))]
    wrong = (wrong or [line for line in lines[:-1] if FAILED.match(line)])[: count - 1]
    return [*wrong, *lines[-(count - len(wrong)) :]]


def run_command(command: Command, deadline: float, log: Path) -> str:
    """Run one command until a deadline (of time.monotonic): "ok", "FAILED" or "out of time".

    It runs in a process group of its own, and whatever of that is left at the end is killed.
    """
    if time.monotonic() > deadline:
        return "out of time"
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if "pytest" in command:
        environment |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        deadline -= LAST_WORDS  # in which it says what it found so far
    if "bench.sanitize" in command:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with log.open("ab") as out:
        out.write(f"==== {' '.join(command)}\n".encode())
        out.flush()
        process = subprocess.Popen(
            list(command), cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS)
            return "out of time"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {0: "ok", OUT_OF_TIME: "out of time"}.get(status, f"FAILED (exit status {status})")


def visit_gpu(names: Sequence[str], minutes: float, output: Path) -> list[Outcome]:
    """Run steps in their order; the summary is on disk after each."""
    deadline = time.monotonic() + 60 * minutes
    log = output / "log.txt"
    log.touch()
    table = _table()
    before = table.read_bytes() if table.exists() else b""
    tuned = False
    outcomes: list[Outcome] = []
    for place, name in enumerate(names):
        left = (deadline - time.monotonic()) / 60
        shares = [STEPS[one].share for one in names[place:]]
        if left < LEAST:
            outcomes.append(Outcome(name, "out of time: not started", 0.0, []))
        else:
            visit = Visit(output, left * shares[0] / sum(shares), tuned)
            outcomes.append(run_step(name, STEPS[name], visit, log))
        tuned = table.exists() and table.read_bytes() != before
        if tuned:
            shutil.copy(table, output / table.name)
        cut(log)
        (output / "summary.txt").write_text(summary(outcomes) + "\n", encoding="utf-8")
    return outcomes


def cut(log: Path) -> None:
    """Keep the beginning and the end of a log that grew too large."""
    if log.stat().st_size > LARGEST_LOG:
        text = log.read_bytes()
        log.write_bytes(text[: LARGEST_LOG // 4] + b"\n[cut]\n" + text[-LARGEST_LOG // 4 :])


def summary(outcomes: Sequence[Outcome]) -> str:
    """At most 60 lines: the machine, each step's state, and the end of what it said."""
    about = provenance(torch.device("cuda" if GPU else "cpu"), "")
    where = about["device"] if GPU else f"no GPU: the interpreter, and PyTorch on {about['device']}"
    lines = [f"{where}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}"]
    for one in outcomes:
        lines += [f"{one.name}: {one.state}, {one.seconds:.0f} s", *(f"    {line}" for line in one.said)]
    states = ", ".join(f"{one.name} {one.state}" for one in outcomes if not one.passed)
    return "\n".join([*lines[:58], f"NOT WELL: {states}"[:WIDEST] if states else "all is well"])


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are killed, too
    options.output.mkdir(parents=True, exist_ok=True)
    names = [name for name in STEPS if name in options.steps]
    outcomes = visit_gpu(names, options.minutes, options.output)
    print(summary(outcomes))
    return int(not all(one.passed for one in outcomes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="folder (default: %(default)s)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="default: all, in this order")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
