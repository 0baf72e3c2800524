"""The V2 family, timm's swinv2_* and our own, with timm as oracle. Its maps lie otherwise than those of the CR family,
its position bias is bounded."""

import copy
import importlib
import pickle

import pytest
import torch
from helpers import (
    OPTIONS_OF_V2,
    SMALL,
    SOURCES,
    THREE,
    assert_same_answers,
    images_for,
    make,
    random_images,
    relative_rms,
)
from torch import nn

import swinfast

OPTIONS = OPTIONS_OF_V2["square"]
IMAGES = random_images(2, 3, 64, 64)


@pytest.mark.parametrize("source", ["timm, V2", "reference, V2"])
@pytest.mark.parametrize("name", OPTIONS_OF_V2)
def test_options(timm, name, source):
    model = make(timm, OPTIONS_OF_V2[name], source)
    assert_same_answers(model, swinfast.optimize(model), images_for(OPTIONS_OF_V2[name], batch=2))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_every_module_is_replaced(timm, backend):
    model = make(timm, THREE | {"img_size": 64, "window_size": 4}, "timm, V2")
    if backend == "triton":
        model = model.to("meta")
    rows = swinfast.report(swinfast.optimize(model, backend=backend)).rows
    assert [(row.name, row.kind) for row in rows if "layers.0" not in row.name and "layers.1" not in row.name] == [
        ("patch_embed", "patch embedding"),
        ("layers.2.downsample", "patch merging"),
        ("layers.2.blocks.0", "block"),
        ("layers.2.blocks.1", "block"),
    ]
    assert len(rows) == 1 + 2 + 1 + 3 + 1 + 2
    assert all(row.replaced for row in rows)
    if backend == "triton":
        assert rows[-3].detail.endswith("merge_norm + linear + norm_residual")


@pytest.mark.parametrize("size", [(64, 64), (60, 60), (28, 92), (12, 100), (8, 8)], ids=str)
def test_images_of_any_size(timm, size):
    model = make(timm, OPTIONS_OF_V2["dynamic"], "timm, V2")
    fast = swinfast.optimize(model)
    for height, width in ((64, 64), size, (64, 64)):
        assert_same_answers(model, fast, random_images(2, 3, height, width))


@pytest.mark.parametrize("options, size", [("dynamic", (64, 62)), ("dynamic", (63, 64)), ("square", (64, 60))], ids=str)
def test_sizes_that_timm_refuses(timm, options, size):
    ours, theirs = (make(timm, OPTIONS_OF_V2[options], source) for source in ("reference, V2", "timm, V2"))
    images = random_images(1, 3, *size)
    for either in (ours, swinfast.optimize(ours), theirs, swinfast.optimize(theirs)):
        with pytest.raises(AssertionError, match=r"[iI]nput .*(height|width) \(\d+\)"):
            either(images)


@pytest.mark.filterwarnings("ignore:float16 has no fast path")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["square", "no qkv bias"])
def test_dtypes(timm, name, dtype):
    options = OPTIONS_OF_V2[name]
    model = make(timm, options, "timm, V2")
    outcome = swinfast.verify(model, swinfast.optimize(model, dtype=dtype), images_for(options, batch=2))
    assert outcome.passed, outcome


@pytest.mark.filterwarnings("ignore:float16 has no fast path")
def test_padded_windows_in_float16(timm):
    """Where timm's own answers are NaN: the keys of padded tokens are zero, and float16 has no eps of 1e-12."""
    model = make(timm, OPTIONS_OF_V2["padded"], "timm, V2")
    images = images_for(OPTIONS_OF_V2["padded"], batch=2)
    fast = swinfast.optimize(model, dtype=torch.float16)
    with torch.no_grad():
        expected = copy.deepcopy(model).half().double()(images.double())
        assert not model.half()(images.half()).isfinite().any()
        assert relative_rms(fast(images), expected) <= 1e-2


