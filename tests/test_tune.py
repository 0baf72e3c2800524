"""The tuning sweep, with times that are made up: what it tries, what it writes, and how it goes on after a stop."""

import importlib
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from swinfast.kernels import configs
from swinfast.kernels.configs import FOLDER, Config, config, tile
from swinfast.kernels.gate import Measured
from swinfast.kernels.patch_embed import patch_embed

from bench import OUT_OF_TIME, alone, config_tables, forms, in_forward, tune
from bench.candidates import GRIDS, candidates
from bench.cases import FORMS, Wrong, cases_of, choose_forms, model_named
from bench.targets import Log, find_targets

ABOUT = {"device": "a card", "torch": "1", "triton": "2", "source": "measured"}
PRESENT = Config({"BLOCK_M": 8}, 4, 1, "a test")
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
    for name in ("merge_norm", "patch_embed", "attention_block", "linear", "norm_residual", "window_attention"):
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


def calls_of(monkeypatch, *names: str) -> list[str]:
    """What kernels are launched, by name, from now on; they compute nothing where the interpreter would."""
    launched: list[str] = []
    for name in names:
        module = importlib.import_module(f"swinfast.kernels.{name}")

        def launch(kernel, programs, x, *args, launch=module.launch, name=name, **options):
            launched.append(name)
            if x.is_meta:
                launch(kernel, programs, x, *args, **options)

        monkeypatch.setattr(module, "launch", launch)
    return launched


OPERATIONS = ("attention_block", "linear_norm_residual", "mlp_block", "norm_residual", "qkv_attention",
              "window_attention")  # fmt: skip


@pytest.fixture
def compositions(monkeypatch, tmp_path):
    """Compares compositions of the small model's blocks by a timer that goes by the kernels of a forward."""
    launched = calls_of(monkeypatch, *OPERATIONS, "linear", "merge_norm", "patch_embed")
    forward = in_forward.Forward("small", 1, "float16", CPU)
    about = {**ABOUT, "commit": "a commit"}

    def compare(us_of, check=lambda self, cases, choose: None, deadline=float("inf"), resume=False):
        def timer(function, rep=0):
            launched.clear()
            function()
            return 1e-6 * us_of(launched)

        monkeypatch.setattr(in_forward.Forward, "check", check)
        log = Log(tmp_path / "log.jsonl", about, resume, "in a forward")
        return list(in_forward.Compositions("sm_90", timer, None, log, deadline).rows([forward])), log

    return compare


def test_compositions_in_a_forward(compositions):
    """Those that win are rows for few rows, each compared in a forward in which only its blocks are others."""
    rows, log = compositions(lambda launched: 1000 - 4 * launched.count("mlp_block") + launched.count("qkv_attention"))
    found = {(row["kernel"], row["when"]["channels"], row["blocks"]["use"]): row for row in rows}
    assert set(found) == {("mlp_half", 32, "mlp_block"), ("mlp_half", 64, "mlp_block")}  # two blocks each
    row = found["mlp_half", 32, "mlp_block"]
    assert row["when"] == {"channels": 32, "tokens": 16, "rows_max": 256}
    assert "small batch 1, float16: 996.0 us in a forward against 1004.0 us of linear and linear" in row["source"]
    entries = [json.loads(line) for line in log.file.read_text(encoding="utf-8").splitlines()]
    assert {entry["outcome"] for entry in entries} == {"timed", "final"}
    entries = [entry for entry in entries if entry["outcome"] == "timed"]
    halves = {(entry["what"], entry["config"]) for entry in entries}
    for channels, rows in ((32, 256), (64, 64)):
        attention = f"attention_half and projection channels={channels} rows={rows} float16 in a forward"
        tried = {config for what, config in halves if what == attention}
        ends = ("linear_norm_residual", "linear")
        assert tried == {f"{half} {end}" for half in ("qkv_attention", "window_attention") for end in ends}


def test_what_is_found_in_forwards_holds_for_as_few_rows(tmp_path):
    """However many they are: at batch 8 the first stage has more rows than what counts as few elsewhere."""
    targets = find_targets(["small"], 32, ["float16"], "sm_90", ["merge_norm", "mlp_block"])
    target = max(targets, key=lambda target: dict(target.sizes)["rows"])
    rows = dict(target.sizes)["rows"]
    final = tune.Final(target.present, 1.0, 2.0, True, [1.0])
    assert rows > 4096
    when = [tune.row_of(target, final, ABOUT, "small", where)["when"] for where in ("in a forward", "")]
    assert when[0]["rows_max"] == rows and "rows_max" not in when[1]
    model = model_named("small")
    few, many = (forms.kinds_of(model, 32, "float16", "sm_90", few)[0] for few in (True, None))
    assert few.rows == many.rows > 4096
    halves = [{half for half, _ in forms.options_of(kind, forms.HALVES[0])} for kind in (few, many)]
    assert halves == [{"qkv_attention", "window_attention"}, {"attention_block", "qkv_attention", "window_attention"}]
    for kind, most in ((few, few.rows), (many, None)):
        (found,) = forms.rows_of(kind, forms.HALVES[1], ("mlp_block", kind.present["mlp_output"]), "float16", "a test")
        assert found["when"].get("rows_max") == most


