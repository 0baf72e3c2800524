"""Launches every kernel in every dtype on small shapes, and nothing else: for compute-sanitizer to watch.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1   # each tensor its own allocation, so that a step beyond it shows
    compute-sanitizer --tool memcheck --error-exitcode 9 python -m bench.sanitize
    compute-sanitizer --tool racecheck --error-exitcode 9 python -m bench.sanitize

Inputs are made on the CPU and outputs looked at there, so that PyTorch's own kernels don't take part. Run it once
without the sanitizer first: kernels are then compiled already.
"""

import argparse
import os
from collections.abc import Sequence

import torch

if not torch.cuda.is_available():  # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from swinfast.kernels.configs import Config, override
from swinfast.kernels.cpb_bias import cpb_bias
from swinfast.kernels.launch import arch_of
from swinfast.kernels.shapes import PRECISIONS
from torch import Tensor

import swinfast
from bench.candidates import SIXTEEN_BITS, WARPGROUPS
from bench.cases import FORMS, MODELS, call_arguments, cases_of, choose_forms, inputs_of, operation, tf32_setting
from bench.kernels import COMPILE_WAIT, COMPOSITIONS, KERNELS, compile_all, compilers, find_cases
from swinfast.pipeline import resolve_device

CPU = torch.device("cpu")
# whose weights programs can hold: more rows than they take at a time, and windows with a shift and without
HELD = {"img_size": 28, "patch_size": 2, "embed_dim": 96, "depths": (2,), "num_heads": (3,), "window_size": 7}


def launch_all(cases: Sequence, device: torch.device) -> list[str]:
    """Launch each case once; what is wrong with the outputs."""
    wrong = []
    for _, case in cases:
        arguments = call_arguments(case, inputs_of(case, CPU))
        arguments = {n: value.to(device) if isinstance(value, Tensor) else value for n, value in arguments.items()}
        with torch.no_grad(), tf32_setting(case.precision):
            out = operation(case)(**arguments)
        if not out.cpu().isfinite().all():
            wrong.append(f"{case.operation} {case.precision} {case.shape}: not finite")
    return wrong


def warpgroups(precisions: Sequence[str], arch: str, device: torch.device) -> tuple[int, list[str]]:
    """The kernels in Gluon, which the tables choose for large batches, in every form; how many, and what is wrong."""
    model = swinfast.create_model("swinv2_cr_tiny_224", device="meta", **HELD).eval()
    count, wrong = 0, []
    for precision in [name for name in precisions if name in SIXTEEN_BITS]:
        found = cases_of(model, 1, precision, arch, choose_forms(FORMS["fused"]))
        for case in (case for case in found if dict(case.lookup[1]).get("held")):
            for blocks, warps in WARPGROUPS[case.operation]:
                chosen = Config({"use": "warpgroups"} | blocks, warps, 1, "chosen for this run")
                with override(lambda kernel, shape, chosen=chosen: chosen):
                    wrong += launch_all([("held", case)], device)
                count += 1
    return count, wrong


def bias_tables(device: torch.device, dtype: torch.dtype) -> list[str]:
    """cpb_bias, which runs once per weights and in no forward, shifted and not, padded and not."""
    wrong = []
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(shape, generator=generator).to(dtype).to(device) for shape in ((24, 2), (24,), (3, 24), (3,))
    ]
    shapes = ([4, 4], [0, 0], [16, 16], None), ([7, 5], [3, 2], [48, 64], None), ([7, 5], [3, 2], [48, 64], [3, 1])
    for window, shift, padded, span in shapes:
        with torch.no_grad():
            table = cpb_bias(*weights, window, shift, padded, dtype, span).cpu()
        if table.isnan().any() or not table[..., : window[0] * window[1]].isfinite().all():
            wrong.append(f"cpb_bias {dtype} {window} {shift} {span}: not finite")
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    device = resolve_device(options.device)
    arch = arch_of(device)
    cases = find_cases(options.models, 1, options.dtypes, arch, KERNELS, COMPOSITIONS)
    if options.compile:
        with compilers(device) as pool:
            compile_all([case for _, case in cases], arch, pool, COMPILE_WAIT)
    wrong = launch_all(cases, device)
    held, more = warpgroups(options.dtypes, arch, device)
    wrong += more
    for dtype in dict.fromkeys(PRECISIONS[name] for name in options.dtypes):
        wrong += bias_tables(device, dtype)
    for line in wrong:
        print(f"WRONG {line}")
    operations = len({case.operation for _, case in cases})
    print(f"{len(cases)} launches of {operations} operations, {held} of kernels in Gluon, {len(wrong)} wrong")
    return int(bool(wrong))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="default: %(default)s")
    parser.add_argument("--dtypes", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--compile", action="store_true", help="compile in parallel first, for a run without sanitizer")
    parser.add_argument("--device", default="auto")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
