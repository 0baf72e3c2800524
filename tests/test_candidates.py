"""Which configurations the tuning sweep tries."""

import pytest
from swinfast.kernels.configs import NO_SIZES, Config, config, tile

from bench.candidates import GRIDS, LIBRARY, REGISTERS, candidates


@pytest.mark.parametrize("kernel", GRIDS)
def test_candidates(kernel):
    """All distinct, the present one first, and each of powers of two that the tables' rules allow."""
    sizes = {
        "k": 384,
        "n": 1536,
        "channels": 96,
        "tokens": 49,
        "block_d": 32,
        "stream_bytes": 2,
        "gelu": 1,
        "in_parts": 0,
        "held": 0,
        "rows": 1 << 20,
    }
    present = config(kernel, "sm_90", "float16", **sizes)
    found = candidates(kernel, sizes, "float16", present, "sm_90", 1000)
    assert found[0] is present
    assert len({tile(one) for one in found}) == len(found) >= 9
    optional = {"TILE", "IMAGES", "PER_UNIT", "AHEAD", *NO_SIZES}
    keys = {frozenset(one.blocks.keys() - optional) for one in found if one is not LIBRARY}
    assert keys == {frozenset(present.blocks.keys() - optional)}
    assert (LIBRARY in found) == (kernel == "linear")
    assert candidates(kernel, sizes, "float16", present, "sm_90", 5) == found[:6]


@pytest.mark.parametrize(
    ("kernel", "sizes", "wanted"),
    [
        ("linear", {"k": 384, "n": 1536, "gelu": 1, "rows": 1 << 16}, "128x128x64 w4 s3 p2"),
        ("linear", {"k": 384, "n": 1536, "gelu": 1, "rows": 256}, "64x64x128 w4 s3"),  # as it is
        ("linear", {"k": 384, "n": 1536, "gelu": 1, "rows": 256}, "64x64x128 w4 s3 o"),
        ("linear", {"k": 384, "n": 1536, "gelu": 1, "rows": 256}, "library w4 s1"),
        ("linear", {"k": 384, "n": 384, "gelu": 0, "rows": 256}, "32x64x128 w4 s3 o"),
        ("norm_residual", {"channels": 384, "in_parts": 0, "rows": 256}, "1 w2 s1 o"),
        ("norm_residual", {"channels": 384, "in_parts": 1, "rows": 256}, "1x512 w8 s1 o"),
        ("norm_residual", {"channels": 768, "in_parts": 1, "rows": 64}, "1x1024 w16 s1 o"),
        ("mlp_parts", {"channels": 384, "stream_bytes": 2}, "64x128x128x128 w4 s3"),
        ("mlp_parts", {"channels": 384, "stream_bytes": 2}, "32x64x128x128 w4 s3"),
        (
            "attention_parts",
            {"channels": 768, "tokens": 64, "block_d": 32, "stream_bytes": 2, "rows": 64},
            "128x64 w4 s3",
        ),
        (
            "attention_parts",
            {"channels": 768, "tokens": 64, "block_d": 32, "stream_bytes": 2, "rows": 64},
            "128x128 w8 s3",
        ),
        ("window_attention", {"tokens": 49, "block_d": 32}, "64x64x8 w4 s3 o"),
        ("mlp_block", {"channels": 96, "stream_bytes": 2, "rows": 1 << 16}, "128x32 w4 s2"),
        ("mlp_block", {"channels": 96, "stream_bytes": 2, "held": 1, "rows": 1 << 16}, "warpgroups w16 s1"),
        ("mlp_block", {"channels": 96, "stream_bytes": 2, "held": 1, "rows": 1 << 20}, "warpgroupsx128x128 w8 s1"),
        ("mlp_block", {"channels": 192, "stream_bytes": 2, "rows": 1 << 20}, "128x32x2 w8 s3"),
        ("mlp_block", {"channels": 192, "stream_bytes": 2, "rows": 1 << 20}, "128x64x2 w8 s3"),
        ("linear_norm_residual", {"channels": 192, "k": 192, "stream_bytes": 2, "rows": 1 << 20}, "128x64 w4 s3"),
        ("attention_block", {"channels": 192, "tokens": 64, "stream_bytes": 2}, "- w4 s1"),
        ("window_attention", {"tokens": 49, "block_d": 32}, "64x64x4 w4 s3"),
        ("window_attention", {"tokens": 49, "block_d": 32}, "64x64x8 w4 s3 r96"),
        ("mlp_block", {"channels": 96, "stream_bytes": 2, "rows": 1 << 16}, "64x32 w4 s2 r96"),
    ],
)
def test_promising_candidates_are_tried(kernel, sizes, wanted):
    present = config(kernel, "sm_90", "float16", **sizes)
    assert wanted in [tile(one) for one in candidates(kernel, sizes, "float16", present, "sm_90")]


