"""Reading result files: runs of engines that were measured together, and the tables that show them."""

import csv
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tabulate import tabulate

from bench import RESULTS
from swinfast.plots import label_of

MAIN_MODEL = "swinv2_cr_tiny_ns_224"
OURS, EAGER = "swinfast", "timm eager"
FLOOR = "its matrix products alone"  # no engine, but what bounds them
KERNEL_COLUMNS = {  # of the file: in the table
    "kernel": "kernel",
    "shape": "shape",
    "dtype": "dtype",
    "time_us": "µs",
    "tb_per_s": "TB/s",
    "tflop_per_s": "TFLOP/s",
    "share_of_floor": "share of its floor",
    "eager_us": "eager, µs",
    "compiled_us": "compiled, µs",
}
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
    """The last run of each model, dtype, batch size and device, and before it those with engines that no later one has.

    Sorted. Rows of one run follow each other in a file.
    """
    runs: list[Run] = []
    last = None
    for row in rows:
        key = tuple(row[name] for name in ("dtype", "infer_batch_size", "device", "commit", "date"))
        label = label_of(row)
        other_model = key == last and not _is_vit(label) and row["model"] != runs[-1].model
        if key != last or label in runs[-1].rows or other_model:
            runs.append(Run(row["model"], row["dtype"], int(row["infer_batch_size"]), row["device"], {}))
        runs[-1].rows[label] = row
        last = key
    seen = list(dict.fromkeys(word for run in runs for word in (run.device, run.model, run.dtype)))
    shown: list[Run] = []
    for run in reversed(runs):
        if not any(run[:4] == later[:4] and run.rows.keys() <= later.rows.keys() for later in shown):
            shown.insert(0, run)
    return sorted(shown, key=lambda run: (*map(seen.index, (run.device, run.model, run.dtype)), run.batch))


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
        fastest = max(others) if len(others) > 1 else None  # more than the eager model
        errors = " / ".join(run.rows[label]["rel_error"] if label in run.rows else "–" for label in (OURS, EAGER))
        cells = [number(run.speed(label)) + _mark(run.rows.get(label, {})) for label in labels]
        cells += [ratio(ours, eager), ratio(ours, fastest), errors]
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
            lines.append((f"`{run.model}`", run.dtype, run.batch, label + _mark(row), *times, *checks))
    headers = ("model", "dtype", "batch", "engine", "median, ms", "p95, ms", "eager = 1", "error", "top-1", "peak, MB")
    table = _github(lines, headers)
    return f"<details><summary>Latency, memory and answers of each engine</summary>\n\n{table}\n\n</details>"


def kernels(rows: Sequence[Row]) -> str:
    """Time, and achieved rates, of each kernel; of a repeated measurement the last."""
    latest = {tuple(row[name] for name in ("kernel", "shape", "dtype")): row for row in rows}
    lines = []
    for row in latest.values():
        cells = {name: row.get(name, "") or "–" for name in KERNEL_COLUMNS}
        if '"use": "library"' in row.get("config", ""):
            cells["kernel"] += ", by the library"
        lines.append(list(cells.values()))
    return _github(lines, tuple(KERNEL_COLUMNS.values()))


def overhead(rows: Sequence[Row]) -> str:
    """Host time of the launches of a forward by operation, on one device; of a repeated measurement the last."""
    rows = [row for row in rows if row["commit"] == rows[-1]["commit"]]  # what an older one launched is gone
    latest = {tuple(row[name] for name in ("model", "dtype", "operation", "shape")): row for row in rows}
    forwards: dict[tuple[str, str], dict[str, tuple[int, float]]] = {}
    for row in latest.values():
        sums = forwards.setdefault((row["model"], row["dtype"]), {})
        calls, us = sums.get(row["operation"], (0, 0.0))
        sums[row["operation"]] = calls + int(row["calls"]), us + float(row["forward_us"])
    lines = []
    for (model, dtype), sums in forwards.items():
        launches = [one for operation, one in sums.items() if operation != "forward"]  # a GPU's has all of them in it
        total = tuple(map(sum, zip(*launches, strict=True)))
        for operation, (calls, us) in [*sums.items(), ("all", total)]:
            lines.append((f"`{model}`", dtype, operation, calls, f"{us / calls:.1f}", f"{us:.0f}"))
    headers = ("model", "dtype", "operation", "launches", "µs each", "µs a forward")
    row = rows[-1]
    where = f"On {row['device']}, PyTorch {row['torch']}, Triton {row['triton']}: {row['source']}"
    return f"{_github(lines, headers)}\n\n{where} (`python -m bench.overhead`)."


