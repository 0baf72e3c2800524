"""The Triton stage, with timm as oracle: in Triton's interpreter where there is no GPU."""

import copy

import pytest
import torch
from helpers import OPTIONS, SMALL, images_for, make, random_images, randomise, relative_rms
from swinfast.kernels import launch
from swinfast.kernels.gate import ARCHS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import swinfast

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOAT32_NOISE = 3e-5
LAUNCH_NOTHING = {"aten::empty", "aten::as_strided_"}
TINY = SMALL | {"img_size": 32, "window_size": 4}


class Calls(TorchDispatchMode):
    """Records the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [a.untyped_storage().data_ptr() for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        made = [o for o in tree_leaves(out) if isinstance(o, torch.Tensor)]
        if (
            made
            and not func.is_view
            and not any(o.untyped_storage().data_ptr() in inputs for o in made if not o.is_meta)
        ):
            self.names.append(func.name().partition(".")[0])
        return out


def optimised(model, **options):
    return swinfast.optimize(model.to(DEVICE), backend="triton", **options)


def assert_passes(model, fast, images):
    """Of float32 models some differ from float64 by up to FLOAT32_NOISE, in plain PyTorch too, by luck: on one device
    swinfast has a quarter of the plain model's error, on another three times as much."""
    assert all(row.replaced and row.detail.startswith("Triton, ") for row in swinfast.report(fast).rows)
    outcome = swinfast.verify(model, fast, images.to(DEVICE))
    float32 = outcome.dtype == torch.float32
    assert outcome.passed or (float32 and outcome.fast.relative_rms <= FLOAT32_NOISE), outcome


