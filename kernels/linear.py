"""linear: y = x W^T + b, then GELU where asked for.

    x [rows, K], W [N, K] as torch.nn.Linear keeps it, b [N] or None, y [rows, N]; sums in float32.

GELU is as exact as the erf form in float32, and in 16 bits within a thirtieth of a rounding of it (tiles.gelu).
Where the tables say so, PyTorch's own library (cuBLAS, …) computes it, or programs that stay and go from tile to tile.
Definition: reference.ops.linear.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .configs import at_most, cdiv, config
from .launch import (
    arch_of,
    can_be_described,
    check,
    check_rows,
    check_vectors,
    check_weight,
    described,
    launch,
    left_to_pytorch,
    operator,
    persistent,
    precision,
    precision_name,
)
from .tiles import begin, dot, gelu, load_transposed


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x,  # [rows, K]
    weight,  # [N, K]
    bias,  # [N]
    out,  # [rows, N]
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    EXACT_GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPPED: tl.constexpr = False,
):
    begin(OVERLAPPED)
    # neighbouring programs share a block of x, which is read once; all of the weights stay in the L2 cache
    program = tl.program_id(0)
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row = (program // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (program % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    x_rows = x + row.to(tl.int64)[:, None] * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = inside[:, None]
        if K % BLOCK_K != 0:
            mask = mask & (k < K)[None, :]
        tile = tl.load(x_rows + k[None, :], mask=mask, other=0.0).to(weight.dtype.element_ty)
        w = load_transposed(weight, column, k, N, K, N % BLOCK_N == 0 and K % BLOCK_K == 0)
        acc = dot(tile, w, acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        acc = gelu(acc, EXACT_GELU)
    out_rows = out + row.to(tl.int64)[:, None] * N
    tl.store(out_rows + column[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None] & (column < N)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _persistent_linear_kernel(
    x,  # descriptor of [rows, K]
    weight,  # descriptor of [N, K]
    bias,  # [N]
    out,  # descriptor of [rows, N], for half a tile
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPPED: tl.constexpr = False,
):
    """Programs that go from tile to tile: the loads of the next are under way while one gets its GELU and is stored."""
    begin(OVERLAPPED)
    HALF: tl.constexpr = BLOCK_N // 2
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tiles = tl.cdiv(rows, BLOCK_M) * blocks_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row = tile // blocks_n * BLOCK_M
        column = tile % blocks_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = dot(x.load([row, k]), tl.trans(weight.load([column, k])), acc, PRECISION)
        halves = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        for i in tl.static_range(2):
            start = column + i * HALF
            y = halves[i]
            if HAS_BIAS:
                place = start + tl.arange(0, HALF)
                y += tl.load(bias + place, mask=place < N, other=0.0).to(tl.float32)[None, :]
            if GELU:
                y = gelu(y, False)
            out.store([row, start], y.to(out.dtype))


@operator
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x W^T + b, then GELU where asked for.

    Args:
        x: [..., K], float16, bfloat16 or float32, contiguous.
        weight: [N, K], of the dtype of x, or 16-bit where x is float32.
        bias: [N] or None, of the dtype of weight.

    Returns:
        [..., N] in the dtype of weight.

    Raises:
        ValueError: A tensor of another shape, dtype or device, or not contiguous.
    """
    check("weight", weight, (None, None))
    columns, k = weight.shape
    check("x", x, (*x.shape[:-1], k))
    check_weight("weight", weight, (columns, k), x)
    check_vectors(columns, weight, bias=bias)
    rows = x.numel() // k
    check_rows("x", rows)
    chosen = config(
        "linear",
        arch_of(x.device),
        precision_name(weight.dtype),
        k=k,
        n=columns,
        gelu=int(gelu),
        rows=at_most(rows),
    )
    if chosen.blocks.get("use") == "library":
        out = F.linear(x.to(weight.dtype), weight, bias)
        left_to_pytorch(x, weight, bias, out, config=chosen, rows=rows, N=columns, K=k)
        return torch.ops.aten.gelu_(out) if gelu else out
    out = torch.empty((*x.shape[:-1], columns), dtype=weight.dtype, device=x.device)
    block_m, block_n, block_k = (chosen.blocks[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    tiles = cdiv(rows, block_m) * cdiv(columns, block_n)
    blocks = {name: size for name, size in chosen.blocks.items() if name != "PER_UNIT"}
    stays = "PER_UNIT" in chosen.blocks and isinstance(rows, int) and rows and x.dtype == weight.dtype != torch.float32
    if stays and can_be_described(x, weight, out):
        launch(
            _persistent_linear_kernel,
            persistent(tiles, x.device, chosen.blocks["PER_UNIT"]),
            described(x.view(rows, k), [block_m, block_k]),
            described(weight, [block_n, block_k]),
            weight if bias is None else bias,
            described(out.view(rows, columns), [block_m, block_n // 2]),
            rows,
            N=columns,
            K=k,
            HAS_BIAS=bias is not None,
            GELU=gelu,
            PRECISION=precision(weight.dtype),
            config=chosen,
            **blocks,
        )
        return out
    launch(
        _linear_kernel,
        tiles,
        *(x, weight, weight if bias is None else bias, out, rows),
        N=columns,
        K=k,
        HAS_BIAS=bias is not None,
        GELU=gelu,
        EXACT_GELU=weight.dtype == torch.float32,
        PRECISION=precision(weight.dtype),
        config=chosen,
        **blocks,
    )
    return out
