"""The small trained model in examples/digits: that it is what its README says, and answers the same however it runs."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import swinfast
from bench.peers import import_timm

FOLDER = Path(__file__).parents[1] / "examples" / "digits"
PICTURES = sorted((FOLDER / "images").glob("*.png"))
LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return swinfast.create_model(str(FOLDER)).eval()


@pytest.fixture(scope="module")
def optimised(model: nn.Module) -> nn.Module:
    return swinfast.optimize(model)


@pytest.fixture(scope="module")
def train() -> ModuleType:
    """The training script as a module; it lies in no package."""
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("digits_train", FOLDER / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures(model: nn.Module) -> Tensor:
    """The shipped pictures, prepared for the model."""
    transform = swinfast.transform_of(model)
    return torch.stack([transform.load(file) for file in PICTURES])


def test_model_is_small(model: nn.Module) -> None:
    assert 150_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 450_000
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert (FOLDER / "model.safetensors").stat().st_size < 2_000_000


def test_every_stage_has_a_shifted_window(model: nn.Module) -> None:
    assert len(model.stages) >= 2
    for stage in model.stages:
        assert stage.blocks[0].shift_size == (0, 0)
        assert stage.blocks[1].shift_size != (0, 0)


def test_config_says_what_the_classes_are(model: nn.Module) -> None:
    assert model.num_classes == 10
    assert tuple(model.pretrained_cfg["label_names"]) == LABELS


@pytest.mark.parametrize("which", ["model", "optimised"])
def test_held_out_accuracy(train: ModuleType, request: pytest.FixtureRequest, which: str) -> None:
    correct, total = train.evaluate(request.getfixturevalue(which))
    assert total == 450
    assert correct / total >= 0.97


def test_plain_and_optimised_agree(train: ModuleType, model: nn.Module, optimised: nn.Module) -> None:
    inputs, _ = train.prepare(model, train.split()[1])
    assert torch.equal(train.classify(model, inputs), train.classify(optimised, inputs))


def test_no_held_out_digit_is_trained_on(train: ModuleType) -> None:
    trained, held_out = train.split()
    assert sorted([*trained.indices, *held_out.indices]) == list(range(1797))


def test_pictures_are_held_out_digits(train: ModuleType) -> None:
    expected = dict(train.pictured(train.split()[1]))
    assert [file.name for file in PICTURES] == sorted(expected)
    for file in PICTURES:
        with Image.open(file) as image:
            assert image.tobytes() == train.picture(expected[file.name]).tobytes()


def test_pictures_are_predicted_as_their_names_say(model: nn.Module) -> None:
    labels = [file.name.partition("_")[0] for file in PICTURES]
    assert set(labels) == set(LABELS)
    predictions = swinfast.Predictor(model, device="cpu", topk=1).predict(PICTURES)
    right = [prediction.labels[0] == label for prediction, label in zip(predictions, labels, strict=True)]
    assert sum(right) / len(right) >= 0.9


def test_timm_loads_the_folder_and_gives_the_same_logits(model: nn.Module, pictures: Tensor) -> None:
    timm = import_timm()
    peer = timm.create_model(f"local-dir:{FOLDER}", pretrained=True).eval()
    with torch.inference_mode():
        expected, logits = peer(pictures), model(pictures)
    assert (logits - expected).norm() / expected.norm() <= 1e-5


def test_timm_prepares_the_pictures_alike(model: nn.Module, pictures: Tensor) -> None:
    timm = import_timm()
    peer = timm.create_model(f"local-dir:{FOLDER}")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(peer))
    for file, prepared in zip(PICTURES, pictures, strict=True):
        with Image.open(file) as image:
            torch.testing.assert_close(prepared, transform(image.convert("RGB")))


def test_evaluate_option_prints_the_score(train: ModuleType, capsys: pytest.CaptureFixture) -> None:
    train.main(["--evaluate"])
    assert re.fullmatch(r"held-out accuracy: 4\d\d/450 = 9\d\.\d%\n", capsys.readouterr().out)


@pytest.mark.slow
def test_training_again(tmp_path: Path) -> None:
    """In a process of its own: training sets PyTorch's determinism and threads for all of the process."""
    pytest.importorskip("sklearn")
    command = [sys.executable, FOLDER / "train.py", "--epochs", "1", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "held-out accuracy: " in done.stdout
    assert (tmp_path / "config.json").read_text() == (FOLDER / "config.json").read_text()
    assert len(list((tmp_path / "images").glob("*.png"))) == len(PICTURES)
    assert swinfast.create_model(str(tmp_path)).num_classes == 10
