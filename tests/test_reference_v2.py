"""Our own model of the V2 family: its options, methods and checkpoints, against timm."""

import re

import pytest
import torch
from helpers import OPTIONS_OF_V2, THREE, images_for, make, random_images, relative_rms

import swinfast

OPTIONS = OPTIONS_OF_V2["square"]
IMAGES = random_images(2, 3, 64, 64)


def twins(timm, **options):
    """Our model and timm's with the same arguments and weights, in float64."""
    ours, theirs = (make(timm, options, source).double() for source in ("reference, V2", "timm, V2"))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("name", OPTIONS_OF_V2)
def test_our_own_model(timm, name):
    ours, theirs = twins(timm, **OPTIONS_OF_V2[name])
    images = images_for(OPTIONS_OF_V2[name], batch=2).double()
    with torch.no_grad():
        expected = theirs.forward_features(images)
        assert relative_rms(ours.forward_features(images), expected) <= 1e-5
        assert relative_rms(ours.forward_head(expected, True), theirs.forward_head(expected, True)) <= 1e-9
        assert relative_rms(ours(images), theirs(images)) <= 1e-5


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", "fast"])
def test_pools_of_our_own_model(timm, pool):
    ours, theirs = twins(timm, **OPTIONS | {"global_pool": pool})
    with torch.no_grad():
        assert relative_rms(ours(IMAGES.double()), theirs(IMAGES.double())) <= 1e-5


def test_methods_of_our_own_model(timm):
    ours, theirs = twins(timm, **THREE | {"img_size": 64, "window_size": 4})
    images = IMAGES.double()
    with torch.no_grad():
        for keywords in ({}, {"indices": [0, 2]}, {"indices": [1], "stop_early": True}, {"norm": True}):
            final, maps = ours.forward_intermediates(images, **keywords)
            expected_final, expected_maps = theirs.forward_intermediates(images, **keywords)
            for got, wanted in zip([final, *maps], [expected_final, *expected_maps], strict=True):
                assert relative_rms(got, wanted) <= 1e-5
        for change in ({"img_size": (48, 80)}, {"window_size": (3, 5)}, {"window_ratio": 4}, {"img_size": (64, 32)}):
            for either in (ours, theirs):
                either.set_input_size(**change)
            images = random_images(2, 3, *theirs.patch_embed.img_size).double()
            assert relative_rms(ours(images), theirs(images)) <= 1e-5


def test_features_of_our_own_model(timm):
    options = {"img_size": 64, "window_size": 4, "features_only": True, "out_indices": (0, 2)} | THREE
    del options["num_classes"]
    ours, theirs = (make(timm, options, source).double() for source in ("reference, V2", "timm, V2"))
    ours.load_state_dict(theirs.state_dict())
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.module_name() == theirs.feature_info.module_name()
    with torch.no_grad():
        for got, expected in zip(ours(IMAGES.double()), theirs(IMAGES.double()), strict=True):
            assert relative_rms(got, expected) <= 1e-5


def test_fresh_blocks_are_the_identity(timm):
    for create in (swinfast.create_model, timm.create_model):
        model = create("swinv2_tiny_window8_256", **OPTIONS).eval()
        x = random_images(1, 8, 8, 32)
        assert torch.equal(model.layers[1].blocks[1](x), x)


def test_errors_of_our_own_model():
    with pytest.raises(ValueError, match=r"^pretrained_window_sizes must have one for each of 4 stages, got \(3, 3\)"):
        swinfast.create_model("swinv2_tiny_window8_256", pretrained_window_sizes=(3, 3), device="meta")
    with pytest.raises(TypeError, match="unexpected keyword argument 'window_ratio'"):
        swinfast.create_model("swinv2_tiny_window8_256", window_ratio=8)
    for name in ("swinv2_tiny_window8_256", "swinv2_cr_tiny_224"):
        with pytest.raises(ValueError, match=r"^global_pool must be one of '', 'avg', .*, got None"):
            swinfast.create_model(name, global_pool=None, device="meta")
    model = swinfast.create_model("swinv2_tiny_window8_256", **OPTIONS)
    model.set_input_size(64, 4, 3)  # patch_size, then window_size, as in timm
    assert model.layers[0].blocks[0].window_size == (3, 3)
    with pytest.raises(ValueError, match=r"^patch_size can't be changed from \(4, 4\), got 2"):
        model.set_input_size(64, 2)


def test_checkpoints_of_the_authors(timm, tmp_path):
    """Patch merging is at the end of stages there, the classifier has a shorter name, and buffers are stored."""
    model = make(timm, THREE | {"img_size": 64, "window_size": 4}, "reference, V2")
    old = {}
    for name, value in model.state_dict().items():
        name = re.sub(r"^layers\.(\d+)\.downsample", lambda at: f"layers.{int(at[1]) - 1}.downsample", name)
        old[name.replace("head.fc.", "head.")] = value
    old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
    old["layers.0.blocks.0.attn.relative_coords_table"] = torch.zeros(1, 3, 3, 2)
    old["layers.0.blocks.1.attn_mask"] = torch.zeros(2, 4, 4)
    torch.save({"model": old}, tmp_path / "old.pth")
    options = THREE | {"img_size": 64, "window_size": 4, "checkpoint_path": tmp_path / "old.pth"}
    loaded = swinfast.create_model("swinv2_tiny_window8_256", **options).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))
