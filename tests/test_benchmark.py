"""Timing takes turns, and what is shown of results is what was measured."""

import copy
from pathlib import Path

import pytest
import torch
from helpers import small_model_args
from torch.utils.flop_counter import FlopCounterMode

import swinfast
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


def test_peers_on_a_cpu(timm, monkeypatch, tmp_path):
    """Every engine's error stands beside its speed; the products alone are those of the model."""
    model = randomise(timm.create_model("swinv2_cr_tiny_224", **small_model_args())).eval()
    engines = {"timm eager": model, "swinfast": swinfast.optimize(model), "wrong": lambda x: model(x) + 1}
    monkeypatch.setattr(peers_cpu, "engines_for", lambda *_: engines)
    images = torch.randn(8, 3, *model.img_size)
    oracle = copy.deepcopy(model).double()(images.double()).detach()
    options = peers_cpu._parser().parse_args(["--rounds", "3"])
    measured = peers_cpu.measure(model, "small", torch.float32, 2, images, oracle, tmp_path, options)
    rows = {row["engine"]: row for row in measured}
    assert {row["rounds"] for row in measured} == {3}
    assert float(rows["swinfast"]["rel_error"]) < 1e-5 < 0.1 < float(rows["wrong"]["rel_error"])
    assert rows["swinfast"]["top1_agreement"] == 1
    assert "rel_error" not in rows[peers_cpu.PRODUCTS]


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
