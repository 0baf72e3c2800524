"""verify passes what is right and fails every kernel that is wrong in a way a kernel can be."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import random_images, randomise, small_model_args
from torch import nn

import swinfast
from swinfast import cpu_attention, torch_backend
from swinfast.verify import _nudge

IMAGES = random_images(4, 3, 64, 64)


@pytest.fixture
def model(timm):
    """With logit scales near the clamp in some heads, so that a wrong mask, scale or clamp changes the answer."""
    return randomise(timm.create_model("swinv2_cr_tiny_224", **small_model_args(extra_norm_stage=True))).eval()


def replace_tables(**changes):
    """A mutant that derives wrong tables: each change maps a block's table of that name."""

    def mutate(monkeypatch):
        original = torch_backend._derive_block

        def derive(block, dtype, pack, in_place):
            tables = original(block, dtype, pack, in_place=False)  # with the bias in a table of its own
            tables = tables._replace(**{key: change(getattr(tables, key), block) for key, change in changes.items()})
            return tables._replace(exponents=cpu_attention.exponent_table(tables.bias, tables.scale[0]))

        monkeypatch.setattr(torch_backend, "_derive_block", derive)

    return mutate


def replace_function(name, make):
    """A mutant with another function in the backend."""

    def mutate(monkeypatch):
        monkeypatch.setattr(torch_backend, name, make(getattr(torch_backend, name)))

    return mutate


def unclamped(scale, block):
    exact = block.logit_scale_owner.logit_scale.exp()
    return torch.stack([exact, torch.ones_like(exact)])[:, :, None, None]


def without_norm(attention):
    """Attention whose q and k are taken as they are: a vector_norm of one."""

    def attend(*arguments):
        norm = torch.linalg.vector_norm
        torch.linalg.vector_norm = lambda x, **keywords: torch.ones_like(x[..., :1])
        try:
            return attention(*arguments)
        finally:
            torch.linalg.vector_norm = norm

    return attend


def tanh_gelu(linear, block):
    return lambda x: F.gelu(F.linear(x, block.fc1.weight, block.fc1.bias), approximate="tanh")


def swapped_merging(merge):
    def index(size, order, device):
        return merge(size, order, device).view(-1, 2, 2).transpose(1, 2).flatten()

    return index


def unmasked(bias, block):
    return bias if bias.dim() == 3 else bias[:1].expand_as(bias)


