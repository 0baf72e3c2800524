"""Optimised models give the answers of the plain ones: timm as oracle, over the options of the family."""

import pytest
import torch
from helpers import (
    OPTIONS,
    SMALL,
    THREE,
    assert_same_answers,
    images_for,
    make,
    random_images,
    randomise,
    relative_rms,
)
from PIL import Image
from torch import nn

import swinfast


@pytest.mark.parametrize("source", ["timm", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(timm, name, source):
    options = OPTIONS[name]
    model = make(timm, options, source)
    fast = swinfast.optimize(model)
    assert all(row.replaced for row in swinfast.report(fast).rows)
    assert_same_answers(model, fast, images_for(options, batch=2))


@pytest.mark.parametrize("size", [(64, 64), (60, 60), (30, 90), (12, 100), (8, 8), (101, 67)], ids=str)
def test_dynamic_sizes_through_one_model(timm, size):
    model = make(timm, OPTIONS["dynamic"], "timm")
    fast = swinfast.optimize(model)
    for height, width in ((64, 64), size, (64, 64)):
        outcome = swinfast.verify(model, fast, random_images(2, 3, height, width))
        assert outcome.passed, outcome


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_full_size(timm, dtype):
    model = randomise(timm.create_model("swinv2_cr_tiny_ns_224")).eval()
    images = random_images(2, 3, 224, 224)
    fast = swinfast.optimize(model, dtype=dtype)
    outcome = swinfast.verify(model, fast, images)
    assert outcome.passed, outcome
    assert outcome.top1_agreement is not None
    if dtype == torch.float32:
        with torch.no_grad():
            assert relative_rms(fast(images), model(images)) <= 2e-6


@pytest.mark.filterwarnings("ignore:float16 has no fast path")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["square", "padded", "extra norms"])
def test_dtypes(timm, name, dtype):
    model = make(timm, OPTIONS[name], "timm")
    outcome = swinfast.verify(model, swinfast.optimize(model, dtype=dtype), images_for(OPTIONS[name], batch=2))
    assert outcome.passed, outcome


@pytest.mark.parametrize("source", ["timm", "reference"])
@pytest.mark.parametrize("out_indices", [(0, 1, 2), (0, 2), (1,), (-1,)], ids=str)
def test_features_only(timm, source, out_indices):
    options = THREE | {"img_size": 64, "features_only": True, "out_indices": out_indices}
    model = make(timm, {key: value for key, value in options.items() if key != "num_classes"}, source)
    fast = swinfast.optimize(model)
    assert_same_answers(model, fast, images_for(options, batch=2))


@pytest.mark.parametrize("source", ["timm", "reference"])
def test_every_method(timm, source):
    model = make(timm, THREE | {"img_size": 64}, source).double()
    fast = swinfast.optimize(model)
    images = images_for({"img_size": 64}).double()
    with torch.no_grad():
        features, expected = fast.forward_features(images), model.forward_features(images)
        assert relative_rms(fast.forward_head(features, pre_logits=True), model.forward_head(expected, True)) <= 1e-5
        for keywords in ({}, {"indices": [0, 2]}, {"indices": 1}, {"indices": [1], "stop_early": True}):
            final, maps = fast.forward_intermediates(images, **keywords)
            expected_final, expected_maps = model.forward_intermediates(images, **keywords)
            for got, wanted in zip([final, *maps], [expected_final, *expected_maps], strict=True):
                assert relative_rms(got, wanted) <= 1e-5
    assert fast.get_classifier() is fast.head.fc
    assert isinstance(fast, type(model))
    assert isinstance(fast.stages[0], type(model.stages[0]))


def test_a_backbone_inside_something_larger(timm):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            options = {**SMALL, "img_size": 64, "features_only": True}
            del options["num_classes"]
            self.backbone = nn.ModuleDict({"body": timm.create_model("swinv2_cr_tiny_224", **options)})
            self.neck = nn.Conv2d(32, 4, 1)

        def forward(self, x):
            return self.neck(self.backbone["body"](x)[-1])

    detector = randomise(Detector()).eval()
    fast = swinfast.optimize(detector)
    assert_same_answers(detector, fast, images_for({"img_size": 64}))
    assert swinfast.report(fast).rows[1].name == "backbone.body.stages_0.blocks.0"


def test_another_librarys_patch_embed_is_left_alone(timm):
    """A ViT's PatchEmbed has the name, the children and another answer."""
    both = nn.ModuleDict(
        {
            "vit": timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3),
            "swin": timm.create_model("swinv2_cr_tiny_224", **SMALL),
        }
    ).eval()
    fast = swinfast.optimize(both)
    assert type(fast["vit"].patch_embed) is type(both["vit"].patch_embed)
    assert {row.name.split(".")[0] for row in swinfast.report(fast).rows} == {"swin"}


