"""Batch inference beside its two halves alone: decoding, and the model. `python -m bench.batch`.

JPEGs of 500 x 375 pixels, a whole model, everything in turn, several rounds; rates are the best round's, since another
process can only take time away. Each measurement runs in a process of its own whose PyTorch computes on one thread.
Added to bench/results/batch.csv:

- decode: a decoding process alone; model: the model alone on one thread, images decoded before;
- split WORKERS+THREADS: a run with so many decoding processes and batches computed at a time; its ratio is to the
  slower of decode and model;
- memory N: peak memory in MiB of a run over N images, of its largest process.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import swinfast
from bench import RESULTS
from swinfast.arguments import positive
from swinfast.batch.decode import Decoder, usable_cores
from swinfast.batch.engine import CHUNK
from swinfast.measurements import append, check_header, provenance

BATCH = 32
COLUMNS = ("what", "images_per_sec", "median", "ratio", "images", "mib", "model", "device", "torch", "commit", "date")


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    if options.part:
        print(json.dumps(_measure(options.model, *options.part)))
        return
    check_header(options.results, COLUMNS)
    cores = usable_cores()
    splits = sorted({(1, 1), (1, cores), (cores, 1), (cores, cores)})
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder), max([options.images, *options.memory]))
        found: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for what in ("decode", "model", *(f"split {workers}+{threads}" for workers, threads in splits)):
                rate = _in_process(options.model, what, folder, options.images)["rate"]
                found.setdefault(what, []).append(rate)
                print(f"{what}: {rate:.1f} images/s", flush=True)
        memory = {count: _in_process(options.model, "split 1+1", folder, count)["mib"] for count in options.memory}
    _write(options, found, memory)


def write_jpegs(folder: Path, count: int) -> None:
    """Smooth random pictures of 500 x 375, about 40 KB each."""
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number:06}.jpg", quality=90)


def _in_process(model: str, what: str, folder: str, count: int) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.batch", "--model", model, "--part", what, folder, str(count)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure(name: str, what: str, folder: str, count: str) -> dict[str, float]:
    torch.set_num_threads(1)
    files = sorted(map(str, Path(folder).iterdir()))[: int(count)]
    numbers = [int(number) for number in what.removeprefix("split ").split("+")] if "+" in what else [1, 0]
    model = swinfast.create_model(name)
    predictor = swinfast.Predictor(model, batch_size=BATCH, device="cpu", workers=numbers[0], threads=numbers[1])
    measure = {"decode": _decode, "model": _model}.get(what, _run)
    measure(predictor, files[:BATCH])  # imports, derived tables
    began = time.perf_counter()
    measure(predictor, files)
    seconds = time.perf_counter() - began
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"rate": len(files) / seconds, "mib": peak / 1024}


def _decode(predictor: swinfast.Predictor, files: list[str]) -> None:
    with Decoder(predictor.crop, 1) as decoder:
        chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
        outs = [np.empty((len(chunk), *predictor.crop.shape), np.uint8) for chunk in chunks]
        for future in [decoder.submit(*pair) for pair in zip(chunks, outs, strict=True)]:
            future.result()


def _model(predictor: swinfast.Predictor, files: list[str]) -> None:
    pixels = torch.randint(0, 256, (BATCH, *predictor.crop.shape), dtype=torch.uint8)
    for start in range(0, len(files), BATCH):
        predictor.compute_pixels(pixels[: len(files) - start])


def _run(predictor: swinfast.Predictor, files: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        predictor.write(files, Path(folder, "out.csv"))


def _write(options: argparse.Namespace, found: dict[str, list[float]], memory: dict[int, float]) -> None:
    slower = min(max(found["decode"]), max(found["model"]))
    about = provenance(torch.device("cpu"), "measured")
    common = {"model": options.model} | {name: about[name] for name in COLUMNS if name in about}
    rows = []
    for what, rates in found.items():
        ratio = f"{max(rates) / slower:.3f}"
        rates = {"images_per_sec": f"{max(rates):.1f}", "median": f"{np.median(rates):.1f}"}
        rows.append({"what": what, "images": options.images, "ratio": ratio} | rates | common)
    rows += [{"what": "memory", "images": count, "mib": f"{peak:.0f}"} | common for count, peak in memory.items()]
    append(options.results, *rows, columns=COLUMNS)
    for row in rows:
        print(", ".join(f"{key} {row[key]}" for key in COLUMNS[:6] if row.get(key)))
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Batch inference beside decoding alone and the model alone.")
    add = parser.add_argument
    add("--model", default="examples/digits", help="default: %(default)s")
    add("--images", type=positive, default=2000)
    add("--rounds", type=positive, default=5)
    add("--memory", type=positive, nargs="*", default=[500, 5000], metavar="N", help="numbers of images")
    add("--results", type=Path, default=RESULTS / "batch.csv")
    add("--part", nargs=3, help=argparse.SUPPRESS)  # one measurement, in a process of its own
    return parser


if __name__ == "__main__":
    main()
