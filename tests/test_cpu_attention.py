"""Attention in place on a CPU: exponentials without a largest logit must be softmax whatever the scales are."""

import math

import pytest
import torch
from helpers import relative_rms

from swinfast import cpu_attention

GRID, HEADS, TOKENS, CHANNELS = (3, 2), 2, 12, 16


def attention(qkv, scale, bias):
    """By the definition, on [windows, N, 3, heads, d]; bias [windows, heads, N, N]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, k = (torch.nn.functional.normalize(side, dim=-1) for side in (q, k))
    weights = (q @ k.transpose(-2, -1) * scale + bias).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def attend(scratch, table, qkv):
    scratch.load(qkv.view(2, -1, 3 * CHANNELS))
    return cpu_attention.attend(scratch, table)


def inputs(scale, masked, alike, dtype=torch.float64):
    """qkv whose k are near each other where asked for, so that rows lie far from 0; scales and biases of two heads."""
    generator = torch.Generator().manual_seed(0)
    windows = 2 * math.prod(GRID)
    qkv = torch.randn(windows, TOKENS, 3, HEADS, CHANNELS // HEADS, generator=generator, dtype=torch.float64)
    if alike:
        qkv[:, :, 1] = qkv[:, :1, 1] + 0.1 * qkv[:, :, 1]
        qkv[:, ::2, 0] = -qkv[:, :1, 1]
    bias = torch.randn(HEADS, TOKENS, TOKENS, generator=generator, dtype=torch.float64)
    scales = torch.tensor([scale, 5.0], dtype=torch.float64)[:, None, None]
    if masked:
        rows, columns = (side[:, None] != side for side in (torch.arange(TOKENS) >= 8, torch.arange(TOKENS) % 4 >= 2))
        bias = bias + torch.stack([rows & False, rows, columns, rows | columns])[:, None] * -100.0
    return qkv.to(dtype), scales, bias


def window_biases(bias):
    """The bias of each window of two images."""
    if bias.dim() == 3:
        return bias
    last_row, last_column = torch.arange(GRID[0]) == GRID[0] - 1, torch.arange(GRID[1]) == GRID[1] - 1
    return bias[(last_row[:, None] + 2 * last_column).flatten().repeat(2)]


@pytest.mark.parametrize("alike", [False, True], ids=["random k", "k alike"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("scale", [1.0, 30.0, 60.0, 100.0])
def test_is_softmax(scale, masked, alike):
    qkv, scales, bias = inputs(scale, masked, alike)
    table = cpu_attention.exponent_table(bias, scales)
    assert table.bounded == (scale <= 60.0)
    scratch = cpu_attention.Scratch(2, GRID, TOKENS, HEADS, CHANNELS, torch.float64, torch.float64)
    got = attend(scratch, table, qkv)
    expected = attention(qkv, scales, window_biases(bias))
    assert relative_rms(got.view(expected.shape), expected) <= 1e-12


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_bfloat16_is_rounded_where_products_are_alone(scale):
    """Not the lengths, logits, exponentials and sums: within a few roundings of what enters and leaves the products."""
    qkv, scales, bias = inputs(scale, True, False, torch.bfloat16)
    table = cpu_attention.exponent_table(bias.float(), scales.float())
    scratch = cpu_attention.Scratch(2, GRID, TOKENS, HEADS, CHANNELS, torch.bfloat16, torch.float32)
    got = attend(scratch, table, qkv)
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)
    q, k = (torch.nn.functional.normalize(side, dim=-1) for side in (q, k))
    if not table.bounded:
        k = k - k.mean(dim=-2, keepdim=True)
    cosines = (q.bfloat16().double() @ k.bfloat16().double().transpose(-2, -1)).bfloat16().double()
    weights = (cosines * scales + window_biases(bias)).softmax(dim=-1).bfloat16().double()
    expected = (weights @ v).transpose(1, 2).flatten(2)
    assert got.dtype == torch.bfloat16
    assert relative_rms(got.view(expected.shape), expected) <= 2e-3


def in_range(monkeypatch) -> list[bool]:
    """Whether the sums were in range, by the calls that ask so from now on."""
    answers, ask = [], cpu_attention._in_range
    monkeypatch.setattr(cpu_attention, "_in_range", lambda sums: answers.append(ask(sums)) or answers[-1])
    return answers


@pytest.mark.parametrize(("last", "falls_back"), [(0.0, False), (0.9, True)])
def test_a_sum_out_of_range_is_computed_by_softmax(monkeypatch, last, falls_back):
    """One key on the query, all others opposite: exponentials that overflow, or don't."""
    qkv, scales, bias = inputs(100.0, False, False, torch.float32)
    qkv[:, :, 1] = -qkv[:, :1, 0]
    qkv[:, -1, 1] = qkv[:, 0, 0] * last - qkv[:, 0, 0] * (1 - last)
    answers = in_range(monkeypatch)
    scratch = cpu_attention.Scratch(2, GRID, TOKENS, HEADS, CHANNELS, torch.float32, torch.float32)
    table = cpu_attention.exponent_table(bias.float(), scales.float())
    got = attend(scratch, table, qkv)
    expected = attention(qkv.double(), scales, bias)
    assert answers == [not falls_back]
    assert relative_rms(got.view(expected.shape), expected) <= 1e-5


