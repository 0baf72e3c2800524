"""The methods of SwinTransformerV2Cr and features_only models, with timm as oracle."""

import pytest
import torch
from helpers import random_images, randomise, relative_rms, small_model_args
from torch import nn

import swinfast

FOUR = small_model_args(depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8))


def windows(model) -> list[tuple]:
    blocks = [block for stage in model.stages for block in stage.blocks]
    return [(block.window_size, block.attn.window_size, block.shift_size, block.feat_size) for block in blocks]


def assert_all_same(got, expected):
    assert len(got) == len(expected)
    for index, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert relative_rms(ours, theirs) <= 1e-5, index


@pytest.mark.parametrize("pool", ["avg", "max", "catavgmax", ""])
@pytest.mark.parametrize("pre_logits", [False, True], ids=["logits", "pre_logits"])
def test_forward_head(twins, pool, pre_logits):
    ours, theirs = twins(**small_model_args(global_pool=pool, num_classes=10 if pool else 0))
    features = random_images(2, 32, 16, 16)
    with torch.no_grad():
        got = ours.forward_head(features, pre_logits=pre_logits)
        assert relative_rms(got, theirs.forward_head(features, pre_logits=pre_logits)) <= 1e-6


@pytest.mark.parametrize("intermediates_only", [False, True], ids=["both", "intermediates_only"])
@pytest.mark.parametrize("stop_early", [False, True], ids=["whole", "stop_early"])
@pytest.mark.parametrize("indices", [None, 1, 3, [0, 2], (1,), [-1], [-3, -4], [2, 0]], ids=str)
def test_forward_intermediates(twins, indices, stop_early, intermediates_only):
    ours, theirs = twins(**FOUR)
    images = random_images(2, 3, 64, 64)
    options = {"indices": indices, "stop_early": stop_early, "intermediates_only": intermediates_only, "norm": True}
    with torch.no_grad():
        got, expected = (model.forward_intermediates(images, **options) for model in (ours, theirs))
    if not intermediates_only:
        (last, got), (expected_last, expected) = got, expected
        assert relative_rms(last, expected_last) <= 1e-5
    assert_all_same(got, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"indices": 5}, r"last-n \(5\) is out of range \(1 to 4\)"),
        ({"indices": 0}, r"last-n \(0\) is out of range \(1 to 4\)"),
        ({"indices": [4]}, r"feature index 4 is out of range \(0 to 3\)"),
        ({"indices": [-5]}, r"feature index -1 is out of range \(0 to 3\)"),
        ({"output_fmt": "NHWC"}, "Output shape must be NCHW"),
    ],
    ids=["too many", "none", "beyond", "before", "format"],
)
def test_errors_of_forward_intermediates(twins, options, message):
    for model in twins(**FOUR):
        with pytest.raises(AssertionError, match=message):
            model.forward_intermediates(torch.zeros(1, 3, 64, 64), **options)


def test_get_classifier(twins):
    ours, _ = twins(**small_model_args())
    assert ours.get_classifier() is ours.head.fc
    assert isinstance(ours.get_classifier(), nn.Linear)


