"""load_checkpoint and create_model(checkpoint_path=...): formats, old names, misfits and damaged files."""

import argparse
import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import random_images, randomise, small_model_args
from PIL import Image
from safetensors.torch import save, save_file
from torch import nn

import swinfast
from swinfast.checkpoints import load_state, read_checkpoint

ARGS = small_model_args(img_size=16)
NAME = "swinv2_cr_tiny_224"


def make(seed: int | None = None, **overrides):
    model = swinfast.create_model(NAME, **(ARGS | overrides)).eval()
    return model if seed is None else randomise(model, seed)


@pytest.fixture
def trained():
    return make(seed=1)


def answers(model) -> torch.Tensor:
    with torch.no_grad():
        return model(random_images(2, 3, 16, 16))


def old_names(state: dict) -> dict:
    """A state_dict as training scripts before logit_scale and head.fc wrote it."""
    old = {}
    for key, value in state.items():
        if key.endswith("logit_scale"):
            key, value = key.replace("logit_scale", "tau"), 1 / value.exp()
        old[key.replace("head.fc.", "head.")] = value
    return old


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + key: value for key, value in state.items()}


FORMS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "arch": NAME},
    "model": lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "state_dict in model": lambda state: {"model": {"state_dict": state}},
    "module.": lambda state: prefixed(state, "module."),
    "_orig_mod.": lambda state: {"state_dict": prefixed(state, "_orig_mod.")},
    "module._orig_mod.": lambda state: prefixed(state, "module._orig_mod."),
    "_orig_mod.module.": lambda state: prefixed(state, "_orig_mod.module."),
    "module.module._orig_mod.module.": lambda state: prefixed(state, "module.module._orig_mod.module."),
    "timm's training": lambda state: {
        "epoch": 3,
        "arch": NAME,
        "state_dict": state,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]},
        "version": 2,
        "args": argparse.Namespace(model=NAME, lr=0.1, opt_betas=None, mean=[0.5], model_kwargs={}),
        "metric": 71.5,
    },
    "parameters": lambda state: {key: torch.nn.Parameter(value) for key, value in state.items()},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_pytorch_file(tmp_path, trained, form, legacy):
    file = tmp_path / "weights.pth"
    torch.save(form(trained.state_dict()), file, _use_new_zipfile_serialization=not legacy)
    model = make()
    assert not torch.equal(answers(model), answers(trained))
    swinfast.load_checkpoint(model, file)
    assert torch.equal(answers(model), answers(trained))
    assert torch.equal(answers(make(checkpoint_path=str(file))), answers(trained))


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights"])
def test_safetensors_file_of_any_name(tmp_path, trained, name):
    save_file(trained.state_dict(), tmp_path / name)
    assert torch.equal(answers(make(checkpoint_path=tmp_path / name)), answers(trained))


def test_safetensors_file_with_prefix(tmp_path, trained):
    save_file(prefixed(trained.state_dict(), "module."), tmp_path / "weights.safetensors")
    assert torch.equal(answers(make(checkpoint_path=tmp_path / "weights.safetensors")), answers(trained))


@pytest.mark.parametrize("ema", ["state_dict_ema", "model_ema"])
def test_averaged_weights_come_first(tmp_path, trained, ema):
    raw = make(seed=2).state_dict()
    torch.save({"state_dict": raw, "model": raw, ema: prefixed(trained.state_dict(), "module.")}, tmp_path / "last.pth")
    assert torch.equal(answers(make(checkpoint_path=tmp_path / "last.pth")), answers(trained))


