"""Pieces of kernels for the products of sm_90's warpgroups, in Gluon: Triton's language that spells out layouts.

Four warps multiply 64 rows, which lie in their registers, by tiles in shared memory, and go on before the product is
there. Triton waits for each product of a sum, and takes its rows through shared memory; here nothing waits but what
needs a result, and between loading a row and storing it no number changes its thread.

For that, channels have other names here. Of a row, products leave each thread two neighbours in each eight columns, and
memory wants eight neighbours in one thread: so column 8 j + 2 q + b of a tile of 32 is channel 8 q + 2 j + b. Weights
get these names on their way into shared memory, where they stay; vectors, rows and results by what a thread calls its
registers.
"""

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from .launch import INTERPRETED, arch_of
from .tiles import centred, hash_now

RUN = 32  # channels in a tile, of which a thread has 8 in each of two rows
WIDTH = gl.constexpr(RUN)
SHARED = 227 << 10  # bytes that a multiprocessor has for all of its programs


def has_warpgroups(device: torch.device, *tensors: Tensor) -> bool:
    """Whether kernels in Gluon run for tensors on a device: all of them of the same 16-bit dtype."""
    dtypes = {tensor.dtype for tensor in tensors}
    return arch_of(device) == "sm_90" and not INTERPRETED and len(dtypes) == 1 and dtypes != {torch.float32}


@gluon.constexpr_function
def rows_layout(warps: int, columns: int = RUN) -> Any:
    """Of 16 rows of channels a warp, as they come from memory: by name, each thread's numbers are a product's."""
    bits = {4: 2, 8: 3, 16: 4}[warps]
    within = [[0, 1], [0, 2], [0, 4], [8, 0], *([0, run] for run in (32, 64, 128) if run < columns)]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(within, lanes, [[16 << bit, 0] for bit in range(bits)], [], [16 * warps, columns])


