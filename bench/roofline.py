"""The floor under a model's time on a GPU: predictions from its kernels as configured, with no GPU needed.

`python -m bench.roofline [--model NAME] [--batch N] [--dtype float16] [--gpu h100 a100 …] [--plot FILE]`

For each kernel of a forward: its FLOPs at the published matrix rate, its tensors read and written once at the
published bandwidth, and the instructions that its warps issue, counted in the machine code. The longest of the three is
its floor. Nothing of it is measured: real kernels take longer, and launches and the gaps between kernels come on top.
Only where images are so few that tensors never leave the cache may a kernel pass the floor of its bytes.
"""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from swinfast.kernels.gate import Job, job_of
from swinfast.kernels.launch import Launch, record
from swinfast.kernels.warpgroups import RUN
from tabulate import tabulate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.tools.tensor_descriptor import TensorDescriptor

import swinfast
from bench.gpus import GPUS, Gpu
from bench.peers import import_timm
from bench.sass import Uncountable, arguments, issued_instructions
from swinfast.arguments import positive
from swinfast.measurements import DTYPES
from swinfast.plots import finish, panels_for

ATTENTION = {  # kernels, and how many products of C to C channels they contain
    "window_attention": 0,
    "qkv_attention": 3,
    "attention_parts": 4,
    "attention_block": 4,
}
PERSISTENT = "linear.persistent_linear"  # waits in loops, and skips: its instructions can't be counted from outside


class Row(NamedTuple):
    """All launches of one kernel and shape in a forward: numbers for all of them, times in seconds."""

    kernel: str
    shape: str
    launches: int
    flops: float
    bytes: float
    compute: float
    memory: float
    issue: float

    @property
    def floor(self) -> float:
        return max(self.compute, self.memory, self.issue)


def launches_of(name: str, batch: int, dtype: torch.dtype, arch: str) -> list[Launch]:
    """The launches of a forward with tables at hand."""
    model = swinfast.create_model(name, device="meta", dtype=dtype).eval()
    fast = swinfast.optimize(model, backend="triton")
    images = torch.empty(batch, 3, *model.img_size, device="meta", dtype=dtype)
    with torch.no_grad(), record(arch) as launches:
        fast(images)
    return [launch for launch in launches if kernel_of(launch) != "cpb_bias"]


def kernel_of(launch: Launch) -> str:
    """The operation that a launch computes, after which the module of its kernel is named.

    What PyTorch's library computes are the products of linear.
    """
    module = launch.kernel.fn.__module__.rpartition(".")[2] if launch.kernel else "linear"
    return module.replace("_warpgroups", "_block")


def predict(launches: Sequence[Launch], precision: str, gpu: Gpu) -> list[Row]:
    """Rows of a forward's launches on a GPU, in the order of their first."""
    groups: dict[tuple, list[tuple[Launch, Job | None]]] = {}
    for launch in launches:
        job = job_of(launch, gpu.arch, precision) if launch.kernel else None
        what = job.key if job else tuple(launch.constants.items())
        groups.setdefault((what, launch.programs), []).append((launch, job))
    rows = []
    for group in groups.values():
        (first, job), count, issued = group[0], len(group), 0.0
        shape = job.shape if job else f"n={first.constants['N']} k={first.constants['K']} by PyTorch's library"
        if job and job.kernel != PERSISTENT:
            with suppress(Uncountable):  # then it has no such floor
                issued = first.programs * job.config.num_warps * issued_instructions(job)
        flops, moved = flops_of(first, kernel_of(first)), bytes_of(first)
        times = flops / gpu.matrix_rate(precision), moved / (1e12 * gpu.bandwidth), issued / gpu.issue_rate
        sums = (count * number for number in (flops, moved, *times))
        rows.append(Row(kernel_of(first), shape, count, *sums))
    return rows


def flops_of(launch: Launch, kernel: str) -> float:
    """FLOPs of the products of one launch."""
    size = arguments(launch)
    if kernel in ("norm_residual", "merge_norm"):
        return 0.0
    if kernel in ("mlp_block", "mlp_parts"):
        return 4.0 * size["rows"] * size["C"] * size["HIDDEN"]
    if kernel not in ATTENTION:
        return 2.0 * size["rows"] * size.get("N", size.get("C")) * size["K"]
    tokens, channels = size["WINDOW_H"] * size["WINDOW_W"], size["HEADS"] * size.get("HEAD_DIM", RUN)
    if kernel in ("attention_parts", "qkv_attention"):  # a program a window and head
        windows = launch.programs // size["HEADS"]
    else:
        windows = len(launch.args[0]) * size["windows_h"] * size["windows_w"]
    return windows * (2.0 * ATTENTION[kernel] * tokens * channels * channels + 4.0 * tokens * tokens * channels)


