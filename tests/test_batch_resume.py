"""Runs that end early, by SIGKILL above all, and go on: the output is that of a run that did not."""

import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import torch
from helpers import randomise, write_image
from PIL import Image, ImageFile

import swinfast
from swinfast.batch.parts import ResumeError
from swinfast.batch.share import StrictError

parquet = pytest.importorskip("pyarrow.parquet")
SMALL_PARTS = {"part_size": 4, "resume": True}
OUTPUTS = {
    "csv": (swinfast.Predictor, "out.csv"),
    "jsonl": (swinfast.Predictor, "out.jsonl"),
    "predictions in parquet": (swinfast.Predictor, "out.parquet"),
    "embeddings": (swinfast.Embedder, "out.npy"),
    "embeddings in parquet": (swinfast.Embedder, "out.parquet"),
    "features": (swinfast.FeatureExtractor, "out.npy"),
    "features in parquet": (swinfast.FeatureExtractor, "out.parquet"),
}


@pytest.fixture
def images(tmp_path, bad_images) -> list[Path]:
    """Sixteen, four of them bad."""
    good = [write_image(tmp_path / f"image_{seed}.png", seed, size=(36, 40 + seed)) for seed in range(12)]
    bad = list(bad_images.values())
    return [*good[:3], bad[0], *good[3:7], bad[1], *good[7:10], bad[2], bad[3], *good[10:]]


@pytest.fixture
def make(model_folder):
    """Makes a Predictor or the like for the small model."""

    def pipeline(kind=swinfast.Predictor, **options):
        model = swinfast.create_model(str(model_folder))
        return kind(model, **{"batch_size": 2, "device": "cpu", "workers": 0} | options)

    return pipeline


def contents(folder: Path) -> dict[str, object]:
    """What a run left in a folder: bytes, or tables for parquet, whose files hold metadata of their own."""
    return {
        file.name: parquet.read_table(file).to_pylist() if file.suffix == ".parquet" else file.read_bytes()
        for file in folder.iterdir()
    }


def killed_before(step: int, run: Callable[[], object]) -> bool:
    """Run in a copy of this process that is killed right before its step-th change on the disk; whether it was."""
    pid = os.fork()
    if pid == 0:
        left = step

        def counted(function):
            def call(*args, **options):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)

            return call

        os.fsync = counted(os.fsync)
        for name in ("replace", "rename", "unlink", "mkdir", "write_text"):
            setattr(Path, name, counted(getattr(Path, name)))
        shutil.rmtree = counted(shutil.rmtree)
        os.unlink = counted(os.unlink)
        try:
            run()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind, name", OUTPUTS.values(), ids=OUTPUTS)
