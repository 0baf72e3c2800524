"""patch_embed: images of any strides and dtype to embedded patches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import (
    DEVICE,
    DTYPES,
    Draw,
    assert_empty_batch,
    assert_fails,
    assert_images_apart,
    assert_operator,
    assert_refuses,
    assert_refuses_tensors,
    assert_repeatable,
    blocks,
    check,
    check_mixed,
    each_dtype,
    few_examples,
    mutant,
    odd_dtypes,
)
from swinfast.kernels import patch_embed as module
from swinfast.kernels import tiles
from swinfast.reference import ops

CASES = {  # shape of images, patch, channels, bias, norm
    "tiny": ((2, 3, 16, 20), (4, 4), 96, True, True),
    "no norm": ((1, 3, 12, 8), (4, 4), 44, True, False),
    "no bias": ((2, 1, 6, 10), (2, 2), 32, False, True),
    "not square, left over": ((3, 3, 11, 9), (3, 2), 20, True, True),
    "wide": ((1, 3, 4, 12), (4, 4), 352, True, True),
    "one pixel": ((1, 1, 1, 1), (1, 1), 2, True, True),
}


def arguments(shape, patch, channels, bias, norm, dtype=torch.float32, pixels=False):
    draw, area = Draw(dtype), math.prod(patch)
    weights = draw.linear(shape[1] * area, channels)
    args = {
        "images": draw(*shape),
        "weight": weights["weight"].view(channels, shape[1], *patch),
        "bias": weights["bias"] if bias else None,
    }
    args |= draw.norm(channels) if norm else {"norm_weight": None, "norm_bias": None, "eps": 1e-5}
    if pixels:
        as_bytes = (args["images"].float() * 64 + 128).clamp(0, 255).to(torch.uint8)
        scale = {
            name: Draw(torch.float32)(shape[1], mean=mean, std=0.1) for name, mean in (("scale", 1), ("shift", -2))
        }
        args |= {"images": as_bytes, "scale": scale["scale"] / 64, "shift": scale["shift"]}
    return args


def reference(images, weight, bias, norm_weight, norm_bias, eps, scale=None, shift=None):
    if scale is not None:
        images = images.to(scale.dtype) * scale[:, None, None] + shift[:, None, None]
    norm = None if norm_weight is None else (norm_weight, norm_bias, eps)
    return ops.patch_embed(images.to(weight.dtype), weight, bias, norm)


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype):
    check(module.patch_embed, reference, arguments(*CASES[name], dtype), dtype)


@st.composite
def cases(draw):
    patch = draw(st.tuples(*[st.integers(1, 5)] * 2))
    size = (extent * draw(st.integers(1, 4)) + draw(st.integers(0, extent - 1)) for extent in patch)
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 5)), *size)
    return shape, patch, draw(st.integers(4, 150)), draw(st.booleans()), draw(st.booleans())


@few_examples
@given(cases(), odd_dtypes, st.booleans())
def test_odd_shapes(case, dtype, pixels):
    check(module.patch_embed, reference, arguments(*case, dtype, pixels), dtype)


STRIDES = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "crop": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 0))[:, :, 1:, 3:-2],
    "every other column": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}


@pytest.mark.parametrize("pixels", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("layout", STRIDES)
def test_strides(layout, pixels):
    args = arguments(*CASES["not square, left over"], pixels=pixels)
    images = STRIDES[layout](args["images"])
    assert not images.is_contiguous()
    check(module.patch_embed, reference, args | {"images": images}, torch.float32)


@each_dtype
@pytest.mark.parametrize("name", ["tiny", "not square, left over"])
def test_uint8_images(name, dtype):
    check(module.patch_embed, reference, arguments(*CASES[name], dtype, pixels=True), dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_other_dtypes_of_images_and_norm(dtype):
    args = arguments(*CASES["tiny"], dtype)
    images = Draw(torch.float32)(*args["images"].shape)
    check(module.patch_embed, reference, args | {"images": images}, dtype)
    vectors = {name: args[name].float() for name in ("norm_weight", "norm_bias")}
    check_mixed(module.patch_embed, reference, args | vectors, dtype)


def test_into_a_tensor_that_is_there():
    args = arguments(*CASES["tiny"])
    args = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in args.items()}
    expected = module.patch_embed(**args)
    out = torch.full_like(expected, torch.nan)
    assert module.patch_embed_into(out, **args) is out
    assert torch.equal(out, expected)
    for other, message in (
        (out[:1], r"^out must have shape \[2, 4, 5, 96\], got \[1, 4, 5, 96\]$"),
        (out.half(), "^out must be torch.float32 as the other arguments, got torch.float16$"),
        (out.mT.contiguous().mT, "^out must be contiguous, got strides"),
    ):
        with pytest.raises(ValueError, match=message):
            module.patch_embed_into(other, **args)


@each_dtype
@pytest.mark.filterwarnings("ignore:overflow")
def test_extremes(dtype):
    args = arguments((2, 3, 8, 8), (4, 4), 44, True, False, dtype)
    args["images"][0, :, :4] = 0
    args["images"][0, :, 4:] = 6e4 * args["images"][0, :, 4:].sign()  # some sums overflow float16
    check(module.patch_embed, reference, args, dtype)


def test_runs_and_images_are_independent():
    args = arguments((3, 3, 11, 9), (3, 2), 20, True, True)
    assert_repeatable(module.patch_embed, args)
    assert_images_apart(module.patch_embed, args, "images")
    assert_empty_batch(module.patch_embed, args, "images")


@st.composite
def maps(draw):
    """Strides of images, and the width of patches."""
    sizes = [draw(st.integers(1, 40)) for _ in range(4)]
    order = draw(st.permutations(range(4)))
    strides, step = [0] * 4, draw(st.sampled_from([1, 1, 2]))
    for axis in order:
        strides[axis] = step
        step *= sizes[axis]
    return tuple(strides), draw(st.integers(1, 20))


@settings(derandomize=True, database=None, max_examples=300)
@given(maps())
def test_side_by_side(case):
    """A run never begins where it would not be aligned, and its pixels are neighbours."""
    strides, patch_w = case
    run = module.side_by_side(strides, patch_w)
    assert patch_w % run == 0 and run in (1, 2, 4, 8, 16)
    if run > 1:
        assert strides[3] == 1
        assert all(stride % run == 0 for stride in strides[:3])


def test_most_pixels_are_side_by_side():
    assert module.side_by_side((3 * 224 * 224, 224 * 224, 224, 1), 4) == 4
    assert module.side_by_side((3 * 224 * 224, 224 * 224, 224, 1), 32) == 16
    assert module.side_by_side((3 * 222 * 222, 222 * 222, 222, 1), 4) == 1
    assert module.side_by_side((3 * 224 * 224, 1, 3 * 224, 3), 4) == 1  # channels last


@pytest.mark.parametrize("pixels", [False, True], ids=["float", "uint8"])
def test_operator(pixels):
    args = arguments((2, 3, 8, 10), (4, 2), 24, True, True, torch.bfloat16, pixels)
    assert_operator(module.patch_embed, args, ["images"], keep=["scale", "shift"])


def test_errors():
    op, args = module.patch_embed, arguments((2, 3, 8, 10), (4, 2), 24, True, True, pixels=True)
    assert_refuses_tensors(op, args, "bias", "norm_weight", "norm_bias")
    images, weight = args["images"], args["weight"]
    assert_refuses(op, args, r"^images must have shape \[B, 3, H, W\], got \[2, 1, 8, 10\]", images=images[:, :1])
    assert_refuses(op, args, r"^images must have shape \[B, 3, H, W\], got \[3, 8, 10\]", images=images[0])
    for wrong, got in ((images.long(), "torch.int64"), (images.to("meta"), "torch.uint8 on meta")):
        assert_refuses(op, args, f"^images must be float16, bfloat16, float32 or uint8 on .*, got {got}", images=wrong)
    assert_refuses(op, args, "^weight must be contiguous, got strides", weight=weight.mT.contiguous().mT)
    assert_refuses(op, args, r"^weight must have shape .*, got \[24, 24\]", weight=weight.flatten(1))
    for name in ("scale", "shift"):
        for wrong in (args[name].double(), args[name][:2]):
            assert_refuses(op, args, rf"^{name} must be float32 \[3\], got torch.float", **{name: wrong})
    for name in ("norm_weight", "norm_bias", "scale", "shift"):
        assert_refuses(op, args, "^norm_weight and norm_bias, and scale and shift, must be given", **{name: None})


# fmt: off
MUTANTS = {
    "row and column strides swapped": ("tiny", module, "(k // PATCH_W % PATCH_H).to(tl.int64) * row_stride",
        "(k // PATCH_W % PATCH_H).to(tl.int64) * column_stride", "(k % PATCH_W).to(tl.int64) * column_stride",
        "(k % PATCH_W).to(tl.int64) * row_stride"),
    "rows and columns of patches swapped": ("tiny", module, "patch_column = row % patches_w",
        "patch_column = row % patches_h", "(row // patches_w) % patches_h", "(row // patches_h) % patches_w"),
    "one channel of three": ("tiny", module, "channel.to(tl.int64) * channel_stride", "channel.to(tl.int64) * 0"),
    "the first image alone": ("tiny", module, "image.to(tl.int64) * image_stride", "image.to(tl.int64) * 0"),
    "K tail not masked": ("not square, left over", module, "if K % BLOCK_K != 0:", "if False:"),
    "edges of W not masked": ("not square, left over", tiles, "if WHOLE:", "if True:"),
    "rows not masked": ("not square, left over", module, "inside = row < rows", "inside = row < rows + 1"),
    "left over rows taken":
        ("not square, left over", module, "images.shape[2] // patch_h", "-(-images.shape[2] // patch_h)"),
    "no bias": ("no norm", module, "if HAS_BIAS else", "if False else"),
    "no norm": ("tiny", module, "if NORM:", "if False:"),
    "another eps": ("tiny", tiles, "squares / C + eps", "squares / C + 1e-5"),
    "no scale and shift": ("uint8", module, "if SCALED:", "if False:"),
    "no shift": ("uint8", module, " + offset[None, :]", ""),
    "no scale": ("uint8", module, " * factor[None, :]", ""),
    "scale of the first channel": ("uint8", module, "scale + channel", "scale + channel * 0"),
}
# fmt: on


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    case, *change = MUTANTS[name]
    args = arguments(*CASES["tiny" if case == "uint8" else case], pixels=case == "uint8")
    with blocks(BLOCK_M=32, BLOCK_K=16):
        assert_fails(mutant(tmp_path, module, *change).patch_embed, reference, args)
