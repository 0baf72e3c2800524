"""The command line over many images: bad files, resuming, labels, arrays, progress."""

import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import names_in, randomise, read_csv
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

import swinfast
from swinfast.batch.sources import Images
from swinfast.cli import main


@pytest.fixture
def faults(tmp_path, photos, bad_images) -> Path:
    """A folder with one of each bad file among good ones."""
    for file in bad_images.values():
        if file.exists():
            file.rename(photos / file.name)
    (photos / "gone.png").symlink_to(photos / "nothing.png")
    Image.new("1", (20000, 20000)).save(photos / "bomb.png")
    (photos / "pixels.png").write_bytes((photos / "a.png").read_bytes()[:60])
    return photos


REASONS = {
    "bomb.png": "DecompressionBombError",
    "cut.jpg": "truncated",
    "empty.jpg": "cannot identify",
    "gone.png": "FileNotFoundError",
    "pixels.png": "OSError",
    "text.png": "cannot identify",
}


def test_one_of_each_bad_file(predict, faults, tmp_path, capsys):
    assert predict(faults, "--output", tmp_path / "out.csv") == 1
    assert [row[0] for row in read_csv(tmp_path / "out.csv")[1:]] == names_in(faults)
    errors = dict(read_csv(tmp_path / "out.csv.errors.csv")[1:])
    assert {Path(name).name for name in errors} == set(REASONS)
    for name, reason in REASONS.items():
        assert reason in errors[str(faults / name)]
    assert "swinfast: 6 of 11 images failed" in capsys.readouterr().err


def test_strict(predict, faults, tmp_path, capsys):
    options = ["--output", tmp_path / "out.csv", "--batch-size", 1, "--part-size", 1]
    assert predict(faults, *options, "--strict") == 2
    assert f"swinfast: error: {faults}/bomb.png failed: DecompressionBombError" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()
    assert predict(faults, *options, "--resume") == 1
    assert len(read_csv(tmp_path / "out.csv")) == 6
    assert predict(faults, "--strict") == 2


def test_resume_with_other_settings(predict, photos, tmp_path, capsys):
    output = ["--output", tmp_path / "out.csv", "--resume"]
    assert predict(photos, *output) == 0
    assert predict(photos, *output) == 0
    assert "nothing is left to do" in capsys.readouterr().err
    assert predict(photos, *output, "--topk", 2) == 2
    assert "can't be resumed: topk was 5, is 2" in capsys.readouterr().err


def test_habits_of_timm(predict, photos, tmp_path):
    options = ["--no-include-index", "--no-fullname", "--topk", 2, "--quiet", "--output", tmp_path / "out.csv"]
    assert predict(photos, *options) == 0
    header, *rows = read_csv(tmp_path / "out.csv")
    assert header == ["filename", "top1_label", "top1_prob", "top2_label", "top2_prob"]
    assert [row[0] for row in rows] == ["a.png", "b.jpg", "e.png", "c.webp", "d.bmp"]


@pytest.mark.parametrize(
    "label_type, first",
    [
        ("name", "n01440764"),
        ("description", "tench, Tinca tinca"),
        ("detail", "tench, Tinca tinca: freshwater dace-like game fish of Europe"),
    ],
)
def test_label_type(photos, tmp_path, label_type, first):
    model = randomise(swinfast.create_model("swinv2_cr_tiny_224", img_size=32, depths=(1,), num_heads=(3,)))
    config = {"architecture": "swinv2_cr_tiny_224", "num_classes": 1000, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    config["model_args"] = {"img_size": 32, "depths": [1], "num_heads": [3]}
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "imagenet" / "model.safetensors")
    options = ["--model", tmp_path / "imagenet", "--topk", 1000, "--label-type", label_type, "--device", "cpu"]
    command = ["predict", photos / "a.png", *options, "--output", tmp_path / "out.jsonl"]
    assert main(list(map(str, command))) == 0
    tops = json.loads((tmp_path / "out.jsonl").read_text())["predictions"]
    assert next(top["label"] for top in tops if top["index"] == 0).startswith(first)


