"""attention_block where all weights fit into a multiprocessor's shared memory twice, for sm_90: see warpgroups.py.

Two programs to a multiprocessor stay, with the weights, and go from window to window. k and v of a head go through
shared memory, where products take what they multiply by; the rest stays in registers. Of k and v there are two places,
so that those of the next head are written while the last one's are read, unless products are JOINED.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language import debug_barrier
from triton.language import range as loop

from .tiles import hash_now, quotient
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
    in_runs,
    layer_norm,
    load_rows,
    operand_layout,
    product,
    products,
    rows_layout,
    store_rows,
    sums_layout,
    vector,
)
from .windows import reciprocal_length, softmax_scale, window_tokens, window_type

PER_UNIT = 2  # programs
PADDED_WIDTH = gl.constexpr(128)  # of three tiles
SLOTS = 64  # of a window, whose rows four warps multiply


def fits(channels: int, heads: int, slots: int) -> bool:
    """Whether the kernel takes an attention half, of 16-bit numbers: heads of a tile, and room for all that programs
    hold."""
    held = 8 * channels * channels + 8 * SLOTS * RUN  # weights, and two of k and v
    return channels == heads * RUN and slots == SLOTS and PER_UNIT * (held + 1024) <= SHARED


@gluon.jit(do_not_specialize=["height", "width", "windows_h", "windows_w", "images"])
def attention_kernel(
    x,  # [B, H, W, C]
    qkv_weight,  # [3C, C]
    qkv_bias,  # [3C]
    logit_scale,  # [HEADS]
    table,  # [TYPES, HEADS, SLOTS // 16, 2 SLOTS, 8]
    proj_weight,  # [C, C]
    proj_bias,  # [C]
    norm_weight,  # [C]
    norm_bias,  # [C]
    out,  # [B, H, W, C]
    height,
    width,
    windows_h,
    windows_w,
    images,
    eps,
    HEADS: gl.constexpr,
    WINDOW_H: gl.constexpr,
    WINDOW_W: gl.constexpr,
    SHIFT_H: gl.constexpr,
    SHIFT_W: gl.constexpr,
    PADDED: gl.constexpr,
    JOINED: gl.constexpr = False,
):
    """JOINED: q, k and v of a head are one product, and the projection's columns, each padded with zeros to 128.

    Then there is one place for k and v: the zeros take the room of the other.
    """
    C: gl.constexpr = HEADS * WIDTH
    layout: gl.constexpr = rows_layout(4)
    weights = _weights(qkv_weight, proj_weight, HEADS, JOINED)
    shared: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    dtype: gl.constexpr = x.dtype.element_ty
    places = ()
    for i in gl.static_range(1 if JOINED else 2):
        for_k = gl.allocate_shared_memory(dtype, [64, WIDTH], shared)
        for_v = gl.allocate_shared_memory(dtype, [64, WIDTH], shared)
        places = places + ((for_k, for_v),)
    fence_async_shared()
    debug_barrier()

    slot = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    windows = windows_h * windows_w
    # as in mlp_warpgroups
    for task in loop(gl.program_id(0), images * windows, gl.num_programs(0), disable_licm=True):
        window_row = task % windows // windows_w
        window_column = task % windows_w
        token, inside = window_tokens(
            slot, window_row, window_column, height, width, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W, PADDED
        )
        place = (task // windows).to(gl.int64) * height * width * C
        offsets = token.to(gl.int64)[:, None] * C + column[None, :]
        biases = table
        if SHIFT_H > 0 or SHIFT_W > 0:
            biases += window_type(window_row, window_column, windows_h, windows_w) * (HEADS * 64 * 64)
        tiles = load_rows(x + place, offsets, inside[:, None], HEADS)  # padded tokens are zero
        sums = all_begun(proj_bias, C, PADDED_WIDTH if JOINED else WIDTH)
        read = ()
        for head in gl.static_range(HEADS):
            attended = _head(
                tiles, weights[head], places[head % len(places)], qkv_bias + head * WIDTH, logit_scale + head,
                biases + head * (64 * 64), C, JOINED, read,
            )  # fmt: skip
            sums = products(attended, weights[head][1], sums)
            read = (attended,)
        done = all_ended(sums, read, HEADS)
        if HEADS % 2 == 1 and not JOINED:  # else another head came since what the next one overwrites was read
            debug_barrier()
        y = add_rows(layer_norm(done, norm_weight, norm_bias, eps, C), tiles)
        store_rows(out + place, offsets, inside[:, None], y)


@gluon.jit
def _weights(qkv_weight, proj_weight, HEADS: gl.constexpr, JOINED: gl.constexpr):
    """Of each head those of q, k and v, and what the projection multiplies it by: tiles in shared memory."""
    C: gl.constexpr = HEADS * WIDTH
    weights = ()
    for head in gl.static_range(HEADS):
        qkv = ()
        w = ()
        if JOINED:
            for i in gl.static_range(HEADS):
                tile = held(qkv_weight, C, head * WIDTH, i * WIDTH, PADDED_WIDTH, WIDTH, 3 * WIDTH, C)
                qkv = qkv + (tile,)
            w = (held(proj_weight, C, 0, head * WIDTH, PADDED_WIDTH, WIDTH, C),)
        else:
            for part in gl.static_range(3):
                one = ()
                for i in gl.static_range(HEADS):
                    one = one + (held(qkv_weight, C, part * C + head * WIDTH, i * WIDTH),)
                qkv = qkv + (one,)
            for i in gl.static_range(HEADS):
                w = w + (held(proj_weight, C, i * WIDTH, head * WIDTH),)
        weights = weights + ((qkv, w),)
    return weights


@gluon.jit
def _head(tiles, weights, places, qkv_bias, logit_scale, biases, C: gl.constexpr, JOINED: gl.constexpr, read):
    """What a head attends to, [64, WIDTH], in the dtype of the rows.

    weights: its share of _weights; places: for k and v in shared memory; qkv_bias, logit_scale, biases: this head's.
    """
    dtype: gl.constexpr = tiles[0].dtype
    sums: gl.constexpr = sums_layout(4)
    if JOINED:  # all are done with the last head's k and v
        debug_barrier()
        qkv = product(tiles, weights[0], begun(qkv_bias, PADDED_WIDTH, 2 * WIDTH, C))  # v without its bias, too
        q, k, v, _ = in_runs(ended(qkv, read))
    else:
        q = product(tiles, weights[0][0], begun(qkv_bias))
        k = product(tiles, weights[0][1], begun(qkv_bias + C))
        v = product(tiles, weights[0][2], gl.zeros([64, WIDTH], gl.float32, sums))
        q, k = warpgroup_mma_wait(len(tiles), deps=[q, k])  # not for v
    q = (q * (reciprocal_length(q) * softmax_scale(gl.load(logit_scale)))[:, None]).to(dtype)
    k = (k * reciprocal_length(k)[:, None]).to(dtype)
    places[0].store(k)
    if not JOINED:
        v = ended(v, read)
    places[1].store(v.to(dtype))
    fence_async_shared()
    debug_barrier()

    q = gl.convert_layout(q, operand_layout(4, 64), assert_trivial=True)
    logits = warpgroup_mma(q, places[0].permute((1, 0)), _biases(biases), is_async=True)
    logits = ended(logits, (q,))
    p = gl.exp2(logits - gl.max(logits, axis=1)[:, None])
    share = quotient(1.0, gl.sum(p, axis=1))
    share = gl.convert_layout(share, gl.SliceLayout(1, sums), assert_trivial=True)
    p = gl.convert_layout(p.to(dtype), operand_layout(4), assert_trivial=True)
    attended = warpgroup_mma(p, places[1], gl.zeros([64, WIDTH], gl.float32, sums), is_async=True)
    # what the keys count for sums up to one, so the bias of each v is that of the sum
    attended = ended(attended, (p,)) * share[:, None] + vector(qkv_bias + 2 * C)[None, :]
    return gl.convert_layout(attended.to(dtype), operand_layout(4), assert_trivial=True)


@gluon.constexpr_function
def _biases_layout():
    """Of what a head has of an arranged() table: each thread's eight numbers side by side, in four parts."""
    within = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0]]
    lanes = [[0, 1 << bit, 0] for bit in range(5)]
    return gl.DistributedLinearLayout(within, lanes, [[0, 32, 0], [0, 64, 0]], [], [4, 128, 8])


@gluon.jit
def _biases(table):
    """One head's biases [64, 64] of a table that is arranged(), in float32."""
    layout: gl.constexpr = _biases_layout()
    part = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    thread = gl.arange(0, 128, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    number = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    bias = gl.load(table + (part[:, None, None] * 128 + thread[None, :, None]) * 8 + number[None, None, :])
    bias = bias.reshape([4, 4, 8, 4, 2, 2, 2]).permute([1, 5, 2, 0, 4, 3, 6]).reshape([64, 64])
    return gl.convert_layout(bias, sums_layout(4, 64), assert_trivial=True).to(gl.float32)


hash_now(globals())
