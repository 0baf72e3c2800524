"""How many bytes may lie between two kernels of a stage, as the tuner compares limits in whole forwards."""

import json

import torch
from swinfast.kernels.configs import config

from bench import at_once
from bench.targets import Log

ABOUT = {"device": "a card", "torch": "1", "triton": "2", "source": "measured", "commit": "a commit"}
MODEL = "swinv2_cr_tiny_ns_224"


class Forward:
    """A forward whose parts are counted on meta tensors, and which computes nothing."""

    name, batch, precision = MODEL, 256, "float16"
    cases = at_once.Forward.cases

    def __init__(self, fails=()):
        self.fails = fails

    def launches(self, choose):
        limits = tuple(
            (
                choose(at_once.AT_ONCE, {"channels": channels})
                or config(at_once.AT_ONCE, "sm_90", "float16", channels=channels)
            ).blocks["MB"]
            for channels in (96, 192, 384, 768)
        )
        if limits in self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: limits


def compare(tmp_path, us_of, forward=None, deadline=float("inf")):
    log = Log(tmp_path / "log.jsonl", ABOUT, False)
    timer = lambda launch, rep=0: 1e-6 * us_of(launch())  # noqa: E731
    rows = list(at_once.limit_rows(forward or Forward(), "sm_90", timer, log, deadline))
    entries = (
        [json.loads(line) for line in log.file.read_text(encoding="utf-8").splitlines()] if log.file.exists() else []
    )
    return rows, entries


def test_limits_that_win(tmp_path):
    """Stage by stage; each number of parts is timed once."""
    rows, entries = compare(tmp_path, lambda limits: 1000 - 50 * (limits[1] == 48) - 2 * (limits[2] == 64))
    assert [(row["when"], row["blocks"]) for row in rows] == [({"channels": 192}, {"MB": 48})]
    assert rows[0]["source"].endswith(f"{MODEL} batch 256, float16: 950.0 us in a forward against 1000.0 us of 160 MB")
    tried = {}
    for entry in entries:
        tried.setdefault(entry["what"].split()[1], []).append(entry["config"])
    assert tried["channels=192"] == ["160", "16", "24", "32", "48", "64", "96", str(1 << 19)]
    assert tried["channels=384"] == ["160", "16", "24", "32", "48", "64", "96"]  # all images fit into 160
    assert "channels=96" not in tried  # nothing lies between its kernels


def test_limits_that_fail(tmp_path):
    """One that fails is no rival; where the present one does nothing is compared."""
    rows, entries = compare(tmp_path, lambda limits: sum(limits), Forward([(160, 16, 160, 160)]))
    assert [row["blocks"] for row in rows] == [{"MB": 24}, {"MB": 16}, {"MB": 16}]
    failed = [entry for entry in entries if entry["outcome"].startswith("failed: ")]
    assert [(entry["config"], "out of memory" in entry["outcome"]) for entry in failed] == [("16", True)]
    assert compare(tmp_path, sum, Forward([(160, 160, 160, 160)]))[0] == []


def test_limits_without_time(tmp_path, capsys):
    assert compare(tmp_path, sum, deadline=0.0) == ([], [])
    assert "not every limit was tried" in capsys.readouterr().out