def test_a_composition_must_win_by_a_share_of_the_forward(compositions):
    assert not compositions(lambda launched: 1000 - 1.4 * launched.count("mlp_block"))[0]


def test_compositions_of_windows_that_are_no_tile():
    """Neither attention_block nor qkv_attention takes 144 tokens: they are no options, and no rows come of them."""
    for few in (True, False):
        kinds = forms.kinds_of(model_named("swinv2_cr_tiny_384"), 1, "float16", "sm_90", few)
        assert {kind.tokens for kind in kinds} == {144}
        for kind in kinds:
            assert {half for half, _ in forms.options_of(kind, forms.HALVES[0])} == {"window_attention"}


def test_the_table_of_biases_stays_as_the_tables_have_it():
    """What is checked, and compiled ahead, is what a forward runs: attention by heads with either layout."""
    cases = cases_of(model_named("swinv2_cr_tiny_ns_224"), 1, "float16", "sm_90", choose_forms(FORMS["heads"]))
    layouts = {
        (case.arguments["x"].shape[-1], case.arguments["table"].dim())
        for case in cases
        if case.operation == "qkv_attention"
    }
    assert layouts == {(96, 5), (192, 4), (384, 4), (768, 4)}


def test_compositions_are_compared_once(compositions, monkeypatch):
    """With --resume those whose best is in use are known; a row that is not in the table yet is found again."""
    tried = []
    original = in_forward.Forward.launches
    monkeypatch.setattr(in_forward.Forward, "launches", lambda self, choose: tried.append(1) or original(self, choose))
    faster = lambda launched: 1000 - 4 * launched.count("mlp_block")  # noqa: E731
    rows, _ = compositions(faster)
    first = len(tried)
    assert len(rows) == 2 and first > 4
    again, _ = compositions(faster, resume=True)
    assert again == rows
    assert 0 < len(tried) - first < first  # the halves in which nothing won are not compared again


def test_nothing_is_found_where_the_present_composition_fails(compositions):
    def check(self, cases, choose):
        if not any(case.operation == "mlp_block" for case in cases):
            raise RuntimeError("out of resource: shared memory")

    rows, log = compositions(lambda launched: 1000 - 4 * launched.count("mlp_block"), check)
    assert not rows
    assert not any("timed" in entry["outcome"] for entries in log.known.values() for entry in entries.values())


def test_a_context_that_is_lost_while_compositions_are_timed(compositions):
    """The comparison is not tried again."""

    def lost(launched):
        raise RuntimeError("CUDA error: misaligned address")

    found = 0
    while True:
        try:
            rows, _ = compositions(lost, resume=True)
            break
        except alone.Crashed:
            found += 1
    assert not rows and found == 4  # two halves of two kinds


def test_what_was_checked_is_known_by_its_configuration(monkeypatch):
    monkeypatch.setattr(in_forward.Forward, "_optimise", lambda self: None)
    checked = []
    monkeypatch.setattr(in_forward.Oracle, "check", lambda self, got: checked.append(1))
    forward = in_forward.Forward("small", 1, "float16", CPU)
    cases = [case for case in forward.cases("sm_90", lambda kernel, shape: None) if case.operation == "merge_norm"]
    other = [
        case._replace(launch=case.launch._replace(config=case.launch.config._replace(num_warps=8))) for case in cases
    ]
    for given in (cases, cases, other):
        forward.check(given, lambda kernel, shape: None)
    assert len(checked) == 2 * len(cases) > 0


def test_compositions_are_compiled_ahead(compositions, monkeypatch):
    compiled = []
    monkeypatch.setattr(in_forward, "compile_all", lambda cases, *_: compiled.extend(case.operation for case in cases))
    compositions(lambda launched: 1000)
    assert {"mlp_block", "qkv_attention", "window_attention"} <= set(compiled)


