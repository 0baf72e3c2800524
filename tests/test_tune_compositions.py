"""The compositions of blocks that the tuner compares: in whole forwards, and by the times of their kernels."""

import importlib
import json
import math

import pytest
import torch

from bench import alone, forms, in_forward, peaks, tune
from bench.cases import FORMS, MODELS, Wrong, cases_of, choose_forms, model_named
from bench.targets import Log, find_targets
from swinfast import graphs, plan

ABOUT = {"device": "a card", "torch": "1", "triton": "2", "source": "measured", "commit": "a commit"}
CPU = torch.device("cpu")


def calls_of(monkeypatch, *names: str) -> list[str]:
    """What kernels are launched, by name, from now on; they compute nothing where the interpreter would."""
    launched: list[str] = []
    for name in names:
        module = importlib.import_module(f"swinfast.kernels.{name}")

        def launch(kernel, programs, x, *args, launch=module.launch, name=name, **options):
            launched.append(name)
            if x.is_meta:
                launch(kernel, programs, x, *args, **options)

        monkeypatch.setattr(module, "launch", launch)
    return launched


OPERATIONS = ("attention_block", "attention_parts", "linear_norm_residual", "mlp_block", "mlp_parts", "norm_residual",
              "qkv_attention", "window_attention")  # fmt: skip


@pytest.fixture
def compositions(monkeypatch, tmp_path):
    """Compares compositions of the small model's blocks by a timer that goes by the kernels of a forward."""
    launched = calls_of(monkeypatch, *OPERATIONS, "linear", "merge_norm", "patch_embed")
    forward = in_forward.Forward("small", 1, "float16", CPU)

    def compare(us_of, check=lambda self, cases, choose: None, deadline=float("inf"), resume=False):
        def timer(function, rep=0):
            launched.clear()
            function()
            return 1e-6 * us_of(launched)

        monkeypatch.setattr(in_forward.Forward, "check", check)
        log = Log(tmp_path / "log.jsonl", ABOUT, resume, "in a forward")
        return list(in_forward.Compositions("sm_90", timer, None, log, deadline).rows([forward])), log

    return compare


def test_compositions_in_a_forward(compositions):
    """Those that win are rows for few rows, each compared in a forward in which only its blocks are others."""
    slow = lambda launched: sum(launched.count(one) for one in ("attention_parts", "qkv_attention"))  # noqa: E731
    rows, log = compositions(lambda launched: 1000 - 4 * launched.count("mlp_block") + 0.2 * slow(launched))
    found = {(row["kernel"], row["when"]["channels"], row["blocks"]["use"]): row for row in rows}
    assert set(found) == {("mlp_half", 32, "mlp_block"), ("mlp_half", 64, "mlp_block")}  # two blocks each
    row = found["mlp_half", 32, "mlp_block"]
    assert row["when"] == {"channels": 32, "tokens": 16, "rows_max": 256}
    assert row["source"].endswith("small batch 1, float16: 992.8 us in a forward against 1000.8 us of mlp_parts")
    entries = [json.loads(line) for line in log.file.read_text(encoding="utf-8").splitlines()]
    assert {entry["outcome"] for entry in entries} == {"timed", "final"}
    entries = [entry for entry in entries if entry["outcome"] == "timed"]
    halves = {(entry["what"], entry["config"]) for entry in entries}
    for channels, rows in ((32, 256), (64, 64)):
        attention = f"attention_half and projection channels={channels} tokens=16 rows={rows} float16 small"
        tried = {config for what, config in halves if what == f"{attention} in a forward"}
        ends = ("linear_norm_residual", "linear")
        expected = {f"{half} {end}" for half in ("qkv_attention", "window_attention") for end in ends}
        assert tried == expected | {"attention_parts linear_norm_residual"}  # after which nothing else can come


