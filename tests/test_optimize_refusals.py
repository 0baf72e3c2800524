"""What can't be replaced faithfully stays as it is and says so; wrong arguments get an error that says what to do."""

import importlib
import inspect
import re
import sys
from types import ModuleType

import pytest
import torch
from helpers import random_images, randomise, relative_rms, small_model_args
from torch import nn
from torch.nn.utils import parametrizations

import swinfast
from swinfast import torch_backend

IMAGES = random_images(2, 3, 64, 64, dtype=torch.float64)


@pytest.fixture
def model(timm):
    return randomise(timm.create_model("swinv2_cr_tiny_224", **small_model_args())).double().eval()


class Lora(nn.Module):
    """A linear layer with a low-rank update, as PEFT wraps one."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.full((2, base.in_features), 0.1, dtype=torch.float64))
        self.up = nn.Parameter(torch.full((base.out_features, 2), 0.1, dtype=torch.float64))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def add_hook(model):
    model.stages[1].blocks[0].mlp.register_forward_hook(lambda module, inputs, output: output + output.roll(1, -1))


def add_pre_hook(model):
    model.stages[1].blocks[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,))


def add_lora(model):
    model.stages[1].blocks[0].attn.qkv = Lora(model.stages[1].blocks[0].attn.qkv)


def add_parametrization(model):
    parametrizations.weight_norm(model.stages[1].blocks[1].mlp.fc2)


def patch_forward(model):
    layer = model.stages[1].blocks[1].mlp.fc2
    layer.forward = lambda x: nn.functional.linear(x, layer.weight).square()


def patch_a_method(model):
    attention = model.stages[1].blocks[0].attn
    attention._relative_positional_encodings = lambda: 2 * type(attention)._relative_positional_encodings(attention)


def change_activation(model):
    model.stages[1].blocks[0].mlp.act = nn.GELU(approximate="tanh")


def change_norm(model):
    model.stages[1].blocks[0].norm2 = nn.RMSNorm(32, dtype=torch.float64)


def change_merging(model):
    model.stages[1].downsample.reduction = nn.Sequential(model.stages[1].downsample.reduction, nn.Tanh())


def add_a_module(model):
    model.stages[1].blocks[0].gate = nn.Identity()


def subclass_a_block(model):
    block = model.stages[1].blocks[0]

    class Scaled(type(block)):
        def forward(self, x):
            return 1.5 * super().forward(x)

    block.__class__ = Scaled


def subclass_a_block_alike(model):
    subclass_a_block(model)
    type(model.stages[1].blocks[0]).__name__ = "SwinTransformerV2CrBlock"


def keep_a_weight_as_a_buffer(model):
    layer = model.stages[1].blocks[0].mlp.fc1
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.register_buffer("weight", weight)


def keep_a_scale_as_an_attribute(model):
    attention = model.stages[1].blocks[0].attn
    scale = attention.logit_scale.detach().clone()
    del attention.logit_scale
    attention.logit_scale = scale


def script_an_mlp(model):
    model.stages[1].blocks[0].mlp = torch.jit.script(model.stages[1].blocks[0].mlp)


REFUSALS = {
    script_an_mlp: "blocks.0.mlp is a RecursiveScriptModule, expected Mlp",
    add_hook: "blocks.0.mlp has hooks",
    add_pre_hook: "blocks.1 has hooks",
    add_lora: "blocks.0.attn.qkv is a Lora, expected Linear",
    add_parametrization: "blocks.1.mlp.fc2 is a ParametrizedLinear, expected Linear",
    patch_forward: "the forward method of blocks.1.mlp.fc2 is patched",
    patch_a_method: "the _relative_positional_encodings method of blocks.0.attn is patched",
    change_activation: "blocks.0.mlp.act is a GELU with the tanh approximation, expected the exact one",
    change_norm: "blocks.0.norm2 is a RMSNorm, expected LayerNorm",
    change_merging: "downsample.reduction is a Sequential, expected Linear",
    add_a_module: "blocks.0.gate is unknown to swinfast",
    subclass_a_block: "blocks.0 is a Scaled, expected SwinTransformerV2CrBlock",
    subclass_a_block_alike: f"blocks.0 is a {__name__}.SwinTransformerV2CrBlock, expected SwinTransformerV2CrBlock",
    keep_a_weight_as_a_buffer: "blocks.0.mlp.fc1.weight is no parameter",
    keep_a_scale_as_an_attribute: "blocks.0.attn.logit_scale is no parameter",
}


UNCHANGED = (
    script_an_mlp,
    add_a_module,
    add_parametrization,
    keep_a_weight_as_a_buffer,
    keep_a_scale_as_an_attribute,
)  # answers


@pytest.mark.parametrize("when", ["before", "after", "after a call"])
@pytest.mark.parametrize("change", REFUSALS, ids=lambda change: change.__name__)
def test_a_changed_stage_stays_original(model, change, when):
    with torch.no_grad():
        untouched = model(IMAGES)
    fast = None if when == "before" else swinfast.optimize(model)
    if when == "after a call":
        with torch.no_grad():
            fast(IMAGES)
    change(model)
    if fast is None:
        fast = swinfast.optimize(model)
        if change in (patch_forward, patch_a_method):
            change(fast)  # a patch closes over its own layer, which deepcopy does not follow
    else:
        change(fast)
    with torch.no_grad():
        expected = model(IMAGES)
        assert relative_rms(expected, untouched) > 1e-6 or change in UNCHANGED
        assert relative_rms(fast(IMAGES), expected) <= 1e-9
    rows = {row.name: row for row in swinfast.report(fast).rows}
    for name, row in rows.items():
        assert row.replaced == (not name.startswith("stages.1.")), name
    assert rows["stages.1.blocks.0"].detail == REFUSALS[change]
    assert REFUSALS[change] in str(swinfast.report(fast))


PATCHED = {  # a class, by a module of it, and its method: where the report names it
    ("stages.0.blocks.0.attn", "forward"): "blocks.0.attn",
    ("stages.0.blocks.0.attn", "_relative_positional_encodings"): "blocks.0.attn",
    ("stages.0.blocks.0", "_shifted_window_attn"): "blocks.0",
    ("stages.0", "forward"): "SwinTransformerV2CrStage",
}


@pytest.mark.parametrize("when", ["before", "after a call"])
@pytest.mark.parametrize("where", PATCHED, ids=".".join)
def test_a_patched_class_is_seen(model, monkeypatch, where, when):
    fast = swinfast.optimize(model)
    cls, method = type(model.get_submodule(where[0])), where[1]
    own = getattr(cls, method)
    with torch.no_grad():
        untouched = fast(IMAGES) if when == "after a call" else model(IMAGES)
        monkeypatch.setattr(cls, method, lambda *args, **options: 1.5 * own(*args, **options) + 0.1)
        expected = model(IMAGES)
        assert relative_rms(expected, untouched) > 1e-6
        assert relative_rms(fast(IMAGES), expected) <= 1e-9
        assert swinfast.report(fast).rows[1].detail == f"the {method} method of {PATCHED[where]} is patched"
        monkeypatch.undo()
        assert relative_rms(fast(IMAGES), untouched) <= 1e-9
    assert all(row.replaced for row in swinfast.report(fast).rows)


@pytest.fixture
def home(model):
    """The module that the model's classes are from; what a test makes of it is undone."""
    home = sys.modules[type(model).__module__]
    before = dict(vars(home))
    yield home
    vars(home).clear()
    vars(home).update(before)


