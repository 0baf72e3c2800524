"""linear: x W^T + b, with GELU and without."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import (
    CAN_OVERLAP,
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
    each_dtype,
    few_examples,
    loops_to_a_number,
    mutant,
    odd_dtypes,
    run,
)
from swinfast.kernels import configs, launch, tiles
from swinfast.kernels import linear as module
from swinfast.reference import ops
from torch import nn

CASES = {  # shape of x, columns, bias, GELU
    "qkv": ((2, 5, 7, 32), 96, True, False),
    "fc1": ((2, 65, 96), 384, True, True),
    "no bias": ((70, 48), 33, False, False),
    "tails": ((131, 44), 132, True, True),
    "one": ((1, 1), 1, True, True),
}


def arguments(shape, columns, bias, gelu, dtype=torch.float32):
    draw = Draw(dtype)
    args = {"x": draw(*shape), **draw.linear(shape[-1], columns), "gelu": gelu}
    return args if bias else args | {"bias": None}


TILE = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16}  # of our own kernel, whatever the tables leave to the library


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype):
    with blocks(**TILE):
        check(module.linear, ops.linear, arguments(*CASES[name], dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_x_in_float32(dtype):
    args = arguments(*CASES["tails"], dtype)
    got = run(module.linear, args | {"x": args["x"].float()})
    assert torch.equal(got, run(module.linear, args))


@pytest.mark.parametrize("sizes", [(16, 128, 64), (128, 16, 16), (64, 64, 256)], ids=str)
def test_blocks(sizes):
    with blocks(**dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), sizes, strict=True))):
        check(module.linear, ops.linear, arguments(*CASES["tails"]), torch.float32)


@pytest.mark.parametrize("option", [{"maxnreg": 96}, *([{"OVERLAPPED": True}] if CAN_OVERLAP else [])], ids=str)
def test_options_are_no_sizes(option):
    with blocks(BLOCK_M=32, BLOCK_N=32, BLOCK_K=16, **option):
        check(module.linear, ops.linear, arguments(*CASES["tails"]), torch.float32)


PERSISTENT = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "PER_UNIT": 1}
DESCRIBED = {  # whole and cut tiles, more and fewer of them than programs
    "tails": ((300, 48), 136, True, True),
    "few": ((2, 3, 32), 64, True, False),
    "no bias": ((70, 40), 24, False, True),
}


@contextmanager
def two_programs():
    """Persistent programs, so few of them that each has several tiles."""
    with mock.patch.object(launch, "units", lambda device: 2), blocks(**PERSISTENT):
        yield


@loops_to_a_number
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", DESCRIBED)
def test_persistent_programs(name, dtype):
    with two_programs():
        check(module.linear, ops.linear, arguments(*DESCRIBED[name], dtype), dtype)


def test_what_no_descriptor_can_say_goes_without():
    """Rows of no whole 16 bytes, memory that begins in between, another dtype, nothing at all."""
    launched = []

    def kernel(name, programs, *args, **constants):
        launched.append(name)

    with two_programs(), mock.patch.object(module, "launch", kernel):
        for shape, columns, dtype in (((70, 44), 24, torch.float16), ((70, 48), 20, torch.float16)):
            module.linear(*arguments(shape, columns, True, True, dtype).values())
        args = arguments((70, 48), 24, True, True, torch.float16)
        shifted = torch.empty(args["weight"].numel() + 1, dtype=torch.float16, device=DEVICE)[1:].view(24, 48)
        module.linear(args["x"], shifted.copy_(args["weight"]), args["bias"], True)
        module.linear(args["x"].float(), args["weight"], args["bias"], True)
        assert launched == [module._linear_kernel] * 4
        module.linear(*args.values())
        assert launched[4:] == [module._persistent_linear_kernel]
    with two_programs():
        assert module.linear(args["x"][:0], args["weight"], args["bias"], True).shape == (0, 24)


class Linear(nn.Module):
    def forward(self, x, weight, bias):
        return torch.ops.swinfast.linear(x, weight, bias, True)


@loops_to_a_number
@pytest.mark.parametrize("sizes", [PERSISTENT, {"use": "library"}], ids=["persistent", "library"])
def test_a_graph_is_for_any_number_of_rows(sizes):
    args = tuple(arguments((40, 48), 24, True, True, torch.float16).values())[:3]
    with blocks(**sizes), torch.no_grad():
        rows = {0: torch.export.Dim("rows", min=1, max=1 << 20)}
        exported = torch.export.export(Linear(), args, dynamic_shapes=(rows, None, None), strict=True).module()
        x = torch.cat([args[0]] * 3)
        assert torch.equal(exported(x, *args[1:]), module.linear(x, *args[1:], True))


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_the_library(name, dtype):
    with configs.override(lambda kernel, shape: configs.Config({"use": "library"}, 4, 1, "test")):
        check(module.linear, ops.linear, arguments(*CASES[name], dtype), dtype)
        test_x_in_float32(torch.float16)


def test_what_the_library_computes_is_recorded():
    x, weight, bias = (torch.empty(shape, device="meta", dtype=torch.float16) for shape in ((2, 3, 8), (4, 8), (4,)))
    chosen = configs.Config({"use": "library"}, 4, 1, "test")
    with configs.override(lambda kernel, shape: chosen), launch.record("sm_90") as launches:
        out = module.linear(x, weight, bias)
    assert out.shape == (2, 3, 4)
    (one,) = launches
    assert one.kernel is None and one.config is chosen
    assert one.args[:3] == (x, weight, bias) and one.constants == {"rows": 6, "N": 4, "K": 8}


@few_examples
@given(st.integers(1, 150), st.integers(1, 70), st.integers(1, 150), *[st.booleans()] * 2, odd_dtypes)
def test_odd_shapes(rows, k, columns, bias, gelu, dtype):
    with blocks(**TILE):
        check(module.linear, ops.linear, arguments((rows, k), columns, bias, gelu, dtype), dtype)


@each_dtype
@pytest.mark.filterwarnings("ignore:overflow")
def test_extremes(dtype):
    args = arguments((3, 44), 20, True, True, dtype)
    args["x"][0] = 0
    args["x"][1] = 6e4 * args["x"][1].sign()  # some sums overflow float16, and must as in the definition
    with blocks(**TILE):
        check(module.linear, ops.linear, args, dtype)


def test_runs_and_rows_are_independent():
    args = arguments((3, 44, 36), 40, True, True)
    assert_repeatable(module.linear, args)
    assert_images_apart(module.linear, args, "x")
    assert_empty_batch(module.linear, args, "x")


def test_operator():
    assert_operator(module.linear, arguments((2, 3, 20), 24, True, True, torch.bfloat16), ["x"])
    assert_operator(module.linear, arguments((2, 3, 20), 24, False, False, torch.bfloat16), ["x"])


def test_errors():
    args = arguments((2, 3, 20), 24, True, True)
    assert_refuses_tensors(module.linear, args, "weight", "bias")
    assert_refuses(
        module.linear,
        args,
        r"^x must have shape \[2, 3, 20\], got \[2, 3, 21\]",
        x=torch.zeros(2, 3, 21, device=DEVICE),
    )
    assert_refuses(module.linear, args, "^x must be contiguous", x=torch.zeros(2, 20, 3, device=DEVICE).mT)


MUTANTS = {
    "no bias": ("qkv", module, "if HAS_BIAS:", "if False:"),
    "no GELU": ("fc1", module, "if GELU:", "if False:"),
    "fast GELU in float32": ("fc1", module, "gelu(acc, EXACT_GELU)", "gelu(acc, False)"),
    "another GELU": ("fc1", tiles, "a * (-1.15110886", "a * (-1.15"),
    "K tail not masked": ("tails", module, "K % BLOCK_K != 0", "False"),
    "W^T read as W": ("qkv", tiles, "n[None, :] * K + k[:, None]", "n[None, :] + k[:, None] * N"),
    "edges of W not masked": ("tails", tiles, "if WHOLE:", "if True:"),
    "rows not masked": ("tails", module, "inside = row < rows", "inside = row < rows + 1"),
    "columns not masked": ("tails", module, "(column < N)[None, :])", "(column < N + 1)[None, :])"),
}


OF_PERSISTENT = {
    "tiles skipped": ("tl.num_programs(0), flatten", "tl.num_programs(0) + 1, flatten"),
    "rows of another tile": ("row = tile // blocks_n * BLOCK_M", "row = tile // (blocks_n + 1) * BLOCK_M"),
    "columns of another tile": ("column = tile % blocks_n * BLOCK_N", "column = tile // blocks_n * BLOCK_N"),
    "halves swapped": ("y = halves[i]", "y = halves[1 - i]"),
    "columns of a half interleaved": ("(BLOCK_M, 2, HALF)), (0, 2, 1)", "(BLOCK_M, HALF, 2)), (0, 1, 2)"),
    "bias of the first half": ("place = start + tl.arange", "place = column + tl.arange"),
    "no bias": ("if HAS_BIAS:\n                place", "if False:\n                place"),
    "no GELU": ("y = gelu(y, False)", "y = y"),
    "K cut off": ("range(0, K, BLOCK_K):\n            acc", "range(0, K - BLOCK_K, BLOCK_K):\n            acc"),
    "half stored": ("out.store([row, start]", "out.store([row, column]"),
}


@loops_to_a_number
@pytest.mark.parametrize("name", OF_PERSISTENT)
def test_mutants_of_persistent_programs_fail(name, tmp_path):
    wrong = mutant(tmp_path, module, module, *OF_PERSISTENT[name])
    with mock.patch.object(launch, "units", lambda device: 2), blocks(**PERSISTENT):
        assert_fails(wrong.linear, ops.linear, arguments(*DESCRIBED["tails"], torch.float16), torch.float16)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    case, *change = MUTANTS[name]
    with blocks(BLOCK_M=32, BLOCK_N=32, BLOCK_K=16):
        assert_fails(mutant(tmp_path, module, *change).linear, ops.linear, arguments(*CASES[case]))
