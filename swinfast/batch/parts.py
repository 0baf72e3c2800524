"""The parts of an output on disk: written whole or not at all, found again by --resume, joined in the end.

While a run goes on there is a folder OUTPUT.parts with a manifest of the settings and, for each finished part, its
files and a record that is written last. In the end the parts become OUTPUT, the manifest OUTPUT.manifest.json.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from .compute import Arrays
from .engine import PartEnd
from .formats import OutputFile, write_csv
from .places import Places

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MANIFEST = "manifest.json"
# Names in a folder of parts.
OWN = re.compile(r"(\d{8}|whole|(.+\.)?manifest)(\.\w+)?\.(json|jsonl|csv|npy|parquet)(\.\d+)?")


class ResumeError(ValueError):
    """What is there, or what another process makes, is of other inputs, of another model or of other settings."""


@dataclass(frozen=True)
class Record:
    """A finished part.

    Attributes:
        images: How many.
        digest: Of their names.
        failures: Those that failed, with reasons.
        sizes: Of the part's files, by name, in bytes.
    """

    images: int
    digest: str
    failures: list[tuple[str, str]]
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Totals:
    """A finished run."""

    images: int
    failures: int
    digest: str  # of the parts' digests


class Parts:
    """The parts of one output.

    Args:
        output: The path of the whole.
        settings: What the results depend on, as JSON has it; a run with other settings is not resumed.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]):
        self.output = output
        self.settings = json.loads(json.dumps(settings))
        places = Places.of(output)
        self.folder, self.manifest, self.errors, self._done = places.parts, places.manifest, places.errors, places.done
        self._lock: int | None = None

    def begin(self, resume: bool, files: list[OutputFile]) -> Totals | None:
        """Make the folder, or find it again; Totals where the whole run is finished already, with all of its files.

        Raises:
            ResumeError: There is something to resume, but of other settings, or what was finished is changed since.
            RuntimeError: Another run is writing there.
            OSError: The folder can't be written, or holds files that are none of a run's.
        """
        for folder in (self.folder, self._done):
            for file in folder.iterdir() if folder.exists() else ():
                if not OWN.fullmatch(file.name):
                    raise FileExistsError(
                        f"{folder} holds what is no part of an output: {file.name}; move it elsewhere"
                    )
        self._forget_leftovers()
        if self.folder.exists():
            self._take_lock()
        if resume and (self.folder / MANIFEST).exists():
            self._check(_read_manifest(self.folder / MANIFEST), self.folder)
            return None
        there = [file.target.exists() for file in files]
        if resume and self.manifest.exists() and any(there):
            content = _read_manifest(self.manifest)
            self._check(content, self.output)
            totals = _totals(content, self.manifest)
            if all(there) and (not totals.failures or self.errors.exists()):
                _check_sizes(content, files)
                return totals
        if self.folder.exists():
            self._take_away()
        self.folder.mkdir()
        self._take_lock()
        self._write_json(self.folder / MANIFEST, {"settings": self.settings})
        return None

    def release(self) -> None:
        """Let others write there. Ends by itself when the process does."""
        if self._lock is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self._lock, fcntl.LOCK_UN)  # to close it is not enough where a forked process has it, too
            os.close(self._lock)
            self._lock = None

    @classmethod
    def batch_size_of(cls, output: Path) -> int | None:
        """The batch size of a run that can be resumed, None where there is none."""
        parts = cls(output, {})
        for file in (parts.folder / MANIFEST, parts.manifest):
            if file.exists():
                return _read_manifest(file)["settings"].get("batch_size")
        return None

    @classmethod
    def images_of(cls, output: Path) -> int:
        """How many images are done of an unfinished run."""
        parts = cls(output, {})
        return sum(parts.record(part).images for part in parts.finished())

    def compare_whole(self, steps: Iterable[PartEnd], finished: Totals) -> None:
        """ResumeError where a finished run was of other inputs than these, divided into parts."""
        images, digest = 0, ""
        for step in steps:
            images, digest = images + step.images, next_digest(digest, step.digest)
        if (images, digest) != (finished.images, finished.digest):
            raise ResumeError(
                f"{self.output} is finished, with {finished.images} images, and the inputs, or their "
                f"names, are others now ({images} images): start anew without resuming, or give another output"
            )

    def finished(self) -> set[int]:
        """Numbers of the parts that are done."""
        numbers = {int(file.stem) for file in self.folder.glob("*.json") if file.name != MANIFEST}
        return {number for number in numbers if self._is_whole(number)}

    def record(self, part: int) -> Record:
        """Of a finished part.

        Raises:
            ResumeError: It, or one of the part's files, is not as it was written.
        """
        file = self.folder / f"{part:08}.json"
        try:
            record = Record(**json.loads(file.read_text(encoding="utf-8")))
            sizes = {name: (self.folder / name).stat().st_size for name in record.sizes}
        except (OSError, ValueError, TypeError) as error:
            raise ResumeError(f"{file} or what it tells of can't be read: {error}; --resume makes it again") from error
        if sizes != record.sizes:
            raise ResumeError(f"{file} tells of {record.sizes} bytes, there are {sizes}; --resume makes them again")
        return record

    def commit(self, part: int, files: list[OutputFile], names: list[str], arrays: Arrays, record: Record) -> None:
        """Write a part's files, then its record: with that it is finished, whatever happens then.

        Raises:
            OSError: With the number of images that are safe, where the disk is full or the like.
        """
        sizes = {}
        try:
            for file in files:
                target = self._file(part, file)
                temporary = target.with_name(f"{target.name}.{os.getpid()}")
                file.write(temporary, names, arrays)
                sizes[target.name] = temporary.stat().st_size
                _move_into_place(temporary, target)
            self._write_json(self.folder / f"{part:08}.json", asdict(replace(record, sizes=sizes)))
        except OSError as error:
            raise self._unwritable(error) from error

    def join(self, count: int, files: list[OutputFile]) -> Totals:
        """Make the outputs of count finished parts, and take the folder away."""
        totals = Totals(0, 0, "")
        for part in range(count):
            record = self.record(part)
            digest = next_digest(totals.digest, record.digest)
            totals = Totals(totals.images + record.images, totals.failures + len(record.failures), digest)
        try:
            for file in files:
                whole = self.folder / f"whole{file.suffix}"
                whole.unlink(missing_ok=True)
                file.merge([self._file(part, file) for part in range(count)], whole)
            whole = self.folder / "whole.errors.csv"
            write_csv(whole, ["filename", "reason"], self._failures(count))
            for file in files:
                _move_into_place(self.folder / f"whole{file.suffix}", file.target)
            if totals.failures:
                _move_into_place(whole, self.errors)
            else:
                self.errors.unlink(missing_ok=True)
            sizes = {file.suffix: file.target.stat().st_size for file in files}
            self._write_json(self.manifest, {"settings": self.settings, "totals": asdict(totals), "sizes": sizes})
        except OSError as error:
            raise self._unwritable(error) from error
        self._take_away()
        return totals

    def _take_lock(self) -> None:
        """On the folder, which two runs would otherwise throw away for each other."""
        self.release()
        if fcntl is None:
            return
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise RuntimeError(f"another run is writing to {self.folder}") from error
        except OSError:  # a file system without locks
            self.release()

    def _failures(self, count: int) -> Iterator[tuple[str, str]]:
        for part in range(count):
            yield from self.record(part).failures

    def _is_whole(self, part: int) -> bool:
        try:
            return bool(self.record(part))
        except ResumeError:
            return False

    def _file(self, part: int, file: OutputFile) -> Path:
        return self.folder / f"{part:08}{file.suffix}"

    def _take_away(self) -> None:
        """The folder, at once: one that is half deleted would look like an unfinished run."""
        self.folder.rename(self._done)
        self._forget_leftovers()

    def _forget_leftovers(self) -> None:
        shutil.rmtree(self._done, ignore_errors=True)

    def _check(self, content: Mapping[str, Any], where: Path) -> None:
        if said := differences(content["settings"], self.settings):
            raise ResumeError(f"{where} can't be resumed: {said}; go back to that, or start anew without resuming")

    def _unwritable(self, error: OSError) -> OSError:
        kept = f"{self.images_of(self.output)} images are done and kept in {self.folder}; --resume goes on from there"
        return OSError(error.errno, f"can't write results: {error.strerror or error}: {kept}")

    def _write_json(self, target: Path, content: Mapping[str, Any]) -> None:
        temporary = self.folder / f"{target.name}.{os.getpid()}"
        temporary.write_text(json.dumps(content), encoding="utf-8")
        _move_into_place(temporary, target)


