"""create_model: names, model folders, published weights (without a network)."""

import builtins
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import huggingface_hub.errors
import pytest
import torch
from helpers import random_images, randomise, small_model_args
from safetensors.torch import save_file

import swinfast
from swinfast.labels import imagenet_labels

ARGS = small_model_args(img_size=16, num_classes=1000)
NAME = "swinv2_cr_tiny_ns_224"

CLASSES = tuple(f"class {number}" for number in range(1000))


def answers(model, channels: int = 3, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(random_images(2, channels, *size))


@pytest.fixture
def trained():
    return randomise(swinfast.create_model(NAME, **ARGS), seed=1).eval()


@pytest.fixture
def hub(tmp_path, trained, monkeypatch):
    """The hub, with one file in it. Returns the list of what was asked for."""
    file = tmp_path / "model.safetensors"
    save_file(trained.state_dict(), file)
    asked = []

    def download(*args, **kwargs):
        asked.append((args, kwargs))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


@pytest.fixture
def folder(tmp_path, trained):
    """Writes a model folder with the given entries in its config.json and returns its path."""

    def write(model=trained, **entries):
        (tmp_path / "config.json").write_text(json.dumps(entries), encoding="utf-8")
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        return str(tmp_path)

    return write


def small(**overrides) -> dict:
    """Entries of a config.json for the small model."""
    args = {key: value for key, value in ARGS.items() if key not in ("img_size", "num_classes")}
    return {"architecture": NAME, "pretrained_cfg": {"input_size": [3, 16, 16]}, "model_args": args} | overrides


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "swinv2_cr_tiny",
            "unknown model 'swinv2_cr_tiny': name one of swinv2_cr_tiny_384, .*or a folder with a config",
        ),
        ("", "unknown model ''"),
        ("swinv2_cr_tiny_ns_224.in22k", "unknown tag 'in22k': swinv2_cr_tiny_ns_224 has 'sw_in1k'"),
    ],
    ids=["name", "empty name", "tag"],
)
def test_error_for_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        swinfast.create_model(name)


@pytest.mark.parametrize("name", [None, 3, ["swinv2_cr_tiny_224"]], ids=str)
def test_error_for_what_is_no_name(name):
    with pytest.raises(TypeError, match=f"name must be a string or a path, .*, got {re.escape(repr(name))}"):
        swinfast.create_model(name)


def test_error_for_a_path_without_a_model():
    with pytest.raises(ValueError, match="unknown model 'missing': name one of"):
        swinfast.create_model(Path("missing"))


def test_error_for_unknown_options(model_folder):
    for name in (NAME, str(model_folder)):
        with pytest.raises(TypeError, match="unexpected keyword argument 'windows'"):
            swinfast.create_model(name, windows=7)


def test_error_for_two_sources_of_weights():
    with pytest.raises(ValueError, match=r"pretrained=True and checkpoint_path='a\.pth' are two sources"):
        swinfast.create_model(NAME, pretrained=True, checkpoint_path="a.pth", device="meta")


def test_tag_and_training_mode():
    model = swinfast.create_model(f"{NAME}.sw_in1k", **ARGS)
    assert model.training
    assert model.pretrained_cfg["tag"] == "sw_in1k"


def test_pretrained(hub, trained):
    model = swinfast.create_model(NAME, pretrained=True, **ARGS)
    assert torch.equal(answers(model), answers(trained))
    assert hub == [((f"timm/{NAME}.sw_in1k", "model.safetensors"), {})]


def test_pretrained_with_other_classes(hub, trained):
    torch.manual_seed(0)
    model = swinfast.create_model(NAME, pretrained=True, **(ARGS | {"num_classes": 7}))
    assert answers(model).shape == (2, 7)
    state, expected = model.state_dict(), trained.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in state if not key.startswith("head.fc."))
    assert model.head.fc.weight.std() > 0


def test_pretrained_without_classifier(hub, trained):
    model = swinfast.create_model(NAME, pretrained=True, **(ARGS | {"num_classes": 0}))
    trained.reset_classifier(0)
    assert torch.equal(answers(model), answers(trained))


