"""Where Triton fails, at compiling or at its own self-check, another backend answers, and the report says so."""

import copy
import re
import threading
import warnings

import pytest
import torch
from helpers import SMALL, make, random_images, relative_rms

import swinfast
from swinfast import graphs, triton_backend
from swinfast import self_check as self_check_module

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = SMALL | {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "num_heads": (1, 2)}
IMAGES = random_images(2, 3, 16, 16)
pytestmark = [pytest.mark.filterwarnings("default:Triton failed:UserWarning")]
if DEVICE.type == "cuda":
    pytestmark.append(pytest.mark.gpu)


@pytest.fixture
def model(timm):
    return make(timm, TINY, "timm").to(DEVICE).requires_grad_(False)


@pytest.fixture
def auto(monkeypatch):
    """ "auto" takes Triton also in its interpreter."""
    monkeypatch.setattr("swinfast.backends.PREFER_TRITON", ("cuda", "cpu"))


def failing(monkeypatch, error, only=lambda spec: True):
    """The Triton stage raises; returns how often."""
    calls, stage = [], triton_backend.stage

    def fail(spec, tables, x):
        if not only(spec):
            return stage(spec, tables, x)
        calls.append(x)
        raise error

    monkeypatch.setattr(triton_backend, "stage", fail)
    return calls


def details(fast):
    return [row.detail for row in swinfast.report(fast).rows if "blocks" in row.name]


@pytest.mark.parametrize("error", [RuntimeError("no C compiler\nfound"), KeyError("sm_42"), OSError()], ids=repr)
def test_auto_falls_back_to_pytorch(model, auto, monkeypatch, error):
    calls = failing(monkeypatch, error)
    fast = swinfast.optimize(model)
    with pytest.warns(UserWarning, match="Triton failed, so a stage is computed without it from now on: ") as warned:
        assert relative_rms(fast(IMAGES.to(DEVICE)), model(IMAGES.to(DEVICE))) <= 1e-5
    together = int(DEVICE.type == "cuda")  # where stages run as one, which says nothing of the one to blame
    assert len(warned) == len(calls) - together == 2  # once a stage
    for either in (model, fast):  # and never again, also with other weights
        layer = either.stages[1].blocks[0].mlp.fc1
        layer.weight = torch.nn.Parameter(layer.weight * 1.1, requires_grad=False)
    assert relative_rms(fast(IMAGES.to(DEVICE)), model(IMAGES.to(DEVICE))) <= 1e-5
    assert len(calls) - together == 2
    first_line = {"RuntimeError": "RuntimeError: no C compiler", "KeyError": "KeyError: 'sm_42'", "OSError": "OSError"}
    expected = f"(not Triton: {first_line[type(error).__name__]})"
    assert all(detail.startswith("PyTorch") and detail.endswith(expected) for detail in details(fast))


def test_a_forced_backend_falls_back_to_the_original(model, monkeypatch):
    failing(monkeypatch, RuntimeError("ptxas"))
    fast = swinfast.optimize(model, backend="triton")
    with pytest.warns(UserWarning, match="Triton failed"):
        assert torch.equal(
            fast.stages(model.patch_embed(IMAGES.to(DEVICE))), model.stages(model.patch_embed(IMAGES.to(DEVICE)))
        )
    rows = [row for row in swinfast.report(fast).rows if "blocks" in row.name]
    assert all(not row.replaced and row.detail == "RuntimeError: ptxas" for row in rows)


def test_the_original_takes_images_of_another_dtype(model, monkeypatch):
    def fail(*args):
        raise RuntimeError("ptxas")

    monkeypatch.setattr(triton_backend, "patch_embed", fail)
    fast, half = swinfast.optimize(model, backend="triton"), IMAGES.to(DEVICE, torch.float16)
    with pytest.warns(UserWarning, match="Triton failed"):
        expected = model.patch_embed(half.float())
        assert torch.equal(fast.patch_embed(half), expected)
    assert torch.equal(fast.patch_embed(half), expected)


def test_one_stage_alone(model, auto, monkeypatch):
    failing(monkeypatch, RuntimeError("shared memory"), only=lambda spec: spec.merge is None)
    fast = swinfast.optimize(model)
    with pytest.warns(UserWarning, match="Triton failed") as warned:
        assert relative_rms(fast(IMAGES.to(DEVICE)), model(IMAGES.to(DEVICE))) <= 1e-5
    assert len(warned) == 1
    assert [detail.partition(",")[0] for detail in details(fast)] == ["PyTorch"] * 2 + ["Triton"] * 2


