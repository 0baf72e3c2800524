"""``swinfast bench``, ``swinfast verify`` and ``swinfast info``: is it fast, is it right, what is there."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from . import plots
from .arguments import class_count, positive
from .backends import CHOICES
from .batch.sources import find_images
from .batch.worker import reason_of
from .benchmark import describe_device, randomise
from .engines import Engine, WrongAnswer, compiled_engine, eager_engine, image_shape, measure, swinfast_engine
from .exit_codes import INTERRUPTED, OK, SOME_FAILED
from .files import check_writable
from .info import info
from .measurements import COLUMNS, DTYPES, append, check_header, rows_of
from .messages import say
from .models import create_model, is_folder
from .optimize import optimize
from .pipeline import resolve_device
from .preprocess import Transform, transform_of
from .report import report
from .verify import verify

PLAIN = "plain"
AGAINST = {
    "eager": lambda: eager_engine(PLAIN),
    "compile": lambda: compiled_engine(PLAIN),
    "max-autotune": lambda: compiled_engine(PLAIN, "max-autotune"),
}
GPU_DTYPES, GPU_SIZES = ["float16"], [1, 32, 256]
CPU_DTYPES, CPU_SIZES = ["float32"], [1, 8]
EXPLAINED = """error: relative RMS against the plain model in float64; top-1: agreement with it
plain: swinfast's own model in plain PyTorch, written to be read (bench.models compares with timm's)"""
RANDOM_IMAGES = 8
MOST_IMAGES = 64  # in one batch, in float64 too


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add bench, verify and info to the command line."""
    _add_bench(commands)
    _add_verify(commands)
    said = "What swinfast finds here: versions, devices and what computes on each, what is missing."
    add = commands.add_parser("info", help="versions, devices, what is missing", description=said)
    add.set_defaults(run=_info)
    add.add_argument("--json", action="store_true", help="as JSON")


def _add_bench(commands: argparse._SubParsersAction) -> None:
    said = "Time a model beside plain PyTorch in one interleaved run. A wrong answer has no speed (exit code 1)."
    bench = commands.add_parser("bench", help="time a model", description=said)
    bench.set_defaults(run=_bench)
    add = bench.add_argument
    _add_model(bench)
    add("--batch-sizes", type=_list_of(positive), metavar="N,…", help="default: 1,32,256 on a GPU, 1,8 on a CPU")
    dtypes = f"of {', '.join(DTYPES)} (default: float16 on a GPU, float32 on a CPU)"
    add("--dtypes", type=_list_of(_one_of(DTYPES)), metavar="DTYPE,…", help=dtypes)
    against = f"of {', '.join(AGAINST)} (default: eager)"
    add("--against", type=_list_of(_one_of(AGAINST)), default=["eager"], metavar="ENGINE,…", help=against)
    add("--rounds", type=positive, default=10, metavar="N", help="turns of each engine (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the results as JSON")
    add("--csv", type=Path, metavar="FILE", help="add the results to a csv file")
    add("--plot", type=Path, metavar="FILE", help="draw images/s against the batch size; needs matplotlib")


def _add_verify(commands: argparse._SubParsersAction) -> None:
    said = "Hold a model's answers against plain PyTorch in float64. Exit code 0: passed, 1: failed."
    command = commands.add_parser("verify", help="check a model's answers", description=said)
    command.set_defaults(run=_verify)
    add = command.add_argument
    _add_model(command)
    add("--dtype", choices=DTYPES, default="float32", help="to compute in (default: %(default)s)")
    add("--backend", choices=CHOICES, default="auto", help="what computes (default: %(default)s)")
    images = f"image files, folders, glob patterns, of which the first {MOST_IMAGES} are used (default: noise)"
    add("--images", nargs="+", metavar="PATH", help=images)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="name or folder of a model")
    weights = "weights (default: the folder's, or random ones under which every part shows)"
    command.add_argument("--checkpoint", default="", metavar="FILE", help=weights)
    classes = "classes of the checkpoint, where not the model's own"
    command.add_argument("--num-classes", type=class_count, metavar="N", help=classes)
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: a GPU where there is one)")


def _bench(options: argparse.Namespace) -> int:
    device = resolve_device(options.device)
    _check_files(options)
    plain = _model(options, device)
    engines = [swinfast_engine(), *(AGAINST[key]() for key in options.against)]
    dtypes, sizes = (GPU_DTYPES, GPU_SIZES) if device.type == "cuda" else (CPU_DTYPES, CPU_SIZES)
    runs = [(dtype, batch) for dtype in options.dtypes or dtypes for batch in options.batch_sizes or sizes]
    print(f"{options.model} on {describe_device(device)}, PyTorch {torch.__version__}")
    rows: list[dict] = []
    left_out: list[dict] = []
    status = OK
    try:
        for dtype, batch in tqdm(runs, unit="run", disable=None, leave=False):
            found, missing = _run(options, plain, engines, dtype, batch, device)
            rows += found
            left_out += missing
    except KeyboardInterrupt:
        status = INTERRUPTED
    try:
        if rows:
            print(_table(rows), flush=True)
    finally:  # whether or not somebody reads the terminal; and there it stands, whether or not this can be written
        if options.json:
            _write_json(options.json, rows, left_out)
    for one in left_out:
        say(f"left out: {one['dtype']}, batch {one['batch']}, {one['engine']}: {one['reason']}")
    if options.plot and rows:
        plots.throughput(rows, options.plot)
    if status == OK and any(one["engine"] == engines[0].label for one in left_out):
        status = SOME_FAILED
    return status


