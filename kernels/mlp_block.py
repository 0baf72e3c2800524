"""mlp_block: y = x + LN(fc2(GELU(fc1 x))), then a second LayerNorm on the sum where a block has one.

    x and y [rows, C], fc1 [hidden, C], fc2 [C, hidden]; sums, GELU and norms in float32.

One program keeps whole rows of the result and goes through the hidden layer in chunks, so the hidden activations never
leave it. That is for few channels; for more, linear, linear and norm_residual.
Where the tables say so, it is mlp_warpgroups that computes it.
Definition: reference.ops.mlp_block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import at_most, cdiv, config, row_tiles
from .launch import (
    arch_of,
    check_mlp,
    check_pair,
    check_vectors,
    launch,
    operator,
    persistent,
    precision,
    precision_name,
)
from .mlp_warpgroups import fits, mlp_kernel
from .tiles import (
    add_rows,
    begin,
    dot,
    gelu,
    in_each_row,
    layer_norm,
    load_rows,
    load_transposed,
    store_rows,
    vector_rows,
)
from .warpgroups import has_warpgroups


@triton.jit
def _fc1_weights(
    weight, start, C: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """The rows of fc1's weights for the hidden layer's chunk from start on, transposed."""
    unit = start + tl.arange(0, BLOCK_HIDDEN)
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles = tiles + (load_transposed(weight, unit, tl.arange(0, TILE) + i * TILE, HIDDEN, C, WHOLE),)
    return tiles


@triton.jit
def _fc2_weights(
    weight, start, C: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """The columns of fc2's weights for the hidden layer's chunk from start on, transposed."""
    unit = start + tl.arange(0, BLOCK_HIDDEN)
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles = tiles + (load_transposed(weight, tl.arange(0, TILE) + i * TILE, unit, C, HIDDEN, WHOLE),)
    return tiles


@triton.jit
def _fc1(
    tiles, weight, bias, start,
    C: tl.constexpr, HIDDEN: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
    BIAS_FIRST: tl.constexpr,
):  # fmt: skip
    """The hidden layer's chunk from start on, before its GELU."""
    unit = start + tl.arange(0, BLOCK_HIDDEN)
    added = in_each_row(bias, unit, HIDDEN, tiles[0].shape[0], WHOLE)
    hidden = added if BIAS_FIRST else tl.zeros_like(added)
    # all tiles of it first, so that before a loop one wait is for them all
    w = _fc1_weights(weight, start, C, HIDDEN, tiles[0].shape[1], len(tiles), WHOLE, BLOCK_HIDDEN)
    for i in tl.static_range(len(tiles)):
        hidden = dot(tiles[i].to(w[i].dtype), w[i], hidden, PRECISION)
    return hidden if BIAS_FIRST else hidden + added


@triton.jit
def _fc2(
    acc, activated, weight, start,
    C: tl.constexpr, HIDDEN: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, IN_LOOP: tl.constexpr,
):  # fmt: skip
    """acc and what the hidden layer's chunk from start on, after its GELU, adds to it."""
    unit = start + tl.arange(0, activated.shape[1])
    activated = activated.to(weight.dtype.element_ty)
    w = ()
    if not IN_LOOP:  # as in fc1; in the loop, where weights are asked for a turn before, that would take registers
        w = _fc2_weights(weight, start, C, HIDDEN, acc[0].shape[1], len(acc), WHOLE, activated.shape[1])
    summed = ()
    for i in tl.static_range(len(acc)):
        column = i * acc[i].shape[1] + tl.arange(0, acc[i].shape[1])
        tile = w[i] if len(w) else load_transposed(weight, column, unit, C, HIDDEN, WHOLE)
        summed = summed + (dot(activated, tile, acc[i], PRECISION),)
    return summed


