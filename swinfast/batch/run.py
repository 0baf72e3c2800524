"""A whole run: begin or resume, share the work out, join the parts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from ..arguments import whole_number
from ..autocast import autocast_dtype
from ..files import check_writable
from ..float32_precision import float32_precision
from ..pixels import pillow_settings
from .compute import Waits
from .engine import Division
from .formats import check_ending, output_files
from .parts import Parts, differences
from .places import Places
from .processes import work_on
from .ranks import Exchange, between_ranks, rank_and_world
from .share import Job, Listener, check_same_inputs, work
from .sources import Images

if TYPE_CHECKING:
    from ..pipeline import Pipeline

PART_SIZE, PART_BYTES = 1024, 256 << 20  # of images, unless they take more memory than that


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

    watch: Listener | None
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
    watch: Listener | None,
) -> Summary:
    """Pipeline.write."""
    if devices and rank_and_world()[1] > 1:
        raise ValueError("devices can't be given under torchrun, where every process has its own")
    with between_ranks() as exchange:  # around the checks too: where one rank's fail, all are to know
        if part_size is not None:
            part_size = whole_number("part_size", part_size, 1)
        _check(pipeline, output, devices)
        if images.output is None or Path(images.output) != output:  # else all paths were checked against it already
            images = replace(images, output=str(output))
        batch_size = exchange(pipeline.batch_size)[0]
        if pipeline.found_batch_size:  # another try, or rank, would find another number
            pipeline.batch_size = (resume and Parts.batch_size_of(output)) or batch_size
        division = Division(_part_size(pipeline, part_size), pipeline.batch_size)
        job = Job(pipeline, images, output, division, strict, _settings(pipeline, images, division.part_size, devices))
        for rank, settings in enumerate(every := exchange({"output": output.name} | job.settings)):
            if said := differences(every[0], settings):
                raise ValueError(f"ranks must have the same settings; from rank 0 to rank {rank}: {said}")
        return _run(job, exchange, resume, devices, _Count(watch))


def _check(pipeline: "Pipeline", output: Path, devices: Sequence[str]) -> None:
    """Complain before anything is started or thrown away."""
    if isinstance(devices, str):
        raise ValueError(f"devices must be several names, got {devices!r}")
    check_ending(output, pipeline.endings)
    check_writable("output", output)
    places = Places.of(output)
    for file in (places.manifest, places.errors, *(file.target for file in output_files(output, pipeline.layout))):
        check_writable("what is written with output", file)
    for device in devices:
        pipeline.check_device(device)


def _run(job: Job, exchange: Exchange, resume: bool, devices: Sequence[str], count: "_Count") -> Summary:
    """Rank 0 begins and, once all have done their shares, joins the parts; so does a process that is alone."""
    rank, world = rank_and_world()
    parts = job.parts()
    try:
        finished = exchange(parts.begin(resume, job.files()) if rank == 0 else None)[0]  # and nobody writes before
        if finished is not None:
            parts.compare_whole(job.division.divide(job.images, set()), finished)
            return Summary(finished.images, finished.failures)
        began = perf_counter()
        share = work_on(devices, job, count) if devices else work(job, count, rank, world)
        seconds = perf_counter() - began
        check_same_inputs({f"rank {number}": digest for number, digest in enumerate(exchange(share.digest))})
        totals = exchange(parts.join(share.parts, job.files()) if rank == 0 else None)[0]
        return Summary(totals.images, totals.failures, count.images, seconds, share.waits)
    finally:
        parts.release()


def _part_size(pipeline: "Pipeline", wanted: int | None) -> int:
    """Whole batches, of as many images as are wanted or more."""
    if wanted is None:
        row = sum(array.dtype.itemsize * math.prod(array.shape[1:]) for array in pipeline.no_rows().values())
        wanted = max(1, min(PART_SIZE, PART_BYTES // row))
    return -(-wanted // pipeline.batch_size) * pipeline.batch_size


def _settings(pipeline: "Pipeline", images: Images, part_size: int, devices: Sequence[str]) -> dict[str, Any]:
    """All that results depend on."""
    chosen = {"members": images.members, "image_column": images.image_column}
    regions = {str(autocast_dtype(torch.device(device))) for device in devices or [pipeline.device]}
    around = {"autocast": ", ".join(sorted(regions))} | float32_precision() | pillow_settings()
    return pipeline.settings() | {"part_size": part_size} | chosen | around
