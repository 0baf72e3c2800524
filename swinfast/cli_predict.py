"""``swinfast predict``, ``embed`` and ``features``: images through a model, into files."""

import argparse
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .arguments import class_count
from .backends import CHOICES
from .batch.decode import usable_cores
from .batch.formats import check_ending
from .batch.parts import Parts
from .batch.sources import Images
from .exit_codes import INTERRUPTED, OK, SOME_FAILED
from .files import check_writable
from .labels import LABEL_TYPES, imagenet_labels
from .measurements import DTYPES
from .messages import say
from .models import create_model, is_folder
from .pipeline import Pipeline, resolve_device
from .predict import STORED, Embedder, Failure, FeatureExtractor, Prediction, Predictor
from .results import table

MOST_SAID = 100  # failures told of on the terminal; the errors file has all


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add predict, embed and features to the command line."""
    for name, what, add_options in (
        ("predict", "classify images", _predict_options),
        ("embed", "pooled embeddings of images", _embed_options),
        ("features", "feature maps of a model's stages for images", _features_options),
    ):
        command = commands.add_parser(name, help=what, description=f"{what.capitalize()}.")
        command.set_defaults(usage_error=command.error)
        _image_options(command.add_argument_group("images").add_argument)
        _model_options(command.add_argument_group("model").add_argument)
        add_options(command, command.add_argument_group("results").add_argument)
        _run_options(command.add_argument_group("how it runs").add_argument)


def _image_options(add: Callable[..., Any]) -> None:
    add("paths", nargs="*", metavar="PATH", help="image files, tar shards, parquet files, folders of these (searched "
        "recursively), glob patterns")  # fmt: skip
    add("--files-from", metavar="FILE", help="a text file with one more PATH a line; - for the standard input")
    add("--members", default="*", metavar="PATTERN", help="which images of tar shards, by their names (default: all)")
    add("--image-column", metavar="NAME", help="of parquet files (default: image, or the first one with bytes)")
    add("--draft", action="store_true", help="decode large JPEGs at a fraction of their size: faster, but CHANGES "
        "PIXELS and so answers")  # fmt: skip


def _model_options(add: Callable[..., Any]) -> None:
    add("--model", default="swinv2_cr_tiny_ns_224", help="name or folder of a model (default: %(default)s)")
    add("--checkpoint", default="", metavar="FILE", help="weights (default: the folder's, or the published ones)")
    add(
        "--num-classes",
        type=class_count,
        metavar="N",
        help="classes of the checkpoint, where not the model's own",
    )
    add("--dtype", choices=DTYPES, default="float32", help="to compute in (default: %(default)s)")
    add("--backend", choices=CHOICES, default="auto", help="what computes (default: %(default)s)")


def _run_options(add: Callable[..., Any]) -> None:
    add("--resume", action="store_true", help="go on where an earlier run ended, or start where there is none")
    add("--strict", action="store_true", help="stop at the first image that fails")
    add("--device", default="auto", help="cpu, cuda, cuda:1, … (default: a GPU where there is one)")
    add("--devices", metavar="LIST", help="all GPUs, by the word all, or several devices with commas between them: a "
        "process for each")  # fmt: skip
    add("--batch-size", type=_batch_size, default=32, metavar="N", help="images at a time, or auto to find a good "
        "number (default: %(default)s)")  # fmt: skip
    add("--workers", type=int, metavar="N", help="processes that decode (default: as many as there are cores)")
    add("--threads", type=int, metavar="N", help="on a CPU, batches computed at a time, each on one core (default: as "
        "many as there are cores); 0 for one batch at a time on all cores")  # fmt: skip
    add("--part-size", type=int, metavar="N", help="images after which results are safe from whatever happens "
        "(default: 1024, fewer where these are large)")  # fmt: skip
    add("--quiet", action="store_true", help="say nothing but errors")


def _predict_options(command: argparse.ArgumentParser, add: Callable[..., Any]) -> None:
    command.set_defaults(run=_predict)
    add("--topk", type=int, default=5, metavar="K", help="classes for each image (default: %(default)s)")
    add("--output", metavar="FILE", help="a .csv, .jsonl or .parquet file (default: a table on the terminal)")
    add("--label-type", choices=LABEL_TYPES, default="description", help="of ImageNet's classes: WordNet's id, words, "
        "or words and definition (default: %(default)s)")  # fmt: skip
    flag = argparse.BooleanOptionalAction
    add("--include-index", action=flag, default=True, help="the numbers of classes, beside their names")
    add("--fullname", action=flag, default=True, help="names of images with their folders")


def _embed_options(command: argparse.ArgumentParser, add: Callable[..., Any]) -> None:
    command.set_defaults(run=_embed)
    add("--output", required=True, metavar="FILE", help="a .npy or .parquet file")
    add("--stored", choices=STORED, default="float32", help="dtype in the file (default: %(default)s)")


def _features_options(command: argparse.ArgumentParser, add: Callable[..., Any]) -> None:
    command.set_defaults(run=_features)
    add("--output", required=True, metavar="FILE", help="a .npy file (one for each stage) or a .parquet file")
    add("--stages", type=int, nargs="+", metavar="N", help="from 0, or from the end with -1 (default: all)")
    add("--stored", choices=STORED, default="float32", help="dtype in the file (default: %(default)s)")


def _batch_size(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number or auto, got {text!r}") from None


def _predict(options: argparse.Namespace) -> int:
    def pipeline(model: nn.Module, **common: Any) -> Predictor:
        names = {} if options.label_type == "description" else {"labels": imagenet_labels(options.label_type)}
        if names and getattr(model, "num_classes", 0) != 1000:
            raise ValueError(
                f"--label-type {options.label_type} is for ImageNet's 1000 classes, not {model.num_classes}"
            )
        flags = {"include_index": options.include_index, "fullname": options.fullname}
        return Predictor(model, topk=options.topk, **names, **flags, **common)

    if options.output is None and (options.resume or options.devices):
        raise ValueError("--resume and --devices need an --output")
    return _run(options, Predictor, pipeline)


def _embed(options: argparse.Namespace) -> int:
    return _run(options, Embedder, lambda model, **common: Embedder(model, stored=options.stored, **common))


def _features(options: argparse.Namespace) -> int:
    def pipeline(model: nn.Module, **common: Any) -> FeatureExtractor:
        return FeatureExtractor(model, stages=options.stages, stored=options.stored, **common)

    return _run(options, FeatureExtractor, pipeline)


def _run(options: argparse.Namespace, kind: type[Pipeline], make: Callable[..., Pipeline]) -> int:
    if not options.paths and not options.files_from:
        options.usage_error("give a PATH, or --files-from")
    if options.output is not None:  # what can't be written is said before anything is loaded
        check_ending(Path(options.output), kind.endings)
        check_writable("output", Path(options.output))
    with _regular(options.files_from) as files_from:
        images = Images(tuple(options.paths), files_from, options.members, options.image_column, options.output)
        return _run_over(images, options, make)


@contextmanager
def _regular(files_from: str | None) -> Iterator[str | None]:
    """The list of paths as a file that can be read again and again: one that comes through a pipe is copied."""
    if files_from is None or (files_from != "-" and not _is_stream(Path(files_from))):
        yield files_from
        return
    if files_from == "-" and sys.stdin is None:
        raise ValueError("--files-from - reads the standard input, and there is none")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--files-from must be a regular file under torchrun, as every process reads it")
    with tempfile.TemporaryDirectory(prefix="swinfast-") as folder:
        copy = Path(folder, "files.txt")
        with copy.open("wb") as target:
            if files_from == "-":
                shutil.copyfileobj(sys.stdin.buffer, target)
            else:
                with Path(files_from).open("rb") as source:
                    shutil.copyfileobj(source, target)
        yield str(copy)


def _is_stream(file: Path) -> bool:
    """Whether it is no regular file, or one that another process knows by another name, or by none."""
    return file.exists() and (not file.is_file() or Path("/dev") in file.absolute().parents)


def _run_over(images: Images, options: argparse.Namespace, make: Callable[..., Pipeline]) -> int:
    if next(iter(images), None) is None:
        raise ValueError(f"found no images in {', '.join([*options.paths, *filter(None, [options.files_from])])}")
    devices = _devices(options)
    pipeline = make(_model(options), **_common(options, devices))
    progress = _Progress(options, images)
    pipeline.say = progress.say
    with progress:
        try:
            if options.output is None:
                _show(pipeline, images, options, progress)
            else:
                progress.summary = pipeline.write(
                    images,
                    options.output,
                    resume=options.resume,
                    strict=options.strict,
                    part_size=options.part_size,
                    devices=devices if len(devices) > 1 else (),
                    watch=progress,
                )
        except KeyboardInterrupt:
            progress.interrupted()
            return INTERRUPTED
    return progress.close()


def _model(options: argparse.Namespace) -> nn.Module:
    overrides = {} if options.num_classes is None else {"num_classes": options.num_classes}
    has_weights = options.checkpoint or is_folder(options.model)
    return create_model(options.model, pretrained=not has_weights, checkpoint_path=options.checkpoint, **overrides)


def _devices(options: argparse.Namespace) -> list[str]:
    if options.devices is None:
        return [options.device]
    if options.devices != "all":
        return options.devices.split(",")
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def _common(options: argparse.Namespace, devices: list[str]) -> dict[str, Any]:
    """Options of every Pipeline. On a CPU each core computes a batch of its own, and there is a decoding process for
    each core too: the operating system then gives the cores to whichever of the two is behind."""
    cores = usable_cores()
    for device in devices[1:]:
        resolve_device(device)
    threads = cores if options.threads is None else options.threads
    if threads > 0:
        torch.set_num_threads(1)
    return {
        "device": devices[0],
        "dtype": DTYPES[options.dtype],
        "batch_size": options.batch_size,
        "backend": options.backend,
        "workers": cores if options.workers is None else options.workers,
        "threads": threads,
        "draft": options.draft,
    }


def _show(pipeline: Predictor, images: Images, options: argparse.Namespace, progress: "_Progress") -> None:
    with table() as show:
        for result in pipeline.predict(images):
            failed = isinstance(result, Failure)
            if failed and options.strict:
                raise RuntimeError(f"{result.filename} failed: {result.reason}")
            progress([result.filename], [result.reason if failed else None])
            if not failed:
                name = result.filename if options.fullname else PurePath(result.filename).name
                show(Prediction(name, result.indices, result.labels, result.probabilities))


class _Progress:
    """What is said on the terminal while images go by, and after them."""

    def __init__(self, options: argparse.Namespace, images: Images):
        self.summary = None
        self._options = options
        self._images = self._failures = 0
        done = Parts.images_of(Path(options.output)) if options.output and options.resume else 0
        self._bar = tqdm(unit="img", disable=True if options.quiet else None, initial=done)
        if not self._bar.disable:
            threading.Thread(target=self._find_total, args=(images,), daemon=True).start()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def __call__(self, names: list[str], reasons: list[str | None]) -> None:
        for name, reason in zip(names, reasons, strict=True):
            if reason is not None:
                self._failures += 1
                if self._failures <= MOST_SAID:
                    self.say(f"skipped {name}: {reason}")
        self._images += len(names)
        self._bar.update(len(names))

    def say(self, message: str) -> None:
        say(message)

    def interrupted(self) -> None:
        if self._options.output is None:
            self.say("interrupted, the results so far are written to the terminal")
        else:
            done = Parts.images_of(Path(self._options.output))
            self.say(f"interrupted, {done} images are done: --resume goes on from there")

    def close(self) -> int:
        images, failures = self._images, self._failures
        if self.summary is not None:
            images, failures = self.summary.images, self.summary.failures
            if not self._options.quiet:
                self.say(str(self.summary))
        if failures:
            self.say(f"{failures} of {images} images failed")
        return SOME_FAILED if failures else OK

    def _find_total(self, images: Images) -> None:
        """While the run goes on already: to go through a million names takes a while."""
        try:
            self._bar.total = images.count()
        except (OSError, RuntimeError, ValueError):  # the run will say it
            return
        self._bar.refresh()