def batch(rows: Sequence[Row]) -> str:
    """Rates and memory of batch inference on one device, of the last model; of a repeated measurement the last."""
    rows = [row for row in rows if row["model"] == rows[-1]["model"]]
    latest = {(row["what"], row["images"]): row for row in rows}
    lines = []
    for (what, _), row in latest.items():
        rate = number(float(row["images_per_sec"])) if row["images_per_sec"] else "–"
        lines.append((what, row["images"], rate, row["ratio"] or "–", row["mib"] or "–"))
    headers = ("what", "images", "images/s", "of the slower half", "peak, MiB")
    where = f"`{rows[-1]['model']}` on {rows[-1]['device']}, PyTorch {rows[-1]['torch']}"
    return f"{_github(lines, headers)}\n\n{where}, the best of several rounds (`python -m bench.batch`)."


def profile(rows: Sequence[Row]) -> str:
    """Shares of a forward's time by part, on one device; of a repeated measurement the last."""
    runs: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        key = row["model"], row["dtype"], int(row["batch"])
        if row["part"] in runs.setdefault(key, {}):  # another run begins, which may know other parts
            runs[key] = {}
        runs[key][row["part"]] = float(row["share"])
    parts = dict.fromkeys(part for run in runs.values() for part in run)
    lines = [[part, *(f"{run[part]:.1%}" if part in run else "–" for run in runs.values())] for part in parts]
    headers = ("part", *(f"{dtype}, batch {batch}" for _, dtype, batch in runs))
    models = ", ".join(dict.fromkeys(f"`{model}`" for model, _, _ in runs))
    where = f"{models} on {rows[-1]['device']}, PyTorch {rows[-1]['torch']}"
    return f"{_github(lines, headers)}\n\nShares of the time of {where} (`python -m bench.profile_cpu`)."


def number(value: float | None) -> str:
    """Three digits at least, none that mean nothing."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(speed: float | None, other: float | None) -> str:
    return f"{speed / other:.2f}×" if speed and other else "–"


def _mark(row: Row) -> str:
    """What a row says of itself that its engine's label doesn't."""
    return " (no graph)" if "without a CUDA graph" in row.get("source", "") else ""


def _aside(label: str) -> bool:
    """swinfast itself, and what runs another model or none."""
    return label in (OURS, FLOOR) or _is_vit(label)


def _is_vit(label: str) -> bool:
    """Whether it is the other model that takes turns with one of ours."""
    return label.startswith("ViT")


def _caption(runs: Sequence[Run], command: str) -> str:
    run = runs[0]
    row = next(iter(run.rows.values()))
    versions = ", ".join(dict.fromkeys(f"PyTorch {one['torch']}" for run in runs for one in run.rows.values()))
    if row["driver"]:
        versions += f", Triton {row['triton']}, driver {row['driver']}"
    models = ", ".join(f"`{model}`" for model in dict.fromkeys(run.model for run in runs))
    earlier = ""
    if len({run[:4] for run in runs}) < len(runs):
        earlier = " Where lines have dtype and batch in common, those before the last are earlier runs of more engines."
    return (
        f"Images/s of {models} on {run.device}, {versions}: medians of one interleaved run a line "
        f"(`python -m {command}`).{earlier} Error: relative RMS against the same model in float64."
    )


def _github(lines: Sequence[Sequence], headers: Sequence[str]) -> str:
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
