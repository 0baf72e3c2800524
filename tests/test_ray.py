"""swinfast.ray: its classes for map_batches, and whole runs on a cluster of several nodes, one of which is lost."""

import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from helpers import write_image

import swinfast
import swinfast.ray

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
fs = pytest.importorskip("pyarrow.fs")


@pytest.fixture
def images(tmp_path) -> list[Path]:
    return [write_image(tmp_path / "photos" / f"{seed:02}.png", seed) for seed in range(9)]


def rows_of(model_folder, files, output: Path) -> list[dict]:
    """Of the single-machine run."""
    predictor = swinfast.Predictor(swinfast.create_model(str(model_folder)), topk=3, device="cpu")
    predictor.write(files, output)
    return parquet.read_table(output).to_pylist()


def same(got: list[dict], expected: list[dict]) -> bool:
    """Rows are the same, in the same order, but for rounding."""

    def discrete(rows):
        return [{key: value for key, value in row.items() if "prob" not in key} for row in rows]

    def probabilities(rows):
        return np.array([[value for key, value in row.items() if "prob" in key] for row in rows])

    return discrete(got) == discrete(expected) and np.allclose(probabilities(got), probabilities(expected), atol=2e-6)


@pytest.mark.parametrize("given", ["bytes", "pixels"])
def test_predictor_as_map_batches_calls_it(model_folder, images, bad_images, tmp_path, given):
    files = [str(file) for file in [images[0], bad_images["cut"], *images[1:4], bad_images["text"]]]
    actor = swinfast.ray.Predictor(str(model_folder), topk=3, device="cpu")
    if given == "bytes":
        batch = {"path": np.array(files), "bytes": np.array([Path(f).read_bytes() for f in files], dtype=object)}
    else:
        batch = swinfast.ray.decode(swinfast.create_model(str(model_folder)))({"filename": np.array(files)})
    table = actor(batch).to_pylist()
    assert [row["filename"] for row in table] == files
    failures = {row["filename"]: row for row in table if row["error"] is not None}
    assert list(failures) == [files[1], files[5]]
    assert "truncated" in failures[files[1]]["error"]
    assert all(value is None for key, value in failures[files[1]].items() if key.startswith("top"))
    good = [row for row in table if row.pop("error") is None]
    assert same(good, rows_of(model_folder, files, tmp_path / "expected.parquet"))


def test_only_failures(model_folder, bad_images):
    actor = swinfast.ray.Embedder(swinfast.create_model(str(model_folder)), device="cpu")
    (row,) = actor({"filename": np.array([str(bad_images["text"])]), "bytes": np.array([b"text"], object)}).to_pylist()
    assert row["embedding"] is None
    assert "cannot identify" in row["error"]


class TestBatches:
    @pytest.fixture
    def actor(self, model_folder) -> swinfast.ray.Predictor:
        return swinfast.ray.Predictor(str(model_folder), topk=1, device="cpu")

    def test_columns_of_others(self, actor, images):
        """They are left out, whatever they are called."""
        others = {"order": np.array(["A-17"]), "label": np.array(["cat"])}
        batch = {"path": np.array(["a.png"]), "bytes": np.array([images[0].read_bytes()], object)}
        assert actor(batch | others).equals(actor(batch))

    def test_bytes_of_other_types(self, actor, images):
        data = images[0].read_bytes()
        values = np.array([data, bytearray(data), memoryview(data), None, str(images[0])], object)
        rows = actor({"path": np.array([*"abcde"]), "bytes": values}).to_pylist()
        assert len({row["top1_prob"] for row in rows[:3]}) == 1
        for row, kind in zip(rows[3:], ("NoneType", "str"), strict=True):
            assert row["top1_prob"] is None
            assert row["error"] == f"TypeError: memoryview: a bytes-like object is required, not '{kind}'"

    @pytest.mark.parametrize("columns", [("path", "image"), ("bytes", "label")])
    def test_columns_that_are_missing(self, actor, columns):
        said = f"columns filename or path, and pixels or bytes, got {', '.join(columns)}"
        with pytest.raises(ValueError, match=said):
            actor({name: np.array([b""]) for name in columns})

    @pytest.mark.parametrize(
        "pixels, got",
        [
            (np.zeros((1, 32, 32, 3), np.float32), r"float32 \[1, 32, 32, 3\]"),
            (np.zeros((1, 3, 32, 32), np.uint8), r"uint8 \[1, 3, 32, 32\]"),
            (np.zeros(1, np.int64), r"int64 \[1\]"),
        ],
        ids=["float32", "channels first", "a number"],
    )
    def test_other_pixels(self, actor, pixels, got):
        with pytest.raises(ValueError, match=rf"pixels must be uint8 \[B, H, W, 3\], got {got}"):
            actor({"filename": np.array(["a.png"]), "pixels": pixels})

    def test_pixels_alone(self, actor):
        (row,) = actor({"path": np.array(["a.png"]), "pixels": np.zeros((1, 32, 32, 3), np.uint8)}).to_pylist()
        assert row["error"] is None and row["top1_prob"] > 0


