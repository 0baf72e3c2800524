"""What is shown of results is what was measured: tables, documents, plots."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bench import batch, plot, readme, tables
from bench.tables import FLOOR, MAIN_MODEL, latest_runs
from swinfast import plots
from swinfast.measurements import COLUMNS, append

ROOT = Path(__file__).parents[1]


def row(engine="swinfast", speed=10.0, batch=8, **cells) -> dict[str, str]:
    found = {"model": MAIN_MODEL, "dtype": "float32", "device": "Device X", "torch": "2.13", "date": "2026-01-01"}
    found |= {"engine": engine, "infer_samples_per_sec": str(speed), "infer_batch_size": str(batch)}
    found |= {
        "infer_step_time": "1.5",
        "infer_step_time_p95": "2.5",
        "rel_error": "1.00e-06",
        "top1_agreement": "0.875",
    }
    return dict.fromkeys(COLUMNS, "") | found | cells


def line_of(table: str, *words: str) -> list[str]:
    (line,) = [
        line for line in table.splitlines() if line.startswith("|") and all(f" {word} " in line for word in words)
    ]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_documents_show_the_result_files():
    done = subprocess.run([sys.executable, "-m", "bench.readme", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run python -m bench.readme"


def test_the_last_run_counts_and_runs_do_not_mix():
    rows = [row("timm eager", 1), row("swinfast", 9), row("timm compiled", 7), row("swinfast", 5), row("timm eager", 2)]
    first, run = latest_runs(rows)
    assert list(first.rows) == ["timm eager", "swinfast", "timm compiled"]
    assert list(run.rows) == ["swinfast", "timm eager"]
    assert line_of(tables.speeds([first], "bench.models"), "float32")[-3:-1] == ["9.00×", "1.29×"]
    assert line_of(tables.speeds([run], "bench.models"), "float32")[-3:-1] == ["2.50×", "–"]


def test_a_run_is_hidden_by_a_later_one_with_all_of_its_engines():
    fewer = [row("timm eager", 1, date="1"), row("swinfast", 9, date="1")]
    more = [row("timm eager", 2, date="2"), row("swinfast", 8, date="2"), row("timm compiled", 7, date="2")]
    again = [one | {"date": "3"} for one in fewer]
    for rows, expected in ((fewer + more, ["2"]), (more + again, ["2", "3"])):
        runs = latest_runs(rows)
        assert [run.rows["swinfast"]["date"] for run in runs] == expected
        said = "those before the last are earlier runs" in tables.speeds(runs, "bench.models")
        assert said == (len(expected) == 2)


@pytest.mark.parametrize("cell", ["dtype", "infer_batch_size", "device", "commit", "date"])
def test_what_differs_is_another_run(cell):
    rows = [row("timm eager", 1), row("swinfast", 9, **{cell: "16"})]
    runs = latest_runs(rows)
    assert [len(run.rows) for run in runs] == [1, 1]


def test_another_model_is_another_run():
    """But for the ViT, which takes turns with one of ours."""
    vit = row("timm compiled", 40, model="vit_small_patch16_224")
    runs = latest_runs([row("timm eager", 1), vit, row("swinfast", 9, model="other")])
    assert [(run.model, list(run.rows)) for run in runs] == [
        (MAIN_MODEL, ["timm eager", "ViT-S/16, compiled"]),
        ("other", ["swinfast"]),
    ]


def test_runs_are_sorted():
    rows = [row(batch=256), row(batch=1), row(batch=32, dtype="float16"), row(batch=8)]
    assert [(run.dtype, run.batch) for run in latest_runs(rows)] == [
        *(("float32", size) for size in (1, 8, 256)),
        ("float16", 32),
    ]


def test_speeds_beside_each_other():
    vit = row("timm compiled", 40, model="vit_small_patch16_224", rel_error="9.99e-01")
    rows = [row("timm eager", 4.321), row(speed=1234.5), vit, row("OpenVINO", 2469), row(FLOOR, 5000, rel_error="")]
    table = tables.speeds(latest_runs([*rows, row(batch=32, speed=7)]), "bench.models")
    header = [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")]
    assert header[:7] == ["dtype", "batch", "swinfast", "timm eager", "ViT-S/16, compiled", "OpenVINO", FLOOR]
    cells = line_of(table, "8")
    assert cells[2:7] == ["1,234", "4.32", "40.0", "2,469", "5,000"]
    assert cells[7:] == ["285.70×", "0.50×", "1.00e-06 / 1.00e-06"]  # neither the ViT nor the floor is an other
    assert line_of(table, "32")[2:] == ["7.00", "–", "–", "–", "–", "–", "–", "1.00e-06 / –"]
    assert "on Device X, PyTorch 2.13: medians" in table


def test_several_models_are_named():
    table = tables.speeds(latest_runs([row(), row(model="other", speed=3)]), "bench.models")
    assert line_of(table, "`other`")[:4] == ["`other`", "float32", "8", "3.00"]


def test_details():
    rows = [row("timm eager", 4), row(speed=10, peak_memory="12.5"), row(FLOOR, 20, rel_error="", top1_agreement="")]
    table = tables.details(latest_runs(rows))
    assert line_of(table, "swinfast")[3:] == ["swinfast", "1.5", "2.5", "2.50×", "1.00e-06", "87.5%", "12.5"]
    assert line_of(table, *FLOOR.split()[:2])[6:] == ["5.00×", "–", "–", "–"]


def test_what_ran_without_a_graph_is_marked():
    source = "measured, without a CUDA graph, since capturing one failed: RuntimeError"
    runs = latest_runs([row("timm eager", 4, source="measured"), row(speed=10, source=source)])
    assert line_of(tables.details(runs), "87.5%", "2.50×")[3] == "swinfast (no graph)"
    assert line_of(tables.speeds(runs, "bench.models"), "8")[2:4] == ["10.0 (no graph)", "4.00"]


def test_a_wrong_option_writes_no_document(monkeypatch, tmp_path):
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        readme.main(["--chek"])


def test_batch_inference_is_added_to_what_was_measured(tmp_path):
    """The table shows the last of what it shows, and of one model."""
    for model, rate in (("other", 9.0), ("m", 20.0), ("m", 10.0)):
        options = batch._parser().parse_args(["--model", model, "--results", str(tmp_path / "batch.csv")])
        batch._write(options, {"decode": [rate], "model": [2 * rate]}, {500: 300.0} if model == "m" else {600: 1.0})
    with (tmp_path / "batch.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 9
    table = tables.batch(rows)
    assert line_of(table, "decode") == ["decode", "2000", "10.0", "1.000", "–"]
    assert line_of(table, "memory") == ["memory", "500", "–", "–", "300"]


def test_regions_are_made_anew(monkeypatch):
    monkeypatch.setitem(readme.REGIONS, "cpu", lambda: "new")
    start, end = "<!-- results cpu: written by python -m bench.readme -->", "<!-- end of results -->"
    assert readme.with_results(f"a\n{start}\nold\n{end}\nb") == f"a\n{start}\nnew\n{end}\nb"
    with pytest.raises(KeyError):
        readme.with_results(f"{start.replace('cpu', 'tpu')}\n{end}")


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tmp_path


def test_without_a_gpu_the_documents_say_so(results):
    assert readme.gpu() == readme.kernel_times() == "No GPU has been measured yet."
    assert readme.summary() == ""


def test_a_gpu_file_makes_a_table(results):
    append(results / "gpu_x.csv", row(batch=32, driver="570", triton="3.6"))
    append(results / "gpu_x.csv", row(batch=64, driver="570", triton="3.6"))
    append(results / "peers_cpu.csv", row(device="CPU Y"))
    assert readme.summary().index("Device X") < readme.summary().index("CPU Y")
    assert "| 32 " in readme.summary() and "| 64 " not in readme.summary()
    assert "| 64 " in readme.gpu() and "Triton 3.6, driver 570" in readme.gpu()
    kernel = {"kernel": "mlp_block", "shape": "C96", "dtype": "float16", "device": "Device X", "time_us": "12"}
    (results / "kernels_x.csv").write_text(",".join(kernel) + "\n" + ",".join(kernel.values()) + "\n", encoding="utf-8")
    assert line_of(readme.kernel_times(), "mlp_block") == ["mlp_block", "C96", "float16", "12", *"–" * 5]


def test_pictures_of_models(tmp_path):
    rows = [row("timm eager", 4), row(speed=10), row("timm eager", 2, batch=1), row(FLOOR, 99, batch=1)]
    files = plot.draw_models(rows, tmp_path, "peers_")
    assert [file.name for file in files] == ["peers_throughput_device_x.png", "peers_speedup_device_x.png"]
    for file in files:
        assert file.stat().st_size < 100_000
        with Image.open(file) as image:
            assert image.width > 600


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    monkeypatch.setattr(plots, "finish", lambda figure, panels, path: figures.append(panels))
    monkeypatch.setattr(plot, "finish", plots.finish)
    return figures


def test_bars_are_ratios_of_one_batch_size(drawn, tmp_path):
    rows = [
        row("timm eager", 4),
        row(speed=10),
        row("timm eager", 2, batch=1),
        row(speed=3, batch=32, dtype="bfloat16"),
    ]
    plots.speed_ups(rows, tmp_path / "p.png", base="timm eager")
    ((first, second),) = drawn
    (bar,) = first.patches
    assert bar.get_height() == 2.5
    assert bar.get_x() + bar.get_width() / 2 == pytest.approx(1)  # of the sizes 1, 8, 32
    assert not second.patches  # nothing to compare with


def test_lines_are_speeds(drawn, tmp_path):
    plots.throughput([row(speed=10), row(speed=3, batch=1), row("timm eager", 4)], tmp_path / "p.png")
    ((panel,),) = drawn
    ours, eager = panel.get_lines()
    assert (list(ours.get_xdata()), list(ours.get_ydata())) == ([1, 8], [3, 10])
    assert (ours.get_label(), eager.get_label()) == ("swinfast", "timm eager")
    assert ours.get_color() != eager.get_color() and ours.get_marker() != eager.get_marker()


def test_pictures_show_no_engine_of_an_earlier_run(drawn, tmp_path):
    """Its speed would stand beside speeds of others' runs."""
    earlier = [row(engine, 4, date="1") for engine in ("swinfast", "timm eager", "timm compiled")]
    plot.draw_models([*earlier, row(speed=10, date="2"), row("timm eager", 5, date="2")], tmp_path, "")
    (panel,), (bars,) = drawn
    assert [line.get_label() for line in panel.get_lines()] == ["swinfast", "timm eager"]
    assert [bar.get_height() for bar in bars.patches] == [2.0]


