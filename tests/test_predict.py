"""Finding image files and classifying them: find_images and Predictor."""

import os
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_images, read_csv, write_image
from PIL import Image
from torch import nn

import swinfast
from swinfast.batch.share import StrictError
from swinfast.batch.sources import find_images


@pytest.fixture
def images(tmp_path) -> list[Path]:
    return [write_image(tmp_path / f"image_{seed}.png", seed, size=(36, 40 + seed)) for seed in range(7)]


@pytest.fixture(scope="module")
def model(model_folder) -> nn.Module:
    return swinfast.create_model(str(model_folder)).eval()


def test_under_another_default_device(model, images):
    predictor = swinfast.Predictor(model, device="cpu", workers=0)
    expected = list(predictor.predict(images))
    with torch.device("meta"):
        assert list(predictor.predict(images)) == expected
        assert swinfast.Predictor(model, device="cpu", batch_size="auto", workers=0).batch_size >= 1


class TestFindImages:
    @pytest.fixture(autouse=True)
    def here(self, tmp_path, monkeypatch):
        for name in ("b.png", "a.JPG", "sub/c.jpeg", "sub/deep/d.webp", "sub/e.bmp"):
            write_image(tmp_path / "photos" / name)
        for name in ("notes.txt", "clip.mp4", "paper.pdf", "no_ending"):
            (tmp_path / "photos" / name).touch()
        (tmp_path / "photos" / "folder.png").mkdir()
        monkeypatch.chdir(tmp_path)

    def test_folder(self):
        found = find_images(["photos"])
        names = ("a.JPG", "b.png", "sub/c.jpeg", "sub/deep/d.webp", "sub/e.bmp")
        assert found == [str(Path("photos", name)) for name in names]

    @pytest.mark.parametrize(
        "pattern, expected",
        [
            ("photos/*.png", ["photos/b.png"]),
            ("photos/**/*.[jw]*", ["photos/sub/c.jpeg", "photos/sub/deep/d.webp"]),
            ("photos/sub/?.*", ["photos/sub/c.jpeg", "photos/sub/e.bmp"]),
            ("photos/*.txt", ["photos/notes.txt"]),
            ("photos/*.none", ["photos/*.none"]),
        ],
        ids=["star", "recursive", "question mark", "no image, but asked for", "no match"],
    )
    def test_pattern(self, pattern, expected):
        assert find_images([pattern]) == [str(Path(path)) for path in expected]

    def test_absolute_pattern(self, tmp_path):
        assert find_images([f"{tmp_path}/photos/sub/*.bmp"]) == [str(tmp_path / "photos/sub/e.bmp")]

    def test_several_in_the_order_given(self):
        paths = ["photos/sub/e.bmp", Path("photos/sub/deep"), "nothing.png", "photos/b*", "photos/sub/e.bmp"]
        found = find_images(paths)
        assert [Path(path).name for path in found] == ["e.bmp", "d.webp", "nothing.png", "b.png", "e.bmp"]

    def test_brackets_in_the_name_of_a_file(self):
        write_image(Path("photos/x[1].png"))
        assert find_images(["photos/x[1].png"]) == ["photos/x[1].png"]

    def test_archives(self):
        """They are images where they are named, and not where they are found."""
        names = ["photos/x.tar", "photos/x.parquet", "photos/sub/y.tar.gz", "photos/sub/z.TAR"]
        for name in names:
            Path(name).touch()
        assert find_images(["photos/sub"]) == [f"photos/sub/{name}" for name in ("c.jpeg", "deep/d.webp", "e.bmp")]
        assert find_images(["photos/b*", *map(Path, names)]) == ["photos/b.png", *names]

    def test_none(self):
        Path("empty").mkdir()
        assert find_images(["empty"]) == []
        assert find_images([]) == []

    @pytest.mark.parametrize("ending", ["mpo", "tif", "gif", "avif", "ppm", "JPEG"])
    def test_readable_endings(self, ending):
        Path("more").mkdir()
        Path(f"more/x.{ending}").touch()
        assert find_images(["more"]) == [str(Path(f"more/x.{ending}"))]