def test_what_is_found_in_forwards_holds_for_as_few_rows(tmp_path):
    """However many they are: at batch 8 the first stage has more rows than what counts as few elsewhere."""
    targets = find_targets(["small"], 32, ["float16"], "sm_90", ["merge_norm", "mlp_block"])
    target = max(targets, key=lambda target: dict(target.sizes)["rows"])
    rows = dict(target.sizes)["rows"]
    final = tune.Final(target.present, 1.0, 2.0, True, [1.0])
    assert rows > 4096
    when = [tune.row_of(target, final, ABOUT, "small", where)["when"] for where in ("in a forward", "")]
    assert when[0]["rows_max"] == rows and "rows_max" not in when[1]
    model = model_named("small")
    few, many = (forms.kinds_of(model, 32, "float16", "sm_90", few)[0] for few in (True, None))
    assert few.rows == many.rows > 4096
    halves = [{half for half, _ in forms.options_of(kind, forms.HALVES[0])} for kind in (few, many)]
    few_rows = {"attention_parts", "qkv_attention", "window_attention"}  # and parts are for few alone
    assert halves == [few_rows, {"attention_block", "qkv_attention", "window_attention"}]
    for kind, most in ((few, few.rows), (many, None)):
        (found,) = forms.rows_of(kind, forms.HALVES[1], ("mlp_block", kind.present["mlp_output"]), "float16", "a test")
        assert found["when"].get("rows_max") == most


def test_a_composition_must_win_by_a_share_of_the_forward(compositions):
    assert not compositions(lambda launched: 1000 - 1.4 * launched.count("mlp_block"))[0]


def test_compositions_of_windows_that_are_no_tile():
    """Neither attention_block nor qkv_attention takes 144 tokens: they are no options, and no rows come of them."""
    for few in (True, False):
        kinds = forms.kinds_of(model_named("swinv2_cr_tiny_384"), 1, "float16", "sm_90", few)
        assert {kind.tokens for kind in kinds} == {144}
        for kind in kinds:
            assert {half for half, _ in forms.options_of(kind, forms.HALVES[0])} == {"window_attention"}


def test_the_table_of_biases_stays_as_the_tables_have_it():
    """What is checked, and compiled ahead, is what a forward runs: attention by heads with either layout."""
    cases = cases_of(model_named("swinv2_cr_tiny_ns_224"), 1, "float16", "sm_90", choose_forms(FORMS["heads"]))
    layouts = {
        (case.arguments["x"].shape[-1], case.arguments["table"].dim())
        for case in cases
        if case.operation == "qkv_attention"
    }
    assert layouts == {(96, 5), (192, 4), (384, 4), (768, 4)}


def test_compositions_are_compared_once(compositions, monkeypatch):
    """With --resume those whose best is in use are known; a row that is not in the table yet is found again."""
    tried = []
    original = in_forward.Forward.launches
    monkeypatch.setattr(in_forward.Forward, "launches", lambda self, choose: tried.append(1) or original(self, choose))
    faster = lambda launched: 1000 - 4 * launched.count("mlp_block")  # noqa: E731
    rows, _ = compositions(faster)
    first = len(tried)
    assert len(rows) == 2 and first > 4
    again, _ = compositions(faster, resume=True)
    assert again == rows
    assert 0 < len(tried) - first < first  # the halves in which nothing won are not compared again


def test_each_models_blocks_are_compared(monkeypatch, tmp_path):
    """Also those that have as many channels and rows as another model's, in other windows or not."""
    monkeypatch.setitem(MODELS, "wider", MODELS["small"] | {"window_size": 8})
    monkeypatch.setitem(MODELS, "deeper", MODELS["small"] | {"depths": (4, 4)})
    monkeypatch.setattr(in_forward.Forward, "_optimised", lambda self: None)
    monkeypatch.setattr(in_forward.Forward, "cases", lambda self, arch, choose: [])
    monkeypatch.setattr(in_forward.Forward, "launches", lambda self, choose: lambda: None)
    log = Log(tmp_path / "log.jsonl", ABOUT, False, "in a forward")
    names = ("small", "wider", "deeper")
    forwards = [in_forward.Forward(name, 1, "float16", CPU) for name in names]
    assert not list(in_forward.Compositions("sm_90", lambda launch, rep: 1e-6, None, log, math.inf).rows(forwards))
    finals = [entry["final"]["what"] for entry in log.known.values()]
    assert [sum(f" {name} " in what for what in finals) for name in names] == [4, 4, 4]


def test_nothing_is_found_where_the_present_composition_fails(compositions):
    def check(self, cases, choose):
        if not any(case.operation == "mlp_block" for case in cases):
            raise RuntimeError("out of resource: shared memory")

    rows, log = compositions(lambda launched: 1000 - 4 * launched.count("mlp_block"), check)
    assert not rows
    assert not any("timed" in entry["outcome"] for entries in log.known.values() for entry in entries.values())


