"""Inputs: every kind gives the same images, with names, in a fixed order, and tells what is wrong with it."""

import glob
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers import write_image

import swinfast
from swinfast.batch import sources
from swinfast.batch.sources import Images

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def files(tmp_path) -> list[Path]:
    return [write_image(tmp_path / f"{seed:02}.png", seed, size=(36, 40 + seed)) for seed in range(5)]


@pytest.fixture
def embed(model_folder):
    """Embeddings by name of whatever Images are given, and reasons of failures."""
    embedder = swinfast.Embedder(swinfast.create_model(str(model_folder)), workers=1, device="cpu", batch_size=4)

    def run(images) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        results = list(embedder.extract(images))
        good = {r.filename: r.arrays["embedding"] for r in results if isinstance(r, swinfast.Features)}
        return good, {r.filename: r.reason for r in results if isinstance(r, swinfast.Failure)}

    return run


@pytest.fixture
def plain(embed, files):
    """The right embeddings by stem."""
    good, _ = embed(files)
    return {Path(name).stem: embedding for name, embedding in good.items()}


def same(got: dict[str, np.ndarray], plain: dict[str, np.ndarray]) -> bool:
    return got.keys() == plain.keys() and all(np.allclose(got[name], plain[name], atol=1e-5) for name in plain)