@pytest.mark.filterwarnings("ignore:Overwriting .* in registry")
def test_a_module_that_was_loaded_again(model, home):
    """As in a notebook: what it makes from then on is not what the model is made of."""
    fast = swinfast.optimize(model.float())
    importlib.reload(home)
    fast.double()
    rows = swinfast.report(fast).rows
    said = f"was defined anew: {home.__name__} was loaded again after the model was made"
    assert rows[1].detail == f"the class of blocks.0 {said}"
    assert rows[3].detail == f"the class of downsample {said}"
    with torch.no_grad():
        assert relative_rms(fast(IMAGES), model.double()(IMAGES)) <= 1e-9


def test_a_module_that_was_imported_again(model, home, monkeypatch):
    """Its functions are others too, but nobody has patched them."""
    again = ModuleType(home.__name__)
    for cls in {type(module) for module in model.modules() if type(module).__module__ == home.__name__}:
        setattr(again, cls.__name__, type(cls.__name__, (nn.Module,), {"__module__": home.__name__}))
    monkeypatch.setitem(sys.modules, home.__name__, again)
    (row, *_) = swinfast.report(swinfast.optimize(model)).rows
    assert row.detail.startswith(f"the class of PatchEmbed was defined anew: {home.__name__} was loaded again")


def test_a_class_that_was_put_in_place_of_another(model, home):
    """That is no loading again: the class comes from elsewhere."""
    name = "SwinTransformerV2CrBlock"
    setattr(home, name, type(name, (getattr(home, name),), {"__module__": __name__}))
    expected = f"blocks.0 is a {home.__name__}.{name}, expected {name}"
    assert swinfast.report(swinfast.optimize(model)).rows[1].detail == expected


