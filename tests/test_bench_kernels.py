"""The kernel benchmarks: what they measure, what they refuse, what they write. Times here are made up."""

import csv
import json
import math
import os
import re
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from swinfast.kernels import norm_residual
from swinfast.kernels.configs import Config
from swinfast.kernels.launch import record
from swinfast.kernels.windows import arranged

import swinfast
from bench import OUT_OF_TIME, cases, kernels, overhead, peaks, sanitize
from bench.cases import FORMS, Oracle, Wrong, call_arguments, cases_of, choose_forms, inputs_of, launch_of, model_named

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = "swinv2_cr_tiny_ns_224"
PEAKS = peaks.Peaks(bandwidth=1e12, rates={"float16": 1e14})
OPTIONS = kernels.Options(CPU, lambda function, rep=0: 1e-3, eager=True, check_only=False)
# what Triton's own launcher would look for in its cache, with a driver that stands in for a GPU's
CACHE_KEYS = """
import torch, triton
from triton.backends.compiler import GPUTarget
from bench.cases import cases_of, model_named
from swinfast.kernels.gate import ARCHS, compile_ahead, job_of

class Driver:
    get_current_device = get_current_stream = lambda self, *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
for case in cases_of(model_named("small"), 2, "float16", "sm_90"):
    if case.operation == "mlp_parts":
        launch, config = case.launch, case.launch.config
        assert not compile_ahead(job_of(launch, "sm_90", "float16")).error
        args = [torch.empty(16, dtype=a.dtype) if isinstance(a, torch.Tensor) else a for a in launch.args]
        options = {**launch.constants, "num_warps": config.num_warps, "num_stages": config.num_stages}
        before = set(os.listdir(os.environ["TRITON_CACHE_DIR"]))
        launch.kernel.run(*args, grid=(1,), warmup=True, **options)
        assert set(os.listdir(os.environ["TRITON_CACHE_DIR"])) == before
        print("found")
        break
"""


