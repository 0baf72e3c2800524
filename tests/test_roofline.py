"""The predictions of bench.roofline: what they count, checked against other ways to count it."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import swinfast
from bench import roofline, sass
from bench.gpus import GPUS

NAME = "swinv2_cr_tiny_ns_224"
SASS = """
.text._kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R2, [R4] ;
        /*0020*/                   FADD R2, R2, R3 ;
        /*0030*/              @!P0 BRA `(.L_x_0) ;
        /*0040*/                   STG.E [R4], R2 ;
        /*0050*/                   EXIT ;
.L_x_1:
        /*0060*/                   BRA `(.L_x_1) ;
        /*0070*/                   NOP ;
"""


@pytest.mark.parametrize("batch", [1, 2, 64])  # few rows and many: other kernels
def test_flops_are_those_of_the_model(batch):
    """The kernels' products against PyTorch's own count, without the head and the bias MLPs, which run once."""
    launches = roofline.launches_of(NAME, batch, torch.float16, "sm_90")
    ours = sum(roofline.flops_of(launch, roofline.kernel_of(launch)) for launch in launches)
    model = swinfast.create_model(NAME, device="meta", num_classes=0).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(batch, 3, 224, 224, device="meta"))
    hidden = [(block.attn.meta_mlp.fc1.out_features, block.attn.num_heads) for s in model.stages for block in s.blocks]
    bias = sum(2 * 49**2 * (2 * units + units * heads) for units, heads in hidden)  # for each pair of tokens
    assert ours == pytest.approx(counter.get_total_flops() - bias, rel=1e-6)


def test_bytes_are_those_of_the_tensors():
    launches = roofline.launches_of(NAME, 32, torch.float16, "sm_90")
    embed = launches[0]
    expected = 2 * (32 * 3 * 224 * 224 + 96 * 48 + 3 * 96 + 32 * 56 * 56 * 96)
    assert roofline.bytes_of(embed) == expected
    assert sum(map(roofline.bytes_of, launches)) < roofline.eager_bytes(NAME, 32, torch.float16) / 3


def test_instructions_are_counted_with_their_loops():
    assert sass.count(SASS, [5]) == 8 + 4 * 3
    assert sass.count(SASS.replace("@!P0 BRA `(.L_x_0)", "NOP"), [5]) == 8
    assert sass.count(SASS, [5, 2]) == sass.count(SASS, [2, 5]) == 8 + 4 * 3  # the shorter one is unrolled
    with pytest.raises(sass.Uncountable, match="1 loops in the machine code, 0 in the source"):
        sass.count(SASS, [])


@pytest.mark.parametrize(("ahead", "expected"), [({}, 12), ({"AHEAD": 0}, 12), ({"AHEAD": 2}, 10)])
def test_chunks_that_are_ahead_are_outside_the_loop(ahead, expected):
    job = SimpleNamespace(kernel="mlp_block", named={"HIDDEN": 384, "BLOCK_HIDDEN": 32} | ahead)
    assert sass.trips(job) == [expected]


def test_rates():
    gpu = GPUS["a100"]
    assert gpu.matrix_rate("float16") == gpu.matrix_rate("bfloat16") == 312e12
    assert gpu.matrix_rate("float32") < gpu.matrix_rate("tf32") < gpu.matrix_rate("float16")
    assert gpu.issue_rate == pytest.approx(4 * 108 * 1.41e9)


@pytest.mark.slow
def test_command(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "bench.roofline",
        "--batch",
        "1",
        "--gpu",
        "a100",
        "h100",
        "--plot",
        tmp_path / "plot.png",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"PREDICTION for A100 SXM 80 GB: {NAME}, batch 1, float16. Nothing was measured.")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
