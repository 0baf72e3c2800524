"""CUDA graphs. Without a GPU a stand-in captures: it keeps the function, and a replay calls it again on the same
tensors, so that what a graph would read too late, too early or from the wrong place is seen. Most of these tests then
take the PyTorch backend for one that may be captured: Triton's interpreter is slow, and knows no threads."""

import copy
import pickle
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from graph_captures import DEVICE, TINY, assert_right, edit, images, optimised, tiny
from helpers import THREE, make, relative_rms

import swinfast
from swinfast import graphs, plan, torch_backend
from swinfast.backends import Choice
from swinfast.specs import StageSpec

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []


@pytest.fixture
def model(timm):
    return tiny(timm)


def test_the_second_call_captures(model, captures):
    fast, plain = optimised(model), optimised(model, cuda_graphs=False)
    counts = []
    for seed in range(4):
        assert torch.equal(fast(images(seed=seed)), plain(images(seed=seed)))
        counts.append((captures.captured, captures.replayed))
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 3)]
    assert "SwinTransformerV2Cr: CUDA graphs for 1 inputs" in str(swinfast.report(fast))


def test_callers_own_what_they_get(model, captures):
    fast = optimised(model).stages
    x = model.patch_embed(images())
    outputs = [fast(x * factor) for factor in (1, 1, 2, 3)]
    kept = [output.clone() for output in outputs]
    fast(x * 4)
    assert all(torch.equal(output, before) for output, before in zip(outputs, kept, strict=True))
    assert not torch.equal(outputs[2], outputs[3])
    before = x.clone()
    fast(x)
    assert torch.equal(x, before)
    assert outputs[3].stride() == model.stages(x).stride()  # channels last, as without a graph


def test_batch_sizes_that_change(model, captures):
    fast = optimised(model)
    for batch in (1, 2, 1, 2, 3, 2, 1, 3):
        assert_right(fast, model, images(batch, seed=batch))
    assert captures.captured == 3
    assert len(fast._swinfast.plan.graphs) == 3


