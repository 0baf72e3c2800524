"""swinfast bench, verify and info: outputs, files, exit codes."""

import csv
import io
import json
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import small_model_args, write_image
from safetensors.torch import save_file
from swinfast.kernels import launch

import swinfast
from swinfast import cli_bench, engines, files, info, plots
from swinfast.cli import main
from swinfast.engines import Engine
from swinfast.measurements import COLUMNS

PNG = b"\x89PNG"


@pytest.fixture
def bench(model_folder):
    """Runs swinfast bench with the small model and returns its exit code."""

    def run(*arguments) -> int:
        return main(["bench", str(model_folder), "--device", "cpu", "--rounds", "1", *map(str, arguments)])

    return run


def wrong(plain, dtype):
    fast = swinfast.optimize(plain, dtype=dtype)
    with torch.no_grad():
        fast.head.fc.bias.add_(0.1)
    return fast


def test_table(bench, capsys):
    assert bench("--batch-sizes", "1,3", "--dtypes", "float32,bfloat16") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    header = next(line for line in lines if "images/s" in line)
    for column in ("dtype", "batch", "median, ms", "p95, ms", "speed-up", "error", "top-1"):
        assert column in header
    assert "MB" not in header  # nothing is known of a CPU's
    cells = [line.split() for line in lines if line.startswith(("float32", "bfloat16"))]
    assert [tuple(row[:3]) for row in cells[::2]] == [
        (dtype, batch, "swinfast") for dtype in ("float32", "bfloat16") for batch in "13"
    ]
    assert all(row[2:4] == ["plain", "eager"] and "1.00×" in row for row in cells[1::2])
    assert "random weights" not in err


def test_what_is_said_twice_is_measured_once(bench, capsys):
    assert bench("--batch-sizes", "1,2,1", "--dtypes", "float32,float32", "--against", "eager,eager") == 0
    cells = [line.split()[:3] for line in capsys.readouterr().out.splitlines() if line.startswith("float32")]
    assert cells == [["float32", batch, engine] for batch in "12" for engine in ("swinfast", "plain")]


def test_speed_up_is_a_ratio_of_one_run():
    row = {"engine": "swinfast", "dtype": "float32", "infer_batch_size": 1, "rel_error": "1e-06"}
    row |= {"infer_samples_per_sec": 500.0, "infer_step_time": 2.0, "infer_step_time_p95": 2.5, "peak_memory": 12.5}
    slow = row | {"engine": "plain eager", "infer_step_time": 5.0}
    other = slow | {"infer_batch_size": 2, "infer_step_time": 50.0}
    first = cli_bench._table([row, slow, row | {"infer_batch_size": 2}, other]).splitlines()
    assert "2.50×" in first[2] and "1.00×" in first[3] and "25.00×" in first[4] and "12.5" in first[2]
    assert "×" not in cli_bench._table([row]).splitlines()[2]


def test_files(bench, tmp_path):
    files = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "png")}
    arguments = ("--batch-sizes", "1,2", "--json", files["json"], "--csv", files["csv"], "--plot", files["png"])
    assert bench(*arguments) == 0
    written = json.loads(files["json"].read_text(encoding="utf-8"))
    assert written["left_out"] == []
    with files["csv"].open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["engine"] for row in rows] == ["swinfast", "plain eager"] * 2
    for row, again in zip(rows, written["rows"], strict=True):
        assert tuple(row) == COLUMNS and set(again) == set(COLUMNS)
        assert 0 < float(row["rel_error"]) == again["rel_error"] < 1e-5
        assert float(row["infer_samples_per_sec"]) == again["infer_samples_per_sec"]
    assert files["png"].read_bytes().startswith(PNG)
    assert bench("--batch-sizes", "1", "--csv", files["csv"]) == 0
    assert len(files["csv"].read_text(encoding="utf-8").splitlines()) == 1 + 4 + 2


def test_a_wrong_answer_has_no_speed(bench, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli_bench, "swinfast_engine", lambda: Engine("swinfast", wrong, verified=True))
    assert bench("--batch-sizes", "1", "--csv", tmp_path / "r.csv", "--json", tmp_path / "r.json") == 1
    out, err = capsys.readouterr()
    assert "images/s" not in out
    assert "swinfast: left out: float32, batch 1, swinfast: swinfast in float32 is wrong, so its speed" in err
    assert not (tmp_path / "r.csv").exists()
    written = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert written["rows"] == [] and "is wrong" in written["left_out"][0]["reason"]