def test_a_context_that_is_lost_while_compositions_are_timed(compositions):
    """The comparison is not tried again."""

    def lost(launched):
        raise RuntimeError("CUDA error: misaligned address")

    found = 0
    while True:
        try:
            rows, _ = compositions(lost, resume=True)
            break
        except alone.Crashed:
            found += 1
    assert not rows and found == 4  # two halves of two kinds


def test_what_was_checked_is_known_by_its_configuration(monkeypatch):
    monkeypatch.setattr(in_forward.Forward, "_optimised", lambda self: None)
    checked = []
    monkeypatch.setattr(in_forward.Oracle, "check", lambda self, got: checked.append(1))
    forward = in_forward.Forward("small", 1, "float16", CPU)
    cases = [case for case in forward.cases("sm_90", lambda kernel, shape: None) if case.operation == "merge_norm"]
    other = [
        case._replace(launch=case.launch._replace(config=case.launch.config._replace(num_warps=8))) for case in cases
    ]
    for given in (cases, cases, other):
        forward.check(given, lambda kernel, shape: None)
    assert len(checked) == 2 * len(cases) > 0


def test_compositions_are_compiled_ahead(compositions, monkeypatch):
    compiled = []
    monkeypatch.setattr(in_forward, "compile_all", lambda cases, *_: compiled.extend(case.operation for case in cases))
    compositions(lambda launched: 1000)
    assert {"mlp_block", "qkv_attention", "window_attention"} <= set(compiled)


def test_compositions_that_fail_are_left_out(compositions):
    def check(self, cases, choose):
        if any(case.operation == "mlp_block" for case in cases):
            raise Wrong("rms error 1 is above 0")

    rows, log = compositions(lambda launched: 1000 - 4 * launched.count("mlp_block"), check)
    assert not rows
    outcomes = [entry["outcome"] for entry in map(json.loads, log.file.read_text(encoding="utf-8").splitlines())]
    assert outcomes.count("wrong: rms error 1 is above 0") == 2
    assert set(outcomes) == {"timed", "final", "wrong: rms error 1 is above 0"}


def test_a_forward_whose_kernel_fails_is_made_anew(monkeypatch):
    """Else it would go on without the kernel, and what is timed next would be something else."""
    launched = calls_of(monkeypatch, *OPERATIONS, "linear", "merge_norm", "patch_embed")
    forward = in_forward.Forward("small", 1, "float16", CPU)
    module = importlib.import_module("swinfast.kernels.merge_norm")
    working, failures = module.launch, [RuntimeError("out of resource: shared memory")]

    def failing_once(*args, **options):
        if failures:
            raise failures.pop()
        working(*args, **options)

    monkeypatch.setattr(module, "launch", failing_once)
    with pytest.raises((UserWarning, RuntimeError), match="out of resource"):
        forward.launches(lambda kernel, shape: None)
    launch = forward.launches(lambda kernel, shape: None)
    launched.clear()
    launch()
    assert launched.count("merge_norm") == 1


def test_a_forward_is_captured_without_what_is_derived_of_weights(monkeypatch):
    """As in a graph of swinfast's own: tables are made once, not at each replay."""
    launched = calls_of(monkeypatch, *OPERATIONS, "linear", "merge_norm", "patch_embed", "cpb_bias")
    forward = in_forward.Forward("small", 1, "float16", CPU)
    assert "cpb_bias" in launched

    def capture(function, device):
        for module in (graphs, plan):
            monkeypatch.setattr(module, "is_capturing", lambda device: True)
        launched.clear()
        return function(), None

    monkeypatch.setattr(peaks, "capture", capture)
    monkeypatch.setattr(
        in_forward, "launches_of", lambda function, _: peaks.launches_of(function, torch.device("cuda"))
    )
    forward.launches(lambda kernel, shape: None)
    assert launched.count("merge_norm") == 1 and "patch_embed" in launched
    assert "cpb_bias" not in launched


