"""The loop around the model: order, bounds, memory that runs out, several threads and processes, the same answers."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import randomise
from PIL import Image, ImageFile
from torch import nn

import swinfast
from swinfast.batch import processes
from swinfast.batch.compute import Compute, Waits, find_batch_size
from swinfast.batch.engine import Division, PartEnd
from swinfast.batch.parts import ResumeError
from swinfast.batch.run import Summary
from swinfast.batch.share import Job, StrictError, work
from swinfast.batch.sources import Item
from swinfast.batch.worker import ANSWERS_FOLLOW

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "examples/digits"
CPU = torch.device("cpu")


def total(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"sum": pixels.double().sum(dim=(1, 2, 3))}


def pixels_of(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


class TestOutOfMemory:
    """With a stand-in that has room for some images."""

    def limited(self, most: int):
        sizes = []

        def function(pixels):
            sizes.append(len(pixels))
            if len(pixels) > most:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return total(pixels)

        return function, sizes

    @pytest.mark.parametrize("threads", [0, 1])
    def test_batches_are_halved_once(self, threads):
        function, sizes = self.limited(5)
        said = []
        compute = Compute(function, CPU, threads, said.append)
        for count in (16, 16, 3):
            got = compute.finish(compute.start(pixels_of(count)))
            assert np.array_equal(got["sum"], total(pixels_of(count))["sum"].numpy())
        compute.close()
        assert sizes == [16, 8, 4, 4, 4, 4, 4, 4, 4, 4, 3]
        assert said == [
            "cpu is out of memory with 16 images at a time: going on with 8",
            "cpu is out of memory with 8 images at a time: going on with 4",
        ]

    def test_one_image_too_large(self):
        function, _ = self.limited(0)
        compute = Compute(function, CPU, 0, lambda text: None)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            compute.start(pixels_of(4))

    def test_a_whole_run(self, model, images, tmp_path):
        """The same rows, in order, with the message once."""
        expected = list(swinfast.Predictor(model, batch_size=8, device="cpu").predict(images))
        predictor = swinfast.Predictor(model, batch_size=8, device="cpu")
        forward, said = predictor._forward, []

        def limited(x):
            if len(x) > 4:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return forward(x)

        predictor._forward, predictor.say = limited, said.append
        for result, other in zip(predictor.predict(images), expected, strict=True):
            assert (result.filename, result.indices) == (other.filename, other.indices)
            assert result.probabilities == pytest.approx(other.probabilities, abs=1e-5)
        assert len(said) == 1

    def test_batch_size_is_found_below_the_limit(self):
        function, sizes = self.limited(6)
        assert find_batch_size(function, (4, 4, 3), CPU) <= 4
        assert max(sizes) <= 8

    def test_auto(self, model):
        size = swinfast.Predictor(model, batch_size="auto", device="cpu").batch_size
        assert size in {2**power for power in range(10)}


def test_stream_of_a_gpu(monkeypatch):
    """In order, with stand-ins: the copy on its stream, the model's stream waits for it, results are waited for."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.number = log.count("event")
            log.append("event")

        def record(self):
            log.append(f"record {self.number} on {current[-1]}")

        def synchronize(self):
            log.append(f"synchronize {self.number}")

        def elapsed_time(self, other):
            return 1e3 * (other.number - self.number)

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_event(self, event):
            log.append(f"{self.name} waits for {event.number}")

    class Using:
        def __init__(self, what):
            self.what = what

        def __enter__(self):
            current.append(getattr(self.what, "name", current[-1]))

        def __exit__(self, *exception):
            current.pop()

    current = ["main"]
    stand_ins = {"Event": Event, "Stream": lambda device: Stream("copy"), "stream": Using, "device": Using}
    for name, stand_in in {**stand_ins, "current_stream": lambda: Stream(current[-1])}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: log.append(f"kept for {stream.name}"))
    compute = Compute(lambda pixels: log.append(f"model on {current[-1]}") or total(pixels), CPU, 0, print)
    compute.on_gpu, compute._stream = True, Stream("copy")
    started = compute.start(pixels_of(3))
    assert log[4:] == [
        "record 0 on copy",
        "record 1 on copy",
        "main waits for 1",
        "kept for main",
        "record 2 on main",
        "model on main",
        "record 3 on main",
    ]
    assert np.array_equal(compute.finish(started)["sum"], total(pixels_of(3))["sum"].numpy())
    assert log[-1] == "synchronize 3"
    assert (compute.waits.copy, compute.waits.compute) == (1, 1)


