"""Which models get pixels as they are, and which get normalised images: the answers are the plain model's."""

from collections.abc import Callable
from types import MethodType

import numpy as np
import pytest
import torch
from helpers import randomise
from PIL import Image
from swinfast.reference import SwinTransformerV2Cr
from torch import nn

import swinfast


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float64, 1e-6)], ids=str)
def test_patch_embedding_that_is_left_alone(model, images, dtype, error):
    """Images are then normalised before it, and answers are the same."""
    expected = list(swinfast.Embedder(model, dtype=dtype, device="cpu").extract(images))
    model.patch_embed.proj.register_forward_hook(lambda module, args, output: None)
    got = list(swinfast.Embedder(model, dtype=dtype, device="cpu").extract(images))
    got, expected = (np.stack([result.arrays["embedding"] for result in results]) for results in (got, expected))
    assert np.abs(got - expected).max() <= error * np.abs(expected).max()


class Wrapper(nn.Module):
    """A model that has changed images."""

    def __init__(self, model: nn.Module, change: Callable):
        super().__init__()
        self.inner, self.change = model, change
        self.pretrained_cfg, self.num_classes = model.pretrained_cfg, model.num_classes

    def forward(self, x):
        return self.inner(self.change(x))


class Halved(SwinTransformerV2Cr):
    def forward(self, x):
        return super().forward(x * 0.5)


def with_patch_embedding(wrapper: Wrapper) -> Wrapper:
    wrapper.patch_embed = wrapper.inner.patch_embed
    return wrapper


def hook(module: nn.Module, change: Callable) -> None:
    module.register_forward_pre_hook(lambda module, args: (change(args[0]),))


def hook_that_looks_at_images(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output + args[0].float().mean((1, 2, 3), keepdim=True))


def halved(method: Callable) -> Callable:
    return lambda module, x: method(module, x * 0.5)


def patch(module: nn.Module, name: str) -> None:
    setattr(module, name, MethodType(halved(getattr(type(module), name)), module))


def patch_class(model: nn.Module) -> None:
    type(model).forward_features = halved(type(model).forward_features)


CHANGES = {
    "none": lambda model: model,
    "clamped before the model": lambda model: hook(model, lambda x: x.clamp(-0.5, 0.5)),
    "halved before the model": lambda model: hook(model, lambda x: x * 0.5),
    "halved before the patch embedding": lambda model: hook(model.patch_embed, lambda x: x * 0.5),
    "looked at after the patch embedding": lambda model: hook_that_looks_at_images(model.patch_embed),
    "halved by a wrapper": lambda model: Wrapper(model, lambda x: x * 0.5),
    "halved by a wrapper with a patch embedding": lambda model: with_patch_embedding(Wrapper(model, lambda x: x * 0.5)),
    "flipped by a wrapper": lambda model: Wrapper(model, lambda x: (x + x.flip(3)) / 2),
    "halved by a subclass": lambda model: setattr(model, "__class__", Halved),
    "halved by a patch": lambda model: patch(model, "forward_features"),
    "halved by a patch of the class": patch_class,
    "halved by a patch of the patch embedding": lambda model: patch(model.patch_embed, "forward"),
}


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_images_that_are_changed_before_the_patch_embedding(model, images, change, threads, monkeypatch):
    """They are normalised before that; with nothing in between the patch embedding does it."""
    monkeypatch.setattr(type(model), "forward_features", type(model).forward_features)  # which is undone in the end
    model.eval()
    model = CHANGES[change](model) or model
    with torch.no_grad():
        expected = model(torch.stack([swinfast.transform_of(model).load(file) for file in images])).softmax(dim=-1)
    predictor = swinfast.Predictor(model, topk=10, batch_size=4, threads=threads, device="cpu", workers=0)
    forward, dtypes = predictor._forward, set()
    predictor._forward = lambda x: dtypes.add(x.dtype) or forward(x)
    for result, row in zip(predictor.predict(images), expected, strict=True):
        assert list(result.probabilities) == pytest.approx(row[list(result.indices)].tolist(), abs=1e-5)
    assert dtypes == {torch.uint8 if change == "none" else torch.float32}


def test_timms_model_takes_pixels(timm, images):
    """Answers are those of timm's transform and model."""
    options = {"img_size": 32, "depths": (1,), "num_heads": (3,), "num_classes": 10}
    model = randomise(timm.create_model("swinv2_cr_tiny_224", **options)).eval()
    config = timm.data.resolve_data_config({"input_size": (3, 32, 32)}, model=model)
    transform = timm.data.create_transform(**config)
    with torch.no_grad():
        prepared = torch.stack([transform(Image.open(file).convert("RGB")) for file in images])
        expected = model(prepared).softmax(dim=-1)
    predictor = swinfast.Predictor(model, topk=10, device="cpu", workers=0)
    assert predictor._takes_pixels()
    for result, row in zip(predictor.predict(images), expected, strict=True):
        assert list(result.probabilities) == pytest.approx(row[list(result.indices)].tolist(), abs=1e-5)
