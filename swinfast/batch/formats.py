"""Output files: how a part of the results is written, and how parts become one file."""

import csv
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from .compute import Arrays
from .optional import import_extra
from .places import Places

ESCAPE = "backslashreplace"  # for names whose bytes are not UTF-8
PREDICTIONS = (".csv", ".jsonl", ".parquet")
ARRAYS = (".npy", ".parquet")
Top = dict[str, int | str | float]


@dataclass(frozen=True)
class Layout:
    """What the rows hold.

    Attributes:
        labels: Of the classes, where the rows are predictions: arrays "index" and "prob", [B, topk] each.
        include_index: Whether predictions have the class numbers.
        fullname: Whether names of files are given with their folders.
        arrays: Otherwise the shape of a row and the dtype of each array.
    """

    labels: tuple[str, ...] = ()
    topk: int = 0
    include_index: bool = True
    fullname: bool = True
    arrays: dict[str, tuple[tuple[int, ...], np.dtype]] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """What is told of each of the top classes."""
        return ("index", "label", "prob") if self.include_index else ("label", "prob")

    def shown(self, names: list[str]) -> list[str]:
        """Names as the rows have them."""
        return names if self.fullname else [PurePath(name).name for name in names]

    def tops(self, arrays: Arrays) -> Iterator[list[Top]]:
        """For each image its top classes, most probable first."""
        for indices, probabilities in zip(arrays["index"].tolist(), arrays["prob"].tolist(), strict=True):
            whole = (
                {"index": index, "label": self.labels[index], "prob": round(probability, 6)}
                for index, probability in zip(indices, probabilities, strict=True)
            )
            yield [{key: top[key] for key in self.keys} for top in whole]


class OutputFile(NamedTuple):
    """One of the files of a run: ``write(path, names, arrays)`` makes a part, ``merge(parts, path)`` the whole."""

    suffix: str  # of the parts
    target: Path
    write: Callable[[Path, list[str], Arrays], None]
    merge: Callable[[list[Path], Path], None]


def check_ending(output: Path, endings: tuple[str, ...]) -> None:
    """ValueError for an output of another format, RuntimeError where the library for it is missing."""
    if output.suffix not in endings:
        raise ValueError(f"output must end in {', '.join(endings[:-1])} or {endings[-1]}, got {str(output)!r}")
    if output.suffix == ".parquet":
        import_extra("pyarrow.parquet", "parquet")


def output_files(output: Path, layout: Layout) -> list[OutputFile]:
    """The files that hold the results; with several arrays in .npy format, one for each array."""
    if output.suffix == ".csv":
        return [_csv(output, _prediction_header(layout), lambda names, arrays: _flat(layout, names, arrays))]
    if output.suffix == ".jsonl":
        return [OutputFile(".jsonl", output, lambda *part: _write_jsonl(layout, *part), _concatenate)]
    if output.suffix == ".parquet":
        return [_parquet(output, layout)]
    index = _csv(Places.of(output).index, ["filename"], lambda names, arrays: ([name] for name in names))
    single = len(layout.arrays) == 1
    return [index._replace(suffix=".index.csv")] + [
        _npy(name, output if single else output.with_suffix(f".{name}.npy"), *shape_and_dtype)
        for name, shape_and_dtype in layout.arrays.items()
    ]


def write_csv(path: Path, header: list[str], rows: Iterable[list]) -> None:
    """A csv file; its header may be empty."""
    with path.open("w", newline="", encoding="utf-8", errors=ESCAPE) as stream:
        writer = csv.writer(stream)
        if header:
            writer.writerow(header)
        writer.writerows(rows)


def _csv(target: Path, header: list[str], rows: Callable[[list[str], Arrays], Iterable[list]]) -> OutputFile:
    def merge(parts: list[Path], path: Path) -> None:
        write_csv(path, header, [])
        _concatenate(parts, path)

    return OutputFile(".csv", target, lambda path, names, arrays: write_csv(path, [], rows(names, arrays)), merge)


def _prediction_header(layout: Layout) -> list[str]:
    return ["filename", *(f"top{rank}_{key}" for rank in range(1, layout.topk + 1) for key in layout.keys)]