def test_compositions_that_fail_are_left_out(compositions):
    def check(self, cases, choose):
        if any(case.operation == "mlp_block" for case in cases):
            raise Wrong("rms error 1 is above 0")

    rows, log = compositions(lambda launched: 1000 - 4 * launched.count("mlp_block"), check)
    assert not rows
    outcomes = [entry["outcome"] for entry in map(json.loads, log.file.read_text(encoding="utf-8").splitlines())]
    assert outcomes.count("wrong: rms error 1 is above 0") == 2
    assert set(outcomes) == {"timed", "final", "wrong: rms error 1 is above 0"}


def test_a_forward_whose_kernel_fails_is_made_anew(monkeypatch):
    """Else it would go on without the kernel, and what is timed next would be something else."""
    launched = calls_of(monkeypatch, *OPERATIONS, "linear", "merge_norm", "patch_embed")
    forward = in_forward.Forward("small", 1, "float16", CPU)
    module = importlib.import_module("swinfast.kernels.merge_norm")
    working, failures = module.launch, [RuntimeError("out of resource: shared memory")]

    def failing_once(*args, **options):
        if failures:
            raise failures.pop()
        working(*args, **options)

    monkeypatch.setattr(module, "launch", failing_once)
    with pytest.raises((UserWarning, RuntimeError), match="out of resource"):
        forward.launches(lambda kernel, shape: None)
    launched.clear()
    forward.launches(lambda kernel, shape: None)()
    assert launched.count("merge_norm") == 2


def test_a_composition_that_loses_the_context_is_not_tried_again(compositions):
    def check(self, cases, choose):
        if any(case.operation == "mlp_block" for case in cases):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    slow = lambda launched: 1000  # noqa: E731
    for _ in range(2):  # once for each number of channels
        with pytest.raises(alone.Crashed):
            compositions(slow, check, resume=True)
    rows, log = compositions(slow, check, resume=True)
    assert not rows
    assert "mlp_block" not in {config for entries in log.known.values() for config in entries if "timed" in config}


def test_no_composition_is_tried_after_the_deadline(compositions, capsys):
    rows, log = compositions(lambda launched: 1000, deadline=0)
    assert not rows and not log.file.exists()
    assert "out of time: not every composition was tried" in capsys.readouterr().out


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
            self.arch, self.num_warps, self.precision, self.key = "sm_90", 4, "float16", tile(config)
            self.blocks = config.blocks
            self.named = {"PRECISION": "ieee", "BLOCK_M": 64, "BLOCK_K": config.blocks["BLOCK_K"]}

    monkeypatch.setattr(tune, "job_of", lambda launched, arch, precision: Job(launched.config))
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


def row(kernel="linear", precision=("float16",), source="", **when) -> dict:
    return {"kernel": kernel, "precision": list(precision), "when": when, "source": source}


def test_measured_rows_come_first():
    rows = [row("norm_residual", channels=8), row(k=8, source="old"), row(k_max=99)]
    merged = config_tables.merge(rows, [row(k=8, n=16, source="one"), row(k=8, n=32, source="two"), row("mlp_block")])
    assert merged == [rows[0], row(k=8, n=16, source="one"), row(k=8, n=32, source="two"), *rows[1:], row("mlp_block")]
    assert config_tables.merge(rows, [row("mlp_half", channels=8)])[0]["kernel"] == "mlp_half"


def test_rows_for_few_stay_before_those_for_any_number():
    few, any_number = row(k=8, rows_max=64), row(k=8, source="any")
    assert config_tables.merge([few], [any_number]) == [few, any_number]
    old = row(k_max=99, source="old")
    assert config_tables.merge([old, few], [any_number]) == [few, any_number, old]
    assert config_tables.merge([any_number], [few]) == [few, any_number]
    assert config_tables.merge([few], [row(k=8, rows_max=64, source="new")]) == [row(k=8, rows_max=64, source="new")]


def test_rows_for_fewer_come_earlier():
    """Else what was measured at batch 8 would hide what was measured at batch 1."""
    eight, one, any_number = row(k=8, rows_max=4096), row(k=8, rows_max=512), row(k=8, source="any")
    assert config_tables.merge([any_number, one], [eight]) == [one, eight, any_number]
    assert config_tables.merge([eight, any_number], [one]) == [one, eight, any_number]
    assert config_tables.merge([], [eight, any_number, one]) == [one, eight, any_number]
    other = row("mlp_half", channels=8)
    assert config_tables.merge([other, one, any_number], [eight]) == [other, one, eight, any_number]


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_tables_have_rows_for_fewer_earlier(file):
    """So that a row which tuning adds changes the order of no others."""
    rows: dict[str, list[float]] = {}
    for one in json.loads(file.read_text(encoding="utf-8")):
        rows.setdefault(one["kernel"], []).append(config_tables.most_rows(one))
    assert all(found == sorted(found) for found in rows.values())