def kernel(name="linear", rate="100", intensity="50", dtype="float16") -> dict[str, str]:
    cells = {"kernel": name, "shape": "a", "dtype": dtype, "device": "NVIDIA H100 80GB HBM3"}
    return cells | {"tflop_per_s": rate, "intensity": intensity}


def test_kernels_below_their_ceilings(drawn, tmp_path):
    rows = [kernel(rate="1"), kernel(), kernel("norm", rate="0"), kernel("mlp", dtype="float32", intensity="1000")]
    plot.draw_kernels(rows, tmp_path / "k.png")
    ((half, single),) = drawn
    shown = [tuple(point) for dots in half.collections for point in dots.get_offsets().tolist()]
    assert shown == [(50.0, 100.0)]  # the last of a repeated one, and none without products
    (line,) = half.get_lines()
    assert list(line.get_ydata())[:1] == pytest.approx([25 * 3.35])
    assert max(line.get_ydata()) == pytest.approx(989.4)
    assert max(single.get_lines()[0].get_ydata()) == pytest.approx(66.9)


def test_kernels_of_an_unknown_device(tmp_path):
    plot.draw_kernels([kernel() | {"device": "GPU Y"}], tmp_path / "k.png")
    assert (tmp_path / "k.png").stat().st_size < 100_000


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80 GB"),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-40GB", None),
    ],
)
def test_gpus_are_known_by_their_names(device, name):
    found = plot.gpu_named(device)
    assert (found and found.name) == name