def test_the_least_recently_used_is_dropped(model, captures, monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    monkeypatch.setattr(graphs, "PATIENCE", 1)
    fast = optimised(model)
    for batch in (1, 1, 2, 2, 1, 3, 3):  # 3 drops 2
        assert_right(fast, model, images(batch))
    assert captures.captured == 3
    assert len(fast._swinfast.plan.graphs) == 2
    assert_right(fast, model, images(1))
    assert captures.captured == 3
    assert_right(fast, model, images(2))
    assert captures.captured == 4


class TestMoreSizesThanGraphs:
    """Of the Sequential of stages: where the classifier keeps none for a size, this may."""

    @pytest.fixture
    def answers_to(self, model, monkeypatch):
        """Calls with so many images, one after the other."""
        monkeypatch.setattr(graphs, "KEPT", 2)
        fast = optimised(model).stages

        def check(*batches):
            for seed, batch in enumerate(batches):
                x = model.patch_embed(images(batch, seed=seed))
                assert relative_rms(fast(x), model.stages(x)) <= 1e-5

        return check

    def test_in_turn_they_do_not_drop_each_other(self, answers_to, captures):
        """To capture takes longer than a graph saves."""
        answers_to(*[1, 2, 3] * 2 * graphs.PATIENCE)
        assert captures.captured == 2
        assert captures.replayed == 2 * (2 * graphs.PATIENCE - 1)
        answers_to(*[3, 3, 1, 2] * graphs.PATIENCE)
        assert captures.captured == 2

    def test_one_that_comes_often_drops_one_that_comes_no_more(self, answers_to, captures):
        answers_to(1, 1, 2, 2, *[3, 2] * graphs.PATIENCE)
        assert captures.captured == 2
        answers_to(3)
        assert captures.captured == 3
        replayed = captures.replayed
        answers_to(2, 3, 1)
        assert (captures.captured, captures.replayed) == (3, replayed + 2)

    def test_the_last_sizes_are_remembered(self, answers_to, captures, monkeypatch):
        monkeypatch.setattr(graphs, "REMEMBERED", 2)
        answers_to(1, 2, 1, 3, 2)
        assert captures.captured == 1

    def test_one_that_was_forgotten_gives_way(self, answers_to, captures, monkeypatch):
        """It is known of the last REMEMBERED sizes alone when they came."""
        monkeypatch.setattr(graphs, "KEPT", 1)
        monkeypatch.setattr(graphs, "REMEMBERED", 1)
        answers_to(1, 1, *[2] * (graphs.PATIENCE + 1))
        assert captures.captured == 2


def test_signatures_seen_once_are_forgotten(model, captures, monkeypatch):
    monkeypatch.setattr(graphs, "REMEMBERED", 2)
    fast = optimised(model)
    for batch in (1, 2, 3, 1):
        fast(images(batch))
    assert captures.captured == 0
    fast(images(1))
    assert captures.captured == 1


@pytest.mark.parametrize(
    "name", ["fp16_accumulation", "fp16_reduced_precision_reduction", "bf16_reduced_precision_reduction"]
)
def test_settings_of_the_library_have_their_own(model, captures, name):
    """A graph has frozen by which of them cuBLAS multiplies."""
    fast, setting = optimised(model), f"allow_{name}"
    for _ in range(2):
        fast(images())
    before = getattr(torch.backends.cuda.matmul, setting)
    try:
        setattr(torch.backends.cuda.matmul, setting, not before)
        replayed = captures.replayed
        for _ in range(2):
            assert_right(fast, model, images())
        assert (captures.captured, captures.replayed) == (2, replayed + 1)
    finally:
        setattr(torch.backends.cuda.matmul, setting, before)


def test_a_plan_that_cannot_hold_is_not_tried_again(model, captures):
    fast = optimised(model)
    for _ in range(3):
        fast(images())
    replayed = captures.replayed
    fast.stages[0].blocks[0].attn.attn_drop.train()
    fast(images())
    assert fast._swinfast.plan is None
    tried = captures.replayed
    fast.stages[0].blocks[0].attn.attn_drop.p = 0.0
    fast(images())
    assert replayed + 1 == tried


def test_copies_carry_no_graphs(model, captures):
    fast = optimised(model)
    size = len(pickle.dumps(fast))
    for _ in range(2):
        fast(images())
    assert len(pickle.dumps(fast)) == size
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        captures.captured = 0
        edit(fast)  # which a copy must not see
        for count in (0, 1, 1):
            assert_right(other, model, images())
            assert captures.captured == count


def test_settings_survive_copies(model, captures):
    for setting in (True, False):
        other = pickle.loads(pickle.dumps(copy.deepcopy(optimised(model, cuda_graphs=setting))))
        assert other.stages._swinfast.cuda_graphs is setting
        assert swinfast.optimize(other).stages._swinfast.cuda_graphs == "auto"


def test_streams_have_their_own(model, captures):
    fast = optimised(model)
    for count in (1, 2, 3):
        with captures.on_stream(count):
            for _ in range(3):
                assert_right(fast, model, images())
        assert captures.captured == count


def test_two_models(model, timm, captures):
    models = [model, make(timm, TINY | {"depths": (1, 2)}, "timm").to(DEVICE).requires_grad_(False)]
    fasts = [optimised(one) for one in models]
    for _ in range(4):
        for fast, one in zip(fasts, models, strict=True):
            assert_right(fast, one, images())
    assert captures.captured == 2


def test_threads_on_one_stream(model, captures):
    fast = optimised(model)
    batches = [images(seed=seed) for seed in range(4)]
    expected = [model(x) for x in batches]
    fast(batches[0])
    outputs = [[] for _ in batches]

    def work(index):
        with torch.no_grad():
            outputs[index] += [fast(batches[index]) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert captures.captured == 1
    assert all(
        relative_rms(got, true) <= 1e-5 for true, all_of in zip(expected, outputs, strict=True) for got in all_of
    )


@pytest.mark.skipif(DEVICE.type == "cuda", reason="which memory graphs share is PyTorch's choice")
def test_modules_on_one_stream_take_turns(captures, monkeypatch):
    """The graphs of a stream share their memory: at worst one module's replay writes where another's output lies."""
    memory, replays = torch.empty(1, 1, 4, 4), []

    def capture(compute, device, room):
        def replay():
            memory.copy_(compute())
            replays.append(None)
            time.sleep(1e-4)  # for another thread to come in

        return replay, memory

    monkeypatch.setattr(graphs, "capture", capture)
    wrong = []

    def work(value):
        module, x = graphs.Graphs(torch.channels_last), torch.full((1, 1, 4, 4), float(value))
        for _ in range(50):
            out = module.run(x, "kind", lambda: (), lambda reads, held: held.pop() + 1, lambda: x + 1)
            wrong.extend([] if torch.equal(out, x + 1) else [out])

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(replays) == 4 * 49


def test_modes(model, captures):
    """A graph that one mode captured serves the others."""
    for first in (torch.inference_mode, torch.no_grad, nullcontext):
        fast = optimised(model)
        captures.captured = 0
        with first():
            for _ in range(2):
                fast(images())
        for mode in (torch.inference_mode, torch.no_grad, nullcontext):
            with mode():
                assert_right(fast, model, images())
        assert captures.captured == 1


def test_gradients(model, captures):
    model.requires_grad_(True)
    fast = optimised(model)
    for seed in range(3):
        results = []
        for either in (model, fast):
            x = images(seed=seed).requires_grad_()
            results.append(torch.autograd.grad(either(x).square().sum(), [x, *either.parameters()]))
        scale = max(gradient.norm() for gradient in results[0])
        assert all((got - true).norm() <= 3e-4 * scale for true, got in zip(*results, strict=True))
    assert (captures.captured, captures.replayed) == (1, 2)  # the backward pass captures nothing


def test_out_of_memory_in_a_capture(model, captures):
    fast = optimised(model)
    fast(images())
    captures.error = torch.OutOfMemoryError("no room for a graph\nand more")
    with pytest.warns(
        UserWarning, match="no CUDA graph for as large an input, since capturing one failed: OutOfMemoryError: no room"
    ):
        assert_right(fast, model, images())
    captures.error = None
    for _ in range(3):  # said once, and plain from now on
        assert_right(fast, model, images(2))
        assert_right(fast, model, images())
    assert captures.captured == 0
    expected = "no CUDA graph, since capturing one failed: OutOfMemoryError: no room for a graph"
    said = [f"{name}: {expected}" for name in ("SwinTransformerV2Cr", "stages")]
    assert str(swinfast.report(fast)).splitlines()[-2:] == said
    swinfast.refresh(fast)
    for _ in range(2):
        assert_right(fast, model, images())
    assert captures.captured == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), RuntimeError("CUDA error: out of memory")], ids=repr
)
def test_smaller_inputs_are_captured_after_one_was_too_large(model, captures, error):
    fast = optimised(model)
    fast(images(4))
    captures.error = error
    with pytest.warns(UserWarning, match="no CUDA graph for as large an input"):
        assert_right(fast, model, images(4))
    captures.error = None
    for batch in (4, 5, 2, 2, 5, 4):
        assert_right(fast, model, images(batch))
    assert captures.captured == 1


