"""The kernels in Gluon, for sm_90: on a GPU, or what they compute without one (gluon_emulator)."""

from contextlib import contextmanager
from unittest import mock

import gluon_emulator
import pytest
import torch
from kernel_helpers import (
    DEVICE,
    DTYPES,
    assert_empty_batch,
    assert_fails,
    assert_images_apart,
    assert_repeatable,
    check,
    extreme_tokens,
    mutant,
)
from swinfast.kernels import (
    attention_block,
    attention_warpgroups,
    configs,
    launch,
    mlp_block,
    mlp_warpgroups,
    tiles,
    warpgroups,
)
from swinfast.kernels import windows as windows_module
from swinfast.kernels.launch import arch_of
from test_attention_block import arguments as attention_arguments
from test_attention_block import reference as attention_reference
from test_mlp_block import arguments as mlp_arguments
from test_mlp_block import reference as mlp_reference
from triton.experimental.gluon._runtime import GluonJITFunction

from bench import sanitize
from bench.candidates import WARPGROUPS

pytestmark = [
    pytest.mark.skipif(DEVICE.type == "cuda" and arch_of(DEVICE) != "sm_90", reason="needs sm_90"),
    *([pytest.mark.gpu] if DEVICE.type == "cuda" else []),
]
MLPS = {  # shape of x, hidden, second norm, warps
    "tiny": ((2, 9, 16, 96), 384, False, 4),
    "second norm": ((600, 96), 384, True, 16),
    "whole blocks": ((2, 64, 32), 64, True, 4),
    "few": ((5, 64), 32, False, 4),
}
ATTENTIONS = {  # batch, map, window, shift, heads; their channels are 32 each
    "tiny": (2, (14, 21), (7, 7), (0, 0), 3),
    "shifted": (2, (14, 21), (7, 7), (3, 3), 3),
    "padded": (1, (16, 20), (7, 7), (3, 3), 2),
    "one window": (3, (8, 8), (8, 8), (0, 0), 1),
    "not square": (1, (9, 16), (5, 8), (0, 4), 3),
    "smaller than its window": (1, (3, 9), (7, 7), (3, 3), 2),
}
each_16_bit = pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)


@pytest.fixture(autouse=True)
def emulator(monkeypatch):
    if DEVICE.type == "cpu":
        monkeypatch.setattr(GluonJITFunction, "__getitem__", gluon_emulator.getitem)


@contextmanager
def two_units(warps=4, **blocks):
    """Programs so few that each has more than one block of rows or window."""
    chosen = configs.Config({"use": "warpgroups"} | blocks, warps, 1, "a test")
    with mock.patch.object(launch, "units", lambda device: 2), configs.override(lambda kernel, shape: chosen):
        yield


def mlp(case, dtype):
    """Arguments, and how many warps; an eps of the second norm that 16 bits tell from the first's."""
    *case, warps = case
    args = mlp_arguments(*case, dtype)
    return args | ({"extra_eps": 0.3} if "extra_eps" in args else {}), warps


def head_channels(case, dtype):
    batch, size, window, shift, heads = case
    return attention_arguments(batch, size, window, shift, heads, 32, dtype)


@each_16_bit
@pytest.mark.parametrize("name", MLPS)
def test_mlp(name, dtype):
    args, warps = mlp(MLPS[name], dtype)
    with two_units(warps):
        check(mlp_block.mlp_block, mlp_reference, args, dtype)


@pytest.mark.parametrize(("chunk", "wide"), [(64, 32), (32, 64), (128, 128), (64, 128)])
@pytest.mark.parametrize("name", ["tiny", "second norm"])
def test_wider_products(name, chunk, wide):
    """128 columns for 96 channels, of which some are no channels."""
    args, warps = mlp(MLPS[name], torch.float16)
    with two_units(min(warps, 8), CHUNK=chunk, WIDE=wide):
        check(mlp_block.mlp_block, mlp_reference, args, torch.float16)


@each_16_bit
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name, joined, dtype):
    with two_units(**{"JOINED": 1} if joined else {}):
        check(attention_block.attention_block, attention_reference, head_channels(ATTENTIONS[name], dtype), dtype)


@each_16_bit
@pytest.mark.filterwarnings("ignore:overflow")
def test_extremes(dtype):
    args = mlp_arguments((4, 32), 64, True, dtype)
    args["x"][0] = 0
    args["x"][1] = 6e4 * args["x"][1].sign() * 2e-3
    with two_units():
        check(mlp_block.mlp_block, mlp_reference, args, dtype)
        args = extreme_tokens(head_channels(ATTENTIONS["padded"], dtype))
        check(attention_block.attention_block, attention_reference, args, dtype)


