"""Decoding processes: the same pixels as without, and no image is lost to a process that dies."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import write_image
from PIL import Image, ImageFile

from swinfast.batch import decode
from swinfast.batch.decode import Decoder
from swinfast.batch.worker import ANSWERS_FOLLOW
from swinfast.pixels import Crop

CROP = Crop((24, 20))


@pytest.fixture
def files(tmp_path) -> list[str]:
    return [str(write_image(tmp_path / f"{seed}.png", seed, size=(30 + seed, 40))) for seed in range(6)]


def decoded(decoder: Decoder, sources: list, crop: Crop = CROP) -> tuple[list, np.ndarray]:
    out = np.full((len(sources), *crop.shape), 77, np.uint8)
    return decoder.submit(sources, out).result(), out


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels(files, workers, channels):
    crop = Crop((24, 20), channels=channels)
    sources = [files[0], Path(files[1]), Path(files[2]).read_bytes(), (files[3], 0, Path(files[3]).stat().st_size)]
    with Decoder(crop, workers) as decoder:
        reasons, out = decoded(decoder, sources, crop)
    assert reasons == [None] * 4
    expected = [np.asarray(crop.load(file)).reshape(crop.shape) for file in files[:4]]
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_failures_leave_no_gaps(files, bad_images, workers):
    bad = list(map(str, bad_images.values()))
    with Decoder(CROP, workers) as decoder:
        reasons, out = decoded(decoder, [bad[0], files[0], bad[1], bad[2], files[1], bad[3], b"no image"])
    assert [reason is None for reason in reasons] == [False, True, False, False, True, False, False]
    assert np.array_equal(out[:2], [np.asarray(CROP.load(file)) for file in files[:2]])
    assert (out[2:] == 77).all()
    assert reasons[-1] == "UnidentifiedImageError: cannot identify image file"  # and no address in memory


@pytest.mark.parametrize("workers", [0, 1])
def test_decompression_bomb(tmp_path, workers):
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    with Decoder(CROP, workers) as decoder:
        ((reason,), _) = decoded(decoder, [str(tmp_path / "bomb.png")])
    assert reason.startswith("DecompressionBombError: Image size (400000000 pixels) exceeds limit")


@pytest.mark.parametrize("workers", [0, 1])
def test_settings_of_pillow(files, bad_images, workers, monkeypatch):
    """What the program has chosen holds in the processes too."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with Decoder(CROP, workers) as decoder:
        reasons, out = decoded(decoder, [str(bad_images["cut"])])
    assert reasons == [None]
    assert np.array_equal(out[0], np.asarray(CROP.load(bad_images["cut"])))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with Decoder(CROP, workers) as decoder:
        ((reason,), _) = decoded(decoder, files[:1])
    assert reason.startswith("DecompressionBombError: Image size (1200 pixels) exceeds limit of 1000 pixels")


def test_process_that_is_killed_loses_nothing(files):
    """Killed between two lists, and in the middle of one."""
    with Decoder(CROP, 1) as decoder:
        decoded(decoder, files[:1])
        (process,) = decoder._processes
        os.kill(process.popen.pid, signal.SIGKILL)
        reasons, out = decoded(decoder, files)
        assert reasons == [None] * 6
        assert np.array_equal(out, [np.asarray(CROP.load(file)) for file in files])
        assert process not in decoder._processes


@pytest.fixture
def deadly(tmp_path, monkeypatch) -> Path:
    """Decoding processes that die of files named deadly.png, and count how often."""
    worker = tmp_path / "worker.py"
    text = decode.WORKER.read_text(encoding="utf-8").replace(
        "parents[1]", f"__class__({str(decode.WORKER)!r}).parents[1]"
    )
    text = text.replace(
        '    """(image, None), or (None, reason) where it can\'t be read."""\n',
        "    if str(source).endswith('deadly.png'):\n"
        "        open(source, 'a').write('x')\n        os.kill(os.getpid(), signal.SIGKILL)\n",
    )
    worker.write_text(text, encoding="utf-8")
    monkeypatch.setattr(decode, "WORKER", worker)
    (tmp_path / "deadly.png").touch()
    return tmp_path / "deadly.png"


