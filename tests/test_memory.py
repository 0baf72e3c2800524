"""How much memory a forward takes, counted on meta tensors: nothing is computed."""

import pytest
import torch
from helpers import small_model_args
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import swinfast
from swinfast import graphs
from swinfast.calls import kind_of
from swinfast.torch_linear import has_native_bfloat16

BATCH = 256


class LiveBytes(TorchDispatchMode):
    """The most bytes of results of operators that are alive at a time."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(out):
            if storage._cdata not in given:
                self.alive[storage._cdata] = StorageWeakRef(storage)
        self.alive = {key: storage for key, storage in self.alive.items() if not storage.expired()}
        self.peak = max(self.peak, sum(map(size_now, self.alive.values())))
        return out


def storages(tree) -> list[torch.UntypedStorage]:
    """Of the tensors in it. Packed weights are opaque: they have none."""
    tensors = [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and not x.is_mkldnn]
    return [x.untyped_storage() for x in tensors]


def size_now(reference: StorageWeakRef) -> int:
    """In bytes; a storage may be resized."""
    storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
    return 0 if storage is None else storage.nbytes()


def peak(forward, *args) -> int:
    with torch.no_grad(), LiveBytes() as counted:
        forward(*args)
    return counted.peak


def test_live_bytes():
    def forward(x):
        y = x + 1  # 4 KB
        z = torch.cat([y, y])  # 8 KB more
        del y
        return z.view(-1) * 2  # 8 KB more, 4 KB less

    assert peak(forward, torch.empty(1024, device="meta")) == 16 << 10


@pytest.mark.parametrize(
    ("name", "in_a_graph"),
    [("swinv2_cr_tiny_ns_224", True), ("swinv2_cr_base_ns_224", False), ("swinv2_cr_tiny_384", False)],
)
def test_at_most_a_third_of_the_plain_models(timm, name, in_a_graph, monkeypatch):
    """The Triton backend, its parts, and what dies when; a graph, which spans one part, keeps a copy of the images."""
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
    assert plan.graph_pays(images) is in_a_graph
    if in_a_graph:
        monkeypatch.setattr(graphs, "may_run", lambda *_: True)
        monkeypatch.setattr(graphs, "stream_of", lambda device: 0)
        assert 0 < peak(part_by_part, images) <= third  # what comes for the first time has no graph yet
        assert 0 < images.nbytes + peak(fast._compute, plan, tables, images) <= third


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
            kept.append(sum(map(size_now, counted.alive.values())))
    assert kept[3] == kept[1] > 0