def test_a_row_that_sees_opposite_keys_alone_is_computed_by_softmax(monkeypatch):
    """All that a mask leaves it lies far below the mean of its row: exponentials that underflow."""
    qkv, scales, bias = inputs(100.0, True, False, torch.float32)
    query = qkv[:, :1, 0].clone()
    qkv[:, :, 0] = query
    qkv[:, :8, 1] = 0.3 * query + (1 - 0.3**2) ** 0.5 * query.norm(dim=-1, keepdim=True) * orthogonal(query)
    qkv[:, 8:, 1] = -query
    answers = in_range(monkeypatch)
    scratch = cpu_attention.Scratch(2, GRID, TOKENS, HEADS, CHANNELS, torch.float32, torch.float32)
    table = cpu_attention.exponent_table(bias.float(), scales.float())
    got = attend(scratch, table, qkv)
    expected = attention(qkv.double(), scales, window_biases(bias))
    assert answers == [False]
    assert relative_rms(got.view(expected.shape), expected) <= 1e-5


def orthogonal(x):
    """Unit vectors at right angles to x."""
    other = x.roll(1, -1)
    other = other - (other * x).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True) * x
    return torch.nn.functional.normalize(other, dim=-1)


@pytest.mark.parametrize("scale", [2.0, 100.0])
def test_nan_stays_in_its_window(scale):
    qkv, scales, bias = inputs(scale, False, False)
    qkv[1, 3, 1, 0, 0] = math.nan
    scratch = cpu_attention.Scratch(2, GRID, TOKENS, HEADS, CHANNELS, torch.float64, torch.float64)
    table = cpu_attention.exponent_table(bias, scales)
    got = attend(scratch, table, qkv).view(-1, TOKENS, CHANNELS)
    expected = attention(qkv, scales, bias)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.allclose(got, expected, equal_nan=True)


@pytest.mark.parametrize("scale", [2.0, 100.0])
def test_zero_has_no_direction(scale):
    """A q and a k of zeros have cosines of 0, as by torch.nn.functional.normalize."""
    qkv, scales, bias = inputs(scale, False, False)
    qkv[1, 3, :2] = 0.0
    scratch = cpu_attention.Scratch(2, GRID, TOKENS, HEADS, CHANNELS, torch.float64, torch.float64)
    table = cpu_attention.exponent_table(bias, scales)
    got = attend(scratch, table, qkv)
    expected = attention(qkv, scales, bias)
    assert relative_rms(got.view(expected.shape), expected) <= 1e-12


def test_memory_is_given_back():
    """And taken again: another load finds its place, and answers as the first."""
    qkv, scales, bias = inputs(100.0, True, False, torch.bfloat16)
    table = cpu_attention.exponent_table(bias.float(), scales.float())
    scratch = cpu_attention.Scratch(2, GRID, TOKENS, HEADS, CHANNELS, torch.bfloat16, torch.float32)
    tensors = [x for x in vars(scratch).values() if isinstance(x, torch.Tensor)]
    large = [x for x in tensors if x.numel() >= qkv.numel() // 3]
    answers = []
    for _ in range(2):
        assert not any(x.untyped_storage().nbytes() for x in large)
        answers.append(attend(scratch, table, qkv).clone())
        scratch.release()
    assert len(large) >= 5
    assert torch.equal(*answers)
