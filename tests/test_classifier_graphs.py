"""CUDA graphs of whole classifiers: what they span and keep, and when parts are called instead.

Without a GPU, by a stand-in for captures.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from graph_captures import DEVICE, TINY, assert_right, images, optimised, spans_any, tiny, warmed
from helpers import SOURCES, make, random_images, randomise, relative_rms
from torch import nn

import swinfast
from swinfast import graphs
from swinfast.calls import kind_of
from swinfast.classifier import FusedClassifier, _embed
from swinfast.memory import LiveBytes

pytestmark = [pytest.mark.filterwarnings("error:no CUDA graph"), *([pytest.mark.gpu] if DEVICE.type == "cuda" else [])]
POOLS = ("avg", "max", "avgmax", "catavgmax", "fast", "fastmax", "fastavgmax", "fastcatavgmax")


@pytest.fixture
def model(timm):
    return tiny(timm)


def spans_all(fast) -> bool:
    """Whether a graph of the whole classifier is there, and none of the stages alone."""
    plans = fast._swinfast.plan, fast.fused_stages()._swinfast.plan
    whole, stages = (len(plan.graphs) if plan is not None else 0 for plan in plans)
    return whole > 0 and not stages


@pytest.fixture(params=[False, True], ids=["copied", "embedded"])
def captures(captures, monkeypatch, request):
    """With images as large as those of which no copy is kept, too: their patches are embedded into a graph's memory."""
    if request.param:
        monkeypatch.setattr(graphs, "LARGE_INPUT", 0)
    return captures


@pytest.mark.parametrize("source", SOURCES)
def test_one_graph_spans_all(timm, captures, source):
    model = make(timm, TINY, source).to(DEVICE).requires_grad_(False)
    fast = warmed(model)
    assert spans_all(fast)
    assert captures.captured == 1
    assert isinstance(fast, FusedClassifier) and isinstance(fast, type(model))
    replayed = captures.replayed
    for seed in range(4):
        assert_right(fast, model, images(seed=seed))
    assert captures.replayed == replayed + 4


NORMS = {
    "edited": lambda norm: norm.weight.mul_(2),
    "another weight": lambda norm: setattr(norm, "weight", nn.Parameter(2 * norm.weight)),
    "another eps": lambda norm: setattr(norm, "eps", 0.5),
    "hooked": lambda norm: norm.register_forward_hook(lambda module, args, output: output * 2),
    "patched": lambda norm: setattr(norm, "forward", lambda x: x * 2),
}


@pytest.mark.parametrize("change", NORMS)
def test_a_norm_between_stages_and_head(timm, captures, change):
    """As V2 models have it: it is in the graph, as it is at each call, or there is no graph."""
    model = make(timm, TINY, "timm, V2").to(DEVICE).requires_grad_(False)
    fast = warmed(model)
    with torch.no_grad():
        before = fast(images())
        for either in (model, fast):
            NORMS[change](either.norm)
        for _ in range(3):
            assert_right(fast, model, images())
        assert relative_rms(fast(images()), before) > 1e-2
    assert spans_any(fast) == (change not in ("hooked", "patched"))


def test_a_model_that_nobody_needs_is_gone_at_once(model, captures):
    """With the memory of its graphs and tables, as the plain one would be."""
    fast = warmed(model)
    fast.stages(fast.patch_embed(images()))
    fast.stages[0](fast.patch_embed(images()))
    with torch.enable_grad():
        fast.requires_grad_()(images()).sum().backward()
    swinfast.report(fast)
    assert captures.captured
    kept = [weakref.ref(one) for one in (*fast.modules(), *fast.parameters(), fast.plan())]
    gc.disable()
    try:
        del fast
        assert not [one() for one in kept if one() is not None]
    finally:
        gc.enable()


def test_a_capture_is_told_how_much_memory_it_takes(model, captures):
    """What its tensors take at most at a time, counted in the run before it."""
    fast = warmed(model)
    plan, x = fast.plan(), images()
    tables = fast.tables(plan, kind_of(x))
    with torch.no_grad(), LiveBytes() as live:
        fast._compute(plan, tables, [_embed(fast.patch_embed, plan.patch_embed, tables, x, None)])
    assert captures.room == live.peak > 0


