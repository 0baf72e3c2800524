"""Window orders against the roll, pad and partition that define them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from swinfast.reference import ops

from swinfast import window_order
from swinfast.window_order import WindowOrder

CPU = torch.device("cpu")


@st.composite
def orders(draw, padded=None):
    window = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    if padded is False:
        size = tuple(w * draw(st.integers(1, 4)) for w in window)
    else:
        size = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    shift = tuple(draw(st.sampled_from([0, w // 2])) for w in window)
    return WindowOrder(size, window, shift)


def partitioned(order: WindowOrder) -> torch.Tensor:
    """Raster indices rolled, padded with -1 and partitioned, as the reference does it."""
    height, width = order.size
    tokens = torch.arange(height * width).view(1, height, width, 1).roll((-order.shift[0], -order.shift[1]), (1, 2))
    rows, columns = (g * w for g, w in zip(order.grid, order.window, strict=True))
    tokens = F.pad(tokens, (0, 0, 0, columns - width, 0, rows - height), value=-1)
    return ops.window_partition(tokens, order.window).flatten()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(orders())
def test_entering_and_leaving_any_order(order):
    expected = partitioned(order)
    entered = window_order.change(None, order, CPU)
    entered = torch.arange(order.size[0] * order.size[1]) if entered is None else entered
    padding = expected < 0
    assert torch.equal(entered[~padding], expected[~padding])
    assert torch.equal(window_order.pad_mask(order, CPU).flatten(), padding)
    assert order.padded == bool(padding.any())
    left = window_order.change(order, None, CPU)
    windows = torch.where(padding, -1, entered)
    assert torch.equal(windows if left is None else windows[left], torch.arange(order.size[0] * order.size[1]))
    if order.is_raster:
        assert torch.equal(expected, torch.arange(len(expected)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(orders(padded=False), st.booleans(), st.booleans())
def test_changing_between_orders(old, shift_rows, shift_columns):
    new = old._replace(shift=(shift_rows * (old.window[0] // 2), shift_columns * (old.window[1] // 2)))
    tokens = partitioned(old)
    index = window_order.change(old, new, CPU)
    assert torch.equal(tokens if index is None else tokens[index], partitioned(new))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(orders(padded=False), st.booleans())
def test_merging_into_an_order(order, raster):
    height, width = (2 * side for side in order.size)
    x = torch.arange(height * width).view(1, height, width, 1).float()
    neighbours = x.view(1, height // 2, 2, width // 2, 2, 1).permute(0, 1, 3, 4, 2, 5).flatten(3)  # as in timm
    tokens = neighbours.flatten(0, 2) if raster else neighbours.flatten(0, 2)[partitioned(order)]
    index = window_order.merge((height, width), None if raster else order, CPU)
    assert torch.equal(index.float(), tokens.flatten())


def test_index_tensors_are_made_once_and_serve_training_too():
    order = WindowOrder((14, 14), (7, 7), (3, 3))
    with torch.inference_mode():
        first = window_order.change(None, order, CPU)
    assert window_order.change(None, order, CPU) is first
    assert not first.is_inference()


@pytest.mark.parametrize("window", [(1, 1), (7, 7), (8, 4), (32, 32)], ids=str)
@pytest.mark.parametrize("axes", [(0, 0), (1, 0), (0, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("span", [None, (6, 3)], ids=["plain", "bounded"])
def test_bias_table_is_the_definition(window, axes, span):
    """The backend's table, from the distinct offsets, against reference.ops.cpb_bias."""
    from swinfast import torch_backend
    from swinfast.specs import BlockSpec

    torch.manual_seed(0)
    fc1, fc2 = torch.nn.Linear(2, 12).double(), torch.nn.Linear(12, 3).double()
    shift = tuple(w // 2 * axis for w, axis in zip(window, axes, strict=True))
    others = dict.fromkeys(BlockSpec._fields)
    own = {"window": window, "shift": shift, "num_heads": 3, "bias_fc1": fc1, "bias_fc2": fc2, "bias_span": span}
    block = BlockSpec(**others | own)
    with torch.no_grad():
        table = torch_backend._bias_table(block, torch.float64)
        expected = ops.cpb_bias(fc1.weight, fc1.bias, fc2.weight, fc2.bias, window, shift, span)
    assert table.dim() == (3 if shift == (0, 0) else 4)
    torch.testing.assert_close(table.expand_as(expected), expected, rtol=0, atol=2e-7 if span is None else 2e-6)
