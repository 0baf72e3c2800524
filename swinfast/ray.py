"""Beyond one machine: Predictor and Embedder as classes for Ray Data, and whole runs on a cluster.

    import ray, swinfast.ray
    swinfast.ray.predict("s3://bucket/photos", "s3://bucket/predictions", model="swinv2_cr_tiny_ns_224")

Decoding runs as tasks on CPUs, the model in actors; on a cluster without GPUs these decode as well. Tasks and actors
that are lost with their machine run again.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import torch
from torch import nn

from .batch.engine import judged
from .batch.formats import ESCAPE, parquet_table
from .batch.optional import import_extra
from .batch.sources import find_images, has_image_ending
from .batch.worker import load
from .models import create_model, is_folder
from .pipeline import Pipeline, crop_of
from .pixels import Crop
from .predict import Embedder as OneEmbedder
from .predict import Predictor as OnePredictor

if TYPE_CHECKING:
    import pyarrow
    import ray.data

FILENAME, PIXELS, ERROR = "filename", "pixels", "error"
ORDER = "_swinfast_order"  # of the inputs: blocks that ran again come later
UNFINISHED, ERRORS, NEW = ".unfinished", ".errors", ".new"  # folders beside the output
Model = nn.Module | str


@dataclass(frozen=True)
class Summary:
    """What a run did: images of the inputs, and how many of them failed."""

    images: int
    failures: int


class _Actor:
    """A Pipeline for ``Dataset.map_batches``.

    Takes batches with "pixels", as ``decode`` makes them (uint8 [B, H, W, C]), or with "bytes" of image files; images
    are named by "filename" or else "path". Gives tables: "filename", the columns of swinfast's parquet files, and
    "error", which is null for the images that could be read; the others have nulls for their results.

    Args:
        model: A model, or the name or folder of one for swinfast.create_model, whose weights every machine then needs.
        **options: As of swinfast.Predictor (or Embedder).
    """

    make: type[Pipeline]

    def __init__(self, model: Model, **options: Any):
        self._pipeline = self.make(_loaded(model), **options)
        if self._pipeline.device.type == "cpu":
            torch.set_num_threads(1)  # this process is one actor of several on its machine

    def __call__(self, batch: dict[str, np.ndarray]) -> "pyarrow.Table":
        arrow = import_extra("pyarrow", "ray")
        if not {FILENAME, "path"} & batch.keys() or not {PIXELS, "bytes"} & batch.keys():
            raise ValueError(f"a batch must have columns filename or path, and pixels or bytes, got {', '.join(batch)}")
        names = [str(name) for name in batch[FILENAME if FILENAME in batch else "path"]]
        if PIXELS not in batch:
            batch = batch | _decoded(batch["bytes"].tolist(), _OfBytes(self._pipeline.crop))
        reasons = [reason or None for reason in batch.get(ERROR, [None] * len(names))]
        arrays = self._pipeline.no_rows()
        if None in reasons:
            pixels, channels = np.stack(batch[PIXELS]), self._pipeline.crop.channels
            if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != channels:
                raise ValueError(f"pixels must be uint8 [B, H, W, {channels}], got {pixels.dtype} {[*pixels.shape]}")
            pixels = pixels[[reason is None for reason in reasons]]
            reasons, arrays = judged(reasons, self._pipeline.compute_pixels(torch.from_numpy(pixels)))
        good = np.array([reason is None for reason in reasons], dtype=bool)
        rows = np.cumsum(good) - 1
        layout = self._pipeline.layout
        table = parquet_table(layout, [""] * int(good.sum()), arrays)
        table = table.take(arrow.array([int(row) if ok else None for row, ok in zip(rows, good, strict=True)], "int64"))
        shown = [name.encode("utf-8", ESCAPE).decode() for name in layout.shown(names)]
        table = table.set_column(0, FILENAME, arrow.array(shown, arrow.string()))
        table = table.append_column(ERROR, arrow.array(reasons, arrow.string()))
        return table.append_column(ORDER, arrow.array(batch[ORDER], arrow.int64())) if ORDER in batch else table


class Predictor(_Actor):
    __doc__ = _Actor.__doc__
    make = OnePredictor


class Embedder(_Actor):
    __doc__ = _Actor.__doc__
    make = OneEmbedder


def predict(paths: str | Path | Iterable[str | Path], output: str, *, model: Model, **options: Any) -> Summary:
    """Classify images on a Ray cluster.

    Args:
        paths: Image files and folders, searched recursively: on disks that all machines share, or URIs of any
            filesystem that Ray (that is, pyarrow) reads. Tar shards and parquet files in folders are left out.
        output: A folder for parquet files with the rows of ``swinfast predict --output FILE.parquet``, in the order of
            the inputs; where images failed, output.errors has their names and the reasons. Both are written
            once everything is computed; until then results are in output.unfinished, and older ones stay, on
            disks until the new ones are written, in output.new.
        model: A model, or the name or folder of one.
        **options: batch_size (32), concurrency (how many actors, or (least, most); by default one for each GPU, or one
            for each two cores), num_gpus (of an actor; by default 1 where the cluster has GPUs), num_cpus (of an
            actor), filesystem (a pyarrow.fs.FileSystem for all paths and the output), blocks (of images, that are lost
            and done again together; by default one for each 256); all others as of swinfast.Predictor, but for workers:
            the cluster's CPUs decode.

    Raises:
        RuntimeError: Ray is not installed, or gave results of other than all images.
        ValueError: There are no images, the output and an input lie one in the other, or what is there at the output is
            not a folder of parquet files alone.
    """
    return _run(Predictor, paths, output, model, **options)


def embed(paths: str | Path | Iterable[str | Path], output: str, *, model: Model, **options: Any) -> Summary:
    """Embeddings of images on a Ray cluster; everything is as for predict, with swinfast.Embedder."""
    return _run(Embedder, paths, output, model, **options)


def decode(model: nn.Module, filesystem: Any = None, draft: bool = False) -> Any:
    """A function for ``map_batches``: batches with "filename" get "pixels" for a model, and "error"."""
    crop = crop_of(model, draft)

    def decode_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = batch[FILENAME].tolist()
        return batch | _decoded(names, _OfNames(crop, filesystem))

    return decode_batch


def _run(
    actor: type[_Actor],
    paths: str | Path | Iterable[str | Path],
    output: str,
    model: Model,
    *,
    batch_size: int = 32,
    concurrency: int | tuple[int, int] | None = None,
    num_gpus: float | None = None,
    num_cpus: float | None = None,
    filesystem: Any = None,
    blocks: int | None = None,
    draft: bool = False,
    **options: Any,
) -> Summary:
    ray = import_extra("ray", "ray")
    data = import_extra("ray.data", "ray")
    paths = [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    output = str(output).rstrip("/")
    if _is_local(output, filesystem):
        output = str(Path(output).absolute())  # the cluster's processes are in other folders
    _check_output(output, paths, filesystem)
    names = list(_names(paths, filesystem))
    if not names:
        raise ValueError(f"found no images in {', '.join(paths)}")
    model = _loaded(model)
    if not ray.is_initialized():
        ray.init()
    cluster = ray.cluster_resources()
    if num_gpus is None:
        num_gpus = 1 if cluster.get("GPU") else 0
    if concurrency is None:
        concurrency = max(1, int(cluster.get("GPU", 0) / num_gpus if num_gpus else cluster.get("CPU", 2) // 2))
    least, most = (concurrency, concurrency) if isinstance(concurrency, int) else concurrency
    options |= {"batch_size": batch_size, "workers": 0, "draft": draft}
    items = [{FILENAME: name, ORDER: number} for number, name in enumerate(names)]
    images = data.from_items(items, override_num_blocks=blocks or -(-len(names) // 256))
    images.context.execution_options.preserve_order = True
    computed = images.map_batches(decode(model, filesystem, draft), batch_size=batch_size).map_batches(
        actor,
        fn_constructor_args=(model,),
        fn_constructor_kwargs=options,
        batch_size=batch_size,
        compute=data.ActorPoolStrategy(min_size=least, max_size=most),
        num_gpus=num_gpus or None,
        num_cpus=num_cpus,
    )
    return _write(computed, output, filesystem, len(names))


def _write(computed: "ray.data.Dataset", output: str, filesystem: Any, given: int) -> Summary:
    """Everything first, then good rows and failures apart, in place of older ones: beside these, where a folder can be
    renamed."""
    data, fs = import_extra("ray.data", "ray"), import_extra("pyarrow.fs", "ray")
    unfinished, errors = output + UNFINISHED, output + ERRORS
    _remove(unfinished, filesystem)
    computed.write_parquet(unfinished, filesystem=filesystem)
    whole = data.read_parquet(unfinished, filesystem=filesystem).sort(ORDER).materialize()
    whole.context.execution_options.preserve_order = True
    whole.context.max_errored_blocks = 0  # whatever the program allows otherwise
    images = whole.count()
    if images != given:
        raise RuntimeError(f"Ray gave results of {images} images, {given} were given to it; they are in {unfinished}")
    failed = whole.map_batches(_failures, batch_format="pyarrow")
    failures = failed.count()
    results = {output: whole.map_batches(_good, batch_format="pyarrow")} | ({errors: failed} if failures else {})
    new = NEW if _located(output, filesystem)[0].type_name == "local" else ""  # others may not rename folders at once
    for folder in (errors, output):
        _remove(folder + new, filesystem)
    for folder, rows in results.items():
        rows.write_parquet(folder + new, filesystem=filesystem)
    for folder in (errors, output) if new else ():
        _remove(folder, filesystem)
        where, place = _located(folder + new, filesystem)
        if where.get_file_info(place).type == fs.FileType.Directory:  # Ray makes no folder for no rows
            where.move(place, _located(folder, filesystem)[1])
    _remove(unfinished, filesystem)
    return Summary(images, failures)


def _good(table: "pyarrow.Table") -> "pyarrow.Table":
    compute = import_extra("pyarrow.compute", "ray")
    return table.filter(compute.is_null(table[ERROR])).drop_columns([ERROR, ORDER])


def _failures(table: "pyarrow.Table") -> "pyarrow.Table":
    compute = import_extra("pyarrow.compute", "ray")
    return table.filter(compute.is_valid(table[ERROR])).select([FILENAME, ERROR]).rename_columns([FILENAME, "reason"])


def _loaded(model: Model) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    return create_model(model, pretrained=not is_folder(model))


@dataclass
class _OfNames:
    """A Crop of files of any filesystem."""

    crop: Crop
    filesystem: Any

    def load(self, name: str) -> Any:
        if _is_local(name, self.filesystem):
            return self.crop.load(name)
        where, path = _resolved(name, self.filesystem)
        with where.open_input_stream(path) as stream:
            return self.crop.load(stream.read())


@dataclass
class _OfBytes:
    """A Crop of what files hold, and of nothing else: a text is no name of a file."""

    crop: Crop

    def load(self, data: Any) -> Any:
        return self.crop.load(bytes(memoryview(data)))


def _decoded(sources: list[Any], loader: _OfNames | _OfBytes) -> dict[str, np.ndarray]:
    """Pixels and reasons of failures ("" for none), a row for each source."""
    shape = loader.crop.shape
    pixels = np.zeros((len(sources), *shape), np.uint8)
    reasons = []
    for row, source in enumerate(sources):
        image, reason = load(loader, source)
        if image is not None:
            pixels[row] = np.asarray(image).reshape(shape)
        reasons.append(reason or "")
    return {PIXELS: pixels, ERROR: np.array(reasons, dtype=object)}


def _is_local(path: str, filesystem: Any) -> bool:
    """Whether a path is of this machine's disks: neither of a filesystem that was given, nor a URI."""
    return filesystem is None and "://" not in path