def test_images_lie_anywhere(model, captures):
    """Of any strides and alignment, in memory that a caller goes on with; all have one graph."""
    fast, x = warmed(model), images(seed=3)
    room = torch.empty(x.numel() + 1, device=DEVICE)
    odd = room[1:].view(x.shape).copy_(x)  # four bytes after a place that every allocation begins at
    assert odd.data_ptr() % graphs.ALIGNED
    wide = torch.zeros(*x.shape[:3], 2 * x.shape[3], device=DEVICE)
    wide[..., ::2] = x
    with torch.no_grad():
        expected = model(x)
    for one in (x, odd, x.to(memory_format=torch.channels_last), wide[..., ::2], x.flip(3).flip(3)):
        before = one.clone()
        assert relative_rms(fast(one), expected) <= 1e-5
        assert torch.equal(one, before)
        one.zero_()
    assert captures.captured == 1


def test_what_was_loaded_is_the_graphs(model, captures):
    """A caller may overwrite images before a replay is done with them, in the order of the stream."""
    fast = warmed(model)
    (graph,) = fast._swinfast.plan.graphs._graphs.values()
    x = images(seed=4)
    with torch.no_grad():
        expected = model(x)
        graph.load(x)
        x.zero_()
        graph.replay()
    assert relative_rms(graph.output, expected) <= 1e-5


@pytest.mark.parametrize("head", [*({"global_pool": pool} for pool in POOLS), {"num_classes": 0}], ids=str)
def test_heads(timm, captures, head):
    model = make(timm, TINY | head, "timm").to(DEVICE).requires_grad_(False)
    fast = warmed(model)
    assert spans_all(fast)
    assert_right(fast, model, images(seed=5))


def edit_in_place(either):
    with torch.no_grad():
        either.head.fc.weight.mul_(1.5)
        either.head.fc.bias.add_(1)


def load(either):
    state = {name: value * 1.25 for name, value in either.state_dict().items()}
    either.load_state_dict(state)


@pytest.mark.parametrize("change", [edit_in_place, load])
def test_edits_keep_the_graph(model, captures, change):
    fast = warmed(model)
    for either in (model, fast):
        change(either)
    assert_right(fast, model, images(seed=7))
    if change is edit_in_place or DEVICE.type == "cuda":  # packed weights of a CPU are packed anew
        assert captures.captured == 1


def test_a_graph_keeps_what_it_reads(model, captures):
    """A replay may come before it is asked whether it still is the right one."""
    fast = warmed(model)
    (graph,) = fast._swinfast.plan.graphs._graphs.values()
    weight = fast.head.fc.weight
    before = weight.data_ptr()
    weight.data = weight.data * 2
    assert before in {kept.data_ptr() for kept in graph.memory} and weight.data_ptr() != before


def test_a_copy_of_the_class(timm, captures):
    """Another's classifier may do more than its parts: they are replaced, and it is not."""

    class SwinTransformerV2Cr(timm.models.swin_transformer_v2_cr.SwinTransformerV2Cr):
        def forward(self, x, factor=2.0):
            return super().forward(x) * factor

    model = randomise(SwinTransformerV2Cr(**TINY)).eval().to(DEVICE).requires_grad_(False)
    fast = optimised(model)
    assert not isinstance(fast, FusedClassifier)
    for _ in range(3):
        assert_right(fast, model, images())
        assert relative_rms(fast(images(), factor=3.0), model(images(), factor=3.0)) <= 1e-5


def test_the_class_makes_models(model):
    other = type(optimised(model))(**TINY).eval().to(DEVICE)
    other.load_state_dict(model.state_dict())
    assert_right(other, model, images())


def test_derivations_of_all_parts(model, captures):
    fast = warmed(model)
    plan = fast._swinfast.plan
    for part in (fast.patch_embed.norm, fast.stages[0].blocks[0].attn):
        before = plan.derivations
        with torch.no_grad():
            next(part.parameters()).mul_(1.1)
        fast(images())
        assert plan.derivations > before


