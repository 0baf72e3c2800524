"""CUDA graphs: the dozens of launches of a module in one, where launching may take longer than computing.

A graph is recorded for one signature of the input, on one stream, when it is seen for the second time; until then, and
wherever no graph can be, the kernels are launched one by one. Output is copied, so a caller owns what it gets. Input is
copied, too; for a large one the first step is launched by itself, from where the input lies into the graph's memory. A
graph reads weights and tables where they lie: in-place edits are seen by the next replay.
"""

import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .capture import capture, is_capturing, keeps_memory, stream_of
from .errors import in_a_line, is_out_of_memory
from .memory import LiveBytes

GPU_PART = 80 << 20  # numbers of the residual stream that are worked on at a time on a GPU: more than fills it
KEPT = 8  # graphs of one module
PATIENCE = 8  # calls with a signature since another's graph was last used, until it takes that one's place
REMEMBERED = 64  # signatures
LARGE_INPUT = 32 << 20  # bytes, to copy which takes more memory and time than a launch is worth
LIBRARY_SETTINGS = (  # by which cuBLAS chooses how to multiply, besides the one of TF32
    torch._C._get_cublas_allow_fp16_accumulation,
    torch._C._get_cublas_allow_fp16_reduced_precision_reduction,
    torch._C._get_cublas_allow_bf16_reduced_precision_reduction,
)
ALIGNED = 16  # bytes, by which Triton tells pointers apart
_capturing = threading.Lock()  # one capture at a time
# One replay at a time on a stream, since all its graphs share their memory: by device and stream.
_turns: dict[tuple[torch.device, int], threading.Lock] = {}

Compute = Callable[[tuple, list[Tensor]], Tensor]
First = Callable[[tuple, Tensor, Tensor | None], Tensor]


class Graph(NamedTuple):
    """A captured computation.

    Attributes:
        load: Puts an input where a replay finds it.
        replay: Computes output from what was loaded.
        output: Its own, the same at every replay.
        reads: What else it reads; kept alive with it.
        memory: The tensors of reads under other names: a parameter can be given other memory, and a replay still reads
            the old.
    """

    load: Callable[[Tensor], object]
    replay: Callable[[], None]
    output: Tensor
    reads: tuple
    memory: tuple[Tensor, ...]


class Place(NamedTuple):
    """Where a tensor is, or was that was given back: what is captured puts others there, after they have read it."""

    address: int
    bytes: int
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> "Place":
        return cls(x.data_ptr(), x.nbytes, x.shape, x.stride(), x.dtype, x.device)

    def tensor(self, storage: torch.UntypedStorage | None = None) -> Tensor:
        """A tensor in other memory, else in that, which it doesn't keep alive."""
        if storage is None:
            storage = torch._C._construct_storage_from_data_pointer(self.address, self.device, self.bytes)
        return torch.empty(0, dtype=self.dtype, device=self.device).set_(storage, 0, self.shape, self.strides)