@pytest.mark.parametrize("form", [FORMS["bare"], FORMS["model"], FORMS["module."]], ids=["bare", "model", "module."])
def test_old_names(tmp_path, timm, trained, form):
    old = old_names(trained.state_dict())
    assert "stages.0.blocks.0.attn.tau" in old
    assert "head.weight" in old
    torch.save(form(old), tmp_path / "old.pth")
    model = make(checkpoint_path=tmp_path / "old.pth")
    torch.testing.assert_close(answers(model), answers(trained), rtol=1e-4, atol=1e-5)
    expected = timm.models.swin_transformer_v2_cr.checkpoint_filter_fn(old, model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_loading_into_timms_model(tmp_path, timm, trained):
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    model = timm.create_model(NAME, **ARGS).eval()
    swinfast.load_checkpoint(model, tmp_path / "weights.safetensors")
    torch.testing.assert_close(answers(model), answers(trained), rtol=1e-4, atol=1e-5)


def test_loading_into_an_optimized_model(tmp_path, trained):
    """The fused computation sees the new weights."""
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    fast = swinfast.optimize(make(seed=2))
    answers(fast)
    swinfast.load_checkpoint(fast, tmp_path / "weights.safetensors")
    torch.testing.assert_close(answers(fast), answers(trained), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_model_keeps_its_dtype(tmp_path, trained, dtype):
    save_file({key: value.to(dtype) for key, value in trained.state_dict().items()}, tmp_path / "weights.safetensors")
    model = make(checkpoint_path=tmp_path / "weights.safetensors")
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.head.fc.weight, trained.head.fc.weight.to(dtype).float())


def test_model_on_the_meta_device(tmp_path, trained):
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    model = make(checkpoint_path=tmp_path / "weights.safetensors", device="meta")
    assert torch.equal(answers(model), answers(trained))


def test_misfit_names_all_and_changes_nothing(tmp_path, trained):
    state = trained.state_dict()
    del state["patch_embed.norm.bias"], state["stages.1.blocks.0.attn.logit_scale"]
    state |= {"extra.weight": torch.ones(1), "stages.9.foo": torch.ones(1)}
    state["head.fc.weight"] = torch.ones(11, 32)
    state["head.fc.bias"] = torch.ones(11)
    file = tmp_path / "weights.safetensors"
    save_file(state, file)
    model = make(seed=2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(swinfast.CheckpointError) as error:
        swinfast.load_checkpoint(model, file)
    assert str(error.value).splitlines() == [
        f"{file} does not fit SwinTransformerV2Cr:",
        "  missing (2): patch_embed.norm.bias, stages.1.blocks.0.attn.logit_scale",
        "  unexpected (2): extra.weight, stages.9.foo",
        "  wrong shape (2): head.fc.weight is (11, 32), expected (10, 32), head.fc.bias is (11,), expected (10,)",
    ]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


KINDS = {
    "sparse": (torch.Tensor.to_sparse, "torch.sparse_coo"),
    "int8": (torch.Tensor.char, "torch.int8"),
    "bool": (torch.Tensor.bool, "torch.bool"),
    "complex": (lambda value: value.to(torch.complex64), "torch.complex64"),
    "meta": (lambda value: value.to("meta"), "without values, on meta"),
}


@pytest.mark.parametrize("change, said", KINDS.values(), ids=KINDS)
def test_weights_of_another_kind(tmp_path, trained, change, said):
    """They are refused, and the model is as it was."""
    state = trained.state_dict()
    state["head.fc.weight"] = change(state["head.fc.weight"])
    torch.save(state, tmp_path / "weights.pth")
    model = make(seed=2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(swinfast.CheckpointError, match=rf"\n  no plain numbers \(1\): head.fc.weight is {said}$"):
        swinfast.load_checkpoint(model, tmp_path / "weights.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_a_program_lets_in_stays_so(tmp_path, trained):
    """Pickled classes are let in for the whole process: for a moment, one thread at a time."""
    file = tmp_path / "last.pth.tar"
    torch.save({"state_dict": trained.state_dict(), "args": argparse.Namespace(lr=1)}, file)
    with ThreadPoolExecutor(4) as pool:
        for state in pool.map(read_checkpoint, [file] * 40):
            assert state.keys() == trained.state_dict().keys()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([argparse.Namespace]):
        read_checkpoint(file)
        assert argparse.Namespace in torch.serialization.get_safe_globals()


def test_whole_numbers_where_the_model_has_them(tmp_path):
    """A count of batches, for example."""
    model, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    model.num_batches_tracked += 3
    load_state(other, model.state_dict(), "a file")
    assert other.num_batches_tracked == 3


def test_old_weights_of_another_kind(tmp_path):
    state = {"attn.tau": torch.ones(2, 1, 1).to_sparse(), "head.weight": torch.ones(2, 2)}
    torch.save(state, tmp_path / "old.pth")
    with pytest.raises(swinfast.CheckpointError, match="does not fit"):
        swinfast.load_checkpoint(make(), tmp_path / "old.pth")


class Creates:
    """Unpickled in full, it would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_python_objects_are_not_run(tmp_path, trained):
    trap = tmp_path / "trap"
    for name, content in (
        ("plain.pth", Creates(trap)),
        ("nested.pth", trained.state_dict() | {"x": Creates(trap)}),
        ("arguments.pth", {"state_dict": trained.state_dict(), "args": argparse.Namespace(x=Creates(trap))}),
    ):
        torch.save(content, tmp_path / name)
        (tmp_path / f"pickle_{name}").write_bytes(pickle.dumps(content, protocol=2))
        for file in (tmp_path / name, tmp_path / f"pickle_{name}"):
            with pytest.raises(swinfast.CheckpointError, match="holds Python objects"):
                swinfast.load_checkpoint(make(), file)
    assert not trap.exists()
    pickle.loads((tmp_path / "pickle_plain.pth").read_bytes())
    assert trap.exists(), "the trap works"


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "JPEG")
    return file.getvalue()


def torch_file(content, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def within_itself() -> dict:
    content = {}
    content["model"] = {"state_dict": content}
    return content


STATE = {"head.fc.weight": torch.ones(10, 32), "head.fc.bias": torch.ones(10)}
DAMAGED = {
    "empty.pth": b"",
    "empty.safetensors": b"",
    "short.safetensors": save(STATE)[:5],
    "header.safetensors": save(STATE)[:60],
    "tensors.safetensors": save(STATE)[:-100],
    "tensors_safetensors.pth": save(STATE)[:-100],
    "text.pth": b"This is no checkpoint.\n",
    "text.safetensors": b"This is no checkpoint.\n",
    "image.pth": jpeg(),
    "image.safetensors": jpeg(),
    "half.pth": torch_file(STATE)[:1000],
    "tail.pth": torch_file(STATE)[:-30],
    "legacy_1.pth": torch_file(STATE, legacy=True)[:1],
    "legacy_half.pth": torch_file(STATE, legacy=True)[:200],
    "legacy_tail.pth": torch_file(STATE, legacy=True)[:-10],
    "list.pth": torch_file([torch.ones(2)]),
    "number.pth": torch_file(7),
    "no_tensors.pth": torch_file({"epoch": 3, "lr": 0.1}),
    "empty_dict.pth": torch_file({}),
    "numbers_as_keys.pth": torch_file({1: torch.ones(2)}),
    "within_itself.pth": torch_file(within_itself()),
    "only_prefixes.pth": torch_file({"module.": torch.ones(2)}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(DAMAGED[name])
    model = make(seed=2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(swinfast.CheckpointError) as error:
        swinfast.load_checkpoint(model, file)
    assert str(file) in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_file_cut_anywhere(tmp_path, legacy):
    content = torch_file(STATE, legacy)
    file = tmp_path / "cut.pth"
    for length in range(0, len(content) - 1, 7):
        file.write_bytes(content[:length])
        with pytest.raises(swinfast.CheckpointError):
            swinfast.load_checkpoint(make_tiny_head(), file)


def make_tiny_head() -> torch.nn.Module:
    head = torch.nn.Module()
    head.head = torch.nn.Module()
    head.head.fc = torch.nn.Linear(32, 10)
    return head


def test_missing_file(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="no checkpoint file at"):
            swinfast.load_checkpoint(make(), path)


def test_with_classifier(tmp_path, trained):
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(swinfast.CheckpointError, match="missing"):
        swinfast.load_checkpoint(make(), tmp_path / "weights.safetensors", with_classifier=False)
    embedding = make(num_classes=0)
    with pytest.raises(swinfast.CheckpointError, match="unexpected"):
        swinfast.load_checkpoint(embedding, tmp_path / "weights.safetensors")
    swinfast.load_checkpoint(embedding, tmp_path / "weights.safetensors", with_classifier=False)


@pytest.mark.parametrize("old", [False, True], ids=["today's names", "old names"])
def test_embedding_from_a_classifiers_checkpoint(tmp_path, trained, old):
    state = trained.state_dict()
    torch.save(old_names(state) if old else state, tmp_path / "weights.pth")
    model = make(checkpoint_path=tmp_path / "weights.pth", num_classes=0)
    trained.reset_classifier(0)
    torch.testing.assert_close(answers(model), answers(trained), rtol=1e-4, atol=1e-5)


def test_features_from_a_classifiers_checkpoint(tmp_path, trained):
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    model = make(checkpoint_path=tmp_path / "weights.safetensors", features_only=True, num_classes=3)
    images = random_images(2, 3, 16, 16)
    with torch.no_grad():
        expected = trained.forward_intermediates(images, intermediates_only=True)
        for got, feature in zip(model(images), expected, strict=True):
            assert torch.equal(got, feature)
