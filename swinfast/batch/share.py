"""A process's share of a run: every world-th part, decoded, computed and committed."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from . import engine
from .compute import Arrays, Waits
from .decode import Reasons
from .engine import Batch, Division, Done, PartEnd
from .formats import OutputFile, output_files
from .parts import Parts, Record, ResumeError, next_digest
from .sources import Images

if TYPE_CHECKING:
    from ..pipeline import Pipeline

COMMITS_WAITING = 2  # parts that are computed but not yet on the disk
Listener = Callable[[list[str], Reasons], None]  # told of every batch: names, and reasons of failures


class StrictError(RuntimeError):
    """An image failed, and the run was to stop at the first such one."""


@dataclass(frozen=True)
class Job:
    """A run: what every process that takes part in it must know."""

    pipeline: "Pipeline"
    images: Images
    output: Path
    division: Division
    strict: bool
    settings: dict

    def parts(self) -> Parts:
        return Parts(self.output, self.settings)

    def files(self) -> list[OutputFile]:
        return output_files(self.output, self.pipeline.layout)


@dataclass
class Share:
    """What a process did.

    Attributes:
        parts: Of the inputs, whoever did them.
        digest: Of the names of all inputs.
        waits: Where its time went.
    """

    parts: int = 0
    digest: str = ""
    waits: Waits = field(default_factory=Waits)


class _Wanted:
    """Parts that are a process's own and not done yet."""

    def __init__(self, rank: int, world: int, finished: set[int]):
        self._rank, self._world, self._finished = rank, world, finished

    def __contains__(self, part: int) -> bool:
        return part % self._world == self._rank and part not in self._finished


def work(job: Job, watch: Listener, rank: int = 0, world: int = 1) -> Share:
    """Do the parts number rank, rank + world, … of a job that has begun.

    Raises:
        ResumeError: The inputs are not those of the parts that are finished.
        StrictError: An image fails, in a strict job.
        OSError: Results can't be written.
    """
    parts, files, share = job.parts(), job.files(), Share()
    finished = {part for part in parts.finished() if part % world == rank}  # others compare theirs
    steps = _checked(job, parts, finished, _Wanted(rank, world, finished), share)
    compute = job.pipeline.compute()
    collected = _Part()
    commits: list[Future] = []
    running = engine.run(steps, job.pipeline.crop, compute, job.pipeline.workers)
    with ThreadPoolExecutor(1, "write") as writer, contextlib.closing(running):
        for step in running:
            if isinstance(step, Done):
                if job.strict and (failed := step.failures()):
                    raise StrictError(f"{failed[0][0]} failed: {failed[0][1]}")
                collected.add(step)
                watch(step.names, step.reasons)
            elif collected.images:
                record = Record(step.images, step.digest, collected.failures)
                names, arrays = collected.rows(job.pipeline.no_rows())
                commits.append(writer.submit(parts.commit, step.part, files, names, arrays, record))
                collected = _Part()
                _wait(commits, COMMITS_WAITING, compute.waits)
        _wait(commits, 0, compute.waits)
    share.waits = compute.waits
    return share


def check_same_inputs(digests: Mapping[str, str]) -> None:
    """ResumeError where a process has read other inputs than the first one, so that their parts make no whole."""
    first = next(iter(digests))
    for name, digest in digests.items():
        if digest != digests[first]:
            raise ResumeError(
                f"{name} has read other inputs than {first}: all must find the same images in the same order, and "
                "these must not change during a run; start anew without resuming"
            )


def _wait(commits: list[Future], most: int, waits: Waits) -> None:
    began = perf_counter()
    while len(commits) > most:
        commits.pop(0).result()
    waits.write += perf_counter() - began


def _checked(job: Job, parts: Parts, finished: set[int], wanted: _Wanted, share: Share) -> Iterator[Batch | PartEnd]:
    """The steps to do, while what is finished is compared with the inputs as they are now."""
    for step in job.division.divide(job.images, wanted):
        if isinstance(step, Batch):
            yield step
            continue
        share.parts += 1
        share.digest = next_digest(share.digest, step.digest)
        if step.part in finished:
            _compare(parts, step)
        elif step.part in wanted:
            yield step
    if any(part >= share.parts for part in finished):
        raise ResumeError(f"{parts.folder} has results of more images than there are now")


def _compare(parts: Parts, step: PartEnd) -> None:
    """ResumeError where a finished part is of other inputs."""
    record = parts.record(step.part)
    if (record.images, record.digest) != (step.images, step.digest):
        raise ResumeError(
            f"{parts.folder} can't be resumed: the inputs have other names now than in finished part {step.part}; "
            "go back to those, or start anew without resuming"
        )


class _Part:
    """The results of one part so far."""

    def __init__(self):
        self.images = 0
        self.failures: list[tuple[str, str]] = []
        self._names: list[str] = []
        self._arrays: list[Arrays] = []

    def add(self, done: Done) -> None:
        self.images += len(done.names)
        self.failures += done.failures()
        self._names += done.good()
        if done.arrays:
            self._arrays.append(done.arrays)

    def rows(self, empty: Arrays) -> tuple[list[str], Arrays]:
        """Names and arrays; empty holds an array of no rows for each name."""
        arrays = {name: np.concatenate([none, *(each[name] for each in self._arrays)]) for name, none in empty.items()}
        return self._names, arrays
