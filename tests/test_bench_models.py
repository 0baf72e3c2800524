"""The script that measures whole models: what it runs, in which order, and what it says."""

import csv
from dataclasses import replace

import pytest
import torch
from helpers import OPTIONS, OPTIONS_OF_V2, images_for, make, relative_rms, small_model_args
from swinfast.kernels.configs import config

import swinfast
from bench import OUT_OF_TIME, batch, kernels, models, peers, peers_cpu, profile_cpu, profile_gpu, tune
from bench.models import tasks_in_order
from bench.peers import engines_named, sdpa_form
from swinfast.engines import Comparison, Engine, WrongAnswer

CPU = torch.device("cpu")


@pytest.fixture
def bench(timm, tmp_path, monkeypatch):
    """Runs the script on a small model; returns its status and the rows it wrote."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name: create("swinv2_cr_tiny_224", **small_model_args()))

    def run(*arguments: str):
        output = tmp_path / "rows.csv"
        status = models.main(["--device", "cpu", "--rounds", "1", "--output", str(output), *arguments])
        if not output.exists():
            return status, []
        with output.open(newline="", encoding="utf-8") as stream:
            return status, list(csv.DictReader(stream))

    return run


def test_rows_for_each_engine_dtype_and_batch_size(bench, capsys):
    chosen = ["--engines", "sdpa", "swinfast", "eager"]
    status, rows = bench("--models", "some", "--batch-sizes", "2", "3", "--dtypes", "float32", "bfloat16", *chosen)
    assert status == 0
    found = [(row["model"], row["dtype"], row["infer_batch_size"], row["engine"]) for row in rows]
    names = ("swinfast", "timm eager", "SDPA form")
    assert found == [("some", d, b, name) for d in ("float32", "bfloat16") for b in "23" for name in names]
    assert all(float(row["rel_error"]) < 0.1 and float(row["infer_samples_per_sec"]) > 0 for row in rows)
    assert len([line for line in capsys.readouterr().out.splitlines() if "images/s" in line]) == 12


def test_a_wrong_answer_has_no_row_and_the_rest_goes_on(bench, capsys, monkeypatch):
    measure = models.measure

    def wrong_at_2(plain, engines, dtype, batch, *args):
        if batch == 2:
            raise WrongAnswer("swinfast in float32 is wrong, so its speed means nothing: FAILED")
        return measure(plain, engines, dtype, batch, *args)

    monkeypatch.setattr(models, "measure", wrong_at_2)
    arguments = ("--batch-sizes", "2", "3", "--dtypes", "float32", "--engines", "swinfast", "eager")
    status, rows = bench(*arguments)
    assert status == 1
    assert [row["infer_batch_size"] for row in rows] == ["3", "3"]
    assert "batch 2, swinfast: swinfast in float32 is wrong" in capsys.readouterr().out


@pytest.mark.parametrize(("broken", "status"), [("timm eager", 0), ("swinfast", 1)])
def test_an_engine_that_fails_is_named(bench, capsys, monkeypatch, broken, status):
    def breaks(plain, dtype):
        raise RuntimeError("no luck")

    def named(*args):
        return [one._replace(build=breaks) if one.name == broken else one for one in engines_named(*args)]

    monkeypatch.setattr(models, "engines_named", named)
    arguments = ("--batch-sizes", "1", "--dtypes", "float32", "--engines", "swinfast", "eager")
    assert bench(*arguments)[0] == status
    assert f"batch 1, {broken}: left out: RuntimeError: no luck" in capsys.readouterr().out


def test_a_graph_that_failed_is_said(bench, capsys, monkeypatch):
    measure = models.measure

    def without_graph(*args):
        comparison = measure(*args)
        return Comparison([replace(one, graph_failure="no room") for one in comparison.measured])

    monkeypatch.setattr(models, "measure", without_graph)
    assert bench("--batch-sizes", "1", "--dtypes", "float32", "--engines", "swinfast")[0] == 0
    assert "%, without a CUDA graph, since capturing one failed: no room" in capsys.readouterr().out


def test_out_of_time(bench, capsys):
    status, rows = bench("--minutes", "0", "--batch-sizes", "1", "--dtypes", "float32", "--engines", "eager")
    assert (status, rows) == (OUT_OF_TIME, [])
    assert "out of time, left out: swinv2_cr_tiny_ns_224 float32 batch 1 (eager)" in capsys.readouterr().out


def test_a_file_that_does_not_fit_is_refused_before_anything_is_measured(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "measure", lambda *args: pytest.fail("measured"))
    (tmp_path / "rows.csv").write_text("a,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.csv is no table to add to"):
        bench()


@pytest.mark.parametrize("script", [profile_cpu, profile_gpu])
def test_profiles_refuse_such_a_file_too(tmp_path, monkeypatch, script):
    monkeypatch.setattr(profile_gpu, "resolve_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(profile_gpu, "provenance", lambda *args: {"device": "a card"})
    monkeypatch.setattr(profile_gpu, "Forward", lambda *args: pytest.fail("measured"))
    monkeypatch.setattr(profile_cpu, "measure", lambda *args: pytest.fail("measured"))
    (tmp_path / "rows.csv").write_text("a,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.csv is no table to add to"):
        script.main(["--output", str(tmp_path / "rows.csv")])


@pytest.mark.parametrize("wrong", ["0", "-1", "x"])
def test_batch_sizes_are_positive(bench, wrong):
    with pytest.raises(SystemExit) as stop:
        bench("--batch-sizes", wrong)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("script", "option", "wrong"),
    [
        (batch, "--images", "0"),
        (batch, "--memory", "-1"),
        (batch, "--rounds", "0"),
        (kernels, "--batch", "0"),
        (peers_cpu, "--batch-sizes", "-1"),
        (peers_cpu, "--rounds", "0"),
        (profile_cpu, "--batch-sizes", "0"),
        (profile_gpu, "--batch", "-1"),
        (tune, "--batch", "0"),
        (tune, "--candidates", "-3"),
    ],
)
def test_numbers_of_other_scripts_are_positive(script, option, wrong, capsys):
    with pytest.raises(SystemExit):
        script._parser().parse_args([option, wrong])
    assert f"argument {option}: must be whole numbers of at least 1, got '{wrong}'" in capsys.readouterr().err


def test_the_most_valuable_first():
    tasks = tasks_in_order(["m", "n"], ["float16", "float32"], [8, 1, 256], ["swinfast", "vit"], two_passes=True)
    core, everything = ("swinfast",), ("swinfast", "vit")
    first = [("float16", 256, core), ("float16", 1, core), ("float16", 256, everything), ("float16", 1, everything)]
    assert [task[1:] for task in tasks[:4]] == first
    assert [task[1:] for task in tasks[4:8]] == [("float32", *task[1:]) for task in first]
    assert [(task.batch, task.dtype) for task in tasks[8:12]] == [(8, "float16")] * 2 + [(8, "float32")] * 2
    assert {task.model for task in tasks[:12]} == {"m"} and {task.model for task in tasks[12:]} == {"n"}
    once = tasks_in_order(["m"], ["float16"], [8, 1], ["swinfast", "vit"], two_passes=False)
    assert [task[2:] for task in once] == [(1, everything), (8, everything)]


def test_engines_by_their_keys():
    for model in (*peers.EQUAL_TO_VIT, "swinv2_cr_base_224"):
        found = [one.label for one in engines_named(list(peers.ENGINES), model, CPU)]
        assert len(set(found)) == len(found) == (6 if "base" in model else 7)
        assert found[0] == "swinfast"
        assert any("vit" in label for label in found) == ("base" not in model)
    (verified,) = [one for one in engines_named(list(peers.ENGINES), "m", CPU) if one.verified]
    assert verified.name == "swinfast"
    (vit,) = engines_named(["vit"], peers.EQUAL_TO_VIT[0], CPU)
    assert isinstance(vit, Engine) and type(vit.plain).__name__ == "VisionTransformer"


@pytest.mark.parametrize(
    "option",
    [
        "square",
        "not square",
        "shift on one axis",
        "window for each stage",
        "extra norms",
        "not square, V2",
        "no qkv bias, V2",
        "windows of another size in training, V2",
    ],
)
def test_sdpa_form_is_the_model(timm, option):
    source, options = ("timm, V2", OPTIONS_OF_V2) if "V2" in option else ("timm", OPTIONS)
    options = options[option.removesuffix(", V2")]
    plain = make(timm, options, source)
    images = images_for(options, 3).double()
    assert relative_rms(sdpa_form(plain, torch.float64)(images), plain.double()(images)) < 1e-6  # rounded coordinates


def test_sdpa_form_calls_it(timm, monkeypatch):
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[3]) or attention(*a, **k)
    )
    plain = make(timm, OPTIONS["square"], "timm")
    sdpa_form(plain, torch.float32)(images_for(OPTIONS["square"], 2))
    assert len(calls) == 4 and all(mask is not None for mask in calls)


def test_a_slow_dtype_is_not_measured_unasked(monkeypatch):
    for native, expected in ((False, ("float32",)), (True, ("float32", "bfloat16"))):
        monkeypatch.setattr(models, "has_native_bfloat16", lambda native=native: native)
        options = models._with_defaults(models._parser().parse_args([]), CPU)
        assert options.dtypes == expected
        assert options.output.name == "cpu.csv"


def test_profile_knows_the_operators_of_a_forward(timm):
    """Every part that it names takes time, and what it does not name computes little."""
    plain = make(timm, OPTIONS["square"], "timm")
    rows = profile_cpu.measure(swinfast.optimize(plain), plain, torch.float32, batch=2, rounds=2)
    shares = {row["part"]: row["share"] for row in rows}
    assert shares.keys() == {profile_cpu.WHOLE, profile_cpu.PRODUCTS, profile_cpu.REST, *profile_cpu.PARTS.values()}
    assert all(row["calls"] >= 1 for row in rows[2:])
    assert sum(row["share"] for row in rows[2:]) == pytest.approx(1, abs=0.01)


def test_the_timeline_of_a_gpu():
    kernels = [profile_gpu.Kernel("a", 0.0, 4.0), profile_gpu.Kernel("b", 5.0, 2.0), profile_gpu.Kernel("a", 6.5, 1.0)]
    rows = list(profile_gpu.rows_of(kernels))
    assert [row["gap_us"] for row in rows] == [0.0, 1.0, -0.5]
    assert profile_gpu.summary(rows) == {"forward": 7.5, "a": 5.0, "b": 2.0}
    assert rows[0].keys() <= set(profile_gpu.COLUMNS)


def test_overlapped_kernels_of_a_timeline():
    """Those of the tables, but for what the library computes and what is no kernel."""
    choose = profile_gpu.overlapped("sm_90", "float16")
    chosen = choose("norm_residual", {"channels": 384, "in_parts": 0, "rows": 256})
    table = config("norm_residual", "sm_90", "float16", channels=384, in_parts=0, rows=256)
    assert chosen.blocks == table.blocks | {"OVERLAPPED": True} and chosen[1:3] == table[1:3]
    assert choose("linear", {"k": 384, "n": 384, "gelu": 0, "rows": 1 << 16}).blocks == {"use": "library"}


def test_how_long_the_host_takes():
    waited = []
    returns, answers = profile_gpu.of_the_host(lambda: None, lambda: waited.append(1))
    assert 0 < returns <= answers
    assert len(waited) == 2 * profile_gpu.CALLS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_timeline_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        profile_gpu.main([])
    assert "this needs a GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [[], ["--overlapped"]])
def test_a_timeline(tmp_path, capsys, options):
    output = tmp_path / "profile.csv"
    assert profile_gpu.main(["--model", "small", "--output", str(output), *options]) == 0
    assert "_patch_embed_kernel" in output.read_text(encoding="utf-8")
    assert "forward: " in capsys.readouterr().out