def precompiled(folder: Path, *options: str) -> tuple[int, set[str], str]:
    """How many kernels bench.precompile compiles into a cache, the names of what is in it, and what it prints."""
    env = os.environ | {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.precompile", "--models", "small", "--batch-sizes", "1", *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {file.stem for file in folder.glob("*/*.cubin")}
    return int(re.search(r"^(\d+) kernels for sm_90, 0 do not compile", done.stdout, re.M)[1]), names, done.stdout


def test_precompile(tmp_path):
    """A cache for a GPU that is not here: the kernels of a forward, those of other forms, the tuner's candidates."""
    count, names, _ = precompiled(tmp_path)
    assert count == len(list(tmp_path.glob("*/*.cubin"))) > 5
    assert "_attention_parts_kernel" in names and "_mlp_block_kernel" not in names
    assert {"_offsets_kernel", "_table_kernel"} <= names  # the position biases of a first forward
    more, names, _ = precompiled(tmp_path, "--forms", "tables", "fused", "--candidates", "1")
    assert more > count and "_mlp_block_kernel" in names
    assert more == len(list(tmp_path.glob("*/*.cubin")))  # what was there is found again


LAUNCHING = """
import torch
from swinfast.kernels.norm_residual import norm_residual

def test_launches():
    x, weight, bias = torch.ones(3, 32), torch.ones(32), torch.ones(33)
    for b in (bias[:32], bias[1:], bias[:32]):
        norm_residual(x, weight, b, 1e-5, x)
    norm_residual(x[:0], weight, weight, 1e-5, x[:0])
    x, weight = torch.ones(3, 64, device="meta"), torch.ones(64, device="meta")
    norm_residual(x, weight, weight, 1e-5, x)
"""

RECORDED = """
import sys
from bench.recorder import launches_of
from swinfast.kernels.gate import compile_ahead, jobs_of

command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", sys.argv[1]]
for job in jobs_of(((launched, "") for launched in launches_of(command)), "sm_90"):
    names = list(job.signature)
    divided = [names[path[0]] for path, attrs in job.attrs.items() if ["tt.divisibility", 16] in attrs]
    print("JOB", job.kernel, job.signature["x"], job.named["C"], "norm_bias" in divided, "x" in divided, end=" ")
    print(compile_ahead(job).error or "compiles")
"""


def test_what_tests_launch(tmp_path):
    """In the interpreter, so that it can be compiled for a GPU: each thing once, as its arguments are aligned."""
    (tmp_path / "test_launching.py").write_text(LAUNCHING, encoding="utf-8")
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", RECORDED, str(tmp_path / "test_launching.py")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    jobs = [line for line in done.stdout.splitlines() if line.startswith("JOB")]
    assert jobs == [f"JOB norm_residual *fp32 32 {aligned} True compiles" for aligned in (True, False)]


def small(operation: str, precision: str = "float16", form: str = "apart", **has) -> cases.Case:
    """A case of an operation, in the second stage; has: arguments that it must have."""
    found = cases_of(model_named("small"), 3, precision, "sm_90", choose_forms(FORMS[form]))
    wanted = (c for c in reversed(found) if c.operation == operation)
    return next(c for c in wanted if all(c.arguments[name] == value for name, value in has.items()))


def output_of(case: cases.Case, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return cases.operation(case)(**call_arguments(case, inputs))


def test_cases_are_those_of_the_model():
    found = cases_of(model_named(TINY), 8, "float16", "sm_90")
    with record("sm_90") as launches, torch.no_grad():
        swinfast.optimize(model_named(TINY), dtype=torch.float16, backend="triton")(
            torch.empty(8, 3, 224, 224, device="meta")
        )
    bias_tables = [one for one in launches if one.kernel and "cpb_bias" in one.kernel.fn.__module__]
    assert sum(case.calls for case in found) == len(launches) - len(bias_tables)
    assert len({case.key for case in found}) == len(found)
    embed = next(case for case in found if case.operation == "patch_embed")
    assert embed.arguments["images"].shape == (8, 3, 224, 224)
    assert embed.lookup == ("patch_embed", (("channels", 96), ("k", 48), ("rows", 32768)))
    assert embed.launch.programs == math.prod((8, 56, 56)) // embed.launch.config.blocks["BLOCK_M"]
    assert "images=8x3x224x224" in embed.shape


@pytest.mark.parametrize(("form", "per_block"), [("fused", 2), ("partly", 5), ("apart", 7)])
def test_every_composition_can_be_asked_for(form, per_block):
    """Attention in one kernel or 3 to 4, an MLP in one or 2 to 3, of 12 blocks; an embedding and 3 mergings of 2."""
    model = model_named(TINY)
    found = cases_of(model, 2, "float16", "sm_90", choose_forms(FORMS[form]))
    assert sum(case.calls for case in found) == 7 + 12 * per_block
    usual, fused = (
        sum(case.calls for case in cases_of(model, 256, "float16", "sm_90", choice))
        for choice in (None, choose_forms(FORMS["fused"], channels=96))
    )
    one_stage = cases_of(model, 256, "float16", "sm_90", choose_forms(FORMS[form], channels=96))
    assert sum(case.calls for case in one_stage) == fused + 2 * (per_block - 2)
    assert usual < 7 + 12 * 7  # the tables know better than to take all apart


def test_the_other_family_has_cases_of_its_own():
    """A gather without a norm, and a norm without a residual; what defines them knows both."""
    found = cases_of(model_named("small V2"), 1, "float32", "sm_90", choose_forms(FORMS["apart"]))
    own = [case for case in found if case.operation == "merge_norm" or case.arguments.get("residual", 0) is None]
    assert [case.operation for case in own] == ["merge_norm", "norm_residual"]
    for case in own:
        inputs = inputs_of(case, CPU)
        oracle, got = Oracle(case, inputs), output_of(case, inputs)
        oracle.check(got)
        with pytest.raises(Wrong):
            oracle.check(got * 1.01)


def test_inputs_are_random_and_the_same_again():
    case = small("attention_block", form="fused", shift_size=[2, 2])
    inputs, again, other = inputs_of(case, CPU), inputs_of(case, CPU), inputs_of(case, CPU, seed=1)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == case.arguments[name].dtype
            assert torch.equal(value, again[name]) and not torch.equal(value, other[name])
            assert value.float().std() > 0.01
    assert inputs["table"].shape == (4, 2, 16, 16)
    assert (inputs["table"] < -100).any() and not (inputs["table"][0] < -100).any()  # the mask of the shift
    padded = call_arguments(case, inputs)["table"]
    assert torch.equal(padded, arranged(inputs["table"]))


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32", "tf32"])
@pytest.mark.parametrize("operation", ["norm_residual", "linear"])
def test_right_outputs_pass_and_wrong_ones_do_not(operation, precision):
    case = small(operation, precision)
    inputs = inputs_of(case, CPU)
    oracle, right = Oracle(case, inputs), output_of(case, inputs)
    assert 0 < oracle.check(right) < 1e-2
    unwritten = right.clone()
    unwritten[-1, -1, -1] = math.nan
    off = right.clone()
    off[1] *= 1.02 if precision != "bfloat16" else 1.1
    one = right.clone()
    one[0, 0, 0, 0] += {"float16": 0.03, "bfloat16": 0.4}.get(precision, 1e-4)  # too little to show in the RMS
    for wrong in (unwritten, off, one, right.roll(1, 0), torch.zeros_like(right), right[:2], right.double()):
        with pytest.raises(Wrong):
            oracle.check(wrong)


def test_parts_of_a_batch_are_the_batch(monkeypatch):
    case = small("window_attention", shift_size=[2, 2])
    inputs = inputs_of(case, CPU)
    whole = Oracle(case, inputs)
    monkeypatch.setattr(cases, "IMAGES_AT_ONCE", 2)
    parts = Oracle(case, inputs)
    assert [len(part) for part in parts.exact] == [2, 1]
    assert torch.equal(torch.cat(parts.exact), whole.exact[0])
    assert parts.plain == pytest.approx(whole.plain)


def test_a_case_with_another_configuration():
    """The table of window_attention is padded as the configuration wants it, of a case and of real inputs."""
    case = small("window_attention", shift_size=[0, 0])
    chosen = Config({"BLOCK_M": 64, "BLOCK_N": 16}, 1, 1, "a test")
    launched = launch_of(case, chosen, "sm_90")
    assert launched.config is chosen
    assert launched.constants["QUERIES"] == 64
    with cases.override(lambda *_: chosen):
        inputs = inputs_of(case, CPU)
        assert call_arguments(case, inputs)["table"].shape == (1, 2, 64, 16)
        assert Oracle(case, inputs).check(output_of(case, inputs)) < 1e-3


def test_speed():
    """A linear layer of 3 * 8 * 8 rows from 64 to 256 channels."""
    case = small("linear", gelu=True)
    flops, moved = 2 * 192 * 64 * 256, 2 * (192 * 64 + 256 * 64 + 256 + 192 * 256)
    got = kernels.speed(case, 1e-6, PEAKS)
    assert got["tflop_per_s"] == pytest.approx(flops / 1e-6 / 1e12, abs=1e-3)
    assert got["tb_per_s"] == pytest.approx(moved / 1e-6 / 1e12, abs=1e-4)
    assert got["intensity"] == pytest.approx(flops / moved, abs=0.1)
    assert (got["bound"], got["time_us"]) == ("memory", 1.0)
    assert got["share_of_floor"] == pytest.approx(moved / 1e12 / 1e-6, abs=1e-3)
    got = kernels.speed(case, 1e-6, peaks.Peaks(1e18, {"float16": 1e13}))
    assert got["bound"] == "products"
    assert got["share_of_floor"] == pytest.approx(flops / 1e13 / 1e-6, abs=1e-3)


def test_measure():
    case = small("norm_residual")
    row = kernels.measure(case, PEAKS, OPTIONS)
    assert (row["time_us"], row["eager_us"]) == (1000.0, 1000.0)
    assert float(row["rel_error"]) < 1e-3
    assert "problem" not in row
    chosen = case.launch.config
    assert json.loads(row["config"]) == {**chosen.blocks, "num_warps": chosen.num_warps, "num_stages": 1}


def test_a_kernel_that_cannot_be_timed_has_a_problem():
    """The others go on."""

    def timer(function):
        raise torch.OutOfMemoryError("no room")

    row = kernels.measure(small("norm_residual"), PEAKS, OPTIONS._replace(timer=timer))
    assert row["problem"] == "OutOfMemoryError: no room" and "time_us" not in row


@pytest.mark.parametrize("problem", ["wrong", "raises"])
def test_a_kernel_that_is_wrong_has_no_time(monkeypatch, problem):
    def operation(**arguments):
        if problem == "raises":
            raise RuntimeError("out of resource: shared memory\nsecond line")
        return norm_residual.norm_residual(**arguments) + 0.1

    monkeypatch.setattr(kernels, "operation", lambda case: operation)
    row = kernels.measure(small("norm_residual"), PEAKS, OPTIONS)
    assert "time_us" not in row and "eager_us" not in row
    expected = "rms error" if problem == "wrong" else "RuntimeError: out of resource: shared memory"
    assert row["problem"].startswith(expected) and "\n" not in row["problem"]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the script for one kernel and gives its status and the rows of a file, None where there is none."""
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)

    def run(*options: str, timer=lambda function, rep=0: 1e-3) -> tuple[int, list[dict] | None]:
        status = kernels.main(["--kernels", "patch_embed", *options], timer_of=lambda device: timer)
        file = tmp_path / "out.csv"
        if not file.exists():
            return status, None
        with file.open(encoding="utf-8") as stream:
            return status, list(csv.DictReader(stream))

    return run


def test_rows(bench, tmp_path, capsys):
    for _ in range(2):  # the second is appended
        status, rows = bench("--output", str(tmp_path / "out.csv"), "--dtypes", "float16", "float32")
        assert status == 0
    assert len(rows) == 2 * 5
    assert tuple(rows[0]) == kernels.COLUMNS
    assert [row["kernel"] for row in rows[:5]] == ["copy", "matrix product", "matrix product", *["patch_embed"] * 2]
    last = rows[4]
    assert (last["model"], last["batch"], last["launches"], last["dtype"]) == ("small", "2", "1", "float32")
    assert (last["time_us"], last["source"], last["torch"]) == ("1000.0", "interpreter", torch.__version__)
    assert last["commit"] and last["device"] and last["date"]
    said = capsys.readouterr().out
    assert "float16: kernels of a forward 1000.0 µs, 500.00 µs an image" in said
    assert "2 kernels, 0 wrong or failed; no measurement: no GPU" in said


def test_nothing_is_written_without_a_gpu(bench, tmp_path):
    assert bench() == (0, None)
    assert not list(tmp_path.iterdir())


def test_a_kernel_that_no_forward_launches_is_named(bench, capsys):
    assert bench("--kernels", "patch_embed", "mlp_block")[0] == 1
    assert "no case of mlp_block in small at batch 2: add --forms" in capsys.readouterr().out
    assert bench("--kernels", "mlp_block", "--forms", "fused", "--check-only")[0] == 0


@pytest.mark.parametrize("script", [kernels, overhead])
def test_a_file_that_does_not_fit_is_refused_before_anything_is_measured(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "append", lambda *args, **options: pytest.fail("measured"))
    (tmp_path / "out.csv").write_text("a,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"out\.csv is no table to add to"):
        script.main(["--model", "small", "--output", str(tmp_path / "out.csv")])


def test_check_only(bench, capsys):
    def timer(function, rep=0):
        raise AssertionError("timed")

    status, _ = bench("--check-only", "--forms", "tables", "apart", timer=timer)
    assert status == 0
    assert "of a forward" not in capsys.readouterr().out


def test_failures_show(bench, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(kernels, "operation", lambda case: lambda **arguments: 1 / 0)
    status, rows = bench("--output", str(tmp_path / "out.csv"))
    assert status == 1
    assert rows[-1]["problem"] == "ZeroDivisionError: division by zero" and rows[-1]["time_us"] == ""
    assert "FAILED patch_embed float16 images=2x3x32x32" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_has(bench, monkeypatch, tmp_path):
    def measure(case, *_):
        if case.precision == "float32":
            raise KeyboardInterrupt
        return {"kernel": case.operation, "shape": case.shape, "launches": 1, "dtype": case.precision, "time_us": 1.0}

    monkeypatch.setattr(kernels, "measure", measure)
    status, rows = bench("--output", str(tmp_path / "out.csv"), "--dtypes", "float16", "float32")
    assert status == OUT_OF_TIME
    assert [row["dtype"] for row in rows if row["kernel"] == "patch_embed"] == ["float16"]


def test_out_of_time(bench, capsys):
    assert bench("--minutes", "0")[0] == OUT_OF_TIME
    assert "out of time: 1 of 1 kernels were not measured" in capsys.readouterr().out


def test_table_shows_the_worst():
    row = {"kernel": "one", "shape": "", "launches": 2, "dtype": "float16", "time_us": 5.0, "share_of_floor": 0.61}
    slow = row | {"kernel": "two", "launches": 3, "share_of_floor": 0.59}
    text = kernels.table([row, slow, row | {"kernel": "bad", "time_us": 0, "problem": "why"}]).splitlines()[2:]
    assert [line.split()[1] for line in text] == ["two", "one", "bad"]
    assert "59% <" in text[0] and "61%" in text[1] and "<" not in text[1]
    assert "why" in text[2]


def test_compiled_definitions_come_while_there_is_time(monkeypatch):
    timed = []
    monkeypatch.setattr(kernels, "compiled_us", lambda case, options: timed.append(case) or 2.0)
    rows = [{"launches": 1, "time_us": 1.0}, {"launches": 9, "time_us": 1.0}]
    kernels.add_compiled([("", "first"), ("", "second")], rows, OPTIONS, deadline=math.inf)
    assert timed == ["second", "first"]
    assert rows[0]["compiled_us"] == 2.0
    kernels.add_compiled([("", "first")], rows[:1], OPTIONS, deadline=0)
    assert len(timed) == 2


def test_a_graph_keeps_what_it_reads(monkeypatch):
    monkeypatch.setattr(peaks, "capture", lambda function, device: (lambda: None, function()))
    x = torch.ones(1)
    kept = weakref.ref(x)
    launch = peaks.launches_of(partial(torch.neg, x), torch.device("cuda"))
    del x
    launch()
    assert kept() is not None


def test_a_compiled_definition(monkeypatch):
    """With a compiler that stands in for Inductor."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))
    called = []
    options = OPTIONS._replace(timer=lambda function, rep=0: called.append(function()) or 1e-6)
    assert kernels.compiled_us(small("norm_residual"), options) == 1.0
    assert called[0].shape == (3, 8, 8, 64)


def test_what_is_compiled_ahead_is_what_a_launch_finds(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import os\n" + CACHE_KEYS]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("found") >= 1


def test_peaks():
    got = peaks.measure_peaks(CPU, ["float32", "tf32"], lambda function, rep=0: function() is None or 1e-3)
    assert got.bandwidth == 2 * peaks.COPY_BYTES["cpu"] / 1e-3
    assert got.rates == {"float32": 2 * 256**3 / 1e-3, "tf32": 2 * 256**3 / 1e-3}
    assert [row["kernel"] for row in peaks.rows_of(got)] == ["copy", "matrix product", "matrix product"]


def test_overhead(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(overhead, "CALLS", 2)
    monkeypatch.setattr(overhead, "ROUNDS", 1)
    assert overhead.main(["--model", "small", "--output", str(tmp_path / "out.csv")]) == 0
    with (tmp_path / "out.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    found = cases_of(model_named("small"), 1, "float16", "sm_90")
    assert [(row["operation"], int(row["calls"])) for row in rows] == [(case.operation, case.calls) for case in found]
    assert all(float(row["host_us"]) > 0 for row in rows)
    assert {row["source"] for row in rows} == {"measured, without Triton's launch"}
    assert f"{sum(case.calls for case in found)} launches" in capsys.readouterr().out


def test_sanitize(monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "KERNELS", ("linear", "patch_embed"))
    assert sanitize.main(["--models", "small", "--dtypes", "float16", "--compile"]) == 0
    assert "launches of 2 operations, 0 of kernels in Gluon, 0 wrong" in capsys.readouterr().out
    monkeypatch.setattr(sanitize, "operation", lambda case: lambda **arguments: torch.tensor(math.nan))
    assert sanitize.main(["--models", "small", "--dtypes", "float16"]) == 1
    assert "WRONG linear float16" in capsys.readouterr().out