def test_embedder(model_folder, images):
    model = swinfast.create_model(str(model_folder))
    expected = [result.arrays["embedding"] for result in swinfast.Embedder(model, device="cpu").extract(images)]
    batch = swinfast.ray.decode(model)({"filename": np.array(list(map(str, images)))})
    table = swinfast.ray.Embedder(model, device="cpu")(batch)
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), expected, rtol=1e-3, atol=1e-4)


def read(name, filesystem=None) -> bytes:
    """What a crop is given of a file."""
    return swinfast.ray._OfNames(SimpleNamespace(load=lambda source: source), filesystem).load(name)


def test_names_of_any_filesystem(images, tmp_path):
    """URIs, and paths of a filesystem that is given."""
    (tmp_path / "photos" / "notes.txt").touch()
    uri = (tmp_path / "photos").as_uri()
    assert list(swinfast.ray._names([uri], None)) == [f"{uri}/{file.name}" for file in images]
    inside = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    names = list(swinfast.ray._names(["photos", "nothing.png"], inside))
    assert names == [f"photos/{file.name}" for file in images] + ["nothing.png"]
    assert read(names[0], inside) == images[0].read_bytes()
    assert read(f"{uri}/{images[1].name}") == images[1].read_bytes()


def test_names_that_uris_escape(tmp_path):
    """Each URI means the file that was found, and what comes after its path stays there."""
    names = ["[1] 50%.png", "a b.png", "a#b?.png", "a%62.png", "ab.png", "sub dir/a+b.png", "ä.png"]
    for name in names:
        (tmp_path / "100% mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "100% mine" / name).write_text(name)
    uri = (tmp_path / "100% mine").as_uri()
    assert [read(found).decode() for found in swinfast.ray._names([uri], None)] == names
    first = next(swinfast.ray._names([f"{uri}/?mode=slow"], None))
    assert first == f"{uri}/%5B1%5D%2050%25.png?mode=slow"


def test_archives_in_folders_are_left_out(images, tmp_path):
    """The same on disks as elsewhere; one that is named is told to be no image."""
    folder = tmp_path / "photos"
    for name in ("shard.tar", "rows.parquet"):
        (folder / name).touch()
    names = list(map(str, images))
    assert list(swinfast.ray._names([str(folder)], None)) == names
    assert [name.removeprefix("file://") for name in swinfast.ray._names([folder.as_uri()], None)] == names
    assert list(swinfast.ray._names([f"{folder}/shard.tar", names[0]], None)) == [f"{folder}/shard.tar", names[0]]


def write_older(folder: Path) -> None:
    """What an older run may have left."""
    folder.mkdir()
    parquet.write_table(arrow.table({"filename": ["older.png"]}), folder / "older.parquet")


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def stand_in(monkeypatch) -> SimpleNamespace:
    """For Ray, with a cluster of 8 cores and 2 GPUs; it does no more than tell what it was asked for."""
    asked = SimpleNamespace(inits=0, actors=None, folder=None)

    class Dataset:
        context = SimpleNamespace(execution_options=SimpleNamespace())

        def map_batches(self, function, **options):
            asked.actors = options
            return self

        def write_parquet(self, folder, filesystem):
            asked.folder = folder
            raise StopIteration

    def init():
        asked.inits += 1

    ray, data = ModuleType("ray"), ModuleType("ray.data")
    ray.init, ray.is_initialized = init, lambda: asked.inits > 0
    ray.cluster_resources = lambda: {"CPU": 8.0, "GPU": 2.0} if asked.inits else pytest.fail("before ray.init")
    data.from_items = lambda items, **options: Dataset()
    data.ActorPoolStrategy = lambda **sizes: sizes
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
    return asked


def test_resources_of_the_cluster(stand_in, model_folder, images, tmp_path):
    """They are read whether Ray was started before or is now."""
    for options, actors, gpus in (({}, 2, 1), ({"num_gpus": 0.5}, 4, 0.5), ({"num_gpus": 0}, 4, None)):
        with pytest.raises(StopIteration):
            swinfast.ray.predict(images, str(tmp_path / "out"), model=str(model_folder), **options)
        assert stand_in.actors["compute"] == {"min_size": actors, "max_size": actors}
        assert stand_in.actors["num_gpus"] == gpus
    assert stand_in.inits == 1


def test_an_output_by_a_relative_path(stand_in, model_folder, images, tmp_path, monkeypatch):
    """It is of the program's folder; the cluster's processes are in others."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StopIteration):
        swinfast.ray.predict(images, "out", model=str(model_folder))
    assert stand_in.folder == str(tmp_path / "out.unfinished")


class TestOutputs:
    """What was there is there still when a run is refused, and while one computes."""

    @pytest.fixture
    def refused(self, stand_in, images, model_folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

        def run(said: str, paths: str | list[str], output: str, **options) -> None:
            before = contents(tmp_path)
            with pytest.raises(ValueError, match=said):
                swinfast.ray.predict(paths, output, model=str(model_folder), **options)
            assert contents(tmp_path) == before

        return run

    @pytest.mark.parametrize("path", ["{}/photos", "photos", "{}/photos/00.png", "photos/*.png", "file://{}/photos"])
    @pytest.mark.parametrize("output", ["{}", "{}/photos", "photos/", "file://{}", "link"])
    def test_around_inputs(self, refused, tmp_path, path, output):
        (tmp_path / "link").symlink_to("photos")
        refused("must be apart, one is in the other", ["a.png", path.format(tmp_path)], output.format(tmp_path))

    def test_inside_of_inputs(self, refused, tmp_path):
        for output in ("photos/out", f"{tmp_path}/photos/a/out", f"file://{tmp_path}/photos/out", "photos/00.png"):
            refused("must be apart, one is in the other", "photos", output)
        inside = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
        refused("must be apart, one is in the other", "/photos", "photos/out", filesystem=inside)

    @pytest.mark.parametrize("folder", ["out", "out.errors", "out.unfinished", "out.new", "out.errors.new"])
    @pytest.mark.parametrize("name", ["notes.txt", "more/older.parquet", ""])
    def test_that_others_wrote(self, refused, tmp_path, folder, name):
        (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_text("text")
        refused("must be new, or hold parquet files alone: ", "photos", "out")

    def test_older_ones_stay_while_it_computes(self, stand_in, model_folder, images, tmp_path):
        for name in ("out", "out.errors", "out.unfinished"):
            write_older(tmp_path / name)
        before = contents(tmp_path)
        with pytest.raises(StopIteration):
            swinfast.ray.predict(images, str(tmp_path / "out"), model=str(model_folder))
        del before[tmp_path / "out.unfinished/older.parquet"]
        assert contents(tmp_path) == before

    @pytest.fixture
    def write(self, stand_in, tmp_path, monkeypatch):
        """Writes three images' results, of them one failure or all, as tables that stand in for Ray's data sets."""

        class Rows:
            context = SimpleNamespace(execution_options=SimpleNamespace())

            def __init__(self, table: "arrow.Table"):
                self.table, self.count = table, lambda: table.num_rows

            def map_batches(self, function, **options):
                return Rows(function(self.table))

            def sort(self, column):
                return Rows(self.table.sort_by(column))

            def materialize(self):
                return self

            def write_parquet(self, folder, filesystem):
                where, path = swinfast.ray._located(folder, filesystem)
                if not self.table.num_rows:
                    return
                where.create_dir(path)
                parquet.write_table(self.table, f"{path}/{self.table.num_rows}.parquet", filesystem=where)
                if broken and not folder.endswith(".unfinished"):
                    raise OSError("no space left on device")

        def read(folder, filesystem):
            where, path = swinfast.ray._located(folder, filesystem)
            return Rows(parquet.read_table(path, filesystem=where))

        broken = []
        sys.modules["ray.data"].read_parquet = read
        order, names = swinfast.ray.ORDER, ["two", "one", "three"]

        def run(given=3, fails=False, filesystem=None, errors=(None, None, "cut")) -> swinfast.ray.Summary:
            broken.extend([True] * fails)
            table = arrow.table({"filename": names, "error": errors, order: [1, 0, 2]})
            output = "out" if filesystem else str(tmp_path / "out")
            return swinfast.ray._write(Rows(table), output, filesystem, given)

        return run

    @pytest.mark.parametrize("renames", [True, False])
    def test_they_are_replaced(self, write, tmp_path, renames):
        for name in ("out", "out.errors", "out.new"):
            write_older(tmp_path / name)
        filesystem = None if renames else fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
        assert write(filesystem=filesystem) == swinfast.ray.Summary(images=3, failures=1)
        assert parquet.read_table(tmp_path / "out").to_pylist() == [{"filename": "one"}, {"filename": "two"}]
        assert parquet.read_table(tmp_path / "out.errors").to_pylist() == [{"filename": "three", "reason": "cut"}]
        left = {"out", "out.errors"} | ({"out.new"} if not renames else set())
        assert {folder.name for folder in tmp_path.iterdir()} - {"photos"} == left

    def test_failures_alone(self, write, tmp_path):
        for name in ("out", "out.errors"):
            write_older(tmp_path / name)
        assert write(errors=["cut"] * 3) == swinfast.ray.Summary(images=3, failures=3)
        assert {folder.name for folder in tmp_path.iterdir()} - {"photos"} == {"out.errors"}

    @pytest.mark.parametrize("options, error", [({"given": 4}, RuntimeError), ({"fails": True}, OSError)])
    def test_older_ones_stay_when_it_fails(self, write, tmp_path, options, error):
        """Ray gives less than all, or new ones can't be written."""
        for name in ("out", "out.errors"):
            write_older(tmp_path / name)
        before = contents(tmp_path)
        with pytest.raises(error, match=r"Ray gave results of 3 images, 4 were given|no space"):
            write(**options)
        assert before.items() <= contents(tmp_path).items()
        assert parquet.read_table(tmp_path / "out.unfinished").num_rows == 3


def test_without_ray(model_folder, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeError, match=r"needs ray, which is not installed: pip install 'swinfast\[ray\]'"):
        swinfast.ray.predict(images, "out", model=str(model_folder))


@pytest.fixture
def cluster():
    """A head without CPUs, so that all work is done on two more nodes."""
    ray = pytest.importorskip("ray")
    utils = pytest.importorskip("ray.cluster_utils")
    small = {"object_store_memory": 100 * 2**20}
    cluster = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
    cluster.workers = [cluster.add_node(num_cpus=2, **small) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Ray's clusters for tests")
def test_cluster_that_loses_a_node(cluster, model_folder, images, bad_images, tmp_path):
    """A node with half of the actors is killed while results are written; every row is there, once, in order."""
    files = [
        *[str(images[i % 9]) for i in range(300)],
        str(bad_images["cut"]),
        str(bad_images["missing"]),
        str(images[0]),
    ]
    output = tmp_path / "predictions"
    write_older(output)
    write_older(tmp_path / "predictions.errors")
    lost = []

    def lose_a_node() -> None:
        give_up = time.monotonic() + 300
        while not list(tmp_path.glob("predictions.unfinished/*.parquet")):
            if time.monotonic() > give_up:
                return
            time.sleep(0.02)
        lost.append([file.name for file in output.iterdir()] == ["older.parquet"])
        cluster.remove_node(cluster.workers[0], allow_graceful=False)

    killer = threading.Thread(target=lose_a_node)
    killer.start()
    options = {"batch_size": 4, "concurrency": 2, "blocks": 76, "num_cpus": 1, "topk": 3, "device": "cpu"}
    summary = swinfast.ray.predict(files, str(output), model=str(model_folder), **options)
    killer.join()
    assert lost == [True], "the node was not lost while the run went on and older results were there"
    assert [node["Alive"] for node in sys.modules["ray"].nodes()].count(False) == 1
    assert summary == swinfast.ray.Summary(images=303, failures=2)
    assert same(parquet.read_table(output).to_pylist(), rows_of(model_folder, files, tmp_path / "expected.parquet"))
    errors = parquet.read_table(tmp_path / "predictions.errors").to_pylist()
    assert [row["filename"] for row in errors] == [str(bad_images["cut"]), str(bad_images["missing"])]
    assert not (tmp_path / "predictions.unfinished").exists()