def test_limits_of_registers():
    """Around the present choice alone: those of its warps, and none where it has one; never on AMD's."""
    sizes = {"channels": 96, "stream_bytes": 2, "rows": 1 << 16}
    present = config("mlp_block", "sm_90", "float16", **sizes)
    blocks = {name: size for name, size in present.blocks.items() if name != "maxnreg"}

    def limits(limit, arch="sm_90"):
        own = present._replace(blocks=blocks | limit)
        tried = candidates("mlp_block", sizes, "float16", own, arch, 1000)[1:]
        near = [one for one in tried if one.blocks.items() >= blocks.items() and one[1:3] == own[1:3]]
        assert all(one in near for one in tried if "maxnreg" in one.blocks)
        return {one.blocks.get("maxnreg") for one in near if not {"TILE", "AHEAD", "OVERLAPPED"} & one.blocks.keys()}

    assert limits({}) == set(REGISTERS[4])
    assert limits({"maxnreg": 96}) == {None, 128, 168}
    assert limits({}, "gfx942") == set()


@pytest.mark.parametrize(("arch", "rows", "expected"), [("sm_90", 256, {None, True}), ("sm_89", 256, {None})])
def test_few_rows_are_tried_overlapped(arch, rows, expected):
    """With and without, where launching takes as long as computing; on GPUs that can."""
    tried = linear_candidates(arch, rows)
    assert {one.blocks.get("OVERLAPPED") for one in tried if not {"use", "maxnreg"} & one.blocks.keys()} == expected


def test_many_rows_are_tried_overlapped_once():
    present = config("linear", "sm_90", "float16", k=384, n=1536, gelu=1, rows=1 << 16)
    overlapped = [one for one in linear_candidates("sm_90", 1 << 16) if "OVERLAPPED" in one.blocks]
    assert [one[:3] for one in overlapped] == [(present.blocks | {"OVERLAPPED": True}, *present[1:3])]


def test_an_overlapped_choice_is_tried_without():
    sizes = {"channels": 384, "in_parts": 0, "rows": 256}
    present = Config({"BLOCK_M": 2}, 1, 1, "a test")
    overlapped = present._replace(blocks=present.blocks | {"OVERLAPPED": True})
    tried = candidates("norm_residual", sizes, "float16", overlapped, "sm_90")
    assert present[:3] in [one[:3] for one in tried[1:]]


def linear_candidates(arch: str, rows: int) -> list[Config]:
    sizes = {"k": 384, "n": 1536, "gelu": 1, "rows": rows}
    present = config("linear", arch, "float16", **sizes)
    return candidates("linear", sizes, "float16", present, arch, 1000)[1:]


def test_implausible_candidates_are_not():
    def tiles(kernel, precision="float16", **sizes):
        present = config(kernel, "sm_90", precision, **sizes)
        return [one.blocks for one in candidates(kernel, sizes, precision, present, "sm_90", 1000)[1:]]

    many = {"gelu": 1, "rows": 1 << 20}
    narrow = [blocks for blocks in tiles("linear", k=96, n=288, **many) if "use" not in blocks]
    assert {blocks["BLOCK_N"] for blocks in narrow} == {32, 64, 128}  # 256 would waste 224 columns
    assert all(blocks["BLOCK_K"] <= 64 for blocks in tiles("patch_embed", channels=96, k=48, rows=1 << 20))
    assert all(blocks["BLOCK_M"] <= 64 for blocks in tiles("patch_embed", channels=96, k=48, rows=64))
    attention = tiles("window_attention", tokens=49, block_d=32)
    assert all(max(blocks["BLOCK_M"], blocks["BLOCK_N"]) <= 64 for blocks in attention)
    wide = tiles("linear_norm_residual", channels=64, k=256, stream_bytes=2, rows=1 << 20)
    assert max(blocks["BLOCK_K"] for blocks in wide) == 128  # of k, not of the channels
    heads = tiles("attention_parts", channels=96, tokens=64, block_d=32, stream_bytes=2, rows=4096)
    assert max(max(blocks["BLOCK_K"], blocks["BLOCK_N"]) for blocks in heads) == 128
    fits = [len(tiles("linear", precision, k=384, n=1536, **many)) for precision in ("float32", "float16")]
    assert fits[0] < fits[1]  # shared memory
    assert any("PER_UNIT" in blocks for blocks in tiles("linear", k=384, n=1536, **many))
    for kernel, sizes in (("mlp_block", {}), ("attention_block", {"tokens": 64})):
        whole = {"channels": 96, "stream_bytes": 2, "rows": 1 << 20} | sizes
        for held in (0, 1):  # the table's row, where all weights fit, is one of them
            present = config(kernel, "sm_90", "float16", **whole, held=held)
            found = candidates(kernel, whole | {"held": held}, "float16", present, "sm_90", 1000)
            assert any(one.blocks.get("use") == "warpgroups" for one in found) == held
    few = {"gelu": 1, "rows": 256}
    assert not any("PER_UNIT" in blocks for blocks in tiles("linear", k=384, n=1536, **few))  # nothing to go on to
    assert not any("PER_UNIT" in blocks for blocks in tiles("linear", "float32", k=384, n=1536, **many))
