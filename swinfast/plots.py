"""Plots of measurements, for ``swinfast bench --plot`` and bench.plot; matplotlib is an extra."""

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

# Okabe and Ito's colours, which colour-blind readers tell apart; markers tell the rest apart in grey
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
DPI = 100
ABOVE = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 8}
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}


def require_matplotlib() -> None:
    """Raise RuntimeError where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("plots need matplotlib: pip install 'swinfast[bench]'")


def check_file(path: Path) -> None:
    """Refuse a file of a kind that can't be drawn (ValueError), or any where matplotlib is missing (RuntimeError)."""
    require_matplotlib()
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise ValueError(f"a plot must end in one of {', '.join(f'.{kind}' for kind in sorted(kinds))}, got {path}")


def throughput(rows: Iterable[Row], path: Path) -> None:
    """Images per second against the batch size: a panel for each dtype, a line for each engine, of one device."""
    rows = list(rows)
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, panels = panels_for(len(dtypes), title_of(rows))
    for panel, dtype in zip(panels, dtypes, strict=True):
        sizes = sorted({int(row["infer_batch_size"]) for row in rows if row["dtype"] == dtype})
        for label, style in _styles(rows).items():
            speeds = {
                int(row["infer_batch_size"]): float(row["infer_samples_per_sec"])
                for row in rows
                if label_of(row) == label and row["dtype"] == dtype
            }
            found = sorted(speeds)
            panel.plot(found, [speeds[size] for size in found], label=label, markersize=6, linewidth=1.8, **style)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(sizes, labels=map(str, sizes))
        panel.set_xlabel("batch size")
        panel.set_title(dtype, fontsize=10)
        _plain_numbers(panel)
    panels[0].set_ylabel("images/s (logarithmic)")
    finish(figure, panels, path)


def speed_ups(rows: Iterable[Row], path: Path, base: str) -> None:
    """Each engine's speed over the base engine's: a panel for each dtype, a group of bars for each batch size."""
    rows = list(rows)
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, panels = panels_for(len(dtypes), title_of(rows), stacked=True)
    styles = {label: style for label, style in _styles(rows).items() if label != base}
    sizes = sorted({int(row["infer_batch_size"]) for row in rows})
    width = min(0.3, 0.8 / max(1, len(styles)))
    for panel, dtype in zip(panels, dtypes, strict=True):
        speeds = {
            (label_of(row), int(row["infer_batch_size"])): float(row["infer_samples_per_sec"])
            for row in rows
            if row["dtype"] == dtype
        }
        for number, (label, style) in enumerate(styles.items()):
            both = [(at, size) for at, size in enumerate(sizes) if (label, size) in speeds and (base, size) in speeds]
            bars = [(at, speeds[label, size] / speeds[base, size]) for at, size in both]
            places = [place + (number - (len(styles) - 1) / 2) * width for place, _ in bars]
            ratios = [ratio for _, ratio in bars]
            panel.bar(places, ratios, 0.92 * width, label=label, color=style["color"])
            for place, ratio in zip(places, ratios, strict=True):
                panel.annotate(f"{ratio:.1f}", (place, ratio), rotation=90, bbox=LABEL_BOX, **ABOVE)
        panel.axhline(1.0, color="0.4", linewidth=1, linestyle="--", zorder=0.5)
        panel.set_xticks(range(len(sizes)), labels=map(str, sizes))
        panel.set_title(dtype, fontsize=10)
        panel.set_ylabel(f"speed, {base} = 1", fontsize=9)
        panel.margins(y=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("batch size")
    finish(figure, panels, path)


def label_of(row: Row) -> str:
    """An engine's name, with its model's where that is no Swin Transformer."""
    return f"{row['model'].replace('vit_small_patch16_224', 'ViT-S/16')}, compiled" if _is_vit(row) else row["engine"]


def _is_vit(row: Row) -> bool:
    return row["model"].startswith("vit_")


def title_of(rows: Sequence[Row]) -> str:
    """Model, device and versions, of the first row that is a Swin Transformer."""
    row = next((row for row in rows if not _is_vit(row)), rows[0])
    versions = [f"PyTorch {row['torch']}"]
    if row["driver"]:  # an NVIDIA GPU
        versions += [f"Triton {row['triton']}", f"driver {row['driver']}"]
    return f"{row['model']} on {row['device']}\n{', '.join([*versions, row['date'][:10]])}"


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Colour and marker of each engine, swinfast's first."""
    labels = sorted(dict.fromkeys(map(label_of, rows)), key=lambda label: label != "swinfast")
    looks = zip(COLOURS, MARKERS, strict=True)
    return {label: {"color": colour, "marker": marker} for label, (colour, marker) in zip(labels, looks, strict=False)}


def panels_for(count: int, title: str, stacked: bool = False) -> tuple["Figure", list["Axes"]]:
    """A figure with panels side by side or one above the other, of one scale."""
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    size = (8.4, 1.5 + 2.3 * count) if stacked else (max(6.4, 1.2 + 3.6 * count), 4.4)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=10)
    shape = (count, 1) if stacked else (1, count)
    return figure, list(figure.subplots(*shape, sharex=stacked, sharey=True, squeeze=False).flat)


def _plain_numbers(panel: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.grid(alpha=0.3, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def finish(figure: "Figure", panels: Sequence["Axes"], path: Path) -> None:
    """One legend under all panels; a file of few colours and bytes where it is a .png."""
    found = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        found |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in found}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(4, len(found)), fontsize=9)
    figure.savefig(path, dpi=DPI)
    if path.suffix == ".png":
        with Image.open(path) as image:
            small = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        small.save(path, optimize=True)