@pytest.mark.parametrize("name", OPTIONS)
def test_options(timm, name):
    model = make(timm, OPTIONS[name], "timm")
    assert_passes(model, optimised(model), images_for(OPTIONS[name]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["square", "padded, odd grids", "extra norms", "head_dim 44"])
def test_dtypes(timm, name, dtype):
    model = make(timm, OPTIONS[name], "reference")
    assert_passes(model, optimised(model, dtype=dtype), images_for(OPTIONS[name]))


@pytest.mark.slow
def test_full_size(timm):
    """Every shape of the main model; the third stage with two of its six blocks, all alike. On a GPU: test_gpu."""
    model = randomise(timm.create_model("swinv2_cr_tiny_ns_224", depths=(2, 2, 2, 2))).eval()
    fast = optimised(model, dtype=torch.float16)
    images = random_images(1, 3, 224, 224).to(DEVICE)
    with torch.no_grad():
        expected = model.double()(images.double())
        assert relative_rms(fast(images), expected) <= 4e-3


def test_features_only(timm):
    options = {name: value for name, value in TINY.items() if name != "num_classes"} | {"features_only": True}
    model = make(timm, options, "timm")
    assert_passes(model, optimised(model), random_images(2, 3, 32, 32))


def test_dynamic_sizes_through_one_model(timm):
    model = make(timm, OPTIONS["dynamic"], "timm")
    fast = optimised(model)
    for size in ((64, 64), (30, 90), (8, 8), (64, 64)):
        assert_passes(model, fast, random_images(2, 3, *size))


@pytest.mark.parametrize("arch", ARCHS)
def test_launches(timm, arch):
    """At most 90 launches for the tiny model, ours and PyTorch's pool and head."""
    model = timm.create_model("swinv2_cr_tiny_ns_224").to("meta").eval()
    fast = swinfast.optimize(model, dtype=torch.float16, backend="triton")
    with torch.no_grad(), launch.record(arch) as launches, Calls() as calls:
        fast(torch.empty(2, 3, 224, 224, device="meta", dtype=torch.float16))
    names = ["" if one.kernel is None else one.kernel.__name__ for one in launches]
    ours = [name for name in names if name not in ("_offsets_kernel", "_table_kernel")]  # tables are made once
    arranged = 2 * ["aten::clone", "aten::_unsafe_view"]  # and so is the order of the first stage's
    others = [name for name in calls.names if name.startswith("aten::") and name not in LAUNCH_NOTHING]
    assert sorted(others) == sorted([*arranged, "aten::mean", "aten::addmm"])
    assert 2 * 12 + 4 <= len(ours) <= 90 - 2  # at the least two a block


def test_nothing_but_kernels_runs(timm):
    """PyTorch allocates and looks at tensors in another shape, and computes nothing in a Triton stage."""
    model = make(timm, OPTIONS["padded, odd grids"], "timm")
    fast = optimised(model, cuda_graphs=False)
    images = images_for(OPTIONS["padded, odd grids"], batch=1).to(DEVICE)
    with torch.no_grad():
        fast.stages(fast.patch_embed(images))
        with Calls() as calls:
            fast.stages(fast.patch_embed(images))
        with Calls() as original:
            model.stages(model.patch_embed(images))
    assert {"swinfast::window_attention", "swinfast::merge_norm", "swinfast::patch_embed"} <= set(calls.names)
    assert all(name.startswith("swinfast::") for name in calls.names), calls.names
    assert "swinfast::cpb_bias" not in calls.names  # tables are made once
    assert {"aten::_softmax", "aten::roll", "aten::native_layer_norm", "aten::convolution"} <= set(original.names)


def test_edits_are_seen(timm):
    model = make(timm, TINY, "timm")
    fast = optimised(model)
    images = random_images(2, 3, 32, 32).to(DEVICE)
    with torch.no_grad():
        before = fast(images)
        for either in (model, fast):
            block = either.stages[1].blocks[1]
            block.attn.meta_mlp.fc2.weight.mul_(2)
            block.attn.logit_scale.sub_(0.4)
            block.mlp.fc1.weight.mul_(1.1)
        after = fast(images)
        assert relative_rms(after, model(images)) <= 1e-5
        assert relative_rms(after, before) > 1e-3


def test_gradients(timm):
    model = make(timm, TINY, "timm").to(DEVICE)
    gradients = []
    for either in (model, optimised(model), copy.deepcopy(model).double()):
        images = random_images(2, 3, 32, 32).to(DEVICE, next(either.parameters()).dtype).requires_grad_()
        gradients.append(torch.autograd.grad(either(images).square().sum(), [images, *either.parameters()]))
    plain, got, exact = gradients
    scale = max(gradient.norm() for gradient in exact)
    errors = [max((a - b).norm() for a, b in zip(one, exact, strict=True)) / scale for one in (plain, got)]
    assert errors[1] <= 2 * errors[0] + 1e-5


def test_compile(timm):
    model = make(timm, SMALL | {"img_size": 64, "window_size": 4, "dynamic_img_size": True}, "timm")
    fast = optimised(model)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for batch in (2, 3):
            images = random_images(batch, 3, 32, 32).to(DEVICE)
            assert relative_rms(compiled(images), fast(images)) <= 1e-6
        before = fast(images)
        fast.stages[1].blocks[1].attn.meta_mlp.fc2.weight.mul_(2)
        assert relative_rms(compiled(images), fast(images)) <= 1e-6
        assert relative_rms(before, fast(images)) > 1e-4


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_of_a_compiled_model(timm, dynamic):
    model = make(timm, TINY, "timm")
    fast = optimised(model)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    images = random_images(2, 3, 32, 32).to(DEVICE).requires_grad_()
    expected, got = (torch.autograd.grad(either(images).square().sum(), images)[0] for either in (fast, compiled))
    assert expected.abs().max() > 0
    assert relative_rms(got, expected) <= 1e-3


def test_export_with_dynamic_batch(timm):
    model = make(timm, TINY, "timm").requires_grad_(False)
    fast = optimised(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    example = (random_images(2, 3, 32, 32).to(DEVICE),)
    with torch.no_grad():
        program = torch.export.export(fast, example, dynamic_shapes=({0: batch},))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "swinfast.window_attention.default" in targets
    assert not {target for target in targets if "softmax" in target or "layer_norm" in target}
    images = random_images(3, 3, 32, 32).to(DEVICE)
    assert relative_rms(program.module()(images), model(images)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(timm, dtype):
    model = make(timm, TINY, "timm")
    fast = optimised(model)
    images = random_images(4, 3, 32, 32).to(DEVICE)
    with torch.no_grad():
        exact = copy.deepcopy(model).double().forward_features(images.double())
        with torch.autocast(DEVICE.type, dtype):
            plain, got = model.forward_features(images), fast.forward_features(images)
            assert fast(images).dtype == model(images).dtype
        outside = fast.forward_features(images)
    assert 1e-5 < relative_rms(got, exact) <= 2 * relative_rms(plain, exact)
    assert relative_rms(outside, exact) <= 1e-5


def test_layers_without_a_bias(timm):
    model = make(timm, TINY, "timm")
    for stage in model.stages:
        for block in stage.blocks:
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2, block.attn.meta_mlp.fc2):
                layer.bias = None
    images = random_images(2, 3, 32, 32).to(DEVICE)
    with torch.no_grad():
        assert relative_rms(optimised(model)(images), model(images)) <= 1e-5


def test_images_of_every_kind(timm):
    model = make(timm, TINY, "timm")
    fast = optimised(model)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    images = ((pixels / 255 - mean) / std).to(DEVICE)
    with torch.no_grad():
        expected = model(images)
        assert relative_rms(fast(pixels.to(DEVICE)), expected) <= 1e-5
        assert relative_rms(fast(images.double()), expected) <= 1e-5
        channels_last = images.contiguous(memory_format=torch.channels_last)
        assert torch.equal(fast(channels_last), fast(images))
        assert torch.equal(fast(images.flip(3).flip(3)[:, :, :, :]), fast(images))
        with pytest.raises(AssertionError, match=r"Input image height \(28\) doesn't match model \(32\)"):
            fast(images[:, :, :28])


def test_neighbours_and_empty_batches(timm):
    model = make(timm, SMALL | {"img_size": 64, "window_size": 3}, "timm")
    fast = optimised(model)
    images = random_images(3, 3, 64, 64).to(DEVICE)
    with torch.no_grad():
        clean = fast(images)
        images[1, 0, 5, 5] = float("nan")
        got = fast(images)
        assert fast(images[:0]).shape == (0, 7)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
