"""The example scripts of the three ways to run batch inference."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def run(*command: object) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def are_right(names: list[str], labels: list[str]) -> bool:
    """The first word of an image's name is what it shows."""
    return len(names) == 20 and all(Path(n).name.split("_")[0] == label for n, label in zip(names, labels, strict=True))


@pytest.mark.parametrize(
    "command", [[sys.executable, "examples/batch_library.py"], ["sh", "examples/batch_command.sh"]]
)
def test_one_machine(command, tmp_path):
    run(*command, tmp_path)
    with (tmp_path / "classes.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert are_right([row["filename"] for row in rows], [row["top1_label"] for row in rows])
    assert np.load(tmp_path / "embeddings.npy", mmap_mode="r").shape == (20, 96)
    assert np.load(tmp_path / "features.npy", mmap_mode="r").shape == (20, 96, 6, 6)


@pytest.mark.slow
def test_ray(tmp_path):
    pytest.importorskip("ray")
    parquet = pytest.importorskip("pyarrow.parquet")
    out = run(sys.executable, "examples/batch_ray.py", tmp_path / "predictions")
    assert "Summary(images=20, failures=0)" in out
    table = parquet.read_table(tmp_path / "predictions")
    assert are_right(table["filename"].to_pylist(), table["top1_label"].to_pylist())
    assert out.count("'top1_label'") == 3
