"""A run on several devices of one machine: a process for each, which does its share of the parts."""

import contextlib
import copy
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, replace

import torch

from ..autocast import autocast_dtype, within_autocast
from ..float32_precision import float32_precision, set_float32_precision
from ..messages import say
from ..pixels import pillow_settings, set_pillow
from .children import skip_to_answers, start
from .compute import Waits
from .decode import usable_cores
from .parts import ResumeError
from .share import Job, Listener, Share, StrictError, check_same_inputs, work
from .worker import take_stdout

ERRORS = {error.__name__: error for error in (ResumeError, StrictError, OSError, ValueError)}
CHILD = [sys.executable, "-c", "from swinfast.batch.processes import main; main()"]


def work_on(devices: Sequence[str], job: Job, watch: Listener) -> Share:
    """Do all parts of a job, part i on device i % len(devices).

    Raises:
        What work raises, with the device in front; RuntimeError where a process ends otherwise.
    """
    lock = threading.Lock()

    def told(names: list[str], reasons: list[str | None]) -> None:
        with lock:
            watch(names, reasons)

    children: list[subprocess.Popen] = []
    try:
        with ThreadPoolExecutor(len(devices)) as pool:
            try:
                children.extend(start(CHILD) for _ in devices)  # each imports PyTorch before it reads its job
                for rank, (child, device) in enumerate(zip(children, devices, strict=True)):
                    _send(child, device, job, rank, len(devices))
                following = [pool.submit(_follow, *pair, told) for pair in zip(children, devices, strict=True)]
                wait(following, return_when=FIRST_EXCEPTION)
            finally:  # also where this process is interrupted: the threads end with what they follow
                for child in children:
                    child.kill()
    finally:
        for child in children:
            child.wait()
            child.stdout.close()
            with contextlib.suppress(BrokenPipeError):  # of what it was not told any more
                child.stdin.close()
    failed = [future.exception() for future in following if future.exception() is not None]
    if failed:
        raise min(failed, key=lambda error: isinstance(error, _Ended))  # rather a reason than that one was ended
    shares = [future.result() for future in following]
    numbered = enumerate(zip(devices, shares, strict=True))
    check_same_inputs({f"process {number} ({device})": share.digest for number, (device, share) in numbered})
    total = shares[0]
    for share in shares[1:]:
        total.waits.add(share.waits)
    return total


class _Ended(RuntimeError):
    """A process ended without a word."""


def _send(child: subprocess.Popen, device: str, job: Job, rank: int, world: int) -> None:
    pipeline = copy.copy(job.pipeline)
    pipeline.say = None  # each process has its own
    pipeline.workers = -(-pipeline.workers // world)
    on_cpu = torch.device(device).type == "cpu"
    pipeline.threads = -(-pipeline.threads // world)
    pipeline.model = pipeline.model if pipeline.device.type == "cpu" else copy.deepcopy(pipeline.model).cpu()
    threads = max(1, usable_cores() // world) if on_cpu and pipeline.threads == 0 else 1  # of each call of PyTorch
    message = {"device": device, "rank": rank, "world": world, "threads": threads}
    message |= {"pillow": pillow_settings(), "float32_precision": float32_precision()}  # as they are here
    message["autocast"] = autocast_dtype(torch.device(device))
    with contextlib.suppress(BrokenPipeError):  # it will be seen when it is followed
        pickle.dump((message, replace(job, pipeline=pipeline)), child.stdin)
        child.stdin.flush()


def _follow(child: subprocess.Popen, device: str, watch: Listener) -> Share:
    """Read what a process tells: lines of JSON."""
    skip_to_answers(child.stdout)
    for line in child.stdout:
        told = json.loads(line)
        if "names" in told:
            watch(told["names"], told["reasons"])
        elif "say" in told:
            say(told["say"])
        elif "error" in told:
            raise ERRORS.get(told["type"], RuntimeError)(f"{device}: {told['error']}")
        else:
            return Share(told["parts"], told["digest"], Waits(**told["waits"]))
    raise _Ended(f"the process for {device} ended with exit code {child.wait()}")


def main() -> None:
    """A process for one device: a pickled job on the standard input, lines of JSON on the standard output."""
    try:
        _serve()
    except BrokenPipeError:  # the process that started this one is gone
        os._exit(1)


def _serve() -> None:
    answers = take_stdout()

    def tell(**message: object) -> None:
        answers.write(json.dumps(message).encode() + b"\n")
        answers.flush()

    try:
        message, job = pickle.load(sys.stdin.buffer)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        torch.set_num_threads(message["threads"])
        set_pillow(message["pillow"])
        set_float32_precision(message["float32_precision"])
        job.pipeline.say = lambda text: tell(say=text)
        job.pipeline.move(message["device"])
        rank, world = message["rank"], message["world"]
        with within_autocast(torch.device(message["device"]), message["autocast"]):
            share = work(job, lambda names, reasons: tell(names=names, reasons=reasons), rank, world)
        tell(**asdict(share))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        known = [cls.__name__ for cls in type(error).__mro__ if cls.__name__ in ERRORS]
        tell(error=str(error), type=known[0] if known else type(error).__name__)
        sys.exit(2)


def _end_with_parent() -> None:
    """Nobody would stop a process whose parent was killed."""
    while os.read(sys.stdin.fileno(), 1):  # not by sys.stdin, whose lock would be held when this process ends
        pass
    os._exit(1)
