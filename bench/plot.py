"""Draw the result files: `python -m bench.plot [--output FOLDER]`.

For whole models images/s against the batch size and the speed over timm eager, a picture for each device; for kernels
the rate against the intensity, below the device's published ceilings. bench.readme puts into docs/ what it finds there.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.gpus import GPUS, Gpu
from bench.tables import FLOOR, MAIN_MODEL, Row, latest_runs, read, slug
from swinfast.plots import COLOURS, MARKERS, finish, panels_for, require_matplotlib, speed_ups, throughput

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOCS = Path(__file__).parents[1] / "docs"
VERSIONS = {"PyTorch": "torch", "Triton": "triton", "driver": "driver"}  # by their columns
MODELS = {"gpu*.csv": "", "cpu*.csv": "", "peers_cpu*.csv": "peers_"}  # result files: prefix of their pictures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DOCS, metavar="FOLDER", help="default: docs/")
    folder = parser.parse_args(argv).output
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    for pattern, prefix in MODELS.items():
        for file in draw_models(read(pattern), folder, prefix):
            print(file)
    rows = read("kernels_*.csv")
    for device in dict.fromkeys(row["device"] for row in rows):
        file = folder / f"kernels_{slug(device)}.png"
        draw_kernels([row for row in rows if row["device"] == device], file)
        print(file)
    return 0


def draw_models(rows: Sequence[Row], folder: Path, prefix: str) -> list[Path]:
    """Both pictures of the main model for each device, of the last run of each dtype and batch size."""
    runs = {run[:4]: run for run in latest_runs(rows) if run.model == MAIN_MODEL}.values()
    files = []
    for device in dict.fromkeys(run.device for run in runs):
        shown = [row for run in runs if run.device == device for label, row in run.rows.items() if label != FLOOR]
        files += [folder / f"{prefix}{kind}_{slug(device)}.png" for kind in ("throughput", "speedup")]
        throughput(shown, files[-2])
        speed_ups(shown, files[-1], base="timm eager")
    return files


def draw_kernels(rows: Sequence[Row], path: Path) -> None:
    """TFLOP/s against FLOP/byte of each kernel and shape on one device, a panel for each dtype.

    Of a repeated measurement the last is drawn. A kernel without products has no place in it.
    """
    latest = {tuple(row[name] for name in ("kernel", "shape", "dtype")): row for row in rows}
    points = [row for row in latest.values() if all(float(row[name] or 0) > 0 for name in ("intensity", "tflop_per_s"))]
    dtypes, kernels = ([*dict.fromkeys(row[name] for row in points)] for name in ("dtype", "kernel"))
    gpu = gpu_named(rows[0]["device"])
    versions = ", ".join(f"{name} {rows[0][key]}" for name, key in VERSIONS.items() if rows[0].get(key))
    ceilings = "lines: published ceilings" if gpu else "ceilings unknown"
    figure, panels = panels_for(max(1, len(dtypes)), f"Kernels on {rows[0]['device']}; {ceilings}\n{versions}".strip())
    for panel, dtype in zip(panels, dtypes, strict=False):
        for number, kernel in enumerate(kernels):
            mine = [row for row in points if (row["kernel"], row["dtype"]) == (kernel, dtype)]
            xs, ys = ([float(row[name]) for row in mine] for name in ("intensity", "tflop_per_s"))
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            # a second round of the colours is hollow, and told apart so
            look = {"color": colour} if number < len(COLOURS) else {"facecolors": "none", "edgecolors": colour}
            panel.scatter(xs, ys, s=36, label=kernel, marker=marker, linewidths=1.2, **look)
        if gpu is not None:
            draw_ceiling(panel, gpu, [float(row["intensity"]) for row in points], dtype)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel("intensity, FLOP/byte")
        panel.set_title(dtype, fontsize=10)
        panel.grid(alpha=0.3, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("achieved, TFLOP/s")
    finish(figure, panels, path)


def gpu_named(device: str) -> Gpu | None:
    """The entry of bench.gpus for a device as PyTorch names it, None for one that is not there."""
    words = device.lower().replace("rtx ", "rtx")
    if re.search(r"pcie|nvl|40gb", words):  # other clocks and memory than those in the table
        return None
    return next((gpu for key, gpu in GPUS.items() if re.search(rf"\b{key}\b", words)), None)


def draw_ceiling(axes: "Axes", gpu: Gpu, intensities: Sequence[float], dtype: str) -> None:
    """The memory's slope and the matrix rate for a dtype, in TFLOP/s."""
    low, high = min(intensities) / 2, max(intensities) * 2
    rate = gpu.matrix_rate(dtype) / 1e12
    knee = rate / gpu.bandwidth  # TFLOP/s over TB/s is FLOP/byte
    xs = sorted({low, min(max(knee, low), high), high})
    axes.plot(xs, [min(rate, x * gpu.bandwidth) for x in xs], color="0.35", linewidth=1.2)
    said, end = f"{rate:,.0f} TFLOP/s, {gpu.bandwidth:g} TB/s", (high, min(rate, high * gpu.bandwidth))
    axes.annotate(said, end, (0, 4), textcoords="offset points", ha="right", fontsize=8)


if __name__ == "__main__":
    raise SystemExit(main())
