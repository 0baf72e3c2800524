"""Pieces of kernels: products, activation, LayerNorm and rows that are held as a tuple of tiles.

A row of C channels that is no power of two is a tuple of COUNT tiles [rows, TILE] (see configs.columns); channels past
C are zero.
"""

from typing import Any

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def begin(OVERLAPPED: tl.constexpr):
    """What every kernel does first.

    OVERLAPPED it was started before the kernel before it was done (CUDA calls that programmatic dependent launch): it
    lets the one after it be started, too, and waits for all that the one before it writes.
    """
    if OVERLAPPED and not INTERPRETED:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, accumulated in float32.

    In TF32 both are rounded first, as PyTorch's library does: tensor cores cut off what is beyond its bits, which makes
    every product smaller, by 7e-4 on average.
    """
    if INTERPRETED:  # Triton's interpreter multiplies the bit patterns of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    elif PRECISION == "tf32":
        a = to_tf32(a)
        b = to_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def to_tf32(x):
    """float32 values rounded to the 10 bits of TF32's mantissa, halves away from zero."""
    is_number = x == x  # a NaN of all ones would become zero
    bits = tl.where(is_number, x, 0.0).to(tl.int32, bitcast=True)
    return tl.where(is_number, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), x)


@triton.jit
def quotient(x, y):
    """x / y within 2 units in the last place, for y up to 2^126: two instructions in place of eight."""
    if INTERPRETED:
        z = x / y
    else:
        z = libdevice.fast_dividef(x, y)
    return z


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """GELU of float32 values: x Phi(x) = max(x, 0) - a Phi(-a) with a = |x|.

    log2 Phi(-a) is nearly a parabola, so one exponential of a fitted polynomial gives Phi(-a). A GPU has few units for
    exponentials, and a quotient would take them as long again. EXACT it is within 1.1e-7 a, the erf form in float32
    within 2.8e-7 a; otherwise it is within 7.5e-6 a, a thirtieth of float16's rounding, in three instructions less.
    """
    a = tl.minimum(tl.abs(x), 8.0)  # beyond, the result is x or 0, and the polynomials are none of Phi
    if EXACT:
        p = -0.05266663 + a * (0.00736315 + a * (-0.000407 + a * (-5.76903e-05 + a * 8.857554e-06)))
        p = -1.0 + a * (-1.15110886 + a * (-0.45916432 + a * p))
    else:
        p = -1.0 + a * (-1.15065444 + a * (-0.46180052 + a * (-0.04830374 + a * 0.00478159)))
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * tl.exp2(p)


@triton.jit
def load_transposed(weight, n, k, N: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr):
    """The tile [k, n] of W^T, for W stored as [N, K]; WHOLE says that no tile reaches past the edges."""
    pointers = weight + n[None, :] * K + k[:, None]
    if WHOLE:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
    return tile


