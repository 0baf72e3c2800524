"""The three ways in which timm's model card uses swinv2_cr_tiny_ns_224, at full size, with swinfast.create_model."""

from collections.abc import Callable

import pytest
import torch
from helpers import randomise, relative_rms, write_image
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import swinfast

NAME = "swinv2_cr_tiny_ns_224.sw_in1k"


@pytest.fixture(scope="module")
def checkpoint(timm, tmp_path_factory):
    file = tmp_path_factory.mktemp("usages") / "model.safetensors"
    save_file(randomise(timm.create_model(NAME)).state_dict(), file)
    return file


@pytest.fixture(params=["plain", "optimised"])
def make(request, checkpoint) -> Callable[..., nn.Module]:
    """create_model from the checkpoint, optimised or not."""

    def create(**options) -> nn.Module:
        model = swinfast.create_model(NAME, checkpoint_path=checkpoint, **options).eval()
        return swinfast.optimize(model) if request.param == "optimised" else model

    return create


@pytest.fixture
def theirs(timm, checkpoint) -> Callable[..., nn.Module]:
    def create(**options) -> nn.Module:
        model, weights = timm.create_model(NAME, **options).eval(), load_file(checkpoint)
        # features_only renames stages.0 to stages_0
        model.load_state_dict({key: weights[key.replace("stages_", "stages.")] for key in model.state_dict()})
        return model

    return create


@pytest.fixture(scope="module")
def image(timm, tmp_path_factory) -> torch.Tensor:
    """A picture as timm's transform prepares it for the model, a batch of one."""
    picture = Image.open(write_image(tmp_path_factory.mktemp("usages") / "picture.png", size=(320, 280)))
    config = timm.data.resolve_data_config({}, model=NAME, pretrained_cfg=timm.get_pretrained_cfg(NAME).to_dict())
    return timm.data.create_transform(**config, is_training=False)(picture).unsqueeze(0)


@torch.no_grad()
def test_classification(make, theirs, image):
    got, expected = make()(image).softmax(dim=1).topk(5), theirs()(image).softmax(dim=1).topk(5)
    assert torch.equal(got.indices, expected.indices)
    torch.testing.assert_close(got.values, expected.values, rtol=1e-4, atol=0)


@torch.no_grad()
def test_feature_maps(make, theirs, image):
    got, expected = make(features_only=True)(image), theirs(features_only=True)(image)
    assert [tuple(o.shape) for o in got] == [(1, 96, 56, 56), (1, 192, 28, 28), (1, 384, 14, 14), (1, 768, 7, 7)]
    for ours, true in zip(got, expected, strict=True):
        assert relative_rms(ours, true) <= 4e-6


@torch.no_grad()
def test_embeddings(make, theirs, image):
    expected = theirs(num_classes=0)(image)
    got = make(num_classes=0)(image)
    assert got.shape == (1, 768)
    assert relative_rms(got, expected) <= 4e-6
    model = make()
    features = model.forward_features(image)
    assert features.shape == (1, 768, 7, 7)
    assert torch.equal(model.forward_head(features, pre_logits=True), got)