@pytest.mark.parametrize("batch", [0, 1, 3, 9, 50])
def test_batch_sizes(timm, batch):
    model = make(timm, SMALL | {"img_size": 224}, "timm")
    fast = swinfast.optimize(model)
    images = random_images(batch, 3, 224, 224)
    with torch.no_grad():
        got = fast(images)
        assert got.shape == (batch, 7)
        assert fast.forward_features(images).shape == (batch, 32, 28, 28)
        if batch:
            assert relative_rms(got, model(images)) <= 1e-5


def test_memory_layouts(timm):
    model = make(timm, SMALL | {"img_size": (64, 96)}, "timm")
    fast = swinfast.optimize(model)
    images = random_images(2, 3, 64, 96)
    layouts = [
        images.contiguous(memory_format=torch.channels_last),
        images.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
        torch.cat([images, images], 3)[..., :96],
        images.flip(0).flip(0),
        torch.stack([images, images], -1)[..., 0],
    ]
    with torch.no_grad():
        expected = model(images)
        for layout in layouts:
            assert relative_rms(fast(layout), expected) <= 1e-5
        features = fast.patch_embed(images)
        strided = fast.stages[0](features.contiguous())  # NCHW memory, where stages pass NHWC
        assert relative_rms(strided, model.stages[0](model.patch_embed(images))) <= 1e-5


def test_a_nan_image_stays_alone_and_outputs_stay_as_they_are(timm):
    fast = swinfast.optimize(make(timm, SMALL | {"img_size": 64}, "timm"))
    images = random_images(6, 3, 64, 64)
    with torch.no_grad():
        clean = fast(images)
        kept = clean.clone()
        images[3] = float("nan")
        dirty = fast(images)
    assert torch.equal(clean, kept)
    assert dirty[3].isnan().all()
    others = [0, 1, 2, 4, 5]
    assert torch.equal(dirty[others], clean[others])


def test_uint8_images(timm):
    model = make(timm, SMALL | {"img_size": 64}, "timm")
    fast = swinfast.optimize(model)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        assert relative_rms(fast(pixels), model((pixels / 255 - mean) / std)) <= 1e-5
        other = swinfast.optimize(model, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
        mean, std = torch.tensor([0.1, 0.2, 0.3])[:, None, None], torch.tensor([0.5, 0.6, 0.7])[:, None, None]
        expected = model((pixels / 255 - mean) / std)
        assert relative_rms(other(pixels), expected) <= 1e-5
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert relative_rms(other(pixels), expected) <= 1e-5
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("source", ["timm", "reference"])
def test_uint8_images_of_one_channel(timm, source):
    """Of an RGB model made for one: by the averages of its mean and std, as image files are normalised for it."""
    model = make(timm, SMALL | {"img_size": 64, "in_chans": 1}, source)
    pixels = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    files = [Image.fromarray(one.numpy()) for one in pixels[:, 0]]
    expected = model(torch.stack([*map(swinfast.transform_of(model).normalise, files)]))
    assert relative_rms(swinfast.optimize(model)(pixels), expected) <= 1e-5
    again = swinfast.optimize(swinfast.optimize(model), backend="torch")
    assert relative_rms(again(pixels), expected) <= 1e-5


def test_negative_views(timm):
    """As the imaginary part of a conjugate is one."""
    model = make(timm, SMALL | {"img_size": 64}, "timm")
    images = torch._neg_view(random_images(2, 3, 64, 64))
    assert images.is_neg() and images.is_contiguous()
    with torch.no_grad():
        assert relative_rms(swinfast.optimize(model)(images), model(images)) <= 1e-5


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_images_are_cast_to_the_models_dtype(timm, given):
    model = make(timm, SMALL | {"img_size": 64}, "timm")
    images = random_images(2, 3, 64, 64).to(given)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            fast = swinfast.optimize(model, dtype=dtype)
            assert fast(images).dtype == dtype
        assert relative_rms(swinfast.optimize(model)(images), model(images.float())) <= 1e-5


def test_autocast(timm):
    model = make(timm, SMALL | {"img_size": 64}, "timm")
    fast = swinfast.optimize(model)
    images = random_images(2, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, got = model(images), fast(images)
        for part in (lambda either: either.patch_embed(images), lambda either: either.forward_features(images)):
            assert part(fast).dtype == part(model).dtype == torch.bfloat16
        double = swinfast.optimize(model, dtype=torch.float64)
        assert double.patch_embed(images.double()).dtype == torch.float64  # which autocast leaves alone
    with torch.no_grad():
        exact = model(images)
    assert got.dtype == expected.dtype
    assert 1e-4 < relative_rms(got, exact) <= 2 * relative_rms(expected, exact)


@pytest.mark.parametrize(
    "name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "attn.meta_mlp.fc1", "attn.meta_mlp.fc2"]
)
def test_layers_without_a_bias(timm, name):
    model = make(timm, SMALL | {"img_size": 64}, "timm")
    for stage in model.stages:
        for block in stage.blocks:
            block.get_submodule(name).bias = None
    fast = swinfast.optimize(model)
    assert all(row.replaced for row in swinfast.report(fast).rows)
    assert_same_answers(model, fast, random_images(2, 3, 64, 64))