def test_top_classes_are_the_models(model, images):
    predictor = swinfast.Predictor(model, batch_size=3, topk=4, device="cpu")
    results = list(predictor.predict(images))
    assert [result.filename for result in results] == [str(file) for file in images]
    transform = swinfast.transform_of(model)
    with torch.no_grad():
        logits = model(torch.stack([transform.load(file) for file in images]))
    assert len({result.indices for result in results}) > 1
    for result, row in zip(results, logits.softmax(dim=-1), strict=True):
        expected = row.sort(descending=True)
        assert list(result.indices) == expected.indices[:4].tolist()
        assert list(result.probabilities) == pytest.approx(expected.values[:4].tolist(), abs=1e-5)
        assert result.labels == tuple(f"class {index}" for index in result.indices)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_batch_size_does_not_matter(model, images, batch_size):
    expected = list(swinfast.Predictor(model, batch_size=3).predict(images))
    for result, other in zip(swinfast.Predictor(model, batch_size=batch_size).predict(images), expected, strict=True):
        assert (result.filename, result.indices, result.labels) == (other.filename, other.indices, other.labels)
        assert result.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_numbers_of_any_integral_type(model, images, tmp_path):
    """The manifest has them too."""
    predictor = swinfast.Predictor(model, batch_size=np.int64(3), workers=np.int32(0), topk=np.uint8(2))
    for part_size in (None, np.int64(4)):
        assert predictor.write(images, tmp_path / "out.jsonl", part_size=part_size).images == 7


@pytest.mark.parametrize(
    "options, message",
    [
        ({"part_size": "7"}, "part_size must be a whole number, got '7'"),
        ({"part_size": 1.5}, "part_size must be a whole number, got 1.5"),
        ({"part_size": True}, "part_size must be a whole number, got True"),
        ({"part_size": np.int64(0)}, "part_size must be at least 1, got 0"),
        ({"devices": "cpu"}, "devices must be several names, got 'cpu'"),
    ],
    ids=["string", "float", "True", "NumPy's 0", "one device"],
)
def test_error_for_wrong_options_of_write(model, images, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        swinfast.Predictor(model, device="cpu", workers=0).write(images, tmp_path / "out.csv", **options)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
def test_failures_are_in_their_places(model, images, bad_images, batch_size):
    bad = bad_images
    files = [bad["text"], images[0], bad["empty"], images[1], images[2], bad["cut"], bad["missing"], images[3]]
    results = list(swinfast.Predictor(model, batch_size=batch_size).predict(map(str, files)))
    assert [result.filename for result in results] == [str(file) for file in files]
    reasons = {Path(r.filename).stem: r.reason for r in results if isinstance(r, swinfast.Failure)}
    assert set(reasons) == set(bad)
    assert "cannot identify image file" in reasons["text"]
    assert "cannot identify image file" in reasons["empty"]
    assert "truncated" in reasons["cut"]
    assert reasons["missing"].startswith("FileNotFoundError")
    alone = list(swinfast.Predictor(model, batch_size=batch_size).predict(images[:4]))
    good = [result for result in results if isinstance(result, swinfast.Prediction)]
    for result, expected in zip(good, alone, strict=True):
        assert (result.filename, result.indices) == (expected.filename, expected.indices)
        assert result.probabilities == pytest.approx(expected.probabilities, abs=1e-5)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("workers", [0, 1])
def test_paths_of_no_regular_files(model, images, tmp_path, workers):
    """Failures too. Whoever opened the pipe would find its end, and not wait for ever."""
    paths = [str(images[0]), "a\0b.jpg", str(tmp_path / "pipe.png"), str(images[1])]
    os.mkfifo(paths[2])
    writer = threading.Thread(target=lambda: os.close(os.open(paths[2], os.O_WRONLY)))
    writer.start()
    try:
        summary = swinfast.Predictor(model, device="cpu", workers=workers).write(paths, tmp_path / "out.csv")
    finally:
        reader = os.open(paths[2], os.O_RDONLY | os.O_NONBLOCK)
        writer.join()
        os.close(reader)
    assert (summary.images, summary.failures) == (4, 2)
    assert [row[0] for row in read_csv(tmp_path / "out.csv")[1:]] == [paths[0], paths[3]]
    (nul, no_path), failed_pipe = read_csv(tmp_path / "out.csv.errors.csv")[1:]
    assert nul == paths[1] and no_path.startswith("ValueError: ") and "null" in no_path
    assert failed_pipe == [paths[2], "OSError: no regular file"]


@pytest.mark.parametrize("error", [RuntimeError, IndexError, MemoryError, Image.DecompressionBombError, SyntaxError])
def test_any_error_of_a_decoder_is_a_failure(model, images, monkeypatch, error):
    opened = Image.open

    def fail(path, *args, **kwargs):
        if Path(path) == images[1]:
            raise error("damaged")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Image, "open", fail)
    results = list(swinfast.Predictor(model, workers=0).predict(images))
    assert [isinstance(result, swinfast.Failure) for result in results] == [index == 1 for index in range(7)]
    assert results[1].reason == f"{error.__name__}: damaged"