def test_killed_at_any_moment(make, images, tmp_path, kind, name):
    """Before changes on the disk chosen at random. Half of the runs are killed a second time."""
    pipeline = make(kind)
    (tmp_path / "whole").mkdir()
    pipeline.write(images, tmp_path / "whole" / name, part_size=4)
    expected = contents(tmp_path / "whole")
    assert len(expected) > 2
    chance = random.Random(name)
    step = 0
    while True:
        folder = tmp_path / f"killed_{step}"
        folder.mkdir()

        def run(output=folder / name):
            pipeline.write(images, output, **SMALL_PARTS)

        if not killed_before(step, run):
            break
        if chance.random() < 0.5:
            killed_before(chance.randrange(30), run)
        run()
        assert contents(folder) == expected, f"killed before change number {step}"
        step += chance.randrange(1, 4) if name == "out.csv" else chance.randrange(3, 15)
    assert step > 20


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("devices", ["cpu", pytest.param("cpu,cpu", marks=pytest.mark.slow)])
def test_killed_command(model_folder, images, tmp_path, devices):
    """The whole command, with processes that decode and compute: killed as the first part is there, then resumed."""
    options = ["--model", model_folder, "--batch-size", 2, "--part-size", 2, "--devices", devices, "--resume"]
    command = [sys.executable, "-m", "swinfast", "predict", *images, *options, "--output"]
    output = tmp_path / "results" / "out.csv"
    output.parent.mkdir()
    call = list(map(str, [*command, output]))
    process = subprocess.Popen(call, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(output.parent.glob("out.csv.parts/0*.json")):
        pass
    process.kill()
    assert process.wait() in (1, -signal.SIGKILL)
    assert subprocess.run(call, stderr=subprocess.DEVNULL, check=False).returncode == 1
    expected = tmp_path / "expected" / "out.csv"
    expected.parent.mkdir()
    predictor = swinfast.Predictor(swinfast.create_model(str(model_folder)), batch_size=2, device="cpu", workers=0)
    predictor.write(images, expected, part_size=2)
    assert contents(output.parent) == contents(expected.parent)


def test_nothing_is_done_twice(make, images, tmp_path):
    seen: list[str] = []

    def stop_after_nine(names, reasons):
        seen.extend(names)
        if len(seen) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make().write(images, tmp_path / "out.csv", watch=stop_after_nine, **SMALL_PARTS)
    assert not (tmp_path / "out.csv").exists()
    again: list[str] = []
    summary = make().write(images, tmp_path / "out.csv", watch=lambda names, _: again.extend(names), **SMALL_PARTS)
    assert again == list(map(str, images))[8:]
    assert (summary.images, summary.failures, summary.done_now) == (16, 4, 8)


def test_finished_run(make, images, tmp_path):
    output = tmp_path / "out.csv"
    make().write(images, output, part_size=4)
    before = output.stat().st_mtime_ns
    summary = make().write(images, output, **SMALL_PARTS)
    assert (summary.images, summary.failures, summary.done_now) == (16, 4, 0)
    assert "nothing is left to do" in str(summary)
    assert output.stat().st_mtime_ns == before
    with pytest.raises(
        ResumeError, match="is finished, with 16 images, and the inputs, or their names, are others now"
    ):
        make().write(images[:-1], output, **SMALL_PARTS)
    with pytest.raises(ResumeError, match=r"their names, are others now \(16 images\)"):
        make().write([*images[:-1], images[0]], output, **SMALL_PARTS)
    make().write(images[:-1], output, part_size=4)
    assert len(output.read_text().splitlines()) == 12


@pytest.mark.parametrize("missing", ["out.npy", "out.index.csv"])
def test_file_of_a_finished_run_that_is_gone(make, images, tmp_path, missing):
    """It is made again; with other settings that is refused still."""
    make(swinfast.Embedder).write(images, tmp_path / "out.npy", part_size=4)
    expected = (tmp_path / missing).read_bytes()
    (tmp_path / missing).unlink()
    with pytest.raises(ResumeError, match="can't be resumed: draft was false, is true"):
        make(swinfast.Embedder, draft=True).write(images, tmp_path / "out.npy", **SMALL_PARTS)
    assert make(swinfast.Embedder).write(images, tmp_path / "out.npy", **SMALL_PARTS).done_now == 16
    assert (tmp_path / missing).read_bytes() == expected


def test_errors_of_a_finished_run_that_are_gone(make, images, tmp_path):
    make().write(images, tmp_path / "out.csv", part_size=4)
    errors = tmp_path / "out.csv.errors.csv"
    expected = errors.read_bytes()
    errors.unlink()
    assert make().write(images, tmp_path / "out.csv", **SMALL_PARTS).done_now == 16
    assert errors.read_bytes() == expected


@pytest.mark.parametrize("name", ["out.npy", "out.index.csv"])
def test_a_finished_run_whose_files_are_others(make, images, tmp_path, name):
    """It is not called finished, and nothing is written over them."""

    def write(**options) -> int:
        return make(swinfast.Embedder).write(images, tmp_path / "out.npy", part_size=4, **options).done_now

    write()
    assert write(resume=True) == 0
    before = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(before[:-1])
    with pytest.raises(ResumeError, match=rf"{name} has {len(before) - 1} bytes, and .* wrote {len(before)}; move"):
        write(resume=True)
    assert (tmp_path / name).read_bytes() == before[:-1]
    assert write() == len(images)
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("name", ["00000000.embedding.npy", "00000000.index.csv", "00000000.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "overwritten"])
def test_damaged_part(make, images, tmp_path, name, damage):
    """It is made again; where that comes about in the same run, it is not joined."""
    expected, output = tmp_path / "expected.npy", tmp_path / "out.npy"
    make(swinfast.Embedder).write(images, expected, part_size=4)
    file = tmp_path / "out.npy.parts" / name
    seen: list[str] = []

    def spoil(names, reasons):
        seen.extend(names)
        if len(seen) == 16:
            text = {"cut": file.read_bytes()[:-20], "gone": b"", "overwritten": b"[]"}[damage]
            file.unlink() if damage == "gone" else file.write_bytes(text)

    with pytest.raises(ResumeError, match=r"00000000\.json .*; --resume makes (it|them) again"):
        make(swinfast.Embedder).write(images, output, watch=spoil, **SMALL_PARTS)
    assert not output.exists()
    assert make(swinfast.Embedder).write(images, output, **SMALL_PARTS).done_now == 4
    assert output.read_bytes() == expected.read_bytes()
    index = output.with_suffix(".index.csv").read_text()
    assert index == expected.with_suffix(".index.csv").read_text()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_as_it_starts_anew(make, images, tmp_path):
    """And deletes the folder of an unfinished run: that goes at once."""

    def anew():
        make().write(images, tmp_path / "out.csv", part_size=4, watch=lambda *batch: os._exit(0))

    for step in itertools.count():
        with pytest.raises(StrictError):
            make().write([*images[:3], *images[4:]], tmp_path / "out.csv", strict=True, part_size=2)
        whole = set(tmp_path.glob("out.csv.parts/*"))
        if not killed_before(step, anew):
            break
        assert len(set(tmp_path.glob("out.csv.parts/*"))) in (len(whole), 1, 0)
    assert step > 8


@pytest.mark.parametrize("end", ["parts", "parts.done"])
@pytest.mark.parametrize("resume", [True, False])
def test_folder_of_somebody_elses(make, images, tmp_path, end, resume):
    """Of the name that a run's own folder has: nothing in it is deleted."""
    folder = tmp_path / f"out.csv.{end}"
    folder.mkdir()
    (folder / "00000001.png").touch()
    with pytest.raises(FileExistsError, match=r"holds what is no part of an output: 00000001.png; move it elsewhere"):
        make().write(images[:2], tmp_path / "out.csv", resume=resume)
    assert (folder / "00000001.png").exists()


@pytest.mark.parametrize("name", ["out.npy", "out.npy.errors.csv", "out.npy.manifest.json", "out.index.csv"])
def test_folder_in_place_of_a_file(make, images, tmp_path, name):
    """It is refused before any image is read."""
    (tmp_path / name).mkdir()
    embedder = make(swinfast.Embedder)
    embedder.compute = lambda: pytest.fail("computed")
    with pytest.raises(IsADirectoryError, match=f"output must be a file, got the folder {tmp_path / name}$"):
        embedder.write(images, tmp_path / "out.npy")
    assert not (tmp_path / "out.npy.parts").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_output_in_the_folder_of_its_inputs(make, images, tmp_path, finished):
    """It is no input of a second run, and nor are its parts; nor is it one where it is given."""
    folder, output = tmp_path / "photos", tmp_path / "photos/out.parquet"
    folder.mkdir()
    for file in images[:3]:
        file.rename(folder / file.name)
    names = sorted(str(folder / file.name) for file in images[:3])
    options = {"part_size": 2, "resume": not finished}

    def stop(names, reasons):
        raise KeyboardInterrupt

    if not finished:
        with pytest.raises(KeyboardInterrupt):
            make().write(folder, output, watch=stop, **options)
    for _ in range(3):
        assert make().write(folder, output, **options).images == 3
        assert parquet.read_table(output)["filename"].to_pylist() == names
    with pytest.raises(ValueError, match=r"out.parquet is written by this run, and can't be an input of it"):
        make().write([folder, output], output, **options)
    assert parquet.read_table(output).num_rows == 3


def negated(module, args, output):
    return -output


def negative(model, x):
    return -type(model).forward(model, x)


def configured(**config) -> Callable:
    return lambda model: setattr(model, "pretrained_cfg", model.pretrained_cfg | config)


OTHERS = {  # what create_model makes otherwise, and what is then done to it
    "weights": ({}, lambda model: randomise(model, seed=1)),
    "one weight": ({}, lambda model: torch.nn.init.zeros_(model.head.fc.bias)),
    "windows": ({"window_size": 2}, lambda model: None),
    "pooling": ({"global_pool": "max"}, lambda model: None),
    "hook": ({}, lambda model: model.register_forward_hook(negated)),
    "hook before": ({}, lambda model: model.stages[1].register_forward_pre_hook(negated)),
    "patch": ({}, lambda model: setattr(model, "forward", MethodType(negative, model))),
    "patch inside": ({}, lambda model: setattr(model.head, "forward", MethodType(negative, model.head))),
    "crop": ({}, configured(crop_pct=0.5)),
    "mean": ({}, configured(mean=(0.5, 0.5, 0.5))),
}


class TestRefusals:
    @pytest.fixture
    def unfinished(self, make, images, tmp_path) -> Path:
        """Three of four parts are done."""
        output = tmp_path / "out.csv"
        with pytest.raises(StrictError, match=r"cut.jpg failed: OSError: .*truncated"):
            make().write([*images[:3], *images[4:8], *images[9:]], output, strict=True, **SMALL_PARTS)
        assert len(list(tmp_path.glob("out.csv.parts/0*.json"))) == 2
        return output

    @pytest.mark.parametrize(
        "options, said",
        [
            ({"topk": 3}, "topk was 5, is 3"),
            ({"batch_size": 4}, "batch_size was 2, is 4"),
            ({"labels": [*"abcdefghij"]}, "labels was"),
            ({"draft": True}, "draft was false, is true"),
            ({"include_index": False}, "include_index was true, is false"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_other_settings(self, make, images, unfinished, options, said):
        with pytest.raises(ResumeError, match=f"can't be resumed: .*{said}"):
            make(**options).write(images, unfinished, **SMALL_PARTS)
        assert len(list(unfinished.parent.glob("out.csv.parts/0*.json"))) == 2

    @pytest.mark.parametrize(
        "chosen, said",
        [({"members": "photo/*"}, 'members was "*", is "photo/*"'), ({"image_column": "b"}, 'column was null, is "b"')],
        ids=["members", "image_column"],
    )
    def test_other_images_of_archives(self, make, images, unfinished, chosen, said):
        paths = tuple(map(str, [*images[:3], *images[4:8], *images[9:]]))
        with pytest.raises(ResumeError, match=f"can't be resumed: .*{re.escape(said)}"):
            make().write(swinfast.Images(paths, **chosen), unfinished, **SMALL_PARTS)

    def test_what_the_program_set(self, make, images, unfinished, monkeypatch):
        with torch.autocast("cpu"), pytest.raises(ResumeError, match=r'autocast was "None", is "torch\.bfloat16"'):
            make().write(images, unfinished, **SMALL_PARTS)
        with torch.autocast("cpu"), pytest.raises(ResumeError, match=r'autocast was "None", is "torch\.bfloat16"'):
            make().write(images, unfinished, devices=("cpu",), **SMALL_PARTS)
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # pytest takes it back
        said = "max_image_pixels was 89478485, is null, load_truncated_images was false, is true, "
        said += "bomb_warning_is_error was false, is true"
        with pytest.raises(ResumeError, match=said):
            make().write(images, unfinished, **SMALL_PARTS)

    @pytest.mark.parametrize("name", ["cuda", "cpu"])
    def test_another_float32_precision(self, make, images, unfinished, matmuls, name):
        """PyTorch's default is that of ieee, under another name."""
        matmuls[name].fp32_precision = "tf32"
        with pytest.raises(ResumeError, match=f'resumed: {name}_float32_precision was "ieee", is "tf32"'):
            make().write(images, unfinished, **SMALL_PARTS)
        matmuls[name].fp32_precision = "ieee"
        paths = [*images[:3], *images[4:8], *images[9:]]
        assert make().write(paths, unfinished, **SMALL_PARTS).images == 14

    @pytest.mark.parametrize("other", OTHERS)
    def test_another_model(self, images, unfinished, model_folder, other):
        options, change = OTHERS[other]
        model = swinfast.create_model(str(model_folder), **options)
        change(model)
        what = "transform" if other in ("crop", "mean") else "model"
        with pytest.raises(ResumeError, match=rf"can't be resumed: {what} was [^;]*; go back"):
            swinfast.Predictor(model, batch_size=2, device="cpu").write(images, unfinished, **SMALL_PARTS)

    def test_other_names(self, make, images, unfinished):
        with pytest.raises(ResumeError, match="the inputs have other names now than in finished part 0"):
            make().write(images[1:], unfinished, **SMALL_PARTS)

    def test_fewer_images(self, make, images, unfinished):
        with pytest.raises(ResumeError, match="has results of more images than there are now"):
            make().write([*images[:3], images[4]], unfinished, **SMALL_PARTS)

    @pytest.mark.parametrize(
        "content, said",
        [("", "no JSON"), ("null", "has no settings"), ("{}", "has no settings"), ('{"settings": 1}', "no settings")],
    )
    def test_damaged_manifest(self, make, images, unfinished, content, said):
        (unfinished.with_name("out.csv.parts") / "manifest.json").write_text(content, encoding="utf-8")
        with pytest.raises(ResumeError, match=f"manifest.json .*{said}"):
            make().write(images, unfinished, **SMALL_PARTS)

    def test_damaged_manifest_of_a_finished_run(self, make, images, tmp_path):
        output, manifest = tmp_path / "out.csv", tmp_path / "out.csv.manifest.json"
        make().write(images, output)
        content = json.loads(manifest.read_text(encoding="utf-8"))
        manifest.write_text(json.dumps({"settings": content["settings"]}), encoding="utf-8")
        with pytest.raises(ResumeError, match=r"out.csv.manifest.json has no totals of a finished run"):
            make().write(images, output, resume=True)

    def test_starting_anew(self, make, images, unfinished):
        assert make(topk=3).write(images, unfinished, part_size=4).done_now == 16
        assert len(unfinished.read_text().splitlines()[0].split(",")) == 10


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_at_once(make, images, tmp_path, resume):
    """The second is refused, and the first goes on."""

    def second(names, reasons):
        with pytest.raises(RuntimeError, match=r"another run is writing to .*out\.csv\.parts"):
            make().write(images, tmp_path / "out.csv", resume=resume, part_size=4)

    assert make().write(images, tmp_path / "out.csv", part_size=4, watch=second).images == 16
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 13


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_process_forked_during_a_run(make, images, tmp_path):
    """It does not keep the output from the next run, however long it lives."""
    children = []

    def fork_and_stop(names, reasons):
        children.append(os.fork())
        if children[0] == 0:
            signal.pause()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make().write(images, tmp_path / "out.csv", watch=fork_and_stop, **SMALL_PARTS)
    try:
        assert make().write(images, tmp_path / "out.csv", **SMALL_PARTS).images == 16
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_file_system_without_locks(make, images, tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    assert make().write(images, tmp_path / "out.csv").images == 16


def test_full_disk(make, images, tmp_path, monkeypatch):
    """It says how much is safe, and what is safe is used."""
    synced = os.fsync

    def full(descriptor):
        if len(list(tmp_path.glob("out.csv.parts/0*.json"))) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="can't write results: No space left on device: 8 images are done and kept"):
        make().write(images, tmp_path / "out.csv", **SMALL_PARTS)
    monkeypatch.undo()
    assert make().write(images, tmp_path / "out.csv", **SMALL_PARTS).done_now == 8


def test_older_results_stay_until_new_ones_are_there(make, images, tmp_path):
    output = tmp_path / "out.csv"
    output.write_text("older")
    with pytest.raises(StrictError):
        make().write(images, output, strict=True)
    assert output.read_text() == "older"
    make().write(images, output)
    assert output.read_text().startswith("filename,")


def test_errors_file(make, images, bad_images, tmp_path):
    """One line for each bad image; none is left of an older run without any."""
    make().write(images, tmp_path / "out.csv")
    lines = (tmp_path / "out.csv.errors.csv").read_text().splitlines()
    assert lines[0] == "filename,reason"
    assert [line.partition(",")[0] for line in lines[1:]] == [str(file) for file in bad_images.values()]
    assert "cannot identify image file" in lines[1]
    assert "FileNotFoundError" in lines[4]
    make().write(images[:3], tmp_path / "out.csv")
    assert not (tmp_path / "out.csv.errors.csv").exists()


def test_batch_size_that_was_found_is_kept(make, images, tmp_path, monkeypatch):
    sizes = iter([4, 8])
    monkeypatch.setattr("swinfast.pipeline.find_batch_size", lambda *args: next(sizes))
    first = make(batch_size="auto")
    with pytest.raises(StrictError):
        first.write([*images[:3], *images[4:8], images[8]], tmp_path / "out.csv", strict=True, **SMALL_PARTS)
    second = make(batch_size="auto")
    assert second.batch_size == 8
    second.write([*images[:3], *images[4:8], images[8]], tmp_path / "out.csv", **SMALL_PARTS)
    assert second.batch_size == 4
    settings = json.loads((tmp_path / "out.csv.manifest.json").read_text())["settings"]
    assert (settings["batch_size"], settings["part_size"]) == (4, 4)


def test_arrays_are_those_of_the_model(make, images, tmp_path):
    """npy files can be mapped, and their index names the rows."""
    embedder, extractor = make(swinfast.Embedder), make(swinfast.FeatureExtractor, stages=[-1, 0], stored="float16")
    embedder.write(images, tmp_path / "e.npy", part_size=4)
    extractor.write(images, tmp_path / "f.npy", part_size=4)
    good = [result for result in embedder.extract(images) if isinstance(result, swinfast.Features)]
    rows = np.load(tmp_path / "e.npy", mmap_mode="r")
    assert rows.shape == (12, 32)
    assert np.array_equal(rows, np.stack([result.arrays["embedding"] for result in good]))
    assert (tmp_path / "e.index.csv").read_text().splitlines()[1:] == [result.filename for result in good]
    first, last = (np.load(tmp_path / f"f.stage_{stage}.npy", mmap_mode="r") for stage in (0, 1))
    assert (first.shape, last.shape, first.dtype) == ((12, 16, 16, 16), (12, 32, 8, 8), np.float16)
    pooled = last.astype(np.float64).mean(axis=(2, 3))
    assert np.abs(pooled - rows).max() < 1e-2 * np.abs(rows).max()
