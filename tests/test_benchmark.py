"""Timing takes turns, and what is shown of results is what was measured."""

import copy
import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import small_model_args
from torch.utils.flop_counter import FlopCounterMode

import swinfast
from bench import models, peers_cpu, readme
from swinfast.benchmark import Timing, compare, randomise

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


def test_a_measurement_has_a_speed_and_an_error_for_each_engine(tmp_path):
    model = randomise(swinfast.create_model("swinv2_cr_tiny_224", **small_model_args())).eval()
    rows = models.measure(model, "small", torch.float32, 2, torch.device("cpu"), rounds=2)
    for row in rows:
        models.append(tmp_path / "new/results.csv", row)
    with (tmp_path / "new/results.csv").open(newline="") as stream:
        written = list(csv.DictReader(stream))
    assert [row["engine"] for row in written] == ["timm eager", "swinfast"]
    for row in written:
        assert list(row) == list(models.COLUMNS)
        assert float(row["infer_samples_per_sec"]) == pytest.approx(2e3 / float(row["infer_step_time"]), rel=0.05)
        assert 0 < float(row["rel_error"]) < 1e-4
        assert row["torch"] == torch.__version__


def test_no_speed_for_a_wrong_answer(monkeypatch):
    model = randomise(swinfast.create_model("swinv2_cr_tiny_224", **small_model_args())).eval()
    optimise = swinfast.optimize

    def wrong(*arguments, **keywords):
        fast = optimise(*arguments, **keywords)
        with torch.no_grad():
            fast.stages[1].blocks[0].norm2.weight.mul_(1.01)
        return fast

    monkeypatch.setattr(swinfast, "optimize", wrong)
    with pytest.raises(RuntimeError, match="is wrong, so its speed means nothing"):
        models.measure(model, "small", torch.float32, 2, torch.device("cpu"), rounds=1)


def test_readme_shows_the_result_file():
    done = subprocess.run([sys.executable, "-m", "bench.readme", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run python -m bench.readme"


def test_readme_table_keeps_the_last_of_a_repeated_measurement(tmp_path):
    row = dict.fromkeys(models.COLUMNS, "x") | {"infer_batch_size": "8", "dtype": "float32", "device": "d"}
    for speed, engine in (("1", "timm eager"), ("9", "swinfast"), ("2", "timm eager"), ("5", "swinfast")):
        models.append(tmp_path / "r.csv", row | {"infer_samples_per_sec": speed, "engine": engine})
    table = readme.table(readme.latest(tmp_path / "r.csv"), "bench.models")
    (line,) = [line for line in table.splitlines() if "float32 |" in line]
    assert "2.50×" in line


def test_peers_on_a_cpu(timm, monkeypatch, tmp_path):
    """Every engine's error stands beside its speed; the products alone are those of the model."""
    model = randomise(timm.create_model("swinv2_cr_tiny_224", **small_model_args())).eval()
    engines = {"timm eager": model, "swinfast": swinfast.optimize(model), "wrong": lambda x: model(x) + 1}
    monkeypatch.setattr(peers_cpu, "engines_for", lambda *_: engines)
    images, options = torch.randn(8, 3, *model.img_size), peers_cpu._parser().parse_args(["--rounds", "1"])
    oracle = copy.deepcopy(model).double()(images.double()).detach()
    rows = peers_cpu.measure(model, "small", torch.float32, 2, images, oracle, tmp_path, options)
    rows = {row["engine"]: row for row in rows}
    assert float(rows["swinfast"]["rel_error"]) < 1e-5 < 0.1 < float(rows["wrong"]["rel_error"])
    assert rows["swinfast"]["top1_agreement"] == 1
    assert "rel_error" not in rows[peers_cpu.PRODUCTS]


def test_rounds_that_fit_into_the_time():
    calls = []
    assert peers_cpu.affordable_rounds({"one": lambda: calls.append(1)}, 20, seconds=0) == 3
    assert peers_cpu.affordable_rounds({"one": lambda: calls.append(1)}, 20, seconds=1e6) == 20
    assert len(calls) == 2


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
