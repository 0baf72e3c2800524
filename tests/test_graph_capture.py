"""capture by itself, on stand-ins for what it calls of PyTorch: pools of memory and streams."""

import gc
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from swinfast import capture, graphs

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="test_gpu has the real thing, and a capture broken at its end may break others"
)


class Streams:
    """Gives out the same three again and again, as PyTorch does with more."""

    def __init__(self):
        self.given = 0

    def __call__(self, device, priority=0):
        self.given += 1
        return SimpleNamespace(device=device, cuda_stream=100 + self.given % 3)


@pytest.fixture
def nothing_captured(monkeypatch):
    """Stand-ins for all that a capture calls of PyTorch, none of which does anything."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", Streams())
    for name in ("device", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: nullcontext())
    monkeypatch.setattr(capture, "stream_of", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")


def test_graphs_of_a_stream_share_a_pool_that_dies_with_them(monkeypatch, nothing_captured):
    pools = []

    def record(graph, pool, stream, capture_error_mode):
        pools.append(pool)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "graph", record)
    stream = 0
    monkeypatch.setattr(capture, "stream_of", lambda device: stream)
    device = torch.device("cuda:0")
    kept = [capture.capture(lambda: None, device) for _ in range(2)]
    stream = 1
    kept.append(capture.capture(lambda: None, device))
    assert pools[0] is pools[1]
    assert pools[2] is not pools[0]
    del kept[:2]
    stream = 0
    kept.append(capture.capture(lambda: None, device))
    assert pools[3] not in pools[:3]


def test_a_device_without_a_number_is_the_current_one(monkeypatch, nothing_captured):
    """The current stream is asked for by number, and by it tensors know their device."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(capture, "stream_of", lambda device: 10 + device.index)
    kept = [capture.capture(lambda: None, torch.device(name)) for name in ("cuda", "cuda:3", "cuda:1")]
    assert len(kept) == 3
    assert set(capture._pools) == {(torch.device("cuda:3"), 13), (torch.device("cuda:1"), 11)}


@pytest.fixture
def captured_on(monkeypatch, nothing_captured):
    """Captures a graph for a stream that replays it; gives the number of the stream that captures, and the graph."""
    sides = []

    def record(graph, pool, stream, capture_error_mode):
        sides.append(stream.cuda_stream)
        return nullcontext()

    def on(stream):
        monkeypatch.setattr(capture, "stream_of", lambda device: stream)
        return capture.capture(lambda: None, torch.device("cuda:0")), sides[-1]

    monkeypatch.setattr(torch.cuda, "graph", record)
    return on


def test_no_two_streams_capture_on_the_same(captured_on):
    """What cuBLAS works in belongs to the stream that captures, and a graph may be captured while others run."""
    first, side = captured_on(0)
    second, other = captured_on(1)
    again, same = captured_on(0)
    assert same == side != other
    del second
    third, of_one_that_is_gone = captured_on(2)
    assert of_one_that_is_gone != side and None not in (first, again, third)


def test_the_stream_that_replays_captures_nothing(captured_on):
    kept = [captured_on(stream) for stream in (100, 102)]
    assert [side for _, side in kept] == [101, 100]


def test_streams_to_capture_on_run_out(captured_on):
    kept = [captured_on(stream) for stream in range(3)]
    assert {side for _, side in kept} == {100, 101, 102}
    with pytest.raises(RuntimeError, match="PyTorch has 32 streams to capture on, and there are graphs of as many"):
        captured_on(3)
    assert captured_on(1)[1] == kept[1][1]


@pytest.mark.parametrize("backend", ["cudaMallocAsync", "pluggable"])
def test_nothing_is_captured_in_memory_of_another_allocator(monkeypatch, nothing_captured, backend):
    device = torch.device("cuda:0")
    capture.capture(lambda: None, device)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    with pytest.raises(RuntimeError, match="PyTorch's own allocator alone"):
        capture.capture(lambda: None, device)
    monkeypatch.setattr(graphs, "on_gpu", lambda x: True)
    plan = SimpleNamespace(may_be_captured=True, work=torch.numel)
    assert not graphs.may_run("auto", plan, torch.zeros(1))
    assert graphs.may_run(True, plan, torch.zeros(1))  # so that it says why there is none