@pytest.mark.parametrize("threads, batch_size", [(0, 2), (2, 1), (0, 4)])
def test_decoding_is_ahead_of_the_model(model, images, threads, batch_size):
    """While a batch is computed, the next two are being decoded."""
    predictor = swinfast.Predictor(model, batch_size=batch_size, threads=threads, workers=1, device="cpu")
    forward, taken, ahead = predictor._forward, 0, []

    def counted():
        nonlocal taken
        for file in images * 4:
            taken += 1
            yield file

    def watched(x):
        ahead.append(taken - batch_size * len(ahead))
        return forward(x)

    results = predictor.predict(counted())
    next(results)
    predictor._forward = watched
    ahead += [0]  # the first batch
    results = list(results)
    assert min(ahead[2:-3]) >= 3 * batch_size


def test_parts_of_large_rows(model, images, tmp_path, monkeypatch):
    """Fewer images make a part where they are large, so that memory is bounded."""
    monkeypatch.setattr("swinfast.batch.run.PART_BYTES", 3 * 16 * 16 * 16 * 4)
    swinfast.FeatureExtractor(model, batch_size=2, stages=[0], device="cpu").write(images, tmp_path / "f.npy")
    settings = json.loads((tmp_path / "f.npy.manifest.json").read_text())["settings"]
    assert settings["part_size"] == 4


@pytest.mark.parametrize("part_size, batch_size", [(6, 2), (6, 4), (5, 5), (1, 1), (100, 3)])
@pytest.mark.parametrize("count", [0, 1, 6, 11, 12])
def test_division(part_size, batch_size, count):
    """Batches do not cross the ends of parts, and parts that are not wanted have the same digests."""
    items = [Item(str(number), str(number)) for number in range(count)]
    division = Division(part_size, batch_size)
    steps = list(division.divide(items, wanted=range(count + 1)))
    batches = [step for step in steps if not isinstance(step, PartEnd)]
    assert [item for batch in batches for item in batch.items] == items
    assert all(len(batch.items) <= batch_size for batch in batches)
    ends = [step for step in steps if isinstance(step, PartEnd)]
    assert [end.images for end in ends] == [part_size] * (count // part_size) + [count % part_size] * (
        count % part_size > 0
    )
    for end in ends:
        assert sum(len(batch.items) for batch in batches if batch.part == end.part) == end.images
    assert list(division.divide(items, set())) == ends
    others = list(division.divide([Item(item.name + "!", item.source) for item in items], set()))
    assert all(end.digest != other.digest for end, other in zip(ends, others, strict=True))


OPTIONS = [
    {"batch_size": 1},
    {"batch_size": 3, "workers": 2},
    {"batch_size": 20, "workers": 0},
    {"batch_size": 2, "threads": 2, "workers": 2},
    {"batch_size": 4, "threads": 3},
    {"batch_size": "auto"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()))
def test_digits_do_not_depend_on_how_they_are_computed(options, bad_images):
    """Top-1 is the same and right, names are in order, and probabilities differ by rounding."""
    model = swinfast.create_model(str(DIGITS))
    names = [str(file) for file in sorted((DIGITS / "images").iterdir())]
    names.insert(7, str(bad_images["cut"]))
    expected = list(swinfast.Predictor(model, device="cpu", workers=1).predict(names))
    results = list(swinfast.Predictor(model, device="cpu", **options).predict(names))
    assert [result.filename for result in results] == names
    assert isinstance(results.pop(7), swinfast.Failure)
    expected.pop(7)
    for result, other in zip(results, expected, strict=True):
        assert result.labels[0] == other.labels[0] == Path(result.filename).name.split("_")[0]
        assert result.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_autocast_region_of_the_caller(model, images):
    """Threads compute in it too."""
    answers = []
    for threads in (0, 1):
        predictor = swinfast.Predictor(model, device="cpu", threads=threads, workers=0)
        answers.append(list(predictor.predict(images)))
        with torch.autocast("cpu", torch.bfloat16):
            answers.append(list(predictor.predict(images)))
    assert answers[1] == answers[3] != answers[0]


def test_one_channel(tmp_path, images):
    model = randomise(swinfast.create_model("swinv2_cr_tiny_224", img_size=32, in_chans=1, depths=(1,), num_heads=(3,)))
    (got,) = swinfast.Embedder(model, device="cpu").extract(images[:1])
    with torch.no_grad():
        model.eval()
        x = swinfast.transform_of(model).load(images[0])[None]
        expected = model.forward_head(model.forward_features(x), pre_logits=True)[0].numpy()
    np.testing.assert_allclose(got.arrays["embedding"], expected, rtol=1e-3, atol=1e-4)


