"""Write the tables of results into README.md and docs/ from bench/results. `--check` only compares."""

import csv
import sys
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).parents[1]
START, END = "<!-- results: written by python -m bench.readme -->", "<!-- end of results -->"
TABLES = {"README.md": "peers_cpu", "docs/benchmarks.md": "cpu"}  # document: result file, written by bench.<its name>
COMMANDS = {"peers_cpu": "bench.peers_cpu", "cpu": "bench.models"}
Row = dict[str, str]


def main() -> int:
    differs = False
    for document, results in TABLES.items():
        path = ROOT / document
        text = path.read_text(encoding="utf-8")
        written = with_results(text, latest(ROOT / f"bench/results/{results}.csv"), COMMANDS[results])
        differs |= written != text
        if "--check" not in sys.argv:
            path.write_text(written, encoding="utf-8")
    return int(differs and "--check" in sys.argv)


def latest(path: Path) -> list[Row]:
    """The rows of a result file; of a repeated measurement the last."""
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    keys = ("model", "dtype", "infer_batch_size", "engine", "device")
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def with_results(text: str, rows: list[Row], command: str) -> str:
    """A document with its tables made anew, one for each device."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    devices = dict.fromkeys(row["device"] for row in rows)
    tables = "\n\n".join(table([row for row in rows if row["device"] == device], command) for device in devices)
    return f"{before}{START}\n{tables}\n{END}{after}"


def table(rows: list[Row], command: str) -> str:
    """Images per second of each engine, for each model, dtype and batch size on one device."""
    engines = dict.fromkeys(row["engine"] for row in rows)
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["dtype"], int(row["infer_batch_size"])), {})[row["engine"]] = row
    lines = []
    for (model, dtype, batch), found in groups.items():
        speeds = [found[engine]["infer_samples_per_sec"] if engine in found else "–" for engine in engines]
        plain, fast = found["timm eager"], found["swinfast"]
        ratio = float(fast["infer_samples_per_sec"]) / float(plain["infer_samples_per_sec"])
        errors = f"{fast['rel_error']} / {plain['rel_error']}"
        lines.append((f"`{model}`", dtype, batch, *speeds, f"{ratio:.2f}×", errors))
    headers = ("model", "dtype", "batch", *engines, "swinfast / eager", "error: ours / timm's")
    source = (
        f"Images/s on {rows[0]['device']}, PyTorch {rows[0]['torch']}: medians of one interleaved run each "
        f"(`python -m {command}`). Error: relative RMS against the same model in float64."
    )
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True) + f"\n\n{source}"


if __name__ == "__main__":
    sys.exit(main())