def test_pretrained_features(hub, trained):
    model = swinfast.create_model(NAME, pretrained=True, features_only=True, out_indices=(1,), **ARGS)
    with torch.no_grad():
        expected = trained.forward_features(random_images(2, 3, 16, 16))
    assert torch.equal(answers(model)[0], expected)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_pretrained_with_other_channels(hub, timm, trained, channels):
    model = swinfast.create_model(NAME, pretrained=True, in_chans=channels, **ARGS)
    expected = timm.models.adapt_input_conv(channels, trained.patch_embed.proj.weight.detach())
    torch.testing.assert_close(model.patch_embed.proj.weight.detach(), expected)
    assert torch.equal(model.head.fc.weight, trained.head.fc.weight)
    assert answers(model, channels).shape == (2, 1000)


def test_error_for_pretrained_that_does_not_fit(hub):
    with pytest.raises(swinfast.CheckpointError, match="wrong shape"):
        swinfast.create_model(NAME, pretrained=True, **(ARGS | {"embed_dim": 20}))


def test_error_for_pretrained_of_an_untrained_variant(hub):
    with pytest.raises(
        RuntimeError, match="no pretrained weights are published for swinv2_cr_tiny_224: use checkpoint"
    ):
        swinfast.create_model("swinv2_cr_tiny_224", pretrained=True, **ARGS)
    assert not hub


OFFLINE = [
    huggingface_hub.errors.LocalEntryNotFoundError("no network\nand a second line"),
    ConnectionError("refused"),
    OSError(28, "No space left on device"),
    TimeoutError(),
]


@pytest.mark.parametrize("error", OFFLINE, ids=lambda error: type(error).__name__)
def test_error_without_a_network(monkeypatch, error):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(RuntimeError) as raised:
        swinfast.create_model(NAME, pretrained=True, **ARGS)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"the weights of {NAME}.sw_in1k can't be downloaded from the Hugging Face hub")
    assert type(error).__name__ in message
    assert "name the file as checkpoint_path (--checkpoint on the command line)" in message
    assert raised.value.__cause__ is error


def test_error_without_a_network_for_real(tmp_path):
    code = f"import swinfast\nswinfast.create_model({NAME!r}, pretrained=True)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"RuntimeError: the weights of {NAME}.sw_in1k can't be downloaded")
    assert "checkpoint_path" in last


def test_error_without_huggingface_hub(monkeypatch):
    imported = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(RuntimeError, match=r"pip install 'swinfast\[hub\]'.* as checkpoint_path"):
        swinfast.create_model(NAME, pretrained=True, **ARGS)


def test_folder(folder, trained):
    path = folder(**small())
    model = swinfast.create_model(path)
    assert torch.equal(answers(model), answers(trained))
    assert model.img_size == (16, 16)
    assert model.num_classes == 1000
    config = model.pretrained_cfg
    assert config["input_size"] == (3, 16, 16)
    assert config["architecture"] == NAME
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["tag"] is config["hf_hub_id"] is None


@pytest.mark.parametrize("with_model_args", [False, True])
@pytest.mark.parametrize("name", [NAME, "swinv2_tiny_window16_256"])
def test_folder_as_timm_saves_one(tmp_path, timm, name, with_model_args):
    """What a fine-tuned timm model pushes to the hub."""
    args = ARGS | {"num_classes": 3, "in_chans": 1, "global_pool": "max", "window_size": (4, 2), "drop_path_rate": 0.1}
    if name != NAME:
        args |= {"act_layer": "gelu", "window_size": 16 if not with_model_args else (4, 2)}
    theirs = randomise(timm.create_model(name, **args), seed=2).eval()
    names = ["ant", "bee", "cat"]
    timm.models.save_for_hf(
        theirs,
        tmp_path,
        model_config={"label_names": names},
        model_args=args if with_model_args else None,
        safe_serialization=True,
    )
    model = swinfast.create_model(str(tmp_path))
    torch.testing.assert_close(answers(model, 1), answers(theirs, 1), rtol=1e-4, atol=1e-5)
    assert model.pretrained_cfg["label_names"] == names
    assert model.pretrained_cfg["num_classes"] == 3
    assert model.pretrained_cfg["mean"] == pytest.approx((0.449,))


