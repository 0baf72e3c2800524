"""Timing takes turns, and what is shown of results is what was measured."""

import copy
import csv
import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import small_model_args
from torch.utils.flop_counter import FlopCounterMode

from bench import peers_cpu
from swinfast.benchmark import Timing, cache_size, compare, copies_beyond_cache, randomise, rotating

ROOT = Path(__file__).parents[1]


def test_candidates_take_turns():
    calls = []
    timings = compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert set(timings) == {"a", "b"}
    assert all(0 < timing.median <= timing.p95 for timing in timings.values())


def test_timing_of_known_seconds():
    timing = Timing.of([3.0, 1.0, 2.0, 100.0, *([2.0] * 16)])
    assert timing == Timing(median=2.0, p95=3.0)


def test_inputs_rotate():
    seen = []
    call = rotating(seen.append, [(1,), (2,), (3,)])
    for _ in range(4):
        call()
    assert seen == [1, 2, 3, 1]


def test_copies_are_larger_than_the_cache():
    device = torch.device("cpu")
    size = cache_size(device)
    assert size >= 1 << 20
    assert copies_beyond_cache(size // 10, device) * (size // 10) >= 2 * size - 10
    assert copies_beyond_cache(100 * size, device) == 2


@pytest.fixture
def peers(timm, monkeypatch, tmp_path):
    """Runs the script on a small model, with peers that stand in for others; gives its status and the rows."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name: create("swinv2_cr_tiny_224", **small_model_args()))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: None)

    def run(*options: str, openvino=None, onnxruntime=None) -> tuple[int, list[dict[str, str]]]:
        monkeypatch.setattr(peers_cpu, "_openvino", openvino)
        monkeypatch.setattr(peers_cpu, "_onnxruntime", onnxruntime)
        output = tmp_path / "rows.csv"
        status = peers_cpu.main(["--batch-sizes", "2", "--rounds", "1", "--output", str(output), *options])
        with output.open(newline="", encoding="utf-8") as stream:
            return status, list(csv.DictReader(stream))

    return run


def test_peers_on_a_cpu(peers, capsys):
    """Errors stand beside speeds; a peer that fails or is wrong is named, and the floor has no answers."""

    def breaks(file, dtype):
        raise OSError("no such file")

    def wrong(file, dtype):
        return lambda images: torch.full((len(images), 10), torch.nan)

    engines = [name for name in peers_cpu.ENGINES if name != peers_cpu.COMPILED]
    status, rows = peers("--dtypes", "float32", "--engines", *engines, openvino=breaks, onnxruntime=wrong)
    assert status == 0
    assert [row["engine"] for row in rows] == ["timm eager", "swinfast", peers_cpu.PRODUCTS]
    assert all(float(row["infer_samples_per_sec"]) > 0 and row["rounds"] == "1" for row in rows)
    assert [bool(row["rel_error"]) for row in rows] == [True, True, False]
    assert len({row["date"] for row in rows}) == 1 and len(rows[0]["date"]) == len("2026-01-31T12:00:00")
    said = capsys.readouterr().out
    assert "batch 2, OpenVINO: left out: OSError: no such file" in said
    assert "batch 2, ONNX Runtime: left out: relative RMS error nan at batch 2" in said


def test_peers_are_judged_by_weights_of_their_dtype(peers):
    """By those before they were rounded the exact answers would be off by as much as a plain model's."""

    def exact(file, dtype):
        model = copy.deepcopy(plain[0]).to(dtype).double()
        return lambda images: model(images.double())

    plain = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers_cpu, "randomise", lambda model: plain.append(randomise(model)) or model)
        status, rows = peers("--dtypes", "bfloat16", "--engines", "OpenVINO", "swinfast", openvino=exact)
    assert status == 0
    assert {row["engine"]: float(row["rel_error"]) < 1e-12 for row in rows} == {"swinfast": False, "OpenVINO": True}


def test_what_is_missing_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else "found")
    for dtype, expected in (("float32", ["ONNX Runtime"]), ("bfloat16", [])):  # which ONNX Runtime has not
        engines = peers_cpu.engines_for(["ONNX Runtime", "OpenVINO"], dtype, 1, tmp_path)
        assert [engine.name for engine in engines] == expected
        assert capsys.readouterr().out == "OpenVINO is left out: pip install 'swinfast[peers]'\n"


def test_products_are_those_of_the_model(timm):
    model = randomise(timm.create_model("swinv2_cr_tiny_ns_224", num_classes=0)).eval()
    run = peers_cpu.products(model, torch.float64, 1)  # which nothing packs, so that PyTorch can count
    with FlopCounterMode(display=False) as ours, torch.inference_mode():
        run()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.randn(1, 3, 224, 224))
    heads = [(block.attn.meta_mlp.fc1.out_features, block.attn.num_heads) for s in model.stages for block in s.blocks]
    bias = sum(2 * 49**2 * (2 * hidden + hidden * count) for hidden, count in heads)
    assert ours.get_total_flops() == pytest.approx(counter.get_total_flops() - bias, rel=1e-6)