def test_image_that_kills_processes(files, deadly):
    """It alone fails, after three tries: with the others of its list, and twice alone."""
    with Decoder(CROP, 2) as decoder:
        reasons, out = decoded(decoder, [*files[:2], str(deadly), *files[2:4]])
        again, _ = decoded(decoder, files)
    assert deadly.read_text() == "xxx"
    assert reasons[:2] == reasons[3:] == [None, None]
    assert reasons[2] == "a decoding process ended (signal 9) while it decoded this image, and so did another"
    assert np.array_equal(out[:4], [np.asarray(CROP.load(file)) for file in files[:4]])
    assert again == [None] * 6


def test_processes_that_do_not_start(files, tmp_path, monkeypatch):
    """That is an error of the run, not of each image."""
    (tmp_path / "worker.py").write_text("import nothing_of_this_name")
    monkeypatch.setattr(decode, "WORKER", tmp_path / "worker.py")
    with Decoder(CROP, 1) as decoder, pytest.raises(RuntimeError, match=r"ended \(exit code 1\) as it started: "):
        decoded(decoder, files)


def test_processes_import_what_the_program_would(files, tmp_path, monkeypatch):
    """Where it has put together sys.path by itself, too; Python passes over what is no string there."""
    (tmp_path / "added").mkdir()
    (tmp_path / "added" / "sitecustomize.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()")
    monkeypatch.setattr(sys, "path", [tmp_path, str(tmp_path / "added"), *sys.path])
    with Decoder(CROP, 1) as decoder:
        assert decoded(decoder, files)[0] == [None] * 6
    assert (tmp_path / "imported").exists()


def test_what_is_written_before_the_answers(files, talking):
    with Decoder(CROP, 1) as decoder:
        reasons, out = decoded(decoder, files)
    assert reasons == [None] * 6
    assert np.array_equal(out, [np.asarray(CROP.load(file)) for file in files])


def test_process_that_answers_nonsense(files, tmp_path, monkeypatch):
    """It is not waited for."""
    said = ANSWERS_FOLLOW + b"nonsense"
    lines = ["import sys, time", f"sys.stdout.buffer.write({said!r})", "sys.stdout.flush()", "time.sleep(60)"]
    (tmp_path / "worker.py").write_text("\n".join(lines))
    monkeypatch.setattr(decode, "WORKER", tmp_path / "worker.py")
    with Decoder(CROP, 1) as decoder, pytest.raises(RuntimeError, match=r"ended \(signal 9\) as it started: "):
        decoded(decoder, files)


@pytest.mark.parametrize("sent", [b"", pickle.dumps(b"half of it")[:9]], ids=["nothing", "half"])
def test_process_whose_parent_is_gone(sent):
    """It ends without a word."""
    done = subprocess.run([sys.executable, decode.WORKER], input=sent, capture_output=True, check=True)
    assert not done.stderr


def test_leaving_ends_the_processes(files):
    with Decoder(CROP, 2) as decoder:
        futures = [decoder.submit(files, np.empty((6, *CROP.shape), np.uint8)) for _ in range(50)]
        futures[0].result()
        processes = [process.popen for process in decoder._processes]
    assert processes
    assert all(process.returncode is not None for process in processes)


def test_worker_needs_pillow_alone(files):
    code = (
        "import runpy, sys, io, pickle, os\n"
        f"worker = runpy.run_path({str(decode.WORKER)!r})\n"
        "worker['_pixels']()\n"
        "print(sorted({'torch', 'numpy', 'swinfast'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_draft_is_faster_to_decode_and_changes_pixels(tmp_path):
    file = tmp_path / "large.jpg"
    write_image(file, size=(640, 480))
    plain, draft = (np.asarray(Crop((24, 20), draft=draft).load(file), np.float32) for draft in (False, True))
    assert plain.shape == draft.shape
    assert not np.array_equal(plain, draft)
    assert np.abs(plain - draft).mean() < 16


def test_script_without_a_guard(files, model_folder, tmp_path):
    """Processes do not run the caller's script again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import swinfast\nprint('once')\n"
        f"predictor = swinfast.Predictor(swinfast.create_model({str(model_folder)!r}), workers=2, device='cpu')\n"
        f"print(len(list(predictor.predict({files!r}))))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout == "once\n6\n"
    assert not done.stderr
