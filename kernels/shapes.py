"""The launches that the stages of the published models make, recorded on meta tensors: nothing is computed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .launch import Launch, record
from .patch_embed import patch_embed
from .stages import Block, Linear, Merge, Norm, bias_table, forms_of, run_blocks, run_merge

VARIANTS = {"tiny": 96, "small": 96, "base": 128, "large": 192}  # channels of the first stage; depths change no shape
IMAGE_SIZES = (224, 256, 384)
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
HEAD_DIM = 32
BATCHES = (1, 2, 512)  # one image, few and many: tables choose by the number of rows
PADDED_VARIANT = "tiny"  # maps that are no whole number of windows: images of other sizes
PADDED_WINDOWS = (7, 12)  # windows of 8 by 8 tokens take as many slots as those of 7 by 7
IMAGES_OF_V2 = ((192, 12), (256, 16), (384, 24))  # with windows; those of 8 by 8 tokens are CR's, too
VARIANT_OF_V2 = "tiny"  # wider ones differ from this and from CR's by the number of heads alone


def launches(arch: str, precision: str, variants: Sequence[str] = tuple(VARIANTS)) -> list[Launch]:
    """What models of all image sizes launch on an architecture, in a precision of PRECISIONS; some more than once."""
    dtype = PRECISIONS[precision]
    with _float32_products("tf32" if precision == "tf32" else "ieee"), torch.no_grad(), record(arch) as recorded:
        # under autocast products are 16-bit and the residual stream, between them, is float32
        for stream in dict.fromkeys((torch.float32, dtype)):
            for channels in dict.fromkeys(VARIANTS[variant] for variant in variants):
                for batch in BATCHES:
                    _patch_embed(batch, channels, dtype, stream)
                    for window in (size // 32 for size in IMAGE_SIZES):
                        _stages(batch, channels, 8 * window, window, dtype, stream)
                        if channels == VARIANTS[PADDED_VARIANT] and window in PADDED_WINDOWS:
                            _stages(batch, channels, 8 * window, window, dtype, stream, padding=1)
                    for size, window in IMAGES_OF_V2 if channels == VARIANTS[VARIANT_OF_V2] else ():
                        _stages(batch, channels, size // 4, window, dtype, stream, v2=True)
        return recorded


@contextmanager
def _float32_products(setting: str) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm(channels: int, dtype: torch.dtype) -> Norm:
    return Norm(_empty(channels, dtype=dtype), _empty(channels, dtype=dtype), 1e-5)


def _linear(k: int, n: int, dtype: torch.dtype) -> Linear:
    return Linear(_empty(n, k, dtype=dtype), _empty(n, dtype=dtype))


def _patch_embed(batch: int, channels: int, dtype: torch.dtype, stream: torch.dtype) -> None:
    """From images in the model's dtype, in float32, and from uint8 as decoders give it: planes, and pixel by pixel."""
    weight, bias = _empty(channels, 3, 4, 4, dtype=dtype), _empty(channels, dtype=dtype)
    for images_dtype in (dtype, torch.float32, torch.uint8):
        scaled = images_dtype == torch.uint8
        scale = [_empty(3, dtype=torch.float32)] * 2 if scaled else [None, None]
        images = _empty(batch, 3, 224, 224, dtype=images_dtype)
        for layout in (images, images.contiguous(memory_format=torch.channels_last)) if scaled else (images,):
            patch_embed(layout, weight, bias, *_norm(channels, stream), *scale)


def _stages(
    batch: int,
    channels: int,
    map_size: int,
    window: int,
    dtype: torch.dtype,
    stream: torch.dtype,
    padding: int = 0,
    v2: bool = False,
) -> None:
    """Four stages of the CR family, or of V2; in each a block without shift, and one with a shift and, in CR, a second
    norm."""
    for stage in range(4):
        side = (map_size >> stage) + padding
        if stage:
            norm = _norm(2 * channels if v2 else 4 * channels, stream)
            merge = Merge(norm, _empty(2 * channels, 4 * channels, dtype=dtype), norm_last=v2)
            run_merge(merge, _empty(batch, 2 * side, 2 * side, channels, dtype=stream))
            channels *= 2
        x = _empty(batch, side, side, channels, dtype=stream)
        fitting = min(window, side)
        for shift, second_norm in ((0, False), (window // 2 if side > window else 0, not v2)):
            run_blocks([_block(channels, fitting, shift, second_norm, dtype, stream, v2)], x)


def _block(
    channels: int, window: int, shift: int, second_norm: bool, dtype: torch.dtype, stream: torch.dtype, v2: bool
) -> Block:
    heads, windows, shifts = channels // HEAD_DIM, (window, window), (shift, shift)
    forms = forms_of(channels, windows, dtype, torch.device("meta"))
    hidden, span = (512, windows) if v2 else (384, None)
    bias_mlp = *_linear(2, hidden, stream), *_linear(hidden, heads, stream)
    return Block(
        window_size=windows,
        shift_size=shifts,
        forms=forms,
        table=bias_table(forms, bias_mlp, HEAD_DIM, windows, shifts, dtype, span),
        logit_scale=_empty(heads, dtype=stream),
        qkv=_linear(channels, 3 * channels, dtype),
        proj=_linear(channels, channels, dtype),
        norm1=_norm(channels, stream),
        fc1=_linear(channels, 4 * channels, dtype),
        fc2=_linear(4 * channels, channels, dtype),
        norm2=_norm(channels, stream),
        norm3=_norm(channels, stream) if second_norm else None,
    )
