"""What somebody changes in a classifier, before there is a CUDA graph of it or after, is seen by the next answer.

Without a GPU, by a stand-in for captures.
"""

import pytest
import torch
from graph_captures import DEVICE, assert_right, images, optimised, spans_any, tiny, warmed
from helpers import relative_rms
from torch import nn

import swinfast

pytestmark = [pytest.mark.filterwarnings("error:no CUDA graph"), *([pytest.mark.gpu] if DEVICE.type == "cuda" else [])]


@pytest.fixture
def model(timm):
    return tiny(timm)


def replace_classifier(either):
    torch.manual_seed(0)
    either.reset_classifier(5)


def replace_layer(either):
    torch.manual_seed(0)
    either.head.fc = nn.Linear(16, 3, device=DEVICE)


def replace_weight(either):
    either.head.fc.weight = nn.Parameter(either.head.fc.weight * 2)


def move_data(either):
    either.head.fc.weight.data = either.head.fc.weight.data * 2


def pool_otherwise(either):
    either.head.global_pool.pool = nn.AdaptiveMaxPool2d(1)


def drop_bias(either):
    either.head.fc.bias = None


def other_forward_of_a_layer(either):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    either.head.fc.__class__ = Doubled


def patch_a_layer(either):
    layer = either.head.fc
    layer.forward = lambda x: 3 * nn.Linear.forward(layer, x)


def hook_the_head(either):
    either.head.register_forward_hook(lambda module, args, output: output + 1)


def hook_a_layer(either):
    either.head.fc.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def hook_the_patch_embedding(either):
    either.patch_embed.register_forward_hook(lambda module, args, output: output * 1.5)


def hook_the_stages(either):
    either.stages.register_forward_hook(lambda module, args, output: output * 1.5)


def hook_a_stage(either):
    either.stages[0].register_forward_hook(lambda module, args, output: output.flip(3))


def hook_the_model(either):
    either.register_forward_hook(lambda module, args, output: output * 1.5)


def patch_features(either):
    whole = type(either).forward_features
    either.forward_features = lambda x: whole(either, x) * 1.5


def patch_the_head(either):
    whole = type(either).forward_head
    either.forward_head = lambda x: whole(either, x) + 1


def replace_the_head(either):
    either.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


def replace_the_stages(either):
    either.stages = nn.Sequential(either.stages[0])
    either.head = nn.Flatten(1)


def move_data_of_the_patch_embedding(either):
    either.patch_embed.proj.weight.data = either.patch_embed.proj.weight.data.flip(0)


def other_eps(either):
    either.patch_embed.norm.eps = 0.3


def patch_the_patch_embedding(either):
    whole = type(either.patch_embed).forward
    either.patch_embed.forward = lambda x: whole(either.patch_embed, x).flip(1)


def patch_the_stages(either):
    whole = type(either.stages).forward
    either.stages.forward = lambda x: whole(either.stages, x).flip(1)


def patch_the_forward_of_the_head(either):
    whole = type(either.head).forward
    either.head.forward = lambda x: whole(either.head, x) + 1


def replace_a_norm(either):
    class Shifted(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x).flip(-1)

    either.patch_embed.norm.__class__ = Shifted


def replace_the_classifier_by_ones_own(either):
    class Negated(nn.Module):
        def forward(self, x):
            return -x

    either.head.fc = Negated()


def make_weights_of_a_class_of_ones_own(either):
    class Weight(nn.Parameter):
        pass

    either.head.fc.weight = Weight(either.head.fc.weight * 2, requires_grad=False)


def override_a_method_of_the_class_it_has_now(either):
    whole = type(either).forward_features
    either.__class__ = type("Mine", (type(either),), {"forward_features": lambda self, x: whole(self, x) * 1.5})


def override_the_forward_of(name):
    def override(either):
        part = getattr(either, name)
        whole = type(part).forward
        part.__class__ = type("Mine", (type(part),), {"forward": lambda self, x: whole(self, x).flip(1)})

    override.__name__ = f"override_the_forward_of_{name}"
    return override


def weight_that_is_no_parameter(either):
    weight = either.head.fc.weight.detach() * 2
    del either.head.fc.weight
    either.head.fc.weight = weight


def layer_that_is_no_module(either):
    del either.head.fc
    either.head.fc = lambda x: x * 2


def more_in_the_model(either):
    either.more = nn.Identity()
    either.forward_head = lambda x, pre_logits=False: either.more(type(either).forward_head(either, x, pre_logits)) + 1


def sparse_weight(either):
    either.head.fc.weight = nn.Parameter((either.head.fc.weight * 2).to_sparse_csr(), requires_grad=False)


def classifier_made_in_inference_mode(either):
    torch.manual_seed(0)
    with torch.inference_mode():
        either.reset_classifier(5)
    either.requires_grad_(False)


def scripted_layer(either):
    either.head.fc = torch.jit.script(nn.Sequential(either.head.fc, nn.Softplus()))


def head_that_is_no_module(either):
    del either.head
    either.head = lambda x: x.amax((2, 3))


