"""The model's side of a run: batches of uint8 pixels to arrays, on a GPU beside the next copy, on a CPU in threads."""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..autocast import autocast_dtype, within_autocast

Arrays = dict[str, np.ndarray]  # by name, a row for each image
Function = Callable[[Tensor], dict[str, Tensor]]  # uint8 [B, H, W, C] on the device to outputs
LARGEST_BATCH = 512


@dataclass
class Waits:
    """Seconds that a run waited for decoding, copied, computed and waited for writing."""

    decode: float = 0.0
    copy: float = 0.0
    compute: float = 0.0
    write: float = 0.0

    def add(self, other: "Waits") -> None:
        for name, seconds in asdict(other).items():
            setattr(self, name, getattr(self, name) + seconds)

    @property
    def bottleneck(self) -> str:
        """What took longest."""
        return max(asdict(self), key=asdict(self).get)


class _OnGpu(NamedTuple):
    outputs: dict[str, Tensor]  # on their way into pinned memory
    pixels: Tensor  # kept until the copies are done
    events: tuple[torch.cuda.Event, ...]  # copy began, copy ended, computing began, results are there


class Compute:
    """Computes batches in order; several can be under way.

    On a GPU, pixels are copied on a stream of their own while the batch before computes. Where the GPU's memory does
    not suffice, batches are computed in halves from then on.

    Args:
        function: What is computed.
        device: Where.
        threads: On a CPU, batches computed at a time, each in a thread; 0 for one in the caller's thread.
        say: Takes messages for people.
    """

    def __init__(self, function: Function, device: torch.device, threads: int, say: Callable[[str], None]):
        self.waits = Waits()
        self._function = function
        self._device = device
        self._say = say
        self._limit: int | None = None  # images at a time, once memory ran out
        self.on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.on_gpu else None
        self._pool = None if self.on_gpu or threads == 0 else ThreadPoolExecutor(threads, "compute")
        self.under_way = 1 if self.on_gpu else threads  # batches to have started before the first is finished

    def start(self, pixels: Tensor) -> "_OnGpu | Future[Arrays] | Arrays":
        """Start with uint8 pixels [B, H, W, C] in this machine's memory (pinned, to be copied beside computation)."""
        if self._pool is not None:
            return self._pool.submit(self._on_cpu_within, autocast_dtype(self._device), pixels)
        if self.on_gpu:
            return self._launch(pixels)
        began = time.perf_counter()
        arrays = self._on_cpu(pixels)
        self.waits.compute += time.perf_counter() - began
        return arrays

    def finish(self, started: "_OnGpu | Future[Arrays] | Arrays") -> Arrays:
        """The results of a batch that was started."""
        began = time.perf_counter()
        if isinstance(started, Future):
            started = started.result()
            self.waits.compute += time.perf_counter() - began
        if not isinstance(started, _OnGpu):
            return started
        copy_began, copied, compute_began, done = started.events
        done.synchronize()
        self.waits.copy += copy_began.elapsed_time(copied) / 1e3
        self.waits.compute += compute_began.elapsed_time(done) / 1e3
        return {name: output.numpy() for name, output in started.outputs.items()}

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _on_cpu_within(self, region: torch.dtype | None, pixels: Tensor) -> Arrays:
        """In the autocast region that the batch was started in, which belongs to that thread alone."""
        with within_autocast(self._device, region):
            return self._on_cpu(pixels)

    def _on_cpu(self, pixels: Tensor) -> Arrays:
        return {name: output.numpy() for name, output in self._in_pieces(pixels).items()}

    def _launch(self, pixels: Tensor) -> _OnGpu:
        events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(4))
        with torch.cuda.device(self._device):
            main = torch.cuda.current_stream()
            with torch.cuda.stream(self._stream):
                events[0].record()
                on_device = self._copied(pixels)
                events[1].record()
            main.wait_event(events[1])
            on_device.record_stream(main)  # its memory is the copy stream's
            events[2].record()
            outputs = self._in_pieces(on_device)
            outputs = {name: output.to("cpu", non_blocking=True) for name, output in outputs.items()}
            events[3].record()
        return _OnGpu(outputs, pixels, events)

    def _copied(self, pixels: Tensor) -> Tensor:
        """On the device. Where even that does not fit, what PyTorch holds in reserve is given back first."""
        with contextlib.suppress(torch.OutOfMemoryError):
            return pixels.to(self._device, non_blocking=True)
        torch.cuda.empty_cache()
        return pixels.to(self._device, non_blocking=True)

    def _in_pieces(self, pixels: Tensor) -> dict[str, Tensor]:
        """The function of all pixels, in as large pieces as memory allows."""
        while True:
            size = len(pixels) if self._limit is None else min(self._limit, len(pixels))
            try:
                with torch.inference_mode():
                    pieces = [self._function(piece) for piece in pixels.split(size)]
                    if len(pieces) == 1:
                        return pieces[0]
                    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            # not in the except clause, where the error would still hold on to tensors
            pieces = None
            self._limit = size // 2
            if self.on_gpu:
                torch.cuda.empty_cache()
            self._say(f"{self._device} is out of memory with {size} images at a time: going on with {self._limit}")


def find_batch_size(function: Function, shape: tuple[int, int, int], device: torch.device) -> int:
    """The smallest batch size whose rate is within 5 % of the best one, by trying powers of two on random pixels.

    Larger ones are tried for as long as they gain and fit into memory.
    """
    rates: dict[int, float] = {}
    size = 1
    while size <= LARGEST_BATCH:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (size, *shape), dtype=torch.uint8, generator=generator, device="cpu")
        try:
            rates[size] = _rate(function, pixels.to(device))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            break
        if rates[size] < 0.8 * max(rates.values()) or (size >= 8 and rates[size] < 1.02 * rates[size // 4]):
            break
        size *= 2
    return min(size for size, rate in rates.items() if rate >= 0.95 * max(rates.values()))


def _rate(function: Function, pixels: Tensor) -> float:
    """Images a second, the best of three."""
    seconds = []
    with torch.inference_mode():
        for _ in range(4):
            began = time.perf_counter()
            for output in function(pixels).values():
                output.cpu()  # waits for the device
            seconds.append(time.perf_counter() - began)
    return len(pixels) / min(seconds[1:])