def test_in_grad_mode(model, auto, monkeypatch):
    failing(monkeypatch, RuntimeError("ptxas"))
    results = []
    for either in (model, swinfast.optimize(model)):
        x = IMAGES.to(DEVICE, copy=True).requires_grad_()
        results.append(torch.autograd.grad(either(x).square().sum(), x)[0])
    assert relative_rms(results[1], results[0]) <= 1e-4


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("no room"),
    RuntimeError("Triton Error [CUDA]: out of memory"),  # while a kernel is loaded
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_out_of_memory_is_the_callers(model, auto, monkeypatch, error):
    failing(monkeypatch, error)
    fast = swinfast.optimize(model)
    with pytest.raises(torch.OutOfMemoryError, match=re.escape(str(error))):
        fast(IMAGES.to(DEVICE))
    assert all(detail.startswith("Triton, ") for detail in details(fast))


def test_stages_at_once(model, auto, monkeypatch):
    """What they run as on a GPU where no graph does: the answer, the warning and the report of one by one."""
    fast = swinfast.optimize(model)
    stages, x = fast.stages, model.patch_embed(IMAGES.to(DEVICE))
    calls = failing(monkeypatch, RuntimeError("shared memory"), only=lambda spec: False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_rms(stages._at_once(stages.plan(), x), model.stages(x)) <= 1e-5
    calls = failing(monkeypatch, RuntimeError("shared memory"), only=lambda spec: spec.merge is not None)
    with torch.no_grad(), pytest.warns(UserWarning, match="Triton failed, so a stage") as warned:
        assert relative_rms(stages._at_once(stages.plan(), x), model.stages(x)) <= 1e-5
    assert len(warned) == 1 and len(calls) == 2
    assert [detail.partition(",")[0] for detail in details(fast)] == ["Triton"] * 2 + ["PyTorch"] * 2
    with torch.no_grad():
        assert relative_rms(stages._at_once(stages.plan(), x), model.stages(x)) <= 1e-5
    assert len(calls) == 2  # never again


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_out_of_memory_at_once_is_the_callers(model, auto, monkeypatch, error):
    calls = failing(monkeypatch, error)
    stages = swinfast.optimize(model).stages
    with pytest.raises(torch.OutOfMemoryError):
        stages._at_once(stages.plan(), model.patch_embed(IMAGES.to(DEVICE)))
    assert len(calls) == 1


def test_wrong_input_is_no_failure_of_triton(model, auto):
    fast = swinfast.optimize(model)
    wrong = torch.zeros(1, 5, 8, 8, device=DEVICE)
    with pytest.raises(RuntimeError):
        model.stages[0](wrong)
    with pytest.raises(RuntimeError):
        fast.stages[0](wrong)
    assert all(detail.startswith("Triton, ") for detail in details(fast))


def test_refresh_and_copies_try_again(model, auto, monkeypatch):
    with monkeypatch.context() as patch:
        failing(patch, RuntimeError("a full disk"))
        fast = swinfast.optimize(model)
        fast(IMAGES.to(DEVICE))
    assert details(fast)[0].startswith("PyTorch")
    assert details(copy.deepcopy(fast))[0].startswith("Triton")
    swinfast.refresh(fast)
    assert details(fast)[0].startswith("Triton")


@pytest.fixture
def self_check(monkeypatch):
    monkeypatch.setenv("SWINFAST_SELF_CHECK", "1")


def test_a_self_check_that_passes(model, auto, self_check, captures):
    fast = swinfast.optimize(model, cuda_graphs=True)
    seen = []
    fast.stages[0].register_forward_hook(lambda module, args, output: seen.append(output))
    for _ in range(3):
        fast(IMAGES.to(DEVICE))
    assert all(detail.startswith("Triton, ") for detail in details(fast))
    assert len(seen) == 3  # the check's own calls call no hooks
    assert captures.captured == 2  # once a stage, of what was checked


@pytest.mark.parametrize("checked", [True, False])
def test_a_self_check_that_fails(model, auto, monkeypatch, checked):
    monkeypatch.setenv("SWINFAST_SELF_CHECK", "1" if checked else "0")
    stage = triton_backend.stage
    monkeypatch.setattr(triton_backend, "stage", lambda *args: stage(*args) * 1.001)
    fast = swinfast.optimize(model)
    error = relative_rms(fast(IMAGES.to(DEVICE)), model(IMAGES.to(DEVICE)))
    assert (error <= 1e-5) == checked
    expected = "self-check: relative RMS error" if checked else "Triton, "
    assert all(expected in detail for detail in details(fast))


def test_a_self_check_waits_for_something_finite(model, auto, monkeypatch, self_check, captures):
    """An answer that can't be judged does not use it up, and no graph is made of what is not checked."""
    stage, images = triton_backend.stage, IMAGES.to(DEVICE)
    monkeypatch.setattr(triton_backend, "stage", lambda *args: stage(*args) * 1.001)
    fast = swinfast.optimize(model, cuda_graphs=True)
    spoilt = images.clone()
    spoilt[:, 0, 0, 0] = torch.nan  # which the blocks spread over the whole map
    for nothing in (images * torch.nan, spoilt, spoilt, images[:0]):
        assert fast(nothing).isnan().all()
        fast.stages[0](model.patch_embed(nothing * torch.nan))
    assert all(detail.startswith("Triton, ") for detail in details(fast))
    assert captures.captured == 0
    with monkeypatch.context() as patch:  # nor is what only a capture has recorded
        patch.setattr(graphs, "is_capturing", lambda device: True)
        fast(images)
    assert all(detail.startswith("Triton, ") for detail in details(fast))
    half = images.clone()
    half[0] = torch.nan
    assert relative_rms(fast(half)[1], model(half)[1]) <= 1e-5
    assert all("self-check: relative RMS error" in detail for detail in details(fast))


def test_no_self_check_of_what_can_not_be_copied(model, auto, self_check):
    """That is no fault of Triton's."""
    fast, images = swinfast.optimize(model), IMAGES.to(DEVICE)
    for stage in fast.stages:
        stage.lock = threading.Lock()
    with pytest.warns(UserWarning, match="no self-check of a module that can't be copied: TypeError: .*lock"):
        assert relative_rms(fast(images), model(images)) <= 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(images)
    assert all(detail.startswith("Triton, ") for detail in details(fast))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1, 1.1], ids=["right", "wrong"])
