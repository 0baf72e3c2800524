"""The tuning sweep, with times that are made up: what it tries, what it writes, and how it goes on after a stop."""

import importlib
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from swinfast.kernels import configs, gate
from swinfast.kernels.configs import Config, config, tile
from swinfast.kernels.gate import Measured
from swinfast.kernels.patch_embed import patch_embed

from bench import OUT_OF_TIME, alone, in_forward, tune
from bench.candidates import GRIDS, candidates
from bench.targets import Log, find_targets

ABOUT = {"device": "a card", "torch": "1", "triton": "2", "source": "measured"}
CPU = torch.device("cpu")


def chosen() -> Config:
    """The configuration that is being tried: the timers here go by it."""
    return config("patch_embed", "sm_90", "float16", channels=32, k=12, rows=256)


def fewer_stages_are_faster(function, rep=0) -> float:
    return 1e-6 * chosen().num_stages


def all_are_the_same(function, rep=0) -> float:
    return 1e-6


@pytest.fixture
def run(tmp_path):
    """Runs the script for one kernel; the table and the log are files of the test."""

    def run(timer, *options: str) -> tuple[int, Path, list[dict]]:
        table, log = tmp_path / "sm_90.json", tmp_path / "log.jsonl"
        arguments = ["--kernels", "patch_embed", "--candidates", "7", "--table", str(table), "--log", str(log)]
        status = tune.main([*arguments, *options], timer_of=lambda device: timer)
        configs.forget()
        return status, table, [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]

    return run


def test_nothing_that_runs_is_a_failure(run, capsys):
    def timer(function, rep=0):
        raise RuntimeError("no stream")

    status, table, _ = run(timer)
    assert status == 1 and not table.exists()
    assert "FAILED: nothing runs" in capsys.readouterr().out


def test_the_fastest_becomes_a_row(run, capsys):
    status, table, log = run(fewer_stages_are_faster)
    assert status == 0
    rows = json.loads(table.read_text(encoding="utf-8"))
    assert [(row["kernel"], row["when"]) for row in rows] == [
        ("patch_embed", {"channels": 32, "k": 12, "rows_max": 256})
    ]
    assert rows[0]["num_stages"] == 1
    assert rows[0]["precision"] == ["float16", "bfloat16"]
    assert "1.0 us against 2.0 us of 64x16 w4 s2" in rows[0]["source"]
    assert {entry["outcome"] for entry in log} == {"timed", "final"}
    assert all(entry["torch"] == torch.__version__ and entry["device"] for entry in log)
    assert "1 of 1 targets, 1 rows; no measurement: no GPU" in capsys.readouterr().out
    spec = importlib.util.spec_from_file_location("rules", Path(__file__).with_name("kernels") / "test_configs.py")
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    rules.test_tables(table)


def test_nothing_is_written_where_nothing_wins(run):
    status, table, log = run(all_are_the_same)
    assert status == 0
    assert not table.exists()
    assert [entry["wins"] for entry in log if entry["outcome"] == "final"] == [False]


def test_resume(run):
    """What is known is not timed again, and gives the same table."""
    _, table, log = run(fewer_stages_are_faster)
    before = table.read_text(encoding="utf-8")
    table.unlink()

    def timer(function, rep=0):
        raise AssertionError("timed again")

    _, _, again = run(timer, "--resume")
    assert again == log
    assert table.read_text(encoding="utf-8") == before


def test_resume_within_a_target(run, tmp_path):
    """A run that was killed: candidates with an outcome are left, half a line is dropped."""
    _, _, log = run(fewer_stages_are_faster)
    kept = [entry for entry in log if entry["outcome"] == "timed"][:3]
    lines = [json.dumps(entry) for entry in kept]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, lines[0][:20]]), encoding="utf-8")
    _, _, again = run(fewer_stages_are_faster, "--resume")
    assert again[:3] == kept
    new = [(entry["target"], entry["config"]) for entry in again[3:] if entry["outcome"] == "timed"]
    assert (kept[1]["target"], kept[1]["config"]) not in new
    assert (kept[0]["target"], kept[0]["config"]) in new  # the present choice is always measured beside the others
    assert len(new) == len([entry for entry in log if entry["outcome"] == "timed"]) - 2


def test_outcomes_are_kept_as_they_come(run, tmp_path):
    """A sweep that is stopped within a target has lost nothing of what it timed."""
    calls = []

    def timer(function, rep=0):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return 1e-6

    with pytest.raises(KeyboardInterrupt):
        run(timer)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["outcome"] for entry in entries] == ["timed"] * 3