@pytest.mark.parametrize("pool", [None, "max", "catavgmax", "fastavg"])
@pytest.mark.parametrize("num_classes", [7, 0])
def test_reset_classifier(twins, num_classes, pool):
    ours, theirs = twins(**small_model_args(dtype=torch.float64))
    for model in (ours, theirs):
        model.reset_classifier(num_classes, pool)
    ours.load_state_dict(randomise(theirs, seed=1).state_dict())
    assert ours.num_classes == num_classes
    assert ours.head_hidden_size == theirs.head_hidden_size
    assert all(parameter.dtype == torch.float64 for parameter in ours.parameters())
    assert not any(module.training for module in ours.modules())
    images = random_images(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative_rms(ours(images), theirs(images)) <= 1e-13


def test_reset_classifier_twice(twins):
    """From a doubled embedding back to a single one, and to no pooling."""
    ours, theirs = twins(**small_model_args(global_pool="catavgmax"))
    images = random_images(2, 3, 64, 64)
    for num_classes, pool in ((3, "avg"), (4, None), (0, "")):
        for model in (ours, theirs):
            model.reset_classifier(num_classes, pool)
        ours.load_state_dict(randomise(theirs, seed=1).state_dict())
        with torch.no_grad():
            assert relative_rms(ours(images), theirs(images)) <= 1e-5


@pytest.mark.parametrize(
    "args, calls",
    [
        ({}, [{"img_size": 96}]),
        ({}, [{"img_size": (48, 80)}]),
        ({}, [{"img_size": (50, 90)}]),
        ({}, [{"img_size": 16}]),
        ({}, [{"window_size": 8}]),
        ({}, [{"img_size": 48, "window_size": (3, 5)}]),
        ({}, [{"img_size": 48, "window_size": [(3, 5), (6, 4)]}]),
        ({}, [{"img_size": 96, "window_ratio": 6}]),
        ({}, [{"window_ratio": (8, 4)}]),
        ({}, [{"img_size": 96, "window_size": 5, "window_ratio": 6}]),
        ({}, [{"img_size": 12, "window_size": 8, "always_partition": True}]),
        ({"always_partition": True, "img_size": 12, "window_size": 8}, [{"always_partition": False}]),
        ({"always_partition": True, "img_size": 12, "window_size": 8}, [{"img_size": 20}]),
        ({}, [{"img_size": 30}, {"img_size": 96}]),
        ({}, [{"img_size": 96, "window_size": 6}, {"img_size": 48}, {"img_size": 80}]),
        ({}, [{"window_ratio": 4}, {"img_size": 48}, {"img_size": 64}]),
        ({"img_size": 12, "window_size": 6}, [{"img_size": 24}]),
        ({"window_size": 2}, [{"img_size": 16}]),
        ({"window_size": 1}, [{"window_size": 4}]),
        ({"window_size": (1, 4)}, [{"window_size": 4}]),
        ({"img_size": 32, "window_size": None, "window_ratio": 8}, [{"img_size": 128}]),
        ({"img_size": 32, "window_size": None, "window_ratio": (4, 2)}, [{"img_size": 48}]),
        ({"dynamic_img_size": True}, [{"img_size": 96}]),
        ({}, [{}]),
    ],
    ids=lambda value: ", then ".join(map(str, value)) if isinstance(value, list) else str(value or "defaults"),
)
def test_set_input_size(twins, args, calls):
    ours, theirs = twins(**small_model_args(**args))
    for call in calls:
        for model in (ours, theirs):
            model.set_input_size(**call)
        assert windows(ours) == windows(theirs)
        assert ours.img_size == theirs.img_size
        assert ours.patch_embed.grid_size == tuple(theirs.patch_embed.grid_size)
        images = random_images(2, 3, *ours.img_size)
        with torch.no_grad():
            assert relative_rms(ours(images), theirs(images)) <= 1e-5


def test_set_input_size_is_strict_about_the_new_size(twins):
    ours, _ = twins(**small_model_args())
    ours.set_input_size(img_size=96)
    with pytest.raises(AssertionError, match=r"Input image height \(64\) doesn't match model \(96\)\."):
        ours(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("wrong", [{"window_size": [4, 4, 4]}, {"window_ratio": (8,)}, {"window_size": 0}], ids=str)
def test_set_input_size_changes_nothing_on_errors(twins, wrong):
    for model in twins(**small_model_args()):
        before = windows(model)
        with pytest.raises(AssertionError):
            model.set_input_size(img_size=96, **wrong)
        assert windows(model) == before
        assert model.img_size == model.patch_embed.img_size == (64, 64)


@pytest.mark.parametrize("size", [0, -4, (64, 0), (64,), (64, 64, 64), "64"], ids=str)
def test_no_image_size(twins, size):
    ours, theirs = twins(**small_model_args())
    with pytest.raises(ValueError, match=r"^Expected a positive image size \(H, W\), got ") as error:
        ours.set_input_size(img_size=size)
    assert ours.img_size == ours.patch_embed.img_size == (64, 64)
    if size == 0:
        with pytest.raises(ValueError) as expected:
            theirs.set_input_size(img_size=size)
        assert str(error.value) == str(expected.value)


def test_no_number_of_classes(twins):
    ours, _ = twins(**small_model_args())
    with pytest.raises(ValueError, match="num_classes must be a whole number of at least 0, got None"):
        ours.reset_classifier(None, "max")
    assert (ours.num_classes, ours.head.pool_type) == (10, "avg")


@pytest.mark.parametrize("out_indices", [None, (1, 3), (0,), (-2, -1), 2, (2, 0)], ids=str)
def test_features_only(timm, out_indices):
    options = {} if out_indices is None else {"out_indices": out_indices}
    ours, theirs = (
        randomise(make("swinv2_cr_tiny_ns_224", features_only=True, **FOUR, **options)).eval()
        for make in (swinfast.create_model, timm.create_model)
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for what in ("channels", "reduction", "module_name"):
        assert getattr(ours.feature_info, what)() == getattr(theirs.feature_info, what)(), what
    assert ours.pretrained_cfg["input_size"] == theirs.pretrained_cfg["input_size"]
    images = random_images(2, 3, 64, 64)
    with torch.no_grad():
        assert_all_same(ours(images), theirs(images))


def test_features_only_of_any_size(timm):
    args = FOUR | {"patch_size": (4, 2)}
    ours, theirs = (
        randomise(make("swinv2_cr_tiny_224", features_only=True, dynamic_img_size=True, **args)).eval()
        for make in (swinfast.create_model, timm.create_model)
    )
    assert ours.feature_info.reduction() == theirs.feature_info.reduction() == [4, 8, 16, 32]
    images = random_images(1, 3, 50, 70)
    with torch.no_grad():
        assert_all_same(ours(images), theirs(images))


def test_errors_of_features_only():
    with pytest.raises(AssertionError, match="feature index 4 is out of range"):
        swinfast.create_model("swinv2_cr_tiny_224", features_only=True, out_indices=(4,), device="meta")
    with pytest.raises(TypeError, match="out_indices needs features_only=True"):
        swinfast.create_model("swinv2_cr_tiny_224", out_indices=(0,), device="meta")


def test_features_only_is_strict_about_the_size():
    model = swinfast.create_model("swinv2_cr_tiny_224", features_only=True, **FOUR)
    with pytest.raises(AssertionError, match=r"Input image width \(60\) doesn't match model \(64\)\."):
        model(torch.zeros(1, 3, 64, 60))