def test_folder_with_other_sizes_in_its_config(folder):
    """Height and width, channels, classes and pooling of pretrained_cfg are the model's."""
    args = {"img_size": (16, 24), "in_chans": 1, "num_classes": 4, "global_pool": "catavgmax"}
    expected = randomise(swinfast.create_model(NAME, **(ARGS | args)), seed=3)
    config = {"input_size": [1, 16, 24], "num_classes": 4, "global_pool": "catavgmax", "mean": [0.5], "std": [0.5]}
    model = swinfast.create_model(folder(expected, **small(pretrained_cfg=config)))
    assert torch.equal(answers(model, 1, (16, 24)), answers(expected, 1, (16, 24)))
    assert model.pretrained_cfg["mean"] == (0.5,)


def test_folder_and_overrides(folder, trained):
    path = folder(**small(num_classes=1000))
    embedding = swinfast.create_model(path, num_classes=0)
    features = swinfast.create_model(path, features_only=True)
    other_windows = swinfast.create_model(path, window_size=2)
    trained.reset_classifier(0)
    assert torch.equal(answers(embedding), answers(trained))
    assert len(answers(features)) == 2
    assert other_windows.stages[0].blocks[0].window_size == (2, 2)


def test_folder_with_another_checkpoint(folder, tmp_path):
    path = folder(**small())
    other = randomise(swinfast.create_model(NAME, **ARGS), seed=4)
    torch.save(other.state_dict(), tmp_path / "last.pth")
    model = swinfast.create_model(path, checkpoint_path=tmp_path / "last.pth")
    assert torch.equal(answers(model), answers(other))


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "config.json is no JSON"),
        ("\udcff", "config.json is no JSON"),
        ("[1]", "config.json has architecture None, expected one of"),
        ('{"architecture": "resnet50"}', "has architecture 'resnet50', expected one of swinv2_cr_tiny_384"),
        ('{"architecture": ["a"]}', r"has architecture \['a'\]"),
        (json.dumps(small(pretrained_cfg=[1])), r"has pretrained_cfg \[1\], expected an object"),
        (json.dumps(small(model_args="x")), "has model_args 'x', expected an object"),
        (json.dumps(small(model_args={"drop_rate": 0.1, "b": 0, "a": 1})), "has unknown model_args: a, b"),
        (json.dumps(small(model_args={"act_layer": "relu"})), "has unknown model_args: act_layer"),
        (json.dumps(small(pretrained_cfg={"input_size": 16})), "has input_size 16, expected a list"),
        (json.dumps(small(pretrained_cfg={"input_size": []})), r"has input_size \[\], expected a list of three"),
        (json.dumps(small(pretrained_cfg={"mean": None})), "has mean None, expected a list of numbers"),
        (json.dumps(small(pretrained_cfg={"std": [1, 1, "1"]})), r"has std \[1, 1, '1'\], expected a list of numbers"),
        (json.dumps(small(pretrained_cfg={"crop_pct": 0})), "has crop_pct 0, expected a number above 0"),
        (json.dumps(small(pretrained_cfg={"interpolation": 3})), "has interpolation 3, expected a string"),
        (json.dumps(small(pretrained_cfg={"global_pool": None})), "has global_pool None, expected a string"),
        (json.dumps(small(num_classes="10")), "has num_classes '10', expected a whole number of at least 0"),
        (json.dumps(small(num_classes=None)), "has num_classes None, expected a whole number of at least 0"),
        (json.dumps(small(num_classes=True)), "has num_classes True, expected a whole number of at least 0"),
        (json.dumps(small(num_classes=-1)), "has num_classes -1, expected a whole number of at least 0"),
        (json.dumps(small(model_args={"num_classes": [3]})), r"has num_classes \[3\], expected a whole number"),
        (json.dumps(small(label_names=list(range(1000)))), r"label_names \[0, .* \.\.\.\], expected a list of str"),
        (json.dumps(small(label_names="cat")), "has label_names 'cat', expected a list of strings"),
        (json.dumps(small(label_names=7)), "has label_names 7, expected a list of strings"),
        (json.dumps(small(model_args={"depths": 2})), "has model_args that make no model: depths must be whole"),
        (json.dumps(small(model_args={"patch_size": None})), "has model_args that make no model: .*None"),
        (json.dumps(small(model_args={"img_size": [32]})), "has model_args that make no model: .*image size"),
        (json.dumps(small(model_args={"patch_size": 0})), "has model_args that make no model: .*zero"),
        (json.dumps(small(model_args={"embed_dim": -4})), "has model_args that make no model: .*negative"),
        (json.dumps(small(model_args={"global_pool": "x"})), "has model_args that make no model: global_pool"),
        (json.dumps(small(pretrained_cfg={"mean": [10**400] * 3})), "has mean .10.*, expected a list of numbers"),
        (json.dumps(small(pretrained_cfg={"crop_pct": 10**400})), "has crop_pct 10.*, expected a number above 0"),
        (json.dumps(small(pretrained_cfg={"std": [math.nan] * 3})), r"has std \[nan, .*, expected a list of numbers"),
        (json.dumps(small(num_classes=10**20)), "has num_classes 10*, expected a whole number"),
    ],
    ids=[
        "JSON", "encoding", "list", "architecture", "architecture's type", "pretrained_cfg", "model_args",
        "unknown model_args", "another activation", "input_size", "empty input_size", "mean", "std", "crop_pct",
        "interpolation",
        "global_pool", "num_classes", "no num_classes", "num_classes of true", "negative num_classes",
        "num_classes in model_args", "label_names", "label_names in one", "label_names of another type", "depths",
        "patch_size", "img_size", "patch_size of 0", "negative embed_dim", "global_pool in model_args",
        "large mean", "large crop_pct", "std that is no number", "large num_classes",
    ],
)  # fmt: skip
def test_error_for_wrong_config(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message) as error:
        swinfast.create_model(str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path / 'config.json'} ")


