"""Images of every dtype that is promised, also where the original computes, which takes those of its own alone."""

import pytest
import torch
from helpers import random_images, randomise, relative_rms, small_model_args
from torch import nn
from torch.func import functional_call, functionalize, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_hook

import swinfast

FLOATS = random_images(2, 3, 16, 16)
PIXELS = (FLOATS * 50 + 128).clamp(0, 255).to(torch.uint8)
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.uint8)


@pytest.fixture
def model(timm):
    """Without what is random in training mode."""
    torch._dynamo.reset()
    model = randomise(timm.create_model("swinv2_cr_tiny_224", **small_model_args(img_size=16, depths=(1, 1)))).eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture(params=DTYPES, ids=str)
def images(request, model):
    """As they are given, and as the plain model takes them."""
    if request.param != torch.uint8:
        given = FLOATS.to(request.param)
        return given, given.float()
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    return PIXELS, (PIXELS / 255 - mean) / std


def in_training(fast):
    return fast.train()


def with_a_hook(fast):
    fast.patch_embed.proj.register_forward_hook(lambda *_: None)
    return fast


def with_a_hook_on_all(fast):
    def call(images):
        handle = register_module_forward_hook(lambda *_: None)
        try:
            return fast(images)
        finally:
            handle.remove()

    return call


def in_vmap(fast):
    return vmap(lambda image: fast(image[None])[0])


def compiled_with_a_hook(fast):
    return torch.compile(with_a_hook(fast), backend="eager", fullgraph=True)


def compiled(fast):
    return torch.compile(fast.train(), backend="eager", fullgraph=True)


def exported(fast):
    return lambda images: torch.export.export(fast.train(), (images,)).module()(images)


def traced(fast):
    return lambda images: torch.jit.trace(fast.train(), images)(images)


def made_a_graph(fast):
    return lambda images: make_fx(fast.train())(images)(images)


WAYS = (
    in_training, with_a_hook, with_a_hook_on_all, in_vmap, functionalize, compiled_with_a_hook, compiled, exported,
    traced, made_a_graph,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap's
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_where_the_original_computes(model, images, way):
    given, taken = images
    fast = swinfast.optimize(model)
    with torch.no_grad():
        assert relative_rms(way(fast)(given), model(taken)) <= 2e-6
        assert relative_rms(fast.eval()(given), model(taken)) <= 2e-6  # nothing stays of it


def test_gradients_of_training(model, images):
    given, taken = images
    fast = swinfast.optimize(model).train()
    got = torch.autograd.grad(fast(given).square().sum(), list(fast.parameters()))
    expected = torch.autograd.grad(model(taken).square().sum(), list(model.parameters()))
    assert all(map(torch.equal, got, expected))
    if given.is_floating_point():
        given = given.clone().requires_grad_()
        assert torch.autograd.grad(fast(given).sum(), given)[0].dtype == given.dtype


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap's
def test_gradients_of_each_image(model, images):
    given, taken = images
    fast = swinfast.optimize(model)

    def per_image(either, images):
        def loss(parameters, image):
            return functional_call(either, parameters, image[None]).square().sum()

        return vmap(grad(loss), in_dims=(None, 0))(dict(either.named_parameters()), images)

    got, expected = per_image(fast, given), per_image(model, taken)
    assert all(relative_rms(got[name], expected[name]) <= 1e-5 for name in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast(model, images, dtype):
    """It casts what is not float64: such images reach the original as they are."""
    given, taken = images
    model, fast = model.to(dtype), swinfast.optimize(model, dtype=dtype).train()
    seen = []
    fast.patch_embed.register_forward_hook(lambda *_: None)
    fast.patch_embed.proj.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(given), model(taken.to(dtype)))
    castable = dtype == torch.float32 and given.is_floating_point() and given.dtype != torch.float64
    assert seen == [given.dtype if castable else dtype]


def test_pixels_without_mean_and_std_in_training(model):
    del model.pretrained_cfg, model.default_cfg
    with pytest.raises(ValueError, match=r"give optimize\(..., mean=..., std=...\)"):
        swinfast.optimize(model).train()(PIXELS)


def test_pixels_of_other_channels_in_training(model):
    with pytest.raises(ValueError, match="of 1 channels, and the mean and std to normalise them with of 3"):
        swinfast.optimize(model).train()(PIXELS[:, :1])


@pytest.mark.parametrize("training", [False, True])
def test_a_hook_that_makes_images_of_pixels(model, training):
    """It sees them as it would in the plain model."""

    def prepared(module, inputs):
        assert inputs[0].dtype == torch.uint8
        return inputs[0] / 255

    model.patch_embed.proj.register_forward_pre_hook(prepared)
    with torch.no_grad():
        assert relative_rms(swinfast.optimize(model).train(training)(PIXELS), model(PIXELS)) <= 2e-6


def test_a_method_that_makes_images_of_pixels(model):
    forward = model.patch_embed.proj.forward
    model.patch_embed.proj.forward = lambda images: forward(images / 255)
    with torch.no_grad():
        assert relative_rms(swinfast.optimize(model, inplace=True)(PIXELS), model(PIXELS)) <= 2e-6


def test_a_layer_that_is_wrapped(model):
    """What it does with images is its own affair."""

    class Wrapped(nn.Module):
        def __init__(self, proj):
            super().__init__()
            self.inner = proj

        def forward(self, images):
            return self.inner(images.float())

    model.patch_embed.proj = Wrapped(model.patch_embed.proj)
    half = FLOATS.half()
    with torch.no_grad():
        assert relative_rms(swinfast.optimize(model)(half), model(half)) <= 2e-6