def bytes_of(launch: Launch) -> float:
    """Bytes of all tensors of a launch, each once."""
    values = (value.base if isinstance(value, TensorDescriptor) else value for value in launch.args)
    tensors = {id(value): value for value in values if isinstance(value, Tensor)}
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))


class _Bytes(TorchDispatchMode):
    """Adds up the tensors that each operator reads and writes; views move nothing."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def eager_bytes(name: str, batch: int, dtype: torch.dtype) -> int:
    """Bytes that timm's model reads and writes in a forward, run operator by operator."""
    with torch.device("meta"):
        model = import_timm().create_model(name).eval().to(dtype)
    with torch.no_grad(), _Bytes() as counted:
        model(torch.empty(batch, 3, *model.img_size, device="meta", dtype=dtype))
    return counted.total


def table(rows: Sequence[Row], batch: int) -> str:
    """Per image: MFLOP, KB, and microseconds."""
    lines = []
    for row in rows:
        times = [1e6 * value / batch for value in (row.compute, row.memory, row.issue, row.floor)]
        lines.append((row.kernel, row.shape, row.launches, row.flops / batch / 1e6, row.bytes / batch / 1e3, *times))
    sums = [sum(column) for column in list(zip(*lines, strict=True))[2:]]
    headers = ("kernel", "shape", "launches", "MFLOP", "KB", "products, µs", "memory, µs", "issue, µs", "floor, µs")
    return tabulate([*lines, ("all", "", *sums)], headers=headers, floatfmt=".2f", maxcolwidths=[None, 60])


def plot(predictions: dict[str, list[Row]], batch: int, title: str, path: Path) -> None:
    """Floors per image, stacked by kernel, a bar for each GPU."""
    kernels = list(dict.fromkeys(row.kernel for rows in predictions.values() for row in rows))
    figure, (axes,) = panels_for(1, title, stacked=True)
    for gpu, rows in predictions.items():
        left = 0.0
        for kernel in kernels:
            width = sum(1e6 * row.floor / batch for row in rows if row.kernel == kernel)
            axes.barh(gpu, width, left=left, color=f"C{kernels.index(kernel)}", label=kernel)
            left += width
        axes.text(left, gpu, f" {1e6 / left:,.0f} images/s", va="center")
    axes.set_xlabel("floor, µs per image: predicted, not measured")
    axes.margins(x=0.22)
    axes.invert_yaxis()
    finish(figure, [axes], path)


def main() -> None:
    options = _parser().parse_args()
    dtype = DTYPES[options.dtype]
    eager = eager_bytes(options.model, options.batch, dtype) / options.batch
    predictions = {}
    for name in options.gpu:
        gpu = GPUS[name]
        rows = predict(launches_of(options.model, options.batch, dtype, gpu.arch), options.dtype, gpu)
        predictions[gpu.name] = rows
        floor, moved = (sum(getattr(row, field) for row in rows) / options.batch for field in ("floor", "bytes"))
        what = f"{options.model}, batch {options.batch}, {options.dtype}"
        print(f"PREDICTION for {gpu.name}: {what}. Nothing was measured.")
        print(table(rows, options.batch))
        print(f"floor {1e6 * floor:.1f} µs an image: at most {1 / floor:,.0f} images/s")
        print(
            f"bytes an image: {moved / 1e6:.1f} MB in {sum(row.launches for row in rows)} launches; eager timm "
            f"{eager / 1e6:.1f} MB, at least {1e6 * eager / (1e12 * gpu.bandwidth):.1f} µs\n"
        )
    if options.plot:
        plot(predictions, options.batch, f"{options.model}, {options.dtype}, batch {options.batch}", options.plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="swinv2_cr_tiny_ns_224")
    parser.add_argument("--batch", type=positive, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=["h100", "a100", "l4"])
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the floors")
    return parser


if __name__ == "__main__":
    main()
