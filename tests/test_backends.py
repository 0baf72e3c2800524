"""Which backend computes what, and what is said where one can't."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import OPTIONS, THREE, make, random_images
from torch import nn

import swinfast
from swinfast import backends, torch_backend, triton_backend
from swinfast.specs import PatchEmbedSpec


@pytest.fixture
def no_triton(monkeypatch):
    """A machine where Triton kernels can't run."""
    monkeypatch.setattr(backends, "why_no_triton", lambda device: f"there is no GPU at {device}")


@pytest.fixture
def gpu(monkeypatch):
    """A machine where every device is a GPU that Triton kernels run on, as far as the choice goes."""
    monkeypatch.setattr(backends, "why_no_triton", lambda device: None)


def choose(model, choice="auto", device="cuda", dtype=torch.float16):
    stage = swinfast.optimize(model, backend="torch").stages[0]
    return backends.choose(choice, stage.plan().spec, torch.device(device), dtype)


def test_forced_where_it_cannot_run(timm, no_triton):
    with pytest.raises(RuntimeError, match=r"backend='triton' can't run: there is no GPU.*use backend='auto'"):
        swinfast.optimize(make(timm, OPTIONS["square"], "timm"), backend="triton")


def test_forced_without_a_gpu_for_real():
    code = "import swinfast; swinfast.optimize(swinfast.create_model('swinv2_cr_tiny_224'), backend='triton')"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: backend='triton' can't run: Triton kernels run on a GPU, and the model is on")
    assert last.endswith("use backend='auto' or 'torch'")


def test_choices(timm, gpu):
    model = make(timm, OPTIONS["square"], "timm")
    assert choose(model).backend is triton_backend
    assert choose(model, device="cpu").backend is torch_backend
    assert choose(model, "torch") == (torch_backend, None, None)
    assert choose(model, "triton").backend is triton_backend


def test_auto_without_triton(timm, no_triton):
    choice = choose(make(timm, OPTIONS["square"], "timm"))
    assert choice.backend is torch_backend
    assert choice.note == "not Triton: there is no GPU at cuda"


def test_what_kernels_do_not_cover(timm, gpu):
    """auto takes PyTorch and says why, a forced Triton leaves the original."""
    large = make(timm, THREE | {"img_size": 256, "patch_size": 4, "window_size": 32}, "timm")
    wide = make(timm, THREE | {"img_size": 32, "embed_dim": 160}, "timm")
    for model, dtype, expected in (
        (large, torch.float16, "no Triton kernel for windows of 32x32 tokens"),
        (wide, torch.float16, "no Triton kernel for heads of 160 channels"),
        (make(timm, OPTIONS["square"], "timm"), torch.float64, "no Triton kernels for float64"),
    ):
        assert choose(model, dtype=dtype) == (torch_backend, None, f"not Triton: {expected}")
        assert choose(model, "triton", dtype=dtype) == (None, expected, None)


@pytest.mark.parametrize(("channels", "covered"), [(1024, True), (1056, False)])
def test_wide_patch_embeddings(channels, covered):
    """Kernels hold all channels of a token: they would spill, and take a minute to compile."""
    spec = PatchEmbedSpec(nn.Conv2d(3, channels, 4, 4), nn.LayerNorm(channels), None, whole_patches=False)
    expected = None if covered else "no Triton kernel for patches of 1056 channels"
    assert triton_backend.why_not(spec, torch.float16) == expected


def test_a_stage_that_kernels_do_not_cover_stays_original(timm):
    model = make(timm, THREE | {"img_size": 100, "window_size": [(25, 25), 4, 4]}, "timm")
    fast = swinfast.optimize(model, backend="triton")
    rows = {row.name: row for row in swinfast.report(fast).rows}
    assert not rows["stages.0.blocks.0"].replaced
    assert rows["stages.0.blocks.0"].detail == "no Triton kernel for windows of 25x25 tokens"
    assert rows["stages.1.blocks.0"].detail.startswith("Triton, ")
    outcome = swinfast.verify(model, fast, random_images(1, 3, 100, 100))
    assert outcome.passed, outcome


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    problem = backends.why_no_triton(torch.device("cuda"))
    assert problem == "Tesla T4 has compute capability 7.5, the kernels need 8.0"


def test_without_triton_installed(monkeypatch):
    monkeypatch.setattr(backends, "_triton_backend", lambda: __import__("swinfast.no_such_module"))
    problem = backends.why_no_triton(torch.device("cuda"))
    assert problem.startswith("Triton is not installed (No module named")
