"""The command line: arguments, outputs, exit codes."""

import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import huggingface_hub
import pytest
from helpers import names_in, randomise, read_csv, write_image
from safetensors.torch import save_file

import swinfast
from swinfast import files
from swinfast.cli import main

COLUMNS = [f"top{rank}_{key}" for rank in range(1, 11) for key in ("index", "label", "prob")]


@pytest.fixture
def no_model(monkeypatch):
    """Nothing may be loaded."""
    monkeypatch.setattr("swinfast.cli_predict.create_model", lambda *args, **options: pytest.fail("a model was made"))


def expected_predictions(model_folder, files, topk: int) -> list[swinfast.Prediction]:
    model = swinfast.create_model(str(model_folder))
    return list(swinfast.Predictor(model, topk=topk, device="cpu").predict(files))


def test_csv(predict, photos, tmp_path, model_folder, capsys):
    assert predict(photos, "--output", tmp_path / "out.csv", "--topk", 3, "--batch-size", 2) == 0
    header, *rows = read_csv(tmp_path / "out.csv")
    assert header == ["filename", *COLUMNS[:9]]
    expected = expected_predictions(model_folder, names_in(photos), 3)
    assert len(rows) == 5
    for row, prediction in zip(rows, expected, strict=True):
        assert row[0] == prediction.filename
        assert [int(cell) for cell in row[1::3]] == list(prediction.indices)
        assert row[2::3] == list(prediction.labels)
        assert [float(cell) for cell in row[3::3]] == pytest.approx(prediction.probabilities, abs=2e-6)
    assert capsys.readouterr().out == ""


def test_jsonl(predict, photos, tmp_path, model_folder):
    assert predict(photos, "--output", tmp_path / "out.jsonl", "--topk", 2) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = expected_predictions(model_folder, names_in(photos), 2)
    assert len(rows) == 5
    for row, prediction in zip(rows, expected, strict=True):
        assert list(row) == ["filename", "predictions"]
        assert row["filename"] == prediction.filename
        assert [list(top) for top in row["predictions"]] == [["index", "label", "prob"]] * 2
        assert [top["index"] for top in row["predictions"]] == list(prediction.indices)
        assert [top["label"] for top in row["predictions"]] == list(prediction.labels)
        assert [top["prob"] for top in row["predictions"]] == pytest.approx(prediction.probabilities, abs=2e-6)


def test_table(predict, photos, model_folder, capsys):
    assert predict(photos, "--topk", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["image", "top", "1", "top", "2"]
    expected = expected_predictions(model_folder, names_in(photos), 2)
    for line, prediction in zip(lines[2:], expected, strict=True):
        tops = zip(prediction.labels, prediction.probabilities, strict=True)
        assert line.split("  ")[0] == prediction.filename
        assert all(f"{label} {probability:.1%}" in line for label, probability in tops)


def test_folders_patterns_and_files(predict, photos, tmp_path):
    arguments = [photos / "sub", f"{photos}/*.png", photos / "b.jpg"]
    assert predict(*arguments, "--output", tmp_path / "out.csv") == 0
    names = ["sub/c.webp", "sub/d.bmp", "a.png", "e.png", "b.jpg"]
    assert [row[0] for row in read_csv(tmp_path / "out.csv")[1:]] == [str(photos / name) for name in names]


def test_topk_beyond_the_classes(predict, photos, tmp_path):
    assert predict(photos, "--output", tmp_path / "out.csv", "--topk", 99) == 0
    header, *rows = read_csv(tmp_path / "out.csv")
    assert header == ["filename", *COLUMNS]
    assert {len(row) for row in rows} == {31}


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_unreadable_images_are_skipped(predict, photos, bad_images, tmp_path, capsys, ending):
    output = tmp_path / f"out.{ending}"
    files = [bad_images["text"], photos / "a.png", *list(bad_images.values())[1:], photos / "e.png"]
    assert predict(*files, "--output", output, "--batch-size", 2) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1] == "swinfast: 4 of 6 images failed"
    for file in bad_images.values():
        assert sum(line.startswith(f"swinfast: skipped {file}: ") for line in errors) == 1
    if ending == "csv":
        done = [row[0] for row in read_csv(output)[1:]]
    else:
        done = [json.loads(line)["filename"] for line in output.read_text(encoding="utf-8").splitlines()]
    assert done == [str(photos / "a.png"), str(photos / "e.png")]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_outputs_that_are_not_finite(predict, photos, tmp_path, model_folder, capsys, ending):
    """NaN is no JSON, and no probability."""
    state = swinfast.create_model(str(model_folder)).state_dict()
    state["head.fc.bias"][3] = float("nan")
    save_file(state, tmp_path / "weights.safetensors")
    output = tmp_path / f"out.{ending}"
    assert predict(photos, "--checkpoint", tmp_path / "weights.safetensors", "--output", output) == 1
    reason = "the model's output is not finite"
    assert f"swinfast: skipped {photos / 'a.png'}: {reason}" in capsys.readouterr().err
    assert read_csv(tmp_path / f"out.{ending}.errors.csv")[1:] == [[name, reason] for name in names_in(photos)]
    if ending == "csv":
        assert len(read_csv(output)) == 1
    elif ending == "jsonl":
        assert output.read_bytes() == b""


