"""Whole models on a CPU beside what else runs them there, interleaved. `python -m bench.peers_cpu --help`.

timm eager, timm with torch.compile and freezing, ONNX Runtime and OpenVINO (`pip install 'swinfast[peers]'`; one that
is missing is left out and named), all with the same weights. Appends rows as bench.models does, once a dtype and batch
size is measured; beside each speed stand the relative error against the plain model in float64 and the top-1 agreement
with it.
"""

import argparse
import copy
import importlib.util
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import swinfast
from bench import RESULTS
from bench.peers import import_timm
from swinfast.benchmark import compare, randomise
from swinfast.measurements import DTYPES, append, row_of
from swinfast.torch_linear import make_linear

Engine = Callable[[Tensor], Tensor]
EAGER, COMPILED, PRODUCTS = "timm eager", "timm compiled, frozen", "its matrix products alone"
ENGINES = (EAGER, "swinfast", COMPILED, "ONNX Runtime", "OpenVINO", PRODUCTS)
LEAST_IMAGES = 8  # that errors are taken over


def engines_for(
    plain: nn.Module, dtype: torch.dtype, images: Tensor, folder: Path, wanted: Sequence[str]
) -> dict[str, Engine]:
    """What can run the model here in a dtype; a package that is missing is named.

    Args:
        plain: The model in float32.
        images: [B, 3, H, W] float32, of the size that is timed.
        folder: For exported models, which it keeps for the next dtype.
        wanted: Names of engines.
    """
    engines = {}
    if EAGER in wanted:
        eager = copy.deepcopy(plain).to(dtype)
        engines[EAGER] = lambda x: eager(x.to(dtype))
    if "swinfast" in wanted:
        fast = swinfast.optimize(plain, dtype=dtype)
        engines["swinfast"] = lambda x: fast(x.to(dtype))
    if COMPILED in wanted:
        compiled = torch.compile(copy.deepcopy(plain).to(dtype), options={"freezing": True})
        engines[COMPILED] = lambda x: compiled(x.to(dtype))
    for package, name, make in (("onnxruntime", "ONNX Runtime", _onnxruntime), ("openvino", "OpenVINO", _openvino)):
        if name not in wanted:
            continue
        if importlib.util.find_spec(package) is None or importlib.util.find_spec("onnxscript") is None:
            print(f"{name} is left out: pip install 'swinfast[peers]'")
        elif package == "openvino" or dtype == torch.float32:  # ONNX Runtime has no bfloat16 on a CPU
            engines[name] = make(_exported(plain, images, folder), dtype)
    return engines


def _exported(plain: nn.Module, images: Tensor, folder: Path) -> Path:
    file = folder / f"{len(images)}.onnx"
    if not file.exists():
        torch.onnx.export(plain, (images,), file, dynamo=True, external_data=False, verbose=False)
    return file


def _onnxruntime(file: Path, dtype: torch.dtype) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would take the others' cores
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _openvino(file: Path, dtype: torch.dtype) -> Engine:
    import openvino

    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
    }
    request = openvino.Core().compile_model(file, "CPU", config).create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()])[0])


def measure(
    plain: nn.Module,
    name: str,
    dtype: torch.dtype,
    batch: int,
    images: Tensor,
    oracle: Tensor,
    folder: Path,
    options: Namespace,
) -> list[dict]:
    """Rows of all engines for one model, dtype and batch size, from one interleaved run.

    Args:
        images: [B, 3, H, W] float32, whole batches and at least LEAST_IMAGES, for the errors; one batch is timed.
        oracle: What the plain model in float64 makes of them.

    Raises:
        RuntimeError: swinfast fails its own verification.
    """
    outcome = swinfast.verify(plain, swinfast.optimize(plain, dtype=dtype), images[:2])
    if not outcome.passed:
        raise RuntimeError(f"{name} in {dtype} is wrong, so its speed means nothing: {outcome}")
    batches = images.split(batch)
    with torch.no_grad():
        engines = engines_for(plain, dtype, batches[0], folder, options.engines)
    with torch.inference_mode():
        outputs = {engine: torch.cat([run(part).double() for part in batches]) for engine, run in engines.items()}
    candidates = {engine: partial(run, batches[0]) for engine, run in engines.items()}
    if PRODUCTS in options.engines:
        candidates[PRODUCTS] = products(plain, dtype, batch)
    rounds = affordable_rounds(candidates, options.rounds, options.seconds)
    rows = []
    for engine, timing in compare(candidates, rounds, warmup=1).items():
        shared = {"engine": engine, "rounds": rounds}
        if engine != PRODUCTS:
            error = ((outputs[engine] - oracle).square().mean() / oracle.square().mean()).sqrt().item()
            agreement = (outputs[engine].argmax(-1) == oracle.argmax(-1)).double().mean().item()
            shared |= {"rel_error": f"{error:.2e}", "top1_agreement": round(agreement, 4)}
        rows.append(row_of(plain, name, dtype, batch, torch.device("cpu"), timing) | shared)
    return rows


def affordable_rounds(candidates: dict[str, Callable[[], object]], rounds: int, seconds: float) -> int:
    """As many of the rounds as fit into the seconds, at least three."""
    start = time.perf_counter()
    compare(candidates, 1, warmup=0)
    return max(3, min(rounds, int(seconds / (time.perf_counter() - start))))


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


def main() -> None:
    options = _parser().parse_args()
    timm = import_timm()
    for name in options.models:
        plain = randomise(timm.create_model(name)).eval()
        with tempfile.TemporaryDirectory() as folder:
            for batch in options.batch_sizes:
                images = torch.randn(-(-LEAST_IMAGES // batch) * batch, 3, *plain.img_size)
                with torch.inference_mode():
                    exact = copy.deepcopy(plain).double()
                    oracle = torch.cat([exact(part.double()) for part in images.split(4)])
                for dtype in options.dtypes:
                    torch.compiler.reset()
                    for row in measure(plain, name, DTYPES[dtype], batch, images, oracle, Path(folder), options):
                        append(options.output, row)
                        error = f", relative error {row['rel_error']}" if "rel_error" in row else ""
                        speed = f"{row['infer_samples_per_sec']} img/s in {row['rounds']} rounds"
                        print(f"{name} {dtype} batch {batch} {row['engine']}: {speed}{error}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["swinv2_cr_tiny_ns_224"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each, at most (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=30, help="that the rounds of one batch size may take (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "peers_cpu.csv")
    return parser


if __name__ == "__main__":
    main()