@pytest.mark.parametrize("source", ["timm, V2", "reference, V2"])
@pytest.mark.parametrize("out_indices", [(0, 1, 2), (1,)], ids=str)
def test_features_only(timm, out_indices, source):
    """Maps [B, H, W, C], as timm gives them; FeatureExtractor turns them."""
    options = THREE | {"img_size": 64, "window_size": 4, "features_only": True, "out_indices": out_indices}
    model = make(timm, {key: value for key, value in options.items() if key != "num_classes"}, source)
    assert_same_answers(model, swinfast.optimize(model), IMAGES)
    extractor = swinfast.FeatureExtractor(model, workers=0)
    assert extractor.stages == out_indices
    with torch.no_grad():
        for got, expected in zip(extractor(IMAGES).values(), model(IMAGES), strict=True):
            assert relative_rms(got, expected.permute(0, 3, 1, 2)) <= 1e-4


def test_every_method(timm):
    model = make(timm, THREE | {"img_size": 64, "window_size": 4}, "timm, V2").double()
    fast, images = swinfast.optimize(model), IMAGES.double()
    with torch.no_grad():
        features, expected = fast.forward_features(images), model.forward_features(images)
        assert relative_rms(features, expected) <= 1e-9
        assert relative_rms(fast.forward_head(features, pre_logits=True), model.forward_head(expected, True)) <= 1e-9
        for keywords in ({}, {"indices": [0, 2]}, {"indices": [1], "stop_early": True}, {"norm": True}):
            final, maps = fast.forward_intermediates(images, **keywords)
            expected_final, expected_maps = model.forward_intermediates(images, **keywords)
            for got, wanted in zip([final, *maps], [expected_final, *expected_maps], strict=True):
                assert relative_rms(got, wanted) <= 1e-9
        for either in (model, fast):
            either.prune_intermediate_layers(1)
            either.reset_classifier(5)
        fast.head.fc.load_state_dict(model.head.fc.state_dict())
        assert relative_rms(fast(images), model(images)) <= 1e-9


def test_sizes_can_be_changed(timm):
    model = make(timm, OPTIONS, "timm, V2").double()
    fast = swinfast.optimize(model)
    changes = ({"img_size": (48, 80)}, {"window_size": (3, 5)}, {"window_ratio": 4}, {"img_size": 32, "patch_size": 2})
    for change in changes:
        for either in (model, fast):
            either.set_input_size(**change)
        images = random_images(2, 3, *model.patch_embed.img_size).double()
        with torch.no_grad():
            assert relative_rms(fast(images), model(images)) <= 1e-9
        assert all(row.replaced for row in swinfast.report(fast).rows)


EDITS = {
    "q_bias": lambda attn: attn.q_bias.mul_(2),
    "v_bias": lambda attn: attn.v_bias.mul_(2),
    "other v_bias": lambda attn: setattr(attn, "v_bias", nn.Parameter(2 * attn.v_bias)),
    "no biases": lambda attn: [setattr(attn, name, None) for name in ("q_bias", "k_bias", "v_bias")],
    "position bias": lambda attn: attn.cpb_mlp[2].weight.mul_(3),
    "other position bias": lambda attn: setattr(attn.cpb_mlp[0], "weight", nn.Parameter(2 * attn.cpb_mlp[0].weight)),
    "logit_scale": lambda attn: attn.logit_scale.sub_(1),
    "window of the training": lambda attn: (
        setattr(attn, "pretrained_window_size", (9, 9)),
        attn.init_non_persistent_buffers(),
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_are_seen(timm, name):
    model = make(timm, OPTIONS, "timm, V2").double()
    fast, images = swinfast.optimize(model), IMAGES.double()
    with torch.no_grad():
        before = fast(images)
        for either in (model, fast):
            EDITS[name](either.layers[1].blocks[1].attn)
        after = fast(images)
        assert relative_rms(after, before) > 1e-3
        assert relative_rms(after, model(images)) <= 1e-9


def test_copies_and_state(timm):
    model = make(timm, OPTIONS, "timm, V2").double()
    fast, images = swinfast.optimize(model), IMAGES.double()
    assert isinstance(fast, type(model))
    assert fast.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        expected = model(images)
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert relative_rms(other(images), expected) <= 1e-9
            assert all(row.replaced for row in swinfast.report(other).rows)
        fast.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})
        assert relative_rms(fast(images), expected) > 1e-3
        fast.load_state_dict(model.state_dict())
        assert relative_rms(fast(images), expected) <= 1e-9