def test_feature_maps(model, images):
    """Those of forward_intermediates, by a whole model and by one with features_only."""
    x = torch.stack([swinfast.transform_of(model).load(file) for file in images])
    with torch.no_grad():
        expected = [each.numpy() for each in model.eval().forward_intermediates(x, intermediates_only=True)]
    extractor = swinfast.FeatureExtractor(model, device="cpu", batch_size=4)
    got = list(extractor.extract(images))
    for stage in (0, 1):
        maps = np.stack([result.arrays[f"stage_{stage}"] for result in got])
        np.testing.assert_allclose(maps, expected[stage], rtol=1e-3, atol=1e-4)
    options = {
        "img_size": 32,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (1, 2),
        "window_size": 4,
    }
    listed = swinfast.create_model("swinv2_cr_tiny_224", **options, features_only=True, out_indices=(1,))
    result = next(swinfast.FeatureExtractor(listed, device="cpu").extract(images))
    assert {name: array.shape for name, array in result.arrays.items()} == {"stage_1": (32, 8, 8)}


@pytest.mark.parametrize("stages", [[2], [0, 0], [-3], [0, -2], []])
def test_wrong_stages(model, stages):
    with pytest.raises(ValueError, match=re.escape(f"stages must be different numbers from -2 to 1, got {stages}")):
        swinfast.FeatureExtractor(model, stages=stages)


@pytest.mark.parametrize("stages", [1, "01", [0.5], ["1"]], ids=repr)
def test_stages_that_are_no_numbers(model, stages):
    with pytest.raises(ValueError, match=re.escape(f"stages must be whole numbers or None, got {stages!r}")):
        swinfast.FeatureExtractor(model, stages=stages)


def test_wrong_models():
    for kind, said in ((swinfast.Embedder, "forward_head"), (swinfast.FeatureExtractor, "features_only=True")):
        with pytest.raises(ValueError, match=f"model must have .*{said}, Linear has"):
            kind(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"threads": -1}, "threads must be at least 0, got -1"),
        ({"batch_size": "large"}, "batch_size must be a whole number or auto, got 'large'"),
    ],
)
def test_wrong_options(model, options, said):
    with pytest.raises(ValueError, match=said):
        swinfast.Predictor(model, **options)


def test_summary_names_the_bottleneck():
    summary = Summary(10, 0, 10, 2.0, Waits(decode=0.5, copy=0.1, compute=1.2, write=0.0))
    assert summary.rate == 5
    assert str(summary).endswith("the bottleneck is compute")
    assert Waits(write=3.0, compute=1.0).bottleneck == "write"


def test_summary_of_nothing(model, tmp_path):
    summary = swinfast.Predictor(model, device="cpu", workers=0).write([], tmp_path / "out.csv")
    assert (str(summary), summary.images) == ("no images", 0)