@triton.jit
def store_part(
    tile, weight, k, bias, with_bias, rows, inside,
    C: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store in float32 what a tile, columns k of a matrix [rows, K], adds to the matrix times W^T + b, W [C, K].

    rows: pointers to the starts of rows of the result; inside: which of them exist; the bias [C] is added with_bias;
    WHOLE says that all of k are below K.
    """
    for start in range(0, C, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        added = tl.load(bias + column, mask=(column < C) & with_bias, other=0.0).to(tl.float32)
        w = load_transposed(weight, column, k, C, K, WHOLE and C % BLOCK_N == 0)
        part = dot(tile, w, tl.broadcast_to(added[None, :], (tile.shape[0], BLOCK_N)), PRECISION)
        tl.store(rows[:, None] + column[None, :], part, mask=inside[:, None] & (column < C)[None, :])


@triton.jit
def zeros(ROWS: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr):
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((ROWS, TILE), tl.float32),)
    return tiles


@triton.jit
def in_each_row(vector, column, C: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """Columns of a vector [C] in each of ROWS rows, in float32; WHOLE says that none is past its end."""
    if WHOLE:
        values = tl.load(vector + column)
    else:
        values = tl.load(vector + column, mask=column < C, other=0.0)
    return tl.broadcast_to(values.to(tl.float32)[None, :], (ROWS, column.shape[0]))


@triton.jit
def vector_rows(vector, ROWS: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr):
    """ROWS rows that are all the same vector [C], in float32."""
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles = tiles + (in_each_row(vector, i * TILE + tl.arange(0, TILE), C, ROWS, COUNT * TILE == C),)
    return tiles


@triton.jit
def load_rows(rows, inside, C: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr, AGAIN: tl.constexpr = False):
    """rows: pointers to the starts of rows; inside: which of them exist, the others are zero.

    AGAIN loads for a second and last time what was loaded before, where keeping it would take registers for too long.
    """
    tiles = ()
    for i in tl.static_range(COUNT):
        columns = i * TILE + tl.arange(0, TILE)
        mask = inside[:, None]
        if COUNT * TILE > C:
            mask = mask & (columns < C)[None, :]
        pointers = rows[:, None] + columns[None, :]
        if AGAIN:  # for the compiler another load than the first, which it would keep
            tile = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")
        else:
            tile = tl.load(pointers, mask=mask, other=0.0)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def store_rows(rows, tiles, inside, C: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        columns = i * TILE + tl.arange(0, TILE)
        mask = inside[:, None]
        if COUNT * TILE > C:
            mask = mask & (columns < C)[None, :]
        tl.store(rows[:, None] + columns[None, :], tiles[i].to(rows.dtype.element_ty), mask=mask)


@triton.jit
def add_vector(tiles, vector, C: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr):
    """Add a vector [C] to every row, in float32."""
    added = ()
    for i in tl.static_range(COUNT):
        columns = i * TILE + tl.arange(0, TILE)
        values = tl.load(vector + columns, mask=columns < C, other=0.0).to(tl.float32)
        added = added + (tiles[i] + values[None, :],)
    return added


@triton.jit
def add_rows(tiles, others, COUNT: tl.constexpr):
    added = ()
    for i in tl.static_range(COUNT):
        added = added + (tiles[i] + others[i].to(tl.float32),)
    return added


@triton.jit
def centred(tiles, eps, C: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr):
    """Rows less their means, and one over their standard deviations, which come of the deviations squared."""
    total = tl.sum(tiles[0], axis=1)
    for i in tl.static_range(1, COUNT):
        total += tl.sum(tiles[i], axis=1)
    mean = total / C
    deviations = ()
    for i in tl.static_range(COUNT):
        deviation = tiles[i] - mean[:, None]
        if COUNT * TILE > C:
            columns = i * TILE + tl.arange(0, TILE)
            deviation = tl.where((columns < C)[None, :], deviation, 0.0)
        deviations = deviations + (deviation,)
    squares = tl.sum(deviations[0] * deviations[0], axis=1)
    for i in tl.static_range(1, COUNT):
        squares += tl.sum(deviations[i] * deviations[i], axis=1)
    return deviations, tl.rsqrt(squares / C + eps)


@triton.jit
def layer_norm(tiles, weight, bias, eps, C: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr):
    """LayerNorm of float32 rows."""
    deviations, rstd = centred(tiles, eps, C, TILE, COUNT)
    normed = ()
    for i in tl.static_range(COUNT):
        columns = i * TILE + tl.arange(0, TILE)
        w = tl.load(weight + columns, mask=columns < C, other=0.0).to(tl.float32)
        b = tl.load(bias + columns, mask=columns < C, other=0.0).to(tl.float32)
        normed = normed + (deviations[i] * rstd[:, None] * w[None, :] + b[None, :],)
    return normed


def hash_now(module: dict[str, Any]) -> None:
    """Have Triton hash all functions of a module, which stand there after those that they call.

    The key of a kernel in Triton's cache contains the constants of the functions that it calls, but only of those that
    were hashed before it. Without this it would depend on which kernel a process happens to compile first, and what
    another process compiled would not be found.
    """
    if INTERPRETED:  # nothing is compiled
        return
    for function in list(module.values()):
        getattr(function, "cache_key", None)


hash_now(globals())
