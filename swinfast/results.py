"""Predictions as tables on the terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tabulate import tabulate

from .predict import Prediction

LARGEST = 1000  # rows of one table: more images make several tables


@contextmanager
def table() -> Iterator[Callable[[Prediction], None]]:
    """Gives a function that takes one Prediction after the other; what it got is printed in the end, or if stopped."""
    rows: list[list[str]] = []

    def write(prediction: Prediction) -> None:
        tops = zip(prediction.labels, prediction.probabilities, strict=True)
        rows.append([prediction.filename, *(f"{label} {probability:.1%}" for label, probability in tops)])
        if len(rows) == LARGEST:
            _print(rows)

    try:
        yield write
    finally:
        _print(rows)


def _print(rows: list[list[str]]) -> None:
    if rows:
        headers = ["image", *(f"top {rank}" for rank in range(1, len(rows[0])))]
        print(tabulate(rows, headers=headers, disable_numparse=True))
        rows.clear()