def test_gradients(timm):
    model = make(timm, OPTIONS_OF_V2["padded"], "timm, V2").double()
    fast = swinfast.optimize(model)
    images = images_for(OPTIONS_OF_V2["padded"]).double()
    for either in (model, fast):
        either(images).square().sum().backward()
    for (name, expected), got in zip(model.named_parameters(), fast.parameters(), strict=True):
        assert relative_rms(got.grad, expected.grad) <= 1e-9, name


def test_images_of_other_dtypes(timm):
    model = make(timm, OPTIONS, "timm, V2").eval()
    fast = swinfast.optimize(model, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    with torch.no_grad():
        assert relative_rms(fast(pixels), model((pixels / 255 - mean) / std)) <= 1e-4
        assert relative_rms(fast(IMAGES.double()), model(IMAGES)) <= 1e-4


def test_compile_and_export(timm):
    model = make(timm, SMALL | {"img_size": 64, "window_size": 4, "dynamic_img_size": True}, "timm, V2")
    fast = swinfast.optimize(model)
    with torch.no_grad():
        expected = model(IMAGES)
        exported = torch.export.export(fast, (IMAGES,)).module()
        assert relative_rms(exported(IMAGES), expected) <= 1e-4
        torch.compiler.reset()
        compiled = torch.compile(fast, backend="eager", fullgraph=True)
        assert relative_rms(compiled(IMAGES), expected) <= 1e-4


def hooked(model):
    model.layers[1].blocks[0].mlp.register_forward_hook(lambda module, args, output: output * 1.5)


def softmax_of_heads(model):
    model.layers[1].blocks[0].attn.softmax.dim = 1


def tanh(model):
    model.layers[1].blocks[0].mlp.act = nn.GELU(approximate="tanh")


def bias_twice(model):
    model.layers[1].blocks[0].attn.qkv.bias = nn.Parameter(torch.ones(96, dtype=torch.float64))


def bias_that_is_no_parameter(model):
    attn = model.layers[1].blocks[0].attn
    del attn.v_bias
    attn.v_bias = torch.ones(32, dtype=torch.float64)


def two_linear_layers(model):
    attn = model.layers[1].blocks[0].attn
    attn.cpb_mlp = nn.Sequential(*attn.cpb_mlp, nn.Linear(4, 4, dtype=torch.float64))
    nn.init.eye_(attn.cpb_mlp[-1].weight)
    nn.init.ones_(attn.cpb_mlp[-1].bias)


def no_k_bias(model):
    model.layers[1].blocks[0].attn.k_bias = None


def k_bias_to_train(model):
    attn = model.layers[1].blocks[0].attn
    del attn.k_bias
    attn.k_bias = nn.Parameter(torch.ones(32, dtype=torch.float64))


LEFT = {
    k_bias_to_train: "blocks.0.attn.k_bias is no buffer",
    hooked: "blocks.0.mlp has hooks",
    softmax_of_heads: "blocks.0.attn.softmax is over dimension 1, expected the last",
    tanh: "blocks.0.mlp.act is a GELU with the tanh approximation, expected the exact one",
    bias_twice: "blocks.0.attn.qkv has a bias of its own",
    bias_that_is_no_parameter: "blocks.0.attn.v_bias is no parameter",
    two_linear_layers: "blocks.0.attn.cpb_mlp.3 is unknown to swinfast",
}


@pytest.mark.parametrize("change", LEFT, ids=lambda change: change.__name__)
def test_what_is_not_known_stays_original(timm, change):
    model = make(timm, OPTIONS, "timm, V2").double()
    fast, images = swinfast.optimize(model), IMAGES.double()
    with torch.no_grad():
        fast(images)
        for either in (model, fast):
            change(either)
        rows = {row.name: row for row in swinfast.report(fast).rows}
        assert rows["layers.1.blocks.0"].detail == LEFT[change]
        assert rows["layers.0.blocks.0"].replaced
        assert relative_rms(fast(images), model(images)) <= 1e-9


def test_a_model_without_zeros_for_k_stays_original(timm):
    """And fails as it does in timm."""
    model = make(timm, OPTIONS, "timm, V2")
    fast = swinfast.optimize(model)
    no_k_bias(fast)
    rows = {row.name: row for row in swinfast.report(fast).rows}
    assert rows["layers.1.blocks.0"].detail == "blocks.0.attn has q_bias and no k_bias"
    with pytest.raises(TypeError):
        fast(IMAGES)


HOMES = {"timm": "timm.models.swin_transformer_v2_cr", "timm, V2": "timm.models.swin_transformer_v2"}
REPLACED = [
    ("timm", "SwinTransformerV2CrBlock"), ("timm", "WindowMultiHeadAttention"), ("timm", "PatchMerging"),
    ("timm", "Mlp"), ("timm, V2", "SwinTransformerV2Block"), ("timm, V2", "PatchMerging"), ("timm, V2", "DropPath"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "name"), REPLACED)
def test_classes_put_in_place_of_known_ones(timm, source, name, monkeypatch):
    """Before the model was made, under their names: what they compute is theirs."""
    home = importlib.import_module(HOMES[source])

    class New(getattr(home, name)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * 1.5

    New.__name__ = New.__qualname__ = name
    monkeypatch.setattr(home, name, New)
    model = make(timm, OPTIONS | {"drop_path_rate": 0.5}, source).double()
    fast = swinfast.optimize(model)
    with torch.no_grad():
        assert relative_rms(fast(IMAGES.double()), model(IMAGES.double())) <= 1e-9
    assert not all(row.replaced for row in swinfast.report(fast).rows)


class Stem(nn.Module):
    def __init__(self, embed):
        super().__init__()
        self.embed = embed

    def forward(self, x):
        return self.embed(x)


def test_patch_embeddings_by_other_names(timm):
    """One beside the stages is known wherever it is, and one that is replaced anywhere."""
    model = make(timm, OPTIONS, "timm, V2")
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scale = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    mean, std = (torch.tensor(values)[:, None, None] for values in scale.values())
    with torch.no_grad():
        expected = model.layers(model.patch_embed((pixels / 255 - mean) / std))
        for parts in ((model.patch_embed, model.layers), (Stem(model.patch_embed), Stem(model.layers))):
            fast = swinfast.optimize(nn.Sequential(*parts), **scale)
            rows = swinfast.report(fast).rows
            assert rows[0].kind == "patch embedding" and all(row.replaced for row in rows)
            assert relative_rms(fast(pixels), expected) <= 1e-4
        first = swinfast.optimize(model)
        again = swinfast.optimize(nn.Sequential(first.patch_embed, first.layers), backend="torch", **scale)
        assert relative_rms(again(pixels), expected) <= 1e-4
        alone = swinfast.optimize(first.patch_embed, backend="torch")
        assert alone._swinfast.backend == "torch"
    parts = nn.Sequential(first.patch_embed, first.layers)
    parts.pretrained_cfg = model.pretrained_cfg  # of 256 by 256
    assert swinfast.transform_of(parts).size == (64, 64)


def test_other_models_keep_their_patch_embedding(timm):
    """The class of the patch embedding is one that many families share."""
    vit = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    with pytest.raises(ValueError, match="found nothing to optimize in VisionTransformer"):
        swinfast.optimize(vit)
    both = nn.ModuleDict({"swin": make(timm, OPTIONS, "timm, V2"), "vit": vit})
    fast = swinfast.optimize(both)
    assert type(fast.vit.patch_embed) is type(vit.patch_embed)
    assert {row.name for row in swinfast.report(fast).rows if row.kind == "patch embedding"} == {"swin.patch_embed"}
    stages = make(timm, OPTIONS, "timm").stages  # of the CR family, whose patch embedding is of a class of its own
    fast = swinfast.optimize(nn.ModuleDict({"stages": stages, "vit": vit}))
    assert type(fast.vit.patch_embed) is type(vit.patch_embed)


@pytest.mark.parametrize("option, value", [("flatten", True), ("output_fmt", "NCHW"), ("dynamic_img_pad", True)])
def test_other_patch_embeddings_stay_original(timm, option, value):
    model = make(timm, OPTIONS, "timm, V2")
    setattr(model.patch_embed, option, value)
    row = swinfast.report(swinfast.optimize(model)).rows[0]
    assert (row.kind, row.replaced) == ("patch embedding", False)
    assert row.detail.startswith(f"it has {option} {value}, expected ")


def test_predictor_and_features(timm, photos):
    model = make(timm, OPTIONS, "timm, V2")
    model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, 64, 64)}
    (prediction,) = swinfast.Predictor(model, topk=2, workers=0).predict([photos / "a.png"])
    assert len(prediction.indices) == 2
    extractor = swinfast.FeatureExtractor(model, stages=[-1, 0], workers=0)
    assert extractor.stages == (0, 1)
    maps = extractor(IMAGES)
    with torch.no_grad():
        for got, expected in zip(maps.values(), model.forward_intermediates(IMAGES)[1], strict=True):
            assert relative_rms(got, expected) <= 1e-4