def test_an_engine_that_fails_is_named(bench, capsys, monkeypatch):
    def breaks(plain, dtype):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setitem(cli_bench.AGAINST, "compile", lambda: Engine("plain compiled", breaks))
    assert bench("--batch-sizes", "1", "--against", "eager,compile") == 0
    out, err = capsys.readouterr()
    assert "plain eager" in out and "plain compiled" not in out
    assert "left out: float32, batch 1, plain compiled: OutOfMemoryError: too much" in err


@pytest.mark.parametrize("sizes", ["1,2,1000000000000000", "1000000000000000,1,2"])
def test_a_batch_that_has_no_room_is_named(bench, capsys, tmp_path, sizes):
    assert bench("--batch-sizes", sizes, "--json", tmp_path / "r.json") == 1
    out, err = capsys.readouterr()
    assert sum("plain eager" in line for line in out.splitlines()) == 2
    assert "left out: float32, batch 1000000000000000, swinfast: RuntimeError: " in err
    written = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert [row["infer_batch_size"] for row in written["rows"]] == [1, 1, 2, 2]
    assert [one["engine"] for one in written["left_out"]] == ["swinfast", "plain eager"]


@pytest.mark.parametrize("encoding, times", [("ascii", rb"\xd7"), ("latin-1", b"\xd7")])
def test_a_terminal_that_lacks_characters(bench, monkeypatch, tmp_path, encoding, times):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    assert bench("--batch-sizes", "1") == 0
    assert b"1.00" + times in stream.buffer.getvalue()
    monkeypatch.setattr(info, "version_of", lambda name: None)
    assert main(["info"]) == 0
    assert rb"\u2013" in stream.buffer.getvalue()
    with pytest.raises(SystemExit):
        bench("--help")
    assert rb"N,\u2026" in stream.buffer.getvalue()


def test_results_are_written_before_they_are_shown(bench, monkeypatch, tmp_path):
    def closed(rows):
        raise BrokenPipeError("nobody reads")

    monkeypatch.setattr(cli_bench, "_table", closed)
    assert bench("--batch-sizes", "1", "--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv") == 141
    assert len(json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["rows"]) == 2
    assert len((tmp_path / "r.csv").read_text(encoding="utf-8").splitlines()) == 3


def test_results_are_shown_where_they_cannot_be_written(bench, monkeypatch, tmp_path, capsys):
    def full(file, *_):
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(cli_bench, "_write_json", full)
    assert bench("--batch-sizes", "1", "--json", tmp_path / "r.json") == 2
    said = capsys.readouterr()
    assert "timm eager" in said.out or "plain" in said.out
    assert "No space left on device" in said.err


def test_engines_that_are_asked_for():
    made = {key: make() for key, make in cli_bench.AGAINST.items()}
    names = ["plain eager", "plain compiled", "plain compiled, max-autotune"]
    assert [one.name for one in made.values()] == names
    assert not any(one.verified for one in made.values())


def test_compiled_engines_compile(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: calls.append(options) or model)
    model = torch.nn.Linear(2, 2)
    for key in ("compile", "max-autotune"):
        built = cli_bench.AGAINST[key]().build(model, torch.bfloat16)
        assert built is not model and built.weight.dtype == torch.bfloat16
    assert calls == [{"mode": None, "dynamic": False}, {"mode": "max-autotune", "dynamic": False}]


