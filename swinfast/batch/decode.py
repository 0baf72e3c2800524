"""Decoding beside the model: a thread for each decoding process, which talks to it through pipes."""

import contextlib
import dataclasses
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..pixels import Crop, Source, pillow_settings
from .children import skip_to_answers, start
from .worker import load

WORKER = Path(__file__).with_name("worker.py")
Reasons = list[str | None]  # of failures; None for an image that was read


class Decoder:
    """Decodes lists of images, several lists at a time. A context manager: leaving it ends the processes at once.

    A process that dies (killed, out of memory, a crash in a codec) is replaced and its images are tried again, each by
    itself; an image on which two more processes die is a failure. Nothing of the caller's is imported in the
    processes, so that programs need no ``if __name__ == "__main__"``.

    Args:
        crop: What to make of each image.
        workers: Processes; 0 to decode in threads of this one, which alone knows formats that a program has registered
            with Pillow.
    """

    def __init__(self, crop: Crop, workers: int):
        self._crop = crop
        self._local = threading.local()
        self._processes: set[_Process] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._in_threads = workers == 0
        self._pool = ThreadPoolExecutor(workers or usable_cores(), thread_name_prefix="decode")

    def submit(self, sources: Sequence[Source], out: np.ndarray) -> "Future[Reasons]":
        """Decode sources, the n good ones into out[:n]; out is uint8 [B, H, W, C], contiguous, B >= len(sources)."""
        return self._pool.submit(self._decode_here if self._in_threads else self._decode, list(sources), out)

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.popen.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.close()

    def _decode_here(self, sources: list[Source], out: np.ndarray) -> Reasons:
        images, reasons = zip(*(load(self._crop, source) for source in sources), strict=True)
        for place, image in zip(out, filter(None, images), strict=False):
            place[:] = np.asarray(image).reshape(self._crop.shape)
        return list(reasons)

    def _decode(self, sources: list[Source], out: np.ndarray) -> Reasons:
        try:
            return self._process().decode(sources, out)
        except _ProcessDied:
            self._discard()
        reasons, done = [], 0
        for source in sources:
            reasons += self._decode_alone(source, out[done:])
            done += reasons[-1] is None
        return reasons

    def _decode_alone(self, source: Source, out: np.ndarray) -> Reasons:
        reason = None
        for _ in range(2):
            try:
                return self._process().decode([source], out)
            except _ProcessDied as died:  # noqa: PERF203 (rare)
                self._discard()
                reason = f"{died} while it decoded this image, and so did another"
        return [reason]

    def _process(self) -> "_Process":
        """This thread's process."""
        process = getattr(self._local, "process", None)
        if process is None:
            with self._lock:  # so that __exit__ sees every process there is
                if self._closed:
                    raise RuntimeError("the decoder is closed")
                process = self._local.process = _Process()
                self._processes.add(process)
            process.prepare(self._crop)
        return process

    def _discard(self) -> None:
        process, self._local.process = self._local.process, None
        with self._lock:
            self._processes.discard(process)
        process.close()


class _ProcessDied(Exception):
    """A decoding process is gone."""


class _Process:
    """One decoding process. Its environment, its interpreter and where it imports from are this one's."""

    def __init__(self):
        self.popen = start([sys.executable, str(WORKER)])

    def prepare(self, crop: Crop) -> None:
        try:
            self._send((dataclasses.astuple(crop), pillow_settings()))
            skip_to_answers(self.popen.stdout)
            self._receive()
        except _ProcessDied as died:
            raise RuntimeError(f"{died} as it started: {sys.executable} {WORKER}") from died

    def decode(self, sources: list[Source], out: np.ndarray) -> Reasons:
        self._send(sources)
        reasons = self._receive()
        good = memoryview(out[: reasons.count(None)]).cast("B") if None in reasons else b""
        if len(good) and self.popen.stdout.readinto(good) < len(good):
            raise self._died()
        return reasons

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout):
            with contextlib.suppress(OSError):  # what was still to be sent
                stream.close()

    def _send(self, message: object) -> None:
        try:
            pickle.dump(message, self.popen.stdin)
            self.popen.stdin.flush()
        except OSError as error:
            raise self._died() from error

    def _receive(self) -> Reasons:
        try:
            return pickle.load(self.popen.stdout)
        except (EOFError, pickle.UnpicklingError) as error:
            raise self._died() from error

    def _died(self) -> _ProcessDied:
        try:
            code = self.popen.wait(timeout=1)
        except subprocess.TimeoutExpired:  # it lives, but does not answer as it should
            self.popen.kill()
            code = self.popen.wait()
        return _ProcessDied(f"a decoding process ended ({f'signal {-code}' if code < 0 else f'exit code {code}'})")


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
