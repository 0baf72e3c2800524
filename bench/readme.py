"""Write the tables of results into README.md and docs/ from bench/results. `--check` only compares.

A region of a document between two comments is made anew: `<!-- results NAME … -->` to `<!-- end of results -->`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.tables import MAIN_MODEL, Row, batch, details, kernels, latest_runs, overhead, profile, read, slug, speeds

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/benchmarks.md", "docs/batch.md")
REGION = re.compile(r"(<!-- results (\w+): written by python -m bench\.readme -->\n).*?(<!-- end of results -->)", re.S)
NO_GPU = "No GPU has been measured yet."


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare: the exit status is 1 where they differ")
    check = parser.parse_args(argv).check
    differs = False
    for document in DOCUMENTS:
        path = ROOT / document
        text = path.read_text(encoding="utf-8")
        written = with_results(text)
        differs |= written != text
        if not check:
            path.write_text(written, encoding="utf-8")
    return int(differs and check)


def with_results(text: str) -> str:
    """A document with its regions made anew.

    Raises:
        KeyError: A region of another name than those in REGIONS.
    """
    return REGION.sub(lambda match: f"{match[1]}{REGIONS[match[2]]()}\n{match[3]}", text)


def summary() -> str:
    """The main model: on GPUs where they were measured, and on the CPU with the most peers."""
    gpu = _tables("gpu*.csv", "bench.models", only=MAIN_MODEL, sizes=(1, 32, 256))
    cpu = _tables("peers_cpu*.csv", "bench.peers_cpu", only=MAIN_MODEL)
    return "\n\n".join([*gpu, *cpu])


def gpu() -> str:
    return "\n\n".join(_tables("gpu*.csv", "bench.models", full=True)) or NO_GPU


def cpu() -> str:
    return "\n\n".join(_tables("cpu*.csv", "bench.models", full=True))


def peers() -> str:
    return "\n\n".join(_tables("peers_cpu*.csv", "bench.peers_cpu", full=True))


def kernel_times() -> str:
    parts = []
    for device, rows in _by_device("kernels_*.csv").items():
        parts += [f"On {device}:", kernels(rows), *_images("kernels", device)]
    return "\n\n".join(parts) or NO_GPU


def host() -> str:
    return "\n\n".join(map(overhead, _by_device("overhead*.csv").values()))


def shares() -> str:
    return "\n\n".join(map(profile, _by_device("profile_cpu*.csv").values()))


def batches() -> str:
    return "\n\n".join(map(batch, _by_device("batch*.csv").values())) or "Not measured yet."


def _by_device(pattern: str) -> dict[str, list[Row]]:
    devices: dict[str, list[Row]] = {}
    for row in read(pattern):
        devices.setdefault(row["device"], []).append(row)
    return devices


REGIONS: dict[str, Callable[[], str]] = {
    "summary": summary, "gpu": gpu, "cpu": cpu, "peers": peers, "kernels": kernel_times, "overhead": host,
    "profile": shares, "batch": batches,
}  # fmt: skip


def _tables(
    pattern: str, command: str, *, only: str = "", sizes: tuple[int, ...] = (), full: bool = False
) -> list[str]:
    """A table for each device; in full with the plots that there are and with all that was measured."""
    runs = [run for run in latest_runs(read(pattern)) if only in ("", run.model) and (not sizes or run.batch in sizes)]
    tables = []
    for device in dict.fromkeys(run.device for run in runs):
        chosen = [run for run in runs if run.device == device]
        tables.append(speeds(chosen, command))
        if full:
            prefix = "peers_" if command == "bench.peers_cpu" else ""
            tables += [*_images(f"{prefix}throughput", device), *_images(f"{prefix}speedup", device), details(chosen)]
    return tables


def _images(kind: str, device: str) -> list[str]:
    name = f"{kind}_{slug(device)}.png"
    return [f"![{kind.replace('_', ' ')}]({name})"] if (ROOT / "docs" / name).exists() else []


if __name__ == "__main__":
    sys.exit(main())
