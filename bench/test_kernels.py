"""Every operation by pytest-benchmark, once its answer was found right: `pytest bench/ --benchmark-only`.

The largest call of each operation in a forward of swinv2_cr_tiny_ns_224 at batch 256, or at 4 for those that are for
few images. A time ends with a synchronisation, so at small sizes it is the host's. Without a GPU it is a small model in
Triton's interpreter, one call each: no measurement.
"""

import pytest
import torch
from swinfast.kernels.launch import arch_of

from bench.cases import FORMS, Oracle, call_arguments, inputs_of, operation
from bench.kernels import KERNELS, find_cases
from bench.roofline import bytes_of, flops_of

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
MODEL, BATCHES = ("swinv2_cr_tiny_ns_224", (256, 4)) if GPU else ("small", (1,))
ROUNDS = {"rounds": 50, "warmup_rounds": 10} if GPU else {"rounds": 1, "warmup_rounds": 0}
FOUND = [
    case for batch in BATCHES for _, case in find_cases([MODEL], batch, ["float16"], arch_of(DEVICE), KERNELS, FORMS)
]
LARGEST = {case.operation: case for case in sorted(FOUND, key=lambda case: bytes_of(case.launch))}


@pytest.mark.parametrize("name", KERNELS)
def test_operation(benchmark, name):
    case = LARGEST[name]
    inputs = inputs_of(case, DEVICE)
    function, arguments = operation(case), call_arguments(case, inputs)

    def call() -> torch.Tensor:
        out = function(**arguments)
        if GPU:
            torch.cuda.synchronize()
        return out

    with torch.no_grad():
        error = Oracle(case, inputs).check(call())
        benchmark.pedantic(call, **ROUNDS)
    benchmark.extra_info |= {
        "shape": case.shape,
        "rel_error": error,
        "bytes": bytes_of(case.launch),
        "flop": flops_of(case.launch, name),
        "source": "measured" if GPU else "interpreter",
    }