def test_only_unreadable_images(predict, bad_images, tmp_path, capsys):
    assert predict(bad_images["text"], "--output", tmp_path / "out.csv") == 1
    assert len(read_csv(tmp_path / "out.csv")) == 1
    assert predict(bad_images["missing"]) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("output", ["out.txt", "out", "out.csv.gz", "csv"])
def test_wrong_ending(predict, photos, no_model, capsys, tmp_path, output):
    assert predict(photos, "--output", tmp_path / output) == 2
    assert f"output must end in .csv, .jsonl or .parquet, got '{tmp_path / output}'" in capsys.readouterr().err
    assert not (tmp_path / output).exists()


def test_no_images(predict, tmp_path, no_model, capsys):
    (tmp_path / "empty").mkdir()
    assert predict(tmp_path / "empty") == 2
    assert f"swinfast: error: found no images in {tmp_path / 'empty'}" in capsys.readouterr().err


def test_unknown_model(predict, photos, tmp_path, capsys):
    assert predict(photos, model="swinv2_cr_minuscule") == 2
    assert "swinfast: error: unknown model 'swinv2_cr_minuscule'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "entries, said",
    [
        ({"label_names": list(range(10))}, "label_names [0, 1, 2, 3, 4, 5, ...], expected a list of strings"),
        ({"num_classes": "10"}, "num_classes '10', expected a whole number of at least 0"),
        ({"num_classes": None}, "num_classes None, expected a whole number of at least 0"),
        ({"model_args": {"depths": 2}}, "model_args that make no model: "),
        (None, "architecture None, expected one of "),
        ([], "architecture None, expected one of "),
    ],
    ids=["label_names", "num_classes", "no num_classes", "model_args", "null", "list"],
)
@pytest.mark.parametrize("command", ["predict", "embed", "bench", "verify"])
def test_wrong_config(command, photos, tmp_path, model_folder, capsys, entries, said):
    """It is one line, with the file."""
    file = tmp_path / "model/config.json"
    shutil.copytree(model_folder, file.parent)
    if isinstance(entries, dict):
        entries = json.loads(file.read_text(encoding="utf-8")) | entries
    file.write_text(json.dumps(entries), encoding="utf-8")
    images = [str(photos), "--output", str(tmp_path / "out.parquet"), "--model"]
    assert main([command, *(images if command in ("predict", "embed") else []), str(file.parent)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"swinfast: error: {file} has {said}")


@pytest.mark.parametrize(
    "output, said",
    [
        ("nowhere/out.csv", "output must be in a folder that exists, got {}"),
        ("folder.csv", "output must be a file, got the folder {}"),
        ("closed/out.csv", "output must be a file that can be written, got {}: no right to write to {.parent}"),
    ],
)
def test_unwritable_output(predict, photos, tmp_path, no_model, monkeypatch, capsys, output, said):
    """It is said before any work."""
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "out.csv").touch()  # which is no file to write to: it is replaced, in its folder
    monkeypatch.setattr(files.os, "access", lambda path, mode: path != tmp_path / "closed")
    assert predict(photos, "--output", tmp_path / output) == 2
    assert f"swinfast: error: {said.format(*[tmp_path / output] * 2)}\n" in capsys.readouterr().err


