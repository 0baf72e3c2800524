"""CUDA graphs while weights change: in place they stay valid, otherwise they are captured anew."""

import gc

import pytest
import torch
from graph_captures import DEVICE, Tape, assert_right, edit, images, optimised, tiny
from helpers import relative_rms
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import swinfast
from swinfast import graphs, plan
from swinfast.fused import Fused

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []


@pytest.fixture
def model(timm):
    return tiny(timm)


def load(either):
    either.load_state_dict({key: value * 1.1 for key, value in either.state_dict().items()})


@pytest.mark.parametrize("large", [1, 1 << 40], ids=["embedded before", "copied"])
@pytest.mark.parametrize("change", [edit, load], ids=lambda change: change.__name__)
def test_a_graph_stays_valid_when_weights_change_in_place(model, captures, change, large, monkeypatch):
    monkeypatch.setattr(graphs, "LARGE_INPUT", large)
    fast = optimised(model, "triton")
    before = [fast(images()) for _ in range(3)][-1]
    for either in (model, fast):
        change(either)
    assert_right(fast, model, images())
    assert relative_rms(fast(images()), before) > 1e-3
    assert captures.captured == 1
    assert captures.replayed == 5  # the first after the change again: the tables were made after it had read them


def test_tables_in_another_place_capture_anew(model, captures, monkeypatch):
    monkeypatch.setattr(plan, "overwrite", lambda old, new: False)
    fast = optimised(model)
    for count in (1, 2, 3):
        for _ in range(2):
            assert_right(fast, model, images())
        assert captures.captured == count
        for either in (model, fast):
            edit(either)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="test_gpu has the real thing")
@pytest.mark.parametrize("autocast", [False, True])
def test_captured_by_the_caller(model, captures, monkeypatch, autocast):
    """A replay of somebody else's graph sees edits of all weights, also those that tables were made of before."""
    fast = optimised(model)
    static = images()
    precision = torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast, cache_enabled=False)
    with torch.no_grad(), precision:
        fast(static)
        with monkeypatch.context() as patch, Tape() as tape:
            for module in (graphs, plan):
                patch.setattr(module, "is_capturing", lambda device: True)
            patch.setattr(graphs, "on_gpu", lambda x: False)
            out = fast(static)
        for either in (model, fast):
            either.load_state_dict({key: value * 1.3 for key, value in either.state_dict().items()})
        swinfast.refresh(fast)  # the graph needs nothing of what a plan keeps
        tape.play()
        expected = swinfast.optimize(model, backend="torch")(static)
        assert relative_rms(out, expected) <= (1e-2 if autocast else 1e-6)


def test_the_gpu_works_while_the_host_looks_through_the_model(model, captures, monkeypatch):
    fast = optimised(model)
    for _ in range(2):
        fast(images())
    said, plan_of = [], type(fast).plan
    monkeypatch.setattr(type(fast), "plan", lambda self: (said.append(captures.replayed), plan_of(self))[1])
    replayed = captures.replayed
    assert_right(fast, model, images())
    assert said == [replayed + 1]
    fast.requires_grad_(True)
    fast(images())
    assert captures.replayed == replayed + 2  # with gradients once, after the look


def assign(either):
    either.load_state_dict({key: value * 1.1 for key, value in either.state_dict().items()}, assign=True)


def move(either):
    for parameter in either.parameters():
        parameter.data = parameter.data * 1.1


def replace_a_layer(either):
    torch.manual_seed(0)
    layer = either.stages[1].blocks[0].mlp.fc1
    either.stages[1].blocks[0].mlp.fc1 = nn.Linear(layer.in_features, layer.out_features, device=DEVICE)


def behind_the_counter(either):
    for parameter in either.parameters():
        parameter.data.mul_(1.1)
    if isinstance(either, Fused):
        swinfast.refresh(either)


@pytest.mark.parametrize("change", [assign, move, replace_a_layer, behind_the_counter], ids=lambda c: c.__name__)
def test_other_weights_capture_anew(model, captures, change):
    fast = optimised(model)
    for _ in range(2):
        fast(images())
    for either in (model, fast):
        change(either)
        either.requires_grad_(False)
    for count in (1, 2, 2):
        assert_right(fast, model, images())
        assert captures.captured == count


def test_another_dtype_captures_anew(model, captures):
    fast = optimised(model)
    for _ in range(2):
        fast(images())
    fast.half()
    for _ in range(3):
        outcome = swinfast.verify(model, fast, images())
        assert outcome.passed, outcome
    assert captures.captured == 2


@pytest.mark.parametrize("move_them", [move, lambda either: either.stages[1].double().float()], ids=["data", "stage"])
def test_a_graph_keeps_the_memory_that_it_reads(model, captures, move_them):
    """The GPU is set to work before it is known that the weights lie elsewhere now."""
    fast = optimised(model, "triton")
    layer = fast.stages[1].blocks[0].mlp.fc1
    for _ in range(2):
        fast(images())
    old = StorageWeakRef(layer.weight.untyped_storage())
    for either in (model, fast):
        move_them(either)
        either.requires_grad_(False)
    assert not old.expired()
    assert_right(fast, model, images())
    assert_right(fast, model, images())
    gc.collect()
    assert old.expired()  # with the graph