def test_a_self_check_under_autocast(model, auto, monkeypatch, self_check, dtype, factor):
    """It is of the products that are computed, and by their rounding."""
    stage = triton_backend.stage

    def in_16_bits(spec, tables, x):
        return stage(spec, tables, x) * (factor if tables.blocks[0].qkv.weight.dtype == dtype else 1)

    monkeypatch.setattr(triton_backend, "stage", in_16_bits)
    fast = swinfast.optimize(model)
    with torch.autocast(DEVICE.type, dtype):
        fast(IMAGES.to(DEVICE))
    assert all(("self-check" in detail) == (factor != 1) for detail in details(fast))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_a_self_check_under_autocast_waits_where_the_plain_model_overflows(model, auto, self_check):
    """That is no fault of Triton's; the next answer is checked."""
    fast = swinfast.optimize(model)
    images = IMAGES.to(DEVICE)
    for either in (model, fast):
        for stage in either.stages:
            for block in stage.blocks:
                block.mlp.fc1.weight.data.mul_(3e5)
    swinfast.refresh(fast)
    with torch.autocast(DEVICE.type, torch.float16):
        assert not model(images).isfinite().all()
        assert not fast(images).isfinite().all()
    assert all(detail.startswith("Triton, ") for detail in details(fast))
    assert all(stage._swinfast.unchecked for stage in fast.stages)


def test_a_self_check_without_memory_is_made_up_for(model, auto, monkeypatch, self_check):
    fast = swinfast.optimize(model)
    stage = triton_backend.stage
    monkeypatch.setattr(triton_backend, "stage", lambda *args: stage(*args) * 1.001)
    with monkeypatch.context() as patch:

        def out_of_memory(*args):
            raise torch.OutOfMemoryError("no memory for a copy in float64")

        patch.setattr(self_check_module, "verify", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            fast(IMAGES.to(DEVICE))
    assert relative_rms(fast(IMAGES.to(DEVICE)), model(IMAGES.to(DEVICE))) <= 1e-5
    assert all("self-check: relative RMS error" in detail for detail in details(fast)[-2:])


def test_a_self_check_of_the_patch_embedding(model, auto, monkeypatch, self_check):
    embed = triton_backend.patch_embed
    monkeypatch.setattr(triton_backend, "patch_embed", lambda *args: embed(*args) + 1e-3)
    fast = swinfast.optimize(model)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, device=DEVICE)
    mean, std = (torch.tensor(model.pretrained_cfg[key], device=DEVICE)[:, None, None] for key in ("mean", "std"))
    assert relative_rms(fast(pixels), model((pixels / 255 - mean) / std)) <= 1e-5
    assert "self-check" in swinfast.report(fast).rows[0].detail