def test_older_output_survives_a_model_that_does_not_load(predict, photos, tmp_path):
    (tmp_path / "out.csv").write_text("older results", encoding="utf-8")
    assert predict(photos, "--output", tmp_path / "out.csv", "--checkpoint", tmp_path / "none.pth") == 2
    assert (tmp_path / "out.csv").read_text(encoding="utf-8") == "older results"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--topk", "0"], "topk must be at least 1"),
        (["--num-classes", "7"], "wrong shape"),
        (["--label-type", "name"], "--label-type name is for ImageNet's 1000 classes, not 10"),
        (["--part-size", "0", "--output", "out.csv"], "part_size must be at least 1, got 0"),
        (["--resume"], "--resume and --devices need an --output"),
        (["--files-from", "none.txt"], "No such file or directory: 'none.txt'"),
        (["--devices", "cpu,cuda:77", "--output", "out.csv"], "device 'cuda:77' is not available here"),
        (
            ["--devices", "cpu,", "--output", "out.csv"],
            'device must be "auto" or a device such as "cpu" or "cuda:1", got',
        ),
        (["--num-classes", "0"], "model must be a classifier"),
        (["--checkpoint", "none.pth"], "no checkpoint file at none.pth"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unusable_options(predict, photos, capsys, options, message):
    assert predict(photos, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("swinfast: error: ")
    assert message in error


def test_missing_device(model_folder, photos, capsys):
    assert main(["predict", str(photos), "--model", str(model_folder), "--device", "cuda:77"]) == 2
    assert "swinfast: error: device 'cuda:77' is not available here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["predict"],
        ["predict", "x.png", "--dtype", "int8"],
        ["predict", "x.png", "--num-classes", "-1"],
        ["embed", "x.png", "--output", "x.npy", "--num-classes", "99999999999999999999"],
        ["train"],
    ],
    ids=str,
)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "usage: swinfast" in capsys.readouterr().err


def test_usage_of_batch_sizes(capsys):
    with pytest.raises(SystemExit):
        main(["predict", "photos", "--batch-size", "many"])
    assert "argument --batch-size: must be a whole number or auto, got 'many'" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"swinfast {swinfast.__version__}\n"


