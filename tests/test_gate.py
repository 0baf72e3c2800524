"""The gate that compiles every kernel ahead of time (python -m swinfast.kernels), and the tables that it checks."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from swinfast.kernels.configs import FOLDER, Config, config, rows
from swinfast.kernels.gate import ARCHS, Job, Measured, problems, waits_first

ROOT = Path(__file__).parents[1]
KERNELS = {
    "attention_block", "attention_parts", "cpb_bias.offsets", "cpb_bias.table", "linear", "linear_norm_residual",
    "mlp_block", "mlp_parts", "merge_norm", "norm_residual", "patch_embed", "qkv_attention", "window_attention",
}  # fmt: skip
IN_PARTS = {"attention_parts", "mlp_parts"}  # where there is a large cache
PERSISTENT = {"linear.persistent_linear"}  # on some architectures
WARPGROUPS = {"attention_warpgroups.attention", "mlp_warpgroups.mlp"}
TABLES = sorted(file.stem for file in FOLDER.glob("*.json"))
CONFIG = Config({}, 4, 2, "")
PRECISIONS = ("float16", "bfloat16", "float32", "tf32")
SIZES = {  # by which rows are matched: the values tried for a row that does not name them
    "channels": (96, 128, 192, 256, 384, 512, 768, 1024, 1536, 3072),
    "tokens": (16, 25, 49, 64, 144),
    "block_d": (16, 32, 64),
    "stream_bytes": (2, 4),
    "k": (16, 48, 192, 384, 768, 1536, 3072, 6144),
    "n": (16, 64, 96, 288, 384, 768, 1536, 3072),
    "elements": (1 << 30,),
    "gelu": (0, 1),
    "in_parts": (0, 1),
    "held": (0, 1),
    "rows": (64, 1 << 20),
}
BAD_TABLE = """
import json, sys
from swinfast.kernels import __main__ as gate, configs

rows, subset = configs.rows, gate.subset
bad = json.loads(sys.argv[1])
configs.rows = lambda table: [bad, *rows(table)]
gate.subset = lambda jobs: [job for job in subset(jobs) if job.kernel == bad["kernel"]]  # the others take a minute
sys.exit(gate.main(sys.argv[2:]))
"""


WINDOWS = """
import torch
from swinfast.kernels.gate import job_of, measure
from swinfast.kernels.launch import record
from swinfast.kernels.window_attention import padded_size, window_attention

for window in ((2, 3), (4, 5), (5, 9), (8, 9), (10, 10)):
    for name, shift in (("float16", [1, 1]), ("float32", [0, 0])):
        dtype = getattr(torch, name)
        qkv, bias, scale = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((2, 20, 20, 96), (96,), (2,)))
        with record("sm_90") as launches:
            shape = 4 if any(shift) else 1, 2, *padded_size(qkv.device, dtype, window, 16)
            table = torch.empty(shape, dtype=dtype, device="meta")
            window_attention(qkv, bias, scale, table, list(window), shift)
        if error := measure(job_of(launches[0], "sm_90", name)).error:
            print(window, name, error)
"""

WIDE_HEADS = """
import torch
from swinfast.kernels.attention_parts import attention_parts
from swinfast.kernels.gate import job_of, measure, problems
from swinfast.kernels.launch import record