@gluon.constexpr_function
def sums_layout(warps: int, columns: int = RUN) -> Any:
    """Of a product with 16 rows a warp."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 16])


@gluon.constexpr_function
def operand_layout(warps: int, columns: int = RUN) -> Any:
    """Of the rows that are multiplied, in registers."""
    return gl.DotOperandLayout(0, sums_layout(warps, columns), 2)


@gluon.jit
def renamed(x):
    """Columns by the channels' names, or channels by the columns': 8 j + 2 q + b and 8 q + 2 j + b change places."""
    RUNS: gl.constexpr = x.shape[-1] // WIDTH
    if len(x.shape) == 2:
        y = x.reshape([x.shape[0], RUNS, 4, 4, 2]).permute([0, 1, 3, 2, 4]).reshape(x.shape)
    else:
        y = x.reshape([RUNS, 4, 4, 2]).permute([0, 2, 1, 3]).reshape(x.shape)
    return y


@gluon.jit
def channel_of(column):
    """The channel of a column, of RUN."""
    return column % 8 // 2 * 8 + column // 8 * 2 + column % 2


@gluon.jit
def load_rows(rows, offsets, inside, COUNT: gl.constexpr):
    """COUNT tiles of rows, as operands of products; rows that are not inside are zero."""
    WARPS: gl.constexpr = gl.num_warps()
    tiles = ()
    for i in gl.static_range(COUNT):
        tile = renamed(gl.load(rows + i * WIDTH + offsets, mask=inside, other=0.0))
        tiles = tiles + (gl.convert_layout(tile, operand_layout(WARPS), assert_trivial=True),)
    return tiles


@gluon.jit
def store_rows(rows, offsets, inside, tiles):
    WARPS: gl.constexpr = gl.num_warps()
    for i in gl.static_range(len(tiles)):
        tile = renamed(tiles[i].to(rows.dtype.element_ty))
        tile = gl.convert_layout(tile, rows_layout(WARPS), assert_trivial=True)
        gl.store(rows + i * WIDTH + offsets, tile, mask=inside)


@gluon.jit
def add_rows(sums, tiles):
    """Sums with the rows that were loaded, in float32."""
    WARPS: gl.constexpr = gl.num_warps()
    added = ()
    for i in gl.static_range(len(sums)):
        tile = gl.convert_layout(tiles[i], sums_layout(WARPS), assert_trivial=True)
        added = added + (sums[i] + tile.to(gl.float32),)
    return added


@gluon.jit
def vector(pointer, COLUMNS: gl.constexpr = WIDTH, MOST: gl.constexpr = None, STEP: gl.constexpr = WIDTH):
    """Numbers in float32 for the columns of a product, zero from MOST on; those of each RUN columns are STEP apart."""
    WARPS: gl.constexpr = gl.num_warps()
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, rows_layout(WARPS, COLUMNS)))
    places = pointer + (column // WIDTH * STEP + column % WIDTH)
    if MOST is None or MOST >= COLUMNS:
        numbers = gl.load(places)
    else:
        numbers = gl.load(places, mask=column < MOST, other=0.0)
    numbers = renamed(numbers.to(gl.float32))
    return gl.convert_layout(numbers, gl.SliceLayout(0, sums_layout(WARPS, COLUMNS)), assert_trivial=True)


@gluon.jit
def begun(bias, COLUMNS: gl.constexpr = WIDTH, MOST: gl.constexpr = None, STEP: gl.constexpr = WIDTH):
    """A product to be summed on top of a bias, in each row; MOST and STEP as for vector."""
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = 16 * WARPS
    zero = gl.zeros([ROWS, COLUMNS], gl.float32, sums_layout(WARPS, COLUMNS))
    sums, _ = gl.broadcast(vector(bias, COLUMNS, MOST, STEP)[None, :], zero)
    return warpgroup_mma_init(sums)


@gluon.jit
def all_begun(bias, C: gl.constexpr, WIDE: gl.constexpr):
    """Products for C columns, of WIDE each, on top of a bias; those past C are zero."""
    sums = ()
    for i in gl.static_range(0, C, WIDE):
        sums = sums + (begun(bias + i, WIDE, C - i),)
    return sums


@gluon.jit
def product(tiles, weights, sums):
    """A product of rows that are several tiles, each with its weights."""
    for i in gl.static_range(len(tiles)):
        sums = warpgroup_mma(tiles[i], weights[i].permute((1, 0)), sums, is_async=True)
    return sums


@gluon.jit
def products(tile, weights, sums):
    """Products of the same rows, each with its weights."""
    summed = ()
    for i in gl.static_range(len(sums)):
        summed = summed + (warpgroup_mma(tile, weights[i].permute((1, 0)), sums[i], is_async=True),)
    return summed


@gluon.jit
def in_runs(tile):
    """A tile of sums as tiles of RUN columns. No number moves."""
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = tile.shape[0]
    COLUMNS: gl.constexpr = tile.shape[1]
    if COLUMNS == WIDTH:
        runs = (gl.convert_layout(tile, sums_layout(WARPS), assert_trivial=True),)
    else:
        left, right = gl.split(tile.reshape([ROWS, 2, COLUMNS // 2]).permute([0, 2, 1]))
        runs = in_runs(left) + in_runs(right)
    return runs


@gluon.jit
def ended(sums, read):
    """A product that is there, once all are that were begun; read: tensors that these read, until then kept."""
    if len(read):
        done, _ = warpgroup_mma_wait(0, deps=[sums, read[0]])
    else:
        done = warpgroup_mma_wait(0, deps=[sums])
    return done


@gluon.jit
def all_ended(sums, read, COUNT: gl.constexpr):
    """Products as COUNT tiles of RUN columns, without what is past the last channel."""
    runs = ()
    for i in gl.static_range(len(sums)):
        runs = runs + in_runs(ended(sums[i], read))
    done = ()
    for i in gl.static_range(COUNT):
        done = done + (runs[i],)
    return done


@gluon.constexpr_function
def shared_layout(columns: int) -> Any:
    """Of a tile that is multiplied by, in shared memory."""
    return gl.NVMMASharedLayout(64 if columns == RUN else 128, 16, 2)


@gluon.jit
def held(
    weight, stride, row, column,
    ROWS: gl.constexpr = WIDTH, COLUMNS: gl.constexpr = WIDTH, MOST: gl.constexpr = None, STEP: gl.constexpr = WIDTH,
):  # fmt: skip
    """A tile of a weight [N, K] in shared memory, from a row and a column on, both by name.

    From its row MOST on it is zero; the weight's rows of each RUN of its own are STEP apart. Each tile has memory of
    its own, so that no store waits for another.
    """
    WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    n = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    k = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    places = weight + (row + n // WIDTH * STEP + channel_of(n % WIDTH))[:, None] * stride + k[None, :]
    if MOST is None or MOST >= ROWS:
        tile = gl.load(places)
    else:
        tile = gl.load(places, mask=(n < MOST)[:, None], other=0.0)
    return gl.allocate_shared_memory(weight.dtype.element_ty, [ROWS, COLUMNS], shared_layout(COLUMNS), renamed(tile))


@gluon.jit
def layer_norm(sums, weight, bias, eps, C: gl.constexpr):
    """LayerNorm of rows of sums, as tiles.layer_norm."""
    deviations, rstd = centred(sums, eps, C, WIDTH, len(sums))
    normed = ()
    for i in gl.static_range(len(sums)):
        w = vector(weight + i * WIDTH)
        b = vector(bias + i * WIDTH)
        normed = normed + (deviations[i] * rstd[:, None] * w[None, :] + b[None, :],)
    return normed


hash_now(globals())