def test_rows_that_nothing_reaches_are_dropped():
    old = row(precision=("float16", "float32"), k=8, n=[16, 32], source="old")
    one, two = row(k=8, n=16), row(k=8, n=32)
    assert config_tables.merge([old], [one]) == [one, old]
    assert config_tables.merge([old], [one, two]) == [one, two, old | {"precision": ["float32"]}]
    old = row("mlp_block", channels=96)
    both = [row("mlp_block", channels=96, stream_bytes=size) for size in (2, 4)]
    assert config_tables.merge([old], both[:1]) == [both[0], old]
    assert config_tables.merge([old], both) == both
    assert config_tables.merge([row(k_max=64)], [row(k=64)]) == [row(k=64), row(k_max=64)]


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_tables_keep_their_looks(file):
    text = file.read_text(encoding="utf-8")
    assert config_tables.render(config_tables.merge(json.loads(text), [])) == text


def test_a_written_table_is_used(monkeypatch, tmp_path):
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    configs.forget()
    try:
        wanted = row("norm_residual", channels=96, source="new") | {"blocks": {"BLOCK_M": 32}, "num_warps": 1}
        (tmp_path / "default.json").write_text("[]")
        with pytest.raises(KeyError):
            config("norm_residual", "sm_90", "float16", channels=96)
        config_tables.update(tmp_path / "sm_90.json", [wanted])
        assert config("norm_residual", "sm_90", "float16", channels=96, rows=1) == ({"BLOCK_M": 32}, 1, 1, "new")
    finally:
        monkeypatch.undo()
        configs.forget()


def times_of(fused: float, other: float, batch: int = 256, by_heads: float | None = None) -> dict:
    """Kernels for whole halves of a block, qkv_attention (by default as long as two others), and others."""
    model, us = model_named("small"), {}
    by_heads = 2 * other if by_heads is None else by_heads
    names = {"attention_block": fused, "mlp_block": fused, "qkv_attention": by_heads}
    for choice in (None, *map(choose_forms, FORMS.values())):
        for case in cases_of(model, batch, "float16", "sm_90", choice):
            us[case.key] = names.get(case.operation, other)
    return us


def test_compositions():
    """On sm_90 attention in windows of 16 tokens is apart, and the MLP is fused."""
    found = forms.form_rows(["small"], 256, "float16", "sm_90", times_of(1, 10), ABOUT)
    assert {(one["kernel"], one["when"]["channels"], one["blocks"]["use"]) for one in found} == {
        ("attention_half", 32, "attention_block"),
        ("attention_half", 64, "attention_block"),
    }
    assert "0.033 of the kernels' time of window_attention and linear_norm_residual" in found[0]["source"]
    assert found[0]["when"] == {"channels": 32, "tokens": 16}
    found = forms.form_rows(["small"], 256, "float16", "sm_90", times_of(100, 10), ABOUT)
    assert {(one["kernel"], one["blocks"]["use"]) for one in found} == {("mlp_half", "linear")}
    assert not forms.form_rows(["small"], 256, "float16", "sm_90", times_of(30, 10), ABOUT)[2:]
    assert not forms.form_rows(["small"], 256, "float16", "sm_90", {}, ABOUT)


def test_compositions_for_few_rows():
    """They hold for few rows, where attention can only be what takes the same table as for many."""
    found = forms.form_rows(["small"], 2, "float16", "sm_90", times_of(1, 10, batch=2), ABOUT)
    assert {(one["kernel"], one["blocks"]["use"]) for one in found} == {("mlp_half", "mlp_block")}
    assert {(one["when"]["channels"], one["when"]["rows_max"]) for one in found} == {(32, 512), (64, 128)}
    found = forms.form_rows(["small"], 2, "float16", "sm_90", times_of(100, 10, batch=2, by_heads=21), ABOUT)
    assert {(one["kernel"], one["blocks"]["use"]) for one in found} == {("attention_half", "window_attention")}


def test_a_composition_must_win_by_more_than_two_percent():
    us = times_of(29.7, 10)  # three kernels of 10 against one
    assert not [
        one
        for one in forms.form_rows(["small"], 256, "float16", "sm_90", us, ABOUT)
        if one["kernel"] == "attention_half"
    ]


def test_bad_options(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--dtypes", "float16", "bfloat16"])
    assert "float16 and bfloat16 have their rows in common" in capsys.readouterr().err
