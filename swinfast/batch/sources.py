"""Inputs: a stream of images out of files, folders, patterns, lists of paths, tar shards and parquet files.

The stream is the same every time it is read, and nothing of it is kept: folders are walked in order, archives read
from front to back.
"""

import fnmatch
import glob
import importlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image, ImageFile

from ..pixels import Source
from .optional import import_extra
from .places import Places
from .worker import reason_of

TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
PARQUET = (".parquet",)
ROWS = 64  # of a parquet file in memory at a time
COMPRESSED = {rb"\x1f\x8b": "gzip", rb"BZh\d1AY&SY": "bz2", rb"\xfd7zXZ|\]\0\0\x80": "lzma"}  # starts of files: modules


class Item(NamedTuple):
    """An image to come: its name in the results, where its bytes are, or why there are none."""

    name: str
    source: Source
    reason: str | None = None


@dataclass(frozen=True)
class Images:
    """The images meant by paths. It can be iterated again and again, and be sent to another process.

    Attributes:
        paths: Image files, tar shards (a webdataset's, or any with images in it), parquet files with a column of
            images; folders, searched recursively for all of these; glob patterns.
        files_from: A text file with one path a line, as it is and no pattern, read after paths; a regular file, as it
            is read several times.
        members: A pattern for the names of the files in tar shards that are wanted.
        image_column: Of parquet files; by default "image", or else the first one that can hold images.
        output: Of the run that reads them: it is none of its inputs, and nor are its parts.

    Raises:
        ValueError: files_from is no regular file, or output is among the paths.
        TypeError: paths is a single path, or holds something else than paths.
    """

    paths: tuple[str, ...] = ()
    files_from: str | None = None
    members: str = "*"
    image_column: str | None = None
    output: str | None = None

    def __post_init__(self):
        if isinstance(self.paths, str | bytes | os.PathLike):
            raise TypeError(f"paths must be a sequence of paths, got {self.paths!r} alone")
        object.__setattr__(self, "paths", tuple(map(os.fspath, self.paths)))
        if self.files_from is not None and Path(self.files_from).exists() and not Path(self.files_from).is_file():
            raise ValueError(f"files_from must be a regular file, got {self.files_from!r}")
        for path in filter(self._is_written, self.paths):
            raise ValueError(f"{path} is written by this run, and can't be an input of it")
        if self.output is not None and self.files_from is not None:
            written, given = Places.of(_place(self.output)), Path(os.path.realpath(self.files_from))
            if given in written:
                raise ValueError(f"{self.files_from} is written by this run, and can't be the list of its inputs")

    def __iter__(self) -> Iterator[Item]:
        for file in self.files():
            yield from self.items(file)

    def files(self) -> Iterator[str]:
        """Image files and archives; also paths that can't be looked into, so that reading them says why."""
        for path, is_exact in self._given():
            yield from (file for file in _expand(path, is_exact) if not self._is_own(file))

    def items(self, file: str) -> Iterator[Item]:
        """The images in a file: itself, or those of an archive. What is wrong with an archive is an Item too."""
        lower = file.lower()
        if not lower.endswith(TAR + PARQUET):
            yield Item(file, file)
            return
        if lower.endswith(PARQUET):
            import_extra("pyarrow.parquet", "parquet")  # where it is missing the run ends
        read = self._tar if lower.endswith(TAR) else self._parquet
        try:
            yield from read(file)
        except Exception as error:  # damaged archives make their readers raise nearly any type
            yield Item(file, file, reason_of(error))

    def count(self) -> int:
        """How many there are; for tar shards that means to read them through."""
        return sum(
            self._rows(file) if file.lower().endswith(PARQUET) else sum(1 for _ in self.items(file))
            for file in self.files()
        )

    def _given(self) -> Iterator[tuple[str, bool]]:
        """Paths, and whether each is one as it is: it can't be a pattern."""
        yield from ((path, False) for path in self.paths)
        if self.files_from is not None:
            encoding = {"encoding": "utf-8-sig", "errors": "surrogateescape"}
            with Path(self.files_from).open(newline="\n", **encoding) as lines:  # else a \r in a name would end it
                yield from ((path, True) for path in filter(None, (line.rstrip("\r\n") for line in lines)))

    def _is_own(self, file: str) -> bool:
        """Whether a file is the output, one of its parts, or left of them, or a link to one of these."""
        return self.output is not None and file.lower().endswith(Path(self.output).suffix) and self._is_written(file)

    def _is_written(self, path: str) -> bool:
        """Whether a path is the output, or the folder of its parts, or in there, or a link to one of these."""
        if self.output is None:
            return False
        written = Places.of(_place(self.output))
        own = {written.output, written.parts, written.done}
        try:
            places = _place(path), Path(os.path.realpath(path))
        except ValueError:  # no path at all, as reading it says
            return False
        return any(not own.isdisjoint((place, *place.parents)) for place in places)

    def _tar(self, file: str) -> Iterator[Item]:
        """Offsets into a plain archive, bytes out of a compressed one."""
        with (
            Path(file).open("rb") as stream,
            _decompressed(stream) as data,
            tarfile.open(fileobj=data, mode="r:", tarinfo=_Header) as archive,
        ):
            while (member := archive.next()) is not None:
                if self._is_wanted(member):
                    name = f"{file}/{member.name}"
                    if member.islnk() or member.issym():
                        yield Item(name, file, f"ValueError: a link to {member.linkname}, not followed in tar shards")
                    elif data is stream and not member.issparse():
                        yield Item(name, (file, member.offset_data, member.size))
                    else:
                        yield Item(name, archive.extractfile(member).read())
                archive.members.clear()  # or a large archive's directory would fill the memory
            try:
                while block := data.read(1 << 20):
                    if block.strip(b"\0"):
                        raise tarfile.ReadError("more data after the end of the archive")
            except EOFError:  # of lzma, for the zeros that may fill up a file
                stream.seek(-4, os.SEEK_END)
                if data is stream or stream.read() != bytes(4):
                    raise

    def _is_wanted(self, member: tarfile.TarInfo) -> bool:
        may_be_file = not member.isdir() and not member.isdev()  # unknown types are files, says POSIX
        return may_be_file and has_image_ending(member.name) and fnmatch.fnmatchcase(member.name, self.members)

    def _parquet(self, file: str) -> Iterator[Item]:
        """Rows of a column of bytes, or of Hugging Face's {"bytes": …, "path": …}."""
        parquet = import_extra("pyarrow.parquet", "parquet")
        with parquet.ParquetFile(file) as table:
            column, row = self._column(file, table.schema_arrow), 0
            for rows in table.iter_batches(batch_size=ROWS, columns=[column]):
                for value in rows.column(0).to_pylist():
                    yield _row(file, row, value if isinstance(value, dict) else {"bytes": value})
                    row += 1

    def _column(self, file: str, schema: Any) -> str:
        types = import_extra("pyarrow.types", "parquet")

        def holds_images(kind: Any) -> bool:
            binary = types.is_binary(kind) or types.is_large_binary(kind)
            return binary or (types.is_struct(kind) and "bytes" in {field.name for field in kind})

        columns = [field.name for field in schema if holds_images(field.type)]
        wanted = self.image_column or ("image" if "image" in columns else next(iter(columns), None))
        if wanted not in columns:
            raise ValueError(f"{file} has no column of images{f' {wanted!r}' if wanted else ''}, it has {schema.names}")
        return wanted

    def _rows(self, file: str) -> int:
        try:
            return import_extra("pyarrow.parquet", "parquet").read_metadata(file).num_rows
        except (OSError, ValueError):
            return 1