def test_files_are_taken_as_they_are_needed(model, images):
    """Neither the list of files nor the decoded images need fit in memory."""
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            assert taken < 1000, "files are taken without end"
            yield images[taken % 7]

    results = swinfast.Predictor(model, batch_size=2, workers=1).predict(endless())
    for _ in range(9):
        next(results)
    results.close()
    assert 9 <= taken <= 9 + 3 * 2


class TestWhatIsTaken:
    """predict and extract take what write takes."""

    def test_folders_patterns_and_archives(self, model, photos, tmp_path):
        with tarfile.open(photos / "more.tar", "w") as archive:
            archive.add(photos / "a.png", "x.png")
        paths = [photos / "sub", f"{photos}/*.png", photos / "more.tar", str(photos / "b.jpg")]
        names = ["sub/c.webp", "sub/d.bmp", "a.png", "e.png", "more.tar/x.png", "b.jpg"]
        predictor = swinfast.Predictor(model, device="cpu")
        predictor.write(paths, tmp_path / "out.csv")
        assert [row[0] for row in read_csv(tmp_path / "out.csv")[1:]] == [str(photos / name) for name in names]
        for files in (paths, iter(paths)):
            assert [result.filename for result in predictor.predict(files)] == [str(photos / name) for name in names]
        embedder = swinfast.Embedder(model, device="cpu")
        assert [result.filename for result in embedder.extract(paths)] == [str(photos / name) for name in names]

    def test_one_path(self, model, photos):
        predictor = swinfast.Predictor(model, device="cpu")
        for path in (photos / "sub", str(photos / "sub")):
            names = [result.filename for result in predictor.predict(path)]
            assert names == [str(photos / "sub/c.webp"), str(photos / "sub/d.bmp")]

    def test_entries_of_a_folder(self, model, photos):
        with os.scandir(photos / "sub") as entries:
            results = list(swinfast.Predictor(model, device="cpu").predict(entries))
        assert sorted(result.filename for result in results) == [str(photos / "sub/c.webp"), str(photos / "sub/d.bmp")]

    @pytest.mark.parametrize(
        "files, got",
        [
            (None, "NoneType"),
            (b"a.png", "bytes"),
            (Image.new("RGB", (8, 8)), "Image"),
            (7, "int"),
            (["a.png", None], "NoneType"),
            ([b"a.png"], "bytes"),
            ([Image.new("RGB", (8, 8))], "Image"),
            (np.zeros((2, 8, 8, 3)), "ndarray"),
            ([torch.zeros(3, 8, 8)], "Tensor"),
            ([["a.png"]], "list"),
        ],
        ids=[
            "None", "bytes", "image", "number", "None among paths", "list of bytes", "list of images", "array",
            "list of tensors", "nested list",
        ],
    )  # fmt: skip
    def test_something_else(self, model, tmp_path, files, got):
        said = f"must be paths, one or several, or Images, got {got}$"
        predictor = swinfast.Predictor(model, device="cpu", workers=0)
        with pytest.raises(TypeError, match=f"files {said}"):
            list(predictor.predict(files))
        with pytest.raises(TypeError, match=f"files {said}"):
            list(swinfast.Embedder(model, device="cpu", workers=0).extract(files))
        with pytest.raises(TypeError, match=f"images {said}"):
            predictor.write(files, tmp_path / "out.csv")
        assert not (tmp_path / "out.csv").exists()