def write_tar(file: Path, members: dict[str, bytes], mode: str = "w") -> str:
    with tarfile.open(file, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(file)


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz", "tar.xz"])
def test_tar(embed, plain, files, tmp_path, ending):
    members = {
        f"{file.stem}.{end}": data for file in files for end, data in (("json", b"{}"), ("png", file.read_bytes()))
    }
    mode = "w" if ending == "tar" else f"w:{ending.replace('tgz', 'gz').rpartition('.')[2]}"
    shard = write_tar(tmp_path / f"shard.{ending}", members, mode)
    good, bad = embed(Images((shard,)))
    assert list(good) == [f"{shard}/{file.name}" for file in files]
    assert not bad
    assert same({Path(name).stem: value for name, value in good.items()}, plain)


def test_webdataset_agrees(embed, plain, files, tmp_path):
    """Shards that the webdataset library writes hold the images that it reads."""
    webdataset = pytest.importorskip("webdataset")
    for number in (0, 1):
        with webdataset.TarWriter(str(tmp_path / f"shard-{number}.tar")) as shard:
            for file in files[number::2]:
                shard.write({"__key__": f"sub/{file.stem}", "png": file.read_bytes(), "cls": number})
    pattern = f"{tmp_path}/shard-*.tar"
    shards = [str(tmp_path / f"shard-{number}.tar") for number in (0, 1)]
    theirs = [sample["__key__"] for sample in webdataset.WebDataset(shards, shardshuffle=False)]
    good, _ = embed(Images((pattern,)))
    assert [f"sub/{Path(name).stem}" for name in good] == theirs
    assert same({Path(name).stem: value for name, value in good.items()}, plain)


def test_directory_of_a_shard_is_not_kept(files, tmp_path, monkeypatch):
    opened, kept = tarfile.open, []
    monkeypatch.setattr(tarfile, "open", lambda *args, **options: kept.append(opened(*args, **options)) or kept[-1])
    shard = write_tar(tmp_path / "shard.tar", {file.name: file.read_bytes() for file in files})
    assert max(len(kept[-1].members) for _ in Images((shard,))) <= 1


def test_members(files, tmp_path):
    members = {f"{kind}/{file.name}": file.read_bytes() for file in files for kind in ("photo", "mask")}
    shard = write_tar(tmp_path / "shard.tar", members)
    assert len(list(Images((shard,)))) == 10
    chosen = [item.name for item in Images((shard,), members="photo/*")]
    assert chosen == [f"{shard}/photo/{file.name}" for file in files]


@pytest.mark.parametrize("kind", ["hugging face", "bytes", "large bytes"])
def test_parquet(embed, plain, files, tmp_path, kind):
    data = [file.read_bytes() for file in files]
    rows = [{"bytes": value, "path": file.name} for value, file in zip(data, files, strict=True)]
    images = {
        "hugging face": arrow.array(rows),
        "bytes": arrow.array(data),
        "large bytes": arrow.array(data, arrow.large_binary()),
    }[kind]
    file = str(tmp_path / "part.parquet")
    parquet.write_table(arrow.table({"label": [1] * 5, "image": images}), file)
    assert Images((file,)).count() == 5
    good, bad = embed(Images((file,)))
    assert not bad
    names = [f.name for f in files] if kind == "hugging face" else [f"{row:08}" for row in range(5)]
    assert list(good) == [f"{file}/{name}" for name in names]
    assert same(dict(zip(plain, good.values(), strict=True)), plain)


def test_parquet_rows_without_bytes(embed, files, tmp_path):
    rows = [{"bytes": None, "path": files[0].name}, {"bytes": None, "path": None}, None]
    file = str(tmp_path / "part.parquet")
    parquet.write_table(arrow.table({"photo": arrow.array(rows)}), file)
    good, bad = embed(Images((file,), image_column="photo"))
    assert list(good) == [f"{file}/{files[0].name}"]
    assert list(bad) == [f"{file}/00000001", f"{file}/00000002"]
    assert set(bad.values()) == {"ValueError: the row has no bytes of an image"}


def test_parquet_without_images(embed, tmp_path):
    file = str(tmp_path / "part.parquet")
    parquet.write_table(arrow.table({"label": [1]}), file)
    for options in ({}, {"image_column": "label"}):
        assert "has no column of images" in embed(Images((file,), **options))[1][file]


def test_damaged_archives(embed, plain, files, tmp_path):
    """What comes before the damage is used, what is wrong is told."""
    members = {file.name: file.read_bytes() for file in files}
    whole = Path(write_tar(tmp_path / "whole.tar", members)).read_bytes()
    second = 512 + -(-files[0].stat().st_size // 512) * 512  # where its header begins
    cuts = {"in an image": second + 512 + 1000, "in a header": second + 100}
    for name, cut in cuts.items():
        (tmp_path / f"{name}.tar").write_bytes(whole[:cut])
    (tmp_path / "junk.tar").write_bytes(b"junk" * 1000)
    (tmp_path / "junk.parquet").write_bytes(b"junk" * 1000)
    for name in ("in an image", "in a header", "junk", "missing"):
        good, bad = embed(Images((str(tmp_path / f"{name}.tar"),)))
        assert str(tmp_path / f"{name}.tar") in next(iter(bad))
        assert len(good) == name.startswith("in a"), name
    assert "ends after" in embed(Images((str(tmp_path / "in an image.tar"),)))[1][f"{tmp_path}/in an image.tar/01.png"]
    assert list(embed(Images((str(tmp_path / "junk.parquet"),)))[1]) == [str(tmp_path / "junk.parquet")]


def test_files_from(files, tmp_path):
    (tmp_path / "more").mkdir()
    write_image(tmp_path / "more" / "x.png")
    (tmp_path / "list.txt").write_text(f"{files[2]}\n\n{tmp_path}/more\r\n{tmp_path}/nothing.png")
    images = Images((str(files[0]),), files_from=str(tmp_path / "list.txt"))
    expected = [files[0], files[2], tmp_path / "more/x.png", tmp_path / "nothing.png"]
    assert [item.name for item in images] == list(map(str, expected))
    assert [item.name for item in pickle.loads(pickle.dumps(images))] == list(map(str, expected))
    assert images.count() == 4


def test_lines_of_a_list_are_exact(embed, plain, files, tmp_path):
    """They are no patterns, and a carriage return is one of a name's characters unless a line ends with it."""
    awkward = [tmp_path / "more" / name for name in ("img[1].png", "a\rb.png", "*.png")]
    write_image(tmp_path / "more" / "img1.png")
    write_image(awkward[1])
    lines = [files[0], awkward[0], files[1], awkward[1], awkward[2], *files[2:]]
    for end in ("\n", "\r\n"):
        (tmp_path / "list.txt").write_bytes(end.join(map(str, lines)).encode())
        good, bad = embed(Images(files_from=str(tmp_path / "list.txt")))
        assert list(good) == list(map(str, [*files[:2], awkward[1], *files[2:]]))
        assert same({Path(name).stem: value for name, value in good.items() if name != str(awkward[1])}, plain)
        assert list(bad) == [str(awkward[0]), str(awkward[2])]
        assert all(reason.startswith("FileNotFoundError: ") for reason in bad.values())


def test_byte_order_mark_of_a_list(files, tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(map(str, files)), encoding="utf-8-sig")
    assert list(Images(files_from=str(tmp_path / "list.txt")).files()) == list(map(str, files))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_list_that_can_be_read_once_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=f"files_from must be a regular file, got '{tmp_path}/pipe'"):
        Images(files_from=str(tmp_path / "pipe"))


def test_paths_that_are_none(tmp_path):
    """A single one would be taken for its letters, and / is a folder that has all files in it."""
    for one in ("/photos/a.png", Path("a.png"), b"a.png"):
        with pytest.raises(TypeError, match=r"paths must be a sequence of paths, got .* alone"):
            Images(one)
    with pytest.raises(TypeError, match=r"expected str, bytes or os\.PathLike object, not int"):
        Images([1])
    assert Images([tmp_path]).paths == (str(tmp_path),)


def test_entries_that_lead_nowhere(embed, plain, files, tmp_path):
    """Each is told, and the run goes on."""
    (tmp_path / "04.jpg").symlink_to("04.jpg")
    (tmp_path / "list.txt").write_text(f"{tmp_path}\n{'long' * 75}.png\n{'long' * 75}.tar")
    good, bad = embed(Images(files_from=str(tmp_path / "list.txt")))
    assert same({Path(name).stem: value for name, value in good.items()}, plain)
    assert list(bad) == [f"{tmp_path}/04.jpg", f"{'long' * 75}.png", f"{'long' * 75}.tar"]
    assert [reason.partition(":")[0] for reason in bad.values()] == ["OSError"] * 3
    assert list(Images((f"{tmp_path}/0*.jpg",)).files()) == [f"{tmp_path}/04.jpg"]


def test_folder_that_can_not_be_listed(embed, plain, files, tmp_path, monkeypatch):
    """As if it belonged to another user, which nothing does to root."""
    (tmp_path / "02-private").mkdir()
    scandir = os.scandir

    def denied(folder):
        if folder.endswith("private"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(sources.os, "scandir", denied)
    good, bad = embed(Images((str(tmp_path),)))
    assert same({Path(name).stem: value for name, value in good.items()}, plain)
    assert list(bad) == [f"{tmp_path}/02-private"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_folders_of_others(files, tmp_path):
    """One that can't be listed, and a link and a path into one that can't be entered."""
    write_image(tmp_path / "closed/x.png")
    (tmp_path / "05.png").symlink_to(tmp_path / "closed/x.png")
    (tmp_path / "closed").chmod(0)
    try:
        found = list(Images((str(tmp_path), f"{tmp_path}/closed/x.png", f"{tmp_path}/closed/*.png")).files())
    finally:
        (tmp_path / "closed").chmod(0o700)
    closed = [tmp_path / name for name in ("05.png", "closed", "closed/x.png", "closed/*.png")]
    assert found == list(map(str, [*files, *closed]))


def test_formats_that_pillow_does_not_decode():
    names = ["x.h5", "x.hdf", "x.mpg", "x.mpeg", "x.grib", "x.bufr", "x.wmf", "x.pdf", "x.txt", "png"]
    assert [name for name in names if sources.has_image_ending(name)] == []
    names = ["x.JPG", "x.png", "x.webp", "x.tif", "x.mpo", "x.gif", "x.jp2"]
    assert [name for name in names if sources.has_image_ending(name)] == names


class TestOutputAmongInputs:
    @pytest.fixture
    def folder(self, files, tmp_path) -> Path:
        """With a run's output, parts, and leftovers, and with another run's."""
        for name in ("out", "other"):
            for place in (f"{name}.parquet", f"{name}.parquet.parts/0.parquet", f"{name}.parquet.parts.done/0.parquet"):
                (tmp_path / place).parent.mkdir(exist_ok=True)
                (tmp_path / place).touch()
        (tmp_path / "link.parquet").symlink_to(tmp_path / "out.parquet")
        return tmp_path

    @pytest.mark.parametrize("output", ["out.parquet", "{}/out.parquet", "../{0.name}/out.parquet"])
    def test_left_out(self, files, folder, monkeypatch, output):
        monkeypatch.chdir(folder)
        names = [file.name for file in files]
        names += ["other.parquet", "other.parquet.parts.done/0.parquet", "other.parquet.parts/0.parquet"]
        images = Images((".", "*.parquet"), output=output.format(folder))
        assert list(images.files()) == [*(f"./{name}" for name in names), "other.parquet"]

    @pytest.mark.parametrize(
        "name",
        [
            "out.parquet", "out.parquet.parts/0.parquet", "out.parquet.parts/photo.png", "out.parquet.parts",
            "out.parquet.parts.done", "link.parquet",
        ],
    )  # fmt: skip
    def test_given(self, folder, name):
        """Refused as a path before any work, left out of a list where it is a result."""
        with pytest.raises(ValueError, match=f"{name} is written by this run, and can't be an input of it"):
            Images((f"{folder}/{name}",), output=f"{folder}/out.parquet")
        if name.endswith(".parquet"):
            (folder / "list.txt").write_text(f"{folder}/{name}")
            assert list(Images(files_from=f"{folder}/list.txt", output=f"{folder}/out.parquet")) == []

    @pytest.mark.parametrize("name", ["out.npy", "out.index.csv", "out.npy.errors.csv", "out.npy.manifest.json"])
    def test_list_that_would_be_overwritten(self, tmp_path, name):
        (tmp_path / name).write_text("a.png")
        with pytest.raises(ValueError, match=f"{name} is written by this run, and can't be the list of its inputs"):
            Images(files_from=str(tmp_path / name), output=f"{tmp_path}/out.npy")


def test_empty_path_is_no_folder(tmp_path, monkeypatch, files):
    monkeypatch.chdir(tmp_path)
    assert list(Images(("", ".")).files()) == ["", *(f"./{file.name}" for file in files)]


def test_folders_are_walked_in_the_order_of_paths(tmp_path):
    for name in ("a/x.png", "a-b/x.png", "a.png", "a/b/y.jpg", "a/B.png", "b/s.tar", "b/t.PARQUET", "c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    found = list(Images((str(tmp_path),)).files())
    assert found == sorted(found)
    assert len(found) == 9
    assert str(tmp_path / "gone.png") in found


def test_patterns_go_through_no_links_to_folders(tmp_path, monkeypatch):
    """Of which two that lead back would never end. Otherwise they match as glob.glob says, each file once."""
    for name in ("a.png", "s[1]/b.png", "s[1]/s/c.png", "s2/s/d.png", "s2/e.jpg", ".hidden/f.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    monkeypatch.chdir(tmp_path / "in")
    patterns = ["**/*.png", "**", "**/", "./**/*.png", "s*/**/*.png", "**/s/**/*.png", "s2/**", "**.png", "n/**/*.png"]
    patterns += [f"{tmp_path}/i*/**/s/*.png", "../in/**/**/*.png", "**/s*/*", "s2/**//*.png"]
    expected = [glob.glob(pattern, recursive=True) for pattern in patterns]  # noqa: PTH207
    for name in ("one", "two"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "in")
    for pattern, matches in zip(patterns, expected, strict=True):
        files = sorted({file for file in matches if Path(file).is_file()})
        assert list(Images((pattern,)).files()) == (files or [pattern])


def test_folders_are_not_listed_before_they_are_needed(tmp_path, monkeypatch):
    for name in ("a/x.png", "b/x.png", "c/x.png"):
        write_image(tmp_path / name)
    opened = []
    scandir = os.scandir
    monkeypatch.setattr(sources.os, "scandir", lambda folder: opened.append(folder) or scandir(folder))
    stream = iter(Images((str(tmp_path),)))
    next(stream)
    assert opened == [str(tmp_path), str(tmp_path / "a")]


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(RuntimeError, match=r"needs pyarrow, which is not installed: pip install 'swinfast\[parquet\]'"):
        list(Images((str(tmp_path / "x.parquet"),)))