def test_a_copy_of_a_known_file_is_not_known(timm, monkeypatch):
    """It may compute anything: here the halves of a block are added up otherwise."""
    home = sys.modules["timm.models.swin_transformer_v2_cr"]
    text = inspect.getsource(home)
    edited = text.replace("x = x + self.drop_path2(", "x = 0.5 * x + self.drop_path2(")
    assert edited != text
    copied = ModuleType("copied")
    copied.__package__ = home.__package__  # for its own imports
    monkeypatch.setitem(sys.modules, "copied", copied)
    exec(compile(re.sub(r"@register_model\n", "", edited), "copied", "exec"), copied.__dict__)
    model = copied.SwinTransformerV2Cr(**small_model_args()).eval()
    with pytest.raises(ValueError, match=r"nothing to optimize in SwinTransformerV2Cr; .* but no copies"):
        swinfast.optimize(model)


def test_a_patched_stage_is_called(model):
    """As wrappers that time or offload modules do it."""
    fast = swinfast.optimize(model)
    with torch.no_grad():
        fast(IMAGES)
        for either in (model, fast):
            stage = either.stages[1]
            stage.forward = lambda x, forward=stage.forward: 3 * forward(x)
        assert relative_rms(fast(IMAGES), model(IMAGES)) <= 1e-9


def test_a_removed_hook_lets_the_stage_be_fused_again(model):
    fast = swinfast.optimize(model)
    handle = fast.stages[0].blocks[0].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        fast(IMAGES)
    assert not swinfast.report(fast).rows[1].replaced
    handle.remove()
    assert all(row.replaced for row in swinfast.report(fast).rows)


def test_hooks_on_replaced_modules_fire_once_with_the_right_tensors(timm, monkeypatch):
    """Hooks on a stage, which is how features are extracted, need no original: also where batches go in parts."""
    monkeypatch.setattr(torch_backend, "CPU_PART", 2 * 56 * 56 * 16)  # two images in stage 1, four in stage 2
    model = randomise(timm.create_model("swinv2_cr_tiny_224", **small_model_args(img_size=112))).double().eval()
    fast = swinfast.optimize(model)
    images = random_images(9, 3, 112, 112, dtype=torch.float64)
    seen = []
    for either in (model, fast):
        for module in (either.patch_embed, either.stages, *either.stages):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output))
        with torch.no_grad():
            either(images)
    assert len(seen) == 8
    assert all(row.replaced for row in swinfast.report(fast).rows)
    for expected, got in zip(seen[:4], seen[4:], strict=True):
        assert relative_rms(got, expected) <= 1e-9


def test_hooks_inside_a_stage_see_whole_batches(timm):
    model = randomise(timm.create_model("swinv2_cr_tiny_224", **small_model_args(img_size=112))).double().eval()
    fast = swinfast.optimize(model)
    seen = []
    fast.stages[0].blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    with torch.no_grad():
        fast(random_images(9, 3, 112, 112, dtype=torch.float64))
    assert seen == [9]


