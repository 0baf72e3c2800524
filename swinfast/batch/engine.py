"""The loop of a run: images are decoded ahead of the model, in order, and never more than a few batches."""

import itertools
import time
from collections import deque
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..pixels import Crop
from .compute import Arrays, Compute
from .decode import Decoder, Reasons
from .sources import Item

CHUNK = 8  # images that one decoding process takes at a time
NOT_FINITE = "the model's output is not finite"
AHEAD, MOST = 3, 64  # batches in the hands of decoding processes: at least, and at most, however small they are


class Batch(NamedTuple):
    """Images that go through the model together, of one part of the output."""

    part: int
    items: list[Item]


class PartEnd(NamedTuple):
    """After the last batch of a part: how many images it has, and a digest of their names."""

    part: int
    images: int
    digest: str


class Done(NamedTuple):
    """What became of a batch: for each image its name and why it failed (or None), and rows of arrays for the rest."""

    names: list[str]
    reasons: Reasons
    arrays: Arrays

    def failures(self) -> list[tuple[str, str]]:
        """(name, reason) of each image that failed."""
        return [(name, reason) for name, reason in zip(self.names, self.reasons, strict=True) if reason is not None]

    def good(self) -> list[str]:
        """Names of the others."""
        return [name for name, reason in zip(self.names, self.reasons, strict=True) if reason is None]


@dataclass(frozen=True)
class Division:
    """How inputs fall into parts and batches: always the same way, so that a part can be made again bit for bit."""

    part_size: int
    batch_size: int

    def divide(self, items: Iterable[Item], wanted: Container[int]) -> Iterator[Batch | PartEnd]:
        """The batches of the wanted parts, and the end of every part."""
        items = iter(items)
        for part in itertools.count():
            digest, count = blake2b(digest_size=16), 0
            while count < self.part_size:
                size = min(self.batch_size, self.part_size - count)
                batch = list(itertools.islice(items, size))
                for item in batch:
                    digest.update(item.name.encode("utf-8", "surrogateescape") + b"\0")
                count += len(batch)
                if batch and part in wanted:
                    yield Batch(part, batch)
                if len(batch) < size:
                    break
            if count:
                yield PartEnd(part, count, digest.hexdigest())
            if count < self.part_size:
                return


class _Decoding(NamedTuple):
    names: list[str]
    known: Reasons  # for each image, why it can't even be tried
    chunks: list[tuple[Tensor, "Future[Reasons]"]]


def run(steps: Iterable[Batch | PartEnd], crop: Crop, compute: Compute, workers: int) -> Iterator[Done | PartEnd]:
    """Decode and compute batches; results, and the ends of parts among them, come in the order of the inputs."""
    steps = iter(steps)
    decoding: deque[_Decoding | PartEnd] = deque()
    computing: deque[tuple[_Decoding, Reasons, object] | PartEnd] = deque()
    try:
        with Decoder(crop, workers) as decoder:
            while True:
                while _batches(decoding) < AHEAD or (_chunks(decoding) < 2 * workers and _batches(decoding) < MOST):
                    step = next(steps, None)
                    if step is None:
                        break
                    decoding.append(step if isinstance(step, PartEnd) else _start(decoder, step, crop, compute.on_gpu))
                if not decoding:
                    break
                computing.append(_advance(decoding.popleft(), compute))
                while computing and (isinstance(computing[0], PartEnd) or _batches(computing) > compute.under_way):
                    yield _finish(computing.popleft(), compute)
            while computing:
                yield _finish(computing.popleft(), compute)
    finally:
        compute.close()


def _chunks(decoding: Iterable[_Decoding | PartEnd]) -> int:
    return sum(len(step.chunks) for step in decoding if isinstance(step, _Decoding))


def _batches(computing: Iterable[object]) -> int:
    return sum(not isinstance(step, PartEnd) for step in computing)


def _start(decoder: Decoder, batch: Batch, crop: Crop, pinned: bool) -> _Decoding:
    """Hand a batch to the decoding processes, in chunks that each have their place in one buffer."""
    sources = [item.source for item in batch.items if item.reason is None]
    buffer = torch.empty((len(sources), *crop.shape), dtype=torch.uint8, device="cpu", pin_memory=pinned)
    chunks = []
    for start in range(0, len(sources), CHUNK):
        place = buffer[start : start + CHUNK]
        chunks.append((place, decoder.submit(sources[start : start + CHUNK], place.numpy())))
    return _Decoding([item.name for item in batch.items], [item.reason for item in batch.items], chunks)


def _advance(step: _Decoding | PartEnd, compute: Compute) -> tuple[_Decoding, Reasons, object] | PartEnd:
    """Wait until a batch is decoded and start to compute it."""
    if isinstance(step, PartEnd):
        return step
    began = time.perf_counter()
    decoded = [(place, future.result()) for place, future in step.chunks]
    compute.waits.decode += time.perf_counter() - began
    tried = itertools.chain.from_iterable(reasons for _, reasons in decoded)
    reasons = [next(tried) if known is None else known for known in step.known]
    good = [place[: chunk.count(None)] for place, chunk in decoded]
    images = _joined(good) if None in reasons else None
    return step, reasons, None if images is None else compute.start(images)


def _joined(places: list[Tensor]) -> Tensor:
    """Neighbours in one buffer as one tensor, without a copy where nothing is missing between them."""
    first, count = places[0], sum(map(len, places))
    if all(len(place) == CHUNK for place in places[:-1]):
        return first.as_strided((count, *first.shape[1:]), first.stride())
    return torch.cat(places)


def _finish(step: tuple[_Decoding, Reasons, object] | PartEnd, compute: Compute) -> Done | PartEnd:
    if isinstance(step, PartEnd):
        return step
    decoding, reasons, started = step
    return Done(decoding.names, *judged(reasons, {} if started is None else compute.finish(started)))


def judged(reasons: Reasons, arrays: Arrays) -> tuple[Reasons, Arrays]:
    """Reasons and rows once more: images whose outputs are not finite are failures too."""
    checks = [np.isfinite(array).all(axis=tuple(range(1, array.ndim))) for array in arrays.values()]
    finite = np.logical_and.reduce(checks)  # for each row
    if finite.all():
        return reasons, arrays
    rows = iter(finite.tolist())
    reasons = [NOT_FINITE if reason is None and not next(rows) else reason for reason in reasons]
    return reasons, {name: array[finite] for name, array in arrays.items()}