def test_the_script_draws_what_there_is(results, tmp_path, capsys):
    append(results / "cpu.csv", row("timm eager", 4))
    append(results / "cpu.csv", row())
    assert plot.main(["--output", str(tmp_path / "new")]) == 0
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "speedup_device_x.png",
        "throughput_device_x.png",
    ]
    assert "throughput_device_x.png" in capsys.readouterr().out


def test_host_overhead_by_operation():
    about = {"model": "m", "dtype": "float16", "device": "d", "torch": "1", "triton": "2", "source": "measured"}
    rows = [
        about | dict(zip(("operation", "shape", "calls", "forward_us"), values, strict=True))
        for values in (
            ("one", "x", "9", "99"),
            ("one", "x", "1", "10"),
            ("one", "y", "3", "50"),
            ("b", "x", "2", "12.4"),
            ("forward", "", "1", "400"),
        )
    ]
    rows = [rows[0] | {"commit": "old", "operation": "gone"}, *(row | {"commit": "new"} for row in rows)]
    table = tables.overhead(rows)
    assert "gone" not in table
    assert line_of(table, "one") == ["`m`", "float16", "one", "4", "15.0", "60"]  # of a repeated one the last
    assert line_of(table, "`m`", "forward")[3:] == ["1", "400.0", "400"]
    assert line_of(table, "all") == ["`m`", "float16", "all", "6", "12.1", "72"]  # of the launches


