"""The same promises on an NVIDIA GPU: `pytest -m gpu`. Skipped where there is none."""

import threading

import pytest
import torch
from helpers import random_images, randomise, relative_rms, small_model_args
from swinfast.kernels.linear import linear
from swinfast.kernels.window_attention import padded_size, window_attention

import swinfast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "whole windows": {},
    "padded": {"img_size": 60, "window_size": 7},
    "odd grid, any size": {"img_size": 66, "window_size": 3, "dynamic_img_size": True},
    "extra norms": {"extra_norm_stage": True},
}


def make(timm, **overrides):
    model = randomise(timm.create_model("swinv2_cr_tiny_224", **small_model_args(**overrides))).eval().cuda()
    size = model.img_size
    return model, random_images(4, 3, *size).cuda()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(timm, name, dtype):
    model, images = make(timm, **OPTIONS[name])
    outcome = swinfast.verify(model, swinfast.optimize(model, dtype=dtype), images)
    assert outcome.passed, outcome


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_size(timm, dtype):
    model = randomise(timm.create_model("swinv2_cr_tiny_ns_224")).eval().cuda()
    outcome = swinfast.verify(model, swinfast.optimize(model, dtype=dtype), random_images(4, 3, 224, 224).cuda())
    assert outcome.passed, outcome


def test_moving_between_devices(timm):
    model, images = make(timm)
    fast = swinfast.optimize(model)
    with torch.no_grad():
        expected = fast(images)
        assert relative_rms(fast.cpu()(images.cpu()), expected) <= 1e-4
        assert torch.equal(fast.cuda()(images), expected)


def test_edits_and_gradients(timm):
    model, images = (either.double() for either in make(timm))
    fast = swinfast.optimize(model)
    fast(images)
    gradients = []
    for either in (model, fast):
        with torch.no_grad():
            either.stages[1].blocks[1].attn.logit_scale.sub_(0.4)
        gradients.append(torch.autograd.grad(either(images).square().sum(), list(either.parameters())))
    scale = max(gradient.norm() for gradient in gradients[0])
    assert all((got - expected).norm() <= 1e-8 * scale for expected, got in zip(*gradients, strict=True))


def test_streams_and_threads(timm):
    model, images = make(timm)
    fast = swinfast.optimize(model)
    with torch.no_grad():
        expected = fast(images)
    outputs = [None] * 4

    def work(index):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                outputs[index] = fast(images)
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(outputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(relative_rms(output, expected) <= 1e-5 for output in outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(timm, dtype):
    model, images = make(timm)
    fast = swinfast.optimize(model)
    with torch.no_grad():
        exact = model.double()(images.double())
        with torch.autocast("cuda", dtype):
            plain, got = model.float()(images), fast(images)
    assert got.dtype == plain.dtype
    assert relative_rms(got, exact) <= 2 * relative_rms(plain, exact)


def test_uint8_images(timm):
    model, _ = make(timm)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, device="cuda")
    mean, std = (torch.tensor(model.pretrained_cfg[key], device="cuda")[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        assert relative_rms(swinfast.optimize(model)(pixels), model((pixels / 255 - mean) / std)) <= 1e-4


def test_compile(timm):
    model, images = make(timm)
    compiled = torch.compile(swinfast.optimize(model), fullgraph=True)
    with torch.no_grad():
        assert relative_rms(compiled(images), model(images)) <= 1e-4


def test_offsets_beyond_32_bits():
    """The last image of a batch whose qkv has more than 2^31 elements has the answer that it has alone."""
    count = 2**31 // (56 * 56 * 288) + 2
    size = {"dtype": torch.float16, "device": "cuda"}
    qkv = torch.zeros(count, 56, 56, 288, **size)
    qkv[-1] = torch.randn(56, 56, 288, **size)
    bias, logit_scale = torch.randn(288, **size), torch.ones(3, **size)
    padded = padded_size(qkv.device, qkv.dtype, (7, 7), 32)
    table = torch.randn(4, 3, *padded, **size)
    with torch.no_grad():
        got = window_attention(qkv, bias, logit_scale, table, [7, 7], [3, 3])
        alone = window_attention(qkv[-1:].clone(), bias, logit_scale, table, [7, 7], [3, 3])
        assert torch.equal(got[-1:], alone)
        weight = torch.randn(32, 288, **size)
        assert relative_rms(linear(qkv, weight, None)[-1:], linear(qkv[-1:].clone(), weight, None)) <= 1e-3