def test_runs_and_rows_are_independent():
    rows = mlp_arguments((3, 50, 64), 64, True, torch.float16)
    windows = head_channels((3, (9, 10), (7, 7), (3, 3), 1), torch.float16)
    with two_units():
        for op, args in ((mlp_block.mlp_block, rows), (attention_block.attention_block, windows)):
            assert_repeatable(op, args)
            assert_images_apart(op, args, "x")
            assert_empty_batch(op, args, "x")


class Both(torch.nn.Module):
    """Two halves of a block, of the images that are to be kept: a graph does not know how many."""

    def __init__(self, rows, windows):
        super().__init__()
        self.rows, self.windows = rows, windows

    def forward(self, x, keep=None):
        x = attention_block.attention_block(**self.windows | {"x": x if keep is None else x[keep]})
        return mlp_block.mlp_block(**self.rows | {"x": x})


def test_any_number_of_images_is_traced():
    rows = mlp_arguments((2, 9, 10, 32), 64, False, torch.float16)
    windows = head_channels((3, (9, 10), (7, 7), (3, 3), 1), torch.float16)
    both, x = Both(rows, windows), windows["x"]
    with two_units(), torch.no_grad():
        exported = torch.export.export(both, (x, torch.tensor([True, False, True], device=DEVICE))).module()
        for keep in ([True] * 3, [False, True, False]):
            keep = torch.tensor(keep, device=DEVICE)
            assert torch.equal(exported(x, keep), both(x, keep))


def test_any_number_of_images_is_exported():
    """One image, too, from an example that has more windows than there are programs."""
    rows = mlp_arguments((2, 9, 10, 32), 64, False, torch.float16)
    windows = head_channels((3, (9, 10), (7, 7), (3, 3), 1), torch.float16)
    both, x = Both(rows, windows), windows["x"]
    sizes = {"x": {0: torch.export.Dim("batch", min=1, max=4096)}, "keep": None}
    with two_units(), mock.patch.object(launch, "units", lambda device: 5), torch.no_grad():
        exported = torch.export.export(both, (x,), {"keep": None}, dynamic_shapes=sizes, strict=True).module()
        for batch in (1, 3):
            assert torch.equal(exported(x[:batch], keep=None), both(x[:batch]))


def test_the_sanitizer_is_shown_every_form(monkeypatch):
    """Of two blocks, with a shift and a second norm and without."""
    monkeypatch.setattr(warpgroups, "INTERPRETED", False)
    monkeypatch.setattr(launch, "units", lambda device: 1)
    launched = []
    real = sanitize.launch_all
    monkeypatch.setattr(sanitize, "launch_all", lambda cases, device: launched.extend(cases) or real(cases, device))
    assert sanitize.warpgroups(["float16", "float32"], "sm_90", DEVICE) == (len(launched), [])
    seen = {(case.operation, case.shape) for _, case in launched}
    assert len(seen) == 4 and len(launched) == 2 * sum(map(len, WARPGROUPS.values()))


def test_names_of_channels():
    """Eight channels side by side are what a thread of a product has of a row: two in each eight columns."""
    channel = gluon_emulator.emulated(warpgroups.channel_of, gluon_emulator.Language(0, 1, 4))
    columns = torch.arange(32)
    assert channel(columns).tolist() == [8 * q + 2 * j + b for j in range(4) for q in range(4) for b in range(2)]
    renamed = gluon_emulator.emulated(warpgroups.renamed, gluon_emulator.Language(0, 1, 4))
    assert torch.equal(renamed(columns), channel(columns)) and torch.equal(renamed(renamed(columns)), columns)
    assert torch.equal(renamed(columns.expand(16, 32)), channel(columns).expand(16, 32))


def test_what_fits():
    """Weights in a multiprocessor's 227 KB: once for an MLP, with 128 columns in place of 96 and whole tiles of so many
    hidden units, twice for attention with its keys and values."""
    takes = ((96, 384), (96, 512), (96, 640), (128, 384), (128, 512), (96, 288), (44, 128))
    assert [mlp_warpgroups.fits(*sizes) for sizes in takes] == [True, True, False, True, False, False, False]
    assert [attention_warpgroups.fits(*sizes) for sizes in ((96, 3, 64), (128, 4, 64), (96, 6, 64), (96, 3, 16))] == [
        True, False, False, False,
    ]  # fmt: skip


