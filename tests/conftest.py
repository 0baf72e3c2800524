"""Fixtures of all tests."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: kernels then run on the CPU, in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"
    from quick_interpreter import quicken

    quicken()

from graph_captures import DEVICE, Captures
from helpers import randomise, write_image
from safetensors.torch import save_file
from swinfast.reference import SwinTransformerV2Cr
from torch import nn

import swinfast
from bench.peers import import_timm
from swinfast import graphs, torch_backend
from swinfast.cli import main

torch.backends.cudnn.allow_tf32 = False  # which the oracle's convolution on a GPU is by default
torch.set_num_threads(1)  # these models are small: threads gain nothing, and on a busy machine they cost tenfold


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU the tests of the kernels are tests of the GPU."""
    for item in items:
        if torch.cuda.is_available() and ("kernels" in item.path.parts or item.path.name == "test_triton_backend.py"):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """timm, the oracle for models and image transforms."""
    return import_timm()


@pytest.fixture
def captures(monkeypatch) -> Captures:
    """What captures CUDA graphs; without a GPU, of the PyTorch backend too."""
    captures = Captures()
    monkeypatch.setattr(graphs, "capture", captures.capture)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(graphs, "on_gpu", lambda x: True)
        monkeypatch.setattr(graphs, "stream_of", lambda device: captures.stream)
        monkeypatch.setattr(graphs, "are_possible", lambda device: True)
        monkeypatch.setattr(graphs, "keeps_memory", lambda: True)
        monkeypatch.setattr(torch_backend, "capturable", True)
        for name in ("derive_patch_embed", "derive_stage"):  # weights as they are, which a tape can read where they lie
            derive = getattr(torch_backend, name)
            monkeypatch.setattr(
                torch_backend, name, lambda spec, traced, autocast, derive=derive: derive(spec, True, autocast)
            )
    return captures


@pytest.fixture(scope="session")
def twins(timm) -> Callable[..., tuple[nn.Module, nn.Module]]:
    """Makes our SwinTransformerV2Cr and timm's with the same arguments and random weights, both in eval mode."""

    def make(seed: int = 0, **args) -> tuple[nn.Module, nn.Module]:
        theirs = randomise(timm.models.swin_transformer_v2_cr.SwinTransformerV2Cr(**args), seed).eval()
        ours = SwinTransformerV2Cr(**args).eval()
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs

    return make


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A small classifier of 10 classes for images of 32 by 32, saved as create_model reads it."""
    args = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
    folder = tmp_path_factory.mktemp("model")
    config = {
        "architecture": "swinv2_cr_tiny_224",
        "num_classes": 10,
        "label_names": [f"class {number}" for number in range(10)],
        "model_args": args,
        "pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": 1.0},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(randomise(SwinTransformerV2Cr(**args, num_classes=10)).state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def model(model_folder) -> nn.Module:
    """That of model_folder; many files of tests have another by this name."""
    return swinfast.create_model(str(model_folder))


@pytest.fixture
def images(tmp_path) -> list[str]:
    """Eleven files."""
    return [str(write_image(tmp_path / f"{seed:02}.png", seed)) for seed in range(11)]


@pytest.fixture
def talking(tmp_path, monkeypatch) -> None:
    """Each Python that this one starts writes on its standard output before anything else."""
    (tmp_path / "talking").mkdir()
    (tmp_path / "talking" / "sitecustomize.py").write_text("print('one line\\n{} another', end='')")
    monkeypatch.syspath_prepend(tmp_path / "talking")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")


@pytest.fixture
def matmuls() -> Iterator[dict[str, Any]]:
    """What has PyTorch's precision of float32 products, by kinds of devices; a test may set it."""
    both = {"cuda": torch.backends.cuda.matmul, "cpu": torch.backends.mkldnn.matmul}
    before = [matmul.fp32_precision for matmul in both.values()]
    yield both
    for matmul, precision in zip(both.values(), before, strict=True):
        matmul.fp32_precision = precision


@pytest.fixture
def bad_images(tmp_path) -> dict[str, Path]:
    """Files that are no images, by what is wrong with them."""
    files = {name: tmp_path / f"{name}.{end}" for name, end in (("text", "png"), ("empty", "jpg"), ("cut", "jpg"))}
    files["text"].write_text("this is no image", encoding="utf-8")
    files["empty"].touch()
    whole = write_image(files["cut"]).read_bytes()
    files["cut"].write_bytes(whole[: len(whole) // 2])
    return files | {"missing": tmp_path / "missing.png"}


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder with five images and a file of another kind."""
    for seed, name in enumerate(("a.png", "b.jpg", "sub/c.webp", "sub/d.bmp", "e.png")):
        write_image(tmp_path / "photos" / name, seed)
    (tmp_path / "photos" / "notes.txt").touch()
    return tmp_path / "photos"


@pytest.fixture
def predict(model_folder):
    """Runs swinfast predict with the small model and returns its exit code."""

    def run(*arguments, model=model_folder) -> int:
        return main(["predict", *map(str, arguments), "--model", str(model), "--device", "cpu"])

    return run