class _Header(tarfile.TarInfo):
    """Of a member. One that is damaged or missing is an error; tarfile would take it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        start = archive.fileobj.tell()
        try:
            header = super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError, tarfile.EmptyHeaderError) as error:
            raise tarfile.ReadError(f"the archive is damaged or cut off at byte {start}: {error}") from error
        if archive.offset <= start:
            raise tarfile.ReadError(f"the archive is damaged at byte {start}: a negative size")
        return header


def find_images(paths: Iterable[str | Path]) -> list[str]:
    """The image files meant by files, folders (searched recursively) and glob patterns, each sorted by name.

    Archives are none, unless they are given by name. A path that is nothing of these stays in the list, so that reading
    it says what is wrong.
    """
    given = tuple(map(str, paths))
    return [file for file in Images(given).files() if not file.lower().endswith(TAR + PARQUET) or file in given]


def has_image_ending(name: str) -> bool:
    """Whether Pillow reads files that are named so."""
    image_format = Image.registered_extensions().get(os.path.splitext(name)[1].lower())  # noqa: PTH122
    if image_format == "MPO":  # opened as JPEG
        return True
    reader, _ = Image.OPEN.get(image_format, (None, None))  # none for PDF, which is only written
    is_stub = isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile)
    return reader is not None and not is_stub and image_format != "MPEG"  # which are recognised, and not decoded


def _row(file: str, row: int, value: dict[str, Any]) -> Item:
    data, path = value.get("bytes"), value.get("path")
    name = f"{file}/{path if path else f'{row:08}'}"
    if data is None and path:
        return Item(name, str(Path(file).parent / path))
    return Item(name, data) if data else Item(name, b"", "ValueError: the row has no bytes of an image")


def _decompressed(stream: BinaryIO) -> BinaryIO:
    """What a compressed file holds, however many streams it is made of; any other file as it is."""
    start = stream.read(10)
    stream.seek(0)
    for pattern, module in COMPRESSED.items():
        if re.match(pattern, start):
            return importlib.import_module(module).open(stream)
    return stream


def _place(path: str) -> Path:
    """A path without links in its folder."""
    folder, name = os.path.split(path)
    return Path(os.path.realpath(folder), name)


def _expand(path: str, is_exact: bool) -> Iterator[str]:
    try:
        if path and Path(path).is_dir():
            found = _walk(path if path.endswith(os.sep) else str(Path(path)))
        elif not is_exact and not Path(path).exists() and glob.has_magic(path):
            found = [match for match in sorted(_matches(path)) if _may_be_file(Path(match))] or [path]
        else:
            found = [path]
    except (OSError, ValueError):  # reading it says the same
        found = [path]
    yield from found


def _matches(pattern: str) -> set[str]:
    """What a pattern means, as for glob.glob, but that ** goes through no link to a folder: it could lead back."""
    separators = re.escape(os.sep + (os.altsep or ""))
    head, *tail = re.split(rf"(?<![^{separators}])\*\*(?:[{separators}]+|$)", pattern, maxsplit=1)
    if not tail:
        return set(glob.glob(pattern))  # noqa: PTH207 (Path.glob takes no absolute ones)
    matches = set()
    for folder in glob.glob(head) if head else [""]:  # noqa: PTH207
        for place, names, _ in os.walk(folder or os.curdir):
            names[:] = [name for name in names if not name.startswith(".")]
            below = place[len(folder or os.curdir) :].lstrip(os.sep)
            rest = tail[0] or "*" * pattern.endswith("**")
            matches |= _matches(os.path.join(glob.escape(os.path.join(folder, below)), rest))  # noqa: PTH118
    return matches


def _walk(folder: str) -> Iterator[str]:
    """Files below a folder, in the order of their whole paths; the folder itself where it can't be listed."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((e.name + os.sep * e.is_dir(follow_symlinks=False), _may_be_file(e)) for e in entries)
    except OSError:
        yield folder
        return
    for name, is_file in found:
        path = os.path.join(folder, name)  # noqa: PTH118 (a million of them)
        if name.endswith(os.sep):
            yield from _walk(path[:-1])
        elif is_file and (has_image_ending(name) or name.lower().endswith(TAR + PARQUET)):
            yield path


def _may_be_file(entry: os.DirEntry | Path) -> bool:
    """A file, or a link to one, even to one that is gone or can't be reached: that is to be told."""
    try:
        return entry.is_file() or (entry.is_symlink() and not entry.is_dir())
    except OSError:
        return True
