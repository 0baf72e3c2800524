"""Whole models on a CPU beside what else runs them there, interleaved. `python -m bench.peers_cpu --help`.

timm eager, timm with torch.compile and freezing, ONNX Runtime and OpenVINO (`pip install 'swinfast[peers]'`; one that
is missing is left out and named), all with the same weights, measured and written as bench.models does it; and in turn
with them the floor under all, which has no answers.
"""

import argparse
import copy
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import RESULTS
from bench.models import Task, run
from bench.peers import import_timm
from swinfast.arguments import positive
from swinfast.benchmark import randomise
from swinfast.engines import Engine, Forward, eager_engine, image_shape, swinfast_engine
from swinfast.measurements import check_header
from swinfast.torch_linear import make_linear

EAGER, COMPILED, PRODUCTS = "timm eager", "timm compiled, frozen", "its matrix products alone"
ENGINES = (EAGER, "swinfast", COMPILED, "ONNX Runtime", "OpenVINO", PRODUCTS)


def engines_for(wanted: Sequence[str], dtype: str, batch: int, folder: Path) -> list[Engine]:
    """Those of ENGINES that can run a model here in a dtype; a package that is missing is named.

    Args:
        folder: For exported models, which it keeps for the next dtype.
    """

    def exported(make: Callable[[Path, torch.dtype], Forward], plain: nn.Module, dtype: torch.dtype) -> Forward:
        file = folder / f"{batch}.onnx"
        if not file.exists():
            images = torch.randn(batch, *image_shape(plain))
            torch.onnx.export(plain, (images,), file, dynamo=True, external_data=False, verbose=False)
        return make(file, dtype)

    def floor(plain: nn.Module, dtype: torch.dtype) -> Forward:
        run = products(plain, dtype, batch)
        return lambda images: run()

    engines = {
        EAGER: eager_engine("timm"),
        "swinfast": swinfast_engine(),
        COMPILED: Engine(COMPILED, _frozen),
        "ONNX Runtime": Engine("ONNX Runtime", partial(exported, _onnxruntime)),
        "OpenVINO": Engine("OpenVINO", partial(exported, _openvino)),
        PRODUCTS: Engine(PRODUCTS, floor, answers=False),
    }
    if dtype != "float32":
        del engines["ONNX Runtime"]  # which has no bfloat16 on a CPU
    for package, name in (("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")):
        if name in wanted and any(importlib.util.find_spec(one) is None for one in (package, "onnxscript")):
            print(f"{name} is left out: pip install 'swinfast[peers]'")
            engines.pop(name, None)
    return [engine for name, engine in engines.items() if name in wanted]


def _frozen(plain: nn.Module, dtype: torch.dtype) -> Forward:
    return torch.compile(copy.deepcopy(plain).to(dtype), dynamic=False, options={"freezing": True})


def _onnxruntime(file: Path, dtype: torch.dtype) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would take the others' cores
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _openvino(file: Path, dtype: torch.dtype) -> Forward:
    import openvino

    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
    }
    request = openvino.Core().compile_model(file, "CPU", config).create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.float().numpy()])[0])  # NumPy has no bfloat16


def products(plain: nn.Module, dtype: torch.dtype, batch: int) -> Callable[[], None]:
    """All matrix products of a forward and nothing else, on packed weights: the floor under any engine.

    Large batches go through four images at a time, as in swinfast, so that the caches serve them alike.
    """
    calls, part = [], min(batch, 4)

    def note(layer: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
        x = torch.randn(args[0].numel() // layer.in_features, layer.in_features).to(dtype)
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        calls.append(partial(make_linear(layer.weight.detach().to(dtype), bias, pack=True), x))

    def note_attention(attn: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        windows, tokens, channels = args[0].shape
        q = torch.randn(windows * attn.num_heads, tokens, channels // attn.num_heads).to(dtype)
        weights = torch.randn(len(q), tokens, tokens).to(dtype)
        calls.extend([partial(torch.bmm, q, q.transpose(1, 2)), partial(torch.bmm, weights, q)])

    model = copy.deepcopy(plain)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "meta_mlp" not in name:
            module.register_forward_hook(note)
        elif type(module).__name__ == "WindowMultiHeadAttention":
            module.register_forward_hook(note_attention)
    weight = model.patch_embed.proj.weight.detach().flatten(1)
    with torch.inference_mode():
        model(torch.randn(part, 3, *plain.img_size))
        patches = torch.randn(part * model.patch_embed.num_patches, weight.shape[1]).to(dtype)
        calls.append(partial(make_linear(weight.to(dtype), None, pack=True), patches))

    def run() -> None:
        for _ in range(-(-batch // part)):
            for call in calls:
                call()

    return run


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    check_header(options.output)
    status = 0
    for name in options.models:
        plain = randomise(import_timm().create_model(name)).eval()
        with tempfile.TemporaryDirectory() as folder:
            for batch, dtype in itertools.product(options.batch_sizes, options.dtypes):
                engines = engines_for(options.engines, dtype, batch, Path(folder))
                task = Task(name, dtype, batch, tuple(engine.name for engine in engines))
                for line in run(task, engines, plain, torch.device("cpu"), options.rounds, options.output):
                    status |= line.startswith("swinfast: ")
                    print(f"{name} {dtype} batch {batch}, {line}", flush=True)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["swinv2_cr_tiny_ns_224"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--batch-sizes", nargs="+", type=positive, metavar="N", default=[1, 8, 32])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--rounds", type=positive, metavar="N", default=7, help="timed calls (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "peers_cpu.csv")
    return parser


if __name__ == "__main__":
    sys.exit(main())