def _read_manifest(file: Path) -> dict[str, Any]:
    """ResumeError for a file that is no manifest."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResumeError(f"{file} is no JSON: {error}; start anew without resuming") from error
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
        raise ResumeError(f"{file} is no manifest of a run, it has no settings; start anew without resuming")
    return content


def _totals(content: dict[str, Any], file: Path) -> Totals:
    try:
        return Totals(**content["totals"])
    except (KeyError, TypeError) as error:
        raise ResumeError(f"{file} has no totals of a finished run; start anew without resuming") from error


def _check_sizes(content: dict[str, Any], files: Iterable[OutputFile]) -> None:
    """Refuse to call a run finished whose files are others by now: neither to keep nor to replace them is wanted."""
    sizes = content.get("sizes")
    for file in files:
        size = file.target.stat().st_size
        written = sizes.get(file.suffix) if isinstance(sizes, dict) else None
        if size != written:
            raise ResumeError(
                f"{file.target} has {size} bytes, and the run that is to be resumed wrote {written}; "
                "move it elsewhere, or start anew without resuming"
            )


def next_digest(whole: str, part: str) -> str:
    """The digest of a whole run, one part further."""
    return blake2b((whole + part).encode(), digest_size=16).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Which settings are others, in words; "" for none."""
    other = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} was {_short(old.get(key))}, is {_short(new.get(key))}" for key in other)


def _move_into_place(temporary: Path, target: Path) -> None:
    """Rename, once the contents are safe on the disk."""
    _sync(temporary, os.O_RDWR)
    temporary.replace(target)
    if os.name != "nt":  # where folders can't be opened
        _sync(target.parent, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:56]} …"