@pytest.mark.parametrize("command, endings", [("embed", ".npy or .parquet"), ("features", ".npy or .parquet")])
def test_arrays(photos, model_folder, tmp_path, command, endings, capsys):
    base = [command, photos, "--model", model_folder, "--device", "cpu", "--output"]
    assert main(list(map(str, [*base, tmp_path / "out.csv"]))) == 2
    assert f"output must end in {endings}, got" in capsys.readouterr().err
    assert main(list(map(str, [*base, tmp_path / "out.npy"]))) == 0
    assert len(read_csv(tmp_path / "out.index.csv")) == 6
    arrays = sorted(tmp_path.glob("*.npy"))
    assert [np.load(file).shape for file in arrays] == (
        [(5, 32)] if command == "embed" else [(5, 16, 16, 16), (5, 32, 8, 8)]
    )


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs /dev/fd")
def test_list_by_a_name_that_only_this_process_knows(predict, photos, tmp_path):
    """A regular file, but another one for the processes of --devices."""
    (tmp_path / "list.txt").write_text("\n".join(names_in(photos)), encoding="utf-8")
    with (tmp_path / "list.txt").open() as stream:
        options = ["--output", tmp_path / "out.csv", "--devices", "cpu,cpu"]
        assert predict("--files-from", f"/dev/fd/{stream.fileno()}", *options) == 0
    assert [row[0] for row in read_csv(tmp_path / "out.csv")[1:]] == names_in(photos)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.parametrize(
    "devices, closed",
    [
        ("cpu", "2>&-"),
        ("cpu,cpu", "<&- >&- 2>&-"),
        pytest.param(
            "cpu", "2>/dev/full", marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
        ),
    ],
)
def test_closed_streams(model_folder, photos, tmp_path, devices, closed):
    """Or on a full disk: nothing is told then, nothing else is amiss."""
    (photos / "gone.png").symlink_to(photos / "nothing.png")
    options = ["--model", model_folder, "--output", tmp_path / "out.csv", "--devices", devices]
    command = shlex.join(map(str, [sys.executable, "-m", "swinfast", "predict", photos, *options]))
    assert subprocess.run(["sh", "-c", f"{command} {closed}"], check=False).returncode == 1
    assert [row[0] for row in read_csv(tmp_path / "out.csv")[1:]] == names_in(photos)


def test_no_standard_input(predict, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert predict("--files-from", "-") == 2
    assert "--files-from - reads the standard input, and there is none" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no /dev/fd there")
@pytest.mark.parametrize("source", ["-", "/dev/fd/{}"])
def test_list_through_a_pipe(predict, photos, tmp_path, monkeypatch, source, capsys):
    """It is read once, and no image of it is lost, in a run that is resumed neither."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def run(names: list[str], *options: object) -> int:
        readable, writable = os.pipe()
        os.write(writable, "\n".join(names).encode())
        os.close(writable)
        with os.fdopen(readable) as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            output = ["--output", tmp_path / "out.csv", "--batch-size", 1, "--part-size", 1]
            return predict("--files-from", source.format(readable), *output, *options)

    names = names_in(photos)
    assert run([*names[:2], str(photos / "gone.png"), *names[2:]], "--strict") == 2
    assert run([*names[:2], str(photos / "gone.png"), *names[2:]], "--resume") == 1
    assert [row[0] for row in read_csv(tmp_path / "out.csv")[1:]] == names
    assert run(names, "--resume") == 2
    assert "the inputs, or their names, are others now" in capsys.readouterr().err
    assert run([]) == 2
    assert f"found no images in {source.format('')}" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(names) == 2
    assert "--files-from must be a regular file under torchrun" in capsys.readouterr().err
    assert not list((tmp_path / "temporary").iterdir())


def test_output_among_the_inputs(predict, photos, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(photos)
    for options in ([], [], ["--resume"]):
        assert predict(".", "--output", "out.parquet", *options) == 0
    assert predict("a.png", "out.parquet", "--output", "out.parquet") == 2
    assert "error: out.parquet is written by this run" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["errors.csv", "manifest.json"])
def test_folder_in_place_of_a_file_beside_the_output(predict, photos, tmp_path, capsys, end):
    """It is said at the start, and not when everything is computed."""
    (tmp_path / f"out.csv.{end}").mkdir()
    assert predict(photos, "--output", tmp_path / "out.csv") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("swinfast: error: ") and line.endswith(f"a file, got the folder {tmp_path}/out.csv.{end}")
    assert [file.name for file in tmp_path.glob("out*")] == [f"out.csv.{end}"]


def test_paths_are_checked_once(predict, photos, tmp_path, monkeypatch):
    """A shell may give a hundred thousand of them."""
    seen, is_written = [], Images._is_written
    monkeypatch.setattr(Images, "_is_written", lambda images, path: seen.append(path) or is_written(images, path))
    assert predict(*names_in(photos), "--output", f"{tmp_path}/./out.csv") == 0
    assert seen == names_in(photos)


def test_progress_on_a_terminal(predict, photos, tmp_path, monkeypatch):
    """A bar with the rate; it finds out how many images there are while it runs."""
    bars = []

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    class Bar(tqdm):
        def __init__(self, **options):
            super().__init__(file=Terminal(), **options)
            bars.append(self)

    monkeypatch.setattr("swinfast.cli_predict.tqdm", Bar)
    for thread in (predict(photos, "--output", tmp_path / "out.csv"), *threading.enumerate()):
        if isinstance(thread, threading.Thread) and "_find_total" in thread.name:
            thread.join()
    (bar,) = bars
    assert (bar.n, bar.total) == (5, 5)
    assert "img/s" in bar.fp.getvalue()
    assert predict(photos, "--quiet", "--output", tmp_path / "out.csv") == 0
    assert bars[1].disable