def _write_json(file: Path, rows: list[dict], left_out: list[dict]) -> None:
    full = [dict.fromkeys(COLUMNS) | row | {"rel_error": float(row["rel_error"])} for row in rows]
    file.write_text(json.dumps({"rows": full, "left_out": left_out}, indent=1) + "\n", encoding="utf-8")


def _run(
    options: argparse.Namespace, plain: nn.Module, engines: list[Engine], dtype: str, batch: int, device: torch.device
) -> tuple[list[dict], list[dict]]:
    """Rows of one interleaved run, written to the csv file, and what is left out of it."""
    try:
        comparison = measure(plain, engines, DTYPES[dtype], batch, device, options.rounds)
    except WrongAnswer as error:
        rows, reasons = [], {engines[0].label: str(error)}
    else:
        rows = rows_of(comparison, options.model, DTYPES[dtype], batch, device, options.rounds)
        reasons = comparison.left_out
    for row in rows if options.csv else ():
        append(options.csv, row)
    return rows, [{"dtype": dtype, "batch": batch, "engine": one, "reason": why} for one, why in reasons.items()]


def _table(rows: list[dict]) -> str:
    """Speeds, and beside each its error; ratios within a run to the first engine that is not swinfast."""
    bases = {}
    for row in rows:
        if row["engine"] != "swinfast":
            bases.setdefault((row["dtype"], row["infer_batch_size"]), row)
    lines = []
    for row in rows:
        base = bases.get((row["dtype"], row["infer_batch_size"]))
        ratio = f"{base['infer_step_time'] / row['infer_step_time']:.2f}×" if base else ""
        agreement = f"{row['top1_agreement']:.1%}" if "top1_agreement" in row else ""
        times = (row["infer_samples_per_sec"], row["infer_step_time"], row["infer_step_time_p95"])
        checks = (row["rel_error"], agreement, row.get("peak_memory", ""))
        lines.append((row["dtype"], row["infer_batch_size"], row["engine"], *times, ratio, *checks))
    headers = ["dtype", "batch", "engine", "images/s", "median, ms", "p95, ms", "speed-up", "error", "top-1", "MB"]
    if not any("peak_memory" in row for row in rows):
        headers, lines = headers[:-1], [line[:-1] for line in lines]
    sides = ["left" if header in ("dtype", "engine") else "right" for header in headers]
    return tabulate(lines, headers=headers, disable_numparse=True, colalign=sides) + f"\n{EXPLAINED}"


def _verify(options: argparse.Namespace) -> int:
    device = resolve_device(options.device)
    model = _model(options, device)
    images = _images(options, model).to(device)
    fast = optimize(model, dtype=DTYPES[options.dtype], backend=options.backend)
    rows = report(fast).rows
    print(
        f"{options.model} on {describe_device(device)}: {sum(r.replaced for r in rows)} of {len(rows)} modules replaced"
    )
    outcome = verify(model, fast, images)
    print(f"{len(images)} images: {outcome}")
    return OK if outcome.passed else SOME_FAILED


def _images(options: argparse.Namespace, model: nn.Module) -> Tensor:
    if not options.images:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(RANDOM_IMAGES, *image_shape(model), generator=generator)
    files = find_images(options.images)
    if not files:
        raise ValueError(f"found no images in {', '.join(options.images)}")
    if len(files) > MOST_IMAGES:
        print(f"the first {MOST_IMAGES} of {len(files)} images")
    transform = transform_of(model)
    return torch.stack([_load(transform, file) for file in files[:MOST_IMAGES]])


def _load(transform: Transform, file: str) -> Tensor:
    try:
        return transform.load(file)
    except Exception as error:  # damaged files make Pillow's decoders raise nearly any type
        raise ValueError(f"{file} can't be read: {reason_of(error)}") from error


def _model(options: argparse.Namespace, device: torch.device) -> nn.Module:
    overrides = {} if options.num_classes is None else {"num_classes": options.num_classes}
    model = create_model(options.model, checkpoint_path=options.checkpoint, **overrides).eval()
    if not options.checkpoint and not is_folder(options.model):
        say("random weights: every part shows in the answers, which mean nothing")
        randomise(model)
    return model.to(device)


def _info(options: argparse.Namespace) -> int:
    found = info()
    if options.json:
        print(json.dumps(found, indent=1))
        return OK
    print(tabulate([(name, version or "–") for name, version in found["versions"].items()], tablefmt="plain"))
    for device in found["devices"]:
        lines = [(key.replace("_", " "), _said(value)) for key, value in device.items() if value is not None]
        print("\n" + tabulate(lines, tablefmt="plain", disable_numparse=True))
    if found["missing"]:
        print("\nmissing")
        print(tabulate([("", *item) for item in found["missing"].items()], tablefmt="plain"))
    return OK


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)


def _check_files(options: argparse.Namespace) -> None:
    """Complain about what can't be written before anything is measured."""
    if options.plot:
        plots.check_file(options.plot)
    for name, file in (("--json", options.json), ("--csv", options.csv), ("--plot", options.plot)):
        if file:
            check_writable(name, file, in_place=True)
    given = [file.resolve() for file in (options.json, options.csv, options.plot) if file]
    if len(set(given)) < len(given):
        raise ValueError("--json, --csv and --plot must be different files")
    if options.csv and options.csv.exists():
        check_header(options.csv)


def _list_of(convert: Callable[[str], Any]) -> Callable[[str], list]:
    """An argparse type for values between commas, each once."""
    return lambda text: list(dict.fromkeys(convert(part.strip()) for part in text.split(",")))


def _one_of(choices: dict[str, Any]) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(choices)}, got {text!r}")
        return text

    return convert
