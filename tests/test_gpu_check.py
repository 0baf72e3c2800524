"""The script for a first visit to a GPU, tried without one."""

from pathlib import Path

import pytest

from bench import gpu_check

FAILING = "def test_wrong():\n    assert False\n"
PASSING = "def test_right():\n    pass\n\n\ndef test_mutants():\n    assert False\n"
ENDLESS = "import time\n\n\ndef test_slow():\n    time.sleep(60)\n"


@pytest.fixture
def check(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "run_models", lambda deadline, output: gpu_check.Outcome("models", True, "", 0.0))

    def run(*texts: str, minutes: float = 1.0) -> tuple[int, str, str]:
        files = [tmp_path / f"test_{number}.py" for number in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            file.write_text(text, encoding="utf-8")
        output = tmp_path / "out"
        arguments = ["--output", str(output), "--minutes", str(minutes), "--tests", *map(str, files)]
        status = gpu_check.main(arguments)
        return status, (output / "summary.txt").read_text(encoding="utf-8"), (output / "tests.txt").read_text()

    return run


def test_all_is_well(check):
    status, summary, log = check(PASSING)
    assert status == 0
    assert "ok   test_0.py" in summary
    assert "1 passed, 1 deselected" in log  # mutants are left out


def test_failures_are_named(check):
    status, summary, log = check(PASSING, FAILING)
    assert status == 1
    assert "ok   test_0.py" in summary
    assert "FAIL test_1.py" in summary
    assert "1 failed" in summary
    assert "assert False" in log


def test_time_runs_out(check):
    status, summary, _ = check(ENDLESS, minutes=0.03)
    assert status == 1
    assert "FAIL test_0.py" in summary
    assert "out of time" in summary


def test_the_tests_exist():
    names = {file.name for file in gpu_check.TESTS}
    assert {"test_window_attention.py", "test_mlp_block.py", "test_triton_backend.py", "test_gpu.py"} <= names
    assert all(Path(file).exists() for file in gpu_check.TESTS)
