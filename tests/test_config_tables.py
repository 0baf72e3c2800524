"""The tables of configurations as files: measured rows among predicted ones."""

import json

import pytest
from swinfast.kernels import configs
from swinfast.kernels.configs import FOLDER, config

from bench import config_tables


def row(kernel="linear", precision=("float16",), source="", **when) -> dict:
    return {"kernel": kernel, "precision": list(precision), "when": when, "source": source}


def test_measured_rows_come_first():
    rows = [row("norm_residual", channels=8), row(k=8, source="old"), row(k_max=99)]
    merged = config_tables.merge(rows, [row(k=8, n=16, source="one"), row(k=8, n=32, source="two"), row("mlp_block")])
    assert merged == [rows[0], row(k=8, n=16, source="one"), row(k=8, n=32, source="two"), *rows[1:], row("mlp_block")]
    assert config_tables.merge(rows, [row("mlp_half", channels=8)])[0]["kernel"] == "mlp_half"


def test_rows_for_few_stay_before_those_for_any_number():
    few, any_number = row(k=8, rows_max=64), row(k=8, source="any")
    assert config_tables.merge([few], [any_number]) == [few, any_number]
    old = row(k_max=99, source="old")
    assert config_tables.merge([old, few], [any_number]) == [few, any_number, old]
    assert config_tables.merge([any_number], [few]) == [few, any_number]
    assert config_tables.merge([few], [row(k=8, rows_max=64, source="new")]) == [row(k=8, rows_max=64, source="new")]


def test_rows_for_fewer_come_earlier():
    """Else what was measured at batch 8 would hide what was measured at batch 1."""
    eight, one, any_number = row(k=8, rows_max=4096), row(k=8, rows_max=512), row(k=8, source="any")
    assert config_tables.merge([any_number, one], [eight]) == [one, eight, any_number]
    assert config_tables.merge([eight, any_number], [one]) == [one, eight, any_number]
    assert config_tables.merge([], [eight, any_number, one]) == [one, eight, any_number]
    other = row("mlp_half", channels=8)
    assert config_tables.merge([other, one, any_number], [eight]) == [other, one, eight, any_number]


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_tables_have_rows_for_fewer_earlier(file):
    """So that a row which tuning adds changes the order of no others."""
    rows: dict[str, list[float]] = {}
    for one in json.loads(file.read_text(encoding="utf-8")):
        rows.setdefault(one["kernel"], []).append(config_tables.most_rows(one))
    assert all(found == sorted(found) for found in rows.values())


def test_rows_that_nothing_reaches_are_dropped():
    old = row(precision=("float16", "float32"), k=8, n=[16, 32], source="old")
    one, two = row(k=8, n=16), row(k=8, n=32)
    assert config_tables.merge([old], [one]) == [one, old]
    assert config_tables.merge([old], [one, two]) == [one, two, old | {"precision": ["float32"]}]
    old = row("mlp_block", channels=96)
    both = [row("mlp_block", channels=96, stream_bytes=size) for size in (2, 4)]
    assert config_tables.merge([old], both[:1]) == [both[0], old]
    assert config_tables.merge([old], both) == both
    assert config_tables.merge([row(k_max=64)], [row(k=64)]) == [row(k=64), row(k_max=64)]


def test_what_few_rows_have_stays():
    """A measured row for any number of rows, in an architecture's table, would hide the default table's for few."""
    default = [
        row(k_max=8, rows_max=64, source="few"),
        row(k_max=16, rows_max=256, source="more"),
        row(k_max=99, precision=("float16", "float32"), rows_max=1024, source="wide"),
        row(source="any"),
        row("mlp_half", rows_max=64),
    ]
    both = ("float16", "bfloat16")
    found = config_tables.kept([], default, [row(k=16, precision=both)])
    expected = [
        row(k=16, rows_max=most, source=source) for most, source in ((64, "more"), (256, "more"), (1024, "wide"))
    ]
    assert found == expected
    assert config_tables.kept([row(k=16, rows_max=256)], default, [row(k=16)]) == expected[2:]  # which has its own
    assert config_tables.kept([row(k_max=99)], default, [row(k=16)]) == []  # hidden before
    assert config_tables.kept([], default, [row(k=16, rows_max=64), row(k=100), row("merge_norm", k=16)]) == []


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_tables_keep_their_looks(file):
    text = file.read_text(encoding="utf-8")
    assert config_tables.render(config_tables.merge(json.loads(text), [])) == text


def test_a_written_table_is_used(monkeypatch, tmp_path):
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    configs.forget()
    try:
        wanted = row("norm_residual", channels=96, source="new") | {"blocks": {"BLOCK_M": 32}, "num_warps": 1}
        few = row("norm_residual", rows_max=64, source="few")
        (tmp_path / "default.json").write_text(json.dumps([few]))
        with pytest.raises(KeyError):
            config("norm_residual", "sm_90", "float16", channels=96, rows=65)
        config_tables.update(tmp_path / "sm_90.json", [wanted])
        assert config("norm_residual", "sm_90", "float16", channels=96, rows=65) == ({"BLOCK_M": 32}, 1, 1, "new")
        assert config("norm_residual", "sm_90", "float16", channels=96, rows=64).source == "few"
    finally:
        monkeypatch.undo()
        configs.forget()