def test_a_capture_that_fails_at_its_end_leaves_the_callers_stream(monkeypatch, nothing_captured):
    """torch.cuda.graph ends the capture before it goes back to the caller's stream, which an error there prevents."""
    current = ["the caller's"]

    @contextmanager
    def stream(one):
        before = list(current)
        current[:] = [one]
        try:
            yield
        finally:
            current[:] = before

    @contextmanager
    def graph(graph, pool=None, stream=None, capture_error_mode=None):
        current[:] = [stream]
        yield
        if pool is None:  # nothing of ours, so that a capture has ended well
            ended_well.append(stream)
            return
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    ended, ended_well = [], []
    monkeypatch.setattr(capture, "end_allocations", lambda device, pool: ended.append(pool))
    device = torch.device("cuda:0")
    kept = capture.Pool(device, 0)  # by a graph that there is already
    capture._pools[device, 0] = kept
    with pytest.raises(RuntimeError, match="previous error"):
        capture.capture(lambda: None, device)
    assert current == ["the caller's"]
    assert ended == [kept.handle] and len(ended_well) == 1
    with pytest.raises(RuntimeError, match="previous error"):
        capture.capture(lambda: None, device)
    assert ended[1] != kept.handle  # no pool is taken again, nor is its stream, which belongs to it


def test_no_garbage_is_collected_in_a_capture(nothing_captured):
    """It may hold a graph, whose end would be the end of the capture."""
    for before in (True, False):
        (gc.enable if before else gc.disable)()
        try:
            _, enabled = capture.capture(gc.isenabled, torch.device("cuda:0"))
            assert not enabled and gc.isenabled() == before
        finally:
            gc.enable()


@pytest.mark.parametrize("room", [0, capture.MUCH_ROOM - 1, capture.MUCH_ROOM, 1 << 30])
def test_much_memory_is_asked_for_at_once(monkeypatch, nothing_captured, room):
    """In the capture, before anything else, and given back to its pool."""
    happened = []

    @contextmanager
    def graph(*_, **__):
        happened.append("begins")
        yield
        happened.append("ends")

    class Room:  # no torch.empty, which can be told to fill what it gives, in the graph
        def __init__(self, size, device):
            assert device == torch.device("cuda:0")
            happened.append(size)

        def __del__(self):
            happened.append("given back")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch, "UntypedStorage", Room)
    capture.capture(lambda: happened.append("computes"), torch.device("cuda:0"), room)
    asked = [room + capture.LIBRARY_ROOM, "given back"] if room >= capture.MUCH_ROOM else []
    assert happened == ["begins", *asked, "computes", "ends"]


@pytest.fixture
def asked(monkeypatch, nothing_captured):
    """What captures ask for at once."""
    sizes = []
    monkeypatch.setattr(torch, "UntypedStorage", lambda size, device: sizes.append(size - capture.LIBRARY_ROOM))
    return sizes


def test_a_pool_is_asked_for_more_where_that_is_much_more(asked):
    """What was asked for is there for all graphs of a stream, one after the other."""
    device, much = torch.device("cuda:0"), capture.MUCH_ROOM
    kept = [capture.capture(lambda: None, device, int(much * times)) for times in (1, 1.4, 1, 1.6, 2.3, 2.4, 0.5)]
    assert asked == [int(much * times) for times in (1, 1.6, 2.4)]
    del kept
    capture.capture(lambda: None, device, much)  # in another pool
    assert len(asked) == 4


@pytest.mark.parametrize("name", capture.ALLOCATOR_SETTINGS)
def test_nothing_is_asked_for_that_could_not_be_divided(monkeypatch, asked, name):
    for settings in ("expandable_segments:True", "backend:native,max_split_size_mb:256"):
        monkeypatch.setenv(name, settings)
        capture.capture(lambda: None, torch.device("cuda:0"), capture.MUCH_ROOM)
    assert len(asked) == 1