def test_a_forward_whose_kernel_never_runs_is_none(monkeypatch, tmp_path, capsys):
    """Else the other kernels would be judged by forwards without it, and its candidates by ones without them."""

    def failing(*args, **options):
        raise RuntimeError("out of resource: shared memory")

    calls_of(monkeypatch, *OPERATIONS, "linear", "patch_embed")
    monkeypatch.setattr(importlib.import_module("swinfast.kernels.merge_norm"), "launch", failing)
    said = "small batch 1 float16 fails as the tables have it: .*out of resource: shared memory"
    with pytest.raises(in_forward.Failing, match=said):
        in_forward.Forward("small", 1, "float16", CPU)
    table = tmp_path / "table.json"
    assert tune.main(["--in-forward", "--table", str(table), "--log", str(tmp_path / "log.jsonl")]) == 1
    assert "--no-in-forward finds what runs" in capsys.readouterr().out
    assert not table.exists()


def test_a_composition_that_loses_the_context_is_not_tried_again(compositions):
    def check(self, cases, choose):
        if any(case.operation == "mlp_block" for case in cases):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    slow = lambda launched: 1000  # noqa: E731
    for _ in range(2):  # once for each number of channels
        with pytest.raises(alone.Crashed):
            compositions(slow, check, resume=True)
    rows, log = compositions(slow, check, resume=True)
    assert not rows
    assert "mlp_block" not in {config for entries in log.known.values() for config in entries if "timed" in config}


def test_no_composition_is_tried_after_the_deadline(compositions, capsys):
    rows, log = compositions(lambda launched: 1000, deadline=0)
    assert not rows and not log.file.exists()
    assert "out of time: not every composition was tried" in capsys.readouterr().out


def times_of(fused: float, other: float, batch: int = 256, by_heads: float | None = None) -> dict:
    """Kernels for whole halves of a block, those of heads (by default as long as two others), and others."""
    model, us = model_named("small"), {}
    by_heads = 2 * other if by_heads is None else by_heads
    names = {"attention_block": fused, "mlp_block": fused, "attention_parts": by_heads, "qkv_attention": by_heads}
    for choice in (None, *map(choose_forms, FORMS.values())):
        for case in cases_of(model, batch, "float16", "sm_90", choice):
            us[case.key] = names.get(case.operation, other)
    return us


def test_compositions():
    """On sm_90 attention in windows of 16 tokens is apart, and the MLP is fused."""
    found = forms.form_rows(["small"], 256, "float16", "sm_90", times_of(1, 10), ABOUT)
    assert {(one["kernel"], one["when"]["channels"], one["blocks"]["use"]) for one in found} == {
        ("attention_half", 32, "attention_block"),
        ("attention_half", 64, "attention_block"),
    }
    assert "0.033 of the kernels' time of window_attention and linear_norm_residual" in found[0]["source"]
    assert found[0]["when"] == {"channels": 32, "tokens": 16}
    found = forms.form_rows(["small"], 256, "float16", "sm_90", times_of(100, 10), ABOUT)
    assert {(one["kernel"], one["blocks"]["use"]) for one in found} == {("mlp_half", "linear")}
    assert not forms.form_rows(["small"], 256, "float16", "sm_90", times_of(30, 10), ABOUT)[2:]
    assert not forms.form_rows(["small"], 256, "float16", "sm_90", {}, ABOUT)


def test_compositions_for_few_rows():
    """They hold for few rows, where attention can only be what takes the same table as for many."""
    found = forms.form_rows(["small"], 2, "float16", "sm_90", times_of(1, 10, batch=2), ABOUT)
    assert {(one["kernel"], one["blocks"]["use"]) for one in found} == {("mlp_half", "mlp_block")}
    assert {(one["when"]["channels"], one["when"]["rows_max"]) for one in found} == {(32, 512), (64, 128)}
    found = forms.form_rows(["small"], 2, "float16", "sm_90", times_of(100, 10, batch=2, by_heads=21), ABOUT)
    assert {(one["kernel"], one["blocks"]["use"]) for one in found} == {("attention_half", "window_attention")}


def test_a_composition_must_win_by_more_than_two_percent():
    us = times_of(29.7, 10)  # three kernels of 10 against one
    assert not [
        one
        for one in forms.form_rows(["small"], 256, "float16", "sm_90", us, ABOUT)
        if one["kernel"] == "attention_half"
    ]