class Turned(nn.Module):
    """A backbone as detectors have it: maps [B, C, H, W]."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.feature_info = backbone, backbone.feature_info
        self.pretrained_cfg = backbone.pretrained_cfg

    def forward(self, x):
        return [y.permute(0, 3, 1, 2) for y in self.backbone(x)]


def test_maps_that_are_turned_already(timm):
    options = {**OPTIONS, "features_only": True, "out_indices": (0, 1)}
    del options["num_classes"]
    turned = Turned(make(timm, options, "timm, V2"))
    for model in (make(timm, options | {"feature_cls": "getter"}, "timm, V2"), turned):
        with torch.no_grad():
            expected = model(IMAGES)
        for got, wanted in zip(swinfast.FeatureExtractor(model, workers=0)(IMAGES).values(), expected, strict=True):
            assert relative_rms(got, wanted) <= 1e-4


@pytest.mark.parametrize("name", ["square", "padded on one axis", "windows of another size in training", "no qkv bias"])
def test_kernels(timm, name):
    """In Triton's interpreter where there is no GPU."""
    options = OPTIONS_OF_V2[name] | {"depths": (2, 2), "num_heads": (1, 2), "num_classes": 3}
    options |= {"pretrained_window_sizes": options.get("pretrained_window_sizes", (0, 0))[:2]}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make(timm, options, "timm, V2").to(device)
    fast = swinfast.optimize(model, backend="triton")
    assert all(row.detail.startswith("Triton") for row in swinfast.report(fast).rows)
    images = images_for(options).to(device)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(images.double())
        assert relative_rms(fast(images), expected) <= 3e-5


@pytest.mark.parametrize("source", SOURCES)
def test_another_model_of_the_same_class(timm, source):
    """As whoever clones models by their constructor makes it: not optimised yet, and right."""
    fast = swinfast.optimize(make(timm, OPTIONS, source))
    other = type(fast)(**OPTIONS).eval()
    other.load_state_dict(fast.state_dict())
    with torch.no_grad():
        assert relative_rms(other(IMAGES), fast(IMAGES)) <= 1e-4