MUTANTS = {
    "no mask": replace_tables(bias=unmasked),
    "row and column masks swapped": replace_tables(bias=lambda b, _: b if b.dim() == 3 else b[[0, 2, 1, 3]]),
    "no bias": replace_tables(bias=lambda b, _: torch.zeros_like(b)),
    "bias transposed": replace_tables(bias=lambda b, _: b.transpose(-1, -2)),
    "no logit scale": replace_tables(scale=lambda s, _: torch.ones_like(s)),
    "no clamp": replace_tables(scale=unclamped),
    "wrong eps": replace_tables(norm1=lambda n, _: (*n[:2], 1e-6)),
    "wrong eps after the MLP": replace_tables(norm2=lambda n, _: (*n[:2], 1e-6)),
    "no second norm": replace_tables(norm3=lambda n, _: None),
    "tanh GELU": replace_tables(fc1_gelu=tanh_gelu),
    "no q and k norm": replace_function("_attention", without_norm),
    "residual dropped": replace_function("_norm_residual", lambda f: lambda x, n, r: f(x, n, torch.zeros_like(r))),
    "residual doubled": replace_function("_norm_residual", lambda f: lambda x, n, r: f(x, n, 2 * r)),
    "shift off by one": replace_function(
        "_stream_order", lambda f: lambda b, s: f(b._replace(shift=tuple(max(i - 1, 0) for i in b.shift)), s)
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_fails(model, monkeypatch, name):
    assert swinfast.verify(model, swinfast.optimize(model), IMAGES).passed
    MUTANTS[name](monkeypatch)
    outcome = swinfast.verify(model, swinfast.optimize(model), IMAGES)
    assert not outcome.passed, outcome
    assert "error" in outcome.reason


def test_under_autocast(model, monkeypatch):
    """Both run in the region, and its dtype is the measure."""
    with torch.autocast("cpu", torch.bfloat16):
        outcome = swinfast.verify(model, swinfast.optimize(model), IMAGES)
        assert outcome.passed and outcome.dtype == torch.bfloat16
        assert 1e-3 < outcome.fast.relative_rms < 2 * outcome.plain.relative_rms
        exact = swinfast.optimize(model, dtype=torch.float64)  # which autocast leaves alone
        assert swinfast.verify(model, exact, IMAGES).dtype == torch.float64
        MUTANTS["no bias"](monkeypatch)
        assert not swinfast.verify(model, swinfast.optimize(model), IMAGES).passed


@pytest.mark.parametrize("images", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_second_run_sees_other_images(images):
    """Also where their own dtype is coarser than the one under test."""
    x = IMAGES.to(images)
    assert (_nudge(x, torch.float16) != x).double().mean() > 0.9


def test_merging_in_another_channel_order_fails(model, monkeypatch):
    monkeypatch.setattr(torch_backend.window_order, "merge", swapped_merging(torch_backend.window_order.merge))
    assert not swinfast.verify(model, swinfast.optimize(model), IMAGES).passed


def test_padded_keys_left_out_fails(timm, monkeypatch):
    model = randomise(timm.create_model("swinv2_cr_tiny_224", **small_model_args(window_size=7))).eval()
    fast = swinfast.optimize(model)
    assert swinfast.verify(model, fast, IMAGES).passed
    add_bias = cpu_attention.add_bias

    def masked(scratch, table):
        add_bias(scratch, table)
        scratch.by_window[:, -1, :, :, :, -7:] = -math.inf  # the last row of the last row of windows is padding

    monkeypatch.setattr(cpu_attention, "add_bias", masked)
    assert not swinfast.verify(model, fast, IMAGES).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nan_where_there_is_none(model, dtype):
    fast = swinfast.optimize(model, dtype=dtype)
    with torch.no_grad():
        fast.head.fc.bias[3] = float("nan")
    outcome = swinfast.verify(model, fast, IMAGES)
    assert not outcome.passed
    assert "NaN or infinity" in outcome.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_finite_to_compare(model, dtype):
    with torch.no_grad():
        model.patch_embed.proj.bias[3] = float("nan")
    outcome = swinfast.verify(model, swinfast.optimize(model, dtype=dtype), IMAGES)
    assert not outcome.passed
    assert outcome.reason == "nothing finite to compare"


def test_a_plain_model_without_a_finite_answer(model):
    """In float16 the lengths of q and k that are all zero are 0 there: nothing says how far others may be off."""
    with torch.no_grad():
        for parameter in model.stages[0].blocks[0].attn.qkv.parameters():
            parameter.zero_()
    outcome = swinfast.verify(model, swinfast.optimize(model, dtype=torch.float16), IMAGES)
    assert not outcome.passed
    assert outcome.reason.startswith("the plain model's answers are NaN or infinity wherever the oracle's are not")


class Answers(nn.Module):
    """A model that returns what is made of [B, 5] numbers."""

    def __init__(self, make):
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.make = make

    def forward(self, images):
        return self.make(self.linear(images.mean(dim=(2, 3))))


def test_one_of_several_outputs_is_not_finite():
    model = Answers(lambda x: (x, x * math.nan, x[:, :0])).eval()
    assert swinfast.verify(model, model, IMAGES).reason == "output 1: nothing finite to compare"


def test_outputs_of_another_shape(model):
    fast = swinfast.optimize(model)
    fast.reset_classifier(7)
    fast.head.fc = nn.Linear(fast.head.fc.in_features, 7)
    model.head.fc = nn.Linear(model.head.fc.in_features, 10)
    outcome = swinfast.verify(model, fast, IMAGES)
    assert (outcome.passed, outcome.reason) == (False, f"shape ({len(IMAGES)}, 7), expected ({len(IMAGES)}, 10)")
    assert math.isinf(outcome.fast.relative_rms)


def test_an_output_without_numbers():
    """The others are compared."""
    model, wrong = (Answers(lambda x, factor=factor: [factor * x, x[:, :0]]).eval() for factor in (1.0, 1.01))
    assert swinfast.verify(model, model, IMAGES).passed
    assert not swinfast.verify(model, wrong, IMAGES).passed
    nothing = Answers(lambda x: [x[:, :0], x[:0]]).eval()
    assert not swinfast.verify(nothing, nothing, IMAGES).passed


def test_a_mapping():
    """Its values are compared in the order of its keys, whatever their own order is."""
    model, same, wrong = (
        Answers(make).eval()
        for make in (
            lambda x: {"b": x, "a": x[:, :2]},
            lambda x: {"a": x[:, :2], "b": x},
            lambda x: {"a": x[:, :2], "b": 1.01 * x},
        )
    )
    for other in (same, wrong):
        other.load_state_dict(model.state_dict())
    assert swinfast.verify(model, same, IMAGES).passed
    outcome = swinfast.verify(model, wrong, IMAGES)
    assert not outcome.passed
    assert outcome.reason.startswith("output 1: relative RMS error")
    assert outcome.top1_agreement is None


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda x: "logits", "str"),
        (lambda x: None, "NoneType"),
        (lambda x: [x, None], r"list\(Tensor, NoneType\)"),
        (lambda x: {"maps": [x]}, r"dict\(list\)"),
        (lambda x: {}, r"dict\(\)"),
    ],
    ids=["str", "None", "list", "nested", "empty"],
)
def test_other_outputs_are_refused(make, said):
    model = Answers(make).eval()
    with pytest.raises(TypeError, match=f"must return a tensor, or a sequence or mapping of tensors, got {said}$"):
        swinfast.verify(model, model, IMAGES)


