"""Tar shards: all images of a good one, of every kind; of a damaged one those before the damage, which is told."""

import bz2
import gzip
import io
import lzma
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from swinfast.batch.sources import Images

IMAGES = {f"{'long/' * 30 if seed % 2 else ''}{seed}.png": bytes([seed]) * (400 + 200 * seed) for seed in range(6)}
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
COMPRESSIONS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def tar(images: dict[str, bytes] = IMAGES, form: int = tarfile.PAX_FORMAT, **options) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form, **options) as archive:
        for name, data in images.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def headers(data: bytes) -> list[int]:
    """Where the members begin."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [member.offset for member in archive]


@pytest.fixture
def read(tmp_path):
    """Images by name out of an archive, and reasons of failures."""

    def run(data: bytes, name: str = "shard.tar") -> tuple[dict[str, bytes], dict[str, str]]:
        file = tmp_path / name
        file.write_bytes(data)
        good, bad = {}, {}
        for item in Images((str(file),)):
            short = item.name.removeprefix(f"{file}/")
            if item.reason is not None:
                bad[short] = item.reason
            elif isinstance(item.source, tuple):
                archive, start, size = item.source
                good[short] = Path(archive).read_bytes()[start : start + size]
            else:
                good[short] = item.source
        return good, bad

    return run


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_formats(read, form):
    assert read(tar(form=form)) == (IMAGES, {})


def test_global_header(read):
    assert read(tar(pax_headers={"comment": "of all members"})) == (IMAGES, {})


@pytest.mark.parametrize("blocks", [1, 2, 200])
def test_zeros_at_the_end(read, blocks):
    data = tar()
    assert read(data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512 + 512 * blocks)) == (IMAGES, {})


def test_nothing_in_it(read):
    assert read(tar({})) == ({}, {})


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_compressed_in_pieces(read, ending):
    """As parallel compressors write them; a piece may end anywhere."""
    compress, data = COMPRESSIONS[ending], tar()
    for cut in (headers(data)[2], len(data) // 2):
        assert read(compress(data[:cut]) + compress(data[cut:]), f"shard.tar.{ending}") == (IMAGES, {})


@pytest.mark.parametrize("padding", [4, 4096])
def test_padded_xz(read, padding):
    """As xz allows it; what is cut off is an error still."""
    data = COMPRESSIONS["xz"](tar())
    assert read(data + bytes(padding), "shard.tar.xz") == (IMAGES, {})
    _, errors = read(data[:-8], "shard.tar.xz")
    assert errors


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs the program tar")
@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_program(read, tmp_path, form):
    """With a sparse file where the format has them."""
    images = dict(list(IMAGES.items())[::2]) | {"holes.png": b"first" + bytes(1 << 20) + b"last"}
    for name, data in images.items():
        with (tmp_path / name).open("wb") as stream:
            for place, part in ((0, data[:5]), (len(data) - 4, data[-4:])) if "holes" in name else ((0, data),):
                stream.seek(place)
                stream.write(part)
    sparse = [] if form in ("v7", "ustar") else ["--sparse"]
    command = ["tar", "--create", "--format", form, *sparse, "--file", tmp_path / "made.tar", "-C", tmp_path, *images]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("another tar than GNU's")
    assert read((tmp_path / "made.tar").read_bytes()) == (images, {})
    assert read(gzip.compress((tmp_path / "made.tar").read_bytes()), "shard.tgz") == (images, {})


def with_size(data: bytes, header: int, size: bytes) -> bytes:
    """With another size in a header, whose checksum is right."""
    changed = bytearray(data)
    changed[header + 124 : header + 136] = size
    changed[header + 148 : header + 156] = b" " * 8
    changed[header + 148 : header + 156] = b"%06o\0 " % sum(changed[header : header + 512])
    return bytes(changed)


def damaged() -> dict[str, tuple[bytes, str]]:
    """Archives whose first two images are good, and what is said of them."""
    data = tar(form=tarfile.USTAR_FORMAT)
    third, fourth = headers(data)[2:4]
    header = data[third : third + 512]
    return {
        "a bit of a header": (data[:third] + bytes([header[0] ^ 1]) + data[third + 1 :], "bad checksum"),
        "no number in a header": (data[:third] + header[:148] + b"nonsense" + data[third + 156 :], "invalid header"),
        "zeros": (data[:third] + bytes(fourth - third) + data[fourth:], "more data after the end"),
        "cut between members": (data[:third], "cut off at byte"),
        "cut in a header": (data[: third + 100], "cut off at byte"),
        "two archives in one": (tar(dict(list(IMAGES.items())[:2])) + data, "more data after the end"),
        "a negative size": (with_size(data, third, b"\xff" * 10 + b"\xf6\0"), "the archive is damaged"),
    }


@pytest.mark.parametrize("what", damaged())
@pytest.mark.parametrize("ending", ["", *COMPRESSIONS])
def test_damage(read, tmp_path, what, ending):
    data, said = damaged()[what]
    file = f"shard.tar{ending and '.'}{ending}"
    good, bad = read(COMPRESSIONS[ending](data) if ending else data, file)
    assert good == dict(list(IMAGES.items())[:2])
    assert list(bad) == [str(tmp_path / file)]
    assert said in bad[str(tmp_path / file)]


@pytest.mark.parametrize("ending", ["", *COMPRESSIONS])
def test_size_beyond_all_numbers(read, tmp_path, ending):
    """Of an image in a plain archive decoding tells too that it is not all there."""
    data = tar(form=tarfile.USTAR_FORMAT)
    data = with_size(data, headers(data)[2], b"\x80" + b"\x77" * 11)
    file = f"shard.tar{ending and '.'}{ending}"
    good, bad = read(COMPRESSIONS[ending](data) if ending else data, file)
    assert list(good) == list(IMAGES)[: 2 if ending else 3]
    assert list(bad) == [str(tmp_path / file)]


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_compressed_archives_in_one_file(read, tmp_path, ending):
    """What cat makes of two: the second one is not passed over."""
    data = COMPRESSIONS[ending](tar())
    good, bad = read(data + data, f"shard.tar.{ending}")
    assert (good, list(bad)) == (IMAGES, [str(tmp_path / f"shard.tar.{ending}")])


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_cut_in_compressed_data(read, tmp_path, ending):
    whole = COMPRESSIONS[ending](tar({name: os.urandom(len(data)) for name, data in IMAGES.items()}))
    for cut in (10, len(whole) // 2, len(whole) - 1):
        _, bad = read(whole[:cut], f"shard.tar.{ending}")
        assert list(bad) == [str(tmp_path / f"shard.tar.{ending}")], cut


def test_links(read, tmp_path):
    """They are images of a folder, and their contents may be gone from the shard: each is told."""
    links = {"hard.png": tarfile.LNKTYPE, "symbolic.png": tarfile.SYMTYPE, "notes.txt": tarfile.LNKTYPE}
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        (tmp_path / "0.png").write_bytes(IMAGES["0.png"])
        archive.add(tmp_path / "0.png", "0.png")
        for name, kind in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.png"
            archive.addfile(info)
        for name, kind in (("folder.png", tarfile.DIRTYPE), ("pipe.png", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            archive.addfile(info)
    good, bad = read((tmp_path / "links.tar").read_bytes())
    assert good == {"0.png": IMAGES["0.png"]}
    assert bad == dict.fromkeys(("hard.png", "symbolic.png"), "ValueError: a link to 0.png, not followed in tar shards")
