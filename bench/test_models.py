"""Whole models under pytest-benchmark: `pytest bench/test_models.py --benchmark-only`.

A group is one model, dtype and batch size; answers are checked before an engine is timed. A call is timed by the wall
clock until its answer is there. For figures to quote, `python -m bench.models` lets engines take turns.
"""

import itertools
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from bench.peers import ENGINES, engines_named, import_timm
from bench.tables import MAIN_MODEL
from swinfast.benchmark import randomise
from swinfast.engines import Ready, image_shape, oracle_of, prepared, random_inputs
from swinfast.measurements import DTYPES
from swinfast.torch_linear import has_native_bfloat16

if torch.cuda.is_available():
    CASES = [("float16", 1), ("float16", 32), ("float16", 256)]
    KEYS = ENGINES
else:  # less than a minute
    CASES = [("float32", 1), ("float32", 4), *([("bfloat16", 1)] if has_native_bfloat16() else [])]
    KEYS = ("swinfast", "eager", "sdpa")


@cache
def plain_model(device: torch.device) -> nn.Module:
    return randomise(import_timm().create_model(MAIN_MODEL)).eval().to(device)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request, device) -> tuple[str, int, list[Tensor]]:
    dtype, batch = request.param
    return dtype, batch, random_inputs(image_shape(plain_model(device)), batch, DTYPES[dtype], device)


@pytest.mark.parametrize("key", KEYS)
def test_model(benchmark, case, key, device):
    dtype, batch, inputs = case
    (engine,) = engines_named([key], MAIN_MODEL, device)
    plain = engine.plain or plain_model(device)
    checked = inputs[: -(-4 // batch)]
    ready: Ready = prepared(engine, plain, DTYPES[dtype], checked, oracle_of(plain, DTYPES[dtype], torch.cat(checked)))
    benchmark.group = f"{MAIN_MODEL} {dtype} batch {batch}"
    benchmark.extra_info |= {"engine": engine.label, "rel_error": ready.error, "top1_agreement": ready.agreement}
    turns = itertools.cycle(inputs)

    def call() -> None:
        ready.call(next(turns))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.inference_mode():
        benchmark.pedantic(call, rounds=30 if device.type == "cuda" else 5, warmup_rounds=2)
    torch.compiler.reset()
