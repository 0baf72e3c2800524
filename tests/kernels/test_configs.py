"""The tables of configurations, and how one is chosen."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from swinfast.kernels import configs
from swinfast.kernels.configs import FOLDER, Config, columns, config, override
from swinfast.kernels.gate import ARCHS
from swinfast.kernels.stages import BOTH_LAYOUTS, forms_of
from swinfast.kernels.windows import LARGEST_TILE

PRECISIONS = ("float16", "bfloat16", "float32", "tf32")
BLOCKS = {
    "linear": {"BLOCK_M", "BLOCK_N", "BLOCK_K"},
    "linear_norm_residual": {"BLOCK_M", "BLOCK_K"},
    "norm_residual": {"BLOCK_M"},
    "mlp_parts": {"BLOCK_M", "BLOCK_HIDDEN", "BLOCK_K", "BLOCK_N"},
    "attention_parts": {"BLOCK_K", "BLOCK_N"},
    "mlp_block": {"BLOCK_M", "BLOCK_HIDDEN"},
    "patch_embed": {"BLOCK_M", "BLOCK_K"},
    "merge_norm": {"BLOCK_M"},
    "window_attention": {"BLOCK_M", "BLOCK_N"},
    "attention_block": set(),
    "qkv_attention": {"BLOCK_K"},
}
OPTIONAL = {  # and what has a value by default
    "linear_norm_residual": {"TILE"},
    "norm_residual": {"TILE"},
    "mlp_block": {"TILE", "AHEAD"},
    "attention_block": {"TILE"},
    "window_attention": {"IMAGES"},
    "linear": {"PER_UNIT"},
}
FORMS = {  # parts of a stage, and the kernels that can compute them
    "attention_half": {"attention_block", "attention_parts", "qkv_attention", "window_attention"},
    "projection": {"linear", "linear_norm_residual"},
    "mlp_half": {"linear", "mlp_block", "mlp_parts"},
    "mlp_output": {"linear", "linear_norm_residual"},
}
SHAPES = {  # what a kernel's rows are matched by
    "linear": {"k", "n", "gelu", "rows"},
    "linear_norm_residual": {"channels", "k", "stream_bytes", "rows"},
    "norm_residual": {"channels", "in_parts", "rows"},
    "mlp_block": {"channels", "stream_bytes", "rows", "held"},
    "mlp_parts": {"channels", "stream_bytes"},
    "patch_embed": {"channels", "k", "rows"},
    "merge_norm": {"channels", "rows"},
    "window_attention": {"tokens", "block_d"},
    "attention_block": {"channels", "tokens", "stream_bytes", "rows", "held"},
    "qkv_attention": {"channels", "tokens", "block_d", "stream_bytes", "rows"},
    "attention_parts": {"channels", "tokens", "block_d", "stream_bytes", "rows"},
    **{form: {"channels", "tokens", "rows"} for form in FORMS},
}
TABLES = {
    "sm_1": [
        {"kernel": "one", "precision": ["float16"], "when": {"k": 8}, "blocks": {"BLOCK": 1}, "source": "a number"},
        {"kernel": "one", "precision": ["float16"], "when": {"k": [9, 10]}, "blocks": {"BLOCK": 2}, "source": "a list"},
        {"kernel": "one", "precision": ["float16"], "when": {"k_max": 20, "n": 1}, "num_warps": 8, "source": "at most"},
    ],
    "default": [
        {"kernel": "two", "precision": ["float16"], "source": "another kernel"},
        {"kernel": "one", "precision": ["float16"], "num_stages": 3, "source": "any shape"},
        {"kernel": "one", "precision": ["float16"], "source": "never: the row before comes first"},
    ],
}


@pytest.mark.parametrize(
    "arch, shape, source",
    [
        ("sm_1", {"k": 8, "n": 1}, "a number"),
        ("sm_1", {"k": 10, "n": 1}, "a list"),
        ("sm_1", {"k": 20, "n": 1}, "at most"),
        ("sm_1", {"k": 21, "n": 1}, "any shape"),
        ("sm_1", {"k": 20, "n": 2}, "any shape"),
        ("sm_2", {"k": 8, "n": 1}, "any shape"),
    ],
)
def test_first_row_that_matches(monkeypatch, arch, shape, source):
    monkeypatch.setattr(configs, "rows", lambda table: TABLES.get(table, []))
    chosen = config("one", arch, "float16", **shape)
    assert chosen.source == source
    expected = {"at most": ({}, 8, 1), "any shape": ({}, 4, 3), "a list": ({"BLOCK": 2}, 4, 1)}
    assert source == "a number" or chosen[:3] == expected[source]


def test_no_configuration():
    with pytest.raises(KeyError, match=r"no configuration of linear for float64 on sm_90 with {'k': 8, 'n': 8}"):
        config("linear", "sm_90", "float64", k=8, n=8)


def test_attention_for_few_rows_takes_the_table_that_many_have():
    """Of a form that doesn't take both layouts, the tables can't speak for few rows alone."""
    uses = {"attention_half": {"many": "attention_block", "few": "window_attention"}}

    def choose(kernel, shape):
        use = uses.get(kernel, {}).get("few" if shape.get("rows", 0) < 1000 else "many")
        return use and Config({"use": use}, 4, 1, "a test")

    with override(choose):
        for few, expected in (("window_attention", "attention_block"), *((one, one) for one in BOTH_LAYOUTS)):
            uses["attention_half"]["few"] = few
            found = [forms_of(96, (7, 7), torch.float16, torch.device("meta"), rows) for rows in (64, 1 << 20)]
            assert [forms.attention_half for forms in found] == [expected, "attention_block"]


def test_override():
    wanted, asked = Config({"BLOCK_M": 16}, 1, 1, "a test"), []

    def choose(kernel, shape):
        asked.append((kernel, shape))
        return wanted if kernel == "norm_residual" else None

    usual = config("norm_residual", "sm_90", "float16", channels=96, in_parts=0, rows=64)
    with override(choose):
        assert config("norm_residual", "sm_90", "float16", channels=96, in_parts=0, rows=64) is wanted
        assert config("linear", "sm_90", "float16", k=96, n=96, gelu=0, rows=64).source != "a test"
        with override(lambda kernel, shape: None):
            assert config("norm_residual", "sm_90", "float16", channels=96, in_parts=0, rows=64) == usual
        assert config("norm_residual", "sm_90", "float16", channels=96, in_parts=0, rows=64) is wanted
    assert config("norm_residual", "sm_90", "float16", channels=96, in_parts=0, rows=64) == usual
    assert asked[:2] == [
        ("norm_residual", {"channels": 96, "in_parts": 0, "rows": 64}),
        ("linear", {"k": 96, "n": 96, "gelu": 0, "rows": 64}),
    ]


@pytest.mark.parametrize(
    ("blocks", "options", "text"),
    [
        ({"BLOCK_M": 16, "BLOCK_K": 32}, {}, "16x32 w2 s3"),
        ({}, {}, "- w2 s3"),
        ({"BLOCK_M": 16, "maxnreg": 96}, {"maxnreg": 96}, "16 w2 s3 r96"),
        ({"OVERLAPPED": True, "BLOCK_M": 16}, {"launch_pdl": True}, "16 w2 s3 o"),
        ({"BLOCK_M": 16, "PER_UNIT": 2, "BLOCK_K": 32, "maxnreg": 96}, {"maxnreg": 96}, "16x32 w2 s3 p2 r96"),
        ({"BLOCK_M": 16, "maxnreg": 96, "OVERLAPPED": True}, {"maxnreg": 96, "launch_pdl": True}, "16 w2 s3 r96 o"),
    ],
)
def test_options(blocks, options, text):
    chosen = Config(blocks, 2, 3, "a test")
    assert chosen.options == {"num_warps": 2, "num_stages": 3} | options
    assert configs.tile(chosen) == text


def is_power_of_two(size: int) -> bool:
    return size > 0 and size & (size - 1) == 0


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_tables(file):
    assert file.stem in (*ARCHS, "default")
    for row in json.loads(file.read_text(encoding="utf-8")):
        assert row.keys() <= {"kernel", "precision", "when", "blocks", "num_warps", "num_stages", "source"}, row
        assert set(row["precision"]) <= set(PRECISIONS), row
        assert {key.removesuffix("_max") for key in row.get("when", {})} <= SHAPES[row["kernel"]], row
        assert row["source"].strip(), row
        if row["kernel"] in FORMS:
            assert row["blocks"].keys() == {"use"}, row
            assert row["blocks"]["use"] in FORMS[row["kernel"]], row
            if row["blocks"]["use"] in ("attention_block", *BOTH_LAYOUTS):  # a window is one tile there
                tokens = row["when"].get("tokens", row["when"].get("tokens_max"))
                assert max(tokens if isinstance(tokens, list) else [tokens]) <= LARGEST_TILE, row
        elif row["kernel"] == "linear" and "use" in row["blocks"]:
            assert row["blocks"] == {"use": "library"}, row
        elif row["blocks"].get("use") == "warpgroups":
            optional = {"mlp_block": {"CHUNK", "WIDE"}, "attention_block": {"JOINED"}}[row["kernel"]]
            assert row["blocks"].keys() - optional == {"use"}, row
            assert row["when"].get("held") == 1 and file.stem == "sm_90", row
            assert row["num_warps"] in ((4, 8, 16) if row["kernel"] == "mlp_block" else (4,)), row
        else:
            blocks = dict(row["blocks"])
            if "maxnreg" in blocks:  # an option of NVIDIA's compiler
                assert file.stem.startswith("sm_"), row
                assert blocks.pop("maxnreg") in range(24, 256, 8), row
            if "OVERLAPPED" in blocks:  # older GPUs start a kernel when the one before it is done
                assert file.stem in ("sm_90", "sm_100"), row
                assert blocks.pop("OVERLAPPED") is True, row
            optional = OPTIONAL.get(row["kernel"], set())
            assert blocks.keys() - optional == BLOCKS[row["kernel"]], row
            assert all(is_power_of_two(size) for size in blocks.values()), row
            assert row["num_warps"] in (1, 2, 4, 8, 16), row
            assert 1 <= row["num_stages"] <= 8, row


@pytest.mark.parametrize("arch", [*ARCHS, "sm_120"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_shape_has_a_configuration(arch, precision):
    for kernel, names in SHAPES.items():
        for size in (1, 44, 96, 768, 5000):
            config(kernel, arch, precision, **dict.fromkeys(names, size))


@pytest.mark.parametrize("arch", [*ARCHS, "sm_86"])
@pytest.mark.parametrize("half, parts", [("attention_half", "attention_parts"), ("mlp_half", "mlp_parts")])
def test_parts_are_for_the_fewest_rows(arch, half, parts):
    """As rows grow there is a number from which on they are chosen no more; and only where a cache has room for any.

    Where others were measured to be faster, they are not chosen at all.
    """
    chosen = False
    for channels in (96, 128, 192, 256, 384, 512, 768, 1024):
        uses = [
            config(half, arch, "float16", channels=channels, tokens=49, rows=1 << power).blocks["use"]
            for power in range(20)
        ]
        few = [use == parts for use in uses]
        assert few == sorted(few, reverse=True), (channels, uses)
        chosen |= any(few)
    assert chosen == (arch not in ("sm_86", "gfx942"))


@settings(derandomize=True, database=None, deadline=None)
@given(st.integers(1, 4096))
def test_columns(channels):
    tile, count = columns(channels)
    assert is_power_of_two(tile) and tile >= 16
    assert 1 <= count <= 3
    assert tile * count >= channels
    assert tile * (count - 1) < channels  # no tile is wasted
    assert tile * count <= max(16, 2 * channels - 1)


@pytest.mark.parametrize(
    "channels, expected",
    [(1, (16, 1)), (16, (16, 1)), (44, (16, 3)), (88, (32, 3)), (96, (32, 3)), (128, (128, 1)), (192, (64, 3)),
     (352, (128, 3)), (512, (512, 1)), (1536, (512, 3)), (4096, (4096, 1))],
)  # fmt: skip
def test_columns_of_the_models(channels, expected):
    assert columns(channels) == expected
