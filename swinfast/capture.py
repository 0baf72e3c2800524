"""Capturing one CUDA graph: on which stream, in whose memory, and what a capture that fails leaves behind."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

MUCH_ROOM = 128 << 20
MORE_ROOM = 1.5  # times what a pool was asked for: for less, a larger graph takes what it has and some tensors more
SIDE_STREAMS = 32  # as many as PyTorch has of a priority
LIBRARY_ROOM = 64 << 20  # for what cuBLAS works in, which a first capture on a stream gives a place among its tensors
ALLOCATOR_SETTINGS = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # environment variables


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Garbage may hold graphs and events, and to destroy one of them ends a capture; or the last graph of the pool that
    is to be shared."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_garbage_collection()
def capture(compute: Callable[[], Tensor], device: torch.device, room: int = 0) -> tuple[Callable[[], None], Tensor]:
    """Record what a function launches.

    Args:
        room: Bytes that its tensors take at most at a time. If they are many, they are asked for at once: a graph keeps
            its memory, and when tensors come one by one, larger ones find no place where smaller ones were.

    Returns:
        (what launches it all again, the output that this writes).
    """
    if device.index is None:  # the current one, which tensors know by its number
        device = torch.device(device.type, torch.cuda.current_device())
    if not keeps_memory():
        raise RuntimeError("graphs take memory from PyTorch's own allocator alone, and another one is set")
    key = device, stream_of(device)
    pool = _pools.get(key) or Pool(*key)
    _pools[key] = pool
    graph = torch.cuda.CUDAGraph()
    try:
        # a capture that fails at its end leaves its stream the current one: the stream around it comes back from there
        with (
            torch.cuda.device(device),
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, pool=pool.handle, stream=pool.side, capture_error_mode="thread_local"),
        ):
            if room >= max(MUCH_ROOM, MORE_ROOM * pool.room) and _are_places_divided():
                pool.room = room
                torch.UntypedStorage(room + LIBRARY_ROOM, device=device)  # no torch.empty, which may be told to fill it
            output = compute()
    except BaseException:
        _pools.pop(key, None)
        with suppress(RuntimeError):  # where PyTorch did that itself
            end_allocations(device, pool.handle)
        with suppress(Exception):
            _end_of_randomness(device)
        raise
    return partial(_replay, graph, pool), output


def keeps_memory() -> bool:
    """Whether what is allocated in a capture stays the graph's: from CUDA's own allocator it would be there in replays
    alone, and another one may give it to others."""
    return torch.cuda.get_allocator_backend() == "native"


def _are_places_divided() -> bool:
    """Whether the allocator gives any tensor a part of what is much larger, as it does unless it was told not to."""
    return not any("max_split_size" in os.environ.get(name, "") for name in ALLOCATOR_SETTINGS)


def end_allocations(device: torch.device, pool: tuple[int, int]) -> None:
    """A capture that failed leaves PyTorch allocating in its pool, in which nothing could be captured any more."""
    torch._C._cuda_endAllocateToPool(torch.cuda._utils._get_device_index(device, optional=True), pool)


def _end_of_randomness(device: torch.device) -> None:
    """A capture that failed at its end leaves the random generator in it, until another one ends."""
    with (
        torch.cuda.device(device),
        torch.cuda.stream(torch.cuda.current_stream(device)),
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
    ):
        torch.empty(1, device=device).zero_()


def _replay(graph: torch.cuda.CUDAGraph, pool: "Pool") -> None:
    graph.replay()


class Pool:
    """What all graphs of a stream share, since they run one after the other: memory, and the stream that they are
    captured on, to which belongs what cuBLAS works in.

    It lives as long as one of them: PyTorch takes no pool again that the last graph has left.

    Attributes:
        room: The most bytes that were asked for at once, for all of a graph's tensors.
        side: The stream to capture on. Whatever anybody launches on it meanwhile would be captured along, and PyTorch
            gives out the same few streams of a priority again and again: it is of the one that hardly anybody asks for,
            and no other pool's.
    """

    def __init__(self, device: torch.device, stream: int):
        self.room = 0
        taken = {stream, *(pool.side.cuda_stream for pool in _all_pools)}
        drawn = (torch.cuda.Stream(device, priority=-1) for _ in range(SIDE_STREAMS))
        self.side = next((side for side in drawn if side.cuda_stream not in taken), None)
        if self.side is None:
            raise RuntimeError(f"PyTorch has {SIDE_STREAMS} streams to capture on, and there are graphs of as many")
        with torch.cuda.device(device):
            self.handle = torch.cuda.graph_pool_handle()
        _all_pools.add(self)


_all_pools: WeakSet[Pool] = WeakSet()
_pools: WeakValueDictionary[tuple[torch.device, int], Pool] = WeakValueDictionary()  # of them, where more is captured


def stream_of(device: torch.device) -> int:
    """The current stream of a tensor's device. Asked at every call, so no object is made of it."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured into a graph, ours or another's."""
    if device.type != "cuda":
        return False
    if device.index is None or device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
