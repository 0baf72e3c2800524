"""How much memory a forward takes, counted on meta tensors: nothing is computed."""

import pytest
import torch
from allocator import Reserved
from helpers import small_model_args

import swinfast
from swinfast import graphs
from swinfast.calls import kind_of
from swinfast.capture import LIBRARY_ROOM
from swinfast.classifier import _embed
from swinfast.memory import LiveBytes
from swinfast.torch_linear import has_native_bfloat16

BATCH = 256


def peak(forward, *args) -> int:
    with torch.no_grad(), LiveBytes() as counted:
        forward(*args)
    return counted.peak


def test_live_bytes():
    def forward(x):
        y = x + 1  # 4 KB
        z = torch.cat([y, y])  # 8 KB more
        del y
        z = z.view(-1) * 2  # 8 KB more, 4 KB less
        return z[:1] + 1  # 8 KB less

    assert peak(forward, torch.empty(1024, device="meta")) == 16 << 10


def in_a_graph_of(fast, plan, tables, images):
    """What a graph computes of large images, whose first step puts what it makes into the graph's memory."""
    return fast._compute(plan, tables, [_embed(fast.patch_embed, plan.patch_embed, tables, images, None)])


@pytest.mark.parametrize(
    ("name", "in_a_graph"),
    [("swinv2_cr_tiny_ns_224", True), ("swinv2_cr_base_ns_224", False), ("swinv2_cr_tiny_384", False)],
)
def test_at_most_a_third_of_the_plain_models(timm, name, in_a_graph, monkeypatch):
    """The Triton backend, its parts, and what dies when. A graph spans one, and keeps no copy of so many images."""
    with torch.device("meta"):
        model = timm.create_model(name).eval().half()
    fast = swinfast.optimize(model, backend="triton")
    images = torch.empty(BATCH, 3, *model.img_size, device="meta", dtype=torch.float16)
    plan, kind = fast.plan(), kind_of(images)
    tables = fast.tables(plan, kind)  # made once

    def part_by_part(images):
        x = fast.patch_embed(images)
        return fast.forward_head(fast.stages.fused_forward(plan.stages, x))

    third = peak(model, images) / 3
    assert 0 < peak(part_by_part, images) <= third
    assert (plan.work(images) <= graphs.GPU_PART) is in_a_graph
    if in_a_graph:
        monkeypatch.setattr(graphs, "may_run", lambda *_: True)
        monkeypatch.setattr(graphs, "stream_of", lambda device: 0)
        assert 0 < peak(part_by_part, images) <= third  # what comes for the first time has no graph yet
        assert images.nbytes >= graphs.LARGE_INPUT
        assert 0 < peak(in_a_graph_of, fast, plan, tables, images) <= third


def test_what_a_graph_keeps(timm):
    """As PyTorch's allocator has it: all of its memory is asked for at once, so that no tensor is without a place."""
    with torch.device("meta"):
        model = timm.create_model("swinv2_cr_tiny_ns_224").eval().half()
    fast = swinfast.optimize(model, backend="triton")
    images = torch.empty(BATCH, 3, 224, 224, device="meta", dtype=torch.float16)
    plan = fast.plan()
    tables = fast.tables(plan, kind_of(images))
    kept = []
    for room in (0, peak(in_a_graph_of, fast, plan, tables, images) + LIBRARY_ROOM):
        with torch.no_grad(), Reserved(room) as memory:
            in_a_graph_of(fast, plan, tables, images)
        kept.append(memory.reserved)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights + kept[1] <= peak(model, images) / 3 < weights + images.nbytes + kept[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"img_size": 232}, {"window_size": 4}], ids=str)
def test_at_most_the_plain_models_on_a_cpu(timm, options, dtype):
    """For batches of a single part, too, which have the largest share."""
    if dtype == torch.bfloat16 and not has_native_bfloat16():
        pytest.skip("this CPU computes bfloat16 in float32, which takes more memory")
    model = timm.create_model("swinv2_cr_tiny_ns_224", depths=(2, 2, 2, 2), **options).eval().to(dtype)
    fast = swinfast.optimize(model)
    for batch in (1, 2, 3):
        images = torch.empty(batch, 3, *model.img_size, dtype=dtype).normal_()
        with torch.no_grad():
            fast(images[:1])  # tables are made once
        assert 0 < peak(fast, images) <= peak(model, images)


def test_backward_passes_in_an_autocast_region_keep_nothing(timm):
    """What autocast casts of leaves it keeps until its region ends."""
    fast = swinfast.optimize(timm.create_model("swinv2_cr_tiny_224", **small_model_args()).eval())
    images, kept = torch.ones(2, 3, 64, 64), []
    with torch.autocast("cpu", torch.bfloat16), LiveBytes() as counted:
        for _ in range(4):
            fast(images).float().sum().backward()
            kept.append(sum(counted.sizes()))
    assert kept[3] == kept[1] > 0
