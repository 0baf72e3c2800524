"""What the operations of reference.ops promise, where whole models would not show it."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import random_images, relative_rms
from swinfast.reference import ops

CASES = [
    # map, window, shift
    ((8, 8), (4, 4), (2, 2)),
    ((8, 8), (4, 4), (0, 0)),
    ((9, 7), (4, 4), (2, 2)),
    ((12, 8), (3, 5), (1, 2)),
    ((4, 20), (4, 5), (0, 2)),
    ((20, 4), (5, 4), (2, 0)),
    ((4, 4), (4, 4), (2, 2)),
    ((3, 2), (7, 7), (3, 3)),
    ((16, 6), (2, 1), (1, 0)),
    ((5, 5), (1, 1), (0, 0)),
    ((14, 14), (7, 7), (3, 3)),
    ((15, 8), (7, 2), (3, 1)),
]


def case_id(value: tuple[int, int]) -> str:
    return f"{value[0]}x{value[1]}"


@pytest.fixture(scope="module")
def timm_block(timm):
    """Makes a block of timm's with exactly this window and shift."""

    def make(size, window, shift):
        block = timm.models.swin_transformer_v2_cr.SwinTransformerV2CrBlock(
            8, 2, size, window, shift_size=shift, always_partition=True
        )
        block.shift_size = shift
        return block

    return make


def test_window_masks_compile_on_a_cpu():
    """Code generation for a CPU has gaps of its own."""
    compiled = torch.compile(lambda: ops.window_masks((4, 4), (2, 2)).float() * -100)
    assert torch.equal(compiled(), ops.window_masks((4, 4), (2, 2)).float() * -100)