def test_graphs_that_are_there_go_on_after_a_failure(model, captures, monkeypatch):
    monkeypatch.setattr(plan, "overwrite", lambda old, new: False)
    fast = optimised(model)
    for batch in (1, 1, 2):
        fast(images(batch))
    captures.error = RuntimeError("operation not permitted when stream is capturing")
    with pytest.warns(UserWarning, match="no CUDA graph"):
        assert_right(fast, model, images(2))
    replayed = captures.replayed
    assert_right(fast, model, images(1))
    assert captures.replayed == replayed + 1
    captures.error = None
    for either in (model, fast):  # until their tables move: nothing is captured any more
        edit(either)
    assert_right(fast, model, images(1))
    assert (captures.captured, captures.replayed) == (1, replayed + 2)  # the last one in vain


def test_settings(model, captures, monkeypatch):
    for setting, pays, count in (("auto", True, 1), ("auto", False, 0), (True, False, 1), (False, True, 0)):
        monkeypatch.setattr(graphs, "GPU_PART", images().numel() * 64 if pays else 1)
        captures.captured = 0
        fast = optimised(model, cuda_graphs=setting)
        for _ in range(3):
            assert_right(fast, model, images())
        assert captures.captured == count


def test_stages_called_alone(timm, captures):
    """As by features_only models: each has its own graph."""
    options = TINY | {"features_only": True}
    options.pop("num_classes")
    model = make(timm, options, "timm").to(DEVICE).requires_grad_(False)
    fast = optimised(model)
    for count in (0, 2, 2):
        got, expected = fast(images()), model(images())
        assert all(relative_rms(one, true) <= 1e-5 for one, true in zip(got, expected, strict=True))
        assert captures.captured == count


def test_hooks_on_a_stage_are_called(model, captures):
    fast = optimised(model)
    seen = []
    fast.stages[0].register_forward_hook(lambda module, args, output: seen.append(output))
    for calls in (1, 2, 3):
        assert_right(fast, model, images())
        assert len(seen) == calls
    assert captures.captured == 2  # each stage by itself
    assert relative_rms(seen[2], model.stages[0](model.patch_embed(images()))) <= 1e-5


def test_autocast_regions_have_their_own(model, captures):
    fast = optimised(model)
    for _ in range(3):
        assert_right(fast, model, images())
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert (
                relative_rms(fast.forward_features(images()), model.double().forward_features(images().double())) > 1e-4
            )
        model.float()
    assert captures.captured == 2


def test_a_stage_that_cannot_be_captured(timm, captures, monkeypatch):
    """No graph can span it; the other stages have theirs."""
    model = make(timm, THREE | {"img_size": 32}, "timm").to(DEVICE).requires_grad_(False)
    fast = optimised(model)
    fixed = SimpleNamespace(**vars(torch_backend) | {"capturable": False})
    choose = plan.choose

    def choose_for(choice, spec, *args):
        first = isinstance(spec, StageSpec) and spec.merge is None
        return Choice(fixed) if first else choose(choice, spec, *args)

    monkeypatch.setattr(plan, "choose", choose_for)
    for _ in range(3):
        assert_right(fast, model, images(size=32))
    assert captures.captured == 2


@pytest.mark.skipif(DEVICE.type == "cuda", reason="test_gpu has the real thing")
def test_inside_somebody_elses_capture(model, captures, monkeypatch):
    """Kernels are launched one by one, and tables that are not there yet belong to that graph: they are not kept."""
    fast = optimised(model)
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "on_gpu", lambda x: False)
        patch.setattr(plan, "is_capturing", lambda device: True)
        for _ in range(3):
            assert_right(fast, model, images())
        assert not any(stage.plan()._derived for stage in fast.stages)
    for _ in range(2):
        assert_right(fast, model, images())
    assert captures.captured == 1
