"""mlp_block where all weights fit into a multiprocessor's shared memory, for sm_90: see warpgroups.py.

Programs stay, with the weights, and go from block to block of rows. After its weights a program waits for nothing but
its own products, four warps by four, so that those of some go on during the GELU of others.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.language import debug_barrier
from triton.language import range as loop

from .configs import cdiv
from .tiles import gelu, hash_now
from .warpgroups import (
    RUN,
    SHARED,
    WIDTH,
    add_rows,
    all_begun,
    all_ended,
    begun,
    ended,
    held,
    layer_norm,
    load_rows,
    operand_layout,
    product,
    products,
    rows_layout,
    store_rows,
)

LARGEST_TILE = 128  # of CHUNK and WIDE


def fits(channels: int, hidden: int) -> bool:
    """Whether the kernel takes an MLP, of 16-bit numbers: whole tiles, and room for all weights as WIDE pads them."""
    padded = cdiv(channels, LARGEST_TILE) * LARGEST_TILE
    return channels % RUN == hidden % LARGEST_TILE == 0 and 2 * hidden * (channels + padded) <= SHARED


@gluon.jit(do_not_specialize=["rows"])
def mlp_kernel(
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
    C: gl.constexpr,
    HIDDEN: gl.constexpr,
    EXTRA_NORM: gl.constexpr,
    CHUNK: gl.constexpr = WIDTH,
    WIDE: gl.constexpr = WIDTH,
):
    """CHUNK: columns of the hidden layer at a time; WIDE: columns of one product by fc2, those past C being zero."""
    WARPS: gl.constexpr = gl.num_warps()
    BLOCK_M: gl.constexpr = 16 * WARPS
    layout: gl.constexpr = rows_layout(WARPS)
    fc1 = ()
    fc2 = ()
    for start in gl.static_range(0, HIDDEN, CHUNK):
        first = ()
        for i in gl.static_range(0, C, WIDTH):
            first = first + (held(fc1_weight, C, start, i, CHUNK),)
        second = ()
        for i in gl.static_range(0, C, WIDE):
            second = second + (held(fc2_weight, HIDDEN, i, start, WIDE, CHUNK, C - i),)
        fc1 = fc1 + (first,)
        fc2 = fc2 + (second,)
    fence_async_shared()
    debug_barrier()

    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    offsets = row[:, None] * C + column[None, :]
    # the compiler would find the places of all held tiles before the loop, which takes more registers than there are
    for block in loop(gl.program_id(0), gl.cdiv(rows, BLOCK_M), gl.num_programs(0), disable_licm=True):
        inside = (block * BLOCK_M + row < rows)[:, None]
        place = block.to(gl.int64) * (BLOCK_M * C)
        tiles = load_rows(x + place, offsets, inside, C // WIDTH)
        sums = _mlp(tiles, fc1, fc1_bias, fc2, fc2_bias, C, CHUNK, WIDE)
        y = add_rows(layer_norm(sums, norm_weight, norm_bias, eps, C), tiles)
        if EXTRA_NORM:
            y = layer_norm(y, extra_weight, extra_bias, extra_eps, C)
        store_rows(out + place, offsets, inside, y)


@gluon.jit
def _mlp(tiles, fc1, fc1_bias, fc2, fc2_bias, C: gl.constexpr, CHUNK: gl.constexpr, WIDE: gl.constexpr):
    """fc2(GELU(fc1 tiles)), in float32, in tiles of RUN columns."""
    sums = all_begun(fc2_bias, C, WIDE)
    read = ()  # by products that may still be under way
    for chunk in gl.static_range(len(fc1)):
        hidden = ended(product(tiles, fc1[chunk], begun(fc1_bias + chunk * CHUNK, CHUNK)), read)
        activated = gelu(hidden, False).to(tiles[0].dtype)
        activated = gl.convert_layout(activated, operand_layout(gl.num_warps(), WIDE), assert_trivial=True)
        sums = products(activated, fc2[chunk], sums)
        read = (activated,)
    return all_ended(sums, read, C // WIDTH)


hash_now(globals())