@triton.jit(do_not_specialize=["rows"])
def _mlp_block_kernel(
    x,  # [rows, C]
    fc1_weight,  # [HIDDEN, C]
    fc1_bias,  # [HIDDEN]
    fc2_weight,  # [C, HIDDEN]
    fc2_bias,  # [C]
    norm_weight,  # [C]
    norm_bias,  # [C]
    extra_weight,  # [C]
    extra_bias,  # [C]
    out,  # [rows, C]
    rows,
    eps,
    extra_eps,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    COUNT: tl.constexpr,
    EXTRA_NORM: tl.constexpr,
    EXACT_GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    AHEAD: tl.constexpr = 0,
    OVERLAPPED: tl.constexpr = False,
):
    """AHEAD: by how many chunks fc1 is ahead of fc2, 0 or 2.

    With 2, a chunk gets its GELU while the tensor cores multiply the chunk before it by fc2, and that after it by fc1.
    That takes the registers of one more chunk.
    """
    begin(OVERLAPPED)
    COVER: tl.constexpr = (HIDDEN + BLOCK_HIDDEN - 1) // BLOCK_HIDDEN
    END: tl.constexpr = (COVER if COVER > AHEAD else AHEAD) * BLOCK_HIDDEN  # what is past HIDDEN adds zeros
    WHOLE: tl.constexpr = TILE * COUNT == C and HIDDEN == END
    # Products begin with the bias, which saves an addition. Not so where they go on during a GELU: the compiler would
    # then wait for each of them.
    BIAS_FIRST: tl.constexpr = AHEAD == 0
    first = tl.program_id(0) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    inside = first + row < rows
    first = first.to(tl.int64) * C  # the one 64-bit number, for all rows
    tiles = load_rows(x + first + row * C, inside, C, TILE, COUNT)
    acc = vector_rows(fc2_bias, BLOCK_M, C, TILE, COUNT)
    if AHEAD == 0:
        for start in range(0, END, BLOCK_HIDDEN):
            hidden = _fc1(tiles, fc1_weight, fc1_bias, start, C, HIDDEN, WHOLE, PRECISION, BLOCK_HIDDEN, BIAS_FIRST)
            activated = gelu(hidden, EXACT_GELU)
            acc = _fc2(acc, activated, fc2_weight, start, C, HIDDEN, WHOLE, PRECISION, True)
    else:
        hidden = _fc1(tiles, fc1_weight, fc1_bias, 0, C, HIDDEN, WHOLE, PRECISION, BLOCK_HIDDEN, BIAS_FIRST)
        activated = gelu(hidden, EXACT_GELU)
        hidden = _fc1(tiles, fc1_weight, fc1_bias, BLOCK_HIDDEN, C, HIDDEN, WHOLE, PRECISION, BLOCK_HIDDEN, BIAS_FIRST)
        for start in range(2 * BLOCK_HIDDEN, END, BLOCK_HIDDEN):
            following = _fc1(tiles, fc1_weight, fc1_bias, start, C, HIDDEN, WHOLE, PRECISION, BLOCK_HIDDEN, BIAS_FIRST)
            acc = _fc2(acc, activated, fc2_weight, start - 2 * BLOCK_HIDDEN, C, HIDDEN, WHOLE, PRECISION, True)
            activated = gelu(hidden, EXACT_GELU)
            hidden = following
        acc = _fc2(acc, activated, fc2_weight, END - 2 * BLOCK_HIDDEN, C, HIDDEN, WHOLE, PRECISION, False)
        activated = gelu(hidden, EXACT_GELU)
        acc = _fc2(acc, activated, fc2_weight, END - BLOCK_HIDDEN, C, HIDDEN, WHOLE, PRECISION, False)
    acc = layer_norm(acc, norm_weight, norm_bias, eps, C, TILE, COUNT)
    tiles = load_rows(x + first + row * C, inside, C, TILE, COUNT, AGAIN=True)
    acc = add_rows(acc, tiles, COUNT)
    if EXTRA_NORM:
        acc = layer_norm(acc, extra_weight, extra_bias, extra_eps, C, TILE, COUNT)
    store_rows(out + first + row * C, acc, inside, C, TILE, COUNT)


@operator
def mlp_block(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    extra_weight: Tensor | None = None,
    extra_bias: Tensor | None = None,
    extra_eps: float = 1e-5,
) -> Tensor:
    """x + LN(fc2(GELU(fc1 x))), then a second LayerNorm on the sum where extra_weight is given.

    Args:
        x: [..., C], float16, bfloat16 or float32, contiguous.
        fc1_weight, fc1_bias: [hidden, C], [hidden], of the dtype of x, or 16-bit where x is float32.
        fc2_weight, fc2_bias: [C, hidden], [C], of the dtype of fc1_weight.
        norm_weight, norm_bias, eps: LayerNorm over C.
        extra_weight, extra_bias, extra_eps: Of the second LayerNorm.

    Returns:
        [..., C] in the dtype of x.

    Raises:
        ValueError: A tensor of another shape, dtype or device, or not contiguous.
    """
    rows, hidden, channels = check_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    check_vectors(channels, x, norm_weight=norm_weight, norm_bias=norm_bias)
    has_extra = check_pair(channels, x, extra_weight=extra_weight, extra_bias=extra_bias)
    out = torch.empty_like(x)
    chosen = config(
        "mlp_block",
        arch_of(x.device),
        precision_name(fc1_weight.dtype),
        channels=channels,
        stream_bytes=x.element_size(),
        rows=at_most(rows),
        held=int(fits(channels, hidden) and has_warpgroups(x.device, x, fc1_weight)),
    )
    arguments = (
        *(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias),
        *((extra_weight, extra_bias) if has_extra else (norm_weight, norm_bias)),
        *(out, rows, eps, extra_eps),
    )
    sizes = {"C": channels, "HIDDEN": hidden, "EXTRA_NORM": has_extra}
    if chosen.blocks.get("use") == "warpgroups":
        programs = persistent(cdiv(rows, 16 * chosen.num_warps), x.device)
        launch(mlp_kernel, programs, *arguments, config=chosen, **sizes | chosen.sizes)
        return out
    launch(
        _mlp_block_kernel,
        cdiv(rows, chosen.blocks["BLOCK_M"]),
        *arguments,
        EXACT_GELU=fc1_weight.dtype == torch.float32,
        PRECISION=precision(fc1_weight.dtype),
        config=chosen,
        **sizes | chosen.blocks | row_tiles(chosen, channels),
    )
    return out