def test_in_a_forward(run, monkeypatch):
    """A configuration is timed by forwards in which it alone is another, and wins by less than if it were alone."""
    monkeypatch.setattr(in_forward, "ROUNDS", 2)
    launched, others = [], []
    for name in ("merge_norm", "patch_embed", "attention_parts", "linear", "mlp_parts", "norm_residual"):
        module = importlib.import_module(f"swinfast.kernels.{name}")

        def launch(kernel, programs, x, *args, config, launch=module.launch, name=name, **constants):
            launched.append(config)
            if x.is_meta or name == "merge_norm":  # the others' answers are not looked at
                launch(kernel, programs, x, *args, config=config, **constants)

        monkeypatch.setattr(module, "launch", launch)

    def timer(forward, rep):
        launched.clear()
        forward()
        others.append(sum(one.num_warps == 2 and one.blocks != {"BLOCK_M": 2} for one in launched))
        return 1e-4 - 1e-6 * any(one.num_warps == 2 and one.blocks == {"BLOCK_M": 2} for one in launched)

    status, table, log = run(timer, "--in-forward", "--kernels", "merge_norm", "--candidates", "3")
    assert status == 0
    assert {entry["what"] for entry in log} == {"merge_norm channels=32 rows=64 float16 in a forward"}
    (row,) = json.loads(table.read_text(encoding="utf-8"))
    assert row["num_warps"] == 2 and row["when"] == {"channels": 32, "rows_max": 64}
    assert "99.0 us in a forward against 100.0 us of 4 w1 s1" in row["source"]
    assert len(others) == 4 + 2 * 4 and len(set(others)) == 1


def test_without_time(run, capsys):
    _, table, _ = run(fewer_stages_are_faster, "--resume")
    table.unlink()
    (table.parent / "log.jsonl").write_text("")
    status, table, log = run(fewer_stages_are_faster, "--resume", "--minutes", "0")
    assert status == OUT_OF_TIME
    assert not log and not table.exists()
    assert "out of time: left for --resume: 1 targets" in capsys.readouterr().out


def test_wrong_and_failing_candidates_are_named(run, monkeypatch):
    def operation(**arguments):
        out = patch_embed(**arguments)
        if chosen().num_stages == 1:
            raise RuntimeError("out of resource: shared memory\nand more")
        return out * 1.01 if chosen().num_stages == 3 else out

    monkeypatch.setattr(alone, "operation", lambda case: operation)
    _, table, log = run(fewer_stages_are_faster)
    found = {entry["config"]: entry["outcome"] for entry in log}
    assert found["64x16 w4 s2"] == "timed"
    assert found["64x16 w4 s1"] == "failed: RuntimeError: out of resource: shared memory"
    assert found["64x16 w4 s3"].startswith("wrong: rms error")
    assert found["final"] == "final"
    assert not table.exists()


def test_a_lost_context_goes_on_in_a_new_process(run, monkeypatch, tmp_path):
    def operation(**arguments):
        if chosen().num_stages < 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return patch_embed(**arguments)

    def execv(program, arguments):
        started.append(arguments)
        raise SystemExit

    started: list[list[str]] = []
    monkeypatch.setattr(alone, "operation", lambda case: operation)
    monkeypatch.setattr(os, "execv", execv)
    for _ in range(6):  # all but the last two candidates lose it, the present choice among them
        with pytest.raises(SystemExit):
            run(all_are_the_same, "--resume")
    status, _, log = run(all_are_the_same, "--resume")
    assert status == 0
    assert started[0][1:3] == ["-m", "bench.tune"]
    assert started[0][-3] == "--resume" and started[0][-2] == "--minutes"
    crashed = [entry["config"] for entry in log if entry["outcome"].startswith("crashed")]
    assert len(crashed) == 6 and len(set(crashed)) == 6  # none is tried again
    assert log[-1]["best"] == "64x16 w4 s3" and log[-1]["present_us"] is None