class Graphs:
    """The graphs of one module, for as long as its plan holds.

    Attributes:
        failure: Why nothing is captured any more, or, without memory, nothing as large; None where nothing went wrong.
    """

    def __init__(self, memory_format: torch.memory_format):
        """memory_format: Of the input as the graphs keep it."""
        self._memory_format = memory_format
        self.failure: str | None = None
        self._too_large = 0  # numbers of an input, from which on nothing is captured any more if there was a failure
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._calls = 0
        self._sights: OrderedDict[Hashable, deque[int]] = OrderedDict()  # which calls had a signature, the last of them
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(
        self,
        x: Tensor,
        kind: Hashable,
        reads: Callable[[], tuple],
        compute: Compute,
        plain: Callable[[], Tensor],
        first: First | None = None,
    ) -> Tensor:
        """compute(reads(), [x]) by a graph, or plain() where there is none yet.

        Args:
            x: Any shape and strides.
            kind: What the launches depend on besides the input's signature.
            reads: What compute reads; a graph is valid for as long as they are the same objects.
            compute: What is captured. It takes its input out of the list, so that it can free it.
            plain: The same without a graph.
            first: The step before compute, where there is one, into the last argument if that is a tensor.
        """
        stream, key = _signature(x, kind)
        with self._lock:
            if key in self._graphs or self._is_due(key):
                tables = reads()
                graph = self._find(key, tables) or self._capture(key, x, tables, compute, first)
                if graph is not None:
                    with _turns.setdefault(stream, threading.Lock()):
                        graph.load(x)
                        graph.replay()
                        self._see(key)
                        return graph.output.clone()
        out = plain()
        with self._lock:
            self._see(key)
        return out

    def replayed(
        self, x: Tensor, kind: Hashable, holds: Callable[[], bool], reads: Callable[[], tuple], made: Callable[[], int]
    ) -> Tensor | None:
        """What a graph that is there computes, None where there is none or it is out of date.

        The GPU is set to work first, and only then it is asked whether that is the right work: looking through all
        modules and weights takes the host about as long as the GPU computes for one image.

        Args:
            x, kind, reads: As in run.
            holds: Whether the plan does that the graphs are of.
            made: How many times anything of what is read was computed.
        """
        stream, key = _signature(x, kind)
        if key not in self._graphs:
            return None
        with self._lock, _turns.setdefault(stream, threading.Lock()):
            graph = self._graphs.get(key)
            if graph is None:
                return None
            before = made()
            graph.load(x)
            graph.replay()
            if not holds() or self._find(key, reads()) is not graph:
                return None
            if made() != before:  # into the same places, but after the GPU had read them
                graph.load(x)  # again: where the input was, a replay puts others
                graph.replay()
            self._see(key)
            return graph.output.clone()

    def _see(self, key: Hashable) -> None:
        self._calls += 1
        self._sights.setdefault(key, deque(maxlen=PATIENCE)).append(self._calls)
        self._sights.move_to_end(key)
        if len(self._sights) > REMEMBERED:
            self._sights.popitem(last=False)

    def _is_due(self, key: Hashable) -> bool:
        """Whether a signature without a graph gets one. A size that is seen once may never come again; and where more
        sizes than graphs are kept come in turn, to capture each again and again would cost more than a graph gains."""
        if key not in self._sights or len(self._graphs) < KEPT:
            return key in self._sights
        longest_unused = self._sights.get(next(iter(self._graphs)), [0])
        calls = self._sights[key]
        return len(calls) == PATIENCE and calls[0] > longest_unused[-1]

    def _find(self, key: Hashable, reads: tuple) -> Graph | None:
        graph = self._graphs.get(key)
        if graph is not None and any(kept is not now for kept, now in zip(graph.reads, reads, strict=True)):
            del self._graphs[key]
            return None
        if graph is not None:
            self._graphs.move_to_end(key)
        return graph

    def _capture(self, key: Hashable, x: Tensor, reads: tuple, compute: Compute, first: First | None) -> Graph | None:
        if self.failure is not None and x.numel() >= self._too_large:
            return None
        while len(self._graphs) >= KEPT:
            self._graphs.popitem(last=False)
        try:
            with torch.inference_mode(False), torch.no_grad(), _capturing:
                if first is not None and x.nbytes >= LARGE_INPUT:
                    captured = _after_first(x, reads, compute, first)
                else:
                    captured = self._with_input(x, reads, compute, first)
        except Exception as error:
            self.failure = in_a_line(error)
            no_memory = is_out_of_memory(error)
            self._too_large = x.numel() if no_memory else 0
            which = "for as large an input" if no_memory else "from now on"
            warnings.warn(f"no CUDA graph {which}, since capturing one failed: {self.failure}", stacklevel=2)
            return None
        memory = tuple(leaf.detach() for leaf in tree_leaves(reads) if isinstance(leaf, Tensor))
        self._graphs[key] = Graph(*captured, reads, memory)
        return self._graphs[key]

    def _with_input(self, x: Tensor, reads: tuple, compute: Compute, first: First | None) -> tuple:
        """(load, replay, output) of all that is computed, from a copy of the input."""
        static = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=self._memory_format)
        static.copy_(x)

        def whole() -> Tensor:
            return compute(reads, [static if first is None else first(reads, static, None)])

        with LiveBytes() as live:
            whole()  # compiles and loads what this input needs: neither may happen in a capture
        return static.copy_, *capture(whole, x.device, live.peak)


def _after_first(x: Tensor, reads: tuple, compute: Compute, first: First) -> tuple:
    """(load, replay, output) of what is computed after the first step, of which load is that step."""
    with LiveBytes() as live:  # as in _with_input
        held = [first(reads, _as_launched(x), None)]
        like = Place.of(held[0])
        compute(reads, held)
    places = []

    def rest() -> Tensor:
        # no torch.empty, which may be told to fill what it gives (torch.utils.deterministic): a replay would, too
        held = [like.tensor(torch.UntypedStorage(like.bytes, device=like.device))]
        places.append(Place.of(held[0]))
        return compute(reads, held)

    replay, output = capture(rest, x.device, live.peak)
    into = places[0].tensor()
    return lambda x: first(reads, _as_launched(x), into), replay, output


def _as_launched(x: Tensor) -> Tensor:
    """A tensor whose launch needs nothing to be compiled: all that have a graph in common are alike in strides and
    alignment."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNED == 0 else x.clone()


def _signature(x: Tensor, kind: Hashable) -> tuple[tuple[torch.device, int], Hashable]:
    """(device and stream that a graph replays on, what there is one graph for)."""
    stream = x.device, stream_of(x.device)
    return stream, (x.shape, x.dtype, stream, kind, *(setting() for setting in LIBRARY_SETTINGS))


def may_run(setting: bool | str, plan: Any, x: Tensor) -> bool:
    """Whether a module is to run by a graph.

    Args:
        setting: As ``optimize`` takes it: True, False, or "auto" for up to as much work as goes through in one part.
        plan: The module's.
        x: Its input.
    """
    if setting is False or not x.numel() or not may_replay(x) or not plan.may_be_captured:
        return False
    return setting is True or (keeps_memory() and plan.work(x) <= GPU_PART)


def may_replay(x: Tensor) -> bool:
    """Whether a graph that is there may run for an input now. A backward pass computes again what it needs, once."""
    return on_gpu(x) and torch._C._current_graph_task_id() == -1


def are_possible(device: torch.device) -> bool:
    """Whether there is a GPU for a model that is on a device now: it may be on its way."""
    return device.type == "cuda" or (device.type == "cpu" and torch.cuda.is_available())


def on_gpu(x: Tensor) -> bool:
    """Whether a tensor's current stream can capture now."""
    return x.is_cuda and not is_capturing(x.device)
