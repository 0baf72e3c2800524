"""mlp_parts: the MLP half of a block up to its norm, in parts: fc2(GELU(fc1 x)) is their sum.

    x [..., C], fc1 [hidden, C], fc2 [C, hidden], parts [..., parts, C] in float32; sums and GELU in float32

One program computes a chunk of the hidden layer for some rows, and then what that adds to the result, so the hidden
activations never leave it. norm_residual adds the parts up. Where rows are few, that is a launch less than linear and
linear, and as many programs as there are chunks; for more, mlp_block or linear, which write the result once.
Definition: reference.ops.mlp_parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv, config
from .launch import (
    arch_of,
    check_mlp,
    launch,
    operator,
    precision,
    precision_name,
)
from .tiles import begin, dot, gelu, in_each_row, load_transposed, store_part


@triton.jit(do_not_specialize=["rows"])
def _mlp_parts_kernel(
    x,  # [rows, C]
    fc1_weight,  # [HIDDEN, C]
    fc1_bias,  # [HIDDEN]
    fc2_weight,  # [C, HIDDEN]
    fc2_bias,  # [C]
    out,  # [rows, PARTS, C]
    rows,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    EXACT_GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAPPED: tl.constexpr = False,
):
    begin(OVERLAPPED)
    PARTS: tl.constexpr = (HIDDEN + BLOCK_HIDDEN - 1) // BLOCK_HIDDEN
    WHOLE: tl.constexpr = HIDDEN % BLOCK_HIDDEN == 0
    dtype: tl.constexpr = fc1_weight.dtype.element_ty
    part = tl.program_id(0) % PARTS
    row = tl.program_id(0) // PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    row = row.to(tl.int64)
    unit = part * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    hidden = in_each_row(fc1_bias, unit, HIDDEN, BLOCK_M, WHOLE)
    for start in range(0, C, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = inside[:, None]
        if C % BLOCK_K != 0:
            mask = mask & (k < C)[None, :]
        tile = tl.load(x + row[:, None] * C + k[None, :], mask=mask, other=0.0).to(dtype)
        hidden = dot(
            tile, load_transposed(fc1_weight, unit, k, HIDDEN, C, WHOLE and C % BLOCK_K == 0), hidden, PRECISION
        )
    activated = gelu(hidden, EXACT_GELU).to(dtype)
    rows_of_part = out + (row * PARTS + part) * C
    store_part(
        activated, fc2_weight, unit, fc2_bias, part == 0, rows_of_part, inside, C, HIDDEN, WHOLE, PRECISION, BLOCK_N
    )


@operator
def mlp_parts(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """What each chunk of the hidden layer adds to fc2(GELU(fc1 x)), the bias of fc2 with the first.

    Args:
        x: [..., C], float16, bfloat16 or float32, contiguous.
        fc1_weight, fc1_bias: [hidden, C], [hidden], of the dtype of x, or 16-bit where x is float32.
        fc2_weight, fc2_bias: [C, hidden], [C], of the dtype of fc1_weight.

    Returns:
        [..., parts, C] in float32; how many parts, the tables say.

    Raises:
        ValueError: A tensor of another shape, dtype or device, or not contiguous.
    """
    rows, hidden, channels = check_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    chosen = config(
        "mlp_parts",
        arch_of(x.device),
        precision_name(fc1_weight.dtype),
        channels=channels,
        stream_bytes=x.element_size(),  # not rows: there are as many parts in a graph for any number of them
    )
    parts = cdiv(hidden, chosen.blocks["BLOCK_HIDDEN"])
    out = torch.empty((*x.shape[:-1], parts, channels), dtype=torch.float32, device=x.device)
    launch(
        _mlp_parts_kernel,
        cdiv(rows, chosen.blocks["BLOCK_M"]) * parts,
        *(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, out, rows),
        C=channels,
        HIDDEN=hidden,
        EXACT_GELU=fc1_weight.dtype == torch.float32,
        PRECISION=precision(fc1_weight.dtype),
        config=chosen,
        **chosen.blocks,
    )
    return out