def test_interrupted(bench, capsys, monkeypatch, tmp_path):
    measure = engines.measure

    def interrupted(plain, chosen, dtype, batch, *args):
        if batch == 2:
            raise KeyboardInterrupt
        return measure(plain, chosen, dtype, batch, *args)

    monkeypatch.setattr(cli_bench, "measure", interrupted)
    assert bench("--batch-sizes", "1,2,3", "--json", tmp_path / "r.json") == 130
    assert "images/s" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["rows"]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch-sizes", "0"], "whole numbers of at least 1, got '0'"),
        (["--batch-sizes", "1,,2"], "whole numbers of at least 1, got ''"),
        (["--batch-sizes", "²"], "whole numbers of at least 1, got '²'"),
        (["--dtypes", "float8"], "must be of float32, bfloat16, float16, got 'float8'"),
        (["--against", "eager,tensorrt"], "must be of eager, compile, max-autotune, got 'tensorrt'"),
        (["--rounds", "-1"], "at least 1"),
    ],
)
def test_wrong_arguments(bench, capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        bench(*arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_unusable(bench, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_bench, "measure", lambda *args: pytest.fail("measured"))
    (tmp_path / "old.csv").write_text("a,b\n", encoding="utf-8")
    for folder in ("folder", "folder.png", "closed"):
        (tmp_path / folder).mkdir()
    (tmp_path / "kept.csv").touch()
    (tmp_path / "closed" / "open.json").touch()
    unwritable = (tmp_path / "closed", tmp_path / "kept.csv")
    monkeypatch.setattr(files.os, "access", lambda path, mode: path not in unwritable)
    closed = f"{tmp_path / 'closed/r.json'}: no right to write to {tmp_path / 'closed'}"
    kept = f"{tmp_path / 'kept.csv'}: no right to write to {tmp_path / 'kept.csv'}"
    for arguments, said in (
        (["--csv", tmp_path / "old.csv"], "old.csv is no table to add to"),
        (["--plot", tmp_path / "p.xyz"], "a plot must end in one of "),
        (["--json", tmp_path / "none/r"], f"--json must be in a folder that exists, got {tmp_path / 'none/r'}"),
        (["--json", tmp_path / "folder"], f"--json must be a file, got the folder {tmp_path / 'folder'}"),
        (["--csv", tmp_path / "folder"], f"--csv must be a file, got the folder {tmp_path / 'folder'}"),
        (["--plot", tmp_path / "folder.png"], f"--plot must be a file, got the folder {tmp_path / 'folder.png'}"),
        (["--json", tmp_path / "closed/r.json"], f"--json must be a file that can be written, got {closed}"),
        (["--csv", tmp_path / "kept.csv"], f"--csv must be a file that can be written, got {kept}"),
        (["--csv", tmp_path / "r", "--json", tmp_path / "r"], "--json, --csv and --plot must be different files"),
        (["--plot", tmp_path / "r.png", "--csv", f"{tmp_path}/./r.png"], "must be different files"),
        (["--device", "tpu"], "tpu"),
        (["--checkpoint", tmp_path / "none.safetensors"], "none.safetensors"),
    ):
        assert bench(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("swinfast: error: ") and said in error
    files.check_writable("--json", tmp_path / "closed/open.json", in_place=True)  # which is written to where it lies
    assert main(["bench", "no_such_model"]) == 2
    assert "swinfast: error: unknown model 'no_such_model'" in capsys.readouterr().err


def test_plots_need_matplotlib(bench, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    assert bench("--plot", tmp_path / "p.png") == 2
    assert "swinfast: error: plots need matplotlib: pip install 'swinfast[bench]'" in capsys.readouterr().err


def test_a_name_has_random_weights(monkeypatch, capsys):
    small = partial(swinfast.create_model, **small_model_args())
    monkeypatch.setattr(cli_bench, "create_model", small)
    seen, judge = [], cli_bench.verify
    monkeypatch.setattr(cli_bench, "verify", lambda *args: seen.append(args[0]) or judge(*args))
    assert main(["verify", "swinv2_cr_tiny_224", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "random weights: every part shows" in err
    assert "6 of 6 modules replaced" in out
    assert all(parameter.abs().max() > 0 for parameter in seen[0].parameters())  # fresh norms would be 0


@pytest.fixture
def verify(model_folder):
    def run(*arguments) -> int:
        return main(["verify", str(model_folder), "--device", "cpu", *map(str, arguments)])

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_passes(verify, capsys, dtype):
    assert verify("--dtype", dtype, "--backend", "torch") == 0
    out, err = capsys.readouterr()
    assert f"8 images: passed ({dtype}): relative RMS error" in out
    assert err == ""


def test_verify_of_a_checkpoint_with_other_classes(verify, model_folder, tmp_path, capsys):
    state = swinfast.create_model(model_folder).state_dict()
    state |= {key: state[key][:3] for key in ("head.fc.weight", "head.fc.bias")}
    save_file(state, tmp_path / "tuned.safetensors")
    checkpoint = ("--checkpoint", tmp_path / "tuned.safetensors")
    assert verify(*checkpoint) == 2
    assert "head.fc.bias is (3,), expected (10,)" in capsys.readouterr().err
    assert verify(*checkpoint, "--num-classes", 3) == 0


def test_verify_fails(verify, capsys, monkeypatch):
    monkeypatch.setattr(cli_bench, "optimize", lambda model, dtype, backend: wrong(model, dtype))
    assert verify() == 1
    assert "8 images: FAILED: relative RMS error" in capsys.readouterr().out


def test_verify_fails_where_nothing_is_finite(model_folder, capsys, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    state = swinfast.create_model(str(model_folder)).state_dict()
    nothing = {key: torch.full_like(value, float("nan")) for key, value in state.items()}
    save_file(nothing, tmp_path / "model/model.safetensors")
    assert main(["verify", str(tmp_path / "model"), "--device", "cpu"]) == 1
    assert "8 images: FAILED: nothing finite to compare (float32)" in capsys.readouterr().out


def test_verify_with_images(verify, capsys, tmp_path, monkeypatch):
    seen = []
    judge = cli_bench.verify
    monkeypatch.setattr(
        cli_bench, "verify", lambda model, fast, images: seen.append(images) or judge(model, fast, images)
    )
    files = [write_image(tmp_path / f"{seed}.png", seed) for seed in range(3)]
    (tmp_path / "0.tar").touch()  # no image
    assert verify("--images", tmp_path) == 0
    assert seen[0].shape == (3, 3, 32, 32)
    assert "3 images: passed" in capsys.readouterr().out
    monkeypatch.setattr(cli_bench, "MOST_IMAGES", 2)
    assert verify("--images", *files) == 0
    assert "the first 2 of 3 images" in capsys.readouterr().out
    assert torch.equal(seen[1], seen[0][:2])


def test_verify_names_an_image_that_cannot_be_read(verify, capsys, bad_images):
    for file in bad_images.values():
        assert verify("--images", file) == 2
        assert f"swinfast: error: {file} can't be read: " in capsys.readouterr().err


def test_verify_of_an_empty_folder(verify, capsys, tmp_path):
    assert verify("--images", tmp_path) == 2
    assert f"swinfast: error: found no images in {tmp_path}" in capsys.readouterr().err


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert swinfast.__version__ in text and torch.__version__ in text
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    cpu, *gpus = found["devices"]
    assert cpu["device"] == "cpu" and cpu["backend"] == "torch"
    assert cpu["threads"] == torch.get_num_threads()
    assert len(gpus) == torch.cuda.device_count()
    assert gpus or "GPU" in found["missing"]


def test_info_names_what_is_missing_and_why(capsys, monkeypatch):
    known = info.version_of
    monkeypatch.setattr(info, "version_of", lambda name: None if name in ("triton", "timm") else known(name))
    monkeypatch.setattr(info, "has_native_bfloat16", lambda: False)
    monkeypatch.setattr(info, "can_pack", lambda dtype: dtype == torch.float32)
    found = info.info()
    assert found["versions"]["timm"] is None
    assert {"Triton", "timm", "bfloat16 on this CPU", "packed linear layers in bfloat16"} <= set(found["missing"])
    assert "packed linear layers in float32" not in found["missing"]
    assert "pip install 'swinfast[bench]'" in found["missing"]["timm"]
    assert main(["info"]) == 0
    assert "packed linear layers in bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capability", "arch", "table"),
    [((9, 0), "sm_90", "sm_90.json"), ((12, 0), "sm_120", "default.json"), ((7, 5), "sm_75", None)],
)
def test_info_of_a_gpu(capsys, monkeypatch, capability, arch, table):
    """A stand-in, where there is no GPU."""
    properties = SimpleNamespace(name="GPU X", major=capability[0], minor=capability[1], total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capability[0] >= 8)
    monkeypatch.setattr(launch, "_arch", lambda device: arch)
    assert main(["info", "--json"]) == 0
    _, gpu = json.loads(capsys.readouterr().out)["devices"]
    assert (gpu["name"], gpu["capability"], gpu["memory_gb"]) == ("GPU X", "{}.{}".format(*capability), 80.0)
    assert gpu["table"] == table
    assert gpu["backend"] == ("triton" if table else "torch")
    assert (gpu["why_not_triton"] is None) == bool(table)
    assert gpu["native_bfloat16"] == bool(table)
