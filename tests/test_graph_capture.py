"""graphs.capture by itself, on stand-ins for what it calls of PyTorch: pools of memory and streams."""

import gc
from contextlib import contextmanager, nullcontext
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from swinfast import graphs

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="test_gpu has the real thing, and a capture broken at its end may break others"
)


@pytest.fixture
def nothing_captured(monkeypatch):
    """Stand-ins for all that a capture calls of PyTorch, none of which does anything."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    for name in ("device", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: nullcontext())
    monkeypatch.setattr(graphs, "_side_stream", lambda device, stream: None)
    monkeypatch.setattr(graphs, "stream_of", lambda device: 0)


def test_graphs_of_a_stream_share_a_pool_that_dies_with_them(monkeypatch, nothing_captured):
    pools = []

    def record(graph, pool, stream, capture_error_mode):
        pools.append(pool)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "graph", record)
    stream = 0
    monkeypatch.setattr(graphs, "stream_of", lambda device: stream)
    device = torch.device("cuda:0")
    kept = [graphs.capture(lambda: None, device) for _ in range(2)]
    stream = 1
    kept.append(graphs.capture(lambda: None, device))
    assert pools[0] is pools[1]
    assert pools[2] is not pools[0]
    del kept[:2]
    stream = 0
    kept.append(graphs.capture(lambda: None, device))
    assert pools[3] not in pools[:3]


def test_a_device_without_a_number_is_the_current_one(monkeypatch):
    """The current stream is asked for by number, and by it tensors know their device."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 10 + index, raising=False)
    for name in ("device", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: nullcontext())
    asked = []
    monkeypatch.setattr(graphs, "_side_stream", lambda *key: asked.append(key))
    kept = [graphs.capture(lambda: None, torch.device(name)) for name in ("cuda", "cuda:3", "cuda:1")]
    assert len(kept) == 3
    assert asked == [(torch.device("cuda:3"), 13)] * 2 + [(torch.device("cuda:1"), 11)]


def test_a_capture_that_fails_at_its_end_leaves_the_callers_stream(monkeypatch):
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

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    made, ended, ended_well = [], [], []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "another stream")
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    side_stream = cache(lambda device, stream: made.append("a stream") or "the side stream")
    monkeypatch.setattr(graphs, "_side_stream", side_stream)
    monkeypatch.setattr(graphs, "stream_of", lambda device: 0)
    monkeypatch.setattr(graphs, "end_allocations", lambda device, pool: ended.append(pool))
    device = torch.device("cuda:0")
    kept = graphs.Pool(device)  # by a graph that there is already
    graphs._pools[device, 0] = kept
    with pytest.raises(RuntimeError, match="previous error"):
        graphs.capture(lambda: None, device)
    assert current == ["the caller's"]
    assert ended == [kept.handle] and ended_well == ["another stream"]
    with pytest.raises(RuntimeError, match="previous error"):
        graphs.capture(lambda: None, device)
    assert ended[1] != kept.handle and len(made) == 2  # neither pool nor stream is taken again


def test_no_garbage_is_collected_in_a_capture(nothing_captured):
    """It may hold a graph, whose end would be the end of the capture."""
    for before in (True, False):
        (gc.enable if before else gc.disable)()
        try:
            _, enabled = graphs.capture(gc.isenabled, torch.device("cuda:0"))
            assert not enabled and gc.isenabled() == before
        finally:
            gc.enable()


@pytest.mark.parametrize("room", [0, graphs.MUCH_ROOM - 1, graphs.MUCH_ROOM, 1 << 30])
def test_much_memory_is_asked_for_at_once(monkeypatch, nothing_captured, room):
    """In the capture, before anything else, and given back to its pool."""
    happened = []

    @contextmanager
    def graph(*_, **__):
        happened.append("begins")
        yield
        happened.append("ends")

    class Room:
        def __init__(self, size, dtype, device):
            assert dtype == torch.uint8 and device == torch.device("cuda:0")
            happened.append(size)

        def __del__(self):
            happened.append("given back")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch, "empty", Room)
    graphs.capture(lambda: happened.append("computes"), torch.device("cuda:0"), room)
    asked = [room + graphs.LIBRARY_ROOM, "given back"] if room >= graphs.MUCH_ROOM else []
    assert happened == ["begins", *asked, "computes", "ends"]


@pytest.fixture
def asked(monkeypatch, nothing_captured):
    """What captures ask for at once."""
    sizes = []
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: sizes.append(size - graphs.LIBRARY_ROOM))
    return sizes


def test_a_pool_is_asked_for_more_where_that_is_much_more(asked):
    """What was asked for is there for all graphs of a stream, one after the other."""
    device, much = torch.device("cuda:0"), graphs.MUCH_ROOM
    kept = [graphs.capture(lambda: None, device, int(much * times)) for times in (1, 1.4, 1, 1.6, 2.3, 2.4, 0.5)]
    assert asked == [int(much * times) for times in (1, 1.6, 2.4)]
    del kept
    graphs.capture(lambda: None, device, much)  # in another pool
    assert len(asked) == 4


@pytest.mark.parametrize("name", graphs.ALLOCATOR_SETTINGS)
def test_nothing_is_asked_for_that_could_not_be_divided(monkeypatch, asked, name):
    for settings in ("expandable_segments:True", "backend:native,max_split_size_mb:256"):
        monkeypatch.setenv(name, settings)
        graphs.capture(lambda: None, torch.device("cuda:0"), graphs.MUCH_ROOM)
    assert len(asked) == 1