def test_shares_of_a_forward():
    rows = [
        {"model": "m", "dtype": "float32", "batch": batch, "part": part, "share": share, "device": "d", "torch": "1"}
        for batch, part, share in (("1", "p", "0.9"), ("1", "p", "0.25"), ("8", "p", "0.5"), ("8", "q", "0.125"))
    ]
    header, _, *lines = tables.profile(rows).splitlines()[:4]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines)]
    assert cells == [["part", "float32, batch 1", "float32, batch 8"], ["p", "25.0%", "50.0%"], ["q", "–", "12.5%"]]


def test_batch_inference():
    empty = {"images_per_sec": "", "ratio": "", "mib": "", "model": "m", "device": "d", "torch": "1"}
    rows = [
        empty | {"what": "split 1+1", "images": "2000", "images_per_sec": "123.4", "ratio": "0.950"},
        empty | {"what": "memory", "images": "500", "mib": "280"},
        empty | {"what": "memory", "images": "5000", "mib": "290"},
    ]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables.batch(rows).splitlines()[2:5]]
    assert lines == [
        ["split 1+1", "2000", "123", "0.950", "–"],
        ["memory", "500", "–", "–", "280"],
        ["memory", "5000", "–", "–", "290"],
    ]


def test_profile_shows_the_last_run_alone():
    """Parts that an older run knew, and the last does not, are left out."""
    shared = {"model": "m", "dtype": "float32", "batch": "1", "device": "a CPU", "torch": "2.13.0"}
    runs = [[("whole", 1.0), ("old", 0.7), ("both", 0.3)], [("whole", 1.0), ("new", 0.6), ("both", 0.4)]]
    text = tables.profile([shared | {"part": part, "share": str(share)} for run in runs for part, share in run])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert cells[2:] == [["whole", "100.0%"], ["new", "60.0%"], ["both", "40.0%"]]