def test_hooks_on_every_module_fire(model):
    counts = []
    for either in (model, swinfast.optimize(model)):
        fired = []
        handle = nn.modules.module.register_module_forward_hook(lambda *arguments, fired=fired: fired.append(1))
        with torch.no_grad():
            either(IMAGES)
        handle.remove()
        counts.append(len(fired))
    assert counts[0] == counts[1] > 50


def test_mixed_dtypes_stay_original_and_raise_as_the_original_does(model):
    fast = swinfast.optimize(model)
    with torch.no_grad():
        fast(IMAGES)
    fast.stages[0].blocks[0].mlp.fc1.float()
    assert "several dtypes" in swinfast.report(fast).rows[1].detail
    with pytest.raises(RuntimeError, match="dtype"), torch.no_grad():
        fast(IMAGES)


def test_padded_convolution_stays_original(model):
    model.patch_embed.proj.padding = (1, 1)
    fast = swinfast.optimize(model)
    assert swinfast.report(fast).rows[0].detail == "proj has padding (1, 1), expected (0, 0)"


def test_nothing_supported():
    with pytest.raises(ValueError, match=r"nothing to optimize in Linear; supported are Swin Transformer V2 models"):
        swinfast.optimize(nn.Linear(2, 2))
    for call in (swinfast.report, swinfast.refresh):
        with pytest.raises(ValueError, match=r"Linear is not optimized: call swinfast.optimize"):
            call(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'torch', 'triton', got 'cuda'"),
        ({"dtype": torch.int8}, ValueError, "dtype must be one of torch.float32, .*, got torch.int8"),
        ({"dtype": "float16"}, ValueError, "dtype must be one of torch.float32, .*, got 'float16'"),
        ({"cuda_graphs": "yes"}, ValueError, "cuda_graphs must be 'auto', True or False, got 'yes'"),
        ({"cuda_graphs": 1}, ValueError, "cuda_graphs must be 'auto', True or False, got 1"),
        ({"mean": (0.5, 0.5, 0.5)}, ValueError, "mean and std must be given together"),
        ({"mean": (0.5,), "std": (0.5, 0.5)}, ValueError, "mean and std must be of one length, got 1 and 2 values"),
        ({"mean": (0.5, 0.5), "std": (0.5, 0)}, ValueError, r"std must be above 0, got \(0\.5, 0\)"),
        ({"mean": ("a",), "std": (0.5,)}, ValueError, r"mean must be a sequence of numbers, .*, got \('a',\)"),
        ({"mean": (0.5,), "std": (float("nan"),)}, ValueError, r"std must be a sequence of numbers, .*, got \(nan,\)"),
        ({"mean": 0.5, "std": 0.5}, ValueError, "mean must be a sequence of numbers, one for each channel, got 0.5"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(model, arguments, error, message):
    with pytest.raises(error, match=message):
        swinfast.optimize(model, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_graphs_without_a_gpu(model):
    with pytest.raises(RuntimeError, match=r"no GPU, and the model is on cpu; use cuda_graphs='auto'"):
        swinfast.optimize(model, cuda_graphs=True)


@pytest.mark.parametrize("call", [swinfast.optimize, swinfast.report, swinfast.refresh], ids=lambda call: call.__name__)
def test_a_model_that_is_none(call):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        call("swinv2_cr_tiny_ns_224")


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 3, 32, 64), AssertionError, r"Input image height \(32\) doesn't match model \(64\)."),
        (torch.zeros(2, 3, 64, 32), AssertionError, r"Input image width \(32\) doesn't match model \(64\)."),
        (torch.zeros(2, 1, 64, 64), RuntimeError, r"images must have 3 channels, got shape \(2, 1, 64, 64\)"),
        (torch.zeros(3, 64, 64), ValueError, r"images must be \[B, 3, H, W\], got shape \(3, 64, 64\)"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.int64), RuntimeError, "images must be float32, .* got torch.int64"),
    ],
    ids=["height", "width", "channels", "dimensions", "dtype"],
)
def test_wrong_images(model, images, error, message):
    with pytest.raises(error, match=message):
        swinfast.optimize(model)(images)


