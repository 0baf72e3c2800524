"""swinfast.ray: its classes for map_batches, and whole runs on a cluster of several nodes, one of which is lost."""

import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import write_image

import swinfast
import swinfast.ray

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


def test_embedder(model_folder, images):
    model = swinfast.create_model(str(model_folder))
    expected = [result.arrays["embedding"] for result in swinfast.Embedder(model, device="cpu").extract(images)]
    batch = swinfast.ray.decode(model)({"filename": np.array(list(map(str, images)))})
    table = swinfast.ray.Embedder(model, device="cpu")(batch)
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), expected, rtol=1e-3, atol=1e-4)


def test_names_of_any_filesystem(images, tmp_path):
    """URIs, and paths of a filesystem that is given."""
    (tmp_path / "photos" / "notes.txt").touch()
    uri = (tmp_path / "photos").as_uri()
    assert list(swinfast.ray._names([uri], None)) == [f"{uri}/{file.name}" for file in images]
    inside = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    names = list(swinfast.ray._names(["photos", "nothing.png"], inside))
    assert names == [f"photos/{file.name}" for file in images] + ["nothing.png"]
    assert swinfast.ray._Opened(names[0], inside).source() == images[0].read_bytes()
    assert swinfast.ray._Opened(f"{uri}/{images[1].name}", None).source() == images[1].read_bytes()


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
    lost = []

    def lose_a_node() -> None:
        give_up = time.monotonic() + 300
        while not list(tmp_path.glob("predictions.unfinished/*.parquet")):
            if time.monotonic() > give_up:
                return
            time.sleep(0.02)
        lost.append(not output.exists())
        cluster.remove_node(cluster.workers[0], allow_graceful=False)

    killer = threading.Thread(target=lose_a_node)
    killer.start()
    options = {"batch_size": 4, "concurrency": 2, "blocks": 76, "num_cpus": 1, "topk": 3, "device": "cpu"}
    summary = swinfast.ray.predict(files, str(output), model=str(model_folder), **options)
    killer.join()
    assert lost == [True], "the node was not lost while the run went on"
    assert [node["Alive"] for node in sys.modules["ray"].nodes()].count(False) == 1
    assert summary == swinfast.ray.Summary(images=303, failures=2)
    assert same(parquet.read_table(output).to_pylist(), rows_of(model_folder, files, tmp_path / "expected.parquet"))
    errors = parquet.read_table(tmp_path / "predictions.errors").to_pylist()
    assert [row["filename"] for row in errors] == [str(bad_images["cut"]), str(bad_images["missing"])]
    assert not (tmp_path / "predictions.unfinished").exists()
