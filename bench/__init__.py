"""Benchmark scripts, run from a checkout: python -m bench.NAME."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
OUT_OF_TIME = 75  # exit status of a script that stopped because its minutes were over