def test_a_dropout_in_the_head(timm, captures):
    """In training mode in a model that is not: every answer is another."""
    model = make(timm, TINY | {"drop_rate": 0.5}, "timm").to(DEVICE).requires_grad_(False)
    fast = warmed(model)
    assert spans_all(fast)
    fast.head.drop.train()
    answers = [fast(images()) for _ in range(4)]
    assert not torch.equal(answers[2], answers[3])
    assert fast._swinfast.plan is None  # one graph is launched in vain, and no other
    fast.head.drop.eval()
    assert_right(fast, model, images())


def test_a_head_that_is_not_known(model, captures):
    class Head(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    for either in (model, fast := optimised(model)):
        either.head = Head()
    for seed in range(3):
        assert_right(fast, model, images(seed=seed))
    assert len(fast.stages._swinfast.plan.graphs) == 1 and not spans_any(fast)


def test_the_parts_by_themselves(model, captures):
    fast = warmed(model)
    x = images(seed=3)
    for _ in range(3):
        assert relative_rms(fast.forward_features(x), model.forward_features(x)) <= 1e-5
        logits = fast.forward_head(fast.forward_features(x), pre_logits=True)
        assert relative_rms(logits, model.forward_head(model.forward_features(x), pre_logits=True)) <= 1e-5
    assert len(fast.stages._swinfast.plan.graphs) == 1
    assert_right(fast, model, x)


def test_gradients_are_not_captured(timm, captures):
    model = make(timm, TINY, "timm").to(DEVICE)
    fast = optimised(model)
    for _ in range(3):
        gradients = [
            torch.autograd.grad(either(images()).square().sum(), either.head.fc.weight)[0] for either in (model, fast)
        ]
        assert relative_rms(gradients[1], gradients[0]) <= 1e-4
    assert fast._swinfast.plan is None or not fast._swinfast.plan.graphs
    with torch.no_grad():
        for _ in range(3):
            assert_right(fast, model, images())
    assert len(fast._swinfast.plan.graphs) == 1


def test_autocast_has_graphs_of_the_stages_alone(model, captures):
    fast = optimised(model)
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        for _ in range(3):
            assert relative_rms(fast(images()), model(images())) <= 0.05
    assert not spans_all(fast)
    for _ in range(3):
        assert_right(fast, model, images())
    assert spans_all(fast) or len(fast._swinfast.plan.graphs) == 1


def test_pixels(model, captures):
    fast = optimised(model, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    mean, std = (torch.tensor(v, device=DEVICE)[:, None, None] for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    for seed in range(3):
        pixels = (random_images(1, 3, 16, 16, seed=seed) * 50 + 128).clamp(0, 255).to(DEVICE, torch.uint8)
        assert relative_rms(fast(pixels), model((pixels / 255 - mean) / std)) <= 1e-4
    assert spans_all(fast)


def test_any_strides(model, captures):
    fast = optimised(model)
    x = images(2, seed=4)
    for given in (x, x.contiguous(memory_format=torch.channels_last), x.flip(3).flip(3), x.transpose(2, 3)):
        assert_right(fast, model, given)
    assert captures.captured == 1


def test_what_the_original_refuses(model, captures):
    fast = warmed(model)
    for wrong in (images()[0], images(size=32), images()[:, :2]):
        with pytest.raises((AssertionError, RuntimeError, ValueError)):
            fast(wrong)
    assert_right(fast, model, images())


def test_copies(model, captures):
    fast = warmed(model, cuda_graphs=True)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert isinstance(other, FusedClassifier) and other._swinfast.cuda_graphs is True
        edit_in_place(fast)
        for _ in range(3):
            assert_right(other, model, images())
        assert spans_all(other)


def test_optimised_twice(model, captures):
    fast = swinfast.optimize(optimised(model), backend="triton" if DEVICE.type == "cuda" else "torch")
    for _ in range(3):
        assert_right(fast, model, images())
    assert spans_all(fast)
    assert type(fast).__mro__.count(FusedClassifier) == 1