def test_who_has_them(monkeypatch):
    """Tensors of the same 16-bit dtype, on sm_90, and not in Triton's interpreter."""
    monkeypatch.setattr(warpgroups, "INTERPRETED", False)
    monkeypatch.setattr(warpgroups, "arch_of", lambda device: "sm_90")
    half, single, bfloat = (torch.empty(1, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.bfloat16))
    device = half.device
    assert warpgroups.has_warpgroups(device, half, half) and warpgroups.has_warpgroups(device, bfloat, bfloat)
    assert not warpgroups.has_warpgroups(device, single, half) and not warpgroups.has_warpgroups(device, single, single)
    monkeypatch.setattr(warpgroups, "INTERPRETED", True)
    assert not warpgroups.has_warpgroups(device, half, half)
    monkeypatch.setattr(warpgroups, "INTERPRETED", False)
    monkeypatch.setattr(warpgroups, "arch_of", lambda device: "sm_100")
    assert not warpgroups.has_warpgroups(device, half, half)


# fmt: off
MLP_MUTANTS = {
    "residual left out": ("tiny", mlp_warpgroups, "add_rows(layer_norm(sums, norm_weight, norm_bias, eps, C), tiles)",
                          "layer_norm(sums, norm_weight, norm_bias, eps, C)"),
    "no second norm": ("second norm", mlp_warpgroups, "if EXTRA_NORM:", "if False:"),
    "second norm with the first's eps":
        ("second norm", mlp_warpgroups, "extra_bias, extra_eps, C", "extra_bias, eps, C"),
    "rows not masked": ("second norm", mlp_warpgroups, "BLOCK_M + row < rows", "BLOCK_M + row < rows - 1"),
    "the last block left out": ("tiny", mlp_warpgroups, "gl.cdiv(rows, BLOCK_M)", "rows // BLOCK_M"),
    "one block a program": ("tiny", mlp_warpgroups, "gl.cdiv(rows, BLOCK_M)", "gl.num_programs(0)"),
    "the first rows again": ("tiny", mlp_warpgroups, "place = block.to", "place = gl.program_id(0).to"),
    "one chunk of hidden units": ("tiny", mlp_warpgroups, "range(len(fc1))", "range(1)"),
    "weights of the first chunk": ("tiny", mlp_warpgroups, "fc2[chunk]", "fc2[0]"),
    "hidden bias of the first chunk": ("tiny", mlp_warpgroups, "fc1_bias + chunk * CHUNK", "fc1_bias"),
    "no GELU": ("tiny", mlp_warpgroups, "gelu(hidden, False)", "hidden"),
    "columns not named": ("tiny", warpgroups, "channel_of(n % WIDTH)", "(n % WIDTH)"),
    "rows not named": ("tiny", warpgroups, "tile = renamed(gl.load(rows", "tile = (gl.load(rows"),
    "vectors not named": ("tiny", warpgroups, "renamed(numbers.to(gl.float32))", "numbers.to(gl.float32)"),
    "results not named": ("tiny", warpgroups, "renamed(tiles[i].to(rows", "(tiles[i].to(rows"),
    "weights not named": ("tiny", warpgroups, "shared_layout(COLUMNS), renamed(tile)", "shared_layout(COLUMNS), tile"),
    "norm's weight left out": ("tiny", warpgroups, "* w[None, :] + b", "+ b"),
    "weights of another run": ("tiny", warpgroups, "n // WIDTH * STEP", "n // WIDTH * 0"),
    "vectors of another run": ("tiny", warpgroups, "column // WIDTH * STEP", "column // WIDTH * 0"),
    "no channels not masked": ("tiny", warpgroups, "mask=(n < MOST)[:, None]", "mask=(n < ROWS)[:, None]"),
    "runs swapped": ("tiny", warpgroups, "in_runs(left) + in_runs(right)", "in_runs(right) + in_runs(left)"),
    "another eps": ("tiny", tiles, "squares / C + eps", "squares / C + 1e-2"),
    "mean left in": ("tiny", tiles, "tiles[i] - mean[:, None]", "tiles[i]"),
    "a tile's squares left out":
        ("tiny", tiles, "squares += tl.sum(deviations[i]", "squares += 0 * tl.sum(deviations[i]"),
}
JOINED_MUTANTS = {
    "parts of another head":
        ("tiny", attention_warpgroups, "held(qkv_weight, C, head * WIDTH, i", "held(qkv_weight, C, 0, i"),
    "parts side by side": ("tiny", attention_warpgroups, "3 * WIDTH, C)", "3 * WIDTH, WIDTH)"),
    "biases side by side": ("tiny", attention_warpgroups, "2 * WIDTH, C))", "2 * WIDTH, WIDTH))"),
    "bias of v in vain": ("tiny", attention_warpgroups, "PADDED_WIDTH, 2 * WIDTH, C)", "PADDED_WIDTH, WIDTH, C)"),
    "k in the place of q": ("tiny", attention_warpgroups, "q, k, v, _ = in_runs", "k, q, v, _ = in_runs"),
}
ATTENTION_MUTANTS = JOINED_MUTANTS | {
    "another head's weights": ("tiny", attention_warpgroups, "weights[head], places", "weights[0], places"),
    "another head's share of the projection": ("tiny", attention_warpgroups, "weights[head][1]", "weights[0][1]"),
    "another head's bias": ("tiny", attention_warpgroups, "qkv_bias + head * WIDTH", "qkv_bias"),
    "another head's scale": ("tiny", attention_warpgroups, "logit_scale + head", "logit_scale"),
    "another head's position bias": ("tiny", attention_warpgroups, "biases + head * (64 * 64)", "biases"),
    "another type of window": ("shifted", attention_warpgroups, "* (HEADS * 64 * 64)", "* 0"),
    "the next head's place": ("tiny", attention_warpgroups, "places[0].permute", "places[1].permute"),
    "q not of unit length":
        ("tiny", attention_warpgroups, "reciprocal_length(q) *", "(reciprocal_length(q) * 0 + 0.1) *"),
    "k not of unit length": ("tiny", attention_warpgroups, "(k * reciprocal_length(k)[:, None])", "k"),
    "no bias of v": ("tiny", attention_warpgroups, " + vector(qkv_bias + 2 * C)[None, :]", ""),
    "no bias of k": ("tiny", attention_warpgroups, "begun(qkv_bias + C)", "begun(qkv_bias)"),
    "no share": ("tiny", attention_warpgroups, "* share[:, None]", "* 1.0"),
    "bias transposed":
        ("tiny", attention_warpgroups, "permute([1, 5, 2, 0, 4, 3, 6])", "permute([0, 4, 3, 1, 5, 2, 6])"),
    "residual left out":
        ("tiny", attention_warpgroups, "add_rows(layer_norm(done, norm_weight, norm_bias, eps, C), tiles)",
         "layer_norm(done, norm_weight, norm_bias, eps, C)"),
    "the first image again": ("tiny", attention_warpgroups, "(task // windows).to(gl.int64)", "0"),
    "images skipped": ("tiny", attention_warpgroups, "images * windows, gl", "windows, gl"),
    "windows of another row": ("tiny", attention_warpgroups, "window_column = task % windows_w", "window_column = 0"),
    "padded tokens not masked": ("padded", windows_module, "if PADDED:", "if False:"),
    "no projection bias": ("tiny", attention_warpgroups, "begun(proj_bias", "begun(norm_bias"),
    "one head": ("tiny", attention_warpgroups, "for head in gl.static_range(HEADS):\n            attended",
                 "for head in gl.static_range(1):\n            attended"),
}
# fmt: on


@pytest.mark.skipif(DEVICE.type == "cuda", reason="mutants are for CPUs")
@pytest.mark.parametrize("name", MLP_MUTANTS)
def test_mlp_mutants_fail(name, tmp_path):
    case, *change = MLP_MUTANTS[name]
    args, warps = mlp(MLPS[case], torch.float16)
    wrong = mutant(tmp_path, mlp_block, *change)
    with two_units(warps, CHUNK=64 if warps == 4 else 32, WIDE=64 if warps == 4 else 32):
        assert_fails(wrong.mlp_block, mlp_reference, args, torch.float16)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="mutants are for CPUs")
@pytest.mark.parametrize("name", ATTENTION_MUTANTS)
def test_attention_mutants_fail(name, tmp_path):
    case, *change = ATTENTION_MUTANTS[name]
    wrong = mutant(tmp_path, attention_block, *change)
    with two_units(**{"JOINED": 1} if name in JOINED_MUTANTS else {}):
        args = head_channels(ATTENTIONS[case], torch.float16)
        assert_fails(wrong.attention_block, attention_reference, args, torch.float16)