def _flat(layout: Layout, names: list[str], arrays: Arrays) -> Iterator[list]:
    for name, tops in zip(layout.shown(names), layout.tops(arrays), strict=True):
        yield [name, *(value for top in tops for value in top.values())]


def _write_jsonl(layout: Layout, path: Path, names: list[str], arrays: Arrays) -> None:
    """Lines of {"filename": …, "predictions": [{"index": …, "label": …, "prob": …}, …]}."""
    with path.open("w", encoding="utf-8", errors=ESCAPE) as stream:
        for name, tops in zip(layout.shown(names), layout.tops(arrays), strict=True):
            stream.write(json.dumps({"filename": name, "predictions": tops}, ensure_ascii=False) + "\n")


def _concatenate(parts: list[Path], path: Path) -> None:
    with path.open("ab") as stream:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, stream, 1 << 20)


def _npy(name: str, target: Path, shape: tuple[int, ...], dtype: np.dtype) -> OutputFile:
    def write(path: Path, names: list[str], arrays: Arrays) -> None:
        with path.open("wb") as stream:  # a path would get another ending
            np.save(stream, arrays[name])

    def merge(parts: list[Path], path: Path) -> None:
        rows = sum(len(np.load(part, mmap_mode="r")) for part in parts)
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows, *shape)}
        with path.open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for part in parts:
                with part.open("rb") as source:
                    np.lib.format.read_magic(source)
                    np.lib.format.read_array_header_1_0(source)
                    shutil.copyfileobj(source, stream, 1 << 24)

    return OutputFile(f".{name}.npy", target, write, merge)


def _parquet(target: Path, layout: Layout) -> OutputFile:
    parquet = import_extra("pyarrow.parquet", "parquet")
    schema = parquet_schema(layout)

    def write(path: Path, names: list[str], arrays: Arrays) -> None:
        parquet.write_table(parquet_table(layout, names, arrays), path)

    def merge(parts: list[Path], path: Path) -> None:
        with parquet.ParquetWriter(path, schema) as whole:
            for part in parts:
                whole.write_table(parquet.read_table(part, schema=schema))

    return OutputFile(".parquet", target, write, merge)


def parquet_schema(layout: Layout) -> Any:
    """Columns as in csv files for predictions; otherwise fixed-size lists, or tensors for more than one axis."""
    arrow = import_extra("pyarrow", "parquet")
    kinds = {"index": arrow.int32(), "label": arrow.string(), "prob": arrow.float32()}
    columns = [("filename", arrow.string())]
    columns += [(name, kinds[name.partition("_")[2]]) for name in _prediction_header(layout)[1:]]
    for name, (shape, dtype) in layout.arrays.items():
        value = arrow.from_numpy_dtype(dtype)
        kind = arrow.list_(value, *shape) if len(shape) == 1 else arrow.fixed_shape_tensor(value, shape)
        columns.append((name, kind))
    return arrow.schema(columns)


def parquet_table(layout: Layout, names: list[str], arrays: Arrays) -> Any:
    """A pyarrow.Table with parquet_schema."""
    arrow = import_extra("pyarrow", "parquet")
    schema = parquet_schema(layout)
    columns: list[Any] = [[name.encode("utf-8", ESCAPE).decode() for name in layout.shown(names)]]
    if layout.topk:
        columns += map(list, zip(*(row[1:] for row in _flat(layout, names, arrays)), strict=True))
        columns += [[]] * (len(schema) - len(columns))  # where there are no rows
    for name in layout.arrays:
        flat = arrow.array(arrays[name].reshape(-1))
        kind = schema.field(name).type
        if isinstance(kind, arrow.FixedShapeTensorType):
            storage = arrow.FixedSizeListArray.from_arrays(flat, kind.storage_type.list_size)
            columns.append(arrow.ExtensionArray.from_storage(kind, storage))
        else:
            columns.append(arrow.FixedSizeListArray.from_arrays(flat, kind.list_size))
    return arrow.table(
        [
            column if isinstance(column, arrow.Array) else arrow.array(column, kind)
            for column, kind in zip(columns, schema.types, strict=True)
        ],
        schema=schema,
    )