class TestOutputsThatAreNotFinite:
    """They are failures in their places: here those of the second readable image of each batch."""

    REASON = "the model's output is not finite"

    @pytest.fixture(params=["predictions", "embeddings", "features"])
    def pipelines(self, request, model):
        """The same twice, the second one spoilt."""
        kinds = {kind.what: kind for kind in (swinfast.Predictor, swinfast.Embedder, swinfast.FeatureExtractor)}
        good, spoilt = (kinds[request.param](model, device="cpu", batch_size=4, workers=0) for _ in range(2))
        forward = spoilt._forward

        def with_a_nan(images):
            outputs = forward(images)
            for output in outputs.values():
                if output.is_floating_point():
                    output[1:2, ..., -1] = float("nan") if request.param == "predictions" else float("inf")
            return outputs

        spoilt._forward = with_a_nan
        return good, spoilt

    @pytest.fixture
    def files(self, images, bad_images) -> list[str]:
        return list(map(str, [images[0], bad_images["text"], *images[1:4]]))

    def test_one_by_one(self, pipelines, files):
        expected, got = (
            list(pipeline.predict(files) if isinstance(pipeline, swinfast.Predictor) else pipeline.extract(files))
            for pipeline in pipelines
        )
        assert [result.filename for result in got] == files
        assert got[2] == swinfast.Failure(files[2], self.REASON)
        assert got[1] == expected[1] and "cannot identify" in got[1].reason
        for place in (0, 3, 4):
            if isinstance(got[place], swinfast.Prediction):
                assert got[place] == expected[place]
            else:
                for name, array in got[place].arrays.items():
                    assert np.array_equal(array, expected[place].arrays[name])

    def test_file(self, pipelines, files, tmp_path):
        _, spoilt = pipelines
        output = tmp_path / ("out.csv" if isinstance(spoilt, swinfast.Predictor) else "out.npy")
        summary = spoilt.write(files, output)
        assert (summary.images, summary.failures) == (5, 2)
        failed = read_csv(tmp_path / f"{output.name}.errors.csv")[1:]
        assert [name for name, _ in failed] == files[1:3] and failed[1][1] == self.REASON
        index = output if isinstance(spoilt, swinfast.Predictor) else tmp_path / "out.index.csv"
        assert [row[0] for row in read_csv(index)[1:]] == [files[0], *files[3:]]
        for file in tmp_path.glob("*.npy"):
            assert len(np.load(file)) == 3 and np.isfinite(np.load(file)).all()

    def test_strict(self, pipelines, files, tmp_path):
        with pytest.raises(StrictError, match=self.REASON):
            pipelines[1].write([files[0], *files[2:]], tmp_path / "out.parquet", strict=True)


def test_no_files(model):
    assert list(swinfast.Predictor(model).predict([])) == []


def test_topk_beyond_the_classes(model, images):
    (result,) = swinfast.Predictor(model, topk=50).predict(images[:1])
    assert sorted(result.indices) == list(range(10))
    assert sum(result.probabilities) == pytest.approx(1, abs=1e-5)
    assert list(result.probabilities) == sorted(result.probabilities, reverse=True)


def test_call_on_tensors(model):
    predictor = swinfast.Predictor(model, topk=3)
    x = random_images(5, 3, 32, 32)
    probabilities, indices = predictor(x)
    with torch.no_grad():
        expected = model(x).softmax(dim=-1).topk(3)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(probabilities, expected.values, rtol=1e-4, atol=1e-6)


