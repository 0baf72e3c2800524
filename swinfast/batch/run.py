"""A whole run: begin or resume, share the work out, join the parts."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter, sleep
from typing import TYPE_CHECKING

import torch

from ..arguments import whole_number
from ..files import check_writable
from .compute import Waits
from .engine import Division
from .formats import check_ending, output_files
from .parts import Parts, Totals
from .processes import work_on
from .share import Job, Share, Watch, work
from .sources import Images

if TYPE_CHECKING:
    from ..pipeline import Pipeline

PART_SIZE, PART_BYTES = 1024, 256 << 20  # of images, unless they take more memory than that
POLL = 0.5  # seconds between looks at what other ranks have finished


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        images: All of the inputs, with those that were done before, and with the failures.
        failures: Images that failed: not read, or with outputs that are not finite.
        done_now: Images of this run.
        seconds: From the first to the last of them.
        waits: Where the time went; of several processes, their sum.
    """

    images: int
    failures: int
    done_now: int = 0
    seconds: float = 0.0
    waits: Waits = field(default_factory=Waits)

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.done_now / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        waits = self.waits
        if not self.images:
            return "no images"
        if not self.done_now:
            return f"{self.images} images were finished before, nothing is left to do"
        return (
            f"{self.done_now} images in {self.seconds:.1f} s, {self.rate:.1f} images/s; "
            f"waited {waits.decode:.1f} s for decode, {waits.copy:.1f} s for copy, {waits.compute:.1f} s for compute, "
            f"{waits.write:.1f} s for write: the bottleneck is {waits.bottleneck}"
        )


@dataclass
class _Count:
    """Passes batches on to a watch, and counts."""

    watch: Watch | None
    images: int = 0

    def __call__(self, names: list[str], reasons: list[str | None]) -> None:
        self.images += len(names)
        if self.watch is not None:
            self.watch(names, reasons)


def write(
    pipeline: "Pipeline",
    images: Images,
    output: Path,
    resume: bool,
    strict: bool,
    part_size: int | None,
    devices: Sequence[str],
    watch: Watch | None,
) -> Summary:
    """Pipeline.write."""
    if part_size is not None:
        part_size = whole_number("part_size", part_size, 1)
    if isinstance(devices, str):
        raise ValueError(f"devices must be several names, got {devices!r}")
    check_ending(output, pipeline.endings)
    check_writable("output", output)
    parts = Parts(output, {})
    for file in (parts.manifest, parts.errors, *(file.target for file in output_files(output, pipeline.layout))):
        check_writable("what is written with output", file)
    if images.output is None or Path(images.output) != output:  # else all paths were checked against it already
        images = replace(images, output=str(output))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if devices:
            raise ValueError("devices can't be given under torchrun, where every process has its own")
        return _as_rank(pipeline, images, output, resume, strict, part_size, watch, rank, world)
    for device in devices:  # said before anything is started or thrown away
        pipeline.check_device(device)
    job = _job(pipeline, images, output, resume, strict, part_size)
    parts = job.parts()
    try:
        finished = parts.begin(resume, job.files())
        if finished is not None:
            return _nothing_to_do(job, finished)
        return _all_parts(job, parts, devices, watch)
    finally:
        parts.release()


def _all_parts(job: Job, parts: Parts, devices: Sequence[str], watch: Watch | None) -> Summary:
    count, began = _Count(watch), perf_counter()
    share = work_on(devices, job, count) if devices else work(job, count)
    seconds = perf_counter() - began
    totals = parts.join(share.parts, job.files())
    return Summary(totals.images, totals.failures, count.images, seconds, share.waits)


def _job(pipeline: "Pipeline", images: Images, output: Path, resume: bool, strict: bool, part_size: int | None) -> Job:
    if resume and pipeline.found_batch_size:  # another try would find another number
        pipeline.batch_size = Parts.batch_size_of(output) or pipeline.batch_size
    if part_size is None:
        row = sum(array.dtype.itemsize * math.prod(array.shape[1:]) for array in pipeline.no_rows().values())
        part_size = max(1, min(PART_SIZE, PART_BYTES // row))
    part_size = -(-part_size // pipeline.batch_size) * pipeline.batch_size
    chosen = {"members": images.members, "image_column": images.image_column}
    settings = pipeline.settings() | {"part_size": part_size} | chosen
    return Job(pipeline, images, output, Division(part_size, pipeline.batch_size), strict, settings)


def _nothing_to_do(job: Job, finished: Totals) -> Summary:
    job.parts().compare_whole(job.division.divide(job.images, set()), finished)
    return Summary(finished.images, finished.failures)


def _as_rank(pipeline, images, output, resume, strict, part_size, watch, rank, world) -> Summary:
    """One of torchrun's processes. Rank 0 begins, and joins the parts once the others' are there too."""
    group = _Group()
    pipeline.batch_size = group.tell(pipeline.batch_size)
    job = _job(pipeline, images, output, resume, strict, part_size)
    parts, count, began = job.parts(), _Count(watch), perf_counter()
    begun = parts.begin(resume, job.files()) if rank == 0 else None
    finished = group.tell(begun)  # nobody writes before rank 0 has begun
    group.close()
    if finished is not None:
        return _nothing_to_do(job, finished)
    share: Share = work(job, count, rank, world)
    seconds = perf_counter() - began
    if rank == 0:
        while len(parts.finished()) < share.parts:
            sleep(POLL)
        totals = parts.join(share.parts, job.files())
    else:
        totals = Totals(share.images, share.failures, "")  # the records may be gone, once rank 0 has all of them
    return Summary(totals.images, totals.failures, count.images, seconds, share.waits)


class _Group:
    """torchrun's processes, for as long as they must agree on something."""

    def __init__(self):
        self._ours = not torch.distributed.is_initialized()
        if self._ours:
            torch.distributed.init_process_group("gloo")

    def tell(self, value):
        """Rank 0's value, in every rank."""
        values = [value]
        torch.distributed.broadcast_object_list(values)
        return values[0]

    def close(self) -> None:
        if self._ours:
            torch.distributed.destroy_process_group()