def empty(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")


for arch in ("sm_80", "sm_89", "sm_90"):
    for channels, head_dim, stream in ((96, 48, torch.float32), (1024, 64, torch.float16)):
        heads = channels // head_dim
        with torch.no_grad(), record(arch) as launches:
            attention_parts(
                empty(1, 16, 16, channels, dtype=stream), empty(3 * channels, channels), empty(3 * channels),
                empty(heads, dtype=stream), empty(4, heads, 64, 64), empty(channels, channels), empty(channels),
                [8, 8], [4, 4],
            )
        job = job_of(launches[-1], arch, "float16")
        if found := problems(job, measure(job)):
            print(arch, channels, head_dim, found)
"""

OVERLAPPED = """
from swinfast.kernels import configs
from swinfast.kernels.gate import job_of, measure, problems
from swinfast.kernels.shapes import launches


def overlapped(kernel, shape):
    with configs.override(lambda *_: None):
        chosen = configs.config(kernel, "sm_90", "float16", **shape)
    return chosen if "use" in chosen.blocks else chosen._replace(blocks=chosen.blocks | {"OVERLAPPED": True})


seen = set()
with configs.override(overlapped):
    found = launches("sm_90", "float16", ["tiny"])
for launched in found:
    name = launched.kernel and launched.kernel.fn.__name__
    if name and launched.kernel.fn.__module__ != "swinfast.kernels.cpb_bias" and name not in seen:
        seen.add(name)
        job = job_of(launched, "sm_90", "float16")
        print(job.kernel, *problems(job, measure(job)))
"""

WIDER = """
import torch
from bench.cases import first_launches, model_named
from bench.candidates import WARPGROUPS
from swinfast.kernels.configs import Config
from swinfast.kernels.gate import job_of, measure, problems

with torch.no_grad():
    model = model_named("swinv2_cr_tiny_ns_224")
    found = list(first_launches(model, 256, "float16", "sm_90", None))
for launched in found:
    blocks = launched.config.blocks
    if blocks.get("use") == "warpgroups":
        operation = launched.kernel.fn.__module__.rpartition(".")[2].replace("warpgroups", "block")
        for blocks, warps in WARPGROUPS[operation]:
            config = Config(blocks, warps, 1, "a test")
            job = job_of(launched._replace(config=config, constants=launched.constants | blocks), "sm_90", "float16")
            print(job.kernel, *blocks.items(), *problems(job, measure(job)))
"""

CACHE_KEYS = """
import importlib, pkgutil, sys
from swinfast import kernels

names = sorted(module.name for module in pkgutil.iter_modules(kernels.__path__) if module.name != "__main__")
modules = [importlib.import_module(f"swinfast.kernels.{name}") for name in names]
found = {}
for module in modules[:: int(sys.argv[1])]:
    functions = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    found |= {name: function.cache_key for name, function in functions.items()}
print(sorted(found.items()))
"""

SINGLE_PIXELS = """
import re, torch
from swinfast.kernels.gate import ARCHS, job_of
from swinfast.kernels.launch import record
from swinfast.kernels.patch_embed import _patch_embed_kernel, patch_embed
from triton import compile
from triton.compiler import ASTSource

def empty(*shape):
    return torch.empty(shape, dtype=torch.float16, device="meta")

for width in (224, 222):
    with record("sm_90") as launches:
        patch_embed(empty(64, 3, 224, width), empty(96, 3, 4, 4), empty(96), empty(96), empty(96))
    job = job_of(launches[0], "sm_90", "float16")
    source = ASTSource(_patch_embed_kernel, job.signature, job.constants, job.attrs)
    assembly = compile(source, target=ARCHS["sm_90"].target, options=job.config.options).asm["ptx"]
    print(width, len(re.findall("ld.global.b16", assembly)))
"""


@pytest.fixture
def gate(pytestconfig):
    """Runs Python with arguments as the gate must be run: without the interpreter, its results kept between runs."""
    cache = pytestconfig.cache.mkdir("swinfast-gate")

    def run(*args: str, **environment: str) -> subprocess.CompletedProcess:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, *args]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    return run


def test_keys_of_kernels_do_not_depend_on_their_order(gate):
    """Else what one process compiles is not found by another that compiles something else first."""
    forwards, backwards = (gate("-c", CACHE_KEYS, step) for step in ("1", "-1"))
    assert forwards.returncode == 0, forwards.stderr
    assert "_attention_parts_kernel" in forwards.stdout
    assert forwards.stdout == backwards.stdout


def test_pixels_are_loaded_four_at_a_time(gate):
    """Where all rows begin at a multiple of four: one at a time they would be as many requests as numbers."""
    done = gate("-c", SINGLE_PIXELS)
    assert done.returncode == 0, done.stderr
    single = dict(map(str.split, done.stdout.splitlines()))
    assert int(single["224"]) == 0 < int(single["222"])


@pytest.mark.parametrize(
    ("archs", "precisions"),
    [
        (["sm_90"], ["float16", "float32"]),
        pytest.param(list(ARCHS), list(PRECISIONS), marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_subset_is_fit(gate, tmp_path, archs, precisions):
    """Every kernel compiles for every architecture and precision that it is used in, within the limits."""
    options = ("--subset", "--arch", *archs, "--precision", *precisions, "--json", str(tmp_path / "rows.json"))
    done = gate("-m", "swinfast.kernels", *options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    for arch in archs:
        here = [row for row in found if row["arch"] == arch]
        rest = PERSISTENT | WARPGROUPS if arch == "sm_90" else set()
        assert {row["kernel"] for row in here} == KERNELS - (IN_PARTS if arch == "gfx942" else set()) | rest
        assert {row["precision"] for row in here} == set(precisions)
    assert {row["arch"] for row in found} == set(archs)
    assert not any(row["problems"] for row in found)
    assert all(row["registers"] > 0 and row["per SM"] > 0 for row in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "float16 --variant tiny",
        "float16 --arch sm_80 sm_89 sm_90",
        "float32 tf32 --variant tiny --arch sm_80 sm_89 sm_90",
    ],
)
def test_every_shape_is_fit(gate, options):
    """Less than `python -m swinfast.kernels` compiles, which takes an hour; the subset above has one shape of the rest.

    bfloat16 has the rows of float16 and the same instructions. In float32 most rows hold for any number of channels.
    """
    done = gate("-m", "swinfast.kernels", "--precision", *options.split())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_windows_of_other_sizes_compile(gate):
    """The published models have few; the interpreter minds no types, so only a compiler finds what they break."""
    done = gate("-c", WINDOWS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""


def test_wide_heads_do_not_spill(gate):
    """No published model has any: their heads are of 32 channels."""
    done = gate("-c", WIDE_HEADS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""


def test_overlapped_kernels_wait_first(gate):
    """Those of a forward, by their assembly; the table of biases is not computed in one."""
    done = gate("-c", OVERLAPPED)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        set(done.stdout.splitlines()) == {k for k in KERNELS if not k.startswith("cpb_bias")} | PERSISTENT | WARPGROUPS
    )


@pytest.mark.slow
def test_what_the_tuner_tries_of_warpgroups_is_fit(gate):
    """Without spills, and within what a multiprocessor has."""
    done = gate("-c", WIDER)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert {line.split()[0] for line in lines} == WARPGROUPS
    assert not [line for line in lines if "spills" in line or "needs" in line or "expected" in line]


@pytest.mark.parametrize(
    ("assembly", "waits"),
    [
        (".entry k(.param .u64 .ptr .global p) { griddepcontrol.wait; ld.global.b32 %r1, [%rd1]; }", True),
        (".entry k(.param .u64 .ptr .global p) { ld.global.b32 %r1, [%rd1]; }", False),
        ("@%p1 ld.global.v4.b32 {%r1}, [%rd1]; griddepcontrol.wait;", False),
        ("cp.async.cg.shared.global [%r1], [%rd1], 16; griddepcontrol.wait;", False),
        ("cp.async.bulk.tensor.2d.shared::cluster.global [%r1], [%rd1]; griddepcontrol.wait;", False),
        ("st.shared.b32 [%r1], %r2; griddepcontrol.wait; st.global.b32 [%rd1], %r2;", True),
    ],
)
def test_gate_knows_who_waits_first(assembly, waits):
    assert waits_first(assembly) is waits
    blocks = {"OVERLAPPED": True}
    job = Job("sm_90", "float16", "swinfast.kernels.norm_residual", "_", {}, {}, {}, Config(blocks, 4, 2, ""), {}, "")
    assert bool(problems(job, Measured(registers=32, waits=waits))) is not waits


@pytest.mark.parametrize(
    ("arch", "blocks", "num_stages", "reason"),
    [
        ("sm_80", {"BLOCK_M": 512, "BLOCK_N": 128, "BLOCK_K": 32}, 2, "spills"),
        ("sm_89", {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, 6, "shared memory, there are 99"),
        ("sm_80", {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "maxnreg": 40}, 2, "spills"),  # 77 without
    ],
)
def test_gate_refuses_a_bad_tile(gate, arch, blocks, num_stages, reason):
    row = {"kernel": "linear", "precision": ["float16"], "blocks": blocks, "num_warps": 8, "num_stages": num_stages}
    args = ("--subset", "--arch", arch, "--precision", "float16", "--variant", "tiny")
    done = gate("-c", BAD_TABLE, json.dumps(row | {"source": "a test"}), *args)
    refused = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert done.returncode == 1
    assert len(refused) == 1
    assert refused[0].startswith("REFUSED linear (x=fp16 n=")
    assert reason in refused[0]


@pytest.mark.parametrize(
    ("arch", "precision", "rows", "product", "fit"),
    [
        ("sm_80", "float16", 64, "mma.sync", True),
        ("sm_80", "float16", 64, "", False),
        ("sm_80", "float32", 64, "", True),
        ("sm_80", "tf32", 64, "", False),
        ("sm_90", "bfloat16", 64, "wgmma", True),
        ("sm_90", "bfloat16", 64, "mma.sync", False),
        ("sm_90", "bfloat16", 32, "mma.sync", True),
        ("sm_100", "float16", 128, "tcgen05", True),
        ("gfx942", "float16", 64, "", False),
    ],
)
def test_gate_misses_matrix_instructions(arch, precision, rows, product, fit):
    """Products in float32 are multiply-adds; wgmma takes 64 rows."""
    named = {"PRECISION": "tf32" if precision == "tf32" else "ieee", "BLOCK_M": rows}
    job = Job(arch, precision, "swinfast.kernels.linear", "_linear_kernel", {}, {}, {}, CONFIG, named, "")
    assert bool(problems(job, Measured(registers=100, shared=1024, product=product))) is not fit


@pytest.mark.parametrize("columns", [512, 1024])
def test_gate_knows_tensor_memory(columns):
    job = Job("sm_100", "float32", "swinfast.kernels.linear", "_linear_kernel", {}, {}, {}, CONFIG, {}, "")
    assert bool(problems(job, Measured(registers=100, tensor_memory=columns))) is (columns > 512)


def test_gate_does_not_run_in_the_interpreter(gate):
    done = gate("-m", "swinfast.kernels", "--subset", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


def test_help(gate):
    done = gate("-m", "swinfast.kernels", "--help")
    assert done.returncode == 0
    for option in ("--arch", "--precision", "--variant", "--subset", "--json"):
        assert option in done.stdout


@pytest.mark.parametrize("table", TABLES)
def test_every_row_can_be_reached(table):
    """No row hides behind those above it, in any of its precisions."""
    assert table == "default" or table in ARCHS
    for number, row in enumerate(rows(table)):
        for precision in row["precision"]:
            assert any(_chosen(table, row, precision, shape) for shape in _shapes(row)), (number, row, precision)


def _shapes(row: dict) -> list[dict[str, int]]:
    """Shapes that a row may match: what it names as it names it, anything else tried."""
    named = {
        key.removesuffix("_max")
        for table in TABLES
        for other in rows(table)
        for key in other.get("when", {})
        if other["kernel"] == row["kernel"]
    }
    choices = {name: values if name in named else values[:1] for name, values in SIZES.items()}
    for key, wanted in row.get("when", {}).items():
        name = key.removesuffix("_max")
        values = wanted if isinstance(wanted, list) else [wanted]
        choices[name] = [value for value in choices[name] if name == key or value <= wanted]
        choices[name] = values if name == key else [*choices[name], wanted]
    return [dict(zip(choices, sizes, strict=True)) for sizes in itertools.product(*choices.values())]


def _chosen(table: str, row: dict, precision: str, shape: dict[str, int]) -> bool:
    arch = "an unknown architecture" if table == "default" else table
    found = config(row["kernel"], arch, precision, **shape)
    return found == (row.get("blocks", {}), row.get("num_warps", 4), row.get("num_stages", 1), row["source"])