def test_another_default_device(model):
    with torch.device("meta"):
        assert swinfast.verify(model, model, IMAGES).passed


def test_what_it_returns(model):
    outcome = swinfast.verify(model, swinfast.optimize(model), IMAGES)
    assert outcome.passed
    assert outcome.reason == ""
    assert outcome.top1_agreement == 1.0
    assert 0 < outcome.fast.relative_rms < outcome.fast.relative_max < 1e-4
    assert outcome.fast.max > 0
    assert str(outcome).startswith("passed (float32): relative RMS error ")


def test_top1_agreement_counts(model):
    fast = swinfast.optimize(model)
    with torch.no_grad():
        logits = model(IMAGES)
        fast.head.fc.bias[:] += torch.linspace(30, 0, 10)
        expected = (fast(IMAGES).argmax(-1) == logits.argmax(-1)).float().mean().item()
    outcome = swinfast.verify(model, fast, IMAGES)
    assert expected < 1
    assert outcome.top1_agreement == pytest.approx(expected)
    assert str(outcome).startswith("FAILED: ")


def test_another_number_of_classes(model):
    """Nothing agrees where answers are of another kind."""
    fast = swinfast.optimize(model)
    fast.reset_classifier(3)
    outcome = swinfast.verify(model, fast, IMAGES)
    assert outcome.reason == f"shape ({len(IMAGES)}, 3), expected ({len(IMAGES)}, 10)"
    assert outcome.top1_agreement is None


def test_feature_maps(timm):
    options = small_model_args(features_only=True)
    del options["num_classes"]
    model = randomise(timm.create_model("swinv2_cr_tiny_224", **options)).eval()
    outcome = swinfast.verify(model, swinfast.optimize(model), IMAGES)
    assert outcome.passed
    assert outcome.top1_agreement is None


def test_wrong_arguments(model):
    fast = swinfast.optimize(model)
    with pytest.raises(ValueError, match=r"images must be floating-point, got torch\.uint8"):
        swinfast.verify(model, fast, torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="model is optimized itself"):
        swinfast.verify(fast, fast, IMAGES)
    with pytest.raises(ValueError, match=r"call fast\.eval"):
        swinfast.verify(model, copy.deepcopy(fast).train(), IMAGES)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        swinfast.verify(None, fast, IMAGES)
    with pytest.raises(TypeError, match=r"fast must be a torch\.nn\.Module, got str"):
        swinfast.verify(model, "fast", IMAGES)
    with pytest.raises(TypeError, match=r"images must be a torch\.Tensor, got NoneType"):
        swinfast.verify(model, fast, None)
    for wrong, shape in ((IMAGES[:0], r"\(0, 3, 64, 64\)"), (IMAGES[0], r"\(3, 64, 64\)")):
        with pytest.raises(ValueError, match=rf"images must be .* of at least one image, got shape {shape}"):
            swinfast.verify(model, fast, wrong)
    with pytest.raises(RuntimeError, match=r"images must have 3 channels, got shape \(4, 1, 64, 64\)"):
        swinfast.verify(model, fast, IMAGES[:, :1])
    fast.reset_classifier(0)
    with pytest.raises(ValueError, match="different parameters"):
        swinfast.verify(model, fast, IMAGES)


@pytest.fixture
def settings():
    """PyTorch's for TF32, as they are when nobody touches them; put back as conftest has them."""
    torch.backends.cudnn.allow_tf32 = True
    yield torch.backends
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("products", [False, True], ids=["exact products", "TF32 products"])
def test_convolutions_are_as_exact_as_products(model, settings, products):
    """On a GPU they are in TF32 by default, and errors of 1e-3 would be the bar of a float32 model."""
    settings.cuda.matmul.allow_tf32, seen = products, []
    model.patch_embed.proj.register_forward_pre_hook(lambda *_: seen.append(settings.cudnn.allow_tf32))
    assert swinfast.verify(model, model, IMAGES).passed
    assert seen and set(seen) == {products}
    assert settings.cudnn.allow_tf32


def test_convolutions_that_were_set_by_the_newer_name_stay(model, settings):
    settings.cudnn.conv.fp32_precision = "ieee"
    assert swinfast.verify(model, model, IMAGES).passed
    assert settings.cudnn.conv.fp32_precision == "ieee"