def _names(paths: Iterable[str], filesystem: Any) -> Iterator[str]:
    """Names of the images; those of other filesystems as URIs."""
    for path in paths:
        if _is_local(path, filesystem):
            yield from (str(Path(file).absolute()) for file in find_images([path]))
            continue
        fs = import_extra("pyarrow.fs", "ray")
        where, root = _resolved(path, filesystem)
        if where.get_file_info(root).type != fs.FileType.Directory:
            yield path
            continue
        found = where.get_file_info(fs.FileSelector(root, recursive=True))
        inside = sorted(info.path for info in found if info.is_file and has_image_ending(info.path))
        if filesystem is not None:
            yield from inside
            continue
        folder, mark, query = path.partition("?")
        below = (quote(file[len(root.rstrip("/")) :], errors="surrogateescape") for file in inside)
        yield from (folder.rstrip("/") + name + mark + query for name in below)


def _resolved(path: str, filesystem: Any) -> tuple[Any, str]:
    return (filesystem, path) if filesystem is not None else import_extra("pyarrow.fs", "ray").FileSystem.from_uri(path)


def _check_output(output: str, paths: list[str], filesystem: Any) -> None:
    """ValueError for an output that is not apart from the inputs, or that would replace anything but older results."""
    fs = import_extra("pyarrow.fs", "ray")
    places = [(path, *_place(path, filesystem)) for path in paths]
    for folder in (output + end for end in ("", UNFINISHED, ERRORS, NEW, ERRORS + NEW)):
        kind, place = _place(folder, filesystem)
        for path, other, given in places:
            if kind == other and (place.is_relative_to(given) or given.is_relative_to(place)):
                raise ValueError(f"output {folder} and input {path} must be apart, one is in the other")
        where, root = _located(folder, filesystem)
        there = where.get_file_info(root)
        others = [root] if there.is_file else []
        if there.type == fs.FileType.Directory:
            found = where.get_file_info(fs.FileSelector(root))
            others = [info.path for info in found if not info.is_file or info.extension != "parquet"]
        if others:
            raise ValueError(f"output {folder} must be new, or hold parquet files alone: {others[0]} is there")


def _place(path: str, filesystem: Any) -> tuple[str, PurePath]:
    """A kind of filesystem, and a path in it that can be compared with others."""
    if _is_local(path, filesystem):
        return "local", Path(os.path.realpath(path))
    where, root = _resolved(path, filesystem)
    return where.type_name, Path(os.path.realpath(root)) if where.type_name == "local" else PurePosixPath("/", root)


def _remove(folder: str, filesystem: Any) -> None:
    fs = import_extra("pyarrow.fs", "ray")
    where, path = _located(folder, filesystem)
    if where.get_file_info(path).type == fs.FileType.Directory:
        where.delete_dir(path)


def _located(path: str, filesystem: Any) -> tuple[Any, str]:
    """_resolved, for local paths too."""
    return _resolved(Path(path).absolute().as_uri() if _is_local(path, filesystem) else path, filesystem)