@pytest.mark.parametrize("training", [False, True], ids=["eval mode", "training mode"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ("a", TypeError, "images must be a torch.Tensor, got str"),
        (None, TypeError, "images must be a torch.Tensor, got NoneType"),
        (IMAGES.numpy(), TypeError, "images must be a torch.Tensor, got ndarray"),
        (IMAGES.to_sparse(), RuntimeError, "images must be a dense tensor, got one of layout torch.sparse_coo"),
        (IMAGES.to(torch.float8_e4m3fn), RuntimeError, "images must be float32, .* got torch.float8_e4m3fn"),
        (IMAGES.to(torch.complex64), RuntimeError, "images must be float32, .* got torch.complex64"),
    ],
    ids=["text", "None", "array", "sparse", "float8", "complex"],
)
def test_what_are_no_images(model, images, error, message, grad, training):
    with pytest.raises(error, match=message), torch.set_grad_enabled(grad):
        swinfast.optimize(model).train(training)(images)


@pytest.mark.parametrize("size", [(1, 64), (64, 1)], ids=str)
def test_images_smaller_than_a_patch(timm, size):
    model = timm.create_model("swinv2_cr_tiny_224", **small_model_args(dynamic_img_size=True)).eval()
    images = torch.zeros(1, 3, *size)
    with pytest.raises(RuntimeError):
        model(images)
    with pytest.raises(RuntimeError, match=r"images must be at least 2 by 2, got shape \(1, 3, "):
        swinfast.optimize(model)(images)


def test_uint8_without_mean_and_std(model):
    del model.pretrained_cfg, model.default_cfg
    with pytest.raises(ValueError, match=r"give optimize\(..., mean=..., std=...\)"):
        swinfast.optimize(model)(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))


def test_pixels_and_a_config_with_a_std_of_0(model):
    model.pretrained_cfg = model.pretrained_cfg | {"std": (0.5, 0, 0.5)}
    fast = swinfast.optimize(model)
    with pytest.raises(ValueError, match=r"the std to normalise them with must be above 0, got \(0\.5, 0\.0, 0\.5\)"):
        fast(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_weights(model, layout):
    layer = model.stages[0].blocks[0].mlp.fc1
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse(layout=layout), requires_grad=False)
    with torch.no_grad():
        expected = model(IMAGES)
        fast = swinfast.optimize(model, inplace=True)  # PyTorch can't copy such parameters
        assert relative_rms(fast(IMAGES), expected) <= 1e-9
    details = [row.detail for row in swinfast.report(fast).rows]
    assert f"blocks.0.mlp.fc1.weight has layout {layout}, expected torch.strided" in details


@pytest.mark.parametrize("channels", [1, 4])
def test_uint8_of_other_channels_than_mean_and_std(timm, channels):
    model = timm.create_model("swinv2_cr_tiny_224", **small_model_args(in_chans=channels)).eval()
    pixels = torch.zeros(2, channels, 64, 64, dtype=torch.uint8)
    given = {} if channels == 4 else {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.2)}  # which nobody averages
    with pytest.raises(ValueError, match=f"of {channels} channels, and the mean and std to normalise them with of 3"):
        swinfast.optimize(model, **given)(pixels)
    expected = swinfast.optimize(model, mean=[0.5], std=[0.5])(pixels)
    torch.testing.assert_close(
        swinfast.optimize(model, mean=torch.tensor([0.5]), std=torch.tensor([0.5]))(pixels), expected
    )


def test_float16_on_a_cpu_warns(model):
    with pytest.warns(UserWarning, match="bfloat16 takes half the memory too"):
        swinfast.optimize(model, dtype=torch.float16)


def test_report_of_a_model_in_training_mode(model):
    fast = swinfast.optimize(model.train())
    assert "until model.eval()" in str(swinfast.report(fast))
    assert all(row.replaced for row in swinfast.report(fast).rows)  # dropouts that are in it with the model
    assert "until model.eval()" not in str(swinfast.report(fast.eval()))
