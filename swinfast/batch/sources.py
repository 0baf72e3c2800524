"""Inputs: a stream of images out of files, folders, patterns, lists of paths, tar shards and parquet files.

The stream is the same every time it is read, and nothing of it is kept: folders are walked in order, archives read
from front to back.
"""

import fnmatch
import glob
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..pixels import Source
from .optional import import_extra
from .worker import reason_of

TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
PARQUET = (".parquet",)
ROWS = 64  # of a parquet file in memory at a time


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
        files_from: A text file with one path a line, read after paths.
        members: A pattern for the names of the files in tar shards that are wanted.
        image_column: Of parquet files; by default "image", or else the first one that can hold images.
    """

    paths: tuple[str, ...] = ()
    files_from: str | None = None
    members: str = "*"
    image_column: str | None = None

    def __iter__(self) -> Iterator[Item]:
        for file in self.files():
            yield from self.items(file)

    def files(self) -> Iterator[str]:
        """Image files and archives."""
        for path in self.paths:
            yield from _expand(path)
        if self.files_from is not None:
            with Path(self.files_from).open(encoding="utf-8", errors="surrogateescape") as lines:
                for line in lines:
                    if line := line.rstrip("\r\n"):
                        yield from _expand(line)

    def items(self, file: str) -> Iterator[Item]:
        """The images in a file: itself, or those of an archive. What is wrong with an archive is an Item too."""
        lower = file.lower()
        if not lower.endswith(TAR + PARQUET):
            yield Item(file, file)
            return
        read = self._tar if lower.endswith(TAR) else self._parquet
        try:
            yield from read(file)
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:  # pyarrow's errors are ValueErrors
            yield Item(file, file, reason_of(error))

    def count(self) -> int:
        """How many there are; for tar shards that means to read them through."""
        return sum(
            self._rows(file) if file.lower().endswith(PARQUET) else sum(1 for _ in self.items(file))
            for file in self.files()
        )

    def _tar(self, file: str) -> Iterator[Item]:
        """Offsets into a plain archive, bytes out of a compressed one."""
        with Path(file).open("rb") as stream:
            try:
                archive = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115
                compressed = False
            except tarfile.ReadError:
                stream.seek(0)
                archive = tarfile.open(fileobj=stream, mode="r|*")  # noqa: SIM115
                compressed = True
            with archive:
                while (member := archive.next()) is not None:
                    if self._is_wanted(member):
                        where = (file, member.offset_data, member.size)
                        source = archive.extractfile(member).read() if compressed else where
                        yield Item(f"{file}/{member.name}", source)
                    archive.members.clear()  # or a large archive's directory would fill the memory
                if not compressed and 0 < os.fstat(stream.fileno()).st_size - archive.offset < tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("the archive ends within a header")

    def _is_wanted(self, member: tarfile.TarInfo) -> bool:
        plain = member.isreg() and not member.issparse()
        return plain and has_image_ending(member.name) and fnmatch.fnmatchcase(member.name, self.members)

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


def find_images(paths: Iterable[str | Path]) -> list[str]:
    """The files meant by files, folders (searched recursively) and glob patterns, each sorted by name.

    A path that is nothing of these stays in the list, so that reading it says what is wrong.
    """
    return list(Images(tuple(map(str, paths))).files())


def has_image_ending(name: str) -> bool:
    """Whether Pillow reads files that are named so."""
    image_format = Image.registered_extensions().get(os.path.splitext(name)[1].lower())  # noqa: PTH122
    return image_format in Image.OPEN or image_format == "MPO"  # PDF is only written; MPO is opened as JPEG


def _row(file: str, row: int, value: dict[str, Any]) -> Item:
    data, path = value.get("bytes"), value.get("path")
    name = f"{file}/{path if path else f'{row:08}'}"
    if data is None and path:
        return Item(name, str(Path(file).parent / path))
    return Item(name, data) if data else Item(name, b"", "ValueError: the row has no bytes of an image")


def _expand(path: str) -> Iterator[str]:
    if Path(path).is_dir():
        yield from _walk(path if path.endswith(os.sep) else str(Path(path)))
    elif not Path(path).exists() and glob.has_magic(path):
        matches = sorted(glob.glob(path, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute ones)
        yield from [match for match in matches if Path(match).is_file()] or [path]
    else:
        yield path


def _walk(folder: str) -> Iterator[str]:
    """Files below a folder, in the order of their whole paths."""
    with os.scandir(folder) as entries:
        found = sorted((e.name + os.sep * e.is_dir(follow_symlinks=False), _may_be_file(e)) for e in entries)
    for name, is_file in found:
        path = os.path.join(folder, name)  # noqa: PTH118 (a million of them)
        if name.endswith(os.sep):
            yield from _walk(path[:-1])
        elif is_file and (has_image_ending(name) or name.lower().endswith(TAR + PARQUET)):
            yield path


def _may_be_file(entry: os.DirEntry) -> bool:
    """A file, or a link to one, even to one that is gone: that is to be told."""
    return entry.is_file() or (entry.is_symlink() and not entry.is_dir())