@pytest.mark.parametrize("size, window, shift", CASES, ids=case_id)
def test_window_masks(timm_block, size, window, shift):
    padded = torch.zeros(1, *(-(-s // w) * w for s, w in zip(size, window, strict=True)), 8)
    grid = tuple(s // w for s, w in zip(padded.shape[1:3], window, strict=True))
    expected = timm_block(size, window, shift).get_attn_mask(padded)
    masks = ops.window_masks(window, shift)
    assert masks.dtype == torch.bool
    assert masks.shape == (4, math.prod(window), math.prod(window))
    got = masks[ops.window_types(grid)] * ops.MASK_VALUE
    assert torch.equal(got, torch.zeros_like(got) if expected is None else expected)


@pytest.mark.parametrize(
    "grid, expected",
    [((1, 1), [3]), ((2, 1), [2, 3]), ((1, 2), [1, 3]), ((3, 2), [0, 2, 0, 2, 1, 3]), ((2, 3), [0, 0, 2, 1, 1, 3])],
    ids=["1x1", "2x1", "1x2", "3x2", "2x3"],
)
def test_window_types(grid, expected):
    assert ops.window_types(grid).tolist() == expected


def test_log_relative_offsets():
    offsets = ops.log_relative_offsets((2, 3))
    assert offsets.shape == (6, 6, 2)
    # from token 5 at (1, 2) to token 0 at (0, 0), and back
    assert offsets[5, 0].tolist() == pytest.approx([math.log(2), math.log(3)])
    assert offsets[0, 5].tolist() == pytest.approx([-math.log(2), -math.log(3)])
    assert offsets[4, 4].tolist() == [0, 0]


@pytest.mark.parametrize("size, window, shift", CASES, ids=case_id)
def test_window_attention_is_timms(timm_block, size, window, shift):
    """On its own, with timm's module between timm's own roll, pad, partition and mask."""
    block = timm_block(size, window, shift).eval()
    block.dynamic_mask = True
    attn = block.attn
    with torch.no_grad():
        for seed, parameter in enumerate(attn.parameters()):
            parameter.copy_(random_images(*parameter.shape, seed=seed))
        attn.logit_scale.copy_(torch.tensor([2.0, 9.0]))
        attn.proj.weight.copy_(torch.eye(8))
        attn.proj.bias.zero_()
        x = random_images(2, *size, 8)
        expected = block._shifted_window_attn(x)
        mlp = attn.meta_mlp
        bias = ops.cpb_bias(mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, window, shift)
        qkv = attn.qkv(x)
        got = ops.window_attention(qkv, attn.qkv.bias, attn.logit_scale, bias, window, shift)
    assert relative_rms(got, expected) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_zero_queries_and_keys_give_no_nan(dtype):
    """A zero row has no direction: its cosines are zero, not 0 / 0, in fp16 too, where the eps would round to 0."""
    value = random_images(1, 4, 4, 8, dtype=dtype)
    qkv = torch.cat([torch.zeros(1, 4, 4, 16, dtype=dtype), value], dim=-1)
    bias = torch.zeros(4, 2, 4, 4, dtype=dtype)
    out = ops.window_attention(qkv, torch.zeros(24, dtype=dtype), torch.full((2,), 4.0, dtype=dtype), bias, (2, 2))
    assert out.dtype == dtype
    mean = value.unflatten(2, (2, 2)).unflatten(1, (2, 2)).mean((2, 4), keepdim=True).expand(1, 2, 2, 2, 2, 8)
    assert relative_rms(out, mean.reshape(1, 4, 4, 8)) <= 4 * torch.finfo(dtype).eps


def test_tiny_queries_and_keys_keep_their_direction_in_float16():
    """Their squares underflow in fp16: the lengths are taken in fp32."""
    direction = random_images(1, 2, 2, 24, seed=3)
    direction[..., :16] = direction[..., :16] * 1e-4
    bias, scale = torch.zeros(4, 1, 4, 4), torch.full((1,), 2.0)
    half = direction.half()
    got = ops.window_attention(half, torch.zeros(24).half(), scale.half(), bias.half(), (2, 2))
    expected = ops.window_attention(half.float(), torch.zeros(24), scale, bias, (2, 2))
    assert relative_rms(got, expected) <= 2e-3


def test_padding_is_an_ordinary_key():
    """A padded token's qkv is the projection's bias, and tokens attend to it."""
    qkv, qkv_bias = random_images(1, 3, 3, 24), random_images(24, seed=1)
    bias, scale = random_images(4, 2, 16, 16, seed=2), torch.tensor([1.0, 2.0])
    padded = qkv_bias.expand(1, 4, 4, 24).clone()
    padded[:, :3, :3] = qkv
    expected = ops.window_attention(padded, qkv_bias, scale, bias, (4, 4))[:, :3, :3]
    got = ops.window_attention(qkv, qkv_bias, scale, bias, (4, 4))
    assert torch.equal(got, expected)
    assert relative_rms(ops.window_attention(qkv, torch.zeros(24), scale, bias, (4, 4)), expected) > 0.01


def test_logit_scale_is_clamped():
    qkv, bias = random_images(1, 2, 2, 24), torch.zeros(4, 1, 4, 4)
    at, above, below = (
        ops.window_attention(qkv, torch.zeros(24), torch.tensor([math.log(scale)]), bias, (2, 2))
        for scale in (100.0, 250.0, 20.0)
    )
    assert torch.equal(above, at)
    assert relative_rms(below, at) > 0.01


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (4, 7), (3, 3), (1, 1)], ids=case_id)
def test_patch_merging_is_timms(timm, size):
    merging = timm.models.swin_transformer_v2_cr.PatchMerging(8)
    x = random_images(2, *size, 8)
    with torch.no_grad():
        merging.norm.weight.copy_(1 + random_images(32) / 3)
        merging.norm.bias.copy_(random_images(32, seed=1))
        norm = (merging.norm.weight, merging.norm.bias, merging.norm.eps)
        assert relative_rms(ops.patch_merging(x, norm, merging.reduction.weight), merging(x)) <= 1e-6


def test_partition_and_reverse_are_inverse():
    x = random_images(2, 6, 20, 3)
    windows = ops.window_partition(x, (3, 5))
    assert windows.shape == (2, 8, 15, 3)
    assert torch.equal(windows[1, 5], x[1, 3:6, 5:10].reshape(15, 3))
    assert torch.equal(ops.window_reverse(windows, (3, 5), (2, 4)), x)


def test_linear_and_its_gelu():
    x, weight, bias = random_images(5, 4), random_images(3, 4, seed=1), random_images(3, seed=2)
    expected = x @ weight.T + bias
    assert relative_rms(ops.linear(x, weight, bias), expected) <= 1e-6
    assert relative_rms(ops.linear(x, weight, None), expected - bias) <= 1e-6
    exact = 0.5 * expected * (1 + torch.erf(expected / math.sqrt(2)))
    assert relative_rms(ops.linear(x, weight, bias, gelu=True), exact) <= 1e-6


def test_norm_residual_and_its_extra_norm():
    x, residual = random_images(5, 8), random_images(5, 8, seed=1)
    norm = (random_images(8, seed=2), random_images(8, seed=3), 1e-5)
    extra = (random_images(8, seed=4), random_images(8, seed=5), 0.5)
    expected = residual + F.layer_norm(x, (8,), *norm)
    assert relative_rms(ops.norm_residual(x, norm, residual), expected) <= 1e-6
    got = ops.norm_residual(x, norm, residual, extra)
    assert relative_rms(got, F.layer_norm(expected, (8,), *extra)) <= 1e-6


def test_patch_embed_cuts_off_what_is_no_whole_patch():
    weight, bias = random_images(8, 3, 4, 2), random_images(8, seed=1)
    images = random_images(2, 3, 11, 9, seed=2)
    norm = (random_images(8, seed=3), random_images(8, seed=4), 1e-5)
    out = ops.patch_embed(images, weight, bias, None)
    assert out.shape == (2, 2, 4, 8)
    patch = (images[1, :, 4:8, 6:8] * weight).sum((1, 2, 3)) + bias
    assert relative_rms(out[1, 1, 3], patch) <= 1e-6
    assert relative_rms(ops.patch_embed(images, weight, bias, norm), F.layer_norm(out, (8,), *norm)) <= 1e-6