class TestProcesses:
    """Several devices, with the CPU as each of them."""

    def test_same_file(self, model, images, bad_images, tmp_path):
        images.insert(5, str(bad_images["cut"]))
        seen: list[str] = []
        outputs = [tmp_path / name / "out.csv" for name in ("one", "two")]
        for output, devices in zip(outputs, ((), ("cpu", "cpu")), strict=True):
            output.parent.mkdir()
            predictor = swinfast.Predictor(model, batch_size=2, device="cpu")
            summary = predictor.write(
                images, output, part_size=2, devices=devices, watch=lambda names, reasons: seen.extend(names)
            )
            assert (summary.images, summary.failures, summary.done_now) == (12, 1, 12)
            assert summary.waits.compute > 0
        for name in ("out.csv", "out.csv.errors.csv", "out.csv.manifest.json"):
            assert outputs[0].with_name(name).read_bytes() == outputs[1].with_name(name).read_bytes()
        assert sorted(seen[12:]) == sorted(images)

    def test_settings_of_the_program(self, model, images, bad_images, tmp_path, monkeypatch):
        """Pillow's, and an autocast region, hold in the processes too."""
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        outputs = [tmp_path / name for name in ("here.csv", "there.csv", "plain.csv")]
        predictor = swinfast.Predictor(model, batch_size=2, device="cpu", workers=0)
        predictor.write(images[:3], outputs[2])
        with torch.autocast("cpu", torch.bfloat16):
            for output, devices in zip(outputs, ((), ("cpu",)), strict=False):
                predictor.write([*images[:3], str(bad_images["cut"])], output, devices=devices)
        here, there, plain = (output.read_bytes() for output in outputs)
        assert here == there and not here.startswith(plain)
        assert not (tmp_path / "there.csv.errors.csv").exists()

    @pytest.mark.parametrize("is_error", [True, False])
    def test_warning_of_large_images(self, model, images, tmp_path, monkeypatch, is_error):
        """Where the program makes an error of it, and there alone, the images fail, whoever decodes them."""
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # the images have 1440
        monkeypatch.setenv("PYTHONWARNINGS", "default" if is_error else "error::RuntimeWarning")
        outputs = [tmp_path / str(number) / "out.csv" for number in range(4)]
        with warnings.catch_warnings():
            warnings.simplefilter("error" if is_error else "ignore", Image.DecompressionBombWarning)
            for output, workers, devices in zip(outputs, (0, 1, 0, 1), ((), (), ("cpu",), ("cpu",)), strict=True):
                output.parent.mkdir()
                predictor = swinfast.Predictor(model, device="cpu", workers=workers)
                assert predictor.write(images[:3], output, devices=devices).failures == (3 if is_error else 0)
        for name in ("out.csv", "out.csv.manifest.json", *(["out.csv.errors.csv"] if is_error else [])):
            assert len({output.with_name(name).read_bytes() for output in outputs}) == 1

    def test_float32_precision_of_the_program(self, model, images, matmuls, tmp_path, monkeypatch):
        """It holds in the processes; what was not chosen is left alone there."""
        code = (
            "import sys, torch, swinfast.batch.processes as processes\n"
            "def told(*args):\n"
            "    matmuls = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul\n"
            "    older = torch.get_float32_matmul_precision()\n"
            "    print(*[matmul.fp32_precision for matmul in matmuls], older, file=open(sys.argv[1], 'a'))\n"
            "    return work(*args)\n"
            "processes.work, work = told, processes.work\n"
            "processes.main()"
        )
        monkeypatch.setattr(processes, "CHILD", [sys.executable, "-c", code, str(tmp_path / "told.txt")])
        predictor = swinfast.Predictor(model, device="cpu", workers=0)
        predictor.write(images, tmp_path / "out.csv", devices=("cpu",))
        matmuls["cuda"].fp32_precision, matmuls["cpu"].fp32_precision = "tf32", "bf16"
        predictor.write(images, tmp_path / "out.csv", devices=("cpu",))
        assert (tmp_path / "told.txt").read_text() == "none none highest\ntf32 bf16 medium\n"

    def test_what_is_written_before_the_answers(self, model, images, talking, tmp_path):
        predictor = swinfast.Predictor(model, device="cpu", workers=0)
        assert predictor.write(images, tmp_path / "out.csv", devices=("cpu",)).images == 11

    def test_share(self, model, images, bad_images, tmp_path):
        """A process does every world-th part, leaves what is finished, and tells of the inputs as a whole."""
        images[2] = str(bad_images["cut"])
        pipeline = swinfast.Predictor(model, batch_size=2, device="cpu", workers=0)
        job = Job(pipeline, swinfast.Images(tuple(images)), tmp_path / "out.csv", Division(2, 2), False, {})
        parts, seen = job.parts(), []
        parts.begin(False, job.files())
        shares = []
        for rank, world, there in ((1, 3, {1, 4}), (0, 2, {0, 1, 2, 4}), (0, 1, set(range(6)))):
            shares.append(work(job, lambda names, reasons: seen.extend(names), rank, world))
            assert parts.finished() == there
        assert {(share.parts, share.digest) for share in shares} == {(6, parts.join(6, job.files()).digest)}
        assert seen == images[2:4] + images[8:10] + images[:2] + images[4:6] + images[6:8] + images[10:]
        parts.release()

    def test_inputs_that_change(self, model, images, tmp_path, monkeypatch):
        """While processes start: each reads them by itself."""
        send = processes._send

        def sending(child, device, job, rank, world):
            send(child, device, replace(job, images=swinfast.Images(tuple(images[rank:]))), rank, world)

        monkeypatch.setattr(processes, "_send", sending)
        predictor = swinfast.Predictor(model, batch_size=2, device="cpu")
        with pytest.raises(ResumeError, match=r"process 1 \(cpu\) has read other inputs than process 0 \(cpu\)"):
            predictor.write(images, tmp_path / "out.csv", part_size=2, devices=("cpu", "cpu"))
        assert not (tmp_path / "out.csv").exists()

    @pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT there")
    def test_interrupt_of_this_process_alone(self, request, model, images, tmp_path, monkeypatch):
        """The others are all started at once, and all ended."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
        order, start, send = [], processes.start, processes._send
        lines = ["import sys, threading, time", "threading.Thread(target=sys.stdin.buffer.read, daemon=True).start()"]
        lines += [f"sys.stdout.buffer.write({ANSWERS_FOLLOW!r})"]
        lines += ['print(\'{"names": [], "reasons": []}\', flush=True)', "time.sleep(60)"]
        monkeypatch.setattr(processes, "CHILD", [sys.executable, "-c", "\n".join(lines)])
        monkeypatch.setattr(processes, "start", lambda command: order.append(start(command)) or order[-1])
        monkeypatch.setattr(processes, "_send", lambda *args: order.append("sent") or send(*args))
        signals = iter([signal.SIGINT])
        predictor = swinfast.Predictor(model, batch_size=2, device="cpu")
        with pytest.raises(KeyboardInterrupt):
            predictor.write(
                images,
                tmp_path / "out.csv",
                devices=("cpu", "cpu"),
                watch=lambda *batch: os.kill(os.getpid(), next(signals, 0)),
            )
        assert order[2:] == ["sent", "sent"]
        assert [child.returncode for child in order[:2]] == [-signal.SIGKILL] * 2

    def test_errors(self, model, images, bad_images, tmp_path):
        predictor = swinfast.Predictor(model, batch_size=2, device="cpu")
        files = [*images, str(bad_images["cut"])]
        with pytest.raises(StrictError, match=r"cpu: .*cut.jpg failed"):
            predictor.write(files, tmp_path / "out.csv", part_size=2, devices=("cpu", "cpu"), strict=True)
        with pytest.raises(RuntimeError, match="device 'cuda:77' is not available here"):
            predictor.write(files, tmp_path / "out.csv", devices=("cpu", "cuda:77"))

    def test_process_whose_parent_is_gone(self):
        """It ends without a word."""
        readable, writable = os.pipe()
        os.close(readable)
        streams = {"stdin": subprocess.DEVNULL, "stdout": writable, "stderr": subprocess.PIPE}
        done = subprocess.run(processes.CHILD, **streams, check=False)
        os.close(writable)
        assert (done.returncode, done.stderr) == (1, b"")

    @pytest.mark.slow
    def test_torchrun(self, model_folder, images, tmp_path):
        """Two ranks write one file, the same as one process."""
        options = ["--model", model_folder, "--device", "cpu", "--batch-size", 2, "--part-size", 2, "--output"]
        expected, got = tmp_path / "expected.csv", tmp_path / "got.csv"
        for launcher, output in (["-m"], expected), (["-m", "torch.distributed.run", "--nproc-per-node=2", "-m"], got):
            command = [sys.executable, *launcher, "swinfast", "predict", *images, *options, output]
            subprocess.run(list(map(str, command)), check=True, capture_output=True, cwd=ROOT)
        assert got.read_bytes() == expected.read_bytes()
        assert json.loads((tmp_path / "got.csv.manifest.json").read_text())["totals"]["images"] == 11


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(model_folder, images, tmp_path):
    """The peak of a run over ten times as many images is the same, but for a few MB."""
    code = (
        "import resource, sys, swinfast\n"
        "files = swinfast.Images(files_from=sys.argv[2])\n"
        "predictor = swinfast.Predictor(swinfast.create_model(sys.argv[1]), workers=1, device='cpu')\n"
        "predictor.write(files, sys.argv[3], part_size=64)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = []
    for count in (500, 5000):
        (tmp_path / "list.txt").write_text("\n".join(images[i % 11] for i in range(count)))
        arguments = [model_folder, tmp_path / "list.txt", tmp_path / f"{count}.csv"]
        done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, cwd=ROOT)
        with (tmp_path / f"{count}.csv").open() as stream:
            assert sum(1 for _ in csv.reader(stream)) == count + 1
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 40, f"{peaks} MiB"


def test_rank_of_torchrun_is_refused_with_devices(model, images, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="devices can't be given under torchrun"):
        swinfast.Predictor(model, device="cpu").write(images, tmp_path / "out.csv", devices=("cpu", "cpu"))
