"""The script for a first visit to a GPU, tried without one, on steps that stand in for its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu_check, kernels, profile_gpu, sanitize, tune
from bench.gpu_check import STEPS, Missing, Step, Visit

PARSERS = {
    "bench.kernels": kernels._parser,
    "bench.profile_gpu": profile_gpu._parser,
    "bench.sanitize": sanitize._parser,
    "bench.tune": tune._parser,
}
SAYS = "print('all of it'); print('last words')"
FAILS = "import sys; print('FAILED test_one'); print('noise'); print('1 failed'); sys.exit(3)"
WAITS = "import time; print('began', flush=True); time.sleep(60)"
HAS_A_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def step(*scripts: str, share: float = 1.0, lines: int = 2) -> Step:
    return Step(share, lambda visit: [(sys.executable, "-c", script) for script in scripts], lines)


@pytest.fixture
def check(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "LAST_WORDS", 0.5)
    monkeypatch.setattr(gpu_check, "FOLDER", tmp_path)

    def run(minutes: float = 1.0, **steps: Step) -> tuple[int, str, str]:
        monkeypatch.setattr(gpu_check, "STEPS", steps)
        output = tmp_path / "out"
        status = gpu_check.main(["--output", str(output), "--minutes", str(minutes), "--steps", *steps])
        return status, (output / "summary.txt").read_text(encoding="utf-8"), (output / "log.txt").read_text()

    return run


def test_all_is_well(check, capsys):
    status, summary, log = check(one=step(SAYS, lines=1), two=step(SAYS, SAYS))
    assert status == 0
    assert "one: ok" in summary and "two: ok" in summary
    assert summary.count("last words") == 2 and summary.count("all of it") == 1
    assert log.count("\nall of it") == 3
    assert summary.strip().endswith("all is well")
    assert capsys.readouterr().out == summary


def test_failures_are_named_and_the_rest_goes_on(check):
    status, summary, _ = check(one=step(FAILS, SAYS), two=step(SAYS))
    assert status == 1
    assert "one: FAILED (exit status 3)" in summary
    assert "    FAILED test_one" in summary  # though it is not among the last lines
    assert "two: ok" in summary
    assert "NOT WELL: one FAILED" in summary


def test_time_runs_out(check):
    status, summary, log = check(minutes=0.15, one=step(WAITS, share=0.1), two=step(SAYS, share=0.9))
    assert status == 1
    assert "one: out of time" in summary
    assert "began" in log
    assert "two: ok" in summary


def test_a_script_that_stops_in_time(check):
    status, summary, _ = check(one=step("import sys; print('3 left'); sys.exit(75)"), two=step(SAYS))
    assert status == 1
    assert "one: out of time" in summary and "3 left" in summary and "two: ok" in summary


def test_no_time_is_left(check):
    status, summary, _ = check(minutes=0.01, one=step(SAYS))
    assert status == 1
    assert "one: out of time: not started" in summary


def test_children_of_children_die(check):
    _, _, log = check(minutes=0.06, one=step(HAS_A_CHILD))
    child = next(int(line) for line in log.splitlines() if line.isdigit())
    deadline = time.monotonic() + 10
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(child)


def _is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_is_missing_is_left_out(check):
    def nothing(visit):
        raise Missing("no such tool")

    unknown = Step(1.0, lambda visit: [("/no/such/program",)], 1)
    status, summary, _ = check(one=Step(1.0, nothing, 1), two=unknown, three=step(SAYS))
    assert status == 1
    assert "one: left out: no such tool" in summary
    assert "two: missing: " in summary and "/no/such/program" in summary
    assert "three: ok" in summary
    assert "NOT WELL: two missing" in summary


def test_a_table_that_changed_is_kept(check, tmp_path):
    table = gpu_check.FOLDER / gpu_check._table().name
    status, _, _ = check(one=step(f"open({str(table)!r}, 'w').write('[]')"))
    assert status == 0
    assert (tmp_path / "out" / table.name).read_text() == "[]"


def test_models_again_is_for_what_this_visit_tuned(check, tmp_path):
    """A table that an earlier visit left in the folder is none of it."""
    again = Step(1.0, lambda visit: STEPS["models-again"].commands(visit) and [], 1)
    table = gpu_check.FOLDER / gpu_check._table().name
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / table.name).touch()
    _, summary, _ = check(tune=step(SAYS), again=again)
    assert "again: left out: tuning changed no table" in summary
    _, summary, _ = check(tune=step(f"open({str(table)!r}, 'w').write('[]')"), again=again)
    assert "again: ok" in summary


def test_an_endless_log_is_cut(check, monkeypatch):
    monkeypatch.setattr(gpu_check, "LARGEST_LOG", 4000)
    _, _, log = check(one=step("print('first'); print('x' * 20000); print('last')"))
    assert len(log) <= 4100
    assert "first" in log and "last" in log


def test_summary_fits_a_screen(check):
    long = "print(*range(200), sep='\\n'); print('y' * 500)"
    _, summary, _ = check(**{f"step{n}": step(long, share=0.1, lines=40) for n in range(3)})
    lines = summary.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 160
    assert sum(step.lines + 1 for step in STEPS.values()) + 2 <= 60


@pytest.fixture
def options(monkeypatch):
    monkeypatch.setattr(gpu_check, "_processes", lambda: 15)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/bin/{Path(name).name}")


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_commands(name, gpu, tmp_path, options, monkeypatch):
    """Each step runs modules and files that exist, with options that they have, within its time."""
    monkeypatch.setattr(gpu_check, "GPU", gpu)
    if name in ("tune", "profile") and not gpu:
        with pytest.raises(Missing, match="needs a GPU"):
            STEPS[name].commands(Visit(tmp_path, 2.0))
        return
    commands = STEPS[name].commands(Visit(tmp_path, 2.0, tuned=True))
    assert commands
    for command in commands:
        assert all((gpu_check.ROOT / word).exists() for word in command if word.startswith("tests/"))
        if "--minutes" in command:
            assert 0 < float(command[command.index("--minutes") + 1]) < 2.0
        if sys.executable in command:
            module, *rest = command[command.index("-m") + 1 :]
            if module in PARSERS:
                PARSERS[module]().parse_args(rest)
            else:
                assert module in ("pytest", "bench.models", "bench.peaks")


def test_tests_for_a_gpu_are_found():
    (command,) = STEPS["tests"].commands(Visit(Path(), 1.0))
    assert {"tests/test_triton_backend.py", "tests/test_gpu.py"} <= set(command)
    assert {"tests/kernels/test_window_attention.py", "tests/kernels/test_mlp_block.py"} <= set(command)
    assert "not mutant" in command


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_tests_that_are_cut_short_have_said_what_failed(check, monkeypatch, tmp_path, processes):
    """And why: a run that is killed writes no summary."""
    (tmp_path / "tests").mkdir()
    file = tmp_path / "tests" / "test_one.py"
    file.write_text(
        "import time, signal\n"
        "def test_wrong():\n    assert 1 + 1 == 3\n"
        "def test_long():\n    signal.signal(signal.SIGINT, signal.SIG_IGN)\n    time.sleep(60)\n"
    )
    command = [*gpu_check.PYTHON, "pytest", *gpu_check.NAMING, str(file)]
    if processes:
        pytest.importorskip("xdist")
        command += ["-n", str(processes)]
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    status, summary, log = check(minutes=0.5, tests=Step(1.0, lambda visit: [command], 3))
    assert status == 1
    assert "tests: out of time, 1 failed" in summary
    assert "test_one.py::test_wrong" in summary
    assert "WHY test_one.py::test_wrong (call)" in log.replace("tests/", "") and "assert (1 + 1) == 3" in log


LOSES = """
import pytest, torch