def test_refused_candidates_are_not_run(tmp_path):
    (target,) = find_targets(["small"], 1, ["float16"], "sm_90", ["patch_embed"])
    tried = candidates("patch_embed", dict(target.sizes), "float16", target.present, "sm_90", 2)
    log, ran = Log(tmp_path / "log", ABOUT, resume=False), []

    class Bench(alone.Bench):
        def quick(self, tried, done):
            ran.extend(tried)
            for one in tried:
                done(one, 10.0)

    timer = all_are_the_same
    tune.tune_target(target, tried, ["spills", "spills", ""], Bench(target, CPU, timer), log)
    assert ran == [tried[0], tried[2]]  # the present choice is in use, whatever the compiler says
    assert log.of(target)[tile(tried[1])]["outcome"] == "refused: spills"
    ran.clear()
    log.write(target, tile(tried[1]), "timed", us=1.0)
    for _ in range(2):  # an earlier run took it for well
        final = tune.tune_target(target, tried, ["", "miscompiled", ""], Bench(target, CPU, timer), log)
        assert final.best != tried[1]
    assert log.of(target)[tile(tried[1])]["outcome"] == "refused: miscompiled"
    unused = target._replace(in_use=False)
    ran.clear()
    log = Log(tmp_path / "log2", ABOUT, resume=False)
    final = tune.tune_target(unused, tried, ["spills", "spills", ""], Bench(unused, CPU, timer), log)
    assert ran == [tried[2]]
    assert final.wins and final.present_us is None


@pytest.mark.parametrize(
    ("times", "wins", "best"),
    [
        ([[10, 10, 10], [9, 9, 9]], True, 1),
        ([[10, 10, 10], [9.85, 9.85, 9.85]], False, 0),  # less than 2 %
        ([[9, 10, 11], [9.5, 9.5, 9.5]], True, 1),  # in all rounds but one
        ([[9, 9, 11, 11, 10], [9.5] * 5], False, 0),  # in too few rounds
        ([[10, 10, 10], [12, 12, 12]], False, 0),
        ([[10, 10, 10], [9, 9, 9], [8, 8, 8]], True, 2),
    ],
)
def test_decide(times, wins, best):
    target = find_targets(["small"], 1, ["float16"], "sm_90", ["patch_embed"])[0]
    tried = [Config({"BLOCK_M": 1 << n, "BLOCK_K": 16}, 4, 1, "") for n in range(len(times))]
    bench = alone.Bench(target, CPU, all_are_the_same)
    final = tune.decide(bench, tried, [[one] for one in times], present=True)
    assert (final.wins, final.best) == (wins, tried[best])
    assert final.present_us == 10
    assert tune.decide(bench, tried, [[one] for one in times], present=False).wins


def test_compilers_say_why_a_candidate_is_refused(monkeypatch):
    """Of each candidate all cases are compiled, and the first problem counts; a compiler that hangs is one."""
    results = {16: Measured(registers=10, product="wgmma"), 32: Measured(registers=10, spilled=8, product="wgmma")}

    class Result:
        def __init__(self, job):
            self.job = job

        def get(self, timeout):
            if self.job == 64:
                raise TimeoutError
            return results[self.job]

    class Pool:
        def apply_async(self, function, arguments):
            return Result(arguments[0].named["BLOCK_K"])

    class Job:
        def __init__(self, config):
            self.arch, self.precision, self.config, self.key = "sm_90", "float16", config, tile(config)
            self.named = {"PRECISION": "ieee", "BLOCK_M": 64, "BLOCK_K": config.blocks["BLOCK_K"]}

    monkeypatch.setattr(gate, "job_of", lambda launched, arch, precision: Job(launched.config))
    monkeypatch.setattr(tune, "launch_of", lambda case, config, arch: case.launch._replace(config=config))
    (target,) = find_targets(["small"], 1, ["float16"], "sm_90", ["patch_embed"])
    tried = [target.present._replace(blocks={"BLOCK_M": 64, "BLOCK_K": size}) for size in (16, 32, 64)]
    refused = tune.compile_target(target, tried, "sm_90", Pool())(60.0)
    assert refused == ["", "spills 8 bytes a thread", "does not compile: TimeoutError"]


def test_targets_cover_all_compositions():
    targets = find_targets(["swinv2_cr_tiny_ns_224"], 8, ["float16"], "sm_90", tuple(GRIDS))
    assert {target.kernel for target in targets} == set(GRIDS)
    assert [target.in_use for target in targets] == sorted((target.in_use for target in targets), reverse=True)
    in_use = [target for target in targets if target.in_use]
    assert [one.worth for one in in_use] == sorted((one.worth for one in in_use), reverse=True)
    assert {dict(t.sizes)["channels"] for t in targets if t.kernel == "mlp_block"} == {96, 192, 384, 768}
    assert all(target.present == config(target.kernel, "sm_90", "float16", **dict(target.sizes)) for target in targets)


def test_bad_options(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--dtypes", "float16", "bfloat16"])
    assert "float16 and bfloat16 have their rows in common" in capsys.readouterr().err
