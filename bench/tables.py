"""Reading result files: runs of engines that were measured together, and the tables that show them."""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from swinfast.plots import label_of

RESULTS = Path(__file__).parent / "results"
MAIN_MODEL = "swinv2_cr_tiny_ns_224"
OURS, EAGER = "swinfast", "timm eager"
FLOOR = "its matrix products alone"  # no engine, but what bounds them
Row = dict[str, str]


class Run(NamedTuple):
    """Engines that took turns: rows by label, of one model, dtype, batch size and device."""

    model: str
    dtype: str
    batch: int
    device: str
    rows: dict[str, Row]

    def speed(self, label: str) -> float | None:
        return float(self.rows[label]["infer_samples_per_sec"]) if label in self.rows else None


def read(pattern: str) -> list[Row]:
    """The rows of all result files with names of a pattern, in the order of the names."""
    rows: list[Row] = []
    for path in sorted(RESULTS.glob(pattern)):
        with path.open(newline="", encoding="utf-8") as stream:
            rows += csv.DictReader(stream)
    return rows


def latest_runs(rows: Iterable[Row]) -> list[Run]:
    """The last run of each model, dtype, batch size and device, sorted. Rows of one run follow each other in a file."""
    runs: list[Run] = []
    last = None
    for row in rows:
        key = tuple(row[name] for name in ("dtype", "infer_batch_size", "device", "commit", "date"))
        label = label_of(row)
        if key != last or label in runs[-1].rows:
            runs.append(Run(row["model"], row["dtype"], int(row["infer_batch_size"]), row["device"], {}))
        runs[-1].rows[label] = row
        last = key
    seen = list(dict.fromkeys(word for run in runs for word in (run.device, run.model, run.dtype)))
    last_ones = {run[:4]: run for run in runs}.values()
    return sorted(last_ones, key=lambda run: (*map(seen.index, (run.device, run.model, run.dtype)), run.batch))


def slug(text: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def speeds(runs: Sequence[Run], command: str) -> str:
    """Images per second of each engine, on one device."""
    labels = sorted(dict.fromkeys(label for run in runs for label in run.rows), key=lambda label: label != OURS)
    several = len({run.model for run in runs}) > 1
    lines = []
    for run in runs:
        ours, eager = run.speed(OURS), run.speed(EAGER)
        others = [run.speed(label) for label in run.rows if not _aside(label)]
        errors = " / ".join(run.rows[label]["rel_error"] if label in run.rows else "–" for label in (OURS, EAGER))
        cells = [number(run.speed(label)) for label in labels]
        cells += [ratio(ours, eager), ratio(ours, max(others, default=None)), errors]
        lines.append((*([f"`{run.model}`"] if several else []), run.dtype, run.batch, *cells))
    headers = (*(["model"] if several else []), "dtype", "batch", *labels)
    headers += ("swinfast / eager", "swinfast / fastest other", "error: ours / timm's")
    return _github(lines, headers) + "\n\n" + _caption(runs, command)


def details(runs: Sequence[Run]) -> str:
    """Latency, memory and answers of each engine, on one device; folded away until it is asked for."""
    lines = []
    for run in runs:
        for label in sorted(run.rows, key=lambda label: label != OURS):
            row = run.rows[label]
            agreement = f"{float(row['top1_agreement']):.1%}" if row["top1_agreement"] else "–"
            times = (row["infer_step_time"], row["infer_step_time_p95"], ratio(run.speed(label), run.speed(EAGER)))
            checks = (row["rel_error"] or "–", agreement, row["peak_memory"] or "–")
            lines.append((f"`{run.model}`", run.dtype, run.batch, label, *times, *checks))
    headers = ("model", "dtype", "batch", "engine", "median, ms", "p95, ms", "eager = 1", "error", "top-1", "peak, MB")
    table = _github(lines, headers)
    return f"<details><summary>Latency, memory and answers of each engine</summary>\n\n{table}\n\n</details>"


def kernels(rows: Sequence[Row]) -> str:
    """Time, and achieved rates, of each kernel; of a repeated measurement the last."""
    columns = ("kernel", "shape", "dtype", "time_us", "tb_per_s", "tflop_per_s", "share_of_floor")
    latest = {tuple(row[name] for name in ("kernel", "shape", "dtype")): row for row in rows}
    lines = [[row.get(name, "") or "–" for name in columns] for row in latest.values()]
    return _github(lines, ("kernel", "shape", "dtype", "µs", "TB/s", "TFLOP/s", "share of its floor"))


def number(value: float | None) -> str:
    """Three digits at least, none that mean nothing."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(speed: float | None, other: float | None) -> str:
    return f"{speed / other:.2f}×" if speed and other else "–"


def _aside(label: str) -> bool:
    """swinfast itself, and what runs another model or none."""
    return label in (OURS, FLOOR) or label.startswith("ViT")


def _caption(runs: Sequence[Run], command: str) -> str:
    run = runs[0]
    row = next(iter(run.rows.values()))
    versions = ", ".join(dict.fromkeys(f"PyTorch {one['torch']}" for run in runs for one in run.rows.values()))
    if row["driver"]:
        versions += f", Triton {row['triton']}, driver {row['driver']}"
    models = ", ".join(f"`{model}`" for model in dict.fromkeys(run.model for run in runs))
    return (
        f"Images/s of {models} on {run.device}, {versions}: medians of one interleaved run a line "
        f"(`python -m {command}`). Error: relative RMS against the same model in float64."
    )


def _github(lines: Sequence[Sequence], headers: Sequence[str]) -> str:
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
