"""Write the table of results into README.md from bench/results. `python -m bench.readme`; --check only compares."""

import csv
import sys
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).parents[1]
START, END = "<!-- results: written by python -m bench.readme -->", "<!-- end of results -->"


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    written = with_results(text, latest(ROOT / "bench/results/cpu.csv"))
    if "--check" in sys.argv:
        return int(written != text)
    readme.write_text(written, encoding="utf-8")
    return 0


def latest(path: Path) -> list[dict[str, str]]:
    """The rows of a result file; of a repeated measurement the last."""
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    keys = ("model", "dtype", "infer_batch_size", "engine", "device")
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def with_results(text: str, rows: list[dict[str, str]]) -> str:
    """The README with its table made anew."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table(rows)}\n{END}{after}"


def table(rows: list[dict[str, str]]) -> str:
    """Images per second, swinfast beside timm eager, for each model, dtype and batch size."""
    cells = {}
    for row in rows:
        key = (row["model"], row["dtype"], int(row["infer_batch_size"]), row["device"])
        cells.setdefault(key, {})[row["engine"]] = row
    lines = []
    for (model, dtype, batch, _), engines in cells.items():
        eager, fast = engines["timm eager"], engines["swinfast"]
        speeds = [float(engine["infer_samples_per_sec"]) for engine in (eager, fast)]
        ratio = f"{speeds[1] / speeds[0]:.2f}×"
        lines.append((f"`{model}`", dtype, batch, *speeds, ratio, eager["rel_error"], fast["rel_error"]))
    headers = ("model", "dtype", "batch", "timm, img/s", "swinfast, img/s", "speed-up", "timm's error", "our error")
    row = rows[0]
    source = (
        f"{row['device']}, PyTorch {row['torch']}. Medians of one interleaved run (`python -m bench.models`); error: "
        "relative RMS against the same model in float64."
    )
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True) + f"\n\n{source}"


if __name__ == "__main__":
    sys.exit(main())
