"""Every option of SwinTransformerV2Cr, with timm as oracle."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import random_images, relative_rms, small_model_args
from hypothesis import given, settings
from hypothesis import strategies as st
from swinfast.reference import SwinTransformerV2Cr
from torch import nn

THREE = {"depths": (2, 3, 2), "num_heads": (1, 2, 4)}
COARSE = partial(nn.LayerNorm, eps=1e-2)  # a wrong eps would show
DYNAMIC_SIZES = [(64, 64), (48, 80), (50, 70), (65, 67), (6, 6), (7, 31), (2, 2), (130, 24)]
OPTIONS = {
    "defaults": {},
    "img_size, not square": {"img_size": (48, 80)},
    "img_size, odd grid": {"img_size": (50, 66)},
    "img_size, not a multiple of the patch": {"img_size": (51, 67), "patch_size": 4, "window_size": 3},
    "img_size, smaller than the window": {"img_size": 16, "window_size": 16},
    "patch_size 4": {"img_size": 96, "patch_size": 4},
    "patch_size, two numbers": {"img_size": (64, 32), "patch_size": (4, 2)},
    "window_size, default": {"img_size": 128, "window_size": None},
    "window_size, two numbers": {"window_size": (4, 8)},
    "window_size, two stages": {"window_size": [(4, 2), (8, 4)]},
    "window_size, number for each stage": THREE | {"window_size": [8, 4, 2]},
    "window_size, pair for each stage": THREE | {"window_size": [(8, 2), (4, 5), (3, 4)]},
    "window_size, mixed": THREE | {"window_size": (8, (4, 5), [2, 4])},
    "window_size 1": {"img_size": 32, "window_size": 1},
    "window_size, 1 by 8": {"window_size": (1, 8)},
    "window_size, larger than the map on one axis": {"img_size": (16, 64), "window_size": 8},
    "window_size of the whole map": {"img_size": 16, "window_size": 8},
    "window_ratio": {"window_size": None, "window_ratio": 4},
    "window_ratio for each stage": {"img_size": 32, "window_size": None, "window_ratio": (8, 2)},
    "window_ratio, larger than the grid": {"img_size": 16, "window_size": None, "window_ratio": 32},
    "padded map": {"img_size": 60, "window_size": 7},
    "padded map on one axis": {"img_size": (64, 60), "window_size": 8},
    "padded map of 60 by 60": {"img_size": 240, "patch_size": 4, "window_size": 7},
    "odd grids": THREE | {"img_size": (100, 132), "patch_size": 4, "window_size": (5, 3)},
    "odd grids and small maps": THREE | {"img_size": (26, 44), "window_size": (4, 6)},
    "always_partition": {"img_size": 16, "window_size": 8, "always_partition": True},
    "always_partition, padded": {"img_size": 24, "window_size": (16, 7), "always_partition": True},
    "in_chans 1": {"in_chans": 1},
    "in_chans 4": {"in_chans": 4},
    "num_classes 0": {"num_classes": 0},
    "num_classes 5": {"num_classes": 5},
    "one stage": {"depths": (3,), "num_heads": (4,)},
    "four stages": {"depths": (1, 2, 3, 1), "num_heads": (1, 2, 4, 8)},
    "embed_dim 24, heads of 8": {"embed_dim": 24, "num_heads": (3, 6)},
    "heads of 12": {"embed_dim": 24, "num_heads": (2, 4)},
    "heads of 44": {"embed_dim": 44, "num_heads": (1, 2)},
    "heads of 5": {"embed_dim": 20, "num_heads": (4, 8)},
    "mlp_ratio": {"mlp_ratio": 2.6},
    "init_values None": {"init_values": None},
    "init_values 1": {"init_values": 1.0},
    "norm_layer": {"norm_layer": COARSE},
    "norm_layer, extra norms": THREE | {"norm_layer": COARSE, "extra_norm_stage": True},
    "extra_norm_stage": {"extra_norm_stage": True},
    "extra_norm_period 1": THREE | {"extra_norm_period": 1},
    "extra_norm_period 2": THREE | {"extra_norm_period": 2},
    "extra_norm_period and stage": THREE | {"extra_norm_period": 2, "extra_norm_stage": True},
}
POOLS = ["avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax"]


def pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def assert_same(ours, theirs, images):
    with torch.no_grad():
        features, expected = ours.forward_features(images), theirs.forward_features(images)
        assert relative_rms(features, expected) <= 1e-5
        assert relative_rms(ours(images), theirs(images)) <= 1e-5


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_option(twins, options):
    args = small_model_args(**options)
    ours, theirs = twins(**args)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same(ours, theirs, random_images(2, args.get("in_chans", 3), *pair(args["img_size"])))


@pytest.mark.parametrize("init_values", [0.0, None, 0.5])
def test_initial_gains(timm, init_values):
    make = timm.models.swin_transformer_v2_cr.SwinTransformerV2Cr
    expected = make(**small_model_args(init_values=init_values)).state_dict()
    state = SwinTransformerV2Cr(**small_model_args(init_values=init_values)).state_dict()
    for name in ("stages.0.blocks.0.norm1.weight", "stages.1.blocks.1.norm2.weight", "stages.1.blocks.1.norm3.weight"):
        assert torch.equal(state[name], expected[name]), name
    scale = "stages.0.blocks.0.attn.logit_scale"
    torch.testing.assert_close(state[scale], expected[scale])


@pytest.mark.parametrize("size", DYNAMIC_SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize(
    "option", [{"dynamic_img_size": True}, {"strict_img_size": False}], ids=lambda o: next(iter(o))
)
def test_images_of_any_size(twins, option, size):
    ours, theirs = twins(**small_model_args(**THREE, **option))
    assert ours.dynamic_img_size == theirs.dynamic_img_size is True
    assert_same(ours, theirs, random_images(2, 3, *size))


@pytest.mark.parametrize("size", [(64, 64), (50, 70), (12, 90)], ids=str)
def test_images_of_any_size_with_pair_windows(twins, size):
    args = small_model_args(dynamic_img_size=True, patch_size=(4, 2), window_size=[(3, 8), (2, 5)])
    assert_same(*twins(**args), random_images(1, 3, *size))


def test_images_of_any_size_and_always_partition(twins):
    ours, theirs = twins(**small_model_args(img_size=16, window_size=8, dynamic_img_size=True, always_partition=True))
    for size in ((16, 16), (40, 24), (10, 6)):
        assert_same(ours, theirs, random_images(1, 3, *size))


@pytest.mark.parametrize("pool", POOLS)
def test_global_pool(twins, pool):
    ours, theirs = twins(**small_model_args(global_pool=pool))
    assert ours.num_features == theirs.num_features == 32
    assert ours.head_hidden_size == theirs.head_hidden_size
    assert_same(ours, theirs, random_images(2, 3, 64, 64))


def test_no_global_pool(twins):
    ours, theirs = twins(**small_model_args(global_pool="", num_classes=0))
    images = random_images(2, 3, 64, 64)
    assert ours(images).shape == (2, 32, 16, 16)
    assert_same(ours, theirs, images)


@st.composite
def model_args(draw) -> dict:
    stages = draw(st.integers(1, 3))
    window = st.integers(1, 7)
    args = {
        "img_size": draw(st.tuples(st.integers(8, 48), st.integers(8, 48))),
        "patch_size": draw(st.sampled_from([2, 4, (2, 4), (4, 2)])),
        "depths": draw(st.tuples(*[st.integers(1, 3)] * stages)),
        "num_heads": draw(st.tuples(*[st.sampled_from([1, 2, 4])] * stages)),
        "always_partition": draw(st.booleans()),
        "dynamic_img_size": draw(st.booleans()),
        "extra_norm_stage": draw(st.booleans()),
        "extra_norm_period": draw(st.integers(0, 3)),
        "global_pool": draw(st.sampled_from(["avg", "max", "catavgmax"])),
    }
    if draw(st.booleans()):
        args["window_size"] = draw(
            st.one_of(window, st.tuples(window, window), st.tuples(*[st.tuples(window, window)] * stages))
        )
    else:
        args["window_size"] = None
        args["window_ratio"] = draw(st.one_of(st.integers(2, 9), st.tuples(*[st.integers(2, 9)] * stages)))
    return args


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(args=model_args())
def test_any_options_together(twins, args):
    ours, theirs = twins(**small_model_args(**args))
    assert_same(ours, theirs, random_images(1, 3, *args["img_size"]))


@pytest.mark.parametrize("size", [(64, 60), (60, 64), (32, 32)], ids=["width", "height", "both"])
def test_error_for_images_of_another_size(twins, size):
    ours, theirs = twins(**small_model_args())
    with pytest.raises(AssertionError) as expected:
        theirs(torch.zeros(1, 3, *size))
    with pytest.raises(AssertionError) as error:
        ours(torch.zeros(1, 3, *size))
    assert str(error.value) == str(expected.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window_size": [4, 4, 4]}, "Expected 2 stage window sizes, got"),
        ({"window_size": [(4, 4)]}, "Expected 2 stage window sizes, got"),
        ({"window_size": 0}, "Window sizes must be positive, got"),
        ({"window_size": (4, -1)}, "Window sizes must be positive, got"),
        ({"window_size": None, "window_ratio": (8, 8, 8)}, "Expected 2 stage window ratios, got"),
        ({"window_size": None, "window_ratio": 0}, "Window ratios must be positive, got"),
    ],
    ids=["three for two stages", "one pair in a list", "zero", "negative", "three ratios", "ratio zero"],
)
def test_error_for_wrong_windows(timm, options, message):
    for make in (SwinTransformerV2Cr, timm.models.swin_transformer_v2_cr.SwinTransformerV2Cr):
        with pytest.raises(AssertionError, match=message):
            make(**small_model_args(**options))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"norm_layer": nn.BatchNorm2d}, TypeError, "norm_layer must make a torch.nn.LayerNorm, it made a BatchNorm2d"),
        ({"norm_layer": nn.RMSNorm}, TypeError, "it made a RMSNorm"),
        ({"global_pool": "median"}, ValueError, "global_pool must be one of .*'catavgmax', got 'median'"),
        ({"global_pool": "slowavg"}, ValueError, "got 'slowavg'"),
        ({"num_heads": (3, 4)}, ValueError, "num_heads must divide the channels, got 3 heads for 16 channels"),
        ({"num_heads": (2, 4, 8)}, ValueError, r"num_heads must be .*, one for each of 2 stages, got \(2, 4, 8\)"),
        ({"num_heads": (0, 4)}, ValueError, r"num_heads must be whole numbers of at least 1, .*, got \(0, 4\)"),
        ({"depths": 3}, ValueError, "depths must be whole numbers of at least 0, one for each stage, got 3"),
        ({"depths": ()}, ValueError, r"depths must be whole numbers of at least 0, one for each stage, got \(\)"),
        ({"depths": (2, 0.5)}, ValueError, r"depths must be whole numbers .*, got \(2, 0\.5\)"),
        ({"num_classes": None}, ValueError, "num_classes must be a whole number of at least 0, got None"),
        ({"num_classes": -1}, ValueError, "num_classes must be a whole number of at least 0, got -1"),
        ({"in_chans": 0}, ValueError, "in_chans must be a whole number of at least 1, got 0"),
        ({"img_size": 0}, ValueError, r"Expected a positive image size \(H, W\), got \(0, 0\)\."),
        ({"img_size": (64, -4)}, ValueError, r"Expected a positive image size \(H, W\), got \(64, -4\)\."),
        ({"img_size": (64,)}, ValueError, r"Expected a positive image size \(H, W\), got \(64,\)\."),
        ({"img_size": None}, ValueError, r"Expected a positive image size \(H, W\), got None\."),
        ({"drop_rate": 0.1}, TypeError, "unexpected keyword argument 'drop_rate'"),
    ],
    ids=[
        "norm_layer, batch norm", "norm_layer, RMS norm", "pool", "pool prefix", "heads", "heads count", "no heads",
        "depths, number", "no depths", "depths, half a block", "no num_classes", "negative num_classes", "no channels",
        "no image", "negative image", "one side", "no img_size", "unknown",
    ],
)  # fmt: skip
def test_error_for_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        SwinTransformerV2Cr(**small_model_args(**options))


def test_numbers_of_other_types():
    numbers = {"img_size": np.array([64, 48]), "depths": np.array([1, 2]), "num_classes": np.int64(3)}
    model = SwinTransformerV2Cr(**small_model_args(**numbers))
    assert (model.img_size, model.num_classes, len(model.stages[1].blocks)) == ((64, 48), 3, 2)