@pytest.mark.parametrize(
    "names, labels",
    [
        (None, imagenet_labels()),
        ({"0": "ant", "7": "bee"}, ("ant", *map(str, range(1, 7)), "bee", *map(str, range(8, 1000)))),
        ({str(number): name for number, name in reversed([*enumerate(CLASSES)])}, CLASSES),
    ],
    ids=["none", "some by number", "all by number"],
)
def test_folder_with_other_label_names(folder, trained, names, labels):
    model = swinfast.create_model(folder(**small(label_names=names)))
    assert torch.equal(answers(model), answers(trained))
    assert swinfast.Predictor(model, device="cpu", workers=0).labels == labels


def test_error_for_a_folder_without_config(tmp_path):
    with pytest.raises(ValueError, match="unknown model"):
        swinfast.create_model(str(tmp_path))


def test_error_for_a_folder_without_weights(folder, tmp_path):
    path = folder(**small())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file at .*model\.safetensors"):
        swinfast.create_model(path)


def test_sizes_are_checked_where_python_leaves_assertions_out():
    code = """
import torch, swinfast
model = swinfast.create_model("swinv2_cr_tiny_ns_224", img_size=32, window_size=1, depths=(1, 1, 1, 1)).eval()
for one in (model, swinfast.optimize(model)):
    try:
        one(torch.zeros(1, 3, 48, 32))
    except AssertionError as error:
        print(error)
for wrong in ({"window_size": (1, 1, 1, 1, 1)}, {"window_size": -1}):
    try:
        swinfast.create_model("swinv2_cr_tiny_ns_224", img_size=32, **wrong)
    except AssertionError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True)
    first, second, *others = done.stdout.splitlines()
    assert first == second == "Input image height (48) doesn't match model (32)."
    assert len(others) == 2