CALLED_AT_EVERY_CALL = [  # by Python: no graph may go around them
    other_forward_of_a_layer, patch_a_layer, hook_the_head, hook_a_layer, hook_the_patch_embedding, hook_the_stages,
    hook_a_stage, patch_features, patch_the_head, replace_the_head, replace_the_stages, patch_the_patch_embedding,
    patch_the_stages, patch_the_forward_of_the_head, replace_a_norm, replace_the_classifier_by_ones_own,
    make_weights_of_a_class_of_ones_own, override_a_method_of_the_class_it_has_now,
    override_the_forward_of("patch_embed"), override_the_forward_of("stages"), weight_that_is_no_parameter,
    layer_that_is_no_module, more_in_the_model, sparse_weight, classifier_made_in_inference_mode, scripted_layer,
    head_that_is_no_module,
]  # fmt: skip
CHANGES = [
    *CALLED_AT_EVERY_CALL, replace_classifier, replace_layer, replace_weight, move_data, pool_otherwise, drop_bias,
    hook_the_model, move_data_of_the_patch_embedding, other_eps,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("before", [True, False], ids=["captured", "fresh"])
def test_changes_are_seen(model, captures, change, before):
    """Those made when there is a graph, and those made before."""
    fast = warmed(model) if before else optimised(model)
    unchanged = model(images(seed=9))
    for either in (model, fast):
        change(either)
    expected = model(images(seed=9))
    assert expected.shape != unchanged.shape or relative_rms(expected, unchanged) > 1e-2
    for _ in range(4):
        assert_right(fast, model, images(seed=9))
    if change in CALLED_AT_EVERY_CALL:
        assert not spans_any(fast)


def test_a_method_of_the_class_that_is_patched(model, captures, monkeypatch):
    fast = warmed(model)
    cls = type(model)
    whole = cls.forward_head
    monkeypatch.setattr(cls, "forward_head", lambda self, x, pre_logits=False: whole(self, x, pre_logits) + 1)
    for _ in range(4):
        assert_right(fast, model, images(seed=9))
    assert not spans_any(fast)


def test_a_method_of_the_class_it_has_now_that_is_patched(model, captures, monkeypatch):
    fast = warmed(model)
    whole = type(fast).forward_features
    monkeypatch.setattr(type(fast), "forward_features", lambda self, x: whole(self, x).flip(3) * 2)
    expected = model.forward_head(model.forward_features(images()) * 2)
    for _ in range(3):
        assert relative_rms(fast(images()), expected) <= 1e-5


def test_modules_beside_the_parts(model, captures):
    """A scripted one has no structure that could be watched."""
    fast = warmed(model)
    fast.beside = torch.jit.script(nn.Linear(2, 2))
    for _ in range(3):
        assert_right(fast, model, images())


def test_hooks_of_all_modules(model, captures):
    fast, calls = warmed(model), []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module)):
        fast(images())
    assert {fast, fast.head.fc, fast.stages[0].blocks[0].mlp.fc1} <= set(calls)


def test_a_head_that_is_trained_alone(model, captures):
    fast = warmed(model)
    for either in (model, fast):
        either.head.requires_grad_(True)
    gradients = [torch.autograd.grad(m(images()).square().sum(), m.head.fc.weight)[0] for m in (model, fast)]
    assert relative_rms(gradients[1], gradients[0]) <= 1e-4


def test_weights_whose_edits_nobody_counts(model, captures):
    fast = optimised(model)
    with torch.inference_mode():
        fast.patch_embed.proj.weight = nn.Parameter(model.patch_embed.proj.weight.clone(), requires_grad=False)
    with torch.inference_mode():
        for _ in range(3):
            assert_right(fast, model, images())
            for either in (model, fast):
                either.patch_embed.proj.weight.mul_(1.1)
    assert not spans_any(fast)


def test_none_before_the_self_check(model, captures, monkeypatch):
    monkeypatch.setenv("SWINFAST_SELF_CHECK", "1")
    fast = optimised(model)
    fast.patch_embed._swinfast.unchecked = True
    fast(images())
    fast.patch_embed._swinfast.unchecked = True
    fast(images())
    assert not spans_any(fast)


def test_a_part_that_is_refreshed(model, captures):
    """After edits past all counters."""
    fast = warmed(model)
    for either in (model, fast):
        either.stages[0].blocks[0].attn.meta_mlp.fc2.weight.data.mul_(-3)
    swinfast.refresh(fast.stages)
    for seed in range(3):
        assert_right(fast, model, images(seed=seed))


def test_a_parameter_that_is_deleted(model, captures):
    fast = warmed(model)
    del fast.head.fc.bias
    with pytest.raises(AttributeError, match="bias"):
        fast(images())


def test_a_weight_that_is_no_parameter_is_edited(model, captures):
    for either in (model, fast := optimised(model)):
        weight_that_is_no_parameter(either)
    for factor in (1, 2, 3, 4):
        for either in (model, fast):
            either.head.fc.weight = either.head.fc.weight * factor
        assert_right(fast, model, images())


def test_a_part_is_optimised_anew(model, captures):
    fast = optimised(model, mean=(0.4,) * 3, std=(0.2,) * 3)
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, device=DEVICE)
    for _ in range(3):
        fast(pixels)
    backend = "triton" if DEVICE.type == "cuda" else "torch"
    swinfast.optimize(fast.patch_embed, backend=backend, inplace=True, mean=(0.1,) * 3, std=(0.5,) * 3)
    for _ in range(3):
        assert relative_rms(fast(pixels), model((pixels / 255 - 0.1) / 0.5)) <= 1e-4
    swinfast.optimize(fast.stages, backend=backend, inplace=True, cuda_graphs=False)
    replayed = captures.replayed
    for _ in range(3):
        fast(pixels)
    assert captures.replayed <= replayed + 1  # in vain
