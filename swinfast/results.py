"""Predictions written as csv, jsonl or a table.

Each writer is a context manager that gives a function to write one Prediction with. Files are written line by line,
so a run that is stopped leaves whole lines behind. Bytes of a filename that are not UTF-8 are written as escapes.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tabulate import tabulate

from .predict import Prediction

Write = Callable[[Prediction], None]
ESCAPE = "backslashreplace"


def open_writer(path: str | None, topk: int) -> AbstractContextManager[Write]:
    """The writer for a file by its ending, or for a table on the terminal where path is None.

    Raises:
        ValueError: Another ending than .csv or .jsonl.
    """
    if path is None:
        return _table()
    writers = {".csv": _csv, ".jsonl": _jsonl}
    if Path(path).suffix not in writers:
        raise ValueError(f"output must end in .csv or .jsonl, got {path!r}")
    return writers[Path(path).suffix](path, topk)


@contextmanager
def _csv(path: str, topk: int) -> Iterator[Write]:
    """Columns filename, top1_index, top1_label, top1_prob, top2_index, …"""
    with Path(path).open("w", newline="", encoding="utf-8", errors=ESCAPE, buffering=1) as stream:
        rows = csv.writer(stream)
        rows.writerow(
            ["filename", *(f"top{n}_{key}" for n in range(1, topk + 1) for key in ("index", "label", "prob"))]
        )

        def write(prediction: Prediction) -> None:
            rows.writerow([prediction.filename, *(cell for top in _top(prediction) for cell in top.values())])

        yield write


@contextmanager
def _jsonl(path: str, topk: int) -> Iterator[Write]:
    """Lines of {"filename": …, "predictions": [{"index": …, "label": …, "prob": …}, …]}."""
    with Path(path).open("w", encoding="utf-8", errors=ESCAPE, buffering=1) as stream:

        def write(prediction: Prediction) -> None:
            row = {"filename": prediction.filename, "predictions": _top(prediction)}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")

        yield write


@contextmanager
def _table() -> Iterator[Write]:
    """One table for all images, once they are done or the run is stopped."""
    rows = []

    def write(prediction: Prediction) -> None:
        rows.append([prediction.filename, *(f"{top['label']} {top['prob']:.1%}" for top in _top(prediction))])

    try:
        yield write
    finally:
        if rows:
            headers = ["image", *(f"top {rank}" for rank in range(1, len(rows[0])))]
            table = tabulate(rows, headers=headers, disable_numparse=True)
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
            print(table.encode(encoding, ESCAPE).decode(encoding))


def _top(prediction: Prediction) -> list[dict[str, int | str | float]]:
    rows = zip(prediction.indices, prediction.labels, prediction.probabilities, strict=True)
    return [{"index": index, "label": label, "prob": round(probability, 6)} for index, label, probability in rows]