def lost():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_one():
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, lost

def test_two():
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 1])
def test_a_lost_context_ends_a_process(tmp_path, processes):
    """The test that lost it is named with the error, and no other fails: another process takes the rest."""
    command = [*gpu_check.PYTHON, "pytest", *gpu_check.NAMING, str(tmp_path / "test_lost.py")]
    if processes:
        pytest.importorskip("xdist")
        command += ["-n", str(processes)]
    (tmp_path / "test_lost.py").write_text(LOSES)
    environment = os.environ | {"PYTHONPATH": str(gpu_check.ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert "the CUDA context is lost after test_lost.py::test_one: CUDA error: an illegal memory" in said
    assert "test_two" in said if processes else "not torn down" not in said
    assert done.returncode != 0


def test_files_that_come_back(options, monkeypatch):
    """At most eight: a device that others lend may return no more."""
    monkeypatch.setattr(gpu_check, "GPU", True)
    monkeypatch.setattr(gpu_check, "_table", lambda: Path("sm_90.json"))
    names = {"summary.txt", "log.txt", gpu_check._table().name}
    for name in ("models", "kernels", "profile"):
        (*_, command) = STEPS[name].commands(Visit(Path("folder"), 1.0))
        names |= {os.path.basename(word) for word in command if word.startswith("folder")}  # noqa: PTH119
    assert len(names | {"models_tuned.csv", "tune.jsonl"}) == 8