def test_without_weights_or_network(photos, monkeypatch, capsys):
    def download(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert main(["predict", str(photos)]) == 2
    assert "the weights of swinv2_cr_tiny_ns_224.sw_in1k can't be downloaded" in capsys.readouterr().err


def test_another_checkpoint_with_other_classes(predict, photos, tmp_path, model_folder):
    model = randomise(swinfast.create_model(str(model_folder)), seed=5)
    model.reset_classifier(3)
    save_file(model.state_dict(), tmp_path / "three.safetensors")
    options = ["--checkpoint", tmp_path / "three.safetensors", "--num-classes", 3, "--output", tmp_path / "out.csv"]
    assert predict(photos, *options) == 0
    header, *rows = read_csv(tmp_path / "out.csv")
    assert header == ["filename", *COLUMNS[:9]]
    expected = list(swinfast.Predictor(model, device="cpu").predict(names_in(photos)))
    assert [row[2::3] for row in rows] == [list(prediction.labels) for prediction in expected]
    assert sorted(rows[0][2::3]) == ["0", "1", "2"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype(predict, photos, tmp_path, dtype):
    assert predict(photos, "--dtype", dtype, "--output", tmp_path / f"{dtype}.csv") == 0
    assert len(read_csv(tmp_path / f"{dtype}.csv")) == 6


@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
def test_awkward_filenames(predict, tmp_path):
    names = ['comma, "quote".png', "new\nline.png", "umlaut ü.png", "semi;colon.png"]
    files = [str(write_image(tmp_path / "awkward" / name)) for name in names]
    assert predict(*files, "--output", tmp_path / "out.csv") == 0
    assert [row[0] for row in read_csv(tmp_path / "out.csv")[1:]] == files
    assert predict(*files, "--output", tmp_path / "out.jsonl") == 0
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["filename"] for line in lines] == files
    assert "umlaut ü" in lines[2]


def test_a_terminal_that_lacks_characters(predict, tmp_path, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    assert predict(write_image(tmp_path / "umlaut ü.png")) == 0
    assert rb"umlaut \xfc.png" in stream.buffer.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_filename_that_is_no_text(predict, tmp_path, capsys):
    file = write_image(tmp_path / "awkward" / os.fsdecode(b"caf\xe9.png"))
    for output in ("out.csv", "out.jsonl"):
        assert predict(file.parent, "--output", tmp_path / output) == 0
    assert read_csv(tmp_path / "out.csv")[1][0].endswith(r"caf\udce9.png")
    (line,) = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["filename"] == str(file)
    assert predict(file.parent) == 0
    assert r"caf\udce9.png" in capsys.readouterr().out


def test_interrupted_table(predict, photos, monkeypatch, capsys):
    complete = swinfast.Predictor.predict

    def predict_two(self, files):
        yield from itertools.islice(complete(self, files), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(swinfast.Predictor, "predict", predict_two)
    assert predict(photos) == 130
    out, error = capsys.readouterr()
    assert "swinfast: interrupted, the results so far are written to the terminal" in error
    assert sum("photos" in line for line in out.splitlines()) == 2


def test_interrupted_while_loading(predict, photos, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("swinfast.cli_predict.create_model", interrupt)
    assert predict(photos) == 130


def test_output_that_nobody_reads(predict, photos, monkeypatch, capsys):
    """As by head: no word about it, nor as what is left is flushed."""
    readable, writable = os.pipe()
    os.close(readable)
    with os.fdopen(writable, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert predict(photos) == 141
        stream.write("more")
    assert capsys.readouterr().err == ""


def command(model_folder, *arguments) -> list[str]:
    options = ["--model", model_folder, "--device", "cpu"]
    return [sys.executable, "-m", "swinfast", "predict", *map(str, [*arguments, *options])]


def test_module(photos, model_folder, tmp_path):
    """In a process of its own, started elsewhere than in the checkout."""
    call = command(model_folder, "photos", "photos/missing.png", "--output", "out.csv")
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "swinfast: 1 of 6 images failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(read_csv(tmp_path / "out.csv")) == 6


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_interrupt_in_the_middle(photos, model_folder, tmp_path, predict):
    """Of so many images that it comes long before the last."""
    images = [write_image(tmp_path / f"{seed:02}.png", seed) for seed in range(20)] * 30
    output = tmp_path / "out.csv"
    options = ["--batch-size", "4", "--part-size", "4", "--threads", "1", "--workers", "1", "--output", output]
    process = subprocess.Popen(
        command(model_folder, *images, *options), stderr=subprocess.PIPE, text=True, preexec_fn=allow_interrupts
    )
    give_up = time.monotonic() + 60
    try:
        while len(list(tmp_path.glob("out.csv.parts/0*.json"))) < 1:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < give_up, "results are not written while the run goes on"
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error
    done = re.search(r"swinfast: interrupted, (\d+) images are done: --resume goes on from there", error)
    assert 0 < int(done[1]) < len(images) and int(done[1]) % 4 == 0
    assert not output.exists()
    assert predict(*images, *options, "--resume") == 0
    assert [row[0] for row in read_csv(output)[1:]] == list(map(str, images))


def allow_interrupts() -> None:
    """A shell may have started the tests with interrupts ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
