"""attention_parts: proj(window_attention(x W^T + b)), in a part for each head."""

import pytest
import torch
from hypothesis import given
from kernel_helpers import (
    DTYPES,
    WINDOWS_IN_A_TILE,
    Draw,
    added_up,
    assert_empty_batch,
    assert_fails,
    assert_images_apart,
    assert_operator,
    assert_refuses,
    assert_refuses_tensors,
    assert_repeatable,
    bias_of,
    blocks,
    cast,
    check,
    check_mixed,
    each_dtype,
    extreme_tokens,
    few_examples,
    in_rows,
    mutant,
    odd_dtypes,
    run,
    windows_and_heads,
)
from swinfast.kernels import attention_parts as module
from swinfast.kernels import heads, tiles
from swinfast.reference import ops

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN in the interpreter
CASES = WINDOWS_IN_A_TILE | {"several images": (3, (5, 6), (4, 3), (2, 1), 2, 8)}
whole = added_up(module.attention_parts)


def arguments(batch, size, window, shift, heads, head_dim, dtype=torch.float32, layout="arranged"):
    draw, channels = Draw(dtype), heads * head_dim
    args = draw.attention(batch, size, window, shift, heads, head_dim, layout)
    args |= draw.linear(channels, channels, "proj_")
    return args | {"window_size": list(window), "shift_size": list(shift)}


def reference(x, qkv_weight, qkv_bias, logit_scale, table, proj_weight, proj_bias, window_size, shift_size):
    bias = bias_of(in_rows(table), window_size, x.dtype)
    return ops.attention_parts(
        x, qkv_weight, qkv_bias, logit_scale, bias, proj_weight, proj_bias, window_size, shift_size
    )


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype):
    check(whole, reference, arguments(*CASES[name], dtype), dtype)


@pytest.mark.parametrize("name", ["tiny", "padded"])
def test_the_table_of_window_attention(name):
    check(whole, reference, arguments(*CASES[name], layout="rows"), torch.float32)


def test_a_part_is_what_a_head_adds():
    args = arguments(*CASES["several images"])
    parts = run(module.attention_parts, args)
    assert parts.shape == (3, 5, 6, 2, 16) and parts.dtype == torch.float32
    for head in range(2):
        alone = torch.zeros_like(args["proj_weight"])
        alone[:, 8 * head : 8 * (head + 1)] = args["proj_weight"][:, 8 * head : 8 * (head + 1)]
        bias = args["proj_bias"] if head == 0 else torch.zeros_like(args["proj_bias"])
        expected = reference(**cast(args | {"proj_weight": alone, "proj_bias": bias}, torch.float64))
        torch.testing.assert_close(parts[..., head, :].double(), expected, rtol=1e-4, atol=1e-4)


@few_examples
@given(windows_and_heads(3), odd_dtypes)
def test_odd_shapes(case, dtype):
    check(whole, reference, arguments(*case, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_stream_in_float32(dtype):
    args = arguments(*CASES["padded"])
    args |= cast({name: value for name, value in args.items() if name.startswith(("qkv", "proj"))}, dtype)
    args["table"] = args["table"].half()
    check_mixed(whole, reference, args, dtype)


@each_dtype
def test_extremes(dtype):
    check(whole, reference, extreme_tokens(arguments(*CASES["padded"], dtype)), dtype)


def test_runs_and_images_are_independent():
    args = arguments(*CASES["several images"])
    assert_repeatable(module.attention_parts, args)
    assert_images_apart(module.attention_parts, args, "x")
    assert_empty_batch(module.attention_parts, args, "x")


def test_operator():
    args = arguments(2, (3, 4), (2, 3), (1, 1), 2, 8, torch.bfloat16)
    assert_operator(module.attention_parts, args, ["x"], keep=["table"])


def test_errors():
    op, args = module.attention_parts, arguments(*CASES["several images"])
    assert_refuses_tensors(op, args, "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
    assert_refuses(op, args, r"^x must have shape \[any, any, any, any\], got \[5, 6, 16\]", x=args["x"][0])
    assert_refuses(op, args, r"^table must be what arranged\(cpb_bias\) gives", table=args["table"][:1])
    assert_refuses(op, args, "^window_size must be at most 64 tokens, got", window_size=[5, 13])


# fmt: off
MUTANTS = {
    "no bias": ("several images", tiles, "mask=(column < C) & with_bias", "mask=(column < 0)"),
    "a bias with each head": ("several images", tiles, " & with_bias", ""),
    "another head's weights":
        ("several images", module, "k = head * HEAD_DIM", "k = (HEADS - 1 - head) * HEAD_DIM"),
    "another head's part": ("several images", module, "+ head * C", "+ 0 * head * C"),
    "the first channels alone": ("padded", tiles, "range(0, C, BLOCK_N)", "range(0, C - BLOCK_N, BLOCK_N)"),
    "channels past the last": ("padded", tiles, "inside[:, None] & (column < C)[None, :])", "inside[:, None])"),
    "padded tokens not masked": ("padded", tiles, "part, mask=inside[:, None]", "part, mask=(inside | True)[:, None]"),
    "attention rounded twice":
        ("several images", module, "attended = attended.to", "attended = attended.to(tl.bfloat16).to"),
}
# fmt: on


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    case, *change = MUTANTS[name]
    with blocks(BLOCK_K=16, BLOCK_N=16):
        wrong = mutant(tmp_path, module, *change).attention_parts
        assert_fails(added_up(wrong), reference, arguments(*CASES[case]))


@pytest.mark.parametrize(
    "change",
    [
        (tiles, "if WHOLE:", "if True:"),
        (heads, "if C % BLOCK_K != 0:", "if False:"),
        (heads, " * share[:, None]", ""),
    ],
    ids=["edges of W not masked", "channels past the last", "sum left out"],
)
def test_mutants_of_what_is_shared_fail(change, tmp_path):
    with blocks(BLOCK_K=16, BLOCK_N=16):
        wrong = mutant(tmp_path, module, *change).attention_parts
        assert_fails(added_up(wrong), reference, arguments(*CASES["padded"]))
