"""What is written of a measurement: counts, columns, files that are only added to."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import small_model_args

import swinfast
from bench.peers import VIT
from swinfast.benchmark import Timing, randomise
from swinfast.counts import counts
from swinfast.engines import Comparison, Measurement
from swinfast.measurements import COLUMNS, append, commit_of_this, driver_of, row_of, rows_of, version_of

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
# GMACs and MActs as timm publishes them (its results/benchmark-infer-*.csv)
PUBLISHED = {
    "swinv2_cr_tiny_ns_224": (4.66, 28.45),
    "swinv2_cr_small_224": (9.07, 50.27),
    VIT: (4.61, 11.95),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_that_timm_publishes(timm, name):
    model = timm.create_model(name).eval()
    assert tuple(round(value, 2) for value in counts(model, (3, 224, 224))) == PUBLISHED[name]
    if name != VIT:
        assert counts(swinfast.create_model(name).eval(), (3, 224, 224)) == counts(model, (3, 224, 224))


def test_counts_of_known_layers():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 2, stride=2), torch.nn.Flatten(2), torch.nn.Linear(6, 5), torch.nn.LayerNorm(5)
    ).half()
    products, norm = 4 * 6 * 3 * 4 + 4 * 5 * 6, 5 * 4 * 5
    assert counts(model, (3, 4, 6)) == ((products + norm) / 1e9, (4 * 6 + 4 * 5) / 1e6)


@pytest.fixture
def plain():
    return randomise(swinfast.create_model("swinv2_cr_tiny_224", **small_model_args(img_size=(64, 32)))).eval()


def test_a_row(plain):
    one = Measurement("engine", None, plain, Timing(0.002, 0.0034567), 1.2345e-6, 0.87654, 123_456_789)
    other = Measurement("engine", "other", plain, Timing(0.001, 0.001), 1.0, None, None)
    row, second = rows_of(Comparison([one, other]), "name", torch.bfloat16, 4, CPU, rounds=3)
    assert set(row) == set(COLUMNS)
    expected = {
        "model": "name", "infer_img_size": "64x32", "infer_samples_per_sec": 2000.0, "infer_step_time": 2.0,
        "infer_step_time_p95": 3.457, "infer_batch_size": 4, "engine": "engine", "dtype": "bfloat16", "rounds": 3,
        "torch": torch.__version__, "driver": "", "source": "measured", "commit": commit_of_this(),
        "rel_error": "1.23e-06", "top1_agreement": 0.8765, "peak_memory": 123.5,
    }  # fmt: skip
    assert {key: row[key] for key in expected} == expected
    assert row["date"] == second["date"]
    assert len(row["date"]) == len("2026-01-31T12:00:00")  # by which runs of one day are told apart
    assert row["infer_gmacs"] == round(counts(plain, (3, 64, 32)).gmacs, 2)
    assert (second["model"], second["infer_samples_per_sec"]) == ("other", 4000.0)
    assert not {"top1_agreement", "peak_memory"} & set(second)
    (row,) = rows_of(Comparison([replace(one, graph_failure="no room")]), "name", torch.bfloat16, 4, CPU, rounds=3)
    assert row["source"] == "measured, without a CUDA graph, since capturing one failed: no room"


def test_rows_are_added_to_a_file(tmp_path, plain):
    file = tmp_path / "new/results.csv"
    row = row_of(plain, "name", torch.float32, 2, CPU, Timing(0.5, 0.5))
    append(file, row)
    append(file, row | {"engine": "a, b"})
    with file.open(newline="", encoding="utf-8") as stream:
        first, second = csv.DictReader(stream)
    assert tuple(first) == COLUMNS
    assert (first["engine"], second["engine"], first["peak_memory"]) == ("", "a, b", "")
    assert float(first["infer_samples_per_sec"]) == 4.0


def test_an_empty_file_gets_a_header(tmp_path):
    (tmp_path / "r.csv").touch()
    append(tmp_path / "r.csv", {"model": "m"})
    assert (tmp_path / "r.csv").read_text(encoding="utf-8").startswith("model,")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (COLUMNS[:-2], "missing: rounds, date; unknown: none"),
        ((*COLUMNS, "colour"), "missing: none; unknown: colour"),
        (COLUMNS[::-1], "missing: none; unknown: none; expected are, in this order: model, "),
    ],
)
def test_a_file_with_other_columns_is_left_alone(tmp_path, header, said):
    file = tmp_path / "old.csv"
    file.write_text(",".join(header) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"old.csv is no table to add to: .*{said}"):
        append(file, {"model": "m"})
    assert file.read_text(encoding="utf-8") == ",".join(header) + "\n"


def test_a_row_with_an_unknown_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown columns colour"):
        append(tmp_path / "r.csv", {"model": "m", "colour": "red"})
    assert not (tmp_path / "r.csv").exists()


MODELS = [file for pattern in ("cpu", "gpu", "peers_cpu") for file in ROOT.glob(f"bench/results/{pattern}*.csv")]


@pytest.mark.parametrize("file", MODELS, ids=lambda file: file.name)
def test_committed_files_can_be_added_to(file):
    with file.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    assert tuple(header) == COLUMNS
    assert {len(row) for row in rows} == {len(COLUMNS)}


def test_commit_of_a_copy(monkeypatch):
    """Who copies a checkout can say what it is, also where there is a history, of something else."""
    for history in (True, False):
        commit_of_this.cache_clear()
        monkeypatch.setattr(Path, "exists", lambda path, history=history: history)
        monkeypatch.setenv("SWINFAST_COMMIT", "abc")
        assert commit_of_this() == "abc"
    commit_of_this.cache_clear()
    monkeypatch.delenv("SWINFAST_COMMIT")
    assert commit_of_this() == f"v{swinfast.__version__}"
    commit_of_this.cache_clear()


def test_versions():
    assert torch.__version__.startswith(version_of("torch"))
    assert version_of("no_such_package") is None
    assert driver_of(CPU) is None