def test_call_on_uint8(model):
    """Pixels 0..255 are normalised by the model."""
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = swinfast.transform_of(model)
    prepared = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in pixels])
    predictor = swinfast.Predictor(model, topk=10)
    (got, indices), (expected, expected_indices) = predictor(pixels), predictor(prepared)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_plain_or_optimized_model_is_left_as_it_is(model, images):
    plain = swinfast.create_model("swinv2_cr_tiny_224", img_size=32, num_classes=3, depths=(1,), num_heads=(3,))
    for given in (plain, swinfast.optimize(model)):
        given.train()
        before = type(given.stages[0]), [value.clone() for value in given.state_dict().values()]
        results = list(swinfast.Predictor(given, dtype=torch.float64).predict(images[:2]))
        assert all(isinstance(result, swinfast.Prediction) for result in results)
        assert given.training
        assert type(given.stages[0]) is before[0]
        assert all(torch.equal(*pair) for pair in zip(given.state_dict().values(), before[1], strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype(model, images, dtype):
    expected = list(swinfast.Predictor(model, topk=10).predict(images))
    predictor = swinfast.Predictor(model, topk=10, dtype=dtype)
    assert {parameter.dtype for parameter in predictor.model.parameters()} == {dtype}
    for result, other in zip(predictor.predict(images), expected, strict=True):
        by_class = dict(zip(result.indices, result.probabilities, strict=True))
        assert [by_class[index] for index in other.indices] == pytest.approx(other.probabilities, abs=0.05)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": np.int64(0)}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": torch.tensor(0)}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": True}, ValueError, "batch_size must be a whole number or auto, got True"),
        ({"batch_size": 2.0}, ValueError, "batch_size must be a whole number or auto, got 2.0"),
        ({"batch_size": None}, ValueError, "batch_size must be a whole number or auto, got None"),
        ({"workers": np.int64(-1)}, ValueError, "workers must be at least 0, got -1"),
        ({"workers": "auto"}, ValueError, "workers must be a whole number, got 'auto'"),
        ({"threads": 1.5}, ValueError, "threads must be a whole number, got 1.5"),
        ({"topk": 0}, ValueError, "topk must be at least 1, got 0"),
        ({"topk": 2.0}, ValueError, "topk must be a whole number, got 2.0"),
        ({"labels": "abcdefghij"}, ValueError, "labels must be several strings, got 'abcdefghij'"),
        ({"labels": 10}, ValueError, "labels must be several strings, got 10"),
        ({"labels": range(10)}, ValueError, "labels must be strings, got 0"),
        ({"dtype": torch.int8}, ValueError, "dtype must be one of .* or None, got torch.int8"),
        ({"dtype": "float32"}, ValueError, "got 'float32'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'torch', 'triton', got 'cuda'"),
        ({"device": "cuda:77"}, RuntimeError, "device 'cuda:77' is not available here: "),
    ],
    ids=[
        "batch_size", "NumPy's 0", "a tensor's 0", "batch_size of True", "float", "None", "workers", "auto workers",
        "threads", "topk", "topk of float", "labels in one", "number of labels", "labels of numbers", "dtype",
        "dtype by name", "backend", "missing device",
    ],
)  # fmt: skip
def test_error_for_wrong_options(model, options, error, message):
    with pytest.raises(error, match=message):
        swinfast.Predictor(model, **options)


@pytest.mark.parametrize("device", ["toaster", "cuda:x", "", None, 0.5], ids=repr)
def test_error_for_what_is_no_device(model, device):
    message = f'device must be "auto" or a device such as "cpu" or "cuda:1", got {device!r}'
    with pytest.raises(ValueError, match=f"^{message}$"):
        swinfast.Predictor(model, device=device)


def test_error_for_wrong_models():
    for options in ({"num_classes": 0}, {"features_only": True}):
        model = swinfast.create_model("swinv2_cr_tiny_224", **options, device="meta")
        with pytest.raises(ValueError, match="model must be a classifier"):
            swinfast.Predictor(model)
    with pytest.raises(ValueError, match="model must be a classifier, Linear has num_classes=0"):
        swinfast.Predictor(nn.Linear(2, 2))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_filename_that_is_no_text(model, tmp_path):
    file = write_image(tmp_path / os.fsdecode(b"caf\xe9.png"))
    (result,) = swinfast.Predictor(model).predict(find_images([tmp_path]))
    assert result.filename == str(file)
