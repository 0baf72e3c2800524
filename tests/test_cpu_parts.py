"""The PyTorch backend on a CPU: patches copied exactly, and batches in parts as in one piece."""

import pytest
import torch
from helpers import OPTIONS, SMALL, images_for, make, random_images, relative_rms

import swinfast
from swinfast import torch_backend


def tables(dtype):
    return torch_backend.PatchEmbedTables(dtype, dtype, traced=False, proj=None, norm=None)


def by_unfolding(images, height, width):
    """[B, H / height, W / width, C * height * width]."""
    patches = images.unfold(2, height, height).unfold(3, width, width)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3)


@pytest.mark.parametrize("patch", [(4, 4), (2, 2), (2, 4), (1, 4), (4, 1), (1, 8), (7, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_patches(dtype, patch):
    whole = random_images(2, 3, 56, 56, dtype=dtype)
    whole[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    offset = torch.cat([whole.new_zeros(1), whole.flatten()])[1:].view(whole.shape)  # contiguous, not aligned
    one_channel = whole[:, :1].clone().as_strided((2, 1, 56, 56), (56 * 56, 1, 56, 1))  # contiguous, of an odd stride
    one_image = whole[:1].clone().as_strided((1, 3, 56, 56), (1, 56 * 56, 56, 1))
    layouts = [whole, offset, one_channel, one_image, whole.contiguous(memory_format=torch.channels_last)]
    layouts += [whole[:, :, 3:, :-2], whole[:0]]
    for images in layouts:
        got = torch_backend._patches(images, patch, tables(dtype))
        expected = by_unfolding(images, *patch)
        assert got.dtype == dtype
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(got.signbit(), expected.signbit())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["square", "padded, odd grids", "window as large as the map", "extra norms"])
@pytest.mark.filterwarnings("ignore:float16 has no fast path")
def test_parts(timm, monkeypatch, name, dtype):
    """Of one image and of two, the last one smaller."""
    model = make(timm, OPTIONS[name], "timm").to(dtype)
    images = images_for(OPTIONS[name], batch=5).to(dtype)
    with torch.no_grad():
        whole = swinfast.optimize(model)(images)
        calls = []
        stage = torch_backend._stage
        monkeypatch.setattr(torch_backend, "_stage", lambda *args: calls.append(len(args[3])) or stage(*args))
        for part, sizes in ((1, [1] * 5), (2, [2, 2, 1])):
            numbers = model.patch_embed(images)[0].numel()
            monkeypatch.setattr(torch_backend, "CPU_PART", part * numbers)
            got = swinfast.optimize(model)(images)
            assert calls[: len(sizes)] == sizes
            calls.clear()
            assert relative_rms(got, whole) <= {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.05)


def test_patch_embed_in_parts(timm, monkeypatch):
    """Of uint8 images too, which are normalised part by part."""
    fast = swinfast.optimize(make(timm, SMALL | {"img_size": 64}, "timm"), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    floats = random_images(7, 3, 64, 64)
    pixels = (floats * 50 + 128).clamp(0, 255).to(torch.uint8)
    with torch.no_grad():
        whole = [fast.patch_embed(images) for images in (floats, pixels)]
        monkeypatch.setattr(torch_backend, "CPU_PART", whole[0][0].numel() // 2)  # two images at a time
        calls = []
        copy = torch_backend._patches
        monkeypatch.setattr(torch_backend, "_patches", lambda x, *args: calls.append(len(x)) or copy(x, *args))
        parts = [fast.patch_embed(images) for images in (floats, pixels)]
    assert calls == 2 * [2, 2, 2, 1]
    for got, expected in zip(parts, whole, strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype and got.stride() == expected.stride()
        assert relative_rms(got, expected) <= 1e-6


def test_another_default_device(timm):
    """Scratch memory lies where the images are, not where new tensors go by default."""
    fast = swinfast.optimize(make(timm, SMALL | {"img_size": 64}, "timm"))
    images = random_images(2, 3, 64, 64)
    with torch.no_grad():
        expected = fast(images)
        with torch.device("meta"):
            got = fast(images)
    assert torch.equal(got, expected)
